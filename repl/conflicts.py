"""Two Primaries: whose write comes first when both change the same sectors at once.

Both nodes must end with the same bytes, and neither can see what the other has under way. So one of them
decides, the resolver (the node that accepted the meta socket). Where a write of the peer meets one of its own
that the peer has not answered yet, its own counts as the later one: of the peer's it writes what its own leave
uncovered, once those are on its disk, and acknowledges the whole. The other node waits for that ack, finishes
the write on its own disk, and only then writes what the resolver sent.

That works because of two things kept here: our writes wait for those of the peer that are not finished, and
the resolver looks at a write only when it has seen every ack the peer sent before it (the sequence number).

A kernel that resolves refuses such a write instead: P_SUPERSEDED if its own covers the whole, else
P_RETRY_WRITE, and the write is to be sent again as a new one when the resolver's has arrived. We do as we are
told and refuse nothing ourselves, because a kernel may stop for good over it: its one worker that sends writes
again waits until nothing overlaps, also for one that is to be sent again by that worker (do_retry).

A write of ours which the peer has answered but our own disk has not is no conflict: the peer's came after it,
so it waits for our disk. (DRBD refuses there too, and leaves two different disks behind.)

Source: drbd_receiver.c (handle_write_conflicts, wait_for_and_update_peer_seq, restart_conflicting_writes),
drbd_req.c (complete_conflicting_writes, POSTPONE_WRITE, CONFLICT_RESOLVED). Overlaps are compared by sector,
as DRBD does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .errors import PeerProtocolError
from .intervals import Range
from .meta_writer import CallbackOp
from .requests import (
    AL_REF,
    DATA,
    FUA,
    LOCAL,
    MAY_UNMAP,
    POSTPONED,
    PREFLUSH,
    DiskOp,
    PeerWrite,
    Request,
)
from .states import ConnState
from .volume import HALF, Volume
from .wire import Packet

if TYPE_CHECKING:
    from .engine import Engine


class Conflicts:
    """What waits for what while both nodes write."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.postponed: list[Request] = []  # ours, to be sent again when the resolver's write has arrived
        self._due: list[Request] = []  # of these, those whose time has come
        self._waiting: dict[PeerWrite, Volume] = {}  # the peer's, until one of ours is out of the way
        self._told = False
        self._gate_until: float | None = None  # when we give up on acks sent before a write that is here

    # ------------------------------------------------------------------------------ order of the sockets

    def in_order(self, vol: Volume, seq: int) -> bool:
        """Have all acks arrived that the peer sent before its write number *seq*?

        If not, the write has to wait; `acks_arrived` brings it up again. Only the resolver needs to know.
        """
        if vol.dual and self.e.link.resolver and 1 < seq - vol.peer_seq & 0xFFFFFFFF < HALF:
            if self._gate_until is None:
                self._gate_until = self.e.now + self.e.config.net.timeout / 10
            return False
        vol.saw(seq)
        self._gate_until = None
        return True

    def acks_arrived(self) -> None:
        """The peer's acks came in: perhaps the write that waited for them may go on."""
        if self._gate_until is not None:
            self.e.replica.go_on()

    def deadline(self) -> float | None:
        return self._gate_until

    def tick(self, now: float) -> None:
        """DRBD waits for ping-timeout only; but to drop this connection is a split brain."""
        if self._gate_until is not None and now >= self._gate_until:
            self._gate_until = None
            self.e.drop(ConnState.PROTOCOL_ERROR, "acks of the peer that precede its writes did not arrive in time")

    # ------------------------------------------------------------------------------ our writes

    def peer_first(self, vol: Volume, r: Request) -> bool:
        """Must our write wait because the peer's are under way there? Then it is started again later."""
        if not vol.n_untracked and vol.peer_intervals.blocker(r.offset, r.length) is None:
            return False
        vol.behind_peer.append(r)
        return True

    def peer_progressed(self, vol: Volume) -> None:
        """A write of the peer ended: what waited for it tries again."""
        for _ in range(len(vol.behind_peer)):
            self.e.mirror.start(vol, vol.behind_peer.popleft())

    def refused(self, r: Request, cmd: int, finished: list[Request]) -> None:
        """P_SUPERSEDED or P_RETRY_WRITE for our write *r*."""
        if self.e.link.resolver:
            raise PeerProtocolError(f"{Packet(cmd).name}, but conflicts are for this node to resolve")
        self.e.log.take_out(r)
        if cmd == Packet.RETRY_WRITE:
            r.legs |= POSTPONED
            self.postponed.append(r)
            if not self.e.volumes[r.volume].local:
                self._due.append(r)  # the resolver's was refused without waiting for ours: we have no disk
            self.e.mirror.peer_let_go(r, finished)
        else:
            self.e.mirror.peer_acked(r, False, finished)

    def restart(self, vol: Volume, w: PeerWrite) -> None:
        """The resolver's write *w* was answered: what it stood against is sent as new."""
        self._due += [
            r for r in self.postponed
            if r.volume == vol.number and _overlap(r, w) and r not in self._due
        ]  # fmt: skip
        self.send_again(vol)

    def send_again(self, vol: Volume) -> None:
        """Start anew what is due, unless nothing may start now.

        Meanwhile it keeps its range and its extents: our disk has it and the peer's has not.
        """
        if not self._due or self.e.mirror.holds_back(vol):
            return
        for r in [r for r in self._due if r.volume == vol.number and not r.waiting]:
            self._due.remove(r)
            self.postponed.remove(r)
            r.legs &= AL_REF
            self.e.mirror.start(vol, r)

    # ------------------------------------------------------------------------------ the peer's writes

    def settle(self, vol: Volume, w: PeerWrite) -> list[Request] | None:
        """The writes of ours that the peer's goes beneath; None: not now, it comes back when it may."""
        ours = [r for r in vol.intervals.overlapping(w.offset, w.length) if isinstance(r, Request) and _overlap(r, w)]
        ours = [r for r in ours if r.waiting]  # the others have not started: they will wait
        if not self.e.link.resolver:
            if ours:
                self._waiting[w] = vol
                vol.intervals.wait(ours[0], lambda: self._again(w))
                return None
        elif any(r.waiting & LOCAL for r in ours):
            # The peer's client is told that it is written, and what it flushes then must be ours already.
            self._waiting[w] = vol
            self.e.when(lambda: not any(r.waiting & LOCAL for r in ours), lambda: self._again(w))
            return None
        return ours

    def _again(self, w: PeerWrite) -> None:
        vol = self._waiting.pop(w, None)
        if vol is not None:
            self.e.replica.begin(vol, w)

    def write_beneath(self, vol: Volume, w: PeerWrite, ours: list[Request]) -> None:
        """Write what *ours* leave uncovered of the peer's write; then `Replica.local_done`, as for any other."""
        if not self._told:
            self._told = True
            what = f"local {ours[0].offset >> 9}s +{ours[0].length}, remote {w.sector}s +{w.length}"
            self.e.note(vol, f"Concurrent writes detected: {what}", why="said once per connection", level="warning")
        Beneath(self.e, vol, w, list(_uncovered(w, ours))).begin()

    # ------------------------------------------------------------------------------ ends

    def peer_gone(self) -> None:
        """The connection is over: what the peer wrote and we did not start is dropped, ours may start."""
        self._gate_until = None
        self._told = False
        waiting, self._waiting = self._waiting, {}
        for w, vol in waiting.items():
            self.e.replica.withdraw(vol, w)
        for vol in self.e.volumes.values():
            self.peer_progressed(vol)

    def take_postponed(self) -> list[Request]:
        """Ours that were to be sent again, for whoever settles the transfer log of a lost connection."""
        postponed, self.postponed, self._due = self.postponed, [], []
        for r in postponed:
            r.legs &= ~POSTPONED
        return postponed


