"""Generation UUIDs: how they move, and what two sets of them say about two disks.

Four 64-bit values per volume name the generations of its data: the current one, the one the bitmap
counts from, and two older ones. This module makes every move (new generation, start and end of a
resync) and holds the one comparison that tells which node has the newer data. `compare` names the rule
that fired; what follows from its verdict is `decision.decide`. The metadata flags, which are a function of
the volume's state, are computed here too, because they decide the same things after a crash.

Relies on `states` only. Bit 0 of a UUID is no part of its identity: in the current UUID it says "this
node is Primary", in an older slot "was Primary when that generation ended".

Source: drbd_main.c (drbd_uuid_new_current, drbd_uuid_set, drbd_uuid_set_bm, drbd_md_sync),
drbd_receiver.c (drbd_uuid_compare), drbd_state.c (_drbd_set_state).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from .states import ConnState, DiskState, Role, State

JUST_CREATED: Final = 4  # the current UUID of fresh metadata
SYNC_STEP: Final = 1 << 48  # a sync UUID is the bitmap UUID plus this
_MASK: Final = (1 << 64) - 1
_ROLE_BIT: Final = 1

# ------------------------------------------------------------------------------------------ the set


def _same(a: int, b: int) -> bool:
    """Whether two UUIDs name the same generation: equal in all bits but bit 0."""
    return (a ^ b) & ~_ROLE_BIT == 0


@dataclass(frozen=True, slots=True)
class UuidSet:
    """The four UUIDs of one volume on one node; 0 is an empty slot. Every method returns a new set."""

    current: int = JUST_CREATED
    bitmap: int = 0
    history0: int = 0  # the younger
    history1: int = 0

    def with_role(self, primary: bool) -> UuidSet:
        """Bit 0 of the current UUID brought in line with the role."""
        return self.set_current(self.current, primary)

    def set_current(self, value: int, primary: bool) -> UuidSet:
        """Plain assignment; bit 0 is forced to the role."""
        return replace(self, current=value | _ROLE_BIT if primary else value & ~_ROLE_BIT)

    def new_current(self, random64: int, primary: bool) -> UuidSet:
        """A new generation begins: the bitmap counts from the one that ends.

        An occupied bitmap slot is overwritten; a caller that must not lose it asks first.
        """
        return replace(self, bitmap=self.current).set_current(random64 & _MASK, primary)

    def set_bitmap_with_history(self, value: int) -> UuidSet:
        """Assign the bitmap UUID; what was there moves to the history (an empty slot does not)."""
        if self.bitmap == 0:
            return replace(self, bitmap=value)
        return UuidSet(self.current, value, self.bitmap, self.history0)

    def clear_bitmap(self) -> UuidSet:
        """Both sides agree again: the bitmap UUID moves to the history. Nothing to do when it is empty."""
        return self.set_bitmap_with_history(0)

    def forget_bitmap(self) -> UuidSet:
        """Empty the bitmap slot without a trace, as "skip initial sync" does on the commanding node."""
        return replace(self, bitmap=0)

    def sync_uuid(self, random64: int) -> int:
        """The UUID by which a resync from this set is known: the source stores it with
        `set_bitmap_with_history` and sends it in P_SYNC_UUID."""
        if self.bitmap in (0, JUST_CREATED):
            return random64 & _MASK
        return (self.bitmap + SYNC_STEP) & _MASK

    def become_source(self, sync_uuid: int, peer_current: int | None) -> UuidSet:
        """A resync begins: its UUID takes the bitmap slot.

        What was there moves to the history, but not when that would push out the very generation by which
        the target (*peer_current*) is known: attempts that it never hears of would make it a stranger.
        """
        if peer_current is not None and any(_same(peer_current, old) for old in (self.history0, self.history1)):
            return replace(self, bitmap=sync_uuid)
        return self.set_bitmap_with_history(sync_uuid)

    def become_target(self, sync_uuid: int, primary: bool) -> UuidSet:
        """The target received P_SYNC_UUID. Also how the peer of "skip initial sync" adopts the generation."""
        return self.forget_bitmap().set_current(sync_uuid, primary)

    def after_sync_target(self, peer: UuidSet, primary: bool) -> UuidSet:
        """The end of a resync without failed blocks, on the target.

        *peer* is the source's set as it was received before the sync; this set's current UUID is the
        sync UUID. The result equals the source's set after its `clear_bitmap`, bit 0 aside.
        """
        adopted = UuidSet(self.current, peer.bitmap, peer.history0, peer.history1)
        return adopted.set_bitmap_with_history(self.current).set_current(peer.current, primary).clear_bitmap()

    def __str__(self) -> str:
        """As the kernel logs it: CURRENT:BITMAP:HISTORY0:HISTORY1."""
        return f"{self.current:016X}:{self.bitmap:016X}:{self.history0:016X}:{self.history1:016X}"


# ----------------------------------------------------------------------------------- the comparison

SPLIT_BRAIN: Final = 100  # verdict: split brain for the automatic policies
SPLIT_BRAIN_HARD: Final = -100  # verdict: split brain without a common bitmap generation
UNRELATED: Final = -1000
NEEDS_APV_91: Final = -1091
FF_WSAME: Final = 4
NEEDS_WSAME: Final = -(0x10000 + 101 + (FF_WSAME << 8))  # protocol 101 and that feature flag


@dataclass(frozen=True, slots=True)
class CompareFacts:
    """What besides the two sets decides: roles, crash flags, tie-break, what was agreed with the peer."""

    own_primary: bool
    peer_primary: bool
    own_crashed: bool  # we were a crashed Primary
    peer_crashed: bool  # bit 1 of the flags in the peer's P_UUIDS
    resolver: bool  # we accepted the meta socket
    wsame: bool  # FF_WSAME is agreed
    apv: int = 101


@dataclass(frozen=True, slots=True)
class Verdict:
    """0: no resync. +1/-1: we become source/target. +2/-2: the same, with all bits set. ±100: split
    brain. Below: the constants above. *own* and *peer* are the sets after the rule's correction."""

    value: int
    rule: int
    own: UuidSet
    peer: UuidSet


