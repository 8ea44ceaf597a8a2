"""What all tests share: outside programs by name, a pair of real nodes, and no skipping in CI.

`program` gives the path of an outside program or skips the test with the reason. With CI set in the
environment a skip of any kind is a failure. `pair` and `new_pair` are two real daemons over loopback in a
temporary directory; when the test fails, the end of their logs is in its report.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tandem.tools.demo_pair import Pair

MIB = 1 << 20
LOG_LINES = 80

NewPair = Callable[..., Pair]
FindProgram = Callable[[str], str]

in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false", "no")


# ------------------------------------------------------------------------------------ no skip in CI


def _forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if in_ci and report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"CI allows no skip, and this was one. {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    _forbid_skip(report)
    if report.when == "call" and report.failed:
        pairs: list[Pair] = item.stash.get(_PAIRS, [])
        for pair in pairs:
            report.sections.append(("logs of the two nodes", pair.logs(LOG_LINES)))


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome: Any = yield
    _forbid_skip(outcome.get_result())


# --------------------------------------------------------------------------------- outside programs


@pytest.fixture(scope="session")
def program() -> FindProgram:
    """The path of an outside program; the test is skipped with the reason when it is not there."""

    def find(name: str) -> str:
        path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
        found = shutil.which(name, path=path)
        if found is None:
            pytest.skip(f"{name} is not installed; `make test` installs it, see tests/debian-packages.txt")
        return found

    return find


# --------------------------------------------------------------------------------------- two nodes


_PAIRS: pytest.StashKey[list[Pair]] = pytest.StashKey()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory with a name short enough for Unix sockets, which pytest's own is not."""
    path = Path(tempfile.mkdtemp(prefix="tandem-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def small_disk(directory: Path, program: FindProgram) -> Iterator[Path]:
    """A directory on a file system of 6 MiB. Mounting one is root's: anybody else skips the test."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    place = directory / "small"
    place.mkdir()
    subprocess.run([program("mount"), "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)], check=True)
    yield place
    # Lazily: daemons with files on it may not have ended yet.
    subprocess.run([program("umount"), "-l", str(place)], check=True)


@pytest.fixture
def new_pair(request: pytest.FixtureRequest, directory: Path) -> Iterator[NewPair]:
    """Makes pairs that are not started yet; takes the arguments of `Pair` behind its directory."""
    made: list[Pair] = []
    request.node.stash[_PAIRS] = made

    def make(size: int = 64 * MIB, **options: Any) -> Pair:
        place = directory / str(len(made))
        place.mkdir()
        made.append(Pair(place, size, **options))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


@pytest.fixture
def pair(new_pair: NewPair) -> Pair:
    """Two nodes alice and bob with 64 MiB each, up, in sync, alice Primary."""
    made = new_pair()
    made.start()
    return made
