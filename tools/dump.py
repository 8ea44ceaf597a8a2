"""The text form of metadata: what dump-md prints and restore-md reads.

It decides the text only; `meta` finds the metadata and writes it back. The grammar is drbdmeta's, so that
dumps go both ways: white space and `#` comments separate tokens, the statements come in one fixed order,
and the bitmap is a list of little-endian 64-bit words, or of `N times` such a word.
"""

from __future__ import annotations

import itertools
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
from tandem.repl.bitmap import PAGE, Bitmap
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import BYTES_PER_BIT, MdFlag, Superblock

FORMAT: Final = "v08"
UNCLEAN_NOTE: Final = (
    "This_is_an_unclean_meta_data_dump._Don't_trust_the_bitmap.\n"
    '# You should "apply-al" first, if you plan to restore this.\n'
)
_LINE_WORDS: Final = 8  # 32-bit words on one line of the bitmap
_CHUNK_WORDS: Final = 1 << 19  # 64-bit words formatted at a time (4 MiB)


def dump_body(superblock: Superblock) -> str:
    """The statements between the placement comments and the bitmap."""
    s = superblock
    return (
        "uuid {\n"
        f"    0x{s.current:016X}; 0x{s.bitmap:016X}; 0x{s.history0:016X}; 0x{s.history1:016X};\n"
        f"    flags 0x{int(s.flags):08X};\n"
        "}\n"
        f"# al-extents {s.al_nr_extents};\n"
        f"la-size-sect {s.la_size_sect};\n"
        f"bm-byte-per-bit {s.bm_bytes_per_bit};\n"
        f"device-uuid 0x{s.device_uuid:016X};\n"
        f"la-peer-max-bio-size {s.la_peer_max_bio_size};\n"
        f"al-stripes {s.al_stripes};\n"
        f"al-stripe-size-4k {s.al_stripe_size_4k};\n"
    )


def dump_bitmap(bitmap: Bitmap) -> Iterator[str]:
    """The bitmap statement, piece by piece."""
    yield f"# bm-bytes {bitmap.n_pages * PAGE};\nbm {{\n"
    line = 0
    for value, n_lines, words in _pieces(bitmap):
        if words is None and n_lines > 1:
            head = f"   # at {line * _LINE_WORDS * 128}kB\n" if line % 8 == 0 else ""
            yield f"{head}    {n_lines * _LINE_WORDS // 2} times 0x{value:08X}{value:08X};\n"
        else:
            yield _plain_lines(line, [value << 32 | value] * 4 if words is None else words.tolist())
        line += n_lines
    yield f"}}\n# bits-set {bitmap.weight};\n"


def _plain_lines(line: int, words: list[int]) -> str:
    """Lines of four 64-bit words each, the first of which is line number *line* of the bitmap."""
    text = []
    for at in range(0, len(words), 4):
        if line % 8 == 0:
            text.append(f"   # at {line * _LINE_WORDS * 128}kB\n")
        text.append("    " + " ".join(f"0x{word:016X};" for word in words[at : at + 4]) + "\n")
        line += 1
    return "".join(text)


def _pieces(bitmap: Bitmap) -> Iterator[tuple[int, int, npt.NDArray[np.uint64] | None]]:
    """The bitmap as (value, number of lines, words): lines all of one 32-bit value, or (words given) mixed.

    Neighbouring uniform pieces of one value are joined.
    """
    value, n_lines = 0, 0
    for piece in _raw_pieces(bitmap):
        if piece[2] is None and n_lines and piece[0] == value:
            n_lines += piece[1]
            continue
        if n_lines:
            yield value, n_lines, None
        value, n_lines = (piece[0], piece[1]) if piece[2] is None else (0, 0)
        if piece[2] is not None:
            yield piece
    if n_lines:
        yield value, n_lines, None


def _raw_pieces(bitmap: Bitmap) -> Iterator[tuple[int, int, npt.NDArray[np.uint64] | None]]:
    n_words = bitmap.n_pages * PAGE // 8
    for at in range(0, n_words, _CHUNK_WORDS):
        n = min(_CHUNK_WORDS, n_words - at)
        if not bitmap.any(min(at * 64, bitmap.n_bits), min((at + n) * 64, bitmap.n_bits)):
            yield 0, n // 4, None
            continue
        words = np.frombuffer(bitmap.words(at, n), np.uint64)
        lines = words.view(np.uint32).reshape(-1, _LINE_WORDS)
        uniform = (lines == lines[:, :1]).all(axis=1)
        # A new piece begins where uniform lines change their value, or uniform and mixed lines meet.
        same = (uniform[1:] == uniform[:-1]) & (~uniform[1:] | (lines[1:, 0] == lines[:-1, 0]))
        edges = [0, *(np.flatnonzero(~same) + 1).tolist(), len(lines)]
        for first, end in itertools.pairwise(edges):
            if uniform[first]:
                yield int(lines[first, 0]), end - first, None
            else:
                yield 0, end - first, words[first * 4 : end * 4]


