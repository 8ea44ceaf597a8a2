"""What is computed about a split brain: journals, relations, counts, files, the saved history."""

from __future__ import annotations

import contextlib
import os
import random
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from tandem.repl.bitmap import Bitmap
from tandem.repl.config import AfterSb, NetOptions
from tandem.repl.states import ConnState
from tandem.repl.units import n_bits_of
from tandem.tools import journal
from tandem.tools.journal import Entry
from tandem.tools.split_brain_files import FileUse, find_files
from tandem.tools.split_brain_history import About, History, SavedVolume, check_place, holds, restore, save
from tandem.tools.split_brain_keep import _decision
from tandem.tools.split_brain_node import (
    BLOCK,
    CHUNK,
    Answers,
    Side,
    SplitBrainError,
    VolumeSide,
    compressed,
    digest_of,
    expanded,
    set_ranges,
)
from tandem.tools.split_brain_report import (
    _printable,
    alone_since,
    analyse,
    combined,
    is_split,
    relation,
    size_text,
    timeline,
)

COMMON, ALPHA, BETA = 0xC000, 0xA000, 0xB000


def gi(current: int, bitmap: int, *history: int, flags: str = "1:1:0:0:0:0:0") -> str:
    four = [current, bitmap, *history, 0, 0][:4]
    return ":".join(f"{uuid:016X}" for uuid in four) + ":" + flags


def side(node: str, line: str, *, role: str = "Secondary", size: int = 8 << 20, bits: int = 5) -> Side:
    return Side(node, True, role, "StandAlone", (VolumeSide(0, size, line, "UpToDate", "/disk", bits),))


def bits(n_bits: int, *ranges: tuple[int, int]) -> Bitmap:
    bitmap = Bitmap(n_bits)
    for first, end in ranges:
        bitmap.set(first, end)
    return bitmap


# ----------------------------------------------------------------------------------- journal


def test_a_journal_is_read_as_it_was_written_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "state" / "r0.journal"
    entries = [Entry(float(n), "Primary", "Connected", {"0": gi(n, 0)[:67]}, "why") for n in range(3)]
    for entry in entries:
        journal.append(path, entry)
    with open(path, "ab") as file:
        file.write(b'{"at": 17, "ro')
    assert journal.read(path) == tuple(entries)
    assert journal.read(tmp_path / "none") == ()


def test_a_journal_does_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "SIZE_MAX", 4096)
    path = tmp_path / "r0.journal"
    for n in range(300):
        journal.append(path, Entry(float(n), "Primary", "Connected", {}, "x" * 40))
        assert path.stat().st_size <= 4096 + 200
    kept = [entry.at for entry in journal.read(path)]
    assert kept == [float(n) for n in range(300 - len(kept), 300)]


def history() -> tuple[Entry, ...]:
    common, own = gi(COMMON, 0), gi(ALPHA, COMMON)
    return (
        Entry(10, "Secondary", "StandAlone", {}, "daemon started"),
        Entry(11, "Primary", "Connected", {"0": common}),
        Entry(20, "Primary", "WFConnection", {"0": gi(ALPHA | 1, COMMON | 1)}),
        Entry(25, "Primary", "StandAlone", {}),  # without its disk for a moment
        Entry(30, "Secondary", "StandAlone", {"0": own}),
    )


def test_the_journal_says_since_when_a_node_is_on_its_own() -> None:
    assert alone_since(history(), 0, gi(ALPHA, COMMON)) == 20
    assert alone_since(history()[2:], 0, gi(ALPHA, COMMON)) is None  # it begins too late
    assert alone_since((), 0, gi(ALPHA, COMMON)) is None
    assert alone_since(history(), 0, gi(ALPHA, BETA)) is None  # and never heard of that generation


def test_the_timeline_has_roles_generations_and_connections() -> None:
    node = Side("alpha", True, "Secondary", "StandAlone", (), history())
    assert [(m.at, m.what) for m in timeline(node, 0, 20)] == [
        (11, "was Primary from then on"),
        (20, "lost the connection"),
        (20, f"new generation {ALPHA:016X}"),
        (30, "became Secondary"),
    ]


# ----------------------------------------------------------------------------------- relations


