"""What the application did, and what it may therefore expect to read.

Every 512-byte sector that is written says which write it belongs to, so the content of a disk names the
writes it holds. The `Ledger` of a volume keeps, for each node's copy and each sector, the versions that a
read may return now (*allowed*) and those that may be there after a power cut (*stable*), and which answered
writes a copy lacks because it was out of the mirror.

Rules: a submitted write may be there or not. An answered write is there, and everything that ended before
it began is gone; what overlapped it in time may be there instead. A flush (or FUA) makes answered writes
stable. A finished resync makes the target's copy equal to the source's.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Final

from tandem.repl.requests import Buffer

SECTOR: Final = 512
_TAG: Final = struct.Struct(">QIIQ")  # write, volume, node, sector
_REST: Final = bytes(SECTOR - _TAG.size)
ZERO_SECTOR: Final = bytes(SECTOR)


class Write:
    """One write (or trim, or zeroes) of the application. ``begin`` and ``end`` are ledger steps."""

    __slots__ = ("acked", "alone", "begin", "end", "first", "fua", "id", "n", "node", "reached", "volume", "zero")

    def __init__(self, id: int, volume: int, node: int, offset: int, length: int, zero: bool, fua: bool) -> None:
        self.id = id
        self.volume = volume
        self.node = node
        self.first = offset // SECTOR
        self.n = length // SECTOR
        self.zero = zero
        self.fua = fua
        self.begin = 0
        self.end: int | None = None
        self.acked = False
        self.alone = False  # answered without the peer, and no resync has ended since
        self.reached: set[int] = set()  # nodes whose disks wrote it, whatever became of it since

    @property
    def sectors(self) -> range:
        return range(self.first, self.first + self.n)

    def payload(self) -> bytes:
        tag = _TAG.pack
        return b"".join([tag(self.id, self.volume, self.node, s) + _REST for s in self.sectors])

    def __repr__(self) -> str:
        how = "acked" if self.acked else "open" if self.end is None else "in doubt"
        kind = "zeroes" if self.zero else "write"
        return f"<{kind} {self.id} by node {self.node} vol {self.volume} sectors {self.first}+{self.n} {how}>"


_ANCIENT: Final = Write(0, 0, 0, 0, 0, True, False)  # the zeros that were there before anything
_ANCIENT.begin, _ANCIENT.end, _ANCIENT.acked = -2, -1, True

Versions = frozenset[Write]
FlushPoint = tuple[dict[int, Write], ...]
INITIAL: Final[Versions] = frozenset([_ANCIENT])


class ForeignData(AssertionError):
    """A sector holds bytes that nobody ever wrote there."""


def older(x: Write, than: Write) -> bool:
    """Had *x* ended before *than* began?"""
    return x is not than and x.end is not None and x.end < than.begin


class Copy:
    """What is known of one node's copy of one volume."""

    __slots__ = ("allowed", "discarded", "lacks", "last", "stable")

    def __init__(self) -> None:
        self.allowed: dict[int, Versions] = {}
        self.stable: dict[int, Versions] = {}
        self.last: dict[int, Write] = {}  # the newest answered write this copy is known to hold
        self.lacks: set[Write] = set()  # answered elsewhere while this copy was out of the mirror
        self.discarded = False  # the operator gave this copy's changes up

    def become(self, other: Copy) -> None:
        self.allowed = dict(other.allowed)
        self.stable = dict(other.stable)
        self.last = dict(other.last)


Reader = Callable[[int], bytes]  # sector number -> its 512 bytes


