"""Writes on behalf of the peer: which ack and when, epochs made stable, what a lost peer leaves behind."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tandem.repl import replica
from tandem.repl.events import Connect, LinkLost
from tandem.repl.requests import FUA, MAY_UNMAP, DiskOp, Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import (
    DP_DISCARD,
    DP_FLUSH,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_SEND_RECEIVE_ACK,
    DP_SEND_WRITE_ACK,
    DP_ZEROES,
    ID_SYNCER,
    Packet,
    Uuids,
    pack_barrier,
    pack_block_req,
    pack_data,
    pack_state,
    pack_trim,
    unpack_ack,
    unpack_barrier_ack,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone

P = Packet
ID = 0xC061_9886_0000_0000  # a kernel's block_id: an opaque number in its own byte order


def write(block: int, flags: int = DP_SEND_WRITE_ACK, length: int = 4096) -> bytes:
    head = pack_data(P.DATA, 0, block * 8, ID + block, block + 1, flags, length)
    return head + bytes([block & 255]) * length


def flush(block_id: int = ID) -> bytes:
    return pack_data(P.DATA, 0, 0, block_id, 1, DP_FLUSH | DP_SEND_WRITE_ACK, 0)


def acks(lone: Lone) -> list[tuple[str, int, int]]:
    """(packet, sector, block_id) of every ack sent."""
    return [
        (kind.name, *unpack_ack(payload)[:2])
        for socket, kind, _, payload in lone.packets
        if socket == "meta" and len(payload) == 24
    ]


def barrier_acks(lone: Lone) -> list[tuple[int, int]]:
    return [unpack_barrier_ack(p) for p in lone.payloads(P.BARRIER_ACK)]


def writes(lone: Lone) -> list[tuple[int, int]]:
    return [(op.offset, op.length) for op in lone.disk if op.op == Op.WRITE and not op.area]


def flushes(lone: Lone) -> list[DiskOp]:
    return [op for op in lone.disk if op.op == Op.FLUSH]


# --------------------------------------------------------------------------------------------- the ack


def test_protocol_c_acks_after_the_disk_and_echoes_the_block_id() -> None:
    lone = Lone().as_secondary()
    lone.data(write(3))
    assert writes(lone) == [(12288, 4096)] and acks(lone) == []
    lone.answer()
    assert acks(lone) == [("WRITE_ACK", 24, ID + 3)]


def test_a_run_of_acks_is_one_buffer() -> None:
    lone = Lone().as_secondary()
    lone.data(*(write(i) for i in range(5)))
    ops, lone.disk = lone.disk, []
    lone.engine.disk_done(ops)
    out = lone.engine.take()
    assert len(out.meta) == 1 and len(out.meta[0]) == 5 * 40


def test_protocol_b_acks_on_receipt_and_a_not_at_all() -> None:
    lone = Lone(net={"protocol": "B"}).as_secondary()
    lone.data(write(1, DP_SEND_RECEIVE_ACK))
    assert acks(lone) == [("RECV_ACK", 8, ID + 1)]
    lone.settle()
    assert len(acks(lone)) == 1
    lone = Lone(net={"protocol": "A"}).as_secondary()
    lone.data(write(1, 0))
    lone.settle()
    assert acks(lone) == []


def test_both_flags_give_both_acks_receipt_first() -> None:
    lone = Lone(net={"protocol": "B"}).as_secondary()
    lone.data(write(1, DP_SEND_RECEIVE_ACK | DP_SEND_WRITE_ACK))
    lone.settle()
    assert [kind for kind, _, _ in acks(lone)] == ["RECV_ACK", "WRITE_ACK"]


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_failed_write_is_a_negative_ack_in_every_protocol(protocol: str) -> None:
    lone = Lone(net={"protocol": protocol}).as_secondary()
    flags = {"A": 0, "B": DP_SEND_RECEIVE_ACK, "C": DP_SEND_WRITE_ACK}[protocol]
    lone.data(write(2, flags))
    bits = lone.vol.bitmap
    lone.answer(error=errno.EIO)
    assert acks(lone)[-1] == ("NEG_ACK", 16, ID + 2) and bits.weight == 1
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS


def test_a_diskless_node_refuses_but_counts() -> None:
    lone = Lone(diskless=True)
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    lone.data(write(1), write(2), pack_barrier(7))
    assert [kind for kind, _, _ in acks(lone)] == ["NEG_ACK", "NEG_ACK"] and lone.disk == []
    assert barrier_acks(lone) == [(7, 2)]


def test_fua_reaches_the_disk() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1, DP_SEND_WRITE_ACK | DP_FUA), write(2))
    assert [op.flags & FUA for op in lone.disk] == [FUA, 0]


@pytest.mark.parametrize(("cmd", "flags", "features", "op", "op_flags"), [
    (P.TRIM, DP_DISCARD, 15, Op.TRIM, 0),
    (P.TRIM, DP_DISCARD, 7, Op.ZEROES, MAY_UNMAP),  # an old sender means zeroes
    (P.ZEROES, DP_ZEROES, 15, Op.ZEROES, 0),
    (P.ZEROES, DP_ZEROES | DP_DISCARD, 15, Op.ZEROES, MAY_UNMAP),
])  # fmt: skip
def test_trims_and_zeroes(cmd: Packet, flags: int, features: int, op: Op, op_flags: int) -> None:
    lone = Lone().as_secondary(features=features)
    lone.data(pack_trim(cmd, 0, 8, ID, 1, flags | DP_SEND_WRITE_ACK, 1 << 20))
    assert [(o.op, o.offset, o.length, o.flags) for o in lone.disk] == [(op, 4096, 1 << 20, op_flags)]
    lone.settle()
    assert acks(lone) == [("WRITE_ACK", 8, ID)]


@pytest.mark.parametrize("syncing", [False, True])
def test_the_short_path_and_the_long_path_ask_the_same_of_the_disk(
    monkeypatch: pytest.MonkeyPatch, syncing: bool
) -> None:
    plain_flags = DP_SEND_WRITE_ACK | (DP_MAY_SET_IN_SYNC if syncing else 0)
    stream = b"".join((
        write(1, plain_flags), write(2, length=512), write(9, plain_flags | DP_FUA), pack_barrier(0),
        write(4, plain_flags), write(4, plain_flags),
        flush(), write(5, length=1 << 20), pack_barrier(1),
    ))  # fmt: skip

    def what(plain: bool) -> tuple[object, ...]:
        lone = Lone().target((0, 3), (7, 40)) if syncing else Lone().as_secondary()
        lone.forget()
        if not plain:
            monkeypatch.setattr(lone.engine.replica, "plain", lambda vol: False)
        assert lone.data(stream) == len(stream)
        ops = [(op.op, op.offset, op.length, op.flags, bytes(op.payload or b"")) for op in lone.disk]
        lone.settle()
        lone.at(lone.now + 1)
        lone.settle()
        vol = lone.vol
        counters = (vol.n_local, vol.n_untracked, vol.n_unacked, vol.bytes_received, vol.bytes_written)
        left = vol.bitmap.weight, bool(vol.peer_intervals)
        # The order of acks is the disk's; a write that overlaps another one is the last in any case.
        return sorted(ops), sorted(acks(lone)), barrier_acks(lone), counters, lone.engine.replica.n_active, left

    assert what(True) == what(False)


def test_a_stream_cut_anywhere_is_the_same_stream() -> None:
    stream = b"".join((write(1), write(2), pack_barrier(0), write(3, length=512), pack_barrier(1)))
    whole = Lone().as_secondary()
    whole.data(stream)
    whole.settle()
    for cut in (1, 15, 16, 39, 40, 41, 4135, 4136, 4137, len(stream) - 1):
        lone = Lone().as_secondary()
        used = lone.data(stream[:cut])
        assert used <= cut
        lone.data(stream[used:])
        lone.settle()
        assert acks(lone) == acks(whole)


# ---------------------------------------------------------------------------------------------- epochs


def test_a_barrier_ack_comes_after_the_flush_and_after_the_acks() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), write(2), pack_barrier(5))
    lone.answer(lone.disk[0])
    assert barrier_acks(lone) == [] and not flushes(lone), "one write is still out"
    lone.answer(*lone.disk)
    assert barrier_acks(lone) == [] and len(flushes(lone)) == 1 and len(acks(lone)) == 2
    lone.answer()
    assert barrier_acks(lone) == [(5, 2)]


def test_an_empty_epoch_is_not_acknowledged() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_barrier(0), write(1), pack_barrier(1))
    lone.settle()
    assert barrier_acks(lone) == [(1, 1)]


def test_without_flushes_an_epoch_ends_with_its_last_write() -> None:
    lone = Lone(disk={"disk_flushes": False}).as_secondary()
    lone.data(write(1), pack_barrier(0), write(2), pack_barrier(1))
    second = lone.disk[1]
    lone.answer(second)
    assert barrier_acks(lone) == [], "barrier acks go out in order"
    lone.answer()
    assert barrier_acks(lone) == [(0, 1), (1, 1)] and not flushes(lone)


def test_a_kernels_epoch_is_stable_before_the_next_one_starts() -> None:
    """A peer that sends no flushes relies on drain and flush between epochs."""
    lone = Lone().as_secondary(ours=False)
    lone.data(write(1), pack_barrier(0), write(2), write(3), pack_barrier(1), write(4))
    assert writes(lone) == [(4096, 4096)]
    lone.answer()
    assert writes(lone) == [] and len(flushes(lone)) == 1
    lone.answer()
    assert barrier_acks(lone) == [(0, 1)] and writes(lone) == [(8192, 4096), (12288, 4096)]
    lone.answer()
    lone.answer()
    assert barrier_acks(lone) == [(0, 1), (1, 2)] and writes(lone) == [(16384, 4096)]


def test_our_own_kind_is_not_stalled() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), pack_barrier(0), write(2))
    assert writes(lone) == [(4096, 4096), (8192, 4096)]


def test_flushes_of_epochs_are_paced_and_shared() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), pack_barrier(0))
    lone.settle()
    assert barrier_acks(lone) == [(0, 1)]
    lone.data(write(2), pack_barrier(1), write(3), pack_barrier(2))
    lone.settle()
    assert barrier_acks(lone) == [(0, 1)], "the last flush was a moment ago"
    assert lone.engine.deadline() == lone.now + replica.QUIET_S
    lone.at(lone.now + replica.QUIET_S)
    assert len(flushes(lone)) == 1
    lone.settle()
    assert barrier_acks(lone) == [(0, 1), (1, 1), (2, 1)]


def test_a_flush_that_took_long_is_not_repeated_soon() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), pack_barrier(0))
    lone.answer()
    lone.now += 0.05
    lone.answer()
    ended = lone.now
    lone.data(write(2), pack_barrier(1))
    lone.answer()
    lone.at(ended + 0.05 * replica.PAUSE_FACTOR - 0.001)
    assert not flushes(lone)
    lone.at(ended + 0.05 * replica.PAUSE_FACTOR)
    assert len(flushes(lone)) == 1
    lone.now += 30
    lone.answer()
    ended = lone.now
    lone.data(write(3), pack_barrier(2))
    lone.answer()
    lone.at(ended + replica.PAUSE_MAX_S)
    assert len(flushes(lone)) == 1


@pytest.mark.parametrize(
    ("net", "pause"),
    [({}, replica.PAUSE_MAX_S), ({"ko_count": 0}, replica.PAUSE_MAX_S), ({"ko_count": 1, "timeout": 20}, 0.5)],
)
def test_while_the_peer_writes_barrier_acks_wait_but_not_for_longer_than_it_does(
    net: dict[str, int], pause: float
) -> None:
    lone = Lone(net=net).as_secondary()
    lone.data(write(1), pack_barrier(0))
    lone.settle()
    ended, n = lone.now, 0
    while not flushes(lone):
        n += 1
        lone.data(write(n & 255), pack_barrier(n))
        lone.answer(*(op for op in lone.disk if op.op == Op.WRITE))
        lone.at(lone.now + replica.QUIET_S / 2)
    assert lone.now - ended == pytest.approx(pause, abs=replica.QUIET_S)
    lone.settle()
    assert len(barrier_acks(lone)) == n + 1


def paced(lone: Lone) -> None:
    """Some epochs that no flush has made stable yet, while the peer goes on writing."""
    lone.data(write(1), pack_barrier(0))
    lone.settle()
    lone.forget_keep_connect()
    for i in range(2, 6):
        lone.data(write(i), pack_barrier(i - 1))
        lone.answer()
        lone.at(lone.now + 0.02)
    assert not barrier_acks(lone) and not flushes(lone)


@pytest.mark.parametrize("how", ["write error", "read error", "flush behind it"])
def test_barrier_acks_do_not_overtake_the_news_that_the_disk_is_lost(how: str) -> None:
    """Else the peer would have forgotten, before it hears of that, what was never flushed here."""
    lone = Lone().as_secondary()
    paced(lone)
    if how == "read error":
        lone.data(pack_block_req(P.DATA_REQUEST, 0, 0, ID, 4096))
        lone.answer(error=errno.EIO)
    else:
        lone.data(write(20))
        lone.answer(error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS and lone.sent(P.STATE)
    lost = lone.now
    if how == "flush behind it":
        lone.data(flush(ID + 99))
        lone.settle()
        assert acks(lone)[-1][0] == "NEG_ACK"
    lone.at(lost + replica.PAUSE_MAX_S - 0.01)
    assert not barrier_acks(lone)
    lone.at(lost + replica.PAUSE_MAX_S)
    assert [barrier for barrier, _ in barrier_acks(lone)] == [1, 2, 3, 4]


def test_without_flushes_barrier_acks_wait_for_none() -> None:
    lone = Lone(disk={"disk_flushes": False}).as_secondary()
    for i in range(1, 200):
        lone.data(write(i & 63), pack_barrier(i - 1))
        if i % 20 == 0:  # of an application, which would put the next one off again and again
            lone.data(flush(ID + 1000 + i))
        lone.settle()
        lone.at(lone.now + 0.02)
    assert len(barrier_acks(lone)) > 190


def test_a_flush_that_waits_behind_a_failed_one_is_answered() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1))
    lone.settle()
    lone.data(flush(ID + 1), flush(ID + 2))
    lone.answer(*flushes(lone), error=errno.EIO)
    lone.settle()
    assert [(kind, block_id - ID) for kind, _, block_id in acks(lone)[-2:]] == [("NEG_ACK", 1), ("NEG_ACK", 2)]


def test_what_a_flush_has_covered_needs_no_other_for_its_barrier_ack() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), pack_barrier(0))
    lone.settle()
    lone.data(write(2))
    lone.settle()
    lone.data(flush())
    lone.settle()
    lone.data(pack_barrier(1))
    assert not flushes(lone)
    lone.settle()
    assert barrier_acks(lone) == [(0, 1), (1, 2)]


def test_a_flush_of_the_peer_is_answered_by_the_next_flush_of_the_disk() -> None:
    lone = Lone().as_secondary()
    lone.data(flush(ID + 1))
    (first,) = flushes(lone)
    lone.data(write(1))
    lone.answer(lone.disk[-1])
    lone.data(flush(ID + 2), flush(ID + 3))
    assert flushes(lone) == [first], "one is running; the others share the next"
    lone.answer()
    assert acks(lone)[-1] == ("WRITE_ACK", 0, ID + 1) and len(flushes(lone)) == 1
    lone.answer()
    assert [i for _, _, i in acks(lone)][-3:] == [ID + 1, ID + 2, ID + 3]


def test_a_flush_covers_writes_answered_early() -> None:
    """Protocol A: the peer's application was told "done" long before our disk had it."""
    lone = Lone(net={"protocol": "A"}).as_secondary()
    lone.data(write(1, 0), flush(), write(2, 0))
    assert writes(lone) == [(4096, 4096)] and not flushes(lone)
    lone.answer()
    assert len(flushes(lone)) == 1 and writes(lone) == [], "what came behind the flush waits for it"
    lone.answer()
    assert acks(lone) == [("WRITE_ACK", 0, ID)] and writes(lone) == [(8192, 4096)]


