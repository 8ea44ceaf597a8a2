"""The loops of the data plane and their compiled twin are told the same stories and must tell them back alike.

Without a compiler there is no twin, and the Python version is compared with itself.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.repl import batches, compiled
from tandem.repl.packets import Packet
from tandem.repl.requests import (
    AL_REF,
    BOTH_OK,
    FUA,
    IN_LOG,
    IN_SYNC,
    LOCAL,
    LOCAL_OK,
    MIRRORED,
    PEER,
    DiskOp,
    Op,
    PeerEpoch,
    PeerWrite,
    Request,
)
from tandem.repl.wire import DP_FUA, DP_MAY_SET_IN_SYNC, DP_SEND_WRITE_ACK, MAGIC, pack_ack, pack_data

TWINS = (batches, compiled.batches)
SIZE = 8 << 20
P = Packet


def told(tell: Callable[[ModuleType], object]) -> None:
    """Both twins say the same about the same story."""
    assert tell(TWINS[0]) == tell(TWINS[1])


class Owner:
    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("nobody hands requests back here")


OWNER = Owner()

LEGS = (0, BOTH_OK | MIRRORED | IN_LOG | AL_REF, IN_LOG | MIRRORED, LOCAL_OK | IN_LOG, BOTH_OK | IN_SYNC,
        BOTH_OK | IN_LOG | IN_SYNC)  # fmt: skip
offsets = st.sampled_from((0, 512, 3584, 4096, 8192, (4 << 20) - 4096, (4 << 20) - 512, 4 << 20, 6 << 20))
lengths = st.sampled_from((512, 1024, 4096, 8192, 65536, 1 << 20, (1 << 20) + 512))
requests = st.lists(
    st.tuples(
        st.sampled_from((0, 1, 1, 1, 2, 3)), st.sampled_from((0, 0, 0, 1)), offsets, lengths,
        st.sampled_from((0, FUA)), st.sampled_from(LEGS), st.sampled_from((0, LOCAL, PEER, LOCAL | PEER)),
        st.sampled_from((0, 0, 0, 5)),
    ),
    max_size=7,
)  # fmt: skip


def made(story: list[tuple[int, ...]]) -> list[Request]:
    found = []
    for i, (op, volume, offset, length, flags, legs, waiting, error) in enumerate(story):
        r = Request(OWNER, i, op, volume, offset, length, bytes(1) * length if op == 1 else None, flags)
        r.legs, r.waiting, r.error, r.block_id = legs, waiting, error, 100 + i
        found.append(r)
    return found


def image(rs: list[Any]) -> list[tuple[object, ...]]:
    return [(r.cookie, r.legs, r.waiting, r.block_id, r.epoch, r.error, r.payload is None) for r in rs]


def names(rs: Any) -> list[object]:
    return [r.cookie for r in rs]


@given(requests, st.sets(st.integers(0, 3)), st.sampled_from((0, 2)))
@settings(deadline=None)
def test_sort_batch(story: list[tuple[int, ...]], hot: set[int], busy_block: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs, disk, writes = made(story), list[Any](), list[Request]()
        busy: dict[int, Any] = {busy_block: Request(OWNER, "other", 1, 0, 0, 1)}
        refs = dict.fromkeys(hot, 1)
        rest = twin.sort_batch(rs, disk, busy, refs, writes)
        return names(rest), names(disk), names(writes), {b: r.cookie for b, r in busy.items()}, refs, image(rs)

    told(tell)


FLAGS = (DP_SEND_WRITE_ACK, DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC)


@given(requests, st.sampled_from((0, 7, 0xFFFFFFFE, 1 << 33)), st.sampled_from((1, 1 << 40)), st.sampled_from(FLAGS))
@settings(deadline=None)
def test_pack_writes(story: list[tuple[int, ...]], seq: int, block_id: int, dp: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs = [r for r in made(story) if r.op == Op.WRITE]
        out, inflight = list[Any](), dict[int, Any]()
        sent = twin.pack_writes(out, inflight, rs, 3, seq, block_id, "epoch", dp)
        return sent, b"".join(map(bytes, out)), {i: r.cookie for i, r in inflight.items()}, image(rs)

    told(tell)


@pytest.mark.parametrize("offset", [(1 << digits * 15) - 512 for digits in range(1, 5)] + [1 << 30, 1 << 60])
def test_numbers_of_any_size(offset: int) -> None:
    def tell(twin: ModuleType) -> object:
        r = Request(OWNER, 0, 1, 0, offset, 512, bytes(512), 0)
        out: list[Any] = []
        twin.pack_writes(out, {}, [r], 0, 0, 1, None, DP_SEND_WRITE_ACK)
        return bytes(out[0])

    told(tell)


@given(st.lists(st.sampled_from((Request, PeerWrite, DiskOp, "Callback")), max_size=5))
@settings(deadline=None)
def test_by_kind(story: list[Any]) -> None:
    class Callback(DiskOp):
        __slots__ = ()

    ops: list[DiskOp] = []
    for kind in story:
        if kind is Request:
            ops.append(Request(OWNER, 0, 1, 0, 0, 512))
        elif kind is PeerWrite:
            ops.append(PeerWrite(1, 0, 0, 512, b"", 0, 1, 0, PeerEpoch()))
        else:
            ops.append((DiskOp if kind is DiskOp else Callback)(1, 0, 0, 512))
    told(lambda twin: twin.by_kind(ops))
    mine, theirs, others = batches.by_kind(ops)
    assert [mine, theirs, others] == [
        [op for op in ops if isinstance(op, Request)], [op for op in ops if isinstance(op, PeerWrite)],
        [op for op in ops if not isinstance(op, Request | PeerWrite)],
    ]  # fmt: skip


@given(st.lists(st.booleans(), min_size=1, max_size=5))
def test_of_one_owner(story: list[bool]) -> None:
    owners = OWNER, Owner()
    rs = [Request(owners[which], 0, 1, 0, 0, 512) for which in story]
    told(lambda twin: twin.of_one_owner(rs))
    assert batches.of_one_owner(rs) == (len(set(story)) == 1)


@given(requests, st.integers(0, 3))
@settings(deadline=None)
def test_written_here(story: list[tuple[int, ...]], at: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs, finished = made(story), list[Request]()
        return twin.written_here(rs, min(at, len(rs)), 0, finished), names(finished), image(rs)

    told(tell)


@given(
    requests, st.integers(0, 40), st.sampled_from((None, P.RS_WRITE_ACK, P.NEG_ACK, P.PING)), st.booleans(),
    st.booleans(),
)  # fmt: skip
@settings(deadline=None)
def test_take_acks(
    story: list[tuple[int, ...]], cut: int, other: Packet | None, strange: bool, syncing: bool
) -> None:
    def tell(twin: ModuleType) -> object:
        rs, finished = made(story), list[Request]()
        kind = P.RS_WRITE_ACK if syncing else P.WRITE_ACK
        acks = [pack_ack(kind, r.volume, r.offset >> 9, r.block_id, r.length, 5 + r.cookie) for r in rs]
        if other is not None:
            acks.insert(len(acks) // 2, pack_ack(other, 0, 0, 0, 0, 0))
        if strange:
            acks.append(pack_ack(P.WRITE_ACK, 0, 1, 1 << 50, 512, 9))
        stream = b"x" + b"".join(acks)
        inflight = {r.block_id: r for r in rs}
        said = twin.take_acks(memoryview(stream[: len(stream) - cut]), 1, inflight, 0, finished)
        return said, names(finished), sorted(inflight), image(rs)

    told(tell)


@given(requests, st.integers(0, 3))
@settings(deadline=None)
def test_settle_writes(story: list[tuple[int, ...]], at: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs = made(story)
        busy: dict[int, Any] = {}
        for i, r in enumerate(rs):  # each in a place of its own, as the machine has them
            r.offset += i * (16 << 20)
            busy.update(dict.fromkeys(range(r.offset >> 12, (r.offset + r.length + 4095) >> 12), r))
        in_sync = list[Request]()
        return twin.settle_writes(rs, min(at, len(rs)), busy, in_sync), names(in_sync), sorted(busy), image(rs)

    told(tell)


@given(requests, st.booleans(), st.sampled_from((1, 2, 50)))
@settings(deadline=None)
def test_leave_log(story: list[tuple[int, ...]], acked: bool, n_refs: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs: list[Any] = made(story)
        refs = dict.fromkeys(range(4), n_refs)
        inflight = {} if acked else {r.block_id: r for r in rs}
        return twin.leave_log([*rs, "no request"], 0, 0, refs, inflight), refs, sorted(inflight), image(rs)

    told(tell)


@given(requests, st.sampled_from((0, 1)), st.integers(0, 255))
@settings(deadline=None)
def test_settle_epoch(story: list[tuple[int, ...]], volume: int, settled: int) -> None:
    def tell(twin: ModuleType) -> object:
        rs: list[Any] = made(story)
        for i, r in enumerate(rs):  # most of them as `settle_writes` leaves them
            if settled >> i & 1:
                r.payload, r.waiting, r.legs = None, 0, BOTH_OK | MIRRORED | IN_LOG | AL_REF
        ranges, extents = bytearray(b"8 before"), {1: 5}
        inflight = {r.block_id: r for r in rs[::2]}
        rest = twin.settle_epoch([*rs, "no request"], volume, ranges, extents, inflight)
        found = [r if isinstance(r, str) else r.cookie for r in rest], bytes(ranges), extents
        return *found, sorted(inflight), image(rs)

    told(tell)


def test_settled_writes_are_told_by_their_blocks() -> None:
    rs = made([(1, 0, 512, 4096, 0, 0, 0, 0), (1, 0, 3 << 20, 1 << 20, 0, 0, 0, 0), (1, 0, 8192, 4096, 0, 0, PEER, 0)])
    for r in rs:
        r.payload, r.legs = None, BOTH_OK | MIRRORED | IN_LOG | AL_REF
    ranges, extents = bytearray(), dict[int, int]()
    inflight = {r.block_id: r for r in rs}
    assert TWINS[1].settle_epoch(rs, 0, ranges, extents, inflight) == rs[2:] == list(inflight.values())
    assert struct.unpack("=2Q", ranges) == (0 << 9 | 2, 768 << 9 | 256) and extents == {0: 2}


packets = st.lists(
    st.tuples(
        st.sampled_from((P.DATA, P.DATA, P.DATA, P.BARRIER)), st.sampled_from((0, 0, 0, 1)), offsets,
        st.sampled_from((0, 512, 513, 4096, 65536, 1 << 20, (1 << 20) + 512)),
        st.sampled_from((*FLAGS, DP_SEND_WRITE_ACK | DP_FUA, DP_MAY_SET_IN_SYNC)),
    ),
    max_size=5,
)  # fmt: skip


@given(
    packets, st.integers(0, 600), st.sampled_from((MAGIC, 1)), st.sampled_from((SIZE, 4 << 20, 1 << 50)),
    st.sampled_from((None, None, {}, {0: "other"}, {2: "other"})),
)  # fmt: skip
@settings(deadline=None)
def test_receive_writes(
    story: list[tuple[Any, ...]], cut: int, magic: int, size: int, held: dict[int, Any] | None
) -> None:
    stream = bytearray(b"xx")
    for i, (cmd, volume, offset, length, flags) in enumerate(story):
        if cmd == P.BARRIER:
            stream += struct.pack(">IHHIIII", MAGIC, volume, P.BARRIER, 8, 0, i, 0)
        else:
            stream += pack_data(P.DATA, volume, offset >> 9, (1 << 63) + i, i, flags, length, b"") + bytes([i]) * length
    if len(stream) > 60:
        struct.pack_into(">I", stream, 2, magic)
    view = memoryview(bytes(stream[: max(len(stream) - cut, 2)]))

    def tell(twin: ModuleType) -> object:
        epoch, disk = PeerEpoch(), list[Any]()
        busy = None if held is None else dict(held)
        said = twin.receive_writes(view, 2, 0, size, epoch, disk, busy)
        assert all(type(w) is PeerWrite and w.epoch is epoch for w in disk)
        holders = {block: getattr(w, "block_id", w) for block, w in (busy or {}).items()}
        return said, holders, [
            (w.op, w.volume, w.area, w.offset, w.length, bytes(w.payload), w.flags, w.error, w.sector, w.block_id, w.dp,
             w.tracked, w.al_ref)
            for w in disk
        ]  # fmt: skip

    told(tell)


def test_a_sector_beyond_every_device_is_left_to_the_long_path() -> None:
    far = pack_data(P.DATA, 0, (1 << 64) - 1, 1, 1, DP_SEND_WRITE_ACK, 512, b"") + bytes(512)
    for twin in TWINS:
        assert twin.receive_writes(memoryview(far), 0, 0, SIZE, PeerEpoch(), [], None) == (0, 0, 0, 0)


peer_writes = st.lists(
    st.tuples(
        st.sampled_from((0, 0, 0, 1)), offsets, lengths, st.sampled_from((0, 0, 0, 5)), st.integers(0, 1),
        st.sampled_from((DP_SEND_WRITE_ACK, DP_SEND_WRITE_ACK, 0, DP_SEND_WRITE_ACK | DP_MAY_SET_IN_SYNC)),
        st.sampled_from((False, False, False, True)), st.sampled_from((False, False, True)),
    ),
    max_size=6,
)  # fmt: skip


@given(peer_writes, st.integers(0, 2), st.sampled_from((0, 0xFFFFFFFD)), st.booleans(), st.booleans())
@settings(deadline=None)
def test_written_for_peer_and_pack_write_acks(
    story: list[Any], at: int, seq: int, dead: bool, syncing: bool
) -> None:
    def tell(twin: ModuleType) -> object:
        epochs = PeerEpoch(), PeerEpoch()
        epochs[1].dead = dead
        ops = []
        for i, (volume, offset, length, error, which, dp, tracked, al_ref) in enumerate(story):
            w = PeerWrite(1, volume, offset >> 9, length, b"", 0, (1 << 63) + i, dp, epochs[which])
            w.error, w.tracked, w.al_ref = error, tracked, al_ref
            epochs[which].active += 1
            ops.append(w)
        to_ack: list[PeerWrite] = []
        busy: dict[int, Any] = {}
        for i, w in enumerate(ops):  # each in a place of its own, as the machine has them
            w.offset += i * (16 << 20)
            if w.tracked:
                busy.update(dict.fromkeys(range(w.offset >> 12, (w.offset + w.length + 4095) >> 12), w))
        said = twin.written_for_peer(ops, min(at, len(ops)), 0, to_ack, busy if syncing else None)
        end, buffer = twin.pack_write_acks(ops, min(at, len(ops)), 0, seq)
        left = [w.payload is None for w in ops]
        return said, sorted(busy), [w.block_id for w in to_ack], end, bytes(buffer), [e.active for e in epochs], left

    told(tell)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sort_batch", (["x"], [], {}, {}, [])), ("written_here", (["x"], 0, 0, [])),
        ("settle_writes", ([object()], 0, {}, [])), ("pack_writes", ([], {}, ["x"], 0, 0, 0, None, 0)),
        ("pack_write_acks", ([object()], 0, 0, 0)), ("of_one_owner", ([object()],)),
    ],
)  # fmt: skip
def test_nothing_else_is_taken_for_a_request(name: str, arguments: tuple[Any, ...]) -> None:
    for twin in TWINS:
        with pytest.raises((TypeError, AttributeError)):
            getattr(twin, name)(*arguments)
