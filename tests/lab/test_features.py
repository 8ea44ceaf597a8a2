"""Options that change what goes over the wire: checksums, thin resync, verify, growth, skips by both."""

from __future__ import annotations

import pytest

from .nodes import RES, wait_state
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


def test_verify_is_refused(pair: Pair) -> None:
    """We have no online verify yet: the kernel is told so, and the connection stays."""
    pair.start("net { verify-alg crc32c; }", sync="clear")
    assert pair.kernel.adm("verify", RES, check=False).rc == 11
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
