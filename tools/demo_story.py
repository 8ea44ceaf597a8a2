"""The story: a node dies in mid-write, its peer takes over, and only what differs travels afterwards.

Played unattended with `make demo STORY=1`. Each chapter says what it has proved, and raises `Broken` when
it did not hold. Nothing waits for a time: every step follows from an event of the daemons, or from replies.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from . import demo_tree
from .demo_nbd import Cmd, ConnectionLost, Nbd, Request, read, write
from .demo_pair import RESOURCE, Pair, alone, connected, first_difference, in_sync, usable_size
from .demo_tree import BLOCK

MIB: Final = 1 << 20
EXTENT: Final = 4 * MIB  # what one entry of the activity log covers
DEPTH: Final = 16
CHUNKS: Final = (BLOCK, 2 * BLOCK, 16 * BLOCK, 64 * BLOCK)
FLUSH_EVERY: Final = 50  # writes

Say = Callable[[str], None]


class Broken(Exception):
    """Something that was promised did not hold; one sentence."""


@dataclass(slots=True)
class Story:
    """One playing of the story on *pair*, which has nothing yet. *say* is given every line."""

    pair: Pair
    seed: int
    say: Say
    image: Path = field(init=False)
    writes: list[Request] = field(default_factory=list)
    size: int = 0
    n_chapter: int = 0

    def __post_init__(self) -> None:
        self.image = self.pair.directory / "files.ext4"

    def play(self) -> None:
        """All chapters; Broken, or what the pair raises, when one of them fails."""
        began = time.monotonic()
        self.say(f"The story of {self.pair.first.name} and {self.pair.second.name}, seed {self.seed}")
        self.two_nodes()
        self.a_file_system()
        self.killed_while_writing()
        self.promoted()
        self.read_back()
        self.written_alone()
        self.back_again()
        self.roles_change()
        self.compared()
        self.say(f"\nAll of it held, in {time.monotonic() - began:.0f} seconds.")

    def chapter(self, title: str) -> None:
        self.n_chapter += 1
        self.say(f"\n{self.n_chapter}. {title}")

    def proved(self, text: str) -> None:
        self.say(f"   {text}")

    # -------------------------------------------------------------------------------- chapters

    def two_nodes(self) -> None:
        one, other = self.pair.nodes
        self.chapter(f"Two disks of {self.pair.size // MIB} MiB with metadata; both nodes up; first copy.")
        self.pair.create()
        self.pair.up()
        self.pair.adm(one, "primary", "--force", RESOURCE)
        self.pair.adm(one, "wait-sync", RESOURCE)
        status = self.pair.wait(other, "in sync", in_sync)
        self.size = usable_size(status)
        copied = status.connection.volumes[0].received
        self.proved(f"{copied // BLOCK} blocks of 4 KiB were copied; both disks are UpToDate.")

    def a_file_system(self) -> None:
        self.chapter("A file system with real files in it.")
        tree = self.pair.directory / "tree"
        n_files = demo_tree.make_tree(tree, self.seed)
        demo_tree.make_image(self.image, tree, self.size - self.size % BLOCK)
        self.writes = list(self._cut_up())
        total = sum(request.length for request in self.writes)
        self.proved(
            f"{n_files} files, {total / MIB:.1f} MiB of data, which go in as {len(self.writes)} writes."
        )

    def _cut_up(self) -> Iterator[Request]:
        """The image's data as writes of many sizes, in the order of their offsets."""
        draw = random.Random(self.seed)
        with open(self.image, "rb") as image:
            for start, length in demo_tree.data_ranges(self.image):
                at, end = start, start + length
                while at < end:
                    n_bytes = min(draw.choice(CHUNKS), end - at)
                    image.seek(at)
                    yield write(at, image.read(n_bytes))
                    at += n_bytes

    def killed_while_writing(self) -> None:
        node = self.pair.first
        self.chapter(f"The writes go to {node.name} over NBD; in the middle it is killed with SIGKILL.")
        pid = self.pair.pid(node)
        if pid is None:
            raise Broken(f"the daemon of {node.name} does not run")
        enough, n_acknowledged = len(self.writes) // 2, 0

        def answered(request: Request) -> None:
            nonlocal n_acknowledged
            if request.error:
                raise Broken(f"the write at {request.offset} got NBD error {request.error}")
            if request.kind == Cmd.WRITE:
                n_acknowledged += 1
                if n_acknowledged == enough:
                    os.kill(pid, signal.SIGKILL)

        try:
            with Nbd(node.socket, RESOURCE) as nbd:
                nbd.run(_with_flushes(self.writes), DEPTH, answered)
            raise Broken(f"{node.name} went on after it was killed")
        except ConnectionLost:
            pass  # this is what the chapter is about
        self.pair.kill(node)
        n_unknown = len(self._unknown())
        self.proved(
            f"{node.name} is dead. {n_acknowledged} writes were acknowledged, {n_unknown} were under way."
        )

    def _unknown(self) -> list[Request]:
        """Writes that were under way, as far as can be known: sent perhaps, and never answered."""
        return [request for request in self._sent() if not request.answered]

    def _sent(self) -> list[Request]:
        """Writes that the first node may have seen; all that were answered are among them."""
        last = max(i for i, request in enumerate(self.writes) if request.answered)
        return self.writes[: last + DEPTH]

    def promoted(self) -> None:
        node = self.pair.second
        self.chapter(f"{node.name} notices and is promoted.")
        self.pair.wait(node, "without its peer", alone)
        self.pair.adm(node, "primary", RESOURCE)
        dstate = self.pair.adm(node, "dstate", RESOURCE).strip()
        if not dstate.startswith("UpToDate/"):
            raise Broken(f"{node.name} was promoted with disk states {dstate}")
        self.proved(f"{node.name} is Primary, disk states {dstate}, and needed no --force.")

    def read_back(self) -> None:
        node = self.pair.second
        self.chapter(f"Every acknowledged write is read back from {node.name}.")
        acknowledged = [request for request in self.writes if request.acknowledged]
        unknown = self._unknown()
        with Nbd(node.socket, RESOURCE) as nbd:
            n_same = self._compare(nbd, acknowledged)
            n_there = 0
            for request in unknown:
                found = nbd.read(request.offset, request.length)
                _old_or_new(request, found)
                n_there += found == request.data
        self.proved(f"All {n_same} are there, byte by byte.")
        self.proved(
            f"Of the {len(unknown)} that nobody was promised, {n_there} had arrived; "
            "no sector holds anything but its old or its new bytes."
        )

    def _compare(self, nbd: Nbd, writes: list[Request]) -> int:
        """Read everything in *writes*; how many were as written. Broken at the first that is not."""
        wanted = {request.offset: request for request in writes}

        def answered(done: Request) -> None:
            if done.error or done.data != wanted[done.offset].data:
                raise Broken(f"the acknowledged write of {done.length} bytes at {done.offset} is not there")
            done.data = b""

        nbd.run((read(request.offset, request.length) for request in writes), DEPTH, answered)
        return len(wanted)

    def written_alone(self) -> None:
        node = self.pair.second
        self.chapter(f"The rest of the file system is written to {node.name} alone.")
        rest = [request for request in self.writes if not request.acknowledged]
        alone_writes = [write(request.offset, request.data) for request in rest]
        with Nbd(node.socket, RESOURCE) as nbd:
            nbd.run(_with_flushes(alone_writes), DEPTH)
            nbd.flush()
        failed = [request for request in alone_writes if not request.acknowledged]
        if failed:
            raise Broken(f"{len(failed)} writes to {node.name} failed, the first at {failed[0].offset}")
        marked = self.pair.status(node).connection.volumes[0].out_of_sync // BLOCK
        written = len(_blocks(rest))
        if marked < written:
            raise Broken(f"{written} blocks were written alone, and only {marked} are marked out of sync")
        self.proved(f"{written} blocks were written and flushed; {marked} are marked out of sync.")

    def back_again(self) -> None:
        node, peer = self.pair.nodes
        self.chapter(f"{node.name} comes back.")
        self.pair.adm(node, "up", RESOURCE)
        self.pair.wait(node, "connected", connected)
        self.pair.adm(node, "wait-sync", RESOURCE)
        status = self.pair.wait(node, "in sync", in_sync)
        self.pair.wait(peer, "in sync", in_sync)
        n_copied = status.connection.volumes[0].received // BLOCK
        rest = [request for request in self.writes if not request.acknowledged]
        least = _blocks(rest)
        most = least | _extent_blocks(self._sent(), self.size)
        if not len(least) <= n_copied <= len(most):
            raise Broken(f"{n_copied} blocks travelled, between {len(least)} and {len(most)} should have")
        full = -(-self.size // BLOCK)
        self.proved(
            f"{n_copied} blocks travelled ({n_copied * BLOCK / MIB:.1f} MiB): what was written alone, and\n"
            f"   the extents in which {node.name} died writing.\n"
            f"   A full copy would have been {full} blocks ({self.size / MIB:.1f} MiB)."
        )

    def roles_change(self) -> None:
        node, peer = self.pair.nodes
        self.chapter(f"{peer.name} steps down, {node.name} is promoted again.")
        self.pair.adm(peer, "secondary", RESOURCE)
        self.pair.adm(node, "primary", RESOURCE)
        with Nbd(node.socket, RESOURCE) as nbd:
            n_same = self._compare(nbd, self.writes)
        self.proved(f"All {n_same} writes of the story are read back from {node.name}.")

    def compared(self) -> None:
        node, peer = self.pair.nodes
        self.chapter("Both nodes go down, and the disks are compared.")
        self.pair.down()
        at = first_difference(node.disk, peer.disk, self.size)
        if at is not None:
            raise Broken(f"the disks of {node.name} and {peer.name} differ at byte {at}")
        self.proved(f"{node.disk.name} and {peer.disk.name} have the same {self.size} bytes of data.")
        at = first_difference(node.disk, self.image, self.image.stat().st_size)
        if at is not None:
            raise Broken(f"the disk of {node.name} and the image that went in differ at byte {at}")
        demo_tree.check_image(peer.disk)
        self.proved(f"They are the file system that went in, and e2fsck finds {peer.name}'s copy clean.")


def _with_flushes(writes: list[Request]) -> Iterator[Request]:
    for i, request in enumerate(writes, 1):
        yield request
        if i % FLUSH_EVERY == 0:
            yield Request(Cmd.FLUSH)


def _old_or_new(request: Request, found: bytes) -> None:
    """Broken when a sector has neither the zeroes of the fresh disk nor what *request* wrote."""
    for at in range(0, request.length, 512):
        sector = found[at : at + 512]
        if sector not in (request.data[at : at + 512], bytes(512)):
            raise Broken(f"the sector at byte {request.offset + at} holds bytes that nobody wrote there")


def _blocks(writes: list[Request]) -> set[int]:
    """The bitmap blocks that *writes* touch."""
    return {
        block
        for request in writes
        for block in range(request.offset // BLOCK, -(-(request.offset + request.length) // BLOCK))
    }


def _extent_blocks(writes: list[Request], size: int) -> set[int]:
    """All blocks of the activity log extents that *writes* touch on a disk of *size* bytes."""
    n_blocks, per_extent = -(-size // BLOCK), EXTENT // BLOCK
    extents = {block // per_extent for block in _blocks(writes)}
    return {
        block
        for extent in extents
        for block in range(extent * per_extent, min((extent + 1) * per_extent, n_blocks))
    }
