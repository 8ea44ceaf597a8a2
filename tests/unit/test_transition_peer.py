"""State changes between two nodes: the peer's requests, which changes ask the peer, and how a refusal reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl.errors import PeerProtocolError, Refusal
from tandem.repl.states import State
from tandem.repl.transition import apply_mask, convert_request, needs_agreement, peer_request, refusal, refused_by_peer

from tests.node_states import (
    ALONE,
    CON,
    FACTS,
    FAILED,
    GOOD,
    INC,
    LESS,
    OUT,
    PRIMARY,
    RESOURCE_ONLY,
    UNK,
    UP,
    VERIFY,
    C,
    P,
    S,
    U,
    words,
)

# --------------------------------------------------------------------------------- the peer's requests

REQUESTS = [  # mask, val as seen on the wire, and both from the receiver's point of view
    ("promotion", 0x003, 0x001, 0x00C, 0x004),
    ("forced promotion", 0x1E03, 0x1001, 0x1E00C, 0x10004),
    ("detach", 0x1E00, 0x0400, 0x1E000, 0x4000),
    ("VerifyS", 0x1F0, 0x120, 0x1F0, 0x130),
    ("StartingSyncT", 0x1F0, 0x0C0, 0x1F0, 0x0B0),
    ("StartingSyncS", 0x1F0, 0x0B0, 0x1F0, 0x0C0),
    ("disconnect", 0x1F0, 0x010, 0x1F0, 0x070),
    ("disconnect, outdate me", 0x1FF0, 0x0A10, 0x1E1F0, 0xA070),
    ("disconnect, outdate you", 0x1E1F0, 0xA010, 0x1FF0, 0x0A70),
    ("volume removal", 0x1F0, 0x090, 0x1F0, 0x090),
    ("anything else", 0x1F0, 0x100, 0x1F0, 0x000),
    ("pauses", 0x140000, 0x040000, 0x080000, 0x080000),
    ("no pause", 0x140000, 0x000000, 0x080000, 0x000000),
    ("our suspension is ours", 0x620000, 0x620000, 0, 0),
]


@pytest.mark.parametrize(("_what", "mask", "val", "our_mask", "our_val"), REQUESTS)
def test_convert_request(_what: str, mask: int, val: int, our_mask: int, our_val: int) -> None:
    assert convert_request(mask, val) == (our_mask, our_val)


def test_apply_mask_takes_only_what_is_under_the_mask() -> None:
    assert apply_mask(GOOD, 0x3, 0x1) == PRIMARY
    assert apply_mask(GOOD, 0x3, 0xFFFFFFFD) == PRIMARY
    assert apply_mask(GOOD, 0, 0xFFFFFFFF) == GOOD


@pytest.mark.parametrize(("mask", "val"), [(0x3, 0x3), (0x1F0, 0x180), (0x1E00, 0x1E00), (0x1E000, 0x12000)])
def test_apply_mask_refuses_numbers_nobody_knows(mask: int, val: int) -> None:
    with pytest.raises(PeerProtocolError, match="unknown state"):
        apply_mask(GOOD, mask, val)


def test_peer_promotes() -> None:
    assert peer_request(GOOD, 0x3, 0x1, FACTS) == replace(GOOD, peer=P)
    refused = peer_request(PRIMARY, 0x3, 0x1, FACTS)
    assert isinstance(refused, Refusal) and refused.code == -1


def test_peer_detaches_unless_its_data_is_the_last() -> None:
    assert peer_request(GOOD, 0x1E00, 0x400, FACTS) == replace(GOOD, pdsk=FAILED)
    needy = State(P, S, C.CONNECTED, LESS, UP)
    refused = peer_request(needy, 0x1E00, 0x400, FACTS)
    assert isinstance(refused, Refusal) and refused.code == -2


def test_peer_disconnects_from_a_fencing_primary() -> None:
    """Refused with -7 first; agreed to when the peer offers to be Outdated."""
    refused = peer_request(PRIMARY, 0x1F0, 0x010, RESOURCE_ONLY, connection=True)
    assert isinstance(refused, Refusal) and refused.code == -7
    agreed = peer_request(PRIMARY, 0x1FF0, 0xA10, RESOURCE_ONLY, connection=True)
    assert agreed == State(P, U, C.TEAR_DOWN, UP, OUT)


def test_peer_disconnects_and_outdates_us() -> None:
    assert peer_request(GOOD, 0x1E1F0, 0xA010, FACTS, connection=True) == State(S, U, C.TEAR_DOWN, OUT, UNK)
    worse = replace(GOOD, disk=INC)
    assert peer_request(worse, 0x1E1F0, 0xA010, FACTS, connection=True) == State(S, U, C.TEAR_DOWN, INC, UNK)
    refused = peer_request(worse, 0x1E1F0, 0xA010, FACTS)
    assert isinstance(refused, Refusal) and refused.code == -16, "not so for a request about one volume"


def test_peer_starts_verify_and_full_syncs() -> None:
    verifying = peer_request(GOOD, 0x1F0, 0x120, VERIFY)
    assert isinstance(verifying, State) and verifying.conn is C.VERIFY_T
    invalidated = peer_request(GOOD, 0x1F0, 0x0B0, FACTS)
    assert isinstance(invalidated, State) and words(invalidated) == (C.STARTING_SYNC_T, OUT, UP)
    source = peer_request(GOOD, 0x1F0, 0x0C0, FACTS)
    assert isinstance(source, State) and words(source) == (C.STARTING_SYNC_S, UP, CON)


@pytest.mark.parametrize("val", [0x000, 0x100, 0x110, 0x170, 0x1F0])
def test_peer_asks_for_a_connection_state_that_is_not_for_asking(val: int) -> None:
    refused = peer_request(GOOD, 0x1F0, val, FACTS)
    assert isinstance(refused, Refusal) and refused.code == -17


# -------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(("old", "changes", "asks"), [
    (GOOD, {"role": P}, True), (PRIMARY, {"role": S}, False), (PRIMARY, {"peer": P}, False),
    (GOOD, {"conn": C.STARTING_SYNC_T}, True), (GOOD, {"conn": C.STARTING_SYNC_S}, True),
    (replace(GOOD, conn=C.STARTING_SYNC_S), {"conn": C.SYNC_SOURCE}, False),
    (replace(GOOD, conn=C.STARTING_SYNC_S), {"user_isp": True}, False),
    (GOOD, {"disk": FAILED}, True), (replace(GOOD, disk=FAILED), {"disk": LESS}, False),
    (replace(GOOD, disk=FAILED), {"user_isp": True}, False),
    (GOOD, {"conn": C.DISCONNECTING}, True),
    (replace(GOOD, conn=C.SYNC_SOURCE), {"conn": C.DISCONNECTING}, True),
    (GOOD, {"conn": C.TEAR_DOWN}, False), (GOOD, {"conn": C.NETWORK_FAILURE, "role": P}, False),
    (GOOD, {"conn": C.VERIFY_S}, True), (GOOD, {"conn": C.VERIFY_T}, False),
    (replace(GOOD, conn=C.WF_BITMAP_S), {"conn": C.VERIFY_S}, False),
    (GOOD, {"conn": C.WF_REPORT_PARAMS}, True),
    (replace(GOOD, conn=C.VERIFY_S), {"conn": C.WF_REPORT_PARAMS}, False),
    (GOOD, {"user_isp": True}, False),
    (ALONE, {"role": P}, False), (ALONE, {"disk": FAILED}, False),
    (replace(ALONE, conn=C.WF_CONNECTION), {"conn": C.DISCONNECTING}, False),
    (replace(ALONE, conn=C.WF_REPORT_PARAMS), {"conn": C.CONNECTED, "role": P}, False),
])  # fmt: skip
def test_needs_agreement(old: State, changes: dict[str, object], asks: bool) -> None:
    assert needs_agreement(old, replace(old, **changes)) is asks  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("code", [-1, -2, *range(-21, -3)])
def test_every_code_has_a_sentence_and_a_hint(code: int) -> None:
    r = refusal(code, "more")
    assert r.code == code and r.info == ("more",)
    assert r.text and r.hint and not r.text.endswith(".") and not r.hint.endswith(".")
    assert r.exit_code == {-2: 17, -4: 16, -16: 5}.get(code, 11)


def test_refusals_in_the_words_of_drbdsetup() -> None:
    assert refusal(-2).text == "Need access to UpToDate data"
    assert refusal(-2).hint == "Promote where the data is, or repeat with --force to accept this node's data"
    assert refusal(-12).text == "Device is held open by someone"
    assert refusal(-18).text == "In transient state, retry after next state change"


def test_a_refusal_by_the_peer_names_the_peers_reason() -> None:
    r = refused_by_peer(-2)
    assert (r.code, r.text) == (-10, "State change was refused by peer node")
    assert r.info == ("peer: (-2) Need access to UpToDate data",)
    assert refused_by_peer(-77).info == ("peer: (-77) unknown reason",)
