"""Our metadata against drbdmeta: the same bytes, the same text, the same answers, in both directions."""

from __future__ import annotations

import random
import re
import struct
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.repl.activity_log import initialised_block
from tandem.repl.edge.store import FileStore
from tandem.repl.metadata import Superblock
from tandem.repl.units import SECTOR, n_bits_of
from tandem.tools import meta
from tandem.tools.dump import parse_dump

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
    verify,
)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


# -------------------------------------------------------------------- create-md and wipe-md


@pytest.mark.parametrize(
    ("kind", "size", "options"),
    [
        ("internal", 69632, {}),
        ("internal", MIB, {}),
        ("internal", 300 * MIB + 512, {}),
        ("internal", 1 << 30, {"al_stripes": 4, "al_stripe_size_kb": 33}),
        ("internal", 1 << 30, {"al_stripes": 7, "al_stripe_size_kb": 64}),
        ("internal", MIB, {"peer_max_bio_size": 65536}),
        ("flexible", MIB, {}),
        ("flexible", 8 * MIB + 512, {"al_stripes": 2}),
        ("indexed", 128 * MIB, {}),
    ],
)
def test_create_md_gives_the_same_bytes(here: Path, kind: str, size: int, options: dict[str, Any]) -> None:
    # The old superblock of another kind or place is no concern of create-md: both start from zeros.
    theirs, mine = disk(here / "theirs", size), disk(here / "mine", size)
    names = {"al_stripes": "--al-stripes", "al_stripe_size_kb": "--al-stripe-size-kB"}
    names["peer_max_bio_size"] = "--peer-max-bio-size"
    arguments = [word for name, value in options.items() for word in (names[name], str(value))]
    expected = drbdmeta(theirs, "create-md", *arguments, kind=kind)
    got = ours(meta.create_md, mine, kind=kind, **options)
    assert (got.code, got.out) == (expected.code, expected.out) == (0, got.out)
    assert image(theirs) == image(mine)
    if kind == "internal":
        assert got.err == expected.err
    assert drbdmeta(mine, "get-gi", kind=kind) == ours(meta.get_gi, theirs, kind=kind)


def test_create_md_in_place_of_rubbish_gives_the_same_metadata(here: Path) -> None:
    rubbish = random.Random(5).randbytes(300 * 1024)
    theirs, mine = disk(here / "disk", MIB), disk(here / "mine", MIB)
    for path in (theirs, mine):
        path.write_bytes((rubbish * 4)[:MIB])
    expected, got = drbdmeta(theirs, "create-md"), ours(meta.create_md, mine)
    assert (got.code, got.out) == (expected.code, expected.out) and "Found some data" in got.out
    assert image(theirs) == image(mine)


