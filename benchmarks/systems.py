"""The systems under measurement: each knows how to start, where its NBD export is, and how to end.

A system is a class with a `title`, an `unavailable` that says why it cannot take part (or nothing), and
`start`, which fills in `uri` and `parts`. To add one, write its class and put it into `ALL` of `replicated`.
Everything a system starts is registered in its `ExitStack`, so it ends whatever happens, and nothing else
does. Here are those with one file and one server; those with two copies are in `replicated`.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Final

from workloads import Workload, cpu_seconds

START_S: Final = 30.0
SERVER, PRIMARY, SECONDARY = "server", "primary", "secondary"  # what the parts of a system are called
SLACK: Final = 1 << 20  # what a backing file has beyond the measured size: room for internal metadata


class BenchError(Exception):
    """A system did not do what the benchmark needs; one sentence."""


class System(ABC):
    """One server, or pair of servers, with one export of *size* usable bytes under *directory*."""

    name: str
    title: str
    is_replicated = False
    is_quick = False  # whether `--quick` measures it
    only: frozenset[str] | None = None  # the workloads it takes part in, None for all

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory / self.name
        self.directory.mkdir(parents=True)
        self.size = size
        self.stack = contextlib.ExitStack()
        self.uri = ""
        self.parts: dict[str, list[int]] = {}

    @classmethod
    def unavailable(cls) -> str:
        """Why this system cannot be measured on this machine; empty when it can."""
        return ""

    @abstractmethod
    def start(self) -> None:
        """Start it; afterwards `uri` can be opened and `parts` has its processes. Raises BenchError."""

    def stop(self) -> None:
        """End everything that was started."""
        self.stack.close()

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return [pid for pids in self.parts.values() for pid in pids]

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time that each of its parts has used so far; by name, so a primary comes before its secondary."""
        ticks = os.sysconf("SC_CLK_TCK")
        return {part: cpu_seconds(pids, ticks) for part, pids in sorted(self.parts.items())}

    def measures(self, workload: Workload) -> bool:
        """Whether it takes part in that."""
        return self.only is None or workload.name in self.only

    @property
    def engine(self) -> list[str]:
        """fio's arguments that say how this system is reached."""
        return ["--ioengine=nbd", f"--uri={self.uri}"]

    def execute(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        """Run fio where this system can be reached. Raises subprocess.TimeoutExpired."""
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)

    # ------------------------------------------------------------------------------ for subclasses

    def backing_file(self, name: str) -> Path:
        """A fully allocated file of the benchmark's size, all in the page cache. BenchError when the disk is full."""
        path = self.directory / name
        try:
            path.touch()
            fill(path, self.size + SLACK)
            with open(path, "rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
        except OSError as error:
            raise BenchError(f"{path} cannot be filled with {self.size >> 20} MiB: {error.strerror}") from error
        return path

    def run(
        self, command: list[str], ready: Path, part: str = SERVER, environment: dict[str, str] | None = None
    ) -> None:
        """Start a server in the foreground of its own process; it is ready when it listens on its socket."""
        log = open(self.directory / "log", "ab")  # noqa: SIM115 - closed with the stack
        self.stack.callback(log.close)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.stack.callback(end, process)
        deadline = time.monotonic() + START_S
        while not listens(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.title} did not start: {last_line(self.directory / 'log')}")
            time.sleep(0.01)
        self.parts[part] = [process.pid]


def fill(path: Path, size: int) -> None:
    """Write the first *size* bytes of a file, in small pieces.

    ext4 (from Linux 6.16 on) caches what was written in large ones in large folios, and then every 4 KiB write walks
    all buffers of such a folio, which would be most of what is measured.
    """
    piece = bytes(range(256)) * 16
    with open(path, "r+b", buffering=0) as file:
        for _ in range(size // len(piece)):
            file.write(piece)


def last_line(log: Path) -> str:
    """What a program said last: the directory with its log will be gone when somebody wants to look."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "it said nothing"
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


class NbdkitFile(System):
    """The reference: one file, served by nbdkit, not replicated."""

    name = "nbdkit"
    is_quick = True
    title = "nbdkit file (not replicated)"

    @classmethod
    def unavailable(cls) -> str:
        return "" if shutil.which("nbdkit") else "nbdkit is not installed (Debian package nbdkit)"

    def start(self) -> None:
        sock = self.directory / "sock"
        self.run(["nbdkit", "-f", "-U", str(sock), "file", str(self.backing_file("disk.img"))], sock)
        self.uri = f"nbd+unix:///?socket={sock}"


class QemuNbd(System):
    """One file, served by qemu-nbd with the page cache like everybody else here, not replicated."""

    name = "qemu-nbd"
    title = "qemu-nbd (not replicated)"

    @classmethod
    def unavailable(cls) -> str:
        return "" if shutil.which("qemu-nbd") else "qemu-nbd is not installed (Debian package qemu-utils)"

    def start(self) -> None:
        sock = self.directory / "sock"
        self.run(
            ["qemu-nbd", "-f", "raw", "-k", str(sock), "-e", "8", "-t", "--cache=writeback", "--aio=threads",
             str(self.backing_file("disk.img"))], sock,
        )  # fmt: skip
        self.uri = f"nbd+unix:///?socket={sock}"


NBD_SERVER_CONFIG: Final = """\
[generic]
unixsock = %(sock)s
listenaddr = 127.0.0.1
port = %(port)d
[disk]
exportname = %(file)s
flush = true
fua = true
"""


class NbdServer(System):
    """One file, served by the reference implementation of the protocol, not replicated."""

    name = "nbd-server"
    title = "nbd-server (not replicated)"

    @classmethod
    def unavailable(cls) -> str:
        return "" if shutil.which("nbd-server") else "nbd-server is not installed (Debian package nbd-server)"

    def start(self) -> None:
        sock = self.directory / "sock"
        values = {"sock": sock, "port": free_port(), "file": self.backing_file("disk.img")}
        (self.directory / "conf").write_text(NBD_SERVER_CONFIG % values, encoding="utf-8")
        pid_file = self.directory / "pid"
        # It forks for every client, unless told to stay in the foreground: then it serves one at a time.
        subprocess.run(["nbd-server", "-C", str(self.directory / "conf"), "-p", str(pid_file)], check=True)
        deadline = time.monotonic() + START_S
        while not (pid_file.exists() and listens(sock)):
            if time.monotonic() > deadline:
                raise BenchError(f"{self.title} did not start")
            time.sleep(0.01)
        self.parts[SERVER] = [int(pid_file.read_text(encoding="ascii"))]
        self.stack.callback(_terminate, self.pids[0])
        self.uri = f"nbd+unix:///disk?socket={sock}"


def _terminate(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # a terminal's Ctrl-C reaches it, too
        os.kill(pid, signal.SIGTERM)


FIRST_PORT: Final = 15_000
LAST_PORT: Final = 32_767  # from here on Linux gives ports to whoever dials, and dialling nodes would take ours
_ports = iter(random.sample(range(FIRST_PORT, LAST_PORT + 1), LAST_PORT + 1 - FIRST_PORT))  # each is given once


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listened on a moment ago, and that nobody gets who only dials."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise BenchError("no TCP port is free")
