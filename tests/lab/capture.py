"""Records what two nodes say to each other, straight from the network, and sorts it by socket.

A `Capture` listens on the tap of a guest while a cell runs. Its result is a list of `Chunk`: who sent
bytes on which of DRBD's two sockets, in the order in which they were seen. `save` and the reader in
tests/wire/test_kernel.py share a file format of one line a chunk, compressed.
"""

from __future__ import annotations

import lzma
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ETH_P_IP: Final = 0x0800
ETH_P_ALL: Final = 0x0003
INITIAL_DATA: Final = bytes.fromhex("83740267fff20000")
INITIAL_META: Final = bytes.fromhex("83740267fff10000")
SOCKET_NAMES: Final = {INITIAL_DATA: "data", INITIAL_META: "meta"}

Flow = tuple[bytes, int, bytes, int]  # source address and port, destination address and port


@dataclass(slots=True)
class Chunk:
    """Bytes of one direction of one socket; *link* counts the connections of a capture."""

    sender: str  # kernel or tandem
    socket: str  # data or meta
    link: int
    data: bytes


class Stream:
    """One direction of a TCP connection: segments in any order in, bytes in order out."""

    def __init__(self, first: int) -> None:
        self.next = first & 0xFFFFFFFF
        self.waiting: dict[int, bytes] = {}

    def add(self, seq: int, data: bytes) -> bytes:
        self.waiting[seq] = max(data, self.waiting.get(seq, b""), key=len)
        out = b""
        while True:
            for at, segment in sorted(self.waiting.items()):
                behind = (self.next - at) & 0xFFFFFFFF
                if behind < 1 << 31:  # starts at or before what is wanted
                    del self.waiting[at]
                    if behind < len(segment):
                        out += segment[behind:]
                        self.next = (self.next + len(segment) - behind) & 0xFFFFFFFF
                        break
            else:
                return out


class Capture:
    """Records TCP connections to or from *port* on a network device. A context manager."""

    def __init__(self, device: str, port: int, kernel_address: str) -> None:
        self.port = port
        self.kernel = socket.inet_aton(kernel_address)
        self.chunks: list[Chunk] = []
        self._streams: dict[Flow, Stream] = {}
        self._links: dict[Flow, tuple[str, int]] = {}  # by the flow away from the dialler
        self._pending: dict[Flow, list[tuple[Flow, bytes]]] = {}
        self._n_links = 0
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: lose nothing
        self._socket.bind((device, ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while True:
            try:
                frame = self._socket.recv(1 << 17)
            except TimeoutError:
                if self._end.is_set():
                    return
                continue
            self._frame(frame)

    def _frame(self, frame: bytes) -> None:
        if len(frame) < 54 or struct.unpack_from(">H", frame, 12)[0] != ETH_P_IP or frame[23] != socket.IPPROTO_TCP:
            return
        ip_length = (frame[14] & 15) * 4
        total = struct.unpack_from(">H", frame, 16)[0] or len(frame) - 14  # 0: a segment above 64 KiB
        source, destination = frame[26:30], frame[30:34]
        tcp = 14 + ip_length
        source_port, destination_port, seq = struct.unpack_from(">HHI", frame, tcp)
        if self.port not in (source_port, destination_port):
            return
        header = (frame[tcp + 12] >> 4) * 4
        syn = frame[tcp + 13] & 2
        data = frame[tcp + header : 14 + total]
        flow = (source, source_port, destination, destination_port)
        if syn:
            self._streams[flow] = Stream(seq + 1)
        elif data and flow in self._streams:
            fresh = self._streams[flow].add(seq, data)
            if fresh:
                self._bytes(flow, fresh)

    def _bytes(self, flow: Flow, data: bytes) -> None:
        """New bytes of a flow: the first eight from the dialler say which socket it is."""
        dialled = flow if flow[3] == self.port else (flow[2], flow[3], flow[0], flow[1])
        if dialled not in self._links:
            held = self._pending.setdefault(dialled, [])
            held.append((flow, data))
            opening = b"".join(part for f, part in held if f == dialled)[:8]
            if len(opening) < 8:
                return
            name = SOCKET_NAMES.get(opening, "unknown")
            self._links[dialled] = (name, self._n_links)
            self._n_links += 1
            for f, part in self._pending.pop(dialled):
                self._append(f, dialled, part)
            return
        self._append(flow, dialled, data)

    def _append(self, flow: Flow, dialled: Flow, data: bytes) -> None:
        name, link = self._links[dialled]
        sender = "kernel" if flow[0] == self.kernel else "tandem"
        last = self.chunks[-1] if self.chunks else None
        if last and (last.sender, last.socket, last.link) == (sender, name, link):
            last.data += data
        else:
            self.chunks.append(Chunk(sender, name, link, data))


def save(chunks: list[Chunk], path: Path) -> None:
    """One line a chunk: sender, socket, link, hexadecimal bytes; xz."""
    text = "".join(f"{c.sender} {c.socket} {c.link} {c.data.hex()}\n" for c in chunks)
    path.write_bytes(lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME))
