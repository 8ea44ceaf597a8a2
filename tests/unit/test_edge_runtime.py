"""The runtime around a scripted machine: the order in a wake-up, timers, threads, back-pressure, ends."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvloop
from tandem.repl.config import Endpoint, ResourceConfig, VolumeConfig
from tandem.repl.edge import disk as disk_module
from tandem.repl.edge.blockio import Device
from tandem.repl.edge.disk import OpenVolume
from tandem.repl.edge.runtime import INTERRUPTED, Runtime
from tandem.repl.edge.vigil import Vigil
from tandem.repl.errors import Refusal
from tandem.repl.events import (
    Answer,
    Command,
    Event,
    HandlerExited,
    Notify,
    Opened,
    Outbox,
    Reconfigure,
    ReleaseDisk,
    RunHandler,
    StateChanged,
)
from tandem.repl.requests import FUA, DiskOp, Op, PeerWrite, Request

SIZE = 1 << 20
CONFIG = ResourceConfig(
    "r0", "one", "two", Endpoint("ipv4", "127.0.0.1", 7788), Endpoint("ipv4", "127.0.0.2", 7788),
    (VolumeConfig(0, 0, "/dev/drbd0", ""), VolumeConfig(3, 1, "/dev/drbd1", "")),
    handlers={"fence-peer": "exit 7"},
)  # fmt: skip


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy test machine must not pass for a slow disk."""
    monkeypatch.setattr(disk_module, "SLOW_S", 60.0)


class Script:
    """A machine that writes what it is given, answers every command, and notes what it was asked."""

    def __init__(self, config: ResourceConfig, draws: object, now: float) -> None:
        self.config = config
        self.now = now
        self.congested = False
        self.out = Outbox()
        self.events: list[Event] = []
        self.ticks: list[float] = []
        self.due: float | None = None
        self.refusal: Refusal | None = None
        self.n_status = 0
        self.n_batches = 0
        self.mistake = False
        self.on_event: Callable[[Event], None] = lambda event: None

    def submit(self, volume: int, batch: list[Request]) -> None:
        assert not self.mistake, "told to make a mistake"
        self.n_batches += 1
        for request in batch:
            (self.out.disk if request.op == Op.WRITE else self.out.done).append(request)

    def disk_done(self, ops: list[DiskOp]) -> None:
        self.out.done += [op for op in ops if isinstance(op, Request)]

    def handle(self, event: Event, now: float) -> None:
        assert now == self.now
        self.events.append(event)
        if isinstance(event, Command | Reconfigure):
            self.out.effects.append(Answer(event.ticket, self.refusal))
        self.on_event(event)

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.due = None

    def deadline(self) -> float | None:
        return self.due

    def take(self) -> Outbox:
        out, self.out = self.out, Outbox()
        return out

    def status(self) -> Any:
        self.n_status += 1
        connection = SimpleNamespace(connection="Connected", volumes=())
        return SimpleNamespace(role="Primary", volumes=(), connection=connection, n=self.n_status)

    def volume_size(self, number: int) -> int:
        return SIZE

    def open_refusal(self, number: int, writable: bool) -> str | None:
        return "not Primary" if writable and number == 3 else None

    def receive_data(self, view: memoryview) -> int:
        return len(view)

    receive_meta = receive_data

    def needed_data(self, tail: memoryview) -> int:
        return len(tail) + 1

    needed_meta = needed_data

    def begin_write(self, view: memoryview, takes: Callable[[int], bool]) -> PeerWrite | None:
        return None


class Client:
    """An owner of requests; *more* is called for every batch that comes back."""

    def __init__(self) -> None:
        self.batches: list[list[Request]] = []
        self.rung = asyncio.Event()
        self.more: Callable[[list[Request]], None] = lambda batch: None

    def finished(self, batch: list[Request]) -> None:
        self.batches.append(batch)
        self.rung.set()
        self.more(batch)

    def write(self, offset: int, data: bytes = b"w" * 512) -> Request:
        return Request(self, None, Op.WRITE, 0, offset, len(data), data)

    def flush(self) -> Request:
        return Request(self, None, Op.FLUSH, 0, 0, 0)


