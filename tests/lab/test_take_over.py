"""A kernel node's disk is taken over by Tandem, used, and given back to the kernel, without a full copy.

Three machines: `kern` stays; `kern2` and the Tandem node are the same disk at different times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .nodes import RES, KernelNode, resource_text, wait, wait_state
from .pair import MIB, SIZE, Pair, differences, fill

AL_KIB = 4 << 10  # what one extent of the activity log covers
META = pytest.mark.parametrize("meta", ["internal", "[0]", ""], ids=["internal", "indexed", "flexible"])


class Change:
    """Which node has the disk, and what the other one is told about it."""

    def __init__(self, pair: Pair, second: KernelNode) -> None:
        self.pair = pair
        self.second = second
        self.meta = "internal"

    def begin(self, meta: str) -> None:
        """Two kernel nodes in sync, the one that stays Primary."""
        self.meta = meta
        pair = self.pair
        pair.prepare(content="same")
        for node in (pair.kernel, pair.tandem):  # away with the metadata that `prepare` made
            fill(node.disk_file(), 0)
            fill(node.disk_file(2), None)
        self.second.boot()
        self.partner(self.second)
        for node in (pair.kernel, self.second):
            node.adm("create-md", "--force", RES)
            node.adm("up", RES)
        wait_state(pair.kernel, cs="Connected")
        pair.kernel.adm("new-current-uuid", "--clear-bitmap", f"{RES}/0")
        wait_state(self.second, disk="UpToDate")
        pair.kernel.adm("primary", RES)
        pair.kernel.write(0, 3 * MIB, seed=1)

    def partner(self, node: object) -> None:
        """Write the configuration of `kern` and *node*, which is the second kernel or Tandem."""
        pair = self.pair
        other = self.second if node is self.second else pair.tandem
        text = resource_text(pair.kernel, other, 1, "", self.meta)
        pair.config.write_text(text)
        pair.tandem.config.write_text(text)

    def resyncs(self, act: Callable[[], None]) -> list[int]:
        """KiB of the resyncs that `kern` began during *act*."""
        before = len(self.pair.resync_counts())
        act()
        return self.pair.resync_counts()[before:]

    def to_tandem(self, found_kib: int | None = None) -> None:
        """Tandem gets the disk; *found_kib* is what its bitmap must say before anybody connects."""
        self.partner(self.pair.tandem)
        self.pair.tandem.adm("up", RES)
        if found_kib is not None:
            assert self.pair.tandem.state().oos == found_kib
        self.meet()
        self.pair.connected()
        self.pair.in_sync()

    def meet(self) -> None:
        """`kern` learns its partner's address, and connects if it had been told to disconnect."""
        self.pair.kernel.adm("adjust", RES)
        self.pair.kernel.adm("connect", RES, check=False)

    def to_kernel(self, found_kib: int | None = None) -> None:
        """The second kernel gets the disk; *found_kib* as for `to_tandem`."""
        self.second.boot()
        self.partner(self.second)
        self.second.adm("up", RES)
        if found_kib is not None:
            assert self.second.state().oos == found_kib
        self.meet()
        wait(self.pair.kernel, lambda s: s.cs == "Connected" and s.pdsk == "UpToDate", "in sync with kern2")
        wait_state(self.second, cs="Connected", disk="UpToDate", oos=0)


@pytest.fixture
def change(pair: Pair, third_node: KernelNode) -> Iterator[Change]:
    third_node.clear_log()
    yield Change(pair, third_node)
    complaints = third_node.complaints()
    third_node.guest.kill()
    assert not complaints, "the second kernel complains:\n" + "\n".join(complaints)


@META
def test_there_and_back(change: Change, meta: str) -> None:
    """Clean at every step; internal, indexed and flexible metadata."""
    pair = change.pair
    change.begin(meta)
    change.second.adm("down", RES)
    change.second.cut_power()
    pair.kernel.write(8 * MIB, MIB, seed=2)
    assert change.resyncs(change.to_tandem) == [1 << 10]
    pair.kernel.adm("secondary", RES)
    pair.tandem.adm("primary", RES)
    pair.tandem.write(16 * MIB, 2 * MIB, seed=3)
    expected = pair.tandem.sum(0, 20 * MIB)
    pair.tandem.adm("secondary", RES)
    pair.tandem.adm("down", RES)
    pair.kernel.adm("primary", RES)
    assert pair.kernel.sum(0, 20 * MIB) == expected
    pair.kernel.write(30 * MIB, 64 << 10, seed=4)
    assert change.resyncs(change.to_kernel) == [64]
    assert not differences(pair.kernel.disk_file(), pair.tandem.disk_file(), SIZE - 2 * MIB)


