"""Bugs planted by hand, to show that the simulator finds them.

Each plant changes one rule of the machine the way a programmer might get it wrong. It is put in place by a
`MonkeyPatch` and gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
from tandem.repl import activity_log, conflicts, decision, peer, transition, uuids
from tandem.repl.activity_log import Replay
from tandem.repl.bitmap import Bitmap
from tandem.repl.bitmap_exchange import BitmapReceiver
from tandem.repl.config import AfterSb, Fencing
from tandem.repl.conflicts import Conflicts
from tandem.repl.disks import Disks
from tandem.repl.engine import Engine
from tandem.repl.fencing import FencingRoom
from tandem.repl.intervals import Intervals, Lock
from tandem.repl.local_flush import LocalFlush, LocalFlushes
from tandem.repl.meta_writer import MetaWriter
from tandem.repl.mirror import Mirror
from tandem.repl.replica import Replica
from tandem.repl.requests import FUA, LOCAL, LOCAL_OK, PEER, PREFLUSH, DiskOp, Op, Request
from tandem.repl.resync_source import Asked, Source
from tandem.repl.resync_target import Target
from tandem.repl.transfer_log import TransferLog
from tandem.repl.volume import Volume
from tandem.repl.wire import Packet

from tests.sim import long_write_plants as begun
from tests.sim import mixes
from tests.sim.mix import Mix

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Plant:
    """*says*: the bug in words. *put* plants it. *tune* draws the runs closer to where it can show, for a bug
    that random mixes meet only now and then."""

    name: str
    says: str
    put: Callable[[Patch], None]
    tune: Callable[[Mix], Mix] = lambda mix: mix


def _log_not_flushed(mp: Patch) -> None:
    original = MetaWriter._op

    def op(self: Any, op: int, offset: int, payload: Any, flags: int, *rest: Any, **more: Any) -> None:
        original(self, op, offset, payload, flags & ~(PREFLUSH | FUA), *rest, **more)

    mp.setattr(MetaWriter, "_op", op)


def _peer_not_flushed(mp: Patch) -> None:
    """The peer's flush request is answered without flushing."""
    original = Replica.write

    def write(self: Any, vol: Any, cmd: int, sector: int, block_id: int, dp: int, length: int, *rest: Any) -> None:
        if cmd == Packet.DATA and not length:
            self.epoch.size += 1
            self.e.send_ack(Packet.WRITE_ACK, vol, sector, block_id, 0)
            return
        original(self, vol, cmd, sector, block_id, dp, length, *rest)

    mp.setattr(Replica, "write", write)


def _flush_covers_too_much(mp: Patch) -> None:
    original = LocalFlushes._done

    def done(self: Any, vol: Volume, flush: LocalFlush, op: DiskOp) -> None:
        flush.version = vol.data_version
        original(self, vol, flush, op)

    mp.setattr(LocalFlushes, "_done", done)


def _flush_only_here(mp: Patch) -> None:
    """A flush is not passed on to the peer."""

    def send(self: Any, vol: Any, *, answers: bool = False) -> None:
        if answers:
            vol.flush_legs &= ~PEER

    mp.setattr(TransferLog, "send_flush", send)


def _ack_before_disk(mp: Patch) -> None:
    """The secondary acknowledges a write when it arrives, not when it is on its disk."""
    original_run, original_ack = Replica.receive_run, Replica._ack_run

    def run(self: Any, vol: Any, view: memoryview, at: int) -> int:
        known = len(self.e.out.disk)
        end = original_run(self, vol, view, at)
        for w in self.e.out.disk[known:]:
            self.e.send_ack(Packet.WRITE_ACK, vol, w.sector, w.block_id, w.length)
        return end

    def ack(self: Any, plain: list[Any]) -> None:
        meta = self.e.out.meta
        n = len(meta)
        original_ack(self, plain)
        del meta[n:]

    mp.setattr(Replica, "receive_run", run)
    mp.setattr(Replica, "_ack_run", ack)


