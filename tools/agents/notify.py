"""`tandem-notify`: tells an administrator, by mail or through a program, what a handler was called for.

A notification that cannot be delivered is said in the log. It never fails a before-resync handler, whose
exit code would end the connection.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Final

import click

from ..client import Client, DaemonError
from ..paths import NodePaths, default_node, default_run_dir
from ..status import status_text
from .handler import HandlerError, give_up, log, run, run_main

PROGRAM: Final = "tandem-notify"
LIMIT_S: Final = 120.0
SENDMAIL: Final = "/usr/sbin/sendmail"

# What happened on this node, and what there is to do.
EVENTS: Final = {
    "split-brain": (
        "split brain with {peer}",
        "Both nodes have data that the other one lacks, and the connection was dropped. Decide whose data is to stay; "
        "on the other node run:\n\n    tandemadm secondary {resource}\n"
        "    tandemadm connect --discard-my-data {resource}\n\nand here: tandemadm connect {resource}",
    ),
    "initial-split-brain": (
        "split brain with {peer} found",
        "Both nodes have data that the other one lacks. The policies after-sb-… of the configuration are asked now; "
        "if they cannot solve it, the handler split-brain follows.",
    ),
    "pri-lost": (
        "Primary is to become the target of {peer}",
        "This node is Primary, and its data would have to be replaced by the peer's. The connection is dropped unless "
        "rr-conflict allows it. Stop the services and demote this node.",
    ),
    "pri-lost-after-sb": (
        "Primary lost the recovery after a split brain",
        "The configuration decides for the data of {peer}, but this node could not be demoted because its device is "
        "in use. Stop the services and demote this node.",
    ),
    "pri-on-incon-degr": (
        "Primary without good data",
        "This node is Primary, its own data is not UpToDate and neither is any that it can reach. Reads fail or wait. "
        "Bring {peer} back, or its network.",
    ),
    "local-io-error": (
        "local disk failed",
        "The disk {disk} reported an error and was detached; the resource goes on with the data of {peer}. Replace "
        "the disk, then run:\n\n    tandemadm create-md {resource}\n    tandemadm attach {resource}",
    ),
    "out-of-sync": (
        "online verify found differences",
        "The blocks that differ are marked. To copy them from the node that is right, run:\n\n"
        "    tandemadm disconnect {resource}\n    tandemadm connect {resource}",
    ),
    "before-resync-source": ("copies to {peer}", "This node begins to copy what {peer} lacks."),
    "before-resync-target": (
        "is behind {peer}",
        "This node begins to take over what it lacks from {peer}; until that is done its disk is Inconsistent.",
    ),
    "after-resync-source": ("has brought {peer} up to date", "This node has copied everything {peer} lacked."),
    "after-resync-target": ("has caught up with {peer}", "This node has taken over everything it lacked from {peer}."),
    "fence-peer": ("lost {peer}", "This node is Primary, or is to be, and cannot reach {peer}."),
    "unfence-peer": ("has {peer} back", "Both nodes are UpToDate again."),
    "quorum-lost": ("lost quorum", "This node is Primary and has lost quorum."),
    "disconnected": ("disconnected from {peer}", "The connection to {peer} was lost."),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Message:
    """What is told: one line, and the whole text."""

    subject: str
    text: str


def compose(event: str, env: Mapping[str, str], status: str) -> Message:
    """The message for *event*, from the handler's environment and the resource's *status* as text."""
    resource = env.get("DRBD_RESOURCE", "")
    if not resource:
        raise HandlerError("DRBD_RESOURCE is not set: this program is called by tandemd, as a handler")
    subject, text = EVENTS[event]
    values = {
        "resource": resource, "peer": env.get("DRBD_PEER", "the peer"), "disk": env.get("DRBD_LL_DISK", "of a volume"),
    }  # fmt: skip
    volume = f"/{env['DRBD_VOLUME']}" if "DRBD_VOLUME" in env else ""
    node = env.get("TANDEM_NODE") or os.uname().nodename
    lines = [
        f"{resource}{volume} on {node}: {event}", "", text.format(**values), "", "State of the resource:", "", status,
    ]  # fmt: skip
    return Message(f"{node}: {resource}{volume} {subject.format(**values)}", "\n".join(lines).rstrip() + "\n")


def mail(message: Message, to: str) -> None:
    """Give the message to the host's mail system; HandlerError when it refuses."""
    letter = EmailMessage()
    letter["To"], letter["Subject"] = to, message.subject
    letter.set_content(message.text)
    done = run([SENDMAIL, "-t", "-i"], stdin=letter.as_string(), limit_s=LIMIT_S)
    if done.rc:
        raise HandlerError(f"the mail to {to} could not be sent ({done.rc}): {done.last_line}")
    log(f"mail to {to}: {message.subject}")


def call(message: Message, program: str, event: str) -> None:
    """Run *program* with the event and the subject as arguments and the text as its input."""
    done = run([program, event, message.subject], stdin=message.text, limit_s=LIMIT_S)
    for line in done.out.splitlines():
        log(f"{program}: {line}")
    if done.rc:
        raise HandlerError(f"{program} failed ({done.rc})")


def current_status(resource: str) -> str:
    """The status as `tandemadm status` prints it."""
    try:
        with Client(NodePaths(default_run_dir(), default_node()), resource) as client:
            return status_text(client.status(), verbose=True, statistics=True, width=80, terminal=False)
    except DaemonError as error:
        return f"(unknown: {error})"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("event", type=click.Choice(list(EVENTS)), metavar="EVENT")
@click.option("--mail", "addresses", metavar="ADDRESS", multiple=True, help="Send a mail; may be repeated.")
@click.option("--program", "programs", metavar="PROGRAM", multiple=True,
              help="Run PROGRAM EVENT SUBJECT with the text as its input; may be repeated.")  # fmt: skip
def command(event: str, addresses: tuple[str, ...], programs: tuple[str, ...]) -> int:
    """Tell somebody that EVENT happened to a resource. A handler of tandemd, for drbd.conf:

    handlers { split-brain "tandem-notify split-brain --mail root"; }

    EVENT is the name of the handler.
    """
    if not addresses and not programs:
        raise click.UsageError("nobody to tell: give --mail ADDRESS or --program PROGRAM")
    failed = 0
    try:
        message = compose(event, os.environ, current_status(os.environ.get("DRBD_RESOURCE", "")))
        log(message.subject)
    except HandlerError as error:
        return give_up(PROGRAM, error)
    for address in addresses:
        try:
            mail(message, address)
        except HandlerError as error:
            failed = give_up(PROGRAM, error)
    for program in programs:
        try:
            call(message, program, event)
        except HandlerError as error:
            failed = give_up(PROGRAM, error)
    return 0 if event.startswith("before-resync-") else failed


def main() -> None:
    """Entry point of ``tandem-notify``."""
    sys.exit(run_main(command, PROGRAM))
