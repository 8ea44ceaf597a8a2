"""When the loop stays awake: learnt from waits, never against batches, and not where the processor is wanted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from tandem.repl.edge.vigil import AWAY_S, LOOK_FIRST_S, LOOK_MAX_S, REST_MAX_S, REST_MIN_S, Vigil, weight
from tandem.repl.requests import DATA, DiskOp, Op

LOOK_S = 2e-6  # what one look takes here


class World:
    """A loop that does nothing else, a clock, and somebody who may keep the processor."""

    def __init__(self) -> None:
        self.now = 100.0
        self.kept_s = 0.0
        self.soon: list[Callable[[], None]] = []
        self.n_looks = 0
        self.vigil = Vigil(cast(Any, self), lambda: self.now, self.offer)

    def call_soon(self, call: Callable[[], None]) -> None:
        self.soon.append(call)

    def offer(self) -> None:
        self.n_looks += 1
        self.now += LOOK_S + self.kept_s

    def event_after(self, seconds: float, n: int = 1) -> bool:
        """An event with *n* operations; returns whether the loop was awake when it came."""
        at = self.now + seconds
        while self.soon and self.now < at:
            self.soon.pop(0)()
        awake = bool(self.soon)
        self.now = max(self.now, at)
        self.vigil.woken()
        self.vigil.watch(n)
        return awake


def lose_the_processor(world: World) -> None:
    """Until the loop is awake; then somebody takes the processor."""
    while not world.event_after(50e-6):
        pass
    world.kept_s = AWAY_S
    world.event_after(50e-6)
    world.kept_s = 0.0


def test_short_waits_teach_the_loop_to_stay_awake() -> None:
    world = World()
    seen = [world.event_after(50e-6) for _ in range(12)]
    assert not seen[0]
    assert all(seen[-8:])


def test_a_long_wait_ends_it_after_a_moment() -> None:
    world = World()
    for _ in range(12):
        world.event_after(50e-6)
    began, world.n_looks = world.now, 0
    assert not world.event_after(1.0)
    assert world.n_looks <= LOOK_MAX_S / LOOK_S + 1
    assert world.now >= began + 1.0
    for _ in range(4):
        world.event_after(1.0)
    world.n_looks = 0
    assert not world.event_after(1.0)
    assert not world.n_looks  # seldom events are not waited for


def test_the_first_short_wait_is_worth_little() -> None:
    world = World()
    world.event_after(1.0)
    world.event_after(LOOK_FIRST_S / 2)
    world.n_looks = 0
    world.event_after(1.0)
    assert 0 < world.n_looks <= LOOK_FIRST_S / LOOK_S + 1


def test_large_batches_are_not_hurried() -> None:
    world = World()
    for _ in range(60):
        world.event_after(10e-6, n=64)
    assert not world.event_after(10e-6, n=64)
    assert not world.soon


def test_the_larger_the_batches_the_shorter_the_look() -> None:
    """Batches of six are worth four ninths of the look, of eight a quarter, of a dozen nothing."""
    for n, short_s, long_s in ((6, 100e-6, 130e-6), (8, 50e-6, 80e-6), (12, 0.0, 10e-6)):
        world = World()
        assert all([world.event_after(short_s, n) for _ in range(60)][-8:]) or not short_s
        assert not any([world.event_after(long_s, n) for _ in range(60)][-8:])


def test_a_long_operation_is_as_good_as_a_batch() -> None:
    def ops(n: int, length: int) -> list[DiskOp]:
        return [DiskOp(Op.WRITE, 0, 0, length, None, 0, DATA)] * n

    assert [weight(ops(3, length)) for length in (0, 512, 4096, 16 << 10)] == [3, 3, 3, 12]
    assert weight(ops(1, 128 << 10)) == weight(ops(1, 256 << 10)) == 8
    assert weight(ops(1, 512 << 10)) == weight(ops(1, 1 << 20)) == 1, "what comes in parts is seen at once"


def test_one_long_wait_among_short_ones_does_not_end_it() -> None:
    world = World()
    seen = []
    for _ in range(12):
        world.event_after(50e-6)
        seen.append(world.event_after(50e-6))
        world.event_after(1e-3)
    assert all(seen[-6:])


def test_waiting_for_a_worker_is_slept_through_and_says_nothing() -> None:
    world = World()
    for _ in range(12):
        world.event_after(50e-6)
    world.vigil.sleep()
    world.n_looks = 0
    assert not world.event_after(1e-3)
    assert world.n_looks <= 1
    assert world.event_after(50e-6)


def test_a_processor_that_is_wanted_is_left_alone() -> None:
    """For a moment after the first time, and for longer when it happens again as soon as the loop looks."""
    world = World()
    rests = []
    for _ in range(12):
        lose_the_processor(world)
        began = world.now
        while not world.event_after(50e-6):
            pass
        rests.append(world.now - began)
    assert rests[0] < 3 * REST_MIN_S
    assert rests[-1] > REST_MAX_S / 2
    assert rests == sorted(rests)


def test_a_machine_that_was_busy_once_is_not_held_for_busy() -> None:
    world = World()
    for _ in range(6):
        lose_the_processor(world)
        began = world.now
        while world.now < began + 1.0:
            world.event_after(50e-6)
        assert world.event_after(50e-6)
