"""The NBD server: listening sockets, sessions, and the two pure halves of the protocol driven by uvloop.

One `Session` per connection: a `Receiver` feeds `Negotiation`, then `Transmission`; a `Sender` takes the
replies. Back-pressure is one decision in `Session._review`: read from this socket or do not. A session
holds its volume open until the last request it put into the machine has come back, even when the client
has gone long before.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final

from tandem.repl.edge.stream import Receiver, Sender, prepare
from tandem.repl.edge.volume import Volume
from tandem.repl.requests import Buffer, Request

from .budget import Budget
from .codec import ClientError
from .listener import Listener, ServerError
from .negotiation import Negotiation, State, Terms
from .transmission import StatusQuery, Transmission

__all__ = ["Server", "ServerError", "Session"]

NEGOTIATION_S: Final = 30.0  # a client has this long to choose its export
LINGER_S: Final = 60.0  # a client that has said goodbye has this long to take its last answers
DRAIN_S: Final = 10.0  # requests in flight get this long at the end of a session we end
SESSIONS_MAX: Final = 1024  # connections at a time; more wait in the listen queue
HUNG_UP: Final = "it hung up"
IDLE: Final = "it did not choose an export in time"
CHUNK_MAX: Final = 256 << 10  # a batch of 64 writes of 4 KiB; bounds the requests of one receive, too

Exported = Callable[[], Sequence[Volume]] | Mapping[str, Volume]


class Gate:
    """What is done about a volume before it is opened; this one finds every volume as ready as it can be."""

    def promises(self, volume: Volume) -> bool:
        """Is `prepare` likely to make *volume* writable? Changes nothing."""
        return False

    def prepare(self, volume: Volume, then: Callable[[str], None]) -> bool:
        """Begin to make *volume* ready, if it is to be: *then* gets "" at the end, or the sentence why it is not."""
        return False


def _silent(text: str) -> None:
    """The log of a server that has none."""


class Server:
    """Exports volumes over NBD on any number of TCP and Unix sockets.

    *exports* is asked anew for every client, so volumes may come and go; the first is the default export.
    *log* gets one sentence per event worth one. Servers of one process share a *budget*. All
    methods are to be called in the loop's thread.
    """

    def __init__(
        self, exports: Exported, *,
        log: Callable[[str], None] = _silent,
        gate: Gate | None = None,
        budget: Budget | None = None,
        sessions_max: int | None = None,
        negotiation_s: float = NEGOTIATION_S,
    ) -> None:  # fmt: skip
        self._exports = exports
        if sessions_max is None:  # disks and peers need descriptors, too
            sessions_max = min(SESSIONS_MAX, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        self._sessions_max = sessions_max
        self._listeners: list[Listener] = []
        self.negotiation_s = negotiation_s
        self.log = log
        self.gate = gate or Gate()
        self.budget = budget or Budget()
        self.sessions: set[Session] = set()

    async def start(
        self, *, tcp: tuple[str, int] | None = None, unix: str | None = None, read_only: bool = False
    ) -> list[tuple[str, int] | str]:
        """Listen on a TCP address, a Unix socket, or both; may be called again for more of them.

        Returns the addresses listened on: (host, port), with the real port where 0 was asked for, or the
        path. Raises ServerError with a sentence for the operator; then nothing new is listened on.
        """
        accepted = partial(self._accepted, read_only)
        new: list[Listener] = []
        try:
            if tcp is not None:
                new += await Listener.tcp(*tcp, accepted)
            if unix is not None:
                new.append(Listener.unix(unix, accepted))
        except ServerError:
            for listener in new:
                listener.close()
            raise
        for listener in new:
            listener.resume()
        self._listeners += new
        return [listener.address for listener in new]

    def volumes(self) -> Sequence[Volume]:
        """What is exported at the moment."""
        return tuple(self._exports.values()) if isinstance(self._exports, Mapping) else self._exports()

    def uris(self, name: str) -> list[str]:
        """The NBD URIs under which the export *name* can be reached."""
        return [listener.uri(name) for listener in self._listeners]

    def n_clients(self, name: str) -> int:
        """Sessions that hold the export *name* open."""
        return sum(s.volume is not None and s.volume.name == name for s in self.sessions)

    async def disconnect_export(self, name: str, drain_s: float = DRAIN_S) -> bool:
        """End the sessions of the export *name*: read no more, answer what was read, close.

        Returns whether all of it was done in *drain_s* seconds. If not, the connections are closed all
        the same, and the volume stays open until the machine has given back its last request.
        """
        mine = [s for s in self.sessions if s.volume is not None and s.volume.name == name]
        return await _drain(mine, drain_s)

    async def stop(self, drain_s: float = DRAIN_S) -> bool:
        """Listen no more and end all sessions, as `disconnect_export` does."""
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        return await _drain(list(self.sessions), drain_s)

    def _accepted(self, read_only: bool, sock: socket.socket) -> None:
        self.sessions.add(Session(self, sock, read_only))
        if len(self.sessions) >= self._sessions_max:
            for listener in self._listeners:
                listener.pause()

    def ended(self, session: Session) -> None:
        """A session gave back everything it held."""
        self.sessions.discard(session)
        if len(self.sessions) < self._sessions_max:
            for listener in self._listeners:
                listener.resume()


async def _drain(sessions: list[Session], drain_s: float) -> bool:
    if not sessions:
        return True
    for session in sessions:
        session.disconnect()
    _, late = await asyncio.wait([session.gone for session in sessions], timeout=drain_s)
    for session in sessions:
        if session.gone in late:
            session.abort("the time for its last requests is over")
    return not late


class _Exports:
    """What one client may see and open."""

    def __init__(self, server: Server, writable: bool, go_on: Callable[[str], None]) -> None:
        self._server = server
        self._writable = writable
        self._go_on = go_on
        self.why_not = ""  # what came of making a volume ready

    def volumes(self) -> Sequence[Volume]:
        return self._server.volumes()

    def not_yet(self, volume: Volume) -> bool:
        return self._writable and self._server.gate.prepare(volume, self._go_on)

    def look(self, volume: Volume) -> tuple[bool, str | None]:
        if self._writable and self._server.gate.promises(volume):
            return True, None
        writable, refusal = self.open(volume)
        if refusal is None:
            self.close(volume, writable)
        return writable, refusal

    def open(self, volume: Volume) -> tuple[bool, str | None]:
        refusal = volume.open(self._writable)
        if refusal is not None and self.why_not:
            refusal = f"{refusal} {self.why_not}"
        return self._writable and refusal is None, refusal

    def close(self, volume: Volume, writable: bool) -> None:
        volume.close(writable)


class Session:
    """One client's connection. ``gone`` is done when its last request is back and its volume closed."""

    def __init__(self, server: Server, sock: socket.socket, read_only: bool) -> None:
        loop = asyncio.get_running_loop()
        self._server = server
        self._sock = sock
        self._loop = loop
        self._exports = _Exports(server, not read_only, self._prepared)
        self._negotiation = Negotiation(self._exports)
        self._later = b""  # what the client sent while its volume was being made ready
        self._transmission: Transmission | None = None
        self._receiver = Receiver(sock, self._consume, self._need, chunk_max=CHUNK_MAX)
        self._sender = Sender(
            loop, sock, self._send_failed, on_high=self._review, on_low=self._sendable, on_empty=self._sendable
        )
        self.send: Callable[[list[Buffer]], None] = self._sender.send
        self.submit: Callable[[list[Request]], None]  # the volume's, once it is known
        self._queries: deque[StatusQuery] = deque()
        self._status_task: asyncio.Task[None] | None = None
        self._reading = False
        self._within = False  # _readable is further up the stack and will review
        self._awaiting_resume = False
        self._closed = False  # the socket is; requests may still be in the machine
        self._ending = ""  # why no more is read, once it is so
        self.volume: Volume | None = None  # the one held open
        self.writable = False
        self.peer = _prepare(sock)
        self.gone: asyncio.Future[None] = loop.create_future()
        self._timer = loop.call_later(server.negotiation_s, self.abort, IDLE)
        self._send_negotiated()
        self._review()

    # ------------------------------------------------------------------------------------ receiving

    def _readable(self) -> None:
        self._within = True
        try:
            n = self._receiver.receive()
        except ClientError as error:
            self._stop_reading(f"it broke the protocol: {error}")
        except OSError as error:
            self.abort(error.strerror or str(error))
        else:
            if n == 0:
                self._stop_reading(HUNG_UP)
        self._within = False
        self._review()

    def _consume(self, view: memoryview) -> int:
        transmission = self._transmission
        if transmission is not None:
            assert self.volume is not None
            transmission.size = self.volume.size
            return transmission.consume(view)
        if self._ending:
            return len(view)
        used = self._negotiate(lambda: self._negotiation.consume(view))
        if self._transmission is not None:
            return used + self._consume(view[used:])
        if self._negotiation.parked:
            self._timer.cancel()
            self._later += bytes(view[used:])
            return len(view)
        return len(view) if self._ending else used

    def _negotiate(self, step: Callable[[], int]) -> int:
        """A step of the negotiation, and what follows from it; returns what *step* does."""
        try:
            used = step()
        finally:
            self._send_negotiated()
        if self._negotiation.state is State.ENDED:
            self._stop_reading(self._negotiation.why)
        elif self._negotiation.terms is not None:
            self._enter_transmission(self._negotiation.terms)
        return used

    def _prepared(self, why_not: str) -> None:
        """The volume this client waits for is ready, or could not be made so."""
        self._exports.why_not = why_not
        if self._closed or self._ending:
            return
        self._timer = self._loop.call_later(self._server.negotiation_s, self.abort, IDLE)
        later, self._later = self._later, b""

        def step() -> int:
            self._negotiation.go_on()
            return 0

        self._within = True
        try:
            self._negotiate(step)
            self._receiver.feed(memoryview(later))
        except ClientError as error:
            self._stop_reading(f"it broke the protocol: {error}")
        self._within = False
        self._review()

    def _need(self, rest: memoryview) -> int:
        return (self._transmission or self._negotiation).need(rest)

    def _send_negotiated(self) -> None:
        if self._negotiation.out:
            out, self._negotiation.out = self._negotiation.out, bytearray()
            self._sender.send([out])

    def _enter_transmission(self, terms: Terms) -> None:
        self._timer.cancel()
        self.volume = terms.volume
        self.writable = terms.writable
        self.submit = terms.volume.submit
        self._transmission = Transmission(
            self, terms.volume.number, terms.volume.size, self._server.budget,
            writable=terms.writable, structured=terms.structured, extended=terms.extended,
            allocation=terms.allocation,
        )  # fmt: skip
        self._server.log(f"{self.peer} opened the export {terms.volume.name}")

    # ------------------------------------------------------------------------------------ the Port

    @property
    def unsent(self) -> int:
        return self._sender.backlog

    def broken_off(self, why: str) -> None:
        self._stop_reading(why)
        self._loop.call_soon(self._review)  # nothing else may be left to bring that about

    def settled(self) -> None:
        if self._queries:
            self._ask()
        if not self._within and not self._reading:  # a session that reads has nothing to gain by answers
            self._review()

    def ask_status(self, query: StatusQuery) -> None:
        self._queries.append(query)
        self._ask()

    def _ask(self) -> None:
        """Have the queries answered, unless too much is unsent; they may have far longer answers than requests."""
        if self._queries and self._status_task is None and self._may_ask:
            self._status_task = self._loop.create_task(self._answer_queries())
            self._status_task.add_done_callback(self._status_ended)

    @property
    def _may_ask(self) -> bool:
        transmission = self._transmission
        assert transmission is not None
        return self._closed or not (self._sender.congested or transmission.streaming)

    async def _answer_queries(self) -> None:
        """Answer one BLOCK_STATUS after the other; only they need a task, because they wait for a disk."""
        transmission, volume = self._transmission, self.volume
        assert transmission is not None and volume is not None
        while self._queries and self._may_ask:
            query = self._queries.popleft()
            extents: list[tuple[int, int]] = []
            if not self._closed:
                # Where a disk cannot tell, "allocated, not known to be zero" is always a true answer.
                with contextlib.suppress(OSError):
                    extents = await volume.allocation(query.offset, query.length, query.max_extents)
            transmission.status_known(query, extents)
        self._status_task = None

    def _status_ended(self, task: asyncio.Task[None]) -> None:
        """Show a mistake of ours where the mistakes of other callbacks are shown: nobody awaits the task."""
        if not task.cancelled() and (error := task.exception()) is not None:
            context = {"message": "block status failed", "exception": error, "task": task}
            self._loop.call_exception_handler(context)

    # ------------------------------------------------------------------------------------ the state

    def _review(self) -> None:
        """Bring the socket into the state that follows from everything else."""
        if self._within:
            return
        transmission = self._transmission
        if self._closed:
            self._release()
        elif self._ending or (transmission is not None and transmission.closing):
            self._read(False)
            if transmission is None or not transmission.n_open:
                self._ending = self._ending or "it disconnected"
                if not self._sender.backlog:
                    self.abort(self._ending)
                elif self._timer.cancelled():  # there is none since the negotiation
                    self._timer = self._loop.call_later(LINGER_S, self.abort, self._ending)
        else:
            volume = self.volume
            paused = volume is not None and volume.paused
            if paused and volume is not None and not self._awaiting_resume:
                self._awaiting_resume = True
                volume.on_resume(self._resumed)
            self._read(
                not paused
                and not self._sender.congested
                and not (transmission is not None and transmission.busy)
            )

    def _read(self, wanted: bool) -> None:
        if wanted is not self._reading:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._sock, self._readable)
            else:
                self._loop.remove_reader(self._sock)

    def _sendable(self) -> None:
        """The client has read most of its answers, or all."""
        if self._transmission is not None:
            self._transmission.refill()
            self._ask()
        self._review()

    def _resumed(self) -> None:
        self._awaiting_resume = False
        self._review()

    def _send_failed(self, error: OSError) -> None:
        """The client cannot be answered any more. What is up the stack is to end first."""
        self._loop.call_soon(self.abort, error.strerror or str(error))

    def _stop_reading(self, why: str) -> None:
        self._ending = self._ending or why
        if self._transmission is not None:
            self._transmission.close()

    def disconnect(self) -> None:
        """Read no more; close when everything read so far is answered and the answers are sent."""
        self._stop_reading("the server ended the session")
        self._review()

    def abort(self, why: str) -> None:
        """Close the connection now. The volume is closed when its last request is back."""
        if self._closed:
            return
        self._closed = True
        self._ending = self._ending or why
        self._timer.cancel()
        self._read(False)
        self._sender.close()
        self._sock.close()
        if self.volume is not None:
            self._server.log(f"{self.peer} left the export {self.volume.name}: {self._ending}")
        elif self._ending != HUNG_UP:  # who looks for a Primary asks every second, and goes when told
            self._server.log(f"{self.peer} left the negotiation: {self._ending}")
        if self._transmission is not None:
            self._transmission.abandon()
            self._ask()
        self._review()

    def _release(self) -> None:
        if self._transmission is not None and self._transmission.n_open:
            return
        if not self.gone.done():
            if self.volume is not None:
                self.volume.close(self.writable)
            self._server.ended(self)
            self.gone.set_result(None)


def _prepare(sock: socket.socket) -> str:
    """Set the options of a client's socket; returns how the log is to call that client.

    A client that has vanished without a word is noticed after two minutes, so that its volume can be
    demoted.
    """
    prepare(sock)
    if sock.family == socket.AF_UNIX:
        return "a local client"
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 6)):
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    try:
        host, port = sock.getpeername()[:2]
    except OSError:  # it has gone already
        return "a client that has gone"
    return f"{host} port {port}"
