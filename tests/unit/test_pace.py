"""A resync beside applications: slices, rests, and what it gets in any case."""

from __future__ import annotations

import pytest
from tandem.repl import pace, resync_target
from tandem.repl.digests import digest
from tandem.repl.events import LinkLost
from tandem.repl.wire import ID_SYNCER, Packet, pack_block_req, unpack_ack, unpack_data

from tests.scenarios.lone import Lone

from .test_resync import reply, request, requests, rs_ack

P = Packet
MIB = 1 << 20


def test_a_target_asks_in_slices_with_rests_while_its_own_applications_are_at_work() -> None:
    lone = Lone().target((0, 4096))
    lone.forget()
    lone.vol.n_app = 1
    for i in range(resync_target.WINDOW_IDLE // MIB):
        assert requests(lone) == [], "what began before has to end first"
        lone.data(reply(256 * i, 256))
        lone.settle()
    assert requests(lone) == [(2048, 256)]
    lone.at(lone.now + 0.2)
    lone.data(reply(2048, 256))
    lone.settle()
    rest = lone.engine.deadline()
    assert requests(lone) == [(2048, 256)] and rest == pytest.approx(lone.now + pace.REST_FACTOR * 0.2)
    assert rest is not None
    lone.at(rest)
    assert requests(lone) == [(2048, 256), (2304, 256)]


def served(lone: Lone) -> list[tuple[int, int]]:
    """(bit, bits) of what was read for the target."""
    lone.settle()
    return [(unpack_data(p)[0] >> 3, len(p) - 24 >> 12) for p in lone.payloads(P.RS_DATA_REPLY)]


def test_a_source_serves_in_slices_with_rests_while_its_applications_are_at_work() -> None:
    lone = Lone().source((0, 2048))
    lone.vol.n_app = 1
    lone.data(*(request(64 * i, 64) for i in range(9)))
    assert served(lone) == [(0, 64), (64, 64), (128, 64), (192, 64)]
    lone.at(lone.now + 0.01)
    for i in range(4):
        assert len(served(lone)) == 4, "one slice at a time"
        lone.meta(rs_ack(64 * i, 64))
    assert len(served(lone)) == 4 and lone.engine.deadline() == pytest.approx(lone.now + pace.REST_FACTOR * 0.01)
    lone.at(lone.now + pace.REST_FACTOR * 0.01)
    assert served(lone)[4:] == [(256, 64), (320, 64), (384, 64), (448, 64)]
    lone.vol.n_app = 0
    lone.at(lone.now + 1)
    lone.meta(rs_ack(256, 64))
    assert len(served(lone)) == 9, "nobody is at work any more"


@pytest.mark.parametrize("end", ["refused", "in sync", "gone"])
def test_whatever_becomes_of_a_slice_the_next_one_follows(end: str) -> None:
    lone = Lone(net={"csums_alg": "crc32c"}).source((0, 2048))
    lone.vol.n_app = 1
    if end == "in sync":
        known = digest("crc32c")
        assert known is not None
        ask = pack_block_req(P.CSUM_RS_REQUEST, 0, 0, ID_SYNCER, MIB, known(bytes(MIB)))
        lone.data(ask)
    else:
        lone.data(request(0, 256))
    lone.data(request(256, 256), request(512, 1))
    if end == "gone":
        lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
        assert served(lone) == [] and not lone.vol.intervals
        return
    served(lone)
    if end == "refused":
        lone.meta(rs_ack(0, 256, P.NEG_ACK))
    lone.at(lone.now + 1)
    assert (256, 256) in served(lone)


def test_c_min_rate_is_what_a_resync_gets_in_any_case() -> None:
    lone = Lone(disk={"c_min_rate": 1024}).source((0, 2048))
    lone.vol.n_app = 1
    lone.data(request(0, 256), request(256, 256))
    served(lone)
    lone.at(lone.now + 2)
    lone.meta(rs_ack(0, 256))
    assert lone.engine.deadline() == pytest.approx(lone.now + 1.0)
    never = Lone(disk={"c_min_rate": 0}).source((0, 2048))
    never.vol.n_app = 1
    never.data(request(0, 256), request(256, 256))
    assert len(served(never)) == 2


def test_requests_that_wait_are_refused_when_the_resync_is_given_up() -> None:
    lone = Lone().source((0, 2048))
    lone.vol.n_app = 1
    lone.data(request(0, 256), request(256, 1))
    lone.settle()
    assert lone.run("detach", volume=0, force=True) == "done"
    lone.settle()
    assert [unpack_ack(p)[0] for p in lone.payloads(P.NEG_RS_DREPLY)] == [2048]
