"""The source's side of a resync: serving what the target asks for, and ending when it says so.

A read holds its range against our applications until the reply is on its way, so that on the data socket a
block and a later write of it stand in the right order. The bits clear as the target confirms blocks; the
resync is over when the target says so and no bit is left. While applications are at work here, requests wait for
their turn (`pace`). Source: drbd_receiver.c (receive_DataRequest, receive_state), drbd_worker.c
(w_e_end_rsdata_req, w_e_end_csum_rs_req, drbd_resync_finished).
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .bitmap_exchange import BitmapReceiver
from .intervals import Lock, overlap
from .meta_writer import CallbackOp
from .pace import Pace
from .requests import DATA, IF_HOLE, Buffer, DiskOp, Op
from .resync_target import PERSIST_S, log_done
from .states import ConnState, DiskState
from .units import SECTOR
from .volume import Volume
from .wire import Packet, pack_block_desc, pack_data

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(frozen=True, slots=True)
class Asked:
    """A target's request for *size* bytes, of which it may know the digest; *thin*: zeroes need only be named.

    *link* and *run* say on which connection and in which resync it was made.
    """

    link: int
    run: int
    sector: int
    block_id: int
    size: int
    digest: bytes | None
    thin: bool


class SourceRun:
    """A volume's resync as source."""

    __slots__ = ("asked", "next_persist", "out", "pace", "receiver", "sync_uuid", "waiting")

    def __init__(self, now: float) -> None:
        self.receiver: BitmapReceiver | None = None
        self.pace = Pace()
        self.waiting: deque[Asked] = deque()  # for their turn
        self.out: dict[int, int] = {}  # sector -> bytes that are served and that the target has not confirmed
        self.asked = False  # the target has asked for a block: its own metadata say that it is Inconsistent
        self.next_persist = now + PERSIST_S
        self.sync_uuid: int | None = None  # of a full sync, known before the handler is asked


