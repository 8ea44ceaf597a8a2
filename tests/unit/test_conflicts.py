"""Two Primaries that write the same sectors at the same time: both disks end equal, every write is answered."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tandem.repl.config import Fencing
from tandem.repl.requests import DATA, META, PEER, Op, Request
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import (
    DP_FLUSH,
    DP_FUA,
    DP_SEND_WRITE_ACK,
    Packet,
    Uuids,
    pack_ack,
    pack_barrier,
    pack_data,
    pack_state,
    unpack_ack,
    unpack_barrier_ack,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone
from tests.scenarios.pair import Given, Pair
from tests.sim.fake_disk import FakeDisk

P = Packet
ID = 0xC061_0000_0000_0000
BLOCK = 4096


def dual(*, resolver: bool, ours: bool = True) -> Lone:
    """A Primary whose peer is Primary too."""
    lone = Lone(net={"allow_two_primaries": True})
    lone.attach()
    lone.run("connect")
    lone.link(resolver)
    lone.data(lone.features(ours=ours))
    peer = replace(PEER_SECONDARY, role=Role.PRIMARY)
    lone.data(lone.protocol(two_primaries=1) + lone.parameters(peer))
    lone.settle()
    lone.primary()
    assert lone.vol.dual and lone.conn() == ConnState.CONNECTED
    lone.forget()
    return lone


def theirs(sector: int, n_sectors: int, seq: int, dp: int = DP_SEND_WRITE_ACK) -> bytes:
    head = pack_data(P.DATA, 0, sector, ID + seq, seq, dp, n_sectors << 9)
    return head + bytes([seq]) * (n_sectors << 9)


def their_ack(r: Request, seq: int, kind: Packet = P.WRITE_ACK) -> bytes:
    return pack_ack(kind, 0, r.offset >> 9, r.block_id, r.length, seq)


def acks(lone: Lone) -> list[str]:
    return [k.name for s, k, _, p in lone.packets if s == "meta" and len(p) == 24 and unpack_ack(p)]


def barrier_acks(lone: Lone) -> list[tuple[int, int]]:
    return [unpack_barrier_ack(p) for p in lone.payloads(P.BARRIER_ACK)]


def on_disk(lone: Lone) -> list[tuple[int, int]]:
    return [(op.offset >> 9, op.length >> 9) for op in lone.disk if op.op == Op.WRITE and not op.area]


# ------------------------------------------------------------------------------------------ the resolver


@pytest.mark.parametrize(("sector", "n_sectors", "left"), [
    (0, 8, []),  # equal
    (2, 4, []),  # inside ours
    (4, 8, [(8, 4)]),  # sticks out
    (0, 16, [(8, 8)]),  # covers ours
])  # fmt: skip
def test_the_resolver_writes_what_its_unanswered_write_leaves_uncovered(
    sector: int, n_sectors: int, left: list[tuple[int, int]]
) -> None:
    """And acknowledges it as any other: a kernel that is to send writes again may wait for itself, for good."""
    lone = dual(resolver=True)
    lone.submit(Op.WRITE)
    lone.settle()
    lone.data(theirs(sector, n_sectors, 1))
    assert on_disk(lone) == left
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"] and lone.vol.bitmap.weight == 0


def test_only_the_gaps_between_ours_are_written() -> None:
    lone = dual(resolver=True)
    lone.submit(Op.WRITE, 8 << 9, 4096)
    lone.submit(Op.WRITE, 24 << 9, 4096)
    lone.settle()
    lone.data(theirs(4, 30, 1))
    assert on_disk(lone) == [(4, 4), (16, 8), (32, 2)]
    parts = [op for op in lone.disk if not op.area]
    assert all(op.payload == bytes([1]) * op.length for op in parts)
    lone.answer(parts[1], parts[0])
    assert acks(lone) == []
    lone.answer(parts[2])
    assert acks(lone) == ["WRITE_ACK"]


def test_a_part_that_fails_fails_the_whole() -> None:
    lone = dual(resolver=True)
    lone.submit(Op.WRITE, 8 << 9, 4096)
    lone.settle()
    lone.data(theirs(0, 24, 1))
    first, second = [op for op in lone.disk if not op.area]
    lone.answer(first, error=5)
    assert acks(lone) == []
    lone.answer(second)
    assert acks(lone) == ["NEG_ACK"] and lone.local_disk() in {DiskState.FAILED, DiskState.DISKLESS}


def test_it_is_answered_when_what_covers_it_is_on_our_disk() -> None:
    """The peer's client is told that its write is done, and may flush: that must find ours behind the flush."""
    lone = dual(resolver=True)
    r = lone.submit(Op.WRITE)
    for op in [op for op in lone.disk if op is not r]:
        lone.answer(op)
    lone.data(theirs(0, 8, 1), theirs(80, 8, 2))
    assert acks(lone) == [] and on_disk(lone) == [(0, 8), (80, 8)] and r in lone.disk
    lone.answer(r)
    assert acks(lone) == ["WRITE_ACK"] and lone.done == []


