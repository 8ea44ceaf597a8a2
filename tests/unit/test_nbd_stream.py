"""repl/edge/stream: framing over a real socket pair, for every way in which packets can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import random
import select
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import uvloop
from tandem.repl.edge.stream import IOV_MAX, OWN_BUFFER_MIN, WAKE_BYTES, Receiver, Sender, prepare
from tandem.repl.requests import Buffer

HEADER = struct.Struct(">HI")  # a mark and the length of what follows


class Framed:
    """Consumes packets of the form HEADER, payload, and keeps the payloads as they were handed over."""

    def __init__(self) -> None:
        self.payloads: list[memoryview] = []
        self.batches: list[int] = []

    def consume(self, view: memoryview) -> int:
        at, before = 0, len(self.payloads)
        while len(view) - at >= HEADER.size:
            mark, length = HEADER.unpack_from(view, at)
            assert mark == 0xBEEF
            if len(view) - at < HEADER.size + length:
                break
            self.payloads.append(view[at + HEADER.size : at + HEADER.size + length])
            at += HEADER.size + length
        self.batches.append(len(self.payloads) - before)
        return at

    def need(self, rest: memoryview) -> int:
        if len(rest) < HEADER.size:
            return HEADER.size
        return HEADER.size + int(HEADER.unpack_from(rest)[1])


def framed(payloads: list[bytes]) -> bytes:
    return b"".join(HEADER.pack(0xBEEF, len(p)) + p for p in payloads)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    prepare(b)
    with a, b:
        yield a, b


def test_one_recv_brings_the_whole_batch(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    payloads = [bytes([n]) * 100 for n in range(32)]
    ours.sendall(framed(payloads))
    assert receiver.receive() == len(framed(payloads))
    assert sink.batches == [32]
    assert sink.payloads == payloads
    slab = sink.payloads[0].obj
    assert all(p.obj is slab for p in sink.payloads), "payloads are slices of what was received"
    assert not receiver.cut


def test_a_cut_packet_makes_one_batch_with_what_follows(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    payloads = [bytes([n]) * 100 for n in range(32)]
    stream = framed(payloads)
    before = 10 * 106 + 50
    ours.sendall(stream[:before])
    assert receiver.receive() == before
    assert receiver.cut
    ours.sendall(stream[before : before + 20])  # of the same packet, and still not its end
    assert receiver.receive() == 20
    ours.sendall(stream[before + 20 :])
    assert receiver.receive() == len(stream) - before - 20
    assert sink.batches == [10, 22]
    assert sink.payloads == payloads
    assert not receiver.cut


def test_nothing_there_and_end_of_stream(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    assert receiver.receive() == -1
    ours.sendall(HEADER.pack(0xBEEF, 8) + b"half")
    assert receiver.receive() == HEADER.size + 4
    assert receiver.cut
    ours.close()
    assert receiver.receive() == 0
    assert sink.payloads == []


def test_each_byte_alone(pair: tuple[socket.socket, socket.socket]) -> None:
    _, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    payloads = [b"", b"a", b"", b"sentence", b"x" * 40]
    for byte in framed(payloads):
        receiver.feed(memoryview(bytes([byte])))
    assert sink.payloads == payloads
    assert not receiver.cut


def test_a_long_packet_is_received_in_its_own_buffer(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    long = random.Random(1).randbytes(OWN_BUFFER_MIN * 20)
    stream = framed([b"before", long, b"after"])
    sent = 0
    ours.setblocking(False)
    while sent < len(stream) or receiver.cut:
        if sent < len(stream):
            sent += ours.send(stream[sent : sent + 50_000])
        receiver.receive()
    while receiver.receive() > 0:
        pass
    assert sink.payloads == [b"before", long, b"after"]
    assert len(sink.payloads[1].obj) == HEADER.size + len(long)  # type: ignore[arg-type]


def test_a_run_of_long_packets_takes_one_receive_each(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    payloads = [bytes([n]) * (OWN_BUFFER_MIN * 4) for n in range(5)]
    packets = [framed([payload]) for payload in payloads]
    for packet in packets[:2]:
        ours.sendall(packet)
        while receiver.receive() > 0:
            pass
    assert sink.payloads == payloads[:2]
    ours.sendall(packets[2])
    assert receiver.receive() == len(packets[2])
    ours.sendall(packets[3][:50_000])
    assert receiver.receive() == 50_000 and receiver.cut
    ours.sendall(packets[3][50_000:])
    assert receiver.receive() == len(packets[3]) - 50_000
    ours.sendall(packets[4])
    assert receiver.receive() == len(packets[4]), "the one before was like the others"
    assert sink.payloads == payloads
    assert all(len(p.obj) == len(packets[0]) for p in sink.payloads), "none was copied"  # type: ignore[arg-type]
    ours.close()
    assert not receiver.receive() and not receiver.cut


@pytest.fixture
def tcp_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = socket.create_connection(listener.getsockname())
        b, _ = listener.accept()
    prepare(b)
    with a, b:
        yield a, b


def is_readable(sock: socket.socket, wait_s: float = 0.0) -> bool:
    return bool(select.select([sock], [], [], wait_s)[0])


@pytest.mark.parametrize("n_before", [0, 3])
def test_a_long_packet_wakes_nobody_for_each_segment(
    n_before: int, tcp_pair: tuple[socket.socket, socket.socket]
) -> None:
    """Only a long piece of it, its end, and the end of the stream do; and then the next short one as usual. After
    *n_before* others of its length it is received where it is to stay from its first byte on."""
    ours, theirs = tcp_pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    long = random.Random(2).randbytes(WAKE_BYTES * 2 - 1000)
    sender = threading.Thread(target=ours.sendall, args=(framed([long] * n_before),))
    sender.start()
    while len(sink.payloads) < n_before:
        assert is_readable(theirs, 10)
        receiver.receive()
    sender.join()
    sink.payloads.clear()
    stream = framed([long, b"short"])
    at = 0
    for step in (20_000,) if n_before else (20_000, 1000):  # the header, and where the buffer of its own begins
        ours.sendall(stream[at : at + step])
        at += step
        assert is_readable(theirs, 10)
        receiver.receive()
    assert receiver.cut
    ours.sendall(stream[at : at + 50_000])
    assert not is_readable(theirs)
    ours.setblocking(False)
    at += 50_000
    end = HEADER.size + len(long)
    while receiver.cut:
        at += ours.send(stream[at:end]) if at < end else 0
        assert is_readable(theirs, 10)
        receiver.receive()
    assert sink.payloads == [long]
    ours.sendall(stream[end:])
    assert is_readable(theirs, 10)
    receiver.receive()
    assert sink.payloads == [long, b"short"]


def test_the_end_of_the_stream_is_seen_within_a_long_packet(tcp_pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = tcp_pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    for part in (framed([bytes(WAKE_BYTES)])[:20_000], b"x" * 1000):
        ours.sendall(part)
        assert is_readable(theirs, 10)
        receiver.receive()
    assert not is_readable(theirs)
    ours.close()
    assert is_readable(theirs, 10) and not receiver.receive()


@pytest.mark.parametrize("seed", range(20))
def test_any_packets_in_any_cuts(seed: int) -> None:
    """Random packets, small and long, fed in random pieces: the same payloads come out, in order."""
    draw = random.Random(seed)
    sizes = [draw.choice((0, 1, 16, 512, 4096, OWN_BUFFER_MIN - 1, OWN_BUFFER_MIN * 3)) for _ in range(60)]
    payloads = [draw.randbytes(size) for size in sizes]
    stream = memoryview(framed(payloads))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = Framed()
        receiver = Receiver(theirs, sink.consume, sink.need)
        at = 0
        while at < len(stream):
            step = draw.choice((1, 3, 7, 100, 5000, 70_000, 300_000))
            receiver.feed(stream[at : at + step])
            at += step
        assert sink.payloads == payloads
        assert not receiver.cut


@pytest.mark.parametrize("seed", range(20))
def test_any_runs_of_packets_over_a_socket(seed: int, pair: tuple[socket.socket, socket.socket]) -> None:
    """Packets that are as long as was to be expected, and others, sent in random pieces."""
    draw = random.Random(seed)
    sizes: list[int] = []
    while len(sizes) < 60:
        sizes += [draw.choice((1, 512, 4096, OWN_BUFFER_MIN, OWN_BUFFER_MIN * 3))] * draw.choice((1, 1, 2, 5, 9))
    payloads = [draw.randbytes(size) for size in sizes]
    stream = memoryview(framed(payloads))
    ours, theirs = pair
    ours.setblocking(False)
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need)
    at = 0
    while at < len(stream) or receiver.cut:
        with contextlib.suppress(BlockingIOError):
            at += ours.send(stream[at : at + draw.choice((1, 100, 5000, 70_000, 300_000))])
        for _ in range(draw.choice((1, 1, 3))):
            receiver.receive()
    while receiver.receive() > 0:
        pass
    assert sink.payloads == payloads
    assert not receiver.cut


def test_the_chunk_grows_with_the_load_and_shrinks_again(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    sink = Framed()
    receiver = Receiver(theirs, sink.consume, sink.need, chunk_min=64, chunk_max=256)
    stream = framed([b"0123456789"] * 80)  # 1280 bytes
    ours.sendall(stream)
    got = []
    while (n := receiver.receive()) > 0:
        got.append(n)
    assert got == [64, 128, 256, 256, 256, 256, 64]
    for _ in range(3):
        ours.sendall(framed([b""]))
        assert receiver.receive() == HEADER.size
    ours.sendall(stream)
    assert receiver.receive() == 64


class Watched:
    """A Sender with its callbacks recorded."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, high: int, low: int) -> None:
        self.heard: list[str] = []
        self.lost: list[OSError] = []
        self.low_water = asyncio.Event()
        self.sender = Sender(
            loop, sock, self.lost.append, high=high, low=low,
            on_high=lambda: self.heard.append("high"), on_low=self._low,
        )  # fmt: skip

    def _low(self) -> None:
        self.heard.append("low")
        self.low_water.set()


