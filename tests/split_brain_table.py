"""What the after-split-brain policies make of a split brain, as tables: `decide` is asked, its answers written down."""

from __future__ import annotations

from typing import Any, Final

from tandem.repl.config import AfterSb
from tandem.repl.decision import DecisionFacts, decide
from tandem.repl.states import DiskState
from tandem.repl.uuids import CompareFacts, UuidSet

_SHARED: Final = 0x1AD331CBB4784384
_ALICE: Final = UuidSet(0xA000, _SHARED, 0, 0)
_BOB: Final = UuidSet(0xB000, _SHARED, 0, 0)

# The histories of alice and bob: how many blocks each changed alone, and who was Primary when they parted.
_HISTORIES: Final = (
    ("only bob changed something", 0, 5, False),
    ("alice changed less", 3, 5, False),
    ("both changed equally much", 5, 5, False),
    ("nobody changed anything", 0, 0, False),
    ("alice changed more, and was Primary before they parted", 5, 3, True),
)
_ZERO: Final = (
    AfterSb.DISCONNECT, AfterSb.DISCARD_YOUNGER_PRIMARY, AfterSb.DISCARD_OLDER_PRIMARY, AfterSb.DISCARD_ZERO_CHANGES,
    AfterSb.DISCARD_LEAST_CHANGES, AfterSb.DISCARD_LOCAL, AfterSb.DISCARD_REMOTE,
)  # fmt: skip
_ONE: Final = (
    AfterSb.DISCONNECT, AfterSb.CONSENSUS, AfterSb.VIOLENTLY_AS0P, AfterSb.DISCARD_SECONDARY,
    AfterSb.CALL_PRI_LOST_AFTER_SB,
)  # fmt: skip
_TWO: Final = (AfterSb.DISCONNECT, AfterSb.VIOLENTLY_AS0P, AfterSb.CALL_PRI_LOST_AFTER_SB)


def _facts(
    own_bits: int, peer_bits: int, was_primary: bool, n_primaries: int, **policies: Any
) -> DecisionFacts:
    """alice decides; she is the one Primary when there is one, and bob the resolver."""
    own = UuidSet(_ALICE.current, _SHARED | was_primary, 0, 0)
    good = DiskState.UP_TO_DATE
    compare = CompareFacts(
        own_primary=n_primaries > 0, peer_primary=n_primaries > 1, own_crashed=False, peer_crashed=False,
        resolver=False, wsame=True,
    )  # fmt: skip
    return DecisionFacts(own, _BOB, compare, good, good, own_bits, peer_bits, **policies)


def _cell(f: DecisionFacts) -> str:
    d = decide(f)
    if d.value == -100:
        return "–"
    words = "alice" if d.value < 0 else "bob"
    if d.demote_self:
        return f"{words}, once it is Secondary"
    return words if not d.abort else f"{words}: refused, see rr-conflict"


def _word(policy: AfterSb) -> str:
    return policy.name.lower().replace("_", "-")


def _table(head: str, columns: tuple[AfterSb, ...], rows: list[tuple[str, list[str]]]) -> str:
    lines = [f"| {head} | {' | '.join(_word(c) for c in columns)} |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)]) + "\n"


def split_brain_tables() -> str:
    """The tables of docs/split-brain.md."""
    zero = [
        (says, [_cell(_facts(own, peer, was, 0, after_sb_0pri=policy)) for policy in _ZERO])
        for says, own, peer, was in _HISTORIES
    ]
    subs = (AfterSb.DISCARD_LOCAL, AfterSb.DISCARD_REMOTE, AfterSb.DISCONNECT)
    names = ("after-sb-0pri would discard alice's", "after-sb-0pri would discard bob's", "after-sb-0pri says nothing")
    one, two = (
        [
            (name, [
                _cell(_facts(1, 1, False, n, after_sb_0pri=sub, **{f"after_sb_{n}pri": policy}))
                for policy in policies
            ])
            for sub, name in zip(subs, names, strict=True)
        ]
        for n, policies in ((1, _ONE), (2, _TWO))
    )  # fmt: skip
    fenced = [
        (says, [{"self": "alice", "peer": "bob", "": "–"}[decide(_facts(own, peer, was, n)).yields]
                for n in (0, 1, 2)])
        for says, own, peer, was in _HISTORIES
    ]  # fmt: skip
    heads = "| histories | nobody is Primary (nothing is fenced) | alice is Primary | both are Primary |"
    return "\n".join([
        "## after-sb-0pri: nobody is Primary\n", _table("histories", _ZERO, zero),
        "## after-sb-1pri: alice is Primary\n", _table("and", _ONE, one),
        "## after-sb-2pri: both are Primary\n", _table("and", _TWO, two),
        "## Unresolved, and fencing is configured: who yields\n",
        "\n".join([heads, "|---|---|---|---|", *(f"| {says} | {' | '.join(cells)} |" for says, cells in fenced)]),
    ])  # fmt: skip
