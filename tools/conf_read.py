"""Reading drbd.conf: files and includes, sections and statements, into the values of `conf_model`.

Each keyword has one function that takes its words; a table per section says which keywords it knows. What
is written twice is refused here (``conflicting use of …``), what does not fit together across sections is
`conf_check`'s business.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from collections.abc import Callable
from typing import Final

from . import conf_words as words
from .conf_model import STDIN, Address, Connection, Host, Option, Place, Resource, Section, Volume, shown
from .conf_options import (
    GLOBAL,
    OLD_NAMES,
    SECTIONS,
    SYNCER_IGNORED,
    UNSUPPORTED_VALUES,
    Kind,
    OptionSpec,
    Support,
    ValueProblem,
    convert,
)
from .conf_syntax import FILE_BYTES_MAX, TOP_LEVEL, Statement, parse
from .conf_words import Cursor

INCLUDE_DEPTH_MAX: Final = 40
_MODULE_VERSION: Final = "require-drbd-module-version-"
_IN_RESOURCE: Final = (
    "protocol | on | disk | net | syncer | startup | handlers | options | device | meta-disk | volume | "
    "floating | connection | ignore-on | stacked-on-top-of | skip"
)
_IN_HOST: Final = "address | device | disk | meta-disk | volume | node-id | options | proxy"
_IN_VOLUME: Final = "device | disk | meta-disk | flexible-meta-disk"
_VOLUME_KEYWORDS: Final = ("device", "disk", "meta-disk", "flexible-meta-disk", "tiebreaker")

Handler = Callable[[Cursor], None]


class Reader:
    """What has been read so far; one per `load`."""

    def __init__(self) -> None:
        self.resources: dict[str, Resource] = {}
        self.common: Resource | None = None
        self.globals = Section()
        self._warnings: dict[str, str] = {}
        self._files: set[tuple[int, int]] = set()
        self._first: dict[tuple[str, str], Place] = {}

    @property
    def warnings(self) -> list[str]:
        return list(self._warnings.values())

    def warn(self, place: Place, name: str, text: str) -> None:
        """One warning for each *name*, at its first place."""
        self._warnings.setdefault(name, f"{place}: WARN: {text}")

    def claim(self, kind: str, key: str, place: Place) -> None:
        """*key* belongs to *place* alone. Refused when it is taken."""
        first = self._first.setdefault((kind, key), place)
        if first is not place:
            raise place.error(f"conflicting use of {kind} '{key}' ... first used at {first}.")

    # ----------------------------------------------------------------------------- files and includes

    def read_stdin(self) -> None:
        self._statements(parse(sys.stdin.buffer.read(FILE_BYTES_MAX + 1), STDIN), 0)

    def read_file(self, path: str, included_at: Place | None = None, depth: int = 0) -> None:
        """Read *path* unless it was read before (which also ends loops)."""
        where = included_at or Place(path, 0)
        try:
            with open(path, "rb") as file:
                info = os.fstat(file.fileno())
                if (info.st_dev, info.st_ino) in self._files and stat.S_ISREG(info.st_mode):
                    return
                self._files.add((info.st_dev, info.st_ino))
                data = file.read(FILE_BYTES_MAX + 1)
        except (OSError, ValueError) as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if included_at:
                raise where.error(f"Failed to open include file '{shown_path(path)}': {why}.") from None
            raise where.error(f"Failed to open configuration file: {why}.") from None
        self._statements(parse(data, path), depth)

    def _statements(self, statements: tuple[Statement, ...], depth: int) -> None:
        for statement in statements:
            cursor = Cursor(statement)
            match cursor.keyword(TOP_LEVEL):
                case "global":
                    self._global(cursor)
                case "common":
                    self._common(cursor)
                case "resource":
                    self._resource(cursor)
                case "include":
                    self._include(cursor, depth)
                case "skip":
                    _skip(cursor)
                case text if text.startswith(_MODULE_VERSION):
                    cursor.name("version")  # there is no kernel module whose version could matter
                    cursor.end()
                case _:
                    cursor.at -= 1
                    raise cursor.error(TOP_LEVEL)

    def _include(self, cursor: Cursor, depth: int) -> None:
        pattern = cursor.name("file name or pattern")
        cursor.end()
        place = cursor.place
        if depth >= INCLUDE_DEPTH_MAX:
            raise place.error(f"includes nested more than {INCLUDE_DEPTH_MAX} levels deep are not supported")
        path = os.path.join("" if place.file == STDIN else os.path.dirname(place.file), pattern)
        if not glob.has_magic(pattern):
            self.read_file(path, place, depth + 1)
            return
        for found in sorted(glob.glob(path)):
            self.read_file(found, place, depth + 1)

    # --------------------------------------------------------------------------------- global, common

    def _global(self, cursor: Cursor) -> None:
        self.claim("global section", "global", cursor.place)
        self.globals.place = cursor.place
        if self.resources:
            self.warn(cursor.place, "global", "You should put the global {} section in front of any resource "
                                              "{} section")  # fmt: skip
        for statement in cursor.section():
            inner = Cursor(statement)
            name = inner.keyword(" | ".join(GLOBAL))
            spec = GLOBAL.get(name)
            if spec is None:
                inner.at -= 1
                raise inner.error(" | ".join(GLOBAL))
            self.claim("global option", name, inner.place)
            if spec.kind is Kind.FLAG:
                self.globals.options.append(Option(name, None, inner.place))
            else:
                self._append(self.globals, spec, inner.name(_kind_of(spec)), inner.place)
            inner.end()

    def _common(self, cursor: Cursor) -> None:
        self.claim("resource section", "common", cursor.place)
        self.common = Resource("common", cursor.place)
        self._resource_body(self.common, cursor.section())
        if self.common.hosts or self.common.connections:
            inside = (self.common.hosts or self.common.connections)[0]
            raise inside.place.error("in the common section, there are no host sections allowed.")
        if self.common.volumes:
            volume = next(iter(self.common.volumes.values()))
            raise volume.place.error("in the common section, there are no volumes allowed.")

    # ------------------------------------------------------------------------------------- resources

    def _resource(self, cursor: Cursor) -> None:
        name = cursor.name("resource name")
        place = cursor.place
        if not name or "/" in name or name in (".", "..", "all") or not name.isprintable():
            why = "it selects all resources" if name == "all" else "it names files and stands in RES/VOLUME"
            raise place.error(f"resource '{shown(name)}': another name expected, because {why}")
        block = cursor.section()
        self.claim("resource section", name, place)
        resource = self.resources[name] = Resource(name, place)
        self._resource_body(resource, block)

    def _resource_body(self, res: Resource, block: tuple[Statement, ...]) -> None:
        for statement in block:
            cursor = Cursor(statement)
            keyword = cursor.keyword(_IN_RESOURCE)
            if keyword in _VOLUME_KEYWORDS and not (keyword == "disk" and statement.block is not None):
                res.implicit = True
                self._volume_statement(keyword, cursor, _volume(res.volumes, 0, cursor.place), res.name)
                continue
            handler = self._resource_keywords(res).get(keyword)
            if handler is None:
                cursor.at -= 1
                raise cursor.error(_IN_RESOURCE)
            handler(cursor)

    def _resource_keywords(self, res: Resource) -> dict[str, Handler]:
        return {
            "protocol": lambda c: self._option(res.net, SECTIONS["net"], "protocol", c),
            "net": lambda c: self._section(res.net, "net", res.name, c),
            "disk": lambda c: self._section(res.disk, "disk", res.name, c),
            "options": lambda c: self._section(res.options, "options", res.name, c),
            "startup": lambda c: self._section(res.startup, "startup", res.name, c),
            "handlers": lambda c: self._section(res.handlers, "handlers", res.name, c),
            "syncer": lambda c: self._syncer(res, c),
            "volume": lambda c: self._volume_section(res, res.name, c),
            "on": lambda c: self._host(res, "on", c),
            "floating": lambda c: self._host(res, "floating", c),
            "stacked-on-top-of": lambda c: self._host(res, "stacked", c),
            "_this_host": lambda c: self._host(res, "show", c),
            "_remote_host": lambda c: self._host(res, "show", c),
            "connection": lambda c: self._connection(res, c),
            "connection-mesh": lambda c: self._mesh(res, c),
            "proxy": lambda c: self._proxy(res, c),
            "ignore-on": self._ignore_on,
            "template-file": self._template_file,
            "skip": _skip,
        }

    def _ignore_on(self, cursor: Cursor) -> None:
        cursor.name("host name")
        cursor.end()
        self.warn(cursor.place, "ignore-on", "The 'ignore-on' keyword is deprecated.")

    def _template_file(self, cursor: Cursor) -> None:
        cursor.name("file name")
        cursor.end()
        self._not_implemented(cursor, "template-file")

    def _not_implemented(self, cursor: Cursor, what: str) -> None:
        self.warn(cursor.place, what, f"'{what}' is not implemented and has no effect")

    def _proxy(self, res: Resource, cursor: Cursor) -> None:
        cursor.section()
        self.claim("proxy section", f"{res.name}:proxy", cursor.place)
        res.proxy = cursor.statement.opaque()
        self._not_implemented(cursor, "proxy")

    # --------------------------------------------------------------------------------------- volumes

    def _volume_section(self, owner: Resource | Host, scope: str, cursor: Cursor) -> None:
        number = cursor.number(words.VOLUME, "volume number")
        block = cursor.section()
        self.claim("volume section", f"{scope}: volume {number}", cursor.place)
        owner.explicit = True
        volume = _volume(owner.volumes, number, cursor.place)
        for statement in block:
            inner = Cursor(statement)
            self._volume_statement(inner.keyword(_IN_VOLUME), inner, volume, f"{scope}:{number}")

    def _volume_statement(self, keyword: str, cursor: Cursor, volume: Volume, scope: str) -> None:
        def once(kind: str) -> None:
            self.claim(f"{kind} statement", f"{scope}:{kind}", cursor.place)

        match keyword:
            case "device":
                once("device")
                volume.device = words.device(cursor)
                if volume.device.name.startswith("/dev/drbd_"):
                    self.warn(cursor.place, "drbd_", f"arbitrary device name {volume.device.name}: "
                                                     "only its minor number has a meaning here")  # fmt: skip
            case "disk" if cursor.statement.block is not None:
                self._section(volume.options, "disk", scope, cursor)
                return
            case "disk":
                once("disk")
                volume.disk = words.disk(cursor)
            case "meta-disk" | "flexible-meta-disk":
                once("meta-disk")
                volume.meta_disk = words.meta_disk(cursor, flexible=keyword == "flexible-meta-disk")
            case "tiebreaker":
                cursor.name("yes | no")
                self._not_implemented(cursor, "tiebreaker")
            case _:
                cursor.at -= 1
                raise cursor.error(_IN_VOLUME)
        cursor.end()

    # ----------------------------------------------------------------------------------------- hosts

    def _host(self, res: Resource, kind: str, cursor: Cursor) -> None:
        place = cursor.place
        address = None
        if kind == "floating":
            address = words.address(cursor)
            self._family(address)
            names: tuple[str, ...] = (address.key,)
        elif kind == "show":
            self.warn(place, "_this_host", "what 'drbdsetup show' prints names no hosts: section ignored")
            names = (cursor.statement.words[0].text,)
        else:
            names = cursor.names("host name" if kind == "on" else "resource name")
        host = Host(names, place, "on" if kind == "show" else kind, address=address)
        for name in names:
            self.claim("host section", f"{res.name}: {kind} {name}", place)
        if kind == "stacked":
            self.warn(place, f"stacked {res.name}", "'stacked-on-top-of' is not implemented: "
                                                    f"resource {res.name} is ignored")  # fmt: skip
        res.hosts.append(host)
        if kind == "floating" and cursor.statement.block is None:
            cursor.end("{ | ;")
            return
        scope = f"{res.name}:{names[0]}"
        for statement in cursor.section():
            self._host_statement(host, scope, Cursor(statement))

    def _host_statement(self, host: Host, scope: str, cursor: Cursor) -> None:
        keyword = cursor.keyword(_IN_HOST)
        if keyword in _VOLUME_KEYWORDS:
            host.implicit = True
            self._volume_statement(keyword, cursor, _volume(host.volumes, 0, cursor.place), scope)
            return
        match keyword:
            case "volume":
                self._volume_section(host, scope, cursor)
            case "address" if host.kind != "floating":
                self.claim("address statement", f"{scope}:address", cursor.place)
                host.address = words.address(cursor)
                cursor.end()
                self._family(host.address)
            case "alternate-link-address":
                words.address(cursor)
                cursor.end()
                self._not_implemented(cursor, "alternate-link-address")
            case "node-id":
                self.claim("node-id statement", f"{scope}:node-id", cursor.place)
                host.node_id = cursor.number(words.NODE_ID, "node id")
                cursor.end()
            case "options":
                self._section(host.options, "options", scope, cursor)
            case "proxy":
                self._host_proxy(host, cursor)
            case _:
                cursor.at -= 1
                raise cursor.error(_IN_HOST)

    def _host_proxy(self, host: Host, cursor: Cursor) -> None:
        if not cursor.skip_keyword("on"):
            raise cursor.error("on")
        cursor.names("host name")
        cursor.section()
        host.proxy.append(cursor.statement.opaque())
        self._not_implemented(cursor, "proxy")

    def _family(self, address: Address) -> None:
        family = address.family
        if family in ("ssocks", "sdp"):
            self.warn(address.place, family, f"'{family}' is not implemented: TCP over IPv4 is used")

    # ----------------------------------------------------------------------------------- connections

    def _connection(self, res: Resource, cursor: Cursor) -> None:
        connection = Connection(cursor.place)
        if cursor.peek() is not None:
            connection.name = cursor.name("connection name | {")
        expected = "host | net | disk | volume | path | skip"
        scope = f"{res.name}:connection of line {cursor.place.line}"
        paths = 0
        for statement in cursor.section():
            inner = Cursor(statement)
            match inner.keyword(expected):
                case "host":
                    connection.hosts.append(self._connection_host(inner))
                case "net":
                    self._section(connection.net, "net", scope, inner)
                case "disk":
                    self._section(connection.disk, "disk", scope, inner)
                case "volume":
                    self._connection_volume(connection, scope, inner)
                case "path":
                    paths += 1
                    self._path(connection, inner, first=paths == 1)
                case "skip":
                    _skip(inner)
                case _:
                    inner.at -= 1
                    raise inner.error(expected)
        if len(connection.hosts) != 2:
            raise cursor.place.error(f"in resource {res.name}: exactly two 'host' statements expected in a "
                                     f"connection, but got {len(connection.hosts)}")  # fmt: skip
        res.connections.append(connection)

    def _connection_host(self, cursor: Cursor) -> tuple[str, Address | None]:
        name = cursor.name("host name")
        address = None
        if cursor.skip_keyword("address"):
            address = words.address(cursor)
        elif cursor.skip_keyword("port"):
            raise cursor.place.error(f"host {name}: 'port' is not supported, 'address ADDRESS:PORT' expected")
        if cursor.skip_keyword("via"):
            cursor.keyword("proxy")
            cursor.section() if cursor.peek() is None else cursor.names("host name")
            self._not_implemented(cursor, "proxy")
            return name, address
        cursor.end("address | ;" if address is None else ";")
        return name, address

    def _connection_volume(self, connection: Connection, scope: str, cursor: Cursor) -> None:
        number = cursor.number(words.VOLUME, "volume number")
        section = connection.volumes.setdefault(number, Section())
        for statement in cursor.section():
            inner = Cursor(statement)
            if not inner.skip_keyword("disk"):
                raise inner.error("disk")
            self._section(section, "disk", f"{scope}:{number}", inner)

    def _path(self, connection: Connection, cursor: Cursor, *, first: bool) -> None:
        """The addresses of a path stand for those of the host sections."""
        hosts = []
        for statement in cursor.section():
            inner = Cursor(statement)
            if not inner.skip_keyword("host"):
                raise inner.error("host")
            hosts.append(self._connection_host(inner))
        if len(hosts) != 2:
            raise cursor.place.error(f"two hosts expected in a path, but got {len(hosts)}")
        if not first:
            self.warn(cursor.place, "path", "several paths are not implemented: the first one is used")
        elif {name for name, _ in connection.hosts} <= {name for name, _ in hosts}:
            connection.hosts[:] = hosts
        else:
            raise cursor.place.error("the hosts of the connection expected in its path")

    def _mesh(self, res: Resource, cursor: Cursor) -> None:
        mesh = Connection(cursor.place, mesh=True)
        for statement in cursor.section():
            inner = Cursor(statement)
            match inner.keyword("hosts | net"):
                case "hosts":
                    mesh.hosts.extend((name, None) for name in inner.names("host name"))
                    inner.end()
                case "net":
                    self._section(mesh.net, "net", f"{res.name}:connection-mesh", inner)
                case _:
                    inner.at -= 1
                    raise inner.error("hosts | net")
        res.connections.append(mesh)

    # --------------------------------------------------------------------------------------- options

    def _section(self, section: Section, keyword: str, scope: str, cursor: Cursor) -> None:
        block = cursor.section()
        self.claim(f"{keyword} section", f"{scope}:{keyword}", cursor.place)
        section.place = cursor.place
        table = SECTIONS[keyword]
        for statement in block:
            inner = Cursor(statement)
            self._option(section, table, inner.keyword("an option keyword"), inner)

    def _option(self, section: Section, table: dict[str, OptionSpec], written: str, cursor: Cursor) -> None:
        """One option statement whose name has been taken."""
        name = OLD_NAMES.get(written, written)
        spec = table.get(name)
        if spec is None and written.startswith("no-"):
            negated = table.get(written[3:])
            if negated is not None and negated.kind is Kind.BOOL:
                self._append(section, negated, "no", cursor.place)
                cursor.end()
                return
        if spec is None:
            cursor.at -= 1
            raise cursor.error("an option keyword")
        if spec.kind is Kind.FLAG:
            section.options.append(Option(name, None, cursor.place))
        elif spec.kind is Kind.NAMES:
            section.options.append(Option(name, " ".join(cursor.names("host name | both")), cursor.place))
        elif spec.kind is Kind.BOOL and cursor.peek() is None:
            self._append(section, spec, "yes", cursor.place)
        else:
            self._append(section, spec, cursor.name(_kind_of(spec)), cursor.place)
        cursor.end()

    def _append(self, section: Section, spec: OptionSpec, text: str, place: Place) -> None:
        if spec.name == "protocol":
            text = text.upper()
            if text not in spec.values:
                raise place.error(f"unknown protocol '{shown(text)}', should be one of A,B,C")
        try:
            value = convert(spec, text)
        except ValueProblem as problem:
            raise place.error(str(problem)) from None
        unsupported = (spec.name, text) in UNSUPPORTED_VALUES
        if unsupported or (spec.support is Support.NOT_IMPLEMENTED and value != spec.default):
            self.warn(place, spec.name, f"'{spec.name} {text}' is not implemented and has no effect")
        section.options.append(Option(spec.name, text, place))

    def _syncer(self, res: Resource, cursor: Cursor) -> None:
        """The old section: each option goes where it lives today."""
        self.claim("syncer section", f"{res.name}:syncer", cursor.place)
        for statement in cursor.section():
            inner = Cursor(statement)
            written = inner.keyword("a syncer option keyword")
            name = OLD_NAMES.get(written, written)
            if name in SYNCER_IGNORED:
                inner.name("a value")
                inner.end()
                continue
            for keyword, section in (("disk", res.disk), ("net", res.net), ("options", res.options)):
                if name in SECTIONS[keyword]:
                    self._option(section, SECTIONS[keyword], written, inner)
                    break
            else:
                inner.at -= 1
                raise inner.error("a syncer option keyword")


def _kind_of(spec: OptionSpec) -> str:
    """What a message says is expected as the value of an option."""
    if spec.kind is Kind.ENUM:
        return " | ".join(spec.values)
    return {Kind.NUMBER: "a number", Kind.BOOL: "yes | no | ;"}.get(spec.kind, "a string")


def _volume(volumes: dict[int, Volume], number: int, place: Place) -> Volume:
    return volumes.setdefault(number, Volume(number, place))


def _skip(cursor: Cursor) -> None:
    while cursor.peek() is not None:
        cursor.at += 1
    cursor.section()


def shown_path(path: str) -> str:
    """A file name for a message."""
    return "".join(c if c.isprintable() else shown(c) for c in path)