def test_a_disk_that_failed_our_write_covers_nothing() -> None:
    lone = dual(resolver=True)
    r = lone.submit(Op.WRITE)
    for op in [op for op in lone.disk if op is not r]:
        lone.answer(op)
    lone.data(theirs(0, 8, 1))
    lone.answer(r, error=5)
    assert acks(lone) == ["NEG_ACK"]


@pytest.mark.parametrize(("sector", "left"), [(0, []), (4, [(8, 4)])])
def test_a_fua_write_is_answered_when_all_of_it_is_stable(sector: int, left: list[tuple[int, int]]) -> None:
    lone = dual(resolver=True)
    lone.submit(Op.WRITE)
    lone.settle()
    lone.data(theirs(sector, 8, 1, DP_SEND_WRITE_ACK | DP_FUA))
    assert on_disk(lone) == left
    if left:
        lone.answer(*lone.disk)
    assert acks(lone) == [] and [op.op for op in lone.disk] == [Op.FLUSH]
    lone.answer()
    assert acks(lone) == ["WRITE_ACK"]


def test_a_flush_before_the_write_comes_before_its_parts() -> None:
    lone = dual(resolver=True)
    lone.submit(Op.WRITE)
    lone.settle()
    lone.data(theirs(4, 8, 1, DP_SEND_WRITE_ACK | DP_FLUSH))
    assert [op.op for op in lone.disk] == [Op.FLUSH]
    lone.answer()
    assert on_disk(lone) == [(8, 4)]
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"]


def test_a_block_may_be_shared_when_no_sector_is() -> None:
    lone = dual(resolver=True)
    lone.submit(Op.WRITE, 0, 2048)
    lone.settle()
    lone.data(theirs(4, 4, 1))
    assert on_disk(lone) == [(4, 4)]


def test_what_came_after_their_ack_waits_for_our_disk() -> None:
    lone = dual(resolver=True)
    r = lone.submit(Op.WRITE)
    held = [op for op in lone.disk if op is not r]
    for op in held:
        lone.answer(op)
    assert r in lone.disk
    lone.meta(their_ack(r, 1))
    lone.data(theirs(0, 8, 2))
    assert on_disk(lone) == [(0, 8)] and acks(lone) == []
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"] and lone.done == [r]


def test_a_write_that_overtook_acks_waits_for_them() -> None:
    lone = dual(resolver=True)
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.data(theirs(0, 8, 2), theirs(800, 8, 3))
    assert acks(lone) == [] and on_disk(lone) == [], "number 1 is missing: it may be the ack for ours"
    lone.meta(their_ack(r, 1))
    assert on_disk(lone) == [(0, 8), (800, 8)]


def test_acks_that_never_come_end_the_connection() -> None:
    lone = dual(resolver=True)
    lone.data(theirs(0, 8, 2))
    lone.at(lone.now + 5.9)
    assert not lone.closed
    lone.at(lone.now + 0.2)
    assert lone.closed and lone.conn() == ConnState.WF_CONNECTION


def test_such_writes_count_in_their_epochs() -> None:
    lone = dual(resolver=True, ours=False)
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.data(theirs(2, 2, 1), theirs(80, 8, 2), pack_barrier(0), theirs(6, 8, 3), pack_barrier(1))
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"] * 3 and barrier_acks(lone) == [(0, 2), (1, 1)] and r.waiting == PEER


# ------------------------------------------------------------------------------------------ the other node


def test_the_other_node_waits_for_the_resolver_and_its_own_disk() -> None:
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE)
    for op in [op for op in lone.disk if op is not r]:
        lone.answer(op)
    lone.data(theirs(0, 8, 1))
    assert lone.disk == [r], "theirs waits"
    lone.meta(their_ack(r, 2, P.SUPERSEDED))
    assert lone.disk == [r], "still, because ours is not on our disk"
    lone.answer(r)
    assert lone.done == [r] and r.error == 0 and on_disk(lone) == [(0, 8)]
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"] and lone.engine.log.n_requests == 0
    assert lone.vol.bitmap.weight == 0, "superseded is as good as written"


