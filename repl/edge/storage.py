"""Opens, probes and closes the storage of volumes; what the effects Attach, ReleaseDisk and ProbeSize do.

Everything here may wait for a device, so it happens in a worker thread. An attach that follows a detach
begins when the claim is released. Relies on `store` for the claim and on
`tandem.repl.attach` for what the metadata says; decides how their failures read to an operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tandem.repl import attach
from tandem.repl.attach import LoadedDisk
from tandem.repl.config import VolumeConfig
from tandem.repl.errors import MetadataError, Refusal
from tandem.repl.events import Attached, AttachFailed, DeviceGrown, Event

from .blockio import Device
from .disk import Disk, OpenVolume
from .store import FileStore
from .workers import Completions, Workers

STOP_S: Final = 10.0  # how long the end of the process may wait for a device that does not answer

# drbdsetup's sentences for what can go wrong with a disk.
SENTENCES: Final = {
    104: "Can not open backing device.",
    105: "Can not open meta device.",
    107: "Lower device is not a block device.",
    108: "Meta device is not a block device.",
    112: "Meta device too small.",
    114: "Lower device is already claimed. This usually means it is mounted.",
    115: "Meta device is already claimed. This usually means it is mounted.",
    116: "Lower device / meta device / index combination invalid.",
    118: "IO error(s) occurred during initial access to meta-data.",
    119: "No valid meta-data signature found.",
    122: "kmalloc() failed. Out of memory?",
    138: "Device does not have a disk-config",
    165: "Unclean meta-data found.",
    170: "Implicit device shrinking not allowed. See kernel log.",
}


@dataclass(slots=True)
class OpenStorage:
    """An open disk: its two stores (one and the same with internal metadata) and what was on it."""

    data: FileStore
    meta: FileStore
    loaded: LoadedDisk | None  # until the machine has it: its bitmap may be large
    rotational: bool

    def close(self) -> None:
        self.data.close()
        self.meta.close()


def refuse(code: int, what: str) -> Refusal:
    """DRBD's sentence for *code*, and ours about what was found where and what to do."""
    return Refusal(code, SENTENCES.get(code, "Can not attach the disk."), what)


def open_storage(volume: VolumeConfig) -> OpenStorage | Refusal:
    """Open and claim the disk of *volume*, read its metadata and apply the activity log. Blocking."""
    if not volume.disk:
        return refuse(138, f"Volume {volume.number} has no disk in the configuration; give it one.")
    where = volume.meta_disk
    if where.kind != "internal" and _same(where.path, volume.disk):
        what = f"{volume.disk} is named both as disk and as meta-disk; use meta-disk internal."
        return refuse(116, what)
    stores: list[FileStore] = []
    try:
        stores.append(FileStore(volume.disk))
        if where.kind != "internal":
            index = where.index if where.kind == "indexed" else None
            stores.append(FileStore(where.path, meta=True, index=index))
        data, meta = stores[0], stores[-1]
        loaded = attach.load(meta, data.size, where.kind, where.index, name=meta.name)
        return OpenStorage(data, meta, loaded, _is_rotational(data.fd))
    except MetadataError as error:
        what = str(error)
        is_named = any(path and path in what for path in (volume.disk, where.path))
        refusal = refuse(error.code, what if is_named else f"{where.path or volume.disk}: {what}")
    except OSError as error:
        refusal = refuse(118, f"{volume.disk}: {error.strerror}; look for I/O errors in the kernel log.")
    except MemoryError:
        refusal = refuse(122, f"The bitmap of {volume.disk} does not fit in memory; give this host more.")
    for store in stores:
        store.close()
    return refusal


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # whoever opens it says what is wrong with it


def _is_rotational(fd: int) -> bool:
    """What the kernel says of the device, or of the device under a file. Source: sysfs, queue/rotational."""
    found = os.fstat(fd)
    number = found.st_rdev or found.st_dev
    device = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    for path in (f"{device}/queue/rotational", f"{device}/../queue/rotational"):  # a disk, a partition
        try:
            with open(path, encoding="ascii") as file:
                return file.read().strip() == "1"
        except OSError:
            continue
    return False


