"""What `status` prints: drbdsetup 9's text and JSON, and DRBD 8.4's one-line queries.

Pure functions from a `ResourceStatus` to text. Sizes come in bytes and are printed in KiB, amounts in
flight in sectors, as drbdsetup prints them. Field order and the rules for leaving fields out are those
of drbdsetup 9 (drbdsetup(8), "drbdsetup status").
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from tandem.repl.events import (
    ConnectionStatus,
    PeerVolumeStatus,
    ResourceStatus,
    SyncProgress,
    VolumeStatus,
)

ETA_UNKNOWN: Final = 987654321  # drbdsetup's "estimated-seconds-to-finish" when there is no estimate
_MIB: Final = 1 << 20


class _Lines:
    """Items joined by blanks into lines of at most *width* columns, continued with an indentation."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.lines: list[str] = []
        self.current = ""

    def add(self, item: str, indent: int) -> None:
        if self.current and len(self.current) + 1 + len(item) > self.width:
            self.end()
        self.current += f" {item}" if self.current else " " * indent + item

    def end(self) -> None:
        if self.current:
            self.lines.append(self.current)
        self.current = ""

    def text(self) -> str:
        self.end()
        return "".join(f"{line}\n" for line in self.lines)


def status_text(
    resource: ResourceStatus, *, verbose: bool = False, statistics: bool = False, width: int = 80,
    terminal: bool = False,
) -> str:  # fmt: skip
    """One resource as ``drbdsetup status`` prints it, ended by an empty line.

    *terminal*: stdout is one, so that what is only of use to scripts is left out.
    """
    out = _Lines(width)
    _resource_lines(out, resource, verbose, statistics)
    single = len(resource.volumes) == 1
    for volume in resource.volumes:
        _volume_lines(out, volume, single, verbose, statistics, terminal)
    _connection_lines(out, resource.connection, verbose)
    if verbose or statistics or resource.connection.connection == "Connected":
        for peer_volume in resource.connection.volumes:
            _peer_volume_lines(out, peer_volume, single, verbose, statistics, terminal)
    return out.text() + "\n"


def _resource_lines(out: _Lines, resource: ResourceStatus, verbose: bool, statistics: bool) -> None:
    out.add(resource.name, 0)
    if verbose:
        out.add(f"node-id:{resource.node_id}", 4)
    out.add(f"role:{resource.role}", 4)
    if verbose or resource.suspended != "no":
        out.add(f"suspended:{resource.suspended}", 4)
    if verbose:
        out.add("force-io-failures:no", 4)
    if verbose and statistics:
        out.end()
        out.add(f"write-ordering:{resource.write_ordering}", 4)
    out.end()


def _volume_lines(
    out: _Lines, volume: VolumeStatus, single: bool, verbose: bool, statistics: bool, terminal: bool
) -> None:
    indent = 2
    if verbose or not (single and volume.number == 0):
        out.add(f"volume:{volume.number}", indent)
        indent = 6
    if verbose:
        out.add(f"minor:{volume.minor}", indent)
    out.add(f"disk:{volume.disk}", indent)
    indent = 6
    if volume.disk == "Diskless" and (verbose or not terminal):
        out.add(f"client:{yes_no(volume.client)}", indent)
    if verbose:
        out.add(f"backing_dev:{volume.backing_device or 'none'}", indent)
        out.add("quorum:yes", indent)
        out.add(f"open:{yes_no(volume.open)}", indent)
    if statistics:
        out.end()
        for item in volume_statistics(volume, verbose).items():
            out.add("{}:{}".format(*item), indent)
    if verbose or volume.blocked != "no":
        out.add(f"blocked:{volume.blocked}", indent)
    out.end()


