"""Digests over blocks, and the HMAC of the handshake: the computations of the kernel's crypto API.

Decides which algorithm names we know and what bytes each gives; those bytes must equal the kernel's,
including two oddities: crc32c is the usual CRC-32C but stored little-endian, and crc32 is the CRC-32
register itself, begun at 0 and not inverted at the end, stored little-endian. CRC-32C is computed by the
processor's instruction through google_crc32c; crcmod is the reference it is tested against, and the
fallback where google_crc32c has no compiled part.

Source: crypto/crc32c_generic.c, crypto/crc32_generic.c in Linux 6.1 (behaviour observed on the wire).
"""

from __future__ import annotations

import hashlib
import hmac
import struct
import zlib
from collections.abc import Callable
from typing import Final

import crcmod.predefined
import google_crc32c

Data = bytes | bytearray | memoryview

_PIECE: Final = 64 << 10  # bytes; google_crc32c takes bytes only, so other buffers are copied piecewise
_U32_MASK: Final = 0xFFFF_FFFF

crc32c_reference: Final[Callable[[Data, int], int]] = crcmod.predefined.mkPredefinedCrcFun("crc-32c")


def _crc32c_fast(data: Data, crc: int) -> int:
    """Continue the standard CRC-32C *crc* (0 at the beginning) over *data*."""
    if isinstance(data, bytes):
        result: int = google_crc32c.extend(crc, data)
        return result
    view = memoryview(data)
    for at in range(0, len(view), _PIECE):
        crc = google_crc32c.extend(crc, bytes(view[at : at + _PIECE]))
    return crc


_crc32c: Final = _crc32c_fast if google_crc32c.implementation == "c" else crc32c_reference


def crc32c(data: Data) -> int:
    """The standard CRC-32C: begun with all ones, inverted at the end."""
    return _crc32c(data, 0)


def crc32c_raw(data: Data) -> int:
    """The CRC-32C register begun at 0 and not inverted at the end: the checksum in the activity log."""
    return _crc32c(data, _U32_MASK) ^ _U32_MASK


def _crc32c_each(data: memoryview, step: int) -> bytes:
    """What `Digest.of_each` is, in a third of the time that a call of ours for each piece would take."""
    value = google_crc32c.value
    sums = [value(bytes(data[at : at + step])) for at in range(0, len(data), step)]
    return struct.pack(f"<{len(sums)}I", *sums)


class Digest:
    """One digest algorithm: called with a block's data it gives ``size`` bytes, as they go on the wire."""

    __slots__ = ("_each", "_function", "name", "size")

    def __init__(
        self, name: str, size: int, function: Callable[[Data], bytes],
        each: Callable[[memoryview, int], bytes] | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.size = size
        self._function = function
        self._each = each

    def __call__(self, data: Data) -> bytes:
        return self._function(data)

    def of_each(self, data: Data, step: int) -> bytes:
        """The digests of every *step* bytes of *data*, the last of which may be fewer, one behind the other."""
        view = memoryview(data)
        if self._each is not None:
            return self._each(view, step)
        return b"".join([self._function(view[at : at + step]) for at in range(0, len(view), step)])

    def __repr__(self) -> str:
        return f"<Digest {self.name}>"


def _hash_digest(name: str) -> Digest:
    algorithm = getattr(hashlib, name)
    size: int = algorithm(usedforsecurity=False).digest_size

    def compute(data: Data) -> bytes:
        result: bytes = algorithm(data, usedforsecurity=False).digest()
        return result

    return Digest(name, size, compute)


_HASHES: Final = ("md5", "sha1", "sha224", "sha256", "sha384", "sha512")

DIGESTS: Final[dict[str, Digest]] = {
    "crc32c": Digest(
        "crc32c", 4, lambda data: crc32c(data).to_bytes(4, "little"),
        _crc32c_each if google_crc32c.implementation == "c" else None,
    ),
    "crc32": Digest("crc32", 4, lambda data: (zlib.crc32(data, _U32_MASK) ^ _U32_MASK).to_bytes(4, "little")),
    **{name: _hash_digest(name) for name in _HASHES},
}


def digest(name: str) -> Digest | None:
    """The algorithm with this name (data-integrity-alg, verify-alg, csums-alg); None when we lack it."""
    return DIGESTS.get(name)


# --------------------------------------------------------------------------------------------- cram-hmac


def hmac_hash(alg: str) -> str | None:
    """The hash of a cram-hmac-alg, spelt ``sha1`` or ``hmac(sha1)``; None when we lack it."""
    if alg.startswith("hmac(") and alg.endswith(")"):
        alg = alg[5:-1]
    return alg if alg in _HASHES else None


def hmac_size(alg: str) -> int:
    """Bytes of the response with this cram-hmac-alg. *alg* is known, see `hmac_hash`."""
    name = hmac_hash(alg)
    assert name is not None, alg
    return DIGESTS[name].size


def hmac_response(alg: str, secret: str, challenge: Data) -> bytes:
    """The answer to the peer's whole *challenge*: HMAC over it with the shared secret as the key.

    *alg* is known, see `hmac_hash`. A secret read with surrogateescape is used byte for byte.
    """
    name = hmac_hash(alg)
    assert name is not None, alg
    return hmac.digest(secret.encode("utf-8", "surrogateescape"), challenge, name)
