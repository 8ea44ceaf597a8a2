"""`drbdadm` and `drbdsetup` as names of `tandemadm`, for scripts and agents that were written for DRBD.

`tandemadm drbd-names DIRECTORY` puts both names into a directory, which is then put in front of PATH; nothing
is installed under these names otherwise. As ``drbdadm`` the commands are what they are; what ``drbdsetup`` calls
differently (minor numbers, addresses, node ids) is translated here. Source: drbdsetup(8) of 8.4 and 9.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Final

from .adm_session import Quit, Session, Target, complain, say
from .adm_verbs import verb
from .status import sh_status

NAMES: Final = ("drbdadm", "drbdsetup")
PER_MINOR: Final = frozenset((  # the first argument is a minor number or its device
    "primary", "secondary", "attach", "disk-options", "detach", "resize", "new-current-uuid", "invalidate",
    "invalidate-remote", "pause-sync", "resume-sync", "suspend-io", "resume-io", "outdate", "verify", "role", "cstate",
    "dstate", "show-gi", "get-gi", "check-resize", "wait-connect", "wait-sync",
))  # fmt: skip
PER_RESOURCE: Final = frozenset((  # the resource comes first; what follows names one connection or path of it
    "connect", "disconnect", "net-options", "down", "new-resource", "resource-options", "peer-device-options",
    "wait-connect-resource", "wait-connect-connection", "wait-connect-volume", "wait-sync-resource",
    "wait-sync-connection", "wait-sync-volume",
))  # fmt: skip
UNCHANGED: Final = frozenset(("status", "events2"))
TAKES_VALUE: Final = ("-c", "--config-file", "--node", "--run-dir")


def called_as() -> str:
    """The name under which this program was started: one of DRBD's, or its own."""
    name = os.path.basename(sys.argv[0])
    return name if name in NAMES else "tandemadm"


def from_drbdsetup(argv: list[str]) -> list[str]:
    """The words of `tandemadm` that do what *argv* does as a command line of drbdsetup; Quit when none do."""
    at = _command_index(argv)
    if at is None:
        return argv
    before, command = argv[:at], argv[at]
    names = [word for word in argv[at + 1 :] if not word.startswith("-")]
    options = [word for word in argv[at + 1 :] if word.startswith("-")]
    if command in UNCHANGED:
        return argv
    if command == "sh-status":
        return [*before, "setup-sh-status", *options, *(map(_per_minor, names) if names else ["all"])]
    if command == "new-minor" and names:
        return [*before, command, names[0]]
    if command in PER_MINOR and names:
        return [*before, command, *options, _per_minor(names[0])]
    if command in PER_RESOURCE and names:
        return [*before, command, *options, _whose(names)]
    raise Quit(1, f"drbdsetup: '{' '.join(argv[at:])}' has no counterpart; tandemadm reads the configuration")


def _command_index(argv: list[str]) -> int | None:
    skip = False
    for index, word in enumerate(argv):
        if skip:
            skip = False
        elif word.startswith("-"):
            skip = word in TAKES_VALUE
        else:
            return index
    return None


def _per_minor(name: str) -> str:
    return f"minor-{name}" if name.isdigit() else name


def _whose(names: list[str]) -> str:
    """The resource of a connection; 8.4 names one by its two addresses, and an address is no resource."""
    if re.match(r"(ipv4|ipv6|ssocks|sdp):", names[0]):
        raise Quit(1, f"drbdsetup: a connection is named by its resource, not by the address {names[0]}")
    return names[0]


@verb("setup-sh-status", "As drbdsetup's sh-status: without the configuration's part.", scope="volume", hidden=True)
def setup_sh_status(session: Session, target: Target) -> int:
    config = session.config(target.resource)
    status = session.status_or_none(target.resource)
    running = {volume.number: volume for volume in status.volumes} if status else {}
    for volume in session.volumes(target):
        found = running.get(volume.number)
        say(sh_status(config.name, volume.minor, status if found else None, found).removesuffix("\n"))
    return 0


@verb("drbd-names", "Put the names drbdadm and drbdsetup into a directory: DIRECTORY.", scope="own", hidden=True)
def drbd_names(session: Session, names: tuple[str, ...]) -> int:
    if len(names) != 1:
        raise Quit(1, "drbd-names needs one directory, for example /usr/local/lib/tandem/drbd")
    program = Path(sys.executable).with_name("tandemadm")
    directory = Path(names[0]).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        link = directory / name
        if link.is_symlink() and link.readlink() == program:
            continue
        if link.exists() or link.is_symlink():
            raise Quit(1, f"{link} is there already and is not ours; choose another directory")
        link.symlink_to(program)
    complain(f"Put {directory} in front of PATH, for tandemd's handlers too.")
    return 0
