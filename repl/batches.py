"""The loops of the data plane: what is done for each request of a batch, as functions over plain values.

The rooms decide once per batch what its requests have in common, and leave what is left for each of them to
these functions. A function that meets a request it does not handle stops in front of it and says how far it
came; the room takes that one the long way and may come back.

`_batches.pyx` is the same again for a C compiler, several times as fast. It is used where it could be built;
this page is the specification, and `tests/unit/test_batches.py` tells both the same stories. Whoever changes
one changes the other.
"""

from __future__ import annotations

from array import array
from collections.abc import MutableMapping, Sequence
from typing import Any, Final

from .requests import (
    AL_REF,
    BOTH_OK,
    FUA,
    IN_LOG,
    IN_SYNC,
    LOCAL,
    LOCAL_OK,
    MIRRORED,
    PEER,
    PEER_OK,
    Buffer,
    DiskOp,
    Op,
    PeerEpoch,
    PeerWrite,
    Request,
)
from .units import IO_MAX, RANGE_SHIFT
from .wire import (
    ACK,
    DATA_PACKET,
    DP_FUA,
    DP_MAY_SET_IN_SYNC,
    DP_RW_SYNC,
    DP_SEND_WRITE_ACK,
    MAGIC,
    Packet,
)

# Plain integers: to look up and compare members of an enum costs several times as much.
_READ: Final = int(Op.READ)
_WRITE: Final = int(Op.WRITE)
_DATA: Final = int(Packet.DATA)
_WRITE_ACK: Final = int(Packet.WRITE_ACK)
_RS_WRITE_ACK: Final = int(Packet.RS_WRITE_ACK)
_UNUSUAL: Final = ~(DP_SEND_WRITE_ACK | DP_FUA | DP_RW_SYNC)  # flags of a P_DATA that need the long path
_SETTLED: Final = BOTH_OK | IN_LOG | AL_REF
_SYNCING: Final = DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC  # of a write during a resync

# ------------------------------------------------------------------------------ our applications' requests


def sort_batch(
    batch: Sequence[Request], disk: list[DiskOp], busy: dict[int, Any], refs: dict[int, int],
    writes: list[Request],
) -> list[Request]:  # fmt: skip
    """Part a batch of an established volume: reads go to *disk*, writes that need not wait to *writes*.

    Those take their blocks in *busy* and a reference on their extent in *refs*. Returns the rest: what
    overlaps, is cold, crosses an extent, is too long, or is neither read nor write.
    """
    rest: list[Request] = []
    for r in batch:
        op, offset, length = r.op, r.offset, r.length
        if op == _READ:
            r.waiting = LOCAL
            disk.append(r)
            continue
        first, extent, end = offset >> 12, offset >> 22, offset + length
        n_refs = refs.get(extent)
        if n_refs is None or first in busy or op != _WRITE or (end - 1) >> 22 != extent or length > IO_MAX:
            rest.append(r)
            continue
        if end <= (first + 1) << 12:
            busy[first] = r
        else:
            blocks = range(first, (end + 4095) >> 12)
            if not busy.keys().isdisjoint(blocks):
                rest.append(r)
                continue
            busy.update(dict.fromkeys(blocks, r))
        refs[extent] = n_refs + 1
        writes.append(r)
    return rest


def pack_writes(
    out: list[Buffer], inflight: MutableMapping[int, Any], writes: Sequence[Request], volume: int, seq: int,
    block_id: int, epoch: Any, dp: int,
) -> int:  # fmt: skip
    """Frame *writes* as P_DATA into *out*: header, payload, header, payload…; returns the bytes of payload.

    The first one gets *block_id* and the sequence number after *seq*, each further one the next of both; all get
    the flags *dp*, and DP_FUA where it is asked for.
    """
    headers = bytearray(40 * len(writes))
    view, pack, at, sent = memoryview(headers), DATA_PACKET.pack_into, 0, 0
    for r in writes:
        seq += 1
        flags = dp | DP_FUA if r.flags & FUA else dp
        length = r.length
        pack(headers, at, MAGIC, volume, _DATA, 24 + length, 0, r.offset >> 9, block_id, seq & 0xFFFFFFFF, flags)
        assert r.payload is not None
        out += (view[at : at + 40], r.payload)
        inflight[block_id] = r
        r.block_id = block_id
        r.epoch = epoch
        r.waiting = LOCAL | PEER
        r.legs = MIRRORED | IN_LOG | AL_REF
        sent += length
        block_id += 1
        at += 40
    return sent


def by_kind(ops: Sequence[DiskOp]) -> tuple[list[Request], list[PeerWrite], list[DiskOp]]:
    """Part what the disk has answered: our applications' requests, the peer's writes, and everything else."""
    mine: list[Request] = []
    theirs: list[PeerWrite] = []
    others: list[DiskOp] = []
    for op in ops:
        if type(op) is Request:
            mine.append(op)
        elif type(op) is PeerWrite:
            theirs.append(op)
        else:
            others.append(op)
    return mine, theirs, others


