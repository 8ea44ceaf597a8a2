"""`nbd attach`, `nbd detach`, `nbd list`: a replicated volume as a block device of this host.

The device is the kernel's nbd driver; a process, the keeper, stays beside it and follows the resource from
node to node. These commands find out where the nodes offer the volume, start and end keepers, and show
them. The host need not be one of the two nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from tandem.repl.config import ResourceConfig, VolumeConfig

from . import nbd_device
from .adm_session import DaemonError, Quit, Session, complain, say, waiting
from .adm_verbs import Option, verb
from .client import await_ready
from .nbd_device import Attachment, NbdError, Place
from .nbd_keeper import LEAVE_IT, load_state, run
from .process import holder
from .values import pack

if TYPE_CHECKING:
    from .conf_model import Host, Resource

CONNECTIONS: Final = 2
TIMEOUT_S: Final = 15  # a request that waits for a vanished peer is answered after some ten seconds
DEAD_TIMEOUT_S: Final = 1_000_000  # eleven days; more ticks than that do not fit a kernel of 32 bits
CONNECTIONS_MAX: Final = 64
TIMEOUT_MAX_S: Final = 86_400
END_S: Final = 20.0  # a keeper that asks two silent nodes looks up after four seconds
ANY_ADDRESS: Final = ("0.0.0.0", "::")


@verb(
    "nbd attach", "Show a volume as /dev/nbdN and follow its Primary.",
    Option("--connections", f"Connections to the Primary ({CONNECTIONS}).", "count", most=CONNECTIONS_MAX),
    Option("--timeout", f"Seconds after which a request is sent again ({TIMEOUT_S}).", "count", most=TIMEOUT_MAX_S),
    Option(
        "--dead-timeout", f"Seconds without a Primary after which requests fail ({DEAD_TIMEOUT_S}).", "count",
        most=DEAD_TIMEOUT_S,
    ),
    Option("--foreground", "Stay, and log to stderr."),
    scope="own", names="RESOURCE[/VOLUME] /dev/nbdN",
)  # fmt: skip
def attach(
    session: Session, names: tuple[str, ...], connections: int | None, timeout: int | None, dead_timeout: int | None,
    foreground: bool,
) -> int:  # fmt: skip
    if len(names) != 2:
        raise Quit(1, "Say what to attach, and where: tandemadm nbd attach RESOURCE[/VOLUME] /dev/nbdN")
    if nbd_device.is_device(names[0]) and not nbd_device.is_device(names[1]):
        raise Quit(1, f"Say first what to attach, then where: tandemadm nbd attach {names[1]} {names[0]}")
    with _sentences():
        index = nbd_device.device_index(names[1])
        name, places = find_places(session, names[0])
        attachment = Attachment(
            name, f"/dev/nbd{index}", tuple(places), connections or CONNECTIONS, timeout or TIMEOUT_S,
            dead_timeout or DEAD_TIMEOUT_S,
        )  # fmt: skip
        if session.general.dry_run:
            say(f"{name} would be {attachment.device}, served by {' or '.join(map(_where, places))}")
            return 0
        nbd_device.open_driver().close()
        is_kept = _is_kept(session, attachment)
        check_same(session, attachment, is_kept, connections, timeout, dead_timeout)
        if is_kept:
            say(f"{name} is {attachment.device} already")
            return 0
        if foreground:
            return run(attachment, session.paths)
        _start(session, attachment)
    say(f"{name} is {attachment.device}, also called {nbd_device.link_of(name)}")
    return 0


@verb(
    "nbd detach", "Take /dev/nbdN away.", Option("--force", "Even if it is in use: its users get errors."),
    scope="own", names="{/dev/nbdN|RESOURCE[/VOLUME]}",
)  # fmt: skip
def detach(session: Session, names: tuple[str, ...], force: bool) -> int:
    if len(names) != 1:
        raise Quit(1, "Say what to detach: tandemadm nbd detach {/dev/nbdN|RESOURCE[/VOLUME]}")
    with _sentences():
        index = _attached_index(names[0])
        device, name = f"/dev/nbd{index}", nbd_device.attached_name(index)
        if session.general.dry_run:
            say(f"{device} would no longer be {name}")
            return 0
        with contextlib.ExitStack() as held:
            netlink = held.enter_context(contextlib.closing(nbd_device.open_driver()))
            if not force:
                held.enter_context(nbd_device.exclusively(device))
            _end_keeper(session, device)
            nbd_device.release(netlink, name, index)
        session.paths.nbd_device(device, "state").unlink(missing_ok=True)
    return 0


@verb("nbd list", "Show what is attached, and where it comes from.", scope="own", names="")
def list_(session: Session, names: tuple[str, ...]) -> int:
    if names:
        raise Quit(1, "nbd list takes no names")
    for index in nbd_device.attached():
        say(_line(session, index))
    return 0


def _line(session: Session, index: int) -> str:
    device, name = f"/dev/nbd{index}", nbd_device.attached_name(index)
    if holder(session.paths.nbd_device(device, "pid")) is None:
        return f"{device} {name} without a keeper; to keep it: tandemadm nbd attach {name} {device}"
    state = load_state(session.paths.nbd_device(device, "state"))
    if state is None:
        return f"{device} {name} with a keeper that has just begun"
    text = f"{device} {name} state:{state.state} connections:{state.n_live}/{state.attachment.n_connections}"
    if state.server:
        text += f" server:{state.server} address:{state.address}"
    return f"{text} ({state.why})" if state.why else text


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Errors of devices become the end of the command."""
    try:
        yield
    except NbdError as error:
        raise Quit(error.code, f"{error}.") from error
    except DaemonError as error:
        raise Quit(error.code, f"{error}.") from error


