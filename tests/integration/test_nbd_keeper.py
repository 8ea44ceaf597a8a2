"""The keeper of an nbd device, with real servers and a driver that does what the kernel's does with sockets."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest
from tandem.tools import nbd_device
from tandem.tools.nbd_device import Attachment, NbdError, Place
from tandem.tools.nbd_keeper import Keeper, load_state
from tandem.tools.nbd_netlink import NbdNetlink

from tests.nbd_serving import MIB, PATIENCE_S, Serving
from tests.nbd_volume import RamVolume
from tests.nbd_wire import FLUSH, SIMPLE, request
from tests.scarcity import no_more_files

SECONDARY = "r0 is Secondary."


class Driver(NbdNetlink):
    """/dev/nbd0: takes sockets where it has none or dead ones, and tells of deaths."""

    def __init__(self, sys_block: Path) -> None:
        self._sys = sys_block / "nbd0"
        (self._sys / "queue").mkdir(parents=True)
        self._events_r, self._events_w = os.pipe2(os.O_NONBLOCK)
        self.slots: list[socket.socket] = []
        self.dead: set[int] = set()
        self.n_offers = 0
        self.changed = threading.Condition()

    def close(self) -> None:
        for sock in self.slots:
            sock.close()
        os.close(self._events_r)
        os.close(self._events_w)

    def fileno(self) -> int:
        return self._events_r

    def connect(
        self, index: int, *, size: int, block_size: int, flags: int, timeout_s: int, dead_timeout_s: int,
        backend: str, descriptors: Sequence[int],
    ) -> None:  # fmt: skip
        assert index == 0 and not self.slots and flags & 1
        self.slots = [self._take(fd) for fd in descriptors]
        for name, value in (("backend", backend), ("size", size // 512), ("queue/logical_block_size", block_size)):
            (self._sys / name).write_text(f"{value}\n")

    def connected(self) -> dict[int, bool]:
        return {0: bool(self.slots)}

    def set_timeouts(self, index: int, backend: str, timeout_s: int, dead_timeout_s: int) -> None:
        assert backend == (self._sys / "backend").read_text().strip()

    def grow(self, index: int, backend: str, size: int) -> None:
        (self._sys / "size").write_text(f"{size // 512}\n")

    def offer(self, index: int, backend: str, descriptor: int) -> None:
        with self.changed:
            self.n_offers += 1
            if self.dead:
                slot = self.dead.pop()
                self.slots[slot].close()
                self.slots[slot] = self._take(descriptor)
            self.changed.notify_all()

    def dead_links(self) -> set[int] | None:
        try:
            os.read(self._events_r, 100)
        except BlockingIOError:
            return set()
        return {0}

    def disconnect(self, index: int) -> None:
        for sock in self.slots:
            sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self.slots.clear()
        (self._sys / "backend").unlink()

    @staticmethod
    def _take(fd: int) -> socket.socket:
        sock = socket.socket(fileno=os.dup(fd))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", 2, 0))
        return sock

    def kill(self, *slots: int) -> None:
        """What the kernel does when a connection ends: shut it down, remember, tell."""
        with self.changed:
            for slot in slots:
                self.slots[slot].shutdown(socket.SHUT_RDWR)
                self.dead.add(slot)
        os.write(self._events_w, b"x")

    def wait(self, until: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(until, PATIENCE_S)

    def all_live(self) -> None:
        self.wait(lambda: not self.dead)


class Kept:
    """A keeper at work in a thread, until `stop`."""

    def __init__(self, driver: Driver, places: Sequence[Place], state_file: Path, n_connections: int = 2) -> None:
        self.state_file = state_file
        self.keeper = Keeper(Attachment("r0", "/dev/nbd0", tuple(places), n_connections, 2, 99), driver, state_file)
        self.keeper.begin()
        self.error = ""
        self._stop_r, self._stop_w = os.pipe()
        self.thread = threading.Thread(target=self._keep)
        self.thread.start()

    def _keep(self) -> None:
        try:
            self.keeper.keep(self._stop_r)
        except NbdError as error:
            self.error = str(error)

    def stop(self) -> str:
        os.write(self._stop_w, b"x")
        self.thread.join(PATIENCE_S)
        os.close(self._stop_r)
        os.close(self._stop_w)
        return self.error

    def wait(self, until: Callable[[], bool]) -> None:
        """Until what the keeper shows is as wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not until():
            assert time.monotonic() < deadline, self.shown()
            time.sleep(0.01)

    def shown(self) -> tuple[str, str, int, str]:
        state = load_state(self.state_file)
        assert state is not None
        return state.state, state.server, state.n_live, state.why


