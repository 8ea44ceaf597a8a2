"""Settings that both nodes share, changed on a live pair: P_PROTOCOL_UPDATE, in both directions, and no reconnect."""

from __future__ import annotations

from typing import Final

import pytest

from .load import Load, busy
from .nodes import RES
from .pair import MIB, Pair

SIDES: Final = pytest.mark.parametrize("side", ["kernel", "tandem"])
CHANGES: Final = (
    "data-integrity-alg crc32c;",
    "data-integrity-alg md5; after-sb-0pri discard-zero-changes; after-sb-1pri discard-secondary;",
    "data-integrity-alg md5; after-sb-0pri discard-remote; protocol A;",
    "protocol B;",
    "data-integrity-alg sha1; protocol C; after-sb-2pri call-pri-lost-after-sb;",
    "",
)


def mirrored(net: str) -> str:
    """What the other node must be told: discard-remote is meant from a node's own side."""
    return net.replace("discard-remote", "discard-local")


@SIDES
@pytest.mark.parametrize("first", ["kernel", "tandem"])
def test_changed_while_it_writes(pair: Pair, side: str, first: str) -> None:
    """Digests, protocol and after-sb policies change under load, on one node after the other; the connection stays."""
    pair.start(sync="clear")
    primary = pair.node(side)
    primary.adm("primary", RES)
    load = Load(primary, seconds=20)
    busy(primary, pair)
    order = pair.node(first), pair.other(pair.node(first))
    for n, net in enumerate(CHANGES):
        pair.configure(f"net {{ {net} }}", tandem_options=f"net {{ {mirrored(net)} }}")
        for m, node in enumerate(order):
            node.adm("adjust", RES)
            primary.write((44 + 2 * n + m) * MIB, MIB, seed=2 * n + m)
    assert load.end() == ""
    for node in order[1:] if first == "kernel" else order:  # a kernel says only what differs from its own
        heard = [line.partition("peer data-integrity-alg: ")[2].strip() for line in node.log()]
        assert [alg for alg in heard if alg] == ["crc32c", "md5", "(none)", "sha1", "(none)"]
        assert not [line for line in node.log() if "conn( Connected ->" in line]
    pair.in_sync()
    for node in order:  # and they agree when they meet again
        node.adm("disconnect", RES)
    for node in order:
        node.adm("connect", RES)
    pair.in_sync()
