"""The two sides of a matrix cell: kernel DRBD in a guest and Tandem on this machine, with the same words.

`State` is what both print; `KernelNode` reads it from /proc/drbd, `TandemNode` from its control socket.
Commands are those of drbdadm on both sides.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from tandem.repl.events import ResourceStatus
from tandem.tools.client import Client, DaemonError
from tandem.tools.paths import NodePaths

from .uml import HOST_LAN, CommandFailed, Guest, Ran

RES: Final = "r0"
WAIT_S: Final = 90.0  # generous: the machine may be busy with other things
PORT: Final = 7788
UNCONFIGURED: Final = "Unconfigured"
BAD_WORDS: Final = ("BAD!", "ASSERT", "unexpected", "bogus", "sock was reset by peer", "BUG:", "Oops")

_PROC_LINE: Final = re.compile(
    r"^\s*(\d+): cs:(\w+)(?: ro:(\w+)/(\w+) ds:(\w+)/(\w+) .*?)?$(?:\n\s+ns:.*? oos:(\d+))?", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class State:
    """One volume as one node sees it, in DRBD 8.4's words. *oos* is KiB out of sync."""

    cs: str
    role: str = "Unknown"
    peer: str = "Unknown"
    disk: str = "Diskless"
    pdsk: str = "DUnknown"
    oos: int = 0

    def __str__(self) -> str:
        return f"cs:{self.cs} ro:{self.role}/{self.peer} ds:{self.disk}/{self.pdsk} oos:{self.oos}"

    @property
    def mirrored(self) -> State:
        """What the other node must see when the connection is quiet."""
        swapped = {"SyncSource": "SyncTarget", "SyncTarget": "SyncSource", "PausedSyncS": "PausedSyncT"}
        swapped |= {"PausedSyncT": "PausedSyncS", "VerifyS": "VerifyT", "VerifyT": "VerifyS"}
        return State(swapped.get(self.cs, self.cs), self.peer, self.role, self.pdsk, self.disk, self.oos)


class Watched(Protocol):
    """What can be waited for."""

    name: str

    def state(self, volume: int = 0) -> State: ...


class Node(Watched, Protocol):
    """What the tests need of either side."""

    is_kernel: bool

    def adm(self, *words: str, check: bool = True) -> Ran: ...
    def disk_file(self, volume: int = 0) -> Path: ...
    def write(self, offset: int, length: int, seed: int, volume: int = 0) -> None: ...
    def trim(self, offset: int, length: int) -> None: ...
    def zero(self, offset: int, length: int) -> None: ...
    def sum(self, offset: int, length: int, volume: int = 0) -> str: ...
    def fio(self, *options: str, volume: int = 0) -> str: ...
    def log(self) -> list[str]: ...


def wait(node: Watched, until: Callable[[State], bool], what: str, volume: int = 0, limit_s: float = WAIT_S) -> State:
    """Poll a node's state until it is as wanted; an AssertionError that names both states if it never is."""
    deadline = time.monotonic() + limit_s
    while True:
        state = node.state(volume)
        if until(state):
            return state
        if time.monotonic() > deadline:
            raise AssertionError(f"{node.name} did not become {what} in {limit_s:.0f} s; it is {state}")
        time.sleep(0.1)


def wait_state(node: Watched, volume: int = 0, limit_s: float = WAIT_S, **fields: str | int) -> State:
    """Wait until the named fields of `State` have these values."""
    words = " ".join(f"{name}:{value}" for name, value in fields.items())
    return wait(
        node, lambda s: all(getattr(s, name) == value for name, value in fields.items()), words, volume, limit_s
    )


def kernel_state(proc_drbd: str, volume: int = 0) -> State:
    """What the text of /proc/drbd says about one volume."""
    for found in _PROC_LINE.finditer(proc_drbd):
        minor, cs, role, peer, disk, pdsk, oos = found.groups()
        if int(minor) == volume:
            return State(cs) if role is None else State(cs, role, peer, disk, pdsk, int(oos or 0))
    return State(UNCONFIGURED)


def tandem_state(status: ResourceStatus, volume: int = 0) -> State:
    """What a daemon's status says about one volume."""
    mine = [v for v in status.volumes if v.number == volume]
    peer = [v for v in status.connection.volumes if v.number == volume]
    if not mine:
        return State(UNCONFIGURED)
    return State(
        peer[0].replication if peer and peer[0].replication not in ("Off", "Established")
        else status.connection.cstate,
        status.role, status.connection.role, mine[0].disk, peer[0].peer_disk if peer else "DUnknown",
        peer[0].out_of_sync // 1024 if peer else 0,
    )  # fmt: skip


