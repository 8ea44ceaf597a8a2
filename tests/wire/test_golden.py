"""Golden bytes: packets as two Linux 6.1 kernels with DRBD 8.4.11 sent them to each other, both ways."""

from __future__ import annotations

import pytest
from tandem.repl import wire
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import Packet


def raw(text: str) -> bytes:
    """Hex with blanks; ``00000000*14`` repeats a group."""
    out = b""
    for group in text.split():
        digits, _, times = group.partition("*")
        out += bytes.fromhex(digits) * int(times or 1)
    return out


def payload(text: str, cmd: int, volume: int = 0) -> memoryview:
    """What follows the header100 in *text*, after the header itself was checked."""
    data = raw(text)
    assert wire.parse_header(data) == (volume, cmd, len(data) - wire.HEADER)
    return memoryview(data)[wire.HEADER :]


# ------------------------------------------------------------- handshake of two fresh nodes, protocol C

FEATURES = """
    83740267 fffe0048 00000056 0000000f 00000065 00000000 00000000*14
"""
PROTOCOL = """
    8620ec20 0000000b 00000019 00000000
    00000003 00000000 00000000 00000000 00000000 00000000 00
"""
SYNC_PARAM = """
    8620ec20 00000023 00000094 00000000
    000000fa 00000000*16 00000000*16 00000014 0000000a 00000064 00019000
"""
SIZES = """
    8620ec20 0000000d 00000038 00000000
    00000000 0001ffb0 00000000 00000000 00000000 0001ffb0 0001fe00 0000 0000
    00001000 00000200 00000000 00001000 00000000 00 00 00 00
"""
UUIDS = """
    8620ec20 0000000c 00000030 00000000
    00000000 00000004 00000000 00000000 00000000 00000000 00000000 00000000
    00000000 00003ff6 00000000 00000000
"""


def test_initial_packets() -> None:
    assert wire.packet80(Packet.INITIAL_DATA) == raw("83740267 fff20000")
    assert wire.packet80(Packet.INITIAL_META) == raw("83740267 fff10000")
    assert wire.parse_header80(raw("83740267 fff20000")) == (Packet.INITIAL_DATA, 0)
    assert wire.parse_header80(raw("83740267 fff10000")) == (Packet.INITIAL_META, 0)


def test_features() -> None:
    value = wire.Features(protocol_min=86, protocol_max=101, flags=15)
    assert value.pack() == raw(FEATURES)
    assert wire.parse_header80(raw(FEATURES)) == (Packet.CONNECTION_FEATURES, 72)
    assert wire.Features.unpack(memoryview(raw(FEATURES))[8:]) == value


def test_protocol() -> None:
    value = wire.Protocol(3, 0, 0, 0, 0, 0, "")
    assert value.pack() == raw(PROTOCOL)
    assert wire.Protocol.unpack(payload(PROTOCOL, Packet.PROTOCOL)) == value
    assert value.pack(update=True) == raw(PROTOCOL.replace("0000000b", "0000002d", 1))


def test_sync_param() -> None:
    value = wire.SyncParam(250, "", "", 20, 10, 100, 102400)
    assert value.pack(0) == raw(SYNC_PARAM)
    assert wire.SyncParam.unpack(payload(SYNC_PARAM, Packet.SYNC_PARAM89)) == value


def test_sizes_with_queue_limits() -> None:
    value = wire.Sizes(130992, 0, 130992, 130560, 0, 0, wire.QueueLimits(4096, 512, 0, 4096, 0, 0))
    assert value.pack(0) == raw(SIZES)
    assert wire.Sizes.unpack(payload(SIZES, Packet.SIZES), wsame=True) == value


def test_sizes_without_queue_limits() -> None:
    text = SIZES.replace("00000038", "00000020", 1).partition(" 00001000")[0]
    value = wire.Sizes(130992, 0, 130992, 130560, 0, 0, None)
    assert value.pack(0) == raw(text)
    assert wire.Sizes.unpack(payload(text, Packet.SIZES), wsame=False) == value


