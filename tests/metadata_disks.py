"""Disks with metadata, made by hand, and both tools to run on them: drbdmeta and ours."""

from __future__ import annotations

import io
import os
import random
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tandem.repl import attach
from tandem.repl.edge.store import FileStore
from tandem.repl.metadata import MAGIC_CLEAN, MAGIC_UNCLEAN, Layout, MdFlag, Superblock, layout
from tandem.repl.units import SECTOR, n_bits_of
from tandem.tools import meta

MIB = 1 << 20
NOISE = re.compile(r"BLKSSZGET|BLKZEROOUT|using pwrite")  # drbdmeta's remarks about files
INDEX = {"internal": "internal", "flexible": "flex-external", "indexed": "0"}


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


def drbdmeta(path: Path, *command: str, kind: str = "internal", index: str = "") -> Result:
    program = shutil.which("drbdmeta") or "/usr/sbin/drbdmeta"
    done = subprocess.run(
        [program, "--force", "-", "v08", str(path), index or INDEX[kind], *command],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    err = "".join(line for line in done.stderr.splitlines(True) if not NOISE.search(line))
    return Result(done.returncode, done.stdout, err)


def ours(
    command: Callable[..., int], path: Path, *args: str, kind: str = "internal", force: bool = True,
    last_known: Path | None = None, index: int = 0, **options: int,
) -> Result:  # fmt: skip
    out, err = io.StringIO(), io.StringIO()
    console = meta.Console(out, err, force, confirm=lambda: False)
    target = meta.Target(str(path), kind, index, last_known=str(last_known or ""))
    code = command(target, console, *args, **options)
    return Result(code, out.getvalue(), err.getvalue())


def verify(dump: str) -> Result:
    out, err = io.StringIO(), io.StringIO()
    code = meta.verify_dump(meta.Console(out, err), dump)
    return Result(code, out.getvalue(), err.getvalue())


def disk(path: Path, size: int, content: bytes = b"") -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        file.write(content)
    return path


def used_disk(
    path: Path, size: int = 300 * MIB, flags: int = 0x91, *, stripes: int = 1, stripe_size: int = 8,
    ring: dict[int, bytes] | None = None, seed: int = 1, la_size_sect: int | None = None,
) -> tuple[Path, Layout]:  # fmt: skip
    """A disk as a kernel would leave it: random bits, random identifiers; clean if AL_CLEAN is in *flags*."""
    rng = random.Random(seed)
    disk(path, size)
    where = layout("internal", size, size, al_stripes=stripes, al_stripe_size_4k=stripe_size)
    la = where.usable // SECTOR if la_size_sect is None else la_size_sect
    with FileStore(str(path)) as store:
        attach.write_ring(store, where)
        for position, block in (ring or {}).items():
            store.write(where.al + position * 4096, block)
        bitmap = attach.read_bitmap(store, where, n_bits_of(min(la * SECTOR, where.usable)))
        for _ in range(30):
            first = rng.randrange(bitmap.n_bits)
            bitmap.set(first, min(first + rng.choice([1, 3, 64, 128, 4096]), bitmap.n_bits))
        attach.write_changed_pages(store, where, bitmap)
        superblock = Superblock(
            la_size_sect=la,
            current=rng.getrandbits(64),
            bitmap=rng.getrandbits(64),
            history0=rng.getrandbits(64),
            history1=4,
            device_uuid=rng.getrandbits(64),
            flags=MdFlag(flags),
            al_nr_extents=1237,
            magic=MAGIC_CLEAN if flags & 0x80 else MAGIC_UNCLEAN,
            la_peer_max_bio_size=1 << 20,
        )
        store.write(where.superblock, superblock.placed(where).pack())
        store.flush()
    return path, where


def clone(source: Path, copy: Path) -> None:
    """Copy a sparse file as a sparse file."""
    subprocess.run(["cp", "--sparse=always", str(source), str(copy)], check=True)


def image(path: Path) -> dict[int, bytes]:
    """Every 4 KiB of the file that is not zero, without reading its holes."""
    found = {}
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA) // 4096 * 4096
            except OSError:  # only a hole is left
                break
            block = os.pread(file.fileno(), 4096, at)
            if any(block):
                found[at] = block
            at += 4096
    return found


def content(path: Path, where: Layout) -> dict[str, bytes]:
    """The three areas as they are on disk."""
    with FileStore(str(path)) as store:
        return {
            "superblock": store.read(where.superblock, 4096),
            "ring": store.read(where.al, where.al_blocks * 4096),
            "bitmap": store.read(where.bitmap, where.bitmap_bytes),
        }
