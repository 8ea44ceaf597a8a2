"""`tandem-crm-fence-peer` and `tandem-crm-unfence-peer`: fencing by a constraint in Pacemaker.

The constraint lets the cluster promote only the node that has the good data. What may be answered follows
from what the cluster knows of the peer and from our own disks, as the daemon tells them in its status. With
STONITH enabled a peer that is neither reachable nor known to be off is waited for, not assumed to be dead.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Final

import click
from tandem.repl.events import ResourceStatus

from ..client import Client, DaemonError
from ..paths import NodePaths, default_node, default_run_dir
from . import cib
from .cib import Cib, PeerState
from .handler import Called, FenceResult, HandlerError, called, give_up, log, run_main

FENCE: Final = "tandem-crm-fence-peer"
UNFENCE: Final = "tandem-crm-unfence-peer"
POLL_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Disks:
    """What our daemon says of both sides' disks."""

    up_to_date: bool
    consistent: bool
    peer_up_to_date: bool


def disks(resource: str) -> Disks:
    """Ask the daemon of *resource*; HandlerError when it does not answer."""
    try:
        with Client(NodePaths(default_run_dir(), default_node()), resource) as client:
            return disks_of(client.status())
    except DaemonError as error:
        raise HandlerError(f"the daemon of {resource} does not tell its state: {error}") from error


def disks_of(status: ResourceStatus) -> Disks:
    """The same from a status; a resource without volumes has no good disk."""
    own = [volume.disk for volume in status.volumes]
    peer = [volume.peer_disk for volume in status.connection.volumes]
    return Disks(
        up_to_date=bool(own) and all(disk == "UpToDate" for disk in own),
        consistent=bool(own) and all(disk in ("Consistent", "UpToDate") for disk in own),
        peer_up_to_date=bool(peer) and all(disk == "UpToDate" for disk in peer),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether to place the constraint, and what to answer once it is placed (or at once, when it is not)."""

    result: FenceResult
    place: bool
    why: str


def judge(peer: PeerState, own: Disks, stonith: bool) -> Verdict:
    """What follows from the peer's state and our disks; shooting the peer does not make our data better."""
    if own.peer_up_to_date:
        return Verdict(FenceResult.BROKEN, False, "the peer's disks are UpToDate again")
    if peer is PeerState.REACHABLE and own.consistent:
        return Verdict(FenceResult.PEER_OUTDATED, True, "the peer is reachable, and will not be promoted")
    if peer is PeerState.FENCED and own.up_to_date:
        return Verdict(FenceResult.PEER_STONITHED, True, "the cluster has switched the peer off")
    if peer is PeerState.UNCLEAN and own.up_to_date and stonith:
        return Verdict(FenceResult.BROKEN, False, "the cluster has not fenced the peer in time")
    if peer is PeerState.UNCLEAN and own.up_to_date:
        return Verdict(FenceResult.PEER_UNREACHABLE, True, "the peer is unreachable, and the cluster has no STONITH")
    return Verdict(FenceResult.PEER_UNREACHABLE, False, "our own disk is not good enough")


def fence(call: Called, timeout_s: float, attribute: str) -> FenceResult:
    """Place the constraint where it may be placed."""
    base = cib.read()
    clone = base.clone_of(call.resource)
    identifier = cib.constraint_id(call.resource, clone)
    attribute, value = cib.attribute_value(call.node, attribute)
    present = base.constraint(identifier)
    if present is None:
        base, peer = _settled(call, base, timeout_s)
        if not base.has_quorum:
            raise HandlerError("this partition of the cluster has no quorum; the constraint is not placed")
        verdict = judge(peer, disks(call.resource), base.stonith_enabled)
        log(f"{call.resource}: {call.peer} is {peer.value}: {verdict.why}")
        if not verdict.place:
            return verdict.result
        if cib.place(cib.constraint_xml(call.resource, clone, attribute, value)):
            log(f"{call.resource}: placed the constraint {identifier}")
            return verdict.result
        present = cib.read().constraint(identifier)  # the peer was faster
    if present == {value}:
        log(f"{call.resource}: the constraint {identifier} is in place")
        return FenceResult.PEER_OUTDATED
    log(f"{call.resource}: the constraint {identifier} is in place and is not ours: it keeps this node from promotion")
    return FenceResult.BROKEN


def _settled(call: Called, base: Cib, timeout_s: float) -> tuple[Cib, PeerState]:
    """Wait until the cluster knows what became of the peer, or the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        peer = base.peer_state(call.peer)
        if peer is not PeerState.UNCLEAN or time.monotonic() >= deadline:
            return base, peer
        time.sleep(POLL_S)
        base = cib.read()


def unfence(call: Called) -> int:
    """Remove the constraint once both sides are UpToDate; the exit code."""
    base = cib.read()
    identifier = cib.constraint_id(call.resource, base.clone_of(call.resource))
    if base.constraint(identifier) is None:
        log(f"{call.resource}: there is no constraint {identifier}")
        return 0
    own = disks(call.resource)
    if not (own.up_to_date and own.peer_up_to_date):
        log(f"{call.resource}: not all disks are UpToDate, the constraint {identifier} stays")
        return 0
    cib.remove(identifier)
    log(f"{call.resource}: removed the constraint {identifier}")
    return 0


_HELP: Final = {"help_option_names": ["-h", "--help"]}


@click.command(context_settings=_HELP)
@click.option("--timeout", "timeout_s", metavar="SECONDS", type=click.FloatRange(min=0), default=60.0,
              show_default=True, help="How long to wait until the cluster has fenced a peer that it lost.")  # fmt: skip
@click.option("--fencing-attribute", metavar="NAME", default=cib.UNAME, show_default=True,
              help="The node attribute that the constraint goes by.")  # fmt: skip
def fence_command(timeout_s: float, fencing_attribute: str) -> int:
    """Let Pacemaker promote only this node. The fence-peer handler of tandemd in a cluster, for drbd.conf:

    handlers { fence-peer "tandem-crm-fence-peer"; unfence-peer "tandem-crm-unfence-peer"; }
    """
    try:
        return fence(called(), timeout_s, fencing_attribute)
    except HandlerError as error:
        return give_up(FENCE, error)


@click.command(context_settings=_HELP)
def unfence_command() -> int:
    """Let Pacemaker promote both nodes again, once both are UpToDate. The unfence-peer handler."""
    try:
        return unfence(called())
    except HandlerError as error:
        return give_up(UNFENCE, error)


def fence_main() -> None:
    """Entry point of ``tandem-crm-fence-peer``."""
    sys.exit(run_main(fence_command, FENCE))


def unfence_main() -> None:
    """Entry point of ``tandem-crm-unfence-peer``."""
    sys.exit(run_main(unfence_command, UNFENCE))
