"""Replies in the three styles a client can negotiate: simple, structured, extended.

`batch` is the hot path: the replies to everything that finished together, as few buffers as possible,
payloads untouched. The other methods make one rare reply each. A READ is always answered with one data
chunk, so "do not fragment" is satisfied by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from tandem.repl.requests import Buffer, Op, Request
from tandem.repl.units import IO_MAX

from .codec import (
    BASE_ALLOCATION_ID,
    CHUNK,
    CHUNK_DONE,
    DATA_CHUNK,
    ERROR_DATA,
    EXTENDED_CHUNK,
    EXTENDED_DATA_CHUNK,
    EXTENDED_EXTENT,
    EXTENDED_REPLY_MAGIC,
    EXTENDED_STATUS,
    EXTENT,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    U32,
    Chunk,
    nbd_error,
)
from .compiled import batches

_READ: Final = int(Op.READ)
_DATA: Final = int(Chunk.OFFSET_DATA)
_NONE: Final = int(Chunk.NONE)
_MORE: Final = 0  # the flags of a chunk that is not the last of its reply
_ZEROES: Final = bytes(IO_MAX)

Extents = Sequence[tuple[int, int]]


class Replies(Protocol):
    """How one session is answered."""

    def batch(self, batch: list[Request]) -> tuple[list[Buffer], int]:
        """The replies to *batch*, and how many bytes of READ and WRITE it had."""

    def success(self, cookie: int, offset: int) -> list[Buffer]:
        """The reply to a command without data."""

    def error(self, cookie: int, offset: int, error: int, text: str) -> list[Buffer]:
        """An error of the protocol, with a sentence for clients that take one."""

    def data(self, cookie: int, offset: int, parts: list[Request]) -> list[Buffer]:
        """The reply to a READ that was carried out in *parts*, in order."""

    def begin(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        """The reply to a READ that is sent as it comes, up to its data."""

    def end(self, cookie: int, offset: int) -> list[Buffer]:
        """What follows the data after `begin`."""

    def break_off(self, cookie: int, offset: int, left: int, error: int, text: str) -> list[Buffer] | None:
        """What follows `begin` and the data when *left* bytes cannot be had; None: nothing may follow but the end."""

    def status(self, cookie: int, offset: int, extents: Extents) -> list[Buffer]:
        """The reply to BLOCK_STATUS: the (length, flags) extents of base:allocation."""


def _payloads(parts: list[Request]) -> list[Buffer]:
    payloads = [part.payload for part in parts]
    return [payload for payload in payloads if payload is not None]


def _padding(length: int) -> list[Buffer]:
    zeroes = memoryview(_ZEROES)
    return [zeroes[: length - at] for at in range(0, length, IO_MAX)]


def _answer_all(replies: Replies, batch: list[Request], structured: bool) -> tuple[list[Buffer], int]:
    """Answer *batch* in order, the errors one by one."""
    out: list[Buffer] = []
    at, n_bytes = batches.pack_replies(batch, 0, structured, out)
    while at < len(batch):
        r = batch[at]
        out += replies.error(r.cookie, r.offset, *nbd_error(r.error))
        at, more = batches.pack_replies(batch, at + 1, structured, out)
        n_bytes += r.length + more
    return out, n_bytes


class SimpleReplies:
    """16 bytes, then the data of a READ. There is no room for an error text."""

    def batch(self, batch: list[Request]) -> tuple[list[Buffer], int]:
        return _answer_all(self, batch, False)

    def success(self, cookie: int, offset: int) -> list[Buffer]:
        return [SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie)]

    def error(self, cookie: int, offset: int, error: int, text: str) -> list[Buffer]:
        return [SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, error, cookie)]

    def data(self, cookie: int, offset: int, parts: list[Request]) -> list[Buffer]:
        return [*self.success(cookie, offset), *_payloads(parts)]

    def begin(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        return self.success(cookie, offset)

    def end(self, cookie: int, offset: int) -> list[Buffer]:
        return []

    def break_off(self, cookie: int, offset: int, left: int, error: int, text: str) -> list[Buffer] | None:
        return None  # success was promised: the protocol wants the connection closed

    def status(self, cookie: int, offset: int, extents: Extents) -> list[Buffer]:
        raise AssertionError("block status was accepted without structured replies")


class StructuredReplies:
    """Chunks for data and errors; the success of other commands stays a simple reply, which is shorter."""

    def batch(self, batch: list[Request]) -> tuple[list[Buffer], int]:
        return _answer_all(self, batch, True)

    def success(self, cookie: int, offset: int) -> list[Buffer]:
        return [CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _NONE, cookie, 0)]

    def error(self, cookie: int, offset: int, error: int, text: str) -> list[Buffer]:
        message = text.encode()
        length = ERROR_DATA.size + len(message)
        head = CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.ERROR, cookie, length)
        return [head + ERROR_DATA.pack(error, len(message)) + message]

    def data(self, cookie: int, offset: int, parts: list[Request]) -> list[Buffer]:
        length = 8 + sum(part.length for part in parts)
        head = DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, length, offset)
        return [head, *_payloads(parts)]

    def begin(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        return [DATA_CHUNK.pack(STRUCTURED_REPLY_MAGIC, _MORE, _DATA, cookie, 8 + length, offset)]

    def end(self, cookie: int, offset: int) -> list[Buffer]:
        return self.success(cookie, offset)

    def break_off(self, cookie: int, offset: int, left: int, error: int, text: str) -> list[Buffer] | None:
        return [*_padding(left), *self.error(cookie, offset, error, text)]

    def status(self, cookie: int, offset: int, extents: Extents) -> list[Buffer]:
        data = U32.pack(BASE_ALLOCATION_ID) + b"".join(EXTENT.pack(*extent) for extent in extents)
        return [CHUNK.pack(STRUCTURED_REPLY_MAGIC, CHUNK_DONE, Chunk.BLOCK_STATUS, cookie, len(data)) + data]


class ExtendedReplies:
    """32-byte chunks for everything, which repeat the offset of the request."""

    def batch(self, batch: list[Request]) -> tuple[list[Buffer], int]:
        view = memoryview(bytearray(EXTENDED_DATA_CHUNK.size * len(batch)))
        pack, pack_data = EXTENDED_CHUNK.pack_into, EXTENDED_DATA_CHUNK.pack_into
        out: list[Buffer] = []
        magic, done, start, at, n_bytes = EXTENDED_REPLY_MAGIC, CHUNK_DONE, 0, 0, 0
        for r in batch:
            offset, length = r.offset, r.length
            n_bytes += length
            if r.error:
                out += self.error(r.cookie, offset, *nbd_error(r.error))
            elif r.op == _READ:
                pack_data(view, at, magic, done, _DATA, r.cookie, offset, 8 + length, offset)
                at += 40
                out.append(view[start:at])
                out.append(r.payload)  # type: ignore[arg-type]  # a READ without error has one
                start = at
            else:
                pack(view, at, magic, done, _NONE, r.cookie, offset, 0)
                at += 32
        if at > start:
            out.append(view[start:at])
        return out, n_bytes

    def success(self, cookie: int, offset: int) -> list[Buffer]:
        return [EXTENDED_CHUNK.pack(EXTENDED_REPLY_MAGIC, CHUNK_DONE, _NONE, cookie, offset, 0)]

    def error(self, cookie: int, offset: int, error: int, text: str) -> list[Buffer]:
        message = text.encode()
        length = ERROR_DATA.size + len(message)
        head = EXTENDED_CHUNK.pack(
            EXTENDED_REPLY_MAGIC, CHUNK_DONE, Chunk.ERROR, cookie, offset, length
        )
        return [head + ERROR_DATA.pack(error, len(message)) + message]

    def data(self, cookie: int, offset: int, parts: list[Request]) -> list[Buffer]:
        length = 8 + sum(part.length for part in parts)
        head = EXTENDED_DATA_CHUNK.pack(
            EXTENDED_REPLY_MAGIC, CHUNK_DONE, _DATA, cookie, offset, length, offset
        )
        return [head, *_payloads(parts)]

    def begin(self, cookie: int, offset: int, length: int) -> list[Buffer]:
        return [EXTENDED_DATA_CHUNK.pack(EXTENDED_REPLY_MAGIC, _MORE, _DATA, cookie, offset, 8 + length, offset)]

    def end(self, cookie: int, offset: int) -> list[Buffer]:
        return self.success(cookie, offset)

    def break_off(self, cookie: int, offset: int, left: int, error: int, text: str) -> list[Buffer] | None:
        return [*_padding(left), *self.error(cookie, offset, error, text)]

    def status(self, cookie: int, offset: int, extents: Extents) -> list[Buffer]:
        data = EXTENDED_STATUS.pack(BASE_ALLOCATION_ID, len(extents))
        data += b"".join(EXTENDED_EXTENT.pack(*extent) for extent in extents)
        head = EXTENDED_CHUNK.pack(
            EXTENDED_REPLY_MAGIC, CHUNK_DONE, Chunk.BLOCK_STATUS_EXT, cookie, offset, len(data)
        )
        return [head + data]
