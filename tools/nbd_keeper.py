"""The keeper of one nbd device: a process that gives the kernel a new connection for each one that died.

While all connections are dead the kernel lets every request wait; the keeper looks for the node that is
Primary now and hands over fresh, negotiated sockets. The data never passes through it. Decides when to look,
when a socket may be handed over, and what is told to the operator: its log, and a small file that
`tandemadm nbd list` shows. A keeper that was killed is replaced by starting another one: the device stays,
and whoever keeps it next adopts it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Final

from . import nbd_device
from .nbd_connect import Opened, Unavailable, in_order, open_first, unfit
from .nbd_device import Attachment, InUse, NbdError
from .nbd_netlink import NbdNetlink
from .paths import NodePaths, PathError
from .process import Held, hold, tell_ready, tell_starter
from .values import pack, unpack

RETRY_FIRST_S: Final = 0.1
RETRY_MAX_S: Final = 1.0  # how long after a promotion the last of the waiting requests may still wait
HINTS: Final = 3
SECTOR: Final = 512  # the smallest block of a Linux block device
CONNECTED: Final = "Connected"
WAITING: Final = "Waiting"
LEAVE_IT: Final = signal.SIGUSR1
_TIMEVAL: Final = struct.Struct("@ll")
_MCL_ALL: Final = 3  # MCL_CURRENT | MCL_FUTURE, sys/mman.h
_PR_SET_IO_FLUSHER: Final = 57  # sys/prctl.h


@dataclass(frozen=True, slots=True)
class KeeperState:
    """What `tandemadm nbd list` shows. *n_live* connections go to the node *server*; *why* it waits."""

    attachment: Attachment
    flags: int
    server: str = ""
    address: str = ""
    n_live: int = 0
    state: str = WAITING
    why: str = ""


def save_state(path: Path, state: KeeperState) -> None:
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(json.dumps(pack(state)))
    fresh.replace(path)


def load_state(path: Path) -> KeeperState | None:
    """What the keeper wrote last; None when there is nothing, or nothing that can be understood."""
    try:
        return unpack(KeeperState, json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def stay_resident() -> None:
    """Never wait for memory that only our own device could free; without the right to ask, go on as we are."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mlockall(_MCL_ALL)
    libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)


def log(name: str, text: str) -> None:
    stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not end the keeping
        sys.stderr.write(f"{stamp} {name}: {text}\n")
        sys.stderr.flush()


class _NotYet(Exception):
    """The repair must wait; a few words why."""


