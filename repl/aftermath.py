"""What follows from a state change, computed from the state before and the state after.

Every consequence of a transition is here, in one order: generations and flags, then what the peer is told,
then the sequences that begin or end. Source: drbd_state.c, after_state_ch; wire tables of the state packets.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from .events import EndWrite
from .metadata import MdFlag
from .states import ConnState, DiskState, Role, State
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine
    from .meta_writer import MetaWriter

C = ConnState
D = DiskState

PAUSABLE: Final = frozenset((C.SYNC_SOURCE, C.SYNC_TARGET, C.PAUSED_SYNC_S, C.PAUSED_SYNC_T))


def lost_peer_data(old: State, new: State) -> bool:
    """Did this side just lose sight of the peer's copy?"""
    had = old.pdsk in (D.INCONSISTENT, D.CONSISTENT, D.UP_TO_DATE)
    lost = new.pdsk < D.INCONSISTENT or new.pdsk in (D.D_UNKNOWN, D.OUTDATED)
    knew_nothing = old.pdsk == D.D_UNKNOWN and new.pdsk in (D.DISKLESS, D.FAILED, D.OUTDATED)
    return (had and lost) or knew_nothing


def follow(e: Engine, vol: Volume, old: State, new: State, *, tell_peer: bool) -> None:
    """Carry out what follows from *vol* having gone from *old* to *new*."""
    _generations(e, vol, old, new)
    _flags(e, vol, new)
    if vol.state is not new:
        return
    if e.connected and new.conn > C.WF_REPORT_PARAMS:
        if tell_peer:
            _tell_peer(e, vol, old, new)
        e.log.close_epoch()
    if old.pdsk >= D.INCONSISTENT > new.pdsk and new.connected:
        e.log.mark_out_of_sync(vol)
    if old.disk >= D.INCONSISTENT > new.disk:
        e.replica.disk_lost()
    _sequences(e, vol, old, new)
    _disk(e, vol, old, new)
    if new.role == Role.PRIMARY and _no_data(new) and not (old.role == Role.PRIMARY and _no_data(old)):
        e.run_handler("pri-on-incon-degr", vol, None)
    if not vol.state.suspended:
        if old.suspended:
            e.mirror.release_gated(vol)
        e.mirror.release_held(vol)


def _no_data(s: State) -> bool:
    return s.disk < D.UP_TO_DATE and s.pdsk < D.UP_TO_DATE


def _generations(e: Engine, vol: Volume, old: State, new: State) -> None:
    """The role bit, the end of the log's suspension, and new generations."""
    if old.role == Role.PRIMARY != new.role and vol.attached:
        vol.uuids = vol.uuids.with_role(False)  # a promotion sets the bit once its new generation is made
    if new.connected and vol.al_suspended:
        vol.al_suspended = False
        vol.refresh()
    target_may_have_ended = vol.end_unknown and old.connected and not new.connected
    free = not vol.uuids.bitmap and vol.unproven is None
    if new.disk == D.UP_TO_DATE and (free or target_may_have_ended):
        peer_writes_here = (
            old.peer != Role.PRIMARY and new.peer == Role.PRIMARY and new.pdsk < D.INCONSISTENT
        )
        # A Primary without a disk let the peer begin a generation; alone with its disk again, it needs its own.
        disk_back = old.role == new.role == Role.PRIMARY and old.disk < D.UP_TO_DATE and not new.connected
        primary = Role.PRIMARY in (new.role, new.peer)
        if (primary and (lost_peer_data(old, new) or target_may_have_ended)) or peer_writes_here or disk_back:
            # Put off only while the log waits to be sent again, and only under C is it complete enough for that.
            # On a connection that stands, a Primary without a disk writes here however frozen we are.
            if new.suspended and e.config.net.protocol == "C" and (e.log.kept or not new.connected):
                vol.new_current_pending = True
            else:
                e.start_new_generation(vol)
                if new.connected and e.connected:
                    e.peer.send_uuids(vol)
    if old.disk == old.pdsk == D.INCONSISTENT and old.peer != Role.PRIMARY == new.peer:
        vol.consider_resync = True
    if new.role != Role.PRIMARY or new.disk == D.UP_TO_DATE:
        vol.outrun = False
    elif new.disk < D.NEGOTIATING and new.connected and new.pdsk == D.UP_TO_DATE:
        vol.outrun = True
    if new.disk == D.UP_TO_DATE and not vol.completion_gates:
        vol.exposed = vol.uuids.current & ~1
    # What our own disk last was is of no account for who begins to read the peer's; that one says when it moves on.
    begins = new.conn in (C.SYNC_TARGET, C.PAUSED_SYNC_T) or old.role != Role.PRIMARY
    reads_there = new.role == Role.PRIMARY and new.connected and new.disk < D.UP_TO_DATE == new.pdsk
    if begins and reads_there and vol.exposed and vol.peer_uuids:
        vol.exposed = vol.peer_uuids.current & ~1


def _flags(e: Engine, vol: Volume, new: State) -> None:
    """The superblock's flags are a function of the state; a change of them is written."""
    if vol.attached and new.disk >= D.INCONSISTENT:
        if vol.last_flags & ~vol.flags() & MdFlag.PRIMARY_IND and vol.meta is not None:
            _hold_primary_mark(e, vol, vol.meta)
        flags, before = vol.flags(), vol.last_flags
        vol.last_flags = flags
        if flags & ~before & MdFlag.PRIMARY_IND:
            mark_primary(e, vol)
        elif flags != before:
            e.write_superblock(vol, None)
    if new.disk == new.pdsk == D.UP_TO_DATE:
        vol.crashed_primary = False  # after the flags, as in DRBD: it leaves the disk with the next change


