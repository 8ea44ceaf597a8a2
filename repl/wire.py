"""Packet layouts of wire protocol 100 and 101: values to bytes and back.

Decides where each field stands, never what it means. Relies on `packets` for numbers, headers and the
tables of legal lengths, and re-exports all of it, so that everyone else imports `wire` alone. Every
`pack` gives a whole packet, header included; every `unpack` takes what follows the header and raises
PeerProtocolError for anything it cannot read. Integers are big-endian. ``block_id`` and ``barrier`` are
opaque to the node that did not choose them: unpacked and packed again they are the same bytes.

The hottest loops do not call these functions: they use DATA_PACKET and ACK in place.

Source of the layouts: drbd_protocol.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Final

from .errors import PeerProtocolError
from .packets import (
    BITMAP_PAYLOAD_MAX,
    CHALLENGE_MAX,
    CHALLENGE_MIN,
    DATA_SOCKET,
    DIGEST_MAX,
    DP_DISCARD,
    DP_FLUSH,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_RW_SYNC,
    DP_SEND_RECEIVE_ACK,
    DP_SEND_WRITE_ACK,
    DP_WSAME,
    DP_ZEROES,
    HEADER,
    HEADER80,
    HEADER100,
    ID_IN_SYNC,
    ID_OUT_OF_SYNC,
    ID_SYNCER,
    MAGIC,
    MAGIC80,
    MAGIC95,
    META_SOCKET,
    NAME_MAX,
    Feature,
    Packet,
    PacketRule,
    check_data,
    check_meta,
    packet,
    packet80,
    packet_name,
    packet_table,
    parse_header,
    parse_header80,
)

__all__ = [
    "ACK", "BITMAP_PAYLOAD_MAX", "CHALLENGE_MAX", "CHALLENGE_MIN", "DATA_PACKET", "DATA_SOCKET",
    "DIGEST_MAX", "DP_DISCARD", "DP_FLUSH", "DP_FUA", "DP_MAY_SET_IN_SYNC", "DP_RW_SYNC",
    "DP_SEND_RECEIVE_ACK", "DP_SEND_WRITE_ACK", "DP_WSAME", "DP_ZEROES", "HEADER", "HEADER80",
    "HEADER100", "ID_IN_SYNC", "ID_OUT_OF_SYNC", "ID_SYNCER", "MAGIC", "MAGIC80", "MAGIC95",
    "META_SOCKET", "NAME_MAX", "Feature", "Features", "Packet", "PacketRule", "Protocol", "QueueLimits",
    "Sizes", "SyncParam", "Uuids", "check_data", "check_meta", "pack_ack", "pack_barrier",
    "pack_barrier_ack", "pack_block_desc", "pack_block_req", "pack_data", "pack_state",
    "pack_state_change", "pack_state_reply", "pack_sync_uuid", "pack_trim", "packet", "packet80",
    "packet_name", "packet_table", "parse_header", "parse_header80", "unpack_ack", "unpack_barrier",
    "unpack_barrier_ack", "unpack_block_desc", "unpack_block_req", "unpack_data", "unpack_i32",
    "unpack_state_change", "unpack_trim", "unpack_u32", "unpack_u64",
]  # fmt: skip

View = bytes | bytearray | memoryview

# Whole packets, header100 included: magic, volume, command, length, pad, then the sub-header.
DATA_PACKET: Final = Struct(">IHHIIQQII")  # … sector, block_id, seq_num, dp_flags
ACK: Final = Struct(">IHHIIQQII")  # … sector, block_id, blksize, seq_num

_FEATURES: Final = Struct(">IIII56x")  # protocol_min, feature_flags, protocol_max, pad
_PROTOCOL: Final = Struct(">6I")
_SYNC_PARAM: Final = Struct(">I64s64s4I")
_SIZES: Final = Struct(">QQQIHH")
_QUEUE_LIMITS: Final = Struct(">5I3Bx")
_UUIDS: Final = Struct(">6Q")
_U32: Final = Struct(">I")
_I32: Final = Struct(">i")
_U64: Final = Struct(">Q")
_U32_PAIR: Final = Struct(">II")
_BLOCK_REQ: Final = Struct(">QQII")  # sector, block_id, blksize, pad
_BLOCK_ACK: Final = Struct(">QQII")  # sector, block_id, blksize, seq_num
_DATA: Final = Struct(">QQII")  # sector, block_id, seq_num, dp_flags
_TRIM: Final = Struct(">QQIII")  # the same and size
_BLOCK_DESC: Final = Struct(">QII")  # sector, blksize, pad

_U32_MASK: Final = 0xFFFF_FFFF


def _exact(what: str, layout: Struct, payload: View) -> None:
    if len(payload) != layout.size:
        raise PeerProtocolError(f"{what} of {len(payload)} bytes; it has {layout.size}")


def _at_least(what: str, layout: Struct, payload: View) -> None:
    if len(payload) < layout.size:
        raise PeerProtocolError(f"{what} of {len(payload)} bytes; it starts with {layout.size}")


def _name(what: str, field: bytes) -> str:
    """An algorithm's name: the bytes up to the first NUL."""
    name, nul, _ = field.partition(b"\0")
    if not nul or not name.isascii():
        raise PeerProtocolError(f"{what} is not a NUL-terminated name: {field[:NAME_MAX].hex()}")
    return name.decode("ascii")


