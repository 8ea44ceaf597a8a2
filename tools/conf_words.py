"""Taking a statement's words from left to right, and the values that are more than one word.

What stands where something else was expected becomes a `ConfigError` in drbdadm's form:
``Parse error: 'EXPECTED' expected, but got 'TOKEN'``, with the line of that token.
"""

from __future__ import annotations

import ipaddress
import re
from typing import TYPE_CHECKING, Final

from .conf_model import Address, ConfigError, Device, Disk, MetaDiskStatement, shown
from .conf_nbd import UriProblem, parse_nbd_uri
from .conf_options import Kind, OptionSpec, ValueProblem, number

if TYPE_CHECKING:
    from .conf_model import Place
    from .conf_syntax import Statement, Word

FAMILIES: Final = {"ipv4": "ipv4", "ipv6": "ipv6", "ssocks": "ssocks", "sci": "ssocks", "sdp": "sdp"}

PORT: Final = OptionSpec("port", Kind.NUMBER, 0, 1, 65535)
MINOR: Final = OptionSpec("minor", Kind.NUMBER, 0, 0, (1 << 20) - 1)
VOLUME: Final = OptionSpec("volume", Kind.NUMBER, 0, 0, 65535)
NODE_ID: Final = OptionSpec("node-id", Kind.NUMBER, 0, 0, 31)
MD_INDEX: Final = OptionSpec("meta-disk index", Kind.NUMBER, 0, 0, 255)

_DRBD_NAME: Final = re.compile(r"(?:/dev/)?(drbd(\d{1,9})?)\Z")
_DRBD_ANY_NAME: Final = re.compile(r"(?:/dev/)?(drbd_.+)\Z", re.DOTALL)


class Cursor:
    """The words of one statement and how many of them are understood already."""

    __slots__ = ("at", "statement")

    def __init__(self, statement: Statement) -> None:
        self.statement = statement
        self.at = 0

    @property
    def place(self) -> Place:
        return self.statement.place

    def peek(self) -> Word | None:
        words = self.statement.words
        return words[self.at] if self.at < len(words) else None

    def error(self, expected: str) -> ConfigError:
        """The complaint that *expected* does not stand where the cursor is."""
        word = self.peek()
        if word is not None:
            return _expected(expected, word.text or '""', self.place.file, word.line)
        got = ";" if self.statement.block is None else "{"
        return _expected(expected, got, self.place.file, self.statement.end_line)

    def keyword(self, expected: str) -> str:
        """The next word, which must be unquoted: a quoted one is never a keyword."""
        word = self.peek()
        if word is None or word.kind != "WORD":
            raise self.error(expected)
        self.at += 1
        return word.text

    def skip_keyword(self, text: str) -> bool:
        """Step over *text* if it is the next word."""
        word = self.peek()
        if word is None or word.kind != "WORD" or word.text != text:
            return False
        self.at += 1
        return True

    def name(self, expected: str) -> str:
        """The next word or string."""
        word = self.peek()
        if word is None or not word.is_name:
            raise self.error(expected)
        self.at += 1
        return word.text

    def names(self, expected: str) -> tuple[str, ...]:
        """All words or strings up to the end or an operator; at least one."""
        names = [self.name(expected)]
        while (word := self.peek()) is not None and word.is_name:
            names.append(word.text)
            self.at += 1
        return tuple(names)

    def bracketed(self) -> str | None:
        """The content of brackets, if they come next."""
        word = self.peek()
        if word is None or word.kind != "BRACKETED":
            return None
        self.at += 1
        return word.text

    def number(self, spec: OptionSpec, expected: str) -> int:
        """The next word as a number of *spec*'s range."""
        word = self.peek()
        text = self.name(expected)
        if not text.isascii() or not text.isdigit():
            self.at -= 1
            raise self.error(expected)
        try:
            return number(spec, text)
        except ValueProblem as problem:
            raise ConfigError(self.place.file, word.line if word else 0, str(problem)) from None

    def end(self, expected: str = ";") -> None:
        """The semicolon."""
        if self.peek() is not None or self.statement.block is not None:
            raise self.error(expected)

    def section(self) -> tuple[Statement, ...]:
        """The block, which must come next."""
        if self.peek() is not None or self.statement.block is None:
            raise self.error("{")
        return self.statement.block


def _expected(expected: str, got: str, file: str, line: int) -> ConfigError:
    return ConfigError(file, line, f"Parse error: '{expected}' expected, but got '{shown(got)}'")


