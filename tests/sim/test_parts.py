"""The simulator's own parts: a simulator that cannot lose data finds nothing."""

from __future__ import annotations

import pytest
from tandem.repl.requests import FUA, META, PREFLUSH, DiskOp, Op

from tests.sim.chooser import ScriptedChooser, SeededChooser, explore, next_script
from tests.sim.client import SECTOR, ForeignData, Ledger
from tests.sim.fake_disk import EIO, Arriving, DiskAbuse, FakeDevice, FakeDisk, FakeStore, HostCrash, Sparse
from tests.sim.fake_link import make_link

MIB = 1 << 20


def write(offset: int, data: bytes, flags: int = 0) -> DiskOp:
    return DiskOp(Op.WRITE, 0, offset, len(data), data, flags)


def run_op(disk: FakeDisk, op: DiskOp) -> DiskOp:
    disk.submit(op)
    flight = disk.flights[-1]
    disk.execute(flight)
    return disk.complete(flight)


# ------------------------------------------------------------------------------------ chooser


def test_explore_visits_every_sequence_once() -> None:
    seen = []

    def run(chooser: ScriptedChooser) -> None:
        seen.append((chooser.choose(2), chooser.choose(3)))

    assert explore(run, departures_max=2) == 6
    assert sorted(seen) == [(a, b) for a in range(2) for b in range(3)]


def test_explore_bounds_departures() -> None:
    seen = []

    def run(chooser: ScriptedChooser) -> None:
        seen.append(tuple(chooser.choose(2) for _ in range(4)))

    explore(run, departures_max=1)
    assert sorted(seen) == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 0, 0), (1, 0, 0, 0)]
    assert next_script([(1, 2), (1, 2)], 2) is None


def test_seeded_chooser_repeats_itself_and_heeds_weights() -> None:
    def draw(seed: int) -> list[int]:
        chooser = SeededChooser(seed)
        return [chooser.choose(5) for _ in range(20)] + [chooser.choose(2, (0.0, 1.0)) for _ in range(9)]

    assert draw(7) == draw(7) != draw(8)
    assert draw(7)[20:] == [1] * 9


# --------------------------------------------------------------------------------------- disk


def test_sparse_reads_back_odd_ranges() -> None:
    image, plain = Sparse(), bytearray(64 * 1024)
    chooser = SeededChooser(1)
    for i in range(200):
        offset, length = chooser.choose(100) * SECTOR, (1 + chooser.choose(20)) * SECTOR
        if chooser.choose(3):
            image.write(offset, bytes([i]) * length)
            plain[offset : offset + length] = bytes([i]) * length
        else:
            image.zero(offset, length)
            plain[offset : offset + length] = bytes(length)
    assert image.read(0, len(plain)) == plain
    assert image.read(3 * SECTOR, 7 * SECTOR) == plain[3 * SECTOR : 10 * SECTOR]


def test_power_cut_loses_keeps_or_tears_what_was_not_flushed() -> None:
    found = set()
    for seed in range(60):
        disk = FakeDisk(FakeDevice(MIB))
        run_op(disk, write(0, b"a" * 4096))
        run_op(disk, DiskOp(Op.FLUSH, 0, 0, 0))
        run_op(disk, write(0, b"b" * 4096))
        disk.power_cut(SeededChooser(seed))
        content = disk.devices[0].live.read(0, 4096)
        assert set(content) <= {ord("a"), ord("b")}
        found.add("torn" if len(set(content)) == 2 else chr(content[0]))
    assert found == {"a", "b", "torn"}


def test_process_crash_keeps_the_page_cache() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    run_op(disk, write(0, b"a" * 512))
    disk.submit(write(512, b"b" * 512))
    disk.process_crash(ScriptedChooser())
    assert disk.devices[0].live.read(0, 1024) == b"a" * 512 + bytes(512)
    assert not disk.flights


def test_flush_covers_only_what_was_completed_when_it_was_submitted() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    run_op(disk, write(0, b"a" * 512))
    disk.submit(write(512, b"b" * 512))
    disk.execute(disk.flights[0])
    disk.submit(DiskOp(Op.FLUSH, 0, 0, 0))
    disk.execute(disk.flights[1])
    assert disk.devices[0].durable.read(0, 1024) == b"a" * 512 + bytes(512)


def test_fua_is_durable_and_buries_older_versions() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    run_op(disk, write(0, b"a" * 2048))
    run_op(disk, write(512, b"b" * 512, FUA))
    for seed in range(20):
        clone = FakeDevice(MIB)
        clone.live, clone.durable = disk.devices[0].live.copy(), disk.devices[0].durable.copy()
        clone.cache = list(disk.devices[0].cache)
        clone.power_cut(SeededChooser(seed))
        assert clone.live.read(512, 512) == b"b" * 512


