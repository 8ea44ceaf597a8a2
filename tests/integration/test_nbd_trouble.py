"""nbd/server with clients nobody wants: garbage, crowds, those that vanish or do not read."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import uvloop
from tandem.nbd.budget import INFLIGHT_BYTES_MAX
from tandem.nbd.listener import EXHAUSTED_S, Listener
from tandem.repl.edge.stream import BACKLOG_HIGH
from tandem.repl.requests import Op, Request

from tests.nbd_serving import (
    KIB,
    MIB,
    PATIENCE_S,
    SIZE,
    Raw,
    Serving,
    receive_all,
    receive_exactly,
    still_serves,
)
from tests.nbd_volume import RamVolume
from tests.nbd_wire import (
    FLUSH,
    GREETING,
    READ,
    SIMPLE,
    STATUS,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    ZEROES,
    context_data,
    info_data,
    option,
    request,
)

ROOT = Path(__file__).parents[2]
ALLOCATION = option(10, context_data("", "base:allocation"))


# ------------------------------------------------------------------------------------ bad company


@pytest.mark.parametrize("phase", ["flags", "option", "transmission"])
@pytest.mark.parametrize("style", STYLES)
def test_garbage_ends_only_the_session_it_came_from(serving: Serving, phase: str, style: str) -> None:
    draw = random.Random(f"{phase}{style}")
    for _ in range(20):
        with serving.client(style) if phase == "transmission" else serving.connect() as client:
            sock = client.sock if isinstance(client, Raw) else client
            start = struct.pack(">I", 3) if phase == "option" else b""
            sock.sendall(start + draw.randbytes(draw.choice((28, 64, 5000))))
            sock.shutdown(socket.SHUT_WR)
            receive_all(sock)
    serving.all_gone()
    still_serves(serving)


@pytest.mark.parametrize("seed", range(4))
def test_mutated_sessions(serving: Serving, volume: RamVolume, seed: int) -> None:
    """Whole sessions with a few bytes changed or lost, in any place."""
    draw = random.Random(seed)
    volume.image[:] = bytes(SIZE)
    for n in range(40):
        style = STYLES[n % 3]
        session = bytearray(struct.pack(">I", 3) + {0: b"", 1: option(8), 2: option(11)}[n % 3])
        session += option(10, context_data("", "base:allocation")) + option(7, info_data("r0", 3))
        for cookie in range(10):
            session += request(style, draw.choice((READ, FLUSH, TRIM, ZEROES, STATUS)), cookie, 4096, 65536)
            session += request(style, WRITE, cookie, 0, payload=bytes(4096))
        for _ in range(draw.randrange(1, 5)):
            at = draw.randrange(len(session))
            if draw.random() < 0.3:
                del session[at : at + draw.randrange(1, 40)]
            else:
                session[at] = draw.randrange(256)
        with serving.connect() as sock:
            try:
                sock.sendall(session)
                sock.shutdown(socket.SHUT_WR)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the server did not wait for the end of it
            receive_all(sock)
    serving.all_gone()
    still_serves(serving)


@pytest.mark.parametrize("style", STYLES)
def test_clients_that_vanish_in_the_middle(serving: Serving, volume: RamVolume, style: str) -> None:
    for cut in (1, 27, 33, 5000, 2 * MIB):
        with serving.client(style) as raw:
            for n in range(3):
                raw.sock.sendall(request(style, READ, n, 0, MIB))
            raw.sock.sendall(request(style, WRITE, 99, 0, payload=bytes(8 * MIB))[:cut])
    serving.all_gone()
    assert (volume.n_open, volume.n_inside) == (0, 0)
    still_serves(serving)


def test_a_slow_negotiation_is_ended(tmp_path: Path, volume: RamVolume) -> None:
    with Serving(tmp_path, volume, negotiation_s=0.05) as serving:
        for start in (b"", b"\0", struct.pack(">I", 3), struct.pack(">I", 3) + option(7, info_data())[:20]):
            with serving.connect() as sock:
                sock.sendall(start)
                assert receive_all(sock) == GREETING
        serving.all_gone()
        assert serving.log == ["a local client left the negotiation: it did not choose an export in time"] * 4
        with serving.client() as raw:  # the limit is not for the transmission phase
            with serving.connect() as other:
                receive_all(other)
            raw.sock.sendall(request(STRUCTURED, FLUSH, 1))
            assert raw.answers(1)[0].error == 0


def test_more_clients_than_places_wait_their_turn(tmp_path: Path, volume: RamVolume) -> None:
    with Serving(tmp_path, volume, sessions_max=8) as serving:
        waiting = [serving.connect() for _ in range(100)]
        for sock in waiting:
            assert receive_exactly(sock, 18) == GREETING
            assert serving.call(lambda: len(serving.server.sessions)) <= 8
            sock.close()
        still_serves(serving)


def test_out_of_descriptors(tmp_path: Path) -> None:
    """A server whose limit is far below the number of clients serves them all, one after the other."""
    path = str(tmp_path / "s")
    script = f"""
        import asyncio, resource, sys, uvloop
        from tandem.nbd.server import Server
        from tests.nbd_volume import RamVolume
        async def main():
            server = Server({{"r0": RamVolume(1 << 20)}}, sessions_max=10_000)
            await server.start(unix={path!r})
            resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
            print("ready", flush=True)
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
            await server.stop()
            print("bye", flush=True)
        uvloop.run(main())
    """
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], text=True, cwd=ROOT,
                             stdin=pipe, stdout=pipe, stderr=pipe)  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    crowd = []
    for _ in range(300):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(PATIENCE_S)
        sock.connect(path)
        crowd.append(sock)
    for sock in crowd:
        with sock:
            assert receive_exactly(sock, 18) == GREETING
    out, err = child.communicate(timeout=PATIENCE_S)
    assert (out, err, child.returncode) == ("bye\n", "", 0)


# ------------------------------------------------------------------------------------ back-pressure


def test_a_paused_volume_stops_the_reading(serving: Serving, volume: RamVolume) -> None:
    with serving.client() as raw:
        serving.call(volume.pause)
        raw.sock.sendall(request(STRUCTURED, FLUSH, 1))
        assert raw.answers(1)[0].error == 0, "what made it notice is still answered"
        raw.sock.sendall(request(STRUCTURED, FLUSH, 2))
        for _ in range(3):
            assert serving.call(lambda: len(volume.seen)) == 1
        serving.call(volume.resume)
        assert raw.answers(1)[0].cookie == 2


def test_who_does_not_read_answers_is_not_read_either(serving: Serving, volume: RamVolume) -> None:
    greedy = serving.client()
    greedy.sock.setblocking(False)
    asked = 0
    with greedy:
        try:
            while True:
                greedy.sock.sendall(b"".join(request(STRUCTURED, READ, n, 0, MIB) for n in range(64)))
                asked += 64
        except BlockingIOError:
            pass
        still_serves(serving)

        def held() -> int:
            return sum(session._sender.backlog for session in serving.server.sessions)

        assert serving.call(held) <= INFLIGHT_BYTES_MAX + MIB
        assert len(volume.seen) < asked
    serving.all_gone()


def test_unread_answers_of_small_requests_are_bounded_too(tmp_path: Path) -> None:
    volume = RamVolume(SIZE, at_once=True)
    with Serving(tmp_path, volume) as serving, serving.client() as greedy:
        for n in range(400):
            try:
                greedy.sock.settimeout(0)
                greedy.sock.sendall(request(STRUCTURED, READ, n, 0, 256 * KIB))
            except BlockingIOError:
                break
            backlogs = serving.call(lambda: [s._sender.backlog for s in serving.server.sessions])
            assert max(backlogs) <= INFLIGHT_BYTES_MAX + MIB
        assert len(volume.seen) < 400


@pytest.mark.parametrize("style", STYLES)
def test_a_long_read_that_fails_half_sent_ends_a_session_only_where_there_is_no_other_way(
    serving: Serving, volume: RamVolume, style: str
) -> None:
    serving.server.budget.free = 0
    with serving.client(style) as raw:
        raw.reader.reads = {1: (0, 32 * MIB), 2: (0, 512)}
        raw.sock.sendall(request(style, READ, 1, 0, 32 * MIB))
        head = receive_exactly(raw.sock, 100)
        volume.errors = {Op.READ: errno.EIO}
        assert raw.reader.feed(head) == []
        if style == SIMPLE:
            assert len(receive_all(raw.sock)) < 32 * MIB
            serving.all_gone()
            assert "a read failed after a part of it was sent" in serving.log[-1]
            return
        (answer,) = raw.answers(1)
        assert (answer.error, answer.text[-1]) == (errno.EIO, ".")
        volume.errors = {}
        raw.sock.sendall(request(style, READ, 2, 0, 512))
        assert raw.answers(1)[0].data == bytes(512)
    serving.all_gone()


def test_unread_answers_about_allocation_are_bounded_and_all_come_in_the_end(
    serving: Serving, volume: RamVolume
) -> None:
    """16 bytes of request for each KiB of answer: what waits to be asked is not asked before there is room."""
    volume.holes[:] = bytes([0, 1]) * (len(volume.holes) // 2)
    n = 2000
    with Raw(serving.connect(), STRUCTURED, "", ALLOCATION) as greedy:
        greedy.sock.sendall(b"".join(request(STRUCTURED, STATUS, k, 0, SIZE) for k in range(n)))
        greedy.answers(1)
        (session,) = serving.server.sessions
        while serving.call(lambda: session._status_task is not None):
            pass
        assert BACKLOG_HIGH < session._sender.backlog <= BACKLOG_HIGH + MIB
        while serving.call(lambda: session._transmission and session._transmission.n_open):
            greedy.answers(1)
    serving.all_gone()


def test_who_asks_about_allocation_and_goes_leaves_nothing_open(serving: Serving, volume: RamVolume) -> None:
    volume.holes[:] = bytes([0, 1]) * (len(volume.holes) // 2)
    with Raw(serving.connect(), STRUCTURED, "", ALLOCATION) as greedy:
        greedy.sock.sendall(b"".join(request(STRUCTURED, STATUS, k, 0, SIZE) for k in range(2000)))
        greedy.answers(1)
        while not serving.call(lambda: any(session._sender.congested for session in serving.server.sessions)):
            pass
    serving.all_gone()


def test_without_descriptors_it_waits_instead_of_spinning(tmp_path: Path) -> None:
    class Exhausted(socket.socket):
        n_tried = 0

        def accept(self) -> tuple[socket.socket, object]:
            self.n_tried += 1
            if self.n_tried == 1:
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    async def scenario() -> None:
        accepted: asyncio.Queue[socket.socket] = asyncio.Queue()
        sock = Exhausted(socket.AF_UNIX, socket.SOCK_STREAM)
        path = str(tmp_path / "s")
        sock.bind(path)
        sock.listen()
        sock.setblocking(False)
        listener = Listener(sock, path, accepted.put_nowait)
        listener.resume()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
            began = asyncio.get_running_loop().time()
            (await asyncio.wait_for(accepted.get(), PATIENCE_S)).close()
            assert asyncio.get_running_loop().time() - began >= EXHAUSTED_S * 0.9
        assert sock.n_tried <= 3
        listener.close()

    uvloop.run(scenario())


def test_big_writes_from_many_clients_at_once(serving: Serving, volume: RamVolume) -> None:
    clients = [serving.client(STYLES[n % 3]) for n in range(6)]
    offsets = [n * 8 * MIB + 512 for n in range(6)]
    for n, client in enumerate(clients):
        payload = bytes([n]) * 4 * MIB
        client.sock.sendall(request(client.reader.style, WRITE, n, offsets[n], payload=payload))
    for n, client in enumerate(clients):
        with client:
            assert [(a.cookie, a.error) for a in client.answers(1)] == [(n, 0)]
            assert volume.image[offsets[n] : offsets[n] + 4 * MIB] == bytes([n]) * 4 * MIB


class FailsBehind(RamVolume):
    """Nothing behind the first MiB can be read, and that is known only when what is before it has been sent."""

    def submit(self, batch: list[Request]) -> None:
        for r in batch:
            if r.offset >= MIB:
                r.error = errno.EIO
                asyncio.get_running_loop().call_later(0.05, r.owner.finished, [r])
            else:
                super().submit([r])


@pytest.mark.parametrize("length", [MIB + 512 * KIB, 2 * MIB])
def test_a_stream_that_breaks_off_in_its_last_piece_ends_the_connection(tmp_path: Path, length: int) -> None:
    with Serving(tmp_path, FailsBehind(SIZE)) as serving:
        serving.server.budget.free = 0
        raw = serving.client(SIMPLE)
        raw.sock.settimeout(PATIENCE_S)
        raw.sock.sendall(request(SIMPLE, READ, 1, 0, length))
        assert len(receive_all(raw.sock)) == 16 + MIB


def test_block_status_waits_for_the_end_of_a_stream(tmp_path: Path) -> None:
    """Its answers may be long, and would have to be kept until then."""
    volume = RamVolume(SIZE)
    volume.holes[:] = bytes([0, 1]) * (len(volume.holes) // 2)
    with Serving(tmp_path, volume) as serving:
        serving.server.budget.free = 0
        raw = Raw(serving.connect(), STRUCTURED, "", ALLOCATION)
        raw.sock.settimeout(PATIENCE_S)
        n = 50
        queries = [request(STRUCTURED, STATUS, 2 + i, 0, SIZE) for i in range(n)]
        raw.sock.sendall(request(STRUCTURED, READ, 1, 0, 32 * MIB) + b"".join(queries))
        head = receive_exactly(raw.sock, 28)  # the stream has begun
        (session,) = serving.server.sessions
        transmission = session._transmission
        assert transmission is not None
        while serving.call(lambda: not session._queries and not transmission._n_later):
            pass
        assert serving.call(lambda: (session._status_task, len(session._queries))) == (None, n)
        assert struct.unpack_from(">Q", head, 8) == (1,)
        receive_exactly(raw.sock, 32 * MIB + 20)
        for i in range(n):
            _, _, _, cookie, length = struct.unpack(">IHHQI", receive_exactly(raw.sock, 20))
            assert cookie == 2 + i
            receive_exactly(raw.sock, length)
