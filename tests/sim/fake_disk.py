"""A disk that loses, tears and reorders what was not flushed.

A `FakeDevice` keeps two sparse images, *live* (what a read returns now) and *durable* (what is there after
a power cut at the very worst moment), and the list of writes between them. A `FakeDisk` is the storage of
one volume: it takes the machine's `DiskOp`s, executes and completes them in any order it is told, and
fails them on request. Executing and completing are two steps, so that a read may carry old bytes for a
while and a write may be on the platter long before anybody is told.

A flush makes durable what was *completed* when the flush was submitted, and nothing else: the least a disk
promises. Overlapping writes must never be in flight together, and the disk says so when they are.

A long write may begin before all its bytes are there (`begin`): the edge writes it by the page as they come
from the peer. It is one operation all the same, in flight from its first byte on, and no flush need cover
what is written of it before it has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from tandem.repl.requests import DATA, FUA, META, PREFLUSH, Buffer, DiskOp, Op

from .chooser import Chooser

PAGE: Final = 4096
SECTOR: Final = 512
ZERO_PAGE: Final = bytes(PAGE)
EIO: Final = 5

# How a torn write is torn: which sectors (of how many) reached the disk.
TEARS: Final[tuple[Callable[[int, int], bool], ...]] = (
    lambda i, n: i < n / 2,
    lambda i, n: i >= n / 2,
    lambda i, n: i % 2 == 0,
    lambda i, n: i % 3 == 1,
)


class DiskAbuse(AssertionError):
    """The machine used the disk in a way that no real disk would forgive."""


class HostCrash(Exception):
    """Raised out of the blocking store when the host or the process dies in the middle of it."""


class Sparse:
    """Bytes by the page; a page that is not there is zeros."""

    __slots__ = ("pages",)

    def __init__(self, pages: dict[int, bytes] | None = None) -> None:
        self.pages: dict[int, bytes] = {} if pages is None else pages

    def copy(self) -> Sparse:
        return Sparse(dict(self.pages))

    def read(self, offset: int, length: int) -> bytes:
        first, end = offset // PAGE, (offset + length + PAGE - 1) // PAGE
        get = self.pages.get
        whole = b"".join([get(page, ZERO_PAGE) for page in range(first, end)])
        start = offset - first * PAGE
        return whole if start == 0 and len(whole) == length else whole[start : start + length]

    def write(self, offset: int, data: Buffer) -> None:
        at, end, view = offset, offset + len(data), memoryview(data)
        if len(data) > 2 * PAGE and bytes(data) == bytes(len(data)):
            self.zero(offset, len(data))
            return
        while at < end:
            page, start = divmod(at, PAGE)
            step = min(PAGE - start, end - at)
            piece = bytes(view[at - offset : at - offset + step])
            if step < PAGE:
                old = self.pages.get(page, ZERO_PAGE)
                piece = old[:start] + piece + old[start + step :]
            self._put(page, piece)
            at += step

    def zero(self, offset: int, length: int) -> None:
        first, end = (offset + PAGE - 1) // PAGE, (offset + length) // PAGE
        if first > end:
            self.write(offset, bytes(length))
            return
        self.write(offset, bytes(first * PAGE - offset))
        self.write(end * PAGE, bytes(offset + length - end * PAGE))
        if end - first > len(self.pages):
            for page in [p for p in self.pages if first <= p < end]:
                del self.pages[page]
        else:
            for page in range(first, end):
                self.pages.pop(page, None)

    def _put(self, page: int, piece: bytes) -> None:
        if piece == ZERO_PAGE:
            self.pages.pop(page, None)
        else:
            self.pages[page] = piece


class Unflushed:
    """A write that reached the disk's cache; *data* None means zeros."""

    __slots__ = ("completed", "data", "length", "offset", "root")

    def __init__(self, offset: int, length: int, data: bytes | None) -> None:
        self.offset = offset
        self.length = length
        self.data = data
        self.completed = False
        self.root = self  # the whole write, of which this may be what a write-through left over

    def apply(self, image: Sparse) -> None:
        if self.data is None:
            image.zero(self.offset, self.length)
        else:
            image.write(self.offset, self.data)

    def apply_sectors(self, image: Sparse, wanted: Callable[[int, int], bool], n: int) -> None:
        """Apply those of the write's *n* sectors that *wanted* picks."""
        for i in range(n):
            if wanted(i, n):
                piece = bytes(SECTOR) if self.data is None else self.data[i * SECTOR : (i + 1) * SECTOR]
                image.write(self.offset + i * SECTOR, piece)


