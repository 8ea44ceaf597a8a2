"""`make migrate-demo` as a test, and what it leaves behind when it is interrupted: nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from .migrate import SIZE, Story
from .migrate_told import BLOCK
from .uml import HERE, Lab


def test_there_and_back_in_use(lab: Lab) -> None:
    """Every step checks itself; here is what they add up to."""
    with Story(lab, Console(width=120, highlight=False)) as story:
        story.play()
    steps = story.told.steps
    assert sum(step.moved for step in steps) < SIZE // 10
    replaced = [step for step in steps if "replaces" in step.title]
    assert len(replaced) == 4
    assert all(step.moved >= BLOCK and step.unmounted is None for step in replaced)
    moved_over = [step for step in steps if step.unmounted is not None]
    assert len(moved_over) == 3
    assert sum(step.moved for step in moved_over if "Fail over" in step.title) == 0
    assert story.load.ledger.n_acknowledged > 1000


def test_interrupted(tmp_path: Path) -> None:
    """Ctrl-C while the guests serve: they end, their files go, and the exit status says why."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.migrate"], cwd=HERE.parents[1], env=os.environ | {"TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout as told:
        for line in told:
            if "drbdadm primary" in line:
                break
        assert any(tmp_path.iterdir())
        os.killpg(process.pid, signal.SIGINT)
        assert "Ending." in told.read()
    assert process.wait() == 130
    assert not list(tmp_path.iterdir())
    assert not machines_of(tmp_path)


def machines_of(directory: Path) -> list[str]:
    """Processes that were started with files of *directory*."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue  # it has just ended
        if os.fsencode(directory) in words:
            found.append(words.decode("utf-8", "replace"))
    return found
