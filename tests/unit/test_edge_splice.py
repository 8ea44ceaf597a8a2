"""Long writes of the peer, spliced from a real TCP socket to a real file, however the stream is cut."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tandem.repl.edge import disk as disk_room
from tandem.repl.edge.blockio import Device
from tandem.repl.edge.disk import Disk, OpenVolume
from tandem.repl.edge.splice import Pipe, Splice, Splicer
from tandem.repl.edge.stream import Receiver
from tandem.repl.requests import DiskOp, Op, PeerEpoch, PeerWrite
from tandem.repl.wire import DP_SEND_WRITE_ACK, HEADER, Packet, pack_barrier, pack_data, parse_header

PAGE = 4096
LENGTH = 256 << 10
OLD = b"o"


def peer_write(offset: int, length: int) -> PeerWrite:
    return PeerWrite(Op.WRITE, 0, offset >> 9, length, None, 0, 1, DP_SEND_WRITE_ACK, PeerEpoch())


@dataclass
class Bench:
    """Two ends of a TCP connection, a pipe, and a file that is full of OLD."""

    ours: socket.socket
    theirs: socket.socket
    path: Path
    pipe: Pipe = field(default_factory=Pipe)
    done: list[Splice] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    def volume(self, flags: int = os.O_RDWR) -> OpenVolume:
        self.opened.append(os.open(self.path, flags))
        device = Device(self.opened[-1])
        return OpenVolume(device, device, lambda: None)

    def splice(self, w: PeerWrite, begun: bytes = b"", volume: OpenVolume | None = None) -> Splice:
        splice = Splice(self.ours, self.pipe, volume or self.volume(), w, self.done.append)
        splice.begin(memoryview(begun))
        return splice

    def send(self, data: bytes) -> None:
        """On the wire, and at the other end."""
        self.theirs.sendall(data)
        have = 0
        while have < len(data):
            have = len(self.ours.recv(len(data), socket.MSG_PEEK | socket.MSG_WAITALL))

    def content(self, offset: int, length: int) -> bytes:
        return self.path.read_bytes()[offset : offset + length]

    @property
    def pipe_is_empty(self) -> bool:
        try:
            return not os.read(self.pipe.out, 1)
        except BlockingIOError:
            return True


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
    ours.setblocking(False)
    theirs.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    path = tmp_path / "backing"
    path.write_bytes(OLD * (1 << 20))
    found = Bench(ours, theirs, path)
    yield found
    for fd in found.opened:
        os.close(fd)
    found.pipe.close()
    ours.close()
    theirs.close()


def wait(sock: socket.socket) -> None:
    """Until there is something to receive."""
    sock.settimeout(20)
    sock.recv(1, socket.MSG_PEEK)
    sock.setblocking(False)


# ---------------------------------------------------------------------------------------------- one write


@pytest.mark.parametrize("seed", range(12))
def test_however_it_is_cut_the_file_has_all_of_it_and_nothing_else(bench: Bench, seed: int) -> None:
    rng = random.Random(seed)
    offset, length = rng.randrange(0, 512) << 9, LENGTH - (rng.randrange(0, 200) << 9)
    data, at = rng.randbytes(length), rng.choice([0, 1, 100, PAGE, rng.randrange(length)])
    splice = bench.splice(peer_write(offset, length), data[:at])
    while at < length:
        n = rng.choice([1, 511, PAGE, rng.randrange(1, length)])
        bench.theirs.sendall(data[at : at + n])
        at = min(at + n, length)
        while splice.rest > length - at:
            wait(bench.ours)
            assert splice.receive() > 0
    assert bench.done == [splice] and not splice.w.error and bench.pipe_is_empty
    assert bench.content(offset, length) == data
    assert bench.content(0, offset) == OLD * offset
    assert set(bench.content(offset + length, 1 << 20)) == set(OLD)


@pytest.mark.parametrize("offset", [0, 512, 3584])
def test_what_has_arrived_is_on_the_disk_up_to_the_end_of_a_page_and_no_further(bench: Bench, offset: int) -> None:
    """A page of the page cache is written as a whole, and a sector is never torn."""
    data = os.urandom(LENGTH)

    def there(n: int) -> bool:
        whole = (offset + n) // PAGE * PAGE - offset
        return bench.content(offset, LENGTH) == data[:whole] + OLD * (LENGTH - whole)

    splice = bench.splice(peer_write(offset, LENGTH), data[:5000])
    assert there(5000)
    bench.send(data[5000:100_000])
    assert splice.receive() == 95_000 and splice.rest == LENGTH - 100_000
    assert there(100_000) and bench.done == []


def test_nothing_there_is_no_end_and_an_end_is_one(bench: Bench) -> None:
    splice = bench.splice(peer_write(0, LENGTH), b"n" * 100)
    assert splice.receive() == -1
    bench.send(b"n" * 50)
    bench.theirs.close()
    assert splice.receive() == 50
    wait(bench.ours)
    assert splice.receive() == 0 and bench.done == []


def test_a_connection_that_is_reset_says_so(bench: Bench) -> None:
    splice = bench.splice(peer_write(0, LENGTH))
    bench.theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    bench.theirs.close()
    with pytest.raises(ConnectionResetError):
        wait(bench.ours)
        splice.receive()


def test_a_pipe_that_is_full_of_little_goes_on(bench: Bench) -> None:
    """It has room for a number of pieces, not of bytes, and less than a page is not written yet."""
    fcntl.fcntl(bench.pipe.into, fcntl.F_SETPIPE_SZ, 2 * PAGE)  # two pieces
    data = os.urandom(LENGTH)
    splice = bench.splice(peer_write(0, LENGTH), data[:10])
    for at in range(10, 100, 10):
        bench.send(data[at : at + 10])
        while splice.rest > LENGTH - at - 10:
            assert splice.receive() > 0, "nothing was taken, and the socket stays readable for ever"
    bench.theirs.sendall(data[100:])
    while splice.rest:
        wait(bench.ours)
        assert splice.receive() > 0
    assert bench.content(0, LENGTH) == data


@pytest.mark.parametrize("begun", [100, PAGE])
def test_a_disk_that_fails_is_told_at_once_and_the_stream_goes_on_behind_the_write(bench: Bench, begun: int) -> None:
    splice = bench.splice(peer_write(0, LENGTH), b"n" * begun, bench.volume(os.O_RDONLY))
    assert bool(bench.done) is (begun == PAGE)
    bench.theirs.sendall(b"n" * (LENGTH - begun) + b"next")
    while splice.rest:
        wait(bench.ours)
        assert splice.receive() > 0
    assert bench.done == [splice] and splice.w.error == errno.EBADF and bench.pipe_is_empty
    assert bench.ours.recv(100) == b"next"
    assert set(bench.content(0, 1 << 20)) == set(OLD)


def test_a_file_that_cannot_be_spliced_to_is_written_and_not_spliced_to_again(bench: Bench) -> None:
    bench.path.write_bytes(b"")
    volume = bench.volume(os.O_RDWR | os.O_APPEND)  # splice(2) refuses it; what comes in order is in its place
    data = os.urandom(LENGTH)
    splice = bench.splice(peer_write(0, LENGTH), data[:5000], volume)
    bench.theirs.sendall(data[5000:])
    while splice.rest:
        wait(bench.ours)
        splice.receive()
    assert bench.path.read_bytes() == data and not splice.w.error and not volume.data.splices


def test_a_write_that_keeps_the_loop_waiting_sends_the_device_to_the_workers(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_room, "SLOW_S", -1.0)
    for flags in (os.O_RDWR, os.O_RDONLY):  # and one that fails after that
        volume = bench.volume(flags)
        bench.splice(peer_write(0, LENGTH), b"n" * PAGE, volume)
        assert volume.data.watched_until > 0


def test_a_user_who_has_too_much_in_pipes_gets_none_that_is_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux gives such a user pipes of two pieces, or of one, which may stand still with less than a page in it."""
    asked = fcntl.fcntl

    def refuse(fd: int, what: int, *value: int) -> int:
        if what == fcntl.F_SETPIPE_SZ:
            asked(fd, fcntl.F_SETPIPE_SZ, 2 * PAGE)
            raise PermissionError(errno.EPERM, "Operation not permitted")
        return asked(fd, what, *value)

    n_open = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="pipes"):
        Pipe()
    assert len(os.listdir("/proc/self/fd")) == n_open


