"""Options that change what goes over the wire: checksums, thin resync, verify; skips by both."""

from __future__ import annotations

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
    assert any("eliminated: 65496K" in line for line in pair.other(source).log())


@SIDES
def test_checksums_of_what_differs(pair: Pair, side: str) -> None:
    """Most blocks that the bitmap names are equal all the same; the others arrive, also while they are written."""
    pair.start("net { csums-alg sha1; }\n  disk { resync-rate 2M; }", sync="clear")
    source = pair.node(side)
    target = pair.other(source)
    source.adm("primary", RES)
    target.adm("disconnect", RES)
    wait_state(source, cs="WFConnection")
    source.write(0, 24 * MIB, seed=1)
    with source.disk_file().open("rb") as good, target.disk_file().open("r+b") as old:
        old.write(good.read(16 * MIB))
    if target.is_kernel:
        pair.kernel.guest.sh("blockdev --flushbufs /dev/ubda")
    target.adm("connect", RES)
    wait_state(source, cs="SyncSource")
    source.write(20 * MIB, 64 << 10, seed=2)
    pair.hurry()
    pair.in_sync()
    [told] = [line for line in target.log() if "equal checksums" in line]
    assert 15 << 10 <= int(told.partition("eliminated: ")[2].partition("K")[0]) <= 16 << 10


@SIDES
def test_thin_resync(pair: Pair, side: str) -> None:
    """Stretches of zeroes are not sent but named, and take no room at the target."""
    pair.start("disk { rs-discard-granularity 65536; }", sync="clear")
    source = pair.node(side)
    target = pair.other(source)
    source.adm("primary", RES)
    source.zero(0, 16 * MIB)
    source.write(3 * MIB, MIB, seed=1)
    target.adm("invalidate", RES)
    pair.in_sync()
    if not target.is_kernel:
        assert target.disk_file().stat().st_blocks * 512 <= 50 * MIB


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
    """Without verify-alg both refuse to verify."""
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
    pair.in_sync()
    pair.other(pair.node(side)).adm("disconnect", RES)
    wait_state(pair.node(side), cs="WFConnection")
    pair.other(pair.node(side)).adm("connect", RES)
    pair.in_sync()
    assert pair.resync_counts() == [65496]
