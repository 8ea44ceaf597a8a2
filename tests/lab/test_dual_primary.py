"""Two Primaries, one of them a kernel: both write the same sectors at once, both disks end up equal.

The Tandem node must be the one that resolves conflicts, whoever dialled first: a kernel that refuses a write
never completes its epoch, and the connection ends. Nor may a kernel's write be refused: what it is to send again
can wait for each other in it for good, which the job of many lengths, none of them a block, shows within seconds.
"""

from __future__ import annotations

import threading
import time

import pytest

from .nodes import RES, Node, wait_state
from .pair import Pair

TWO = "net { allow-two-primaries yes; protocol C; }"


def promote(pair: Pair) -> None:
    for node in (pair.kernel, pair.tandem):
        node.adm("primary", RES)
    for node in (pair.kernel, pair.tandem):
        wait_state(node, cs="Connected", role="Primary", peer="Primary")


def at_once(pair: Pair, *options: str) -> None:
    """The same fio job on both nodes, with other offsets and data; Tandem's begins when the guest's has begun.

    Again until they have met, should the guest's be over by then.
    """
    failed: list[Exception] = []

    def run(node: Node, seed: int) -> None:
        try:
            node.fio(
                "--name=hot", f"--randseed={seed}", "--refill_buffers", "--norandommap", "--io_size=32m", *options
            )
        except Exception as error:
            failed.append(error)

    def met() -> bool:
        return any("Concurrent writes detected" in line for line in pair.tandem.log())

    for number in range(0, 20, 2):
        before = pair.kernel.sent()
        other = threading.Thread(target=run, args=(pair.kernel, number))
        other.start()
        while pair.kernel.sent() == before and other.is_alive():
            time.sleep(0.02)
        run(pair.tandem, number + 1)
        other.join()
        assert not failed, failed
        if met():
            return
    raise AssertionError("they never met, or the kernel decided")


def demoted(pair: Pair) -> None:
    for node in (pair.kernel, pair.tandem):  # a connection that did not hold would be a split brain by now
        wait_state(node, limit_s=10, cs="Connected", role="Primary", peer="Primary")
    for node in (pair.kernel, pair.tandem):
        node.adm("secondary", RES)
    pair.in_sync()


@pytest.mark.parametrize("job", [
    ("--rw=randwrite", "--bs=4k", "--size=64k", "--iodepth=16"),
    ("--rw=randwrite", "--bsrange=512-16k", "--blockalign=512", "--size=256k", "--iodepth=8"),
    ("--rw=randwrite", "--bs=4k", "--size=2m", "--iodepth=32", "--fsync=32"),
])  # fmt: skip
def test_overlapping_writes_from_both(pair: Pair, job: tuple[str, ...]) -> None:
    """Both nodes are Primary and write the same sectors at once; both disks end equal."""
    pair.start(TWO, sync="clear")
    promote(pair)
    at_once(pair, *job)
    demoted(pair)


def test_the_tandem_node_resolves_after_a_reconnect(pair: Pair) -> None:
    """Whoever reconnects: the roles of the sockets are drawn anew, and conflicts are still survived."""
    pair.start(TWO, sync="clear")
    nodes: tuple[Node, Node] = (pair.kernel, pair.tandem)
    for node in (*nodes, *nodes):
        node.adm("disconnect", RES)
        wait_state(node, cs="StandAlone")
        node.adm("connect", RES)
        pair.connected()
    promote(pair)
    at_once(pair, "--rw=randwrite", "--bs=4k", "--size=64k", "--iodepth=16")
    demoted(pair)
