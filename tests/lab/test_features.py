"""Options that change what goes over the wire: checksums, thin resync, verify, growth, skips by both."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .nodes import RES, wait, wait_state
from .pair import MIB, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


@SIDES
@pytest.mark.parametrize("algorithm", ["md5", "crc32c"])
def test_checksum_resync(pair: Pair, side: str, algorithm: str) -> None:
    """A full resync of equal disks moves checksums instead of data."""
    pair.start(f"net {{ csums-alg {algorithm}; }}", content="same", sync="clear")
    source = pair.node(side)
    source.adm("primary", RES)
    source.write(5 * MIB, MIB, seed=1)
    pair.other(source).adm("invalidate", RES)
    pair.in_sync()
    if not pair.other(source).is_kernel:
        return  # our target asks for the data themselves, which the peer must serve as well
    assert any("eliminated: 65496K" in line for line in pair.kernel.log())


@SIDES
def test_thin_resync(pair: Pair, side: str) -> None:
    """Blocks of zeroes are not sent but deallocated at the target."""
    pair.start("disk { rs-discard-granularity 65536; }", sync="clear")
    source = pair.node(side)
    source.adm("primary", RES)
    source.zero(0, 16 * MIB)
    source.write(3 * MIB, MIB, seed=1)
    pair.other(source).adm("invalidate", RES)
    pair.in_sync()


@SIDES
@pytest.mark.parametrize("primary", ["kernel", "tandem"])
@pytest.mark.parametrize("algorithm", ["crc32c", "md5"])
def test_online_verify(pair: Pair, side: str, primary: str, algorithm: str) -> None:
    """Differences planted behind DRBD's back are found from either side, marked, and resynced afterwards."""
    pair.start(f"net {{ verify-alg {algorithm}; }}", sync="clear")
    node = pair.node(side)
    pair.node(primary).adm("primary", RES)
    with pair.tandem.disk_file().open("r+b") as file:
        for offset, length in ((9 * MIB, 8192), (40 * MIB + 512, 1), (65495 << 10, 1024)):
            file.seek(offset)
            file.write(b"x" * length)
    node.adm("verify", RES)
    pair.node(primary).write(20 * MIB, 4 * MIB, seed=1)
    wait_state(node, cs="Connected")
    for one in (node, pair.other(node)):
        wait(one, lambda s: s.cs == "Connected" and s.oos == 16, "Connected with 16 KiB out of sync")
    secondary = pair.other(pair.node(primary))
    secondary.adm("disconnect", RES)
    secondary.adm("connect", RES)
    pair.in_sync()


@SIDES
def test_verify_part(pair: Pair, side: str) -> None:
    """With start and stop only what lies between is looked at."""
    pair.start("net { verify-alg crc32c; }", sync="clear")
    with pair.tandem.disk_file().open("r+b") as file:
        for offset in (MIB, 20 * MIB, 50 * MIB):
            file.seek(offset)
            file.write(b"x")
    node = pair.node(side)
    first, stop = 10 * MIB // 512, 30 * MIB // 512
    words = ("--", f"--start={first}", f"--stop={stop}", "verify") if node.is_kernel else (
        "verify", f"--start={first}", f"--stop={stop}")  # fmt: skip
    node.adm(*words, RES)
    for one in (node, pair.other(node)):
        wait(one, lambda s: s.cs == "Connected" and s.oos == 4, "Connected with 4 KiB out of sync")
    pair.node("kernel").adm("primary", RES)
    pair.tandem.adm("invalidate", RES)
    pair.in_sync()


def test_verify_without_algorithm(pair: Pair) -> None:
    pair.start(sync="clear")
    assert pair.kernel.adm("verify", RES, check=False).rc != 0
    assert pair.tandem.adm("verify", RES, check=False).rc == 11
    pair.in_sync()


@SIDES
@pytest.mark.parametrize("commands", ["kernel", "tandem"])
def test_full_sync_after_skipped_one(pair: Pair, side: str, commands: str) -> None:
    """Whoever skipped the first sync, a later full sync in either direction ends with the same generation."""
    pair.start(content="same")
    pair.node(commands).adm("new-current-uuid", "--clear-bitmap", f"{RES}/0")
    pair.settled()
    pair.node(side).adm("invalidate", RES)
    wait_state(pair.node(side), disk="Inconsistent")
    pair.in_sync()
    pair.other(pair.node(side)).adm("disconnect", RES)
    wait_state(pair.node(side), cs="WFConnection")
    pair.other(pair.node(side)).adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [65496]


FAULT_RS_WRITE, FAULT_RS_READ, FAULT_WRITE, FAULT_READ = 1 << 2, 1 << 3, 1 << 4, 1 << 5


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
    pair.start("disk { resync-rate 4M; }", sync="clear")
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
    pair.in_sync()


def test_kernel_source_disk_fails(pair: Pair, faults: Callable[[int], None]) -> None:
    """The kernel cannot read what we need: we stay Inconsistent, say so, and get it once it can."""
    pair.start("disk { resync-rate 4M; }", sync="clear")
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
    wait_state(pair.tandem, disk="UpToDate")
    pair.in_sync()


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
