"""nbd/budget, and what sessions do with it: what clients do not read is bounded, and nobody waits for them."""

from __future__ import annotations

import errno
import random

import pytest
from tandem.nbd.budget import LOAN_MAX, ROOM_MIN, TOTAL, Budget
from tandem.repl.edge.stream import BACKLOG_HIGH, BACKLOG_LOW
from tandem.repl.requests import Buffer, Op, Request

from tests.nbd_wire import EIO, F_DF, FLUSH, READ, SIMPLE, STRUCTURED, STYLES, TRIM, WRITE, Answer
from tests.unit.test_nbd_transmission import KIB, MIB, Rig

LONG = 32 * MIB
OVERSHOOT = MIB + 4 * KIB  # the request or piece that exceeds the room is the last one; and the headers


class Slow(Rig):
    """A client that reads its answers when told to; sent bytes wait for it as they do in a `Sender`."""

    def __init__(self, style: str = STRUCTURED, *, budget: Budget | None = None) -> None:
        self.queue = bytearray()
        self.above = False
        super().__init__(style, budget=budget)

    @property
    def unsent(self) -> int:
        return len(self.queue)

    def send(self, buffers: list[Buffer]) -> None:
        self.queue += b"".join(buffers)
        self.above = self.above or len(self.queue) > BACKLOG_HIGH

    def read(self, n: int) -> None:
        """The client takes *n* bytes of what waits for it."""
        taken = bytes(self.queue[:n])
        del self.queue[:n]
        self.answers += self.reader.feed(taken)
        if not self.queue or (self.above and len(self.queue) <= BACKLOG_LOW):
            self.above = False
            self.transmission.refill()

    def read_all(self) -> list[Answer]:
        while self.queue:
            self.read(100 * KIB)
        assert self.transmission.n_open == 0
        return self.answers

    @property
    def holds(self) -> int:
        """Bytes in the machine (but for those it answered at once) and unsent."""
        return sum(r.length for r in self.held or ()) + len(self.queue) + self.transmission._n_later


