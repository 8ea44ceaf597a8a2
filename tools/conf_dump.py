"""Printing a configuration as drbdadm 8.4 prints it: `dump`, `dump-xml`, and the commands of a dry run.

The layout is what scripts grep for: option lines like printf's ``%-16s %3s;``, four blanks per level, hosts
first. Statements at resource level are shown in each host section, as DRBD 8.4 does.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final
from xml.sax.saxutils import escape, quoteattr

from .conf_inherit import host_volumes, inherit, is_implicit, section_of, volume_options
from .conf_model import STDIN, Address, Connection, Host, Opaque, Option, Place, Resource, Volume
from .conf_options import GLOBAL
from .conf_resolve import disk_options, for_node, link_of, my_host, net_options, nominated

if TYPE_CHECKING:
    from .conf import Configuration

_WORD: Final = re.compile(r"[A-Za-z0-9/._-]{1,80}\Z")
_SHELL_SAFE: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./:=+@%")
_SECTION_ORDER: Final = ("options", "net", "disk", "startup", "handlers")  # proxy stands before handlers


def quoted(text: str) -> str:
    """*text* as a token of drbd.conf: in double quotes unless it is a plain word."""
    if _WORD.match(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def shell_quoted(text: str) -> str:
    """*text* as a shell word, a backslash before each special character (as drbdadm prints it)."""
    return "".join(c if c in _SHELL_SAFE else f"\\{c}" for c in text) or '""'


class _Lines:
    """Lines of output and how deep we are; a level is four blanks."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.level = 0

    def add(self, text: str = "") -> None:
        self.lines.append("    " * self.level + text if text else "")

    def open(self, text: str) -> None:
        self.add(text)
        self.level += 1

    def close(self, text: str = "}") -> None:
        self.level -= 1
        self.add(text)

    def pair(self, name: str, value: str) -> None:
        """A statement whose values begin in one column whatever the level."""
        self.add(f"{name:<{max(24 - 4 * self.level, 0)}} {value:>3};")

    def text(self) -> str:
        return "".join(f"{line}\n" for line in self.lines)


# -------------------------------------------------------------------------------------------- dump


def dump(configuration: Configuration, node: str, names: list[str] | None, *, merged: bool) -> str:
    """See `conf.dump`; KeyError for a name that is no resource."""
    out = _Lines()
    if names is None:
        out.add(f"# {configuration.file}")
        _dump_global(out, configuration)
        if configuration.common is not None:
            out.open("common {")
            _dump_sections(out, _own_sections(configuration.common), configuration.common.proxy)
            out.close()
            out.add()
    for resource in _chosen(configuration, names):
        _dump_resource(out, configuration, node, resource, merged)
    return out.text()


def _chosen(configuration: Configuration, names: list[str] | None) -> Iterable[Resource]:
    resources = configuration.resources
    return resources.values() if names is None else [resources[name] for name in names]


def _own_sections(resource: Resource) -> dict[str, list[Option]]:
    return {keyword: getattr(resource, keyword).options for keyword in _SECTION_ORDER}


def _merged_sections(configuration: Configuration, resource: Resource) -> dict[str, list[Option]]:
    return {keyword: section_of(configuration, resource, keyword) for keyword in _SECTION_ORDER}


def _global_options(configuration: Configuration) -> list[Option]:
    """The global options that differ from their defaults, in drbdadm's order."""
    given = {option.name: option for option in configuration.global_section.options}
    return [
        given[name] for name, spec in GLOBAL.items()
        if name in given and (given[name].value != str(spec.default) or name == "minor-count")
    ]  # fmt: skip


def _dump_global(out: _Lines, configuration: Configuration) -> None:
    options = _global_options(configuration)
    if not options:
        return
    out.open("global {")
    for option in options:
        out.add(f"{option.name};" if option.value is None else f"{option.name} {option.value};")
    out.close()
    out.add()


def where(place: Place) -> str:
    """A place with the absolute name of its file."""
    return str(place) if place.file == STDIN else f"{os.path.abspath(place.file)}:{place.line}"


def _dump_resource(
    out: _Lines, configuration: Configuration, node: str, resource: Resource, merged: bool
) -> None:
    ignored = "ignored" if my_host(resource, node) is None and not resource.stacked else "not ignored"
    stacked = "stacked" if resource.stacked else "not stacked"
    out.add(f"# resource {quoted(resource.name)} on {node}: {ignored}, {stacked}")
    out.add(f"# defined at {where(resource.place)}")
    out.open(f"resource {quoted(resource.name)} {{")
    for host in resource.hosts:
        _dump_host(out, configuration, resource, host, merged)
    for connection in resource.connections:
        _dump_connection(out, connection)
    sections = _merged_sections(configuration, resource) if merged else _own_sections(resource)
    _dump_sections(out, sections, resource.proxy)
    out.close()
    out.add()


