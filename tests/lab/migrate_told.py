"""How the migration is told: steps with the commands an administrator types, their time, and what was moved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

BLOCK: Final = 4096  # what a bit of the bitmap stands for


@dataclass(slots=True)
class Step:
    """One step and its figures. *moved* is in bytes; *unmounted* None where the file system stayed mounted."""

    number: int
    title: str
    seconds: float = 0.0
    moved: int = 0
    unmounted: float | None = None
    longest: float | None = None
    n_checked: int = 0


@dataclass(slots=True)
class Telling:
    """Prints; on a terminal with a last line that lives. *now* is what that line says at the moment."""

    console: Console
    now: Callable[[], str]
    disk_size: int = 0
    steps: list[Step] = field(default_factory=list)

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Everything that is told inside belongs to the step; its time is from here to the end."""
        step = Step(len(self.steps) + 1, title)
        self.steps.append(step)
        self.console.print(f"\n[bold]{step.number}. {escape(title)}[/bold]")
        began = time.monotonic()
        with self._living():
            yield step
        step.seconds = time.monotonic() - began
        self.console.print(f"   [green]{escape(self._figures(step))}[/green]")

    @contextlib.contextmanager
    def _living(self) -> Iterator[None]:
        if not self.console.is_terminal:
            yield
            return
        spinner = Spinner("dots", style="cyan")

        def line() -> Spinner:
            spinner.update(text=Text(self.now(), style="dim"))
            return spinner

        with Live(console=self.console, get_renderable=line, refresh_per_second=5, transient=True):
            yield

    def typed(self, host: str, line: str) -> None:
        self.console.print(f"   [cyan]{host}#[/cyan] {escape(line)}")

    def saw(self, text: str) -> None:
        self.console.print(f"   {escape(text)}")

    def _figures(self, step: Step) -> str:
        text = f"{step.seconds:.1f} s, {self._moved(step)}"
        if step.unmounted is not None:
            text += f", not mounted for {step.unmounted:.1f} s"
        if step.longest is not None:
            text += f"\n   longest wait of a writer {step.longest:.1f} s"
        if step.n_checked:
            text += f"\n   {step.n_checked} acknowledged files and records are there"
        return text

    def _moved(self, step: Step) -> str:
        if not step.moved:
            return "no block moved"
        share = 100 * step.moved / self.disk_size
        return f"{step.moved // BLOCK} blocks moved ({step.moved / (1 << 20):.1f} MiB, {share:.1f} % of the disk)"

    def table(self) -> None:
        table = Table(title_justify="left", pad_edge=False, box=None)
        table.add_column("step")
        for name in ("time", "blocks", "unmounted", "wait"):
            table.add_column(name, justify="right")
        for step in self.steps:
            table.add_row(
                f"{step.number}. {escape(step.title)}", f"{step.seconds:.1f} s", str(step.moved // BLOCK),
                *("" if value is None else f"{value:.1f} s" for value in (step.unmounted, step.longest)),
            )  # fmt: skip
        self.console.print()
        self.console.print(table)
