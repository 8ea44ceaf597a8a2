"""Bugs planted by hand in writes that go to the disk before all of them has come (`Engine.begin_write`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from tandem.repl.replica import Replica
from tandem.repl.requests import PeerWrite
from tandem.repl.wire import DATA_PACKET, DP_FUA, DP_MAY_SET_IN_SYNC, DP_SEND_WRITE_ACK, Packet

from tests.sim.world import World

Patch = pytest.MonkeyPatch
Takes = Callable[[int], bool]


def _with_flags(view: memoryview, without: int) -> memoryview:
    """The beginning of a packet as it were without these flags."""
    if len(view) < DATA_PACKET.size:
        return view
    *fields, dp = DATA_PACKET.unpack_from(view)
    return memoryview(DATA_PACKET.pack(*fields, dp & ~without) + bytes(view[DATA_PACKET.size :]))


def acked_when_begun(mp: Patch) -> None:
    """The ack goes out when the write begins, and not when it has ended."""
    original = Replica.begin_write

    def begin(self: Any, view: memoryview, takes: Takes) -> PeerWrite | None:
        w = original(self, view, takes)
        if w is not None:
            self.e.send_ack(Packet.WRITE_ACK, self.e.volumes[w.volume], w.sector, w.block_id, w.length)
            w.dp &= ~DP_SEND_WRITE_ACK
        return w

    mp.setattr(Replica, "begin_write", begin)


def begun_during_a_resync(mp: Patch) -> None:
    """A write begins during a resync like at other times: what reads and writes those blocks does not wait for it."""
    original = Replica.begin_write

    def begin(self: Any, view: memoryview, takes: Takes) -> PeerWrite | None:
        syncing = [vol for vol in self.e.volumes.values() if vol.syncing]
        for vol in syncing:
            vol.syncing = False
        try:
            return original(self, _with_flags(view, DP_MAY_SET_IN_SYNC), takes)
        finally:
            for vol in syncing:
                vol.syncing = True

    mp.setattr(Replica, "begin_write", begin)


def fua_begun(mp: Patch) -> None:
    """A FUA write begins like any other, and nobody makes it stable."""
    original = Replica.begin_write
    mp.setattr(Replica, "begin_write", lambda self, view, takes: original(self, _with_flags(view, DP_FUA), takes))


def abandoned_acked(mp: Patch) -> None:
    """A write that will never be complete ends before the machine knows that its link has, not after."""
    original = World.link_lost

    def link_lost(self: Any, node: Any, socket: int) -> None:
        splice = node.splice
        if splice is not None:
            node.abandon()
            self.complete(node, splice.op.volume, [splice])
        original(self, node, socket)

    mp.setattr(World, "link_lost", link_lost)
