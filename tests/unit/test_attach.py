"""Taking a disk into use: what is refused, what the activity log marks, and that a crash loses no bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from tandem.repl import attach
from tandem.repl.activity_log import ActivityLog, initialised_block
from tandem.repl.bitmap import Bitmap
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import (
    MAGIC_CLEAN,
    MAGIC_UNCLEAN,
    Layout,
    MdFlag,
    Superblock,
    layout,
)
from tandem.repl.requests import Buffer
from tandem.repl.units import BITS_PER_AL_EXTENT, SECTOR, n_bits_of

MIB, TIB = 1 << 20, 1 << 40
RUNNING = MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE
CRASHED = RUNNING | MdFlag.PRIMARY_IND


class Crash(Exception):
    """The power went."""


class MemoryStore:
    """A sparse disk. It dies at the call number *dies_at*; writes since the last flush are then each kept,
    lost, or torn at a sector, as *rng* draws."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.blocks: dict[int, bytes] = {}
        self.unflushed: list[tuple[int, bytes]] = []
        self.n_calls = 0
        self.dies_at = -1
        self.rng = random.Random(0)

    def _sectors(self, offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
        for at in range(0, len(data), SECTOR):
            yield (offset + at) // SECTOR, data[at : at + SECTOR]

    def _put(self, offset: int, data: bytes) -> None:
        assert offset % SECTOR == 0 and len(data) % SECTOR == 0 and offset + len(data) <= self.size
        self.blocks.update(self._sectors(offset, data))

    def _count(self) -> None:
        self.n_calls += 1
        if self.n_calls == self.dies_at:
            raise Crash

    def read(self, offset: int, length: int) -> bytes:
        assert offset + length <= self.size
        live = dict(self.blocks)
        for at, data in self.unflushed:
            live.update(self._sectors(at, data))
        first = offset // SECTOR
        return b"".join(live.get(s, bytes(SECTOR)) for s in range(first, first + length // SECTOR))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.read(offset, len(buffer))

    def write(self, offset: int, data: Buffer) -> None:
        self._count()
        self.unflushed.append((offset, bytes(data)))

    def flush(self) -> None:
        self._count()
        for offset, data in self.unflushed:
            self._put(offset, data)
        self.unflushed = []

    def power_cycle(self) -> None:
        """Decide what became of every write that was not flushed. Each 4 KiB of it has its own fate."""
        for offset, data in self.unflushed:
            for at in range(0, len(data), 4096):
                block = data[at : at + 4096]
                kept = self.rng.choice([0, len(block), self.rng.randrange(0, len(block), SECTOR)])
                self._put(offset + at, block[:kept])
        self.unflushed, self.dies_at = [], -1


def make(
    size: int = 64 * MIB,
    flags: MdFlag = RUNNING | MdFlag.AL_CLEAN,
    magic: int = MAGIC_CLEAN,
    la_size_sect: int | None = None,
    stripes: int = 1,
    bits: tuple[tuple[int, int], ...] = (),
) -> tuple[MemoryStore, Layout]:
    """A disk with internal metadata and an initialised ring."""
    store = MemoryStore(size)
    where = layout("internal", size, size, al_stripes=stripes)
    la = where.usable // SECTOR if la_size_sect is None else la_size_sect
    block = replace(Superblock.fresh(where, 7), la_size_sect=la, flags=flags, magic=magic, current=0xABCDE)
    store.write(where.superblock, block.pack())
    store.write(where.al, initialised_block() * where.al_blocks)
    bitmap = Bitmap(n_bits_of(min(la * SECTOR, where.usable)))
    for first, end in bits:
        bitmap.set(first, end)
    attach.write_changed_pages(store, where, bitmap)
    store.flush()
    store.n_calls = 0
    return store, where


def run_log(
    store: MemoryStore, where: Layout, *transactions: tuple[int, ...], slots: int = 67
) -> ActivityLog:
    """Write transactions as a running primary does."""
    log = ActivityLog(slots, where.al_blocks, where.al_stripes)
    for extents in transactions:
        for extent in extents:
            log.want(extent)
        transaction = log.begin()
        assert transaction is not None
        store.write(where.al + transaction.position * 4096, transaction.block)
        store.flush()
        log.commit()
    store.n_calls = 0
    return log


def set_bits(bitmap: Bitmap) -> set[int]:
    found, at = set(), 0
    for value, length in bitmap.runs(0):
        if value:
            found |= set(range(at, at + length))
        at += length
    return found


def of_extents(*extents: int) -> set[int]:
    return {b for e in extents for b in range(e * BITS_PER_AL_EXTENT, (e + 1) * BITS_PER_AL_EXTENT)}


def test_a_clean_disk_is_only_read() -> None:
    store, where = make(bits=((3, 4), (900, 1000)))
    loaded = attach.load(store, store.size, "internal", 0)
    assert store.n_calls == 0
    assert loaded.layout == where and loaded.data_size == store.size
    assert set_bits(loaded.bitmap) == {3, *range(900, 1000)}
    assert loaded.superblock.clean and loaded.superblock.current == 0xABCDE
    assert (loaded.marked, loaded.corrupt) == (0, 0)
    assert loaded.bitmap.changed_pages(10) == []


def test_fresh_metadata_have_no_bitmap_yet() -> None:
    store, _ = make(la_size_sect=0, flags=MdFlag.AL_CLEAN)
    loaded = attach.load(store, store.size, "internal", 0)
    bitmap = loaded.bitmap
    assert bitmap.weight == bitmap.n_bits == -(-loaded.layout.usable // 4096)
    assert loaded.superblock.la_size_sect == 0


def test_a_crashed_primary_marks_its_hot_extents() -> None:
    store, where = make(flags=CRASHED, magic=MAGIC_UNCLEAN, bits=((5 * 1024, 5 * 1024 + 10),))
    run_log(store, where, (0, 5), (7,), (15,))
    loaded = attach.load(store, store.size, "internal", 0)
    n_bits = loaded.bitmap.n_bits
    expected = {bit for bit in of_extents(0, 5, 7, 15) if bit < n_bits}
    assert set_bits(loaded.bitmap) == expected
    assert loaded.marked == len(expected) - 10 and loaded.corrupt == 0
    # The same is on disk, the ring is empty, and flags and generations are untouched otherwise.
    assert loaded.superblock.flags == CRASHED | MdFlag.AL_CLEAN and loaded.superblock.magic == MAGIC_CLEAN
    assert store.read(where.superblock, 4096) == loaded.superblock.pack()
    assert store.read(where.al, 8 * 4096) == initialised_block() * 8
    assert store.unflushed == []
    again = attach.load(store, store.size, "internal", 0)
    assert set_bits(again.bitmap) == expected and again.marked == 0


def test_a_secondary_marks_nothing_but_empties_the_ring() -> None:
    store, where = make(flags=RUNNING, magic=MAGIC_UNCLEAN)
    run_log(store, where, (0, 5))
    loaded = attach.load(store, store.size, "internal", 0)
    assert loaded.bitmap.weight == 0 and loaded.superblock.clean
    assert store.read(where.al, 8 * 4096) == initialised_block() * 8


@pytest.mark.parametrize(
    "flags",
    [
        RUNNING | MdFlag.FULL_SYNC,
        CRASHED | MdFlag.FULL_SYNC,
        CRASHED | MdFlag.AL_DISABLED,
        RUNNING | MdFlag.CRASHED_PRIMARY | MdFlag.AL_DISABLED,
    ],
)
def test_flags_that_mean_everything_is_out_of_sync(flags: MdFlag) -> None:
    store, where = make(flags=flags, magic=MAGIC_UNCLEAN)
    store.write(where.al, bytes(8 * 4096))  # nobody asks the log then
    store.flush()
    loaded = attach.load(store, store.size, "internal", 0)
    assert loaded.bitmap.weight == loaded.bitmap.n_bits
    assert loaded.superblock.flags == flags | MdFlag.AL_CLEAN
    assert loaded.bitmap.dirty_pages(10) == [0]  # still to be written


def test_al_disabled_alone_trusts_the_bitmap() -> None:
    store, _ = make(flags=RUNNING | MdFlag.AL_DISABLED, magic=MAGIC_UNCLEAN)
    assert attach.load(store, store.size, "internal", 0).bitmap.weight == 0


def test_one_torn_block_is_expected() -> None:
    store, where = make(flags=CRASHED, magic=MAGIC_UNCLEAN)
    run_log(store, where, (1,), (2,), (3,))
    store.write(where.al + 2 * 4096, b"\xaa" * 4096)
    store.flush()
    loaded = attach.load(store, store.size, "internal", 0)
    assert loaded.corrupt == 1 and set_bits(loaded.bitmap) == of_extents(1, 2)


def test_a_log_that_is_needed_but_gone_is_refused_and_nothing_is_changed() -> None:
    store, where = make(flags=CRASHED, magic=MAGIC_UNCLEAN)
    store.write(where.al, bytes(8 * 4096))
    store.flush()
    store.n_calls = 0
    with pytest.raises(MetadataError) as caught:
        attach.load(store, store.size, "internal", 0)
    assert str(caught.value) == "No usable activity log found. Do you need to create-md?"
    assert (caught.value.code, caught.value.exit_code, store.n_calls) == (165, 1, 0)
    store.write(where.al, initialised_block())
    store.flush()
    with pytest.raises(MetadataError, match=r"^7 corrupt AL .*\nNo valid AL update transaction found\.$"):
        attach.load(store, store.size, "internal", 0)


def test_an_activity_log_from_before_8_4_is_named() -> None:
    store, where = make(flags=CRASHED, magic=MAGIC_CLEAN)
    store.write(where.al, (b"\x83\x74\x02\x67" + bytes(508)) * 64)
    store.flush()
    with pytest.raises(MetadataError, match=r"written before DRBD 8\.4"):
        attach.load(store, store.size, "internal", 0)


@pytest.mark.parametrize("flags", [RUNNING, RUNNING | MdFlag.AL_CLEAN, CRASHED | MdFlag.AL_CLEAN])
def test_a_log_that_is_not_needed_may_be_anything(flags: MdFlag) -> None:
    for rubbish in (bytes(8 * 4096), b"\xaa" * 8 * 4096, initialised_block() * 3 + b"\xaa" * 5 * 4096):
        store, where = make(flags=flags, magic=MAGIC_CLEAN if flags & MdFlag.AL_CLEAN else MAGIC_UNCLEAN)
        store.write(where.al, rubbish)
        store.flush()
        assert attach.load(store, store.size, "internal", 0).superblock.clean
        assert store.read(where.al, 8 * 4096) == initialised_block() * 8


def test_a_device_that_shrank_is_refused_only_if_it_held_consistent_data() -> None:
    store, where = make(la_size_sect=2 * 131072)
    with pytest.raises(MetadataError) as caught:
        attach.load(store, store.size, "internal", 0)
    assert caught.value.code == 170 and "262144 were agreed on" in str(caught.value)
    store, where = make(la_size_sect=2 * 131072, flags=MdFlag.AL_CLEAN)
    assert attach.load(store, store.size, "internal", 0).bitmap.n_bits == n_bits_of(where.usable)


def test_devices_that_are_too_small_or_foreign() -> None:
    small = MemoryStore(2047 * SECTOR)
    with pytest.raises(
        MetadataError, match=r"^Meta device too small: sdx has 2047 sectors, 2048 are needed\."
    ):
        attach.load(small, small.size, "internal", 0, name="sdx")
    with pytest.raises(MetadataError) as caught:
        attach.load(MemoryStore(200 * MIB), TIB, "indexed", 1)
    assert caught.value.code == 112
    with pytest.raises(MetadataError) as caught:
        attach.load(MemoryStore(64 * MIB), 64 * MIB, "internal", 0, name="sdx")
    assert str(caught.value) == "No valid meta data found: sdx at byte offset 67104768 holds only zeros."
    assert caught.value.code == 119


def test_a_grown_device_has_no_metadata_at_its_end() -> None:
    store, _ = make()
    store.size += 8 * MIB
    with pytest.raises(MetadataError, match="holds only zeros"):
        attach.load(store, store.size, "internal", 0)


def test_external_metadata() -> None:
    store = MemoryStore(2 * 128 * MIB)
    where = layout("indexed", store.size, 1 << 30, index=1)
    block = replace(Superblock.fresh(where, 7), la_size_sect=2097152, flags=RUNNING | MdFlag.AL_CLEAN)
    store.write(where.superblock, block.pack())
    store.write(where.al, initialised_block() * 8)
    store.write(where.bitmap + 4096, b"\x01" + bytes(4095))
    store.flush()
    loaded = attach.load(store, 1 << 30, "indexed", 1)
    assert loaded.bitmap.n_bits == 262144 and set_bits(loaded.bitmap) == {32768}
    with pytest.raises(MetadataError, match="holds only zeros"):
        attach.load(store, 1 << 30, "indexed", 0)


@pytest.mark.parametrize("stripes", [1, 4])
def test_no_crash_loses_a_bit(stripes: int) -> None:
    """Die at every write and flush of load, with every unflushed write kept, lost or torn; load again."""
    size = 512 * MIB
    before = ((100, 200), (40 * 1024, 40 * 1024 + 5))
    wanted = set(range(100, 200)) | set(range(40 * 1024, 40 * 1024 + 5)) | of_extents(1, 33, 70, 80, 90)

    def crashed() -> tuple[MemoryStore, Layout]:
        store, where = make(size, CRASHED, MAGIC_UNCLEAN, stripes=stripes, bits=before)
        run_log(store, where, (1,), (33, 70), (80,), (90,))
        return store, where

    def torn_first() -> tuple[MemoryStore, Layout]:
        store, where = crashed()
        store.write(where.al, b"\xee" * 4096)
        store.flush()
        return store, where

    def check(build: Callable[[], tuple[MemoryStore, Layout]], must: set[int], seed: int) -> bool:
        dies_at, finished = 0, False
        while not finished:
            dies_at += 1
            store, _ = build()
            store.n_calls, store.dies_at, store.rng = 0, dies_at, random.Random(seed * 1000 + dies_at)
            try:
                attach.load(store, store.size, "internal", 0)
                finished = True
            except Crash:
                store.power_cycle()
            store.dies_at = -1
            assert set_bits(attach.load(store, store.size, "internal", 0).bitmap) >= must
        return dies_at > 5

    for seed in range(15):
        assert check(crashed, wanted, seed)
    # With the first transaction torn what later ones repeat of it in their contexts is still known.
    store, _ = torn_first()
    known = set_bits(attach.load(store, store.size, "internal", 0).bitmap)
    for seed in range(15):
        assert check(torn_first, known, seed)


def test_pages_are_written_in_runs() -> None:
    store, where = make(size=3072 * MIB)
    bitmap = Bitmap(n_bits_of(where.usable))
    for page in (0, 1, 2, 9, 11):
        bitmap.set(page * 32768 + 7, page * 32768 + 9)
    store.unflushed = []
    assert attach.write_changed_pages(store, where, bitmap) == 5
    assert [(at - where.bitmap, len(data)) for at, data in store.unflushed] == [
        (0, 3 * 4096), (9 * 4096, 4096), (11 * 4096, 4096),
    ]  # fmt: skip
    assert attach.write_changed_pages(store, where, bitmap) == 0
    assert attach.read_bitmap(store, where, bitmap.n_bits).words(0, 24) == bitmap.words(0, 24)