def test_crashed_secondary(change: Change) -> None:
    """The kernel dies as Secondary; Tandem goes on with its disk, dies too, and the kernel takes the disk back."""
    pair = change.pair
    change.begin("internal")
    change.second.cut_power()
    pair.kernel.write(8 * MIB, MIB, seed=2)
    moved = sum(change.resyncs(change.to_tandem))
    assert 1 << 10 <= moved <= 6 << 10
    pair.tandem.kill()
    pair.kernel.write(40 * MIB, MIB, seed=3)
    moved = sum(change.resyncs(change.to_kernel))
    assert 1 << 10 <= moved <= 6 << 10
    assert not differences(pair.kernel.disk_file(), pair.tandem.disk_file(), SIZE - 2 * MIB)


@META
def test_dirty_bitmap(change: Change, meta: str) -> None:
    """A Primary without its peer goes down with bits set; the disk's next node finds and resyncs exactly those."""
    pair = change.pair
    change.begin(meta)
    pair.kernel.adm("secondary", RES)
    pair.kernel.adm("disconnect", RES)
    change.second.adm("primary", RES)
    change.second.write(10 * MIB, MIB, seed=5)
    change.second.write(50 * MIB + 4096, 4096, seed=6)
    change.second.adm("secondary", RES)
    change.second.adm("down", RES)
    change.second.cut_power()
    assert change.resyncs(lambda: change.to_tandem(found_kib=1028)) == [1028]
    pair.kernel.adm("disconnect", RES)
    pair.tandem.adm("primary", RES)
    pair.tandem.write(20 * MIB, 2 * MIB, seed=7)
    pair.tandem.adm("secondary", RES)
    pair.tandem.adm("down", RES)
    assert change.resyncs(lambda: change.to_kernel(found_kib=2048)) == [2048]
    assert not differences(pair.kernel.disk_file(), pair.tandem.disk_file(), SIZE - 2 * MIB)


@META
def test_crashed_primary(change: Change, meta: str) -> None:
    """The kernel that dies as Primary leaves an activity log to Tandem, and Tandem one to the kernel."""
    pair = change.pair
    change.begin(meta)
    pair.kernel.adm("secondary", RES)
    change.second.adm("primary", RES)
    change.second.write(10 * MIB, MIB, seed=5)
    change.second.cut_power()
    wait_state(pair.kernel, cs="WFConnection")
    moved = change.resyncs(change.to_tandem)
    assert len(moved) == 1 and 1 << 10 <= moved[0] <= 4 * AL_KIB
    pair.tandem.adm("primary", RES)
    pair.tandem.write(20 * MIB, 2 * MIB, seed=6)
    expected = pair.tandem.sum(8 * MIB, 16 * MIB)
    pair.tandem.kill()
    wait_state(pair.kernel, cs="WFConnection")
    moved = change.resyncs(change.to_kernel)
    assert len(moved) == 1 and 2 << 10 <= moved[0] <= 6 * AL_KIB
    change.second.adm("primary", RES)
    assert change.second.sum(8 * MIB, 16 * MIB) == expected
    assert not differences(pair.kernel.disk_file(), pair.tandem.disk_file(), SIZE - 2 * MIB)


def test_survivor_takes_over(change: Change) -> None:
    """The Primary dies and the other goes on; the dead one's disk returns under Tandem as target."""
    pair = change.pair
    change.begin("internal")
    pair.kernel.adm("secondary", RES)
    change.second.adm("primary", RES)
    change.second.write(10 * MIB, MIB, seed=5)
    change.second.cut_power()
    wait_state(pair.kernel, cs="WFConnection")
    pair.kernel.adm("primary", RES)
    pair.kernel.write(40 * MIB, MIB, seed=7)
    moved = sum(change.resyncs(change.to_tandem))
    assert 1 << 10 <= moved <= 5 * AL_KIB
