"""Writes one volume's metadata, in the only orders that survive a crash.

Relies on: the disk edge honours FUA and PREFLUSH, and answers each operation once. Decides:

* Superblock writes are versions of one value: one is out at a time, later wishes share the next one, and
  whoever must wait for durability is called back with success or failure.
* Bitmap pages and activity-log blocks go through one queue per volume, one job at a time, so a page can
  never be overtaken by an older copy of itself, and an activity-log block that evicts extents follows
  their bitmap pages.
* Before a page that shows cleared bits is written, and before an extent leaves the log, the data device
  is flushed: what the metadata calls clean must be stable first.

Source of the order rules: kernel 8.4 writes the hinted pages, then the log block with preflush and FUA.
The data flush is ours, because file-backed and external metadata do not share the data's write cache.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from .activity_log import Transaction
from .metadata import MAGIC_CLEAN, MAGIC_UNCLEAN, MdFlag
from .requests import DATA, FUA, META, PREFLUSH, Buffer, DiskOp, Op
from .volume import Volume

Then = Callable[[bool], None]
Failed = Callable[[int, bool], None]  # gets the errno of the first failure, and whether it was the data's flush

PAGE: Final = 4096
PAGES_PER_OP: Final = 256  # 1 MiB: large enough for the disk, small enough to copy


class CallbackOp(DiskOp):
    """A disk operation of the control plane: its answer goes to one function."""

    __slots__ = ("then",)

    def __init__(
        self, op: int, volume: int, offset: int, length: int, payload: Buffer | None, flags: int, area: int,
        then: Callable[[DiskOp], None],
    ) -> None:  # fmt: skip
        super().__init__(op, volume, offset, length, payload, flags, area)
        self.then = then


class Job:
    """Pages to write and, after them, at most one activity-log block."""

    __slots__ = ("blocks", "flush_data", "pages", "then", "wrote_pages")

    def __init__(
        self, pages: list[int], blocks: list[tuple[int, bytes]], flush_data: bool, then: Then | None
    ) -> None:
        self.pages = pages
        self.blocks = blocks
        self.flush_data = flush_data
        self.then = then
        self.wrote_pages = bool(pages)  # then the block must not become durable before them


class MetaWriter:
    """The metadata writer of one attached volume. *emit* puts an operation into the outbox."""

    def __init__(self, volume: Volume, emit: Callable[[DiskOp], None], failed: Failed) -> None:
        self._volume = volume
        self._emit = emit
        self._failed = failed
        self._dead = False
        self.n_out = 0  # operations the disk has not answered
        self._sb_wanted = 0
        self._sb_out = 0  # version in flight, 0: none
        self._sb_durable = 0
        self._sb_waiters: list[tuple[int, Then]] = []
        self._jobs: deque[Job] = deque()
        self._job: Job | None = None
        self._step_out = 0
        self._flushed_version = -1

    @property
    def idle(self) -> bool:
        return not self._sb_out and self._job is None and not self._jobs

    # ------------------------------------------------------------------------------ superblock

    def superblock(self, then: Then | None = None) -> None:
        """Make the superblock of this moment durable; *then* is told whether it is."""
        if self._dead:
            if then:
                then(False)
            return
        self._sb_wanted += 1
        if then:
            self._sb_waiters.append((self._sb_wanted, then))
        if not self._sb_out:
            self._write_superblock()

    def _write_superblock(self, magic: int = MAGIC_UNCLEAN, extra: int = 0) -> None:
        layout = self._volume.layout
        assert layout is not None
        self._sb_out = self._sb_wanted
        block = self._volume.superblock(magic, extra).pack()
        flags = FUA if self._volume.config.disk_options.md_flushes else 0
        self._op(Op.WRITE, layout.superblock, block, flags, self._superblock_done)

    def _superblock_done(self, op: DiskOp) -> None:
        version, self._sb_out = self._sb_out, 0
        if op.error:
            self.kill(op.error)
            return
        self._sb_durable = version
        ready = [then for wanted, then in self._sb_waiters if wanted <= version]
        self._sb_waiters = [(wanted, then) for wanted, then in self._sb_waiters if wanted > version]
        if self._sb_wanted > version:
            self._write_superblock()
        for then in ready:
            then(True)

    # ------------------------------------------------------------------------------ bitmap and log

    def write_changed(self, then: Then | None = None) -> None:
        """Write every bitmap page that differs from the disk; *then* is told when they are durable."""
        bitmap = self._volume.bitmap
        self._queue(Job(bitmap.changed_pages(bitmap.n_pages), [], True, then))

    def write_transaction(self, transaction: Transaction, then: Then) -> None:
        """Make an activity-log transaction durable, the evicted extents' pages before it."""
        bitmap = self._volume.bitmap
        pages = sorted({extent >> 5 for extent in transaction.evicted if bitmap.is_dirty(extent >> 5)})
        self._volume.al_writes += 1
        self._queue(Job(pages, [(transaction.position, transaction.block)], bool(transaction.evicted), then))

    def write_ring(self, blocks: list[tuple[int, bytes]], then: Then | None = None) -> None:
        """Write whole activity-log blocks, for initialisation."""
        self._queue(Job([], blocks, False, then))

    def _queue(self, job: Job) -> None:
        if self._dead:
            if job.then:
                job.then(False)
            return
        self._jobs.append(job)
        if self._job is None:
            self._next_job()

    def _next_job(self) -> None:
        if self._jobs and not self._dead:
            self._job = self._jobs.popleft()
            self._pages_step()

    def _pages_step(self) -> None:
        """Copy the next pages, flush the data they speak of, then write them."""
        job, volume, layout = self._job, self._volume, self._volume.layout
        assert job is not None and layout is not None
        chunk, job.pages = job.pages[:PAGES_PER_OP], job.pages[PAGES_PER_OP:]
        writes: list[tuple[int, bytes]] = []
        start = 0
        for i in range(1, len(chunk) + 1):
            if i == len(chunk) or chunk[i] != chunk[i - 1] + 1:
                run = chunk[start:i]
                room = min(len(run) * PAGE, layout.bitmap_bytes - run[0] * PAGE)
                content = b"".join([volume.bitmap.take_page(page) for page in run])
                writes.append((layout.bitmap + run[0] * PAGE, content[:room]))
                start = i
        volume.bm_writes += len(chunk)
        if job.flush_data and volume.data_version != self._flushed_version:
            version = volume.data_version
            self._op(Op.FLUSH, 0, None, 0, lambda op: self._data_flushed(op, version, writes), area=DATA)
        else:
            self._write_pages(writes)

    def _data_flushed(self, op: DiskOp, version: int, writes: list[tuple[int, bytes]]) -> None:
        if op.error:
            self.kill(op.error, of_data=True)
        else:
            self._flushed_version = version
            self._write_pages(writes)

    def _write_pages(self, writes: list[tuple[int, bytes]]) -> None:
        if self._dead:
            return
        if not writes:
            self._after_pages()
            return
        self._step_out = len(writes)
        for offset, content in writes:
            self._op(Op.WRITE, offset, content, 0, self._page_done)

    def _page_done(self, op: DiskOp) -> None:
        self._step_out -= 1
        if op.error:
            self.kill(op.error)
        if not self._step_out and not self._dead:
            self._after_pages()

    def _after_pages(self) -> None:
        job, layout = self._job, self._volume.layout
        assert job is not None and layout is not None
        if job.pages:
            self._pages_step()
        elif job.blocks:
            flags = 0
            if self._volume.config.disk_options.md_flushes:
                flags = FUA | PREFLUSH if job.wrote_pages else FUA
            self._step_out = len(job.blocks)
            for position, block in job.blocks:
                self._op(Op.WRITE, layout.al + position * PAGE, block, flags, self._last_step_done)
        else:
            self._step_out = 1
            self._op(Op.FLUSH, 0, None, 0, self._last_step_done)

    def _last_step_done(self, op: DiskOp) -> None:
        self._step_out -= 1
        if op.error:
            self.kill(op.error)
        if self._step_out or self._dead:
            return
        job, self._job = self._job, None
        assert job is not None
        self._next_job()
        if job.then:
            job.then(True)

    # ------------------------------------------------------------------------------ end

    def close(self, blocks: list[tuple[int, bytes]] | None, then: Then) -> None:
        """Bring everything to disk for the last time.

        With *blocks* (an initialised ring) the metadata is left clean, so that any implementation can
        attach it at once; without, it is left as a running node leaves it.
        """

        def ring_done(ok: bool) -> None:
            if not ok or blocks is None:
                self.superblock(then)
                return
            self._final_superblock(then)

        def pages_done(ok: bool) -> None:
            if ok and blocks is not None:
                self.write_ring(blocks, ring_done)
            else:
                ring_done(ok)

        self.write_changed(pages_done)

    def _final_superblock(self, then: Then) -> None:
        if self._sb_out:  # wait for the one that is out, then write the clean one
            self._sb_waiters.append((self._sb_wanted, lambda ok: self._final_superblock(then) if ok else then(False)))
            return
        self._sb_wanted += 1
        self._sb_waiters.append((self._sb_wanted, then))
        self._write_superblock(MAGIC_CLEAN, MdFlag.AL_CLEAN)

    def kill(self, error: int, *, of_data: bool = False) -> None:
        """The metadata cannot be written any more: tell every waiter, and the machine once."""
        if self._dead:
            return
        self._dead = True
        waiting = [then for _, then in self._sb_waiters]
        self._sb_waiters = []
        jobs = [job for job in (self._job, *self._jobs) if job is not None]
        self._job, self._step_out = None, 0
        self._jobs.clear()
        if error:
            self._failed(error, of_data)
        for then in (*waiting, *(job.then for job in jobs if job.then)):
            then(False)

    def _op(
        self, op: int, offset: int, payload: bytes | None, flags: int, then: Callable[[DiskOp], None],
        area: int = META,
    ) -> None:  # fmt: skip
        length = len(payload) if payload else 0
        self.n_out += 1

        def answered(done: DiskOp) -> None:
            self.n_out -= 1
            if not self._dead:
                then(done)

        self._emit(CallbackOp(op, self._volume.number, offset, length, payload, flags, area, answered))
