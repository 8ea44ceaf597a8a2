"""Settings that both nodes share, changed while the connection lives (P_PROTOCOL_UPDATE)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl.config import AfterSb, NetOptions
from tandem.repl.digests import digest
from tandem.repl.events import Answer, Close, Reconfigure
from tandem.repl.requests import Op
from tandem.repl.settings import adopted, difference, said
from tandem.repl.states import ConnState
from tandem.repl.wire import DP_SEND_WRITE_ACK, Packet, Protocol, pack_data

from tests.scenarios.lone import Lone

P = Packet
BLOCK = bytes(range(256)) * 16


def crc(data: bytes) -> bytes:
    algorithm = digest("crc32c")
    assert algorithm is not None
    return algorithm(data)


def change(lone: Lone, **net: object) -> None:
    changed = replace(lone.config, net=replace(lone.config.net, **net))  # type: ignore[arg-type]
    lone.effects.clear()
    lone.handle(Reconfigure(9, changed))
    assert [answer.refusal for answer in lone.of(Answer) if isinstance(answer, Answer)] == [None]


def test_the_peer_hears_of_a_new_algorithm_before_the_first_packet_with_it() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE, 0, 4096)
    lone.settle()
    plain = len(lone.payloads(P.DATA)[0])
    lone.packets.clear()
    change(lone, data_integrity_alg="crc32c")
    lone.submit(Op.WRITE, 8192, 4096)
    lone.settle()
    assert lone.sent(P.PROTOCOL_UPDATE, P.DATA) == [P.PROTOCOL_UPDATE, P.DATA]
    assert Protocol.unpack(lone.payloads(P.PROTOCOL_UPDATE)[0]).integrity_alg == "crc32c"
    assert len(lone.payloads(P.DATA)[-1]) == plain + 4
    assert lone.conn() == ConnState.CONNECTED and not lone.of(Close)
    lone.packets.clear()
    change(lone, data_integrity_alg="crc32c")
    assert lone.sent(P.PROTOCOL_UPDATE) == []  # nothing new


def test_options_that_are_not_shared_are_nobodys_business() -> None:
    lone = Lone().ready()
    change(lone, max_buffers=8000, ping_int=3)
    assert lone.sent(P.PROTOCOL_UPDATE) == []


def test_without_a_connection_nothing_is_sent() -> None:
    lone = Lone()
    lone.attach()
    change(lone, data_integrity_alg="crc32c")
    assert lone.sent(P.PROTOCOL_UPDATE) == []


@pytest.mark.parametrize("fits", [True, False])
def test_the_peers_new_algorithm_counts_from_there_on(fits: bool) -> None:
    lone = Lone().as_secondary()
    update = said(replace(lone.config.net, data_integrity_alg="crc32c")).pack(update=True)
    check = crc(BLOCK) if fits else bytes(4)
    lone.data(
        pack_data(P.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, 4096) + BLOCK,
        update,
        pack_data(P.DATA, 0, 16, 2, 2, DP_SEND_WRITE_ACK, 4096, check) + BLOCK,
    )
    lone.settle()
    assert (lone.conn() == ConnState.CONNECTED) == fits
    assert lone.engine.integrity is None, "our own data has our own algorithm"
    assert len(lone.sent(P.WRITE_ACK)) == 2 * fits
    assert "peer data-integrity-alg: crc32c" in lone.notes()


def test_an_algorithm_nobody_knows_ends_the_connection() -> None:
    lone = Lone().as_secondary()
    lone.data(replace(said(lone.config.net), integrity_alg="rot13").pack(update=True))
    assert lone.conn() != ConnState.CONNECTED
    assert any("rot13 of the peer is unknown here" in note for note in lone.notes())


def test_a_kernel_gets_no_zeroes_by_name_once_there_are_digests() -> None:
    for ours, kind in ((False, P.TRIM), (True, P.ZEROES)):
        lone = Lone().ready(ours=ours)
        change(lone, data_integrity_alg="crc32c")
        lone.submit(Op.ZEROES, 0, 4096)
        lone.settle()
        assert (P.ZEROES in lone.sent()) == ours, kind


def test_what_the_peer_changed_is_adopted() -> None:
    net = NetOptions(protocol="C", after_sb_0pri=AfterSb.DISCONNECT, data_integrity_alg="md5")
    theirs = NetOptions(protocol="A", after_sb_0pri=AfterSb.DISCARD_LOCAL, allow_two_primaries=True)
    new = adopted(net, said(theirs))
    assert (new.protocol, new.after_sb_0pri, new.allow_two_primaries) == ("A", AfterSb.DISCARD_REMOTE, True)
    assert new.data_integrity_alg == "md5"
    assert adopted(net, replace(said(theirs), protocol=9, after_sb_0p=77)).protocol == "C"
    assert difference(replace(new, data_integrity_alg=""), said(theirs)) == ""


def test_a_sentence_names_what_is_not_there() -> None:
    fault = difference(NetOptions(data_integrity_alg="crc32c"), said(NetOptions()))
    assert fault == "incompatible data-integrity-alg: crc32c here, none on the peer; make the configurations equal"
