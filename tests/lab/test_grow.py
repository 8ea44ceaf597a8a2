"""Devices that grow while they are in use, told to one node."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from .load import Load
from .nodes import RES, wait
from .pair import MIB, SIZE, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])
SMALL = 48 * MIB


@SIDES
def test_online_grow(pair: Pair, side: str) -> None:
    """A device that was limited grows on both nodes while it is in use; only the new part is synced."""
    pair.start("disk { size 32M; }", sync="clear")
    assert pair.tandem.size() == 32 * MIB
    node = pair.node(side)
    node.adm("primary", RES)
    node.write(31 * MIB, MIB, seed=1)
    pair.configure("disk { size 48M; }")
    node.adm("resize", RES)
    wait(pair.tandem, lambda _: pair.tandem.size() == 48 * MIB, "48 MiB large")
    node.write(47 * MIB, MIB, seed=2)
    pair.in_sync()
    assert int(pair.kernel.guest.read("/sys/block/drbd0/size")) == 48 * MIB // 512


@pytest.fixture
def growing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Both nodes' disks are 48 MiB; the kernel's is a device mapper's table, which can become larger."""
    guest = pair.kernel.guest
    guest.sh(
        "modprobe dm-mod && dmsetup create --noudevsync grow"
        f" --table '0 {SMALL // 512} linear /dev/ubda 0' && test -b /dev/dm-0"
    )
    monkeypatch.setattr(pair.kernel, "device_paths", lambda: ["/dev/dm-0"])
    os.truncate(pair.tandem.disk_file(), SMALL)
    yield pair
    os.truncate(pair.tandem.disk_file(), SIZE)
    pair.kernel.adm("down", RES, check=False)
    if guest.running:
        guest.sh("dmsetup remove --noudevsync --retry grow")


def grow_devices(pair: Pair) -> None:
    """Both devices are 64 MiB now, and nobody has been told."""
    pair.kernel.guest.sh(
        f"dmsetup load grow --table '0 {SIZE // 512} linear /dev/ubda 0' && dmsetup resume --noudevsync grow"
    )
    os.truncate(pair.tandem.disk_file(), SIZE)


@SIDES
@pytest.mark.parametrize("told", ["kernel", "tandem"])
def test_device_grows_under_load(growing: Pair, side: str, told: str) -> None:
    """One node is told `resize`; both move their metadata, under write load, and copy only the new part."""
    pair = growing
    pair.start(sync="clear")
    before = pair.tandem.size()
    primary = pair.node(side)
    primary.adm("primary", RES)
    load = Load(primary, size="40m", seconds=8)
    grow_devices(pair)
    pair.node(told).adm("resize", RES)
    wait(pair.tandem, lambda _: pair.tandem.size() > before, "larger")
    wait(pair.kernel, lambda _: device_size(pair) == pair.tandem.size(), "as large as the other")
    assert load.end() == ""
    primary.write(60 * MIB, MIB, seed=2)
    primary.adm("secondary", RES)
    pair.in_sync()
    assert pair.tandem.size() == 65496 << 10
    assert pair.resync_counts() == [(65496 << 10) - before >> 10]


def test_both_are_told(growing: Pair) -> None:
    """An operator who tells the second node as well does no harm."""
    pair = growing
    pair.start(sync="clear")
    pair.kernel.adm("primary", RES)
    grow_devices(pair)
    pair.kernel.adm("resize", RES)
    assert pair.tandem.adm("resize", RES, check=False).rc in (0, 10)
    wait(pair.kernel, lambda _: device_size(pair) == 65496 << 10, "larger")
    pair.in_sync()
    assert len(pair.resync_counts()) == 1


def device_size(pair: Pair) -> int:
    return int(pair.kernel.guest.read("/sys/block/drbd0/size")) * 512
