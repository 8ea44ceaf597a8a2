"""The operator: brings the pair up, gives commands while there is trouble, heals everything at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tandem.repl.config import Fencing
from tandem.repl.requests import META
from tandem.repl.states import ConnState, DiskState, Role

from .mix import LARGE
from .ondisk import super_at

if TYPE_CHECKING:
    from .node import Node
    from .world import Option, World

C = ConnState
D = DiskState

HEAL_STEPS_MAX: Final = 60_000
HEAL_SECONDS_MAX: Final = 900.0
FROZEN_PATIENCE_S: Final = 60.0
IDLE_ROUNDS_MAX: Final = 40
IDLE_PER_PATIENCE: Final = IDLE_ROUNDS_MAX // 2

# ---------------------------------------------------------------------------------------- the start


def bring_up(world: World) -> None:
    """Both nodes boot; with fresh metadata the first is promoted by force once they are connected."""
    for node in world.nodes:
        for v in range(world.mix.n_volumes):
            if world.mix.fresh:
                node.create_md(v)
            else:
                node.make_equal(v, 0xC0FFEE_0000 + 0x100 * v)
    for node in world.nodes:
        node.boot()
    if world.mix.fresh:
        _until_connected(world)
        world.nodes[0].command("primary", force=True)


def start_connected(world: World, primary: int | None = 0) -> None:
    """The usual starting point of a scenario: connected, one Primary with its exports open."""
    bring_up(world)
    _until_connected(world)
    if primary is not None:
        world.nodes[primary].command("primary")
        settle(world)
        assert world.nodes[primary].primary, "the promotion did not succeed"


def _until_connected(world: World) -> None:
    troubled, world.troubled = world.troubled, False
    for _ in range(3000):
        if all(node.connected for node in world.nodes) and world.quiet:
            break
        world.step()
    else:
        world.fail("liveness", "two healthy nodes do not connect")
    world.troubled = troubled


def settle(world: World, steps_max: int = 5000) -> None:
    """Let everything that is on its way arrive, without trouble and without moving the clock."""
    troubled, world.troubled = world.troubled, False
    client, world.client_on = world.client_on, False
    for _ in range(steps_max):
        options = world.progress()
        if not options:
            break
        world.n_steps += 1
        _, action, args = options[0]
        action(*args)
        world.checks.after_step()
    world.troubled, world.client_on = troubled, client


# --------------------------------------------------------------------------------- during the trouble


def add_options(world: World, options: list[Option]) -> None:
    """What the operator might do now."""
    w = world.mix.admin
    a, b = world.nodes
    for node in world.nodes:
        if w and node.attaches and not (node.primary or node.opened):  # reading a large disk takes a while
            options.append((w / 8, command, (node, "down")))
            options.append((w / 8, command, (node, "detach", node.attaches[0].volume)))
        if node.engine is None or node.commands:
            continue
        if node.closing and not node.clients.open:
            options.append((2.0, finish_demotion, (node,)))
        promoting = any(c.name in ("primary", "secondary") for c in world.peer_of(node).commands.values())
        if not (a.primary or b.primary or promoting or node.attaches) and _may_promote(world, node):
            options.append((1.0, command, (node, "primary")))
            if world.mix.auto_promote:
                options.append((2.0, open_first, (node,)))
        elif node.primary and world.mix.auto_promote and not node.opened:
            options.append((0.5, command, (node, "secondary")))  # its clients went, the peer did not agree to more
        if world.mix.two_primaries and not node.primary and node.connected and _may_promote(world, node):
            options.append((0.5, command, (node, "primary")))
        if node.state().conn is C.STAND_ALONE:
            options.append((0.5, command, (node, "connect")))
            if not node.primary and brain_is_split(world):
                options.append((0.5, give_in, (node,)))
        for v in range(world.mix.n_volumes):
            s = node.state(v)
            if s.disk is D.DISKLESS and not node.attaches:
                options.append((0.5, command, (node, "attach", v)))
            if s.user_isp:
                options.append((0.5, command, (node, "resume-sync", v)))
            if s.susp:
                options.append((0.5, command, (node, "resume-io", v)))
                break
        if w:
            _add_mischief(world, node, options, w)


def _add_mischief(world: World, node: Node, options: list[Option], w: float) -> None:
    s = node.state()
    v = world.n_steps % world.mix.n_volumes
    sv = node.state(v)
    peer = world.peer_of(node)
    if node.primary and not node.closing:
        options.append((w / 2, close_clients, (node,)))
        options.append((w / 8, demote_by_force, (node,)))
    if s.conn >= C.WF_CONNECTION:
        options.append((w / 3, command, (node, "disconnect")))
    if sv.disk >= D.INCONSISTENT and s.conn >= C.CONNECTED:
        options.append((w / 4, command, (node, "detach", v)))
    if s.conn >= C.CONNECTED:
        full = w if world.mix.size < LARGE else w / 20  # copying all of a large disk takes long
        if sv.disk >= D.INCONSISTENT and not node.primary:
            options.append((full / 4, invalidate, (node, v, node, "invalidate")))
        if sv.pdsk >= D.INCONSISTENT and not peer.primary:
            options.append((full / 6, invalidate, (node, v, peer, "invalidate-remote")))
        if s.conn in (C.SYNC_SOURCE, C.SYNC_TARGET):
            options.append((w, command, (node, "pause-sync", v)))
        if world.mix.verify and world.mix.size < LARGE:
            options.append((w / 3, command, (node, "verify", v)))
    elif not node.primary and sv.disk in (D.CONSISTENT, D.UP_TO_DATE) and not world.ledgers[v].copies[peer.index].lacks:
        options.append((w / 8, command, (node, "outdate", v)))
    if node.primary:
        options.append((w / 5, command, (node, "suspend-io", v)))
    if not node.primary and not node.opened:
        options.append((w / 8, command, (node, "down")))


def _may_promote(world: World, node: Node) -> bool:
    """Would a careful operator promote this node now? A risky one asks less."""
    if node.state().conn >= C.CONNECTED:
        # A peer without a disk cannot tell what its disk knows.
        volumes = range(world.mix.n_volumes)
        for v in volumes:
            s = node.state(v)
            if s.pdsk < D.INCONSISTENT and behind(world, node, v):
                return False
            if s.disk < D.INCONSISTENT and behind(world, world.peer_of(node), v):
                return False
        return True
    if any(node.state(v).disk not in (D.UP_TO_DATE, D.CONSISTENT) for v in range(world.mix.n_volumes)):
        return False
    if world.mix.fencing is not Fencing.DONT_CARE:
        # The machine must refuse a node that is behind, unless a fencing that was overtaken tells it otherwise.
        volumes = range(world.mix.n_volumes)
        return all(node.state(v).pdsk > D.OUTDATED or not behind(world, node, v) for v in volumes)
    if world.mix.risky:
        return True
    return not any(behind(world, node, v) for v in range(world.mix.n_volumes))


def behind(world: World, node: Node, volume: int) -> bool:
    """Does the peer's disk know a newer generation, or answered writes that this one lacks?"""
    peer = world.peer_of(node)
    if world.ledgers[volume].copies[node.index].lacks:
        return True
    own, other = (super_at(n.disks[volume].devices[META].live, n.layouts[volume]) for n in (node, peer))
    return other.bitmap != 0 or own.current & ~1 != other.current & ~1