class KernelNode:
    """DRBD 8.4.11 in a guest's kernel."""

    is_kernel = True

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.name = guest.name
        self._before: list[str] = []  # what the kernels said that lost their power

    @property
    def address(self) -> str:
        return self.guest.lan

    def device_paths(self) -> list[str]:
        return [f"/dev/ubd{chr(97 + n)}" for n in range(len(self.guest.disks))]

    def boot(self) -> None:
        self.guest.boot()
        self.guest.sh("ln -sf /shared/drbd.conf /etc/drbd.conf; modprobe drbd; modprobe -q crc32c md5 sha1")

    def adm(self, *words: str, check: bool = True) -> Ran:
        return self.guest.run("drbdadm", *words, check=check)

    def state(self, volume: int = 0) -> State:
        return kernel_state(self.guest.read("/proc/drbd"), volume)

    def sent(self) -> int:
        """KiB that volume 0 has sent to the peer."""
        found = re.search(r"\bns:(\d+)", self.guest.read("/proc/drbd"))
        return int(found.group(1)) if found else 0

    def disk_file(self, volume: int = 0) -> Path:
        return self.guest.disks[volume]

    def write(self, offset: int, length: int, seed: int, volume: int = 0) -> None:
        self.guest.sh(
            f"python3 -c 'import random,sys; sys.stdout.buffer.write(random.Random({seed}).randbytes({length}))' |"
            f"dd of=/dev/drbd{volume} bs={_unit(offset, length)} seek={offset // _unit(offset, length)}"
            " iflag=fullblock oflag=direct conv=notrunc status=none"
        )

    def trim(self, offset: int, length: int) -> None:
        self.guest.sh(f"blkdiscard -f -o {offset} -l {length} /dev/drbd0")

    def zero(self, offset: int, length: int) -> None:
        self.guest.sh(f"blkdiscard -f -z -o {offset} -l {length} /dev/drbd0")

    def sum(self, offset: int, length: int, volume: int = 0) -> str:
        unit = _unit(offset, length)
        out = self.guest.sh(
            f"dd if=/dev/drbd{volume} bs={unit} skip={offset // unit} count={length // unit} iflag=direct"
            " status=none | md5sum"
        )
        return out.split()[0]

    def fio(self, *options: str, volume: int = 0) -> str:
        # Threads: fio's processes would share a part of memory that the guest's small /dev/shm must hold.
        return self.guest.run(
            "fio", "--thread", "--verify_state_save=0", f"--filename=/dev/drbd{volume}", "--ioengine=libaio",
            "--direct=1", *options, limit_s=300,
        ).out  # fmt: skip

    def log(self) -> list[str]:
        return self.guest.kernel_log()

    def cut_power(self) -> None:
        """The host is off from one moment to the next; what its kernel said until then counts as said."""
        self._before += self.log()
        self.guest.kill()

    def clear_log(self) -> None:
        """Forget what the kernel said so far."""
        self._before.clear()
        if self.guest.running:
            self.guest.clear_kernel_log()

    def complaints(self) -> list[str]:
        """Lines with `BAD_WORDS` since `clear_log`, power cuts or not."""
        said = self._before + (self.log() if self.guest.running else [])
        return [line for line in said if any(word in line for word in BAD_WORDS)]


