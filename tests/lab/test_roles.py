"""The table of docs/roles.md, asked of a kernel and of Tandem: the same exit code and refusal in the same situation.

Not asked is what a kernel calls done without doing it: `outdate` while connected, `invalidate` without a disk. Tandem
refuses them.
"""

from __future__ import annotations

import pytest
from tandem.repl.errors import Refusal

from tests.role_table import AS_PRIMARY, AS_SECONDARY, Situation, answer

from .nodes import RES, Node, wait_state
from .pair import Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


def ask(node: Node, situations: tuple[Situation, ...], says: str, command: str, force: bool = False) -> None:
    """Give *node*, which is in the situation of that name, the command; it must answer as the table says."""
    (situation,) = [s for s in situations if s.says == says]
    expected = answer(situation, command, {"force": True} if force else {})
    ran = node.adm(command, *(["--force"] if force else []), RES, check=False)
    said = f"{node.name} in '{says}': {command}{' --force' if force else ''}: {ran}"
    if isinstance(expected, Refusal):
        assert ran.rc == expected.exit_code, said
        if command != "outdate":  # drbdadm hands a refusal of that one to drbdmeta, whose words these are then
            assert f"({expected.code})" in ran.err + ran.out and expected.text in ran.err + ran.out, said
    else:
        assert ran.rc == 0, said


@SIDES
def test_fresh_disks(pair: Pair, side: str) -> None:
    """Promotion, outdate and demotion with disks that were never in sync."""
    pair.start()
    node = pair.node(side)
    ask(node, AS_SECONDARY, "connected, disk fresh on both", "primary")
    node.adm("disconnect", RES)
    wait_state(node, cs="StandAlone")
    ask(node, AS_SECONDARY, "alone, Inconsistent", "primary")
    ask(node, AS_SECONDARY, "alone, Inconsistent", "outdate")
    ask(node, AS_SECONDARY, "alone, Inconsistent", "primary", force=True)
    ask(node, AS_PRIMARY, "StandAlone", "secondary")


@SIDES
def test_connected(pair: Pair, side: str) -> None:
    """Promotion and demotion while connected: good disks, a Primary peer, one disk missing, both missing."""
    pair.start("net { verify-alg crc32c; }", sync="clear")
    node = pair.node(side)
    other = pair.other(node)
    ask(node, AS_SECONDARY, "connected, both disks good", "primary")
    ask(other, AS_SECONDARY, "the peer is Primary", "primary")
    ask(node, AS_PRIMARY, "connected, both disks good", "secondary")
    other.adm("detach", RES)
    wait_state(node, pdsk="Diskless")
    ask(node, AS_SECONDARY, "connected, no disk at the peer", "primary")
    ask(node, AS_PRIMARY, "connected, no disk at the peer", "detach")
    ask(node, AS_PRIMARY, "connected, no disk at the peer", "secondary")
    ask(other, AS_SECONDARY, "connected, no disk here", "primary")
    ask(other, AS_PRIMARY, "connected, no disk here", "secondary")
    node.adm("detach", RES)
    wait_state(node, disk="Diskless", pdsk="Diskless")
    ask(node, AS_SECONDARY, "connected, no disk on either", "primary")
    ask(node, AS_SECONDARY, "connected, no disk on either", "primary", force=True)


@SIDES
def test_alone(pair: Pair, side: str) -> None:
    """What a node without its peer may do: good disk, Outdated, no disk."""
    pair.start("net { verify-alg crc32c; }", sync="clear")
    node = pair.node(side)
    node.adm("disconnect", RES)
    wait_state(node, cs="StandAlone")
    ask(node, AS_SECONDARY, "StandAlone, good disk", "verify")
    ask(node, AS_SECONDARY, "StandAlone, good disk", "primary")
    ask(node, AS_PRIMARY, "StandAlone", "outdate")
    ask(node, AS_PRIMARY, "StandAlone", "detach")
    ask(node, AS_PRIMARY, "StandAlone", "invalidate")
    ask(node, AS_PRIMARY, "StandAlone", "secondary")
    ask(node, AS_SECONDARY, "StandAlone, good disk", "outdate")
    ask(node, AS_SECONDARY, "StandAlone, Outdated", "primary")
    ask(node, AS_SECONDARY, "StandAlone, Outdated", "primary", force=True)
    ask(node, AS_PRIMARY, "StandAlone", "secondary")
    node.adm("detach", RES)
    wait_state(node, disk="Diskless")
    ask(node, AS_SECONDARY, "alone, no disk", "primary")
    ask(node, AS_SECONDARY, "alone, no disk", "primary", force=True)


@SIDES
def test_fencing_resource_only(pair: Pair, side: str) -> None:
    """Alone with fencing: what the handler says decides."""
    pair.start("disk { fencing resource-only; } handlers { fence-peer \"/bin/sh -c 'exit 1'\"; }", sync="clear")
    node = pair.node(side)
    node.adm("disconnect", "--force", RES)
    wait_state(node, cs="StandAlone")
    ask(node, AS_SECONDARY, "alone, good disk, fencing, the handler fails", "primary")
    ask(node, AS_SECONDARY, "alone, good disk, fencing, the handler fails", "primary", force=True)
