"""The placement of metadata and the superblock as bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import (
    MAGIC_CLEAN,
    MAGIC_UNCLEAN,
    UUID_JUST_CREATED,
    MdFlag,
    Superblock,
    bitmap_area,
    layout,
)

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

# device bytes, superblock offset, md_size_sect, al_offset, bm_offset, bitmap bytes, usable sectors
INTERNAL = [
    (69632, 65536, 80, -64, -72, 4096, 56),
    (1 * MIB, 1044480, 80, -64, -72, 4096, 1968),
    (64 * MIB, 67104768, 80, -64, -72, 4096, 130992),
    (128 * MIB, 134213632, 80, -64, -72, 4096, 262064),
    (128 * MIB + 4096, 134217728, 88, -64, -80, 8192, 262064),
    (256 * MIB, 268431360, 88, -64, -80, 8192, 524200),
    (1000000000, 999993344, 136, -64, -128, 32768, 1952984),
    (1 * GIB, 1073737728, 136, -64, -128, 32768, 2097016),
    (1 * GIB + 512, 1073737728, 144, -64, -136, 36864, 2097008),
    (5000000000, 4999995392, 376, -64, -368, 155648, 9765248),
    (1 * TIB, 1099511623680, 65608, -64, -65600, 33554432, 2147418040),
]


@pytest.mark.parametrize(("size", "at", "md_size", "al", "bm", "bytes_", "usable"), INTERNAL)
def test_internal_placement(
    size: int, at: int, md_size: int, al: int, bm: int, bytes_: int, usable: int
) -> None:
    where = layout("internal", size, size)
    assert (where.superblock, where.md_size_sect, where.al_offset, where.bm_offset) == (at, md_size, al, bm)
    assert (where.bitmap_bytes, where.usable) == (bytes_, usable * 512)
    assert where.al == at + al * 512 and where.bitmap == at + bm * 512


@pytest.mark.parametrize(
    ("stripes", "size_4k", "md_size", "al", "bm"),
    [(4, 8, 328, -256, -320), (7, 16, 968, -896, -960), (3, 8, 264, -192, -256)],
)
def test_striped_activity_log(stripes: int, size_4k: int, md_size: int, al: int, bm: int) -> None:
    where = layout("internal", GIB, GIB, al_stripes=stripes, al_stripe_size_4k=size_4k)
    assert (where.md_size_sect, where.al_offset, where.bm_offset) == (md_size, al, bm)
    assert where.al_blocks == stripes * size_4k


def test_kernel_and_tool_agree_on_the_bitmap_area() -> None:
    # The kernel counts ALIGN(ALIGN(S, 32768) / 32768, 8) sectors.
    for sectors in (1, 8, 511, 512, 513, 262143, 262144, 262145, 2097153, 1 << 41):
        bm_sectors = (sectors + 32767) // 32768
        kernel = (bm_sectors + 7) // 8 * 8 * 512
        assert bitmap_area(sectors) == kernel


def test_external_placement() -> None:
    flexible = layout("flexible", MIB, 640 * MIB)
    assert (flexible.superblock, flexible.md_size_sect, flexible.al_offset, flexible.bm_offset) == (
        0,
        2048,
        8,
        72,
    )
    assert flexible.usable == 1310720 * 512
    second = layout("indexed", 512 * MIB, 640 * MIB, index=1)
    assert (second.superblock, second.md_size_sect, second.al_offset, second.bm_offset) == (
        128 * MIB,
        262144,
        8,
        72,
    )
    assert (second.al, second.bitmap) == (128 * MIB + 4096, 128 * MIB + 36864)
    assert second.usable == 1310720 * 512


def test_external_usable_size_is_limited_by_the_bitmap() -> None:
    assert layout("indexed", 512 * MIB, 16 * TIB).usable == 8587575296 * 512
    assert layout("flexible", MIB, 16 * TIB).usable == (2048 - 72) * 32768 * 512
    assert layout("flexible", MIB, 1000001).usable == 1000001 // 512 * 512


@pytest.mark.parametrize(
    ("kind", "size", "index", "stripes", "size_4k", "sentence"),
    [
        ("internal", 69631, 0, 1, 8, "sdx is only 69631 bytes. That's not enough."),
        ("flexible", 4096, 0, 1, 8, "sdx is only 4096 bytes. That's not enough."),
        (
            "indexed", MIB, 1, 1, 8,
            "Device too small: expecting meta data block at\n"
            "byte offset 134217728, but sdx is only 1048576 bytes.",
        ),
        ("internal", GIB, 0, 1, 4, "invalid (too small) al-stripe* settings"),
        ("internal", GIB, 0, 0, 8, "invalid (too small) al-stripe* settings"),
        ("internal", GIB, 0, 2000, 8, "invalid (too large) al-stripe* settings"),
        (
            "internal", MIB, 0, 100, 8,
            "sdx is only 1048576 bytes: no room is left beside 6416 sectors of metadata"
            " with an activity log of 3200 KiB. Use a larger device or a smaller activity log.",
        ),
    ],
)  # fmt: skip
def test_devices_that_are_too_small(
    kind: str, size: int, index: int, stripes: int, size_4k: int, sentence: str
) -> None:
    with pytest.raises(MetadataError) as caught:
        layout(kind, size, size, index, stripes, size_4k, name="sdx")
    assert str(caught.value) == sentence
    assert (caught.value.code, caught.value.exit_code) == (112, 10)


def created() -> bytes:
    """The superblock drbdmeta creates on 1 MiB (internal)."""
    return bytes.fromhex(
        "0000000000000000 0000000000000004 0000000000000000 0000000000000000"
        "0000000000000000 0000000000000000 0000000000000000 00000080 8374026b 00000050 ffffffc0"
        "00000101 ffffffb8 00001000 00000000 00000001 00000008"
    ) + bytes(4000)  # fmt: skip


def used() -> bytes:
    """A superblock as left by the 8.4.11 kernel on 256 MiB: Primary, its peer gone."""
    return bytes.fromhex(
        "000000000007ffa8 04cb0077531e9ce3 aeb2545196308cfd 0abd990a8337915e"
        "0000000000000004 6037782bde472da4 0000000000000000 00000013 8374026c 00000058 ffffffc0"
        "000004d5 ffffffb0 00001000 00100000 00000001 00000008"
    ) + bytes(4000)  # fmt: skip


def test_fresh_superblock_is_what_create_md_writes() -> None:
    fresh = Superblock.fresh(layout("internal", MIB, MIB), 0)
    assert fresh.pack() == created()
    assert fresh.clean and fresh.current == UUID_JUST_CREATED
    assert fresh.dstate() == "Inconsistent"


def test_superblock_of_a_running_kernel() -> None:
    block = Superblock.unpack(used())
    assert block == Superblock(
        la_size_sect=524200, current=0x04CB0077531E9CE3, bitmap=0xAEB2545196308CFD,
        history0=0x0ABD990A8337915E, history1=4, device_uuid=0x6037782BDE472DA4, magic=MAGIC_UNCLEAN,
        flags=MdFlag.CONSISTENT | MdFlag.PRIMARY_IND | MdFlag.WAS_UP_TO_DATE, md_size_sect=88, al_offset=-64,
        al_nr_extents=1237, bm_offset=-80, la_peer_max_bio_size=1 << 20,
    )  # fmt: skip
    assert block.pack() == used()
    assert not block.clean
    assert block.gi_line() == (
        "04CB0077531E9CE3:AEB2545196308CFD:0ABD990A8337915E:0000000000000004:1:1:1:0:0:0:0"
    )
    block.check(block.layout("internal", 256 * MIB, 256 * MIB))


def test_get_gi_shows_each_flag_in_its_place() -> None:
    expected = {
        MdFlag.CONSISTENT: "1:0:0:0:0:0:0", MdFlag.WAS_UP_TO_DATE: "0:1:0:0:0:0:0",
        MdFlag.PRIMARY_IND: "0:0:1:0:0:0:0", MdFlag.CONNECTED_IND: "0:0:0:1:0:0:0",
        MdFlag.FULL_SYNC: "0:0:0:0:1:0:0", MdFlag.PEER_OUT_DATED: "0:0:0:0:0:1:0",
        MdFlag.CRASHED_PRIMARY: "0:0:0:0:0:0:1", MdFlag.AL_CLEAN: "0:0:0:0:0:0:0",
    }  # fmt: skip
    for flag, digits in expected.items():
        assert Superblock(flags=flag).gi_line().endswith("0000:" + digits), flag


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (0x00, "Inconsistent"),
        (0x10, "Inconsistent"),
        (0x01, "Outdated"),
        (0x11, "Consistent"),
        (0x31, "UpToDate"),
    ],
)
def test_dstate(flags: int, word: str) -> None:
    assert Superblock(flags=MdFlag(flags)).dstate() == word


def test_unknown_flags_survive() -> None:
    block = bytearray(used())
    block[56] = 0x80
    assert Superblock.unpack(block).pack() == bytes(block)


def test_stripes_of_zero_mean_one_of_32_kib() -> None:
    block = used()[:88] + bytes(4008)
    assert (Superblock.unpack(block).al_stripes, Superblock.unpack(block).al_stripe_size_4k) == (1, 8)


@pytest.mark.parametrize(
    ("magic", "words"),
    [
        (0x8374026D, "holds DRBD metadata of format v09, not v08."),
        (0x8374026A, "holds DRBD metadata of format v07, not v08."),
        (0x12345678, "holds something else (0x12345678 where the signature 0x8374026B should be)."),
    ],
)
def test_foreign_blocks_are_named(magic: int, words: str) -> None:
    block = created()[:60] + magic.to_bytes(4, "big") + created()[64:]
    with pytest.raises(MetadataError) as caught:
        Superblock.unpack(block, "sdx at byte offset 4096")
    assert str(caught.value) == f"No valid meta data found: sdx at byte offset 4096 {words}"
    assert (caught.value.code, caught.value.exit_code) == (119, 1)


def test_zeros_and_short_blocks_are_named() -> None:
    with pytest.raises(MetadataError, match=r"sdx holds only zeros\.$"):
        Superblock.unpack(bytes(4096), "sdx")
    with pytest.raises(MetadataError, match=r"^sdx is cut short: 100 of 4096 bytes could be read\.$"):
        Superblock.unpack(created()[:100], "sdx")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("bm_offset", -72, "strange bm_offset -72 (expected: -80)"),
        ("al_offset", 8, "v08 al_offset: expected -64, found 8"),
        ("md_size_sect", 80, "strange md_size_sect 80 (expected: 88)"),
        ("bm_bytes_per_bit", 8192, "strange bm_bytes_per_bit 8192 (expected: 4096)"),
    ],
)
def test_geometry_must_be_that_of_the_device(field: str, value: int, sentence: str) -> None:
    where = layout("internal", 256 * MIB, 256 * MIB)
    good = Superblock.unpack(used())
    good.check(where)
    changes: dict[str, Any] = {field: value}
    with pytest.raises(MetadataError) as caught:
        replace(good, **changes).check(where)
    assert str(caught.value) == sentence and caught.value.code == 119


def test_damaged_activity_log_settings() -> None:
    for stripes, size in ((0, 8), (8, 0), (1, 7), (1 << 20, 1 << 20)):
        block = replace(Superblock.unpack(used()), al_stripes=stripes, al_stripe_size_4k=size)
        with pytest.raises(MetadataError, match="invalid activity log settings"):
            block.layout("internal", 256 * MIB, 256 * MIB)
    with pytest.raises(MetadataError, match="indexed metadata must have"):
        replace(Superblock(), al_stripes=4).layout("indexed", 256 * MIB, 256 * MIB)


def test_a_flexible_metadata_device_may_have_grown() -> None:
    block = Superblock.fresh(layout("flexible", MIB, GIB), 0)
    block.check(layout("flexible", 2 * MIB, GIB))
    assert block.magic == MAGIC_CLEAN
