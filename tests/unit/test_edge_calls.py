"""The edge's system calls and their compiled twin do the same to the same file and say the same about it.

Without a compiler there is no twin, and the Python version is compared with itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.edge import calls, compiled
from tandem.repl.requests import FUA, META, DiskOp, Op

TWINS = (calls, compiled.calls)
SIZE = 1 << 20
BLOCK = 4096

ops = st.lists(
    st.tuples(
        st.sampled_from((Op.READ, Op.WRITE, Op.WRITE, Op.FLUSH)),
        st.sampled_from((0, 0, 0, 0, 1)),  # volume
        st.integers(0, 250).map(lambda n: n * BLOCK),
        st.sampled_from((512, BLOCK, BLOCK, 16 << 10, 20 << 10)),
        st.sampled_from((0, 0, 0, 0, FUA)),
        st.sampled_from((0, 0, 0, 0, META)),
    ),
    max_size=9,
)


def made(story: Sequence[tuple[int, ...]]) -> list[DiskOp]:
    found = []
    for i, (op, volume, offset, length, flags, area) in enumerate(story):
        payload = bytes([i + 1]) * length if op == Op.WRITE else None
        found.append(DiskOp(op, volume, offset, length, payload, flags, area))
    return found


def on_file(tell: Callable[[int], object]) -> tuple[object, bytes]:
    with tempfile.TemporaryFile() as file:
        file.truncate(SIZE)
        os.pwrite(file.fileno(), bytes(range(256)) * (SIZE // 256), 0)
        return tell(file.fileno()), os.pread(file.fileno(), 2 * SIZE, 0)


@given(ops, st.booleans(), st.booleans())
@settings(deadline=None)
def test_short_inline(story: list[tuple[int, ...]], nowait: bool, counting: bool) -> None:
    def tell(twin: ModuleType) -> tuple[object, bytes]:
        def on(fd: int) -> object:
            batch = made(story)
            count, slow_s, waited = twin.short_inline(fd, batch, 0, nowait, counting)
            if slow_s:  # this machine was busy; both may have stopped there, but not at the same place
                return None
            return count, waited, [bytes(op.payload or b"") for op in batch]

        return on_file(on)

    python, compiled_ = tell(TWINS[0]), tell(TWINS[1])
    if python[0] is not None and compiled_[0] is not None:
        assert python == compiled_


@pytest.mark.parametrize("twin", TWINS)
def test_a_batch_ends_with_what_cannot_be_done(twin: ModuleType) -> None:
    def on(fd: int) -> object:
        batch = made([(Op.WRITE, 0, 0, 512, 0, 0), (Op.READ, 0, SIZE, 512, 0, 0), (Op.WRITE, 0, 8192, 512, 0, 0)])
        return twin.short_inline(fd, batch, 0, True, False)[0]

    count, content = on_file(on)
    assert count == 1
    assert content[:512] == b"\x01" * 512
    assert content[8192] == 0


@pytest.mark.parametrize("twin", TWINS)
def test_a_descriptor_that_cannot_be_written(twin: ModuleType) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    try:
        assert twin.short_inline(fd, made([(Op.WRITE, 0, 0, 512, 0, 0)]), 0, True, False) == (0, 0.0, False)
    finally:
        os.close(fd)


@pytest.mark.parametrize("twin", TWINS)
def test_no_more_than_a_batch(twin: ModuleType) -> None:
    many = [(Op.WRITE, 0, 2 * BLOCK * i, 512, 0, 0) for i in range(calls.SHORT_OPS_MAX)]
    many += [(Op.WRITE, 0, BLOCK, 512, 0, 0)]

    def on(fd: int) -> object:
        batch, done = made(many), 0
        while done < len(batch) and (count := twin.short_inline(fd, batch[done:], 0, True, False)[0]):
            assert count <= calls.SHORT_OPS_MAX
            done += count
        return done

    assert on_file(on)[0] == len(many)


@pytest.mark.parametrize("twin", TWINS)
def test_flushes_come_back_with_their_errors(twin: ModuleType) -> None:
    """Many at once on few threads: each token once, and the error of its own descriptor."""
    seen: dict[int, int] = {}
    tokens = [object() for _ in range(50)]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        everything = loop.create_future()

        def flushed(ended: list[tuple[Any, int]]) -> None:
            for token, error in ended:
                assert tokens.index(token) not in seen
                seen[tokens.index(token)] = error
            if len(seen) == len(tokens):
                everything.set_result(None)

        flusher = twin.Flusher(loop, 3, flushed, everything.set_exception)
        with tempfile.TemporaryFile() as file:
            reader, writer = os.pipe()  # neither of them can be made stable
            for i, token in enumerate(tokens):
                flusher.start(writer if i % 5 == 0 else file.fileno(), token)
            async with asyncio.timeout(60):
                await everything
            os.close(reader)
            os.close(writer)
        flusher.stop()

    uvloop.run(main())
    assert seen == {i: errno.EINVAL if i % 5 == 0 else 0 for i in range(len(tokens))}


@pytest.mark.parametrize("twin", TWINS)
def test_threads_that_flush_do_not_inherit_how_the_loop_is_scheduled(twin: ModuleType) -> None:
    async def main() -> set[int]:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        flusher = twin.Flusher(loop, 1, lambda ended: done.set_result(None), done.set_exception)
        with tempfile.TemporaryFile() as file:
            flusher.start(file.fileno(), None)
            async with asyncio.timeout(60):
                await done
        threads = {int(name) for name in os.listdir("/proc/self/task")} - {threading.get_native_id()}
        policies = {os.sched_getscheduler(thread) for thread in threads}
        flusher.stop()
        return policies

    try:
        assert uvloop.run(main()) == {os.SCHED_OTHER}
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def test_the_twins_agree_on_their_limits() -> None:
    for name in ("SHORT_BYTES_MAX", "SHORT_OPS_MAX", "SLOW_S"):
        assert getattr(TWINS[0], name) == getattr(TWINS[1], name)
    assert isinstance(TWINS[1].n_waits(), int)


@pytest.mark.parametrize("twin", TWINS)
def test_what_is_received_stands_behind_what_has_begun(twin: ModuleType) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            twin.receive(theirs.fileno(), b"begun", 100)
        ours.sendall(b"received")
        assert twin.receive(theirs.fileno(), b"begun, ", 5) == b"begun, recei"
        assert twin.receive(theirs.fileno(), memoryview(b""), 100) == b"ved"
        ours.close()
        assert twin.receive(theirs.fileno(), b"begun", 100) == b"begun"
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        twin.receive(-1, b"", 100)


@pytest.mark.parametrize("twin", TWINS)
def test_what_a_socket_does_not_take_is_left_over(twin: ModuleType) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        pieces = [b"header", memoryview(b"payload")[:3], bytearray(b"!"), b""] * 256
        assert twin.send(ours.fileno(), pieces) == 0
        assert theirs.recv(10_000, socket.MSG_WAITALL | socket.MSG_PEEK)[:20] == b"headerpay!headerpay!"
        assert len(theirs.recv(10_000)) == 2560
        left = twin.send(ours.fileno(), [bytes(64 << 20)])
        assert 0 < left < 64 << 20
        assert twin.send(ours.fileno(), [b"nothing", b" more"]) == 12
        theirs.close()
        with pytest.raises(OSError, match=os.strerror(errno.EPIPE)):
            twin.send(ours.fileno(), [b"anybody?"])
