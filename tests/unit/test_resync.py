"""Resync: what is asked for and served, interlocking with applications, failures, pauses, the end."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tandem.repl import resync, resync_target
from tandem.repl.bitmap_exchange import BitmapSender
from tandem.repl.digests import digest
from tandem.repl.events import HandlerExited, LinkLost
from tandem.repl.metadata import MdFlag
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.uuids import UuidSet
from tandem.repl.wire import (
    ID_SYNCER,
    Packet,
    Uuids,
    pack_ack,
    pack_block_desc,
    pack_block_req,
    pack_data,
    pack_state,
    pack_state_change,
    pack_sync_uuid,
    packet,
    unpack_ack,
    unpack_block_req,
    unpack_data,
    unpack_u64,
)

from tests.scenarios.lone import PEER_SECONDARY, SYNC_UUID, Lone

P = Packet
MIB = 1 << 20


def requests(lone: Lone) -> list[tuple[int, int]]:
    """(bit, number of bits) of every P_RS_DATA_REQUEST."""
    asked = [unpack_block_req(p) for p in lone.payloads(P.RS_DATA_REQUEST)]
    assert all(block_id == ID_SYNCER for _, block_id, _ in asked)
    return [(sector >> 3, size >> 12) for sector, _, size in asked]


def reply(bit: int, n: int = 1, fill: int = 7) -> bytes:
    return pack_data(P.RS_DATA_REPLY, 0, bit * 8, ID_SYNCER, 0, 0, n * 4096) + bytes([fill]) * (n * 4096)


def request(bit: int, n: int = 1) -> bytes:
    return pack_block_req(P.RS_DATA_REQUEST, 0, bit * 8, ID_SYNCER, n * 4096)


def rs_ack(bit: int, n: int = 1, kind: Packet = P.RS_WRITE_ACK) -> bytes:
    return pack_ack(kind, 0, bit * 8, ID_SYNCER, n * 4096, 1)


def peer_state(lone: Lone, **changes: object) -> bytes:
    s = lone.state
    mirrored = State(s.peer, s.role, s.conn, s.pdsk, s.disk)
    return pack_state(replace(mirrored, **changes).word(), 0)  # type: ignore[arg-type]


# ----------------------------------------------------------------------------------------------- target


def test_set_bits_are_merged_up_to_one_mebibyte_and_its_boundaries() -> None:
    lone = Lone().target((3, 5), (7, 8), (250, 600))
    assert requests(lone) == [(3, 2), (7, 1), (250, 6), (256, 256), (512, 88)]


def test_the_window_limits_what_is_out() -> None:
    lone = Lone().target((0, 4096))
    assert len(requests(lone)) * MIB == resync_target.WINDOW_IDLE
    lone.data(reply(0, 256))
    lone.settle()
    assert len(requests(lone)) == resync_target.WINDOW_IDLE // MIB + 1


def test_applications_shrink_the_window() -> None:
    lone = Lone().target((0, 4096))
    n = len(requests(lone))
    lone.vol.last_app_io = lone.now
    lone.data(reply(0, 256))
    lone.settle()
    assert len(requests(lone)) == n


def test_the_merged_bitmap_is_durable_before_the_first_block_is_asked_for() -> None:
    """After a power cut the target must still know every block it may have lost."""
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY), uuids=(0x20, 0x10, 0, 0))
    lone.data(lone.bitmap_packets((0, 1)), pack_sync_uuid(SYNC_UUID, 0))
    seen = 0
    while lone.disk:
        op = lone.disk[0]
        seen += op.op == Op.WRITE and op.offset == lone.layout.bitmap
        assert requests(lone) == [] or seen, "asked before the bitmap was written"
        lone.answer(op)
    assert seen and requests(lone) == [(0, 1)]


def test_a_block_is_written_then_cleared_then_acknowledged() -> None:
    lone = Lone().target((0, 2))
    lone.data(reply(0, 2))
    assert [(op.op, op.offset, op.length) for op in lone.disk] == [(Op.WRITE, 0, 8192)]
    assert lone.vol.bitmap.weight == 2 and not lone.sent(P.RS_WRITE_ACK)
    lone.answer()
    assert lone.vol.bitmap.weight == 0 and lone.sent(P.RS_WRITE_ACK) == [P.RS_WRITE_ACK]


def test_the_target_ends_with_a_ping_then_its_generation_then_the_state() -> None:
    lone = Lone().target((0, 1))
    lone.data(reply(0))
    lone.settle()
    assert lone.sent(P.PING, P.STATE) == [P.PING] and lone.conn() == ConnState.SYNC_TARGET
    lone.meta(packet(P.PING_ACK))
    assert lone.sent(P.STATE) == [], "the superblock comes first"
    lone.settle()
    assert lone.sent(P.STATE) == [P.STATE] and lone.conn() == ConnState.CONNECTED
    assert lone.local_disk() == lone.state.pdsk == DiskState.UP_TO_DATE
    assert lone.vol.uuids == UuidSet(0x20, 0, SYNC_UUID, 0x10)


def test_bits_leave_the_disk_only_after_the_data_was_flushed() -> None:
    lone = Lone().target((0, 1))
    lone.data(reply(0))
    lone.answer()
    pages = [op for op in lone.disk if op.op == Op.WRITE and op.offset == lone.layout.bitmap]
    assert not pages and [op.op for op in lone.disk if not op.area] == [Op.FLUSH]


def test_an_empty_resync_goes_through_the_same_motions() -> None:
    lone = Lone().target()
    lone.settle()
    assert requests(lone) == [] and lone.sent(P.PING) == [P.PING]
    lone.meta(packet(P.PING_ACK))
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and lone.vol.uuids.current == 0x20


def test_bits_that_are_set_behind_the_cursor_are_found() -> None:
    lone = Lone().target((100, 101))
    lone.data(pack_block_desc(P.OUT_OF_SYNC, 0, 8, 4096), reply(100))
    lone.settle()
    assert requests(lone) == [(100, 1), (1, 1)]


def test_bits_set_while_the_end_is_written_reopen_the_resync() -> None:
    lone = Lone().target((5, 6))
    lone.data(reply(5))
    lone.settle()
    lone.data(pack_block_desc(P.OUT_OF_SYNC, 0, 8, 4096))
    lone.meta(packet(P.PING_ACK))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_TARGET and requests(lone) == [(5, 1), (1, 1)]


@pytest.mark.parametrize("how", ["write", "read"])
def test_failed_blocks_stay_out_of_sync_and_no_generation_is_adopted(how: str) -> None:
    lone = Lone(disk={"on_io_error": "pass_on"}).target((0, 1), (9, 10))
    uuids = lone.vol.uuids
    if how == "read":
        lone.meta(rs_ack(0, kind=P.NEG_RS_DREPLY))
    else:
        lone.data(reply(0))
        lone.answer(error=errno.EIO)
        assert [unpack_ack(p)[0] for p in lone.payloads(P.NEG_ACK)] == [0]
    lone.data(reply(9))
    lone.settle()
    lone.meta(packet(P.PING_ACK))
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and lone.local_disk() == DiskState.INCONSISTENT
    assert lone.vol.bitmap.weight == 1 and lone.vol.uuids == uuids


def test_a_cancelled_request_is_asked_again() -> None:
    lone = Lone().target((4, 5))
    lone.meta(rs_ack(4, kind=P.RS_CANCEL))
    lone.take()
    assert requests(lone) == [(4, 1), (4, 1)] and lone.vol.rs_failed == 0


def test_a_block_that_is_in_sync_already_is_not_written() -> None:
    lone = Lone().target((4, 5))
    lone.meta(rs_ack(4, kind=P.RS_IS_IN_SYNC))
    assert lone.vol.bitmap.weight == 0 and not [op for op in lone.disk if op.op == Op.WRITE and not op.area]


def test_a_deallocated_block_becomes_zeroes() -> None:
    lone = Lone().target((4, 5))
    lone.data(pack_block_desc(P.RS_DEALLOCATED, 0, 32, 4096))
    assert [(op.op, op.offset) for op in lone.disk] == [(Op.ZEROES, 16384)]


@pytest.mark.parametrize("wrong", [reply(8), reply(4, 2)])
def test_data_nobody_asked_for_is_a_protocol_error(wrong: bytes) -> None:
    lone = Lone().target((4, 5))
    lone.data(wrong)
    assert lone.closed and not [op for op in lone.disk if op.op == Op.WRITE and not op.area]


def test_a_rate_limit_spreads_the_requests() -> None:
    lone = Lone(disk={"c_plan_ahead": 0, "resync_rate": 4096}).target((0, 4096))
    begun = lone.now
    answered = 0
    while lone.now < begun + 4:
        for bit, n in requests(lone)[answered:]:
            lone.data(reply(bit, n))
        answered = len(requests(lone))
        lone.settle()
        lone.at(lone.now + 0.05)
    copied = answered * MIB / 4
    assert 3.5 * MIB <= copied <= 4.6 * MIB, "4 MiB/s"


def test_progress_is_persisted_now_and_then() -> None:
    lone = Lone().target((0, 4096))
    lone.data(reply(0, 256))
    lone.settle()
    lone.at(lone.now + resync_target.PERSIST_S + resync.MARK_S)
    assert [op.op for op in lone.disk if not op.area] == [Op.FLUSH]


def test_an_application_write_on_the_target_waits_for_the_block_asked_for() -> None:
    """A Primary that is resynced writes where a copy is on its way."""
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect()  # equal generations would be needed to be promoted: the test only wants the role
    lone = Lone().target((0, 1), role=Role.SECONDARY)
    lone.primary()
    r = lone.submit(Op.WRITE)
    lone.settle()
    assert lone.sent(P.DATA) == [] and r.waiting == 0
    lone.data(reply(0))
    lone.settle()
    assert lone.sent(P.DATA) == [P.DATA]


def test_losing_the_connection_forgets_the_run_and_keeps_the_bits() -> None:
    lone = Lone().target((0, 3))
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.vol.target is None and lone.vol.bitmap.weight == 3 and not lone.vol.intervals


def test_a_pause_stops_asking_and_what_is_out_is_finished() -> None:
    lone = Lone().target((0, 4096))
    n = len(requests(lone))
    assert lone.run("pause-sync") == "done"
    lone.data(reply(0, 256))
    lone.settle()
    assert lone.conn() == ConnState.PAUSED_SYNC_T and len(requests(lone)) == n
    assert lone.vol.bitmap.weight == 4096 - 256
    assert lone.run("resume-sync") == "done"
    assert lone.conn() == ConnState.SYNC_TARGET and len(requests(lone)) == n + 1


def test_the_target_waits_for_writes_mirrored_before_the_resync() -> None:
    """They are in no table; a copy asked for now could land under them."""
    lone = Lone().as_secondary()
    head = pack_data(P.DATA, 0, 0, 1, 1, 0x100, 4096)
    lone.data(head + bytes(4096))
    (mirrored,) = lone.disk
    lone.data(peer_state(lone, conn=ConnState.STARTING_SYNC_S))
    assert lone.conn() in (ConnState.CONNECTED, ConnState.WF_BITMAP_T)
    assert mirrored in lone.disk


# ----------------------------------------------------------------------------------------------- source


def test_the_source_reads_then_sends_and_clears_on_the_ack() -> None:
    lone = Lone().source((0, 4))
    lone.data(request(0, 4))
    assert [(op.op, op.offset, op.length) for op in lone.disk if not op.area] == [(Op.READ, 0, 16384)]
    assert lone.sent(P.RS_DATA_REPLY) == []
    lone.answer()
    assert [unpack_data(p)[:2] for p in lone.payloads(P.RS_DATA_REPLY)] == [(0, ID_SYNCER)]
    assert lone.vol.bitmap.weight == 4
    lone.meta(rs_ack(0, 4))
    assert lone.vol.bitmap.weight == 0


@pytest.mark.parametrize(("asked", "pdsk"), [(False, DiskState.D_UNKNOWN), (True, DiskState.INCONSISTENT)])
def test_a_target_counts_as_inconsistent_once_it_has_asked(asked: bool, pdsk: DiskState) -> None:
    """Lost before, it may come back with a disk that still passes for good."""
    lone = Lone().source((0, 4))
    if asked:
        lone.data(request(0, 4))
        lone.settle()
    assert bool(lone.vol.flags() & MdFlag.PEER_OUT_DATED) == asked
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    assert lone.state.pdsk == pdsk


def test_a_new_generation_keeps_the_sync_uuid_in_its_history() -> None:
    """A target that detaches is known by it, also when the generation begins only at the next connection."""
    lone = Lone().source((0, 4))
    sync_uuid = lone.vol.uuids.bitmap
    lone.engine.new_current(lone.vol)
    assert lone.vol.uuids.history0 == sync_uuid and lone.vol.uuids.bitmap & ~1 == 0x20


def test_an_ack_of_a_disk_that_was_given_up_clears_nothing() -> None:
    """What was written to the block meanwhile never went there."""
    lone = Lone().source((0, 4))
    lone.data(request(0, 4))
    lone.settle()
    lone.data(pack_state_change(0x1E00, DiskState.FAILED << 9, 0, False))
    lone.meta(rs_ack(0, 4))
    assert lone.state.pdsk == DiskState.FAILED and lone.vol.bitmap.weight == 4


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("kind", [P.RS_WRITE_ACK, P.NEG_ACK])
def test_a_late_ack_of_a_resync_that_was_given_up_does_not_count_for_the_next(kind: Packet, behind: bool) -> None:
    """The disk left and came back on the same connection; what it answers on the other socket is older."""
    lone = Lone().source((0, 4))
    leaves = pack_state_change(0x1E00, DiskState.FAILED << 9, 0, False)
    lone.data(*((leaves, request(0, 4)) if behind else (request(0, 4), leaves)))
    lone.settle()
    assert lone.sent(P.RS_DATA_REPLY) == [P.RS_DATA_REPLY]
    lone.data(peer_state(lone, disk=DiskState.DISKLESS))
    lone.data(Uuids(SYNC_UUID, 0, 0, 0, 4, 0).pack(0), peer_state(lone, disk=DiskState.NEGOTIATING))
    assert lone.conn() == ConnState.WF_BITMAP_S
    lone.data(lone.bitmap_packets((0, 4)))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE
    lone.meta(rs_ack(0, 4, kind))
    assert lone.vol.bitmap.weight == 4 and lone.vol.rs_failed == 0
    lone.data(request(0, 4))
    lone.settle()
    lone.meta(rs_ack(0, 4))
    assert lone.vol.bitmap.weight == 0


def test_a_block_of_a_resync_that_was_given_up_is_answered_when_it_is_on_the_disk() -> None:
    lone = Lone().target((0, 4))
    lone.data(reply(0, 4))
    (write,) = [op for op in lone.disk if op.op == Op.WRITE and not op.area]
    lone.data(peer_state(lone, disk=DiskState.DISKLESS))
    assert lone.conn() == ConnState.CONNECTED
    lone.answer(write)
    assert len(lone.payloads(P.NEG_ACK)) == 1 and lone.sent(P.RS_WRITE_ACK) == []


def test_a_write_waits_while_its_block_is_read_and_follows_the_reply() -> None:
    lone = Lone().source((0, 256))
    lone.data(request(0, 256))
    (read,) = [op for op in lone.disk if op.op == Op.READ]
    inside, outside = lone.submit(Op.WRITE, 4096), lone.submit(Op.WRITE, 8 * MIB)
    while any(op is not read for op in lone.disk):
        lone.answer(*(op for op in lone.disk if op is not read))
    assert [unpack_data(p)[0] for p in lone.payloads(P.DATA)] == [outside.offset >> 9] and inside.waiting == 0
    lone.answer(read)
    lone.settle()
    assert lone.sent(P.RS_DATA_REPLY, P.DATA) == [P.DATA, P.RS_DATA_REPLY, P.DATA]


def test_the_read_waits_for_a_write_that_is_not_acknowledged() -> None:
    lone = Lone().source((0, 1))
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.data(request(0))
    lone.settle()
    assert lone.sent(P.RS_DATA_REPLY) == []
    lone.meta(lone.ack(r, P.RS_WRITE_ACK))
    lone.settle()
    assert lone.sent(P.RS_DATA_REPLY) == [P.RS_DATA_REPLY]


def test_a_read_error_is_told_and_costs_the_disk() -> None:
    lone = Lone().source((0, 1))
    lone.data(request(0))
    lone.answer(error=errno.EIO)
    assert lone.sent(P.NEG_RS_DREPLY) == [P.NEG_RS_DREPLY]


def test_a_source_without_a_good_disk_refuses() -> None:
    lone = Lone(diskless=True)
    lone.connect()
    lone.data(request(0))
    assert lone.sent(P.NEG_RS_DREPLY) == [P.NEG_RS_DREPLY] and lone.disk == []


def test_the_source_ends_when_the_target_says_so_and_its_own_bits_are_clear() -> None:
    lone = Lone().source((0, 1))
    done = peer_state(lone, conn=ConnState.CONNECTED, disk=DiskState.UP_TO_DATE)
    lone.data(done)
    assert lone.conn() == ConnState.SYNC_SOURCE, "an ack is still missing"
    lone.meta(rs_ack(0), packet(P.PING))
    lone.settle()
    lone.data(done)
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and lone.state.pdsk == DiskState.UP_TO_DATE
    assert lone.vol.uuids == UuidSet(0x21, 0, SYNC_UUID, 0x10)


def test_failed_blocks_end_without_a_new_generation() -> None:
    lone = Lone().source((0, 1))
    uuids = lone.vol.uuids
    lone.meta(rs_ack(0, kind=P.NEG_ACK))
    lone.data(peer_state(lone, conn=ConnState.CONNECTED, disk=DiskState.INCONSISTENT))
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and lone.state.pdsk == DiskState.INCONSISTENT
    assert lone.vol.uuids == uuids and lone.vol.bitmap.weight == 1


def test_a_checksum_that_fits_saves_the_block() -> None:
    crc = digest("crc32c")
    assert crc is not None
    lone = Lone(net={"csums_alg": "crc32c"}).source((0, 2))
    for bit, content in ((0, bytes(4096)), (1, b"\1" * 4096)):
        lone.data(pack_block_req(P.CSUM_RS_REQUEST, 0, bit * 8, ID_SYNCER, 4096, crc(content)))
    lone.answer()  # the disk holds zeros
    assert lone.sent(P.RS_IS_IN_SYNC) == [P.RS_IS_IN_SYNC] and lone.vol.bitmap.weight == 1
    assert [unpack_data(p)[0] for p in lone.payloads(P.RS_DATA_REPLY)] == [8]


def test_an_answer_for_a_connection_that_is_gone_is_not_sent() -> None:
    lone = Lone().source((0, 1))
    lone.data(request(0))
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.sent(P.RS_DATA_REPLY) == [] and not lone.vol.intervals


# -------------------------------------------------------------------------------- the beginning, handlers


def test_the_sync_uuid_is_durable_before_it_is_sent() -> None:
    lone = Lone()
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.forget()
    lone.data(lone.bitmap_packets())
    assert lone.sent(P.SYNC_UUID) == [] and lone.disk
    lone.settle()
    assert [unpack_u64(p) for p in lone.payloads(P.SYNC_UUID)] == [SYNC_UUID]
    assert lone.sent(P.SYNC_UUID, P.STATE)[:1] == [P.SYNC_UUID]


@pytest.mark.parametrize(("code", "goes_on"), [(0, True), (3, True), (1, False)])
def test_before_resync_source_decides(code: int, goes_on: bool) -> None:
    lone = Lone(handlers=("before-resync-source",))
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.data(lone.bitmap_packets())
    assert lone.conn() == ConnState.WF_BITMAP_S
    lone.handle(HandlerExited(lone.handler("before-resync-source").ticket, code))
    lone.settle()
    assert lone.conn() == (ConnState.SYNC_SOURCE if goes_on else ConnState.STAND_ALONE)


@pytest.mark.parametrize(("code", "goes_on"), [(0, True), (3, False)])
def test_before_resync_target_decides(code: int, goes_on: bool) -> None:
    lone = Lone(handlers=("before-resync-target",))
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect(uuids=(0x20, 0x10, 0, 0))
    lone.data(lone.bitmap_packets(), pack_sync_uuid(SYNC_UUID, 0))
    lone.settle()
    assert lone.conn() == ConnState.WF_SYNC_UUID
    lone.handle(HandlerExited(lone.handler("before-resync-target").ticket, code))
    lone.settle()
    assert lone.conn() == (ConnState.SYNC_TARGET if goes_on else ConnState.STAND_ALONE)


def test_a_handler_of_a_resync_that_is_over_changes_nothing() -> None:
    lone = Lone(handlers=("before-resync-source",))
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.data(lone.bitmap_packets())
    old = lone.handler("before-resync-source")
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    state, uuids = lone.state, lone.vol.uuids
    lone.handle(HandlerExited(old.ticket, 1))
    lone.settle()
    assert lone.state == state and lone.vol.uuids == uuids


def test_a_sync_uuid_that_comes_early_is_kept() -> None:
    """The bitmap of ours may still be on its way when the source has everything."""
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect(uuids=(0x20, 0x10, 0, 0))
    lone.data(pack_sync_uuid(SYNC_UUID, 0))
    assert lone.conn() == ConnState.WF_BITMAP_T
    lone.data(lone.bitmap_packets((0, 1)))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_TARGET and lone.vol.uuids.current == SYNC_UUID


def test_a_sync_uuid_out_of_place_is_a_protocol_error() -> None:
    lone = Lone().ready()
    lone.data(pack_sync_uuid(SYNC_UUID, 0))
    assert lone.closed


def test_a_bitmap_out_of_place_is_a_protocol_error() -> None:
    lone = Lone().ready()
    lone.data(lone.bitmap_packets())
    assert lone.closed


def test_the_target_answers_with_the_merged_bitmap() -> None:
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.vol.bitmap.set(100, 101)
    lone.connect(uuids=(0x20, 0x10, 0, 0))
    lone.forget()
    lone.data(lone.bitmap_packets((5, 6)))
    merged = lone.vol.bitmap
    assert merged.weight == 2
    (expected,) = BitmapSender(merged, 0, True).packets(1 << 20)
    assert lone.payloads(P.COMPRESSED_BITMAP) == [expected[16:]]


def test_a_rate_limit_wakes_the_machine_when_the_next_byte_is_allowed() -> None:
    """Also when somebody asks for the deadline a little later, and when other events go by."""
    lone = Lone(disk={"c_plan_ahead": 0, "resync_rate": 4096}).target((0, 4096))
    due = lone.engine.deadline()
    assert due is not None and due < lone.now + 0.01
    lone.at(due)
    assert len(requests(lone)) == 1
    due = lone.engine.deadline()
    assert due == pytest.approx(lone.now + 0.25, abs=0.01), "1 MiB at 4 MiB/s"
    lone.now += 0.1
    lone.data(reply(0, 256))
    lone.settle()
    assert lone.engine.deadline() == due


def test_replies_asked_for_before_the_targets_disk_failed_are_drained() -> None:
    lone = Lone().target((0, 1), (9, 10))
    lone.data(reply(0))
    lone.answer(error=errno.ENOSPC)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS and lone.conn() == ConnState.CONNECTED
    assert any("ENOSPC on /dev/fake0" in note for note in lone.notes())
    lone.packets.clear()
    lone.data(reply(9))
    assert [unpack_ack(p)[:2] for p in lone.payloads(P.NEG_ACK)] == [(72, ID_SYNCER)]
    assert lone.conn() == ConnState.CONNECTED and not lone.closed
