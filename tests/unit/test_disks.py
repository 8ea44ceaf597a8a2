"""A local disk from attach to detach: what metadata speaks for, what may not start too early, errors."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tandem.repl.attach import LoadedDisk
from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import Attach, Attached, AttachFailed, LinkLost, ReleaseDisk, RunHandler
from tandem.repl.metadata import MAGIC_UNCLEAN, MdFlag, Superblock
from tandem.repl.requests import DATA, FUA, META, DiskOp, Op
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import (
    DP_FUA,
    DP_SEND_WRITE_ACK,
    ID_SYNCER,
    Packet,
    Uuids,
    pack_ack,
    pack_data,
    pack_state,
    pack_state_change,
    pack_state_reply,
    unpack_data,
)

from tests.scenarios.lone import IN_SYNC, PEER_SECONDARY, Lone
from tests.scenarios.pair import GENERATIONS

P, D, C = Packet, DiskState, ConnState
OUTDATED = MdFlag.CONSISTENT | MdFlag.AL_CLEAN
INCONSISTENT = MdFlag.AL_CLEAN


def found(lone: Lone, **how: object) -> tuple[int, LoadedDisk]:
    """Begin to attach and hand over what the disk holds, without letting it answer anything."""
    ticket = lone.command("attach")
    disk = lone.loaded(**how)  # type: ignore[arg-type]
    lone.handle(Attached(lone.of(Attach)[-1].ticket, 0, disk))
    return ticket, disk


def superblocks(ops: list[DiskOp], lone: Lone) -> list[Superblock]:
    return [
        Superblock.unpack(bytes(op.payload))
        for op in ops
        if op.area == META and op.offset == lone.layout.superblock and op.payload is not None
    ]


def pages(lone: Lone) -> list[DiskOp]:
    """Bitmap pages on their way to the disk."""
    where = lone.layout
    end = where.bitmap + where.bitmap_bytes
    return [o for o in lone.disk if o.op == Op.WRITE and o.area == META and where.bitmap <= o.offset < end]


# ---------------------------------------------------------------------------------------------- attach


@pytest.mark.parametrize(("flags", "fencing", "disk", "pdsk"), [
    (IN_SYNC, Fencing.DONT_CARE, D.UP_TO_DATE, D.D_UNKNOWN),
    (IN_SYNC, Fencing.RESOURCE_ONLY, D.CONSISTENT, D.D_UNKNOWN),
    (IN_SYNC | MdFlag.PEER_OUT_DATED, Fencing.RESOURCE_ONLY, D.UP_TO_DATE, D.OUTDATED),
    (OUTDATED, Fencing.DONT_CARE, D.OUTDATED, D.D_UNKNOWN),
    (OUTDATED, Fencing.RESOURCE_ONLY, D.OUTDATED, D.D_UNKNOWN),
    (INCONSISTENT, Fencing.DONT_CARE, D.INCONSISTENT, D.D_UNKNOWN),
])  # fmt: skip
def test_what_the_metadata_speaks_for(
    flags: MdFlag, fencing: Fencing, disk: DiskState, pdsk: DiskState
) -> None:
    lone = Lone(disk={"fencing": fencing})
    lone.attach(flags=flags)
    assert (lone.local_disk(), lone.state.pdsk) == (disk, pdsk)


@pytest.mark.parametrize("flags", [IN_SYNC | MdFlag.PRIMARY_IND, IN_SYNC | MdFlag.CRASHED_PRIMARY])
def test_a_crashed_primary_is_recognised(flags: MdFlag) -> None:
    lone = Lone()
    lone.attach(flags=flags)
    assert lone.vol.crashed_primary and lone.vol.flags() & MdFlag.CRASHED_PRIMARY


def test_the_disk_is_marked_in_use_before_anything_is_answered() -> None:
    lone = Lone()
    ticket, _ = found(lone)
    assert lone.answered(ticket) is None and lone.vol.io_holds == 1
    (block,) = superblocks(lone.disk, lone)
    assert block.magic == MAGIC_UNCLEAN and not block.flags & MdFlag.AL_CLEAN
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.vol.io_holds == 0


def test_applications_wait_until_the_disk_is_marked_in_use() -> None:
    lone = Lone()
    lone.connect()
    lone.primary()
    lone.forget()
    found(lone)
    r = lone.submit(Op.WRITE)
    assert r not in lone.disk and r.waiting == 0


def test_metadata_that_can_not_be_written_is_refused() -> None:
    lone = Lone()
    ticket, _ = found(lone)
    lone.answer(error=errno.EIO)
    lone.settle()
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and answer.code == 118
    assert lone.local_disk() == D.DISKLESS and lone.of(ReleaseDisk)


def test_a_fresh_disk_is_all_out_of_sync_and_gets_its_log() -> None:
    lone = Lone()
    found(lone, fresh=True)
    written = []
    while lone.disk:
        written += lone.disk
        lone.answer()
    logs = {op.offset for op in written if lone.layout.al <= op.offset < lone.layout.al + 32768}
    assert len(logs) == lone.layout.al_blocks
    assert lone.local_disk() == D.INCONSISTENT and lone.vol.bitmap.weight == lone.vol.n_bits > 0
    assert lone.vol.uuids.current == 4 and superblocks(written, lone)[-1].la_size_sect == lone.vol.size // 512


def test_a_full_sync_flag_means_every_bit() -> None:
    lone = Lone()
    lone.attach(flags=INCONSISTENT | MdFlag.FULL_SYNC)
    assert lone.vol.bitmap.weight == lone.vol.n_bits


def test_a_crash_without_activity_log_means_every_bit() -> None:
    lone = Lone()
    lone.attach(flags=IN_SYNC | MdFlag.PRIMARY_IND | MdFlag.AL_DISABLED)
    assert lone.vol.bitmap.weight == lone.vol.n_bits


def test_what_the_activity_log_marked_is_told() -> None:
    lone = Lone()
    ticket = lone.command("attach")
    disk = replace(lone.loaded(), marked=1024, corrupt=2)
    lone.handle(Attached(lone.of(Attach)[-1].ticket, 0, disk))
    assert any("Marked additional 4096 KB" in n for n in lone.notes())
    assert any("2 corrupt AL transactions" in n for n in lone.notes())
    lone.settle()
    assert lone.answered(ticket) == "done"


def test_a_primary_takes_back_only_the_generation_it_showed() -> None:
    """Alone, after losing its disk: other data would change under the applications."""
    lone = Lone(options={"on_no_data_accessible": "suspend-io"}).ready()
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    shown = lone.vol.uuids
    lone.run("detach", force=True)
    assert lone.state.role == Role.PRIMARY and lone.local_disk() == D.DISKLESS
    ticket, _ = found(lone, generations=(0x777, 0, 0, 0))
    lone.settle()
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and answer.code == 150 and lone.local_disk() == D.DISKLESS
    quad = (shown.current, shown.bitmap, shown.history0, shown.history1)
    ticket, _ = found(lone, generations=quad, flags=IN_SYNC | MdFlag.PRIMARY_IND)
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.local_disk() == D.UP_TO_DATE


def test_attaching_while_connected_waits_for_the_decision() -> None:
    lone = Lone()
    lone.connect()
    lone.forget()
    found(lone)
    assert lone.local_disk() == D.NEGOTIATING and lone.sent() == [P.SIZES, P.UUIDS, P.STATE]
    lone.data(lone.parameters(replace(PEER_SECONDARY, conn=C.CONNECTED)))
    lone.settle()
    assert lone.local_disk() == D.UP_TO_DATE


def test_what_the_peer_said_before_it_heard_of_our_disk_decides_nothing() -> None:
    """Its generations may have moved since the handshake: it tells them again, and then its state."""
    lone = Lone().ready()
    lone.run("detach", force=True)
    lone.forget()
    found(lone, generations=(0x20, 0x10, 0, 0))
    before = pack_state(replace(PEER_SECONDARY, conn=C.CONNECTED).word(), 0)  # on its way when we attached
    lone.data(before)
    assert lone.local_disk() == D.NEGOTIATING and lone.conn() == C.CONNECTED
    lone.data(Uuids(0x30, 0x20, 0x10, 0, 0, 0).pack(0), before)
    assert lone.conn() == C.WF_BITMAP_T


def test_a_primary_without_a_disk_is_asked_before_our_disk_counts() -> None:
    """What it said before it heard of our disk is no consent to our generation: it may have moved on."""
    lone = Lone()
    lone.connect()
    found(lone)
    primary = replace(PEER_SECONDARY, role=Role.PRIMARY, conn=C.CONNECTED, disk=D.DISKLESS)
    lone.data(pack_state(replace(primary, pdsk=D.DISKLESS).word(), 0))
    assert lone.local_disk() == D.NEGOTIATING and not lone.vol.uuids.bitmap
    lone.data(pack_state(replace(primary, pdsk=D.UP_TO_DATE).word(), 0))
    assert lone.local_disk() == D.UP_TO_DATE
    assert lone.vol.uuids.bitmap, "it writes here alone from now on: a generation of its own"


def test_a_disk_that_is_negotiating_when_the_link_breaks_is_what_was_found() -> None:
    lone = Lone()
    lone.connect()
    found(lone)
    lone.engine.drop(C.NETWORK_FAILURE, "a test")
    lone.settle()
    assert lone.local_disk() == D.UP_TO_DATE and lone.conn() == C.WF_CONNECTION


def test_a_disk_that_comes_in_the_middle_of_a_handshake_waits_for_its_end() -> None:
    lone = Lone()
    lone.command("connect")
    ticket = lone.command("attach")
    attach = lone.of(Attach)[-1]
    lone.link()
    lone.data(lone.features())
    lone.handle(Attached(attach.ticket, 0, lone.loaded()))
    assert lone.local_disk() == D.ATTACHING and lone.disk == []
    lone.data(lone.protocol() + lone.parameters())
    lone.settle()
    assert lone.answered(ticket) is None or lone.answered(ticket) == "done"
    assert lone.local_disk() >= D.NEGOTIATING


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("policy", ["detach", "call-local-io-error"])
def test_an_error_costs_the_disk_and_the_peer_is_told(policy: str) -> None:
    lone = Lone(disk={"on_io_error": policy}, handlers=("local-io-error",)).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r, error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS and lone.of(ReleaseDisk)
    words = [int.from_bytes(p, "big") >> 9 & 15 for p in lone.payloads(P.STATE)]
    assert words == [D.FAILED, D.DISKLESS]
    assert bool([h for h in lone.of(RunHandler) if h.name == "local-io-error"]) == (policy != "detach")


def test_pass_on_keeps_the_disk_but_not_its_word() -> None:
    lone = Lone(disk={"on_io_error": "pass_on"}).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r, error=errno.EIO)
    assert lone.local_disk() == D.INCONSISTENT and not lone.sent(P.STATE)
    (written,) = superblocks(lone.disk, lone)
    assert not written.flags & MdFlag.CONSISTENT, "the peer may rely on it once it is on disk"
    lone.settle()
    assert lone.sent(P.STATE) == [P.STATE]
    lone.meta(lone.ack(r))
    assert r.error == 0 and lone.vol.bitmap.weight == 1


@pytest.mark.parametrize("op", [Op.FLUSH, Op.WRITE])
def test_pass_on_does_not_keep_a_disk_that_cannot_make_writes_stable(op: Op) -> None:
    """It may have lost any block since the last flush, and neither bitmap nor log would name them once it goes on."""
    lone = Lone(disk={"on_io_error": "pass_on"}).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    r = lone.submit(op, 8192, flags=FUA if op is Op.WRITE else 0)
    lone.answer(*lone.disk, error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    assert [n for n in lone.notes() if "IO error" in n] == [
        "Local data IO error EIO on /dev/fake0 in a flush, on-io-error pass_on, detached all the same"
    ]
    if op is Op.WRITE:
        lone.meta(lone.ack(r))
    else:
        (flush,) = [unpack_data(p) for p in lone.payloads(P.DATA) if len(p) == 24]
        lone.meta(pack_ack(P.WRITE_ACK, 0, 0, flush[1], 0, 1))
    assert r in lone.done and not r.error, "the peer has a good copy"


def test_what_was_written_elsewhere_meanwhile_is_not_read_from_a_disk_that_passes_errors_on() -> None:
    lone = Lone(disk={"on_io_error": "pass_on"}, net={"allow_two_primaries": True}).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    lone.answer(lone.submit(Op.WRITE, 8192), error=errno.EIO)
    lone.settle()
    lone.submit(Op.READ, 65536)
    assert lone.sent(P.DATA_REQUEST) == [P.DATA_REQUEST], "the other Primary sends an Inconsistent disk nothing"


def test_a_read_error_under_pass_on_changes_no_state() -> None:
    lone = Lone(disk={"on_io_error": "pass_on"}).ready()
    r = lone.submit(Op.READ)
    lone.answer(r, error=errno.EIO)
    assert lone.local_disk() == D.UP_TO_DATE and lone.sent(P.DATA_REQUEST) == [P.DATA_REQUEST]


@pytest.mark.parametrize("policy", ["detach", "pass_on"])
def test_a_data_flush_that_fails_before_metadata_is_written_is_told_as_such_and_detaches(policy: str) -> None:
    """Nobody knows what it lost, and the pages behind it call blocks clean: what is on disk must stay as it is."""
    lone = Lone(disk={"on_io_error": policy}).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    assert lone.vol.meta is not None
    lone.vol.meta.write_changed()
    lone.take()
    (flush,) = lone.disk
    assert (flush.op, flush.area) == (Op.FLUSH, DATA)
    lone.answer(flush, error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    assert [n for n in lone.notes() if "IO error" in n] == [
        f"Local data IO error EIO on /dev/fake0 in the flush before meta-data is written, on-io-error {policy}"
        + (", detached all the same" if policy == "pass_on" else "")
    ]


@pytest.mark.parametrize("op", [Op.FLUSH, Op.WRITE])
def test_no_bitmap_page_is_written_once_data_could_not_be_made_stable(op: Op) -> None:
    """The kernel says once that something is lost, so the flush in front of the pages may be told nothing of it."""
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    assert lone.vol.meta is not None
    lone.submit(op, 8192, flags=FUA if op is Op.WRITE else 0)
    failing = next(o for o in lone.disk if o.op == op and not o.area)
    lone.vol.bitmap.set(5, 6)
    lone.vol.meta.write_changed()
    lone.take()
    lone.answer(failing, error=errno.EIO)
    while lone.disk:
        assert not pages(lone)
        lone.answer()
    assert lone.local_disk() == D.DISKLESS


@pytest.mark.parametrize("op", [Op.FLUSH, Op.WRITE])
def test_a_write_that_waits_for_the_activity_log_meanwhile_goes_to_the_peer(op: Op) -> None:
    """Its transaction ends with the metadata: by then the disk must be known to have failed."""
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    waiting = lone.submit(Op.WRITE, 8 << 20)  # a cold extent
    lone.submit(op, 8192, flags=FUA if op is Op.WRITE else 0)
    lone.answer(next(o for o in lone.disk if o.op == op and not o.area), error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS and waiting in lone.out()
    lone.meta(lone.ack(waiting))
    assert waiting in lone.done and not waiting.error


def test_nor_by_a_detach_that_has_begun() -> None:
    lone = Lone().target((0, 4))
    lone.data(pack_data(P.RS_DATA_REPLY, 0, 0, ID_SYNCER, 0, 0, 16384) + bytes(16384))
    lone.answer()
    lone.data(pack_data(P.DATA, 0, 64, 77, 1, DP_FUA | DP_SEND_WRITE_ACK, 4096) + bytes(4096))
    (failing,) = [o for o in lone.disk if o.flags & FUA and not o.area]
    lone.command("down")
    for _ in range(50):
        others = [o for o in lone.disk if o is not failing]
        if not others or any(o.op == Op.FLUSH and not o.area for o in others):
            break
        lone.answer(*others)
    assert [o for o in lone.disk if o.op == Op.FLUSH and not o.area], "the flush before the last pages"
    lone.answer(failing, error=errno.EIO)
    while lone.disk:
        assert not pages(lone), "blocks that may be lost are called clean"
        lone.answer()
    assert lone.local_disk() == D.DISKLESS


def test_a_write_that_a_failed_flush_may_have_lost_is_not_answered_for_by_the_disk_when_it_comes_back() -> None:
    """It was written before the flush, and waits for a peer that is no good copy."""
    lone = Lone(options={"on_no_data_accessible": "suspend-io"}).source((0, 4))
    r = lone.submit(Op.WRITE, 1 << 20)
    lone.settle()
    assert r not in lone.done and r.waiting
    shown = lone.vol.uuids
    lone.submit(Op.FLUSH)
    lone.answer(*[o for o in lone.disk if o.op == Op.FLUSH], error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    quad = (shown.current, shown.bitmap, shown.history0, shown.history1)
    found(lone, generations=quad, flags=IN_SYNC | MdFlag.PRIMARY_IND)
    lone.settle()
    lone.run("disconnect", force=True)
    for _ in range(2):  # the first one is dropped, for the peer has forgotten what it was sent
        lone.at(lone.now + 2)
        lone.connect(uuids=(0x10, 0, 0, 0))
    assert lone.local_disk() == D.UP_TO_DATE and not lone.state.suspended
    assert r in lone.done and r.error == errno.EIO


def test_a_metadata_error_always_detaches() -> None:
    lone = Lone(disk={"on_io_error": "pass_on"}).ready()
    lone.submit(Op.WRITE)
    assert [op.area for op in lone.disk] == [META]
    lone.answer(error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    assert lone.sent(P.DATA) == [P.DATA], "the write goes on without the disk"


def test_the_disk_is_released_once_and_after_its_last_operation() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    first, second = lone.submit(Op.WRITE, 8192), lone.submit(Op.WRITE, 16384)
    lone.answer(first, error=errno.EIO)
    assert lone.of(ReleaseDisk) == [] and lone.local_disk() == D.FAILED
    lone.answer(second)
    lone.settle()
    assert [e.volume for e in lone.of(ReleaseDisk)] == [0] and lone.vol.n_local == 0


def test_a_failed_disk_takes_no_further_write() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    lone.settle()
    first, second = lone.submit(Op.WRITE, 8192), lone.submit(Op.WRITE, 16384)
    lone.answer(first, error=errno.EIO)
    third = lone.submit(Op.WRITE, 24576)
    assert third not in lone.disk and second in lone.disk
    assert len(lone.sent(P.DATA)) == 4, "but it is mirrored"


def test_a_secondary_that_lost_its_disk_refuses_and_can_attach_again() -> None:
    lone = Lone().as_secondary()
    lone.data(pack_data(P.DATA, 0, 8, 1, 1, 0x100, 4096) + bytes(4096))
    lone.answer(error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    found(lone)
    assert lone.local_disk() == D.NEGOTIATING


def test_a_clean_detach_of_a_secondary_writes_the_bitmap_first() -> None:
    lone = Lone()
    lone.attach()
    lone.vol.bitmap.set(0, 9)
    assert lone.run("detach") == "done"
    assert lone.local_disk() == D.DISKLESS and lone.vol.bm_writes == 1


def without_disk(lone: Lone) -> Lone:
    """A Primary whose disk fails while the peer goes on."""
    lone.ready().submit(Op.WRITE)
    lone.answer(error=errno.EIO)
    lone.settle()
    assert lone.local_disk() == D.DISKLESS and lone.conn() == C.CONNECTED
    return lone


def test_the_disk_of_a_primary_is_not_taken_back_after_the_peer_went_on() -> None:
    """Also when the link went before the peer's new generation was heard of."""
    lone = without_disk(Lone())
    lone.handle(LinkLost(lone.engine.link.ticket, "reset"))
    ticket, _ = found(lone)
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and answer.code == 150 and lone.local_disk() == D.DISKLESS


