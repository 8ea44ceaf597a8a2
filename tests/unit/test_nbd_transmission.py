"""nbd/transmission, slices and replies: commands, flags and errors by the tables of the NBD protocol."""

from __future__ import annotations

import errno
import random
from collections.abc import Sequence

import pytest
from tandem.nbd.budget import INFLIGHT_BYTES_MAX, Budget
from tandem.nbd.codec import ERRORS, ClientError, NbdError, nbd_error
from tandem.nbd.slices import PIECES_MAX
from tandem.nbd.transmission import READ_PIECES_MAX, REQUESTS_MAX, StatusQuery, Transmission
from tandem.repl.requests import FUA, MAY_UNMAP, Buffer, Op, Request

from tests.nbd_volume import RamVolume
from tests.nbd_wire import (
    CACHE,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EPERM,
    ESHUTDOWN,
    EXTENDED,
    F_DF,
    F_FAST_ZERO,
    F_FUA,
    F_NO_HOLE,
    F_PAYLOAD_LEN,
    F_REQ_ONE,
    FLUSH,
    READ,
    RESIZE,
    SIMPLE,
    STATUS,
    STRUCTURED,
    STYLES,
    TRIM,
    WRITE,
    ZEROES,
    Answer,
    ReplyReader,
    request,
)

KIB, MIB = 1 << 10, 1 << 20
SIZE = 80 * MIB


