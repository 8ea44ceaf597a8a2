"""Nodes that die: the kernel's host loses power, Tandem's process is killed. In every role."""

from __future__ import annotations

import pytest

from .load import Load, busy
from .nodes import RES, Node, wait, wait_state
from .pair import MIB, Pair

FAST = "net { ping-timeout 10; timeout 20; ping-int 1; }"
SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


def die(pair: Pair, node: Node) -> None:
    if node.is_kernel:
        pair.kernel.cut_power()
    else:
        pair.tandem.kill()


def come_back(pair: Pair, node: Node) -> None:
    if node.is_kernel:
        pair.kernel.boot()
    node.adm("up", RES)


@SIDES
def test_primary_dies_and_comes_back(pair: Pair, side: str) -> None:
    """A crashed Primary is the source of what its activity log covers; nobody was Primary meanwhile."""
    pair.start(FAST, sync="clear")
    primary = pair.node(side)
    other = pair.other(primary)
    primary.adm("primary", RES)
    load = Load(primary)
    busy(primary, pair)
    die(pair, primary)
    load.end()
    wait(other, lambda s: s.cs == "WFConnection", "alone")
    come_back(pair, primary)
    pair.connected()
    pair.in_sync()
    assert pair.kernel.log()
    kernel, tandem = pair.uuids()
    assert kernel == tandem


@SIDES
def test_primary_dies_other_takes_over(pair: Pair, side: str) -> None:
    """The survivor is promoted and writes; the crashed node becomes the target."""
    pair.start(FAST, sync="clear")
    primary = pair.node(side)
    other = pair.other(primary)
    primary.adm("primary", RES)
    primary.write(60 * MIB, MIB, seed=1)
    load = Load(primary)
    busy(primary, pair)
    die(pair, primary)
    load.end()
    wait(other, lambda s: s.cs == "WFConnection", "alone")
    other.adm("primary", RES)
    other.write(48 * MIB, MIB, seed=3)
    expected = other.sum(60 * MIB, MIB)
    come_back(pair, primary)
    pair.connected()
    pair.in_sync()
    assert other.state().role == "Primary"
    other.adm("secondary", RES)
    primary.adm("primary", RES)
    assert primary.sum(60 * MIB, MIB) == expected


@SIDES
def test_secondary_dies(pair: Pair, side: str) -> None:
    """The Primary does not notice more than a pause; what it wrote meanwhile is all that is sent."""
    pair.start(FAST, sync="clear")
    secondary = pair.node(side)
    primary = pair.other(secondary)
    primary.adm("primary", RES)
    primary.write(0, 2 * MIB, seed=1)
    die(pair, secondary)
    primary.write(8 * MIB, MIB, seed=2)
    wait(primary, lambda s: s.cs == "WFConnection", "alone")
    primary.write(12 * MIB, MIB, seed=2)
    come_back(pair, secondary)
    pair.connected()
    pair.in_sync()
    assert max(pair.resync_counts(), default=0) <= 16 << 10


@SIDES
@pytest.mark.parametrize("role", ["source", "target"])
def test_dies_during_resync(pair: Pair, side: str, role: str) -> None:
    """The source or the target of a resync dies in the middle of it, and comes back."""
    pair.start(f"{FAST}\n  disk {{ resync-rate 2M; }}", sync="clear")
    victim = pair.node(side)
    source = victim if role == "source" else pair.other(victim)
    source.adm("primary", RES)
    pair.other(source).adm("disconnect", RES)
    wait_state(source, cs="WFConnection")
    source.write(4 * MIB, 16 * MIB, seed=1)
    pair.other(source).adm("connect", RES)
    wait(source, lambda s: s.cs == "SyncSource" and 2048 < s.oos < 14 << 10, "in the middle of a resync")
    die(pair, victim)
    wait(pair.other(victim), lambda s: s.cs == "WFConnection", "alone")
    come_back(pair, victim)
    pair.hurry()
    pair.connected()
    pair.in_sync()


def test_both_die(pair: Pair) -> None:
    """Both nodes die under load."""
    pair.start(FAST, sync="clear")
    pair.tandem.adm("primary", RES)
    load = Load(pair.tandem)
    busy(pair.tandem, pair)
    pair.kernel.cut_power()
    pair.tandem.kill()
    load.end()
    pair.kernel.boot()
    pair.up()
    pair.in_sync()


@SIDES
def test_frozen_peer(pair: Pair, side: str) -> None:
    """A Secondary that stands still is given up after a while; the Primary's writes go on."""
    pair.start("net { ping-timeout 10; timeout 20; ping-int 1; ko-count 2; }", sync="clear")
    if side == "kernel":
        pair.tandem.adm("primary", RES)
        pair.kernel.guest.freeze(True)
        pair.tandem.write(MIB, MIB, seed=1)
        wait(pair.tandem, lambda s: s.cs == "WFConnection", "alone")
        pair.kernel.guest.freeze(False)
    else:
        pair.kernel.adm("primary", RES)
        pair.tandem.freeze(True)
        pair.kernel.write(MIB, MIB, seed=1)
        wait(pair.kernel, lambda s: s.cs != "Connected", "alone")
        pair.tandem.freeze(False)
    pair.in_sync()
