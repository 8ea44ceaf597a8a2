"""The generated pages of docs/ are those of the present code and of the lab's last results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.doc_tables import DOCS, pages
from tests.lab import results


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == pages()[name], "run: make docs"


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    names = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert {name for name in names if f"({name})" not in index} == set()


def test_every_test_of_the_lab_has_passed() -> None:
    """The results that are kept are those of all tests there are, and none failed."""
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "tests/lab"], cwd=DOCS.parent, text=True,
        stdout=subprocess.PIPE, env=os.environ | {"TANDEM_LAB": "1"}, check=True,
    ).stdout  # fmt: skip
    there = {line.removeprefix("tests/lab/") for line in listed.splitlines() if "::" in line}
    cells = results.load()["cells"]
    assert there == cells.keys(), "run: make lab docs"
    assert {name: cell["result"] for name, cell in cells.items() if cell["result"] != "passed"} == {}