class TandemNode:
    """A Tandem daemon of this machine, on the guests' network."""

    is_kernel = False
    address = HOST_LAN

    def __init__(self, name: str, work: Path, disks: list[Path], config: Path) -> None:
        self.name = name
        self.disks = disks
        self.config = config
        self.paths = NodePaths(work / "run", name)
        self.log_file = self.paths.log(RES)

    def device_paths(self) -> list[str]:
        return [str(path) for path in self.disks]

    def adm(self, *words: str, check: bool = True) -> Ran:
        argv = [
            str(Path(sys.executable).with_name("tandemadm")), "--config-file", str(self.config), "--node", self.name,
            "--run-dir", str(self.paths.run_dir), *words,
        ]  # fmt: skip
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=WAIT_S * 2
        )
        if check and done.returncode:
            raise CommandFailed(f"tandemadm {' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return Ran(done.returncode, done.stdout, done.stderr)

    def state(self, volume: int = 0) -> State:
        try:
            with Client(self.paths, RES) as client:
                status = client.status()
        except DaemonError:
            return State(UNCONFIGURED)
        return tandem_state(status, volume)

    def size(self, volume: int = 0) -> int:
        with Client(self.paths, RES) as client:
            return next(v.size for v in client.status().volumes if v.number == volume)

    def disk_file(self, volume: int = 0) -> Path:
        return self.disks[volume]

    def kill(self) -> None:
        """SIGKILL; what the daemon had told the kernel to write stays written."""
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(int(self.paths.pid(RES).read_text()), signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while self.state().cs != UNCONFIGURED and time.monotonic() < deadline:
            time.sleep(0.02)

    def freeze(self, on: bool) -> None:
        """Stop the daemon in mid-air, or let it go on."""
        os.kill(int(self.paths.pid(RES).read_text()), signal.SIGSTOP if on else signal.SIGCONT)

    def uri(self, volume: int = 0) -> str:
        export = f"{RES}/{volume}" if volume else RES
        return f"nbd+unix:///{export}?socket={self.paths.nbd(RES)}"

    def nbd(self, script: str, volume: int = 0) -> str:
        """Run a libnbd script; `h` is the connected handle."""
        done = subprocess.run(
            ["/usr/bin/python3", "-m", "nbd", "-u", self.uri(volume), "-c", script], cwd="/",
            capture_output=True, text=True, check=False, timeout=WAIT_S,
        )  # fmt: skip
        if done.returncode:
            raise CommandFailed(f"nbdsh: {done.stderr}")
        return done.stdout

    def write(self, offset: int, length: int, seed: int, volume: int = 0) -> None:
        unit = _unit(offset, length)
        self.nbd(
            f"import random\ndata = random.Random({seed}).randbytes({length})\n"
            f"for at in range(0, {length}, {unit}): h.pwrite(data[at:at + {unit}], {offset} + at)",
            volume,
        )

    def trim(self, offset: int, length: int) -> None:
        self.nbd(f"h.trim({length}, {offset})")

    def zero(self, offset: int, length: int) -> None:
        self.nbd(f"h.zero({length}, {offset})")

    def sum(self, offset: int, length: int, volume: int = 0) -> str:
        script = (
            "import hashlib\nm = hashlib.md5()\n"
            f"for at in range({offset}, {offset + length}, {_unit(offset, length)}):"
            f" m.update(h.pread({_unit(offset, length)}, at))\nprint(m.hexdigest())"
        )
        return self.nbd(script, volume).strip()

    def fio(self, *options: str, volume: int = 0) -> str:
        done = subprocess.run(
            ["fio", "--thread", "--verify_state_save=0", "--ioengine=nbd", f"--uri={self.uri(volume)}", *options],
            capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        if done.returncode:
            raise CommandFailed(f"fio: {done.stdout}{done.stderr}")
        return done.stdout

    def log(self) -> list[str]:
        try:
            return self.log_file.read_text().splitlines()
        except FileNotFoundError:
            return []


def _unit(offset: int, length: int) -> int:
    """The largest power of two up to 1 MiB that divides both."""
    unit = 1 << 20
    while offset % unit or length % unit:
        unit >>= 1
    assert unit >= 512, "I/O is in sectors"
    return unit


def resource_text(one: KernelNode | TandemNode, two: KernelNode | TandemNode, volumes: int, options: str,
                  meta: str = "internal") -> str:  # fmt: skip
    """A drbd.conf that both drbdadm and tandemadm read. *options* are sections of the resource.

    *meta* is internal, or ``[0]`` or nothing for a place on each node's third disk.
    """
    hosts = ""
    for node in (one, two):
        disks = node.device_paths()
        parts = ""
        for number in range(volumes):
            place = "internal" if meta == "internal" else disks[2] + meta
            parts += f" volume {number} {{ disk {disks[number]}; meta-disk {place}; }}"
        hosts += f"  on {node.name} {{ address {node.address}:{PORT};{parts} }}\n"
    devices = "".join(f"  volume {number} {{ device /dev/drbd{number}; }}\n" for number in range(volumes))
    return f"""global {{ usage-count no; }}
common {{
  disk {{ c-plan-ahead 0; resync-rate 200M; c-min-rate 100M; }}
  net {{ ping-timeout 30; socket-check-timeout 3; connect-int 3; ping-int 5; }}
}}
resource {RES} {{
{devices}{options}
{hosts}}}
"""
