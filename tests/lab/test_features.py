"""Options that change what goes over the wire: checksums, thin resync, verify, growth, skips by both."""

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
    assert any("% had equal checksums" in line for line in pair.kernel.log() + pair.tandem.log())


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
def test_online_verify(pair: Pair, side: str) -> None:
    """Differences planted behind DRBD's back are found from either side, marked, and resynced afterwards."""
    pair.start("net { verify-alg crc32c; }", sync="clear")
    node = pair.node(side)
    node.adm("primary", RES)
    pair.allowed = ["Out of sync"]
    with pair.tandem.disk_file().open("r+b") as file:
        file.seek(9 * MIB)
        file.write(b"x" * 8192)
    node.adm("verify", RES)
    wait(node, lambda s: s.oos == 8, "8 KiB out of sync")
    wait_state(node, cs="Connected")
    wait(pair.other(node), lambda s: s.cs == "Connected" and s.oos == 8, "of the same opinion")
    pair.other(node).adm("disconnect", RES)
    pair.other(node).adm("connect", RES)
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
