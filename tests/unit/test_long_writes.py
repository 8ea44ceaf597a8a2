"""A long write of the peer goes to the disk as it comes: the machine's part of it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest
from tandem.repl.events import Connect, EndWrite, LinkLost, ReleaseDisk
from tandem.repl.replica import LONG_MIN
from tandem.repl.requests import DiskOp, PeerWrite
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import (
    DP_FLUSH,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_RW_SYNC,
    DP_SEND_RECEIVE_ACK,
    DP_SEND_WRITE_ACK,
    Packet,
    pack_barrier,
    pack_data,
    pack_state_reply,
    unpack_ack,
    unpack_barrier_ack,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone

LENGTH = 1 << 20
ID = 0xC061_9886_0000_0000


def head(
    *, cmd: Packet = Packet.DATA, volume: int = 0, sector: int = 8, flags: int = DP_SEND_WRITE_ACK,
    length: int = LENGTH,
) -> bytes:  # fmt: skip
    """The first bytes of the packet, as much as a receiver may have of it."""
    return pack_data(cmd, volume, sector, ID, 1, flags, length) + bytes(100)


def begin(lone: Lone, packet: bytes, takes: Callable[[int], bool] = lambda volume: True) -> PeerWrite | None:
    """As the edge: what has arrived is an incomplete packet."""
    assert lone.data(packet) == 0
    return lone.engine.begin_write(memoryview(packet), takes)


def begun(lone: Lone, packet: bytes | None = None) -> DiskOp:
    w = begin(lone, packet or head())
    assert w is not None
    lone.disk.append(w)  # the edge has it, and will answer it as any other operation
    return w


def acks(lone: Lone) -> list[tuple[Packet, int, int]]:
    return [
        (kind, *unpack_ack(payload)[:2])
        for socket, kind, _, payload in lone.packets
        if socket == "meta" and len(payload) == 24
    ]


def test_it_is_acknowledged_when_the_disk_has_all_of_it_and_counts_in_its_epoch() -> None:
    lone = Lone().as_secondary()
    w = begun(lone)
    assert (w.offset, w.length, w.payload, w.flags) == (4096, LENGTH, None, 0)
    assert acks(lone) == [] and lone.vol.n_unacked == lone.vol.n_local == lone.engine.replica.n_active == 1
    lone.answer(w)
    assert acks(lone) == [(Packet.WRITE_ACK, 8, ID)]
    assert lone.vol.n_unacked == lone.vol.n_local == lone.vol.n_untracked == lone.engine.replica.n_active == 0
    assert lone.vol.bytes_received == lone.vol.bytes_written == LENGTH
    lone.data(pack_barrier(5))
    lone.at(lone.now + 10)
    lone.settle()
    assert [unpack_barrier_ack(p) for p in lone.payloads(Packet.BARRIER_ACK)] == [(5, 1)]


def test_a_kernels_flag_for_a_waiting_writer_changes_nothing() -> None:
    assert begin(Lone().as_secondary(ours=False), head(flags=DP_SEND_WRITE_ACK | DP_RW_SYNC)) is not None


@pytest.mark.parametrize("packet", [
    head()[:39],
    head(length=LONG_MIN - 512),
    head(flags=DP_SEND_WRITE_ACK | DP_FUA),
    head(flags=DP_SEND_WRITE_ACK | DP_FLUSH),
    head(flags=DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC),
    head(flags=DP_SEND_RECEIVE_ACK),
    head(flags=0),
    head(cmd=Packet.RS_DATA_REPLY),
    head(volume=7),
    head(sector=(64 << 20) // 512 - 8),
    head(length=LENGTH + 512),
    head(length=LENGTH - 100),
])  # fmt: skip
def test_whatever_is_unusual_comes_as_any_other_packet(packet: bytes) -> None:
    lone = Lone().as_secondary()
    assert lone.engine.begin_write(memoryview(packet), lambda volume: True) is None
    assert lone.vol.n_unacked == lone.vol.n_local == 0


def test_and_so_it_does_where_the_disk_will_not_have_it_or_there_is_none() -> None:
    lone = Lone(n_volumes=2).as_secondary()
    assert begin(lone, head(volume=1), lambda volume: volume == 0) is None
    assert begin(lone, head(volume=0), lambda volume: volume == 0) is not None
    diskless = Lone(diskless=True)
    diskless.connect(replace(PEER_SECONDARY, role=Role.PRIMARY))
    assert begin(diskless, head()) is None


@pytest.mark.parametrize("net", [{"protocol": "A"}, {"protocol": "B"}, {"data_integrity_alg": "crc32c"}])
def test_and_under_other_promises(net: dict[str, str]) -> None:
    assert begin(Lone(net=net).as_secondary(), head()) is None


def test_and_between_two_primaries() -> None:
    lone = Lone(net={"allow_two_primaries": True})
    lone.attach()
    lone.run("connect")
    lone.link(True)
    lone.data(lone.features())
    lone.data(lone.protocol(two_primaries=1) + lone.parameters(replace(PEER_SECONDARY, role=Role.PRIMARY)))
    lone.settle()
    lone.primary()
    assert lone.vol.dual and begin(lone, head()) is None


def test_and_during_a_resync_or_behind_a_barrier_that_has_to_be_stable_first() -> None:
    assert begin(Lone().target((0, 4)), head()) is None
    lone = Lone().as_secondary(ours=False)
    short = pack_data(Packet.DATA, 0, 0, ID, 1, DP_SEND_WRITE_ACK, 4096) + bytes(4096)
    lone.data(short, pack_barrier(0))
    assert begin(lone, head()) is None


def test_a_disk_that_fails_it_is_a_negative_ack_and_gone() -> None:
    lone = Lone().as_secondary()
    bits = lone.vol.bitmap
    lone.answer(begun(lone), error=errno.ENOSPC)
    assert acks(lone) == [(Packet.NEG_ACK, 8, ID)] and bits.weight == LENGTH // 4096
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS


def test_a_link_that_is_lost_in_the_middle_gets_no_ack_and_no_successor_before_the_disk_is_done() -> None:
    lone = Lone().as_secondary()
    w = begun(lone)
    lone.effects.clear()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    assert lone.of(Connect) == []
    lone.answer(w)
    lone.settle()
    assert acks(lone) == [] and len(lone.of(Connect)) == 1
    assert lone.vol.n_unacked == lone.vol.n_untracked == lone.vol.n_local == lone.engine.replica.n_active == 0
    assert lone.vol.stable_version != lone.vol.data_version, "a part of it may be there, and is not stable"


def test_a_disk_that_leaves_in_the_middle_ends_it_and_waits_for_that_alone() -> None:
    """The rest of it may never come, and the disk is not to wait for the network."""
    lone = Lone().as_secondary()
    w = begun(lone)
    ticket = lone.command("detach", force=True)
    while others := [op for op in lone.disk if op is not w]:
        lone.answer(*others)
    assert lone.of(ReleaseDisk) == [] and lone.answered(ticket) is None
    assert lone.of(EndWrite) == [EndWrite(0)]
    lone.answer(w, error=errno.EIO)
    lone.settle()
    assert len(lone.of(ReleaseDisk)) == 1 and lone.answered(ticket) == "done"
    assert acks(lone) == [(Packet.NEG_ACK, 8, ID)]


def test_a_disk_that_leaves_with_nothing_under_way_ends_nothing() -> None:
    lone = Lone().as_secondary()
    assert lone.run("detach", force=True) == "done" and lone.of(EndWrite) == []


def test_a_verify_that_begins_in_the_middle_leaves_it_its_ack() -> None:
    lone = Lone(net={"verify_alg": "crc32c"}).as_secondary()
    w = begun(lone)
    lone.command("verify", 0)
    lone.meta(pack_state_reply(1, 0, False))
    assert lone.conn() == ConnState.VERIFY_S
    lone.answer(w)
    assert acks(lone)[0] == (Packet.WRITE_ACK, 8, ID) and lone.vol.n_untracked == 0
