"""Writes on behalf of the peer: received, put on the local disk, acknowledged, made stable epoch by epoch.

Decides when a received write may start, which ack it gets, and when an epoch's P_BARRIER_ACK may go out.
Our barrier ack says more than the kernel's: it is sent after the flush, so the peer may forget the epoch.

A peer that sends its flushes explicitly (we recognise our own kind by the features packet) needs no flush
between epochs to keep its writes in order; its epochs are made stable in shared flushes, paced so that
they take at most about a tenth of the disk's time. For any other peer an epoch is drained and flushed
before anything behind its barrier is written, as `disk-flushes` promises.

Source: drbd_receiver.c, receive_Data, e_end_block, drbd_may_finish_epoch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from .compiled import batches
from .intervals import Range
from .local_flush import HABIT
from .requests import FUA, MAY_UNMAP, PREFLUSH, Buffer, Op, PeerEpoch, PeerWrite
from .states import ConnState, DiskState
from .units import IO_MAX, extents_touched
from .volume import Volume
from .wire import (
    DATA_PACKET,
    DP_DISCARD,
    DP_FLUSH,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_RW_SYNC,
    DP_SEND_RECEIVE_ACK,
    DP_SEND_WRITE_ACK,
    HEADER,
    MAGIC,
    Feature,
    Packet,
    pack_barrier_ack,
)

if TYPE_CHECKING:
    from .engine import Engine


LONG_MIN: Final = 256 << 10  # bytes of a write from which on splice(2) is worth its calls
# A flush that only barrier acks need: it holds up the writes beside it, and blocks written again meanwhile are spared.
QUIET_S: Final = 0.05  # without writes for so long, it waits for …
PAUSE_FACTOR: Final = 10  # … so many times as long as the last one took, …
PAUSE_MIN_S: Final = 0.02
PAUSE_MAX_S: Final = 5.0  # … and never longer than a file system keeps its journal from the disk, …
PAUSE_PART: Final = 0.25  # … nor than this part of the time after which the peer gives up on a barrier ack


class Replica:
    """The writes of the peer, all volumes together: epochs belong to the connection."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.epoch = PeerEpoch()
        self.closed: deque[PeerEpoch] = deque()
        self.n_active = 0  # writes on the disk, of this and of earlier connections
        self.stall: PeerEpoch | None = None  # nothing starts before this epoch is stable
        self.stalled: deque[tuple[Volume, PeerWrite]] = deque()
        self.draining = False  # protocols A and B: a flush waits for what was answered early
        self.al_waiting: deque[tuple[Volume, PeerWrite]] = deque()
        self.alone: set[PeerWrite] = set()  # not finished, and not on the peer's disk: it had none
        self.flush_waiting: list[PeerWrite] = []
        self.flushing: list[PeerWrite] | None = None
        self.flushing_epochs: list[PeerEpoch] = []
        self.flush_out = 0
        self.flush_began = 0.0
        self.next_flush_at = 0.0  # while the peer writes …
        self.quiet_flush_at = 0.0  # … and when it does not
        self.last_write_at = -QUIET_S
        self.held_until = 0.0  # a disk was lost: the peer hears of that before it may forget what was not flushed there
        self.flush_failed: set[int] = set()  # volumes

    # ------------------------------------------------------------------------------ receiving

    def receive_run(self, vol: Volume, view: memoryview, at: int) -> int:
        """Take the run of complete P_DATA packets for *vol* that starts at *at*; returns where it ends.

        The short path: no digests, nothing stalled, and during a resync nothing in the way. Stops in
        front of whatever it does not handle; the caller's long path takes that.
        """
        busy = vol.peer_intervals.busy if vol.syncing else None
        end, count, received, seq = batches.receive_writes(
            view, at, vol.number, vol.size, self.epoch, self.e.out.disk, busy
        )
        if count:
            vol.n_untracked += count if busy is None else 0
            self._received(vol, count, received, seq)
        return end

    def _busy(self, vol: Volume) -> dict[int, Range] | None:
        """Where the short path enters blocks during a resync; None: it takes no write that has to be entered.

        Nor may one be that decides between two Primaries, or that a write of ours waits for.
        """
        if vol.syncing and not vol.dual and not self.e.conflicts.postponed:
            return vol.peer_intervals.busy
        return None

    def plain(self, vol: Volume) -> bool:
        """May `receive_run` be used for this volume now?"""
        return (
            vol.plain and self.stall is None and not self.stalled and self.e.peer_integrity is None
            and (not vol.syncing or self._busy(vol) is not None)
        )

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None:
        """See `Engine.begin_write`. Only where nothing can come between the beginning of a write and its end."""
        if len(view) < DATA_PACKET.size:
            return None
        magic, number, cmd, length, pad, sector, block_id, seq, dp = DATA_PACKET.unpack_from(view)
        length -= DATA_PACKET.size - HEADER
        vol = self.e.volumes.get(number)
        if (
            cmd != Packet.DATA or vol is None or vol.syncing or not self.plain(vol) or magic != MAGIC or pad
            or not LONG_MIN <= length <= IO_MAX or length & 511 or (sector << 9) + length > vol.size
            or dp & ~DP_RW_SYNC != DP_SEND_WRITE_ACK or not takes(number)
        ):  # fmt: skip
            return None
        w = PeerWrite(Op.WRITE, number, sector, length, None, 0, block_id, dp, self.epoch)
        self._received(vol, 1, length, seq)
        vol.n_untracked += 1
        return w

    def _received(self, vol: Volume, n: int, length: int, seq: int) -> None:
        """*n* writes with *length* bytes together, the last of them *seq*, go to the disk."""
        self.last_write_at = self.e.now
        self.epoch.size += n
        self.epoch.active += n
        self.n_active += n
        vol.n_local += n
        vol.n_unacked += n
        vol.bytes_received += length
        vol.saw(seq)

    def write(
        self, vol: Volume, cmd: int, sector: int, block_id: int, dp: int, length: int, payload: Buffer | None,
        seq: int,
    ) -> None:  # fmt: skip
        """One P_DATA, P_TRIM or P_ZEROES, the long way."""
        self.last_write_at = self.e.now
        epoch = self.epoch
        epoch.size += 1
        epoch.active += 1
        flags = FUA if dp & DP_FUA else 0
        if cmd == Packet.DATA:
            op = Op.WRITE
            if dp & DP_FLUSH and length:
                flags |= PREFLUSH
        elif cmd == Packet.TRIM and self.e.link.features & Feature.WZEROES:
            op = Op.TRIM
        else:
            op = Op.ZEROES
            if dp & DP_DISCARD:
                flags |= MAY_UNMAP
        w = PeerWrite(op, vol.number, sector, length, payload, flags, block_id, dp, epoch)
        w.seq = seq
        vol.n_unacked += 1
        vol.bytes_received += length if payload is not None else 0
        if dp & DP_SEND_RECEIVE_ACK:
            self.e.send_ack(Packet.RECV_ACK, vol, sector, block_id, length)
        if vol.local and length and vol.state.pdsk < DiskState.INCONSISTENT:
            # Its disk may come back before this one is written: then the bitmap knows of it already.
            self.alone.add(w)
            vol.set_out_of_sync(w.offset, w.length)
        if not vol.local:
            vol.saw(seq)
            self._answer(vol, w, Packet.NEG_ACK)
            self.epochs_check()
        elif self.stall is not None or self.draining or self.stalled or not self.e.conflicts.in_order(vol, seq):
            self.stalled.append((vol, w))
        else:
            self._start(vol, w)

    def _start(self, vol: Volume, w: PeerWrite) -> None:
        if w.epoch.dead:
            return
        if w.length == 0:
            self.flush_waiting.append(w)
            self.e.flushes.local.asked(vol)
            self.draining = self.e.config.net.protocol != "C"
            self._flush()
            return
        if vol.state.conn == ConnState.CONNECTED and self.e.config.net.protocol == "C" and not vol.dual:
            vol.n_untracked += 1  # the peer sends no overlapping write before it has our ack
            self.begin(vol, w)
        else:
            w.tracked = True
            vol.peer_intervals.enter(w, lambda: self.begin(vol, w))

    def begin(self, vol: Volume, w: PeerWrite) -> None:
        """No overlapping write is in front of this one any more: to the disk, if it still takes it."""
        if w.epoch.dead or not vol.local:
            self.withdraw(vol, w)
            return
        ours = self.e.conflicts.settle(vol, w) if vol.dual else []
        if ours is None:
            return
        if vol.state.pdsk < DiskState.INCONSISTENT or w in self.alone:
            # We hold the only disk: the range is out of sync, and hot like an application's write of our own.
            w.dp &= ~DP_MAY_SET_IN_SYNC
            self.alone.add(w)
            vol.set_out_of_sync(w.offset, w.length)
            if vol.unmarked:
                self.al_waiting.append((vol, w))
                return
            if not vol.al_suspended and not w.al_ref and not self._take_extents(vol, w):
                self.al_waiting.append((vol, w))
                self.e.mirror.kick_activity_log(vol)
                return
        self.n_active += 1
        vol.n_local += 1
        if ours:
            self.e.conflicts.write_beneath(vol, w, ours)
        else:
            self.e.out.disk.append(w)

    def withdraw(self, vol: Volume, w: PeerWrite) -> None:
        """A write that never reached the disk."""
        self.alone.discard(w)
        self._answer(vol, w, Packet.NEG_ACK)
        if w.tracked:
            vol.peer_intervals.leave(w)
        else:
            vol.n_untracked -= 1
        self.epochs_check()
        if self.flush_waiting:
            self._flush()
        self.e.conflicts.peer_progressed(vol)

    def _take_extents(self, vol: Volume, w: PeerWrite) -> bool:
        cold = [extent for extent in extents_touched(w.offset, w.length) if extent not in vol.al.refs]
        for extent in cold:
            vol.al.want(extent)
        if cold:
            return False
        for extent in extents_touched(w.offset, w.length):
            vol.al.get(extent)
        w.al_ref = True
        return True

    def extents_ready(self, vol: Volume) -> None:
        """An activity-log transaction of *vol* ended: try again what waited for it."""
        waiting, self.al_waiting = self.al_waiting, deque()
        for volume, w in waiting:
            self.begin(volume, w)

    def barrier(self, barrier: int) -> None:
        """P_BARRIER: the epoch is complete."""
        epoch, self.epoch = self.epoch, PeerEpoch()
        if not epoch.size:
            return  # an empty epoch is never announced; there is nothing to acknowledge
        epoch.barrier = barrier
        self.closed.append(epoch)
        if self._strict and self.stall is None:
            self.stall = epoch
        self.epochs_check()

    @property
    def _flushes(self) -> bool:
        return any(v.config.disk_options.disk_flushes for v in self.e.volumes.values() if v.local)

    @property
    def _strict(self) -> bool:
        """Must an epoch be stable before the next one is written?"""
        return not self.e.link.peer_sends_flushes and self._flushes

    # ------------------------------------------------------------------------------ completions

    def local_done(self, ops: list[PeerWrite]) -> None:
        """The disk answered these writes of the peer: ack them, all in one buffer."""
        self.n_active -= len(ops)
        if self.alone:
            self.alone.difference_update(ops)
        to_ack: list[PeerWrite] = []
        at, n = 0, len(ops)
        while at < n:
            vol = self.e.volumes[ops[at].volume]
            busy = self._busy(vol) if vol.syncing else None
            n_before = len(to_ack)
            end, written, n_in_sync = batches.written_for_peer(ops, at, vol.number, to_ack, busy)
            count = end - at
            vol.n_local -= count
            vol.n_untracked -= count - n_in_sync
            vol.bytes_written += written
            vol.data_version += count
            if vol.flush_habit == HABIT and count:
                self.e.flushes.local.written(vol)
            if n_in_sync:
                vol.are_in_sync(w for w in to_ack[n_before:] if w.tracked)
            if not count:
                self._ack_run(to_ack)  # what follows may end a resync, which says that all acks are under way
                to_ack = []
                vol.n_local -= 1
                self._done_slow(vol, ops[at])
                end += 1
            at = end
        if to_ack:
            self._ack_run(to_ack)
        if self.closed:
            self.epochs_check()
        if self.flush_waiting:
            self._flush()
        self.e.replica_progressed()

    def _ack_run(self, writes: list[PeerWrite]) -> None:
        """P_WRITE_ACK, or P_RS_WRITE_ACK, for each write, in as few buffers as there are volumes."""
        at, n = 0, len(writes)
        while at < n:
            vol = self.e.volumes[writes[at].volume]
            end, packets = batches.pack_write_acks(writes, at, vol.number, vol.seq)
            vol.seq = vol.seq + end - at & 0xFFFFFFFF
            vol.n_unacked -= end - at
            self.e.out.meta.append(packets)
            at = end

    def _done_slow(self, vol: Volume, w: PeerWrite) -> None:
        if not w.tracked:
            vol.n_untracked -= 1
        if w.error:
            vol.set_out_of_sync(w.offset, w.length)
        else:
            vol.bytes_written += w.length
            vol.data_version += 1
        cmd = 0
        if w.error:
            cmd = Packet.NEG_ACK
        elif w.dp & DP_MAY_SET_IN_SYNC and vol.syncing:
            vol.set_in_sync(w.offset, w.length)
            cmd = Packet.RS_WRITE_ACK
        elif w.dp & DP_SEND_WRITE_ACK:
            cmd = Packet.WRITE_ACK
        self._answer(vol, w, cmd)
        if w.al_ref:
            for extent in extents_touched(w.offset, w.length):
                vol.al.put(extent)
        if w.error:
            self.e.disks.failed(vol, w.error, write=True, flush=bool(w.flags & (FUA | PREFLUSH)))
        elif cmd == Packet.RS_WRITE_ACK:
            self.e.resync.progressed(vol)
        if w.tracked:
            vol.peer_intervals.leave(w)

    def _answer(self, vol: Volume, w: PeerWrite, cmd: int) -> None:
        w.payload = None
        if w.epoch.dead:
            return
        vol.n_unacked -= 1
        w.epoch.active -= 1
        if cmd:
            self.e.send_ack(cmd, vol, w.sector, w.block_id, w.length)
        if self.e.conflicts.postponed:
            self.e.conflicts.restart(vol, w)

    # ------------------------------------------------------------------------------ epochs and flushes

    def epochs_check(self) -> None:
        """Acknowledge, or begin to make stable, the complete epochs at the head."""
        if not self.closed or self.closed[0].active or self.flushing is not None:
            return
        if self._pauses and not self.flush_waiting:
            return  # `tick` comes back here; looking through all epochs each time would cost more than acks
        if self._flushes:
            self._flush()
        elif self.e.now >= self.held_until:
            while self.closed and not self.closed[0].active:
                self._ack_epoch(self.closed.popleft())

    @property
    def _pauses(self) -> bool:
        """Is it too early for a flush that only barrier acks need? Not when it has nothing to do."""
        return (
            self.stall is None and self.e.now < self._flush_due()
            and any(
                v.stable_version != v.data_version and v.config.disk_options.disk_flushes
                for v in self.e.volumes.values()
            )
        )  # fmt: skip

    def _flush_due(self) -> float:
        due = min(self.next_flush_at, max(self.quiet_flush_at, self.last_write_at + QUIET_S))
        return max(due, self.held_until)

    def _ripe(self) -> list[PeerEpoch]:
        ripe = []
        for epoch in self.closed:
            if epoch.active:
                break
            ripe.append(epoch)
        return ripe

    def _behind(self) -> bool:
        """Do writes that came before the flush wait for each other still, or for the activity log?"""
        n_open = self.epoch.active + sum(epoch.active for epoch in self.closed)
        return n_open > len(self.flush_waiting) + len(self.stalled)

    def _flush(self) -> None:
        """Begin a shared flush if one is due and none is running."""
        if self.flushing is not None:
            return
        ripe = self._ripe() if self._flushes and self.e.now >= self.held_until else []
        due = ripe and not self._pauses
        if not self.flush_waiting and not due:
            return
        if self.flush_waiting and self.draining and (self.n_active or self._behind()):
            return  # answered early (A, B): what came before the flush must be written first
        self.flushing, self.flush_waiting = self.flush_waiting, []
        self.flushing_epochs = ripe
        self.flush_began = self.e.now
        self.flush_failed = set()
        targets = [v for v in self.e.volumes.values() if v.local]
        self.flush_out = len(targets)
        for vol in targets:
            self.e.flushes.local.flush(vol, partial(self._flushed, vol))
        if not targets:
            self._flush_done()

    def _flushed(self, vol: Volume, error: int) -> None:
        self.flush_out -= 1
        if error:
            self.flush_failed.add(vol.number)
        if not self.flush_out:
            self._flush_done()
        self.e.replica_progressed()

    def _flush_done(self) -> None:
        requests, self.flushing = self.flushing or [], None
        epochs, self.flushing_epochs = self.flushing_epochs, []
        self._pause(self.e.now - self.flush_began)
        for w in requests:
            vol = self.e.volumes[w.volume]
            failed = vol.number in self.flush_failed or not vol.local
            self._answer(vol, w, Packet.NEG_ACK if failed else Packet.WRITE_ACK)
        if self.flush_failed:
            # What was not made stable must stay in the peer's transfer log; it learns of our disk by P_STATE.
            if any(not epoch.dead for epoch in epochs):
                self.e.drop(ConnState.NETWORK_FAILURE, "a flush for the peer failed; it must not forget its writes")
                return
            epochs = []
        for epoch in epochs:
            if not epoch.dead:
                assert self.closed[0] is epoch
                self._ack_epoch(self.closed.popleft())
        if self.draining and not self.flush_waiting:
            self.draining = False
            if self.stall is None:
                self._unstall()
        if self.flush_waiting:
            self._flush()
        self.epochs_check()

    @property
    def _pause_max(self) -> float:
        net = self.e.config.net
        return min(PAUSE_MAX_S, net.ko_count * net.timeout / 10 * PAUSE_PART if net.ko_count else PAUSE_MAX_S)

    def _pause(self, took: float) -> None:
        self.next_flush_at = self.e.now + self._pause_max
        self.quiet_flush_at = self.e.now + min(max(took * PAUSE_FACTOR, PAUSE_MIN_S), self._pause_max)

    def disk_lost(self) -> None:
        """A disk is gone, and what was not flushed there may be.

        Barrier acks have a socket of their own, and would overtake the P_STATE that has the peer mark what is in its
        log. A kernel is not kept waiting: its epochs were flushed one by one.
        """
        if self.e.link.peer_sends_flushes:
            self.held_until = self.e.now + self._pause_max

    def _ack_epoch(self, epoch: PeerEpoch) -> None:
        assert epoch.barrier is not None
        self.e.out.meta.append(pack_barrier_ack(epoch.barrier, epoch.size))
        if epoch is self.stall:
            self.stall = None
            self._unstall()

    def go_on(self) -> None:
        """What the write at the head waited for may have happened."""
        if not self.draining:
            self._unstall()

    def _unstall(self) -> None:
        """Start what came behind the barrier, up to the next one that has to be stable first."""
        while self.stalled:
            vol, w = self.stalled[0]
            if self.closed and self.closed[0] is not w.epoch and self._strict:
                break
            if not self.e.conflicts.in_order(vol, w.seq):
                break
            self.stalled.popleft()
            self._start(vol, w)
        if self.closed and self._strict:
            self.stall = self.closed[0]
            self.epochs_check()

    # ------------------------------------------------------------------------------ ends

    def connection_lost(self) -> None:
        """The peer is gone: finish its writes on the disk, answer nothing."""
        for epoch in (*self.closed, self.epoch):
            epoch.dead = True
        self.closed.clear()
        self.epoch = PeerEpoch()
        self.stall = None
        self.held_until = 0.0
        self.draining = False
        self.stalled.clear()
        self.alone.clear()
        self.flush_waiting = []
        for vol in self.e.volumes.values():
            vol.n_unacked = 0
            vol.peer_intervals.forget_waiting()
        waiting, self.al_waiting = self.al_waiting, deque()
        for vol, w in waiting:
            self.withdraw(vol, w)
        self.e.conflicts.peer_gone()

    def deadline(self) -> float | None:
        """When the paced flush of complete epochs is due."""
        if self.flushing is None and self.closed and not self.closed[0].active:
            return self._flush_due()
        return None

    def tick(self) -> None:
        if self.flushing is None and self.closed:
            self.epochs_check()
