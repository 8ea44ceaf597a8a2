"""A history that was given up, saved in a file: written so that it is whole or not there, checked, restored.

The file is a ZIP archive of stored members, so that anybody's tools can look into it: ``history.json``, and
for each volume its bitmap of saved blocks, the blocks one after the other, and a digest of every MiB of the
rest. The rest is not saved, because both nodes have it; when the history is rebuilt later it is taken from
the volume, and the digests tell whether it is still what it was. ``base`` "zeros" means that everything
which is not zero was saved.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from tandem.repl.bitmap import Bitmap
from tandem.repl.units import n_bits_of

from .journal import Entry
from .split_brain_node import (
    BLOCK,
    CHUNK,
    DIGEST,
    Answers,
    Ranges,
    SplitBrainError,
    compressed,
    digest_of,
    expanded,
    set_ranges,
)
from .values import pack, unpack

FORMAT: Final = 1
BATCH: Final = 4 << 20  # bytes asked of a node at a time
DIGESTS_AT_ONCE: Final = 64
ROOM: Final = 1 << 20  # bytes for what the archive needs besides its members

# What the archive's reader raises for bytes that are not what they should be.
_DAMAGED: Final = (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)

Tell = Callable[[str, int, int], None]  # what goes on, how much of it is done, how much there is


@dataclass(frozen=True, slots=True)
class SavedVolume:
    """One volume in the file; *gi* is its get-gi line when it was saved."""

    number: int
    size: int
    gi: str
    blocks: int


@dataclass(frozen=True, slots=True)
class About:
    """What ``history.json`` says; *node* is whose history it is, *taken* seconds since the epoch."""

    format: int
    resource: str
    node: str
    taken: float
    base: str  # volume, or zeros
    volumes: tuple[SavedVolume, ...]
    journal: tuple[Entry, ...] = ()


def batches(bitmap: Bitmap, size: int) -> Iterator[list[tuple[int, int]]]:
    """The set bits as ranges, some MiB of them at a time."""
    batch: list[tuple[int, int]] = []
    n = 0
    for offset, length in set_ranges(bitmap, size):
        batch.append((offset, length))
        n += length
        if n >= BATCH or len(batch) >= 1024:
            yield batch
            batch, n = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------- writing


def save(path: Path, about: About, bitmaps: dict[int, Bitmap], node: Answers, tell: Tell) -> None:
    """Write the file at *path*, which must not exist; afterwards it is durable. SplitBrainError.

    Room for all of it is taken before anything is read. Until the end it has another name. Only its owner
    can read it, as only he can read the disk.
    """
    part = path.with_name(path.name + ".part")
    parts = {n: compressed(bitmap) for n, bitmap in bitmaps.items()}
    needed = ROOM + sum(map(len, parts.values())) + sum(
        v.blocks * BLOCK + -(-v.size // CHUNK) * DIGEST for v in about.volumes
    )  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _new(part) as file:
            _take_room(file, needed)
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                archive.writestr("history.json", json.dumps(pack(about), indent=1))
                for volume in about.volumes:
                    archive.writestr(f"{volume.number}/bitmap", parts[volume.number])
                    with archive.open(f"{volume.number}/blocks", "w", force_zip64=True) as member:
                        _save_blocks(member, node, volume, bitmaps[volume.number], tell)
                    if about.base == "volume":
                        digests = _digests(node, volume, bitmaps[volume.number], tell)
                        archive.writestr(f"{volume.number}/digests", digests)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        part.rename(path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise SplitBrainError(
                f"{error.filename or path}: {error.strerror}; nothing has been discarded. Choose another place "
                "with --save FILE"
            ) from error
        raise


def _new(path: Path) -> IO[bytes]:
    """A file that did not exist, for its owner alone; one that a killed run has left is replaced. OSError."""
    path.unlink(missing_ok=True)
    return open(path, "x+b", opener=lambda name, flags: os.open(name, flags, 0o600))


def check_place(path: Path) -> None:
    """SplitBrainError when a history can certainly not be saved at *path*: asked before anything is done."""
    if os.path.lexists(path):
        History(path).close()
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise SplitBrainError(
            f"{path.parent}: {error.strerror}; nothing has been changed. Choose another place with --save FILE"
        ) from error


def _take_room(file: IO[bytes], needed: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, needed)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return
        found = os.statvfs(file.fileno())
        room = f"{needed} bytes are needed, {found.f_bavail * found.f_frsize} are free"
        raise OSError(error.errno, f"{error.strerror} ({room})", file.name) from error


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _save_blocks(member: IO[bytes], node: Answers, volume: SavedVolume, bitmap: Bitmap, tell: Tell) -> None:
    done = 0
    for batch in batches(bitmap, volume.size):
        content = node.read(volume.number, batch)
        member.write(content)
        done += len(content)
        tell("saving", done, volume.blocks * BLOCK)


def _digests(node: Answers, volume: SavedVolume, bitmap: Bitmap, tell: Tell) -> bytes:
    """Digests of what is not saved: every MiB, with the saved blocks as zeros."""
    n_chunks = -(-volume.size // CHUNK)
    found = []
    for first in range(0, n_chunks, DIGESTS_AT_ONCE):
        count = min(DIGESTS_AT_ONCE, n_chunks - first)
        found.append(node.digests(volume.number, first, count, bitmap))
        tell("reading the rest", min((first + count) * CHUNK, volume.size), volume.size)
    return b"".join(found)


# ---------------------------------------------------------------------------------------- reading


class History:
    """A saved history, open. SplitBrainError when the file is not one or is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise ValueError("it is not a regular file")  # a pipe or a device may never end
            self._archive = zipfile.ZipFile(path)
            about = json.loads(self._archive.read("history.json"))
            if not isinstance(about, dict) or about.get("format") != FORMAT:
                raise ValueError("another version of tandemadm wrote it")
            self.about = unpack(About, about)
        except OSError as error:
            raise SplitBrainError(f"{path}: {error.strerror or error}") from error
        except _DAMAGED as error:
            raise SplitBrainError(f"{path} is not a history saved by split-brain --keep: {error}") from error

    def close(self) -> None:
        self._archive.close()

    def bitmap(self, volume: SavedVolume) -> Bitmap:
        return expanded(n_bits_of(volume.size), self._member(f"{volume.number}/bitmap"))

    def digests(self, volume: SavedVolume) -> list[bytes]:
        """One for each MiB; empty when everything was saved."""
        if self.about.base == "zeros":
            return []
        raw = self._member(f"{volume.number}/digests")
        return [raw[at : at + DIGEST] for at in range(0, len(raw), DIGEST)]

    def _member(self, name: str) -> bytes:
        try:
            return self._archive.read(name)
        except _DAMAGED as error:
            raise SplitBrainError(f"{self.path} is damaged: {error}") from error

    def blocks(self, volume: SavedVolume, bitmap: Bitmap) -> Iterator[tuple[Ranges, bytes]]:
        """What was saved, batch by batch. Its checksum is known to be right when the last has come."""
        try:
            with self._archive.open(f"{volume.number}/blocks") as member:
                for batch in batches(bitmap, volume.size):
                    wanted = sum(length for _, length in batch)
                    content = member.read(wanted)
                    if len(content) != wanted:
                        raise SplitBrainError(f"{self.path} is damaged: it ends too early")
                    yield batch, content
                if member.read(1):  # also has the archive's checksum compared
                    raise SplitBrainError(f"{self.path} is damaged: it has more than it says")
        except _DAMAGED as error:
            raise SplitBrainError(f"{self.path} is damaged: {error}") from error


