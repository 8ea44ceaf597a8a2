"""Two Primaries, one of them a kernel: both write the same sectors at once, both disks end up equal.

The Tandem node must be the one that resolves conflicts, whoever dialled first: a kernel that refuses a write
never completes its epoch, and the connection ends.
"""

from __future__ import annotations

import threading

import pytest

from .nodes import RES, Node, wait_state
from .pair import Pair

TWO = "net { allow-two-primaries yes; protocol C; }"


def promote(pair: Pair) -> None:
    for node in (pair.kernel, pair.tandem):
        node.adm("primary", RES)
    for node in (pair.kernel, pair.tandem):
        wait_state(node, cs="Connected", role="Primary", peer="Primary")
    # A write that is to be retried and meets two of ours is restarted twice if both end before the kernel's retry
    # worker runs; the second time changes nothing (restart_conflicting_writes). Two kernels do it to each other.
    pair.allowed.append("ASSERT( req->rq_state & RQ_NET_PENDING )")


def at_once(pair: Pair, kernel: str, tandem: str, *options: str) -> None:
    """The same fio job on both nodes, with other offsets and data; *kernel* and *tandem* say how much each writes.

    Again until they have met: a guest may only begin when the other node is done.
    """
    failed: list[Exception] = []

    def run(node: Node, amount: str, seed: int) -> None:
        try:
            node.fio(
                "--name=hot", f"--randseed={seed}", "--refill_buffers", "--norandommap", f"--io_size={amount}", *options
            )
        except Exception as error:
            failed.append(error)

    for number in range(0, 40, 2):
        other = threading.Thread(target=run, args=(pair.kernel, kernel, number))
        other.start()
        run(pair.tandem, tandem, number + 1)
        other.join()
        assert not failed, failed
        if any("Concurrent writes detected" in line for line in pair.tandem.log()):
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
    at_once(pair, "8m", "32m", *job)
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
    at_once(pair, "8m", "32m", "--rw=randwrite", "--bs=4k", "--size=64k", "--iodepth=16")
    demoted(pair)
