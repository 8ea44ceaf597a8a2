"""Commands on metadata: offline by their nature, or as what is left to do when no daemon has the disk.

The work is `meta`'s. Here is decided when it may be done: never while the daemon has the volume's disk
attached. `outdate` and `invalidate` ask the daemon first, as drbdadm does.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from tandem.repl.config import VolumeConfig
from tandem.repl.events import VolumeStatus

from .adm_live import FORCE, on_volumes
from .adm_session import NotRunning, Quit, Session, Target, complain, select_volumes
from .adm_verbs import Option, verb

if TYPE_CHECKING:
    from rich.progress import Progress

    from . import meta

EXIT_CONFIGURED: Final = 20  # drbdmeta's code for a minor that is in use

Work = Callable[["meta.Target", "meta.Console"], int]


def place_of_metadata(session: Session, resource: str, volume: VolumeConfig) -> meta.Target:
    """Where the metadata of *volume* lies; Quit when it has no disk on this node."""
    from . import meta

    if not volume.disk:
        raise Quit(EXIT_CONFIGURED, f"{resource}/{volume.number}: this node has no disk for the volume.")
    internal = volume.meta_disk.kind == "internal"
    known = session.paths.last_known(resource, volume.number)
    return meta.Target(
        path=volume.disk if internal else volume.meta_disk.path, kind=volume.meta_disk.kind,
        index=volume.meta_disk.index, data_path="" if internal else volume.disk, last_known=str(known),
    )  # fmt: skip


def _offline(
    session: Session, target: Target, work: Work, force: bool = False, configured: bool = True
) -> int:
    """Do *work* on the metadata of every volume that is meant; the largest exit code.

    With *configured* a volume whose disk the daemon has is refused.
    """
    from . import meta

    session.config(target.resource)
    status = session.status_or_none(target.resource) if configured else None
    attached = {v.number for v in status.volumes if v.disk != "Diskless"} if status else set()
    worst = 0
    for volume in session.volumes(target):
        if volume.number in attached:
            complain(f"Device '{volume.minor}' is configured!")
            complain(f"Detach it first: tandemadm detach {target.resource}/{volume.number}")
            worst = max(worst, EXIT_CONFIGURED)
            continue
        with progress_bars() as progress:
            console = meta.Console(force=force, progress=progress)
            worst = max(worst, work(place_of_metadata(session, target.resource, volume), console))
        sys.stdout.flush()
    return worst


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on a terminal, made when the first work takes longer than a second."""
    shown: list[Progress] = []

    def report(what: str, done: int, total: int) -> None:
        if not sys.stderr.isatty():
            return
        if not shown:
            from rich.console import Console
            from rich.progress import Progress

            shown.append(Progress(console=Console(stderr=True)))
            shown[0].start()
        bar = shown[0]
        task = next((t.id for t in bar.tasks if t.description == what), None)
        bar.update(bar.add_task(what) if task is None else task, completed=done, total=total)

    try:
        yield report
    finally:
        for bar in shown:
            bar.stop()


def _index(volume: VolumeConfig) -> str:
    kinds = {"internal": "internal", "flexible": "flex-external"}
    return kinds.get(volume.meta_disk.kind, str(volume.meta_disk.index))


def _dry(name: str) -> Callable[..., list[str]]:
    """What a dry run prints for a command of drbdmeta."""

    def lines(session: Session, target: Target, force: bool = False, **_: Any) -> list[str]:
        forced = " --force" if force else ""
        return [
            f"drbdmeta {v.minor} v08 {v.meta_disk.path or v.disk} {_index(v)} {name}{forced}"
            for v in session.volumes(target)
        ]

    return lines


# -------------------------------------------------------------------------------- drbdmeta commands


@verb(
    "create-md", "Write fresh metadata.", FORCE,
    Option("--peer-max-bio-size", "Largest request of the peer, in bytes.", "seconds", 0),
    Option("--al-stripes", "Stripes of the activity log.", "seconds", 1),
    Option("--al-stripe-size-kB", "Size of a stripe in KiB.", "seconds", 32),
    Option("--max-peers", "Accepted for compatibility.", "seconds"),
    scope="volume", dry=_dry("create-md"),
)  # fmt: skip
def create_md(
    session: Session, target: Target, force: bool, peer_max_bio_size: int, al_stripes: int,
    al_stripe_size_kb: int, max_peers: int | None,
) -> int:  # fmt: skip
    from . import meta

    def work(place: meta.Target, console: meta.Console) -> int:
        return meta.create_md(
            place, console, al_stripes=al_stripes, al_stripe_size_kb=al_stripe_size_kb,
            peer_max_bio_size=peer_max_bio_size, device_uuid=secrets.randbits(64) | 1,
        )  # fmt: skip

    return _offline(session, target, work, force)


