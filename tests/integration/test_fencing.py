"""Handlers of real daemons: what they see, what their answers do, and that nobody waits for them who need not."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tandem.repl.events import ResourceStatus
from tandem.tools.agents.handler import FenceResult as R
from tandem.tools.demo_nbd import ConnectionLost, Nbd, write
from tandem.tools.demo_pair import Node, Pair, alone, in_sync

NewPair = Callable[..., Pair]
STONITH = "fencing resource-and-stonith;"
FAST = "timeout 20; ping-int 2; ping-timeout 10; connect-int 1;"
BLOCK = 4096
LIMIT_S = 60


def handlers(**lines: str) -> str:
    text = "".join(f"        {name.replace('_', '-')} \"{line}\";\n" for name, line in lines.items())
    return f"    handlers {{\n{text}    }}\n"


def thawed(status: ResourceStatus) -> bool:
    return status.suspended == "no"


def frozen(status: ResourceStatus) -> bool:
    return "fencing" in status.suspended


def said(pair: Pair, node: Node, text: str) -> None:
    """Wait until the node's log has *text*, which no event tells."""
    deadline = time.monotonic() + LIMIT_S
    while text not in node.log:
        assert time.monotonic() < deadline, f"{node.name} does not say {text!r}:\n{pair.logs(30)}"
        time.sleep(0.05)


class Held:
    """A handler that says when it is called, and answers when it is told what."""

    def __init__(self, directory: Path) -> None:
        self.asked, self.answer = directory / "asked", directory / "answer"
        for fifo in (self.asked, self.answer):
            os.mkfifo(fifo)

    @property
    def line(self) -> str:
        return f"echo called > {self.asked}; read code < {self.answer}; exit $code"

    def called(self) -> None:
        assert self.asked.read_text() == "called\n"

    def exits(self, code: int) -> None:
        self.answer.write_text(f"{code}\n")


class Writer(threading.Thread):
    """One write and a flush that may have to wait; `done` once it is answered."""

    def __init__(self, node: Node) -> None:
        super().__init__(daemon=True)
        self.node = node
        self.error: int | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, ConnectionLost), Nbd(self.node.socket, "r0") as nbd:
            self.error = nbd.one(write(0, b"w" * BLOCK)).error


@pytest.fixture
def held(directory: Path) -> Held:
    return Held(directory)


@pytest.fixture
def recorded(directory: Path) -> Iterator[Path]:
    place = directory / "env"
    place.mkdir()
    yield place


def environments(place: Path, node: str) -> dict[str, dict[str, str]]:
    """What the handlers of a node saw, by handler."""
    found = {}
    for path in place.glob(f"{node}.*"):
        lines = (line.partition("=") for line in path.read_text().splitlines())
        found[path.name.partition(".")[2]] = {name: value for name, _, value in lines}
    return found


def test_every_handler_of_a_failure_sees_drbds_environment(new_pair: NewPair, recorded: Path) -> None:
    names = ("fence_peer", "unfence_peer", "before_resync_source", "before_resync_target", "after_resync_source",
             "after_resync_target", "quorum_lost")  # fmt: skip
    # Whole or not at all: a handler that is called a second time must not be seen with half of its variables.
    lines = {name: f"env > {recorded}/.$$ && mv {recorded}/.$$ {recorded}/$TANDEM_NODE.{name}" for name in names}
    lines["fence_peer"] += "; exit 7"
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(**lines))
    pair.start()
    alice, bob = pair.first, pair.second
    pair.kill(bob)
    pair.wait(alice, "alone", alone)
    pair.wait(alice, "thawed", thawed)
    with Nbd(alice.socket, "r0") as nbd:
        assert nbd.one(write(0, b"x" * BLOCK)).error == 0
    pair.adm(bob, "up", "r0")
    pair.wait_in_sync()
    said(pair, alice, "helper command: unfence-peer [exit code 0]")
    said(pair, bob, "helper command: after-resync-target [exit code 0]")
    mine, theirs = environments(recorded, "alice"), environments(recorded, "bob")
    assert set(mine) == {"fence_peer", "unfence_peer", "before_resync_source", "after_resync_source"}
    assert set(theirs) == {"before_resync_target", "after_resync_target"}
    for name, env in (mine | theirs).items():
        assert env["DRBD_RESOURCE"] == "r0" and env["DRBD_MINOR"] == "0" and env["DRBD_CONF"] == str(pair.config)
        assert env["DRBD_PEER"] == ("bob" if name in mine else "alice") == env["DRBD_PEERS"]
        assert env["DRBD_PEER_AF"] == "ipv4" and env["DRBD_PEER_ADDRESS"] == "127.0.0.1"
        assert ("DRBD_LL_DISK" in env) == ("fence" not in name) and env["HOME"] == "/" and env["TERM"] == "linux"
    assert int(mine["fence_peer"]["UP_TO_DATE_NODES"], 16) == 1 << int(mine["fence_peer"]["DRBD_MY_NODE_ID"])
    assert mine["unfence_peer"]["UP_TO_DATE_NODES"] == "0x00000003"
    assert pair.status(alice).connection.volumes[0].peer_disk == "UpToDate"


