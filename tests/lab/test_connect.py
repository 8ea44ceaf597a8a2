"""Handshake, authentication, first synchronisation."""

from __future__ import annotations

import pytest

from .nodes import RES, wait, wait_state
from .pair import Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


@SIDES
def test_initial_full_sync(pair: Pair, side: str) -> None:
    """Fresh disks, one node is made Primary by force: everything is copied to the other."""
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
    """Equal disks are declared in sync with new-current-uuid --clear-bitmap: nothing is copied."""
    pair.start(content="same")
    pair.node(side).adm("new-current-uuid", "--clear-bitmap", f"{RES}/0")
    pair.in_sync()
    kernel, tandem = pair.uuids()
    assert kernel == tandem
    assert pair.resync_counts() == []


def hmac(secret: str) -> str:
    return f'net {{ cram-hmac-alg sha1; shared-secret "{secret}"; }}'


def refused_for_good(pair: Pair) -> None:
    """A node that finds a fault gives up; one whose sockets are torn down before it has read goes on dialling."""
    wait(pair.kernel, lambda s: "StandAlone" in (s.cs, pair.tandem.state().cs), "StandAlone, or the other")
    for node in (pair.kernel, pair.tandem):
        wait(node, lambda s: s.cs in ("StandAlone", "WFConnection"), "alone")


def test_right_secret(pair: Pair) -> None:
    """Both know the secret."""
    pair.start(hmac("the same"), sync="clear")
    pair.in_sync()


def test_wrong_secret(pair: Pair) -> None:
    """Both nodes find the other's answer wrong and give up; with the right secret they connect."""
    pair.prepare(hmac("one"), tandem_options=hmac("two"))
    pair.kernel.adm("up", RES)
    pair.tandem.adm("up", RES)
    refused_for_good(pair)
    pair.configure(hmac("one"))
    pair.tandem.adm("adjust", RES)
    pair.kernel.adm("adjust", RES)
    wait_state(pair.kernel, cs="Connected")


def test_wrong_protocol_letter(pair: Pair) -> None:
    """Protocol C here and A there: they do not come together."""
    pair.prepare("net { protocol C; }", tandem_options="net { protocol A; }")
    pair.kernel.adm("up", RES)
    pair.tandem.adm("up", RES)
    refused_for_good(pair)


@SIDES
@pytest.mark.parametrize("asks", ["kernel", "tandem"])
def test_full_sync_of_one_in_use(pair: Pair, side: str, asks: str) -> None:
    """invalidate on one node, invalidate-remote on the other, while the source is Primary."""
    pair.start(sync="clear")
    source = pair.node(side)
    target = pair.other(source)
    source.adm("primary", RES)
    source.write(0, 1 << 20, seed=5)
    if asks == side:
        source.adm("invalidate-remote", RES)
    else:
        target.adm("invalidate", RES)
    source.write(8 << 20, 3 << 20, seed=6)
    pair.in_sync()
    assert pair.resync_counts() == [65496]
    assert pair.uuids()[0] == pair.uuids()[1]
