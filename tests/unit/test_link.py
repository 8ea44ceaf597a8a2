"""One connection: what the handshake demands, which packet may come when, and what any other bytes cost."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tandem.repl.config import AfterSb
from tandem.repl.digests import digest, hmac_response
from tandem.repl.events import Close, Connect, LinkFailed, LinkLost, LinkUp
from tandem.repl.link import CHALLENGE_LEN, PROTOCOL_MAX, PROTOCOL_MIN, Stage
from tandem.repl.requests import DATA, META, Op
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import (
    DP_FLUSH,
    DP_SEND_WRITE_ACK,
    HEADER,
    HEADER80,
    HEADER100,
    ID_SYNCER,
    MAGIC,
    Features,
    Packet,
    pack_ack,
    pack_barrier,
    pack_barrier_ack,
    pack_block_desc,
    pack_block_req,
    pack_data,
    pack_state,
    pack_state_change,
    pack_state_reply,
    pack_sync_uuid,
    pack_trim,
    packet,
    packet80,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone

P = Packet
SECRET = {"cram_hmac_alg": "sha256", "shared_secret": "cuckoo"}


def linked(**how: object) -> Lone:
    """Attached, and the sockets stand; nothing was received yet."""
    lone = Lone(**how)  # type: ignore[arg-type]
    lone.attach()
    assert lone.run("connect") == "done"
    lone.forget_keep_connect()
    lone.link()
    return lone


def why(lone: Lone) -> str:
    """Why the connection went to StandAlone."""
    assert lone.conn() == ConnState.STAND_ALONE, lone.notes()
    return next(note for note in lone.notes() if note.startswith("going StandAlone"))


# -------------------------------------------------------------------------------------------- versions


def test_the_features_come_first_and_alone() -> None:
    lone = linked()
    assert lone.sent() == [P.CONNECTION_FEATURES]
    offer = Features.unpack(lone.payloads(P.CONNECTION_FEATURES)[0])
    assert (offer.protocol_min, offer.protocol_max) == (PROTOCOL_MIN, PROTOCOL_MAX) and offer.flags == 15


def test_parameters_follow_in_their_order_and_the_state_is_the_old_one() -> None:
    lone = linked(n_volumes=2)
    lone.data(lone.features())
    per_volume = [P.SYNC_PARAM89, P.SIZES, P.UUIDS, P.STATE]
    assert lone.sent() == [P.CONNECTION_FEATURES, P.PROTOCOL, *per_volume, *per_volume]
    assert [volume for _, _, volume, _ in lone.packets][2:] == [0] * 4 + [1] * 4
    word = int.from_bytes(lone.payloads(P.STATE)[0], "big")
    assert word >> 4 & 31 == ConnState.WF_CONNECTION and lone.conn() == ConnState.WF_REPORT_PARAMS


def test_a_diskless_node_has_no_uuids_to_tell() -> None:
    lone = Lone(diskless=True)
    lone.run("connect")
    lone.link()
    lone.data(lone.features())
    assert P.UUIDS not in lone.sent()


@pytest.mark.parametrize(("low", "high", "agreed"), [(86, 101, 101), (100, 100, 100), (86, 200, 101), (101, 0, 101)])
def test_the_highest_common_version_is_spoken(low: int, high: int, agreed: int) -> None:
    lone = linked()
    lone.data(lone.features(low=low, high=high))
    assert lone.engine.link.apv == agreed and lone.conn() == ConnState.WF_REPORT_PARAMS


@pytest.mark.parametrize(("low", "high"), [(86, 99), (102, 120), (110, 0)])
def test_without_a_common_version_it_ends(low: int, high: int) -> None:
    lone = linked()
    lone.data(lone.features(low=low, high=high))
    assert "upgrade the older one" in why(lone)


def test_anything_but_features_is_not_drbd() -> None:
    lone = linked()
    lone.data(packet80(P.INITIAL_DATA))
    assert "expected the peer's features" in why(lone)
    lone = linked()
    lone.data(b"GET / HTTP/1.1\r\n\r\n")
    assert lone.closed and lone.conn() == ConnState.WF_CONNECTION, "tried again, perhaps it was a port scan"


def test_features_with_the_integrity_alg_leave_zeroes_out() -> None:
    lone = linked(net={"data_integrity_alg": "crc32c"})
    assert Features.unpack(lone.payloads(P.CONNECTION_FEATURES)[0]).flags == 7


# ---------------------------------------------------------------------------------------- authentication


def challenged() -> tuple[Lone, bytes]:
    """A node that has sent its challenge."""
    lone = linked(net=SECRET)
    lone.data(lone.features())
    assert lone.sent() == [P.CONNECTION_FEATURES, P.AUTH_CHALLENGE], "no parameter before the peer is known"
    return lone, lone.payloads(P.AUTH_CHALLENGE)[0]


def test_each_side_answers_the_others_challenge() -> None:
    lone, ours = challenged()
    assert len(ours) == CHALLENGE_LEN
    theirs = bytes(range(64))
    lone.data(packet(P.AUTH_CHALLENGE, theirs))
    assert lone.payloads(P.AUTH_RESPONSE) == [hmac_response("sha256", "cuckoo", theirs)]
    assert P.PROTOCOL not in lone.sent()
    lone.data(packet(P.AUTH_RESPONSE, hmac_response("sha256", "cuckoo", ours)))
    assert P.PROTOCOL in lone.sent() and lone.conn() == ConnState.WF_REPORT_PARAMS


def test_a_wrong_secret_ends_it_and_tells_nothing() -> None:
    lone, ours = challenged()
    lone.data(packet(P.AUTH_CHALLENGE, bytes(64)))
    lone.data(packet(P.AUTH_RESPONSE, hmac_response("sha256", "nightingale", ours)))
    assert "shared-secret" in why(lone) and P.PROTOCOL not in lone.sent()


def test_our_own_challenge_reflected_is_refused() -> None:
    lone, ours = challenged()
    lone.data(packet(P.AUTH_CHALLENGE, ours))
    assert "our own challenge" in why(lone) and P.AUTH_RESPONSE not in lone.sent()


@pytest.mark.parametrize("length", [0, 63, 129])
def test_a_challenge_of_a_wrong_length_is_refused(length: int) -> None:
    lone, _ = challenged()
    lone.data(packet(P.AUTH_CHALLENGE, bytes(length)))
    assert lone.closed and P.AUTH_RESPONSE not in lone.sent()


def test_a_peer_without_authentication_is_refused() -> None:
    lone, _ = challenged()
    lone.data(lone.protocol())
    assert "cram-hmac-alg" in why(lone)


def test_an_authenticating_peer_is_told_apart_from_a_broken_one() -> None:
    lone = linked()
    lone.data(lone.features(), packet(P.AUTH_CHALLENGE, bytes(64)))
    assert any("wants authentication" in note for note in lone.notes())


# --------------------------------------------------------------------------------------- equal parameters


@pytest.mark.parametrize(("fields", "option"), [
    ({"protocol": 1}, "protocol"),
    ({"after_sb_0p": AfterSb.DISCARD_ZERO_CHANGES}, "after-sb-0pri"),
    ({"after_sb_1p": AfterSb.CONSENSUS}, "after-sb-1pri"),
    ({"after_sb_2p": AfterSb.CALL_PRI_LOST_AFTER_SB}, "after-sb-2pri"),
    ({"two_primaries": 1}, "allow-two-primaries"),
    ({"integrity_alg": "md5"}, "data-integrity-alg"),
    ({"protocol": 77}, "protocol"),
    ({"after_sb_0p": 99}, "after-sb-0pri"),
])  # fmt: skip
def test_a_difference_that_matters_ends_in_stand_alone(fields: dict[str, object], option: str) -> None:
    lone = linked()
    lone.data(lone.features(), lone.protocol(**fields))
    assert f"incompatible {option}:" in why(lone)


def test_discard_local_here_is_discard_remote_there() -> None:
    lone = linked(net={"after_sb_0pri": AfterSb.DISCARD_LOCAL})
    lone.data(lone.features(), lone.protocol(after_sb_0p=AfterSb.DISCARD_REMOTE))
    assert lone.conn() == ConnState.WF_REPORT_PARAMS


def test_both_discarding_their_data_is_refused() -> None:
    lone = Lone()
    lone.attach()
    lone.run("connect", discard_my_data=True)
    lone.link()
    lone.data(lone.features(), lone.protocol(conn_flags=1))
    assert "both nodes" in why(lone)


def test_parameters_before_the_protocol_are_an_error() -> None:
    lone = linked()
    lone.data(lone.features(), lone.parameters())
    assert lone.closed and any("before P_PROTOCOL" in note for note in lone.notes())


def test_parameters_of_a_volume_we_do_not_have_are_ignored() -> None:
    lone = linked()
    lone.data(lone.features(), lone.protocol(), lone.parameters(), lone.parameters(volume=5))
    assert lone.conn() == ConnState.CONNECTED


def test_other_packets_for_a_volume_we_do_not_have_are_an_error() -> None:
    lone = Lone().ready()
    lone.data(pack_data(P.DATA, 7, 0, 1, 1, DP_SEND_WRITE_ACK, 512) + bytes(512))
    assert lone.closed and lone.conn() == ConnState.WF_CONNECTION


def test_meta_packets_that_come_early_wait() -> None:
    """The peer may be in the exchange of packets while our parameters are not sent yet."""
    lone = linked()
    lone.meta(packet(P.PING))
    assert lone.sent(P.PING_ACK) == []
    lone.data(lone.features())
    assert lone.sent(P.PING_ACK) == [P.PING_ACK]


def test_the_handshake_has_a_time_limit() -> None:
    lone = linked()
    lone.at(lone.now + 2.1)
    assert lone.closed and any("stalled" in note for note in lone.notes())
    n = len(lone.of(Connect))
    lone.at(lone.now + 1.1)
    assert len(lone.of(Connect)) == n + 1, "tried again after a moment"


# ------------------------------------------------------------------------------------------ stale answers


def test_an_old_link_up_changes_nothing() -> None:
    lone = linked()
    lone.data(lone.features(), lone.protocol(), lone.parameters())
    old = lone.engine.link.ticket
    lone.handle(LinkLost(old, "gone"))
    lone.settle()
    lone.packets.clear()
    state, stage = lone.state, lone.engine.link.stage
    lone.handle(LinkUp(old, False))
    assert lone.sent() == [] and lone.state == state and lone.engine.link.stage is stage


@pytest.mark.parametrize("event", [LinkLost(1, "old"), LinkLost(1, "old", meta=True), LinkFailed(1, "old")])
def test_an_old_loss_changes_nothing(event: LinkLost | LinkFailed) -> None:
    lone = Lone().ready()
    assert event.ticket != lone.engine.link.ticket
    lone.handle(event)
    assert lone.conn() == ConnState.CONNECTED and not lone.closed


def test_a_link_up_after_disconnect_is_ignored() -> None:
    lone = Lone()
    lone.attach()
    lone.run("connect")
    ticket = lone.of(Connect)[-1].ticket
    lone.run("disconnect")
    assert [c.ticket for c in lone.of(Close)] == [ticket]
    lone.handle(LinkUp(ticket, False))
    assert lone.sent() == [] and lone.engine.link.stage is Stage.DOWN


def test_no_link_is_possible_means_stand_alone() -> None:
    lone = Lone()
    lone.attach()
    lone.run("connect")
    lone.handle(LinkFailed(lone.of(Connect)[-1].ticket, "cannot bind 10.0.0.1:7788"))
    assert "cannot bind" in why(lone)


# ----------------------------------------------------------------------------- what the peer may not send


def ends_in_protocol_error(lone: Lone) -> None:
    assert lone.closed and lone.conn() == ConnState.WF_CONNECTION
    assert any("ProtocolError" in note for note in lone.notes()), lone.notes()
    assert not [op for op in lone.disk if op.op != Op.FLUSH and op.area == DATA]


@pytest.mark.parametrize("bad", [
    pytest.param(pack_data(P.DATA, 0, 1 << 40, 1, 1, 0, 512) + bytes(512), id="beyond the end"),
    pytest.param(pack_data(P.DATA, 0, 2**64 - 1, 1, 1, 0, 512) + bytes(512), id="a sector that wraps"),
    pytest.param(pack_data(P.DATA, 0, 0, 1, 1, 0, 100) + bytes(100), id="half a sector"),
    pytest.param(pack_data(P.DATA, 0, 0, 1, 1, 0, 0), id="empty without the flush flag"),
    pytest.param(pack_data(P.DATA, 0, 0, 1, 1, 0, 2 << 20), id="too large"),
    pytest.param(pack_data(P.DATA_REPLY, 0, 0, 1, 0, 0, 512) + bytes(512), id="a reply nobody asked for"),
    pytest.param(pack_data(P.RS_DATA_REPLY, 0, 0, 1, 0, 0, 512) + bytes(512), id="resync data nobody asked for"),
    pytest.param(pack_trim(P.TRIM, 0, 0, 1, 1, 0, 1 << 28), id="a trim above the limit"),
    pytest.param(pack_trim(P.ZEROES, 0, 130992 - 8, 1, 1, 0, 8192), id="zeroes beyond the end"),
    pytest.param(pack_block_req(P.DATA_REQUEST, 0, 0, 1, 2 << 20), id="a read above 1 MiB"),
    pytest.param(pack_block_req(P.DATA_REQUEST, 0, 0, 1, 0), id="a read of nothing"),
    pytest.param(pack_block_req(P.RS_DATA_REQUEST, 0, 1 << 40, 1, 512), id="a resync read beyond the end"),
    pytest.param(pack_block_desc(P.OUT_OF_SYNC, 0, 1 << 50, 512), id="out of sync beyond the end"),
    pytest.param(pack_state(0xFFFF_FFFF, 0), id="a state nobody knows"),
    pytest.param(packet(P.PING), id="a meta packet on the data socket"),
    pytest.param(packet(P.BECOME_SYNC_TARGET), id="an obsolete packet"),
    pytest.param(packet(P.WSAME, bytes(28)), id="write same, which we do not offer"),
    pytest.param(HEADER100.pack(MAGIC, 0, P.BARRIER, 8, 1) + bytes(8), id="a pad that is not zero"),
    pytest.param(HEADER100.pack(MAGIC ^ 1, 0, P.BARRIER, 8, 0) + bytes(8), id="another magic"),
    pytest.param(packet(P.BARRIER, bytes(4)), id="a barrier that is too short"),
])  # fmt: skip
def test_what_may_not_come_on_the_data_socket(bad: bytes) -> None:
    lone = Lone().as_secondary()
    lone.disk.clear()
    lone.data(bad)
    ends_in_protocol_error(lone)


@pytest.mark.parametrize("bad", [
    pytest.param(pack_ack(P.WRITE_ACK, 0, 0, 99, 4096, 1), id="an ack for a write nobody sent"),
    pytest.param(pack_ack(P.RS_WRITE_ACK, 0, 0, 99, 4096, 1), id="the same, of the resync kind"),
    pytest.param(pack_ack(P.WRITE_ACK, 9, 0, 1, 4096, 1), id="a volume nobody has"),
    pytest.param(pack_ack(P.SUPERSEDED, 0, 0, 1, 4096, 1), id="superseded without two Primaries"),
    pytest.param(pack_barrier_ack(0, 1), id="a barrier ack without a barrier"),
    pytest.param(packet(P.DATA, bytes(24)), id="a data packet on the meta socket"),
    pytest.param(packet(P.PING, b"x"), id="a ping with a payload"),
    pytest.param(HEADER100.pack(MAGIC, 0, P.PING, 0, 7), id="a pad that is not zero"),
])  # fmt: skip
def test_what_may_not_come_on_the_meta_socket(bad: bytes) -> None:
    lone = Lone().ready()
    lone.meta(bad)
    ends_in_protocol_error(lone)


def test_an_ack_for_another_sector_is_a_protocol_error() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(pack_ack(P.WRITE_ACK, 0, 8, r.block_id, 4096, 1))
    assert lone.closed


def test_a_digest_that_does_not_fit_writes_nothing() -> None:
    crc = digest("crc32c")
    assert crc is not None
    lone = Lone(net={"data_integrity_alg": "crc32c"}).as_secondary()
    good = bytes(512)
    lone.data(pack_data(P.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, 512, crc(good)) + good)
    assert len(lone.disk) == 1
    lone.settle()
    lone.data(pack_data(P.DATA, 0, 0, 2, 2, DP_SEND_WRITE_ACK, 512, crc(good)) + b"\1" * 512)
    ends_in_protocol_error(lone)


def test_after_a_protocol_error_the_next_attempt_waits_a_second() -> None:
    lone = Lone().as_secondary()
    lone.data(packet(P.PING))
    lone.settle()
    assert lone.of(Connect) == []
    lone.at(lone.now + 1.0)
    assert len(lone.of(Connect)) == 1


# ----------------------------------------------------------------------------------------------- fuzzing


def valid_packets(data: bool) -> list[bytes]:
    """One of each, as a peer of a connected node may send them."""
    if not data:
        return [
            packet(P.PING), packet(P.PING_ACK), pack_barrier_ack(0, 1), pack_state_reply(1, 0, False),
            pack_state_reply(-10, 0, True),
            *(pack_ack(kind, 0, 8, 3, 4096, 1) for kind in (
                P.RECV_ACK, P.WRITE_ACK, P.RS_WRITE_ACK, P.NEG_ACK, P.NEG_DREPLY, P.NEG_RS_DREPLY,
                P.RS_IS_IN_SYNC, P.RS_CANCEL,
            )),
        ]  # fmt: skip
    states = (
        PEER_SECONDARY, replace(PEER_SECONDARY, role=Role.PRIMARY, conn=ConnState.CONNECTED),
        replace(PEER_SECONDARY, conn=ConnState.WF_BITMAP_T, disk=DiskState.INCONSISTENT),
        replace(PEER_SECONDARY, conn=ConnState.SYNC_SOURCE, disk=DiskState.FAILED),
    )  # fmt: skip
    lone = Lone()
    return [
        pack_data(P.DATA, 0, 8, 1, 1, DP_SEND_WRITE_ACK, 512) + bytes(512),
        pack_data(P.DATA, 0, 0, 2, 2, DP_FLUSH | DP_SEND_WRITE_ACK, 0), pack_barrier(1),
        pack_trim(P.TRIM, 0, 8, 3, 3, DP_SEND_WRITE_ACK, 8192), pack_trim(P.ZEROES, 0, 8, 4, 4, 0, 8192),
        pack_block_req(P.DATA_REQUEST, 0, 8, 5, 4096), pack_block_req(P.RS_DATA_REQUEST, 0, 8, ID_SYNCER, 4096),
        pack_block_req(P.CSUM_RS_REQUEST, 0, 8, ID_SYNCER, 4096, bytes(4)),
        pack_data(P.RS_DATA_REPLY, 0, 8, ID_SYNCER, 0, 0, 4096) + bytes(4096),
        pack_block_desc(P.OUT_OF_SYNC, 0, 8, 4096), pack_block_desc(P.RS_DEALLOCATED, 0, 8, 4096),
        pack_state_change(3, 1, 0, False), pack_state_change(0x1E00, 0x400, 0, False),
        pack_state_change(0x1F0, 0x10, 0, True), pack_state_change(0x1F0, 0xC0, 0, False),
        pack_sync_uuid(0x77, 0), packet(P.COMPRESSED_BITMAP, bytes.fromhex("b27fc51e00")),
        packet(P.BITMAP, bytes(64)), packet(P.UNPLUG_REMOTE), packet(P.DELAY_PROBE, bytes(8)),
        lone.protocol(), lone.parameters(), *(pack_state(s.word(), 0) for s in states),
    ]  # fmt: skip


SITUATIONS = ("secondary", "primary", "target", "source", "handshake")


def situation(which: str) -> Lone:
    match which:
        case "secondary":
            return Lone().as_secondary()
        case "primary":
            return Lone().ready()
        case "target":
            return Lone().target((1, 2), (9, 300))
        case "source":
            return Lone().source((1, 2), (9, 300))
        case _:
            lone = Lone()
            lone.attach()
            lone.run("connect")
            lone.link()
            lone.data(lone.features())
            return lone


def survives(lone: Lone, data: bool, stream: bytes, rng: random.Random) -> None:
    """Feed *stream* in pieces: no exception, every packet framed, every disk operation in its place."""
    if lone.engine.log.inflight == {} and lone.state.role == Role.PRIMARY:
        for i in range(4):
            lone.submit(Op.WRITE, 4096 + i * 8192)
            lone.settle()
    at = 0
    while at < len(stream) and lone.engine.link.alive:
        end = at + rng.choice((1, 7, 16, 40, 500, 5000))
        used = (lone.data if data else lone.meta)(stream[at:end])
        assert 0 <= used <= end - at
        if not used:
            used = (lone.data if data else lone.meta)(stream[at:])
        check_disk(lone)
        if not used:
            break  # an incomplete packet
        at += used
        lone.settle()
    check_disk(lone)
    lone.settle()
    assert lone.conn() in ConnState and (lone.engine.link.alive or lone.conn() <= ConnState.WF_CONNECTION)
    if not lone.engine.link.alive:
        lone.at(lone.now + 2)
        assert lone.conn() in (ConnState.WF_CONNECTION, ConnState.STAND_ALONE)


def check_disk(lone: Lone) -> None:
    for op in lone.disk:
        if op.op == Op.FLUSH:
            continue
        assert op.length > 0 and op.offset % 512 == op.length % 512 == 0
        where = lone.layout
        if op.area == DATA:
            assert op.offset >= 0 and op.offset + op.length <= where.usable, op
        else:
            assert op.area == META and where.usable <= op.offset and op.offset + op.length <= 64 << 20, op


@given(st.sampled_from(SITUATIONS), st.booleans(), st.binary(max_size=200), st.integers(0, 2**32))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_bytes_after_a_connection(which: str, data: bool, noise: bytes, seed: int) -> None:
    survives(situation(which), data, noise, random.Random(seed))


@given(
    st.sampled_from(SITUATIONS), st.booleans(), st.integers(0, 2**32),
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 90), st.integers(0, 255)), max_size=6),
)  # fmt: skip
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_mutated_packets(which: str, data: bool, seed: int, changes: list[tuple[int, int, int]]) -> None:
    rng = random.Random(seed)
    kinds = valid_packets(data)
    chosen = [bytearray(rng.choice(kinds)) for _ in range(8)]
    for i, at, value in changes:
        mutated = chosen[i % len(chosen)]
        mutated[at % len(mutated)] = value
    survives(situation(which), data, b"".join(chosen), rng)


def test_every_valid_packet_alone_in_every_situation() -> None:
    for which in SITUATIONS:
        for data in (True, False):
            for one in valid_packets(data):
                survives(situation(which), data, one, random.Random(1))


@given(st.binary(max_size=120))
@settings(max_examples=60, deadline=None)
def test_random_bytes_instead_of_the_features(noise: bytes) -> None:
    lone = linked()
    survives(lone, True, noise, random.Random(1))
    assert lone.conn() in (ConnState.WF_CONNECTION, ConnState.STAND_ALONE)


# ------------------------------------------------------------------------------------------ how much more


@pytest.mark.parametrize("kind", ["data", "meta"])
def test_needed_names_the_length_of_the_packet_that_begins(kind: str) -> None:
    lone = Lone().ready()
    needed = lone.engine.needed_data if kind == "data" else lone.engine.needed_meta
    whole = pack_data(P.DATA, 0, 0, 1, 1, 0, 4096) if kind == "data" else pack_ack(P.WRITE_ACK, 0, 0, 1, 1, 1)
    total = len(whole) + (4096 if kind == "data" else 0)
    assert needed(memoryview(whole[:3])) == HEADER
    assert needed(memoryview(whole[:HEADER])) == total
    assert needed(memoryview(b"garbage that is no header")) > 25


def test_needed_before_the_features() -> None:
    lone = linked()
    offer = lone.features()
    assert lone.engine.needed_data(memoryview(offer[:2])) == HEADER80
    assert lone.engine.needed_data(memoryview(offer[:20])) == len(offer)
