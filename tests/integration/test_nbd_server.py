"""nbd/server with the clients people use: libnbd, qemu, fio, nbd-client; and with those they should not."""

from __future__ import annotations

import asyncio
import errno
import filecmp
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from tandem.nbd.listener import EXHAUSTED_S, Listener
from tandem.nbd.server import Server, ServerError
from tandem.nbd.transmission import INFLIGHT_BYTES_MAX
from tandem.repl.edge.stream import BACKLOG_HIGH
from tandem.repl.requests import Op

from tests.nbd_serving import PATIENCE_S, Raw, Serving, receive_all, receive_exactly
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
    info_data,
    option,
    request,
)

KIB, MIB = 1 << 10, 1 << 20
SIZE = 64 * MIB
ROOT = Path(__file__).parents[2]


@pytest.fixture
def volume() -> RamVolume:
    return RamVolume(SIZE)


@pytest.fixture
def serving(tmp_path: Path, volume: RamVolume) -> Iterator[Serving]:
    with Serving(tmp_path, volume) as running:
        yield running


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S * 2, cwd=cwd)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def libnbd(serving: Serving, script: str) -> str:
    """Run *script* with ``h``, an unconnected libnbd handle, and ``uri``, in the system's Python."""
    start = f"import nbd, os, random\nuri = {serving.uri!r}\nh = nbd.NBD()\n"
    return run("/usr/bin/python3", "-c", start + textwrap.dedent(script), cwd=Path(serving.path).parent)


# ------------------------------------------------------------------------------------ libnbd


