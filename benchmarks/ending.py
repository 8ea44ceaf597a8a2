"""How a run ends early: once, in order, and with nothing left behind.

Ending what was started takes seconds, and a second Ctrl-C in between would leave some of it running. So the first
signal is the last that counts. What slipped through all the same (a server that was being started, the children of a
fio that was killed) is found by an entry in its environment, which every process of a run inherits from it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MARK: Final = "TANDEM_BENCHMARK"


def on_signals() -> None:
    """From now on the first of `SIGNALS` raises SystemExit with the status a shell expects."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup, say
            signal.signal(number, _interrupted)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    begin()
    sys.exit(128 + number)


def begin() -> None:
    """From now on no signal interrupts, neither this program nor what it starts."""
    if all(signal.getsignal(number) is signal.SIG_IGN for number in SIGNALS):
        return  # a signal has begun it
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    clear = "\x1b[K" if sys.stderr.isatty() else ""  # of what goes on, which is on this line
    print(f"{clear}Ending what was started …", file=sys.stderr, flush=True)


def mark(run: Path) -> None:
    """All that is started from now on belongs to the run with this directory."""
    os.environ[MARK] = str(run)


def leftovers(run: Path) -> list[int]:
    """The pids of what still runs of that run, without this process. Source: proc(5), environ."""
    entry, found = f"{MARK}={run}".encode(), []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):  # it has ended, or is another user's
                if entry in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
    return found


def end_leftovers(run: Path) -> None:
    """Kill them. Again until there are none, as one may have started another meanwhile."""
    while pids := leftovers(run):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
