"""Two nodes on this machine, driven as an operator would: a configuration file, `tandemadm`, files as disks.

Everything lies in one directory: the disks, the configuration, the run directory both nodes share. `Pair`
writes the configuration, runs commands, waits for states by following the daemons' events, and ends what it
started and nothing else: a process is only ever signalled while it holds the lock of its own pid file. The
demonstration and the tests stand on it.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.repl.events import ResourceStatus

from .client import Client, DaemonError, wait_ended
from .paths import NodePaths

MIB: Final = 1 << 20
RESOURCE: Final = "r0"
COMMAND_S: Final = 150.0  # a command answers long before, or something is stuck
END_S: Final = 20.0  # a killed process is gone at once; one that was told to end needs a moment

Predicate = Callable[[ResourceStatus], bool]


class CommandFailed(Exception):
    """A `tandemadm` command ended with another exit code than it should; the text says which and why."""


class Waited(Exception):
    """A state did not come in time; the text has the last status and the end of both logs."""


def free_ports(n_ports: int, host: str = "127.0.0.1") -> list[int]:
    """Ports of *host* that nobody listened on a moment ago, all different."""
    sockets = [socket.socket() for _ in range(n_ports)]
    try:
        for sock in sockets:
            sock.bind((host, 0))
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def program(name: str) -> list[str]:
    """How to run one of our programs: as installed beside this Python, or as a module of it."""
    installed = Path(sys.executable).with_name(name)
    if installed.exists():
        return [str(installed)]
    return [sys.executable, "-m", {"tandemadm": "tandem.tools.adm", "tandemd": "tandem.tools.daemon"}[name]]


@dataclass(slots=True)
class Node:
    """One host of the pair: its name in the configuration, its disk, its address, its files."""

    name: str
    disk: Path
    port: int
    paths: NodePaths
    device: str = "/dev/drbd0"

    @property
    def socket(self) -> Path:
        """The Unix socket of its NBD export, while the device is not an NBD URI of its own."""
        return self.paths.nbd(RESOURCE)

    @property
    def uri(self) -> str:
        """The NBD URI of its export."""
        return self.device if "://" in self.device else f"nbd+unix:///{RESOURCE}?socket={self.socket}"

    @property
    def log(self) -> str:
        """What its daemon has logged, of all its runs."""
        try:
            return self.paths.log(RESOURCE).read_text(errors="replace")
        except OSError:
            return ""


class Pair:
    """Two nodes in *directory*, with disks of *size* bytes. Use as a context manager.

    *net*, *disk*, *options* and *more* are put into the sections of that name of the resource, as they are.
    """

    def __init__(
        self, directory: Path, size: int = 256 * MIB, names: Sequence[str] = ("alice", "bob"), *,
        net: str = "", disk: str = "", options: str = "", more: str = "",
    ) -> None:  # fmt: skip
        self.directory = directory
        self.config = directory / "tandem.conf"
        self.run_dir = directory / "run"
        self.size = size
        self.net, self.disk, self.options, self.more = net, disk, options, more
        self.nodes = [
            Node(name, directory / f"{name}.img", port, NodePaths(self.run_dir, name))
            for name, port in zip(names, free_ports(len(names)), strict=True)
        ]

    @property
    def first(self) -> Node:
        return self.nodes[0]

    @property
    def second(self) -> Node:
        return self.nodes[1]

    def peer_of(self, node: Node) -> Node:
        return self.nodes[1 - self.nodes.index(node)]

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---------------------------------------------------------------------------------- making

    def write_config(self, path: Path | None = None) -> None:
        """The configuration file of both nodes."""
        hosts = "".join(
            f"    on {node.name} {{\n        device    {_quoted(node.device)};\n"
            f"        disk      {_quoted(str(node.disk))};\n"
            f"        meta-disk internal;\n        address   127.0.0.1:{node.port};\n    }}\n"
            for node in self.nodes
        )
        sections = "".join(
            f"    {name} {{ {text} }}\n"
            for name, text in (("net", self.net), ("disk", self.disk), ("options", self.options))
            if text
        )
        (path or self.config).write_text(f"resource {RESOURCE} {{\n{sections}{hosts}{self.more}}}\n")

    def make_disks(self, nodes: Iterable[Node] | None = None) -> None:
        """Sparse files of the pair's size."""
        for node in nodes or self.nodes:
            with open(node.disk, "xb") as file:
                file.truncate(self.size)

    def create(self) -> None:
        """Configuration, disks and metadata; nothing runs yet."""
        self.write_config()
        self.make_disks()
        for node in self.nodes:
            self.adm(node, "create-md", RESOURCE)

    # -------------------------------------------------------------------------------- commands

    def command(self, node: Node, *words: str) -> list[str]:
        """The command line of `tandemadm` for *node*, as it can be typed."""
        where = ["-c", str(self.config), "--node", node.name, "--run-dir", str(self.run_dir)]
        return [*program("tandemadm"), *where, *words]

    def run(self, node: Node, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command, whatever its exit code will be."""
        return subprocess.run(
            self.command(node, *words), stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=COMMAND_S, env=_environment(), check=False,
        )  # fmt: skip

    def adm(self, node: Node, *words: str, code: int = 0) -> str:
        """Run a command that ends with *code*; what it printed on standard output. CommandFailed if not."""
        done = self.run(node, *words)
        if done.returncode != code:
            said = (done.stderr + done.stdout).strip()
            line = f"{node.name}: tandemadm {' '.join(words)}"
            raise CommandFailed(f"{line}: exit code {done.returncode}: {said}")
        return done.stdout

    def up(self) -> None:
        for node in self.nodes:
            self.adm(node, "up", RESOURCE)

    def start(self) -> None:
        """Both nodes made, up, in sync, the first one Primary."""
        self.create()
        self.up()
        self.adm(self.first, "primary", "--force", RESOURCE)
        for node in self.nodes:
            self.adm(node, "wait-sync", "--wfc-timeout=120", RESOURCE)

    # --------------------------------------------------------------------------------- waiting

    def client(self, node: Node) -> Client:
        """A connection to the node's control socket."""
        return Client(node.paths, RESOURCE)

    def status(self, node: Node) -> ResourceStatus:
        with self.client(node) as client:
            return client.status()

    def wait(self, node: Node, what: str, predicate: Predicate, limit_s: float = 60.0) -> ResourceStatus:
        """Follow the node's events until *predicate* holds; Waited, naming *what*, when it does not."""
        deadline = time.monotonic() + limit_s
        with self.client(node) as client:
            status = client.subscribe()
            while not predicate(status):
                following = client.following(max(deadline - time.monotonic(), 0.001))
                if following is not None:
                    status = following.status
                elif time.monotonic() >= deadline:
                    raise Waited(f"{node.name}: not {what} after {limit_s:.0f} s: {status}\n{self.logs(20)}")
        return status

    def wait_in_sync(self, limit_s: float = 60.0) -> None:
        """Wait until both nodes see both disks UpToDate."""
        for node in self.nodes:
            self.wait(node, "in sync", in_sync, limit_s)

    # ------------------------------------------------------------------------------------- end

    def pid(self, node: Node) -> int | None:
        """The pid of the node's daemon, or None when it does not run."""
        if wait_ended(node.paths, RESOURCE, 0.0):
            return None
        text = node.paths.pid(RESOURCE).read_text().strip()
        return int(text) if text.isdigit() else None

    def signal(self, node: Node, number: int) -> None:
        """Send a signal to the node's daemon, if it runs."""
        pid = self.pid(node)
        if pid is not None:
            os.kill(pid, number)

    def kill(self, node: Node) -> None:
        """SIGKILL, as a power cut for the process; returns when it is gone."""
        if not self._signal_and_wait(node, signal.SIGKILL):
            raise Waited(f"{node.name}: the daemon still runs after SIGKILL")

    def _signal_and_wait(self, node: Node, *numbers: int) -> bool:
        """Send signals to the node's daemon; True when the process is gone within END_S."""
        pid = self.pid(node)
        if pid is None:
            return True
        try:
            process = os.pidfd_open(pid)
        except ProcessLookupError:
            return True
        try:
            with contextlib.suppress(ProcessLookupError):
                for number in numbers:
                    signal.pidfd_send_signal(process, number)
            return bool(select.select([process], [], [], END_S)[0])
        finally:
            os.close(process)

    def down(self) -> None:
        for node in self.nodes:
            self.adm(node, "down", RESOURCE)

    def close(self) -> None:
        """End both daemons, politely if they listen, and remove the directory."""
        if self.config.exists():
            for node in self.nodes:
                self.end(node)
        shutil.rmtree(self.directory, ignore_errors=True)

    def end(self, node: Node) -> None:
        """End the node's daemon as its service does: with SIGTERM; returns when it is gone."""
        # SIGCONT, because a test may have stopped it.
        if not self._signal_and_wait(node, signal.SIGTERM, signal.SIGCONT):
            self.kill(node)

    def logs(self, n_lines: int = 40) -> str:
        """The end of both logs, for a message."""
        lines = []
        for node in self.nodes:
            lines += [f"--- log of {node.name}", *node.log.splitlines()[-n_lines:]]
        return "\n".join(lines)


# ------------------------------------------------------------------------------------ what is looked at


def in_sync(status: ResourceStatus) -> bool:
    """Both disks of every volume are UpToDate and nothing is being copied."""
    peers = status.connection.volumes
    return bool(peers) and all(
        volume.disk == peer.peer_disk == "UpToDate" and peer.replication == "Established"
        for volume, peer in zip(status.volumes, peers, strict=True)
    )


def alone(status: ResourceStatus) -> bool:
    """The peer is not connected."""
    return status.connection.connection != "Connected"


def connected(status: ResourceStatus) -> bool:
    return status.connection.connection == "Connected"


def usable_size(status: ResourceStatus) -> int:
    """Bytes of the first volume's export: the disk without its metadata."""
    return status.volumes[0].size


def first_difference(one: Path, other: Path, length: int) -> int | None:
    """The first byte in which the two files differ within *length* bytes, or None when they are equal."""
    step = 4 * MIB
    with open(one, "rb") as a, open(other, "rb") as b:
        for at in range(0, length, step):
            part_a, part_b = (file.read(min(step, length - at)) for file in (a, b))
            if part_a != part_b:
                shorter = min(len(part_a), len(part_b))
                return next((at + i for i in range(shorter) if part_a[i] != part_b[i]), at + shorter)
    return None


def _quoted(text: str) -> str:
    return f'"{text}"' if set(text) & set(" ;{}#\\?=") else text


def _environment() -> dict[str, str]:
    """The environment without settings of another installation."""
    return {key: value for key, value in os.environ.items() if not key.startswith("TANDEM_")}


__all__ = ["CommandFailed", "DaemonError", "Node", "Pair", "Waited", "alone", "connected", "first_difference",
           "free_ports", "in_sync", "program", "usable_size"]  # fmt: skip
