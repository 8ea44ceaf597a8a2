"""The kernel's own fault injection breaks its disk, its metadata or its receiver under us."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .nodes import RES, wait, wait_state
from .pair import MIB, Pair

# Bits of the module parameter enable_faults. Source: drbd_int.h, DRBD_FAULT_*.
FAULT_META_WRITE, FAULT_RS_WRITE, FAULT_RS_READ, FAULT_WRITE, FAULT_READ = (1 << n for n in (0, 2, 3, 4, 5))
FAULT_ALLOC_EE, FAULT_RECEIVE = 1 << 8, 1 << 9


@pytest.fixture
def faults(pair: Pair) -> Iterator[Callable[[int], None]]:
    """Breaks the kernel's disk: fault injection of the driver, every operation of the given kinds fails."""

    def break_disk(kinds: int) -> None:
        pair.kernel.guest.sh(
            "cd /sys/module/drbd/parameters && echo 100 > fault_rate && echo 0 > fault_devs &&"
            f" echo {kinds} > enable_faults"
        )

    yield break_disk
    if pair.kernel.guest.running:
        break_disk(0)


def test_kernel_secondary_disk_fails(pair: Pair, faults: Callable[[int], None]) -> None:
    """A write that the kernel cannot do: it detaches, our Primary goes on, and after attach all is equal."""
    pair.start(sync="clear")
    pair.tandem.adm("primary", RES)
    faults(FAULT_WRITE)
    pair.tandem.write(3 * MIB, MIB, seed=1)
    wait_state(pair.tandem, disk="UpToDate", pdsk="Diskless")
    wait_state(pair.kernel, disk="Diskless")
    pair.tandem.write(5 * MIB, MIB, seed=2)
    faults(0)
    pair.kernel.adm("attach", RES)
    pair.in_sync()


def test_kernel_primary_disk_fails(pair: Pair, faults: Callable[[int], None]) -> None:
    """The kernel Primary loses its disk under load and works on ours, without an error to its application."""
    pair.start(sync="clear")
    pair.kernel.adm("primary", RES)
    pair.kernel.write(0, MIB, seed=1)
    faults(FAULT_WRITE | FAULT_READ)
    pair.kernel.fio(
        "--name=failing", "--rw=randrw", "--bsrange=4k-64k", "--size=8m", "--iodepth=8", "--verify=crc32c",
        "--verify_fatal=1", "--do_verify=1",
    )  # fmt: skip
    wait_state(pair.kernel, disk="Diskless", pdsk="UpToDate")
    faults(0)
    pair.kernel.adm("attach", RES)
    pair.in_sync()


def test_kernel_target_disk_fails(pair: Pair, faults: Callable[[int], None]) -> None:
    """In the middle of a resync the kernel's disk cannot write: Diskless, connected, and later whole again."""
    pair.start("disk { resync-rate 1M; }", sync="clear")
    pair.tandem.adm("primary", RES)
    pair.kernel.adm("disconnect", RES)
    wait_state(pair.tandem, cs="WFConnection")
    pair.tandem.write(0, 12 * MIB, seed=1)
    pair.kernel.adm("connect", RES)
    wait_state(pair.tandem, cs="SyncSource")
    faults(FAULT_RS_WRITE)
    wait_state(pair.kernel, disk="Diskless")
    wait_state(pair.tandem, cs="Connected", pdsk="Diskless")
    faults(0)
    pair.kernel.adm("attach", RES)
    pair.hurry()
    pair.in_sync()


def test_kernel_source_disk_fails(pair: Pair, faults: Callable[[int], None]) -> None:
    """The kernel cannot read what we need: we stay Inconsistent, say so, and get it once it can."""
    pair.start("disk { resync-rate 1M; }", sync="clear")
    pair.kernel.adm("primary", RES)
    pair.tandem.adm("disconnect", RES)
    wait_state(pair.kernel, cs="WFConnection")
    pair.kernel.write(0, 12 * MIB, seed=1)
    pair.tandem.adm("connect", RES)
    wait_state(pair.kernel, cs="SyncSource")
    faults(FAULT_RS_READ)
    wait_state(pair.kernel, disk="Diskless")
    wait_state(pair.tandem, disk="Inconsistent", pdsk="Diskless")
    faults(0)
    pair.kernel.adm("attach", RES, check=False)
    pair.hurry()
    wait_state(pair.tandem, disk="UpToDate")
    pair.in_sync()


@pytest.mark.parametrize("kernel", ["Primary", "Secondary"])
def test_kernel_metadata_fail(pair: Pair, faults: Callable[[int], None], kernel: str) -> None:
    """The kernel cannot write its activity log or bitmap: it goes on without a disk, with ours."""
    pair.start(sync="clear")
    primary = pair.node("kernel" if kernel == "Primary" else "tandem")
    primary.adm("primary", RES)
    faults(FAULT_META_WRITE)
    if not primary.is_kernel:  # a Secondary writes metadata when something becomes out of sync
        pair.tandem.adm("disconnect", RES)
        pair.tandem.write(3 * MIB, MIB, seed=1)
        pair.tandem.adm("connect", RES)
    else:
        primary.write(3 * MIB, MIB, seed=1)
    wait_state(pair.kernel, disk="Diskless")
    wait_state(pair.tandem, disk="UpToDate", pdsk="Diskless")
    primary.write(9 * MIB, MIB, seed=2)
    expected = primary.sum(0, 16 * MIB)
    faults(0)
    pair.kernel.adm("attach", RES)
    pair.in_sync()
    assert primary.sum(0, 16 * MIB) == expected


@pytest.mark.parametrize(
    ("kind", "options"),
    [(FAULT_ALLOC_EE, ""), (FAULT_RECEIVE, "net { data-integrity-alg crc32c; }")], ids=["no-memory", "corrupted"],
)  # fmt: skip
def test_kernel_receiver_fails(pair: Pair, faults: Callable[[int], None], kind: int, options: str) -> None:
    """The kernel drops the connection in the middle of our writes: it has no memory, or the digest tells that a block
    was corrupted on its way. Again and again, until it is well; then all is equal.
    """
    pair.start(options, sync="clear")
    pair.tandem.adm("primary", RES)
    pair.tandem.write(0, MIB, seed=1)
    faults(kind)
    pair.tandem.write(3 * MIB, MIB, seed=2)
    wait(pair.tandem, lambda _: dropped(pair), "dropped by the kernel")
    pair.tandem.write(5 * MIB, MIB, seed=3)
    expected = pair.tandem.sum(0, 8 * MIB)
    faults(0)
    pair.in_sync()
    assert pair.tandem.sum(0, 8 * MIB) == expected


def dropped(pair: Pair) -> bool:
    """Has the kernel ended the connection?"""
    return any("conn( Connected -> ProtocolError )" in line for line in pair.kernel.log())
