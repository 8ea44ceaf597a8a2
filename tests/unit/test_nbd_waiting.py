"""Threads that wait for their requests, in Python and compiled: the same stories end alike.

Without a compiler there is no twin, and the Python version is compared with itself.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import random
import select
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.nbd import compiled, waiting
from tandem.repl.requests import FUA, Op, Request

TWINS = (waiting, compiled.waiting)
MIB = 1 << 20
SIZE = 8 * MIB
PATIENCE_S = 30.0
VOLUME = 3


class Bench:
    """A crowd, the eventfd it raises, and threads to be in it."""

    def __init__(self, twin: ModuleType) -> None:
        self.event = os.eventfd(0, os.EFD_NONBLOCK)
        self.crowd = twin.Crowd(VOLUME, self.event)
        self.threads = ThreadPoolExecutor(16)

    def close(self) -> None:
        self.crowd.end(errno.ESHUTDOWN)
        self.threads.shutdown()
        os.close(self.event)

    def posted(self) -> list[Request]:
        """What the next raising of the event brings."""
        assert select.select([self.event], [], [], PATIENCE_S)[0], "nobody has raised the event"
        os.eventfd_read(self.event)
        taken: list[Request] = self.crowd.take()
        return taken

    def read(self, offset: int, length: int) -> Future[tuple[int, bytes]]:
        def work() -> tuple[int, bytes]:
            room = bytearray(length)
            return self.crowd.read(offset, room), bytes(room)

        return self.threads.submit(work)

    def write(self, offset: int, data: bytes, flags: int = 0) -> Future[int]:
        return self.threads.submit(self.crowd.write, offset, data, flags)

    def change(self, op: Op, offset: int, length: int, flags: int = 0) -> Future[int]:
        return self.threads.submit(self.crowd.change, op, offset, length, flags)


@pytest.fixture(params=TWINS, ids=("python", "compiled"))
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(request.param)
    yield bench
    bench.close()


def content(offset: int, length: int) -> bytes:
    return bytes((offset >> 9) + i & 255 for i in range(length >> 9) for _ in range(512))


stories = st.lists(
    st.tuples(
        st.sampled_from(tuple(Op)),
        st.integers(0, SIZE >> 9).map(lambda n: n << 9),
        st.sampled_from((0, 512, 4096, 4096, MIB, 3 * MIB + 512)),
        st.sampled_from((0, 0, FUA)),
    ),
    max_size=6,
)


@given(stories, st.randoms(use_true_random=False), st.sets(st.integers(0, 12)))
@settings(deadline=None, max_examples=40)
def test_stories(story: list[tuple[Op, int, int, int]], draws: random.Random, failing: set[int]) -> None:
    """Threads come one after the other; their pieces come back in any order and grouping, some with an error."""
    state = draws.getstate()

    def tell(twin: ModuleType) -> object:
        draws.setstate(state)
        bench = Bench(twin)
        try:
            return told(bench)
        finally:
            bench.close()

    def told(bench: Bench) -> object:
        calls: list[Future[tuple[int, bytes]] | Future[int]] = []
        out: list[Request] = []
        for op, offset, length, flags in story:
            if op == Op.READ:
                calls.append(bench.read(offset, length))
            elif op == Op.WRITE:
                calls.append(bench.write(offset, content(offset, length), flags))
            else:
                calls.append(bench.change(op, offset, length, flags))
            if length or op == Op.FLUSH:
                out += bench.posted()
        seen = [
            (r.op, r.volume, r.area, r.offset, r.length, r.payload and bytes(r.payload), r.flags, r.waiting, r.legs)
            for r in out
        ]
        for i, r in enumerate(out):
            r.error = errno.EIO if i in failing else 0
            if r.op == Op.READ and not r.error:
                r.payload = content(r.offset, r.length)
        draws.shuffle(out)
        while out:
            n = draws.randint(1, len(out))
            bench.crowd.finished(out[:n])
            del out[:n]
        return seen, [call.result(PATIENCE_S) for call in calls]

    assert tell(TWINS[0]) == tell(TWINS[1])


def test_a_thread_goes_on_when_all_its_pieces_are_back_with_the_first_error(bench: Bench) -> None:
    call = bench.write(MIB - 512, bytes(1024))
    one, two = bench.posted()
    one.error, two.error = errno.EIO, errno.ENOSPC
    bench.crowd.finished([two])
    assert not call.done()
    bench.crowd.finished([one])
    assert call.result(PATIENCE_S) == errno.ENOSPC


def test_a_read_is_put_together(bench: Bench) -> None:
    call = bench.read(MIB - 512, MIB + 1024)
    requests = bench.posted()
    assert [r.length for r in requests] == [512, MIB, 512]
    for r in requests:
        r.payload = memoryview(content(r.offset, r.length))
    bench.crowd.finished(requests)
    error, data = call.result(PATIENCE_S)
    assert not error and data == b"".join(content(r.offset, r.length) for r in requests)


def test_what_is_written_is_a_copy(bench: Bench) -> None:
    data = bytearray(b"a" * 4096)
    call = bench.threads.submit(bench.crowd.write, 0, data, 0)
    (request,) = bench.posted()
    data[:] = b"b" * 4096
    assert bytes(request.payload or b"") == b"a" * 4096
    bench.crowd.finished([request])
    assert call.result(PATIENCE_S) == 0


def test_threads_that_end_together_all_go_on(bench: Bench) -> None:
    calls = [bench.change(Op.TRIM, i << 12, 4096) for i in range(12)]
    requests: list[Request] = []
    while len(requests) < len(calls):
        requests += bench.posted()
    bench.crowd.finished(requests)
    assert [call.result(PATIENCE_S) for call in calls] == [0] * len(calls)


def test_at_the_end_everybody_is_told(bench: Bench) -> None:
    room = bytearray(512)
    held = bench.threads.submit(bench.crowd.read, 0, room)
    (request,) = bench.posted()
    bench.crowd.end(errno.ESHUTDOWN)
    assert held.result(PATIENCE_S) == errno.ESHUTDOWN
    assert bench.write(0, bytes(512)).result(PATIENCE_S) == errno.ESHUTDOWN
    assert bench.read(0, 512).result(PATIENCE_S) == (errno.ESHUTDOWN, bytes(512))
    assert not bench.crowd.take()
    request.payload = b"late" * 128
    bench.crowd.finished([request])  # nobody is there any more, and the thread's memory is another's
    assert room == bytes(512)


def test_nothing_is_left_for_the_garbage_collector(bench: Bench) -> None:
    class Payload(bytearray):
        """One that can be watched."""

    gc.disable()
    try:
        call = bench.read(0, 4096)
        requests = bench.posted()
        payload = Payload(4096)
        seen = weakref.ref(payload)
        requests[0].payload = payload
        bench.crowd.finished(requests)
        call.result(PATIENCE_S)
        bench.threads.shutdown()
        del payload, requests
        assert seen() is None
    finally:
        gc.enable()


def n_thread_states() -> int:
    python = ctypes.pythonapi
    for call in (python.PyInterpreterState_Get, python.PyInterpreterState_ThreadHead, python.PyThreadState_Next):
        call.restype = ctypes.c_void_p
    n, state = 0, python.PyInterpreterState_ThreadHead(ctypes.c_void_p(python.PyInterpreterState_Get()))
    while state:
        n, state = n + 1, python.PyThreadState_Next(ctypes.c_void_p(state))
    return n


def test_threads_that_python_has_not_made_leave_nothing_behind(bench: Bench) -> None:
    """As nbdkit's: each enters the interpreter for a call, and ends outside."""
    errors: list[int] = []

    def work(_: object) -> None:
        errors.append(bench.crowd.write(0, bytes(4096), 0))
        errors.append(bench.crowd.write(0, bytes(4096), 0))

    start = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(work)
    libc = ctypes.CDLL(None)
    before = n_thread_states()
    for _ in range(5):
        thread = ctypes.c_ulong()
        assert not libc.pthread_create(ctypes.byref(thread), None, start, None)
        for _ in range(2):
            bench.crowd.finished(bench.posted())
        assert not libc.pthread_join(thread, None)
    assert errors == [0] * 10
    assert n_thread_states() <= before  # threads of other tests may end meanwhile
