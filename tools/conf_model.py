"""The parsed configuration as it was written: sections, hosts and volumes with the place of each statement.

Nothing here decides anything. `conf_read` fills these values from text, `conf_check` looks for what does
not fit together, `conf_resolve` turns them into what one node runs, `conf_dump` prints them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

TOKEN_SHOWN = 20  # characters of an unexpected token that a message repeats


class ConfigError(Exception):
    """Configuration that cannot be used; drbdadm's exit code for it is 10.

    *file* is the name as the user wrote it (included files: joined to the directory of the including
    one), *line* counts from 1 and is 0 when the file as a whole is meant.
    """

    exit_code = 10

    def __init__(self, file: str, line: int, text: str) -> None:
        super().__init__(file, line, text)
        self.file = file
        self.line = line
        self.text = text

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {self.text}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a statement begins."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def directory(self) -> str:
        """The absolute directory that relative paths of this file start from."""
        return os.path.dirname(os.path.abspath(self.file)) if self.file != STDIN else os.getcwd()

    def error(self, text: str) -> ConfigError:
        return ConfigError(self.file, self.line, text)


STDIN = "STDIN"  # how messages name standard input


def shown(text: str) -> str:
    """*text* for a message: printable, and cut to the first 20 characters."""
    cut = text[:TOKEN_SHOWN] + ("..." if len(text) > TOKEN_SHOWN else "")
    return "".join(c if c.isprintable() else _escaped(c) for c in cut)


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode("utf-8", "surrogateescape"))


@dataclass(frozen=True, slots=True)
class Option:
    """One option statement. *value* is canonical text ("yes" for ``NAME;``), None for a bare flag."""

    name: str
    value: str | None
    place: Place


@dataclass(slots=True)
class Section:
    """A section of options, in file order. *place* is None as long as nobody has written one."""

    place: Place | None = None
    options: list[Option] = field(default_factory=list)

    def last(self, name: str) -> Option | None:
        """The option that is effective: the last one of that name."""
        return next((o for o in reversed(self.options) if o.name == name), None)


@dataclass(frozen=True, slots=True)
class Opaque:
    """A section that is kept only to be printed again (proxy); *words* includes its keyword."""

    words: tuple[str, ...]
    block: tuple[Opaque, ...] | None


@dataclass(frozen=True, slots=True)
class Address:
    """``ipv4 10.0.0.1:7000`` as written; the *host* of an IPv6 address is without its brackets."""

    family: str  # ipv4 | ipv6 | ssocks | sdp
    host: str
    port: int
    place: Place

    def __str__(self) -> str:
        return f"{self.family} {self.key}"

    @property
    def key(self) -> str:
        host = f"[{self.host}]" if self.family == "ipv6" else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Device:
    """*name* is /dev/drbd…, an NBD URI, or empty when only a minor number is given. *minor* is -1
    until one is given out (NBD URIs need none)."""

    name: str
    minor: int
    place: Place

    @property
    def is_uri(self) -> bool:
        return "://" in self.name


@dataclass(frozen=True, slots=True)
class Disk:
    path: str  # as written; empty for ``disk none``
    place: Place


@dataclass(frozen=True, slots=True)
class MetaDiskStatement:
    kind: str  # internal | flexible | indexed
    path: str
    index: int
    place: Place


@dataclass(slots=True)
class Volume:
    """What one section says about one volume; resource level and host level are kept apart."""

    number: int
    place: Place
    device: Device | None = None
    disk: Disk | None = None
    meta_disk: MetaDiskStatement | None = None
    options: Section = field(default_factory=Section)


@dataclass(slots=True)
class Host:
    """``on``, ``floating`` or ``stacked-on-top-of``."""

    names: tuple[str, ...]  # floating: the address text; stacked: the name of the lower resource
    place: Place
    kind: str = "on"  # on | floating | stacked
    volumes: dict[int, Volume] = field(default_factory=dict)
    explicit: bool = False  # has ``volume N { }`` sections
    implicit: bool = False  # has volume statements directly
    address: Address | None = None
    node_id: int | None = None
    options: Section = field(default_factory=Section)
    proxy: list[Opaque] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def title(self) -> str:
        """The section as messages name it: ``on alpha``, ``floating ipv4 10.0.0.1:7000``."""
        if self.kind == "stacked":
            return f"stacked-on-top-of {self.name}"
        if self.kind == "floating":
            return f"floating {self.address}"
        return f"on {' '.join(self.names)}"


@dataclass(slots=True)
class Connection:
    """A DRBD 9 connection: which hosts, and what replaces or adds to the resource's own statements."""

    place: Place
    name: str = ""
    mesh: bool = False
    hosts: list[tuple[str, Address | None]] = field(default_factory=list)
    net: Section = field(default_factory=Section)
    disk: Section = field(default_factory=Section)
    volumes: dict[int, Section] = field(default_factory=dict)


@dataclass(slots=True)
class Resource:
    """One resource section (or ``common``, which has no hosts), nothing inherited yet."""

    name: str
    place: Place
    hosts: list[Host] = field(default_factory=list)
    volumes: dict[int, Volume] = field(default_factory=dict)
    explicit: bool = False
    implicit: bool = False
    net: Section = field(default_factory=Section)
    disk: Section = field(default_factory=Section)
    options: Section = field(default_factory=Section)
    startup: Section = field(default_factory=Section)
    handlers: Section = field(default_factory=Section)
    connections: list[Connection] = field(default_factory=list)
    proxy: Opaque | None = None

    @property
    def stacked(self) -> bool:
        return any(host.kind == "stacked" for host in self.hosts)

    def host(self, node: str) -> Host | None:
        """The section that names *node*."""
        return next((h for h in self.hosts if h.kind != "stacked" and node in h.names), None)
