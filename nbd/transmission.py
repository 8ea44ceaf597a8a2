"""The transmission phase: what has arrived becomes Requests, finished Requests become reply buffers.

One `Transmission` per session; it owns the Requests it makes. `consume` sees everything one receive
brought, makes one batch of it and submits it once; `finished` packs the replies of a whole batch into one
list of buffers, sent once. The usual request (a read or write in one piece) is decided by one look into a
table and a few comparisons; everything else goes through `_unusual`, which is the specification. Requests
that enter the machine in several pieces are in `slices`.

What is in the machine or unsent takes room, of which a session has little and borrows more (`budget`). The
answer to a long read is put together where there is room for it, because only then can it still become an error
in every style, and others may be sent meanwhile; where there is none, it is sent as it comes.

Pure: the connection is a `Port`. Relies on the volume to answer every Request exactly once.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from tandem.repl.requests import FUA, MAY_UNMAP, Buffer, Op, Request
from tandem.repl.units import IO_MAX

from .budget import ROOM_MIN, Budget
from .codec import (
    BLOCK_MIN,
    EXTENDED_REQUEST,
    EXTENDED_REQUEST_MAGIC,
    EXTENTS_MAX,
    PAYLOAD_MAX,
    REQUEST,
    REQUEST_MAGIC,
    ClientError,
    Cmd,
    CmdFlag,
    NbdError,
    nbd_error,
)
from .compiled import batches
from .replies import ExtendedReplies, Replies, SimpleReplies, StructuredReplies
from .slices import PIECES_MAX, Incoming, Sliced

READ_PIECES_MAX: Final = 16  # of one long read in the machine at a time
REQUESTS_MAX: Final = 2048  # of one session unanswered; the Linux client has at most 128
DISCARD_MAX: Final = 64 << 20  # a longer payload of a refused write is not worth reading

_IO_MASK: Final = IO_MAX - 1
_ALIGN_MASK: Final = BLOCK_MIN - 1
_READ: Final = int(Op.READ)
_WRITE: Final = int(Op.WRITE)

# The flags each command may carry; FUA is good everywhere, DF and PAYLOAD_LEN only where negotiated.
# Plain integers: the complement of an IntFlag would know only the flags that have names.
_FLAGS: Final[dict[int, int]] = {
    Cmd.READ: int(CmdFlag.FUA | CmdFlag.DF),
    Cmd.WRITE: int(CmdFlag.FUA | CmdFlag.PAYLOAD_LEN),
    Cmd.FLUSH: int(CmdFlag.FUA),
    Cmd.TRIM: int(CmdFlag.FUA),
    Cmd.WRITE_ZEROES: int(CmdFlag.FUA | CmdFlag.NO_HOLE | CmdFlag.FAST_ZERO),
    Cmd.BLOCK_STATUS: int(CmdFlag.FUA | CmdFlag.REQ_ONE),
}


@dataclass(frozen=True, slots=True)
class StatusQuery:
    """A BLOCK_STATUS to be answered through `Transmission.status_known`."""

    cookie: int
    offset: int
    length: int
    max_extents: int


class Port(Protocol):
    """What the transmission phase asks of the connection it runs on."""

    def submit(self, batch: list[Request]) -> None:
        """Hand *batch* to the volume."""

    def send(self, buffers: list[Buffer]) -> None:
        """Send replies, in order."""

    def ask_status(self, query: StatusQuery) -> None:
        """Find out what is allocated; `Transmission.status_known` wants the answer."""

    @property
    def unsent(self) -> int:
        """Bytes of answers not sent yet; when most of them or all are gone, `Transmission.refill` is to be called."""

    def broken_off(self, why: str) -> None:
        """The connection is of no further use: an answer that had begun cannot be completed."""

    def settled(self) -> None:
        """Answers were handed over outside `consume`: ``busy`` and ``n_open`` may have fallen."""


class Transmission:
    """The transmission phase of one session.

    ``size`` is the volume's, refreshed by the connection. ``n_open`` counts client requests not answered
    yet. While ``busy``, the connection is to stop reading; when ``closing`` is set it reads no more and
    ends as soon as ``n_open`` is 0. Both are to be looked at after `consume` and on `Port.settled`.
    """

    def __init__(
        self, port: Port, volume: int, size: int, budget: Budget, *,
        writable: bool = True, structured: bool = False, extended: bool = False, allocation: bool = False,
    ) -> None:  # fmt: skip
        self._port = port
        self._volume = volume
        self._writable = writable
        self._structured = structured or extended
        self._extended = extended
        self._allocation = allocation
        self._header = EXTENDED_REQUEST if extended else REQUEST
        self._magic = EXTENDED_REQUEST_MAGIC if extended else REQUEST_MAGIC
        self._usual = self._usual_heads()
        self._incoming: Incoming | None = None  # the write whose payload is arriving
        self._budget = budget
        self._lent = 0  # bytes of its budget
        self._room = ROOM_MIN  # and what is lent, less the bytes of READ and WRITE in the machine
        self._held: deque[Request | Sliced] = deque()  # reads that wait for room; only the first is Sliced
        self._n_long = 0  # long reads that were begun and are not answered
        self._stream: Sliced | None = None  # the one whose answer is sent as it comes
        self._later: list[Buffer] = []  # answers that wait for the end of the stream
        self._n_later = 0  # their bytes
        self._answers: list[Buffer] = []  # replies made while parsing
        self._within = False  # consume or refill is further up the stack and will see to the rest
        self._gone = False  # the client is not there any more: answers have nowhere to go
        self._replies: Replies = SimpleReplies()
        if extended:
            self._replies = ExtendedReplies()
        elif structured:
            self._replies = StructuredReplies()
        self.size = size
        self.n_open = 0
        self.closing = False

    def _usual_heads(self) -> dict[int, tuple[int, int]]:
        """First eight bytes of a request -> (Op, flags), for reads and writes without peculiarities."""
        magic = self._magic << 32
        payload_len = CmdFlag.PAYLOAD_LEN << 16 if self._extended else 0
        fua = CmdFlag.FUA << 16
        heads = {magic | Cmd.READ: (_READ, 0), magic | fua | Cmd.READ: (_READ, 0)}
        if self._structured:  # a reply has at most one data chunk, so DF asks for nothing more
            heads[magic | CmdFlag.DF << 16 | Cmd.READ] = (_READ, 0)
        if self._writable:
            heads[magic | payload_len | Cmd.WRITE] = (_WRITE, 0)
            heads[magic | payload_len | fua | Cmd.WRITE] = (_WRITE, FUA)
        return heads

    @property
    def streaming(self) -> bool:
        """Whether a long read is sent as it comes: all other answers wait for its end."""
        return self._stream is not None

    @property
    def busy(self) -> bool:
        return self._room <= self._unsent or bool(self._held) or self.n_open >= REQUESTS_MAX

    def close(self) -> None:
        """Read no more; what was read is still carried out and answered."""
        self.closing = True
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        if incoming.parent is None:
            self.n_open -= 1
        else:  # the rest of its payload will never be seen
            incoming.parent.error = incoming.parent.error or errno.ESHUTDOWN
            incoming.parent.exhausted = True
            self._advance(incoming.parent)

    def abandon(self) -> None:
        """The client has gone: start nothing more and make no answers, but wait for what was started."""
        self._gone = True
        self.close()
        for held in self._held:
            if isinstance(held, Request):
                self.n_open -= 1
            elif not held.exhausted:
                held.exhausted = True
                self.n_open -= not held.n_out
        self._held.clear()
        self._stream = None
        self._later.clear()
        self._n_later = 0
        self._give_back()

    # ------------------------------------------------------------------------------------ requests

    def consume(self, view: memoryview) -> int:
        """Take every complete request at the start of *view*; return their bytes.

        Raises ClientError when a request has no magic, or a payload too long to read past.
        """
        batch: list[Request] = []
        self._within = True
        try:
            return self._parse(view, batch)
        finally:  # what came before any nonsense is carried out all the same
            if self._answers:
                answers, self._answers = self._answers, []
                self._send(answers)
            if batch:
                self._port.submit(batch)
            self._within = False
            if self._room <= self._unsent:
                self._make_room()
            self.refill()

    def need(self, rest: memoryview) -> int:
        """The length of the incomplete request, or piece of a payload, that starts with *rest*."""
        if self._incoming is not None:
            return self._incoming.next_length()
        size = self._header.size
        if len(rest) < size:
            return size
        return size + int(self._header.unpack_from(rest)[3])

    def _parse(self, view: memoryview, batch: list[Request]) -> int:
        at, end = 0, len(view)
        unpack, header, usual, extended = self._header.unpack_from, self._header.size, self._usual, self._extended
        if self.closing:
            return end
        if self._incoming is not None:
            at = self._receive_payload(view, 0, batch)
            if self._incoming is not None:
                return at
        while True:
            known, room = len(batch), self._room - self._unsent
            at, left = batches.parse_run(view, at, room, extended, usual, self, self._volume, self.size, batch)
            self._room -= room - left
            self.n_open += len(batch) - known
            if end - at < header:
                return at
            head, cookie, offset, length = unpack(view, at)
            if not self._is_usual(head, offset, length):
                at = self._unusual(view, at, head, cookie, offset, length, batch)
                if self._incoming is not None or self.closing:
                    return at
            elif usual[head][0] == _WRITE:
                return at  # its payload is not complete
            else:
                at += header
                self.n_open += 1
                self._held.append(Request(self, cookie, _READ, self._volume, offset, length, None, usual[head][1]))

    def _is_usual(self, head: int, offset: int, length: int) -> bool:
        """Whether `batches.parse_run` takes such a request, once it is complete and there is room for it."""
        return (
            head in self._usual and not (offset | length) & _ALIGN_MASK and length > 0
            and (offset & _IO_MASK) + length <= IO_MAX and offset + length <= self.size
        )  # fmt: skip

    def _unusual(
        self, view: memoryview, at: int, head: int, cookie: int, offset: int, length: int,
        batch: list[Request],
    ) -> int:  # fmt: skip
        """Handle the request at *at*, whatever it is; return where the next one starts."""
        if head >> 32 != self._magic:
            raise ClientError(f"a request starts with 0x{head >> 32:08x} instead of 0x{self._magic:08x}")
        flags, command = head >> 16 & 0xFFFF, head & 0xFFFF
        at += self._header.size
        if command == Cmd.DISC:
            self.closing = True
            return len(view)
        self.n_open += 1
        problem = self._problem(command, flags, offset, length)
        if command == Cmd.WRITE or (self._extended and flags & CmdFlag.PAYLOAD_LEN):
            return self._unusual_payload(view, at, cookie, offset, length, flags, problem, batch)
        if problem is not None:
            self._answers += self._replies.error(cookie, offset, *problem)
            self.n_open -= 1
        elif command == Cmd.FLUSH:
            batch.append(Request(self, cookie, int(Op.FLUSH), self._volume, 0, 0))
        elif command == Cmd.BLOCK_STATUS:
            n_max = 1 if flags & CmdFlag.REQ_ONE else EXTENTS_MAX
            self._port.ask_status(StatusQuery(cookie, offset, length, n_max))
        elif not length:
            self._answers += self._replies.success(cookie, offset)
            self.n_open -= 1
        elif command == Cmd.READ:
            self._held.append(Request(self, cookie, _READ, self._volume, offset, length))
        else:
            engine_flags = FUA if flags & CmdFlag.FUA else 0
            op = Op.TRIM
            if command == Cmd.WRITE_ZEROES:
                op = Op.ZEROES
                engine_flags |= 0 if flags & CmdFlag.NO_HOLE else MAY_UNMAP
            parent = self._sliced(cookie, op, offset, length, engine_flags)
            batch += self._pieces(parent)
        return at

    def _sliced(self, cookie: int, op: int, offset: int, length: int, flags: int) -> Sliced:
        return Sliced(self._pieces_done, cookie, int(op), self._volume, offset, length, flags)

    def _problem(self, command: int, flags: int, offset: int, length: int) -> tuple[NbdError, str] | None:
        """Why a request is refused, or None. Nothing is started and nothing changed for a refused one."""
        allowed = _FLAGS.get(command)
        if allowed is None:
            return NbdError.EINVAL, f"Command {command} is not supported."
        if flags & ~allowed:
            return NbdError.EINVAL, f"Command {command} does not take flags 0x{flags & ~allowed:x}."
        if flags & CmdFlag.DF and not self._structured:
            return NbdError.EINVAL, "DF needs structured replies."
        if command == Cmd.WRITE and bool(flags & CmdFlag.PAYLOAD_LEN) is not self._extended:
            return NbdError.EINVAL, "A write carries PAYLOAD_LEN exactly when headers are extended."
        if command == Cmd.FLUSH:
            return None
        changes = command in (Cmd.WRITE, Cmd.TRIM, Cmd.WRITE_ZEROES)
        if changes and not self._writable:
            return NbdError.EPERM, "This export is read-only."
        if offset + length > self.size:
            error = NbdError.ENOSPC if command in (Cmd.WRITE, Cmd.WRITE_ZEROES) else NbdError.EINVAL
            return error, f"The request ends at {offset + length}, the volume at {self.size}."
        if (offset | length) & _ALIGN_MASK:
            return NbdError.EINVAL, f"Offset {offset} and length {length} must be multiples of {BLOCK_MIN}."
        if command in (Cmd.READ, Cmd.WRITE) and length > PAYLOAD_MAX:
            return NbdError.EINVAL, f"{length} bytes at once are more than {PAYLOAD_MAX}."
        if command == Cmd.WRITE_ZEROES and flags & CmdFlag.FAST_ZERO:
            return NbdError.ENOTSUP, "Zeroing a mirror may take as long as writing it."
        if command == Cmd.BLOCK_STATUS and not (self._allocation and length):
            return NbdError.EINVAL, "Block status needs a metadata context and a length."
        return None

    # ------------------------------------------------------------------------------------ payloads

    def _unusual_payload(
        self, view: memoryview, at: int, cookie: int, offset: int, length: int, flags: int,
        problem: tuple[NbdError, str] | None, batch: list[Request],
    ) -> int:  # fmt: skip
        """A payload that is to be sliced, or read past because the request is refused or empty."""
        if length > DISCARD_MAX:
            self.n_open -= 1
            raise ClientError(f"a payload of {length} bytes")
        if problem is not None or not length:
            replies = self._replies
            answer = replies.error(cookie, offset, *problem) if problem else replies.success(cookie, offset)
            self._incoming = Incoming(None, 0, length, answer[0])
        else:
            parent = self._sliced(cookie, Op.WRITE, offset, length, FUA if flags & CmdFlag.FUA else 0)
            self._incoming = Incoming(parent, offset, length)
        return self._receive_payload(view, at, batch)

    def _receive_payload(self, view: memoryview, at: int, batch: list[Request]) -> int:
        """Take what has arrived of the payload in progress; return where it ends for now."""
        incoming = self._incoming
        assert incoming is not None
        while incoming.left:
            taken, piece = incoming.take(view[at:])
            if not taken:
                return at
            at += taken
            if piece is not None:
                self._room -= piece.length
                batch.append(piece)
        self._incoming = None
        if incoming.parent is None:
            self._answers.append(incoming.answer)
            self.n_open -= 1
        else:
            self._advance(incoming.parent)
        return at

    # ------------------------------------------------------------------------------------ pieces

    @staticmethod
    def _pieces(parent: Sliced) -> list[Request]:
        """As many pieces of a trim or zeroes as may be in the machine at once."""
        pieces: list[Request] = []
        while parent.n_out < PIECES_MAX and (piece := parent.next_piece()) is not None:
            pieces.append(piece)
        return pieces

    def _pieces_done(self, parent: Sliced, batch: list[Request]) -> None:
        """Pieces of *parent* came back."""
        if parent.op == _WRITE:
            self._room += sum(piece.length for piece in batch)
        elif parent is self._stream:
            self._send_on(parent, batch)
        self._advance(parent)
        self._settle()

    def _advance(self, parent: Sliced) -> None:
        """Start further pieces of a trim or zeroes, and answer the client when all are done."""
        if parent.advancing:  # the volume answered before submit returned; the loop below goes on
            return
        if self._gone:
            parent.exhausted = True
        if parent.op > _WRITE:
            parent.advancing = True
            while pieces := self._pieces(parent):
                self._port.submit(pieces)
            parent.advancing = False
        if not parent.complete:
            return
        self.n_open -= 1
        parts, parent.parts = parent.parts, []  # a piece knows its parent: a circle that would keep payloads
        if parent.op == _READ and parent.begun:
            self._room += parent.room
            self._n_long -= 1
        if self._gone:
            return
        if parent is self._stream:
            self._end_stream(parent)
            return
        if parent.error:
            answer = self._replies.error(parent.cookie, parent.offset, *nbd_error(parent.error))
        elif parent.op == _READ:
            answer = self._replies.data(parent.cookie, parent.offset, parts)
        else:
            answer = self._replies.success(parent.cookie, parent.offset)
        self._send(answer)

    # ------------------------------------------------------------------------------------ long reads

    def _begin(self, read: Sliced) -> bool:
        """Begin a long read, if it is its turn: with room for all of it, or else as a stream."""
        missing = read.length - (self._room - self._unsent)
        if missing > 0 and not self._lent:
            missing -= self._borrow()
        if missing > 0:
            if self._n_long or self._port.unsent > ROOM_MIN:
                return False
            if self._budget.lend_all(missing):
                self._lent += missing
                self._room += missing
            else:
                self._stream = read
                read.streamed = True
        if not read.streamed:
            read.room = read.length
            self._room -= read.length
        self._n_long += 1
        return True

    def _next_piece(self, read: Sliced) -> Request | None:
        """The next piece of a long read that was begun, if it may enter the machine."""
        if not read.streamed:
            return read.next_piece() if read.n_out < READ_PIECES_MAX else None
        # One piece at a time there is always room for: the answers that wait for it have taken theirs.
        if not self._make_room() and (read.n_out or self._port.unsent):
            return None
        piece = read.next_piece()
        if piece is not None:
            self._room -= piece.length
            read.room += piece.length
        return piece

    def _send_on(self, read: Sliced, batch: list[Request]) -> None:
        """Send what has come of a stream."""
        begun = read.n_sent
        data = read.take_ready(batch)
        if not data:
            return
        self._room += read.n_sent - begun
        read.room -= read.n_sent - begun
        head = [] if begun else self._replies.begin(read.cookie, read.offset, read.length)
        self._port.send([*head, *data])

    def _end_stream(self, read: Sliced) -> None:
        """All of a stream is sent that can be had: end the answer, and let go those behind it."""
        self._stream = None
        answer: list[Buffer] | None
        if not read.error:
            answer = self._replies.end(read.cookie, read.offset)
        elif read.n_sent:
            left = read.length - read.n_sent
            answer = self._replies.break_off(read.cookie, read.offset, left, *nbd_error(read.error))
        else:
            answer = self._replies.error(read.cookie, read.offset, *nbd_error(read.error))
        if answer is None:  # whatever came next would be taken for data
            self.abandon()
            self._port.broken_off(f"a read failed after a part of it was sent: {nbd_error(read.error)[1]}")
            return
        answer += self._later
        self._later.clear()
        self._n_later = 0
        if answer:
            self._port.send(answer)

    # ------------------------------------------------------------------------------------ room

    @property
    def _unsent(self) -> int:
        return self._port.unsent + self._n_later

    def _make_room(self) -> bool:
        """Whether more may enter the machine, with a loan if need be."""
        room = self._room - self._unsent
        if room <= 0 and not self._lent:
            room += self._borrow()
        return room > 0

    def _borrow(self) -> int:
        self._lent = self._budget.lend()
        self._room += self._lent
        return self._lent

    def _give_back(self) -> None:
        """Return the loan when what is in the machine and unsent is less than a session has of its own."""
        if self._lent and self._room - self._lent > self._unsent:
            self._budget.give_back(self._lent)
            self._room -= self._lent
            self._lent = 0

    def refill(self) -> None:
        """Let held reads into the machine as far as there is room for them, and for their answers."""
        self._give_back()
        if not self._held or self._within:
            return
        self._within = True
        while batch := self._take_held():
            self._port.submit(batch)
        self._within = False

    def _take_held(self) -> list[Request]:
        """The held reads, and pieces of them, that may enter the machine now."""
        held = self._held
        batch: list[Request] = []
        while held:
            first = held[0]
            if isinstance(first, Request) and (first.offset & _IO_MASK) + first.length > IO_MAX:
                held[0] = first = self._sliced(first.cookie, Op.READ, first.offset, first.length, 0)
            if isinstance(first, Request):
                if not self._make_room():
                    break
                self._room -= first.length
                batch.append(first)
            else:
                if not first.begun and not self._begin(first):
                    break
                while (piece := self._next_piece(first)) is not None:
                    batch.append(piece)
                if not first.exhausted:
                    break
            held.popleft()
        return batch

    # ------------------------------------------------------------------------------------ answers

    def _send(self, answer: list[Buffer]) -> None:
        if self._stream is None:
            self._port.send(answer)
        else:
            self._later += answer
            self._n_later += sum(map(len, answer))

    def finished(self, batch: list[Request]) -> None:
        """The volume is done with *batch*: answer the client, once for all of it."""
        self.n_open -= len(batch)
        assert self.n_open >= 0, "a request was answered twice"
        buffers, n_bytes = self._replies.batch(batch)
        self._room += n_bytes
        if not self._gone:
            self._send(buffers)
        self._settle()

    def status_known(self, query: StatusQuery, extents: Sequence[tuple[int, int]]) -> None:
        """Answer *query* with what `Volume.allocation` found; without extents nothing is promised."""
        merged: list[tuple[int, int]] = []
        left = query.length
        for length, flags in extents or ((query.length, 0),):
            length = min(length, left)
            if merged and merged[-1][1] == flags:
                merged[-1] = (merged[-1][0] + length, flags)
            elif len(merged) < query.max_extents and length > 0:
                merged.append((length, flags))
            else:
                break
            left -= length
        self.n_open -= 1
        if not self._gone:
            self._send(self._replies.status(query.cookie, query.offset, merged or [(query.length, 0)]))
        self._settle()

    def _settle(self) -> None:
        if self._within:
            return
        self.refill()
        self._port.settled()
