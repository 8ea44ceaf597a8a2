"""The real machine in two runtimes on one loop: real files, real sockets, both disks compared in the end."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from tandem.repl import attach
from tandem.repl.config import DiskOptions, Endpoint, NetOptions, ResourceConfig, VolumeConfig
from tandem.repl.edge.runtime import Runtime
from tandem.repl.edge.splice import Splice
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import Refusal
from tandem.repl.events import Notify, StateChanged
from tandem.repl.metadata import Superblock, layout
from tandem.repl.requests import FUA, MAY_UNMAP, Op, Request, split

MIB = 1 << 20
SIZE = 32 * MIB
NET = NetOptions(ping_timeout=10, socket_check_timeout=1)


def free_port(host: str) -> int:
    with socket.socket() as sock:
        sock.bind((host, 0))
        port: int = sock.getsockname()[1]
        return port


def create(path: Path, size: int = SIZE, content: bytes = b"") -> int:
    """A file with fresh internal metadata; returns the usable size in bytes."""
    path.write_bytes(content)
    os.truncate(path, size)
    with FileStore(str(path)) as store:
        where = layout("internal", size, size)
        store.write(where.bitmap, bytes(where.bitmap_bytes))
        attach.write_ring(store, where)
        store.write(where.superblock, Superblock.fresh(where).pack())
    return where.usable


class Client:
    """A front end that waits for its requests."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.n_out = 0
        self.failed: list[Request] = []
        self.rung = asyncio.Event()

    def finished(self, batch: list[Request]) -> None:
        self.n_out -= len(batch)
        self.failed += [request for request in batch if request.error]
        self.rung.set()

    def make(self, op: Op, offset: int, length: int, data: bytes = b"", flags: int = 0) -> list[Request]:
        found = []
        for at, size in split(op, offset, length):
            payload = data[at - offset : at - offset + size] if data else None
            found.append(Request(self, None, op, 0, at, size, payload, flags))
        return found

    def submit(self, batch: list[Request]) -> None:
        self.n_out += len(batch)
        self.node.runtime.volume(0).submit(batch)

    async def all_back(self) -> None:
        async with asyncio.timeout(30):
            while self.n_out:
                self.rung.clear()
                await self.rung.wait()

    async def do(self, op: Op, offset: int, length: int, data: bytes = b"", flags: int = 0) -> list[Request]:
        batch = self.make(op, offset, length, data, flags)
        self.submit(batch)
        await self.all_back()
        assert not self.failed, self.failed
        return batch

    async def read(self, offset: int, length: int) -> bytes:
        return b"".join(bytes(r.payload or b"") for r in await self.do(Op.READ, offset, length))


class Node:
    def __init__(self, config: ResourceConfig, seed: int) -> None:
        self.config = config
        self.path = Path(config.volumes[0].disk)
        self.log: list[str] = []
        self.mistakes: list[BaseException] = []
        self.rung = asyncio.Event()
        self.runtime = Runtime(config, seed=seed, on_fatal=self.fatal)
        self.runtime.subscribe(self.news)
        self.client = Client(self)

    def fatal(self, error: BaseException) -> None:
        self.mistakes.append(error)
        self.rung.set()

    def news(self, batch: list[Notify | StateChanged]) -> None:
        self.log += [f"{n.subject}: {n.text} ({n.why})" for n in batch if isinstance(n, Notify)]
        self.rung.set()

    async def ok(self, name: str, volume: int | None = None, **args: object) -> None:
        refusal = await self.runtime.command(name, volume, **args)
        assert refusal is None, (name, refusal, self.log)

    async def until(self, what: Callable[[], object], limit_s: float = 15) -> None:
        try:
            async with asyncio.timeout(limit_s):
                while not what() and not self.mistakes:
                    self.rung.clear()
                    await self.rung.wait()
        except TimeoutError:
            raise AssertionError((self.runtime.status(), self.log)) from None
        if self.mistakes:
            raise self.mistakes[0]

    async def connected(self) -> None:
        await self.until(lambda: self.cstate == "Connected")

    async def in_sync(self) -> None:
        await self.until(lambda: self.disks == ("UpToDate", "UpToDate") and self.cstate == "Connected")

    @property
    def disks(self) -> tuple[str, str]:
        status = self.runtime.status()
        return status.volumes[0].disk, status.connection.volumes[0].peer_disk

    @property
    def cstate(self) -> str:
        return self.runtime.status().connection.cstate

    def content(self, length: int) -> bytes:
        return self.path.read_bytes()[:length]


