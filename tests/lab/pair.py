"""One resource with a kernel node and a Tandem node: brought up, looked at, compared, taken down."""

from __future__ import annotations

import contextlib
import os
import random
import re
from pathlib import Path
from typing import Final

from .nodes import (
    RES,
    UNCONFIGURED,
    KernelNode,
    Node,
    State,
    TandemNode,
    resource_text,
    wait,
    wait_state,
)

MIB: Final = 1 << 20
SIZE: Final = 64 * MIB
DATA: Final = 65496 << 10  # what internal metadata leaves of 64 MiB
LINKED: Final = ("Connected", "SyncSource", "SyncTarget", "PausedSyncS", "PausedSyncT", "VerifyS", "VerifyT")


class Pair:
    """The fixture of the matrix. `start` begins a cell, `stop` ends it and looks at the kernel's log."""

    def __init__(self, kernel: KernelNode, tandem: TandemNode, config: Path) -> None:
        self.kernel = kernel
        self.tandem = tandem
        self.config = config
        self.allowed: list[str] = []  # parts of kernel log lines that this cell provokes on purpose
        self.n_volumes = 1

    def node(self, name: str) -> Node:
        return self.kernel if name == "kernel" else self.tandem

    def other(self, node: Node) -> Node:
        return self.tandem if node.is_kernel else self.kernel

    # ------------------------------------------------------------------------------ begin and end

    def configure(self, options: str = "", volumes: int = 1, tandem_options: str | None = None) -> None:
        """Write both nodes' configuration. Tandem gets the same options unless it is to have its own."""
        self.n_volumes = volumes
        self.config.write_text(resource_text(self.kernel, self.tandem, volumes, options))
        if tandem_options is None:
            tandem_options = options
        self.tandem.config.write_text(resource_text(self.kernel, self.tandem, volumes, tandem_options))

    def prepare(
        self, options: str = "", volumes: int = 1, content: str = "different", tandem_options: str | None = None
    ) -> None:
        """Configuration, disk contents (different, same, zero) and fresh metadata; nothing runs yet."""
        self.allowed = []
        self.kernel.clear_log()
        self.configure(options, volumes, tandem_options)
        with contextlib.suppress(FileNotFoundError):
            self.tandem.log_file.unlink()
        for volume in range(volumes):
            nodes: tuple[Node, Node] = (self.kernel, self.tandem)
            for seed, node in enumerate(nodes):
                seed = 0 if content == "same" else seed + 1
                fill(node.disk_file(volume), None if content == "zero" else seed + 10 * volume)
        self.kernel.guest.sh(
            "for d in a b; do blockdev --flushbufs /dev/ubd$d; done; drbdadm create-md --force r0 > /tmp/md 2>&1"
            " || { cat /tmp/md; exit 1; }"
        )
        self.tandem.adm("create-md", "--force", RES)

    def start(self, options: str = "", volumes: int = 1, content: str = "different", sync: str = "") -> None:
        """Both nodes up and connected. *sync*: "" leaves both Inconsistent; "clear" skips the first sync."""
        if sync == "clear" and content == "different":
            content = "same"
        self.prepare(options, volumes, content)
        self.up()
        if sync == "clear":
            for volume in range(volumes):
                self.kernel.adm("new-current-uuid", "--clear-bitmap", f"{RES}/{volume}")
                self.settled("UpToDate", "UpToDate", volume)

    def up(self) -> None:
        self.kernel.adm("up", RES)
        self.tandem.adm("up", RES)
        self.connected()

    def hurry(self) -> None:
        """A resync that a cell slowed down, to catch it in the middle, may run as fast as it can now. Both are up."""
        for path in (self.config, self.tandem.config):
            path.write_text(re.sub(r"resync-rate \d+\w", "resync-rate 200M", path.read_text()))
        for node in (self.kernel, self.tandem):
            node.adm("adjust", RES)

    def connected(self) -> None:
        """Wait until the connection stands on both nodes and all volumes know what to do."""
        for volume in range(self.n_volumes):
            for node in (self.kernel, self.tandem):
                wait(node, lambda s: s.cs in LINKED, "connected", volume)

    def stop(self) -> list[str]:
        """Everything down; the kernel's complaints since `prepare`."""
        hung = self.kernel.guest.running and not self.kernel.guest.answers()
        if hung:
            self.kernel.guest.kill()
        complaints = self.kernel.complaints()
        if self.kernel.guest.running:
            self.kernel.adm("down", RES, check=False)
            if self.kernel.state().cs != UNCONFIGURED:
                self.kernel.guest.kill()
        self.tandem.kill()
        if not self.kernel.guest.running:
            self.kernel.boot()
        if hung:
            complaints.append("the guest hung")
        return [line for line in complaints if not any(part in line for part in self.allowed)]

    # ------------------------------------------------------------------------------------- looking

    def states(self, volume: int = 0) -> tuple[State, State]:
        return self.kernel.state(volume), self.tandem.state(volume)

    def settled(self, kernel_disk: str = "UpToDate", tandem_disk: str = "UpToDate", volume: int = 0) -> State:
        """Wait until both are Connected with these disks and agree with each other; the kernel's state."""

        wait_state(self.kernel, volume, cs="Connected", disk=kernel_disk, pdsk=tandem_disk)
        wait_state(self.tandem, volume, cs="Connected", disk=tandem_disk, pdsk=kernel_disk)
        kernel = self.kernel.state(volume)
        wait(self.tandem, lambda s: s == kernel.mirrored, f"counterpart of {kernel}", volume)
        return kernel

    def in_sync(self, volume: int = 0) -> None:
        """Both UpToDate, no bit set on either side, and the disks equal byte by byte."""
        for n in range(self.n_volumes) if volume == 0 else (volume,):
            state = self.settled(volume=n)
            assert state.oos == 0, f"the kernel still counts {state.oos} KiB out of sync"
            self.compare(n)

    def compare(self, volume: int = 0) -> None:
        """Both disks equal in the data area."""
        size = self.tandem.size(volume)
        wrong = differences(self.kernel.disk_file(volume), self.tandem.disk_file(volume), size)
        assert not wrong, f"disks differ at {wrong[:20]} ({len(wrong)} blocks of 4 KiB)"

    def uuids(self) -> tuple[list[str], list[str]]:
        """Both nodes' generation identifiers, bit 0 of each (the role) cleared."""
        found = []
        for node in (self.kernel, self.tandem):
            text = node.adm("get-gi", RES).out.split(":")
            found.append([f"{int(word, 16) & ~1:016X}" for word in text[:4]])
        return found[0], found[1]

    def both_logs(self) -> str:
        """What a failed cell is explained with: states, and the end of both logs."""
        if not self.kernel.guest.running:
            kernel = ["(off)"]
        elif self.kernel.guest.answers():
            kernel = [str(self.kernel.state()), *self.kernel.log()[-60:]]
        else:
            kernel = ["(does not answer)", self.kernel.guest.console_tail()]
        tandem = [str(self.tandem.state()), *self.tandem.log()[-60:]]
        return "\n".join(["--- kernel", *kernel, "--- tandem", *tandem])

    def resync_counts(self) -> list[int]:
        """KiB of every resync that the kernel began in this cell."""
        counts = []
        for line in self.kernel.log():
            if "Began resync as" in line:
                counts.append(int(line.partition("will sync ")[2].split()[0]))
        return counts


def fill(path: Path, seed: int | None) -> None:
    """Give a disk file new contents without making it another file; None is all zero (and sparse)."""
    size = path.stat().st_size
    os.truncate(path, 0)
    os.truncate(path, size)
    if seed is not None:
        source = random.Random(seed)
        with path.open("r+b") as file:
            for _ in range(size // MIB):
                file.write(source.randbytes(MIB))


def differences(one: Path, two: Path, size: int) -> list[int]:
    """Byte offsets of the 4 KiB blocks that differ in the first *size* bytes."""
    found = []
    with one.open("rb") as a, two.open("rb") as b:
        for at in range(0, size, MIB):
            x, y = a.read(min(MIB, size - at)), b.read(min(MIB, size - at))
            if x != y:
                found += [at + i for i in range(0, len(x), 4096) if x[i : i + 4096] != y[i : i + 4096]]
    return found
