"""The writes and reads of our own applications: from submit to the answer.

Decides when a request may start (state, overlap, activity log), where it goes (local disk, peer, or a
note that the peer misses it), and when it is answered. What the peer may still lose is `transfer_log`'s;
flushes have a room of their own.

Relies on `volume.fast` for the short path; the long path (`enter`) is the specification.
Source of the rules: drbd_req.c.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from .compiled import batches
from .local_flush import HABIT
from .requests import (
    AL_REF,
    BOTH_OK,
    FUA,
    IN_LOG,
    IN_SYNC,
    LOCAL,
    LOCAL_OK,
    MAY_UNMAP,
    MIRRORED,
    PEER,
    PEER_OK,
    POSTPONED,
    Op,
    Request,
)
from .states import ConnState, DiskState, Role
from .units import extents_touched
from .volume import Volume
from .wire import (
    DP_DISCARD,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_SEND_RECEIVE_ACK,
    DP_SEND_WRITE_ACK,
    DP_ZEROES,
    Packet,
    pack_block_desc,
    pack_block_req,
    pack_data,
    pack_trim,
)

if TYPE_CHECKING:
    from .engine import Engine

# A plain integer: to look up and compare members of an enum costs several times as much.
_READ: Final = int(Op.READ)

REQUESTS_MAX: Final = 4096  # requests in the machine before front ends stop reading

BLOCKED_CONNS: Final = frozenset((ConnState.WF_BITMAP_T, ConnState.WF_SYNC_UUID, ConnState.STARTING_SYNC_T))


class Mirror:
    """The requests of our own applications."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.log = engine.log
        self.n_app = 0

    # ------------------------------------------------------------------------------ entry

    def submit(self, vol: Volume, batch: list[Request]) -> None:
        """Take a batch from a front end; each request comes back exactly once in ``outbox.done``."""
        n = len(batch)
        self.n_app += n
        vol.n_app += n
        vol.last_app_io = self.e.now
        if self.log.half_full:
            self.log.ask_for_flush(vol)
        if vol.fast and not vol.intervals.large:
            batch = self._submit_fast(vol, batch)
        for r in batch:
            self.enter(vol, r)

    def _submit_fast(self, vol: Volume, batch: list[Request]) -> list[Request]:
        """Connected, UpToDate, Primary, protocol C: start what needs no waiting, return the rest.

        One header array for the whole batch; payloads are passed on as they came.
        """
        writes: list[Request] = []
        disk = self.e.out.disk
        known = len(disk)
        rest = batches.sort_batch(batch, disk, vol.intervals.busy, vol.al.refs, writes)
        vol.n_local += len(disk) - known
        if writes:
            self._send_batch(vol, writes)
        return rest

    def _send_batch(self, vol: Volume, writes: list[Request]) -> None:
        """Frame *writes* as P_DATA and start them on both disks."""
        out, log = self.e.out, self.log
        out.disk += writes
        vol.n_pending += len(writes)
        vol.n_local += len(writes)
        dp = DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC if vol.syncing else DP_SEND_WRITE_ACK
        while writes:
            epoch = log.epoch_for_write()
            room = self.e.config.net.max_epoch_size - epoch.n_sent
            now, writes = (writes, []) if len(writes) <= room else (writes[:room], writes[room:])
            n = len(now)
            vol.bytes_sent += batches.pack_writes(
                out.data, log.inflight, now, vol.number, vol.seq, log.next_id, epoch, dp
            )
            vol.seq += n
            log.next_id += n
            epoch.requests += now
            epoch.n_sent += n
            log.n_requests += n
            if len(epoch.requests) >= epoch.settle_at:
                log.settle(epoch)

    def enter(self, vol: Volume, r: Request) -> None:
        """One request, the long way: wait for what it must wait for, then start it."""
        if self.holds_back(vol):
            vol.held.append(r)
        elif vol.state.role != Role.PRIMARY:
            self._fail(vol, r, errno.EPERM)
        elif r.op == Op.FLUSH:
            vol.flush_waiting.append(r)
            self.e.flushes.start(vol)
        elif r.op == Op.READ:
            self._read(vol, r)
        else:
            self._write(vol, r)

    @staticmethod
    def holds_back(vol: Volume) -> bool:
        """Must nothing start now?"""
        state = vol.state
        return bool(
            state.suspended or vol.io_holds or state.conn in BLOCKED_CONNS
            or state.disk == DiskState.NEGOTIATING  # the peer's bitmap may be on its way without this write
        )  # fmt: skip

    def release_held(self, vol: Volume) -> None:
        """The state changed: try again what was held back."""
        self.e.conflicts.send_again(vol)
        for _ in range(len(vol.held)):
            self.enter(vol, vol.held.popleft())

    def _fail(self, vol: Volume, r: Request, error: int) -> None:
        r.error = error
        r.waiting = 0
        self.answer(vol, [r])

    # ------------------------------------------------------------------------------ reads

    def _read(self, vol: Volume, r: Request) -> None:
        r.error = 0
        if vol.readable_locally(r.offset, r.length):
            r.waiting = LOCAL
            vol.n_local += 1
            self.e.out.disk.append(r)
        elif vol.state.connected and vol.state.pdsk == DiskState.UP_TO_DATE:
            self._read_from_peer(vol, r)
        elif vol.state.disk == DiskState.CONSISTENT:
            # Not known to be current, but nobody better is in sight: what a Primary in this state shows.
            r.waiting = LOCAL
            vol.n_local += 1
            self.e.out.disk.append(r)
        else:
            self._fail(vol, r, errno.EIO)

    def read_reply(self, vol: Volume, block_id: int, data: memoryview) -> bool:
        """P_DATA_REPLY; False when the request is unknown."""
        r = vol.reads.pop(block_id, None)
        if r is None:
            return False
        r.payload = data
        r.waiting = 0
        vol.bytes_received += len(data)
        self.answer(vol, [r])
        return True

    def read_refused(self, vol: Volume, block_id: int) -> None:
        """P_NEG_DREPLY: another copy, or an error."""
        if self.log.fence_passed(block_id):
            return
        r = vol.reads.pop(block_id, None)
        if r is not None:
            if vol.readable_locally(r.offset, r.length):
                self._read(vol, r)
            else:
                self._fail(vol, r, errno.EIO)

    # ------------------------------------------------------------------------------ writes

    def _write(self, vol: Volume, r: Request) -> None:
        state = vol.state
        if state.disk != DiskState.UP_TO_DATE and state.pdsk != DiskState.UP_TO_DATE:
            self._fail(vol, r, errno.EIO)
            return
        if r.length == 0:
            self.answer(vol, [r])
            return
        blocker = vol.intervals.blocker(r.offset, r.length)
        if blocker is not None:
            vol.intervals.wait(blocker, lambda: self.enter(vol, r))
            return
        vol.intervals.add(r)
        r.legs = 0
        self.start(vol, r)

    def start(self, vol: Volume, r: Request) -> None:
        """A write that holds its range, and its extents unless the disk they were hot on has left meanwhile."""
        hot = r.legs & AL_REF or not vol.local or vol.al_suspended
        if hot or self._take_extents(vol, r):
            self.dispatch(vol, r)
        else:
            vol.al_waiting.append(r)
            self.kick_activity_log(vol)

    def _take_extents(self, vol: Volume, r: Request) -> bool:
        """References on all extents of the request, or none; wishes for those that are cold."""
        al, extents = vol.al, extents_touched(r.offset, r.length)
        cold = [extent for extent in extents if extent not in al.refs]
        for extent in cold:
            al.want(extent)
        if cold:
            return False
        for extent in extents:
            al.get(extent)
        r.legs |= AL_REF
        return True

    def kick_activity_log(self, vol: Volume) -> None:
        """Write the next activity-log transaction if one is wanted and possible."""
        if vol.al.busy or not vol.al.n_wanted or vol.meta is None:
            return
        transaction = vol.al.begin()
        if transaction is None:
            if not vol.al.busy:  # every slot is in use: the peer's next barrier ack frees some
                self.log.ask_for_flush(vol)
            return
        if vol.config.disk_options.al_updates:
            vol.meta.write_transaction(transaction, lambda ok: self._transaction_done(vol, ok))
        else:
            self._transaction_done(vol, True)

    def _transaction_done(self, vol: Volume, ok: bool) -> None:
        if ok:
            vol.al.commit()
        for _ in range(len(vol.al_waiting)):
            r = vol.al_waiting.popleft()
            if not vol.local or self._take_extents(vol, r):
                self.dispatch(vol, r)
            else:
                vol.al_waiting.append(r)
        self.e.replica.extents_ready(vol)
        self.kick_activity_log(vol)

    def dispatch(self, vol: Volume, r: Request) -> None:
        """Start a write that holds its range (and extents): to the disk, to the peer, or to both."""
        state = vol.state
        if self.holds_back(vol):
            self._release(vol, r)
            vol.held.append(r)
            return
        if state.disk != DiskState.UP_TO_DATE and state.pdsk != DiskState.UP_TO_DATE:
            self._release(vol, r)
            self._fail(vol, r, errno.EIO)
            return
        # Two Primaries, or a connection that is gone while the disk still works for it.
        if (vol.dual or not state.connected) and self.e.conflicts.peer_first(vol, r):
            return
        r.waiting = 0
        if vol.mirror:
            self.send(vol, r)
        elif vol.local:
            newly_set = vol.set_out_of_sync(r.offset, r.length)
            if vol.tell_out_of_sync and newly_set:
                self.e.out.data.append(
                    pack_block_desc(Packet.OUT_OF_SYNC, vol.number, r.offset >> 9, r.length)
                )
        if vol.local:
            r.waiting |= LOCAL
            vol.n_local += 1
            self.e.out.disk.append(r)
        assert r.waiting, "a write must go somewhere"

    def send(self, vol: Volume, r: Request) -> None:
        """Put one write on the data socket and into the transfer log."""
        e = self.e
        epoch = self.log.epoch_for_write()
        block_id = self.log.next_id
        self.log.next_id += 1
        vol.seq += 1
        protocol = e.config.net.protocol
        flags = DP_FUA if r.flags & FUA else 0
        waits = protocol != "A"
        if vol.syncing:
            flags |= DP_MAY_SET_IN_SYNC | DP_SEND_WRITE_ACK
            waits = True
        elif not vol.local:  # the peer's copy is the only one: A and B would answer for nobody's disk
            flags |= DP_SEND_WRITE_ACK
            waits = True
        elif protocol == "C":
            flags |= DP_SEND_WRITE_ACK
        elif protocol == "B":
            flags |= DP_SEND_RECEIVE_ACK
        seq = vol.seq & 0xFFFFFFFF
        if r.op == Op.WRITE:
            assert r.payload is not None
            digest = e.integrity(r.payload) if e.integrity else b""
            e.out.data += (
                pack_data(Packet.DATA, vol.number, r.offset >> 9, block_id, seq, flags, r.length, digest),
                r.payload,
            )
            vol.bytes_sent += r.length
        elif r.op == Op.TRIM or not e.link.zeroes_fit:
            flags |= DP_DISCARD
            e.out.data.append(
                pack_trim(Packet.TRIM, vol.number, r.offset >> 9, block_id, seq, flags, r.length)
            )
        else:
            flags |= DP_ZEROES | (DP_DISCARD if r.flags & MAY_UNMAP else 0)
            e.out.data.append(
                pack_trim(Packet.ZEROES, vol.number, r.offset >> 9, block_id, seq, flags, r.length)
            )
        r.block_id = block_id
        r.epoch = epoch
        r.legs |= MIRRORED | IN_LOG
        self.log.inflight[block_id] = r
        if waits:
            r.waiting |= PEER
            vol.n_pending += 1
        else:
            r.legs |= PEER_OK
        epoch.requests.append(r)
        epoch.n_sent += 1
        self.log.n_requests += 1

    # ------------------------------------------------------------------------------ completions

    def local_done(self, ops: list[Request]) -> None:
        """The local disk answered these requests."""
        finished: list[Request] = []
        at, n = 0, len(ops)
        while at < n:
            vol = self.e.volumes[ops[at].volume]
            end, n_read, n_written, n_writes = batches.written_here(ops, at, vol.number, finished)
            vol.n_local -= end - at
            vol.bytes_read += n_read
            vol.bytes_written += n_written
            vol.data_version += n_writes
            at = end
            if at < n and (r := ops[at]).error:
                vol = self.e.volumes[r.volume]
                vol.n_local -= 1
                r.waiting &= ~LOCAL
                self._local_failed(vol, r, finished)
                at += 1
        if finished:
            self.finish(finished)

    def _local_failed(self, vol: Volume, r: Request, finished: list[Request]) -> None:
        """The local disk failed a request: the peer's copy answers it, if there is one."""
        error, r.error = r.error, 0
        if r.op == Op.READ:
            vol.set_out_of_sync(r.offset, r.length)
            self.e.disks.failed(vol, error, write=False)
            if vol.state.connected and vol.state.pdsk == DiskState.UP_TO_DATE:
                self._read_from_peer(vol, r)
            else:
                self._fail(vol, r, errno.EIO)
            return
        vol.set_out_of_sync(r.offset, r.length)
        self.e.disks.failed(vol, error, write=True, flush=bool(r.flags & FUA))
        if not r.waiting:
            finished.append(r)

    def _read_from_peer(self, vol: Volume, r: Request) -> None:
        r.waiting = PEER
        r.block_id = self.log.next_id
        self.log.next_id += 1
        vol.reads[r.block_id] = r
        self.e.out.data.append(
            pack_block_req(Packet.DATA_REQUEST, vol.number, r.offset >> 9, r.block_id, r.length)
        )

    def peer_acked(self, r: Request, in_sync: bool, finished: list[Request]) -> None:
        """A positive ack for a mirrored write."""
        r.legs |= PEER_OK | IN_SYNC if in_sync else PEER_OK
        if r.waiting & PEER:
            r.waiting &= ~PEER
            self.e.volumes[r.volume].n_pending -= 1
            if not r.waiting:
                finished.append(r)

    def peer_let_go(self, r: Request, finished: list[Request]) -> None:
        """The peer did not take this write; what becomes of it is decided when the local disk has it."""
        if r.waiting & PEER:
            r.waiting &= ~PEER
            self.e.volumes[r.volume].n_pending -= 1
            if not r.waiting:
                finished.append(r)

    def peer_refused(self, r: Request, finished: list[Request]) -> None:
        """P_NEG_ACK: the peer does not have this write."""
        vol = self.e.volumes[r.volume]
        vol.set_out_of_sync(r.offset, r.length)
        r.legs &= ~PEER_OK
        self.peer_let_go(r, finished)

    def finish(self, finished: list[Request]) -> None:
        """These requests have no leg out any more: settle what they leave behind and answer them."""
        volumes = self.e.volumes
        if len(volumes) == 1:
            if finished:
                self._finish(volumes[finished[0].volume], finished)
            return
        by_volume: dict[int, list[Request]] = {}
        for r in finished:
            by_volume.setdefault(r.volume, []).append(r)
        for number, requests in by_volume.items():
            self._finish(volumes[number], requests)

    def _finish(self, vol: Volume, requests: list[Request]) -> None:
        intervals = vol.intervals
        waiters = []
        in_sync: list[Request] = []
        postponed = False
        at, n = 0, len(requests)
        while at < n:
            if not intervals.has_waiters:
                at = batches.settle_writes(requests, at, intervals.busy, in_sync)
                if at == n:
                    break
            r = requests[at]
            at += 1
            if r.op == _READ:
                continue
            legs = r.legs
            if legs & BOTH_OK != BOTH_OK or legs & IN_SYNC:
                if legs & POSTPONED:  # keeps its range, and makes way for the other Primary's write
                    waiters += intervals.take_waiters(r)
                    postponed = True
                    continue
                self._settle(vol, r)
            waiters += intervals.remove(r)
            if not legs & IN_LOG:
                self.log.drop_extents(vol, r)
            r.payload = None
        if vol.flush_habit == HABIT:
            self.e.flushes.local.written(vol)
        if in_sync and vol.syncing:
            vol.are_in_sync(in_sync)
            self.e.resync.progressed(vol)
        self.answer(vol, [r for r in requests if not r.legs & POSTPONED] if postponed else requests)
        for wake in waiters:
            wake()
        if postponed:
            self.e.conflicts.send_again(vol)

    def _settle(self, vol: Volume, r: Request) -> None:
        """A write that did not simply reach both disks: its bits, and its error."""
        legs = r.legs
        if legs & BOTH_OK == BOTH_OK:
            if legs & IN_SYNC and vol.syncing:
                vol.set_in_sync(r.offset, r.length)
                self.e.resync.progressed(vol)
            return
        vol.set_out_of_sync(r.offset, r.length)
        # On a disk that is no good copy (a target that lost its source) the write alone would not survive.
        here = legs & LOCAL_OK and vol.state.disk >= DiskState.CONSISTENT
        there = legs & PEER_OK and vol.state.pdsk >= DiskState.CONSISTENT
        if not (here or there):
            r.error = errno.EIO

    def _release(self, vol: Volume, r: Request) -> None:
        """Give back the range and the extents of a write that did not start after all."""
        self.log.drop_extents(vol, r)
        for wake in vol.intervals.remove(r):
            wake()

    def answer(self, vol: Volume, requests: list[Request]) -> None:
        """Hand requests back, unless answers are held (a new generation is not durable, I/O is frozen)."""
        if vol.completion_gates or vol.suspended:
            vol.gated += requests
            return
        self.log.answered(requests)
        n = len(requests)
        self.n_app -= n
        vol.n_app -= n
        self.e.out.done += requests

    def release_gated(self, vol: Volume, *, without_peer_fails: bool = False) -> None:
        """Answer what was held. *without_peer_fails*: the generation that says the peer misses these
        writes did not reach the disk, so only what the peer has counts."""
        if without_peer_fails:
            for r in vol.gated:
                if r.op != Op.READ and not r.legs & PEER_OK:
                    r.error = errno.EIO
        if vol.gated and not vol.completion_gates and not vol.state.suspended:
            gated, vol.gated = vol.gated, []
            if vol.state.disk < DiskState.CONSISTENT:  # went while they were held, and with it what only it had
                for r in gated:
                    if r.op != Op.READ and r.legs & BOTH_OK == LOCAL_OK:
                        r.error = errno.EIO
            self.answer(vol, gated)

    # ------------------------------------------------------------------------------ the peer is gone

    def reads_lost(self, vol: Volume) -> None:
        """Reads that waited for the peer: another copy, or held back, or an error."""
        reads, vol.reads = vol.reads, {}
        for r in reads.values():
            r.waiting = 0
            self.enter(vol, r)

    def unflushed_lost(self, vol: Volume) -> None:
        """A flush failed: what the local disk has answered and we have not counts as not on it, should it come back."""
        for holder in (*vol.intervals.busy.values(), *vol.intervals.large, *vol.gated):
            if isinstance(holder, Request):
                holder.legs &= ~LOCAL_OK

    def disk_gone(self, vol: Volume) -> None:
        """The local disk was detached: what waited for its activity log goes on without it."""
        self.log.disk_gone(vol)
        for holder in (*vol.intervals.busy.values(), *vol.intervals.large):
            if isinstance(holder, Request):
                holder.legs &= ~AL_REF
        for _ in range(len(vol.al_waiting)):
            r = vol.al_waiting.popleft()
            self.dispatch(vol, r)
