"""Sizes, generations and states the nodes tell each other, and what follows from them."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import SizeChanged
from tandem.repl.peer import new_size
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import Packet, Protocol, QueueLimits, Sizes, Uuids, pack_block_req, pack_state, unpack_u32

from tests.scenarios.lone import PEER_SECONDARY, Lone
from tests.scenarios.pair import GENERATIONS

P, D, C = Packet, DiskState, ConnState
MIB = 1 << 20


def state_of(lone: Lone, **changes: object) -> bytes:
    """The peer's P_STATE: what it would be if both views were the same, with changes."""
    s = lone.state
    mirrored = State(s.peer, s.role, s.conn, s.pdsk, s.disk)
    return pack_state(replace(mirrored, **changes).word(), 0)  # type: ignore[arg-type]


def told(lone: Lone) -> list[State]:
    return [State.from_word(unpack_u32(p)) for p in lone.payloads(P.STATE)]


def sizes(d: int, c: int = 0, flags: int = 0, u: int = 0) -> bytes:
    """P_SIZES without queue limits, of a peer without FF_WSAME; bytes."""
    return Sizes(d // 512, u // 512, c // 512, MIB, 0, flags, None).pack(0)


# ------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("usable", "peer", "configured", "last", "size"), [
    (0, 0, 0, 0, 0), (100, 0, 0, 0, 100), (0, 100, 0, 0, 100), (100, 80, 0, 0, 80), (80, 100, 0, 0, 80),
    (100, 100, 60, 0, 60), (100, 100, 200, 0, 100), (100, 0, 0, 60, 60), (50, 0, 0, 60, 50),
    (0, 50, 0, 60, 50), (100, 80, 0, 60, 80),
])  # fmt: skip
def test_the_device_size(usable: int, peer: int, configured: int, last: int, size: int) -> None:
    assert new_size(usable, peer, configured, last) == size


amounts = st.integers(0, 1 << 40)


@given(amounts, amounts, amounts, amounts)
def test_no_disk_is_smaller_than_the_device(usable: int, peer: int, configured: int, last: int) -> None:
    size = new_size(usable, peer, configured, last)
    assert all(size <= limit for limit in (usable, peer, configured) if limit)
    assert size > 0 or not (usable or peer or last)


def test_the_smaller_disk_decides_for_fresh_disks() -> None:
    lone = Lone()
    lone.attach(fresh=True)
    lone.run("connect")
    lone.link()
    lone.data(lone.features(flags=0), lone.protocol(), sizes(32 * MIB))
    lone.settle()
    assert lone.vol.size == 32 * MIB and lone.of(SizeChanged)[-1] == SizeChanged(0, 32 * MIB)
    assert lone.vol.n_bits == 32 * MIB // 4096


def test_a_disk_with_data_is_not_shrunk_by_a_smaller_peer() -> None:
    lone = Lone()
    lone.attach()
    lone.run("connect")
    lone.link()
    lone.data(lone.features(flags=0), lone.protocol(), sizes(32 * MIB))
    assert lone.conn() == C.STAND_ALONE and any("too small" in note for note in lone.notes())
    assert lone.vol.size == lone.layout.usable


def test_a_diskless_node_takes_the_peers_size() -> None:
    lone = Lone(diskless=True)
    lone.connect()
    assert lone.vol.size == lone.layout.usable and lone.of(SizeChanged) == [SizeChanged(0, lone.vol.size)]


def test_a_diskless_primary_in_use_is_not_shrunk() -> None:
    lone = Lone(diskless=True)
    lone.connect(features=0)
    lone.primary()
    lone.data(sizes(32 * MIB, c=32 * MIB))
    assert lone.conn() == C.STAND_ALONE and lone.vol.size == lone.layout.usable


# -------------------------------------------------------------------------------- handshakes and verdicts


@pytest.mark.parametrize(("own", "theirs", "conn"), [
    (GENERATIONS, GENERATIONS, C.CONNECTED),
    ((0x20, 0x10, 0, 0), (0x10, 0, 0, 0), C.WF_BITMAP_S),
    ((0x10, 0, 0, 0), (0x20, 0x10, 0, 0), C.WF_BITMAP_T),
    ((0x20, 0x10, 0, 0), (0x30, 0x10, 0, 0), C.STAND_ALONE),  # split brain
    ((0x20, 0, 0, 0), (0x30, 0, 0, 0), C.STAND_ALONE),  # unrelated
    ((0x20, 0, 0, 0), (4, 0, 0, 0), C.WF_BITMAP_S),
])  # fmt: skip
def test_generations_decide(
    own: tuple[int, int, int, int], theirs: tuple[int, int, int, int], conn: ConnState
) -> None:
    lone = Lone()
    lone.attach(generations=own)
    disk = D.INCONSISTENT if theirs[0] == 4 else D.UP_TO_DATE
    lone.connect(replace(PEER_SECONDARY, disk=disk), uuids=theirs)
    assert lone.conn() == conn


