"""How one node asks the other about a split brain: questions and answers over a pair of pipes.

The replication link is down then, and a control socket belongs to its own host. So the peer's `tandemadm`
is run there, by the administrator's ordinary way to run a command (ssh, or what ``--rsh`` says), and
answers on its standard output; where both nodes share a run directory it is run here. A message is one line
of JSON, and ``bytes`` in it says how many raw bytes follow. `serve` is the one end, `Remote` the other.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import IO, Any, Final

from tandem.repl.bitmap import Bitmap
from tandem.repl.config import ResourceConfig
from tandem.repl.errors import Refusal
from tandem.repl.units import n_bits_of

from .adm_session import DaemonError, Quit, Session
from .paths import DEFAULT_CONFIG, default_run_dir
from .split_brain_files import FileUse
from .split_brain_node import Node, Ranges, Side, SplitBrainError, compressed, expanded
from .values import Json, pack, unpack

VERSION: Final = 1
LINE_MAX: Final = 64 << 20  # bytes: a report on many files; more is not one of ours
AGENT: Final = "sh-split-brain"
END_S: Final = 5.0  # an agent whose input has ended ends at once


# ---------------------------------------------------------------------------------------- the agent


def serve(session: Session, resource: str, source: IO[bytes], sink: IO[bytes]) -> None:
    """Answer the questions of the other node until its end of the pipe is closed."""
    node = Node(session, resource)
    bitmaps: dict[int, Bitmap] = {}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks; we end when the pipe does
    try:
        _send(sink, {"version": VERSION})
        while (request := _receive(source)) is not None:
            try:
                answer, payload = _answer(node, bitmaps, *request)
            except (SplitBrainError, DaemonError, Quit) as error:
                answer, payload = {"error": str(error)}, b""
            _send(sink, answer, payload)
    finally:
        node.close()


def _answer(node: Node, bitmaps: dict[int, Bitmap], request: Json, payload: bytes) -> tuple[Json, bytes]:
    volume = int(request.get("volume", 0))
    match request.get("do"):
        case "describe":
            return {"side": pack(node.describe())}, b""
        case "config":
            return {"config": pack(node.config())}, b""
        case "bitmap":
            return {}, compressed(node.bitmap(volume))
        case "data":
            return {}, compressed(node.data(volume))
        case "files":
            return {"files": pack(node.files(volume))}, b""
        case "read":
            return {}, node.read(volume, [(int(a), int(n)) for a, n in request["ranges"]])
        case "without":
            bitmaps[volume] = expanded(int(request["bits"]), payload)
            return {}, b""
        case "digests":
            return {}, node.digests(volume, int(request["first"]), int(request["count"]), bitmaps[volume])
        case "command":
            refusal = node.command(str(request["name"]), request["args"])
            return {"refusal": None if refusal is None else pack(refusal)}, b""
        case "lock":
            node.lock()
            return {}, b""
        case "unlock":
            node.unlock()
            return {}, b""
        case other:
            raise SplitBrainError(f"unknown request {str(other)[:40]!r}: the two nodes have different versions")


def _send(sink: IO[bytes], message: Json, payload: bytes = b"") -> None:
    sink.write(json.dumps({**message, "bytes": len(payload)}).encode() + b"\n" + payload)
    sink.flush()


def _receive(source: IO[bytes]) -> tuple[Json, bytes] | None:
    """The next message and what follows it; None at the end. SplitBrainError when it is not ours."""
    line = source.readline(LINE_MAX)
    if not line:
        return None
    try:
        message = json.loads(line)
        length = int(message["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        said = line[:80].decode(errors="replace").strip()
        raise SplitBrainError(f"it answered {said!r}, which is not the answer of a tandemadm") from error
    payload = source.read(length)
    if len(payload) < length:
        return None
    return message, payload


# ------------------------------------------------------------------------------------- the asking end


def peer_command(session: Session, resource: str, peer: str, rsh: str) -> list[str]:
    """The command that runs the peer's agent: here when its socket is here, over *rsh* otherwise."""
    general, paths = session.general, session.paths
    here = type(paths)(paths.run_dir, peer)
    if not rsh and (here.control(resource).exists() or here.journal(resource).exists()):
        where = ["-c", general.config_file, "--node", peer, "--run-dir", str(paths.run_dir)]
        return [sys.executable, "-m", "tandem.tools.adm", *where, AGENT, resource]
    words = ["tandemadm", "--node", peer]
    if general.config_file != DEFAULT_CONFIG:
        words += ["-c", general.config_file]
    if paths.run_dir not in (default_run_dir({}), default_run_dir({}).absolute()):
        words += ["--run-dir", str(paths.run_dir)]
    return [*shlex.split(rsh or "ssh"), peer, shlex.join([*words, AGENT, resource])]


