"""nbd/negotiation: every option at every time, by the tables of the NBD protocol document."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest
from tandem.nbd.codec import ClientError
from tandem.nbd.negotiation import Negotiation, State
from tandem.repl.edge.volume import Volume

from tests.nbd_volume import RamVolume
from tests.nbd_wire import (
    ACK,
    ERR,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    GREETING,
    INFO,
    META,
    SERVER,
    OptionReply,
    context_data,
    info_data,
    option,
    option_replies,
)

EXPORT_NAME, ABORT, LIST, PEEK, STARTTLS, GET_INFO, GO, SR, LIST_META, SET_META, EXT = range(1, 12)
SIZE = 1 << 20
# HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, MULTI_CONN, FAST_ZERO
FLAGS = 1 | 4 | 8 | 32 | 64 | 256 | 2048
DF = 128


class Offer:
    def __init__(self, *volumes: RamVolume, writable: bool = True) -> None:
        self.list = volumes
        self.writable = writable
        self.late = False

    def not_yet(self, volume: Volume) -> bool:
        return self.late

    def volumes(self) -> Sequence[Volume]:
        return self.list

    def look(self, volume: Volume) -> tuple[bool, str | None]:
        if self.late:
            return self.writable, None
        writable, refusal = self.open(volume)
        if refusal is None:
            self.close(volume, writable)
        return writable, refusal

    def open(self, volume: Volume) -> tuple[bool, str | None]:
        refusal = volume.open(self.writable)
        return self.writable and refusal is None, refusal

    def close(self, volume: Volume, writable: bool) -> None:
        volume.close(writable)


class Client:
    """Speaks to a Negotiation and returns what comes back."""

    def __init__(self, *volumes: RamVolume, flags: int = 3, writable: bool = True) -> None:
        self.offer = Offer(*(volumes or (RamVolume(SIZE),)), writable=writable)
        self.server = Negotiation(self.offer)
        assert self.take() == GREETING
        self.say(struct.pack(">I", flags))

    def take(self) -> bytes:
        out = bytes(self.server.out)
        self.server.out.clear()
        return out

    def say(self, data: bytes) -> bytes:
        assert self.server.consume(memoryview(data)) == len(data)
        return self.take()

    def ask(self, number: int, data: bytes = b"") -> list[OptionReply]:
        replies = option_replies(self.say(option(number, data)))
        assert all(r.option == number for r in replies)
        return replies

    def kinds(self, number: int, data: bytes = b"") -> list[int]:
        return [r.kind for r in self.ask(number, data)]


def test_client_flags() -> None:
    for flags in (0, 1, 2, 3):
        Client(flags=flags)
    for flags in (4, 7, 1 << 31):
        with pytest.raises(ClientError, match="unknown client flags"):
            Client(flags=flags)


def test_without_fixed_newstyle_only_export_name() -> None:
    with pytest.raises(ClientError, match="fixed newstyle"):
        Client(flags=0).ask(LIST)
    client = Client(flags=0)
    assert client.say(option(EXPORT_NAME)) == struct.pack(">QH124x", SIZE, FLAGS)


@pytest.mark.parametrize(("flags", "zeroes"), [(1, 124), (3, 0)])
def test_export_name(flags: int, zeroes: int) -> None:
    volume = RamVolume(SIZE)
    client = Client(volume, flags=flags)
    assert client.say(option(EXPORT_NAME, b"r0")) == struct.pack(">QH", SIZE, FLAGS) + bytes(zeroes)
    assert client.server.state is State.TRANSMISSION
    assert volume.n_open_writable == 1
    terms = client.server.terms
    assert terms is not None and terms.writable and not terms.structured


def test_export_name_that_cannot_be_had_ends_the_session() -> None:
    refusing = RamVolume(SIZE)
    refusing.refusal = "r0 is Secondary on bob."
    for volume, name in ((RamVolume(SIZE), b"r1"), (refusing, b"r0"), (RamVolume(SIZE), b"\xff")):
        client = Client(volume)
        assert client.say(option(EXPORT_NAME, name)) == b""
        assert client.server.state is State.ENDED
        assert client.server.why
        assert volume.n_open == 0


def test_abort_is_acknowledged_and_its_data_ignored() -> None:
    for data in (b"", b"bye"):
        client = Client()
        assert client.kinds(ABORT, data) == [ACK]
        assert client.server.state is State.ENDED


def test_list() -> None:
    first, second = RamVolume(SIZE, "r0/0"), RamVolume(SIZE, "r0/1", number=1)
    second.description = "Secondary, Inconsistent"
    replies = Client(first, second).ask(LIST)
    assert [r.kind for r in replies] == [SERVER, SERVER, ACK]
    assert replies[0].data == b"\0\0\0\x04r0/0Primary, UpToDate"
    assert replies[1].data == b"\0\0\0\x04r0/1Secondary, Inconsistent"
    assert Client().kinds(LIST, b"x") == [ERR_INVALID]


def test_info_answers_as_go_does_and_leaves_the_volume_closed() -> None:
    volume = RamVolume(SIZE)
    client = Client(volume)
    asked = info_data("r0", 1, 2, 3, 77)
    info = client.ask(GET_INFO, asked)
    assert volume.n_open == 0
    assert client.server.state is State.HAGGLING
    go = client.ask(GO, asked)
    assert [(r.kind, r.data) for r in info] == [(r.kind, r.data) for r in go]
    assert volume.n_open == 1
    assert [r.kind for r in go] == [INFO, INFO, INFO, INFO, ACK]
    assert go[0].data == struct.pack(">HQH", 0, SIZE, FLAGS)
    assert go[1].data == b"\0\x01r0"
    assert go[2].data == b"\0\x02Primary, UpToDate"
    assert go[3].data == struct.pack(">HIII", 3, 512, 4096, 32 << 20)


def test_go_with_nothing_asked_gives_the_default_export() -> None:
    client = Client(RamVolume(SIZE, "r0/0"), RamVolume(2 * SIZE, "r0/1"))
    replies = client.ask(GO, info_data(""))
    assert [r.kind for r in replies] == [INFO, ACK]
    assert replies[0].data == struct.pack(">HQH", 0, SIZE, FLAGS)


def test_flags_follow_the_terms() -> None:
    def flags(client: Client) -> int:
        return int(struct.unpack(">HQH", client.ask(GET_INFO, info_data())[0].data)[2])

    assert flags(Client()) == FLAGS
    assert flags(Client(writable=False)) == FLAGS | 2
    spinning = RamVolume(SIZE)
    spinning.rotational = True
    assert flags(Client(spinning)) == FLAGS | 16
    for way in (SR, EXT):
        client = Client()
        assert client.kinds(way) == [ACK]
        assert flags(client) == FLAGS | DF


def test_refusals_carry_the_sentence() -> None:
    volume = RamVolume(SIZE)
    volume.refusal = "r0 is Secondary on bob: promote it with 'tandemadm primary r0'."
    for number in (GET_INFO, GO):
        client = Client(volume)
        (reply,) = client.ask(number, info_data("r0"))
        assert (reply.kind, reply.data.decode()) == (ERR_POLICY, volume.refusal)
        (reply,) = client.ask(number, info_data("nope"))
        assert reply.kind == ERR_UNKNOWN
        assert reply.data == b"There is no export 'nope' here; there is: r0."
        assert client.server.state is State.HAGGLING
        volume.refusal = None
        assert client.kinds(number, info_data("r0"))[-1] == ACK
        volume.refusal = "No."


@pytest.mark.parametrize("number", [GET_INFO, GO, LIST_META, SET_META])
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", ERR_INVALID),
        (b"\0\0\0\x02r", ERR_INVALID),  # the name is cut short
        (b"\0\0\0\x02r0", ERR_INVALID),  # no count
        (b"\0\0\0\x02r0\0\x01", ERR_INVALID),  # one promised, none there (or half a count)
        (b"\0\0\0\x02r0\0\0\0\0junk", ERR_INVALID),
        (b"\0\0\0\x02r\xff" + bytes(4), ERR_INVALID),  # not UTF-8
        (b"\0\0\0\x02r\0" + bytes(4), ERR_INVALID),  # a NUL
        (b"\0\0\x10\x01" + b"n" * 4097 + bytes(4), ERR_TOO_BIG),
        (b"\xff\xff\xff\xff", ERR_INVALID),
    ],
)
def test_malformed_data_is_refused_and_the_haggling_goes_on(number: int, data: bytes, kind: int) -> None:
    client = Client()
    client.ask(SR)
    assert client.kinds(number, data) == [kind]
    assert client.kinds(GO, info_data("r0"))[-1] == ACK


def test_a_name_of_4096_bytes_is_only_unknown() -> None:
    assert Client().kinds(GO, info_data("n" * 4096)) == [ERR_UNKNOWN]


@pytest.mark.parametrize("number", [0, PEEK, STARTTLS, 12, 1000, 0xFFFFFFFF])
def test_unknown_options_and_their_data_are_skipped(number: int) -> None:
    client = Client()
    for data in (b"", b"IHAVEOPT" * 100):
        assert client.kinds(number, data) == [ERR_UNSUP]
    assert client.kinds(LIST) == [SERVER, ACK]


def test_an_oversized_option_is_skipped_without_keeping_it() -> None:
    client = Client()
    length = 64 * 1024 + 1
    out = client.say(b"IHAVEOPT" + struct.pack(">II", LIST, length))
    assert [r.kind for r in option_replies(out)] == [ERR_TOO_BIG]
    for _ in range(length // 1000):
        assert client.say(b"x" * 1000) == b""
    out = client.say(b"x" * (length % 1000) + option(LIST))
    assert [r.kind for r in option_replies(out)] == [SERVER, ACK]
    with pytest.raises(ClientError, match="export name"):
        Client().say(b"IHAVEOPT" + struct.pack(">II", EXPORT_NAME, length))


def test_structured_replies_and_extended_headers() -> None:
    client = Client()
    assert client.kinds(SR, b"x") == [ERR_INVALID]
    assert client.kinds(SR) == [ACK]
    assert client.kinds(SR) == [ACK]
    assert client.kinds(EXT, b"x") == [ERR_INVALID]
    assert client.kinds(EXT) == [ACK]
    assert client.kinds(EXT) == [ERR_INVALID]
    assert client.kinds(SR) == [ERR_EXT_HEADER_REQD]
    with pytest.raises(ClientError, match="EXPORT_NAME"):
        client.say(option(EXPORT_NAME))
    client = Client()
    client.ask(EXT)
    client.ask(GO, info_data())
    terms = client.server.terms
    assert terms is not None and terms.structured and terms.extended


@pytest.mark.parametrize(
    ("queries", "n_listed"),
    [
        ((), 1), (("base:",), 1), (("base:allocation",), 1), (("base:nothing",), 0), (("qemu:",), 0),
        (("x-tandem:", "", "base:allocation"), 1), (("base",), 0),
    ],
)  # fmt: skip
def test_list_meta_context(queries: tuple[str, ...], n_listed: int) -> None:
    replies = Client().ask(LIST_META, context_data("r0", *queries))
    assert [r.kind for r in replies] == [META] * n_listed + [ACK]
    assert all(r.data == bytes(4) + b"base:allocation" for r in replies[:-1])


def allocation(*steps: tuple[int, bytes]) -> bool:
    """Whether base:allocation is in force after *steps*, the last of which is GO."""
    client = Client(RamVolume(SIZE, "r0"), RamVolume(SIZE, "r1"))
    client.ask(SR)
    for number, data in steps:
        client.ask(number, data)
    terms = client.server.terms
    assert terms is not None
    return terms.allocation


def test_set_meta_context() -> None:
    assert Client().kinds(SET_META, context_data("r0", "base:allocation")) == [ERR_INVALID]
    wanted = (SET_META, context_data("r0", "base:allocation"))
    go = (GO, info_data("r0"))
    assert allocation(wanted, go)
    assert not allocation(go)
    assert not allocation(wanted, (GO, info_data("r1")))  # bound to the export it was asked for
    assert not allocation((SET_META, context_data("r0", "base:")), go)  # a wildcard is for LIST only
    assert not allocation((SET_META, context_data("r0")), go)
    assert not allocation(wanted, (SET_META, context_data("r0", "qemu:x")), go)  # the last set counts
    assert not allocation(wanted, (SET_META, context_data("nope", "base:allocation")), go)
    assert not allocation(wanted, (SET_META, b"junk"), go)
    assert allocation((SET_META, context_data("r0", "base:allocation", "base:allocation")), go)
    client = Client()
    client.ask(EXT)
    (reply, ack) = client.ask(SET_META, context_data("", "base:allocation"))
    assert (reply.kind, reply.data) == (META, b"\0\0\0\x01base:allocation")
    assert ack.kind == ACK


def test_what_follows_go_is_left_for_the_transmission_phase() -> None:
    client = Client()
    stream = option(SR) + option(GO, info_data()) + b"a request"
    assert client.server.consume(memoryview(stream)) == len(stream) - len(b"a request")
    assert client.server.state is State.TRANSMISSION


@pytest.mark.parametrize("step", [1, 2, 5, 17])
def test_any_cut_gives_the_same_answers(step: int) -> None:
    stream = struct.pack(">I", 3) + b"".join(
        [option(LIST), option(77, b"data"), option(SR), option(SET_META, context_data("", "base:allocation")),
         option(GO, info_data("nope")), option(GO, info_data("", 1, 3))]
    )  # fmt: skip
    whole = Negotiation(Offer(RamVolume(SIZE)))
    whole.consume(memoryview(stream))
    cut = Negotiation(Offer(RamVolume(SIZE)))
    rest = b""
    for at in range(0, len(stream), step):
        rest += stream[at : at + step]
        used = cut.consume(memoryview(rest))
        rest = rest[used:]
        if rest:
            assert cut.need(memoryview(rest)) > len(rest)
    assert not rest
    assert cut.out == whole.out
    assert cut.state is whole.state is State.TRANSMISSION


@pytest.mark.parametrize("seed", range(50))
def test_garbage_ends_in_answers_or_in_a_client_error(seed: int) -> None:
    """Mutated negotiations neither crash nor get in without a GO that was understood."""
    draw = random.Random(seed)
    parts = [option(draw.randrange(13), draw.randbytes(draw.randrange(40))) for _ in range(20)]
    parts += [option(SR), option(LIST_META, context_data("", "base:")), option(GET_INFO, info_data("r0", 3))]
    draw.shuffle(parts)
    stream = bytearray(struct.pack(">I", 3) + b"".join(parts))
    for _ in range(draw.randrange(4)):
        stream[draw.randrange(len(stream))] = draw.randrange(256)
    volume = RamVolume(SIZE)
    server = Negotiation(Offer(volume))
    try:
        server.consume(memoryview(bytes(stream)))
    except ClientError as error:
        assert str(error)
    assert volume.n_open == (server.state is State.TRANSMISSION)
    greeting, answers = server.out[:18], bytes(server.out[18:])
    assert greeting == GREETING
    if server.state is not State.TRANSMISSION:
        assert all(r.kind in (ACK, SERVER, INFO, META) or r.kind & ERR for r in option_replies(answers))


def test_a_question_makes_no_volume_ready_and_opens_none() -> None:
    volume = RamVolume(SIZE)
    client = Client(volume)
    client.offer.late = True
    assert client.kinds(GET_INFO, info_data("r0")) == [INFO, ACK]
    assert not client.server.parked and volume.n_open == 0


@pytest.mark.parametrize("number", [GO, EXPORT_NAME])
def test_a_volume_that_is_made_ready_first(number: int) -> None:
    volume = RamVolume(SIZE)
    client = Client(volume)
    client.offer.late = True
    data = b"r0" if number == EXPORT_NAME else info_data("r0")
    message = option(number, data)
    assert client.server.consume(memoryview(message + option(LIST))) == len(message), "what follows waits"
    assert client.take() == b"" and client.server.parked and volume.n_open == 0
    client.server.go_on()
    assert client.take() and not client.server.parked
    assert volume.n_open == 1
