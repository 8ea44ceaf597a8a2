"""What the two nodes tell each other about a volume: sizes, generations, states, and what follows from them.

`receive_state` is where a connection becomes a decision: who resyncs whom, or that nobody may. The rules
themselves are in `decision` and `transition`; this room collects their inputs and carries out the result.

Source: drbd_receiver.c, receive_sizes, receive_uuids, receive_state; drbd_nl.c, drbd_new_dev_size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from . import aftermath
from .decision import Decision, DecisionFacts, decide
from .errors import PeerProtocolError, Refusal
from .meta_writer import CallbackOp
from .requests import DATA, DiskOp, Op
from .states import ConnState, DiskState, Role, State
from .units import IO_MAX, SECTOR
from .uuids import CompareFacts, UuidSet
from .volume import Volume
from .wire import Feature, Packet, QueueLimits, Sizes, Uuids, pack_data, pack_state

if TYPE_CHECKING:
    from .engine import Engine

JUST_CREATED: Final = 4
CONNECTED_OUTDATES: Final = -6  # refusal: nobody is Outdated while connected
# Flags in P_UUIDS.
DISCARD_MY_DATA: Final = 1
CRASHED_PRIMARY: Final = 2
REALLY_INCONSISTENT: Final = 4
SKIP_INITIAL_SYNC: Final = 8
# dds_flags in P_SIZES.
ASSUME_PEER_HAS_SPACE: Final = 1
NO_RESYNC: Final = 2


def new_size(usable: int, peer: int, configured: int, last_agreed: int) -> int:
    """The device size in bytes from what both disks offer, the configured and the last agreed size."""
    if usable and peer:
        size = min(usable, peer)
    elif last_agreed:
        size = min(x for x in (last_agreed, usable, peer) if x)
    else:
        size = usable or peer
    return configured if configured and configured <= size else size


class Peer:
    """The exchange of sizes, generations and states, and the decision that follows from it."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine

    # ------------------------------------------------------------------------------ sending

    def send_sizes(self, vol: Volume, dds_flags: int, ask: bool = False) -> None:
        """P_SIZES; *ask* leaves the current size open, so that the peer answers with its own."""
        limits = QueueLimits(4096, 512, 0, 4096, 0, 1) if self.e.link.features & Feature.WSAME else None
        self.e.out.data.append(
            Sizes(
                vol.usable // SECTOR if vol.attached else 0, vol.config.disk_options.size,
                0 if ask else vol.size // SECTOR, IO_MAX, 0, dds_flags, limits,
            ).pack(vol.number)
        )  # fmt: skip

    def send_uuids(self, vol: Volume, flags: int = 0) -> None:
        if vol.discard_my_data:
            flags |= DISCARD_MY_DATA
        if vol.crashed_primary:
            flags |= CRASHED_PRIMARY
        if vol.state.disk == DiskState.NEGOTIATING and vol.found_disk == DiskState.INCONSISTENT:
            flags |= REALLY_INCONSISTENT
        vol.sent_bits = vol.bitmap.weight
        u = vol.uuids
        self.e.out.data.append(
            Uuids(u.current, u.bitmap, u.history0, u.history1, vol.sent_bits, flags).pack(vol.number)
        )

    def send_state(self, vol: Volume) -> None:
        self.e.out.data.append(pack_state(vol.state.word(), vol.number))

    # ------------------------------------------------------------------------------ sizes

    def receive_sizes(self, vol: Volume, payload: memoryview) -> None:
        theirs = Sizes.unpack(payload, bool(self.e.link.features & Feature.WSAME))
        connecting = vol.state.conn < ConnState.CONNECTED
        vol.peer_size = theirs.d_size * SECTOR
        usable_before = vol.size
        if vol.attached:
            configured = theirs.u_size  # once connected, whoever resizes decides for both (receive_sizes)
            if connecting:
                both = [x for x in (vol.config.disk_options.size, theirs.u_size) if x]
                configured = min(both, default=0)
            elif configured != vol.config.disk_options.size:
                self.e.note(vol, f"Peer sets u_size to {configured} sectors (old: {vol.config.disk_options.size})")
                options = replace(vol.config.disk_options, size=configured)
                vol.config = replace(vol.config, disk_options=options)
            peer = vol.peer_size or (vol.usable if theirs.dds_flags & ASSUME_PEER_HAS_SPACE else 0)
            size = new_size(vol.usable, peer, configured * SECTOR, vol.la_size)
            shrinks = size < vol.size and vol.state.disk >= DiskState.OUTDATED
            if shrinks and (connecting or vol.state.pdsk == DiskState.DISKLESS):
                self.e.stand_alone(
                    f"the peer's disk is too small: it offers {vol.peer_size} bytes, volume {vol.number} "
                    f"has {vol.size}; give the peer a larger disk"
                )
                return
            self.e.disks.adopt_size(vol, size, set_new=not theirs.dds_flags & NO_RESYNC)
            vol.la_peer_max_bio_size = theirs.max_bio_size
        else:
            size = (theirs.c_size or theirs.u_size or theirs.d_size) * SECTOR
            if size and not (vol.size and not theirs.d_size):
                if size < vol.size and vol.state.role == Role.PRIMARY:
                    self.e.stand_alone(f"the peer's device has {size} bytes, ours in use has {vol.size}")
                    return
                self.e.disks.adopt_size(vol, size, set_new=False)
        if not connecting:
            if theirs.c_size * SECTOR != vol.size:
                self.send_sizes(vol, theirs.dds_flags)
            if (vol.size > usable_before or vol.resize_pending) and not theirs.dds_flags & NO_RESYNC:
                self.grown(vol)
            if not theirs.c_size and vol.attached:
                self.e.growth.follow(vol, bool(theirs.dds_flags & NO_RESYNC))
        vol.resize_pending = False

    def grown(self, vol: Volume) -> None:
        """The device grew while connected: the new area is resynced without a bitmap exchange."""
        s = vol.state
        if s.conn != ConnState.CONNECTED or min(s.disk, s.pdsk) < DiskState.INCONSISTENT:
            return
        source = self.e.link.resolver if s.role == s.peer else s.role == Role.PRIMARY
        if source:
            self.e.resync.start_source(vol)
        else:
            self.e.change(vol, replace(s, conn=ConnState.WF_SYNC_UUID), hard=True, why="device grew")

    # ------------------------------------------------------------------------------ generations

    def receive_uuids(self, vol: Volume, payload: memoryview) -> None:
        theirs = Uuids.unpack(payload)
        vol.peer_uuids = UuidSet(theirs.current, theirs.bitmap, theirs.history0, theirs.history1)
        vol.peer_bits = theirs.bits
        vol.peer_uuid_flags = theirs.flags
        s = vol.state
        first = s.conn < ConnState.CONNECTED or s.pdsk == DiskState.DISKLESS
        needs_peer = s.role == Role.PRIMARY and s.disk < DiskState.INCONSISTENT and first
        if needs_peer and vol.exposed not in (0, theirs.current & ~1):
            self.e.stand_alone(
                f"the peer's data generation {theirs.current:016X} is not the one in use here "
                f"({vol.exposed:016X})"
            )
            return
        if s.connected:
            if vol.attached and vol.uuids.current == JUST_CREATED and theirs.flags & SKIP_INITIAL_SYNC:
                self._skip_initial_sync(vol, theirs.current)
            if not vol.attached:
                vol.exposed = theirs.current & ~1

    def _skip_initial_sync(self, vol: Volume, current: int) -> None:
        self.e.note(vol, "Accepted new current UUID, preparing to skip initial sync")
        self.e.disks.clear_bitmap(vol)
        vol.uuids = UuidSet(0, 0, vol.uuids.history0, vol.uuids.history1).set_current(
            current, vol.state.role == Role.PRIMARY
        )
        vol.peer_uuids = UuidSet(current, 0, 0, 0)
        self.e.change(
            vol, replace(vol.state, disk=DiskState.UP_TO_DATE, pdsk=DiskState.UP_TO_DATE), hard=True,
            why="initial sync skipped",
        )  # fmt: skip
        self.e.write_superblock(vol, None)
        # The commanding kernel keeps the UUIDs it was sent in the handshake, which said 4; as the target of
        # a later full sync it would end with them as its own (drbd_resync_finished) and not know its data.
        self.send_uuids(vol)

    # ------------------------------------------------------------------------------ states

    def receive_state(self, vol: Volume, word: int) -> None:
        """P_STATE: follow the peer, and decide when there is something to decide."""
        try:
            ps = State.from_word(word)
        except ValueError as e:
            raise PeerProtocolError(f"P_STATE {word:#010x}: {e}") from e
        old = vol.state
        if old.conn <= ConnState.TEAR_DOWN:
            return
        if old.disk == DiskState.NEGOTIATING <= ps.disk and vol.peer_uuids is None:
            return  # said before the peer heard of our disk: its set and another state follow
        peer_disk = ps.disk
        if peer_disk == DiskState.NEGOTIATING:
            really = vol.peer_uuid_flags & REALLY_INCONSISTENT
            peer_disk = DiskState.INCONSISTENT if really else DiskState.CONSISTENT
        if vol.unproven is not None and ps.conn >= ConnState.CONNECTED:
            self._proven(vol, ps)
        if self._end_of_sync(vol, ps, peer_disk):
            return
        if old.pdsk == DiskState.UP_TO_DATE and peer_disk == DiskState.INCONSISTENT and (
            old.conn == ConnState.CONNECTED and ps.conn > ConnState.SYNC_SOURCE
        ):
            peer_disk = DiskState.UP_TO_DATE
        if self._source_waits(vol, ps, peer_disk):
            peer_disk = DiskState.INCONSISTENT
        conn: ConnState = ConnState.CONNECTED if old.conn == ConnState.WF_REPORT_PARAMS else old.conn
        if ps.conn == ConnState.AHEAD:
            conn = ConnState.BEHIND
        if self._must_decide(vol, ps, peer_disk):
            decided = self._decide(vol, ps, peer_disk)
            if decided is None:
                return
            conn, peer_disk = decided
            old = vol.state
        self._apply(vol, old, ps, conn, peer_disk)

    def _proven(self, vol: Volume, ps: State) -> None:
        """The Primary has taken our generation for its own: without a disk it goes on here, as a new one."""
        vol.unproven = None
        s = vol.state
        diskless = max(ps.disk, s.pdsk) < DiskState.NEGOTIATING  # else its disk is back, and the sets decide
        if s.peer == Role.PRIMARY and diskless and s.disk == DiskState.UP_TO_DATE:
            if not vol.uuids.bitmap:
                self.e.start_new_generation(vol)
                self.send_uuids(vol)
            aftermath.mark_primary(self.e, vol)  # no write of its before that is on disk

    def _source_waits(self, vol: Volume, ps: State, peer_disk: DiskState) -> bool:
        """We are about to be its source and it only prepares: its disk is not good yet."""
        s = vol.state
        return (
            s.pdsk in (DiskState.INCONSISTENT, DiskState.CONSISTENT) and peer_disk == DiskState.UP_TO_DATE
            and s.conn > ConnState.CONNECTED and s.disk == DiskState.UP_TO_DATE
            and ConnState.CONNECTED < ps.conn < ConnState.SYNC_SOURCE
        )  # fmt: skip

    def _end_of_sync(self, vol: Volume, ps: State, peer_disk: DiskState) -> bool:
        """Does this word only say that the target, or the verified side, has finished?"""
        s = vol.state
        if (
            s.pdsk in (DiskState.INCONSISTENT, DiskState.CONSISTENT) and peer_disk == DiskState.UP_TO_DATE
            and s.conn >= ConnState.SYNC_SOURCE and s.disk == DiskState.UP_TO_DATE
            and ps.conn == ConnState.CONNECTED
        ):  # fmt: skip
            self.e.resync.source.peer_finished(vol)
            return True
        if (
            s.conn in (ConnState.SYNC_SOURCE, ConnState.PAUSED_SYNC_S) and ps.conn == ConnState.CONNECTED
            and peer_disk == DiskState.INCONSISTENT and vol.rs_failed
        ):  # fmt: skip
            self.e.resync.source.peer_finished(vol)
            return True
        if (
            s.conn == ConnState.VERIFY_T and s.disk == DiskState.UP_TO_DATE
            and ps.conn == ConnState.CONNECTED and peer_disk == DiskState.UP_TO_DATE
        ):  # fmt: skip
            self.e.verify.peer_finished(vol)
            return True
        return False

    def _must_decide(self, vol: Volume, ps: State, peer_disk: DiskState) -> bool:
        s = vol.state
        if vol.peer_uuids is None or ps.disk < DiskState.NEGOTIATING or s.disk < DiskState.NEGOTIATING:
            return False
        negotiating = DiskState.NEGOTIATING
        return (
            s.conn < ConnState.CONNECTED
            or (s.conn == ConnState.CONNECTED and negotiating in (ps.disk, s.disk))
            or (
                s.conn == ConnState.CONNECTED and s.disk == DiskState.INCONSISTENT
                and s.pdsk == DiskState.INCONSISTENT and s.peer != Role.PRIMARY and ps.role == Role.PRIMARY
            )
            or vol.consider_resync
            or (
                s.conn == ConnState.CONNECTED
                and ConnState.STARTING_SYNC_S <= ps.conn <= ConnState.WF_BITMAP_T
            )
        )  # fmt: skip

    def _facts(self, vol: Volume, ps: State, peer_disk: DiskState, demotion_failed: bool) -> DecisionFacts:
        net, link = self.e.config.net, self.e.link
        assert vol.peer_uuids is not None
        negotiating = vol.state.disk == DiskState.NEGOTIATING
        found = vol.found_disk if negotiating and vol.found_disk is not None else vol.state.disk
        return DecisionFacts(
            own=vol.uuids, peer=vol.peer_uuids,
            compare=CompareFacts(
                own_primary=vol.state.role == Role.PRIMARY, peer_primary=ps.role == Role.PRIMARY,
                own_crashed=vol.crashed_primary, peer_crashed=bool(vol.peer_uuid_flags & CRASHED_PRIMARY),
                resolver=link.resolver, wsame=bool(link.features & Feature.WSAME), apv=link.apv,
            ),
            my_disk=found, peer_disk=peer_disk, own_bits=vol.sent_bits, peer_bits=vol.peer_bits,
            own_discard=vol.discard_my_data, peer_discard=bool(vol.peer_uuid_flags & DISCARD_MY_DATA),
            own_tentative=self.e.tentative, peer_tentative=link.peer_dry_run,
            after_sb_0pri=net.after_sb_0pri, after_sb_1pri=net.after_sb_1pri,
            after_sb_2pri=net.after_sb_2pri, always_asbp=net.always_asbp, rr_conflict=net.rr_conflict,
            own_negotiating=negotiating, demotion_failed=demotion_failed,
        )  # fmt: skip

    def _decide(self, vol: Volume, ps: State, peer_disk: DiskState) -> tuple[ConnState, DiskState] | None:
        """Run the decision and carry it out as far as it concerns bits and generations.

        Returns the new connection state and the peer's disk state, or None when it ended the connection.
        """
        e = self.e
        vol.consider_resync = False
        if ps.disk == DiskState.NEGOTIATING and vol.state.disk != DiskState.NEGOTIATING:
            # The attaching node decides by our set as it is now, not as a rule may correct it: else the
            # two nodes would not see the same two sets, and could both want to be the source.
            self.send_uuids(vol)
            vol.uuids_told = True
        decision = decide(self._facts(vol, ps, peer_disk, False))
        if decision.demote_self:
            demoted = e.change(vol, replace(vol.state, role=Role.SECONDARY))
            if isinstance(demoted, Refusal):
                decision = decide(self._facts(vol, ps, peer_disk, True))
        for line in decision.log:
            e.note(vol, line)
        self._run_in_turn(decision.helpers, vol)
        if decision.own != vol.uuids:
            vol.uuids = decision.own
            e.write_superblock(vol, None)
        vol.peer_uuids = decision.peer
        if decision.conn is None:
            return self._abort(vol, ps, decision)
        vol.sync_ending = False  # its generations have told us how our last resync ended
        if decision.full_sync:
            e.disks.set_all(vol, None)
        if decision.conn == ConnState.CONNECTED and vol.bitmap.weight and vol.state.disk > DiskState.INCONSISTENT:
            e.note(vol, f"No resync, but {vol.bitmap.weight} bits in bitmap!")
        return decision.conn, peer_disk

    def _run_in_turn(self, helpers: tuple[str, ...], vol: Volume) -> None:
        """Each of the handlers begins when the one before it has ended; nothing else waits for them."""
        if helpers:
            self.e.run_handler(helpers[0], vol, lambda _: self._run_in_turn(helpers[1:], vol))

    def _abort(self, vol: Volume, ps: State, decision: Decision) -> tuple[ConnState, DiskState] | None:
        e = self.e
        e.note(vol, decision.abort, level="error")
        if decision.split_brain:
            name = e.config.name
            e.note(
                vol, f"To give up one side's changes, there: tandemadm secondary {name}; tandemadm connect "
                f"--discard-my-data {name}; on the other node, if it is StandAlone: tandemadm connect {name}. "
                f"What each side changed, and the whole way out: tandemadm split-brain {name}",
            )  # fmt: skip
        if vol.state.disk == DiskState.NEGOTIATING:
            e.disks.attach_refused(vol, decision.abort)
            return (ConnState.CONNECTED, ps.disk) if vol.state.connected else None
        if ps.disk == DiskState.NEGOTIATING:
            beaten = decision.yields and abs(decision.value) <= 2  # a Primary's, so it stays as it is
            if beaten and vol.state.disk == DiskState.CONSISTENT:
                e.change(vol, replace(vol.state, disk=DiskState.OUTDATED), hard=True, why="the peer has newer data")
            # The attaching node waits for a state that has heard of its disk, and decides as we did.
            e.out.data.append(pack_state(replace(vol.state, pdsk=ps.disk).word(), vol.number))
            return ConnState.CONNECTED, DiskState.DISKLESS
        if e.link.peer_dry_run and not e.tentative:
            e.drop(ConnState.PROTOCOL_ERROR, "the peer only asked what would happen")
        elif decision.yields and not e.tentative:
            e.fencing.split_brain(decision.yields, decision.abort)
        else:
            e.stand_alone(decision.abort)
        return None

    def _apply(self, vol: Volume, old: State, ps: State, conn: ConnState, peer_disk: DiskState) -> None:
        """Take over what the peer says, as a wish while connecting, as a fact afterwards."""
        e = self.e
        new = replace(
            old, conn=conn, peer=ps.role, pdsk=peer_disk, peer_isp=ps.aftr_isp or ps.user_isp
        )
        settled = conn in (ConnState.CONNECTED, ConnState.WF_BITMAP_S)
        # A peer without a disk answers once it has heard of ours: a diskless Primary may refuse our generation.
        unheard = max(ps.disk, ps.pdsk) < DiskState.NEGOTIATING
        attached = old.disk == DiskState.NEGOTIATING and settled and not unheard
        undecided = attached and ps.disk < DiskState.NEGOTIATING
        if undecided and old.role == Role.PRIMARY and not vol.exposes(vol.uuids.current):
            e.disks.attach_refused(vol, "the peer, which has newer data, lost its disk")
            old = vol.state
            new, attached = replace(new, disk=old.disk), False
        if attached and vol.found_disk is not None:
            new = replace(new, disk=vol.found_disk)
        if vol.untouched and ps.disk < DiskState.NEGOTIATING and ps.pdsk == DiskState.UP_TO_DATE:
            new = replace(new, disk=DiskState.UP_TO_DATE)  # the source lost its disk first, and goes on with ours
        connecting = old.conn < ConnState.CONNECTED
        kept = vol.new_current_pending or e.log.kept
        rebooted = conn == ConnState.CONNECTED and kept and (
            peer_disk in (DiskState.OUTDATED, DiskState.CONSISTENT)
            # Without a fencing policy a rebooted peer calls itself UpToDate, too.
            or (not e.fenced_policy and e.log.answered_unstable())
        )
        # A resync would take bitmap and generation as they are now, without what the frozen log speaks of.
        stale = conn == ConnState.WF_BITMAP_S and kept
        if connecting and old.suspended and (rebooted or stale):
            e.fencing.peer_was_rebooted()
            return
        if connecting and conn == ConnState.WF_BITMAP_T and e.log.kept:
            e.log.mark_unstable(vol)
        alone = ps.role == Role.PRIMARY and peer_disk < DiskState.INCONSISTENT
        if connecting and alone and ps.conn < ConnState.CONNECTED and vol.attached:
            # It has not seen our generation yet, and refuses us if its data is another one.
            vol.unproven = old.disk
        refused = e.change(vol, new, hard=not connecting)
        if isinstance(refused, Refusal):
            if refused.code == CONNECTED_OUTDATES:  # an Outdated disk and a peer without one: it may attach yet
                e.drop(ConnState.PROTOCOL_ERROR, "our disk is Outdated and the peer has none")
                return
            e.stand_alone(f"({refused.code}) {refused.text}")
            return
        if attached:
            self._proven(vol, ps)
        if connecting:
            e.link_established()
        elif (
            old.conn == ConnState.CONNECTED < conn and ps.conn <= ConnState.CONNECTED
            and ps.disk != DiskState.NEGOTIATING
        ):  # fmt: skip
            self.send_uuids(vol)
            self.send_state(vol)
        vol.discard_my_data = False
        vol.uuids_told = False

    # ------------------------------------------------------------------------------ reads for the peer

    def serve_read(self, vol: Volume, sector: int, block_id: int, size: int) -> None:
        """P_DATA_REQUEST: a read of a peer that has no good copy of its own."""
        if vol.state.disk != DiskState.UP_TO_DATE:
            self.e.send_ack(Packet.NEG_DREPLY, vol, sector, block_id, size)
            return
        link = self.e.link.ticket

        def done(op: DiskOp) -> None:
            vol.n_local -= 1
            if link == self.e.link.ticket and vol.state.connected:
                if op.error:
                    self.e.send_ack(Packet.NEG_DREPLY, vol, sector, block_id, size)
                else:
                    assert op.payload is not None
                    check = self.e.integrity(op.payload) if self.e.integrity else b""
                    head = pack_data(Packet.DATA_REPLY, vol.number, sector, block_id, 0, 0, size, check)
                    self.e.out.data += (head, op.payload)
                    vol.bytes_sent += size
            if op.error:
                self.e.disks.failed(vol, op.error, write=False)
            else:
                vol.bytes_read += size
            self.e.disks.local_idle(vol)

        vol.n_local += 1
        self.e.out.disk.append(CallbackOp(Op.READ, vol.number, sector << 9, size, None, 0, DATA, done))