def address(cursor: Cursor) -> Address:
    """``[ipv4] A.B.C.D:PORT`` or ``ipv6 [ADDR]:PORT`` (also ssocks, sci, sdp with IPv4 addresses)."""
    expected = "ssocks | sdp | ipv4 | ipv6 | <ipv4 address>"
    word = cursor.peek()
    family = "ipv4"
    if word is not None and word.kind == "WORD" and word.text in FAMILIES:
        family = FAMILIES[word.text]
        cursor.at += 1
        expected = "<ipv4 address>"
    if family == "ipv6":
        host = _ipv6(cursor)
    else:
        host = cursor.name(expected)
        try:
            ipaddress.IPv4Address(host)
        except ValueError:
            cursor.at -= 1
            raise cursor.error(expected) from None
    colon = cursor.peek()
    if colon is None or colon.kind != "COLON":
        raise cursor.error(":")
    cursor.at += 1
    return Address(family, host, cursor.number(PORT, "port number"), cursor.place)


def _ipv6(cursor: Cursor) -> str:
    expected = "[<ipv6 address>]"
    text = cursor.bracketed()
    if text is None:
        raise cursor.error(expected)
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        cursor.at -= 1
        raise cursor.error(expected) from None
    return text


def device(cursor: Cursor) -> Device:
    """``/dev/drbdN``, ``drbdN``, ``/dev/drbd_NAME minor N``, ``minor N`` or an NBD URI [``minor N``]."""
    name, minor = "", -1
    word = cursor.peek()
    if word is None or word.kind != "WORD" or word.text != "minor":
        name = cursor.name("device name | minor")
    if cursor.skip_keyword("minor"):
        minor = cursor.number(MINOR, "minor number")
    place = cursor.place
    if "://" in name:
        try:
            parse_nbd_uri(name)
        except UriProblem as problem:
            raise place.error(f"device {name}: {problem}") from None
    elif match := _DRBD_NAME.match(name):
        name = f"/dev/{match[1]}"
        minor = _device_minor(match[2], minor, place)
    elif match := _DRBD_ANY_NAME.match(name):
        name = f"/dev/{match[1]}"
        if minor < 0:
            raise place.error(f"device {name}: no minor given nor device name contains a minor number")
    elif name:
        raise place.error(f"device {shown(name)}: device name must start with /dev/drbd (arbitrary names: "
                          "/dev/drbd_NAME minor N), or be an NBD URI (nbd://ADDRESS:PORT/EXPORT, "
                          "nbd+unix:///EXPORT?socket=PATH)")  # fmt: skip
    return Device(name, minor, place)


def _device_minor(in_name: str | None, explicit: int, place: Place) -> int:
    if in_name is None:
        if explicit < 0:
            raise place.error("no minor given nor device name contains a minor number")
        return explicit
    if explicit >= 0 and int(in_name) != explicit:
        raise place.error("explicit minor number must match with device name: try "
                          f"'device /dev/drbd{explicit} minor {explicit};' or leave off one of them "
                          "(arbitrary device names start with /dev/drbd_)")  # fmt: skip
    try:
        return number(MINOR, in_name)
    except ValueProblem as problem:
        raise place.error(str(problem)) from None


def disk(cursor: Cursor) -> Disk:
    """``PATH``, or the word ``none`` for a node without a disk."""
    if cursor.skip_keyword("none"):
        return Disk("", cursor.place)
    path = cursor.name("path of a block device or file")
    if not path:
        raise cursor.place.error("disk: the path of a block device or file expected, but got an empty string")
    return Disk(path, cursor.place)


def meta_disk(cursor: Cursor, *, flexible: bool) -> MetaDiskStatement:
    """``internal``, ``PATH`` or (not flexible) ``PATH [INDEX]``."""
    path = cursor.name("internal | path of a block device or file")
    if path == "internal":
        return MetaDiskStatement("internal", "", 0, cursor.place)
    if not path:
        raise cursor.place.error("meta-disk: 'internal' or a path expected, but got an empty string")
    index = None if flexible else cursor.bracketed()
    if index is None:
        return MetaDiskStatement("flexible", path, 0, cursor.place)
    if not index.isascii() or not index.isdigit():
        cursor.at -= 1
        raise cursor.error("[ index number ]")
    try:
        return MetaDiskStatement("indexed", path, number(MD_INDEX, index), cursor.place)
    except ValueProblem as problem:
        raise cursor.place.error(str(problem)) from None