def _answer_without_peer(mp: Patch) -> None:
    """A write is answered when the local disk has it."""
    original = Mirror.local_done

    def done(self: Any, ops: list[Request]) -> None:
        for r in ops:
            if r.waiting & PEER and r.op != Op.READ:
                r.waiting &= ~PEER
                self.e.volumes[r.volume].n_pending -= 1
        original(self, ops)

    mp.setattr(Mirror, "local_done", done)


def _bits_cleared_when_asked_for(mp: Patch) -> None:
    """Both sides clear the bits of a block before it is on the target's disk."""
    ask, reply = Target._ask, Source._reply

    def asked(self: Any, vol: Any, run: Any) -> None:
        ask(self, vol, run)
        for lock in run.out.values():
            vol.set_in_sync(lock.offset, lock.length)

    def replied(self: Any, vol: Any, asked: Asked, op: DiskOp) -> bool:
        vol.set_in_sync(op.offset, op.length)
        return reply(self, vol, asked, op)

    mp.setattr(Target, "_ask", asked)
    mp.setattr(Source, "_reply", replied)


def _stale_resync_block(mp: Patch) -> None:
    """The source reads a block without locking it against application writes."""
    original = Intervals.blocker
    original_add, original_remove = Intervals.add, Intervals.remove

    def add(self: Any, entry: Any) -> None:
        if not isinstance(entry, Lock):
            original_add(self, entry)

    def remove(self: Any, entry: Any) -> Any:
        return [] if isinstance(entry, Lock) else original_remove(self, entry)

    mp.setattr(Intervals, "blocker", lambda self, offset, length: original(self, offset, length))
    mp.setattr(Intervals, "add", add)
    mp.setattr(Intervals, "remove", remove)


def _overlaps_not_serialised(mp: Patch) -> None:
    mp.setattr(Intervals, "blocker", lambda self, offset, length: None)
    mp.setattr(Intervals, "add", lambda self, entry: self.busy.setdefault(-id(entry), entry))
    mp.setattr(Intervals, "remove", lambda self, entry: (self.busy.pop(-id(entry), None) and []) or [])


def _lost_barrier(mp: Patch) -> None:
    """A barrier is acknowledged at once, without waiting for its writes or flushing."""

    def barrier(self: Any, number: int) -> None:
        epoch, self.epoch = self.epoch, type(self.epoch)()
        if epoch.size:
            epoch.barrier = number
            self._ack_epoch(epoch)

    mp.setattr(Replica, "barrier", barrier)


def _bits_not_set_on_loss(mp: Patch) -> None:
    """What the peer may have lost with the connection is not marked."""
    original = TransferLog.connection_lost

    def lost(self: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Volume, "set_out_of_sync", lambda *a: 0)
            original(self)

    mp.setattr(TransferLog, "connection_lost", lost)


def _settled_writes_forgotten(mp: Patch) -> None:
    mp.setattr(TransferLog, "_miss_settled", lambda self, vol, epochs: None)


def _no_new_generation(mp: Patch) -> None:
    mp.setattr(uuids.UuidSet, "new_current", lambda self, random64, primary: self)


def _write_before_log(mp: Patch) -> None:
    """A write to a cold extent does not wait for the transaction."""
    original = Mirror._take_extents

    def take(self: Any, vol: Any, r: Any) -> bool:
        if original(self, vol, r):
            return True
        self.kick_activity_log(vol)
        return True

    mp.setattr(Mirror, "_take_extents", take)


def _page_not_written_on_eviction(mp: Patch) -> None:
    mp.setattr(Bitmap, "is_dirty", lambda self, page: False)


def _failed_flush_passed_on(mp: Patch) -> None:
    original = Disks.failed

    def failed(self: Any, *args: Any, flush: bool = False, **kwargs: Any) -> None:
        original(self, *args, **kwargs)

    mp.setattr(Disks, "failed", failed)


def _log_not_applied(mp: Patch) -> None:
    original = activity_log.replay

    def replay(blocks: Any, stripes: int = 1) -> Replay:
        return replace(original(blocks, stripes), hot=frozenset())

    mp.setattr(activity_log, "replay", replay)


