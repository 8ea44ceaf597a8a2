"""A host as an administrator has it: one machine, one disk, and the resource under the kernel's DRBD or under Tandem.

Both read the same drbd.conf, have the same host name and address, and use the same `/dev/ubda`; `is_kernel` says
which one has it now. The block device for the user is `/dev/drbd0`, or `/dev/nbd0`, which the kernel's nbd driver
attaches to the Tandem daemon of the same host.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Final

from tandem.repl.events import ResourceStatus
from tandem.tools.paths import SYSTEM_RUN_DIR, NodePaths
from tandem.tools.values import unpack

from .nodes import RES, UNCONFIGURED, State, kernel_state, tandem_state
from .uml import CommandFailed, Guest, Ran

SECTOR: Final = 512
PROGRAMS: Final = Path(sys.executable).parent  # tandemadm and tandemd, installed beside this Python


class Host:
    """One guest with one disk; a `nodes.Node` as far as commands and states go."""

    def __init__(self, guest: Guest, is_kernel: bool) -> None:
        self.guest = guest
        self.name = guest.name
        self.address = guest.lan
        self.is_kernel = is_kernel
        self.paths = NodePaths(SYSTEM_RUN_DIR, guest.name)

    def boot(self) -> None:
        """Power on. The host's root is new at every boot, so it gets its configuration again."""
        self.guest.boot()
        self.guest.sh(
            "ln -sf /shared/drbd.conf /etc/drbd.conf; ln -sf /shared/drbd.conf /etc/tandem.conf;"
            f"ln -sf {PROGRAMS}/tandemadm {PROGRAMS}/tandemd /usr/local/bin/;"
            "mkdir -p /srv/store; modprobe -q -a nbd crc32c"
        )
        if self.is_kernel:
            self.guest.sh("modprobe drbd")

    def device_paths(self) -> list[str]:
        return ["/dev/ubda"]

    def disk_file(self, volume: int = 0) -> Path:
        return self.guest.disks[volume]

    # ------------------------------------------------------------------------------------ commands

    @property
    def program(self) -> str:
        return "drbdadm" if self.is_kernel else "tandemadm"

    def adm(self, *words: str, check: bool = True) -> Ran:
        return self.guest.run(self.program, *words, check=check)

    @property
    def device(self) -> str:
        return "/dev/drbd0" if self.is_kernel else "/dev/nbd0"

    def take_lines(self) -> list[str]:
        """How the side that `is_kernel` names takes the disk."""
        return [*(["modprobe drbd"] if self.is_kernel else []), f"{self.program} up {RES}"]

    def leave_lines(self) -> list[str]:
        """How it gives the disk back."""
        return [f"{self.program} down {RES}", *(["rmmod drbd"] if self.is_kernel else [])]

    def promote_lines(self) -> list[str]:
        """How the block device comes to be here."""
        attach = f"nbd-client -unix {self.paths.nbd(RES)} -N {RES} /dev/nbd0"
        return [f"{self.program} primary {RES}", *([] if self.is_kernel else [attach])]

    def demote_lines(self) -> list[str]:
        """How it goes away."""
        return [*([] if self.is_kernel else ["nbd-client -d /dev/nbd0"]), f"{self.program} secondary {RES}"]

    # -------------------------------------------------------------------------------------- looking

    def state(self, volume: int = 0) -> State:
        if self.is_kernel:
            return kernel_state(self.guest.read("/proc/drbd"), volume)
        try:
            return tandem_state(self._status(), volume)
        except CommandFailed:
            return State(UNCONFIGURED)

    def size(self) -> int:
        """Bytes of the block device, while the resource is up."""
        if self.is_kernel:
            return int(self.guest.read("/sys/block/drbd0/size")) * SECTOR
        return self._status().volumes[0].size

    def _status(self) -> ResourceStatus:
        """CommandFailed when there is no daemon."""
        answer = self.guest.ask_socket(str(self.paths.control(RES)), '{"do": "status"}')
        return unpack(ResourceStatus, json.loads(answer)["status"])

    def n_written(self) -> int:
        """Bytes that the host's kernel has written to the disk since it booted, whoever told it to."""
        return int(self.guest.read("/sys/block/ubda/stat").split()[6]) * SECTOR

    def forget_logs(self) -> None:
        """Later `log` tells only what happened from now on."""
        self.guest.sh(f"dmesg -C; truncate --no-create --size 0 {self.paths.log(RES)}")

    def log(self) -> list[str]:
        """What DRBD, in whichever form, and the kernel said."""
        return self.guest.sh(f"dmesg; cat {self.paths.log(RES)} 2> /dev/null || true").splitlines()
