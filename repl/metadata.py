"""DRBD 8.4's on-disk metadata, format v08: where it lies, and its superblock as bytes and as a value.

It decides where superblock, activity log and bitmap are placed, and whether a block found there can be
trusted. It reads and writes nothing. Everything in the superblock is big endian; the offsets it stores
count sectors relative to itself. The bitmap's order of bits is `bitmap`'s concern, the activity log's
blocks are `activity_log`'s.

Source of the layout: drbd_int.h, struct meta_data_on_disk, and drbd-utils' drbdmeta.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from enum import IntFlag
from typing import Final

from .errors import MetadataError
from .requests import Buffer
from .units import DEVICE_SECTORS_MAX, SECTOR, SECTORS_PER_BLOCK

BLOCK_SIZE: Final = 4096  # of the superblock and of each activity-log block
MAGIC_CLEAN: Final = 0x8374026B  # v08, the activity log has been applied
MAGIC_UNCLEAN: Final = 0x8374026C  # v08, written by a running node
UUID_JUST_CREATED: Final = 4
AL_NR_EXTENTS_CREATED: Final = 257  # what create-md writes; informational

INDEXED_SECT: Final = 262144  # a slot of indexed metadata: 128 MiB
DEVICE_BYTES_MIN: Final = 69632  # drbdmeta refuses less
AL_BLOCKS_MIN: Final = 8  # 32 KiB
AL_BLOCKS_MAX: Final = 8192  # 32 MiB, the most create-md makes
BYTES_PER_BIT: Final = 4096
_SECTORS_PER_BM_SECTOR: Final = 32768  # data sectors covered by 512 bytes of bitmap

NO_META_DISK_CODE: Final = 119  # "No valid meta-data signature found."
TOO_SMALL_CODE: Final = 112  # "Meta device too small."
UNCLEAN_CODE: Final = 165  # "Unclean meta-data found."
SHRINK_CODE: Final = 170  # "Implicit device shrinking not allowed."

_SUPERBLOCK: Final = struct.Struct(">7Q3IiIi4I")
_OTHER_MAGICS: Final = {
    0x83740267: "DRBD metadata older than v06",
    0x83740269: "DRBD metadata of format v06",
    0x8374026A: "DRBD metadata of format v07",
    0x8374026D: "DRBD metadata of format v09",
}


class MdFlag(IntFlag):
    """Flags of the superblock; other bits are kept as they are."""

    NONE = 0
    CONSISTENT = 1
    PRIMARY_IND = 2
    CONNECTED_IND = 4
    FULL_SYNC = 8
    WAS_UP_TO_DATE = 16
    PEER_OUT_DATED = 32
    CRASHED_PRIMARY = 64
    AL_CLEAN = 128
    AL_DISABLED = 256
    SYNC_ENDING = 1 << 30  # ours: this sync source has told its target that all acks are in


# The order in which get-gi prints them.
GI_FLAGS: Final = (
    MdFlag.CONSISTENT,
    MdFlag.WAS_UP_TO_DATE,
    MdFlag.PRIMARY_IND,
    MdFlag.CONNECTED_IND,
    MdFlag.FULL_SYNC,
    MdFlag.PEER_OUT_DATED,
    MdFlag.CRASHED_PRIMARY,
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the metadata of one volume lies.

    ``superblock``, ``al`` and ``bitmap`` are byte offsets on the device that holds the metadata,
    ``bitmap_bytes`` is the room for the bitmap, ``usable`` the bytes of data it can serve at most.
    ``md_size_sect``, ``al_offset`` and ``bm_offset`` are the superblock's own fields (sectors).
    """

    kind: str
    superblock: int
    al: int
    bitmap: int
    al_blocks: int
    al_stripes: int
    al_stripe_size_4k: int
    bitmap_bytes: int
    usable: int
    md_size_sect: int
    al_offset: int
    bm_offset: int


