"""One volume as the machine sees it: its state, its generations, its disk and what is in flight on it.

Only data and derived facts live here; decisions are in `transition`, sequences in the other rooms. The
derived facts (`mirror`, `local`, `fast` …) are recomputed once per state change by `refresh`, so that the
data plane tests one flag per batch instead of a rule per request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from .activity_log import ActivityLog
from .bitmap import Bitmap
from .config import NetOptions, VolumeConfig
from .intervals import Intervals, OrderedIntervals
from .metadata import MAGIC_UNCLEAN, Layout, MdFlag, Superblock
from .pace import BUSY_S
from .requests import Buffer, DiskOp, Request
from .states import ConnState, DiskState, Role, State
from .units import BLOCK, BLOCK_SHIFT, RANGE_SHIFT, SECTOR
from .uuids import UuidSet, md_flags

if TYPE_CHECKING:
    from .local_flush import LocalFlush
    from .meta_writer import MetaWriter
    from .resync_source import SourceRun
    from .resync_target import TargetRun
    from .verify import VerifyRun


HALF = 1 << 31  # of the sequence numbers, which wrap: a difference above it is negative


class Volume:
    """The machine's record of one volume. Sizes in bytes unless the name says sectors."""

    def __init__(self, config: VolumeConfig, net: NetOptions) -> None:
        self.number = config.number
        self.config = config
        self.net = net
        self.state = State()
        # generations
        self.uuids = UuidSet()
        self.peer_uuids: UuidSet | None = None
        self.peer_bits = 0
        self.peer_uuid_flags = 0
        self.sent_bits = 0
        self.exposed = 0  # the generation applications last saw (bit 0 masked)
        self.device_uuid = 0
        self.discard_my_data = False
        self.crashed_primary = False
        self.new_current_pending = False  # a new generation is due once I/O resumes
        # the disk
        self.layout: Layout | None = None
        self.bitmap = Bitmap(0)
        self.al = ActivityLog()
        self.al_suspended = False
        self.full_sync_flag = False
        self.last_flags = MdFlag(0)  # the flags word as last put into the superblock
        self.conn_serial = 0  # counts changes of state.conn: what waited in one state must not go on in its next visit
        self.target_done = False  # the target said so while bits of ours were still set
        self.outrun = False  # a Primary without a disk: the peer has taken writes that our disk does not have
        self.untouched = False  # asked to become a sync target while UpToDate: nothing has been taken away yet
        self.leaving = False  # this node parts as the one that is Outdated from then on
        self.sync_ending = False  # our target may finish its resync now, and we may not hear of it
        self.unproven: DiskState | None = None  # our disk's state while a diskless Primary has not yet taken us
        self.unmarked = 0  # PRIMARY_IND is on its way to the disk
        self.primary_hold = False  # PRIMARY_IND stays until the bits only the log vouches for are on disk
        self.uuids_told = False  # the attaching peer has our set as it was when we decided
        self.consider_resync = False  # both were Inconsistent and the peer was forced to be UpToDate
        self.pending_sync_uuid: int | None = None  # P_SYNC_UUID that came before we were ready for it
        self.al_nr_extents = 0
        self.al_stripes = 1
        self.al_stripe_size_4k = 8
        self.la_peer_max_bio_size = 0
        self.la_size = 0  # last agreed size
        self.usable = 0  # what the local disk could offer; 0 without a disk
        self.sparse = False  # the local disk is a file, in which holes take no space
        self.data_size = 0
        self.size = 0  # the current device size
        self.peer_size = 0  # what the peer's disk could offer; 0 unknown
        self.peer_u_size = 0  # sectors
        self.resize_pending = False  # we grew first; the peer's P_SIZES says that it has followed
        self.found_disk: DiskState | None = None  # what attach found, while Negotiating
        self.found_pdsk: DiskState | None = None
        self.attach_ticket = 0
        self.detaching = False
        self.meta: MetaWriter | None = None
        self.n_local = 0  # operations out on the local disk
        self.data_version = 0  # counts completed data writes, so that a flush knows whether it is needed
        self.flushing: LocalFlush | None = None  # the latest flush that is out on the local disk
        self.stable_version = -1  # what a flush is known to have covered
        self.asked_version = 0  # when a flush was last asked for
        self.flush_habit = 0  # flushes in a row that were asked for behind a single write
        # in flight
        self.intervals = Intervals()  # of our applications, and ranges resync holds against them
        self.peer_intervals = OrderedIntervals()  # writes on behalf of the peer, where order matters
        self.held: deque[Request] = deque()  # waiting for the state to allow them
        self.al_waiting: deque[Request] = deque()  # waiting for an activity-log transaction
        self.reads: dict[int, Request] = {}  # remote reads by block_id
        self.flush_waiting: list[Request] = []
        self.flush_batch: list[Request] = []
        self.flush_legs = 0
        self.completion_gates = 0  # answers wait while this is not zero
        self.gated: list[Request] = []
        self.io_holds = 0  # requests wait in `held` while this is not zero
        self.n_app = 0  # application requests in the machine
        self.n_untracked = 0  # peer writes in flight that are not in `peer_intervals`
        self.seq = 0
        self.peer_seq = 0  # the newest sequence number of the peer, on either socket
        self.behind_peer: deque[Request] = deque()  # ours, waiting for writes of the other Primary
        self.n_pending = 0
        self.n_unacked = 0
        self.open_count = 0
        # resync
        self.target: TargetRun | None = None
        self.source: SourceRun | None = None
        self.verify: VerifyRun | None = None
        self.verify_range = (0, 0)  # sectors an operator's verify begins and stops at; 0: the end
        self.rs_failed = 0  # bits
        self.rs_replied: set[int] = set()  # sectors of blocks sent to the target, which has not answered them
        self.rs_run = 0  # counts resyncs, and the times between them
        self.rs_late: set[int] = set()  # of a resync that was given up on this connection; the answers still come
        self.rs_total = 0  # bits
        self.rs_started = 0.0
        self.rs_paused_s = 0.0
        self.rs_paused_at: float | None = None
        self.rs_marks: deque[tuple[float, int]] = deque(maxlen=8)
        self.last_app_io = -1e9
        # counters
        self.bytes_read = 0
        self.bytes_written = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.al_writes = 0
        self.bm_writes = 0
        # derived from the state
        self.local = False  # the local disk takes writes
        self.mirror = False  # writes go to the peer
        self.tell_out_of_sync = False  # the peer is told which blocks it misses
        self.syncing = False  # in SyncSource … PausedSyncT: writes may clear bits on both sides
        self.dual = False  # both nodes are Primary: concurrent writes are possible
        self.fast = False  # nothing special: the data plane may take its short path
        self.plain = False  # … and so may the peer's writes, as far as the state is concerned
        self.suspended = False  # answers are held until I/O resumes
        self.refresh()

    # ------------------------------------------------------------------------------ derived facts

    def refresh(self) -> None:
        """Recompute what follows from the state. Source: the mirroring rules of drbd_req.c."""
        s = self.state
        self.local = s.disk >= DiskState.INCONSISTENT
        self.mirror = s.connected and (
            s.pdsk == DiskState.UP_TO_DATE
            or (s.pdsk >= DiskState.INCONSISTENT and ConnState.WF_BITMAP_T <= s.conn < ConnState.AHEAD)
        )
        self.tell_out_of_sync = s.conn in (ConnState.AHEAD, ConnState.WF_BITMAP_S)
        self.syncing = ConnState.SYNC_SOURCE <= s.conn <= ConnState.PAUSED_SYNC_T
        self.dual = s.role is s.peer is Role.PRIMARY and s.conn >= ConnState.CONNECTED
        self.fast = (
            self.mirror and not self.dual and (s.conn == ConnState.CONNECTED or self.syncing)
            and s.disk == DiskState.UP_TO_DATE
            and s.role == Role.PRIMARY and not s.suspended and not self.al_suspended and not self.io_holds
            and not self.net.data_integrity_alg and self.net.protocol == "C"
        )  # fmt: skip
        self.plain = (
            self.local and not self.dual and (s.conn == ConnState.CONNECTED or self.syncing)
            and s.pdsk >= DiskState.INCONSISTENT and self.net.protocol == "C"
        )  # fmt: skip
        self.suspended = s.suspended

    def saw(self, seq: int) -> None:
        """A packet of the peer had this sequence number."""
        if (seq - self.peer_seq) & 0xFFFFFFFF < HALF:
            self.peer_seq = seq

    def at_work(self, now: float) -> bool:
        """Is an application of this node reading or writing?"""
        return self.n_app > 0 or now - self.last_app_io < BUSY_S

    @property
    def bits_left(self) -> int:
        """How many blocks the running resync or verify still has before it."""
        return self.bitmap.weight if self.verify is None else self.verify.left

    @property
    def attached(self) -> bool:
        return self.state.disk >= DiskState.NEGOTIATING

    @property
    def end_unknown(self) -> bool:
        """May the target of our last resync be UpToDate in our current generation without our knowing?

        Then that generation must not go on here: promoted, the peer would take us for its older copy.
        """
        return self.sync_ending and self.uuids.bitmap != 0

    @property
    def begin_unknown(self) -> bool:
        """May the disk of our target still say that it is good?

        It becomes Inconsistent when it hears of the resync. Dead before that is durable there, it comes back as
        what it was, so it has to be fenced like any other peer.
        """
        return self.source is not None and not self.source.asked

    def exposes(self, current: int) -> bool:
        """May data of the generation *current* be what applications here saw last?

        DRBD goes by the generation alone. But what the peer wrote for a Primary without a disk counts as soon as
        it was answered, whether or not the peer's word of a new generation has arrived.
        """
        return not self.outrun and self.exposed in (0, current & ~1)

    @property
    def n_bits(self) -> int:
        return self.bitmap.n_bits

    def readable_locally(self, offset: int, length: int) -> bool:
        """May a read be served here: UpToDate, or a sync target's disk that is in sync in this range.

        Between resyncs an Inconsistent disk is out of the mirror, and only the peer marks what it misses.
        """
        disk = self.state.disk
        if disk == DiskState.UP_TO_DATE:
            return True
        if disk != DiskState.INCONSISTENT or self.bitmap.n_bits == 0:
            return False
        first, end = offset >> 12, ((offset + length - 1) >> 12) + 1
        return self.state.conn > ConnState.CONNECTED and not self.bitmap.any(first, end)

    # ------------------------------------------------------------------------------ metadata

    def flags(self) -> MdFlag:
        """The flags word as the superblock must show it now."""
        if self.state.disk < DiskState.INCONSISTENT:  # attach is not decided: leave what was found
            flags = MdFlag(self.last_flags) & ~MdFlag.AL_CLEAN
        else:
            flags = MdFlag(md_flags(self.state, self.crashed_primary, self.last_flags))
        flags &= ~(MdFlag.FULL_SYNC | MdFlag.AL_DISABLED | MdFlag.SYNC_ENDING)
        if self.sync_ending:
            flags |= MdFlag.SYNC_ENDING
        if self.begin_unknown:
            flags &= ~MdFlag.PEER_OUT_DATED
        if self.leaving:
            flags &= ~MdFlag.WAS_UP_TO_DATE
        if self.primary_hold:
            flags |= MdFlag.PRIMARY_IND
        if self.full_sync_flag:
            flags |= MdFlag.FULL_SYNC
        if not self.config.disk_options.al_updates:
            flags |= MdFlag.AL_DISABLED
        return flags

    def superblock(self, magic: int = MAGIC_UNCLEAN, extra_flags: int = 0) -> Superblock:
        """The superblock that belongs to the present moment."""
        layout = self.layout
        assert layout is not None
        return Superblock(
            la_size_sect=self.la_size // SECTOR,
            current=self.uuids.current,
            bitmap=self.uuids.bitmap,
            history0=self.uuids.history0,
            history1=self.uuids.history1,
            device_uuid=self.device_uuid,
            flags=self.flags() | MdFlag(extra_flags),
            magic=magic,
            md_size_sect=layout.md_size_sect,
            al_offset=layout.al_offset,
            al_nr_extents=self.al_nr_extents,
            bm_offset=layout.bm_offset,
            bm_bytes_per_bit=4096,
            la_peer_max_bio_size=self.la_peer_max_bio_size,
            al_stripes=layout.al_stripes,
            al_stripe_size_4k=layout.al_stripe_size_4k,
        )

    # ------------------------------------------------------------------------------ out of sync

    def set_out_of_sync(self, offset: int, length: int) -> int:
        """Mark every block the range touches; returns how many bits were newly set."""
        if not self.bitmap.n_bits or not length:
            return 0
        return self.bitmap.set(offset >> 12, min(((offset + length - 1) >> 12) + 1, self.bitmap.n_bits))

    def set_ranges_out_of_sync(self, ranges: Buffer) -> None:
        """Mark blocks of many writes, as `batches.settle_epoch` has packed them."""
        if self.bitmap.n_bits and len(ranges):
            packed = np.unique(np.frombuffer(ranges, np.uint64))
            self.bitmap.set_many(packed >> np.uint64(RANGE_SHIFT), packed & np.uint64((1 << RANGE_SHIFT) - 1))

    def set_in_sync(self, offset: int, length: int) -> int:
        """Clear the bits of blocks wholly inside the range; returns how many were newly cleared.

        The end of the device counts as aligned.
        """
        n_bits = self.bitmap.n_bits
        if not n_bits:
            return 0
        end = n_bits if offset + length >= self.size else (offset + length) >> 12
        first = (offset + 4095) >> 12
        return self.bitmap.clear(first, end) if first < end else 0

    def are_in_sync(self, writes: Iterable[DiskOp]) -> None:
        """Both disks have these writes."""
        if not self.bitmap.n_bits:
            return
        blocks = []
        for write in writes:
            if write.length == BLOCK and not write.offset & BLOCK - 1:
                blocks.append(write.offset >> BLOCK_SHIFT)
            else:
                self.set_in_sync(write.offset, write.length)
        self.bitmap.clear_each(blocks)
