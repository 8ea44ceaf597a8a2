"""The loop's thread under SCHED_BATCH: where its wake-ups do not have to wait for long, and nothing inherits it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tandem.repl.edge import scheduling
from tandem.repl.edge.scheduling import REST_MAX_S, REST_MIN_S, WAIT_MAX_S, Scheduling, Waits, choose, ordinary

LOOK_S = 0.01


class Told(Waits):
    """A kernel whose counts the test makes up."""

    def __init__(self) -> None:
        self.waited_s = 0.0
        self.times = 0
        self.closed = False

    def read(self) -> tuple[int, int]:
        return int(self.waited_s * 1e9), self.times

    def close(self) -> None:
        self.closed = True


class World:
    def __init__(self) -> None:
        self.now = 50.0
        self.told = Told()
        self.scheduling = Scheduling(lambda: self.told)

    def look(self, wait_s: float = 0.0, times: int = 10) -> bool:
        """The next look, before which *times* wake-ups waited so long each; is it SCHED_BATCH then?"""
        self.now += LOOK_S
        self.told.waited_s += wait_s * times
        self.told.times += times
        self.scheduling.look(self.now)
        assert policy() == (os.SCHED_BATCH if self.scheduling.batch else os.SCHED_OTHER)
        return self.scheduling.batch

    def rest_s(self, wait_s: float) -> float:
        """How long it stays SCHED_OTHER after wake-ups that waited so long."""
        assert not self.look(wait_s)
        began = self.now
        while not self.look():
            pass
        return self.now - began


def policy() -> int:
    return os.sched_getscheduler(0)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.scheduling.close()
    assert policy() == os.SCHED_OTHER


def test_it_is_batch_as_long_as_waits_are_short(world: World) -> None:
    assert world.look(5e-3), "what waited before it was so says nothing"
    assert all(world.look(WAIT_MAX_S * 0.9) for _ in range(50))
    assert world.look(times=0)


def test_long_waits_end_it_for_a_while(world: World) -> None:
    world.look()
    assert REST_MIN_S <= world.rest_s(2 * WAIT_MAX_S) < REST_MIN_S + 2 * LOOK_S


def test_it_rests_longer_when_they_come_back_at_once(world: World) -> None:
    world.look()
    rests = [world.rest_s(2 * WAIT_MAX_S) for _ in range(12)]
    assert rests[3] > 7 * REST_MIN_S and REST_MAX_S <= rests[-1] < REST_MAX_S + 2 * LOOK_S
    for _ in range(int(1.1 * REST_MAX_S / LOOK_S)):
        assert world.look()
    assert world.rest_s(2 * WAIT_MAX_S) < 2 * REST_MIN_S, "that was long ago"


def test_the_end_makes_it_what_it_was(world: World) -> None:
    world.look()
    world.scheduling.close()
    assert policy() == os.SCHED_OTHER and world.told.closed
    assert not world.look()


def test_a_policy_that_was_chosen_before_stays() -> None:
    choose(os.SCHED_BATCH)
    try:
        scheduling = Scheduling()
        scheduling.look(1.0)
        scheduling.close()
        assert not scheduling.batch and policy() == os.SCHED_BATCH
    finally:
        choose(os.SCHED_OTHER)


def test_who_may_not_choose_does_without(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(policy: int) -> None:
        raise PermissionError

    monkeypatch.setattr(scheduling, "choose", forbidden)
    assert not world.look() and not world.look() and world.told.closed


def test_a_kernel_that_does_not_count_leaves_it_alone() -> None:
    def none() -> Waits:
        raise FileNotFoundError

    it = Scheduling(none)
    it.look(1.0)
    found = policy()
    it.close()
    assert found == os.SCHED_OTHER


def test_counts_of_nothing_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be SCHED_BATCH for good, and beside programs that compute wait for their time slices."""
    monkeypatch.setattr(os, "pread", lambda fd, n, at: b"0 0 0\n")
    it = Scheduling()
    it.look(1.0)
    found = policy()
    it.close()
    assert found == os.SCHED_OTHER


def test_the_kernel_counts_what_this_thread_waited_for_its_processor() -> None:
    """Two of this process want one processor; the counts are the thread's, not those of the other one."""
    cpu, seen = min(os.sched_getaffinity(0)), []
    program = f"import os; os.sched_setaffinity(0, {{{cpu}}})\nprint(flush=True)\nwhile True: pass"

    def wait_in_line() -> None:
        os.sched_setaffinity(0, {cpu})
        waits = Waits()
        began = waits.read()
        while waits.read()[0] < began[0] + 5_000_000:
            pass
        seen.append((began, waits.read()))
        waits.close()

    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        thread = threading.Thread(target=wait_in_line)
        thread.start()
        thread.join()
        other.kill()
    (waited, times), (later, times_later) = seen[0]
    assert later >= waited + 5_000_000 and times_later > times
    idle = Waits()
    before = idle.read()[1]
    time.sleep(0.01)
    assert idle.read()[1] > before
    idle.close()


@pytest.mark.parametrize(("first", "expected"), [(ordinary, os.SCHED_OTHER), (lambda: None, os.SCHED_BATCH)])
def test_a_thread_that_says_so_does_not_inherit_it(first: Callable[[], None], expected: int) -> None:
    found: list[int] = []

    def work() -> None:
        first()
        found.append(policy())

    choose(os.SCHED_BATCH)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        choose(os.SCHED_OTHER)
    assert found == [expected]
