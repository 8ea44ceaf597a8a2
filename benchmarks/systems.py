"""The systems under measurement: each knows how to start, where its NBD export is, and how to end.

A system is a class with a `title`, an `available` that says why it cannot take part (or nothing), and
`start`, which fills in `uri` and `pids`. To add one, write its class and put it into `ALL`. Everything a
system starts is registered in its `ExitStack`, so it ends whatever happens, and nothing else does.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

START_S: Final = 30.0
SLACK: Final = 1 << 20  # what a backing file has beyond the measured size: room for internal metadata
REPOSITORY: Final = Path(__file__).resolve().parent.parent


class BenchError(Exception):
    """A system did not do what the benchmark needs; one sentence."""


class System(ABC):
    """One server, or pair of servers, with one export of *size* usable bytes under *directory*."""

    name: str
    title: str

    def __init__(self, directory: Path, size: int) -> None:
        self.directory = directory / self.name
        self.directory.mkdir(parents=True)
        self.size = size
        self.stack = contextlib.ExitStack()
        self.uri = ""
        self.pids: list[int] = []

    @classmethod
    def unavailable(cls) -> str:
        """Why this system cannot be measured on this machine; empty when it can."""
        return ""

    @abstractmethod
    def start(self) -> None:
        """Start it; afterwards `uri` can be opened and `pids` are its processes. Raises BenchError."""

    def stop(self) -> None:
        """End everything that was started."""
        self.stack.close()

    # ------------------------------------------------------------------------------ for subclasses

    def backing_file(self, name: str) -> Path:
        """A fully allocated file of the benchmark's size, all of it in the page cache.

        It is filled in small pieces: ext4 (from Linux 6.16 on) caches what was written in large ones in
        large folios, and then every 4 KiB write walks all buffers of such a folio, which would be most of
        what is measured.
        """
        path = self.directory / name
        piece = bytes(range(256)) * 16
        with open(path, "wb", buffering=0) as file:
            for _ in range((self.size + SLACK) // len(piece)):
                file.write(piece)
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        return path

    def run(self, command: list[str], ready: Path) -> None:
        """Start a server in the foreground of its own process; it is ready when its socket is there."""
        log = open(self.directory / "log", "ab")  # noqa: SIM115 - closed with the stack
        self.stack.callback(log.close)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.stack.callback(_end, process)
        deadline = time.monotonic() + START_S
        while not _listens(ready):
            if process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"{self.title} did not start: {_last_line(self.directory / 'log')}")
            time.sleep(0.01)
        self.pids.append(process.pid)


def _last_line(log: Path) -> str:
    """What a program said last: the directory with its log will be gone when somebody wants to look."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return "it said nothing"
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True


class NbdkitFile(System):
    """The reference: one file, served by nbdkit, not replicated."""

    name = "nbdkit"
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


CONFIG: Final = """\
global { usage-count no; }
resource r0 {
  net { protocol C; }
  meta-disk internal;
  on alice { device "nbd+unix:///r0?socket=%(dir)s/alice.nbd"; disk %(alice)s; address 127.0.0.1:%(port_a)d; }
  on bob   { device "nbd+unix:///r0?socket=%(dir)s/bob.nbd";   disk %(bob)s;   address 127.0.0.1:%(port_b)d; }
}
"""


class Tandem(System):
    """Two nodes on loopback, protocol C. *tree* is another checkout to run, for before and after."""

    name = "tandem"
    title = "Tandem, protocol C"
    tree: Path | None = None

    def start(self) -> None:
        values = {
            "dir": self.directory, "alice": self.backing_file("alice.img"), "bob": self.backing_file("bob.img"),
            "port_a": _free_port(), "port_b": _free_port(),
        }  # fmt: skip
        (self.directory / "conf").write_text(CONFIG % values, encoding="utf-8")
        for node in ("alice", "bob"):
            self.adm(node, "create-md", "--force", "r0")
            self.stack.callback(self._down, node)
            self.adm(node, "up", "r0")
        self.adm("alice", "wait-connect", "r0")
        # Both files hold the same bytes, so the initial sync can be skipped.
        self.adm("alice", "new-current-uuid", "--clear-bitmap", "r0")
        self.adm("alice", "primary", "r0")
        self.uri = f"nbd+unix:///r0?socket={self.directory}/alice.nbd"
        for node in ("alice", "bob"):
            pid = (self.directory / "run" / node / "r0.pid").read_text(encoding="ascii")
            self.pids.append(int(pid))

    def adm(self, node: str, *args: str) -> None:
        """Run tandemadm as *node*."""
        command = [
            sys.executable, "-c", "from tandem.tools.adm import main; main()", "-c", str(self.directory / "conf"),
            "--node", node, "--run-dir", str(self.directory / "run"), *args,
        ]  # fmt: skip
        environment = dict(os.environ)
        if self.tree is not None:
            environment["PYTHONPATH"] = str(self.tree / "tests" / "typing")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            said += f" ({_last_line(self.directory / 'run' / node / 'r0.log')})"
            raise BenchError(f"tandemadm {' '.join(args)} on {node} failed ({done.returncode}): {said}")

    def _down(self, node: str) -> None:
        with contextlib.suppress(BenchError):
            self.adm(node, "down", "r0")

    def statuses(self, node: str) -> Iterator[tuple[float, dict[str, Any]]]:
        """The status of *node* now and whenever it changes, with the time it came."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(120)
            sock.connect(str(self.directory / "run" / node / "r0.ctl"))
            sock.sendall(b'{"do": "events"}\n')
            with sock.makefile("rb") as lines:
                for line in lines:
                    yield time.monotonic(), json.loads(line)["status"]

    def resync(self, write: Any) -> float:
        """Bytes per second of a resync after *write* has run without the peer."""
        self.adm("bob", "disconnect", "r0")
        write()
        began, n_bytes = 0.0, 0
        watch = self.statuses("bob")
        next(watch)
        self.adm("bob", "connect", "r0")
        for at, status in watch:
            peer = status["connection"]["volumes"][0]
            if peer["replication"] == "SyncTarget" and not began:
                began, n_bytes = at, peer["out_of_sync"]
            elif began and status["volumes"][0]["disk"] == "UpToDate":
                return float(n_bytes / (at - began))
        raise BenchError("the daemon of bob ended during the resync")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def other_tree(tree: Path) -> type[Tandem]:
    """Tandem as it stands in another checkout."""

    class Other(Tandem):
        name = "other"
        title = f"Tandem of {tree}"

    Other.tree = tree.resolve()
    return Other


ALL: Final[tuple[type[System], ...]] = (NbdkitFile, QemuNbd, Tandem)
