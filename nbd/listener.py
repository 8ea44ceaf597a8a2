"""A listening socket: made with a clear sentence when it cannot be, and emptied a batch at a time.

Out of file descriptors or memory is not an error but a reason to leave the clients in the kernel's queue
for a while; other parts of the program need descriptors more than one client more does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import Callable
from typing import Final
from urllib.parse import quote

from .codec import DEFAULT_PORT

ACCEPT_MAX: Final = 64  # connections taken at a time, so that the sessions at work get their turn
BACKLOG: Final = 1024  # connections the kernel keeps waiting (it applies its own limit, somaxconn)
EXHAUSTED_S: Final = 0.5  # without descriptors, the next attempt comes after this long
UNIX_PATH_MAX: Final = 107  # bytes in sockaddr_un.sun_path without the final NUL, <sys/un.h>
_EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

Address = tuple[str, int] | str


class ServerError(OSError):
    """A socket that cannot be listened on: one sentence for the operator."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Listener:
    """Accepts connections and hands them on, unless paused. It starts paused."""

    def __init__(
        self, sock: socket.socket, address: Address, accepted: Callable[[socket.socket], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock = sock
        self._accepted = accepted
        self._accepting = False
        self._retry: asyncio.TimerHandle | None = None
        self._inode: tuple[int, int] | None = None  # of a Unix socket, to remove no other
        self.address = address

    @classmethod
    async def tcp(cls, host: str, port: int, accepted: Callable[[socket.socket], None]) -> list[Listener]:
        """Listeners on every address *host* stands for ('' is all of this machine's). Raises ServerError."""
        where = f"port {port} of {host}" if host else f"port {port}"
        if not 0 <= port <= 65535:
            raise ServerError(f"Cannot listen on {where}: ports go from 0 to 65535.")
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (socket.gaierror, UnicodeError) as error:
            raise ServerError(f"Cannot listen on {where}: the host name is not known ({error}).") from error
        made: list[Listener] = []
        for family, kind, protocol, _, sockaddr in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if made:  # with port 0, every address gets the port the first one was given
                    sockaddr = (sockaddr[0], made[0].address[1], *sockaddr[2:])
                sock.bind(sockaddr)
                sock.listen(BACKLOG)
            except OSError as error:
                sock.close()
                if error.errno == errno.EAFNOSUPPORT or (made and error.errno == errno.EADDRNOTAVAIL):
                    continue
                for listener in made:
                    listener.close()
                raise ServerError(f"Cannot listen on {where}: {_reason(error)}.") from error
            sock.setblocking(False)
            made.append(cls(sock, sock.getsockname()[:2], accepted))
        if not made:
            raise ServerError(f"Cannot listen on {where}: this machine has no such address.")
        return made

    @classmethod
    def unix(cls, path: str, accepted: Callable[[socket.socket], None]) -> Listener:
        """A listener on a Unix socket; one left behind by a dead server is replaced. Raises ServerError."""
        length = len(os.fsencode(path))
        if length > UNIX_PATH_MAX:
            raise ServerError(
                f"Cannot listen on {path}: the path of a Unix socket may have {UNIX_PATH_MAX} bytes, "
                f"this one has {length}."
            )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _remove_stale(path)
            sock.bind(path)
            sock.listen(BACKLOG)
            sock.setblocking(False)
            found = os.stat(path)
        except ServerError:
            sock.close()
            raise
        except (OSError, ValueError) as error:  # ValueError: a NUL within the path
            sock.close()
            reason = _reason(error) if isinstance(error, OSError) else str(error)
            raise ServerError(f"Cannot listen on {path}: {reason}.") from error
        listener = cls(sock, path, accepted)
        listener._inode = (found.st_dev, found.st_ino)
        return listener

    def uri(self, name: str) -> str:
        """The NBD URI of the export *name* here (doc/uri.md of the NetworkBlockDevice project)."""
        if isinstance(self.address, str):
            return f"nbd+unix:///{quote(name)}?socket={quote(self.address)}"
        host, port = self.address
        if ":" in host:
            host = f"[{host}]"
        return f"nbd://{host}{'' if port == DEFAULT_PORT else f':{port}'}/{quote(name)}"

    def resume(self) -> None:
        if self._retry is not None:  # a descriptor may just have become free
            self._retry.cancel()
            self._retry = None
        if not self._accepting:
            self._accepting = True
            self._loop.add_reader(self._sock, self._acceptable)

    def pause(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self._accepting:
            self._accepting = False
            self._loop.remove_reader(self._sock)

    def close(self) -> None:
        self.pause()
        self._sock.close()
        if isinstance(self.address, str):
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.address)
                if (found.st_dev, found.st_ino) == self._inode:
                    os.unlink(self.address)

    def _acceptable(self) -> None:
        for _ in range(ACCEPT_MAX):
            if not self._accepting:  # the server has enough
                return
            try:
                sock, _address = self._sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self.pause()
                    self._retry = self._loop.call_later(EXHAUSTED_S, self.resume)
                    return
                continue  # that connection was broken before it was accepted, see accept(2)
            self._accepted(sock)


def _remove_stale(path: str) -> None:
    """Remove the socket at *path* when nobody listens on it. Raises ServerError when it is something else."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ServerError(f"Cannot listen on {path}: it exists and is not a socket; remove or rename it.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
    raise ServerError(f"Cannot listen on {path}: another program is listening there; stop it first.")


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "another program is listening there; choose another port or stop it"
    if error.errno == errno.EADDRNOTAVAIL:
        return "this machine has no such address"
    return error.strerror or str(error)