def _dump_host(
    out: _Lines, configuration: Configuration, resource: Resource, host: Host, merged: bool
) -> None:
    names = " ".join(quoted(name) for name in host.names)
    out.open(f"on {names} {{" if host.kind == "on" else f"{host.title} {{")
    if host.node_id is not None:
        out.add(f"node-id {host.node_id};")
    _dump_options(out, "options", host.options.options)
    for volume in host_volumes(resource, host).values():
        options = volume_options(configuration, resource, volume) if merged else volume.options.options
        if is_implicit(resource, host):
            _dump_volume(out, volume, options, merged)
        else:
            out.open(f"volume {volume.number} {{")
            _dump_volume(out, volume, options, merged)
            out.close()
    if host.kind != "floating" and host.address is not None:
        out.pair("address", str(host.address))
    for proxy in host.proxy:
        _dump_opaque(out, proxy)
    out.close()


def _dump_volume(out: _Lines, volume: Volume, options: list[Option], merged: bool) -> None:
    _dump_options(out, "disk", options)
    device, disk, meta = volume.device, volume.disk, volume.meta_disk
    if device is not None:
        minor = [f"minor {device.minor}"] if device.minor >= 0 else []
        full_name = device.name or (f"/dev/drbd{device.minor}" if merged else "")
        name = [quoted(full_name)] if full_name else []
        out.pair("device", " ".join(name + minor))
    if disk is not None:
        out.pair("disk", '"none"' if disk.path == "none" else quoted(disk.path) if disk.path else "none")
    if meta is not None and meta.kind == "internal":
        out.pair("meta-disk", "internal")
    elif meta is not None:
        if meta.kind == "indexed":  # in its own column at every level, as drbdadm has it
            out.add(f"{'meta-disk':<16} {quoted(meta.path)} [{meta.index}];")
        else:
            out.pair("meta-disk", quoted(meta.path))


def _dump_connection(out: _Lines, connection: Connection) -> None:
    if connection.mesh:
        out.open("connection-mesh {")
        out.add(f"hosts {' '.join(quoted(name) for name, _ in connection.hosts)};")
    else:
        name = f"{quoted(connection.name)} " if connection.name else ""
        out.open(f"connection {name}{{")
        for host, address in connection.hosts:
            out.add(f"host {quoted(host)}{f' address {address}' if address else ''};")
    _dump_options(out, "net", connection.net.options)
    _dump_options(out, "disk", connection.disk.options)
    for number, section in connection.volumes.items():
        out.open(f"volume {number} {{")
        _dump_options(out, "disk", section.options)
        out.close()
    out.close()


def _dump_sections(out: _Lines, sections: dict[str, list[Option]], proxy: Opaque | None) -> None:
    for keyword in _SECTION_ORDER:
        if keyword == "handlers" and proxy is not None:
            _dump_opaque(out, proxy)
        _dump_options(out, keyword, sections[keyword])


def _dump_options(out: _Lines, keyword: str, options: list[Option]) -> None:
    if not options:
        return
    out.open(f"{keyword} {{")
    for option in sorted(options, key=_is_last):
        if option.value is None:
            out.add(f"{option.name};")
        elif option.name == "become-primary-on":
            out.add(f"{option.name} {option.value};")
        else:
            out.pair(option.name, quoted(option.value))
    out.close()


def _is_last(option: Option) -> int:
    """drbdadm prints these two after all other startup options."""
    return {"stacked-timeouts": 1, "become-primary-on": 2}.get(option.name, 0)


def _dump_opaque(out: _Lines, statement: Opaque) -> None:
    text = " ".join(quoted(word) for word in statement.words).replace(' ":" ', ":")
    if statement.block is None:
        if len(statement.words) == 2:
            out.pair(statement.words[0], quoted(statement.words[1]))
        else:
            out.add(f"{text};")
        return
    out.open(f"{text} {{")
    for inner in statement.block:
        _dump_opaque(out, inner)
    out.close()


# ---------------------------------------------------------------------------------------- dump-xml


def dump_xml(configuration: Configuration, names: list[str] | None) -> str:
    """See `conf.dump_xml`; KeyError for a name that is no resource."""
    out = _Lines()
    out.open(f"<config file={quoteattr(configuration.file)}>")
    if options := _global_options(configuration):
        out.open("<global>")
        for option in options:
            _xml_global(out, option)
        out.close("</global>")
    if configuration.common is not None:
        out.open("<common>")
        _xml_sections(out, _own_sections(configuration.common), configuration.common.proxy)
        out.close("</common>")
    for resource in _chosen(configuration, names):
        place = quoteattr(where(resource.place))
        out.open(f"<resource name={quoteattr(resource.name)} conf-file-line={place}>")
        for host in resource.hosts:
            _xml_host(out, resource, host)
        for connection in resource.connections:
            _xml_connection(out, connection)
        _xml_sections(out, _own_sections(resource), resource.proxy)
        out.close("</resource>")
    out.close("</config>")
    return out.text()


