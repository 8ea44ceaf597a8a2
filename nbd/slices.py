"""Client requests that enter the machine in several pieces, and are answered once.

The machine takes reads and writes of at most 1 MiB and trims of at most 128 MiB; a client may read or
write 32 MiB, and trim or zero a whole device. `Sliced` is the parent of such pieces and their owner.
`Incoming` is a payload that is still arriving: its pieces start as they become complete, or it is thrown
away because the write was refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tandem.repl.requests import Buffer, Op, Request, split

PIECES_MAX: Final = 4  # of one trim or zeroes in the machine at a time: 512 MiB of bitmap


class Sliced:
    """One client request, carried out piece by piece.

    ``parts`` are the pieces of a READ in order, kept for the reply; a ``streamed`` one keeps none, its data is
    sent as it comes. ``error`` is the first errno any piece came back with; no further piece is made then.
    ``done`` hears of every batch of pieces that came back.
    """

    __slots__ = ("_done", "_ready", "_todo", "advancing", "cookie", "error", "exhausted", "flags", "length", "n_out",
                 "n_sent", "offset", "op", "parts", "room", "streamed", "volume")  # fmt: skip

    def __init__(
        self, done: Callable[[Sliced, list[Request]], None], cookie: int, op: int, volume: int,
        offset: int, length: int, flags: int,
    ) -> None:  # fmt: skip
        self._done = done
        self._todo = split(op, offset, length)
        self.cookie = cookie
        self.op = op
        self.volume = volume
        self.offset = offset
        self.length = length
        self.flags = flags
        self.parts: list[Request] = []
        self.error = 0
        self.n_out = 0  # pieces made and not back yet
        self.exhausted = False  # no further piece will be made
        self.advancing = False  # pieces are being submitted further up the stack
        self.room = 0  # bytes of the session's room that a READ takes for what is not sent of it
        self.streamed = False
        self.n_sent = 0  # bytes of the data of a streamed READ that were handed over to be sent
        self._ready: dict[int, Request] = {}  # by offset: its pieces that came back before those in front of them

    def next_piece(self, payload: Buffer | None = None) -> Request | None:
        """The next piece, or None when there is no more (or no more point)."""
        if self.exhausted or self.error:
            return None
        offset, length = next(self._todo)
        if offset + length == self.offset + self.length:
            self.exhausted = True
        request = Request(self, self.cookie, self.op, self.volume, offset, length, payload, self.flags)
        self.n_out += 1
        if self.op == Op.READ and not self.streamed:
            self.parts.append(request)
        return request

    def take_ready(self, batch: list[Request]) -> list[Buffer]:
        """The data of a streamed READ that can be sent now that *batch* is back."""
        self._ready.update((piece.offset, piece) for piece in batch if not piece.error)
        data: list[Buffer] = []
        while (piece := self._ready.pop(self.offset + self.n_sent, None)) is not None:
            data.append(piece.payload)  # type: ignore[arg-type]  # a READ without error has one
            self.n_sent += piece.length
        return data

    @property
    def begun(self) -> bool:
        """Whether a READ was let into the machine."""
        return self.streamed or self.room > 0

    @property
    def complete(self) -> bool:
        """Whether the request can be answered."""
        return self.exhausted and not self.n_out

    def finished(self, batch: list[Request]) -> None:
        for request in batch:
            if request.error and not self.error:
                self.error = request.error
                self.exhausted = self.exhausted or self.op != Op.WRITE  # a payload is read to its end first
        self.n_out -= len(batch)
        assert self.n_out >= 0, "a piece was answered twice"
        self._done(self, batch)


class Incoming:
    """The payload of a write, arriving. *parent* None: it is only thrown away, then *answer* is sent."""

    __slots__ = ("_lengths", "_next", "answer", "left", "parent")

    def __init__(self, parent: Sliced | None, offset: int, length: int, answer: Buffer = b"") -> None:
        self.parent = parent
        self.answer = answer
        self.left = length
        self._lengths = (piece for _, piece in split(Op.WRITE, offset, length))
        self._next = next(self._lengths) if parent is not None else 0

    def next_length(self) -> int:
        """The length of the piece that is to arrive next."""
        return self._next

    def take(self, view: memoryview) -> tuple[int, Request | None]:
        """Take what *view* starts with: (bytes taken, the piece they make). 0 bytes: not enough yet."""
        if self.parent is None:
            taken = min(self.left, len(view))
            self.left -= taken
            return taken, None
        taken = self._next
        if len(view) < taken:
            return 0, None
        piece = self.parent.next_piece(view[:taken])
        self.left -= taken
        self._next = next(self._lengths, 0)
        if not self.left:
            self.parent.exhausted = True
        return taken, piece
