"""The journal of one resource on one node: when its role, its generations and its connection changed.

The metadata know which generations there were, not when. Here a line is kept of every change, on stable
storage, so that after a split brain somebody can say since when the histories differ and who was Primary
when. The file is bounded: the oldest half goes when it has become too long. A thread of its own writes it,
because a disk that hangs must not hold up the loop; what cannot be written is reported once and forgotten.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tandem.repl.events import ResourceStatus

from .values import pack, unpack

SIZE_MAX: Final = 256 << 10  # bytes: about a thousand changes
WHY_MAX: Final = 300  # characters of one entry's reason
CLOSE_S: Final = 2.0  # the last lines get this long to reach the disk when the daemon ends


@dataclass(frozen=True, slots=True)
class Entry:
    """The state after one change. *at* is seconds since the epoch; *generations* has a volume's number and
    its four UUIDs as the kernel logs them; *why* is what the daemon said about the change."""

    at: float
    role: str
    cstate: str
    generations: dict[str, str] = field(default_factory=dict)
    why: str = ""

    def uuids(self, volume: int) -> str:
        """``CURRENT:BITMAP:HISTORY0:HISTORY1``, empty when the volume had no disk."""
        return self.generations.get(str(volume), "")

    def same_as(self, other: Entry | None) -> bool:
        """Whether nothing changed that is worth a line."""
        if other is None:
            return False
        linked = (self.cstate in NOT_LINKED) == (other.cstate in NOT_LINKED)
        return linked and (self.role, self.generations) == (other.role, other.generations)


NOT_LINKED: Final = frozenset(
    ("StandAlone", "Disconnecting", "Unconnected", "Timeout", "BrokenPipe", "NetworkFailure", "ProtocolError",
     "TearDown", "WFConnection", "WFReportParams")
)  # fmt: skip


def entry_of(status: ResourceStatus, at: float, why: str) -> Entry:
    """What *status* is, as a line of the journal."""
    generations = {str(v.number): ":".join(v.flags.split(":")[:4]) for v in status.volumes if v.flags}
    return Entry(at, status.role, status.connection.cstate, generations, why[:WHY_MAX])


class Journal:
    """Keeps the journal *path*. `note` may be called on the loop's thread: it only queues."""

    def __init__(self, path: Path, complain: Callable[[str], None]) -> None:
        self._path = path
        self._complain = complain
        self._last: Entry | None = None
        self._lines: queue.SimpleQueue[Entry | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def note(self, status: ResourceStatus, why: str) -> None:
        """Write a line if something has changed since the last one."""
        entry = entry_of(status, time.time(), why)
        if not entry.same_as(self._last):
            self._last = entry
            self._lines.put(entry)

    def close(self) -> None:
        """Let the last lines reach the disk; blocks CLOSE_S at most."""
        self._lines.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        healthy = True
        while (entry := self._lines.get()) is not None:
            try:
                append(self._path, entry)
                healthy = True
            except OSError as error:
                if healthy:
                    self._complain(f"{self._path}: {error.strerror}; the journal of this resource has a gap")
                healthy = False


def append(path: Path, entry: Entry) -> None:
    """Add one line, durably, and keep the file bounded. OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.write(json.dumps(pack(entry)).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    if size > SIZE_MAX:
        lines = path.read_bytes().splitlines(keepends=True)
        new = path.with_name(path.name + ".new")
        with open(new, "wb") as file:
            file.writelines(lines[len(lines) // 2 :])
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)


def read(path: Path) -> tuple[Entry, ...]:
    """All entries, oldest first. A line that is torn or not ours is left out; no file is no entry."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return ()
    entries = []
    for line in lines:
        try:
            entries.append(unpack(Entry, json.loads(line)))
        except ValueError:
            continue
    return tuple(entries)