async def read_exactly(sock: socket.socket, n: int) -> bytes:
    loop, got = asyncio.get_running_loop(), bytearray()
    while len(got) < n:
        data = await loop.sock_recv(sock, n - len(got))
        assert data
        got += data
    return bytes(got)


def test_sender_keeps_order_when_the_socket_is_full() -> None:
    """More buffers than IOV_MAX and more bytes than the socket takes arrive whole and in order."""

    async def scenario() -> None:
        a, b = socket.socketpair()
        prepare(a)
        prepare(b)
        with a, b:
            watched = Watched(asyncio.get_running_loop(), a, high=100_000, low=10_000)
            draw = random.Random(2)
            first: list[Buffer] = [draw.randbytes(draw.choice((0, 1, 16, 4096))) for _ in range(3 * IOV_MAX)]
            second: list[Buffer] = [memoryview(draw.randbytes(3 << 20)), b"end"]
            watched.sender.send(first)
            watched.sender.send(second)
            assert watched.heard == ["high"]
            expected = b"".join([*first, *second])
            assert await read_exactly(b, len(expected)) == expected
            await watched.low_water.wait()
            assert watched.heard == ["high", "low"]
            assert watched.sender.backlog == 0
            watched.sender.send([b"again"])
            assert await read_exactly(b, 5) == b"again"
            assert watched.lost == []

    uvloop.run(scenario())


def test_sender_tells_once_that_the_stream_is_lost() -> None:
    async def scenario() -> None:
        a, b = socket.socketpair()
        prepare(a)
        with a:
            watched = Watched(asyncio.get_running_loop(), a, high=1000, low=10)
            b.close()
            watched.sender.send([b"into the void"])
            watched.sender.send([b"and again"])
            assert len(watched.lost) == 1
            assert isinstance(watched.lost[0], BrokenPipeError)
            assert watched.sender.backlog == 0

    uvloop.run(scenario())
