"""From two sets of generation UUIDs to a direction: who resyncs whom, or why nobody does.

`decide` runs when the peer's state arrives on a new connection, when a disk is attached while connected
and when a resync is announced. Both nodes run it on the same inputs and reach mirror-image results; no
word about the result is exchanged. It is pure: what must happen (helpers to call, demotion to try, bits to
set) is named in the `Decision`, in order, and the machine does it.

Relies on `uuids.compare` for the verdict, and on `config.AfterSb` for the after-split-brain policies.

Source: drbd_receiver.c (drbd_sync_handshake, drbd_asb_recover_0p, _1p, _2p).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from .config import AfterSb
from .states import ConnState, DiskState
from .uuids import (
    NEEDS_APV_91,
    NEEDS_WSAME,
    SPLIT_BRAIN_HARD,
    UNRELATED,
    CompareFacts,
    UuidSet,
    compare,
)

_UNSOLVED: Final = SPLIT_BRAIN_HARD


@dataclass(frozen=True, slots=True)
class DecisionFacts:
    """Everything the decision depends on; the configuration is this node's.

    A disk that is Negotiating is given by the state found in its metadata (*my_disk*), the peer's by its
    translation: Inconsistent or Consistent (*peer_disk*). *own_bits* and *peer_bits* are the counts both
    sides sent in P_UUIDS, not the present ones. *demotion_failed*: an earlier decision asked to
    demote this node (`Decision.demote_self`) and that was refused.
    """

    own: UuidSet
    peer: UuidSet
    compare: CompareFacts
    my_disk: DiskState
    peer_disk: DiskState
    own_bits: int = 0
    peer_bits: int = 0
    own_discard: bool = False
    peer_discard: bool = False
    own_tentative: bool = False
    peer_tentative: bool = False
    after_sb_0pri: AfterSb = AfterSb.DISCONNECT
    after_sb_1pri: AfterSb = AfterSb.DISCONNECT
    after_sb_2pri: AfterSb = AfterSb.DISCONNECT
    always_asbp: bool = False
    rr_conflict: str = "disconnect"
    own_negotiating: bool = False  # *my_disk* is only what attach found
    demotion_failed: bool = False

    @property
    def n_primaries(self) -> int:
        return self.compare.own_primary + self.compare.peer_primary


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows. *conn* None means abort, and *abort* says why in one sentence.

    *split_brain*: the two histories diverged, solved or not. *helpers* are to be called in this order.
    *demote_self*: the policy chose the peer's data, provided that this node can be demoted first; try that
    before anything else of the decision, and if it is refused decide again with ``demotion_failed``.
    *yields*: when both nodes want to go on and can not together, who is to be fenced if anybody is ("self" or
    "peer"): after an unresolved split brain, and of a Primary that should take the peer's data.
    *own* and *peer* replace both sets, also after an abort. *log* does not repeat the sentence of *abort*.
    """

    value: int
    rule: int
    conn: ConnState | None
    abort: str
    full_sync: bool
    split_brain: bool
    helpers: tuple[str, ...]
    demote_self: bool
    own: UuidSet
    peer: UuidSet
    log: tuple[str, ...]
    yields: str = ""


# ----------------------------------------------------------------------------- the automatic policies


@dataclass(frozen=True, slots=True)
class _Policy:
    """A policy's answer. -1: our data is discarded, +1: the peer's, -100: not solved."""

    value: int
    log: str = ""
    demote_self: bool = False
    helper: str = ""


def _tie(f: DecisionFacts) -> int:
    return -1 if f.compare.resolver else 1


def _zero_changes(f: DecisionFacts) -> int:
    if f.own_bits == f.peer_bits == 0:
        return _tie(f)
    if f.peer_bits == 0:
        return 1
    return -1 if f.own_bits == 0 else _UNSOLVED


def _least_changes(f: DecisionFacts) -> int:
    if f.own_bits == f.peer_bits:
        return _tie(f)
    return -1 if f.own_bits < f.peer_bits else 1


def _misconfigured(name: str, policy: AfterSb) -> _Policy:
    return _Policy(_UNSOLVED, f"Configuration error: {name} can not be {_word(policy)}")


def _word(policy: AfterSb) -> str:
    return policy.name.lower().replace("_", "-")


def _solve_0pri(f: DecisionFacts) -> _Policy:
    """after-sb-0pri; the other two use it as their sub-decision."""
    was_primary, peer_was_primary = f.own.bitmap & 1, f.peer.bitmap & 1
    match f.after_sb_0pri:
        case AfterSb.DISCONNECT:
            return _Policy(_UNSOLVED)
        case AfterSb.DISCARD_YOUNGER_PRIMARY | AfterSb.DISCARD_OLDER_PRIMARY as policy:
            # Who was Primary when the split happened has been Primary for longer.
            if was_primary != peer_was_primary:
                older_is_own = was_primary == 1
                keep_older = policy is AfterSb.DISCARD_YOUNGER_PRIMARY
                return _Policy(1 if older_is_own == keep_older else -1)
            value = _zero_changes(f)
            said = f"{_word(policy)} found no decision, using discard-least-changes instead"
            return _Policy(_least_changes(f) if value == _UNSOLVED else value, said)
        case AfterSb.DISCARD_ZERO_CHANGES:
            return _Policy(_zero_changes(f))
        case AfterSb.DISCARD_LEAST_CHANGES:
            return _Policy(_least_changes(f))
        case AfterSb.DISCARD_LOCAL:
            return _Policy(-1)
        case AfterSb.DISCARD_REMOTE:
            return _Policy(1)
        case other:
            return _misconfigured("after-sb-0pri", other)


