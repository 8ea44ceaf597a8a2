"""A Primary that lost its peer: freeze, have the peer fenced, and go on; or meet the peer again first.

Source: drbd_nl.c, conn_try_outdate_peer; drbd_state.c, w_after_conn_state_ch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .config import Fencing
from .states import ConnState, DiskState, Role

if TYPE_CHECKING:
    from .engine import Engine


class FencingRoom:
    """Decides when fence-peer runs, what its exit code means, and when frozen I/O goes on."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        # Who waits for a handler's answer, and at which count of `_meetings` each began to.
        self._waiting: list[tuple[int, Callable[[bool], None]]] = []
        self._called: int | None = None  # the count at which the handler that runs was called
        self._n_partings = 0  # split brains
        self._parting = False  # we hang up on a peer that is there: the loss of the connection is not that of a peer

    @property
    def _meetings(self) -> int:
        """How often the peer has been heard of: what a handler does counts for the loss it was called for."""
        return self.e.n_established + self._n_partings

    @property
    def policy(self) -> Fencing:
        """The strictest policy of all volumes that hold usable data."""
        return max(
            (
                v.config.disk_options.fencing
                for v in self.e.volumes.values()
                if v.state.disk >= DiskState.CONSISTENT
            ),
            default=Fencing.DONT_CARE,
        )

    def peer_lost(self) -> None:
        """The connection of a Primary went: call the handler if the policy wants it, in the background."""
        volumes = self.e.volumes.values()
        if self._parting or not any(
            v.state.role == Role.PRIMARY and v.state.pdsk >= DiskState.D_UNKNOWN for v in volumes
        ):
            return
        if self.policy == Fencing.DONT_CARE:
            if any(v.state.susp_fen for v in volumes):
                self._unfreeze()  # no volume holds data worth protecting: pending requests fail
            return
        self.fence(lambda ok: None)

    def fence(self, then: Callable[[bool], None]) -> None:
        """Run fence-peer and act on its exit code; *then* is told whether the peer is out."""
        if self.policy == Fencing.DONT_CARE:
            volumes = self.e.volumes.values()
            wanted = any(v.config.disk_options.fencing != Fencing.DONT_CARE for v in volumes)
            if wanted:
                self.e.note(None, "Not fencing peer, I'm not even Consistent myself.", level="warning")
            then(not wanted)
            return
        self._waiting.append((self._meetings, then))
        if self._called is None:  # else the handler runs already, and one at a time is enough
            self._called = self._meetings
            self.e.run_handler("fence-peer", None, self._exited)

    def _exited(self, code: int) -> None:
        """The handler's word counts for those who have waited since before it was called."""
        called, self._called = self._called, None
        waiting, self._waiting = self._waiting, []
        if called == self._meetings and not self.e.connected:
            ok = self._outcome(code)
            for _, then in waiting:
                then(ok)
            return
        self.e.note(None, f"fence-peer returned {code}, but the peer is back: ignored", level="warning")
        for since, then in waiting:
            if since == called or self.e.connected:
                then(False)
            else:  # the peer came back and was lost again: nobody has fenced it since
                self.fence(then)

    def split_brain(self, yields: str, why: str) -> None:
        """Part from a peer that has a history of its own: one node's ``fence-peer`` is called for the other one,
        which *yields* ("self" or "peer") and leaves the peer alone.

        Without a fencing policy both only part. Who yields ends Outdated, or as a Primary with its I/O
        frozen under resource-and-stonith, until it is fenced. What is known of the peer's disk, and a handler
        that runs, are of a time before: the peer has written since.
        """
        if self.policy == Fencing.DONT_CARE:
            self.e.stand_alone(why)
            return
        self._n_partings += 1
        self._parting = True
        self.e.stand_alone(why)
        self._parting = False
        volumes = self.e.volumes.values()
        primary = any(v.state.role == Role.PRIMARY for v in volumes)
        for vol in volumes:
            self.e.change(vol, replace(vol.state, pdsk=DiskState.D_UNKNOWN), hard=True, why="split brain")
        if yields == "self":
            self._give_way(primary)
        elif primary:
            self.fence(lambda ok: None)

    def _give_way(self, primary: bool) -> None:
        """The peer goes on; nobody may become Primary here who has asked to."""
        self.e.note(None, "split brain: this node yields, and is to be fenced by its peer", level="error")
        if not primary:
            for vol in self.e.volumes.values():
                if vol.state.disk > DiskState.OUTDATED:
                    self.e.change(vol, replace(vol.state, disk=DiskState.OUTDATED), hard=True, why="split brain")
        waiting, self._waiting = self._waiting, []
        for _, then in waiting:
            then(False)

    def _outcome(self, code: int) -> bool:
        volumes = list(self.e.volumes.values())
        best = max((v.state.disk for v in volumes), default=DiskState.DISKLESS)
        pdsk = None
        if code == 3:
            pdsk, text = DiskState.INCONSISTENT, "peer is inconsistent or worse"
        elif code == 4:
            pdsk, text = DiskState.OUTDATED, "peer was fenced"
        elif code == 5:
            if best != DiskState.UP_TO_DATE:
                self.e.note(None, "fence-peer: peer is unreachable, but our disk is not UpToDate", level="warning")
                return False
            pdsk, text = DiskState.OUTDATED, "peer is unreachable, assumed to be dead"
        elif code == 6:
            self.e.note(None, "fence-peer: peer is Primary, outdating this node", level="warning")
            for vol in volumes:
                if vol.state.disk > DiskState.OUTDATED:
                    self.e.change(vol, replace(vol.state, disk=DiskState.OUTDATED), hard=True, why="peer is Primary")
            return False
        elif code == 7:
            pdsk, text = DiskState.OUTDATED, "peer was stonithed"
            if self.policy != Fencing.RESOURCE_AND_STONITH:
                self.e.note(None, "fence-peer() = 7 && fencing != Stonith !!!", level="error")
        else:
            self.e.note(None, f"fence-peer helper broken, returned {code}", level="error")
            return False
        self.e.note(None, f"fence-peer helper returned {code} ({text})")
        for vol in volumes:
            if vol.state.conn < ConnState.CONNECTED:
                self.e.change(vol, replace(vol.state, pdsk=pdsk), hard=True, why=text)
        self._unfreeze()
        return True

    def _unfreeze(self) -> None:
        """The peer is out: treat its connection as lost for good and let I/O go on."""
        frozen = [v for v in self.e.volumes.values() if v.state.susp_fen]
        if not frozen:
            return
        self.e.log.connection_lost()
        self.e.make_pending_generations()
        for vol in frozen:
            self.e.change(vol, replace(vol.state, susp_fen=False), hard=True, why="peer fenced")

    def resume(self) -> None:
        """The administrator takes responsibility: thaw, with the new generation that is due."""
        volumes = [v for v in self.e.volumes.values() if v.state.suspended]
        if not self.e.connected:
            self.e.log.connection_lost()
        self.e.make_pending_generations()
        for vol in volumes:
            self.e.change(
                vol, replace(vol.state, susp=False, susp_nod=False, susp_fen=False), hard=True, why="resume-io"
            )

    def all_connected(self) -> None:
        """Every volume is connected again: the peer never went, send again what it did not answer."""
        frozen = [v for v in self.e.volumes.values() if v.state.susp_fen or v.state.susp_nod]
        pending = [v for v in self.e.volumes.values() if v.new_current_pending]
        if not frozen and not pending and not self.e.log.kept:
            return
        if all(v.state.pdsk == DiskState.UP_TO_DATE for v in pending):
            for vol in pending:
                vol.new_current_pending = False
            self.e.log.replay()
        else:  # it came back without its disk, so perhaps without its memory: its next attach is a resync
            self.e.log.connection_lost()
            self.e.make_pending_generations()
        for vol in frozen:
            self.e.change(
                vol, replace(vol.state, susp_fen=False, susp_nod=False), hard=True, why="connected again"
            )

    def peer_was_rebooted(self) -> None:
        """The peer forgot what we sent: no replay, a new generation and an ordinary resync instead.

        The kernel lets I/O go on here. We stay frozen until the next connection stands, or the handler has
        spoken: in between the peer calls itself UpToDate and lacks what we would answer. It lives, so it is not
        fenced for this, unless it stays away for longer than two attempts to connect take.
        """
        self.e.log.connection_lost()
        self.e.make_pending_generations()
        self._parting = True
        self.e.drop(ConnState.PROTOCOL_ERROR, "the peer was restarted while our I/O was frozen")
        self._parting = False
        met, net = self._meetings, self.e.config.net
        self.e.after(2 * net.connect_int + net.timeout / 10, lambda _: self._still_away(met))

    def _still_away(self, met: int) -> None:
        if met == self._meetings and not self.e.connected:
            self.peer_lost()
