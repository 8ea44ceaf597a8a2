"""The NBD protocol's numbers and layouts, and the one table from errno to NBD error.

Everything is big-endian. Names are the protocol's own without the NBD_ prefix. Source of every number:
doc/proto.md of the NetworkBlockDevice project (the EXTENDED_HEADERS extension included), except where a
comment names another.
"""

from __future__ import annotations

import errno
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

# ------------------------------------------------------------------------------------ limits

DEFAULT_PORT: Final = 10809  # assigned by IANA
BLOCK_MIN: Final = 512  # what the replicated volume can address
BLOCK_PREFERRED: Final = 4096  # one bit of the bitmap
PAYLOAD_MAX: Final = 32 << 20  # what clients that negotiated no sizes may rely on
STRING_MAX: Final = 4096  # export names, context queries, messages
OPTION_MAX: Final = 64 << 10  # bytes of one option: far more than any real client sends
EXTENTS_MAX: Final = 16 << 10  # extents in one BLOCK_STATUS reply; the protocol allows 2**20

# ------------------------------------------------------------------------------------ negotiation

INIT_MAGIC: Final = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC: Final = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9

GREETING: Final = Struct(">QQH")  # init magic, option magic, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # magic, option, length of its data
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length of its data
EXPORT_NAME_REPLY: Final = Struct(">QH")  # size, transmission flags; then perhaps 124 zeroes
INFO_EXPORT_DATA: Final = Struct(">HQH")  # info type, size, transmission flags
INFO_BLOCK_SIZE_DATA: Final = Struct(">HIII")  # info type, minimum, preferred, maximum payload
U16: Final = Struct(">H")
U32: Final = Struct(">I")

FIXED_NEWSTYLE: Final = 1  # handshake flags, the same bits in both directions
NO_ZEROES: Final = 2


class Opt(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    PEEK_EXPORT = 4
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


_ERR: Final = 1 << 31


class Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = _ERR + 1
    ERR_POLICY = _ERR + 2
    ERR_INVALID = _ERR + 3
    ERR_PLATFORM = _ERR + 4
    ERR_TLS_REQD = _ERR + 5
    ERR_UNKNOWN = _ERR + 6
    ERR_SHUTDOWN = _ERR + 7
    ERR_BLOCK_SIZE_REQD = _ERR + 8
    ERR_TOO_BIG = _ERR + 9
    ERR_EXT_HEADER_REQD = _ERR + 10


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TransmissionFlag(IntFlag):
    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


BASE_ALLOCATION: Final = "base:allocation"
BASE_ALLOCATION_ID: Final = 1  # ours to choose; unique within a session
STATE_HOLE: Final = 1  # flags of a base:allocation extent
STATE_ZERO: Final = 2

# ----------------------------------------------------------------------------------- transmission

REQUEST_MAGIC: Final = 0x25609513
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# The first eight bytes of a request (magic, flags, type) are read as one number, so that one look into
# one table decides about all three.
REQUEST: Final = Struct(">QQQI")  # magic and flags and type, cookie, offset, length
EXTENDED_REQUEST: Final = Struct(">QQQQ")
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, length
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")  # magic, flags, type, cookie, offset of the request, length
DATA_CHUNK: Final = Struct(">IHHQIQ")  # CHUNK and the offset of the data
EXTENDED_DATA_CHUNK: Final = Struct(">IHHQQQQ")
ERROR_DATA: Final = Struct(">IH")  # error, length of the message that follows
EXTENT: Final = Struct(">II")  # length, flags
EXTENDED_EXTENT: Final = Struct(">QQ")
EXTENDED_STATUS: Final = Struct(">II")  # context id, number of extents

CHUNK_DONE: Final = 1


class Cmd(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class CmdFlag(IntFlag):
    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk(IntEnum):
    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) + 1
    ERROR_OFFSET = (1 << 15) + 2


class NbdError(IntEnum):
    """The errors of the protocol; their numbers are Linux's."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ClientError(Exception):
    """The client broke the protocol so that nothing it sends can be understood: its session ends."""


# errno of the volume -> (error on the wire, the sentence for a client that takes one). What is not
# listed is an EIO; ENOMEM and ENOTSUP stay off the wire because clients give them other meanings.
ERRORS: Final[dict[int, tuple[NbdError, str]]] = {
    errno.EPERM: (NbdError.EPERM, "The volume does not accept writes."),
    errno.EACCES: (NbdError.EPERM, "The volume does not accept writes."),
    errno.EROFS: (NbdError.EPERM, "The volume does not accept writes."),
    errno.EIO: (NbdError.EIO, "No disk of the mirror could carry out the request."),
    errno.EINVAL: (NbdError.EINVAL, "The volume does not accept this request."),
    errno.ENOSPC: (NbdError.ENOSPC, "The backing storage is full."),
    errno.EDQUOT: (NbdError.ENOSPC, "The quota of the backing storage is used up."),
    errno.EFBIG: (NbdError.ENOSPC, "The backing file cannot grow that far."),
    errno.ESHUTDOWN: (NbdError.ESHUTDOWN, "The volume is being shut down."),
}


def nbd_error(number: int) -> tuple[NbdError, str]:
    """The NBD error for the errno *number* (not 0), and a sentence that says what it means here."""
    found = ERRORS.get(number)
    if found is None:
        name = errno.errorcode.get(number, str(number))
        return NbdError.EIO, f"The volume answered with {name}."
    return found
