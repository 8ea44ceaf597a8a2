"""Online verify: both disks are compared block by block while they are in use.

VerifyS asks for the peer's digest of each block, compares it with its own and tells the result; VerifyT
answers. A block that differs becomes out of sync on both nodes; nothing is copied before the next resync.

Each node holds the block against its own applications, VerifyS from the request to its verdict, VerifyT
from the request to the verdict's arrival, so that no write is on one disk only when it is read. Requests
are one bitmap block each: a kernel in VerifyT counts results, not bytes, to know when it is through. But
neighbouring blocks are asked for, read, compared and answered together, a *stretch* of them at a time
(`block_runs`), and while applications are at work the verify rests after each slice, on either node (`pace`).
Source: drbd_worker.c (make_ov_request, w_e_end_ov_req, w_e_end_ov_reply, drbd_resync_finished) and
drbd_receiver.c (receive_DataRequest, got_OVResult).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .block_runs import RUN_BLOCKS, BlockRun, block_run, pack_blocks
from .digests import Digest, digest
from .errors import PeerProtocolError
from .intervals import Lock, Range
from .meta_writer import CallbackOp
from .pace import Pace
from .requests import DATA, DiskOp, Op
from .states import ConnState, DiskState
from .units import AL_EXTENT_SHIFT, BLOCK, BLOCK_SHIFT, IO_MAX, SECTORS_PER_BLOCK
from .volume import Volume
from .wire import HEADER, ID_IN_SYNC, ID_OUT_OF_SYNC, ID_SYNCER, Packet, pack_block_req

if TYPE_CHECKING:
    from .engine import Engine

WINDOW: Final = 4 << 20  # bytes asked for and not yet judged; as much as a kernel asks for at once
QUIET_S: Final = 0.05  # how soon to look again whether protocol A's or B's writes have reached the peer


class Stretch(Lock):
    """Neighbouring blocks, each *step* bytes and the last one perhaps less, held until all have their verdict."""

    __slots__ = ("n_left", "step")

    def __init__(self, offset: int, length: int, step: int = BLOCK) -> None:
        super().__init__(offset, length)
        self.step = step
        self.n_left = len(self.sectors)

    @property
    def sectors(self) -> range:
        """Where its blocks begin."""
        return range(self.offset >> 9, (self.offset + self.length) >> 9, self.step >> 9)

    def length_at(self, sector: int) -> int:
        """How many bytes the block at *sector* has."""
        return min(self.step, self.offset + self.length - (sector << 9))


class VerifyRun:
    """A volume's online verify, on either side."""

    __slots__ = (
        "asking", "cursor", "end", "ending", "left", "look_at", "n_differing", "out", "pace", "run_end", "run_start",
        "started", "tokens", "tokens_at", "total", "waiting",
    )  # fmt: skip

    def __init__(self, first: int, end: int, now: float) -> None:
        self.cursor = first  # bits
        self.end = end
        self.total = self.left = end - first
        self.out: dict[int, Stretch] = {}  # sector of a block without verdict -> what holds it
        self.pace = Pace()
        self.waiting: deque[Stretch] = deque()  # VerifyT: asked for, and waiting for its turn
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
            for stretch in dict.fromkeys(run.out.values()):
                self._release(vol, stretch)
            for stretch in run.waiting:  # the peer counts on an answer to each
                self._serve(vol, stretch, self.e.link.ticket)

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
        allowance, now, c_min_rate = self._allowance(vol, run), self.e.now, vol.config.disk_options.c_min_rate
        run.look_at = None
        while run.cursor < run.end and len(run.out) << BLOCK_SHIFT < WINDOW:
            if allowance <= 0:
                run.look_at = now + (1 - allowance) / self._rate(vol)
                break
            if run.pace.room(now, vol.at_work(now), c_min_rate) <= 0:
                break
            offset = run.cursor << BLOCK_SHIFT
            end = min((run.cursor // RUN_BLOCKS + 1) * RUN_BLOCKS, run.end)
            length, blocker = self._free(vol, offset, min(end << BLOCK_SHIFT, vol.size) - offset)
            if blocker is not None:
                vol.intervals.wait(blocker, lambda: self.progressed(vol))
                break
            if not self._quiet(vol, offset):
                run.look_at = now + QUIET_S
                break
            self._hold(vol, run, Stretch(offset, length))
            run.cursor += (length + BLOCK - 1) >> BLOCK_SHIFT
            run.tokens -= length
            allowance -= length
            self.e.out.data.append(pack_blocks(Packet.OV_REQUEST, vol.number, offset, length, ID_SYNCER))

    @staticmethod
    def _free(vol: Volume, offset: int, length: int, step: int = BLOCK) -> tuple[int, Range | None]:
        """How many bytes from *offset* on, in steps, are free of our applications; and, if none are, who is there.

        To take what there is keeps a verify going through a region where something is always being written.
        """
        blocker = vol.intervals.blocker(offset, length)
        if blocker is None or length <= step:
            return 0 if blocker else length, blocker
        first = None
        while blocker is not None:
            first, length = blocker, max(blocker.offset - offset, 0) >> BLOCK_SHIFT << BLOCK_SHIFT
            blocker = vol.intervals.blocker(offset, length) if length else None
        return length, None if length else first

    def _hold(self, vol: Volume, run: VerifyRun, stretch: Stretch) -> None:
        vol.intervals.add(stretch)
        run.out.update(dict.fromkeys(stretch.sectors, stretch))
        run.pace.begun(self.e.now, stretch.length)

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
        stretch = run.out.get(sector) if run else None
        if run is None or stretch is None or not vol.local:  # our disk went; the peer wants its verdict all the same
            self.e.send_ack(Packet.OV_RESULT, vol, sector, ID_IN_SYNC, size)
            return
        wanted = stretch.length_at(sector)
        if wanted != size or len(theirs) != self._digest.size:
            raise PeerProtocolError(
                f"P_OV_REPLY for {size} bytes with a digest of {len(theirs)} bytes; asked for {wanted} bytes"
            )
        self._compare(vol, run, sector << 9, size, theirs)

    def _compare(self, vol: Volume, run: VerifyRun, offset: int, length: int, theirs: bytes) -> None:
        """Read our own blocks; *theirs* are the peer's digests of them."""
        link, n_digest = self.e.link.ticket, self._digest.size

        def read(op: DiskOp) -> None:
            first = (op.offset - offset) >> BLOCK_SHIFT
            n = (op.length + BLOCK - 1) >> BLOCK_SHIFT
            self._judge(link, vol, run, theirs[first * n_digest : (first + n) * n_digest], op)

        self._read(vol, offset, length, BLOCK, read)

    def _judge(self, link: int, vol: Volume, run: VerifyRun, theirs: bytes, op: DiskOp) -> None:
        if link != self.e.link.ticket or not vol.state.connected:
            return
        sectors = range(op.offset >> 9, (op.offset + op.length) >> 9, SECTORS_PER_BLOCK)
        asked = run.out if vol.verify is run else {}
        # Given up; or judged already: an earlier run's late reply came as well, on the same connection.
        judged = [sector for sector in sectors if sector in asked]
        ours = b"" if op.error or op.payload is None else self._digest.of_each(op.payload, BLOCK)
        verdicts: int | list[int] = ID_IN_SYNC
        if ours != theirs:
            differing = self._differing(sectors, ours, theirs).intersection(judged)
            for sector in sorted(differing):
                self._differs(vol, run, sector << 9, asked[sector].length_at(sector))
            verdicts = [ID_OUT_OF_SYNC if sector in differing else ID_IN_SYNC for sector in sectors]
        self.e.out.meta.append(
            pack_blocks(Packet.OV_RESULT, vol.number, op.offset, op.length, verdicts, vol.seq + 1)
        )
        vol.seq = (vol.seq + len(sectors)) & 0xFFFFFFFF
        if judged:
            self._judged(vol, run, judged)
            self.progressed(vol)

    def _differing(self, sectors: range, ours: bytes, theirs: bytes) -> set[int]:
        n = self._digest.size
        return {
            sector for i, sector in enumerate(sectors) if ours[i * n : (i + 1) * n] != theirs[i * n : (i + 1) * n]
        }

    def refused(self, vol: Volume, sector: int) -> None:
        """P_NEG_RS_DREPLY: the peer has no good disk; the block is left out."""
        run = vol.verify
        if run is not None and sector in run.out:
            self._judged(vol, run, (sector,))
            self.progressed(vol)

    # ------------------------------------------------------------------------------ target

    def requested(self, vol: Volume, stretch: Stretch) -> None:
        """P_OV_REQUEST, or a run of them: send the digests of our blocks, when it is their turn."""
        run = vol.verify if vol.state.conn == ConnState.VERIFY_T else None
        if run is None:
            self._serve(vol, stretch, self.e.link.ticket)
            return
        if not run.started:  # as it comes in: the answer to it may be overtaken by others
            run.started = True
            run.cursor = stretch.offset >> BLOCK_SHIFT  # it tells where the peer began
            run.total = run.left = vol.rs_total = run.end - run.cursor
        run.waiting.append(stretch)
        self._go_on(vol, run)

    def _go_on(self, vol: Volume, run: VerifyRun) -> None:
        """Serve what has waited for its turn, as far as our applications leave room for it."""
        now, c_min_rate = self.e.now, vol.config.disk_options.c_min_rate
        while run.waiting and run.pace.room(now, vol.at_work(now), c_min_rate) > 0:
            self._serve(vol, run.waiting.popleft(), self.e.link.ticket)

    def _serve(self, vol: Volume, stretch: Stretch, link: int) -> None:
        """Hold, read and answer *stretch*; a block that is being written waits alone, the others do not."""
        if link != self.e.link.ticket or not vol.state.connected:
            return
        if vol.state.disk != DiskState.UP_TO_DATE or not self.e.config.net.verify_alg:
            for sector in stretch.sectors:
                self.e.send_ack(Packet.NEG_RS_DREPLY, vol, sector, ID_SYNCER, stretch.length_at(sector))
            return
        run = vol.verify if vol.state.conn == ConnState.VERIFY_T else None
        at, end, step = stretch.offset, stretch.offset + stretch.length, stretch.step
        if not self._quiet(vol, at):
            self.e.after(QUIET_S, lambda _: self._serve(vol, stretch, link))
            return
        while at < end:
            length, blocker = self._free(vol, at, end - at, step)
            part = Stretch(at, length or min(step, end - at), step)
            at += part.length
            if blocker is not None:
                vol.intervals.wait(blocker, lambda part=part: self._serve(vol, part, link))  # type: ignore[misc]
                continue
            if run is not None:
                self._hold(vol, run, part)
            self._read(vol, part.offset, part.length, step, lambda op: self._answer(link, vol, step, op))

    def _answer(self, link: int, vol: Volume, step: int, op: DiskOp) -> None:
        if link != self.e.link.ticket or not vol.state.connected:
            return
        n = (op.length + step - 1) // step
        unreadable = bytes(self._digest.size * n)
        sums = unreadable if op.error or op.payload is None else self._digest.of_each(op.payload, step)
        sector = op.offset >> 9
        self.e.out.data.append(
            pack_blocks(Packet.OV_REPLY, vol.number, op.offset, op.length, ID_SYNCER, digests=sums) if n > 1
            else pack_block_req(Packet.OV_REPLY, vol.number, sector, ID_SYNCER, op.length, sums)
        )  # fmt: skip

    def result(self, vol: Volume, sector: int, size: int, block_id: int) -> None:
        """P_OV_RESULT: the verdict of VerifyS."""
        run = vol.verify
        if run is None or sector not in run.out:
            if block_id == ID_OUT_OF_SYNC:
                vol.set_out_of_sync(sector << 9, size)
            return
        if block_id == ID_OUT_OF_SYNC:
            self._differs(vol, run, sector << 9, run.out[sector].length_at(sector))
        self._results(vol, run, (sector,))

    def _results(self, vol: Volume, run: VerifyRun, sectors: Iterable[int]) -> None:
        self._judged(vol, run, sectors)
        if run.left <= 0:
            self._finish(vol, run)
        else:
            self._go_on(vol, run)

    # ------------------------------------------------------------------------------ runs of packets

    def receive_run(self, vol: Volume, cmd: int, view: memoryview, at: int) -> int:
        """Take the run of P_OV_REQUEST or P_OV_REPLY that begins at *at*; returns where it ends.

        Stops in front of whatever it does not handle; the long path takes that.
        """
        run = vol.verify
        if run is None:
            return at
        asking = cmd == Packet.OV_REQUEST
        n_digest = 0 if asking else self._digest.size
        found = block_run(view, at, cmd, vol.number, ID_SYNCER, n_digest)
        if found is None or (found.sector << 9) + (found.n << BLOCK_SHIFT) > vol.size:
            return at
        offset, length = found.sector << 9, found.n << BLOCK_SHIFT
        if asking:
            self.requested(vol, Stretch(offset, length))
        elif vol.local and all(map(run.out.__contains__, _sectors(found))):
            self._compare(vol, run, offset, length, found.digests)
        else:
            return at
        return at + found.n * (HEADER + 24 + n_digest)

    def receive_results(self, vol: Volume, view: memoryview, at: int) -> int:
        """Take the run of P_OV_RESULT for equal blocks that begins at *at*; as `receive_run`."""
        run = vol.verify
        found = block_run(view, at, Packet.OV_RESULT, vol.number, ID_IN_SYNC)
        if run is None or found is None or not all(map(run.out.__contains__, _sectors(found))):
            return at
        vol.saw(found.seq)
        self._results(vol, run, _sectors(found))
        return at + found.n * (HEADER + 24)

    # ------------------------------------------------------------------------------ both

    def _read(
        self, vol: Volume, offset: int, length: int, step: int, then: Callable[[DiskOp], None]
    ) -> None:
        """Read for *then*. What fails together is read again *step* by *step*: one bad block speaks for itself only."""
        vol.n_local += 1

        def done(op: DiskOp) -> None:
            vol.n_local -= 1
            if op.error and length > step and vol.local:
                for at in range(offset, offset + length, step):
                    self._read(vol, at, min(step, offset + length - at), step, then)
                return
            if op.error:
                self.e.disks.failed(vol, op.error, write=False)
            else:
                vol.bytes_read += op.length
            then(op)
            self.e.disks.local_idle(vol)

        self.e.out.disk.append(CallbackOp(Op.READ, vol.number, offset, length, None, 0, DATA, done))

    def _judged(self, vol: Volume, run: VerifyRun, sectors: Iterable[int]) -> None:
        """These blocks, all of them out, have their verdict."""
        for sector in sectors:
            stretch = run.out.pop(sector)
            run.left -= 1
            stretch.n_left -= 1
            if not stretch.n_left:
                run.pace.settled(self.e.now, stretch.length, vol.config.disk_options.c_min_rate)
                self._release(vol, stretch)

    def _release(self, vol: Volume, stretch: Stretch) -> None:
        for wake in vol.intervals.remove(stretch):
            wake()

    def _differs(self, vol: Volume, run: VerifyRun, offset: int, length: int) -> None:
        vol.set_out_of_sync(offset, length)
        run.n_differing += 1
        first, end = offset >> 9, (offset + length) >> 9
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
        """When a volume that rests, or waits for its rate or for quiet, wants to be looked at."""
        times = [time for v in self.e.volumes.values() if v.verify for time in self._times(v.verify)]
        return min(times, default=None)

    @staticmethod
    def _times(run: VerifyRun) -> list[float]:
        times = [] if run.look_at is None else [run.look_at]
        return [*times, run.pace.next_at] if run.pace.resting else times

    def tick(self, now: float) -> None:
        for vol in self.e.volumes.values():
            run = vol.verify
            if run is not None and any(now >= time for time in self._times(run)):
                run.pace.resting = False  # unless it is found to be so again
                self._go_on(vol, run)
                self.progressed(vol)


def _sectors(run: BlockRun) -> range:
    return range(run.sector, run.sector + run.n * SECTORS_PER_BLOCK, SECTORS_PER_BLOCK)
