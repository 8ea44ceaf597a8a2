"""The daemon's control socket: a thread of its own, so that it answers whatever the disks do.

Protocol: JSON objects, one per line, over a Unix socket that only its owner may open (mode 0600). A
request has the key ``do``; each is answered by one line, in order for quick requests:

    {"do": "hello"}                                        who the daemon is: pid, resource, node, version
    {"do": "status"}                                       {"status": ResourceStatus}
    {"do": "command", "name": …, "volume": …, "args": {}}  {"refusal": null} or {"refusal": Refusal}
    {"do": "reconfigure", "config": ResourceConfig}        the same
    {"do": "events"}                                       {"status": …} now and after every change
                                                           with "helper": Helper when a handler began or ended
    {"do": "poll"}                                         {"status": …, "poll": true}

What cannot be understood is answered by ``{"error": sentence}``, and the connection is closed. Only
`ControlServer.publish` and the answers of posted commands come from other threads; they reach this one
through a queue and a byte on a socket pair.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

from tandem.repl.errors import Refusal
from tandem.repl.events import Helper, ResourceStatus

from .paths import check_socket_path
from .values import Json, pack

LINE_MAX: Final = 256 << 10  # bytes of one request; a resource of many volumes fits well
CONNECTIONS_MAX: Final = 128  # each is one tandemadm; more than that is a mistake of somebody's script
BACKLOG_MAX: Final = 1 << 20  # bytes a slow reader of events may leave unread before changes are merged
DRAIN_S: Final = 2.0  # how long a closed connection's remaining input is thrown away
LINGER_S: Final = 1.0  # how long the last answers may take at the end
PROGRESS_S: Final = 1.0  # how often a running resync is published to readers of events
READ_SIZE: Final = 64 << 10

Done = Callable[[Json], None]


class Backend(Protocol):
    """What the server asks; called in the server's thread, must not block."""

    def hello(self) -> Json: ...

    def status(self) -> ResourceStatus: ...

    def post(self, request: Json, done: Done) -> None:
        """Start a command; *done* is called once, from any thread, with the answer.

        ValueError with a sentence when the request is malformed.
        """
        ...


class _Client:
    """One connection: what was read of the next line, what is still to be written."""

    __slots__ = ("behind", "closing_at", "inbox", "outbox", "sock", "waiting", "wants_events")

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.wants_events = False
        self.behind = False  # a status was not queued because the backlog is full
        self.closing_at: float | None = None  # input is thrown away until then
        self.waiting = 0  # commands posted and not answered