def test_a_flush_that_fails_is_refused_and_costs_the_disk() -> None:
    lone = Lone().as_secondary()
    lone.data(flush())
    lone.answer(error=errno.EIO)
    lone.settle()
    assert ("NEG_ACK", 0, ID) in acks(lone) and lone.local_disk() == DiskState.DISKLESS


# ---------------------------------------------------------------------------------- a Primary without a disk


def test_writes_of_a_diskless_primary_are_marked_and_logged() -> None:
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY, disk=DiskState.DISKLESS))
    lone.forget()
    lone.data(write(1, DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC))
    assert writes(lone) == [], "first the activity log"
    assert lone.vol.bitmap.weight == 1 and len(lone.disk) == 1 and lone.disk[0].area
    lone.settle()
    assert acks(lone) == [("WRITE_ACK", 8, ID + 1)], "nothing may be called in sync"
    assert lone.vol.bitmap.weight == 1 and lone.vol.al.refs == {0: 0}


def test_a_write_of_a_primary_whose_disk_comes_back_meanwhile_is_in_the_resync() -> None:
    lone = Lone()
    lone.attach()
    peer = State(Role.PRIMARY, Role.SECONDARY, ConnState.WF_CONNECTION, DiskState.DISKLESS)
    lone.connect(peer)
    lone.data(pack_state(replace(peer, conn=ConnState.CONNECTED, pdsk=DiskState.UP_TO_DATE).word(), 0))
    lone.settle()
    lone.data(write(1))
    assert writes(lone) == [], "it waits for the activity log"
    (transaction,) = lone.disk
    attaching = replace(peer, conn=ConnState.CONNECTED, disk=DiskState.NEGOTIATING, pdsk=DiskState.UP_TO_DATE)
    u = lone.vol.uuids
    lone.data(Uuids(u.bitmap, 0, u.history0, u.history1, 0, 0).pack(0), pack_state(attaching.word(), 0))
    assert lone.conn() == ConnState.WF_BITMAP_S and lone.vol.bitmap.weight == 1
    lone.data(lone.bitmap_packets((0, 2)))
    while lone.conn() != ConnState.SYNC_SOURCE:
        lone.answer(*(op for op in lone.disk if op is not transaction))
    lone.data(pack_block_req(P.RS_DATA_REQUEST, 0, 0, ID_SYNCER, 8192))
    assert not [op for op in lone.disk if op.op == Op.READ]
    lone.answer(transaction)
    assert not [op for op in lone.disk if op.op == Op.READ]
    lone.settle()
    assert acks(lone)[-1] == ("WRITE_ACK", 8, ID + 1) and lone.sent(P.RS_DATA_REPLY) == [P.RS_DATA_REPLY]
    assert lone.vol.bitmap.weight == 2