class Source:
    """Volumes from which the peer is brought up to date."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

    def serve(self, vol: Volume, sector: int, block_id: int, size: int, digest: bytes | None, thin: bool) -> None:
        """P_RS_DATA_REQUEST, P_RS_THIN_REQ or P_CSUM_RS_REQUEST."""
        run = vol.source
        if vol.state.disk == DiskState.UP_TO_DATE and (vol.sync_ending or vol.begin_unknown):
            vol.sync_ending = False  # it has taken the sync UUID and is not through
            if run is not None:
                run.asked = True
            self.e.write_superblock(vol, None)
        asked = Asked(self.e.link.ticket, vol.rs_run, sector, block_id, size, digest, thin)
        if run is None:
            self._serve(vol, asked)
        else:
            run.waiting.append(asked)
            self.go_on(vol)

    def go_on(self, vol: Volume) -> None:
        """Serve what has waited for its turn, as far as our applications leave room for it."""
        run, now, rate = vol.source, self.e.now, vol.config.disk_options.c_min_rate
        while run is not None and run.waiting and run.pace.room(now, vol.at_work(now), rate) > 0:
            asked = run.waiting.popleft()
            self._settled(vol, asked.sector)
            run.out[asked.sector] = asked.size
            run.pace.begun(now, asked.size)
            self._serve(vol, asked)

    def give_up(self, vol: Volume) -> None:
        """The run is over before its end: nothing that still waits will be served."""
        run = vol.source
        if run is not None and vol.state.connected:
            for asked in run.waiting:
                self._refuse(vol, asked)

    def _settled(self, vol: Volume, sector: int) -> None:
        """What was served at *sector* has its end."""
        run = vol.source
        if run is not None and (size := run.out.pop(sector, 0)):
            run.pace.settled(self.e.now, size, vol.config.disk_options.c_min_rate)

    def _serve(self, vol: Volume, asked: Asked) -> None:
        if asked.link != self.e.link.ticket or not vol.state.connected:
            return
        if vol.state.disk != DiskState.UP_TO_DATE:
            self._refuse(vol, asked)
            return
        offset = asked.sector << 9
        lock = Lock(offset, asked.size)
        if self._written_alone(vol, lock):
            self.e.when(lambda: not self._written_alone(vol, lock), lambda: self._serve(vol, asked))
            return
        blocker = vol.intervals.blocker(offset, asked.size)
        if blocker is not None:
            vol.intervals.wait(blocker, lambda: self._serve(vol, asked))
            return
        vol.intervals.add(lock)
        vol.n_local += 1
        self.e.out.disk.append(
            CallbackOp(Op.READ, vol.number, offset, asked.size, None, IF_HOLE if asked.thin else 0, DATA,
                       lambda op: self._served(vol, lock, asked, op))
        )  # fmt: skip

    def _written_alone(self, vol: Volume, block: Lock) -> bool:
        """Is a write under way that the target sent while it had no disk? It must get the block with that."""
        alone = self.e.replica.alone
        return bool(alone) and any(w.volume == vol.number and overlap(w, block) for w in alone)

    def _refuse(self, vol: Volume, asked: Asked) -> None:
        self.e.send_ack(Packet.NEG_RS_DREPLY, vol, asked.sector, asked.block_id, asked.size)
        if asked.run == vol.rs_run:
            self._settled(vol, asked.sector)

    def _served(self, vol: Volume, lock: Lock, asked: Asked, op: DiskOp) -> None:
        vol.n_local -= 1
        waiters = vol.intervals.remove(lock)
        if asked.link == self.e.link.ticket and vol.state.connected:
            if op.error:
                self._refuse(vol, asked)
                vol.rs_failed += asked.size >> 12
            elif self._reply(vol, asked, op):
                (vol.rs_replied if asked.run == vol.rs_run else vol.rs_late).add(asked.sector)
            elif asked.run == vol.rs_run:
                self._settled(vol, asked.sector)
        if op.error:
            self.e.disks.failed(vol, op.error or errno.EIO, write=False)
        for wake in waiters:
            wake()
        self.go_on(vol)
        self.e.disks.local_idle(vol)

    def _reply(self, vol: Volume, asked: Asked, op: DiskOp) -> bool:
        """Send what was read. Will the target answer? Not where it has the same already."""
        if asked.thin and (op.payload is None or _all_zero(op.payload)):
            self.e.out.data.append(pack_block_desc(Packet.RS_DEALLOCATED, vol.number, asked.sector, op.length))
            return True
        assert op.payload is not None
        vol.bytes_read += op.length
        if asked.digest is not None and self.e.csums is not None and self.e.csums(op.payload) == asked.digest:
            self.e.send_ack(Packet.RS_IS_IN_SYNC, vol, asked.sector, asked.block_id, op.length)
            vol.set_in_sync(op.offset, op.length)
            return False
        check = self.e.integrity(op.payload) if self.e.integrity else b""
        self.e.out.data += (
            pack_data(Packet.RS_DATA_REPLY, vol.number, asked.sector, asked.block_id, 0, 0, op.length, check),
            op.payload,
        )
        vol.bytes_sent += op.length
        return True

    def block_acked(self, vol: Volume, sector: int, size: int) -> None:
        """P_RS_WRITE_ACK with the syncer's id: the target has the block.

        From a target that has given up its disk meanwhile this says nothing of what we wrote there since.
        """
        if not self._late(vol, sector):
            if vol.state.pdsk >= DiskState.INCONSISTENT:
                vol.set_in_sync(sector << 9, size)
            self._settled(vol, sector)
            self.go_on(vol)

    def block_refused(self, vol: Volume, sector: int, size: int) -> None:
        """P_NEG_ACK with the syncer's id: the target could not write it."""
        if not self._late(vol, sector):
            vol.rs_failed += max(size >> 12, 1)
            self._settled(vol, sector)
            self.go_on(vol)

    def _late(self, vol: Volume, sector: int) -> bool:
        """Is this the answer to a block of a resync that was given up since? Each block is answered once, in order."""
        if sector in vol.rs_late:
            vol.rs_late.remove(sector)
            return True
        vol.rs_replied.discard(sector)
        return False

    def before_ping_ack(self, then: Callable[[], None]) -> None:
        """The peer pings, and our answer may be what its resync waits for: *then* may end without our hearing.

        What that means for our next generation (`Volume.end_unknown`) is on disk before the answer goes out. When
        the disk fails instead there is no answer: a target that has not yet heard of the failure would be UpToDate
        in a generation that our disk, attached again, takes for its own alone. It misses the answer and breaks
        the connection. (A kernel answers at once.)
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
            left -= ok
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
        log_done(self.e, vol)
        pdsk = DiskState.INCONSISTENT if vol.rs_failed else DiskState.UP_TO_DATE
        self.e.change(
            vol, replace(vol.state, conn=ConnState.CONNECTED, disk=disk, pdsk=pdsk), hard=True, why="resync finished"
        )
        if disk == DiskState.INCONSISTENT:
            self.e.disks.tell_inconsistent(vol)
        else:
            self.e.write_superblock(vol, None)
        if vol.meta is not None:
            vol.meta.write_changed()
        self.e.run_handler("after-resync-source", vol, None)
        if self.e.fenced_policy and all(
            v.state.disk == v.state.pdsk == DiskState.UP_TO_DATE for v in self.e.volumes.values()
        ):
            self.e.run_handler("unfence-peer", None, None)
        return True


def _all_zero(payload: Buffer) -> bool:
    """Whether there is no byte but zeroes. Most data shows with its first sector that it is not so."""
    return not any(payload[:SECTOR]) and not np.frombuffer(payload, np.uint8).any()
