"""Runs of packets about neighbouring 4 KiB blocks, packed and read together: what an online verify consists of.

P_OV_REQUEST, P_OV_REPLY and P_OV_RESULT have the same shape (struct p_block_req and p_block_ack; a reply has its
digest behind it) and are about one bitmap block each. A verify sends them by the hundred thousand, in the order
of the blocks, so a stretch of them is one array here. What is no such run is left to `wire`, packet by packet.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .units import BLOCK, BLOCK_SHIFT, SECTORS_PER_BLOCK
from .wire import ACK, MAGIC

RUN_BLOCKS: Final = 64  # a run lies within an aligned stretch of so many blocks, so both sides cut it alike
_U32_MASK: Final = 0xFFFF_FFFF


class BlockRun(NamedTuple):
    """*n* packets about *n* whole blocks, the first of them at *sector*."""

    n: int
    sector: int
    seq: int  # of the last packet, where it has one
    digests: bytes  # one behind the other


@cache
def _layout(n_digest: int) -> np.dtype[np.void]:
    """A packet with *n_digest* bytes behind its sub-header. Two fields hold the 16 bytes of header100."""
    fields = [(name, ">u8") for name in ("begin", "length", "sector", "block_id")] + [("size", ">u4"), ("seq", ">u4")]
    return np.dtype([*fields, ("digest", f"V{n_digest}")] if n_digest else fields)


def _begin(cmd: int, volume: int) -> int:
    return MAGIC << 32 | volume << 16 | cmd


def pack_blocks(
    cmd: int, volume: int, offset: int, length: int, block_id: int | Sequence[int], seq: int | None = None,
    digests: bytes = b"",
) -> bytes:  # fmt: skip
    """One packet for each block of the range, the last of which may be shorter.

    *block_id* is that of all, or each one's own. With *seq* the first gets that sequence number, each further one
    the next. *digests* are as long as there are blocks times the size of one.
    """
    n = (length + BLOCK - 1) >> BLOCK_SHIFT
    n_digest = len(digests) // n
    packets: npt.NDArray[np.void] = np.empty(n, _layout(n_digest))
    packets["begin"] = _begin(cmd, volume)
    packets["length"] = (24 + n_digest) << 32
    packets["sector"] = np.arange(n) * SECTORS_PER_BLOCK + (offset >> 9)
    packets["block_id"] = block_id
    packets["size"] = BLOCK
    packets["size"][-1] = length - ((n - 1) << BLOCK_SHIFT)
    packets["seq"] = 0 if seq is None else (np.arange(n) + seq) & _U32_MASK
    if n_digest:
        packets["digest"] = np.frombuffer(digests, f"V{n_digest}")
    return packets.tobytes()


def block_run(view: memoryview, at: int, cmd: int, volume: int, block_id: int, n_digest: int = 0) -> BlockRun | None:
    """The complete packets of this kind from *at* on, as far as each is about the block behind the one before.

    None where there are fewer than two of them, or where a block does not begin on its boundary.
    """
    layout = _layout(n_digest)
    n = (len(view) - at) // layout.itemsize
    if n < 2:
        return None
    sector = ACK.unpack_from(view, at)[5]
    if sector % SECTORS_PER_BLOCK:
        return None
    n = min(n, RUN_BLOCKS - sector // SECTORS_PER_BLOCK % RUN_BLOCKS)
    packets = np.frombuffer(view, layout, n, at)
    fits = packets["begin"] == _begin(cmd, volume)
    fits &= packets["length"] == (24 + n_digest) << 32
    fits &= packets["sector"] == np.arange(n, dtype=np.uint64) * SECTORS_PER_BLOCK + sector
    fits &= packets["block_id"] == block_id
    fits &= packets["size"] == BLOCK
    if not fits.all():
        n = int(fits.argmin())
    if n < 2:
        return None
    digests = packets["digest"][:n].tobytes() if n_digest else b""
    return BlockRun(n, sector, int(packets["seq"][n - 1]), digests)