class Rig:
    """A Transmission on a RamVolume, driven by hand: `say` bytes, look at `answers`."""

    def __init__(
        self, style: str = STRUCTURED, *, size: int = SIZE, writable: bool = True, allocation: bool = True,
        budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self.style = style
        self.volume = RamVolume(size, number=3, at_once=True)
        self.reader = ReplyReader(style)
        self.answers: list[Answer] = []
        self.queries: list[StatusQuery] = []
        self.n_sends = 0
        self.n_settled = 0
        self.broken = ""  # why the connection is of no further use
        self.held: list[Request] | None = None  # requests kept back while it is a list
        self.transmission = Transmission(
            self, 3, size, budget or Budget(), writable=writable, structured=style == STRUCTURED,
            extended=style == EXTENDED, allocation=allocation and style != SIMPLE,
        )  # fmt: skip
        self.n_asked = 0
        self.rest = b""

    # the Port
    def submit(self, batch: list[Request]) -> None:
        if self.held is not None:
            self.held += batch
        else:
            self.volume.submit(batch)

    def send(self, buffers: list[Buffer]) -> None:
        self.n_sends += 1
        self.answers += self.reader.feed(b"".join(buffers))

    def ask_status(self, query: StatusQuery) -> None:
        self.queries.append(query)

    @property
    def unsent(self) -> int:
        return 0

    def broken_off(self, why: str) -> None:
        self.broken = why

    def settled(self) -> None:
        self.n_settled += 1

    # the client
    def say(self, data: bytes) -> None:
        self.rest += data
        used = self.transmission.consume(memoryview(self.rest))
        self.rest = self.rest[used:]
        if self.rest:
            assert self.transmission.need(memoryview(self.rest)) > len(self.rest)

    def pack(self, command: int, offset: int = 0, length: int = 0, flags: int = 0,
             payload: bytes | None = None) -> bytes:  # fmt: skip
        self.n_asked += 1
        if command == READ:
            self.reader.reads[self.n_asked] = (offset, length)
        return request(self.style, command, self.n_asked, offset, length, flags, payload)

    def ask(self, command: int, offset: int = 0, length: int = 0, flags: int = 0,
            payload: bytes | None = None) -> Answer:  # fmt: skip
        """One request and its answer."""
        before = len(self.answers)
        self.say(self.pack(command, offset, length, flags, payload))
        assert len(self.answers) == before + 1
        assert self.answers[-1].cookie == self.n_asked
        assert self.transmission.n_open == 0
        return self.answers[-1]

    def release(self, n: int | None = None) -> None:
        """Let the volume see the first *n* requests that were kept back."""
        assert self.held is not None
        batch = self.held[:n]
        del self.held[:n]
        owners: dict[int, list[Request]] = {}
        for r in batch:
            owners.setdefault(id(r.owner), []).append(r)
        for mine in owners.values():
            self.volume._answer(mine)
            self.volume.n_inside += len(mine)  # they never went through submit


@pytest.fixture(params=STYLES)
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(request.param)


def test_write_then_read(rig: Rig) -> None:
    data = random.Random(1).randbytes(8 * KIB)
    assert rig.ask(WRITE, 4 * KIB, payload=data).error == 0
    assert rig.ask(READ, 4 * KIB, 8 * KIB).data == data
    assert rig.volume.seen == [(Op.WRITE, 4 * KIB, 8 * KIB, 0), (Op.READ, 4 * KIB, 8 * KIB, 0)]


def test_a_batch_is_submitted_once_and_answered_with_one_send(rig: Rig) -> None:
    rig.say(b"".join(rig.pack(WRITE, n * 4096, payload=bytes([n]) * 4096) for n in range(32)))
    assert (rig.volume.n_submits, rig.n_sends) == (1, 1)
    rig.say(b"".join(rig.pack(READ, n * 4096, 4096) for n in range(32)))
    assert (rig.volume.n_submits, rig.n_sends) == (2, 2)
    assert [a.data for a in rig.answers[32:]] == [bytes([n]) * 4096 for n in range(32)]
    assert [a.cookie for a in rig.answers] == list(range(1, 65))


def test_a_payload_is_not_copied(rig: Rig) -> None:
    rig.held = []
    stream = rig.pack(WRITE, 0, payload=b"x" * 512)
    rig.transmission.consume(memoryview(stream))
    payload = rig.held[0].payload
    assert isinstance(payload, memoryview) and payload.obj is stream


def test_fua_is_accepted_on_every_command(rig: Rig) -> None:
    assert rig.ask(READ, 0, 512, F_FUA).error == 0
    assert rig.ask(WRITE, 0, flags=F_FUA, payload=bytes(512)).error == 0
    assert rig.ask(FLUSH, flags=F_FUA).error == 0
    assert rig.ask(TRIM, 0, 512, F_FUA).error == 0
    assert rig.ask(ZEROES, 0, 512, F_FUA).error == 0
    assert rig.ask(ZEROES, 0, 512, F_FUA | F_NO_HOLE).error == 0
    assert [(op, flags) for op, _, _, flags in rig.volume.seen] == [
        (Op.READ, 0), (Op.WRITE, FUA), (Op.FLUSH, 0), (Op.TRIM, FUA), (Op.ZEROES, FUA | MAY_UNMAP),
        (Op.ZEROES, FUA),
    ]  # fmt: skip


ANY_FLAG = tuple(1 << n for n in range(16))
GOOD_FLAGS = {
    READ: F_FUA | F_DF, WRITE: F_FUA, FLUSH: F_FUA, TRIM: F_FUA, ZEROES: F_FUA | F_NO_HOLE | F_FAST_ZERO,
    STATUS: F_FUA | F_REQ_ONE,
}  # fmt: skip


@pytest.mark.parametrize("flag", ANY_FLAG)
@pytest.mark.parametrize("command", GOOD_FLAGS)
def test_flags_on_the_wrong_command_are_refused(rig: Rig, command: int, flag: int) -> None:
    if flag & GOOD_FLAGS[command] and not (flag == F_DF and rig.style == SIMPLE):
        return
    if flag == F_PAYLOAD_LEN and command == WRITE and rig.style == EXTENDED:
        return
    payload = bytes(512) if command == WRITE or (flag == F_PAYLOAD_LEN and rig.style == EXTENDED) else None
    assert rig.ask(command, 0, 512, flag, payload).error == EINVAL
    assert rig.volume.seen == []
    assert rig.ask(READ, 0, 512).error == 0, "the stream is still in step"


@pytest.mark.parametrize("command", [CACHE, RESIZE, 9, 0xFFFF])
def test_unknown_commands(rig: Rig, command: int) -> None:
    assert rig.ask(command, 0, 512).error == EINVAL
    assert rig.ask(READ, 0, 512).error == 0


@pytest.mark.parametrize(
    ("command", "offset", "length", "error"),
    [
        (READ, SIZE, 512, EINVAL), (READ, SIZE - 512, 1024, EINVAL), (WRITE, SIZE, 512, ENOSPC),
        (WRITE, SIZE - 512, 1024, ENOSPC), (TRIM, SIZE - 512, 1024, EINVAL), (ZEROES, SIZE, 512, ENOSPC),
        (STATUS, SIZE, 512, EINVAL), (READ, (1 << 64) - 512, 1024, EINVAL),
        (WRITE, (1 << 64) - 512, 1024, ENOSPC),
        (READ, 1, 512, EINVAL), (READ, 0, 511, EINVAL), (WRITE, 256, 512, EINVAL), (WRITE, 0, 513, EINVAL),
        (TRIM, 1, 512, EINVAL), (ZEROES, 0, 1, EINVAL), (STATUS, 5, 512, EINVAL), (STATUS, 0, 0, EINVAL),
        (READ, 0, 32 * MIB + 512, EINVAL), (READ, SIZE + 512, 0, EINVAL),
    ],
)  # fmt: skip
def test_ranges(rig: Rig, command: int, offset: int, length: int, error: int) -> None:
    payload = bytes(length) if command == WRITE else None
    answer = rig.ask(command, offset, length, payload=payload)
    assert answer.error == error
    assert bool(answer.text) is (rig.style != SIMPLE)
    assert rig.volume.seen == []
    assert rig.ask(READ, SIZE - 512, 512).error == 0


def test_length_zero_does_nothing_and_is_no_error(rig: Rig) -> None:
    for command in (READ, WRITE, TRIM, ZEROES):
        assert rig.ask(command, 4096, 0).error == 0
    assert rig.volume.seen == []


def test_read_only() -> None:
    for style in STYLES:
        rig = Rig(style, writable=False)
        assert rig.ask(WRITE, 0, payload=bytes(4096)).error == EPERM
        assert rig.ask(WRITE, 0, payload=bytes(2 * MIB)).error == EPERM
        assert rig.ask(TRIM, 0, 4096).error == EPERM
        assert rig.ask(ZEROES, 0, 4096).error == EPERM
        assert rig.ask(FLUSH).error == 0
        assert rig.ask(READ, 0, 4096).data == bytes(4096)
        assert [seen[0] for seen in rig.volume.seen] == [Op.FLUSH, Op.READ]


def test_fast_zero_is_declined_without_touching_anything(rig: Rig) -> None:
    rig.ask(WRITE, 0, payload=b"x" * 512)
    assert rig.ask(ZEROES, 0, 512, F_FAST_ZERO).error == ENOTSUP
    assert rig.ask(READ, 0, 512).data == b"x" * 512


def test_df_for_any_length() -> None:
    for style in (STRUCTURED, EXTENDED):
        rig = Rig(style)
        for length in (64 * KIB, 64 * KIB + 512, 32 * MIB):
            assert rig.ask(READ, 0, length, F_DF).data == bytes(length)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 32 * MIB), (MIB - 512, 1024), (512, MIB), (3 * MIB, 2 * MIB)]
)
def test_big_requests_are_sliced_and_answered_once(rig: Rig, offset: int, length: int) -> None:
    data = random.Random(length).randbytes(length)
    assert rig.ask(WRITE, offset, flags=F_FUA, payload=data).error == 0
    assert rig.ask(READ, offset, length).data == data
    pieces = [(o, n) for op, o, n, flags in rig.volume.seen if op == Op.WRITE and flags == FUA]
    assert len(pieces) > 1
    assert sum(n for _, n in pieces) == length
    assert all(o // MIB == (o + n - 1) // MIB for o, n in pieces)


def test_a_big_write_is_streamed(rig: Rig) -> None:
    """Pieces are on their way before the payload has arrived, and nothing of it is collected."""
    stream = rig.pack(WRITE, MIB // 2, payload=bytes(32 * MIB))
    rig.say(stream[: len(stream) - 32 * MIB + MIB // 2])
    assert rig.volume.seen == [(Op.WRITE, MIB // 2, MIB // 2, 0)]
    assert rig.answers == []
    rig.say(stream[len(stream) - 32 * MIB + MIB // 2 :])
    assert len(rig.volume.seen) == 33
    assert [a.error for a in rig.answers] == [0]


def test_payloads_beyond_the_limit(rig: Rig) -> None:
    assert rig.ask(WRITE, 0, payload=bytes(32 * MIB + 512)).error == EINVAL
    assert rig.volume.seen == []
    with pytest.raises(ClientError, match="a payload of"):
        rig.say(rig.pack(WRITE, 0, (64 << 20) + 512))
    assert rig.transmission.n_open == 0


def test_a_failed_piece_fails_the_request_and_starts_no_more(rig: Rig) -> None:
    rig.volume.errors = {Op.WRITE: errno.ENOSPC, Op.READ: errno.EIO, Op.TRIM: errno.EIO}
    stream = rig.pack(WRITE, 0, payload=bytes(4 * MIB))
    rig.say(stream[: 2 * MIB])
    assert rig.answers == [], "a write is answered when its payload is read to the end"
    rig.say(stream[2 * MIB :])
    assert [a.error for a in rig.answers] == [ENOSPC]
    assert len(rig.volume.seen) == 1
    assert rig.ask(READ, 0, 4 * MIB).error == EIO
    rig.volume.seen.clear()
    assert rig.ask(TRIM, 0, SIZE).error == EIO
    assert len(rig.volume.seen) == 1


def test_a_trim_of_the_whole_device_is_bounded() -> None:
    rig = Rig(EXTENDED, size=SIZE)
    rig.transmission.size = 10 << 40  # only the numbers are looked at
    rig.held = []
    rig.say(rig.pack(TRIM, 0, 10 << 40) + rig.pack(READ, 0, 512))
    assert len(rig.held) == PIECES_MAX + 1, "a read is not kept waiting by it"
    assert not rig.transmission.busy
    n = 0
    while rig.held:
        first = rig.held.pop(0)
        n += first.op == Op.TRIM
        if first.op == Op.READ:
            first.payload = bytes(512)
        first.owner.finished([first])
        assert len(rig.held) <= PIECES_MAX + 1
    assert n == (10 << 40) // (128 << 20)
    assert sorted(a.error for a in rig.answers) == [0, 0]


def test_a_volume_that_answers_at_once_does_not_exhaust_the_stack() -> None:
    class Instant(Rig):
        def submit(self, batch: list[Request]) -> None:
            for r in batch:
                r.payload = bytes(r.length) if r.op == Op.READ else None
                r.owner.finished([r])

    rig = Instant(EXTENDED)
    rig.transmission.size = 10 << 40
    assert rig.ask(ZEROES, 0, 10 << 40).error == 0
    rig.say(b"".join(rig.pack(READ, n * MIB, MIB) for n in range(400)))
    assert all(a.error == 0 for a in rig.answers)
    assert len(rig.answers) == 401
    assert rig.transmission.n_open == 0


def test_reads_wait_for_room(rig: Rig) -> None:
    """Small requests for much data do not make the machine hold it all."""
    rig.held = []
    rig.say(b"".join(rig.pack(READ, 0, MIB) for _ in range(100)) + rig.pack(READ, 0, 32 * MIB))
    assert sum(r.length for r in rig.held) == INFLIGHT_BYTES_MAX
    assert rig.transmission.busy
    assert rig.transmission.n_open == 101
    while rig.held:
        rig.release(7)
        pieces = [r.length for r in rig.held]
        assert sum(pieces) <= INFLIGHT_BYTES_MAX + READ_PIECES_MAX * MIB, "a long read has room of its own"
    assert len(rig.answers) == 101
    assert not rig.transmission.busy
    assert rig.transmission.n_open == 0
    assert rig.n_settled


def test_too_many_requests_make_it_busy(rig: Rig) -> None:
    rig.held = []
    rig.say(b"".join(rig.pack(FLUSH) for _ in range(REQUESTS_MAX - 1)))
    assert not rig.transmission.busy
    rig.say(rig.pack(FLUSH))
    assert rig.transmission.busy
    rig.release(1)
    assert not rig.transmission.busy


def test_answers_come_in_the_order_of_the_volume_and_cookies_are_opaque(rig: Rig) -> None:
    rig.held = []
    rig.say(b"".join(request(rig.style, FLUSH, cookie) for cookie in (7, 7, 0, (1 << 64) - 1)))
    rig.held.reverse()
    rig.release()
    assert [a.cookie for a in rig.answers] == [(1 << 64) - 1, 0, 7, 7]


def test_disc_finishes_what_is_outstanding_and_reads_no_more(rig: Rig) -> None:
    rig.held = []
    rig.say(rig.pack(WRITE, 0, payload=bytes(512)))
    rig.say(request(rig.style, DISC, 99, 0, 0) + b"anything at all, even nonsense beyond the end")
    assert rig.transmission.closing
    assert rig.rest == b""
    assert rig.transmission.n_open == 1
    rig.release()
    assert [a.cookie for a in rig.answers] == [1]
    assert rig.transmission.n_open == 0


def test_a_wrong_magic_ends_the_session_after_what_came_before(rig: Rig) -> None:
    with pytest.raises(ClientError, match="instead of"):
        rig.say(rig.pack(WRITE, 0, payload=b"x" * 512) + bytes(64))
    assert [a.error for a in rig.answers] == [0]
    other = STRUCTURED if rig.style == EXTENDED else EXTENDED
    with pytest.raises(ClientError, match="instead of"):
        Rig(rig.style).say(request(other, READ, 1, 0, 512) + bytes(8))


@pytest.mark.parametrize("half", [False, True])
def test_a_client_that_vanishes_leaves_nothing_open(rig: Rig, half: bool) -> None:
    """*half*: in the middle of a payload."""
    rig.held = []
    rig.say(b"".join(rig.pack(READ, 0, MIB) for _ in range(40)) + rig.pack(READ, 0, 8 * MIB))
    rig.say(rig.pack(TRIM, 0, SIZE) + rig.pack(WRITE, 0, payload=bytes(512)))
    if half:
        rig.say(rig.pack(WRITE, 0, payload=bytes(4 * MIB))[: 2 * MIB])
    rig.transmission.abandon()
    while rig.held:
        rig.release(5)
    assert rig.transmission.n_open == 0
    assert rig.answers == []


def test_a_client_that_vanishes_in_the_middle_of_a_sliced_read(rig: Rig) -> None:
    rig.held = []
    rig.say(rig.pack(READ, 0, MIB) + rig.pack(READ, 0, 32 * MIB) + rig.pack(READ, 0, 2 * MIB))
    n_held = 1 + READ_PIECES_MAX
    assert len(rig.held) == n_held, "the first read and a part of the second are out, of the third nothing"
    rig.transmission.abandon()
    assert rig.transmission.n_open == 2
    rig.release(n_held - 1)
    assert rig.transmission.n_open == 1
    rig.release()
    assert rig.transmission.n_open == 0


def test_close_in_the_middle_of_a_payload_answers_it_with_an_error(rig: Rig) -> None:
    rig.held = []
    rig.say(rig.pack(WRITE, 0, payload=bytes(4 * MIB))[: 2 * MIB])
    rig.transmission.close()
    rig.release()
    assert [a.error for a in rig.answers] == [ESHUTDOWN]
    assert rig.transmission.n_open == 0
    refused = Rig(rig.style, writable=False)
    refused.say(refused.pack(WRITE, 0, payload=bytes(4 * MIB))[: 2 * MIB])
    assert refused.transmission.n_open == 1
    refused.transmission.close()
    assert refused.transmission.n_open == 0


def test_extended_write_must_carry_its_payload_length() -> None:
    rig = Rig(EXTENDED)
    head = bytearray(rig.pack(WRITE, 0, payload=bytes(512)))
    head[4:6] = b"\0\0"
    rig.say(bytes(head))
    assert rig.answers[-1].error == EINVAL
    assert rig.ask(READ, 0, 512).error == 0


def test_errors_of_the_volume_carry_a_sentence(rig: Rig) -> None:
    for number, (error, text) in ERRORS.items():
        rig.volume.errors = {Op.WRITE: number, Op.READ: number}
        for answer in (rig.ask(WRITE, 0, payload=bytes(512)), rig.ask(READ, 0, 512)):
            assert answer.error == error
            assert answer.text == ("" if rig.style == SIMPLE else text)


def test_unlisted_errnos_are_eio() -> None:
    assert nbd_error(errno.ENODEV) == (NbdError.EIO, "The volume answered with ENODEV.")
    assert nbd_error(99999)[0] is NbdError.EIO
    for number in (errno.ENOMEM, errno.EOPNOTSUPP, errno.EOVERFLOW):
        assert nbd_error(number)[0] is NbdError.EIO


def test_mixed_batch_of_good_and_bad(rig: Rig) -> None:
    rig.volume.errors = {Op.FLUSH: errno.EIO}
    rig.say(
        rig.pack(WRITE, 0, payload=b"a" * 512) + rig.pack(READ, 1, 512) + rig.pack(FLUSH)
        + rig.pack(READ, 0, 512) + rig.pack(WRITE, SIZE, payload=bytes(512)) + rig.pack(TRIM, 4096, 512)
    )  # fmt: skip
    assert {a.cookie: a.error for a in rig.answers} == {1: 0, 2: EINVAL, 3: EIO, 4: 0, 5: ENOSPC, 6: 0}
    assert next(a.data for a in rig.answers if a.cookie == 4) == b"a" * 512


# ------------------------------------------------------------------------------------ block status


def status(
    style: str, offset: int, length: int, flags: int, known: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    rig = Rig(style)
    rig.say(rig.pack(STATUS, offset, length, flags))
    (query,) = rig.queries
    assert (query.offset, query.length) == (offset, length)
    rig.transmission.status_known(query, known)
    assert rig.transmission.n_open == 0
    extents = rig.answers[-1].extents
    assert extents is not None
    return extents


@pytest.mark.parametrize("style", [STRUCTURED, EXTENDED])
def test_block_status(style: str) -> None:
    known = [(4096, 0), (4096, 3), (8192, 3), (1 << 40, 0)]
    assert status(style, 0, 32768, 0, known) == [(4096, 0), (12288, 3), (16384, 0)]
    assert status(style, 0, 32768, F_REQ_ONE, known) == [(4096, 0)]
    assert status(style, 0, 512, F_REQ_ONE, known) == [(512, 0)]
    assert status(style, 0, 6144, 0, known) == [(4096, 0), (2048, 3)]
    assert status(style, 0, 32768, 0, []) == [(32768, 0)], "nothing known: nothing promised"


def test_block_status_of_more_than_4_gib_in_one_extent() -> None:
    rig = Rig(EXTENDED)
    rig.transmission.size = 10 << 40
    rig.say(rig.pack(STATUS, 0, 10 << 40))
    rig.transmission.status_known(rig.queries[0], [(10 << 40, 3)])
    assert rig.answers[-1].extents == [(10 << 40, 3)]


def test_block_status_without_a_context(rig: Rig) -> None:
    plain = Rig(rig.style, allocation=False)
    assert plain.ask(STATUS, 0, 4096).error == EINVAL
    assert plain.queries == []


# ------------------------------------------------------------------------------------ all together


def say_in_pieces(rig: Rig, stream: bytes, draw: random.Random) -> None:
    at = 0
    while at < len(stream):
        step = draw.choice((1, 28, 100, 5000, 300_000))
        rig.say(stream[at : at + step])
        at += step


@pytest.mark.parametrize("seed", range(12))
def test_random_streams_in_random_cuts(rig: Rig, seed: int) -> None:
    """Any mixture of requests, cut anywhere: each is answered once, with what a plain array would hold."""
    draw = random.Random(seed)
    size = 3 * MIB
    rig.transmission.size = rig.volume.size = size
    image = bytearray(size)
    stream, expected = bytearray(), {}
    one_by_one = bool(seed % 2)
    for _ in range(60):
        command = draw.choice((READ, READ, WRITE, WRITE, WRITE, FLUSH, TRIM, ZEROES, CACHE))
        unit = draw.choice((512, 512, 4096, 1))
        offset = draw.randrange(size // unit) * unit
        length = draw.choice((0, 1, 8, 100, 512)) * unit
        end, aligned = offset + length, not (offset | length) & 511
        payload = draw.randbytes(length) if command == WRITE else None
        packed = rig.pack(command, offset, length, payload=payload)
        stream += packed
        if one_by_one:
            say_in_pieces(rig, packed, draw)
        error, data = 0, None
        if command == CACHE:
            error = EINVAL
        elif command != FLUSH and end > size:
            error = ENOSPC if command in (WRITE, ZEROES) else EINVAL
        elif command != FLUSH and not aligned:
            error = EINVAL
        elif command == WRITE:
            image[offset:end] = payload or b""
        elif command in (TRIM, ZEROES):
            image[offset:end] = bytes(length)
        elif command == READ and (length or rig.style == SIMPLE):
            data = bytes(image[offset:end])
        expected[rig.n_asked] = (error, data)
    if not one_by_one:
        say_in_pieces(rig, bytes(stream), draw)
        # A read that came together with later writes may see them, so only the errors are compared.
        expected = {cookie: (error, None) for cookie, (error, _) in expected.items()}
    answers = {a.cookie: (a.error, a.data if one_by_one else None) for a in rig.answers}
    assert answers == expected
    assert len(rig.answers) == len(expected)
    assert rig.volume.image[:size] == image
    assert rig.transmission.n_open == 0
