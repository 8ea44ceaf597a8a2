"""Recorded sessions between a Linux kernel with DRBD 8.4.11 and Tandem, and how to take them apart.

A file in tests/wire/kernel/ holds one session: a line for each run of bytes from one sender on one
socket, in the order seen on the network: sender, socket, number of the TCP connection, hexadecimal bytes.
tests/lab records them.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tandem.repl import wire
from tandem.repl.bitmap import Bitmap
from tandem.repl.bitmap_exchange import BitmapReceiver
from tandem.repl.packets import check_data, check_meta
from tandem.repl.states import State
from tandem.repl.wire import HEADER, HEADER80, Packet

DIRECTORY: Final = Path(__file__).with_name("kernel")
ACKS: Final = frozenset(
    (
        Packet.RECV_ACK, Packet.WRITE_ACK, Packet.RS_WRITE_ACK, Packet.NEG_ACK, Packet.NEG_DREPLY,
        Packet.NEG_RS_DREPLY, Packet.RS_IS_IN_SYNC, Packet.RS_CANCEL, Packet.OV_RESULT,
    )
)  # fmt: skip
READS: Final = frozenset(
    (Packet.DATA_REQUEST, Packet.RS_DATA_REQUEST, Packet.RS_THIN_REQ, Packet.CSUM_RS_REQUEST, Packet.OV_REQUEST)
)
WITH_DATA: Final = frozenset((Packet.DATA, Packet.DATA_REPLY, Packet.RS_DATA_REPLY))
BITMAPS: Final = frozenset((Packet.BITMAP, Packet.COMPRESSED_BITMAP))


@dataclass(frozen=True, slots=True)
class Seen:
    """One packet of a session."""

    sender: str
    socket: str
    link: int
    volume: int
    cmd: int
    payload: bytes
    raw: bytes


def load(path: Path) -> dict[tuple[str, str, int], bytes]:
    """The byte stream of each sender, socket and connection of a recorded session."""
    streams: dict[tuple[str, str, int], bytes] = {}
    for line in lzma.decompress(path.read_bytes()).decode().splitlines():
        sender, socket, link, data = line.split(" ")
        key = (sender, socket, int(link))
        streams[key] = streams.get(key, b"") + bytes.fromhex(data)
    return streams


def packets(sender: str, socket: str, link: int, stream: bytes) -> Iterator[Seen]:
    """Cut a stream into packets; everything but the initial packet and the features has header100."""
    at = 0
    while at < len(stream):
        if int.from_bytes(stream[at : at + 4], "big") == wire.MAGIC:
            volume, cmd, length = wire.parse_header(stream, at)
            start = at + HEADER
        else:
            cmd, length = wire.parse_header80(stream, at)
            volume, start = 0, at + HEADER80
            assert cmd in (Packet.INITIAL_DATA, Packet.INITIAL_META, Packet.CONNECTION_FEATURES)
        end = start + length
        assert end <= len(stream), f"{sender} {socket}: the stream ends inside {wire.packet_name(cmd)}"
        yield Seen(sender, socket, link, volume, cmd, stream[start:end], stream[at:end])
        at = end


def _again_features(p: memoryview, _: int) -> bytes:
    return wire.Features.unpack(p).pack()


def _state_word(p: memoryview, volume: int) -> bytes:
    return wire.pack_state(State.from_word(wire.unpack_u32(p)).word(), volume)


def _state_change(connection: bool) -> Callable[[memoryview, int], bytes]:
    return lambda p, volume: wire.pack_state_change(*wire.unpack_state_change(p), volume, connection)


def _state_reply(connection: bool) -> Callable[[memoryview, int], bytes]:
    return lambda p, volume: wire.pack_state_reply(wire.unpack_i32(p), volume, connection)


# Unpacked and packed again these must be the same bytes.
AGAIN: Final[dict[int, Callable[[memoryview, int], bytes]]] = {
    Packet.PROTOCOL: lambda p, _: wire.Protocol.unpack(p).pack(),
    Packet.SYNC_PARAM89: lambda p, volume: wire.SyncParam.unpack(p).pack(volume),
    Packet.SIZES: lambda p, volume: wire.Sizes.unpack(p, True).pack(volume),
    Packet.UUIDS: lambda p, volume: wire.Uuids.unpack(p).pack(volume),
    Packet.STATE: _state_word,
    Packet.SYNC_UUID: lambda p, volume: wire.pack_sync_uuid(wire.unpack_u64(p), volume),
    Packet.STATE_CHG_REQ: _state_change(False),
    Packet.CONN_ST_CHG_REQ: _state_change(True),
    Packet.STATE_CHG_REPLY: _state_reply(False),
    Packet.CONN_ST_CHG_REPLY: _state_reply(True),
    Packet.BARRIER: lambda p, _: wire.pack_barrier(wire.unpack_barrier(p)),
    Packet.BARRIER_ACK: lambda p, _: wire.pack_barrier_ack(*wire.unpack_barrier_ack(p)),
    Packet.TRIM: lambda p, volume: wire.pack_trim(Packet.TRIM, volume, *wire.unpack_trim(p)),
    Packet.ZEROES: lambda p, volume: wire.pack_trim(Packet.ZEROES, volume, *wire.unpack_trim(p)),
}


def decode(seen: Seen) -> str:
    """Decode one packet with the product's codec; its name. AssertionError if bytes are left unexplained."""
    name, payload = wire.packet_name(seen.cmd), memoryview(seen.payload)
    if seen.cmd in (Packet.INITIAL_DATA, Packet.INITIAL_META):
        assert not payload
    elif seen.cmd == Packet.CONNECTION_FEATURES:
        assert _again_features(payload, 0)[:24] == seen.raw[:24]
    else:
        (check_data if seen.socket == "data" else check_meta)(seen.cmd, len(payload))
    if seen.cmd in AGAIN:
        again = AGAIN[seen.cmd](payload, seen.volume)
        assert again == seen.raw, f"{name}: {seen.raw.hex()} became {again.hex()}"
    elif seen.cmd in ACKS:
        assert wire.pack_ack(seen.cmd, seen.volume, *wire.unpack_ack(payload)) == seen.raw
    elif seen.cmd in READS:
        sector, block_id, size = wire.unpack_block_req(payload[:24])
        again = wire.pack_block_req(seen.cmd, seen.volume, sector, block_id, size)
        assert again[HEADER : HEADER + 20] == payload[:20], "the kernel leaves the pad behind them as it was"
    elif seen.cmd in WITH_DATA:
        sector, block_id, seq, flags = wire.unpack_data(payload)
        length = len(payload) - 24
        again = wire.pack_data(seen.cmd, seen.volume, sector, block_id, seq, flags, length, b"")
        assert again == seen.raw[: HEADER + 24]
        assert length % 512 in (0, 4, 16, 20), "sectors, and the digest where one is agreed"
    elif seen.cmd in (Packet.OUT_OF_SYNC, Packet.RS_DEALLOCATED):
        wire.unpack_block_desc(payload)
    return name


def bitmaps(all_seen: list[Seen], n_bits: int) -> list[int]:
    """Weights of the bitmaps in one direction of one connection, each received as the product would."""
    weights: list[int] = []
    receiver: BitmapReceiver | None = None
    for seen in all_seen:
        if seen.cmd not in BITMAPS:
            assert receiver is None, "nothing else may travel while a bitmap does"
            continue
        if receiver is None:
            bitmap = Bitmap(n_bits)
            receiver = BitmapReceiver(bitmap)
        take = receiver.plain if seen.cmd == Packet.BITMAP else receiver.compressed
        if take(memoryview(seen.payload)):
            weights.append(bitmap.weight)
            receiver = None
    assert receiver is None, "a bitmap that never ends"
    return weights
