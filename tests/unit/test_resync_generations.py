"""What generations and superblocks say around the begin and the end of a resync, and when they do."""

from __future__ import annotations

from dataclasses import replace

from tandem.repl.events import HandlerExited, LinkLost
from tandem.repl.states import ConnState, DiskState
from tandem.repl.wire import ID_SYNCER, Packet, pack_ack, pack_state_change, pack_sync_uuid, packet

from tests.scenarios.lone import PEER_SECONDARY, SYNC_UUID, Lone

P = Packet


def test_a_source_that_was_asked_for_a_full_sync_remembers_it_while_its_handler_runs() -> None:
    """From then on the target gets no writes; it must not pass for equal when the sync never begins."""
    lone = Lone(handlers=("before-resync-source",)).ready()
    lone.data(pack_state_change(0x1F0, ConnState.STARTING_SYNC_T << 4, 0, False))
    lone.settle()
    sync_uuid = lone.vol.uuids.bitmap
    assert lone.conn() == ConnState.STARTING_SYNC_S and sync_uuid and not lone.sent(P.SYNC_UUID)
    lone.handle(HandlerExited(lone.handler("before-resync-source").ticket, 0))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE and lone.vol.uuids.bitmap == sync_uuid
    assert lone.payloads(P.SYNC_UUID) == [sync_uuid.to_bytes(8, "big")]


def may_have_ended() -> Lone:
    """A source whose link went when its target could just have finished."""
    lone = Lone().source((5, 6), primary=False)
    lone.meta(pack_ack(P.RS_WRITE_ACK, 0, 5 * 8, ID_SYNCER, 4096, 1), packet(P.PING))
    lone.settle()
    assert lone.sent(P.PING_ACK)
    lone.handle(LinkLost(lone.engine.link.ticket, "reset"))
    lone.settle()
    assert lone.vol.end_unknown
    return lone


def test_a_peer_without_a_disk_does_not_tell_how_a_resync_ended() -> None:
    """It may have finished, and come back with data as good as ours."""
    lone = may_have_ended()
    current = lone.vol.uuids.current
    lone.connect(replace(PEER_SECONDARY, disk=DiskState.DISKLESS))
    lone.primary()
    assert lone.vol.uuids.current & ~1 != current & ~1, "what is written now must be newer"


def test_a_target_may_not_finish_when_the_source_cannot_remember_it() -> None:
    """The source's disk would come back with the target for Outdated, in the generation that the target has, too."""
    lone = Lone().source((5, 6), primary=False)
    lone.meta(pack_ack(P.RS_WRITE_ACK, 0, 5 * 8, ID_SYNCER, 4096, 1), packet(P.PING))
    lone.answer(*(op for op in lone.disk if op.offset == lone.layout.superblock), error=5)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS and not lone.sent(P.PING_ACK)


def test_a_peers_generations_tell_how_a_resync_ended() -> None:
    lone = may_have_ended()
    u = lone.vol.uuids
    lone.connect(uuids=(u.current, 0, u.bitmap, u.history0))
    assert lone.conn() == ConnState.WF_BITMAP_S and not lone.vol.end_unknown


def test_a_target_asks_for_nothing_before_its_superblock_says_inconsistent() -> None:
    """The source takes its first request for that, and does not fence it any more."""
    lone = Lone()
    lone.attach(generations=(0x10, 0, 0, 0))
    lone.connect(uuids=(0x20, 0x10, 0, 0), bits=1)
    lone.data(lone.bitmap_packets((5, 6)))
    lone.settle()
    lone.data(pack_sync_uuid(SYNC_UUID, 0))
    assert lone.conn() == ConnState.SYNC_TARGET
    while others := [op for op in lone.disk if op.offset != lone.layout.superblock]:
        lone.answer(*others)
    assert not lone.sent(P.RS_DATA_REQUEST)
    lone.settle()
    assert lone.sent(P.RS_DATA_REQUEST) == [P.RS_DATA_REQUEST]
