"""TCP between the two nodes: byte streams that may be cut anywhere.

One link is two sockets (data, meta), each with two directions. A direction delivers its bytes in order, in
chunks of any size, independently of the others. A cut loses any suffix of what was not delivered; after the
last byte the receiver sees the end of the stream, or, when the other host simply vanished, nothing at all.
"""

from __future__ import annotations

from typing import Final

from tandem.repl.requests import Buffer

DATA_SOCKET: Final = 0
META_SOCKET: Final = 1


class Pipe:
    """One direction of one socket, seen from the receiver."""

    __slots__ = ("at_end", "ended", "incoming", "rx", "silent")

    def __init__(self) -> None:
        self.incoming = bytearray()  # sent, not yet at the receiver
        self.rx = b""  # at the receiver, not yet consumed; immutable, because the machine keeps slices
        self.ended = False  # nothing more is accepted from the sender
        self.silent = False  # the end is never seen: the sender's host vanished
        self.at_end = False  # the receiver has been told

    def send(self, buffers: list[Buffer]) -> None:
        if not self.ended:
            for buffer in buffers:
                self.incoming += buffer

    def end(self, keep: int | None = None, silent: bool = False) -> None:
        """No more bytes; of those under way the first *keep* (all when None) still arrive."""
        if not self.ended:
            self.ended = True
            self.silent = silent
            if keep is not None:
                del self.incoming[keep:]

    def deliver(self, n: int) -> None:
        assert 0 < n <= len(self.incoming)
        self.rx += bytes(self.incoming[:n])
        del self.incoming[:n]

    @property
    def end_visible(self) -> bool:
        """Everything has arrived and the receiver would now see the end."""
        return self.ended and not self.silent and not self.incoming and not self.at_end


class LinkEnd:
    """What one node holds of a link: its ticket, its two incoming pipes, the peer's two."""

    __slots__ = ("closed", "inbound", "outbound", "resolver", "started", "ticket")

    def __init__(self, ticket: int, resolver: bool) -> None:
        self.ticket = ticket
        self.resolver = resolver
        self.started = False  # LinkUp was delivered
        self.closed = False  # this node has done with the link
        self.inbound = (Pipe(), Pipe())
        self.outbound: tuple[Pipe, Pipe] = self.inbound  # replaced by make_link

    def close(self, keep: int | None = None, silent: bool = False) -> None:
        """This node sends no more and listens no more."""
        self.closed = True
        for pipe in self.outbound:
            pipe.end(keep, silent)
        for pipe in self.inbound:
            pipe.end(0, True)
            pipe.rx = b""


def make_link(tickets: tuple[int, int], resolver: int) -> tuple[LinkEnd, LinkEnd]:
    """A fresh link between node 0 and node 1; *resolver* is the node that accepted the meta socket."""
    a, b = LinkEnd(tickets[0], resolver == 0), LinkEnd(tickets[1], resolver == 1)
    a.outbound, b.outbound = b.inbound, a.inbound
    return a, b
