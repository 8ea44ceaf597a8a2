"""Who decides what happens next: a seeded chooser for random runs, an exhaustive one for short scenarios.

The world asks one question, `choose(n)`: which of *n* things happens. Option 0 is by convention the most
ordinary one (work goes on, nothing breaks), so the exhaustive chooser can count departures from it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol


class Chooser(Protocol):
    """One decision at a time; *weights* are a hint that only the seeded chooser heeds."""

    def choose(self, n: int, weights: Sequence[float] | None = None) -> int: ...


class SeededChooser:
    """Draws from a pseudo-random source: the same seed gives the same run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._random = random.Random(seed)

    def choose(self, n: int, weights: Sequence[float] | None = None) -> int:
        if weights is None:
            return int(self._random.random() * n)
        at = self._random.random() * sum(weights)
        for i, weight in enumerate(weights):
            at -= weight
            if at < 0:
                return i
        return n - 1


class ScriptedChooser:
    """Replays *script*, then takes option 0 for ever; records what was asked."""

    def __init__(self, script: Sequence[int] = ()) -> None:
        self.script = tuple(script)
        self.taken: list[tuple[int, int]] = []  # (choice, how many options there were)

    def choose(self, n: int, weights: Sequence[float] | None = None) -> int:
        at = len(self.taken)
        choice = self.script[at] if at < len(self.script) else 0
        assert choice < n, f"the scripted choice {choice} at step {at} has only {n} options"
        self.taken.append((choice, n))
        return choice


class ReplayMismatch(Exception):
    """A scenario took another course with the same choices: it is not deterministic."""


def next_script(taken: Sequence[tuple[int, int]], departures_max: int) -> tuple[int, ...] | None:
    """The next sequence of choices in depth-first order after *taken*, or None when all were tried.

    A departure is a choice other than 0; sequences with more than *departures_max* are left out.
    """
    n_departures = [0]
    for choice, _ in taken:
        n_departures.append(n_departures[-1] + (choice != 0))
    for at in range(len(taken) - 1, -1, -1):
        choice, n = taken[at]
        if choice + 1 < n and n_departures[at] < departures_max:
            return (*(c for c, _ in taken[:at]), choice + 1)
    return None


def explore(run: Callable[[ScriptedChooser], None], departures_max: int, runs_max: int = 1_000_000) -> int:
    """Call *run* with every sequence of at most *departures_max* departures; how many there were.

    *run* raises on a failure; the chooser it was given then holds the failing sequence.
    """
    script: tuple[int, ...] | None = ()
    n_runs = 0
    while script is not None:
        chooser = ScriptedChooser(script)
        try:
            run(chooser)
        except Exception as error:
            error.add_note(f"the sequence of choices: {','.join(str(c) for c, _ in chooser.taken)}")
            raise
        n_runs += 1
        if len(chooser.taken) < len(script):
            raise ReplayMismatch(f"the run ended after {len(chooser.taken)} choices, the script has {len(script)}")
        assert n_runs <= runs_max, f"more than {runs_max} sequences: make the scenario shorter"
        script = next_script(chooser.taken, departures_max)
    return n_runs
