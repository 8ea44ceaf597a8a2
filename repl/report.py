"""What status shows, computed from the machine; and the sentence a client gets that may not open an export.

Source of the promotion rules: drbdsetup events2 (may_promote, promotion_score).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .events import (
    ConnectionStatus,
    PeerVolumeStatus,
    ResourceStatus,
    SyncProgress,
    VolumeStatus,
)
from .states import ConnState, DiskState, Role
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine


def open_refusal(e: Engine, vol: Volume) -> str | None:
    """Why a client may not open the export, or None."""
    s, name, node = vol.state, e.config.name, e.config.node
    if s.role != Role.PRIMARY:
        promote = f"romote it here with 'tandemadm primary {name}'."
        if s.peer == Role.PRIMARY:
            return f"{name} is Secondary on {node}. {e.config.peer} is Primary: use its export, or p{promote}"
        return f"{name} is Secondary on {node}. P{promote}"
    if not vol.size:
        return f"{name} on {node} has no size yet: attach its disk or connect it to {e.config.peer}."
    return None


def resource_status(e: Engine) -> ResourceStatus:
    """The status of the whole resource at this moment."""
    volumes = [e.volumes[n] for n in sorted(e.volumes)]
    first = volumes[0].state
    suspended = [
        word
        for word, flag in (
            ("user", any(v.state.susp for v in volumes)),
            ("no-data", any(v.state.susp_nod for v in volumes)),
            ("fencing", any(v.state.susp_fen for v in volumes)),
        )
        if flag
    ]
    role = Role.PRIMARY if any(v.state.role == Role.PRIMARY for v in volumes) else Role.SECONDARY
    may_promote, score = _promotion(volumes)
    return ResourceStatus(
        name=e.config.name,
        node_id=e.config.node_id,
        role=str(role),
        suspended=",".join(suspended) or "no",
        write_ordering=_write_ordering(volumes),
        may_promote=may_promote,
        promotion_score=score,
        volumes=tuple(_volume(e, v) for v in volumes),
        connection=ConnectionStatus(
            name=e.config.peer,
            node_id=e.config.peer_node_id,
            connection=e.cstate.connection,
            cstate=str(first.conn),
            role=str(max((v.state.peer for v in volumes), key=lambda r: r == Role.PRIMARY)),
            congested=e.congested,
            ap_in_flight=sum(v.n_pending for v in volumes) * 4096,
            rs_in_flight=sum(v.target.bytes_out for v in volumes if v.target),
            protocol_version=e.link.apv if e.connected else 0,
            local=str(e.config.address),
            remote=str(e.config.peer_address),
            configured=e.cstate != ConnState.STAND_ALONE,
            volumes=tuple(_peer_volume(e, v) for v in volumes),
        ),
    )


def _write_ordering(volumes: list[Volume]) -> str:
    options = [v.config.disk_options for v in volumes]
    if any(o.disk_flushes for o in options):
        return "flush"
    return "drain" if any(o.disk_drain for o in options) else "none"


def _promotion(volumes: list[Volume]) -> tuple[bool, int]:
    """may_promote, and the score: 10000 with all disks, 100 per UpToDate volume here, 1 per replica."""
    good = DiskState.UP_TO_DATE
    nobody = all(v.state.role != Role.PRIMARY != v.state.peer for v in volumes)
    reachable = all(good in (v.state.disk, v.state.pdsk) for v in volumes)
    replicas = min((v.state.disk == good) + (v.state.pdsk == good) for v in volumes)
    if not replicas:
        return False, 0
    usable = (DiskState.UP_TO_DATE, DiskState.CONSISTENT, DiskState.INCONSISTENT)
    score = 10000 if all(v.state.disk in usable for v in volumes) else 0
    score += 100 * min(sum(v.state.disk == good for v in volumes), 99) + replicas
    return nobody and reachable, score


def _volume(e: Engine, v: Volume) -> VolumeStatus:
    blocked = [
        word for word, flag in (("upper", v.state.suspended or bool(v.held)), ("lower", bool(v.io_holds))) if flag
    ]
    gi = ""
    if v.attached:
        gi = v.superblock().gi_line() if v.layout is not None else ""
    return VolumeStatus(
        number=v.number,
        minor=v.config.minor,
        disk=str(v.state.disk),
        client=not v.config.disk,
        open=v.open_count > 0,
        size=v.size,
        read=v.bytes_read,
        written=v.bytes_written,
        al_writes=v.al_writes,
        bm_writes=v.bm_writes,
        upper_pending=v.n_app,
        lower_pending=v.n_local,
        al_suspended=v.al_suspended,
        blocked=",".join(blocked) or "no",
        backing_device=v.config.disk if v.attached else "",
        flags=gi,
    )


def _peer_volume(e: Engine, v: Volume) -> PeerVolumeStatus:
    s = v.state
    paused = [
        word for word, flag in (("user", s.user_isp), ("peer", s.peer_isp), ("dependency", s.aftr_isp)) if flag
    ]
    sync = _progress(e, v) if v.syncing and v.rs_total else None
    done = None
    if v.verify is not None:
        done = 100.0 * (1 - v.verify.left / max(v.verify.total, 1))
    elif v.syncing and v.bitmap.n_bits:
        done = 100.0 * (1 - v.bitmap.weight / v.bitmap.n_bits)
    return PeerVolumeStatus(
        number=v.number,
        replication=s.conn.replication,
        peer_disk=str(s.pdsk),
        resync_suspended=",".join(paused) or "no",
        received=v.bytes_received,
        sent=v.bytes_sent,
        out_of_sync=min(v.bitmap.weight * 4096, v.size),
        pending=v.n_pending,
        unacked=v.n_unacked,
        done=done,
        sync=sync,
    )


def _progress(e: Engine, v: Volume) -> SyncProgress:
    left = v.bits_left
    paused = v.rs_paused_s + (e.now - v.rs_paused_at if v.rs_paused_at is not None else 0.0)
    elapsed = max(e.now - v.rs_started - paused, 1e-3)
    average = max(v.rs_total - left, 0) * 4096 / elapsed
    rate = average
    if v.rs_marks:
        since, bits = v.rs_marks[0]
        if e.now - since > 0.1:
            rate = max(bits - left, 0) * 4096 / (e.now - since)
    return SyncProgress(
        total=v.rs_total * 4096,
        left=left * 4096,
        failed=v.rs_failed * 4096,
        started_s=e.now - v.rs_started,
        paused_s=paused,
        rate=rate,
        average=average,
        eta_s=left * 4096 / rate if rate > 0 else None,
        position=None if v.verify is None else v.verify.cursor * 4096,
    )
