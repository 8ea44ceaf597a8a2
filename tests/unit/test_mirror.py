"""Our applications' writes and reads: the short path is the long path, epochs, the transfer log."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
from tandem.repl import mirror, transfer_log
from tandem.repl.config import Fencing
from tandem.repl.events import LinkLost
from tandem.repl.requests import AL_REF, FUA, Op, Request
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import (
    DP_FLUSH,
    DP_FUA,
    DP_SEND_WRITE_ACK,
    Packet,
    pack_ack,
    pack_barrier_ack,
    pack_data,
    pack_state,
    unpack_data,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone, barriers, lose

AL_EXTENT = 4 << 20
P = Packet


# ------------------------------------------------------------------------------------------- completion


def test_protocol_c_waits_for_both_disks() -> None:
    lone = Lone().ready()
    first, second = lone.submit(Op.WRITE), lone.submit(Op.WRITE, 8192)
    lone.settle()
    assert lone.done == []
    lone.meta(lone.ack(second))
    assert lone.done == [second]
    lone.meta(lone.ack(first))
    assert lone.done == [second, first]


def test_the_peers_ack_alone_is_not_enough() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.meta(lone.ack(r))
    assert r not in lone.done
    lone.settle()
    assert r in lone.done and r.error == 0


@pytest.mark.parametrize(("protocol", "kind"), [("B", P.RECV_ACK), ("A", None)])
def test_protocols_a_and_b_are_answered_earlier(protocol: str, kind: Packet | None) -> None:
    lone = Lone(net={"protocol": protocol}).ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    if kind is not None:
        assert lone.done == []
        lone.meta(lone.ack(r, kind))
    assert lone.done == [r]
    assert lone.engine.log.n_requests == 1, "it stays in the log until the barrier ack"


def test_one_success_is_enough_and_the_range_is_out_of_sync() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r, P.NEG_ACK))
    assert lone.done == [r] and r.error == 0 and lone.vol.bitmap.weight == 1


def test_both_failures_are_an_error() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.meta(lone.ack(r, P.NEG_ACK))
    lone.answer(r, error=errno.EIO)
    lone.settle()
    assert r in lone.done and r.error == errno.EIO


def test_a_failed_local_write_is_answered_by_the_peer_and_the_disk_goes() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r, error=errno.EIO)
    lone.settle()
    assert r not in lone.done and lone.local_disk() == DiskState.DISKLESS
    lone.meta(lone.ack(r))
    assert r in lone.done and r.error == 0


def test_a_write_into_a_cold_extent_waits_for_the_log_block() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    assert lone.sent(P.DATA) == [] and r not in lone.disk and len(lone.disk) == 1
    lone.answer()
    assert lone.sent(P.DATA) == [P.DATA] and r in lone.disk


def test_a_secondary_refuses_its_own_applications() -> None:
    lone = Lone().as_secondary()
    r = lone.submit(Op.WRITE)
    assert lone.done == [r] and r.error == errno.EPERM and lone.disk == []


def test_frozen_requests_wait_and_start_when_thawed() -> None:
    lone = Lone().ready()
    assert lone.run("suspend-io") == "done"
    write, read = lone.submit(Op.WRITE), lone.submit(Op.READ)
    lone.settle()
    assert lone.done == [] and lone.sent(P.DATA) == []
    assert lone.run("resume-io") == "done"
    assert lone.done == [read] and lone.sent(P.DATA) == [P.DATA]
    lone.meta(lone.ack(write))
    assert lone.done == [read, write]


# ----------------------------------------------------------------------------------------------- epochs


def test_towards_our_own_kind_an_epoch_ends_by_the_clock() -> None:
    """It is sent every flush, so it needs no barrier to keep what depends on each other in order."""
    lone = Lone().ready()
    first = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(first))
    lone.submit(Op.WRITE, 8192)
    assert lone.sent(P.DATA, P.BARRIER) == [P.DATA, P.DATA]
    lone.at(lone.now + transfer_log.BARRIER_DELAY_S)
    lone.submit(Op.WRITE, 16384)
    assert lone.sent(P.DATA, P.BARRIER) == [P.DATA, P.DATA, P.BARRIER, P.DATA]


def test_towards_a_kernel_an_epoch_ends_when_one_of_its_writes_is_answered() -> None:
    lone = Lone().ready(ours=False)
    first, second = lone.submit(Op.WRITE), lone.submit(Op.WRITE, 8192)
    lone.settle()
    lone.meta(lone.ack(first))
    assert barriers(lone) == [], "the sender is not idle yet"
    third = lone.submit(Op.WRITE, 16384)
    assert lone.sent(P.DATA, P.BARRIER) == [P.DATA, P.DATA, P.BARRIER, P.DATA]
    first_epoch, second_epoch = lone.engine.log.epochs
    assert (first_epoch.n_sent, second_epoch.n_sent) == (2, 1)
    assert first.epoch is second.epoch is first_epoch and third.epoch is second_epoch


def test_an_idle_sender_closes_its_epoch_after_a_moment_and_only_once() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    assert barriers(lone) == []
    lone.at(lone.now + transfer_log.BARRIER_DELAY_S)
    assert barriers(lone) == [0]
    lone.at(lone.now + 5)
    assert barriers(lone) == [0], "an empty epoch has no barrier"


def test_an_epoch_is_full_at_max_epoch_size() -> None:
    lone = Lone(net={"max_epoch_size": 3}).ready()
    for i in range(7):
        lone.submit(Op.WRITE, i * 8192)
    lone.settle()
    assert lone.sent(P.DATA, P.BARRIER) == [*[P.DATA] * 3, P.BARRIER, *[P.DATA] * 3, P.BARRIER, P.DATA]
    assert [e.n_sent for e in lone.engine.log.epochs] == [3, 3, 1]


def test_a_barrier_ack_empties_the_log_and_frees_the_extents() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.at(lone.now + 1)
    assert lone.vol.al.refs == {0: 1} and lone.engine.log.n_requests == 1
    lone.meta(pack_barrier_ack(0, 1))
    assert lone.vol.al.refs == {0: 0} and lone.engine.log.n_requests == 0 and not lone.engine.log.epochs


@pytest.mark.parametrize(("barrier", "count"), [(1, 1), (0, 2), (0, 0)])
def test_a_barrier_ack_that_does_not_fit_is_a_protocol_error(barrier: int, count: int) -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.at(lone.now + 1)
    lone.meta(pack_barrier_ack(barrier, count))
    assert lone.closed and any("expected 0 for 1" in note for note in lone.notes())


def test_a_barrier_ack_before_the_barrier_is_a_protocol_error() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(pack_barrier_ack(0, 1))
    assert lone.closed


def test_the_log_is_closed_before_a_state_packet() -> None:
    """A pause is told with P_STATE; what was written before it belongs to an earlier epoch."""
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    paused = replace(lone.state, role=Role.SECONDARY, peer=Role.PRIMARY, user_isp=True)
    lone.data(pack_state(paused.word(), 0))
    assert barriers(lone) == [0]


# ------------------------------------------------------------------------------------ the peer is lost


def test_losing_the_peer_marks_everything_unconfirmed_even_if_answered() -> None:
    lone = Lone().ready()
    confirmed, answered, waiting = (lone.submit(Op.WRITE, i * 8192) for i in range(3))
    lone.settle()
    lone.meta(lone.ack(confirmed))
    lone.engine.log.close_epoch()
    lone.meta(lone.ack(answered))
    assert lone.done == [confirmed, answered]
    lose(lone)
    assert lone.done == [confirmed, answered, waiting] and waiting.error == 0
    assert lone.vol.bitmap.weight == 3 and not lone.engine.log.inflight


def test_what_was_barrier_acked_is_not_marked() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.at(lone.now + 1)
    lone.meta(pack_barrier_ack(0, 1))
    lose(lone)
    assert lone.vol.bitmap.weight == 0


def test_the_answer_waits_for_the_new_generation_on_disk() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r)
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    assert r not in lone.done, "the superblock is on its way"
    lone.settle()
    assert r in lone.done and lone.vol.uuids.bitmap


def test_a_generation_that_can_not_be_written_fails_what_only_this_disk_has() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r)
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.answer(error=errno.EIO)
    lone.settle()
    assert r in lone.done and r.error == errno.EIO


def test_reads_that_waited_for_the_lost_peer_fail_without_another_copy() -> None:
    lone = Lone(diskless=True)
    assert lone.run("connect") == "done"
    lone.connect()
    lone.primary()
    r = lone.submit(Op.READ)
    assert lone.sent(P.DATA_REQUEST) == [P.DATA_REQUEST]
    lose(lone)
    assert lone.done == [r] and r.error == errno.EIO


# ----------------------------------------------------------------------------------- frozen, and replayed


def frozen(n_writes: int = 2) -> tuple[Lone, list[Request]]:
    """A Primary that lost its peer with I/O frozen: the first write answered, the others not even acked."""
    lone = Lone(disk={"fencing": Fencing.RESOURCE_AND_STONITH}, handlers=("fence-peer",)).ready()
    requests = [lone.submit(Op.WRITE, i * 8192) for i in range(n_writes)]
    lone.settle()
    lone.meta(lone.ack(requests[0]))
    assert lone.done == requests[:1]
    lose(lone)
    assert lone.state.susp_fen and lone.done == requests[:1] and lone.vol.bitmap.weight == 0
    return lone, requests


def test_replay_sends_only_what_was_not_answered_and_no_stale_barrier() -> None:
    lone, (_, waiting) = frozen()
    lone.packets.clear()
    lone.connect()
    sent = lone.sent(P.DATA, P.BARRIER)
    assert sent == [P.DATA, P.BARRIER], "the barrier of the lost connection must not go out on this one"
    assert unpack_data(lone.payloads(P.DATA)[0])[0] == waiting.offset >> 9
    assert not lone.state.suspended and lone.vol.uuids.bitmap == 0, "no generation was made"
    lone.meta(lone.ack(waiting))
    assert waiting in lone.done and waiting.error == 0


def test_a_replayed_log_keeps_what_was_acked_but_not_stable() -> None:
    """The peer acked a write without having flushed it; should it lose power later, we must know."""
    lone, (answered, waiting) = frozen()
    lone.connect()
    lone.meta(lone.ack(waiting))
    lose(lone)
    assert lone.vol.bitmap.weight == 0 and lone.state.susp_fen, "frozen again: the log is kept"
    lone.run("resume-io")
    assert lone.vol.bitmap.weight == 2, "answered and replayed, but never confirmed as stable"
    assert answered in lone.done


def test_a_frozen_sync_target_takes_what_was_not_stable_from_its_source() -> None:
    """The source may have lost power meanwhile: what it acked without a flush must not count as in sync."""
    lone = Lone(options={"on_no_data_accessible": "suspend-io"}, net={"max_epoch_size": 1})
    lone.target((10, 12), role=Role.SECONDARY)
    lone.primary()
    for block in (3, 5, 7):
        r = lone.submit(Op.WRITE, block * 4096)
        lone.settle()
        lone.meta(lone.ack(r))
        assert r in lone.done and not lone.vol.bitmap.any(3, 8)
    assert lone.engine.log.n_settled == 1
    lose(lone)
    assert lone.state.susp_nod and not lone.vol.bitmap.any(3, 8), "the log is kept"
    u = lone.vol.uuids
    lone.connect(uuids=(0x20, u.current & ~1, 0x10, 0), bits=2)
    assert lone.conn() == ConnState.WF_BITMAP_T
    assert [bit for bit in range(3, 8) if lone.vol.bitmap.any(bit, bit + 1)] == [3, 5, 7]


def test_after_the_replay_a_barrier_ack_settles_the_whole_log() -> None:
    lone, (_, waiting) = frozen()
    lone.packets.clear()
    lone.connect()
    lone.meta(lone.ack(waiting), pack_barrier_ack(barriers(lone)[-1], 1))
    assert lone.engine.log.n_requests == 0 and lone.vol.al.refs == {0: 0}


def test_a_log_of_acked_writes_alone_is_confirmed_by_a_flush() -> None:
    lone, _ = frozen(n_writes=1)
    lone.packets.clear()
    lone.connect()
    sector, block_id, _, flags = unpack_data(lone.payloads(P.DATA)[0])
    assert flags == DP_FLUSH | DP_SEND_WRITE_ACK and lone.sent(P.DATA, P.BARRIER) == [P.DATA, P.BARRIER]
    lone.meta(pack_ack(P.WRITE_ACK, 0, sector, block_id, 0, 1), pack_barrier_ack(barriers(lone)[-1], 1))
    assert lone.engine.log.n_requests == 0


def test_the_age_of_a_kept_log_does_not_count_against_the_new_connection() -> None:
    lone, _ = frozen()
    lone.at(lone.now + 1000)
    assert lone.engine.log.oldest_unanswered() is None
    lone.connect()
    assert lone.conn() == ConnState.CONNECTED
    lone.at(lone.now + 1)
    assert lone.conn() == ConnState.CONNECTED


def test_an_administrators_suspension_replays_too() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    assert lone.run("suspend-io") == "done"
    lose(lone)
    lone.packets.clear()
    lone.connect()
    assert lone.sent(P.DATA) == [P.DATA]
    lone.meta(lone.ack(r))
    assert lone.done == []
    lone.run("resume-io")
    assert lone.done == [r] and r.error == 0


# ----------------------------------------------------------------------------------------------- limits


def test_front_ends_pause_at_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = Lone().ready()
    m, log = lone.engine.mirror, lone.engine.log
    m.n_app = mirror.REQUESTS_MAX - 1
    assert not lone.engine.congested
    m.n_app += 1
    assert lone.engine.congested
    m.n_app, log.n_requests = 0, transfer_log.RECORDS_MAX - 1
    assert not lone.engine.congested
    log.n_requests += 1
    assert lone.engine.congested
    log.n_settled, log.n_requests = transfer_log.LOG_MAX - 1, transfer_log.LOG_MAX - 1
    assert not lone.engine.congested, "only their blocks are kept"
    log.n_requests += 1
    log.n_settled += 1
    assert lone.engine.congested


@pytest.mark.parametrize("limit", ["RECORDS_MAX", "EPOCHS_MAX"])
def test_a_long_log_asks_the_peer_to_flush_once(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_log, limit, 4)
    lone = Lone(net={"max_epoch_size": 1}).ready()
    for i in range(6):
        lone.submit(Op.WRITE, i * 8192)
        lone.settle()
    flushes = [p for p in lone.payloads(P.DATA) if len(p) == 24]
    assert len(flushes) == 1 and lone.engine.congested


def test_whoever_waits_for_what_was_sent_has_the_peer_flush_at_once() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    heard: list[None] = []
    lone.engine.log.when_stable(heard.append)
    lone.take()
    assert lone.sent(P.DATA, P.BARRIER) == [P.DATA, P.BARRIER, P.DATA, P.BARRIER]
    (flush,) = [unpack_data(p) for p in lone.payloads(P.DATA) if len(p) == 24]
    lone.meta(pack_ack(P.WRITE_ACK, 0, 0, flush[1], 0, 1))
    assert not heard
    lone.meta(pack_barrier_ack(0, 1))
    assert heard == [None], "the flush that was sent for it is nobody's concern"


def test_whoever_waits_for_what_was_sent_does_not_wait_for_what_comes_later() -> None:
    lone = Lone(n_volumes=2).ready()
    first = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(first))
    heard: list[None] = []
    lone.engine.log.when_stable(heard.append)
    lone.submit(Op.WRITE, volume=1)
    lone.settle()
    lone.meta(pack_barrier_ack(0, 1))
    assert heard == [None] and lone.engine.log.n_requests == 2, "a flush and the other volume's write"


def test_what_the_peer_was_writing_when_it_was_asked_to_flush_takes_another_flush() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    heard: list[None] = []
    lone.engine.log.when_stable(heard.append)
    lone.take()

    def flushes() -> list[int]:
        return [unpack_data(p)[1] for p in lone.payloads(P.DATA) if len(p) == 24]

    (flush,) = flushes()
    lone.meta(lone.ack(r), pack_ack(P.WRITE_ACK, 0, 0, flush, 0, 1))
    again = flushes()[1:]
    assert len(again) == 1
    lone.meta(pack_ack(P.WRITE_ACK, 0, 0, again[0], 0, 1))
    assert len(flushes()) == 2, "all of it was written when that one began"
    lone.meta(pack_barrier_ack(0, 1))
    assert heard == [None]


def test_a_log_that_is_full_frees_extents_by_a_flush() -> None:
    """Every slot of the activity log holds writes the peer has not confirmed."""
    lone = Lone(size=512 << 20, disk={"al_extents": 67}).ready()
    slots = lone.vol.al.slots
    for i in range(slots):
        r = lone.submit(Op.WRITE, i * AL_EXTENT)
        lone.settle()
        lone.meta(lone.ack(r))
    assert len(lone.done) == slots
    last = lone.submit(Op.WRITE, slots * AL_EXTENT)
    lone.settle()
    assert last.waiting == 0 and not last.legs & AL_REF, "no slot is free"
    flushes = [unpack_data(p) for p in lone.payloads(P.DATA) if len(p) == 24]
    assert len(flushes) == 1
    sent = [(e.barrier, e.n_sent) for e in lone.engine.log.epochs if e.barrier_sent]
    lone.meta(pack_ack(P.WRITE_ACK, 0, 0, flushes[0][1], 0, 1), *(pack_barrier_ack(*s) for s in sent))
    lone.settle()
    lone.meta(lone.ack(last))
    assert last in lone.done


# ------------------------------------------------------------------------------------------ on the wire


def test_the_flags_and_sequence_of_a_write() -> None:
    lone = Lone().ready()
    seq = lone.vol.seq
    lone.submit(Op.WRITE, 4096, flags=FUA)
    lone.settle()
    sector, block_id, number, flags = unpack_data(lone.payloads(P.DATA)[0])
    assert (sector, number, flags) == (8, seq + 1, DP_FUA | DP_SEND_WRITE_ACK)
    assert block_id in lone.engine.log.inflight


def test_overlapping_writes_go_one_after_the_other() -> None:
    lone = Lone().ready()
    first = lone.submit(Op.WRITE)
    lone.settle()
    second = lone.submit(Op.WRITE, 2048)
    lone.settle()
    assert lone.sent(P.DATA) == [P.DATA]
    lone.meta(lone.ack(first))
    lone.settle()
    assert lone.sent(P.DATA) == [P.DATA] * 2
    lone.meta(lone.ack(second))
    assert lone.done == [first, second]


def diskless_primary(**how: Any) -> Lone:
    lone = Lone(diskless=True, **how)
    lone.connect()
    lone.primary()
    lone.forget()
    return lone


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_a_diskless_primary_waits_for_the_only_disk_there_is(protocol: str) -> None:
    lone = diskless_primary(net={"protocol": protocol})
    r = lone.submit(Op.WRITE)
    assert unpack_data(lone.payloads(P.DATA)[0])[3] & DP_SEND_WRITE_ACK and lone.done == []
    lone.meta(lone.ack(r))
    assert lone.done == [r]


def test_a_remote_read_takes_exactly_its_own_reply() -> None:
    lone = diskless_primary()
    r = lone.submit(Op.READ, 8192)
    head = pack_data(P.DATA_REPLY, 0, 16, r.block_id, 0, 0, 4096)
    lone.data(head + b"\x07" * 4096)
    assert lone.done == [r] and r.payload is not None and bytes(r.payload) == b"\x07" * 4096


def test_a_remote_read_that_is_refused_is_an_error() -> None:
    lone = diskless_primary()
    r = lone.submit(Op.READ, 8192)
    lone.meta(lone.ack(r, P.NEG_DREPLY))
    assert lone.done == [r] and r.error == errno.EIO


def test_a_failed_local_read_is_served_by_the_peer() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.READ, 8192)
    lone.answer(r, error=errno.EIO)
    lone.settle()
    assert lone.sent(P.DATA_REQUEST) == [P.DATA_REQUEST] and lone.done == []
    lone.data(pack_data(P.DATA_REPLY, 0, 16, r.block_id, 0, 0, 4096) + bytes(4096))
    assert lone.done == [r] and r.error == 0


def test_a_write_without_any_good_disk_fails() -> None:
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, disk=DiskState.DISKLESS))
    lone.primary()
    lone.forget()
    lone.run("detach", force=True)
    r = lone.submit(Op.WRITE)
    assert lone.done == [r] and r.error == errno.EIO
