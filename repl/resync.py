"""Bringing two disks together: the exchange of bitmaps, how a resync begins, pauses and is given up.

Its two sides are `resync_target` (what is copied next, in which order with the applications, the end) and
`resync_source`. The target asks, the source answers, both clear bits as blocks arrive. Locks in
`Volume.intervals` keep an application's write and a copy of the same blocks apart: on the source from the
start of the read until the reply is on its way, on the target from the request until the block is on the
disk. On the target a block and a mirrored write of the peer are kept apart by `Volume.peer_intervals`.

What is durable when: the target's merged bitmap is on its disk before the first block is asked for, and a
bit leaves the target's disk only after its data was flushed (`meta_writer`). So a target that loses power
still knows every block it may have lost. Source of the sequence: drbd_worker.c, drbd_receiver.c.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .bitmap_exchange import BitmapReceiver, BitmapSender
from .errors import PeerProtocolError
from .resync_source import Source, SourceRun
from .resync_target import PERSIST_S, Target, TargetRun
from .states import ConnState, DiskState, Role
from .volume import Volume
from .wire import pack_sync_uuid

if TYPE_CHECKING:
    from .engine import Engine

MARK_S: Final = 3.0  # spacing of the marks from which the recent speed is computed


class Resync:
    """Bitmap exchange and resync of all volumes, in both directions."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.target = Target(engine)
        self.source = Source(engine)

    def progressed(self, vol: Volume) -> None:
        """Something on this volume moved: the target may ask for more, either side may end."""
        if vol.target_done and vol.state.conn in (ConnState.SYNC_SOURCE, ConnState.PAUSED_SYNC_S):
            self.source.peer_finished(vol)
        else:
            self.source.go_on(vol)
            self.target.progressed(vol)

    # ------------------------------------------------------------------------------ bitmap exchange

    def enter_bitmap_source(self, vol: Volume) -> None:
        """WFBitMapS: send our bitmap, then wait for the merged one.

        No write needs to be waited for: one that the peer misses has set its bits when it started.
        """
        vol.source = SourceRun(self.e.now)
        vol.source.receiver = BitmapReceiver(vol.bitmap)
        self._send_bitmap(vol)

    def enter_bitmap_target(self, vol: Volume) -> None:
        """WFBitMapT: wait for the source's bitmap."""
        vol.target = TargetRun(self.e.now)
        vol.target.receiver = BitmapReceiver(vol.bitmap)

    def _send_bitmap(self, vol: Volume) -> None:
        sender = BitmapSender(vol.bitmap, vol.number, self.e.config.net.use_rle)
        while not sender.done:
            self.e.out.data += sender.packets(1 << 20)

    def receive_bitmap(self, vol: Volume, payload: memoryview, compressed: bool) -> None:
        """P_BITMAP or P_COMPRESSED_BITMAP."""
        run = vol.target if vol.state.conn == ConnState.WF_BITMAP_T else vol.source
        if run is None or run.receiver is None:
            raise PeerProtocolError(f"bitmap packet in state {vol.state.conn}")
        finished = run.receiver.compressed(payload) if compressed else run.receiver.plain(payload)
        if not finished:
            return
        run.receiver = None
        if vol.state.conn == ConnState.WF_BITMAP_T:
            self._send_bitmap(vol)
            self.e.change(vol, replace(vol.state, conn=ConnState.WF_SYNC_UUID), hard=True)
        elif vol.state.conn == ConnState.WF_BITMAP_S:
            self.start_source(vol)

    # ------------------------------------------------------------------------------ start

    def enter_full_sync(self, vol: Volume) -> None:
        """StartingSyncS: from here on the peer gets no writes, so our generations must say that it is behind.

        They do it before the handler runs, which may take long and refuse. Without that (in DRBD) both would meet
        again as equals, with bits in their bitmaps that mean nothing to them.
        """
        vol.source = SourceRun(self.e.now)
        vol.source.sync_uuid = self._take_sync_uuid(vol)

    def _take_sync_uuid(self, vol: Volume) -> int:
        sync_uuid = vol.uuids.sync_uuid(self.e.random64())
        # Until its first request the target may still be UpToDate in the generation we share.
        vol.sync_ending = not vol.uuids.bitmap
        peer_current = vol.peer_uuids.current if vol.peer_uuids else None
        vol.uuids = vol.uuids.become_source(sync_uuid, peer_current)
        return sync_uuid

    def start_source(self, vol: Volume) -> None:
        """Handler, new sync UUID on disk, then SyncSource and P_SYNC_UUID in one go."""
        serial = vol.conn_serial

        def handler_done(code: int) -> None:
            if vol.conn_serial != serial:
                return
            if code not in (0, 3):
                self.e.stand_alone(f"before-resync-source handler exited with {code}")
                return
            known = vol.source.sync_uuid if vol.source is not None else None
            sync_uuid = self._take_sync_uuid(vol) if known is None else known
            self.e.write_superblock(vol, lambda ok: durable(ok, sync_uuid))

        def durable(ok: bool, sync_uuid: int) -> None:
            if not ok or vol.conn_serial != serial:
                return
            self._begin(vol)
            self.e.change(vol, replace(vol.state, conn=ConnState.SYNC_SOURCE), hard=True, before_state_packet=(
                pack_sync_uuid(sync_uuid, vol.number)))  # fmt: skip
            self.e.note(vol, f"Began resync as {vol.state.conn} (will sync {vol.bitmap.weight * 4} KB "
                             f"[{vol.bitmap.weight} bits set]).")  # fmt: skip

        self.e.run_handler("before-resync-source", vol, handler_done)

    def receive_sync_uuid(self, vol: Volume, sync_uuid: int) -> None:
        """P_SYNC_UUID: we become the target of this generation."""
        conn = vol.state.conn
        asked = conn == ConnState.CONNECTED and self.e.agreement.busy(vol)  # its yes comes on the other socket
        if asked or conn in (ConnState.STARTING_SYNC_T, ConnState.WF_BITMAP_T):
            vol.pending_sync_uuid = sync_uuid
            return
        if conn not in (ConnState.WF_SYNC_UUID, ConnState.BEHIND):
            raise PeerProtocolError(f"sync UUID in state {conn}")
        vol.untouched = False
        primary = vol.state.role == Role.PRIMARY
        vol.uuids = vol.uuids.become_target(sync_uuid, primary)
        if vol.target is None:
            vol.target = TargetRun(self.e.now)
        serial = vol.conn_serial

        def handler_done(code: int) -> None:
            if vol.conn_serial != serial:
                return
            if code != 0:
                self.e.stand_alone(f"before-resync-target handler exited with {code}")
                return
            assert vol.target is not None
            self._begin(vol)
            self.target.begin(vol, vol.target)
            self.e.change(vol, replace(vol.state, conn=ConnState.SYNC_TARGET, disk=DiskState.INCONSISTENT), hard=True)
            self.e.note(vol, f"Began resync as {vol.state.conn} (will sync {vol.bitmap.weight * 4} KB "
                             f"[{vol.bitmap.weight} bits set]).")  # fmt: skip
            run = vol.target

            def durable(ok: bool) -> None:
                if ok and vol.target is run:
                    run.ready = True
                    self.progressed(vol)

            def marked(ok: bool) -> None:
                if not ok or vol.target is not run:
                    return
                assert vol.meta is not None
                if vol.full_sync_flag:  # a crash means a full sync anyway
                    durable(True)
                else:
                    vol.meta.write_changed(durable)

            # Our first request tells the source that a crash leaves us Inconsistent: it need not fence us.
            self.e.write_superblock(vol, marked)

        self.e.write_superblock(vol, None)
        self.e.run_handler("before-resync-target", vol, handler_done)

    def _next_run(self, vol: Volume) -> None:
        """Blocks that were asked for so far do not count for the next resync, whenever they are answered."""
        vol.rs_late = vol.rs_late | vol.rs_replied if self.e.link.ticket else set()
        vol.rs_replied = set()
        vol.rs_run += 1

    def _begin(self, vol: Volume) -> None:
        self._next_run(vol)
        vol.rs_total = vol.bitmap.weight
        vol.rs_failed = 0
        vol.rs_started = self.e.now
        vol.rs_paused_s = 0.0
        vol.rs_paused_at = None
        vol.rs_marks.clear()
        vol.rs_marks.append((self.e.now, vol.bitmap.weight))

    # ------------------------------------------------------------------------------ pause, end, time

    def pause_changed(self, vol: Volume) -> None:
        """SyncX became PausedSyncX or the reverse."""
        if vol.state.conn in (ConnState.PAUSED_SYNC_S, ConnState.PAUSED_SYNC_T):
            vol.rs_paused_at = self.e.now
        elif vol.rs_paused_at is not None:
            vol.rs_paused_s += self.e.now - vol.rs_paused_at
            vol.rs_paused_at = None
        self.progressed(vol)

    def aborted(self, vol: Volume) -> None:
        """The connection or a disk went: forget the run; the bits stay."""
        self.source.give_up(vol)
        run, vol.target, vol.source = vol.target, None, None
        vol.target_done = False
        self._next_run(vol)
        if run is not None:
            for lock in run.out.values():
                for wake in vol.intervals.remove(lock):
                    wake()

    def deadline(self) -> float | None:
        """When a rate limit, a rest, the speed marks or the metadata want attention."""
        times = []
        for vol in self.e.volumes.values():
            if not vol.syncing:
                continue
            times.append(vol.rs_marks[-1][0] + MARK_S if vol.rs_marks else self.e.now + MARK_S)
            for side in (vol.source, vol.target):
                if side is not None and side.pace.resting:
                    times.append(side.pace.next_at)
            run = vol.target
            if run is not None and run.ready and not run.ending and vol.state.conn == ConnState.SYNC_TARGET:
                rate = self.target.rate(vol)
                if rate and run.tokens <= 0 and not vol.n_untracked:
                    # A fixed moment: one that moved with every event would never come under load.
                    times.append(run.tokens_at + (1 - run.tokens) / rate)
        return min(times, default=None)

    def tick(self, now: float) -> None:
        for vol in self.e.volumes.values():
            if not vol.syncing:
                continue
            if not vol.rs_marks or now >= vol.rs_marks[-1][0] + MARK_S:
                vol.rs_marks.append((now, vol.bits_left))
            for side in (vol.source, vol.target):
                if side is not None:
                    side.pace.resting = False  # unless it is found to be so again
            run = vol.target or vol.source
            if run is not None and now >= run.next_persist and vol.meta is not None and vol.meta.idle:
                run.next_persist = now + PERSIST_S
                vol.meta.write_changed()
            self.progressed(vol)
