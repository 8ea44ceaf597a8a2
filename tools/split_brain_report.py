"""What two nodes' generations, bitmaps and journals say about a split brain; pure.

`relation` is the machine's own comparison (`repl.uuids.compare`), so the report and a handshake agree.
`analyse` counts who changed what since the histories parted. `text_of` makes it readable. Times come from
the journals; where a journal does not go back far enough the report says so, and says what the metadata
alone can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from tandem.repl.bitmap import PAGE, Bitmap
from tandem.repl.uuids import SPLIT_BRAIN, SPLIT_BRAIN_HARD, UNRELATED, CompareFacts, UuidSet, compare

from .journal import NOT_LINKED, Entry
from .split_brain_files import FileUse
from .split_brain_node import BLOCK, UP_WORDS, Side, VolumeSide

FILES_MAX: Final = 40  # lines of files for each node, unless more are asked for
MOMENTS_MAX: Final = 40  # lines of the timeline
_CRASHED: Final = 10  # the field of a get-gi line that says "crashed primary"


def uuids_of(gi: str) -> UuidSet:
    """The generations in a get-gi line, or in the kernel's notation."""
    current, bitmap, history0, history1 = (int(word, 16) for word in gi.split(":")[:4])
    return UuidSet(current, bitmap, history0, history1)


def compare_facts(own: Side, own_gi: str, peer: Side, peer_gi: str, resolver: bool = False) -> CompareFacts:
    """What a handshake between the two would know."""
    return CompareFacts(
        own_primary=own.role == "Primary", peer_primary=peer.role == "Primary",
        own_crashed=_is_crashed(own_gi), peer_crashed=_is_crashed(peer_gi), resolver=resolver, wsame=True,
    )  # fmt: skip


def _is_crashed(gi: str) -> bool:
    fields = gi.split(":")
    return len(fields) > _CRASHED and fields[_CRASHED] == "1"


def relation(own: Side, peer: Side, number: int) -> int:
    """The verdict of `repl.uuids.compare` on one volume, as *own* sees it."""
    mine, theirs = own.volume(number), peer.volume(number)
    assert mine is not None and theirs is not None
    facts = compare_facts(own, mine.gi, peer, theirs.gi)
    return compare(uuids_of(mine.gi), uuids_of(theirs.gi), facts).value


def is_split(verdict: int) -> bool:
    """Have both sides a history of their own?"""
    return verdict in (SPLIT_BRAIN, SPLIT_BRAIN_HARD)


@dataclass(frozen=True, slots=True)
class Counts:
    """Blocks of 4 KiB and bytes."""

    blocks: int
    size: int


@dataclass(frozen=True, slots=True)
class Analysis:
    """Who changed what in one volume since the histories parted."""

    own_alone: Counts
    peer_alone: Counts
    both: Counts


def combined(one: Bitmap, other: Bitmap, how: str) -> Bitmap:
    """A bitmap with the bits that are set in both ("and"), in either ("or"), or in *one* only ("minus")."""
    assert one.n_bits == other.n_bits
    result = Bitmap(one.n_bits)
    words = PAGE // 8
    for page in range(one.n_pages):
        a = int.from_bytes(one.words(page * words, words), "little")
        b = int.from_bytes(other.words(page * words, words), "little")
        c = a & b if how == "and" else a | b if how == "or" else a & ~b
        if c:
            result.load(page * PAGE, c.to_bytes(PAGE, "little"))
    return result


def _counts(bitmap: Bitmap, size: int) -> Counts:
    """The last block of a volume may be a part of one."""
    short = bitmap.n_bits * BLOCK - size if bitmap.n_bits and bitmap.any(bitmap.n_bits - 1, bitmap.n_bits) else 0
    return Counts(bitmap.weight, bitmap.weight * BLOCK - short)


def analyse(own: Bitmap, peer: Bitmap, size: int) -> Analysis:
    """Count what each bitmap has alone, and what both have, of a volume of *size* bytes."""
    return Analysis(
        _counts(combined(own, peer, "minus"), size),
        _counts(combined(peer, own, "minus"), size),
        _counts(combined(own, peer, "and"), size),
    )


