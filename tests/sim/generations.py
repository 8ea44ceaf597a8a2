"""Who began which data generation, and which of them excuse a split brain.

With fencing, or with a careful operator, two histories must not come about. The exceptions are few, and each
belongs to one generation: one that was begun after the operator let frozen I/O go on, or promoted a node that
was behind, or detached a Primary's disk so that only the peer heard of it; and one that was on its way to a disk
when that disk failed, which nobody was ever shown. A split brain between other generations has no excuse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tandem.repl.requests import META

from .ondisk import SuperView, super_at

if TYPE_CHECKING:
    from .checkers import DiskRecord
    from .node import Node
    from .world import World


@dataclass(slots=True)
class Birth:
    """A generation: the node that began it, in which of its lives and between which meetings with the peer."""

    when: tuple[int, int, int]  # node, boots, meetings
    why: str = ""  # what excuses it


def slots(view: SuperView) -> set[int]:
    return {uuid & ~1 for uuid in (view.current, view.bitmap, view.history0, view.history1)}


class Generations:
    """Every current UUID that any disk was ever to hold."""

    def __init__(self, world: World) -> None:
        self.w = world
        self.births: dict[tuple[int, int], Birth] = {}  # by volume and UUID
        self._excused: dict[tuple[int, int, int], str] = {}

    def seen(self, node: Node, volume: int, current: int) -> None:
        """A superblock with this current UUID goes to a disk of *node*."""
        when = (node.index, node.n_boots, node.n_meetings)
        self.births.setdefault((volume, current & ~1), Birth(when, self._excused.get(when, "")))

    def excuse(self, node: Node, why: str) -> None:
        """What *node* begins between its last meeting with the peer and the next is excused."""
        when = (node.index, node.n_boots, node.n_meetings)
        self._excused[when] = why
        for birth in self.births.values():
            if birth.when == when:
                birth.why = why

    def lost(self, node: Node, volume: int, record: DiskRecord) -> None:
        """A Primary's disk fails an operation, and is given up.

        A generation under way may reach it all the same, as DRBD's does, which writes its metadata also to a disk
        that is Failed (drbd_md_sync): nobody was shown it, but compared with the peer's next one it is a history
        of its own. DRBD does not promise that such a disk is taken back without a word of the operator.
        """
        assert node.engine is not None
        coming = {identity[1] for identity in record.super_flying} | {node.engine.volumes[volume].uuids.current & ~1}
        for current in coming - set(record.super_durable[1:2]):
            self.seen(node, volume, current)
            self.births[volume, current & ~1].why = "its disk failed before anybody was shown it"

    def excuse_for_split(self) -> str:
        """Why the disks may belong to two histories; an empty string when nothing excuses that."""
        for v in range(self.w.mix.n_volumes):
            a, b = (slots(super_at(n.disks[v].devices[META].live, n.layouts[v])) for n in self.w.nodes)
            for uuid in sorted(a ^ b):
                birth = self.births.get((v, uuid))
                if birth is not None and birth.why:
                    return birth.why
        return ""
