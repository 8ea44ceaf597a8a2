"""Every structure has its size, comes back as it went, and garbage is refused and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.repl import wire
from tandem.repl.errors import PeerProtocolError
from tandem.repl.wire import Packet

u8, u16 = st.integers(0, 1), st.integers(0, 2**16 - 1)
u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
i32 = st.integers(-(2**31), 2**31 - 1)
names = st.text("abcdefghijklmnopqrstuvwxyz0123456789-()", max_size=63)
digests = st.binary(max_size=wire.DIGEST_MAX)
limits = st.builds(wire.QueueLimits, u32, u32, u32, u32, u32, u8, u8, u8)


def body(data: bytes, cmd: int, volume: int) -> memoryview:
    """What follows the header; the packet must pass the table of its socket."""
    assert wire.parse_header(data) == (volume, cmd, len(data) - wire.HEADER)
    check = wire.check_meta if cmd in wire.META_SOCKET else wire.check_data
    check(cmd, len(data) - wire.HEADER)
    return memoryview(data)[wire.HEADER :]


# --------------------------------------------------------------------------------------------- sizes


def test_sizes_of_all_structures() -> None:
    """The sizes of the packed C structures in drbd_protocol.h, without the header."""
    uuids = wire.Uuids(1, 2, 3, 4, 5, 6)
    sizes = wire.Sizes(1, 2, 3, 4, 5, 6, None)
    limits = wire.QueueLimits(1, 2, 3, 4, 5, 1, 1, 1)
    tail = wire.Sizes(1, 2, 3, 4, 5, 6, limits)
    packets = [
        (wire.pack_data(Packet.DATA, 0, 1, 2, 3, 4, 0), 24),  # p_data
        (wire.pack_trim(Packet.TRIM, 0, 1, 2, 3, 4, 5), 28),  # p_trim
        (wire.pack_ack(Packet.WRITE_ACK, 0, 1, 2, 3, 4), 24),  # p_block_ack
        (wire.pack_block_req(Packet.DATA_REQUEST, 0, 1, 2, 3), 24),  # p_block_req
        (wire.pack_block_desc(Packet.OUT_OF_SYNC, 0, 1, 2), 16),  # p_block_desc
        (wire.pack_barrier(1), 8),  # p_barrier
        (wire.pack_barrier_ack(1, 2), 8),  # p_barrier_ack
        (wire.SyncParam(1, "a", "b", 2, 3, 4, 5).pack(0), 148),  # p_rs_param_95
        (wire.Protocol(1, 2, 3, 4, 5, 6, "").pack(), 24 + 1),  # p_protocol and the empty name
        (uuids.pack(0), 48),  # p_uuids
        (wire.pack_sync_uuid(1, 0), 8),  # p_rs_uuid
        (sizes.pack(0), 32),  # p_sizes
        (tail.pack(0), 32 + 24),  # and o_qlim
        (wire.pack_state(1, 0), 4),  # p_state
        (wire.pack_state_change(1, 2, 0, False), 8),  # p_req_state
        (wire.pack_state_reply(1, 0, False), 4),  # p_req_state_reply
    ]
    for data, size in packets:
        assert wire.parse_header(data)[2] == size == len(data) - wire.HEADER, data.hex()
    assert len(wire.Features(100, 101, 15).pack()) == wire.HEADER80 + 72  # p_connection_features
    assert wire.DATA_PACKET.size == wire.ACK.size == 40


# ---------------------------------------------------------------------------------------- round trips


@given(st.builds(wire.Features, u32, u32.filter(bool), u32))
def test_features_return(value: wire.Features) -> None:
    assert wire.Features.unpack(memoryview(value.pack())[8:]) == value


def test_a_protocol_max_of_zero_means_the_minimum() -> None:
    assert wire.Features.unpack(memoryview(wire.Features(100, 0, 0).pack())[8:]).protocol_max == 100


@given(st.builds(wire.Protocol, u32, u32, u32, u32, u32, u32, names), st.booleans())
def test_protocol_returns(value: wire.Protocol, update: bool) -> None:
    cmd = Packet.PROTOCOL_UPDATE if update else Packet.PROTOCOL
    assert wire.Protocol.unpack(body(value.pack(update), cmd, 0)) == value


@given(st.builds(wire.SyncParam, u32, names, names, u32, u32, u32, u32), u16)
def test_sync_param_returns(value: wire.SyncParam, volume: int) -> None:
    assert wire.SyncParam.unpack(body(value.pack(volume), Packet.SYNC_PARAM89, volume)) == value


@given(st.builds(wire.Sizes, u64, u64, u64, u32, u16, u16, st.none() | limits), u16)
def test_sizes_return(value: wire.Sizes, volume: int) -> None:
    payload = body(value.pack(volume), Packet.SIZES, volume)
    assert wire.Sizes.unpack(payload, value.limits is not None) == value
    with pytest.raises(PeerProtocolError, match="P_SIZES of"):
        wire.Sizes.unpack(payload, value.limits is None)


@given(st.builds(wire.Uuids, u64, u64, u64, u64, u64, u64), u16)
def test_uuids_return(value: wire.Uuids, volume: int) -> None:
    assert wire.Uuids.unpack(body(value.pack(volume), Packet.UUIDS, volume)) == value


@given(u32, u32, u16, i32, u64)
def test_state_packets_return(mask: int, val: int, volume: int, code: int, uuid: int) -> None:
    assert wire.unpack_u32(body(wire.pack_state(val, volume), Packet.STATE, volume)) == val
    assert wire.unpack_u64(body(wire.pack_sync_uuid(uuid, volume), Packet.SYNC_UUID, volume)) == uuid
    for connection, request, reply in (
        (False, Packet.STATE_CHG_REQ, Packet.STATE_CHG_REPLY),
        (True, Packet.CONN_ST_CHG_REQ, Packet.CONN_ST_CHG_REPLY),
    ):
        data = wire.pack_state_change(mask, val, volume, connection)
        assert wire.unpack_state_change(body(data, request, volume)) == (mask, val)
        data = wire.pack_state_reply(code, volume, connection)
        assert wire.unpack_i32(body(data, reply, volume)) == code


@given(u64, u64, u32, u32, u16, digests)
def test_block_packets_return(
    sector: int, block_id: int, size: int, seq: int, volume: int, digest: bytes
) -> None:
    data = wire.pack_block_req(Packet.CSUM_RS_REQUEST, volume, sector, block_id, size, digest)
    payload = body(data, Packet.CSUM_RS_REQUEST, volume)
    assert wire.unpack_block_req(payload) == (sector, block_id, size)
    assert payload[24:] == digest
    data = wire.pack_ack(Packet.NEG_ACK, volume, sector, block_id, size, seq)
    assert wire.unpack_ack(body(data, Packet.NEG_ACK, volume)) == (sector, block_id, size, seq)
    data = wire.pack_trim(Packet.ZEROES, volume, sector, block_id, seq, 0x542, size)
    assert wire.unpack_trim(body(data, Packet.ZEROES, volume)) == (sector, block_id, seq, 0x542, size)
    data = wire.pack_block_desc(Packet.RS_DEALLOCATED, volume, sector, size)
    assert wire.unpack_block_desc(body(data, Packet.RS_DEALLOCATED, volume)) == (sector, size)
    data = wire.pack_barrier_ack(seq, size)
    assert wire.unpack_barrier_ack(body(data, Packet.BARRIER_ACK, 0)) == (seq, size)


@given(u64, u64, u32, u32, st.integers(0, 1 << 20), u16, digests)
def test_data_returns(
    sector: int, block_id: int, seq: int, flags: int, length: int, volume: int, digest: bytes
) -> None:
    data = wire.pack_data(Packet.DATA, volume, sector, block_id, seq, flags, length, digest)
    assert wire.parse_header(data) == (volume, Packet.DATA, 24 + len(digest) + length)
    wire.check_data(Packet.DATA, 24 + len(digest) + length)
    assert wire.unpack_data(data[16:]) == (sector, block_id, seq, flags)
    assert data[40:] == digest


def test_sequence_numbers_wrap() -> None:
    assert wire.unpack_ack(wire.pack_ack(Packet.WRITE_ACK, 0, 0, 0, 0, 2**32 + 5)[16:])[3] == 5
    assert wire.unpack_data(wire.pack_data(Packet.DATA, 0, 0, 0, 2**32 + 6, 0, 0)[16:])[2] == 6
    assert wire.unpack_trim(wire.pack_trim(Packet.TRIM, 0, 0, 0, 2**32 + 7, 0, 0)[16:])[2] == 7


def test_headers_are_found_in_the_middle_of_a_buffer() -> None:
    data = b"xyz" + wire.packet(Packet.STATE, b"1234", volume=65535)
    assert wire.parse_header(memoryview(data), 3) == (65535, Packet.STATE, 4)
    assert wire.parse_header80(b"xyz" + wire.packet80(Packet.INITIAL_DATA), 3) == (Packet.INITIAL_DATA, 0)


# -------------------------------------------------------------------------------------------- garbage

Unpack = Callable[[memoryview], Any]
READERS: list[Unpack] = [
    wire.Features.unpack, wire.Protocol.unpack, wire.SyncParam.unpack, wire.Uuids.unpack, wire.unpack_u32,
    wire.unpack_i32, wire.unpack_u64, wire.unpack_state_change, wire.unpack_block_req, wire.unpack_ack,
    wire.unpack_data, wire.unpack_trim, wire.unpack_barrier, wire.unpack_barrier_ack, wire.unpack_block_desc,
    wire.parse_header, wire.parse_header80,
]  # fmt: skip
LENGTHS = [0, 1, 4, 7, 8, 9, 15, 16, 17, 23, 24, 25, 28, 32, 40, 48, 56, 72, 88, 89, 148]


@given(st.sampled_from(LENGTHS).flatmap(lambda n: st.binary(min_size=n, max_size=n)))
def test_garbage_is_a_value_or_a_protocol_error(data: bytes) -> None:
    view = memoryview(data)
    for reader in READERS:
        try:
            reader(view)
        except PeerProtocolError as refusal:
            assert len(str(refusal)) > 20
    for wsame in (False, True):
        if len(data) == (56 if wsame else 32):
            wire.Sizes.unpack(view, wsame)
        else:
            with pytest.raises(PeerProtocolError):
                wire.Sizes.unpack(view, wsame)


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__qualname__)
def test_nothing_at_all_is_a_protocol_error(reader: Unpack) -> None:
    with pytest.raises(PeerProtocolError):
        reader(memoryview(b""))


@pytest.mark.parametrize(
    "name",
    [b"", b"sha1", b"sh\xe91\0", b"x" * 64, b"x" * 64 + b"\0"],
    ids=["none", "open", "latin1", "64", "65"],
)
def test_bad_algorithm_names(name: bytes) -> None:
    with pytest.raises(PeerProtocolError):
        wire.Protocol.unpack(bytes(24) + name)


def test_the_longest_algorithm_name() -> None:
    assert wire.Protocol.unpack(bytes(24) + b"x" * 63 + b"\0").integrity_alg == "x" * 63


def test_name_fields_must_end_with_nul() -> None:
    good = wire.SyncParam(1, "crc32c", "md5", 2, 3, 4, 5).pack(0)[16:]
    for at in (67, 131):
        bad = bytearray(good)
        bad[at] = 1
        with pytest.raises(PeerProtocolError, match="NUL"):
            wire.SyncParam.unpack(bad)
