"""Our metadata against drbdmeta: the same bytes, the same text, the same answers, in both directions."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tandem.repl import attach
from tandem.repl.activity_log import ActivityLog
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import MAGIC_CLEAN, MAGIC_UNCLEAN, Layout, MdFlag, Superblock, layout
from tandem.repl.units import AL_EXTENT, SECTOR, n_bits_of
from tandem.tools import meta
from tandem.tools.dump import parse_dump
from tandem.tools.meta_disk import LastKnown, confirm_at_terminal, size_text

MIB = 1 << 20
NOISE = re.compile(r"BLKSSZGET|BLKZEROOUT|using pwrite")  # drbdmeta's remarks about files
INDEX = {"internal": "internal", "flexible": "flex-external", "indexed": "0"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def drbdmeta(path: Path, *command: str, kind: str = "internal", index: str = "") -> Result:
    program = shutil.which("drbdmeta") or "/usr/sbin/drbdmeta"
    done = subprocess.run(
        [program, "--force", "-", "v08", str(path), index or INDEX[kind], *command],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    err = "".join(line for line in done.stderr.splitlines(True) if not NOISE.search(line))
    return Result(done.returncode, done.stdout, err)


def ours(
    command: Callable[..., int], path: Path, *args: str, kind: str = "internal", force: bool = True,
    last_known: Path | None = None, index: int = 0, **options: int,
) -> Result:  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    console = meta.Console(out, err, force, confirm=lambda: False)
    target = meta.Target(str(path), kind, index, last_known=str(last_known or ""))
    code = command(target, console, *args, **options)
    return Result(code, out.getvalue(), err.getvalue())


def verify(dump: str) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code = meta.verify_dump(meta.Console(out, err), dump)
    return Result(code, out.getvalue(), err.getvalue())


def disk(path: Path, size: int, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        file.write(content)
    return path


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path


def used_disk(
    path: Path, size: int = 300 * MIB, flags: int = 0x91, *, stripes: int = 1, stripe_size: int = 8,
    ring: dict[int, bytes] | None = None, seed: int = 1, la_size_sect: int | None = None,
) -> tuple[Path, Layout]:  # fmt: skip
    """A disk as a kernel would leave it: random bits, random identifiers; clean if AL_CLEAN is in *flags*."""
    rng = random.Random(seed)
    disk(path, size)
    where = layout("internal", size, size, al_stripes=stripes, al_stripe_size_4k=stripe_size)
    la = where.usable // SECTOR if la_size_sect is None else la_size_sect
    with FileStore(str(path)) as store:
        attach.write_ring(store, where)
        for position, block in (ring or {}).items():
            store.write(where.al + position * 4096, block)
        bitmap = attach.read_bitmap(store, where, n_bits_of(min(la * SECTOR, where.usable)))
        for _ in range(30):
            first = rng.randrange(bitmap.n_bits)
            bitmap.set(first, min(first + rng.choice([1, 3, 64, 128, 4096]), bitmap.n_bits))
        attach.write_changed_pages(store, where, bitmap)
        superblock = Superblock(
            la_size_sect=la, current=rng.getrandbits(64), bitmap=rng.getrandbits(64), history0=rng.getrandbits(64),
            history1=4, device_uuid=rng.getrandbits(64), flags=MdFlag(flags), al_nr_extents=1237,
            magic=MAGIC_CLEAN if flags & 0x80 else MAGIC_UNCLEAN, la_peer_max_bio_size=1 << 20,
        )  # fmt: skip
        store.write(where.superblock, superblock.placed(where).pack())
        store.flush()
    return path, where


def clone(source: Path, copy: Path) -> None:
    """Copy a sparse file as a sparse file."""
    subprocess.run(["cp", "--sparse=always", str(source), str(copy)], check=True)


def image(path: Path) -> dict[int, bytes]:
    """Every 4 KiB of the file that is not zero, without reading its holes."""
    found = {}
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // 4096 * 4096
            except OSError:  # only a hole is left
                break
            block = os.pread(file.fileno(), 4096, at)
            if any(block):
                found[at] = block
            at += 4096
    return found


def content(path: Path, where: Layout) -> dict[str, bytes]:
    """The three areas as they are on disk."""
    with FileStore(str(path)) as store:
        return {
            "superblock": store.read(where.superblock, 4096),
            "ring": store.read(where.al, where.al_blocks * 4096),
            "bitmap": store.read(where.bitmap, where.bitmap_bytes),
        }


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
def test_create_md_gives_the_same_bytes(here: Path, kind: str, size: int, options: dict[str, int]) -> None:
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
    here: Path, size: int, arguments: tuple[str, ...], options: dict[str, int]
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
        ("get-gi", meta.get_gi, ()), ("show-gi", meta.show_gi, ()), ("dstate", meta.dstate, ()),
        ("outdate", meta.outdate, ()), ("invalidate", meta.invalidate, ()), ("apply-al", meta.apply_al, ()),
        ("dump-md", meta.dump_md, ()), ("read-dev-uuid", meta.read_dev_uuid, ()), ("set-gi", meta.set_gi, ("1",)),
        ("check-resize", meta.check_resize, ()), ("write-dev-uuid", meta.write_dev_uuid, ("1",)),
        ("wipe-md", meta.wipe_md, ()),
    ):  # fmt: skip
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
        (64 * MIB, 1, None), (300 * MIB, 1, None), (300 * MIB, 4, 500000), (2600 * MIB, 1, None), (64 * MIB, 1, 0),
        (64 * MIB, 1, 1 << 30),
    ],
)  # fmt: skip
def test_dump_md_gives_the_same_text(here: Path, size: int, stripes: int, la_size_sect: int | None) -> None:
    if la_size_sect == 0:
        path = disk(here / "disk", size)
        assert ours(meta.create_md, path).code == 0
    else:
        path, _ = used_disk(here / "disk", size, stripes=stripes, la_size_sect=la_size_sect)
    expected, got = drbdmeta(path, "dump-md"), ours(meta.dump_md, path)
    assert got.code == expected.code == 0
    assert body(got.out) == body(expected.out)
    assert re.match(
        r"# DRBD meta data dump\n# \d{4}-.* \[\d+\]\n# \S+> tandemadm dump-md\n#\n\nversion", got.out
    )


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
        assert content(restored[1], where)["ring"] == content(restored[0], where)["ring"]
        assert content(restored[1], where)["bitmap"] == content(restored[0], where)["bitmap"]
        assert content(restored[1], where)["bitmap"] == content(source, where)["bitmap"]
        assert body(ours(meta.dump_md, restored[0]).out) == body(ours(meta.dump_md, restored[1]).out)
        assert content(restored[1], where)["superblock"] == content(restored[0], where)["superblock"]
        assert verify(str(dump)) == drbdmeta(source, "verify-dump", str(dump))


def test_restoring_keeps_the_flags_of_our_dumps(here: Path) -> None:
    source, where = used_disk(here / "disk", 64 * MIB, 0xB1)
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
        ("version", "foo"), ('"v08"', '"v09"'), ('"v08"', "8"), ('"v08"', '"' + "a" * 30 + '"'), ("0x", "0x1", ),
        ("la-size-sect ", "la-size "), ("la-size-sect 130992", "la-size-sect 0x12"), ("bm {", "bm { xx"),
        ("bm {", "bm { 12;"), ("bm {", "bm { 12 times 12;"), ("}", ""), ("version", "version $"),
        ("la-size-sect 130992", "la-size-sect 99999999999999999999999"), ("al-stripes 1;", "al-stripes 1"),
    ]  # fmt: skip
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


# -------------------------------------------------------------------- apply-al


def ring_of(rng: random.Random, where: Layout, n: int, slots: int = 67) -> tuple[dict[int, bytes], int]:
    """A ring after *n* transactions, and the place of the newest."""
    log = ActivityLog(slots, where.al_blocks, where.al_stripes)
    ring = dict(log.initial_ring())
    n_extents = where.usable // AL_EXTENT + 1
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
