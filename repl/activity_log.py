"""The activity log: which 4 MiB extents may differ from the peer after a crash, and its blocks on disk.

It decides which extent takes which slot and which one has to go, and composes the transaction to write;
it writes nothing. The caller writes the bitmap pages of the evicted extents, then the transaction's block
(durably), then says `commit`; only then may writes to the added extents start. What was written can be
read back with `parse_block` and `replay`, also after a crash in the middle of all that.

Extents nobody uses are kept in the order in which they became unused, so the least recently used one is
evicted first. The data plane reads ``refs`` directly and may also count in it; `put` is what notices that
an extent became unused.

Source: drbd_actlog.c, struct al_transaction_on_disk (8.4).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from .digests import crc32c_raw

BLOCK_SIZE: Final = 4096
MAGIC: Final = 0x69CB65A2
UPDATE: Final = 0
INITIALISED: Final = 0xFFFF
UPDATES_MAX: Final = 64  # slot changes in one transaction
CONTEXT: Final = 919  # slots described by one transaction
SLOTS_MIN: Final = 67
SLOTS_MAX: Final = 65534
FREE: Final = 0xFFFFFFFF  # extent number of a free slot

_HEAD: Final = struct.Struct(">IIIHHHH16x")
_SLOTS: Final = struct.Struct(f">{UPDATES_MAX}H")
_EXTENTS: Final = struct.Struct(f">{UPDATES_MAX}I")
_CONTEXT: Final = struct.Struct(f">{CONTEXT}I")
_SLOTS_AT: Final = 36
_EXTENTS_AT: Final = 164
_CONTEXT_AT: Final = 420
_CRC_AT: Final = 8


def _seal(block: bytearray) -> bytes:
    """Put the checksum in its place (which holds zeros)."""
    block[_CRC_AT : _CRC_AT + 4] = crc32c_raw(block).to_bytes(4, "big")
    return bytes(block)


def initialised_block() -> bytes:
    """The block an applied or new activity log consists of."""
    block = bytearray(BLOCK_SIZE)
    _HEAD.pack_into(block, 0, MAGIC, 0, 0, INITIALISED, 0, 0, 0)
    return _seal(block)


def ring_position(tr_number: int, n_blocks: int, stripes: int) -> int:
    """Block index inside the activity-log area of the transaction *tr_number*; rotates over the stripes."""
    t = tr_number % n_blocks
    return t % stripes * (n_blocks // stripes) + t // stripes


def clamp_slots(slots: int, n_blocks: int) -> int:
    """The number of slots that is used when *slots* are asked for.

    The contexts of all blocks but one (that one may be torn) must describe every slot.
    """
    return max(SLOTS_MIN, min(slots, (n_blocks - 1) * CONTEXT, SLOTS_MAX))


@dataclass(frozen=True, slots=True)
class Transaction:
    """One block to write durably at block index *position* of the activity-log area.

    The bitmap pages of *evicted* extents must be durable before it is written; *added* extents may be
    written to after it is durable and `ActivityLog.commit` was called.
    """

    block: bytes
    position: int
    added: tuple[int, ...]
    evicted: tuple[int, ...]


class ActivityLog:
    """The active extents of one volume, and the transaction on its way to disk if there is one.

    *slots* is drbd.conf's al-extents (clamped as the kernel does, see ``slots``), *al_blocks* the length of
    the ring in 4 KiB blocks, *stripes* into how many stripes it is cut. *tr_number* continues a ring that
    was written before; it is 0 after attach.
    """

    __slots__ = (
        "_context_start",
        "_free",
        "_idle",
        "_pending",
        "_slot_of",
        "_wanted",
        "al_blocks",
        "extent_of",
        "refs",
        "slots",
        "stripes",
        "tr_number",
    )

    def __init__(self, slots: int = 1237, al_blocks: int = 8, stripes: int = 1, tr_number: int = 0) -> None:
        assert al_blocks >= 2 and stripes >= 1 and al_blocks % stripes == 0, (al_blocks, stripes)
        self.slots = clamp_slots(slots, al_blocks)
        self.al_blocks = al_blocks
        self.stripes = stripes
        self.tr_number = tr_number
        self.refs: dict[int, int] = {}  # active extent -> how many writes use it
        self.extent_of = [FREE] * self.slots  # slot -> extent, as the last durable transaction left it
        self._slot_of: dict[int, int] = {}
        self._free = list(range(self.slots))  # taken from the end, as the kernel does
        self._idle: dict[int, None] = {}  # unused extents, longest unused first; may also list used ones
        self._wanted: dict[int, None] = {}
        self._pending: list[tuple[int, int]] | None = None  # (slot, extent) of the transaction on its way
        self._context_start = 0

    # ---------------------------------------------------------------- references

    def get(self, extent: int) -> bool:
        """Take a reference on *extent* if it is active; False when it is not."""
        n = self.refs.get(extent)
        if n is None:
            return False
        self.refs[extent] = n + 1
        return True

    def put(self, extent: int, n_refs: int = 1) -> None:
        """Drop references; without any the extent may be evicted, the longest unused one first."""
        n = self.refs[extent] - n_refs
        assert n >= 0, extent
        self.refs[extent] = n
        if not n:
            self._idle.pop(extent, None)
            self._idle[extent] = None

    def want(self, extent: int) -> None:
        """Remember *extent* for the next transaction; nothing happens if it is active or on its way."""
        if extent not in self.refs and extent not in self._slot_of:
            self._wanted[extent] = None

    @property
    def n_wanted(self) -> int:
        return len(self._wanted)

    def is_wanted(self, extent: int) -> bool:
        return extent in self._wanted

    def forget_wanted(self) -> None:
        """Nobody waits any more (the disk is gone, or the log is not used)."""
        self._wanted.clear()

    @property
    def busy(self) -> bool:
        """Is a transaction out, neither committed nor given up?"""
        return self._pending is not None

    @property
    def active(self) -> tuple[int, ...]:
        """The active extents, used or not."""
        return tuple(self.refs)

    # ---------------------------------------------------------------- transactions

    def begin(self) -> Transaction | None:
        """Compose the transaction that makes up to 64 wanted extents active.

        None when nothing is wanted, a transaction is out, or every slot is in use. Evicted extents stop
        being active now.
        """
        if self._pending is not None or not self._wanted:
            return None
        changes: list[tuple[int, int]] = []
        evicted: list[int] = []
        for extent in list(self._wanted):
            if len(changes) == UPDATES_MAX:
                break
            slot = self._take_slot(evicted)
            if slot < 0:
                break
            changes.append((slot, extent))
            self._slot_of[extent] = slot
            del self._wanted[extent]
        if not changes:
            return None
        self._pending = changes
        block, position = self._compose(changes)
        return Transaction(block, position, tuple(extent for _, extent in changes), tuple(evicted))

    def _take_slot(self, evicted: list[int]) -> int:
        """A free slot, or that of the longest unused extent, which is added to *evicted*; -1 if none."""
        if self._free:
            return self._free.pop()
        refs = self.refs
        while self._idle:
            extent = next(iter(self._idle))
            del self._idle[extent]
            if refs[extent] == 0:
                del refs[extent]
                evicted.append(extent)
                return self._slot_of.pop(extent)
        return -1

    def commit(self, written: bool = True) -> None:
        """The transaction is durable: its extents are active from now on.

        With *written* False the extents are only tracked in memory (al-updates no): the ring did not move.
        """
        assert self._pending is not None
        for slot, extent in self._pending:
            self.extent_of[slot] = extent
            self.refs[extent] = 0
            self._idle[extent] = None
        self._pending = None
        if written:
            self._advance()

    def initial_ring(self) -> list[tuple[int, bytes]]:
        """A whole ring of transactions that change nothing and only describe the slots: (position, block).

        Written when metadata was just created, moved or resized, and before al-updates are switched on
        again. Transaction numbers continue behind it. No transaction may be out.
        """
        assert self._pending is None
        ring = []
        for _ in range(self.al_blocks):
            block, position = self._compose([])
            ring.append((position, block))
            self._advance()
        return ring

    def _advance(self) -> None:
        self.tr_number = (self.tr_number + 1) & 0xFFFFFFFF
        self._context_start += CONTEXT
        if self._context_start >= self.slots:
            self._context_start = 0

    def _compose(self, changes: list[tuple[int, int]]) -> tuple[bytes, int]:
        """The sealed block of a transaction and its block index in the area."""
        block = bytearray(b"\xff" * BLOCK_SIZE)
        _HEAD.pack_into(
            block, 0, MAGIC, self.tr_number, 0, UPDATE, len(changes), self.slots, self._context_start
        )
        for i, (slot, extent) in enumerate(changes):
            struct.pack_into(">H", block, _SLOTS_AT + 2 * i, slot)
            struct.pack_into(">I", block, _EXTENTS_AT + 4 * i, extent)
        context = self.extent_of[self._context_start : self._context_start + CONTEXT]
        struct.pack_into(f">{len(context)}I", block, _CONTEXT_AT, *context)
        return _seal(block), ring_position(self.tr_number, self.al_blocks, self.stripes)


# -------------------------------------------------------------------- reading it back


@dataclass(frozen=True, slots=True)
class AlBlock:
    """A valid block of the ring. ``updates`` are (slot, extent) pairs, ``context`` the extents of the slots
    from ``context_start`` on (FREE where there is none)."""

    tr_number: int
    kind: int  # UPDATE or INITIALISED
    context_size: int
    context_start: int
    updates: tuple[tuple[int, int], ...]
    context: tuple[int, ...]


def parse_block(block: bytes) -> AlBlock | None:
    """Read one block; None when its signature, checksum or counts are wrong (torn, or never written)."""
    if len(block) != BLOCK_SIZE:
        return None
    magic, tr_number, crc, kind, n_updates, size, start = _HEAD.unpack_from(block)
    if magic != MAGIC or n_updates > UPDATES_MAX:
        return None
    unsealed = bytearray(block)
    unsealed[_CRC_AT : _CRC_AT + 4] = bytes(4)
    if crc32c_raw(unsealed) != crc:
        return None
    slots = _SLOTS.unpack_from(block, _SLOTS_AT)[:n_updates]
    extents = _EXTENTS.unpack_from(block, _EXTENTS_AT)[:n_updates]
    context = _CONTEXT.unpack_from(block, _CONTEXT_AT)
    return AlBlock(tr_number, kind, size, start, tuple(zip(slots, extents, strict=True)), context)


@dataclass(frozen=True, slots=True)
class Replay:
    """What a ring says.

    ``hot`` are the extents that may differ, ``corrupt`` how many blocks were unreadable (one is expected
    after a crash), ``updates`` whether there was any update block. ``usable`` is False when no block could
    be read; ``found`` is False when blocks could be read but the wanted ones are missing. In both cases
    ``hot`` says nothing.
    """

    hot: frozenset[int]
    corrupt: int
    updates: bool
    usable: bool
    found: bool


def replay(blocks: Sequence[bytes], stripes: int = 1) -> Replay:
    """Find the active extents from the blocks of the area, given in the order in which they lie on disk.

    Transaction numbers are compared by their signed 32-bit difference, so that they may wrap around.
    """
    n = len(blocks)
    parsed = [parse_block(blocks[ring_position(t, n, stripes)]) for t in range(n)]
    corrupt = parsed.count(None)
    if corrupt == n:
        return Replay(frozenset(), corrupt, False, False, False)
    updates = [b for b in parsed if b is not None and b.kind == UPDATE]
    if not updates:
        # A first transaction that was torn hits block 0 of a ring that holds nothing else.
        found = corrupt == 0 or (corrupt == 1 and parsed[0] is None)
        return Replay(frozenset(), corrupt, False, True, found)
    origin = updates[0].tr_number
    updates.sort(key=lambda b: _signed(b.tr_number - origin))
    slots: dict[int, int] = {}
    for block in updates:
        for i, extent in enumerate(block.context):
            # Behind the last slot there is padding, which is no statement about any slot.
            if extent != FREE or block.context_start + i < block.context_size:
                slots[block.context_start + i] = extent
        slots.update(block.updates)
    hot = frozenset(extent for extent in slots.values() if extent != FREE)
    return Replay(hot, corrupt, True, True, True)


def placeholder_block(blocks: Sequence[bytes], stripes: int = 1) -> bytes:
    """An update block for the first place of the ring that says nothing and fits the others' numbers.

    *blocks* is the ring as it lies on disk and holds at least one update block.
    """
    n = len(blocks)
    for t in range(n - 1, -1, -1):
        found = parse_block(blocks[ring_position(t, n, stripes)])
        if found is not None and found.kind == UPDATE:
            block = bytearray(b"\xff" * BLOCK_SIZE)
            tr_number = (found.tr_number - t) & 0xFFFFFFFF
            _HEAD.pack_into(block, 0, MAGIC, tr_number, 0, UPDATE, 0, found.context_size, 0)
            return _seal(block)
    raise AssertionError("there is no update block in the ring")


def _signed(difference: int) -> int:
    difference &= 0xFFFFFFFF
    return difference - (1 << 32) if difference & 0x80000000 else difference
