"""The control plane's vocabulary: events into the machine, effects out of it, and what status shows.

Everything that is answered later carries a ticket. An answer whose ticket is no longer current is
dropped by the machine, so an edge may answer late without harm, but never twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import Refusal
from .requests import Buffer, DiskOp, Request

if TYPE_CHECKING:
    from .attach import LoadedDisk
    from .config import ResourceConfig

# ------------------------------------------------------------------------------------------ events


@dataclass(frozen=True, slots=True)
class LinkUp:
    """Both sockets to the peer are established. *resolver*: we accepted the meta socket (wire 1.4)."""

    ticket: int
    resolver: bool


@dataclass(frozen=True, slots=True)
class LinkLost:
    """A socket of an established link ended. *why* is one sentence; *meta* names the socket."""

    ticket: int
    why: str
    meta: bool = False


@dataclass(frozen=True, slots=True)
class LinkFailed:
    """No link can be made and trying again would not help (bind refused, …): StandAlone."""

    ticket: int
    why: str


@dataclass(frozen=True, slots=True)
class Attached:
    """The disk of a volume is open and locked, its metadata read and its activity log applied.

    *sparse*: it is a file, in which what was never written takes no space.
    """

    ticket: int
    volume: int
    disk: LoadedDisk
    sparse: bool = False


@dataclass(frozen=True, slots=True)
class AttachFailed:
    ticket: int
    volume: int
    refusal: Refusal


@dataclass(frozen=True, slots=True)
class Command:
    """An administrator's command, answered by exactly one `Answer`.

    *name* is drbdsetup's: attach, detach, connect, disconnect, primary, secondary, invalidate,
    invalidate-remote, outdate, pause-sync, resume-sync, suspend-io, resume-io, new-current-uuid,
    resize, verify, down. *volume* is None for "all volumes" or resource commands. *args* holds the options by their
    long name with underscores: force, discard_my_data, tentative, clear_bitmap, size (sectors),
    assume_clean, assume_peer_has_space.
    """

    ticket: int
    name: str
    volume: int | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reconfigure:
    """New configuration values for a live resource (`adjust`); answered like a command."""

    ticket: int
    config: ResourceConfig


@dataclass(frozen=True, slots=True)
class HandlerExited:
    """A handler ended with exit *code* (0 when none is configured)."""

    ticket: int
    code: int


@dataclass(frozen=True, slots=True)
class DeviceGrown:
    """The backing device of *volume* now has *data_size* bytes and the metadata device *meta_size*."""

    ticket: int
    volume: int
    data_size: int
    meta_size: int


@dataclass(frozen=True, slots=True)
class Opened:
    """The number of clients of a volume changed; *count* is the new number of open exports."""

    volume: int
    count: int


Event = (
    LinkUp | LinkLost | LinkFailed | Attached | AttachFailed | Command | Reconfigure | HandlerExited
    | DeviceGrown | Opened
)  # fmt: skip

# ----------------------------------------------------------------------------------------- effects


@dataclass(frozen=True, slots=True)
class Connect:
    """Keep dialling and listening until both sockets are up (LinkUp) or it is hopeless (LinkFailed)."""

    ticket: int


@dataclass(frozen=True, slots=True)
class Close:
    """End the attempt or the link with this ticket. What was put into the outbox before it is still
    sent as far as the sockets take it within ``linger_s`` seconds."""

    ticket: int
    linger_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Attach:
    """Open and lock the disk of *volume*, read its metadata: Attached or AttachFailed."""

    ticket: int
    volume: int


@dataclass(frozen=True, slots=True)
class ReleaseDisk:
    """Close the disk of *volume*. No operation on it is in flight, none will follow."""

    volume: int


@dataclass(frozen=True, slots=True)
class EndWrite:
    """The disk of *volume* is on its way out: a write that goes to it as it comes (`Engine.begin_write`) ends now, with
    an error, and does not wait for what is missing of it."""

    volume: int


@dataclass(frozen=True, slots=True)
class ProbeSize:
    """Look how large the backing devices of *volume* are now: DeviceGrown."""

    ticket: int
    volume: int


@dataclass(frozen=True, slots=True)
class RunHandler:
    """Run a configured handler; HandlerExited with its exit code. *volume* is None for fence-peer."""

    ticket: int
    name: str
    volume: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a command: refused with a reason, or done (``refusal`` is None)."""

    ticket: int
    refusal: Refusal | None