def bitmap_area(n_sectors: int) -> int:
    """Bytes of the bitmap area covering *n_sectors*: whole 64-bit words, padded to 4 KiB."""
    n_bits = (n_sectors + SECTORS_PER_BLOCK - 1) // SECTORS_PER_BLOCK
    return _align(_align(n_bits, 64) // 8, 4096)


def superblock_offset(kind: str, md_size: int, index: int = 0, name: str = "the metadata device") -> int:
    """Byte offset of the superblock; MetadataError (112, exit 10) when it does not fit on the device.

    *name* stands for the device in the sentence.
    """
    if md_size < DEVICE_BYTES_MIN:
        raise MetadataError(f"{name} is only {md_size} bytes. That's not enough.", TOO_SMALL_CODE, 10)
    if md_size // SECTOR > DEVICE_SECTORS_MAX:
        raise MetadataError(f"{name} has {md_size} bytes, more than the 1 PiB DRBD can address.", 111, 10)
    if kind == "internal":
        return (md_size - BLOCK_SIZE) & ~(BLOCK_SIZE - 1)
    if kind == "flexible":
        return 0
    assert kind == "indexed" and index >= 0, (kind, index)
    at = index * INDEXED_SECT * SECTOR
    if at + BLOCK_SIZE > md_size:
        raise MetadataError(
            "Device too small: expecting meta data block at\n"
            f"byte offset {at}, but {name} is only {md_size} bytes.",
            TOO_SMALL_CODE,
            10,
        )
    return at


def layout(
    kind: str, md_size: int, data_size: int, index: int = 0, al_stripes: int = 1, al_stripe_size_4k: int = 8,
    *, name: str = "the metadata device",
) -> Layout:  # fmt: skip
    """Place the metadata of a volume.

    *kind* is "internal", "flexible" or "indexed". *md_size* is the size in bytes of the device that holds
    the metadata, *data_size* that of the data device (the same device when internal). MetadataError with
    code 112 and exit code 10 when it does not fit, or the activity-log settings are out of range.
    """
    al_blocks = al_stripes * al_stripe_size_4k
    check_al_settings(al_stripes, al_stripe_size_4k)
    superblock = superblock_offset(kind, md_size, index, name)
    al_sect = al_blocks * 8
    md_sect = md_size // SECTOR
    if kind == "internal":
        bitmap_bytes = bitmap_area(md_sect)
        md_size_sect = bitmap_bytes // SECTOR + 8 + al_sect
        al_offset, bm_offset = -al_sect, -md_size_sect + 8
        room = usable = superblock // SECTOR + bm_offset
    else:
        md_size_sect = md_sect if kind == "flexible" else INDEXED_SECT
        al_offset, bm_offset = 8, 8 + al_sect
        # The bitmap is read and written by the page, so a last part of a page is no room for it.
        bitmap_bytes = max(md_size_sect - bm_offset, 0) * SECTOR & ~(BLOCK_SIZE - 1)
        room = bitmap_bytes // SECTOR * _SECTORS_PER_BM_SECTOR
        usable = min(data_size // SECTOR, room, DEVICE_SECTORS_MAX)
    if room <= 0:
        raise MetadataError(
            f"{name} is only {md_size} bytes: no room is left beside {md_size_sect} sectors of metadata"
            f" with an activity log of {al_blocks * 4} KiB. Use a larger device or a smaller activity log.",
            TOO_SMALL_CODE,
            10,
        )
    return Layout(
        kind,
        superblock,
        superblock + al_offset * SECTOR,
        superblock + bm_offset * SECTOR,
        al_blocks,
        al_stripes,
        al_stripe_size_4k,
        bitmap_bytes,
        usable * SECTOR,
        md_size_sect,
        al_offset,
        bm_offset,
    )


def check_al_settings(al_stripes: int, al_stripe_size_4k: int) -> None:
    """MetadataError when a ring of that shape is not what create-md makes (32 KiB to 32 MiB)."""
    al_blocks = al_stripes * al_stripe_size_4k
    if al_stripes < 1 or al_blocks < AL_BLOCKS_MIN:
        raise MetadataError("invalid (too small) al-stripe* settings", TOO_SMALL_CODE, 10)
    if al_blocks > AL_BLOCKS_MAX:
        raise MetadataError("invalid (too large) al-stripe* settings", TOO_SMALL_CODE, 10)


@dataclass(frozen=True, slots=True)
class Superblock:
    """The superblock as a value. Sizes and offsets are sectors, ``la_peer_max_bio_size`` bytes."""

    la_size_sect: int = 0
    current: int = UUID_JUST_CREATED
    bitmap: int = 0
    history0: int = 0
    history1: int = 0
    device_uuid: int = 0
    flags: MdFlag = MdFlag.AL_CLEAN
    magic: int = MAGIC_CLEAN
    md_size_sect: int = 0
    al_offset: int = 0
    al_nr_extents: int = AL_NR_EXTENTS_CREATED
    bm_offset: int = 0
    bm_bytes_per_bit: int = BYTES_PER_BIT
    la_peer_max_bio_size: int = 0
    al_stripes: int = 1
    al_stripe_size_4k: int = 8

    @classmethod
    def fresh(cls, layout: Layout, device_uuid: int = 0) -> Superblock:
        """What create-md writes: just created, inconsistent, clean activity log, never agreed on a size."""
        return cls(device_uuid=device_uuid).placed(layout)

    def placed(self, layout: Layout) -> Superblock:
        """The same contents for another place."""
        return replace(
            self,
            md_size_sect=layout.md_size_sect,
            al_offset=layout.al_offset,
            bm_offset=layout.bm_offset,
            al_stripes=layout.al_stripes,
            al_stripe_size_4k=layout.al_stripe_size_4k,
        )

    def pack(self) -> bytes:
        """The 4096 bytes as they go to disk; reserved bytes are zero."""
        packed = _SUPERBLOCK.pack(
            self.la_size_sect,
            self.current,
            self.bitmap,
            self.history0,
            self.history1,
            self.device_uuid,
            0,
            int(self.flags),
            self.magic,
            self.md_size_sect,
            self.al_offset,
            self.al_nr_extents,
            self.bm_offset,
            self.bm_bytes_per_bit,
            self.la_peer_max_bio_size,
            self.al_stripes,
            self.al_stripe_size_4k,
        )
        return packed + bytes(BLOCK_SIZE - len(packed))

    @classmethod
    def unpack(cls, block: Buffer, where: str = "the metadata block") -> Superblock:
        """Read a superblock. MetadataError (119) says what was found in place of one.

        *where* names the place in that sentence. Fields are only checked for what makes it v08; `check`
        compares them with the device.
        """
        if len(block) < BLOCK_SIZE:
            raise MetadataError(f"{where} is cut short: {len(block)} of {BLOCK_SIZE} bytes could be read.")
        fields = _SUPERBLOCK.unpack_from(block)
        flags, magic = fields[7:9]
        if magic not in (MAGIC_CLEAN, MAGIC_UNCLEAN):
            raise MetadataError(f"No valid meta data found: {where} holds {_what_is(block, magic)}.")
        stripes, stripe_size = fields[15:17]
        if not stripes and not stripe_size:
            stripes, stripe_size = 1, 8  # written before striping was invented
        values = [*fields[:6], MdFlag(flags), *fields[8:15], stripes, stripe_size]
        return cls(*values)

    def layout(
        self, kind: str, md_size: int, data_size: int, index: int = 0, *, name: str = "the metadata device"
    ) -> Layout:
        """The layout this superblock's activity-log settings make on such a device; see `layout`.

        MetadataError (119) when the settings themselves are damaged.
        """
        if not (
            self.al_stripes and AL_BLOCKS_MIN <= self.al_stripes * self.al_stripe_size_4k <= AL_BLOCKS_MAX
        ):
            raise MetadataError(
                f"{name}: invalid activity log settings in the superblock: {self.al_stripes} stripes of"
                f" {self.al_stripe_size_4k * 4} kB."
            )
        if kind == "indexed" and (self.al_stripes, self.al_stripe_size_4k) != (1, 8):
            raise MetadataError(f"{name}: indexed metadata must have an activity log of one stripe of 32 kB.")
        return layout(kind, md_size, data_size, index, self.al_stripes, self.al_stripe_size_4k, name=name)

    def check(self, layout: Layout) -> None:
        """MetadataError (119) when the stored geometry is not that of *layout*.

        A device that has grown since shows here: its internal metadata is no longer at the end.
        """
        if self.bm_bytes_per_bit != BYTES_PER_BIT:
            raise MetadataError(
                f"strange bm_bytes_per_bit {self.bm_bytes_per_bit} (expected: {BYTES_PER_BIT})"
            )
        if self.al_offset != layout.al_offset:
            raise MetadataError(f"v08 al_offset: expected {layout.al_offset}, found {self.al_offset}")
        if self.bm_offset != layout.bm_offset:
            raise MetadataError(f"strange bm_offset {self.bm_offset} (expected: {layout.bm_offset})")
        # A flexible metadata device may grow; its superblock keeps the size it was created with.
        if self.md_size_sect != layout.md_size_sect and layout.kind != "flexible":
            raise MetadataError(f"strange md_size_sect {self.md_size_sect} (expected: {layout.md_size_sect})")

    @property
    def clean(self) -> bool:
        """Is the bitmap complete without the activity log?"""
        return self.magic == MAGIC_CLEAN and bool(self.flags & MdFlag.AL_CLEAN)

    def gi_line(self) -> str:
        """The generation identifiers as get-gi prints them."""
        uuids = f"{self.current:016X}:{self.bitmap:016X}:{self.history0:016X}:{self.history1:016X}"
        return ":".join([uuids, *("1" if self.flags & flag else "0" for flag in GI_FLAGS)])

    def dstate(self) -> str:
        """The disk state these flags stand for while nobody uses the disk."""
        if not self.flags & MdFlag.CONSISTENT:
            return "Inconsistent"
        if not self.flags & MdFlag.WAS_UP_TO_DATE:
            return "Outdated"
        return "UpToDate" if self.flags & MdFlag.PEER_OUT_DATED else "Consistent"


def _what_is(block: Buffer, magic: int) -> str:
    """What a block that is no v08 superblock seems to be, in words."""
    if magic in _OTHER_MAGICS:
        return f"{_OTHER_MAGICS[magic]}, not v08"
    if not any(block):
        return "only zeros"
    return f"something else (0x{magic:08X} where the signature 0x{MAGIC_CLEAN:08X} should be)"


def _align(value: int, to: int) -> int:
    return (value + to - 1) // to * to
