"""The decision who resyncs whom: each step, each policy row, and both nodes reaching mirror-image results."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.config import AfterSb
from tandem.repl.decision import AbortOutcome, DecisionFacts, abort_outcome, decide
from tandem.repl.states import ConnState, DiskState
from tandem.repl.uuids import JUST_CREATED, SYNC_STEP, CompareFacts, UuidSet

C, D = ConnState, DiskState
UP, INC, OUT, CON = D.UP_TO_DATE, D.INCONSISTENT, D.OUTDATED, D.CONSISTENT
LESS = D.DISKLESS
A, X, Y, H0, H1, Z = (0x1000 * n for n in range(1, 7))

NOBODY = CompareFacts(False, False, False, False, False, True)
AHEAD, BEHIND = UuidSet(X, A, H0, H1), UuidSet(A, 0, H0, H1)
OWN_SB, PEER_SB = UuidSet(X, A, H0, H1), UuidSet(Y, A, H0, H1)  # rule 90
OWN_AMB, PEER_AMB = UuidSet(X, 0, H0, H1), UuidSet(Y, 0, H0, Z)  # rule 100


def facts(own: UuidSet, peer: UuidSet, **changes: object) -> DecisionFacts:
    """UpToDate disks and Secondaries, and what *changes* says; names of CompareFacts are understood too."""
    inner = {name: changes.pop(name) for name in list(changes) if name in CompareFacts.__slots__}
    base = DecisionFacts(own, peer, replace(NOBODY, **inner), UP, UP)  # type: ignore[arg-type]
    return replace(base, **changes)  # type: ignore[arg-type]


def split(**changes: object) -> DecisionFacts:
    return facts(OWN_SB, PEER_SB, **changes)


# ------------------------------------------------------------------------------------- plain verdicts


def test_one_node_is_behind() -> None:
    source, target = decide(facts(AHEAD, BEHIND)), decide(facts(BEHIND, AHEAD))
    assert (source.value, source.rule, source.conn) == (1, 70, C.WF_BITMAP_S)
    assert (target.value, target.rule, target.conn) == (-1, 50, C.WF_BITMAP_T)
    for d in (source, target):
        assert not d.full_sync and not d.split_brain and not d.helpers and not d.demote_self and not d.abort


def test_the_log_is_what_users_search_for() -> None:
    d = decide(facts(BEHIND, AHEAD, own_bits=3, peer_bits=257, peer_discard=True, own_crashed=True))
    assert d.log == (
        "drbd_sync_handshake:",
        "self 0000000000001000:0000000000000000:0000000000004000:0000000000005000 bits:3 flags:2",
        "peer 0000000000002000:0000000000001000:0000000000004000:0000000000005000 bits:257 flags:1",
        "uuid_compare()=-1 by rule 50",
    )


def test_equal_sets_need_no_resync_even_with_bits() -> None:
    d = decide(facts(BEHIND, BEHIND))
    assert (d.value, d.conn, len(d.log)) == (0, C.CONNECTED, 4)
    d = decide(facts(BEHIND, BEHIND, own_bits=17))
    assert d.conn is C.CONNECTED
    assert d.log[-1] == "No resync, but 17 bits in bitmap!"


def test_full_sync_of_a_fresh_node() -> None:
    fresh, forced = UuidSet(), UuidSet(X | 1, JUST_CREATED, 0, 0)
    d = decide(facts(fresh, forced, my_disk=INC, peer_primary=True))
    assert (d.value, d.rule, d.conn, d.full_sync) == (-2, 20, C.WF_BITMAP_T, True)
    d = decide(facts(forced, fresh, peer_disk=INC, own_primary=True))
    assert (d.value, d.rule, d.conn, d.full_sync) == (2, 30, C.WF_BITMAP_S, True)


def test_corrected_sets_are_handed_back() -> None:
    own, peer = UuidSet(X, A, H0, H1), UuidSet(X, 0, A, H0)
    d = decide(facts(own, peer))
    assert (d.rule, d.own, d.peer) == (34, UuidSet(X, 0, A, H0), peer)


# ------------------------------------------------------------------------------------- step 1: hopeless


@pytest.mark.parametrize(("own", "peer", "changes", "value", "word"), [
    (UuidSet(X, 0, H0, H1), UuidSet(Y, 0, Z, Z), {}, -1000, "unrelated"),
    (UuidSet(X, A, H0, H1), UuidSet(X, 0, Z, Z), {"apv": 90}, -1091, "protocol 91"),
    (BEHIND, BEHIND, {"own_crashed": True, "peer_primary": True, "wsame": False}, -(0x10000 + 1125),
     "protocol 101"),
])  # fmt: skip
def test_step_1_some_verdicts_end_everything(
    own: UuidSet, peer: UuidSet, changes: dict[str, object], value: int, word: str
) -> None:
    d = decide(facts(own, peer, peer_disk=INC, **changes))
    assert (d.value, d.conn, d.full_sync, d.split_brain, d.helpers) == (value, None, False, False, ())
    assert word in d.abort


# ------------------------------------------------------------------------------- step 2: disk states


@pytest.mark.parametrize(("mine", "peers", "value"), [
    (INC, OUT, -1), (INC, CON, -1), (INC, UP, -1), (OUT, INC, 1), (UP, INC, 1), (INC, INC, 0), (UP, UP, 0),
    (OUT, UP, 0), (LESS, INC, 0),
])  # fmt: skip
def test_step_2_inconsistent_is_never_the_source(mine: DiskState, peers: DiskState, value: int) -> None:
    d = decide(facts(BEHIND, BEHIND, my_disk=mine, peer_disk=peers))
    assert (d.value, d.rule) == (value, 40)
    assert ("The disk states decide" in d.log[-1]) is (value != 0)


def test_step_2_turns_a_verdict_round_and_keeps_its_fullness() -> None:
    assert decide(facts(AHEAD, BEHIND, my_disk=INC)).value == -1
    assert decide(facts(BEHIND, AHEAD, peer_disk=INC)).value == 1
    old = UuidSet(A, 0, Z, Z)
    assert decide(facts(AHEAD, replace(old, current=H0), my_disk=INC)).value == -2
    d = decide(facts(OWN_AMB, PEER_AMB, my_disk=INC))
    assert (d.value, d.full_sync, d.split_brain, d.helpers) == (-2, True, False, ())
    d = decide(split(peer_disk=INC))
    assert (d.value, d.split_brain) == (1, False), "rule 90 has a common bitmap generation"


# -------------------------------------------------------------------------- steps 3 to 6: split brain


@pytest.mark.parametrize("f", [split(), facts(OWN_AMB, PEER_AMB), split(own_primary=True),
                               split(own_primary=True, peer_primary=True)])  # fmt: skip
def test_unresolved_split_brain(f: DecisionFacts) -> None:
    d = decide(f)
    assert (d.value, d.conn, d.split_brain) == (-100, None, True)
    assert d.helpers == ("initial-split-brain", "split-brain")
    assert d.abort == "Split-Brain detected but unresolved, dropping connection!"


@pytest.mark.parametrize("f", [split(), facts(OWN_AMB, PEER_AMB)])
def test_step_5_discard_my_data(f: DecisionFacts) -> None:
    victim = decide(replace(f, own_discard=True))
    assert (victim.value, victim.conn, victim.helpers) == (-1, C.WF_BITMAP_T, ("initial-split-brain",))
    assert victim.log[-1] == "Split-Brain detected, manually solved. Sync from peer node"
    survivor = decide(replace(f, peer_discard=True))
    assert (survivor.value, survivor.conn) == (1, C.WF_BITMAP_S)
    assert survivor.log[-1] == "Split-Brain detected, manually solved. Sync from this node"
    assert decide(replace(f, own_discard=True, peer_discard=True)).value == -100


@pytest.mark.parametrize(("changes", "yields"), [
    ({"own_primary": True, "own_bits": 1, "peer_bits": 9}, "peer"),
    ({"peer_primary": True, "own_bits": 9, "peer_bits": 1}, "self"),
    ({"own_bits": 1, "peer_bits": 2}, "self"), ({"own_bits": 2, "peer_bits": 1}, "peer"),
    ({"own_primary": True, "peer_primary": True, "own_bits": 1, "peer_bits": 2}, "self"),
    ({"resolver": True}, "self"), ({"resolver": False}, "peer"),
])  # fmt: skip
def test_who_yields_is_the_same_on_both_nodes(changes: dict[str, object], yields: str) -> None:
    assert decide(split(**changes)).yields == yields
    swap = {"own": "peer", "peer": "own"}
    other: dict[str, object] = {
        name if name == "resolver" else swap[name.partition("_")[0]] + "_" + name.partition("_")[2]:
            (not value if name == "resolver" else value)
        for name, value in changes.items()
    }  # fmt: skip
    mirrored = decide(facts(PEER_SB, OWN_SB, **other)).yields
    assert {yields, mirrored} == {"self", "peer"}


def test_what_after_sb_0pri_says_counts_for_who_yields_where_it_was_not_asked() -> None:
    """Both are Primary: the policy would keep the older Primary, although it changed less."""
    f = facts(replace(OWN_SB, bitmap=A | 1), PEER_SB, own_primary=True, peer_primary=True, own_bits=1, peer_bits=9)
    assert decide(f).yields == "self"
    assert decide(replace(f, after_sb_0pri=AfterSb.DISCARD_YOUNGER_PRIMARY)).yields == "peer"


def test_a_primary_that_should_take_the_peers_data_yields() -> None:
    decision = decide(facts(BEHIND, AHEAD, own_primary=True, peer_primary=True))
    assert decision.conn is None and decision.yields == "self" and not decision.split_brain


def test_nobody_yields_when_it_is_solved() -> None:
    assert decide(split(own_discard=True)).yields == "" and decide(facts(AHEAD, BEHIND)).yields == ""
    assert decide(split(own_primary=True, demotion_failed=True)).yields == "self"


def test_discard_my_data_means_nothing_without_split_brain() -> None:
    assert decide(facts(AHEAD, BEHIND, own_discard=True)).value == 1


def test_an_automatic_policy_comes_before_discard_my_data() -> None:
    d = decide(split(after_sb_0pri=AfterSb.DISCARD_REMOTE, own_discard=True))
    assert (d.value, d.split_brain, d.helpers) == (1, True, ("initial-split-brain",))


def test_step_4_ambiguous_histories_only_with_always_asbp_and_then_in_full() -> None:
    f = facts(OWN_AMB, PEER_AMB, after_sb_0pri=AfterSb.DISCARD_LOCAL)
    assert decide(f).value == -100
    d = decide(replace(f, always_asbp=True))
    assert (d.value, d.conn, d.full_sync) == (-2, C.WF_BITMAP_T, True)
    d = decide(replace(f, always_asbp=True, after_sb_0pri=AfterSb.DISCARD_REMOTE))
    assert (d.value, d.conn, d.full_sync) == (2, C.WF_BITMAP_S, True)
    d = decide(split(after_sb_0pri=AfterSb.DISCARD_LOCAL, always_asbp=True))
    assert (d.value, d.full_sync) == (-1, False), "rule 90 stays bitmap based"
    manual = decide(replace(f, always_asbp=True, after_sb_0pri=AfterSb.DISCONNECT, own_discard=True))
    assert (manual.value, manual.full_sync) == (-1, False)


def test_step_4_two_primaries_after_a_crash_are_split_brain() -> None:
    f = facts(BEHIND, BEHIND, own_primary=True, peer_primary=True, own_crashed=True)
    d = decide(f)
    assert (d.value, d.rule, d.split_brain) == (-100, 41, True)


ZERO_THEN_LEAST = [  # own bits, peer's bits, resolver, result
    (0, 0, True, -1), (0, 0, False, 1), (5, 0, False, 1), (0, 5, False, -1), (3, 5, False, -1),
    (5, 3, False, 1), (5, 5, True, -1), (5, 5, False, 1),
]  # fmt: skip


@pytest.mark.parametrize(("was", "peer_was", "younger", "older"), [(0, 1, -1, 1), (1, 0, 1, -1)])
def test_0pri_younger_and_older_primary(was: int, peer_was: int, younger: int, older: int) -> None:
    own, peer = replace(OWN_SB, bitmap=A | was), replace(PEER_SB, bitmap=A | peer_was)
    f = facts(own, peer, own_bits=1, peer_bits=1)
    assert decide(replace(f, after_sb_0pri=AfterSb.DISCARD_YOUNGER_PRIMARY)).value == younger
    assert decide(replace(f, after_sb_0pri=AfterSb.DISCARD_OLDER_PRIMARY)).value == older


@pytest.mark.parametrize("policy", [AfterSb.DISCARD_YOUNGER_PRIMARY, AfterSb.DISCARD_OLDER_PRIMARY])
@pytest.mark.parametrize("both", [0, 1])
@pytest.mark.parametrize(("own_bits", "peer_bits", "resolver", "value"), ZERO_THEN_LEAST)
def test_0pri_without_a_younger_primary_the_changes_decide(
    policy: AfterSb, both: int, own_bits: int, peer_bits: int, resolver: bool, value: int
) -> None:
    own, peer = replace(OWN_SB, bitmap=A | both), replace(PEER_SB, bitmap=A | both)
    f = facts(own, peer, own_bits=own_bits, peer_bits=peer_bits, resolver=resolver)
    d = decide(replace(f, after_sb_0pri=policy))
    assert d.value == value
    assert any("discard-least-changes instead" in line for line in d.log)


@pytest.mark.parametrize(("own_bits", "peer_bits", "resolver", "value"), [
    (0, 0, True, -1), (0, 0, False, 1), (5, 0, True, 1), (0, 5, False, -1), (3, 5, False, -100),
    (5, 5, True, -100),
])  # fmt: skip
def test_0pri_zero_changes(own_bits: int, peer_bits: int, resolver: bool, value: int) -> None:
    d = decide(split(own_bits=own_bits, peer_bits=peer_bits, resolver=resolver,
                     after_sb_0pri=AfterSb.DISCARD_ZERO_CHANGES))  # fmt: skip
    assert d.value == value
    assert ("split-brain" in d.helpers) is (value == -100)


@pytest.mark.parametrize(("own_bits", "peer_bits", "resolver", "value"), ZERO_THEN_LEAST)
def test_0pri_least_changes(own_bits: int, peer_bits: int, resolver: bool, value: int) -> None:
    d = decide(split(own_bits=own_bits, peer_bits=peer_bits, resolver=resolver,
                     after_sb_0pri=AfterSb.DISCARD_LEAST_CHANGES))  # fmt: skip
    assert d.value == value
    assert d.log[-1].startswith("Split-Brain detected, automatically solved with primaries: 0. Sync from")


@pytest.mark.parametrize(("policy", "value"), [
    (AfterSb.DISCONNECT, -100), (AfterSb.DISCARD_LOCAL, -1), (AfterSb.DISCARD_REMOTE, 1),
])  # fmt: skip
def test_0pri_fixed_answers(policy: AfterSb, value: int) -> None:
    assert decide(split(after_sb_0pri=policy, own_bits=1)).value == value


NOT_FOR = {
    "after_sb_0pri": [7, 8, 9, 10],
    "after_sb_1pri": [1, 2, 3, 4, 5, 6],
    "after_sb_2pri": [1, 2, 3, 4, 5, 6, 7, 8],
}


@pytest.mark.parametrize(("name", "number"), [(name, n) for name, ns in NOT_FOR.items() for n in ns])
def test_policies_in_the_wrong_place_solve_nothing(name: str, number: int) -> None:
    n_primaries = int(name[len("after_sb_")])
    f = split(own_primary=n_primaries > 0, peer_primary=n_primaries > 1, after_sb_0pri=AfterSb.DISCARD_REMOTE)
    d = decide(replace(f, **{name: AfterSb(number)}))  # type: ignore[arg-type]
    assert d.value == -100 and d.conn is None
    word = AfterSb(number).name.lower().replace("_", "-")
    assert f"Configuration error: {name.replace('_', '-')} can not be {word}" in d.log


def one_primary(own: bool, policy: AfterSb, sub: AfterSb, **changes: object) -> DecisionFacts:
    return split(own_primary=own, peer_primary=not own, after_sb_1pri=policy, after_sb_0pri=sub, **changes)


LOCAL, REMOTE = AfterSb.DISCARD_LOCAL, AfterSb.DISCARD_REMOTE


@pytest.mark.parametrize(("policy", "own_primary", "sub", "value"), [
    (AfterSb.DISCONNECT, True, REMOTE, -100), (AfterSb.DISCONNECT, False, REMOTE, -100),
    (AfterSb.CONSENSUS, False, LOCAL, -1), (AfterSb.CONSENSUS, True, LOCAL, -100),
    (AfterSb.CONSENSUS, True, REMOTE, 1), (AfterSb.CONSENSUS, False, REMOTE, -100),
    (AfterSb.CONSENSUS, True, AfterSb.DISCONNECT, -100), (AfterSb.CONSENSUS, False, AfterSb.DISCONNECT, -100),
    (AfterSb.VIOLENTLY_AS0P, True, LOCAL, -1), (AfterSb.VIOLENTLY_AS0P, False, LOCAL, -1),
    (AfterSb.VIOLENTLY_AS0P, True, REMOTE, 1), (AfterSb.VIOLENTLY_AS0P, False, REMOTE, 1),
    (AfterSb.VIOLENTLY_AS0P, True, AfterSb.DISCONNECT, -100),
    (AfterSb.DISCARD_SECONDARY, True, LOCAL, 1), (AfterSb.DISCARD_SECONDARY, False, REMOTE, -1),
    (AfterSb.CALL_PRI_LOST_AFTER_SB, True, REMOTE, 1), (AfterSb.CALL_PRI_LOST_AFTER_SB, False, REMOTE, 1),
    (AfterSb.CALL_PRI_LOST_AFTER_SB, False, LOCAL, -1),
    (AfterSb.CALL_PRI_LOST_AFTER_SB, True, AfterSb.DISCONNECT, -100),
])  # fmt: skip
def test_1pri(policy: AfterSb, own_primary: bool, sub: AfterSb, value: int) -> None:
    d = decide(one_primary(own_primary, policy, sub, rr_conflict="violently"))
    assert d.value == value
    assert not d.demote_self
    assert (d.conn is None) is (value == -100)


@pytest.mark.parametrize(("policy", "sub", "value"), [
    (AfterSb.DISCONNECT, REMOTE, -100),
    (AfterSb.VIOLENTLY_AS0P, REMOTE, 1), (AfterSb.VIOLENTLY_AS0P, LOCAL, -1),
    (AfterSb.CALL_PRI_LOST_AFTER_SB, REMOTE, 1), (AfterSb.CALL_PRI_LOST_AFTER_SB, AfterSb.DISCONNECT, -100),
])  # fmt: skip
def test_2pri(policy: AfterSb, sub: AfterSb, value: int) -> None:
    d = decide(split(own_primary=True, peer_primary=True, after_sb_2pri=policy, after_sb_0pri=sub,
                     rr_conflict="violently"))  # fmt: skip
    assert d.value == value
    assert not d.demote_self


LOSING_PRIMARIES = [
    one_primary(True, AfterSb.CALL_PRI_LOST_AFTER_SB, LOCAL),
    split(own_primary=True, peer_primary=True, after_sb_2pri=AfterSb.CALL_PRI_LOST_AFTER_SB,
          after_sb_0pri=LOCAL),
]  # fmt: skip


@pytest.mark.parametrize("f", LOSING_PRIMARIES)
def test_the_losing_primary_is_demoted_first(f: DecisionFacts) -> None:
    d = decide(f)
    assert (d.value, d.conn, d.demote_self) == (-1, C.WF_BITMAP_T, True), "rr-conflict does not apply"
    assert d.helpers == ("initial-split-brain",)


@pytest.mark.parametrize("f", LOSING_PRIMARIES)
def test_a_losing_primary_that_can_not_be_demoted_calls_for_help(f: DecisionFacts) -> None:
    d = decide(replace(f, demotion_failed=True))
    assert (d.value, d.conn, d.demote_self) == (-100, None, False)
    assert d.helpers == ("initial-split-brain", "pri-lost-after-sb", "split-brain")


@pytest.mark.parametrize("f", LOSING_PRIMARIES)
def test_a_dry_run_demotes_nobody(f: DecisionFacts) -> None:
    d = decide(replace(f, own_tentative=True))
    assert d.conn is None and not d.demote_self


# ------------------------------------------------------------------------- steps 7 and 8: both ends


@pytest.mark.parametrize("disk", [LESS, D.ATTACHING, D.FAILED, D.NEGOTIATING, INC])
def test_step_7_an_inconsistent_source(disk: DiskState) -> None:
    d = decide(facts(AHEAD, BEHIND, my_disk=disk, peer_disk=INC))
    assert d.value == 1 and d.conn is None
    assert "should become SyncSource" in d.abort
    assert decide(facts(AHEAD, BEHIND, my_disk=OUT)).conn is C.WF_BITMAP_S


def test_step_8_rr_conflict() -> None:
    f = facts(BEHIND, AHEAD, own_primary=True)
    d = decide(f)
    assert (d.value, d.conn, d.helpers) == (-1, None, ())
    assert "should become SyncTarget" in d.abort
    d = decide(replace(f, rr_conflict="call-pri-lost"))
    assert (d.conn, d.helpers) == (None, ("pri-lost",)) and d.abort
    d = decide(replace(f, rr_conflict="violently"))
    assert (d.conn, d.helpers, d.abort) == (C.WF_BITMAP_T, (), "")
    assert "rr-conflict violently" in d.log[-1]


@pytest.mark.parametrize(("changes", "aborts"), [
    ({}, True), ({"my_disk": CON}, True), ({"my_disk": OUT}, False), ({"my_disk": INC}, False),
    ({"own_negotiating": True}, False), ({"own_primary": False}, False),
])  # fmt: skip
def test_step_8_is_about_good_data_of_a_primary(changes: dict[str, object], aborts: bool) -> None:
    d = decide(facts(BEHIND, AHEAD, **({"own_primary": True} | changes)))
    assert (d.conn is None) is aborts
    assert decide(facts(AHEAD, BEHIND, own_primary=True)).conn is C.WF_BITMAP_S


# ------------------------------------------------------------------------------------ step 9: dry run


@pytest.mark.parametrize(("own", "peer", "said"), [
    (AHEAD, BEHIND, "SyncSource of a bitmap based resync"),
    (BEHIND, AHEAD, "SyncTarget of a bitmap based resync"),
    (AHEAD, UuidSet(), "SyncSource of a full resync"), (UuidSet(), AHEAD, "SyncTarget of a full resync"),
    (AHEAD, AHEAD, "no resync"),
])  # fmt: skip
@pytest.mark.parametrize("who", ["own_tentative", "peer_tentative"])
def test_step_9_a_dry_run_says_what_would_happen(own: UuidSet, peer: UuidSet, said: str, who: str) -> None:
    d = decide(facts(own, peer, own_bits=7, **{who: True}))
    assert d.conn is None and not d.full_sync
    assert d.abort.startswith("Dry run: ") and said in d.abort
    assert not any("bits in bitmap" in line for line in d.log)


# ------------------------------------------------------------------------------------------ abort


@pytest.mark.parametrize(("own", "peer", "tentative", "outcome"), [
    (True, True, True, AbortOutcome.FAIL_ATTACH), (True, False, False, AbortOutcome.FAIL_ATTACH),
    (False, True, True, AbortOutcome.PEER_DISKLESS), (False, True, False, AbortOutcome.PEER_DISKLESS),
    (False, False, True, AbortOutcome.RECONNECT), (False, False, False, AbortOutcome.STAND_ALONE),
])  # fmt: skip
def test_where_an_abort_leads(own: bool, peer: bool, tentative: bool, outcome: AbortOutcome) -> None:
    assert abort_outcome(own_negotiating=own, peer_negotiating=peer, peer_tentative=tentative) is outcome


# ----------------------------------------------------------------------------------- mirror images

RELATED = [
    (AHEAD, BEHIND), (BEHIND, AHEAD), (AHEAD, AHEAD),
    (UuidSet(), AHEAD), (AHEAD, UuidSet()), (UuidSet(), UuidSet()),
    (OWN_SB, PEER_SB), (replace(OWN_SB, bitmap=A | 1), PEER_SB), (OWN_SB, replace(PEER_SB, bitmap=A | 1)),
    (OWN_AMB, PEER_AMB), (UuidSet(X, 0, H0, H1), UuidSet(Y, 0, Z, Z)),
    (UuidSet(X, A + SYNC_STEP, A, H0), BEHIND), (BEHIND, UuidSet(X, A + SYNC_STEP, A, H0)),
    (UuidSet(X, 0, H0, A), BEHIND), (BEHIND, UuidSet(X, 0, H0, A)),
]  # fmt: skip
SEEN_BY_PEER = {LOCAL: REMOTE, REMOTE: LOCAL}
BITS = st.integers(0, 2)
ATTACHED = st.sampled_from([INC, OUT, CON, UP])


@st.composite
def two_sides(draw: st.DrawFn) -> tuple[DecisionFacts, DecisionFacts]:
    """The same meeting, as seen from both nodes."""
    own, peer = draw(st.sampled_from(RELATED))
    flip = st.booleans()
    c = CompareFacts(
        draw(flip), draw(flip), draw(flip), draw(flip), draw(flip), draw(flip), draw(st.sampled_from([90, 101]))
    )
    policy = st.sampled_from(AfterSb)
    here = DecisionFacts(
        own, peer, c, draw(ATTACHED), draw(ATTACHED), draw(BITS), draw(BITS), draw(flip), draw(flip), False,
        False, draw(policy), draw(policy), draw(policy), always_asbp=draw(flip), rr_conflict="violently",
    )  # fmt: skip
    mirrored = CompareFacts(
        c.peer_primary, c.own_primary, c.peer_crashed, c.own_crashed, not c.resolver, c.wsame, c.apv
    )
    there = replace(
        here, own=peer, peer=own, compare=mirrored, my_disk=here.peer_disk, peer_disk=here.my_disk,
        own_bits=here.peer_bits, peer_bits=here.own_bits, own_discard=here.peer_discard,
        peer_discard=here.own_discard, after_sb_0pri=SEEN_BY_PEER.get(here.after_sb_0pri, here.after_sb_0pri),
    )  # fmt: skip
    return here, there


@settings(max_examples=400)
@given(two_sides())
def test_both_nodes_decide_mirror_images(sides: tuple[DecisionFacts, DecisionFacts]) -> None:
    here, there = decide(sides[0]), decide(sides[1])
    assert here.split_brain == there.split_brain
    if abs(here.value) < 100:
        assert there.value == -here.value
    else:
        assert there.value == here.value and here.conn is there.conn is None
    if here.conn is not None and there.conn is not None:
        assert here.full_sync == there.full_sync
        pair = {here.conn, there.conn}
        assert pair in ({C.CONNECTED}, {C.WF_BITMAP_S, C.WF_BITMAP_T})


@settings(max_examples=200)
@given(two_sides(), st.booleans(), st.booleans(), st.booleans())
def test_a_decision_is_complete(
    sides: tuple[DecisionFacts, DecisionFacts], own_dry: bool, peer_dry: bool, failed: bool
) -> None:
    f = replace(sides[0], own_tentative=own_dry, peer_tentative=peer_dry, demotion_failed=failed)
    d = decide(f)
    assert (d.conn is None) == bool(d.abort), "an abort always says why"
    assert ("initial-split-brain" in d.helpers) == d.split_brain
    assert "split-brain" not in d.helpers or d.conn is None
    if d.full_sync:
        assert abs(d.value) == 2 and d.conn in (C.WF_BITMAP_S, C.WF_BITMAP_T)
    if d.conn is C.WF_BITMAP_S:
        assert f.my_disk > INC
    if own_dry or peer_dry:
        assert d.conn is None
