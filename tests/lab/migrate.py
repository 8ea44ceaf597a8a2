"""`make migrate-demo`: a kernel's DRBD pair becomes a Tandem pair and a kernel's pair again, in use all the time.

Two hosts (guests with kernels of their own), the same disks and the same drbd.conf from the beginning to the end. A
service on an ext4 file system acknowledges what is on stable storage, and clients write to it throughout. Host by
host the kernel's DRBD makes way for Tandem and comes back, with fail overs between; once the Primary loses power
instead. Every step tells its time, how much was copied between the disks, and for how long the file system was not
mounted; it is `Broken` when an acknowledged write is missing, when a resync copies more than what was written while
the host was away, when a kernel complains, or when the disks differ at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from tandem.tools.demo import interruptible

from .host import Host
from .migrate_told import BLOCK, Step, Telling
from .nodes import wait
from .pair import MIB
from .service import Service
from .store_load import Broken
from .uml import CommandFailed, Lab, LabError, missing

SIZE: Final = 2048 * MIB
N_ARCHIVE: Final = 64  # files of a MiB that nobody changes after the beginning
COPY: Final = SIZE // 10  # who moves so much has begun to copy the disk


def kind(host: Host) -> str:
    return "kernel" if host.is_kernel else "Tandem"


class Story:
    """One playing of the story in *lab*. Its guests are off when the context ends."""

    def __init__(self, lab: Lab, console: Console) -> None:
        self.alice = Host(lab.guest("alice", [lab.disk("alice", SIZE)], "384M"), is_kernel=True)
        self.bob = Host(lab.guest("bob", [lab.disk("bob", SIZE)], "384M"), is_kernel=True)
        self.hosts = (self.alice, self.bob)
        self.told = Telling(console, self._now, SIZE)
        self.service = Service(lab, *self.hosts, self.told.typed)
        self.load = self.service.load
        self.written = {host.name: 0 for host in self.hosts}

    def __enter__(self) -> Story:
        return self

    def __exit__(self, *_: object) -> None:
        self.service.end()

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
        self._end(bob)
        self.told.table()
        self.told.console.print(
            f"\nAll of it held, in {time.monotonic() - began:.0f} seconds: "
            f"{self.load.ledger.n_acknowledged} writes acknowledged, none lost."
        )

    # ---------------------------------------------------------------------------------- the steps

    def _begin(self) -> None:
        alice = self.alice
        with self._step("Two kernels serve an ext4 file system") as step:
            for host in self.hosts:
                host.boot()
            release = alice.guest.read("/proc/sys/kernel/osrelease").strip()
            version = alice.guest.read("/proc/drbd").split()[1]
            self.told.saw(f"Linux {release}, DRBD {version}; disks of {SIZE // MIB} MiB, {SIZE // BLOCK} blocks")
            self.service.create(alice)
            self.service.mount(alice)
            self._start_service(alice)
            self.load.archive(N_ARCHIVE)
            self.load.start()
            self._settle(step, at_most=0)

    def _replace(self, host: Host, by_kernel: bool) -> None:
        """The Secondary's disk changes hands while the Primary serves."""
        title = f"{host.name}: {'the kernel replaces Tandem' if by_kernel else 'Tandem replaces the kernel'}"
        primary = self.service.other(host)
        with self._step(title) as step:
            written = primary.n_written()
            self.service.use()
            self.service.type(host, *host.leave_lines())
            self.service.use()
            host.is_kernel = by_kernel
            self.service.type(host, *host.take_lines())
            self.service.in_sync()
            self._settle(step, at_most=primary.n_written() - written)

    def _fail_over(self, source: Host, target: Host) -> None:
        with self._step(f"Fail over: {source.name} ({kind(source)}) to {target.name} ({kind(target)})") as step:
            self.service.use()
            self._stop_service(source)
            gone = time.monotonic()
            self.service.release(source)
            self.service.copy(target)
            self.service.type(target, *target.promote_lines())
            self.service.mount(target)
            step.unmounted = time.monotonic() - gone
            self._start_service(target)
            self._check_copy()
            self._settle(step, at_most=0)

    def _power_cut(self, victim: Host, survivor: Host) -> None:
        """The Primary is gone from one moment to the next. Its activity log says what may differ."""
        with self._step(f"{victim.name} loses power; {survivor.name} takes over") as step:
            self.service.use()
            gone = time.monotonic()
            victim.guest.kill()
            self.written[victim.name] = 0  # its kernel counts from the boot
            self.told.saw(f"{victim.name}: off")
            wait(survivor, lambda s: s.cs == "WFConnection", "alone")
            self.service.type(survivor, *survivor.promote_lines())
            self.service.mount(survivor)
            step.unmounted = time.monotonic() - gone
            self._start_service(survivor)
            victim.boot()
            self.told.saw(f"{victim.name}: on")
            self.service.type(victim, *victim.take_lines())
            self._settle(step, at_most=COPY)

    def _end(self, primary: Host) -> None:
        with self._step("Both disks, byte by byte") as step:
            self.load.stop()
            step.n_checked = self.load.check()
            self._stop_service(primary)
            self.service.release(primary)
            self.told.saw(f"{self.service.compare()} bytes are the same on both disks")
            self.service.copy(primary)
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
        """The end of a step: both in sync and in use, nobody complains, all that was acknowledged is there.

        Broken when the resyncs of this step moved more than *at_most* bytes, or when a disk was written as if
        there had been a copy.
        """
        self.service.in_sync()
        self.service.use()
        step.longest = self.load.longest()
        step.moved = self.service.moved()
        if step.moved > at_most:
            raise Broken(f"{step.moved >> 10} KiB were copied, it should be {at_most >> 10} KiB at most")
        step.n_checked = self.load.check()
        for host in self.hosts:
            written = host.n_written() - self.written[host.name]
            if written > COPY:
                raise Broken(f"{written >> 20} MiB were written to the disk of {host.name}")
            s = host.state()
            self.told.saw(f"{host.name:5} {kind(host):6} cs:{s.cs} ro:{s.role}/{s.peer} ds:{s.disk}/{s.pdsk}")

    def _start_service(self, host: Host) -> None:
        self.told.saw(f"{host.name}: the service starts")
        self.service.serve(host)

    def _stop_service(self, host: Host) -> None:
        self.told.saw(f"{host.name}: the service stops")
        self.service.stop_serving(host)

    def _check_copy(self) -> None:
        self.service.check_copy()
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
