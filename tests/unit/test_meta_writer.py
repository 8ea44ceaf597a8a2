"""Metadata in the only orders that survive a crash: one job at a time, pages before log blocks, data first."""

from __future__ import annotations

import errno

from tandem.repl.activity_log import ActivityLog, Transaction
from tandem.repl.bitmap import Bitmap
from tandem.repl.meta_writer import PAGES_PER_OP, CallbackOp, MetaWriter
from tandem.repl.metadata import MAGIC_CLEAN, MAGIC_UNCLEAN, MdFlag, Superblock, layout
from tandem.repl.requests import DATA, FUA, META, PREFLUSH, DiskOp, Op
from tandem.repl.states import DiskState, State
from tandem.repl.units import BITS_PER_PAGE, n_bits_of
from tandem.repl.uuids import UuidSet
from tandem.repl.volume import Volume

from tests.scenarios.pair import Given

PAGE = 4096


class Writer:
    """A `MetaWriter`, the operations it has out, and what it was told."""

    def __init__(self, size: int = 1 << 30, **disk: object) -> None:
        given = Given(size=size, disk=[disk, {}])
        config = given.config(0)
        self.vol = Volume(config.volumes[0], config.net)
        self.vol.state = State(disk=DiskState.UP_TO_DATE)
        self.vol.layout = self.where = layout("internal", size, size)
        self.vol.bitmap = Bitmap(n_bits_of(self.where.usable))
        self.vol.uuids = UuidSet(4, 0, 0, 0)
        self.out: list[DiskOp] = []
        self.failures: list[int] = []
        self.of_data: list[bool] = []  # whether each of them was the data's flush
        self.told: list[tuple[str, bool]] = []
        self.meta = MetaWriter(self.vol, self.out.append, self.failed)

    def failed(self, error: int, of_data: bool) -> None:
        self.failures.append(error)
        self.of_data.append(of_data)

    def tell(self, name: str):  # type: ignore[no-untyped-def]
        return lambda ok: self.told.append((name, ok))

    def answer(self, n: int | None = None, error: int = 0) -> list[str]:
        """The disk answers the first *n* operations that are out; what they were."""
        ops = self.out[:n]
        del self.out[: len(ops)]
        names = [self.name(op) for op in ops]
        for op in ops:
            op.error = error
            assert isinstance(op, CallbackOp)
            op.then(op)
        return names

    def name(self, op: DiskOp) -> str:
        if op.op == Op.FLUSH:
            return "flush data" if op.area == DATA else "flush meta"
        flags = "".join(f" {word}" for bit, word in ((FUA, "fua"), (PREFLUSH, "preflush")) if op.flags & bit)
        if op.offset == self.where.superblock:
            return f"superblock{flags}"
        if self.where.al <= op.offset < self.where.al + PAGE * self.where.al_blocks:
            return f"log {(op.offset - self.where.al) // PAGE}{flags}"
        assert op.area == META
        first = (op.offset - self.where.bitmap) // PAGE
        return f"pages {first}..{first + -(-op.length // PAGE) - 1}{flags}"

    def names(self) -> list[str]:
        return [self.name(op) for op in self.out]

    def all(self) -> list[str]:
        """Answer until nothing is out; everything in order."""
        seen = []
        while self.out:
            seen += self.answer(1)
        return seen

    def superblock(self, op: DiskOp) -> Superblock:
        assert op.payload is not None
        return Superblock.unpack(bytes(op.payload))


def transaction(evicted: tuple[int, ...] = (), position: int = 3) -> Transaction:
    """A log transaction that evicts these extents."""
    al = ActivityLog(67)
    al.want(0)
    begun = al.begin()
    assert begun is not None
    return Transaction(begun.block, position, begun.added, evicted)


# ------------------------------------------------------------------------------------------- superblock


def test_one_superblock_is_out_at_a_time_and_later_wishes_share_the_next() -> None:
    w = Writer()
    w.meta.superblock(w.tell("first"))
    w.vol.uuids = UuidSet(0x20, 0, 0, 0)
    w.meta.superblock(w.tell("second"))
    w.meta.superblock(w.tell("third"))
    assert w.names() == ["superblock fua"] and w.superblock(w.out[0]).current == 4
    w.answer()
    assert w.told == [("first", True)] and w.names() == ["superblock fua"]
    assert w.superblock(w.out[0]).current == 0x20
    w.answer()
    assert w.told == [("first", True), ("second", True), ("third", True)] and w.meta.idle


