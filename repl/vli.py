"""The variable-length code for run lengths in P_COMPRESSED_BITMAP.

A length from 1 to about 7.2e16 becomes 2 to 64 bits: a prefix that names one of ten levels, and above it
the distance to the level's first length. Bits are taken lowest first, from the first byte on.

Both directions are vectorised, because one packet can hold 16,000 lengths and Python's own arithmetic
would need several milliseconds for it. Encoding is a few array operations: the widths add up to the
places. Decoding is sequential by nature, since only a code tells where the next one starts; so the width
of the code that *would* start is looked up for all bit positions at once, a short loop hops from code to
code over that table, and the lengths are then taken out together. No bit pattern is invalid; a code can
only be cut off by the end.

Source: drbd_vli.h, which documents the levels.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from .errors import PeerProtocolError

Lengths = npt.NDArray[np.int64]

# Per level: bits of the whole code, bits of the prefix, the prefix as the value of the lowest bits.
_LEVELS: Final = (
    (2, 1, 0x00), (3, 2, 0x01), (5, 3, 0x03), (7, 4, 0x07), (10, 5, 0x0F),
    (14, 6, 0x1F), (21, 8, 0x3F), (29, 8, 0x7F), (42, 8, 0xBF), (64, 8, 0xFF),
)  # fmt: skip
WIDTH_MAX: Final = 64  # bits of the longest code


def _first_lengths() -> list[int]:
    """The shortest run of each level, and one past the longest of the last."""
    firsts = [1]
    for width, prefix_width, _ in _LEVELS:
        firsts.append(firsts[-1] + (1 << (width - prefix_width)))
    return firsts


LENGTH_MAX: Final = _first_lengths()[-1] - 1

_FIRST: Final = np.array(_first_lengths()[:-1], np.int64)
_WIDTH: Final = np.array([width for width, _, _ in _LEVELS], np.int64)
_PREFIX_WIDTH: Final = np.array([prefix_width for _, prefix_width, _ in _LEVELS], np.uint64)
_PREFIX: Final = np.array([prefix for _, _, prefix in _LEVELS], np.uint64)
_DISTANCE_MASK: Final = np.array([(1 << (width - pw)) - 1 for width, pw, _ in _LEVELS], np.uint64)


def _level_of(low_byte: int) -> int:
    """The level of a code that starts with these eight bits."""
    for level, (_, prefix_width, prefix) in enumerate(_LEVELS):
        if low_byte & ((1 << prefix_width) - 1) == prefix:
            return level
    raise AssertionError(low_byte)


_LEVEL_OF: Final = np.array([_level_of(low_byte) for low_byte in range(256)], np.int64)
_WIDTH_OF: Final = _WIDTH[_LEVEL_OF].astype(np.uint8)
_SHIFTS: Final = np.arange(8, dtype=np.uint16)


class Code(NamedTuple):
    """*n_bits* bits of code in *data* (the rest of the last byte is zero), holding *n_runs* lengths."""

    data: bytes
    n_bits: int
    n_runs: int


def widths(lengths: Lengths) -> Lengths:
    """How many bits of code each length takes."""
    result: Lengths = _WIDTH[_levels(lengths)]
    return result


def _levels(lengths: Lengths) -> npt.NDArray[np.intp]:
    return np.searchsorted(_FIRST, lengths, "right") - 1


def encode(lengths: Lengths, room: int) -> Code:
    """The code of as many leading *lengths* (each 1 to LENGTH_MAX) as fit into *room* bits."""
    levels = _levels(lengths)
    ends = np.cumsum(_WIDTH[levels])
    n_runs = int(np.searchsorted(ends, room, "right"))
    if n_runs == 0:
        return Code(b"", 0, 0)
    assert lengths[:n_runs].min() >= 1 and lengths[:n_runs].max() <= LENGTH_MAX
    levels, ends = levels[:n_runs], ends[:n_runs]
    codes = ((lengths[:n_runs] - _FIRST[levels]).astype(np.uint64) << _PREFIX_WIDTH[levels]) | _PREFIX[levels]
    starts = ends - _WIDTH[levels]
    words, shifts = starts >> 6, (starts & 63).astype(np.uint64)
    n_bits = int(ends[-1])
    out = np.zeros((n_bits >> 6) + 2, "<u8")
    np.bitwise_or.at(out, words, codes << shifts)
    # What did not fit into the word. Shifting in two steps, because a shift by 64 is undefined.
    np.bitwise_or.at(out, words + 1, codes >> np.uint64(1) >> (np.uint64(63) - shifts))
    return Code(out.tobytes()[: (n_bits + 7) >> 3], n_bits, n_runs)


def decode(data: bytes | bytearray | memoryview, pad_bits: int) -> Lengths:
    """All lengths in *data*, whose last *pad_bits* (0 to 7) bits do not count.

    Errors: PeerProtocolError when the last code is cut off.
    """
    n_bits = 8 * len(data) - pad_bits
    raw = np.frombuffer(bytes(data) + bytes(-len(data) % 8 + 16), np.uint8)
    starts = _starts(raw, len(data), n_bits)
    words, shifts = starts >> 6, (starts & 63).astype(np.uint64)
    stream = raw.view("<u8")
    codes = (stream[words] >> shifts) | (stream[words + 1] << np.uint64(1) << (np.uint64(63) - shifts))
    levels = _LEVEL_OF[codes & np.uint64(0xFF)]
    distances = codes >> _PREFIX_WIDTH[levels] & _DISTANCE_MASK[levels]
    lengths: Lengths = _FIRST[levels] + distances.astype(np.int64)
    return lengths


def _starts(raw: npt.NDArray[np.uint8], n_bytes: int, n_bits: int) -> npt.NDArray[np.int64]:
    """The bit positions at which codes start, up to *n_bits*."""
    pairs = raw[:n_bytes].astype(np.uint16) | raw[1 : n_bytes + 1].astype(np.uint16) << np.uint16(8)
    step = _WIDTH_OF[(pairs[:, None] >> _SHIFTS & np.uint16(0xFF)).ravel()].tobytes()
    at, starts = 0, []
    while at < n_bits:
        starts.append(at)
        at += step[at]
    if at != n_bits:
        raise PeerProtocolError(
            f"a run length in a compressed bitmap is cut off: {n_bits} bits, the last code needs {at}"
        )
    return np.array(starts, np.int64)
