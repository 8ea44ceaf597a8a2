"""The command line of the benchmark, and what can be known to be wrong before half an hour is spent on measuring."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from extras import GIB, RESYNCED
from replicated import ALL
from systems import SLACK, BenchError, System
from workloads import MIB, WORKLOADS

EXTRAS: Final = 4 << 30  # bytes that what is no fio job writes at a time, beside the files of the systems
DIRECTORY_MAX: Final = 50  # a Unix socket's path has at most 107 bytes, and the systems' own directories need the rest


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, with *size* in bytes; a usage error ends the program with status 2."""
    parser = argparse.ArgumentParser(description="Measure Tandem against others with fio's nbd engine.")
    parser.add_argument("--quick", action="store_true", help="under three minutes")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--table", metavar="FILE", help="write the tables there, too")
    parser.add_argument("--plots", metavar="DIR", help="draw throughput and latency against queue depth there")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long one measurement takes")
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the exports (512; 256 with --quick)")
    parser.add_argument("--workload", action="append", metavar="NAME", help="only these (may be repeated)")
    parser.add_argument("--system", action="append", metavar="NAME", help="only these, and the reference")
    parser.add_argument("--also", metavar="DIR", help="measure the Tandem of another checkout, too")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where the backing files are made")
    parser.add_argument("--no-resync", action="store_true", help="leave the resync out")
    parser.add_argument("--no-extras", action="store_true", help="only fio's jobs; --quick implies it")
    options = parser.parse_args(words)
    if options.size is None:
        options.size = 256 if options.quick else 512
    if options.rounds < 1 or not 0.1 <= options.seconds <= 3600 or options.size < 16:
        parser.error("at least one round, 0.1 seconds (at most 3600) and 16 MiB are needed")
    options.size *= MIB
    if not Path(options.dir).is_dir():
        parser.error(f"there is no directory {options.dir}")
    if options.also and not (Path(options.also) / "repl").is_dir():
        parser.error(f"there is no checkout of Tandem in {options.also}")
    _known(parser, "workload", options.workload, [workload.name for workload in WORKLOADS])
    _known(parser, "system", options.system, [s.name for s in ALL] + (["other"] if options.also else []))
    return options


def _known(parser: argparse.ArgumentParser, what: str, names: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in names or ():
        if name not in known:
            parser.error(f"no {what} {name}; there are {', '.join(known)}")


def check(options: argparse.Namespace) -> None:
    """Whether there is all that any run needs, and its results can be kept. BenchError with what is to be done."""
    if shutil.which("fio") is None:
        raise BenchError("fio is not installed, which makes all the load; on Debian: apt install fio nbdkit")
    for name in ("json", "table"):
        if getattr(options, name):
            _check_file(f"--{name}", Path(getattr(options, name)))
    if options.plots:
        _check_directory("--plots", Path(options.plots))
        if importlib.util.find_spec("matplotlib") is None:
            raise BenchError("there is no matplotlib for --plots; `make bench` installs it.")
    _check_directory("--dir", Path(options.dir))
    if len(os.fsencode(Path(options.dir).absolute())) > DIRECTORY_MAX:
        raise BenchError(
            f"--dir {options.dir}: sockets are made below it, whose paths would be too long for the kernel; name a "
            f"directory with at most {DIRECTORY_MAX} bytes, which may be a symbolic link."
        )


def _check_file(option: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not path.exists()
        with open(path, "ab"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise BenchError(f"{option} {path}: no file can be written there ({error.strerror}); name another.") from error


def _check_directory(option: str, path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path):
            pass
    except OSError as error:
        raise BenchError(f"{option} {path}: nothing can be made there ({error.strerror}); name another.") from error


def check_room(options: argparse.Namespace, chosen: Sequence[type[System]]) -> None:
    """Whether the files of all systems find room. BenchError when they do not."""
    n_files = sum(2 if system.is_replicated else 1 for system in chosen)
    needed = n_files * (options.size + SLACK) + (0 if options.quick or options.no_extras else EXTRAS)
    if not options.quick and not options.no_resync:
        needed += sum(2 * (GIB + SLACK) for system in chosen if system.name in RESYNCED)
    free = shutil.disk_usage(options.dir).free
    if needed > free:
        raise BenchError(
            f"--dir {options.dir} has {free // MIB:,} MiB free, and {needed // MIB:,} are needed for {n_files} files "
            f"of {options.size // MIB:,} MiB and what is measured besides; say less with --size, or name another."
        )
