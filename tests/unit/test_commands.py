"""The administrator's commands: every refusal with its code, sentence and exit code, and what waits for what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import Attach, Attached, AttachFailed, DeviceGrown, LinkLost, Opened, ProbeSize, ReleaseDisk
from tandem.repl.metadata import MdFlag
from tandem.repl.requests import META, Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import (
    Packet,
    Uuids,
    pack_ack,
    pack_barrier_ack,
    pack_state,
    pack_state_change,
    pack_state_reply,
    pack_sync_uuid,
    packet,
    unpack_barrier,
    unpack_data,
)

from tests.scenarios.lone import IN_SYNC, PEER_SECONDARY, Lone

P, D, C = Packet, DiskState, ConnState
INCONSISTENT = MdFlag.AL_CLEAN
SENTENCES = {
    -1: "Multiple primaries not allowed by config", -2: "Need access to UpToDate data",
    -7: "Refusing to be Primary while peer is not outdated",
    -8: "Can not start OV/resync since it is already active", -10: "State change was refused by peer node",
    -12: "Device is held open by someone", -14: "Need a verify algorithm to start online verify",
    -15: "Need a connection to start verify or resync", -16: "Disk state is lower than outdated",
    102: "Local address(port) already in use.", 120: "cram-hmac-alg unknown",
    123: "--discard-my-data not allowed when primary.", 124: "Device is attached to a disk (use detach first)",
    130: "Resize not allowed during resync.", 131: "Need one Primary node to resize.",
    134: "Sync-pause flag is already set", 135: "Sync-pause flag is already cleared",
    138: "Device does not have a disk-config", 141: "data-integrity-alg unknown", 143: "csums-alg unknown",
    144: "verify-alg unknown", 150: "Can only attach to the data we lost last (see kernel log).",
    151: "Need to be StandAlone", 157: "Sync-pause flag is already cleared", 162: "Invalid configuration request",
    170: "Implicit device shrinking not allowed. See kernel log.",
}  # fmt: skip
EXIT_CODES = {-2: 17, -16: 5}


def refused(lone: Lone, code: int, name: str, **args: Any) -> Refusal:
    """Run a command that must be refused with *code*; nothing may have changed."""
    before = [v.state for v in lone.engine.volumes.values()]
    answer = lone.run(name, **args)
    assert isinstance(answer, Refusal), f"{name}: {answer}"
    assert answer.code == code, answer
    assert answer.text == SENTENCES[code]
    assert answer.exit_code == (10 if code > 0 else EXIT_CODES.get(code, 11))
    assert [v.state for v in lone.engine.volumes.values()] == before
    return answer


def alone(**found: object) -> Lone:
    """Attached, StandAlone, Secondary."""
    lone = Lone()
    lone.attach(**found)
    lone.forget()
    return lone


def dialling() -> Lone:
    lone = alone()
    lone.run("connect")
    return lone


def secondary() -> Lone:
    lone = Lone()
    lone.attach()
    lone.connect()
    lone.forget()
    return lone


def primary() -> Lone:
    return Lone().ready()


def replica() -> Lone:
    return Lone().as_secondary()


def diskless() -> Lone:
    return Lone(diskless=True)


def opened() -> Lone:
    lone = primary()
    lone.handle(Opened(0, 1))
    return lone


def primary_alone() -> Lone:
    lone = alone()
    assert lone.run("primary") == "done"
    return lone


def source() -> Lone:
    return Lone().source((0, 9))


def target() -> Lone:
    return Lone().target((0, 9))


def paused_by_peer() -> Lone:
    lone = primary()
    lone.data(pack_state(replace(PEER_SECONDARY, conn=C.CONNECTED, user_isp=True).word(), 0))
    return lone


REFUSALS: list[tuple[Callable[[], Lone], int, str, dict[str, object]]] = [
    (alone, 124, "attach", {}),
    (primary, 124, "attach", {}),
    (dialling, 102, "connect", {}),
    (primary, 102, "connect", {}),
    (primary_alone, 123, "connect", {"discard_my_data": True}),
    (alone, 162, "disconnect", {}),
    (lambda: alone(flags=INCONSISTENT), -2, "primary", {}),
    (lambda: alone(flags=MdFlag.CONSISTENT | MdFlag.AL_CLEAN), -2, "primary", {}),  # Outdated
    (diskless, -2, "primary", {}),
    (diskless, -2, "primary", {"force": True}),
    (opened, -12, "secondary", {}),
    (opened, -12, "down", {}),
    (primary_alone, -2, "detach", {}),
    (dialling, -15, "invalidate", {}),
    (primary_alone, -15, "invalidate", {}),
    (source, -8, "invalidate", {}),
    (target, -8, "invalidate", {}),
    (alone, -15, "invalidate-remote", {}),
    (dialling, -15, "invalidate-remote", {}),
    (source, -8, "invalidate-remote", {}),
    (primary, -2, "outdate", {}),
    (primary_alone, -2, "outdate", {}),
    (lambda: alone(flags=INCONSISTENT), -16, "outdate", {}),
    (diskless, -16, "outdate", {}),
    (source, 130, "resize", {}),
    (secondary, 131, "resize", {}),
    (alone, 131, "resize", {}),
    (primary, 135, "resume-sync", {}),
    (paused_by_peer, 157, "resume-sync", {}),
    (dialling, 151, "new-current-uuid", {}),
    (secondary, 151, "new-current-uuid", {"clear_bitmap": True}),  # not just created
    (diskless, 138, "new-current-uuid", {}),
    (primary, 162, "no-such-command", {}),
]


@pytest.mark.parametrize(("where", "code", "name", "args"), REFUSALS)
def test_refusals(where: Callable[[], Lone], code: int, name: str, args: dict[str, object]) -> None:
    refused(where(), code, name, **args)


def test_a_diskless_primary_can_not_resize() -> None:
    lone = diskless()
    lone.connect()
    lone.primary()
    refused(lone, 138, "resize")


def test_down_of_an_open_device_changes_no_volume() -> None:
    lone = Lone(n_volumes=2).ready()
    lone.handle(Opened(1, 1))
    answer = refused(lone, -12, "down")
    assert answer.info == ("failed to demote",)


def test_pausing_twice_is_refused() -> None:
    lone = primary()
    assert lone.run("pause-sync") == "done"
    refused(lone, 134, "pause-sync")
    assert lone.run("resume-sync") == "done"


def test_a_pause_of_the_peer_is_told_in_the_note() -> None:
    answer = refused(paused_by_peer(), 157, "resume-sync")
    assert answer.info == ("Note: Resync pause caused by the peer node.",)


@pytest.mark.parametrize(("option", "code"), [
    ("cram_hmac_alg", 120), ("data_integrity_alg", 141), ("csums_alg", 143), ("verify_alg", 144),
])  # fmt: skip
def test_connecting_with_an_algorithm_nobody_has(option: str, code: int) -> None:
    lone = Lone(net={option: "rot13"})
    lone.attach()
    refused(lone, code, "connect")


def test_a_second_primary_is_refused_after_one_more_try() -> None:
    lone = replica()
    ticket = lone.command("primary")
    lone.meta(packet(P.PING_ACK))
    assert lone.answered(ticket) is None, "the other one may be just dying"
    lone.at(lone.now + 0.7)
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and (answer.code, answer.text) == (-1, SENTENCES[-1])


def test_a_second_primary_is_accepted_when_the_other_one_died_meanwhile() -> None:
    lone = replica()
    ticket = lone.command("primary")
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    lone.at(lone.now + 0.7)
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.state.role == Role.PRIMARY


def test_the_peer_may_refuse() -> None:
    lone = secondary()
    ticket = lone.command("detach")
    lone.settle()
    lone.meta(pack_state_reply(-2, 0, False))
    lone.settle()
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and (answer.code, answer.text) == (-10, SENTENCES[-10])
    assert lone.local_disk() == D.UP_TO_DATE


def test_a_primary_alone_needs_the_peer_fenced() -> None:
    lone = Lone(disk={"fencing": Fencing.RESOURCE_ONLY})
    lone.attach()
    lone.connect()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    refused(lone, -7, "primary")


# ----------------------------------------------------------------------------------- what is not refused


@pytest.mark.parametrize(("where", "name"), [
    (diskless, "detach"), (primary, "primary"), (secondary, "secondary"), (secondary, "outdate"),
    (alone, "outdate"), (diskless, "attach"), (primary, "suspend-io"), (alone, "resume-io"), (alone, "down"),
])  # fmt: skip
def test_done_when_there_is_nothing_to_do_or_nothing_against_it(where: Callable[[], Lone], name: str) -> None:
    assert where().run(name) == "done"


def test_outdated_is_on_disk_before_the_answer() -> None:
    lone = alone()
    ticket = lone.command("outdate")
    assert lone.answered(ticket) is None and lone.disk
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.local_disk() == D.OUTDATED
    assert not lone.vol.flags() & MdFlag.WAS_UP_TO_DATE


def test_force_promotes_from_inconsistent_with_a_new_generation() -> None:
    lone = alone(flags=INCONSISTENT)
    old = lone.vol.uuids.current
    assert lone.run("primary", force=True) == "done"
    assert lone.state.role == Role.PRIMARY and lone.local_disk() == D.UP_TO_DATE
    assert lone.vol.uuids.current != old and lone.vol.uuids.bitmap == old


def test_promotion_alone_begins_a_new_generation_once() -> None:
    lone = primary_alone()
    current = lone.vol.uuids.current
    assert lone.vol.uuids.bitmap
    lone.run("secondary")
    lone.run("primary")
    assert lone.vol.uuids.current == current


def test_invalidate_alone_marks_everything_durably_first() -> None:
    lone = alone()
    ticket = lone.command("invalidate")
    (op,) = lone.disk
    assert op.area == META and op.offset == lone.layout.superblock
    assert lone.vol.full_sync_flag and lone.local_disk() == D.UP_TO_DATE and lone.answered(ticket) is None
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.local_disk() == D.INCONSISTENT
    assert lone.vol.bitmap.weight == lone.vol.n_bits and not lone.vol.full_sync_flag


def test_a_resync_agreed_to_is_not_decided_again_because_the_peer_was_forced() -> None:
    """The peer granted a full sync and waits for nothing more; its generation from before came behind its yes."""
    lone = Lone()
    lone.attach(fresh=True)
    inconsistent = replace(PEER_SECONDARY, disk=D.INCONSISTENT)
    lone.connect(inconsistent, uuids=(4, 0, 0, 0), bits=lone.vol.n_bits)
    lone.data(pack_state_change(0x1E03, DiskState.UP_TO_DATE << 9 | Role.PRIMARY, 0, False))
    ticket = lone.command("invalidate")
    lone.meta(pack_state_reply(1, 0, False))
    assert lone.answered(ticket) == "done" and lone.conn() == ConnState.STARTING_SYNC_T
    forced = State(Role.PRIMARY, Role.SECONDARY, ConnState.CONNECTED, DiskState.UP_TO_DATE, DiskState.INCONSISTENT)
    lone.data(Uuids(0x21, 4, 0, 0, lone.vol.n_bits, 0).pack(0), pack_state(forced.word(), 0))
    lone.settle()
    assert lone.conn() == ConnState.WF_SYNC_UUID
    lone.data(pack_sync_uuid(0x30, 0))
    assert lone.conn() == ConnState.SYNC_TARGET


def test_invalidate_remote_on_a_primary_alone() -> None:
    lone = primary_alone()
    assert lone.run("invalidate-remote") == "done"
    assert lone.vol.bitmap.weight == lone.vol.n_bits and lone.vol.al_suspended
    r = lone.submit(Op.WRITE)
    lone.settle()
    assert lone.done == [r] and lone.vol.al_writes == 0, "no need for a log while all bits are set"


def test_a_primary_detaches_only_with_the_peers_consent() -> None:
    lone = primary()
    ticket = lone.command("detach")
    assert lone.answered(ticket) is None
    lone.meta(pack_state_reply(1, 0, False))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.local_disk() == D.DISKLESS and lone.of(ReleaseDisk)


def test_a_detach_waits_for_what_is_out_on_the_disk() -> None:
    lone = primary()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    ticket = lone.command("detach")
    lone.meta(pack_state_reply(1, 0, False))
    others = [op for op in lone.disk if op is not r]
    while others:
        lone.answer(*others)
        others = [op for op in lone.disk if op is not r]
    assert lone.local_disk() == D.FAILED and not lone.of(ReleaseDisk) and lone.answered(ticket) is None
    lone.answer(r)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS and lone.answered(ticket) == "done"


def test_demotion_waits_until_the_peer_has_everything_stably() -> None:
    lone = primary()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    ticket = lone.command("secondary")
    lone.settle()
    assert lone.answered(ticket) is None and lone.sent(P.BARRIER) == [P.BARRIER] * 2, "the write, and a flush"
    lone.meta(pack_barrier_ack(0, 1))
    assert lone.answered(ticket) is None
    lone.meta(pack_barrier_ack(1, 1))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.state.role == Role.SECONDARY


def test_disconnecting_while_dialling_needs_nobody() -> None:
    lone = dialling()
    assert lone.run("disconnect") == "done" and lone.conn() == C.STAND_ALONE


def test_a_forced_disconnect_asks_nobody() -> None:
    lone = primary()
    assert lone.run("disconnect", force=True) == "done"
    assert lone.sent(P.CONN_ST_CHG_REQ) == [] and lone.conn() == C.STAND_ALONE


def test_down_demotes_disconnects_and_leaves_clean_metadata() -> None:
    lone = primary()
    ticket = lone.command("down")
    lone.settle()
    lone.meta(pack_state_reply(1, 0, True))
    written = []
    while lone.disk:
        written += [op for op in lone.disk if op.offset == lone.layout.superblock]
        lone.answer()
    assert lone.answered(ticket) == "done" and lone.of(ReleaseDisk)
    assert (lone.state.role, lone.state.conn, lone.local_disk()) == (Role.SECONDARY, C.STAND_ALONE, D.DISKLESS)
    assert written


# ------------------------------------------------------------------------------------------------ resize


def grow(lone: Lone, size: int, **args: Any) -> Refusal | str | None:
    ticket = lone.command("resize", **args)
    probe = lone.of(ProbeSize)[-1]
    lone.handle(DeviceGrown(probe.ticket, 0, size, size))
    lone.settle()
    return lone.answered(ticket)


def test_growing_moves_the_metadata_and_marks_the_new_space() -> None:
    lone = primary_alone()
    before = lone.vol.n_bits
    assert grow(lone, 128 << 20) == "done"
    assert lone.vol.size > 64 << 20 and lone.layout != lone.vol.layout
    assert lone.vol.bitmap.weight == lone.vol.n_bits - before
    assert not lone.vol.full_sync_flag and not lone.vol.io_holds


def test_assume_clean_leaves_the_new_space_clean() -> None:
    lone = primary_alone()
    assert grow(lone, 128 << 20, assume_clean=True) == "done"
    assert lone.vol.size > 64 << 20 and lone.vol.bitmap.weight == 0


def test_shrinking_is_not_implicit() -> None:
    lone = primary_alone()
    answer = grow(lone, 32 << 20)
    assert isinstance(answer, Refusal) and (answer.code, answer.text) == (170, SENTENCES[170])


def test_a_probe_that_comes_twice_changes_nothing_the_second_time() -> None:
    lone = primary_alone()
    grow(lone, 128 << 20)
    size, state = lone.vol.size, lone.state
    lone.handle(DeviceGrown(lone.of(ProbeSize)[-1].ticket, 0, 256 << 20, 256 << 20))
    lone.settle()
    assert (lone.vol.size, lone.state) == (size, state)


# ------------------------------------------------------------------------------------------- generations


def test_new_current_uuid_alone_moves_the_generations() -> None:
    lone = alone()
    old = lone.vol.uuids
    assert lone.run("new-current-uuid") == "done"
    assert lone.vol.uuids.bitmap == old.current & ~1 and lone.vol.uuids.current != old.current


def test_clear_bitmap_skips_the_initial_sync_of_two_fresh_disks() -> None:
    lone = Lone()
    lone.attach(fresh=True)
    lone.connect(
        replace(PEER_SECONDARY, disk=D.INCONSISTENT), uuids=(4, 0, 0, 0), bits=lone.vol.n_bits
    )
    lone.forget()
    assert lone.run("new-current-uuid", clear_bitmap=True) == "done"
    assert lone.local_disk() == lone.state.pdsk == D.UP_TO_DATE and lone.vol.bitmap.weight == 0
    assert lone.vol.uuids.bitmap == 0 and lone.sent(P.UUIDS, P.STATE) == [P.UUIDS]


# ------------------------------------------------------------------------------------------ stale tickets


def test_an_attach_that_comes_back_late_is_closed_again() -> None:
    lone = Lone()
    lone.command("attach")
    old = lone.of(Attach)[-1]
    lone.handle(AttachFailed(old.ticket, 0, Refusal(104, "Can not open backing device.")))
    lone.effects.clear()
    lone.handle(Attached(old.ticket, 0, lone.loaded()))
    assert lone.local_disk() == D.DISKLESS and [e.volume for e in lone.of(ReleaseDisk)] == [0]


def test_a_failure_of_an_earlier_attach_does_not_end_this_one() -> None:
    lone = Lone()
    lone.command("attach")
    old = lone.of(Attach)[-1].ticket
    lone.handle(AttachFailed(old, 0, Refusal(104, "Can not open backing device.")))
    ticket = lone.command("attach")
    lone.handle(AttachFailed(old, 0, Refusal(104, "Can not open backing device.")))
    lone.handle(Attached(old, 0, lone.loaded(generations=(0x777, 0, 0, 0))))
    assert lone.local_disk() == D.ATTACHING and lone.answered(ticket) is None
    lone.handle(Attached(lone.of(Attach)[-1].ticket, 0, lone.loaded(flags=IN_SYNC)))
    lone.settle()
    assert lone.answered(ticket) == "done"


# ------------------------------------------------------------------------------------------- auto-promote


def test_an_auto_promoted_node_is_demoted_behind_its_last_client() -> None:
    lone = Lone()
    lone.attach()
    assert lone.run("primary", auto=True) == "done"
    for count, role in ((1, Role.PRIMARY), (2, Role.PRIMARY), (1, Role.PRIMARY), (0, Role.SECONDARY)):
        lone.handle(Opened(0, count))
        lone.settle()
        assert lone.vol.state.role == role


def test_a_client_that_went_before_it_could_open_leaves_no_primary() -> None:
    lone = Lone()
    lone.attach()
    lone.run("primary", auto=True)
    lone.handle(Opened(0, 0))
    lone.settle()
    assert lone.vol.state.role == Role.SECONDARY


def test_who_was_promoted_by_hand_stays_primary() -> None:
    lone = Lone()
    lone.attach()
    lone.run("primary")
    lone.run("primary", auto=True)
    for count in (1, 0):
        lone.handle(Opened(0, count))
        lone.settle()
    assert lone.vol.state.role == Role.PRIMARY


def test_a_demotion_that_waits_for_the_peer_outlives_a_replay_with_nothing_to_send() -> None:
    lone = Lone().ready()
    lone.submit(Op.FLUSH)
    lone.settle()
    ticket = lone.command("secondary")
    assert lone.answered(ticket) is None
    for i in range(2):  # the application's flush, and that of the demotion
        lone.meta(pack_ack(P.WRITE_ACK, 0, 0, unpack_data(lone.payloads(P.DATA)[i])[1], 0, 1))
    assert lone.run("suspend-io") == "done"
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.connect()
    lone.run("resume-io")
    assert lone.answered(ticket) == "done" and lone.state.role == Role.SECONDARY


def test_a_demotion_waits_for_what_ended_sessions_left_under_way() -> None:
    """Done as Secondary it would reach the disk without the mark that has the activity log applied."""
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    ticket = lone.command("secondary")
    assert lone.answered(ticket) is None
    lone.settle()
    lone.meta(lone.ack(r))
    assert lone.done == [r]
    lone.meta(pack_barrier_ack(unpack_barrier(lone.payloads(P.BARRIER)[-1]), 1))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.state.role == Role.SECONDARY


@pytest.mark.parametrize("auto", [False, True])
def test_a_demotion_does_not_go_on_behind_a_promotion(auto: bool) -> None:
    """Whether it still has a volume before it, or waits for the peer to confirm the last writes."""
    lone = Lone(n_volumes=2)
    lone.attach()
    lone.primary()
    demotion = lone.command("secondary")
    assert [v.state.role for v in lone.engine.volumes.values()] == [Role.SECONDARY, Role.PRIMARY]
    promotion = lone.command("primary", auto=auto)
    lone.settle()
    assert lone.answered(promotion) == "done"
    assert [v.state.role for v in lone.engine.volumes.values()] == [Role.PRIMARY, Role.PRIMARY]
    answer = lone.answered(demotion)
    assert isinstance(answer, Refusal) and answer.code == -19


def test_a_demotion_that_waits_gives_way_to_a_promotion() -> None:
    lone = Lone().ready()
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    demotion = lone.command("secondary")
    assert lone.answered(demotion) is None, "the peer has to confirm the write as stable"
    assert lone.answered(lone.command("primary")) == "done"
    lone.handle(LinkLost(lone.engine.link.ticket, "reset"))
    lone.settle()
    answer = lone.answered(demotion)
    assert isinstance(answer, Refusal) and answer.code == -19 and lone.state.role == Role.PRIMARY


def test_a_client_that_comes_while_the_last_one_leaves_keeps_the_node_auto_promoted() -> None:
    lone = Lone(n_volumes=2)
    lone.attach()
    lone.run("primary", auto=True)
    lone.handle(Opened(0, 1))
    lone.handle(Opened(0, 0))
    lone.command("primary", auto=True)
    lone.settle()
    assert [v.state.role for v in lone.engine.volumes.values()] == [Role.PRIMARY, Role.PRIMARY]
    lone.handle(Opened(1, 1))
    lone.handle(Opened(1, 0))
    lone.settle()
    assert [v.state.role for v in lone.engine.volumes.values()] == [Role.SECONDARY, Role.SECONDARY]


def test_who_asked_to_leave_as_the_outdated_one_is_that_when_the_answer_is_lost() -> None:
    """The peer may have agreed, and goes on alone."""
    lone = Lone(disk={"fencing": Fencing.RESOURCE_AND_STONITH}).as_secondary()
    ticket = lone.command("disconnect")
    lone.meta(pack_state_reply(-7, 0, True))
    lone.settle()
    assert len(lone.payloads(P.CONN_ST_CHG_REQ)) == 2
    lone.engine.drop(C.NETWORK_FAILURE, "a ping was not answered")
    lone.settle()
    assert lone.answered(ticket) == "done"
    assert (lone.conn(), lone.local_disk()) == (C.STAND_ALONE, D.OUTDATED)