def test_the_disk_of_a_primary_is_not_taken_back_when_the_peer_that_went_on_loses_its_own() -> None:
    lone = without_disk(Lone())
    found(lone)
    lone.settle()
    assert lone.local_disk() == D.NEGOTIATING
    gone = replace(PEER_SECONDARY, conn=C.CONNECTED, peer=Role.PRIMARY, disk=D.FAILED, pdsk=D.UP_TO_DATE)
    lone.data(Uuids(*GENERATIONS, 0, 0).pack(0), pack_state(gone.word(), 0))
    lone.settle()
    assert (lone.local_disk(), lone.state.pdsk) == (D.DISKLESS, D.FAILED)


@pytest.mark.parametrize(("theirs", "disk"), [(D.UP_TO_DATE, D.UP_TO_DATE), (D.OUTDATED, D.OUTDATED)])
def test_a_disk_that_was_to_be_overwritten_is_good_again_when_the_source_loses_its_own(
    theirs: DiskState, disk: DiskState
) -> None:
    """Unless the source has gone on without it. Its writes since are here, and perhaps here only."""
    lone = Lone().as_secondary()
    lone.data(pack_state_change(0x1F0, C.STARTING_SYNC_S << 4, 0, False))
    assert (lone.conn(), lone.local_disk()) == (C.STARTING_SYNC_T, D.OUTDATED)
    before = lone.vol.uuids.current
    gone = replace(PEER_SECONDARY, role=Role.PRIMARY, conn=C.CONNECTED, disk=D.FAILED, pdsk=theirs)
    lone.data(pack_state(gone.word(), 0))
    assert (lone.conn(), lone.local_disk()) == (C.CONNECTED, disk)
    assert (lone.vol.uuids.current != before) == (disk == D.UP_TO_DATE), "what is written now is newer than the peer's"


