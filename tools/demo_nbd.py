"""A small NBD client that keeps a ledger: what was asked for, what was acknowledged.

The demonstration writes with it while daemons are killed, so what counts is that nothing is believed that
the server did not say: a write is acknowledged when its reply has been read, and not before. One thread,
one Unix socket, simple replies, many requests in flight. The protocol's numbers are those of `tandem.nbd`.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.nbd import codec
from tandem.nbd.client_negotiation import ClientNegotiation, ServerMistake
from tandem.nbd.codec import Cmd, CmdFlag

ANSWER_S: Final = 60.0  # a server that says nothing for so long is stuck
REQUEST_TYPE_SHIFT: Final = 32  # codec.REQUEST's first field: magic, flags, type


class NbdRefused(Exception):
    """The server refused the export; the text is its sentence."""


class ConnectionLost(Exception):
    """The server is gone, or silent for too long."""


@dataclass(slots=True)
class Request:
    """One request and its fate. *data* is what is written, or what was read. *error* is NBD's number."""

    kind: Cmd
    offset: int = 0
    length: int = 0
    data: bytes = b""
    flags: int = 0
    answered: bool = False
    error: int = 0

    @property
    def acknowledged(self) -> bool:
        return self.answered and not self.error


def write(offset: int, data: bytes, flags: int = 0) -> Request:
    return Request(Cmd.WRITE, offset, len(data), data, flags)


def read(offset: int, length: int) -> Request:
    return Request(Cmd.READ, offset, length)


class Nbd:
    """A session with one export, at a Unix socket or at a host and port. Use as a context manager.

    NbdRefused when the server does not offer the export to us; ConnectionLost when it goes away.
    """

    def __init__(self, where: Path | tuple[str, int], export: str) -> None:
        self.size = 0
        self.flags = 0
        self._inbox = bytearray()
        self._cookie = 0
        self._in_flight: dict[int, Request] = {}
        family = socket.AF_UNIX if isinstance(where, Path) else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.settimeout(ANSWER_S)
        try:
            self._sock.connect(os.fspath(where) if isinstance(where, Path) else where)
            self._negotiate(export)
        except OSError as error:
            self._sock.close()
            raise ConnectionLost(f"{where}: {error.strerror or error}") from error
        except Exception:
            self._sock.close()
            raise

    def __enter__(self) -> Nbd:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the session as the protocol wants it, if the server still listens."""
        with contextlib.suppress(OSError):  # it may have gone before us
            self._sock.sendall(_header(Request(Cmd.DISC), 0))
        self._sock.close()

    def cut(self) -> None:
        """End the connection from another thread, as its server's death would: `run` raises ConnectionLost."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    @property
    def n_in_flight(self) -> int:
        return len(self._in_flight)

    # ------------------------------------------------------------------------------- requests

    def run(
        self, requests: Iterable[Request], depth: int = 16, answered: Callable[[Request], None] | None = None
    ) -> None:
        """Carry out *requests*, up to *depth* at a time; *answered* is called for each reply.

        When the server goes away, every reply that it had sent is still taken, then ConnectionLost is
        raised; what is not ``answered`` by then is unknown.
        """
        try:
            for request in requests:
                while len(self._in_flight) >= depth:
                    self._take_reply(answered)
                self._cookie += 1
                self._in_flight[self._cookie] = request
                self._sock.sendall(_header(request, self._cookie) + _payload(request))
            while self._in_flight:
                self._take_reply(answered)
        except OSError as error:
            self._drain(answered)
            raise ConnectionLost(error.strerror or str(error)) from error

    def one(self, request: Request) -> Request:
        """Carry out one request and return it; its error is for the caller to look at."""
        self.run([request])
        return request

    def flush(self) -> None:
        """ConnectionLost also when the server answers with an error: nothing is stable then."""
        error = self.one(Request(Cmd.FLUSH)).error
        if error:
            raise ConnectionLost(f"flush: NBD error {error}")

    def read(self, offset: int, length: int) -> bytes:
        """ConnectionLost also when the server answers with an error."""
        done = self.one(read(offset, length))
        if done.error:
            raise ConnectionLost(f"read of {length} bytes at {offset}: NBD error {done.error}")
        return done.data

    def _take_reply(self, answered: Callable[[Request], None] | None) -> None:
        magic, error, cookie = codec.SIMPLE_REPLY.unpack(self._receive(codec.SIMPLE_REPLY.size))
        if magic != codec.SIMPLE_REPLY_MAGIC or cookie not in self._in_flight:
            raise ConnectionLost(f"a reply nobody asked for: magic {magic:#x}, cookie {cookie}")
        request = self._in_flight[cookie]
        if request.kind == Cmd.READ and not error:
            request.data = self._receive(request.length)
        del self._in_flight[cookie]
        request.answered, request.error = True, error
        if answered is not None:
            answered(request)

    def _drain(self, answered: Callable[[Request], None] | None) -> None:
        """Take the replies that have arrived already; the end of the stream ends it."""
        try:
            while self._in_flight:
                self._take_reply(answered)
        except (OSError, ConnectionLost):
            pass  # this is how it ends

    def _receive(self, n_bytes: int) -> bytes:
        while len(self._inbox) < n_bytes:
            part = self._sock.recv(max(1 << 18, n_bytes - len(self._inbox)))
            if not part:
                raise ConnectionResetError("the server closed the connection")
            self._inbox += part
        found = bytes(self._inbox[:n_bytes])
        del self._inbox[:n_bytes]
        return found

    # ----------------------------------------------------------------------------- negotiation

    def _negotiate(self, export: str) -> None:
        talk = ClientNegotiation(export)
        while not talk.over:
            part = self._sock.recv(1 << 16)
            if not part:
                raise ConnectionResetError("the server closed the connection")
            self._inbox += part
            try:
                del self._inbox[: talk.consume(bytes(self._inbox))]
            except ServerMistake as error:
                raise ConnectionLost(str(error)) from error
            self._sock.sendall(talk.out)
            talk.out.clear()
        if talk.terms is None:
            raise NbdRefused(talk.refusal)
        self.size, self.flags = talk.terms.size, talk.terms.flags


def _header(request: Request, cookie: int) -> bytes:
    kind = codec.REQUEST_MAGIC << REQUEST_TYPE_SHIFT | request.flags << 16 | request.kind
    return codec.REQUEST.pack(kind, cookie, request.offset, request.length)


def _payload(request: Request) -> bytes:
    return request.data if request.kind == Cmd.WRITE else b""


__all__ = ["Cmd", "CmdFlag", "ConnectionLost", "Nbd", "NbdRefused", "Request", "read", "write"]
