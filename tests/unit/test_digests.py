"""Digests as the kernel's crypto API computes them."""

from __future__ import annotations

import hashlib
import hmac
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tandem.repl import digests

ZEROS = bytes(4096)


@pytest.mark.parametrize(
    ("name", "data", "value"),
    [
        ("crc32c", ZEROS, "8941f998"),  # seen on the wire
        ("crc32c", b"123456789", "839206e3"),  # the check value e3069283, little-endian
        ("crc32", b"", "00000000"),
        ("crc32", b"123456789", "882dfd2d"),
        ("md5", b"abc", "900150983cd24fb0d6963f7d28e17f72"),
        ("sha1", b"abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
        ("sha256", b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ],
)
def test_known_values(name: str, data: bytes, value: str) -> None:
    algorithm = digests.digest(name)
    assert algorithm is not None
    assert algorithm(data).hex() == value


SIZES = {
    "crc32c": 4, "crc32": 4, "md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64,
}  # fmt: skip


def test_sizes() -> None:
    assert {name: algorithm.size for name, algorithm in digests.DIGESTS.items()} == SIZES
    for name, algorithm in digests.DIGESTS.items():
        assert algorithm.name == name
        assert len(algorithm(b"x" * 512)) == algorithm.size


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_the_digests_of_each_piece_are_those_of_the_pieces(name: str, kind: type[bytes]) -> None:
    algorithm, data = digests.DIGESTS[name], bytes(range(256)) * 5
    pieces = [data[at : at + 500] for at in range(0, len(data), 500)]
    assert len(pieces[-1]) < 500
    assert algorithm.of_each(kind(data), 500) == b"".join(map(algorithm, pieces))


@pytest.mark.parametrize("name", ["", "xxhash64", "SHA1", "hmac(sha1)", "sha3-256", "__class__"])
def test_unknown_names(name: str) -> None:
    assert digests.digest(name) is None


@given(st.binary(max_size=300))
def test_sha512_and_md5_are_the_standard_ones(data: bytes) -> None:
    for name in ("md5", "sha1", "sha256", "sha384", "sha512"):
        algorithm = digests.digest(name)
        assert algorithm is not None
        assert algorithm(data) == hashlib.new(name, data).digest()


def crc32_register(data: bytes) -> int:
    """CRC-32 bit by bit, begun at 0 and not inverted."""
    crc = 0
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc


@given(st.binary(max_size=100))
def test_crc32_is_the_bare_register(data: bytes) -> None:
    algorithm = digests.digest("crc32")
    assert algorithm is not None
    assert algorithm(data) == crc32_register(data).to_bytes(4, "little")
    assert crc32_register(data) == zlib.crc32(data, 0xFFFFFFFF) ^ 0xFFFFFFFF


def crc32c_register(data: bytes, crc: int) -> int:
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc


@given(st.binary(max_size=200))
def test_crc32c_agrees_with_the_reference_and_the_definition(data: bytes) -> None:
    value = digests.crc32c(data)
    assert value == digests.crc32c_reference(data, 0)
    assert value == crc32c_register(data, 0xFFFFFFFF) ^ 0xFFFFFFFF
    assert digests.crc32c_raw(data) == crc32c_register(data, 0)
    assert digests.crc32c_raw(data) == digests.crc32c_reference(data, 0xFFFFFFFF) ^ 0xFFFFFFFF


@pytest.mark.parametrize("name", SIZES)
def test_any_buffer_of_any_size_gives_the_same(name: str) -> None:
    """Whole megabytes in slices of a receive buffer, longer than the pieces crc32c works in."""
    algorithm = digests.digest(name)
    assert algorithm is not None
    data = bytes(range(251)) * 4181
    shifted = memoryview(bytearray(b"xyz" + data))[3:]
    assert algorithm(data) == algorithm(bytearray(data)) == algorithm(shifted)


def test_hmac_of_a_challenge() -> None:
    """Test case 2 of RFC 2202, and case 2 of RFC 4231."""
    challenge = b"what do ya want for nothing?"
    assert digests.hmac_response("md5", "Jefe", challenge).hex() == "750c783e6ab0b503eaa86e310a5db738"
    value = digests.hmac_response("sha1", "Jefe", challenge).hex()
    assert value == "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"
    value = digests.hmac_response("sha256", "Jefe", memoryview(bytearray(challenge))).hex()
    assert value == "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"


def test_hmac_spellings_and_sizes() -> None:
    assert digests.hmac_size("sha1") == digests.hmac_size("hmac(sha1)") == 20
    assert digests.hmac_size("sha512") == 64
    long, short = (digests.hmac_response(alg, "s", b"c" * 64) for alg in ("hmac(sha1)", "sha1"))
    assert long == short
    assert [digests.hmac_hash(alg) for alg in ("", "crc32c", "hmac(sha1", "hmac()", "sha3")] == [None] * 5


def test_a_secret_is_used_byte_for_byte() -> None:
    secret = b"s\xffcret".decode("utf-8", "surrogateescape")
    expected = hmac.digest(b"s\xffcret", b"c" * 64, "sha1")
    assert digests.hmac_response("sha1", secret, b"c" * 64) == expected
