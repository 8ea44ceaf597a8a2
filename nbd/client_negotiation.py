"""The client's side of the negotiation: from the server's greeting to the transmission phase with one export.

Decides nothing but the order of words: fixed newstyle, one GO with a question about block sizes, simple
replies (the kernel's client reads no others). Pure: `consume` takes what has arrived, the answers collect
in ``out``; then there are either ``terms``, or a ``refusal`` in the server's own words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .codec import (
    CLIENT_FLAGS,
    FIXED_NEWSTYLE,
    GREETING,
    INFO_BLOCK_SIZE_DATA,
    INFO_EXPORT_DATA,
    INIT_MAGIC,
    NO_ZEROES,
    OPTION,
    OPTION_MAGIC,
    OPTION_MAX,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    U16,
    U32,
    Info,
    Opt,
    Rep,
)

_ERROR: Final = 1 << 31  # set in the type of every reply that is an error


class ServerMistake(Exception):
    """What the server says is not this protocol; one sentence."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What the server promised for the export. Sizes are bytes; *flags* are its transmission flags."""

    size: int
    flags: int
    block_min: int = 1  # the protocol's own value where the server names none


class ClientNegotiation:
    """One negotiation for *export*. Feed it with `consume`; send and clear ``out``.

    Over when ``terms`` or ``refusal`` is set. In the first case the connection is in the transmission
    phase and the server sends nothing unasked; in the second it is of no more use.
    """

    def __init__(self, export: str) -> None:
        self._export = export.encode()
        self._greeted = False
        self._info: tuple[int, int] | None = None  # size and flags
        self._block_min = 1
        self.terms: Terms | None = None
        self.refusal = ""
        self.out = bytearray()

    @property
    def over(self) -> bool:
        return self.terms is not None or bool(self.refusal)

    def consume(self, view: bytes | bytearray | memoryview) -> int:
        """Take the complete messages at the start of *view*; return their bytes. Raises ServerMistake."""
        at = 0
        while not self.over:
            step = self._take(memoryview(view)[at:])
            if not step:
                break
            at += step
        return at

    def _take(self, rest: memoryview) -> int:
        """Handle one message; 0 when it is not complete yet."""
        if not self._greeted:
            if len(rest) < GREETING.size:
                return 0
            self._take_greeting(*GREETING.unpack_from(rest))
            return GREETING.size
        if len(rest) < OPTION_REPLY.size:
            return 0
        magic, option, kind, length = OPTION_REPLY.unpack_from(rest)
        if magic != OPTION_REPLY_MAGIC or option != Opt.GO:
            raise ServerMistake(f"a reply that nobody asked for (magic {magic:#x}, option {option})")
        if length > OPTION_MAX:
            raise ServerMistake(f"a reply of {length} bytes")
        end = OPTION_REPLY.size + int(length)
        if len(rest) < end:
            return 0
        self._take_reply(kind, bytes(rest[OPTION_REPLY.size : end]))
        return end

    def _take_greeting(self, magic: int, option_magic: int, flags: int) -> None:
        if (magic, option_magic) != (INIT_MAGIC, OPTION_MAGIC) or not flags & FIXED_NEWSTYLE:
            raise ServerMistake("it does not greet as an NBD server with fixed newstyle negotiation")
        self._greeted = True
        wanted = U16.pack(1) + U16.pack(Info.BLOCK_SIZE)
        data = U32.pack(len(self._export)) + self._export + wanted
        self.out += CLIENT_FLAGS.pack(flags & (FIXED_NEWSTYLE | NO_ZEROES))
        self.out += OPTION.pack(OPTION_MAGIC, Opt.GO, len(data)) + data

    def _take_reply(self, kind: int, data: bytes) -> None:
        if kind == Rep.ACK:
            if self._info is None:
                raise ServerMistake("it agrees without having named the size of the export")
            self.terms = Terms(*self._info, self._block_min)
        elif kind & _ERROR:
            self.refusal = data.decode(errors="replace") or f"NBD error {kind & ~_ERROR}"
        elif kind == Rep.INFO and len(data) >= U16.size:
            self._take_info(data)

    def _take_info(self, data: bytes) -> None:
        (info,) = U16.unpack_from(data)
        if info == Info.EXPORT and len(data) == INFO_EXPORT_DATA.size:
            _, size, flags = INFO_EXPORT_DATA.unpack(data)
            self._info = size, flags
        elif info == Info.BLOCK_SIZE and len(data) == INFO_BLOCK_SIZE_DATA.size:
            self._block_min = INFO_BLOCK_SIZE_DATA.unpack(data)[1]
