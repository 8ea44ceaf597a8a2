"""The other end of the control socket, and the start of daemons.

`Client` speaks the protocol of `control`. `start_daemon` runs ``tandemd`` in the background and returns
when its control socket answers, or with the sentence the daemon left behind. Nothing here waits without
an end that the user can set: every wait has a time limit or ends with Ctrl-C.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.repl.config import ResourceConfig
from tandem.repl.errors import Refusal
from tandem.repl.events import Helper, ResourceStatus

from .paths import NodePaths, PathError, check_socket_path
from .process import try_lock
from .values import Json, pack, unpack

ANSWER_S: Final = 5.0  # drbdadm's cmd-timeout-short: the control socket answers in milliseconds
COMMAND_S: Final = 121.0  # drbdadm's cmd-timeout-medium: a command that may wait for the peer
START_S: Final = 30.0  # a daemon that is not ready by then is stuck
TICK_S: Final = 0.25  # how often a wait looks up to show that it is still waiting

Tick = Callable[[float], None]  # called while waiting, with the seconds waited


class DaemonError(Exception):
    """No answer from a resource's daemon; *code* is the exit code (20 when there is no daemon)."""

    def __init__(self, text: str, code: int = 20) -> None:
        super().__init__(text)
        self.code = code


class NotRunning(DaemonError):
    """Nobody listens on the control socket."""


@dataclass(frozen=True, slots=True)
class Following:
    """One event after `Client.subscribe`: the status then. *poll*: it answers one; *helper*: what a handler did."""

    status: ResourceStatus
    poll: bool = False
    helper: Helper | None = None


class Client:
    """One connection to the daemon of one resource. Use as a context manager."""

    def __init__(self, paths: NodePaths, resource: str) -> None:
        self.resource = resource
        path = paths.control(resource)
        try:
            check_socket_path(path)
        except PathError as error:
            raise DaemonError(str(error)) from error
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(ANSWER_S)
        self._inbox = bytearray()
        try:
            self._sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError) as error:
            self._sock.close()
            raise NotRunning(
                f"{resource}: the daemon is not running; start it with: tandemadm up {resource}"
            ) from error
        except PermissionError as error:
            self._sock.close()
            raise DaemonError(
                f"{resource}: no permission to use {path}; run tandemadm as the user who runs the daemon"
            ) from error
        except OSError as error:
            self._sock.close()
            raise DaemonError(f"{resource}: cannot use {path}: {error.strerror or error}") from error

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    def fileno(self) -> int:
        return self._sock.fileno()

    # ------------------------------------------------------------------------------- requests

    def hello(self) -> Json:
        return self._ask({"do": "hello"})

    def status(self) -> ResourceStatus:
        return self._status(self._ask({"do": "status"}))

    def command(
        self, name: str, volume: int | None = None, args: Json | None = None, *, limit_s: float = COMMAND_S,
        tick: Tick | None = None,
    ) -> Refusal | None:  # fmt: skip
        """Carry out a command; DaemonError when there is no answer within *limit_s* seconds."""
        request = {"do": "command", "name": name, "volume": volume, "args": args or {}}
        return self._refusal(self._ask(request, limit_s, tick))

    def reconfigure(self, config: ResourceConfig, tick: Tick | None = None) -> Refusal | None:
        return self._refusal(self._ask({"do": "reconfigure", "config": pack(config)}, COMMAND_S, tick))

    def subscribe(self) -> ResourceStatus:
        """Ask for events; the present status. What follows is read with `following`."""
        return self._status(self._ask({"do": "events"}))

    def poll(self) -> None:
        """Ask for a status among the events; it is marked as an answer to a poll."""
        self._send({"do": "poll"})

    def following(self, limit_s: float | None) -> Following | None:
        """The next event; None when none came within *limit_s*. DaemonError when the daemon has ended."""
        message = self._receive(limit_s)
        if message is None:
            return None
        helper = unpack(Helper, message["helper"]) if "helper" in message else None
        return Following(self._status(message), bool(message.get("poll")), helper)

    def buffered(self) -> bool:
        """Is a whole message here already, so that waiting on the descriptor would be wrong?"""
        return b"\n" in self._inbox

    def wait_closed(self, limit_s: float) -> bool:
        """Wait until the daemon has closed the connection; False when it has not in time."""
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(DaemonError):
            while (left := deadline - time.monotonic()) > 0:
                self._receive(left)
            return False
        return True

    # ------------------------------------------------------------------------------- plumbing

    def _ask(self, request: Json, limit_s: float = ANSWER_S, tick: Tick | None = None) -> Json:
        self._send(request)
        began = time.monotonic()
        while (waited := time.monotonic() - began) < limit_s:
            message = self._receive(min(TICK_S, limit_s - waited))
            if message is not None:
                return message
            if tick is not None:
                tick(time.monotonic() - began)
        raise DaemonError(f"{self.resource}: the daemon did not answer within {limit_s:.0f} seconds")

    def _send(self, request: Json) -> None:
        self._sock.settimeout(ANSWER_S)
        try:
            self._sock.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise DaemonError(f"{self.resource}: the daemon closed the connection") from error

    def _receive(self, limit_s: float | None) -> Json | None:
        deadline = None if limit_s is None else time.monotonic() + limit_s
        while (end := self._inbox.find(b"\n")) < 0:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.001)
            self._sock.settimeout(left)
            try:
                data = self._sock.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError:
                data = b""
            if not data:
                raise DaemonError(f"{self.resource}: the daemon ended")
            self._inbox += data
        message = json.loads(bytes(self._inbox[:end]))
        del self._inbox[: end + 1]
        if "error" in message:
            raise DaemonError(f"{self.resource}: the daemon did not understand: {message['error']}")
        assert isinstance(message, dict)
        return message

    @staticmethod
    def _status(message: Json) -> ResourceStatus:
        return unpack(ResourceStatus, message.get("status"))

    @staticmethod
    def _refusal(message: Json) -> Refusal | None:
        refusal = message.get("refusal")
        return None if refusal is None else unpack(Refusal, refusal)


