"""Ranges in flight and who waits for whom.

Two overlapping operations that change data are never in flight together: not two client writes, not a
client write and a resync copy. The table answers "what stands in my way" and hands back the waiters of
whatever goes. Small ranges are kept per 4 KiB block, so a check is one dictionary look-up; large ones (trims,
zeroes, long copies of a resync) are kept in a short list, because entering each of their blocks would cost
more than walking the few large ranges there ever are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from .units import BLOCK, BLOCK_SHIFT, IO_MAX

SMALL_MAX: Final = IO_MAX
LOCK_SMALL_MAX: Final = 256 << 10  # of a resync's locks, which never meet the data plane's short path


class Range(Protocol):
    offset: int
    length: int


class Lock:
    """A range held by resync, so that no application write starts in it."""

    __slots__ = ("length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length


class Intervals:
    """The ranges of one volume that are being changed or must not change. Block granularity (4 KiB)."""

    __slots__ = ("_waiters", "busy", "large")

    def __init__(self) -> None:
        self.busy: dict[int, Range] = {}  # block -> its holder; the hot path reads it directly
        self.large: list[Range] = []
        self._waiters: dict[Range, list[Callable[[], None]]] = {}

    def __bool__(self) -> bool:
        return bool(self.busy or self.large)

    @staticmethod
    def _is_large(entry: Range) -> bool:
        return entry.length > (LOCK_SMALL_MAX if type(entry) is Lock else SMALL_MAX)

    def blocker(self, offset: int, length: int) -> Range | None:
        """What overlaps the range (rounded out to blocks), or None."""
        first, end = offset >> BLOCK_SHIFT, (offset + length + BLOCK - 1) >> BLOCK_SHIFT
        begin, stop = first << BLOCK_SHIFT, end << BLOCK_SHIFT
        for other in self.large:
            if other.offset < stop and other.offset + other.length > begin:
                return other
        busy = self.busy
        if end - first <= len(busy):
            blocks = range(first, end)
            if busy.keys().isdisjoint(blocks):
                return None
            return next(busy[block] for block in blocks if block in busy)
        for block, other in busy.items():
            if first <= block < end:
                return other
        return None

    def overlapping(self, offset: int, length: int) -> list[Range]:
        """All that share a block with the range."""
        first, end = offset >> BLOCK_SHIFT, (offset + length + BLOCK - 1) >> BLOCK_SHIFT
        busy = self.busy
        if end - first <= len(busy):
            found = {busy[block]: None for block in range(first, end) if block in busy}
        else:
            found = {other: None for block, other in busy.items() if first <= block < end}
        probe = Lock(offset, length)
        return [*found, *(other for other in self.large if overlap(other, probe))]

    def add(self, entry: Range) -> None:
        """Enter a range that `blocker` found free."""
        if self._is_large(entry):
            self.large.append(entry)
            return
        blocks = range(entry.offset >> BLOCK_SHIFT, (entry.offset + entry.length + BLOCK - 1) >> BLOCK_SHIFT)
        assert self.busy.keys().isdisjoint(blocks), "two holders of one block"
        self.busy.update(dict.fromkeys(blocks, entry))

    def remove(self, entry: Range) -> list[Callable[[], None]]:
        """Take a range out; returns what waited for it, to be called by the owner of the table."""
        if self._is_large(entry):
            self.large.remove(entry)
        else:
            busy = self.busy
            for block in range(
                entry.offset >> BLOCK_SHIFT, (entry.offset + entry.length + BLOCK - 1) >> BLOCK_SHIFT
            ):
                del busy[block]
        return self._waiters.pop(entry, []) if self._waiters else []

    def take_waiters(self, entry: Range) -> list[Callable[[], None]]:
        """What waits for *entry*, which stays: they are to look again."""
        return self._waiters.pop(entry, [])

    @property
    def has_waiters(self) -> bool:
        return bool(self._waiters)

    def wait(self, entry: Range, retry: Callable[[], None]) -> None:
        """Call *retry* once *entry* is gone."""
        self._waiters.setdefault(entry, []).append(retry)

    def wanted(self, entry: Range) -> bool:
        """Does anything wait for *entry*?"""
        return entry in self._waiters


def overlap(a: Range, b: Range) -> bool:
    """Do two ranges share a block?"""
    a_first, b_first = a.offset >> BLOCK_SHIFT, b.offset >> BLOCK_SHIFT
    a_end = (a.offset + a.length + BLOCK - 1) >> BLOCK_SHIFT
    b_end = (b.offset + b.length + BLOCK - 1) >> BLOCK_SHIFT
    return a_first < b_end and b_first < a_end


class OrderedIntervals:
    """Ranges that start in the order they came wherever they overlap: what the peer's stream demands.

    A range waits for every overlapping one in front of it, also for those that are waiting themselves.
    """

    __slots__ = ("_held", "_queue")

    def __init__(self) -> None:
        self._held = Intervals()
        self._queue: list[tuple[Range, Callable[[], None]]] = []

    def __bool__(self) -> bool:
        return bool(self._held) or bool(self._queue)

    @property
    def busy(self) -> dict[int, Range] | None:
        """Block -> its holder, for the short path; None while that is not all there is to look at."""
        return None if self._queue or self._held.large else self._held.busy

    def blocker(self, offset: int, length: int) -> Range | None:
        """What overlaps the range, started or waiting; or None."""
        held = self._held.blocker(offset, length)
        if held is not None or not self._queue:
            return held
        probe = Lock(offset, length)
        return next((other for other, _ in self._queue if overlap(other, probe)), None)

    def enter(self, entry: Range, start: Callable[[], None]) -> None:
        """Call *start* once *entry* is at the head of all it overlaps: now, or when `leave` makes way."""
        if self._free(entry, self._queue):
            self._held.add(entry)
            start()
        else:
            self._queue.append((entry, start))

    def leave(self, entry: Range) -> None:
        """A range that started has ended; starts what waited for it."""
        self._held.remove(entry)
        if not self._queue:
            return
        ready: list[Callable[[], None]] = []
        waiting: list[tuple[Range, Callable[[], None]]] = []
        for item in self._queue:
            if self._free(item[0], waiting):
                self._held.add(item[0])
                ready.append(item[1])
            else:
                waiting.append(item)
        self._queue = waiting
        for start in ready:
            start()

    def forget_waiting(self) -> None:
        """Nothing that still waits will start; what has started leaves as usual."""
        self._queue = []

    def _free(self, entry: Range, ahead: list[tuple[Range, Callable[[], None]]]) -> bool:
        return self._held.blocker(entry.offset, entry.length) is None and not any(
            overlap(entry, other) for other, _ in ahead
        )
