"""What follows from a state change: which packets in which order, new generations, flags on disk, handlers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl.aftermath import lost_peer_data
from tandem.repl.config import Fencing
from tandem.repl.events import Attach, Attached, LinkLost, RunHandler, StateChanged
from tandem.repl.metadata import MdFlag, Superblock
from tandem.repl.requests import META, Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import ID_SYNCER, Packet, Uuids, pack_ack, pack_barrier_ack, pack_state, pack_state_reply

from tests.scenarios.lone import PEER_SECONDARY, Lone
from tests.scenarios.pair import GENERATIONS

P, D, C = Packet, DiskState, ConnState
CONNECTED = State(Role.PRIMARY, Role.SECONDARY, C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE)


# -------------------------------------------------------------------------------------- losing the peer


@pytest.mark.parametrize(("before", "after", "lost"), [
    (D.UP_TO_DATE, D.D_UNKNOWN, True), (D.UP_TO_DATE, D.OUTDATED, True), (D.UP_TO_DATE, D.FAILED, True),
    (D.CONSISTENT, D.D_UNKNOWN, True), (D.INCONSISTENT, D.DISKLESS, True), (D.D_UNKNOWN, D.OUTDATED, True),
    (D.D_UNKNOWN, D.DISKLESS, True), (D.UP_TO_DATE, D.CONSISTENT, False), (D.UP_TO_DATE, D.INCONSISTENT, False),
    (D.OUTDATED, D.D_UNKNOWN, False), (D.DISKLESS, D.D_UNKNOWN, False), (D.D_UNKNOWN, D.D_UNKNOWN, False),
    (D.D_UNKNOWN, D.INCONSISTENT, False), (D.D_UNKNOWN, D.UP_TO_DATE, False),
])  # fmt: skip
def test_when_the_peers_copy_is_lost(before: DiskState, after: DiskState, lost: bool) -> None:
    assert lost_peer_data(replace(CONNECTED, pdsk=before), replace(CONNECTED, pdsk=after)) is lost


def test_a_primary_begins_one_generation_when_it_loses_its_peer() -> None:
    lone = Lone().ready()
    old = lone.vol.uuids
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.vol.uuids.bitmap == old.current and lone.vol.uuids.current & 1
    lone.connect(uuids=GENERATIONS)
    assert lone.conn() == C.WF_BITMAP_S
    current = lone.vol.uuids.current
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    assert lone.vol.uuids.current == current, "it still knows what the peer lacks"


def test_a_secondary_begins_no_generation() -> None:
    lone = Lone().as_secondary()
    old = lone.vol.uuids
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.vol.uuids == old


def test_a_frozen_primary_only_remembers_that_one_is_due() -> None:
    lone = Lone().ready()
    lone.run("suspend-io")
    old = lone.vol.uuids
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.vol.uuids == old and lone.vol.new_current_pending
    lone.run("resume-io")
    assert lone.vol.uuids.bitmap == old.current and not lone.vol.new_current_pending


def lose_disk(lone: Lone) -> None:
    """The peer's disk is detached; it says so twice, as it does."""
    for disk in (D.FAILED, D.DISKLESS):
        said = State(lone.state.peer, lone.state.role, C.CONNECTED, disk, lone.local_disk())
        lone.data(pack_state(said.word(), 0))
        lone.settle()


def test_a_suspended_secondary_begins_a_generation_for_a_primary_without_a_disk() -> None:
    """What that Primary writes here is not held up: its own disk must be known as the older one when it is back."""
    lone = Lone().as_secondary()
    lone.run("suspend-io")
    old = lone.vol.uuids
    lose_disk(lone)
    assert lone.vol.uuids.bitmap == old.current and not lone.vol.new_current_pending
    assert len(lone.sent(P.UUIDS)) == 1


def test_a_suspended_primary_begins_its_generation_while_the_connection_stands() -> None:
    """Nothing is sent again there; and the peer, attached again, would be taken for equal without a resync."""
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    lone.run("suspend-io")
    old = lone.vol.uuids
    lose_disk(lone)
    assert lone.vol.uuids.bitmap == old.current and not lone.vol.new_current_pending
    assert lone.vol.bitmap.weight == 1


