"""Crashed, grown and claimed disks: what apply-al marks and what moves, against drbdmeta where it can."""

from __future__ import annotations

import io
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.repl import attach
from tandem.repl.activity_log import ActivityLog
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import MAGIC_CLEAN, MAGIC_UNCLEAN, Layout, MdFlag, Superblock, layout
from tandem.repl.units import AL_EXTENT, SECTOR, n_bits_of
from tandem.tools import meta
from tandem.tools.meta_disk import LastKnown, confirm_at_terminal, size_text

from tests.metadata_disks import (
    MIB,
    Result,
    clone,
    content,
    disk,
    drbdmeta,
    image,
    ours,
    used_disk,
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


# -------------------------------------------------------------------- apply-al


def ring_of(rng: random.Random, where: Layout, n: int, slots: int = 67) -> tuple[dict[int, bytes], int]:
    """A ring after *n* transactions, and the place of the newest."""
    log = ActivityLog(slots, where.al_blocks, where.al_stripes)
    ring = dict(log.initial_ring())
    n_extents = where.usable // AL_EXTENT
    newest = 0
    while n:
        for _ in range(rng.randrange(1, 20)):
            log.want(rng.randrange(n_extents))
        if (transaction := log.begin()) is not None:
            ring[transaction.position] = transaction.block
            newest = transaction.position
            n -= 1
            log.commit()
    return ring, newest


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("stripes", [1, 4])
@pytest.mark.parametrize("flags", [0x13, 0x93, 0x11])
def test_apply_al_marks_the_same_bits(here: Path, seed: int, torn: bool, stripes: int, flags: int) -> None:
    """A ring a crashed node left, also with its newest block torn: by drbdmeta, by us, and by attaching."""
    rng = random.Random(seed)
    where = layout("internal", 300 * MIB, 300 * MIB, al_stripes=stripes)
    ring, newest = ring_of(rng, where, rng.choice([1, 5, 13, 60]))
    if torn:
        ring[newest] = ring[newest][:512] + b"\xaa" * 3584
    path, _ = used_disk(here / "disk", 300 * MIB, flags, stripes=stripes, ring=ring, seed=seed)
    theirs, attached = here / "theirs", here / "attached"
    clone(path, theirs)
    clone(path, attached)
    expected, got = drbdmeta(theirs, "apply-al"), ours(meta.apply_al, path)
    assert got == expected and got.code == 0
    assert content(path, where) == content(theirs, where)
    with FileStore(str(attached)) as store:
        loaded = attach.load(store, store.size, "internal", 0)
    assert loaded.superblock.clean and loaded.corrupt == int(torn)
    assert bool(loaded.marked) == ("Marked" in expected.err)
    assert content(attached, where) == content(theirs, where)


def test_a_partial_last_extent_is_marked_up_to_the_end(here: Path) -> None:
    """drbdmeta also sets the bits of the extent that are behind the end of the device; nobody reads those."""
    where = layout("internal", 301 * MIB, 301 * MIB)
    log = ActivityLog(67, 8, 1)
    last = where.usable // AL_EXTENT
    log.want(last)
    transaction = log.begin()
    assert transaction is not None
    path, _ = used_disk(here / "disk", 301 * MIB, 0x13, ring={transaction.position: transaction.block})
    theirs = here / "theirs"
    clone(path, theirs)
    assert drbdmeta(theirs, "apply-al").code == ours(meta.apply_al, path).code == 0
    n_bits = n_bits_of(where.usable)
    got, expected = (int.from_bytes(content(p, where)["bitmap"], "little") for p in (path, theirs))
    assert got == expected & ((1 << n_bits) - 1)
    assert got >> (last * 1024) == (1 << (n_bits - last * 1024)) - 1


@pytest.mark.parametrize(("extents", "words"), [((3,), "Marked additional 0 KB"), ((), "Nothing to do.")])
@pytest.mark.parametrize("flags", [0x13, 0x11])
def test_nothing_left_to_mark(here: Path, extents: tuple[int, ...], words: str, flags: int) -> None:
    where = layout("internal", 64 * MIB, 64 * MIB)
    log = ActivityLog(67, 8, 1)
    ring = dict(log.initial_ring())
    for extent in extents:
        log.want(extent)
    if (transaction := log.begin()) is not None:
        ring[transaction.position] = transaction.block
    path, _ = used_disk(here / "disk", 64 * MIB, flags, ring=ring)
    with FileStore(str(path)) as store:
        store.write(where.bitmap + 3 * 128, b"\xff" * 512)
    theirs = here / "theirs"
    clone(path, theirs)
    expected, got = drbdmeta(theirs, "apply-al"), ours(meta.apply_al, path)
    assert got == expected and (words in got.err) == bool(flags & 2)
    assert content(path, where) == content(theirs, where)


@pytest.mark.parametrize("flags", [0x13, 0x11])
@pytest.mark.parametrize("broken", [range(8), range(1, 8), range(3, 4)])
def test_logs_that_cannot_be_used(here: Path, flags: int, broken: range) -> None:
    ring = dict.fromkeys(broken, b"\xaa" * 4096)
    path, where = used_disk(here / "disk", 64 * MIB, flags, ring=ring)
    theirs = here / "theirs"
    clone(path, theirs)
    expected, got = drbdmeta(theirs, "apply-al"), ours(meta.apply_al, path)
    assert got == expected
    assert got.code == (1 if flags & 2 else 0)
    assert content(path, where) == content(theirs, where)


def test_a_clean_disk_without_a_log_is_accepted(here: Path) -> None:
    path, where = used_disk(here / "disk", 64 * MIB, 0x91, ring={i: bytes(4096) for i in range(8)})
    theirs = here / "theirs"
    clone(path, theirs)
    assert ours(meta.apply_al, path) == drbdmeta(theirs, "apply-al")
    assert content(path, where) == content(theirs, where)


# -------------------------------------------------------------------- a disk that has grown


@pytest.mark.parametrize("growth", [4096, 8192, 65536, MIB, 100 * MIB, 700 * MIB])
@pytest.mark.parametrize("crashed", [False, True])
def test_metadata_move_with_the_end_of_the_disk(here: Path, growth: int, crashed: bool) -> None:
    """Nothing is lost, also where the old and the new place overlap; the moved metadata are drbdmeta's."""
    size = 300 * MIB
    old = layout("internal", size, size)
    ring, _ = ring_of(random.Random(3), old, 9)
    path, old = used_disk(here / "disk", size, 0x13 if crashed else 0x91, ring=ring if crashed else None)
    known = here / "state" / "drbd-minor-7.lkbd"
    reference = here / "reference"
    clone(path, reference)
    assert ours(meta.apply_al, reference).code == 0
    assert ours(meta.check_resize, path, last_known=known) == Result(0, "", "")
    before = Superblock.unpack(content(path, old)["superblock"])
    assert known.read_text() == f"{size}\t{path}\nuuid:\t{before.device_uuid:016X}\n"
    with path.open("r+b") as file:
        file.truncate(size + growth)
    refused = ours(meta.get_gi, path, last_known=known)
    assert refused.code == 1 and "check-resize" in refused.err
    command = meta.apply_al if crashed else meta.check_resize
    moved = ours(command, path, last_known=known)
    assert moved.code == 0 and moved.out == "Internal drbd meta data successfully moved.\n"
    assert moved.err.startswith("Moving the internal meta data to its proper location\n")
    new = layout("internal", size + growth, size + growth)
    after = content(path, new)
    block = Superblock.unpack(after["superblock"])
    flags = before.flags | MdFlag.AL_CLEAN
    assert block == replace(before, flags=flags, magic=MAGIC_CLEAN).placed(new)
    assert after["ring"] == content(reference, old)["ring"]
    bits = content(reference, old)["bitmap"][: n_bits_of(before.la_size_sect * SECTOR) // 8]
    assert after["bitmap"][: len(bits)] == bits and any(bits)
    assert not any(after["bitmap"][len(bits) + 8 :])
    assert drbdmeta(path, "get-gi") == ours(meta.get_gi, path)
    assert known.read_text().startswith(f"{size + growth}\t")
    if growth > 10 * MIB:
        with path.open("rb") as file:
            file.seek(old.superblock)
            assert not any(file.read(4096))


def test_a_grown_disk_is_dumped_from_where_it_was(here: Path) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB)
    known = here / "known"
    assert ours(meta.check_resize, path, last_known=known).code == 0
    with path.open("r+b") as file:
        file.truncate(80 * MIB)
    got = ours(meta.dump_md, path, last_known=known)
    assert got.code == 0
    assert f"### current size of {path}: {80 * MIB} byte\n" in got.out
    assert "## md_offset 83881984\n" in got.out and "# md_offset 67104768\n" in got.out


def test_another_disk_is_not_taken_for_the_grown_one(here: Path) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB)
    known = here / "known"
    with path.open("r+b") as file:
        file.truncate(80 * MIB)
    for remembered in (LastKnown(64 * MIB, str(path), 0x1234), LastKnown(64 * MIB, "/dev/other", 0)):
        remembered.write(str(known))
        got = ours(meta.check_resize, path, last_known=known, force=False)
        assert (got.code, got.out) == (1, "") and got.err.endswith("no suitable meta data found :(\n")
    for text in ("", "x\ty\n", "12", "67108864\t/x\nuuid:\tzz\n"):
        known.write_text(text)
        assert ours(meta.check_resize, path, last_known=known).code == 1
    assert ours(meta.check_resize, path, kind="indexed") == drbdmeta(path, "check-resize", kind="indexed")


