"""The target's side of a resync: what is asked for and how, what becomes of the answers, when it is over.

A stretch of set bits is asked for as it is (P_RS_DATA_REQUEST), with the digest of what we have so that equal
blocks need not travel (P_CSUM_RS_REQUEST, with `csums-alg`), or so that a stretch of zeroes is only named
(P_RS_THIN_REQ: into a file always, otherwise with `rs-discard-granularity`, in pieces of that size). Whichever
way, the range is locked against our own applications until it is settled. A mirrored write may change it between
our read and the source's comparison; the source compares what it has after that write, so digests that agree then
agree with what we have once the write has landed here.

Source: drbd_worker.c (make_resync_request, read_for_csum, drbd_resync_finished).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .bitmap_exchange import BitmapReceiver
from .digests import Digest
from .errors import PeerProtocolError
from .intervals import Lock
from .meta_writer import CallbackOp
from .pace import Pace
from .packets import Feature
from .requests import DATA, IF_HOLE, MAY_UNMAP, DiskOp, Op
from .states import ConnState, DiskState, Role
from .units import BLOCK, BLOCK_SHIFT, IO_MAX, SECTOR
from .volume import Volume
from .wire import ID_SYNCER, Packet, pack_block_req

if TYPE_CHECKING:
    from .engine import Engine

WINDOW_IDLE: Final = 8 << 20  # bytes asked for and not yet written: fills a link of 10 Gbit/s and 6 ms
WINDOW_HOLES: Final = 32 << 20  # where the last answer was a stretch of zeroes, the next will hardly be bytes
WINDOW_BUSY: Final = 1 << 20  # while the peer's applications write: their share comes first
PERSIST_S: Final = 10.0  # how often progress is written to the metadata during a long resync


class TargetRun:
    """A volume's resync as target."""

    __slots__ = (
        "asking", "bytes_out", "checksums", "cursor", "ending", "failed", "in_holes", "n_equal", "next_persist", "out",
        "pace", "piece_bits", "ready", "receiver", "thin", "tokens", "tokens_at",
    )  # fmt: skip

    def __init__(self, now: float) -> None:
        self.receiver: BitmapReceiver | None = None
        self.cursor = 0
        self.out: dict[int, Lock] = {}  # sector -> the range asked for, until it is on the disk
        self.bytes_out = 0
        self.pace = Pace()
        self.failed: set[int] = set()  # bits the source could not read or we could not write
        self.ready = False  # the merged bitmap is durable, no untracked write is in flight
        self.ending = False
        self.asking = False
        self.next_persist = now + PERSIST_S
        self.checksums: Digest | None = None  # ask with the digests of our blocks
        self.n_equal = 0  # bits of which the digests agreed
        self.in_holes = False  # the block that came last was all zero
        self.thin = 0  # bytes of a request whose answer may be that it is all zero; 0: never
        self.piece_bits = IO_MAX >> BLOCK_SHIFT  # no request crosses a multiple of this
        self.tokens = 0.0
        self.tokens_at = now


