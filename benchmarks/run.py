"""`make bench`: every system in turn, interleaved and repeated, and the ratios between them.

One round runs each workload once on each system, so that what the machine does meanwhile (a noisy
neighbour, a warm processor) meets all of them alike; the ratio is taken within the round, and its median
and spread over the rounds are what counts. See README.md for how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
except ImportError as error:
    sys.exit(f"{error}: run it as .venv/bin/python benchmarks/run.py; `make bench` makes that virtual environment")

import ending
import extras
import machine
import options as command
import report
from extras import FILL, RESYNCED
from replicated import ALL, Tandem, other_tree
from systems import BenchError, System
from workloads import MIB, WORKLOADS, FioError, Measured, Workload, measured, run_fio

REFERENCE = "nbdkit"
# Of one system; the others are measured all the same.
FAILURES = (BenchError, FioError, OSError, subprocess.SubprocessError)


def main() -> int:
    options = command.parse()
    console = Console(width=None if sys.stdout.isatty() else report.WIDTH)
    ending.on_signals()
    try:
        command.check(options)
        systems = _chosen(options, console)
        command.check_room(options, systems)
        return _within(options, console, systems)
    except FAILURES as error:
        print(f"The benchmark cannot go on: {error}", file=sys.stderr)
        return 1


def _within(options: argparse.Namespace, console: Console, systems: list[type[System]]) -> int:
    """A run in a directory of its own; afterwards neither that is there nor any process of it."""
    directory = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=options.dir)).absolute()
    ending.mark(directory)
    try:
        with contextlib.ExitStack() as stack:
            try:
                return _run(options, console, systems, directory, stack)
            finally:
                ending.begin()
    finally:
        ending.end_leftovers(directory)
        shutil.rmtree(directory, ignore_errors=True)


def _chosen(options: argparse.Namespace, console: Console) -> list[type[System]]:
    """The systems to be measured; says why one is not. BenchError when the reference cannot be."""
    chosen: list[type[System]] = []
    candidates = [*ALL, other_tree(Path(options.also))] if options.also else list(ALL)
    for system in candidates:
        if options.system and system.name not in (*options.system, REFERENCE, "other"):
            continue
        if options.quick and not options.system and not system.is_quick:
            continue
        why = system.unavailable()
        if why:
            console.print(f"Left out: {system.title}: {why}", markup=False)
        else:
            chosen.append(system)
    if REFERENCE not in [system.name for system in chosen]:
        raise BenchError("without nbdkit there is nothing that ratios could be to; on Debian: apt install nbdkit")
    return chosen


def _started(
    options: argparse.Namespace, console: Console, classes: list[type[System]], directory: Path,
    stack: contextlib.ExitStack, progress: Progress,
) -> list[System]:  # fmt: skip
    """All systems that start, with their exports written once."""
    systems: list[System] = []
    for cls in classes:
        progress.show("starting all systems", cls.title)
        system = cls(directory, options.size)
        stack.callback(system.stop)
        try:
            system.start()
            run_fio(FILL, system, options.size, 0.5 + options.size / (500 * MIB), 1)
        except FAILURES as error:
            _leave_out(console, system, error)
        else:
            systems.append(system)
    return systems


def _run(
    options: argparse.Namespace, console: Console, classes: list[type[System]], directory: Path,
    stack: contextlib.ExitStack,
) -> int:  # fmt: skip
    described = machine.describe(directory)
    progress = Progress()
    systems = _started(options, console, classes, directory, stack, progress)
    workloads = [
        w for w in WORKLOADS
        if (w.name in options.workload if options.workload else w.quick or not options.quick)
    ]  # fmt: skip
    results: dict[str, dict[str, list[Measured]]] = {
        w.name: {s.name: [] for s in systems if s.measures(w)} for w in workloads
    }
    pairs = [] if options.no_resync else _resync_pairs(options, console, systems, directory, stack)
    resyncs: dict[str, list[extras.Resynced]] = {pair.name: [] for pair in pairs}
    others = machine.Others()
    every = [pid for system in (*systems, *pairs) for pid in system.pids]
    for number in range(options.rounds):
        for workload in workloads:
            # The order changes from round to round, so that nobody always comes after the same neighbour.
            taking_part = [system for system in systems if system.measures(workload)]
            for system in taking_part if number % 2 == 0 else reversed(taking_part):
                progress.show(f"round {number + 1} of {options.rounds}: {workload.title}", system.title)
                try:
                    with others.watch(every):
                        found = _measure(workload, system, options, number)
                except FAILURES as error:
                    _leave_out(console, system, error)
                    systems.remove(system)
                    for rounds in results.values():
                        rounds.pop(system.name, None)
                else:
                    results[workload.name][system.name].append(found)
        for pair in pairs[:: 1 if number % 2 == 0 else -1]:
            progress.show(f"round {number + 1} of {options.rounds}: resync", pair.title)
            try:
                resyncs[pair.name].append(extras.resync(pair, pair.size, options.seconds, number + 1))
            except FAILURES as error:
                console.print(f"Left out from here on: resync of {pair.title}: {error}", markup=False)
                pairs.remove(pair)
    without = options.quick or options.no_extras
    figures = [] if without else _extras(options, console, systems, directory, progress)
    progress.clear()
    described["others during"] = others.share
    loops = [system.loops() for system in systems if isinstance(system, Tandem)]
    described["loops"] = " ".join(loops)
    titles = {system.name: system.title for system in systems}
    notes = [*_resync_notes(resyncs, {cls.name: cls.title for cls in classes}), *loops, *_machine_notes(described)]
    shown = [(w, results[w.name]) for w in workloads]
    peers = [s.name for s in systems if s.is_replicated and not isinstance(s, Tandem)] if "tandem" in titles else []
    for system in systems:
        try:
            figures += extras.memory(system)
        except FAILURES as error:
            console.print(f"Left out: memory of {system.title}: {error}", markup=False)
    kept = Console(file=io.StringIO(), record=True, width=report.WIDTH)
    for out in (console, kept):
        report.show(out, titles, REFERENCE, shown, notes)
        if peers:
            report.show_peers(out, titles, peers, shown)
        report.show_figures(out, figures)
    everything = _found(options, described, workloads, results, resyncs, figures, titles)
    _keep(options, everything, kept.export_text())
    return 0


def _keep(options: argparse.Namespace, everything: dict[str, Any], tables: str) -> None:
    """Write what was asked for, so that figures, tables and plots are always of one run."""
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if options.table:
        Path(options.table).write_text(tables, encoding="utf-8")
    if options.plots:
        import plots  # Its library is not needed for anything else.

        plots.draw(everything, Path(options.plots))


class Progress:
    """What goes on, on stderr: one line that changes on a terminal, elsewhere a line for each new text."""

    def __init__(self) -> None:
        self._last = ""

    def show(self, text: str, detail: str = "") -> None:
        """*detail* changes too often for lines of its own."""
        if sys.stderr.isatty():
            line = f"{text}: {detail}" if detail else text
            print(line[: shutil.get_terminal_size().columns - 1], end="\x1b[K\r", file=sys.stderr, flush=True)
        elif text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def clear(self) -> None:
        if sys.stderr.isatty():
            print(end="\x1b[K", file=sys.stderr, flush=True)


def _leave_out(console: Console, system: System, error: Exception) -> None:
    """Go on without a system that failed; without the reference there is nothing to compare with."""
    if system.name == REFERENCE:
        raise error
    console.print(f"Left out from here on: {system.title}: {error}", markup=False)


def _extras(
    options: argparse.Namespace, console: Console, systems: list[System], directory: Path, progress: Progress
) -> list[extras.Figure]:
    """What is no fio job; the systems that were measured are idle meanwhile."""
    figures: list[extras.Figure] = []
    measures: list[partial[list[extras.Figure]]] = []
    for system in systems:
        if system.name == "tandem" and isinstance(system, Tandem):
            measures += [partial(measure, system, options.size) for measure in extras.ON_A_PAIR]
    measures += [partial(measure, directory) for measure in extras.ALONE]
    for measure in measures:
        name = measure.func.__name__
        progress.show(name.replace("_", " "))
        try:
            figures += measure()
        except FAILURES as error:
            console.print(f"Left out: {name}: {error}", markup=False)
    return figures


def _measure(workload: Workload, system: System, options: argparse.Namespace, number: int) -> Measured:
    os.sync()  # what the one before has written is not to be written back, or flushed, at the expense of this one
    before = system.cpu_seconds()
    fio = run_fio(workload, system, options.size, options.seconds, number + 1)
    return measured(workload, fio, {part: used - before[part] for part, used in system.cpu_seconds().items()})


def _resync_pairs(
    options: argparse.Namespace, console: Console, systems: list[System], directory: Path, stack: contextlib.ExitStack
) -> list[Tandem]:
    """What resyncs are measured on, started."""
    pairs = []
    for system in systems:
        if not isinstance(system, Tandem) or system.name not in RESYNCED:
            continue
        pair = extras.resync_pair(system, directory, options.quick)
        try:
            if pair is not system:
                stack.callback(pair.stop)
                pair.start()
        except FAILURES as error:
            console.print(f"Left out: resync: {pair.title}: {error}", markup=False)
        else:
            pairs.append(pair)
    return pairs


def _resync_notes(resyncs: dict[str, list[extras.Resynced]], titles: dict[str, str]) -> list[str]:
    notes = []
    for name, found in resyncs.items():
        if not found:
            continue
        rates = report.Spread.of([one.bytes_per_s / 1e6 for one in found])
        to_writes = report.Spread.of([one.bytes_per_s / one.writes_bytes_per_s for one in found])
        notes.append(
            f"{titles[name]}: resync of one dirty region of {min(one.n_bytes for one in found) / MIB:,.0f} MiB: "
            f"{rates.median:,.0f} MB/s ({rates.least:,.0f} – {rates.greatest:,.0f}), "
            f"{to_writes} of its 1 MiB write rate (bar ≥ 0.5)"
        )
    return notes


def _machine_notes(described: dict[str, Any]) -> list[str]:
    before, during = float(described["others before"]), float(described["others during"])
    notes = [
        f"{described['processors']} × {described['processor']}, kernel {described['kernel']}, "
        f"Python {described['python']}, {described['file system']}; other programs used {before:.0%} of the "
        f"processors before and {during:.0%} during the measurements."
    ]
    if max(before, during) > machine.IDLE:
        notes.append("The machine was not idle: only the ratios mean something, and their spread is wide.")
    return notes


def _found(
    options: argparse.Namespace, described: dict[str, Any], workloads: list[Workload],
    results: dict[str, dict[str, list[Measured]]], resyncs: dict[str, list[extras.Resynced]],
    figures: list[extras.Figure], titles: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """Everything that was measured, for `--json`."""
    return {
        "machine": described,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "size": options.size,
        "reference": REFERENCE,
        "titles": titles,
        "workloads": [
            {
                **asdict(workload),
                "systems": {
                    name: {
                        "runs": [asdict(run) for run in runs],
                        "ratio": asdict(report.ratios(workload, results[workload.name], name, REFERENCE)),
                    }
                    for name, runs in results[workload.name].items()
                },
            }
            for workload in workloads
        ],
        "resyncs": {name: [asdict(one) for one in found] for name, found in resyncs.items()},
        "figures": [asdict(figure) for figure in figures],
    }


if __name__ == "__main__":
    sys.exit(main())