@dataclass(frozen=True, slots=True)
class Helper:
    """A handler was called, or has ended with exit *code*. *volume* is None for the fencing handlers."""

    name: str
    volume: int | None
    code: int | None = None


@dataclass(frozen=True, slots=True)
class Notify:
    """Something the operator may want to know, printed once.

    *subject* is the resource or ``resource/volume``; *text* is DRBD's phrase
    (``conn( Connecting -> Connected )``); *why* names the rule or the cause, and may be empty.
    *level* is info, warning or error. *helper* is the same for programs, when it is about a handler.
    """

    subject: str
    text: str
    why: str = ""
    level: str = "info"
    helper: Helper | None = None


@dataclass(frozen=True, slots=True)
class StateChanged:
    """Status may differ from what was published last (events2, wait-connect, live views)."""


@dataclass(frozen=True, slots=True)
class SizeChanged:
    """The usable size of a volume's export is now *size* bytes."""

    volume: int
    size: int


Effect = (
    Connect | Close | Attach | ReleaseDisk | EndWrite | ProbeSize | RunHandler | Answer | Notify | StateChanged
    | SizeChanged
)  # fmt: skip


class Outbox:
    """Everything the machine wants done. Nothing in it waits for anything else in it."""

    __slots__ = ("data", "disk", "done", "effects", "meta")

    def __init__(self) -> None:  # several for each batch: a dataclass takes three times as long
        self.data: list[Buffer] = []  # to the peer's data socket, in stream order
        self.meta: list[Buffer] = []  # to the peer's meta socket, in stream order
        self.disk: list[DiskOp] = []  # each answered once by disk_done
        self.done: list[Request] = []  # goes back to its owner
        self.effects: list[Effect] = []

    def __bool__(self) -> bool:
        return bool(self.data or self.meta or self.disk or self.done or self.effects)


# ------------------------------------------------------------------------------------------ status


@dataclass(frozen=True, slots=True)
class SyncProgress:
    """Details of a running resync or verify. Bytes and seconds."""

    total: int
    left: int
    failed: int
    started_s: float  # seconds since it began
    paused_s: float
    rate: float  # bytes per second, recent
    average: float  # bytes per second since the start
    eta_s: float | None
    position: int | None = None  # verify: bytes verified so far


@dataclass(frozen=True, slots=True)
class VolumeStatus:
    """One volume of this node; sizes in bytes, counters since the daemon started."""

    number: int
    minor: int
    disk: str
    client: bool  # intentionally diskless
    open: bool
    size: int
    read: int
    written: int
    al_writes: int
    bm_writes: int
    upper_pending: int
    lower_pending: int
    al_suspended: bool
    blocked: str  # no | upper | lower | upper,lower
    backing_device: str
    flags: str  # drbdmeta get-gi line, empty without a disk


@dataclass(frozen=True, slots=True)
class PeerVolumeStatus:
    """One volume as seen towards the peer; sizes in bytes, counters since the daemon started."""

    number: int
    replication: str
    peer_disk: str
    resync_suspended: str  # no, or a list of user, peer, dependency
    received: int
    sent: int
    out_of_sync: int  # bytes
    pending: int
    unacked: int
    done: float | None  # percent in sync, during resync or verify
    sync: SyncProgress | None


@dataclass(frozen=True, slots=True)
class ConnectionStatus:
    """The connection to the peer."""

    name: str  # the peer's host name
    node_id: int
    connection: str
    cstate: str  # DRBD 8.4's combined word (of the first volume)
    role: str
    congested: bool
    ap_in_flight: int  # bytes
    rs_in_flight: int  # bytes
    protocol_version: int
    local: str
    remote: str
    configured: bool  # False when StandAlone without a network configuration
    volumes: tuple[PeerVolumeStatus, ...]


@dataclass(frozen=True, slots=True)
class ResourceStatus:
    """Everything `status`, `events2` and the other queries print of a resource."""

    name: str
    node_id: int
    role: str
    suspended: str  # no, or a list of user, no-data, fencing
    write_ordering: str  # none | drain | flush
    may_promote: bool
    promotion_score: int
    volumes: tuple[VolumeStatus, ...]
    connection: ConnectionStatus