def _solve_by_demotion(f: DecisionFacts) -> _Policy:
    """call-pri-lost-after-sb: the Primary whose data is to be discarded must give up its role."""
    sub = _solve_0pri(f)
    if sub.value != -1 or not f.compare.own_primary:
        return sub
    if f.demotion_failed:
        return _Policy(_UNSOLVED, "This Primary could not be demoted", helper="pri-lost-after-sb")
    return _Policy(-1, sub.log, demote_self=True)


def _solve_1pri(f: DecisionFacts) -> _Policy:
    own_primary = f.compare.own_primary
    match f.after_sb_1pri:
        case AfterSb.DISCONNECT:
            return _Policy(_UNSOLVED)
        case AfterSb.CONSENSUS:
            sub = _solve_0pri(f)
            keeps_primary = sub.value == (1 if own_primary else -1)
            return sub if keeps_primary else _Policy(_UNSOLVED, sub.log)
        case AfterSb.VIOLENTLY_AS0P:
            return _solve_0pri(f)
        case AfterSb.DISCARD_SECONDARY:
            return _Policy(1 if own_primary else -1)
        case AfterSb.CALL_PRI_LOST_AFTER_SB:
            return _solve_by_demotion(f)
        case other:
            return _misconfigured("after-sb-1pri", other)


def _solve_2pri(f: DecisionFacts) -> _Policy:
    match f.after_sb_2pri:
        case AfterSb.DISCONNECT:
            return _Policy(_UNSOLVED)
        case AfterSb.VIOLENTLY_AS0P:
            return _solve_0pri(f)
        case AfterSb.CALL_PRI_LOST_AFTER_SB:
            return _solve_by_demotion(f)
        case other:
            return _misconfigured("after-sb-2pri", other)


_SOLVERS: Final = (_solve_0pri, _solve_1pri, _solve_2pri)  # by the number of Primaries


# ------------------------------------------------------------------------------------- the decision


@dataclass(slots=True)
class _Draft:
    """A decision in the making; lives only inside one `decide`."""

    value: int
    log: list[str]
    split_brain: bool = False
    helpers: list[str] = field(default_factory=list)
    demote_self: bool = False
    abort: str = ""
    yields: str = ""


def decide(f: DecisionFacts) -> Decision:
    """The direction of the resync, no resync, or an abort. Pure and total."""
    verdict = compare(f.own, f.peer, f.compare)
    draft = _Draft(verdict.value, _introduce(f, verdict.value, verdict.rule))
    draft.abort = _hopeless(verdict.value)
    if not draft.abort:
        _heed_disks(f, draft)
        if abs(draft.value) == 100:
            _solve_split_brain(f, draft)
    if not draft.abort:
        _check_direction(f, draft)
    if not draft.abort and (f.own_tentative or f.peer_tentative):
        _describe_dry_run(draft)
    conn = None if draft.abort else _conn(draft.value)
    if draft.value == 0 and not draft.abort and f.own_bits:
        draft.log.append(f"No resync, but {f.own_bits} bits in bitmap!")
    return Decision(
        draft.value, verdict.rule, conn, draft.abort, conn is not None and abs(draft.value) == 2,
        draft.split_brain, tuple(draft.helpers), conn is not None and draft.demote_self,
        verdict.own, verdict.peer, tuple(draft.log), draft.yields,
    )  # fmt: skip


def _introduce(f: DecisionFacts, value: int, rule: int) -> list[str]:
    own_flags = f.own_discard | f.compare.own_crashed << 1
    peer_flags = f.peer_discard | f.compare.peer_crashed << 1
    return [
        "drbd_sync_handshake:",
        f"self {f.own} bits:{f.own_bits} flags:{own_flags:X}",
        f"peer {f.peer} bits:{f.peer_bits} flags:{peer_flags:X}",
        f"uuid_compare()={value} by rule {rule}",
    ]


def _hopeless(value: int) -> str:
    """The sentence for a verdict that ends everything; empty for the others."""
    return {
        UNRELATED: "The two disks hold unrelated data; to give one of them up, create its metadata anew",
        NEEDS_APV_91: "The direction of the resync can be told with protocol 91 or newer only; "
        "upgrade the older node",
        NEEDS_WSAME: "A Primary meets its former self after a crash; both nodes need protocol 101 and the "
        "feature WRITE_SAME to tell the direction of the resync",
    }.get(value, "")