@pytest.mark.parametrize(
    ("own", "peer", "verdict"),
    [
        (gi(ALPHA, COMMON), gi(BETA, COMMON), 100),
        (gi(ALPHA, 0, COMMON), gi(BETA, 0x77, COMMON), -100),
        (gi(ALPHA, COMMON), gi(COMMON, 0), 1),
        (gi(COMMON, 0), gi(BETA, COMMON), -1),
        (gi(COMMON | 1, 0), gi(COMMON, 0), 0),
        (gi(ALPHA, 1 << 60, 2 << 60, 3 << 60), gi(BETA, 4 << 60, 5 << 60, 6 << 60), -1000),
    ],
)
def test_the_relation_is_the_handshakes(own: str, peer: str, verdict: int) -> None:
    assert relation(side("alpha", own), side("beta", peer), 0) == verdict
    assert is_split(verdict) == (abs(verdict) == 100)


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (NetOptions(), ConnState.WF_BITMAP_T),
        (NetOptions(after_sb_0pri=AfterSb.DISCARD_REMOTE), ConnState.WF_BITMAP_S),  # it would be the peer that loses
        (NetOptions(after_sb_0pri=AfterSb.DISCARD_LOCAL), ConnState.WF_BITMAP_T),
    ],
)
def test_the_decision_is_rehearsed_with_the_policies(net: NetOptions, expected: ConnState) -> None:
    loser, winner = side("beta", gi(BETA, COMMON)), side("alpha", gi(ALPHA, COMMON))
    assert _decision(loser, winner, 0, net, False, discard=(True, False)) == expected


# ----------------------------------------------------------------------------------- bitmaps


def test_counts_are_those_of_sets_and_the_last_block_may_be_short() -> None:
    n_bits, draw = 100_000, random.Random(5)
    size = n_bits * BLOCK - 512
    one, other = ({draw.randrange(n_bits) for _ in range(2000)} | {n_bits - 1} for _ in range(2))
    a, b = (bits(n_bits, *((n, n + 1) for n in numbers)) for numbers in (one, other))
    found = analyse(a, b, size)
    assert found.own_alone.blocks == len(one - other) and found.peer_alone.blocks == len(other - one)
    assert found.both.blocks == len(one & other)
    assert found.both.size == len(one & other) * BLOCK - 512
    assert found.own_alone.size == len(one - other) * BLOCK
    either = combined(a, b, "or")
    assert either.weight == len(one | other)
    assert sum(length for _, length in set_ranges(either, size)) == len(one | other) * BLOCK - 512
    again = expanded(n_bits, compressed(a))
    assert combined(a, again, "minus").weight == 0 and again.weight == len(one)


def test_a_damaged_bitmap_is_refused() -> None:
    with pytest.raises(SplitBrainError, match="damaged"):
        expanded(100, b"nonsense")
    with pytest.raises(SplitBrainError, match="are needed"):
        expanded(100_000, compressed(Bitmap(10)))


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 bytes"), (512, "512 bytes"), (4096, "4 KiB"), (5000 << 20, "5000 MiB"), (21 << 29, "10.5 GiB")],
)  # fmt: skip
def test_sizes_are_readable(n: int, text: str) -> None:
    assert size_text(n) == text


def test_a_name_is_on_one_line_and_is_no_other_name() -> None:
    names = ["/a\nb", "/a\\nb", "/a\r\x1b[m", "/\u2028", "/\udcff", "/ä b", "/end  "]
    assert [_printable(name) for name in names] == [
        r"/a\nb", r"/a\\nb", r"/a\r\x1b[m", r"/\u2028", r"/\xff", "/ä b", r"/end\x20\x20",
    ]  # fmt: skip


