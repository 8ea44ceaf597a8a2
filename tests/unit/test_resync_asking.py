"""How a target asks: with the digests of what it has (csums-alg), or for zeroes by name (rs-discard-granularity)."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from tandem.repl.digests import DIGESTS
from tandem.repl.requests import IF_HOLE, MAY_UNMAP, Op
from tandem.repl.states import ConnState, DiskState
from tandem.repl.wire import (
    ID_SYNCER,
    Packet,
    pack_ack,
    pack_block_desc,
    pack_block_req,
    pack_data,
    packet,
    unpack_block_req,
)

from tests.scenarios.lone import FEATURES_ALL, Lone

P = Packet
THIN_RESYNC = 2
MIB = 1 << 20
REQUESTS = (P.RS_DATA_REQUEST, P.RS_THIN_REQ, P.CSUM_RS_REQUEST)


def asked(lone: Lone) -> list[tuple[Packet, int, int]]:
    """(kind, first bit, number of bits) of every request for blocks."""
    found = []
    for _, kind, _, payload in lone.packets:
        if kind in REQUESTS:
            sector, block_id, size = unpack_block_req(memoryview(payload))
            assert block_id == ID_SYNCER
            found.append((kind, sector >> 3, size >> 12))
    return found


def reply(bit: int, n: int = 1) -> bytes:
    return pack_data(P.RS_DATA_REPLY, 0, bit * 8, ID_SYNCER, 0, 0, n * 4096) + bytes([7]) * (n * 4096)


def equal(bit: int, n: int = 1) -> bytes:
    return pack_ack(P.RS_IS_IN_SYNC, 0, bit * 8, 0xBAD, n * 4096, 1)  # the kernel leaves garbage as block_id


def checking(**disk: Any) -> Lone:
    return Lone(net={"csums_alg": "md5"}, disk=disk)


# ------------------------------------------------------------------------------------------ checksums


def test_a_block_is_read_and_asked_for_with_its_digest() -> None:
    lone = checking().target((4, 6), (300, 301))
    assert asked(lone) == [(P.CSUM_RS_REQUEST, 4, 2), (P.CSUM_RS_REQUEST, 300, 1)]
    assert lone.payloads(P.CSUM_RS_REQUEST)[0][24:] == DIGESTS["md5"](bytes(8192))


def test_equal_blocks_are_not_written_and_counted() -> None:
    lone = checking().target((4, 6), (300, 301))
    lone.meta(equal(4, 2))
    lone.data(reply(300))
    assert [(op.op, op.offset) for op in lone.disk] == [(Op.WRITE, 300 << 12)]
    lone.settle()
    lone.meta(packet(P.PING_ACK))
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and lone.vol.bitmap.weight == 0
    assert "66 % had equal checksums, eliminated: 8K; transferred 4K total 12K" in lone.notes()


def test_the_range_is_locked_while_it_is_read() -> None:
    """A second look at the bitmap must not ask again, and the end must wait."""
    lone = checking()
    lone.target((0, 1), (9, 10))
    lone.meta(equal(0))
    lone.settle()
    assert asked(lone) == [(P.CSUM_RS_REQUEST, 0, 1), (P.CSUM_RS_REQUEST, 9, 1)]
    assert P.PING not in lone.sent()


def test_what_our_disk_cannot_read_is_asked_for_as_it_is() -> None:
    lone = checking(on_io_error="pass_on").target((0, 1))
    lone.data(pack_block_desc(P.OUT_OF_SYNC, 0, 8 * 8, 4096))
    lone.meta(equal(0))
    lone.take()
    reads = [op for op in lone.disk if op.op == Op.READ]
    assert [op.offset for op in reads] == [8 << 12]
    lone.answer(*reads, error=errno.EIO)
    assert asked(lone)[-1] == (P.RS_DATA_REQUEST, 8, 1)


def test_a_disk_that_fails_while_it_is_read_ends_the_resync() -> None:
    lone = checking().target((0, 1))
    lone.data(pack_block_desc(P.OUT_OF_SYNC, 0, 8 * 8, 4096))
    lone.meta(equal(0))
    lone.take()
    n_asked = len(asked(lone))
    lone.answer(*[op for op in lone.disk if op.op == Op.READ], error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS and len(asked(lone)) == n_asked


def test_a_read_that_ends_after_the_connection_asks_nobody() -> None:
    lone = checking().target((0, 1))
    lone.data(pack_block_desc(P.OUT_OF_SYNC, 0, 8 * 8, 4096))
    lone.meta(equal(0))
    lone.take()
    assert lone.run("disconnect", force=True) == "done"
    assert (P.CSUM_RS_REQUEST, 8, 1) not in asked(lone) and lone.vol.n_local == 0
    assert lone.vol.bitmap.weight == 1


@pytest.mark.parametrize("crashed", [False, True])
def test_checksums_after_a_crash_only(crashed: bool) -> None:
    lone = Lone(net={"csums_alg": "md5", "csums_after_crash_only": True})
    attach = lone.attach

    def attach_and_remember(**found: Any) -> None:
        attach(**found)
        lone.vol.crashed_primary = crashed

    lone.attach = attach_and_remember  # type: ignore[method-assign]
    lone.target((0, 1))
    assert asked(lone) == [(P.CSUM_RS_REQUEST if crashed else P.RS_DATA_REQUEST, 0, 1)]


# ------------------------------------------------------------------------------------------------ thin


def test_whole_pieces_are_asked_for_as_thin_and_the_rest_as_it_is() -> None:
    lone = Lone(disk={"rs_discard_granularity": 65536}).target((8, 40), (48, 50))
    assert asked(lone) == [
        (P.RS_DATA_REQUEST, 8, 8), (P.RS_THIN_REQ, 16, 16), (P.RS_DATA_REQUEST, 32, 8), (P.RS_DATA_REQUEST, 48, 2),
    ]  # fmt: skip


def test_a_piece_of_zeroes_is_written_and_confirmed_as_a_whole() -> None:
    lone = Lone(disk={"rs_discard_granularity": 65536}).target((16, 32))
    lone.data(pack_block_desc(P.RS_DEALLOCATED, 0, 128, 65536))
    assert [(op.op, op.offset, op.length, op.flags) for op in lone.disk] == [(Op.ZEROES, 65536, 65536, MAY_UNMAP)]
    lone.settle()
    assert lone.sent(P.RS_WRITE_ACK) == [P.RS_WRITE_ACK] and lone.vol.bitmap.weight == 0


@pytest.mark.parametrize("granularity", [0, 512])
def test_no_thin_request_without_a_piece_of_whole_blocks(granularity: int) -> None:
    lone = Lone(disk={"rs_discard_granularity": granularity}).target((0, 300))
    assert asked(lone) == [(P.RS_DATA_REQUEST, 0, 256), (P.RS_DATA_REQUEST, 256, 44)]


def test_a_file_is_asked_for_as_thin_without_being_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lone = Lone()
    attach = lone.attach
    monkeypatch.setattr(lone, "attach", lambda **found: attach(sparse=True, **found))
    lone.target((0, 300))
    assert asked(lone) == [(P.RS_THIN_REQ, 0, 256), (P.RS_DATA_REQUEST, 256, 44)]
    lone.data(pack_block_desc(P.RS_DEALLOCATED, 0, 0, MIB))
    assert [(op.op, op.flags) for op in lone.disk] == [(Op.ZEROES, MAY_UNMAP | IF_HOLE)]


def test_where_zeroes_are_found_more_is_asked_for_at_once() -> None:
    lone = Lone(disk={"rs_discard_granularity": MIB}).target((0, 50 * 256))
    assert len(asked(lone)) == 8
    for at in range(8):
        lone.data(pack_block_desc(P.RS_DEALLOCATED, 0, at * 2048, MIB))
    lone.settle()
    assert len(asked(lone)) == 8 + 32
    lone.data(reply(8 * 256, 256))
    lone.settle()
    assert len(asked(lone)) == 8 + 32


def thin(bit: int, n: int) -> bytes:
    return pack_block_req(P.RS_THIN_REQ, 0, bit * 8, ID_SYNCER, n * 4096)


@pytest.mark.parametrize("content", [None, bytes(65536), bytes(65535) + b"x", b"x" + bytes(65535)])
def test_a_source_names_what_is_a_hole_or_all_zero(content: bytes | None) -> None:
    lone = Lone().source((16, 32))
    lone.data(thin(16, 16))
    (read,) = [op for op in lone.disk if op.op == Op.READ]
    assert read.flags == IF_HOLE
    read.payload = content
    lone.disk.remove(read)
    lone.engine.disk_done([read])
    lone.take()
    named = content is None or not any(content)
    assert lone.sent(P.RS_DEALLOCATED, P.RS_DATA_REPLY) == [P.RS_DEALLOCATED if named else P.RS_DATA_REPLY]


def test_no_thin_request_to_a_peer_that_knows_none() -> None:
    lone = Lone(disk={"rs_discard_granularity": 65536})
    connect = lone.connect
    lone.connect = lambda state, **how: connect(state, features=FEATURES_ALL & ~THIN_RESYNC, **how)  # type: ignore
    lone.target((0, 16))
    assert asked(lone) == [(P.RS_DATA_REQUEST, 0, 16)]


def test_checksums_come_before_thin() -> None:
    lone = checking(rs_discard_granularity=65536).target((0, 16))
    assert asked(lone) == [(P.CSUM_RS_REQUEST, 0, 16)]