# ------------------------------------------------------------------------------------------------ one link


class Machine:
    """What a link needs of the engine: it takes every P_DATA that is long enough."""

    def __init__(self) -> None:
        self.begun: list[PeerWrite] = []
        self.ended: list[DiskOp] = []
        self.seen: list[tuple[int, int]] = []  # packets that came as such: command, length

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None:
        _, cmd, length = parse_header(view)
        if cmd != Packet.DATA or length < LENGTH or not takes(0):
            return None
        self.begun.append(peer_write(0, length - 24))
        return self.begun[-1]

    def disk_done(self, ops: list[DiskOp]) -> None:
        self.ended += ops

    def consume(self, view: memoryview) -> int:
        at = 0
        while len(view) - at >= HEADER:
            _, cmd, length = parse_header(view, at)
            if len(view) - at - HEADER < length:
                break
            self.seen.append((cmd, length))
            at += HEADER + length
        return at

    def need(self, rest: memoryview) -> int:
        return HEADER + parse_header(rest)[2] if len(rest) >= HEADER else HEADER


async def link(bench: Bench, disk: Disk, machine: Machine) -> tuple[Splicer, Receiver]:
    def guard(call: Callable[..., object], *arguments: object) -> None:
        call(*arguments)

    splicer = Splicer(asyncio.get_running_loop(), bench.ours, machine, disk, guard)
    return splicer, Receiver(bench.ours, machine.consume, machine.need, begin=splicer.begin)


def fails(error: BaseException) -> None:
    raise error


