"""nbd/server on a plain socket: styles, order, goodbyes; and what its owner does with it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from tandem.nbd.server import Server, ServerError
from tandem.repl.requests import Op

from tests.nbd_serving import (
    KIB,
    MIB,
    PATIENCE_S,
    SIZE,
    Raw,
    Serving,
    receive_all,
    receive_exactly,
    run,
    still_serves,
)
from tests.nbd_volume import RamVolume
from tests.nbd_wire import (
    DISC,
    EIO,
    EXTENDED,
    F_REQ_ONE,
    FLUSH,
    GREETING,
    READ,
    STATUS,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    ZEROES,
    context_data,
    option,
    request,
)

# ------------------------------------------------------------------------------------ raw sockets


@pytest.mark.parametrize("style", STYLES)
def test_every_style_end_to_end(serving: Serving, style: str) -> None:
    data = random.Random(5).randbytes(3 * MIB)
    with serving.client(style) as raw:
        raw.sock.sendall(request(style, WRITE, 1, 512, payload=data))
        assert [a.error for a in raw.answers(1)] == [0]
        raw.reader.reads = {2: (512, 3 * MIB), 3: (0, 512), 4: (1, 512)}
        for cookie, (offset, length) in raw.reader.reads.items():
            raw.sock.sendall(request(style, READ, cookie, offset, length))
        answers = {a.cookie: a for a in raw.answers(3)}
        assert answers[2].data == data
        assert answers[3].data == bytes(512)
        assert answers[4].error == errno.EINVAL
        raw.sock.sendall(request(style, TRIM, 5, 0, SIZE) + request(style, ZEROES, 6, 0, SIZE))
        assert {a.cookie: a.error for a in raw.answers(2)} == {5: 0, 6: 0}
        raw.sock.sendall(request(style, DISC, 7))
        assert receive_all(raw.sock) == b""


@pytest.mark.parametrize("style", STYLES)
def test_answers_in_any_order(serving: Serving, volume: RamVolume, style: str) -> None:
    volume.holding = True
    with serving.client(style) as raw:
        raw.reader.reads = {n: (n * 4096, 4096) for n in range(64)}
        for n in range(64):
            raw.sock.sendall(request(style, READ, n, n * 4096, 4096))
        while serving.call(lambda: volume.n_inside) < 64:
            pass
        for n in range(64):
            volume.image[n * 4096 : (n + 1) * 4096] = bytes([n]) * 4096
        serving.call(volume.release)
        answers = raw.answers(64)
        assert {a.cookie: a.data for a in answers} == {n: bytes([n]) * 4096 for n in range(64)}
        assert [a.cookie for a in answers] != list(range(64))


def test_extended_block_status(serving: Serving, volume: RamVolume) -> None:
    volume.holes[1] = 0
    raw = Raw(serving.connect(), EXTENDED, "", option(10, context_data("", "base:allocation")))
    with raw:
        for flags in (0, F_REQ_ONE):
            raw.sock.sendall(request(EXTENDED, STATUS, 1, 0, SIZE, flags))
            (answer,) = raw.answers(1)
            whole = [(64 * KIB, 3), (64 * KIB, 0), (SIZE - 128 * KIB, 3)]
            assert answer.extents == (whole[:1] if flags else whole)
        volume.allocation_error = errno.EIO
        raw.sock.sendall(request(EXTENDED, STATUS, 2, 0, SIZE))
        assert raw.answers(1)[0].extents == [(SIZE, 0)]


def test_export_name_for_old_clients(serving: Serving) -> None:
    with serving.connect() as sock:
        assert receive_exactly(sock, 18) == GREETING
        sock.sendall(struct.pack(">I", 1) + option(1, b"r0"))
        assert struct.unpack(">QH124x", receive_exactly(sock, 134))[0] == SIZE
        sock.sendall(request(STRUCTURED, FLUSH, 5))
        assert receive_exactly(sock, 16) == struct.pack(">IIQ", 0x67446698, 0, 5)
    with serving.connect() as sock:
        sock.sendall(struct.pack(">I", 3) + option(1, b"nope"))
        assert receive_all(sock) == GREETING


def test_a_client_that_sends_everything_and_shuts_its_side_gets_every_answer(serving: Serving) -> None:
    with serving.client() as raw:
        writes = [request(STRUCTURED, WRITE, n, n * 4096, payload=bytes(4096)) for n in range(100)]
        raw.sock.sendall(b"".join(writes))
        raw.sock.shutdown(socket.SHUT_WR)
        answers = raw.reader.feed(receive_all(raw.sock))
        assert sorted(a.cookie for a in answers) == list(range(100))


def test_the_end_waits_until_the_last_answers_are_taken(serving: Serving, volume: RamVolume) -> None:
    with serving.client() as raw:
        raw.reader.reads = {n: (n * MIB, MIB) for n in range(16)}
        reads = [request(STRUCTURED, READ, n, n * MIB, MIB) for n in range(16)]
        raw.sock.sendall(b"".join(reads) + request(STRUCTURED, DISC, 99))
        while serving.call(lambda: len(volume.seen)) < 5:
            pass
        answers = raw.reader.feed(receive_all(raw.sock))
        assert sorted(a.cookie for a in answers) == list(range(16))


def test_a_client_that_says_goodbye_and_never_takes_its_answers(
    serving: Serving, volume: RamVolume, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tandem.nbd.server.LINGER_S", 0.05)
    with serving.client() as raw:
        raw.sock.sendall(request(STRUCTURED, READ, 1, 0, 16 * MIB) + request(STRUCTURED, DISC, 2))
        serving.all_gone()
        assert volume.n_open == 0


def test_a_block_status_that_breaks_is_shown(serving: Serving, volume: RamVolume) -> None:
    """Our own mistakes are not swallowed by the one task there is."""
    shown: list[str] = []
    serving.call(lambda: serving.loop.set_exception_handler(lambda _, about: shown.append(about["message"])))
    volume.broken = True
    with Raw(serving.connect(), STRUCTURED, "", option(10, context_data("", "base:allocation"))) as raw:
        raw.sock.sendall(request(STRUCTURED, STATUS, 1, 0, 4096))
        while not serving.call(lambda: list(shown)):
            pass
        assert shown == ["block status failed"]
    volume.broken = False
    serving.call(lambda: volume_forgets(serving))


def volume_forgets(serving: Serving) -> None:
    """Let the session go whose request was lost to the mistake."""
    for session in list(serving.server.sessions):
        assert session._transmission is not None
        session._transmission.n_open = 0
        session.abort("the test is over")


def test_errors_carry_a_sentence(serving: Serving, volume: RamVolume) -> None:
    volume.errors = {Op.FLUSH: errno.EIO}
    with serving.client() as raw:
        raw.sock.sendall(request(STRUCTURED, FLUSH, 1))
        (answer,) = raw.answers(1)
        assert (answer.error, answer.text) == (EIO, "No disk of the mirror could carry out the request.")


@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[str]:
    """The path of another server's socket, with SIZE bytes of memory behind it."""
    path, pidfile = tmp_path / "nbdkit.sock", tmp_path / "nbdkit.pid"
    run("nbdkit", "-U", str(path), "-P", str(pidfile), "memory", str(SIZE))  # returns when it listens
    yield str(path)
    os.kill(int(pidfile.read_text()), signal.SIGTERM)


