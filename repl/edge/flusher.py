"""Flushes without a thread: the kernel runs the fdatasync and rings an eventfd when it is over.

A worker thread would do the same with two hand-overs of the interpreter's lock, which take longer than the
flush of a fast device. Decides nothing: `disk` asks for a flush, and hands it to a worker when this cannot
be done here (another kind of machine, a kernel or a container that forbids it, too many at once).

Sources: io_submit(2), linux/aio_abi.h (IOCB_CMD_FDSYNC since Linux 4.18).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import platform
import struct
from collections.abc import Callable
from typing import Final

IOCB_CMD_FDSYNC: Final = 3
IOCB_FLAG_RESFD: Final = 1
INFLIGHT_MAX: Final = 64  # flushes out at a time; the machine shares them, so a volume has about two

# data, key and rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags, resfd
_IOCB: Final = struct.Struct("=QQHhIQQqQII")
_EVENT: Final = struct.Struct("=QQqq")  # data, obj, res, res2
# io_setup, io_destroy, io_submit, io_getevents
_CALLS: Final = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4)}

_libc = ctypes.CDLL(None, use_errno=True)

Ended = Callable[[list[tuple[int, int]]], None]  # (key, errno) pairs


class Flusher:
    """Runs flushes; *ended* hears of each exactly once, in the loop's thread, by the key it was given."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, ended: Ended, fatal: Callable[[BaseException], None]
    ) -> None:
        self._loop = loop
        self._ended = ended
        self._fatal = fatal  # gets our own mistakes, as in `workers`
        self._calls = _CALLS.get(platform.machine()) if struct.calcsize("P") == 8 else None
        self._context = ctypes.c_ulong(0)
        self._bell = -1  # the eventfd; -1 until the first flush
        self._blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}  # key -> its iocb, while it is out
        self._events = ctypes.create_string_buffer(_EVENT.size * INFLIGHT_MAX)

    def start(self, key: int, fd: int) -> bool:
        """Begin an fdatasync of *fd*; False when a thread has to do it. *key* names it in the answer."""
        if len(self._blocks) >= INFLIGHT_MAX or (self._bell < 0 and not self._open()):
            return False
        assert key not in self._blocks and self._calls is not None
        block = ctypes.create_string_buffer(
            _IOCB.pack(key, 0, IOCB_CMD_FDSYNC, 0, fd, 0, 0, 0, 0, IOCB_FLAG_RESFD, self._bell), _IOCB.size
        )
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(block))
        if _libc.syscall(self._calls[2], self._context, ctypes.c_long(1), pointers) != 1:
            return False
        self._blocks[key] = block
        return True

    def _open(self) -> bool:
        if self._calls is None:
            return False
        if _libc.syscall(self._calls[0], ctypes.c_uint(INFLIGHT_MAX), ctypes.byref(self._context)):
            self._calls = None  # not asked again
            return False
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._loop.add_reader(self._bell, self._rung)
        return True

    def _rung(self) -> None:
        try:
            os.eventfd_read(self._bell)
            self._collect()
        except BlockingIOError:
            pass
        except Exception as mistake:
            self._fatal(mistake)

    def _collect(self) -> None:
        assert self._calls is not None
        no_wait = (ctypes.c_long * 2)(0, 0)
        n = _libc.syscall(
            self._calls[3], self._context, ctypes.c_long(0), ctypes.c_long(INFLIGHT_MAX), self._events, no_wait
        )
        assert n >= 0, f"io_getevents failed: {os.strerror(ctypes.get_errno())}"
        ended = []
        for key, _, result, _ in _EVENT.iter_unpack(self._events.raw[: n * _EVENT.size]):
            del self._blocks[key]
            ended.append((key, -result if result < 0 else 0))
        if ended:
            self._ended(ended)

    def stop(self) -> None:
        """Start nothing more. What is still out on a device that does not answer is left to the kernel."""
        if self._bell >= 0:
            self._loop.remove_reader(self._bell)
            os.close(self._bell)
            self._bell = -1
            assert self._calls is not None
            if not self._blocks:
                _libc.syscall(self._calls[1], self._context)
        self._calls = None