class ControlServer:
    """Serves one Unix socket from a thread. `start`, then `publish` from anywhere, then `stop`."""

    def __init__(self, path: Path, backend: Backend) -> None:
        self._path = path
        self._backend = backend
        self._selector = selectors.DefaultSelector()
        self._posted: deque[Callable[[], None]] = deque()
        self._clients: set[_Client] = set()
        self._wake_r, self._wake_w = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._listener: socket.socket | None = None
        self._ends_at: float | None = None
        self._syncing = False
        self._n_subscribers = 0

    def start(self) -> None:
        """Bind and listen; PathError or OSError when that is impossible.

        The caller holds the resource's pid file, so a socket that lies there belongs to nobody.
        """
        check_socket_path(self._path)
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(os.fspath(self._path))
        except OSError:
            listener.close()
            raise
        finally:
            os.umask(before)
        listener.listen(CONNECTIONS_MAX)
        listener.setblocking(False)
        self._wake_r.setblocking(False)
        self._wake_w.setblocking(False)
        self._listener = listener
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_r, selectors.EVENT_READ, None)
        self._thread.start()

    def publish(self, status: ResourceStatus, helper: Helper | None = None) -> None:
        """Send *status* to all readers of events, with what a handler did. May be called from any thread."""
        if self._n_subscribers:
            self._call(lambda: self._publish(status, helper))

    def stop(self) -> None:
        """Send the answers that are due, close everything, remove the socket. Blocks LINGER_S at most.

        Not to be called on the loop's thread while commands are under way, since their answers come
        from there.
        """
        self._ends_at = time.monotonic() + LINGER_S
        self._call(lambda: None)
        if self._thread.is_alive():
            self._thread.join(2 * LINGER_S)
        if self._listener is not None:
            self._path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------ the thread

    def _call(self, function: Callable[[], None]) -> None:
        self._posted.append(function)
        with contextlib.suppress(BlockingIOError, OSError):  # a full pair wakes the thread as well
            self._wake_w.send(b"\0")

    def _run(self) -> None:
        next_progress = time.monotonic()
        while not self._is_over():
            closing = any(client.closing_at is not None for client in self._clients)
            timeout = PROGRESS_S if self._n_subscribers or closing else None
            if self._ends_at is not None:
                timeout = max(0.0, self._ends_at - time.monotonic())
            for key, mask in self._selector.select(timeout):
                self._ready(key, mask)
            while self._posted:
                self._posted.popleft()()
            now = time.monotonic()
            self._close_drained(now)
            if self._syncing and self._n_subscribers and now >= next_progress:
                next_progress = now + PROGRESS_S
                self._publish(self._backend.status())
        for client in list(self._clients):
            self._drop(client)
        for sock in (self._listener, self._wake_r, self._wake_w):
            if sock is not None:
                sock.close()

    def _is_over(self) -> bool:
        if self._ends_at is None:
            return False
        busy = self._posted or any(client.outbox or client.waiting for client in self._clients)
        return not busy or time.monotonic() >= self._ends_at

    def _ready(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.fileobj is self._listener:
            self._accept()
        elif key.fileobj is self._wake_r:
            with contextlib.suppress(BlockingIOError):
                self._wake_r.recv(READ_SIZE)
        elif key.data in self._clients:
            client: _Client = key.data
            try:
                if mask & selectors.EVENT_WRITE:
                    self._write(client)
                if mask & selectors.EVENT_READ:
                    self._read(client)
            except OSError:
                self._drop(client)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # The client is gone already, or there are no descriptors left for it.
        sock.setblocking(False)
        client = _Client(sock)
        self._clients.add(client)
        self._selector.register(sock, selectors.EVENT_READ, client)
        if len(self._clients) > CONNECTIONS_MAX:
            self._refuse(client, f"more than {CONNECTIONS_MAX} control connections are open; try again later")

    def _drop(self, client: _Client) -> None:
        if client in self._clients:
            self._clients.discard(client)
            self._selector.unregister(client.sock)
            client.sock.close()
            self._count_subscribers()

    def _close_drained(self, now: float) -> None:
        for client in [c for c in self._clients if c.closing_at is not None and now >= c.closing_at]:
            self._drop(client)

    # ------------------------------------------------------------------------------- requests

    def _read(self, client: _Client) -> None:
        data = client.sock.recv(READ_SIZE)
        if not data:
            self._drop(client)
            return
        if client.closing_at is not None:
            return
        client.inbox += data
        while client.closing_at is None:
            end = client.inbox.find(b"\n")
            if end < 0:
                break
            line = bytes(client.inbox[:end])
            del client.inbox[: end + 1]
            self._line(client, line)
        if client.closing_at is None and len(client.inbox) > LINE_MAX:
            self._refuse(client, f"a request may have {LINE_MAX} bytes, this one is longer")

    def _line(self, client: _Client, line: bytes) -> None:
        try:
            if len(line) > LINE_MAX:
                raise ValueError(f"a request may have {LINE_MAX} bytes, this one is longer")
            try:
                request = json.loads(line)
            except ValueError:
                request = None
            if not isinstance(request, dict):
                raise ValueError("this control socket takes one JSON object per line; use tandemadm to talk to it")
            self._request(client, request)
        except RecursionError:
            self._refuse(client, "the request is nested too deeply")
        except ValueError as error:
            self._refuse(client, str(error))

    def _request(self, client: _Client, request: Json) -> None:
        do = request.get("do")
        if do == "hello":
            self._send(client, self._backend.hello())
        elif do == "status":
            self._send(client, {"status": pack(self._backend.status())})
        elif do == "poll":
            self._send(client, {"status": pack(self._backend.status()), "poll": True})
        elif do == "events":
            client.wants_events = True
            self._count_subscribers()
            status = self._backend.status()
            self._syncing = is_syncing(status)
            self._send(client, {"status": pack(status)})
        elif do in ("command", "reconfigure"):
            client.waiting += 1
            self._backend.post(request, lambda answer: self._call(lambda: self._answer(client, answer)))
        else:
            raise ValueError(f"unknown request {str(do)[:40]!r}")

    def _answer(self, client: _Client, answer: Json) -> None:
        client.waiting -= 1
        if client in self._clients:
            self._send(client, answer)

    def _refuse(self, client: _Client, sentence: str) -> None:
        """Say *sentence*, then close: what is still coming in is thrown away for a while, because
        closing with unread input would take the sentence away from the reader."""
        client.inbox.clear()
        client.closing_at = time.monotonic() + DRAIN_S
        self._send(client, {"error": sentence})

    # -------------------------------------------------------------------------------- writing

    def _publish(self, status: ResourceStatus, helper: Helper | None = None) -> None:
        self._syncing = is_syncing(status)
        line = {"status": pack(status)} | ({"helper": pack(helper)} if helper else {})
        for client in [c for c in self._clients if c.wants_events]:
            if len(client.outbox) > BACKLOG_MAX:
                client.behind = True
            else:
                self._send(client, line)

    def _send(self, client: _Client, message: Json) -> None:
        client.outbox += json.dumps(message).encode() + b"\n"
        try:
            self._write(client)
        except OSError:
            self._drop(client)

    def _write(self, client: _Client) -> None:
        while client.outbox:
            try:
                n_sent = client.sock.send(client.outbox[:READ_SIZE])
            except BlockingIOError:
                break
            del client.outbox[:n_sent]
        if not client.outbox and client.behind:
            client.behind = False
            self._send(client, {"status": pack(self._backend.status())})
            return
        if not client.outbox and client.closing_at is not None:
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outbox else 0)
        self._selector.modify(client.sock, mask, client)

    def _count_subscribers(self) -> None:
        self._n_subscribers = sum(client.wants_events for client in self._clients)


def is_syncing(status: ResourceStatus) -> bool:
    """Does a volume have progress to report, so that events are worth sending without a state change?"""
    return any(volume.done is not None for volume in status.connection.volumes)


def refusal_answer(refusal: Refusal | None) -> dict[str, Any]:
    """The answer to a command."""
    return {"refusal": None if refusal is None else pack(refusal)}
