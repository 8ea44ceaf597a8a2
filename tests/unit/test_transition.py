"""State changes: each row of each table fires where it should and stays silent where it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl import transition
from tandem.repl.config import Fencing
from tandem.repl.errors import PeerProtocolError, Refusal
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.transition import (
    Facts,
    admissible,
    allowed,
    apply_mask,
    change,
    convert_request,
    needs_agreement,
    peer_request,
    possible,
    reasonable,
    refusal,
    refused_by_peer,
    sanitize,
)

C, D = ConnState, DiskState
P, S, U = Role.PRIMARY, Role.SECONDARY, Role.UNKNOWN
UP, INC, OUT, CON, UNK, LESS, FAILED, NEG, ATT = (
    D.UP_TO_DATE, D.INCONSISTENT, D.OUTDATED, D.CONSISTENT, D.D_UNKNOWN, D.DISKLESS, D.FAILED, D.NEGOTIATING,
    D.ATTACHING,
)  # fmt: skip
FACTS = Facts()
TWO = Facts(two_primaries=True)
STONITH = Facts(fencing=Fencing.RESOURCE_AND_STONITH)
RESOURCE_ONLY = Facts(fencing=Fencing.RESOURCE_ONLY)
VERIFY = Facts(verify_alg=True)

GOOD = State(S, S, C.CONNECTED, UP, UP)
PRIMARY = State(P, S, C.CONNECTED, UP, UP)
ALONE = State(S, U, C.STAND_ALONE, UP, UNK)


def words(state: State) -> tuple[object, ...]:
    return state.conn, state.disk, state.pdsk


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


# ------------------------------------------------------------------------------------- A: possible

A_ROWS = [
    (-11, State(disk=LESS), {"disk": FAILED}, {"disk": ATT}),
    (-9, ALONE, {"conn": C.DISCONNECTING}, {"conn": C.UNCONNECTED}),
    (-15, ALONE, {"conn": C.WF_CONNECTION}, {"conn": C.UNCONNECTED}),
    (-15, ALONE, {"conn": C.SYNC_SOURCE}, {"role": P}),
    (-15, replace(ALONE, conn=C.WF_CONNECTION), {"conn": C.CONNECTED}, {"conn": C.WF_REPORT_PARAMS}),
    (-15, replace(ALONE, conn=C.UNCONNECTED), {"conn": C.SYNC_TARGET}, {"conn": C.WF_CONNECTION}),
    (-18, replace(ALONE, conn=C.DISCONNECTING), {"conn": C.UNCONNECTED}, {"conn": C.STAND_ALONE}),
    (-18, replace(ALONE, conn=C.DISCONNECTING), {"conn": C.WF_CONNECTION}, {"role": P}),
] + [
    (-18, replace(ALONE, conn=conn), {"conn": bad}, {"conn": good})
    for conn in (C.TIMEOUT, C.BROKEN_PIPE, C.NETWORK_FAILURE, C.PROTOCOL_ERROR, C.TEAR_DOWN)
    for bad, good in (
        (C.WF_CONNECTION, C.UNCONNECTED), (C.STAND_ALONE, C.DISCONNECTING), (C.WF_REPORT_PARAMS, conn),
    )
]  # fmt: skip


@pytest.mark.parametrize(("code", "old", "bad", "good"), A_ROWS)
def test_test_a(code: int, old: State, bad: dict[str, object], good: dict[str, object]) -> None:
    bad_state, good_state = replace(old, **bad), replace(old, **good)  # type: ignore[arg-type]
    assert possible(old, bad_state) == code
    assert possible(old, good_state) == 1
    for hard in (False, True):
        refused = change(old, bad_state, FACTS, hard=hard)
        assert isinstance(refused, Refusal) and refused.code == code
    assert isinstance(change(old, good_state, FACTS, hard=True), State)


def test_a_lost_connection_is_always_possible() -> None:
    for conn in C:
        if conn >= C.WF_REPORT_PARAMS:
            for reason in (C.TIMEOUT, C.BROKEN_PIPE, C.NETWORK_FAILURE, C.PROTOCOL_ERROR, C.TEAR_DOWN):
                assert possible(State(conn=conn), State(conn=reason)) == 1


# ---------------------------------------------------------------------------------- B: admissible

B_ROWS = [  # code, facts and state that violate the row, then states or facts that do not
    (-1, FACTS, State(P, P, C.CONNECTED, UP, UP), [PRIMARY, State(S, P, C.CONNECTED, UP, UP)], [TWO]),
    (-20, Facts(peer_primary_elsewhere=True), PRIMARY, [GOOD],
     [FACTS, Facts(peer_primary_elsewhere=True, two_primaries=True)]),
    (-12, Facts(is_open=True), GOOD, [PRIMARY], [FACTS]),
    (-2, FACTS, State(P, U, C.WF_CONNECTION, CON, OUT), [State(P, U, C.WF_CONNECTION, UP, OUT)], []),
    (-7, RESOURCE_ONLY, State(P, U, C.WF_CONNECTION, UP, UNK),
     [State(P, U, C.WF_CONNECTION, UP, OUT), PRIMARY], [FACTS]),
    (-7, STONITH, State(P, U, C.STAND_ALONE, UP, UNK), [State(P, U, C.STAND_ALONE, UP, INC)], [FACTS]),
    (-2, FACTS, State(P, S, C.CONNECTED, INC, INC), [State(P, S, C.CONNECTED, INC, UP), PRIMARY], []),
    (-2, FACTS, State(P, S, C.CONNECTED, LESS, FAILED), [State(P, S, C.CONNECTED, UP, FAILED)], []),
    (-4, FACTS, State(S, S, C.WF_BITMAP_T, NEG, UP), [State(S, S, C.WF_BITMAP_T, INC, UP)], []),
    (-5, FACTS, State(S, S, C.WF_BITMAP_S, UP, NEG), [State(S, S, C.WF_BITMAP_S, UP, INC)], []),
    (-2, FACTS, State(S, S, C.SYNC_TARGET, INC, INC), [State(S, S, C.SYNC_TARGET, INC, UP)], []),
    (-6, FACTS, State(S, S, C.CONNECTED, OUT, UP), [State(S, U, C.STAND_ALONE, OUT, UNK), GOOD], []),
    (-6, FACTS, State(S, S, C.SYNC_SOURCE, OUT, UP), [State(S, S, C.WF_BITMAP_T, OUT, UP)], []),
    (-6, FACTS, State(S, S, C.WF_BITMAP_S, OUT, UP), [State(S, S, C.BEHIND, OUT, UP)], []),
    (-6, FACTS, State(S, S, C.PAUSED_SYNC_S, OUT, UP), [State(S, S, C.PAUSED_SYNC_T, OUT, UP)], []),
    (-14, FACTS, State(S, S, C.VERIFY_S, UP, UP), [GOOD], [VERIFY]),
    (-14, FACTS, State(S, S, C.VERIFY_T, UP, UP), [GOOD], [VERIFY]),
    (-17, replace(VERIFY, apv=87), State(S, S, C.VERIFY_S, UP, UP), [GOOD], [replace(VERIFY, apv=88)]),
    (-2, FACTS, State(P, S, C.CONNECTED, CON, CON), [State(P, S, C.CONNECTED, UP, CON)], []),
    (-15, FACTS, State(S, S, C.STARTING_SYNC_S, UP, UNK), [State(S, S, C.STARTING_SYNC_S, UP, INC)], []),
    (-15, FACTS, State(S, S, C.STARTING_SYNC_T, UP, UNK), [State(S, S, C.STARTING_SYNC_T, INC, UP)], []),
    (-6, FACTS, State(S, S, C.CONNECTED, UP, UNK), [State(S, U, C.STAND_ALONE, UP, UNK)], []),
]  # fmt: skip


@pytest.mark.parametrize(("code", "facts", "bad", "good", "helping"), B_ROWS)
def test_test_b(code: int, facts: Facts, bad: State, good: list[State], helping: list[Facts]) -> None:
    assert admissible(bad, facts) == code
    for state in good:
        assert admissible(state, facts) == 1
    for other in helping:
        assert admissible(bad, other) == 1


def test_b_the_first_match_decides() -> None:
    """Two Primaries, and no good disk at all."""
    assert admissible(State(P, P, C.CONNECTED, INC, INC), FACTS) == -1
    assert admissible(State(P, U, C.STAND_ALONE, CON, UNK), STONITH) == -2
    assert admissible(State(P, S, C.WF_BITMAP_T, NEG, INC), FACTS) == -2, "before: no local disk"


def test_b_is_not_asked_of_facts() -> None:
    peer_too = replace(PRIMARY, peer=P)
    refused = change(PRIMARY, peer_too, FACTS)
    assert isinstance(refused, Refusal) and refused.code == -1
    assert change(PRIMARY, peer_too, FACTS, hard=True) == peer_too


def test_b_is_waived_where_the_old_state_violates_it_already() -> None:
    """A Primary without good data anywhere must be able to disconnect, although that is -2 as well."""
    old = State(P, S, C.CONNECTED, INC, INC)
    assert isinstance(change(old, replace(old, conn=C.DISCONNECTING), FACTS), State)
    healthy = State(P, S, C.CONNECTED, INC, UP)
    refused = change(healthy, replace(healthy, conn=C.DISCONNECTING), FACTS)
    assert isinstance(refused, Refusal) and refused.code == -2


def test_fencing_is_the_policy_of_a_usable_local_disk() -> None:
    old = State(P, S, C.CONNECTED, UP, UP)
    refused = change(old, replace(old, conn=C.DISCONNECTING), RESOURCE_ONLY)
    assert isinstance(refused, Refusal) and refused.code == -7
    attaching = State(S, U, C.WF_CONNECTION, ATT, UNK)
    assert isinstance(change(attaching, replace(attaching, role=P, disk=UP), RESOURCE_ONLY), State)


# -------------------------------------------------------------------------------------- C: allowed

PROMOTED = {"role": P}
C_ROWS = [  # code, old, the change that is refused, one that is not
    (-8, State(S, S, C.SYNC_TARGET, INC, UP), {"conn": C.STARTING_SYNC_T}, {"conn": C.CONNECTED}),
    (-8, State(S, S, C.VERIFY_S, UP, UP), {"conn": C.STARTING_SYNC_S}, {"user_isp": True}),
    (-8, State(S, S, C.STARTING_SYNC_S, UP, INC), {"conn": C.STARTING_SYNC_T}, {"user_isp": True}),
    (-9, ALONE, {"conn": C.DISCONNECTING}, {"conn": C.UNCONNECTED}),
    (-11, State(disk=LESS), {"disk": NEG}, {"disk": ATT}),
    (-11, State(disk=LESS), {"disk": UP}, {"disk": LESS}),
    (-13, replace(ALONE, conn=C.DISCONNECTING), {"conn": C.WF_CONNECTION}, {"conn": C.STAND_ALONE}),
    (-16, replace(ALONE, disk=INC), {"disk": OUT}, {"disk": INC}),
    (-16, replace(ALONE, disk=FAILED), {"disk": OUT}, {"disk": LESS}),
    (-18, replace(ALONE, conn=C.UNCONNECTED), {"conn": C.DISCONNECTING}, {"conn": C.WF_CONNECTION}),
    (-18, replace(GOOD, disk=INC), PROMOTED | {"conn": C.SYNC_TARGET}, {"conn": C.SYNC_TARGET}),
    (-18, State(S, P, C.WF_BITMAP_T, OUT, UP), PROMOTED, {"user_isp": True}),
    (-15, State(S, U, C.WF_CONNECTION, UP, UNK), {"conn": C.VERIFY_S}, {"conn": C.WF_REPORT_PARAMS}),
    (-15, State(S, U, C.WF_REPORT_PARAMS, UP, UNK), {"conn": C.VERIFY_T}, {"conn": C.CONNECTED}),
    (-8, State(S, S, C.SYNC_SOURCE, UP, INC), {"conn": C.VERIFY_S}, {"conn": C.PAUSED_SYNC_S}),
    (-8, State(S, S, C.VERIFY_T, UP, UP), {"conn": C.VERIFY_S}, {"user_isp": True}),
    (-15, State(S, U, C.WF_REPORT_PARAMS, UP, UNK), {"conn": C.STARTING_SYNC_S}, {"conn": C.WF_BITMAP_S}),
    (-15, State(S, U, C.WF_CONNECTION, UP, UNK), {"conn": C.STARTING_SYNC_T}, {"conn": C.STAND_ALONE}),
    (-15, State(S, U, C.WF_CONNECTION, UP, UNK), {"conn": C.SYNC_SOURCE}, {"conn": C.STAND_ALONE}),
    (-15, State(S, U, C.WF_CONNECTION, UP, UNK), {"conn": C.SYNC_TARGET}, {"conn": C.STAND_ALONE}),
    (-21, State(P, U, C.WF_CONNECTION, UP, UNK), {"conn": C.DISCONNECTING, "pdsk": OUT},
     {"conn": C.DISCONNECTING}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "old", "bad", "good"), C_ROWS)
def test_test_c(code: int, old: State, bad: dict[str, object], good: dict[str, object]) -> None:
    assert allowed(old, replace(old, **bad), FACTS) == code  # type: ignore[arg-type]
    assert allowed(old, replace(old, **good), FACTS) == 1  # type: ignore[arg-type]


def test_c_outdate_comes_from_attaching_or_better() -> None:
    for disk in (ATT, UNK, CON, UP):
        assert allowed(replace(ALONE, disk=disk), replace(ALONE, disk=OUT), FACTS) == 1


@pytest.mark.parametrize("known", [OUT, INC])
def test_c_disconnecting_with_a_peer_known_to_be_outdated(known: DiskState) -> None:
    old = State(P, U, C.WF_CONNECTION, UP, known)
    assert allowed(old, replace(old, conn=C.DISCONNECTING, pdsk=OUT), FACTS) == 1
    connected = State(P, S, C.CONNECTED, UP, UP)
    assert allowed(connected, replace(connected, conn=C.DISCONNECTING, pdsk=OUT), FACTS) == 1


def test_c_a_handshake_is_left_alone() -> None:
    busy = Facts(handshake_in_progress=True)
    wf, report = State(S, U, C.WF_CONNECTION, UP, UNK), State(S, U, C.WF_REPORT_PARAMS, UP, UNK)
    assert allowed(wf, replace(wf, conn=C.WF_REPORT_PARAMS), busy) == 1
    for conn in (C.CONNECTED, C.WF_BITMAP_S, C.WF_BITMAP_T):
        assert allowed(report, replace(report, conn=conn), busy) == 1
    for old, new in (
        (report, replace(report, role=P)), (report, replace(report, conn=C.DISCONNECTING)),
        (wf, replace(wf, conn=C.DISCONNECTING)), (GOOD, PRIMARY),
    ):  # fmt: skip
        assert allowed(old, new, busy) == -18
        assert allowed(old, new, FACTS) == 1


@pytest.mark.parametrize(("disk", "pdsk", "conn", "code"), [
    (OUT, UP, C.WF_BITMAP_T, -18), (INC, UP, C.WF_SYNC_UUID, -18), (INC, UP, C.CONNECTED, -18),
    (INC, UP, C.SYNC_TARGET, 1), (UP, UP, C.CONNECTED, 1), (LESS, UP, C.CONNECTED, 1),
    (INC, INC, C.CONNECTED, 1),
])  # fmt: skip
def test_c_no_promotion_in_the_middle_of_a_resync_handshake(
    disk: DiskState, pdsk: DiskState, conn: ConnState, code: int
) -> None:
    old = State(S, S, conn, disk, pdsk)
    assert allowed(old, replace(old, role=P), FACTS) == code
    if code != 1:
        already = replace(old, role=P)
        assert allowed(already, replace(already, user_isp=True), FACTS) == 1


def test_c_the_last_match_decides() -> None:
    old = State(S, U, C.UNCONNECTED, UP, UNK)
    assert allowed(old, replace(old, conn=C.DISCONNECTING, pdsk=OUT), FACTS) == -21


# ------------------------------------------------------------------------------- W: reasonable wishes

W_ROWS = [
    (-6, GOOD, {"disk": OUT}, {"disk": OUT, "conn": C.DISCONNECTING}),
    (-6, replace(GOOD, disk=INC), {"disk": OUT}, {"disk": UP}),
    (-4, replace(GOOD, disk=LESS), {"conn": C.STARTING_SYNC_T}, {"role": P}),
    (-4, replace(GOOD, disk=FAILED), {"conn": C.VERIFY_S}, {"disk": LESS}),
    (-5, replace(GOOD, pdsk=LESS), {"conn": C.STARTING_SYNC_S}, {"role": P}),
    (-5, replace(GOOD, pdsk=FAILED), {"conn": C.VERIFY_S}, {"pdsk": LESS}),
    (-2, replace(GOOD, disk=INC), {"conn": C.VERIFY_S}, {"conn": C.STARTING_SYNC_T}),
    (-2, replace(GOOD, pdsk=INC), {"conn": C.VERIFY_T}, {"conn": C.STARTING_SYNC_S}),
    (-2, State(S, S, C.CONNECTED, INC, INC), {"conn": C.STARTING_SYNC_S}, {"role": P, "disk": UP}),
    (-2, State(S, S, C.CONNECTED, UP, INC), {"conn": C.STARTING_SYNC_T}, {"conn": C.STARTING_SYNC_S}),
]  # fmt: skip


@pytest.mark.parametrize(("code", "old", "bad", "good"), W_ROWS)
def test_test_w(code: int, old: State, bad: dict[str, object], good: dict[str, object]) -> None:
    wish = replace(old, **bad)  # type: ignore[arg-type]
    assert reasonable(old, wish) == code
    assert reasonable(old, replace(old, **good)) == 1  # type: ignore[arg-type]
    refused = change(old, wish, VERIFY)
    assert isinstance(refused, Refusal) and refused.code == code
    assert isinstance(change(old, wish, VERIFY, hard=True), State), "facts are not wishes"


def test_w_a_disk_found_outdated_at_attach_is_no_wish() -> None:
    for disk in (NEG, ATT):
        assert reasonable(replace(GOOD, disk=disk), replace(GOOD, disk=OUT)) == 1


# ----------------------------------------------------------------------------------------- change


def test_nothing_to_do_returns_the_old_state_itself() -> None:
    assert change(GOOD, replace(GOOD), FACTS) is GOOD
    broken = State(P, P, C.CONNECTED, INC, INC)
    assert change(broken, replace(broken), FACTS) is broken, "even where it is inadmissible"


def test_promotion_and_demotion() -> None:
    assert change(GOOD, PRIMARY, FACTS) == PRIMARY
    assert change(PRIMARY, GOOD, FACTS) == GOOD
    refused = change(PRIMARY, GOOD, Facts(is_open=True))
    assert isinstance(refused, Refusal) and refused.code == -12


def test_forced_promotion_of_a_fresh_node() -> None:
    fresh = State(S, S, C.CONNECTED, INC, INC)
    refused = change(fresh, replace(fresh, role=P), FACTS)
    assert isinstance(refused, Refusal) and refused.code == -2 and refused.exit_code == 17
    forced = change(fresh, replace(fresh, role=P, disk=UP), FACTS)
    assert isinstance(forced, State) and forced.word() == 0x000090A9


def test_link_loss_and_recovery() -> None:
    lost = change(PRIMARY, replace(PRIMARY, conn=C.NETWORK_FAILURE), STONITH, hard=True)
    assert lost == State(P, U, C.NETWORK_FAILURE, UP, UNK, susp_fen=True)
    waiting = change(lost, replace(lost, conn=C.UNCONNECTED), STONITH, hard=True)
    assert isinstance(waiting, State)
    waiting = change(waiting, replace(waiting, conn=C.WF_CONNECTION), STONITH, hard=True)
    assert isinstance(waiting, State) and waiting.word() == 0x0040D081


def test_a_broken_disk_ends_the_resync() -> None:
    target = State(S, P, C.SYNC_TARGET, INC, UP)
    after = change(target, replace(target, disk=FAILED), FACTS, hard=True)
    assert after == State(S, P, C.CONNECTED, FAILED, UP)


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


def test_the_documents_show_every_row() -> None:
    table = transition.state_table()
    for title in ("### W.", "### A.", "### B.", "### C.", "### Disk states"):
        assert title in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == (
        5 + 6 + 15 + 13 + len(C) + 5  # rows, and the head of each table
    )
    assert "| Primary, peer Primary, two Primaries not allowed | -1 | Multiple primaries" in table
    assert "| SyncTarget | Inconsistent | UpToDate |" in table
