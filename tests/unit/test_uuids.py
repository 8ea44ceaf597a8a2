"""Generation UUIDs: every rule of the comparison, every move, and the flags that follow from a state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.repl import uuids
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.uuids import JUST_CREATED, SYNC_STEP, CompareFacts, UuidSet, Verdict, compare, md_flags

A, B, X, Y, Z, H0, H1 = (0x1000 * n for n in range(1, 8))
STEP = SYNC_STEP


def facts(**changes: object) -> CompareFacts:
    return replace(CompareFacts(False, False, False, False, False, True), **changes)  # type: ignore[arg-type]


def mirrored(f: CompareFacts) -> CompareFacts:
    return CompareFacts(
        f.peer_primary, f.own_primary, f.peer_crashed, f.own_crashed, not f.resolver, f.wsame, f.apv
    )


def says(own: UuidSet, peer: UuidSet, **changes: object) -> tuple[int, int]:
    verdict = compare(own, peer, facts(**changes))
    return verdict.value, verdict.rule


# ------------------------------------------------------------------------------------------- moves


def test_new_current_moves_the_old_one_with_its_role_bit_to_the_bitmap_slot() -> None:
    u = UuidSet(A | 1, 0, H0, H1)
    assert u.new_current(X, primary=True) == UuidSet(X | 1, A | 1, H0, H1)
    assert u.new_current(X | 1, primary=False) == UuidSet(X, A | 1, H0, H1)
    assert replace(u, bitmap=B).new_current(X, False).bitmap == A | 1, "an occupied slot is overwritten"


def test_set_current_forces_bit_0_to_the_role() -> None:
    assert UuidSet(A).set_current(X, True).current == X | 1
    assert UuidSet(A).set_current(X | 1, False).current == X
    assert UuidSet(A).with_role(True) == UuidSet(A | 1)
    assert UuidSet(A | 1, B, H0, H1).with_role(False) == UuidSet(A, B, H0, H1)


def test_bitmap_moves_to_history_only_when_occupied() -> None:
    assert UuidSet(A, B, H0, H1).set_bitmap_with_history(X) == UuidSet(A, X, B, H0)
    assert UuidSet(A, 0, H0, H1).set_bitmap_with_history(X) == UuidSet(A, X, H0, H1)
    assert UuidSet(A, B, H0, H1).clear_bitmap() == UuidSet(A, 0, B, H0)
    assert UuidSet(A, 0, H0, H1).clear_bitmap() == UuidSet(A, 0, H0, H1)
    assert UuidSet(A, B, H0, H1).forget_bitmap() == UuidSet(A, 0, H0, H1)


@pytest.mark.parametrize("bitmap", [0, JUST_CREATED])
def test_sync_uuid_is_random_without_a_generation_to_count_from(bitmap: int) -> None:
    assert UuidSet(A, bitmap).sync_uuid(X) == X


def test_sync_uuid_is_the_bitmap_uuid_plus_a_step_and_stays_64_bit() -> None:
    assert UuidSet(A, 0x1E06C7EA664FB56B).sync_uuid(X) == 0x1E07C7EA664FB56B
    assert UuidSet(A, 0xFFFF_0000_0000_0006).sync_uuid(X) == 6


def test_printed_as_the_kernel_does() -> None:
    u = UuidSet(0x1E06C7EA664FB56B, 4, 0, 0)
    assert str(u) == "1E06C7EA664FB56B:0000000000000004:0000000000000000:0000000000000000"


def resync(source: UuidSet, target: UuidSet, random64: int, primary: bool = True) -> tuple[UuidSet, UuidSet]:
    """A whole resync without failures, both sides."""
    received = source
    u = source.sync_uuid(random64)
    source = source.set_bitmap_with_history(u)
    target = target.become_target(u, primary=False)
    assert compare(source, target, facts(own_primary=primary)).value == 1, "interrupted here"
    return source.clear_bitmap(), target.after_sync_target(received, primary=False)


def resync_discarding(source: UuidSet, target: UuidSet) -> tuple[UuidSet, UuidSet]:
    """A resync on the administrator's word, after split brain."""
    u = source.sync_uuid(0)
    return (
        source.set_bitmap_with_history(u).clear_bitmap(),
        target.become_target(u, primary=False).after_sync_target(source, primary=False),
    )


