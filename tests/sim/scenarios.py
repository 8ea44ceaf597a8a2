"""Short stories, told in every order: what an exhaustive chooser enumerates.

Each scenario starts from two connected nodes, does one small thing, and lets a bounded number of faults
happen at any step. Every sequence of choices with at most so many departures from the ordinary course is
run; afterwards everything is healed and all checkers have their say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from tandem.repl.config import Fencing
from tandem.repl.requests import FUA, Op, Request

from . import admin
from .chooser import ScriptedChooser, explore
from .mix import Mix
from .world import Option, World

QUIET = Mix(
    steps=0, chunk=False, early=False, admin=0, client=0, tick=0, cut=0, n_spots=1, queue_depth=8, risky=True
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scenario:
    """*story* does its thing once the nodes are connected; *faults* names what may happen, each once."""

    name: str
    story: Callable[[World], None]
    faults: tuple[str, ...]
    departures: int = 1
    n_faults: int = 9  # at most so many of them
    mix: Mix = QUIET
    primary: int | None = 0
    steps: int = 120


def submit(world: World, *requests: Request, node: int = 0) -> None:
    """Hand requests for one volume to the machine."""
    n = world.nodes[node]
    assert n.engine is not None
    n.engine.now = world.now
    n.engine.submit(requests[0].volume, list(requests))
    n.pump()


def write(world: World, block: int, n_blocks: int = 1, flags: int = 0, node: int = 0) -> Request:
    return world.write(world.nodes[node], 0, block * 4096, n_blocks * 4096, Op.WRITE, flags)


def one_write(world: World) -> None:
    submit(world, write(world, 3))


def two_overlapping_writes(world: World) -> None:
    submit(world, write(world, 3, 2))
    submit(world, write(world, 4, 2))


def write_and_flush(world: World) -> None:
    submit(world, write(world, 3))
    admin.settle(world)
    submit(world, world.flush(world.nodes[0], 0))


def durable_write(world: World) -> None:
    submit(world, write(world, 3, flags=FUA))


def resync_one_block(world: World) -> None:
    """The peer missed one block; while it comes back the same block is written again."""
    a, b = world.nodes
    b.command("disconnect")
    admin.settle(world)
    submit(world, write(world, 3))
    admin.settle(world)
    b.command("connect")
    for _ in range(400):
        if a.state().conn.value >= 13:
            break
        options = world.progress()
        if not options:
            break
        _, action, args = options[0]
        action(*args)
        world.checks.after_step()
    submit(world, write(world, 3))


def hand_over(world: World) -> None:
    """A write, then the roles change sides."""
    submit(world, write(world, 3))
    admin.settle(world)
    admin.close_clients(world.nodes[0])
    admin.finish_demotion(world.nodes[0])


def crash_and_return(who: int, power: bool) -> Callable[[World], None]:
    """A write, then one node dies and comes back: everything until both agree again is explored."""

    def story(world: World) -> None:
        submit(world, write(world, 3))
        admin.settle(world)
        submit(world, write(world, 3))
        world.crash(world.nodes[who], power)
        world.boot(world.nodes[who])

    return story


def both_write(world: World) -> None:
    """Two Primaries write to overlapping blocks at once."""
    world.nodes[1].command("primary")
    admin.settle(world)
    submit(world, write(world, 3, 2), node=0)
    submit(world, write(world, 4, 2, node=1), node=1)


ANY = ("crash a", "crash b", "power a", "power b")
POWER = ("power a", "power b")
PROTOCOL_A = replace(QUIET, protocol="A")
STONITH = replace(QUIET, fencing=Fencing.RESOURCE_AND_STONITH, slow_handler=True)
TWO_PRIMARIES = replace(STONITH, two_primaries=True)
EXTERNAL = replace(QUIET, external=True)

SCENARIOS = (
    Scenario("one write, one crash", one_write, ANY, departures=2, n_faults=1),
    Scenario("one write, both crash", one_write, ANY, departures=2, n_faults=2),
    Scenario("one write, the link is cut", one_write, ("cut",), departures=2),
    Scenario("overlapping writes, one fault", two_overlapping_writes, ("cut", *ANY), departures=2, n_faults=1),
    Scenario("flush, one power cut", write_and_flush, POWER, departures=2, n_faults=1),
    Scenario("FUA, power cuts", durable_write, POWER, departures=2),
    Scenario("resync of a block that is written again", resync_one_block, ("cut", *ANY), n_faults=1),
    Scenario("that resync, reordered, and cut", resync_one_block, ("cut",), departures=2),
    Scenario("the peer is killed and comes back", crash_and_return(1, power=False), ("cut", *POWER)),
    Scenario("the peer loses power and comes back", crash_and_return(1, power=True), ("cut", *ANY)),
    Scenario("the primary loses power and comes back", crash_and_return(0, power=True), ("cut", *ANY)),
    Scenario("hand-over, power cuts", hand_over, ("cut", *POWER), departures=2),
    Scenario("protocol A, the primary dies", one_write, ("power a", "cut"), departures=2, mix=PROTOCOL_A),
    Scenario("fencing, the link is cut, power cuts", one_write, ("cut", *POWER), departures=2, mix=STONITH),
    Scenario("two Primaries write at once", both_write, ("cut", *ANY), departures=2, n_faults=1, mix=TWO_PRIMARIES),
    Scenario("two Primaries, reordered", both_write, (), departures=2, mix=TWO_PRIMARIES),
    Scenario("external metadata, power cuts", write_and_flush, POWER, departures=2, mix=EXTERNAL),
)


def _fault_options(world: World, budget: list[str], n_left: int) -> list[Option]:
    options: list[Option] = []

    def strike(name: str) -> None:
        budget.remove(name)
        if name == "cut":
            world.cut()
            return
        kind, who = name.split()
        world.crash(world.nodes["ab".index(who)], power=kind == "power")

    for name in dict.fromkeys(budget if n_left > 0 else []):
        if name == "cut":
            if any(n.link is not None for n in world.nodes):
                options.append((1.0, strike, (name,)))
        elif world.nodes["ab".index(name.split()[1])].engine is not None:
            options.append((1.0, strike, (name,)))
    return options


def play(scenario: Scenario, chooser: ScriptedChooser, world: World | None = None) -> World:
    """One sequence of the scenario, in a new *world* unless one is given; raises what the checkers raise."""
    world = world or World(scenario.mix, ScriptedChooser())
    admin.start_connected(world, scenario.primary)
    scenario.story(world)
    world.chooser = chooser
    budget = list(scenario.faults)
    for _ in range(scenario.steps):
        options = world.progress()
        if not options:
            break
        options += _fault_options(world, budget, scenario.n_faults - len(scenario.faults) + len(budget))
        world.n_steps += 1
        choice = chooser.choose(len(options)) if len(options) > 1 else 0
        _, action, args = options[choice]
        action(*args)
        world.checks.after_step()
    world.chooser = ScriptedChooser()
    admin.Healer(world).heal()
    return world


def explore_scenario(scenario: Scenario, departures: int | None = None, runs_max: int = 50_000) -> int:
    """Every sequence of *scenario*; how many there were."""
    return explore(lambda chooser: void(play(scenario, chooser)), departures or scenario.departures, runs_max)


def void(_: object) -> None:
    """Drop a value."""