def _heed_disks(f: DecisionFacts, draft: _Draft) -> None:
    """An Inconsistent disk can not be the source for a better one, whatever the UUIDs say."""
    bad = DiskState.INCONSISTENT
    peer_better = f.my_disk is bad and f.peer_disk > bad
    own_better = f.peer_disk is bad and f.my_disk > bad
    if peer_better or own_better:
        full = draft.value == SPLIT_BRAIN_HARD or abs(draft.value) == 2
        draft.value = (1 if own_better else -1) * (2 if full else 1)
        draft.log.append(f"The disk states decide. {_sync_from(draft.value)}")


def _solve_split_brain(f: DecisionFacts, draft: _Draft) -> None:
    """Automatic policies first, then discard-my-data; what neither solves is an abort."""
    draft.split_brain = True
    draft.helpers.append("initial-split-brain")
    ambiguous = draft.value == SPLIT_BRAIN_HARD
    if not ambiguous or f.always_asbp:
        _apply_policy(f, draft, full=ambiguous)
    if draft.value == _UNSOLVED and f.own_discard != f.peer_discard:
        draft.value = -1 if f.own_discard else 1
        draft.log.append(f"Split-Brain detected, manually solved. {_sync_from(draft.value)}")
    if draft.value == _UNSOLVED:
        draft.abort = "Split-Brain detected but unresolved, dropping connection!"
        draft.helpers.append("split-brain")
        draft.yields = _yields(f)


def _yields(f: DecisionFacts) -> str:
    """Who is to give way, the same on both nodes: not the only Primary; else what after-sb-0pri says; else who
    changed fewer blocks. Being fenced takes no data away, it only ends the writing."""
    if f.demotion_failed:
        return "self"  # a policy has decided for the peer
    if f.n_primaries == 1:
        return "peer" if f.compare.own_primary else "self"
    said = _solve_0pri(f).value
    return "self" if (_least_changes(f) if said == _UNSOLVED else said) < 0 else "peer"


def _apply_policy(f: DecisionFacts, draft: _Draft, *, full: bool) -> None:
    policy = _SOLVERS[f.n_primaries](f)
    draft.value, draft.demote_self = policy.value, policy.demote_self
    if policy.log:
        draft.log.append(policy.log)
    if policy.helper:
        draft.helpers.append(policy.helper)
    if policy.value == _UNSOLVED:
        return
    solved = f"automatically solved with primaries: {f.n_primaries}"
    draft.log.append(f"Split-Brain detected, {solved}. {_sync_from(draft.value)}")
    if full:
        draft.value *= 2
        draft.log.append("Full sync, because no bitmap goes back to where the histories parted")


def _sync_from(value: int) -> str:
    return f"Sync from {'peer' if value < 0 else 'this'} node"


def _check_direction(f: DecisionFacts, draft: _Draft) -> None:
    """Whether the two ends of the direction can play their parts."""
    if draft.value > 0 and f.my_disk <= DiskState.INCONSISTENT:
        draft.abort = "This node should become SyncSource, but its disk is Inconsistent or worse"
        return
    # A disk that is still Negotiating has shown nothing to anybody, so replacing it takes nothing away;
    # and who is demoted first is no Primary any more.
    shown = f.my_disk >= DiskState.CONSISTENT and not f.own_negotiating
    if draft.value >= 0 or not f.compare.own_primary or draft.demote_self or not shown:
        return
    if f.rr_conflict == "violently":
        draft.log.append("rr-conflict violently: the data of this Primary changes under its users")
        return
    if f.rr_conflict == "call-pri-lost":
        draft.helpers.append("pri-lost")
    draft.yields = "self"  # the peer takes over the connection that follows, and finds it lost
    draft.abort = "This node should become SyncTarget, but it is Primary with good data (see rr-conflict)"


def _describe_dry_run(draft: _Draft) -> None:
    conn = _conn(draft.value)
    if conn is ConnState.CONNECTED:
        would = "no resync, both nodes would be Connected at once"
    else:
        side = "SyncSource" if draft.value > 0 else "SyncTarget"
        kind = "full" if abs(draft.value) == 2 else "bitmap based"
        would = f"this node would become {side} of a {kind} resync"
    draft.abort = f"Dry run: {would}"


def _conn(value: int) -> ConnState:
    if value == 0:
        return ConnState.CONNECTED
    return ConnState.WF_BITMAP_S if value > 0 else ConnState.WF_BITMAP_T


# ---------------------------------------------------------------------------------------- the abort


class AbortOutcome(Enum):
    """What an abort does to this node."""

    FAIL_ATTACH = "own disk Failed, then Diskless; the connection stays"
    PEER_DISKLESS = "the peer's attach fails likewise: its disk is Diskless for us, stay Connected"
    RECONNECT = "ProtocolError, and try again: the peer only rehearsed"
    STAND_ALONE = "StandAlone"


def abort_outcome(*, own_negotiating: bool, peer_negotiating: bool, peer_tentative: bool) -> AbortOutcome:
    """Where an abort leads, depending on whose disk is Negotiating and on the peer's dry run."""
    if own_negotiating:
        return AbortOutcome.FAIL_ATTACH
    if peer_negotiating:
        return AbortOutcome.PEER_DISKLESS
    return AbortOutcome.RECONNECT if peer_tentative else AbortOutcome.STAND_ALONE