class Keeper:
    """Attaches or adopts the device (`begin`), then keeps it (`keep`) until a signal or until it is gone."""

    def __init__(self, attachment: Attachment, netlink: NbdNetlink, state_file: Path) -> None:
        self.attachment = attachment
        self.index = attachment.index
        self._netlink = netlink
        self._state_file = state_file
        self._live: list[Opened] = []  # handed over by this process and not seen dead yet
        self._dead: list[Opened] = []  # of which the server may still read
        self._n_vacant = 0  # of our sockets, those that died and were not replaced yet
        self._n_unknown = 0  # the kernel's sockets that an earlier keeper handed over
        self._n_hints = 0  # how often to offer a socket again after the kernel said that one died
        self._server = ""  # the node that served last
        self._flags = 0
        self._size = 0
        self._said: tuple[str, str, int, str] | None = None
        self._retry_s = RETRY_FIRST_S

    # ---------------------------------------------------------------------------------- beginning

    def begin(self) -> None:
        """Attach the device, or adopt it from a keeper that ended. Raises NbdError."""
        if not self._netlink.connected().get(self.index):
            self._attach()
            return
        if nbd_device.backend(self.index) != self.attachment.backend:
            owner = nbd_device.attached_name(self.index)
            whose = f"shows {owner}" if owner else "was connected by another program"
            raise NbdError(
                f"{self.attachment.device} is busy: it {whose}; choose another device, "
                f"or end it with: {'tandemadm nbd detach' if owner else 'nbd-client -d'} {self.attachment.device}"
            )
        self._adopt()

    def _attach(self) -> None:
        attachment = self.attachment
        opened: list[Opened] = []
        try:
            opened.append(open_first(attachment.places))
            for _ in range(attachment.n_connections - 1):
                opened.append(open_first([opened[0].place]))
            self._connect(opened)
        except Unavailable as error:
            raise NbdError(
                f"{opened[0].place.node} takes {len(opened)} of {attachment.n_connections} connections; "
                f"ask for fewer with --connections: {error}" if opened else
                f"no node serves {attachment.name} as Primary; promote one with 'tandemadm primary': {error}"
            ) from None
        except OSError as error:
            raise NbdError(
                f"this host cannot make {attachment.n_connections} connections: {error.strerror}; "
                "ask for fewer with --connections"
            ) from None
        finally:
            if not self._live:
                _close(opened)
        self._server, self._flags, self._size = opened[0].place.node, opened[0].terms.flags, opened[0].terms.size
        log(attachment.name, f"attached to {attachment.device}, {self._size} bytes, pid {os.getpid()}")
        self._tell(CONNECTED, "")

    def _connect(self, opened: list[Opened]) -> None:
        attachment, terms = self.attachment, opened[0].terms
        nbd_device.make_link(attachment.name, self.index)
        try:
            self._netlink.connect(
                self.index, size=terms.size, block_size=max(terms.block_min, SECTOR), flags=terms.flags,
                timeout_s=attachment.timeout_s, dead_timeout_s=attachment.dead_timeout_s,
                backend=attachment.backend, descriptors=[one.sock.fileno() for one in opened],
            )  # fmt: skip
        except OSError as error:
            nbd_device.remove_link(attachment.name, self.index)
            raise NbdError(f"{attachment.device} cannot be connected: {error.strerror}; see dmesg") from error
        if nbd_device.backend(self.index) != attachment.backend:
            nbd_device.release(self._netlink, attachment.name, self.index)
            raise NbdError("the nbd driver of this kernel does not remember its backend; Linux 5.15 or newer is needed")
        self._live = opened
        nbd_device.make_node(self.index)

    def _adopt(self) -> None:
        earlier = load_state(self._state_file)
        if earlier is not None:
            self._server, self._flags = earlier.server, earlier.flags
            self.attachment = replace(self.attachment, n_connections=earlier.attachment.n_connections)
        attachment = self.attachment
        self._size = nbd_device.size(self.index)
        self._n_unknown = attachment.n_connections
        try:
            self._netlink.set_timeouts(
                self.index, attachment.backend, attachment.timeout_s, attachment.dead_timeout_s
            )
        except OSError as error:
            raise NbdError(
                f"{attachment.device} cannot be taken up again ({error.strerror}): it was detached by force and is "
                "still in use; end its users, for example with umount"
            ) from error
        nbd_device.make_link(attachment.name, self.index)
        log(attachment.name, f"adopted {attachment.device}, pid {os.getpid()}")

    # ------------------------------------------------------------------------------------ keeping

    def keep(self, signalled: int) -> None:
        """Repair what dies, until *signalled* becomes readable. NbdError when the device is gone."""
        while not self._ended(signalled, 0.0):
            again_s = self._repair()
            if self._ended(signalled, again_s):
                return

    def _ended(self, signalled: int, limit_s: float | None) -> bool:
        """Wait for the end of a connection, for a signal (then True), or for *limit_s* seconds."""
        poll = select.poll()
        poll.register(signalled, select.POLLIN)
        if limit_s is None:  # all is well: the next event is a death
            poll.register(self._netlink, select.POLLIN)
            for one in self._live:
                poll.register(one.sock, 0)
        return any(fd == signalled for fd, _ in poll.poll(None if limit_s is None else limit_s * 1000))

    def _repair(self) -> float | None:
        """Hand over sockets for all connections that died; None when all live, else seconds to wait."""
        try:
            self._check_connected()
            self._look()
            self._fill()
        except (Unavailable, _NotYet, OSError) as error:
            self._tell(CONNECTED if self._live else WAITING, str(error))
            again_s, self._retry_s = self._retry_s, min(2 * self._retry_s, RETRY_MAX_S)
            return again_s
        self._retry_s = RETRY_FIRST_S
        self._tell(CONNECTED, "")
        return None

    def _look(self) -> None:
        """See which connections have died, and hear of those that an earlier keeper handed over."""
        links = self._netlink.dead_links()
        if links is None or self.index in links:
            self._n_hints = HINTS
        dead = [one for one in self._live if one.is_dead]
        self._live = [one for one in self._live if one not in dead]
        self._dead += dead
        self._n_vacant += len(dead)

    def _check_connected(self) -> None:
        connected = self._netlink.connected().get(self.index)
        if not connected or nbd_device.backend(self.index) != self.attachment.backend:
            nbd_device.remove_link(self.attachment.name, self.index)
            raise NbdError(f"{self.attachment.device} was disconnected by another program")

    def _fill(self) -> None:
        """Offer sockets until the kernel has no more use for them. Raises Unavailable, _NotYet, OSError."""
        while self._n_vacant or self._n_unknown:
            opened = self._open()
            taken = False
            try:
                taken = self._hand_over(opened)
            finally:
                if not taken:
                    opened.sock.close()
            if taken:
                self._server = opened.place.node
                self._live.append(opened)
                if self._n_vacant:
                    self._n_vacant -= 1
                else:
                    self._n_unknown -= 1
            elif self._n_vacant or self._n_hints:
                self._n_hints = max(self._n_hints - 1, 0)
                raise _NotYet("the kernel has not closed the dead connection yet")
            else:
                break  # what an earlier keeper handed over lives
        self._n_hints = 0
        settled = [one for one in self._dead if one.is_settled]
        self._dead = [one for one in self._dead if one not in settled]
        _close(settled)

    def _open(self) -> Opened:
        """A connection to the Primary, if that has nothing left to do for connections given up. Unavailable."""
        candidates = self._candidates()
        busy = [place for place in candidates if any(d.place == place and not d.is_settled for d in self._dead)]
        reasons = [f"{place.node} still works on requests of a connection that was given up" for place in busy]
        try:
            return open_first([place for place in candidates if place not in busy])
        except Unavailable as error:
            raise Unavailable("; ".join(filter(None, [*reasons, str(error)]))) from None

    def _candidates(self) -> list[nbd_device.Place]:
        """All connections of a device go to one node; when none is left, the last one is asked first."""
        if self._live:
            return [self._live[0].place]
        return in_order(self.attachment.places, self._server)

    def _hand_over(self, opened: Opened) -> bool:
        """Offer a socket to the kernel; whether it took it. Raises _NotYet."""
        attachment, terms = self.attachment, opened.terms
        block_size = nbd_device.block_size(self.index)
        problem = unfit(terms, self._size, block_size, self._flags)
        if problem:
            raise _NotYet(f"{opened.place.node} cannot go on with {attachment.device}: {problem}")
        self._netlink.offer(self.index, attachment.backend, opened.sock.fileno())
        if not _has_timeout(opened.sock):
            return False
        if terms.size > self._size:
            self._netlink.grow(self.index, attachment.backend, terms.size)
            log(attachment.name, f"{attachment.device} grows from {self._size} to {terms.size} bytes")
            self._size = terms.size
        self._flags = self._flags or terms.flags
        return True

    def _tell(self, state: str, why: str) -> None:
        """Log and write down what has changed."""
        n_live = len(self._live) if why else self.attachment.n_connections
        if (state, self._server, n_live, why) == self._said:
            return
        self._said = state, self._server, n_live, why
        place = next((p for p in self.attachment.places if p.node == self._server), None)
        where = f"{self._server} ({place})" if place else "another keeper's choice"
        if state == WAITING:
            log(self.attachment.name, f"waiting for a Primary: {why}")
        else:
            left = f", {n_live} of {self.attachment.n_connections} connections: {why}" if why else ""
            log(self.attachment.name, f"connected to {where}{left}")
        shown = KeeperState(self.attachment, self._flags, self._server, str(place or ""), n_live, state, why)
        with contextlib.suppress(OSError):
            save_state(self._state_file, shown)

    def forget(self) -> None:
        """The device is no more."""
        self._state_file.unlink(missing_ok=True)


