"""Drives the machine in the real world: one loop, one flush per wake-up.

Every callback of the loop (bytes from the peer, a batch from a client, ended disk operations, a timer, a
command) goes through `_guard`: tell the machine the time, call it once, and carry out what it hands back
until there is nothing left. Decides the order in which an outbox is started (sockets, disks, effects, then
replies), when front ends pause, and what happens on our own mistakes: the process ends and answers no
more. It relies on nothing in an outbox waiting for anything else in it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NoReturn, Protocol

from tandem.repl.compiled import batches
from tandem.repl.config import ResourceConfig
from tandem.repl.engine import NOTHING, Engine
from tandem.repl.errors import Refusal
from tandem.repl.events import (
    Answer,
    Attach,
    Close,
    Command,
    Connect,
    Effect,
    EndWrite,
    Event,
    Notify,
    Outbox,
    ProbeSize,
    Reconfigure,
    ReleaseDisk,
    ResourceStatus,
    RunHandler,
    SizeChanged,
    StateChanged,
)
from tandem.repl.requests import DiskOp, Owner, PeerWrite, Request

from .blockio import collect_seldom, give_memory_back, keep_memory
from .clock import entropy
from .disk import Disk
from .export import ReplicatedVolume
from .handlers import TIME_LIMIT_S, Handlers
from .link import Link
from .scheduling import Scheduling
from .storage import Storage
from .vigil import Vigil, weight
from .workers import Completions

# Bytes waiting for disk workers at which neither clients nor the peer are read any further; about what a
# slow disk writes in a second, and little against the page cache it stands in for.
DISK_BACKLOG_HIGH: Final = 64 << 20
DISK_BACKLOG_LOW: Final = 32 << 20
LOOK_S: Final = 0.01  # within this time of a wake-up the machine is asked for its deadline; none is so urgent
EXIT_OWN_MISTAKE: Final = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED: Final = Refusal(129, "Interrupted by Signal", "The daemon is stopping.")

News = Notify | StateChanged


class Machine(Protocol):
    """The engine's whole surface, as the edges use it."""

    now: float
    config: ResourceConfig

    @property
    def congested(self) -> bool: ...

    def submit(self, volume: int, batch: list[Request]) -> None: ...
    def receive_data(self, view: memoryview) -> int: ...
    def receive_meta(self, view: memoryview) -> int: ...
    def needed_data(self, tail: memoryview) -> int: ...
    def needed_meta(self, tail: memoryview) -> int: ...
    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None: ...
    def disk_done(self, ops: list[DiskOp]) -> None: ...
    def handle(self, event: Event, now: float) -> None: ...
    def tick(self, now: float) -> None: ...
    def deadline(self) -> float | None: ...
    def take(self) -> Outbox: ...
    def status(self) -> ResourceStatus: ...
    def volume_size(self, number: int) -> int: ...
    def open_refusal(self, number: int, writable: bool) -> str | None: ...


