"""Bringing two disks together: what is copied next, in which order with the applications, and when it is over.

The target asks, the source answers, both clear bits as blocks arrive. Locks in `Volume.intervals` keep an
application's write and a copy of the same blocks apart: on the source from the start of the read until the
reply is on its way, on the target from the request until the block is on the disk. On the target a block
and a mirrored write of the peer are kept apart by `Volume.peer_intervals`.

What is durable when: the target's merged bitmap is on its disk before the first block is asked for, and a
bit leaves the target's disk only after its data was flushed (`meta_writer`). So a target that loses power
still knows every block it may have lost. Source of the sequence: drbd_worker.c, drbd_receiver.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .bitmap_exchange import BitmapReceiver, BitmapSender
from .errors import PeerProtocolError
from .intervals import Lock
from .meta_writer import CallbackOp
from .requests import DATA, MAY_UNMAP, DiskOp, Op
from .states import ConnState, DiskState, Role
from .units import BLOCK_SHIFT, IO_MAX, SECTOR
from .volume import Volume
from .wire import ID_SYNCER, Packet, pack_block_desc, pack_block_req, pack_data, pack_sync_uuid

if TYPE_CHECKING:
    from .engine import Engine

WINDOW_IDLE: Final = 8 << 20  # bytes asked for and not yet written: fills a link of 10 Gbit/s and 6 ms
WINDOW_BUSY: Final = 1 << 20  # while applications write: their share comes first
BUSY_S: Final = 0.1  # an application was heard of this recently
PERSIST_S: Final = 10.0  # how often progress is written to the metadata during a long resync
MARK_S: Final = 3.0  # spacing of the marks from which the recent speed is computed
BITS_PER_REQUEST: Final = IO_MAX >> BLOCK_SHIFT


class TargetRun:
    """A volume's resync as target."""

    __slots__ = (
        "asking", "bytes_out", "cursor", "ending", "failed", "next_persist", "out", "ready", "receiver",
        "tokens", "tokens_at",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.receiver: BitmapReceiver | None = None
        self.cursor = 0
        self.out: dict[int, Lock] = {}  # sector -> the range asked for, until it is on the disk
        self.bytes_out = 0
        self.failed: set[int] = set()  # bits the source could not read or we could not write
        self.ready = False  # the merged bitmap is durable, no untracked write is in flight
        self.ending = False
        self.asking = False
        self.next_persist = now + PERSIST_S
        self.tokens = 0.0
        self.tokens_at = now


class SourceRun:
    """A volume's resync as source."""

    __slots__ = ("next_persist", "receiver")

    def __init__(self, now: float) -> None:
        self.receiver: BitmapReceiver | None = None
        self.next_persist = now + PERSIST_S


class Resync:
    """Bitmap exchange and resync of all volumes, in both directions."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

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

    def start_source(self, vol: Volume) -> None:
        """Handler, new sync UUID on disk, then SyncSource and P_SYNC_UUID in one go."""
        serial = vol.conn_serial

        def handler_done(code: int) -> None:
            if vol.conn_serial != serial:
                return
            if code not in (0, 3):
                self.e.stand_alone(f"before-resync-source handler exited with {code}")
                return
            sync_uuid = vol.uuids.sync_uuid(self.e.random64())
            # Until its first request the target may still be UpToDate in the generation we share.
            vol.sync_ending = not vol.uuids.bitmap
            peer_current = vol.peer_uuids.current if vol.peer_uuids else None
            vol.uuids = vol.uuids.become_source(sync_uuid, peer_current)
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
            self.e.change(vol, replace(vol.state, conn=ConnState.SYNC_TARGET, disk=DiskState.INCONSISTENT), hard=True)
            self.e.note(vol, f"Began resync as {vol.state.conn} (will sync {vol.bitmap.weight * 4} KB "
                             f"[{vol.bitmap.weight} bits set]).")  # fmt: skip
            run = vol.target

            def durable(ok: bool) -> None:
                if ok and vol.target is run:
                    run.ready = True
                    self.progressed(vol)

            assert vol.meta is not None
            if vol.full_sync_flag:  # a crash means a full sync anyway
                durable(True)
            else:
                vol.meta.write_changed(durable)

        self.e.write_superblock(vol, None)
        self.e.run_handler("before-resync-target", vol, handler_done)

    def _begin(self, vol: Volume) -> None:
        vol.rs_total = vol.bitmap.weight
        vol.rs_failed = 0
        vol.rs_started = self.e.now
        vol.rs_paused_s = 0.0
        vol.rs_paused_at = None
        vol.rs_marks.clear()
        vol.rs_marks.append((self.e.now, vol.bitmap.weight))

    # ------------------------------------------------------------------------------ target

    def progressed(self, vol: Volume) -> None:
        """Something on this volume moved: ask for more, or end."""
        run = vol.target
        if vol.target_done and vol.state.conn in (ConnState.SYNC_SOURCE, ConnState.PAUSED_SYNC_S):
            self.peer_finished(vol)
            return
        if run is None or run.asking or not run.ready or vol.state.conn != ConnState.SYNC_TARGET:
            return
        if vol.n_untracked:
            return  # a mirrored write from before the resync is still out; its end comes back here
        run.asking = True
        try:
            self._ask(vol, run)
        finally:
            run.asking = False
        if not run.out and not run.ending:
            self._maybe_end(vol, run)

    def _window(self, vol: Volume) -> int:
        fill = vol.config.disk_options.c_fill_target * SECTOR
        if fill:
            return fill
        busy = self.e.now - vol.last_app_io < BUSY_S or vol.n_unacked or vol.n_app
        return WINDOW_BUSY if busy else WINDOW_IDLE

    @staticmethod
    def _rate(vol: Volume) -> int:
        """The configured maximum rate in bytes per second; 0: none."""
        options = vol.config.disk_options
        return 1024 * (options.c_max_rate if options.c_plan_ahead else options.resync_rate)

    def _allowance(self, vol: Volume, run: TargetRun) -> float:
        """Bytes the configured maximum rate allows now; infinite without one."""
        rate = self._rate(vol)
        if not rate:
            return float("inf")
        run.tokens = min(run.tokens + (self.e.now - run.tokens_at) * rate, max(rate * 0.2, IO_MAX))
        run.tokens_at = self.e.now
        return run.tokens

    def _ask(self, vol: Volume, run: TargetRun) -> None:
        window, allowance = self._window(vol), self._allowance(vol, run)
        while run.bytes_out < window and allowance > 0:
            bit = vol.bitmap.next_set(run.cursor)
            while bit >= 0 and (bit in run.failed):
                bit = vol.bitmap.next_set(bit + 1)
            if bit < 0:
                break
            limit = min(bit + BITS_PER_REQUEST - bit % BITS_PER_REQUEST, vol.n_bits)
            end = min(vol.bitmap.next_clear(bit), limit)
            offset = bit << BLOCK_SHIFT
            length = min(end << BLOCK_SHIFT, vol.size) - offset
            blocker = vol.intervals.blocker(offset, length)
            if blocker is not None:
                vol.intervals.wait(blocker, lambda: self.progressed(vol))
                break
            lock = Lock(offset, length)
            vol.intervals.add(lock)
            run.out[offset >> 9] = lock
            run.bytes_out += length
            run.tokens -= length
            allowance -= length
            run.cursor = end
            self.e.out.data.append(
                pack_block_req(Packet.RS_DATA_REQUEST, vol.number, offset >> 9, ID_SYNCER, length)
            )

    def receive_data(self, vol: Volume, sector: int, payload: memoryview) -> None:
        """P_RS_DATA_REPLY: write the block, unless we can not."""
        vol.bytes_received += len(payload)
        self._block_arrived(vol, sector, len(payload), payload, Op.WRITE)

    def receive_deallocated(self, vol: Volume, sector: int, length: int) -> None:
        """P_RS_DEALLOCATED: the source's block is all zero."""
        self._block_arrived(vol, sector, length, None, Op.ZEROES)

    def _block_arrived(
        self, vol: Volume, sector: int, length: int, payload: memoryview | None, op: int
    ) -> None:
        run = vol.target
        lock = run.out.get(sector) if run else None
        if run is None and not vol.local:  # asked for before our disk went
            self.e.send_ack(Packet.NEG_ACK, vol, sector, ID_SYNCER, length)
        elif run is None or lock is None or lock.length != length:
            raise PeerProtocolError(f"resync data nobody asked for: sector {sector}, {length} bytes")
        elif not vol.local:
            self._target_failed(vol, run, sector, lock)
        else:
            self._write_block(vol, run, sector, lock, payload, op)

    def _write_block(
        self, vol: Volume, run: TargetRun, sector: int, lock: Lock, payload: memoryview | None, op: int
    ) -> None:
        held = Lock(lock.offset, lock.length)

        def start() -> None:
            if vol.target is not run or not vol.local:
                if vol.target is run and sector in run.out:
                    self._target_failed(vol, run, sector, lock)
                vol.peer_intervals.leave(held)
                return
            vol.n_local += 1
            self.e.replica.n_active += 1
            flags = MAY_UNMAP if op == Op.ZEROES else 0
            self.e.out.disk.append(
                CallbackOp(op, vol.number, lock.offset, lock.length, payload, flags, DATA,
                           lambda done: self._block_written(vol, run, sector, lock, held, done))
            )  # fmt: skip

        vol.peer_intervals.enter(held, start)

    def _block_written(
        self, vol: Volume, run: TargetRun, sector: int, lock: Lock, held: Lock, op: DiskOp
    ) -> None:
        vol.n_local -= 1
        self.e.replica.n_active -= 1
        if vol.target is run and sector in run.out:
            if op.error:
                self._target_failed(vol, run, sector, lock)
                self.e.disks.failed(vol, op.error, write=True)
            else:
                vol.data_version += 1
                vol.bytes_written += lock.length
                vol.set_in_sync(lock.offset, lock.length)
                self.e.send_ack(Packet.RS_WRITE_ACK, vol, sector, ID_SYNCER, lock.length)
                self._target_release(vol, run, sector)
        vol.peer_intervals.leave(held)
        self.e.replica_progressed()
        self.progressed(vol)

    def _target_failed(self, vol: Volume, run: TargetRun, sector: int, lock: Lock) -> None:
        self.e.send_ack(Packet.NEG_ACK, vol, sector, ID_SYNCER, lock.length)
        self._count_failed(vol, run, lock)
        self._target_release(vol, run, sector)

    def _count_failed(self, vol: Volume, run: TargetRun, lock: Lock) -> None:
        bits = range(lock.offset >> 12, (lock.offset + lock.length + 4095) >> 12)
        run.failed.update(bits)
        vol.rs_failed = len(run.failed)

    def _target_release(self, vol: Volume, run: TargetRun, sector: int) -> None:
        lock = run.out.pop(sector)
        run.bytes_out -= lock.length
        for wake in vol.intervals.remove(lock):
            wake()

    def request_answered(self, vol: Volume, sector: int, failed: bool, in_sync: bool = False) -> None:
        """P_NEG_RS_DREPLY (failed), P_RS_CANCEL or P_RS_IS_IN_SYNC for a request of ours."""
        run = vol.target
        if run is None or sector not in run.out:
            return
        lock = run.out[sector]
        if failed:
            self._count_failed(vol, run, lock)
        elif in_sync:
            vol.set_in_sync(lock.offset, lock.length)
        else:
            run.cursor = min(run.cursor, lock.offset >> 12)
        self._target_release(vol, run, sector)
        self.progressed(vol)

    def _maybe_end(self, vol: Volume, run: TargetRun) -> None:
        """No request is out: look behind the cursor once more, or end."""
        if vol.bitmap.weight > len(run.failed):
            if run.cursor and vol.bitmap.next_set(run.cursor) < 0:
                run.cursor = 0
                run.asking = True
                try:
                    self._ask(vol, run)
                finally:
                    run.asking = False
            return
        run.ending = True
        legs = {"meta", "ping"}

        def leg(name: str) -> None:
            legs.discard(name)
            if legs or vol.target is not run or vol.state.conn not in (
                ConnState.SYNC_TARGET, ConnState.PAUSED_SYNC_T,
            ):  # fmt: skip
                return
            if vol.bitmap.weight > len(run.failed):  # the peer marked more meanwhile
                run.ending = False
                self.progressed(vol)
            else:
                self._end_target(vol, run)

        assert vol.meta is not None
        # Our bits leave the disk only after the data behind them is stable, then the generation may end.
        vol.meta.write_changed(lambda ok: leg("meta") if ok else None)
        # The source must have seen all our acks before it sees the state packet on the other socket.
        self.e.liveness.ping(lambda: leg("ping"))

    def _end_target(self, vol: Volume, run: TargetRun) -> None:
        failed = len(run.failed)
        primary = vol.state.role == Role.PRIMARY
        if not failed and vol.peer_uuids is not None:
            vol.uuids = vol.uuids.after_sync_target(vol.peer_uuids, primary)
            vol.peer_uuids = vol.uuids

        def durable(ok: bool) -> None:
            if not ok or vol.target is not run:
                return
            vol.target = None
            self._log_done(vol)
            disk = DiskState.INCONSISTENT if failed else DiskState.UP_TO_DATE
            self.e.change(
                vol, replace(vol.state, conn=ConnState.CONNECTED, disk=disk, pdsk=DiskState.UP_TO_DATE), hard=True,
                why="resync finished",
            )  # fmt: skip
            self.e.run_handler("after-resync-target", vol, None)

        # The new generation is on our disk before the source may forget the old one.
        self.e.write_superblock(vol, durable)

    # ------------------------------------------------------------------------------ source

    def serve(self, vol: Volume, sector: int, block_id: int, size: int, digest: bytes | None, thin: bool) -> None:
        """P_RS_DATA_REQUEST, P_RS_THIN_REQ or P_CSUM_RS_REQUEST."""
        if vol.state.disk != DiskState.UP_TO_DATE:
            self.e.send_ack(Packet.NEG_RS_DREPLY, vol, sector, block_id, size)
            return
        if vol.sync_ending:  # it has taken the sync UUID and is not through
            vol.sync_ending = False
            self.e.write_superblock(vol, None)
        link = self.e.link.ticket
        offset = sector << 9
        blocker = vol.intervals.blocker(offset, size)
        if blocker is not None:
            vol.intervals.wait(
                blocker, lambda: self._serve_later(link, vol, sector, block_id, size, digest, thin)
            )
            return
        lock = Lock(offset, size)
        vol.intervals.add(lock)
        vol.n_local += 1
        self.e.out.disk.append(
            CallbackOp(Op.READ, vol.number, offset, size, None, 0, DATA,
                       lambda op: self._served(link, vol, lock, block_id, op, digest, thin))
        )  # fmt: skip

    def _serve_later(
        self, link: int, vol: Volume, sector: int, block_id: int, size: int, digest: bytes | None, thin: bool
    ) -> None:
        if link == self.e.link.ticket and vol.state.connected:
            self.serve(vol, sector, block_id, size, digest, thin)

    def _served(
        self, link: int, vol: Volume, lock: Lock, block_id: int, op: DiskOp, digest: bytes | None, thin: bool
    ) -> None:
        vol.n_local -= 1
        waiters = vol.intervals.remove(lock)
        sector, size = lock.offset >> 9, lock.length
        if link == self.e.link.ticket and vol.state.connected:
            if op.error:
                self.e.send_ack(Packet.NEG_RS_DREPLY, vol, sector, block_id, size)
                vol.rs_failed += size >> 12
            else:
                self._reply(vol, sector, block_id, op, digest, thin)
        if op.error:
            self.e.disks.failed(vol, op.error or errno.EIO, write=False)
        for wake in waiters:
            wake()
        self.e.disks.local_idle(vol)

    def _reply(
        self, vol: Volume, sector: int, block_id: int, op: DiskOp, digest: bytes | None, thin: bool
    ) -> None:
        assert op.payload is not None
        vol.bytes_read += op.length
        if thin and bytes(op.payload) == bytes(op.length):
            self.e.out.data.append(pack_block_desc(Packet.RS_DEALLOCATED, vol.number, sector, op.length))
            return
        if digest is not None and self.e.csums is not None and self.e.csums(op.payload) == digest:
            self.e.send_ack(Packet.RS_IS_IN_SYNC, vol, sector, block_id, op.length)
            vol.set_in_sync(op.offset, op.length)
            return
        check = self.e.integrity(op.payload) if self.e.integrity else b""
        self.e.out.data += (
            pack_data(Packet.RS_DATA_REPLY, vol.number, sector, block_id, 0, 0, op.length, check),
            op.payload,
        )
        vol.bytes_sent += op.length

    def block_acked(self, vol: Volume, sector: int, size: int) -> None:
        """P_RS_WRITE_ACK with the syncer's id: the target has the block."""
        vol.set_in_sync(sector << 9, size)

    def block_refused(self, vol: Volume, size: int) -> None:
        """P_NEG_ACK with the syncer's id: the target could not write it."""
        vol.rs_failed += max(size >> 12, 1)

    def before_ping_ack(self, then: Callable[[], None]) -> None:
        """The peer pings, and our answer may be what its resync waits for: *then* may end without our hearing.

        What that means for our next generation (`Volume.end_unknown`) is on disk before the answer goes out.
        """
        ending = [
            v for v in self.e.volumes.values()
            if v.state.conn in (ConnState.SYNC_SOURCE, ConnState.PAUSED_SYNC_S)
            and not v.sync_ending and v.bitmap.weight <= self.e.log.n_bits_held(v)
        ]  # fmt: skip
        if not ending:
            then()
            return
        link, left = self.e.link.ticket, len(ending)

        def durable(ok: bool) -> None:
            nonlocal left
            left -= 1
            if not left and link == self.e.link.ticket:
                then()

        for vol in ending:
            vol.sync_ending = True
            self.e.write_superblock(vol, durable)

    def peer_finished(self, vol: Volume) -> bool:
        """P_STATE says the target is done: end as source. False when our bits say otherwise."""
        disk = vol.state.disk
        if vol.bitmap.weight > vol.rs_failed:
            vol.target_done = True
            if self.e.log.n_bits_held(vol):  # writes that our own disk still owes us clear them (`progressed`)
                return False
            if vol.config.disk_options.on_io_error != "pass_on":
                return False  # acks are still missing: the peer speaks too early
            disk = DiskState.INCONSISTENT  # blocks that our disk failed and the target has
        vol.target_done = False
        vol.source = None
        vol.sync_ending = False
        if not vol.rs_failed:
            vol.uuids = vol.uuids.clear_bitmap()
            vol.peer_uuids = vol.uuids
        self._log_done(vol)
        pdsk = DiskState.INCONSISTENT if vol.rs_failed else DiskState.UP_TO_DATE
        self.e.change(
            vol, replace(vol.state, conn=ConnState.CONNECTED, disk=disk, pdsk=pdsk), hard=True, why="resync finished"
        )
        if disk == DiskState.INCONSISTENT and vol.state.connected:
            self.e.peer.send_state(vol)
        self.e.write_superblock(vol, None)
        if vol.meta is not None:
            vol.meta.write_changed()
        if self.e.fenced_policy and all(
            v.state.disk == v.state.pdsk == DiskState.UP_TO_DATE for v in self.e.volumes.values()
        ):
            self.e.run_handler("unfence-peer", None, None)
        return True

    def _log_done(self, vol: Volume) -> None:
        took = max(self.e.now - vol.rs_started - vol.rs_paused_s, 1e-3)
        kib = vol.rs_total * 4
        speed = f"total {took:.0f} sec; paused {vol.rs_paused_s:.0f} sec; {kib / took:,.0f} K/sec"
        self.e.note(vol, f"Resync done ({speed})")
        self.e.note(vol, f"updated UUIDs {vol.uuids}")

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
        run, vol.target, vol.source = vol.target, None, None
        vol.target_done = False
        if run is not None:
            for lock in run.out.values():
                for wake in vol.intervals.remove(lock):
                    wake()

    def deadline(self) -> float | None:
        """When a rate limit, the speed marks or the metadata want attention."""
        times = []
        for vol in self.e.volumes.values():
            if not vol.syncing:
                continue
            times.append(vol.rs_marks[-1][0] + MARK_S if vol.rs_marks else self.e.now + MARK_S)
            run = vol.target
            if run is not None and run.ready and not run.ending and vol.state.conn == ConnState.SYNC_TARGET:
                rate = self._rate(vol)
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
            run = vol.target or vol.source
            if run is not None and now >= run.next_persist and vol.meta is not None and vol.meta.idle:
                run.next_persist = now + PERSIST_S
                vol.meta.write_changed()
            self.progressed(vol)
