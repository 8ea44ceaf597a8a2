"""A replicated volume as front ends see it: the `Volume` of `edge/volume`, answered by the runtime.

Decides nothing about requests; it counts who has the volume open, and knows where the local disk has
holes. Everything else is the machine's word.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from tandem.repl.events import Opened
from tandem.repl.requests import Request

if TYPE_CHECKING:
    from .runtime import Runtime

# base:allocation of the NBD protocol: bit 0 is a hole, bit 1 reads as zeroes.
ALLOCATED: Final = 0
HOLE_AND_ZERO: Final = 3


class ReplicatedVolume:
    """Implements `tandem.repl.edge.volume.Volume`. All calls come from the loop's thread."""

    def __init__(self, runtime: Runtime, number: int) -> None:
        self._runtime = runtime
        self._number = number
        self.submit: Callable[[list[Request]], None] = partial(runtime.submit, number)
        self._n_open = 0

    @property
    def name(self) -> str:
        """The first volume has the resource's own name, so that it is the default of whoever names none."""
        config = self._runtime.engine.config
        first = min((each.number for each in config.volumes), default=self._number)
        return config.name if self._number == first else f"{config.name}/{self._number}"

    @property
    def number(self) -> int:
        return self._number

    @property
    def size(self) -> int:
        return self._runtime.engine.volume_size(self._number)

    @property
    def description(self) -> str:
        status = self._runtime.status()
        disks = [each.disk for each in status.volumes if each.number == self._number]
        return f"{status.role}, {disks[0] if disks else 'Diskless'}"

    @property
    def rotational(self) -> bool:
        """False also when there is no local disk, or nobody knows."""
        opened = self._runtime.disk.volume(self._number)
        return opened is not None and opened.rotational

    @property
    def paused(self) -> bool:
        return self._runtime.paused

    def on_resume(self, callback: Callable[[], None]) -> None:
        self._runtime.on_resume(callback)

    def open(self, writable: bool) -> str | None:
        refusal = self._runtime.engine.open_refusal(self._number, writable)
        if refusal is None:
            self._count(+1)
        return refusal

    def close(self, writable: bool) -> None:
        assert self._n_open > 0, f"volume {self._number} was closed more often than opened"
        self._count(-1)

    async def allocation(self, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        """Holes of the local disk, as long as that is the truth: only an UpToDate disk is asked."""
        length = min(length, self.size - offset)
        assert length > 0, f"allocation beyond the end of volume {self._number}"
        status = self._runtime.status()
        if not any(each.number == self._number and each.disk == "UpToDate" for each in status.volumes):
            return [(length, ALLOCATED)]
        found = await self._runtime.disk.extents(self._number, offset, length, max_extents)
        return [(size, HOLE_AND_ZERO if hole else ALLOCATED) for size, hole in found] or [(length, ALLOCATED)]

    def recount(self) -> None:
        """Tell the machine again how many clients there are."""
        self._count(0)

    def _count(self, step: int) -> None:
        self._n_open += step
        self._runtime.report(Opened(self._number, self._n_open))
