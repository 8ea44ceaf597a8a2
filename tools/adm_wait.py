"""Commands that go on until something happens: wait-connect, wait-sync, events2.

They follow the daemons' events; nothing is polled except for daemons that are yet to start. Each ends
with Ctrl-C, or at its time limit with exit code 5.
"""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from tandem.repl.events import ResourceStatus

from .adm_session import DaemonError, NotRunning, Session, Target, complain, say, select_volumes, waiting
from .adm_verbs import Option, verb
from .client import Client
from .events2 import Events

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

EXIT_TIMEOUT: Final = 5
RESCAN_S: Final = 1.0  # how often events2 looks for daemons that have started

WFC = Option("--wfc-timeout", "Seconds to wait for the peer, 0 for ever.", "seconds")
DEGR = Option("--degr-wfc-timeout", "The same after a crash without the peer.", "seconds")
OUTDATED = Option("--outdated-wfc-timeout", "The same when the peer is Outdated.", "seconds")
AFTER_SB = Option("--wait-after-sb", "Go on waiting when StandAlone.")

Verdict = Callable[[ResourceStatus], int | None]  # an exit code, or None to wait on
Show = Callable[[ResourceStatus], None]


def _follow(client: Client, verdict: Verdict, limit_s: float, show: Show | None = None) -> int:
    """Wait until *verdict* decides; exit code 5 after *limit_s* seconds, 0 meaning no limit."""
    deadline = time.monotonic() + limit_s if limit_s else None
    status = client.subscribe()
    while True:
        if show is not None:
            show(status)
        code = verdict(status)
        if code is not None:
            return code
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return EXIT_TIMEOUT
        following = client.following(left)
        if following is not None:
            status = following.status


# ------------------------------------------------------------------------------------ wait-connect


@verb("wait-connect", "Wait until connected.", WFC, DEGR, OUTDATED, AFTER_SB, scope="volume")
def wait_connect(session: Session, target: Target, **given: Any) -> int:
    with session.client(target.resource) as client, waiting(f"{target}: waiting for the peer") as tick:
        status = client.status()
        limit_s, after_sb = _patience(session, target, status, given)

        def verdict(status: ResourceStatus) -> int | None:
            if status.connection.connection == "Connected":
                return 0 if status.connection.cstate != "WFReportParams" else None
            return 0 if status.connection.cstate == "StandAlone" and not after_sb else None

        if verdict(status) is None:
            tick(1.0)
        return _follow(client, verdict, limit_s)


for _name in ("wait-connect-resource", "wait-connect-connection", "wait-connect-volume"):
    verb(_name, "As wait-connect.", WFC, DEGR, OUTDATED, AFTER_SB, scope="volume", hidden=True)(wait_connect)


def _patience(
    session: Session, target: Target, status: ResourceStatus, given: dict[str, Any]
) -> tuple[float, bool]:
    """The time limit in seconds (0: none), and whether StandAlone is to be waited out."""
    startup: Any = None
    if all(given[option.field] is None for option in (WFC, DEGR, OUTDATED)):
        startup = session.config(target.resource).startup
    peer_disks = {volume.peer_disk for volume in status.connection.volumes}
    if any(_was_degraded(volume.flags) for volume in status.volumes):
        name = "degr_wfc_timeout"
    elif "Outdated" in peer_disks:
        name = "outdated_wfc_timeout"
    else:
        name = "wfc_timeout"
    if startup is not None:
        return float(getattr(startup, name)), bool(given["wait_after_sb"] or startup.wait_after_sb)
    chosen = given[name] if given[name] is not None else given["wfc_timeout"]
    return float(chosen or 0), bool(given["wait_after_sb"])


def _was_degraded(flags: str) -> bool:
    """Did this node crash as a Primary without its peer? *flags* is the get-gi line."""
    digits = flags.split(":")[4:]
    return len(digits) == 7 and digits[6] == "1" and digits[3] == "0"


@verb("wait-con-int", "Wait for all connections, as at boot.", scope="global", hidden=True)
def wait_con_int(session: Session) -> int:
    none_given = dict.fromkeys(o.field for o in (WFC, DEGR, OUTDATED, AFTER_SB))
    for target in session.targets(("all",)):
        try:
            wait_connect(session, target, **none_given)
        except NotRunning:
            continue
        except KeyboardInterrupt:
            complain("Not waiting any longer.")
            break
    return 0


# --------------------------------------------------------------------------------------- wait-sync


@verb("wait-sync", "Wait until a resync is finished.", WFC, DEGR, OUTDATED, AFTER_SB, scope="volume")
def wait_sync(session: Session, target: Target, **given: Any) -> int:
    limit_s = float(given["wfc_timeout"] or 0)

    def verdict(status: ResourceStatus) -> int | None:
        if status.connection.cstate == "StandAlone" and not given["wait_after_sb"]:
            complain(f"{target}: StandAlone, there is nobody to synchronize with. Connect first: "
                     f"tandemadm connect {target.resource}")  # fmt: skip
            return EXIT_TIMEOUT
        return 0 if in_sync(status, target) else None

    with session.client(target.resource) as client, _SyncDisplay(target) as display:
        code = _follow(client, verdict, limit_s, display.show)
    if code == EXIT_TIMEOUT and limit_s:
        complain(f"{target}: not in sync after {limit_s:.0f} seconds")
    return code


for _name in ("wait-sync-resource", "wait-sync-connection", "wait-sync-volume"):
    verb(_name, "As wait-sync.", WFC, DEGR, OUTDATED, AFTER_SB, scope="volume", hidden=True)(wait_sync)


