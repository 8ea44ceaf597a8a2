"""Blocking calls on a volume, for front ends whose threads carry one client request each.

A thread cuts its request into the pieces the machine takes, posts them and waits. All that was posted
until the loop gets to it enters the machine as one batch per volume, so a crowd of threads costs about
what one session of our own server costs. Relies on the volume to give every piece back exactly once.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from tandem.repl.edge.volume import Volume
from tandem.repl.edge.workers import Completions
from tandem.repl.requests import Buffer, Op, Request, split

from .codec import BLOCK_MIN

GONE: Final = errno.ESHUTDOWN  # what is answered when the node is down


class Call:
    """One client request: the pieces that are still out, and the first error among those that are not.

    ``done`` is held while any piece is out; the thread waits by taking it a second time. Threads whose calls end
    in one batch wake each other in turn (``next``): all at once they would only queue for the interpreter.
    """

    __slots__ = ("done", "error", "n_left", "next", "pieces", "volume")

    def __init__(self, volume: Volume) -> None:
        self.volume = volume
        self.pieces: list[Request] = []
        self.n_left = 0
        self.error = 0
        self.next: Call | None = None
        self.done = threading.Lock()


class BlockingVolume:
    """The volume as threads see it; the object is made in the loop's thread and used from all others.

    *fatal* gets what should never be raised. Errors are OSError with the errno of the request.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, volume: Volume, fatal: Callable[[BaseException], None]
    ) -> None:
        self._volume = volume
        self._posted: Completions[Call] = Completions(loop, self._collected, fatal)
        self._waiting: deque[Call] = deque()  # for the machine's pause to end
        self._out: set[Call] = set()
        self._gone = False

    @property
    def volume(self) -> Volume:
        """The volume itself; its methods belong to the loop's thread."""
        return self._volume

    # ----------------------------------------------------------------------------- in any thread

    def read(self, offset: int, into: memoryview) -> None:
        """Fill *into* with the bytes at *offset*. Raises OSError."""
        at = 0
        for piece in self._carry_out(Op.READ, offset, len(into)):
            payload = piece.payload
            assert payload is not None, "a read that succeeded without bytes"
            into[at : at + piece.length] = payload
            at += piece.length

    def write(self, offset: int, data: Buffer, flags: int) -> None:
        """Write *data*, which may change as soon as this returns. Raises OSError.

        It is copied: what is answered may still wait in a socket's queue, and be sent again to a peer
        that comes back.
        """
        self._carry_out(Op.WRITE, offset, len(data), memoryview(bytes(data)), flags)

    def discard(self, op: Op, offset: int, length: int, flags: int) -> None:
        """Trim or write zeroes, as *op* says. Raises OSError."""
        self._carry_out(op, offset, length, None, flags)

    def flush(self) -> None:
        """Return when everything that was answered before is stable. Raises OSError."""
        self._carry_out(Op.FLUSH, 0, 0)

    def _carry_out(
        self, op: Op, offset: int, length: int, data: memoryview | None = None, flags: int = 0
    ) -> list[Request]:
        if offset % BLOCK_MIN or length % BLOCK_MIN:
            raise OSError(errno.EINVAL, f"offset and length must be multiples of {BLOCK_MIN}")
        call = Call(self._volume)
        number = self._volume.number
        for at, size in split(op, offset, length):
            payload = None if data is None else data[at - offset : at - offset + size]
            call.pieces.append(Request(self, call, op, number, at, size, payload, flags))
        call.n_left = len(call.pieces)
        if call.n_left:
            call.done.acquire()
            self._posted.put(call)
            call.done.acquire()
            if call.next is not None:
                call.next.done.release()
        if call.error:
            raise OSError(call.error, f"{op.name} of {length} bytes at {offset} failed")
        return call.pieces

    # ------------------------------------------------------------------------ in the loop's thread

    def finished(self, batch: list[Request]) -> None:
        """The machine gives pieces back; the calls of which none is out any more go on, one after the other."""
        first: Call | None = None
        last: Call | None = None
        for piece in batch:
            call: Call = piece.cookie
            call.error = call.error or piece.error
            call.n_left -= 1
            if not call.n_left:
                self._out.discard(call)
                if last is None:
                    first = call
                else:
                    last.next = call
                last = call
        if first is not None:
            first.done.release()

    def shut_down(self) -> None:
        """The node is down: whoever waits is told so, and whoever comes later."""
        self._gone = True
        calls, self._out = self._out, set()
        for call in (*calls, *self._waiting):
            call.error = GONE
            call.done.release()
        self._waiting.clear()

    def _collected(self, calls: list[Call]) -> None:
        self._waiting.extend(calls)
        self._submit()

    def _submit(self) -> None:
        if self._gone:
            self.shut_down()
        elif self._volume.paused:
            self._volume.on_resume(self._submit)
        elif self._waiting:
            batch = [piece for call in self._waiting for piece in call.pieces]
            self._out.update(self._waiting)
            self._waiting.clear()
            self._volume.submit(batch)