def _bitmaps_not_merged(mp: Patch) -> None:
    """The peer's bitmap is received and thrown away."""
    mp.setattr(Bitmap, "merge", lambda self, word_offset, words: 0)
    mp.setattr(BitmapReceiver, "_set_runs", lambda self, *a: None, raising=False)


def _wrong_uuid_rule(mp: Patch) -> None:
    """Own current = the peer's bitmap UUID is taken for being newer instead of older."""
    original = uuids.compare

    def compare(own: Any, theirs: Any, facts: Any) -> Any:
        verdict = original(own, theirs, facts)
        return replace(verdict, value=-verdict.value) if verdict.rule in (50, 70) else verdict

    from tandem.repl import decision

    mp.setattr(decision, "compare", compare)


def _crashed_primary_forgotten(mp: Patch) -> None:
    """Rule 40 without the crash flags: two equal generations never resync."""
    from tandem.repl import decision

    original = uuids.compare

    def compare(own: Any, theirs: Any, facts: Any) -> Any:
        return original(own, theirs, replace(facts, own_crashed=False, peer_crashed=False))

    mp.setattr(decision, "compare", compare)


def _primary_mark_missing(mp: Patch) -> None:
    original = Volume.flags
    mp.setattr(Volume, "flags", lambda self: original(self) & ~2)


def _stonith_does_not_freeze(mp: Patch) -> None:
    from tandem.repl.states import State

    mp.setattr(State, "suspended", property(lambda self: self.susp or self.susp_nod))


def _ack_of_failed_write(mp: Patch) -> None:
    """The secondary acknowledges a write that its disk failed."""
    original = Replica.local_done

    def done(self: Any, ops: list[Any]) -> None:
        for w in ops:
            w.error = 0
        original(self, ops)

    mp.setattr(Replica, "local_done", done)


def _local_error_ignored(mp: Patch) -> None:
    original = Mirror.local_done

    def done(self: Any, ops: list[Any]) -> None:
        for r in ops:
            r.error = 0
        original(self, ops)

    mp.setattr(Mirror, "local_done", done)


def _fua_not_passed_on(mp: Patch) -> None:
    """The peer writes a FUA write like any other."""
    original = Engine.take

    def take(self: Any) -> Any:
        out = original(self)
        for op in out.disk:
            if type(op).__name__ == "PeerWrite":
                op.flags &= ~FUA
        return out

    mp.setattr(Engine, "take", take)


def _late_answer_counts(mp: Patch) -> None:
    """What fence-peer says counts, whatever has happened since it was started."""
    original = FencingRoom.fence

    def fence(self: Any, then: Callable[[bool], None]) -> None:
        if self.policy is Fencing.DONT_CARE:
            original(self, then)
            return

        def exited(code: int) -> None:
            self._running = False
            then(self._outcome(code))

        self._running = True
        self.e.run_handler("fence-peer", None, exited)

    mp.setattr(FencingRoom, "fence", fence)


def _broken_handler_believed(mp: Patch) -> None:
    """A fence handler that failed is taken for one that fenced the peer."""
    original = FencingRoom._outcome
    mp.setattr(FencingRoom, "_outcome", lambda self, code: original(self, code if 3 <= code <= 7 else 4))


def _promotion_without_fencing(mp: Patch) -> None:
    """A node that does not see its peer becomes Primary without having it fenced."""
    mp.setattr(transition, "_ADMISSIBLE", tuple(row for row in transition._ADMISSIBLE if row.code != -7))


def _split_brain_joined(mp: Patch) -> None:
    """A split brain that no policy solves is solved by throwing a coin."""

    def solve(f: Any, draft: Any) -> None:
        draft.split_brain, draft.value = True, -1 if f.compare.resolver else 1

    mp.setattr(decision, "_solve_split_brain", solve)


def _policy_too_bold(mp: Patch) -> None:
    """after-sb-1pri disconnect discards the Secondary."""
    zero, one, two = decision._SOLVERS

    def bold(f: Any) -> Any:
        return one(replace(f, after_sb_1pri=AfterSb.DISCARD_SECONDARY) if f.after_sb_1pri == 0 else f)

    mp.setattr(decision, "_SOLVERS", (zero, bold, two))