# -------------------------------------------------------------------- reading


@dataclass(slots=True)
class Dump:
    """A parsed dump. The bitmap is ``counts[i]`` times the word ``words[i]``, one after the other."""

    superblock: Superblock
    counts: array[int] = field(default_factory=lambda: array("Q"))
    words: array[int] = field(default_factory=lambda: array("Q"))

    def bitmap(self, n_bits: int) -> tuple[Bitmap, bool]:
        """The first *n_bits* as a bitmap, and whether the dump has words beyond the pages they need."""
        bitmap = Bitmap(n_bits)
        n_words = bitmap.n_pages * PAGE // 8
        at = 0
        singles = array("Q")
        for count, word in zip(self.counts, self.words, strict=True):
            if count == 1 and at + len(singles) < n_words:
                singles.append(word)
                continue
            bitmap.merge(at, singles.tobytes())
            at, singles = at + len(singles), array("Q")
            n = min(count, n_words - at)
            self._repeat(bitmap, at, n, word)
            at += n
            if n < count:
                return bitmap, True
        bitmap.merge(at, singles.tobytes())
        return bitmap, False

    @staticmethod
    def _repeat(bitmap: Bitmap, at: int, n: int, word: int) -> None:
        if word == 0xFFFFFFFFFFFFFFFF:
            bitmap.set(min(at * 64, bitmap.n_bits), min((at + n) * 64, bitmap.n_bits))
        elif word:
            for first in range(at, at + n, _CHUNK_WORDS):
                bitmap.merge(first, word.to_bytes(8, "little") * min(_CHUNK_WORDS, at + n - first))


_TOKEN: Final = re.compile(
    r"""[ \t\r\n\f\v]+ | \#[^\n]*
    | (?P<hex>0x[0-9a-fA-F]*) | (?P<string>"[^"\n]*"?) | (?P<word>[A-Za-z_][A-Za-z0-9_'.-]*)
    | (?P<number>[0-9]+) | (?P<sign>[{};])""",
    re.VERBOSE,
)
_KEYWORDS: Final = frozenset({
    "version", "uuid", "flags", "la-size-sect", "bm-byte-per-bit", "device-uuid", "la-peer-max-bio-size",
    "al-stripes", "al-stripe-size-4k", "bm", "times",
})  # fmt: skip
_SIGNS: Final = {"{": "opening brace ({)", "}": "closing brace (})", ";": "semicolon (;)"}
_STRING: Final = 'short quoted string ("..up to 20 characters, no newline..")'
_NUMBER: Final = "number ([0-9], up to 20 digits)"
_U64: Final = "a 16-digit hex number"
_U32: Final = "an 8-digit hex number"
_ITEM: Final = "repeat count, 16-digit hex number, or closing brace (})"


