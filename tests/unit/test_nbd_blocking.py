"""Blocking calls on a volume: what threads asked for meanwhile is one batch, a pause holds it, an end answers it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tandem.nbd.blocking import GONE, BlockingVolume
from tandem.repl.requests import FUA, Op

from tests.nbd_volume import RamVolume

SIZE = 8 << 20

Story = Callable[[RamVolume, BlockingVolume, ThreadPoolExecutor], Awaitable[None]]


def tell(story: Story) -> None:
    async def told() -> None:
        loop = asyncio.get_running_loop()
        volume = RamVolume(SIZE)
        blocking = BlockingVolume(loop, volume)
        with ThreadPoolExecutor(8) as threads:
            loop.set_default_executor(threads)
            try:
                await story(volume, blocking, threads)
            finally:
                blocking.shut_down()

    asyncio.run(told())


async def held(blocking: BlockingVolume, n: int) -> None:
    """Until *n* requests wait for the pause to end; the loop runs meanwhile."""
    while len(blocking._held) < n:
        await asyncio.sleep(0)


def test_every_kind() -> None:
    async def story(volume: RamVolume, blocking: BlockingVolume, threads: ThreadPoolExecutor) -> None:
        room = bytearray(4096)
        await asyncio.to_thread(blocking.write, 4096, b"x" * 4096, FUA)
        await asyncio.to_thread(blocking.discard, Op.TRIM, 6144, 512, 0)
        await asyncio.to_thread(blocking.flush)
        await asyncio.to_thread(blocking.read, 4096, room)
        assert room == b"x" * 2048 + bytes(512) + b"x" * 1536
        assert [op for op, *_ in volume.seen] == [Op.WRITE, Op.TRIM, Op.FLUSH, Op.READ]
        assert volume.seen[0][3] == FUA

    tell(story)


def test_a_pause_holds_requests_and_they_go_on_as_one_batch() -> None:
    async def story(volume: RamVolume, blocking: BlockingVolume, threads: ThreadPoolExecutor) -> None:
        volume.pause()
        calls = [threads.submit(blocking.write, i << 12, bytes(4096), 0) for i in range(6)]
        await held(blocking, len(calls))
        assert not volume.seen
        volume.resume()
        await asyncio.gather(*map(asyncio.wrap_future, calls))
        assert volume.n_submits == 1

    tell(story)


def test_errors_are_the_requests_own() -> None:
    async def story(volume: RamVolume, blocking: BlockingVolume, threads: ThreadPoolExecutor) -> None:
        volume.errors[Op.WRITE] = errno.ENOSPC
        with pytest.raises(OSError) as caught:
            await asyncio.to_thread(blocking.write, 0, bytes(512), 0)
        assert caught.value.errno == errno.ENOSPC
        for offset, length in ((100, 512), (0, 100)):
            with pytest.raises(OSError) as caught:
                await asyncio.to_thread(blocking.write, offset, bytes(length), 0)
            assert caught.value.errno == errno.EINVAL

    tell(story)


def test_the_end_answers_who_waits_for_a_pause_to_end_and_who_comes_later() -> None:
    async def story(volume: RamVolume, blocking: BlockingVolume, threads: ThreadPoolExecutor) -> None:
        volume.pause()
        call = threads.submit(blocking.flush)
        await held(blocking, 1)
        blocking.shut_down()
        volume.resume()
        for late in (asyncio.wrap_future(call), asyncio.to_thread(blocking.flush)):
            with pytest.raises(OSError) as caught:
                await late
            assert caught.value.errno == GONE
        assert not volume.n_submits

    tell(story)
