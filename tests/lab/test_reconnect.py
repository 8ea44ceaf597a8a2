"""Connections that end, on purpose or not, and the resync of only what differs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from .nodes import RES, State, wait, wait_state
from .pair import MIB, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])
WHO = pytest.mark.parametrize("who", ["primary", "secondary"])


def source_below(n_kib: int) -> Callable[[State], bool]:
    """A resync that still runs, with less than *n_kib* left."""
    return lambda state: state.cs == "SyncSource" and 0 < state.oos < n_kib


@SIDES
@WHO
def test_disconnect_write_connect(pair: Pair, side: str, who: str) -> None:
    """Either node disconnects; the Primary writes on; only what it wrote is sent when they meet again."""
    pair.start(sync="clear")
    primary = pair.node(side)
    secondary = pair.other(primary)
    primary.adm("primary", RES)
    leaver = primary if who == "primary" else secondary
    leaver.adm("disconnect", RES)
    wait_state(leaver, cs="StandAlone")
    wait_state(pair.other(leaver), cs="WFConnection")
    primary.write(800 * 512, 16384, seed=1)
    primary.write(20 * MIB, 64 << 10, seed=2)
    primary.write(50 * MIB + 512, 512, seed=3)
    assert wait_state(primary, disk="UpToDate").oos == 16 + 64 + 4
    leaver.adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [16 + 64 + 4]
    kernel, tandem = pair.uuids()
    assert kernel == tandem


@SIDES
def test_no_writes_no_resync_of_blocks(pair: Pair, side: str) -> None:
    """An empty resync goes through the same motions and moves nothing."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    pair.other(primary).adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [0]