def test_a_write_to_be_retried_is_sent_again_after_theirs() -> None:
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.settle()
    lone.data(theirs(0, 8, 1))
    lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    assert lone.done == [] and on_disk(lone) == [(0, 8)]
    assert len(lone.payloads(P.DATA)) == 1
    lone.settle()
    assert acks(lone) == ["WRITE_ACK"] and len(lone.payloads(P.DATA)) == 2, "after the ack, as a new write"
    lone.meta(their_ack(r, 3))
    lone.settle()
    assert lone.done == [r] and r.error == 0 and lone.vol.bitmap.weight == 0


def test_our_write_waits_for_theirs_that_is_under_way() -> None:
    lone = dual(resolver=False)
    lone.data(theirs(0, 8, 1))
    r = lone.submit(Op.WRITE)
    meta = [op for op in lone.disk if op.area]
    lone.answer(*meta)
    assert lone.payloads(P.DATA) == [] and on_disk(lone) == [(0, 8)]
    lone.settle()
    assert len(lone.payloads(P.DATA)) == 1 and r.waiting == PEER


def test_a_postponed_write_keeps_its_range_until_the_peer_has_it() -> None:
    """Our disk has it and the peer's has not: a verify that got in between would find a difference."""
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.settle()
    found: list[object] = []

    def look() -> None:
        blocker = lone.vol.intervals.blocker(0, 8192)
        found.append(blocker)
        if blocker is not None:
            lone.vol.intervals.wait(blocker, look)

    look()
    lone.data(theirs(0, 8, 1))
    lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    lone.settle()
    assert len(lone.payloads(P.DATA)) == 2 and set(found) == {r}
    lone.meta(their_ack(r, 3))
    assert lone.done == [r] and found[-1] is None


def test_a_postponed_write_is_held_back_by_a_suspension_like_any_other() -> None:
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.settle()
    lone.data(theirs(0, 8, 1))
    lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    assert lone.run("suspend-io") == "done"
    lone.settle()
    assert len(lone.payloads(P.DATA)) == 1 and lone.vol.intervals.blocker(0, 4096) is r
    assert lone.vol.al.refs[0], "a crash now must find the difference"
    ticket = lone.command("resume-io")
    assert len(lone.payloads(P.DATA)) == 2
    lone.settle()
    lone.meta(their_ack(r, 3))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.done == [r] and r.error == 0 and lone.vol.bitmap.weight == 0


def test_a_postponed_write_that_finds_another_disk_waits_for_its_log() -> None:
    """The extents it holds were hot in the log of the disk that left."""
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.settle()
    lone.data(theirs(0, 8, 1))
    lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    lone.run("suspend-io")
    lone.run("detach", force=True)
    u = lone.vol.uuids
    lone.attach(generations=(u.current, u.bitmap, u.history0, u.history1))
    peer = State(Role.PRIMARY, Role.PRIMARY, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.NEGOTIATING)
    lone.data(Uuids(u.current, u.bitmap, u.history0, u.history1, 0, 0).pack(0), pack_state(peer.word(), 0))
    lone.settle()
    assert lone.local_disk() == DiskState.UP_TO_DATE and not lone.vol.al.refs
    lone.command("resume-io")
    assert [op.area for op in lone.disk] == [META] and len(lone.payloads(P.DATA)) == 1
    lone.answer()
    assert on_disk(lone) == [(0, 16)] and lone.vol.al.refs[0] and len(lone.payloads(P.DATA)) == 2


@pytest.mark.parametrize("told", ["before", "after"])
def test_a_postponed_write_of_a_node_that_lost_its_disk_is_sent_again(told: str) -> None:
    """The resolver's write is refused at once then, perhaps before ours is off the disk, or before we are told."""
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.answer(*(op for op in lone.disk if op is not r))
    assert r in lone.disk
    lone.engine.disks.failed(lone.vol, 5, write=True)
    lone.take()
    if told == "before":
        lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    lone.data(theirs(0, 8, 1))
    assert "NEG_ACK" in acks(lone)
    if told == "after":
        lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    assert len(lone.payloads(P.DATA)) == 1
    lone.answer(r)
    assert len(lone.payloads(P.DATA)) == 2
    lone.meta(their_ack(r, 3))
    assert lone.done == [r] and r.error == 0