# ---------------------------------------------------------------------------------------- the journal


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened on one node; *at* as `Entry.at`."""

    at: float
    node: str
    what: str


def alone_since(journal: tuple[Entry, ...], volume: int, gi: str) -> float | None:
    """When the generation that the bitmap counts from ended on this node; None when nobody noted it."""
    wanted = uuids_of(gi).bitmap & ~1
    began = None
    for entry in reversed(journal):
        known = entry.uuids(volume)
        if not known:
            continue  # the disk was not attached then
        if uuids_of(known).bitmap & ~1 != wanted:
            return began
        began = entry.at
    return None  # the journal begins after it


def timeline(side: Side, volume: int, since: float | None) -> list[Moment]:
    """Role changes and new generations of one node; those before *since* only as the role they left."""
    moments: list[Moment] = []
    before: Moment | None = None
    last: Entry | None = None
    for entry in side.journal:
        what = _what_changed(last, entry, volume)
        last = entry
        if since is not None and entry.at < since:
            before = Moment(entry.at, side.node, f"was {entry.role} from then on") if _role(what) else before
            continue
        moments += [Moment(entry.at, side.node, word) for word in what]
    return ([before] if before else []) + moments


def _role(what: list[str]) -> bool:
    return bool({"became Primary", "became Secondary", "daemon started"} & set(what))


def _what_changed(last: Entry | None, entry: Entry, volume: int) -> list[str]:
    if entry.why == "daemon started":
        return ["daemon started"]
    what = []
    if last is None or last.role != entry.role:
        what.append(f"became {entry.role}")
    if last is not None and (last.cstate in NOT_LINKED) != (entry.cstate in NOT_LINKED):
        what.append("lost the connection" if entry.cstate in NOT_LINKED else "connected")
    known = entry.uuids(volume), last.uuids(volume) if last else ""
    if all(known) and len({uuids_of(gi).current & ~1 for gi in known}) == 2:
        what.append(f"new generation {uuids_of(known[0]).current & ~1:016X}")
    return what


# --------------------------------------------------------------------------------------------- text


def when(at: float | None) -> str:
    """A moment in local time."""
    return "not recorded" if at is None else f"{datetime.fromtimestamp(at).astimezone():%Y-%m-%d %H:%M:%S}"


def size_text(n: int) -> str:
    """Bytes with a binary unit, exact up to four digits."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n >= 10 * factor or (n >= factor and n % factor == 0):
            return f"{n // factor} {unit}" if n % factor == 0 else f"{n / factor:.1f} {unit}"
    return f"{n} bytes"


def _count_text(counts: Counts) -> str:
    return f"{counts.blocks} block{'' if counts.blocks == 1 else 's'}, {size_text(counts.size)}"


@dataclass(frozen=True, slots=True)
class Findings:
    """All that is known of one volume; the bitmaps' and files' order is own, peer."""

    own: Side
    peer: Side
    number: int
    verdict: int
    bitmaps: tuple[Bitmap, Bitmap]
    files: tuple[FileUse, FileUse]

    @property
    def volumes(self) -> tuple[VolumeSide, VolumeSide]:
        mine, theirs = self.own.volume(self.number), self.peer.volume(self.number)
        assert mine is not None and theirs is not None
        return mine, theirs


def headline(name: str, own: Side, peer: Side, verdict: int) -> str:
    """One sentence: how the two histories are related."""
    if is_split(verdict):
        return f"{name}: split brain. {own.node} and {peer.node} have each written data the other does not have."
    if verdict == UNRELATED:
        return (
            f"{name}: the disks of {own.node} and {peer.node} hold unrelated data. To give one of them up, create "
            f"its metadata anew there: tandemadm create-md"
        )
    if verdict == 0:
        return f"{name}: no split brain: {own.node} and {peer.node} have the same history."
    ahead, behind = (own, peer) if verdict > 0 else (peer, own)
    return (
        f"{name}: no split brain: {behind.node} is only behind {ahead.node}, and catches up as soon as they are "
        f"connected."
    )


def text_of(name: str, found: Findings, everything: bool = False) -> str:
    """The report on one volume that is split; *everything* lists all files."""
    own, peer = found.own, found.peer
    mine, theirs = found.volumes
    counts = analyse(*found.bitmaps, mine.size)
    since = (alone_since(own.journal, found.number, mine.gi), alone_since(peer.journal, found.number, theirs.gi))
    rows = [
        ("", own.node, peer.node),
        ("now", _state(own, mine), _state(peer, theirs)),
        ("on its own since", when(since[0]), when(since[1])),
        ("changed alone", _count_text(counts.own_alone), _count_text(counts.peer_alone)),
        ("changed by both", _count_text(counts.both), ""),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [headline(name, own, peer, found.verdict), ""]
    lines += ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
              for row in rows]  # fmt: skip
    if found.verdict == SPLIT_BRAIN_HARD:
        lines += ["", "  The bitmaps count from different generations, so blocks that were changed before the last",
                  "  of them are counted too, and some may be missing."]  # fmt: skip
    lines += ["", *_past_lines(found, since)]
    (own_bits, peer_bits), (own_files, peer_files) = found.bitmaps, found.files
    lines += ["", *_file_lines(own, own_files, own_bits, peer_bits, peer.node, everything)]
    lines += ["", *_file_lines(peer, peer_files, peer_bits, own_bits, own.node, everything)]
    return "\n".join(lines)


