"""Application writes on either side, all protocols, with everything that orders or erases them."""

from __future__ import annotations

import pytest

from .nodes import RES, Node
from .pair import MIB, Pair, differences

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])
MIXED = (
    "--name=mixed", "--rw=randwrite", "--bsrange=512-1m", "--blockalign=512", "--size=24m", "--iodepth=16",
    "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--fsync=16", "--randseed=7",
)  # fmt: skip
VERIFIED = ("--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--randseed=11")
SIZES = (512, 1024, 1536, 3584, 4096, 4608, 8192, 12288, 32768, 65536, 130560, 131072, 262144, 524800, 1048064, 1048576)
EVERY_SIZE = (
    "--name=sizes", "--rw=write", "--bssplit=" + ":".join(f"{n}/{100 // len(SIZES)}" for n in SIZES),
    "--bs_unaligned", "--size=16m", "--iodepth=4", "--fsync=8", *VERIFIED,
)  # fmt: skip
FORCED = (
    "--name=forced", "--rw=randwrite", "--bsrange=512-128k", "--blockalign=512", "--size=2m", "--iodepth=4",
    "--sync=dsync", *VERIFIED,
)  # fmt: skip
TRIMS = (
    "--name=trims", "--rw=randtrimwrite", "--bs=64k", "--size=8m", "--offset=32m", "--iodepth=8", *VERIFIED,
)  # fmt: skip

FORCED_BY_NBD = """
import nbd, random
r = random.Random(3)
MIB = 1 << 20
wanted = bytearray(b"".join(h.pread(MIB, at * MIB) for at in range(24)))
for i in range(90):
    n, at = 512 * r.choice([1, 2, 7, 8, 9, 64, 255, 2048]), 512 * r.randrange(40000)
    flags = nbd.CMD_FLAG_FUA if i % 2 else 0
    if i % 9 == 7:
        h.zero(n, at, flags)
        wanted[at:at + n] = bytes(n)
    elif i % 9 in (4, 8):
        h.trim(n, at, flags)
        wanted[at:at + n] = h.pread(n, at)
    else:
        wanted[at:at + n] = data = r.randbytes(n)
        h.pwrite(data, at, flags)
    if i % 5 == 0:
        h.flush()
for at in range(24):
    assert h.pread(MIB, at * MIB) == wanted[at * MIB:(at + 1) * MIB], f"MiB {at} reads differently"
"""


def quiet(pair: Pair, primary: Node) -> None:
    """With protocol A and B the last writes may be on their way; demotion waits for them."""
    primary.adm("secondary", RES)
    pair.in_sync()


@SIDES
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_every_kind_of_write(pair: Pair, side: str, protocol: str) -> None:
    """Every size up to 1 MiB with flushes, writes that are forced to the disk, trims and zeroes, all verified."""
    pair.start(f"net {{ protocol {protocol}; }}", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(*MIXED)
    primary.fio(*EVERY_SIZE)
    primary.fio(*FORCED)
    primary.fio(*TRIMS)
    primary.zero(30 * MIB + 512, 3 * MIB)
    primary.write(31 * MIB, 64 << 10, seed=5)
    quiet(pair, primary)


@SIDES
def test_small_writes_deep_queue(pair: Pair, side: str) -> None:
    """Reads and writes of 4 KiB, 64 at a time."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(
        "--name=small", "--rw=randrw", "--bs=4k", "--size=16m", "--iodepth=64", "--verify=md5",
        "--verify_fatal=1", "--do_verify=1",
    )  # fmt: skip
    quiet(pair, primary)


@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_tandem_forced_writes(pair: Pair, protocol: str) -> None:
    """FUA on every other write, zeroing and trim of an NBD client, flushes between them, all of it read back."""
    pair.start(f"net {{ protocol {protocol}; }}", sync="clear")
    pair.tandem.adm("primary", RES)
    pair.tandem.nbd(FORCED_BY_NBD)
    quiet(pair, pair.tandem)


@SIDES
def test_trim_and_zeroes(pair: Pair, side: str) -> None:
    """Aligned and unaligned ranges, larger than one packet may carry; both disks read as zero after it."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.trim(1 * MIB, 9 * MIB)
    primary.zero(16 * MIB, 5 * MIB)
    primary.trim(30 * MIB + 512, 3 * MIB)
    primary.zero(40 * MIB + 1536, 4096 + 512)
    primary.write(17 * MIB, 64 << 10, seed=9)
    quiet(pair, primary)
    for node in (pair.kernel, pair.tandem):
        with node.disk_file().open("rb") as file:
            for at, length in ((16 * MIB, MIB), (40 * MIB + 1536, 4608), (18 * MIB, 3 * MIB)):
                file.seek(at)
                assert not any(file.read(length)), f"{node.name} does not read as zero at {at}"


@SIDES
def test_role_switch_under_data(pair: Pair, side: str) -> None:
    """The Primary moves back and forth; what one wrote the other reads."""
    pair.start(sync="clear")
    first: Node = pair.node(side)
    second = pair.other(first)
    for turn in range(3):
        first.adm("primary", RES)
        assert second.adm("primary", RES, check=False).rc == 11, "two Primaries are not allowed"
        first.write(turn * MIB, MIB, seed=turn)
        expected = first.sum(0, 4 * MIB)
        first.adm("secondary", RES)
        second.adm("primary", RES)
        assert second.sum(0, 4 * MIB) == expected
        second.adm("secondary", RES)
        first, second = second, first
    pair.in_sync()


@SIDES
def test_two_volumes(pair: Pair, side: str) -> None:
    """Two volumes in one connection, written one after the other."""
    pair.start(volumes=2, sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(*MIXED, volume=0)
    primary.fio(*MIXED, volume=1)
    primary.write(3 * MIB, MIB, seed=1, volume=1)
    quiet(pair, primary)
    assert differences(pair.kernel.disk_file(0), pair.kernel.disk_file(1), 16 * MIB)


@SIDES
@pytest.mark.parametrize("algorithm", ["crc32c", "md5", "sha1"])
def test_data_integrity(pair: Pair, side: str, algorithm: str) -> None:
    """Every block travels with its digest."""
    pair.start(f"net {{ data-integrity-alg {algorithm}; }}", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(*MIXED)
    primary.trim(8 * MIB, MIB)
    quiet(pair, primary)


