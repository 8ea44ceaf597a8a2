"""A client that never stops: it writes to the service of `guest/store.py`, wherever that runs at the moment.

Several writers, each waiting for the acknowledgement of a write before it sends the next one. A write that got
no answer is sent again, to the first host on which the service answers. Every acknowledged write is remembered,
so `Load.check` can say whether all of them are there. What is in a file or record follows from its name and
version alone, and its first line says both, so that nobody has to keep the contents.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

PORT: Final = 7070
RECORD: Final = 512
N_WRITERS: Final = 3
N_FILES: Final = 100  # for each writer, written again and again
N_RECORDS: Final = 1024
FILE_MAX: Final = 24 << 10
ARCHIVE_FILE: Final = 1 << 20
THINK_S: Final = 0.02  # between two writes, so that the load leaves something of the machine
CONNECT_S: Final = 0.5
ANSWER_S: Final = 60.0  # a service that lives and says nothing for so long is stuck
DEAD_MS: Final = 2000  # a host that does not confirm our bytes for so long is not there any more


class Broken(AssertionError):
    """Something that was promised did not hold; one sentence."""


def content(key: str, version: int) -> bytes:
    """What *key* holds after its write number *version*: archive files, records, and files of all sizes."""
    draw = random.Random(f"{key} {version}")
    if key.startswith("file/archive"):
        length = ARCHIVE_FILE
    elif key.startswith("file/"):
        length = draw.randint(RECORD, FILE_MAX)
    else:
        length = RECORD
    head = f"{key} {version}\n".encode()
    return head + draw.randbytes(length - len(head))


@dataclass(slots=True)
class Ledger:
    """What was sent and what was acknowledged: for each key the number of the last write."""

    sent: dict[str, int] = field(default_factory=dict)
    acknowledged: dict[str, int] = field(default_factory=dict)
    n_acknowledged: int = 0
    last: float = field(default_factory=time.monotonic)  # when the last acknowledgement came
    longest: float = 0.0  # the longest time without one, since `forget_longest`
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_version(self, key: str) -> int:
        with self.lock:
            self.sent[key] = self.acknowledged.get(key, 0) + 1
            return self.sent[key]

    def acknowledge(self, key: str, version: int) -> None:
        now = time.monotonic()
        with self.lock:
            self.acknowledged[key] = version
            self.n_acknowledged += 1
            self.longest = max(self.longest, now - self.last)
            self.last = now

    def forget_longest(self) -> None:
        with self.lock:
            self.last, self.longest = time.monotonic(), 0.0

    def compare(self, acknowledged: dict[str, int], found: dict[str, list[str]]) -> None:
        """Broken unless *found* has all of *acknowledged*, or later writes, and nothing that was never sent."""
        for key in acknowledged.keys() - found.keys():
            raise Broken(f"{key}: write {acknowledged[key]} was acknowledged, and it is not there at all")
        with self.lock:
            sent = dict(self.sent)
        for key, (head, digest) in found.items():
            name, _, number = head.rpartition(" ")
            version = int(number) if number.isdigit() else 0
            if name != key or not acknowledged.get(key, 1) <= version <= sent.get(key, 0):
                raise Broken(
                    f"{key} holds {head[:80]!r}; acknowledged was write {acknowledged.get(key, 0)}, "
                    f"sent was {sent.get(key, 0)}"
                )
            if hashlib.sha256(content(key, version)).hexdigest() != digest:
                raise Broken(f"{key} says that it is write {version}, and has other bytes")


class Session:
    """A connection to the service, on whichever of *addresses* it answers."""

    def __init__(self, addresses: list[str], ended: threading.Event) -> None:
        self._addresses = addresses
        self._ended = ended
        self._sock: socket.socket | None = None

    def ask(self, request: dict[str, Any], data: bytes = b"") -> dict[str, Any] | None:
        """The answer; None when the connection broke, and it is not known what became of the request.

        Broken when the service answers that it could not do it.
        """
        sock = self._sock = self._sock or self._connect()
        if sock is None:
            return None
        try:
            sock.sendall(json.dumps(request).encode() + b"\n" + data)
            line = sock.makefile("rb").readline()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            self.close()
            return None
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise Broken(f"the service could not {request}: {reply['error']}")
        return reply

    def _connect(self) -> socket.socket | None:
        while not self._ended.is_set():
            for address in self._addresses:
                try:
                    sock = socket.create_connection((address, PORT), CONNECT_S)
                except OSError:
                    continue
                sock.settimeout(ANSWER_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_MS)
                return sock
            self._ended.wait(THINK_S)
        return None

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


class Load:
    """The writers. `start`, any number of `check`, then `stop`."""

    def __init__(self, addresses: list[str]) -> None:
        self.ledger = Ledger()
        self._addresses = addresses
        self._ended = threading.Event()
        self._trouble: list[Exception] = []
        self._threads = [
            threading.Thread(target=self._run, args=(n, random.Random(n)), daemon=True)
            for n in range(N_WRITERS)
        ]

    def archive(self, n_files: int) -> None:
        """Write *n_files* of a MiB that nobody changes later."""
        session = Session(self._addresses, self._ended)
        for n in range(n_files):
            self._write(session, f"file/archive{n}")
        session.close()

    def start(self) -> None:
        self.ledger.forget_longest()
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """No write is under way afterwards. Broken if one failed."""
        self.end()
        for thread in self._threads:
            thread.join()
        self.complain()

    def end(self) -> None:
        """Tell the writers to give up; what they wait for may be gone."""
        self._ended.set()

    def complain(self) -> None:
        if self._trouble:
            raise self._trouble[0]

    def check(self) -> int:
        """Ask the service for all it has and compare with what it acknowledged; how many things that is."""
        self.complain()
        with self.ledger.lock:
            acknowledged = dict(self.ledger.acknowledged)
        session = Session(self._addresses, threading.Event())
        reply = session.ask({"do": "list"})
        session.close()
        if reply is None:
            raise Broken("the service went away while it told what it has")
        self.ledger.compare(acknowledged, reply["found"])
        return len(acknowledged)

    def longest(self) -> float:
        """The longest time without an acknowledgement since the last call, or since `start`."""
        with self.ledger.lock:
            longest = max(self.ledger.longest, time.monotonic() - self.ledger.last)
            self.ledger.longest = 0.0
        return longest

    def _run(self, n: int, draw: random.Random) -> None:
        session = Session(self._addresses, self._ended)
        try:
            while not self._ended.is_set():
                file = f"file/w{n}-{draw.randrange(N_FILES)}"
                self._write(session, file if draw.random() < 0.5 else f"w{n}/{draw.randrange(N_RECORDS)}")
                self._ended.wait(THINK_S)
        except Exception as error:
            self._trouble.append(error)
        finally:
            session.close()

    def _write(self, session: Session, key: str) -> None:
        """The next version of *key*, sent until it is acknowledged or the load ends."""
        version = self.ledger.next_version(key)
        data = content(key, version)
        place, _, name = key.partition("/")
        request: dict[str, Any] = {"do": "file", "name": name, "length": len(data)}
        if place != "file":
            request = {"do": "record", "table": place, "slot": int(name), "length": len(data)}
        while not self._ended.is_set():
            if session.ask(request, data) is not None:
                self.ledger.acknowledge(key, version)
                return
