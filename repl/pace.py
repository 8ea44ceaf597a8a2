"""How much of the time a resync or a verify may take while applications are at work on its node.

A resync that asks for blocks as fast as they come takes what there is: each block is a long read, send and write
that everything else waits behind. So while applications read or write here the resync goes on in slices, and after
each of them rests for a few times as long as the slice took. On a machine, disk or network of any speed that
leaves the applications most of it, and nobody has to know the speed. `c-min-rate` is what the resync gets in any
case (0: it never rests).

Each side does this for the applications of its own node: whoever asks (a resync's target, VerifyS) before it does,
whoever is asked before it serves. Source of the option's meaning: drbd_receiver.c, drbd_rs_c_min_rate_throttle.
"""

from __future__ import annotations

from typing import Final

SLICE: Final = 1 << 20  # bytes
REST_FACTOR: Final = 10  # rest for this many times as long as the slice took
BUSY_S: Final = 0.02  # an application is at work that was heard of this recently
NO_LIMIT: Final = 1 << 62


class Pace:
    """The slices of one resync or verify on one node. *now* is the machine's time in seconds throughout."""

    __slots__ = ("_began", "_out", "_slice", "next_at", "resting")

    def __init__(self) -> None:
        self._out = 0  # bytes of the slice that are not settled
        self._slice = 0  # bytes of the slice
        self._began = 0.0
        self.next_at = 0.0  # when the rest ends
        self.resting = False  # `room` was asked for during the rest: somebody wants to know when it ends

    def room(self, now: float, busy: bool, c_min_rate: int) -> int:
        """How many bytes may be begun now, by one with *c_min_rate* (KiB/s) on a node that is *busy*."""
        self.resting = False
        if not busy or not c_min_rate:
            return NO_LIMIT
        if self._out:
            return SLICE - self._slice
        self.resting = now < self.next_at
        return 0 if self.resting else SLICE

    def begun(self, now: float, n: int) -> None:
        """*n* bytes are under way."""
        if not self._out:
            self._began, self._slice = now, 0
        self._out += n
        self._slice += n

    def settled(self, now: float, n: int, c_min_rate: int) -> None:
        """*n* bytes are done, one way or the other."""
        self._out -= n
        if not self._out and self._slice < 2 * SLICE:  # a longer one began when nobody was at work, and tells nothing
            rest = REST_FACTOR * (now - self._began)
            self.next_at = now + (min(rest, self._slice / (c_min_rate * 1024)) if c_min_rate else 0.0)
