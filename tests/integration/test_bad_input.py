"""What is wrong gets one clear sentence and drbdadm's exit code, and no byte on any disk changes.

Wrong disks and metadata, wrong peers, wrong configurations, and garbage on every port. The process stays up
and answers, or it has ended.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tandem.repl.events import ResourceStatus
from tandem.tools.demo_pair import Node, Pair, alone, connected, in_sync

from tests.conftest import FindProgram, NewPair
from tests.ledger import Cmd, Nbd, Request

MIB = 1 << 20
SIZE = 16 * MIB
SUPERBLOCK = SIZE - 4096  # internal metadata: the superblock is the last block of the device


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Not a byte of the files in *paths* changes."""

    def digests() -> dict[str, str]:
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    before = digests()
    yield
    assert digests() == before


def refused(pair: Pair, node: Node, *words: str, code: int, says: str) -> str:
    """A command that ends with *code* and one sentence with *says* in it; what it said."""
    done = pair.run(node, *words)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done
    assert says in done.stderr, done.stderr
    return done.stderr


def log_of(node: Node) -> str:
    """The node's log; no log may hold a traceback."""
    assert "Traceback" not in node.log, node.log
    return node.log


def stand_alone(status: ResourceStatus) -> bool:
    return status.connection.cstate == "StandAlone"


@pytest.fixture
def made(new_pair: NewPair) -> Pair:
    """Two nodes with fresh metadata; nothing runs."""
    pair = new_pair(SIZE)
    pair.create()
    return pair


# --------------------------------------------------------------------------- metadata that is not ours


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def no_metadata(path: Path) -> None:
    overwrite(path, 0, bytes(SIZE))


def wrong_magic(path: Path) -> None:
    overwrite(path, SUPERBLOCK + 60, b"\x83\x74\x02\x6d")  # v09 where v08 should be


def garbage_metadata(path: Path) -> None:
    overwrite(path, SUPERBLOCK, random.Random(1).randbytes(4096))


@pytest.mark.parametrize("harm", [no_metadata, wrong_magic, garbage_metadata])
def test_a_disk_without_our_metadata_is_not_attached(made: Pair, harm: Callable[[Path], None]) -> None:
    node = made.first
    harm(node.disk)
    with unchanged(node.disk):
        said = refused(made, node, "up", "r0", code=1, says="(119) No valid meta-data signature found.")
        assert str(node.disk) in said and "tandemadm create-md r0" in said
        refused(made, node, "attach", "r0", code=10, says="at byte offset")
        assert made.status(node).volumes[0].disk == "Diskless"  # and it answers
        refused(made, node, "primary", "r0", code=17, says="Need access to UpToDate data")
        made.adm(node, "down", "r0")
        refused(made, node, "dump-md", "r0", code=1, says=str(node.disk))
    log_of(node)


def test_a_disk_that_shrank_is_not_attached(made: Pair) -> None:
    node = made.first
    os.truncate(node.disk, SIZE - 8192)
    with unchanged(node.disk):
        said = refused(made, node, "up", "r0", code=1, says="(170) Implicit device shrinking not allowed.")
        assert f"{node.disk} has shrunk from {SIZE} to {SIZE - 8192} bytes" in said
        made.adm(node, "down", "r0")
    log_of(node)


def test_metadata_with_impossible_places_are_refused(made: Pair) -> None:
    node = made.first
    overwrite(node.disk, SUPERBLOCK + 64, b"\xff" * 4)  # md_size_sect
    with unchanged(node.disk):
        said = refused(made, node, "up", "r0", code=1, says="Failure: (")
        assert str(node.disk) in said
    log_of(node)


def test_a_file_system_is_not_overwritten(made: Pair, program: FindProgram) -> None:
    node = made.first
    no_metadata(node.disk)
    subprocess.run([program("mke2fs"), "-q", "-F", str(node.disk)], check=True)
    with unchanged(node.disk):
        done = made.run(node, "create-md", "r0")
        assert done.returncode == 40
        assert "Found ext2 filesystem" in done.stdout and "Operation refused." in done.stdout