def behind_the_log() -> Lone:
    """Protocol A: a write was answered early and waits for the activity log, a flush is behind it."""
    lone = Lone(net={"protocol": "A"})
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY, disk=DiskState.DISKLESS))
    lone.forget()
    lone.data(write(1, 0), flush())
    assert writes(lone) == [] and not flushes(lone)
    return lone


def test_a_flush_waits_for_writes_answered_early_that_wait_for_the_activity_log() -> None:
    lone = behind_the_log()
    while not writes(lone):
        lone.answer()
    assert not flushes(lone)
    lone.settle()
    assert acks(lone) == [("WRITE_ACK", 0, ID)]


def test_a_flush_behind_a_write_that_never_starts_is_answered() -> None:
    lone = behind_the_log()
    lone.answer(error=errno.EIO)
    lone.settle()
    assert [kind for kind, _, _ in acks(lone)] == ["NEG_ACK", "NEG_ACK"]


# --------------------------------------------------------------------------------------- a connection ends


def lose(lone: Lone) -> None:
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))


def test_a_lost_peer_gets_no_ack_and_no_new_connection_before_its_writes_are_done() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), pack_barrier(0), write(2))
    lone.effects.clear()
    lose(lone)
    held = [op for op in lone.disk if op.op == Op.WRITE and not op.area]
    assert len(held) == 2 and lone.of(Connect) == []
    lone.answer(held[0])
    assert lone.of(Connect) == []
    lone.answer(held[1])
    lone.settle()
    assert acks(lone) == [] and barrier_acks(lone) == [] and len(lone.of(Connect)) == 1
    assert lone.vol.n_unacked == 0 and lone.engine.replica.n_active == 0


