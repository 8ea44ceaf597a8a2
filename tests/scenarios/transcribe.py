"""What went over a socket, as lines a person reads: each packet by name with the fields that matter.

One `Transcriber` reads one direction of one socket and keeps what is incomplete. It knows layouts and
nothing else; a packet it cannot read is an error in the test, not a line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tandem.repl import vli
from tandem.repl.requests import Buffer
from tandem.repl.states import State
from tandem.repl.wire import (
    HEADER,
    HEADER80,
    ID_SYNCER,
    Feature,
    Features,
    Packet,
    Protocol,
    Sizes,
    SyncParam,
    Uuids,
    parse_header,
    parse_header80,
    unpack_ack,
    unpack_barrier,
    unpack_barrier_ack,
    unpack_block_desc,
    unpack_block_req,
    unpack_data,
    unpack_i32,
    unpack_state_change,
    unpack_trim,
    unpack_u32,
    unpack_u64,
)

DP_NAMES = {
    0x2: "RW_SYNC", 0x4: "MAY_SET_IN_SYNC", 0x10: "FUA", 0x20: "FLUSH", 0x40: "DISCARD",
    0x80: "SEND_RECEIVE_ACK", 0x100: "SEND_WRITE_ACK", 0x400: "ZEROES",
}  # fmt: skip
ACKS = frozenset((
    Packet.RECV_ACK, Packet.WRITE_ACK, Packet.RS_WRITE_ACK, Packet.NEG_ACK, Packet.NEG_DREPLY,
    Packet.NEG_RS_DREPLY, Packet.RS_IS_IN_SYNC, Packet.RS_CANCEL,
))  # fmt: skip
SHOW_HEX_MAX = 16  # bytes of a compressed bitmap


def uuid(value: int) -> str:
    """A generation UUID: small numbers as they are, others as 16 hexadecimal digits."""
    return f"{value:016X}" if value > 9 else str(value)


def state(word: int) -> str:
    s = State.from_word(word)
    flags = "".join(
        f" {name}"
        for name in ("susp", "aftr_isp", "peer_isp", "user_isp", "susp_nod", "susp_fen")
        if getattr(s, name)
    )
    return f"{word:08x}  {s.role}/{s.peer} {s.conn} {s.disk}/{s.pdsk}{flags}"


def masked(mask: int, val: int) -> str:
    """A state change request: only the fields it asks for."""
    asked = State.from_word(val)
    fields = (("role", 0x3), ("conn", 0x1F0), ("disk", 0x1E00), ("pdsk", 0x1E000))
    wanted = " ".join(f"{name}:={getattr(asked, name)}" for name, bits in fields if mask & bits)
    return f"mask {mask:08x} val {val:08x}  {wanted}"


def runs(payload: bytes) -> str:
    """The run lengths of a P_COMPRESSED_BITMAP."""
    first_set, pad = payload[0] >> 7, payload[0] >> 4 & 7
    lengths = vli.decode(payload[1:], pad)
    words = [f"{n} {('clear', 'set')[(i + first_set) % 2]}" for i, n in enumerate(map(int, lengths))]
    shown = f"{payload.hex(' ')}: " if len(payload) <= SHOW_HEX_MAX else f"{len(payload)} bytes: "
    return shown + ", ".join(words[:6]) + (f", … {len(words)} runs" if len(words) > 6 else "")


def block(sector: int, size: int, block_id: int) -> str:
    whose = "resync" if block_id == ID_SYNCER else f"id {block_id}"
    return f"sector {sector}, {size} bytes, {whose}"


class Transcriber:
    """One direction of one socket. *meta*: the meta socket, which has no header80 packets here."""

    def __init__(self, meta: bool) -> None:
        self._meta = meta
        self._rest = b""
        self._introduced = meta
        self.wsame = True

    def lines(self, buffers: list[Buffer]) -> Iterator[tuple[Packet, str]]:
        """The packets completed by *buffers*: (packet, its line)."""
        data = self._rest + b"".join(bytes(b) for b in buffers)
        while len(data) >= HEADER80:
            if not self._introduced:
                cmd, length = parse_header80(data)
                start, volume = HEADER80, 0
            elif len(data) < HEADER:
                break
            else:
                volume, cmd, length = parse_header(data)
                start = HEADER
            if len(data) < start + length:
                break
            payload, data = data[start : start + length], data[start + length :]
            self._introduced = True
            kind = Packet(cmd)
            text = self._text(kind, payload)
            where = f" [{volume}]" if volume else ""
            yield kind, f"P_{kind.name}{where}" + (f" {text}" if text else "")
        self._rest = data

    def _text(self, kind: Packet, p: bytes) -> str:
        if kind in ACKS:
            sector, block_id, size, seq = unpack_ack(p)
            return f"{block(sector, size, block_id)}, seq {seq}"
        how = _TEXTS.get(kind)
        if kind is Packet.SIZES:
            return sizes(Sizes.unpack(p, self.wsame))
        return how(p) if how else ""


def data(p: bytes) -> str:
    sector, block_id, seq, flags = unpack_data(p)
    names = "|".join(name for bit, name in DP_NAMES.items() if flags & bit)
    return f"{block(sector, len(p) - 24, block_id)}, seq {seq}, {names or '-'}"


def reply(p: bytes) -> str:
    sector, block_id, _, _ = unpack_data(p)
    return block(sector, len(p) - 24, block_id)


def trim(p: bytes) -> str:
    sector, block_id, seq, flags, size = unpack_trim(p)
    names = "|".join(name for bit, name in DP_NAMES.items() if flags & bit)
    return f"{block(sector, size, block_id)}, seq {seq}, {names or '-'}"


def block_request(p: bytes) -> str:
    sector, block_id, size = unpack_block_req(p)
    return block(sector, size, block_id)


def features(p: bytes) -> str:
    f = Features.unpack(p)
    return f"protocols {f.protocol_min} to {f.protocol_max}, {Feature(f.flags).name}"


def protocol(p: bytes) -> str:
    v = Protocol.unpack(p)
    sb = f"{v.after_sb_0p}/{v.after_sb_1p}/{v.after_sb_2p}"
    alg = f", data-integrity-alg {v.integrity_alg}" if v.integrity_alg else ""
    letter, primaries = "?ABC"[v.protocol], v.two_primaries
    return f"{letter}, after-sb {sb}, conn_flags {v.conn_flags}, two_primaries {primaries}{alg}"


def sync_param(p: bytes) -> str:
    v = SyncParam.unpack(p)
    algs = f", verify-alg {v.verify_alg or 'none'}, csums-alg {v.csums_alg or 'none'}"
    return (
        f"rate {v.resync_rate}, plan-ahead {v.c_plan_ahead}, delay {v.c_delay_target}, "
        f"fill {v.c_fill_target}, max {v.c_max_rate}{algs}"
    )


def sizes(v: Sizes) -> str:
    return (
        f"d_size {v.d_size}, u_size {v.u_size}, c_size {v.c_size} sectors, max_bio {v.max_bio_size}, "
        f"dds_flags {v.dds_flags}"
    )


def uuids(p: bytes) -> str:
    v = Uuids.unpack(p)
    names = {1: "discard-my-data", 2: "crashed-primary", 4: "inconsistent", 8: "skip-initial-sync"}
    flags = "|".join(name for bit, name in names.items() if v.flags & bit) or "-"
    quad = " : ".join(uuid(u) for u in (v.current, v.bitmap, v.history0, v.history1))
    return f"{quad}, {v.bits} bits, flags {flags}"


def state_change(p: bytes) -> str:
    return masked(*unpack_state_change(p))


def barrier_ack(p: bytes) -> str:
    barrier, n = unpack_barrier_ack(p)
    return f"{barrier}, {n} writes"


def described(p: bytes) -> str:
    sector, size = unpack_block_desc(p)
    return f"sector {sector}, {size} bytes"


_TEXTS: dict[Packet, Callable[[bytes], str]] = {
    Packet.CONNECTION_FEATURES: features,
    Packet.PROTOCOL: protocol,
    Packet.SYNC_PARAM89: sync_param,
    Packet.UUIDS: uuids,
    Packet.STATE: lambda p: state(unpack_u32(p)),
    Packet.STATE_CHG_REQ: state_change,
    Packet.CONN_ST_CHG_REQ: state_change,
    Packet.STATE_CHG_REPLY: lambda p: str(unpack_i32(p)),
    Packet.CONN_ST_CHG_REPLY: lambda p: str(unpack_i32(p)),
    Packet.SYNC_UUID: lambda p: uuid(unpack_u64(p)),
    Packet.BARRIER: lambda p: str(unpack_barrier(p)),
    Packet.BARRIER_ACK: barrier_ack,
    Packet.DATA: data,
    Packet.DATA_REPLY: reply,
    Packet.RS_DATA_REPLY: reply,
    Packet.TRIM: trim,
    Packet.ZEROES: trim,
    Packet.DATA_REQUEST: block_request,
    Packet.RS_DATA_REQUEST: block_request,
    Packet.RS_THIN_REQ: block_request,
    Packet.CSUM_RS_REQUEST: block_request,
    Packet.OUT_OF_SYNC: described,
    Packet.RS_DEALLOCATED: described,
    Packet.COMPRESSED_BITMAP: runs,
    Packet.BITMAP: lambda p: f"{len(p)} bytes",
    Packet.AUTH_CHALLENGE: lambda p: f"{len(p)} bytes",
    Packet.AUTH_RESPONSE: lambda p: f"{len(p)} bytes",
}
