"""`make migrate-demo`: a kernel's DRBD pair becomes a Tandem pair and a kernel's pair again, in use all the time.

Two hosts (guests with kernels of their own), the same disks and the same drbd.conf from the beginning to the end. A
service on an ext4 file system acknowledges what is on stable storage, and clients write to it throughout. Host by
host the kernel's DRBD makes way for Tandem and comes back, with fail overs between; once the Primary loses power
instead. Every step tells its time, how much was copied between the disks, and for how long the file system was not
mounted; it is `Broken` when an acknowledged write is missing, when a resync copies more than what was written while
the host was away, when a kernel complains, or when the disks differ at the end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from tandem.tools.demo import interruptible

from .host import SECTOR, Host
from .migrate_told import BLOCK, Step, Telling
from .nodes import PORT, RES, WAIT_S, wait, wait_state
from .pair import BAD_WORDS, MIB, differences
from .store_load import PORT as STORE_PORT
from .store_load import Broken, Load
from .uml import HERE, CommandFailed, Lab, LabError, missing

SIZE: Final = 2048 * MIB
N_ARCHIVE: Final = 64  # files of a MiB that nobody changes after the beginning
ENOUGH: Final = 100  # acknowledged writes before the next command, so that every state is in use
COPY: Final = SIZE // 10  # who moves so much has begun to copy the disk
STORE: Final = f"{HERE}/guest/store.py"
MOUNT: Final = "/srv/store"
PID: Final = "/run/store.pid"
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


def kind(host: Host) -> str:
    return "kernel" if host.is_kernel else "Tandem"


class Story:
    """One playing of the story in *lab*. Its guests are off when the context ends."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.lab = lab
        self.alice = Host(lab.guest("alice", [lab.disk("alice", SIZE)], "384M"), is_kernel=True)
        self.bob = Host(lab.guest("bob", [lab.disk("bob", SIZE)], "384M"), is_kernel=True)
        self.hosts = (self.alice, self.bob)
        self.load = Load([host.address for host in self.hosts])
        self.told = Telling(console, self._now, SIZE)
        self.written = {host.name: 0 for host in self.hosts}

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        self.load.end()
        for host in self.hosts:
            host.guest.kill()

    def play(self) -> None:
        """All steps. Broken, or what the laboratory raises, when one of them does not hold."""
        began = time.monotonic()
        alice, bob = self.hosts
        self._begin()
        self._replace(bob, by_kernel=False)
        self._fail_over(alice, bob)
        self._replace(alice, by_kernel=False)
        self._power_cut(bob, alice)
        self._replace(bob, by_kernel=True)
        self._fail_over(alice, bob)
        self._replace(alice, by_kernel=True)
        self._end()
        self.told.table()
        self.told.console.print(
            f"\nAll of it held, in {time.monotonic() - began:.0f} seconds: "
            f"{self.load.ledger.n_acknowledged} writes acknowledged, none lost."
        )

    # ---------------------------------------------------------------------------------- the steps

    def _begin(self) -> None:
        alice, bob = self.hosts
        with self._step("Two kernels serve an ext4 file system") as step:
            nodes = "".join(f"  on {host.name} {{ address {host.address}:{PORT}; }}\n" for host in self.hosts)
            (self.lab.shared / "drbd.conf").write_text(f"{CONFIG}{nodes}}}\n")
            for host in self.hosts:
                host.boot()
            release = alice.guest.read("/proc/sys/kernel/osrelease").strip()
            version = alice.guest.read("/proc/drbd").split()[1]
            self.told.saw(f"Linux {release}, DRBD {version}; disks of {SIZE // MIB} MiB, {SIZE // BLOCK} blocks")
            for host in self.hosts:
                self._type(host, f"drbdadm create-md --force {RES}")
                self._type(host, f"drbdadm up {RES}")
            wait_state(bob, cs="Connected", disk="Inconsistent")
            self._type(alice, f"drbdadm new-current-uuid --clear-bitmap {RES}/0")
            wait_state(bob, cs="Connected", disk="UpToDate")
            self._type(alice, f"drbdadm primary {RES}")
            self._type(alice, f"mkfs.ext4 -q -N 16384 -J size=8 -E nodiscard,lazy_itable_init=0 {alice.device}")
            self._mount(alice)
            self._serve(alice)
            self.load.archive(N_ARCHIVE)
            self.load.start()
            self._use()
            self._settle(step, at_most=0)

    def _replace(self, host: Host, by_kernel: bool) -> None:
        """The Secondary's disk changes hands while the Primary serves."""
        title = f"{host.name}: {'the kernel replaces Tandem' if by_kernel else 'Tandem replaces the kernel'}"
        other = self._other(host)
        with self._step(title) as step:
            written = other.n_written()
            self._use()
            self._type(host, *host.leave_lines())
            self._use()
            host.is_kernel = by_kernel
            self._type(host, *host.take_lines())
            self._in_sync()
            self._settle(step, at_most=other.n_written() - written)

    def _fail_over(self, source: Host, target: Host) -> None:
        with self._step(f"Fail over: {source.name} ({kind(source)}) to {target.name} ({kind(target)})") as step:
            self._use()
            self._stop_service(source)
            gone = time.monotonic()
            self._type(source, f"umount {MOUNT}", *source.demote_lines())
            self._copy(target)
            self._type(target, *target.promote_lines())
            self._mount(target)
            step.unmounted = time.monotonic() - gone
            self._serve(target)
            self._check_copy()
            self._settle(step, at_most=0)

    def _power_cut(self, victim: Host, survivor: Host) -> None:
        """The Primary is gone from one moment to the next. Its activity log says what may differ."""
        with self._step(f"{victim.name} loses power; {survivor.name} takes over") as step:
            self._use()
            gone = time.monotonic()
            victim.guest.kill()
            self.written[victim.name] = 0  # its kernel counts from the boot
            self.told.saw(f"{victim.name}: off")
            wait(survivor, lambda s: s.cs == "WFConnection", "alone")
            self._type(survivor, *survivor.promote_lines())
            self._mount(survivor)
            step.unmounted = time.monotonic() - gone
            self._serve(survivor)
            victim.boot()
            self.told.saw(f"{victim.name}: on")
            self._type(victim, *victim.take_lines())
            self._settle(step, at_most=COPY)

    def _end(self) -> None:
        with self._step("Both disks, byte by byte") as step:
            self.load.stop()
            step.n_checked = self.load.check()
            primary = next(host for host in self.hosts if host.state().role == "Primary")
            self._stop_service(primary)
            self._type(primary, f"umount {MOUNT}", *primary.demote_lines())
            size = int(primary.guest.read("/sys/block/drbd0/size")) * SECTOR
            for host in self.hosts:
                wait_state(host, disk="UpToDate", role="Secondary", oos=0)
                self._type(host, *host.leave_lines())
            wrong = differences(self.alice.disk_file(), self.bob.disk_file(), size)
            if wrong:
                raise Broken(f"the disks differ in {len(wrong)} blocks, the first at byte {wrong[0]}")
            self.told.saw(f"{size} bytes are the same on both disks")
            self._copy(self.bob)
            self._check_copy()

    # ------------------------------------------------------------------------------------ their parts

    @contextmanager
    def _step(self, title: str) -> Iterator[Step]:
        for host in self.hosts:
            self.written[host.name] = 0
            if host.guest.running:
                host.forget_logs()
                self.written[host.name] = host.n_written()
        self.load.longest()
        with self.told.step(title) as step:
            yield step

    def _settle(self, step: Step, at_most: int) -> None:
        """The end of a step: both in sync, nobody complains, all that was acknowledged is there.

        Broken when the resyncs of this step moved more than *at_most* bytes, or when a disk was written as if
        there had been a copy.
        """
        self._in_sync()
        self._use()
        step.longest = self.load.longest()
        step.moved = max(self._moved(host) for host in self.hosts)
        if step.moved > at_most:
            raise Broken(f"{step.moved >> 10} KiB were copied, it should be {at_most >> 10} KiB at most")
        step.n_checked = self.load.check()
        for host in self.hosts:
            written = host.n_written() - self.written[host.name]
            if written > COPY:
                raise Broken(f"{written >> 20} MiB were written to the disk of {host.name}")
            state = host.state()
            self.told.saw(f"{host.name:5} {kind(host):6} cs:{state.cs} ro:{state.role}/{state.peer} "
                          f"ds:{state.disk}/{state.pdsk}")  # fmt: skip

    def _in_sync(self) -> None:
        for host in self.hosts:
            wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate", oos=0)

    def _moved(self, host: Host) -> int:
        """Bytes of the resyncs that *host* took part in during this step, as it says itself."""
        log = host.log()
        for line in log:
            if any(word in line for word in COMPLAINTS):
                raise Broken(f"{host.name} complains: {line}")
        return sum(int(found[1]) << 10 for line in log if (found := SYNC.search(line)))

    def _use(self) -> None:
        """Go on when the service has acknowledged some more writes."""
        enough = self.load.ledger.n_acknowledged + ENOUGH
        deadline = time.monotonic() + WAIT_S
        while self.load.ledger.n_acknowledged < enough:
            self.load.complain()
            if time.monotonic() > deadline:
                raise Broken(f"the service acknowledges nothing any more: {[str(h.state()) for h in self.hosts]}")
            time.sleep(0.02)

    def _type(self, host: Host, *lines: str) -> None:
        for line in lines:
            self.told.typed(host.name, line)
            host.guest.sh(line)

    def _mount(self, host: Host) -> None:
        self._type(host, f"mount {host.device} {MOUNT}")

    def _serve(self, host: Host) -> None:
        self.told.saw(f"{host.name}: the service starts")
        host.guest.spawn("/usr/bin/python3", "-I", "-S", STORE, host.address, str(STORE_PORT), MOUNT, PID)

    def _stop_service(self, host: Host) -> None:
        self.told.saw(f"{host.name}: the service stops")
        host.guest.sh(f"pid=$(cat {PID}); kill $pid; while kill -0 $pid 2> /dev/null; do sleep .02; done")

    def _other(self, host: Host) -> Host:
        return self.bob if host is self.alice else self.alice

    @property
    def _image(self) -> Path:
        return self.lab.work / "image"

    def _copy(self, host: Host) -> None:
        """Keep the disk as it is now, while nobody writes to it, for `_check_copy`."""
        subprocess.run(["cp", "--sparse=always", host.disk_file(), self._image], check=True)

    def _check_copy(self) -> None:
        """Broken unless the file system on the copy is faultless."""
        done = subprocess.run(["e2fsck", "-f", "-n", self._image], capture_output=True, text=True, check=False)
        self._image.unlink()
        if done.returncode:
            raise Broken(f"e2fsck: {done.stdout}{done.stderr}")
        self.told.saw("e2fsck -f -n finds nothing wrong")

    def _now(self) -> str:
        return f"{self.load.ledger.n_acknowledged} writes acknowledged"


Trouble: Final = (Broken, CommandFailed, LabError, AssertionError)


def main() -> int:
    """Entry point of ``python -m tests.lab.migrate``; the exit code."""
    console = Console(soft_wrap=True, highlight=False)
    why = missing()
    if why:
        console.print(f"make migrate-demo: {why}")
        return 1
    with Lab() as lab:
        try:
            with interruptible(), Story(lab, console) as story:
                story.play()
        except KeyboardInterrupt:
            console.print("\nEnding.")
            return 130
        except Trouble as error:
            console.print(f"\n{type(error).__name__}: {error}", markup=False)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
