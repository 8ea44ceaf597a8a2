"""The system calls on one open file or block device: whole transfers, zeroes, flushes.

Everything here may block unless it says otherwise and raises OSError; who may call it where is decided
in `disk`. The rest of the edge relies on two promises: a call either transfers everything or raises, and
after `zero` the range reads as zeroes, whatever the device is able to do.

Sources: pwritev2(2), fallocate(2); for block devices fallocate(2) is the kernel's write-zeroes
(block/fops.c, blkdev_fallocate).
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import stat
from collections.abc import Sequence
from typing import Final

import numpy
from tandem.repl.requests import Buffer

IOV_MAX: Final = 1024  # buffers in one call, <limits.h> of Linux
LONG: Final = 64 << 10  # from here on numpy's untouched memory is cheaper than Python's zeroed memory
ZERO_PIECE: Final = 1 << 20  # bytes written at a time where zeroes have to be written one by one
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10
CANNOT: Final = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL, errno.ENODEV})

M_TRIM_THRESHOLD: Final = -1  # mallopt(3), malloc.h of glibc
M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
KEPT_BYTES: Final = 64 << 20  # what the heap may keep for the next payloads: two sessions' requests in flight
GARBAGE_OBJECTS: Final = 20_000  # some 5 MB, should all of it be garbage that only the collector finds
HEAP_PAYLOAD_MAX: Final = 32 << 20  # longer ones come from the kernel; glibc allows no more than this

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong)
_libc.fallocate.restype = ctypes.c_int
_zeroes = bytes(ZERO_PIECE)


def keep_memory() -> None:
    """Let the C library keep the memory of payloads instead of giving it back after each of them.

    Memory from the kernel comes page by page with a fault for each, which for a long payload takes longer
    than reading or writing it. One heap serves all threads: each of several would keep as much, and Python's
    threads hardly ever allocate at the same time. Other C libraries than glibc have no such switch.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, HEAP_PAYLOAD_MAX)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def collect_seldom() -> None:
    """Let Python look for circles of garbage once for many objects that were made, not for 700.

    A request, and whatever else there are thousands of, is in no circle that outlives it, so that nearly all the looks
    find nothing, and each one goes through every request of the transfer log.
    """
    gc.set_threshold(GARBAGE_OBJECTS, *gc.get_threshold()[1:])


def give_memory_back() -> None:
    """Let the kernel have what the heap keeps: for rare moments, such as the end of a resync."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def room(length: int) -> memoryview:
    """A writable buffer of *length* bytes; nobody spends time on filling a long one with zeroes."""
    return memoryview(bytearray(length)) if length < LONG else numpy.empty(length, numpy.uint8).data


class Device:
    """What `disk` knows about one open descriptor. The descriptor stays its owner's."""

    __slots__ = (
        "_dsync", "_punch", "_zero_range", "block", "fd", "hold_s", "inline_again", "nowait", "splices",
        "watched_until",
    )  # fmt: skip

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.block = stat.S_ISBLK(os.fstat(fd).st_mode)
        self.nowait = True  # RWF_NOWAIT is worth trying for reads
        self.splices = True  # pages can be written out of a pipe
        self.inline_again = 0.0  # when blocking calls may be made on the loop again
        self.hold_s = 0.0  # how long they were kept away last time
        self.watched_until = 0.0  # one of them took long, and it is being found out why
        self._dsync = True
        self._punch = True
        self._zero_range = True

    def size(self) -> int:
        """Bytes; of a block device or a file."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill *buffer* from *offset*; EIO when the device ends before."""
        at = 0
        while at < len(buffer):
            n = os.preadv(self.fd, [buffer[at:]], offset + at)
            if not n:
                raise OSError(errno.EIO, "the device ends before the end of the read")
            at += n

    def write(self, buffers: Sequence[Buffer], offset: int, *, durable: bool = False) -> None:
        """Write *buffers* one after the other from *offset* on; on stable storage if *durable*."""
        flags = os.RWF_DSYNC if durable and self._dsync else 0
        rest: list[Buffer] = list(buffers)
        while rest:
            try:
                n = os.pwritev(self.fd, rest[:IOV_MAX], offset, flags)
            except OSError as error:
                if not flags or error.errno not in CANNOT:
                    raise
                self._dsync, flags = False, 0
                continue
            if not n and any(map(len, rest)):
                raise OSError(errno.ENOSPC, "the device takes no more bytes")
            offset += n
            rest = unwritten(rest, n)
        if durable and not flags:
            os.fdatasync(self.fd)

    def write_from(self, pipe: int, length: int, offset: int) -> None:
        """Write *length* bytes from *offset* on out of *pipe*, which has them."""
        while length:
            try:
                n = os.splice(pipe, self.fd, length, offset_dst=offset)
            except OSError as error:
                if error.errno not in CANNOT:
                    raise
                self.splices = False  # a file system that does without
                data = os.read(pipe, length)
                self.write([data], offset)
                n = len(data)
            if not n:
                raise OSError(errno.ENOSPC, "the device takes no more bytes")
            offset += n
            length -= n

    def flush(self) -> None:
        """Everything written before is on stable storage afterwards."""
        os.fdatasync(self.fd)

    def zero(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make the range read as zeroes, giving its space back if *unmap* and if the device can.

        A discard (BLKDISCARD) is not used: what is read afterwards is up to the device, and two replicas
        must stay equal.
        """
        if unmap and self._punch:
            code = _fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)
            if not code:
                return
            self._punch = code == errno.EINVAL  # that one is about this range, the others about the device
        if self._zero_range:
            code = _fallocate(self.fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length)
            if not code:
                return
            self._zero_range = code == errno.EINVAL
        end = offset + length
        while offset < end:
            step = min(ZERO_PIECE, end - offset)
            self.write([memoryview(_zeroes)[:step]], offset)
            offset += step

    def is_hole(self, offset: int, length: int) -> bool:
        """Whether the file has nothing in this range, so that it reads as zeroes; of a device never.

        Quick: no more than a look at the file's extents. What lies beyond the file's end is no hole.
        """
        if self.block:
            return False
        try:
            return os.lseek(self.fd, offset, os.SEEK_DATA) >= offset + length
        except OSError as error:  # ENXIO: no data from here to the end of the file, wherever that is
            return error.errno == errno.ENXIO and self.size() >= offset + length

    def extents(self, offset: int, length: int, n_max: int) -> list[tuple[int, bool]]:
        """What the range consists of: (length, hole) pairs, at most *n_max*, from *offset* on.

        A device that knows of no holes is one extent of data.
        """
        found: list[tuple[int, bool]] = []
        end = offset + length
        while offset < end and len(found) < n_max:
            try:
                data = os.lseek(self.fd, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    found.append((end - offset, False))
                    break
                data = end  # no data from here to the end of the file
            if data > offset:
                stop, hole = min(data, end), True
            else:
                try:
                    stop = min(os.lseek(self.fd, offset, os.SEEK_HOLE), end)
                except OSError:
                    stop = end
                hole = False
            found.append((stop - offset, hole))
            offset = stop
        return found


def _fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """0 when done, an errno of `CANNOT` when this is not possible here; other failures raise."""
    while _libc.fallocate(fd, mode, offset, length):
        code = ctypes.get_errno()
        if code in CANNOT:
            return code
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return 0


def unwritten(buffers: Sequence[Buffer], n: int) -> list[Buffer]:
    """What is left of *buffers* after their first *n* bytes."""
    for i, buffer in enumerate(buffers):
        size = len(buffer)
        if n < size:
            return [memoryview(buffer)[n:], *buffers[i + 1 :]]
        n -= size
    return []
