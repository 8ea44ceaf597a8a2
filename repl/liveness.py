"""Is the peer still there: pings, the age of unanswered requests, the handshake's time limit.

Source: drbd_receiver.c, drbd_ack_receiver; drbd_req.c, request_timer_fn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .states import ConnState
from .wire import Packet, packet

if TYPE_CHECKING:
    from .engine import Engine


class Liveness:
    """Pings and time limits of the connection."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self._heard = 0.0  # anything at all, on either socket
        self._pings: deque[tuple[float, Callable[[], None] | None]] = deque()  # sent at, whom to tell

    def started(self) -> None:
        self._heard = self.e.now
        self._pings.clear()

    def stopped(self) -> None:
        self._pings.clear()

    def heard(self) -> None:
        self._heard = self.e.now

    def ping(self, then: Callable[[], None] | None = None) -> None:
        """Send P_PING; *then* when its answer came. All acks sent by the peer before it are in by then."""
        self._pings.append((self.e.now, then))
        self.e.out.meta.append(packet(Packet.PING))

    def pong(self) -> None:
        """P_PING_ACK; one too many is harmless."""
        if self._pings:
            _, then = self._pings.popleft()
            if then:
                then()

    @property
    def _ping_timeout(self) -> float:
        return self.e.config.net.ping_timeout / 10

    def deadline(self) -> float | None:
        link = self.e.link
        if link.deadline is not None:
            times = [link.deadline]
        elif not self.e.connected:
            return None
        else:
            times = []
        if self.e.connected:
            if self._pings:
                times.append(max(self._pings[0][0], self._heard) + self._ping_timeout)
            else:
                times.append(self._heard + self.e.config.net.ping_int)
            oldest = self._oldest()
            if oldest is not None:
                times.append(oldest)
        return min(times, default=None)

    def _oldest(self) -> float | None:
        net = self.e.config.net
        since = self.e.log.oldest_unanswered()
        return None if since is None or not net.ko_count else since + net.ko_count * net.timeout / 10

    def tick(self, now: float) -> None:
        link, net = self.e.link, self.e.config.net
        if link.deadline is not None and now >= link.deadline:
            self.e.drop(ConnState.NETWORK_FAILURE, f"the handshake stalled while {link.stage.value}")
            return
        if not self.e.connected:
            return
        oldest = self._oldest()
        if oldest is not None and now >= oldest:
            self.e.drop(
                ConnState.TIMEOUT,
                f"the peer did not answer a request within ko-count x timeout = {net.ko_count * net.timeout / 10:g} s",
            )
        elif self._pings:
            # Anything heard since proves that the peer lives, so the wait begins anew.
            if now >= max(self._pings[0][0], self._heard) + self._ping_timeout:
                self.e.drop(ConnState.NETWORK_FAILURE, "PingAck did not arrive in time.")
        elif now >= self._heard + net.ping_int:
            self.ping()