class Pair:
    """Two nodes; *a* is to be the primary."""

    def __init__(self, directory: Path, net: NetOptions = NET, **handlers: str) -> None:
        ends = [Endpoint("ipv4", host, free_port(host)) for host in ("127.0.0.1", "127.0.0.2")]
        nodes = []
        for i, name in enumerate("ab"):
            disk = VolumeConfig(0, 0, "/dev/drbd0", str(directory / name), disk_options=DiskOptions())
            config = ResourceConfig(
                "r0", name, "ba"[i], ends[i], ends[1 - i], (disk,), net, node_id=i, peer_node_id=1 - i,
                handlers={event.replace("_", "-"): line for event, line in handlers.items()},
            )
            nodes.append(Node(config, seed=i))
        self.a, self.b = nodes

    async def up(self) -> None:
        for node in (self.a, self.b):
            await node.runtime.start()
            await node.ok("attach", 0)
            await node.ok("connect")
        await self.connected()

    async def connected(self) -> None:
        for node in (self.a, self.b):
            await node.connected()

    async def in_sync(self) -> None:
        for node in (self.a, self.b):
            await node.in_sync()

    async def primary(self) -> None:
        await self.a.ok("primary", force=True)
        await self.in_sync()


def run(
    directory: Path, test: Callable[[Pair, int], Awaitable[None]], content: bytes = b"", other: bytes = b""
) -> None:
    """*test* with two nodes whose disks begin with *content* and *other*."""

    async def main() -> None:
        usable = create(directory / "a", content=content)
        create(directory / "b", content=other)
        pair = Pair(directory)
        try:
            await pair.up()
            await test(pair, usable)
        finally:
            for node in (pair.a, pair.b):
                await node.runtime.stop()
        assert not pair.a.mistakes and not pair.b.mistakes

    uvloop.run(main())


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


def test_initial_sync_copies_everything(directory: Path) -> None:
    content = random.Random(1).randbytes(SIZE - MIB)

    async def test(pair: Pair, usable: int) -> None:
        assert pair.a.disks == ("Inconsistent", "Inconsistent")
        await pair.primary()
        assert pair.a.runtime.status().connection.volumes[0].out_of_sync == 0
        assert pair.b.content(usable) == pair.a.content(usable) != bytes(usable)

    run(directory, test, content)