@verb("wipe-md", "Destroy the metadata.", FORCE, scope="volume", dry=_dry("wipe-md"))
def wipe_md(session: Session, target: Target, force: bool) -> int:
    from . import meta

    return _offline(session, target, meta.wipe_md, force)


@verb("apply-al", "Apply the activity log after a crash.", FORCE, scope="volume", dry=_dry("apply-al"))
def apply_al(session: Session, target: Target, force: bool) -> int:
    from . import meta

    return _offline(session, target, meta.apply_al, force)


@verb("dump-md", "Print the metadata as text.", FORCE, scope="volume", dry=_dry("dump-md"))
def dump_md(session: Session, target: Target, force: bool) -> int:
    from . import meta

    return _offline(session, target, meta.dump_md, force)


@verb("restore-md", "Write metadata from the text in a file: RESOURCE[/VOLUME] FILE.", FORCE, scope="own")
def restore_md(session: Session, names: tuple[str, ...], force: bool) -> int:
    from . import meta

    if len(names) != 2:
        raise Quit(1, "restore-md needs one volume and one file: tandemadm restore-md RESOURCE[/VOLUME] FILE")
    (target,), path = session.targets(names[:1]), names[1]
    if len(session.volumes(target)) != 1:
        raise Quit(1, f"restore-md requires a specific volume id: tandemadm restore-md {target}/0 {path}")
    return _offline(session, target, lambda place, console: meta.restore_md(place, console, path), force)


@verb("set-gi", "Change the generation identifiers: RESOURCE[/VOLUME] GI.", FORCE, scope="own", hidden=True)
def set_gi(session: Session, names: tuple[str, ...], force: bool) -> int:
    from . import meta

    if len(names) != 2:
        raise Quit(1, "set-gi needs one volume and the identifiers: tandemadm set-gi RESOURCE[/VOLUME] GI")
    (target,), text = session.targets(names[:1]), names[1]
    return _offline(session, target, lambda place, console: meta.set_gi(place, console, text), force)


@verb("check-resize", "Look whether a detached disk has grown.", scope="volume", hidden=True)
def check_resize(session: Session, target: Target) -> int:
    from . import meta

    if session.is_up(target.resource):
        return 0  # What is attached is looked at by resize.
    return _offline(session, target, meta.check_resize)


# ----------------------------------------------------------------- the daemon first, then metadata


@verb("outdate", "Mark the data here as outdated.", scope="volume")
def outdate(session: Session, target: Target) -> int:
    from . import meta

    try:
        code = on_volumes(session, target, "outdate")
    except NotRunning:
        return _offline(session, target, meta.outdate)
    return code


@verb("invalidate", "Mark the data here as bad: they are copied from the peer.", scope="volume")
def invalidate(session: Session, target: Target) -> int:
    from . import meta

    try:
        status = session.status(target.resource)
    except NotRunning:
        return _offline(session, target, meta.invalidate)
    detached = [v.number for v in select_volumes(status, target) if v.disk == "Diskless"]
    if not detached:
        return on_volumes(session, target, "invalidate")
    return max(_offline(session, Target(target.resource, number), meta.invalidate) for number in detached)


# ------------------------------------------------------------------- questions without a daemon


def offline_dstate(session: Session, target: Target) -> int:
    from . import meta

    return _offline(session, target, meta.dstate, configured=False)


def offline_get_gi(session: Session, target: Target) -> int:
    from . import meta

    return _offline(session, target, meta.get_gi, configured=False)


def offline_show_gi(session: Session, target: Target) -> int:
    from . import meta

    return _offline(session, target, meta.show_gi, configured=False)


def explain_gi(volume: VolumeStatus) -> str:
    """What show-gi prints for an attached volume; its metadata are the daemon's."""
    from . import meta

    digits = volume.flags.split(":")[4:]
    primary, connected = digits[2] == "1", digits[3] == "1"
    sectors = volume.size // 512
    words = ("Primary" if primary else "Secondary", "Connected" if connected else "StandAlone", volume.disk)
    return (
        f"{meta.explain_gi(volume.flags)}\nflags: {', '.join(words)}\n"
        f"last agreed size: {sectors // 2} KB ({sectors} sectors)"
    )
