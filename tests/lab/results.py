"""What the tests of the lab found, kept in results.json: one line a cell of the matrix, and against what it ran.

`Collector` gathers the outcomes of a run, in the process that sees all of them. A run of every test replaces
the file, a run of some is entered into it. `page` makes docs/verified.md of it.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any, Final

import pytest

HERE: Final = Path(__file__).resolve().parent
RESULTS: Final = HERE / "results.json"
VERSIONS: Final = ("kernel", "drbd", "drbd-utils")

INTRODUCTION: Final = """\
# Verified against the kernel

What the tests in `tests/lab` found when they last ran: the kernel's own DRBD in small virtual machines on one side,
Tandem on the other (a few have Tandem on both, because they are about hosts that die). Cells are named after the side
that is Primary, or is asked. A cell ends with both disks compared byte by byte, with both nodes' states being each
other's counterpart, and with a look at the kernel's log for complaints.

"""

NOTE: Final = """\
`make lab` runs the tests and keeps what they found in `tests/lab/results.json`; `make docs` writes this page from it.
"""


class Collector:
    """The outcomes of one run. `note` takes every report, `save` writes them."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.cells: dict[str, dict[str, str]] = {}

    def note(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        self.versions |= {name: str(told[name]) for name in VERSIONS if name in told}
        name = report.nodeid.rpartition("tests/lab/")[2]
        cell = self.cells.setdefault(name, {"what": str(told.get("what", "")), "result": "passed"})
        if report.outcome != "passed":
            cell["result"] = report.outcome

    def save(self, path: Path) -> None:
        """Write the file: this run's cells, and the old ones unless every file of tests was in this run."""
        versions, cells = self.versions, self.cells
        ran = {name.partition("::")[0] for name in cells}
        if path.exists() and ran < {file.name for file in HERE.glob("test_*.py")}:
            old = json.loads(path.read_text())
            versions = {name: old[name] for name in VERSIONS if name in old} | versions
            cells = old["cells"] | cells
        lines = [f"  {json.dumps(name)}: {json.dumps(cells[name], ensure_ascii=False)}" for name in sorted(cells)]
        head = "".join(f" {json.dumps(name)}: {json.dumps(versions[name])},\n" for name in VERSIONS if name in versions)
        path.write_text("{\n" + head + ' "cells": {\n' + ",\n".join(lines) + "\n }\n}\n")


def what(function: Any) -> str:
    """A test in one sentence: the first paragraph of its docstring, or its name in words."""
    text = (function.__doc__ or "").strip().partition("\n\n")[0]
    return " ".join(text.split()) or function.__name__.removeprefix("test_").replace("_", " ").capitalize() + "."


def load() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def page() -> str:
    """docs/verified.md."""
    found = load()
    out = [INTRODUCTION, "| | version |\n|---|---|\n"]
    names = {"kernel": "Linux (User-Mode-Linux)", "drbd": "DRBD in that kernel", "drbd-utils": "drbd-utils"}
    out += [f"| {names[name]} | {found[name]} |\n" for name in VERSIONS]
    tests: dict[str, dict[str, list[tuple[str, dict[str, str]]]]] = {}
    for name, cell in found["cells"].items():
        file, _, test = name.partition("::")
        function, _, variant = test.removesuffix("]").partition("[")
        tests.setdefault(file, {}).setdefault(function, []).append((variant, cell))
    for file, functions in sorted(tests.items()):
        title = (ast.get_docstring(ast.parse((HERE / file).read_text())) or file).partition("\n")[0].rstrip(".")
        out.append(f"\n## {title}\n\n`tests/lab/{file}`\n\n| verified | cells | result |\n|---|---|---|\n")
        for _, cells in sorted(functions.items()):
            variants = ", ".join(f"`{variant}`" for variant, _ in cells if variant)
            passed = [variant for variant, cell in cells if cell["result"] == "passed"]
            result = f"{len(passed)} of {len(cells)} passed"
            text = re.sub(r"(?<!`)([*_|<])(?![^`]*`[^`]*$)", r"\\\1", cells[0][1]["what"])
            out.append(f"| {text} | {variants} | {result} |\n")
    return "".join(out) + "\n" + NOTE
