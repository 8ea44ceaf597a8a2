"""The records of the data plane: one object per operation, from the first hop to the last.

A `Request` is made by a front end, carried through the machine and, as it is, handed to the disk edge:
it *is* the disk operation. The same holds for what the peer asks of us (`PeerWrite`) and for
metadata (`MetaOp`). Nothing here decides anything; `split` is the one place that knows the size limits
of a single request.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final, Protocol

from .units import DISCARD_MAX, IO_MAX

Buffer = bytes | bytearray | memoryview


class Op(IntEnum):
    READ = 0
    WRITE = 1
    FLUSH = 2
    TRIM = 3  # content afterwards: zeroes, so that both replicas stay identical
    ZEROES = 4


# Flags of an operation, plain integers because the data plane tests them per request.
FUA: Final = 1  # durable before it is answered
PREFLUSH: Final = 2  # everything written earlier is durable before this write starts
MAY_UNMAP: Final = 4  # ZEROES may punch a hole
IF_HOLE: Final = 8  # a range without anything but holes: a READ brings no payload, ZEROES find nothing to do

# Areas of a volume's storage.
DATA: Final = 0
META: Final = 1


class DiskOp:
    """One operation on a volume's local storage.

    ``offset`` and ``length`` are bytes, absolute on the device of the ``area`` (DATA: the data device,
    META: the device that holds the metadata; with internal metadata both are one device). ``payload``
    is what a WRITE writes, and where the edge puts a READ's bytes. ``error`` is an errno, 0 is success.
    The edge answers each operation exactly once, through `Engine.disk_done`.
    """

    __slots__ = ("area", "error", "flags", "length", "offset", "op", "payload", "volume")

    def __init__(
        self, op: int, volume: int, offset: int, length: int, payload: Buffer | None = None, flags: int = 0,
        area: int = DATA,
    ) -> None:  # fmt: skip
        self.op = op
        self.volume = volume
        self.area = area
        self.offset = offset
        self.length = length
        self.payload = payload
        self.flags = flags
        self.error = 0

    def __repr__(self) -> str:
        what = f"{Op(self.op).name} {'META' if self.area else 'DATA'} vol {self.volume}"
        return f"<{type(self).__name__} {what} {self.offset}+{self.length} err {self.error}>"


class Owner(Protocol):
    """Whoever made requests: gets each of them back exactly once."""

    def finished(self, batch: list[Request]) -> None: ...


class Request(DiskOp):
    """One client request, from parse to reply. Made by the front end, seen by every layer.

    ``owner`` and ``cookie`` belong to the front end. The machine uses ``waiting`` (bit set of the legs
    still out), ``block_id`` (its key on the wire), ``epoch`` and ``legs`` (what succeeded so far). A READ's bytes
    are in ``payload`` when it comes back with ``error`` 0.
    """

    __slots__ = ("block_id", "cookie", "epoch", "legs", "owner", "waiting")

    def __init__(
        self, owner: Owner, cookie: Any, op: int, volume: int, offset: int, length: int,
        payload: Buffer | None = None, flags: int = 0,
    ) -> None:  # fmt: skip
        self.op = op
        self.volume = volume
        self.area = DATA
        self.offset = offset
        self.length = length
        self.payload = payload
        self.flags = flags
        self.error = 0
        self.owner = owner
        self.cookie = cookie
        self.waiting = 0
        self.block_id = 0
        self.epoch: Any = None
        self.legs = 0


# Bits of Request.waiting.
LOCAL: Final = 1
PEER: Final = 2
# Bits of Request.legs.
LOCAL_OK: Final = 1
PEER_OK: Final = 2
MIRRORED: Final = 4  # the peer was sent the data
IN_LOG: Final = 8  # in the transfer log: its barrier is not acknowledged
AL_REF: Final = 16  # holds references on its activity-log extents
IN_SYNC: Final = 32  # the peer answered P_RS_WRITE_ACK: bits may be cleared
POSTPONED: Final = 64  # the other Primary's write comes first; this one is sent again after it
BOTH_OK: Final = LOCAL_OK | PEER_OK


class PeerEpoch:
    """What the peer sent between two barriers."""

    __slots__ = ("active", "barrier", "dead", "size")

    def __init__(self) -> None:
        self.barrier: int | None = None  # known once the epoch is complete
        self.size = 0
        self.active = 0  # not yet answered
        self.dead = False  # its connection is gone: answer nothing


class PeerWrite(DiskOp):
    """One write of the peer: the disk operation and what its ack needs."""

    __slots__ = ("al_ref", "block_id", "dp", "epoch", "sector", "seq", "tracked")
    seq: int  # only of writes that came the long way

    def __init__(
        self, op: int, volume: int, sector: int, length: int, payload: Buffer | None, flags: int,
        block_id: int, dp: int, epoch: PeerEpoch,
    ) -> None:  # fmt: skip
        self.op = op
        self.volume = volume
        self.area = DATA
        self.offset = sector << 9
        self.length = length
        self.payload = payload
        self.flags = flags
        self.error = 0
        self.sector = sector
        self.block_id = block_id
        self.dp = dp
        self.epoch = epoch
        self.tracked = False
        self.al_ref = False


def split(op: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """The (offset, length) pieces in which one client request enters the machine.

    Reads and writes are cut at multiples of 1 MiB of the device, trims and zeroes at multiples of
    128 MiB: the largest P_DATA and P_TRIM of protocol 100+. A flush is one piece of no length.
    """
    if op == Op.FLUSH:
        yield 0, 0
        return
    limit = IO_MAX if op in (Op.READ, Op.WRITE) else DISCARD_MAX
    end = offset + length
    while offset < end:
        step = min(limit - offset % limit, end - offset)
        yield offset, step
        offset += step
