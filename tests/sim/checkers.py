"""What must always hold, checked at every step.

The numbers are those of the list in the architecture page: 1 answers, 2 log before data, 3 bits where the
nodes may differ, 4 no overlap (the fake disk refuses it), 5 no older data over newer, 6 flushes, 7 one
primary and new generations, 8 fencing, 9 metadata after a crash. Beside them: durability (what readers
see), agreement (clean means equal), history (no resync away from answered writes).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from tandem.repl.attach import LoadedDisk
from tandem.repl.config import Fencing
from tandem.repl.requests import DATA, META, DiskOp, Op, Request
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.uuids import CompareFacts, UuidSet, compare

from .admin import behind
from .client import INITIAL, SECTOR, ZERO_SECTOR, Versions, Write, older
from .fake_disk import PAGE, FakeDisk, Sparse
from .generations import Generations
from .histories import (
    agreed_again,
    check_only_side,
    check_split_brain_decided,
    could_be_primary,
    given_up,
    met,
    parted,
    superseded,
)
from .ondisk import (
    BITS_PER_EXTENT,
    PRIMARY_IND,
    WAS_UP_TO_DATE,
    DiskView,
    RingWatch,
    super_at,
    view_of,
)

if TYPE_CHECKING:
    from .node import Ask, Node
    from .world import World

C = ConnState
D = DiskState
BECOMING_TARGET: Final = frozenset((C.WF_BITMAP_T, C.WF_SYNC_UUID, C.SYNC_TARGET, C.PAUSED_SYNC_T))
SYNCING_TARGET: Final = frozenset((C.SYNC_TARGET, C.PAUSED_SYNC_T))
DIFFER_ALWAYS_MAX: Final = 24
DATA_CHANGES: Final = frozenset((Op.WRITE, Op.TRIM, Op.ZEROES))


def sector_reader(image: Sparse) -> Callable[[int], bytes]:
    pages = image.pages

    def read(sector: int) -> bytes:
        page = pages.get(sector >> 3)
        if page is None:
            return ZERO_SECTOR
        at = (sector & 7) * SECTOR
        return page[at : at + SECTOR]

    return read


@dataclass(slots=True)
class DiskRecord:
    """What is followed for each disk."""

    ring: RingWatch = field(default_factory=RingWatch)
    super_durable: tuple[int, ...] = ()
    super_flying: list[tuple[int, ...]] = field(default_factory=list)
    view: DiskView | None = None  # of a disk that no engine has attached; dropped when its metadata changes
    n_broke: int = 0  # how often the disk failed an operation, or left
    conn: ConnState = C.STAND_ALONE
    role: Role = Role.SECONDARY
    disk: DiskState = D.DISKLESS
    lost_data: bool = False  # an answered write may be gone here: the disk failed


class Checks:
    def __init__(self, world: World) -> None:
        self.w = world
        self.records: dict[tuple[int, int], DiskRecord] = {}
        self.differ: list[set[int]] = [set() for _ in range(world.mix.n_volumes)]
        self.pages_end: list[int] = []
        self.generations = Generations(world)

    def start(self) -> None:
        for node in self.w.nodes:
            for v, disk in node.disks.items():
                self.records[node.index, v] = DiskRecord()
                disk.on_submit = lambda d, op, n=node: self._submitted(n, op)  # type: ignore[misc]
                disk.on_execute = lambda d, op, n=node: self._executed(n, d, op)  # type: ignore[misc]
        self.pages_end = [-(-self.w.nodes[0].layouts[v].usable // PAGE) for v in range(self.w.mix.n_volumes)]

    def record(self, node: Node, volume: int) -> DiskRecord:
        return self.records[node.index, volume]

    def fail(self, rule: str, text: str) -> None:
        self.w.fail(rule, text)

    def reader(self, node: Node, volume: int, *, durable: bool = False) -> Callable[[int], bytes]:
        device = node.disks[volume].devices[DATA]
        return sector_reader(device.durable if durable else device.live)

    # ------------------------------------------------------------------ disks

    def _submitted(self, node: Node, op: DiskOp) -> None:
        if op.area == META and op.op == Op.WRITE:
            self._meta_submitted(node, op)
        elif isinstance(op, Request) and op.op in DATA_CHANGES:
            self._application_write_submitted(node, op)

    def _meta_submitted(self, node: Node, op: DiskOp) -> None:
        record, where = self.record(node, op.volume), node.layouts[op.volume]
        assert op.payload is not None
        if op.offset == where.superblock:
            view = view_of(bytes(op.payload))
            record.super_flying.append(view.identity)
            self.generations.seen(node, op.volume, view.current)
        elif where.al <= op.offset < where.al + where.al_blocks * PAGE:
            for at in range(0, op.length, PAGE):
                for extent in record.ring.evicted_by(bytes(op.payload[at : at + PAGE])):
                    self._check_eviction(node, op.volume, extent)

    def _check_eviction(self, node: Node, volume: int, extent: int) -> None:
        """Rule 2: the bitmap page of an extent that leaves the log is durable before."""
        assert node.engine is not None
        bitmap = node.engine.volumes[volume].bitmap
        first, end = extent * BITS_PER_EXTENT, min((extent + 1) * BITS_PER_EXTENT, bitmap.n_bits)
        bit = bitmap.next_set(first) if first < end else -1
        if not first <= bit < end:
            return
        durable = DiskView(node.disks[volume], node.layouts[volume], durable=True)
        while first <= bit < end:
            if not durable.bit(bit):
                self.fail(
                    "2 log",
                    f"extent {extent} leaves the log of {node.config.node}, its bit {bit} is not on disk",
                )
            bit = bitmap.next_set(bit + 1)

    def _application_write_submitted(self, node: Node, op: Request) -> None:
        """Rule 2: no application write before its extents, and the primary mark, are durable."""
        assert node.engine is not None
        vol = node.engine.volumes[op.volume]
        where, disk = node.layouts[op.volume], node.disks[op.volume]
        if not super_at(disk.devices[META].durable, where).flags & PRIMARY_IND:
            self.fail("2 log", f"{op!r} reaches the disk before the superblock says Primary")
        if vol.al_suspended or not self.w.mix.al_updates:
            return
        hot = self.record(node, op.volume).ring.hot
        for extent in range(op.offset >> 22, ((op.offset + op.length - 1) >> 22) + 1):
            if extent not in hot:
                self.fail("2 log", f"{op!r} reaches the disk before extent {extent} is in the durable log")

    def _executed(self, node: Node, disk: FakeDisk, op: DiskOp) -> None:
        record = self.record(node, op.volume)
        record.view = None
        if op.area == META:
            self._meta_executed(node, record, op)
        elif op.op in DATA_CHANGES:
            self._data_executed(node, op)

    def _meta_executed(self, node: Node, record: DiskRecord, op: DiskOp) -> None:
        if op.op != Op.WRITE or op.payload is None or node.engine is None:
            return
        where = node.layouts[op.volume]
        if op.offset == where.superblock:
            record.super_durable = view_of(bytes(op.payload)).identity
            record.super_flying.clear()
        elif where.al <= op.offset < where.al + where.al_blocks * PAGE:
            for at in range(0, op.length, PAGE):
                record.ring.durable(bytes(op.payload[at : at + PAGE]))

    def _data_executed(self, node: Node, op: DiskOp) -> None:
        self._compare(op.volume, op.offset // PAGE, -(-(op.offset + op.length) // PAGE))
        payload = op.payload if op.op == Op.WRITE else None
        self.w.ledgers[op.volume].written(node.index, op.offset, op.length, payload)
        if (
            self.w.mix.protocol == "C"
            and not isinstance(op, Request)
            and op.op == Op.WRITE
            and node.connected
            and self.w.peer_of(node).connected
        ):
            self._check_notolder(node, op)

    def _check_notolder(self, node: Node, op: DiskOp) -> None:
        """Rule 5: what the peer has us write must be something the peer may hold now."""
        if self.w.peer_of(node).state(op.volume).pdsk < D.INCONSISTENT:
            return  # the peer has given this disk up already
        ledger = self.w.ledgers[op.volume]
        copy = ledger.copies[1 - node.index]
        payload = bytes(op.payload or b"")
        first, n = op.offset // SECTOR, op.length // SECTOR
        sectors = range(first, first + n)
        for s in sectors if n < len(copy.allowed) else [s for s in copy.allowed if s in sectors]:
            versions, i = copy.allowed.get(s), s - first
            if versions is not None:
                content = payload[i * SECTOR : (i + 1) * SECTOR]
                if not ledger.fits(s, content, versions):
                    self.fail(
                        "5 resync",
                        f"sector {s} of {node.config.node} gets {ledger.version_at(s, content)!r}, allowed:"
                        f" {sorted(v.id for v in versions)}",
                    )

    def _compare(self, volume: int, first: int, end: int) -> None:
        a = self.w.nodes[0].disks[volume].devices[DATA].live.pages
        b = self.w.nodes[1].disks[volume].devices[DATA].live.pages
        end = min(end, self.pages_end[volume])
        differ = self.differ[volume]
        pages = range(first, end)
        if len(pages) > 64:
            pages = [p for p in a.keys() | b.keys() | differ if first <= p < end]  # type: ignore[assignment]
        for page in pages:
            if a.get(page) != b.get(page):
                differ.add(page)
            else:
                differ.discard(page)

    def crashing(self, node: Node) -> None:
        for v in node.disks:
            record = self.record(node, v)
            record.conn, record.role, record.disk = C.STAND_ALONE, Role.SECONDARY, D.DISKLESS

    def crashed(self, node: Node) -> None:
        for v in node.disks:
            self.record(node, v).view = None
            self._compare(v, 0, self.pages_end[v])

    def disk_broke(self, node: Node, volume: int) -> None:
        self.record(node, volume).n_broke += 1
        if self.w.mix.on_io_error == "pass_on":  # one failure makes the whole disk Inconsistent
            self.w.ledgers[volume].copies[node.index].discarded = True
            self.w.bits_were_left = True

    # ------------------------------------------------------------------ metadata

    def metadata_replaced(self, node: Node, volume: int) -> None:
        record = self.record(node, volume)
        record.view = None
        record.ring.reset()
        record.super_flying.clear()
        record.super_durable = super_at(node.disks[volume].devices[META].live, node.layouts[volume]).identity

    def before_attach(self, node: Node, volume: int) -> DiskView:
        return DiskView(node.disks[volume], node.layouts[volume])

    def attached(self, node: Node, volume: int, loaded: LoadedDisk, before: DiskView) -> None:
        """Rule 9: what is read back is the last durable version or one that was on its way, whole."""
        record = self.record(node, volume)
        found = view_of(loaded.superblock.pack()).identity
        if found not in (record.super_durable, *record.super_flying):
            self.fail("9 metadata", f"{node.config.node} read back {found}, durable was {record.super_durable}")
        record.super_durable = found
        record.super_flying.clear()
        record.ring.reset()
        record.view = None
        n_bits = loaded.bitmap.n_bits
        now = loaded.bitmap.words(0, (n_bits + 63) // 64)
        lost = before.bits(n_bits) & ~int.from_bytes(now, "little")
        missing = [lost.bit_length() - 1] if lost else []
        for extent in before.hot:
            first, end = extent * BITS_PER_EXTENT, min((extent + 1) * BITS_PER_EXTENT, n_bits)
            if first < end and loaded.bitmap.count(first, end) != end - first:
                missing.append(first)
        if before.all_set and loaded.bitmap.weight != n_bits:
            missing.append(0)
        if missing:
            self.fail("9 metadata", f"{node.config.node} lost the bits {missing[:5]} and perhaps more at attach")

    # ------------------------------------------------------------------ answers

    def expected(self, node: Node, volume: int, offset: int, length: int) -> list[Versions]:
        copies = self.w.ledgers[volume].copies
        allowed = copies[self._data_of(node, volume)].allowed
        first = offset // SECTOR
        sectors = range(first, first + length // SECTOR)
        if parted(node, volume):
            own = copies[node.index].allowed
            return [allowed.get(s, INITIAL) | own.get(s, INITIAL) for s in sectors]
        return [allowed.get(s, INITIAL) for s in sectors]

    def good_since(self, node: Node, volume: int) -> tuple[int, bool]:
        """How often the disk has failed so far, and whether it is good now."""
        return self.record(node, volume).n_broke, node.good_disk(volume)

    def _data_of(self, node: Node, volume: int) -> int:
        """Whose copy a reader on *node* sees."""
        return node.index if node.state(volume).disk >= D.CONSISTENT else 1 - node.index

    def finished(self, node: Node, ask: Ask) -> None:
        r = ask.request
        if r.error:
            self._failed(node, ask)
        elif r.op == Op.READ:
            self._read_answered(node, ask)
        elif r.op == Op.FLUSH:
            self._flush_answered(node, ask)
        else:
            assert ask.write is not None
            self._write_answered(node, ask.write)

    def _failed(self, node: Node, ask: Ask) -> None:
        volume = ask.request.volume
        if ask.write is not None:
            self.w.ledgers[volume].gave_up(ask.write)
        record = self.record(node, volume)
        if node.primary and node.good_disk(volume) and ask.good_since == (record.n_broke, True):
            self.fail("1 answers", f"{ask.request!r} failed although the disk is UpToDate and healthy")

    def _read_answered(self, node: Node, ask: Ask) -> None:
        r = ask.request
        ledger = self.w.ledgers[r.volume]
        now = self.expected(node, r.volume, r.offset, r.length)
        data = bytes(r.payload or b"")
        if len(data) != r.length:
            self.fail("durability", f"{r!r} came back with {len(data)} bytes")
        assert ask.expected is not None
        first = r.offset // SECTOR
        for i, (before, after) in enumerate(zip(ask.expected, now, strict=True)):
            content = data[i * SECTOR : (i + 1) * SECTOR]
            if ledger.fits(first + i, content, before | after):
                continue
            if not ledger.came_since(first + i, content, ask.begin):  # else it came and went meanwhile
                self.fail(
                    "durability",
                    f"{node.config.node} read {ledger.version_at(first + i, content)!r} in {first + i},"
                    f" allowed are {sorted(v.id for v in before | after)}",
                )

    def _write_answered(self, node: Node, write: Write) -> None:
        peer, volume = self.w.peer_of(node), write.volume
        ledger = self.w.ledgers[volume]
        assert node.engine is not None
        vol = node.engine.volumes[volume]
        here = ledger.holds(write, self.reader(node, volume))
        there = ledger.holds(write, self.reader(peer, volume))
        state = vol.state
        if not here and state.disk >= D.CONSISTENT:
            self.fail("1 answers", f"{write!r} was answered, it is not on the local disk: {state}")
        reached = there or peer.index in write.reached  # a power cut may have taken it since
        if not here and not reached and self.w.mix.protocol == "C":
            self.fail("1 answers", f"{write!r} was answered, it is on no disk: {state}")
        marked = reached or (superseded(peer, write) and (there or not peer.connected))
        if not marked and (self.w.mix.protocol == "C" or not state.connected):
            self._check_marked(node, write, here)
        # Without waiting for the peer's disk, an answer may be given just before the connection ends in this step.
        alone = not state.connected and (self.w.mix.protocol == "C" or not self.connected_before(node, volume))
        if not reached and alone:
            self._check_alone(node, write)
        mirrored = there and state.connected and peer.connected and state.pdsk is D.UP_TO_DATE
        through = write.fua and mirrored and self.w.mix.protocol == "C"
        if through and not ledger.holds(write, self.reader(peer, volume, durable=True)):
            self.fail("6 flush", f"{write!r} with FUA was answered, it is not stable on {peer.config.node}")
        write.alone = not state.connected
        holders = [n.index for n, holds in ((node, here), (peer, there)) if holds]
        ledger.acked(write, holders)
        if not here:
            ledger.copies[node.index].lacks.add(write)
        # The only good copy may have lost power, and the write unflushed with it, while the answer was on its way.
        lost = reached and state.disk < D.CONSISTENT
        if not there and not lost and (self.w.mix.protocol == "C" or not state.connected):
            ledger.copies[peer.index].lacks.add(write)

    def connected_before(self, node: Node, volume: int) -> bool:
        """Was the volume connected when this step began?"""
        return self.record(node, volume).conn >= C.CONNECTED

    def _check_marked(self, node: Node, write: Write, here: bool) -> None:
        """Rule 1: what the peer lacks is marked, and the peer is out of the mirror."""
        assert node.engine is not None
        vol = node.engine.volumes[write.volume]
        if vol.state.disk < D.INCONSISTENT:
            if not here:
                self.fail("1 answers", f"{write!r} was answered, it is on neither disk: {vol.state}")
            return  # written just before the disk failed; the log on that disk marks it
        peer = self.w.peer_of(node)
        bitmaps = [vol.bitmap]  # a resync's target keeps its bit until its own disk has the block
        if peer.engine is not None and peer.connected:
            bitmaps.append(peer.engine.volumes[write.volume].bitmap)
        unmarked = [s for s in write.sectors if not any(b.n_bits and b.any(s >> 3, (s >> 3) + 1) for b in bitmaps)]
        if self.w.ledgers[write.volume].holds(write, self.reader(peer, write.volume), unmarked):
            return  # a resync has brought it some blocks of a write whose answer was held back
        if vol.mirror:
            self.fail("1 answers", f"{write!r} was answered, the peer does not have it: {vol.state}")
        for extent in range(write.first >> 13, ((write.first + write.n - 1) >> 13) + 1):
            if extent not in vol.al.refs:
                self.fail("1 answers", f"{write!r} was answered, the peer lacks it and it is not marked: {vol.state}")

    def _check_alone(self, node: Node, write: Write) -> None:
        """Rules 7 and 8: what a primary without its peer must have done before it answers."""
        assert node.engine is not None
        peer, volume = self.w.peer_of(node), write.volume
        vol = node.engine.volumes[volume]
        where = node.layouts[volume]
        check_only_side(self, node, write)
        if vol.state.disk >= D.CONSISTENT:
            own = super_at(node.disks[volume].devices[META].durable, where)
            other = super_at(peer.disks[volume].devices[META].durable, where)
            same = own.current & ~1 == other.current & ~1
            if other.flags & WAS_UP_TO_DATE and (same or not own.bitmap):
                self.fail("7 generations", f"{write!r} was answered alone without a new current UUID on disk: {own}")
        if self.w.mix.fencing is Fencing.RESOURCE_AND_STONITH and not node.fenced and not node.resumed:
            if vol.state.pdsk > D.OUTDATED and not node.lost_now(volume):
                self.fail("8 fencing", f"{write!r} was answered before the fence handler has spoken: {vol.state}")
            if not node.fenced_once and could_be_primary(peer, volume):
                self.fail("8 fencing", f"{write!r} was answered, but nobody has fenced the peer: {vol.state}")

    def _flush_answered(self, node: Node, ask: Ask) -> None:
        """Rule 6: everything answered before is stable on every disk in the mirror."""
        assert node.engine is not None and ask.point is not None
        volume = ask.request.volume
        vol = node.engine.volumes[volume]
        state = vol.state
        ledger = self.w.ledgers[volume]
        if ask.n_given_up != ledger.n_given_up:
            return  # a policy has given up what it was to make stable
        nodes = []
        if state.disk is D.UP_TO_DATE:
            nodes.append(node)
        if state.connected and state.pdsk is D.UP_TO_DATE and self.w.peer_of(node).connected and not ask.alone:
            nodes.append(self.w.peer_of(node))
        for holder in nodes:
            read = self.reader(holder, volume, durable=True)
            for s, write in list(ask.point[holder.index].items()):
                if write.alone and write.node != holder.index:
                    continue  # answered in the other's own history; what of it is on the way here, nobody waits for
                if holder is not node and vol.bitmap.n_bits and vol.bitmap.any(s >> 3, (s >> 3) + 1):
                    del ask.point[holder.index][s]
                    continue  # this block is out of the mirror, and marked
                last = ledger.copies[holder.index].last.get(s)
                if last is None or older(last, write):
                    continue  # a resync has replaced this copy since
                content = read(s)
                versions = ledger.copies[holder.index].stable.get(s, INITIAL)
                if not ledger.fits(s, content, frozenset(x for x in versions if not older(x, write))):
                    self.w.note(holder, "holds", s, ledger.version_at(s, content), versions, write.begin)
                    self.fail(
                        "6 flush",
                        f"flush on {node.config.node} answered, {write!r} not stable on {holder.config.node}",
                    )
        ledger.flushed(ask.point, [n.index for n in nodes])

    # ------------------------------------------------------------------ after every step

    def after_step(self) -> None:
        self._check_one_primary()
        for v in range(self.w.mix.n_volumes):
            for node in self.w.nodes:
                if node.engine is not None:
                    self._follow(node, v)
                    node.before[v] = (node.engine.n_established, node.engine.volumes[v].state)
            # Many differences (a full sync) are looked at now and then, a few at every step.
            if self.differ[v] and (len(self.differ[v]) <= DIFFER_ALWAYS_MAX or self.w.n_steps % 8 == 0):
                self._check_covered(v)

    def _check_one_primary(self) -> None:
        a, b = self.w.nodes
        if self.w.mix.two_primaries or not (a.primary and b.primary and a.connected and b.connected):
            return
        if a.link is not None and b.link is not None and a.link.inbound[0] is b.link.outbound[0]:
            self.fail("7 one primary", "both nodes are Primary and connected to each other")

    def _follow(self, node: Node, volume: int) -> None:
        """Notice promotions, starts and ends of resyncs."""
        record, state = self.record(node, volume), node.state(volume)
        if record.conn < C.CONNECTED <= state.conn:
            met(self, node, volume)
        if record.conn < C.WF_REPORT_PARAMS <= state.conn:
            node.shown = Role.PRIMARY if node.primary else Role.SECONDARY
        if state.conn in BECOMING_TARGET and record.conn not in BECOMING_TARGET:
            check_split_brain_decided(self, node, volume)
        if state.role is Role.PRIMARY and record.role is not Role.PRIMARY:
            self._promoted(node, volume)
        if state.conn in SYNCING_TARGET and record.conn not in SYNCING_TARGET:
            self._sync_began(node, volume)
        if record.conn in SYNCING_TARGET and state.conn is C.CONNECTED and state.disk is D.UP_TO_DATE:
            self._sync_ended(node, volume)
        if record.disk is D.UP_TO_DATE is not state.disk:
            record.n_broke += 1  # detached: what was under way may have gone to the peer alone
        if state.connected:
            node.fenced = node.resumed = False
        record.role, record.conn, record.disk = state.role, state.conn, state.disk

    def _promoted(self, node: Node, volume: int) -> None:
        """Durability: whoever is promoted serves every answered write it was in the mirror for."""
        ledger, state = self.w.ledgers[volume], node.state(volume)
        connected = state.connected and self.w.peer_of(node).connected  # else the peer's yes came over a dead link
        if not connected and self.w.mix.fencing is Fencing.DONT_CARE and behind(self.w, node, volume):
            # Asked for while connected, as an operator may; the link went, and nobody was fenced: a split brain.
            self.generations.excuse(node, "promoted while it looked connected, and behind")
        if state.disk is not D.UP_TO_DATE or any(
            c.name == "primary" and c.args.get("force") for c in node.commands.values()
        ):
            return
        read = self.reader(node, volume)
        misfits = ledger.misfits(node.index, read)
        if misfits:
            self.fail("durability", f"{node.config.node} was promoted, sector {misfits[0][0]} {misfits[0][1]}")
        lacks = ledger.still_lacks(node.index, read)
        if lacks and connected and state.pdsk is D.UP_TO_DATE:
            self.fail(
                "durability",
                f"{node.config.node} was promoted while connected, it lacks {next(iter(lacks))!r}",
            )
        fencing = self.w.mix.fencing is not Fencing.DONT_CARE
        if lacks and fencing and not ledger.copies[node.index].discarded and not given_up(self, node, volume):
            self.fail("8 fencing", f"{node.config.node} was promoted, it lacks {next(iter(lacks))!r}")

    def _sync_began(self, target: Node, volume: int) -> None:
        """History: a resync never goes from a node that lacks answered writes to the one that has them."""
        ledger = self.w.ledgers[volume]
        source = self.w.peer_of(target)
        if ledger.copies[target.index].discarded:
            return
        lacks = ledger.still_lacks(source.index, self.reader(source, volume))
        if lacks:
            self.fail(
                "history",
                f"{target.config.node} is target of {source.config.node}, which lacks {next(iter(lacks))!r}",
            )

    def _sync_ended(self, target: Node, volume: int) -> None:
        self.w.ledgers[volume].synced(1 - target.index, target.index)
        agreed_again(self)

    def forced(self, node: Node) -> None:
        for v, ledger in enumerate(self.w.ledgers):
            ledger.adopt(node.index, self.reader(node, v))

    # ------------------------------------------------------------------ bits

    def _check_covered(self, volume: int) -> None:
        """Rule 3: wherever the disks differ, a bit is set or the extent is in use."""
        sources = [self._cover(node, volume) for node in self.w.nodes]
        for page in self.differ[volume]:
            if not any(covers(page) for covers in sources):
                if self._full_sync_due(volume):
                    return
                states = [str(n.state(volume)) if n.engine else "down" for n in self.w.nodes]
                self.fail("3 bits", f"block {page} of volume {volume} differs and nothing says so: {states}")

    def _cover(self, node: Node, volume: int) -> Callable[[int], bool]:
        record = self.record(node, volume)
        if node.engine is not None:
            vol = node.engine.volumes[volume]
            if vol.state.disk >= D.NEGOTIATING:
                bitmap, refs = vol.bitmap, vol.al.refs
                return lambda page: (page < bitmap.n_bits and bitmap.any(page, page + 1)) or refs.get(page >> 10, 0) > 0
        if record.view is None:
            record.view = DiskView(node.disks[volume], node.layouts[volume])
        return record.view.covers

    def _uuids(self, node: Node, volume: int) -> UuidSet:
        if node.engine is not None and node.state(volume).disk >= D.NEGOTIATING:
            return node.engine.volumes[volume].uuids
        found = super_at(node.disks[volume].devices[META].live, node.layouts[volume])
        return UuidSet(found.current, found.bitmap, found.history0, found.history1)

    def _full_sync_due(self, volume: int) -> bool:
        """Would the UUIDs lead to a full sync (or to none at all) anyway?"""
        a, b = (self._uuids(n, volume) for n in self.w.nodes)
        verdict = compare(a, b, CompareFacts(False, False, False, False, True, True))
        return verdict.value not in (0, 1, -1, 100) or verdict.rule == 10

    def check_agreement(self) -> None:
        """Quiet, connected and UpToDate: whatever differs is marked; and after healing nothing differs."""
        for v in range(self.w.mix.n_volumes):
            for page in self.differ[v]:
                if not any(
                    n.engine is not None and n.engine.volumes[v].bitmap.any(page, page + 1) for n in self.w.nodes
                ):
                    self.fail("agreement", f"block {page} of volume {v} differs, both nodes say they agree")

    def check_end(self) -> None:
        """Everything is healed: equal bytes, clean bitmaps, nothing lost, nothing unanswered."""
        for v, ledger in enumerate(self.w.ledgers):
            self._compare(v, 0, self.pages_end[v])
            if self.differ[v]:
                self.fail("agreement", f"blocks {sorted(self.differ[v])[:8]} of volume {v} differ at the end")
            for node in self.w.nodes:
                assert node.engine is not None
                n = node.engine.volumes[v].bitmap.weight
                if n and not self.w.bits_were_left:
                    self.fail("agreement", f"{n} bits of volume {v} are still set on {node.config.node}")
                misfits = ledger.misfits(node.index, self.reader(node, v))
                if misfits:
                    self.fail(
                        "durability",
                        f"at the end sector {misfits[0][0]} of {node.config.node} {misfits[0][1]}",
                    )
