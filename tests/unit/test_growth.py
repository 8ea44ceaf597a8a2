"""Following the peer's resize: whose device is looked at when, one look at a time, and disks that go meanwhile."""

from __future__ import annotations

from typing import Any

from tandem.repl.events import DeviceGrown, LinkLost, ProbeSize
from tandem.repl.metadata import layout
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState
from tandem.repl.wire import Packet, QueueLimits, Sizes

from tests.scenarios.lone import Lone

P = Packet
MIB = 1 << 20
BEFORE = layout("internal", 64 * MIB, 64 * MIB).usable
AFTER = layout("internal", 128 * MIB, 128 * MIB).usable


def sizes(d_size: int, c_size: int, flags: int = 0) -> bytes:
    """The peer's P_SIZES; bytes."""
    limits = QueueLimits(4096, 512, 0, 4096, 0, 1)
    return Sizes(d_size // 512, 0, c_size // 512, 1 << 20, 0, flags, limits).pack(0)


def told(lone: Lone) -> list[tuple[int, int]]:
    """(d_size, c_size) in bytes of every P_SIZES sent."""
    found = [Sizes.unpack(memoryview(p), True) for p in lone.payloads(P.SIZES)]
    return [(s.d_size * 512, s.c_size * 512) for s in found]


def probed(lone: Lone, size: int, which: int = -1) -> None:
    lone.handle(DeviceGrown(lone.of(ProbeSize)[which].ticket, 0, size, size))
    lone.settle()


def test_a_secondary_follows_the_peers_resize() -> None:
    """What a kernel or a Tandem Primary that was told `resize` sends is all that a Secondary needs."""
    lone = Lone().as_secondary()
    lone.data(sizes(AFTER, 0))
    lone.settle()
    assert told(lone) == [(BEFORE, BEFORE)] and lone.vol.size == BEFORE
    probed(lone, 128 * MIB)
    assert lone.vol.size == AFTER and told(lone)[1:] == [(AFTER, 0)]
    assert lone.vol.bitmap.weight == (AFTER - BEFORE) // 4096
    lone.data(sizes(AFTER, AFTER))
    lone.settle()
    assert lone.conn() == ConnState.WF_SYNC_UUID


def test_a_device_that_has_not_grown_is_not_spoken_of_again() -> None:
    lone = Lone().as_secondary()
    lone.data(sizes(AFTER, 0))
    probed(lone, 64 * MIB)
    assert told(lone) == [(BEFORE, BEFORE)] and lone.conn() == ConnState.CONNECTED


def test_only_a_resize_makes_us_look() -> None:
    lone = Lone().as_secondary()
    lone.data(sizes(AFTER, BEFORE))
    assert lone.of(ProbeSize) == []


def test_a_primary_becomes_the_source_of_the_new_part() -> None:
    lone = Lone().ready()
    lone.data(sizes(AFTER, 0))
    probed(lone, 128 * MIB)
    lone.data(sizes(AFTER, AFTER))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE and P.SYNC_UUID in lone.sent()
    assert lone.vol.bitmap.weight == (AFTER - BEFORE) // 4096


def test_assume_clean_is_the_peers_to_say() -> None:
    lone = Lone().as_secondary()
    lone.data(sizes(AFTER, 0, flags=2))
    probed(lone, 128 * MIB)
    lone.data(sizes(AFTER, AFTER, flags=2))
    lone.settle()
    assert lone.vol.size == AFTER and lone.vol.bitmap.weight == 0 and lone.conn() == ConnState.CONNECTED


def test_both_are_told_at_once() -> None:
    """Our own resize is under way when the peer asks: one look after the other, and one resync."""
    lone = Lone().ready()
    ticket = lone.command("resize", 0)
    lone.data(sizes(AFTER, 0))
    assert len(lone.of(ProbeSize)) == 1
    probed(lone, 128 * MIB)
    assert lone.answered(ticket) == "done" and lone.vol.size == AFTER
    assert len(lone.of(ProbeSize)) == 2
    probed(lone, 128 * MIB)
    lone.data(sizes(AFTER, AFTER))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE and lone.sent(P.SYNC_UUID) == [P.SYNC_UUID]


def lose_disk(lone: Lone) -> None:
    lone.command("detach", 0, force=True)
    lone.settle()
    assert lone.local_disk() == DiskState.DISKLESS


def test_a_disk_that_is_gone_when_the_answer_comes() -> None:
    lone = Lone().ready()
    ticket = lone.command("resize", 0)
    lose_disk(lone)
    probed(lone, 128 * MIB)
    answer: Any = lone.answered(ticket)
    assert answer.code == 138 and not lone.vol.io_holds


def test_a_disk_that_goes_while_writes_are_waited_for() -> None:
    """Nothing of the application is held for ever by a resize that can not happen any more."""
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.answer()
    ticket = lone.command("resize", 0)
    lone.handle(DeviceGrown(lone.of(ProbeSize)[-1].ticket, 0, 128 * MIB, 128 * MIB))
    later = lone.submit(Op.WRITE, 8192)
    assert lone.vol.io_holds and lone.answered(ticket) is None
    lose_disk(lone)
    lone.handle(LinkLost(lone.engine.link.ticket, "the cable was pulled"))
    lone.settle()
    answer: Any = lone.answered(ticket)
    assert answer.code == 138 and not lone.vol.io_holds
    assert later in lone.done
