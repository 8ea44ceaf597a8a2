"""What the figures were measured on: processors, memory, kernel, programs, and how busy it all was."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path


def load() -> float:
    """The load average over one minute."""
    return os.getloadavg()[0]


def describe(directory: Path) -> dict[str, str | int | float]:
    """The machine, the programs, and the file system of *directory*."""
    return {
        "processor": _field("/proc/cpuinfo", "model name") or platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "memory": _field("/proc/meminfo", "MemTotal"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "fio": _version(["fio", "--version"]),
        "nbdkit": _version(["nbdkit", "--version"]),
        "qemu-nbd": _version(["qemu-nbd", "--version"]),
        "file system": _version(["stat", "-f", "-c", "%T", str(directory)]),
        "load before": load(),
    }


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
