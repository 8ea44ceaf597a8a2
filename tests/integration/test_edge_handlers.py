"""Handlers as real shells: their environment, their exit codes, their output, their end."""

from __future__ import annotations

import os
import queue
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tandem.repl.config import Endpoint, ResourceConfig, VolumeConfig
from tandem.repl.edge import handlers as handlers_module
from tandem.repl.edge.handlers import EXIT_NOT_RUN, OUTPUT_LINES_MAX, Handlers, environment
from tandem.repl.events import Event, HandlerExited, Notify, ResourceStatus, RunHandler

CONFIG = ResourceConfig(
    "r0", "alpha", "beta", Endpoint("ipv4", "10.0.0.1", 7788), Endpoint("ipv4", "10.0.0.2", 7788),
    (VolumeConfig(0, 5, "/dev/drbd5", "/dev/sdb1"), VolumeConfig(1, 6, "/dev/drbd6", "/dev/sdc1")),
    file="/etc/drbd.conf",
)  # fmt: skip


def status(disks: tuple[str, str], peer_disks: tuple[str, str]) -> ResourceStatus:
    peers = tuple(SimpleNamespace(peer_disk=disk) for disk in peer_disks)
    found = SimpleNamespace(
        volumes=tuple(SimpleNamespace(disk=disk) for disk in disks),
        connection=SimpleNamespace(connection="Connecting", volumes=peers),
    )
    return cast(ResourceStatus, found)


class Log:
    """Handlers with everything they report, waited for without polling."""

    def __init__(self, **commands: str) -> None:
        self.events: queue.Queue[Event] = queue.Queue()
        self.notes: list[Notify] = []
        self.config = replace(CONFIG, handlers={name.replace("_", "-"): c for name, c in commands.items()})
        self.handlers = Handlers(self.events.put, self.notes.append, 0.2)

    def run(self, name: str, volume: int | None = None, status: Any = None) -> int:
        self.handlers.run(RunHandler(3, name, volume), self.config, status)
        event = self.events.get(timeout=20)
        assert isinstance(event, HandlerExited) and event.ticket == 3
        return event.code

    @property
    def lines(self) -> list[str]:
        """What the handler printed, and what is said about it besides its begin and end."""
        return [note.text for note in self.notes if not note.text.startswith("helper command: ")]


def test_a_device_handler_sees_its_volume() -> None:
    seen = status(("UpToDate", "Inconsistent"), ("UpToDate",) * 2)
    env = environment(CONFIG, "before-resync-target", 1, seen)
    expected = {
        "HOME": "/", "TERM": "linux", "DRBD_RESOURCE": "r0", "DRBD_MINOR": "6", "DRBD_VOLUME": "1",
        "DRBD_LL_DISK": "/dev/sdc1", "DRBD_BACKING_DEV": "/dev/sdc1", "DRBD_CONF": "/etc/drbd.conf",
        "DRBD_PEER": "beta", "DRBD_PEERS": "beta", "DRBD_PEER_AF": "ipv4", "DRBD_PEER_ADDRESS": "10.0.0.2",
        "DRBD_MY_AF": "ipv4", "DRBD_MY_ADDRESS": "10.0.0.1", "DRBD_MY_NODE_ID": "0", "DRBD_PEER_NODE_ID": "1",
        "DRBD_NODE_ID_0": "alpha", "DRBD_NODE_ID_1": "beta", "DRBD_CSTATE": "Connecting",
        "DRBD_DONT_WARN_ON_VERSION_MISMATCH": "1",
    }  # fmt: skip
    assert env.pop("PATH").startswith("/sbin:/usr/sbin:/bin:/usr/bin:/lib/drbd")
    assert env == expected


def test_drbds_names_come_first_where_they_were_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "drbdadm").symlink_to(Path(sys.executable).with_name("tandemadm"))
    assert environment(CONFIG, "fence-peer", None, None)["PATH"].startswith(f"{tmp_path}:/sbin:")
    (tmp_path / "drbdadm").unlink()
    assert environment(CONFIG, "fence-peer", None, None)["PATH"].startswith("/sbin:")