def holds(path: Path, about: About, bitmaps: dict[int, Bitmap], node: Answers, tell: Tell) -> bool:
    """Is everything in the file that *bitmaps* asks for, block by block as *node*'s disk has it now?

    This is asked of a file that has just been written as of one that was found. False also when the file
    is damaged or another history's.
    """
    try:
        history = History(path)
    except SplitBrainError:
        return False
    try:
        found = history.about
        if (found.resource, found.node, found.base) != (about.resource, about.node, about.base):
            return False
        if [(v.number, v.size) for v in found.volumes] != [(v.number, v.size) for v in about.volumes]:
            return False
        for volume in found.volumes:
            saved = history.bitmap(volume)
            if not _covers(saved, bitmaps[volume.number]) or not _same(history, volume, saved, node, tell):
                return False
        return True
    except SplitBrainError as error:
        if str(path) in str(error):
            return False
        raise
    finally:
        history.close()


def _covers(saved: Bitmap, wanted: Bitmap) -> bool:
    at = wanted.next_set(0)
    while at >= 0:
        end = wanted.next_clear(at)
        if saved.count(at, end) < end - at:
            return False
        at = wanted.next_set(end)
    return True


def _same(history: History, volume: SavedVolume, saved: Bitmap, node: Answers, tell: Tell) -> bool:
    done = 0
    for batch, content in history.blocks(volume, saved):
        if node.read(volume.number, batch) != content:
            return False
        done += len(content)
        tell("comparing the saved blocks with the disk", done, volume.blocks * BLOCK)
    return True