def test_a_lost_connection_answers_what_was_postponed() -> None:
    lone = dual(resolver=False)
    r = lone.submit(Op.WRITE, 0, 8192)
    lone.settle()
    lone.meta(their_ack(r, 2, P.RETRY_WRITE))
    lone.engine.drop(ConnState.NETWORK_FAILURE, "gone")
    lone.settle()
    assert lone.done == [r] and r.error == 0 and lone.vol.bitmap.weight == 2


def test_the_resolver_is_told_nothing() -> None:
    lone = dual(resolver=True)
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(their_ack(r, 1, P.SUPERSEDED))
    assert lone.closed, "both would give way: a mistake of the peer's"


# ------------------------------------------------------------------------------------------ both, at random


class World(Pair):
    """Both nodes for real; what happens next is drawn from the seed."""

    def __init__(self, seed: int, *, freezes: bool = False) -> None:
        given = Given(size=16 << 20, net=[{"allow_two_primaries": True}] * 2, resolver=seed & 1)
        if freezes:
            given.disk = [{"fencing": Fencing.RESOURCE_AND_STONITH}] * 2
            given.handlers = ["fence-peer"]
        super().__init__(given)
        self.chance = random.Random(seed)
        self.disk_speeds = ((1, 1), (1, 12), (12, 1))[seed // 2 % 3]  # one node's disk may be much slower
        self.done: list[Request] = []
        for node in self.nodes:
            node.start()
            node.command("attach", None, {})
            self.settle()
            node.command("connect", None, {})
            self.settle()
        for node in self.nodes:
            node.command("primary", None, {})
            self.settle()
        assert all(n.engine is not None and n.engine.volumes[0].dual for n in self.nodes)

    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("requests are taken from the outbox")

    def write(self) -> None:
        """A write of 1 to 6 sectors among the first 24, or a trim; every one is told by its bytes."""
        self.n_writes += 1
        node, n = self.chance.choice(self.nodes), self.chance.randint(1, 6)
        offset, op = self.chance.randrange(24) << 9, Op.WRITE if self.chance.random() < 0.9 else Op.ZEROES
        payload = bytes((self.n_writes % 255 + 1,)) * (n << 9) if op is Op.WRITE else None
        assert node.engine is not None
        r = Request(self, f"write {self.n_writes}", op, 0, offset, n << 9, payload, 0)
        self.done.append(r)
        node.engine.submit(0, [r])
        node.pump()

    def deliver(self) -> None:
        node, socket = self.chance.choice(self.nodes), self.chance.randrange(2)
        if node.link is not None and node.engine is not None and (pipe := node.link.inbound[socket]).incoming:
            pipe.deliver(self.chance.randint(1, len(pipe.incoming)))
            node._feed(socket)
            node.pump()

    def answer(self) -> None:
        node = self.chance.choices(self.nodes, self.disk_speeds)[0]
        disk: FakeDisk = node.disks[0]
        if disk.flights and node.engine is not None:
            flight = self.chance.choice(disk.flights)
            disk.execute(flight, 0)
            node.engine.disk_done([disk.complete(flight)])
            node.pump()

    def play(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.chance.choices((self.write, self.deliver, self.answer), (2, 4, 4))[0]()

    def equal(self) -> bool:
        one, other = (n.disks[0].devices[DATA].live.read(0, 64 << 10) for n in self.nodes)
        return one == other


@pytest.mark.parametrize("seed", range(60))
def test_random_overlaps_leave_both_disks_equal(seed: int) -> None:
    world = World(seed)
    world.play(400)
    world.run_until(world.now + 2)
    for node in world.nodes:
        assert node.engine is not None and node.engine.cstate == ConnState.CONNECTED, "the connection held"
        vol = node.engine.volumes[0]
        assert vol.n_app == 0 and vol.bitmap.weight == 0 and vol.n_unacked == 0 and not vol.intervals
        assert node.engine.log.n_requests == 0 and not node.engine.log.epochs and not node.engine.conflicts.postponed
    assert all(r.error == 0 for r in world.done)
    assert world.equal()


@pytest.mark.parametrize("seed", range(20))
def test_a_frozen_interruption_in_the_middle(seed: int) -> None:
    """Both freeze when the link goes, meet again before any fencing, and go on as if nothing had been."""
    world = World(seed, freezes=True)
    world.play(200)
    world.reset()
    world.run_until(world.now + 3)
    world.play(200)
    world.run_until(world.now + 3)
    for node in world.nodes:
        assert node.engine is not None and node.engine.volumes[0].n_app == 0, node.summary()
    assert world.equal()
