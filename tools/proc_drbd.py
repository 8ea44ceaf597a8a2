"""/proc/drbd as DRBD 8.4 prints it, for programs that read that file: the text, and a place to run them.

No process can add a file to procfs. `tandemadm proc-drbd` prints the text; `tandem-with-proc-drbd COMMAND` runs a
program in a mount namespace of its own where /proc has that file, beside everything that it had. Needs root.
Source: drbd_proc.c, drbd_seq_show.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from tandem.repl.events import PeerVolumeStatus, ResourceStatus, VolumeStatus

from .adm_session import General, Session, complain, say
from .adm_verbs import verb
from .status import cstate_line, dstate_line, is_configured, kib, peer_volume, role_line

PROGRAM: Final = "tandem-with-proc-drbd"
VERSION: Final = "version: 8.4.11 (api:1/proto:86-101)"
WRITE_ORDERING: Final = {"none": "n", "drain": "d", "flush": "f"}
MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1 << 12, 1 << 13, 1 << 14, 1 << 18  # mount(2)


def proc_drbd(resources: Iterable[ResourceStatus]) -> str:
    """The text of the file. The protocol letter is not part of a status and is left out, as for StandAlone."""
    found = {volume.minor: (resource, volume) for resource in resources for volume in resource.volumes}
    lines = [VERSION, "srcversion: TANDEM "]
    previous = -1
    for minor in sorted(found):
        if minor != previous + 1:
            lines.append("")
        lines += _device(minor, *found[minor])
        previous = minor
    return "\n".join(lines) + "\n"


def _device(minor: int, resource: ResourceStatus, volume: VolumeStatus) -> list[str]:
    if not is_configured(resource, volume):
        return [f"{minor:2d}: cs:Unconfigured"]
    peer = peer_volume(resource, volume.number)
    states = f"cs:{cstate_line(resource, volume)} ro:{role_line(resource, volume)} ds:{dstate_line(resource, volume)}"
    lines = [f"{minor:2d}: {states}   {_flags(resource, volume, peer)}"]
    counts = {
        "ns": kib(peer.sent) if peer else 0, "nr": kib(peer.received) if peer else 0, "dw": kib(volume.written),
        "dr": kib(volume.read), "al": volume.al_writes, "bm": volume.bm_writes, "lo": volume.lower_pending,
        "pe": peer.pending if peer else 0, "ua": peer.unacked if peer else 0, "ap": volume.upper_pending, "ep": 1,
        "wo": WRITE_ORDERING[resource.write_ordering], "oos": kib(peer.out_of_sync) if peer else 0,
    }  # fmt: skip
    return [*lines, "    " + " ".join(f"{name}:{value}" for name, value in counts.items())]


def _flags(resource: ResourceStatus, volume: VolumeStatus, peer: PeerVolumeStatus | None) -> str:
    paused = peer.resync_suspended.split(",") if peer else []
    return "".join((
        "s" if resource.suspended != "no" else "r", "a" if "dependency" in paused else "-",
        "p" if "peer" in paused else "-", "u" if "user" in paused else "-", "-",
        "s" if volume.al_suspended else "-",
    ))  # fmt: skip


def running(session: Session) -> list[ResourceStatus]:
    """The status of every resource of this node that runs."""
    found = (session.status_or_none(name) for name in session.paths.resources())
    return [status for status in found if status is not None]


@verb("proc-drbd", "Print the state in the form of DRBD 8.4's /proc/drbd.", scope="global")
def print_proc_drbd(session: Session) -> int:
    say(proc_drbd(running(session)).rstrip("\n"))
    return 0


# ------------------------------------------------------------------------------------ a /proc with it


def _mount(source: str, target: Path, kind: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), os.fsencode(target), kind.encode(), flags, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def enter_proc(text: str) -> None:
    """Give this process, and what it starts, a /proc that has the file ``drbd``; OSError if that cannot be.

    It is a directory of links into the real one, so processes that are started later have only ``/proc/self``.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000):  # CLONE_NEWNS
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    _mount("none", Path("/"), "", MS_REC | MS_PRIVATE)
    place = Path(tempfile.mkdtemp(prefix="tandem-proc-", dir="/run"))
    try:
        _mount("proc-drbd", place, "tmpfs", 0)
        real = place / ".proc"
        real.mkdir()
        _mount("/proc", real, "", MS_BIND | MS_REC)
        for name in os.listdir("/proc"):
            (place / name).symlink_to(f".proc/{name}")
        (place / "drbd").unlink(missing_ok=True)  # the kernel's own, if it has one
        (place / "drbd").write_text(text)
        _mount(str(place), Path("/proc"), "", MS_MOVE)
    finally:
        place.rmdir()


def main() -> None:
    """Entry point of ``tandem-with-proc-drbd``."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        complain(f"Usage: {PROGRAM} COMMAND [ARGUMENTS]\n\nRun COMMAND where /proc/drbd shows this node's resources.")
        sys.exit(0 if words else 2)
    try:
        enter_proc(proc_drbd(running(Session(General()))))
        os.execvp(words[0], words)
    except OSError as error:
        complain(f"{PROGRAM}: {error.filename or words[0]}: {error.strerror}")
        sys.exit(126)
