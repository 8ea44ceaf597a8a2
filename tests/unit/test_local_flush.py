"""Flushes of the local disk: shared, spared where nothing was written, early where one is about to be asked for."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from typing import Any

import pytest
from tandem.repl.events import Attach, Attached
from tandem.repl.local_flush import HABIT
from tandem.repl.requests import DiskOp, Op
from tandem.repl.states import DiskState
from tandem.repl.wire import DP_FLUSH, DP_SEND_WRITE_ACK, Packet, pack_ack, pack_data, unpack_ack, unpack_data

from tests.scenarios.lone import Lone

P = Packet


class Application(ABC):
    """Writes and flushes, and the disk of the node under test, which answers writes at once."""

    lone: Lone

    @abstractmethod
    def __init__(self, **disk: Any) -> None:
        """*disk* are its options."""

    @abstractmethod
    def write(self) -> None:
        """Begin the next write."""

    @abstractmethod
    def flush(self) -> Any:
        """Begin a flush; the result is for `is_answered`."""

    @abstractmethod
    def is_answered(self, flush: Any) -> bool: ...

    def writes(self, n: int = 1) -> None:
        for _ in range(n):
            self.write()
            while ops := [op for op in self.lone.disk if op.op == Op.WRITE]:
                self.lone.answer(*ops)

    @property
    def flushes(self) -> list[DiskOp]:
        """Those that are out on the disk."""
        return [op for op in self.lone.disk if op.op == Op.FLUSH]

    def flushed(self, error: int = 0) -> None:
        self.lone.answer(*self.flushes, error=error)

    def work(self, n: int = HABIT) -> None:
        """Write once and flush, *n* times."""
        for _ in range(n):
            self.writes()
            self.flush()
            self.flushed()


class Ours(Application):
    """On this node; the peer answers at once."""

    def __init__(self, **disk: Any) -> None:
        self.lone = Lone(disk=disk).ready()

    def write(self) -> None:
        r = self.lone.submit(Op.WRITE)
        while not r.block_id:  # the extent is cold
            self.lone.answer()
        self.lone.meta(self.lone.ack(r))

    def flush(self) -> Any:
        r = self.lone.submit(Op.FLUSH)
        block_id = unpack_data(self.lone.payloads(P.DATA)[-1])[1]
        self.lone.meta(pack_ack(P.WRITE_ACK, 0, 0, block_id, 0, 1))
        return r

    def is_answered(self, flush: Any) -> bool:
        return flush in self.lone.done


class Theirs(Application):
    """On the peer, seen through its packets."""

    def __init__(self, **disk: Any) -> None:
        self.lone = Lone(disk=disk).as_secondary()
        self._id = 0

    def _data(self, flags: int, length: int) -> int:
        self._id += 1
        self.lone.data(pack_data(P.DATA, 0, 0, self._id, self._id, flags, length) + bytes(length))
        return self._id

    def write(self) -> None:
        self._data(DP_SEND_WRITE_ACK, 4096)

    def flush(self) -> Any:
        return self._data(DP_FLUSH | DP_SEND_WRITE_ACK, 0)

    def is_answered(self, flush: Any) -> bool:
        acks = [*self.lone.payloads(P.WRITE_ACK), *self.lone.payloads(P.NEG_ACK)]
        return any(unpack_ack(payload)[1] == flush for payload in acks)


each_side = pytest.mark.parametrize("side", [Ours, Theirs])


@each_side
def test_a_disk_that_was_not_written_to_is_not_flushed_again(side: type[Application]) -> None:
    app = side()
    app.work(1)
    flush = app.flush()
    assert not app.flushes and app.is_answered(flush)
    app.writes()
    flush = app.flush()
    assert len(app.flushes) == 1 and not app.is_answered(flush)


@each_side
def test_a_write_during_a_flush_is_not_covered_by_it(side: type[Application]) -> None:
    app = side()
    app.writes()
    app.flush()
    app.writes()
    app.flushed()
    flush = app.flush()
    assert len(app.flushes) == 1 and not app.is_answered(flush)


@each_side
def test_the_first_flush_of_a_disk_is_a_real_one(side: type[Application]) -> None:
    """An earlier process may have written to the same files and never flushed."""
    app = side()
    flush = app.flush()
    assert len(app.flushes) == 1 and not app.is_answered(flush)


@each_side
def test_behind_the_next_write_of_one_who_always_flushes_the_flush_begins_early(side: type[Application]) -> None:
    app = side()
    app.work(HABIT - 1)
    app.writes()
    assert not app.flushes, "not yet a habit"
    app.flush()
    app.flushed()
    app.writes()
    (early,) = app.flushes
    flush = app.flush()
    assert app.flushes == [early] and not app.is_answered(flush)
    app.flushed()
    assert app.is_answered(flush)


@each_side
def test_an_early_flush_that_has_ended_answers_at_once(side: type[Application]) -> None:
    app = side()
    app.work()
    app.writes()
    app.flushed()
    flush = app.flush()
    assert not app.flushes and app.is_answered(flush)


@each_side
def test_a_write_behind_the_early_flush_needs_another_and_ends_the_habit(side: type[Application]) -> None:
    app = side()
    app.work()
    app.writes()
    (early,) = app.flushes
    app.writes()
    flush = app.flush()
    assert len(app.flushes) == 2
    app.lone.answer(early)
    assert not app.is_answered(flush)
    app.flushed()
    assert app.is_answered(flush)
    app.writes()
    assert not app.flushes


@pytest.mark.parametrize("policy", ["detach", "pass_on"])
@each_side
def test_an_early_flush_that_fails_costs_the_disk_at_once(side: type[Application], policy: str) -> None:
    """Under pass_on too: the kernel tells once that writes are lost, and not which."""
    app = side(on_io_error=policy)
    app.work()
    app.writes()
    app.flushed(error=errno.EIO)
    app.lone.settle()
    assert app.lone.local_disk() == DiskState.DISKLESS


def test_a_disk_that_failed_makes_nothing_stable_for_the_peer() -> None:
    app = Theirs(on_io_error="pass_on")
    app.work()
    app.writes()
    app.flushed(error=errno.EIO)
    flush = app.flush()
    assert app.is_answered(flush) and len(app.lone.payloads(P.NEG_ACK)) == 1
    assert not app.flushes


def test_a_disk_that_comes_back_is_not_taken_for_flushed() -> None:
    app = Ours()
    app.work()
    app.writes()
    app.flushed(error=errno.EIO)
    app.lone.settle()
    assert app.lone.local_disk() == DiskState.DISKLESS
    assert app.lone.vol.stable_version + 1 == app.lone.vol.data_version
    app.lone.command("attach")
    effect = app.lone.of(Attach)[-1]
    app.lone.handle(Attached(effect.ticket, effect.volume, app.lone.loaded(), False))
    assert app.lone.vol.stable_version == -1