def test_a_loan_leaves_something_for_the_next() -> None:
    budget = Budget()
    assert budget.lend() == LOAN_MAX
    loans = [LOAN_MAX, *(budget.lend() for _ in range(40))]
    assert loans == sorted(loans, reverse=True)
    assert min(loans) > 0
    assert budget.free == TOTAL - sum(loans) > 0
    for loan in loans:
        budget.give_back(loan)
    assert budget.free == TOTAL
    assert not budget.lend_all(TOTAL // 2 + 1)
    assert budget.lend_all(TOTAL // 2)
    assert budget.free == TOTAL // 2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("length", [MIB, LONG])
def test_what_nobody_reads_is_bounded(style: str, length: int) -> None:
    """A hundred clients ask for gigabytes and read nothing: each gets something, together they hold the budget."""
    budget = Budget()
    crowd = [Slow(style, budget=budget) for _ in range(100)]
    for client in crowd:
        client.say(b"".join(client.pack(READ, 0, length) for _ in range(40)))
        assert client.transmission.busy
    assert sum(client.holds for client in crowd) <= TOTAL + len(crowd) * (ROOM_MIN + OVERSHOOT)
    assert all(client.holds >= MIB for client in crowd)
    late = Slow(style, budget=budget)
    for command, n in ((READ, LONG), (READ, 4 * KIB), (FLUSH, 0)):
        late.say(late.pack(command, 0, n))
    assert [answer.error for answer in late.read_all()] == [0, 0, 0], "who reads is served all the same"
    for client in crowd:
        client.queue.clear()
        client.transmission.abandon()
    assert budget.free == TOTAL


def test_one_client_does_not_take_the_whole_budget() -> None:
    budget = Budget()
    client = Slow(budget=budget)
    client.say(b"".join(client.pack(READ, 0, LONG) for _ in range(40)))
    assert LONG <= client.holds <= LONG + OVERSHOOT
    assert budget.free >= TOTAL - LONG
    client.transmission.abandon()
    slow_disk = Slow(budget=budget)
    slow_disk.held = []
    slow_disk.say(b"".join(slow_disk.pack(READ, 0, LONG) for _ in range(40)))
    assert budget.free >= TOTAL - 2 * LONG


def test_unsent_answers_take_room_from_what_is_asked_next() -> None:
    client = Slow(budget=Budget(0))
    for _ in range(3):
        client.say(client.pack(READ, 0, MIB - 8 * KIB) + client.pack(READ, 0, MIB))
    assert client.holds <= ROOM_MIN + OVERSHOOT
    client.read_all()


def test_answers_that_wait_for_a_stream_do_not_stop_it() -> None:
    client = Slow(budget=Budget(0))
    client.held = []
    client.say(client.pack(READ, 0, MIB) + client.pack(READ, 0, LONG))
    client.release(1)
    while client.held or client.queue:
        client.release()
        client.read(MIB)
    assert [answer.cookie for answer in client.read_all()] == [2, 1]


def test_answers_that_wait_for_a_stream_are_bounded() -> None:
    """Its last piece takes its time, while the client asks for more and more."""
    client = Slow(budget=Budget(16 * MIB))
    client.held = []
    client.say(client.pack(READ, 0, LONG))
    while client.held[-1].offset < LONG - MIB:
        client.release(len(client.held) - 1 or 1)
        client.read(len(client.queue))
    last = client.held.pop()
    client.release()
    for _ in range(40):
        if not client.transmission.busy:
            client.say(client.pack(READ, 0, 512 * KIB))
        client.release()
        assert client.transmission._n_later <= 4 * MIB + ROOM_MIN + OVERSHOOT
    client.held.append(last)
    while client.held or client.queue:
        client.release()
        client.read(MIB)
    assert len(client.read_all()) == client.n_asked > 1


def test_a_loan_is_given_back_when_it_is_not_needed() -> None:
    budget = Budget()
    client = Slow(budget=budget)
    client.say(b"".join(client.pack(READ, 0, MIB) for _ in range(8)))
    assert budget.free == TOTAL - LOAN_MAX
    client.read_all()
    assert budget.free == TOTAL
    client.held = []
    client.say(b"".join(client.pack(WRITE, n * MIB, payload=bytes(MIB)) for n in range(8)))
    assert budget.free == TOTAL - LOAN_MAX
    assert not client.transmission.busy
    client.transmission.abandon()
    assert budget.free == TOTAL - LOAN_MAX, "the machine still has the payloads"
    client.release()
    assert budget.free == TOTAL


@pytest.mark.parametrize("style", STYLES)
def test_a_long_read_without_room_for_all_of_it_is_sent_as_it_comes(style: str) -> None:
    client = Slow(style, budget=Budget(0))
    client.volume.image[:LONG] = random.Random(1).randbytes(LONG)
    client.say(client.pack(READ, 0, LONG))
    most = client.holds
    assert most >= MIB, "its beginning is there before the rest was read"
    while client.queue:
        client.read(100 * KIB)
        most = max(most, client.holds)
    assert most <= ROOM_MIN + OVERSHOOT
    (answer,) = client.read_all()
    assert answer.data == bytes(client.volume.image[:LONG])
    assert answer.chunks == (["simple"] if style == SIMPLE else ["1", "0"])
    assert not client.transmission.busy


def test_a_stream_is_one_data_chunk_so_that_df_holds() -> None:
    client = Slow(budget=Budget(0))
    client.say(client.pack(READ, 0, LONG, F_DF))
    assert client.read_all()[0].chunks == ["1", "0"]


@pytest.mark.parametrize("style", STYLES)
def test_the_pieces_of_a_stream_are_sent_in_order_and_nothing_between_them(style: str) -> None:
    client = Slow(style, budget=Budget(16 * MIB))
    client.volume.image[:LONG] = random.Random(2).randbytes(LONG)
    client.held = []
    client.say(client.pack(FLUSH) + client.pack(READ, 0, 4 * KIB) + client.pack(READ, 0, LONG))
    assert len(client.held) > 4, "several pieces are in the machine"
    flush, short = client.held.pop(0), client.held.pop(0)
    client.held[:2] = client.held[1::-1]
    client.release(1)
    assert client.queue == b"", "the second piece waits for the first"
    client.release(1)
    assert len(client.queue) >= 2 * MIB
    client.held += flush, short
    while client.held:
        client.release()
        while client.queue:
            client.read(MIB)
    assert [answer.cookie for answer in client.read_all()] == [3, 1, 2]
    assert client.answers[0].data == bytes(client.volume.image[:LONG])


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_that_fails_before_its_first_byte_is_an_ordinary_error(style: str) -> None:
    client = Slow(style, budget=Budget(0))
    client.volume.errors = {Op.READ: errno.EIO}
    client.say(client.pack(READ, 0, LONG))
    client.volume.errors = {}
    client.say(client.pack(READ, 0, 512))
    assert [(answer.error, answer.data) for answer in client.read_all()] == [(EIO, None), (0, bytes(512))]


@pytest.mark.parametrize("style", STYLES)
def test_a_stream_that_fails_later(style: str) -> None:
    """The client never takes anything else for data: it is told of the error, or the connection ends."""
    client = Slow(style, budget=Budget(0))
    client.held = []
    client.say(client.pack(TRIM, 0, 512) + client.pack(READ, 0, LONG))
    trim = client.held.pop(0)
    client.release(1)
    client.read(len(client.queue))
    client.held.append(trim)
    client.held.sort(key=lambda r: r.op != Op.TRIM)
    client.release(1)
    client.volume.errors = {Op.READ: errno.EIO}
    client.release()
    client.volume.errors = {}
    while client.queue:
        client.read(MIB)
    if style == SIMPLE:
        assert client.broken.startswith("a read failed after a part of it was sent: No disk of the mirror")
        assert client.transmission.closing
        assert client.answers == []
        assert len(client.reader.rest) == 16 + MIB
    else:
        assert client.broken == ""
        failed, trimmed = client.answers
        assert (failed.error, trimmed.error) == (EIO, 0)
    assert client.transmission.n_open == 0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("style", STYLES)
def test_any_mixture_is_answered_and_bounded(style: str, seed: int) -> None:
    """Whatever is asked for, in whatever order the volume answers and the client reads."""
    draw = random.Random(seed)
    budget = Budget(draw.choice((0, 6 * MIB, TOTAL)))
    total = budget.free
    client = Slow(style, budget=budget)
    image = client.volume.image
    image[: 40 * MIB] = draw.randbytes(40 * MIB)
    client.held = []
    for _ in range(30):
        if not client.transmission.busy:
            burst = [
                (draw.choice((READ, READ, READ, FLUSH)), draw.randrange(40) * 512 * KIB,
                 draw.choice((4 * KIB, 512 * KIB, 3 * MIB, 20 * MIB)))
                for _ in range(draw.randrange(6))
            ]  # fmt: skip
            client.say(b"".join(client.pack(c, o, n) if c == READ else client.pack(c) for c, o, n in burst))
        draw.shuffle(client.held)
        client.release(draw.randrange(len(client.held) + 1))
        client.read(draw.randrange(3 * MIB))
        assert client.holds <= total + ROOM_MIN + OVERSHOOT
    while client.held or client.queue:
        draw.shuffle(client.held)
        client.release(3)
        client.read(MIB)
    assert len(client.read_all()) == client.n_asked
    for answer in client.answers:
        assert answer.error == 0
        if answer.cookie in client.reader.reads:
            offset, length = client.reader.reads[answer.cookie]
            assert answer.data == bytes(image[offset : offset + length])
    assert budget.free == total


def test_a_client_that_vanishes_during_a_stream_leaves_nothing_open() -> None:
    budget = Budget(8 * MIB)
    client = Slow(budget=budget)
    client.held = []
    client.say(client.pack(READ, 0, 512) + client.pack(READ, 0, LONG) + client.pack(READ, 0, LONG))
    held: list[Request] = client.held
    short = held.pop(0)
    client.release(2)
    held.append(short)
    client.queue.clear()
    client.transmission.abandon()
    client.release()
    assert client.transmission.n_open == 0
    assert client.queue == b""
    assert budget.free == 8 * MIB