def written_here(
    ops: Sequence[Request], at: int, volume: int, finished: list[Request]
) -> tuple[int, int, int, int]:
    """The local disk has done *ops* from *at* on; those without a leg out go to *finished*.

    Stops at an error and at another volume. Returns where, the bytes read, the bytes written, and how many
    of them were not reads.
    """
    n_read = n_written = n_writes = 0
    for i in range(at, len(ops)):
        r = ops[i]
        if r.error or r.volume != volume:
            return i, n_read, n_written, n_writes
        r.legs |= LOCAL_OK
        r.waiting &= ~LOCAL
        if r.op == _READ:
            n_read += r.length
        else:
            n_written += r.length
            n_writes += 1
        if not r.waiting:
            finished.append(r)
    return len(ops), n_read, n_written, n_writes


def take_acks(
    view: memoryview, at: int, inflight: MutableMapping[int, Any], volume: int, finished: list[Request]
) -> tuple[int, int, int]:
    """Take the run of P_WRITE_ACK and P_RS_WRITE_ACK for ordinary writes of *volume* that starts at *at*.

    Those without a leg out go to *finished*. Stops at everything else: a flush, an ack that fits nothing, a
    packet that is not complete. Returns where, for how many writes the peer's leg was still out, and the last
    sequence number (-1 when there was none).
    """
    unpack, end, n_pending, last = ACK.unpack_from, len(view) - 40, 0, -1
    while at <= end:
        magic, _, cmd, length, pad, sector, block_id, _, seq = unpack(view, at)
        if cmd not in (_WRITE_ACK, _RS_WRITE_ACK) or magic != MAGIC or length != 24 or pad:
            break
        r = inflight.get(block_id)
        if type(r) is not Request or r.offset >> 9 != sector or r.volume != volume:
            break
        del inflight[block_id]
        at += 40
        last = seq
        r.legs |= PEER_OK if cmd == _WRITE_ACK else PEER_OK | IN_SYNC
        if r.waiting & PEER:
            n_pending += 1
            r.waiting &= ~PEER
            if not r.waiting:
                finished.append(r)
    return at, n_pending, last


def of_one_owner(requests: Sequence[Request]) -> bool:
    """Whether *requests*, at least one, all go back to the same owner."""
    owner = requests[0].owner
    return all(r.owner is owner for r in requests)


def settle_writes(requests: Sequence[Request], at: int, busy: dict[int, Any], in_sync: list[Request]) -> int:
    """Let go of the blocks and payloads of finished requests from *at* on; returns where it stopped.

    Those that the peer called in sync also go to *in_sync*. Stops at a write that did not simply reach both disks,
    that has left the transfer log, or that is longer than a block. For when nothing waits for any of the blocks.
    """
    for i in range(at, len(requests)):
        r = requests[i]
        if r.op == _READ:
            continue
        legs, length = r.legs, r.length
        if legs & BOTH_OK != BOTH_OK or not legs & IN_LOG or length > 4096:
            return i
        if legs & IN_SYNC:
            in_sync.append(r)
        first, last = r.offset >> 12, (r.offset + length - 1) >> 12
        del busy[first]
        if last != first:
            del busy[last]
        r.payload = None
    return len(requests)


def leave_log(
    requests: Sequence[Any], at: int, volume: int, refs: dict[int, int], inflight: MutableMapping[int, Any]
) -> int:
    """The peer has confirmed these as stable: out of the log, and their extents lose a reference in *refs*.

    Stops at a request with the last reference on an extent or with several extents, at another volume, and
    at anything that is no write. Returns where.
    """
    for i in range(at, len(requests)):
        r = requests[i]
        if type(r) is not Request or r.volume != volume:
            return i
        if not r.waiting & LOCAL and r.legs & AL_REF:
            extent = r.offset >> 22
            if (r.offset + r.length - 1) >> 22 != extent or refs[extent] < 2:
                return i
            refs[extent] -= 1
            r.legs &= ~AL_REF
        r.legs &= ~IN_LOG
        if inflight:
            inflight.pop(r.block_id, None)  # protocols A and B have no write ack
    return len(requests)


