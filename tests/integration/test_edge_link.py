"""The link edge over real sockets: how two nodes find each other, and how a link ends.

The other side is either a second Link, or a hand-written peer that does what a kernel node does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from tandem.repl.config import Endpoint, NetOptions, ResourceConfig
from tandem.repl.edge.blockio import Device
from tandem.repl.edge.connecting import INITIAL, RETRY_S
from tandem.repl.edge.disk import Disk, OpenVolume
from tandem.repl.edge.link import Link
from tandem.repl.events import Event, LinkFailed, LinkLost, LinkUp
from tandem.repl.requests import DiskOp, Op, PeerEpoch, PeerWrite

NET = NetOptions(ping_timeout=1, socket_check_timeout=1)  # 0.1 s each
LONG = 256 << 10
DATA, META = INITIAL[False], INITIAL[True]


def free_port(host: str = "127.0.0.1") -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


class Node:
    """A Link whose machine only remembers what it is told."""

    def __init__(self, config: ResourceConfig, seed: int = 1) -> None:
        self.config = config
        self.data = b""
        self.meta = b""
        self.events: list[Event] = []
        self.said: list[tuple[str, str]] = []
        self.mistakes: list[BaseException] = []
        self.long = False  # what comes on the data socket is one long packet
        self.n_low = 0
        self.changed = asyncio.Event()
        loop = asyncio.get_running_loop()
        self.writes: list[PeerWrite] = []  # that are taken as they come: all that are long enough
        self.ended: list[tuple[int, DiskOp]] = []  # after how many events, and which
        self.disk = Disk(loop, lambda ops: None, self.mistakes.append)
        self.link = Link(
            loop, random.Random(seed), self, self.disk, guard=self.guard, report=self.report,
            say=lambda text, why: self.said.append((text, why)), on_low=self.on_low,
        )  # fmt: skip

    def guard(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception as error:
            self.mistakes.append(error)
        self.changed.set()

    def report(self, event: Event) -> None:
        self.events.append(event)
        self.changed.set()

    def on_low(self) -> None:
        self.n_low += 1
        self.changed.set()

    def receive_data(self, view: memoryview) -> int:
        if self.long:
            return 0
        self.data += view
        return len(view)

    def receive_meta(self, view: memoryview) -> int:
        self.meta += view
        return len(view)

    def needed_data(self, tail: memoryview) -> int:
        return LONG + 40 if self.long else len(tail) + 1

    def needed_meta(self, tail: memoryview) -> int:
        return len(tail) + 1

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None:
        if not takes(0):
            return None
        self.writes.append(PeerWrite(Op.WRITE, 0, 0, LONG, None, 0, 1, 0, PeerEpoch()))
        self.changed.set()
        return self.writes[-1]

    def disk_done(self, ops: list[DiskOp]) -> None:
        self.ended += [(len(self.events), op) for op in ops]

    async def until(self, what: Callable[[], object], limit_s: float = 20) -> None:
        async with asyncio.timeout(limit_s):
            while not what():
                self.changed.clear()
                await self.changed.wait()
        assert not self.mistakes

    async def up(self, ticket: int) -> LinkUp:
        def found() -> list[LinkUp]:
            return [e for e in self.events if isinstance(e, LinkUp) and e.ticket == ticket]

        await self.until(found)
        return found()[0]

    async def heard(self, data: bytes = b"", meta: bytes = b"") -> None:
        await self.until(lambda: (self.data, self.meta) == (data, meta))

    async def lost(self) -> LinkLost:
        await self.until(lambda: isinstance(self.events[-1], LinkLost))
        lost = self.events[-1]
        assert isinstance(lost, LinkLost)
        return lost


def pair_of_configs(net: NetOptions = NET) -> tuple[ResourceConfig, ResourceConfig]:
    a, b = Endpoint("ipv4", "127.0.0.1", free_port()), Endpoint("ipv4", "127.0.0.2", free_port("127.0.0.2"))
    one = ResourceConfig("r0", "one", "two", a, b, (), net)
    return one, replace(one, node="two", peer="one", address=b, peer_address=a)


def run(test: Callable[[], Coroutine[None, None, None]]) -> None:
    uvloop.run(test())


async def connected(seed: int = 1) -> tuple[Node, Node]:
    one, two = (Node(config, seed + i) for i, config in enumerate(pair_of_configs()))
    one.link.connect(1, one.config)
    two.link.connect(2, two.config)
    await one.up(1)
    await two.up(2)
    return one, two


def test_two_nodes_find_each_other_and_exactly_one_is_the_resolver() -> None:
    async def test() -> None:
        for seed in range(0, 12, 2):  # crossed dials fall differently each time
            one, two = await connected(seed)
            assert (await one.up(1)).resolver is not (await two.up(2)).resolver
            one.link.send_data([b"to ", b"two"])
            two.link.send_meta([b"to one"])
            await two.heard(data=b"to two")
            await one.heard(meta=b"to one")
            await one.link.stop()
            await two.link.stop()

    run(test)


def test_the_one_that_comes_later_finds_the_one_that_waits_quickly() -> None:
    async def test() -> None:
        one, two = (Node(config) for config in pair_of_configs())
        one.link.connect(1, one.config)
        await asyncio.sleep(0)  # one has dialled in vain and listens
        started = time.monotonic()
        two.link.connect(2, two.config)
        await two.up(2)
        await one.up(1)
        assert time.monotonic() - started < RETRY_S + 2  # and not connect-int, which is 10 s
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_a_third_connection_is_refused_while_the_link_is_up() -> None:
    async def test() -> None:
        one, two = await connected()
        with contextlib.closing(socket.socket()) as third:
            assert third.connect_ex((one.config.address.host, one.config.address.port)) != 0
        await one.link.stop()
        await two.link.stop()

    run(test)


async def dial(config: ResourceConfig, first: bytes) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, (config.address.host, config.address.port))
    await loop.sock_sendall(sock, first)
    return sock


def listen(config: ResourceConfig) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((config.peer_address.host, config.peer_address.port))
    sock.listen()
    sock.setblocking(False)
    return sock


async def accept(listener: socket.socket) -> tuple[bytes, socket.socket]:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        sock, _ = await loop.sock_accept(listener)
        return await loop.sock_recv(sock, 8), sock


def test_having_accepted_a_data_socket_it_dials_the_meta_socket_at_once() -> None:
    """A kernel node that dialled the data socket sits for connect-int before it dials another."""

    async def test() -> None:
        node = Node(pair_of_configs(replace(NET, connect_int=120))[0])
        node.link.connect(1, node.config)
        data = await dial(node.config, DATA)
        listener = listen(node.config)
        first, meta = await accept(listener)
        if first == DATA:  # its own first dial, which was faster; the incoming one is preferred
            meta.close()
            first, meta = await accept(listener)
        assert first == META
        assert not (await node.up(1)).resolver
        for sock in (data, meta, listener):
            sock.close()
        await node.link.stop()

    run(test)


def test_a_passive_peer_is_dialled_twice() -> None:
    async def test() -> None:
        node = Node(pair_of_configs()[0])
        listener = listen(node.config)
        node.link.connect(1, node.config)
        (first, data), (second, meta) = await accept(listener), await accept(listener)
        assert (first, second) == (DATA, META)
        assert not (await node.up(1)).resolver
        for sock in (data, meta, listener):
            sock.close()
        await node.link.stop()

    run(test)


def test_a_peer_that_dials_both_makes_us_the_resolver() -> None:
    async def test() -> None:
        node = Node(pair_of_configs()[0])
        node.link.connect(1, node.config)
        data = await dial(node.config, DATA + b"features")
        meta = await dial(node.config, META)
        assert (await node.up(1)).resolver
        await node.until(lambda: node.data == b"features")  # what followed the initial packet is not lost
        data.close()
        meta.close()
        await node.link.stop()

    run(test)


def test_a_newer_incoming_socket_replaces_the_older() -> None:
    async def test() -> None:
        node = Node(pair_of_configs()[0])
        node.link.connect(1, node.config)
        old = await dial(node.config, DATA)
        new = await dial(node.config, DATA)
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(10):
            assert await loop.sock_recv(old, 1) == b""
        meta = await dial(node.config, META)
        assert (await node.up(1)).resolver
        await loop.sock_sendall(new, b"hello")
        await node.until(lambda: node.data == b"hello")
        for sock in (old, new, meta):
            sock.close()
        await node.link.stop()

    run(test)


def test_garbage_and_silence_on_the_port_are_closed_and_told_once() -> None:
    async def test() -> None:
        one, two = (Node(config) for config in pair_of_configs())
        one.link.connect(1, one.config)
        loop = asyncio.get_running_loop()
        silent = await dial(one.config, b"")
        rude = [await dial(one.config, b"GET / HTTP/1.0\r\n\r\n") for _ in range(3)]
        wrong = await dial(one.config, bytes.fromhex("83740267fffe0048"))  # features instead
        crowd = [await dial(one.config, b"\x83") for _ in range(40)]
        async with asyncio.timeout(10):
            for sock in (silent, *rude, wrong):
                with contextlib.suppress(ConnectionResetError):
                    assert await loop.sock_recv(sock, 1) == b""
        two.link.connect(2, two.config)  # and nothing of this disturbs the peer
        await one.up(1)
        assert len(one.said) == 1
        text, why = one.said[0]
        assert "127.0.0.1" in text and str(one.config.address) in text and why
        for sock in (silent, *rude, wrong, *crowd):
            sock.close()
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_a_port_in_use_is_hopeless_and_says_so_in_one_sentence() -> None:
    async def test() -> None:
        node = Node(pair_of_configs()[0])
        with contextlib.closing(socket.socket()) as other:
            other.bind((node.config.address.host, node.config.address.port))
            other.listen()
            node.link.connect(7, node.config)
            await node.until(lambda: node.events)
        assert isinstance(node.events[0], LinkFailed) and node.events[0].ticket == 7
        assert str(node.config.address) in node.events[0].why and "already in use" in node.events[0].why
        foreign = replace(node.config, address=Endpoint("ipv4", "192.0.2.1", 7788))
        node.events.clear()
        node.link.connect(8, foreign)
        await node.until(lambda: node.events)
        assert isinstance(node.events[0], LinkFailed) and "does not exist on this host" in node.events[0].why
        node.events.clear()
        node.link.connect(9, replace(node.config, peer_address=Endpoint("ipv4", "no-such-host", 7788)))
        await node.until(lambda: node.events)
        assert isinstance(node.events[0], LinkFailed) and "no-such-host" in node.events[0].why
        await node.link.stop()

    run(test)


def test_closing_an_attempt_frees_the_port_at_once() -> None:
    async def test() -> None:
        one, two = (Node(config) for config in pair_of_configs())
        for ticket in range(1, 6):
            one.link.connect(ticket, one.config)
            if ticket % 2:
                await asyncio.sleep(0)
            if ticket < 5:
                one.link.close(ticket, 0)
        two.link.connect(1, two.config)
        await one.up(5)
        assert [event.ticket for event in one.events if isinstance(event, LinkUp)] == [5]
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_the_end_of_either_socket_is_one_loss_after_everything_was_heard() -> None:
    async def test() -> None:
        for meta in (False, True):
            node = Node(pair_of_configs()[0])
            node.link.connect(1, node.config)
            data_sock = await dial(node.config, DATA)
            meta_sock = await dial(node.config, META)
            await node.up(1)
            data_sock.send(b"last data")
            meta_sock.send(b"last meta")
            (meta_sock if meta else data_sock).close()
            lost = await node.lost()
            assert (lost.ticket, lost.meta) == (1, meta) and "closed" in lost.why
            assert (node.data, node.meta) == (b"last data", b"last meta")
            assert len(node.events) == 2
            # The port is free for the next attempt, even though the peer's other socket is still open.
            node.link.connect(2, node.config)
            again = [await dial(node.config, DATA), await dial(node.config, META)]
            await node.up(2)
            for sock in (data_sock, meta_sock, *again):
                sock.close()
            await node.link.stop()

    run(test)


def test_what_the_other_socket_says_late_is_heard_before_the_loss() -> None:
    """Two streams on one network: the end of one may overtake the last words on the other."""

    async def test() -> None:
        for meta in (False, True):
            node = Node(pair_of_configs()[0])
            node.link.connect(1, node.config)
            socks = [await dial(node.config, DATA), await dial(node.config, META)]
            await node.up(1)
            early, late = socks if not meta else socks[::-1]
            early.shutdown(socket.SHUT_WR)
            await asyncio.sleep(0.1)  # time to notice; more of it would change nothing but the reason
            assert len(node.events) == 1
            late.send(b"who is right")
            late.close()
            lost = await node.lost()
            assert lost.meta is meta and b"who is right" in (node.data, node.meta)
            early.close()
            await node.link.stop()

    run(test)


def test_last_words_arrive_before_the_end() -> None:
    async def test() -> None:
        one, two = await connected()
        words = bytes(range(256)) * 8192  # 2 MiB, more than the sockets hold
        one.link.send_data([words])
        one.link.close(1, 5.0)
        two.link.send_data([b"x" * 100_000])  # arrives at a closed link and must not reset it
        await two.until(lambda: any(isinstance(event, LinkLost) for event in two.events))
        assert two.data == words
        one.link.send_data([b"nobody hears this"])
        await one.link.stop()
        await two.link.stop()
        assert not any(isinstance(event, LinkLost) for event in one.events)

    run(test)


def test_a_peer_that_does_not_read_congests_the_link_until_it_does() -> None:
    async def test() -> None:
        one, two = await connected()
        two.link.hold(True)
        block = bytes(1 << 20)
        for _ in range(48):
            one.link.send_data([block])
        assert one.link.congested and one.link.backlog > 32 << 20
        two.link.hold(False)
        await one.until(lambda: not one.link.congested)
        assert one.link.backlog <= 16 << 20 and one.n_low == 1
        await two.until(lambda: len(two.data) == 48 << 20)
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_poll_hears_what_the_loop_has_not_noticed_yet() -> None:
    async def test() -> None:
        one, two = await connected()
        one.link.poll()
        two.link.send_data([b"data"])
        two.link.send_meta([b"meta"])
        one.link.poll()  # loopback delivers before send returns
        assert (one.data, one.meta) == (b"data", b"meta")
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_ipv6_is_no_different() -> None:
    async def test() -> None:
        with socket.socket(socket.AF_INET6) as sock, socket.socket(socket.AF_INET6) as other:
            sock.bind(("::1", 0))
            other.bind(("::1", 0))
            ports = sock.getsockname()[1], other.getsockname()[1]
        a, b = (Endpoint("ipv6", "::1", port) for port in ports)
        config = ResourceConfig("r0", "one", "two", a, b, (), NET)
        one = Node(config)
        two = Node(replace(config, address=b, peer_address=a), 2)
        one.link.connect(1, one.config)
        two.link.connect(2, two.config)
        await one.up(1)
        await two.up(2)
        await one.link.stop()
        await two.link.stop()

    run(test)


def test_a_reset_while_sending_is_a_loss() -> None:
    async def test() -> None:
        node = Node(pair_of_configs()[0])
        node.link.connect(1, node.config)
        data, meta = await dial(node.config, DATA), await dial(node.config, META)
        await node.up(1)
        data.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        node.link.hold(True)  # so that the loss is noticed by sending
        data.close()
        block = bytes(1 << 20)
        while not isinstance(node.events[-1], LinkLost):
            node.link.send_data([block])
            await asyncio.sleep(0)
        assert len(node.events) == 2
        meta.close()
        await node.link.stop()

    run(test)


@pytest.mark.parametrize("who", ["the peer", "the machine", "the daemon"])
def test_a_link_that_ends_in_the_middle_of_a_long_write_tells_the_machine_so_first(tmp_path: Path, who: str) -> None:
    async def test() -> None:
        one, two = await connected()
        path = tmp_path / "disk"
        path.write_bytes(bytes(LONG))
        with path.open("r+b") as file:
            device = Device(file.fileno())
            volume = OpenVolume(device, device, lambda: None)
            two.disk.add(0, volume)
            two.long = True
            one.link.send_data([b"n" * 40, b"n" * 10_000])
            await two.until(lambda: two.writes)
            assert volume.n_inflight == 1 and two.ended == []
            if who == "the peer":
                one.link.close(1, 0)
                await two.until(lambda: two.ended)
                assert isinstance(two.events[-1], LinkLost) and two.ended == [(len(two.events), two.writes[0])]
            elif who == "the machine":
                two.link.close(2, 0.1)
                assert two.ended == []
                await two.until(lambda: two.ended)
            else:
                await two.link.stop()
            assert volume.n_inflight == 0 and not two.writes[0].error
            await one.link.stop()
            await two.link.stop()
            two.disk.stop()
            one.disk.stop()

    run(test)