def test_preflush_makes_earlier_writes_durable() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    run_op(disk, write(0, b"a" * 512))
    run_op(disk, write(4096, b"b" * 512, PREFLUSH | FUA))
    disk.power_cut(ScriptedChooser())
    assert disk.devices[0].live.read(0, 512) == b"a" * 512


def test_external_metadata_has_its_own_cache() -> None:
    disk = FakeDisk(FakeDevice(MIB), FakeDevice(MIB))
    run_op(disk, write(0, b"a" * 512))
    run_op(disk, DiskOp(Op.WRITE, 0, 0, 512, b"m" * 512, PREFLUSH | FUA, META))
    disk.power_cut(ScriptedChooser())
    assert disk.devices[0].live.read(0, 512) == bytes(512)
    assert disk.devices[1].live.read(0, 512) == b"m" * 512


def test_overlapping_writes_in_flight_are_refused() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    disk.submit(write(0, b"a" * 4096))
    disk.submit(DiskOp(Op.READ, 0, 0, 4096))
    with pytest.raises(DiskAbuse, match="overlapping"):
        disk.submit(DiskOp(Op.TRIM, 0, 3584, 4096))
    with pytest.raises(DiskAbuse, match="outside"):
        disk.submit(write(MIB - 512, b"a" * 1024))


def test_a_read_keeps_the_bytes_of_the_moment_it_was_executed() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    disk.submit(DiskOp(Op.READ, 0, 0, 512))
    disk.execute(disk.flights[0])
    run_op(disk, write(0, b"a" * 512))
    assert disk.complete(disk.flights[0]).payload == bytes(512)


def arriving(offset: int, length: int) -> tuple[FakeDisk, Arriving]:
    disk = FakeDisk(FakeDevice(MIB))
    return disk, disk.begin(DiskOp(Op.WRITE, 0, offset, length))


def test_a_write_that_arrives_is_written_by_the_page_and_is_in_flight_until_its_end() -> None:
    disk, flight = arriving(3584, 9216)  # the end of a page, two pages, the beginning of one
    written: list[tuple[int, int]] = []
    disk.on_execute = lambda d, op: written.append((op.offset, op.length))
    for n in (500, 12, 4000, 4000, 704):
        assert flight.arriving and not disk.ready
        with pytest.raises(DiskAbuse, match="overlapping"):
            disk.submit(write(12288, b"b" * 512))
        disk.arrive(flight, b"a" * n)
    assert written == [(3584, 512), (4096, 4096), (8192, 4608), (3584, 9216)]
    assert disk.ready == [flight] and disk.complete(flight).error == 0
    assert disk.devices[0].live.read(3584, 9216) == b"a" * 9216


def test_no_flush_covers_a_write_that_arrives_before_it_has_ended() -> None:
    disk, flight = arriving(0, 8192)
    disk.arrive(flight, b"a" * 5000)
    run_op(disk, DiskOp(Op.FLUSH, 0, 0, 0))
    assert disk.devices[0].durable.read(0, 4096) == bytes(4096)
    disk.arrive(flight, b"a" * 3192)
    disk.complete(flight)
    run_op(disk, DiskOp(Op.FLUSH, 0, 0, 0))
    assert disk.devices[0].durable.read(0, 8192) == b"a" * 8192


def test_what_never_arrives_is_not_written_and_what_did_stays() -> None:
    disk, flight = arriving(0, 8192)
    disk.arrive(flight, b"a" * 5000)
    disk.abandon(flight)
    assert disk.complete(flight).error == 0 and not disk.flights
    crashed, flight = arriving(0, 8192)
    crashed.arrive(flight, b"a" * 5000)
    crashed.process_crash(ScriptedChooser())
    for device in (disk.devices[0], crashed.devices[0]):
        assert device.live.read(0, 8192) == b"a" * 4096 + bytes(4096)


def test_a_write_that_arrives_and_fails_ends_with_what_was_written() -> None:
    disk, flight = arriving(0, 8192)
    disk.arrive(flight, b"a" * 5000)
    disk.abandon(flight, EIO)
    assert not flight.arriving and disk.complete(flight).error == EIO
    assert disk.devices[0].live.read(0, 8192) == b"a" * 4096 + bytes(4096)


