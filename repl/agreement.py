"""State changes both nodes must agree to: one asks, the other decides by its own rules and answers.

Source: drbd_state.c (cl_wide_st_chg, drbd_req_state), drbd_receiver.c (receive_req_state,
receive_req_conn_state, got_RqSReply).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import Refusal
from .states import ConnState, DiskState, State
from .transition import peer_request
from .volume import Volume
from .wire import pack_state_change, pack_state_reply

if TYPE_CHECKING:
    from .engine import Engine

CONCURRENT = -19
TRANSIENT = -18
SUCCESS = 1
LOST = 0  # the connection went before the answer came
DISK_MASK = 0x1E00
PDSK_MASK = 0x1E000
_UNDECIDED = (DiskState.ATTACHING, DiskState.NEGOTIATING)


class Agreement:
    """Our requests to the peer, one per volume and one for the connection, and our answers to its own."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self._pending: dict[int | None, Callable[[int], None]] = {}

    def busy(self, vol: Volume | None) -> bool:
        return (vol.number if vol else None) in self._pending

    def ask(self, vol: Volume | None, mask: int, val: int, then: Callable[[int], None]) -> None:
        """Ask the peer; *then* gets its code (>= 1: agreed) or LOST. One request per volume at a time."""
        key = vol.number if vol else None
        assert key not in self._pending
        self._pending[key] = then
        self.e.out.data.append(pack_state_change(mask, val, vol.number if vol else 0, vol is None))

    def replied(self, vol: Volume | None, code: int) -> None:
        then = self._pending.pop(vol.number if vol else None, None)
        if then:
            then(code)

    def connection_lost(self) -> None:
        pending, self._pending = self._pending, {}
        for then in pending.values():
            self.e.stories.append(lambda _, then=then: then(LOST))  # type: ignore[misc]

    def requested(self, vol: Volume | None, mask: int, val: int) -> None:
        """P_STATE_CHG_REQ (a volume's) or P_CONN_ST_CHG_REQ (*vol* None) from the peer."""
        if self.e.link.resolver and self._races(vol, mask):
            self._reply(vol, CONCURRENT)
            return
        wanted = self._judge(vol, mask, val)
        if isinstance(wanted, int):
            self._reply(vol, wanted)
        elif vol is None and wanted[0][1].conn == ConnState.TEAR_DOWN:
            # Under fencing one of us is outdated by it: the words are the peer's, so disk and pdsk change places.
            if mask & PDSK_MASK and not mask & DISK_MASK:
                self._outdate_first(mask, val)
            else:
                self._part("pdsk" if mask & DISK_MASK else "")
        else:
            self._reply(vol, SUCCESS)
            for v, new in wanted:
                self.e.apply(v, new, why="agreed with the peer")

    def _judge(self, vol: Volume | None, mask: int, val: int) -> list[tuple[Volume, State]] | int:
        """What each volume would be, or the code of a refusal."""
        volumes = [vol] if vol else list(self.e.volumes.values())
        if vol is None and mask & PDSK_MASK and any(v.state.disk in _UNDECIDED for v in volumes):
            return TRANSIENT  # we would agree to be Outdated, and forget it when the attach ends
        wanted: list[tuple[Volume, State]] = []
        for v in volumes:
            result = peer_request(v.state, mask, val, self.e.facts(v), connection=vol is None)
            if isinstance(result, Refusal):
                return result.code
            wanted.append((v, result))
        return wanted

    def _part(self, outdate: str) -> None:
        self._reply(None, SUCCESS)
        self.e.drop(ConnState.TEAR_DOWN, "the peer disconnected", outdate)

    def _outdate_first(self, mask: int, val: int) -> None:
        """The peer goes on alone once we agree to be Outdated; dead before that is on disk, we would be as before."""
        link, volumes = self.e.link.ticket, list(self.e.volumes.values())
        left, written = len(volumes), True

        def durable(ok: bool) -> None:
            nonlocal left, written
            left, written = left - 1, written and ok
            if left:
                return
            if link == self.e.link.ticket:
                wanted = self._judge(None, mask, val) if written else TRANSIENT
                if isinstance(wanted, int):
                    self._reply(None, wanted)
                else:
                    self._part("disk")
            if not self.busy(None):  # else we have asked to leave in the same way
                self.stay()

        for v in volumes:
            v.leaving = True
            self.e.write_superblock(v, durable)

    def stay(self) -> None:
        """The wish to part as the Outdated one is over: the superblocks say again what is."""
        for vol in self.e.volumes.values():
            if vol.leaving:
                vol.leaving = False
                self.e.write_superblock(vol, None)

    def _races(self, vol: Volume | None, mask: int) -> bool:
        """Is a request of ours under way that must not be agreed to together with the peer's?

        DRBD looks for one of the same volume, or of the connection. But to outdate one node's disk and detach
        the other's are each harmless alone, and together they leave two generations: so those exclude each other.
        """
        if self.busy(vol):
            return True
        other = self._pending if vol is None else self._pending.keys() & {None}
        return bool(other) and bool(mask & (DISK_MASK | PDSK_MASK))

    def _reply(self, vol: Volume | None, code: int) -> None:
        self.e.out.meta.append(pack_state_reply(code, vol.number if vol else 0, vol is None))