def test_io_is_frozen_until_the_handler_answers_and_nothing_else_is(new_pair: NewPair, held: Held) -> None:
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(fence_peer=held.line))
    pair.start()
    alice, bob = pair.first, pair.second
    words = pair.command(alice, "events2", "r0")
    events = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert events.stdout is not None
    lines = iter(events.stdout.readline, "")
    assert "exists -\n" in lines
    pair.kill(bob)
    held.called()
    helper = f"helper name:r0 peer-node-id:{pair.status(alice).connection.node_id} conn-name:bob helper:fence-peer"
    assert f"call {helper}\n" in lines
    writer = Writer(alice)
    assert frozen(pair.wait(alice, "frozen", frozen))
    assert "suspended:fencing" in pair.adm(alice, "status", "r0")
    assert pair.adm(alice, "role", "r0").startswith("Primary/Unknown")
    assert pair.adm(alice, "primary", "r0") == "", "commands are answered, too"
    assert writer.is_alive() and writer.error is None
    held.exits(R.PEER_STONITHED)
    writer.join(60)
    assert writer.error == 0
    assert f"response {helper} status:{7 << 8}\n" in lines
    events.terminate()
    events.communicate()
    assert thawed(pair.status(alice)) and pair.status(alice).connection.volumes[0].peer_disk == "Outdated"


@pytest.mark.parametrize("code", [9, R.PEER_PRIMARY])
def test_io_goes_on_when_the_peer_is_out_and_stays_frozen_otherwise(new_pair: NewPair, held: Held, code: int) -> None:
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(fence_peer=held.line))
    pair.start()
    alice, bob = pair.first, pair.second
    for out, disk in ((3, "Inconsistent"), (4, "Outdated"), (5, "Outdated"), (code, "")):
        pair.kill(bob)
        held.called()
        writer = Writer(alice)
        pair.wait(alice, "frozen", frozen)
        held.exits(out)
        if disk:
            pair.wait(alice, "thawed", thawed)
            assert pair.status(alice).connection.volumes[0].peer_disk == disk
            writer.join(60)
            assert writer.error == 0
            pair.adm(bob, "up", "r0")
            pair.wait_in_sync()
    said(pair, alice, f"helper command: fence-peer [exit code {code}]")
    if code == R.PEER_PRIMARY:
        pair.wait(alice, "Outdated", lambda status: status.volumes[0].disk == "Outdated")
    else:
        said(pair, alice, "fence-peer helper broken, returned 9")
    assert frozen(pair.status(alice)) and writer.error is None


def test_an_answer_that_comes_after_the_peer_changes_nothing(new_pair: NewPair, held: Held) -> None:
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(fence_peer=held.line))
    pair.start()
    alice, bob = pair.first, pair.second
    pair.signal(bob, signal.SIGSTOP)  # the peer does not answer, and forgets nothing
    held.called()
    writer = Writer(alice)
    pair.wait(alice, "frozen", frozen)
    pair.signal(bob, signal.SIGCONT)
    pair.wait(alice, "in sync", in_sync)
    writer.join(60)
    assert writer.error == 0
    before = pair.adm(alice, "get-gi", "r0")
    held.exits(R.PEER_PRIMARY)
    said(pair, alice, "fence-peer returned 6, but the peer is back: ignored")
    status = pair.status(alice)
    assert in_sync(status) and status.role == "Primary" and pair.adm(alice, "get-gi", "r0") == before


