"""What is kept of a run of the lab: a whole run replaces, a run of some tests is entered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab import results
from tests.lab.results import Collector


def report(name: str, when: str = "call", outcome: str = "passed") -> pytest.TestReport:
    return pytest.TestReport(
        f"tests/lab/{name}", (name, None, ""), {}, outcome, None, when,  # type: ignore[arg-type]
        user_properties=[("what", "It works."), ("kernel", "6.1.0")],
    )  # fmt: skip


def saved(path: Path, *reports: pytest.TestReport) -> dict[str, Any]:
    collector = Collector()
    for one in reports:
        collector.note(one)
    collector.save(path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("test_a.py", "test_b.py"):
        (tmp_path / name).write_text('"""Something."""\n')
    monkeypatch.setattr(results, "HERE", tmp_path)
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.json")
    return tmp_path / "results.json"


def test_a_run_of_some_is_entered_and_a_run_of_all_replaces(files: Path) -> None:
    whole = saved(files, report("test_a.py::test_x"), report("test_b.py::test_y[kernel]"))
    assert whole["kernel"] == "6.1.0"
    assert whole["cells"]["test_b.py::test_y[kernel]"] == {"what": "It works.", "result": "passed"}
    some = saved(files, report("test_b.py::test_z"))
    assert set(some["cells"]) == {"test_a.py::test_x", "test_b.py::test_y[kernel]", "test_b.py::test_z"}
    again = saved(files, report("test_a.py::test_x"), report("test_b.py::test_z"))
    assert set(again["cells"]) == {"test_a.py::test_x", "test_b.py::test_z"}


@pytest.mark.parametrize("when", ["setup", "call", "teardown"])
def test_what_fails_anywhere_has_failed(files: Path, when: str) -> None:
    """Most of all in the teardown, where the kernel's log is looked at."""
    phases = ("setup", "call", "teardown")
    reports = [report("test_a.py::test_x", at, "failed" if at == when else "passed") for at in phases]
    assert saved(files, *reports)["cells"]["test_a.py::test_x"]["result"] == "failed"


def test_the_page_counts_the_cells(files: Path) -> None:
    saved(
        files, report("test_a.py::test_x[kernel]"), report("test_a.py::test_x[tandem]", outcome="failed"),
        report("test_b.py::test_y"),
    )  # fmt: skip
    found = json.loads(files.read_text()) | {"drbd": "8.4.11", "drbd-utils": "9.22.0"}
    files.write_text(json.dumps(found))
    page = results.page()
    assert "## Something" in page and "| Linux (User-Mode-Linux) | 6.1.0 |" in page
    assert "| It works. | `kernel`, `tandem` | 1 of 2 passed |" in page
    assert "| It works. |  | 1 of 1 passed |" in page
