"""Online verify: both disks are compared block by block while they are in use.

VerifyS asks for the peer's digest of each block, compares it with its own and tells the result; VerifyT
answers. A block that differs becomes out of sync on both nodes; nothing is copied before the next resync.

Each node holds the block against its own applications, VerifyS from the request to its verdict, VerifyT
from the request to the verdict's arrival, so that no write is on one disk only when it is read. Requests
are one bitmap block each: a kernel in VerifyT counts results, not bytes, to know when it is through.
Source: drbd_worker.c (make_ov_request, w_e_end_ov_req, w_e_end_ov_reply, drbd_resync_finished) and
drbd_receiver.c (receive_DataRequest, got_OVResult).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .digests import Digest, digest
from .errors import PeerProtocolError
from .intervals import Lock
from .meta_writer import CallbackOp
from .requests import DATA, DiskOp, Op
from .states import ConnState, DiskState
from .units import BLOCK, BLOCK_SHIFT, IO_MAX
from .volume import Volume
from .wire import ID_IN_SYNC, ID_OUT_OF_SYNC, ID_SYNCER, Packet, pack_block_req

if TYPE_CHECKING:
    from .engine import Engine

WINDOW: Final = 1 << 20  # bytes asked for and not yet judged
AL_EXTENT_SHIFT: Final = 22
QUIET_S: Final = 0.05  # how soon to look again whether protocol A's or B's writes have reached the peer


class VerifyRun:
    """A volume's online verify, on either side."""

    __slots__ = (
        "asking", "cursor", "end", "ending", "left", "look_at", "n_differing", "out", "run_end", "run_start",
        "started", "tokens", "tokens_at", "total",
    )  # fmt: skip

    def __init__(self, first: int, end: int, now: float) -> None:
        self.cursor = first  # bits
        self.end = end
        self.total = self.left = end - first
        self.out: dict[int, Lock] = {}  # sector -> the block held until its verdict
        self.n_differing = 0
        self.run_start = self.run_end = 0  # sectors that differ in a row, to be told once
        self.asking = self.ending = False
        self.started = False  # VerifyT: the first request has come
        self.look_at: float | None = None
        self.tokens = 0.0
        self.tokens_at = now


