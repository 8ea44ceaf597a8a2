"""Worker threads for system calls that may block, and the one way their results come back.

Whoever has blocking work hands over a job; the results of all jobs that ended in the meantime reach the
loop in one wake-up, however many threads ended them. The disk edge relies on this for its batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from .scheduling import ordinary

T = TypeVar("T")


class Completions(Generic[T]):
    """The results of jobs that have ended and that the loop has not seen yet.

    *collected* gets all of them as one list, on the loop's thread; *fatal* gets what a job raised instead
    of returning, which is our own mistake.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, collected: Callable[[list[T]], None],
        fatal: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._collected = collected
        self._fatal = fatal
        self._ended: deque[T] = deque()
        self._woken = False  # a wake-up is on its way and has not begun to collect

    def put(self, result: T) -> None:
        """From any thread: one more result."""
        self._ended.append(result)
        if not self._woken:
            self._woken = True
            self._call_loop(self._collect)

    def fail(self, error: BaseException) -> None:
        """From any thread: a job has raised *error*."""
        self._call_loop(self._fatal, error)

    def _call_loop(self, call: Callable[..., None], *args: BaseException) -> None:
        # A closed loop means that the process is about to end, and nobody is left to be told.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(call, *args)

    def _collect(self) -> None:
        self._woken = False  # before the first look: whoever appends from here on wakes us again
        results: list[T] = []
        while self._ended:
            results.append(self._ended.popleft())
        if results:
            self._collected(results)


class _Thread(Generic[T]):
    """A worker thread's place to wait for its next job."""

    __slots__ = ("job", "wake")

    def __init__(self, job: Callable[[], T] | None) -> None:
        self.job = job
        self.wake = threading.Lock()
        self.wake.acquire()


class Workers(Generic[T]):
    """A few threads that begin jobs in the order they were handed over; started when first needed.

    A job returns what may go wrong in it; an exception is our own mistake and fatal. Each thread waits for a wake-up
    of its own, and the one that was busy last is woken first: of several that wait at one place (a queue) each
    job would wake two, and every thread that is woken wants the interpreter from the loop.
    """

    def __init__(self, name: str, n_threads_max: int, completions: Completions[T]) -> None:
        self._name = name
        self._n_threads_max = n_threads_max
        self._completions = completions
        self._mutex = threading.Lock()  # of the three below
        self._jobs: deque[Callable[[], T]] = deque()  # nobody has begun them; only while no thread is idle
        self._idle: list[_Thread[T]] = []
        self._stopped = False
        self._n_threads = 0

    def start(self, job: Callable[[], T]) -> None:
        """Run *job* in a thread; what it returns goes to the `Completions`."""
        with self._mutex:
            thread = self._idle.pop() if self._idle else None
            if thread is None and self._n_threads == self._n_threads_max:
                self._jobs.append(job)
                return
        if thread is not None:
            thread.job = job
            thread.wake.release()
            return
        self._n_threads += 1
        name = f"{self._name}-{self._n_threads}"
        # A thread stuck in a dead device must not keep the process from ending, hence daemon.
        threading.Thread(target=self._work, args=(_Thread(job),), name=name, daemon=True).start()

    def stop(self) -> None:
        """Let the threads end after the jobs that are queued now; nothing may be started afterwards."""
        with self._mutex:
            self._stopped = True
            idle, self._idle = self._idle, []
        for thread in idle:
            thread.wake.release()

    def _work(self, me: _Thread[T]) -> None:
        ordinary()
        while (job := me.job) is not None:
            try:
                result = job()
            except Exception as error:
                self._completions.fail(error)
            else:
                self._completions.put(result)
                del result  # an idle thread must not keep the payloads of what it did last
            me.job = job = None
            with self._mutex:
                me.job = self._jobs.popleft() if self._jobs else None
                if me.job is not None or self._stopped:
                    continue
                self._idle.append(me)
            me.wake.acquire()
