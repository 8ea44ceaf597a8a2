"""How much memory the clients of one server may make it hold, beyond what each of them has anyway.

A session always has room for `ROOM_MIN` bytes that are in the machine or unsent, so that no client waits for
what another one does not read. What it needs beyond that it borrows here, and gives back as soon as it is not
needed any more. Only the request that exceeds its room, and packets cut short, come on top of both.
"""

from __future__ import annotations

from typing import Final

TOTAL: Final = 96 << 20  # lent at a time; more than the disks are fed with at once (`DISK_BACKLOG_HIGH`)
ROOM_MIN: Final = 1 << 20  # of one session without a loan: the largest piece of a request
INFLIGHT_BYTES_MAX: Final = 16 << 20  # of one session, but for a long read; 10 GbE carries 12 MB in 10 ms
LOAN_MAX: Final = INFLIGHT_BYTES_MAX - ROOM_MIN


class Budget:
    """``free`` is the number of bytes that are not lent."""

    __slots__ = ("free",)

    def __init__(self, total: int = TOTAL) -> None:
        self.free = total

    def lend(self) -> int:
        """Lend as much as is good for one session, at most a quarter of what is left: more may come."""
        n = min(LOAN_MAX, self.free >> 2)
        self.free -= n
        return n

    def lend_all(self, n: int) -> bool:
        """Lend *n* bytes, unless that is more than half of what is left."""
        if n > self.free >> 1:
            return False
        self.free -= n
        return True

    def give_back(self, n: int) -> None:
        self.free += n