def _close(connections: list[Opened]) -> None:
    for one in connections:
        one.sock.close()


def _has_timeout(sock: socket.socket) -> bool:
    """Has the kernel's driver taken the socket? It gives the ones it takes the device's timeout for sending.

    Source: drivers/block/nbd.c, nbd_reconnect_socket, since Linux 4.12; the answer to the command does not say.
    """
    return any(_TIMEVAL.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.size)))


# -------------------------------------------------------------------------------------------- process


def run(attachment: Attachment, paths: NodePaths, ready: int = -1) -> int:
    """Keep the device until a signal; the exit code. *ready* is a pipe to whoever waits for us.

    SIGTERM and SIGINT: when nobody uses the device, it is detached; one in use is left to the next keeper.
    LEAVE_IT: whoever sends this takes the device away.
    """
    try:
        paths.make()
        paths.nbd_device(attachment.device, "pid").parent.mkdir(exist_ok=True)
        with _pid_file(attachment, paths), contextlib.closing(nbd_device.open_driver()) as netlink:
            signalled = _catch_signals()
            stay_resident()
            state_file = paths.nbd_device(attachment.device, "state")
            keeper = Keeper(attachment, netlink, state_file)
            keeper.begin()
            tell_ready(ready)
            keeper.keep(signalled)
            if LEAVE_IT in os.read(signalled, 64):
                log(attachment.name, f"the keeper ends; {attachment.device} is being detached")
            else:
                _leave(keeper, netlink)
            return 0
    except (NbdError, PathError) as error:
        log(attachment.name, str(error))
        tell_starter(ready, {"error": str(error), "code": getattr(error, "code", 20)})
        return getattr(error, "code", 20)