def _name_field(name: str) -> bytes:
    encoded = name.encode("ascii")
    assert len(encoded) < NAME_MAX and b"\0" not in encoded, name
    return encoded


# --------------------------------------------------------------------------------- handshake, parameters


@dataclass(frozen=True, slots=True)
class Features:
    """P_CONNECTION_FEATURES: the protocol versions a node speaks and the `Feature` flags it offers."""

    protocol_min: int
    protocol_max: int
    flags: int

    def pack(self) -> bytes:
        """The packet with header80: the only one whose receiver does not know the version yet."""
        payload = _FEATURES.pack(self.protocol_min, self.flags, self.protocol_max, 0)
        return packet80(Packet.CONNECTION_FEATURES, payload)

    @classmethod
    def unpack(cls, payload: View) -> Features:
        """A protocol_max of 0 means "the same as protocol_min" and is read so; unknown flags stay."""
        _exact("P_CONNECTION_FEATURES", _FEATURES, payload)
        protocol_min, flags, protocol_max, _ = _FEATURES.unpack(payload)
        return cls(protocol_min, protocol_max or protocol_min, flags)


@dataclass(frozen=True, slots=True)
class Protocol:
    """P_PROTOCOL and P_PROTOCOL_UPDATE: the settings both nodes must share.

    *protocol* is 1 for A, 2 for B, 3 for C; the after_sb_* are `config.AfterSb` numbers from the sender's
    point of view; *conn_flags* bit 0 is discard-my-data, bit 1 a dry run; *two_primaries* is 0 or 1.
    """

    protocol: int
    after_sb_0p: int
    after_sb_1p: int
    after_sb_2p: int
    conn_flags: int
    two_primaries: int
    integrity_alg: str

    def pack(self, update: bool = False) -> bytes:
        """P_PROTOCOL of the handshake, or with *update* P_PROTOCOL_UPDATE."""
        payload = _PROTOCOL.pack(
            self.protocol, self.after_sb_0p, self.after_sb_1p, self.after_sb_2p, self.conn_flags,
            self.two_primaries,
        ) + _name_field(self.integrity_alg) + b"\0"  # fmt: skip
        return packet(Packet.PROTOCOL_UPDATE if update else Packet.PROTOCOL, payload)

    @classmethod
    def unpack(cls, payload: View) -> Protocol:
        _at_least("P_PROTOCOL", _PROTOCOL, payload)
        letter, sb_0p, sb_1p, sb_2p, conn_flags, two_primaries = _PROTOCOL.unpack_from(payload)
        name = bytes(payload[_PROTOCOL.size :])
        if len(name) > NAME_MAX:
            raise PeerProtocolError(f"P_PROTOCOL names an algorithm in {len(name)} bytes; at most {NAME_MAX}")
        alg = _name("data-integrity-alg in P_PROTOCOL", name)
        return cls(letter, sb_0p, sb_1p, sb_2p, conn_flags, two_primaries, alg)