@pytest.mark.parametrize(
    ("size", "arguments", "options"),
    [
        (69631, (), {}),
        (MIB, ("--al-stripe-size-kB", "16"), {"al_stripe_size_kb": 16}),
        (MIB, ("--al-stripes", "2000"), {"al_stripes": 2000}),
        (MIB, ("--peer-max-bio-size", "2M"), {"peer_max_bio_size": 2 << 20}),
    ],
)
def test_create_md_refuses_alike(
    here: Path, size: int, arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    path = disk(here / "disk", size)
    expected = drbdmeta(path, "create-md", *arguments)
    got = ours(meta.create_md, path, **options)
    assert got == expected and got.code == 10
    assert not image(path)


def test_create_md_in_a_slot_beyond_the_end(here: Path) -> None:
    path = disk(here / "disk", 128 * MIB)
    assert ours(meta.create_md, path, kind="indexed", index=1) == drbdmeta(path, "create-md", index="1")
    assert ours(meta.create_md, path, kind="indexed", index=256) == drbdmeta(path, "create-md", index="256")


@pytest.mark.parametrize("kind", ["internal", "flexible"])
def test_replacing_metadata_asks_the_same_question(here: Path, kind: str) -> None:
    theirs, mine = disk(here / "disk", MIB), disk(here / "mine", MIB)
    for path in (theirs, mine):
        assert ours(meta.create_md, path, kind=kind).code == 0
    expected = drbdmeta(theirs, "create-md", kind=kind)
    got = ours(meta.create_md, mine, kind=kind)
    assert got.out == expected.out.replace(str(theirs), str(mine))
    lines = expected.err.replace(str(theirs), str(mine)).splitlines()
    assert got.err.splitlines()[: len(lines) - 1] == lines[:-1]  # the last is about the size of the bitmap
    before = image(mine)
    declined = ours(meta.create_md, mine, kind=kind, force=False)
    assert declined.code == 1 and declined.out == "Operation cancelled.\n" and image(mine) == before


def test_metadata_of_another_format_are_asked_about(here: Path) -> None:
    path = disk(here / "disk", MIB)
    subprocess.run(
        ["drbdmeta", "--force", "-", "v09", str(path), "internal", "create-md", "1"],
        capture_output=True, stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    declined = ours(meta.create_md, path, force=False)
    assert declined.code == 1 and "There appears to be a v09 flexible-size internal" in declined.err
    assert "format v09, not v08" in ours(meta.get_gi, path).err


def ext4(path: Path, size: int, *, kib: int = 0) -> Path:
    disk(path, size)
    command = ["mkfs.ext4", "-q", "-F", str(path), *([f"{kib}k"] if kib else [])]
    subprocess.run(command, check=True, capture_output=True)
    with path.open("r+b") as file:
        file.truncate(size)
    return path


def swap(path: Path, size: int) -> Path:
    disk(path, size)
    subprocess.run(["mkswap", str(path)], check=True, capture_output=True)
    return path


def xfs(path: Path, size: int) -> Path:
    return disk(path, size, struct.pack(">4sIQ", b"XFSB", 4096, size // 4096))


def lvm(path: Path, size: int) -> Path:
    return disk(path, size, bytes(512) + b"LABELONE" + bytes(16) + b"LVM2 001")


@pytest.mark.parametrize("kind", ["internal", "flexible"])
@pytest.mark.parametrize("make", [ext4, swap, xfs, lvm])
def test_what_is_in_use_is_not_truncated(here: Path, kind: str, make: Callable[[Path, int], Path]) -> None:
    path = make(here / "disk", 32 * MIB)
    before = image(path)
    expected, got = drbdmeta(path, "create-md", kind=kind), ours(meta.create_md, path, kind=kind)
    assert got.code == 40 and "Operation refused." in got.out
    assert image(path) == before
    # drbdmeta asks LVM's own tools about the size, and says on stderr when there are none.
    assert (got.code, got.out) == (expected.code, expected.out)


def test_a_file_system_with_room_behind_it(here: Path) -> None:
    theirs, mine = ext4(here / "disk", 64 * MIB, kib=40000), here / "mine"
    clone(theirs, mine)
    declined = ours(meta.create_md, mine, force=False)
    assert declined.code == 1 and declined.out.endswith("only a guess.\nOperation canceled.\n")
    assert image(mine) == image(theirs)
    expected, got = drbdmeta(theirs, "create-md"), ours(meta.create_md, mine)
    assert got == expected and got.code == 0
    assert image(mine) == image(theirs)
    subprocess.run(["e2fsck", "-fn", str(mine)], check=True, capture_output=True)


def test_wipe_md(here: Path) -> None:
    path, where = used_disk(here / "disk")
    declined = ours(meta.wipe_md, path, force=False)
    assert (declined.code, declined.out) == (1, "Operation cancelled.\n")
    copy = here / "copy"
    clone(path, copy)
    assert ours(meta.wipe_md, path) == drbdmeta(copy, "wipe-md")
    assert image(path) == image(copy)
    assert ours(meta.wipe_md, path) == drbdmeta(copy, "wipe-md")
    assert not any(content(path, where)["superblock"])


# -------------------------------------------------------------------- the superblock


@pytest.mark.parametrize("flags", [0x80, 0x81, 0x91, 0xB1, 0x13, 0x33, 0x17, 0x44, 0xC8, 0x71, 0x117, 0x9F])
def test_identifiers_and_states_are_shown_alike(here: Path, flags: int) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB, flags, seed=flags)
    for command, mine in (
        ("get-gi", meta.get_gi), ("show-gi", meta.show_gi), ("dstate", meta.dstate),
        ("read-dev-uuid", meta.read_dev_uuid),
    ):  # fmt: skip
        assert ours(mine, path) == drbdmeta(path, command), command


@pytest.mark.parametrize("flags", [0x91, 0x81, 0x80, 0x13, 0x9F])
def test_outdate_and_invalidate_change_the_same_bytes(here: Path, flags: int) -> None:
    for command, mine in (("outdate", meta.outdate), ("invalidate", meta.invalidate)):
        path, where = used_disk(here / "disk", 64 * MIB, flags)
        copy = here / "copy"
        clone(path, copy)
        assert ours(mine, path) == drbdmeta(copy, command)
        assert content(path, where) == content(copy, where)


@pytest.mark.parametrize(
    "text", ["1:2:3:4:1:1:0:0:0:0:0", ":::::::::1:", "ABCDEF", "::0123456789abcdef", ":::::0:1:0:1:0:1"]
)
def test_set_gi(here: Path, text: str) -> None:
    path, where = used_disk(here / "disk", 64 * MIB)
    copy = here / "copy"
    clone(path, copy)
    assert ours(meta.set_gi, path, text) == drbdmeta(copy, "set-gi", text)
    assert content(path, where) == content(copy, where)
    declined = ours(meta.set_gi, path, "5", force=False)
    assert declined.code == 0 and declined.out.endswith("Operation canceled.\n")
    assert content(path, where) == content(copy, where)


@pytest.mark.parametrize("text", ["zz", "1" * 17, ":::::7:", "0:0:0:0:1:1:1:1:1:1:1:1", "-1", "1:2:3:4:01"])
def test_set_gi_refuses_what_is_no_gi(here: Path, text: str) -> None:
    path, where = used_disk(here / "disk", 64 * MIB)
    before = content(path, where)
    refused = ours(meta.set_gi, path, text)
    assert refused.code == 10 and refused.err.count("\n") == 1 and refused.err.startswith("'")
    assert content(path, where) == before


def test_dev_uuid(here: Path) -> None:
    path, where = used_disk(here / "disk", 64 * MIB)
    copy = here / "copy"
    clone(path, copy)
    assert ours(meta.write_dev_uuid, path, "12AB") == drbdmeta(copy, "write-dev-uuid", "12AB")
    assert content(path, where) == content(copy, where)
    assert ours(meta.read_dev_uuid, path).out == "00000000000012AB\n"
    assert ours(meta.write_dev_uuid, path, "xyz").code == 10


def test_without_metadata_the_exit_codes_are_the_same(here: Path) -> None:
    path = disk(here / "disk", MIB)
    for command, mine, args in (
        ("get-gi", meta.get_gi, ()),
        ("show-gi", meta.show_gi, ()),
        ("dstate", meta.dstate, ()),
        ("outdate", meta.outdate, ()),
        ("invalidate", meta.invalidate, ()),
        ("apply-al", meta.apply_al, ()),
        ("dump-md", meta.dump_md, ()),
        ("read-dev-uuid", meta.read_dev_uuid, ()),
        ("set-gi", meta.set_gi, ("1",)),
        ("check-resize", meta.check_resize, ()),
        ("write-dev-uuid", meta.write_dev_uuid, ("1",)),
        ("wipe-md", meta.wipe_md, ()),
    ):
        expected, got = drbdmeta(path, command, *args), ours(mine, path, *args)
        assert (got.code, got.out) == (expected.code, expected.out), command
        assert got.err.startswith(expected.err.rstrip("\n")) and got.err, command
    missing = ours(meta.get_gi, here / "nothing")
    assert missing == drbdmeta(here / "nothing", "get-gi") and missing.code == 20


@pytest.mark.parametrize("field", ["bm_offset", "al_offset", "md_size_sect"])
def test_damaged_superblocks_are_noticed_alike(here: Path, field: str) -> None:
    path, where = used_disk(here / "disk", 64 * MIB)
    with FileStore(str(path)) as store:
        good = Superblock.unpack(store.read(where.superblock, 4096))
        store.write(where.superblock, replace(good, **{field: getattr(good, field) + 1}).pack())
    assert ours(meta.dstate, path) == drbdmeta(path, "dstate")


# -------------------------------------------------------------------- dump and restore


def body(text: str) -> str:
    """A dump without its head; drbdmeta before 9.33 prints 0 for the flags of this format."""
    return re.sub(r"flags 0x[0-9A-F]{8};", "flags X;", text.partition("version")[2])


@pytest.mark.parametrize(
    ("size", "stripes", "la_size_sect"),
    [
        (64 * MIB, 1, None),
        (300 * MIB, 1, None),
        (300 * MIB, 4, 500000),
        (2600 * MIB, 1, None),
        (64 * MIB, 1, 0),
        (64 * MIB, 1, 1 << 30),
    ],
)
def test_dump_md_gives_the_same_text(here: Path, size: int, stripes: int, la_size_sect: int | None) -> None:
    if la_size_sect == 0:
        path = disk(here / "disk", size)
        assert ours(meta.create_md, path).code == 0
    else:
        path, _ = used_disk(here / "disk", size, stripes=stripes, la_size_sect=la_size_sect)
    expected, got = drbdmeta(path, "dump-md"), ours(meta.dump_md, path)
    assert got.code == expected.code == 0
    assert body(got.out) == body(expected.out)
    head = r"^# DRBD meta data dump\n# \d{4}-.* \[\d+\]\n# \S+> tandemadm dump-md\n#\n\nversion"
    assert re.search(head, got.out, re.MULTILINE)


def test_dump_md_of_every_kind_of_bitmap_line(here: Path) -> None:
    """Words that repeat for 1 to 70 words, at every position, cross what the printer joins and what not."""
    path, where = used_disk(here / "disk", 2600 * MIB)
    rng = random.Random(8)
    words = bytearray()
    while len(words) < where.bitmap_bytes - 8192:
        word = rng.choice(
            [b"\xff" * 8, bytes(8), rng.randbytes(4) * 2, rng.randbytes(8), b"\0\0\0\0\xff\xff\xff\xff"]
        )
        words += word * rng.choice([1, 1, 2, 3, 4, 7, 8, 9, 15, 16, 31, 32, 33, 64, 70, 600])
    with FileStore(str(path)) as store:
        store.write(where.bitmap, words[: where.bitmap_bytes - 8192])
    expected, got = drbdmeta(path, "dump-md"), ours(meta.dump_md, path)
    assert body(got.out) == body(expected.out)


def test_unclean_metadata_are_dumped_only_by_force(here: Path) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB, 0x13)
    refused = ours(meta.dump_md, path, force=False)
    assert refused == Result(1, "", 'Found meta data is "unclean", please apply-al first\n')
    expected, got = drbdmeta(path, "dump-md"), ours(meta.dump_md, path)
    assert (body(got.out), got.err) == (body(expected.out), expected.err)
    dump = here / "dump"
    dump.write_text(got.out)
    assert ours(meta.restore_md, path, str(dump)).code == 10


@pytest.mark.parametrize("stripes", [1, 4])
def test_dumps_are_restored_both_ways(here: Path, stripes: int) -> None:
    source, where = used_disk(here / "disk", 300 * MIB, stripes=stripes)
    mine, theirs = ours(meta.dump_md, source).out, drbdmeta(source, "dump-md").out
    for text in (mine, theirs):
        dump = here / "dump"
        dump.write_text(text)
        restored = disk(here / "a", 300 * MIB), disk(here / "b", 300 * MIB)
        expected, got = (
            drbdmeta(restored[0], "restore-md", str(dump)),
            ours(meta.restore_md, restored[1], str(dump)),
        )
        assert got == expected and got.code == 0
        # drbdmeta 9.22 leaves whatever was there where the ring should be.
        assert content(restored[1], where)["ring"] == initialised_block() * where.al_blocks
        assert content(restored[1], where)["bitmap"] == content(restored[0], where)["bitmap"]
        assert content(restored[1], where)["bitmap"] == content(source, where)["bitmap"]
        assert body(ours(meta.dump_md, restored[0]).out) == body(ours(meta.dump_md, restored[1]).out)
        assert content(restored[1], where)["superblock"] == content(restored[0], where)["superblock"]
        assert verify(str(dump)) == Result(0, "input file parsed ok\n", "")


def test_restoring_keeps_the_flags_of_our_dumps(here: Path) -> None:
    source, _ = used_disk(here / "disk", 64 * MIB, 0xB1)
    dump = here / "dump"
    dump.write_text(ours(meta.dump_md, source).out)
    gi = ours(meta.get_gi, source).out
    assert drbdmeta(disk(here / "other", 64 * MIB), "restore-md", str(dump)).code == 0
    assert ours(meta.get_gi, here / "other").out == gi
    declined = ours(meta.restore_md, source, str(dump), force=False)
    assert (declined.code, declined.out) == (1, "")
    asked = ours(meta.restore_md, source, str(dump))
    assert asked == drbdmeta(source, "restore-md", str(dump))


def test_restoring_on_another_size_with_another_activity_log(here: Path) -> None:
    source, _ = used_disk(here / "disk", 300 * MIB)
    dump = here / "dump"
    dump.write_text(ours(meta.dump_md, source).out)
    small = disk(here / "small", 200 * MIB, b"\xee" * MIB)
    with small.open("r+b") as file:
        file.seek(199 * MIB)
        file.write(b"\xee" * MIB)
    got = ours(meta.restore_md, small, str(dump), al_stripes=4, al_stripe_size_kb=64)
    assert got.code == 0 and "# la-size-sect was too big" in got.out and "truncated!" in got.err
    again = drbdmeta(small, "dump-md").out
    assert "al-stripes 4;\nal-stripe-size-4k 16;" in again
    whole = parse_dump(dump.read_text())
    n_bits = n_bits_of(parse_dump(again).superblock.la_size_sect * SECTOR)
    assert parse_dump(again).bitmap(n_bits)[0].words(0, 800) == whole.bitmap(n_bits)[0].words(0, 800)


def test_dumps_that_cannot_be_parsed(here: Path) -> None:
    path, _ = used_disk(here / "disk", 64 * MIB)
    good = ours(meta.dump_md, path).out
    dump = here / "dump"
    changes = [
        ("version", "foo"),
        ('"v08"', '"v09"'),
        ('"v08"', "8"),
        ('"v08"', '"' + "a" * 30 + '"'),
        ("0x", "0x1"),
        ("la-size-sect ", "la-size "),
        ("la-size-sect 130992", "la-size-sect 0x12"),
        ("bm {", "bm { xx"),
        ("bm {", "bm { 12;"),
        ("bm {", "bm { 12 times 12;"),
        ("}", ""),
        ("version", "version $"),
        ("la-size-sect 130992", "la-size-sect 99999999999999999999999"),
        ("al-stripes 1;", "al-stripes 1"),
    ]
    texts = [good.replace(old, new, 1) for old, new in changes] + [
        "",
        good + "foo",
        good.rstrip().rsplit("}", 1)[0],
    ]
    for text in texts:
        dump.write_text(text)
        expected, got = drbdmeta(path, "verify-dump", str(dump)), verify(str(dump))
        assert (got.code, got.err) == (expected.code, expected.err) and got.code == 10, text[:200]
    unreadable = verify(str(here / "nothing"))
    assert unreadable.code == drbdmeta(path, "verify-dump", str(here / "nothing")).code == 20
