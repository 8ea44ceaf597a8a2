"""Blocking calls on a volume, for front ends whose threads carry one client request each.

The threads hand their requests over and wait (`waiting`); the loop is woken once for all that came meanwhile, which
enter the machine as one batch. Relies on the volume to give every piece back exactly once.
"""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Final

from tandem.repl.edge.volume import Volume
from tandem.repl.requests import Buffer, Op, Request

from .codec import BLOCK_MIN
from .compiled import waiting

GONE: Final = errno.ESHUTDOWN  # what is answered when the node is down


class BlockingVolume:
    """The volume as threads see it; to be made in the loop's thread. Errors are OSError, with a request's errno."""

    def __init__(self, loop: asyncio.AbstractEventLoop, volume: Volume) -> None:
        self._loop = loop
        self._volume = volume
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._crowd = waiting.Crowd(volume.number, self._event)
        self._held: list[Request] = []  # until the machine's pause ends
        self._gone = False
        loop.add_reader(self._event, self._collect)

    @property
    def volume(self) -> Volume:
        """The volume itself; its methods belong to the loop's thread."""
        return self._volume

    # ----------------------------------------------------------------------------- in any thread

    def read(self, offset: int, into: Buffer) -> None:
        """Fill *into* with the bytes at *offset*. Raises OSError."""
        _check(offset, len(into))
        _raise(self._crowd.read(offset, into), Op.READ, offset, len(into))

    def write(self, offset: int, data: Buffer, flags: int) -> None:
        """Write *data*, which may change as soon as this returns. Raises OSError."""
        _check(offset, len(data))
        _raise(self._crowd.write(offset, data, flags), Op.WRITE, offset, len(data))

    def discard(self, op: Op, offset: int, length: int, flags: int) -> None:
        """Trim or write zeroes, as *op* says. Raises OSError."""
        _check(offset, length)
        _raise(self._crowd.change(op, offset, length, flags), op, offset, length)

    def flush(self) -> None:
        """Return when everything that was answered before is stable. Raises OSError."""
        _raise(self._crowd.change(Op.FLUSH, 0, 0, 0), Op.FLUSH, 0, 0)

    # ------------------------------------------------------------------------ in the loop's thread

    def shut_down(self) -> None:
        """The node is down: whoever waits is told so, and whoever comes later."""
        self._gone = True
        self._held.clear()
        self._crowd.end(GONE)

    def _collect(self) -> None:
        os.eventfd_read(self._event)
        self._held += self._crowd.take()
        self._submit()

    def _submit(self) -> None:
        if self._gone:
            return
        if self._volume.paused:
            self._volume.on_resume(self._submit)
        elif self._held:
            batch, self._held = self._held, []
            self._volume.submit(batch)


def _check(offset: int, length: int) -> None:
    if offset % BLOCK_MIN or length % BLOCK_MIN:
        raise OSError(errno.EINVAL, f"offset and length must be multiples of {BLOCK_MIN}")


def _raise(error: int, op: Op, offset: int, length: int) -> None:
    if error:
        raise OSError(error, f"{op.name} of {length} bytes at {offset} failed")
