"""Random runs of the simulator: `python tests/sim/run.py --n 2000`, or `--seed 17` to replay one.

A failing run prints its seed, its mix and the end of its trace; the same seed gives the same run.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

if __name__ == "__main__":  # started as a file: the repository's root is what imports start from
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tests.sim import admin
from tests.sim.chooser import ScriptedChooser, SeededChooser
from tests.sim.mix import Mix, draw
from tests.sim.scenarios import SCENARIOS, play
from tests.sim.world import World

COLLECT_EVERY = 4  # runs


class Failure(Exception):
    """A run that failed: its seed, and what to print."""

    def __init__(self, seed: int, mix: Mix, world: World | None, error: BaseException) -> None:
        super().__init__(f"seed {seed}: {type(error).__name__}: {error}")
        self.seed = seed
        self.mix = mix
        self.world = world
        self.error = error

    def report(self, n_lines: int = 60) -> str:
        lines = [f"seed {self.seed} failed; replay it with: make sim SEED={self.seed}"] if self.seed else []
        lines.append(str(self.mix))
        if self.world is not None:
            lines += self.world.describe()[-n_lines:]
        lines += traceback.format_exception(self.error)[-12:]
        return "\n".join(lines)


def run_seed(seed: int, mix: Mix | None = None) -> World:
    """One whole run: trouble, then healing. Raises Failure."""
    chooser = SeededChooser(seed)
    mix = mix or draw(chooser)
    world: World | None = None
    try:
        world = World(mix, chooser, seed)
        admin.bring_up(world)
        for _ in range(mix.steps):
            if not world.step():
                break
        world.note(None, "the trouble ends")
        admin.Healer(world).heal()
    except Exception as error:
        raise Failure(seed, mix, world, error) from error
    return world


def replay_scenario(name: str, script: list[int], n_lines: int) -> int:
    """Play one sequence of one scenario and print how it went."""
    scenario = next((s for s in SCENARIOS if name in s.name), None)
    if scenario is None:
        print(f"no scenario is called {name}; there are: {', '.join(s.name for s in SCENARIOS)}", file=sys.stderr)
        return 2
    world = World(scenario.mix, ScriptedChooser())
    try:
        play(scenario, ScriptedChooser(script), world)
    except Exception as error:
        print(Failure(0, scenario.mix, world, error).report(n_lines))
        return 1
    print("\n".join(world.describe()[-n_lines:]))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Random runs of the simulator.")
    parser.add_argument("--n", type=int, default=200, help="how many runs")
    parser.add_argument("--seed", type=int, default=None, help="replay this one run, or the first of --first")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--scenario", help="replay a scenario of scenarios.py (part of its name) with --script")
    parser.add_argument("--script", default="", help="its choices, separated by commas")
    parser.add_argument("--lines", type=int, default=60, help="how much of the trace to print")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failure")
    args = parser.parse_args()
    if args.scenario is not None:
        return replay_scenario(args.scenario, [int(c) for c in args.script.split(",") if c], args.lines)
    seeds = [args.seed] if args.seed is not None else range(args.first, args.first + args.n)
    gc.disable()  # worlds are full of cycles, and die all at once
    start, n_failed, n_steps, n_acked, n = time.process_time(), 0, 0, 0, 0
    counts: Counter[str] = Counter()
    for seed in seeds:
        n += 1
        if n % COLLECT_EVERY == 0:
            gc.collect()
        try:
            world = run_seed(seed)
            n_steps += world.n_steps
            counts += world.counts
            n_acked += sum(ledger.n_acked for ledger in world.ledgers)
        except Failure as failure:
            n_failed += 1
            if args.keep_going:
                print(failure, flush=True)
                continue
            print(failure.report(args.lines))
            return 1
    spent = time.process_time() - start
    print(
        f"{n} runs, {n_failed} failed, {n_steps} steps, {n_acked} writes answered, {spent:.1f} s CPU"
        f" ({n / max(spent, 1e-9):.0f} runs/s)"
    )
    print(", ".join(f"{what}: {n}" for what, n in sorted(counts.items())))
    return 1 if n_failed else 0


if __name__ == "__main__":
    sys.exit(main())
