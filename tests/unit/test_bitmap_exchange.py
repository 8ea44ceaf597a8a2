"""Bitmaps to packets and back: kernels' packets, positions, refusals, and every kind of bitmap."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl import bitmap_exchange, vli, wire
from tandem.repl.bitmap import Bitmap
from tandem.repl.bitmap_exchange import BitmapReceiver, BitmapSender
from tandem.repl.errors import PeerProtocolError
from tandem.repl.wire import Packet


def bitmap_of(n_bits: int, runs: Iterable[tuple[int, int]] = ()) -> Bitmap:
    """A bitmap of *n_bits* with the half-open *runs* set."""
    bitmap = Bitmap(n_bits)
    for first, end in runs:
        bitmap.set(first, end)
    return bitmap


def all_packets(sender: BitmapSender, limit_bytes: int = 1 << 20) -> list[bytes]:
    out: list[bytes] = []
    while not sender.done:
        some = sender.packets(limit_bytes)
        assert some, "a sender that is not done has a packet"
        assert sum(map(len, some[:-1])) < limit_bytes
        out += some
    assert sender.packets(limit_bytes) == []
    return out


def receive(receiver: BitmapReceiver, packets: list[bytes], volume: int = 0) -> None:
    """Feed whole packets; the receiver must be done with the last and not before."""
    for i, data in enumerate(packets):
        got_volume, cmd, length = wire.parse_header(data)
        assert got_volume == volume
        assert len(data) == wire.HEADER + length <= 4096
        wire.check_data(cmd, length)
        payload = memoryview(data)[wire.HEADER :]
        finished = receiver.plain(payload) if cmd == Packet.BITMAP else receiver.compressed(payload)
        assert finished == receiver.done == (i == len(packets) - 1)


def same(a: Bitmap, b: Bitmap) -> bool:
    n_words = (a.n_bits + 63) // 64
    return a.n_bits == b.n_bits and a.weight == b.weight and a.words(0, n_words) == b.words(0, n_words)


def commands(packets: list[bytes]) -> list[int]:
    return [wire.parse_header(data)[1] for data in packets]


def rle(first_value: int, *runs: int) -> bytes:
    """A P_COMPRESSED_BITMAP payload."""
    code = vli.encode(np.array(runs, np.int64), 1 << 20)
    return bytes((first_value << 7 | -code.n_bits % 8 << 4 | 2,)) + code.data


# -------------------------------------------------------------------------------------- golden packets

KERNEL_PACKETS = [
    (16374, [(0, 16374)], "8620ec20 00000024 00000005 00000000 b2 7f c5 1e 00"),
    (16374, [(100, 104)], "8620ec20 00000024 00000007 00000000 22 df 4c ff ba 3c 00"),
]


@pytest.mark.parametrize(("n_bits", "runs", "text"), KERNEL_PACKETS)
def test_packets_of_kernels(n_bits: int, runs: list[tuple[int, int]], text: str) -> None:
    bitmap = bitmap_of(n_bits, runs)
    assert all_packets(BitmapSender(bitmap, 0, use_rle=True)) == [bytes.fromhex(text)]
    copy = Bitmap(n_bits)
    receive(BitmapReceiver(copy), [bytes.fromhex(text)])
    assert same(copy, bitmap)


def test_plain_transfer_ends_with_an_empty_packet() -> None:
    bitmap = bitmap_of(16374, [(3, 5), (16373, 16374)])
    packets = all_packets(BitmapSender(bitmap, 2, use_rle=False))
    assert [wire.parse_header(data) for data in packets] == [(2, Packet.BITMAP, 2048), (2, Packet.BITMAP, 0)]
    assert packets[0][16:] == b"\x18" + bytes(2045) + b"\x20\x00"
    copy = Bitmap(16374)
    receive(BitmapReceiver(copy), packets, volume=2)
    assert same(copy, bitmap)


def test_plain_packets_have_4080_bytes() -> None:
    packets = all_packets(BitmapSender(bitmap_of(32640 * 2 + 1), 0, use_rle=False))
    assert [wire.parse_header(data)[2] for data in packets] == [4080, 4080, 8, 0]


# ------------------------------------------------------------------------------------------- positions


def test_plain_after_compressed_begins_at_the_word_the_position_lies_in() -> None:
    bitmap = Bitmap(1000)
    receiver = BitmapReceiver(bitmap)
    assert not receiver.compressed(rle(1, 100))
    rest = (1000 + 63) // 64 - 1
    assert not receiver.plain(b"\xff" * 8 + bytes(8 * (rest - 1)))
    assert receiver.plain(b"")
    assert list(bitmap.runs(0)) == [(1, 128), (0, 872)]


def test_compressed_after_plain_begins_at_the_next_word() -> None:
    n_bits = 32640 + 100
    bitmap = Bitmap(n_bits)
    receiver = BitmapReceiver(bitmap)
    assert not receiver.plain(b"\x01" + bytes(4079))
    assert not receiver.compressed(rle(0, 10))
    assert receiver.compressed(rle(1, 90))
    assert list(bitmap.runs(0)) == [(1, 1), (0, 32640 + 9), (1, 90)]


def test_compressed_packets_follow_each_other_at_the_exact_bit() -> None:
    bitmap = Bitmap(300)
    receiver = BitmapReceiver(bitmap)
    assert not receiver.compressed(rle(1, 7, 50))
    assert not receiver.compressed(rle(1, 100))
    assert receiver.compressed(rle(0, 142, 1))
    assert list(bitmap.runs(0)) == [(1, 7), (0, 50), (1, 100), (0, 142), (1, 1)]


def test_the_sender_switches_packet_by_packet() -> None:
    """Clear, then noise, then set: compressed, plain, and compressed to the end, with no terminator."""
    n_bits = 400_000
    bitmap = Bitmap(n_bits)
    bitmap.merge(100_000 // 64, random.Random(1).randbytes(40_000 // 64 * 64))
    bitmap.set(360_000, n_bits)
    packets = all_packets(BitmapSender(bitmap, 0, use_rle=True))
    kinds = commands(packets)
    assert Packet.BITMAP in kinds
    assert kinds[-1] == Packet.COMPRESSED_BITMAP
    copy = Bitmap(n_bits)
    receive(BitmapReceiver(copy), packets)
    assert same(copy, bitmap)


@pytest.mark.parametrize(
    ("n_bits", "kinds"),
    [(16, [Packet.COMPRESSED_BITMAP]), (10, [Packet.BITMAP] * 2), (1, [Packet.BITMAP] * 2)],
)
def test_plain_where_the_code_takes_more_bits_than_it_covers(n_bits: int, kinds: list[Packet]) -> None:
    """Runs of two take two bits each, and the code is counted in whole bytes."""
    bitmap = bitmap_of(n_bits, [(bit, min(bit + 2, n_bits)) for bit in range(0, n_bits, 4)])
    assert commands(all_packets(BitmapSender(bitmap, 0, use_rle=True))) == kinds


def test_merging_keeps_what_was_set() -> None:
    theirs, ours = bitmap_of(5000, [(10, 20), (4000, 4500)]), bitmap_of(5000, [(15, 30), (4999, 5000)])
    for use_rle in (True, False):
        receive(BitmapReceiver(ours), all_packets(BitmapSender(theirs, 0, use_rle)))
        assert [(v, n) for v, n in ours.runs(0) if v] == [(1, 20), (1, 500), (1, 1)]


def test_nothing_to_send() -> None:
    for use_rle in (True, False):
        packets = all_packets(BitmapSender(Bitmap(0), 0, use_rle))
        assert packets == [wire.packet(Packet.BITMAP)]
        receive(BitmapReceiver(Bitmap(0)), packets)


# ------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("n_bits", "payload", "why"),
    [
        (1000, b"", "0 bytes"),
        (1000, b"\x02", "1 bytes"),
        (1000, b"\x02" + bytes(4080), "4081 bytes"),
        (1000, b"\x01\x00", "unknown code 1"),
        (1000, b"\x00\x00", "unknown code 0"),
        (1000, b"\x72\x01", "cut off"),
        (1000, b"\x02\xff", "cut off"),
        (1000, rle(1, 1001), "beyond the end"),
        (1000, rle(0, 1001), "beyond the end"),
        (1000, rle(0, 999, 2), "beyond the end"),
        (1000, rle(0, *([vli.LENGTH_MAX] * 400)), "beyond the end"),
        (0, rle(0, 1), "beyond the end"),
    ],
)
def test_bad_compressed_packets(n_bits: int, payload: bytes, why: str) -> None:
    bitmap = Bitmap(n_bits)
    with pytest.raises(PeerProtocolError, match=why):
        BitmapReceiver(bitmap).compressed(payload)
    assert bitmap.weight == 0


@pytest.mark.parametrize(("n_bits", "length"), [(1000, 0), (1000, 120), (1000, 136), (1 << 20, 4088), (0, 8)])
def test_bad_plain_packets(n_bits: int, length: int) -> None:
    bitmap = Bitmap(n_bits)
    with pytest.raises(PeerProtocolError, match=f"P_BITMAP of {length} bytes"):
        BitmapReceiver(bitmap).plain(b"\xff" * length)
    assert bitmap.weight == 0


def test_nothing_may_follow_the_end() -> None:
    receiver = BitmapReceiver(Bitmap(64))
    assert receiver.compressed(rle(0, 64))
    for again in (receiver.plain, receiver.compressed):
        with pytest.raises(PeerProtocolError, match="after the end"):
            again(b"")


def test_bits_beyond_the_end_are_ignored() -> None:
    bitmap = Bitmap(70)
    receiver = BitmapReceiver(bitmap)
    assert not receiver.plain(b"\xff" * 16)
    assert receiver.plain(b"")
    assert bitmap.weight == 70


@given(st.binary(max_size=60), st.integers(0, 5000), st.booleans())
def test_garbage_is_merged_or_refused(payload: bytes, n_bits: int, compressed: bool) -> None:
    receiver = BitmapReceiver(Bitmap(n_bits))
    try:
        (receiver.compressed if compressed else receiver.plain)(memoryview(payload))
    except PeerProtocolError as refusal:
        assert len(str(refusal)) > 20


# ----------------------------------------------------------------------------------------- round trips


@st.composite
def bitmaps(draw: st.DrawFn) -> Bitmap:
    """Up to 300,000 bits: runs of any length, and stretches of noise."""
    n_bits = draw(st.integers(1, 300_000))
    bitmap = Bitmap(n_bits)
    for _ in range(draw(st.integers(0, 6))):
        first = draw(st.integers(0, n_bits - 1))
        end = min(n_bits, first + draw(st.sampled_from([1, 2, 63, 64, 65, 1000, 40_000, 300_000])))
        kind = draw(st.sampled_from(["set", "clear", "every second", "noise"]))
        if kind == "set":
            bitmap.set(first, end)
        elif kind == "clear":
            bitmap.clear(first, end)
        elif kind == "every second":
            bitmap.merge(first // 64, b"\x55" * ((end - first) // 64 * 8))
        else:
            bitmap.merge(first // 64, random.Random(first).randbytes((end - first) // 64 * 8))
    return bitmap


@settings(max_examples=60, deadline=None)
@given(bitmaps(), st.booleans(), st.sampled_from([1, 5000, 1 << 20]))
def test_every_bitmap_arrives(bitmap: Bitmap, use_rle: bool, limit_bytes: int) -> None:
    packets = all_packets(BitmapSender(bitmap, 7, use_rle), limit_bytes)
    copy = Bitmap(bitmap.n_bits)
    receive(BitmapReceiver(copy), packets, volume=7)
    assert same(copy, bitmap)
    if not use_rle:
        assert set(commands(packets)) == {Packet.BITMAP}
    for data in packets[:-1]:
        assert len(data) > wire.HEADER


def test_compressed_is_never_longer_than_plain() -> None:
    """Noise of every density: with run lengths allowed it takes no more bytes than without."""
    rng = np.random.default_rng(3)
    for density in (0.001, 0.01, 0.1, 0.2, 0.3, 0.5, 0.9, 0.999):
        bits = (rng.random(200_000) < density).astype(np.uint8)
        bitmap = Bitmap(200_000, np.packbits(bits, bitorder="little").tobytes())
        compressed = all_packets(BitmapSender(bitmap, 0, use_rle=True))
        plain = all_packets(BitmapSender(bitmap, 0, use_rle=False))
        assert sum(map(len, compressed)) <= sum(map(len, plain)) + 16
        copy = Bitmap(200_000)
        receive(BitmapReceiver(copy), compressed)
        assert same(copy, bitmap)


@pytest.mark.parametrize("runs", [[], [(5, 9), (1 << 31, (1 << 31) + 100_000)]], ids=["clear", "two runs"])
def test_a_device_of_16_tib_is_one_packet(runs: list[tuple[int, int]]) -> None:
    bitmap, copy = bitmap_of(1 << 32, runs), Bitmap(1 << 32)
    packets = all_packets(BitmapSender(bitmap, 0, use_rle=True))
    assert len(packets) == 1
    receive(BitmapReceiver(copy), packets)
    assert list(copy.runs(0)) == list(bitmap.runs(0))


def test_a_full_sync_of_1_tib_is_one_packet() -> None:
    bitmap, copy = bitmap_of(1 << 28, [(0, 1 << 28)]), Bitmap(1 << 28)
    packets = all_packets(BitmapSender(bitmap, 0, use_rle=True))
    assert packets == [wire.packet(Packet.COMPRESSED_BITMAP, rle(1, 1 << 28))]
    receive(BitmapReceiver(copy), packets)
    assert copy.weight == 1 << 28


def test_limits_of_a_packet() -> None:
    assert bitmap_exchange.PLAIN_WORDS_MAX * 8 == 4080
    assert bitmap_exchange.CODE_BITS_MAX == 4079 * 8
