"""The table of a benchmark run: medians, ratios to the reference with their spread, and the bars."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from extras import Figure
from rich.console import Console
from rich.table import Table
from workloads import MIB, PEER_BARS, RATE, Measured, Workload

WIDTH: Final = 160  # columns of tables that nobody reads on a terminal


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values, the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} – {self.greatest:.2f})"


Rounds = Mapping[str, Sequence[Measured]]  # system -> its runs, round by round


def ratios(workload: Workload, rounds: Rounds, system: str, reference: str) -> Spread:
    """The system's figure to the reference's of the same round."""
    pairs = zip(rounds[system], rounds[reference], strict=True)
    return Spread.of([own.figure(workload) / other.figure(workload) for own, other in pairs])


def cpu_ratios(rounds: Rounds, system: str, reference: str) -> Spread | None:
    """The system's CPU time per operation to the reference's; None where too little was used to be counted."""
    pairs = list(zip(rounds[system], rounds[reference], strict=True))
    if any(not other.cpu_us_per_op for _, other in pairs):
        return None
    return Spread.of([own.cpu_us_per_op / other.cpu_us_per_op for own, other in pairs])


def figure_text(workload: Workload, runs: Sequence[Measured]) -> str:
    """The median of a system's runs, as people read it."""
    value = statistics.median(run.figure(workload) for run in runs)
    if workload.figure != RATE:
        return f"{value:,.0f} µs"
    if workload.block >= MIB:
        return f"{value * workload.block / 1e6:,.0f} MB/s"
    return f"{value:,.0f} /s"


def cpu_text(runs: Sequence[Measured]) -> str:
    """The median CPU time per operation and, of a system of several parts, that of each in the order of their names."""
    text = f"{statistics.median(run.cpu_us_per_op for run in runs):,.1f} µs"
    parts = list(runs[0].cpu_parts)
    if len(parts) == 1:
        return text
    return f"{text} ({' + '.join(f'{statistics.median(run.cpu_parts[p] for run in runs):,.1f}' for p in parts)})"


def show(
    console: Console, titles: Mapping[str, str], reference: str,
    results: Sequence[tuple[Workload, Rounds]], notes: Sequence[str],
) -> None:  # fmt: skip
    """Print the table; systems without results are left out."""
    table = Table(title="Ratios are to " + titles[reference], title_justify="left")
    table.add_column("workload")
    table.add_column("system")
    table.add_column("median", justify="right")
    table.add_column("p99", justify="right")
    table.add_column("CPU per op", justify="right")
    table.add_column("ratio (least – greatest)", justify="right")
    table.add_column("CPU ratio", justify="right")
    table.add_column("bar", justify="right")
    for workload, rounds in results:
        for i, (system, runs) in enumerate(rounds.items()):
            ratio = cpu = bar = ""
            if system != reference:
                found = ratios(workload, rounds, system, reference)
                ratio = str(found)
                cpu_found = cpu_ratios(rounds, system, reference)
                cpu = f"{cpu_found.median:.2f}" if cpu_found else ""
                if system == "tandem":
                    bar = _judged(workload.bar, found.median, workload.more_is_better)
                    cpu += f" {_judged(workload.cpu_bar, cpu_found.median, False)}".rstrip() if cpu_found else ""
            table.add_row(
                workload.title if i == 0 else "", titles[system], figure_text(workload, runs),
                f"{p99:,.0f} µs" if (p99 := statistics.median(r.p99_us for r in runs)) else "",
                cpu_text(runs), ratio, cpu, bar,
                end_section=i == len(rounds) - 1,
            )  # fmt: skip
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


def show_peers(
    console: Console, titles: Mapping[str, str], peers: Sequence[str], results: Sequence[tuple[Workload, Rounds]]
) -> None:
    """Print Tandem's ratio to each of the other systems with two copies, and the bars there are for it."""
    table = Table(title="Tandem to the others that keep two copies", title_justify="left")
    table.add_column("workload")
    for peer in peers:
        table.add_column(titles[peer], justify="right")
    for workload, rounds in results:
        row = []
        for peer in peers:
            if peer not in rounds:
                row.append("")
                continue
            found = ratios(workload, rounds, "tandem", peer)
            bar = PEER_BARS.get((workload.name, peer))
            row.append(f"{found} {_judged(bar, found.median, workload.more_is_better)}".rstrip())
        table.add_row(workload.title, *row)
    console.print(table)


def show_figures(console: Console, figures: Sequence[Figure]) -> None:
    """Print what is no fio job."""
    table = Table()
    table.add_column("Tandem, and the memory of all")
    table.add_column("", justify="right")
    table.add_column("bar", justify="right")
    for figure in figures:
        bar = _judged(figure.bar, figure.value, figure.more_is_better)
        table.add_row(figure.title, f"{figure.value:,.2f} {figure.unit}".rstrip(), bar)
    console.print(table)


def _judged(bar: float | None, value: float, more_is_better: bool) -> str:
    if bar is None:
        return ""
    sign, reached = ("≥", value >= bar) if more_is_better else ("≤", value <= bar)
    colour = "green" if reached else "red"
    return f"[{colour}]{sign} {bar}[/{colour}]"