def test_first_full_sync_of_two_fresh_nodes() -> None:
    """The forced Primary of a captured handshake: X : 0 : u : 4 on both in the end."""
    x, u = 0x1E06C7EA664FB56A, 0x1AD331CBB4784384
    a = UuidSet().new_current(x, primary=True)
    assert a == UuidSet(x | 1, 4, 0, 0)
    a, b = resync(a, UuidSet(), u)
    assert a == UuidSet(x | 1, 0, u, 4)
    assert b == UuidSet(x, 0, u, 4)


def test_bitmap_resync_after_a_disconnect() -> None:
    """Metadata life cycle: peer leaves, new generation at once, reconnect, resync, equal sets."""
    a1, s1, a2 = 0x1E06C7EA664FB56B, 0x1AD331CBB4784384, 0xBB9B85E92234EFE7
    a, b = UuidSet(a1, 0, s1, 4), UuidSet(a1 & ~1, 0, s1, 4)
    a = a.new_current(a2, primary=True)
    assert a == UuidSet(a2, a1, s1, 4)
    assert says(a, b, own_primary=True) == (1, 70)
    assert says(b, a, peer_primary=True) == (-1, 50)
    u = a.sync_uuid(0)
    assert a.set_bitmap_with_history(u) == UuidSet(a2, a1 + STEP, a1, s1), "while the resync runs"
    a, b = resync(a, b, 0)
    assert a == UuidSet(a2, 0, a1 + STEP, a1)
    assert b == UuidSet(a2 & ~1, 0, a1 + STEP & ~1, a1), "the target held the sync UUID as a Secondary"


def test_resync_from_a_source_without_bitmap_uuid() -> None:
    """invalidate-remote: X : 0 : s0 : s1 becomes X : 0 : u : s0 on both."""
    source, target = resync(UuidSet(X, 0, H0, H1), UuidSet(X, 0, H0, H1), Y)
    assert source == target == UuidSet(X, 0, Y, H0)


def test_target_that_is_primary_keeps_its_role_bit() -> None:
    assert UuidSet(X | 1, 0, H0, H1).become_target(Y, primary=True) == UuidSet(Y | 1, 0, H0, H1)


def test_skip_initial_sync_leaves_no_history() -> None:
    commanding = UuidSet().new_current(X, primary=False)
    assert commanding == UuidSet(X, JUST_CREATED, 0, 0)
    assert commanding.forget_bitmap() == UuidSet().become_target(X, primary=False) == UuidSet(X, 0, 0, 0)


def test_split_brain_resolved_forgets_the_victim() -> None:
    base = UuidSet(A | 1, 0, H0, H1)
    a, b = base.new_current(X, True), base.new_current(Y, True)
    assert says(a, b) == (100, 90)
    b, a = resync_discarding(b, a)
    assert b == UuidSet(Y | 1, 0, (A | 1) + STEP, A | 1)
    assert a == UuidSet(Y, 0, A + STEP, A | 1)
    assert says(a, b) == (0, 40)


def test_new_current_uuid_when_stand_alone() -> None:
    assert UuidSet(A, B, H0, H1).clear_bitmap().new_current(X, False) == UuidSet(X, A, B, H0)


# ------------------------------------------------------------------------------------------- rules

FRESH = UuidSet()


def test_rule_10_both_fresh() -> None:
    assert says(FRESH, FRESH) == (0, 10)
    assert says(replace(FRESH, current=5), FRESH) == (0, 10), "bit 0 is no part of the identity"


@pytest.mark.parametrize("current", [4, 5, 0, 1])
def test_rules_20_and_30_fresh_or_empty_against_data(current: int) -> None:
    assert says(UuidSet(current), UuidSet(A)) == (-2, 20)
    assert says(UuidSet(A), UuidSet(current)) == (2, 30)


def test_rules_20_and_30_empty_against_fresh() -> None:
    assert says(UuidSet(0), FRESH) == (2, 30)
    assert says(FRESH, UuidSet(0)) == (-2, 20)


def test_rule_34_we_missed_the_end_of_the_resync_as_source() -> None:
    own, peer = UuidSet(X | 1, B, H0, H1), UuidSet(X, 0, B | 1, H0 | 1)
    verdict = compare(own, peer, facts())
    assert verdict == Verdict(1, 34, UuidSet(X | 1, 0, B, H0), peer)
    assert says(own, replace(peer, history0=Z)) == (1, 36)
    assert says(own, replace(peer, history1=Z)) == (1, 36)


