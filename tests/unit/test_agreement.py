"""Changes both nodes must agree to: one question at a time, the answer by our own rules, concurrent questions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl.config import Fencing
from tandem.repl.events import LinkLost, Opened
from tandem.repl.metadata import MdFlag, Superblock
from tandem.repl.requests import META, Op
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import Packet, pack_state_change, pack_state_reply, packet, unpack_i32, unpack_state_change

from tests.scenarios.lone import PEER_SECONDARY, Lone

P = Packet
PRIMARY = pack_state_change(0x3, 0x1, 0, False)
DETACH = pack_state_change(0x1E00, 0x400, 0, False)
DISCONNECT = pack_state_change(0x1F0, 0x10, 0, True)
DISCONNECT_OUTDATED = pack_state_change(0x1F0 | 0x1E00, 0x10 | DiskState.OUTDATED << 9, 0, True)
DISCONNECT_OUTDATES_US = pack_state_change(0x1F0 | 0x1E000, 0x10 | DiskState.OUTDATED << 13, 0, True)
INVALIDATE = pack_state_change(0x1F0, 0xC0, 0, False)


def codes(lone: Lone, kind: Packet = P.STATE_CHG_REPLY) -> list[int]:
    return [unpack_i32(p) for p in lone.payloads(kind)]


def asked(lone: Lone, kind: Packet = P.STATE_CHG_REQ) -> list[tuple[int, int]]:
    return [unpack_state_change(p) for p in lone.payloads(kind)]


def secondary() -> Lone:
    """Connected to another Secondary; the logs are empty."""
    lone = Lone()
    lone.attach()
    lone.connect()
    lone.forget()
    return lone


# ---------------------------------------------------------------------------------------- being asked


def test_a_promotion_is_agreed_to() -> None:
    lone = secondary()
    lone.data(PRIMARY)
    assert codes(lone) == [1] and lone.state.peer == Role.PRIMARY


def test_a_second_primary_is_refused() -> None:
    lone = Lone().ready()
    lone.data(PRIMARY)
    assert codes(lone) == [-1] and lone.state.peer == Role.SECONDARY


def test_a_primary_without_data_does_not_let_its_peer_detach() -> None:
    lone = Lone(diskless=True)
    lone.connect()
    lone.primary()
    lone.forget()
    lone.data(DETACH)
    assert codes(lone) == [-2] and lone.state.pdsk == DiskState.UP_TO_DATE


def test_a_detach_is_agreed_to_and_begins_a_new_generation() -> None:
    lone = Lone().ready()
    lone.data(DETACH)
    assert codes(lone) == [1] and lone.state.pdsk == DiskState.FAILED
    lone.settle()
    assert lone.vol.uuids.bitmap and lone.sent(P.UUIDS) == [P.UUIDS]


def test_a_disconnect_is_answered_before_the_sockets_close() -> None:
    lone = Lone().ready()
    lone.data(DISCONNECT)
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [1] and lone.closed
    assert lone.conn() == ConnState.WF_CONNECTION, "it keeps dialling"


@pytest.mark.parametrize(("mask_val", "disk", "pdsk"), [
    ((0x1FF0, 0xA10), DiskState.UP_TO_DATE, DiskState.OUTDATED),  # the peer outdates itself
    ((0x1E1F0, 0xA010), DiskState.OUTDATED, DiskState.D_UNKNOWN),  # we are to outdate ourselves
])  # fmt: skip
def test_a_fencing_disconnect_outdates_one_of_us(
    mask_val: tuple[int, int], disk: DiskState, pdsk: DiskState
) -> None:
    lone = secondary()
    lone.data(pack_state_change(*mask_val, 0, True))
    lone.settle()
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [1]
    assert (lone.local_disk(), lone.state.pdsk) == (disk, pdsk)


def flags_on_disk(lone: Lone) -> list[MdFlag]:
    """The superblocks that are on their way to the disk."""
    return [
        Superblock.unpack(bytes(op.payload or b"")).flags for op in lone.disk
        if op.area == META and op.offset == lone.layout.superblock
    ]  # fmt: skip


def test_being_outdated_is_on_disk_before_it_is_agreed_to() -> None:
    """The peer answers writes alone from then on: dead and back, this node must not pass for good."""
    lone = Lone(disk={"fencing": Fencing.RESOURCE_AND_STONITH}, handlers=("fence-peer",))
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    lone.data(DISCONNECT_OUTDATES_US)
    assert [MdFlag.WAS_UP_TO_DATE in flags for flags in flags_on_disk(lone)] == [False]
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [] and lone.conn() == ConnState.CONNECTED
    lone.answer(*lone.disk)
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [1] and lone.local_disk() == DiskState.OUTDATED
    lone.settle()
    assert not lone.vol.leaving and MdFlag.WAS_UP_TO_DATE not in lone.vol.flags()


def test_who_was_to_be_outdated_and_is_cut_off_before_stays_what_it_is() -> None:
    lone = secondary()
    lone.data(DISCONNECT_OUTDATES_US)
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    written = flags_on_disk(lone)
    while lone.disk:
        lone.answer(*lone.disk)
        written += flags_on_disk(lone)
    assert MdFlag.WAS_UP_TO_DATE in written[-1]
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [] and lone.local_disk() == DiskState.UP_TO_DATE


def test_a_disk_that_cannot_be_outdated_agrees_to_nothing() -> None:
    lone = secondary()
    lone.data(DISCONNECT_OUTDATES_US)
    lone.answer(*lone.disk, error=5)
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [-18] and lone.conn() == ConnState.CONNECTED


def test_an_invalidate_makes_us_the_source() -> None:
    lone = Lone().ready()
    lone.data(INVALIDATE)
    assert codes(lone) == [1] and lone.conn() == ConnState.STARTING_SYNC_S
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE and lone.vol.bitmap.weight == lone.vol.n_bits
    assert lone.sent(P.COMPRESSED_BITMAP, P.BITMAP) == [], "no bitmap is exchanged"


def test_nonsense_changes_nothing() -> None:
    """Masks and values no node would send: refused or ignored, never followed into a state nobody knows."""
    for mask, val in ((0, 0), (0x1F0, 0x1F0), (0x3, 0x3), (0xFFFF_FFFF, 0), (0x1E00, 0x1E00), (0x1F0, 0x80)):
        lone = secondary()
        lone.data(pack_state_change(mask, val, 0, False))
        lone.settle()
        assert lone.local_disk() == DiskState.UP_TO_DATE or lone.closed, (hex(mask), hex(val))


# ------------------------------------------------------------------------------------------------ asking


def test_a_promotion_asks_and_waits() -> None:
    lone = secondary()
    ticket = lone.command("primary")
    assert asked(lone) == [(3, 1)] and lone.answered(ticket) is None and str(lone.state.role) == "Secondary"
    assert lone.sent(P.PING) == [P.PING], "to find a dead peer early"
    lone.meta(pack_state_reply(1, 0, False))
    assert str(lone.state.role) == "Primary"
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.sent(P.STATE) == [P.STATE]


def test_the_first_write_waits_for_the_primary_mark_on_disk() -> None:
    lone = secondary()
    lone.command("primary")
    lone.meta(pack_state_reply(1, 0, False))
    lone.submit(Op.WRITE)
    assert lone.sent(P.DATA) == [] and all(op.area for op in lone.disk)
    lone.settle()
    assert lone.sent(P.DATA) == [P.DATA]


def test_a_refusal_of_the_peer_is_a_refusal() -> None:
    lone = secondary()
    ticket = lone.command("primary")
    lone.meta(pack_state_reply(-2, 0, False))
    lone.settle()
    refused = lone.answered(ticket)
    assert refused is not None and refused != "done" and refused.code == -10  # type: ignore[union-attr]
    assert lone.state.role == Role.SECONDARY


def test_losing_the_link_while_asking_means_judging_anew() -> None:
    lone = secondary()
    ticket = lone.command("primary")
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.state.role == Role.PRIMARY, "alone it may"


def test_a_reply_nobody_waits_for_is_ignored() -> None:
    lone = secondary()
    before = lone.state
    lone.meta(pack_state_reply(1, 0, False), pack_state_reply(-5, 0, True))
    assert lone.state == before and not lone.closed


def test_a_reply_of_the_last_connection_agrees_to_nothing() -> None:
    lone = Lone().ready()
    lone.command("disconnect")
    old = lone.engine.link.ticket
    lone.handle(LinkLost(old, "gone"))
    lone.settle()
    assert lone.conn() == ConnState.STAND_ALONE
    lone.run("connect")
    lone.connect()
    lone.meta(pack_state_reply(1, 0, True))
    assert lone.conn() >= ConnState.CONNECTED


@pytest.mark.parametrize(("resolver", "answer"), [(True, -19), (False, 1)])
def test_of_two_concurrent_questions_the_resolvers_wins(resolver: bool, answer: int) -> None:
    lone = Lone()
    lone.attach()
    lone.connect(resolver=resolver)
    lone.forget()
    lone.command("primary")
    lone.data(PRIMARY)
    assert codes(lone) == [answer]


@pytest.mark.parametrize(("ours", "theirs", "kind"), [
    ("detach", DISCONNECT_OUTDATED, P.CONN_ST_CHG_REPLY),
    ("disconnect", DETACH, P.STATE_CHG_REPLY),
], ids=["detach", "disconnect"])  # fmt: skip
def test_a_detach_and_a_disconnect_that_outdates_exclude_each_other(ours: str, theirs: bytes, kind: Packet) -> None:
    """Together they would leave a generation on each node: one begins it for want of a peer's disk, the other
    for want of the peer."""
    lone = Lone(disk={"fencing": Fencing.RESOURCE_AND_STONITH})
    lone.attach()
    lone.connect(resolver=True)
    lone.forget()
    lone.command(ours)
    lone.settle()
    lone.data(theirs)
    assert codes(lone, kind) == [-19]


def test_who_is_attaching_does_not_agree_to_be_outdated() -> None:
    lone = Lone()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    lone.forget()
    lone.command("attach")
    lone.data(DISCONNECT_OUTDATES_US)
    assert codes(lone, P.CONN_ST_CHG_REPLY) == [-18] and lone.conn() == ConnState.CONNECTED


def test_who_cannot_follow_a_resync_that_was_agreed_to_parts() -> None:
    """Else the peer would be source for ever of a target that waits for something else."""
    lone = secondary()
    ticket = lone.command("invalidate")
    lone.settle()
    lone.engine.change(lone.vol, replace(lone.state, conn=ConnState.WF_BITMAP_S), hard=True)
    lone.meta(pack_state_reply(1, 0, False))
    lone.settle()
    assert lone.answered(ticket) != "done" and lone.conn() < ConnState.CONNECTED


def test_who_lost_the_race_is_refused() -> None:
    """We asked, the resolver asked too: ours is refused, and the other one is Primary now."""
    lone = Lone()
    lone.attach()
    lone.connect(resolver=False)
    lone.forget()
    ticket = lone.command("primary")
    lone.data(PRIMARY)
    lone.meta(pack_state_reply(-19, 0, False))
    lone.settle()
    lone.at(lone.now + 5)
    refused = lone.answered(ticket)
    assert refused is not None and refused != "done" and lone.state.role == Role.SECONDARY


def test_a_transient_answer_is_asked_again_after_a_change() -> None:
    lone = secondary()
    ticket = lone.command("primary")
    lone.meta(pack_state_reply(-18, 0, False), packet(P.PING_ACK))
    assert lone.answered(ticket) is None and len(asked(lone)) == 1
    lone.handle(Opened(0, 0))
    lone.engine.change(lone.vol, replace(lone.state, user_isp=True))
    lone.take()
    assert len(asked(lone)) == 2
    lone.meta(pack_state_reply(1, 0, False))
    lone.settle()
    assert lone.answered(ticket) == "done"


def test_demotion_asks_nobody() -> None:
    lone = Lone().ready()
    assert lone.run("secondary") == "done"
    assert asked(lone) == [] and lone.sent(P.STATE) == [P.STATE]


def test_while_the_peer_is_diskless_nobody_is_outdated() -> None:
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, disk=DiskState.DISKLESS))
    assert lone.run("outdate") == "done" and lone.local_disk() == DiskState.UP_TO_DATE


@pytest.mark.parametrize("code", [-19, -18])
def test_a_disconnect_that_crossed_another_request_is_asked_for_again(code: int) -> None:
    """Nothing changes here when the request that was in its way is refused."""
    lone = secondary()
    ticket = lone.command("disconnect")
    lone.meta(pack_state_reply(code, 0, True))
    assert len(asked(lone, P.CONN_ST_CHG_REQ)) == 1 and lone.answered(ticket) is None
    lone.at(lone.now + 2)
    assert len(asked(lone, P.CONN_ST_CHG_REQ)) == 2
    lone.meta(pack_state_reply(1, 0, True))
    assert lone.answered(ticket) == "done" and lone.conn() == ConnState.STAND_ALONE


def test_a_peer_that_stays_in_the_middle_of_a_change_is_asked_again() -> None:
    lone = secondary()
    ticket = lone.command("primary")
    lone.meta(pack_state_reply(-18, 0, False), packet(P.PING_ACK))
    lone.at(lone.now + 2)
    assert len(asked(lone)) == 2
    lone.meta(pack_state_reply(1, 0, False))
    lone.settle()
    assert lone.answered(ticket) == "done"


# ------------------------------------------------------------------------------------------ both at once


@pytest.mark.parametrize("answered", [True, False])
def test_both_disconnect_and_every_volume_of_the_outdated_one_is(answered: bool) -> None:
    """Our own command waits; it goes on when the whole connection has ended, not between two volumes."""
    lone = Lone(n_volumes=2, disk={"fencing": Fencing.RESOURCE_ONLY}, handlers=("fence-peer",))
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    ticket = lone.command("disconnect")
    assert lone.answered(ticket) is None
    if answered:
        lone.meta(pack_state_reply(-19, 0, True))
    lone.data(DISCONNECT_OUTDATES_US)
    lone.settle()
    assert [v.state.disk for v in lone.engine.volumes.values()] == [DiskState.OUTDATED] * 2
    lone.at(lone.now + 5)
    assert lone.answered(ticket) == "done" and lone.engine.cstate == ConnState.STAND_ALONE
