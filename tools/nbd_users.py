"""Who uses a block device: programs that have it open, and what the kernel made of it.

Opening a device exclusively, as mount does, says only that nobody else opened it so. A virtual machine or
`dd` does not: their open files are found in ``/proc``. Whoever opens the device of a loop device, a swap area
or a part of another device is the kernel itself; that is in ``/sys`` and ``/proc`` under other names.

Seen are the programs of this process's pid namespace and its children, which on a host means all.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_ESCAPED: Final = re.compile(r"\\([0-7]{3})")  # how proc(5) writes blanks in paths
_SHOWN_MAX: Final = 3


def users(disk: Path) -> list[str]:
    """A few words for each user of *disk* (``/sys/block/NAME``) and its partitions, this process left out."""
    numbers = _numbers(disk)
    if not numbers:
        return []
    found = [*_mounts(numbers), *_swaps(numbers), *_holders(disk), *_loops(disk.parent, numbers), *_openers(numbers)]
    return list(dict.fromkeys(found))


def in_words(found: list[str]) -> str:
    """``pid 7 (qemu) and pid 9 (dd)``; a long list is cut short."""
    shown = found[:_SHOWN_MAX]
    if len(found) > _SHOWN_MAX:
        shown.append(f"{len(found) - _SHOWN_MAX} more")
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def number_of(path: Path | str) -> int | None:
    """The device number of the block device *path*, None when it is something else or gone."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_rdev if stat.S_ISBLK(found.st_mode) else None
    return None


def _numbers(disk: Path) -> set[int]:
    """The device numbers of a disk and its partitions."""
    texts = [_text(path) for path in (disk / "dev", *disk.glob(f"{disk.name}p*/dev"))]
    return {os.makedev(*map(int, text.split(":"))) for text in texts if text}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _lines(path: Path) -> list[list[str]]:
    return [
        [_ESCAPED.sub(lambda code: chr(int(code[1], 8)), word) for word in line.split()]
        for line in _text(path).splitlines()
    ]


def _mounts(numbers: set[int]) -> Iterator[str]:
    for words in _lines(PROC / "self" / "mountinfo"):
        # The number is the device's, except for file systems that can span several, such as btrfs.
        major, _, minor = words[2].partition(":")
        if os.makedev(int(major), int(minor)) in numbers or number_of(words[words.index("-") + 2]) in numbers:
            yield f"the file system mounted on {words[4]}"


def _swaps(numbers: set[int]) -> Iterator[str]:
    for words in _lines(PROC / "swaps")[1:]:
        if number_of(words[0]) in numbers:
            yield f"swap on {words[0]}"


def _holders(disk: Path) -> Iterator[str]:
    for path in (*disk.glob("holders/*"), *disk.glob(f"{disk.name}p*/holders/*")):
        name = _text(path / "dm" / "name")
        yield f"{path.name} ({name})" if name else path.name


def _loops(block: Path, numbers: set[int]) -> Iterator[str]:
    for path in block.glob("loop*/loop/backing_file"):
        if number_of(_text(path)) in numbers:
            yield path.parent.parent.name


def _openers(numbers: set[int]) -> Iterator[str]:
    for process in PROC.iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid() and _has_open(process, numbers):
            yield f"pid {process.name} ({_text(process / 'comm')})"


def _has_open(process: Path, numbers: set[int]) -> bool:
    with contextlib.suppress(OSError):  # it ended meanwhile
        for name in os.listdir(process / "fd"):
            link = f"{process}/fd/{name}"
            with contextlib.suppress(OSError):
                if os.readlink(link).startswith("/") and number_of(link) in numbers:
                    return True
    return False
