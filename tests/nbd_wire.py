"""The client's side of the NBD wire for tests, written from the protocol document and not from our codec."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"
SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"
STYLES = (SIMPLE, STRUCTURED, EXTENDED)
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS, RESIZE = range(9)
F_FUA, F_NO_HOLE, F_DF, F_REQ_ONE, F_FAST_ZERO, F_PAYLOAD_LEN = (1 << n for n in range(6))
EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 75, 95, 108
ERR = 1 << 31
ACK, SERVER, INFO, META = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_UNKNOWN = ERR + 1, ERR + 2, ERR + 3, ERR + 6
ERR_TOO_BIG, ERR_EXT_HEADER_REQD = ERR + 9, ERR + 10


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", number, len(data)) + data


def info_data(name: str = "", *infos: int) -> bytes:
    raw = name.encode()
    return struct.pack(f">I{len(raw)}sH{len(infos)}H", len(raw), raw, len(infos), *infos)


def context_data(name: str, *queries: str) -> bytes:
    raw = name.encode()
    data = struct.pack(f">I{len(raw)}sI", len(raw), raw, len(queries))
    for query in queries:
        data += struct.pack(">I", len(query.encode())) + query.encode()
    return data


def request(
    style: str, command: int, cookie: int, offset: int = 0, length: int = 0, flags: int = 0,
    payload: bytes | None = None,
) -> bytes:  # fmt: skip
    """A request; a WRITE's length is that of *payload* unless given, PAYLOAD_LEN is set where due."""
    if payload is not None and not length:
        length = len(payload)
    if style == EXTENDED:
        if command == WRITE:
            flags |= F_PAYLOAD_LEN
        head = struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
    else:
        head = struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)
    return head + (payload or b"")


@dataclass
class Answer:
    """The whole reply to one request."""

    cookie: int
    error: int = 0
    text: str = ""
    data: bytes | None = None
    extents: list[tuple[int, int]] | None = None
    chunks: list[str] = field(default_factory=list)


class ReplyReader:
    """Takes the server's stream apart and checks its grammar.

    *reads* maps the cookies of READs to their (offset, length): without it a simple reply cannot be parsed,
    and with it each data chunk is checked to lie where it belongs. *ours* is False for another server,
    whose error texts are its own affair.
    """

    def __init__(
        self, style: str, reads: dict[int, tuple[int, int]] | None = None, ours: bool = True
    ) -> None:
        self.style = style
        self.ours = ours
        self.reads = {} if reads is None else reads
        self.unfinished: Answer | None = None  # the data of a READ is there, the last chunk of its reply not yet
        self.rest = bytearray()

    def feed(self, data: bytes) -> list[Answer]:
        self.rest += data
        answers = []
        while (answer := self._next()) is not None:
            answers.append(answer)
        return answers

    def _take(self, n: int) -> bytes:
        taken = bytes(self.rest[:n])
        del self.rest[:n]
        return taken

    def _next(self) -> Answer | None:
        if len(self.rest) < 16:
            return None
        magic = int.from_bytes(self.rest[:4], "big")
        if magic == 0x67446698:
            return self._simple()
        if magic == 0x668E33EF:
            assert self.style == STRUCTURED
            head = ">IHHQI"
        else:
            assert magic == 0x6E8A278C and self.style == EXTENDED, f"magic {magic:08x}"
            head = ">IHHQQQ"
        size = struct.calcsize(head)
        if len(self.rest) < size:
            return None
        fields = struct.unpack_from(head, self.rest)
        length = fields[-1]
        if len(self.rest) < size + length:
            return None
        self._take(size)
        return self._chunk(fields, self._take(length)) or self._next()

    def _simple(self) -> Answer | None:
        assert self.style != EXTENDED, "no simple replies after extended headers"
        _, error, cookie = struct.unpack_from(">IIQ", self.rest)
        asked = self.reads.get(cookie)
        assert not (asked and self.style == STRUCTURED), "a READ was answered with a simple reply"
        n = asked[1] if asked and not error else 0
        if len(self.rest) < 16 + n:
            return None
        self._take(16)
        return Answer(cookie, error, data=self._take(n) if asked and not error else None, chunks=["simple"])

    def _chunk(self, fields: tuple[int, ...], payload: bytes) -> Answer | None:
        flags, kind, cookie = fields[1:4]
        answer = self.unfinished or Answer(cookie)
        assert answer.cookie == cookie, "nothing comes between the chunks of one reply"
        assert flags == 1 or (flags, kind) == (0, 1), "only data is followed by a second chunk"
        answer.chunks.append(str(kind))
        if kind == 0:
            assert not payload
            assert self.unfinished or cookie not in self.reads or not self.reads[cookie][1]
        elif kind == 1:
            offset = int.from_bytes(payload[:8], "big")
            answer.data = payload[8:]
            assert (offset, len(answer.data)) == self.reads[cookie]
        elif kind in (5, 6):
            answer.extents = self._extents(kind, payload)
        else:
            assert kind == 0x8001, f"chunk type {kind:x}"
            error, length = struct.unpack_from(">IH", payload)
            assert error and len(payload) == 6 + length and length <= 4096
            answer.error, answer.text = error, payload[6:].decode()
            assert answer.text.endswith(".") or not self.ours
        if self.style == EXTENDED and cookie in self.reads:
            assert fields[4] == self.reads[cookie][0], "the reply repeats the offset of the request"
        self.unfinished = None if flags else answer
        return None if self.unfinished else answer

    def _extents(self, kind: int, payload: bytes) -> list[tuple[int, int]]:
        assert int.from_bytes(payload[:4], "big") == 1, "the id of the context"
        if kind == 5:
            assert self.style == STRUCTURED
            extents = list(struct.iter_unpack(">II", payload[4:]))
        else:
            assert self.style == EXTENDED
            extents = list(struct.iter_unpack(">QQ", payload[8:]))
            assert int.from_bytes(payload[4:8], "big") == len(extents)
        assert extents and all(length > 0 and not flags & ~3 for length, flags in extents)
        return [(length, flags) for length, flags in extents]


@dataclass
class OptionReply:
    option: int
    kind: int
    data: bytes


def option_replies(stream: bytes) -> list[OptionReply]:
    """Take a stream of option replies apart; it must end with the last of them."""
    replies, at = [], 0
    while at < len(stream):
        magic, number, kind, length = struct.unpack_from(">QIII", stream, at)
        assert magic == 0x3E889045565A9
        at += 20
        data = stream[at : at + length]
        assert len(data) == length
        if kind & ERR:
            assert data.decode().endswith("."), "nbd-client overwrites the last byte"
        replies.append(OptionReply(number, kind, data))
        at += length
    return replies
