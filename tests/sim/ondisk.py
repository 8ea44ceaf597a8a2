"""The simulator's own, independent view of metadata on a fake disk.

It reads superblock, activity log and bitmap from an image without the product's code (only the places
come from `metadata.layout`), so that a mistake there cannot hide itself.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from tandem.repl.metadata import Layout

from .fake_disk import PAGE, FakeDisk, Sparse

AL_MAGIC: Final = 0x69CB65A2
FREE: Final = 0xFFFFFFFF
PRIMARY_IND: Final = 0x002
FULL_SYNC: Final = 0x008
WAS_UP_TO_DATE: Final = 0x010
CONSISTENT: Final = 0x001
CONSISTENT_WAS_UP_TO_DATE: Final = 0x011
CRASHED_PRIMARY: Final = 0x040
AL_CLEAN: Final = 0x080
AL_DISABLED: Final = 0x100
BITS_PER_EXTENT: Final = 1024

_SB: Final = struct.Struct(">7Q2I")
_AL_HEAD: Final = struct.Struct(">IIIHHHH")


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE: Final = _crc_table()


def crc32c_raw(data: bytes) -> int:
    crc = 0
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc


@dataclass(frozen=True, slots=True)
class SuperView:
    """What of a superblock matters here."""

    la_size: int  # sectors
    current: int
    bitmap: int
    history0: int
    history1: int
    flags: int

    @property
    def identity(self) -> tuple[int, ...]:
        """Everything that a crash must preserve: the flags without the mark of an applied log, and the
        current UUID without the role bit, which may lag behind."""
        return (
            self.la_size,
            self.current & ~1,
            self.bitmap,
            self.history0,
            self.history1,
            self.flags & ~AL_CLEAN,
        )


def view_of(block: bytes) -> SuperView:
    la, current, bitmap, h0, h1, _, _, flags, _ = _SB.unpack_from(block)
    return SuperView(la, current, bitmap, h0, h1, flags)


def super_at(image: Sparse, layout: Layout) -> SuperView:
    return view_of(image.read(layout.superblock, 72))


@lru_cache(4096)
def ring_updates(
    block: bytes, *, check_crc: bool = True
) -> tuple[int, list[tuple[int, int]], list[tuple[int, int]]] | None:
    """(transaction number, context as (slot, extent), updates as (slot, extent)) of an update block.

    The same blocks are read again and again: what was found is remembered, and not to be changed.
    """
    magic, tr, crc, kind, n_updates, size, start = _AL_HEAD.unpack_from(block)
    if magic != AL_MAGIC or kind != 0:
        return None
    if check_crc and crc32c_raw(block[:8] + bytes(4) + block[12:PAGE]) != crc:
        return None
    slots = struct.unpack_from(f">{n_updates}H", block, 36)
    extents = struct.unpack_from(f">{n_updates}I", block, 164)
    n_context = max(0, min(919, size - start))
    context = struct.unpack_from(f">{n_context}I", block, 420)
    return tr, [(start + i, e) for i, e in enumerate(context)], list(zip(slots, extents, strict=True))


def hot_extents(image: Sparse, layout: Layout) -> set[int]:
    """The extents that the ring on *image* says are active."""
    found = []
    for at in range(layout.al_blocks):
        block = image.read(layout.al + at * PAGE, PAGE)
        parsed = ring_updates(block)
        if parsed is not None:
            found.append(parsed)
    slots: dict[int, int] = {}
    for _, context, updates in sorted(found):
        slots.update(context)
        slots.update(updates)
    return {extent for extent in slots.values() if extent != FREE}


class DiskView:
    """What a node that attached this image now would take as out of sync."""

    def __init__(self, disk: FakeDisk, layout: Layout, *, durable: bool = False) -> None:
        meta = disk.devices[1]
        self._image = meta.durable if durable else meta.live
        self._layout = layout
        self.superblock = super_at(self._image, layout)
        flags = self.superblock.flags
        primary = bool(flags & PRIMARY_IND)
        self.all_set = bool(flags & FULL_SYNC) or bool(flags & AL_DISABLED and flags & (PRIMARY_IND | CRASHED_PRIMARY))
        self.hot = hot_extents(self._image, layout) if primary else set()

    def bit(self, bit: int) -> bool:
        """Is *bit* set in the bitmap on disk?"""
        page = self._image.pages.get((self._layout.bitmap + bit // 8) // PAGE)
        return page is not None and bool(page[(self._layout.bitmap + bit // 8) % PAGE] >> (bit % 8) & 1)

    def covers(self, bit: int) -> bool:
        return self.all_set or bit // BITS_PER_EXTENT in self.hot or self.bit(bit)

    def bits(self, n_bits: int) -> int:
        """The bits below *n_bits* on disk, as one number."""
        return int.from_bytes(self._image.read(self._layout.bitmap, (n_bits + 7) // 8), "little") & (1 << n_bits) - 1


class RingWatch:
    """Follows the activity log of one disk as its blocks become durable."""

    def __init__(self) -> None:
        self.slots: dict[int, int] = {}
        self.hot: set[int] = set()

    def reset(self) -> None:
        self.slots.clear()
        self.hot.clear()

    def evicted_by(self, block: bytes) -> list[int]:
        """Which extents leave the log by this block."""
        parsed = ring_updates(block, check_crc=False)
        if parsed is None:
            return []
        _, _, updates = parsed
        added = {extent for _, extent in updates}
        return [self.slots[slot] for slot, _ in updates if slot in self.slots and self.slots[slot] not in added]

    def durable(self, block: bytes) -> None:
        parsed = ring_updates(block, check_crc=False)
        if parsed is None:
            self.reset()
            return
        _, _, updates = parsed
        for slot, extent in updates:
            self.slots[slot] = extent
        self.hot = {extent for extent in self.slots.values() if extent != FREE}
