"""Two histories: checkers for fencing and split brain.

With fencing on at most one side acknowledges writes while the nodes do not see each other. Without it both may:
then there are two histories, each is kept until somebody decides, and none is ever joined to the other silently.
What each copy lacks of the other's answered writes is known from the ledger, whatever the machine believes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.repl.config import AfterSb, Fencing
from tandem.repl.requests import META
from tandem.repl.states import ConnState, DiskState, Role

from .ondisk import CONSISTENT, CONSISTENT_WAS_UP_TO_DATE, super_at

if TYPE_CHECKING:
    from .checkers import Checks
    from .client import Write
    from .mix import Mix
    from .node import Node

C = ConnState
D = DiskState


def check_only_side(checks: Checks, node: Node, write: Write) -> None:
    """With fencing on, at most one side acknowledges writes while the nodes do not see each other."""
    ledger = checks.w.ledgers[write.volume]
    if checks.w.mix.fencing is Fencing.DONT_CARE or checks.w.overruled or ledger.copies[node.index].discarded:
        return
    missed = ledger.still_lacks(node.index, checks.reader(node, write.volume))
    if missed and not given_up(checks, node, write.volume):
        checks.fail(
            "8 fencing",
            f"{write!r} was answered alone by {node.config.node}, which lacks {next(iter(missed))!r}:"
            " two histories although fencing is on",
        )


def given_up(checks: Checks, node: Node, volume: int) -> bool:
    """Has what only the peer of *node* has been given up, and its disk with it?

    By the operator, or by on-io-error pass_on, under which one failed block makes a whole disk Inconsistent, also
    that of a Primary alone. DRBD then prefers every disk that is not: it becomes the source (drbd_sync_handshake:
    "Becoming sync target due to disk states"), and a fence-peer handler finds the other worse than Outdated. A
    Primary that is the sync target of *node* reads from it and writes through it: no second history.
    """
    peer = checks.w.peer_of(node)
    discarded = checks.w.ledgers[volume].copies[peer.index].discarded
    follows = node.connected and peer.connected and peer.state(volume).conn in (C.SYNC_TARGET, C.PAUSED_SYNC_T)
    return discarded and (follows or not peer.primary) and _inconsistent(peer, volume)


def _inconsistent(node: Node, volume: int) -> bool:
    if node.engine is not None and node.state(volume).disk > D.NEGOTIATING:
        return node.state(volume).disk is D.INCONSISTENT
    return not super_at(node.disks[volume].devices[META].live, node.layouts[volume]).flags & CONSISTENT


def superseded(peer: Node, write: Write) -> bool:
    """Had the other Primary, *peer*, under way what replaces *write*?

    Its activity log covers both then, also when it died meanwhile.
    """
    if not peer.world.mix.two_primaries:
        return False
    others = [
        x for x in peer.world.ledgers[write.volume].writes.values()
        if x.node == peer.index and not x.acked and (x.end is None or x.end > write.begin)
    ]  # fmt: skip
    return all(any(s in other.sectors for other in others) for s in write.sectors)


def parted(node: Node, volume: int) -> bool:
    """Does the other one of two unfenced Primaries go on alone, and *node*, its sync target, not know it yet?

    Then a block that it had in sync is read from its own disk, and two histories have begun.
    """
    m = node.world.mix
    return (
        m.two_primaries and m.fencing is Fencing.DONT_CARE
        and node.state(volume).disk is D.INCONSISTENT and not node.world.peer_of(node).connected
    )  # fmt: skip


def could_be_primary(node: Node, volume: int) -> bool:
    """Does the disk of *node* pass for good data, as far as the node itself knows?"""
    if node.engine is not None and node.state(volume).disk > D.NEGOTIATING and not node.engine.volumes[volume].leaving:
        return node.state(volume).disk > D.OUTDATED
    # Down; or about to disconnect as the Outdated one: its superblock says so before the peer is asked to agree.
    flags = super_at(node.disks[volume].devices[META].durable, node.layouts[volume]).flags
    return flags & CONSISTENT_WAS_UP_TO_DATE == CONSISTENT_WAS_UP_TO_DATE


def met(checks: Checks, node: Node, volume: int) -> None:
    """The nodes have met again: what each of them knows of the other's history decides."""
    node.n_meetings += 1
    if node.connected:  # in all volumes: until then those of before may still answer alone
        node.fenced_once = False
    ledger, state = checks.w.ledgers[volume], node.state(volume)
    good = state.conn is C.CONNECTED and state.disk is state.pdsk is D.UP_TO_DATE
    if not checks.w.peer_of(node).connected:
        return  # it may refuse yet: a Primary with frozen I/O drops a peer that was restarted
    if not good or any(copy.discarded for copy in ledger.copies):
        return
    agreed_again(checks)
    for other in checks.w.nodes:
        missed = ledger.still_lacks(other.index, checks.reader(other, volume))
        if missed:
            checks.fail(
                "history",
                f"{node.config.node} met its peer as if nothing had happened, but {other.config.node} lacks"
                f" {next(iter(missed))!r}",
            )


def agreed_again(checks: Checks) -> None:
    """Everything is connected and UpToDate: from here on nobody is excused by what the operator once allowed."""
    volumes = range(checks.w.mix.n_volumes)
    states = [n.state(v) for n in checks.w.nodes if n.engine is not None for v in volumes]
    if len(states) == 2 * len(volumes) and all(s.conn is C.CONNECTED and s.disk is D.UP_TO_DATE for s in states):
        checks.w.overruled = False


def check_split_brain_decided(checks: Checks, target: Node, volume: int) -> None:
    """A split brain is never silently joined: whose changes go was decided by a policy that is configured.

    Only then is the history of *target* given up; `Checks._sync_began` fails for all others.
    """
    state, source = target.state(volume), checks.w.peer_of(target)
    ledger = checks.w.ledgers[volume]
    gone = ledger.still_lacks(source.index, checks.reader(source, volume))
    if gone and policy_gives_up(checks.w.mix, target.index, state.role, source.shown):
        checks.w.note(target, "gives up its changes, as the policy says")
        ledger.copies[target.index].discarded = True


def policy_gives_up(mix: Mix, victim: int, role: Role, peer: Role) -> bool:
    """May an after-split-brain policy have chosen the changes of node *victim*, now in *role*, to be lost?"""
    zero, one, two = mix.after_sb
    chooses = zero not in (AfterSb.DISCONNECT, AfterSb.DISCARD_ZERO_CHANGES)
    if zero is AfterSb.DISCARD_LOCAL and victim != 0:
        chooses = False
    demoted = chooses and AfterSb.CALL_PRI_LOST_AFTER_SB in (one, two)  # was Primary when they met
    if role is Role.PRIMARY:
        return mix.rr_conflict == "violently" and chooses and AfterSb.VIOLENTLY_AS0P in (one, two)
    if peer is Role.PRIMARY:
        solves = (AfterSb.CONSENSUS, AfterSb.VIOLENTLY_AS0P, AfterSb.CALL_PRI_LOST_AFTER_SB)
        return one is AfterSb.DISCARD_SECONDARY or (chooses and one in solves) or demoted
    return chooses