def brain_is_split(world: World) -> bool:
    """Does each copy of a volume lack answered writes that the other has?"""
    return any(all(copy.lacks for copy in ledger.copies) for ledger in world.ledgers)


def give_in(node: Node) -> None:
    """The operator decides against this node's changes."""
    node.world.discard(node)
    node.command("connect", discard_my_data=True)


def command(node: Node, name: str, volume: int | None = None) -> None:
    generations = node.world.checks.generations
    if name == "resume-io" and node.primary:
        generations.excuse(node, "the operator let frozen I/O go on")
    if name == "detach" and node.primary:
        for one in node.world.nodes:  # one that only the peer has heard of makes a generation there, as in DRBD
            generations.excuse(one, "a Primary was told to detach")
    node.command(name, volume)


def close_clients(node: Node) -> None:
    """The applications stop; when the last request is answered the node is demoted."""
    node.world.note(node, "clients are told to stop")
    node.closing = True


def finish_demotion(node: Node) -> None:
    node.close_exports()
    if node.engine is not None and not node.auto:
        node.command("secondary")
    node.closing = node.auto = False


def open_first(node: Node) -> None:
    """A client that wants to write comes to a Secondary (auto-promote)."""
    node.auto = True
    node.command("primary", auto=True)


def demote_by_force(node: Node) -> None:
    """secondary --force: the clients' sessions end, what they have under way is finished."""
    node.close_exports()
    node.closing = node.auto = False
    node.command("secondary")


