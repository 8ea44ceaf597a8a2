"""nbd/client_negotiation: the client's words against our own server's, and against servers that talk nonsense."""

from __future__ import annotations

import struct

import pytest
from tandem.nbd.client_negotiation import ClientNegotiation, ServerMistake, Terms
from tandem.nbd.negotiation import State

from tests.nbd_volume import RamVolume
from tests.nbd_wire import ACK, ERR_POLICY, GREETING, INFO
from tests.unit.test_nbd_negotiation import FLAGS, SIZE, Client


def reply(kind: int, data: bytes = b"", number: int = 7) -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, number, kind, len(data)) + data


EXPORT = struct.pack(">HQH", 0, SIZE, FLAGS)


def against_our_server(volume: RamVolume, export: str, step: int) -> ClientNegotiation:
    """Let both talk, the server's words cut into pieces of *step* bytes."""
    server, client = Client(volume).server, ClientNegotiation(export)
    server._client_flags = None  # `Client` has sent them; ours sends its own
    inbox, words = bytearray(), GREETING
    while words:
        for at in range(0, len(words), step):
            inbox += words[at : at + step]
            del inbox[: client.consume(inbox)]
        assert server.consume(memoryview(bytes(client.out))) == len(client.out)
        client.out.clear()
        words = bytes(server.out)
        server.out.clear()
    assert not inbox
    assert client.over and (client.terms is None) is (server.state is State.HAGGLING)
    return client


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_terms(step: int) -> None:
    assert against_our_server(RamVolume(SIZE), "r0", step).terms == Terms(SIZE, FLAGS, 512)


@pytest.mark.parametrize("step", [1, 1000])
def test_refusals_are_the_servers_words(step: int) -> None:
    volume = RamVolume(SIZE)
    volume.refusal = "r0 is Secondary on alice."
    client = against_our_server(volume, "r0", step)
    assert client.terms is None and client.refusal == "r0 is Secondary on alice."
    assert "no export 'r9'" in against_our_server(RamVolume(SIZE), "r9", step).refusal


def test_a_server_without_block_sizes_has_the_protocols_own() -> None:
    client = ClientNegotiation("")
    client.consume(GREETING + reply(INFO, EXPORT) + reply(INFO, b"\0\x01name") + reply(ACK))
    assert client.terms == Terms(SIZE, FLAGS, 1)


def test_an_error_without_words_gets_its_number() -> None:
    client = ClientNegotiation("")
    client.consume(GREETING + reply(ERR_POLICY))
    assert client.refusal == "NBD error 2"


def test_what_follows_is_left() -> None:
    client = ClientNegotiation("")
    words = GREETING + reply(INFO, EXPORT) + reply(ACK)
    assert client.consume(words + b"more") == len(words)


@pytest.mark.parametrize(
    "words",
    [
        b"NBDMAGIC" + b"\0\0\x42\x02\x81\x86\x12\x53" + b"\0\3",  # oldstyle
        GREETING[:-1] + b"\0",  # not fixed newstyle
        b"HTTP/1.1 400 Bad Request\r\n",
        GREETING + reply(ACK),
        GREETING + reply(ACK, number=6),
        GREETING + b"x" * 20,
        GREETING + struct.pack(">QIII", 0x3E889045565A9, 7, INFO, 1 << 30),
    ],
)
def test_nonsense_is_a_mistake_of_the_server(words: bytes) -> None:
    with pytest.raises(ServerMistake):
        ClientNegotiation("").consume(words)
