"""A volume's local disk from attach to detach: its size, its bitmap as a whole, and its failures.

Relies on `attach.load` (run by the edge) for a disk whose activity log is already applied. The order rule
of this room: from the moment the disk may be written, its superblock says so durably (unclean, with the
right flags), so `Volume.io_holds` keeps applications out until it does.

Source: drbd_nl.c, drbd_adm_attach, drbd_determine_dev_size; drbd_int.h, __drbd_chk_io_error_.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .activity_log import ActivityLog, initialised_block
from .bitmap import Bitmap
from .config import Fencing
from .errors import Refusal
from .events import Attach, Attached, ReleaseDisk, SizeChanged
from .meta_writer import MetaWriter
from .metadata import MdFlag
from .peer import new_size
from .states import ConnState, DiskState, Role, State
from .units import SECTOR, n_bits_of
from .uuids import UuidSet
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine

Then = Callable[[Refusal | None], None]


class Disks:
    """The disks of all volumes; `Volume` holds their data, this room what happens to them."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self._attaching: dict[int, Then] = {}  # by volume
        self._deferred: dict[int, Attached] = {}  # attach while the handshake decides

    # ------------------------------------------------------------------------------ attach

    def attach(self, vol: Volume, then: Then) -> None:
        """Begin to attach; *then* gets a refusal, or None when the disk is in use."""
        changed = self.e.change(vol, replace(vol.state, disk=DiskState.ATTACHING))
        if isinstance(changed, Refusal):
            then(changed)
            return
        vol.attach_ticket = self.e.new_ticket()
        self._attaching[vol.number] = then
        self.e.out.effects.append(Attach(vol.attach_ticket, vol.number))

    def attach_refused(self, vol: Volume, why: str) -> None:
        """The decision with the peer was against this disk."""
        self._answer(vol, Refusal(150, "Can only attach to the data we lost last (see kernel log).", why))
        self.e.change(vol, replace(vol.state, disk=DiskState.FAILED), hard=True, why=why)

    def give_up_attach(self, vol: Volume, why: str) -> None:
        """*why* came while the disk was Attaching, which may take as long as it takes to read it: it is let go."""
        self._answer(vol, Refusal(129, "Interrupted by Signal", f"{why} came before the disk was attached"))
        self.e.change(vol, replace(vol.state, disk=DiskState.FAILED), hard=True, why=why)

    def failed_to_attach(self, vol: Volume, ticket: int, refusal: Refusal) -> None:
        if ticket == vol.attach_ticket and vol.state.disk == DiskState.ATTACHING:
            self.e.change(vol, replace(vol.state, disk=DiskState.DISKLESS), hard=True, why=refusal.text)
            self._answer(vol, refusal)

    def _answer(self, vol: Volume, refusal: Refusal | None) -> None:
        then = self._attaching.pop(vol.number, None)
        if then:
            then(refusal)

    def handshake_settled(self) -> None:
        """The handshake is over one way or the other: take up what was attached meanwhile."""
        deferred, self._deferred = self._deferred, {}
        for event in deferred.values():
            self.attached(event)

    def attached(self, event: Attached) -> None:
        vol = self.e.volumes[event.volume]
        if event.ticket != vol.attach_ticket or vol.state.disk != DiskState.ATTACHING:
            self.e.out.effects.append(ReleaseDisk(event.volume))
            return
        if vol.state.conn == ConnState.WF_REPORT_PARAMS:
            self._deferred[vol.number] = event
            return
        sb, s = event.disk.superblock, vol.state
        if s.role == Role.PRIMARY and not s.connected and not vol.exposes(sb.current):
            self.e.change(vol, replace(s, disk=DiskState.DISKLESS), hard=True)
            self.e.out.effects.append(ReleaseDisk(vol.number))
            self._answer(vol, Refusal(150, "Can only attach to the data we lost last (see kernel log)."))
            return
        first_time = self._load(vol, event)
        found = self._found_state(vol, sb.flags)
        vol.io_holds += 1
        if s.connected:
            vol.found_disk, vol.found_pdsk = found.disk, found.pdsk
            vol.peer_uuids = None  # the peer tells its set as it is now once it hears of our disk (drbd_adm_attach)
            new = replace(s, disk=DiskState.NEGOTIATING)
        else:
            new = found
        if first_time:
            self._initialise(vol)
        self.e.change(vol, new, hard=True, why="attached")

        def durable(ok: bool) -> None:
            vol.io_holds -= 1
            vol.refresh()
            self._answer(vol, None if ok else Refusal(118, "IO error(s) occurred during initial access to meta-data."))
            self.e.mirror.release_held(vol)

        self.e.write_superblock(vol, durable)

    def _load(self, vol: Volume, event: Attached) -> bool:
        """Take over what was read; True when the disk was never in use before."""
        disk, sb, options = event.disk, event.disk.superblock, vol.config.disk_options
        vol.layout = disk.layout
        vol.bitmap = disk.bitmap
        vol.al = ActivityLog(options.al_extents, disk.layout.al_blocks, disk.layout.al_stripes)
        vol.al_nr_extents = vol.al.slots
        vol.uuids = UuidSet(sb.current, sb.bitmap, sb.history0, sb.history1)
        vol.sync_ending = bool(sb.flags & MdFlag.SYNC_ENDING)
        vol.device_uuid = sb.device_uuid
        vol.last_flags = sb.flags
        vol.full_sync_flag = bool(sb.flags & MdFlag.FULL_SYNC)
        frozen_without_data = vol.state.role == Role.PRIMARY and vol.state.susp_nod
        vol.crashed_primary = bool(
            sb.flags & MdFlag.CRASHED_PRIMARY or (sb.flags & MdFlag.PRIMARY_IND and not frozen_without_data)
        )
        vol.la_peer_max_bio_size = sb.la_peer_max_bio_size
        vol.la_size = sb.la_size_sect * SECTOR
        vol.data_size = disk.data_size
        vol.sparse = event.sparse
        vol.stable_version = -1  # a process before this one may have left something unflushed
        vol.usable = disk.layout.usable & ~(SECTOR - 1)
        vol.meta = MetaWriter(
            vol, lambda op: self.e.out.disk.append(op),
            lambda error, of_data: self.failed(vol, error, write=True, meta=True, flush=of_data),
        )  # fmt: skip
        if disk.marked:
            self.e.note(vol, f"Marked additional {disk.marked * 4} KB as out-of-sync based on AL.")
        if disk.corrupt:
            self.e.note(vol, f"{disk.corrupt} corrupt AL transactions found", level="warning")
        first_time = not vol.la_size
        size = new_size(
            vol.usable, vol.peer_size if vol.state.connected else 0, options.size * SECTOR, vol.la_size
        )
        if n_bits_of(size) != vol.bitmap.n_bits:
            vol.bitmap.resize(n_bits_of(size), set_new=True)
        vol.la_size = size
        self._set_size(vol, size)
        if vol.full_sync_flag or (vol.crashed_primary and sb.flags & MdFlag.AL_DISABLED):
            self.set_all(vol, None)
        vol.al_suspended = not first_time and vol.bitmap.n_bits > 0 and vol.bitmap.weight == vol.bitmap.n_bits
        return first_time

    def _initialise(self, vol: Volume) -> None:
        """First use of fresh metadata: everything is out of sync, and the log gets its first blocks."""
        assert vol.meta is not None
        self.set_all(vol, None)
        vol.al_suspended = True
        vol.meta.write_ring(vol.al.initial_ring())

    def _found_state(self, vol: Volume, flags: int) -> State:
        """The state the metadata speaks for. Source: drbd_adm_attach."""
        if not flags & MdFlag.CONSISTENT:
            disk = DiskState.INCONSISTENT
        elif flags & MdFlag.WAS_UP_TO_DATE:
            disk = DiskState.CONSISTENT
        else:
            disk = DiskState.OUTDATED
        peer_is_old = flags & MdFlag.PEER_OUT_DATED and not vol.end_unknown
        pdsk = DiskState.OUTDATED if peer_is_old else DiskState.D_UNKNOWN
        fencing = vol.config.disk_options.fencing
        if disk == DiskState.CONSISTENT and (pdsk == DiskState.OUTDATED or fencing == Fencing.DONT_CARE):
            disk = DiskState.UP_TO_DATE
        return replace(vol.state, disk=disk, pdsk=pdsk)

    # ------------------------------------------------------------------------------ size

    def _set_size(self, vol: Volume, size: int) -> None:
        if size != vol.size:
            vol.size = size
            self.e.out.effects.append(SizeChanged(vol.number, size))

    def adopt_size(self, vol: Volume, size: int, set_new: bool) -> None:
        """The agreed size of the volume is now *size* bytes."""
        if vol.attached and size != vol.la_size:
            vol.bitmap.resize(n_bits_of(size), set_new=set_new)
            vol.la_size = size
            vol.al_suspended = vol.al_suspended and vol.bitmap.weight == vol.bitmap.n_bits
            self.e.write_superblock(vol, None)
            assert vol.meta is not None
            vol.meta.write_changed()
        self._set_size(vol, size)

    # ------------------------------------------------------------------------------ the bitmap as a whole

    def set_all(self, vol: Volume, then: Callable[[], None] | None) -> None:
        """Everything is out of sync. *then*: once a crash can not undo it (flag FULL_SYNC is durable).

        The pages follow in the background; the flag goes when all of them are on disk.
        """
        assert vol.meta is not None
        meta = vol.meta
        vol.full_sync_flag = True
        vol.bitmap.set_all()

        def written(ok: bool) -> None:
            if ok and vol.meta is meta:
                vol.full_sync_flag = False
                meta.superblock()

        def flagged(ok: bool) -> None:
            if ok and vol.meta is meta:
                meta.write_changed(written)
                if then:
                    then()

        meta.superblock(flagged)

    def clear_bitmap(self, vol: Volume) -> None:
        vol.bitmap.clear_all()
        vol.full_sync_flag = False
        vol.al_suspended = False
        assert vol.meta is not None
        vol.meta.write_changed()

    # ------------------------------------------------------------------------------ failure and detach

    def failed(self, vol: Volume, error: int, write: bool, meta: bool = False, *, flush: bool = False) -> None:
        """The local disk returned *error*; what follows is `on-io-error`, for metadata and flushes always detach.

        *flush*: what failed had to make data stable (a flush, or a write with FUA). It may have been about any
        block written since the last one, and the kernel says so once. That costs the disk: nobody knows which blocks
        are lost, and what metadata is on the disk still names all of them. So no more of it is written, not even by
        a detach that has begun.
        """
        if flush:
            self.e.mirror.unflushed_lost(vol)
        if vol.state.disk > DiskState.FAILED:
            self._follow(vol, error, write, meta, flush)
        if flush and vol.meta is not None:
            vol.meta.kill(0)

    def _follow(self, vol: Volume, error: int, write: bool, meta: bool, flush: bool) -> None:
        """What `on-io-error` says of *error*, told to the operator and done."""
        policy = vol.config.disk_options.on_io_error
        passed_on = policy == "pass_on" and not meta and not flush
        what = "meta-data" if meta and not flush else "data"
        during = ""
        if flush:
            during = " in the flush before meta-data is written" if meta else " in a flush"
        also = ", detached all the same" if policy == "pass_on" and not passed_on else ""
        name = errno.errorcode.get(error, str(error))
        self.e.note(
            vol, f"Local {what} IO error {name} on {vol.config.disk}{during}, on-io-error {policy}{also}",
            level="error",
        )  # fmt: skip
        if passed_on:
            if write and vol.state.disk == DiskState.UP_TO_DATE:
                self.e.change(vol, replace(vol.state, disk=DiskState.INCONSISTENT), hard=True, why="I/O error")
                self.tell_inconsistent(vol)
            return
        if policy == "call-local-io-error":
            self.e.run_handler("local-io-error", vol, None)
        self.e.change(vol, replace(vol.state, disk=DiskState.FAILED), hard=True, why="I/O error")

    def tell_inconsistent(self, vol: Volume) -> None:
        """Tell the peer that this disk is no good copy any more, once a crash cannot make it one again.

        From then on the peer goes on without us, unfenced and in the generation that we share.
        """

        def durable(ok: bool) -> None:
            if ok and vol.state.connected and vol.state.disk == DiskState.INCONSISTENT:
                self.e.peer.send_state(vol)

        self.e.write_superblock(vol, durable)

    def detach_cleanly(self, vol: Volume, then: Callable[[bool], None]) -> None:
        """Write the last bitmap and superblock. A Secondary's metadata is left clean, ready for anyone."""
        assert vol.meta is not None
        blocks = None
        if vol.state.role != Role.PRIMARY and not vol.al.busy and vol.state.pdsk >= DiskState.INCONSISTENT:
            block = initialised_block()
            blocks = [(position, block) for position in range(vol.al.al_blocks)]
        vol.meta.close(blocks, then)

    def local_idle(self, vol: Volume) -> None:
        """Called when an operation on the disk ended: a failed disk goes once nothing is out on it."""
        if vol.state.disk != DiskState.FAILED or vol.n_local or (vol.meta is not None and vol.meta.n_out):
            return
        if vol.meta is not None:
            meta, vol.meta = vol.meta, None
            meta.kill(0)
        self.e.mirror.disk_gone(vol)
        vol.layout = None
        vol.bitmap = Bitmap(0)
        vol.al = ActivityLog()
        vol.usable = 0
        vol.al_suspended = False
        vol.full_sync_flag = False
        self._answer(vol, Refusal(118, "IO error(s) occurred during initial access to meta-data."))
        self.e.change(vol, replace(vol.state, disk=DiskState.DISKLESS), hard=True)
        self.e.out.effects.append(ReleaseDisk(vol.number))
