"""Attach and release on real files: claims, refusals, and attaches that are overtaken."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop
from tandem.repl import attach
from tandem.repl.config import MetaDisk, VolumeConfig
from tandem.repl.edge.disk import Disk
from tandem.repl.edge.storage import SENTENCES, Storage
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import MetadataError
from tandem.repl.events import Attached, AttachFailed, DeviceGrown, Event
from tandem.repl.metadata import Superblock, layout
from tandem.repl.requests import META, DiskOp, Op

MIB = 1 << 20


def create(
    path: Path, size: int = 8 * MIB, kind: str = "internal", index: int = 0, data_size: int = 0
) -> None:
    """A file of *size* bytes with fresh metadata, as create-md leaves it."""
    if not path.exists():
        path.touch()
        os.truncate(path, size)
    with FileStore(str(path)) as store:
        where = layout(kind, size, data_size or size, index)
        store.write(where.bitmap, bytes(where.bitmap_bytes if where.bitmap_bytes < MIB else MIB))
        attach.write_ring(store, where)
        store.write(where.superblock, Superblock.fresh(where).pack())


def volume(path: Path, meta_disk: MetaDisk | None = None, number: int = 0) -> VolumeConfig:
    return VolumeConfig(number, number, f"/dev/drbd{number}", str(path), meta_disk or MetaDisk())


class Bench:
    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.events: list[Event] = []
        self.ended: list[DiskOp] = []
        self.mistakes: list[BaseException] = []
        self.rung = asyncio.Event()
        self.disk = Disk(loop, self.completed, self.mistakes.append)
        self.storage = Storage(loop, self.disk, self.report, self.mistakes.append)

    def completed(self, ops: list[DiskOp]) -> None:
        self.ended += ops
        self.rung.set()

    def report(self, event: Event) -> None:
        self.events.append(event)
        self.rung.set()

    async def event(self, n: int = 1) -> Event:
        """The *n*th event from here on counted from the first."""
        async with asyncio.timeout(10):
            while len(self.events) < n:
                self.rung.clear()
                await self.rung.wait()
        return self.events[n - 1]


def run(test: Callable[[Bench], Awaitable[None]]) -> None:
    async def main() -> None:
        bench = Bench()
        try:
            await test(bench)
        finally:
            await bench.storage.stop()
        assert not bench.mistakes

    uvloop.run(main())


def is_claimed(path: Path) -> bool:
    try:
        FileStore(str(path)).close()
    except MetadataError as error:
        assert error.code == 114
        return True
    return False


def test_an_attached_disk_is_claimed_and_used_until_it_is_released(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path)

    async def test(bench: Bench) -> None:
        bench.storage.attach(1, volume(path))
        event = await bench.event()
        assert isinstance(event, Attached) and (event.ticket, event.volume) == (1, 0)
        assert event.disk.data_size == 8 * MIB and is_claimed(path)
        done = bench.disk.start([DiskOp(Op.WRITE, 0, 0, 5, b"hello")])
        assert path.read_bytes()[:5] == b"hello" and done[0].error == 0
        bench.storage.release(0)
        bench.storage.attach(2, volume(path))  # at once: begins when the claim is released
        assert isinstance(await bench.event(2), Attached)
        bench.storage.release(0)

    run(test)
    assert not is_claimed(path)


def test_external_and_indexed_metadata_are_their_own_device(tmp_path: Path) -> None:
    flexible, indexed = tmp_path / "flexible", tmp_path / "indexed"
    create(flexible, 4 * MIB, "flexible", data_size=8 * MIB)
    for index in (0, 1):
        create(indexed, 256 * MIB, "indexed", index, 8 * MIB)
    disks = [tmp_path / f"disk{i}" for i in range(3)]
    for disk in disks:
        disk.touch()
        os.truncate(disk, 8 * MIB)

    async def test(bench: Bench) -> None:
        bench.storage.attach(1, volume(disks[0], MetaDisk("flexible", str(flexible)), 0))
        bench.storage.attach(2, volume(disks[1], MetaDisk("indexed", str(indexed), 0), 1))
        bench.storage.attach(3, volume(disks[2], MetaDisk("indexed", str(indexed), 1), 2))
        await bench.event(3)
        assert all(isinstance(event, Attached) for event in bench.events), bench.events
        ops = [DiskOp(Op.WRITE, i, 1 << 20, 4, b"meta", area=META) for i in range(3)]
        bench.disk.start(ops[:2])
        async with asyncio.timeout(10):
            while len(bench.ended) < 2:
                bench.rung.clear()
                await bench.rung.wait()
        for path in (flexible, indexed):
            with open(path, "rb") as file:
                file.seek(1 << 20)
                assert file.read(4) == b"meta"
        bench.storage.attach(4, volume(tmp_path / "disk3", MetaDisk("indexed", str(indexed), 1), 3))
        refused = await bench.event(4)
        assert isinstance(refused, AttachFailed) and refused.refusal.code == 104  # disk3 does not exist

    run(test)


def refused(bench_volume: VolumeConfig) -> tuple[int, str]:
    found: list[Event] = []

    async def test(bench: Bench) -> None:
        bench.storage.attach(1, bench_volume)
        found.append(await bench.event())

    run(test)
    event = found[0]
    assert isinstance(event, AttachFailed), event
    assert event.refusal.text == SENTENCES[event.refusal.code] and event.refusal.hint
    return event.refusal.code, event.refusal.hint


def test_refusals_have_drbds_number_and_name_the_place(tmp_path: Path) -> None:
    plain, missing, mapped = tmp_path / "plain", tmp_path / "missing", tmp_path / "mapped"
    plain.touch()
    os.truncate(plain, 8 * MIB)
    create(mapped)
    code, hint = refused(volume(missing))
    assert code == 104 and str(missing) in hint
    code, hint = refused(volume(mapped, MetaDisk("flexible", str(missing))))
    assert code == 105 and str(missing) in hint
    code, hint = refused(volume(plain))
    assert code == 119 and str(plain) in hint
    code, _ = refused(volume(tmp_path))
    assert code == 107
    code, hint = refused(volume(mapped, MetaDisk("flexible", str(mapped))))
    assert code == 116
    code, _ = refused(volume(plain, MetaDisk("indexed", str(mapped), 3)))
    assert code == 112
    with FileStore(str(mapped)):
        code, hint = refused(volume(mapped))
        assert code == 114 and str(mapped) in hint
        code, _ = refused(volume(plain, MetaDisk("flexible", str(mapped))))
        assert code == 115
    assert refused(VolumeConfig(0, 0, "/dev/drbd0", ""))[0] == 138
    for path in (plain, mapped):  # and nothing of all this is still claimed
        assert not is_claimed(path)


def test_out_of_memory_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(tmp_path / "disk")

    def too_much(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(attach, "load", too_much)
    assert refused(volume(tmp_path / "disk"))[0] == 122


def test_an_attach_that_was_overtaken_is_not_reported(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path)

    async def test(bench: Bench) -> None:
        bench.storage.attach(1, volume(path))
        bench.storage.release(0)
        bench.storage.attach(2, volume(path))
        bench.storage.attach(3, volume(path))
        event = await bench.event()
        assert isinstance(event, Attached) and event.ticket == 3
        bench.storage.release(0)

    run(test)
    assert not is_claimed(path)


def test_a_grown_device_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create(path)

    async def test(bench: Bench) -> None:
        bench.storage.attach(1, volume(path))
        await bench.event()
        os.truncate(path, 16 * MIB)
        bench.storage.probe(2, 0)
        assert await bench.event(2) == DeviceGrown(2, 0, 16 * MIB, 16 * MIB)

    run(test)
