"""What does not fit together in a configuration that is right statement by statement.

Everything is checked for all hosts, not only for this one: the same file is meant for all nodes, and a
mistake about the peer shows up as a connection that never comes. The first mistake found is raised.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .conf_inherit import effective, host_volumes, is_implicit, links, section_of, volume_options
from .conf_model import Address, Host, Place, Resource, Volume
from .conf_nbd import parse_nbd_uri
from .conf_options import NOMINATION
from .conf_resolve import absolute, is_diskless

if TYPE_CHECKING:
    from .conf import Configuration


class Claims:
    """Who uses what: each key belongs to one owner."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[object, Place]] = {}

    def claim(self, kind: str, key: str, place: Place, owner: object = None) -> None:
        """Refused when *key* is in use; the same (not None) *owner* may claim it again."""
        first = self._first.setdefault(f"{kind} {key}", (owner, place))
        if first[1] is not place and (owner is None or first[0] != owner):
            raise place.error(f"conflicting use of {kind} '{key}' ... first used at {first[1]}.")


def check_all(configuration: Configuration) -> list[str]:
    """Raise the first mistake; return warnings."""
    claims = Claims()
    warnings: list[str] = []
    for resource in configuration.resources.values():
        _volumes(resource)
        _addresses(resource, claims)
        _node_ids(resource)
        for host in resource.hosts:
            for volume in host_volumes(resource, host).values():
                _devices(configuration, resource, host, volume, claims)
        _names(configuration, resource)
        warnings += _resync_after(configuration, resource) + _diskless(resource)
    _tcp_ports(configuration, claims)
    return warnings


def _volumes(resource: Resource) -> None:
    where = f"in resource {resource.name}"
    plain = [host for host in resource.hosts if host.kind != "stacked"]
    per_host = [(host, host_volumes(resource, host)) for host in plain]
    for host, volumes in per_host:
        numbered = set(resource.volumes) | set(host.volumes)
        explicit = resource.explicit or host.explicit
        if (resource.implicit or host.implicit) and explicit and numbered != {0}:
            raise host.place.error(f"{where}: you must not mix implicit and explicit volumes")
        if not volumes:
            raise host.place.error(f"{where}, {host.title} {{ ... }}: 'device' keyword missing.")
        for volume in volumes.values():
            for keyword in ("device", "disk"):
                if getattr(volume, keyword) is None:
                    raise host.place.error(f"{where}, {host.title} {{ ... }}: '{keyword}' keyword missing.")
    for host, volumes in per_host[1:]:
        first, expected = per_host[0]
        for one, other, missing in ((host, first, expected.keys() - volumes.keys()),
                                    (first, host, volumes.keys() - expected.keys())):  # fmt: skip
            if missing:
                raise one.place.error(f"{where}, {one.title} {{ ... }}: volume {min(missing)} missing "
                                      f"(present on {other.name})")  # fmt: skip
        if is_implicit(resource, host) != is_implicit(resource, first):
            raise host.place.error(f"{where}, {first.title} resp. {host.name}: volume 0 must not be implicit "
                                   "on one but not the other")  # fmt: skip


def _addresses(resource: Resource, claims: Claims) -> None:
    """Each link has an address at both ends, and no two hosts or resources have the same one.

    Addresses of connection sections are not compared here: behind a proxy all may be the same.
    """
    ends = [end for link in links(resource) for end in zip(link.hosts, link.addresses, strict=True)]
    linked = {host.name for host, _ in ends}
    for host, address in [*ends, *((h, h.address) for h in resource.hosts if h.name not in linked)]:
        if address is None:
            raise host.place.error(f"in resource {resource.name}, {host.title} {{ ... }}: "
                                   "'address' keyword missing.")  # fmt: skip
        if address is host.address:
            _claim_address(resource, host, address, claims)


def _claim_address(resource: Resource, host: Host, address: Address, claims: Claims) -> None:
    link_local = address.family == "ipv6" and address.host.lower().startswith("fe80")
    key = f"{host.name}:{address.key}" if link_local else address.key
    claims.claim("IP", key, address.place, (resource.name, host.name))


def _node_ids(resource: Resource) -> None:
    seen: dict[int, Host] = {}
    for host in resource.hosts:
        if host.node_id is None:
            continue
        first = seen.setdefault(host.node_id, host)
        if first is not host:
            key = f"{resource.name}:{host.node_id}"
            raise host.place.error(f"conflicting use of node-id '{key}' ... first used at {first.place}.")