def test_a_suspended_primary_that_meets_its_peer_again_needs_no_generation() -> None:
    """Begun when I/O is resumed, it would make a stranger of a peer that has everything."""
    lone = Lone().ready()
    lone.run("suspend-io")
    old = lone.vol.uuids
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    lone.connect()
    assert lone.conn() == C.CONNECTED and not lone.vol.new_current_pending
    lone.run("resume-io")
    assert lone.vol.uuids == old


@pytest.mark.parametrize("promoted", ["as sync target", "without a disk"])
def test_a_primary_that_reads_from_its_peer_finds_it_again_without_a_disk(promoted: str) -> None:
    """The generation in use is the peer's, whatever its own disk had when that was UpToDate."""
    lone = Lone().target((0, 8), role=Role.SECONDARY)
    assert lone.vol.exposed == 0x10
    if promoted == "as sync target":
        lone.primary()
    lone.run("detach", force=True)
    if promoted == "without a disk":
        lone.primary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    lone.connect(uuids=(0x20, 0x10, 0, 0))
    assert lone.conn() == C.CONNECTED


def test_demotion_clears_bit_0_and_promotion_sets_it() -> None:
    lone = Lone()
    lone.attach()
    lone.run("primary")
    assert lone.vol.uuids.current & 1
    lone.run("secondary")
    assert not lone.vol.uuids.current & 1


# -------------------------------------------------------------------------------------- what the peer is told




def test_attaching_tells_sizes_generations_and_state() -> None:
    lone = Lone()
    lone.connect()
    lone.command("attach")
    lone.packets.clear()
    lone.handle(Attached(lone.of(Attach)[-1].ticket, 0, lone.loaded()))
    assert lone.sent() == [P.SIZES, P.UUIDS, P.STATE]


@pytest.mark.parametrize("found", [D.NEGOTIATING, D.INCONSISTENT])
def test_a_peer_that_attached_is_told_generations_and_state(found: DiskState) -> None:
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, disk=D.DISKLESS))
    lone.packets.clear()
    lone.data(Uuids(*GENERATIONS, 0, 0).pack(0))
    lone.data(pack_state(replace(PEER_SECONDARY, conn=C.CONNECTED, disk=found).word(), 0))
    assert lone.sent(P.UUIDS, P.STATE) == [P.UUIDS, P.STATE]


@pytest.mark.parametrize(("change", "kinds"), [
    ({"user_isp": True}, [P.STATE]), ({"aftr_isp": True}, [P.STATE]), ({"peer_isp": True}, []),
    ({"susp": True}, []), ({"peer": Role.PRIMARY}, []),
])  # fmt: skip
def test_which_changes_are_announced(change: dict[str, object], kinds: list[Packet]) -> None:
    lone = Lone()
    lone.attach()
    lone.connect()
    lone.forget()
    lone.engine.change(lone.vol, replace(lone.state, **change), hard=True)  # type: ignore[arg-type]
    lone.take()
    assert lone.sent() == kinds


def test_the_sync_uuid_precedes_any_state() -> None:
    lone = Lone()
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.forget()
    lone.data(lone.bitmap_packets())
    lone.settle()
    assert lone.conn() == C.SYNC_SOURCE and lone.sent() == [P.SYNC_UUID]


def test_a_change_closes_the_epoch_before_the_state() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    lone.run("pause-sync")
    assert lone.sent(P.DATA, P.BARRIER, P.STATE) == [P.DATA, P.STATE, P.BARRIER]


# ------------------------------------------------------------------------------------------ flags on disk


def last_flags(lone: Lone) -> MdFlag:
    """The flags word of the newest superblock on its way or on disk."""
    return MdFlag(lone.vol.last_flags)


def test_the_flags_follow_the_state() -> None:
    lone = Lone()
    lone.attach()
    base = MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE
    assert last_flags(lone) == base
    lone.connect()
    assert last_flags(lone) == base | MdFlag.CONNECTED_IND
    lone.primary()
    assert last_flags(lone) == base | MdFlag.CONNECTED_IND | MdFlag.PRIMARY_IND
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    assert last_flags(lone) == base | MdFlag.PRIMARY_IND


