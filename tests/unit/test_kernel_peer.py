"""What we do differently because the peer may be kernel DRBD 8.4.11; each was found with a real one."""

from __future__ import annotations

import pytest
from tandem.repl.digests import DIGESTS
from tandem.repl.events import DeviceGrown, ProbeSize
from tandem.repl.peer import SKIP_INITIAL_SYNC
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.wire import (
    ID_SYNCER,
    Packet,
    QueueLimits,
    Sizes,
    Uuids,
    pack_ack,
    pack_block_req,
    pack_data,
    packet,
    unpack_block_desc,
    unpack_block_req,
)

from tests.scenarios.lone import Lone

P = Packet
FRESH = (4, 0, 0, 0)


def checked(ours: bool) -> Lone:
    lone = Lone(net={"data_integrity_alg": "crc32c"})
    return lone.ready(ours=ours)


@pytest.mark.parametrize("refused", [False, True])
def test_a_checked_flush_is_a_barrier_and_a_read(refused: bool) -> None:
    """An empty P_DATA with data-integrity-alg takes a kernel down."""
    lone = checked(ours=False)
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.forget()
    flush = lone.submit(Op.FLUSH)
    lone.settle()
    kinds = lone.sent(P.DATA, P.BARRIER, P.DATA_REQUEST)
    assert P.DATA not in kinds and kinds[-1] == P.DATA_REQUEST
    assert flush not in lone.done
    sector, block_id, size = unpack_block_req(lone.payloads(P.DATA_REQUEST)[0])
    if refused:
        lone.meta(pack_ack(P.NEG_DREPLY, 0, sector, block_id, size, 1))
    else:
        block = bytes(size)
        check = DIGESTS["crc32c"](block)
        lone.data(pack_data(P.DATA_REPLY, 0, sector, block_id, 0, 0, size, check) + block)
    assert flush in lone.done and flush.error == 0


@pytest.mark.parametrize("ours", [True, False])
def test_only_towards_a_kernel_a_flush_closes_the_epoch_before_it(ours: bool) -> None:
    lone = Lone().ready(ours=ours)
    r = lone.submit(Op.WRITE)
    lone.settle()
    lone.meta(lone.ack(r))
    lone.submit(Op.FLUSH)
    assert lone.sent(P.DATA, P.BARRIER) == ([P.DATA, P.DATA] if ours else [P.DATA, P.BARRIER, P.DATA])


def test_our_own_kind_gets_the_empty_packet_all_the_same() -> None:
    lone = checked(ours=True)
    lone.submit(Op.FLUSH)
    assert lone.sent(P.DATA, P.DATA_REQUEST) == [P.DATA]


def test_a_checked_flush_ends_with_the_connection() -> None:
    lone = checked(ours=False)
    flush = lone.submit(Op.FLUSH)
    lone.settle()
    assert flush not in lone.done
    lone.data(packet(P.AUTH_RESPONSE, bytes(20)))  # nonsense: the connection is dropped
    lone.settle()
    assert flush in lone.done and flush.error == 0


def test_a_skipped_first_sync_is_answered_with_our_uuids() -> None:
    """The commanding kernel would otherwise end a later full sync with the 4 of the handshake as its current UUID."""
    lone = Lone()
    lone.attach(fresh=True)
    lone.connect(State(Role.SECONDARY, Role.UNKNOWN, ConnState.WF_CONNECTION, DiskState.INCONSISTENT), uuids=FRESH)
    lone.settle()
    lone.forget()
    lone.data(Uuids(0xABCDEF0123456788, 4, 0, 0, 0, SKIP_INITIAL_SYNC).pack(0))
    lone.settle()
    assert [Uuids.unpack(memoryview(p)).current for p in lone.payloads(P.UUIDS)] == [0xABCDEF0123456788]


def sizes(lone: Lone, u_size: int, c_size: int) -> bytes:
    limits = QueueLimits(4096, 512, 0, 4096, 0, 1)
    return Sizes(lone.layout.usable // 512, u_size, c_size, 1 << 20, 0, 0, limits).pack(0)


def test_the_peers_resize_decides_for_both() -> None:
    lone = Lone(disk={"size": 65536}).ready()
    assert lone.vol.size == 32 << 20
    lone.data(sizes(lone, 98304, 0))
    lone.settle()
    assert lone.vol.size == 48 << 20
    answer = Sizes.unpack(memoryview(lone.payloads(P.SIZES)[-1]), True)
    assert (answer.u_size, answer.c_size) == (98304, 98304)


def test_our_resize_starts_the_resync_when_the_peer_has_followed() -> None:
    lone = Lone(disk={"size": 65536}).ready()
    lone.forget()
    lone.command("resize", 0, size=98304)
    probe = lone.of(ProbeSize)[-1]
    size = lone.layout.superblock + 4096
    lone.handle(DeviceGrown(probe.ticket, 0, size, size))
    lone.settle()
    assert lone.vol.size == 48 << 20 and lone.vol.state.conn == ConnState.CONNECTED
    lone.data(sizes(lone, 98304, 98304))
    lone.settle()
    assert str(lone.vol.state.conn) == "SyncSource" and P.SYNC_UUID in lone.sent()


def test_a_thin_request_for_zeroes_is_answered_without_them() -> None:
    lone = Lone().ready()
    lone.data(pack_block_req(P.RS_THIN_REQ, 0, 128, ID_SYNCER, 65536))
    lone.data(pack_block_req(P.RS_DATA_REQUEST, 0, 0, ID_SYNCER, 4096))
    lone.settle()
    assert lone.sent(P.RS_DEALLOCATED, P.RS_DATA_REPLY) == [P.RS_DEALLOCATED, P.RS_DATA_REPLY]
    assert unpack_block_desc(memoryview(lone.payloads(P.RS_DEALLOCATED)[0])) == (128, 65536)
