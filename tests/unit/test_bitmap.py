"""The bitmap against a plain set of numbers, its page markers, and what it hands to disk and peer."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tandem.repl.bitmap import PAGE, Bitmap
from tandem.repl.units import BITS_PER_PAGE

# Sizes around every boundary: bit, byte, word, page, and several pages.
SIZES = st.one_of(
    st.integers(1, 200),
    st.sampled_from(
        [BITS_PER_PAGE - 1, BITS_PER_PAGE, BITS_PER_PAGE + 1, 2 * BITS_PER_PAGE, 3 * BITS_PER_PAGE + 77]
    ),
    st.integers(1, 5 * BITS_PER_PAGE),
)


class Model(RuleBasedStateMachine):
    """Whatever is done to the bitmap is done to a Python set as well."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = Bitmap(0)
        self.model: set[int] = set()
        self.written: dict[int, bytes] = {}

    @initialize(n_bits=SIZES)
    def start(self, n_bits: int) -> None:
        self.bitmap = Bitmap(n_bits)
        self.written = {page: bytes(PAGE) for page in range(self.bitmap.n_pages)}

    def range_from(self, data: st.DataObject) -> tuple[int, int]:
        n = self.bitmap.n_bits
        first = data.draw(st.one_of(st.integers(0, n), st.sampled_from([0, n // 2, max(n - 1, 0)])))
        length = data.draw(st.one_of(st.integers(0, 70), st.integers(0, n)))
        return first, min(first + length, n)

    @rule(data=st.data())
    def set(self, data: st.DataObject) -> None:
        first, end = self.range_from(data)
        wanted = set(range(first, end))
        assert self.bitmap.set(first, end) == len(wanted - self.model)
        self.model |= wanted

    @rule(data=st.data())
    def set_many(self, data: st.DataObject) -> None:
        ranges = [self.range_from(data) for _ in range(data.draw(st.integers(0, 5)))]
        firsts, counts = [first for first, _ in ranges], [end - first for first, end in ranges]
        beyond = data.draw(st.integers(0, 3))  # a write at the end of a device that has become smaller
        firsts.append(max(self.bitmap.n_bits - 1, 0))
        counts.append(1 + beyond)
        self.bitmap.set_many(np.array(firsts, np.uint64), np.array(counts, np.uint64))
        for first, count in zip(firsts, counts, strict=True):
            self.model |= set(range(first, min(first + count, self.bitmap.n_bits)))

    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        first, end = self.range_from(data)
        gone = set(range(first, end))
        assert self.bitmap.clear(first, end) == len(gone & self.model)
        self.model -= gone

    @rule(data=st.data())
    def clear_each(self, data: st.DataObject) -> None:
        n = self.bitmap.n_bits
        bit = st.one_of(st.integers(0, n - 1), st.sampled_from(sorted(self.model) or [0])) if n else st.nothing()
        some = data.draw(st.lists(bit))
        self.bitmap.clear_each(some)
        self.model -= set(some)

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        first, end = self.range_from(data)
        inside = {bit for bit in self.model if first <= bit < end}
        assert self.bitmap.any(first, end) == bool(inside)
        assert self.bitmap.count(first, end) == len(inside)
        assert self.bitmap.next_set(first) == min((b for b in self.model if b >= first), default=-1)
        clear = next((b for b in range(first, self.bitmap.n_bits) if b not in self.model), self.bitmap.n_bits)
        assert self.bitmap.next_clear(first) == clear
        if first <= end:
            assert self.bitmap.next_clear(first, end) == min(clear, end)

    @rule(data=st.data())
    def follow_the_runs(self, data: st.DataObject) -> None:
        first, _ = self.range_from(data)
        bits = [int(bit in self.model) for bit in range(first, self.bitmap.n_bits)]
        expected = [(value, len(list(group))) for value, group in itertools.groupby(bits)]
        assert list(self.bitmap.runs(first)) == expected

    @rule(data=st.data())
    def merge(self, data: st.DataObject) -> None:
        n_words = (self.bitmap.n_bits + 63) // 64
        at = data.draw(st.integers(0, n_words))
        raw = data.draw(st.binary(min_size=0, max_size=4096)) * data.draw(st.integers(1, 3))
        raw = raw[: len(raw) // 8 * 8]
        value = int.from_bytes(raw, "little")
        incoming = {at * 64 + i for i in range(len(raw) * 8) if value >> i & 1}
        incoming = {bit for bit in incoming if bit < self.bitmap.n_bits}
        assert self.bitmap.merge(at, raw) == len(incoming - self.model)
        self.model |= incoming

    @rule(data=st.data())
    def read_words(self, data: st.DataObject) -> None:
        n_words = (self.bitmap.n_bits + 63) // 64
        at, n = data.draw(st.integers(0, n_words + 2)), data.draw(st.integers(0, 20))
        value = sum(1 << (bit - at * 64) for bit in self.model if at * 64 <= bit < (at + n) * 64)
        assert self.bitmap.words(at, n) == value.to_bytes(n * 8, "little")

    @rule(n_bits=SIZES, set_new=st.booleans())
    def resize(self, n_bits: int, set_new: bool) -> None:
        old = self.bitmap.n_bits
        self.bitmap.resize(n_bits, set_new)
        self.model = {bit for bit in self.model if bit < n_bits}
        if set_new:
            self.model |= set(range(old, n_bits))
        # What lies behind the old end on disk may be anything.
        self.written = {p: self.written.get(p, b"\xee" * PAGE) for p in range(self.bitmap.n_pages)}

    @rule(limit=st.integers(1, 3), lazily=st.booleans())
    def write_pages(self, limit: int, lazily: bool) -> None:
        pages = self.bitmap.changed_pages(limit) if lazily else self.bitmap.dirty_pages(limit)
        assert len(pages) <= limit and pages == sorted(pages)
        for page in pages:
            self.written[page] = self.bitmap.take_page(page)
            assert not self.bitmap.is_dirty(page) and not self.bitmap.is_lazy(page)

    @rule(value=st.booleans())
    def everything(self, value: bool) -> None:
        if value:
            self.bitmap.set_all()
            self.model = set(range(self.bitmap.n_bits))
        else:
            self.bitmap.clear_all()
            self.model = set()

    @invariant()
    def weight_and_disk_are_right(self) -> None:
        assert self.bitmap.weight == len(self.model)
        changed = set(self.bitmap.changed_pages(1 << 30))
        dirty = set(self.bitmap.dirty_pages(1 << 30))
        assert dirty <= changed
        for page in range(self.bitmap.n_pages):
            value = sum(1 << (b - page * BITS_PER_PAGE) for b in self.model if b // BITS_PER_PAGE == page)
            on_disk = int.from_bytes(self.written[page], "little")
            if page not in dirty:
                # What is not on disk was only cleared: the disk has at least these bits.
                assert value & ~on_disk == 0
            if page not in changed:
                assert value == on_disk


Model.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
TestModel = Model.TestCase


@given(st.binary(max_size=3 * PAGE), st.integers(0, 3 * BITS_PER_PAGE))
@settings(max_examples=60, deadline=None)
def test_raw_bytes_are_taken_as_they_lie_on_disk(raw: bytes, n_bits: int) -> None:
    bitmap = Bitmap(n_bits, raw)
    value = int.from_bytes(raw, "little") & ((1 << n_bits) - 1)
    assert bitmap.weight == value.bit_count()
    assert bitmap.words(0, 3 * PAGE // 8) == value.to_bytes(3 * PAGE, "little")
    assert bitmap.changed_pages(100) == []


def test_bit_order_on_disk() -> None:
    bitmap = Bitmap(BITS_PER_PAGE)
    bitmap.set(3, 4)
    bitmap.set(10240, 10496)
    page = bitmap.take_page(0)
    assert page[:8] == bytes.fromhex("0800000000000000")
    assert page[0x500:0x520] == b"\xff" * 32
    assert sum(page) == 8 + 32 * 255


def test_garbage_behind_the_last_bit_is_ignored_and_not_written_back() -> None:
    bitmap = Bitmap(70, b"\xff" * PAGE)
    assert bitmap.weight == 70
    assert bitmap.take_page(0) == ((1 << 70) - 1).to_bytes(PAGE, "little")


def test_cleared_pages_are_lazy_and_set_ones_dirty() -> None:
    bitmap = Bitmap(2 * BITS_PER_PAGE)
    bitmap.set(5, 9)
    assert bitmap.is_dirty(0) and not bitmap.is_lazy(0) and not bitmap.is_dirty(1)
    bitmap.take_page(0)
    bitmap.clear_each([5])
    assert bitmap.is_lazy(0) and not bitmap.is_dirty(0)
    assert bitmap.dirty_pages(9) == [] and bitmap.changed_pages(9) == [0]
    bitmap.set(5, 6)
    assert bitmap.is_dirty(0) and not bitmap.is_lazy(0)
    bitmap.clear(5, 6)
    assert bitmap.is_dirty(0) and not bitmap.is_lazy(0)
    bitmap.set(7, 8)  # already set: nothing to write
    bitmap.mark_dirty(1)
    assert bitmap.dirty_pages(1) == [0] and bitmap.dirty_pages(9) == [0, 1]


def test_nothing_changes_when_nothing_changes() -> None:
    bitmap = Bitmap(100)
    assert bitmap.clear(0, 100) == 0
    assert bitmap.set(50, 50) == 0 and bitmap.set(51, 50) == 0 and bitmap.set(0, 0) == 0
    assert not bitmap.any(7, 7) and bitmap.count(9, 3) == 0
    assert bitmap.changed_pages(9) == []
    bitmap.mark_all_dirty()
    assert bitmap.dirty_pages(9) == [0]


def test_an_empty_bitmap() -> None:
    bitmap = Bitmap(0)
    bitmap.set_all()
    assert (bitmap.weight, bitmap.n_pages, bitmap.next_set(0), bitmap.next_clear(0)) == (0, 0, -1, 0)
    assert list(bitmap.runs(0)) == [] and bitmap.words(0, 1) == bytes(8)
    bitmap.resize(10, True)
    assert bitmap.weight == 10 and bitmap.dirty_pages(9) == [0]


def test_ranges_outside_are_our_mistake() -> None:
    bitmap = Bitmap(100)
    for first, end in ((-1, 5), (90, 101), (0, 1 << 20)):
        with pytest.raises(AssertionError):
            bitmap.set(first, end)


def test_sixteen_tib_cost_little_while_empty() -> None:
    started = time.perf_counter()
    bitmap = Bitmap(1 << 32)
    bitmap.set(1 << 31, (1 << 31) + 3)
    assert bitmap.next_set(0) == 1 << 31
    assert list(bitmap.runs(0)) == [(0, 1 << 31), (1, 3), (0, (1 << 31) - 3)]
    assert bitmap.next_clear(1 << 31) == (1 << 31) + 3
    assert bitmap.count(0, 1 << 32) == 3
    assert time.perf_counter() - started < 2
