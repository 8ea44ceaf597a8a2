"""What a handler program is told, what it may answer, and how it runs other programs.

The environment is the one in which the daemon runs handlers (`tandem.repl.edge.handlers`), which is
DRBD's; the answers of fence-peer are DRBD's exit codes. Everything a handler prints goes to the log of
the resource, so that is where it says what it does.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import click

NOT_STARTED: Final = 127  # the shell's code for a program that is not there
TIMED_OUT: Final = 124  # the code of timeout(1)


class FenceResult(IntEnum):
    """What fence-peer's exit code tells the node that called it (drbd_nl.c, conn_try_outdate_peer)."""

    BROKEN = 1
    PEER_INCONSISTENT = 3
    PEER_OUTDATED = 4
    PEER_UNREACHABLE = 5
    PEER_PRIMARY = 6
    PEER_STONITHED = 7


class HandlerError(Exception):
    """The handler cannot do its work; one sentence for the log."""


@dataclass(frozen=True, slots=True)
class Called:
    """The call of a handler. *peers* are all the names of the peer, the first one is its usual name."""

    resource: str
    peers: tuple[str, ...]
    node: str
    up_to_date: bool  # are all our own disks known to be UpToDate?

    @property
    def peer(self) -> str:
        return self.peers[0]


def called(environ: Mapping[str, str] | None = None) -> Called:
    """The call that the environment describes; HandlerError when it describes none."""
    env = os.environ if environ is None else environ
    resource = env.get("DRBD_RESOURCE", "")
    peers = tuple((env.get("DRBD_PEERS") or env.get("DRBD_PEER", "")).split())
    if not resource or not peers:
        raise HandlerError(
            "DRBD_RESOURCE and DRBD_PEERS are not set: this program is called by tandemd, "
            "as a handler in the resource's configuration"
        )
    own_id = env.get("DRBD_MY_NODE_ID", "")
    try:
        mask = int(env.get("UP_TO_DATE_NODES", "0"), 16)
        up_to_date = bool(mask >> int(own_id) & 1) if own_id else False
    except ValueError as error:
        raise HandlerError(f"UP_TO_DATE_NODES or DRBD_MY_NODE_ID is not a number: {error}") from error
    node = env.get(f"DRBD_NODE_ID_{own_id}") or env.get("TANDEM_NODE") or os.uname().nodename
    return Called(resource, peers, node, up_to_date)


def log(text: str) -> None:
    """A line for the resource's log, at once."""
    print(text, flush=True)


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended: *rc* is 127 when it could not be started, 124 when its time was over."""

    rc: int
    out: str

    @property
    def last_line(self) -> str:
        """The last thing it said, which is mostly why it failed."""
        lines = self.out.strip().splitlines()
        return lines[-1].strip() if lines else "(no output)"


def run(argv: Sequence[str], *, stdin: str = "", limit_s: float) -> Ran:
    """Run a program with *stdin*, and its group for at most *limit_s* seconds; both outputs in one.

    Output goes to memory and not to a pipe: a process that the program leaves behind would keep that open.
    """
    with os.fdopen(os.memfd_create("stdin"), "w+b") as words, os.fdopen(os.memfd_create("output"), "w+b") as said:
        words.write(stdin.encode())
        words.seek(0)
        try:
            process = subprocess.Popen(
                argv, stdin=words, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Ran(NOT_STARTED, f"{argv[0]}: {error.strerror}")
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return Ran(TIMED_OUT, f"{shlex.join(argv)} did not end within {limit_s:g} seconds and was killed")
        said.seek(0)
        return Ran(process.returncode, said.read().decode(errors="replace"))


def run_main(command: click.Command, program: str) -> int:
    """Run the command line of a handler; its exit code."""
    try:
        return int(command.main(prog_name=program, standalone_mode=False) or 0)
    except click.UsageError as error:
        error.show()
        return error.exit_code


def give_up(program: str, error: HandlerError) -> int:
    """Say why the handler failed; its exit code."""
    print(f"{program}: {error}", file=sys.stderr, flush=True)
    return FenceResult.BROKEN
