"""Every byte of recorded sessions with kernel DRBD 8.4.11 is understood, and packed again the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.wire.kernel_sessions import DIRECTORY, Seen, bitmaps, decode, load, packets

SESSIONS = sorted(DIRECTORY.glob("*.xz"))
N_BITS = 16374  # 64 MiB with internal metadata


def session(path: Path) -> list[list[Seen]]:
    return [list(packets(*key, stream)) for key, stream in load(path).items()]


def test_there_are_sessions() -> None:
    assert len(SESSIONS) >= 5


@pytest.mark.parametrize("path", SESSIONS, ids=lambda path: path.stem)
def test_every_byte_is_understood(path: Path) -> None:
    names = set()
    for stream in session(path):
        for seen in stream:
            names.add(decode(seen))
        bitmaps(stream, N_BITS)
    assert {"P_CONNECTION_FEATURES", "P_PROTOCOL", "P_SIZES", "P_UUIDS", "P_STATE"} <= names


def test_what_the_sessions_cover() -> None:
    """The kernel's own packets of these kinds are among the recorded ones."""
    from_kernel = {
        decode(seen) for path in SESSIONS for stream in session(path) for seen in stream if seen.sender == "kernel"
    }
    assert from_kernel >= {
        "P_DATA", "P_BARRIER", "P_BARRIER_ACK", "P_WRITE_ACK", "P_RS_DATA_REQUEST", "P_RS_DATA_REPLY",
        "P_RS_WRITE_ACK", "P_SYNC_UUID", "P_BITMAP", "P_COMPRESSED_BITMAP", "P_TRIM", "P_ZEROES", "P_STATE_CHG_REQ",
        "P_STATE_CHG_REPLY", "P_CONN_ST_CHG_REQ", "P_PING", "P_PING_ACK", "P_DATA_REQUEST", "P_DATA_REPLY",
        "P_AUTH_CHALLENGE", "P_AUTH_RESPONSE", "P_RECV_ACK", "P_OV_REQUEST", "P_OV_REPLY", "P_OV_RESULT",
        "P_CSUM_RS_REQUEST", "P_RS_IS_IN_SYNC", "P_RS_THIN_REQ", "P_RS_DEALLOCATED",
    }  # fmt: skip
