"""From the greeting to the transmission phase: fixed newstyle negotiation, bytes in and bytes out.

Decides which export a client gets and on what terms. Relies on `Exports` to find and open volumes; all
else is here. Pure: `consume` takes what has arrived, the answers collect in ``out``, and ``state`` says
what the connection is to do next. Section names in comments are those of the NBD protocol document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final, Protocol

from .codec import (
    BASE_ALLOCATION,
    BASE_ALLOCATION_ID,
    BLOCK_MIN,
    BLOCK_PREFERRED,
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
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
    PAYLOAD_MAX,
    STRING_MAX,
    U16,
    U32,
    ClientError,
    Info,
    Opt,
    Rep,
    TransmissionFlag,
)

if TYPE_CHECKING:
    from tandem.repl.edge.volume import Volume


class Exports(Protocol):
    """What a listener offers. The first volume is also the default export, ``""``."""

    def volumes(self) -> Sequence[Volume]: ...

    def not_yet(self, volume: Volume) -> bool:
        """Is *volume* to be made ready first? Then `Negotiation.go_on` is called once it may be opened."""

    def look(self, volume: Volume) -> tuple[bool, str | None]:
        """What `open` would say once *volume* has been made ready, as far as that is known; changes nothing."""

    def open(self, volume: Volume) -> tuple[bool, str | None]:
        """Open *volume* for this client: (writable, None), or (False, why not)."""



class State(Enum):
    HAGGLING = "negotiating"
    TRANSMISSION = "connected"  # ``terms`` are settled and the volume is open
    ENDED = "ended"  # send ``out``, then close


@dataclass(frozen=True, slots=True)
class Terms:
    """What was agreed for the transmission phase."""

    volume: Volume
    writable: bool
    structured: bool
    extended: bool
    allocation: bool  # base:allocation was selected for this export


class _BadOption(Exception):
    """An option that gets an error reply: its type and sentence."""

    def __init__(self, reply: Rep, text: str) -> None:
        super().__init__(text)
        self.reply = reply
        self.text = text


# nbd-client overwrites the last byte of an error text, so every sentence ends with a full stop to lose.
_NO_DATA: Final = "This option takes no data."
_CUT_SHORT: Final = "The data of this option ends too early."
_LEFT_OVER: Final = "The data of this option is longer than its own count says."


def transmission_flags(volume: Volume, writable: bool, structured: bool) -> int:
    """The flags under which *volume* is exported (16 bits)."""
    flags = (
        TransmissionFlag.HAS_FLAGS
        | TransmissionFlag.SEND_FLUSH
        | TransmissionFlag.SEND_FUA
        | TransmissionFlag.SEND_TRIM
        | TransmissionFlag.SEND_WRITE_ZEROES
        | TransmissionFlag.SEND_FAST_ZERO
        | TransmissionFlag.CAN_MULTI_CONN
    )
    if not writable:
        flags |= TransmissionFlag.READ_ONLY
    if structured:
        flags |= TransmissionFlag.SEND_DF
    if volume.rotational:
        flags |= TransmissionFlag.ROTATIONAL
    return int(flags)


class Negotiation:
    """One client's negotiation. Feed it with `consume`; send and clear ``out``; obey ``state``."""

    def __init__(self, exports: Exports) -> None:
        self._exports = exports
        self._client_flags: int | None = None
        self._structured = False
        self._extended = False
        self._context_for: str | None = None  # the export name for which base:allocation was selected
        self._parked: tuple[int, bytes] | None = None  # an option whose volume is being made ready
        self._ready = False  # it was: it is not asked about twice
        self._skip = 0  # bytes of an oversized option still to be thrown away
        self.state = State.HAGGLING
        self.terms: Terms | None = None
        self.why = ""  # one sentence about why the session ended, for the log
        self.out = bytearray(GREETING.pack(INIT_MAGIC, OPTION_MAGIC, FIXED_NEWSTYLE | NO_ZEROES))

    # ------------------------------------------------------------------------------------ framing

    def consume(self, view: memoryview) -> int:
        """Take the complete messages at the start of *view*; return their bytes.

        Stops as soon as the negotiation is over: what follows belongs to the transmission phase. Stops also
        while it is ``parked``; what follows is to be offered again after `go_on`.
        Raises ClientError when the client is not speaking this protocol.
        """
        at = 0
        while self.state is State.HAGGLING and not self.parked and at < len(view):
            rest = view[at:]
            if self._skip:
                step = min(self._skip, len(rest))
                self._skip -= step
            elif self._client_flags is None:
                if len(rest) < CLIENT_FLAGS.size:
                    break
                self._take_client_flags(int(CLIENT_FLAGS.unpack_from(rest)[0]))
                step = CLIENT_FLAGS.size
            else:
                step = self._take_option(rest)
                if not step:
                    break
            at += step
        return at

    @property
    def parked(self) -> bool:
        """Does the client wait for a volume that is being made ready?"""
        return self._parked is not None

    def go_on(self) -> None:
        """The volume is as ready as it will be: handle the option that waited for it."""
        assert self._parked is not None
        (option, data), self._parked = self._parked, None
        self._ready = True
        self._handle(option, data)
        self._ready = False

    def _waits(self, volume: Volume, option: int, data: bytes) -> bool:
        if self._ready or not self._exports.not_yet(volume):
            return False
        self._parked = option, data
        return True

    def need(self, rest: memoryview) -> int:
        """The length of the incomplete message *rest*, for the receiver."""
        if self._client_flags is None:
            return CLIENT_FLAGS.size
        if len(rest) < OPTION.size:
            return OPTION.size
        return OPTION.size + int(OPTION.unpack_from(rest)[2])

    def _take_client_flags(self, flags: int) -> None:
        if flags & ~(FIXED_NEWSTYLE | NO_ZEROES):
            raise ClientError(f"unknown client flags 0x{flags:x}")
        self._client_flags = flags

    def _take_option(self, rest: memoryview) -> int:
        """Handle one option; 0 when it is not complete yet."""
        if len(rest) < OPTION.size:
            return 0
        magic, option, length = OPTION.unpack_from(rest)
        if magic != OPTION_MAGIC:
            raise ClientError(f"an option starts with 0x{magic:016x} instead of IHAVEOPT")
        assert self._client_flags is not None
        if not self._client_flags & FIXED_NEWSTYLE and option != Opt.EXPORT_NAME:
            raise ClientError("the client did not ask for fixed newstyle and may send only EXPORT_NAME")
        if length > OPTION_MAX:
            if option == Opt.EXPORT_NAME:
                raise ClientError(f"an export name of {length} bytes")
            self._error(option, Rep.ERR_TOO_BIG, f"The data of an option may have {OPTION_MAX} bytes.")
            self._skip = length
            return OPTION.size
        end = OPTION.size + int(length)
        if len(rest) < end:
            return 0
        self._handle(option, bytes(rest[OPTION.size : end]))
        return end

    # ------------------------------------------------------------------------------------ answers

    def _reply(self, option: int, reply: Rep, data: bytes = b"") -> None:
        self.out += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data))
        self.out += data

    def _error(self, option: int, reply: Rep, text: str) -> None:
        encoded = text.encode()[:STRING_MAX]
        self._reply(option, reply, encoded.decode(errors="ignore").encode())

    def _end(self, why: str) -> None:
        self.state = State.ENDED
        self.why = why

    # ------------------------------------------------------------------------------------ options

    def _handle(self, option: int, data: bytes) -> None:
        if option == Opt.EXPORT_NAME:
            self._export_name(data)
        elif option == Opt.ABORT:  # its data, if any, is ignored
            self._reply(option, Rep.ACK)
            self._end("the client ended the negotiation")
        else:
            try:
                self._answer(option, data)
            except _BadOption as bad:
                self._error(option, bad.reply, bad.text)

    def _answer(self, option: int, data: bytes) -> None:
        if option == Opt.LIST:
            self._list(data)
        elif option == Opt.INFO or option == Opt.GO:
            self._info(option, data)
        elif option == Opt.STRUCTURED_REPLY:
            self._structured_reply(data)
        elif option == Opt.LIST_META_CONTEXT:
            self._list_meta_context(data)
        elif option == Opt.SET_META_CONTEXT:
            self._set_meta_context(data)
        elif option == Opt.EXTENDED_HEADERS:
            self._extended_headers(data)
        elif option == Opt.STARTTLS:
            raise _BadOption(Rep.ERR_UNSUP, "This server does not offer TLS.")
        else:
            raise _BadOption(Rep.ERR_UNSUP, f"This server does not know option {option}.")

    def _export_name(self, data: bytes) -> None:
        """The old way to enter transmission; it has no error reply, so every failure ends the session."""
        if self._extended:
            raise ClientError("EXPORT_NAME after extended headers were agreed")
        try:
            name = _text(data)
            volume = self._find(name)
        except _BadOption as bad:
            self._end(bad.text)
            return
        if self._waits(volume, Opt.EXPORT_NAME, data):
            return
        writable, refusal = self._exports.open(volume)
        if refusal is not None:
            self._end(refusal)
            return
        flags = transmission_flags(volume, writable, self._structured)
        self.out += EXPORT_NAME_REPLY.pack(volume.size, flags)
        assert self._client_flags is not None
        if not self._client_flags & NO_ZEROES:
            self.out += bytes(124)
        self._enter(volume, writable, name)

    def _list(self, data: bytes) -> None:
        if data:
            raise _BadOption(Rep.ERR_INVALID, _NO_DATA)
        for volume in self._exports.volumes():
            name = volume.name.encode()
            details = volume.description.encode()[:STRING_MAX]
            self._reply(Opt.LIST, Rep.SERVER, U32.pack(len(name)) + name + details)
        self._reply(Opt.LIST, Rep.ACK)

    def _info(self, option: int, data: bytes) -> None:
        """INFO and GO: the same answers, but only GO makes the volume ready, opens it, and ends the haggling."""
        fields = _Fields(data)
        name = fields.string()
        wanted = {fields.u16() for _ in range(fields.u16())}
        fields.finish()
        volume = self._find(name)
        if option == Opt.GO and self._waits(volume, option, data):
            return
        writable, refusal = self._exports.open(volume) if option == Opt.GO else self._exports.look(volume)
        if refusal is not None:
            raise _BadOption(Rep.ERR_POLICY, refusal)
        flags = transmission_flags(volume, writable, self._structured)
        self._reply(option, Rep.INFO, INFO_EXPORT_DATA.pack(Info.EXPORT, volume.size, flags))
        if Info.NAME in wanted:
            self._reply(option, Rep.INFO, U16.pack(Info.NAME) + volume.name.encode())
        if Info.DESCRIPTION in wanted:
            text = volume.description.encode()[:STRING_MAX]
            self._reply(option, Rep.INFO, U16.pack(Info.DESCRIPTION) + text)
        if Info.BLOCK_SIZE in wanted:
            sizes = INFO_BLOCK_SIZE_DATA.pack(Info.BLOCK_SIZE, BLOCK_MIN, BLOCK_PREFERRED, PAYLOAD_MAX)
            self._reply(option, Rep.INFO, sizes)
        self._reply(option, Rep.ACK)
        if option == Opt.GO:
            self._enter(volume, writable, name)

    def _structured_reply(self, data: bytes) -> None:
        if data:
            raise _BadOption(Rep.ERR_INVALID, _NO_DATA)
        if self._extended:
            raise _BadOption(Rep.ERR_EXT_HEADER_REQD, "Extended headers were agreed already.")
        self._structured = True
        self._reply(Opt.STRUCTURED_REPLY, Rep.ACK)

    def _extended_headers(self, data: bytes) -> None:
        if data:
            raise _BadOption(Rep.ERR_INVALID, _NO_DATA)
        if self._extended:
            raise _BadOption(Rep.ERR_INVALID, "Extended headers were agreed already.")
        self._structured = self._extended = True
        self._reply(Opt.EXTENDED_HEADERS, Rep.ACK)

    def _list_meta_context(self, data: bytes) -> None:
        name, queries = _context_queries(data)
        self._find(name)
        if not queries or BASE_ALLOCATION in queries or "base:" in queries:
            self._reply(Opt.LIST_META_CONTEXT, Rep.META_CONTEXT, U32.pack(0) + BASE_ALLOCATION.encode())
        self._reply(Opt.LIST_META_CONTEXT, Rep.ACK)

    def _set_meta_context(self, data: bytes) -> None:
        self._context_for = None  # the earlier selection is void even when this one fails
        if not self._structured:
            raise _BadOption(Rep.ERR_INVALID, "Metadata contexts need structured replies first.")
        name, queries = _context_queries(data)
        self._find(name)
        if BASE_ALLOCATION in queries:
            self._context_for = name
            context = U32.pack(BASE_ALLOCATION_ID) + BASE_ALLOCATION.encode()
            self._reply(Opt.SET_META_CONTEXT, Rep.META_CONTEXT, context)
        self._reply(Opt.SET_META_CONTEXT, Rep.ACK)

    # ------------------------------------------------------------------------------------ helpers

    def _find(self, name: str) -> Volume:
        volumes = self._exports.volumes()
        for volume in volumes:
            if volume.name == name or not name:
                return volume
        known = ", ".join(volume.name for volume in volumes) or "none at all"
        raise _BadOption(Rep.ERR_UNKNOWN, f"There is no export '{name[:256]}' here; there is: {known}.")

    def _enter(self, volume: Volume, writable: bool, name: str) -> None:
        allocation = self._context_for == name
        self.terms = Terms(volume, writable, self._structured, self._extended, allocation)
        self.state = State.TRANSMISSION


