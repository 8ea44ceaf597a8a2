"""What one node runs: the parsed configuration reduced to `repl.config` values.

Two hosts replicate. Where a DRBD 9 configuration names more, those without a disk are left out, and what
then still is not a pair is refused.
"""

from __future__ import annotations

import os
import socket
from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from tandem.repl.config import (
    DiskOptions,
    Endpoint,
    Fencing,
    MetaDisk,
    NetOptions,
    ResourceConfig,
    ResourceOptions,
    StartupOptions,
    VolumeConfig,
)
from tandem.repl.errors import Refusal

from .conf_inherit import (
    Link,
    effective,
    host_volumes,
    inherit,
    is_implicit,
    links,
    section_of,
    volume_options,
)
from .conf_model import Address, Host, Option, Place, Resource, Volume
from .conf_options import (
    AFTER_SB,
    FENCING,
    NOMINATION,
    SECTIONS,
    UNSUPPORTED_VALUES,
    Kind,
    OptionSpec,
    convert,
)

if TYPE_CHECKING:
    from .conf import Configuration

_Options = TypeVar("_Options", DiskOptions, NetOptions, ResourceOptions, StartupOptions)


def absolute(path: str, place: Place) -> str:
    """*path*; a relative one starts from the directory of the file it is written in."""
    return os.path.normpath(os.path.join(place.directory, path)) if path else ""


def is_local(address: Address | Endpoint) -> bool:
    """Whether *address* is configured on this host: whether a socket can be bound to it."""
    family = socket.AF_INET6 if address.family == "ipv6" else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            target = socket.getaddrinfo(address.host, 0, family, socket.SOCK_DGRAM, 0, socket.AI_NUMERICHOST)
            probe.bind(target[0][4])
    except OSError:
        return False
    return True


def my_host(resource: Resource, node: str) -> Host | None:
    """The section for *node*: by name, or a floating one whose address is configured on this host."""
    named = resource.host(node)
    if named is not None or resource.stacked:
        return None if resource.stacked else named
    local = [h for h in resource.hosts if h.kind == "floating" and h.address and is_local(h.address)]
    if len(local) > 1:
        raise local[1].place.error(f"in resource {resource.name}: There are multiple host sections for this "
                                   f"node; one address of this host, or --node {local[0].name} or "
                                   f"--node {local[1].name} expected")  # fmt: skip
    return local[0] if local else None


def for_node(configuration: Configuration, node: str) -> dict[str, ResourceConfig]:
    """The resources that *node* takes part in, in file order; ConfigError when one is no pair for it."""
    found: dict[str, ResourceConfig] = {}
    users: dict[Endpoint, str] = {}
    for name, resource in configuration.resources.items():
        me = my_host(resource, node)
        if me is None:
            continue
        config = _resource(configuration, resource, me, node if node in me.names else me.name)
        first = users.setdefault(config.address, name)
        if first != name:
            raise resource.place.error(f"conflicting use of IP '{config.address}' in resource {name} ... "
                                       f"first used in resource {first}.")  # fmt: skip
        found[name] = config
    return found


def _resource(configuration: Configuration, resource: Resource, me: Host, node: str) -> ResourceConfig:
    link = link_of(resource, me)
    mine = link.hosts.index(me)
    peer, address, peer_address = link.hosts[1 - mine], link.addresses[mine], link.addresses[1 - mine]
    assert address is not None and peer_address is not None  # conf_check has seen to it
    if ("ipv6" in (address.family, peer_address.family)) and address.family != peer_address.family:
        raise peer_address.place.error(f"in resource {resource.name}: addresses of one family expected, but "
                                       f"got {address} and {peer_address}")  # fmt: skip
    node_id, peer_node_id = _node_ids(me, peer, address, peer_address)
    options = inherit(list(me.options.options), section_of(configuration, resource, "options"))
    handlers = effective(section_of(configuration, resource, "handlers"))
    return ResourceConfig(
        name=resource.name,
        node=node,
        peer=peer.name,
        address=_endpoint(address),
        peer_address=_endpoint(peer_address),
        volumes=_volumes(configuration, resource, link, me, peer),
        net=_net(configuration, resource, link, me),
        options=_filled(ResourceOptions, "options", options),
        startup=_startup(configuration, resource, me, peer),
        handlers={name: option.value or "" for name, option in handlers.items()},
        file=configuration.file,
        line=resource.place.line,
        implicit_volume=is_implicit(resource, me),
        node_id=node_id,
        peer_node_id=peer_node_id,
        peer_names=peer.names,
    )