def test_primary_ind_leaves_the_disk_after_the_bits_and_the_data() -> None:
    """Without it nobody applies the activity log after a crash."""
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.engine.log.close_epoch()
    lone.take()
    lone.meta(pack_barrier_ack(0, 1))
    ticket = lone.command("secondary")
    seen: list[str] = []
    while lone.disk:
        op = lone.disk[0]
        if op.op == Op.FLUSH and not op.area:
            seen.append("data flushed")
        elif op.area == META and op.offset == lone.layout.superblock and op.payload is not None:
            flags = Superblock.unpack(bytes(op.payload)).flags
            seen.append("primary" if flags & MdFlag.PRIMARY_IND else "secondary")
        lone.answer(op)
    assert lone.answered(ticket) == "done" and "secondary" in seen
    assert "data flushed" in seen[: seen.index("secondary")]
    assert "secondary" not in seen[: seen.index("data flushed")]


def test_a_crashed_primary_is_forgiven_when_both_disks_are_good() -> None:
    lone = Lone()
    lone.attach(flags=MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE | MdFlag.PRIMARY_IND)
    assert lone.vol.crashed_primary
    lone.connect()
    assert lone.conn() == C.WF_BITMAP_S and lone.vol.crashed_primary
    lone.data(lone.bitmap_packets())
    lone.settle()
    done = replace(PEER_SECONDARY, conn=C.CONNECTED)
    lone.data(pack_state(done.word(), 0))
    lone.settle()
    assert lone.conn() == C.CONNECTED and not lone.vol.crashed_primary


# ---------------------------------------------------------------------------------------------- handlers


def names(lone: Lone) -> list[str]:
    return [h.name for h in lone.of(RunHandler)]


def test_pri_on_incon_degr_once_when_the_last_good_copy_goes() -> None:
    lone = Lone(handlers=("pri-on-incon-degr",)).ready()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert names(lone) == []
    lone.run("detach", force=True)
    assert names(lone) == ["pri-on-incon-degr"]


def test_suspend_io_freezes_when_the_last_good_copy_goes() -> None:
    lone = Lone(options={"on_no_data_accessible": "suspend-io"}, diskless=True)
    lone.connect()
    lone.primary()
    lone.forget()
    r = lone.submit(Op.READ)
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert lone.state.susp_nod and lone.done == []
    lone.connect()
    lone.settle()
    assert not lone.state.suspended and lone.done == []
    assert len(lone.sent(P.DATA_REQUEST)) == 2, "asked again"
    assert r.error == 0


def test_unfence_peer_when_everything_is_good_again() -> None:
    lone = Lone(disk={"fencing": Fencing.RESOURCE_ONLY}, handlers=("unfence-peer",))
    lone.source((0, 1), primary=False)
    lone.meta(pack_ack(P.RS_WRITE_ACK, 0, 0, ID_SYNCER, 4096, 1))
    assert names(lone) == []
    lone.data(pack_state(replace(PEER_SECONDARY, conn=C.CONNECTED).word(), 0))
    lone.settle()
    assert names(lone) == ["unfence-peer"]


# ------------------------------------------------------------------------------------------------ others


def test_an_unchanged_state_has_no_consequences() -> None:
    lone = Lone().ready()
    assert lone.engine.change(lone.vol, lone.state) is None
    assert not lone.engine.take()


def test_every_change_is_noted_once_and_published() -> None:
    lone = Lone().ready()
    lone.engine.change(lone.vol, replace(lone.state, user_isp=True), why="a test")
    lone.take()
    assert lone.notes() == ["user_isp( 0 -> 1 )"] and len(lone.of(StateChanged)) == 1


def test_invalidate_sets_all_bits_on_both_sides_before_it_begins() -> None:
    lone = Lone().ready()
    ticket = lone.command("invalidate-remote")
    lone.meta(pack_state_reply(1, 0, False))
    assert lone.conn() == C.STARTING_SYNC_S and lone.vol.full_sync_flag
    assert lone.sent(P.SYNC_UUID) == []
    lone.settle()
    assert lone.conn() == C.SYNC_SOURCE and lone.sent(P.SYNC_UUID) == [P.SYNC_UUID]
    assert lone.answered(ticket) == "done"
