"""State changes: each row of each table fires where it should and stays silent where it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tandem.repl import transition
from tandem.repl.errors import Refusal
from tandem.repl.states import ConnState, DiskState, State
from tandem.repl.transition import Facts, admissible, allowed, change, possible, reasonable

from tests.node_states import (
    ALONE,
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
    TWO,
    UNK,
    UP,
    VERIFY,
    C,
    P,
    S,
    U,
)

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


def test_b_is_asked_of_a_promotion_whatever_else_is_wrong() -> None:
    """Outdated, and connected to a peer that has just lost its disk: -6 says nothing about being Primary there."""
    old = State(S, S, C.CONNECTED, OUT, FAILED)
    refused = change(old, replace(old, role=P), FACTS)
    assert isinstance(refused, Refusal) and refused.code == -2
    assert isinstance(change(old, replace(old, conn=C.DISCONNECTING), FACTS), State)


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


def test_the_documents_show_every_row() -> None:
    table = transition.state_table()
    for title in ("### W.", "### A.", "### B.", "### C.", "### Disk states"):
        assert title in table
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == (
        5 + 6 + 15 + 13 + len(C) + 5  # rows, and the head of each table
    )
    assert "| Primary, peer Primary, two Primaries not allowed | -1 | Multiple primaries" in table
    assert "| SyncTarget | Inconsistent | UpToDate |" in table
