"""Whether the loop's thread is scheduled as SCHED_BATCH: wherever nobody else wants its processor all the time.

A woken thread of SCHED_OTHER may take the processor from whoever is at work there. With a client and two nodes on
few processors that is one of them, in the middle of a batch: what it would have handed on as one comes in two parts,
and each costs its own wake-up on every node. A thread of SCHED_BATCH waits until the other one sleeps.

That other one must sleep soon, of course. Beside programs that compute, a wake-up would wait for the rest of their
time slice, milliseconds each time. The kernel counts what our wake-ups have waited; where that is long, the thread is
SCHED_OTHER for a while, and for longer and longer when it happens again at once. What the loop starts, threads and
handlers, is to be `ordinary`, since policies are inherited. A policy that an administrator has chosen stays.

Source: sched(7); /proc/<pid>/schedstat in Linux's Documentation/scheduler/sched-stats.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from typing import Final

WAIT_MAX_S: Final = 700e-6  # for the processor, on average of the wake-ups between two looks
REST_MIN_S: Final = 0.1  # as SCHED_OTHER after longer waits …
REST_MAX_S: Final = 10.0  # … and at most, when they came back at once again and again


class Waits:
    """What the calling thread has waited for a processor since it began: (nanoseconds, times that it got one).

    OSError where the kernel does not count it.
    """

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        if not self.read()[1]:  # built without CONFIG_SCHEDSTATS it may say that not even we ever had a processor
            self.close()
            raise OSError(errno.ENODATA, "the kernel does not count waits for a processor")

    def read(self) -> tuple[int, int]:
        _, waited, times = os.pread(self._fd, 80, 0).split()
        return int(waited), int(times)

    def close(self) -> None:
        os.close(self._fd)


def choose(policy: int) -> None:
    """Give the calling thread this policy, neither of which needs privileges."""
    os.sched_setscheduler(0, policy, os.sched_param(0))


def ordinary() -> None:
    """To be called first in a thread that the loop's thread has started."""
    if os.sched_getscheduler(0) == os.SCHED_BATCH:
        choose(os.SCHED_OTHER)


class Scheduling:
    """Chooses the policy of the thread that calls `look` and `close`; *waits* is for tests."""

    __slots__ = ("_last", "_rest_s", "_rest_until", "_since", "_waits", "batch")

    def __init__(self, waits: Callable[[], Waits] = Waits) -> None:
        self._waits: Waits | None = None
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                self._waits = waits()
        self.batch = False
        self._last = (0, 0)
        self._since = 0.0  # when it became SCHED_BATCH the last time
        self._rest_s = 0.0
        self._rest_until = 0.0

    def look(self, now: float) -> None:
        """To be called every few milliseconds while there is work; *now* is a clock's seconds."""
        if self._waits is None or now < self._rest_until:
            return
        found = self._waits.read()
        waited, times = found[0] - self._last[0], found[1] - self._last[1]
        self._last = found
        if not self.batch:
            self._since = now
            self._become(os.SCHED_BATCH)
        elif waited > times * WAIT_MAX_S * 1e9:
            again = now - self._since < self._rest_s
            self._rest_s = min(2 * self._rest_s, REST_MAX_S) if again else REST_MIN_S
            self._rest_until = now + self._rest_s
            self._become(os.SCHED_OTHER)

    def _become(self, policy: int) -> None:
        try:
            choose(policy)
            self.batch = policy == os.SCHED_BATCH
        except OSError:  # something that confines us forbids it
            self.close()

    def close(self) -> None:
        """The thread goes on as it was before."""
        waits, self._waits = self._waits, None
        if waits is not None:
            waits.close()
        if self.batch:
            self.batch = False
            choose(os.SCHED_OTHER)