def test_the_same_stream_to_nbdkit(serving: Serving, nbdkit: str) -> None:
    """Where both follow the document, both give the same errors and the same data for the same bytes."""
    draw = random.Random(6)
    stream, reads = [], {}
    for cookie in range(1, 500):
        command = draw.choice((READ, READ, WRITE, WRITE, FLUSH, TRIM, ZEROES, 9, 77))
        offset = draw.randrange(1000) * 512
        length = draw.choice((512, 4096, 60 * KIB))
        flags = draw.choice((0, 0, 0, 1, 2, 8, 64))
        if not flags:  # of two reasons to refuse a request, either may be named
            offset = draw.choice((offset, SIZE - 512, SIZE + 4096))
        if command == FLUSH:
            offset = length = 0
        if command == READ:
            reads[cookie] = (offset, length)
        payload = draw.randbytes(length) if command == WRITE else None
        stream.append(request(STRUCTURED, command, cookie, offset, length, flags, payload))
    heard = []
    for path in (serving.path, nbdkit):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(path)
            raw = Raw(sock, STRUCTURED)
            raw.reader.reads, raw.reader.ours = reads, path == serving.path
            answers = []
            for packed in stream:  # one after the other, because requests in flight together have no order
                sock.sendall(packed)
                answers += raw.answers(1)
            heard.append([(a.cookie, a.error, a.data) for a in answers])
    assert heard[0] == heard[1]


# ------------------------------------------------------------------------------------ the owner's side


def test_disconnect_export_answers_what_was_asked(tmp_path: Path) -> None:
    mine, other = RamVolume(SIZE, "r0"), RamVolume(SIZE, "r1", number=1)
    with (
        Serving(tmp_path, mine, other) as serving,
        serving.client(name="r0") as raw,
        serving.client(name="r1") as bystander,
    ):
        mine.holding = True
        raw.sock.sendall(request(STRUCTURED, WRITE, 1, 0, payload=bytes(4096)))
        while not serving.call(lambda: mine.n_inside):
            pass
        ended = asyncio.run_coroutine_threadsafe(serving.server.disconnect_export("r0"), serving.loop)
        assert serving.call(lambda: serving.server.n_clients("r0")) == 1, "it waits for the volume"
        serving.call(mine.release)
        assert ended.result(PATIENCE_S)
        assert [a.cookie for a in raw.answers(1)] == [1]
        assert receive_all(raw.sock) == b""
        assert (mine.n_open, other.n_open) == (0, 1)
        bystander.sock.sendall(request(STRUCTURED, FLUSH, 2))
        assert bystander.answers(1)[0].error == 0