Then = Callable[[], None]  # what is left to do on the loop's thread


class Storage:
    """The open storage of a resource's volumes; *report* takes the events, on the loop's thread."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, disk: Disk, report: Callable[[Event], None],
        fatal: Callable[[BaseException], None],
    ) -> None:  # fmt: skip
        self._disk = disk
        self._report = report
        self._worker: Workers[Then] = Workers("attach", 1, Completions(loop, _run, fatal))
        self._open: dict[int, OpenStorage] = {}
        self._attaching: dict[int, tuple[int, VolumeConfig]] = {}  # ticket and volume of the wanted attach
        self._unclosed: set[int] = set()  # volumes attached, being attached, or not closed yet
        self._all_closed = asyncio.Event()

    def attach(self, ticket: int, volume: VolumeConfig) -> None:
        """Answered by Attached or AttachFailed, unless `release` or another attach comes first."""
        assert volume.number not in self._open, f"volume {volume.number} is attached already"
        self._attaching[volume.number] = ticket, volume
        if volume.number not in self._unclosed:
            self._begin(ticket, volume)

    def release(self, number: int) -> None:
        """Close the storage as soon as nothing is under way on it; an attach that is, comes to nothing."""
        self._attaching.pop(number, None)
        if self._open.pop(number, None) is not None:
            self._disk.remove(number)

    def probe(self, ticket: int, number: int) -> None:
        """Answered by DeviceGrown; a device that cannot be asked has the size it had."""
        storage = self._open.get(number)
        assert storage is not None, f"volume {number} is asked for its size but not attached"

        def job() -> Then:
            for store in (storage.data, storage.meta):
                with contextlib.suppress(OSError, MetadataError):
                    store.refresh()
            event = DeviceGrown(ticket, number, storage.data.size, storage.meta.size)
            return lambda: self._report(event)

        self._worker.start(job)

    async def stop(self) -> None:
        """Close everything, after what is under way."""
        for number in list(self._unclosed):
            self.release(number)
        if self._unclosed:
            self._all_closed.clear()
            # A device that does not answer must not keep the process; its threads are daemons.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_S):
                    await self._all_closed.wait()
        self._disk.stop()
        self._worker.stop()

    def _begin(self, ticket: int, volume: VolumeConfig) -> None:
        self._unclosed.add(volume.number)

        def job() -> Then:
            found = open_storage(volume)
            return lambda: self._opened(ticket, volume.number, found)

        self._worker.start(job)

    def _opened(self, ticket: int, number: int, found: OpenStorage | Refusal) -> None:
        wanted = number in self._attaching and self._attaching[number][0] == ticket
        if wanted:
            del self._attaching[number]
        if isinstance(found, Refusal):
            self._closed(number)
            if wanted:
                self._report(AttachFailed(ticket, number, found))
        elif not wanted:
            self._close(number, found)
        else:
            data = Device(found.data.fd)
            meta = data if found.meta is found.data else Device(found.meta.fd)
            opened = OpenVolume(
                data, meta, lambda: self._close(number, found), rotational=found.rotational
            )
            self._open[number] = found
            self._disk.add(number, opened)
            loaded, found.loaded = found.loaded, None  # from here on the machine's, which forgets it at detach
            assert loaded is not None
            self._report(Attached(ticket, number, loaded, sparse=not data.block))

    def _close(self, number: int, storage: OpenStorage) -> None:
        """In the worker, because closing a device may write back what it holds."""

        def job() -> Then:
            storage.close()
            return lambda: self._closed(number)

        self._worker.start(job)

    def _closed(self, number: int) -> None:
        """The claim is released; an attach that was asked for meanwhile may begin."""
        self._unclosed.remove(number)
        if number in self._attaching:
            self._begin(*self._attaching[number])
        elif not self._unclosed:
            self._all_closed.set()


def _run(thens: list[Then]) -> None:
    for then in thens:
        then()