@contextlib.contextmanager
def _pid_file(attachment: Attachment, paths: NodePaths) -> Iterator[None]:
    path = paths.nbd_device(attachment.device, "pid")
    try:
        fd = hold(path)
    except Held as held:
        raise NbdError(f"{attachment.device} has a keeper already (pid {held.pid})") from None
    except OSError as error:
        raise NbdError(f"cannot open {path}: {error.strerror}") from None
    try:
        yield
    finally:
        os.close(fd)


def _catch_signals() -> int:
    """A descriptor from which the numbers of the signals can be read that tell this process to end."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, LEAVE_IT):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    return reader


def _leave(keeper: Keeper, netlink: NbdNetlink) -> None:
    attachment = keeper.attachment
    try:
        with nbd_device.exclusively(attachment.device):
            nbd_device.release(netlink, attachment.name, keeper.index)
            keeper.forget()
    except (NbdError, OSError) as error:
        why = f"as it is in use by {error.by}" if isinstance(error, InUse) else f"as this failed: {error}"
        log(attachment.name, f"the keeper ends; {attachment.device} stays, {why}. To keep it again: "
            f"tandemadm nbd attach {attachment.name} {attachment.device}")  # fmt: skip
    else:
        log(attachment.name, f"{attachment.device} detached")


def main() -> None:
    """Entry point of the process that `tandemadm nbd attach` starts; the attachment comes on standard input."""
    run_dir, node, ready = sys.argv[1:]
    attachment = unpack(Attachment, json.load(sys.stdin))
    sys.exit(run(attachment, NodePaths(Path(run_dir), node), int(ready)))


if __name__ == "__main__":
    main()
