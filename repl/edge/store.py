"""A file or block device as a `Store`: opened, claimed, read and written with plain blocking calls.

It decides who may use a disk. The claim is exclusive for as long as the store is open, against other
daemons and tools (flock) and, on block devices, against mounts and everybody else who claims (O_EXCL).
A slot of indexed metadata is claimed by its range only, because the other slots belong to other volumes.

It relies on Linux: flock(2), fcntl(2) open file description locks, and open(2) on O_EXCL without O_CREAT.
Whatever goes wrong becomes a `MetadataError` that says what happened where, and what to do.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time
from types import TracebackType
from typing import Final, Self

from ..errors import MetadataError
from ..metadata import INDEXED_SECT
from ..requests import Buffer
from ..units import SECTOR
from .blockio import Device

_SLOT_BYTES: Final = INDEXED_SECT * SECTOR
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock of <fcntl.h>, 64-bit off_t
_MOMENTS: Final = 5
_MOMENT_S: Final = 0.02
_BUSY: Final = frozenset({errno.EBUSY, errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN})

# drbdsetup's codes, for the data device and for the metadata device.
_OPEN_CODES: Final = (104, 105)
_NOT_BLOCK_CODES: Final = (107, 108)
_CLAIMED_CODES: Final = (114, 115)
_IO_CODE: Final = 118
_ROLES: Final = ("Lower", "Meta")


class FileStore:
    """*path* opened and claimed, until `close` (or the end of a with block).

    *meta* says that it holds metadata only, which chooses the error codes; *index* is the slot of indexed
    metadata, whose range alone is claimed. ``size`` is asked when opened and again by `refresh`. The
    descriptor ``fd`` may be used for more, but is the store's to close.

    MetadataError: 104/105 cannot be opened, 107/108 neither file nor block device, 114/115 claimed by
    somebody else (exit code 20 for all), 118 an I/O error.
    """

    __slots__ = ("_meta", "block", "fd", "name", "size")

    def __init__(
        self,
        path: str,
        *,
        meta: bool = False,
        index: int | None = None,
        writable: bool = True,
        lock: bool = True,
    ) -> None:
        self.name = path
        self._meta = meta
        self.fd = -1
        self.block = self._is_block_device()
        shared = index is not None
        flags = os.O_RDWR if writable else os.O_RDONLY
        if lock and self.block and not shared:
            flags |= os.O_EXCL
        try:
            if lock and self.block and shared:
                self._refuse_if_mounted()
            self.fd = os.open(path, flags | os.O_CLOEXEC)
            self.size = 0
            self.refresh()
            if lock:
                self._claim(index)
        except OSError as error:
            self.close()
            raise self._cannot_open(error) from error
        except MetadataError:
            self.close()
            raise

    def _is_block_device(self) -> bool:
        try:
            mode = os.stat(self.name).st_mode
        except OSError as error:
            raise self._cannot_open(error) from error
        if not (stat.S_ISBLK(mode) or stat.S_ISREG(mode)):
            raise MetadataError(
                f"'{self.name}' is not a block device, nor a regular file! Name the disk itself.",
                _NOT_BLOCK_CODES[self._meta],
                20,
            )
        return stat.S_ISBLK(mode)

    def _refuse_if_mounted(self) -> None:
        """Claim the whole device for a moment, which fails while somebody holds it otherwise.

        Whoever opens another slot does the same, so one that comes in between is given time to finish.
        """
        for attempt in range(_MOMENTS):
            try:
                os.close(os.open(self.name, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
                return
            except OSError as error:
                if error.errno != errno.EBUSY or attempt == _MOMENTS - 1:
                    raise
            time.sleep(_MOMENT_S)

    def _claim(self, index: int | None) -> None:
        """Lock the whole, or one slot of it while others lock theirs."""
        fcntl.flock(self.fd, fcntl.LOCK_NB | (fcntl.LOCK_EX if index is None else fcntl.LOCK_SH))
        if index is not None:
            lock = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, index * _SLOT_BYTES, _SLOT_BYTES, 0)
            fcntl.fcntl(self.fd, fcntl.F_OFD_SETLK, lock)

    def _cannot_open(self, error: OSError) -> MetadataError:
        if error.errno in _BUSY and not (error.errno == errno.EACCES and self.fd < 0):
            return MetadataError(
                f"open({self.name}) failed: Device or resource busy\n"
                f"{_ROLES[self._meta]} device is already claimed. This usually means it is mounted, or that a"
                " daemon or another command uses it.",
                _CLAIMED_CODES[self._meta],
                20,
            )
        return MetadataError(f"open({self.name}) failed: {error.strerror}", _OPEN_CODES[self._meta], 20)

    def refresh(self) -> int:
        """Ask for the size in bytes again (the device may have grown)."""
        self.size = os.lseek(self.fd, 0, os.SEEK_END)
        return self.size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly *length* bytes; MetadataError where the device ends before."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill *buffer*."""
        done = 0
        while done < len(buffer):
            try:
                n = os.preadv(self.fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._io_error("reading", offset + done, len(buffer) - done, error) from error
            if not n:
                raise self._io_error("reading", offset + done, len(buffer) - done, None)
            done += n

    def write(self, offset: int, data: Buffer) -> None:
        """Write all of *data*; durable after `flush`."""
        view = memoryview(data)
        while view:
            try:
                n = os.pwrite(self.fd, view, offset)
            except OSError as error:
                raise self._io_error("writing", offset, len(view), error) from error
            view, offset = view[n:], offset + n

    def zero(self, offset: int, length: int) -> None:
        """Make the range read as zeros, without writing them where the device can do that by itself."""
        try:
            Device(self.fd).zero(offset, length, unmap=False)
        except OSError as error:
            raise self._io_error("zeroing", offset, length, error) from error

    def flush(self) -> None:
        """Everything written is on stable storage afterwards."""
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            raise MetadataError(
                f"{self.name}: flushing failed: {error.strerror}. Look for I/O errors in the kernel log.",
                _IO_CODE,
            ) from error

    def _io_error(self, verb: str, offset: int, length: int, error: OSError | None) -> MetadataError:
        why = "the device ends before" if error is None else error.strerror
        return MetadataError(
            f"{self.name}: {verb} {length} bytes at byte offset {offset} failed: {why}."
            " Look for I/O errors in the kernel log.",
            _IO_CODE,
        )

    def close(self) -> None:
        """Give up the claim. Closing twice is no mistake."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
