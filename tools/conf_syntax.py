"""From text to statements: the grammar of `drbd_conf.lark`, and what is said when a text does not fit it.

A statement is its words and, if it has one, its block. What the words mean is `conf_read`'s business. Limits
of the language (words of 128 characters, strings of 255) are checked here, and so is that a file is a text
of sane size: whatever bytes come in, the outcome is statements or one `ConfigError`.

Importing this module imports Lark, which takes longer than parsing a small file: `conf` does it late.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from lark import Lark, Token, Transformer, Tree
from lark.exceptions import UnexpectedCharacters, UnexpectedToken, VisitError

from .conf_model import ConfigError, Opaque, Place, shown

WORD_MAX: Final = 128  # characters of an unquoted word (drbd.conf's lexer)
STRING_MAX: Final = 255  # characters between quotes
NESTING_MAX: Final = 32  # the language itself needs five levels; only skipped text may have more
FILE_BYTES_MAX: Final = 1 << 20  # thousands of resources fit; a disk image named by mistake does not

TOP_LEVEL: Final = "global | common | resource | skip | include"

_ESCAPE: Final = re.compile(r"\\(.)")
_NOT_UTF8: Final = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class Word:
    """One token. *kind* is WORD, STRING, URI, BRACKETED or COLON; *text* is without quotes or brackets."""

    text: str
    kind: str
    line: int

    @property
    def is_name(self) -> bool:
        """A value or a name, quoted or not: no operator."""
        return self.kind in ("WORD", "STRING", "URI")


@dataclass(frozen=True, slots=True)
class Statement:
    """*end_line* is that of the semicolon or of the opening brace."""

    words: tuple[Word, ...]
    block: tuple[Statement, ...] | None
    place: Place
    end_line: int
    depth: int  # levels of blocks below this statement

    def opaque(self) -> Opaque:
        """The statement as mere text, to be printed again."""
        block = None if self.block is None else tuple(inner.opaque() for inner in self.block)
        return Opaque(tuple(word.text for word in self.words), block)


Part = Token | Statement


class _Builder(Transformer[Token, tuple[Statement, ...]]):
    """What the parser calls when it has recognised a rule; *source* names the file being parsed."""

    source = ""

    def plain(self, parts: list[Part]) -> Statement:
        *words, mark = [part for part in parts if isinstance(part, Token)]
        return self._statement(words, None, mark)

    def block(self, parts: list[Part]) -> Statement:
        *words, opening, _closing = [part for part in parts if isinstance(part, Token)]
        inner = tuple(part for part in parts if isinstance(part, Statement))
        return self._statement(words, inner, opening)

    def file(self, parts: list[Part]) -> tuple[Statement, ...]:
        return tuple(part for part in parts if isinstance(part, Statement))

    def _statement(
        self, tokens: list[Token], block: tuple[Statement, ...] | None, mark: Token
    ) -> Statement:
        words = tuple(_word(token, self.source) for token in tokens)
        place = Place(self.source, words[0].line)
        depth = 0 if block is None else 1 + max((inner.depth for inner in block), default=0)
        if depth > NESTING_MAX:
            raise place.error(f"sections nested more than {NESTING_MAX} levels deep are not supported")
        return Statement(words, block, place, mark.line or 0, depth)


@functools.cache
def _parser() -> tuple[Lark, _Builder]:
    """The parser and the builder it calls; made once, 10 ms."""
    builder = _Builder()
    grammar = (Path(__file__).parent / "drbd_conf.lark").read_text(encoding="ascii")
    return Lark(grammar, start="file", parser="lalr", transformer=builder, keep_all_tokens=True), builder


def parse(data: bytes, file: str) -> tuple[Statement, ...]:
    """The statements in the *data* of *file*; ConfigError for whatever is no configuration."""
    if len(data) > FILE_BYTES_MAX:
        limit = FILE_BYTES_MAX >> 10
        raise ConfigError(file, 0, f"this is no configuration file: it is larger than {limit} KiB")
    text = data.decode("utf-8", "surrogateescape")  # a comment may be in any encoding
    parser, builder = _parser()
    builder.source = file
    try:
        statements: tuple[Statement, ...] = parser.parse(text)  # type: ignore[assignment]  # the builder's
    except UnexpectedCharacters as error:
        raise _bad_character(text, error.pos_in_stream or 0, error.line, file) from None
    except UnexpectedToken as error:
        raise _bad_token(error, text, file) from None
    except VisitError as error:  # Lark wraps what a callback raises
        if isinstance(error.orig_exc, ConfigError):
            raise error.orig_exc from None
        raise
    return statements


def _word(token: Token, file: str) -> Word:
    text, line = str(token), token.line or 0
    if token.type == "STRING":
        text = text[1:-1]
        if len(text) > STRING_MAX:
            raise ConfigError(file, line, f"Double quoted string too long >>>{shown(str(token))}<<<: "
                                          f"at most {STRING_MAX} characters expected")  # fmt: skip
        if _NOT_UTF8.search(text):
            raise ConfigError(file, line, f"a string in UTF-8 expected, but got '{shown(text)}'")
        text = _ESCAPE.sub(r"\1", text)
        if "\0" in text:
            raise ConfigError(file, line, "a string without NUL characters expected")
    elif token.type == "BRACKETED":
        text = text[1:-1].strip()
    elif token.type == "WORD" and len(text) > WORD_MAX:
        raise ConfigError(file, line, f"Token too long >>>{shown(text)}<<<: "
                                      f"at most {WORD_MAX} characters expected")  # fmt: skip
    return Word(text, token.type, line)


def _bad_character(text: str, at: int, line: int, file: str) -> ConfigError:
    char = text[at]
    if char == '"':
        return ConfigError(file, line, f"Unterminated double quoted string >>>{shown(text[at:])}<<<: "
                                       "'\"' expected before the end of the line")  # fmt: skip
    if char == "[":
        got = shown(text[at:].partition("\n")[0])
        return ConfigError(file, line, f"'[NUMBER]' or '[IPV6-ADDRESS]' expected, but got '{got}'")
    if not char.isprintable():
        return ConfigError(file, line, f"text expected, but got the byte {shown(char)}: "
                                       "this is no configuration file")  # fmt: skip
    return ConfigError(file, line, "Parse error: a word, a string in double quotes, ';' or a brace "
                                   f"expected, but got '{char}'; quote a value that contains it")  # fmt: skip


def _bad_token(error: UnexpectedToken, text: str, file: str) -> ConfigError:
    """Lark's complaint in our words: what could have stood where *error*'s token stands."""
    token = error.token
    stack = error.interactive_parser.parser_state.value_stack if error.interactive_parser else []
    opened = _innermost_section(stack)
    if token.type == "$END":
        line = text.count("\n") + (not text.endswith("\n"))
        closing = f"'}}' expected to close '{opened[0]}' of line {opened[1]}" if opened else ""
        expected = "';' or '{' expected" if "SEMICOLON" in error.expected else closing
        return ConfigError(file, line, f"Parse error: {expected}, but the file ends here")
    if "SEMICOLON" in error.expected:
        expected = "';' or '{'"
    elif opened:
        expected = "a keyword or '}'"
    else:
        expected = f"'{TOP_LEVEL}'"
    got = shown(str(token))
    return ConfigError(file, token.line or 0, f"Parse error: {expected} expected, but got '{got}'")


def _innermost_section(stack: list[object]) -> tuple[str, int] | None:
    """Words and line of the section that is still open, from the parser's stack."""
    for i in range(len(stack) - 1, 0, -1):
        mark, words = stack[i], stack[i - 1]
        if isinstance(mark, Token) and mark.type == "LBRACE":
            tokens = words.children if isinstance(words, Tree) else [words]
            texts = [str(token) for token in tokens if isinstance(token, Token)]
            return shown(" ".join(texts)), mark.line or 0
    return None
