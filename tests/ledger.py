"""What a disk may hold after a client's life of overlapping writes, some of them never answered.

Every written block carries the number of its write. A block may hold a write until another one was sent
after that write was answered, and was answered itself: this is all an NBD client may rely on.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tandem.tools.demo_nbd import Cmd, ConnectionLost, Nbd, Request, read

BLOCK = 4096
NEVER = 1 << 62
DEPTH = 16


@dataclass(slots=True)
class Entry:
    """One write: its number (0: zeroes), when it was sent, and from when on it cannot change anything."""

    number: int
    sent: int
    settled: int = NEVER
    acknowledged: bool = False


@dataclass(slots=True)
class Ledger:
    """Draws requests for a disk of *size* bytes and keeps what each block may hold."""

    size: int
    draw: random.Random
    n_sent: int = 0
    n_acknowledged: int = 0
    clock: int = 0
    blocks: dict[int, list[Entry]] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)  # by the identity of the request

    def requests(self, n_requests: int) -> Iterator[Request]:
        """Writes of 1 to 16 blocks, zeroes and flushes, on blocks that are drawn again and again."""
        for _ in range(n_requests):
            if self.draw.random() < 0.04:
                yield Request(Cmd.FLUSH)
                continue
            first = self.draw.randrange(self.size // BLOCK)
            n_blocks = min(self.draw.choice((1, 1, 1, 2, 4, 16)), self.size // BLOCK - first)
            yield self._sent(first, n_blocks)

    def _sent(self, first: int, n_blocks: int) -> Request:
        self.n_sent += 1
        self.clock += 1
        number = 0 if self.draw.random() < 0.1 else self.n_sent
        entry = Entry(number, self.clock)
        for block in range(first, first + n_blocks):
            self.blocks.setdefault(block, [Entry(0, 0, 0, True)]).append(entry)
        data = b"".join(stamp(number, block) for block in range(first, first + n_blocks)) if number else b""
        kind = Cmd.WRITE if number else Cmd.WRITE_ZEROES
        request = Request(kind, first * BLOCK, n_blocks * BLOCK, data)
        self.entries[id(request)] = entry
        return request

    def answered(self, request: Request) -> None:
        """For `Nbd.run`: an error is none of the answers these tests allow."""
        assert not request.error, f"{request.kind.name} at {request.offset}: NBD error {request.error}"
        entry = self.entries.pop(id(request), None)
        if entry is not None:
            self.clock += 1
            self.n_acknowledged += 1
            entry.settled, entry.acknowledged = self.clock, True

    def session_over(self) -> None:
        """No request of the session can have an effect any more, answered or not."""
        self.clock += 1
        for entry in self.entries.values():
            entry.settled = self.clock
        self.entries.clear()

    def possible(self, block: int) -> set[int]:
        """The numbers that *block* may carry now."""
        entries = self.blocks[block]
        newest = max(entry.sent for entry in entries if entry.acknowledged)
        return {entry.number for entry in entries if entry.settled >= newest}

    def check(self, nbd: Nbd) -> int:
        """Read every block that was ever written; how many. What is found there is what there is from now on.

        AssertionError names the first block that holds what it must not.
        """

        def found(request: Request) -> None:
            assert not request.error, f"read at {request.offset}: NBD error {request.error}"
            block = request.offset // BLOCK
            number = number_of(request.data, block)
            assert number in self.possible(block), (
                f"block {block} holds write {number}, it may hold {sorted(self.possible(block))}; "
                f"{self.n_acknowledged} writes were acknowledged"
            )
            self.blocks[block] = [Entry(number, 0, 0, True)]
            request.data = b""

        assert not self.entries, "check only after the session's end"
        blocks = sorted(self.blocks)
        nbd.run((read(block * BLOCK, BLOCK) for block in blocks), DEPTH, found)
        return len(blocks)


def stamp(number: int, block: int) -> bytes:
    """The content of *block* after write *number*: both numbers in each sector and between them."""
    return struct.pack(">QQ", number, block) * (BLOCK // 16)


def number_of(data: bytes, block: int) -> int | None:
    """Which write a block's content is of; None when it is of none, or of two."""
    number = struct.unpack_from(">Q", data)[0]
    wanted = stamp(number, block) if number else bytes(BLOCK)
    return int(number) if data == wanted else None


__all__ = ["BLOCK", "DEPTH", "Cmd", "ConnectionLost", "Ledger", "Nbd", "Request", "number_of", "stamp"]