def test_a_disk_without_a_file_system_is_said_to_have_none(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    found = find_files(str(tmp_path / "disk"), bits(256, (0, 3)), BLOCK)
    assert (found.kind, found.files) == ("", ()) and "no ext4 or xfs" in found.note
    assert find_files(str(tmp_path / "none"), bits(256), BLOCK).note.endswith("No such file or directory")


# ----------------------------------------------------------------------------------- history files


class Disk:
    """A node that only has a disk."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, volume: int, ranges: Sequence[tuple[int, int]]) -> bytes:
        return b"".join(self.content[offset : offset + length] for offset, length in ranges)

    def digests(self, volume: int, first: int, count: int, without: Bitmap) -> bytes:
        chunks = range(first * CHUNK, (first + count) * CHUNK, CHUNK)
        return b"".join(
            digest_of(bytearray(self.content[at : at + CHUNK]), at // BLOCK, without) for at in chunks
        )

    def __getattr__(self, name: str) -> object:
        raise AssertionError(name)


SIZE = (3 << 20) + 8192 + 512
SAVED = ((0, 2), (255, 258), (500, 501), (n_bits_of(SIZE) - 1, n_bits_of(SIZE)))


def disk(content: bytes) -> Answers:
    return Disk(content)  # type: ignore[return-value]


def quiet(what: str, done: int, total: int) -> None:
    assert 0 <= done <= total + BLOCK


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, bytes, About, dict[int, Bitmap]]:
    content = random.Random(9).randbytes(SIZE)
    bitmaps = {0: bits(n_bits_of(SIZE), *SAVED)}
    volume = SavedVolume(0, SIZE, gi(BETA, COMMON), bitmaps[0].weight)
    about = About(1, "r0", "beta", 1.5, "volume", (volume,))
    path = tmp_path / "r0.history"
    save(path, about, bitmaps, disk(content), quiet)
    return path, content, about, bitmaps


Saved = tuple[Path, bytes, About, dict[int, Bitmap]]


def test_a_history_is_rebuilt_from_the_common_rest(saved: Saved, tmp_path: Path) -> None:
    path, content, about, bitmaps = saved
    now = bytearray(content)
    for first, end in SAVED:
        now[first * BLOCK : end * BLOCK] = bytes(len(content[first * BLOCK : end * BLOCK]))
    assert holds(path, about, bitmaps, disk(content), quiet)
    assert not holds(path, about, bitmaps, disk(bytes(now)), quiet)
    opened = History(path)
    volume = opened.about.volumes[0]
    assert restore(opened, volume, tmp_path / "image", [lambda: disk(bytes(now))], quiet) == 0
    assert (tmp_path / "image").read_bytes() == content
    now[2 << 20] ^= 1  # in a chunk of which nothing was saved
    assert restore(opened, volume, tmp_path / "other", [lambda: disk(bytes(now))], quiet) == CHUNK
    sources = [lambda: disk(bytes(now)), lambda: disk(content)]
    assert restore(opened, volume, tmp_path / "third", sources, quiet) == 0
    assert (tmp_path / "third").read_bytes() == content
    opened.close()


def test_a_damaged_or_foreign_file_holds_nothing(saved: Saved) -> None:
    path, content, about, bitmaps = saved
    whole = path.read_bytes()
    at = whole.index(content[255 * BLOCK : 255 * BLOCK + 64])
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert not holds(path, about, bitmaps, disk(content), quiet)
    with pytest.raises(SplitBrainError, match="damaged"):
        opened = History(path)
        for _ in opened.blocks(opened.about.volumes[0], bitmaps[0]):
            pass
    path.write_bytes(whole[: len(whole) // 2])
    assert not holds(path, about, bitmaps, disk(content), quiet)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("history.json", '{"format": 99}')
    with pytest.raises(SplitBrainError, match="another version"):
        History(path)


def test_only_their_owner_can_read_a_history_and_an_image(saved: Saved, tmp_path: Path) -> None:
    path, *_ = saved
    image = tmp_path / "image"
    image.with_name("image.part").write_bytes(b"left by a run that was killed")
    history = History(path)
    restore(history, history.about.volumes[0], image, [lambda: disk(bytes(saved[2].volumes[0].size))], quiet)
    history.close()
    assert [file.stat().st_mode & 0o777 for file in (path, image)] == [0o600, 0o600]


def test_what_is_no_regular_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(SplitBrainError, match="it is not a regular file"):
            check_place(path)


def test_a_place_is_looked_at_before_anything_is_done(saved: Saved, tmp_path: Path) -> None:
    check_place(saved[0])
    check_place(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(SplitBrainError, match="Not a directory; nothing has been changed"):
        check_place(saved[0] / "below" / "it")


def test_any_byte_of_the_archives_headers_may_be_damaged(saved: Saved) -> None:
    path, *_ = saved
    good = path.read_bytes()
    directory, known = good.index(b"PK\x01\x02"), 0
    for at in [*range(64), *range(directory, len(good))]:
        path.write_bytes(good[:at] + bytes((good[at] ^ 0x21,)) + good[at + 1 :])
        try:
            with contextlib.closing(History(path)) as history:
                (volume,) = history.about.volumes
                history.digests(volume)
                assert list(history.blocks(volume, history.bitmap(volume)))
        except SplitBrainError as error:
            known += str(path) in str(error)
    assert known > 100


def test_a_history_that_lacks_a_block_does_not_count(saved: Saved) -> None:
    path, content, about, _ = saved
    assert not holds(path, about, {0: bits(n_bits_of(SIZE), *SAVED, (700, 701))}, disk(content), quiet)


def test_nothing_is_left_when_saving_fails(saved: Saved, tmp_path: Path) -> None:
    path, content, about, bitmaps = saved
    before = path.read_bytes()
    with pytest.raises(SplitBrainError, match="File exists"):
        save(path, about, bitmaps, disk(content), quiet)
    assert path.read_bytes() == before
    with pytest.raises(SplitBrainError, match="nothing has been discarded"):
        save(tmp_path / "r0.history" / "below", about, bitmaps, disk(content), quiet)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r0.history"]


def test_file_use_travels_as_json() -> None:
    from tandem.tools.split_brain_files import FileBlocks
    from tandem.tools.values import pack, unpack

    use = FileUse("ext4", (FileBlocks("/a\udcff", (1, 2, 5, 9)),), "note")
    assert unpack(FileUse, pack(use)) == use
    assert list(use.files[0].pairs()) == [(1, 2), (5, 9)]
