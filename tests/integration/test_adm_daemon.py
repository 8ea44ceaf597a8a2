"""The daemon's own promises: an answer at once whatever its loop does, a log in DRBD's words, a tidy end."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop
from tandem.nbd.server import Gate
from tandem.repl.config import Endpoint, ResourceConfig, VolumeConfig
from tandem.tools.client import Client
from tandem.tools.daemon import Daemon, Options
from tandem.tools.exports import DeviceError, Exports, place_of
from tandem.tools.paths import NodePaths

from tests.adm_pair import PATIENCE, Pair, free_ports
from tests.nbd_volume import RamVolume

BLOCKED_S = 3.0


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def config(device: str = "/dev/drbd0") -> ResourceConfig:
    own, peer = free_ports(2)
    volumes = (VolumeConfig(0, 0, device, "/nowhere/a"), VolumeConfig(1, 1, "/dev/drbd1", "/nowhere/b"))
    here, there = Endpoint("ipv4", "127.0.0.1", own), Endpoint("ipv4", "127.0.0.1", peer)
    return ResourceConfig("r0", "alpha", "beta", here, there, volumes, implicit_volume=False)


def test_status_is_answered_while_the_loop_is_stuck(pair: Pair) -> None:
    """As it would be in a read from a disk that hangs."""
    paths = NodePaths(pair.run, "alpha")
    paths.make()
    started, stuck = threading.Event(), threading.Event()
    daemons: list[Daemon] = []

    async def serve() -> None:
        daemons.append(Daemon(Options("r0", "", paths, True, -1), config()))
        await daemons[0]._start()
        started.set()
        await daemons[0].ended.wait()
        await daemons[0]._stop()

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    def stick() -> None:
        stuck.set()
        time.sleep(BLOCKED_S)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(30)
    loop = daemons[0].loop
    with Client(paths, "r0") as client:
        assert client.status().name == "r0"
        loop.call_soon_threadsafe(stick)
        assert stuck.wait(30)
        began = time.monotonic()
        assert client.status().name == "r0"
        assert client.hello()["pid"] == os.getpid()
        assert time.monotonic() - began < BLOCKED_S / 2
    loop.call_soon_threadsafe(daemons[0].ended.set)
    thread.join(30)
    assert not thread.is_alive() and not paths.control("r0").exists()


def test_the_log_tells_the_story_in_drbds_words(pair: Pair) -> None:
    pair.create()
    pair.up()
    pair.promote()
    pair.ok("alpha", "down", "r0")
    log = pair.path("alpha", "log").read_text()
    for phrase in (
        "daemon started, pid",
        "command: attach volume 0",
        "conn( Unconnected -> WFConnection )",
        "Handshake successful: Agreed network protocol version 101",
        "role( Secondary -> Primary )",
        "Resync done",
        "daemon ends",
    ):
        assert phrase in log, phrase
    stamps = [line.split()[0] for line in log.splitlines()]
    assert stamps == sorted(stamps) and all(len(stamp) == 32 for stamp in stamps)


def test_a_terminal_sees_the_progress_of_a_resync(pair: Pair) -> None:
    pair.create()
    pair.up()
    pair.ok("alpha", "primary", "--force", "r0")
    master, slave = pty.openpty()
    pid = os.fork()
    if pid == 0:
        os.login_tty(slave)
        words = [sys.executable, "-m", "tandem.tools.adm", *pair.where("alpha"), "wait-sync", PATIENCE, "r0"]
        os.execve(sys.executable, words, os.environ | {"TERM": "xterm"})
    os.close(slave)
    shown = read_terminal(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert "r0/0" in shown


def read_terminal(master: int) -> str:
    """Everything a program writes to its terminal until it ends."""
    shown = b""
    while select.select([master], [], [], 60)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:  # EIO: the last one who had it open has ended
            break
        shown += part
    return shown.decode(errors="replace")


# ---------------------------------------------------------------------------------- where exports are


@pytest.mark.parametrize(
    ("device", "shown"),
    [
        ("/dev/drbd0", "nbd+unix:///r0?socket=/run/r0.nbd"),
        ("nbd://127.0.0.1:10810/data", "nbd://127.0.0.1:10810/data"),
        ("nbd://127.0.0.1", "nbd://127.0.0.1:10809/r0"),
        ("nbd://[::1]:5/x", "nbd://[::1]:5/x"),
        ("nbd+unix:///data?socket=/tmp/s", "nbd+unix:///data?socket=/tmp/s"),
    ],
)
def test_places(device: str, shown: str) -> None:
    resource = config(device)
    assert str(place_of(resource, resource.volumes[0], Path("/run/r0.nbd"))) == shown
    assert place_of(resource, resource.volumes[1], Path("/run/r0.nbd")).export == "r0/1"


def test_what_clients_do_not_read_counts_together_wherever_they_come_in(tmp_path: Path) -> None:
    said: list[str] = []

    async def scenario() -> None:
        exports = Exports(tmp_path / "r0.nbd", lambda n: RamVolume(1 << 20, f"r0/{n}", number=n), said.append, Gate())
        await exports.apply(config(f"nbd+unix:///data?socket={tmp_path}/s"))
        assert len(exports._servers) == 2
        assert len({server.budget for server in exports._servers.values()}) == 1
        await exports.stop(0)

    uvloop.run(scenario())


def test_a_device_that_cannot_be_served_is_a_sentence() -> None:
    resource = config("nbds://127.0.0.1/x")
    with pytest.raises(DeviceError, match=r"r0: device nbds://127\.0\.0\.1/x: TLS is not"):
        place_of(resource, resource.volumes[0], Path("/run/r0.nbd"))
