"""A volume in memory for the tests of the NBD front end: no peers, no disks, but the same manners.

It answers asynchronously, in random order and grouping, unless told to answer at once; it can fail,
pause, and hold its answers back. It checks what the machine relies on: piece sizes, and that nothing is
touched outside the volume.
"""

from __future__ import annotations

import asyncio
import mmap
import random
from collections.abc import Callable

from tandem.repl.requests import FUA, MAY_UNMAP, Op, Request
from tandem.repl.units import DISCARD_MAX, IO_MAX

HOLE_SIZE = 64 << 10  # what was zeroed with MAY_UNMAP, in whole multiples of this, becomes a hole


class RamVolume:
    def __init__(self, size: int, name: str = "r0", *, number: int = 0, at_once: bool = False) -> None:
        self.name = name
        self.size = size
        self.number = number
        self.description = "Primary, UpToDate"
        self.rotational = False
        self.paused = False
        self.image = memoryview(mmap.mmap(-1, size))  # takes memory only where it is touched
        self.holes = bytearray(b"\x01" * (-(-size // HOLE_SIZE)))
        self.at_once = at_once
        self.holding = False  # answers wait until `release`
        self.refusal: str | None = None
        self.errors: dict[Op, int] = {}
        self.allocation_error = 0
        self.broken = False  # allocation has a bug
        self.n_open = 0
        self.n_open_writable = 0
        self.n_inside = 0  # requests in the machine
        self.n_inside_max = 0
        self.n_submits = 0
        self.seen: list[tuple[Op, int, int, int]] = []  # op, offset, length, flags
        self._pending: list[Request] = []
        self._resumed: list[Callable[[], None]] = []
        self._scheduled = False
        self._draw = random.Random(1)

    # ---------------------------------------------------------------- opening

    def open(self, writable: bool) -> str | None:
        if self.refusal is not None:
            return self.refusal
        self.n_open += 1
        self.n_open_writable += writable
        return None

    def close(self, writable: bool) -> None:
        self.n_open -= 1
        self.n_open_writable -= writable
        assert self.n_open >= self.n_open_writable >= 0
        assert self.n_open or not self.n_inside, "closed with requests inside"

    # ---------------------------------------------------------------- back-pressure

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        callbacks, self._resumed = self._resumed, []
        for callback in callbacks:
            callback()

    def on_resume(self, callback: Callable[[], None]) -> None:
        assert self.paused
        self._resumed.append(callback)

    # ---------------------------------------------------------------- requests

    def submit(self, batch: list[Request]) -> None:
        assert batch, "an empty batch"
        self.n_submits += 1
        self.n_inside += len(batch)
        self.n_inside_max = max(self.n_inside_max, self.n_inside)
        for r in batch:
            op = Op(r.op)
            self.seen.append((op, r.offset, r.length, r.flags))
            assert r.volume == self.number
            limit = {Op.READ: IO_MAX, Op.WRITE: IO_MAX, Op.FLUSH: 1}.get(op, DISCARD_MAX)
            if op != Op.FLUSH:
                assert 0 < r.length <= limit - r.offset % limit, f"{r} is no piece"
                assert r.offset % 512 == r.length % 512 == 0 and r.offset + r.length <= self.size
            assert r.flags & ~(FUA | MAY_UNMAP) == 0
        if self.at_once and not self.holding:
            self._answer(list(batch))
        else:
            self._pending += batch
            self._schedule()

    def release(self) -> None:
        self.holding = False
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and not self.holding and self._pending:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._some)

    def _some(self) -> None:
        """Answer a few of what is pending, in random order."""
        self._scheduled = False
        if self.holding:
            return
        self._draw.shuffle(self._pending)
        n = self._draw.randint(1, min(len(self._pending), 8))
        batch, self._pending = self._pending[:n], self._pending[n:]
        self._schedule()
        self._answer(batch)

    def _answer(self, batch: list[Request]) -> None:
        owners: dict[int, list[Request]] = {}
        for r in batch:
            r.error = self.errors.get(Op(r.op), 0)
            if not r.error:
                self._carry_out(r)
            owners.setdefault(id(r.owner), []).append(r)
        self.n_inside -= len(batch)
        for mine in owners.values():
            mine[0].owner.finished(mine)

    def _carry_out(self, r: Request) -> None:
        begin, end = r.offset, r.offset + r.length
        if r.op == Op.READ:
            r.payload = bytes(self.image[begin:end])
        elif r.op == Op.WRITE:
            assert r.payload is not None and len(r.payload) == r.length
            self.image[begin:end] = r.payload
            self._mark(begin // HOLE_SIZE, -(-end // HOLE_SIZE), 0)
        elif r.op in (Op.TRIM, Op.ZEROES):
            self.image[begin:end] = bytes(r.length)
            if r.op == Op.TRIM or r.flags & MAY_UNMAP:
                last = len(self.holes) if end == self.size else end // HOLE_SIZE
                self._mark(-(-begin // HOLE_SIZE), last, 1)
            else:
                self._mark(begin // HOLE_SIZE, -(-end // HOLE_SIZE), 0)

    def _mark(self, first: int, last: int, value: int) -> None:
        if last > first:
            self.holes[first:last] = bytes([value]) * (last - first)

    async def allocation(self, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        assert not self.broken
        if self.allocation_error:
            raise OSError(self.allocation_error, "allocation")
        extents: list[tuple[int, int]] = []
        end = min(offset + length, self.size)
        while offset < end and len(extents) < max_extents:
            hole = self.holes[offset // HOLE_SIZE]
            step = min(HOLE_SIZE - offset % HOLE_SIZE, end - offset)
            extents.append((step, 3 if hole else 0))
            offset += step
        return extents
