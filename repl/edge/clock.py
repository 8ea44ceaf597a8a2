"""Where time and entropy come from.

The machine asks for neither: it is told the time at every wake-up and draws from a source it was given
at its start. Both are made here, so that a recorded run can be repeated with the same seed. Time is the
event loop's, because the timers are set on it.
"""

from __future__ import annotations

import os
import random
from typing import Final

SEED_BYTES: Final = 32  # more than any UUID or challenge has, so that two nodes never draw alike


def new_seed() -> int:
    """A fresh seed from the operating system."""
    return int.from_bytes(os.urandom(SEED_BYTES), "big")


def entropy(seed: int | None = None) -> random.Random:
    """The source for the machine: generation UUIDs, challenges, jitter. The same *seed*, the same draws."""
    return random.Random(new_seed() if seed is None else seed)