class Bench:
    def __init__(self, path: Path) -> None:
        self.mistakes: list[BaseException] = []
        self.rung = asyncio.Event()
        self.runtime = Runtime(CONFIG, machine=Script, on_fatal=self.fatal)
        machine = self.runtime.engine
        assert isinstance(machine, Script)
        self.machine = machine
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT)
        os.ftruncate(self.fd, SIZE)
        device = Device(self.fd)
        self.runtime.disk.add(0, OpenVolume(device, device, lambda: None))
        self.client = Client()
        machine.on_event = lambda event: self.rung.set()

    def fatal(self, error: BaseException) -> None:
        self.mistakes.append(error)

    async def until(self, what: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not what():
                self.rung.clear()
                await self.rung.wait()


def run(tmp_path: Path, test: Callable[[Bench], Awaitable[None]], mistakes: int = 0) -> None:
    async def main() -> None:
        bench = Bench(tmp_path / "disk")
        await bench.runtime.start()
        try:
            await test(bench)
        finally:
            await bench.runtime.stop()
            os.close(bench.fd)
        assert len(bench.mistakes) == mistakes, bench.mistakes

    uvloop.run(main())


def test_a_batch_is_on_disk_and_answered_as_one_in_one_wake_up(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        batch = [bench.client.write(i * 512, bytes([i]) * 512) for i in range(8)]
        bench.runtime.volume(0).submit(batch)
        assert bench.client.batches == [batch]  # all of it before submit returned
        assert os.pread(bench.fd, 4096, 0) == b"".join(bytes([i]) * 512 for i in range(8))

    run(tmp_path, test)


def test_a_long_operation_counts_as_a_small_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        seen: list[int] = []
        monkeypatch.setattr(Vigil, "watch", lambda vigil, n: seen.append(n))
        bench.runtime.volume(0).submit([bench.client.write(0)])
        bench.runtime.volume(0).submit([bench.client.write(0, bytes(128 << 10))])
        assert seen == [2, 16]  # written, and answered

    run(tmp_path, test)


def test_only_the_loops_own_thread_waits_for_others(tmp_path: Path) -> None:
    """SCHED_BATCH, soon after work has come; not a thread that it has started meanwhile."""

    def others() -> set[int]:
        return {
            os.sched_getscheduler(int(thread)) for thread in os.listdir("/proc/self/task")
            if int(thread) != threading.get_native_id()
        }  # fmt: skip

    async def test(bench: Bench) -> None:
        volume = bench.runtime.volume(0)
        while os.sched_getscheduler(0) != os.SCHED_BATCH:
            volume.submit([bench.client.write(0)])
            await asyncio.sleep(0.001)
        n = len(bench.client.batches)
        durable = bench.client.write(0)
        durable.flags = FUA
        volume.submit([durable])
        while len(bench.client.batches) == n:
            bench.client.rung.clear()
            await bench.client.rung.wait()
        assert others() == {os.SCHED_OTHER}

    run(tmp_path, test)
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_no_look_for_garbage_comes_with_every_batch(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        looks: list[str] = []
        note = lambda phase, info: looks.append(phase)  # noqa: E731
        gc.callbacks.append(note)
        try:
            batches = [[bench.client.write(i * 512) for i in range(16)] for _ in range(400)]  # all of them stay
        finally:
            gc.callbacks.remove(note)
        assert len(batches) == 400 and len(looks) <= 2  # Python's default is a look for every 700 of them

    gc.collect()
    run(tmp_path, test)


def test_an_answered_owner_may_submit_again_without_recursion(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        depth = deepest = 0

        def again(batch: list[Request]) -> None:
            nonlocal depth, deepest
            depth += 1
            deepest = max(deepest, depth)
            if len(bench.client.batches) < 2000:  # deeper than Python's stack would be
                bench.runtime.volume(0).submit([bench.client.write(0)])
            depth -= 1

        bench.client.more = again
        bench.runtime.volume(0).submit([bench.client.write(0)])
        assert len(bench.client.batches) == 2000
        assert deepest == 1

    run(tmp_path, test)


def test_sockets_are_served_before_disks_before_effects_before_replies(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        order: list[str] = []
        link, disk = bench.runtime.link, bench.runtime.disk
        real_start = disk.start

        def start(ops: list[DiskOp]) -> list[DiskOp]:
            order.append("disk")
            return real_start(ops)

        link.send_data = lambda buffers: order.append("data")  # type: ignore[method-assign]
        link.send_meta = lambda buffers: order.append("meta")  # type: ignore[method-assign]
        disk.start = start  # type: ignore[method-assign]
        bench.client.more = lambda batch: order.append("reply")
        bench.runtime.subscribe(lambda news: order.append("news"))
        bench.machine.out.data.append(b"d")
        bench.machine.out.meta.append(b"m")
        bench.machine.out.effects.append(Notify("r0", "hello"))
        bench.runtime.volume(0).submit([bench.client.write(0), bench.client.flush()])
        assert order == ["data", "meta", "disk", "reply", "news"]

    run(tmp_path, test)


def test_every_owner_gets_its_own_requests_at_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        other = Client()
        batch = [bench.client.flush(), other.flush(), bench.client.flush(), other.flush()]
        bench.runtime.volume(0).submit(batch)
        assert bench.client.batches == [[batch[0], batch[2]]]
        assert other.batches == [[batch[1], batch[3]]]

    run(tmp_path, test)


def test_worker_completions_wake_the_machine(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        request = bench.client.write(0)
        request.flags = 1  # FUA
        bench.runtime.volume(0).submit([request])
        assert bench.client.batches == []
        async with asyncio.timeout(10):
            await bench.client.rung.wait()
        assert bench.client.batches == [[request]] and request.error == 0

    run(tmp_path, test)


def test_the_timer_rings_at_the_deadline_and_not_before(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        loop = asyncio.get_running_loop()
        machine = bench.machine
        machine.due = late = loop.time() + 60
        await bench.runtime.start()
        machine.due = due = loop.time() + 0.05  # moved forward
        await bench.runtime.start()
        machine.due = later = due + 0.05  # moved back: the early ring must not become a tick
        await bench.runtime.start()
        async with asyncio.timeout(10):
            while not machine.ticks:
                await asyncio.sleep(0.01)
        assert len(machine.ticks) == 1 and later <= machine.ticks[0] < late

    run(tmp_path, test)


def test_a_deadline_that_has_passed_is_a_tick_at_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.machine.due = 0.0
        await bench.runtime.start()
        await bench.runtime.start()  # the timer is set already, to a time that has passed
        async with asyncio.timeout(10):
            while not bench.machine.ticks:
                await asyncio.sleep(0)
        assert len(bench.machine.ticks) == 1

    run(tmp_path, test)


def test_the_peer_is_heard_before_a_deadline_counts(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        machine = bench.machine

        def heard() -> None:
            machine.due = None  # the answer was in the socket all the time

        bench.runtime.link.poll = heard  # type: ignore[method-assign]
        machine.due = asyncio.get_running_loop().time() + 0.01
        await bench.runtime.start()
        async with asyncio.timeout(10):
            while machine.due is not None:
                await asyncio.sleep(0.005)
        assert machine.ticks == []

    run(tmp_path, test)


def test_commands_are_answered_and_refused(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        assert await bench.runtime.command("primary", None, force=True) is None
        assert bench.machine.events[-1] == Command(1, "primary", None, {"force": True})
        bench.machine.refusal = Refusal(-2, "Need access to UpToDate data")
        assert await bench.runtime.command("primary") == bench.machine.refusal
        assert await bench.runtime.reconfigure(CONFIG) == bench.machine.refusal
        await bench.runtime.stop()
        assert await bench.runtime.command("primary") == INTERRUPTED

    run(tmp_path, test)


def test_stop_answers_commands_that_are_still_under_way(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.machine.handle = lambda event, now: None  # type: ignore[method-assign]
        waiting = asyncio.ensure_future(bench.runtime.command("verify", 0))
        await asyncio.sleep(0)
        await bench.runtime.stop()
        assert await waiting == INTERRUPTED

    run(tmp_path, test)


def test_a_handlers_exit_code_reaches_the_machine(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.machine.out.effects += [RunHandler(5, "fence-peer", None), RunHandler(6, "split-brain", 0)]
        await bench.runtime.start()
        await bench.until(lambda: len(bench.machine.events) == 2)
        assert bench.machine.events == [HandlerExited(6, 0), HandlerExited(5, 7)]

    run(tmp_path, test)


def test_news_of_one_wake_up_come_together_and_a_change_once(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        heard: list[list[object]] = []
        end = bench.runtime.subscribe(lambda news: heard.append(list(news)))
        note = Notify("r0", "role( Secondary -> Primary )")
        bench.machine.out.effects += [StateChanged(), note, StateChanged()]
        await bench.runtime.start()
        assert heard == [[note, StateChanged()]]
        end()
        bench.machine.out.effects.append(note)
        await bench.runtime.start()
        assert len(heard) == 1

    run(tmp_path, test)


def test_status_never_waits_in_another_thread(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        seen: list[Any] = []

        def look() -> None:
            seen.append(bench.runtime.status())

        first = bench.machine.n_status
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(10)  # the loop does not turn meanwhile, and that must not matter
        assert seen[0].n == first
        async with asyncio.timeout(10):
            while bench.machine.n_status == first:
                await asyncio.sleep(0)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(10)
        assert seen[1].n > first
        assert bench.runtime.status().n == bench.machine.n_status  # type: ignore[attr-defined]

    run(tmp_path, test)


def test_what_threads_post_meanwhile_is_one_wake_up(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        volume = bench.runtime.volume(0)
        requests = [bench.client.write(i * 512) for i in range(50)]

        def post(request: Request) -> None:
            bench.runtime.post(lambda: volume.submit([request]))

        threads = [threading.Thread(target=post, args=(request,)) for request in requests]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        async with asyncio.timeout(10):
            await bench.client.rung.wait()
        assert [len(batch) for batch in bench.client.batches] == [50]

    run(tmp_path, test)


def test_a_mistake_that_an_edge_reports_meanwhile_keeps_back_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(bench: Bench) -> None:
        def release(volume: int) -> None:
            bench.runtime._fatal(AssertionError("noticed by an edge"))

        monkeypatch.setattr(bench.runtime.storage, "release", release)
        bench.machine.out.effects.append(ReleaseDisk(0))
        bench.runtime.submit(0, [bench.client.flush()])
        assert [str(error) for error in bench.mistakes] == ["noticed by an edge"] and not bench.client.batches

    run(tmp_path, test, mistakes=1)


def test_our_own_mistake_is_fatal_and_nothing_is_answered_after_it(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        bench.machine.mistake = True
        bench.runtime.volume(0).submit([bench.client.write(0)])
        assert isinstance(bench.mistakes[0], AssertionError)
        bench.machine.mistake = False
        bench.runtime.volume(0).submit([bench.client.write(0)])
        assert bench.client.batches == []

    run(tmp_path, test, mistakes=1)


def test_a_pause_ends_once_for_everybody_who_waits(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        volume, resumed = bench.runtime.volume(0), asyncio.Event()
        calls: list[int] = []
        bench.machine.congested = True
        assert volume.paused
        volume.on_resume(lambda: calls.append(1))
        volume.on_resume(lambda: calls.append(2))
        volume.submit([bench.client.write(0)])
        assert calls == []
        bench.machine.congested = False
        volume.submit([bench.client.write(0)])
        assert calls == [1, 2]
        volume.submit([bench.client.write(0)])
        assert calls == [1, 2]
        volume.on_resume(resumed.set)  # not paused at all: soon
        async with asyncio.timeout(10):
            await resumed.wait()

    run(tmp_path, test)


def test_a_slow_disk_pauses_clients_and_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        held: list[bool] = []
        monkeypatch.setattr(bench.runtime.link, "hold", held.append)
        volume = bench.runtime.volume(0)
        bench.runtime.disk.backlog += 65 << 20
        await bench.runtime.start()
        assert volume.paused and held[-1]
        bench.runtime.disk.backlog -= 25 << 20
        await bench.runtime.start()
        assert volume.paused and held[-1]  # not before it is well below
        resumed = asyncio.Event()
        volume.on_resume(resumed.set)
        bench.runtime.disk.backlog -= 40 << 20
        await bench.runtime.start()
        async with asyncio.timeout(10):
            await resumed.wait()
        assert not held[-1]

    run(tmp_path, test)


def test_opens_are_counted_and_refused(tmp_path: Path) -> None:
    async def test(bench: Bench) -> None:
        first, other = bench.runtime.volume(0), bench.runtime.volume(3)
        assert (first.name, other.name, first.size, first.number) == ("r0", "r0/3", SIZE, 0)
        assert first.open(True) is None and first.open(False) is None
        assert other.open(True) == "not Primary"
        first.close(True)
        assert bench.machine.events == [Opened(0, 1), Opened(0, 2), Opened(0, 1)]
        assert bench.runtime.volume(0) is first
        try:
            bench.runtime.volume(1)
        except KeyError:
            return
        raise AssertionError("there is no volume 1")

    run(tmp_path, test)