def test_uuids() -> None:
    value = wire.Uuids(4, 0, 0, 0, 16374, 0)
    assert value.pack(0) == raw(UUIDS)
    assert wire.Uuids.unpack(payload(UUIDS, Packet.UUIDS)) == value


P, S, U = Role.PRIMARY, Role.SECONDARY, Role.UNKNOWN
STATES = [
    (0x0000C882, State(S, U, ConnState.WF_CONNECTION, DiskState.INCONSISTENT, DiskState.D_UNKNOWN)),
    (0x000088AA, State(S, S, ConnState.CONNECTED, DiskState.INCONSISTENT, DiskState.INCONSISTENT)),
    (0x000090A9, State(P, S, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.INCONSISTENT)),
    (0x000108E6, State(S, P, ConnState.WF_BITMAP_T, DiskState.INCONSISTENT, DiskState.UP_TO_DATE)),
    (0x000110A6, State(S, P, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.UP_TO_DATE)),
    (0x000110A9, State(P, S, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.UP_TO_DATE)),
    (0x000110AA, State(S, S, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.UP_TO_DATE)),
    (0x0000D081, State(P, U, ConnState.WF_CONNECTION, DiskState.UP_TO_DATE, DiskState.D_UNKNOWN)),
    (0x0000D082, State(S, U, ConnState.WF_CONNECTION, DiskState.UP_TO_DATE, DiskState.D_UNKNOWN)),
    (0x00010AE6, State(S, P, ConnState.WF_BITMAP_T, DiskState.OUTDATED, DiskState.UP_TO_DATE)),
    (0x0000F0D9, State(P, S, ConnState.WF_BITMAP_S, DiskState.UP_TO_DATE, DiskState.CONSISTENT)),
    (0x000104A9, State(P, S, ConnState.CONNECTED, DiskState.FAILED, DiskState.UP_TO_DATE)),
    (0x000100A9, State(P, S, ConnState.CONNECTED, DiskState.DISKLESS, DiskState.UP_TO_DATE)),
    (0x000106A9, State(P, S, ConnState.CONNECTED, DiskState.NEGOTIATING, DiskState.UP_TO_DATE)),
    (0x0000F0D6, State(S, P, ConnState.WF_BITMAP_S, DiskState.UP_TO_DATE, DiskState.CONSISTENT)),
]  # fmt: skip


@pytest.mark.parametrize(("word", "state"), STATES, ids=lambda v: f"{v:08x}" if isinstance(v, int) else "")
def test_state(word: int, state: State) -> None:
    text = f"8620ec20 0000000e 00000004 00000000 {word:08x}"
    assert wire.pack_state(state.word(), 0) == raw(text)
    assert State.from_word(wire.unpack_u32(payload(text, Packet.STATE))) == state


# --------------------------------------------------------------------------- state changes, both scopes

CHANGES = [
    (0x00001E03, 0x00001001, False),  # forced promotion
    (0x00000003, 0x00000001, False),  # promotion
    (0x00001E00, 0x00000400, False),  # detach
    (0x000001F0, 0x00000120, False),  # verify
    (0x000001F0, 0x000000C0, False),  # invalidate
    (0x000001F0, 0x000000B0, False),  # invalidate-remote
    (0x000001F0, 0x00000010, True),  # disconnect
    (0x00001FF0, 0x00000A10, True),  # disconnect and outdate me
    (0x0001E1F0, 0x0000A010, True),  # disconnect and outdate you
]


@pytest.mark.parametrize(("mask", "val", "connection"), CHANGES)
def test_state_change_request(mask: int, val: int, connection: bool) -> None:
    cmd = Packet.CONN_ST_CHG_REQ if connection else Packet.STATE_CHG_REQ
    text = f"8620ec20 {cmd:08x} 00000008 00000000 {mask:08x} {val:08x}"
    assert wire.pack_state_change(mask, val, 0, connection) == raw(text)
    assert wire.unpack_state_change(payload(text, cmd)) == (mask, val)


