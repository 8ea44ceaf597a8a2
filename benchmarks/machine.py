"""What the figures were measured on: processors, memory, kernel, programs, and how busy others kept it.

Whether the machine was idle cannot be told by the load average, of which the benchmark itself is the most. `Others`
counts the time that the processors worked for nobody the benchmark knows of, while it measures.
"""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import shutil
import subprocess
import time
import tomllib
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent
IDLE: Final = 0.05  # the share of the processors that others may use on a machine that counts as idle
KTHREADD: Final = 2  # the parent of all threads of the kernel, which work for whoever writes and sends
_LOOK_S: Final = 3.0


class Others:
    """The processor time of all that is not the benchmark's: other programs, neighbours of a virtual machine."""

    def __init__(self) -> None:
        self._used = 0.0
        self._available = 0.0

    @property
    def share(self) -> float:
        """Their part of all processors while `watch` was on, 0 to 1."""
        return max(self._used / self._available, 0.0) if self._available else 0.0

    @contextlib.contextmanager
    def watch(self, pids: Collection[int]) -> Iterator[None]:
        """Count while the context lasts; *pids*, this process and their children are the benchmark's."""
        began, busy, own = time.monotonic(), _busy_s(), _own_s(pids)
        yield
        self._used += _busy_s() - busy - (_own_s(pids) - own)
        self._available += (time.monotonic() - began) * (os.cpu_count() or 1)

    def look(self) -> float:
        """Their part now, while nothing is measured."""
        with self.watch(()):
            time.sleep(_LOOK_S)
        return self.share


def _busy_s() -> float:
    """Seconds that all processors worked for processes, or that the host had no time for. Source: proc(5)."""
    fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    user, nice, system, _, _, _, _, steal = map(int, fields[1:9])
    return (user + nice + system + steal) / os.sysconf("SC_CLK_TCK")


def _own_s(pids: Collection[int]) -> float:
    """Processor seconds of the kernel's threads and of the benchmark's processes, those that have ended included."""
    used: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
                fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
                used[int(entry.name)] = sum(map(int, fields[11:15]))
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, todo, seen = 0, [*pids, KTHREADD, *children.get(os.getpid(), ())], {os.getpid()}
    while todo:
        pid = todo.pop()
        if pid not in seen:
            seen.add(pid)
            total += used.get(pid, 0)
            todo += children.get(pid, ())
    mine = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return total / os.sysconf("SC_CLK_TCK") + sum(usage.ru_utime + usage.ru_stime for usage in mine)


def describe(directory: Path) -> dict[str, str | int | float]:
    """The machine, the programs, and the file system of *directory*."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "tandem": version_of_tandem(REPOSITORY),
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fio": _version(["fio", "--version"]),
        "nbdkit": _version(["nbdkit", "--version"]),
        "qemu-nbd": _version(["qemu-nbd", "--version"]),
        "nbd-server": _version(["nbd-server", "-V"]),
        "glusterfs": _version(["glusterfs", "--version"]),
        "file system": _version(["stat", "-f", "-c", "%T", str(directory)]),
        "load before": os.getloadavg()[0],
        "others before": Others().look(),
    }


def version_of_tandem(tree: Path) -> str:
    """The version that the tree names, and where it is a git clone of its own the commit and whether it was changed."""
    version = str(tomllib.loads((tree / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    if not (tree / ".git").exists() or shutil.which("git") is None:
        return version
    commit = _git(tree, "rev-parse", "HEAD")
    if not commit:  # another user's clone, for one
        return version
    return f"{version}, commit {commit}{' + changes' if _git(tree, 'status', '--porcelain') else ''}"


def _git(tree: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(tree), *words], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _field(path: str, name: str) -> str:
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    except OSError:
        pass
    return ""


def _version(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return said.splitlines()[0].strip() if said else "unknown"
