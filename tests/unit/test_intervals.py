"""Ranges in flight: the table says exactly what a list of all ranges would say, and wakes whom it should."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl.intervals import SMALL_MAX, Intervals, Lock

BLOCK = 4096
LARGE = SMALL_MAX + BLOCK


def overlap(a: Lock, b: Lock) -> bool:
    """Do two ranges, rounded out to blocks, share a block?"""
    return (
        a.offset // BLOCK < -(-(b.offset + b.length) // BLOCK)
        and b.offset // BLOCK < -(-(a.offset + a.length) // BLOCK)
    )  # fmt: skip


sectors = st.integers(0, 8 * 600)
ranges = st.builds(
    lambda sector, length: Lock(sector * 512, length),
    sectors, st.one_of(st.integers(1, 40).map(lambda n: n * 512), st.sampled_from((SMALL_MAX, LARGE))),
)  # fmt: skip


@given(st.lists(st.tuples(st.booleans(), ranges), max_size=60))
@settings(max_examples=150, deadline=None)
def test_the_table_agrees_with_a_list(steps: list[tuple[bool, Lock]]) -> None:
    table = Intervals()
    entered: list[Lock] = []
    for take_out, wanted in steps:
        if take_out and entered:
            table.remove(entered.pop(wanted.offset % len(entered)))
        blocker = table.blocker(wanted.offset, wanted.length)
        in_the_way = [other for other in entered if overlap(other, wanted)]
        assert (blocker in in_the_way) if in_the_way else blocker is None
        if blocker is None:
            table.add(wanted)
            entered.append(wanted)
        assert bool(table) == bool(entered)
    for entry in entered:
        table.remove(entry)
    assert not table and not table.busy and not table.large


def test_a_waiter_is_handed_out_once_and_only_by_what_it_waits_for() -> None:
    table = Intervals()
    first, second = Lock(0, BLOCK), Lock(BLOCK, BLOCK)
    table.add(first)
    table.add(second)
    woken: list[str] = []
    table.wait(first, lambda: woken.append("one"))
    table.wait(first, lambda: woken.append("two"))
    assert table.has_waiters and table.wanted(first) and not table.wanted(second)
    assert table.remove(second) == []
    for wake in table.remove(first):
        wake()
    assert woken == ["one", "two"] and not table.has_waiters


def test_two_ranges_that_share_only_a_block_overlap() -> None:
    table = Intervals()
    table.add(Lock(512, 512))
    assert table.blocker(1024, 512) is not None
    assert table.blocker(BLOCK, 512) is None


def test_a_large_range_is_found_from_both_ends() -> None:
    table = Intervals()
    table.add(Lock(10 * BLOCK, LARGE))
    assert table.large and not table.busy
    assert table.blocker(10 * BLOCK + LARGE - 512, BLOCK) is not None
    assert table.blocker(9 * BLOCK, BLOCK + 1) is not None
    assert table.blocker(9 * BLOCK, BLOCK) is None