def test_rule_35_the_peer_missed_the_end_of_the_resync() -> None:
    own, peer = UuidSet(X, 0, B | 1, H0), UuidSet(X | 1, B, H0, H1)
    assert compare(own, peer, facts()) == Verdict(-1, 35, own, UuidSet(X | 1, 0, B, H0))
    assert says(replace(own, history0=Z), peer) == (-1, 37)
    assert says(replace(own, history1=Z), peer) == (-1, 37)


def test_rules_36_and_37_correct_nothing() -> None:
    own, peer = UuidSet(X, B, H0, H1), UuidSet(X, 0, Z, Z)
    assert compare(own, peer, facts()) == Verdict(1, 36, own, peer)
    assert compare(peer, own, facts()) == Verdict(-1, 37, peer, own)


def test_emptiness_of_a_slot_is_literal() -> None:
    """A bitmap UUID of 1 is not empty, although its identity is 0."""
    assert says(UuidSet(X, 1, H0, H1), UuidSet(X, 0, Z, Z)) == (1, 36)


@pytest.mark.parametrize(("own", "peer", "rule"), [
    (UuidSet(X, B, H0, H1), UuidSet(X, 0, B, H0), 34),
    (UuidSet(X, 0, B, H0), UuidSet(X, B, H0, H1), 35),
    (UuidSet(X, B, H0, H1), UuidSet(X, 0, Z, Z), 36),
    (UuidSet(X, 0, Z, Z), UuidSet(X, B, H0, H1), 37),
])  # fmt: skip
def test_rules_34_to_37_need_protocol_91(own: UuidSet, peer: UuidSet, rule: int) -> None:
    assert abs(says(own, peer, apv=91)[0]) == 1
    assert compare(own, peer, facts(apv=90)) == Verdict(-1091, rule, own, peer), "nothing is corrected"


EQUAL = UuidSet(X, 0, H0, H1)


@pytest.mark.parametrize("bitmap", [0, B])
def test_rule_40_equal_and_nobody_crashed(bitmap: int) -> None:
    u = replace(EQUAL, bitmap=bitmap)
    assert says(u, u) == (0, 40)
    assert says(u, u, own_primary=True, peer_primary=True) == (0, 40), "roles alone do not matter"


@pytest.mark.parametrize(("own_crashed", "peer_crashed", "resolver", "value"), [
    (True, False, False, 1), (True, False, True, 1),
    (False, True, False, -1), (False, True, True, -1),
    (True, True, False, 1), (True, True, True, -1),
])  # fmt: skip
def test_rule_40_after_a_crash(own_crashed: bool, peer_crashed: bool, resolver: bool, value: int) -> None:
    crash = {"own_crashed": own_crashed, "peer_crashed": peer_crashed, "resolver": resolver}
    assert says(EQUAL, EQUAL, **crash) == (value, 40)
    assert says(EQUAL, EQUAL, wsame=False, **crash) == (value, 40), "only rule 41 needs the feature"


@pytest.mark.parametrize(("own_primary", "peer_primary", "value"), [
    (True, False, 1), (False, True, -1), (True, True, -100),
])  # fmt: skip
@pytest.mark.parametrize(("own_crashed", "peer_crashed"), [(True, False), (False, True), (True, True)])
def test_rule_41_a_primary_meets_a_crashed_one(
    own_primary: bool, peer_primary: bool, value: int, own_crashed: bool, peer_crashed: bool
) -> None:
    f = {"own_primary": own_primary, "peer_primary": peer_primary}
    f |= {"own_crashed": own_crashed, "peer_crashed": peer_crashed}
    assert says(EQUAL, EQUAL, **f) == (value, 41)
    assert says(EQUAL, EQUAL, wsame=False, **f) == (-(0x10000 + 101 + 0x400), 41)


def test_equal_current_uuids_never_reach_the_other_rules() -> None:
    """Rule 50 would match as well: own current is the peer's bitmap UUID."""
    assert says(UuidSet(X, B, H0, H1), UuidSet(X, X, H0, H1)) == (0, 40)


def test_rule_50_and_70_one_generation_behind() -> None:
    behind, ahead = UuidSet(A, 0, H0, H1), UuidSet(X | 1, A | 1, H0, H1)
    assert says(behind, ahead) == (-1, 50)
    assert says(ahead, behind) == (1, 70)


def test_rules_51_and_71_the_sync_uuid_never_arrived() -> None:
    target = UuidSet(A, 0, H0, H1)
    source = UuidSet(X, (A | 1) + STEP, A | 1, H0)
    undone = UuidSet(X, A | 1, H0, H0)
    assert compare(target, source, facts()) == Verdict(-1, 51, target, undone)
    assert compare(source, target, facts()) == Verdict(1, 71, undone, target)