def test_a_disk_that_shrank_is_refused(new_pair: NewPair) -> None:
    pair = new_pair(SIZE)
    external = pair.directory / "meta"
    pair.write_config()
    text = pair.config.read_text().replace("meta-disk internal", f"flexible-meta-disk {external}", 1)
    pair.config.write_text(text)
    pair.make_disks()
    node, peer = pair.nodes
    external.touch()
    os.truncate(external, 4 * MIB)
    os.truncate(peer.disk, SIZE + MIB)  # its metadata are internal
    for one in pair.nodes:
        pair.adm(one, "create-md", "r0")
    pair.up()
    pair.adm(node, "primary", "--force", "r0")
    pair.wait_in_sync()
    pair.down()
    os.truncate(node.disk, SIZE // 2)
    with unchanged(node.disk, external, peer.disk):
        said = refused(pair, node, "up", "r0", code=1, says="Failure: (")
        assert "shrink" in said or "smaller" in said or "too small" in said, said
        assert pair.status(node).volumes[0].disk == "Diskless"
        pair.adm(node, "down", "r0")
    log_of(node)


# -------------------------------------------------------------------------------- a peer that is not ours


@pytest.fixture
def settled(new_pair: NewPair) -> Pair:
    """Two nodes that were in sync once and are down, so that nothing is left to be written but harm."""
    pair = new_pair(SIZE, net='protocol C; cram-hmac-alg sha256; shared-secret "one";')
    pair.create()
    pair.up()
    pair.adm(pair.first, "primary", "--force", "r0")
    pair.wait_in_sync()
    pair.adm(pair.first, "secondary", "r0")
    pair.down()
    return pair


def meet(pair: Pair) -> None:
    """Both nodes up, until both have given up."""
    for node in pair.nodes:
        pair.adm(node, "up", "r0")
    for node in pair.nodes:
        pair.wait(node, "StandAlone", stand_alone)


@pytest.mark.parametrize(
    ("ours", "theirs", "says"),
    [
        ('"one"', '"two"', "authentication of the peer failed: shared-secret or cram-hmac-alg differs"),
        ("protocol C", "protocol A", "incompatible protocol"),
        ("protocol C;", "protocol C; allow-two-primaries;", "allow-two-primaries"),
        ("protocol C;", "protocol C; after-sb-0pri discard-zero-changes;", "after-sb-0pri"),
    ],
)
def test_a_peer_with_other_settings(settled: Pair, ours: str, theirs: str, says: str) -> None:
    node, peer = settled.nodes
    with unchanged(node.disk, peer.disk):
        settled.adm(node, "up", "r0")
        settled.config.write_text(settled.config.read_text().replace(ours, theirs, 1))
        settled.adm(peer, "up", "r0")
        settled.wait(node, "StandAlone", stand_alone)
        logs = log_of(node) + log_of(peer)
        assert "going StandAlone" in logs and says in logs, logs
        # The other one has given up too, or goes on trying; both answer.
        assert settled.status(peer).connection.connection != "Connected"
        settled.down()


def set_generation(pair: Pair, node: Node, identifiers: str) -> None:
    pair.adm(node, "set-gi", "--force", "r0", identifiers)


def test_unrelated_data_are_not_joined(settled: Pair) -> None:
    for i, node in enumerate(settled.nodes):
        own = "".join(random.Random(i).choices("123456789ABCDEF", k=16))
        older = ":".join((own[::-1], own[1:] + "1"))
        set_generation(settled, node, f"{own}:0:{older}:1:1:0:0:0:0:0")
    with unchanged(*(node.disk for node in settled.nodes)):
        meet(settled)
        for node in settled.nodes:
            assert "The two disks hold unrelated data" in log_of(node)
        settled.down()


def test_split_brain_is_not_joined(settled: Pair) -> None:
    for node in settled.nodes:
        settled.adm(node, "up", "r0")
        settled.adm(node, "disconnect", "r0")
    for node in settled.nodes:
        settled.adm(node, "primary", "--force", "r0")
        with Nbd(node.socket, "r0") as nbd:
            assert nbd.one(Request(Cmd.WRITE, 0, 4096, node.name[:1].encode() * 4096)).acknowledged
        settled.adm(node, "secondary", "r0")
    settled.down()
    with unchanged(*(node.disk for node in settled.nodes)):
        meet(settled)
        for node in settled.nodes:
            assert "Split-Brain detected" in log_of(node)
        settled.down()


def test_a_peer_whose_disk_is_too_small(settled: Pair) -> None:
    node, peer = settled.nodes
    os.truncate(peer.disk, 0)
    os.truncate(peer.disk, SIZE // 2)
    settled.adm(peer, "create-md", "--force", "r0")
    settled.adm(peer, "up", "r0")
    settled.adm(peer, "down", "r0")
    with unchanged(node.disk):
        settled.adm(node, "up", "r0")
        settled.adm(peer, "up", "r0")
        settled.wait(node, "StandAlone", stand_alone)
        assert "the peer's disk is too small" in log_of(node)
        log_of(peer)
        assert not in_sync(settled.status(peer))
        settled.down()
    assert peer.disk.read_bytes()[: SIZE // 4] == bytes(SIZE // 4)


# ------------------------------------------------------------------------------------- configuration


def test_a_configuration_without_the_peer(made: Pair) -> None:
    text = made.config.read_text()
    made.config.write_text(text[: text.index("    on bob")] + "}\n")
    with unchanged(made.first.disk):
        for command in ("up", "status", "create-md"):
            said = refused(made, made.first, command, "r0", code=10, says="a host section")
            assert said.startswith(f"{made.config}:1:") and said.count("\n") == 1
    assert made.pid(made.first) is None


def test_a_node_that_no_section_names(made: Pair) -> None:
    stranger = Node("carol", made.first.disk, made.first.port, made.first.paths)
    with unchanged(made.first.disk):
        refused(made, stranger, "up", "r0", code=1, says="carol")


def test_a_replication_port_in_use(made: Pair) -> None:
    node = made.first
    made.adm(node, "attach", "r0")  # the first attach enters the size into the metadata
    made.adm(node, "down", "r0")
    with unchanged(node.disk), socket.create_server(("127.0.0.1", node.port)):
        said = refused(made, node, "up", "r0", code=1, says="(102) Local address(port) already in use.")
        assert str(node.port) in said
        assert made.status(node).connection.cstate == "StandAlone"
        made.adm(node, "down", "r0")
    log_of(node)


def test_an_nbd_port_in_use(made: Pair) -> None:
    node = made.first
    with unchanged(node.disk), socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        node.device = f"nbd://127.0.0.1:{port}/r0"
        made.write_config()
        refused(made, node, "up", "r0", code=20, says=f"Cannot listen on port {port} of 127.0.0.1")
        assert made.pid(node) is None


def test_a_socket_path_too_long(made: Pair) -> None:
    made.run_dir = made.directory / ("x" * 100)
    with unchanged(made.first.disk):
        said = refused(made, made.first, "up", "r0", code=20, says="choose a shorter --run-dir")
        assert "the limit is 107" in said and said.count("\n") == 1


def test_a_disk_in_use_by_another_daemon(made: Pair, new_pair: NewPair) -> None:
    made.adm(made.first, "up", "r0")
    other = new_pair(SIZE)
    other.first.disk = made.first.disk
    other.write_config()
    with unchanged(made.first.disk):
        refused(other, other.first, "up", "r0", code=1, says="(114) Lower device is already claimed.")
        for words in (["create-md", "--force"], ["wipe-md", "--force"], ["dump-md"], ["apply-al"]):
            said = refused(other, other.first, *words, "r0", code=20, says="already claimed")
            assert str(made.first.disk) in said
        refused(made, made.first, "create-md", "--force", "r0", code=20, says="Detach it first")
    assert made.status(made.first).volumes[0].disk == "Inconsistent"


def test_a_second_daemon_of_the_same_resource(made: Pair) -> None:
    made.adm(made.first, "up", "r0")
    pid = made.pid(made.first)
    with unchanged(made.first.disk):
        refused(made, made.first, "up", "r0", code=1, says="is up already")
    assert made.pid(made.first) == pid


# ----------------------------------------------------------------------------------------- full disk


def test_create_md_on_a_full_disk(made: Pair, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(6 * MIB - 16384))
    node = made.first
    node.disk = small_disk / "alice.img"
    made.make_disks([node])
    made.write_config()
    done = made.run(node, "create-md", "--force", "r0")
    assert done.returncode not in (0, -9) and "No space left on device" in done.stderr, done
    assert "Traceback" not in done.stderr


def test_a_disk_that_fills_up_is_left_and_the_peer_goes_on(made: Pair, small_disk: Path) -> None:
    node, peer = made.nodes
    node.disk = small_disk / "alice.img"
    made.make_disks([node])
    made.write_config()
    made.adm(node, "create-md", "--force", "r0")
    made.up()
    for one in made.nodes:
        made.wait(one, "connected", connected)
    made.adm(node, "new-current-uuid", "--clear-bitmap", "r0")
    made.wait_in_sync()
    made.adm(node, "primary", "r0")
    with Nbd(node.socket, "r0") as nbd:
        writes = [Request(Cmd.WRITE, at, MIB, b"f" * MIB) for at in range(0, 12 * MIB, MIB)]
        nbd.run(writes)
        assert all(request.acknowledged for request in writes)  # the peer's disk has room
        assert nbd.read(11 * MIB, 4096) == b"f" * 4096
    made.wait(node, "without its disk", lambda status: status.volumes[0].disk in ("Failed", "Diskless"))
    assert "on-io-error detach" in log_of(node)
    log_of(peer)
    assert made.status(peer).volumes[0].disk == "UpToDate"
    assert peer.disk.read_bytes()[: 12 * MIB] == b"f" * (12 * MIB)


# ----------------------------------------------------------------------------------- garbage on ports

GARBAGE = {
    "http": b"GET / HTTP/1.0\r\n\r\n",
    "zeroes": bytes(4096),
    "noise": random.Random(7).randbytes(65536),
    "drbd magic": b"\x83\x74\x02\x67" + b"\xff" * 60,
    "drbd 100 magic": b"\x86\x20\xec\x20" + b"\xff" * 60,
    "nbd request": b"\x25\x60\x95\x13" + b"\xff" * 24,
    "half a line": b'{"do": "command", "na',
    "deep": b"[" * 100_000 + b"\n",
    "other types": b'{"do": "command", "name": {"x": []}, "volume": "r0", "args": 7}\n',
}


def speak(family: socket.AddressFamily, address: object, data: bytes) -> bytes:
    """Send *data*, say no more, and take whatever comes until the other side closes."""
    got = b""
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.settimeout(30)
        sock.connect(address)  # type: ignore[arg-type]
        with contextlib.suppress(OSError):  # it need not listen to the end
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        try:
            while part := sock.recv(65536):
                got += part
        except ConnectionError:
            pass  # closed with something unread: as good as any end
    return got


def test_garbage_on_the_nbd_and_control_sockets(made: Pair) -> None:
    node = made.first
    made.adm(node, "up", "r0")
    pid = made.pid(node)
    for what, data in GARBAGE.items():
        with unchanged(node.disk):
            speak(socket.AF_UNIX, str(node.socket), data)
            answer = speak(socket.AF_UNIX, str(node.paths.control("r0")), data)
            assert answer.count(b"\n") <= 1 and (not answer or b'"error"' in answer), what
            assert alone(made.status(node)) and made.pid(node) == pid, what
    log_of(node)


def test_garbage_does_not_disturb_a_connected_pair(pair: Pair) -> None:
    node, peer = pair.nodes
    with open(node.disk, "rb") as file:
        before = file.read(4 * MIB)
    with Nbd(node.socket, "r0") as nbd:
        assert nbd.one(Request(Cmd.WRITE, 0, 4096, b"x" * 4096)).acknowledged
        for data in GARBAGE.values():
            speak(socket.AF_UNIX, str(node.socket), data)
            speak(socket.AF_UNIX, str(node.paths.control("r0")), data)
            for one in pair.nodes:  # nobody listens there while the two are connected
                with pytest.raises(ConnectionRefusedError):
                    speak(socket.AF_INET, ("127.0.0.1", one.port), data)
        assert nbd.read(0, 8192) == b"x" * 4096 + before[4096:8192]
    assert in_sync(pair.status(node)) and in_sync(pair.status(peer))
    assert "connection lost" not in log_of(node) + log_of(peer)


def test_garbage_on_the_replication_port(made: Pair) -> None:
    node, peer = made.nodes
    made.adm(node, "up", "r0")  # it listens until its peer is there
    pid = made.pid(node)
    for what, data in GARBAGE.items():
        with unchanged(node.disk):
            for _ in range(3):
                speak(socket.AF_INET, ("127.0.0.1", node.port), data)
            assert alone(made.status(node)) and made.pid(node) == pid, what
    made.adm(peer, "up", "r0")
    made.wait(node, "connected", connected)
    log_of(node)


def test_commands_that_make_no_sense(made: Pair) -> None:
    made.up()
    node = made.first
    for words, code, says in (
        (["attach", "r0"], 20, "is configured"),
        (["primary", "r0"], 17, "Need access to UpToDate data"),
        (["resume-sync", "r0"], 10, "Sync-pause flag is already cleared"),
        (["frobnicate", "r0"], 1, "Unknown command 'frobnicate'"),
        (["up", "r7"], 1, "'r7' not defined in your config"),
        (["primary", "--frobnicate", "r0"], 2, "--frobnicate"),
    ):
        refused(made, node, *words, code=code, says=says)
    log_of(node)
