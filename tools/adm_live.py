"""Commands that change the state of a running resource, one step each.

Every one of them is carried out by the daemon and answered with a refusal or done. What takes several
steps (`up`, `adjust` …) is in `adm_up`.
"""

from __future__ import annotations

from typing import Any

from .adm_session import NotRunning, Session, Target, select_volumes
from .adm_verbs import Option, verb
from .client import wait_ended

DOWN_S = 15.0  # the daemon closes its disks and sockets within that time, or something is wrong

FORCE = Option("--force", "Do it although data may be lost.")


def on_resource(session: Session, target: Target, name: str, args: dict[str, Any]) -> int:
    """One command for the whole resource."""
    with session.client(target.resource) as client:
        return session.run(client, Target(target.resource), name, args)


def on_role(session: Session, target: Target, name: str, args: dict[str, Any]) -> int:
    """A command on the role: it belongs to the resource, and is reported with the first minor."""
    with session.client(target.resource) as client:
        volumes = select_volumes(client.status(), target)
        obj = str(volumes[0].minor) if volumes else target.resource
        return session.run(client, Target(target.resource), name, args, obj)


def on_volumes(session: Session, target: Target, name: str, args: dict[str, Any] | None = None) -> int:
    """A command for each volume that is meant; the largest exit code."""
    worst = 0
    with session.client(target.resource) as client:
        for volume in select_volumes(client.status(), target):
            one = Target(target.resource, volume.number)
            worst = max(worst, session.run(client, one, name, args, str(volume.minor)))
    return worst


@verb("primary", "Promote: make the data writable here.", FORCE, scope="volume")
def primary(session: Session, target: Target, force: bool) -> int:
    return on_role(session, target, "primary", {"force": force})


@verb("secondary", "Demote.", Option("--force", "Disconnect its clients first."), scope="volume", absent=0)
def secondary(session: Session, target: Target, force: bool) -> int:
    return on_role(session, target, "secondary", {"force": force})


@verb(
    "detach", "Release the local disk.", Option("--force", "Even if I/O to it hangs."),
    Option("--diskless", "Accepted for compatibility."), scope="volume", absent=0,
)  # fmt: skip
def detach(session: Session, target: Target, force: bool, diskless: bool) -> int:
    return on_volumes(session, target, "detach", {"force": force})


@verb("disconnect", "End the connection: StandAlone.", Option("--force", "Do not ask the peer."), absent=0)
def disconnect(session: Session, target: Target, force: bool) -> int:
    with session.client(target.resource) as client:
        stand_alone = client.status().connection.cstate == "StandAlone"
        return session.run(client, target, "disconnect", {"force": force}, "??" if stand_alone else "")


@verb("down", "Demote, disconnect, detach, and end the daemon.", absent=0)
def down(session: Session, target: Target) -> int:
    with session.locked(target.resource):
        return take_down(session, target)


def take_down(session: Session, target: Target) -> int:
    """`down` of a resource whose lock is held."""
    from .adm_session import complain, waiting

    try:
        client = session.client(target.resource)
    except NotRunning:
        return 0
    with client:
        code = session.run(client, target, "down")
        if code:
            return code
    with waiting(f"{target}: waiting for the daemon to end") as tick:
        ended = wait_ended(session.paths, target.resource, DOWN_S, tick)
    if not ended:
        complain(
            f"{target}: the daemon has not ended after {DOWN_S:.0f} seconds; "
            f"see {session.paths.log(target.resource)}"
        )
        return 20
    return 0


@verb("invalidate-remote", "Copy everything to the peer again.", scope="volume")
def invalidate_remote(session: Session, target: Target) -> int:
    return on_volumes(session, target, "invalidate-remote")


@verb("pause-sync", "Pause the resync.", scope="volume")
def pause_sync(session: Session, target: Target) -> int:
    return on_volumes(session, target, "pause-sync")


@verb("resume-sync", "Resume a paused resync.", scope="volume")
def resume_sync(session: Session, target: Target) -> int:
    return on_volumes(session, target, "resume-sync")


@verb("suspend-io", "Hold back all I/O of the clients.", scope="volume")
def suspend_io(session: Session, target: Target) -> int:
    return on_role(session, target, "suspend-io", {})


@verb("resume-io", "Let the clients' I/O go on.", scope="volume")
def resume_io(session: Session, target: Target) -> int:
    return on_role(session, target, "resume-io", {})


@verb(
    "new-current-uuid", "Start a new data generation.",
    Option("--clear-bitmap", "Skip the initial resync of two fresh disks."), scope="volume",
)  # fmt: skip
def new_current_uuid(session: Session, target: Target, clear_bitmap: bool) -> int:
    return on_volumes(session, target, "new-current-uuid", {"clear_bitmap": clear_bitmap})


@verb(
    "resize", "Use the whole size that both disks have now.",
    Option("--size", "Size to use.", "number"),
    Option("--assume-peer-has-space", "Do not ask the peer."),
    Option("--assume-clean", "The new space need not be synchronized."),
    scope="volume",
)  # fmt: skip
def resize(
    session: Session, target: Target, size: int | None, assume_peer_has_space: bool, assume_clean: bool
) -> int:
    args: dict[str, Any] = {"assume_peer_has_space": assume_peer_has_space, "assume_clean": assume_clean}
    worst = 0
    for volume in session.volumes(target):  # without --size, what the configuration says now
        args["size"] = volume.disk_options.size if size is None else size
        worst = max(worst, on_volumes(session, Target(target.resource, volume.number), "resize", dict(args)))
    return worst


@verb(
    "verify", "Compare both disks while they are in use.", Option("--start", "First sector.", "number"),
    Option("--stop", "Sector to stop at.", "number"), scope="volume",
)  # fmt: skip
def verify(session: Session, target: Target, start: int | None, stop: int | None) -> int:
    args = {name: value for name, value in (("start", start), ("stop", stop)) if value is not None}
    return on_volumes(session, target, "verify", args)
