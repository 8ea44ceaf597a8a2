"""The packets of wire protocol 100 and 101: their numbers, their headers and what may arrive where.

Decides which packet is legal on which socket with which length, and nothing about its meaning. The two
tables at the end are the whole truth: `check_data` and `check_meta` enforce them before any byte of a
payload is awaited, and `packet_table` prints them for the documents. Layouts of payloads are in `wire`.

Source of the numbers: drbd_protocol.h, enum drbd_packet; struct p_header80, p_header95, p_header100;
the command tables in front of drbdd() and drbd_ack_receiver() in drbd_receiver.c.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct, error
from typing import Final, NamedTuple

from .errors import PeerProtocolError
from .units import IO_MAX


class Packet(IntEnum):
    """Packet codes, named as in DRBD without the P_ in front."""

    DATA = 0x00
    DATA_REPLY = 0x01
    RS_DATA_REPLY = 0x02
    BARRIER = 0x03
    BITMAP = 0x04
    BECOME_SYNC_TARGET = 0x05  # obsolete
    BECOME_SYNC_SOURCE = 0x06  # obsolete
    UNPLUG_REMOTE = 0x07
    DATA_REQUEST = 0x08
    RS_DATA_REQUEST = 0x09
    SYNC_PARAM = 0x0A  # before protocol 89
    PROTOCOL = 0x0B
    UUIDS = 0x0C
    SIZES = 0x0D
    STATE = 0x0E
    SYNC_UUID = 0x0F
    AUTH_CHALLENGE = 0x10
    AUTH_RESPONSE = 0x11
    STATE_CHG_REQ = 0x12
    PING = 0x13
    PING_ACK = 0x14
    RECV_ACK = 0x15
    WRITE_ACK = 0x16
    RS_WRITE_ACK = 0x17
    SUPERSEDED = 0x18
    NEG_ACK = 0x19
    NEG_DREPLY = 0x1A
    NEG_RS_DREPLY = 0x1B
    BARRIER_ACK = 0x1C
    STATE_CHG_REPLY = 0x1D
    OV_REQUEST = 0x1E
    OV_REPLY = 0x1F
    OV_RESULT = 0x20
    CSUM_RS_REQUEST = 0x21
    RS_IS_IN_SYNC = 0x22
    SYNC_PARAM89 = 0x23
    COMPRESSED_BITMAP = 0x24
    DELAY_PROBE = 0x27
    OUT_OF_SYNC = 0x28
    RS_CANCEL = 0x29
    CONN_ST_CHG_REQ = 0x2A
    CONN_ST_CHG_REPLY = 0x2B
    RETRY_WRITE = 0x2C
    PROTOCOL_UPDATE = 0x2D
    TRIM = 0x31
    RS_THIN_REQ = 0x32
    RS_DEALLOCATED = 0x33
    WSAME = 0x34
    ZEROES = 0x36
    INITIAL_META = 0xFFF1
    INITIAL_DATA = 0xFFF2
    CONNECTION_FEATURES = 0xFFFE


class Feature(IntFlag):
    """Feature flags of P_CONNECTION_FEATURES; in force when both nodes offer them."""

    TRIM = 1
    THIN_RESYNC = 2
    WSAME = 4
    WZEROES = 8


# Flags of a write (dp_flags).
DP_RW_SYNC: Final = 0x2
DP_MAY_SET_IN_SYNC: Final = 0x4
DP_FUA: Final = 0x10
DP_FLUSH: Final = 0x20
DP_DISCARD: Final = 0x40
DP_SEND_RECEIVE_ACK: Final = 0x80
DP_SEND_WRITE_ACK: Final = 0x100
DP_WSAME: Final = 0x200
DP_ZEROES: Final = 0x400

# Values of block_id with a fixed meaning.
ID_SYNCER: Final = 2**64 - 1
ID_IN_SYNC: Final = 4711
ID_OUT_OF_SYNC: Final = 4712

# ----------------------------------------------------------------------------------------- headers

HEADER80: Final = 8  # bytes, also of header95
HEADER: Final = 16  # bytes of header100
MAGIC: Final = 0x8620EC20
MAGIC80: Final = 0x83740267
MAGIC95: Final = 0x835A

_HEADER80: Final = Struct(">IHH")  # magic, command, length
_HEADER95: Final = Struct(">HHI")  # magic, command, length
HEADER100: Final = Struct(">IHHII")  # magic, volume, command, length, pad

_View = bytes | bytearray | memoryview


def packet(cmd: int, payload: _View = b"", volume: int = 0) -> bytes:
    """A whole packet with header100. Connection-wide packets carry volume 0."""
    return HEADER100.pack(MAGIC, volume, cmd, len(payload), 0) + payload


def packet80(cmd: int, payload: _View = b"") -> bytes:
    """A whole packet with header80: the initial packets and P_CONNECTION_FEATURES."""
    return _HEADER80.pack(MAGIC80, cmd, len(payload)) + payload


def parse_header80(view: _View, at: int = 0) -> tuple[int, int]:
    """Command and payload length of the 8-byte header at *at*, header80 or header95.

    Errors: PeerProtocolError, naming the bytes seen, when it is neither (or when fewer than 8 are there).
    """
    try:
        magic, cmd, length = _HEADER80.unpack_from(view, at)
        if magic == MAGIC80:
            return cmd, length
        magic, cmd, length = _HEADER95.unpack_from(view, at)
        if magic == MAGIC95:
            return cmd, length
    except error:
        pass
    raise PeerProtocolError(
        f"the first packet must start with 83740267 or 835a, the peer sent {_seen(view, at, HEADER80)}; "
        "is that port DRBD's?"
    )


def parse_header(view: _View, at: int = 0) -> tuple[int, int, int]:
    """Volume, command and payload length of the header100 at *at*.

    Errors: PeerProtocolError on another magic or a pad that is not zero, naming the bytes seen.
    """
    try:
        magic, volume, cmd, length, pad = HEADER100.unpack_from(view, at)
    except error:
        raise PeerProtocolError(f"a packet header ends early: {_seen(view, at, HEADER)}") from None
    if magic != MAGIC or pad:
        what = "pad is not zero" if magic == MAGIC else "magic is not 8620ec20"
        raise PeerProtocolError(f"a packet header's {what}: the peer sent {_seen(view, at, HEADER)}")
    return volume, cmd, length


def _seen(view: _View, at: int, length: int) -> str:
    return bytes(view[at : at + length]).hex(" ", 4) or "nothing"


def packet_name(cmd: int) -> str:
    """P_NAME for the operator; the number when it is no packet of this protocol."""
    try:
        return f"P_{Packet(cmd).name}"
    except ValueError:
        return f"packet 0x{cmd:x}"


# ------------------------------------------------------------------------------- what may arrive where


class PacketRule(NamedTuple):
    """What may arrive on the data socket: *fixed* bytes, then at most *longest* - *fixed* if allowed."""

    name: str
    fixed: int
    payload_allowed: bool
    longest: int


DIGEST_MAX: Final = 64  # SHA-512
NAME_MAX: Final = 64  # an algorithm's name with its NUL
CHALLENGE_MIN: Final = 64
CHALLENGE_MAX: Final = 128
BITMAP_PAYLOAD_MAX: Final = 4096 - HEADER  # a bitmap packet is at most one page, header included


def _rule(cmd: Packet, fixed: int, extra: int = 0) -> tuple[int, PacketRule]:
    return int(cmd), PacketRule(f"P_{cmd.name}", fixed, extra > 0, fixed + extra)


# P_WSAME is missing on purpose: P_SIZES tells the peer that we cannot do it, and no kernel sends it then.
DATA_SOCKET: Final[dict[int, PacketRule]] = dict(
    (
        _rule(Packet.DATA, 24, DIGEST_MAX + IO_MAX),
        _rule(Packet.DATA_REPLY, 24, DIGEST_MAX + IO_MAX),
        _rule(Packet.RS_DATA_REPLY, 24, DIGEST_MAX + IO_MAX),
        _rule(Packet.BARRIER, 8),
        _rule(Packet.BITMAP, 0, BITMAP_PAYLOAD_MAX),
        _rule(Packet.UNPLUG_REMOTE, 0),
        _rule(Packet.DATA_REQUEST, 24),
        _rule(Packet.RS_DATA_REQUEST, 24),
        _rule(Packet.PROTOCOL, 24, NAME_MAX),
        _rule(Packet.UUIDS, 48),
        _rule(Packet.SIZES, 32, 24),
        _rule(Packet.STATE, 4),
        _rule(Packet.SYNC_UUID, 8),
        _rule(Packet.AUTH_CHALLENGE, CHALLENGE_MIN, CHALLENGE_MAX - CHALLENGE_MIN),
        _rule(Packet.AUTH_RESPONSE, 0, DIGEST_MAX),
        _rule(Packet.STATE_CHG_REQ, 8),
        _rule(Packet.OV_REQUEST, 24),
        _rule(Packet.OV_REPLY, 24, DIGEST_MAX),
        _rule(Packet.CSUM_RS_REQUEST, 24, DIGEST_MAX),
        _rule(Packet.SYNC_PARAM89, 148),
        _rule(Packet.COMPRESSED_BITMAP, 1, BITMAP_PAYLOAD_MAX - 1),
        _rule(Packet.DELAY_PROBE, 8),
        _rule(Packet.OUT_OF_SYNC, 16),
        _rule(Packet.CONN_ST_CHG_REQ, 8),
        _rule(Packet.PROTOCOL_UPDATE, 24, NAME_MAX),
        _rule(Packet.TRIM, 28),
        _rule(Packet.RS_THIN_REQ, 24),
        _rule(Packet.RS_DEALLOCATED, 16),
        _rule(Packet.ZEROES, 28),
    )
)

META_SOCKET: Final[dict[int, int]] = {
    Packet.PING: 0,
    Packet.PING_ACK: 0,
    Packet.RECV_ACK: 24,
    Packet.WRITE_ACK: 24,
    Packet.RS_WRITE_ACK: 24,
    Packet.SUPERSEDED: 24,
    Packet.NEG_ACK: 24,
    Packet.NEG_DREPLY: 24,
    Packet.NEG_RS_DREPLY: 24,
    Packet.BARRIER_ACK: 8,
    Packet.STATE_CHG_REPLY: 4,
    Packet.OV_RESULT: 24,
    Packet.RS_IS_IN_SYNC: 24,
    Packet.DELAY_PROBE: 8,
    Packet.RS_CANCEL: 24,
    Packet.CONN_ST_CHG_REPLY: 4,
    Packet.RETRY_WRITE: 24,
}


def check_data(cmd: int, length: int) -> None:
    """PeerProtocolError unless *cmd* with *length* bytes after its header may come on the data socket."""
    rule = DATA_SOCKET.get(cmd)
    if rule is None:
        raise PeerProtocolError(f"{packet_name(cmd)} ({length} bytes) is not expected on the data socket")
    if not rule.fixed <= length <= rule.longest:
        raise PeerProtocolError(f"{rule.name} of {length} bytes; it has {_sizes(rule)}")


def check_meta(cmd: int, length: int) -> None:
    """PeerProtocolError unless *cmd* with *length* bytes after its header may come on the meta socket."""
    fixed = META_SOCKET.get(cmd)
    if fixed is None:
        raise PeerProtocolError(f"{packet_name(cmd)} ({length} bytes) is not expected on the meta socket")
    if fixed != length:
        raise PeerProtocolError(f"{packet_name(cmd)} of {length} bytes; it has {fixed}")


def _sizes(rule: PacketRule) -> str:
    return f"{rule.fixed} to {rule.longest}" if rule.payload_allowed else str(rule.fixed)


def packet_table() -> str:
    """The packets we understand as a markdown table, for the documents."""
    rows = [(cmd, "data", _sizes(rule)) for cmd, rule in DATA_SOCKET.items()]
    rows += [(cmd, "meta", str(fixed)) for cmd, fixed in META_SOCKET.items()]
    rows += [
        (Packet.INITIAL_META, "meta", "0"),
        (Packet.INITIAL_DATA, "data", "0"),
        (Packet.CONNECTION_FEATURES, "data", "72"),
    ]
    lines = ["| code | packet | socket | bytes after the header |", "|---|---|---|---|"]
    for cmd, socket, size in sorted(rows):
        lines.append(f"| 0x{cmd:02x} | {packet_name(cmd)} | {socket} | {size} |")
    return "\n".join(lines) + "\n"
