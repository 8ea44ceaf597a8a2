"""Where a resource's volumes are offered over NBD: the daemon's side of `tandem.nbd.server`.

A volume whose ``device`` is an NBD URI is offered there; all others are offered on the resource's socket
in the run directory, by the names ``RES`` and ``RES/VOL``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tandem.nbd.budget import Budget
from tandem.nbd.server import Gate, Server, ServerError
from tandem.repl.config import ResourceConfig, VolumeConfig
from tandem.repl.edge.volume import Volume
from tandem.repl.requests import Request

from .conf_nbd import NbdUri, UriProblem, parse_nbd_uri


class DeviceError(Exception):
    """A ``device`` statement that cannot be served; one sentence for the operator."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one volume is offered: on the socket *path*, or on *host* and *port*, as *export*."""

    export: str
    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def listener(self) -> tuple[str, str, int]:
        """What places on the same socket have in common."""
        return self.path, self.host, self.port

    def __str__(self) -> str:
        if self.path:
            return f"nbd+unix:///{self.export}?socket={self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"nbd://{host}:{self.port}/{self.export}"


def export_name(config: ResourceConfig, volume: VolumeConfig) -> str:
    """``RES`` for the first volume, ``RES/VOL`` for the others."""
    first = min(v.number for v in config.volumes)
    return config.name if volume.number == first else f"{config.name}/{volume.number}"


def place_of(config: ResourceConfig, volume: VolumeConfig, socket: Path) -> Place:
    """Where *volume* is offered; *socket* is the resource's default NBD socket.

    DeviceError when the URI is one that cannot be served.
    """
    name = export_name(config, volume)
    if "://" not in volume.device:
        return Place(name, path=str(socket))
    try:
        uri: NbdUri = parse_nbd_uri(volume.device)
    except UriProblem as error:
        raise DeviceError(f"{config.name}: device {volume.device}: {error}") from error
    return Place(uri.export or name, uri.socket, uri.host, uri.port)


class Renamed:
    """A volume under the name its URI gives it; everything else is the volume's."""

    def __init__(self, volume: Volume, name: str) -> None:
        self._volume = volume
        self.name = name
        self.submit: Callable[[list[Request]], None] = volume.submit

    @property
    def size(self) -> int:
        return self._volume.size

    @property
    def description(self) -> str:
        return self._volume.description

    @property
    def rotational(self) -> bool:
        return self._volume.rotational

    @property
    def number(self) -> int:
        return self._volume.number

    @property
    def paused(self) -> bool:
        return self._volume.paused

    def on_resume(self, callback: Callable[[], None]) -> None:
        self._volume.on_resume(callback)

    def open(self, writable: bool) -> str | None:
        return self._volume.open(writable)

    def close(self, writable: bool) -> None:
        self._volume.close(writable)

    async def allocation(self, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        return await self._volume.allocation(offset, length, max_extents)


Listener = tuple[str, str, int]


class Exports:
    """The NBD servers of one resource: one for each socket, with the volumes that are offered there."""

    def __init__(
        self, socket: Path, volume: Callable[[int], Volume], log: Callable[[str], None], gate: Gate
    ) -> None:
        self._socket = socket
        self._gate = gate
        self._volume = volume
        self._log = log
        self._budget = Budget()  # of the whole process, wherever its clients come in
        self._servers: dict[Listener, Server] = {}
        self._offered: dict[Listener, list[Volume]] = {}

    async def apply(self, config: ResourceConfig) -> None:
        """Offer exactly the volumes of *config*. DeviceError says what cannot be; the rest is offered.

        Sockets that are not wanted any more are closed, with the sessions on them.
        """
        places = {volume.number: place_of(config, volume, self._socket) for volume in config.volumes}
        offered: dict[Listener, list[Volume]] = {}
        for number, place in places.items():
            volume = self._volume(number)
            named = volume if volume.name == place.export else Renamed(volume, place.export)
            offered.setdefault(place.listener, []).append(named)
        self._offered = offered
        for listener in [old for old in self._servers if old not in offered]:
            await self._servers.pop(listener).stop()
        for place in places.values():
            if place.listener not in self._servers:
                self._servers[place.listener] = await self._start(place)

    async def _start(self, place: Place) -> Server:
        server = Server(partial(self._at, place.listener), log=self._log, gate=self._gate, budget=self._budget)
        try:
            if place.path:
                await server.start(unix=place.path)
            else:
                await server.start(tcp=(place.host, place.port))
        except ServerError as error:
            raise DeviceError(str(error)) from error
        self._log(f"offering {place}")
        return server

    def _at(self, listener: Listener) -> list[Volume]:
        return self._offered.get(listener, [])

    async def disconnect(self, drain_s: float) -> None:
        """End every session, answering what was read from it; new clients may come."""
        for listener, server in self._servers.items():
            for volume in self._at(listener):
                await server.disconnect_export(volume.name, drain_s)

    async def stop(self, drain_s: float) -> None:
        """Close every socket and end every session, answering what was read from it."""
        for server in self._servers.values():
            await server.stop(drain_s)
        self._servers.clear()
