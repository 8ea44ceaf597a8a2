"""What every `tandemadm` command works with: options, names, the configuration, daemons, the terminal.

A command is a function on a `Session` and a `Target`; it returns drbdadm's exit code or raises `Quit`
with the sentence to print. Names are resolved as drbdadm does. The configuration is read only when it is
needed, because a question to a running daemon needs none and is to be quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tandem.repl.config import ResourceConfig, VolumeConfig
from tandem.repl.errors import Refusal
from tandem.repl.events import ResourceStatus, VolumeStatus

from .adm_hints import hint
from .client import Client, DaemonError, NotRunning, Tick, is_running, resource_lock
from .paths import NodePaths, default_config, default_node, default_run_dir

if TYPE_CHECKING:
    from .conf import Configuration

SHOW_AFTER_S: Final = 1.0  # a wait that is longer shows on a terminal that it goes on


class Quit(Exception):
    """End the command with *code*; *text* goes to stderr when it is not empty."""

    def __init__(self, code: int, text: str = "") -> None:
        super().__init__(text)
        self.code = code


@dataclass(slots=True)
class General:
    """The options in front of every command."""

    config_file: str = field(default_factory=default_config)
    node: str = field(default_factory=default_node)
    run_dir: str = field(default_factory=lambda: os.fspath(default_run_dir()))
    dry_run: bool = False
    verbose: bool = False
    stacked: bool = False
    peer: str = ""
    sh_varname: str = ""  # accepted, without effect as in drbdadm


@dataclass(frozen=True, slots=True)
class Target:
    """What a command is to work on: a resource, or one volume of it."""

    resource: str
    volume: int | None = None

    def __str__(self) -> str:
        return self.resource if self.volume is None else f"{self.resource}/{self.volume}"


def say(text: str) -> None:
    """One or more lines to stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """One or more lines to stderr, after what was said."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Session:
    """One run of `tandemadm`."""

    def __init__(self, general: General) -> None:
        self.general = general
        self.paths = NodePaths(Path(general.run_dir).absolute(), general.node)
        self._configuration: Configuration | None = None
        self._resources: dict[str, ResourceConfig] | None = None

    # -------------------------------------------------------------------------- configuration

    @property
    def configuration(self) -> Configuration:
        """The parsed configuration; ConfigError when it is invalid."""
        if self._configuration is None:
            from .conf import load  # The grammar library is slow to import.

            self._configuration = load(self.general.config_file)
            for warning in self._configuration.warnings:
                complain(warning)
        return self._configuration

    @property
    def resources(self) -> dict[str, ResourceConfig]:
        """The resources of this node by name."""
        if self._resources is None:
            self._resources = self.configuration.for_node(self.general.node)
        return self._resources

    def config(self, resource: str) -> ResourceConfig:
        """The configuration of one resource of this node; Quit when there is none."""
        found = self.resources.get(resource)
        if found is None:
            raise Quit(1, self._why_not(resource))
        return found

    def _why_not(self, name: str) -> str:
        if name in self.configuration.ignored(self.general.node):
            return (
                f"'{name}' ignored, since this host ({self.general.node}) is not mentioned "
                "with an 'on' keyword.\nIf it goes by another name there, give that with --node or TANDEM_NODE."
            )
        return f"'{name}' not defined in your config (for this host)."

    def check_address(self, config: ResourceConfig) -> None:
        """Quit when this host does not have the address that the configuration gives it."""
        from .conf import address_problem

        problem = address_problem(self.configuration, config)
        if problem is not None:
            raise Quit(10, problem)

    def volumes(self, target: Target) -> list[VolumeConfig]:
        """The configured volumes that *target* means."""
        config = self.config(target.resource)
        if target.volume is None:
            return list(config.volumes)
        volume = config.volume(target.volume)
        if volume is None:
            raise Quit(1, f"'{target}' not defined in your config (for this host).")
        return [volume]

    # ---------------------------------------------------------------------------------- names

    def targets(self, names: tuple[str, ...]) -> list[Target]:
        """What *names* mean: resources, ``r0/1``, ``minor-5``, ``/dev/drbd5`` or ``all``."""
        if not names:
            raise Quit(1, "No resource names specified")
        targets: list[Target] = []
        for name in names:
            targets += self._all() if name == "all" else [self._target(name)]
        return list(dict.fromkeys(targets))

    def _all(self) -> list[Target]:
        if not self.resources:
            raise Quit(1, "no resources defined!")
        return [Target(name) for name in self.resources]

    def _target(self, name: str) -> Target:
        if self.is_up(name):
            return Target(name)
        resource, slash, number = name.rpartition("/")
        if slash and number.isdigit() and resource and not name.startswith("/dev/"):
            if not self.is_up(resource):
                self.config(resource)
            return Target(resource, int(number))
        minor = _minor(name)
        if minor is not None:
            return self._by_minor(name, minor)
        if name not in self.resources:
            for config in self.resources.values():
                for volume in config.volumes:
                    if volume.device == name:
                        return Target(config.name, volume.number)
        self.config(name)
        return Target(name)

    def _by_minor(self, name: str, minor: int) -> Target:
        for config in self.resources.values():
            for volume in config.volumes:
                if volume.minor == minor:
                    return Target(config.name, volume.number)
        raise Quit(1, f"'{name}' not defined in your config (for this host).")

    # -------------------------------------------------------------------------------- daemons

    def is_up(self, resource: str) -> bool:
        """Does the daemon of *resource* run? Cheap when there is no socket."""
        return self.paths.control(resource).exists() and is_running(self.paths, resource)

    def client(self, resource: str) -> Client:
        """A connection to the daemon; NotRunning when there is none."""
        return Client(self.paths, resource)

    def status(self, resource: str) -> ResourceStatus:
        with self.client(resource) as client:
            return client.status()

    def status_or_none(self, resource: str) -> ResourceStatus | None:
        try:
            return self.status(resource)
        except NotRunning:
            return None

    def run(
        self, client: Client, target: Target, name: str, args: dict[str, Any] | None = None, obj: str = ""
    ) -> int:
        """Carry out one command on a daemon and report a refusal; the exit code."""
        with waiting(f"{target}: {name}") as tick:
            refusal = client.command(name, target.volume, args, tick=tick)
        if refusal is None:
            return 0
        return self.refused(refusal, target, obj, name)

    @staticmethod
    def refused(refusal: Refusal, target: Target, obj: str = "", command: str = "") -> int:
        """Report *refusal* as drbdsetup does, then say what to do next; the exit code."""
        kind = "Failure" if refusal.code > 0 else "State change failed"
        lines = [f"{obj or target}: {kind}: ({refusal.code}) {refusal.text}"]
        if refusal.info:
            lines += ["additional info from kernel:", *refusal.info]
        advice = hint(refusal, target.resource, target.volume, command)
        complain("\n".join([*lines, advice] if advice else lines))
        return refusal.exit_code

    @contextmanager
    def locked(self, resource: str) -> Iterator[None]:
        """Hold off other commands that change *resource*."""
        with waiting(f"{resource}: waiting for another tandemadm") as tick:
            lock = resource_lock(self.paths, resource, tick)
            lock.__enter__()
        try:
            yield
        finally:
            lock.__exit__(None, None, None)


def select_volumes(status: ResourceStatus, target: Target) -> list[VolumeStatus]:
    """The volumes of a running resource that *target* means; Quit when there is no such volume."""
    if target.volume is None:
        return list(status.volumes)
    found = [volume for volume in status.volumes if volume.number == target.volume]
    if not found:
        raise Quit(1, f"'{target}' not defined in your config (for this host).")
    return found


def _minor(name: str) -> int | None:
    for prefix in ("minor-", "/dev/drbd", "drbd"):
        if name.startswith(prefix) and name[len(prefix) :].isdigit():
            return int(name[len(prefix) :])
    return None


# ----------------------------------------------------------------------------------------- waiting


@contextmanager
def waiting(what: str) -> Iterator[Tick]:
    """Show on a terminal that *what* still goes on, once it has taken longer than a second."""
    display = _Display(what)
    try:
        yield display.tick
    finally:
        display.end()


class _Display:
    def __init__(self, what: str) -> None:
        self._what = what
        self._end: Callable[[], None] | None = None
        self._silent = not sys.stderr.isatty()

    def tick(self, waited: float) -> None:
        if self._silent or self._end is not None or waited < SHOW_AFTER_S:
            return
        from rich.console import Console  # Slow to import, and rarely needed.

        status = Console(stderr=True).status(f"{self._what} … (Ctrl-C stops waiting)")
        status.start()
        self._end = status.stop

    def end(self) -> None:
        if self._end is not None:
            self._end()


__all__ = [
    "DaemonError", "General", "NotRunning", "Quit", "Session", "Target", "complain", "say", "select_volumes",
    "waiting",
]  # fmt: skip
