"""What the offline metadata commands share: the disk they claim, where its metadata is, and the console.

It decides who is refused and which metadata counts as found; it changes nothing but what it is told to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TextIO

from tandem.repl import attach
from tandem.repl.edge.store import FileStore
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import (
    BLOCK_SIZE,
    DEVICE_BYTES_MIN,
    NO_META_DISK_CODE,
    Layout,
    Superblock,
    layout,
    superblock_offset,
)
from tandem.repl.units import DEVICE_SECTORS_MAX, SECTOR

_UNKNOWN_DATA: Final = (
    DEVICE_SECTORS_MAX * SECTOR
)  # drbdmeta does not know the data device of external metadata
_STEP: Final = 16 << 20  # bytes written between two reports of progress


@dataclass(frozen=True, slots=True)
class Target:
    """One volume's metadata: *path* holds it; *kind* is internal, flexible or indexed (slot *index*).

    ``data_path`` is the data device of external metadata; it is claimed, too. ``last_known`` is the file
    that remembers where internal metadata was (drbd-minor-N.lkbd); without one a grown disk is not found.
    """

    path: str
    kind: str = "internal"
    index: int = 0
    data_path: str = ""
    last_known: str = ""


    def shrunk_sentence(self, size: int) -> str:
        """What to say of internal metadata that are not found on a disk of now *size* bytes; empty unless it
        was larger when it was last used."""
        known = LastKnown.read(self.last_known) if self.kind == "internal" and self.last_known else None
        if known is None or known.path != self.path or known.size <= size:
            return ""
        return (
            f"{self.path} has shrunk from {known.size} to {size} bytes, and its meta data lay in the part that is"
            " gone. Bring back that part with its content, if it can be brought back (an LVM volume: vgcfgrestore)."
            " Otherwise this copy is lost: after create-md all of it is copied from the peer."
        )


def confirm_at_terminal(stdin: TextIO, err: TextIO) -> bool:
    """Wait for a typed `yes`; no without a terminal."""
    if not stdin.isatty():
        print("stdin not a TTY, not waiting for confirmation", file=err)
        return False
    print("[need to type 'yes' to confirm] ", end="", file=err, flush=True)
    answer = stdin.readline()
    print(file=err)
    return answer.strip() == "yes"


@dataclass(slots=True)
class Console:
    """Where a command prints, and how it asks.

    ``confirm`` is called after the question was printed; by default it reads the terminal. ``force``
    answers every question with yes. ``progress`` is told (what, bytes done, bytes in all) about work that
    takes longer than a second.
    """

    out: TextIO = field(default_factory=lambda: sys.stdout)
    err: TextIO = field(default_factory=lambda: sys.stderr)
    force: bool = False
    confirm: Callable[[], bool] | None = None
    progress: Callable[[str, int, int], None] | None = None

    def say(self, text: str) -> None:
        print(text, file=self.out)

    def warn(self, text: str) -> None:
        print(text, file=self.err)

    def ask(self, question: str) -> bool:
        self.out.flush()
        self.warn(f"\n{question}")
        if self.force:
            self.warn("*** confirmation forced via --force option ***")
            return True
        return self.confirm() if self.confirm is not None else confirm_at_terminal(sys.stdin, self.err)


# -------------------------------------------------------------------- opening and finding


class Disk:
    """The claimed disk of a command, and the metadata found on it."""

    __slots__ = ("console", "data", "store", "target")

    def __init__(self, target: Target, console: Console) -> None:
        self.target, self.console = target, console
        index = target.index if target.kind == "indexed" else None
        if index is not None and not 0 <= index <= 255:
            raise MetadataError(f"'{index}' is not a valid index number.", exit_code=20)
        self.data: FileStore | None = None
        self.store = FileStore(target.path, meta=target.kind != "internal", index=index)
        try:
            if target.kind != "internal" and target.data_path:
                self.data = FileStore(target.data_path)
        except MetadataError:
            self.store.close()
            raise

    def close(self) -> None:
        self.store.close()
        if self.data is not None:
            self.data.close()

    @property
    def data_size(self) -> int:
        if self.target.kind == "internal":
            return self.store.size
        return self.data.size if self.data is not None else _UNKNOWN_DATA

    def layout(self, al_stripes: int = 1, al_stripe_size_4k: int = 8) -> Layout:
        """Where new metadata goes."""
        target = self.target
        sizes = (self.store.size, self.data_size)
        return layout(target.kind, *sizes, target.index, al_stripes, al_stripe_size_4k, name=target.path)

    def find_in_place(self) -> tuple[Superblock, Layout]:
        """The metadata where they belong; MetadataError if they are not there."""
        target = self.target
        return attach.read_superblock(self.store, self.data_size, target.kind, target.index, name=target.path)

    def find(self) -> tuple[Superblock, Layout]:
        """Like `find_in_place`; the error tells if the disk has grown since it was last used."""
        try:
            return self.find_in_place()
        except MetadataError as error:
            shrunk = self.target.shrunk_sentence(self.store.size)
            if shrunk:
                raise MetadataError(shrunk, error.code, error.exit_code) from error
            if (old := self.find_moved()) is None:
                raise
            raise MetadataError(
                f"No valid meta data found: {self.target.path} has grown from {old.size} to {self.store.size}"
                f" bytes, its meta data is still at byte offset {old.layout.superblock}."
                " 'check-resize' moves it.",
                error.code,
                error.exit_code,
            ) from error

    def find_moved(self) -> Moved | None:
        """Internal metadata at the end the disk had when it was last used, if that is remembered."""
        target = self.target
        if target.kind != "internal" or not target.last_known:
            return None
        known = LastKnown.read(target.last_known)
        if known is None or known.path != target.path or not DEVICE_BYTES_MIN <= known.size < self.store.size:
            return None
        try:
            at = superblock_offset("internal", known.size)
            superblock = Superblock.unpack(self.store.read(at, BLOCK_SIZE))
            where = superblock.layout("internal", known.size, known.size)
            superblock.check(where)
        except MetadataError:
            return None
        if known.uuid and superblock.device_uuid and known.uuid != superblock.device_uuid:
            advice = "--force'ed" if self.console.force else "may --force"
            self.console.warn(
                f"Last known and found uuid differ!? {known.uuid:016X} != {superblock.device_uuid:016X}\n"
                f"You {advice} me to ignore that."
            )
            if not self.console.force:
                return None
        return Moved(superblock, where, known.size)

    def write(self, superblock: Superblock, where: Layout) -> None:
        """Write the superblock, durably, and remember where."""
        self.store.write(where.superblock, superblock.pack())
        self.store.flush()
        self.remember(superblock)

    def forget_superblock(self, where: Layout) -> None:
        """Make a superblock in that place unrecognisable, durably.

        Should the command be interrupted, an old superblock must not speak for a new bitmap.
        """
        if any(self.store.read(where.superblock, BLOCK_SIZE)):
            self.store.write(where.superblock, bytes(BLOCK_SIZE))
            self.store.flush()

    def remember(self, superblock: Superblock) -> None:
        if self.target.kind == "internal" and self.target.last_known:
            known = LastKnown(self.store.size, self.target.path, superblock.device_uuid)
            try:
                known.write(self.target.last_known)
            except OSError as error:
                self.console.warn(
                    f"{self.target.last_known}: {error.strerror}. If the disk grows while it is not in use,"
                    " its meta data will not be found."
                )

    def zero(self, what: str, offset: int, length: int) -> None:
        """Zero a range, reporting progress once it takes longer than a second."""
        started = time.monotonic()
        for at in range(0, length, _STEP):
            self.store.zero(offset + at, min(_STEP, length - at))
            if self.console.progress is not None and time.monotonic() - started > 1:
                self.console.progress(what, min(at + _STEP, length), length)


@dataclass(frozen=True, slots=True)
class Moved:
    superblock: Superblock
    layout: Layout
    size: int  # of the disk when it ended behind this metadata


def run(target: Target, console: Console, work: Callable[[Disk], int], *, label: bool = False) -> int:
    """Open the disk, do *work*, turn what went wrong into a sentence and an exit code.

    With *label* the sentence about missing metadata is introduced as drbdmeta does.
    """
    try:
        opened = Disk(target, console)
        try:
            return work(opened)
        finally:
            opened.close()
    except MetadataError as error:
        text = str(error)
        missing = "No valid meta data found"
        if (
            label
            and error.code == NO_META_DISK_CODE
            and error.exit_code == 1
            and not text.startswith(missing)
        ):
            text += f"\n{missing}"
        console.out.flush()
        console.warn(text)
        return error.exit_code


def size_text(kib: int) -> str:
    """A size as drbdmeta prints it: in KiB, or rounded to the first larger unit that makes it below 10000."""
    units = iter("KMGTPE")
    unit = next(units)
    while kib >= 10000:
        kib = (kib + 512) >> 10
        unit = next(units)
    return f"{kib} {unit}B"


@dataclass(frozen=True, slots=True)
class LastKnown:
    """Where internal metadata was when the disk was last used: the disk's size in bytes, its path, and the
    device UUID (0: unknown). Source of the format: drbd-utils, lk_bdev.c."""

    size: int
    path: str
    uuid: int = 0

    @classmethod
    def read(cls, file: str) -> LastKnown | None:
        """None when there is no such file, or it is not of this form."""
        try:
            lines = Path(file).read_text().splitlines()
            size, _, path = lines[0].partition("\t")
            uuid = lines[1].removeprefix("uuid:").strip() if len(lines) > 1 else "0"
            return cls(int(size), path, int(uuid, 16))
        except (OSError, ValueError, IndexError):
            return None

    def write(self, file: str) -> None:
        """Replace the file at once, so that it is never half written."""
        text = f"{self.size}\t{self.path}\n" + (f"uuid:\t{self.uuid:016X}\n" if self.uuid else "")
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".new")
        new.write_text(text)
        new.replace(path)
