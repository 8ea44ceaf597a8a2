"""From nothing to two sockets: the procedure by which two DRBD nodes find each other.

Both nodes listen on their one port and dial the peer's, and both take whatever comes first. A socket is
known by the packet its dialler sends on it: P_INITIAL_DATA or P_INITIAL_META. When both dial at the same
moment each prefers the incoming socket, and a coin decides who dials again. What is decided here: when to
dial, which socket to keep, when the pair is good. What is done with the pair is `link`'s business.

Source: drbd_receiver.c, conn_connect (its order of steps; ours takes incoming sockets at any moment, and
retries sooner than connect-int, which a kernel that listens meanwhile cannot tell apart).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Final

from tandem.repl.config import Endpoint, ResourceConfig
from tandem.repl.errors import PeerProtocolError
from tandem.repl.packets import HEADER80, Packet, packet80, parse_header80

from .stream import prepare

RETRY_S: Final = 1.0  # between dials while nobody answers, or until the peer has dialled its socket
CONFLICT_S: Final = (0.05, 0.4)  # the same after crossed dials: short, and hardly ever equal on both sides
DIALS_LATER: Final = 1.3  # times connect-int, within which a kernel that dialled one socket dials the other
LISTEN_BACKLOG: Final = 5  # the kernel's
STRANGERS_MAX: Final = 16  # accepted sockets that have not said yet what they are
PING_TIMEOUTS_TO_SPEAK: Final = 4  # how long they have for it, in units of ping-timeout
ACCEPT_PAUSE_S: Final = 1.0  # when the process has no descriptors left
IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; the socket module has no name for it
NOT_THERE: Final = frozenset({
    errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ETIMEDOUT, errno.EAGAIN,
    errno.EINTR, errno.ECONNRESET, errno.ECONNABORTED, errno.ENETDOWN,
})  # fmt: skip

INITIAL: Final = {False: packet80(Packet.INITIAL_DATA), True: packet80(Packet.INITIAL_META)}  # by "is meta"

Say = Callable[[str, str], None]  # text and reason of a warning for the operator


class Hopeless(Exception):
    """Trying again would not help; the text is one sentence for the operator."""


class Attempt:
    """One search for the peer, for ever if need be. `run` it once."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, entropy: random.Random, config: ResourceConfig, say: Say
    ) -> None:
        self._loop = loop
        self._entropy = entropy
        self._config = config
        self._net = config.net
        self._say = say
        self._data: socket.socket | None = None
        self._data_came = False  # the peer dialled it
        self._meta: socket.socket | None = None
        self._resolver = False
        self._arrived: deque[tuple[bool, socket.socket]] = deque()  # identified, not yet taken: (meta, it)
        self._bell = asyncio.Event()  # rung when something arrives
        self._strangers: dict[socket.socket, tuple[bytearray, asyncio.TimerHandle, str]] = {}
        self._listener: socket.socket | None = None
        self._dial_code = 0  # errno of the current dial, EINPROGRESS until it has ended
        self._complained_of: set[str] = set()

    async def run(self) -> tuple[socket.socket, socket.socket, bool]:
        """The data socket, the meta socket and the resolver flag, as soon as both are up and alive.

        Raises Hopeless. The listener is closed afterwards, so that a third connection is refused.
        """
        try:
            self._listen()
            await self._search()
            assert self._data is not None and self._meta is not None
            pair = self._data, self._meta, self._resolver
            self._data = self._meta = None
            return pair
        finally:
            self.abandon()

    # -------------------------------------------------------------------------------- the search

    async def _search(self) -> None:
        while True:
            self._forget_dead()
            if self._leave_to_peer() and await self._await_arrival(self._net.connect_int * DIALS_LATER):
                continue
            if self._data is None or self._meta is None:
                await self._dial()
            if self._data is not None and self._meta is not None:
                tenths = self._net.socket_check_timeout or self._net.ping_timeout
                if not await self._await_arrival(tenths / 10):
                    self._forget_dead()
                    if self._data is not None and self._meta is not None:
                        return
            else:
                retry_s = min(RETRY_S, float(self._net.connect_int))
                await self._await_arrival(retry_s * (1 + self._entropy.choice((-1, 1)) / 7))

    def _leave_to_peer(self) -> bool:
        """Is the missing meta socket better dialled by the peer?

        Who accepts it resolves the conflicts of two Primaries, and that should not be a kernel: it never
        completes the epoch of a write it has refused (receive_Data leaves it counted as active), and the
        connection ends. A kernel that dialled the data socket dials the other one after connect-int.
        """
        return self._net.allow_two_primaries and self._data is not None and self._data_came and self._meta is None

    async def _await_arrival(self, wait_s: float) -> bool:
        """Wait for an incoming socket and take it; False when none came in time.

        If it replaced one that was alive, dials have crossed: half of the time wait for another.
        """
        while await self._rung(wait_s):
            if not self._take_arrived() or self._entropy.getrandbits(1):
                return True
            wait_s = self._entropy.uniform(*CONFLICT_S)
        return False

    async def _rung(self, wait_s: float, over: Callable[[], bool] | None = None) -> bool:
        """Wait at most *wait_s* for an arrival, or for *over*; False when neither happened."""
        end = self._loop.time() + wait_s
        while not (self._has_arrived() or (over and over())):
            self._bell.clear()
            try:
                async with asyncio.timeout(end - self._loop.time()):
                    await self._bell.wait()
            except TimeoutError:
                return False
        return True

    def _has_arrived(self) -> bool:
        """Whether a live socket has come in; one that its dialler has dropped since does not count."""
        while self._arrived and not is_alive(self._arrived[0][1]):
            self._arrived.popleft()[1].close()
        return bool(self._arrived)

    def _take_arrived(self) -> bool:
        """Adopt the oldest arrival; True when it took the place of a socket that was alive."""
        self._forget_dead()
        meta, sock = self._arrived.popleft()
        old = self._meta if meta else self._data
        if old is not None:
            old.close()
        if meta:
            self._meta, self._resolver = sock, True
        else:
            self._data, self._data_came = sock, True
        return old is not None

    def _forget_dead(self) -> None:
        if self._data is not None and not is_alive(self._data):
            self._data.close()
            self._data = None
        if self._meta is not None and not is_alive(self._meta):
            self._meta.close()
            self._meta = None

    # ---------------------------------------------------------------------------------- dialling

    async def _dial(self) -> None:
        """Dial the socket that is missing, unless one comes in meanwhile; that one is then taken instead."""
        sock = self._dialler()
        self._dial_code = sock.connect_ex(self._resolve(self._config.peer_address, "peer's"))
        try:
            if self._dial_code == errno.EINPROGRESS:
                self._loop.add_writer(sock, self._dialled, sock)
                end = self._loop.time() + self._net.connect_int
                if not await self._rung(end - self._loop.time(), self._dial_over):
                    self._dial_code = errno.ETIMEDOUT
            if self._has_arrived():
                self._take_arrived()
            elif self._dial_code:
                self._complain(f"dialling {self._config.peer_address} failed", self._dial_code)
            else:
                self._adopt(sock)
        finally:
            if sock is not self._data and sock is not self._meta:
                self._loop.remove_writer(sock)
                sock.close()

    def _dialler(self) -> socket.socket:
        """A socket bound to our configured address and any port."""
        own = self._resolve(self._config.address, "local")
        sock = self._new_socket()
        try:
            with contextlib.suppress(OSError):  # saves ports; kernels before 4.2 do without
                sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            # Should it get our own port's number, it must not keep the listener from coming back later.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((own[0], 0, *own[2:]))
        except OSError as error:
            sock.close()
            raise Hopeless(self._why_not_bound(error)) from error
        return sock

    def _dialled(self, sock: socket.socket) -> None:
        """The dial has ended, one way or the other."""
        self._loop.remove_writer(sock)
        self._dial_code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._bell.set()

    def _dial_over(self) -> bool:
        return self._dial_code != errno.EINPROGRESS

    def _adopt(self, sock: socket.socket) -> None:
        """Our dial has succeeded: it becomes the socket that is missing, and the peer is told which."""
        meta = self._data is not None
        try:
            if sock.getsockname() == sock.getpeername():
                return  # dialling a port of this host from that very port, TCP connects a socket with itself
            sock.send(INITIAL[meta])
        except OSError:
            return  # closed again at once; the caller drops it
        if meta:
            self._meta, self._resolver = sock, False
        else:
            self._data, self._data_came = sock, False

    def _complain(self, what: str, code: int) -> None:
        """Say once per kind that dialling fails, unless it only means that the peer is not there (yet)."""
        if code not in NOT_THERE and os.strerror(code) not in self._complained_of:
            self._complained_of.add(os.strerror(code))
            self._say(f"{what}: {os.strerror(code)}", "will be tried again and again")

    # --------------------------------------------------------------------------------- listening

    def _listen(self) -> None:
        address = self._resolve(self._config.address, "local")
        sock = self._new_socket()
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(LISTEN_BACKLOG)
        except OSError as error:
            sock.close()
            raise Hopeless(self._why_not_bound(error)) from error
        self._listener = sock
        self._loop.add_reader(sock, self._accept, sock)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, peer = listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            # No descriptors or no memory: the connection stays in the backlog, so look away for a while.
            self._loop.remove_reader(listener)
            self._loop.call_later(ACCEPT_PAUSE_S, self._accept_again, listener)
            what = f"accepting a connection on {self._config.address} failed"
            self._complain(what, error.errno or errno.EIO)
            return
        if len(self._strangers) == STRANGERS_MAX:
            self._dismiss(next(iter(self._strangers)), "too many connections said nothing")
        prepare(sock)
        limit_s = PING_TIMEOUTS_TO_SPEAK * self._net.ping_timeout / 10
        timer = self._loop.call_later(limit_s, self._dismiss, sock, "it said nothing in time")
        self._strangers[sock] = (bytearray(), timer, str(peer[0]))
        self._loop.add_reader(sock, self._identify, sock)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener is self._listener:
            self._loop.add_reader(listener, self._accept, listener)

    def _identify(self, sock: socket.socket) -> None:
        """Read the initial packet, and not a byte more: what follows it is the machine's."""
        seen, timer, _ = self._strangers[sock]
        try:
            data = sock.recv(HEADER80 - len(seen))
        except BlockingIOError:
            return
        except OSError:
            data = b""
        seen += data
        if not data:
            # A dialler that changed its mind, or a port check: no news, unless it has said something.
            self._dismiss(sock, "it ended before a whole packet" if seen else "")
        elif len(seen) == HEADER80:
            try:
                cmd, length = parse_header80(seen)
            except PeerProtocolError as error:
                self._dismiss(sock, str(error))
                return
            if cmd not in (Packet.INITIAL_DATA, Packet.INITIAL_META) or length:
                self._dismiss(sock, f"its first packet was 0x{cmd:04x}, length {length}, not an initial one")
                return
            timer.cancel()
            del self._strangers[sock]
            self._loop.remove_reader(sock)
            self._arrived.append((cmd == Packet.INITIAL_META, sock))
            self._bell.set()

    def _dismiss(self, sock: socket.socket, why: str) -> None:
        """Close a connection that is none of ours; the operator hears of the first one."""
        _, timer, host = self._strangers.pop(sock)
        timer.cancel()
        self._loop.remove_reader(sock)
        sock.close()
        if why and "stranger" not in self._complained_of:
            self._complained_of.add("stranger")
            self._say(f"closed a connection from {host} to the replication port {self._config.address}", why)

    # ------------------------------------------------------------------------------------ sockets

    def _new_socket(self) -> socket.socket:
        family = socket.AF_INET6 if self._config.address.family == "ipv6" else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        prepare(sock)
        # Before connect or listen, because the size decides on window scaling; 0 leaves it to the kernel.
        if self._net.sndbuf_size:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._net.sndbuf_size)
        if self._net.rcvbuf_size:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._net.rcvbuf_size)
        return sock

    def _resolve(self, endpoint: Endpoint, whose: str) -> tuple[str, int] | tuple[str, int, int, int]:
        """The socket address of *endpoint*; only numbers are looked up, so this does not wait."""
        if endpoint.family not in ("ipv4", "ipv6"):
            raise Hopeless(
                f"resource {self._config.name}: the {whose} address {endpoint} uses the transport "
                f"{endpoint.family}, and only ipv4 and ipv6 are supported; change it in the configuration"
            )
        family = socket.AF_INET6 if endpoint.family == "ipv6" else socket.AF_INET
        try:
            found = socket.getaddrinfo(
                endpoint.host, endpoint.port, family, socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
            )
        except OSError as error:
            raise Hopeless(
                f"resource {self._config.name}: the {whose} address {endpoint} is not a usable IP address "
                f"({error.strerror}); change it in the configuration"
            ) from error
        address: tuple[str, int] | tuple[str, int, int, int] = found[0][4]  # type: ignore[assignment]
        return address

    def _why_not_bound(self, error: OSError) -> str:
        """One sentence: what, where, what to do."""
        name, address = self._config.name, self._config.address
        if error.errno == errno.EADDRINUSE:
            return (
                f"resource {name}: local address {address} is already in use; stop the program that uses "
                f"it or give the resource another port, then connect again"
            )
        if error.errno == errno.EADDRNOTAVAIL:
            return (
                f"resource {name}: local address {address} does not exist on this host; bring it up or "
                f"correct the configuration, then connect again"
            )
        return f"resource {name}: can not bind local address {address}: {error.strerror}; connect again later"

    def abandon(self) -> None:
        """Close everything at once, so that the port is free again; `run` is to be cancelled as well."""
        if self._listener is not None:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        for sock in list(self._strangers):
            self._dismiss(sock, "")
        for held in (self._data, self._meta, *(sock for _, sock in self._arrived)):
            if held is not None:
                held.close()
        self._arrived.clear()


def is_alive(sock: socket.socket) -> bool:
    """Whether the peer still holds its end: something to read or nothing yet is alive, the end is not."""
    try:
        return bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return True
    except OSError:
        return False
