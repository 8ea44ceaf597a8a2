"""The simulator finds bugs that were put there on purpose; printed is how many runs each one took."""

from __future__ import annotations

import pytest

from tests.sim.plants import PLANTS, Plant
from tests.sim.run import Failure, run_seed

RUNS_MAX = 400


def runs_until_found(first_seed: int = 1, runs_max: int = RUNS_MAX) -> tuple[int, Failure] | None:
    """How many random runs it takes until one fails, and how it failed; None when none does."""
    for n, seed in enumerate(range(first_seed, first_seed + runs_max), 1):
        try:
            run_seed(seed)
        except Failure as failure:
            return n, failure
    return None


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.name)
def test_the_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.put(monkeypatch)
    found = runs_until_found()
    assert found is not None, f"{plant.says}: not found in {RUNS_MAX} runs"
    n, failure = found
    print(f"{plant.name}: found in run {n}: {failure}")
