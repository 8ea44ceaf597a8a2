"""The run-length code: its documented levels, its examples, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tandem.repl import vli
from tandem.repl.errors import PeerProtocolError

# Level: bits of the code, bits of the prefix, prefix, shortest and longest run.
LEVELS = [
    (2, 1, 0x00, 1, 2),
    (3, 2, 0x01, 3, 4),
    (5, 3, 0x03, 5, 8),
    (7, 4, 0x07, 9, 16),
    (10, 5, 0x0F, 17, 48),
    (14, 6, 0x1F, 49, 304),
    (21, 8, 0x3F, 305, 8496),
    (29, 8, 0x7F, 8497, 2105648),
    (42, 8, 0xBF, 2105649, 17181974832),
    (64, 8, 0xFF, 17181974833, 72057611219902768),
]
ALL_OF_IT = 1 << 40


def lengths_of(*lengths: int) -> vli.Lengths:
    return np.array(lengths, np.int64)


def slow_encode(lengths: list[int]) -> tuple[int, int]:
    """The code as one big integer and its number of bits: the definition, one run at a time."""
    stream = n_bits = 0
    for length in lengths:
        for width, prefix_width, prefix, first, last in LEVELS:
            if first <= length <= last:
                stream |= ((length - first) << prefix_width | prefix) << n_bits
                n_bits += width
    return stream, n_bits


def slow_decode(stream: int, n_bits: int) -> list[int] | None:
    """The runs, one at a time; None when the last one is cut off."""
    out = []
    while n_bits > 0:
        for width, prefix_width, prefix, first, _ in LEVELS:
            if stream & ((1 << prefix_width) - 1) == prefix:
                out.append(((stream & ((1 << width) - 1)) >> prefix_width) + first)
                break
        stream >>= width
        n_bits -= width
    return out if n_bits == 0 else None


@pytest.mark.parametrize(("width", "prefix_width", "prefix", "first", "last"), LEVELS)
def test_the_ends_of_each_level(width: int, prefix_width: int, prefix: int, first: int, last: int) -> None:
    for length in (first, last):
        word = (length - first) << prefix_width | prefix
        code = vli.encode(lengths_of(length), ALL_OF_IT)
        assert code == (word.to_bytes((width + 7) // 8, "little"), width, 1)
        assert vli.widths(lengths_of(length)).tolist() == [width]
        assert vli.decode(code.data, -width % 8).tolist() == [length]


def test_the_longest_run() -> None:
    assert vli.LENGTH_MAX == 72057611219902768


@pytest.mark.parametrize(
    ("runs", "code", "pad_bits"),
    [([16374], "7fc51e00", 3), ([100, 4, 16270], "df4cffba3c00", 2)],
)
def test_codes_that_kernels_sent(runs: list[int], code: str, pad_bits: int) -> None:
    data = bytes.fromhex(code)
    assert vli.encode(lengths_of(*runs), ALL_OF_IT) == (data, 8 * len(data) - pad_bits, len(runs))
    assert vli.decode(data, pad_bits).tolist() == runs


any_length = st.one_of(
    [st.integers(first, last) for _, _, _, first, last in LEVELS]
    + [st.sampled_from([end for level in LEVELS for end in level[3:]])]
)


@given(st.lists(any_length, min_size=1, max_size=200))
def test_round_trip(runs: list[int]) -> None:
    code = vli.encode(lengths_of(*runs), ALL_OF_IT)
    stream, n_bits = slow_encode(runs)
    assert code == (stream.to_bytes((n_bits + 7) // 8, "little"), n_bits, len(runs))
    assert vli.decode(code.data, -n_bits % 8).tolist() == runs
    assert int(vli.widths(lengths_of(*runs)).sum()) == n_bits


@given(st.lists(any_length, min_size=1, max_size=60), st.integers(0, 600))
def test_what_does_not_fit_is_left(runs: list[int], room: int) -> None:
    code = vli.encode(lengths_of(*runs), room)
    _, n_bits = slow_encode(runs[: code.n_runs])
    assert code.n_bits == n_bits <= room
    assert len(code.data) == (n_bits + 7) // 8
    if code.n_runs < len(runs):
        assert slow_encode(runs[: code.n_runs + 1])[1] > room


@given(st.binary(min_size=1, max_size=80), st.integers(0, 7))
@example(b"\x00", 7)
def test_any_bits_are_runs_or_refused(data: bytes, pad_bits: int) -> None:
    expected = slow_decode(int.from_bytes(data, "little"), 8 * len(data) - pad_bits)
    if expected is None:
        with pytest.raises(PeerProtocolError, match="cut off"):
            vli.decode(data, pad_bits)
    else:
        assert vli.decode(memoryview(data), pad_bits).tolist() == expected


def test_a_full_packet_of_the_shortest_runs() -> None:
    runs = [1, 2] * 8158
    code = vli.encode(lengths_of(*runs, 1, 1, 1), 4079 * 8)
    assert (code.n_bits, code.n_runs) == (4079 * 8, len(runs))
    assert vli.decode(code.data, 0).tolist() == runs
