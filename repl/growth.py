"""Devices that grow while they are in use: `resize` here, and the peer's resize that we follow.

A resize looks how large the backing device is now, moves internal metadata to its new end, takes what both
nodes have as the new size and tells the peer, who looks at its own device likewise: one node told is enough.
One look at a volume at a time. While metadata move, applications are held, and every write that needs the
old activity log has ended; a crash in between means a full sync. Source: drbd_adm_resize, receive_sizes,
drbd_determine_dev_size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .activity_log import ActivityLog
from .errors import MetadataError, Refusal
from .events import DeviceGrown, ProbeSize
from .metadata import Layout, layout
from .peer import NO_RESYNC, new_size
from .units import SECTOR
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine

Then = Callable[[Refusal | None], None]


class Growth:
    """Resizes under way, in their order for each volume."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self._looks: dict[int, deque[Callable[[], None]]] = {}

    def resize(self, vol: Volume, assume_clean: bool, then: Then) -> None:
        """Look at the backing device, use its space, tell the peer to do the same."""
        self._look(vol, lambda event, end: self._grow(vol, event, assume_clean, False, end), then)

    def follow(self, vol: Volume, assume_clean: bool) -> None:
        """The peer resizes. If our device has grown too, do what `resize` does; else there is nothing to tell."""

        def ended(refused: Refusal | None) -> None:
            if refused is not None:
                self.e.note(vol, f"can not follow the peer's resize: {refused}", level="warning")

        self._look(vol, lambda event, end: self._grow(vol, event, assume_clean, True, end), ended)

    def _look(self, vol: Volume, found: Callable[[DeviceGrown, Then], None], then: Then) -> None:
        looks = self._looks.setdefault(vol.number, deque())

        def begin() -> None:
            if vol.meta is None:
                end(self._no_disk())
                return
            ticket = self.e.new_ticket()
            self.e.probes[ticket] = lambda event: found(event, end)
            self.e.out.effects.append(ProbeSize(ticket, vol.number))

        def end(refused: Refusal | None) -> None:
            looks.popleft()
            then(refused)
            if looks:
                looks[0]()

        looks.append(begin)
        if len(looks) == 1:
            begin()

    @staticmethod
    def _no_disk() -> Refusal:
        return Refusal(138, "Device does not have a disk-config", "Attach its disk first")

    def _grow(self, vol: Volume, found: DeviceGrown, assume_clean: bool, follows: bool, then: Then) -> None:
        old = vol.layout
        if old is None or vol.meta is None:
            then(self._no_disk())
            return
        try:
            new = layout(old.kind, found.meta_size, found.data_size, vol.config.meta_disk.index, old.al_stripes,
                         old.al_stripe_size_4k)  # fmt: skip
        except MetadataError as e:
            then(Refusal(e.code, str(e)))
            return
        if new.usable < vol.size:
            then(Refusal(170, "Implicit device shrinking not allowed. See kernel log."))
            return
        vol.data_size = found.data_size
        if new == old:
            if not follows:
                self._use_space(vol, assume_clean)
            then(None)
            return
        vol.io_holds += 1
        vol.refresh()
        # Applications are held. What is in flight ends on its own, and then what the peer has not made stable: until
        # then it needs the old activity log.
        def stable(_: None) -> None:
            self.e.when_quiet(vol, lambda: self._move(vol, old, new, assume_clean, then))

        self.e.when_quiet(vol, lambda: self.e.log.when_stable(stable))

    def _move(self, vol: Volume, old: Layout, new: Layout, assume_clean: bool, then: Then) -> None:
        """Write the metadata at its new place; a crash in between means a full sync."""
        meta = vol.meta

        def end(refused: Refusal | None) -> None:
            vol.io_holds -= 1
            vol.refresh()
            if refused is None:
                self._use_space(vol, assume_clean)
            then(refused)
            self.e.mirror.release_held(vol)

        def bitmap_written(ok: bool) -> None:
            if not ok or vol.meta is not meta or meta is None:
                written(False)
                return
            vol.full_sync_flag = False
            meta.superblock(written)

        def written(ok: bool) -> None:
            failed = Refusal(118, "IO error(s) occurred during initial access to meta-data.")
            end(None if ok and vol.meta is meta else failed)

        if meta is None or vol.layout is not old:
            end(self._no_disk())
            return
        vol.layout = new
        vol.usable = new.usable & ~(SECTOR - 1)
        vol.full_sync_flag = True
        vol.bitmap.mark_all_dirty()
        vol.al = ActivityLog(vol.config.disk_options.al_extents, new.al_blocks, new.al_stripes)
        meta.superblock(
            lambda ok: meta.write_ring(vol.al.initial_ring(), lambda ok: meta.write_changed(bitmap_written))
        )

    def _use_space(self, vol: Volume, assume_clean: bool) -> None:
        connected = vol.state.connected
        size = new_size(
            vol.usable, vol.peer_size if connected else 0, vol.config.disk_options.size * SECTOR, vol.la_size
        )
        if not connected:
            size = vol.usable if not vol.config.disk_options.size else size
        if size > vol.size:
            self.e.disks.adopt_size(vol, size, set_new=not assume_clean)
            vol.resize_pending = connected  # the peer's answer starts the resync of the new part
        if connected:
            self.e.peer.send_uuids(vol)
            self.e.peer.send_sizes(vol, NO_RESYNC if assume_clean else 0, ask=True)