# ------------------------------------------------------------------------------------------ places


def find_places(session: Session, target: str) -> tuple[str, list[Place]]:
    """The volume's name as udev has it, and where the nodes offer it, this node first. Quit when nowhere."""
    from .conf_resolve import my_host  # The grammar library is slow to import.

    resource, _, number = target.partition("/")
    written = session.configuration.resources.get(resource)
    if written is None or not (number.isdigit() or target == resource):
        raise Quit(1, f"'{target}' not defined in your config.")
    here = my_host(written, session.general.node)
    places, name = [], ""
    for host in sorted(_nodes(written), key=lambda host: host is not here):
        config = session.configuration.for_node(host.name)[resource]
        volume = config.volume(int(number)) if number else config.volumes[0]
        if volume is None or (not number and len(config.volumes) > 1):
            known = ", ".join(f"{resource}/{v.number}" for v in config.volumes)
            raise Quit(1, f"'{target}' is not one volume; name one of: {known}")
        name = resource if config.implicit_volume else f"{resource}/{volume.number}"
        place = _place(session, config, volume, host.name, host is here)
        if place is not None:
            places.append(place)
    if not places:
        raise Quit(10, f"{target}: no node offers it where this host can reach it; {_ADVICE.format(resource)}")
    if len(places) == 1:
        complain(f"{target}: only {places[0].node} offers it where this host can reach it, so it is not "
                 f"followed to another node; {_ADVICE.format(resource)}")  # fmt: skip
    return name, places


def _where(place: Place) -> str:
    return f"{place.node} ({place})"


_ADVICE: Final = "give the 'device' of each node an address, such as nbd://10.0.0.1:10809/{}"


def _nodes(resource: Resource) -> list[Host]:
    return [host for host in resource.hosts if host.kind != "stacked"]


def _place(session: Session, config: ResourceConfig, volume: VolumeConfig, node: str, local: bool) -> Place | None:
    """Where *node* offers the volume, None when that cannot be reached from here."""
    from .exports import place_of

    found = place_of(config, volume, session.paths.nbd(config.name))
    if found.path:
        return Place(node, found.export, path=found.path) if local else None
    host = found.host
    if host in ANY_ADDRESS and not local:
        host = config.address.host
    return Place(node, found.export, host=host, port=found.port)


# ---------------------------------------------------------------------------------------- keepers


def _is_kept(session: Session, attachment: Attachment) -> bool:
    """Does a keeper show this very volume on this device already?"""
    kept = holder(session.paths.nbd_device(attachment.device, "pid")) is not None
    return kept and nbd_device.attached_name(attachment.index) == attachment.name


def check_same(
    session: Session, attachment: Attachment, is_kept: bool, connections: int | None, timeout: int | None,
    dead_timeout: int | None,
) -> None:  # fmt: skip
    """NbdError when options are given that an attached device has otherwise. A new keeper can change its timeouts."""
    state = load_state(session.paths.nbd_device(attachment.device, "state"))
    if state is None or nbd_device.attached_name(attachment.index) != attachment.name:
        return
    has, device = state.attachment, attachment.device
    checked = [("connections", connections, has.n_connections)]
    if is_kept:
        checked += [("timeout", timeout, has.timeout_s), ("dead-timeout", dead_timeout, has.dead_timeout_s)]
    for option, given, present in checked:
        if given is not None and given != present:
            raise NbdError(
                f"{device} is attached already, with --{option} {present}; to change that, "
                f"begin with: tandemadm nbd detach {device}"
            )


def _start(session: Session, attachment: Attachment) -> None:
    """Start a keeper in the background and wait until the device is there. DaemonError says why not."""
    log = session.paths.nbd_device(attachment.device, "log")
    session.paths.make()
    log.parent.mkdir(exist_ok=True)
    ready_r, ready_w = os.pipe()
    with open(log, "ab") as log_file:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "tandem.tools.nbd_keeper", os.fspath(session.paths.run_dir),
                session.paths.node, str(ready_w),
            ],
            stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, pass_fds=(ready_w,), start_new_session=True,
            cwd="/",
        )  # fmt: skip
    os.close(ready_w)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(pack(attachment)).encode())
    try:
        with waiting(f"{attachment.name}: attaching") as tick:
            await_ready(ready_r, attachment.name, log, tick)
    finally:
        os.close(ready_r)


def _attached_index(target: str) -> int:
    """The device that *target* means: a device, or the volume it shows. NbdError when there is none."""
    if nbd_device.is_device(target):
        index = nbd_device.device_index(target)
        if nbd_device.attached_name(index):
            return index
        raise NbdError(f"{target} was not attached with 'tandemadm nbd attach'; see: tandemadm nbd list")
    names = {index: nbd_device.attached_name(index) for index in nbd_device.attached()}
    found = [index for index, name in names.items() if name == target] or [
        index for index, name in names.items() if target in (name.partition("/")[0], f"{name}/0")
    ]
    if len(found) == 1:
        return found[0]
    devices = " and ".join(f"/dev/nbd{index}" for index in found)
    raise NbdError(f"{target} is {devices}; name the device" if found else f"{target} is not attached; "
                   "see: tandemadm nbd list", 1)  # fmt: skip


def _end_keeper(session: Session, device: str) -> None:
    """Tell the keeper to end without a word to the device, and wait for it."""
    pid_file = session.paths.nbd_device(device, "pid")
    pid = holder(pid_file)
    if pid is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, LEAVE_IT)
    deadline = time.monotonic() + END_S
    while holder(pid_file) is not None:
        if time.monotonic() > deadline:
            raise NbdError(f"the keeper of {device} (pid {pid}) does not end; kill it and try again")
        time.sleep(0.02)
