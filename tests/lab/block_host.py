"""A guest whose block device is a Tandem resource: two nodes of this machine, and the kernel's nbd driver there.

The nodes are `tandem.tools.demo_pair.Pair`, offered on the guests' network; the guest reads the same
configuration and runs the same programs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from tandem.tools.demo_pair import Node, Pair, free_ports, program

from .uml import HOST_LAN, CommandFailed, Guest, Lab, Ran

SIZE: Final = 384 << 20  # mkfs.xfs wants 300 MiB
DEVICE: Final = "/dev/nbd0"
WAIT_S: Final = 90.0
TIMEOUT_S: Final = 2  # of a request: short, because the tests wait for it 25 times
# What the kernel says when somebody was given an error. That a connection ended is no error.
ERRORS: Final = ("I/O error", "EXT4-fs error", "XFS (nbd0): log I/O", "Buffer I/O", "BUG:", "Oops", "Remounting",
                 "Corruption", "hung_task", "Call Trace")  # fmt: skip
CLIENT: Final = ["--node", "client", "-c", "/shared/pair/tandem.conf", "--run-dir", "/run/tandem"]


class BlockHost:
    """The guest, and the pair it gets its disk from: up, in sync and alice Primary before each test."""

    def __init__(self, lab: Lab, guest: Guest) -> None:
        self.guest = guest
        (lab.shared / "pair").mkdir()
        self.pair = Pair(lab.shared / "pair", SIZE, net="protocol C; ping-timeout 30; connect-int 1;")
        for node, port in zip(self.pair.nodes, free_ports(2, HOST_LAN), strict=True):
            node.device = f"nbd://{HOST_LAN}:{port}/r0"

    def boot(self) -> None:
        self.guest.boot()
        self.guest.sh("modprobe nbd")

    def prepare(self) -> None:
        """Both nodes up and in sync, alice Primary; nothing attached, and nothing said by the kernel."""
        for node in self.pair.nodes:
            if self.pair.pid(node) is None:
                self.pair.adm(node, "up", "r0")
        self.pair.wait_in_sync()
        self.pair.adm(self.bob, "secondary", "r0")
        self.pair.adm(self.alice, "primary", "r0")
        self.guest.clear_kernel_log()

    @property
    def alice(self) -> Node:
        return self.pair.first

    @property
    def bob(self) -> Node:
        return self.pair.second

    def adm(self, *words: str, check: bool = True) -> Ran:
        """`tandemadm` in the guest."""
        return self.guest.run(*self.command(*words), check=check)

    @staticmethod
    def command(*words: str) -> list[str]:
        return [*program("tandemadm"), *CLIENT, *words]

    @property
    def port(self) -> str:
        """The one that alice offers the volume on."""
        return self.alice.device.rpartition(":")[2].partition("/")[0]

    def attach(self, *options: str) -> None:
        self.adm("nbd", "attach", *options, "--timeout", str(TIMEOUT_S), "r0", DEVICE)

    def spawn_foreground(self) -> None:
        self.guest.spawn(*self.command("nbd", "attach", "--foreground", "r0", DEVICE))

    def listed(self) -> str:
        return self.adm("nbd", "list").out

    def keeper_pid(self) -> int:
        return int(self.guest.read("/run/tandem/client/nbd/nbd0.pid"))

    def keeper_log(self) -> str:
        return self.guest.read("/run/tandem/client/nbd/nbd0.log")

    def errors(self) -> list[str]:
        """What the guest's kernel said about errors since it booted or its log was cleared."""
        return [line for line in self.guest.kernel_log() if any(word in line for word in ERRORS)]

    def says(self, words: str) -> bool:
        """Has the guest's kernel said *words* since its log was cleared?"""
        return any(words in line for line in self.guest.kernel_log())

    def wait(self, until: Callable[[], bool], what: str, limit_s: float = WAIT_S) -> None:
        deadline = time.monotonic() + limit_s
        while not until():
            if time.monotonic() > deadline:
                raise AssertionError(f"not {what} in {limit_s:.0f} s\n{self.report()}")
            time.sleep(0.1)

    def report(self) -> str:
        """What a failure is explained with."""
        parts = ["--- keeper", *self._keeper_lines(), "--- kernel", *self.guest.kernel_log()[-40:], self.pair.logs(30)]
        return "\n".join(parts)

    def _keeper_lines(self) -> list[str]:
        try:
            return self.keeper_log().splitlines()[-40:]
        except CommandFailed:
            return ["(no log)"]

