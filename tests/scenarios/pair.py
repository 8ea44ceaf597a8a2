"""Two real engines with the simulator's disks and streams, driven in one fixed order.

Everything that can happen at once happens in turns: what was sent first arrives first, disks answer in the
order they were asked, and the clock moves only when a step says so (or by a tenth of a second, for timers
that close an epoch or a flush). So the same steps always give the same transcript.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tandem.repl import attach
from tandem.repl.activity_log import initialised_block
from tandem.repl.config import (
    DiskOptions,
    Endpoint,
    NetOptions,
    ResourceConfig,
    ResourceOptions,
    VolumeConfig,
)
from tandem.repl.engine import Engine
from tandem.repl.errors import MetadataError, Refusal
from tandem.repl.events import (
    Answer,
    Attach,
    Attached,
    AttachFailed,
    Close,
    Command,
    Connect,
    Effect,
    HandlerExited,
    LinkLost,
    LinkUp,
    Notify,
    Opened,
    ReleaseDisk,
    RunHandler,
    SizeChanged,
)  # fmt: skip
from tandem.repl.metadata import BLOCK_SIZE, MdFlag, Superblock, layout
from tandem.repl.requests import DATA, META, Op, Request
from tandem.repl.wire import Feature, Packet

from tests.sim.chooser import ScriptedChooser
from tests.sim.fake_disk import EIO, FakeDevice, FakeDisk, FakeStore
from tests.sim.fake_link import LinkEnd, make_link

from .transcribe import Transcriber, uuid

SETTLE_S = 0.1  # how far the clock may move by itself within a step
GENERATIONS = (0x1E06C7EA664FB56A, 0, 0x1AD331CBB4784384, 4)  # of disks that are in sync from the start
ELIDED = frozenset((Packet.RS_DATA_REQUEST, Packet.RS_DATA_REPLY, Packet.RS_WRITE_ACK))
SHOWN_OF_MANY = 2
NAMES = "ab"


class Entropy:
    """Chance that can be read: the values a scenario gives, then A000000000000010, A000000000000020 …"""

    def __init__(self, letter: str, given: list[int]) -> None:
        self._given = list(given)
        self._next = int(letter + "000000000000010", 16)

    def getrandbits(self, k: int, /) -> int:
        if self._given:
            return self._given.pop(0) & ((1 << k) - 1)
        value, self._next = self._next, self._next + 16
        repeated = int.from_bytes(value.to_bytes(8, "big") * (k // 64 + 1), "big")
        return repeated & ((1 << k) - 1)


@dataclass
class Given:
    """What a scenario starts from. Options by node; both nodes' when only named once."""

    size: int = 64 << 20
    n_volumes: int = 1
    fresh: list[bool] = field(default_factory=lambda: [False, False])
    disk: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    net: list[dict[str, Any]] = field(default_factory=lambda: [{}, {}])
    options: dict[str, Any] = field(default_factory=dict)
    handlers: list[str] = field(default_factory=list)
    random: list[list[int]] = field(default_factory=lambda: [[], []])
    resolver: int = 1
    diskless: list[bool] = field(default_factory=lambda: [False, False])
    show_disk: bool = False

    def config(self, index: int) -> ResourceConfig:
        disk = DiskOptions(**self.disk[index])
        return ResourceConfig(
            name="r0", node=NAMES[index], peer=NAMES[1 - index],
            address=Endpoint("ipv4", f"10.0.0.{1 + index}", 7788),
            peer_address=Endpoint("ipv4", f"10.0.0.{2 - index}", 7788),
            volumes=tuple(
                VolumeConfig(
                    v, v, f"/dev/drbd{v}", "" if self.diskless[index] else f"/dev/fake{v}", disk_options=disk
                )
                for v in range(self.n_volumes)
            ),
            net=NetOptions(**self.net[index]), options=ResourceOptions(**self.options),
            handlers={name: f"/bin/{name}" for name in self.handlers},
            node_id=index, peer_node_id=1 - index,
        )  # fmt: skip


