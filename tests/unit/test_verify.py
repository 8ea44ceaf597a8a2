"""Online verify: what the verified side counts, and what it holds against its applications."""

from __future__ import annotations

from tandem.repl.digests import digest
from tandem.repl.requests import Op
from tandem.repl.states import ConnState
from tandem.repl.wire import (
    ID_IN_SYNC,
    ID_SYNCER,
    Packet,
    pack_ack,
    pack_block_req,
    pack_state_change,
    pack_state_reply,
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