@pytest.fixture
def driver(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    monkeypatch.setattr(nbd_device, "SYS_BLOCK", directory / "sys")
    monkeypatch.setattr(nbd_device, "LINKS", directory / "by-res")
    monkeypatch.setattr(nbd_device, "make_node", lambda index: None)
    driver = Driver(directory / "sys")
    yield driver
    driver.close()


@pytest.fixture
def nodes(directory: Path) -> Iterator[list[Serving]]:
    """Alice, who is Primary, and bob, who is not."""
    (directory / "a").mkdir()
    (directory / "b").mkdir()
    with Serving(directory / "a", RamVolume(MIB)) as alice, Serving(directory / "b", RamVolume(MIB)) as bob:
        bob.volumes[0].refusal = SECONDARY
        yield [alice, bob]


def places(nodes: list[Serving]) -> list[Place]:
    return [Place(name, "r0", path=node.path) for name, node in zip(("alice", "bob"), nodes, strict=True)]


def has_sessions(volume: RamVolume, n: int) -> bool:
    """Those of before end in their own time."""
    return volume.n_open == n


def test_failover_and_back(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    alice, bob = (node.volumes[0] for node in nodes)
    kept = Kept(driver, places(nodes), directory / "state")
    assert (alice.n_open, bob.n_open) == (2, 0)
    assert nbd_device.link_of("r0").is_symlink()
    for old, new in ((alice, bob), (bob, alice)):
        old.refusal, new.refusal = SECONDARY, None
        driver.kill(0, 1)
        driver.all_live()
        kept.wait(partial(has_sessions, new, 2))
    assert kept.stop() == ""
    assert kept.shown() == ("Connected", "alice", 2, "")


def test_a_single_death_keeps_all_connections_on_one_node(
    driver: Driver, nodes: list[Serving], directory: Path
) -> None:
    alice, bob = (node.volumes[0] for node in nodes)
    bob.refusal = None  # two Primaries
    kept = Kept(driver, places(nodes), directory / "state")
    driver.kill(1)
    driver.all_live()
    driver.kill(0)
    driver.all_live()
    kept.wait(partial(has_sessions, alice, 2))
    assert bob.n_open == 0
    assert kept.stop() == ""


def test_nobody_is_primary_for_a_while(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    alice = nodes[0].volumes[0]
    kept = Kept(driver, places(nodes), directory / "state")
    alice.refusal = SECONDARY
    driver.kill(0, 1)
    kept.wait(lambda: kept.shown()[0] == "Waiting")
    assert kept.shown()[3].count("r0 is Secondary") == 2
    alice.refusal = None
    driver.all_live()
    assert kept.stop() == ""


def test_a_server_must_be_done_with_what_it_was_sent(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    """An old write that is still unread must not be overtaken by its own repetition and by newer ones."""
    serving, alice = nodes[0], nodes[0].volumes[0]
    kept = Kept(driver, places(nodes), directory / "state")
    serving.call(alice.pause)
    flush = request(SIMPLE, FLUSH, 1)
    driver.slots[0].sendall(flush)  # the last one that is read
    assert driver.slots[0].recv(16)
    driver.slots[0].sendall(flush)
    driver.kill(0, 1)
    kept.wait(lambda: "alice still works on requests" in kept.shown()[3])
    assert driver.n_offers == 0
    serving.call(alice.resume)
    driver.all_live()
    assert kept.stop() == ""


@pytest.mark.parametrize("n_dead", [0, 1, 2])
def test_adoption(driver: Driver, nodes: list[Serving], directory: Path, n_dead: int) -> None:
    """A keeper ended without a word; the next one finds out what has died since."""
    assert Kept(driver, places(nodes), directory / "state").stop() == ""
    driver.kill(*range(n_dead))
    n_offers = driver.n_offers
    kept = Kept(driver, places(nodes), directory / "state")
    driver.wait(lambda: not driver.dead and driver.n_offers > n_offers)
    driver.kill(0)
    driver.all_live()
    driver.kill(1)
    driver.all_live()
    assert kept.stop() == ""
    assert kept.shown() == ("Connected", "alice", 2, "")


def test_an_export_that_shrank_is_not_used(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    alice, bob = (node.volumes[0] for node in nodes)
    kept = Kept(driver, places(nodes), directory / "state")
    alice.refusal, bob.refusal, bob.size = SECONDARY, None, MIB - 4096
    driver.kill(0, 1)
    kept.wait(lambda: "cannot go on with /dev/nbd0" in kept.shown()[3])
    assert driver.n_offers == 0
    bob.size = MIB
    driver.all_live()
    assert kept.stop() == ""


def test_a_device_grows_with_its_export(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    alice = nodes[0].volumes[0]
    alice.size = MIB - 4096
    kept = Kept(driver, places(nodes), directory / "state")
    assert nbd_device.size(0) == MIB - 4096
    alice.size = MIB
    driver.kill(0)
    driver.all_live()
    assert kept.stop() == ""
    assert nbd_device.size(0) == MIB


def test_a_device_that_somebody_disconnects_ends_its_keeper(
    driver: Driver, nodes: list[Serving], directory: Path
) -> None:
    kept = Kept(driver, places(nodes), directory / "state")
    driver.kill(0, 1)
    driver.all_live()
    driver.disconnect(0)
    kept.thread.join(PATIENCE_S)
    assert kept.stop() == "/dev/nbd0 was disconnected by another program"
    assert not nbd_device.link_of("r0").is_symlink()


def test_a_busy_device_is_left_alone(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    assert Kept(driver, places(nodes), directory / "state").stop() == ""
    keeper = Keeper(Attachment("r7", "/dev/nbd0", tuple(places(nodes)), 2, 2, 99), driver, directory / "other")
    with pytest.raises(NbdError, match="/dev/nbd0 is busy: it shows r0"):
        keeper.begin()


def test_a_driver_that_is_too_old(
    driver: Driver, nodes: list[Serving], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_device, "backend", lambda index: "")
    keeper = Keeper(Attachment("r0", "/dev/nbd0", tuple(places(nodes)), 2, 2, 99), driver, directory / "state")
    with pytest.raises(NbdError, match=r"Linux 5\.15"):
        keeper.begin()
    assert not driver.slots and not nbd_device.link_of("r0").is_symlink()


def test_no_primary_at_all(driver: Driver, nodes: list[Serving], directory: Path) -> None:
    nodes[0].volumes[0].refusal = SECONDARY
    keeper = Keeper(Attachment("r0", "/dev/nbd0", tuple(places(nodes)), 2, 2, 99), driver, directory / "state")
    with pytest.raises(NbdError, match=r"no node serves r0 as Primary; .* alice .*: r0 is Secondary; bob"):
        keeper.begin()
    assert not driver.slots


def test_too_many_connections_are_not_a_missing_primary(
    driver: Driver, nodes: list[Serving], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = Keeper(Attachment("r0", "/dev/nbd0", tuple(places(nodes)), 3, 2, 99), driver, directory / "state")
    with no_more_files(), pytest.raises(NbdError, match="this host cannot make 3 connections: Too many open files"):
        keeper.begin()
    alice = nodes[0].volumes[0]
    open_it = alice.open
    monkeypatch.setattr(alice, "open", lambda writable: "no more" if alice.n_open == 2 else open_it(writable))
    with pytest.raises(NbdError, match=r"alice takes 2 of 3 connections; ask for fewer .* no more"):
        keeper.begin()
    assert not driver.slots
