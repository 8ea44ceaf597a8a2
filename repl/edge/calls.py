"""The system calls of the usual batch, and flushes in the background, in Python.

`_calls.pyx` is the same for a C compiler, built at installation where there is one; this is its specification,
and what runs without it. Tests compare the two.
"""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from tandem.repl.requests import Buffer, DiskOp, Op

from .workers import Completions, Workers

SHORT_BYTES_MAX: Final = 16 << 10  # of an operation that is carried out without looking for neighbours …
SHORT_OPS_MAX: Final = 128  # … and how many of them, which together are no more than any other batch
SLOW_S: Final = 0.002  # an inline call longer than this kept every other client waiting

READ: Final = int(Op.READ)
WRITE: Final = int(Op.WRITE)


def n_waits() -> int:
    """How often this thread has given up the processor by itself, which is what waiting for a device is."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def short_inline(fd: int, ops: list[DiskOp], volume: int, nowait: bool, counting: bool) -> tuple[int, float, bool]:
    """Carry out the operations that *ops* begins with, as long as they are short, plain reads and writes of volume
    *volume* that do not touch their neighbours.

    Reads are tried only with *nowait*, from the page cache. Returns how many are done; the time in seconds of a write
    that took longer than `SLOW_S`, the last one done then, else 0.0; and, with *counting*, whether this thread
    waited for something since the call began. What fails is left to others to find out why.
    """
    pwrite, preadv, clock = os.pwrite, os.preadv, time.monotonic
    count, end, waits = 0, -1, n_waits() if counting else 0
    now = clock()
    for op in ops:
        offset, length = op.offset, op.length
        if (
            op.op > WRITE or op.flags or op.area or length > SHORT_BYTES_MAX or offset == end
            or op.volume != volume or count == SHORT_OPS_MAX
        ):  # fmt: skip
            break
        end = offset + length
        try:
            if op.op == WRITE:
                if pwrite(fd, op.payload, offset) != length:  # type: ignore[arg-type]  # a write has one
                    break
            else:
                buffer = bytearray(length)
                if not nowait or preadv(fd, (buffer,), offset, os.RWF_NOWAIT) != length:
                    break
                op.payload = buffer
        except OSError:
            break
        count += 1
        began, now = now, clock()
        if now - began > SLOW_S and op.op == WRITE:
            return count, now - began, counting and n_waits() > waits
    return count, 0.0, False


def receive(fd: int, begun: Buffer, n_max: int) -> bytes:
    """*begun*, and behind it what the non-blocking socket *fd* has, at most *n_max* bytes; nothing more at its end.

    Raises OSError as the socket does, BlockingIOError when nothing is there.
    """
    return bytes(begun) + os.read(fd, n_max)


def send(fd: int, buffers: list[Buffer]) -> int:
    """Send *buffers*, at most `IOV_MAX` of them, on the non-blocking socket *fd*, as far as it takes them at once.

    Returns how many bytes are left over. Raises OSError as the socket does.
    """
    total = sum(map(len, buffers))
    try:
        return total - os.writev(fd, buffers)
    except BlockingIOError:
        return total


class Flusher:
    """Makes what was written to descriptors stable, in up to *n_threads* threads.

    *flushed* gets, on the loop's thread, the tokens of all flushes that ended meanwhile, each with its errno or 0.
    *fatal* gets a mistake of ours.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, n_threads: int, flushed: Callable[[list[tuple[Any, int]]], None],
        fatal: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._workers: Workers[tuple[Any, int]] = Workers("flush", n_threads, Completions(loop, flushed, fatal))

    def start(self, fd: int, token: Any) -> None:
        """Flush *fd*, which must stay open until *token* has come back."""
        self._workers.start(partial(_flush, fd, token))

    def stop(self) -> None:
        """Let the threads end after what they have; nothing may be started afterwards."""
        self._workers.stop()


def _flush(fd: int, token: Any) -> tuple[Any, int]:
    try:
        os.fdatasync(fd)
    except OSError as error:
        return token, error.errno or errno.EIO
    return token, 0