class FakeDevice:
    """One block device of *size* bytes with a volatile write cache."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.live = Sparse()
        self.durable = Sparse()
        self.cache: list[Unflushed] = []

    def write(self, offset: int, length: int, data: Buffer | None, *, through: bool = False) -> Unflushed:
        entry = Unflushed(offset, length, None if data is None else bytes(data))
        entry.apply(self.live)
        if through:
            entry.apply(self.durable)
            # What the cache still held for the same sectors can no longer come back.
            self.cache = [piece for old in self.cache for piece in _without(old, offset, offset + length)]
        else:
            self.cache.append(entry)
        return entry

    def completed(self) -> list[Unflushed]:
        return [entry for entry in self.cache if entry.completed]

    def flush(self, entries: list[Unflushed]) -> None:
        """Make *entries* durable."""
        chosen = {id(entry.root) for entry in entries}
        kept = []
        for entry in self.cache:
            if id(entry.root) in chosen:
                entry.apply(self.durable)
            else:
                kept.append(entry)
        self.cache = kept

    def lose(self, entries: list[Unflushed], chooser: Chooser) -> None:
        """*entries* could not be made durable: each survives in the cache, or is gone for good."""
        lost = {id(entry.root) for entry in entries if chooser.choose(2)}
        self.cache = [entry for entry in self.cache if id(entry.root) not in lost]
        self.live = self.durable.copy()
        for entry in self.cache:
            entry.apply(self.live)

    def power_cut(self, chooser: Chooser) -> None:
        """Every unflushed write survives, vanishes or is torn at sectors; what is left is durable."""
        way = chooser.choose(3)  # 0: nothing unflushed survives, 1: all does, 2: each as it comes
        if way == 1:
            self.durable = self.live.copy()
        elif way == 2:
            for entry in self.cache:
                fate = chooser.choose(3)
                if fate == 1:
                    entry.apply(self.durable)
                elif fate == 2:
                    tear = TEARS[chooser.choose(len(TEARS))]
                    entry.apply_sectors(self.durable, tear, entry.length // SECTOR)
        self.live = self.durable.copy()
        self.cache = []


def _without(entry: Unflushed, start: int, end: int) -> list[Unflushed]:
    """What is left of *entry* outside [start, end)."""
    if entry.offset >= end or entry.offset + entry.length <= start:
        return [entry]
    pieces = []
    for first, last in ((entry.offset, start), (end, entry.offset + entry.length)):
        if first < last:
            at = first - entry.offset
            data = None if entry.data is None else entry.data[at : at + last - first]
            piece = Unflushed(first, last - first, data)
            piece.completed = entry.completed
            piece.root = entry.root
            pieces.append(piece)
    return pieces


class Flight:
    """One operation between submission and completion."""

    __slots__ = ("covers", "entries", "executed", "op", "serial")

    def __init__(self, op: DiskOp, serial: int) -> None:
        self.op = op
        self.serial = serial
        self.executed = False
        self.entries: list[Unflushed] = []  # what it has written
        self.covers: list[Unflushed] = []

    @property
    def arriving(self) -> bool:
        """Is it a write that waits for bytes of its own? Nobody but the link can end it then."""
        return False


class Arriving(Flight):
    """A write whose bytes come one after the other, and are written as they do."""

    __slots__ = ("data", "n_written")

    def __init__(self, op: DiskOp, serial: int) -> None:
        super().__init__(op, serial)
        self.data = bytearray()  # what has come
        self.n_written = 0  # bytes of it that went to the disk

    @property
    def arriving(self) -> bool:
        return not self.executed

    @property
    def rest(self) -> int:
        return self.op.length - len(self.data)

    def next_piece(self) -> DiskOp | None:
        """What can be written now: up to the end of a page of the device, or of the write."""
        op, at = self.op, self.op.offset + self.n_written
        end = op.offset + len(self.data)
        end = end // PAGE * PAGE if self.rest else end
        if end <= at:
            return None
        payload = bytes(self.data[self.n_written : end - op.offset])
        self.n_written = end - op.offset
        return DiskOp(op.op, op.volume, at, len(payload), payload)


Listener = Callable[["FakeDisk", DiskOp], None]


def _ignore(disk: FakeDisk, op: DiskOp) -> None:
    """Nobody listens."""


class FakeDisk:
    """The storage of one volume: a data device, and a metadata device unless metadata is internal."""

    def __init__(self, data: FakeDevice, meta: FakeDevice | None = None) -> None:
        self.devices = (data, data if meta is None else meta)
        self.flights: list[Flight] = []
        self.on_submit: Listener = _ignore
        self.on_execute: Listener = _ignore
        self._serial = 0

    @property
    def internal(self) -> bool:
        return self.devices[DATA] is self.devices[META]

    # ------------------------------------------------------------------ the machine's side

    def submit(self, op: DiskOp) -> None:
        if op.op == Op.WRITE and (op.payload is None or len(op.payload) != op.length):
            raise DiskAbuse(f"{op!r} comes without its {op.length} bytes")
        flight = Flight(op, self._serial)
        self._take(flight)
        if op.op == Op.FLUSH or op.flags & PREFLUSH:
            flight.covers = self.devices[op.area].completed()

    def begin(self, op: DiskOp) -> Arriving:
        """Take a write of which not all bytes are there yet; `arrive` brings them."""
        if op.op != Op.WRITE or op.payload is not None or op.flags:
            raise DiskAbuse(f"{op!r} cannot be written as it comes")
        flight = Arriving(op, self._serial)
        self._take(flight)
        return flight

    def _take(self, flight: Flight) -> None:
        op, device = flight.op, self.devices[flight.op.area]
        if op.op != Op.FLUSH:
            if op.length <= 0 or op.offset < 0 or op.offset + op.length > device.size:
                raise DiskAbuse(f"{op!r} lies outside the device of {device.size} bytes")
            if op.offset % SECTOR or op.length % SECTOR:
                raise DiskAbuse(f"{op!r} is not aligned to sectors")
        if op.op not in (Op.READ, Op.FLUSH):
            self._refuse_overlap(op, device)
        self.on_submit(self, op)
        self._serial += 1
        self.flights.append(flight)

    def _refuse_overlap(self, op: DiskOp, device: FakeDevice) -> None:
        for other in self.flights:
            o = other.op
            if (
                o.op not in (Op.READ, Op.FLUSH) and self.devices[o.area] is device
                and o.offset < op.offset + op.length and op.offset < o.offset + o.length
            ):  # fmt: skip
                raise DiskAbuse(f"overlapping writes in flight together: {o!r} and {op!r}")

    # ------------------------------------------------------------------ the edge's side

    def arrive(self, flight: Arriving, data: Buffer) -> None:
        """The next bytes of a write that has begun; the last ones execute it."""
        op, device = flight.op, self.devices[flight.op.area]
        flight.data += data
        piece = flight.next_piece()
        if piece is not None:
            flight.entries.append(device.write(piece.offset, piece.length, piece.payload))
            self.on_execute(self, piece)
        if not flight.rest:
            flight.executed = True  # now it is there as a whole
            self.on_execute(self, DiskOp(op.op, op.volume, op.offset, op.length, bytes(flight.data)))

    def abandon(self, flight: Arriving, error: int = 0) -> None:
        """The rest of it is not written: its link has ended (no *error*, no ack either), or the disk has failed."""
        flight.op.error = error
        flight.executed = True

    # ------------------------------------------------------------------ the world's side

    @property
    def ready(self) -> list[Flight]:
        """The operations that the disk can go on with."""
        return [flight for flight in self.flights if not flight.arriving]

    def execute(self, flight: Flight, error: int = 0) -> None:
        """Do what *flight* asks, or fail it with *error* (a failed write may have happened or not)."""
        op, device = flight.op, self.devices[flight.op.area]
        assert not flight.executed
        flight.executed = True
        op.error = error
        if error:
            return
        if op.op == Op.READ:
            op.payload = device.live.read(op.offset, op.length)
            return
        if op.op == Op.FLUSH or op.flags & PREFLUSH:
            device.flush(flight.covers)
        if op.op != Op.FLUSH:
            data = op.payload if op.op == Op.WRITE else None
            flight.entries.append(device.write(op.offset, op.length, data, through=bool(op.flags & FUA)))
        self.on_execute(self, op)

    def fail(self, flight: Flight, chooser: Chooser) -> bool:
        """Fail *flight*; True when that cost writes that had been answered, as it may if it was to make them durable.

        Such a failure is told once: the next flush knows nothing of it. Source: fsync(2), EIO.
        """
        op, device = flight.op, self.devices[flight.op.area]
        self.execute(flight, EIO)
        if op.op != Op.FLUSH and not op.flags & (FUA | PREFLUSH):
            return False
        device.lose(device.completed(), chooser)
        return True

    def complete(self, flight: Flight) -> DiskOp:
        """Take *flight* out of the queue; its operation is to be handed back to the machine now."""
        assert flight.executed
        self.flights.remove(flight)
        if flight.entries:
            written = {id(entry) for entry in flight.entries}
            for entry in self.devices[flight.op.area].cache:
                if id(entry.root) in written:
                    entry.completed = True
        return flight.op

    def process_crash(self, chooser: Chooser) -> None:
        """The process is gone: operations not yet executed happened wholly, in part, or not at all."""
        for flight in self.flights:
            op = flight.op
            if flight.executed or flight.arriving or op.op in (Op.READ, Op.FLUSH):
                continue  # of a write that was arriving the page cache has what was written
            fate = chooser.choose(3)  # 0: never happened, 1: happened, 2: its first half did
            length = op.length if fate == 1 else op.length // 2 // SECTOR * SECTOR
            if fate and length:
                data = None if op.op != Op.WRITE or op.payload is None else bytes(op.payload[:length])
                self.devices[op.area].write(op.offset, length, data)
                self.on_execute(self, op)
        self.flights.clear()
        for device in self.devices:
            for entry in device.cache:
                entry.completed = True

    def power_cut(self, chooser: Chooser) -> None:
        """The host is gone: as `process_crash`, and the caches forget."""
        self.process_crash(chooser)
        self.devices[DATA].power_cut(chooser)
        if not self.internal:
            self.devices[META].power_cut(chooser)

    def lose_nothing(self) -> None:
        """Make everything durable (the state in which a test starts)."""
        for device in self.devices:
            device.durable = device.live.copy()
            device.cache = []


class FakeStore:
    """The blocking view of one device that `attach` and the offline tools use.

    After *calls_left* further calls it raises HostCrash, and the write under way is left half done.
    """

    def __init__(self, device: FakeDevice, calls_left: int | None = None) -> None:
        self._device = device
        self._calls_left = calls_left
        self.n_calls = 0

    @property
    def size(self) -> int:
        return self._device.size

    def _count(self) -> bool:
        self.n_calls += 1
        if self._calls_left is None:
            return False
        self._calls_left -= 1
        return self._calls_left < 0

    def read(self, offset: int, length: int) -> bytes:
        if self._count():
            raise HostCrash
        return self._device.live.read(offset, length)

    def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        if self._count():
            raise HostCrash
        view = memoryview(buffer).cast("B")
        view[:] = self._device.live.read(offset, len(view))

    def write(self, offset: int, data: Buffer) -> None:
        crash = self._count()
        length = len(data) // 2 // SECTOR * SECTOR if crash else len(data)
        if length:
            self._device.write(offset, length, data[:length]).completed = True
        if crash:
            raise HostCrash

    def flush(self) -> None:
        if self._count():
            raise HostCrash
        self._device.flush(self._device.completed())