class Verify:
    """Online verify of all volumes, as source and as target."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

    @property
    def _digest(self) -> Digest:
        found = digest(self.e.config.net.verify_alg)
        assert found is not None, "no verify without verify-alg"
        return found

    # ------------------------------------------------------------------------------ begin and end

    def begin(self, vol: Volume, start_sector: int = 0, stop_sector: int = 0) -> None:
        """The volume became VerifyS (from *start_sector* to *stop_sector*, 0: the end) or VerifyT."""
        first = min(start_sector << 9 >> BLOCK_SHIFT, vol.n_bits)
        end = min(((stop_sector << 9) + BLOCK - 1) >> BLOCK_SHIFT, vol.n_bits) if stop_sector else vol.n_bits
        vol.verify = VerifyRun(first, max(first, end), self.e.now)
        vol.rs_total, vol.rs_failed = vol.verify.total, 0
        vol.rs_started = self.e.now
        vol.rs_paused_s, vol.rs_paused_at = 0.0, None
        vol.rs_marks.clear()
        if vol.state.conn == ConnState.VERIFY_S:
            self.e.note(vol, f"Starting Online Verify from sector {first << BLOCK_SHIFT >> 9}")
        self.progressed(vol)

    def aborted(self, vol: Volume) -> None:
        """The connection or a disk went: forget the run; what was found stays marked."""
        run, vol.verify = vol.verify, None
        if run is not None:
            for lock in run.out.values():
                self._release(vol, lock)

    def peer_finished(self, vol: Volume) -> None:
        """VerifyS says it is through; that may be before the end of the device (a stop sector)."""
        if vol.verify is not None:
            self._finish(vol, vol.verify)

    def _finish(self, vol: Volume, run: VerifyRun) -> None:
        source = vol.state.conn == ConnState.VERIFY_S
        self._tell_run(vol, run)
        took = max(self.e.now - vol.rs_started, 1e-3)
        checked = (run.total - run.left) * (BLOCK >> 10)
        self.e.note(vol, f"Online verify done (total {took:.0f} sec; {checked / took:,.0f} K/sec)")
        if run.n_differing:
            self.e.note(vol, f"Online verify found {run.n_differing} 4k blocks out of sync!", level="error")
            if vol.meta is not None:
                vol.meta.write_changed()
            self.e.run_handler("out-of-sync", vol, None)
        self.aborted(vol)
        self.e.change(vol, replace(vol.state, conn=ConnState.CONNECTED), hard=True, why="online verify finished")
        if source and vol.state.connected:
            self.e.peer.send_state(vol)  # the peer does not know of a stop sector

    # ------------------------------------------------------------------------------ source

    def progressed(self, vol: Volume) -> None:
        """Something moved: ask for more blocks, or end."""
        run = vol.verify
        if run is None or run.asking or run.ending or vol.state.conn != ConnState.VERIFY_S:
            return
        run.asking = True
        try:
            self._ask(vol, run)
        finally:
            run.asking = False
        if run.cursor >= run.end and not run.out:
            run.ending = True
            # The peer must have seen every verdict before it sees the state packet on the other socket.
            self.e.liveness.ping(lambda: self._finish(vol, run) if vol.verify is run else None)

    def _ask(self, vol: Volume, run: VerifyRun) -> None:
        allowance = self._allowance(vol, run)
        run.look_at = None
        while run.cursor < run.end and len(run.out) << BLOCK_SHIFT < WINDOW:
            if allowance <= 0:
                run.look_at = self.e.now + (1 - allowance) / self._rate(vol)
                break
            offset = run.cursor << BLOCK_SHIFT
            length = min(BLOCK, vol.size - offset)
            blocker = vol.intervals.blocker(offset, length)
            if blocker is not None:
                vol.intervals.wait(blocker, lambda: self.progressed(vol))
                break
            if not self._quiet(vol, offset):
                run.look_at = self.e.now + QUIET_S
                break
            lock = Lock(offset, length)
            vol.intervals.add(lock)
            run.out[offset >> 9] = lock
            run.cursor += 1
            run.tokens -= length
            allowance -= length
            self.e.out.data.append(
                pack_block_req(Packet.OV_REQUEST, vol.number, offset >> 9, ID_SYNCER, length)
            )

    def _quiet(self, vol: Volume, offset: int) -> bool:
        """Is every write around *offset* that was answered to an application on the peer's disk as well?

        Under protocol C an answer says so. Otherwise the activity log knows: it holds the extent until the
        peer's barrier ack.
        """
        return self.e.config.net.protocol == "C" or not vol.al.refs.get(offset >> AL_EXTENT_SHIFT)

    @staticmethod
    def _rate(vol: Volume) -> int:
        options = vol.config.disk_options
        return 1024 * (options.c_max_rate if options.c_plan_ahead else options.resync_rate)

    def _allowance(self, vol: Volume, run: VerifyRun) -> float:
        """Bytes the configured maximum rate allows now; infinite without one."""
        rate = self._rate(vol)
        if not rate:
            return float("inf")
        run.tokens = min(run.tokens + (self.e.now - run.tokens_at) * rate, max(rate * 0.2, IO_MAX))
        run.tokens_at = self.e.now
        return run.tokens

    def replied(self, vol: Volume, sector: int, _: int, size: int, theirs: bytes) -> None:
        """P_OV_REPLY: compare with our own block."""
        run = vol.verify
        lock = run.out.get(sector) if run else None
        if run is None or lock is None or not vol.local:  # our disk went; the peer wants its verdict all the same
            self.e.send_ack(Packet.OV_RESULT, vol, sector, ID_IN_SYNC, size)
            return
        if lock.length != size or len(theirs) != self._digest.size:
            raise PeerProtocolError(
                f"P_OV_REPLY for {size} bytes with a digest of {len(theirs)} bytes; asked for {lock.length} bytes"
            )
        link = self.e.link.ticket
        self._read(vol, lock, lambda op: self._judge(link, vol, run, lock, theirs, op))

    def _judge(self, link: int, vol: Volume, run: VerifyRun, lock: Lock, theirs: bytes, op: DiskOp) -> None:
        if link != self.e.link.ticket or not vol.state.connected:
            return
        if vol.verify is not run or run.out.get(lock.offset >> 9) is not lock:
            # Given up; or judged already: an earlier run's late reply came as well, on the same connection.
            self.e.send_ack(Packet.OV_RESULT, vol, lock.offset >> 9, ID_IN_SYNC, lock.length)
            return
        equal = not op.error and op.payload is not None and self._digest(op.payload) == theirs
        if not equal:
            self._differs(vol, run, lock)
        verdict = ID_IN_SYNC if equal else ID_OUT_OF_SYNC
        self.e.send_ack(Packet.OV_RESULT, vol, lock.offset >> 9, verdict, lock.length)
        self._judged(vol, run, lock)
        self.progressed(vol)

    def refused(self, vol: Volume, sector: int) -> None:
        """P_NEG_RS_DREPLY: the peer has no good disk; the block is left out."""
        run = vol.verify
        if run is not None and sector in run.out:
            self._judged(vol, run, run.out[sector])
            self.progressed(vol)

    # ------------------------------------------------------------------------------ target

    def requested(self, vol: Volume, sector: int, block_id: int, size: int) -> None:
        """P_OV_REQUEST: send the digest of our block."""
        if vol.state.disk != DiskState.UP_TO_DATE or not self.e.config.net.verify_alg:
            self.e.send_ack(Packet.NEG_RS_DREPLY, vol, sector, block_id, size)
            return
        link, offset = self.e.link.ticket, sector << 9
        run = vol.verify if vol.state.conn == ConnState.VERIFY_T else None
        if run is not None and not run.started:  # as it comes in: the answer to it may be overtaken by others
            run.started = True
            run.cursor = offset >> BLOCK_SHIFT  # it tells where the peer began
            run.total = run.left = vol.rs_total = run.end - run.cursor
        blocker = vol.intervals.blocker(offset, size)
        if blocker is not None or not self._quiet(vol, offset):
            def again(_: object = None) -> None:
                if link == self.e.link.ticket and vol.state.connected:
                    self.requested(vol, sector, block_id, size)

            if blocker is not None:
                vol.intervals.wait(blocker, again)
            else:
                self.e.after(QUIET_S, again)
            return
        lock = Lock(offset, size)
        if run is not None:
            vol.intervals.add(lock)
            run.out[sector] = lock
        self._read(vol, lock, lambda op: self._answer(link, vol, lock, op))

    def _answer(self, link: int, vol: Volume, lock: Lock, op: DiskOp) -> None:
        if link != self.e.link.ticket or not vol.state.connected:
            return
        algorithm = self._digest
        sum_ = bytes(algorithm.size) if op.error or op.payload is None else algorithm(op.payload)
        self.e.out.data.append(
            pack_block_req(Packet.OV_REPLY, vol.number, lock.offset >> 9, ID_SYNCER, lock.length, sum_)
        )

    def result(self, vol: Volume, sector: int, size: int, block_id: int) -> None:
        """P_OV_RESULT: the verdict of VerifyS."""
        run = vol.verify
        lock = run.out.get(sector) if run else None
        if run is None or lock is None:
            if block_id == ID_OUT_OF_SYNC:
                vol.set_out_of_sync(sector << 9, size)
            return
        if block_id == ID_OUT_OF_SYNC:
            self._differs(vol, run, lock)
        self._judged(vol, run, lock)
        if run.left <= 0:
            self._finish(vol, run)

    # ------------------------------------------------------------------------------ both

    def _read(self, vol: Volume, lock: Lock, then: Callable[[DiskOp], None]) -> None:
        vol.n_local += 1

        def done(op: DiskOp) -> None:
            vol.n_local -= 1
            if op.error:
                self.e.disks.failed(vol, op.error, write=False)
            else:
                vol.bytes_read += op.length
            then(op)
            self.e.disks.local_idle(vol)

        self.e.out.disk.append(CallbackOp(Op.READ, vol.number, lock.offset, lock.length, None, 0, DATA, done))

    def _judged(self, vol: Volume, run: VerifyRun, lock: Lock) -> None:
        del run.out[lock.offset >> 9]
        run.left -= 1
        self._release(vol, lock)

    def _release(self, vol: Volume, lock: Lock) -> None:
        for wake in vol.intervals.remove(lock):
            wake()

    def _differs(self, vol: Volume, run: VerifyRun, lock: Lock) -> None:
        vol.set_out_of_sync(lock.offset, lock.length)
        run.n_differing += 1
        first, end = lock.offset >> 9, (lock.offset + lock.length) >> 9
        if run.run_end != first:
            self._tell_run(vol, run)
            run.run_start = first
        run.run_end = end

    def _tell_run(self, vol: Volume, run: VerifyRun) -> None:
        if run.run_end:
            size = run.run_end - run.run_start
            self.e.note(vol, f"Out of sync: start={run.run_start}, size={size} (sectors)", level="error")
        run.run_start = run.run_end = 0

    # ------------------------------------------------------------------------------ time

    def deadline(self) -> float | None:
        """When a volume that waits for its rate or for quiet wants to be looked at."""
        times = [v.verify.look_at for v in self.e.volumes.values() if v.verify]
        return min((t for t in times if t is not None), default=None)

    def tick(self, now: float) -> None:
        for vol in self.e.volumes.values():
            if vol.verify is not None and vol.verify.look_at is not None and now >= vol.verify.look_at:
                self.progressed(vol)