def _connection_lines(out: _Lines, peer: ConnectionStatus, verbose: bool) -> None:
    out.add(peer.name, 2)
    if verbose:
        out.add(f"node-id:{peer.node_id}", 6)
    if verbose or peer.connection != "Connected":
        out.add(f"connection:{peer.connection}", 6)
    if verbose or peer.connection == "Connected":
        out.add(f"role:{peer.role}", 6)
    if verbose:
        out.add("tls:no", 6)
    if verbose or peer.congested:
        out.add(f"congested:{yes_no(peer.congested)}", 6)
        out.add(f"ap-in-flight:{peer.ap_in_flight // 512}", 6)
        out.add(f"rs-in-flight:{peer.rs_in_flight // 512}", 6)
    out.end()


def _peer_volume_lines(
    out: _Lines, peer: PeerVolumeStatus, single: bool, verbose: bool, statistics: bool, terminal: bool
) -> None:
    indent = 4
    if verbose or not (single and peer.number == 0):
        out.add(f"volume:{peer.number}", indent)
        indent = 8
    if verbose or peer.replication not in ("Off", "Established"):
        out.add(f"replication:{peer.replication}", indent)
        indent = 8
    out.add(f"peer-disk:{peer.peer_disk}", indent)
    indent = 8
    if peer.peer_disk == "Diskless" and (verbose or not terminal):
        out.add("peer-client:no", indent)
    if peer.done is not None:
        out.add(f"done:{peer.done:.2f}", indent)
    if verbose or peer.resync_suspended != "no":
        out.add(f"resync-suspended:{peer.resync_suspended}", indent)
    if statistics:
        out.end()
        for item in peer_statistics(peer, verbose).items():
            if verbose or item != ("out-of-sync", 0):
                out.add("{}:{}".format(*item), indent)
        if peer.sync is not None:
            out.add(f"dbdt1:{peer.sync.rate / _MIB:.2f}", indent)
            eta = ETA_UNKNOWN if peer.sync.eta_s is None else peer.sync.eta_s
            out.add(f"eta:{eta:.0f}", indent)
    out.end()


# ------------------------------------------------------------------------------------- statistics


def yes_no(flag: bool) -> str:
    return "yes" if flag else "no"


def kib(n_bytes: int) -> int:
    """Bytes as drbdsetup prints them, in KiB rounded down."""
    return n_bytes >> 10


def volume_statistics(volume: VolumeStatus, verbose: bool = True) -> dict[str, int | str]:
    """The counters of a volume under drbdsetup's keys; without *verbose* only sizes and amounts."""
    values: dict[str, int | str] = {
        "size": kib(volume.size), "read": kib(volume.read), "written": kib(volume.written),
    }  # fmt: skip
    if verbose:
        values |= {
            "al-writes": volume.al_writes, "bm-writes": volume.bm_writes,
            "upper-pending": volume.upper_pending, "lower-pending": volume.lower_pending,
            "al-suspended": yes_no(volume.al_suspended),
        }  # fmt: skip
    return values


def peer_statistics(peer: PeerVolumeStatus, verbose: bool = True) -> dict[str, int]:
    """The counters of a peer's volume under drbdsetup's keys."""
    values = {
        "received": kib(peer.received), "sent": kib(peer.sent), "out-of-sync": kib(peer.out_of_sync),
    }  # fmt: skip
    if verbose:
        values |= {"pending": peer.pending, "unacked": peer.unacked}
    return values


# ------------------------------------------------------------------------------------------- JSON


def status_json(resources: Iterable[ResourceStatus]) -> str:
    """``drbdsetup status --json``: an array of resources, with drbdsetup's keys in its order."""
    return json.dumps([_resource_json(resource) for resource in resources], indent=2)


def _resource_json(resource: ResourceStatus) -> dict[str, Any]:
    reasons = set(resource.suspended.split(","))
    sizes = {volume.number: volume.size for volume in resource.volumes}
    return {
        "name": resource.name,
        "node-id": resource.node_id,
        "role": resource.role,
        "suspended": resource.suspended != "no",
        "suspended-user": "user" in reasons,
        "suspended-no-data": "no-data" in reasons,
        "suspended-fencing": "fencing" in reasons,
        "suspended-quorum": "quorum" in reasons,
        "force-io-failures": False,
        "write-ordering": resource.write_ordering,
        "devices": [_volume_json(volume) for volume in resource.volumes],
        "connections": [_connection_json(resource.connection, sizes)],
        "may_promote": resource.may_promote,  # these two only events2 has in DRBD
        "promotion_score": resource.promotion_score,
    }


