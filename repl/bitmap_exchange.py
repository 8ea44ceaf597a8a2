"""The exchange of bitmaps before a resync: a bitmap to packets, and packets into a bitmap.

Decides how each stretch of the bitmap is sent, as run lengths (P_COMPRESSED_BITMAP) or as it is
(P_BITMAP), and where in the bitmap each packet begins. Both sides keep the same position and must agree on
it exactly, because no packet names it:

* after a compressed packet the bit position is exact, the word position is that of the word it lies in;
* a plain packet starts at the word position and has as many words as fit or are left, no fewer;
* after a plain packet the bit position is the start of the next word, at most the end of the bitmap.

A transfer ends with a compressed packet that ends exactly at the end of the bitmap, or with an empty
P_BITMAP. While it runs nothing else may be written to that direction of the data socket; the caller sees
to that. The bitmap may change between two calls: what was passed is not sent again.

Source: drbd_int.h, struct bm_xfer_ctx; struct p_compressed_bm in drbd_protocol.h; observed transfers.
"""

from __future__ import annotations

from itertools import islice
from typing import Final

import numpy as np

from . import vli
from .bitmap import Bitmap
from .errors import PeerProtocolError
from .wire import BITMAP_PAYLOAD_MAX, HEADER, Packet, View, packet

WORD_BITS: Final = 64
PLAIN_WORDS_MAX: Final = BITMAP_PAYLOAD_MAX // 8
CODE_BITS_MAX: Final = (BITMAP_PAYLOAD_MAX - 1) * 8  # one byte of the payload says how the rest is coded

_RLE_VLI: Final = 2  # the one code there is, in the low four bits of that byte
_RUNS_AT_ONCE: Final = 2048  # about a packet of middling runs; more would be looked at twice
_DENSE: Final = 64  # bits per run up to which runs are set as a picture of the bitmap, not one by one


class BitmapSender:
    """Sends *bitmap* once, from its first bit to its end, compressed where that is smaller if *use_rle*."""

    __slots__ = ("_bit", "_bitmap", "_n_words", "_use_rle", "_volume", "_word", "done")

    def __init__(self, bitmap: Bitmap, volume: int, use_rle: bool) -> None:
        self._bitmap = bitmap
        self._volume = volume
        self._use_rle = use_rle
        self._n_words = (bitmap.n_bits + WORD_BITS - 1) // WORD_BITS
        self._bit = 0
        self._word = 0
        self.done = False  # the last packet was handed out

    def packets(self, limit_bytes: int) -> list[bytes]:
        """The next packets, whole: up to *limit_bytes* and at most one packet more; empty when done."""
        out: list[bytes] = []
        while not self.done and limit_bytes > 0:
            payload = self._compressed() if self._use_rle else b""
            if payload:
                out.append(packet(Packet.COMPRESSED_BITMAP, payload, self._volume))
                self.done = self._bit == self._bitmap.n_bits
            else:
                payload = self._plain()
                out.append(packet(Packet.BITMAP, payload, self._volume))
                self.done = not payload
            limit_bytes -= HEADER + len(payload)
        return out

    def _compressed(self) -> bytes:
        """The next bits as run lengths, and step over them; empty when there are none or plain is smaller."""
        runs = self._bitmap.runs(self._bit)
        parts: list[vli.Lengths] = []
        first_value = code_bits = covered = 0
        while code_bits < CODE_BITS_MAX:
            some = list(islice(runs, _RUNS_AT_ONCE))
            if not some:
                break
            if not parts:
                first_value = some[0][0]
            lengths = np.array([length for _, length in some], np.int64)
            parts.append(lengths)
            code_bits += int(vli.widths(lengths).sum())
            covered += int(lengths.sum())
            if covered < code_bits:  # what begins so raggedly is not worth looking at further
                return b""
        if not parts:
            return b""
        lengths = np.concatenate(parts)
        code = vli.encode(lengths, CODE_BITS_MAX)
        covered = int(lengths[: code.n_runs].sum())
        if covered < 8 * len(code.data):
            return b""
        self._bit += covered
        self._word = self._bit // WORD_BITS
        pad_bits = -code.n_bits % 8
        return bytes((first_value << 7 | pad_bits << 4 | _RLE_VLI,)) + code.data

    def _plain(self) -> bytes:
        """The next words as they are, and step over them; empty at the end."""
        n_words = min(PLAIN_WORDS_MAX, self._n_words - self._word)
        payload = self._bitmap.words(self._word, n_words)
        self._word += n_words
        self._bit = min(self._word * WORD_BITS, self._bitmap.n_bits)
        return payload


