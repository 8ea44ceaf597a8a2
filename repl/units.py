"""Units of the block layer and the only conversions between them.

DRBD counts in 512-byte sectors on the wire and on disk, in 4 KiB blocks in the bitmap (one bit each),
in 4 MiB extents in the activity log and in 16 MiB extents during resync.
"""

from __future__ import annotations

from typing import Final

SECTOR: Final = 512
SECTOR_SHIFT: Final = 9
BLOCK: Final = 4096  # one bitmap bit
BLOCK_SHIFT: Final = 12
AL_EXTENT: Final = 4 << 20
AL_EXTENT_SHIFT: Final = 22
RS_EXTENT: Final = 16 << 20
RS_EXTENT_SHIFT: Final = 24
SECTORS_PER_BLOCK: Final = BLOCK // SECTOR
BITS_PER_AL_EXTENT: Final = AL_EXTENT // BLOCK
BITS_PER_PAGE: Final = 4096 * 8  # one 4 KiB page of the bitmap covers 128 MiB

IO_MAX: Final = 1 << 20  # largest P_DATA, P_DATA_REPLY, P_RS_DATA_REPLY payload (protocol 100+)
RANGE_SHIFT: Final = 9  # a write as one number: first block << RANGE_SHIFT | blocks; IO_MAX touches 257 at most
DISCARD_MAX: Final = 128 << 20  # largest P_TRIM / P_ZEROES range
DEVICE_SECTORS_MAX: Final = 1 << 41  # 1 PiB, what the reference tools assert


def n_bits_of(size: int) -> int:
    """Bitmap bits covering *size* bytes; the last bit may cover a partial block."""
    return (size + BLOCK - 1) >> BLOCK_SHIFT


def bits_touched(offset: int, length: int) -> tuple[int, int]:
    """First bit and one past the last bit of which any byte lies in the range; *length* > 0."""
    return offset >> BLOCK_SHIFT, ((offset + length - 1) >> BLOCK_SHIFT) + 1


def bits_covered(offset: int, length: int, size: int) -> tuple[int, int]:
    """First bit and one past the last bit wholly inside the range.

    The end of the device counts as aligned: a shorter last block is covered when its last byte is.
    The pair is empty (first >= end) when no whole block lies inside.
    """
    end = offset + length
    last = n_bits_of(size) if end >= size else end >> BLOCK_SHIFT
    return (offset + BLOCK - 1) >> BLOCK_SHIFT, last


def extents_touched(offset: int, length: int) -> range:
    """Activity-log extents of which any byte lies in the range; *length* > 0."""
    return range(offset >> AL_EXTENT_SHIFT, ((offset + length - 1) >> AL_EXTENT_SHIFT) + 1)
