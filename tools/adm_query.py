"""Questions: role, cstate, dstate, status, generation identifiers.

Answered by the daemon's snapshot, without reading the configuration when the names are plain; what the
metadata can answer is read from the disk when no daemon runs.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from typing import Final

from tandem.repl.events import ResourceStatus, VolumeStatus

from . import adm_meta
from .adm_session import NotRunning, Session, Target, complain, say, select_volumes
from .adm_verbs import Option, verb
from .status import cstate_line, dstate_line, role_line, status_json, status_text

Line = Callable[[ResourceStatus, VolumeStatus], str]


def _per_volume(session: Session, target: Target, line: Line) -> int:
    status = session.status(target.resource)
    for volume in select_volumes(status, target):
        say(line(status, volume))
    return 0


@verb("role", "Print local/peer role.", scope="volume")
def role(session: Session, target: Target) -> int:
    return _per_volume(session, target, role_line)


@verb("cstate", "Print the connection state.", scope="volume")
def cstate(session: Session, target: Target) -> int:
    return _per_volume(session, target, cstate_line)


@verb("dstate", "Print local/peer disk state.", scope="volume")
def dstate(session: Session, target: Target) -> int:
    try:
        return _per_volume(session, target, dstate_line)
    except NotRunning:
        return adm_meta.offline_dstate(session, target)


@verb("get-gi", "Print the data generation identifiers.", scope="volume")
def get_gi(session: Session, target: Target) -> int:
    return _generations(session, target, adm_meta.offline_get_gi, explain=False)


@verb("show-gi", "Explain the data generation identifiers.", scope="volume")
def show_gi(session: Session, target: Target) -> int:
    return _generations(session, target, adm_meta.offline_show_gi, explain=True)


def _generations(
    session: Session, target: Target, offline: Callable[[Session, Target], int], explain: bool
) -> int:
    try:
        status = session.status(target.resource)
    except NotRunning:
        return offline(session, target)
    worst = 0
    for volume in select_volumes(status, target):
        one = Target(target.resource, volume.number)
        if not volume.flags:
            worst = max(worst, offline(session, one))
        else:
            say(adm_meta.explain_gi(volume) if explain else volume.flags)
    return worst


# ------------------------------------------------------------------------------------------- status


@verb(
    "status", "Show the state of resources.",
    Option("--json", "As JSON."),
    Option("--statistics", "With counters."),
    Option("--color", "always, auto or never.", "text", "auto"),
    scope="own",
)  # fmt: skip
def status(
    session: Session, names: tuple[str, ...], json: bool, statistics: bool, color: str
) -> int:
    resources, code = _statuses(session, names)
    if json:
        say(status_json(resources))
        return code
    if not resources and code == 0:
        say("# No currently configured DRBD found.")
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((80, 25)).columns if terminal else 80
    for resource in resources:
        text = status_text(
            resource, verbose=session.general.verbose, statistics=statistics, width=width,
            terminal=terminal,
        )  # fmt: skip
        wanted = color == "always" or (color == "auto" and terminal and "NO_COLOR" not in os.environ)
        sys.stdout.write(colored(text) if wanted else text)
    return code


def _statuses(session: Session, names: tuple[str, ...]) -> tuple[list[ResourceStatus], int]:
    """The statuses of what *names* mean (no names: all that run) and the exit code."""
    found, code = [], 0
    if not names or names == ("all",):
        for name in session.paths.resources():
            status = session.status_or_none(name)
            if status is not None:
                found.append(status)
        return found, 0
    for target in session.targets(names):
        try:
            found.append(session.status(target.resource))
        except NotRunning as error:
            complain(f"{target.resource}: No such resource\n{error}")
            code = error.code
    return found, code


_COLORS: Final = {
    "Primary": 32, "Secondary": 36, "UpToDate": 32, "Connected": 32, "Established": 32, "Consistent": 33,
    "Outdated": 33, "Inconsistent": 31, "Diskless": 31, "Failed": 31, "DUnknown": 31, "Connecting": 33,
    "StandAlone": 31,
}  # fmt: skip


def colored(text: str) -> str:
    """*text* with the states in the terminal's colours."""

    def paint(match: re.Match[str]) -> str:
        word = match.group(2)
        return f"{match.group(1)}\x1b[{_COLORS[word]}m{word}\x1b[0m" if word in _COLORS else match.group(0)

    return re.sub(r"((?:role|disk|connection|replication|peer-disk):)(\w+)", paint, text)
