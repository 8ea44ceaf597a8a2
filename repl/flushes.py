"""Flushes of our applications: answered when everything answered before them is stable on every disk of the mirror.

One flush is under way per volume; those that arrive meanwhile share the next one, whichever connection they
came in on. Each has a leg on the local disk and a leg on the peer, an empty P_DATA with the flush flag.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from .epoch import PeerFlush
from .local_flush import LocalFlushes
from .requests import BOTH_OK, LOCAL, LOCAL_OK, PEER, PEER_OK
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine


class Flushes:
    """The flush that is under way on each volume, and those that wait for the next."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.log = engine.log
        self.local = LocalFlushes(engine)

    def start(self, vol: Volume) -> None:
        """Start the next flush when none is running; every flush that waits shares it."""
        if vol.flush_batch or not vol.flush_waiting:
            return
        vol.flush_batch, vol.flush_waiting = vol.flush_waiting, []
        vol.flush_legs = 0
        for r in vol.flush_batch:
            r.legs = 0
        if not self.e.link.peer_sends_flushes:
            self.log.close_epoch()
        if vol.mirror:
            vol.flush_legs |= PEER
            self.log.send_flush(vol, answers=True)
        if vol.local:
            vol.flush_legs |= LOCAL
            self.local.asked(vol)
            self.local.flush(vol, lambda error: self._flushed_locally(vol, error))
        if not vol.flush_legs:
            self._done(vol)

    def _flushed_locally(self, vol: Volume, error: int) -> None:
        if not error:
            for r in vol.flush_batch:
                r.legs |= LOCAL_OK
        self.leg_done(vol, LOCAL)

    def acked(self, flush: PeerFlush) -> None:
        flush.waiting = 0
        self.log.close_epoch_soon()
        if flush.answers:  # one that only shortens the log was sent before what the client wants stable
            for r in flush.volume.flush_batch:
                r.legs |= PEER_OK
            self.leg_done(flush.volume, PEER)
        else:
            self.log.shortened()
            if self.log.hurries:
                self.log.hurry()

    def refused(self, flush: PeerFlush) -> None:
        """The peer could not flush; the local disk alone answers."""
        flush.waiting = 0
        if flush.answers:
            self.leg_done(flush.volume, PEER)

    def leg_done(self, vol: Volume, leg: int) -> None:
        if vol.flush_batch and vol.flush_legs & leg:
            vol.flush_legs &= ~leg
            if not vol.flush_legs:
                self._done(vol)

    def _done(self, vol: Volume) -> None:
        batch, vol.flush_batch = vol.flush_batch, []
        for r in batch:
            if not r.legs & BOTH_OK:
                r.error = errno.EIO
        self.e.mirror.answer(vol, batch)
        self.start(vol)