def in_sync(status: ResourceStatus, target: Target) -> bool:
    """Is every volume that is meant replicated and equal on both nodes?"""
    wanted = {volume.number: volume.disk for volume in select_volumes(status, target)}
    peers = {volume.number: volume for volume in status.connection.volumes}
    return all(
        number in peers
        and peers[number].replication == "Established"
        and disk == peers[number].peer_disk == "UpToDate"
        for number, disk in wanted.items()
    )


class _SyncDisplay:
    """A progress bar for each volume, on a terminal only."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._silent = not sys.stderr.isatty()

    def __enter__(self) -> _SyncDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def show(self, status: ResourceStatus) -> None:
        if self._silent:
            return
        for volume in status.connection.volumes:
            progress = self._started()
            if volume.number not in self._tasks:
                title = f"{status.name}/{volume.number}"
                self._tasks[volume.number] = progress.add_task(title, total=None, state="")
            task = self._tasks[volume.number]
            if volume.sync is None:
                state = volume.replication if volume.replication != "Off" else status.connection.cstate
                copied = progress.tasks[task].total if state == "Established" else None
                progress.update(task, state=state, completed=copied)
            else:
                done = volume.sync.total - volume.sync.left
                progress.update(task, total=volume.sync.total, completed=done, state=volume.replication)

    def _started(self) -> Progress:
        if self._progress is None:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description} {task.fields[state]}"), BarColumn(), DownloadColumn(),
                TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True),
            )  # fmt: skip
            self._progress.start()
        return self._progress


# ----------------------------------------------------------------------------------------- events2


@verb(
    "events2", "Print every change of state.",
    Option("--now", "Print the present state and end."),
    Option("--statistics", "With counters."),
    Option("--timestamps", "With the time in front."),
    Option("--full", "Every key on every line, with counters."),
    Option("--poll", "Print changed counters for each line 'n' on standard input."),
    Option("--diff", "Print old->new."),
    scope="own",
)  # fmt: skip
def events2(
    session: Session, names: tuple[str, ...], now: bool, statistics: bool, timestamps: bool, full: bool,
    poll: bool, diff: bool,
) -> int:  # fmt: skip
    wanted = None
    if names and names != ("all",):
        wanted = sorted({target.resource for target in session.targets(names)})
    printer = _Printer(Events(statistics, full, diff), timestamps)
    follower = _Follower(session, wanted, printer)
    missing = follower.begin()
    printer.lines(["exists -"])
    if now:
        for name in missing:
            complain(f"{name}: the daemon is not running; start it with: tandemadm up {name}")
        return 20 if missing else 0
    follower.follow(poll)
    return 0


class _Printer:
    """Event lines to stdout, flushed after each batch."""

    def __init__(self, events: Events, timestamps: bool) -> None:
        self.events = events
        self._timestamps = timestamps

    def lines(self, lines: list[str]) -> None:
        for line in lines:
            say(f"{self._stamp()}{line}")

    def _stamp(self) -> str:
        if not self._timestamps:
            return ""
        now = datetime.now().astimezone()
        zone = now.strftime("%z")
        return f"{now:%Y-%m-%dT%H:%M:%S.%f}{zone[:3]}:{zone[3:]} "


class _Follower:
    """Follows the daemons of some or all resources of the node, also those that start later."""

    def __init__(self, session: Session, wanted: list[str] | None, printer: _Printer) -> None:
        self._session = session
        self._wanted = wanted
        self._printer = printer
        self._clients: dict[str, Client] = {}
        self._selector = selectors.DefaultSelector()
        self._input = b""

    def begin(self) -> list[str]:
        """Print what is there; the names that were asked for and do not run."""
        self._rescan("exists")
        return [name for name in self._wanted or [] if name not in self._clients]

    def follow(self, poll: bool) -> None:
        """Print changes until the end of standard input (with *poll*) or Ctrl-C."""
        if poll:
            self._register_input()
        while True:
            ready = self._selector.select(RESCAN_S)
            for key, _ in ready:
                if key.data is None:
                    if not self._poll():
                        return
                else:
                    self._read(str(key.data))
            if not ready:
                self._rescan("create")

    def _register_input(self) -> None:
        try:
            self._selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        except (OSError, ValueError):
            complain("events2: standard input cannot be waited for; --poll is ignored")

    def _rescan(self, action: str) -> None:
        names = self._session.paths.resources() if self._wanted is None else self._wanted
        for name in names:
            if name not in self._clients:
                self._add(name, action)

    def _add(self, name: str, action: str) -> None:
        try:
            client = self._session.client(name)
        except DaemonError:
            return
        try:
            status = client.subscribe()
        except DaemonError:
            client.close()
            return
        self._clients[name] = client
        self._selector.register(client, selectors.EVENT_READ, name)
        self._printer.lines(self._printer.events.update(status, action))

    def _read(self, name: str) -> None:
        client = self._clients[name]
        events = self._printer.events
        try:
            while True:
                following = client.following(0.001 if not client.buffered() else None)
                if following is None:
                    break
                self._printer.lines(events.update(following.status, poll=following.poll))
                if following.helper is not None:
                    self._printer.lines([events.helper(following.status, following.helper)])
                if not client.buffered():
                    break
        except DaemonError:
            self._selector.unregister(client)
            self._clients.pop(name).close()
            self._printer.lines(events.gone(name))

    def _poll(self) -> bool:
        """Read standard input; ask for statistics for each line ``n``. False at its end."""
        data = os.read(sys.stdin.fileno(), 4096)
        if not data:
            return False
        *lines, self._input = (self._input + data).split(b"\n")
        if any(line.strip() == b"n" for line in lines):
            for client in list(self._clients.values()):
                client.poll()
        return True
