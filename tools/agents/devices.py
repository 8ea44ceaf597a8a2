"""The means to put the peer out, and the small file that names them.

A section of the file is one device: ``[bob]`` or, for further ones, ``[bob second]``, tried in the order of
the file. ``agent`` says of what kind it is: the name of a program of Debian's fence-agents (power off, then
ask whether it is off), ``stonith_admin`` (Pacemaker does it), ``ssh`` (a command on another host switches
the peer off) or ``outdate`` (the peer itself is told to outdate its disk). ``attempts`` and ``limit`` (the
seconds of one call) are ours; what else a section of a fence agent has is handed to the agent as it stands.

Relies on the agents' interface (FenceAgentAPI): options as ``name=value`` lines on standard input, exit code
0 for done or on, 2 for off, anything else for failure.
"""

from __future__ import annotations

import configparser
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from .handler import Called, FenceResult, HandlerError, Ran, log, run

DEFAULT_FILE: Final = "/etc/tandem-fence.conf"
AGENT_OFF: Final = 2  # exit code of an agent's status action for a machine that is off
SSH_FAILED: Final = 255  # ssh's own code: the command never ran
OUTDATE_CODES: Final = {  # drbdadm's exit codes of outdate: done, worse already, a Primary
    0: FenceResult.PEER_OUTDATED, 5: FenceResult.PEER_INCONSISTENT, 17: FenceResult.PEER_PRIMARY,
}  # fmt: skip
WORSE_THAN_OUTDATED: Final = ("Inconsistent", "Diskless", "Failed")
PAUSE_S: Final = 1.0  # between two looks or attempts


class Device(Protocol):
    """One way to put the peer out. Both calls block, and log what they find."""

    title: str

    def fence(self, call: Called) -> FenceResult | None:
        """Put the peer out; None when that failed and the next device is to be tried."""

    def probe(self, call: Called) -> bool:
        """Does the device answer? Changes nothing."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What every device has: its place in the file, how often and how long it is tried, its own options."""

    title: str
    agent: str
    attempts: int
    limit_s: float
    options: dict[str, str] = field(default_factory=dict)

    def take(self, name: str, default: str | None = None) -> str:
        """An option of a device that is not a fence agent; HandlerError when it is required and missing."""
        value = self.options.get(name, default)
        if value is None:
            raise HandlerError(f"[{self.title}]: {self.agent} needs the option {name}")
        return value

    def only(self, *names: str) -> None:
        for name in self.options:
            if name not in names:
                known = ", ".join(("agent", "attempts", "limit", *names))
                raise HandlerError(f"[{self.title}]: {self.agent} has no option {name}; it has {known}")


class PowerSwitch:
    """A program of fence-agents: off, then asked whether the machine is off.

    Both must say so. The code for off is also that of a shell, an interpreter or an option parser that could not
    even begin (2), and such a program ends with it whatever it is asked; one that works answers 0 to off, also for a
    machine that is off already.
    """

    def __init__(self, settings: Settings) -> None:
        self.title = settings.title
        self._settings = settings
        if "action" in settings.options:
            raise HandlerError(f"[{self.title}]: leave out action: the node is switched off, then asked for its state")

    def _call(self, action: str) -> Ran:
        options = {**self._settings.options, "action": action}
        words = "".join(f"{name}={value}\n" for name, value in options.items())
        return run([self._settings.agent], stdin=words, limit_s=self._settings.limit_s)

    def fence(self, call: Called) -> FenceResult | None:
        for attempt in range(1, self._settings.attempts + 1):
            if attempt > 1:
                time.sleep(PAUSE_S)
            off = self._call("off")
            status = self._call("status")
            if off.rc == 0 and status.rc == AGENT_OFF:
                log(f"[{self.title}] {self._settings.agent}: {call.peer} is off")
                return FenceResult.PEER_STONITHED
            why = off if off.rc else status
            log(f"[{self.title}] {self._settings.agent}: attempt {attempt} failed ({why.rc}): {why.last_line}")
        return None

    def probe(self, call: Called) -> bool:
        status = self._call("status")
        log(f"[{self.title}] {self._settings.agent}: {status.last_line}")
        if status.rc == AGENT_OFF:  # or it could not even begin, with the same code
            return self._call("monitor").rc == 0
        return status.rc == 0


class Pacemaker:
    """The cluster fences the node with whatever it has configured."""

    def __init__(self, settings: Settings) -> None:
        settings.only("node")
        self.title = settings.title
        self._settings = settings

    def fence(self, call: Called) -> FenceResult | None:
        node = self._settings.take("node", call.peer)
        limit_s = self._settings.limit_s
        for attempt in range(1, self._settings.attempts + 1):
            done = run(
                ["stonith_admin", "--tolerance", "5s", "--tag", "tandem", "--timeout", f"{limit_s:g}", "--fence", node],
                limit_s=limit_s + PAUSE_S,
            )
            if done.rc == 0:
                log(f"[{self.title}] stonith_admin: the cluster has fenced {node}")
                return FenceResult.PEER_STONITHED
            log(f"[{self.title}] stonith_admin: attempt {attempt} failed ({done.rc}): {done.last_line}")
        return None

    def probe(self, call: Called) -> bool:
        node = self._settings.take("node", call.peer)
        done = run(["stonith_admin", "--list", node], limit_s=self._settings.limit_s)
        log(f"[{self.title}] stonith_admin: {done.last_line}")
        return done.rc == 0