def settle_epoch(
    requests: Sequence[Any], volume: int, ranges: bytearray, extents: dict[int, int],
    inflight: MutableMapping[int, Any],
) -> list[Any]:  # fmt: skip
    """What is left in the transfer log of writes to *volume* that both nodes have answered.

    To *ranges* each adds a number of 64 bits of this processor: its first block, shifted by `RANGE_SHIFT`, and how many
    it touches; in *extents* it adds one to its extent, on which it has a reference; it leaves *inflight*. Returns the
    requests that have to be kept as they are, in order: of another volume, not answered, on one node only, no plain
    write, of two extents.
    """
    rest, packed = [], array("Q")
    for r in requests:
        if (
            type(r) is not Request or r.volume != volume or r.op != _WRITE or r.waiting or r.payload is not None
            or r.legs & _SETTLED != _SETTLED or not 0 < r.length <= IO_MAX
            or (extent := r.offset >> 22) != (r.offset + r.length - 1) >> 22
        ):  # fmt: skip
            rest.append(r)
            continue
        first = r.offset >> 12
        packed.append(first << RANGE_SHIFT | ((r.offset + r.length + 4095) >> 12) - first)
        extents[extent] = extents.get(extent, 0) + 1
        r.legs &= ~(IN_LOG | AL_REF)
        inflight.pop(r.block_id, None)  # protocol A has no write ack
    ranges += packed.tobytes()
    return rest


# ------------------------------------------------------------------------------ the peer's writes


def receive_writes(
    view: memoryview, at: int, volume: int, size: int, epoch: PeerEpoch, disk: list[DiskOp],
    busy: dict[int, Any] | None,
) -> tuple[int, int, int, int]:  # fmt: skip
    """Take the run of complete P_DATA packets for *volume* that starts at *at*, as operations for *disk*.

    With *busy*, during a resync, each takes its blocks in it and is `tracked`. Stops in front of everything
    unusual: other packets, flags, a range beyond *size* bytes or with a block that is busy. Returns where, how many
    there were, their bytes of payload, and the last sequence number.
    """
    n, unpack, count, received, last = len(view), DATA_PACKET.unpack_from, 0, 0, 0
    unusual = _UNUSUAL if busy is None else _UNUSUAL & ~DP_MAY_SET_IN_SYNC
    while n - at >= 40:
        magic, number, cmd, length, pad, sector, block_id, seq, dp = unpack(view, at)
        length -= 24
        begin, end = at + 40, at + 40 + length
        if (
            cmd != _DATA or end > n or magic != MAGIC or number != volume or pad
            or length <= 0 or length > IO_MAX or length & 511 or (sector << 9) + length > size
            or dp & unusual
        ):  # fmt: skip
            break
        w = PeerWrite(_WRITE, number, sector, length, view[begin:end], FUA if dp & DP_FUA else 0, block_id, dp, epoch)
        if busy is not None:
            blocks = range(sector >> 3, (w.offset + length + 4095) >> 12)
            if not busy.keys().isdisjoint(blocks):
                break
            busy.update(dict.fromkeys(blocks, w))
            w.tracked = True
        disk.append(w)
        received += length
        count += 1
        last = seq
        at = end
    return at, count, received, last


def written_for_peer(
    ops: Sequence[PeerWrite], at: int, volume: int, to_ack: list[PeerWrite], busy: dict[int, Any] | None
) -> tuple[int, int, int]:
    """The local disk has done the peer's writes *ops* from *at* on: those that simply get an ack.

    With *busy*, during a resync, also those that are in sync by that and that have taken their blocks in it; they
    let go of them. Stops at every other one, and at another volume. Returns where, the bytes written, and how many
    were in sync.
    """
    written = n_in_sync = 0
    for i in range(at, len(ops)):
        w = ops[i]
        tracked = w.tracked
        if (
            w.volume != volume or (tracked and busy is None) or w.al_ref or w.error or w.epoch.dead
            or w.dp & _SYNCING != (_SYNCING if tracked else DP_SEND_WRITE_ACK)
        ):  # fmt: skip
            return i, written, n_in_sync
        if tracked:
            assert busy is not None
            for block in range(w.offset >> 12, (w.offset + w.length + 4095) >> 12):
                del busy[block]
            n_in_sync += 1
        written += w.length
        w.payload = None
        to_ack.append(w)
    return len(ops), written, n_in_sync


def pack_write_acks(writes: Sequence[PeerWrite], at: int, volume: int, seq: int) -> tuple[int, bytes | bytearray]:
    """P_WRITE_ACK for each of *writes* from *at* on, up to one of another volume; (where that is, the packets).

    P_RS_WRITE_ACK for those that may count as in sync. The first one gets the sequence number after *seq*.
    """
    end = at
    while end < len(writes) and writes[end].volume == volume:
        end += 1
    buffer = bytearray(40 * (end - at))
    pack, to = ACK.pack_into, 0
    for w in writes[at:end]:
        seq = (seq + 1) & 0xFFFFFFFF
        w.epoch.active -= 1
        cmd = _RS_WRITE_ACK if w.dp & DP_MAY_SET_IN_SYNC else _WRITE_ACK
        pack(buffer, to, MAGIC, volume, cmd, 24, 0, w.sector, w.block_id, w.length, seq)
        to += 40
    return end, buffer
