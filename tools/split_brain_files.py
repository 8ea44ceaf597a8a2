"""Which files of an ext4 or xfs file system the changed blocks of a volume belong to.

The file system's own tools know: dumpe2fs and debugfs, xfs_db. They are run on the disk under the volume,
read-only, and their output is read here. ext4 is asked for the owner of one block of each range and for
all the blocks of that owner, so the number of questions depends on the files and not on the blocks. What
the tools cannot say becomes a sentence, never an error: the rest of the report is of use without it.
"""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
from bisect import bisect_left as bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from tandem.repl.bitmap import Bitmap

FREE: Final = "<free space>"
UNKNOWN: Final = "<unknown>"
OUTSIDE: Final = "<outside of the file system>"
ROUNDS_MAX: Final = 200  # questions to debugfs; what is not known then stays unknown
ASK_MAX: Final = 8000  # blocks or inodes of one question: a word of a command line has 128 KiB
TOOL_S: Final = 600.0  # a file system of many millions of files takes minutes
_PATH: Final = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
_NEEDS_RECOVERY: Final = 0x4  # ext4_fs.h, EXT4_FEATURE_INCOMPAT_RECOVER
_JOURNAL_INODES: Final = {1: "<bad blocks>", 2: "/", 7: "<reserved descriptors>", 8: "<journal>"}


@dataclass(frozen=True, slots=True)
class FileBlocks:
    """One file's (or kind of metadata's) share: blocks of 4 KiB, as first and end of each range in turn."""

    name: str
    ranges: tuple[int, ...]

    def pairs(self) -> Iterator[tuple[int, int]]:
        """The ranges as (first, end)."""
        return zip(self.ranges[::2], self.ranges[1::2], strict=True)


@dataclass(frozen=True, slots=True)
class FileUse:
    """The answer for one volume: the kind of file system (empty: none known), its files, and what is to be
    said about the answer."""

    kind: str
    files: tuple[FileBlocks, ...] = ()
    note: str = ""


class ToolError(Exception):
    """A file system tool is not there or failed; one sentence."""


def find_files(device: str, changed: Bitmap, block: int) -> FileUse:
    """Look at the file system on *device*; bits of *changed* stand for *block* bytes each."""
    try:
        with open(device, "rb") as file:
            head = file.read(4096)
    except OSError as error:
        return FileUse("", note=f"{device}: {error.strerror}")
    try:
        if head[:4] == b"XFSB":
            return FileUse("xfs", _collect(_xfs(device, head, changed, block), block))
        if len(head) == 4096 and struct.unpack_from("<H", head, 1080) == (0xEF53,):
            found = _collect(_ext4(device, changed, block), block)
            (incompat,) = struct.unpack_from("<I", head, 1024 + 96)
            return FileUse("ext4", found, _DIRTY if incompat & _NEEDS_RECOVERY else "")
    except ToolError as error:
        return FileUse("", note=str(error))
    return FileUse("", note="no ext4 or xfs file system begins at the start of the volume")


_DIRTY: Final = "the file system was not unmounted: what is still in its journal only is not attributed"

Owned = Iterator[tuple[str, int, int]]  # name, first byte, end byte


