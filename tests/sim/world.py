"""The simulated world: two nodes, the link between them, applications, an operator, trouble and a clock.

One step is: list what could happen, let the chooser choose, do it, collect outboxes, run the checkers. The
clock only moves when that is chosen (or nothing else is left), and then to the next moment for which
somebody waits. The first option is always ordinary progress, so a run that always takes it is undisturbed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Any

from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import Command, HandlerExited, LinkLost, LinkUp
from tandem.repl.requests import DATA, FUA, MAY_UNMAP, META, DiskOp, Op, Request
from tandem.repl.states import ConnState, DiskState, Role

from . import admin, handlers
from .checkers import Checks
from .chooser import Chooser
from .client import SECTOR, Ledger
from .fake_disk import Flight, HostCrash
from .fake_link import DATA_SOCKET, LinkEnd, make_link
from .mix import Mix, configuration, strained
from .node import Ask, Node

Option = tuple[float, Callable[..., None], tuple[Any, ...]]

PROGRESS = 10.0
REQUEST_SIZES = (8, 8, 8, 8, 1, 3, 16, 24)  # sectors
BUSY_TICKS_MAX = 2000
PIECE_FAILS = 40.0  # so many times as often as another operation: a write is seldom in pieces
ONE_END = ((0, 0), (0, 1), (1, 0), (1, 1))  # node and socket
CUTS = (3.0, 1.0, 1.0, 1.0, 1.0)  # all of the link, or one of these


class Violation(AssertionError):
    """Something that must always hold did not."""


class Brief:
    """What the trace keeps of an operation: not its payload."""

    __slots__ = ("error", "kind", "length", "meta", "offset", "op", "volume")

    def __init__(self, op: DiskOp) -> None:
        self.kind = type(op)
        self.op, self.meta, self.volume = op.op, op.area, op.volume
        self.offset, self.length, self.error = op.offset, op.length, op.error

    def __str__(self) -> str:
        area = "META" if self.meta else "DATA"
        where = f"{area} vol {self.volume} {self.offset}+{self.length} err {self.error}"
        return f"<{self.kind.__name__} {Op(self.op).name} {where}>"


class World:
    def __init__(self, mix: Mix, chooser: Chooser, seed: int = 0) -> None:
        self.mix = mix
        self.chooser = chooser
        self.seed = seed
        self.now = 1000.0
        self.n_steps = 0
        self.trace: deque[tuple[int, float, str, tuple[object, ...]]] = deque(maxlen=4000)
        self.counts: Counter[str] = Counter()  # how often what must not be missing has happened
        self.ledgers = [Ledger(v, first_id=1 + v * 1_000_000) for v in range(mix.n_volumes)]
        self.checks = Checks(self)
        self.nodes = (Node(self, 0, mix, configuration(mix, 0)), Node(self, 1, mix, configuration(mix, 1)))
        self.troubled = True
        self.client_on = True
        self.network_up = True
        self._ticket = 0
        self._spots = self._choose_spots()
        self._ticks_at = (0.0, 0)
        self._down: list[Node] = []
        # Somebody did what may split the brain without the machine's fault; or two Primaries lose each other unfenced.
        self.split_possible = mix.risky or (mix.two_primaries and mix.fencing is Fencing.DONT_CARE)
        self.overruled = False  # the operator let a node go on that should have waited for fencing
        self.bits_were_left = False  # the nodes agreed that bits are set and nothing is to be done about it
        self.checks.start()

    def _choose_spots(self) -> list[int]:
        """Sectors around which the applications write."""
        end = self.nodes[0].layouts[0].usable // SECTOR
        n = self.mix.n_spots
        if n > 50:  # spread over more extents than the activity log has slots
            return [min(i * end // n // 8 * 8, end - 2048) for i in range(n)]
        spots = [0, end - 64, 8189, 4096, 1024]
        spots += [self.chooser.choose(max(1, end // 8 - 8)) * 8 for _ in range(n)]
        return [s for s in spots if 0 <= s <= end - 64][:n]

    # ------------------------------------------------------------------ bookkeeping

    def note(self, node: Node | None, what: str, *details: object) -> None:
        self.trace.append((self.n_steps, self.now, f"{'ab'[node.index]} {what}" if node else what, details))

        if what == "notify" and str(details[1]).startswith("No resync, but"):
            self.bits_were_left = True

    def new_ticket(self) -> int:
        self._ticket += 1
        return 1_000_000 + self._ticket

    def chance(self, n: int) -> bool:
        """True once in *n*; never when only scripted choices are taken."""
        return self.chooser.choose(n) == n - 1

    def peer_of(self, node: Node) -> Node:
        return self.nodes[1 - node.index]

    def fail(self, rule: str, text: str) -> None:
        raise Violation(f"{rule}: {text}")

    # ------------------------------------------------------------------ one step

    def step(self) -> bool:
        """Do one of the things that can happen; False when nothing can."""
        self.n_steps += 1
        options = self.progress()
        self._client_options(options)
        if self.troubled:
            admin.add_options(self, options)
            self._trouble(options)
        n_ticks = self._tick_option(options)
        if not options and not n_ticks:
            return False
        choice = self.chooser.choose(len(options), [o[0] for o in options]) if len(options) > 1 else 0
        _, action, args = options[choice]
        action(*args)
        while self._down:
            self._ended(self._down.pop())
        self.checks.after_step()
        return True

    def progress(self) -> list[Option]:
        """Ordinary progress: networks deliver, disks answer, processes start."""
        options: list[Option] = []
        for node in self.nodes:
            if node.engine is None:
                continue
            end = node.link
            if end is not None and not end.started:
                options.append((PROGRESS, self.link_up, (node,)))
            elif end is not None and not end.closed:
                for socket in (1, 0):
                    pipe = end.inbound[socket]
                    if pipe.incoming:  # the rest of a long write is slow, so that other things happen meanwhile
                        slow = socket == DATA_SOCKET and node.splice is not None
                        options.append((PROGRESS / 4 if slow else PROGRESS, self.deliver, (node, socket)))
                    elif pipe.end_visible:
                        options.append((PROGRESS / 2, self.link_lost, (node, socket)))
            for v, disk in node.disks.items():
                if disk.ready:
                    options.append((PROGRESS, self.disk_op, (node, v)))
            if node.attaches:
                options.append((PROGRESS, self.attach, (node,)))
            if node.handlers:
                slow = self.mix.slow_handler and node.handlers[0].code is not None
                options.append((PROGRESS / 20 if slow else PROGRESS / 4, self.handler, (node,)))
        a, b = self.nodes
        if a.connect is not None and b.connect is not None and self.network_up:
            options.append((self.mix.reconnect, self.connect, ()))
        return options

    def _tick_option(self, options: list[Option]) -> bool:
        deadlines = [n.due for n in self.nodes if n.due is not None]
        if not deadlines:
            return False
        options.append((self.mix.tick if options else 1.0, self.tick, (min(deadlines),)))
        return True

    # ------------------------------------------------------------------ ordinary progress

    def link_up(self, node: Node) -> None:
        end = node.link
        assert end is not None and node.engine is not None
        end.started = True
        node.connect = None
        self.note(node, "link up", end.ticket, end.resolver)
        node.engine.handle(LinkUp(end.ticket, end.resolver), self.now)
        node.pump()

    def connect(self) -> None:
        a, b = self.nodes
        assert a.connect is not None and b.connect is not None
        a.link, b.link = make_link((a.connect, b.connect), self.chooser.choose(2))
        a.connect = b.connect = None
        self.note(None, "link made")

    def deliver(self, node: Node, socket: int) -> None:
        end = node.link
        assert end is not None and node.engine is not None
        pipe = end.inbound[socket]
        n = len(pipe.incoming)
        # Not what a Primary hears of the peer's disk: a barrier ack that overtakes that by seconds is not caught.
        trickles = self.mix.trickle and socket == DATA_SOCKET and node.connected and not node.primary
        if (trickles or self.mix.chunk) and self.chooser.choose(3) > (0 if trickles else 1):
            n = 1 + self.chooser.choose(n)
        pipe.deliver(n)
        self.note(node, "receives", ("data", "meta")[socket], n)
        node.engine.now = self.now
        node.feed(socket)
        node.pump()

    def link_lost(self, node: Node, socket: int) -> None:
        end = node.link
        assert end is not None and node.engine is not None
        end.inbound[socket].at_end = True
        self.note(node, "link lost", ("data", "meta")[socket])
        node.engine.handle(LinkLost(end.ticket, "connection reset by peer", meta=bool(socket)), self.now)
        node.pump()

    def disk_op(self, node: Node, volume: int) -> None:
        disk = node.disks[volume]
        ready = disk.ready
        flight = ready[self.chooser.choose(len(ready))]
        if not flight.executed:
            disk.execute(flight)
            if self.mix.early and self.chooser.choose(4) == 3:
                self.note(node, "executes", Brief(flight.op))
                return
        done = [flight]
        if self.mix.early and len(ready) > 1 and self.chooser.choose(3) == 2:
            done += [f for f in ready if f.executed and f is not flight]
        self.complete(node, volume, done)

    def complete(self, node: Node, volume: int, done: Sequence[Flight]) -> None:
        assert node.engine is not None
        for flight in done:
            if flight.op.error:  # of a write that came in pieces it hears late: it may have been promoted meanwhile
                self._may_lose_disk(node, flight)
        ops = [node.disks[volume].complete(f) for f in done]
        self.note(node, "disk done", *map(Brief, ops))
        node.engine.now = self.now
        node.engine.disk_done(ops)
        node.pump()

    def attach(self, node: Node) -> None:
        effect = node.attaches.pop(0)
        crash_after = None
        if self.troubled and self.mix.crash_in_attach and self.chance(4):
            crash_after = self.chooser.choose(12)
        self.note(node, "attaches", effect.volume, crash_after)
        try:
            node.run_attach(effect, crash_after)
        except HostCrash:
            self.crash(node, power=bool(self.mix.power_cut) and self.chance(2))

    def handler(self, node: Node) -> None:
        assert node.engine is not None
        running = node.handlers[0]
        effect, code = running.effect, running.code
        if code is None:
            running.code = code = handlers.run(self, node, effect)
            self.note(node, "handler", effect.name, effect.volume, code)
            if self.mix.slow_handler or node.engine is None:
                return
        elif self.troubled and self.mix.lying_handler and self.chance(8):
            code = handlers.OUT_OF_TIME
        node.handlers.remove(running)
        late = running.n_meetings != node.n_meetings or node.state().conn >= ConnState.WF_REPORT_PARAMS
        if effect.name == "fence-peer" and code in handlers.PEER_IS_OUT and not late:
            node.fenced = node.fenced_once = True
        self.note(node, "handler ends", effect.name, code)
        node.engine.handle(HandlerExited(effect.ticket, code), self.now)
        node.pump()

    def tick(self, deadline: float) -> None:
        if deadline > self.now:
            self.now = deadline
        at, n = self._ticks_at
        self._ticks_at = (self.now, n + 1 if at == self.now else 1)
        if self._ticks_at[1] > BUSY_TICKS_MAX:
            self.fail("liveness", "the machine wants to be woken again and again at the same moment")
        for node in self.nodes:
            if node.engine is not None:
                due = node.engine.deadline()
                if due is not None and due <= self.now:
                    self.note(node, "ticks")
                    node.engine.tick(self.now)
                    node.pump()

    # ------------------------------------------------------------------ the application

    def _client_options(self, options: list[Option]) -> None:
        if not self.client_on or not self.mix.client:
            return
        for node in self.nodes:
            if node.primary and node.opened and not node.closing and len(node.clients.open) < self.mix.queue_depth:
                options.append((self.mix.client, self.submit, (node,)))

    def submit(self, node: Node) -> None:
        """One batch of requests to one volume."""
        volume = self.chooser.choose(self.mix.n_volumes)
        room = self.mix.queue_depth - len(node.clients.open)
        n = 1 + self.chooser.choose(min(room, 4))
        batch = [self._request(node, volume) for _ in range(n)]
        self.note(node, "submits", *map(Brief, batch))
        assert node.engine is not None
        node.engine.now = self.now
        node.engine.submit(volume, batch)
        node.pump()

    def _request(self, node: Node, volume: int) -> Request:
        m = self.mix
        kind = self.chooser.choose(6, (10, 4, 1.5 * m.flushes, 0.7, 0.7, 1 + 0.3 * m.flushes))
        if kind == 2:
            return self.flush(node, volume)
        spot = self._spots[self.chooser.choose(len(self._spots))] + self.chooser.choose(16)
        n = REQUEST_SIZES[self.chooser.choose(len(REQUEST_SIZES))]
        if m.big_writes and self.chance(6):
            n = 8 * (1 + self.chooser.choose(48 if self.chooser.choose(6) else 256))
        end = node.layouts[volume].usable // SECTOR
        spot = min(spot if n % 8 else spot // 8 * 8, end - n)
        if kind == 1:
            return self.read(node, volume, spot * SECTOR, n * SECTOR)
        op = (Op.WRITE, Op.READ, Op.FLUSH, Op.TRIM, Op.ZEROES, Op.WRITE)[kind]
        return self.write(node, volume, spot * SECTOR, n * SECTOR, op, FUA if kind == 5 else 0)

    def write(self, node: Node, volume: int, offset: int, length: int, op: Op = Op.WRITE, flags: int = 0) -> Request:
        zero = op is not Op.WRITE
        write = self.ledgers[volume].new_write(node.index, offset, length, zero=zero, fua=bool(flags & FUA))
        if op is Op.ZEROES:
            flags |= MAY_UNMAP
        payload = None if zero else write.payload()
        request = Request(node.clients, write.id, op, volume, offset, length, payload, flags)
        node.clients.open[id(request)] = Ask(request, write, good_since=self.checks.good_since(node, volume))
        return request

    def read(self, node: Node, volume: int, offset: int, length: int) -> Request:
        request = Request(node.clients, None, Op.READ, volume, offset, length)
        expected = self.checks.expected(node, volume, offset, length)
        node.clients.open[id(request)] = Ask(
            request,
            expected=expected,
            begin=self.ledgers[volume].step,
            good_since=self.checks.good_since(node, volume),
        )
        return request

    def flush(self, node: Node, volume: int) -> Request:
        request = Request(node.clients, None, Op.FLUSH, volume, 0, 0)
        point = self.ledgers[volume].flush_point()
        node.clients.open[id(request)] = Ask(
            request, point=point, alone=not node.connected, n_given_up=self.ledgers[volume].n_given_up,
            good_since=self.checks.good_since(node, volume),
        )  # fmt: skip
        return request

    def finished(self, node: Node, request: Request) -> None:
        ask = node.clients.open.pop(id(request), None)
        if ask is None:
            self.fail("answers", f"{request!r} was answered twice, or never asked")
            return
        self.note(node, "answered", Brief(request))
        self.checks.finished(node, ask)

    # ------------------------------------------------------------------ the operator

    def answered(self, node: Node, command: Command, refusal: Refusal | None) -> None:
        self.note(node, "answer", command.name, command.volume, refusal.text if refusal else "done")
        if refusal is not None:
            node.refusals.append(refusal)
        if command.name == "primary" and refusal is None:
            if command.args.get("force"):
                self.overruled = True
                self.checks.forced(node)
            node.closing = False
            node.open_exports()
        if command.name == "secondary" and refusal is not None and node.primary:
            node.closing = False
            node.open_exports()
        if command.name == "down" and refusal is None:
            self._down.append(node)

    def discard(self, node: Node, volume: int | None = None) -> None:
        """The operator gives up what this node has."""
        for ledger in self.ledgers:
            if volume is None or ledger.volume == volume:
                ledger.copies[node.index].discarded = True

    # ------------------------------------------------------------------ trouble

    def _trouble(self, options: list[Option]) -> None:
        m = self.mix
        if any(node.splice is not None for node in self.nodes):
            m = strained(m)
        for node in self.nodes:
            if node.engine is None:
                options.append((m.reboot, self.boot, (node,)))
                continue
            if m.process_crash:
                options.append((m.process_crash, self.crash, (node, False)))
            if m.power_cut:
                options.append((m.power_cut, self.crash, (node, True)))
            if m.eio:
                for v, disk in node.disks.items():
                    if any(not f.executed for f in disk.ready):
                        options.append((m.eio, self.eio, (node, v)))
                if node.splice is not None:
                    options.append((PIECE_FAILS * m.eio, self.fail_flight, (node, node.splice)))
        linked = [n for n in self.nodes if n.link is not None]
        if linked and m.cut:
            options.append((m.cut, self.cut, ()))
        if linked and m.half_dead:
            options.append((m.half_dead, self.half_dead, ()))

    def boot(self, node: Node) -> None:
        self.note(node, "boots")
        node.boot()

    def _ended(self, node: Node) -> None:
        """A process that was shut down is gone; soon after, the power of its host may be, too."""
        if node.engine is None:
            return
        if node.clients.open or any(d.flights for d in node.disks.values()):
            self.fail("answers", f"{node.config.node} is down, {node.clients.open or node.disks} is not finished")
        self.crash(node, power=self.troubled and bool(self.mix.power_cut) and self.chance(2))

    def crash(self, node: Node, power: bool) -> None:
        """The process is killed, or the host loses power."""
        self.note(node, "power cut" if power else "crash")
        end = node.link
        if end is not None:
            silent = power and self.chooser.choose(2) == 1
            end.close(self.lost_suffix(end), silent)
        for v, ledger in enumerate(self.ledgers):
            for ask in node.clients.open.values():
                if ask.write is not None and ask.write.volume == v:
                    ledger.gave_up(ask.write)
        self.counts["power cut in a splice" if power else "crash in a splice"] += node.splice is not None
        self.checks.crashing(node)
        node.forget()
        for v, disk in node.disks.items():
            if power:
                disk.power_cut(self.chooser)
                self.ledgers[v].power_cut(node.index)
            else:
                disk.process_crash(self.chooser)
        self.checks.crashed(node)

    def eio(self, node: Node, volume: int) -> None:
        """The disk fails one operation."""
        flights = [f for f in node.disks[volume].ready if not f.executed]
        self.fail_flight(node, flights[self.chooser.choose(len(flights))])

    def fail_flight(self, node: Node, flight: Flight) -> None:
        volume = flight.op.volume
        self._may_lose_disk(node, flight)
        if flight.arriving:  # its next piece
            node.end_write(volume)
            self.checks.disk_broke(node, volume)
            self.complete(node, volume, [flight])
            return
        if node.disks[volume].fail(flight, self.chooser):
            self.ledgers[volume].power_cut(node.index)
            self.checks.crashed(node)  # what the disk holds is another thing now
        self.checks.disk_broke(node, volume)
        self.complete(node, volume, [flight])

    def _may_lose_disk(self, node: Node, flight: Flight) -> None:
        """A failure that costs a Primary its disk, and with it what says whose data is newer."""
        volume = flight.op.volume
        if node.primary and (flight.op.area == META or self.mix.on_io_error != "pass_on"):
            self.checks.generations.lost(node, volume, self.checks.record(node, volume))

    def lost_suffix(self, end: LinkEnd) -> int | None:
        """How many of the bytes on their way from *end* still arrive; None: all."""
        longest = max(len(p.incoming) for p in end.outbound)
        if not longest or self.chooser.choose(2) == 0:
            return None
        return self.chooser.choose(longest)

    def cut(self) -> None:
        """Both sockets break; or one end of one of them is reset, of which the other end knows nothing yet.

        Each direction loses any suffix of what was under way.
        """
        which = self.chooser.choose(1 + len(ONE_END), CUTS)
        ends = (0, 1) if which == 0 else ONE_END[which - 1][:1]
        sockets = (0, 1) if which == 0 else ONE_END[which - 1][1:]
        self.note(None, "cut", ends, sockets)
        for end in [self.nodes[i].link for i in ends]:
            for pipe in [end.inbound[socket] for socket in sockets] if end is not None else []:
                if not pipe.ended:
                    n = len(pipe.incoming)
                    pipe.end(n if n == 0 or self.chooser.choose(2) == 0 else self.chooser.choose(n))

    def half_dead(self) -> None:
        """One direction of one socket silently swallows everything from now on."""
        node = self.nodes[self.chooser.choose(2)]
        end = node.link
        if end is not None:
            pipe = end.inbound[self.chooser.choose(2)]
            self.note(node, "hears nothing more on one socket")
            pipe.end(self.chooser.choose(len(pipe.incoming) + 1), silent=True)

    # ------------------------------------------------------------------ seen from outside

    @property
    def quiet(self) -> bool:
        """Nothing is on its way anywhere."""
        for node in self.nodes:
            if node.attaches or node.handlers or node.clients.open or any(d.flights for d in node.disks.values()):
                return False
            if node.link is not None and any(p.incoming or p.rx for p in node.link.inbound):
                return False
        return True

    @property
    def healthy(self) -> bool:
        """Both nodes are up, connected, UpToDate, and nothing is on its way."""
        for node in self.nodes:
            if node.engine is None or node.link is None or any(p.ended for p in node.link.inbound):
                return False
            for v in range(self.mix.n_volumes):
                s = node.state(v)
                if (
                    s.conn is not ConnState.CONNECTED
                    or s.disk is not DiskState.UP_TO_DATE
                    or s.pdsk is not DiskState.UP_TO_DATE
                ):
                    return False
        return self.quiet

    def describe(self) -> list[str]:
        """The end of the story, for a failure."""
        lines = [f"{n:5d} {now:10.3f} {what} {' '.join(map(str, details))}" for n, now, what, details in self.trace]
        for node in self.nodes:
            lines += [f"node {'ab'[node.index]} waits: {c}" for c in node.commands.values()]
            lines += [f"node {'ab'[node.index]} waits: {a.request!r}" for a in node.clients.open.values()]
            for v in range(self.mix.n_volumes):
                what = str(node.state(v)) if node.engine is not None else "down"
                lines.append(f"node {'ab'[node.index]} volume {v}: {what}")
        return lines


__all__ = ["DATA", "Role", "Violation", "World"]
