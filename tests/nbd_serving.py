"""A running NBD server for tests whose clients block: uvloop in a thread of its own."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import uvloop
from tandem.nbd.server import Server

from tests.nbd_volume import RamVolume
from tests.nbd_wire import (
    EXTENDED,
    FLUSH,
    GREETING,
    SIMPLE,
    STRUCTURED,
    Answer,
    ReplyReader,
    info_data,
    option,
    option_replies,
    request,
)

T = TypeVar("T")
PATIENCE_S = 30  # a test that waits longer has failed
KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB  # of the volume in most tests


class Serving:
    """``with Serving(tmp_path, volume) as serving:`` a server on ``serving.path``, in another thread."""

    def __init__(
        self, tmp_path: Path, *volumes: RamVolume, sessions_max: int | None = None, negotiation_s: float = 30
    ) -> None:
        self.volumes = volumes
        self.path = str(tmp_path / "nbd.sock")
        self.uri = f"nbd+unix:///?socket={self.path}"
        self.log: list[str] = []
        self.sessions_max = sessions_max
        self.negotiation_s = negotiation_s
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)

    def __enter__(self) -> Serving:
        self._thread.start()
        self.server = self.call(self._make)
        self.wait(self.server.start(unix=self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for volume in self.volumes:
            self.call(volume.release)
        assert self.wait(self.server.stop()), "requests were lost"
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(PATIENCE_S)
        self.loop.close()
        if kind is None:
            assert [(v.n_open, v.n_inside) for v in self.volumes] == [(0, 0)] * len(self.volumes)

    def _make(self) -> Server:
        exports = {volume.name: volume for volume in self.volumes}
        return Server(
            exports, log=self.log.append, sessions_max=self.sessions_max, negotiation_s=self.negotiation_s
        )

    def wait(self, work: Coroutine[None, None, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def call(self, function: Callable[[], T]) -> T:
        """Run *function* in the server's thread."""

        async def run() -> T:
            return function()

        return self.wait(run())

    def all_gone(self) -> None:
        """Wait until every session has ended by itself."""

        async def gone() -> None:
            await asyncio.gather(*(session.gone for session in self.server.sessions))

        self.wait(gone())

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_S)
        sock.connect(self.path)
        return sock

    def client(self, style: str = STRUCTURED, name: str = "") -> Raw:
        return Raw(self.connect(), style, name)


class Raw:
    """A client that has entered the transmission phase, on a plain blocking socket."""

    def __init__(self, sock: socket.socket, style: str, name: str = "", *first: bytes) -> None:
        self.sock = sock
        self.reader = ReplyReader(style)
        assert receive_exactly(sock, 18) == GREETING
        sock.sendall(bytes([0, 0, 0, 3]))
        way = {SIMPLE: None, STRUCTURED: 8, EXTENDED: 11}[style]
        for data in ([option(way)] if way else []) + [*first]:
            self.ask_option(data)
        self.terms = self.ask_option(option(7, info_data(name)))

    def ask_option(self, data: bytes) -> bytes:
        """Send one option; the replies up to the last."""
        self.sock.sendall(data)
        got = b""
        while True:
            head = receive_exactly(self.sock, 20)
            got += head + receive_exactly(self.sock, int.from_bytes(head[16:20], "big"))
            if option_replies(got)[-1].kind not in (2, 3, 4):
                return got

    def answers(self, n: int) -> list[Answer]:
        got: list[Answer] = []
        while len(got) < n:
            data = self.sock.recv(1 << 20)
            assert data, "the server closed the connection"
            got += self.reader.feed(data)
        return got

    def __enter__(self) -> Raw:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.sock.close()


def receive_exactly(sock: socket.socket, n: int) -> bytes:
    got = b""
    while len(got) < n:
        data = sock.recv(n - len(got))
        assert data, "the server closed the connection"
        got += data
    return got


def receive_all(sock: socket.socket) -> bytes:
    """Everything until the server closes, also by a reset."""
    got = bytearray()
    try:
        while data := sock.recv(1 << 16):
            got += data
    except ConnectionResetError:
        pass
    return bytes(got)


def still_serves(serving: Serving) -> None:
    """A new client gets an answer."""
    with serving.client() as raw:
        raw.sock.sendall(request(STRUCTURED, FLUSH, 1))
        assert raw.answers(1)[0].error == 0


def run(*command: str, cwd: Path | None = None) -> str:
    """What an outside program prints, which must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S * 2, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
