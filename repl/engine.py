"""One replicated resource: the whole protocol, with no I/O, no clock and no tasks. Start reading here.

`Engine` is the machine's whole surface: requests, bytes from the peer, disk completions and events go in;
`take` hands out what must be done. It composes the rooms and owns the one place where a state changes
(`change`) and what follows from a change (`aftermath.follow`).

Buffers that are handed in stay the caller's to keep alive for as long as something refers to them; they
are never written to. Nothing in an outbox waits for anything else in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from . import aftermath, report, settings
from .agreement import LOST, Agreement
from .commands import Commands
from .compiled import batches
from .config import Fencing, NetOptions, ResourceConfig
from .conflicts import Conflicts
from .digests import Digest, digest, hmac_hash
from .disks import Disks
from .errors import PeerProtocolError, Refusal
from .events import (
    Answer,
    Attached,
    AttachFailed,
    Close,
    Command,
    Connect,
    DeviceGrown,
    Event,
    HandlerExited,
    LinkFailed,
    LinkLost,
    LinkUp,
    Notify,
    Opened,
    Outbox,
    Reconfigure,
    ResourceStatus,
    RunHandler,
    StateChanged,
)
from .fencing import FencingRoom
from .flushes import Flushes
from .growth import Growth
from .link import Link, Stage
from .liveness import Liveness
from .mirror import REQUESTS_MAX, Mirror
from .peer import Peer
from .replica import Replica
from .requests import DiskOp, PeerWrite, Request
from .resync import Resync
from .states import ConnState, DiskState, Role, State, describe_change
from .transfer_log import TransferLog
from .transition import Facts, change
from .verify import Verify
from .volume import Volume
from .wire import pack_ack

RETRY_S = 1.0  # after a handshake that failed on our side, before trying again
LINGER_S = 0.5  # how long a last answer may take to leave
_FAILED = DiskState.FAILED  # to look up a member of an enum costs as much as a call
NOTHING = Outbox()  # what `take` returns, the same each time, when there is nothing to do


class Entropy(Protocol):
    """The machine's only source of chance (`random.Random` and `random.SystemRandom` fit)."""

    def getrandbits(self, k: int, /) -> int: ...


