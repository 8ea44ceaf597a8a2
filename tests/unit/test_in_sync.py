"""Which bits a write clears that is on both disks: those of blocks that it covers."""

from __future__ import annotations

import pytest
from tandem.repl.bitmap import Bitmap
from tandem.repl.requests import DiskOp, Op

from tests.scenarios.lone import Lone

BLOCK = 4096


@pytest.mark.parametrize(("offset", "length", "cleared"), [
    (0, BLOCK, {0}), (7 * BLOCK, BLOCK, {7}),
    (512, BLOCK, set()), (0, 512, set()), (3584, BLOCK + 512, {1}),
    (BLOCK, 3 * BLOCK, {1, 2, 3}), (15 * BLOCK, BLOCK, {15}),
])  # fmt: skip
def test_whole_blocks_are_in_sync(offset: int, length: int, cleared: set[int]) -> None:
    vol = Lone().engine.volumes[0]
    vol.bitmap, vol.size = Bitmap(16), 16 * BLOCK
    vol.bitmap.set(0, 16)
    vol.are_in_sync([DiskOp(Op.WRITE, 0, offset, length)] * 2)
    assert {bit for bit in range(16) if not vol.bitmap.any(bit, bit + 1)} == cleared
    assert vol.bitmap.weight == 16 - len(cleared)


def test_without_a_bitmap_there_is_nothing_to_clear() -> None:
    vol = Lone().engine.volumes[0]
    vol.bitmap = Bitmap(0)
    vol.are_in_sync([DiskOp(Op.WRITE, 0, 0, BLOCK)])
    assert vol.bitmap.weight == 0