def test_failed_operations_carry_the_error() -> None:
    disk = FakeDisk(FakeDevice(MIB))
    disk.submit(write(0, b"a" * 512))
    disk.execute(disk.flights[0], EIO)
    assert disk.complete(disk.flights[0]).error == EIO
    assert disk.devices[0].live.read(0, 512) == bytes(512)


def test_store_dies_in_the_middle_of_a_write() -> None:
    device = FakeDevice(MIB)
    store = FakeStore(device, calls_left=1)
    store.write(0, b"a" * 1024)
    with pytest.raises(HostCrash):
        store.write(4096, b"b" * 1024)
    assert device.live.read(4096, 1024) == b"b" * 512 + bytes(512)


# --------------------------------------------------------------------------------------- link


def test_a_cut_loses_a_suffix_and_then_shows_the_end() -> None:
    a, b = make_link((1, 2), resolver=0)
    assert a.resolver and not b.resolver
    a.outbound[0].send([b"hello", b"world"])
    pipe = b.inbound[0]
    pipe.deliver(3)
    a.close(keep=4)
    a.outbound[0].send([b"too late"])
    assert not pipe.end_visible
    pipe.deliver(4)
    assert bytes(pipe.rx) == b"hellowo" and pipe.end_visible


def test_a_vanished_host_shows_no_end() -> None:
    a, b = make_link((1, 2), resolver=1)
    a.close(silent=True)
    assert not b.inbound[0].end_visible and not b.inbound[1].end_visible


# ------------------------------------------------------------------------------------- ledger


def reader(content: dict[int, bytes]):  # type: ignore[no-untyped-def]
    return lambda s: content.get(s, bytes(SECTOR))


def sectors_of(payload: bytes, first: int) -> dict[int, bytes]:
    return {first + i: payload[i * SECTOR : (i + 1) * SECTOR] for i in range(len(payload) // SECTOR)}


def test_an_answered_write_must_be_there_an_open_one_may() -> None:
    ledger = Ledger(0)
    disk: dict[int, bytes] = {}
    w1 = ledger.new_write(0, 0, 1024)
    assert ledger.misfits(0, reader(disk)) == []
    disk |= sectors_of(w1.payload(), 0)
    assert ledger.misfits(0, reader(disk)) == []
    ledger.acked(w1, [0, 1])
    assert ledger.misfits(0, reader(disk)) == []
    assert [s for s, _ in ledger.misfits(1, reader({}))] == [0, 1]


def test_overlapping_in_time_either_may_win() -> None:
    ledger = Ledger(0)
    w1, w2 = ledger.new_write(0, 0, 512), ledger.new_write(0, 0, 512)
    ledger.acked(w2, [0, 1])
    ledger.acked(w1, [0, 1])
    w3 = ledger.new_write(0, 0, 512)
    for w in (w1, w2, w3):
        assert ledger.misfits(0, reader(sectors_of(w.payload(), 0))) == []
    ledger.acked(w3, [0, 1])
    assert ledger.misfits(0, reader(sectors_of(w1.payload(), 0)))


def test_power_cut_may_lose_what_was_not_flushed() -> None:
    ledger = Ledger(0)
    w1 = ledger.new_write(0, 0, 512)
    ledger.acked(w1, [0, 1])
    point = ledger.flush_point()
    w2 = ledger.new_write(0, 0, 512)
    ledger.acked(w2, [0, 1])
    ledger.flushed(point, [0])
    ledger.power_cut(0)
    ledger.power_cut(1)
    old = reader(sectors_of(w1.payload(), 0))
    assert ledger.misfits(0, old) == [] and ledger.misfits(0, reader(sectors_of(w2.payload(), 0))) == []
    assert ledger.misfits(0, reader({})) and ledger.misfits(1, reader({})) == []


def test_zeroes_count_as_a_version() -> None:
    ledger = Ledger(0)
    w1 = ledger.new_write(0, 0, 512)
    ledger.acked(w1, [0, 1])
    z = ledger.new_write(0, 0, 512, zero=True)
    ledger.acked(z, [0])
    assert ledger.holds(z, reader({})) and ledger.misfits(0, reader({})) == []
    assert ledger.holds(w1, reader({}))
    assert not ledger.holds(z, reader(sectors_of(w1.payload(), 0)))


def test_foreign_bytes_are_noticed() -> None:
    ledger = Ledger(0)
    w1 = ledger.new_write(0, 0, 512)
    with pytest.raises(ForeignData):
        ledger.version_at(5, w1.payload())
    with pytest.raises(ForeignData):
        ledger.version_at(0, b"x" * 512)
