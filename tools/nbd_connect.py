"""From a place to a negotiated socket: who among the configured nodes serves the volume as Primary?

A node that is not Primary refuses to open its export, so whoever agrees is the right one. Decides how long
to wait for a node, in which order nodes are asked, and when a server has certainly read the last of an old
connection.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from tandem.nbd.client_negotiation import ClientNegotiation, ServerMistake, Terms
from tandem.nbd.codec import TransmissionFlag

from .nbd_device import Place

ANSWER_S: Final = 2.0  # a living node on a network fit for a block device answers in far less
# What this host lacks says nothing about the node.
_OUR_LACK: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS))
_SIOCOUTQ: Final = 0x5411  # bytes that the other end of a Unix socket has not taken yet, unix(7)
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2 = 1, 4, 5  # tcpi_state, linux/tcp.h: the other end has not closed


class Unavailable(Exception):
    """A node that does not serve the volume now; a few words why."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A connection in the transmission phase."""

    sock: socket.socket
    place: Place
    terms: Terms

    @property
    def is_dead(self) -> bool:
        """Has either end given the connection up? The kernel closes both directions when it does."""
        poll = select.poll()
        poll.register(self.sock, 0)
        return bool(poll.poll(0))

    @property
    def is_settled(self) -> bool:
        """Will the server certainly read nothing more from this dead connection?

        Only then may its requests be sent again to the same server: an old write that is read after a newer
        one to the same sectors would undo it.
        """
        if self.sock.family == socket.AF_UNIX:
            waiting = array.array("i", [0])
            fcntl.ioctl(self.sock, _SIOCOUTQ, waiting)
            return waiting[0] == 0
        state, _, retransmits, _ = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 4)
        # A FIN that must be repeated was lost, with all that was not read: the server's window was open.
        return state not in (_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2) or (state == _FIN_WAIT1 and retransmits > 0)


def open_at(place: Place) -> Opened:
    """Connect to one place and enter transmission there. Unavailable, or OSError for what this host lacks."""
    deadline = time.monotonic() + ANSWER_S
    try:
        sock = _connected(place)
    except OSError as error:
        if error.errno in _OUR_LACK:
            raise
        raise Unavailable(error.strerror or str(error)) from None
    try:
        return Opened(sock, place, _negotiated(sock, place.export, deadline))
    except BaseException:
        sock.close()
        raise


def open_first(places: Sequence[Place]) -> Opened:
    """Ask *places* in this order; the first that serves the volume. Unavailable names all reasons."""
    reasons = []
    for place in places:
        try:
            return open_at(place)
        except Unavailable as error:
            reasons.append(f"{place.node} ({place}): {error}")
    raise Unavailable("; ".join(reasons))


def _connected(place: Place) -> socket.socket:
    if place.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _closed_on_error(sock):
            sock.settimeout(ANSWER_S)
            sock.connect(place.path)
        return sock
    sock = socket.create_connection((place.host, place.port), ANSWER_S)
    with _closed_on_error(sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that vanishes while no request waits for it is noticed after some twenty seconds.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 3), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
    return sock


@contextlib.contextmanager
def _closed_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def _negotiated(sock: socket.socket, export: str, deadline: float) -> Terms:
    talk = ClientNegotiation(export)
    inbox = bytearray()
    try:
        while not talk.over:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            part = sock.recv(1 << 12)
            if not part:
                raise Unavailable("it hung up")
            inbox += part
            del inbox[: talk.consume(bytes(inbox))]
            sock.sendall(talk.out)
            talk.out.clear()
    except TimeoutError:
        raise Unavailable(f"no answer within {ANSWER_S:.0f} s") from None
    except OSError as error:
        raise Unavailable(error.strerror or str(error)) from None
    except ServerMistake as error:
        raise Unavailable(str(error)) from None
    if talk.terms is None:
        raise Unavailable(talk.refusal.removesuffix("."))
    if inbox:
        raise Unavailable("it sends what nobody asked for")
    if talk.terms.flags & TransmissionFlag.READ_ONLY:
        raise Unavailable("it offers the volume read-only")
    sock.settimeout(None)
    return talk.terms


# ------------------------------------------------------------------------------------------- terms

# What a file system builds on once it has seen it. A server that lost one of these cannot go on with it.
LASTING: Final = (
    TransmissionFlag.SEND_FLUSH, TransmissionFlag.SEND_FUA, TransmissionFlag.SEND_TRIM,
    TransmissionFlag.SEND_WRITE_ZEROES, TransmissionFlag.CAN_MULTI_CONN,
)  # fmt: skip


def unfit(terms: Terms, size: int, block_size: int, flags: int) -> str:
    """Why an export cannot go on with a device of *size* bytes, *block_size* and *flags*; empty if it can.

    A larger export is fine: the device grows.
    """
    lost = [flag.name for flag in LASTING if flags & flag and not terms.flags & flag]
    if terms.size < size:
        return f"its export has {terms.size} bytes, and the device has {size}"
    if terms.block_min > block_size:
        return f"its blocks have {terms.block_min} bytes, and the device's {block_size}"
    return f"it does not offer {', '.join(map(str, lost))} any more" if lost else ""


def in_order(places: Iterable[Place], last: str) -> list[Place]:
    """*places* with that of the node *last* in front: who served last has every answered write."""
    return sorted(places, key=lambda place: place.node != last)
