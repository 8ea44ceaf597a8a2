"""The simulator finds bugs that were put there on purpose; printed is how many runs each one took."""

from __future__ import annotations

import pytest

from tests.sim.chooser import SeededChooser
from tests.sim.mix import draw
from tests.sim.plants import PLANTS, Plant
from tests.sim.run import Failure, run_seed

RUNS_MAX = 400


def runs_until_found(plant: Plant) -> tuple[int, Failure] | None:
    """How many random runs it takes until one fails, and how it failed; None when none does."""
    for seed in range(1, RUNS_MAX + 1):
        try:
            run_seed(seed, plant.tune(draw(SeededChooser(seed))))
        except Failure as failure:
            return seed, failure
    return None


@pytest.mark.parametrize("plant", PLANTS, ids=lambda p: p.name)
def test_the_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant.put(monkeypatch)
    found = runs_until_found(plant)
    assert found is not None, f"{plant.says}: not found in {RUNS_MAX} runs"
    n, failure = found
    assert not isinstance(failure.error, (TypeError, AttributeError)), f"the plant itself is broken: {failure}"
    print(f"{plant.name}: found in run {n}: {failure}")
