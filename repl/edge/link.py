"""The link edge: the two sockets to the peer, once `connecting` has found them.

Decides how bytes get from the sockets into the machine and back, when a link counts as lost, and when so
much is unsent that front ends should pause. The machine is told LinkUp, LinkLost and LinkFailed; it says
what to send, and when to close. One attempt or link at a time is current; closed ones may still be
sending their last words.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable
from typing import Final, Protocol

from tandem.repl.config import ResourceConfig
from tandem.repl.events import Event, LinkFailed, LinkLost, LinkUp
from tandem.repl.requests import Buffer, DiskOp, PeerWrite

from .connecting import Attempt, Hopeless, Say
from .disk import Disk
from .splice import Splicer
from .stream import Receiver, Sender

BACKLOG_HIGH: Final = 32 << 20  # unsent bytes at which front ends pause: about what a link of 10 Gbit/s
BACKLOG_LOW: Final = 16 << 20  # carries in 25 ms; they go on when half of it is gone
LAST_RECEIVES_MAX: Final = 64  # from the other socket, when one has ended
LINGER_STEP_S: Final = 0.01
OTHER_END_S: Final = 1.0  # for the peer's other socket to end: a packet that was lost has been sent again by then


class Machine(Protocol):
    """What the link needs of the engine, and of the runtime around it."""

    def receive_data(self, view: memoryview) -> int: ...
    def receive_meta(self, view: memoryview) -> int: ...
    def needed_data(self, tail: memoryview) -> int: ...
    def needed_meta(self, tail: memoryview) -> int: ...
    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None: ...
    def disk_done(self, ops: list[DiskOp]) -> None: ...


Guard = Callable[..., None]  # guard(function, *arguments)


class _Pair:
    """An established link."""

    __slots__ = ("data", "ended", "from_data", "from_meta", "meta", "splicer", "ticket", "to_data", "to_meta")

    def __init__(self, ticket: int, data: socket.socket, meta: socket.socket) -> None:
        self.ticket = ticket
        self.data = data
        self.meta = meta
        self.ended: bool | None = None  # the socket the peer has closed (True for meta), while the other is heard
        self.splicer: Splicer
        self.from_data: Receiver
        self.from_meta: Receiver
        self.to_data: Sender
        self.to_meta: Sender


class Link:
    """The current attempt or link.

    *disk* takes long writes as they come (`splice`). *guard* runs a function of ours as one wake-up of the machine;
    *report* takes events, *say* warnings; *on_low* is called when the send backlog has fallen again.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, entropy: random.Random, machine: Machine, disk: Disk, *,
        guard: Guard, report: Callable[[Event], None], say: Say, on_low: Callable[[], None],
    ) -> None:  # fmt: skip
        self._loop = loop
        self._entropy = entropy
        self._machine = machine
        self._disk = disk
        self._guard = guard
        self._report = report
        self._say = say
        self._on_low = on_low
        self._attempt: tuple[int, Attempt, asyncio.Task[None]] | None = None
        self._pair: _Pair | None = None
        self._lingering: dict[asyncio.Task[None], _Pair] = {}
        self._holding = False  # the data socket is not read for the time being
        self.congested = False  # more than BACKLOG_HIGH is unsent, and not yet less than BACKLOG_LOW

    # --------------------------------------------------------------------------- what is wanted

    def connect(self, ticket: int, config: ResourceConfig) -> None:
        """Look for the peer until LinkUp or LinkFailed, or until `close`."""
        assert self._attempt is None and self._pair is None, "there is an attempt or a link already"
        attempt = Attempt(self._loop, self._entropy, config, self._say)
        task = self._loop.create_task(self._connect(ticket, attempt))
        task.add_done_callback(self._ended)
        self._attempt = ticket, attempt, task

    def close(self, ticket: int, linger_s: float) -> None:
        """End the attempt or link with this ticket; what is unsent has *linger_s* to leave."""
        if self._attempt is not None and self._attempt[0] == ticket:
            _, attempt, task = self._attempt
            self._attempt = None
            attempt.abandon()
            task.cancel()
        elif self._pair is not None and self._pair.ticket == ticket:
            pair = self._detach()
            if linger_s > 0:
                task = self._loop.create_task(self._linger(pair, linger_s))
                self._lingering[task] = pair
                task.add_done_callback(self._ended)
            else:
                self._close(pair)

    def send_data(self, buffers: list[Buffer]) -> None:
        """To the data socket; dropped without a link, because then nobody will miss it."""
        if self._pair is not None:
            self._pair.to_data.send(buffers)

    def send_meta(self, buffers: list[Buffer]) -> None:
        if self._pair is not None:
            self._pair.to_meta.send(buffers)

    def end_write(self, volume: int) -> None:
        """What goes to the disk of *volume* as it comes does so no longer."""
        if self._pair is not None:
            self._pair.splicer.end(volume)

    @property
    def backlog(self) -> int:
        """Bytes the data socket has not taken yet."""
        return self._pair.to_data.backlog if self._pair is not None else 0

    def hold(self, holding: bool) -> None:
        """Stop or go on reading the data socket. The meta socket is always read."""
        if holding is not self._holding:
            self._holding = holding
            if self._pair is not None and self._pair.ended is not False:
                if holding:
                    self._loop.remove_reader(self._pair.data)
                else:
                    self._loop.add_reader(self._pair.data, self._guard, self._receive, self._pair, False)

    def poll(self) -> None:
        """Receive what has arrived, without waiting to be told that something has."""
        pair = self._pair
        if pair is not None:
            self._receive(pair, True)
            if not self._holding:
                self._receive(pair, False)

    async def stop(self) -> None:
        """Close everything, and wait until what lingers has gone."""
        if self._attempt is not None:
            self.close(self._attempt[0], 0)
        if self._pair is not None:
            self.close(self._pair.ticket, 0)
        if self._lingering:
            await asyncio.wait(list(self._lingering))

    # -------------------------------------------------------------------------------- connecting

    async def _connect(self, ticket: int, attempt: Attempt) -> None:
        try:
            data, meta, resolver = await attempt.run()
        except Hopeless as error:
            self._attempt = None
            self._report(LinkFailed(ticket, str(error)))
            return
        self._attempt = None
        pair = _Pair(ticket, data, meta)
        machine = self._machine
        pair.splicer = Splicer(self._loop, data, machine, self._disk, self._guard)
        pair.from_data = Receiver(data, machine.receive_data, machine.needed_data, begin=pair.splicer.begin)
        pair.from_meta = Receiver(meta, machine.receive_meta, machine.needed_meta)
        pair.to_data = Sender(
            self._loop, data, lambda error: self._lose_soon(pair, False, error), high=BACKLOG_HIGH,
            low=BACKLOG_LOW, on_high=self._set_congested, on_low=self._set_relaxed,
        )  # fmt: skip
        pair.to_meta = Sender(self._loop, meta, lambda error: self._lose_soon(pair, True, error))
        self._pair = pair
        # Nothing may be received before the machine knows of the link, hence the readers last.
        self._report(LinkUp(ticket, resolver))
        if self._pair is pair:
            if not self._holding:
                self._loop.add_reader(data, self._guard, self._receive, pair, False)
            self._loop.add_reader(meta, self._guard, self._receive, pair, True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """An exception in one of our tasks is our own mistake, and as fatal as in a callback."""
        self._lingering.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._guard(_raise, error)

    # --------------------------------------------------------------------------------- receiving

    def _receive(self, pair: _Pair, meta: bool) -> None:
        """Hand on what has arrived on one socket: once per wake-up, everything that is there."""
        if pair is not self._pair or meta is pair.ended:
            return
        try:
            if (pair.from_meta if meta else pair.from_data).receive():
                return
        except OSError as error:
            self._lose(pair, meta, f"the {_name(meta)} socket failed: {error.strerror}")
            return
        if pair.ended is None:
            self._one_ended(pair, meta)
        else:
            self._both_ended(pair)

    def _one_ended(self, pair: _Pair, meta: bool) -> None:
        """The peer has closed one socket. What it said on the other one before may be late on its way, and decide
        who is right: it is heard until it ends as well, for a moment at most."""
        pair.ended = meta
        self._loop.remove_reader(pair.meta if meta else pair.data)
        self._loop.call_later(OTHER_END_S, self._guard, self._both_ended, pair)

    def _both_ended(self, pair: _Pair) -> None:
        assert pair.ended is not None
        self._lose(pair, pair.ended, f"the peer closed the {_name(pair.ended)} socket")

    def _lose_soon(self, pair: _Pair, meta: bool, error: OSError) -> None:
        """Sending failed. The machine hears of it in a wake-up of its own, not in the midst of a flush."""
        why = f"sending on the {_name(meta)} socket failed: {error.strerror}"
        self._loop.call_soon(self._guard, self._lose, pair, meta, why)

    def _lose(self, pair: _Pair, meta: bool, why: str) -> None:
        """The link has ended. What the peer said before that on either socket is still worth hearing."""
        if pair is not self._pair:
            return
        for receiver in (pair.from_meta, pair.from_data):
            with contextlib.suppress(OSError):
                for _ in range(LAST_RECEIVES_MAX):
                    if receiver.receive() <= 0:
                        break
        self._detach()
        self._close(pair)
        self._report(LinkLost(pair.ticket, why, meta))

    # ----------------------------------------------------------------------------------- closing

    def _detach(self) -> _Pair:
        """Take the current link out of service; its sockets stay open."""
        pair = self._pair
        assert pair is not None
        self._pair = None
        self._loop.remove_reader(pair.data)
        self._loop.remove_reader(pair.meta)
        pair.splicer.close()
        self._set_relaxed()
        return pair

    def _close(self, pair: _Pair) -> None:
        pair.to_data.close()
        pair.to_meta.close()
        pair.data.close()
        pair.meta.close()

    async def _linger(self, pair: _Pair, linger_s: float) -> None:
        """Send the last words, then wait for the peer to close too: a reset could overtake them."""
        end = self._loop.time() + linger_s
        try:
            while (pair.to_data.backlog or pair.to_meta.backlog) and self._loop.time() < end:
                await asyncio.sleep(LINGER_STEP_S)
            for sock in (pair.data, pair.meta):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_WR)
            for sock in (pair.data, pair.meta):
                with contextlib.suppress(OSError):  # TimeoutError is one
                    async with asyncio.timeout(max(0.0, end - self._loop.time())):
                        while await self._loop.sock_recv(sock, 1 << 16):
                            pass
        finally:
            self._close(pair)

    # ------------------------------------------------------------------------------- congestion

    def _set_congested(self) -> None:
        self.congested = True

    def _set_relaxed(self) -> None:
        if self.congested:
            self.congested = False
            self._on_low()


def _name(meta: bool) -> str:
    return "meta" if meta else "data"


def _raise(error: BaseException) -> None:
    raise error
