"""Headers and the tables of what may arrive on which socket."""

from __future__ import annotations

import pytest
from tandem.repl import wire
from tandem.repl.errors import PeerProtocolError
from tandem.repl.wire import Feature, Packet


def test_numbers() -> None:
    assert (wire.MAGIC, wire.MAGIC80, wire.MAGIC95) == (0x8620EC20, 0x83740267, 0x835A)
    assert (wire.HEADER80, wire.HEADER) == (8, 16)
    assert Feature.TRIM | Feature.THIN_RESYNC | Feature.WSAME | Feature.WZEROES == 15
    assert (wire.ID_SYNCER, wire.ID_IN_SYNC, wire.ID_OUT_OF_SYNC) == (0xFFFFFFFFFFFFFFFF, 0x1267, 0x1268)


def test_header95_is_read_too() -> None:
    assert wire.parse_header80(bytes.fromhex("835afffe00000048")) == (Packet.CONNECTION_FEATURES, 72)


def test_a_stranger_is_shown_what_it_sent() -> None:
    with pytest.raises(PeerProtocolError, match="47455420 2f204854"):
        wire.parse_header80(b"GET / HTTP/1.1\r\n")
    with pytest.raises(PeerProtocolError, match="83740267 fff20000"):
        wire.parse_header(bytes.fromhex("83740267fff200000000000000000000"))


def test_pad_must_be_zero() -> None:
    data = bytearray(wire.packet(Packet.PING))
    for at in range(12, 16):
        data[at] = 1
        with pytest.raises(PeerProtocolError, match="pad"):
            wire.parse_header(data)
        data[at] = 0
    assert wire.parse_header(data) == (0, Packet.PING, 0)


def test_fixed_lengths_on_the_data_socket() -> None:
    for cmd, rule in wire.DATA_SOCKET.items():
        assert rule.payload_allowed == (rule.longest > rule.fixed)
        wire.check_data(cmd, rule.fixed)
        wire.check_data(cmd, rule.longest)
        for length in (rule.fixed - 1, rule.longest + 1, 0xFFFFFFFF):
            with pytest.raises(PeerProtocolError, match=rule.name):
                wire.check_data(cmd, length)


def test_exact_lengths_on_the_meta_socket() -> None:
    for cmd, fixed in wire.META_SOCKET.items():
        wire.check_meta(cmd, fixed)
        for length in (fixed - 1, fixed + 1, 0xFFFFFFFF):
            with pytest.raises(PeerProtocolError, match=Packet(cmd).name):
                wire.check_meta(cmd, length)


def test_every_packet_has_its_socket() -> None:
    """The packet table of protocol 101: what a kernel accepts where."""
    data = set(wire.DATA_SOCKET)
    meta = set(wire.META_SOCKET)
    assert data & meta == {Packet.DELAY_PROBE}
    neither = set(Packet) - data - meta
    assert neither == {
        Packet.BECOME_SYNC_TARGET, Packet.BECOME_SYNC_SOURCE, Packet.SYNC_PARAM, Packet.WSAME,
        Packet.INITIAL_META, Packet.INITIAL_DATA, Packet.CONNECTION_FEATURES,
    }  # fmt: skip
    acks = set(range(0x15, 0x1C)) | {0x20, 0x22, 0x29, 0x2C}
    assert {cmd for cmd, size in wire.META_SOCKET.items() if size == 24} == acks


@pytest.mark.parametrize("cmd", [Packet.WRITE_ACK, Packet.WSAME, Packet.CONNECTION_FEATURES, 0x25, 0x37])
def test_unexpected_on_the_data_socket(cmd: int) -> None:
    with pytest.raises(PeerProtocolError, match="not expected on the data socket"):
        wire.check_data(cmd, 24)


@pytest.mark.parametrize("cmd", [Packet.DATA, Packet.BARRIER, 0x25, 0xFFFF])
def test_unexpected_on_the_meta_socket(cmd: int) -> None:
    with pytest.raises(PeerProtocolError, match="not expected on the meta socket"):
        wire.check_meta(cmd, 24)


def test_limits_of_long_packets() -> None:
    wire.check_data(Packet.DATA, 24 + 64 + (1 << 20))
    wire.check_data(Packet.BITMAP, 4080)
    wire.check_data(Packet.COMPRESSED_BITMAP, 4080)
    for cmd, length in ((Packet.DATA, 24 + 65 + (1 << 20)), (Packet.BITMAP, 4088), (Packet.OV_REPLY, 89)):
        with pytest.raises(PeerProtocolError):
            wire.check_data(cmd, length)


def test_the_table_for_the_documents_lists_every_packet_we_understand() -> None:
    lines = wire.packet_table().splitlines()
    assert lines[0].startswith("| code | packet |")
    assert "| 0x00 | P_DATA | data | 24 to 1048664 |" in lines
    assert "| 0x16 | P_WRITE_ACK | meta | 24 |" in lines
    assert "| 0xfffe | P_CONNECTION_FEATURES | data | 72 |" in lines
    assert len(lines) == 2 + len(wire.DATA_SOCKET) + len(wire.META_SOCKET) + 3
