"""drbd.conf's lexical rules and what is said about a text that breaks them."""

from __future__ import annotations

import pytest
from tandem.tools.conf_model import ConfigError, shown
from tandem.tools.conf_syntax import FILE_BYTES_MAX, NESTING_MAX, Statement, parse


def words(statement: Statement) -> list[tuple[str, str]]:
    return [(word.kind, word.text) for word in statement.words]


def test_statements_have_words_blocks_and_lines() -> None:
    text = b'a b;\n# comment { ; " \nc {\n\td 1;\r\n e {\n}\n}\n'
    first, second = parse(text, "F")
    assert words(first) == [("WORD", "a"), ("WORD", "b")] and first.block is None
    assert str(first.place) == "F:1"
    assert str(second.place) == "F:3" and second.block is not None
    assert [str(inner.place) for inner in second.block] == ["F:4", "F:5"]
    assert second.block[1].block == ()


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        (b"/dev/vg_0/a-b.c;", "WORD", "/dev/vg_0/a-b.c"),
        (b"10.1.1.1;", "WORD", "10.1.1.1"),
        (b'"a b";', "STRING", "a b"),
        (b'"# no comment; {";', "STRING", "# no comment; {"),
        (rb'"a \"q\" \\ \n";', "STRING", 'a "q" \\ n'),
        (b'"";', "STRING", ""),
        (b"[fd00::1%eth0.5];", "BRACKETED", "fd00::1%eth0.5"),
        (b"[ 3 ];", "BRACKETED", "3"),
        (b"[::ffff:10.0.0.1];", "BRACKETED", "::ffff:10.0.0.1"),
        (b"nbd://127.0.0.1:10809/r0;", "URI", "nbd://127.0.0.1:10809/r0"),
        (b"nbd+unix:///r0?socket=/a/b.s;", "URI", "nbd+unix:///r0?socket=/a/b.s"),
        (b"nbd;", "WORD", "nbd"),
        ('"é";'.encode(), "STRING", "é"),
        (b"x" * 128 + b";", "WORD", "x" * 128),
        (b'"' + b"x" * 255 + b'";', "STRING", "x" * 255),
    ],
)
def test_tokens(text: bytes, kind: str, value: str) -> None:
    (statement,) = parse(b"k " + text, "F")
    assert words(statement) == [("WORD", "k"), (kind, value)]


def test_a_comment_may_be_in_any_encoding() -> None:
    assert len(parse(b"a; # gr\xfc\xdfe\n# \xff\xfe\n", "F")) == 1


BAD = [
    (b"r {\n net {\n", "F:2: Parse error: '}' expected to close 'net' of line 2, but the file ends here"),
    (b"a b\n", "F:1: Parse error: ';' or '{' expected, but the file ends here"),
    (b"a {\n b }", "F:2: Parse error: ';' or '{' expected, but got '}'"),
    (b"a { } }", "F:1: Parse error: 'global | common | resource | skip | include' expected, but got '}'"),
    (b"{ }", "F:1: Parse error: 'global | common | resource | skip | include' expected, but got '{'"),
    (b"a {\n;\n}", "F:2: Parse error: a keyword or '}' expected, but got ';'"),
    (b'a\n "abc;\n', "F:2: Unterminated double quoted string >>>\"abc;\\x0a<<<: '\"' expected before the"),
    (b'a "abc\\\ndef";', "F:1: Unterminated double quoted string"),
    (b"a " + b"x" * 129 + b";", "F:1: Token too long >>>xxxxxxxxxxxxxxxxxxxx...<<<: at most 128"),
    (b'a "' + b"x" * 256 + b'";', 'F:1: Double quoted string too long >>>"xxxxxxxxxxxxxxxxxxx...<<<: at'),
    (b"t = 5;", "F:1: Parse error: a word, a string in double quotes, ';' or a brace expected, but got '='"),
    (b"a [3;", "F:1: '[NUMBER]' or '[IPV6-ADDRESS]' expected, but got '[3;'"),
    (b"\x7fELF\x02\x01", "F:1: text expected, but got the byte \\x7f: this is no configuration file"),
    (b"a\n\x00;", "F:2: text expected, but got the byte \\x00"),
    (b"a \xff\xfe;", "F:1: text expected, but got the byte \\xff"),
    (b'a "\xff";', "F:1: a string in UTF-8 expected, but got '\\xff'"),
    (b'a "\x00";', "F:1: a string without NUL characters expected"),
    (b"x" * (FILE_BYTES_MAX + 1), "F: this is no configuration file: it is larger than 1024 KiB"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=[repr(text[:12]) for text, _ in BAD])
def test_what_is_said_about_broken_texts(text: bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "F")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_nesting_has_a_limit_and_costs_no_recursion() -> None:
    deep = b"skip {" * NESTING_MAX + b"}" * NESTING_MAX
    assert parse(deep, "F")[0].depth == NESTING_MAX
    for depth in (NESTING_MAX + 1, 50_000):
        with pytest.raises(ConfigError, match="nested more than 32 levels"):
            parse(b"skip {" * depth + b"}" * depth, "F")
    with pytest.raises(ConfigError, match="'}' expected to close 'skip'"):
        parse(b"skip {" * 50_000, "F")


def test_shown_is_short_and_printable() -> None:
    assert shown("x" * 20) == "x" * 20
    assert shown("x" * 21) == "x" * 20 + "..."
    assert shown("a\tb\udcff") == "a\\x09b\\xff"
