"""The disk edge on real files: what reaches the file, what is merged, what goes where, what errors become."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvloop
from tandem.repl.edge import blockio, calls
from tandem.repl.edge import disk as disk_module
from tandem.repl.edge.blockio import Device
from tandem.repl.edge.disk import INLINE_BYTES_MAX, Disk, OpenVolume
from tandem.repl.requests import DATA, FUA, IF_HOLE, MAY_UNMAP, META, PREFLUSH, DiskOp, Op

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy test machine must not pass for a slow disk."""
    set_slow(monkeypatch, 60.0)


class Bench:
    """A Disk with one volume of SIZE bytes, and whatever came back from its workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, SIZE)
        self.device = Device(self.fd)
        self.closed = False
        self.disk = Disk(asyncio.get_running_loop(), self.completed, self.fatal)
        self.disk.add(0, OpenVolume(self.device, self.device, self.close))
        self.ended: list[DiskOp] = []
        self.mistakes: list[BaseException] = []
        self.n_handovers = 0
        self.rung = asyncio.Event()

    def close(self) -> None:
        self.closed = True

    def fatal(self, error: BaseException) -> None:
        self.mistakes.append(error)
        self.rung.set()

    def completed(self, ops: list[DiskOp]) -> None:
        self.n_handovers += 1
        self.ended += ops
        self.rung.set()

    async def all_of(self, ops: list[DiskOp]) -> list[DiskOp]:
        """Start *ops* and wait for all; returns those that were complete at once."""
        self.ended.clear()
        inline = self.disk.start(ops)
        async with asyncio.timeout(10):
            while len(inline) + len(self.ended) < len(ops):
                self.rung.clear()
                await self.rung.wait()
        assert {*map(id, inline), *map(id, self.ended)} == set(map(id, ops))
        return inline

    def content(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)


@pytest.fixture(autouse=True)
def python_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """System calls are replaced here, and the compiled twin would not notice; `test_edge_calls` compares the two."""
    monkeypatch.setattr(disk_module, "calls", calls)


def on_loop(test: Callable[[Bench], Awaitable[None]], path: Path) -> None:
    async def main() -> None:
        bench = Bench(path)
        try:
            await test(bench)
        finally:
            bench.disk.stop()
            os.close(bench.fd)

    uvloop.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "disk"


def write(offset: int, data: bytes, flags: int = 0, area: int = DATA) -> DiskOp:
    return DiskOp(Op.WRITE, 0, offset, len(data), data, flags, area)


def read(offset: int, length: int, area: int = DATA) -> DiskOp:
    return DiskOp(Op.READ, 0, offset, length, area=area)


def test_writes_and_cached_reads_complete_inline(path: Path) -> None:
    async def test(bench: Bench) -> None:
        ops = [write(8192, b"b" * 4096), write(0, b"a" * 4096)]
        assert len(bench.disk.start(ops)) == 2
        reads = [read(0, 4096), read(8192, 4096), read(4096, 512)]
        inline = await bench.all_of(reads)
        assert [op.error for op in ops + reads] == [0] * 5
        assert [bytes(op.payload or b"") for op in reads] == [b"a" * 4096, b"b" * 4096, bytes(512)]
        assert len(inline) == 3

    on_loop(test, path)


def test_a_mixed_batch_is_carried_out_whatever_path_each_operation_takes(path: Path) -> None:
    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, bytes(range(256)) * 512, 8 * MIB)
        ops = [
            write(0, b"a" * 4096), read(8 * MIB, 4096), write(65536, b"b" * 512), write(66048, b"c" * 512),
            write(1 * MIB, b"d" * 65536), read(8 * MIB + 512, 512), write(4096, b"e" * 4096, FUA),
            write(2 * MIB, b"f" * 512), read(0, 4096),
        ]  # fmt: skip
        await bench.all_of(ops[:-1])
        await bench.all_of(ops[-1:])
        assert [op.error for op in ops] == [0] * len(ops)
        for op in ops:
            assert bytes(op.payload or b"") == bench.content(op.offset, op.length), op
        assert bench.disk.n_out == bench.disk.backlog == 0

    on_loop(test, path)


def test_adjacent_operations_become_one_call(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    real, real_one = os.pwritev, os.pwrite

    def spy(fd: int, buffers: list[bytes], offset: int, flags: int = 0) -> int:
        calls.append((offset, len(buffers)))
        return real(fd, buffers, offset, flags)

    def spy_one(fd: int, buffer: bytes, offset: int) -> int:
        calls.append((offset, 1))
        return real_one(fd, buffer, offset)

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(os, "pwritev", spy)
        monkeypatch.setattr(os, "pwrite", spy_one)
        first = [write(i * 4096, bytes([i]) * 4096) for i in range(3)]
        apart = [write(40960, b"x" * 512), write(40960 + 1024, b"y" * 512)]
        await bench.all_of(first + apart)
        assert calls == [(0, 3), (40960, 1), (41984, 1)]
        assert bench.content(0, 12288) == b"\0" * 4096 + b"\1" * 4096 + b"\2" * 4096

    on_loop(test, path)


def test_a_merged_read_deals_out_the_right_bytes(path: Path) -> None:
    async def test(bench: Bench) -> None:
        data = os.urandom(5 * 4096)
        os.pwrite(bench.fd, data, 4096)
        reads = [read(4096 + i * 4096, 4096) for i in range(5)]
        await bench.all_of(reads)
        assert b"".join(bytes(op.payload or b"") for op in reads) == data

    on_loop(test, path)


def test_flushes_are_worth_staying_awake_for_while_they_are_quick(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(disk_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def test(bench: Bench) -> None:
        async def is_slow(*others: DiskOp, took_s: float = 0.0) -> bool:
            ops = [DiskOp(Op.FLUSH, 0, 0, 0), *others]
            ended = bench.all_of(ops)
            task = asyncio.ensure_future(ended)
            await asyncio.sleep(0)
            slow = bench.disk.slow
            now[0] += took_s
            await task
            assert not bench.disk.slow, "nothing is out"
            return slow

        assert await is_slow(), "nothing is known of this device"
        assert not await is_slow()
        assert await is_slow(write(0, b"f" * 4096, FUA)), "a worker is"
        assert not await is_slow(took_s=1.0)
        assert await is_slow()

    on_loop(test, path)


def test_flush_fua_trim_and_metadata_never_run_inline(path: Path) -> None:
    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"z" * SIZE, 0)
        ops = [
            DiskOp(Op.FLUSH, 0, 0, 0),
            write(0, b"f" * 4096, FUA),
            write(4096, b"p" * 4096, PREFLUSH | FUA),
            DiskOp(Op.TRIM, 0, MIB, MIB),
            DiskOp(Op.ZEROES, 0, 3 * MIB, 4096, None, MAY_UNMAP | FUA),
            DiskOp(Op.ZEROES, 0, 5 * MIB, 8192),
            write(8192, b"m" * 4096, 0, META),
            read(8 * MIB, 4096, META),
        ]
        assert await bench.all_of(ops) == []
        assert [op.error for op in ops] == [0] * len(ops)
        assert bench.content(0, 12288) == b"f" * 4096 + b"p" * 4096 + b"m" * 4096
        assert bench.content(MIB - 1, MIB + 2) == b"z" + bytes(MIB) + b"z"
        assert bench.content(3 * MIB, 4097) == bytes(4096) + b"z"
        assert bench.content(5 * MIB, 8193) == bytes(8192) + b"z"
        assert bytes(ops[-1].payload or b"") == b"z" * 4096
        assert bench.disk.backlog == 0

    on_loop(test, path)


def test_several_fua_writes_of_a_batch_share_one_flush(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_flushes = 0
    real = os.fdatasync

    def spy(fd: int) -> None:
        nonlocal n_flushes
        n_flushes += 1
        real(fd)

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(os, "fdatasync", spy)
        ops = [write(i * 65536, bytes([i + 1]) * 4096, FUA, META) for i in range(8)]
        await bench.all_of(ops)
        assert n_flushes == 1
        assert [bench.content(op.offset, 1)[0] for op in ops] == list(range(1, 9))

    on_loop(test, path)


def test_zeroes_are_written_where_there_can_be_no_holes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockio, "_fallocate", lambda *_: errno.EOPNOTSUPP)

    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"z" * SIZE, 0)
        ops = [DiskOp(Op.TRIM, 0, 512, 3 * MIB)]
        await bench.all_of(ops)
        assert bench.content(0, 3 * MIB + 1024) == b"z" * 512 + bytes(3 * MIB) + b"z" * 512

    on_loop(test, path)


def test_the_end_of_the_device_is_an_error_of_that_operation_only(path: Path) -> None:
    async def test(bench: Bench) -> None:
        ops = [read(SIZE - 4096, 4096), read(SIZE, 4096), read(0, 4096)]
        await bench.all_of(ops)
        # The first two are adjacent and one call at first; the good one must not suffer for the bad one.
        assert [op.error for op in ops] == [0, errno.EIO, 0]

    on_loop(test, path)


def test_an_oserror_becomes_the_errno_of_every_operation_of_the_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(os, "pwritev", no_space)
        monkeypatch.setattr(os, "pwrite", no_space)
        ops = [write(0, b"a" * 512), write(512, b"a" * 512), write(4096, b"a" * 512, FUA)]
        await bench.all_of(ops)
        assert [op.error for op in ops] == [errno.ENOSPC] * 3

    on_loop(test, path)


def test_short_transfers_are_finished(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_write, real_read = os.pwritev, os.preadv

    def little(fd: int, buffers: list[bytes], offset: int, flags: int = 0) -> int:
        return real_write(fd, [memoryview(b"".join(map(bytes, buffers)))[:1000]], offset, flags)

    def little_one(fd: int, buffer: bytes, offset: int) -> int:
        return real_write(fd, [buffer[:1000]], offset)

    def bit(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        return real_read(fd, [buffers[0][:700]], offset, flags)

    async def test(bench: Bench) -> None:
        data = os.urandom(8192)
        monkeypatch.setattr(os, "pwritev", little)
        monkeypatch.setattr(os, "pwrite", little_one)
        monkeypatch.setattr(os, "preadv", bit)
        ops = [write(0, data[:4096]), write(4096, data[4096:]), write(20480, b"1" * 4096)]
        ops.append(write(65536, data[:4096], FUA))
        await bench.all_of(ops)
        reads = [read(0, 8192)]
        await bench.all_of(reads)
        assert bytes(reads[0].payload or b"") == data
        assert bench.content(65536, 4096) == data[:4096]
        assert bench.content(20480, 4096) == b"1" * 4096

    on_loop(test, path)


def test_a_read_that_would_wait_goes_to_a_worker(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def cold(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        return real(fd, buffers, offset, flags)

    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"c" * 4096, 0)
        monkeypatch.setattr(os, "preadv", cold)
        ops = [read(0, 4096)]
        assert await bench.all_of(ops) == []
        assert bytes(ops[0].payload or b"") == b"c" * 4096

    on_loop(test, path)


def set_slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (disk_module, calls):
        monkeypatch.setattr(module, "SLOW_S", seconds)


def test_reads_without_rwf_nowait_are_timed_on_the_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def unsupported(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "no")
        return real(fd, buffers, offset, flags)

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(os, "preadv", unsupported)
        set_slow(monkeypatch, 60.0)
        monkeypatch.setattr(disk_module, "HOLD_FACTOR", 1e9)  # however short the wait was, its hold lasts
        monkeypatch.setattr(disk_module, "WATCH_S", 60.0)
        assert len(await bench.all_of([read(0, 4096)])) == 1
        assert not bench.device.nowait
        set_slow(monkeypatch, -1.0)  # from now on everything is slow …
        waits = iter(range(100))
        monkeypatch.setattr(calls, "n_waits", lambda: next(waits))  # … because it waits
        assert len(await bench.all_of([read(0, 4096)])) == 1
        assert len(await bench.all_of([read(0, 4096)])) == 1
        assert len(await bench.all_of([read(0, 4096)])) == 0

    on_loop(test, path)


def test_writes_that_wait_for_the_device_leave_it_to_workers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def throttled(fd: int, buffer: bytes, offset: int) -> int:
        time.sleep(0.001)  # as the kernel makes writers of dirty pages sleep
        return real(fd, buffer, offset)

    async def test(bench: Bench) -> None:
        set_slow(monkeypatch, 0.0005)
        monkeypatch.setattr(os, "pwrite", throttled)
        for _ in range(2):  # the first only makes it look closer
            assert bench.device.hold_s == 0.0
            assert len(await bench.all_of([write(0, b"s" * 512)])) == 1
        assert bench.device.hold_s >= 0.001 * disk_module.HOLD_FACTOR
        bench.device.inline_again = time.monotonic() + 60
        assert len(await bench.all_of([write(512, b"t" * 512)])) == 0
        assert bench.content(0, 1024) == b"s" * 512 + b"t" * 512
        # Felt by clients, and right after coming back: kept away for at least twice as long.
        monkeypatch.setattr(disk_module, "STALL_S", 0.0005)
        bench.device.hold_s = 3.0
        bench.device.inline_again = time.monotonic()
        assert len(await bench.all_of([write(0, b"s" * 512)])) == 1
        assert bench.device.hold_s == 6.0
        # However slow it is: tried again after a while.
        bench.device.inline_again = time.monotonic()
        assert len(await bench.all_of([write(0, b"s" * 512)])) == 1
        assert bench.device.hold_s == disk_module.HOLD_MAX_S

    on_loop(test, path)


def test_a_busy_processor_does_not_pass_for_a_slow_device(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(bench: Bench) -> None:
        set_slow(monkeypatch, -1.0)  # every call takes long …
        monkeypatch.setattr(calls, "n_waits", lambda: 7)  # … but none of them has waited
        for _ in range(4):
            assert len(await bench.all_of([write(0, b"s" * 512)])) == 1
        assert bench.device.inline_again == 0.0

    on_loop(test, path)


def test_cached_reads_that_cannot_wait_are_never_slow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"c" * 65536, 0)
        set_slow(monkeypatch, -1.0)
        for _ in range(4):
            assert len(await bench.all_of([read(0, 4096)])) == 1

    on_loop(test, path)


def test_a_large_batch_does_not_keep_the_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_slow(monkeypatch, 60.0)

    async def test(bench: Bench) -> None:
        block = os.urandom(MIB)
        ops = [write(i * MIB, block) for i in range(16)]
        inline = await bench.all_of(ops)
        assert sum(op.length for op in inline) == INLINE_BYTES_MAX
        assert bench.content(0, SIZE) == block * 16

    on_loop(test, path)


def test_workers_results_come_in_few_wake_ups(path: Path) -> None:
    async def test(bench: Bench) -> None:
        ops = [write(i * 8192, b"w" * 512, 0, META) for i in range(64)]
        assert bench.disk.start(ops) == []
        # The loop is busy meanwhile, as it is under load; everything that ended is one hand-over then.
        while any(bench.content(op.offset, 1) != b"w" for op in ops):
            pass
        async with asyncio.timeout(10):
            while len(bench.ended) < len(ops):
                bench.rung.clear()
                await bench.rung.wait()
        assert bench.n_handovers <= 3

    on_loop(test, path)


def test_storage_is_closed_only_after_its_last_operation(path: Path) -> None:
    async def test(bench: Bench) -> None:
        ops = [DiskOp(Op.FLUSH, 0, 0, 0)]
        assert bench.disk.start(ops) == []
        bench.disk.remove(0)
        assert not bench.closed
        async with asyncio.timeout(10):
            while not bench.ended:
                bench.rung.clear()
                await bench.rung.wait()
        assert bench.closed

    on_loop(test, path)


def test_extents_tell_holes_from_data(path: Path) -> None:
    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"d" * MIB, 4 * MIB)
        found = await bench.disk.extents(0, 0, SIZE, 10)
        assert found == [(4 * MIB, True), (MIB, False), (11 * MIB, True)]
        assert await bench.disk.extents(0, 4 * MIB + 4096, 2 * MIB, 1) == [(MIB - 4096, False)]
        assert await bench.disk.extents(7, 0, 512, 1) == [(512, False)]

    on_loop(test, path)


def test_a_hole_is_neither_read_nor_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        os.pwrite(bench.fd, b"x", 3 * MIB - 1)
        reads = [DiskOp(Op.READ, 0, at * MIB, MIB, None, IF_HOLE) for at in (0, 2, 3, 15)]
        await bench.all_of(reads)
        assert [op.payload is None for op in reads] == [True, False, True, True]
        assert bytes(reads[1].payload or b"") == bytes(MIB - 1) + b"x"
        zeroes = [DiskOp(Op.ZEROES, 0, at * MIB, MIB, None, IF_HOLE | MAY_UNMAP) for at in (1, 2)]
        inline = await bench.all_of(zeroes)
        assert inline == zeroes[:1] and bench.content(2 * MIB, MIB) == bytes(MIB)
        beyond = DiskOp(Op.READ, 0, SIZE - 512, 1024, None, IF_HOLE)
        await bench.all_of([beyond])
        assert beyond.error == errno.EIO
        monkeypatch.setattr(bench.device, "block", True)  # which may well return something else than zeroes
        await bench.all_of(reads[:1])
        assert bytes(reads[0].payload or b"") == bytes(MIB)

    on_loop(test, path)


def test_a_mistake_in_a_worker_is_fatal_and_not_lost(path: Path) -> None:
    async def test(bench: Bench) -> None:
        assert bench.disk.start([DiskOp(Op.WRITE, 0, 0, 512, None, PREFLUSH)]) == []
        async with asyncio.timeout(10):
            await bench.rung.wait()
        assert isinstance(bench.mistakes[0], AssertionError)

    on_loop(test, path)