def _collect(owned: Owned, block: int) -> tuple[FileBlocks, ...]:
    """Per name the blocks touched, neighbours joined; names in the order of their sizes."""
    found: dict[str, list[tuple[int, int]]] = {}
    for name, low, high in owned:
        found.setdefault(name, []).append((low // block, -(-high // block)))
    files = []
    for name, ranges in found.items():
        joined: list[int] = []
        for first, end in sorted(ranges):
            if joined and first <= joined[-1]:
                joined[-1] = max(joined[-1], end)
            else:
                joined += (first, end)
        files.append(FileBlocks(name, tuple(joined)))
    return tuple(sorted(files, key=lambda f: (f.name.startswith("<"), -sum(e - a for a, e in f.pairs()), f.name)))


def _run(words: list[str], text: str = "") -> str:
    """The output of a tool, with a surrogate for each byte that is no UTF-8; ToolError when it is not there or
    could not work."""
    program = shutil.which(words[0], path=_PATH)
    if program is None:
        package = "xfsprogs" if words[0].startswith("xfs") else "e2fsprogs"
        raise ToolError(f"{words[0]} is not installed there, so the files are not known (Debian: {package})")
    try:
        done = subprocess.run(
            [program, *words[1:]], input=text.encode(), capture_output=True, timeout=TOOL_S,
            env={**os.environ, "LC_ALL": "C", "DEBUGFS_PAGER": "cat", "PAGER": "cat"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{words[0]}: {error}") from error
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise ToolError(f"{words[0]} could not read the file system: {last[-1]}")
    return done.stdout.decode("utf-8", "surrogateescape")


def _lines(text: str, begins: re.Pattern[str]) -> Iterator[str]:
    """The lines of a tool's answer; one that does not begin as a line should is the rest of a name above it."""
    line = ""
    for part in text.removesuffix("\n").split("\n"):
        if begins.match(part):
            yield line
            line = part
        else:
            line += "\n" + part
    yield line


# ------------------------------------------------------------------------------------------- ranges


class _Ranges:
    """A set of numbers as sorted, disjoint [first, end) ranges, from which others are taken away."""

    def __init__(self, ranges: Iterable[tuple[int, int]]) -> None:
        self.all = list(ranges)

    def take(self, low: int, high: int) -> list[tuple[int, int]]:
        """Remove [low, high); what of it was there."""
        begin = bisect(self.all, (low, low))
        if begin and self.all[begin - 1][1] > low:
            begin -= 1
        taken, left, stop = [], [], begin
        while stop < len(self.all) and self.all[stop][0] < high:
            first, end = self.all[stop]
            taken.append((max(first, low), min(end, high)))
            left += [r for r in ((first, low), (high, end)) if r[0] < r[1]]
            stop += 1
        self.all[begin:stop] = left
        return taken


def _changed_ranges(changed: Bitmap, block: int, size: int, n_blocks: int) -> Iterator[tuple[int, int]]:
    """The set bits as ranges of file system blocks of *size* bytes, below *n_blocks*."""
    last = 0
    at = changed.next_set(0)
    while at >= 0:
        end = changed.next_clear(at)
        low, high = max(at * block // size, last), min(-(-end * block // size), n_blocks)
        if low < high:
            yield low, high
            last = high
        at = changed.next_set(end)


def _outside(changed: Bitmap, block: int, end: int) -> Owned:
    """The changed blocks behind the last byte of the file system, *end*."""
    at = changed.next_set(-(-end // block))
    while at >= 0:
        stop = changed.next_clear(at)
        yield OUTSIDE, at * block, stop * block
        at = changed.next_set(stop)


def _numbers(pattern: str, text: str) -> int:
    found = re.search(pattern, text, re.MULTILINE)
    if found is None:
        raise ToolError(f"the file system's tools did not say {pattern.partition(':')[0]!r}")
    return int(found[1])


# ------------------------------------------------------------------------------------------- ext4


_PLACES: Final = re.compile(
    r"(superblock|Group descriptors|Reserved GDT blocks|Block bitmap|Inode bitmap|Inode table) at (\d+)(?:-(\d+))?"
)
_SPANS: Final = re.compile(r"(\d+)(?:-(\d+))?")
_NAMED: Final = re.compile(r"\d+\t/")
_EXTENT: Final = re.compile(r"\([^)]*\):(\d+)(?:-(\d+))?")


def _ext4(device: str, changed: Bitmap, block: int) -> Owned:
    about = _run(["dumpe2fs", device])
    size, n_blocks = _numbers(r"^Block size: +(\d+)", about), _numbers(r"^Block count: +(\d+)", about)
    yield from _outside(changed, block, size * n_blocks)
    left = _Ranges(_changed_ranges(changed, block, size, n_blocks))
    for name, low, high in _known_places(about):
        for a, b in left.take(low, high):
            yield name, a * size, b * size
    inodes: dict[int, list[tuple[int, int]]] = {}
    for _ in range(ROUNDS_MAX):
        if not left.all:
            break
        for inode, extents in _owners(device, left).items():
            for low, high in extents:
                inodes.setdefault(inode, []).extend(left.take(low, high))
    for inode, name in _names(device, [n for n in inodes if n]).items():
        for a, b in inodes[inode]:
            yield name, a * size, b * size
    for a, b in inodes.get(0, []) + left.all:
        yield UNKNOWN, a * size, b * size


def _known_places(about: str) -> Iterator[tuple[str, int, int]]:
    """Metadata and free space, from the output of dumpe2fs."""
    for line in about.splitlines():
        if line.startswith("  Free blocks: "):
            for span in _SPANS.finditer(line):
                yield FREE, int(span[1]), int(span[2] or span[1]) + 1
        elif not line.startswith("  Free inodes"):
            for place in _PLACES.finditer(line):
                yield f"<{place[1].lower()}>", int(place[2]), int(place[3] or place[2]) + 1


def _owners(device: str, left: _Ranges) -> dict[int, list[tuple[int, int]]]:
    """The owners of the first blocks of *left*, with all their blocks. Inode 0 has what belongs to nobody."""
    firsts = [first for first, _ in left.all[:ASK_MAX]]
    answer = _run(["debugfs", "-R", "icheck " + " ".join(map(str, firsts)), device])
    owners: dict[int, list[tuple[int, int]]] = {}
    for line in answer.splitlines():
        words = line.split("\t")
        if words[0].isdigit():
            inode = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
            owners.setdefault(inode, []).append((int(words[0]), int(words[0]) + 1))
    asked = [inode for inode in owners if inode]
    script = "".join(f"stat <{inode}>\n" for inode in asked)
    current = 0
    for line in _run(["debugfs", "-f", "-", device], script).splitlines():
        found = re.match(r"Inode: (\d+) ", line)
        if found is not None:
            current = int(found[1])
        elif current in owners and line.startswith("("):
            for extent in _EXTENT.finditer(line):
                owners[current].append((int(extent[1]), int(extent[2] or extent[1]) + 1))
    return owners


def _names(device: str, inodes: list[int]) -> dict[int, str]:
    names = {inode: _JOURNAL_INODES.get(inode, f"<inode {inode}>") for inode in inodes}
    named = [inode for inode in inodes if inode not in _JOURNAL_INODES]
    for at in range(0, len(named), ASK_MAX):
        asked = " ".join(map(str, named[at : at + ASK_MAX]))
        for line in _lines(_run(["debugfs", "-R", f"ncheck {asked}", device]), _NAMED):
            number, tab, path = line.partition("\t")
            if tab and number.isdigit() and int(number) in names and names[int(number)].startswith("<inode"):
                names[int(number)] = "/" + path.lstrip("/")
    return names


# -------------------------------------------------------------------------------------------- xfs


_USED: Final = re.compile(r"(?:xfs_db> )*block \d+ \(|(?:xfs_db> )+\Z")
_USE: Final = re.compile(r"block \d+ \((\d+)/(\d+)\) type (\S+)(?: inode (\d+))?(?: (.*))?\Z", re.DOTALL)


def _xfs(device: str, head: bytes, changed: Bitmap, block: int) -> Owned:
    """The superblock has big-endian sb_blocksize, sb_dblocks at 4 and sb_agblocks at 84 (xfs_format.h)."""
    size, n_blocks = struct.unpack_from(">IQ", head, 4)
    (per_group,) = struct.unpack_from(">I", head, 84)
    yield from _outside(changed, block, size * n_blocks)
    script = ["blockget -n"]
    for first, end in _changed_ranges(changed, block, size, n_blocks):
        while first < end:
            stop = min(end, (first // per_group + 1) * per_group)
            script += [f"daddr {first * size // 512}", f"blockuse -n -c {stop - first}"]
            first = stop
    if len(script) == 1:
        return
    for line in _lines(_run(["xfs_db", "-f", "-r", device], "\n".join(script) + "\n"), _USED):
        found = _USE.match(line.removeprefix("xfs_db> "))
        if found is None:
            continue
        at = (int(found[1]) * per_group + int(found[2])) * size
        yield _xfs_name(found[3], found[4], found[5]), at, at + size


def _xfs_name(kind: str, inode: str | None, path: str | None) -> str:
    if kind.startswith("free"):
        return FREE
    if inode is None:
        return f"<{kind}>"
    if path:
        return "/" + path.lstrip("/")
    return "/" if kind == "dir" else f"<inode {inode}>"