def link_of(resource: Resource, me: Host) -> Link:
    """The one link of *me*; ConfigError when it has none or several."""
    where = f"in resource {resource.name}"
    mine = [link for link in links(resource) if me in link.hosts]
    hosts = [host for host in resource.hosts if host.kind != "stacked"]
    if len(hosts) < 2:
        raise resource.place.error(f"{where}: a host section ('on PEER {{ ... }}') is missing: only "
                                   f"'{me.title}' is there")  # fmt: skip
    if not mine and len(hosts) > 2 and not resource.connections:
        names = ", ".join(host.name for host in hosts)
        raise resource.place.error(f"{where}: two host sections expected, but got {len(hosts)} ({names}); "
                                   "more need 'connection' sections")  # fmt: skip
    if not mine:
        raise resource.place.error(f"{where}: a connection with host {me.name} expected")
    if len(mine) > 1:
        mine = [link for link in mine if not is_diskless(resource, _other(link, me))]
    if len(mine) != 1:
        names = ", ".join(_other(link, me).name for link in mine) or "all diskless"
        raise resource.place.error(f"{where}: one peer with a disk expected for host {me.name}, but got "
                                   f"{len(mine)} ({names})")  # fmt: skip
    return mine[0]


def _other(link: Link, me: Host) -> Host:
    return link.hosts[1] if link.hosts[0] is me else link.hosts[0]


def is_diskless(resource: Resource, host: Host) -> bool:
    """Whether *host* has ``disk none`` everywhere."""
    return all(v.disk is not None and not v.disk.path for v in host_volumes(resource, host).values())


def _node_ids(me: Host, peer: Host, address: Address, peer_address: Address) -> tuple[int, int]:
    """The configured ids; else the host with the greater address gets 0, so that both nodes agree."""
    if me.node_id is not None and peer.node_id is not None:
        return me.node_id, peer.node_id
    if me.node_id is not None:
        return me.node_id, int(me.node_id == 0)
    if peer.node_id is not None:
        return int(peer.node_id == 0), peer.node_id
    greater = (address.host, address.port) > (peer_address.host, peer_address.port)
    return (0, 1) if greater else (1, 0)


def _endpoint(address: Address) -> Endpoint:
    return Endpoint("ipv6" if address.family == "ipv6" else "ipv4", address.host, address.port)


def _volumes(
    configuration: Configuration, resource: Resource, link: Link, me: Host, peer: Host
) -> tuple[VolumeConfig, ...]:
    theirs = host_volumes(resource, peer)
    net = effective(net_options(configuration, resource, link))
    volumes = []
    for number, volume in host_volumes(resource, me).items():
        disk = disk_options(configuration, resource, link, volume)
        known = [o for o in disk if o.name != "resync-after" or _is_known(configuration, o)]
        if "fencing" in net:
            known = inherit(known, [net["fencing"]])
        other = theirs[number].disk if number in theirs else None
        peer_disk = absolute(other.path, other.place) if other else ""
        volumes.append(_volume(configuration, resource, volume, known, peer_disk))
    return tuple(volumes)


def disk_options(
    configuration: Configuration, resource: Resource, link: Link, volume: Volume
) -> list[Option]:
    """A volume's disk options; behind them, where they win, what DRBD 9's connection says about resync."""
    options = volume_options(configuration, resource, volume)
    if link.connection is not None:
        options = [*options, *link.connection.disk.options]
        if volume.number in link.connection.volumes:
            options += link.connection.volumes[volume.number].options
    return options