def test_without_md_flushes_nothing_is_forced_through() -> None:
    w = Writer(md_flushes=False)
    w.meta.superblock()
    w.meta.write_transaction(transaction(), w.tell("log"))
    assert w.names() == ["superblock", "log 3"]


def test_a_superblock_that_fails_tells_everybody_once() -> None:
    w = Writer()
    w.meta.superblock(w.tell("first"))
    w.meta.superblock(w.tell("second"))
    w.meta.write_changed(w.tell("pages"))
    w.answer(1, errno.EIO)
    assert sorted(w.told) == [("first", False), ("pages", False), ("second", False)] and w.failures == [errno.EIO]
    w.meta.superblock(w.tell("later"))
    w.meta.write_changed(w.tell("later"))
    assert w.told[-2:] == [("later", False), ("later", False)]


def test_a_superblock_that_fails_ends_a_clean_close() -> None:
    """Its disk is gone by then, and with it the place where the last superblock would go."""
    w = Writer()
    w.meta.superblock()
    w.meta.close([(0, bytes(PAGE))], w.tell("closed"))
    out = w.out.pop(0)
    while w.out:
        w.answer(1)
    out.error = errno.EIO
    assert isinstance(out, CallbackOp)
    out.then(out)
    assert w.out == []
    assert w.told == [("closed", False)] and w.failures == [errno.EIO]


# --------------------------------------------------------------------------------------- pages and blocks


def test_changed_pages_are_merged_and_a_flush_ends_the_job() -> None:
    w = Writer(size=2 << 30)
    for page in (0, 1, 2, 5):
        w.vol.bitmap.set(page * BITS_PER_PAGE, page * BITS_PER_PAGE + 1)
    w.meta.write_changed(w.tell("done"))
    assert w.names() == ["flush data"] or w.names() == ["pages 0..2", "pages 5..5"]
    seen = w.all()
    assert seen[-3:] == ["pages 0..2", "pages 5..5", "flush meta"] and w.told == [("done", True)]


def test_data_is_flushed_before_pages_that_show_cleared_bits() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 10)
    w.meta.write_changed()
    w.all()
    w.vol.bitmap.clear(0, 10)
    w.vol.data_version += 1
    w.meta.write_changed(w.tell("done"))
    assert w.names() == ["flush data"]
    w.answer()
    assert w.names() == ["pages 0..0"]
    w.all()
    assert w.told == [("done", True)]


def test_data_that_did_not_change_is_not_flushed_again() -> None:
    w = Writer()
    w.vol.data_version = 7
    w.meta.write_changed()
    assert w.all()[0] == "flush data"
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed()
    assert w.all() == ["pages 0..0", "flush meta"]


def test_data_written_while_the_flush_ran_needs_another_one() -> None:
    w = Writer()
    w.vol.data_version = 1
    w.meta.write_changed()
    w.vol.data_version = 2
    w.all()
    w.meta.write_changed()
    assert w.all()[0] == "flush data"


def test_the_log_block_follows_the_pages_of_what_it_evicts() -> None:
    w = Writer()
    w.vol.bitmap.set(32 * 1024, 32 * 1024 + 1)  # extent 32 lies on page 1
    w.meta.write_transaction(transaction(evicted=(32,)), w.tell("log"))
    seen = w.all()
    assert seen[-2:] == ["pages 1..1", "log 3 fua preflush"] and w.told == [("log", True)]


def test_an_eviction_flushes_the_data_even_without_pages() -> None:
    """What leaves the log counts as stable from then on."""
    w = Writer()
    w.meta.write_changed()
    w.all()
    w.vol.data_version += 1
    w.meta.write_transaction(transaction(evicted=(5,)), w.tell("log"))
    assert w.all() == ["flush data", "log 3 fua"]


def test_a_transaction_that_evicts_nothing_is_one_write() -> None:
    w = Writer()
    w.vol.data_version += 1
    w.meta.write_transaction(transaction(), w.tell("log"))
    assert w.all() == ["log 3 fua"] and w.vol.al_writes == 1


