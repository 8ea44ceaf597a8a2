"""The short path of the data plane is the long path: both are told the same stories, and compared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.events import LinkLost
from tandem.repl.requests import FUA, PEER, Op, Request
from tandem.repl.units import SECTOR
from tandem.repl.volume import Volume
from tandem.repl.wire import Packet, pack_ack, pack_barrier_ack

from tests.scenarios.lone import Lone

P = Packet


def image(lone: Lone, requests: list[Request]) -> tuple[object, ...]:
    """Everything of an outbox and of what it leaves behind that anybody outside can see."""
    names = {id(r): i for i, r in enumerate(requests)}
    out = lone.engine.take()
    disk = [names.get(id(op), (op.op, op.area, op.offset, op.length, op.flags)) for op in out.disk]
    vol, m, log = lone.vol, lone.engine.mirror, lone.engine.log
    return (
        b"".join(bytes(b) for b in out.data), b"".join(bytes(b) for b in out.meta), sorted(map(str, disk)),
        [names[id(r)] for r in out.done], [(r.waiting, r.legs, r.block_id, r.error) for r in requests],
        vol.seq, log.next_id, log.n_requests, m.n_app, vol.n_app, vol.n_local, vol.n_pending, vol.bytes_sent,
        [(e.barrier, e.n_sent, len(e.requests)) for e in log.epochs], sorted(vol.intervals.busy),
        sorted(vol.al.refs.items()), vol.bitmap.weight,
    )  # fmt: skip


Step = tuple[str, list[tuple[Op, int, int, int]]]

one_request = st.tuples(
    st.sampled_from((Op.WRITE, Op.WRITE, Op.WRITE, Op.READ, Op.TRIM, Op.FLUSH)),
    st.sampled_from((0, 1, 2, 3, 8, 9, 1023, 1024, 1025, 2048)),  # block
    st.sampled_from((1, 2, 7, 8, 16, 256)),  # sectors
    st.sampled_from((0, 0, FUA)),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.lists(one_request, min_size=1, max_size=8)),
        st.tuples(st.sampled_from(("disk", "acks", "barrier", "tick", "break")), st.just([])),
    ),
    max_size=14,
)


def _without_short_path(lone: Lone) -> None:
    lone.engine.mirror._submit_fast = lambda vol, batch: batch  # type: ignore[method-assign]


class Driven:
    """One engine that is told the same story as another one.

    Requests of one batch are concurrent, so the short path may start them in another order than they came:
    reads, the writes it takes, and the rest. The slow engine is told the order that the fast one chose.
    """

    def __init__(self, slow: bool, max_epoch_size: int, ours: bool, syncing: bool) -> None:
        lone = Lone(net={"max_epoch_size": max_epoch_size})
        self.lone = lone.source((1, 3), (9, 1025)) if syncing else lone.ready(ours=ours)
        self.ack = P.RS_WRITE_ACK if syncing else P.WRITE_ACK
        self.order: list[int] = []  # of the last batch
        self.requests: list[Request] = []
        m = self.lone.engine.mirror
        if slow:
            _without_short_path(self.lone)
        else:
            short = m._submit_fast

            def watched(vol: Volume, batch: list[Request]) -> list[Request]:
                rest = short(vol, batch)
                numbers = {id(r): i for i, r in enumerate(batch)}
                last = [numbers[id(r)] for r in rest]
                taken = [i for i in range(len(batch)) if i not in last]
                reads = [i for i in taken if batch[i].op == Op.READ]
                self.order = reads + [i for i in taken if i not in reads] + last
                return rest

            m._submit_fast = watched  # type: ignore[method-assign]

    def step(
        self, kind: str, batch: list[tuple[Op, int, int, int]], order: list[int] | None = None
    ) -> tuple[object, ...]:
        lone, engine = self.lone, self.lone.engine
        if kind == "submit":
            new = []
            self.order = list(range(len(batch)))
            for op, block, n, flags in batch:
                payload = bytes([len(self.requests) & 255]) * (n * SECTOR) if op is Op.WRITE else None
                length = 0 if op is Op.FLUSH else n * SECTOR
                offset = 0 if op is Op.FLUSH else block << 12
                new.append(Request(lone, 0, op, 0, offset, length, payload, flags))
            self.requests += new
            engine.submit(0, [new[i] for i in order] if order else new)
        elif kind == "disk":
            ops, lone.disk = lone.disk, []
            for done in ops:
                if done.op == Op.READ:
                    done.payload = bytes(done.length)
            engine.disk_done(ops)
        elif kind == "acks":
            for block_id, r in list(engine.log.inflight.items()):
                length = r.length if isinstance(r, Request) else 0
                sector = r.offset >> 9 if isinstance(r, Request) else 0
                engine.receive_meta(memoryview(pack_ack(self.ack, 0, sector, block_id, length, 1)))
        elif kind == "barrier" and engine.log.epochs and engine.log.epochs[0].barrier_sent:
            epoch = engine.log.epochs[0]
            if all(not r.waiting & PEER for r in epoch.requests):
                engine.receive_meta(memoryview(pack_barrier_ack(epoch.barrier, epoch.n_sent)))
        elif kind == "tick":
            lone.now += 0.05
            engine.tick(lone.now)
        elif kind == "break":
            engine.handle(LinkLost(engine.link.ticket, "gone"), lone.now)
        out = engine.out
        lone.disk += out.disk
        return image(lone, self.requests)


@given(steps, st.sampled_from((3, 2048)), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_the_short_path_does_what_the_long_path_does(
    story: list[Step], max_epoch_size: int, ours: bool, syncing: bool
) -> None:
    fast, slow = (Driven(slow, max_epoch_size, ours, syncing) for slow in (False, True))
    for kind, batch in story:
        assert fast.step(kind, batch) == slow.step(kind, batch, fast.order), (kind, batch)


@pytest.mark.parametrize("syncing", [False, True])
def test_the_short_path_is_really_taken(monkeypatch: pytest.MonkeyPatch, syncing: bool) -> None:
    lone = Lone().source((9, 1025)) if syncing else Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()  # the extent is hot now
    monkeypatch.setattr(lone.engine.mirror, "enter", lambda vol, r: pytest.fail("the long path"))
    lone.submit(Op.WRITE, 8192)
    assert lone.sent(P.DATA) == [P.DATA] * 2