def test_what_was_stalled_for_a_lost_peer_is_never_written() -> None:
    lone = Lone().as_secondary(ours=False)
    lone.data(write(1), pack_barrier(0), write(2))
    lose(lone)
    lone.settle()
    assert not [op for op in lone.disk if op.offset == 8192]
    assert lone.vol.bytes_written == 4096


def test_the_next_connection_starts_its_epochs_afresh() -> None:
    lone = Lone().as_secondary()
    lone.data(write(1), write(2))
    lose(lone)
    lone.settle()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    assert lone.conn() == ConnState.CONNECTED
    lone.data(write(3), pack_barrier(0))
    lone.settle()
    assert barrier_acks(lone) == [(0, 1)]


# ------------------------------------------------------------------------------------------ during a resync


def test_a_mirrored_write_during_resync_clears_bits_and_says_so() -> None:
    lone = Lone().target((0, 4))
    lone.data(write(9, DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC))
    lone.settle()
    assert acks(lone) == [("RS_WRITE_ACK", 72, ID + 9)]


def test_a_mirrored_write_waits_for_the_resync_block_under_it() -> None:
    """The block was read before the write was sent: it must not land on top of it."""
    lone = Lone().target((0, 4))
    lone.data(pack_data(P.RS_DATA_REPLY, 0, 0, ID_SYNCER, 0, 0, 16384) + bytes(16384), write(2))
    assert writes(lone) == [(0, 16384)]
    lone.answer()
    assert writes(lone) == [(8192, 4096)]


def test_a_resync_block_waits_for_the_mirrored_write_under_it() -> None:
    lone = Lone().target((0, 4))
    lone.data(write(2), pack_data(P.RS_DATA_REPLY, 0, 0, ID_SYNCER, 0, 0, 16384) + bytes(16384))
    assert writes(lone) == [(8192, 4096)]
    lone.answer()
    assert writes(lone) == [(0, 16384)]