class Node:
    """One node: its process (or none), its disks, and what it waits for."""

    def __init__(self, pair: Pair, index: int, given: Given) -> None:
        self.pair = pair
        self.index = index
        self.name = NAMES[index]
        self.given = given
        self.engine: Engine | None = None
        self.config = given.config(index)
        self.layout = layout("internal", given.size, given.size)
        self.disks = {v: FakeDisk(FakeDevice(given.size)) for v in range(given.n_volumes)}
        self.entropy = Entropy("AB"[index], given.random[index])
        self.link: LinkEnd | None = None
        self.held: set[str] = set()  # data, meta (what it sends), disk, writes
        self.n_failing = 0  # so many of its next data operations fail
        self._ticket = 0
        self._forget()
        for disk in self.disks.values():
            self._make_metadata(disk, given.fresh[index])

    def _forget(self) -> None:
        self.engine = None
        self.connect: int | None = None
        self.attaches: list[Attach] = []
        self.handlers: list[RunHandler] = []
        self.commands: dict[int, str] = {}
        self.spoken = (Transcriber(False), Transcriber(True))

    def _make_metadata(self, disk: FakeDisk, fresh: bool) -> None:
        store, where = FakeStore(disk.devices[META]), self.layout
        store.write(where.bitmap, bytes(where.bitmap_bytes))
        store.write(where.al, initialised_block() * where.al_blocks)
        block = Superblock.fresh(where, device_uuid=self.index + 1)
        if not fresh:
            current, bitmap, history0, history1 = GENERATIONS
            block = replace(
                block, la_size_sect=where.usable // 512, current=current, bitmap=bitmap, history0=history0,
                history1=history1, flags=MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE | MdFlag.AL_CLEAN,
            )  # fmt: skip
        assert len(block.pack()) == BLOCK_SIZE
        store.write(where.superblock, block.pack())
        disk.lose_nothing()

    # ------------------------------------------------------------------ the process

    def start(self) -> None:
        assert self.engine is None, f"{self.name} is running already"
        self.engine = Engine(self.config, self.entropy, self.pair.now)
        self.pump()

    def crash(self, power: bool) -> None:
        """The process dies, or the whole host with its disks' caches."""
        if self.link is not None:
            self.link.close(None if not power else 0, silent=power)
            self.link = None
        for disk in self.disks.values():
            if power:
                disk.power_cut(ScriptedChooser())
            else:
                disk.process_crash(ScriptedChooser())
        self._forget()
        self.pair.shown.pop(self.name, None)

    def command(self, name: str, volume: int | None, args: dict[str, Any]) -> None:
        assert self.engine is not None, f"{self.name} is not running"
        self._ticket += 1
        self.commands[self._ticket] = name
        self.engine.handle(Command(self._ticket, name, volume, args), self.pair.now)
        self.pump()

    def submit(self, op: Op, volume: int, offset: int, length: int, flags: int) -> None:
        assert self.engine is not None
        payload = None
        if op is Op.WRITE:
            self.pair.n_writes += 1
            payload = bytes((self.pair.n_writes,)) * length
        name = f"{op.name.lower()}" + ("" if op is Op.FLUSH else f" {offset}+{length}")
        self.engine.now = self.pair.now
        self.engine.submit(volume, [Request(self.pair, name, op, volume, offset, length, payload, flags)])
        self.pump()

    def opened(self, count: int) -> None:
        assert self.engine is not None
        for v in self.disks:
            self.engine.handle(Opened(v, count), self.pair.now)
        self.pump()

    def handler_exits(self, name: str, code: int) -> None:
        assert self.engine is not None
        waiting = [h for h in self.handlers if h.name == name]
        assert waiting, f"{self.name} does not wait for {name}"
        self.handlers.remove(waiting[0])
        self.engine.handle(HandlerExited(waiting[0].ticket, code), self.pair.now)
        self.pump()

    # ------------------------------------------------------------------ what it wants

    def pump(self) -> None:
        """Carry out the outbox until it stays empty."""
        engine = self.engine
        assert engine is not None
        while out := engine.take():
            say = self.pair.say
            for effect in out.effects:
                if isinstance(effect, Notify):  # the cause before what is sent because of it
                    self._notice(effect)
            end = self.link
            if (out.data or out.meta) and end is not None:
                wsame = bool(engine.link.features & Feature.WSAME)
                for socket, buffers in enumerate((out.data, out.meta)):
                    if end.closed:
                        continue
                    end.outbound[socket].send(buffers)
                    self.spoken[socket].wsame = wsame
                    for kind, line in self.spoken[socket].lines(buffers):
                        say(f"{self.name} {'DM'[socket]}> {line}", kind)
            for op in out.disk:
                if self.given.show_disk:
                    self._say_disk(op)
                self.disks[op.volume].submit(op)
            for effect in out.effects:
                self._effect(effect)
            for r in out.done:
                where = f"[{r.volume}] " if r.volume else ""
                say(f"{self.name}  = {where}{r.cookie}: {f'error {r.error}' if r.error else 'done'}")

    def _say_disk(self, op: Any) -> None:
        where = "" if op.op == Op.FLUSH else f" {op.offset}+{op.length}"
        if op.area == META:
            names = {self.layout.superblock: "superblock", self.layout.bitmap: "bitmap"}
            fallback = "log" if self.layout.al <= op.offset < self.layout.al + (1 << 15) else where
            where = f" {names.get(op.offset, fallback)}"
        flags = "".join(f" {name}" for bit, name in ((1, "FUA"), (2, "PREFLUSH")) if op.flags & bit)
        self.pair.say(f"{self.name}  * {Op(op.op).name.lower()}{where}{flags}")

    def _effect(self, effect: Effect) -> None:
        say = self.pair.say
        match effect:
            case Connect(ticket):
                self._hang_up()
                self.connect = ticket
            case Close(ticket):
                if self.connect == ticket:
                    self.connect = None
                if self.link is not None and self.link.ticket == ticket:
                    say(f"{self.name}  . closes the sockets")
                    self._hang_up()
            case Attach():
                self.attaches.append(effect)
            case ReleaseDisk(volume):
                assert not self.disks[volume].flights, "the disk is released with operations in flight"
            case RunHandler(_, name, volume):
                say(f"{self.name}  . runs {name}" + ("" if volume is None else f" for volume {volume}"))
                self.handlers.append(effect)
            case Answer(ticket, refusal):
                self._answered(self.commands.pop(ticket), refusal)
            case SizeChanged(volume, size):
                say(f"{self.name}  . volume {volume} has {size} bytes")
            case _:
                pass

    def _notice(self, notify: Notify) -> None:
        volume = notify.subject.partition("/")[2]
        where = f"[{volume}] " if volume not in ("", "0") else ""
        mark = "." if notify.level == "info" else "!"
        why = f"  <- {notify.why}" if notify.why else ""
        self.pair.say(f"{self.name}  {mark} {where}{notify.text}{why}")

    def _answered(self, name: str, refusal: Refusal | None) -> None:
        if refusal is None:
            self.pair.say(f"{self.name}  = {name}: done")
            return
        more = "".join(f" / {line}" for line in (refusal.hint, *refusal.info) if line)
        self.pair.say(f"{self.name}  = {name}: refused ({refusal.code}) {refusal.text}{more}")

    def _hang_up(self) -> None:
        if self.link is not None:
            self.link.close()
            self.link = None

    # ------------------------------------------------------------------ what happens to it

    def attach_disk(self) -> None:
        assert self.engine is not None
        effect = self.attaches.pop(0)
        disk = self.disks[effect.volume]
        try:
            loaded = attach.load(FakeStore(disk.devices[META]), disk.devices[DATA].size, "internal")
        except MetadataError as error:
            refusal = Refusal(error.code, str(error))
            self.engine.handle(AttachFailed(effect.ticket, effect.volume, refusal), self.pair.now)
        else:
            self.engine.handle(Attached(effect.ticket, effect.volume, loaded), self.pair.now)
        self.pump()

    def disk_answers(self) -> bool:
        """Every operation that is out on the disks is done, in one go per disk."""
        assert self.engine is not None
        any_done = False
        for disk in self.disks.values():
            flights = [f for f in disk.flights if not self._holds(f.op)]
            if "disk" in self.held or not flights:
                continue
            for flight in flights:
                fails = self.n_failing > 0 and flight.op.area == DATA and flight.op.op != Op.FLUSH
                self.n_failing -= fails
                disk.execute(flight, EIO if fails else 0)
            self.engine.now = self.pair.now
            self.engine.disk_done([disk.complete(f) for f in flights])
            self.pump()
            any_done = True
            if self.engine is None:
                break
        return any_done

    def _holds(self, op: Any) -> bool:
        return op.area == DATA and op.op != Op.FLUSH and (
            ("writes" in self.held and op.op != Op.READ) or ("reads" in self.held and op.op == Op.READ)
        )  # fmt: skip

    def receive(self, socket: int) -> bool:
        """Everything that has arrived on one socket, or its end."""
        end, engine = self.link, self.engine
        if end is None or engine is None or not end.started or ("data", "meta")[socket] in self.peer.held:
            return False
        pipe = end.inbound[socket]
        if not pipe.incoming:
            if not pipe.end_visible:
                return False
            if end.inbound[1 - socket].incoming:  # what the peer said before is heard first, as the edge does
                return self.receive(1 - socket)
            pipe.at_end = True
            self.pair.say(f"{self.name}  . sees the {('data', 'meta')[socket]} socket end")
            lost = LinkLost(end.ticket, "the peer closed the connection", meta=bool(socket))
            engine.handle(lost, self.pair.now)
            self.pump()
            return True
        pipe.deliver(len(pipe.incoming))
        engine.now = self.pair.now
        self._feed(socket)
        self.pump()
        self._feed(1 - socket)
        self.pump()
        return True

    def _feed(self, socket: int) -> None:
        while self.engine is not None and self.link is not None and self.link.inbound[socket].rx:
            pipe = self.link.inbound[socket]
            receive = self.engine.receive_meta if socket else self.engine.receive_data
            used = receive(memoryview(pipe.rx))
            pipe.rx = pipe.rx[used:]
            if not used:
                return
            self.pump()

    @property
    def peer(self) -> Node:
        return self.pair.nodes[1 - self.index]

    def link_up(self) -> None:
        assert self.engine is not None and self.link is not None
        self.link.started = True
        self.engine.handle(LinkUp(self.link.ticket, self.link.resolver), self.pair.now)
        self.pump()

    def summary(self) -> list[str]:
        """One line per volume: states, bits, generations."""
        lines = []
        for v, vol in (self.engine.volumes if self.engine else {}).items():
            s = vol.state
            gi = ""
            if vol.attached:
                u = vol.uuids
                quad = " : ".join(uuid(x) for x in (u.current, u.bitmap, u.history0, u.history1))
                gi = f"  {vol.bitmap.weight} bits  {quad}"
            flags = "".join(
                f" {name}"
                for name in ("susp", "aftr_isp", "peer_isp", "user_isp", "susp_nod", "susp_fen")
                if getattr(s, name)
            )
            where = f"[{v}] " if v else ""
            lines.append(f"{self.name} {where}{s.conn} {s.role}/{s.peer} {s.disk}/{s.pdsk}{flags}{gi}")
        return lines


