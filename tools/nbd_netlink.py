"""The kernel's nbd driver, through its generic netlink family.

Decides nothing: one method per command of the family, and the messages by which the kernel says that a
connection died. Relies on Linux 5.15 or newer, whose driver remembers the name of its backend.

These few messages are packed here and not by a netlink library, because whoever keeps a block device must
stay small and in memory: it may be needed to write back the very pages another program's memory is taken
from. Source of numbers and shapes: linux/netlink.h, linux/genetlink.h and linux/nbd-netlink.h.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from enum import IntEnum
from struct import Struct
from typing import Final

_NETLINK_GENERIC: Final = 16
_SOL_NETLINK: Final = 270
_ADD_MEMBERSHIP: Final = 1
_HEADER: Final = Struct("=IHHIIBBH")  # struct nlmsghdr (length, type, flags, sequence, port), genlmsghdr (command, …)
_MESSAGE: Final = Struct("=IHHII")
_ATTRIBUTE: Final = Struct("=HH")  # struct nlattr: length, type
_ERRNO: Final = Struct("=i")
_REQUEST: Final = 1
_ACK: Final = 4
_ERROR: Final = 2  # NLMSG_ERROR; with 0 inside it is an acknowledgement
_CONTROL: Final = 16  # GENL_ID_CTRL
_GETFAMILY: Final = 3
_FAMILY_ID, _FAMILY_NAME, _GROUPS, _GROUP_NAME, _GROUP_ID = 1, 2, 7, 1, 2
_KIND_MASK: Final = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_ANSWER_S: Final = 10.0  # the kernel answers at once, except while it ends the requests of a device
_FAMILY: Final = b"nbd\0"
_VERSION: Final = 1


class Cmd(IntEnum):
    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attr(IntEnum):
    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


_SOCK_ITEM, _SOCK_FD = 1, 1
_DEVICE_ITEM, _DEVICE_INDEX, _DEVICE_CONNECTED = 1, 1, 2


class NoDriver(Exception):
    """The kernel does not have the nbd family, at least not in this network namespace."""


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes."""
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The attributes in *data*: kind and value. What is cut short at the end is left out."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size or at + length > len(data):
            return
        yield kind & _KIND_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += length + -length % 4


def u32(value: int) -> bytes:
    return value.to_bytes(4, sys.byteorder)


def u64(value: int) -> bytes:
    return value.to_bytes(8, sys.byteorder)


def number(value: bytes) -> int:
    return int.from_bytes(value, sys.byteorder)


def sockets(descriptors: Sequence[int]) -> bytes:
    """The value of SOCKETS."""
    return b"".join(attribute(_SOCK_ITEM, attribute(_SOCK_FD, u32(fd))) for fd in descriptors)


def connected_devices(device_list: bytes) -> dict[int, bool]:
    """The value of DEVICE_LIST: index of each device, and whether it is connected."""
    found = {}
    for kind, item in attributes(device_list):
        if kind == _DEVICE_ITEM:
            fields = dict(attributes(item))
            found[number(fields[_DEVICE_INDEX])] = bool(number(fields[_DEVICE_CONNECTED]))
    return found