class _Reader:
    """The tokens of a dump, one at a time, with the line they are on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.line = 1
        self.kind = ""
        self.value = ""
        self.advance()

    def advance(self) -> None:
        """Go to the next token: kind is hex, string, word, number, sign, end, or other (not a token)."""
        while True:
            if self._at == len(self._text):
                self.kind, self.value = "end", ""
                return
            match = _TOKEN.match(self._text, self._at)
            if match is None:
                self.kind, self.value = "other", self._text[self._at]
                return
            self._at = match.end()
            if match.lastgroup is not None:
                self.kind, self.value = match.lastgroup, match.group()
                return
            self.line += match.group().count("\n")

    def fail(self, expected: str) -> MetadataError:
        """What to raise: where, what was expected, and what is there instead."""
        text = f"Parse error in line {self.line}: {expected} expected"
        note = self._not_a_token()
        if self.kind == "end":
            text += ", but end of file encountered"
        elif self.kind == "other":
            text += f"; got invalid input character '\\x{ord(self.value) & 0xFF:02x}' [{self.value}]"
        elif note:
            text = f"line {self.line}: {note} ...\n{text}"
        elif self.kind == "number":
            text += ", not some number"
        else:
            text += f", not '{self.value}'"
        return MetadataError(text, exit_code=10)

    def _not_a_token(self) -> str:
        """Why the present token is none in this grammar; empty if it is one."""
        if self.kind == "string" and not self._is_short_string():
            return f"invalid string: {self.value[:21]}"
        if self.kind == "hex" and len(self.value) not in (10, 18):
            return f"invalid hex number (only 8 or 16 hex digits accepted): {self.value[:40]}"
        if (self.kind == "word" and self.value not in _KEYWORDS) or (
            self.kind == "number" and len(self.value) > 19
        ):
            return f"unknown token: {self.value[:40]}"
        return ""

    def _is_short_string(self) -> bool:
        return 2 <= len(self.value) <= 22 and self.value.endswith('"')

    def word(self, keyword: str) -> None:
        if self.kind != "word" or self.value != keyword:
            raise self.fail(f"keyword '{keyword}'")
        self.advance()

    def sign(self, sign: str) -> None:
        if self.kind != "sign" or self.value != sign:
            raise self.fail(_SIGNS[sign])
        self.advance()

    def hex(self, digits: int) -> int:
        if self.kind != "hex" or len(self.value) != digits + 2:
            raise self.fail(_U64 if digits == 16 else _U32)
        value = int(self.value, 16)
        self.advance()
        return value

    def number(self) -> int:
        if self.kind != "number" or len(self.value) > 19:
            raise self.fail(_NUMBER)
        value = int(self.value)
        self.advance()
        return value

    def string(self) -> str:
        if (
            self.kind != "string"
            or len(self.value) > 22
            or not self.value.endswith('"')
            or len(self.value) < 2
        ):
            raise self.fail(_STRING)
        value = self.value[1:-1]
        self.advance()
        return value

    def statement(self, keyword: str) -> int:
        """`keyword NUM ;`"""
        self.word(keyword)
        value = self.number()
        self.sign(";")
        return value


def parse_dump(text: str) -> Dump:
    """Read a dump; MetadataError (exit 10) names the line and what was expected there."""
    reader = _Reader(text)
    reader.word("version")
    version = reader.string()
    if version != FORMAT:
        raise MetadataError(f"dump is '{version}' you requested '{FORMAT}'.", exit_code=10)
    reader.sign(";")
    dump = Dump(_parse_superblock(reader))
    reader.word("bm")
    reader.sign("{")
    _parse_bitmap(reader, dump)
    if reader.kind != "end":
        raise reader.fail("end of file")
    return dump


def _parse_superblock(reader: _Reader) -> Superblock:
    reader.word("uuid")
    reader.sign("{")
    uuids = []
    for _ in range(4):
        uuids.append(reader.hex(16))
        reader.sign(";")
    reader.word("flags")
    flags = reader.hex(8)
    reader.sign(";")
    reader.sign("}")
    la_size = reader.statement("la-size-sect")
    per_bit = reader.statement("bm-byte-per-bit")
    if per_bit != BYTES_PER_BIT:
        raise MetadataError(f"Invalid value for bm-byte-per-bit: {per_bit}, value must be 4096", exit_code=10)
    reader.word("device-uuid")
    device_uuid = reader.hex(16)
    reader.sign(";")
    bio = reader.statement("la-peer-max-bio-size")
    stripes = reader.statement("al-stripes")
    stripe_size = reader.statement("al-stripe-size-4k")
    if bio > 0xFFFFFFFF:
        raise MetadataError(
            f"Invalid value for la-peer-max-bio-size: {bio} is more than 32 bits", exit_code=10
        )
    current, bitmap, history0, history1 = uuids
    return Superblock(
        la_size_sect=la_size, current=current, bitmap=bitmap, history0=history0, history1=history1,
        device_uuid=device_uuid, flags=MdFlag(flags), la_peer_max_bio_size=bio, al_stripes=stripes,
        al_stripe_size_4k=stripe_size,
    )  # fmt: skip


def _parse_bitmap(reader: _Reader, dump: Dump) -> None:
    while reader.value != "}" or reader.kind != "sign":
        count = 1
        if reader.kind == "number":
            count = reader.number()
            reader.word("times")
        elif reader.kind != "hex" or len(reader.value) != 18:
            raise reader.fail(_ITEM)
        dump.counts.append(count)
        dump.words.append(reader.hex(16))
        reader.sign(";")
    reader.advance()
