"""One simulated machine: an engine (while its process lives), its disks, and what it waits for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from unittest import mock

from tandem.repl import attach, replica
from tandem.repl.activity_log import initialised_block
from tandem.repl.config import ResourceConfig
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
    EndWrite,
    Notify,
    Opened,
    ReleaseDisk,
    RunHandler,
)  # fmt: skip
from tandem.repl.metadata import BLOCK_SIZE, Layout, MdFlag, Superblock, layout
from tandem.repl.requests import DATA, META, Request
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import DATA_PACKET

from .client import Write
from .fake_disk import EIO, SECTOR, Arriving, FakeDevice, FakeDisk, FakeStore
from .fake_link import DATA_SOCKET, LinkEnd
from .handlers import Running
from .mix import MIB, Mix

if TYPE_CHECKING:
    from .client import FlushPoint, Versions
    from .world import World

META_DEVICE: int = 2 * MIB  # size of an external metadata device
LONG_MIN: Final = SECTOR  # what counts as a long write here, where few are longer than some blocks


@dataclass(slots=True)
class Ask:
    """One request of the application, from submission to answer."""

    request: Request
    write: Write | None = None
    expected: list[Versions] | None = None  # a read: what each sector might hold when it was submitted
    point: FlushPoint | None = None  # a flush: what it has to make stable
    begin: int = 0  # ledger step of the submission
    alone: bool = False  # a flush: asked for before the nodes met
    n_given_up: int = 0  # a flush: how many histories had been given up when it was submitted
    good_since: tuple[int, bool] = (0, False)  # failures of the disk so far, and whether it is good


@dataclass(slots=True)
class Clients:
    """The applications on one node; the owner of their requests."""

    open: dict[int, Ask] = field(default_factory=dict)  # by id of the request

    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("the world hands requests back by itself")


class Node:
    def __init__(self, world: World, index: int, mix: Mix, config: ResourceConfig) -> None:
        self.world = world
        self.index = index
        self.mix = mix
        self.config = config
        self.engine: Engine | None = None
        self.disks: dict[int, FakeDisk] = {}
        self.layouts: dict[int, Layout] = {}
        for v in range(mix.n_volumes):
            data = FakeDevice(mix.size)
            meta = FakeDevice(META_DEVICE) if mix.external else None
            self.disks[v] = FakeDisk(data, meta)
            md_size = META_DEVICE if mix.external else mix.size
            self.layouts[v] = layout("flexible" if mix.external else "internal", md_size, mix.size)
        self.n_boots = 0
        self.fenced_once = False  # the fence handler has spoken since the nodes met, in this life or before
        self.link: LinkEnd | None = None
        self.forget()

    def forget(self) -> None:
        """The process is gone, and with it everything it waited for."""
        self.engine = None
        self.due: float | None = None  # when the machine wants to be woken
        self.link = None
        self.unwanted = 0  # bytes to come of a write that has failed
        self.splice: Arriving | None = None  # a long write of the peer that goes to the disk as it comes
        self.connect: int | None = None  # ticket of an outstanding Connect
        self.attaches: list[Attach] = []
        self.handlers: list[Running] = []
        self.n_meetings = 0  # how often a connection was established
        self.before: dict[int, tuple[int, State]] = {}  # volume -> how often it had met the peer, and how it was
        self.shown = Role.SECONDARY  # the role it told the peer in the handshake
        self.commands: dict[int, Command] = {}
        self.refusals: list[Refusal] = []
        self.clients = Clients()
        self.opened: set[int] = set()
        self.closing = False  # clients are told to finish, for a demotion
        self.auto = False  # Primary because a client came, and until the last one goes
        self.fenced = False  # the fence handler has spoken since the peer was lost
        self.resumed = False  # the operator released frozen I/O since the peer was lost

    # ------------------------------------------------------------------ state, as the checkers see it

    def state(self, volume: int = 0) -> State:
        assert self.engine is not None
        return self.engine.volumes[volume].state

    @property
    def up(self) -> bool:
        return self.engine is not None

    @property
    def primary(self) -> bool:
        """Primary in any volume."""
        return self.engine is not None and Role.PRIMARY in [v.state.role for v in self.engine.volumes.values()]

    @property
    def connected(self) -> bool:
        """Connected in all volumes."""
        if self.engine is None:
            return False
        return min([v.state.conn for v in self.engine.volumes.values()]) >= ConnState.CONNECTED

    def lost_now(self, volume: int) -> bool:
        """Was a fence not due yet when this step began, though the volume is frozen at its end?

        The nodes met and parted again within it; or one of several volumes did, that had been parted from a peer
        known to be no better than Outdated, before the next volume's states ended the handshake.
        """
        assert self.engine is not None
        n_established, state = self.before.get(volume, (0, State()))
        apart = state.conn < ConnState.CONNECTED and state.pdsk <= DiskState.OUTDATED and not state.suspended
        return self.engine.n_established > n_established or apart

    def good_disk(self, volume: int) -> bool:
        return self.engine is not None and self.state(volume).disk is DiskState.UP_TO_DATE

    # ------------------------------------------------------------------ metadata from outside

    def create_md(self, volume: int) -> None:
        """What the operator's create-md does: everything is made durable."""
        disk, where = self.disks[volume], self.layouts[volume]
        store = FakeStore(disk.devices[META])
        store.write(where.bitmap, bytes(where.bitmap_bytes if not self.mix.external else BLOCK_SIZE * 8))
        store.write(where.al, initialised_block() * where.al_blocks)
        store.write(where.superblock, Superblock.fresh(where, device_uuid=self.index + 1).pack())
        disk.lose_nothing()
        self.world.checks.metadata_replaced(self, volume)

    def make_equal(self, volume: int, current: int) -> None:
        """Metadata of a node that was in sync with its peer and was shut down: generation *current*."""
        self.create_md(volume)
        disk, where = self.disks[volume], self.layouts[volume]
        super_block = Superblock(
            la_size_sect=where.usable // SECTOR, current=current, bitmap=0, history0=0x1111_0000 + 2 * volume,
            history1=0x2222_0000 + 2 * volume, device_uuid=self.index + 1,
            flags=MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE | MdFlag.AL_CLEAN,
        ).placed(where)  # fmt: skip
        FakeStore(disk.devices[META]).write(where.superblock, super_block.pack())
        disk.lose_nothing()
        self.world.checks.metadata_replaced(self, volume)

    # ------------------------------------------------------------------ life of the process

    def boot(self) -> None:
        self.n_boots += 1
        seed = self.world.seed * 1000 + self.n_boots * 2 + self.index
        self.engine = Engine(self.config, random.Random(seed), self.world.now)
        self.pump()
        for v in range(self.mix.n_volumes):
            self.command("attach", v)
        self.command("connect")

    def command(self, name: str, volume: int | None = None, **args: object) -> int:
        assert self.engine is not None
        ticket = self.world.new_ticket()
        command = Command(ticket, name, volume, dict(args))
        self.commands[ticket] = command
        self.world.note(self, "command", name, volume, args)
        if name == "resume-io":
            self.resumed = True
            self.world.overruled |= self.primary and not self.connected
        self.engine.handle(command, self.world.now)
        self.pump()
        return ticket

    def open_exports(self) -> None:
        assert self.engine is not None
        for v in range(self.mix.n_volumes):
            self.opened.add(v)
            self.engine.handle(Opened(v, 1), self.world.now)
        self.pump()

    def close_exports(self) -> None:
        assert self.engine is not None
        for v in sorted(self.opened):
            self.engine.handle(Opened(v, 0), self.world.now)
        self.opened.clear()
        self.pump()

    def run_attach(self, effect: Attach, crash_after: int | None = None) -> None:
        """Load the metadata as the edge does; HostCrash when it is to die in the middle."""
        assert self.engine is not None
        disk = self.disks[effect.volume]
        store = FakeStore(disk.devices[META], crash_after)
        kind = "flexible" if self.mix.external else "internal"
        before = self.world.checks.before_attach(self, effect.volume)
        try:
            loaded = attach.load(store, disk.devices[DATA].size, kind)
        except MetadataError as error:
            self.world.note(self, "attach failed", str(error))
            self.engine.handle(
                AttachFailed(effect.ticket, effect.volume, Refusal(error.code, str(error))), self.world.now
            )
        else:
            self.world.checks.attached(self, effect.volume, loaded, before)
            self.engine.handle(Attached(effect.ticket, effect.volume, loaded), self.world.now)
        self.pump()

    # ------------------------------------------------------------------ the outbox

    def pump(self) -> None:
        """Carry out what the machine wants."""
        engine = self.engine
        assert engine is not None
        for _ in range(1000):
            out = engine.take()
            if not out:
                self.due = engine.deadline()
                return
            end = self.link
            if (out.data or out.meta) and end is not None and end.started and not end.closed:
                end.outbound[0].send(out.data)
                end.outbound[1].send(out.meta)
            for op in out.disk:
                self.disks[op.volume].submit(op)
            for request in out.done:
                self.world.finished(self, request)
            for effect in out.effects:
                self._effect(effect)
        raise AssertionError("the machine never runs out of things it wants")

    def feed(self, socket: int) -> None:
        """Hand the machine what has arrived on *socket*, together with what it left over last time."""
        engine, end = self.engine, self.link
        assert engine is not None and end is not None
        pipe = end.inbound[socket]
        if socket == DATA_SOCKET and self.unwanted:
            n = min(self.unwanted, len(pipe.rx))
            pipe.rx, self.unwanted = pipe.rx[n:], self.unwanted - n
        if self.splice is not None and socket == DATA_SOCKET:
            pipe.rx = self._arrived(self.splice, pipe.rx)
            if end.closed or not pipe.rx:
                return
        view = memoryview(pipe.rx)
        n = engine.receive_meta(view) if socket else engine.receive_data(view)
        assert 0 <= n <= len(view)
        pipe.rx = pipe.rx[n:]
        if socket == DATA_SOCKET and len(pipe.rx) >= DATA_PACKET.size and self._begin(memoryview(pipe.rx)):
            pipe.rx = b""

    # ------------------------------------------------------------------ long writes, as `edge.splice` does them

    def _begin(self, rest: memoryview) -> bool:
        """Does *rest* begin a write of the peer that goes to the disk as it comes? The chooser may want it so."""
        assert self.engine is not None
        with mock.patch.object(replica, "LONG_MIN", LONG_MIN):
            w = self.engine.begin_write(rest, lambda volume: self.world.chooser.choose(2) == 1)
        if w is None:
            return False
        self.world.counts["splices"] += 1
        self.world.note(self, "splices", w)
        self.splice = self.disks[w.volume].begin(w)
        self._arrived(self.splice, bytes(rest[DATA_PACKET.size :]))
        return True

    def _arrived(self, splice: Arriving, data: bytes) -> bytes:
        """*splice* gets the first of *data*; what is left is another packet's."""
        world, n = self.world, splice.rest
        self.disks[splice.op.volume].arrive(splice, data[:n])
        if not splice.arriving:
            self.splice = None
            if not (world.mix.early and world.chooser.choose(4) == 3):  # else its end is as late as another write's
                world.complete(self, splice.op.volume, [splice])
        return data[n:]

    def end_write(self, volume: int) -> None:
        """The disk takes no more of a write that is arriving: it has failed now, and the rest of it is nobody's."""
        splice = self.splice
        if splice is not None and splice.op.volume == volume:
            self.splice, self.unwanted = None, splice.rest
            self.world.counts["failed"] += 1
            self.disks[volume].abandon(splice, EIO)

    def abandon(self) -> None:
        """The link has ended, and the machine knows: of a write that was arriving it hears some time later."""
        splice, self.splice = self.splice, None
        self.unwanted = 0
        if splice is not None:
            self.world.counts["abandoned"] += 1
            self.world.counts["abandoned in the middle"] += bool(splice.entries)
            self.disks[splice.op.volume].abandon(splice)

    # ------------------------------------------------------------------ effects

    def _effect(self, effect: Effect) -> None:
        world = self.world
        match effect:
            case Connect(ticket):
                if self.link is not None:
                    self.link.close()
                    self.link = None
                    self.abandon()
                self.connect = ticket
            case Close(ticket):
                if self.connect == ticket:
                    self.connect = None
                if self.link is not None and self.link.ticket == ticket:
                    self.link.close(world.lost_suffix(self.link))
                    self.link = None
                    self.abandon()
            case Attach():
                self.attaches.append(effect)
            case EndWrite(volume):
                self.end_write(volume)
            case ReleaseDisk(volume):
                assert not self.disks[volume].flights, (
                    f"the disk is released with {self.disks[volume].flights} in flight"
                )
            case RunHandler():
                self.handlers.append(Running(effect, self.n_meetings))
            case Answer(0, refusal):
                world.note(self, "demoted by itself", refusal.text if refusal else "done")
            case Answer(ticket, refusal):
                command = self.commands.pop(ticket, None)
                assert command is not None, f"a second answer to command {ticket}"
                world.answered(self, command, refusal)
            case Notify(subject, text, why, level):
                world.note(self, "notify", subject, text, why, level)
            case _:
                pass
