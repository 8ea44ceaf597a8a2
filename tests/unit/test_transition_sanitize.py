"""State words, and what sanitize makes of a wish: each of its steps, and that once is enough."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.transition import Facts, change, possible, sanitize

from tests.node_states import (
    ATT,
    CON,
    FACTS,
    FAILED,
    GOOD,
    INC,
    LESS,
    NEG,
    OUT,
    PRIMARY,
    RESOURCE_ONLY,
    STONITH,
    UNK,
    UP,
    C,
    D,
    P,
    S,
    U,
    words,
)

# ------------------------------------------------------------------------------------- state words


@pytest.mark.parametrize(("word", "state"), [
    (0x000110A9, State(P, S, C.CONNECTED, UP, UP)),
    (0x000110A6, State(S, P, C.CONNECTED, UP, UP)),
    (0x000110AA, State(S, S, C.CONNECTED, UP, UP)),
    (0x00010AE6, State(S, P, C.WF_BITMAP_T, OUT, UP)),
    (0x0000F0D9, State(P, S, C.WF_BITMAP_S, UP, CON)),
    (0x0000F0D6, State(S, P, C.WF_BITMAP_S, UP, CON)),
    (0x0000C882, State(S, U, C.WF_CONNECTION, INC, UNK)),
    (0x000088AA, State(S, S, C.CONNECTED, INC, INC)),
    (0x000090A9, State(P, S, C.CONNECTED, UP, INC)),
    (0x000108E6, State(S, P, C.WF_BITMAP_T, INC, UP)),
    (0x0000D081, State(P, U, C.WF_CONNECTION, UP, UNK)),
    (0x000104A9, State(P, S, C.CONNECTED, FAILED, UP)),
    (0x000100A9, State(P, S, C.CONNECTED, LESS, UP)),
    (0x000106A9, State(P, S, C.CONNECTED, NEG, UP)),
    (0x0040D081, State(P, U, C.WF_CONNECTION, UP, UNK, susp_fen=True)),
    (0x00109149, State(P, S, C.PAUSED_SYNC_S, UP, INC, user_isp=True)),
])  # fmt: skip
def test_state_words(word: int, state: State) -> None:
    assert State.from_word(word) == state
    assert state.word() == word


# --------------------------------------------------------------------------------- sanitize, step 1-9


@pytest.mark.parametrize(("pdsk", "kept"), [
    (UP, UNK), (CON, UNK), (UNK, UNK), (OUT, OUT), (INC, INC), (NEG, UNK), (FAILED, UNK), (LESS, UNK),
])  # fmt: skip
@pytest.mark.parametrize("conn", [conn for conn in C if conn < C.CONNECTED])
def test_step_1_what_is_remembered_without_a_connection(
    conn: ConnState, pdsk: DiskState, kept: DiskState
) -> None:
    old = State(P, S, C.PAUSED_SYNC_S, UP, pdsk, peer_isp=True)
    assert sanitize(old, replace(old, conn=conn), FACTS) == State(P, U, conn, UP, kept)


def test_step_2_dependency_pause_is_cleared_when_unconfigured() -> None:
    bare = State(S, U, C.STAND_ALONE, LESS, UNK, aftr_isp=True)
    assert not sanitize(bare, bare, FACTS).aftr_isp
    for other in (replace(bare, role=P), replace(bare, disk=OUT), replace(bare, conn=C.UNCONNECTED)):
        assert sanitize(other, other, FACTS).aftr_isp


@pytest.mark.parametrize("conn", [conn for conn in C if conn > C.CONNECTED])
@pytest.mark.parametrize("disk", [LESS, ATT, FAILED])
def test_step_3_no_resync_without_both_disks(conn: ConnState, disk: DiskState) -> None:
    old = State(S, P, conn, UP, UP)
    assert words(sanitize(old, replace(old, disk=disk), FACTS)) == (C.CONNECTED, disk, UP)
    assert words(sanitize(old, replace(old, pdsk=disk), FACTS)) == (C.CONNECTED, UP, disk)


def test_step_4_connection_lost_while_negotiating() -> None:
    old = State(P, S, C.CONNECTED, NEG, UP)
    lost = replace(old, conn=C.NETWORK_FAILURE)
    found = Facts(found_disk=CON, found_pdsk=OUT)
    assert words(sanitize(old, lost, found)) == (C.NETWORK_FAILURE, CON, OUT)
    assert words(sanitize(old, lost, replace(found, found_pdsk=None))) == (C.NETWORK_FAILURE, CON, UNK)
    foreign = replace(found, exposed_is_attached=False)
    assert words(sanitize(old, lost, foreign)) == (C.NETWORK_FAILURE, LESS, UNK)
    assert sanitize(old, old, found).disk is NEG, "the peer has not decided yet"


@pytest.mark.parametrize("disk", [CON, OUT])
def test_step_5_with_a_peer_at_hand_nobody_is_only_consistent(disk: DiskState) -> None:
    old = State(S, U, C.WF_REPORT_PARAMS, disk, UNK)
    assert words(sanitize(old, State(S, S, C.CONNECTED, disk, disk), FACTS)) == (C.CONNECTED, UP, UP)
    assert sanitize(old, old, FACTS).disk is disk
    ahead = State(P, S, C.AHEAD, UP, CON)
    assert sanitize(ahead, ahead, FACTS).pdsk is CON, "not in Ahead and Behind"


# conn: (lowest disk, highest disk), (lowest pdsk, highest pdsk)
LIMITS = {
    C.CONNECTED: ((LESS, UP), (LESS, UP)),
    C.STARTING_SYNC_S: ((UP, UP), (INC, CON)), C.WF_BITMAP_S: ((UP, UP), (INC, CON)),
    C.PAUSED_SYNC_S: ((UP, UP), (INC, CON)), C.AHEAD: ((UP, UP), (INC, CON)),
    C.STARTING_SYNC_T: ((INC, OUT), (UP, UP)), C.WF_BITMAP_T: ((INC, OUT), (UP, UP)),
    C.WF_SYNC_UUID: ((INC, OUT), (UP, UP)), C.PAUSED_SYNC_T: ((INC, OUT), (UP, UP)),
    C.BEHIND: ((INC, OUT), (UP, UP)), C.VERIFY_S: ((UP, UP), (UP, UP)), C.VERIFY_T: ((UP, UP), (UP, UP)),
    C.SYNC_SOURCE: ((UP, UP), (INC, INC)), C.SYNC_TARGET: ((INC, INC), (UP, UP)),
}  # fmt: skip


@pytest.mark.parametrize("conn", LIMITS)
def test_step_6_limits_by_connection_state(conn: ConnState) -> None:
    for disk in range(NEG, UP + 1):
        for pdsk in range(NEG, UP + 1):
            paused = conn in (C.PAUSED_SYNC_S, C.PAUSED_SYNC_T)
            wish = State(S, S, conn, D(disk), D(pdsk), user_isp=paused)
            done = sanitize(wish, wish, FACTS)
            (low, high), (p_low, p_high) = LIMITS[conn]
            assert done.conn is conn
            assert low <= done.disk <= high and p_low <= done.pdsk <= p_high


def test_step_6_seen_on_the_wire() -> None:
    """The target shows itself as Outdated, the source shows the peer as Consistent."""
    target = State(S, U, C.WF_REPORT_PARAMS, UP, UNK)
    assert sanitize(target, State(S, P, C.WF_BITMAP_T, UP, UP), FACTS).word() == 0x00010AE6
    source = State(P, U, C.WF_REPORT_PARAMS, UP, UNK)
    assert sanitize(source, State(P, S, C.WF_BITMAP_S, UP, UP), FACTS).word() == 0x0000F0D9
    assert sanitize(target, State(S, P, C.WF_BITMAP_T, INC, UP), FACTS).word() == 0x000108E6
    attaching = State(P, S, C.CONNECTED, NEG, UP)
    assert sanitize(attaching, replace(attaching, conn=C.WF_BITMAP_T), FACTS).disk is INC


def test_step_7_io_freezes_when_a_fencing_primary_loses_its_peer() -> None:
    lost = replace(PRIMARY, conn=C.NETWORK_FAILURE)
    assert sanitize(PRIMARY, lost, STONITH).susp_fen
    assert not sanitize(PRIMARY, lost, RESOURCE_ONLY).susp_fen
    assert not sanitize(GOOD, replace(lost, role=S), STONITH).susp_fen
    assert not sanitize(PRIMARY, replace(lost, pdsk=OUT), STONITH).susp_fen
    already = State(P, U, C.WF_CONNECTION, UP, UNK)
    assert not sanitize(already, replace(already, user_isp=True), STONITH).susp_fen, "only on becoming"
    diskless = replace(PRIMARY, disk=LESS)
    assert not sanitize(diskless, replace(diskless, conn=C.TIMEOUT), STONITH).susp_fen, "policy of the disk"


def test_step_8_io_freezes_without_data() -> None:
    suspend = Facts(suspend_on_no_data=True)
    diskless = State(P, S, C.CONNECTED, LESS, UP)
    assert sanitize(diskless, replace(diskless, conn=C.TIMEOUT), suspend).susp_nod
    assert not sanitize(diskless, replace(diskless, conn=C.TIMEOUT), FACTS).susp_nod
    assert not sanitize(PRIMARY, replace(PRIMARY, conn=C.TIMEOUT), suspend).susp_nod
    gone = State(P, U, C.WF_CONNECTION, LESS, UNK)
    assert not sanitize(gone, replace(gone, conn=C.WF_REPORT_PARAMS), suspend).susp_nod, "only on becoming"


@pytest.mark.parametrize("flag", ["aftr_isp", "peer_isp", "user_isp"])
@pytest.mark.parametrize(("running", "paused", "disk", "pdsk"), [
    (C.SYNC_SOURCE, C.PAUSED_SYNC_S, UP, INC), (C.SYNC_TARGET, C.PAUSED_SYNC_T, INC, UP),
])  # fmt: skip
def test_step_9_pause_and_resume(
    flag: str, running: ConnState, paused: ConnState, disk: DiskState, pdsk: DiskState
) -> None:
    old = State(P, S, running, disk, pdsk)
    stopped = sanitize(old, replace(old, **{flag: True}), FACTS)  # type: ignore[arg-type]
    assert words(stopped) == (paused, disk, pdsk)
    assert sanitize(stopped, replace(stopped, **{flag: False}), FACTS) == old  # type: ignore[arg-type]


STATES = st.builds(
    State, st.sampled_from(Role), st.sampled_from(Role), st.sampled_from(C), st.sampled_from(D),
    st.sampled_from(D), *[st.booleans()] * 6,
)  # fmt: skip
FOUND = st.sampled_from([None, INC, OUT, CON, UP])
ALL_FACTS = st.builds(
    Facts, fencing=st.sampled_from(Fencing), two_primaries=st.booleans(), is_open=st.booleans(),
    verify_alg=st.booleans(), apv=st.sampled_from([86, 101]), peer_primary_elsewhere=st.booleans(),
    found_disk=FOUND, found_pdsk=st.sampled_from([None, OUT, UNK]), exposed_is_attached=st.booleans(),
    suspend_on_no_data=st.booleans(), handshake_in_progress=st.booleans(),
)  # fmt: skip


@settings(max_examples=300)
@given(STATES, STATES, ALL_FACTS)
def test_sanitize_twice_is_sanitize_once(old: State, new: State, facts: Facts) -> None:
    once = sanitize(old, new, facts)
    assert sanitize(old, once, facts) == once


@settings(max_examples=300)
@given(STATES, STATES, ALL_FACTS, st.booleans())
def test_change_is_total_and_what_it_permits_stays(old: State, new: State, facts: Facts, hard: bool) -> None:
    result = change(old, new, facts, hard=hard)
    if isinstance(result, Refusal):
        assert result.code < 0 and result.text and result.hint
    elif result != old:
        assert sanitize(old, result, facts) == result
        assert possible(old, result) == 1
        assert sanitize(result, result, replace(facts, found_disk=None)) == result, "a fixed point"
