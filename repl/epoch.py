"""One epoch of the transfer log: the mirrored writes between two P_BARRIER packets.

A write stays in it as the Request it is until both nodes have answered. Whatever happens later, two things may
still be asked of it: which blocks a peer that loses its memory misses, and which extents of the activity log stay
hot. Eight bytes and a count say that, so a log of a million writes is small, and the peer may take its time
with the flush that a barrier ack costs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from .compiled import batches
from .requests import PEER, Request
from .volume import Volume

SETTLE_EVERY: Final = 256  # writes: records of so few are still in the processor's cache, and are used again from there


class PeerFlush:
    """An empty P_DATA with the flush flag: the peer answers when everything before it is stable there."""

    __slots__ = ("answers", "block_id", "volume", "waiting")

    def __init__(self, volume: Volume, block_id: int, answers: bool) -> None:
        self.volume = volume
        self.block_id = block_id
        self.answers = answers  # the flushes of `Volume.flush_batch` wait for this one
        self.waiting = PEER


class Epoch:
    """``requests`` are kept one by one, in the order they were sent; of ``n_settled`` more, what follows is left.

    ``ranges`` has the blocks of each volume's settled writes, as `batches.settle_epoch` packs them; ``extents`` how
    many references they hold on each extent of its activity log.
    """

    __slots__ = ("barrier", "barrier_sent", "closed", "extents", "n_sent", "n_settled", "ranges", "requests",
                 "settle_at", "since")  # fmt: skip

    def __init__(self, barrier: int, now: float) -> None:
        self.barrier = barrier
        self.requests: list[Request | PeerFlush] = []
        self.n_sent = 0
        self.closed = False
        self.barrier_sent = False
        self.since = now
        self.n_settled = 0
        self.settle_at = SETTLE_EVERY  # requests
        self.ranges: dict[int, bytearray] = {}
        self.extents: dict[int, dict[int, int]] = {}

    def settle(self, volumes: Iterable[int], inflight: dict[int, Any]) -> int:
        """Keep only the blocks of what both nodes have answered, also of *inflight*; returns of how many writes."""
        known = self.n_settled
        for volume in volumes:
            ranges, extents = self.ranges.get(volume, bytearray()), self.extents.get(volume, {})
            n = len(self.requests)
            self.requests = batches.settle_epoch(self.requests, volume, ranges, extents, inflight)
            if len(self.requests) < n:
                self.ranges[volume], self.extents[volume] = ranges, extents
                self.n_settled += n - len(self.requests)
        return self.n_settled - known

    def take_settled(self, other: Epoch) -> None:
        """What is left of the settled writes of *other* is kept here from now on."""
        for volume, ranges in other.ranges.items():
            self.ranges.setdefault(volume, bytearray()).extend(ranges)
        for volume, extents in other.extents.items():
            own = self.extents.setdefault(volume, {})
            for extent, n in extents.items():
                own[extent] = own.get(extent, 0) + n
        self.n_settled += other.n_settled