def _text(data: bytes) -> str:
    """A string of the protocol. Raises _BadOption."""
    if len(data) > STRING_MAX:
        raise _BadOption(Rep.ERR_TOO_BIG, f"A string may have at most {STRING_MAX} bytes.")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise _BadOption(Rep.ERR_INVALID, "A string of this option is not UTF-8.") from error
    if "\0" in text:
        raise _BadOption(Rep.ERR_INVALID, "A string of this option contains a NUL.")
    return text


class _Fields:
    """Reads the fields of an option's data in order. Raises _BadOption where they do not fit."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, n: int) -> bytes:
        end = self._at + n
        if end > len(self._data):
            raise _BadOption(Rep.ERR_INVALID, _CUT_SHORT)
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def u16(self) -> int:
        return int.from_bytes(self._take(2), "big")

    def u32(self) -> int:
        return int.from_bytes(self._take(4), "big")

    def string(self) -> str:
        return _text(self._take(self.u32()))

    def finish(self) -> None:
        if self._at != len(self._data):
            raise _BadOption(Rep.ERR_INVALID, _LEFT_OVER)


def _context_queries(data: bytes) -> tuple[str, list[str]]:
    """The export name and the queries of LIST_META_CONTEXT and SET_META_CONTEXT."""
    fields = _Fields(data)
    name = fields.string()
    queries = [fields.string() for _ in range(fields.u32())]
    fields.finish()
    return name, queries
