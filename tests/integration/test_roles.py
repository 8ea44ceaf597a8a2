"""Promotion and demotion with clients about: refused, forced, and by themselves."""

from __future__ import annotations

import pytest
from tandem.tools.demo_nbd import ConnectionLost, Nbd, NbdRefused, write
from tandem.tools.demo_pair import Pair

from tests.conftest import NewPair

BLOCK = 4096


def test_a_demotion_ends_the_clients_sessions_only_when_forced(pair: Pair) -> None:
    with Nbd(pair.first.socket, "r0") as nbd:
        nbd.one(write(0, b"a" * BLOCK))
        refused = pair.run(pair.first, "secondary", "r0")
        assert refused.returncode == 11 and "(-12) Device is held open by someone" in refused.stderr
        assert "secondary --force" in refused.stderr, "what to do"
        nbd.one(write(0, b"b" * BLOCK))
        pair.adm(pair.first, "secondary", "--force", "r0")
        with pytest.raises(ConnectionLost):
            nbd.one(write(0, b"c" * BLOCK))
    assert pair.status(pair.first).role == "Secondary"
    pair.adm(pair.second, "primary", "r0")
    with Nbd(pair.second.socket, "r0") as nbd:
        assert nbd.read(0, BLOCK) == b"b" * BLOCK, "what was answered"


# --------------------------------------------------------------------------------------- auto-promote


def role(pair: Pair, which: int) -> str:
    return pair.status(pair.nodes[which]).role


def test_auto_promote_follows_the_clients(new_pair: NewPair) -> None:
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    pair.adm(pair.first, "secondary", "r0")
    for node, text in ((pair.second, b"b"), (pair.first, b"a")):
        with Nbd(node.socket, "r0") as nbd, Nbd(node.socket, "r0"):
            nbd.one(write(0, text * BLOCK))
            assert pair.status(node).role == "Primary"
        pair.wait(node, "demoted", lambda status: status.role == "Secondary")
    assert "auto-promote" not in pair.run(pair.first, "dump", "r0").stderr, "not a warning any more"


def test_auto_promote_says_why_it_can_not(new_pair: NewPair) -> None:
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    with pytest.raises(NbdRefused, match="alice is Primary"):
        Nbd(pair.second.socket, "r0")
    assert "Multiple primaries not allowed by config" in pair.second.log
    assert [role(pair, 0), role(pair, 1)] == ["Primary", "Secondary"]


def test_an_explicit_promotion_outlasts_the_clients(new_pair: NewPair) -> None:
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    with Nbd(pair.first.socket, "r0") as nbd:
        nbd.one(write(0, b"a" * BLOCK))
    with Nbd(pair.first.socket, "r0") as nbd:
        assert nbd.read(0, BLOCK) == b"a" * BLOCK
    assert role(pair, 0) == "Primary"
