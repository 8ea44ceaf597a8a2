"""Long writes of the peer: from its socket to the disk by splice(2), without a copy in our memory.

The pages a socket has received go into a pipe as they are, and the page cache copies them from there, while the rest of
the write is still on its way. Half of the copying is gone that way, and all of the waiting for the last byte. To the
machine such a write is under way on the disk from its header on, so whatever has to wait for it does.

Decides which bytes are written when: whole pages, because a page that is in memory in part only would have to be read
first, and so that a connection that is lost in the middle leaves no torn sector. What it does leave behind is what any
write leaves that was never answered: the peer has it in its transfer log, and a resync brings it again.

Relies on the machine for which writes may begin before they are complete, and on `disk` for whether the loop may write.
Source: splice(2), pipe(7); fcntl(2), F_SETPIPE_SZ.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import mmap
import os
import socket
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

from tandem.repl.requests import DiskOp, PeerWrite
from tandem.repl.wire import DATA_PACKET

from .disk import Disk, OpenVolume, on_loop

PIPE_BYTES: Final = 1 << 20  # the longest write, and the most that anybody may ask for by default
PIPE_BYTES_MIN: Final = 64 << 10  # what everybody gets


class Machine(Protocol):
    """What this room needs of the engine."""

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None: ...
    def disk_done(self, ops: list[DiskOp]) -> None: ...


class Splicer:
    """The long writes of one link, one after the other; *guard* runs a function of the machine as one wake-up."""

    __slots__ = ("_disk", "_guard", "_loop", "_machine", "_pipe", "_sock", "_splice")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, machine: Machine, disk: Disk,
        guard: Callable[..., None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._sock = sock
        self._machine = machine
        self._disk = disk
        self._guard = guard
        self._pipe: Pipe | None = None
        self._splice: Splice | None = None

    def begin(self, rest: memoryview) -> Splice | None:
        """*rest* begins an incomplete packet: what receives the remainder of it. None: nothing of this room does."""
        if self._pipe is None:
            try:
                self._pipe = Pipe()
            except OSError:  # there is another way
                return None
        w = self._machine.begin_write(rest, self._disk.splices)
        if w is None:
            return None
        self._splice = splice = Splice(self._sock, self._pipe, self._disk.hold(w.volume), w, self._done)
        splice.begin(rest[DATA_PACKET.size :])
        return splice

    def _done(self, splice: Splice) -> None:
        self._splice = None
        self._disk.let_go(splice.volume)
        self._guard(self._machine.disk_done, [splice.w])

    def end(self, volume: int) -> None:
        """The disk of *volume* is on its way out, and does not wait for the rest of a write to it."""
        if self._splice is not None and self._splice.w.volume == volume:
            self._splice.fail(errno.EIO)

    def close(self) -> None:
        """The link has ended. Of a write that was under way the machine hears when it knows that: no ack may go out."""
        splice, self._splice = self._splice, None
        if splice is not None:
            self._disk.let_go(splice.volume)
            self._loop.call_soon(self._guard, self._machine.disk_done, [splice.w])
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


class Pipe:
    """Where the bytes of one write after the other pass through; empty between them.

    OSError where there is none, or none that is of use: whoever has too many of them gets some of one or two pieces.
    """

    __slots__ = ("into", "out")

    def __init__(self) -> None:
        self.out, self.into = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # a shorter one means more calls
            fcntl.fcntl(self.into, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        if fcntl.fcntl(self.into, fcntl.F_GETPIPE_SZ) < PIPE_BYTES_MIN:
            self.close()
            raise OSError(errno.EPERM, "too many pipes")

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)


class Splice:
    """One write; ``rest`` is how many bytes of it have not arrived. *done* is told once when it has ended on the disk.

    A write that fails has ended at once, with the disk's error in ``w.error``: whoever waits for the disk must not wait
    for the network. The rest of it is read and forgotten.
    """

    __slots__ = ("_at", "_done", "_failed", "_held", "_pipe", "_sock", "rest", "volume", "w")

    def __init__(
        self, sock: socket.socket, pipe: Pipe, volume: OpenVolume, w: PeerWrite, done: Callable[[Splice], None]
    ) -> None:
        self._sock = sock
        self._pipe = pipe
        self._done = done
        self._at = w.offset  # on the device; what the write has before it is written
        self._held = 0  # bytes in the pipe
        self._failed = False  # and so it has ended; the write itself belongs to the machine then
        self.volume = volume
        self.w = w
        self.rest = w.length

    def begin(self, begun: memoryview) -> None:
        """*begun* has arrived already; at least a byte has not."""
        self.rest -= len(begun)
        whole = self._whole(len(begun))
        if whole:
            self._write(whole, partial(self.volume.data.write, [begun[:whole]], self._at))
        if whole < len(begun) and not self._failed:
            self._held = os.write(self._pipe.into, begun[whole:])

    def receive(self) -> int:
        """Write what has arrived; returns and raises as `Receiver.receive`."""
        n, gathered = 0, False
        while self.rest:
            try:
                step = os.splice(self._sock.fileno(), self._pipe.into, self.rest, flags=os.SPLICE_F_NONBLOCK)
            except BlockingIOError:
                if n or gathered or not self._held:
                    return n or -1
                gathered = True  # less than a page, but perhaps in as many pieces as the pipe takes
                os.write(self._pipe.into, os.read(self._pipe.out, self._held))
                continue
            if not step:
                return n
            n += step
            self.rest -= step
            self._held += step
            if self._failed:
                self._forget()
            elif whole := self._whole(self._held):
                self._held -= whole
                self._write(whole, partial(self.volume.data.write_from, self._pipe.out, whole, self._at))
        if not self._failed:
            self._done(self)
        return n

    def _whole(self, n: int) -> int:
        """How many of the next *n* bytes are to be written now: up to the end of a page, or of the write."""
        return max((self._at + n & -mmap.PAGESIZE) - self._at, 0) if self.rest else n

    def _write(self, n: int, write: Callable[[], None]) -> None:
        """Have *write* write the next *n* bytes."""
        self._at += n
        try:
            on_loop(self.volume.data, write)
        except OSError as error:
            self.fail(error.errno or errno.EIO)

    def fail(self, error: int) -> None:
        """The disk takes no more of it."""
        self._failed = True
        self.w.error = error
        self._forget()
        self._done(self)

    def _forget(self) -> None:
        self._held = 0
        with contextlib.suppress(BlockingIOError):
            while os.read(self._pipe.out, PIPE_BYTES):
                pass
