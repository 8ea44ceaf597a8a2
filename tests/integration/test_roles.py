"""Promotion and demotion with clients about: refused, forced, and by themselves."""

from __future__ import annotations

import fcntl
import subprocess

import pytest
from tandem.tools.demo_nbd import ConnectionLost, Nbd, NbdRefused, write
from tandem.tools.demo_pair import Pair

from tests.conftest import FindProgram, NewPair

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


def test_auto_promote_tells_a_client_the_refusal(new_pair: NewPair) -> None:
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    pair.adm(pair.first, "disconnect", "r0")
    pair.adm(pair.second, "outdate", "r0")
    with pytest.raises(NbdRefused, match=r"r0 is Secondary on bob\. Promote.* refused: Need access to UpToDate data\."):
        Nbd(pair.second.socket, "r0")


def test_who_only_asks_about_an_export_promotes_nobody(new_pair: NewPair, program: FindProgram) -> None:
    """On nodes that are alone a promotion begins a generation: looking at both would be a split brain."""
    nbdinfo = program("nbdinfo")
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    pair.adm(pair.first, "secondary", "r0")

    def generations() -> list[str]:
        return [pair.adm(node, "get-gi", "r0").partition(":")[0] for node in pair.nodes]

    before = generations()
    for node in pair.nodes:
        pair.adm(node, "disconnect", "r0")
        uri = f"nbd+unix://?socket={node.socket}"
        shown = subprocess.run([nbdinfo, "--list", "--json", uri], capture_output=True, text=True, check=True).stdout
        assert '"is_read_only": false' in shown, "as for who opens it"
    assert generations() == before
    assert [role(pair, 0), role(pair, 1)] == ["Secondary", "Secondary"]


def test_auto_promote_takes_turns_with_tandemadm(new_pair: NewPair) -> None:
    """What split-brain --keep has saved of a node is all that is there, until the peer's data replaces it."""
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    pair.adm(pair.first, "secondary", "r0")
    with open(pair.second.paths.lock("r0"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NbdRefused, match="tandemadm is changing r0"):
            Nbd(pair.second.socket, "r0")
        assert role(pair, 1) == "Secondary"
    with Nbd(pair.second.socket, "r0"):
        assert role(pair, 1) == "Primary"


def test_an_explicit_promotion_outlasts_the_clients(new_pair: NewPair) -> None:
    pair = new_pair(options="auto-promote yes;")
    pair.start()
    with Nbd(pair.first.socket, "r0") as nbd:
        nbd.one(write(0, b"a" * BLOCK))
    with Nbd(pair.first.socket, "r0") as nbd:
        assert nbd.read(0, BLOCK) == b"a" * BLOCK
    assert role(pair, 0) == "Primary"
