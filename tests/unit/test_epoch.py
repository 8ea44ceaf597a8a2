"""Epochs of the transfer log: of writes that both nodes have answered, only the blocks are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tandem.repl.config import Fencing
from tandem.repl.epoch import SETTLE_EVERY
from tandem.repl.requests import Op, Request
from tandem.repl.states import DiskState
from tandem.repl.wire import Packet, pack_ack, pack_barrier_ack, pack_state, unpack_data

from tests.scenarios.lone import PEER_SECONDARY, Lone, barriers, lose

P = Packet


def settled_log(**how: Any) -> tuple[Lone, list[Request]]:
    """Six writes of two blocks, all answered, in epochs of two; of the first two epochs only the blocks are left."""
    lone = Lone(net={"max_epoch_size": 2}, **how).ready()
    written = []
    for i in range(6):
        written.append(lone.submit(Op.WRITE, i * 3 * 8192, 8192))
        lone.settle()
        lone.meta(lone.ack(written[-1]))
    assert [(e.n_sent, len(e.requests)) for e in lone.engine.log.epochs] == [(2, 0), (2, 2), (2, 2)]
    written.append(lone.submit(Op.WRITE, 6 * 3 * 8192, 8192))
    assert [(e.n_sent, len(e.requests)) for e in lone.engine.log.epochs] == [(2, 0), (2, 0), (2, 2), (1, 1)]
    assert lone.engine.log.n_requests == 7 and lone.engine.log.n_settled == 4
    assert lone.vol.al.refs == {0: 7}
    return lone, written


def test_a_long_epoch_keeps_only_what_is_on_its_way_and_some_more() -> None:
    lone = Lone().ready()
    (epoch,) = lone.engine.log.epochs or [lone.engine.log.epoch_for_write()]
    waiting: list[Request] = []
    for i in range(3 * SETTLE_EVERY):
        waiting.append(lone.submit(Op.WRITE, i * 4096))
        lone.settle()
        if len(waiting) == 8:
            lone.meta(lone.ack(waiting.pop(0)))
        assert len(epoch.requests) <= SETTLE_EVERY + 8
    assert epoch.n_settled + len(epoch.requests) == epoch.n_sent == 3 * SETTLE_EVERY
    assert epoch.requests[-7:] == waiting, "in the order they were sent"
    lose(lone)
    assert lone.vol.bitmap.weight == 3 * SETTLE_EVERY


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_nothing_of_a_settled_write_stays_behind(protocol: str) -> None:
    lone = Lone(net={"max_epoch_size": 2, "protocol": protocol}).ready()
    kind = {"B": P.RECV_ACK, "C": P.WRITE_ACK}.get(protocol)
    for i in range(20):
        r = lone.submit(Op.WRITE, i * 8192)
        lone.settle()
        if kind is not None:
            lone.meta(lone.ack(r, kind))
    log = lone.engine.log
    assert log.n_settled == 16
    lone.at(lone.now + 1)
    lone.meta(*(pack_barrier_ack(epoch.barrier, epoch.n_sent) for epoch in log.epochs))
    assert not log.inflight and not log.epochs and log.n_requests == log.n_settled == 0


def test_an_answered_flush_that_frees_too_little_is_followed_by_another() -> None:
    """It goes into the open epoch, whose barrier ack it can therefore not bring."""
    lone = Lone(size=512 << 20, disk={"al_extents": 67}).ready()
    for i in range(lone.vol.al.slots):
        r = lone.submit(Op.WRITE, i << 22)
        lone.settle()
        lone.meta(lone.ack(r))
    last = lone.submit(Op.WRITE, lone.vol.al.slots << 22)
    lone.settle()

    def flushes() -> list[int]:
        return [unpack_data(p)[1] for p in lone.payloads(P.DATA) if len(p) == 24]

    assert len(flushes()) == 1 and not last.waiting
    lone.meta(pack_ack(P.WRITE_ACK, 0, 0, flushes()[0], 0, 1))
    lone.settle()
    assert len(flushes()) == 2


def test_settled_writes_leave_the_log_with_their_barrier_ack() -> None:
    lone, written = settled_log()
    lone.meta(pack_barrier_ack(0, 2))
    assert lone.engine.log.n_requests == 5 and lone.engine.log.n_settled == 2 and lone.vol.al.refs == {0: 5}
    lone.meta(pack_barrier_ack(1, 2), pack_barrier_ack(2, 2))
    lone.settle()
    lone.meta(lone.ack(written[-1]))
    lone.at(lone.now + 1)
    lone.meta(pack_barrier_ack(3, 1))
    log = lone.engine.log
    assert not log.epochs and log.n_requests == log.n_settled == 0 and lone.vol.al.refs == {0: 0}


@pytest.mark.parametrize("how", ["link", "disk"])
def test_settled_writes_that_the_peer_may_have_lost_are_out_of_sync(how: str) -> None:
    lone, _ = settled_log()
    lone.meta(pack_barrier_ack(0, 2))
    lone.settle()
    if how == "link":
        lose(lone)
        assert lone.engine.log.n_requests == lone.engine.log.n_settled == 0 and lone.vol.al.refs == {0: 0}
    else:
        lone.data(pack_state(replace(PEER_SECONDARY, disk=DiskState.DISKLESS).word(), 0))
    expected = {6 * i + k for i in range(2, 7) for k in range(2)}
    assert {bit for bit in range(60) if lone.vol.bitmap.any(bit, bit + 1)} == expected


def test_settled_writes_stay_in_a_frozen_log_until_the_next_barrier_ack() -> None:
    lone, written = settled_log(disk={"fencing": Fencing.RESOURCE_AND_STONITH}, handlers=("fence-peer",))
    lone.settle()
    lose(lone)
    assert lone.vol.bitmap.weight == 0 and lone.engine.log.answered_unstable()
    lone.packets.clear()
    lone.connect()
    log = lone.engine.log
    assert log.n_settled == 4 and log.n_requests == 7 and len(log.epochs) == 1 and lone.vol.al.refs == {0: 7}
    lone.meta(lone.ack(written[-1]), pack_barrier_ack(barriers(lone)[-1], 1))
    assert log.n_requests == log.n_settled == 0 and lone.vol.al.refs == {0: 0}
    assert written[-1] in lone.done and lone.vol.bitmap.weight == 0


def test_settled_writes_of_a_detached_disk_hold_no_extents() -> None:
    lone, _ = settled_log()
    lone.settle()
    lone.run("detach", force=True)
    assert lone.local_disk() == DiskState.DISKLESS
    lone.meta(*(pack_barrier_ack(i, 2) for i in range(3)))
    assert not any(lone.vol.al.refs.values())


def test_a_write_whose_answer_is_held_is_kept_as_it_is() -> None:
    """Should the new generation not reach the disk, it has to be told from those the peer has."""
    lone = Lone(net={"max_epoch_size": 1}).ready()
    lone.vol.completion_gates = 1
    for i in range(4):
        r = lone.submit(Op.WRITE, i * 8192)
        lone.settle()
        lone.meta(lone.ack(r))
    assert lone.done == [] and all(len(e.requests) == 1 for e in lone.engine.log.epochs)
