"""Threads that carry one client request each, hand it over and wait for it, in Python.

All that was handed over until the loop gets to it is one batch, so a crowd of threads costs the loop about what one
session of our own server costs. `_waiting.pyx` is the same for a C compiler; this is its specification, and what
runs without it. Relies on the machine to give every request back exactly once.
"""

from __future__ import annotations

import os
import threading
from collections import deque

from tandem.repl.requests import Buffer, Op, Request, split


class Call:
    """One thread's wait: how many of its requests are still out, and the first error among those that are not.

    ``done`` is held while any is; the thread waits by taking it a second time. Threads whose calls end in one batch
    wake each other in turn (``next``): all at once they would only queue for the interpreter.
    """

    __slots__ = ("done", "error", "n_left", "next")

    def __init__(self, n_left: int) -> None:
        self.n_left = n_left
        self.error = 0
        self.next: Call | None = None
        self.done = threading.Lock()
        self.done.acquire()


class Crowd:
    """The threads that use volume *number*. They are the owners of their requests, all of them together.

    The eventfd *event* becomes readable when there is something to `take`; it stays its owner's.
    """

    def __init__(self, number: int, event: int) -> None:
        self._number = number
        self._event = event
        self._posted: deque[Request] = deque()  # the loop has not taken them
        self._out: set[Call] = set()
        self._woken = False  # the event was raised, and the loop has not begun to take
        self._ended = 0  # the errno for everybody

    # ----------------------------------------------------------------------------- in any thread

    def read(self, offset: int, into: Buffer) -> int:
        """Fill *into* with the bytes at *offset*. Returns an errno, 0 when it is done."""
        room = memoryview(into)
        requests, error = self._carry_out(Op.READ, offset, len(room), None, 0)
        if not error:
            for request in requests:
                assert request.payload is not None, "a read that succeeded without bytes"
                at = request.offset - offset
                room[at : at + request.length] = request.payload
        return error

    def write(self, offset: int, data: Buffer, flags: int) -> int:
        """Write *data*, which may change as soon as this returns; an errno, 0 when it is done.

        It is copied: what is answered may still wait in a socket's queue, and be sent again to a peer
        that comes back.
        """
        return self._carry_out(Op.WRITE, offset, len(data), memoryview(bytes(data)), flags)[1]

    def change(self, op: Op, offset: int, length: int, flags: int) -> int:
        """A flush, trim or write of zeroes; an errno, 0 when it is done."""
        return self._carry_out(op, offset, length, None, flags)[1]

    def _carry_out(
        self, op: Op, offset: int, length: int, data: memoryview | None, flags: int
    ) -> tuple[list[Request], int]:
        pieces = list(split(op, offset, length))
        if not pieces:
            return [], self._ended
        call = Call(len(pieces))
        requests = []
        for at, size in pieces:
            payload = None if data is None else data[at - offset : at - offset + size]
            requests.append(Request(self, call, op, self._number, at, size, payload, flags))
        self._out.add(call)
        self._posted.extend(requests)
        if self._ended:
            self.end(self._ended)  # it may have come in between
        elif not self._woken:
            self._woken = True
            os.eventfd_write(self._event, 1)
        call.done.acquire()
        if call.next is not None:
            call.next.done.release()
        return requests, call.error

    # ------------------------------------------------------------------------ in the loop's thread

    def take(self) -> list[Request]:
        """All that was handed over since the last time."""
        self._woken = False  # before the look: whoever comes from here on raises the event again
        taken = []
        while self._posted:
            taken.append(self._posted.popleft())
        return taken

    def finished(self, batch: list[Request]) -> None:
        """The machine gives requests back; the threads none of whose is out any more go on, one after the other."""
        first: Call | None = None
        last: Call | None = None
        for request in batch:
            call: Call = request.cookie
            call.error = call.error or request.error
            call.n_left -= 1
            if not call.n_left and call in self._out:
                self._out.discard(call)
                if last is None:
                    first = call
                else:
                    last.next = call
                last = call
        if first is not None:
            first.done.release()

    def end(self, error: int) -> None:
        """Nothing comes back any more: whoever waits is told *error*, and whoever comes later."""
        self._ended = error
        self._posted.clear()
        while self._out:
            try:
                call = self._out.pop()
            except KeyError:  # another thread had the same idea
                break
            call.error = error
            call.done.release()