def test_rules_51_and_71_need_the_very_step() -> None:
    target, source = UuidSet(A, 0, H0, H1), UuidSet(X, A + 2 * STEP, A, H0)
    assert says(target, source) == (-2, 60)
    assert says(source, target) == (2, 80)


def test_rules_51_and_71_wrap_at_64_bit() -> None:
    high = 0xFFFF_0000_0000_0100
    target, source = UuidSet(high, 0, H0, H1), UuidSet(X, 0x100, high, H0)
    assert says(target, source) == (-1, 51)
    assert says(source, target) == (1, 71)


def test_rules_51_and_71_before_protocol_96() -> None:
    target, source = UuidSet(A, 0, H0, H1), UuidSet(X, Y, A, H0 | 1)
    for apv, expected in ((95, (-1, 51)), (91, (-1, 51)), (90, (-1091, 51)), (96, (-2, 60))):
        assert says(target, source, apv=apv) == expected
    for apv, expected in ((95, (1, 71)), (91, (1, 71)), (90, (-1091, 71)), (96, (2, 80))):
        assert says(source, target, apv=apv) == expected
    other = replace(target, history0=Z)
    assert says(other, source, apv=95) == (-2, 60)
    assert says(source, other, apv=95) == (2, 80)


@pytest.mark.parametrize("slots", [{"history0": A}, {"history1": A | 1}])
def test_rules_60_and_80_further_behind(slots: dict[str, int]) -> None:
    old = UuidSet(A, 0, Z, Z)
    new = replace(UuidSet(X, B, H0, H1), **slots)
    assert says(old, new) == (-2, 60)
    assert says(new, old) == (2, 80)


def test_rule_90_both_went_on_alone() -> None:
    assert says(UuidSet(X, B, H0, H1), UuidSet(Y, B | 1, Z, Z)) == (100, 90)


@pytest.mark.parametrize("bitmap", [0, 1])
def test_rule_90_does_not_count_empty_bitmap_slots(bitmap: int) -> None:
    assert says(UuidSet(X, bitmap, H0, H1), UuidSet(Y, 0, Z, Z)) == (-1000, 100)


@pytest.mark.parametrize(("own", "peer"), [
    ((H0, Z), (H0, Y)), ((H0, Z), (Y, H0)), ((Z, H0), (H0 | 1, Y)), ((Z, H0), (Y, H0)),
])  # fmt: skip
def test_rule_100_common_history(own: tuple[int, int], peer: tuple[int, int]) -> None:
    assert says(UuidSet(X, 0, *own), UuidSet(B, 0, *peer)) == (-100, 100)


def test_rule_100_matches_empty_slots_so_unrelated_young_disks_are_split_brain() -> None:
    assert says(UuidSet(X, 0, 0, 0), UuidSet(Y, 0, 0, 0)) == (-100, 100)
    assert says(UuidSet(X, 0, H0, 0), UuidSet(Y, 0, Z, 0)) == (-100, 100)


def test_nothing_in_common_is_unrelated() -> None:
    assert says(UuidSet(X, 0, H0, H1), UuidSet(Y, 0, Z, Z)) == (-1000, 100)
    assert says(UuidSet(X, 0, H0, H1), UuidSet(Y, 0, Z, 0)) == (-1000, 100), "one empty slot is not two"


# --------------------------------------------------------------- two nodes with a history of their own


@dataclass
class Pair:
    """Two nodes whose sets come about as real ones do; the ground for the mirror-image property."""

    sets: list[UuidSet]
    fresh_random: int = 0x100

    def random(self) -> int:
        self.fresh_random += 0x1001 << 8
        return self.fresh_random

    def step(self, what: str, n: int) -> None:
        own, peer = self.sets[n], self.sets[1 - n]
        if what == "generation" and own.bitmap == 0:
            self.sets[n] = own.new_current(self.random(), primary=True)
        elif what == "role":
            self.sets[n] = own.with_role(not own.current & 1)
        elif what == "lost":  # the sync UUID does not reach the target
            self.sets[n] = own.set_bitmap_with_history(own.sync_uuid(self.random()))
        elif what in ("started", "source ended", "target ended", "ended"):
            u = own.sync_uuid(self.random())
            source = own.set_bitmap_with_history(u)
            target = peer.become_target(u, False)
            if what in ("source ended", "ended"):
                source = source.clear_bitmap()
            if what in ("target ended", "ended"):
                target = target.after_sync_target(own, False)
            self.sets[n], self.sets[1 - n] = source, target