def invalidate(node: Node, volume: int, victim: Node, name: str) -> None:
    node.world.discard(victim, volume)
    node.command(name, volume)


# ------------------------------------------------------------------------------------------ healing


class Healer:
    """Ends the trouble: boots, attaches, connects, resolves split brain, until both nodes agree."""

    def __init__(self, world: World) -> None:
        self.w = world
        self.n_connects = 0
        self.n_resolutions = 0
        self.n_attaches = 0
        self.since = world.now

    def heal(self) -> None:
        world = self.w
        world.troubled = False
        world.client_on = False
        for node in world.nodes:  # TCP itself gives up on a stream that is never acknowledged
            for pipe in node.link.inbound if node.link is not None else ():
                pipe.silent = False
        world.mix = replace(world.mix, chunk=False, trickle=False, early=False, tick=0.05, reconnect=4.0)
        limit = HEAL_SECONDS_MAX + world.mix.size / (100 << 10)
        start, n_idle = world.n_steps, 0
        while not self._healed():
            if world.n_steps - start > HEAL_STEPS_MAX or world.now - self.since > limit:
                world.fail(
                    "liveness",
                    f"not healed after {world.now - self.since:.0f} s, {world.n_steps - start} steps",
                )
            self._operate()
            n_idle = 0 if world.step() else n_idle + 1
            if n_idle:  # nobody waits for a moment: the operator's patience with frozen I/O ends all the same
                world.now += FROZEN_PATIENCE_S / IDLE_PER_PATIENCE
            if n_idle > IDLE_ROUNDS_MAX:  # a few, because the operator may have just acted
                world.fail("liveness", "nothing can happen any more, and the nodes do not agree")
        world.checks.check_agreement()
        world.checks.check_end()

    def _healed(self) -> bool:
        world = self.w
        return world.healthy and not any(n.commands or n.closing for n in world.nodes)

    def _operate(self) -> None:
        world = self.w
        for node in world.nodes:
            if node.engine is None:
                node.boot()
        nodes = world.nodes
        if any(n.attaches or any(c.name != "secondary" for c in n.commands.values()) for n in nodes):
            return
        for node in nodes:
            if node.commands:
                self._thaw(node)  # a demotion waits for the peer's answers, or for the end of the suspension
            elif node.closing and not node.clients.open:
                finish_demotion(node)
            else:
                self._repair(node)
        if all(n.engine is not None and all(c.name == "secondary" for c in n.commands.values()) for n in nodes):
            self._reconnect()
            self._choose_source()

    def _thaw(self, node: Node) -> bool:
        """Let suspended I/O go on: what the operator suspended at once, what the machine froze after a while."""
        for v in range(self.w.mix.n_volumes):
            s = node.state(v)
            if s.susp or ((s.susp_fen or s.susp_nod) and self.w.now - self.since > FROZEN_PATIENCE_S):
                node.command("resume-io", v)
                return True
        return False

    def _repair(self, node: Node) -> None:
        world = self.w
        if self._thaw(node):
            return
        for v in range(world.mix.n_volumes):
            s = node.state(v)
            if s.user_isp:
                node.command("resume-sync", v)
                return
            if s.disk is D.DISKLESS and not node.attaches:
                self._attach(node, v)
                return

    def _attach(self, node: Node, volume: int) -> None:
        """Attach; a disk that is refused (not the data shown last) needs a demotion, a disconnect, a restart."""
        self.n_attaches += 1
        if self.n_attaches > 60:
            self.w.fail("liveness", f"{node.config.node} cannot attach: {node.refusals[-3:]}")
        if self.n_attaches % 12 == 4 and node.primary:
            close_clients(node)
        elif self.n_attaches % 12 == 7 and node.state().conn is not C.STAND_ALONE:
            node.command("disconnect")
        elif self.n_attaches % 12 == 10:
            self.w.split_possible = True
            self.w.crash(node, power=False)
        else:
            node.command("attach", volume)

    def _reconnect(self) -> None:
        """StandAlone nodes connect again; when that does not hold, the brain is split: one side gives in."""
        world = self.w
        alone = [n for n in world.nodes if n.state().conn is C.STAND_ALONE]
        if not alone:
            return
        if self.n_connects < 2 * len(world.nodes):
            for node in alone:
                self.n_connects += 1
                node.command("connect")
            return
        if not world.split_possible and self._good_everywhere():
            why = world.checks.generations.excuse_for_split()
            if not why:
                self._refuse_split_brain()
            world.note(None, "split brain, because", why)
        self._resolve(alone)

    def _good_everywhere(self) -> bool:
        """Is there good data for each volume?"""
        volumes = range(self.w.mix.n_volumes)
        return all(any(n.state(v).disk >= D.CONSISTENT for n in self.w.nodes) for v in volumes)

    def _refuse_split_brain(self) -> None:
        self.w.fail("history", "the nodes stay StandAlone although no split brain can have happened")

    def _resolve(self, alone: list[Node]) -> None:
        world = self.w
        secondaries = [n for n in world.nodes if not n.primary]
        victim = secondaries[0] if secondaries else world.nodes[0]
        if victim.primary:
            victim.closing = True
            return
        if not self._good_everywhere():
            self._force(world.peer_of(victim))  # nobody has good data: somebody's must do
            return
        self.n_resolutions += 1
        world.note(victim, "gives in")
        world.discard(victim)
        if self.n_resolutions > 4:
            if self.n_resolutions > 8:
                world.fail("liveness", "split brain cannot be resolved")
            world.crash(victim, power=False)
            for v in range(world.mix.n_volumes):
                victim.create_md(v)
            victim.boot()
            if world.peer_of(victim).state().conn is C.STAND_ALONE:
                world.peer_of(victim).command("connect")
            return
        if victim.state().conn is not C.STAND_ALONE:
            victim.command("disconnect")
            return
        victim.command("connect", discard_my_data=True)
        survivor = world.peer_of(victim)
        if survivor.state().conn is C.STAND_ALONE:
            survivor.command("connect")

    def _choose_source(self) -> None:
        """Connected, nobody UpToDate: somebody must be declared good."""
        nodes = self.w.nodes
        if not all(n.connected for n in nodes) or any(n.commands for n in nodes):
            return
        for v in range(self.w.mix.n_volumes):
            states = [n.state(v) for n in nodes]
            if all(s.conn is C.CONNECTED for s in states) and {s.disk for s in states} == {
                D.INCONSISTENT,
                D.UP_TO_DATE,
            }:
                broken = next(n for n in nodes if n.state(v).disk is D.INCONSISTENT)
                broken.command("detach", v)  # attached again, it becomes the target
                return
            if all(s.conn is C.CONNECTED and s.disk is D.INCONSISTENT for s in states):
                self._force(next((n for n in nodes if n.primary), nodes[0]))
                return

    def _force(self, node: Node) -> None:
        self.w.split_possible = True
        if node.primary:
            close_clients(node)
            return
        for ledger in self.w.ledgers:
            for copy in ledger.copies:
                copy.discarded = True
        node.command("primary", force=True)


def is_secondary(node: Node) -> bool:
    return node.engine is not None and node.state().role is Role.SECONDARY
