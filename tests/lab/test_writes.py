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


def quiet(pair: Pair, primary: Node) -> None:
    """With protocol A and B the last writes may be on their way; demotion waits for them."""
    primary.adm("secondary", RES)
    pair.in_sync()


@SIDES
@pytest.mark.parametrize("protocol", ["A", "B", "C"])
def test_mixed_writes_with_flushes(pair: Pair, side: str, protocol: str) -> None:
    pair.start(f"net {{ protocol {protocol}; }}", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(*MIXED)
    quiet(pair, primary)


@SIDES
def test_small_writes_deep_queue(pair: Pair, side: str) -> None:
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(
        "--name=small", "--rw=randrw", "--bs=4k", "--size=16m", "--iodepth=64", "--verify=md5",
        "--verify_fatal=1", "--do_verify=1",
    )  # fmt: skip
    quiet(pair, primary)


def test_kernel_synchronous_writes(pair: Pair) -> None:
    """O_DSYNC with O_DIRECT becomes FUA; fsync an empty flush."""
    pair.start(sync="clear")
    pair.kernel.adm("primary", RES)
    pair.kernel.fio(
        "--name=fua", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=4m", "--sync=dsync",
        "--iodepth=4", "--verify=crc32c", "--do_verify=1",
    )  # fmt: skip
    quiet(pair, pair.kernel)


def test_tandem_synchronous_writes(pair: Pair) -> None:
    pair.start(sync="clear")
    pair.tandem.adm("primary", RES)
    pair.tandem.nbd(
        "import nbd, random\nr = random.Random(3)\n"
        "for i in range(60):\n"
        " n = 512 * r.choice([1, 2, 7, 8, 9, 64, 255, 2048])\n"
        " h.pwrite(r.randbytes(n), 512 * r.randrange(40000), nbd.CMD_FLAG_FUA if i % 2 else 0)\n"
        " if i % 5 == 0: h.flush()\n"
    )
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
    pair.start(f"net {{ data-integrity-alg {algorithm}; }}", sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    primary.fio(*MIXED)
    primary.trim(8 * MIB, MIB)
    quiet(pair, primary)