def test_nbdinfo(serving: Serving) -> None:
    (export,) = json.loads(run("nbdinfo", "--json", serving.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["description"] == "Primary, UpToDate"
    assert export["contexts"] == ["base:allocation"]
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [512, 4096, 32 * MIB]
    can = {key for key, value in export.items() if value is True}
    assert can == {"can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim",
                   "can_zero"}  # fmt: skip


def test_lists_of_exports(tmp_path: Path) -> None:
    first, second = RamVolume(SIZE, "r0/0"), RamVolume(2 * SIZE, "r0/1", number=1)
    second.description = "Primary, Inconsistent"
    with Serving(tmp_path, first, second) as serving:
        listed = json.loads(run("nbdinfo", "--list", "--json", serving.uri))["exports"]
        assert [(e["export-name"], e["export-size"], e["description"]) for e in listed] == [
            ("r0/0", SIZE, "Primary, UpToDate"), ("r0/1", 2 * SIZE, "Primary, Inconsistent"),
        ]  # fmt: skip
        names = run("nbd-client", "-l", "-u", serving.path)
        assert "r0/0" in names and "r0/1" in names
        assert run("nbdinfo", "--size", serving.uri.replace("///", "///r0/1")).strip() == str(2 * SIZE)
        assert run("nbdinfo", "--size", serving.uri).strip() == str(SIZE), "the first is the default"


def test_libnbd_haggling_out_of_order(serving: Serving) -> None:
    """Each option twice, in odd orders, with refusals between."""
    out = libnbd(serving, """
        h.set_opt_mode(True)
        h.connect_uri(uri)
        assert h.get_protocol() == "newstyle-fixed"
        names = []
        for _ in range(2):
            h.opt_list(lambda name, text: names.append(name))
        assert names == ["r0", "r0"], names
        def refused(call):
            try:
                call()
            except nbd.Error as error:
                return error.string
            raise AssertionError("was not refused")
        h.set_debug(True)
        h.set_debug_callback(lambda context, text: print(text))
        h.set_export_name("nope")
        for _ in range(2):
            refused(h.opt_info)
        refused(h.opt_go)
        h.set_export_name("r0")
        contexts = []
        for _ in range(2):
            h.opt_list_meta_context(lambda name: contexts.append(name))
            h.opt_info()
        assert contexts == ["base:allocation"] * 2, contexts
        h.add_meta_context("x-unknown:thing")
        h.add_meta_context("base:allocation")
        h.opt_go()
        assert h.can_meta_context("base:allocation") and not h.can_meta_context("x-unknown:thing")
        h.pread(512, 0)
        h.shutdown()
        a = nbd.NBD()
        a.set_opt_mode(True)
        a.connect_uri(uri)
        a.opt_abort()
    """)  # fmt: skip
    assert "There is no export 'nope' here; there is: r0." in out


@pytest.mark.parametrize("structured", [True, False])
def test_libnbd_commands(serving: Serving, volume: RamVolume, structured: bool) -> None:
    libnbd(serving, f"""
        structured = {structured}
        h.set_request_structured_replies(structured)
        h.add_meta_context("base:allocation")
        h.connect_uri(uri)
        data = random.Random(1).randbytes(256 << 10)
        h.pwrite(data, 0)
        h.pwrite(data[:4096], 1 << 20, nbd.CMD_FLAG_FUA)
        assert h.pread(256 << 10, 0) == data
        h.flush()
        h.zero(64 << 10, 0)
        h.zero(64 << 10, 64 << 10, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        h.trim(64 << 10, 128 << 10)
        assert h.pread(256 << 10, 0) == bytes(192 << 10) + data[192 << 10:]
        if structured:
            df = h.pread_structured(64 << 10, 0, lambda *chunk: None, nbd.CMD_FLAG_DF)
            assert df == bytes(64 << 10)
            seen = []
            h.block_status(256 << 10, 0, lambda c, o, e, err: seen.append(list(e)))
            assert seen == [[65536, 3, 65536, 0, 65536, 3, 65536, 0]], seen
        h.set_strict_mode(0)
        def error(call, *args):
            try:
                call(*args)
            except nbd.Error as e:
                return e.errno
        size = h.get_size()
        assert error(h.pread, 512, size) == "EINVAL"
        assert error(h.pwrite, bytes(512), size) == "ENOSPC"
        assert error(h.zero, 512, size) == "ENOSPC"
        assert error(h.trim, 512, size) == "EINVAL"
        assert error(h.pread, 512, 1) == "EINVAL"
        assert error(h.cache, 512, 0) == "EINVAL"
        assert error(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO) == "ENOTSUP"
        h.pwrite(bytes(32 << 20), 0)
        assert h.pread(32 << 20, 0) == bytes(32 << 20)
        h.zero(size, 0)
        h.shutdown()
    """)  # fmt: skip
    serving.all_gone()
    assert volume.n_open == 0


def test_libnbd_many_in_flight_on_several_connections(serving: Serving) -> None:
    """Up to 64 requests in flight on each of 4 connections, pieces of any size, all of it read back."""
    libnbd(serving, """
        draw = random.Random(3)
        handles = []
        for n in range(4):
            g = nbd.NBD()
            g.connect_uri(uri)
            assert g.can_multi_conn()
            handles.append(g)
        data = draw.randbytes(16 << 20)
        def drain(g, limit):
            while g.aio_in_flight() > limit:
                g.poll(-1)
        at = 0
        while at < len(data):
            length = min(draw.choice((512, 4096, 65536, 3 << 19)), len(data) - at)
            g = draw.choice(handles)
            g.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data[at:at + length])), at,
                         lambda error: 1 if not error.value else 0)
            drain(g, 63)
            at += length
        for g in handles:
            drain(g, 0)
        handles[0].flush()
        at, parts = 0, []
        while at < len(data):
            length = min(draw.choice((512, 4096, 65536, 3 << 19)), len(data) - at)
            buffer = nbd.Buffer(length)
            g = draw.choice(handles)
            g.aio_pread(buffer, at, lambda error: 1 if not error.value else 0)
            parts.append(buffer)
            drain(g, 63)
            at += length
        for g in handles:
            drain(g, 0)
            g.shutdown()
        assert b"".join(bytes(p.to_bytearray()) for p in parts) == data
    """)  # fmt: skip

def test_the_sentence_of_a_refusal_reaches_the_client(serving: Serving, volume: RamVolume) -> None:
    volume.refusal = "r0 is Secondary on bob: promote it with 'tandemadm primary r0'."
    url = f"nbd+unix:///r0?socket={serving.path}"
    for command in (["qemu-img", "info", url], ["nbdinfo", serving.uri]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode != 0
        assert "Traceback" not in done.stderr
        assert command[0] == "nbdinfo" or volume.refusal in done.stderr
    volume.refusal = None
    assert run("nbdinfo", "--size", serving.uri).strip() == str(SIZE)


# ------------------------------------------------------------------------------------ copies


def sparse_file(path: Path) -> None:
    draw = random.Random(4)
    with path.open("wb") as out:
        out.truncate(SIZE)
        for _ in range(20):
            out.seek(draw.randrange(SIZE // 4096 - 300) * 4096)
            out.write(draw.randbytes(draw.choice((4096, 100 * KIB, MIB))))


@pytest.mark.parametrize("tool", ["nbdcopy", "qemu-img"])
def test_copies_in_and_out(tmp_path: Path, serving: Serving, volume: RamVolume, tool: str) -> None:
    source, back = tmp_path / "source", tmp_path / "back"
    sparse_file(source)
    volume.image[:] = b"\xaa" * SIZE
    volume.holes[:] = bytes(len(volume.holes))
    if tool == "nbdcopy":
        run("nbdcopy", "--flush", str(source), serving.uri)
        run("nbdcopy", serving.uri, str(back))
    else:
        url = f"nbd+unix:///r0?socket={serving.path}"
        run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), url)
        run("qemu-img", "convert", "-f", "raw", "-O", "raw", url, str(back))
        assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), url)
    assert filecmp.cmp(source, back, shallow=False)
    assert volume.image == source.read_bytes()
    assert back.stat().st_blocks * 512 < SIZE // 2, "block status told where the holes are"


def test_qemu_io(serving: Serving, volume: RamVolume) -> None:
    url = f"nbd+unix:///r0?socket={serving.path}"
    commands = ["write -P 0x11 0 4M", "write -f -P 0x22 1M 64k", "write -z 2M 64k", "write -z -u 3M 64k",
                "discard 3584k 512k", "flush", "read -P 0x11 0 1M", "read -P 0x22 1M 64k", "read -P 0 2M 64k",
                "read -P 0 3M 64k", "aio_write -P 0x33 8M 2M", "aio_read -P 0x11 512k 512k", "aio_flush",
                "read -P 0x33 8M 2M"]  # fmt: skip
    script = [argument for command in commands for argument in ("-c", command)]
    out = run("qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", *script, url)
    assert "failed" not in out
    assert Op.TRIM in {seen[0] for seen in volume.seen}
    mapped = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", url))
    assert sum(part["length"] for part in mapped) == SIZE
    assert mapped[0]["data"] is True


def test_fio_verifies_what_it_wrote(tmp_path: Path, serving: Serving) -> None:
    run("fio", "--name=verify", "--ioengine=nbd", f"--uri={serving.uri}", "--rw=randrw", "--bsrange=512-3M",
        "--bs_unaligned=0", "--blockalign=512", "--iodepth=16", "--size=32M", "--verify=crc32c",
        "--verify_fatal=1", "--randseed=7", "--fsync=32", cwd=tmp_path)  # fmt: skip


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


# ------------------------------------------------------------------------------------ bad company


def still_serves(serving: Serving) -> None:
    with serving.client() as raw:
        raw.sock.sendall(request(STRUCTURED, FLUSH, 1))
        assert raw.answers(1)[0].error == 0


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

        assert serving.call(held) <= BACKLOG_HIGH + INFLIGHT_BYTES_MAX + MIB
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
            assert max(backlogs) <= BACKLOG_HIGH + INFLIGHT_BYTES_MAX + MIB
        assert len(volume.seen) < 400


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
