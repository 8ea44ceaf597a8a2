"""Two Primaries: whose write comes first when both change the same sectors at once.

Both nodes must end with the same bytes, and neither can see what the other has under way. So one of them
decides, the resolver (the node that accepted the meta socket). A write of the peer that meets one of its own
which the peer has not answered yet is not written there: the resolver's own counts as the later one. If that
covers the whole of it, P_SUPERSEDED lets the peer answer its client, as soon as it is on the resolver's disk;
else, and for FUA writes, P_RETRY_WRITE makes the peer send it again as a new write, once the resolver's has
arrived. The other node waits for that word, finishes the write on its own disk, and only then writes what the
resolver sent.

That works because of three things kept here: our writes wait for those of the peer that are not finished;
the resolver looks at a write only when it has seen every ack the peer sent before it (the sequence number);
and a refused write is nobody's: it leaves the sender's transfer log, and the receiver does not count it.

A write of ours which the peer has answered but our own disk has not is no conflict: the peer's came after it,
so it waits for our disk. (DRBD refuses there too, and leaves two different disks behind.)

Source: drbd_receiver.c (handle_write_conflicts, wait_for_and_update_peer_seq, restart_conflicting_writes),
drbd_req.c (complete_conflicting_writes, POSTPONE_WRITE, CONFLICT_RESOLVED). Overlaps are compared by sector,
as DRBD does: a write refused for a block it only shares would wait in a kernel for ever.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import PeerProtocolError
from .intervals import Range
from .requests import AL_REF, FUA, LOCAL, PEER, POSTPONED, PeerEpoch, PeerWrite, Request
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

    def settle(self, vol: Volume, w: PeerWrite) -> bool:
        """May the peer's write go to the disk now? If not it is refused, or comes back when it may."""
        ours = [r for r in vol.intervals.overlapping(w.offset, w.length) if isinstance(r, Request) and _overlap(r, w)]
        ours = [r for r in ours if r.waiting or r.legs & POSTPONED]  # the others have not started: they will wait
        if self.e.link.resolver:
            unanswered = [r for r in ours if r.waiting & PEER]
            if unanswered:
                self._outdone(vol, w, unanswered)
                return False
        in_the_way = next((r for r in ours if r.waiting), None)
        if in_the_way is None:
            return True
        self._waiting[w] = vol
        vol.intervals.wait(in_the_way, lambda: self._again(w))
        return False

    def _again(self, w: PeerWrite) -> None:
        vol = self._waiting.pop(w, None)
        if vol is not None:
            self.e.replica.begin(vol, w)

    def _outdone(self, vol: Volume, w: PeerWrite, ours: list[Request]) -> None:
        """The peer's write lost to *ours*: say so, once that is true of our disk, too."""
        covered = any(r.offset <= w.offset and w.offset + w.length <= r.offset + r.length for r in ours)
        if not covered or w.flags & FUA:  # FUA: its client is told that it is stable, and ours may be in a cache
            self._refuse(vol, w, ours, Packet.RETRY_WRITE)
        elif any(r.waiting & LOCAL for r in ours):
            # Its client is told that it is written, and what it flushes then must be ours already.
            self._waiting[w] = vol
            self.e.when(lambda: not any(r.waiting & LOCAL for r in ours), lambda: self._again(w))
        else:
            self._refuse(vol, w, ours, Packet.SUPERSEDED)

    def _refuse(self, vol: Volume, w: PeerWrite, ours: list[Request], cmd: Packet) -> None:
        if not self._told:
            self._told = True
            what = f"local {ours[0].offset >> 9}s +{ours[0].length}, remote {w.sector}s +{w.length}"
            self.e.note(vol, f"Concurrent writes detected: {what}", why="said once per connection", level="warning")
        # A kernel takes a refused write out of its log no earlier than it has answered ours, and wants no
        # barrier ack before. Only the ack waits: ours may need the kernel's next write to be decided first.
        epoch = w.epoch
        epoch.held += len(ours)
        for r in ours:
            vol.intervals.wait(r, lambda: self._release(epoch))
        self.e.replica.refuse(vol, w, cmd)

    def _release(self, epoch: PeerEpoch) -> None:
        epoch.held -= 1
        self.e.replica.send_barrier_acks()

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


def _overlap(a: Range, b: Range) -> bool:
    return a.offset < b.offset + b.length and b.offset < a.offset + a.length
