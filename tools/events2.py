"""The event lines of `events2`, from the difference of two `ResourceStatus` values.

Pure: `Events` remembers what was shown last for each resource and turns the next status into lines in
drbdsetup 9's form and order: resource, connection, devices, then per connection its peer devices and
paths; what vanished is destroyed in the reverse order. A line is printed when a state changed; counters
come along with it when statistics are wanted, and alone only in answer to a poll. A handler has a line when it is
called and one when it has ended; of those that are not configured, which DRBD calls to no effect, nothing is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.repl.events import ConnectionStatus, Helper, PeerVolumeStatus, ResourceStatus, VolumeStatus

from .status import peer_statistics, volume_statistics, yes_no

Keys = dict[str, str]


@dataclass(slots=True)
class Thing:
    """One object of an event line: its *kind* and identification, its states and its counters."""

    kind: str
    name: Keys
    states: Keys
    statistics: Keys = field(default_factory=dict)
    together: frozenset[str] = frozenset()  # when one of these changed, all of them are printed
    last: frozenset[str] = frozenset()  # states that are printed after the counters


@dataclass(slots=True)
class Events:
    """The memory of one `events2` run.

    *statistics* adds counters, *full* implies them and prints every key on every line, *diff* prints
    ``key:old->new``.
    """

    statistics: bool = False
    full: bool = False
    diff: bool = False
    _shown: dict[str, list[Thing]] = field(default_factory=dict)

    def update(self, status: ResourceStatus, action: str = "create", poll: bool = False) -> list[str]:
        """Lines for the new status of one resource; *action* names what is said of new objects."""
        before = {_key(thing): thing for thing in self._shown.get(status.name, [])}
        now = things(status)
        self._shown[status.name] = now
        lines = []
        for thing in now:
            old = before.pop(_key(thing), None)
            line = self._appeared(action, thing) if old is None else self._changed(old, thing, poll)
            if line:
                lines.append(line)
        lines += _destroyed(list(before.values()))
        return lines

    def gone(self, name: str) -> list[str]:
        """Lines for a resource that is no more (its daemon ended)."""
        return _destroyed(self._shown.pop(name, []))

    def helper(self, status: ResourceStatus, helper: Helper) -> str:
        """The line of a handler that was called, or has answered: its status is that of wait(2)."""
        name = _peer_name(status.name, status.connection)
        for volume in status.volumes:
            if volume.number == helper.volume:
                name |= {"volume": str(volume.number), "minor": str(volume.minor)}
        keys = {"helper": helper.name}
        if helper.code is None:
            return _line("call", Thing("helper", name, {}), keys)
        return _line("response", Thing("helper", name, {}), keys | {"status": str(helper.code << 8)})

    def names(self) -> list[str]:
        """The resources shown and not gone."""
        return list(self._shown)

    def _wants_statistics(self) -> bool:
        return self.statistics or self.full

    def _appeared(self, action: str, thing: Thing) -> str:
        return _line(action, thing, thing.states | (thing.statistics if self._wants_statistics() else {}))

    def _changed(self, old: Thing, new: Thing, poll: bool) -> str:
        states = _difference(old.states, new.states)
        counters = _difference(old.statistics, new.statistics) if self._wants_statistics() else {}
        if not states and not (poll and counters):
            # Counters that are not shown now are shown, as changed, with the next line of this object.
            new.statistics = old.statistics
            return ""
        if self.full:
            return _line("change", new, new.states | new.statistics)
        if new.together & states.keys():
            states = {k: v for k, v in new.states.items() if k in new.together or k in states}
        keys = states | counters
        if self.diff:
            before = old.states | old.statistics
            keys = {k: v if before.get(k, v) == v else f"{before[k]}->{v}" for k, v in keys.items()}
        return _line("change", new, keys)


def things(status: ResourceStatus) -> list[Thing]:
    """Everything `events2` shows of one resource, in its order."""
    peer = status.connection
    return [
        _resource(status),
        _connection(status.name, peer),
        *(_device(status.name, volume) for volume in status.volumes),
        *(_peer_device(status.name, peer, volume) for volume in peer.volumes),
        _path(status.name, peer),
    ]


def _resource(status: ResourceStatus) -> Thing:
    states = {
        "role": status.role, "suspended": status.suspended, "force-io-failures": "no",
        "may_promote": yes_no(status.may_promote), "promotion_score": str(status.promotion_score),
    }  # fmt: skip
    statistics = {"write-ordering": status.write_ordering}
    last = frozenset(("may_promote", "promotion_score"))
    return Thing("resource", {"name": status.name}, states, statistics, last=last)


def _connection(resource: str, peer: ConnectionStatus) -> Thing:
    statistics = {
        "congested": yes_no(peer.congested), "ap-in-flight": str(peer.ap_in_flight // 512),
        "rs-in-flight": str(peer.rs_in_flight // 512),
    }  # fmt: skip
    states = {"connection": peer.connection, "role": peer.role}
    return Thing("connection", _peer_name(resource, peer), states, statistics)


def _device(resource: str, volume: VolumeStatus) -> Thing:
    states = {
        "backing_dev": volume.backing_device or "none", "disk": volume.disk, "client": yes_no(volume.client),
        "open": yes_no(volume.open), "quorum": "yes",
    }  # fmt: skip
    name = {"name": resource, "volume": str(volume.number), "minor": str(volume.minor)}
    statistics = {key: str(value) for key, value in volume_statistics(volume).items()}
    statistics["blocked"] = volume.blocked
    return Thing("device", name, states, statistics, frozenset(states))


def _peer_device(resource: str, peer: ConnectionStatus, volume: PeerVolumeStatus) -> Thing:
    states = {
        "replication": volume.replication, "peer-disk": volume.peer_disk, "peer-client": "no",
        "resync-suspended": volume.resync_suspended,
    }  # fmt: skip
    if volume.done is not None:
        states["done"] = f"{volume.done:.2f}"
    name = _peer_name(resource, peer) | {"volume": str(volume.number)}
    statistics = {key: str(value) for key, value in peer_statistics(volume).items()}
    return Thing("peer-device", name, states, statistics)


def _path(resource: str, peer: ConnectionStatus) -> Thing:
    name = _peer_name(resource, peer) | {"local": peer.local, "peer": peer.remote}
    return Thing("path", name, {"established": yes_no(peer.connection == "Connected")})


def _peer_name(resource: str, peer: ConnectionStatus) -> Keys:
    return {"name": resource, "peer-node-id": str(peer.node_id), "conn-name": peer.name}


def _key(thing: Thing) -> tuple[str, ...]:
    return thing.kind, *thing.name.values()


def _difference(old: Keys, new: Keys) -> Keys:
    return {key: value for key, value in new.items() if old.get(key) != value}


def _destroyed(gone: list[Thing]) -> list[str]:
    """Paths and peer devices go before the connection, devices before the resource."""
    return [_line("destroy", thing, {}) for thing in reversed(gone)]


def _line(action: str, thing: Thing, keys: Keys) -> str:
    name = thing.name
    if action == "destroy" and thing.kind == "device":
        name = {key: value for key, value in name.items() if key != "minor"}
    early = {key: value for key, value in keys.items() if key not in thing.last}
    keys = early | keys  # The dictionary keeps the place of first insertion: the last ones go to the end.
    return " ".join([action, thing.kind, *(f"{k}:{v}" for k, v in (name | keys).items())])