@SIDES
def test_many_gaps_in_the_bitmap(pair: Pair, side: str) -> None:
    """Every other block differs: a bitmap that run lengths do not make smaller."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.fio(
        "--name=gaps", "--rw=write:4k", "--bs=4k", "--size=32m", "--io_size=16m", "--iodepth=32",
        "--buffer_pattern=0x5a",
    )  # fmt: skip
    pair.other(primary).adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [16 << 10]


@SIDES
def test_plain_bitmaps(pair: Pair, side: str) -> None:
    """The bitmaps are sent as they are."""
    pair.start("net { use-rle no; }", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(7 * MIB, 3 * MIB, seed=4)
    pair.other(primary).adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [3 << 10]


@SIDES
def test_cable_pulled_under_load(pair: Pair, side: str) -> None:
    """The link dies with writes in flight; the Primary goes on alone, and both meet again by themselves."""
    pair.start("net { ping-timeout 10; timeout 20; ping-int 1; }", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.write(0, 4 * MIB, seed=1)
    pair.kernel.guest.cut()
    primary.write(2 * MIB, 4 * MIB, seed=2)
    wait(primary, lambda s: s.cs == "WFConnection", "alone")
    primary.write(9 * MIB, MIB, seed=3)
    pair.kernel.guest.cut(False)
    pair.in_sync()
    assert sum(pair.resync_counts()) < 20 << 10


@SIDES
def test_resync_interrupted(pair: Pair, side: str) -> None:
    """A resync is cut off twice and goes on where it was."""
    pair.start("net { ping-timeout 10; timeout 20; ping-int 1; }\n  disk { resync-rate 2M; }", sync="clear")
    primary = pair.node(side)
    secondary = pair.other(primary)
    primary.adm("primary", RES)
    secondary.adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(4 * MIB, 24 * MIB, seed=1)
    secondary.adm("connect", RES)
    left = 24 << 10
    for _ in range(2):
        goal = left - 3072
        wait(primary, source_below(goal), f"below {goal} KiB")
        pair.kernel.guest.cut()
        wait(primary, lambda s: s.cs == "WFConnection", "alone")
        assert secondary.state().disk == "Inconsistent"
        left = primary.state().oos
        primary.write(30 * MIB, 64 << 10, seed=2)
        pair.kernel.guest.cut(False)
        wait(primary, lambda s: s.cs == "SyncSource", "source again")
    pair.hurry()
    pair.in_sync()
    kernel, tandem = pair.uuids()
    assert kernel == tandem


@SIDES
def test_writes_during_resync(pair: Pair, side: str) -> None:
    """An application writes where blocks are on their way."""
    pair.start("disk { resync-rate 2M; }", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(0, 32 * MIB, seed=1)
    pair.other(primary).adm("connect", RES)
    wait_state(primary, cs="SyncSource")
    primary.fio(
        "--name=busy", "--rw=randwrite", "--bsrange=4k-256k", "--size=32m", "--io_size=8m", "--iodepth=8",
        "--verify=crc32c", "--do_verify=1", "--fsync=10",
    )  # fmt: skip
    pair.hurry()
    pair.in_sync()


@SIDES
@pytest.mark.parametrize("asks", ["kernel", "tandem"])
def test_pause_and_resume(pair: Pair, side: str, asks: str) -> None:
    """Either node pauses a resync of either direction: both say so, nothing moves, and it goes on."""
    pair.start("disk { resync-rate 1M; }", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(0, 16 * MIB, seed=1)
    pair.other(primary).adm("connect", RES)
    wait_state(primary, cs="SyncSource")
    pair.node(asks).adm("pause-sync", RES)
    wait_state(primary, cs="PausedSyncS")
    wait_state(pair.other(primary), cs="PausedSyncT")
    time.sleep(0.5)
    before = primary.state().oos
    time.sleep(1.0)
    assert primary.state().oos == before > 0
    pair.hurry()
    pair.node(asks).adm("resume-sync", RES)
    pair.in_sync()


def test_secondary_changed_while_away_is_split_brain(pair: Pair) -> None:
    """Both were Primary apart: both refuse; with discard-my-data one follows the other."""
    pair.start(sync="clear")
    pair.tandem.adm("disconnect", RES)
    wait_state(pair.kernel, cs="WFConnection")
    pair.kernel.adm("primary", RES)
    pair.kernel.write(MIB, MIB, seed=1)
    pair.tandem.adm("primary", RES)
    pair.tandem.write(2 * MIB, MIB, seed=2)
    pair.tandem.adm("secondary", RES)
    pair.tandem.adm("connect", RES, check=False)
    wait_state(pair.tandem, cs="StandAlone")
    wait(pair.kernel, lambda s: s.cs in ("StandAlone", "WFConnection"), "not connected")
    pair.kernel.adm("connect", RES, check=False)
    pair.tandem.adm("connect", "--discard-my-data", RES)
    pair.in_sync()
    assert pair.kernel.state().role == "Primary"


@SIDES
def test_slow_link(pair: Pair, side: str) -> None:
    """Delay on the cable: nothing times out, and it all arrives."""
    pair.start(sync="clear")
    with slow(pair, "delay 20ms rate 200mbit"):
        primary = pair.node(side)
        primary.adm("primary", RES)
        primary.write(0, 4 * MIB, seed=1)
        pair.other(primary).adm("invalidate", RES)
        pair.in_sync()


@SIDES
def test_rate_controller(pair: Pair, side: str) -> None:
    """On a slow link the target's controller keeps below its limit, while an application writes."""
    pair.start("disk { c-plan-ahead 20; c-fill-target 512k; c-max-rate 2M; resync-rate 1M; }", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(0, 16 * MIB, seed=1)
    with slow(pair, "delay 10ms rate 100mbit"):
        begun = time.monotonic()
        pair.other(primary).adm("connect", RES)
        wait_state(primary, cs="SyncSource")
        primary.write(40 * MIB, MIB, seed=2)
        pair.in_sync()
        assert time.monotonic() - begun > 6.5, "16 MiB took less time than c-max-rate allows"


@contextlib.contextmanager
def slow(pair: Pair, netem: str) -> Iterator[None]:
    """The kernel's cable behaves like *netem* says."""
    pair.kernel.guest.netem(netem)
    try:
        yield
    finally:
        pair.kernel.guest.netem("")


@SIDES
def test_two_volumes_resync(pair: Pair, side: str) -> None:
    """Both volumes have gaps; each gets its own."""
    pair.start(volumes=2, sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    pair.other(primary).adm("disconnect", RES)
    wait_state(primary, cs="WFConnection")
    primary.write(4 * MIB, 2 * MIB, seed=1)
    primary.write(40 * MIB, 3 * MIB, seed=2, volume=1)
    pair.other(primary).adm("connect", RES)
    pair.in_sync()
    assert sorted(pair.resync_counts()) == [2 << 10, 3 << 10]
