"""The ledger of the integration tests notices what it is there to notice."""

from __future__ import annotations

import random

from tests.ledger import BLOCK, Cmd, Ledger, Request, number_of, stamp


def one_block_writes(ledger: Ledger, n_writes: int) -> list[Request]:
    """Writes of block 0, in the order in which they are sent."""
    return [ledger._sent(0, 1) for _ in range(n_writes)]


def numbers(requests: list[Request]) -> list[int]:
    """What the requests write: their numbers, 0 for zeroes."""
    return [number_of(r.data, 0) or 0 if r.kind == Cmd.WRITE else 0 for r in requests]


def new_ledger() -> Ledger:
    return Ledger(BLOCK, random.Random(1))


def test_an_acknowledged_write_may_not_be_missing() -> None:
    ledger = new_ledger()
    (request,) = one_block_writes(ledger, 1)
    (number,) = numbers([request])
    assert ledger.possible(0) == {0, number}
    ledger.answered(request)
    assert ledger.possible(0) == {number}


def test_a_later_write_replaces_an_earlier_one_only_when_it_came_after_its_answer() -> None:
    ledger = new_ledger()
    first, second = one_block_writes(ledger, 2)
    ledger.answered(second)
    ledger.answered(first)
    assert ledger.possible(0) == set(numbers([first, second]))  # they were in flight together
    (third,) = one_block_writes(ledger, 1)
    assert ledger.possible(0) == set(numbers([first, second, third]))
    ledger.answered(third)
    assert ledger.possible(0) == set(numbers([third]))


def test_what_was_never_answered_may_be_there_until_the_next_acknowledged_write() -> None:
    ledger = new_ledger()
    first, lost = one_block_writes(ledger, 2)
    ledger.answered(first)
    ledger.session_over()
    assert ledger.possible(0) == set(numbers([first, lost]))
    (later,) = one_block_writes(ledger, 1)
    ledger.answered(later)
    assert ledger.possible(0) == set(numbers([later]))


def test_a_block_of_two_writes_is_of_none() -> None:
    mixed = stamp(5, 3)[: BLOCK // 2] + stamp(6, 3)[BLOCK // 2 :]
    assert number_of(mixed, 3) is None
    assert number_of(stamp(5, 3), 4) is None  # the right bytes at the wrong place
    assert number_of(stamp(5, 3), 3) == 5 and number_of(bytes(BLOCK), 3) == 0
