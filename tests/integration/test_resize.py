"""Two real nodes whose disks grow: one is told, both follow, also while an application writes."""

from __future__ import annotations

import os
import subprocess

import pytest
from tandem.tools.demo_pair import Node, Pair, first_difference, in_sync, usable_size

from tests.conftest import FindProgram, NewPair

MIB = 1 << 20


def grown(pair: Pair, size: int) -> None:
    """Both disks have become larger behind the nodes' backs."""
    for node in pair.nodes:
        os.truncate(node.disk, size)


def larger(pair: Pair, node: Node, than: int) -> int:
    """Wait until *node* exports more than before and all is in sync; the size."""
    status = pair.wait(node, "larger and in sync", lambda s: in_sync(s) and usable_size(s) > than)
    return usable_size(status)


@pytest.mark.parametrize("told", ["first", "second"])
def test_one_node_is_told(pair: Pair, told: str) -> None:
    """The other looks at its own disk; only the new part is copied."""
    before = usable_size(pair.status(pair.first))
    grown(pair, 96 * MIB)
    pair.adm(pair.first if told == "first" else pair.second, "resize", "r0")
    sizes = {larger(pair, node, before) for node in pair.nodes}
    assert len(sizes) == 1 and sizes.pop() > 95 * MIB
    assert first_difference(pair.first.disk, pair.second.disk, 95 * MIB) is None
    assert f"will sync {32 * 1024} KB" in pair.first.log


def test_under_write_load(new_pair: NewPair, program: FindProgram) -> None:
    """Grown four times, told in turn on either node and on both at once, under deep random writes."""
    pair = new_pair(32 * MIB)
    pair.start()
    load = subprocess.Popen(
        [
            program("fio"), "--name=load", "--thread", "--ioengine=nbd", f"--uri={pair.first.uri}",
            "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=24m", "--io_size=10g",
            "--iodepth=16", "--fsync=50", "--time_based", "--runtime=600",
        ],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=pair.directory,
    )  # fmt: skip
    try:
        size = usable_size(pair.status(pair.first))
        turns = ((pair.first,), (pair.second,), pair.nodes, pair.nodes)
        for i, told in enumerate(turns):
            grown(pair, (48 + 16 * i) * MIB)
            asked = [subprocess.Popen(pair.command(node, "resize", "r0"), stderr=subprocess.DEVNULL) for node in told]
            assert all(process.wait(120) in (0, 10) for process in asked)
            size = max(larger(pair, node, size) for node in pair.nodes)
        assert load.poll() is None, "the application saw an error"
    finally:
        load.terminate()
        load.wait(60)
    pair.wait_in_sync()
    pair.adm(pair.first, "secondary", "r0")
    assert first_difference(pair.first.disk, pair.second.disk, size) is None
