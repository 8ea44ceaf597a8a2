"""Online verify between two real nodes: what it finds, what it leaves alone, and how it ends."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from tandem.repl.events import ResourceStatus
from tandem.repl.requests import Op

from tests.integration.test_edge_replication import MIB, NET, Node, Pair, create


def differing(status: ResourceStatus) -> int:
    """KiB out of sync."""
    return status.connection.volumes[0].out_of_sync // 1024


def plant(node: Node, *offsets: int) -> None:
    """Change a byte behind the node's back."""
    with node.path.open("r+b") as file:
        for offset in offsets:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes((byte[0] ^ 1,)))


async def verified(pair: Pair, kib: int) -> None:
    for node in (pair.a, pair.b):
        await node.until(
            lambda: node.cstate == "Connected" and differing(node.runtime.status()) == kib  # noqa: B023
        )


async def up(directory: Path, protocol: str = "C", verify_alg: str = "crc32c") -> Pair:
    create(directory / "a", content=random.Random(5).randbytes(20 * MIB))
    create(directory / "b")
    net = replace(NET, protocol=protocol, verify_alg=verify_alg)
    pair = Pair(directory, net, out_of_sync="echo $DRBD_RESOURCE/$DRBD_VOLUME differs")
    await pair.up()
    await pair.primary()
    return pair


async def down(pair: Pair) -> None:
    for node in (pair.a, pair.b):
        await node.runtime.stop()
    assert not pair.a.mistakes and not pair.b.mistakes


@pytest.mark.parametrize("protocol", ["A", "C"])
@pytest.mark.parametrize("asks", ["a", "b"])
def test_planted_differences_are_found_while_writing(tmp_path: Path, asks: str, protocol: str) -> None:
    async def main() -> None:
        pair = await up(tmp_path, protocol)
        plant(pair.b, 5 * MIB, 5 * MIB + 4096, 17 * MIB + 3)
        assert pair.a.runtime.volume(0).open(True) is None
        node = getattr(pair, asks)
        await node.ok("verify")
        client, draw = pair.a.client, random.Random(1)
        for _ in range(200):
            offset = draw.randrange(6 * MIB // 4096, 16 * MIB // 4096) * 4096
            await client.do(Op.WRITE, offset, 4096, draw.randbytes(4096))
        await verified(pair, 12)
        assert any("found 3 4k blocks" in line for line in node.log)
        for each in (pair.a, pair.b):
            await each.until(lambda: any("out-of-sync: r0/0 differs" in line for line in each.log))  # noqa: B023
        pair.a.runtime.volume(0).close(True)
        await pair.b.ok("disconnect")
        await pair.b.ok("connect")
        await pair.connected()
        await verified(pair, 0)
        assert pair.a.content(20 * MIB) == pair.b.content(20 * MIB)
        await down(pair)

    uvloop.run(main())


@pytest.mark.parametrize("asks", ["a", "b"])
def test_equal_disks_are_found_equal(tmp_path: Path, asks: str) -> None:
    async def main() -> None:
        pair = await up(tmp_path, verify_alg="md5")
        node = getattr(pair, asks)
        await node.ok("verify")
        await node.until(lambda: any("Online verify done" in line for line in node.log))
        await verified(pair, 0)
        assert not any("out of sync" in line or "out-of-sync" in line for line in node.log)
        await down(pair)

    uvloop.run(main())


def test_start_and_stop(tmp_path: Path) -> None:
    async def main() -> None:
        pair = await up(tmp_path)
        plant(pair.a, MIB, 8 * MIB, 15 * MIB)
        await pair.b.ok("verify", start=4 * MIB // 512, stop=12 * MIB // 512)
        await verified(pair, 4)
        await down(pair)

    uvloop.run(main())


def test_link_lost_in_the_middle(tmp_path: Path) -> None:
    """What was found stays marked; the nodes meet again and nothing is held for ever."""

    async def main() -> None:
        pair = await up(tmp_path)
        plant(pair.b, 0)
        await pair.a.ok("verify")
        await pair.a.until(lambda: differing(pair.a.runtime.status()) == 4)
        await pair.b.ok("disconnect")
        await pair.b.ok("connect")
        await pair.connected()
        await verified(pair, 0)
        assert pair.a.runtime.volume(0).open(True) is None
        await pair.a.client.do(Op.WRITE, 0, 20 * MIB, bytes(20 * MIB))
        assert pair.a.content(20 * MIB) == pair.b.content(20 * MIB)
        pair.a.runtime.volume(0).close(True)
        await down(pair)

    uvloop.run(main())


def test_without_an_algorithm_it_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        pair = await up(tmp_path, verify_alg="")
        refusal = await pair.a.runtime.command("verify", None)
        assert refusal is not None and refusal.code == -14
        await down(pair)

    uvloop.run(main())