async def halfway(bench: Bench) -> tuple[Disk, Machine, OpenVolume, Splicer, Receiver]:
    """A link in the middle of a long write: 10,000 bytes of it have come."""
    disk, machine = Disk(asyncio.get_running_loop(), lambda ops: None, fails), Machine()
    volume = bench.volume()
    disk.add(0, volume)
    splicer, receiver = await link(bench, disk, machine)
    bench.send(pack_data(Packet.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, LENGTH) + b"n" * 10_000)
    while receiver.receive() > 0:
        pass
    return disk, machine, volume, splicer, receiver


def test_long_writes_and_other_packets_follow_each_other_in_any_pieces(bench: Bench) -> None:
    rng = random.Random(5)
    data = rng.randbytes(LENGTH)
    long, short = pack_data(Packet.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, LENGTH) + data, pack_barrier(1)
    stream = long + short + long + long + short + short + long

    async def test() -> None:
        disk, machine = Disk(asyncio.get_running_loop(), lambda ops: None, fails), Machine()
        volume = bench.volume()
        disk.add(0, volume)
        splicer, receiver = await link(bench, disk, machine)
        at = 0
        while at < len(stream):
            n = rng.choice([3, 1000, 50_000, len(stream)])
            bench.theirs.sendall(stream[at : at + min(n, 200_000)])
            at += min(n, 200_000)
            bench.ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            wait(bench.ours)
            while receiver.receive() > 0:
                pass
            assert volume.n_inflight == len(machine.begun) - len(machine.ended) <= 1
        assert not receiver.cut
        # One that came with another packet, whole, is none that begins before it is complete.
        assert machine.ended == machine.begun
        assert len(machine.begun) + machine.seen.count((Packet.DATA, LENGTH + 24)) == 4
        assert [cmd for cmd, _ in machine.seen if cmd != Packet.DATA] == [Packet.BARRIER] * 3
        assert len(machine.begun) >= 2 and bench.content(0, LENGTH) == data
        splicer.close()
        disk.stop()

    asyncio.run(test())


def test_a_link_that_ends_lets_go_of_the_disk_at_once_and_tells_the_machine_later(bench: Bench) -> None:
    async def test() -> None:
        disk, machine, volume, splicer, receiver = await halfway(bench)
        assert receiver.cut and volume.n_inflight == 1
        splicer.close()
        assert volume.n_inflight == 0 and machine.ended == [], "who calls has not told the machine yet"
        await asyncio.sleep(0)
        assert machine.ended == machine.begun and not machine.begun[0].error
        assert bench.content(0, LENGTH) == b"n" * 8192 + OLD * (LENGTH - 8192)
        splicer.close()
        disk.stop()

    asyncio.run(test())


def test_a_disk_on_its_way_out_does_not_wait_for_the_rest_of_a_write(bench: Bench) -> None:
    async def test() -> None:
        disk, machine, volume, splicer, receiver = await halfway(bench)
        splicer.end(1)
        assert volume.n_inflight == 1 and machine.ended == []
        splicer.end(0)
        assert volume.n_inflight == 0 and machine.ended == machine.begun and machine.begun[0].error == errno.EIO
        machine.begun[0].error = 0  # it is the machine's again, whatever that makes of it
        disk.remove(0)
        bench.theirs.sendall(b"n" * (LENGTH - 10_000) + pack_barrier(1))
        while not machine.seen:
            wait(bench.ours)
            receiver.receive()
        assert [cmd for cmd, _ in machine.seen] == [Packet.BARRIER] and not receiver.cut
        assert bench.content(0, LENGTH) == b"n" * 8192 + OLD * (LENGTH - 8192)
        splicer.end(0)
        splicer.close()
        await asyncio.sleep(0)
        assert len(machine.ended) == 1 and volume.n_inflight == 0
        disk.stop()

    asyncio.run(test())


def test_a_disk_that_belongs_to_the_workers_gets_its_long_writes_by_them(bench: Bench) -> None:
    async def test() -> None:
        disk, machine = Disk(asyncio.get_running_loop(), lambda ops: None, fails), Machine()
        volume = bench.volume()
        disk.add(0, volume)
        assert disk.splices(0) and not disk.splices(1)
        volume.data.inline_again = float("inf")
        splicer, receiver = await link(bench, disk, machine)
        bench.theirs.sendall(pack_data(Packet.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, LENGTH) + bytes(LENGTH))
        while not machine.seen:
            wait(bench.ours)
            receiver.receive()
        assert machine.begun == [] and machine.seen == [(Packet.DATA, LENGTH + 24)]
        volume.data.inline_again, volume.data.splices = 0.0, False
        assert not disk.splices(0)
        splicer.close()
        disk.stop()

    asyncio.run(test())


def test_without_another_descriptor_it_comes_as_any_other_packet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(flags: int) -> tuple[int, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    async def test() -> None:
        disk, machine = Disk(asyncio.get_running_loop(), lambda ops: None, fails), Machine()
        disk.add(0, bench.volume())
        splicer, _ = await link(bench, disk, machine)
        monkeypatch.setattr(os, "pipe2", none)
        head = pack_data(Packet.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, LENGTH)
        assert splicer.begin(memoryview(head)) is None and machine.begun == []
        disk.stop()

    asyncio.run(test())
