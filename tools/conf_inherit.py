"""Who inherits what: the one place that knows which statement is more specific than another.

Host section over resource section over ``common``; for disk options a volume's own over those of the
resource. Order is kept as drbdadm 8.4 keeps it: what is inherited goes in front, each option before the
ones inherited earlier, so that printed configurations and commands compare equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .conf_model import Address, Connection, Host, Option, Resource, Section, Volume

if TYPE_CHECKING:
    from .conf import Configuration


def inherit(own: list[Option], parent: Iterable[Option]) -> list[Option]:
    """*own* with what it lacks of *parent* in front. Of options given twice the last one is inherited."""
    last = {option.name: option for option in parent}
    known = {option.name for option in own}
    return [option for name, option in reversed(last.items()) if name not in known] + own


def effective(options: Iterable[Option]) -> dict[str, Option]:
    """The last option of each name."""
    return {option.name: option for option in options}


def section_of(configuration: Configuration, resource: Resource, keyword: str) -> list[Option]:
    """A resource's section (net, disk, options, startup, handlers) with what it inherits from common."""
    section: Section = getattr(resource, keyword)
    if configuration.common is None:
        return list(section.options)
    parent: Section = getattr(configuration.common, keyword)
    return inherit(list(section.options), parent.options)


def host_volumes(resource: Resource, host: Host) -> dict[int, Volume]:
    """The volumes of *host* by number: its own statements, and those of the resource where it has none.

    The options of the values are the volume's own (host level over resource level), without the
    resource's disk section.
    """
    volumes = {}
    for number in sorted(resource.volumes.keys() | host.volumes.keys()):
        general, own = resource.volumes.get(number), host.volumes.get(number)
        if general is None or own is None:
            found = own or general
            assert found is not None
            volumes[number] = found
            continue
        options = inherit(list(own.options.options), general.options.options)
        volumes[number] = Volume(
            number, own.place, own.device or general.device, own.disk or general.disk,
            own.meta_disk or general.meta_disk, Section(own.options.place or general.options.place, options),
        )  # fmt: skip
    return volumes


def is_implicit(resource: Resource, host: Host) -> bool:
    """Whether *host* has the one volume that needs no ``volume 0 { }``."""
    return host.implicit or (resource.implicit and not host.explicit)


def volume_options(configuration: Configuration, resource: Resource, volume: Volume) -> list[Option]:
    """The disk options of a volume of `host_volumes`, everything inherited."""
    return inherit(list(volume.options.options), section_of(configuration, resource, "disk"))


@dataclass(frozen=True, slots=True)
class Link:
    """Two hosts of a resource that replicate, with the addresses they use for it."""

    hosts: tuple[Host, Host]
    addresses: tuple[Address | None, Address | None]
    connection: Connection | None = None  # the first of those that name this pair
    net: tuple[Section, ...] = ()  # of all sections that name this pair


def links(resource: Resource) -> list[Link]:
    """The pairs of hosts that are connected: implied by two host sections, or DRBD 9's sections."""
    hosts = [host for host in resource.hosts if host.kind != "stacked"]
    if not resource.connections:
        if len(hosts) != 2:
            return []
        first, second = hosts
        return [Link((first, second), (first.address, second.address))]
    found: dict[frozenset[str], Link] = {}
    for connection in resource.connections:
        ends = [(_named(resource, connection, name), address) for name, address in connection.hosts]
        for i, (one, one_address) in enumerate(ends):
            for other, other_address in ends[i + 1 :]:
                key = frozenset((one.name, other.name))
                seen = found.get(key)
                if seen is None:
                    addresses = (one_address or one.address, other_address or other.address)
                    found[key] = Link((one, other), addresses, connection, (connection.net,))
                else:
                    found[key] = replace(seen, net=(*seen.net, connection.net))
    return list(found.values())


def _named(resource: Resource, connection: Connection, name: str) -> Host:
    host = resource.host(name)
    if host is None:
        raise connection.place.error(
            f"in resource {resource.name}: the name of an 'on' section expected, but got host '{name}'"
        )
    return host
