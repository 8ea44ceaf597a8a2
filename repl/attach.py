"""Taking a disk into use: read and validate its metadata, apply the activity log, read the bitmap.

It decides whether the metadata found can be trusted and which blocks count as out of sync after a crash.
It is blocking and works through a `Store`, so that the daemon's worker thread, the offline tool and the
simulator's fake disk run the same code. A crash between any two of its calls loses no bit: the bitmap is
durable before the activity log is emptied, and that before the superblock says so.

Source: drbdmeta's apply-al and drbd_nl.c, drbd_adm_attach (8.4).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol

from . import activity_log
from .activity_log import Replay
from .bitmap import PAGE, Bitmap
from .errors import MetadataError
from .metadata import (
    BLOCK_SIZE,
    MAGIC_CLEAN,
    SHRINK_CODE,
    TOO_SMALL_CODE,
    UNCLEAN_CODE,
    Layout,
    MdFlag,
    Superblock,
    superblock_offset,
)
from .requests import Buffer
from .units import BITS_PER_AL_EXTENT, SECTOR, n_bits_of

ATTACH_SECT_MIN: Final = 2048  # the kernel attaches no smaller metadata device, so neither do we
_READ_STEP: Final = 4 << 20  # how much of the bitmap is read at a time
_WRITE_PAGES_MAX: Final = 256  # adjacent bitmap pages written by one call
_OLD_AL_MAGIC: Final = b"\x83\x74\x02\x67"  # of the activity log before 8.4


class Store(Protocol):
    """A device or file holding data or metadata. Offsets and lengths are bytes; errors are exceptions."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...

    def read_into(self, offset: int, buffer: memoryview) -> None: ...

    def write(self, offset: int, data: Buffer) -> None: ...

    def flush(self) -> None: ...


