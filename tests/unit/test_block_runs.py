"""Runs of packets about neighbouring blocks: the same bytes as one packet each, and what is taken for such a run."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tandem.repl.block_runs import RUN_BLOCKS, block_run, pack_blocks
from tandem.repl.wire import ID_IN_SYNC, ID_OUT_OF_SYNC, ID_SYNCER, Packet, pack_ack, pack_block_req

P = Packet
BLOCK = 4096
SUM = b"abcd"


def replies(*bits: int, digest: bytes = SUM) -> bytes:
    return b"".join(pack_block_req(P.OV_REPLY, 7, bit * 8, ID_SYNCER, BLOCK, digest) for bit in bits)


@given(
    first=st.integers(0, 1 << 50), n=st.integers(1, 70), short=st.sampled_from([0, 512, 4095 & ~511]),
    volume=st.integers(0, 0xFFFF), n_digest=st.sampled_from([0, 4, 64]),
)  # fmt: skip
def test_a_run_is_the_packets_of_its_blocks(first: int, n: int, short: int, volume: int, n_digest: int) -> None:
    sums = [bytes([i]) * n_digest for i in range(n)]
    sizes = [BLOCK] * (n - 1) + [BLOCK - short]
    expected = [
        pack_block_req(P.OV_REPLY, volume, (first + i) * 8, ID_SYNCER, sizes[i], sums[i]) for i in range(n)
    ]
    packed = pack_blocks(P.OV_REPLY, volume, first * BLOCK, sum(sizes), ID_SYNCER, digests=b"".join(sums))
    assert packed == b"".join(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=70), st.integers(0, 0xFFFF_FFFF))
def test_acks_count_on_and_have_their_own_verdicts(equal: list[bool], seq: int) -> None:
    verdicts = [ID_IN_SYNC if e else ID_OUT_OF_SYNC for e in equal]
    expected = [pack_ack(P.OV_RESULT, 0, 8 * i, v, BLOCK, seq + i) for i, v in enumerate(verdicts)]
    assert pack_blocks(P.OV_RESULT, 0, 0, len(equal) * BLOCK, verdicts, seq) == b"".join(expected)


def test_a_run_ends_in_front_of_the_first_packet_that_does_not_belong_to_it() -> None:
    whole = replies(0, 1, 2)
    others = {
        "not the next block": replies(4),
        "another volume": pack_block_req(P.OV_REPLY, 6, 24, ID_SYNCER, BLOCK, SUM),
        "another packet": pack_block_req(P.CSUM_RS_REQUEST, 7, 24, ID_SYNCER, BLOCK, SUM),
        "another id": pack_block_req(P.OV_REPLY, 7, 24, 1, BLOCK, SUM),
        "another size": pack_block_req(P.OV_REPLY, 7, 24, ID_SYNCER, 512, SUM),
        "another digest": replies(3, digest=b"ab") + bytes(2),
        "not complete": replies(3)[:-1],
    }
    for what, other in others.items():
        run = block_run(memoryview(bytes(3) + whole + other), 3, P.OV_REPLY, 7, ID_SYNCER, len(SUM))
        assert run is not None and (run.n, run.sector, run.digests) == (3, 0, 3 * SUM), what


def test_what_is_no_run() -> None:
    crooked = b"".join(pack_block_req(P.OV_REPLY, 7, 1 + 8 * i, ID_SYNCER, BLOCK, SUM) for i in range(2))
    for data in (b"", replies(0), replies(0)[:-1], replies(0, 2), crooked):
        assert block_run(memoryview(data), 0, P.OV_REPLY, 7, ID_SYNCER, len(SUM)) is None


def test_a_run_ends_with_the_stretch_it_lies_in() -> None:
    data = memoryview(replies(*range(RUN_BLOCKS - 3, 2 * RUN_BLOCKS + 1)))
    first = block_run(data, 0, P.OV_REPLY, 7, ID_SYNCER, len(SUM))
    assert first is not None and first.n == 3
    second = block_run(data, 3 * 44, P.OV_REPLY, 7, ID_SYNCER, len(SUM))
    assert second is not None and second.n == RUN_BLOCKS


def test_the_last_sequence_number_is_told() -> None:
    data = memoryview(pack_blocks(P.OV_RESULT, 0, 0, 3 * BLOCK, ID_IN_SYNC, 0xFFFF_FFFF))
    run = block_run(data, 0, P.OV_RESULT, 0, ID_IN_SYNC)
    assert run is not None and run.seq == 1
