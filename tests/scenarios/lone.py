"""One real engine and nobody else: the test is its disk, its peer, its clock and its operator.

Where `pair` shows what two nodes do, this lets a test hand the machine exactly one packet, completion or
event at the moment it chooses, and look at exactly what comes out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tandem.repl.attach import LoadedDisk
from tandem.repl.bitmap import Bitmap
from tandem.repl.bitmap_exchange import BitmapSender
from tandem.repl.engine import Engine
from tandem.repl.errors import Refusal
from tandem.repl.events import (
    Answer,
    Attach,
    Attached,
    Close,
    Command,
    Connect,
    Effect,
    LinkLost,
    LinkUp,
    Notify,
    Outbox,
    RunHandler,
)
from tandem.repl.link import MARK_AT, OUR_MARK
from tandem.repl.metadata import MdFlag, Superblock, layout
from tandem.repl.requests import DiskOp, Op, Request
from tandem.repl.settings import said
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.units import n_bits_of
from tandem.repl.wire import (
    HEADER,
    HEADER80,
    Features,
    Packet,
    QueueLimits,
    Sizes,
    SyncParam,
    Uuids,
    pack_ack,
    pack_state,
    pack_state_reply,
    pack_sync_uuid,
    packet,
    parse_header,
    parse_header80,
    unpack_barrier,
)

from .pair import GENERATIONS, Entropy, Given

IN_SYNC = MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE | MdFlag.AL_CLEAN
FEATURES_ALL = 15
SYNC_UUID = 0x1_0000_0000_0010
PEER_SECONDARY = State(Role.SECONDARY, Role.UNKNOWN, ConnState.WF_CONNECTION, DiskState.UP_TO_DATE)


class Lone:
    """An engine, and everything that ever came out of it."""

    def __init__(
        self, *, size: int = 64 << 20, n_volumes: int = 1, handlers: tuple[str, ...] = (),
        net: dict[str, Any] | None = None, disk: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None, diskless: bool = False,
    ) -> None:  # fmt: skip
        given = Given(
            size=size, n_volumes=n_volumes, handlers=list(handlers), net=[net or {}, {}],
            disk=[disk or {}, {}], options=options or {}, diskless=[diskless, False],
        )  # fmt: skip
        self.config = given.config(0)
        self.layout = layout("internal", size, size)
        self.now = 1000.0
        self.engine = Engine(self.config, Entropy("A", []), self.now)
        self.vol = self.engine.volumes[0]
        self.packets: list[tuple[str, Packet, int, bytes]] = []  # socket, command, volume, payload
        self.disk: list[DiskOp] = []  # out, not answered
        self.done: list[Request] = []
        self.effects: list[Effect] = []
        self._ticket = 0
        self._partial = {"data": b"", "meta": b""}
        self._introduced = False
        self.wsame = True

    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("requests are taken from the outbox")

    # ------------------------------------------------------------------ what comes out

    def take(self) -> Outbox:
        """Take the outbox and enter it into the logs."""
        out = self.engine.take()
        for socket, buffers in (("data", out.data), ("meta", out.meta)):
            self._read(socket, b"".join(bytes(b) for b in buffers))
        self.disk += out.disk
        self.done += out.done
        self.effects += out.effects
        return out

    def _read(self, socket: str, new: bytes) -> None:
        data = self._partial[socket] + new
        while data:
            if socket == "data" and not self._introduced:
                cmd, length = parse_header80(data)
                volume, start = 0, HEADER80
                self._introduced = True
            else:
                volume, cmd, length = parse_header(data)
                start = HEADER
            assert len(data) >= start + length, "a packet is framed whole in one outbox"
            self.packets.append((socket, Packet(cmd), volume, data[start : start + length]))
            data = data[start + length :]
        self._partial[socket] = data

    def answer(self, *ops: DiskOp, error: int = 0) -> None:
        """The disk answers *ops* (all that are out when none is named)."""
        chosen = list(ops) or list(self.disk)
        for op in chosen:
            self.disk.remove(op)
            op.error = error
            if op.op == Op.READ and not error:
                op.payload = bytes(op.length)
        self.engine.now = self.now
        self.engine.disk_done(chosen)
        self.take()

    def settle(self) -> None:
        """Answer the disk until nothing is out any more."""
        self.take()
        for _ in range(1000):
            if not self.disk:
                return
            self.answer()
        raise AssertionError("the disk is never left alone")

    def sent(self, *kinds: Packet) -> list[Packet]:
        """The names of the packets sent so far, only *kinds* if any are named."""
        return [kind for _, kind, _, _ in self.packets if not kinds or kind in kinds]

    def payloads(self, kind: Packet) -> list[bytes]:
        return [payload for _, k, _, payload in self.packets if k is kind]

    def forget(self) -> None:
        """Empty the logs; what is out on the disk stays out."""
        self.packets.clear()
        self.done.clear()
        self.effects.clear()

    def forget_keep_connect(self) -> None:
        """As `forget`, but an attempt to connect is still outstanding."""
        outstanding = self.of(Connect)[-1:]
        self.forget()
        self.effects += outstanding

    def notes(self) -> list[str]:
        return [e.text for e in self.effects if isinstance(e, Notify)]

    def of(self, kind: type[Any]) -> list[Any]:
        return [e for e in self.effects if isinstance(e, kind)]

    @property
    def closed(self) -> bool:
        return bool(self.of(Close))

    # ------------------------------------------------------------------ what goes in

    def command(self, name: str, volume: int | None = None, **args: Any) -> int:
        self._ticket += 1
        self.engine.handle(Command(self._ticket, name, volume, args), self.now)
        self.take()
        return self._ticket

    def answered(self, ticket: int) -> Refusal | str | None:
        """The refusal of that command, "done", or None while it is not answered."""
        for effect in self.of(Answer):
            if effect.ticket == ticket:
                return effect.refusal or "done"
        return None

    def run(self, name: str, volume: int | None = None, **args: Any) -> Refusal | str | None:
        """A command, with the disk answering at once."""
        ticket = self.command(name, volume, **args)
        self.settle()
        return self.answered(ticket)

    def handler(self, name: str) -> RunHandler:
        """The handler of that name that was last asked for."""
        found = [h for h in self.of(RunHandler) if h.name == name]
        assert found, f"{name} was not run"
        last: RunHandler = found[-1]
        return last

    def handle(self, event: Any) -> None:
        self.engine.handle(event, self.now)
        self.take()

    def at(self, now: float) -> None:
        """It is *now*, and the machine is ticked as the runtime would: at each of its deadlines."""
        while (due := self.engine.deadline()) is not None and due <= now:
            self.now = max(self.now, due)
            self.engine.tick(self.now)
            self.take()
        self.now = now
        self.engine.now = now

    def data(self, *packets: bytes) -> int:
        """Bytes on the data socket; returns how many were consumed."""
        self.engine.now = self.now
        used = self.engine.receive_data(memoryview(b"".join(packets)))
        self.take()
        return used

    def meta(self, *packets: bytes) -> int:
        self.engine.now = self.now
        used = self.engine.receive_meta(memoryview(b"".join(packets)))
        self.take()
        return used

    def submit(
        self, op: Op, offset: int = 0, length: int = 4096, flags: int = 0, volume: int = 0
    ) -> Request:
        """One request; it comes back in `done`."""
        payload = bytes([offset >> 12 & 255]) * length if op is Op.WRITE else None
        r = Request(self, len(self.done), op, volume, offset, 0 if op is Op.FLUSH else length, payload, flags)
        self.engine.now = self.now
        self.engine.submit(volume, [r])
        self.take()
        return r

    def out(self) -> list[Request]:
        """Our writes the peer has not answered, oldest first."""
        return [r for r in self.engine.log.inflight.values() if isinstance(r, Request)]

    # ------------------------------------------------------------------ getting somewhere

    def loaded(
        self, generations: tuple[int, int, int, int] = GENERATIONS, flags: int = IN_SYNC, fresh: bool = False
    ) -> LoadedDisk:
        """What attaching finds: disks that were in sync, unless told otherwise."""
        block = Superblock.fresh(self.layout, device_uuid=1)
        bitmap = Bitmap(0)
        if not fresh:
            current, bm, history0, history1 = generations
            usable = self.layout.usable
            block = replace(
                block, la_size_sect=usable // 512, current=current, bitmap=bm, history0=history0,
                history1=history1, flags=MdFlag(flags),
            )  # fmt: skip
            bitmap = Bitmap(n_bits_of(usable))
        return LoadedDisk(block, self.layout, bitmap, self.layout.usable, 0, 0)

    def attach(self, **found: Any) -> None:
        """Attach disks that `loaded` describes; *sparse* when they are files."""
        sparse = bool(found.pop("sparse", False))
        ticket = self.command("attach")
        for _ in self.engine.volumes:
            effect = self.of(Attach)[-1]
            self.handle(Attached(effect.ticket, effect.volume, self.loaded(**found), sparse))
            self.settle()
        assert self.answered(ticket) == "done"

    def link(self, resolver: bool = False) -> None:
        """The sockets stand."""
        self._introduced = False
        self.handle(LinkUp(self.of(Connect)[-1].ticket, resolver))

    def features(
        self, flags: int = FEATURES_ALL, low: int = 100, high: int = 101, ours: bool = True
    ) -> bytes:
        offer = bytearray(Features(low, high, flags).pack())
        if ours:
            offer[MARK_AT : MARK_AT + len(OUR_MARK)] = OUR_MARK
        self.wsame = bool(flags & 4)
        return bytes(offer)

    def protocol(self, **fields: Any) -> bytes:
        return replace(said(self.config.net), **fields).pack()

    def parameters(
        self, state: State = PEER_SECONDARY, uuids: tuple[int, int, int, int] = GENERATIONS, bits: int = 0,
        flags: int = 0, volume: int = 0,
    ) -> bytes:  # fmt: skip
        """The peer's four packets for a volume."""
        net, sectors = self.config.net, self.layout.usable // 512
        limits = QueueLimits(4096, 512, 0, 4096, 0, 1) if self.wsame else None
        out = SyncParam(250, net.verify_alg, net.csums_alg, 20, 10, 100, 102400).pack(volume)
        has_disk = state.disk >= DiskState.NEGOTIATING
        out += Sizes(sectors if has_disk else 0, 0, sectors, 1 << 20, 0, 0, limits).pack(volume)
        if has_disk:
            out += Uuids(*uuids, bits, flags).pack(volume)
        return out + pack_state(state.word(), volume)

    def connect(
        self, state: State = PEER_SECONDARY, *, resolver: bool = False, ours: bool = True,
        features: int = FEATURES_ALL, **peer: Any,
    ) -> None:  # fmt: skip
        """From StandAlone to wherever the peer's parameters lead."""
        if self.engine.cstate == ConnState.STAND_ALONE:
            assert self.run("connect") == "done"
        self.link(resolver)
        self.data(self.features(features, ours=ours))
        for number in sorted(self.engine.volumes):
            first = self.protocol() if number == 0 else b""
            self.data(first + self.parameters(state, volume=number, **peer))
        self.settle()

    def primary(self) -> None:
        """Promoted, with the peer's consent while connected."""
        ticket = self.command("primary")
        for number in sorted(self.engine.volumes):
            if self.engine.connected:
                self.meta(pack_state_reply(1, number, False), packet(Packet.PING_ACK))
            self.settle()
        assert self.answered(ticket) == "done", self.answered(ticket)

    def ready(self, **how: Any) -> Lone:
        """Attached, connected, Primary; the logs are empty."""
        self.attach()
        self.connect(**how)
        self.primary()
        self.forget()
        return self

    def as_secondary(self, **how: Any) -> Lone:
        """Attached and connected to a Primary; the logs are empty."""
        self.attach()
        self.connect(replace(PEER_SECONDARY, role=Role.PRIMARY), **how)
        self.forget()
        return self

    def bitmap_packets(self, *ranges: tuple[int, int]) -> bytes:
        """The peer's bitmap, with these ranges of bits set."""
        bitmap = Bitmap(self.vol.n_bits)
        for first, end in ranges:
            bitmap.set(first, end)
        sender, out = BitmapSender(bitmap, 0, True), b""
        while not sender.done:
            out += b"".join(sender.packets(1 << 20))
        return out

    def target(self, *ranges: tuple[int, int], role: Role = Role.PRIMARY) -> Lone:
        """SyncTarget of a peer in that role with these ranges out of sync; the logs are empty."""
        self.attach(generations=(0x10, 0, 0, 0))
        peer = replace(PEER_SECONDARY, role=role)
        self.connect(peer, uuids=(0x20, 0x10, 0, 0), bits=sum(b - a for a, b in ranges))
        assert self.conn() == ConnState.WF_BITMAP_T
        self.data(self.bitmap_packets(*ranges))
        self.forget()
        self.data(pack_sync_uuid(SYNC_UUID, 0))
        self.settle()
        assert self.conn() == ConnState.SYNC_TARGET
        return self

    def source(self, *ranges: tuple[int, int], primary: bool = True) -> Lone:
        """SyncSource with these ranges out of sync on the peer; the logs are empty."""
        self.attach(generations=(0x20, 0x10, 0, 0))
        for first, end in ranges:
            self.vol.bitmap.set(first, end)
        if primary:
            assert self.run("primary") == "done"
        self.connect(uuids=(0x10, 0, 0, 0))
        assert self.conn() == ConnState.WF_BITMAP_S
        self.data(self.bitmap_packets(*ranges))
        self.settle()
        assert self.conn() == ConnState.SYNC_SOURCE
        self.forget()
        return self

    def ack(self, r: Request, kind: Packet = Packet.WRITE_ACK) -> bytes:
        return pack_ack(kind, r.volume, r.offset >> 9, r.block_id, r.length, 1)

    @property
    def state(self) -> State:
        return self.vol.state

    def conn(self) -> ConnState:
        """The volume's connection state now (a call, because type checkers believe a property stays)."""
        return self.vol.state.conn

    def local_disk(self) -> DiskState:
        """The local disk's state now; as `conn`."""
        return self.vol.state.disk


def lose(lone: Lone) -> None:
    """The link breaks, and what follows from that is carried out."""
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()


def barriers(lone: Lone) -> list[int]:
    """The numbers of all P_BARRIERs sent."""
    return [unpack_barrier(p) for p in lone.payloads(Packet.BARRIER)]
