"""Nodes without a disk, disks that come and go, data marked as bad."""

from __future__ import annotations

import pytest

from .nodes import RES, wait_state
from .pair import MIB, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


@SIDES
def test_primary_without_disk(pair: Pair, side: str) -> None:
    """A detached Primary reads and writes through its peer; after attach only the writes are copied back."""
    pair.start(content="same", sync="clear")
    primary = pair.node(side)
    other = pair.other(primary)
    primary.adm("primary", RES)
    primary.write(0, MIB, seed=1)
    expected = primary.sum(0, 8 * MIB)
    primary.adm("detach", RES)
    wait_state(primary, disk="Diskless", pdsk="UpToDate")
    wait_state(other, disk="UpToDate", pdsk="Diskless")
    assert primary.sum(0, 8 * MIB) == expected
    primary.write(20 * MIB, 2 * MIB, seed=2)
    primary.write(40 * MIB + 512, 1024, seed=3)
    primary.zero(30 * MIB, 64 << 10)
    expected = primary.sum(0, 48 * MIB)
    primary.adm("attach", RES)
    pair.in_sync()
    assert pair.resync_counts() and max(pair.resync_counts()) <= 16 << 10
    assert primary.sum(0, 48 * MIB) == expected


@SIDES
def test_fio_without_disk(pair: Pair, side: str) -> None:
    """Mixed I/O, verified, on a Primary that has only the peer's disk."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.adm("detach", RES)
    wait_state(primary, disk="Diskless", pdsk="UpToDate")
    primary.fio(
        "--name=remote", "--rw=randrw", "--bsrange=512-256k", "--blockalign=512", "--size=16m", "--iodepth=8",
        "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=20",
    )  # fmt: skip
    primary.adm("attach", RES)
    primary.adm("secondary", RES)
    pair.in_sync()


@SIDES
def test_secondary_detaches(pair: Pair, side: str) -> None:
    """The Secondary gives its disk away and takes it back: what was written meanwhile is copied."""
    pair.start(sync="clear")
    secondary = pair.node(side)
    primary = pair.other(secondary)
    primary.adm("primary", RES)
    secondary.adm("detach", RES)
    wait_state(primary, disk="UpToDate", pdsk="Diskless")
    primary.write(8 * MIB, MIB, seed=2)
    secondary.adm("attach", RES)
    pair.in_sync()
    assert pair.resync_counts() == [1 << 10]


@SIDES
def test_last_good_disk_is_kept(pair: Pair, side: str) -> None:
    """A detach that would leave a Primary without data is refused, with drbdadm's exit code."""
    pair.start(sync="clear")
    holder = pair.node(side)
    primary = pair.other(holder)
    primary.adm("primary", RES)
    primary.adm("detach", RES)
    wait_state(holder, pdsk="Diskless")
    assert holder.adm("detach", RES, check=False).rc == 11
    assert holder.state().disk == "UpToDate"
    primary.adm("attach", RES)
    pair.in_sync()


@SIDES
def test_up_without_disk(pair: Pair, side: str) -> None:
    """A node that connects without a disk sees the peer's size and data."""
    pair.start(content="same", sync="clear")
    client = pair.node(side)
    client.adm("disconnect", RES)
    client.adm("detach", RES)
    client.adm("connect", RES)
    wait_state(client, cs="Connected", disk="Diskless", pdsk="UpToDate")
    wait_state(pair.other(client), cs="Connected", disk="UpToDate", pdsk="Diskless")
    client.adm("primary", RES)
    client.write(MIB, MIB, seed=8)
    total = client.sum(0, 4 * MIB)
    client.adm("secondary", RES)
    pair.other(client).adm("primary", RES)
    assert pair.other(client).sum(0, 4 * MIB) == total
    client.adm("attach", RES)
    pair.in_sync()


@SIDES
def test_outdated_is_known_after_restart(pair: Pair, side: str) -> None:
    """Outdated on purpose while away: refuses to be Primary, becomes current by the next resync."""
    pair.start(sync="clear")
    node = pair.node(side)
    node.adm("disconnect", RES)
    node.adm("outdate", RES)
    wait_state(node, disk="Outdated")
    assert node.adm("primary", RES, check=False).rc == 17
    node.adm("connect", RES)
    pair.in_sync()
