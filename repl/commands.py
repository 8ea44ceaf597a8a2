"""The administrator's commands, each one a short story told in order.

A command is a generator: it yields when it must wait (for the peer's consent, a handler, durable metadata)
and is resumed with the answer. It returns a `Refusal`, or None when it is done. Refusals carry DRBD's
numbers and sentences. Source: drbd_nl.c, drbd_set_role, drbd_adm_*, conn_try_disconnect, adm_detach.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .agreement import LOST, SUCCESS
from .errors import Refusal
from .events import Answer, Command
from .states import ConnState, DiskState, Role
from .transition import change, needs_agreement, refusal
from .uuids import UuidSet
from .volume import Volume

if TYPE_CHECKING:
    from .engine import Engine

Wait = Callable[[Callable[[Any], None]], None]  # registers who is to be resumed, with a value
Story = Generator[Wait, Any, "Refusal | None"]

MASKS = {"role": 0x3, "conn": 0x1F0, "disk": 0x1E00, "pdsk": 0x1E000}
TRIES = 4
AGAIN_S = 1.0  # after the peer was in the middle of a change of its own
NOBODY = 0  # the ticket of a command that nobody waits for


class Commands:
    """Runs one story per command; several may be under way, each waits for its own events."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self._n_promotions = 0  # how often somebody wanted this node to be Primary
        self._leaving = False  # auto-promoted, and on its way back because the last client went
        self._stories: dict[str, Callable[[Command], Story]] = {
            "attach": self._attach, "detach": self._detach, "connect": self._connect,
            "disconnect": self._disconnect, "primary": self._primary, "secondary": self._secondary,
            "invalidate": self._invalidate, "invalidate-remote": self._invalidate_remote,
            "outdate": self._outdate, "pause-sync": self._pause_sync, "resume-sync": self._resume_sync,
            "suspend-io": self._suspend_io, "resume-io": self._resume_io,
            "new-current-uuid": self._new_current_uuid, "resize": self._resize, "verify": self._verify,
            "write-bitmap": self._write_bitmap, "down": self._down,
        }  # fmt: skip

    def run(self, command: Command) -> None:
        story = self._stories.get(command.name)
        if story is None:
            self.e.out.effects.append(
                Answer(command.ticket, Refusal(162, "Invalid configuration request", f"no command {command.name}"))
            )
        else:
            self._step(command.ticket, story(command), None)

    def _step(self, ticket: int, story: Story, value: Any) -> None:
        try:
            wait = story.send(value)
        except StopIteration as stop:
            self.e.out.effects.append(Answer(ticket, stop.value))
        else:
            wait(lambda value: self._step(ticket, story, value))

    def _volumes(self, command: Command) -> list[Volume]:
        if command.volume is None:
            return [self.e.volumes[n] for n in sorted(self.e.volumes)]
        return [self.e.volumes[command.volume]]

    # ------------------------------------------------------------------------------ asking

    def _ask(self, vol: Volume, **wish: Any) -> Generator[Wait, Any, int]:
        """Change one volume's state, with the peer's consent where it is needed; returns DRBD's code."""
        while True:
            old = vol.state
            new = replace(old, **wish)
            checked = change(old, new, self.e.facts(vol))
            if isinstance(checked, Refusal):
                if checked.code != -18:
                    return checked.code
                yield self.e.next_change  # a transient state: try again when it has passed
                continue
            if needs_agreement(old, new):
                if self.e.agreement.busy(vol):
                    yield self.e.next_change
                    continue
                mask, val = 0, 0
                for name in wish:
                    mask |= MASKS[name]
                    val |= new.word() & MASKS[name]
                code = yield lambda resume, m=mask, v=val: self.e.agreement.ask(vol, m, v, resume)  # type: ignore[misc]
                if code == 0:
                    continue  # the connection went meanwhile: judge by the new state
                if code == -18:
                    yield self._in_a_moment
                    continue
                if code < SUCCESS:
                    self.peer_code = code
                    return -10
            result = self.e.change(vol, replace(vol.state, **wish))
            if isinstance(result, Refusal):
                # The peer has begun what we cannot any more; that our disk is gone it has heard, and ends it.
                if needs_agreement(old, new) and "conn" in wish and vol.attached:
                    self.e.drop(ConnState.PROTOCOL_ERROR, "the peer agreed to a resync that cannot begin here now")
                    return result.code
                if result.code == -18:
                    yield self.e.next_change
                    continue
                return result.code
            return SUCCESS

    def _in_a_moment(self, resume: Callable[[Any], None]) -> None:
        """Resume after the next state change; or soon, for what holds the peer up may leave no trace here."""
        waiting = [resume]

        def once(_: Any) -> None:
            if waiting:
                waiting.pop()(None)

        self.e.next_change(once)
        self.e.after(AGAIN_S, once)

    @staticmethod
    def _has_disk(vol: Volume) -> bool:
        return vol.state.disk != DiskState.DISKLESS

    def _durable(self, vol: Volume) -> Wait:
        return lambda resume: self.e.write_superblock(vol, resume)

    @staticmethod
    def _refuse(code: int, *info: str) -> Refusal | None:
        return None if code >= SUCCESS else refusal(code, *info)

    # ------------------------------------------------------------------------------ disk

    def _attach(self, command: Command) -> Story:
        for vol in self._volumes(command):
            if vol.state.disk != DiskState.DISKLESS:
                return Refusal(124, "Device is attached to a disk (use detach first)")
            if not vol.config.disk:
                continue
            refused: Refusal | None = yield lambda resume, v=vol: self.e.disks.attach(v, resume)  # type: ignore[misc]
            if refused:
                return refused
        return None

    def _detach(self, command: Command) -> Story:
        for vol in self._volumes(command):
            if vol.state.disk == DiskState.DISKLESS:
                continue
            if vol.state.disk == DiskState.ATTACHING:
                self.e.disks.give_up_attach(vol, "detach")
            elif command.args.get("force"):
                self.e.change(vol, replace(vol.state, disk=DiskState.FAILED), hard=True, why="detach --force")
            else:
                trial = change(vol.state, replace(vol.state, disk=DiskState.FAILED), self.e.facts(vol))
                if isinstance(trial, Refusal):
                    return trial
                if vol.meta is not None and vol.state.role != Role.PRIMARY:
                    # No application write can come any more; mirrored ones may, until the peer has agreed.
                    yield lambda resume, v=vol: v.meta.write_changed(resume)  # type: ignore[misc]
                code = yield from self._ask(vol, disk=DiskState.FAILED)
                if code < SUCCESS:
                    return refusal(code)
            while self._has_disk(vol):
                yield self.e.next_change
        return None

    def _resize(self, command: Command) -> Story:
        args = command.args
        for vol in self._volumes(command):
            s = vol.state
            if s.conn > ConnState.CONNECTED:
                return Refusal(130, "Resize not allowed during resync.", "Wait for it: tandemadm wait-sync")
            if Role.PRIMARY not in (s.role, s.peer):
                return Refusal(131, "Need one Primary node to resize.", "Promote one: tandemadm primary")
            if not vol.attached:
                return Refusal(138, "Device does not have a disk-config", "Attach its disk first")
            if "size" in args:
                disk = replace(vol.config.disk_options, size=int(args["size"]))
                vol.config = replace(vol.config, disk_options=disk)
            clean = bool(args.get("assume_clean"))
            refused = yield lambda resume, v=vol, c=clean: self.e.growth.resize(v, c, resume)  # type: ignore[misc]
            if refused:
                return refused  # type: ignore[no-any-return]
        return None

    # ------------------------------------------------------------------------------ connection

    def _connect(self, command: Command) -> Story:
        if self.e.cstate != ConnState.STAND_ALONE:
            return Refusal(102, "Local address(port) already in use.", "The resource is connected or connecting")
        discard = bool(command.args.get("discard_my_data"))
        if discard and any(v.state.role == Role.PRIMARY for v in self.e.volumes.values()):
            return Refusal(123, "--discard-my-data not allowed when primary.", "Demote this node first")
        refused = self.e.check_config()
        if refused:
            return refused
        self.e.link.discard_my_data = discard
        self.e.link.tentative = self.e.tentative = bool(command.args.get("tentative"))
        self.e.start_connecting()
        return None
        yield

    def _disconnect(self, command: Command) -> Story:
        if self.e.cstate == ConnState.STAND_ALONE:
            return Refusal(162, "Invalid configuration request", "It is StandAlone already", ("unknown connection",))
        if command.args.get("force") or self.e.cstate < ConnState.CONNECTED:
            self.e.stand_alone("")
            return None
        wishes: tuple[dict[str, Any], ...] = ({}, {"disk": DiskState.OUTDATED}, {"pdsk": DiskState.OUTDATED})
        extra = wishes[0]
        code = SUCCESS
        for _ in range(TRIES + 2):
            if self.e.cstate < ConnState.CONNECTED:  # it went meanwhile, and nobody was promised anything
                extra = wishes[0]
                break
            codes = [
                change(v.state, replace(v.state, conn=ConnState.DISCONNECTING, **extra), self.e.facts(v))
                for v in self.e.volumes.values()
            ]
            bad = next((c for c in codes if isinstance(c, Refusal)), None)
            if bad is not None and bad.code == -7 and not extra:
                extra = wishes[2]
                continue
            if bad is not None and bad.code == -18:
                yield self.e.next_change
                continue
            if bad is not None and bad.code in (-16, -9):
                break
            if bad is not None:
                self.e.agreement.stay()
                return bad
            mask, val = MASKS["conn"], ConnState.DISCONNECTING << 4
            if "disk" in extra and not all(v.leaving for v in self.e.volumes.values()):
                # The peer relies on it from its answer on; dead before that is durable, we would come back UpToDate.
                for vol in self.e.volumes.values():
                    vol.leaving = True
                    yield self._durable(vol)
                continue
            if "disk" in extra:
                mask, val = mask | MASKS["disk"], val | DiskState.OUTDATED << 9
            if "pdsk" in extra:
                mask, val = mask | MASKS["pdsk"], val | DiskState.OUTDATED << 13
            self.e.disconnecting = True
            code = yield lambda resume, m=mask, v=val: self.e.agreement.ask(None, m, v, resume)  # type: ignore[misc]
            self.e.disconnecting = False
            if code == -7 and not extra:
                extra = wishes[1]
                continue
            if code in (-18, -19):
                yield self._in_a_moment
                continue
            if code < 0:
                self.e.agreement.stay()
                return refusal(-10, f"peer: ({code})")
            break
        if code == LOST and "pdsk" in extra:
            extra = {}  # nobody knows whether the peer has outdated itself: fencing has to find out
        self.e.stand_alone("", outdate=next(iter(extra), ""))
        self.e.agreement.stay()
        for vol in self.e.volumes.values():
            if extra:
                yield self._durable(vol)
        return None

    # ------------------------------------------------------------------------------ role

    def _primary(self, command: Command) -> Story:
        auto = bool(command.args.get("auto"))
        self._n_promotions += 1
        if not auto:
            self.e.auto_promoted = False  # from now on until somebody says secondary
        elif self._leaving or all(v.state.role == Role.SECONDARY for v in self.e.volumes.values()):
            self.e.auto_promoted = True
        self._leaving = False
        for vol in self._volumes(command):
            refused = yield from self._promote(vol, bool(command.args.get("force")))
            if refused:
                return refused
        return None

    def clients_changed(self) -> None:
        """Clients have opened or left volumes: an auto-promoted node is demoted behind the last one."""
        if self.e.auto_promoted and not any(v.open_count for v in self.e.volumes.values()):
            self.e.auto_promoted, self._leaving = False, True
            self.run(Command(NOBODY, "secondary"))

    def _promote(self, vol: Volume, force: bool) -> Story:
        if vol.state.role == Role.PRIMARY:
            return None
        extra: dict[str, Any] = {}
        forced = waited = False
        code = 0
        if self.e.connected:
            self.e.liveness.ping()
        for _ in range(TRIES + 2):
            code = yield from self._ask(vol, role=Role.PRIMARY, **extra)
            disk = vol.state.disk
            if code >= SUCCESS:
                break
            if code == -2 and force and DiskState.INCONSISTENT <= disk < DiskState.UP_TO_DATE and "disk" not in extra:
                extra["disk"] = DiskState.UP_TO_DATE
                forced = True
            elif code == -2 and disk == DiskState.CONSISTENT and vol.state.connected:
                yield self._in_a_moment  # the peer is attaching, and its data may be newer
            elif code == -2 and disk == DiskState.CONSISTENT and "disk" not in extra:
                if not (yield self.e.fencing.fence):
                    break
                extra["disk"] = DiskState.UP_TO_DATE
            elif code == -7 and "pdsk" not in extra:
                if not (yield self.e.fencing.fence):
                    if not force:
                        break
                    extra["pdsk"] = DiskState.OUTDATED
            elif code == -1 and not waited:
                waited = True
                yield lambda resume: self.e.after(self.e.config.net.ping_timeout / 10 + 0.1, resume)
            elif code == -10 and "pdsk" in extra:
                del extra["pdsk"]
            else:
                break
        if code < SUCCESS:
            return refusal(code)
        yield from self._promoted(vol, forced)
        return None

    def _promoted(self, vol: Volume, forced: bool) -> Generator[Wait, Any, None]:
        """The new Primary's generation, on disk before the first write may start."""
        s = vol.state
        vol.discard_my_data = self.e.link.discard_my_data = False  # what is to be written is not to be lost
        alone = not s.connected or s.pdsk <= DiskState.FAILED
        if vol.attached:
            if forced or (alone and (not vol.uuids.bitmap or vol.end_unknown)):
                self.e.new_current(vol)
            vol.uuids = vol.uuids.with_role(True)
            vol.io_holds += 1
            vol.refresh()
            durable = yield self._durable(vol)
            if durable and vol.state.disk == DiskState.UP_TO_DATE:
                vol.exposed = vol.uuids.current & ~1
            vol.io_holds -= 1
            vol.refresh()
            self.e.mirror.release_held(vol)
        if vol.state.connected:
            if forced:
                self.e.peer.send_uuids(vol)
            self.e.peer.send_state(vol)

    def _secondary(self, command: Command) -> Story:
        since = self._n_promotions
        for vol in self._volumes(command):
            if vol.state.role == Role.SECONDARY:
                continue
            if since != self._n_promotions:  # wanted as a Primary again: what is left must not be demoted behind that
                return refusal(-19)
            checked = change(vol.state, replace(vol.state, role=Role.SECONDARY), self.e.facts(vol))
            if isinstance(checked, Refusal) and checked.code != -18:
                return refusal(checked.code)
            while vol.n_app:  # of clients whose sessions were ended
                yield lambda resume, v=vol: self.e.when_quiet(v, lambda: resume(None), answered=True)  # type: ignore[misc]
            # Only a Primary makes a new generation when it loses its peer, so the peer must hold everything
            # stably (or be lost) before this node stops being one.
            yield self.e.log.when_stable
            if since != self._n_promotions:
                return refusal(-19)
            code = yield from self._ask(vol, role=Role.SECONDARY)
            if code < SUCCESS:
                return refusal(code)
            if vol.state.connected:
                self.e.peer.send_state(vol)
            if vol.meta is not None:
                yield lambda resume, v=vol: v.meta.write_changed(resume)  # type: ignore[misc]
                yield self._durable(vol)
        return None

    # ------------------------------------------------------------------------------ data

    def _invalidate(self, command: Command) -> Story:
        for vol in self._volumes(command):
            s = vol.state
            if s.conn == ConnState.STAND_ALONE and s.role == Role.SECONDARY and vol.attached:
                yield lambda resume, v=vol: self.e.disks.set_all(v, lambda: resume(True))  # type: ignore[misc]
                self.e.change(vol, replace(vol.state, disk=DiskState.INCONSISTENT), hard=True, why="invalidated")
                yield self._durable(vol)
                continue
            code = yield from self._ask(vol, conn=ConnState.STARTING_SYNC_T)
            if code < SUCCESS:
                return refusal(code)
        return None

    def _invalidate_remote(self, command: Command) -> Story:
        for vol in self._volumes(command):
            s = vol.state
            if s.conn == ConnState.STAND_ALONE and s.role == Role.PRIMARY and vol.attached:
                yield lambda resume, v=vol: self.e.disks.set_all(v, lambda: resume(True))  # type: ignore[misc]
                vol.al_suspended = True
                vol.refresh()
                continue
            code = yield from self._ask(vol, conn=ConnState.STARTING_SYNC_S)
            if code < SUCCESS:
                return refusal(code)
        return None

    def _outdate(self, command: Command) -> Story:
        for vol in self._volumes(command):
            s = vol.state
            if s.role == Role.PRIMARY:
                return refusal(-2, "a Primary can not be outdated")
            if s.connected or s.disk == DiskState.OUTDATED:
                continue
            if s.disk < DiskState.OUTDATED:
                return refusal(-16)
            code = yield from self._ask(vol, disk=DiskState.OUTDATED)
            if code < SUCCESS:
                return refusal(code)
            yield self._durable(vol)
        return None

    def _pause_sync(self, command: Command) -> Story:
        for vol in self._volumes(command):
            if vol.state.user_isp:
                return Refusal(134, "Sync-pause flag is already set", "Resume with: tandemadm resume-sync")
            self.e.change(vol, replace(vol.state, user_isp=True), why="pause-sync")
        return None
        yield

    def _resume_sync(self, command: Command) -> Story:
        for vol in self._volumes(command):
            if not vol.state.user_isp:
                if vol.state.peer_isp:
                    return Refusal(157, "Sync-pause flag is already cleared", "Resume on the peer",
                                   ("Note: Resync pause caused by the peer node.",))  # fmt: skip
                return Refusal(135, "Sync-pause flag is already cleared")
            self.e.change(vol, replace(vol.state, user_isp=False), why="resume-sync")
        return None
        yield

    def _suspend_io(self, command: Command) -> Story:
        for vol in self.e.volumes.values():
            self.e.change(vol, replace(vol.state, susp=True), hard=True, why="suspend-io")
        return None
        yield

    def _resume_io(self, command: Command) -> Story:
        self.e.fencing.resume()
        return None
        yield

    def _new_current_uuid(self, command: Command) -> Story:
        clear = bool(command.args.get("clear_bitmap"))
        for vol in self._volumes(command):
            if not vol.attached:
                return Refusal(138, "Device does not have a disk-config", "Attach its disk first")
            skip = vol.state.conn == ConnState.CONNECTED and vol.uuids.current == 4 and clear
            if not skip and vol.state.conn != ConnState.STAND_ALONE:
                return Refusal(151, "Need to be StandAlone", "Disconnect first: tandemadm disconnect")
            if skip:
                yield from self._skip_initial_sync(vol)
                continue
            vol.uuids = vol.uuids.clear_bitmap()
            self.e.new_current(vol)
            if clear:
                self.e.disks.clear_bitmap(vol)
            yield self._durable(vol)
        return None

    def _skip_initial_sync(self, vol: Volume) -> Generator[Wait, Any, None]:
        self.e.new_current(vol)
        self.e.disks.clear_bitmap(vol)
        self.e.peer.send_uuids(vol, flags=8)
        u = vol.uuids
        vol.uuids = UuidSet(u.current, 0, u.history0, u.history1)
        vol.peer_uuids = vol.uuids
        self.e.change(
            vol, replace(vol.state, disk=DiskState.UP_TO_DATE, pdsk=DiskState.UP_TO_DATE), hard=True,
            why="initial sync skipped",
        )  # fmt: skip
        yield self._durable(vol)

    def _write_bitmap(self, command: Command) -> Story:
        """The bitmap on disk becomes what it is in memory, for whoever reads it there."""
        for vol in self._volumes(command):
            if vol.attached and vol.meta is not None:
                yield lambda resume, v=vol: v.meta.write_changed(resume)  # type: ignore[misc]
        return None

    def _verify(self, command: Command) -> Story:
        start, stop = int(command.args.get("start", 0)), int(command.args.get("stop", 0))
        for vol in self._volumes(command):
            vol.verify_range = (start, stop)
            refused = self._refuse((yield from self._ask(vol, conn=ConnState.VERIFY_S)))
            if refused:
                return refused
        return None

    # ------------------------------------------------------------------------------ down

    def _down(self, command: Command) -> Story:
        for vol in self.e.volumes.values():
            if vol.state.role == Role.PRIMARY and vol.open_count:
                return refusal(-12, "failed to demote")
        refused = yield from self._secondary(replace(command, volume=None))
        if refused:
            return refused
        if self.e.cstate != ConnState.STAND_ALONE:
            refused = yield from self._disconnect(replace(command, args={}))
            if refused:
                self.e.stand_alone("down")
        for vol in self.e.volumes.values():
            if vol.state.disk > DiskState.FAILED and vol.meta is not None:
                yield lambda resume, v=vol: self.e.disks.detach_cleanly(v, resume)  # type: ignore[misc]
                self.e.change(vol, replace(vol.state, disk=DiskState.FAILED), hard=True, why="down", quiet=True)
            elif vol.state.disk == DiskState.ATTACHING:
                self.e.disks.give_up_attach(vol, "down")
            while self._has_disk(vol):
                yield self.e.next_change
        return None