@pytest.mark.parametrize(
    ("code", "connection", "text"),
    [
        (1, False, "8620ec20 0000001d 00000004 00000000 00000001"),
        (1, True, "8620ec20 0000002b 00000004 00000000 00000001"),
        (-7, True, "8620ec20 0000002b 00000004 00000000 fffffff9"),
    ],
)
def test_state_change_reply(code: int, connection: bool, text: str) -> None:
    cmd = Packet.CONN_ST_CHG_REPLY if connection else Packet.STATE_CHG_REPLY
    assert wire.pack_state_reply(code, 0, connection) == raw(text)
    assert wire.unpack_i32(payload(text, cmd)) == code


# ------------------------------------------------------------------------------------- full sync, writes


@pytest.mark.parametrize(
    ("uuid", "text"),
    [
        (0x1AD331CBB4784384, "8620ec20 0000000f 00000008 00000000 1ad331cb b4784384"),
        (0x1E07C7EA664FB56B, "8620ec20 0000000f 00000008 00000000 1e07c7ea 664fb56b"),
    ],
)
def test_sync_uuid(uuid: int, text: str) -> None:
    assert wire.pack_sync_uuid(uuid, 0) == raw(text)
    assert wire.unpack_u64(payload(text, Packet.SYNC_UUID)) == uuid


def test_resync_request() -> None:
    text = "8620ec20 00000009 00000018 00000000 00000000 00000000 ffffffff ffffffff 00007000 00000000"
    assert wire.pack_block_req(Packet.RS_DATA_REQUEST, 0, 0, wire.ID_SYNCER, 28672) == raw(text)
    assert wire.unpack_block_req(payload(text, Packet.RS_DATA_REQUEST)) == (0, wire.ID_SYNCER, 28672)


def test_garbage_in_the_pad_of_a_request_is_ignored() -> None:
    text = "8620ec20 00000009 00000018 00000000 00000000 00000000 ffffffff ffffffff 00007000 00000112"
    assert wire.unpack_block_req(payload(text, Packet.RS_DATA_REQUEST)) == (0, wire.ID_SYNCER, 28672)


def test_resync_reply() -> None:
    text = "8620ec20 00000002 00007018 00000000 00000000 00000000 ffffffff ffffffff 00000000 00000000"
    assert wire.pack_data(Packet.RS_DATA_REPLY, 0, 0, wire.ID_SYNCER, 0, 0, 28672) == raw(text)
    assert wire.parse_header(raw(text)) == (0, Packet.RS_DATA_REPLY, 24 + 28672)
    assert wire.unpack_data(memoryview(raw(text))[16:]) == (0, wire.ID_SYNCER, 0, 0)


def test_resync_ack() -> None:
    text = "8620ec20 00000017 00000018 00000000 00000000 00000000 ffffffff ffffffff 00007000 00000001"
    assert wire.pack_ack(Packet.RS_WRITE_ACK, 0, 0, wire.ID_SYNCER, 28672, 1) == raw(text)
    assert wire.unpack_ack(payload(text, Packet.RS_WRITE_ACK)) == (0, wire.ID_SYNCER, 28672, 1)


def test_write() -> None:
    text = "8620ec20 00000000 00001018 00000000 00000000 00000000 c0619886 00000000 00000001 00000102"
    flags = wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK
    assert wire.pack_data(Packet.DATA, 0, 0, 0xC061988600000000, 1, flags, 4096) == raw(text)
    assert wire.parse_header(raw(text)) == (0, Packet.DATA, 4120)
    assert wire.unpack_data(memoryview(raw(text))[16:]) == (0, 0xC061988600000000, 1, 0x102)
    assert wire.DATA_PACKET.unpack(raw(text)) == (
        wire.MAGIC, 0, Packet.DATA, 4120, 0, 0, 0xC061988600000000, 1, 0x102,
    )  # fmt: skip