def test_disconnect_export_does_not_wait_for_ever(serving: Serving, volume: RamVolume) -> None:
    with serving.client() as raw:
        volume.holding = True
        raw.sock.sendall(request(STRUCTURED, WRITE, 1, 0, payload=bytes(4096)))
        while not serving.call(lambda: volume.n_inside):
            pass
        assert serving.wait(serving.server.disconnect_export("r0", drain_s=0.01)) is False
        assert receive_all(raw.sock) == b""
        assert volume.n_open == 1, "the machine still has a request of it"
        serving.call(volume.release)
        serving.all_gone()
        assert volume.n_open == 0


def test_a_volume_that_grows(serving: Serving, volume: RamVolume) -> None:
    with serving.client() as raw:
        raw.reader.reads = {1: (SIZE - 512, 512), 2: (SIZE - 512, 512)}

        def size(n: int) -> None:
            volume.size = n

        serving.call(lambda: size(SIZE - 512))
        raw.sock.sendall(request(STRUCTURED, READ, 1, SIZE - 512, 512))
        assert raw.answers(1)[0].error == errno.EINVAL
        serving.call(lambda: size(SIZE))
        raw.sock.sendall(request(STRUCTURED, READ, 2, SIZE - 512, 512))
        assert raw.answers(1)[0].error == 0


def test_read_only_listener(tmp_path: Path, serving: Serving, volume: RamVolume) -> None:
    path = str(tmp_path / "ro.sock")
    serving.wait(serving.server.start(unix=path, read_only=True))
    (export,) = json.loads(run("nbdinfo", "--json", f"nbd+unix:///?socket={path}"))["exports"]
    assert export["is_read_only"] is True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        raw = Raw(sock, STRUCTURED)
        sock.sendall(request(STRUCTURED, WRITE, 1, 0, payload=bytes(512)))
        assert raw.answers(1)[0].error == errno.EPERM
        assert (volume.n_open, volume.n_open_writable) == (1, 0)


def test_tcp_and_unix_at_once(serving: Serving) -> None:
    (address,) = serving.wait(serving.server.start(tcp=("127.0.0.1", 0)))
    assert isinstance(address, tuple)
    host, port = address
    uris = serving.call(lambda: serving.server.uris("r0"))
    assert uris == [f"nbd+unix:///r0?socket={serving.path}", f"nbd://127.0.0.1:{port}/r0"]
    for uri in uris:
        assert run("nbdinfo", "--size", uri).strip() == str(SIZE)
    with socket.create_connection((host, port), PATIENCE_S) as sock:
        assert receive_exactly(sock, 18) == GREETING
    serving.all_gone()
    assert any(line.startswith("127.0.0.1 port ") for line in serving.log)


def refusal(**where: object) -> str:
    """The sentence with which a server refuses to listen."""

    async def attempt() -> str:
        server = Server({})
        try:
            await server.start(**where)  # type: ignore[arg-type]
        except ServerError as error:
            return str(error)
        finally:
            await server.stop()
        raise AssertionError("it listens")

    return uvloop.run(attempt())


def test_where_it_cannot_listen(tmp_path: Path, serving: Serving) -> None:
    (tmp_path / "file").touch()
    long = str(tmp_path / ("x" * 108))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert refusal(tcp=("127.0.0.1", port)) == (
            f"Cannot listen on port {port} of 127.0.0.1: another program is listening there; "
            "choose another port or stop it."
        )
    assert refusal(tcp=("192.0.2.1", 10809)) == (
        "Cannot listen on port 10809 of 192.0.2.1: this machine has no such address."
    )
    assert "the host name is not known" in refusal(tcp=("no.such.host.invalid", 10809))
    assert "ports go from 0 to 65535" in refusal(tcp=("127.0.0.1", 70000))
    assert refusal(unix=long).endswith(f"may have 107 bytes, this one has {len(long)}.")
    assert "is not a socket; remove or rename it" in refusal(unix=str(tmp_path / "file"))
    assert "another program is listening there; stop it first" in refusal(unix=serving.path)
    assert "No such file or directory" in refusal(unix=str(tmp_path / "none" / "s"))


def test_a_stale_socket_is_replaced_and_ours_removed(tmp_path: Path, volume: RamVolume) -> None:
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with Serving(tmp_path, volume) as serving:
        still_serves(serving)
        assert path.exists()
    assert not path.exists()


def test_a_failed_start_listens_on_nothing(tmp_path: Path, serving: Serving) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "file").touch()
    with pytest.raises(ServerError):
        serving.wait(serving.server.start(tcp=("127.0.0.1", port), unix=str(tmp_path / "file")))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), PATIENCE_S)