def _volume_json(volume: VolumeStatus) -> dict[str, Any]:
    return {
        "volume": volume.number,
        "minor": volume.minor,
        "disk-state": volume.disk,
        "client": volume.client,
        "open": volume.open,
        "quorum": True,
        "size": kib(volume.size),
        "read": kib(volume.read),
        "written": kib(volume.written),
        "al-writes": volume.al_writes,
        "bm-writes": volume.bm_writes,
        "upper-pending": volume.upper_pending,
        "lower-pending": volume.lower_pending,
    }


def _connection_json(peer: ConnectionStatus, sizes: dict[int, int]) -> dict[str, Any]:
    return {
        "peer-node-id": peer.node_id,
        "name": peer.name,
        "connection-state": peer.connection,
        "congested": peer.congested,
        "peer-role": peer.role,
        "tls": False,
        "ap-in-flight": peer.ap_in_flight // 512,
        "rs-in-flight": peer.rs_in_flight // 512,
        "paths": [
            {
                "this_host": _address_json(peer.local),
                "remote_host": _address_json(peer.remote),
                "established": peer.connection == "Connected",
            }
        ],
        "peer_devices": [_peer_volume_json(volume, sizes.get(volume.number, 0)) for volume in peer.volumes],
    }


def _address_json(address: str) -> dict[str, Any]:
    family, _, rest = address.partition(":")
    host, _, port = rest.rpartition(":")
    return {"address": host.strip("[]"), "port": int(port or 0), "family": family}


def _peer_volume_json(peer: PeerVolumeStatus, size: int) -> dict[str, Any]:
    in_sync = 100.0 if size == 0 else 100.0 * (1 - min(peer.out_of_sync, size) / size)
    verify = peer.replication in ("VerifyS", "VerifyT")
    values: dict[str, Any] = {
        "volume": peer.number,
        "replication-state": peer.replication,
        "peer-disk-state": peer.peer_disk,
        "peer-client": False,
        "resync-suspended": peer.resync_suspended,
        **peer_statistics(peer),
        "has-sync-details": peer.sync is not None,
        "has-online-verify-details": peer.sync is not None and verify,
        "percent-in-sync": round(in_sync, 2),
    }
    if peer.sync is not None:
        values |= _sync_json(peer.sync, verify)
    if peer.done is not None:
        values["percent-resync-done"] = round(peer.done, 2)
    return values


