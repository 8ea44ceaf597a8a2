"""Runs the configured handlers (fence-peer, before-resync-target, …) and reports their exit codes.

Decides what a handler sees in its environment and how long it may take. The loop never waits: each run
has a thread of its own, which ends with the shell. Relies on the machine for everything that happens
before and after; here is only the call.

Sources: drbd.conf(5), section handlers; drbdadm's environment for helpers (DRBD 8.4, and what DRBD 9
added for its fencing scripts); its limit for commands of this kind, cmd-timeout-long, is 600 s.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tandem.repl.config import ResourceConfig
from tandem.repl.events import Event, HandlerExited, Helper, Notify, ResourceStatus, RunHandler

from .scheduling import ordinary

TIME_LIMIT_S: Final = 600.0  # drbdadm's cmd-timeout-long
KILL_AFTER_S: Final = 5.0  # between SIGTERM and SIGKILL at the time limit
OUTPUT_LINES_MAX: Final = 500  # of one run; a handler gone mad must not fill the log
LINE_BYTES_MAX: Final = 4096
EXIT_NOT_RUN: Final = 20  # drbdadm's code for "could not run it" and "did not end in time"
SEARCH_PATH: Final = "/sbin:/usr/sbin:/bin:/usr/bin:/lib/drbd"
OLD_NAMES: Final = {"fence-peer": "outdate-peer"}


def environment(
    config: ResourceConfig, name: str, volume: int | None, status: ResourceStatus | None
) -> dict[str, str]:
    """What handler *name* sees: DRBD 8.4's variables, and those DRBD 9 added.

    *status* supplies DRBD_CSTATE and, for the fencing handlers, UP_TO_DATE_NODES.
    """
    env = {
        "HOME": "/",
        "TERM": "linux",
        "PATH": _search_path(),
        "DRBD_RESOURCE": config.name,
        "DRBD_CONF": config.file,
        "DRBD_PEER": config.peer,
        "DRBD_PEERS": " ".join(config.peer_names) or config.peer,
        "DRBD_PEER_AF": config.peer_address.family,
        "DRBD_PEER_ADDRESS": config.peer_address.host,
        "DRBD_PEER_NODE_ID": str(config.peer_node_id),
        "DRBD_MY_AF": config.address.family,
        "DRBD_MY_ADDRESS": config.address.host,
        "DRBD_MY_NODE_ID": str(config.node_id),
        f"DRBD_NODE_ID_{config.node_id}": config.node,
        f"DRBD_NODE_ID_{config.peer_node_id}": config.peer,
        "DRBD_DONT_WARN_ON_VERSION_MISMATCH": "1",
    }
    # So that `tandemadm` in a handler speaks of this installation, wherever its directories are.
    env |= {key: value for key, value in os.environ.items() if key.startswith("TANDEM_")}
    one = config.volume(volume) if volume is not None else None
    if one is not None:
        env["DRBD_MINOR"] = str(one.minor)
        env["DRBD_VOLUME"] = str(one.number)
        env["DRBD_LL_DISK"] = one.disk or "none"
        env["DRBD_BACKING_DEV"] = one.disk or "none"
    else:
        env["DRBD_MINOR"] = " ".join(str(each.minor) for each in config.volumes)
        for each in config.volumes:
            env[f"DRBD_MINOR_{each.number}"] = str(each.minor)
            env[f"DRBD_BACKING_DEV_{each.number}"] = each.disk or "none"
    if status is not None:
        env["DRBD_CSTATE"] = status.connection.connection
        if name in ("fence-peer", "unfence-peer"):
            env["UP_TO_DATE_NODES"] = f"0x{_up_to_date_nodes(config, status):08X}"
    return env


def _search_path() -> str:
    """Our own programs come last, so that a handler finds them even when they are not installed.

    A directory of the daemon's own PATH in which ``drbdadm`` is Tandem comes first: it was put there to that end.
    """
    parts = [SEARCH_PATH, os.path.dirname(sys.executable)]
    drbdadm = shutil.which("drbdadm")
    if drbdadm is not None and os.path.basename(os.path.realpath(drbdadm)) == "tandemadm":
        parts.insert(0, os.path.dirname(os.path.abspath(drbdadm)))
    return ":".join(parts)


def _up_to_date_nodes(config: ResourceConfig, status: ResourceStatus) -> int:
    """The bit mask of the node ids all of whose disks are known to be UpToDate."""
    mask = 0
    if status.volumes and all(each.disk == "UpToDate" for each in status.volumes):
        mask |= 1 << config.node_id
    peers = status.connection.volumes
    if peers and all(each.peer_disk == "UpToDate" for each in peers):
        mask |= 1 << config.peer_node_id
    return mask


class Handlers:
    """Starts handlers; *report* gets `HandlerExited`, *notify* their output line by line.

    Both are called from any thread. *time_limit_s* is there for tests.
    """

    def __init__(
        self,
        report: Callable[[Event], None],
        notify: Callable[[Notify], None],
        time_limit_s: float = TIME_LIMIT_S,
    ) -> None:
        self._report = report
        self._notify = notify
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by ticket
        self._stopped = False

    def run(self, effect: RunHandler, config: ResourceConfig, status: ResourceStatus | None) -> None:
        """Run the handler if one is configured; without one the answer is exit code 0, as drbdadm's is."""
        command = config.handlers.get(effect.name) or config.handlers.get(OLD_NAMES.get(effect.name, ""))
        if not command:
            self._report(HandlerExited(effect.ticket, 0))
            return
        env = environment(config, effect.name, effect.volume, status)
        subject = config.name if effect.volume is None else f"{config.name}/{effect.volume}"
        threading.Thread(
            target=self._run, args=(effect, command, env, subject), name=f"handler-{effect.name}", daemon=True
        ).start()

    def stop(self) -> None:
        """Kill what runs; nothing is reported for it any more."""
        with self._lock:
            self._stopped = True
            for process in self._running.values():
                _signal_group(process, signal.SIGKILL)

    def _run(self, effect: RunHandler, command: str, env: dict[str, str], subject: str) -> None:
        ordinary()
        calls = Helper(effect.name, effect.volume)
        self._notify(Notify(subject, f"helper command: {effect.name}", command, helper=calls))
        code = self._call(effect, command, env, subject)
        if not self._stopped:
            ended = replace(calls, code=code)
            self._notify(Notify(subject, f"helper command: {effect.name} [exit code {code}]", helper=ended))
            self._report(HandlerExited(effect.ticket, code))

    def _call(self, effect: RunHandler, command: str, env: dict[str, str], subject: str) -> int:
        """Run the shell to its end; the exit code as drbdadm would give it. Blocking."""
        with self._lock:
            if self._stopped:
                return EXIT_NOT_RUN
            try:
                process = subprocess.Popen(
                    ["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT, env=env, cwd="/", start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                text = f"handler {effect.name} could not be started: {error.strerror}"
                self._notify(Notify(subject, text, command, "error"))
                return EXIT_NOT_RUN
            self._running[effect.ticket] = process
        try:
            in_time = self._follow(process, _Lines(lambda line: self._say(subject, effect.name, line)))
        finally:
            with self._lock:
                del self._running[effect.ticket]
        if not in_time:
            text = f"handler {effect.name} did not end within {self._time_limit_s:g} seconds and was killed"
            self._notify(Notify(subject, text, command, "error"))
            return EXIT_NOT_RUN
        code = process.returncode
        return code if code >= 0 else 128 - code  # the shell's own convention for signals

    def _say(self, subject: str, name: str, line: str) -> None:
        self._notify(Notify(subject, f"{name}: {line}"))

    def _follow(self, process: subprocess.Popen[bytes], lines: _Lines) -> bool:
        """Collect the output until the shell ends; False when it had to be killed.

        Whatever the handler left running in the background may keep the pipe open, so the end of the
        shell counts, not the end of the output.
        """
        assert process.stdout is not None
        pipe = process.stdout.fileno()
        os.set_blocking(pipe, False)
        pidfd = os.pidfd_open(process.pid)
        try:
            limits = [
                (time.monotonic() + self._time_limit_s, signal.SIGTERM),
                (time.monotonic() + self._time_limit_s + KILL_AFTER_S, signal.SIGKILL),
            ]
            in_time, watched = True, [pipe, pidfd]
            while True:
                wait_s = max(0.0, limits[0][0] - time.monotonic()) if limits else None
                ready, _, _ = select.select(watched, [], [], wait_s)
                if pipe in ready and not lines.read(pipe):
                    watched = [pidfd]
                if pidfd in ready:
                    process.wait()
                    while pipe in watched and lines.read(pipe):
                        pass
                    return in_time
                if limits and time.monotonic() >= limits[0][0]:
                    _signal_group(process, limits.pop(0)[1])
                    in_time = False
        finally:
            os.close(pidfd)
            process.stdout.close()
            lines.end()


class _Lines:
    """Cuts a handler's output into lines for the log."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._rest = b""
        self._n_lines = 0

    def read(self, fd: int) -> bool:
        """Take what is there; False at the end of the output, or when nothing is there at the moment."""
        try:
            data = os.read(fd, 65536)
        except BlockingIOError:
            return False
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > LINE_BYTES_MAX:
            whole.append(self._rest)
            self._rest = b""
        for line in whole:
            self._put(line)
        return bool(data)

    def end(self) -> None:
        if self._rest:
            self._put(self._rest)
            self._rest = b""

    def _put(self, line: bytes) -> None:
        self._n_lines += 1
        if self._n_lines == OUTPUT_LINES_MAX:
            self._say("(more output follows, which is not logged)")
        elif self._n_lines < OUTPUT_LINES_MAX:
            self._say(_printable(line[:LINE_BYTES_MAX].decode("utf-8", "replace").rstrip()))


def _printable(text: str) -> str:
    """Without what would act on the terminal of somebody who reads the log."""
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in text)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the shell and everything it started that did not leave its session."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)