_Test = Callable[[UuidSet, UuidSet, CompareFacts], bool]
_Value = Callable[[CompareFacts], int]
_Correct = Callable[[UuidSet], UuidSet]


def _as_is(uuids: UuidSet) -> UuidSet:
    return uuids


@dataclass(frozen=True, slots=True)
class _Rule:
    """One row. *when* is asked only if no earlier row matched."""

    number: int
    when: _Test
    value: int | _Value
    says: str
    result: str
    correct_own: _Correct = _as_is
    correct_peer: _Correct = _as_is
    correction: str = ""
    apv_min: int = 0  # below it the verdict is NEEDS_APV_91


def _undo_sync_uuid(uuids: UuidSet) -> UuidSet:
    """The set before a sync UUID that the target never received."""
    return replace(uuids, bitmap=uuids.history0, history0=uuids.history1)


def _missed_end(done: UuidSet, late: UuidSet) -> bool:
    """Whether *late* is what *done* was just before the end of a resync."""
    return _same(late.bitmap, done.history0) and _same(late.history0, done.history1)


def _sync_uuid_lost(target: UuidSet, source: UuidSet, apv: int) -> bool:
    """Whether *source* began a resync of which *target* never received the sync UUID."""
    if not _same(target.current, source.history0):
        return False
    if apv < 96:
        return _same(target.history0, source.history1)
    return _same((source.history0 & ~_ROLE_BIT) + SYNC_STEP & _MASK, source.bitmap)


def _in_history(value: int, uuids: UuidSet) -> bool:
    return _same(value, uuids.history0) or _same(value, uuids.history1)


def _common_history(own: UuidSet, peer: UuidSet) -> bool:
    """Whether any history slot matches. Two empty slots match as well: that is the kernel's rule, so
    unrelated young disks are reported as split brain, and both nodes must say the same."""
    return _in_history(own.history0, peer) or _in_history(own.history1, peer)


def _fresh(uuids: UuidSet) -> bool:
    return _same(uuids.current, JUST_CREATED)


def _fresh_or_empty(uuids: UuidSet) -> bool:
    return _fresh(uuids) or _same(uuids.current, 0)


