"""What a front end sees of a replicated volume, and nothing more.

A front end makes `Request` records and hands them over in batches; each comes back exactly once, through
its owner's ``finished``. Peers, activity log and disks are behind this page. The runtime implements the
protocol; tests implement it in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tandem.repl.requests import Request


class Volume(Protocol):
    """One exported volume. All calls come from the loop's thread."""

    @property
    def name(self) -> str:
        """The export name: the resource (``r0``), or resource and volume number (``r0/1``)."""

    @property
    def size(self) -> int:
        """Bytes, a multiple of 512. It may grow while clients are connected; it never shrinks."""

    @property
    def description(self) -> str:
        """Role and disk state for people who list the exports (``Primary, UpToDate``)."""

    @property
    def rotational(self) -> bool:
        """Whether the backing device is a spinning disk."""

    @property
    def number(self) -> int:
        """The volume number, which a request carries."""

    @property
    def paused(self) -> bool:
        """Back-pressure: while true, front ends read no further requests from their clients."""

    def on_resume(self, callback: Callable[[], None]) -> None:
        """Call *callback* once, when ``paused`` has become false again."""

    def open(self, writable: bool) -> str | None:
        """A client wants the volume. None when it may; otherwise the sentence it is to be shown."""

    def close(self, writable: bool) -> None:
        """A client that had opened the volume with the same *writable* has gone."""

    def submit(self, batch: list[Request]) -> None:
        """Start every request of *batch*; never blocks.

        Reads and writes are pieces of at most 1 MiB, trims and zeroes of at most 128 MiB, cut where
        `tandem.repl.requests.split` cuts them. The answers come through ``owner.finished(batch)``, in
        any order and grouping, possibly before this call returns. ``error`` is an errno.
        """

    async def allocation(self, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        """What lies at *offset*: (length, flags) pairs, flags those of NBD's base:allocation.

        At least one pair and at most *max_extents*; lengths are positive and cover from *offset* on,
        perhaps not to the end of the range, never beyond the volume. Raises OSError.
        """
