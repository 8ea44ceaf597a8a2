"""The demonstration: its story, its printed commands, its end."""

from __future__ import annotations

import os
import secrets
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tandem.tools import demo
from tandem.tools.demo_nbd import write
from tandem.tools.demo_pair import Pair, alone, in_sync
from tandem.tools.demo_story import Broken, Story, _old_or_new

from tests.conftest import FindProgram, NewPair


def test_the_story_holds(new_pair: NewPair) -> None:
    pair = new_pair(256 << 20)
    seed = secrets.randbelow(1 << 31)
    said: list[str] = []
    print(f"seed {seed}; repeat it with: make demo STORY=1 SEED={seed}")
    story = Story(pair, seed, said.append)
    story.play()
    assert said[-1].strip().startswith("All of it held") and story.n_chapter == 9


def test_the_story_notices_foreign_bytes() -> None:
    request = write(4096, b"n" * 1024)
    _old_or_new(request, b"n" * 512 + bytes(512))
    with pytest.raises(Broken, match="sector at byte 4608"):
        _old_or_new(request, b"n" * 512 + b"?" * 512)


def test_every_printed_client_line_works(pair: Pair, program: FindProgram) -> None:
    for name in ("nbdinfo", "nbd-client", "qemu-io", "qemu-img", "nbdcopy", "fio"):
        program(name)
    for line in demo.client_lines(pair):
        done = subprocess.run(
            ["sh", "-c", line], capture_output=True, text=True, cwd=pair.directory, check=False,
            env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def test_every_printed_failover_line_works(pair: Pair, program: FindProgram) -> None:
    program("nbdinfo")
    for line in demo.failover_lines(pair):
        script = f"{demo.environment_line(pair)}\n{line}"
        done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (line, done.stdout, done.stderr)
        if line.startswith("kill"):
            pair.wait(pair.second, "alone", alone)
    assert in_sync(pair.status(pair.first))


def test_too_small_a_place_is_one_sentence(tmp_path: Path) -> None:
    demo.check_room(tmp_path, 1)
    with pytest.raises(demo.NoRoom, match=r"MiB are free in .*TMPDIR"):
        demo.check_room(tmp_path, 1 << 62)


def run_demo(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tandem.tools.demo", *options], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def until(process: subprocess.Popen[str], marker: str) -> list[str]:
    """The lines of *process* up to the one with *marker*."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if marker in line:
            return lines
    raise AssertionError("\n".join(lines))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_demo_ends_what_it_started_and_leaves_nothing(number: signal.Signals) -> None:
    process = run_demo()
    try:
        lines = until(process, "bob: ")
        directory = Path(lines[0].rpartition(" in ")[2])
        pids = [int((directory / f"run/{name}/r0.pid").read_text()) for name in ("alice", "bob")]
        daemons = [os.pidfd_open(pid) for pid in pids]
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "Traceback" not in out and "\x1b" not in "".join(lines)
    for daemon in daemons:
        assert select.select([daemon], [], [], 0)[0], "a daemon still runs"
        os.close(daemon)
    assert not directory.exists()


def test_an_interrupted_story_does_not_count_as_held() -> None:
    process = run_demo("--story")
    try:
        until(process, "1. Two disks")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "All of it held" not in out and "Traceback" not in out