def _equal_while_primary(facts: CompareFacts) -> int:
    if not facts.wsame:
        return NEEDS_WSAME
    if facts.own_primary and facts.peer_primary:
        return SPLIT_BRAIN_HARD
    return 1 if facts.own_primary else -1


def _both_crashed(facts: CompareFacts) -> int:
    return -1 if facts.resolver else 1


_FIRST: Final = (
    _Rule(10, lambda s, p, f: _fresh(s) and _fresh(p), 0, "own and peer current just created", "0"),
    _Rule(20, lambda s, p, f: _fresh_or_empty(s) and not _fresh(p), -2,
          "own current just created or empty, peer's not just created", "-2"),
    _Rule(30, lambda s, p, f: not _fresh(s) and _fresh_or_empty(p), 2,
          "peer's current just created or empty, own not just created", "+2"),
)  # fmt: skip

_EQUAL: Final = (
    _Rule(34, lambda s, p, f: p.bitmap == 0 != s.bitmap and _missed_end(p, s), 1,
          "peer's bitmap empty, own not; own bitmap = peer's history 0, own history 0 = peer's history 1",
          "+1", correct_own=UuidSet.clear_bitmap, apv_min=91,
          correction="own: bitmap moves to history (we missed the end of the resync)"),
    _Rule(36, lambda s, p, f: p.bitmap == 0 != s.bitmap, 1, "peer's bitmap empty, own not", "+1", apv_min=91),
    _Rule(35, lambda s, p, f: s.bitmap == 0 != p.bitmap and _missed_end(s, p), -1,
          "own bitmap empty, peer's not; own history 0 = peer's bitmap, own history 1 = peer's history 0",
          "-1", correct_peer=UuidSet.clear_bitmap, apv_min=91,
          correction="copy of the peer's: bitmap moves to history (the peer missed the end)"),
    _Rule(37, lambda s, p, f: s.bitmap == 0 != p.bitmap, -1, "own bitmap empty, peer's not", "-1",
          apv_min=91),
    _Rule(40, lambda s, p, f: not (f.own_crashed or f.peer_crashed), 0, "neither is a crashed Primary", "0"),
    _Rule(41, lambda s, p, f: f.own_primary or f.peer_primary, _equal_while_primary,
          "one is a crashed Primary, and one is Primary now",
          "needs FF_WSAME; both Primary -100, we +1, the peer -1"),
    _Rule(40, lambda s, p, f: f.own_crashed and f.peer_crashed, _both_crashed, "both are crashed Primaries",
          "resolver -1, else +1"),
    _Rule(40, lambda s, p, f: f.own_crashed, 1, "only we are a crashed Primary", "+1"),
    _Rule(40, lambda s, p, f: True, -1, "only the peer is a crashed Primary", "-1"),
)  # fmt: skip

_DIFFERENT: Final = (
    _Rule(50, lambda s, p, f: _same(s.current, p.bitmap), -1, "own current = peer's bitmap", "-1"),
    _Rule(51, lambda s, p, f: _sync_uuid_lost(s, p, f.apv), -1,
          "own current = peer's history 0, peer's bitmap is its sync UUID "
          "(protocol < 96: own history 0 = peer's history 1)", "-1",
          correct_peer=_undo_sync_uuid, apv_min=91,
          correction="copy of the peer's: history 0 back to bitmap (its sync UUID never reached us)"),
    _Rule(60, lambda s, p, f: _in_history(s.current, p), -2, "own current in the peer's history", "-2"),
    _Rule(70, lambda s, p, f: _same(s.bitmap, p.current), 1, "own bitmap = peer's current", "+1"),
    _Rule(71, lambda s, p, f: _sync_uuid_lost(p, s, f.apv), 1,
          "own history 0 = peer's current, own bitmap is its sync UUID "
          "(protocol < 96: own history 1 = peer's history 0)", "+1",
          correct_own=_undo_sync_uuid, apv_min=91,
          correction="own: history 0 back to bitmap (our sync UUID never arrived)"),
    _Rule(80, lambda s, p, f: _in_history(p.current, s), 2, "peer's current in our history", "+2"),
    _Rule(90, lambda s, p, f: _same(s.bitmap, p.bitmap) and not _same(s.bitmap, 0), SPLIT_BRAIN,
          "own bitmap = peer's bitmap, not empty", "+100"),
    _Rule(100, lambda s, p, f: _common_history(s, p), SPLIT_BRAIN_HARD,
          "a history slot equals one of the peer's (empty slots match too)", "-100"),
    _Rule(100, lambda s, p, f: True, UNRELATED, "nothing in common", "-1000"),
)  # fmt: skip


