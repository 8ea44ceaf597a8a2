"""One node's part in looking at a split brain and in healing it: its state, its bits, its blocks, its files.

`Node` answers for the node it runs on, from the daemon where one runs and from the metadata otherwise. It
reads the disk beside the daemon, without a claim: what was answered to a client is seen there. Nothing here
writes to a disk; a change of state is a command to the daemon, which may refuse it.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, Protocol

from tandem.repl import attach
from tandem.repl.attach import LoadedDisk
from tandem.repl.bitmap import PAGE, Bitmap
from tandem.repl.config import ResourceConfig, VolumeConfig
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import MetadataError, Refusal
from tandem.repl.events import ResourceStatus
from tandem.repl.requests import Buffer
from tandem.repl.units import SECTOR, n_bits_of

from . import journal
from .adm_session import NotRunning, Session
from .exports import place_of
from .split_brain_files import FileUse, find_files
from .values import Json, unpack

BLOCK: Final = 4096  # what one bit stands for
CHUNK: Final = 1 << 20  # what one digest stands for
DIGEST: Final = 8  # bytes of one digest
UP_WORDS: Final = ("Connected", "SyncSource", "SyncTarget", "PausedSyncS", "PausedSyncT", "VerifyS", "VerifyT")


class SplitBrainError(Exception):
    """What cannot be done; one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class VolumeSide:
    """One volume on one node. *gi* is its get-gi line, *size* the bytes that both nodes agreed on."""

    number: int
    size: int
    gi: str
    disk: str
    device: str  # path of the backing device
    bits: int


@dataclass(frozen=True, slots=True)
class Side:
    """Everything that is told of one node; *uri* is the NBD export of its first volume."""

    node: str
    running: bool
    role: str
    cstate: str
    volumes: tuple[VolumeSide, ...]
    journal: tuple[journal.Entry, ...] = ()
    uris: dict[str, str] | None = None

    def volume(self, number: int) -> VolumeSide | None:
        return next((v for v in self.volumes if v.number == number), None)


Ranges = Sequence[tuple[int, int]]  # offset and length in bytes


class Answers(Protocol):
    """A node that can be asked: this one, or the peer through a pipe. SplitBrainError when it cannot."""

    def describe(self) -> Side: ...

    def bitmap(self, volume: int) -> Bitmap:
        """The blocks that were written here since the histories parted."""

    def read(self, volume: int, ranges: Ranges) -> bytes:
        """The bytes of all *ranges*, one after the other."""

    def digests(self, volume: int, first: int, count: int, without: Bitmap) -> bytes:
        """Digests of *count* chunks from chunk *first* on, in which the blocks of *without* count as zeros."""

    def data(self, volume: int) -> Bitmap:
        """The blocks that are no holes of the file under the volume."""

    def files(self, volume: int) -> FileUse:
        """Which files the blocks of `bitmap` belong to."""

    def command(self, name: str, args: Json) -> Refusal | None:
        """Have the daemon carry out a command on the whole resource."""

    def lock(self) -> None:
        """Hold off other commands that change the resource, until `unlock` or `close`."""

    def unlock(self) -> None:
        """Let them go on."""

    def config(self) -> ResourceConfig: ...

    def close(self) -> None: ...


# ------------------------------------------------------------------------------------------- bitmaps


def compressed(bitmap: Bitmap) -> bytes:
    """A bitmap for the way to the peer."""
    squeeze = zlib.compressobj(1)
    words = PAGE // 8
    parts = [squeeze.compress(bitmap.words(page * words, words)) for page in range(bitmap.n_pages)]
    return b"".join([*parts, squeeze.flush()])


def expanded(n_bits: int, raw: bytes) -> Bitmap:
    """The other way; SplitBrainError when *raw* was not made by `compressed` for as many bits."""
    bitmap = Bitmap(n_bits)
    try:
        found = zlib.decompress(raw)
    except zlib.error as error:
        raise SplitBrainError(f"a bitmap arrived damaged: {error}") from error
    if len(found) != bitmap.n_pages * PAGE:
        raise SplitBrainError(f"a bitmap of {len(found)} bytes arrived, and {bitmap.n_pages * PAGE} are needed")
    bitmap.load(0, found)
    return bitmap


