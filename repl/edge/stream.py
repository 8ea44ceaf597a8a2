"""Batches in and out of a stream socket: what the peer link and the NBD server share.

`Receiver` turns "the socket is readable" into one call that sees everything which has arrived; `Sender`
turns any number of buffers into as few system calls as the socket takes. Both work on a non-blocking
socket and make no task, future or callback per packet.

A received chunk is a fresh ``bytes`` object and is never used again: packets keep slices of it as their
payload, and reference counting frees it after the last of them. Only a packet cut by the end of a chunk
is copied, to the start of the next chunk, so that what follows makes one batch with it; a long one gets a
buffer of its own, and what is still missing of it is received there.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Final, Protocol

import numpy
from tandem.repl.requests import Buffer

from .blockio import unwritten
from .compiled import calls

CHUNK_MIN: Final = 64 << 10  # what a quiet connection asks the kernel for
CHUNK_MAX: Final = 1 << 20  # more does not make the batches better, and a kept slice keeps all of it
CHUNK_PROBE: Final = 4 << 10  # after a long packet: another is likely, and its payload is not to be copied
OWN_BUFFER_MIN: Final = 32 << 10  # a cut packet that lacks this much is received in its own buffer
EXPECTED_MAX: Final = 512 << 10  # longer packets are hardly ever there as a whole
WAKE_BYTES: Final = 256 << 10  # of a long packet: a wake-up costs as much as copying some 100 KiB
IOV_MAX: Final = 1024  # buffers in one sendmsg, <limits.h> of Linux
BACKLOG_HIGH: Final = 4 << 20  # unsent bytes at which the owner is told to slow down
BACKLOG_LOW: Final = 1 << 20  # unsent bytes at which it may go on
SOCKET_BUFFER: Final = 1 << 20  # asked of a Unix socket, whose default holds 200 KiB


class Direct(Protocol):
    """What receives the rest of a long packet instead of a buffer; ``rest`` is how many bytes that still is."""

    @property
    def rest(self) -> int: ...
    def receive(self) -> int: ...


class Receiver:
    """Hands the packets of a byte stream to *consume*, as many at a time as have arrived.

    ``consume(view)`` takes every complete packet at the start of *view* and returns how many bytes they
    have. It may keep slices of *view* for as long as it likes.
    ``need(rest)`` is asked about what it left: the total length of the packet that starts there, or, as
    long as its header is incomplete, a length that brings more of the header. Always more than it sees.
    ``begin(rest)`` may take over a long packet that starts there; *consume* does not see that one.
    All may raise; the exception comes out of `receive`, and the stream is then of no further use.
    """

    __slots__ = ("_begin", "_chunk", "_chunk_max", "_chunk_min", "_consume", "_direct", "_expected", "_filled", "_long",
                 "_mark", "_need", "_own", "_sock", "_tail", "_want")  # fmt: skip

    def __init__(
        self,
        sock: socket.socket,
        consume: Callable[[memoryview], int],
        need: Callable[[memoryview], int],
        *,
        chunk_min: int = CHUNK_MIN,
        chunk_max: int = CHUNK_MAX,
        begin: Callable[[memoryview], Direct | None] | None = None,
    ) -> None:
        self._begin = begin
        self._sock = sock
        self._consume = consume
        self._need = need
        self._chunk = chunk_min
        self._chunk_min = chunk_min
        self._chunk_max = chunk_max
        self._tail = b""  # the start of a short packet that is still incomplete
        self._want = 0  # the length of the incomplete packet in _tail or _own, as far as it is known
        self._own: memoryview | None = None  # the buffer of a long incomplete packet
        self._filled = 0  # bytes of _own that are there
        self._direct: Direct | None = None  # what receives the rest of a long incomplete packet
        self._long = 0  # the length of the last packet, if that was a long one
        self._expected = 0  # the length of the next packet, if it is like the last two
        self._mark = 0 if sock.family == socket.AF_UNIX else 1  # SO_RCVLOWAT; Unix sockets wake nobody by it

    def receive(self) -> int:
        """Receive once and hand on what is complete; to be called when the socket is readable.

        Returns the number of bytes received, 0 at the end of the stream, -1 when nothing was there.
        Raises OSError as the socket does (connection reset).
        """
        if self._own is not None:
            return self._receive_own(self._own)
        if self._direct is not None:
            return self._receive_direct(self._direct)
        if self._expected and not self._tail:
            return self._receive_expected()
        asked, tail = self._chunk, self._tail
        try:
            data = calls.receive(self._sock.fileno(), tail, asked)
        except BlockingIOError:
            return -1
        total = len(data)
        n = total - len(tail)
        if n == asked:
            self._chunk = max(min(n * 2, self._chunk_max), self._chunk_min)
        elif n < asked >> 3 and asked != self._chunk_min:
            self._chunk = max(asked >> 1, self._chunk_min)
        if tail and total < self._want:
            self._tail = data
        elif n:
            self._tail = b""
            view = memoryview(data)
            used = self._consume(view)
            if used:
                self._long = 0
            if used < total:
                self._keep(view[used:])
        if n == asked:  # the rest of a long packet is there already
            if self._own is not None:
                n += max(self._receive_own(self._own), 0)
            elif self._direct is not None:
                n += max(self._receive_direct(self._direct), 0)
        return n

    def _receive_expected(self) -> int:
        """Receive what should be another long packet where it is to stay, in one step if all of it is there."""
        want = self._expected
        own = _buffer(want)
        try:
            n = self._sock.recv_into(own)
        except BlockingIOError:
            return -1
        used = self._consume(own[:n]) if n else 0
        if used == want:
            return n
        self._expected = 0
        if not used and n and self._need(own[:n]) == want:
            if not self._begin_direct(own[:n]):
                self._begin_own(own, n, want)
                self._wake_for(want - n)
        elif used < n:
            self._long = 0
            self._keep(own[used:n])
        return n

    def _receive_own(self, own: memoryview) -> int:
        try:
            n = self._sock.recv_into(own[self._filled :])
        except BlockingIOError:
            return -1
        self._fill_own(own, n)
        return n

    def _receive_direct(self, direct: Direct) -> int:
        n = direct.receive()
        if not direct.rest:
            self._direct = None
        if n > 0:
            self._wake_for(direct.rest)
        return n

    @property
    def cut(self) -> bool:
        """Whether a packet has begun and is not complete: an end of the stream now loses it."""
        return self._own is not None or self._direct is not None or bool(self._tail)

    def feed(self, view: memoryview) -> None:
        """Take bytes that were received elsewhere, in stream order (what followed a handshake); without *begin*."""
        while view:
            own = self._own
            if own is not None:
                step = min(len(view), self._want - self._filled)
                own[self._filled : self._filled + step] = view[:step]
                view = view[step:]
                self._fill_own(own, step)
                continue
            if self._tail:
                step = min(len(view), self._want - len(self._tail))
                self._tail += view[:step]
                view = view[step:]
                if len(self._tail) < self._want:
                    return
                packet = memoryview(self._tail)
                self._tail = b""
            else:
                packet, view = view, view[:0]
            used = self._consume(packet)
            if used < len(packet):
                self._keep(packet[used:])

    def _fill_own(self, own: memoryview, n: int) -> None:
        self._filled += n
        if n:
            self._wake_for(self._want - self._filled)
        if self._filled == self._want:
            self._own = None
            self._expected = self._want if self._want == self._long <= EXPECTED_MAX else 0
            self._long = self._want
            used = self._consume(own)
            if used < len(own):
                self._keep(own[used:])

    def _wake_for(self, rest: int) -> None:
        """Have the loop woken when enough of the *rest* is there, or at the end of the stream; not by each segment."""
        mark = max(min(rest, WAKE_BYTES), 1)
        if self._mark and mark != self._mark:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, mark)
            self._mark = mark

    def _keep(self, rest: memoryview) -> None:
        """Remember the incomplete packet *rest*; the only place where received bytes are copied."""
        want = self._need(rest)
        have = len(rest)
        assert want > have, "a receiver that wants no more has not consumed a complete packet"
        self._want = want
        if want - have < OWN_BUFFER_MIN:
            self._tail = bytes(rest)
            return
        if self._begin_direct(rest):
            return
        own = _buffer(want)
        own[:have] = rest
        self._begin_own(own, have, want)

    def _begin_direct(self, rest: memoryview) -> bool:
        self._direct = self._begin(rest) if self._begin is not None else None
        if self._direct is None:
            return False
        self._chunk = CHUNK_PROBE
        self._wake_for(self._direct.rest)
        return True

    def _begin_own(self, own: memoryview, filled: int, want: int) -> None:
        self._own, self._filled, self._want = own, filled, want
        self._chunk = CHUNK_PROBE


def _buffer(size: int) -> memoryview:
    """numpy leaves new memory as it is, where bytearray would fill it with zeroes first."""
    return numpy.empty(size, numpy.uint8).data


def _nothing() -> None:
    """The callback of an owner that does not care."""


class Sender:
    """Sends buffers in order, at once as far as the socket takes them, the rest when it is writable.

    ``backlog`` is the number of bytes not sent yet. *on_high* is called when it passes *high*, then
    *on_low* when it has fallen to *low*, then *on_high* may come again; in between it is ``congested``.
    *on_empty* is called whenever a backlog has been sent to the end (not by a `send` that left nothing over).
    *on_lost* gets the error that ended the stream, once; whatever is sent afterwards is dropped. Buffers must not
    change until sent.
    """

    __slots__ = ("_high", "_loop", "_low", "_on_empty", "_on_high", "_on_lost", "_on_low", "_queue", "_sock",
                 "_waiting", "backlog", "closed", "congested")  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        on_lost: Callable[[OSError], None],
        *,
        high: int = BACKLOG_HIGH,
        low: int = BACKLOG_LOW,
        on_high: Callable[[], None] = _nothing,
        on_low: Callable[[], None] = _nothing,
        on_empty: Callable[[], None] = _nothing,
    ) -> None:
        self._loop = loop
        self._sock = sock
        self._on_lost = on_lost
        self._high = high
        self._low = low
        self._on_high = on_high
        self._on_low = on_low
        self._on_empty = on_empty
        self._queue: list[Buffer] = []
        self._waiting = False  # for the socket to become writable
        self.congested = False
        self.backlog = 0
        self.closed = False

    def send(self, buffers: list[Buffer]) -> None:
        """Send *buffers* (of bytes, format 'B') after everything sent before."""
        if self.closed:
            return
        if not self._waiting and len(buffers) <= IOV_MAX:  # the usual case: all of it goes at once
            try:
                left = calls.send(self._sock.fileno(), buffers)
            except OSError as error:
                self._lose(error)
                return
            if not left:
                return
            self.backlog += left
            self._queue += unwritten(buffers, sum(map(len, buffers)) - left)
            self._wait(True)
        else:
            self.backlog += sum(map(len, buffers))
            self._queue += buffers
            if not self._waiting:
                self._push()
        if self.backlog > self._high and not self.congested:
            self.congested = True
            self._on_high()

    def close(self) -> None:
        """Drop what is not sent. The socket stays open; it is the owner's."""
        self._wait(False)
        self.closed = True
        self._queue.clear()
        self.backlog = 0

    def _push(self) -> None:
        queue, at = self._queue, 0
        try:
            while at < len(queue):
                sent = self._sock.sendmsg(queue[at : at + IOV_MAX])
                self.backlog -= sent
                while at < len(queue) and sent >= (size := len(queue[at])):
                    sent -= size
                    at += 1
                if sent:  # the socket is full; trying again would only say so
                    queue[at] = memoryview(queue[at])[sent:]
                    break
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(error)
            return
        del queue[:at]
        self._wait(bool(queue))

    def _wait(self, wanted: bool) -> None:
        """Be called when the socket is writable, or no longer."""
        if wanted is not self._waiting:
            self._waiting = wanted
            if wanted:
                self._loop.add_writer(self._sock, self._writable)
            else:
                self._loop.remove_writer(self._sock)

    def _lose(self, error: OSError) -> None:
        self.close()
        self._on_lost(error)

    def _writable(self) -> None:
        self._push()
        if self.congested and self.backlog <= self._low and not self.closed:
            self.congested = False
            self._on_low()
        if not self.backlog and not self.closed:
            self._on_empty()


def prepare(sock: socket.socket) -> None:
    """Make a connected stream socket ready for batches: non-blocking, no Nagle delay, room on a Unix one.

    TCP sizes its buffers itself as long as nobody sets them.
    """
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