def test_the_fencing_handlers_see_the_whole_resource() -> None:
    env = environment(CONFIG, "fence-peer", None, status(("UpToDate",) * 2, ("UpToDate", "DUnknown")))
    assert env["DRBD_MINOR"] == "5 6"
    assert (env["DRBD_MINOR_0"], env["DRBD_MINOR_1"]) == ("5", "6")
    assert (env["DRBD_BACKING_DEV_0"], env["DRBD_BACKING_DEV_1"]) == ("/dev/sdb1", "/dev/sdc1")
    assert "DRBD_VOLUME" not in env and "DRBD_LL_DISK" not in env
    assert env["UP_TO_DATE_NODES"] == "0x00000001"
    both = environment(CONFIG, "unfence-peer", None, status(("UpToDate",) * 2, ("UpToDate",) * 2))
    assert both["UP_TO_DATE_NODES"] == "0x00000003"


def test_the_exit_code_and_every_line_of_output_are_reported() -> None:
    log = Log(fence_peer='echo "peer is $DRBD_PEER"; echo oops >&2; printf unended; exit 4')
    assert log.run("fence-peer") == 4
    assert log.lines == ["fence-peer: peer is beta", "fence-peer: oops", "fence-peer: unended"]
    assert {note.subject for note in log.notes} == {"r0"}
    told = [note.text for note in log.notes if note.text not in log.lines]
    assert told == ["helper command: fence-peer", "helper command: fence-peer [exit code 4]"]


def test_output_does_not_act_on_the_terminal_of_who_reads_the_log() -> None:
    log = Log(fence_peer=r"printf '\033[31mred\r\ta\302\233 \303\274\n'; exit 4")
    log.run("fence-peer")
    assert log.lines == ["fence-peer: \\x1b[31mred\\r\ta\\x9b ü"]


def test_without_a_handler_the_exit_code_is_0() -> None:
    log = Log(split_brain="exit 1")
    assert log.run("fence-peer") == 0
    assert log.run("split-brain", 0) == 1
    assert log.lines == []


def test_fence_peer_may_have_its_old_name() -> None:
    assert Log(outdate_peer="exit 5").run("fence-peer") == 5


def test_a_handler_killed_by_a_signal_has_the_shells_code_for_it() -> None:
    assert Log(fence_peer="kill -9 $$").run("fence-peer") == 128 + signal.SIGKILL


def test_a_child_left_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    log = Log(local_io_error=f"sleep 600 & echo $! >{pid}; echo gone; exit 7")
    assert log.run("local-io-error", 0) == 7
    assert log.lines == ["local-io-error: gone"]

    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_handler_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handlers_module, "KILL_AFTER_S", 0.1)
    log = Log(fence_peer="trap '' TERM; echo waiting; while :; do sleep 1; done")
    assert log.run("fence-peer") == EXIT_NOT_RUN
    assert log.lines[0] == "fence-peer: waiting"
    assert "did not end within 0.2 seconds" in log.lines[-1] and log.notes[-2].level == "error"


def test_chatting_does_not_lengthen_the_time_limit() -> None:
    assert Log(fence_peer="while :; do echo wait; done").run("fence-peer") == EXIT_NOT_RUN


def test_endless_output_does_not_fill_the_log() -> None:
    log = Log(split_brain="i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done")
    assert log.run("split-brain", 0) == 0
    assert len(log.lines) == OUTPUT_LINES_MAX
    assert "more output" in log.lines[-1]


def test_stop_kills_and_reports_nothing(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"

    os.mkfifo(fifo)
    log = Log(fence_peer=f"exec sleep 600 >{fifo}")
    log.handlers.run(RunHandler(1, "fence-peer", None), log.config, None)
    with open(fifo, "rb") as pipe:  # opens when the handler runs
        log.handlers.stop()
        assert pipe.read() == b""  # ends when it has gone
    log.handlers.run(RunHandler(2, "fence-peer", None), log.config, None)
    with pytest.raises(queue.Empty):
        log.events.get(timeout=0.3)


def test_a_handler_does_not_inherit_how_the_loop_is_scheduled(tmp_path: Path) -> None:
    """The policy is the 41st word of its /proc/self/stat."""
    log = Log(fence_peer=f"cut -d ' ' -f 41 /proc/self/stat > {tmp_path}/policy")
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        assert log.run("fence-peer") == 0
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert int((tmp_path / "policy").read_text()) == os.SCHED_OTHER
