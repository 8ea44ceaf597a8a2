"""Flushes by the kernel: each is answered once, by its key, and a thread takes over where that is impossible."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from tandem.repl.edge.blockio import Device
from tandem.repl.edge.disk import Disk, OpenVolume
from tandem.repl.edge.flusher import INFLIGHT_MAX, Flusher
from tandem.repl.requests import DiskOp, Op


class Bench:
    """A flusher and what it said."""

    def __init__(self) -> None:
        self.ended: list[tuple[int, int]] = []
        self.mistakes: list[BaseException] = []
        self.rung = asyncio.Event()
        self.flusher = Flusher(asyncio.get_running_loop(), self.told, self.mistakes.append)

    def told(self, ended: list[tuple[int, int]]) -> None:
        self.ended += ended
        self.rung.set()

    async def until(self, n: int) -> None:
        async with asyncio.timeout(10):
            while len(self.ended) < n:
                self.rung.clear()
                await self.rung.wait()


def on_loop(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            await test(bench)
        finally:
            bench.flusher.stop()
        assert bench.mistakes == []

    uvloop.run(main())


def test_every_flush_is_answered_once_by_its_key(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with open(tmp_path / "file", "wb", buffering=0) as file:
            file.write(b"x" * 65536)
            assert all(bench.flusher.start(key, file.fileno()) for key in (7, 8, 9))
            await bench.until(3)
        assert sorted(bench.ended) == [(7, 0), (8, 0), (9, 0)]

    on_loop(test)


def test_what_cannot_be_flushed_here_is_left_to_a_thread() -> None:
    async def test(bench: Bench) -> None:
        reader, writer = os.pipe()  # has no fsync: the kernel refuses at once
        try:
            assert not bench.flusher.start(1, writer)
        finally:
            os.close(reader)
            os.close(writer)

    on_loop(test)


def test_more_flushes_than_the_kernel_was_asked_for_are_left_to_threads(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        with open(tmp_path / "file", "wb", buffering=0) as file:
            started = [bench.flusher.start(key, file.fileno()) for key in range(INFLIGHT_MAX + 1)]
            assert started == [True] * INFLIGHT_MAX + [False]
            await bench.until(INFLIGHT_MAX)
            assert bench.flusher.start(1000, file.fileno())
            await bench.until(INFLIGHT_MAX + 1)

    on_loop(test)


@pytest.mark.parametrize("by_kernel", [True, False])
def test_a_disk_flushes_either_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_kernel: bool) -> None:
    """Also when the machine is of a kind whose calls we do not know."""
    n_synced = 0
    real = os.fdatasync

    def fdatasync(fd: int) -> None:
        nonlocal n_synced
        n_synced += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", fdatasync)
    if not by_kernel:
        monkeypatch.setattr("platform.machine", lambda: "pdp11")

    async def main() -> None:
        done: list[DiskOp] = []
        rung = asyncio.Event()

        def completed(ops: list[DiskOp]) -> None:
            done.extend(ops)
            rung.set()

        mistakes: list[BaseException] = []
        fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
        closed = asyncio.Event()
        disk = Disk(asyncio.get_running_loop(), completed, mistakes.append)
        device = Device(fd)
        disk.add(0, OpenVolume(device, device, closed.set))
        flush = DiskOp(Op.FLUSH, 0, 0, 0)
        assert disk.start([flush]) == []
        disk.remove(0)
        assert not closed.is_set(), "closed under a flush"
        async with asyncio.timeout(10):
            await rung.wait()
        assert done == [flush] and flush.error == 0 and closed.is_set() and mistakes == []
        disk.stop()
        os.close(fd)

    uvloop.run(main())
    assert n_synced == (0 if by_kernel else 1)