def test_write_ack() -> None:
    text = "8620ec20 00000016 00000018 00000000 00000000 00000000 c0619886 00000000 00001000 000004ac"
    assert wire.pack_ack(Packet.WRITE_ACK, 0, 0, 0xC061988600000000, 4096, 1196) == raw(text)
    assert wire.unpack_ack(payload(text, Packet.WRITE_ACK)) == (0, 0xC061988600000000, 4096, 1196)
    assert wire.ACK.unpack(raw(text))[5:] == (0, 0xC061988600000000, 4096, 1196)


@pytest.mark.parametrize("handle", ["00000000", "01000000", "02000000"])
def test_barrier(handle: str) -> None:
    """The handle is opaque (a little-endian count in a kernel on x86) and comes back byte for byte."""
    sent = f"8620ec20 00000003 00000008 00000000 {handle} 00000000"
    answer = f"8620ec20 0000001c 00000008 00000000 {handle} 00000001"
    barrier = wire.unpack_barrier(payload(sent, Packet.BARRIER))
    assert wire.pack_barrier(barrier) == raw(sent)
    assert wire.pack_barrier_ack(barrier, 1) == raw(answer)
    assert wire.unpack_barrier_ack(payload(answer, Packet.BARRIER_ACK)) == (barrier, 1)


def test_packets_without_payload() -> None:
    assert wire.packet(Packet.PING) == raw("8620ec20 00000013 00000000 00000000")
    assert wire.packet(Packet.PING_ACK) == raw("8620ec20 00000014 00000000 00000000")
    assert wire.packet(Packet.UNPLUG_REMOTE, volume=1) == raw("8620ec20 00010007 00000000 00000000")


def test_verify_results_are_big_endian_numbers() -> None:
    text = "8620ec20 00000020 00000018 00000000 00000000 00000000 00000000 00001267 00001000 00000001"
    assert wire.pack_ack(Packet.OV_RESULT, 0, 0, wire.ID_IN_SYNC, 4096, 1) == raw(text)
    text = text.replace("00001267", "00001268")
    assert wire.pack_ack(Packet.OV_RESULT, 0, 0, wire.ID_OUT_OF_SYNC, 4096, 1) == raw(text)


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK | wire.DP_FUA, 0x112),
        (wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK | wire.DP_MAY_SET_IN_SYNC, 0x106),
        (wire.DP_RW_SYNC | wire.DP_SEND_RECEIVE_ACK, 0x082),
        (wire.DP_RW_SYNC, 0x002),
        (wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK | wire.DP_DISCARD, 0x142),
        (wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK | wire.DP_ZEROES, 0x502),
        (wire.DP_RW_SYNC | wire.DP_SEND_WRITE_ACK | wire.DP_ZEROES | wire.DP_DISCARD, 0x542),
    ],
)
def test_flags_of_typical_writes(flags: int, value: int) -> None:
    assert flags == value


def test_trim() -> None:
    text = "8620ec20 00000031 0000001c 00000000 "
    text += "00000000 00000008 01020304 05060708 00000009 00000142 00100000"
    assert wire.pack_trim(Packet.TRIM, 0, 8, 0x0102030405060708, 9, 0x142, 1 << 20) == raw(text)
    assert wire.unpack_trim(payload(text, Packet.TRIM)) == (8, 0x0102030405060708, 9, 0x142, 1 << 20)


def test_out_of_sync() -> None:
    text = "8620ec20 00030028 00000010 00000000 00000000 00000320 00001000 00000000"
    assert wire.pack_block_desc(Packet.OUT_OF_SYNC, 3, 800, 4096) == raw(text)
    assert wire.unpack_block_desc(payload(text, Packet.OUT_OF_SYNC, volume=3)) == (800, 4096)
