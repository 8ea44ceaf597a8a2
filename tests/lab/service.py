"""Two hosts that serve a file system: whichever is Primary has it mounted and runs the service of `guest/store.py`.

What an administrator does with such a pair, and what can be asked of it. The clients are a `Load`. All commands are
told to *typed* before they run.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from .host import Host
from .nodes import BAD_WORDS, PORT, RES, WAIT_S, wait_state
from .pair import differences
from .store_load import PORT as STORE_PORT
from .store_load import Broken, Load
from .uml import HERE, Lab

ENOUGH: Final = 60  # acknowledged writes that show that a state is in use
STORE: Final = f"{HERE}/guest/store.py"
MOUNT: Final = "/srv/store"
PID: Final = "/run/store.pid"
MKFS: Final = "mkfs.ext4 -q -N 16384 -J size=8 -E nodiscard,lazy_itable_init=0"
SYNC: Final = re.compile(r"Began resync as \w+ \(will sync (\d+) KB")
COMPLAINTS: Final = (*BAD_WORDS, "EXT4-fs error", "I/O error")
CONFIG: Final = f"""global {{ usage-count no; }}
resource {RES} {{
  net {{ protocol C; ping-int 2; ping-timeout 20; connect-int 1; }}
  disk {{ c-plan-ahead 0; resync-rate 100M; c-min-rate 50M; }}
  device /dev/drbd0;
  disk /dev/ubda;
  meta-disk internal;
"""


def untold(host: str, line: str) -> None:
    """For those who want to see no commands."""


class Service:
    """The pair and its clients. `end` may be called at any time, and must be."""

    def __init__(self, lab: Lab, one: Host, other: Host, typed: Callable[[str, str], None] = untold) -> None:
        self.lab = lab
        self.hosts = (one, other)
        self.load = Load([host.address for host in self.hosts])
        self.typed = typed

    def other(self, host: Host) -> Host:
        return self.hosts[self.hosts.index(host) - 1]

    def end(self) -> None:
        """No client wants anything any more, and the hosts are off."""
        self.load.end()
        for host in self.hosts:
            host.guest.kill()

    # ------------------------------------------------------------------------------------- doing

    def type(self, host: Host, *lines: str) -> None:
        for line in lines:
            self.typed(host.name, line)
            host.guest.sh(line)

    def create(self, primary: Host) -> None:
        """From empty disks, with both hosts on, to a pair in sync and a file system on *primary*, not mounted yet."""
        nodes = "".join(f"  on {host.name} {{ address {host.address}:{PORT}; }}\n" for host in self.hosts)
        (self.lab.shared / "drbd.conf").write_text(f"{CONFIG}{nodes}}}\n")
        for host in self.hosts:
            self.type(host, f"{host.program} create-md --force {RES}", *host.take_lines())
        for host in self.hosts:
            wait_state(host, cs="Connected")
        self.type(primary, f"{primary.program} new-current-uuid --clear-bitmap {RES}/0")
        self.in_sync()
        self.type(primary, *primary.promote_lines(), f"{MKFS} {primary.device}")

    def mount(self, host: Host) -> None:
        self.type(host, f"mount {host.device} {MOUNT}")

    def serve(self, host: Host) -> None:
        host.guest.spawn("/usr/bin/python3", "-I", "-S", STORE, host.address, str(STORE_PORT), MOUNT, PID)

    def stop_serving(self, host: Host) -> None:
        host.guest.end(int(host.guest.read(PID)))

    def release(self, host: Host) -> None:
        """The file system goes away from *host*, which becomes Secondary."""
        self.type(host, f"umount {MOUNT}", *host.demote_lines())

    # ----------------------------------------------------------------------------------- looking

    def use(self) -> None:
        """Go on when the service has acknowledged some more writes."""
        enough = self.load.ledger.n_acknowledged + ENOUGH
        deadline = time.monotonic() + WAIT_S
        while self.load.ledger.n_acknowledged < enough:
            self.load.complain()
            if time.monotonic() > deadline:
                raise Broken(f"the service acknowledges nothing any more: {[str(h.state()) for h in self.hosts]}")
            time.sleep(0.02)

    def in_sync(self) -> None:
        for host in self.hosts:
            wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate", oos=0)

    def moved(self) -> int:
        """Bytes of the resyncs since the hosts' logs were forgotten, by whichever host tells of more.

        Broken when a log has a complaint.
        """
        return max(self._moved(host) for host in self.hosts)

    def _moved(self, host: Host) -> int:
        log = host.log()
        for line in log:
            if any(word in line for word in COMPLAINTS):
                raise Broken(f"{host.name} complains: {line}")
        return sum(int(found[1]) << 10 for line in log if (found := SYNC.search(line)))

    def compare(self) -> int:
        """Take both hosts down, in sync, and compare their disks: how many bytes. Broken when one differs."""
        self.in_sync()
        one, other = self.hosts
        size = one.size()
        for host in self.hosts:
            self.type(host, *host.leave_lines())
        wrong = differences(one.disk_file(), other.disk_file(), size)
        if wrong:
            raise Broken(f"the disks differ in {len(wrong)} blocks, the first at byte {wrong[0]}")
        return size

    @property
    def _image(self) -> Path:
        return self.lab.work / "image"

    def copy(self, host: Host) -> None:
        """Keep the disk as it is now, while nobody writes to it, for `check_copy`."""
        subprocess.run(["cp", "--sparse=always", host.disk_file(), self._image], check=True)

    def check_copy(self) -> None:
        """Broken unless the file system on the copy is faultless."""
        done = subprocess.run(["e2fsck", "-f", "-n", self._image], capture_output=True, text=True, check=False)
        self._image.unlink()
        if done.returncode:
            raise Broken(f"e2fsck: {done.stdout}{done.stderr}")
