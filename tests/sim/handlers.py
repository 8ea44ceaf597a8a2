"""What the configured handlers do in the simulation, above all fence-peer, which tells the truth.

An honest fence agent never claims that the peer is harmless while it is not: it outdates the peer, shoots
it, or says that the peer is Primary or cannot be reached.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.repl.config import Fencing
from tandem.repl.events import RunHandler
from tandem.repl.states import DiskState

from . import admin

if TYPE_CHECKING:
    from .node import Node
    from .world import World

PEER_INCONSISTENT = 3
PEER_OUTDATED = 4
PEER_UNREACHABLE = 5
PEER_IS_PRIMARY = 6
PEER_SHOT = 7
BROKEN = 1
OUT_OF_TIME = 20  # what the daemon says of a handler it had to kill
REBOOTS = ("pri-lost", "pri-lost-after-sb")
MAY_REBOOT = ("local-io-error", "pri-on-incon-degr")
PEER_IS_OUT = (PEER_INCONSISTENT, PEER_OUTDATED, PEER_UNREACHABLE, PEER_SHOT)


@dataclass(slots=True)
class Running:
    """A handler that has been started. *code* is None until it has done its work."""

    effect: RunHandler
    n_meetings: int  # how often the nodes had met when it was started
    code: int | None = None


def run(world: World, node: Node, effect: RunHandler) -> int:
    """The exit code of the handler, after it has done its work."""
    if effect.name in REBOOTS or (effect.name in MAY_REBOOT and world.chance(2)):
        world.note(node, "reboots at once, as its handler says")
        world.crash(node, power=True)
    if effect.name.startswith("before-resync-") and world.troubled and world.chance(10):
        return BROKEN
    if effect.name != "fence-peer":
        return 0
    if world.troubled and world.mix.lying_handler and world.chance(4):
        return BROKEN
    return _fence(world, node)


def _fence(world: World, node: Node) -> int:
    peer = world.peer_of(node)
    stonith = world.mix.fencing is Fencing.RESOURCE_AND_STONITH
    if not node.primary and any(admin.behind(world, node, v) for v in range(world.mix.n_volumes)):
        return PEER_IS_PRIMARY if peer.primary else BROKEN  # a cluster manager remembers who was Primary last
    if peer.engine is None:
        return PEER_UNREACHABLE
    shoots = stonith and world.mix.two_primaries
    if peer.primary and not peer.state().susp_fen and not shoots:
        return PEER_IS_PRIMARY
    if not peer.primary and all(peer.state(v).disk is DiskState.INCONSISTENT for v in range(world.mix.n_volumes)):
        return PEER_INCONSISTENT
    if any(peer.good_disk(v) and not node.good_disk(v) for v in range(world.mix.n_volumes)):
        return BROKEN  # the peer knows that its data is good, we do not: no agent would sacrifice it
    if stonith and (peer.primary or world.chance(3)):
        world.note(node, "shoots the peer")
        world.crash(peer, power=True)
        return PEER_SHOT
    if peer.primary:
        return PEER_IS_PRIMARY
    for v in range(world.mix.n_volumes):
        n_refusals = len(peer.refusals)
        ticket = peer.command("outdate", v)
        if ticket in peer.commands or len(peer.refusals) > n_refusals:
            return BROKEN
        if peer.state(v).disk > DiskState.OUTDATED:
            return BROKEN
    return PEER_OUTDATED