def _sync_json(sync: SyncProgress, verify: bool) -> dict[str, Any]:
    values: dict[str, Any] = {
        "rs-total": sync.total // 512,
        "rs-dt-start-ms": round(sync.started_s * 1000),
        "rs-paused-ms": round(sync.paused_s * 1000),
        "rs-dt0-ms": 1000,
        "rs-db0-sectors": round(sync.rate / 512),
        "rs-dt1-ms": 1000,
        "rs-db1-sectors": round(sync.rate / 512),
    }
    if verify:
        position = (sync.total - sync.left if sync.position is None else sync.position) // 512
        values |= {
            "ov-start-sector": 0, "ov-stop-sector": sync.total // 512, "ov-position": position,
            "ov-left": sync.left // 512, "ov-skipped": 0,
        }  # fmt: skip
    else:
        values |= {"rs-failed": sync.failed // 512, "rs-same-csum": 0}
    eta = ETA_UNKNOWN if sync.eta_s is None else round(sync.eta_s)
    return values | {
        "want": 0.0,
        "db0/dt0 [MiB/s]": round(sync.rate / _MIB, 2),
        "db1/dt1 [MiB/s]": round(sync.rate / _MIB, 2),
        "estimated-seconds-to-finish": eta,
        "db/dt [MiB/s]": round(sync.average / _MIB, 2),
    }


# ------------------------------------------------------------------------- DRBD 8.4's short answers


def is_configured(resource: ResourceStatus, volume: VolumeStatus) -> bool:
    """False for what DRBD 8.4 calls Unconfigured: StandAlone, Diskless and Secondary."""
    return not (
        resource.connection.cstate == "StandAlone"
        and volume.disk == "Diskless"
        and resource.role == "Secondary"
    )


def role_line(resource: ResourceStatus, volume: VolumeStatus) -> str:
    """``Primary/Secondary``: local, then peer."""
    if not is_configured(resource, volume):
        return "Unconfigured"
    return f"{resource.role}/{resource.connection.role}"


def cstate_line(resource: ResourceStatus, volume: VolumeStatus) -> str:
    """DRBD 8.4's combined connection state of one volume: ``WFConnection``, ``SyncSource`` …"""
    if not is_configured(resource, volume):
        return "Unconfigured"
    peer = peer_volume(resource, volume.number)
    if peer is None or peer.replication == "Off":
        return resource.connection.cstate
    return "Connected" if peer.replication == "Established" else peer.replication


def dstate_line(resource: ResourceStatus, volume: VolumeStatus) -> str:
    """``UpToDate/DUnknown``: local, then peer."""
    if not is_configured(resource, volume):
        return "Unconfigured"
    peer = peer_volume(resource, volume.number)
    return f"{volume.disk}/{peer.peer_disk if peer else 'DUnknown'}"


def peer_volume(resource: ResourceStatus, number: int) -> PeerVolumeStatus | None:
    return next((v for v in resource.connection.volumes if v.number == number), None)


def sh_status(name: str, minor: int, resource: ResourceStatus | None, volume: VolumeStatus | None) -> str:
    """``drbdsetup-84 sh-status`` for one volume: assignments, then the call of ``_sh_status_process``.

    *resource* and *volume* are None when no daemon runs for it.
    """
    head = {"_minor": str(minor), "_res_name": name}
    if resource is None or volume is None:
        head |= {"_volume": "-1", "_known": "NA # not available or not yet created"}
        return _assignments(head, _sh_states(None, None), _sh_flags(None, None), {"_resynced_percent": ""})
    head["_volume"] = str(volume.number)
    if not is_configured(resource, volume):
        head["_known"] = "Unconfigured"
        states = _sh_states(None, None) | {"_cstate": "Unconfigured"}
        return _assignments(head, states, _sh_flags(None, None), {"_resynced_percent": ""})
    head["_known"] = "Configured"
    peer = peer_volume(resource, volume.number)
    done = peer.done if peer else None
    percent = {"_resynced_percent": "" if done is None else f"{done:.1f}"}
    return _assignments(head, _sh_states(resource, volume), _sh_flags(resource, peer), percent)


def _sh_states(resource: ResourceStatus | None, volume: VolumeStatus | None) -> dict[str, str]:
    if resource is None or volume is None:
        return dict.fromkeys(("_cstate", "_role", "_peer", "_disk", "_pdsk"), "")
    disk, _, peer_disk = dstate_line(resource, volume).partition("/")
    return {
        "_cstate": cstate_line(resource, volume),
        "_role": resource.role,
        "_peer": resource.connection.role,
        "_disk": disk,
        "_pdsk": peer_disk,
    }


def _sh_flags(resource: ResourceStatus | None, peer: PeerVolumeStatus | None) -> dict[str, str]:
    suspended = resource.suspended.split(",") if resource else []
    paused = peer.resync_suspended.split(",") if peer else []
    flags = {
        "_flags_susp": "user" in suspended,
        "_flags_aftr_isp": "dependency" in paused,
        "_flags_peer_isp": "peer" in paused,
        "_flags_user_isp": "user" in paused,
    }
    return {key: "1" if flag else "" for key, flag in flags.items()}


def _assignments(*groups: dict[str, str]) -> str:
    blocks = ["".join(f"{key}={value}\n" for key, value in group.items()) for group in groups]
    return "\n".join(blocks) + "\n_sh_status_process\n\n\n"
