"""Which extent gets which slot, the transaction blocks as bytes, and reading them back after a crash."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.activity_log import (
    FREE,
    INITIALISED,
    UPDATE,
    UPDATES_MAX,
    ActivityLog,
    Transaction,
    clamp_slots,
    initialised_block,
    parse_block,
    placeholder_block,
    replay,
    ring_position,
)
from tandem.repl.digests import crc32c_raw


def activate(log: ActivityLog, *extents: int) -> Transaction:
    for extent in extents:
        log.want(extent)
    transaction = log.begin()
    assert transaction is not None
    log.commit()
    return transaction


def test_initialised_block_is_the_one_create_md_writes() -> None:
    block = initialised_block()
    assert block == bytes.fromhex("69cb65a2 00000000 709cc651 ffff0000 00000000") + bytes(4076)
    parsed = parse_block(block)
    assert parsed is not None and parsed.kind == INITIALISED and parsed.updates == ()


def test_first_transaction_of_a_new_device() -> None:
    """tr 8 in ring block 0: slot 1236 becomes extent 0, all contexts are free."""
    log = ActivityLog()
    ring = log.initial_ring()
    assert [position for position, _ in ring] == list(range(8))
    assert [parsed.tr_number for _, block in ring if (parsed := parse_block(block))] == list(range(8))
    transaction = activate(log, 0)
    assert transaction.position == 0 and transaction.added == (0,) and transaction.evicted == ()
    expected = bytes.fromhex("69cb65a2 00000008 571a0d39 0000 0001 04d5 0000") + bytes(16)
    expected += bytes.fromhex("04d4") + b"\xff\xff" * 63 + bytes(4) + b"\xff" * 4 * (63 + 919)
    assert transaction.block == expected


def test_contexts_describe_the_slots_in_turns() -> None:
    log = ActivityLog()
    log.initial_ring()
    seen = []
    for extent in range(4):
        parsed = parse_block(activate(log, extent).block)
        assert parsed is not None
        known = {parsed.context_start + i: e for i, e in enumerate(parsed.context) if e != FREE}
        seen.append((parsed.tr_number, parsed.context_start, parsed.updates, known))
    assert seen == [
        (8, 0, ((1236, 0),), {}),
        (9, 919, ((1235, 1),), {1236: 0}),
        (10, 0, ((1234, 2),), {}),
        (11, 919, ((1233, 3),), {1236: 0, 1235: 1, 1234: 2}),
    ]


def test_a_block_written_by_the_kernel() -> None:
    """67 slots, nine updates in one transaction; the visible part of a block of the 8.4.11 kernel."""
    block = bytearray(b"\xff" * 4096)
    block[:36] = bytes.fromhex("69cb65a2 000000a7 00000000 0000 0009 0043 0000") + bytes(16)
    block[36:54] = bytes.fromhex("0029000f000d002b000500400018002c0019")
    block[164:200] = bytes.fromhex(
        "00000015 00000037 00000063 0000007c 0000003a 00000067 00000074 0000000a 00000093"
    )
    block[420:432] = bytes.fromhex("0000008c0000009400000062")
    block[8:12] = crc32c_raw(bytes(block)).to_bytes(4, "big")
    parsed = parse_block(bytes(block))
    assert parsed is not None
    assert (parsed.tr_number, parsed.kind, parsed.context_size, parsed.context_start) == (167, UPDATE, 67, 0)
    assert parsed.updates == (
        (41, 21), (15, 55), (13, 99), (43, 124), (5, 58), (64, 103), (24, 116), (44, 10), (25, 147),
    )  # fmt: skip
    assert parsed.context[:4] == (140, 148, 98, FREE)
    assert ring_position(167, 8, 1) == 7


def test_ring_positions_rotate_over_the_stripes() -> None:
    assert [ring_position(tr, 8, 1) for tr in range(10)] == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert [ring_position(tr, 32, 4) for tr in range(6)] == [0, 8, 16, 24, 1, 9]
    assert sorted(ring_position(tr, 112, 7) for tr in range(112)) == list(range(112))


def test_slots_are_clamped() -> None:
    assert clamp_slots(1237, 8) == 1237
    assert clamp_slots(7, 8) == 67 and clamp_slots(65000, 8) == 6433
    assert clamp_slots(70000, 112) == 65534
    assert ActivityLog(1).slots == 67


def test_references() -> None:
    log = ActivityLog(67)
    assert not log.get(5)
    log.want(5)
    log.want(5)
    assert log.n_wanted == 1 and not log.busy
    transaction = log.begin()
    assert transaction is not None and log.busy and log.n_wanted == 0
    assert not log.get(5)  # not before it is durable
    log.want(5)  # on its way already
    assert log.n_wanted == 0
    assert log.begin() is None
    log.commit()
    assert log.get(5) and log.get(5) and log.refs == {5: 2}
    log.put(5)
    log.put(5)
    assert log.refs == {5: 0} and log.active == (5,)
    with pytest.raises(AssertionError):
        log.put(5)
    assert log.begin() is None  # nothing wanted


def test_at_most_64_changes_in_one_transaction() -> None:
    log = ActivityLog(200)
    for extent in range(100):
        log.want(extent)
    first = log.begin()
    assert first is not None and first.added == tuple(range(UPDATES_MAX)) and log.n_wanted == 36
    log.commit()
    second = log.begin()
    assert second is not None and second.added == tuple(range(64, 100))


def test_the_longest_unused_extent_goes_first_and_used_ones_stay() -> None:
    log = ActivityLog(67)
    activate(log, *range(64))
    activate(log, 64, 65, 66)
    for extent in (2, 0, 1):  # 0 is used again after 2, and 1 after both
        assert log.get(extent)
    for extent in (2, 0, 1):
        log.put(extent)
    for extent in range(4, 67):
        log.get(extent)
    log.refs[3] += 1  # the data plane counts by itself
    for extent in (100, 101, 102, 103):
        log.want(extent)
    transaction = log.begin()
    assert transaction is not None
    assert transaction.evicted == (2, 0, 1) and transaction.added == (100, 101, 102)
    assert not log.get(0) and log.n_wanted == 1
    log.commit()
    for extent in (100, 101, 102):
        log.get(extent)
    assert log.begin() is None  # every slot is in use
    log.put(3)
    again = log.begin()
    assert again is not None and again.evicted == (3,) and again.added == (103,)


def test_without_updates_the_ring_does_not_move() -> None:
    log = ActivityLog()
    log.want(9)
    assert log.begin() is not None
    log.commit(written=False)
    assert log.get(9) and log.tr_number == 0
    # Switching updates on again writes slots that never were in the ring.
    contexts = [parsed.context for _, block in log.initial_ring() if (parsed := parse_block(block))]
    assert any(9 in context for context in contexts)


def ring_of(log: ActivityLog) -> list[bytes]:
    ring = [bytes(4096)] * log.al_blocks
    for position, block in log.initial_ring():
        ring[position] = block
    return ring


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1 << 32), slots=st.sampled_from([67, 1237, 2000]), stripes=st.sampled_from([1, 4]),
    start=st.sampled_from([0, 0xFFFFFFF0]), steps=st.integers(1, 30), torn=st.booleans(),
)  # fmt: skip
def test_replay_finds_every_active_extent(
    seed: int, slots: int, stripes: int, start: int, steps: int, torn: bool
) -> None:
    """After any history the ring names all active extents, also when the newest block is torn."""
    rng = random.Random(seed)
    log = ActivityLog(slots, 8, stripes, tr_number=start)
    ring = ring_of(log)
    for _ in range(steps):
        for _ in range(rng.randrange(1, 100)):
            log.want(rng.randrange(3000))
        if (transaction := log.begin()) is not None:
            ring[transaction.position] = transaction.block
            log.commit()
    assert replay(ring, stripes).hot == frozenset(log.active)
    if torn:
        before = set(log.active)
        for extent in range(3000, 3010):
            log.want(extent)
        transaction = log.begin()
        assert transaction is not None
        ring[transaction.position] = transaction.block[:512] + b"\xaa" * 3584
        found = replay(ring, stripes)
        assert found.corrupt == 1 and found.updates and found.found
        # Nothing was written to the extents of the torn transaction; the evicted ones are still named.
        assert found.hot == before


def test_replay_of_rings_without_updates() -> None:
    empty, bad = initialised_block(), b"\xaa" * 4096
    clean = replay([empty] * 8)
    assert (clean.hot, clean.corrupt, clean.updates, clean.usable, clean.found) == (
        frozenset(),
        0,
        False,
        True,
        True,
    )
    first_torn = replay([bad] + [empty] * 7)
    assert first_torn.found and first_torn.corrupt == 1
    assert not replay([empty] * 3 + [bad] + [empty] * 4).found
    nothing = replay([bad] * 8)
    assert not nothing.usable and nothing.corrupt == 8
    assert not replay([bytes(4096)] * 8).usable


def test_blocks_that_are_no_blocks() -> None:
    good = activate(ActivityLog(), 3).block
    assert parse_block(good) is not None
    for at in (0, 5, 9, 13, 36, 164, 420, 4095):
        damaged = bytearray(good)
        damaged[at] ^= 1
        assert parse_block(bytes(damaged)) is None
    assert parse_block(good[:4095]) is None and parse_block(b"") is None
    too_many = bytearray(good)
    struct.pack_into(">H", too_many, 14, UPDATES_MAX + 1)
    too_many[8:12] = bytes(4)
    too_many[8:12] = crc32c_raw(bytes(too_many)).to_bytes(4, "big")
    assert parse_block(bytes(too_many)) is None


def test_placeholder_fits_into_the_ring() -> None:
    log = ActivityLog()
    ring = ring_of(log)
    for extent in range(5):
        transaction = activate(log, extent)
        ring[transaction.position] = transaction.block
    ring[0] = b"\x00" * 4096
    parsed = parse_block(placeholder_block(ring))
    assert parsed is not None and parsed.kind == UPDATE and parsed.updates == ()
    assert parsed.tr_number % 8 == 0 and set(parsed.context) == {FREE}
    ring[0] = placeholder_block(ring)
    assert replay(ring).corrupt == 0
    with pytest.raises(AssertionError):
        placeholder_block([initialised_block()] * 8)
