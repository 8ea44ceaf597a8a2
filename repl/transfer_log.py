"""The transfer log: what the peer was sent and has not yet confirmed as stable.

Every mirrored write stays in its epoch, the writes between two P_BARRIER packets, until the peer has
acknowledged the epoch's barrier. When the peer is lost before that, the range becomes out of sync, also when
the application was answered long ago; when I/O is frozen meanwhile, the log is kept and sent again.

Decides when an epoch ends, when a request leaves the log, and what a lost connection leaves behind.
Source of the rules: drbd_req.c, drbd_main.c (tl_release, tl_clear, tl_restart); protocol 100+.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TYPE_CHECKING, Final

from .compiled import batches
from .epoch import SETTLE_EVERY, Epoch, PeerFlush
from .requests import AL_REF, IN_LOG, IN_SYNC, LOCAL, PEER, PEER_OK, Request
from .units import SECTOR
from .volume import Volume
from .wire import DP_FLUSH, DP_SEND_WRITE_ACK, Packet, pack_barrier, pack_block_req, pack_data

if TYPE_CHECKING:
    from .engine import Engine

LOG_MAX: Final = 2_000_000  # writes in the transfer log before front ends stop reading: 16 MB of blocks …
RECORDS_MAX: Final = 150_000  # … and of those that are kept one by one, which take 40 MB …
EPOCHS_MAX: Final = 20_000  # … and epochs, which take 20 MB; of more than a hundred writes each they never come to that
SETTLED_BEFORE: Final = 2  # epochs ago nearly all writes have been answered by now; each is looked at once more
BARRIER_DELAY_S: Final = 0.02  # an idle sender closes its epoch after this; under load the next write does


class TransferLog:
    """The log of one resource; epochs span all its volumes."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.inflight: dict[int, Request | PeerFlush] = {}
        self.fences: dict[int, PeerFlush] = {}  # flushes that a read behind a barrier stands for
        self.epochs: deque[Epoch] = deque()
        self.n_requests = 0
        self.n_settled = 0  # of them, those of which only the blocks are left
        self.barrier_nr = 0
        self.barrier_at: float | None = None
        self.next_id = 1
        self.asked_for_flush = False
        self.hurries = False  # what the peer was writing when it was asked to flush takes one more
        self.kept = False  # the log is from a connection that is gone, and waits for the next one
        self._waiters: list[tuple[Epoch, Callable[[None], None]]] = []  # each until this epoch is out of the log

    def epoch_for_write(self) -> Epoch:
        """The open epoch; ends the previous one with its P_BARRIER when it was closed."""
        if self.epochs:
            epoch = self.epochs[-1]
            if not epoch.closed and epoch.n_sent < self.e.config.net.max_epoch_size:
                return epoch
            epoch.closed = True
            self.send_barrier(epoch)
            if len(self.epochs) >= SETTLED_BEFORE:
                self.settle(self.epochs[-SETTLED_BEFORE])
        epoch = Epoch(self.barrier_nr, self.e.now)
        self.barrier_nr = (self.barrier_nr + 1) & 0xFFFFFFFF
        self.epochs.append(epoch)
        return epoch

    def settle(self, epoch: Epoch) -> None:
        """Let go of the requests of *epoch* that both nodes have answered, unless some of their answers may be held."""
        if not any(vol.gated for vol in self.e.volumes.values()):
            self.n_settled += epoch.settle(self.e.volumes, self.inflight)
        epoch.settle_at = len(epoch.requests) + SETTLE_EVERY

    def send_barrier(self, epoch: Epoch) -> None:
        if not epoch.barrier_sent and epoch.n_sent:
            epoch.barrier_sent = True
            self.e.out.data.append(pack_barrier(epoch.barrier))
        self.barrier_at = None

    def close_epoch(self) -> None:
        """End the open epoch now, if it has writes (a flush, a state change, an idle sender)."""
        if self.epochs and self.epochs[-1].n_sent:
            self.epochs[-1].closed = True
            self.send_barrier(self.epochs[-1])

    def close_epoch_soon(self) -> None:
        """End the open epoch, without a packet for that alone: the next write brings its P_BARRIER, or the clock.

        A peer of our own kind is sent every flush and needs no order besides, so its epochs end by the clock
        alone: a barrier for each batch, or each flush, would cost as much as that.
        """
        if not self.epochs or not self.epochs[-1].n_sent or self.epochs[-1].closed:
            return
        if not self.e.link.peer_sends_flushes:
            self.epochs[-1].closed = True
            self.barrier_at = self.e.now + BARRIER_DELAY_S
        elif self.barrier_at is None:
            self.barrier_at = self.e.now + BARRIER_DELAY_S

    def when_stable(self, then: Callable[[None], None]) -> None:
        """Call *then* once the peer has confirmed every write sent until now as stable, or is lost.

        Whatever is sent later is not waited for: other volumes may be written all the time.
        """
        self.close_epoch()
        last = next((epoch for epoch in reversed(self.epochs) if epoch.n_sent), None)
        if last is None:
            then(None)
            return
        self._waiters.append((last, then))
        self.hurry()

    def hurry(self) -> None:
        """Have the peer flush for those who wait: our own kind puts barrier acks off until it has to flush anyway."""
        self.hurries = False
        vol = next((vol for vol in self.e.volumes.values() if vol.mirror), None)
        if self._waiters and self.e.link.peer_sends_flushes and vol is not None:
            end = self.epochs.index(self._waiters[-1][0]) + 1
            self.hurries = any(r.waiting & PEER for epoch in islice(self.epochs, end) for r in epoch.requests)
            self.send_flush(vol)
            self.close_epoch()

    def _shrank(self) -> None:
        waiters, self._waiters = self._waiters, []
        for epoch, then in waiters:
            if epoch in self.epochs:
                self._waiters.append((epoch, then))
            else:
                then(None)

    def barrier_acked(self, barrier: int, set_size: int) -> str:
        """P_BARRIER_ACK; returns a sentence when it does not fit, else an empty string."""
        if not self.epochs or not self.epochs[0].barrier_sent:
            return f"barrier ack {barrier} without an open barrier"
        epoch = self.epochs[0]
        if epoch.barrier != barrier or epoch.n_sent != set_size:
            return (
                f"barrier ack {barrier} for {set_size} writes, expected {epoch.barrier} for {epoch.n_sent}"
            )
        self.epochs.popleft()
        self._count_out(epoch)
        volumes, inflight = self.e.volumes, self.inflight
        at, requests = 0, epoch.requests
        while at < len(requests):
            first = requests[at]
            if type(first) is Request:
                refs = volumes[first.volume].al.refs
                at = batches.leave_log(requests, at, first.volume, refs, inflight)
                if at == len(requests):
                    break
            r = requests[at]
            at += 1
            if type(r) is Request:
                r.legs &= ~IN_LOG
                if not r.waiting & LOCAL:
                    self.drop_extents(volumes[r.volume], r)
                if inflight:
                    inflight.pop(r.block_id, None)  # protocols A and B have no write ack
        epoch.requests = []  # they know their epoch: a circle that only the garbage collector would find
        self._cool(epoch)
        self.shortened()
        if self._waiters:
            self._shrank()
        return ""

    def shortened(self) -> None:
        """The peer has flushed what we asked it to, or more, or is lost: whoever needs another one may ask again.

        A flush that was answered covers the epochs that were complete then, which the one with the flush in it was not.
        """
        self.asked_for_flush = False
        for vol in self.e.volumes.values():
            if vol.al.n_wanted:
                self.e.mirror.kick_activity_log(vol)

    def _count_out(self, epoch: Epoch) -> None:
        """*epoch* is not in the log any more."""
        self.n_requests -= len(epoch.requests) + epoch.n_settled
        self.n_settled -= epoch.n_settled

    def _cool(self, epoch: Epoch) -> None:
        """The settled writes of *epoch* need their extents no longer."""
        for number, extents in epoch.extents.items():
            al = self.e.volumes[number].al
            for extent, n in extents.items():
                al.put(extent, n)

    def take_out(self, r: Request) -> None:
        """The peer refused this write for one of its own: it counts in no epoch, and no barrier ack is for it."""
        epoch: Epoch = r.epoch
        epoch.requests.remove(r)
        epoch.n_sent -= 1
        self.n_requests -= 1
        r.legs &= ~IN_LOG
        if not epoch.n_sent:  # nor does an epoch without writes get one
            self.epochs.remove(epoch)
            self._count_out(epoch)
            self._carry([other for other in epoch.requests if isinstance(other, Request)], [epoch])
            self._wait_on([epoch])
            self._shrank()

    def drop_extents(self, vol: Volume, r: Request) -> None:
        if r.legs & AL_REF:
            r.legs &= ~AL_REF
            first, last = r.offset >> 22, (r.offset + r.length - 1) >> 22
            n_refs = vol.al.refs[first]
            if first == last and n_refs > 1:
                vol.al.refs[first] = n_refs - 1
            else:
                for extent in range(first, last + 1):
                    vol.al.put(extent)

    def ask_for_flush(self, vol: Volume) -> None:
        """The transfer log holds up the activity log: have the peer flush, so that it can shrink."""
        if not self.asked_for_flush and self.n_requests and vol.mirror:
            self.asked_for_flush = True
            self.send_flush(vol)
            self.close_epoch()

    def send_flush(self, vol: Volume, *, answers: bool = False) -> None:
        if self.e.integrity and not self.e.link.peer_sends_flushes:
            self._send_fence(vol, answers)
            return
        epoch = self.epoch_for_write()
        flush = PeerFlush(vol, self.next_id, answers)
        self.next_id += 1
        vol.seq += 1
        self.inflight[flush.block_id] = flush
        epoch.requests.append(flush)
        epoch.n_sent += 1
        self.n_requests += 1
        self.e.out.data.append(
            pack_data(Packet.DATA, vol.number, 0, flush.block_id, vol.seq & 0xFFFFFFFF,
                      DP_FLUSH | DP_SEND_WRITE_ACK, 0, self.e.empty_digest())
        )

    def _send_fence(self, vol: Volume, answers: bool) -> None:
        """Have a kernel with data-integrity-alg flush; no empty P_DATA then.

        DRBD 8.4.11 computes the digest of an empty P_DATA over a page that is not there and takes its
        host down (drbd_csum_ee). But it flushes its disks at each barrier before it looks at what
        follows (receive_Barrier), so the answer to a read behind the barrier says that it has.
        """
        self.close_epoch()
        if answers:
            fence = PeerFlush(vol, self.next_id, answers)
            self.next_id += 1
            self.fences[fence.block_id] = fence
            self.e.out.data.append(
                pack_block_req(Packet.DATA_REQUEST, vol.number, 0, fence.block_id, SECTOR)
            )

    def fence_passed(self, block_id: int) -> bool:
        """The peer answered a read; False unless it stands for a flush. A refusal passed the barrier too."""
        fence = self.fences.pop(block_id, None)
        if fence is None:
            return False
        self.e.flushes.acked(fence)
        return True

    def connection_lost(self) -> None:
        """Forget the peer: whatever it had not confirmed as stable becomes out of sync."""
        epochs, self.epochs = self.epochs, deque()
        self.inflight = {}
        self.n_requests = self.n_settled = 0
        self.barrier_at = None
        self.kept = False
        finished: list[Request] = []
        flushes: list[PeerFlush] = list(self.fences.values())
        self.fences = {}
        volumes = self.e.volumes
        for vol in volumes.values():
            self._miss_settled(vol, epochs)
        for epoch in epochs:
            self._cool(epoch)
            for r in epoch.requests:
                if type(r) is not Request:
                    assert isinstance(r, PeerFlush)
                    flushes.append(r)
                    continue
                vol = volumes[r.volume]
                vol.set_out_of_sync(r.offset, r.length)
                r.legs &= ~(IN_LOG | PEER_OK)
                if r.waiting & PEER:
                    r.waiting &= ~PEER
                    vol.n_pending -= 1
                    if not r.waiting:
                        finished.append(r)
                elif not r.waiting:
                    self.drop_extents(vol, r)
        finished += [r for r in self.e.conflicts.take_postponed() if not r.waiting]
        self.e.mirror.finish(finished)
        for flush in flushes:
            if flush.waiting:
                self.e.flushes.leg_done(flush.volume, PEER)
        self.shortened()
        self._shrank()

    def _miss_settled(self, vol: Volume, epochs: Iterable[Epoch]) -> None:
        """The peer may lose, or has lost, the settled writes of *epochs*."""
        vol.set_ranges_out_of_sync(b"".join(epoch.ranges.get(vol.number, b"") for epoch in epochs))

    def n_bits_held(self, vol: Volume) -> int:
        """How many bits may still be set only because our own disk is slower than the sync target's."""
        return sum(
            ((r.offset + r.length + 4095) >> 12) - (r.offset >> 12)
            for epoch in self.epochs
            for r in epoch.requests
            if type(r) is Request and r.volume == vol.number and r.legs & IN_SYNC and r.waiting & LOCAL
        )

    def _unstable(self) -> list[Request]:
        """Of the writes that are kept one by one, those that the peer has answered and may yet lose with its memory."""
        return [
            r
            for epoch in self.epochs
            for r in epoch.requests
            if type(r) is Request and r.legs & PEER_OK and not r.waiting & PEER
        ]

    def answered_unstable(self) -> bool:
        """Does the log hold writes that the peer has answered and may yet lose with its memory?"""
        return self.n_settled > 0 or bool(self._unstable())

    def mark_unstable(self, vol: Volume) -> None:
        """The peer, perhaps without its memory, is to be our source: its copy of these decides."""
        self._miss_settled(vol, self.epochs)
        for r in self._unstable():
            if r.volume == vol.number:
                vol.set_out_of_sync(r.offset, r.length)

    def mark_out_of_sync(self, vol: Volume) -> None:
        """The peer lost its disk: nothing it holds unflushed counts any more."""
        self._miss_settled(vol, self.epochs)
        for epoch in self.epochs:
            for r in epoch.requests:
                if type(r) is Request and r.volume == vol.number:
                    vol.set_out_of_sync(r.offset, r.length)

    def keep(self) -> None:
        """The connection is gone while I/O is frozen: the log stays for `replay` or `connection_lost`."""
        self.kept = bool(self.epochs)
        self.barrier_at = None
        if self.epochs:  # no barrier of this connection may go out on the next one
            self.epochs[-1].closed = self.epochs[-1].barrier_sent = True

    def replay(self) -> None:
        """The peer is back and never lost its memory: send again what it did not answer.

        What it did answer counts as written, but not yet as stable: it stays in the log until the next
        barrier ack, so that it is not forgotten should the peer lose its memory after all.
        """
        self.kept = False
        epochs, self.epochs = self.epochs, deque()
        self.inflight = {}
        self.n_requests = self.n_settled = 0
        answered: list[Request] = []
        fences, self.fences = self.fences, {}
        for epoch in epochs:
            for r in epoch.requests:
                if isinstance(r, PeerFlush):
                    if r.waiting:
                        self.send_flush(r.volume, answers=r.answers)
                    continue
                vol = self.e.volumes[r.volume]
                if r.waiting & PEER:
                    r.waiting &= ~PEER
                    vol.n_pending -= 1
                    self.e.mirror.send(vol, r)
                else:
                    answered.append(r)
        for r in self.e.conflicts.take_postponed():
            self.e.mirror.send(self.e.volumes[r.volume], r)
        self._carry(answered, epochs)
        self.close_epoch()
        for fence in fences.values():
            self.send_flush(fence.volume, answers=fence.answers)
        self._wait_on(epochs)
        self._shrank()

    def _wait_on(self, over: Iterable[Epoch]) -> None:
        """What was left of the epochs *over* is in later ones: whoever waits for one of them waits for the last."""
        if self.epochs:
            over, last = list(over), self.epochs[-1]
            self._waiters = [(last if epoch in over else epoch, then) for epoch, then in self._waiters]

    def _carry(self, answered: list[Request], epochs: Iterable[Epoch]) -> None:
        """Keep *answered* and the settled writes of *epochs*, which are over, until the peer acknowledges a barrier."""
        settled = [epoch for epoch in epochs if epoch.n_settled]
        if not answered and not settled:
            return
        epoch = self.epoch_for_write()
        if not epoch.n_sent:
            number = answered[0].volume if answered else next(iter(settled[0].ranges))
            self.send_flush(self.e.volumes[number])
        for r in answered:
            r.epoch = epoch
        epoch.requests += answered
        self.n_requests += len(answered)
        for other in settled:
            epoch.take_settled(other)
            self.n_requests += other.n_settled
            self.n_settled += other.n_settled

    def tick(self, now: float) -> None:
        if self.barrier_at is not None and now >= self.barrier_at:
            self.close_epoch()
            self.barrier_at = None

    def oldest_unanswered(self) -> float | None:
        """When the oldest request was sent that the peer still owes an answer for."""
        if self.kept:
            return None
        for epoch in self.epochs:
            if epoch.barrier_sent or any(r.waiting & PEER for r in reversed(epoch.requests)):
                return epoch.since
        return None

    def answered(self, requests: list[Request]) -> None:
        """These are being answered: the epoch they belong to ends, so that what follows comes after it."""
        if not self.epochs:
            return
        epoch = self.epochs[-1]
        if self.e.link.peer_sends_flushes:
            if self.barrier_at is None:
                self.close_epoch_soon()
        elif not epoch.closed and epoch.n_sent:
            for r in requests:
                if r.epoch is epoch:
                    self.close_epoch_soon()
                    break

    def disk_gone(self, vol: Volume) -> None:
        """The local disk was detached, and its activity log with it."""
        for epoch in self.epochs:
            epoch.extents.pop(vol.number, None)
            for r in epoch.requests:
                if type(r) is Request and r.volume == vol.number:
                    r.legs &= ~AL_REF

    @property
    def full(self) -> bool:
        return (
            self.n_requests >= LOG_MAX or self.n_requests - self.n_settled >= RECORDS_MAX
            or len(self.epochs) >= EPOCHS_MAX
        )  # fmt: skip

    @property
    def half_full(self) -> bool:
        """Time to ask the peer for a flush, long before front ends have to stop."""
        return (
            self.n_requests >= LOG_MAX // 2 or self.n_requests - self.n_settled >= RECORDS_MAX // 2
            or len(self.epochs) >= EPOCHS_MAX // 2
        )  # fmt: skip
