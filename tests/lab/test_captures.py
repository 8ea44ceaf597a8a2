"""Golden sessions: what goes over the wire, every byte of it decoded.

TANDEM_LAB_SAVE=1 keeps the sessions for tests/wire, where they are decoded without a kernel.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.wire.kernel_sessions import DIRECTORY, bitmaps, decode, load, packets

from .capture import Capture, save
from .nodes import PORT, RES, wait, wait_state
from .pair import MIB, Pair

SIDES = pytest.mark.parametrize("side", ["kernel", "tandem"])


@contextlib.contextmanager
def recorded(pair: Pair, name: str, tmp_path: Path) -> Iterator[None]:
    """Record what happens inside; at the end decode it all."""
    guest = pair.kernel.guest
    with Capture(f"l{guest.number}", PORT, guest.lan) as capture:
        yield
    path = (DIRECTORY if os.environ.get("TANDEM_LAB_SAVE") == "1" else tmp_path) / f"{name}.xz"
    save(capture.chunks, path)
    names = set()
    for key, stream in load(path).items():
        seen = list(packets(*key, stream))
        names |= {decode(one) for one in seen}
        bitmaps(seen, 16374)
    assert "P_STATE" in names


def end(pair: Pair) -> None:
    pair.in_sync()
    pair.kernel.adm("down", RES)
    pair.tandem.adm("down", RES)


def pattern(pair: Pair, side: str, *places: tuple[int, int]) -> None:
    """Writes that compress well."""
    for offset, length in places:
        if side == "kernel":
            pair.kernel.guest.sh(
                f"head -c {length} /dev/zero | tr '\\0' K | dd of=/dev/drbd0 bs={length} seek={offset // length}"
                " iflag=fullblock oflag=direct conv=notrunc status=none"
            )
        else:
            pair.tandem.nbd(f"h.pwrite(b'T' * {length}, {offset})")


@SIDES
def test_writes(pair: Pair, side: str, tmp_path: Path) -> None:
    """Handshake, skipped sync, promotion, writes, flush, trim, zeroes, demotion, graceful end."""
    with recorded(pair, f"writes-{side}", tmp_path):
        pair.start(content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        pattern(pair, side, (0, 4096), (1 * MIB, MIB), (8192, 512), (64 << 10, 64 << 10))
        primary.trim(2 * MIB, MIB)
        primary.zero(4 * MIB, MIB)
        primary.adm("secondary", RES)
        end(pair)


@SIDES
def test_protocol_b_with_secret(pair: Pair, side: str, tmp_path: Path) -> None:
    """Protocol B with a shared secret and data-integrity-alg."""
    options = 'net { protocol B; cram-hmac-alg sha1; shared-secret "abc"; data-integrity-alg crc32c; }'
    with recorded(pair, f"protocol-b-{side}", tmp_path):
        pair.start(options, content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        pattern(pair, side, (0, 4096), (8192, 8192))
        primary.adm("secondary", RES)
        end(pair)


@SIDES
def test_bitmap_resync(pair: Pair, side: str, tmp_path: Path) -> None:
    """Disconnect, a few writes, reconnect: bitmaps and the resync of what they name."""
    with recorded(pair, f"resync-{side}", tmp_path):
        pair.start(content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        primary.adm("disconnect", RES)
        pattern(pair, side, (0, 4096), (8 * MIB, 64 << 10), (40 << 10, 512))
        primary.adm("connect", RES)
        pair.in_sync()
        pair.other(primary).adm("disconnect", RES)
        wait_state(primary, cs="WFConnection")
        end_alone(pair)


@SIDES
def test_plain_bitmaps(pair: Pair, side: str, tmp_path: Path) -> None:
    """Disconnect, a few writes, reconnect with use-rle no: bitmaps travel as they are."""
    with recorded(pair, f"plain-{side}", tmp_path):
        pair.start("net { use-rle no; }", content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        primary.adm("disconnect", RES)
        pattern(pair, side, (0, 4096), (8 * MIB, 64 << 10))
        primary.adm("connect", RES)
        pair.in_sync()
        primary.adm("secondary", RES)
        end(pair)


def end_alone(pair: Pair) -> None:
    for node in (pair.kernel, pair.tandem):
        node.adm("down", RES)


@SIDES
def test_diskless_reads(pair: Pair, side: str, tmp_path: Path) -> None:
    """A Primary without its disk reads and writes through the peer, and gets its disk back."""
    with recorded(pair, f"diskless-{side}", tmp_path):
        pair.start(content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        pattern(pair, side, (0, 64 << 10))
        primary.adm("detach", RES)
        wait_state(primary, disk="Diskless")
        primary.sum(0, 64 << 10)
        pattern(pair, side, (128 << 10, 4096))
        primary.adm("attach", RES)
        pair.in_sync()
        primary.adm("secondary", RES)
        end(pair)


@SIDES
def test_checksums(pair: Pair, side: str, tmp_path: Path) -> None:
    """csums-alg on a small resync: most blocks are written with what they hold already."""
    with recorded(pair, f"checksums-{side}", tmp_path):
        pair.start("net { csums-alg md5; }", content="zero", sync="clear")
        primary = pair.node(side)
        primary.adm("primary", RES)
        pattern(pair, side, (0, 64 << 10))
        pair.other(primary).adm("disconnect", RES)
        wait_state(primary, cs="WFConnection")
        pattern(pair, side, (0, 64 << 10), (1 * MIB, 4096))
        pair.other(primary).adm("connect", RES)
        pair.in_sync()
        primary.adm("secondary", RES)
        end(pair)


@SIDES
def test_resize(pair: Pair, side: str, tmp_path: Path) -> None:
    """A device that was limited grows on both nodes; the Primary is told."""
    with recorded(pair, f"resize-{side}", tmp_path):
        pair.start("disk { size 32M; }", content="zero", sync="clear")
        node = pair.node(side)
        node.adm("primary", RES)
        pair.configure("disk { size 32832K; }")
        node.adm("resize", RES)
        wait(pair.tandem, lambda _: pair.tandem.size() == 32832 << 10, "32832 KiB large")
        pair.in_sync()
        node.adm("secondary", RES)
        end(pair)


@SIDES
def test_verify(pair: Pair, side: str, tmp_path: Path) -> None:
    """Online verify of the first 512 KiB, with one difference."""
    with recorded(pair, f"verify-{side}", tmp_path):
        pair.start("net { verify-alg crc32c; }", content="zero", sync="clear")
        with pair.tandem.disk_file().open("r+b") as file:
            file.seek(64 << 10)
            file.write(b"x")
        node = pair.node(side)
        node.adm(*(("--", "--stop=1024", "verify") if node.is_kernel else ("verify", "--stop=1024")), RES)
        for one in (node, pair.other(node)):
            wait(one, lambda s: s.cs == "Connected" and s.oos == 4, "Connected with 4 KiB out of sync")
        end_alone(pair)


@SIDES
def test_thin_resync(pair: Pair, side: str, tmp_path: Path) -> None:
    """A resync in which most blocks are zero, and the target asks for that to be told."""
    with recorded(pair, f"thin-{side}", tmp_path):
        pair.start("disk { rs-discard-granularity 65536; }", content="zero", sync="clear")
        source = pair.node(side)
        source.adm("primary", RES)
        pair.other(source).adm("disconnect", RES)
        wait_state(source, cs="WFConnection")
        source.zero(MIB, 256 << 10)
        pattern(pair, side, (3 * MIB, 4096))
        pair.other(source).adm("connect", RES)
        pair.in_sync()
        source.adm("secondary", RES)
        end(pair)