def _xml_global(out: _Lines, option: Option) -> None:
    if option.name in ("minor-count", "dialog-refresh"):
        attribute = option.name.rpartition("-")[2]
        out.add(f"<{option.name} {attribute}={quoteattr(option.value or '')}/>")
    elif option.value is None:
        out.add(f"<{option.name}/>")


def _xml_host(out: _Lines, resource: Resource, host: Host) -> None:
    name = 'floating="1"' if host.kind == "floating" else f"name={quoteattr(' '.join(host.names))}"
    out.open(f"<host {name}>")
    for volume in host_volumes(resource, host).values():
        out.open(f'<volume vnr="{volume.number}">')
        _xml_options(out, "disk", volume.options.options)
        if volume.device is not None:
            minor = f' minor="{volume.device.minor}"' if volume.device.minor >= 0 else ""
            out.add(f"<device{minor}>{escape(volume.device.name)}</device>")
        if volume.disk is not None:
            out.add(f"<disk>{escape(volume.disk.path)}</disk>")
        if volume.meta_disk is not None:
            meta = volume.meta_disk
            index = f' index="{meta.index}"' if meta.kind == "indexed" else ""
            out.add(f"<meta-disk{index}>{escape(meta.path) or 'internal'}</meta-disk>")
        out.close("</volume>")
    if host.address is not None:
        out.add(_xml_address(host.address))
    out.close("</host>")


def _xml_address(address: Address) -> str:
    return f'<address family="{address.family}" port="{address.port}">{escape(address.host)}</address>'


def _xml_connection(out: _Lines, connection: Connection) -> None:
    out.open("<connection>")
    for name, address in connection.hosts:
        out.add(f"<host name={quoteattr(name)}>{_xml_address(address) if address else ''}</host>")
    _xml_options(out, "net", connection.net.options)
    _xml_options(out, "disk", connection.disk.options)
    out.close("</connection>")


def _xml_sections(out: _Lines, sections: dict[str, list[Option]], proxy: Opaque | None) -> None:
    for keyword in _SECTION_ORDER:
        if keyword == "handlers" and proxy is not None:
            _xml_opaque(out, proxy)
        _xml_options(out, keyword, sections[keyword])


def _xml_options(out: _Lines, keyword: str, options: list[Option]) -> None:
    if not options:
        return
    out.open(f'<section name="{keyword}">')
    for option in sorted(options, key=_is_last):
        value = "" if option.value is None else f" value={_xml_quoted(option.value)}"
        out.add(f'<option name="{option.name}"{value}/>')
    out.close("</section>")


def _xml_opaque(out: _Lines, statement: Opaque) -> None:
    if statement.block is None:
        name, *values = statement.words
        value = f" value={_xml_quoted(values[0])}" if len(values) == 1 else ""
        out.add(f"<option name={_xml_quoted(name if value else ' '.join(statement.words))}{value}/>")
        return
    out.open(f"<section name={_xml_quoted(' '.join(statement.words))}>")
    for inner in statement.block:
        _xml_opaque(out, inner)
    out.close("</section>")


def _xml_quoted(text: str) -> str:
    """An attribute value, always in double quotes (what greps for it expects them)."""
    return '"' + escape(text, {'"': "&quot;", "'": "&apos;"}) + '"'


# ----------------------------------------------------------------------------------------- dry run


def up_commands(configuration: Configuration, node: str, name: str) -> list[str]:
    """See `conf.up_commands`; KeyError when the resource is not for this node."""
    config = for_node(configuration, node)[name]
    resource = configuration.resources[name]
    me = my_host(resource, node)
    assert me is not None
    link = link_of(resource, me)
    options = inherit(list(me.options.options), section_of(configuration, resource, "options"))
    commands = [_command("drbdsetup-84 new-resource", name, *_long(options))]
    for volume in config.volumes:
        commands.append(_command("drbdsetup-84 new-minor", name, str(volume.minor), str(volume.number)))
    written = host_volumes(resource, me)
    for volume in config.volumes:
        if not volume.disk:
            continue
        meta = volume.meta_disk
        path = meta.path or volume.disk
        index = str(meta.index) if meta.kind == "indexed" else meta.kind
        tool_index = "flex-external" if meta.kind == "flexible" else index
        commands.append(_command("drbdmeta", str(volume.minor), "v08", path, tool_index, "apply-al"))
        disk = disk_options(configuration, resource, link, written[volume.number])
        commands.append(
            _command("drbdsetup-84 attach", str(volume.minor), volume.disk, path, index, *_long(disk))
        )
    net = [nominated(option, me) for option in net_options(configuration, resource, link)]
    mine = link.hosts.index(me)
    ends = [f"{a.family}:{a.key}" for a in (link.addresses[mine], link.addresses[1 - mine]) if a]
    commands.append(_command("drbdsetup-84 connect", name, *ends, *_long(net)))
    return commands


def _command(program: str, *words: str) -> str:
    return " ".join([program, *(shell_quoted(word) for word in words)])


def _long(options: list[Option]) -> list[str]:
    return [f"--{option.name}={option.value}" for option in options]
