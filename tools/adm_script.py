"""Commands for scripts: `sh-…`, `dump`, `dump-xml`, versions, and handlers called by hand.

Each prints only what DRBD 8.4's drbdadm prints on stdout. They work on the configuration and need no
daemon, except `sh-status` and `sh-b-pri`.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Final

from tandem.repl.config import VolumeConfig

from .adm_live import on_role
from .adm_session import Quit, Session, Target, complain, say
from .adm_verbs import VERBS, verb
from .conf_options import HANDLER_NAMES
from .status import sh_status

UTILS_VERSION: Final = (9, 22, 0)  # the drbd-utils whose commands and outputs these are
KERNEL_VERSION_CODE: Final = 0x08040B  # DRBD 8.4.11, whose protocol and states we speak


def version_text() -> str:
    """``drbdadm --version``: assignments for a shell."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        ours = version("tandem")
    except PackageNotFoundError:
        ours = "unknown"
    major, minor, patch = UTILS_VERSION
    return "\n".join(
        (
            f"DRBDADM_BUILDTAG=tandem\\ {ours}\\ python\\ {platform.python_version()}",
            "DRBDADM_API_VERSION=1",
            f"DRBD_KERNEL_VERSION_CODE=0x{KERNEL_VERSION_CODE:06x}",
            f"DRBDADM_VERSION_CODE=0x{major << 16 | minor << 8 | patch:06x}",
            f"DRBDADM_VERSION={major}.{minor}.{patch}",
            f"TANDEM_VERSION={ours}",
        )
    )


# ---------------------------------------------------------------------------------- per volume lines


def _per_volume(show: Callable[[VolumeConfig], str], session: Session, target: Target) -> int:
    for volume in session.volumes(target):
        say(show(volume))
    return 0


def _meta_device(volume: VolumeConfig) -> str:
    return volume.meta_disk.path or volume.disk


def _meta_index(volume: VolumeConfig) -> str:
    kinds = {"internal": "internal", "flexible": "flex-external"}
    return kinds.get(volume.meta_disk.kind, str(volume.meta_disk.index))


_SHOWN: Final[dict[str, tuple[str, Callable[[VolumeConfig], str]]]] = {
    "sh-dev": ("Print the devices.", lambda volume: volume.device),
    "sh-minor": ("Print the minor numbers.", lambda volume: str(volume.minor)),
    "sh-ll-dev": ("Print the backing devices.", lambda volume: volume.disk or "none"),
    "sh-md-dev": ("Print the metadata devices.", _meta_device),
    "sh-md-idx": ("Print the metadata indexes.", _meta_index),
}

for _name, (_help, _show) in _SHOWN.items():
    verb(_name, _help, scope="volume")(partial(_per_volume, _show))


@verb("sh-resources", "Print all resource names.", scope="global")
def sh_resources(session: Session) -> int:
    say(" ".join(session.resources))
    return 0


@verb("sh-resource", "Print the resource name, once per volume.", scope="volume")
def sh_resource(session: Session, target: Target) -> int:
    return _per_volume(lambda _: target.resource, session, target)


@verb("sh-ip", "Print the own address, once per volume.", scope="volume")
def sh_ip(session: Session, target: Target) -> int:
    address = session.config(target.resource).address.host
    return _per_volume(lambda _: address, session, target)


@verb("sh-lr-of", "Print the lower resource (stacked resources only).", hidden=True)
def sh_lr_of(session: Session, target: Target) -> int:
    raise Quit(1, "sh-lower-resource only available in stacked mode")


@verb("sh-udev", "Print what udev's rule needs.", scope="volume")
def sh_udev(session: Session, target: Target) -> int:
    config = session.config(target.resource)
    for volume in session.volumes(target):
        name = config.name if config.implicit_volume else f"{config.name}/{volume.number}"
        say(f"RESOURCE={name}")
        say(f"DEVICE=drbd{volume.minor}")
        say(f"DISK={volume.disk.removeprefix('/dev/')}")
    return 0