# ---------------------------------------------------------------------------------------- restoring


def restore(
    history: History, volume: SavedVolume, image: Path, sources: Sequence[Callable[[], Answers]], tell: Tell
) -> int:
    """Rebuild one volume as *image*, which must not exist; durable afterwards. SplitBrainError.

    What was not saved comes from the first of *sources* that still has it as it was. Returns how many
    bytes nobody has any more: the image has there what the first source has now.
    """
    part = image.with_name(image.name + ".part")
    bitmap, digests = history.bitmap(volume), history.digests(volume)
    lost, alive = 0, list(sources)
    try:
        if image.exists():
            raise SplitBrainError(f"{image} exists; name another file with --image")
        with _new(part) as file:
            file.truncate(volume.size)
            for chunk, digest in enumerate(digests):
                content, original = _rest(chunk, digest, volume, bitmap, alive)
                lost += 0 if original else len(content)
                if any(content):
                    file.seek(chunk * CHUNK)
                    file.write(content)
                tell("rebuilding", min((chunk + 1) * CHUNK, volume.size), volume.size)
            for batch, content in history.blocks(volume, bitmap):
                at = 0
                for offset, length in batch:
                    file.seek(offset)
                    file.write(content[at : at + length])
                    at += length
            file.flush()
            os.fsync(file.fileno())
        part.rename(image)
        _sync_directory(image.parent)
    except OSError as error:
        raise SplitBrainError(f"{error.filename or image}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return lost


def _rest(
    chunk: int, digest: bytes, volume: SavedVolume, bitmap: Bitmap, alive: list[Callable[[], Answers]]
) -> tuple[bytes, bool]:
    """The content of one chunk without the saved blocks, and whether it is what it was.

    A source that cannot be read is not asked again: to find out may have taken a while.
    """
    offset = chunk * CHUNK
    length = min(CHUNK, volume.size - offset)
    n_saved = bitmap.count(offset // BLOCK, min((offset + CHUNK) // BLOCK, bitmap.n_bits))
    if n_saved * BLOCK >= length:
        return bytes(length), True
    first = b""
    for source in tuple(alive):
        try:
            content = bytearray(source().read(volume.number, [(offset, length)]))
        except SplitBrainError:
            alive.remove(source)
            continue
        original = bytes(content)
        if digest_of(content, offset // BLOCK, bitmap) == digest:
            return original, True
        first = first or original
    if not first:
        raise SplitBrainError("neither node's disk can be read, and the history needs what both had in common")
    return first, False