class Pair:
    """Both nodes, the network between them, the clock, and the transcript."""

    def __init__(self, given: Given) -> None:
        self.given = given
        self.now = 0.0
        self.network_up = True
        self.n_writes = 0
        self.out: list[str] = []
        self.shown: dict[str, list[str]] = {}
        self._said_at = 0.0
        self._counts: dict[str, int] = {}
        self._elided: dict[str, int] = {}
        self.nodes = (Node(self, 0, given), Node(self, 1, given))

    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("requests are taken from the outbox")

    # ------------------------------------------------------------------ the transcript

    def say(self, line: str, kind: Packet | None = None) -> None:
        if kind in ELIDED and "resync" in line:
            key = f"{line[:4]} {kind}"
            self._counts[key] = self._counts.get(key, 0) + 1
            if self._counts[key] > SHOWN_OF_MANY:
                name = f"{line.split()[0]} {line.split()[2]}"
                self._elided[name] = self._elided.get(name, 0) + 1
                return
        self._say_elided()
        if self.now - self._said_at > 0.0005:
            self.out.append(f"    -- {self.now:.2f} s")
            self._said_at = self.now
        self.out.append("    " + line)

    def _say_elided(self) -> None:
        if self._elided:
            more = ", ".join(f"{n} more {name}" for name, n in self._elided.items())
            self._elided = {}
            self.out.append(f"    … {more}")

    def end_step(self) -> list[str]:
        """The lines of the step, and the states that are not as they were."""
        self._say_elided()
        for node in self.nodes:
            lines = node.summary()
            for line in lines:
                if line not in self.shown.get(node.name, []):
                    self.out.append("    => " + line)
            self.shown[node.name] = lines
        out, self.out = self.out, []
        self._counts = {}
        return out

    # ------------------------------------------------------------------ time and events

    def settle(self) -> None:
        """Let everything happen that needs no time, and a little of what does."""
        self.run_until(self.now + SETTLE_S)

    def run_until(self, end: float) -> None:
        while True:
            for _ in range(100_000):
                if not self._round():
                    break
            else:
                raise AssertionError("the pair never comes to rest")
            due = [d for n in self.nodes if n.engine is not None and (d := n.engine.deadline()) is not None]
            if not due or min(due) > end:
                break
            self.now = max(self.now, min(due))
            for node in self.nodes:
                if node.engine is not None and (at := node.engine.deadline()) is not None and at <= self.now:
                    node.engine.tick(self.now)
                    node.pump()
        self.now = end

    def _round(self) -> bool:
        """One turn for everything that could happen; False when nothing could."""
        any_done = False
        a, b = self.nodes
        for node in self.nodes:
            while node.engine is not None and node.attaches:
                node.attach_disk()
                any_done = True
        if a.connect is not None and b.connect is not None and self.network_up:
            self.say(f"--  link established, {NAMES[self.given.resolver]} is the resolver")
            a.link, b.link = make_link((a.connect, b.connect), self.given.resolver)
            for node in self.nodes:
                node.connect = None
                node.spoken = (Transcriber(False), Transcriber(True))
            for node in self.nodes:
                node.link_up()
            any_done = True
        for node in self.nodes:
            for socket in (0, 1):
                any_done |= node.receive(socket)
        for node in self.nodes:
            if node.engine is not None:
                any_done |= node.disk_answers()
        return any_done

    # ------------------------------------------------------------------ trouble

    def cut(self) -> None:
        """The network goes silently: nothing arrives any more, nobody is told."""
        self.network_up = False
        for node in self.nodes:
            if node.link is not None:
                for pipe in (*node.link.inbound, *node.link.outbound):
                    pipe.end(0, silent=True)

    def reset(self) -> None:
        """Both nodes see both sockets end; what was under way is lost."""
        for node in self.nodes:
            if node.link is not None:
                for pipe in node.link.inbound:
                    pipe.end(0)
                    pipe.silent = False

    def compare(self) -> None:
        """Do both disks of every volume hold the same bytes?"""
        usable = self.nodes[0].layout.usable
        for v in range(self.given.n_volumes):
            one, other = (n.disks[v].devices[DATA].live.pages for n in self.nodes)
            zero = bytes(4096)
            differ = sorted(
                page
                for page in one.keys() | other.keys()
                if page * 4096 < usable and one.get(page, zero) != other.get(page, zero)
            )
            text = "equal" if not differ else f"different in {len(differ)} blocks from {differ[0] * 8}"
            self.say(f"--  the data of volume {v} is {text}")