class BitmapReceiver:
    """Merges (ORs) one transfer of the peer's bitmap into *bitmap*.

    Errors: PeerProtocolError from `plain` and `compressed` for whatever breaks the rules of the exchange.
    """

    __slots__ = ("_bit", "_bitmap", "_n_words", "_word", "done")

    def __init__(self, bitmap: Bitmap) -> None:
        self._bitmap = bitmap
        self._n_words = (bitmap.n_bits + WORD_BITS - 1) // WORD_BITS
        self._bit = 0
        self._word = 0
        self.done = False

    def plain(self, payload: View) -> bool:
        """Merge what followed the header of a P_BITMAP; True when the transfer is complete."""
        self._expect_more()
        n_words = min(PLAIN_WORDS_MAX, self._n_words - self._word)
        if len(payload) != 8 * n_words:
            raise PeerProtocolError(
                f"P_BITMAP of {len(payload)} bytes at bit {self._bit} of {self._bitmap.n_bits}; "
                f"it must have {8 * n_words} (do both nodes agree on the size of the device?)"
            )
        if n_words:
            self._bitmap.merge(self._word, payload)
        self._word += n_words
        self._bit = min(self._word * WORD_BITS, self._bitmap.n_bits)
        self.done = n_words == 0
        return self.done

    def compressed(self, payload: View) -> bool:
        """Merge what followed the header of a P_COMPRESSED_BITMAP; True when the transfer is complete."""
        self._expect_more()
        if not 2 <= len(payload) <= BITMAP_PAYLOAD_MAX:
            raise PeerProtocolError(
                f"P_COMPRESSED_BITMAP of {len(payload)} bytes; it has 2 to {BITMAP_PAYLOAD_MAX}"
            )
        encoding = payload[0]
        if encoding & 0xF != _RLE_VLI:
            raise PeerProtocolError(f"P_COMPRESSED_BITMAP with the unknown code {encoding & 0xF}")
        lengths = vli.decode(payload[1:], encoding >> 4 & 7)
        # Each length first: the sum of a few hundred absurd ones would not fit into 64 bits.
        left = self._bitmap.n_bits - self._bit
        if int(lengths.max()) > left or int(lengths.sum()) > left:
            raise PeerProtocolError(
                f"P_COMPRESSED_BITMAP goes beyond the end of the bitmap, {left} bits were left "
                "(do both nodes agree on the size of the device?)"
            )
        self._merge_runs(lengths, encoding >> 7)
        self._bit += int(lengths.sum())
        self._word = self._bit // WORD_BITS
        self.done = self._bit == self._bitmap.n_bits
        return self.done

    def _expect_more(self) -> None:
        if self.done:
            raise PeerProtocolError("a bitmap packet after the end of the bitmap")

    def _merge_runs(self, lengths: vli.Lengths, first_value: int) -> None:
        """Set the set runs among *lengths*, which alternate and begin at the bit position."""
        total = int(lengths.sum())
        if total <= _DENSE * len(lengths):
            lead = self._bit % WORD_BITS
            values = (np.arange(len(lengths)) + first_value & 1).astype(np.uint8)
            bits = np.zeros((lead + total + WORD_BITS - 1) // WORD_BITS * WORD_BITS, np.uint8)
            bits[lead : lead + total] = np.repeat(values, lengths)
            self._bitmap.merge(self._word, np.packbits(bits, bitorder="little").tobytes())
            return
        ends = self._bit + np.cumsum(lengths)
        set_runs = slice(1 - first_value, None, 2)
        for length, end in zip(lengths[set_runs].tolist(), ends[set_runs].tolist(), strict=True):
            self._bitmap.set(end - length, end)
