"""Handshake, authentication, first synchronisation."""

from __future__ import annotations

import pytest

from .nodes import RES, UNCONFIGURED, wait_state
from .pair import Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


@SIDES
def test_initial_full_sync(pair: Pair, side: str) -> None:
    pair.start()
    assert pair.settled("Inconsistent", "Inconsistent").oos == 65496
    source = pair.node(side)
    source.adm("primary", "--force", RES)
    pair.in_sync()
    assert source.state().role == "Primary"
    kernel, tandem = pair.uuids()
    assert kernel == tandem
    assert pair.resync_counts() == [65496]


@SIDES
def test_skip_initial_sync(pair: Pair, side: str) -> None:
    pair.start(content="same")
    pair.node(side).adm("new-current-uuid", "--clear-bitmap", RES)
    pair.in_sync()
    kernel, tandem = pair.uuids()
    assert kernel == tandem
    assert pair.resync_counts() == []
