"""Online verify: what is asked for and counted, what is held against applications, how much is left to them."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from tandem.repl import pace, verify
from tandem.repl.block_runs import RUN_BLOCKS
from tandem.repl.digests import digest
from tandem.repl.requests import Op
from tandem.repl.states import ConnState
from tandem.repl.wire import (
    ID_IN_SYNC,
    ID_OUT_OF_SYNC,
    ID_SYNCER,
    Packet,
    pack_ack,
    pack_block_req,
    pack_state_change,
    pack_state_reply,
    unpack_ack,
    unpack_block_req,
)

from tests.scenarios.lone import Lone

P = Packet
BLOCK = 4096
CONN = 0x1F0


def verified(n_blocks: int) -> Lone:
    """A Primary whose peer has begun to verify a volume of *n_blocks* and the metadata behind it."""
    lone = Lone(size=n_blocks * BLOCK, net={"verify_alg": "crc32c"}).ready()
    lone.data(pack_state_change(CONN, ConnState.VERIFY_S << 4, 0, False))
    assert lone.conn() == ConnState.VERIFY_T
    lone.forget()
    return lone


def request(bit: int) -> bytes:
    return pack_block_req(P.OV_REQUEST, 0, bit * 8, ID_SYNCER, BLOCK)


def verdict(bit: int) -> bytes:
    return pack_ack(P.OV_RESULT, 0, bit * 8, ID_IN_SYNC, BLOCK, 1)


def replies(lone: Lone) -> list[int]:
    size = digest("crc32c")
    assert size is not None
    return [unpack_block_req(p[: -size.size])[0] // 8 for p in lone.payloads(P.OV_REPLY)]


def test_a_first_block_that_waits_for_a_write_is_counted_all_the_same() -> None:
    """Else the others end the verify here, and the block is read without being held: a difference that is none."""
    lone = verified(64)
    n_bits = lone.vol.n_bits
    r = lone.submit(Op.WRITE)
    lone.data(*map(request, range(n_bits)))
    lone.settle()
    assert sorted(replies(lone)) == list(range(1, n_bits))
    lone.meta(*map(verdict, range(1, n_bits)))
    assert lone.conn() == ConnState.VERIFY_T, "block 0 has not been compared"
    lone.meta(lone.ack(r))
    lone.settle()
    assert r in lone.done and replies(lone)[-1] == 0
    later = lone.submit(Op.WRITE)
    lone.settle()
    assert later not in lone.out(), "it waits for the verdict"
    lone.meta(verdict(0))
    assert lone.conn() == ConnState.CONNECTED and later in lone.out()


def test_the_first_request_tells_where_the_peer_began() -> None:
    lone = verified(64)
    n_bits = lone.vol.n_bits
    lone.data(*map(request, range(n_bits - 2, n_bits)))
    lone.settle()
    lone.meta(verdict(n_bits - 1), verdict(n_bits - 2))
    assert lone.conn() == ConnState.CONNECTED


def test_a_late_reply_of_a_verify_that_was_given_up_is_compared_once_with_its_block() -> None:
    """Detached, attached and begun again on one connection: the first run's reply comes beside the second's."""
    size = digest("crc32c")
    assert size is not None
    lone = Lone(size=64 * BLOCK, net={"verify_alg": "crc32c"}).ready()
    lone.command("verify", 0)
    lone.meta(pack_state_reply(1, 0, False))
    assert lone.conn() == ConnState.VERIFY_S
    zeroes = size(bytes(BLOCK))
    reply = pack_block_req(P.OV_REPLY, 0, 0, ID_SYNCER, BLOCK, zeroes)
    lone.data(reply, reply)
    lone.settle()
    assert lone.conn() == ConnState.VERIFY_S
    assert len(lone.sent(P.OV_RESULT)) == 2, "each reply has its verdict"


# ------------------------------------------------------------------------------ stretches of blocks


def verifying(n_blocks: int, **disk: Any) -> Lone:
    """A Primary that has begun to verify; what it asks for is in its log."""
    lone = Lone(size=n_blocks * BLOCK, net={"verify_alg": "crc32c"}, disk=disk).ready()
    lone.command("verify", 0)
    lone.meta(pack_state_reply(1, 0, False))
    assert lone.conn() == ConnState.VERIFY_S
    return lone


def asked(lone: Lone) -> list[int]:
    return [unpack_block_req(p)[0] // 8 for p in lone.payloads(P.OV_REQUEST)]


def verdicts(lone: Lone) -> dict[int, bool]:
    """Block -> whether it was found equal."""
    found = [unpack_ack(p) for p in lone.payloads(P.OV_RESULT)]
    assert {block_id for _, block_id, _, _ in found} <= {ID_IN_SYNC, ID_OUT_OF_SYNC}
    return {sector // 8: block_id == ID_IN_SYNC for sector, block_id, _, _ in found}


def answer(bit: int, content: bytes = bytes(BLOCK)) -> bytes:
    size = digest("crc32c")
    assert size is not None
    return pack_block_req(P.OV_REPLY, 0, bit * 8, ID_SYNCER, len(content), size(content))


def test_neighbouring_blocks_are_asked_for_by_the_window_and_read_together() -> None:
    lone = verifying(4096)
    assert asked(lone) == list(range(verify.WINDOW // BLOCK))
    lone.data(*map(answer, range(RUN_BLOCKS)))
    assert [(op.offset, op.length) for op in lone.disk] == [(0, RUN_BLOCKS * BLOCK)]
    lone.settle()
    assert verdicts(lone) == dict.fromkeys(range(RUN_BLOCKS), True)
    n = verify.WINDOW // BLOCK
    assert asked(lone)[n:] == list(range(n, n + RUN_BLOCKS))


@pytest.mark.parametrize("step", [1, 7, 44 * 5, 1 << 20])
def test_however_the_answers_are_cut_each_block_gets_its_own_verdict(step: int) -> None:
    lone = verifying(200)
    n_bits, differing = lone.vol.n_bits, {0, 5, 63, 64, 100}
    stream = b"".join(answer(bit, bytes([bit in differing]) * BLOCK) for bit in range(n_bits))
    at = 0
    for end in range(step, len(stream) + step, step):
        at += lone.data(stream[at:end])
    lone.settle()
    assert verdicts(lone) == {bit: bit not in differing for bit in range(n_bits)}
    assert [bit for bit in range(n_bits) if lone.vol.bitmap.any(bit, bit + 1)] == sorted(differing)
    assert not lone.vol.intervals


@pytest.mark.parametrize("step", [1, 7, 40 * 5, 1 << 20])
def test_however_requests_and_results_are_cut_every_block_is_answered_and_let_go(step: int) -> None:
    lone = verified(200)
    n_bits = lone.vol.n_bits
    for receive, packets in ((lone.data, request), (lone.meta, verdict)):
        stream, at = b"".join(map(packets, range(n_bits))), 0
        for end in range(step, len(stream) + step, step):
            at += receive(stream[at:end])
        lone.settle()
        assert replies(lone) == list(range(n_bits))
    assert lone.conn() == ConnState.CONNECTED and not lone.vol.intervals


def test_a_verify_goes_on_up_to_the_block_that_is_being_written() -> None:
    """A stretch that waited until nobody wrote in it could wait for ever."""
    lone = Lone(size=256 * BLOCK, net={"verify_alg": "crc32c"}).ready()
    r = lone.submit(Op.WRITE, 5 * BLOCK)
    lone.settle()
    second = lone.submit(Op.WRITE, 9 * BLOCK)
    lone.command("verify", 0)
    lone.meta(pack_state_reply(1, 0, False))
    assert asked(lone) == [0, 1, 2, 3, 4]
    lone.meta(lone.ack(r))
    assert asked(lone) == [0, 1, 2, 3, 4, 5, 6, 7, 8], "and no further: the next one is being written, too"
    lone.meta(lone.ack(second))
    lone.settle()
    assert asked(lone)[9] == 9


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_block_that_cannot_be_read_speaks_for_itself_only(side: str) -> None:
    """With on-io-error pass_on the disk stays; its other blocks are as good as before."""
    bad = 3
    if side == "source":
        lone = verifying(64, on_io_error="pass_on")
        lone.data(*map(answer, range(lone.vol.n_bits)))
    else:
        lone = Lone(size=64 * BLOCK, net={"verify_alg": "crc32c"}, disk={"on_io_error": "pass_on"}).ready()
        lone.data(pack_state_change(CONN, ConnState.VERIFY_S << 4, 0, False))
        lone.data(*map(request, range(lone.vol.n_bits)))
    while lone.disk:
        op = lone.disk[0]
        hurt = op.op == Op.READ and op.offset <= bad * BLOCK < op.offset + op.length
        lone.answer(op, error=errno.EIO if hurt else 0)
    everything = range(lone.vol.n_bits)
    if side == "source":
        assert verdicts(lone) == {bit: bit != bad for bit in everything}
    else:
        sums = {unpack_block_req(p)[0] // 8: p[24:] for p in lone.payloads(P.OV_REPLY)}
        assert {bit for bit in everything if sums[bit] == bytes(4)} == {bad}


# ------------------------------------------------------------------------------ beside applications


def test_a_source_asks_in_slices_with_rests_while_its_applications_are_at_work() -> None:
    lone = Lone(size=4096 * BLOCK, net={"verify_alg": "crc32c"}).ready()
    lone.vol.n_app = 1
    lone.command("verify", 0)
    lone.meta(pack_state_reply(1, 0, False))
    n = pace.SLICE // BLOCK
    assert asked(lone) == list(range(n))
    lone.at(lone.now + 0.01)
    lone.data(*map(answer, range(n)))
    lone.settle()
    assert len(asked(lone)) == n and lone.engine.deadline() == pytest.approx(lone.now + pace.REST_FACTOR * 0.01)
    lone.at(lone.now + pace.REST_FACTOR * 0.01)
    assert len(asked(lone)) == 2 * n


def test_a_target_answers_in_slices_with_rests_while_its_applications_are_at_work() -> None:
    lone = verified(4096)
    lone.vol.n_app = 1
    n = pace.SLICE // BLOCK
    lone.data(*map(request, range(n + 2)))
    lone.settle()
    assert replies(lone) == list(range(n))
    lone.at(lone.now + 0.01)
    lone.meta(*map(verdict, range(n)))
    lone.settle()
    assert len(replies(lone)) == n
    lone.at(lone.now + pace.REST_FACTOR * 0.01)
    lone.settle()
    assert replies(lone)[n:] == [n, n + 1]


def test_requests_that_wait_are_refused_when_the_disk_goes() -> None:
    lone = verified(4096)
    lone.vol.n_app = 1
    n = pace.SLICE // BLOCK
    lone.data(*map(request, range(n + 2)))
    lone.vol.n_app = 0
    lone.settle()
    assert lone.run("detach", volume=0, force=True) == "done"
    refused = [unpack_ack(p)[0] // 8 for p in lone.payloads(P.NEG_RS_DREPLY)]
    assert refused == [n, n + 1] and not lone.vol.intervals