class Engine:
    """One replicated resource. See the module's docstring."""

    def __init__(self, config: ResourceConfig, entropy: Entropy, now: float) -> None:
        self.config = config
        self.now = now
        self.out = Outbox()
        self._entropy = entropy
        self._ticket = 0
        self.volumes = {v.number: Volume(v, config.net) for v in config.volumes}
        self.integrity: Digest | None = digest(config.net.data_integrity_alg)
        self.peer_integrity: Digest | None = None
        self.csums: Digest | None = digest(config.net.csums_alg)
        self.tentative = False
        self.disconnecting = False
        self.auto_promoted = False  # Primary because a client came, and until the last one goes
        self.n_established = 0
        self.probes: dict[int, Callable[[Any], None]] = {}
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, Callable[[Any], None]]] = []
        self._next_change: list[Callable[[Any], None]] = []
        self.stories: list[Callable[[Any], None]] = []  # to go on once the event at hand has run its course
        self._awaited: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._connect_at: float | None = None
        self.log = TransferLog(self)
        self.flushes = Flushes(self)
        self.mirror = Mirror(self)
        self.replica = Replica(self)
        self.conflicts = Conflicts(self)
        self.resync = Resync(self)
        self.verify = Verify(self)
        self.link = Link(self)
        self.peer = Peer(self)
        self.liveness = Liveness(self)
        self.agreement = Agreement(self)
        self.disks = Disks(self)
        self.growth = Growth(self)
        self.fencing = FencingRoom(self)
        self.commands = Commands(self)

    # ------------------------------------------------------------------------------ data plane

    def submit(self, volume: int, batch: list[Request]) -> None:
        """Take requests of one volume; each comes back exactly once in `Outbox.done`."""
        self.mirror.submit(self.volumes[volume], batch)

    def receive_data(self, view: memoryview) -> int:
        """Bytes of the data socket; returns how many were consumed. The rest is an incomplete packet."""
        try:
            return self.link.receive_data(view)
        except PeerProtocolError as e:
            return self._nonsense(view, e)

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None:
        """Is *view* the beginning of a long write that may go to the disk as it comes?

        *takes* says whether the disk of a volume will have it so. The write then counts as under way there, ends by
        `disk_done`, and `receive_data` does not see its packet. None: it does.
        """
        return self.replica.begin_write(view, takes) if self.connected else None

    def receive_meta(self, view: memoryview) -> int:
        """Bytes of the meta socket; as `receive_data`."""
        try:
            return self.link.receive_meta(view)
        except PeerProtocolError as e:
            return self._nonsense(view, e)

    def _nonsense(self, view: memoryview, fault: PeerProtocolError) -> int:
        self.drop(ConnState.PROTOCOL_ERROR, str(fault))
        return len(view)

    def needed_data(self, tail: memoryview) -> int:
        """Total length of the incomplete packet that *tail* begins, as far as it can be known."""
        return self._needed(tail, False)

    def needed_meta(self, tail: memoryview) -> int:
        return self._needed(tail, True)

    def _needed(self, tail: memoryview, meta: bool) -> int:
        try:
            return self.link.needed(tail, meta)
        except PeerProtocolError:
            return len(tail) + 1  # the next byte makes the receiver say what is wrong

    def disk_done(self, ops: list[DiskOp]) -> None:
        """The disk answered these operations (`error` is set, a READ has its payload)."""
        mine, theirs, others = batches.by_kind(ops)
        for op in others:
            op.then(op)  # type: ignore[attr-defined]
        if theirs:
            self.replica.local_done(theirs)
        if mine:
            self.mirror.local_done(mine)
        for vol in self.volumes.values():
            if vol.state.disk == _FAILED:
                self.disks.local_idle(vol)
        if self._awaited:
            self._look()

    def take(self) -> Outbox:
        """Everything to be done since the last call."""
        while self.stories:
            self.stories.pop(0)(None)
        if self._awaited:
            self._look()
        out = self.out
        if out.data or out.meta or out.disk or out.done or out.effects:  # without the call that bool(out) is
            self.out = Outbox()
            return out
        return NOTHING

    @property
    def congested(self) -> bool:
        """Front ends should stop reading."""
        return self.mirror.n_app >= REQUESTS_MAX or self.log.full

    def send_ack(self, cmd: int, vol: Volume, sector: int, block_id: int, size: int) -> None:
        """One ack packet on the meta socket."""
        vol.seq = (vol.seq + 1) & 0xFFFFFFFF
        self.out.meta.append(pack_ack(cmd, vol.number, sector, block_id, size, vol.seq))

    def empty_digest(self) -> bytes:
        """What stands where a digest would be, for a packet without data."""
        return self.integrity(b"") if self.integrity else b""

    def replica_progressed(self) -> None:
        """A write on behalf of the peer ended: what waited for that may go on."""
        for vol in self.volumes.values():
            if vol.target is not None and not vol.n_untracked:
                self.resync.progressed(vol)
            if vol.behind_peer:
                self.conflicts.peer_progressed(vol)
        if self._connect_at is not None:
            self._maybe_connect()

    # ------------------------------------------------------------------------------ control plane

    def handle(self, event: Event, now: float) -> None:
        """One event of the control plane."""
        self.now = now
        match event:
            case LinkUp():
                if event.ticket == self.link.ticket and self.cstate == ConnState.WF_CONNECTION:
                    self.link.up(event.resolver)
            case LinkLost():
                if event.ticket == self.link.ticket and self.link.stage is not Stage.DOWN:
                    self._link_lost(event)
            case LinkFailed():
                if event.ticket == self.link.ticket:
                    self.stand_alone(event.why)
            case Attached():
                self.disks.attached(event)
            case AttachFailed():
                self.disks.failed_to_attach(self.volumes[event.volume], event.ticket, event.refusal)
            case Command():
                self.commands.run(event)
            case Reconfigure():
                self.out.effects.append(Answer(event.ticket, self._reconfigure(event.config)))
            case HandlerExited():
                then = self._handlers.pop(event.ticket, None)
                if then:
                    then(event.code)
            case DeviceGrown():
                resume = self.probes.pop(event.ticket, None)
                if resume:
                    resume(event)
            case Opened():
                self.volumes[event.volume].open_count = event.count
                self.commands.clients_changed()
                self.out.effects.append(StateChanged())

    def tick(self, now: float) -> None:
        """Time has passed; see `deadline`."""
        self.now = now
        self.log.tick(now)
        self.replica.tick()
        self.conflicts.tick(now)
        self.resync.tick(now)
        self.verify.tick(now)
        self.liveness.tick(now)
        due = [t for t in self._timers if t[0] <= now]
        if due:
            self._timers = [t for t in self._timers if t[0] > now]
            for _, then in due:
                then(None)
        self._maybe_connect()

    def deadline(self) -> float | None:
        """When `tick` is wanted next; None: only after something else happens."""
        times = [
            self.log.barrier_at, self.replica.deadline(), self.resync.deadline(), self.liveness.deadline(),
            self.verify.deadline(), self.conflicts.deadline(),
            self._connect_at if not self._connect_blocked() else None,
            *(t[0] for t in self._timers),
        ]  # fmt: skip
        return min((t for t in times if t is not None), default=None)

    def status(self) -> ResourceStatus:
        """What `status` shows."""
        return report.resource_status(self)

    def volume_size(self, number: int) -> int:
        return self.volumes[number].size

    def open_refusal(self, number: int, writable: bool) -> str | None:
        """Why a client may not open the export now, as a sentence for the client; None: it may."""
        return report.open_refusal(self, self.volumes[number])

    # ------------------------------------------------------------------------------ small services

    def new_ticket(self) -> int:
        self._ticket += 1
        return self._ticket

    def random64(self) -> int:
        return self._entropy.getrandbits(64)

    def random_bytes(self, n: int) -> bytes:
        return self._entropy.getrandbits(8 * n).to_bytes(n, "big")

    def note(self, vol: Volume | None, text: str, *, why: str = "", level: str = "info") -> None:
        """Tell the operator."""
        subject = self.config.name if vol is None else f"{self.config.name}/{vol.number}"
        self.out.effects.append(Notify(subject, text, why, level))

    def run_handler(self, name: str, vol: Volume | None, then: Callable[[int], None] | None) -> None:
        """Run a configured handler; *then* gets its exit code, at once 0 when none is configured."""
        if name not in self.config.handlers:
            if then:
                then(1 if name == "fence-peer" else 0)
            return
        ticket = self.new_ticket()
        if then:
            self._handlers[ticket] = then
        self.out.effects.append(RunHandler(ticket, name, vol.number if vol else None))

    def after(self, seconds: float, then: Callable[[Any], None]) -> None:
        self._timers.append((self.now + seconds, then))

    def next_change(self, resume: Callable[[Any], None]) -> None:
        """Resume after the next state change, and whatever else that comes with: a connection ends in many steps."""
        self._next_change.append(resume)

    def when_quiet(self, vol: Volume, then: Callable[[], None], *, answered: bool = False) -> None:
        """Call once no application request (*answered*: nor a held one) and no metadata write of *vol* is in flight."""

        def quiet() -> bool:
            held = 0 if answered else len(vol.held)
            return vol.n_app == held and (vol.meta is None or vol.meta.idle)

        self.when(quiet, then)

    def when(self, ready: Callable[[], bool], then: Callable[[], None]) -> None:
        """Call once it is *ready*, which is asked after each batch of completions: for what is rare and soon over."""
        self._awaited.append((ready, then))

    def _look(self) -> None:
        for entry in tuple(self._awaited):
            if entry[0]():
                self._awaited.remove(entry)
                entry[1]()

    def write_superblock(self, vol: Volume, then: Callable[[bool], None] | None) -> None:
        """Make the present superblock durable; without a disk there is nothing to do."""
        if vol.meta is not None and vol.attached:
            vol.meta.superblock(then)
        elif then:
            then(True)

    def check_config(self) -> Refusal | None:
        """What only connecting can find wrong: algorithms nobody has."""
        net = self.config.net
        for option, name, code in (
            ("cram-hmac-alg", net.cram_hmac_alg and not hmac_hash(net.cram_hmac_alg), 120),
            ("data-integrity-alg", net.data_integrity_alg and self.integrity is None, 141),
            ("verify-alg", net.verify_alg and digest(net.verify_alg) is None, 144),
            ("csums-alg", net.csums_alg and self.csums is None, 143),
        ):
            if name:
                return Refusal(code, f"{option} unknown", f"Use md5, sha1, sha256, sha512 or crc32c in {option}")
        return None

    # ------------------------------------------------------------------------------ states

    @property
    def cstate(self) -> ConnState:
        """The connection's state; while connected, the lowest of the volumes'."""
        return min((v.state.conn for v in self.volumes.values()), default=ConnState.STAND_ALONE)

    @property
    def connected(self) -> bool:
        """Parameters are exchanged or being exchanged: pings make sense."""
        return self.link.stage is Stage.OPEN

    @property
    def fenced_policy(self) -> bool:
        return self.fencing.policy != Fencing.DONT_CARE

    def facts(self, vol: Volume) -> Facts:
        """What besides the states decides about a change of *vol*."""
        return Facts(
            fencing=vol.config.disk_options.fencing,
            two_primaries=self.config.net.allow_two_primaries,
            is_open=vol.open_count > 0,
            verify_alg=bool(self.config.net.verify_alg),
            apv=self.link.apv,
            peer_primary_elsewhere=any(
                v.state.peer == Role.PRIMARY for v in self.volumes.values() if v is not vol
            ),
            found_disk=vol.found_disk,
            found_pdsk=vol.found_pdsk,
            exposed_is_attached=vol.exposes(vol.uuids.current),
            suspend_on_no_data=self.config.options.on_no_data_accessible == "suspend-io",
            handshake_in_progress=self.link.stage is Stage.OPEN
            and any(v.state.conn < ConnState.CONNECTED for v in self.volumes.values()),
        )

    def change(
        self, vol: Volume, wish: State, *, hard: bool = False, why: str = "", quiet: bool = False,
        before_state_packet: bytes = b"",
    ) -> Refusal | None:
        """The one way to change a volume's state. Returns DRBD's refusal, or None when it is done.

        *before_state_packet* goes to the data socket before any P_STATE that follows from the change.
        """
        result = change(vol.state, wish, self.facts(vol), hard=hard)
        if isinstance(result, Refusal):
            return result
        self.apply(vol, result, why=why, quiet=quiet, before=before_state_packet)
        return None

    def apply(self, vol: Volume, new: State, *, why: str = "", quiet: bool = False, before: bytes = b"") -> None:
        """Enter a state `transition.change` has approved."""
        old = vol.state
        if before:
            self.out.data.append(before)
        if new == old:
            return
        vol.state = new
        vol.conn_serial += old.conn != new.conn
        vol.refresh()
        self.note(vol, describe_change(old, new), why=why)
        self.out.effects.append(StateChanged())
        aftermath.follow(self, vol, old, new, tell_peer=not quiet)
        self.stories += self._next_change
        self._next_change = []

    def change_conn(self, conn: ConnState, why: str = "", outdate: str = "") -> None:
        """Change the connection's state in all volumes, as a fact; *outdate* as in `drop`."""
        for vol in self.volumes.values():
            wish = replace(vol.state, conn=conn)
            if (vol.end_unknown or vol.begin_unknown) and conn < ConnState.CONNECTED <= vol.state.conn:
                wish = replace(wish, pdsk=DiskState.D_UNKNOWN)  # Inconsistent as far as we know: no longer, or not yet
            if vol.unproven is not None and conn < ConnState.CONNECTED:
                wish, vol.unproven = replace(wish, disk=vol.unproven), None  # we know no more than before
            if outdate == "disk":
                wish = replace(wish, disk=min(wish.disk, DiskState.OUTDATED))
            elif outdate == "pdsk":
                wish = replace(wish, pdsk=min(wish.pdsk, DiskState.OUTDATED))
            self.change(vol, wish, hard=True, why=why)

    def new_current(self, vol: Volume) -> None:
        """Begin a new data generation; the caller sees to its durability."""
        primary = vol.state.role == Role.PRIMARY
        if vol.uuids.bitmap:  # a target that did finish has the generation that ends, else the sync UUID
            vol.uuids = vol.uuids.clear_bitmap()
        vol.sync_ending = False
        vol.uuids = vol.uuids.new_current(self.random64(), primary)
        vol.new_current_pending = False
        self.note(vol, f"new current UUID {vol.uuids}")

    def start_new_generation(self, vol: Volume) -> None:
        """A new data generation, on disk before the next write is answered."""
        self.new_current(vol)
        vol.completion_gates += 1

        def durable(ok: bool) -> None:
            vol.completion_gates -= 1
            if ok and vol.state.disk == DiskState.UP_TO_DATE:
                vol.exposed = vol.uuids.current & ~1
            self.mirror.release_gated(vol, without_peer_fails=not ok)

        self.write_superblock(vol, durable)

    def make_pending_generations(self) -> None:
        for vol in self.volumes.values():
            if vol.new_current_pending:
                self.start_new_generation(vol)

    # ------------------------------------------------------------------------------ connection

    def start_connecting(self) -> None:
        self.change_conn(ConnState.UNCONNECTED)
        self.change_conn(ConnState.WF_CONNECTION)
        self._connect_at = self.now
        self._maybe_connect()

    def _connect_blocked(self) -> bool:
        """Before a new connection, everything done for the old one must have left the disk."""
        return self.replica.n_active > 0 or self.replica.flushing is not None

    def _maybe_connect(self) -> None:
        if self._connect_at is None or self.now < self._connect_at or self._connect_blocked():
            return
        self._connect_at = None
        self.link.ticket = self.new_ticket()
        self.out.effects.append(Connect(self.link.ticket))

    def _link_lost(self, event: LinkLost) -> None:
        if self.disconnecting:
            self.agreement.replied(None, LOST)  # we are on the way out anyway
            return
        if self.link.stage is not Stage.OPEN:
            self._end_link(RETRY_S)
            return
        self.drop(ConnState.NETWORK_FAILURE if event.meta else ConnState.BROKEN_PIPE, event.why)

    def drop(self, reason: ConnState, why: str, outdate: str = "") -> None:
        """The connection is over for *reason* (Timeout … TearDown); try to get a new one.

        *outdate*: "disk" or "pdsk" is Outdated from now on, as agreed with the peer under fencing.
        """
        if self.link.stage is Stage.DOWN:
            return
        if self.link.stage is not Stage.OPEN:
            self.note(None, why, level="warning")
            self._end_link(RETRY_S)
            return
        self.note(None, f"connection lost: {why}", level="warning")
        self._connection_gone(reason, why, outdate)
        self.change_conn(ConnState.UNCONNECTED)
        self.change_conn(ConnState.WF_CONNECTION)
        delay = RETRY_S if reason == ConnState.PROTOCOL_ERROR else 0.0
        self._connect_at = self.now + delay
        self._maybe_connect()

    def stand_alone(self, why: str, outdate: str = "") -> None:
        """The connection is over until the administrator connects again; *outdate* as in `drop`."""
        if self.cstate == ConnState.STAND_ALONE:
            return
        if why:
            self.note(None, f"going StandAlone: {why}", level="error")
        if self.link.stage is Stage.OPEN:
            self._connection_gone(ConnState.DISCONNECTING, why, outdate)
        else:
            if self.link.ticket:
                self.out.effects.append(Close(self.link.ticket, LINGER_S))
            self.link.down()
            self.change_conn(ConnState.DISCONNECTING, outdate=outdate)
        self._connect_at = None
        self.link.ticket = 0
        self.change_conn(ConnState.STAND_ALONE)

    def _end_link(self, delay: float) -> None:
        """An attempt that never came to parameters: close it and try again."""
        self.out.effects.append(Close(self.link.ticket))
        self.link.down()
        self.link.ticket = 0
        self._connect_at = self.now + delay

    def _connection_gone(self, reason: ConnState, why: str, outdate: str) -> None:
        """Everything that ends with an established connection, in this order: close, states and what
        follows from them (generation, fencing), then the requests."""
        self.out.effects.append(Close(self.link.ticket, LINGER_S))
        self.link.down()
        self.link.ticket = 0
        self.liveness.stopped()
        was_primary = any(v.state.role == Role.PRIMARY for v in self.volumes.values())
        self.change_conn(reason, why, outdate)
        for vol in self.volumes.values():
            vol.peer_uuids = None
            vol.peer_size = 0
            self.resync.aborted(vol)
        keep = self.config.net.protocol == "C" and any(v.state.suspended for v in self.volumes.values())
        if keep:
            self.log.keep()
        else:
            self.log.connection_lost()
        for vol in self.volumes.values():
            self.mirror.reads_lost(vol)
        self.replica.connection_lost()
        self.agreement.connection_lost()
        self.disks.handshake_settled()
        for vol in self.volumes.values():
            if vol.meta is not None and vol.attached:
                vol.meta.write_changed()
        if was_primary:
            self.fencing.peer_lost()

    def link_established(self) -> None:
        """A volume left the handshake; the last one ends it."""
        if any(v.state.conn < ConnState.CONNECTED for v in self.volumes.values()):
            return
        self.link.deadline = None
        self.n_established += 1
        self.tentative = False
        self.disks.handshake_settled()
        self.fencing.all_connected()

    # ------------------------------------------------------------------------------ configuration

    def _reconfigure(self, config: ResourceConfig) -> Refusal | None:
        """Take over changed options; what needs a new connection or a new attach is the caller's to do."""
        if (refusal := settings.refused(self.volumes, config)) is not None:
            return refusal
        told = settings.said(self.config.net)
        self.config = config
        self.integrity = digest(config.net.data_integrity_alg)
        self.csums = digest(config.net.csums_alg)
        for vol_config in config.volumes:
            self.volumes[vol_config.number].config = vol_config
        self.adopt(config.net)
        if settings.said(config.net) != told:
            self.link.tell_settings()
        return None

    def adopt(self, net: NetOptions) -> None:
        """These options of the connection hold from now on."""
        self.config = replace(self.config, net=net)
        for vol in self.volumes.values():
            vol.net = net
            vol.refresh()