def is_running(paths: NodePaths, resource: str) -> bool:
    """Does the daemon of *resource* accept connections?"""
    try:
        Client(paths, resource).close()
    except NotRunning:
        return False
    return True


# ----------------------------------------------------------------------------------------- locking


@contextlib.contextmanager
def resource_lock(paths: NodePaths, resource: str, tick: Tick | None = None) -> Iterator[None]:
    """Hold the lock of commands that change *resource*, waiting for whoever has it.

    DaemonError (exit code 20) when it is not free within drbdadm's long time limit.
    """
    paths.make()
    path = paths.lock(resource)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise DaemonError(f"{resource}: cannot open {path}: {error.strerror}") from error
    try:
        began = time.monotonic()
        while not try_lock(fd):
            waited = time.monotonic() - began
            if waited > COMMAND_S:
                raise DaemonError(
                    f"{resource}: another tandemadm has been changing this resource for {waited:.0f} s; "
                    f"end it (its lock is {path}) and try again"
                )
            if tick is not None:
                tick(waited)
            time.sleep(0.05)
        yield
    finally:
        os.close(fd)


# ---------------------------------------------------------------------------------------- starting


def start_daemon(paths: NodePaths, config: ResourceConfig, tick: Tick | None = None) -> None:
    """Run ``tandemd`` for *config* in the background and wait until it is ready.

    The daemon gets the configuration as a value, so both see the same one even when it came from
    standard input. DaemonError carries what the daemon said, with its exit code.
    """
    paths.make()
    log = paths.log(config.name)
    ready_r, ready_w = os.pipe()
    try:
        with open(log, "ab") as log_file:
            process = subprocess.Popen(
                [
                    sys.executable, "-m", "tandem.tools.daemon", config.name, "--node", paths.node,
                    "--run-dir", os.fspath(paths.run_dir), "--background", "--ready-fd", str(ready_w),
                ],
                stdin=subprocess.PIPE, stdout=log_file, stderr=log_file, pass_fds=(ready_w,),
                start_new_session=True, cwd="/",
            )  # fmt: skip
    except OSError as error:
        os.close(ready_r)
        raise DaemonError(f"{config.name}: cannot start the daemon: {error}") from error
    finally:
        os.close(ready_w)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(pack(config)).encode())
    try:
        await_ready(ready_r, config.name, log, tick)
    finally:
        os.close(ready_r)


def await_ready(fd: int, resource: str, log: Path, tick: Tick | None) -> None:
    """Wait for the word of a process that starts: ready, or one sentence why not. DaemonError in that case."""
    said = b""
    began = time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while not said.endswith(b"\n"):
            waited = time.monotonic() - began
            if waited > START_S:
                raise DaemonError(f"{resource}: the daemon is not ready after {START_S:.0f} s; see {log}")
            if selector.select(TICK_S):
                part = os.read(fd, 4096)
                if not part:
                    raise DaemonError(f"{resource}: the daemon ended while starting; see {log}")
                said += part
            elif tick is not None:
                tick(waited)
    answer = json.loads(said)
    if "error" in answer:
        raise DaemonError(f"{resource}: {answer['error']}", int(answer.get("code", 20)))


def wait_ended(paths: NodePaths, resource: str, limit_s: float, tick: Tick | None = None) -> bool:
    """Wait until no daemon holds the pid file of *resource*; False when one still does."""
    try:
        fd = os.open(paths.pid(resource), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return True
    try:
        began = time.monotonic()
        while not try_lock(fd):
            waited = time.monotonic() - began
            if waited > limit_s:
                return False
            if tick is not None:
                tick(waited)
            time.sleep(0.01)
        return True
    finally:
        os.close(fd)