def test_holes_become_zeroes_and_stay_holes(directory: Path) -> None:
    draw = random.Random(2)

    async def test(pair: Pair, usable: int) -> None:
        with open(pair.a.path, "r+b") as file:
            for at in (MIB + 4096, 3 * MIB - 512, 5 * MIB, 9 * MIB, 11 * MIB + 8192):
                os.pwrite(file.fileno(), b"data", at)
        await pair.a.ok("primary", force=True)
        # While it goes on, and slowly, because of these. A piece of 1 MiB with a write in it is sent as it is, so they
        # keep to a part of the disk.
        for _ in range(300):
            at = draw.randrange(usable // 4 // 4096) * 4096
            match draw.randrange(3):
                case 0:
                    await pair.a.client.do(Op.WRITE, at, 4096, draw.randbytes(4096))
                case 1:
                    await pair.a.client.do(Op.TRIM, at, 4096 * draw.randrange(1, 64))
                case _:
                    await pair.a.client.do(Op.ZEROES, at, 4096 * draw.randrange(1, 64), flags=MAY_UNMAP)
        await pair.in_sync()
        assert pair.b.content(usable) == pair.a.content(usable)
        assert pair.b.path.stat().st_blocks << 9 < usable // 2

    run(directory, test, other=bytes([0xEE]) * (8 * MIB))


def test_writes_of_all_kinds_reach_both_disks(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        assert pair.a.runtime.volume(0).open(True) is None
        draw, image, client = random.Random(2), bytearray(usable), pair.a.client
        for _ in range(60):
            offset = draw.randrange(0, usable // 512 - 8) * 512
            length = min(draw.choice((512, 4096, 65536, 3 * MIB)), usable - offset)
            kind = draw.choice((Op.WRITE, Op.WRITE, Op.WRITE, Op.ZEROES, Op.TRIM, Op.FLUSH))
            data = draw.randbytes(length) if kind == Op.WRITE else b""
            if kind == Op.FLUSH:
                offset = length = 0
            flags = draw.choice((0, FUA)) | (MAY_UNMAP if kind == Op.ZEROES else 0)
            await client.do(kind, offset, length, data, flags)
            image[offset : offset + length] = data or bytes(length)
        assert await client.read(0, usable) == bytes(image)
        assert pair.a.content(usable) == pair.b.content(usable) == bytes(image)
        pair.a.runtime.volume(0).close(True)

    run(directory, test)


def test_a_deep_queue_of_small_writes_stays_consistent(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        client, draw = pair.a.client, random.Random(3)
        image = bytearray(16 * MIB)
        blocks = list(range(16 * MIB // 4096))
        for _ in range(3):
            draw.shuffle(blocks)
            for at in range(0, len(blocks), 64):
                batch = []
                for block in blocks[at : at + 64]:
                    data = draw.randbytes(16) * 256
                    image[block * 4096 : block * 4096 + 4096] = data
                    batch += client.make(Op.WRITE, block * 4096, 4096, data)
                client.submit(batch)
                if client.n_out > 512:
                    await asyncio.sleep(0)
            await client.all_back()
        assert not client.failed
        assert pair.a.content(16 * MIB) == pair.b.content(16 * MIB) == bytes(image)

    run(directory, test)


def test_what_was_written_alone_is_copied_after_the_link_came_back(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        await pair.b.ok("disconnect")
        await pair.a.until(lambda: pair.a.cstate == "WFConnection")
        data = random.Random(4).randbytes(3 * MIB)
        await pair.a.client.do(Op.WRITE, 5 * MIB, len(data), data)
        assert pair.b.content(usable)[5 * MIB : 8 * MIB] != data
        assert pair.a.runtime.status().connection.volumes[0].out_of_sync >= len(data)
        await pair.b.ok("connect")
        await pair.in_sync()
        assert pair.b.content(usable) == pair.a.content(usable)
        assert pair.a.content(usable)[5 * MIB : 8 * MIB] == data

    run(directory, test)


def test_a_lost_link_during_writes_loses_none_of_them(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        client, draw = pair.a.client, random.Random(5)
        image = bytearray(usable)
        for i in range(200):
            block = draw.randrange(usable // 4096)
            data = draw.randbytes(16) * 256
            image[block * 4096 : block * 4096 + 4096] = data
            client.submit(client.make(Op.WRITE, block * 4096, 4096, data))
            if i in (50, 120):
                sockets = pair.b.runtime.link._pair
                if sockets is not None:
                    (sockets.meta if i == 50 else sockets.data).shutdown(2)
            await client.all_back()
        assert not client.failed
        await pair.in_sync()
        assert pair.a.content(usable) == pair.b.content(usable) == bytes(image)

    run(directory, test)


def test_a_link_lost_in_the_middle_of_long_writes_loses_none_of_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They go to the peer's disk as they come, so that a part of one is there when its link ends."""
    receive, splice, n_parts, cuts = Splice.receive, os.splice, 0, 0

    def slowly(source: int, to: int, count: int, **more: int) -> int:
        """Of a network as fast as this one's hardly a write comes in parts."""
        nonlocal n_parts
        if "offset_dst" not in more:
            n_parts += 1
            if n_parts % 2:
                raise BlockingIOError
        return splice(source, to, min(count, 64 << 10), **more)

    def received(one: Splice) -> int:
        nonlocal cuts
        n = receive(one)
        if one.rest and n_parts > 300 * (cuts + 1):
            cuts += 1
            one._sock.shutdown(2)
        return n

    monkeypatch.setattr(os, "splice", slowly)
    monkeypatch.setattr(Splice, "receive", received)

    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        client, draw = pair.a.client, random.Random(6)
        image = bytearray(usable)
        for _ in range(30):
            offset, length = draw.randrange(usable // MIB - 2) * MIB + 512, 2 * MIB - 512
            image[offset : offset + length] = data = draw.randbytes(length)
            client.submit(client.make(Op.WRITE, offset, length, data))
            await client.all_back()
            await pair.in_sync()
        assert not client.failed and cuts > 2
        assert pair.a.content(usable) == pair.b.content(usable) == bytes(image)

    run(directory, test)


def test_a_role_switch_moves_the_volume(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        await pair.a.client.do(Op.WRITE, 0, 4096, b"a" * 4096)
        assert pair.b.runtime.volume(0).open(True) is not None
        refusal = await pair.b.runtime.command("primary")
        assert isinstance(refusal, Refusal) and refusal.code == -1
        await pair.a.ok("secondary")
        await pair.b.ok("primary")
        assert pair.b.runtime.volume(0).open(True) is None
        assert await pair.b.client.read(0, 4096) == b"a" * 4096
        await pair.b.client.do(Op.WRITE, 4096, 4096, b"b" * 4096)
        pair.b.runtime.volume(0).close(True)
        assert pair.a.content(8192) == b"a" * 4096 + b"b" * 4096

    run(directory, test)


def test_a_diskless_primary_reads_and_writes_over_the_link(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        await pair.primary()
        await pair.a.client.do(Op.WRITE, 0, 8192, b"1" * 8192)
        await pair.a.ok("detach", 0)
        await pair.a.until(lambda: pair.a.disks[0] == "Diskless")
        assert await pair.a.client.read(4096, 4096) == b"1" * 4096
        await pair.a.client.do(Op.WRITE, 4096, 4096, b"2" * 4096)
        assert await pair.a.client.read(0, 8192) == b"1" * 4096 + b"2" * 4096
        await pair.a.ok("attach", 0)
        await pair.in_sync()
        assert pair.a.content(usable) == pair.b.content(usable)

    run(directory, test)


def test_holes_are_told_only_by_an_up_to_date_disk(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        volume = pair.a.runtime.volume(0)
        await pair.primary()
        await pair.a.client.do(Op.WRITE, 0, 8 * MIB, b"x" * (8 * MIB))
        await pair.a.client.do(Op.TRIM, 4 * MIB, MIB)
        found = await volume.allocation(2 * MIB, 4 * MIB, 10)
        assert found == [(2 * MIB, 0), (MIB, 3), (MIB, 0)]
        assert sum(length for length, _ in await volume.allocation(usable - MIB, 8 * MIB, 10)) == MIB
        await pair.a.ok("detach", 0)
        assert await volume.allocation(2 * MIB, 4 * MIB, 10) == [(4 * MIB, 0)]

    run(directory, test)


def test_the_second_daemon_on_a_disk_is_refused(directory: Path) -> None:
    async def test(pair: Pair, usable: int) -> None:
        ports = [Endpoint("ipv4", "127.0.0.1", free_port("127.0.0.1")) for _ in range(2)]
        other = Node(replace(pair.a.config, name="r1", address=ports[0], peer_address=ports[1]), 9)
        refusal = await other.runtime.command("attach", 0)
        assert isinstance(refusal, Refusal) and refusal.code == 114 and str(pair.a.path) in refusal.hint
        await other.runtime.stop()

    run(directory, test)


def test_a_port_in_use_ends_in_standalone_with_a_sentence(directory: Path) -> None:
    async def main() -> None:
        create(directory / "a")
        create(directory / "b")
        pair = Pair(directory)
        pair.b.runtime.engine.config = replace(pair.b.config, address=pair.a.config.address)
        for node in (pair.a, pair.b):
            await node.ok("attach", 0)
            await node.ok("connect")
        await pair.b.until(lambda: pair.b.cstate == "StandAlone")
        assert any("already in use" in line for line in pair.b.log)
        await pair.a.runtime.stop()
        await pair.b.runtime.stop()

    uvloop.run(main())
