"""Every state that one node goes through is the counterpart of the other's, also those that pass quickly."""

from __future__ import annotations

import re

import pytest

from .nodes import RES, Node, wait_state
from .pair import MIB, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])
COUNTERPARTS = {
    "Connected": "Connected", "WFBitMapS": "WFBitMapT", "SyncSource": "SyncTarget", "PausedSyncS": "PausedSyncT",
    "StartingSyncS": "StartingSyncT", "VerifyS": "VerifyT",
}  # fmt: skip
COUNTERPARTS |= {theirs: ours for ours, theirs in COUNTERPARTS.items()}


def passed(node: Node) -> list[str]:
    """The connection states in a node's log that have a counterpart on the other node, in their order."""
    text = "\n".join(node.log())
    return [state for state in re.findall(r"conn\( \w+ -> (\w+) \)", text) if state in COUNTERPARTS]


def disks(node: Node, which: str) -> list[str]:
    """What a node's log says its disk (`disk`) or its peer's (`pdsk`) became of these two."""
    text = "\n".join(node.log())
    return re.findall(rf"\b{which}\( \w+ -> (Inconsistent|UpToDate) \)", text)


@SIDES
def test_every_state_has_its_counterpart(pair: Pair, side: str) -> None:
    """Connect, resync, pause, verify, invalidate: both logs tell the same story, each from its side."""
    pair.start("net { verify-alg crc32c; }\n  disk { resync-rate 1M; }", sync="clear")
    primary = pair.node(side)
    secondary = pair.other(primary)
    primary.adm("primary", RES)
    secondary.adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(0, 24 * MIB, seed=1)
    secondary.adm("connect", RES)
    wait_state(secondary, cs="SyncTarget")
    secondary.adm("pause-sync", RES)
    wait_state(primary, cs="PausedSyncS")
    pair.hurry()
    secondary.adm("resume-sync", RES)
    pair.in_sync()
    primary.adm("verify", RES)
    pair.in_sync()
    secondary.adm("invalidate", RES)
    pair.in_sync()
    assert passed(primary) == [COUNTERPARTS[state] for state in passed(secondary)]
    assert passed(primary)[-4:] == ["Connected", "StartingSyncS", "SyncSource", "Connected"]
    assert disks(primary, "pdsk")[-2:] == disks(secondary, "disk")[-2:] == ["Inconsistent", "UpToDate"]