class Crash(Exception):
    """The machine stopped."""


@pytest.mark.parametrize("growth", [4096, 40960, 100 * MIB])
@pytest.mark.parametrize("flags", [0x13, 0x91])
def test_a_crash_while_moving_loses_no_bit(
    here: Path, growth: int, flags: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop before every single write and flush, then do what an operator does: repeat the command."""
    size = 300 * MIB
    ring, _ = ring_of(random.Random(3), layout("internal", size, size), 9)
    original, _ = used_disk(here / "original", size, flags, ring=ring if flags == 0x13 else None)
    known, path = here / "known", here / "disk"
    clone(original, path)
    with FileStore(str(path)) as store:
        loaded = attach.load(store, size, "internal", 0)
    must = int.from_bytes(loaded.bitmap.words(0, 2000), "little")
    left = 0

    def counted(name: str) -> None:
        inner = getattr(FileStore, name)

        def call(self: FileStore, *args: object) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise Crash
            inner(self, *args)

        monkeypatch.setattr(FileStore, name, call)

    for name in ("write", "flush", "zero"):
        counted(name)
    dies_at, finished = 0, False
    while not finished:
        dies_at += 1
        clone(original, path)
        LastKnown(size, str(path)).write(str(known))
        with path.open("r+b") as file:
            file.truncate(size + growth)
        left = dies_at
        try:
            finished = ours(meta.check_resize, path, last_known=known).code == 0
        except Crash:
            left = 0
            assert ours(meta.check_resize, path, last_known=known).code == 0, dies_at
        left = 0
        with FileStore(str(path)) as store:
            found = attach.load(store, store.size, "internal", 0).bitmap
        assert must & ~int.from_bytes(found.words(0, 2000), "little") == 0, dies_at
    assert dies_at > 5


def test_a_device_of_15_tib_is_ready_in_seconds(here: Path) -> None:
    size = 15 << 40
    path = disk(here / "disk", size)
    assert ours(meta.create_md, path).code == 0
    with FileStore(str(path)) as store:
        fresh, where = attach.read_superblock(store, size, "internal")
        used = replace(fresh, la_size_sect=where.usable // SECTOR, flags=MdFlag(0x13), magic=MAGIC_UNCLEAN)
        store.write(where.superblock, used.pack())
        store.write(where.bitmap + 12345 * 4096, b"\xff" * 4096)
        log = ActivityLog()
        log.want(where.usable // AL_EXTENT - 1)
        transaction = log.begin()
        assert transaction is not None
        store.write(where.al, transaction.block)
        started = time.perf_counter()
        loaded = attach.load(store, size, "internal", 0)
        assert time.perf_counter() - started < 10
    assert loaded.bitmap.n_bits == 4026408951
    assert loaded.bitmap.weight == 32768 + 1024 and loaded.marked == 1024


# -------------------------------------------------------------------- claims and the console


def test_a_disk_in_use_is_refused(here: Path) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB)
    with FileStore(str(path)) as holder:
        for command in (meta.get_gi, meta.create_md, meta.wipe_md, meta.apply_al, meta.dump_md):
            refused = ours(command, path)
            assert refused.code == 20 and refused.out == ""
            assert refused.err.startswith(
                f"open({path}) failed: Device or resource busy\nLower device is already"
            )
        holder.close()
        assert ours(meta.get_gi, path).code == 0


def test_slots_of_one_metadata_device_are_claimed_one_by_one(here: Path) -> None:
    path = disk(here / "disk", 256 * MIB)
    with FileStore(str(path), meta=True, index=0), FileStore(str(path), meta=True, index=1):
        for index in (0, 1, None):
            with pytest.raises(MetadataError) as caught:
                FileStore(str(path), meta=True, index=index)
            assert (caught.value.code, caught.value.exit_code) == (115, 20)
    FileStore(str(path)).close()


def test_what_is_no_disk(here: Path) -> None:
    for name, code in (("/dev/null", 107), (str(here), 107), (str(here / "nothing"), 104)):
        with pytest.raises(MetadataError) as caught:
            FileStore(name)
        assert (caught.value.code, caught.value.exit_code) == (code, 20) and name in str(caught.value)
    with FileStore(str(disk(here / "disk", 8192))) as store:
        with pytest.raises(
            MetadataError, match="reading 4096 bytes at byte offset 8192 failed: the device ends"
        ):
            store.read(8192, 4096)
        store.write(4096, b"\x01" * 4096)
        store.zero(4096, 512)
        store.flush()
        assert store.read(4096, 1024) == bytes(512) + b"\x01" * 512
        with (here / "disk").open("r+b") as file:
            file.truncate(16384)
        assert store.size == 8192 and store.refresh() == 16384


def test_the_data_device_of_external_metadata_is_claimed_too(here: Path) -> None:
    metadata, data = disk(here / "meta", MIB), disk(here / "data", 64 * MIB)
    target = meta.Target(str(metadata), "flexible", data_path=str(data))
    console = meta.Console(io.StringIO(), io.StringIO(), force=True)
    with FileStore(str(data)):
        assert meta.create_md(target, console) == 20
    assert not image(metadata)
    assert meta.create_md(target, console) == 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("typed", "answer"), [("yes\n", True), ("no\n", False), ("YES\n", False), ("", False)]
)
def test_a_question_needs_a_typed_yes(typed: str, answer: bool) -> None:
    err = io.StringIO()
    assert confirm_at_terminal(Terminal(typed), err) is answer
    assert err.getvalue() == "[need to type 'yes' to confirm] \n"
    err = io.StringIO()
    assert confirm_at_terminal(io.StringIO("yes\n"), err) is False
    assert err.getvalue() == "stdin not a TTY, not waiting for confirmation\n"


def test_sizes_are_printed_as_drbdmeta_does() -> None:
    sizes = {0: "0 KB", 9999: "9999 KB", 10000: "10 MB", 45056: "44 MB", 4096: "4096 KB", 1 << 40: "1024 TB"}
    assert {kib: size_text(kib) for kib in sizes} == sizes
