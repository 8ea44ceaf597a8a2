"""One connection to the peer, from two established sockets to the ordinary exchange of packets.

Decides what the handshake demands (versions, features, authentication, equal parameters), in which order
our parameters go out, and which part of the machine gets a received packet. Where the connection ends and
why is `engine.drop` (try again) or `engine.stand_alone` (do not).

Source: drbd_receiver.c, conn_connect, drbd_do_features, drbd_do_auth, receive_protocol, drbdd.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Final

from . import settings
from .compiled import batches
from .digests import digest, hmac_response, hmac_size
from .epoch import PeerFlush
from .errors import PeerProtocolError
from .requests import Request
from .states import ConnState, DiskState
from .units import DISCARD_MAX, IO_MAX
from .verify import Stretch
from .volume import Volume
from .wire import (
    ACK,
    DP_FLUSH,
    HEADER,
    HEADER80,
    ID_SYNCER,
    Feature,
    Features,
    Packet,
    Protocol,
    SyncParam,
    check_data,
    check_meta,
    packet,
    parse_header,
    parse_header80,
    unpack_ack,
    unpack_barrier,
    unpack_barrier_ack,
    unpack_block_desc,
    unpack_block_req,
    unpack_data,
    unpack_i32,
    unpack_state_change,
    unpack_trim,
    unpack_u32,
    unpack_u64,
)

if TYPE_CHECKING:
    from .engine import Engine

PROTOCOL_MIN: Final = 100
PROTOCOL_MAX: Final = 101
CHALLENGE_LEN: Final = 64
# In the reserved bytes of the features packet, which DRBD ignores: "my flushes come as packets".
OUR_MARK: Final = b"Tandem\0\1"
MARK_AT: Final = HEADER80 + 16
MAX_RATE: Final = 4194304  # KiB/s; what "unlimited" is on the wire
# Plain integers: to look up a member of an enum costs as much as a call.
_DATA: Final = int(Packet.DATA)
_VERIFY: Final = (int(Packet.OV_REQUEST), int(Packet.OV_REPLY))
_OV_RESULT: Final = int(Packet.OV_RESULT)

# Parameter packets of a volume this node does not have are read and ignored.
PARAMETERS: Final = frozenset((Packet.SYNC_PARAM89, Packet.SIZES, Packet.UUIDS, Packet.STATE))


class Stage(Enum):
    DOWN = "no sockets"
    FEATURES = "waiting for the peer's features"
    CHALLENGE = "waiting for the peer's challenge"
    RESPONSE = "waiting for the peer's answer to our challenge"
    OPEN = "parameters sent; everything is dispatched"


_DOWN, _OPEN = Stage.DOWN, Stage.OPEN  # looked at for each packet


class Link:
    """The connection: its handshake, what was agreed, and the dispatch of packets on both sockets."""

    def __init__(self, engine: Engine) -> None:
        self.e = engine
        self.ticket = 0  # of the attempt or link that counts; answers with another one are stale
        self.stage = _DOWN
        self.resolver = False
        self.apv = PROTOCOL_MAX
        self.features = Feature(0)
        self.peer_sends_flushes = False
        self.peer_dry_run = False
        self.protocol_seen = False
        self.deadline: float | None = None  # the handshake must be through by then
        self.challenge = b""
        self.meta_backlog = b""
        # what `connect` was asked for, once
        self.discard_my_data = False
        self.tentative = False
        self._data = self._data_table()

    # ------------------------------------------------------------------------------ coming up

    def up(self, resolver: bool) -> None:
        """Both sockets stand: introduce ourselves."""
        net = self.e.config.net
        self.resolver = resolver
        self.stage = Stage.FEATURES
        self.protocol_seen = False
        self.peer_dry_run = False
        self.meta_backlog = b""
        self.deadline = self.e.now + max(4 * net.ping_timeout / 10, 2.0)
        flags = Feature.TRIM | Feature.THIN_RESYNC | Feature.WSAME
        if not net.data_integrity_alg:
            # A kernel expects a digest with P_ZEROES that a kernel does not send: do without both.
            flags |= Feature.WZEROES
        offer = bytearray(Features(PROTOCOL_MIN, PROTOCOL_MAX, flags).pack())
        offer[MARK_AT : MARK_AT + len(OUR_MARK)] = OUR_MARK
        self._offered = flags
        self.e.out.data.append(bytes(offer))

    @property
    def alive(self) -> bool:
        return self.stage is not _DOWN

    def down(self) -> None:
        self.stage = _DOWN
        self.deadline = None
        self.meta_backlog = b""

    def _features(self, payload: memoryview) -> None:
        theirs = Features.unpack(payload)
        if theirs.protocol_min > PROTOCOL_MAX or theirs.protocol_max < PROTOCOL_MIN:
            self.e.stand_alone(
                f"the peer speaks protocol {theirs.protocol_min} to {theirs.protocol_max}, "
                f"this node {PROTOCOL_MIN} to {PROTOCOL_MAX}: upgrade the older one"
            )
            return
        self.apv = min(PROTOCOL_MAX, theirs.protocol_max)
        self.features = Feature(theirs.flags & self._offered)
        self.peer_sends_flushes = bytes(payload[16 : 16 + len(OUR_MARK)]) == OUR_MARK
        self.e.note(None, f"Handshake successful: Agreed network protocol version {self.apv}")
        if self.e.config.net.cram_hmac_alg:
            self.challenge = self.e.random_bytes(CHALLENGE_LEN)
            self.e.out.data.append(packet(Packet.AUTH_CHALLENGE, self.challenge))
            self.stage = Stage.CHALLENGE
        else:
            self._send_parameters()

    def _challenged(self, payload: memoryview) -> None:
        net = self.e.config.net
        if not CHALLENGE_LEN <= len(payload) <= 2 * CHALLENGE_LEN:
            self.e.stand_alone(f"the peer's challenge has {len(payload)} bytes, expected 64 to 128")
        elif bytes(payload[:CHALLENGE_LEN]) == self.challenge:
            self.e.stand_alone("the peer sent our own challenge back: is the address this node's own?")
        else:
            response = hmac_response(net.cram_hmac_alg, net.shared_secret, payload)
            self.e.out.data.append(packet(Packet.AUTH_RESPONSE, response))
            self.stage = Stage.RESPONSE

    def _answered(self, payload: memoryview) -> None:
        net = self.e.config.net
        expected = hmac_response(net.cram_hmac_alg, net.shared_secret, self.challenge)
        if hmac.compare_digest(expected, bytes(payload)):
            self.e.note(None, f"Peer authenticated using {len(expected)} bytes HMAC")
            self._send_parameters()
        else:
            self.e.stand_alone(
                "authentication of the peer failed: shared-secret or cram-hmac-alg differs between the nodes"
            )

    def _send_parameters(self) -> None:
        """P_PROTOCOL, then each volume's parameters; the state still says WFConnection."""
        e, net = self.e, self.e.config.net
        conn_flags = (1 if self.discard_my_data else 0) | (2 if self.tentative else 0)
        e.out.data.append(settings.said(net, conn_flags).pack())
        e.peer_integrity = e.integrity
        for number in sorted(e.volumes):
            vol = e.volumes[number]
            vol.peer_uuids = None
            vol.seq = vol.peer_seq = 0
            vol.discard_my_data = self.discard_my_data
            self.send_sync_param(vol)
            e.peer.send_sizes(vol, 0)
            if vol.state.disk >= DiskState.NEGOTIATING:
                e.peer.send_uuids(vol)
            e.peer.send_state(vol)
        self.stage = _OPEN
        self.deadline = e.now + max(4 * net.ping_timeout / 10, 2.0) + net.ping_int
        self.discard_my_data = self.tentative = False
        e.change_conn(ConnState.WF_REPORT_PARAMS)
        e.liveness.started()
        backlog, self.meta_backlog = self.meta_backlog, b""
        if backlog:
            used = self.receive_meta(memoryview(backlog))
            self.meta_backlog = backlog[used:]

    def send_sync_param(self, vol: Volume) -> None:
        net, disk = self.e.config.net, vol.config.disk_options
        self.e.out.data.append(
            SyncParam(
                disk.resync_rate, net.verify_alg, net.csums_alg, disk.c_plan_ahead, disk.c_delay_target,
                disk.c_fill_target or 100, disk.c_max_rate or MAX_RATE,
            ).pack(vol.number)
        )  # fmt: skip

    def _protocol(self, vol: Volume | None, payload: memoryview) -> None:
        """P_PROTOCOL: any difference that matters ends in StandAlone, here and on the peer."""
        theirs = Protocol.unpack(payload)
        fault = settings.difference(self.e.config.net, theirs)
        if fault:
            self.e.stand_alone(fault)
            return
        if theirs.conn_flags & 1 and any(v.discard_my_data for v in self.e.volumes.values()):
            self.e.stand_alone("both nodes were told to discard their data: connect one of them without it")
            return
        self.peer_dry_run = bool(theirs.conn_flags & 2)
        self.protocol_seen = True

    def tell_settings(self) -> None:
        """Our settings have changed under a live connection: what follows in the stream is sent by the new ones."""
        if self.stage is _OPEN and self.apv >= settings.UPDATE_APV:
            self.e.out.data.append(settings.said(self.e.config.net).pack(update=True))

    def _protocol_update(self, vol: Volume | None, payload: memoryview) -> None:
        theirs = Protocol.unpack(payload)
        algorithm = digest(theirs.integrity_alg)
        if theirs.integrity_alg and algorithm is None:
            raise PeerProtocolError(f"data-integrity-alg {theirs.integrity_alg} of the peer is unknown here")
        known = self.e.peer_integrity
        if (algorithm.name if algorithm else "") != (known.name if known else ""):
            self.e.note(None, f"peer data-integrity-alg: {theirs.integrity_alg or '(none)'}")
        self.e.peer_integrity = algorithm
        self.e.adopt(settings.adopted(self.e.config.net, theirs))

    @property
    def zeroes_fit(self) -> bool:
        """May P_ZEROES be sent? A kernel expects a digest with it that a kernel does not send."""
        return bool(self.features & Feature.WZEROES) and (self.peer_sends_flushes or not self.e.integrity)

    def _sync_param(self, vol: Volume, payload: memoryview) -> None:
        net, theirs = self.e.config.net, SyncParam.unpack(payload)
        if vol.state.conn != ConnState.WF_REPORT_PARAMS:
            return  # rates and algorithms of a running connection stay ours until reconfigured here
        for option, own, peer in (
            ("verify-alg", net.verify_alg, theirs.verify_alg),
            ("csums-alg", net.csums_alg, theirs.csums_alg),
        ):
            if own != peer:
                self.e.stand_alone(f"incompatible {option}: {own or 'none'} here, {peer or 'none'} on the peer")
                return

    # ------------------------------------------------------------------------------ data socket

    def needed(self, tail: memoryview, meta: bool) -> int:
        """Total length of the packet that begins *tail*, as far as it can be known."""
        if self.stage is Stage.FEATURES and not meta:
            if len(tail) < HEADER80:
                return HEADER80
            return HEADER80 + parse_header80(tail)[1]
        if len(tail) < HEADER:
            return HEADER
        return HEADER + parse_header(tail)[2]

    def receive_data(self, view: memoryview) -> int:
        """Consume whole packets; returns how many bytes."""
        at, n = 0, len(view)
        self.e.liveness.heard()
        volumes, replica = self.e.volumes, self.e.replica
        while at < n and self.stage is not _DOWN:
            if self.stage is not _OPEN:
                used = self._handshake_packet(view[at:])
                if not used:
                    break
                at += used
                continue
            if n - at < HEADER:
                break
            volume, cmd, length = parse_header(view, at)
            vol = volumes.get(volume)
            if cmd == _DATA and vol is not None and replica.plain(vol):
                end = replica.receive_run(vol, view, at)
                if end != at:
                    at = end
                    continue
            elif cmd in _VERIFY and vol is not None:
                end = self.e.verify.receive_run(vol, cmd, view, at)
                if end != at:
                    at = end
                    continue
            check_data(cmd, length)
            if n - at - HEADER < length:
                break
            payload = view[at + HEADER : at + HEADER + length]
            at += HEADER + length
            self._dispatch(volume, vol, cmd, payload)
        return at if self.stage is not _DOWN else n

    def _handshake_packet(self, view: memoryview) -> int:
        """One packet before the parameters; 0 when it is not complete."""
        if self.stage is Stage.FEATURES:
            if len(view) < HEADER80:
                return 0
            cmd, length = parse_header80(view)
            if cmd != Packet.CONNECTION_FEATURES or length != 72:
                self.e.stand_alone(f"expected the peer's features, got packet {cmd:#x} of {length} bytes")
                return len(view)
            if len(view) < HEADER80 + length:
                return 0
            self._features(view[HEADER80 : HEADER80 + length])
            return HEADER80 + length
        if len(view) < HEADER:
            return 0
        _, cmd, length = parse_header(view)
        wanted = Packet.AUTH_CHALLENGE if self.stage is Stage.CHALLENGE else Packet.AUTH_RESPONSE
        if cmd != wanted or length > 2 * CHALLENGE_LEN:
            self.e.stand_alone(
                f"the peer does not authenticate itself (packet {cmd:#x} instead of {wanted.name}): "
                "is cram-hmac-alg configured on both nodes?"
            )
            return len(view)
        if self.stage is Stage.RESPONSE and length != hmac_size(self.e.config.net.cram_hmac_alg):
            ours = self.e.config.net.cram_hmac_alg
            raise PeerProtocolError(
                f"authentication failed: the peer's answer has {length} bytes; cram-hmac-alg is {ours} here, "
                "make it equal on both nodes"
            )
        if len(view) < HEADER + length:
            return 0
        payload = view[HEADER : HEADER + length]
        if self.stage is Stage.CHALLENGE:
            self._challenged(payload)
        else:
            self._answered(payload)
        return HEADER + length

    def _dispatch(self, number: int, vol: Volume | None, cmd: int, payload: memoryview) -> None:
        if not self.protocol_seen and cmd != Packet.PROTOCOL:
            if cmd == Packet.AUTH_CHALLENGE:
                raise PeerProtocolError("the peer wants authentication, cram-hmac-alg is not configured here")
            raise PeerProtocolError(f"packet {Packet(cmd).name} before P_PROTOCOL")
        if cmd not in self._data:
            raise PeerProtocolError(f"{Packet(cmd).name} after the handshake")
        handler = self._data[cmd]
        if handler is None:
            return
        if cmd in _CONNECTION_WIDE:
            handler(vol, payload)  # type: ignore[arg-type]
        elif vol is None:
            if cmd in PARAMETERS:
                self.e.note(None, f"the peer has volume {number}, which is not configured here", level="warning")
            else:
                raise PeerProtocolError(f"{Packet(cmd).name} for volume {number}, which is not configured here")
        else:
            handler(vol, payload)

    def _data_table(self) -> dict[int, Callable[[Volume, memoryview], None] | None]:
        """What handles which packet of the data socket; None: read and forget."""
        return {
            Packet.DATA: self._write,
            Packet.TRIM: self._trim_or_zeroes(Packet.TRIM),
            Packet.ZEROES: self._trim_or_zeroes(Packet.ZEROES),
            Packet.DATA_REPLY: self._data_reply,
            Packet.RS_DATA_REPLY: self._rs_data_reply,
            Packet.RS_DEALLOCATED: self._rs_deallocated,
            Packet.BARRIER: lambda vol, p: self.e.replica.barrier(unpack_barrier(p)),
            Packet.BITMAP: lambda vol, p: self.e.resync.receive_bitmap(vol, p, False),
            Packet.COMPRESSED_BITMAP: lambda vol, p: self.e.resync.receive_bitmap(vol, p, True),
            Packet.DATA_REQUEST: self._data_request,
            Packet.RS_DATA_REQUEST: self._rs_request(False),
            Packet.RS_THIN_REQ: self._rs_request(True),
            Packet.CSUM_RS_REQUEST: self._csum_request,
            Packet.OV_REQUEST: self._verify_request,
            Packet.OV_REPLY: lambda vol, p: self.e.verify.replied(vol, *unpack_block_req(p), bytes(p[24:])),
            Packet.PROTOCOL: self._protocol,
            Packet.PROTOCOL_UPDATE: self._protocol_update,
            Packet.SYNC_PARAM89: self._sync_param,
            Packet.SIZES: lambda vol, p: self.e.peer.receive_sizes(vol, p),
            Packet.UUIDS: lambda vol, p: self.e.peer.receive_uuids(vol, p),
            Packet.STATE: lambda vol, p: self.e.peer.receive_state(vol, unpack_u32(p)),
            Packet.SYNC_UUID: lambda vol, p: self.e.resync.receive_sync_uuid(vol, unpack_u64(p)),
            Packet.STATE_CHG_REQ: lambda vol, p: self.e.agreement.requested(vol, *unpack_state_change(p)),
            Packet.CONN_ST_CHG_REQ: lambda vol, p: self.e.agreement.requested(None, *unpack_state_change(p)),
            Packet.OUT_OF_SYNC: self._out_of_sync,
            **dict.fromkeys((Packet.UNPLUG_REMOTE, Packet.DELAY_PROBE)),
        }

    def _check_request(self, vol: Volume, sector: int, size: int) -> None:
        """A range the peer wants to read."""
        if not 0 < size <= IO_MAX:
            raise PeerProtocolError(f"a request for {size} bytes; at most 1 MiB may be asked for")
        self._check_range(vol, sector, size)

    def _check_range(self, vol: Volume, sector: int, size: int) -> None:
        if size & 511 or (sector << 9) + size > vol.size:
            raise PeerProtocolError(f"{size} bytes at sector {sector} on a device of {vol.size} bytes")

    def _payload(self, payload: memoryview, data: memoryview) -> memoryview:
        """The data behind a digest, which must fit."""
        digest = self.e.peer_integrity
        if digest is None or not len(data):
            return data
        check, data = data[: digest.size], data[digest.size :]
        if len(data) and digest(data) != bytes(check):
            raise PeerProtocolError(f"data-integrity-alg {digest.name}: the data does not fit its digest")
        return data

    def _write(self, vol: Volume, payload: memoryview) -> None:
        sector, block_id, seq, flags = unpack_data(payload)
        data = self._payload(payload, payload[24:])
        if not len(data) and not flags & DP_FLUSH:
            raise PeerProtocolError("P_DATA without data and without the flush flag")
        self._check_range(vol, sector, len(data))
        self.e.replica.write(vol, Packet.DATA, sector, block_id, flags, len(data), data, seq)

    def _trim_or_zeroes(self, cmd: int) -> Callable[[Volume, memoryview], None]:
        def handle(vol: Volume, payload: memoryview) -> None:
            sector, block_id, seq, flags, size = unpack_trim(payload)
            if size > DISCARD_MAX:
                raise PeerProtocolError(f"{Packet(cmd).name} of {size} bytes; 128 MiB is the limit")
            self._check_range(vol, sector, size)
            self.e.replica.write(vol, cmd, sector, block_id, flags, size, None, seq)

        return handle

    def _data_reply(self, vol: Volume, payload: memoryview) -> None:
        sector, block_id, _, _ = unpack_data(payload)
        data = self._payload(payload, payload[24:])
        if self.e.log.fence_passed(block_id):
            return
        r: Request | None = vol.reads.get(block_id)
        if r is None or r.offset != sector << 9 or r.length != len(data):
            raise PeerProtocolError(f"P_DATA_REPLY nobody asked for: sector {sector}, {len(data)} bytes")
        self.e.mirror.read_reply(vol, block_id, data)

    def _rs_data_reply(self, vol: Volume, payload: memoryview) -> None:
        sector, _, _, _ = unpack_data(payload)
        self.e.resync.target.receive_data(vol, sector, self._payload(payload, payload[24:]))

    def _rs_deallocated(self, vol: Volume, payload: memoryview) -> None:
        sector, size = unpack_block_desc(payload)
        self.e.resync.target.receive_deallocated(vol, sector, size)

    def _data_request(self, vol: Volume, payload: memoryview) -> None:
        sector, block_id, size = unpack_block_req(payload)
        self._check_request(vol, sector, size)
        self.e.peer.serve_read(vol, sector, block_id, size)

    def _rs_request(self, thin: bool) -> Callable[[Volume, memoryview], None]:
        def handle(vol: Volume, payload: memoryview) -> None:
            sector, block_id, size = unpack_block_req(payload)
            self._check_request(vol, sector, size)
            self.e.resync.source.serve(vol, sector, block_id, size, None, thin)

        return handle

    def _csum_request(self, vol: Volume, payload: memoryview) -> None:
        sector, block_id, size = unpack_block_req(payload)
        self._check_request(vol, sector, size)
        self.e.resync.source.serve(vol, sector, block_id, size, bytes(payload[24:]), False)

    def _verify_request(self, vol: Volume, payload: memoryview) -> None:
        sector, _, size = unpack_block_req(payload)
        self._check_request(vol, sector, size)
        self.e.verify.requested(vol, Stretch(sector << 9, size, size))

    def _out_of_sync(self, vol: Volume, payload: memoryview) -> None:
        sector, size = unpack_block_desc(payload)
        self._check_range(vol, sector, size)
        vol.set_out_of_sync(sector << 9, size)

    # ------------------------------------------------------------------------------ meta socket

    def receive_meta(self, view: memoryview) -> int:
        """Consume whole packets; runs of P_WRITE_ACK in a tight loop, and runs of P_OV_RESULT as one."""
        if self.stage is not _OPEN:
            if self.stage is not _DOWN:
                self.meta_backlog += bytes(view)
            return len(view)
        at, n = 0, len(view)
        finished: list[Request] = []  # list[Request]() would take a microsecond
        self.e.liveness.heard()
        try:
            while n - at >= HEADER and self.stage is not _DOWN:
                at = self._write_acks(view, at, finished)
                if n - at < HEADER:
                    break
                number, cmd, length = parse_header(view, at)
                if cmd == _OV_RESULT and (vol := self.e.volumes.get(number)) is not None:
                    end = self.e.verify.receive_results(vol, view, at)
                    if end != at:
                        at = end
                        continue
                check_meta(cmd, length)
                if n - at - HEADER < length:
                    break
                payload = view[at + HEADER : at + HEADER + length]
                at += HEADER + length
                if finished and cmd not in _ACKS:
                    done, finished = finished, []
                    self.e.mirror.finish(done)
                self._meta_packet(number, cmd, payload, finished)
        finally:  # what was acked before any nonsense is answered all the same
            if finished:
                self.e.mirror.finish(finished)
        self.e.conflicts.acks_arrived()
        return at if self.stage is not _DOWN else n

    def _write_acks(self, view: memoryview, at: int, finished: list[Request]) -> int:
        """Take the run of P_WRITE_ACK for ordinary writes that starts at *at*; returns where it ends."""
        e, end = self.e, len(view)
        for vol in e.volumes.values():  # acks of several volumes alternate only where several are written to
            if end - at < ACK.size:
                break
            at, n_pending, seq = batches.take_acks(view, at, e.log.inflight, vol.number, finished)
            if seq >= 0:
                vol.n_pending -= n_pending
                vol.saw(seq)
        return at

    def _flush_or_unknown(self, number: int, sector: int, block_id: int, r: PeerFlush | Request | None) -> None:
        if r is None:
            raise PeerProtocolError(f"ack for a write nobody sent: sector {sector}, block_id {block_id:#x}")
        assert isinstance(r, PeerFlush)
        self.e.flushes.acked(r)

    def _meta_packet(self, number: int, cmd: int, payload: memoryview, finished: list[Request]) -> None:
        e = self.e
        if cmd == Packet.PING:
            e.resync.source.before_ping_ack(lambda: e.out.meta.append(packet(Packet.PING_ACK)))
        elif cmd == Packet.PING_ACK:
            e.liveness.pong()
        elif cmd == Packet.BARRIER_ACK:
            fault = e.log.barrier_acked(*unpack_barrier_ack(payload))
            if fault:
                raise PeerProtocolError(fault)
        elif cmd in (Packet.STATE_CHG_REPLY, Packet.CONN_ST_CHG_REPLY):
            vol = e.volumes.get(number) if cmd == Packet.STATE_CHG_REPLY else None
            e.agreement.replied(vol, unpack_i32(payload))
        elif cmd in _ACKS:
            vol = e.volumes.get(number)
            if vol is None:
                raise PeerProtocolError(f"{Packet(cmd).name} for volume {number}, which is not configured here")
            self._ack(vol, cmd, payload, finished)

    def _ack(self, vol: Volume, cmd: int, payload: memoryview, finished: list[Request]) -> None:
        """The acks that are not plain write acks."""
        sector, block_id, size, seq = unpack_ack(payload)
        vol.saw(seq)
        e = self.e
        if cmd == Packet.NEG_DREPLY:
            e.mirror.read_refused(vol, block_id)
        elif cmd == Packet.NEG_RS_DREPLY:
            e.verify.refused(vol, sector)
            e.resync.target.request_answered(vol, sector, failed=True)
        elif cmd == Packet.RS_CANCEL:
            e.resync.target.request_answered(vol, sector, failed=False)
        elif cmd == Packet.RS_IS_IN_SYNC:
            e.resync.target.request_answered(vol, sector, failed=False, in_sync=True)
        elif cmd == Packet.OV_RESULT:
            e.verify.result(vol, sector, size, block_id)
        elif block_id == ID_SYNCER:
            if cmd == Packet.RS_WRITE_ACK:
                e.resync.source.block_acked(vol, sector, size)
            elif cmd == Packet.NEG_ACK:
                e.resync.source.block_refused(vol, sector, size)
        elif cmd in _WRITE_ANSWERS:
            r = e.log.inflight.pop(block_id, None)
            if r is None or isinstance(r, PeerFlush):
                self._flush_or_unknown(vol.number, sector, block_id, r)
            elif r.offset >> 9 != sector:
                raise PeerProtocolError(f"ack for sector {sector}, the write was at {r.offset >> 9}")
            elif cmd in (Packet.SUPERSEDED, Packet.RETRY_WRITE):
                e.conflicts.refused(r, cmd, finished)
            else:
                e.mirror.peer_acked(r, cmd == Packet.RS_WRITE_ACK, finished)
        elif cmd == Packet.NEG_ACK:
            r = e.log.inflight.pop(block_id, None)
            if isinstance(r, PeerFlush):
                # It has lost its disk, or is about to say so: what it did not flush is out of sync.
                e.log.mark_out_of_sync(r.volume)
                e.flushes.refused(r)
            elif r is not None:
                e.mirror.peer_refused(r, finished)
            else:  # protocols A and B answered it long ago
                vol.set_out_of_sync(sector << 9, size)


_CONNECTION_WIDE: Final = frozenset(
    (Packet.PROTOCOL, Packet.PROTOCOL_UPDATE, Packet.BARRIER, Packet.CONN_ST_CHG_REQ, Packet.UNPLUG_REMOTE)
)
_WRITE_ANSWERS: Final = {Packet.RECV_ACK, Packet.WRITE_ACK, Packet.RS_WRITE_ACK, Packet.SUPERSEDED, Packet.RETRY_WRITE}
_ACKS: Final = _WRITE_ANSWERS | {
    Packet.NEG_ACK, Packet.NEG_DREPLY, Packet.NEG_RS_DREPLY, Packet.OV_RESULT, Packet.RS_IS_IN_SYNC, Packet.RS_CANCEL,
}  # fmt: skip