class Ssh:
    """A command on another host switches the peer off; a second one succeeds once it is off."""

    def __init__(self, settings: Settings) -> None:
        settings.only("host", "config", "command", "check")
        self.title = settings.title
        self._settings = settings
        for name in ("host", "command", "check"):
            settings.take(name)

    def fence(self, call: Called) -> FenceResult | None:
        for attempt in range(1, self._settings.attempts + 1):
            if attempt > 1:
                time.sleep(PAUSE_S)
            done = over_ssh(self._settings, self._settings.take("host"), self._settings.take("command"))
            check = over_ssh(self._settings, self._settings.take("host"), self._settings.take("check"))
            if check.rc == 0:
                log(f"[{self.title}] ssh: {call.peer} is off")
                return FenceResult.PEER_STONITHED
            why = done if done.rc else check
            log(f"[{self.title}] ssh: attempt {attempt} failed ({why.rc}): {why.last_line}")
        return None

    def probe(self, call: Called) -> bool:
        check = over_ssh(self._settings, self._settings.take("host"), self._settings.take("check"))
        log(f"[{self.title}] ssh: the check ends with {check.rc}: {check.last_line}")
        return check.rc != SSH_FAILED


class Outdate:
    """The peer is told to outdate its disk, and asked whether it did.

    While it still believes to be connected the command does nothing and succeeds, so only its disk
    state counts.
    """

    def __init__(self, settings: Settings) -> None:
        settings.only("host", "config", "program")
        self.title = settings.title
        self._settings = settings
        self._program = settings.take("program", "tandemadm")

    def _ask(self, call: Called, verb: str) -> Ran:
        command = f"{self._program} {verb} {shlex.quote(call.resource)}"
        return over_ssh(self._settings, self._settings.take("host", call.peer), command)

    def fence(self, call: Called) -> FenceResult | None:
        deadline = time.monotonic() + self._settings.attempts * self._settings.limit_s
        while True:
            done = self._ask(call, "outdate")
            result = OUTDATE_CODES.get(done.rc)
            if result == FenceResult.PEER_OUTDATED:
                result = self._disk(call)
            if result is not None:
                log(f"[{self.title}] outdate: {call.peer} says: {result.name.lower().replace('_', ' ')}")
                return result
            if done.rc or time.monotonic() > deadline:
                log(f"[{self.title}] outdate: failed ({done.rc}): {done.last_line}")
                return None
            time.sleep(PAUSE_S)

    def _disk(self, call: Called) -> FenceResult | None:
        """What the peer's disks are; None while one of them is better than Outdated."""
        asked = self._ask(call, "dstate")
        disks = [line.partition("/")[0] for line in asked.out.split()]
        if asked.rc or not disks:
            return None
        if all(disk in WORSE_THAN_OUTDATED for disk in disks):
            return FenceResult.PEER_INCONSISTENT
        good = all(disk == "Outdated" or disk in WORSE_THAN_OUTDATED for disk in disks)
        return FenceResult.PEER_OUTDATED if good else None

    def probe(self, call: Called) -> bool:
        asked = self._ask(call, "dstate")
        log(f"[{self.title}] outdate: {asked.last_line}")
        return asked.rc == 0


def over_ssh(settings: Settings, host: str, command: str) -> Ran:
    """Run *command* on *host*; never asks for a password. ``config`` may name an ssh_config file."""
    argv = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
    if "config" in settings.options:
        argv += ["-F", settings.options["config"]]
    return run([*argv, host, command], limit_s=settings.limit_s)


_KINDS: Final[dict[str, Callable[[Settings], Device]]] = {
    "stonith_admin": Pacemaker, "ssh": Ssh, "outdate": Outdate,
}


def read_devices(path: Path, peers: tuple[str, ...]) -> list[Device]:
    """The devices of the first of *peers* that has any; HandlerError when the file is no use."""
    parser = configparser.ConfigParser(interpolation=None, default_section="", delimiters=("=",))
    parser.optionxform = str  # type: ignore[assignment]  # names are the agent's, as they stand
    try:
        with open(path) as file:
            parser.read_file(file)
    except OSError as error:
        raise HandlerError(f"{path}: {error.strerror}; it has to say how {peers[0]} is fenced") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise HandlerError(f"{path}: {' '.join(str(error).split())}") from error
    for peer in peers:
        titles = [title for title in parser.sections() if title.split()[:1] == [peer]]
        if titles:
            return [_device(path, title, dict(parser[title])) for title in titles]
    raise HandlerError(f"{path} has no section [{peers[0]}]: it does not say how {peers[0]} is fenced")


def _device(path: Path, title: str, options: dict[str, str]) -> Device:
    agent = options.pop("agent", "")
    for name, value in {"agent": agent, **options}.items():
        if "\n" in value:  # as configparser reads an indented line
            more = value.splitlines()[1]
            raise HandlerError(f"{path}: [{title}]: write the line '{more}' below {name} without spaces before it")
    if not agent:
        raise HandlerError(f"{path}: [{title}] has no agent; write for example agent = fence_ipmilan")
    settings = Settings(
        title, agent, _count(path, title, options, "attempts", "2"), _count(path, title, options, "limit", "60"),
        options,
    )  # fmt: skip
    try:
        return _KINDS.get(agent, PowerSwitch)(settings)
    except HandlerError as error:
        raise HandlerError(f"{path}: {error}") from error


def _count(path: Path, title: str, options: dict[str, str], name: str, default: str) -> int:
    value = options.pop(name, default)
    if not re.fullmatch("[1-9][0-9]{0,3}", value):
        raise HandlerError(f"{path}: [{title}] {name} = {value} is not a number from 1 to 9999")
    return int(value)
