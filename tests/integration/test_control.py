"""The control socket: a real Unix socket and thread, and a daemon that is only pretended."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.repl.errors import Refusal
from tandem.repl.events import ConnectionStatus, Helper, PeerVolumeStatus, ResourceStatus
from tandem.tools.client import Client, DaemonError, Following, NotRunning, is_running, resource_lock
from tandem.tools.control import LINE_MAX, ControlServer, Done, refusal_answer
from tandem.tools.paths import NodePaths, PathError
from tandem.tools.values import Json

PEER_VOLUME = PeerVolumeStatus(0, "Established", "UpToDate", "no", 0, 0, 0, 0, 0, None, None)
STATUS = ResourceStatus(
    "r0", 0, "Secondary", "no", "flush", True, 10102, (),
    ConnectionStatus(
        "beta", 1, "Connected", "Connected", "Secondary", False, 0, 0, 101, "ipv4:127.0.0.1:7788",
        "ipv4:127.0.0.1:7789", True, (PEER_VOLUME,),
    ),
)  # fmt: skip


class FakeDaemon:
    """Answers what a test tells it to; commands are held until the test lets them go."""

    def __init__(self) -> None:
        self.now = STATUS
        self.posted: list[tuple[Json, Done]] = []
        self.arrived = threading.Event()

    def hello(self) -> Json:
        return {"pid": 1}

    def status(self) -> ResourceStatus:
        return self.now

    def post(self, request: Json, done: Done) -> None:
        if request.get("name") == "nonsense":
            raise ValueError("unknown command 'nonsense'")
        self.posted.append((request, done))
        self.arrived.set()


@pytest.fixture
def paths(tmp_path: Path) -> NodePaths:
    found = NodePaths(tmp_path / "run", "alpha")
    found.make()
    return found


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
def server(paths: NodePaths, daemon: FakeDaemon) -> Iterator[ControlServer]:
    server = ControlServer(paths.control("r0"), daemon)
    server.start()
    yield server
    server.stop()


def raw(paths: NodePaths) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    sock.connect(os.fspath(paths.control("r0")))
    return sock


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def test_status_and_hello(paths: NodePaths, server: ControlServer) -> None:
    with Client(paths, "r0") as client:
        assert client.status() == STATUS
        assert client.hello() == {"pid": 1}


def test_the_socket_is_its_owners_alone(paths: NodePaths, server: ControlServer) -> None:
    assert stat.S_IMODE(paths.control("r0").stat().st_mode) == 0o600


def test_a_refusal_comes_back_as_it_was(paths: NodePaths, server: ControlServer, daemon: FakeDaemon) -> None:
    refusal = Refusal(-2, "Need access to UpToDate data", "Connect first.", ("one line",))

    def answer() -> None:
        daemon.arrived.wait(10)
        request, done = daemon.posted[0]
        assert request == {"do": "command", "name": "primary", "volume": None, "args": {"force": False}}
        done(refusal_answer(refusal))

    thread = threading.Thread(target=answer)
    thread.start()
    with Client(paths, "r0") as client:
        assert client.command("primary", args={"force": False}) == refusal
    thread.join()


def test_status_is_answered_at_once_while_a_command_hangs(
    paths: NodePaths, server: ControlServer, daemon: FakeDaemon
) -> None:
    with raw(paths) as hanging:
        hanging.sendall(b'{"do": "command", "name": "primary"}\n')
        assert daemon.arrived.wait(10)
        began = time.monotonic()
        with Client(paths, "r0") as client:
            assert client.status() == STATUS
        assert time.monotonic() - began < 1.0  # 100 ms are promised; the test machine may be busy
        # On the hanging connection itself, too: answers need not come in order.
        hanging.sendall(b'{"do": "hello"}\n')
        assert json.loads(hanging.recv(4096)) == {"pid": 1}
        daemon.posted[0][1](refusal_answer(None))
        assert json.loads(hanging.recv(4096)) == {"refusal": None}


def test_an_abandoned_command_is_answered_to_nobody(
    paths: NodePaths, server: ControlServer, daemon: FakeDaemon
) -> None:
    with raw(paths) as impatient:
        impatient.sendall(b'{"do": "command", "name": "primary"}\n')
        assert daemon.arrived.wait(10)
    daemon.posted[0][1](refusal_answer(None))
    with Client(paths, "r0") as client:
        assert client.status() == STATUS


def test_waiting_for_an_answer_can_have_an_end(paths: NodePaths, server: ControlServer) -> None:
    waited: list[float] = []
    with Client(paths, "r0") as client, pytest.raises(DaemonError, match="did not answer within 1 seconds"):
        client.command("primary", limit_s=1.0, tick=waited.append)
    assert waited


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"not JSON at all\n", "takes one JSON object"),
        (b"\xff\xfe\x00\n", ""),
        (b"[1, 2]\n", "takes one JSON object"),
        (b"{}\n", "unknown request 'None'"),
        (b'{"do": "reboot"}\n', "unknown request 'reboot'"),
        (b'{"do": "command", "name": "nonsense"}\n', "unknown command 'nonsense'"),
        (b"[" * 100_000 + b"\n", ""),
        (b"x" * (LINE_MAX + 1) + b"\n", f"a request may have {LINE_MAX} bytes, this one is longer"),
    ],
)
def test_garbage_gets_one_sentence_and_the_connection_closed(
    paths: NodePaths, server: ControlServer, line: bytes, says: str
) -> None:
    with raw(paths) as sock:
        sock.sendall(line)
        answer = read_all(sock)
    assert answer.count(b"\n") == 1
    assert says in json.loads(answer)["error"]
    with Client(paths, "r0") as client:
        assert client.status() == STATUS


def test_a_megabyte_without_end_does_not_hurt(paths: NodePaths, server: ControlServer) -> None:
    with raw(paths) as sock:
        sock.sendall(b"x" * (1 << 20))
        assert b"this one is longer" in read_all(sock)
    with Client(paths, "r0") as client:
        assert client.status() == STATUS


def test_events_bring_every_change_in_order(
    paths: NodePaths, server: ControlServer, daemon: FakeDaemon
) -> None:
    with Client(paths, "r0") as client:
        assert client.subscribe() == STATUS
        roles = ["Primary", "Secondary", "Primary"]
        for role in roles:
            server.publish(replace(STATUS, role=role))
        seen = [client.following(10) for _ in roles]
        assert seen == [Following(replace(STATUS, role=role)) for role in roles]
        helper = Helper("fence-peer", None, 7)
        server.publish(STATUS, helper)
        assert client.following(10) == Following(STATUS, helper=helper)
        client.poll()
        assert client.following(10) == Following(STATUS, poll=True)
        assert client.following(0.05) is None


def test_a_running_resync_is_published_without_a_state_change(
    paths: NodePaths, server: ControlServer, daemon: FakeDaemon
) -> None:
    syncing = replace(PEER_VOLUME, replication="SyncTarget", done=1.0)
    daemon.now = replace(STATUS, connection=replace(STATUS.connection, volumes=(syncing,)))
    with Client(paths, "r0") as client:
        client.subscribe()
        further = replace(syncing, done=2.0)
        daemon.now = replace(STATUS, connection=replace(STATUS.connection, volumes=(further,)))
        seen = [client.following(10), client.following(10)]
        assert seen[1] == Following(daemon.now)


def test_a_reader_that_does_not_read_gets_the_last_state_in_the_end(
    paths: NodePaths, server: ControlServer, daemon: FakeDaemon
) -> None:
    with Client(paths, "r0") as client:
        client.subscribe()
        changes = 20_000
        for score in range(changes):
            daemon.now = replace(STATUS, promotion_score=score)
            server.publish(daemon.now)
        scores: list[int] = []
        while not scores or scores[-1] != changes - 1:
            following = client.following(10)
            assert following is not None, f"nothing came after {scores[-1:]}"
            scores.append(following.status.promotion_score)
        assert scores == sorted(scores)
        assert len(scores) < changes


def test_the_end_of_the_daemon_ends_the_events(paths: NodePaths, daemon: FakeDaemon) -> None:
    server = ControlServer(paths.control("r0"), daemon)
    server.start()
    with Client(paths, "r0") as client:
        client.subscribe()
        server.stop()
        with pytest.raises(DaemonError, match="the daemon ended"):
            client.following(10)
    assert not paths.control("r0").exists()


def test_nobody_there(paths: NodePaths) -> None:
    with pytest.raises(NotRunning, match="start it with: tandemadm up r0"):
        Client(paths, "r0")
    assert not is_running(paths, "r0")


def test_a_socket_that_a_killed_daemon_left_is_nobody(paths: NodePaths, daemon: FakeDaemon) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(os.fspath(paths.control("r0")))
    assert paths.control("r0").exists() and not is_running(paths, "r0")
    server = ControlServer(paths.control("r0"), daemon)
    server.start()
    assert is_running(paths, "r0")
    server.stop()


def test_a_path_too_long_for_a_socket_is_one_sentence(tmp_path: Path, daemon: FakeDaemon) -> None:
    paths = NodePaths(tmp_path / ("x" * 120), "alpha")
    paths.make()
    with pytest.raises(PathError, match=r"limit is 107; choose a shorter --run-dir"):
        ControlServer(paths.control("r0"), daemon).start()
    with pytest.raises(DaemonError, match=r"limit is 107; choose a shorter --run-dir"):
        Client(paths, "r0")


def test_names_with_slashes_stay_inside_the_directory(tmp_path: Path) -> None:
    paths = NodePaths(tmp_path, "../alpha")
    assert paths.control("a/b").parent == paths.directory == tmp_path / "..%2Falpha"
    paths.make()
    paths.control("a/b").touch()
    assert paths.resources() == ["a/b"]


def test_one_change_at_a_time(paths: NodePaths) -> None:
    waited: list[float] = []
    released = threading.Event()

    def first_tick(seconds: float) -> None:
        waited.append(seconds)
        released.set()

    held = resource_lock(paths, "r0")
    held.__enter__()

    def release() -> None:
        assert released.wait(10)
        held.__exit__(None, None, None)

    thread = threading.Thread(target=release)
    thread.start()
    with resource_lock(paths, "r0", first_tick):
        assert waited
    thread.join()
