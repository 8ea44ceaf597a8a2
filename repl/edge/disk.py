"""The disk edge: carries out the machine's operations on the storage of each volume.

Decides, alone in the program, what may run on the loop and what goes to a worker thread: buffered reads
and writes run inline as long as that is quick, because for them a hand-over costs more than the call;
everything that waits for stable storage by its nature goes to a worker. Adjacent operations of a batch
become one system call. It relies on the machine never having overlapping writes in flight.
"""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable
from typing import Final

from tandem.repl.requests import FUA, IF_HOLE, MAY_UNMAP, META, PREFLUSH, Buffer, DiskOp, Op

from .blockio import CANNOT, IOV_MAX, Device, room
from .calls import READ, SLOW_S, WRITE
from .compiled import calls
from .scheduling import ordinary
from .vigil import LOOK_MAX_S
from .workers import Completions, Workers

RUN_BYTES_MAX: Final = 1 << 20  # adjacent operations merge up to the size of the largest single one
INLINE_BYTES_MAX: Final = 8 << 20  # per batch; at memory speed about a millisecond, the rest goes to workers
WATCH_S: Final = 1.0  # how long after such a call it is found out whether the device or the scheduler did it
HOLD_FACTOR: Final = 10  # then its calls stay away from the loop for this many times as long as it waited
HOLD_MAX_S: Final = 8.0  # … and at most, when it is slow again and again right after coming back
STALL_S: Final = 0.02  # a wait that clients feel; shorter ones (a journal commit) are part of ordinary life
N_DATA_THREADS: Final = 8  # the queue depth a slow device sees
N_SYNC_THREADS: Final = 4  # durable writes and metadata, kept apart so that slow data cannot hold them up
N_FLUSH_THREADS: Final = 4  # one flush of each volume is under way at most
FLUSH_MAX_S: Final = 0.001  # what a single flush counts for at most in their average

DURABLE: Final = FUA | PREFLUSH
FLUSH: Final = int(Op.FLUSH)


class OpenVolume:
    """The open storage of one volume, and what is under way on it."""

    __slots__ = ("closing", "data", "meta", "n_inflight", "on_close", "rotational")

    def __init__(
        self, data: Device, meta: Device, on_close: Callable[[], None], *, rotational: bool = False
    ) -> None:
        self.data = data
        self.meta = meta
        self.on_close = on_close  # called on the loop's thread when the storage is not used any more
        self.rotational = rotational
        self.n_inflight = 0  # operations in workers, and holds
        self.closing = False


# What a worker reports: the operations that are done, on the volume they were started on.
Ended = tuple[OpenVolume, list[DiskOp]]