def test_a_switch_that_kills_the_peer_and_exactly_one_that_writes(new_pair: NewPair, directory: Path) -> None:
    """The real program, with a power switch that ends the process that is the peer."""
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(fence_peer=f"tandem-fence-peer -f {directory}/fence.conf"))
    alice, bob = pair.first, pair.second
    switch = directory / "fence_process"
    switch.write_text(
        '#!/bin/sh\nwhile read -r word; do case $word in action=*) action=${word#*=} ;; pid_file=*) pid='
        '$(cat "${word#*=}") ;; esac; done\n[ "$action" = off ] && { kill -9 "$pid"; exit 0; }\n'
        'grep -qs "^State:.[^Z]" /proc/$pid/status || exit 2\n'
    )
    switch.chmod(0o755)
    sections = (f"[{node.name}]\nagent = {switch}\npid_file = {node.paths.pid('r0')}\n" for node in pair.nodes)
    (directory / "fence.conf").write_text("".join(sections))
    pair.start()
    pair.signal(bob, signal.SIGSTOP)  # as good as a network that is gone
    writer = Writer(alice)
    writer.join(60)
    assert writer.error == 0 and pair.pid(bob) is None, "the write was answered after the peer was dead"
    assert "[bob]" in alice.log and "helper command: fence-peer [exit code 7]" in alice.log
    pair.adm(bob, "up", "r0")
    pair.wait_in_sync()
    assert alice.disk.read_bytes()[:BLOCK] == bob.disk.read_bytes()[:BLOCK] == b"w" * BLOCK


def test_a_node_that_was_shot_does_not_shoot_back(new_pair: NewPair, directory: Path) -> None:
    """It comes back while the network is cut: Consistent, with old data, and may not become Primary."""
    called = directory / "called"
    line = f"tandem-fence-peer -f {directory}/fence.conf; code=$?; echo $code >> {called}; exit $code"
    pair = new_pair(disk=STONITH, net=FAST, more=handlers(fence_peer=line))
    alice, bob = pair.first, pair.second
    switch = directory / "fence_yes"
    switch.write_text("#!/bin/sh\ngrep -q status && exit 2\nexit 0\n")
    switch.chmod(0o755)
    (directory / "fence.conf").write_text(f"[alice]\nagent = {switch}\n[bob]\nagent = {switch}\n")
    pair.start()
    pair.kill(alice)
    pair.wait(bob, "alone", alone)
    pair.adm(bob, "primary", "r0")  # shoots alice, as it believes
    with Nbd(bob.socket, "r0") as nbd:
        assert nbd.one(write(0, b"n" * BLOCK)).error == 0
    pair.kill(bob)
    pair.adm(alice, "up", "r0")
    assert pair.status(alice).volumes[0].disk == "Consistent"
    refused = pair.run(alice, "primary", "r0")
    assert refused.returncode == 17 and pair.status(alice).role == "Secondary"
    assert called.read_text().split() == ["7", "1"]
    pair.adm(bob, "up", "r0")
    pair.wait_in_sync()
    assert alice.disk.read_bytes()[:BLOCK] == b"n" * BLOCK


def test_in_a_split_brain_one_side_is_fenced(new_pair: NewPair, directory: Path) -> None:
    """Handlers that lied make one. The Primary's handler is called for the other node, which is Outdated."""
    called = directory / "called"
    pair = new_pair(
        disk="fencing resource-only;", net=FAST,
        more=handlers(fence_peer=f"echo $TANDEM_NODE >> {called}; exit 4",
                      split_brain=f"echo split $TANDEM_NODE >> {called}"),
    )  # fmt: skip
    pair.start()
    alice, bob = pair.first, pair.second
    pair.adm(alice, "disconnect", "--force", "r0")
    pair.wait(bob, "alone", alone)
    pair.adm(bob, "primary", "r0")
    for node in pair.nodes:
        with Nbd(node.socket, "r0") as nbd:
            assert nbd.one(write(0, node.name[:1].encode() * BLOCK)).error == 0
    pair.adm(bob, "secondary", "r0")
    called.write_text("")
    pair.adm(alice, "connect", "r0")
    pair.wait(bob, "StandAlone", lambda status: status.connection.connection == "StandAlone")
    pair.wait(bob, "Outdated", lambda status: status.volumes[0].disk == "Outdated")
    said(pair, alice, "fence-peer helper returned 4")
    for node in pair.nodes:
        said(pair, node, "helper command: split-brain [exit code 0]")
    status = pair.status(alice)
    assert status.connection.connection == "StandAlone" and status.role == "Primary" and status.suspended == "no"
    assert status.connection.volumes[0].peer_disk == "Outdated"
    assert sorted(called.read_text().splitlines()) == ["alice", "split alice", "split bob"]
    assert pair.run(bob, "primary", "r0").returncode == 17, "who yielded stays out"
