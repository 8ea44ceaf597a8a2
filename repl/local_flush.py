"""Flushes of the local disk: one for all who ask at the same time, none where nothing was written since the last,
and one begun early where it is about to be asked for.

A flush makes stable what the disk had answered when it began, which is what `Volume.data_version` counts. An
application that writes once and flushes, again and again (the log of a database), will most likely do so the
next time as well: then its flush begins as soon as the write is answered, on both nodes, and is well under way
when the application asks for it. Not before, because the threads that flush would take the processor from those
who answer. A wrong guess costs a flush that nobody needs, and the habit has to show itself anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from .meta_writer import CallbackOp
from .requests import DATA, DiskOp, Op
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine

Then = Callable[[int], None]  # gets an errno, 0 when everything answered before the question is stable

HABIT: Final = 4  # flushes in a row, each behind a single write, after which the next one begins early


class LocalFlush:
    """A flush that is out on the disk of a volume, and who waits for it."""

    __slots__ = ("then", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.then: list[Then] = []


class LocalFlushes:
    """The flushes of the data of all volumes; each volume keeps what is known about its own."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

    def flush(self, vol: Volume, then: Then) -> None:
        """Call *then* when everything that the disk has answered is stable; never from within this call."""
        flush, version = vol.flushing, vol.data_version
        if vol.stable_version == version:
            self.e.stories.append(lambda _: then(0))
        elif flush is not None and flush.version == version:
            flush.then.append(then)
        else:
            self._begin(vol).then.append(then)

    def asked(self, vol: Volume) -> None:
        """An application, ours or the peer's, wants what it has written to be stable: learn when it does so."""
        n_written = vol.data_version - vol.asked_version
        vol.asked_version = vol.data_version
        if n_written == 1:
            vol.flush_habit = min(vol.flush_habit + 1, HABIT)
        elif n_written:
            vol.flush_habit = 0

    def written(self, vol: Volume) -> None:
        """Writes are being answered, and `Volume.flush_habit` says that a flush comes next."""
        n_written = vol.data_version - vol.asked_version
        if n_written > 1:
            vol.flush_habit = 0
        elif n_written and vol.flushing is None and vol.stable_version != vol.data_version and vol.local:
            self._begin(vol)

    def _begin(self, vol: Volume) -> LocalFlush:
        flush = vol.flushing = LocalFlush(vol.data_version)
        vol.n_local += 1
        op = CallbackOp(Op.FLUSH, vol.number, 0, 0, None, 0, DATA, lambda op: self._done(vol, flush, op))
        self.e.out.disk.append(op)
        return flush

    def _done(self, vol: Volume, flush: LocalFlush, op: DiskOp) -> None:
        vol.n_local -= 1
        if vol.flushing is flush:
            vol.flushing = None
        if op.error:
            self.e.disks.failed(vol, op.error, write=True, flush=True)
        else:
            vol.stable_version = max(vol.stable_version, flush.version)
        for then in flush.then:
            then(op.error)