def _first_match(
    rules: tuple[_Rule, ...], own: UuidSet, peer: UuidSet, facts: CompareFacts
) -> Verdict | None:
    for rule in rules:
        if rule.when(own, peer, facts):
            if facts.apv < rule.apv_min:
                return Verdict(NEEDS_APV_91, rule.number, own, peer)
            value = rule.value if isinstance(rule.value, int) else rule.value(facts)
            return Verdict(value, rule.number, rule.correct_own(own), rule.correct_peer(peer))
    return None


def compare(own: UuidSet, peer: UuidSet, facts: CompareFacts) -> Verdict:
    """Compare our set with the peer's as last received: the first rule that matches decides.

    Pure; the two nodes reach mirror-image verdicts because each uses the same table on the same values.
    """
    second = _EQUAL if _same(own.current, peer.current) else _DIFFERENT
    verdict = _first_match(_FIRST, own, peer, facts) or _first_match(second, own, peer, facts)
    assert verdict is not None, "the last row of each table always matches"
    return verdict


def rules_table() -> str:
    """The rules as a markdown table, in the order in which they are asked."""
    lines = ["| rule | condition | verdict | correction |", "|---|---|---|---|"]
    sections = (("", _FIRST), ("current UUIDs equal", _EQUAL), ("current UUIDs differ", _DIFFERENT))
    for title, rules in sections:
        if title:
            lines.append(f"| | **{title}:** | | |")
        for r in rules:
            needs = f" (protocol {r.apv_min}+)" if r.apv_min else ""
            lines.append(f"| {r.number} | {r.says} | {r.result}{needs} | {r.correction} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------- the metadata flags

# drbd_int.h, enum MDF_*: the same numbers as metadata.MdFlag, plain here so that neither needs the other.
MD_CONSISTENT: Final = 0x001
MD_PRIMARY_IND: Final = 0x002
MD_CONNECTED_IND: Final = 0x004
MD_FULL_SYNC: Final = 0x008
MD_WAS_UP_TO_DATE: Final = 0x010
MD_PEER_OUT_DATED: Final = 0x020
MD_CRASHED_PRIMARY: Final = 0x040
MD_AL_CLEAN: Final = 0x080
MD_AL_DISABLED: Final = 0x100

_FROM_STATE: Final = (
    MD_CONSISTENT | MD_PRIMARY_IND | MD_CONNECTED_IND | MD_WAS_UP_TO_DATE | MD_PEER_OUT_DATED
    | MD_CRASHED_PRIMARY | MD_AL_CLEAN
)  # fmt: skip


def md_flags(state: State, crashed_primary: bool, old_flags: int) -> int:
    """The metadata flags that belong to *state*; FULL_SYNC, AL_DISABLED and unknown bits are kept.

    *crashed_primary* is the running mark, not the flag on disk. AL_CLEAN is always cleared: whoever
    changes state may write. Evaluated at every state change; a changed result must reach the disk.
    """
    peer_is_diskless_primary = state.pdsk < DiskState.INCONSISTENT and state.peer is Role.PRIMARY
    flags = old_flags & ~_FROM_STATE
    if crashed_primary:
        flags |= MD_CRASHED_PRIMARY
    if state.role is Role.PRIMARY or peer_is_diskless_primary:
        flags |= MD_PRIMARY_IND
    if state.conn > ConnState.WF_REPORT_PARAMS:
        flags |= MD_CONNECTED_IND
    if state.disk > DiskState.INCONSISTENT:
        flags |= MD_CONSISTENT
    if state.disk > DiskState.OUTDATED:
        flags |= MD_WAS_UP_TO_DATE
    if DiskState.INCONSISTENT <= state.pdsk <= DiskState.OUTDATED:
        flags |= MD_PEER_OUT_DATED
    return flags