def test_one_job_at_a_time_so_that_no_page_is_overtaken() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed(w.tell("one"))
    w.vol.bitmap.set(1, 2)
    w.meta.write_changed(w.tell("two"))
    w.meta.write_transaction(transaction(), w.tell("three"))
    seen = []
    while w.out:
        jobs = [name for name in w.names() if not name.startswith("superblock")]
        assert len(jobs) == 1
        seen += w.answer(1)
    assert [name for name, ok in w.told if ok] == ["one", "two", "three"]
    assert [n for n in seen if n.startswith(("pages", "log"))] == ["pages 0..0", "pages 0..0", "log 3 fua"]


def test_the_superblock_does_not_wait_for_the_queue() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed()
    w.meta.superblock(w.tell("superblock"))
    assert "superblock fua" in w.names()


def test_a_page_shows_the_bits_of_the_moment_it_is_copied() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed()
    while w.names() == ["flush data"]:
        w.answer()
    (page,) = w.out
    w.vol.bitmap.set(8, 9)
    assert page.payload is not None and page.payload[:2] == b"\1\0"
    w.all()
    w.meta.write_changed()
    assert "pages 0..0" in w.all(), "the later bit made the page dirty again"


def test_many_pages_go_in_steps() -> None:
    w = Writer(size=64 << 30)
    w.vol.bitmap.set_all()
    w.meta.write_changed(w.tell("done"))
    steps = [name for name in w.all() if name.startswith("pages")]
    n_pages = w.vol.bitmap.n_pages
    assert n_pages > PAGES_PER_OP and steps[0] == f"pages 0..{PAGES_PER_OP - 1}"
    assert steps[-1].endswith(f"..{n_pages - 1}") and w.told == [("done", True)]


def test_the_last_page_ends_with_the_bitmap_area() -> None:
    w = Writer(size=64 << 20)  # the area is rounded to 4 KiB, its bits fill 2 KiB
    w.vol.bitmap.set_all()
    w.meta.write_changed()
    while w.out:
        for op in w.out:
            if op.area == META and op.op == Op.WRITE:
                assert op.offset + op.length <= w.where.bitmap + w.where.bitmap_bytes
        w.answer(1)


# -------------------------------------------------------------------------------------------------- ends


def test_a_failed_page_ends_everything() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed(w.tell("one"))
    w.meta.write_transaction(transaction(), w.tell("two"))
    while w.names() == ["flush data"]:
        w.answer()
    w.answer(1, errno.EIO)
    assert w.told == [("one", False), ("two", False)] and w.failures == [errno.EIO] and w.out == []
    assert w.of_data == [False]


def test_a_failed_data_flush_writes_no_page() -> None:
    w = Writer()
    w.vol.data_version += 1
    w.vol.bitmap.set(0, 1)
    w.meta.write_changed(w.tell("one"))
    assert w.names() == ["flush data"]
    w.answer(1, errno.EIO)
    assert w.out == [] and w.told == [("one", False)] and w.failures == [errno.EIO]
    assert w.of_data == [True], "the operator is told which of the two it was"


def test_kill_is_silent_towards_the_machine_and_what_is_out_is_only_counted() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.superblock(w.tell("superblock"))
    w.meta.write_changed(w.tell("pages"))
    n = len(w.out)
    assert w.meta.n_out == n > 0
    w.meta.kill(0)
    assert sorted(w.told) == [("pages", False), ("superblock", False)] and w.failures == []
    w.answer()
    assert w.meta.n_out == 0 and w.out == [] and len(w.told) == 2


def test_a_clean_end_writes_pages_ring_and_then_the_clean_superblock() -> None:
    w = Writer()
    w.vol.bitmap.set(0, 1)
    w.meta.superblock()
    w.meta.close([(0, bytes(PAGE)), (1, bytes(PAGE))], w.tell("closed"))
    magics = []
    while w.out:
        last = w.out[0]
        if last.offset == w.where.superblock and last.op == Op.WRITE:
            magics.append(w.superblock(last).magic)
        w.answer(1)
    assert magics == [MAGIC_UNCLEAN, MAGIC_CLEAN] and w.superblock(last).flags & MdFlag.AL_CLEAN
    assert w.told == [("closed", True)] and w.meta.idle


def test_the_end_of_a_primary_leaves_its_metadata_as_a_running_node_does() -> None:
    w = Writer()
    w.meta.close(None, w.tell("closed"))
    seen = []
    while w.out:
        if w.names()[0].startswith("superblock"):
            assert w.superblock(w.out[0]).magic == MAGIC_UNCLEAN
        seen += w.answer(1)
    assert seen[-1] == "superblock fua" and w.told == [("closed", True)]
