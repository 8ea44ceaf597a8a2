"""When the loop stays awake instead of going to sleep: while the next event is likely within microseconds.

A write crosses two processes and comes back, and whoever sleeps meanwhile has to be woken: some 10 µs for
the one who sends, and as much again for the one who wakes up, which is more than all the work on a few writes. So
after a wake-up the loop looks a little longer, without sleeping, as long as that was worth it lately. How long
is learnt from the waits themselves, as hypervisors do it for idle processors (Linux, halt polling).

It takes no processor from anybody: with each look it offers its own to whoever waits for one. Where somebody did
and kept it, the machine may have better things to do, and the loop sleeps as usual: for a moment the first time,
because the kernel's own threads do the same on an idle machine, and for longer and longer when it happens again at
once. And the larger the batches are, the less it looks: what a wake-up costs is shared by the batch, and meanwhile
the next one grows. A long operation is as good as a small batch: next to 128 KiB on their way to two disks a wake-up
is little, and whoever waits awake for them takes the processor, or half of it, from those who carry them. But the parts
of one of half a megabyte or more come so close upon each other that nobody should sleep in between.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import Final

from tandem.repl.requests import DiskOp
from tandem.repl.units import BLOCK_SHIFT

LOOK_MAX_S: Final = 250e-6  # a few times the way to the peer's disk and back
LOOK_FIRST_S: Final = 20e-6  # what the first short wait after long ones is worth
AWAY_S: Final = 500e-6  # longer than a client or the peer needs for its part of a lone write
REST_MIN_S: Final = 0.002  # how long a machine counts as busy on which the processor was away for that long …
REST_MAX_S: Final = 1.0  # … and at most, when it was so again and again
FEW: Final = 4.0  # operations of 4 KiB per wake-up, on average; beyond, twice as many are worth a quarter of the look …
MANY: Final = 10.0  # … and so many none at all
LONG: Final = 8  # operations of 4 KiB that a long one counts for at most …
IN_PARTS: Final = 512 << 10 >> BLOCK_SHIFT  # … unless it has so many blocks and comes in parts


def weight(ops: Sequence[DiskOp]) -> int:
    """What a wake-up has done with *ops* (at least one), in operations of 4 KiB.

    The first one stands for all of them: most batches are of one length, and looking at each would cost more than
    a wrong guess.
    """
    n = ops[0].length >> BLOCK_SHIFT
    if n <= 1 or n >= IN_PARTS:
        return len(ops)
    return len(ops) * (n if n < LONG else LONG)


class Vigil:
    """Keeps *loop* awake after wake-ups that are likely to be followed by another one at once.

    *clock* gives seconds, *offer* lets whoever waits for a processor have this one; both are there for tests.
    """

    __slots__ = ("_began", "_clock", "_learning", "_longest", "_looking", "_loop", "_offer", "_rest_s", "_rest_until",
                 "_size", "_until", "_window")  # fmt: skip

    def __init__(
        self, loop: asyncio.AbstractEventLoop, clock: Callable[[], float] = time.monotonic,
        offer: Callable[[], None] = os.sched_yield,
    ) -> None:  # fmt: skip
        self._loop = loop
        self._clock = clock
        self._offer = offer
        self._looking = False
        self._window = 0.0  # how long the loop looks for the next event; 0: not at all
        self._until = 0.0
        self._began = 0.0  # when the last wake-up ended
        self._learning = False  # the wait that ends next says something about the next one
        self._rest_until = 0.0  # the machine is busy until then
        self._rest_s = 0.0  # how long it counted as busy the last time
        self._longest = LOOK_MAX_S  # how long it may look, for batches like the last ones
        self._size = FEW  # operations per wake-up, a moving average

    def woken(self) -> None:
        """Something has happened: learn from how long it took."""
        if self._looking or not self._learning:
            return  # in time, or not a wait to learn from
        waited = self._clock() - self._began
        if waited > self._longest:  # by halves, so that a long wait among short ones does not end it
            self._window = self._window / 2 if self._window > LOOK_FIRST_S else 0.0
        elif waited > self._window:
            self._window = min(max(2 * self._window, LOOK_FIRST_S), LOOK_MAX_S)

    def watch(self, n: int) -> None:
        """A wake-up with *n* operations (see `weight`) has ended, and what comes next comes from a socket."""
        self._size += (n - self._size) / 8
        self._learning = True
        self._began = self._clock()
        few = FEW / self._size if self._size > FEW else 1.0
        self._longest = LOOK_MAX_S * few * few if self._size < MANY else 0.0
        self._until = self._began + min(self._window, self._longest)
        if not self._looking and self._rest_until < self._began < self._until:
            self._looking = True
            self._loop.call_soon(self._look)

    def sleep(self) -> None:
        """A wake-up has ended, and what comes next takes longer than it is worth staying awake for."""
        self._learning = False
        self._until = 0.0

    def _look(self) -> None:
        """The loop polls its descriptors without waiting, because this call is always due again."""
        now = self._clock()
        if now < self._until:
            self._offer()
            back = self._clock()
            if back - now < AWAY_S:
                self._loop.call_soon(self._look)
                return
            again = back - self._rest_until < self._rest_s
            self._rest_s = min(2 * self._rest_s, REST_MAX_S) if again else REST_MIN_S
            self._rest_until = back + self._rest_s
        self._looking = False
