"""Commands of several steps: `up`, `adjust`, and the steps they are made of.

A resource comes up in drbdadm's order: its daemon starts (new-resource, new-minor), each volume's disk
is attached, the connection is made. Every step may be repeated without harm.
"""

from __future__ import annotations

from typing import Any, Final

from tandem.repl.config import ResourceConfig, VolumeConfig
from tandem.repl.errors import MetadataError, Refusal
from tandem.repl.events import ResourceStatus
from tandem.repl.metadata import NO_META_DISK_CODE, SHRINK_CODE

from .adm_session import DaemonError, NotRunning, Session, Target, complain, say, waiting
from .adm_verbs import Option, verb
from .client import Client, start_daemon
from .values import unpack

DISCARD = Option("--discard-my-data", "Give up local changes if that ends a split brain.")
TENTATIVE = Option("--tentative", "Only look what a handshake would decide.")


def open_daemon(session: Session, resource: str) -> Client:
    """A connection to the daemon of *resource*, which is started when it does not run."""
    try:
        return session.client(resource)
    except NotRunning:
        config = session.config(resource)
    with waiting(f"{resource}: starting the daemon") as tick:
        start_daemon(session.paths, config, tick)
    return session.client(resource)


def _dry_up(session: Session, target: Target, **_: Any) -> list[str]:
    from .conf import up_commands

    return list(up_commands(session.configuration, session.general.node, target.resource))


def _dry_step(*steps: str) -> Any:
    def lines(session: Session, target: Target, **_: Any) -> list[str]:
        minors = {str(volume.minor) for volume in session.volumes(target)}
        return [line for line in _dry_up(session, target) if _is_step(line, steps, minors)]

    return lines


def _is_step(line: str, steps: tuple[str, ...], minors: set[str]) -> bool:
    words = line.split()
    if words[0] == "drbdmeta":
        return words[-1] in steps and words[1] in minors
    per_volume = {"attach": 2, "new-minor": 3}.get(words[1])
    return words[1] in steps and (per_volume is None or words[per_volume] in minors)


# -------------------------------------------------------------------------------------------- steps


@verb("up", "Start the daemon, attach the disks and connect.", dry=_dry_up)
def up(session: Session, target: Target) -> int:
    session.check_address(session.config(target.resource))
    with session.locked(target.resource), open_daemon(session, target.resource) as client:
        status = client.status()
        attached = [volume for volume in status.volumes if volume.disk != "Diskless"]
        if attached:
            for volume in attached:
                complain(f"Device '{volume.minor}' is configured!")
            complain(f"{target} is up already. To apply a changed configuration: tandemadm adjust {target}")
            return 1
        if status.connection.cstate == "StandAlone":  # it may run with the file's text of an earlier attempt
            code = _reconfigure(session, client, target, session.config(target.resource))
            if code:
                return 1
        code = attach_all(session, client, target)
        if code:
            return 1
        return 1 if make_connection(session, client, target, {}) else 0


def attach_all(session: Session, client: Client, target: Target) -> int:
    """Attach every configured disk that *target* means; stops at the first refusal."""
    for volume in session.volumes(target):
        if volume.disk:
            one = Target(target.resource, volume.number)
            with waiting(f"{one}: attach") as tick:
                refusal = client.command("attach", volume.number, tick=tick)
            if refusal is not None:
                return session.refused(_shrunk(session, one, volume, refusal), one, str(volume.minor), "attach")
    return 0


def _shrunk(session: Session, target: Target, volume: VolumeConfig, refusal: Refusal) -> Refusal:
    """The refusal of a disk whose metadata are missing; another one when that is so because it shrank."""
    from tandem.repl.edge.storage import SENTENCES  # The edge is slow to import, and rarely needed.
    from tandem.repl.edge.store import FileStore

    from .adm_meta import place_of_metadata

    if refusal.code != NO_META_DISK_CODE:
        return refusal
    try:
        with FileStore(volume.disk, writable=False, lock=False) as store:
            size = store.size
    except MetadataError:
        return refusal
    sentence = place_of_metadata(session, target.resource, volume).shrunk_sentence(size)
    return Refusal(SHRINK_CODE, SENTENCES[SHRINK_CODE], sentence) if sentence else refusal


def make_connection(session: Session, client: Client, target: Target, args: dict[str, Any]) -> int:
    """Ask for the connection. That it is being made is enough; the peer may come hours later."""
    return session.run(client, Target(target.resource), "connect", args)


@verb("attach", "Take the local disk into use.", scope="volume", dry=_dry_step("apply-al", "attach"))
def attach(session: Session, target: Target) -> int:
    with session.locked(target.resource), open_daemon(session, target.resource) as client:
        attached = {v.number for v in client.status().volumes if v.disk != "Diskless"}
        for volume in session.volumes(target):
            if volume.number in attached:
                complain(f"Device '{volume.minor}' is configured!")
                complain(f"{target.resource}/{volume.number} has its disk; see: tandemadm dstate {target}")
                return 20
        return attach_all(session, client, target)


def _dry_connect(session: Session, target: Target, discard_my_data: bool, tentative: bool) -> list[str]:
    words = (" --discard-my-data" if discard_my_data else "") + (" --tentative" if tentative else "")
    return [line + words for line in _dry_step("connect")(session, target)]