class NbdNetlink:
    """Commands to the driver. OSError with the kernel's errno when it refuses; NoDriver when it is not there.

    Its descriptor becomes readable when a connection of any nbd device has died.
    """

    def __init__(self) -> None:
        self._commands = _socket()
        self._events = _socket()
        self._sequence = 0
        try:
            self._family, group = self._find_family()
            self._events.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, group)
        except BaseException:
            self.close()
            raise
        self._events.setblocking(False)

    def close(self) -> None:
        self._commands.close()
        self._events.close()

    def fileno(self) -> int:
        return self._events.fileno()

    def connect(
        self, index: int, *, size: int, block_size: int, flags: int, timeout_s: int, dead_timeout_s: int,
        backend: str, descriptors: Sequence[int],
    ) -> None:  # fmt: skip
        """Make ``/dev/nbdINDEX`` of negotiated sockets. The device stays when its last user closes it."""
        self._ask(
            Cmd.CONNECT,
            attribute(Attr.INDEX, u32(index)),
            attribute(Attr.SIZE_BYTES, u64(size)),
            attribute(Attr.BLOCK_SIZE_BYTES, u64(block_size)),
            attribute(Attr.TIMEOUT, u64(timeout_s)),
            attribute(Attr.DEAD_CONN_TIMEOUT, u64(dead_timeout_s)),
            attribute(Attr.SERVER_FLAGS, u64(flags)),
            attribute(Attr.CLIENT_FLAGS, u64(0)),
            attribute(Attr.BACKEND_IDENTIFIER, backend.encode() + b"\0"),
            attribute(Attr.SOCKETS, sockets(descriptors)),
        )

    def set_timeouts(self, index: int, backend: str, timeout_s: int, dead_timeout_s: int) -> None:
        self._ask(
            Cmd.RECONFIGURE, *_names(index, backend),
            attribute(Attr.TIMEOUT, u64(timeout_s)), attribute(Attr.DEAD_CONN_TIMEOUT, u64(dead_timeout_s)),
        )  # fmt: skip

    def grow(self, index: int, backend: str, size: int) -> None:
        self._ask(Cmd.RECONFIGURE, *_names(index, backend), attribute(Attr.SIZE_BYTES, u64(size)))

    def offer(self, index: int, backend: str, descriptor: int) -> None:
        """Put a negotiated socket in the place of one that died; the kernel ignores it if none has."""
        self._ask(Cmd.RECONFIGURE, *_names(index, backend), attribute(Attr.SOCKETS, sockets([descriptor])))

    def disconnect(self, index: int) -> None:
        """End the device. Requests that wait end with an error."""
        self._ask(Cmd.DISCONNECT, attribute(Attr.INDEX, u32(index)))

    def connected(self) -> dict[int, bool]:
        """All nbd devices by index, and whether each is connected."""
        found: dict[int, bool] = {}
        for kind, value in self._ask(Cmd.STATUS):
            if kind == Attr.DEVICE_LIST:
                found |= connected_devices(value)
        return found

    def dead_links(self) -> set[int] | None:
        """Indexes of the devices of which a connection has died since the last call; None: messages were lost."""
        found: set[int] = set()
        while True:
            try:
                data = self._events.recv(1 << 16)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    return None
                raise
            for kind, command, body in _messages(data):
                if kind == self._family and command == Cmd.LINK_DEAD:
                    found |= {number(value) for name, value in attributes(body) if name == Attr.INDEX}

    # ------------------------------------------------------------------------------------ plumbing

    def _find_family(self) -> tuple[int, int]:
        """The number of the family and that of its multicast group."""
        try:
            found = dict(self._ask(_GETFAMILY, attribute(_FAMILY_NAME, _FAMILY), family=_CONTROL))
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise NoDriver from error
            raise
        groups = [dict(attributes(item)) for _, item in attributes(found[_GROUPS])]
        return number(found[_FAMILY_ID]), number(groups[0][_GROUP_ID])

    def _ask(self, command: int, *parts: bytes, family: int = 0) -> list[tuple[int, bytes]]:
        """Send a command and take its answer up to the acknowledgement; the attributes of the answer."""
        self._sequence += 1
        body = b"".join(parts)
        head = _HEADER.pack(
            _HEADER.size + len(body), family or self._family, _REQUEST | _ACK, self._sequence, 0, command, _VERSION, 0
        )
        self._commands.sendto(head + body, (0, 0))
        answer: list[tuple[int, bytes]] = []
        while True:
            data = self._commands.recv(1 << 16)
            for kind, first, body in _messages(data, self._sequence):
                if kind == _ERROR:
                    if first:
                        raise OSError(-first, os.strerror(-first))
                    return answer
                answer += attributes(body)


def _names(index: int, backend: str) -> tuple[bytes, bytes]:
    """Which device is meant, and that it is still the one we connected."""
    return attribute(Attr.INDEX, u32(index)), attribute(Attr.BACKEND_IDENTIFIER, backend.encode() + b"\0")


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
    sock.bind((0, 0))
    sock.settimeout(_ANSWER_S)
    return sock


def _messages(data: bytes, sequence: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """The messages of one datagram: type, command (the errno of an error), attributes."""
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, _, answered, _ = _MESSAGE.unpack_from(data, at)
        if length < _MESSAGE.size or at + length > len(data):
            return
        if sequence is None or answered == sequence:
            if kind == _ERROR:
                yield kind, _ERRNO.unpack_from(data, at + _MESSAGE.size)[0], b""
            elif length >= _HEADER.size:
                yield kind, data[at + _MESSAGE.size], data[at + _HEADER.size : at + length]
        at += length + -length % 4


__all__ = ["Attr", "Cmd", "NbdNetlink", "NoDriver", "attribute", "attributes", "connected_devices", "sockets"]