def test_who_lost_its_disk_while_it_asked_for_a_resync_keeps_the_connection() -> None:
    lone = Lone().ready()
    ticket = lone.command("invalidate-remote")
    lone.submit(Op.WRITE)
    lone.answer(error=errno.EIO)
    lone.settle()
    lone.meta(pack_state_reply(1, 0, False))
    answer = lone.answered(ticket)
    assert isinstance(answer, Refusal) and answer.code == -4 and lone.conn() == C.CONNECTED


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("command", ["down", "detach"])
def test_an_attach_that_is_under_way_is_given_up(command: str, late: bool) -> None:
    """Reading a large bitmap takes a while, and a disk may not answer at all."""
    lone = Lone()
    attach = lone.command("attach")
    ticket = lone.of(Attach)[-1].ticket
    assert lone.local_disk() == D.ATTACHING
    assert lone.run(command) == "done" and lone.local_disk() == D.DISKLESS
    refused = lone.answered(attach)
    assert isinstance(refused, Refusal) and refused.hint == f"{command} came before the disk was attached"
    assert lone.of(ReleaseDisk)
    refusal = Refusal(104, "Can not open backing device.")
    lone.handle(Attached(ticket, 0, lone.loaded()) if late else AttachFailed(ticket, 0, refusal))
    lone.settle()
    assert lone.local_disk() == D.DISKLESS
    lone.attach()
    assert lone.local_disk() == D.UP_TO_DATE, "another one begins anew"