def die(error: BaseException) -> NoReturn:
    """A mistake of ours: say what it was and end at once, before anything wrong is answered."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    os._exit(EXIT_OWN_MISTAKE)


class Runtime:
    """One resource, alive. To be made on the thread of a running event loop; all calls come from there,
    except `post` and `status`, which any thread may use.

    *seed* repeats a run; *machine* makes the engine; *on_fatal* is what to do on our own mistakes. The
    last two and *handler_limit_s* are there for tests.
    """

    def __init__(
        self, config: ResourceConfig, *, seed: int | None = None, machine: Callable[..., Machine] = Engine,
        on_fatal: Callable[[BaseException], None] = die, handler_limit_s: float = TIME_LIMIT_S,
    ) -> None:  # fmt: skip
        keep_memory()
        collect_seldom()
        loop = asyncio.get_running_loop()
        draws = entropy(seed)
        self._loop = loop
        self._thread = threading.get_ident()
        self._on_fatal = on_fatal
        self.engine: Machine = machine(config, draws, loop.time())
        self.disk = Disk(loop, self._disk_ended, self._fatal, config.name)
        self.storage = Storage(loop, self.disk, self._report, self._fatal)
        self.link = Link(
            loop, draws, self.engine, self.disk,
            guard=self._guard, report=self._report, say=self._warn, on_low=self._wake,
        )  # fmt: skip
        self.handlers = Handlers(self._report, self._notify, handler_limit_s)
        # A front end's requests for a volume, as (number, batch).
        self.submit: Callable[[int, list[Request]], None] = partial(self._guard, self.engine.submit)
        self._posted: Completions[Callable[[], None]] = Completions(loop, self._run_posted, self._fatal)
        self._vigil = Vigil(loop)
        self._scheduling = Scheduling()
        self._inside = False  # a wake-up is being worked on
        self._fresh = True  # something was told to the machine since it was last asked what it wants
        self._stopped = False
        self._disk_full = False  # DISK_BACKLOG_HIGH was passed, DISK_BACKLOG_LOW not reached since
        self._events: deque[Event] = deque()
        self._news: list[News] = []
        self._subscribers: list[Callable[[list[News]], None]] = []
        self._waiting: list[Callable[[], None]] = []  # for the pause to end
        self._answers: dict[int, asyncio.Future[Refusal | None]] = {}
        self._last_ticket = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._looking = False  # the machine is about to be asked for its deadline
        self._volumes: dict[int, ReplicatedVolume] = {}
        self._snapshot = self.engine.status()
        self._refreshing = False
        self._effects: dict[type[Effect], Callable[[Any], None]] = {
            Connect: self._connect, Close: self._close, Attach: self._attach, ReleaseDisk: self._release,
            EndWrite: self._end_write, ProbeSize: self._probe, RunHandler: self._run_handler,
            Answer: self._answer, Notify: self._tell, StateChanged: self._tell, SizeChanged: self._resized,
        }  # fmt: skip

    # ------------------------------------------------------------------------- for the daemon

    async def start(self) -> None:
        """Begin; the resource stays as it is configured until commands come (attach, connect, …)."""
        self._wake()

    async def command(self, name: str, volume: int | None = None, **args: object) -> Refusal | None:
        """Carry out an administrator's command (`Command`); None when done."""
        return await self._ask(lambda ticket: Command(ticket, name, volume, args))

    async def reconfigure(self, config: ResourceConfig) -> Refusal | None:
        """Apply new configuration values to the live resource."""
        return await self._ask(lambda ticket: Reconfigure(ticket, config))

    def status(self) -> ResourceStatus:
        """The state of everything; from any thread, at once.

        On the loop's thread it is exact. Elsewhere states are those after the last wake-up, and counters
        are as old as the call before this one.
        """
        if not self._stopped:
            if threading.get_ident() == self._thread:
                self._snapshot = self.engine.status()
            elif not self._refreshing:
                self._refreshing = True
                self.post(self._refresh)
        return self._snapshot

    def subscribe(self, callback: Callable[[list[News]], None]) -> Callable[[], None]:
        """Have *callback* called with the news of each wake-up; the result ends the subscription."""
        self._subscribers.append(callback)

        def unsubscribe() -> None:
            if callback in self._subscribers:
                self._subscribers.remove(callback)

        return unsubscribe

    def volume(self, number: int) -> ReplicatedVolume:
        """What front ends see of volume *number*; KeyError when the resource has none."""
        if number not in self._volumes:
            if self.engine.config.volume(number) is None:
                raise KeyError(number)
            self._volumes[number] = ReplicatedVolume(self, number)
        return self._volumes[number]

    def post(self, call: Callable[[], None]) -> None:
        """From any thread: run *call* on the loop. All that were posted meanwhile share one wake-up."""
        self._posted.put(call)

    async def stop(self) -> None:
        """End everything at once: sockets, handlers, threads, files. A graceful end is a `down` before it.

        Operations that are out on disks are waited for; requests that are not answered stay so.
        """
        if self._stopped:
            return
        self._stopped = True
        self._scheduling.close()
        if self._timer is not None:
            self._timer.cancel()
        self.handlers.stop()
        await self.link.stop()
        await self.storage.stop()
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(INTERRUPTED)
        self._answers.clear()

    # ---------------------------------------------------------------------------- one wake-up

    def _guard(self, call: Callable[..., object], *args: object) -> None:
        """Run *call* as one wake-up, or as a part of the wake-up that is being worked on."""
        if self._stopped:
            return
        if self._inside:
            self._fresh = True
            call(*args)  # the flush we are in goes round once more
            return
        self._inside = True
        self._vigil.woken()
        try:
            self.engine.now = self._loop.time()
            call(*args)
            self._flush()
        except Exception as error:
            self._fatal(error)
        finally:
            self._inside = False

    def _fatal(self, error: BaseException) -> None:
        """A mistake of ours, wherever it was noticed: nothing more is answered."""
        self._stopped = True
        self._on_fatal(error)

    def _wake(self) -> None:
        self._guard(_nothing)

    def _flush(self) -> None:
        """Carry out what the machine wants until it wants nothing and nobody has anything new for it."""
        engine, disk = self.engine, self.disk
        finished: list[Request] = []
        work = 0
        self._fresh = True
        while not self._stopped:
            if self._fresh:
                self._fresh = False
                out = engine.take()
                if out is not NOTHING:
                    if out.data:
                        self.link.send_data(out.data)
                    if out.meta:
                        self.link.send_meta(out.meta)
                    if out.done:
                        work += weight(out.done)
                        finished = finished + out.done if finished else out.done
                    ended = disk.start(out.disk) if out.disk else None
                    for effect in out.effects:
                        self._effects[type(effect)](effect)
                    if ended:
                        work += weight(ended)
                        engine.disk_done(ended)
                        self._fresh = True
                    if self._fresh or self._stopped:
                        continue
            if self._events:
                engine.handle(self._events.popleft(), engine.now)
                self._fresh = True
            elif finished:
                batch, finished = finished, []
                deliver(batch)
            elif self._news:
                self._publish()
            elif self._waiting and not self.paused:
                waiting, self._waiting = self._waiting, []
                for resume in waiting:
                    resume()
            else:
                break
        if disk.backlog or self._disk_full:
            self._watch_disk()
        if not self._looking:
            self._look_soon()
        if disk.n_out and disk.slow:
            self._vigil.sleep()
        else:
            self._vigil.watch(work)

    def _publish(self) -> None:
        """Tell subscribers the news of this wake-up; of several state changes they hear once."""
        news, self._news = self._news, []
        changed = [item for item in news if isinstance(item, StateChanged)]
        if changed:
            self._snapshot = self.engine.status()
            news = [item for item in news if not isinstance(item, StateChanged)] + changed[:1]
            give_memory_back()  # what a resync or a client that has gone needed
        for callback in tuple(self._subscribers):
            callback(news)

    def _look_soon(self) -> None:
        """Deadlines move with every wake-up, and to ask for them costs as much as the wake-up itself: so
        many wake-ups share one look."""
        if not self._stopped:
            self._looking = True
            self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        self._looking = False
        if self._stopped:
            return
        self._scheduling.look(self._loop.time())
        try:
            self._set_timer()
        except Exception as error:
            self._fatal(error)

    def _set_timer(self) -> None:
        """A timer that rings too early is left alone: it looks again, and that is rarer than moving it."""
        due = self.engine.deadline()
        if due is None:
            return
        if self._timer is not None:
            if self._timer_due <= due:
                return
            self._timer.cancel()
        self._timer_due = due
        self._timer = self._loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        self._guard(self._tick)

    def _tick(self) -> None:
        # After a stall (of this process, of the whole machine) the timer comes before the sockets. What
        # the peer has said in time must not count as late because we were.
        self.link.poll()
        due = self.engine.deadline()
        if due is not None and due <= self.engine.now:
            self.engine.tick(self.engine.now)

    # ------------------------------------------------------------------------- back-pressure

    @property
    def paused(self) -> bool:
        """Whether front ends are to leave further requests in their sockets."""
        return self.engine.congested or self.link.congested or self._disk_full

    def on_resume(self, callback: Callable[[], None]) -> None:
        """Call *callback* once as soon as the pause is over."""
        self._waiting.append(callback)
        if not self._inside and not self.paused:
            self._loop.call_soon(self._wake)

    def _watch_disk(self) -> None:
        backlog = self.disk.backlog
        if backlog > DISK_BACKLOG_HIGH:
            self._disk_full = True
        elif self._disk_full and backlog < DISK_BACKLOG_LOW:
            self._disk_full = False
            if self._waiting:
                self._loop.call_soon(self._wake)
        self.link.hold(self._disk_full)

    # ------------------------------------------------------------------- what wakes us up

    def _disk_ended(self, ops: list[DiskOp]) -> None:
        self._guard(self.engine.disk_done, ops)

    def _report(self, event: Event) -> None:
        """An event for the machine, from any thread."""
        if threading.get_ident() != self._thread:
            self.post(partial(self._report, event))
            return
        self._events.append(event)
        self._wake()

    def report(self, event: Event) -> None:
        """An event from the volumes' side (`Opened`)."""
        self._report(event)

    def _notify(self, notice: Notify) -> None:
        """News from an edge, from any thread."""
        if threading.get_ident() != self._thread:
            self.post(partial(self._notify, notice))
            return
        self._news.append(notice)
        self._wake()

    def _warn(self, text: str, why: str) -> None:
        self._notify(Notify(self.engine.config.name, text, why, "warning"))

    def _run_posted(self, calls: list[Callable[[], None]]) -> None:
        self._guard(_run_all, calls)

    def _refresh(self) -> None:
        self._refreshing = False
        self._snapshot = self.engine.status()

    async def _ask(self, question: Callable[[int], Event]) -> Refusal | None:
        if self._stopped:
            return INTERRUPTED
        self._last_ticket += 1
        ticket = self._last_ticket
        answer: asyncio.Future[Refusal | None] = self._loop.create_future()
        self._answers[ticket] = answer
        self._report(question(ticket))
        return await answer

    # ------------------------------------------------------------------------------- effects

    def _connect(self, effect: Connect) -> None:
        self.link.connect(effect.ticket, self.engine.config)

    def _close(self, effect: Close) -> None:
        self.link.close(effect.ticket, effect.linger_s)

    def _attach(self, effect: Attach) -> None:
        volume = self.engine.config.volume(effect.volume)
        assert volume is not None, f"attach of volume {effect.volume}, which is not configured"
        self.storage.attach(effect.ticket, volume)

    def _release(self, effect: ReleaseDisk) -> None:
        self.storage.release(effect.volume)

    def _end_write(self, effect: EndWrite) -> None:
        self.link.end_write(effect.volume)

    def _probe(self, effect: ProbeSize) -> None:
        self.storage.probe(effect.ticket, effect.volume)

    def _run_handler(self, effect: RunHandler) -> None:
        self.handlers.run(effect, self.engine.config, self.engine.status())

    def _answer(self, effect: Answer) -> None:
        answer = self._answers.pop(effect.ticket, None)
        if answer is not None and not answer.done():
            answer.set_result(effect.refusal)

    def _tell(self, effect: News) -> None:
        self._news.append(effect)

    def _resized(self, effect: SizeChanged) -> None:
        """Nothing to do: front ends ask a volume for its size whenever they need it."""


def deliver(batch: list[Request]) -> None:
    """Give finished requests back, to each owner all of its own at once."""
    if batches.of_one_owner(batch):
        batch[0].owner.finished(batch)
        return
    by_owner: dict[int, tuple[Owner, list[Request]]] = {}
    for request in batch:
        by_owner.setdefault(id(request.owner), (request.owner, []))[1].append(request)
    for owner, own in by_owner.values():
        owner.finished(own)


def _nothing() -> None:
    """A wake-up only to look again."""


def _run_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()
