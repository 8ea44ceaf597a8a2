"""Our applications' flushes: both sides, shared, refused, failed; the epochs they leave behind."""

from __future__ import annotations

import errno

from tandem.repl import transfer_log
from tandem.repl.requests import Op, Request
from tandem.repl.states import DiskState
from tandem.repl.wire import (
    DP_FLUSH,
    Packet,
    pack_ack,
    pack_barrier_ack,
    unpack_barrier,
    unpack_data,
)

from tests.scenarios.lone import Lone

P = Packet


def written(lone: Lone, offset: int = 0) -> Request:
    """A write that is on the local disk."""
    r = lone.submit(Op.WRITE, offset)
    while lone.disk and lone.disk[-1].op == Op.WRITE:  # the activity log's first, where the extent is cold
        lone.answer(lone.disk[-1])
    return r


def flushes_sent(lone: Lone) -> list[bytes]:
    return [p for p in lone.payloads(P.DATA) if len(p) == 24]


def flush_ack(lone: Lone, which: int = -1) -> bytes:
    _, block_id, _, flags = unpack_data(flushes_sent(lone)[which])
    assert flags & DP_FLUSH
    return pack_ack(P.WRITE_ACK, 0, 0, block_id, 0, 1)


def test_a_flush_needs_both_sides() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.FLUSH)
    lone.settle()
    assert lone.done == []
    lone.meta(flush_ack(lone))
    assert lone.done == [r]


def test_flushes_that_arrive_meanwhile_share_the_next_one() -> None:
    lone = Lone().ready()
    lone.meta(lone.ack(written(lone)))
    lone.forget()
    first = lone.submit(Op.FLUSH)
    (flush,) = lone.disk
    lone.meta(lone.ack(written(lone, 8192)))
    rest = [lone.submit(Op.FLUSH) for _ in range(5)]
    assert lone.disk == [flush] and len(flushes_sent(lone)) == 1
    lone.meta(flush_ack(lone))
    lone.answer()
    assert lone.done[-1] is first and len(lone.disk) == 1
    lone.settle()
    lone.meta(flush_ack(lone))
    assert lone.done[-6:] == [first, *rest]


def test_an_epoch_of_flushes_ends_by_the_clock() -> None:
    """Its writes leave the log even when the application does nothing any more."""
    lone = Lone().ready()
    lone.meta(lone.ack(written(lone)))
    lone.submit(Op.FLUSH)
    lone.settle()
    lone.meta(flush_ack(lone))
    assert lone.payloads(P.BARRIER) == []
    lone.at(lone.now + transfer_log.BARRIER_DELAY_S)
    (barrier,) = map(unpack_barrier, lone.payloads(P.BARRIER))
    lone.meta(pack_barrier_ack(barrier, 2))
    assert lone.engine.log.n_requests == 0


def test_a_flush_of_our_own_does_not_answer_a_clients_flush() -> None:
    """The one that shortens the log was sent earlier than what the client wants to be stable."""
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.engine.log.ask_for_flush(lone.vol)
    lone.take()
    own = flush_ack(lone)
    second = lone.submit(Op.WRITE, 8192)
    flush = lone.submit(Op.FLUSH)
    lone.settle()
    lone.meta(lone.ack(r), own)
    assert flush not in lone.done
    lone.meta(lone.ack(second), flush_ack(lone))
    assert flush in lone.done


def test_a_flush_the_peer_refuses_is_answered_by_the_local_disk() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    flush = lone.submit(Op.FLUSH)
    lone.settle()
    _, block_id, _, _ = unpack_data(next(p for p in lone.payloads(P.DATA) if len(p) == 24))
    lone.meta(pack_ack(P.NEG_ACK, 0, 0, block_id, 0, 1))
    assert flush in lone.done and flush.error == 0
    assert lone.vol.bitmap.weight == 1, "what it did not flush is out of sync"


def test_a_failed_local_flush_costs_the_disk() -> None:
    lone = Lone().ready()
    flush = lone.submit(Op.FLUSH)
    lone.answer(error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS and flush not in lone.done
    lone.meta(flush_ack(lone))
    assert flush in lone.done and flush.error == 0