def _volume(
    configuration: Configuration,
    resource: Resource,
    volume: Volume,
    options: list[Option],
    peer_disk: str,
) -> VolumeConfig:
    assert volume.device is not None and volume.disk is not None  # conf_check has seen to it
    minor = configuration.minor(resource.name, volume)
    meta_disk, meta = MetaDisk(), volume.meta_disk
    if meta is not None:
        meta_disk = MetaDisk(meta.kind, absolute(meta.path, meta.place), meta.index)
    return VolumeConfig(
        number=volume.number,
        minor=minor,
        device=volume.device.name or f"/dev/drbd{minor}",
        disk=absolute(volume.disk.path, volume.disk.place),
        meta_disk=meta_disk,
        disk_options=_filled(DiskOptions, "disk", options),
        peer_disk=peer_disk,
    )


def _is_known(configuration: Configuration, option: Option) -> bool:
    return (option.value or "").partition("/")[0] in configuration.resources


def net_options(configuration: Configuration, resource: Resource, link: Link) -> list[Option]:
    """The resource's net options with those of its connection sections behind them, where they win."""
    options = section_of(configuration, resource, "net")
    for section in link.net:
        options = [*options, *section.options]
    return options


def _net(configuration: Configuration, resource: Resource, link: Link, me: Host) -> NetOptions:
    options = net_options(configuration, resource, link)
    return _filled(NetOptions, "net", [nominated(option, me) for option in options])


def nominated(option: Option, me: Host) -> Option:
    """``discard-node-NAME`` as this node sees it."""
    if option.name != "after-sb-0pri" or not (option.value or "").startswith(NOMINATION):
        return option
    local = (option.value or "").removeprefix(NOMINATION) in me.names
    return Option(option.name, "discard-local" if local else "discard-remote", option.place)


def _startup(configuration: Configuration, resource: Resource, me: Host, peer: Host) -> StartupOptions:
    options = []
    for option in section_of(configuration, resource, "startup"):
        if option.name == "become-primary-on" and option.value == "both":
            option = Option(option.name, f"{me.name} {peer.name}", option.place)
        options.append(option)
    return _filled(StartupOptions, "startup", options)


def _filled(kind: type[_Options], keyword: str, options: list[Option]) -> _Options:
    """A value of *kind* with the fields that *options* name; the others keep their defaults."""
    known = {field.name for field in fields(kind)}
    values: dict[str, object] = {}
    for name, option in effective(options).items():
        spec = SECTIONS[keyword][name]
        if spec.field in known and (name, option.value) not in UNSUPPORTED_VALUES:
            values[spec.field] = _value(spec, option)
    return kind(**values)  # type: ignore[arg-type]  # the tables and the fields are compared by a test


def _value(spec: OptionSpec, option: Option) -> object:
    text = option.value or ""
    if spec.kind is Kind.NAMES:
        return tuple(text.split(" "))
    if spec.name == "fencing":
        return FENCING[text]
    if spec.name.startswith("after-sb-"):
        return AFTER_SB[text]
    return convert(spec, text)


def check(config: ResourceConfig) -> Refusal | None:
    """Options that exclude each other, as the kernel driver refuses them when they are applied.

    Source: DRBD 8.4's configuration failures 154, 155 and 139, and their sentences.
    """
    net = config.net
    stonith = any(v.disk_options.fencing is Fencing.RESOURCE_AND_STONITH for v in config.volumes)
    if net.protocol == "A" and stonith:
        return Refusal(154, "Fencing policy resource-and-stonith only with prot B or C allowed.",
                       "write 'protocol C;', or another fencing policy")  # fmt: skip
    if net.on_congestion == "pull-ahead" and net.protocol != "A":
        return Refusal(155, "on-congestion policy pull-ahead only with prot A allowed.",
                       "write 'protocol A;', or 'on-congestion block;'")  # fmt: skip
    if net.allow_two_primaries and net.protocol != "C":
        return Refusal(139, "Protocol C required",
                       "write 'protocol C;', or remove 'allow-two-primaries'")  # fmt: skip
    return None