def _state(side: Side, volume: VolumeSide) -> str:
    return f"{side.role}, {side.cstate}, {volume.disk}" if side.running else f"not running, {volume.disk}"


def _past_lines(found: Findings, since: tuple[float | None, ...]) -> list[str]:
    known = [at for at in since if at is not None]
    moments: list[Moment] = []
    lines = []
    for side, at, volume in zip((found.own, found.peer), since, found.volumes, strict=True):
        moments += timeline(side, found.number, min(known) if known else None)
        if at is None:
            was = "Primary" if uuids_of(volume.gi).bitmap & 1 else "Secondary"
            lines.append(
                f"  {side.node} has no record of when it went on alone; its metadata say that it was {was} when the "
                "common history ended."
            )
    if known:
        lines.insert(0, f"  The histories differ since {when(min(known))}.")
    moments.sort(key=lambda moment: moment.at)
    left_out = len(moments) - MOMENTS_MAX
    if left_out > 0:
        lines.append(f"  ({left_out} older changes are left out)")
    width = max(len(found.own.node), len(found.peer.node))
    lines += [f"    {when(m.at)}  {m.node.ljust(width)}  {m.what}" for m in moments[-MOMENTS_MAX:]]
    return lines


def _file_lines(side: Side, use: FileUse, own: Bitmap, other: Bitmap, peer: str, everything: bool) -> list[str]:
    """The files that *side* changed, with how many of their changed blocks the peer changed as well."""
    if not own.weight:
        return [f"  {side.node} changed no block."]
    if not use.kind:
        return [f"  Which files {side.node} changed is not known: {use.note}."]
    rows = [("blocks", f"also by {peer}", "")]
    shown = use.files if everything else use.files[:FILES_MAX]
    for file in shown:
        pairs = list(file.pairs())
        mine = sum(own.count(a, b) for a, b in pairs)
        common = sum(_common(own, other, a, b) for a, b in pairs)
        rows.append((str(mine), str(common) if common else "-", _printable(file.name)))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"  What {side.node} changed, in its {use.kind} file system:"]
    lines += [f"    {a.rjust(widths[0])}  {b.rjust(widths[1])}  {c}".rstrip() for a, b, c in rows]
    if len(shown) < len(use.files):
        lines.append(f"    … and {len(use.files) - len(shown)} more; --verbose lists all")
    if use.note:
        lines.append(f"    ({use.note})")
    return lines


def _common(own: Bitmap, other: Bitmap, first: int, end: int) -> int:
    n, at = 0, own.next_set(first)
    while 0 <= at < end:
        stop = min(own.next_clear(at), end)
        n += other.count(at, stop)
        at = own.next_set(stop)
    return n


def _printable(name: str) -> str:
    """A file's name on one line, whatever bytes it has; a space at its end can be seen."""
    raw = name.replace("\\", r"\\").encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in raw)
    bare = text.rstrip(" ")
    return bare + r"\x20" * (len(text) - len(bare))


def own_text(name: str, own: Side, volume: VolumeSide, bitmap: Bitmap, use: FileUse) -> str:
    """What one node can tell without the other: what was written here since its bitmap was empty."""
    if own.cstate in UP_WORDS:
        return f"{name}: no split brain. {own.node} ({_state(own, volume)}) is connected to the other node."
    since = alone_since(own.journal, volume.number, volume.gi)
    lines = [
        f"{name}: {own.node} ({_state(own, volume)}) has been on its own since: {when(since)}.",
        f"  Changed here since then: {_count_text(_counts(bitmap, volume.size))}",
        *[f"    {when(m.at)}  {m.node}  {m.what}" for m in timeline(own, volume.number, since)[-MOMENTS_MAX:]],
        *_file_lines(own, use, bitmap, Bitmap(bitmap.n_bits), "the other node", everything=False),
    ]
    return "\n".join(lines)


def advice(resource: str, own: Side, peer: Side) -> str:
    """What to do next."""
    return (
        f"Look at both: tandemadm split-brain {resource} --look\n"
        f"Keep one:     tandemadm split-brain {resource} --keep {own.node}   (or {peer.node}); "
        "what the other one wrote alone is saved first"
    )