class Disk:
    """Executes `DiskOp`s; answers each exactly once, inline or through *completed* on the loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, completed: Callable[[list[DiskOp]], None],
        fatal: Callable[[BaseException], None], name: str = "disk",
    ) -> None:  # fmt: skip
        self._loop = loop
        self._completed = completed
        ended: Completions[Ended] = Completions(loop, self._collected, fatal)
        self._data_workers = Workers(f"{name}-data", N_DATA_THREADS, ended)
        self._sync_workers = Workers(f"{name}-sync", N_SYNC_THREADS, ended)
        self._flusher = calls.Flusher(loop, N_FLUSH_THREADS, self._flushed, fatal)
        self._volumes: dict[int, OpenVolume] = {}
        self.backlog = 0  # bytes of operations in workers
        self.n_out = 0  # operations in workers
        self._n_flushes = 0  # of them, flushes
        self._flush_s = LOOK_MAX_S  # how long they take, a moving average

    # ------------------------------------------------------------------------------ open volumes

    def add(self, number: int, volume: OpenVolume) -> None:
        """*volume* is attached from now on."""
        assert number not in self._volumes, f"volume {number} is attached already"
        self._volumes[number] = volume

    def remove(self, number: int) -> None:
        """Forget the volume; its storage is closed as soon as nothing is under way on it any more."""
        volume = self._volumes.pop(number, None)
        if volume is not None:
            volume.closing = True
            if not volume.n_inflight:
                volume.on_close()

    def volume(self, number: int) -> OpenVolume | None:
        return self._volumes.get(number)

    @property
    def numbers(self) -> list[int]:
        return list(self._volumes)

    def stop(self) -> None:
        """Let the workers end after what they have."""
        self._data_workers.stop()
        self._sync_workers.stop()
        self._flusher.stop()

    async def extents(self, number: int, offset: int, length: int, n_max: int) -> list[tuple[int, bool]]:
        """(length, hole) pairs of the volume's data from *offset* on; one of data without a disk."""
        volume = self._volumes.get(number)
        if volume is None:
            return [(length, False)]
        self.hold(number)
        try:
            return await self._loop.run_in_executor(None, _extents, volume.data, offset, length, n_max)
        finally:
            self.let_go(volume)

    def splices(self, number: int) -> bool:
        """Would the loop write to this volume now, piece by piece, what comes in long packets?"""
        volume = self._volumes.get(number)
        return volume is not None and volume.data.splices and volume.data.inline_again <= time.monotonic()

    def hold(self, number: int) -> OpenVolume:
        """Keep the volume's descriptors open until `let_go`."""
        volume = self._volumes[number]
        volume.n_inflight += 1
        return volume

    def let_go(self, volume: OpenVolume, n: int = 1) -> None:
        """*n* operations on the volume have ended, or `hold`."""
        volume.n_inflight -= n
        if volume.closing and not volume.n_inflight:
            volume.on_close()

    # ------------------------------------------------------------------------------- operations

    def start(self, ops: list[DiskOp]) -> list[DiskOp]:
        """Start every operation; returns those that are complete already, in no particular order."""
        at, n = self._short_inline(ops), len(ops)
        if at == n:
            return ops
        done = ops[:at]
        durable: dict[int, list[list[DiskOp]]] = {}
        waiting: dict[int, list[list[DiskOp]]] = {}  # runs for the data workers, by volume
        budget = INLINE_BYTES_MAX
        now = time.monotonic()
        while at < n:
            first = ops[at]
            kind, offset, flags = first.op, first.offset, first.flags
            volume = self._volumes[first.volume]
            if flags & IF_HOLE and volume.data.is_hole(offset, first.length):
                done.append(first)
                at += 1
                continue
            if kind > WRITE or flags & PREFLUSH:
                self._single(volume, first)
                at += 1
                continue
            begin, total = at, first.length
            at += 1
            while at < n:
                op = ops[at]
                if (
                    op.offset != offset + total or op.op != kind or op.volume != first.volume
                    or op.flags != flags or op.area != first.area or total + op.length > RUN_BYTES_MAX
                    or at - begin == IOV_MAX
                ):  # fmt: skip
                    break
                total += op.length
                at += 1
            run = ops[begin:at]
            if flags & DURABLE:
                durable.setdefault(first.volume << 1 | first.area, []).append(run)
                continue
            if first.area == META:
                self._hand_over(volume, self._sync_workers, volume.meta, [run])
                continue
            device = volume.data
            if budget < total or device.inline_again > now:
                waiting.setdefault(first.volume, []).append(run)
                continue
            budget -= total
            complete, now = _inline(device, run, total, now)
            if complete:
                done += run
            else:
                waiting.setdefault(first.volume, []).append(run)
        for number, runs in waiting.items():
            # A job per run would cost more than most runs do; a job per thread keeps the device as busy.
            # Writes go to the page cache, where threads would only queue for the file's lock: they get one
            # thread for every megabyte.
            volume, n_jobs = self._volumes[number], min(len(runs), N_DATA_THREADS)
            if all(run[0].op == WRITE for run in runs):
                total = sum(op.length for run in runs for op in run)
                n_jobs = min(n_jobs, 1 + (total - 1) // RUN_BYTES_MAX)
            for i in range(n_jobs):
                self._hand_over(volume, self._data_workers, volume.data, runs[i::n_jobs])
        for key, runs in durable.items():
            volume = self._volumes[key >> 1]
            self._start_durable(volume, volume.meta if key & 1 else volume.data, runs)
        return done

    def _short_inline(self, ops: list[DiskOp]) -> int:
        """The usual batch: short reads and writes that do not touch each other. Carries out those that *ops* begins
        with as long as nothing about them is unusual, and returns how many; the rest is for the long path."""
        first, now = ops[0], time.monotonic()
        number = first.volume
        device = self._volumes[number].data
        if device.inline_again > now or (len(ops) > 1 and ops[1].offset == first.offset + first.length):
            return 0
        watching = device.watched_until > now
        count, slow_s, waited = calls.short_inline(device.fd, ops, number, device.nowait, watching)
        if slow_s:
            _was_slow(device, time.monotonic(), slow_s, watching, waited)
        return count

    def _hand_over(
        self, volume: OpenVolume, workers: Workers[Ended], device: Device, runs: list[list[DiskOp]]
    ) -> None:
        ops = [op for run in runs for op in run]
        self._count(volume, ops)

        def job() -> Ended:
            for run in runs:
                _transfer(device, run)
            return volume, ops

        workers.start(job)

    def _start_durable(self, volume: OpenVolume, device: Device, runs: list[list[DiskOp]]) -> None:
        """Writes with FUA: a single run as such, several of one batch share the flush behind them."""
        ops = [op for run in runs for op in run]
        self._count(volume, ops)

        def job() -> Ended:
            if len(runs) == 1:
                _transfer(device, ops, durable=True)
            else:
                for run in runs:
                    _transfer(device, run)
                _blame(ops, device.flush)
            return volume, ops

        self._sync_workers.start(job)

    def _single(self, volume: OpenVolume, op: DiskOp) -> None:
        """What has no neighbours to merge with: flush, trim, zeroes, and writes with PREFLUSH."""
        ops = [op]
        self._count(volume, ops)
        device = volume.meta if op.area == META else volume.data
        if op.op == FLUSH:
            self._n_flushes += 1
            self._flusher.start(device.fd, (volume, op, time.monotonic()))
            return

        def job() -> Ended:
            _blame(ops, lambda: _carry_out(device, op))
            return volume, ops

        workers = self._sync_workers if op.flags & DURABLE else self._data_workers
        workers.start(job)

    def _count(self, volume: OpenVolume, ops: list[DiskOp]) -> None:
        volume.n_inflight += len(ops)
        self.n_out += len(ops)
        self.backlog += sum(op.length for op in ops if op.op <= WRITE)

    @property
    def slow(self) -> bool:
        """Does what is out take longer than it is worth staying awake for?

        A worker does, which needs the interpreter to end. A flush does not need it, and devices differ.
        """
        return self.n_out > (self._n_flushes if self._flush_s < LOOK_MAX_S else 0)

    def _flushed(self, results: list[tuple[tuple[OpenVolume, DiskOp, float], int]]) -> None:
        """Some flushes have ended; on the loop's thread."""
        self._n_flushes -= len(results)
        now = time.monotonic()
        for (_, op, began), error in results:
            op.error = error
            self._flush_s += (min(now - began, FLUSH_MAX_S) - self._flush_s) / 8
        self._collected([(volume, [op]) for (volume, op, _), _ in results])

    def _collected(self, results: list[Ended]) -> None:
        """Workers are done with some operations; on the loop's thread."""
        done: list[DiskOp] = []
        for volume, ops in results:
            done += ops
            self.let_go(volume, len(ops))
        self.n_out -= len(done)
        self.backlog -= sum(op.length for op in done if op.op <= WRITE)
        self._completed(done)


def _extents(device: Device, offset: int, length: int, n_max: int) -> list[tuple[int, bool]]:
    ordinary()
    return device.extents(offset, length, n_max)


# ------------------------------------------------------------------------------------ on the loop


def _inline(device: Device, run: list[DiskOp], total: int, started: float) -> tuple[bool, float]:
    """Do the run on the loop, if that is possible without harm; whether it is complete, and the time then.

    A call that took long may have waited for the device, or the scheduler may have taken the processor
    away. The kernel counts the two apart, but asking costs, so it is asked only after the first such call.
    """
    watching = started < device.watched_until
    n_waits = calls.n_waits() if watching else 0
    op = run[0]
    reading = op.op == READ
    try:
        if reading:
            complete = _read_inline(device, run, total)
        elif len(run) == 1:
            assert op.payload is not None, f"{op!r} has no payload"
            complete = os.pwrite(device.fd, op.payload, op.offset) == total
        else:
            complete = os.pwritev(device.fd, _payloads(run), op.offset) == total
    except OSError:
        complete = False  # a worker finds out which operation is to blame
    now = time.monotonic()
    if now - started > SLOW_S and not (reading and device.nowait):
        _was_slow(device, now, now - started, watching, watching and calls.n_waits() > n_waits)
    return complete, now


def _read_inline(device: Device, run: list[DiskOp], total: int) -> bool:
    """Read the run on the loop as far as that needs no waiting; False: a worker must do it."""
    buffer = room(total)
    try:
        if device.nowait:
            if os.preadv(device.fd, (buffer,), run[0].offset, os.RWF_NOWAIT) < total:
                return False  # only a part of it is in the page cache
        else:
            device.read_into(buffer, run[0].offset)
    except BlockingIOError:
        return False
    except OSError as error:
        if not device.nowait or error.errno not in CANNOT:
            return False
        device.nowait = False  # tmpfs and some others; their reads are then timed like writes
        return _read_inline(device, run, total)
    _deal_out(run, buffer)
    return True


def on_loop(device: Device, call: Callable[[], None]) -> None:
    """Run *call*, which writes to *device*, and notice how long that took. Raises what it raises."""
    started = time.monotonic()
    watching = started < device.watched_until
    n_waits = calls.n_waits() if watching else 0
    try:
        call()
    finally:
        now = time.monotonic()
        if now - started > SLOW_S:
            _was_slow(device, now, now - started, watching, watching and calls.n_waits() > n_waits)


def _was_slow(device: Device, now: float, waited_s: float, watching: bool, waited: bool) -> None:
    """A call took *waited_s*. The first time nobody was watching: it may have been the scheduler."""
    if not watching:
        device.watched_until = now + WATCH_S
    elif waited:
        _keep_away(device, now - waited_s, now)


def _keep_away(device: Device, started: float, now: float) -> None:
    """The device made the loop wait: its calls stay off the loop for a while.

    That is so when the kernel throttles writers of dirty pages, or when the device is slow itself; but also,
    shortly, whenever a journal is committed. So the loop spends at most a tenth of its time in such waits,
    and less and less when they are long and do not end.
    """
    waited = now - started
    just_came_back = started - device.inline_again < device.hold_s
    hold = waited * HOLD_FACTOR
    if just_came_back and waited >= STALL_S:
        hold = max(hold, device.hold_s * 2)
    device.hold_s = min(hold, HOLD_MAX_S)
    device.inline_again = now + device.hold_s
    device.watched_until = device.inline_again + WATCH_S


# ------------------------------------------------------------------------------------- in workers


def _transfer(device: Device, run: list[DiskOp], *, durable: bool = False) -> None:
    """Read or write adjacent operations; blocking. When they fail together, each is tried on its own."""
    try:
        if run[0].op == READ:
            buffer = room(sum(op.length for op in run))
            device.read_into(buffer, run[0].offset)
            _deal_out(run, buffer)
        else:
            device.write(_payloads(run), run[0].offset, durable=durable)
    except OSError as error:
        if len(run) == 1:
            _fail(run, error)
        else:
            for op in run:
                _transfer(device, [op], durable=durable)


def _carry_out(device: Device, op: DiskOp) -> None:
    """One operation with everything its flags ask for; blocking."""
    kind, durable = op.op, bool(op.flags & FUA)
    if op.flags & PREFLUSH:
        device.flush()
    if kind == WRITE:
        assert op.payload is not None, f"{op!r} has no payload"
        device.write([op.payload], op.offset, durable=durable)
    else:
        # A trim must leave zeroes behind on both nodes, so it is "write zeroes, and give space back".
        device.zero(op.offset, op.length, unmap=kind == Op.TRIM or bool(op.flags & MAY_UNMAP))
        if durable:
            device.flush()


def _blame(ops: list[DiskOp], call: Callable[[], None]) -> None:
    """Run *call*; when it fails, every one of *ops* has failed."""
    try:
        call()
    except OSError as error:
        _fail(ops, error)


def _fail(ops: list[DiskOp], error: OSError) -> None:
    for op in ops:
        op.error = op.error or error.errno or errno.EIO


def _payloads(run: list[DiskOp]) -> list[Buffer]:
    found = [op.payload for op in run if op.payload is not None]
    assert len(found) == len(run), f"{run!r}: a write has no payload"
    return found


def _deal_out(run: list[DiskOp], buffer: memoryview) -> None:
    """Give each operation of a read run its part of the bytes."""
    if len(run) == 1:
        run[0].payload = buffer
        return
    at = 0
    for op in run:
        op.payload = buffer[at : at + op.length]
        at += op.length