@verb("sh-mod-parms", "Print module parameters.", scope="global")
def sh_mod_parms(session: Session) -> int:
    say(f"minor_count={session.configuration.global_options.minor_count}")
    return 0


@verb("sh-nop", "Only check the configuration.", scope="global")
def sh_nop(session: Session) -> int:
    _ = session.resources
    return 0


@verb("sh-b-pri", "Promote where become-primary-on says so.", scope="volume", hidden=True)
def sh_b_pri(session: Session, target: Target) -> int:
    nodes = session.config(target.resource).startup.become_primary_on
    if session.general.node in nodes or "both" in nodes:
        return on_role(session, target, "primary", {})
    return 0


@verb("sh-status", "Print the state as shell assignments.", scope="own")
def sh_status_command(session: Session, names: tuple[str, ...]) -> int:
    targets = session.targets(names or ("all",))
    say(
        f"_drbd_version={'.'.join(map(str, UTILS_VERSION))}\n_drbd_api=1\n"
        f"_config_file={session.general.config_file}\n\n"
    )
    for target in targets:
        config = session.config(target.resource)
        status = session.status_or_none(target.resource)
        running = {volume.number: volume for volume in status.volumes} if status else {}
        say(
            f"_conf_res_name={config.name}\n_conf_file_line={config.file}:{config.line}\n\n"
            "_stacked_on=\n_stacked_on_device=\n_stacked_on_minor="
        )
        for volume in session.volumes(target):
            say(f"_conf_volume={volume.number}")
            found = running.get(volume.number)
            say(sh_status(config.name, volume.minor, status if found else None, found).removesuffix("\n"))
    return 0


@verb("hidden-commands", "List the commands that --help does not.", scope="global", hidden=True)
def hidden_commands(session: Session) -> int:
    say("These commands are for scripts, and for those who know what they do:\n")
    for name, entry in VERBS.items():
        if entry.hidden:
            say(f" {name:<24} {entry.help}")
    return 0


# --------------------------------------------------------------------------------------------- dump


@verb("dump", "Print the configuration in its canonical form.", scope="own")
def dump(session: Session, names: tuple[str, ...]) -> int:
    from .conf import dump as dump_text

    merged = session.general.dry_run or session.general.verbose
    wanted = _named(session, names)
    say(dump_text(session.configuration, session.general.node, wanted, merged=merged).rstrip("\n"))
    return 0


@verb("dump-xml", "Print the configuration as XML.", scope="own")
def dump_xml(session: Session, names: tuple[str, ...]) -> int:
    from .conf import dump_xml as dump_text

    say(dump_text(session.configuration, _named(session, names)).rstrip("\n"))
    return 0


def _named(session: Session, names: tuple[str, ...]) -> list[str] | None:
    """Resource names to dump, None for all."""
    if not names or "all" in names:
        _ = session.resources
        return None
    return [target.resource for target in session.targets(names)]


# ----------------------------------------------------------------------------------------- handlers


def call_handler(name: str, session: Session, target: Target) -> int:
    """Run a handler as the daemon would; its exit code, 0 when none is configured."""
    from tandem.repl.edge.handlers import OLD_NAMES, environment

    config = session.config(target.resource)
    command = config.handlers.get(name) or config.handlers.get(OLD_NAMES.get(name, ""))
    if not command:
        return 0
    volume = target.volume
    if volume is None and name not in ("fence-peer", "unfence-peer"):
        volume = config.volumes[0].number
    env = environment(config, name, volume, session.status_or_none(target.resource))
    try:
        return subprocess.run(["/bin/sh", "-c", command], env=env, check=False).returncode
    except OSError as error:
        complain(f"{target}: cannot run the handler {name}: {error.strerror}")
        return 20


for _name in HANDLER_NAMES:
    if _name != "split-brain":  # this name is also a command of ours, which asks how we were called
        verb(_name, "Run this handler.", scope="volume", hidden=True)(partial(call_handler, _name))