def test_the_second_state_shows_the_decision() -> None:
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY), uuids=(0x20, 0x10, 0, 0))
    assert [s.conn for s in told(lone)] == [C.WF_CONNECTION, C.WF_BITMAP_T]
    assert told(lone)[-1].word() == 0x0001_0AE6, "a target is Outdated until the resync begins"


def test_both_primary_without_permission_is_stand_alone() -> None:
    lone = Lone()
    lone.attach()
    lone.run("primary")
    lone.connect(replace(PEER_SECONDARY, role=Role.PRIMARY), uuids=lone_uuids(lone))
    assert lone.conn() == C.STAND_ALONE and any("(-1)" in note for note in lone.notes())


def lone_uuids(lone: Lone) -> tuple[int, int, int, int]:
    u = lone.vol.uuids
    return u.current, u.bitmap, u.history0, u.history1


def test_a_diskless_primary_insists_on_the_generation_it_shows() -> None:
    lone = Lone(diskless=True)
    lone.connect()
    lone.primary()
    lone.data(Uuids(0x500, GENERATIONS[0], 0, 0, 0, 0).pack(0))  # begun by the peer for our writes
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.take()
    lone.connect(uuids=(0x777, 0, 0, 0))
    assert lone.conn() == C.STAND_ALONE
    assert any("not the one in use here" in note for note in lone.notes())


def test_a_diskless_primary_meets_its_data_again() -> None:
    lone = Lone(diskless=True)
    lone.connect()
    lone.primary()
    lone.data(Uuids(0x500, GENERATIONS[0], 0, 0, 0, 0).pack(0))
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.take()
    lone.connect(uuids=(0x500, GENERATIONS[0], 0, 0))
    assert lone.conn() == C.CONNECTED


def test_tentative_shows_the_verdict_and_ends() -> None:
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.run("connect", tentative=True)
    lone.connect(uuids=(0x20, 0x10, 0, 0))
    assert lone.conn() == C.STAND_ALONE and any("uuid_compare()=-1" in note for note in lone.notes())
    assert lone.local_disk() == D.UP_TO_DATE and lone.vol.uuids.current == 0x10


def test_the_tentative_peer_comes_again() -> None:
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.run("connect")
    lone.link()
    lone.data(lone.features(), lone.protocol(conn_flags=2), lone.parameters(uuids=(0x20, 0x10, 0, 0)))
    assert lone.conn() == C.WF_CONNECTION and lone.vol.uuids.current == 0x10


def test_a_promotion_takes_discard_my_data_back() -> None:
    """Source: drbd_nl.c, drbd_set_role."""
    lone = Lone()
    lone.attach()
    lone.run("connect", discard_my_data=True)
    assert lone.run("primary") == lone.run("secondary") == "done"
    lone.link()
    lone.data(lone.features())
    assert Protocol.unpack(lone.payloads(Packet.PROTOCOL)[0]).conn_flags == 0
    assert not lone.vol.discard_my_data


def test_discard_my_data_is_told_in_both_packets_and_only_once() -> None:
    lone = Lone()
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.run("connect", discard_my_data=True)
    lone.connect(uuids=(0x30, 0x10, 0, 0))
    assert lone.payloads(P.PROTOCOL)[0][16:20] == b"\0\0\0\1"
    assert Uuids.unpack(lone.payloads(P.UUIDS)[0]).flags & 1
    assert lone.conn() == C.WF_BITMAP_T
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    lone.packets.clear()
    lone.link()
    lone.data(lone.features())
    assert not Uuids.unpack(lone.payloads(P.UUIDS)[0]).flags & 1


# ------------------------------------------------------------------------------------------------ states


def test_a_peer_that_attaches_gets_our_generation_and_state() -> None:
    """It waits for them: without an answer it would stay Negotiating."""
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, disk=D.DISKLESS))
    lone.forget()
    lone.data(Uuids(*GENERATIONS, 0, 0).pack(0), state_of(lone, disk=D.NEGOTIATING))
    assert lone.sent(P.UUIDS, P.STATE) == [P.UUIDS, P.STATE]
    assert lone.conn() == C.CONNECTED and lone.state.pdsk == D.UP_TO_DATE


def test_a_peer_that_fails_is_followed_and_a_generation_begun() -> None:
    lone = Lone().ready()
    lone.data(state_of(lone, disk=D.FAILED), state_of(lone, disk=D.DISKLESS))
    lone.settle()
    assert lone.state.pdsk == D.DISKLESS and lone.vol.uuids.bitmap and lone.sent(P.UUIDS) == [P.UUIDS]


def test_a_diskless_peer_that_becomes_primary_begins_a_generation() -> None:
    lone = Lone()
    lone.attach()
    lone.connect(replace(PEER_SECONDARY, disk=D.DISKLESS))
    lone.data(state_of(lone, role=Role.PRIMARY))
    lone.settle()
    assert lone.vol.uuids.bitmap


def test_a_pause_of_the_peer_is_only_its_own_flags() -> None:
    lone = Lone().target((0, 9))
    lone.data(state_of(lone, user_isp=True, conn=C.PAUSED_SYNC_S))
    assert lone.state.peer_isp and not lone.state.user_isp and lone.conn() == C.PAUSED_SYNC_T
    lone.data(state_of(lone, user_isp=False, peer_isp=True, conn=C.PAUSED_SYNC_S))
    assert not lone.state.peer_isp and lone.conn() == C.SYNC_TARGET