@verb("connect", "Connect to the peer.", DISCARD, TENTATIVE, dry=_dry_connect)
def connect(session: Session, target: Target, discard_my_data: bool, tentative: bool) -> int:
    args = {"discard_my_data": discard_my_data, "tentative": tentative}
    session.check_address(session.config(target.resource))
    with session.locked(target.resource), open_daemon(session, target.resource) as client:
        return make_connection(session, client, target, args)


@verb("new-resource", "Start the daemon only.", hidden=True, dry=_dry_step("new-resource"))
def new_resource(session: Session, target: Target) -> int:
    with session.locked(target.resource):
        open_daemon(session, target.resource).close()
    return 0


@verb("new-minor", "Start the daemon only.", scope="volume", hidden=True, dry=_dry_step("new-minor"))
def new_minor(session: Session, target: Target) -> int:
    session.volumes(target)
    return new_resource(session, Target(target.resource))


# ------------------------------------------------------------------------------------------- adjust


def _dry_adjust(session: Session, target: Target, skip_disk: bool, skip_net: bool) -> list[str]:
    """The steps `adjust` would take; nothing when the daemon runs what the file says."""
    try:
        client = session.client(target.resource)
    except NotRunning:
        return _dry_up(session, target)
    with client:
        running = unpack(ResourceConfig, client.hello()["config"])
        status = client.status()
    wanted = session.config(target.resource)
    lines = [] if running.options == wanted.options else _dry_options(session, target, "new-resource")
    missing = _missing(wanted, status)
    for volume in [] if skip_disk else wanted.volumes:
        one = Target(target.resource, volume.number)
        before = running.volume(volume.number)
        moved = before is not None and (before.disk, before.meta_disk) != (volume.disk, volume.meta_disk)
        if moved and volume.number not in missing:
            lines.append(f"drbdsetup-84 detach {volume.minor}")
        if moved or volume.number in missing:
            lines += _dry_step("apply-al", "attach")(session, one)
        elif before is not None and before.disk_options != volume.disk_options:
            lines += _dry_options(session, one, "attach")
    if not skip_net and status.connection.cstate == "StandAlone":
        lines += _dry_step("connect")(session, target)
    elif not skip_net and (running.address, running.peer_address) != (wanted.address, wanted.peer_address):
        lines.append(f"drbdsetup-84 disconnect {running.address} {running.peer_address}")
        lines += _dry_step("connect")(session, target)
    elif not skip_net and running.net != wanted.net:
        lines += _dry_options(session, target, "connect")
    return lines


# The command that makes an object, the one that changes its options, and the words in front of them.
_OPTIONS: Final = {
    "new-resource": ("resource-options", slice(2, 3)),
    "attach": ("disk-options", slice(2, 3)),
    "connect": ("net-options", slice(3, 5)),
}


def _dry_options(session: Session, target: Target, step: str) -> list[str]:
    """The drbdsetup command that sets the options which *step* would set."""
    name, place = _OPTIONS[step]
    lines = []
    for line in _dry_step(step)(session, target):
        words = line.split(" ")
        options = line[line.find(" --") :] if " --" in line else ""
        lines.append(" ".join([words[0], name, *words[place], "--set-defaults"]) + options)
    return lines


def _missing(config: ResourceConfig, status: ResourceStatus) -> list[int]:
    """Numbers of the volumes that have a disk in the configuration and none in the daemon."""
    attached = {volume.number for volume in status.volumes if volume.disk != "Diskless"}
    return [volume.number for volume in config.volumes if volume.disk and volume.number not in attached]


@verb(
    "adjust", "Make the running resource what the configuration says.",
    Option("--skip-disk", "Leave the disks as they are."),
    Option("--skip-net", "Leave the connection as it is."),
    dry=_dry_adjust,
)  # fmt: skip
def adjust(session: Session, target: Target, skip_disk: bool, skip_net: bool) -> int:
    config = session.config(target.resource)
    session.check_address(config)
    with session.locked(target.resource), open_daemon(session, target.resource) as client:
        code = _reconfigure(session, client, target, config)
        if code:
            return code
        status = client.status()
        if not skip_disk:
            for number in _missing(config, status):
                code = attach_all(session, client, Target(target.resource, number))
                if code:
                    return code
        if not skip_net and status.connection.cstate == "StandAlone":
            return make_connection(session, client, target, {})
    return 0


def _reconfigure(session: Session, client: Client, target: Target, config: ResourceConfig) -> int:
    with waiting(f"{target}: adjust") as tick:
        refusal = client.reconfigure(config, tick)
    return 0 if refusal is None else session.refused(refusal, target)


@verb("adjust-with-progress", "As adjust, and say what is being done.", hidden=True)
def adjust_with_progress(session: Session, target: Target) -> int:
    say(f"adjust {target}")
    return adjust(session, target, skip_disk=False, skip_net=False)


def _apply_options(session: Session, target: Target) -> int:
    """Options of the file for a running resource; the whole file is applied, as one value."""
    with session.locked(target.resource), session.client(target.resource) as client:
        return _reconfigure(session, client, target, session.config(target.resource))


for _name in ("disk-options", "net-options", "resource-options", "peer-device-options"):
    verb(_name, "Apply changed options of the file.", scope="volume", hidden=True)(_apply_options)


__all__ = ["DaemonError", "adjust", "attach_all", "open_daemon", "up"]