@dataclass(slots=True)
class LoadedDisk:
    """A disk ready for use.

    ``superblock`` is what is on disk now (clean). ``bitmap`` covers the last agreed size, as far as the
    device still holds it; it is all set if the flags demand a full sync, and, for all the device can hold,
    before the first attach: filling it takes a moment on a large device, which the caller's thread has.
    ``marked`` counts the bits the activity log added, ``corrupt`` the unreadable blocks of its ring.
    """

    superblock: Superblock
    layout: Layout
    bitmap: Bitmap
    data_size: int
    marked: int
    corrupt: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying the activity log did: the superblock now on disk, bits newly set, what the ring said,
    and whether a ring that could not be used was of no importance."""

    superblock: Superblock
    marked: int
    replay: Replay
    ignored: bool


def load(
    meta: Store, data_size: int, kind: str, index: int = 0, *, name: str = "the metadata device"
) -> LoadedDisk:
    """Read everything needed to attach; afterwards the disk is clean.

    *meta* holds the metadata, *data_size* is the size of the data device in bytes (the same device when
    *kind* is "internal"). MetadataError has drbdsetup's code: 112 too small, 119 no valid metadata, 165 an
    activity log that is needed but cannot be used, 170 a device smaller than what was agreed on.
    """
    _check_size(meta, kind, index, name)
    superblock, where = read_superblock(meta, data_size, kind, index, name=name)
    flags = superblock.flags
    if superblock.la_size_sect * SECTOR > where.usable and flags & MdFlag.CONSISTENT:
        raise MetadataError(
            f"Implicit device shrinking not allowed: {name} serves {where.usable // SECTOR} sectors of data,"
            f" but {superblock.la_size_sect} were agreed on. Restore the device's size.",
            SHRINK_CODE,
        )
    fresh = not superblock.la_size_sect
    n_bits = n_bits_of(where.usable if fresh else min(superblock.la_size_sect * SECTOR, where.usable))
    full = fresh or needs_full_sync(flags)
    if full:
        bitmap = Bitmap(n_bits)
        bitmap.set_all()
    else:
        bitmap = read_bitmap(meta, where, n_bits)
    applied = apply_activity_log(meta, superblock, where, None if full else bitmap, name=name)
    return LoadedDisk(applied.superblock, where, bitmap, data_size, applied.marked, applied.replay.corrupt)


def _check_size(meta: Store, kind: str, index: int, name: str) -> None:
    needed = (index + 1) * 262144 if kind == "indexed" else ATTACH_SECT_MIN
    if meta.size // SECTOR < needed:
        raise MetadataError(
            f"Meta device too small: {name} has {meta.size // SECTOR} sectors, {needed} are needed.",
            TOO_SMALL_CODE,
            10,
        )


def needs_full_sync(flags: MdFlag) -> bool:
    """Do these flags say that the bitmap on disk cannot be trusted?

    Either setting all bits was interrupted, or a primary crashed that kept no activity log.
    """
    if flags & MdFlag.FULL_SYNC:
        return True
    return bool(flags & MdFlag.AL_DISABLED and flags & (MdFlag.PRIMARY_IND | MdFlag.CRASHED_PRIMARY))


def read_superblock(
    meta: Store, data_size: int, kind: str, index: int = 0, *, name: str = "the metadata device",
) -> tuple[Superblock, Layout]:  # fmt: skip
    """The superblock at its expected place, checked against the device; MetadataError (119) if unusable."""
    at = superblock_offset(kind, meta.size, index, name)
    superblock = Superblock.unpack(meta.read(at, BLOCK_SIZE), f"{name} at byte offset {at}")
    where = superblock.layout(kind, meta.size, data_size, index, name=name)
    superblock.check(where)
    return superblock, where


def read_bitmap(meta: Store, where: Layout, n_bits: int) -> Bitmap:
    """Read the first *n_bits*. Stretches of zeros take no memory; bytes behind the last bit are ignored."""
    bitmap = Bitmap(n_bits)
    length = bitmap.n_pages * PAGE
    if length > where.bitmap_bytes:
        raise MetadataError(f"{n_bits} bits need {length} bytes, the bitmap has {where.bitmap_bytes}.")
    buffer = memoryview(bytearray(min(_READ_STEP, length)))
    for at in range(0, length, _READ_STEP):
        part = buffer[: min(_READ_STEP, length - at)]
        meta.read_into(where.bitmap + at, part)
        bitmap.load(at, part)
    return bitmap


def write_changed_pages(meta: Store, where: Layout, bitmap: Bitmap) -> int:
    """Write every changed page, adjacent ones together; return how many. Not durable before a flush."""
    pages = bitmap.changed_pages(bitmap.n_pages)
    at = 0
    while at < len(pages):
        end = at + 1
        while end < len(pages) and pages[end] == pages[end - 1] + 1 and end - at < _WRITE_PAGES_MAX:
            end += 1
        meta.write(
            where.bitmap + pages[at] * PAGE, b"".join([bitmap.take_page(page) for page in pages[at:end]])
        )
        at = end
    return len(pages)


def read_ring(meta: Store, where: Layout) -> list[bytes]:
    """The blocks of the activity log in the order in which they lie on disk."""
    raw = meta.read(where.al, where.al_blocks * BLOCK_SIZE)
    return [raw[at : at + BLOCK_SIZE] for at in range(0, len(raw), BLOCK_SIZE)]


def apply_activity_log(
    meta: Store,
    superblock: Superblock,
    where: Layout,
    bitmap: Bitmap | None,
    *,
    name: str = "the metadata device",
) -> Applied:  # fmt: skip
    """Mark what the activity log says may differ, empty it, and call the metadata clean.

    *bitmap* is the bitmap as it is on disk; it gets the marks, and is written. None: nothing is marked,
    because every bit counts as set anyway and the flags that say so stay on disk.
    MetadataError (165, exit 1) when the log is needed (this node was Primary, the superblock does not say
    that the log was applied, nor that everything is out of sync) and cannot be used; the disk is unchanged.
    """
    blocks = read_ring(meta, where)
    found = activity_log.replay(blocks, where.al_stripes)
    usable = found.usable and found.found
    was_primary = bool(superblock.flags & MdFlag.PRIMARY_IND)
    needed = was_primary and not superblock.clean and not needs_full_sync(superblock.flags)
    if needed and not usable:
        raise MetadataError(_why_unusable(found, blocks, name), UNCLEAN_CODE, 1)
    marked = 0
    if was_primary and bitmap is not None:
        for extent in sorted(found.hot):
            first = extent * BITS_PER_AL_EXTENT
            marked += bitmap.set(min(first, bitmap.n_bits), min(first + BITS_PER_AL_EXTENT, bitmap.n_bits))
        if marked:
            write_changed_pages(meta, where, bitmap)
            meta.flush()
    if found.updates or found.corrupt:
        _empty_ring(meta, where, blocks, found)
    if not superblock.clean:
        superblock = replace(superblock, flags=superblock.flags | MdFlag.AL_CLEAN, magic=MAGIC_CLEAN)
        meta.write(where.superblock, superblock.pack())
        meta.flush()
    return Applied(superblock, marked, found, not usable)


def unusable_text(found: Replay) -> str:
    """What is wrong with a ring that cannot be used, in drbdmeta's words."""
    if found.usable:
        return f"{found.corrupt} corrupt AL transactions found\nNo valid AL update transaction found."
    return "No usable activity log found. Do you need to create-md?"


def _why_unusable(found: Replay, blocks: Sequence[bytes], name: str) -> str:
    if any(block[at : at + 4] == _OLD_AL_MAGIC for block in blocks for at in range(0, BLOCK_SIZE, SECTOR)):
        return f"{name} has an activity log written before DRBD 8.4. Apply it with 'drbdmeta apply-al' first."
    return unusable_text(found)


def _empty_ring(meta: Store, where: Layout, blocks: Sequence[bytes], found: Replay) -> None:
    """Fill the ring with initialised blocks, so that after a crash at any moment it can still be read.

    A ring in which something other than its first block is torn is readable only while it holds an update
    block. Therefore the first block is kept as one (or made one, if it is not) until all others are durable.
    """
    empty = activity_log.initialised_block()
    if found.updates:
        first = activity_log.parse_block(blocks[0])
        if first is None or first.kind != activity_log.UPDATE:
            meta.write(where.al, activity_log.placeholder_block(blocks, where.al_stripes))
            meta.flush()
    if found.updates or found.corrupt > 1 or activity_log.parse_block(blocks[0]) is not None:
        meta.write(where.al + BLOCK_SIZE, empty * (where.al_blocks - 1))
        meta.flush()
    meta.write(where.al, empty)
    meta.flush()


def write_ring(meta: Store, where: Layout) -> None:
    """Make the ring one of initialised blocks, durably."""
    step = 256
    empty = activity_log.initialised_block()
    for at in range(0, where.al_blocks, step):
        meta.write(where.al + at * BLOCK_SIZE, empty * min(step, where.al_blocks - at))
    meta.flush()