def set_ranges(bitmap: Bitmap, size: int, step: int = CHUNK) -> Iterable[tuple[int, int]]:
    """What the set bits stand for, as (offset, length) of at most *step* bytes, within *size* bytes."""
    at = bitmap.next_set(0)
    while at >= 0:
        end = min(bitmap.next_clear(at), at + step // BLOCK)
        yield at * BLOCK, min(end * BLOCK, size) - at * BLOCK
        at = bitmap.next_set(end)


def digest_of(chunk: bytearray, first_block: int, without: Bitmap) -> bytes:
    """The digest of one chunk that begins at block *first_block*."""
    end = min(first_block + CHUNK // BLOCK, without.n_bits)
    at = without.next_set(first_block) if first_block < without.n_bits else -1
    while 0 <= at < end:
        stop = min(without.next_clear(at), end)
        low, high = (at - first_block) * BLOCK, min((stop - first_block) * BLOCK, len(chunk))
        chunk[low:high] = bytes(high - low)
        at = without.next_set(stop) if stop < end else -1
    return blake2b(chunk, digest_size=DIGEST).digest()


# ---------------------------------------------------------------------------------------- this node


class _ReadOnly:
    """A store whose writes go nowhere: how the metadata of a disk look once they are recovered."""

    def __init__(self, store: FileStore) -> None:
        self._store = store
        self.size = store.size
        self.read = store.read
        self.read_into = store.read_into

    def write(self, offset: int, data: Buffer) -> None:
        """Forget it."""

    def flush(self) -> None:
        """Nothing was written."""


class Node:
    """This node. Implements `Answers`."""

    def __init__(self, session: Session, resource: str) -> None:
        self._session = session
        self._resource = resource
        self._stores: dict[int, FileStore] = {}
        self._held = contextlib.ExitStack()

    def close(self) -> None:
        self._held.close()
        for store in self._stores.values():
            store.close()
        self._stores.clear()

    def lock(self) -> None:
        self._held.enter_context(self._session.locked(self._resource))

    def unlock(self) -> None:
        self._held.close()

    def config(self) -> ResourceConfig:
        """The running configuration, or the file's while nothing runs."""
        try:
            with self._session.client(self._resource) as client:
                return unpack(ResourceConfig, client.hello()["config"])
        except NotRunning:
            return self._session.config(self._resource)

    def describe(self) -> Side:
        config = self.config()
        status = self._session.status_or_none(self._resource)
        socket = self._session.paths.nbd(self._resource)
        uris = {str(v.number): str(place_of(config, v, socket)) for v in config.volumes}
        past = journal.read(self._session.paths.journal(self._resource))
        if status is not None and any(v.flags for v in status.volumes):
            volumes = tuple(self._live(status, volume) for volume in config.volumes)
            return Side(config.node, True, status.role, status.connection.cstate, volumes, past, uris)
        volumes = tuple(self._offline(volume) for volume in config.volumes)
        return Side(config.node, status is not None, "Secondary", "StandAlone", volumes, past, uris)

    def _live(self, status: ResourceStatus, volume: VolumeConfig) -> VolumeSide:
        seen = next(v for v in status.volumes if v.number == volume.number)
        towards = next(v for v in status.connection.volumes if v.number == volume.number)
        bits = -(-towards.out_of_sync // BLOCK)
        return VolumeSide(volume.number, seen.size, seen.flags, seen.disk, volume.disk, bits)

    def _offline(self, volume: VolumeConfig) -> VolumeSide:
        found = self._load(volume)
        superblock = found.superblock
        size = superblock.la_size_sect * SECTOR
        return VolumeSide(
            volume.number, size, superblock.gi_line(), superblock.dstate(), volume.disk, found.bitmap.weight
        )

    def _load(self, volume: VolumeConfig) -> LoadedDisk:
        """What an attach would find, without changing anything."""
        where = volume.meta_disk
        if not volume.disk:
            raise SplitBrainError(f"{self._resource}/{volume.number} has no disk on {self._session.general.node}")
        internal = where.kind == "internal"
        try:
            with (
                FileStore(volume.disk, writable=False, lock=False) as data,
                FileStore(volume.disk if internal else where.path, meta=not internal, writable=False, lock=False)
                as meta,
            ):  # fmt: skip
                return attach.load(_ReadOnly(meta), data.size, where.kind, where.index, name=meta.name)
        except MetadataError as error:
            raise SplitBrainError(f"{self._session.general.node}: {error}") from error

    def _volume(self, number: int) -> VolumeConfig:
        found = self.config().volume(number)
        if found is None:
            raise SplitBrainError(f"{self._session.general.node} has no volume {number} of {self._resource}")
        return found

    def bitmap(self, volume: int) -> Bitmap:
        config, side = self._volume(volume), self.describe().volume(volume)
        assert side is not None
        if not self._is_attached(volume):
            found = self._load(config).bitmap
            found.resize(n_bits_of(side.size), False)
            return found
        refusal = self.command("write-bitmap", {})
        if refusal is not None:
            raise SplitBrainError(f"{self._session.general.node}: the bitmap cannot be written: {refusal.text}")
        where, internal = config.meta_disk, config.meta_disk.kind == "internal"
        try:
            with FileStore(config.disk if internal else where.path, writable=False, lock=False) as meta:
                data_size = self._store(volume).size
                _, place = attach.read_superblock(meta, data_size, where.kind, where.index, name=meta.name)
                return attach.read_bitmap(meta, place, n_bits_of(side.size))
        except MetadataError as error:
            raise SplitBrainError(f"{self._session.general.node}: {error}") from error

    def _is_attached(self, volume: int) -> bool:
        status = self._session.status_or_none(self._resource)
        return status is not None and any(v.number == volume and v.flags for v in status.volumes)

    def _store(self, volume: int) -> FileStore:
        """The volume's data, read beside the daemon."""
        if volume not in self._stores:
            path = self._volume(volume).disk
            if not path:
                raise SplitBrainError(f"{self._resource}/{volume} has no disk on {self._session.general.node}")
            try:
                self._stores[volume] = FileStore(path, writable=False, lock=False)
            except MetadataError as error:
                raise SplitBrainError(f"{self._session.general.node}: {error}") from error
        return self._stores[volume]

    def read(self, volume: int, ranges: Ranges) -> bytes:
        store = self._store(volume)
        try:
            return b"".join([store.read(offset, length) for offset, length in ranges])
        except MetadataError as error:
            raise SplitBrainError(f"{self._session.general.node}: {error}") from error

    def digests(self, volume: int, first: int, count: int, without: Bitmap) -> bytes:
        side = self.describe().volume(volume)
        assert side is not None
        found = []
        for chunk in range(first, first + count):
            offset = chunk * CHUNK
            content = bytearray(self.read(volume, [(offset, min(CHUNK, side.size - offset))]))
            found.append(digest_of(content, offset // BLOCK, without))
        return b"".join(found)

    def data(self, volume: int) -> Bitmap:
        side = self.describe().volume(volume)
        assert side is not None
        bitmap = Bitmap(n_bits_of(side.size))
        fd, at = self._store(volume).fd, 0
        while at < side.size:
            try:
                at = os.lseek(fd, at, os.SEEK_DATA)
                end = os.lseek(fd, at, os.SEEK_HOLE)
            except OSError:
                break  # ENXIO: no data behind this place
            bitmap.set(min(at // BLOCK, bitmap.n_bits), min(-(-end // BLOCK), bitmap.n_bits))
            at = end
        return bitmap

    def files(self, volume: int) -> FileUse:
        side = self.describe().volume(volume)
        assert side is not None
        return find_files(side.device, self.bitmap(volume), BLOCK)

    def command(self, name: str, args: Json) -> Refusal | None:
        given: dict[str, Any] = dict(args)
        try:
            with self._session.client(self._resource) as client:
                return client.command(name, None, given)
        except NotRunning as error:
            raise SplitBrainError(f"{self._session.general.node}: {error}") from error
