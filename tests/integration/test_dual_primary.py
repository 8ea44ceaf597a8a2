"""Two Primaries: clients of both nodes write the same places at the same time, and both disks end up equal."""

from __future__ import annotations

import random
import threading

from tandem.repl.events import ResourceStatus
from tandem.tools.demo_nbd import Cmd, ConnectionLost, Nbd, NbdRefused, Request
from tandem.tools.demo_pair import Node, first_difference, in_sync, usable_size

from tests.conftest import NewPair

MIB = 1 << 20
DEPTH = 16
WRITES = 2000  # of each client
HOT = 64 << 10  # bytes that everybody writes


def overlapping(seed: int, n: int) -> list[Request]:
    """Writes of 512 bytes to 16 KiB that begin at any sector of the first HOT bytes, some trims, some elsewhere."""
    draw = random.Random(seed)
    out = []
    for _ in range(n):
        length = draw.randint(1, 32) << 9
        offset = draw.randrange(0, HOT, 512) + (draw.randrange(8) * MIB if draw.random() < 0.3 else 0)
        if draw.random() < 0.05:
            out.append(Request(Cmd.WRITE_ZEROES, offset, length))
        else:
            out.append(Request(Cmd.WRITE, offset, length, draw.randbytes(length)))
    return out


def quiet(status: ResourceStatus) -> bool:
    peer = status.connection.volumes[0]
    return in_sync(status) and not peer.out_of_sync and not peer.pending and not peer.unacked


def test_overlapping_writes_from_both_sides(new_pair: NewPair) -> None:
    pair = new_pair(net="allow-two-primaries yes;")
    pair.start()
    pair.adm(pair.second, "primary", "r0")
    answered: list[str] = []
    failed: list[str] = []

    def client(node: Node, seed: int) -> None:
        try:
            with Nbd(node.socket, "r0") as nbd:
                nbd.run(iter(overlapping(seed, WRITES)), DEPTH, lambda request: answered.append(node.name))
        except (ConnectionLost, NbdRefused, OSError) as error:
            failed.append(f"{node.name}: {error!r}")

    threads = [threading.Thread(target=client, args=(node, seed)) for node in pair.nodes for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed and len(answered) == 4 * WRITES, (failed, len(answered))
    for node in pair.nodes:
        pair.wait(node, "quiet", quiet)
        assert "connection lost" not in node.log
    assert any("Concurrent writes detected" in node.log for node in pair.nodes), "they never met"
    size = usable_size(pair.status(pair.first))
    pair.down()
    assert first_difference(pair.first.disk, pair.second.disk, size) is None


def test_the_second_primary_needs_the_option(new_pair: NewPair) -> None:
    pair = new_pair()
    pair.start()
    refused = pair.run(pair.second, "primary", "r0")
    assert refused.returncode == 11 and "Multiple primaries not allowed by config" in refused.stderr


def test_two_primaries_stay_allowed_while_there_are_two(new_pair: NewPair) -> None:
    pair = new_pair(net="allow-two-primaries yes;")
    pair.start()
    pair.adm(pair.second, "primary", "r0")
    text = pair.config.read_text()
    pair.config.write_text(text.replace("allow-two-primaries yes;", ""))
    refused = pair.run(pair.first, "adjust", "r0")
    assert refused.returncode == 10 and "(164) Can not clear allow_two_primaries" in refused.stderr
    assert "tandemadm secondary r0" in refused.stderr, "what to do"
    pair.adm(pair.second, "secondary", "r0")
    pair.adm(pair.first, "adjust", "r0")
    assert pair.run(pair.second, "primary", "r0").returncode == 11
