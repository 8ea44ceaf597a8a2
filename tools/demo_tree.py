"""A file system image with real files in it, made without root, for the story of the demonstration.

`mke2fs -d` copies a directory into a fresh ext4 image. The tree holds generated files of many sizes and the
sources of this project, so that a wrong byte has something to be wrong in.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

N_FILES: Final = 400
BLOCK: Final = 4096  # of the file system, and of the bitmap
SIZES: Final = (0, 1, 700, 4096, 20_000, 65_536, 180_000, 500_000)


class MissingProgram(Exception):
    """A program of e2fsprogs is not there; one sentence."""


def find_program(name: str) -> str:
    """The path of a program that an ordinary user's PATH may not name."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path)
    if found is None:
        raise MissingProgram(f"{name} is not installed; on Debian: apt-get install e2fsprogs")
    return found


def make_tree(directory: Path, seed: int) -> int:
    """Fill *directory* with files; returns how many. The same seed gives the same generated files."""
    draw = random.Random(seed)
    for i in range(N_FILES):
        path = directory / f"generated/{i % 20:02}/{i:04}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(draw.randbytes(draw.choice(SIZES)))
    n_files = N_FILES
    root = Path(__file__).resolve().parent.parent
    for room in ("repl", "nbd", "tools"):
        for source in sorted((root / room).rglob("*.py")):
            target = directory / "sources" / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            n_files += 1
    return n_files


def make_image(image: Path, tree: Path, size: int) -> None:
    """An ext4 image of *size* bytes (rounded down to whole blocks) with the files of *tree* in it."""
    with open(image, "xb") as file:
        file.truncate(size)
    _run([find_program("mke2fs"), "-q", "-F", "-t", "ext4", "-b", str(BLOCK), "-m", "0", "-d", str(tree),
          str(image), str(size // BLOCK)])  # fmt: skip


def check_image(image: Path) -> str:
    """What `e2fsck -fn` says about the file system; RuntimeError when it finds anything wrong."""
    return _run([find_program("e2fsck"), "-f", "-n", str(image)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}{done.stdout}")
    return done.stdout


def data_ranges(image: Path) -> Iterator[tuple[int, int]]:
    """Offset and length of every run of whole blocks of *image* that is not a hole."""
    size = image.stat().st_size
    fd = os.open(image, os.O_RDONLY)
    try:
        at = 0
        while at < size:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            at = os.lseek(fd, start, os.SEEK_HOLE)
            start -= start % BLOCK
            yield start, min(-(-at // BLOCK) * BLOCK, size) - start
    finally:
        os.close(fd)
