"""What status shows, and the sentence for a client that may not open an export."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl.events import ConnectionStatus, Opened, PeerVolumeStatus, ResourceStatus, VolumeStatus
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import ID_SYNCER, Packet, pack_ack, pack_data, pack_state

from tests.scenarios.lone import PEER_SECONDARY, Lone

D = DiskState
MIB = 1 << 20


def status(lone: Lone) -> tuple[ResourceStatus, VolumeStatus, ConnectionStatus, PeerVolumeStatus]:
    s = lone.engine.status()
    return s, s.volumes[0], s.connection, s.connection.volumes[0]


def test_a_node_that_is_only_configured() -> None:
    s, vol, conn, peer = status(Lone())
    assert (s.name, s.role, s.suspended, s.may_promote, s.promotion_score) == ("r0", "Secondary", "no", False, 0)
    assert (vol.disk, vol.client, vol.open, vol.size, vol.flags) == ("Diskless", False, False, 0, "")
    assert (conn.connection, conn.cstate, conn.role, conn.configured) == (
        "StandAlone", "StandAlone", "Unknown", False,
    )  # fmt: skip
    assert (conn.local, conn.remote) == ("ipv4:10.0.0.1:7788", "ipv4:10.0.0.2:7788")
    assert (peer.replication, peer.peer_disk, peer.done, peer.sync) == ("Off", "DUnknown", None, None)


def test_a_connected_primary() -> None:
    lone = Lone().ready()
    lone.handle(Opened(0, 2))
    s, vol, conn, peer = status(lone)
    assert (s.role, s.write_ordering, s.may_promote, s.promotion_score) == ("Primary", "flush", False, 10102)
    assert (vol.disk, vol.open, vol.size) == ("UpToDate", True, lone.layout.usable)
    assert vol.flags.startswith("1E06C7EA664FB56B:0000000000000000:1AD331CBB4784384:")
    assert (conn.connection, conn.role, conn.protocol_version) == ("Connected", "Secondary", 101)
    assert (peer.replication, peer.peer_disk, peer.out_of_sync) == ("Established", "UpToDate", 0)


@pytest.mark.parametrize(("own", "theirs", "may", "score"), [
    (D.UP_TO_DATE, D.UP_TO_DATE, True, 10102), (D.UP_TO_DATE, D.DISKLESS, True, 10101),
    (D.DISKLESS, D.UP_TO_DATE, True, 1), (D.INCONSISTENT, D.UP_TO_DATE, True, 10001),
    (D.OUTDATED, D.D_UNKNOWN, False, 0), (D.DISKLESS, D.DISKLESS, False, 0),
])  # fmt: skip
def test_promotion(own: DiskState, theirs: DiskState, may: bool, score: int) -> None:
    lone = Lone()
    lone.attach()
    lone.vol.state = replace(lone.state, disk=own, pdsk=theirs)
    s = lone.engine.status()
    assert (s.may_promote, s.promotion_score) == (may, score)


def test_nobody_may_be_promoted_next_to_a_primary() -> None:
    assert not Lone().as_secondary().engine.status().may_promote


@pytest.mark.parametrize(("flags", "words"), [
    ({"susp": True}, "user"), ({"susp_nod": True}, "no-data"), ({"susp_fen": True}, "fencing"),
    ({"susp": True, "susp_fen": True}, "user,fencing"),
])  # fmt: skip
def test_why_io_is_suspended(flags: dict[str, bool], words: str) -> None:
    lone = Lone().ready()
    lone.vol.state = replace(lone.state, **flags)  # type: ignore[arg-type]
    s, vol, _, _ = status(lone)
    assert s.suspended == words and vol.blocked == "upper"


@pytest.mark.parametrize(("options", "ordering"), [
    ({}, "flush"), ({"disk_flushes": False}, "drain"), ({"disk_flushes": False, "disk_drain": False}, "none"),
])  # fmt: skip
def test_write_ordering(options: dict[str, bool], ordering: str) -> None:
    assert Lone(disk=options).engine.status().write_ordering == ordering


def test_counters_of_a_write_on_its_way() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    _, vol, conn, peer = status(lone)
    assert (vol.upper_pending, vol.lower_pending, peer.pending) == (2, 1, 2) and peer.sent == 8192
    lone.settle()
    for one in lone.out():
        lone.meta(lone.ack(one))
    _, vol, conn, peer = status(lone)
    assert (vol.upper_pending, vol.lower_pending, peer.pending, vol.written) == (0, 0, 0, 8192)
    assert conn.ap_in_flight == 0 and vol.al_writes == 1 and r.error == 0


def test_counters_of_a_write_for_the_peer() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_data(Packet.DATA, 0, 8, 1, 1, 0x100, 4096) + bytes(4096))
    _, vol, _, peer = status(lone)
    assert (peer.unacked, peer.received, vol.lower_pending) == (1, 4096, 1)
    lone.settle()
    assert status(lone)[3].unacked == 0


def test_progress_of_a_resync() -> None:
    lone = Lone().target((0, 4096))
    begun = lone.now
    lone.now = begun + 1
    lone.data(pack_data(Packet.RS_DATA_REPLY, 0, 0, ID_SYNCER, 0, 0, MIB) + bytes(MIB))
    lone.settle()
    _, _, conn, peer = status(lone)
    assert peer.sync is not None and peer.replication == "SyncTarget" and conn.rs_in_flight == 8 * MIB
    assert (peer.sync.total, peer.sync.left, peer.out_of_sync) == (16 * MIB, 15 * MIB, 15 * MIB)
    assert peer.sync.average == pytest.approx(MIB, rel=0.01)
    assert peer.sync.eta_s == pytest.approx(15, rel=0.01)
    assert peer.done == pytest.approx(100 * (1 - 15 * 256 / lone.vol.n_bits))


def test_a_paused_resync_says_who_paused_it_and_its_clock_stands_still() -> None:
    lone = Lone().target((0, 4096))
    lone.now += 1
    lone.run("pause-sync")
    paused = replace(PEER_SECONDARY, role=Role.PRIMARY, conn=ConnState.PAUSED_SYNC_S, user_isp=True)
    lone.data(pack_state(paused.word(), 0))
    lone.now += 100
    lone.engine.now = lone.now
    _, _, _, peer = status(lone)
    assert peer.resync_suspended == "user,peer" and peer.sync is not None
    assert peer.sync.paused_s == pytest.approx(100, abs=0.1)
    assert peer.sync.started_s == pytest.approx(101, abs=0.1)


def test_failed_blocks_are_shown() -> None:
    lone = Lone().target((0, 1), (9, 10))
    lone.meta(pack_ack(Packet.NEG_RS_DREPLY, 0, 0, ID_SYNCER, 4096, 1))
    sync = status(lone)[3].sync
    assert sync is not None and sync.failed == 4096


# ------------------------------------------------------------------------------------------- may not open


def test_an_export_opens_on_a_primary_only() -> None:
    assert Lone().ready().engine.open_refusal(0, True) is None
    alone = Lone()
    alone.attach()
    text = alone.engine.open_refusal(0, True)
    assert text is not None and "Secondary" in text and "tandemadm primary r0" in text


def test_the_refusal_names_the_primary() -> None:
    text = Lone().as_secondary().engine.open_refusal(0, False)
    assert text is not None and "b is Primary: use its export" in text