class Ledger:
    """Everything the clients of one volume did, on both nodes."""

    def __init__(self, volume: int, first_id: int = 1) -> None:
        self.volume = volume
        self.copies = (Copy(), Copy())
        self.writes: dict[int, Write] = {}
        self.step = 0
        self.n_acked = 0
        self.n_given_up = 0  # how often a resync has ended one of two histories
        self._next_id = first_id

    # ------------------------------------------------------------------ what happens

    def new_write(self, node: int, offset: int, length: int, *, zero: bool = False, fua: bool = False) -> Write:
        """A write is submitted."""
        self.step += 1
        write = Write(self._next_id, self.volume, node, offset, length, zero, fua)
        self._next_id += 1
        write.begin = self.step
        self.writes[write.id] = write
        fresh = frozenset([write])
        for copy in self.copies:
            for s in write.sectors:
                copy.allowed[s] = copy.allowed.get(s, INITIAL) | fresh
                copy.stable[s] = copy.stable.get(s, INITIAL) | fresh
        return write

    def acked(self, write: Write, holders: Iterable[int]) -> None:
        """*write* was answered without error; *holders* are the nodes whose disks hold it."""
        self.step += 1
        write.end, write.acked = self.step, True
        self.n_acked += 1
        for node in holders:
            self.arrived(write, node)
            if write.fua and node in write.reached and not (write.alone and node != write.node):
                # Else it holds what was written instead, by an ordinary write; or it died with it in a cache.
                for s in write.sectors:
                    self._narrow_stable(self.copies[node], s, write)

    def arrived(self, write: Write, node: int) -> None:
        """The copy of *node* is known to hold the answered *write*."""
        copy = self.copies[node]
        copy.lacks.discard(write)
        for s in write.sectors:
            copy.allowed[s] = frozenset([x for x in copy.allowed[s] if not older(x, write)]) | {write}
            last = copy.last.get(s)
            if last is None or not older(write, last):
                copy.last[s] = write

    def gave_up(self, write: Write) -> None:
        """*write* was answered with an error, or its client is gone: it may be there or not, for ever."""
        self.step += 1
        write.end = self.step

    def flush_point(self) -> FlushPoint:
        """What a flush submitted now has to make stable: for each copy, the answered writes by sector."""
        self.step += 1
        return tuple(dict(copy.last) for copy in self.copies)

    def flushed(self, point: FlushPoint, nodes: Iterable[int]) -> None:
        """The flush that was submitted at *point* was answered; *nodes* are in the mirror."""
        for node in nodes:
            copy = self.copies[node]
            for s, write in point[node].items():
                last = copy.last.get(s)
                if last is not None and not older(last, write):  # else a resync has replaced the copy
                    self._narrow_stable(copy, s, write)

    def _narrow_stable(self, copy: Copy, sector: int, write: Write) -> None:
        old = copy.stable.get(sector, INITIAL)
        copy.stable[sector] = frozenset([x for x in old if not older(x, write)]) | {write}

    def power_cut(self, node: int) -> None:
        """The host of *node* lost power: of what was not flushed, each sector may be there or not."""
        copy, other = self.copies[node], self.copies[1 - node]
        copy.allowed = dict(copy.stable)
        kept = {s: w for s, w in copy.last.items() if not any(older(x, w) for x in copy.stable[s])}
        copy.last = kept
        # What only this copy had, and not stable, is lost with it.
        other.lacks = {w for w in other.lacks if all(kept.get(s) is not None for s in w.sectors)}

    def synced(self, source: int, target: int) -> None:
        """A resync ended without failed blocks."""
        s, t = self.copies[source], self.copies[target]
        t.become(s)
        for write in s.last.values():
            write.alone = False
        self.n_given_up += s.discarded or t.discarded
        s.lacks.clear()
        t.lacks.clear()
        s.discarded = t.discarded = False

    def adopt(self, node: int, read: Reader) -> None:
        """The operator declared this copy good as it is (forced promotion)."""
        copy = self.copies[node]
        copy.last = {}
        for s in list(copy.allowed):
            found = frozenset([self.version_at(s, read(s))])
            copy.allowed[s] = found
            copy.stable[s] = copy.stable[s] | found

    # ------------------------------------------------------------------ what a disk says

    def written(self, node: int, offset: int, length: int, payload: Buffer | None) -> None:
        """The disk of *node* wrote *payload* (None: zeros): note which write of the application that was."""
        first, n = offset // SECTOR, length // SECTOR
        if payload is None:
            for write in self.writes.values():
                if write.zero and write.end is None and (write.first, write.n) == (first, n):
                    write.reached.add(node)
            return
        found = self.writes.get(int.from_bytes(payload[:8], "big"))
        if found is not None and (found.first, found.n) == (first, n):
            found.reached.add(node)

    def version_at(self, sector: int, content: bytes) -> Write:
        """Which write *content* belongs to; zeros are the oldest version there is."""
        if content == ZERO_SECTOR:
            return _ANCIENT
        number, volume, node, at = _TAG.unpack_from(content)
        write = self.writes.get(number)
        if write is None or (volume, node, at) != (self.volume, write.node, sector) or content[_TAG.size :] != _REST:
            raise ForeignData(
                f"volume {self.volume} sector {sector} holds {content[:24].hex()}…, which nobody wrote there"
            )
        return write

    def holds(self, write: Write, read: Reader, sectors: Iterable[int] | None = None) -> bool:
        """Does a disk hold *write* (in these *sectors*), or in its place something that did not end before it began?"""
        for s in write.sectors if sectors is None else sectors:
            content = read(s)
            if content == ZERO_SECTOR:
                if not self._zero_fits(s, write):
                    return False
            elif older(self.version_at(s, content), write):
                return False
        return True

    def _zero_fits(self, sector: int, write: Write) -> bool:
        if write.zero:
            return True
        return any(z.zero and z.first <= sector < z.first + z.n and not older(z, write) for z in self.writes.values())

    def fits(self, sector: int, content: bytes, versions: Versions) -> bool:
        """Is *content* one of *versions*?"""
        if content == ZERO_SECTOR:
            return any(x.zero for x in versions)
        return self.version_at(sector, content) in versions

    def came_since(self, sector: int, content: bytes, step: int) -> bool:
        """Is *content* of a write that began after *step*?"""
        if content != ZERO_SECTOR:
            return self.version_at(sector, content).begin > step
        return any(z.zero and z.begin > step and z.first <= sector < z.first + z.n for z in self.writes.values())

    def misfits(self, node: int, read: Reader) -> list[tuple[int, str]]:
        """Sectors of the copy of *node* that hold what they must not, with a sentence each."""
        found = []
        for s, versions in self.copies[node].allowed.items():
            content = read(s)
            if not self.fits(s, content, versions):
                found.append(
                    (
                        s,
                        f"holds {self.version_at(s, content)!r}, allowed are {sorted(v.id for v in versions)}",
                    )
                )
        return found

    def still_lacks(self, node: int, read: Reader) -> set[Write]:
        """The answered writes this copy lacks, after a look at its disk: some may have arrived since."""
        copy = self.copies[node]
        for write in [w for w in copy.lacks if self.holds(w, read)]:
            copy.lacks.discard(write)
        return copy.lacks