def _wrong_side_discarded(mp: Patch) -> None:
    """--discard-my-data discards the other node's."""
    original = peer.Peer._facts

    def facts(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        return replace(found, own_discard=found.peer_discard, peer_discard=found.own_discard)

    mp.setattr(peer.Peer, "_facts", facts)


def _conflicts_not_resolved(mp: Patch) -> None:
    """Two Primaries: each writes what the other sends when it comes."""
    mp.setattr(Conflicts, "settle", lambda self, vol, w: [])


def _leaves_up_to_date(mp: Patch) -> None:
    """A node that asked to part as the Outdated one, and was let go, stays UpToDate."""
    original, flags = Engine.stand_alone, Volume.flags

    def stand_alone(self: Any, why: str, outdate: str = "") -> None:
        original(self, why, "" if outdate == "disk" else outdate)

    def good(self: Any) -> Any:
        leaving, self.leaving = self.leaving, False
        found = flags(self)
        self.leaving = leaving
        return found

    mp.setattr(Engine, "stand_alone", stand_alone)
    mp.setattr(Volume, "flags", good)


def _fua_beneath(mp: Patch) -> None:
    """A FUA write beneath the other Primary's ordinary write is answered like any other."""
    original = Conflicts.write_beneath

    def write_beneath(self: Any, vol: Any, w: Any, ours: Any) -> None:
        w.flags &= ~FUA
        original(self, vol, w, ours)

    mp.setattr(Conflicts, "write_beneath", write_beneath)


def _covered_early(mp: Patch) -> None:
    """A write is answered while what covers it is on the way to the disk."""
    original = Conflicts.settle

    def settle(self: Any, vol: Any, w: Any) -> Any:
        ours = {r: r.waiting for r in vol.intervals.overlapping(w.offset, w.length) if isinstance(r, Request)}
        for r in ours:
            r.waiting &= ~LOCAL
        found = original(self, vol, w)
        for r, legs in ours.items():
            r.waiting = legs
        return found

    mp.setattr(Conflicts, "settle", settle)


def _uncovered_forgotten(mp: Patch) -> None:
    """Of a write that the other Primary's covers in part, nothing is written."""
    mp.setattr(conflicts, "_uncovered", lambda w, ours: iter(()))


def _demotion_at_once(mp: Patch) -> None:
    """A node is demoted while its clients' last requests are under way."""

    def when_quiet(self: Any, vol: Any, then: Callable[[], None], *, answered: bool = False) -> None:
        vol.n_app = 0
        then()

    mp.setattr(Engine, "when_quiet", when_quiet)


def _secondary_begins_a_generation(mp: Patch) -> None:
    """Whoever loses its peer begins a generation, also a Secondary."""
    original = Engine.change_conn

    def change_conn(self: Any, conn: Any, *rest: Any, **more: Any) -> None:
        lost = [v for v in self.volumes.values() if conn < 10 <= v.state.conn and v.state.disk == v.state.pdsk == 8]
        original(self, conn, *rest, **more)
        for vol in lost:
            if not vol.uuids.bitmap:
                self.start_new_generation(vol)

    mp.setattr(Engine, "change_conn", change_conn)


PLANTS = (
    Plant("log not flushed", "metadata is written without preflush and FUA", _log_not_flushed),
    Plant("missing flush on the peer", "the peer answers a flush without flushing", _peer_not_flushed),
    Plant("flush only here", "a flush is answered when the local disk is flushed", _flush_only_here),
    Plant("flush covers too much", "a flush counts for what was written while it was out", _flush_covers_too_much),
    Plant("ack too early", "the secondary acks a write before it is on disk", _ack_before_disk),
    Plant("answer without the peer", "the primary answers before the peer's ack", _answer_without_peer),
    Plant(
        "bit cleared too early",
        "bits are cleared before the block is on the target's disk",
        _bits_cleared_when_asked_for,
        mixes.many_cuts,
    ),
    Plant("stale resync block", "resync does not lock out application writes", _stale_resync_block),
    Plant("overlaps not serialised", "overlapping writes are in flight together", _overlaps_not_serialised),
    Plant("lost barrier", "a barrier is acked before its writes are done and flushed", _lost_barrier),
    Plant("no marks on a lost link", "unacknowledged writes are not marked", _bits_not_set_on_loss),
    Plant("no new generation", "a primary that lost its peer keeps its UUID", _no_new_generation),
    Plant("write before log", "a write does not wait for the activity log", _write_before_log),
    Plant(
        "eviction without page",
        "an extent leaves the log, its bits are not on disk",
        _page_not_written_on_eviction,
        mixes.many_extents_and_crashes,
    ),
    Plant("log not applied", "attach ignores the activity log", _log_not_applied),
    Plant("bitmaps not merged", "the peer's bitmap is ignored", _bitmaps_not_merged),
    Plant("wrong UUID rule", "rules 50 and 70 have their signs swapped", _wrong_uuid_rule),
    Plant("crash flag ignored", "rule 40 forgets who crashed", _crashed_primary_forgotten, mixes.process_crashes),
    Plant("no primary mark", "PRIMARY_IND never reaches the disk", _primary_mark_missing),
    Plant(
        "stonith does not freeze",
        "I/O goes on while fencing",
        _stonith_does_not_freeze,
        mixes.lost_links_under_stonith,
    ),
    Plant("failed write acked", "the secondary acks what its disk failed", _ack_of_failed_write, mixes.failing_disks),
    Plant(
        "failed flush passed on",
        "a disk stays in use after a flush that failed",
        _failed_flush_passed_on,
        mixes.failing_flushes,
    ),
    Plant("local error ignored", "the primary ignores its disk's error", _local_error_ignored),
    Plant("FUA dropped on the peer", "the peer does not write through", _fua_not_passed_on, mixes.power_cuts),
    Plant("late answer counts", "fence-peer's answer outlives a reconnect", _late_answer_counts, mixes.fences_often),
    Plant(
        "broken handler believed",
        "a failed fence-peer counts as success",
        _broken_handler_believed,
        mixes.fences_often,
    ),
    Plant(
        "promotion unfenced",
        "a lone node is promoted unfenced",
        _promotion_without_fencing,
        mixes.loses_links_unfrozen,
    ),
    Plant("split brain joined", "an unsolved split brain gets a direction", _split_brain_joined, mixes.splits_brains),
    Plant("policy too bold", "disconnect is taken for discard-secondary", _policy_too_bold, mixes.splits_brains),
    Plant("wrong side discarded", "--discard-my-data hits the peer", _wrong_side_discarded, mixes.splits_brains),
    Plant("leaves UpToDate", "who leaves as the Outdated one stays UpToDate", _leaves_up_to_date, mixes.leaves_often),
    Plant("FUA beneath", "a FUA write is answered before all of it is stable", _fua_beneath, mixes.fua_at_once),
    Plant("covered early", "a write that is covered is answered too soon", _covered_early, mixes.two_write_at_once),
    Plant("uncovered", "what stands out is not written", _uncovered_forgotten, mixes.two_write_at_once),
    Plant("demotion at once", "requests outlive the role", _demotion_at_once, mixes.ends_sessions),
    Plant(
        "needless generation",
        "a Secondary begins one",
        _secondary_begins_a_generation,
        mixes.careful_without_fencing,
    ),
    Plant(
        "settled forgotten",
        "answered writes are not marked",
        _settled_writes_forgotten,
        mixes.power_cuts_behind_short_epochs,
    ),
    Plant("acked when begun", "a long write is acked when it begins", begun.acked_when_begun, mixes.long_writes),
    Plant(
        "abandoned acked", "a write that never came whole is acked", begun.abandoned_acked, mixes.long_writes_and_cuts
    ),
    Plant(
        "begun in a resync",
        "nothing waits for such a write",
        begun.begun_during_a_resync,
        mixes.long_writes_and_resyncs,
    ),
    Plant("FUA begun", "a FUA write begins like any other", begun.fua_begun, mixes.long_writes),
    Plant("conflicts ignored", "two Primaries overwrite each other", _conflicts_not_resolved, mixes.two_write_at_once),
)

__all__ = ["LOCAL", "LOCAL_OK", "PLANTS", "Plant", "peer"]
