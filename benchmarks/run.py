"""`make bench`: every system in turn, interleaved and repeated, and the ratios between them.

One round runs each workload once on each system, so that what the machine does meanwhile (a noisy
neighbour, a warm processor) meets all of them alike; the ratio is taken within the round, and its median
and spread over the rounds are what counts. See README.md for how to read the result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import extras
import machine
import report
from extras import FILL
from replicated import ALL, Tandem, other_tree
from rich.console import Console
from systems import BenchError, System
from workloads import MIB, WORKLOADS, FioError, Measured, Workload, cpu_seconds, measured, run_fio

REFERENCE = "nbdkit"
RESYNCED = ("tandem", "other")
# Of one system; the others are measured all the same.
FAILURES = (BenchError, FioError, OSError, subprocess.SubprocessError)


def main() -> int:
    options = _options()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if shutil.which("fio") is None:
        console.print("fio is not installed; on Debian: apt install fio nbdkit")
        return 1
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        console.print("There is no matplotlib for --plots; `make bench` installs it.")
        return 1
    systems = _chosen(options, console)
    if REFERENCE not in [system.name for system in systems]:
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended, too
    directory = Path(tempfile.mkdtemp(prefix="tandem-bench-", dir=options.dir))
    try:
        with contextlib.ExitStack() as stack:
            return _run(options, console, systems, directory, stack)
    except (BenchError, FioError) as error:
        console.print(f"The benchmark could not go on: {error}", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure Tandem against others with fio's nbd engine.")
    parser.add_argument("--quick", action="store_true", help="under three minutes")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long one measurement takes")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the exports (512; 256 with --quick)")
    parser.add_argument("--workload", action="append", metavar="NAME", help="only these (may be repeated)")
    parser.add_argument("--system", action="append", metavar="NAME", help="only these, and the reference")
    parser.add_argument("--also", metavar="DIR", help="measure the Tandem of another checkout, too")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the backing files are made")
    parser.add_argument("--no-resync", action="store_true", help="leave the resync out")
    parser.add_argument("--no-extras", action="store_true", help="only fio's jobs; --quick implies it")
    parser.add_argument("--plots", metavar="DIR", help="draw throughput and latency against queue depth there")
    options = parser.parse_args()
    if options.size is None:
        options.size = 256 if options.quick else 512
    if options.rounds < 1 or options.seconds < 0.1 or options.size < 16:
        parser.error("at least one round, 0.1 seconds and 16 MiB are needed")
    options.size *= MIB
    if not Path(options.dir).is_dir():
        parser.error(f"there is no directory {options.dir}")
    if options.also and not (Path(options.also) / "repl").is_dir():
        parser.error(f"there is no checkout of Tandem in {options.also}")
    names = [w.name for w in WORKLOADS]
    for name in options.workload or ():
        if name not in names:
            parser.error(f"no workload {name}; there are {', '.join(names)}")
    return options


def _chosen(options: argparse.Namespace, console: Console) -> list[type[System]]:
    """The systems to be measured; says why one is not."""
    chosen: list[type[System]] = []
    candidates = [*ALL, other_tree(Path(options.also))] if options.also else list(ALL)
    for system in candidates:
        if options.system and system.name not in (*options.system, REFERENCE, "other"):
            continue
        if options.quick and not options.system and not system.is_quick:
            continue
        why = system.unavailable()
        if why:
            console.print(f"Left out: {system.title}: {why}")
        else:
            chosen.append(system)
    return chosen


def _run(
    options: argparse.Namespace, console: Console, classes: list[type[System]], directory: Path,
    stack: contextlib.ExitStack,
) -> int:  # fmt: skip
    described = machine.describe(directory)
    systems: list[System] = []
    for cls in classes:
        system = cls(directory, options.size)
        stack.callback(system.stop)
        try:
            system.start()
            run_fio(FILL, system, options.size, 0.5 + options.size / (500 * MIB), 1)
        except FAILURES as error:
            _leave_out(console, system, error)
        else:
            systems.append(system)
    workloads = [
        w for w in WORKLOADS
        if (w.name in options.workload if options.workload else w.quick or not options.quick)
    ]  # fmt: skip
    results: dict[str, dict[str, list[Measured]]] = {
        w.name: {s.name: [] for s in systems if s.measures(w)} for w in workloads
    }
    resyncs: dict[str, list[float]] = {s.name: [] for s in systems if s.name in RESYNCED}
    others = machine.Others()
    every = [pid for system in systems for pid in system.pids]
    for number in range(options.rounds):
        for workload in workloads:
            # The order changes from round to round, so that nobody always comes after the same neighbour.
            taking_part = [system for system in systems if system.measures(workload)]
            for system in taking_part if number % 2 == 0 else reversed(taking_part):
                if console.is_terminal:
                    text = f"round {number + 1} of {options.rounds}: {workload.title}: {system.title}"
                    console.print(text, end="\x1b[K\r", highlight=False)
                try:
                    with others.watch(every):
                        found = _measure(workload, system, options, number)
                except FAILURES as error:
                    _leave_out(console, system, error)
                    systems.remove(system)
                    for rounds in results.values():
                        rounds.pop(system.name, None)
                    resyncs.pop(system.name, None)
                else:
                    results[workload.name][system.name].append(found)
        if not options.no_resync:
            for system in systems:
                if isinstance(system, Tandem) and system.name in RESYNCED:
                    resyncs[system.name].append(_resync(system, options))
    figures = [] if options.quick or options.no_extras else _extras(options, console, systems, directory)
    described["others during"] = others.share
    loops = [system.loops() for system in systems if isinstance(system, Tandem)]
    described["loops"] = " ".join(loops)
    notes = [*_resync_notes(resyncs, results), *loops, *_machine_notes(described)]
    titles = {system.name: system.title for system in systems}
    shown = [(w, results[w.name]) for w in workloads]
    report.show(console, titles, REFERENCE, shown, notes)
    peers = [s.name for s in systems if s.is_replicated and not isinstance(s, Tandem)]
    if peers and "tandem" in titles:
        report.show_peers(console, titles, peers, shown)
    memory = [extras.Figure(f"peak memory of a process: {s.title}", extras.peak_rss(s.pids), "MiB") for s in systems]
    report.show_figures(console, [*figures, *memory])
    everything = _found(options, described, workloads, results, resyncs, [*figures, *memory], titles)
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if options.plots:
        import plots  # Its library is not needed for anything else.

        plots.draw(everything, Path(options.plots))
    return 0


def _leave_out(console: Console, system: System, error: Exception) -> None:
    """Go on without a system that failed; without the reference there is nothing to compare with."""
    if system.name == REFERENCE:
        raise error
    console.print(f"Left out from here on: {system.title}: {error}", markup=False)


def _extras(
    options: argparse.Namespace, console: Console, systems: list[System], directory: Path
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
        if console.is_terminal:
            console.print(name, end="\x1b[K\r", highlight=False)
        try:
            figures += measure()
        except FAILURES as error:
            console.print(f"Left out: {name}: {error}", markup=False)
    return figures


def _measure(workload: Workload, system: System, options: argparse.Namespace, number: int) -> Measured:
    os.sync()  # what the one before has written is not to be written back, or flushed, at the expense of this one
    ticks = os.sysconf("SC_CLK_TCK")
    before = cpu_seconds(system.pids, ticks)
    fio = run_fio(workload, system, options.size, options.seconds, number + 1)
    return measured(workload, fio, cpu_seconds(system.pids, ticks) - before)


def _resync(system: Tandem, options: argparse.Namespace) -> float:
    """Bytes per second of copying one dirty region: the first 256 MiB (1 GiB at most)."""
    size = min(options.size, 1 << 30)
    seconds = 0.5 + size / (300 * MIB)
    n_bytes, took = system.resync(lambda: run_fio(FILL, system, size, seconds, 1))
    return n_bytes / took


def _resync_notes(resyncs: dict[str, list[float]], results: dict[str, dict[str, list[Measured]]]) -> list[str]:
    notes = []
    for name, rates in resyncs.items():
        if not rates:
            continue
        spread = report.Spread.of(rates)
        text = (
            f"Resync of one dirty region ({name}): {spread.median / 1e6:,.0f} MB/s "
            f"({spread.least / 1e6:,.0f} – {spread.greatest / 1e6:,.0f})"
        )
        writes = results.get("write-1m-qd8", {}).get(name)
        if writes:
            to_writes = report.Spread.of([r / w.bytes_per_s for r, w in zip(rates, writes, strict=True)])
            text += f", {to_writes} of its 1 MiB write rate (bar ≥ 0.5)"
        notes.append(text)
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
    results: dict[str, dict[str, list[Measured]]], resyncs: dict[str, list[float]], figures: list[extras.Figure],
    titles: dict[str, str],
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
        "resync_bytes_per_s": resyncs,
        "figures": [asdict(figure) for figure in figures],
    }


if __name__ == "__main__":
    sys.exit(main())