def _devices(
    configuration: Configuration, resource: Resource, host: Host, volume: Volume, claims: Claims
) -> None:
    """Minors, device names, disks and metadata belong to one volume on each of the host's names."""
    for name in host.names if host.kind != "stacked" else (f"stacked-{host.name}",):
        device, disk, meta = volume.device, volume.disk, volume.meta_disk
        if device is not None:
            owner = (resource.name, volume.number)
            minor = configuration.minor(resource.name, volume)
            claims.claim("device-minor", f"device-minor:{name}:{minor}", device.place, owner)
            if device.name:
                claims.claim("device", f"device:{name}:{device.name}", device.place, owner)
        if disk is not None and disk.path:
            path = absolute(disk.path, disk.place)
            claims.claim("disk", f"disk:{name}:{path}", disk.place, (resource.name, volume.number))
            if meta is not None and meta.path and absolute(meta.path, meta.place) == path:
                raise meta.place.error(f"meta-disk {meta.path} is the disk itself: 'meta-disk internal;' or "
                                       "another device expected")  # fmt: skip
        if meta is not None and meta.path:
            _claim_meta(resource, volume, name, claims)


def _claim_meta(resource: Resource, volume: Volume, name: str, claims: Claims) -> None:
    meta = volume.meta_disk
    assert meta is not None
    path = absolute(meta.path, meta.place)
    slot = str(meta.index) if meta.kind == "indexed" else "flexible"
    claims.claim("meta-disk", f"{name}:{path}[{slot}]", meta.place, (resource.name, volume.number))
    # A whole device for one volume is neither another's slots nor another's disk.
    claims.claim("disk", f"disk:{name}:{path}", meta.place, meta.kind if meta.kind == "indexed" else None)


def _names(configuration: Configuration, resource: Resource) -> None:
    where = f"in resource {resource.name}"
    net = effective(section_of(configuration, resource, "net"))
    hosts = {name for host in resource.hosts for name in host.names if host.kind != "stacked"}
    promoted = effective(section_of(configuration, resource, "startup")).get("become-primary-on")
    if promoted is not None and promoted.value == "both":
        two = net.get("allow-two-primaries")
        if two is None or two.value != "yes":
            raise promoted.place.error(f"{where}: become-primary-on is set to both, but allow-two-primaries "
                                       "is not set.")  # fmt: skip
    elif promoted is not None:
        for name in (promoted.value or "").split(" "):
            if name not in hosts:
                raise promoted.place.error(f"{where}: become-primary-on contains '{name}', which is not "
                                           "named with the 'on' sections.")  # fmt: skip
    policy = net.get("after-sb-0pri")
    if policy is not None and (policy.value or "").startswith(NOMINATION):
        name = (policy.value or "").removeprefix(NOMINATION)
        if name not in hosts:
            raise policy.place.error(f"{where}: after-sb-0pri {policy.value}: the nodename in the "
                                     "'discard-node-x' option is not known.")  # fmt: skip


def _resync_after(configuration: Configuration, resource: Resource) -> list[str]:
    warnings = {}
    for host in resource.hosts:
        for volume in host_volumes(resource, host).values():
            option = effective(volume_options(configuration, resource, volume)).get("resync-after")
            name = (option.value or "").partition("/")[0] if option else ""
            if option and name and name not in configuration.resources:
                warnings[option.place] = (f"{option.place}: WARN: resource '{name}' mentioned in "
                                          "'resync-after' option is not known: it is ignored")  # fmt: skip
    return list(warnings.values())


def _diskless(resource: Resource) -> list[str]:
    """Of more than two hosts the diskless ones take no part."""
    hosts = [host for host in resource.hosts if host.kind != "stacked"]
    return [
        f"{host.place}: WARN: in resource {resource.name}: host {host.name} has no disk and is ignored: "
        "two hosts replicate"
        for host in hosts if len(hosts) > 2 and is_diskless(resource, host)
    ]  # fmt: skip


def _tcp_ports(configuration: Configuration, claims: Claims) -> None:
    """A TCP port that exports are served on belongs to one resource and to no replication link."""
    for resource in configuration.resources.values():
        for host in resource.hosts:
            for volume in host_volumes(resource, host).values():
                if volume.device is None or not volume.device.is_uri:
                    continue
                uri, place = parse_nbd_uri(volume.device.name), volume.device.place
                for name in host.names:
                    if uri.socket:
                        claims.claim("NBD socket", f"{name}:{uri.socket}", place, resource.name)
                    else:
                        claims.claim("NBD port", f"{name}:{uri.host}:{uri.port}", place, resource.name)
                if host.address and (host.address.host, host.address.port) == (uri.host, uri.port):
                    raise place.error(f"conflicting use of IP '{host.address.key}' ... first used at "
                                      f"{host.address.place}.")  # fmt: skip
