"""Worker threads: every job once, in order where there is one thread, and nothing of it kept afterwards."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from functools import partial

import pytest
import uvloop
from tandem.repl.edge.workers import Completions, Workers


class Payload:
    """What a job works on."""


def on_loop(n_threads: int, jobs: list[Callable[[], object]]) -> list[object]:
    """The results of *jobs*, in the order in which they came."""

    async def main() -> list[object]:
        loop = asyncio.get_running_loop()
        results: list[object] = []
        everything = loop.create_future()

        def collected(ended: list[object]) -> None:
            results.extend(ended)
            if len(results) == len(jobs):
                everything.set_result(None)

        workers: Workers[object] = Workers("test", n_threads, Completions(loop, collected, everything.set_exception))
        for job in jobs:
            workers.start(job)
        async with asyncio.timeout(60):
            await everything
        workers.stop()
        return results

    return uvloop.run(main())


@pytest.mark.parametrize("n_threads", [1, 3])
def test_each_job_once(n_threads: int) -> None:
    results = on_loop(n_threads, [partial(int, n) for n in range(500)])
    assert sorted(results, key=str) == sorted(range(500), key=str)
    if n_threads == 1:
        assert results == list(range(500))


def test_an_idle_thread_keeps_nothing_of_its_last_job() -> None:
    """A megabyte of payload for each thread that once had something to do would stay for ever."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        done = asyncio.Event()
        fatal = loop.create_future()
        workers: Workers[object] = Workers("test", 1, Completions(loop, lambda ended: done.set(), fatal.set_exception))
        payload = Payload()
        gone = loop.create_future()
        weakref.finalize(payload, loop.call_soon_threadsafe, gone.set_result, None)
        workers.start(lambda it=payload: it)  # type: ignore[misc]
        del payload
        async with asyncio.timeout(60):
            await done.wait()
            await gone
        workers.stop()
        assert not fatal.done()

    uvloop.run(main())