class Remote:
    """The peer. Implements `split_brain_node.Answers`. SplitBrainError when it cannot be asked."""

    def __init__(self, name: str, words: list[str]) -> None:
        self._name = name
        self._words = words
        self._without: dict[int, Bitmap] = {}
        try:
            self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise SplitBrainError(f"cannot run {words[0]}: {error.strerror}") from error
        greeting = self._wait(lambda: _receive(self._output))
        if greeting[0].get("version") != VERSION:
            self.close()
            raise SplitBrainError(f"{name} runs another version of tandemadm; install the same on both nodes")

    @property
    def _output(self) -> IO[bytes]:
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def _input(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def close(self) -> None:
        """End the agent; what it locked is free then."""
        with contextlib.suppress(OSError):
            self._input.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _wait(self, receive: Callable[[], tuple[Json, bytes] | None]) -> tuple[Json, bytes]:
        try:
            answer = receive()
        except SplitBrainError:
            self.close()
            raise
        except OSError as error:
            answer, why = None, error.strerror
        else:
            why = "it ended"
        if answer is None:
            self.close()
            code = self._process.returncode
            raise SplitBrainError(f"{why} with exit code {code} ({shlex.join(self._words[:2])} …)")
        return answer

    def _ask(self, request: Json, payload: bytes = b"") -> tuple[Json, bytes]:
        def exchange() -> tuple[Json, bytes] | None:
            _send(self._input, request, payload)
            return _receive(self._output)

        answer, content = self._wait(exchange)
        if "error" in answer:
            raise SplitBrainError(str(answer["error"]))
        return answer, content

    def _unpacked(self, cls: type[Any], data: object) -> Any:
        try:
            return unpack(cls, data)
        except ValueError as error:
            raise SplitBrainError(f"{self._name} runs another version of tandemadm: {error}") from error

    def _bits(self, volume: int) -> int:
        side = self.describe().volume(volume)
        if side is None:
            raise SplitBrainError(f"{self._name} has no volume {volume}")
        return n_bits_of(side.size)

    def describe(self) -> Side:
        found: Side = self._unpacked(Side, self._ask({"do": "describe"})[0].get("side"))
        return found

    def config(self) -> ResourceConfig:
        found: ResourceConfig = self._unpacked(ResourceConfig, self._ask({"do": "config"})[0].get("config"))
        return found

    def bitmap(self, volume: int) -> Bitmap:
        return expanded(self._bits(volume), self._ask({"do": "bitmap", "volume": volume})[1])

    def data(self, volume: int) -> Bitmap:
        return expanded(self._bits(volume), self._ask({"do": "data", "volume": volume})[1])

    def read(self, volume: int, ranges: Ranges) -> bytes:
        content = self._ask({"do": "read", "volume": volume, "ranges": list(ranges)})[1]
        if len(content) != sum(length for _, length in ranges):
            raise SplitBrainError(f"{self._name} sent {len(content)} bytes where more were asked for")
        return content

    def digests(self, volume: int, first: int, count: int, without: Bitmap) -> bytes:
        if self._without.get(volume) is not without:
            request = {"do": "without", "volume": volume, "bits": without.n_bits}
            self._ask(request, compressed(without))
            self._without[volume] = without
        return self._ask({"do": "digests", "volume": volume, "first": first, "count": count})[1]

    def files(self, volume: int) -> FileUse:
        found: FileUse = self._unpacked(FileUse, self._ask({"do": "files", "volume": volume})[0].get("files"))
        return found

    def command(self, name: str, args: Json) -> Refusal | None:
        answer = self._ask({"do": "command", "name": name, "args": args})[0].get("refusal")
        return None if answer is None else self._unpacked(Refusal, answer)

    def lock(self) -> None:
        self._ask({"do": "lock"})

    def unlock(self) -> None:
        self._ask({"do": "unlock"})