class Beneath:
    """A write of the peer of which only some *parts* are left to be written: (begin, end) in bytes on the device.

    PREFLUSH and FUA are flushes of their own here: what they are about is, in part, writes of ours.
    """

    def __init__(self, engine: Engine, vol: Volume, w: PeerWrite, parts: list[tuple[int, int]]) -> None:
        self.e = engine
        self.vol = vol
        self.w = w
        self.parts = parts
        self._n_out = 0

    def begin(self) -> None:
        if self.w.flags & PREFLUSH:
            self.e.flushes.local.flush(self.vol, self._write)
        else:
            self._write(0)

    def _write(self, error: int) -> None:
        w = self.w
        if error or not self.parts:
            self.e.stories.append(lambda _: self._written(error))
            return
        self._n_out = len(self.parts)
        for begin, end in self.parts:
            data = None if w.payload is None else memoryview(w.payload)[begin - w.offset : end - w.offset]
            self.e.out.disk.append(
                CallbackOp(w.op, w.volume, begin, end - begin, data, w.flags & MAY_UNMAP, DATA, self._part_written)
            )

    def _part_written(self, op: DiskOp) -> None:
        self.vol.data_version += 1
        self.w.error = self.w.error or op.error
        self._n_out -= 1
        if not self._n_out:
            self._written(self.w.error)

    def _written(self, error: int) -> None:
        if self.w.flags & FUA and not error:
            self.e.flushes.local.flush(self.vol, self._end)
        else:
            self._end(error)

    def _end(self, error: int) -> None:
        self.w.error = error
        self.e.replica.local_done([self.w])
        self.e.disks.local_idle(self.vol)


def _uncovered(w: Range, ours: list[Request]) -> Iterator[tuple[int, int]]:
    """The (begin, end) of what is left of *w* beneath *ours*, which all overlap it."""
    at, end = w.offset, w.offset + w.length
    for r in sorted(ours, key=lambda r: r.offset):
        if r.offset > at:
            yield at, r.offset
        at = max(at, r.offset + r.length)
    if at < end:
        yield at, end


def _overlap(a: Range, b: Range) -> bool:
    return a.offset < b.offset + b.length and b.offset < a.offset + a.length