def test_a_state_that_comes_after_the_end_is_dropped() -> None:
    lone = Lone().ready()
    late = state_of(lone, disk=D.FAILED)
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    before = lone.state
    lone.data(late)
    assert lone.state == before


def test_the_peers_view_of_us_is_not_believed() -> None:
    lone = Lone().ready()
    before = lone.state
    lone.data(state_of(lone, peer=Role.SECONDARY, pdsk=D.INCONSISTENT, susp=True, susp_fen=True))
    assert lone.state == before


# ---------------------------------------------------------------------------------------- reads for a peer


def test_a_read_for_the_peer_is_answered_from_the_disk() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_block_req(P.DATA_REQUEST, 0, 8, 0xABC, 4096))
    (op,) = lone.disk
    assert (op.op, op.offset, op.length) == (Op.READ, 4096, 4096)
    lone.answer()
    assert len(lone.payloads(P.DATA_REPLY)[0]) == 24 + 4096


def test_a_read_that_fails_is_refused() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_block_req(P.DATA_REQUEST, 0, 8, 0xABC, 4096))
    lone.answer(error=errno.EIO)
    assert lone.sent(P.NEG_DREPLY, P.DATA_REPLY) == [P.NEG_DREPLY]


def test_only_a_good_disk_serves_reads() -> None:
    lone = Lone().target((0, 9))
    lone.data(pack_block_req(P.DATA_REQUEST, 0, 8, 0xABC, 4096))
    assert lone.sent(P.NEG_DREPLY) == [P.NEG_DREPLY] and not [op for op in lone.disk if op.op == Op.READ]


def test_a_read_for_a_connection_that_is_gone_is_not_sent() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_block_req(P.DATA_REQUEST, 0, 8, 0xABC, 4096))
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    assert lone.sent(P.DATA_REPLY, P.NEG_DREPLY) == []


# ----------------------------------------------------------------------------- a peer that is attaching

ATTACHING = replace(PEER_SECONDARY, disk=D.ATTACHING)
NEWER = (0x30, GENERATIONS[0], *GENERATIONS[2:])


def beside_an_attaching_peer(*, primary: bool = False) -> Lone:
    """A node that does not know whether its data is the newest meets a peer that is about to tell."""
    lone = Lone(disk={"fencing": Fencing.RESOURCE_ONLY}, options={"on_no_data_accessible": "suspend-io"})
    if primary:
        lone.ready()
        lone.engine.drop(C.NETWORK_FAILURE, "a test")
        lone.settle()
        lone.run("detach", force=True)
    u = lone.vol.uuids
    lone.attach(generations=(u.current, u.bitmap, u.history0, u.history1) if primary else GENERATIONS)
    assert lone.local_disk() == D.CONSISTENT
    lone.connect(ATTACHING)
    lone.forget()
    assert (lone.conn(), lone.local_disk()) == (C.CONNECTED, D.CONSISTENT)
    return lone


def attached(lone: Lone, uuids: tuple[int, int, int, int]) -> None:
    size = sizes_with_limits(lone)
    lone.data(size, Uuids(*uuids, 0, 0).pack(0), state_of(lone, disk=D.NEGOTIATING))
    lone.settle()


def sizes_with_limits(lone: Lone) -> bytes:
    limits = QueueLimits(4096, 512, 0, 4096, 0, 1)
    return Sizes(lone.vol.size // 512, 0, lone.vol.size // 512, MIB, 0, 0, limits).pack(0)


def test_who_may_be_behind_is_not_up_to_date_before_the_peer_has_attached() -> None:
    lone = beside_an_attaching_peer()
    ticket = lone.command("primary")
    assert lone.answered(ticket) is None
    attached(lone, NEWER)
    assert (lone.conn(), lone.local_disk()) == (C.WF_BITMAP_T, D.OUTDATED)
    lone.at(lone.now + 20)
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal)


def test_who_may_be_behind_is_up_to_date_once_the_peer_has_the_same() -> None:
    lone = beside_an_attaching_peer()
    attached(lone, GENERATIONS)
    assert (lone.conn(), lone.local_disk()) == (C.CONNECTED, D.UP_TO_DATE)


def test_who_may_be_behind_is_up_to_date_next_to_a_peer_that_could_not_attach() -> None:
    lone = beside_an_attaching_peer()
    lone.data(state_of(lone, disk=D.DISKLESS))
    assert (lone.conn(), lone.local_disk()) == (C.CONNECTED, D.UP_TO_DATE)


def test_a_primary_that_is_found_to_be_behind_writes_no_more() -> None:
    lone = beside_an_attaching_peer(primary=True)
    attached(lone, (0x50, lone.vol.uuids.current, *GENERATIONS[2:]))
    assert (lone.conn(), lone.local_disk(), lone.state.pdsk) == (C.CONNECTED, D.OUTDATED, D.DISKLESS)