def mark_primary(e: Engine, vol: Volume) -> None:
    """No write that relies on the activity log starts before PRIMARY_IND, which has it applied, is on disk."""
    vol.unmarked += 1
    vol.io_holds += 1
    vol.refresh()

    def durable(ok: bool) -> None:
        vol.unmarked -= 1
        vol.io_holds -= 1
        vol.refresh()
        e.mirror.release_held(vol)
        e.replica.extents_ready(vol)

    e.write_superblock(vol, durable)


def _hold_primary_mark(e: Engine, vol: Volume, meta: MetaWriter) -> None:
    """Without PRIMARY_IND nobody applies the activity log: the bits and the data come to disk first."""
    vol.primary_hold = True

    def written(ok: bool) -> None:
        if vol.meta is meta:
            vol.primary_hold = False
            if ok and vol.attached and vol.flags() != vol.last_flags:
                vol.last_flags = vol.flags()
                e.write_superblock(vol, None)

    meta.write_changed(written)


def _tell_peer(e: Engine, vol: Volume, old: State, new: State) -> None:
    """P_SIZES, P_UUIDS and P_STATE as the tables of the protocol demand."""
    peer = e.peer
    attached_now = old.disk == D.ATTACHING and new.disk == D.NEGOTIATING
    without = (D.DISKLESS, D.ATTACHING)  # a peer that was attaching during the handshake has told us so
    peer_attached = old.pdsk in without and new.pdsk not in (*without, D.D_UNKNOWN)
    if attached_now:
        peer.send_sizes(vol, 0)
        peer.send_uuids(vol)
        peer.send_state(vol)
    elif peer_attached:
        if not vol.uuids_told:
            peer.send_uuids(vol)
        peer.send_state(vol)
    elif (
        (old.conn == C.WF_REPORT_PARAMS and new.connected)
        or (old.disk != new.disk and new.disk in (D.FAILED, D.DISKLESS))
        or old.aftr_isp != new.aftr_isp
        or old.user_isp != new.user_isp
        or (old.conn != C.AHEAD and new.conn == C.AHEAD)
        or (old.disk < D.UP_TO_DATE and old.conn >= C.SYNC_SOURCE and new.conn == C.CONNECTED)
    ):
        peer.send_state(vol)


def _sequences(e: Engine, vol: Volume, old: State, new: State) -> None:
    """Bitmap exchange, resync, pause: what a connection state begins or ends."""
    if old.conn == new.conn:
        return
    resync = e.resync
    if new.conn != C.WF_SYNC_UUID:
        vol.untouched = new.conn == C.STARTING_SYNC_T and old.disk == D.UP_TO_DATE
    if old.conn > C.CONNECTED and new.conn <= C.CONNECTED:
        resync.aborted(vol)
    if old.conn > C.CONNECTED and new.conn <= C.CONNECTED and vol.verify:
        e.verify.aborted(vol)
    if new.conn != C.CONNECTED:
        vol.consider_resync = False  # the connection went, or a resync was agreed to: then that one it is
    if new.conn < C.CONNECTED:
        vol.pending_sync_uuid = None
    match new.conn:
        case C.WF_BITMAP_S:
            resync.enter_bitmap_source(vol)
        case C.WF_BITMAP_T:
            resync.enter_bitmap_target(vol)
        case C.STARTING_SYNC_S:
            resync.enter_full_sync(vol)
            e.disks.set_all(vol, lambda serial=vol.conn_serial: _set_all_done(e, vol, serial))  # type: ignore[misc]
        case C.STARTING_SYNC_T:
            e.disks.set_all(vol, lambda serial=vol.conn_serial: _set_all_done(e, vol, serial))  # type: ignore[misc]
        case C.VERIFY_S:
            e.verify.begin(vol, *vol.verify_range)
        case C.VERIFY_T:
            e.verify.begin(vol)
        case C.WF_SYNC_UUID:
            if vol.pending_sync_uuid is not None:
                sync_uuid, vol.pending_sync_uuid = vol.pending_sync_uuid, None
                resync.receive_sync_uuid(vol, sync_uuid)
        case _:
            if old.conn in PAUSABLE and new.conn in PAUSABLE:
                resync.pause_changed(vol)


def _set_all_done(e: Engine, vol: Volume, serial: int) -> None:
    if vol.conn_serial != serial:
        return
    if vol.state.conn == C.STARTING_SYNC_S:
        e.resync.start_source(vol)
    else:
        e.change(vol, replace(vol.state, conn=C.WF_SYNC_UUID), hard=True)


def _disk(e: Engine, vol: Volume, old: State, new: State) -> None:
    """A disk on its way out leaves once nothing is in flight on it."""
    if new.disk == D.DISKLESS and old.disk not in (D.DISKLESS, D.FAILED, D.ATTACHING):
        vol.state = replace(new, disk=D.FAILED)  # a decision against it; the operations still out come first
        vol.refresh()
    if vol.state.disk == D.FAILED and old.disk != D.FAILED:
        if vol.n_local:
            e.out.effects.append(EndWrite(vol.number))
        e.disks.local_idle(vol)
