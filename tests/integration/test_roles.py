"""Promotion and demotion with clients about: refused, forced, and by themselves."""

from __future__ import annotations

import pytest
from tandem.tools.demo_nbd import ConnectionLost, Nbd, write
from tandem.tools.demo_pair import Pair

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