@dataclass(frozen=True, slots=True)
class SyncParam:
    """P_SYNC_PARAM89: rates in KiB/s, times in 0.1 s, *c_fill_target* in sectors, names empty for none."""

    resync_rate: int
    verify_alg: str
    csums_alg: str
    c_plan_ahead: int
    c_delay_target: int
    c_fill_target: int
    c_max_rate: int

    def pack(self, volume: int) -> bytes:
        payload = _SYNC_PARAM.pack(
            self.resync_rate, _name_field(self.verify_alg), _name_field(self.csums_alg), self.c_plan_ahead,
            self.c_delay_target, self.c_fill_target, self.c_max_rate,
        )  # fmt: skip
        return packet(Packet.SYNC_PARAM89, payload, volume)

    @classmethod
    def unpack(cls, payload: View) -> SyncParam:
        _exact("P_SYNC_PARAM89", _SYNC_PARAM, payload)
        rate, verify, csums, *controller = _SYNC_PARAM.unpack(payload)
        if verify[-1] or csums[-1]:
            raise PeerProtocolError("an algorithm's name in P_SYNC_PARAM89 does not end with NUL")
        return cls(rate, _name("verify-alg", verify), _name("csums-alg", csums), *controller)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The tail of P_SIZES when Feature.WSAME is agreed: the sender's block size, alignment and abilities.

    Bytes, except the last three, which are 0 or 1.
    """

    physical_block_size: int
    logical_block_size: int
    alignment_offset: int
    io_min: int
    io_opt: int
    discard_enabled: int
    discard_zeroes_data: int = 0
    write_same_capable: int = 0


@dataclass(frozen=True, slots=True)
class Sizes:
    """P_SIZES: *d_size*, *u_size*, *c_size* in sectors (disk, configured, current), *max_bio_size* in bytes.

    *dds_flags* bit 0: assume the peer has the space; bit 1: no resync of new space.
    """

    d_size: int
    u_size: int
    c_size: int
    max_bio_size: int
    queue_order_type: int
    dds_flags: int
    limits: QueueLimits | None

    def pack(self, volume: int) -> bytes:
        payload = _SIZES.pack(
            self.d_size, self.u_size, self.c_size, self.max_bio_size, self.queue_order_type, self.dds_flags
        )
        q = self.limits
        if q is not None:
            payload += _QUEUE_LIMITS.pack(
                q.physical_block_size, q.logical_block_size, q.alignment_offset, q.io_min, q.io_opt,
                q.discard_enabled, q.discard_zeroes_data, q.write_same_capable,
            )  # fmt: skip
        return packet(Packet.SIZES, payload, volume)

    @classmethod
    def unpack(cls, payload: View, wsame: bool) -> Sizes:
        """*wsame*: Feature.WSAME is agreed, which decides whether the tail must or must not be there."""
        want = _SIZES.size + (_QUEUE_LIMITS.size if wsame else 0)
        if len(payload) != want:
            with_or_without = "with" if wsame else "without"
            raise PeerProtocolError(
                f"P_SIZES of {len(payload)} bytes; {with_or_without} the feature WSAME it has {want}"
            )
        limits = QueueLimits(*_QUEUE_LIMITS.unpack_from(payload, _SIZES.size)) if wsame else None
        d_size, u_size, c_size, max_bio_size, queue_order_type, dds_flags = _SIZES.unpack_from(payload)
        return cls(d_size, u_size, c_size, max_bio_size, queue_order_type, dds_flags, limits)


@dataclass(frozen=True, slots=True)
class Uuids:
    """P_UUIDS: a volume's generation UUIDs, the bits set in its bitmap, and flags.

    Flags: 1 discard-my-data, 2 was a crashed primary, 4 the Negotiating disk is really Inconsistent,
    8 skip the initial sync.
    """

    current: int
    bitmap: int
    history0: int
    history1: int
    bits: int
    flags: int

    def pack(self, volume: int) -> bytes:
        payload = _UUIDS.pack(
            self.current, self.bitmap, self.history0, self.history1, self.bits, self.flags
        )
        return packet(Packet.UUIDS, payload, volume)

    @classmethod
    def unpack(cls, payload: View) -> Uuids:
        _exact("P_UUIDS", _UUIDS, payload)
        return cls(*_UUIDS.unpack(payload))


# ------------------------------------------------------------------------------------------------ state


def pack_state(word: int, volume: int) -> bytes:
    """P_STATE with a state word (`State.word`)."""
    return packet(Packet.STATE, _U32.pack(word), volume)


def pack_sync_uuid(uuid: int, volume: int) -> bytes:
    """P_SYNC_UUID."""
    return packet(Packet.SYNC_UUID, _U64.pack(uuid), volume)


def pack_state_change(mask: int, val: int, volume: int, connection: bool) -> bytes:
    """P_STATE_CHG_REQ, or for the whole *connection* P_CONN_ST_CHG_REQ: two state words."""
    cmd = Packet.CONN_ST_CHG_REQ if connection else Packet.STATE_CHG_REQ
    return packet(cmd, _U32_PAIR.pack(mask, val), volume)


def pack_state_reply(code: int, volume: int, connection: bool) -> bytes:
    """P_STATE_CHG_REPLY, or for the whole *connection* P_CONN_ST_CHG_REPLY; *code* is signed."""
    cmd = Packet.CONN_ST_CHG_REPLY if connection else Packet.STATE_CHG_REPLY
    return packet(cmd, _I32.pack(code), volume)


def unpack_u32(payload: View) -> int:
    """The state word of P_STATE."""
    _exact("a 32-bit value", _U32, payload)
    value: int = _U32.unpack(payload)[0]
    return value


def unpack_i32(payload: View) -> int:
    """The result code of P_STATE_CHG_REPLY and P_CONN_ST_CHG_REPLY."""
    _exact("a result code", _I32, payload)
    value: int = _I32.unpack(payload)[0]
    return value


def unpack_u64(payload: View) -> int:
    """The UUID of P_SYNC_UUID."""
    _exact("a 64-bit value", _U64, payload)
    value: int = _U64.unpack(payload)[0]
    return value


def unpack_state_change(payload: View) -> tuple[int, int]:
    """(mask, val) of P_STATE_CHG_REQ and P_CONN_ST_CHG_REQ."""
    _exact("a state change request", _U32_PAIR, payload)
    mask, val = _U32_PAIR.unpack(payload)
    return mask, val


# ------------------------------------------------------------------------------- writes, reads and acks


def pack_data(
    cmd: int, volume: int, sector: int, block_id: int, seq: int, flags: int, length: int, digest: bytes = b""
) -> bytes:
    """P_DATA, P_DATA_REPLY or P_RS_DATA_REPLY up to and including the digest; *length* bytes must follow.

    The header counts sub-header, digest and data. In the two replies *seq* and *flags* are 0.
    """
    return DATA_PACKET.pack(
        MAGIC, volume, cmd, 24 + len(digest) + length, 0, sector, block_id, seq & _U32_MASK, flags
    ) + digest  # fmt: skip


def unpack_data(payload: View) -> tuple[int, int, int, int]:
    """(sector, block_id, seq, flags) of the first 24 bytes; a digest and the data follow."""
    _at_least("a data packet", _DATA, payload)
    sector, block_id, seq, flags = _DATA.unpack_from(payload)
    return sector, block_id, seq, flags


def pack_trim(cmd: int, volume: int, sector: int, block_id: int, seq: int, flags: int, size: int) -> bytes:
    """P_TRIM or P_ZEROES; *size* in bytes."""
    return packet(cmd, _TRIM.pack(sector, block_id, seq & _U32_MASK, flags, size), volume)


def unpack_trim(payload: View) -> tuple[int, int, int, int, int]:
    """(sector, block_id, seq, flags, size) of P_TRIM and P_ZEROES."""
    _exact("P_TRIM or P_ZEROES", _TRIM, payload)
    sector, block_id, seq, flags, size = _TRIM.unpack(payload)
    return sector, block_id, seq, flags, size


def pack_block_req(
    cmd: int, volume: int, sector: int, block_id: int, size: int, digest: bytes = b""
) -> bytes:
    """A request for a block (struct p_block_req), for P_OV_REPLY and P_CSUM_RS_REQUEST with *digest*."""
    return packet(cmd, _BLOCK_REQ.pack(sector, block_id, size, 0) + digest, volume)


def unpack_block_req(payload: View) -> tuple[int, int, int]:
    """(sector, block_id, size); a digest may follow. The pad is ignored, kernels leave garbage there."""
    _at_least("a block request", _BLOCK_REQ, payload)
    sector, block_id, size, _ = _BLOCK_REQ.unpack_from(payload)
    return sector, block_id, size


def pack_ack(cmd: int, volume: int, sector: int, block_id: int, size: int, seq: int) -> bytes:
    """Any of the acks and negative answers on the meta socket (struct p_block_ack)."""
    return ACK.pack(MAGIC, volume, cmd, 24, 0, sector, block_id, size, seq & _U32_MASK)


def unpack_ack(payload: View) -> tuple[int, int, int, int]:
    """(sector, block_id, size, seq)."""
    _exact("an ack", _BLOCK_ACK, payload)
    sector, block_id, size, seq = _BLOCK_ACK.unpack(payload)
    return sector, block_id, size, seq


def pack_barrier(barrier: int) -> bytes:
    """P_BARRIER: the end of an epoch."""
    return packet(Packet.BARRIER, _U32_PAIR.pack(barrier, 0))


def unpack_barrier(payload: View) -> int:
    _exact("P_BARRIER", _U32_PAIR, payload)
    barrier: int = _U32_PAIR.unpack(payload)[0]
    return barrier


def pack_barrier_ack(barrier: int, set_size: int) -> bytes:
    """P_BARRIER_ACK: all *set_size* writes of that epoch are done."""
    return packet(Packet.BARRIER_ACK, _U32_PAIR.pack(barrier, set_size))


def unpack_barrier_ack(payload: View) -> tuple[int, int]:
    """(barrier, set_size)."""
    _exact("P_BARRIER_ACK", _U32_PAIR, payload)
    barrier, set_size = _U32_PAIR.unpack(payload)
    return barrier, set_size


def pack_block_desc(cmd: int, volume: int, sector: int, size: int) -> bytes:
    """P_OUT_OF_SYNC or P_RS_DEALLOCATED; *size* in bytes."""
    return packet(cmd, _BLOCK_DESC.pack(sector, size, 0), volume)


def unpack_block_desc(payload: View) -> tuple[int, int]:
    """(sector, size). The pad is ignored, kernels leave garbage there."""
    _exact("P_OUT_OF_SYNC or P_RS_DEALLOCATED", _BLOCK_DESC, payload)
    sector, size, _ = _BLOCK_DESC.unpack(payload)
    return sector, size