STEPS = st.tuples(
    st.sampled_from(["generation", "role", "lost", "started", "source ended", "target ended", "ended"]),
    st.integers(0, 1),
)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[UuidSet, UuidSet]:
    """Some syncs in the direction the rules name, then a last episode that may break anywhere."""
    pair = Pair([UuidSet(), UuidSet()])
    for what, n in draw(st.lists(STEPS, max_size=8)):
        if what not in ("generation", "role"):  # nobody syncs against the verdict
            value = compare(pair.sets[n], pair.sets[1 - n], facts()).value
            if value not in (1, 2):
                continue
        pair.step(what, n)
    return pair.sets[0], pair.sets[1]


@given(pairs(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(), st.booleans(),
       st.sampled_from([90, 95, 101]))  # fmt: skip
def test_the_two_nodes_reach_mirror_image_verdicts(
    sets: tuple[UuidSet, UuidSet], own_primary: bool, peer_primary: bool, own_crashed: bool,
    peer_crashed: bool, resolver: bool, wsame: bool, apv: int,
) -> None:  # fmt: skip
    f = CompareFacts(own_primary, peer_primary, own_crashed, peer_crashed, resolver, wsame, apv)
    here, there = compare(*sets, f), compare(sets[1], sets[0], mirrored(f))
    if abs(here.value) < 100:
        assert there.value == -here.value
        assert there.own == here.peer and there.peer == here.own, "corrections are mirrored too"
    else:
        assert there.value == here.value


# -------------------------------------------------------------------------------------- the documents


def test_the_table_names_every_rule_in_order() -> None:
    rows = [line.split("|")[1].strip() for line in uuids.rules_table().splitlines()[2:]]
    numbers = [int(cell) for cell in rows if cell]
    assert numbers == [10, 20, 30, 34, 36, 35, 37, 40, 41, 40, 40, 40, 50, 51, 60, 70, 71, 80, 90, 100, 100]


# --------------------------------------------------------------------------------------- md flags

P, S, U = Role.PRIMARY, Role.SECONDARY, Role.UNKNOWN
C, D = ConnState, DiskState
UP, INC, OUT, UNK = D.UP_TO_DATE, D.INCONSISTENT, D.OUTDATED, D.D_UNKNOWN


@pytest.mark.parametrize(("state", "crashed", "old", "flags"), [
    (State(S, U, C.WF_CONNECTION, INC, UNK), False, 0x80, 0x00),  # up, the peer not there
    (State(S, S, C.CONNECTED, INC, INC), False, 0x00, 0x24),
    (State(P, S, C.SYNC_SOURCE, UP, INC), False, 0x24, 0x37),
    (State(S, P, C.SYNC_TARGET, INC, UP), False, 0x24, 0x04),
    (State(P, S, C.CONNECTED, UP, UP), False, 0x37, 0x17),
    (State(S, P, C.CONNECTED, UP, UP), False, 0x04, 0x15),
    (State(P, U, C.STAND_ALONE, UP, UNK), False, 0x17, 0x13),
    (State(S, U, C.WF_CONNECTION, UP, UNK), False, 0x15, 0x11),
    (State(S, U, C.STAND_ALONE, UP, UNK), True, 0x97, 0x51),  # attached after a crash
    (State(S, P, C.WF_BITMAP_T, OUT, UP), False, 0x11, 0x05),
    (State(S, U, C.WF_REPORT_PARAMS, OUT, UNK), False, 0x11, 0x01),
    (State(P, U, C.STAND_ALONE, UP, UNK), True, 0x51, 0x53),
    (State(P, S, C.SYNC_TARGET, INC, UP), False, 0x17, 0x06),  # invalidate-remote by the Secondary
    (State(P, U, C.WF_CONNECTION, UP, OUT), False, 0x17, 0x33),
    (State(S, P, C.CONNECTED, UP, D.DISKLESS), False, 0x15, 0x17),  # the only disk of a diskless Primary
    (State(S, P, C.CONNECTED, UP, D.NEGOTIATING), False, 0x15, 0x17),
    (State(P, S, C.CONNECTED, UP, UP), False, 0x8000_0108, 0x8000_011F),  # kept: what is not a state
])  # fmt: skip
def test_metadata_flags_follow_the_state(state: State, crashed: bool, old: int, flags: int) -> None:
    assert md_flags(state, crashed, old) == flags