class Target:
    """Volumes that are brought up to date by the peer."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

    def begin(self, vol: Volume, run: TargetRun) -> None:
        """SyncTarget: how this run asks for blocks."""
        if not self.e.config.net.csums_after_crash_only or vol.crashed_primary:
            run.checksums = self.e.csums
        granularity = vol.config.disk_options.rs_discard_granularity or (IO_MAX if vol.sparse else 0)
        thin = min(granularity, IO_MAX) & ~(BLOCK - 1)
        if thin and self.e.link.features & Feature.THIN_RESYNC and run.checksums is None:
            run.thin = thin
            run.piece_bits = thin >> BLOCK_SHIFT

    def progressed(self, vol: Volume) -> None:
        """Something on this volume moved: ask for more, or end."""
        run = vol.target
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

    def _window(self, vol: Volume, run: TargetRun) -> int:
        fill = vol.config.disk_options.c_fill_target * SECTOR
        if fill:
            return fill
        return WINDOW_BUSY if vol.n_unacked else WINDOW_HOLES if run.in_holes else WINDOW_IDLE

    @staticmethod
    def rate(vol: Volume) -> int:
        """The configured maximum rate in bytes per second; 0: none."""
        options = vol.config.disk_options
        return 1024 * (options.c_max_rate if options.c_plan_ahead else options.resync_rate)

    def _allowance(self, vol: Volume, run: TargetRun) -> float:
        """Bytes the configured maximum rate allows now; infinite without one."""
        rate = self.rate(vol)
        if not rate:
            return float("inf")
        run.tokens = min(run.tokens + (self.e.now - run.tokens_at) * rate, max(rate * 0.2, IO_MAX))
        run.tokens_at = self.e.now
        return run.tokens

    def _ask(self, vol: Volume, run: TargetRun) -> None:
        window, allowance = self._window(vol, run), self._allowance(vol, run)
        now, rate = self.e.now, vol.config.disk_options.c_min_rate
        while run.bytes_out < window and allowance > 0 and run.pace.room(now, vol.at_work(now), rate) > 0:
            bit = vol.bitmap.next_set(run.cursor)
            while bit >= 0 and (bit in run.failed):
                bit = vol.bitmap.next_set(bit + 1)
            if bit < 0:
                break
            end = vol.bitmap.next_clear(bit, bit + run.piece_bits - bit % run.piece_bits)
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
            run.pace.begun(now, length)
            run.tokens -= length
            allowance -= length
            run.cursor = end
            if run.checksums is None:
                self._request(vol, lock, Packet.RS_THIN_REQ if length == run.thin else Packet.RS_DATA_REQUEST)
            else:
                self._read_own(vol, run, lock, run.checksums)

    def _request(self, vol: Volume, lock: Lock, cmd: Packet, digest: bytes = b"") -> None:
        self.e.out.data.append(
            pack_block_req(cmd, vol.number, lock.offset >> 9, ID_SYNCER, lock.length, digest)
        )

    def _read_own(self, vol: Volume, run: TargetRun, lock: Lock, digest: Digest) -> None:
        """Ask with the digest of what our disk has here; a disk that cannot say gets the data."""

        def read(op: DiskOp) -> None:
            vol.n_local -= 1
            if op.error:
                self.e.disks.failed(vol, op.error, write=False)
            if vol.target is run and run.out.get(lock.offset >> 9) is lock and vol.local:
                if op.error or op.payload is None:
                    self._request(vol, lock, Packet.RS_DATA_REQUEST)
                else:
                    vol.bytes_read += op.length
                    self._request(vol, lock, Packet.CSUM_RS_REQUEST, digest(op.payload))
            self.e.disks.local_idle(vol)

        vol.n_local += 1
        self.e.out.disk.append(CallbackOp(Op.READ, vol.number, lock.offset, lock.length, None, 0, DATA, read))

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
        link = self.e.link.ticket
        run.in_holes = op == Op.ZEROES

        def start() -> None:
            if vol.target is not run or not vol.local:
                if vol.target is run and sector in run.out:
                    self._target_failed(vol, run, sector, lock)
                else:
                    self._given_up(vol, link, sector, lock)
                vol.peer_intervals.leave(held)
                return
            vol.n_local += 1
            self.e.replica.n_active += 1
            flags = 0
            if op == Op.ZEROES:  # space that is reserved is given back only where that was asked for
                flags = MAY_UNMAP if vol.config.disk_options.rs_discard_granularity else MAY_UNMAP | IF_HOLE
            self.e.out.disk.append(
                CallbackOp(op, vol.number, lock.offset, lock.length, payload, flags, DATA,
                           lambda done: self._block_written(vol, run, link, sector, lock, held, done))
            )  # fmt: skip

        vol.peer_intervals.enter(held, start)

    def _given_up(self, vol: Volume, link: int, sector: int, lock: Lock) -> None:
        """A block of a resync that is no more: the source counts on one answer to each all the same."""
        if link == self.e.link.ticket:
            self.e.send_ack(Packet.NEG_ACK, vol, sector, ID_SYNCER, lock.length)

    def _block_written(
        self, vol: Volume, run: TargetRun, link: int, sector: int, lock: Lock, held: Lock, op: DiskOp
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
        else:
            self._given_up(vol, link, sector, lock)
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
        run.pace.settled(self.e.now, lock.length, vol.config.disk_options.c_min_rate)
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
            run.n_equal += (lock.length + BLOCK - 1) >> BLOCK_SHIFT
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
            log_done(self.e, vol)
            if run.checksums is not None:
                share, moved = 100 * run.n_equal // max(vol.rs_total, 1), vol.rs_total - run.n_equal
                self.e.note(vol, f"{share} % had equal checksums, eliminated: {run.n_equal * 4}K; "
                                 f"transferred {moved * 4}K total {vol.rs_total * 4}K")  # fmt: skip
            disk = DiskState.INCONSISTENT if failed else DiskState.UP_TO_DATE
            self.e.change(
                vol, replace(vol.state, conn=ConnState.CONNECTED, disk=disk, pdsk=DiskState.UP_TO_DATE), hard=True,
                why="resync finished",
            )  # fmt: skip
            self.e.run_handler("after-resync-target", vol, None)

        # The new generation is on our disk before the source may forget the old one.
        self.e.write_superblock(vol, durable)


def log_done(e: Engine, vol: Volume) -> None:
    took = max(e.now - vol.rs_started - vol.rs_paused_s, 1e-3)
    kib = vol.rs_total * 4
    speed = f"total {took:.0f} sec; paused {vol.rs_paused_s:.0f} sec; {kib / took:,.0f} K/sec"
    e.note(vol, f"Resync done ({speed})")
    e.note(vol, f"updated UUIDs {vol.uuids}")
