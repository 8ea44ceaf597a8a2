# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`batches` for a C compiler: the same functions, the same arguments, the same results.

`batches.py` says what each of them does and is the specification. Here the attributes of requests are reached
where `__slots__` has put them, and packets are composed and read as bytes. Every object is looked at before it
is taken for a request: anything else is a TypeError.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from .requests import PeerEpoch, PeerWrite, Request
from .units import IO_MAX

include "_slots.pxi"

cdef extern from "string.h":
    void *memcpy(void *to, const void *source, size_t n) nogil

cdef struct Wire:  # P_DATA's and the acks' layout: header100, and 24 bytes that both have alike
    uint32_t magic
    uint16_t volume
    uint16_t command
    uint32_t length
    uint32_t pad
    uint64_t sector
    uint64_t block_id
    uint32_t third  # seq_num of P_DATA, blksize of an ack
    uint32_t fourth  # dp_flags of P_DATA, seq_num of an ack

cdef enum:
    HEAD = 40
    MAGIC = 0x8620EC20
    P_DATA = 0x00
    P_WRITE_ACK = 0x16
    P_RS_WRITE_ACK = 0x17
    DP_RW_SYNC = 0x2
    DP_MAY_SET_IN_SYNC = 0x4
    DP_FUA = 0x10
    DP_SEND_WRITE_ACK = 0x100
    SYNCING = 0x104  # the last and DP_MAY_SET_IN_SYNC
    OP_READ = 0
    OP_WRITE = 1
    FLAG_FUA = 1
    LOCAL = 1
    PEER = 2
    LOCAL_OK = 1
    PEER_OK = 2
    MIRRORED = 4
    IN_LOG = 8
    AL_REF = 16
    IN_SYNC = 32
    BOTH_OK = 3
    SETTLED = 27  # both, IN_LOG and AL_REF
    RANGE_SHIFT = 9

cdef long long LONGEST = IO_MAX
cdef object REQUEST = Request
cdef object PEER_WRITE = PeerWrite
cdef object EPOCH = PeerEpoch

cdef Py_ssize_t _op = slot_offset(Request.op)
cdef Py_ssize_t _volume = slot_offset(Request.volume)
cdef Py_ssize_t _area = slot_offset(Request.area)
cdef Py_ssize_t _offset = slot_offset(Request.offset)
cdef Py_ssize_t _length = slot_offset(Request.length)
cdef Py_ssize_t _payload = slot_offset(Request.payload)
cdef Py_ssize_t _flags = slot_offset(Request.flags)
cdef Py_ssize_t _error = slot_offset(Request.error)
cdef Py_ssize_t _waiting = slot_offset(Request.waiting)
cdef Py_ssize_t _owner = slot_offset(Request.owner)
cdef Py_ssize_t _block_id = slot_offset(Request.block_id)
cdef Py_ssize_t _epoch = slot_offset(Request.epoch)
cdef Py_ssize_t _legs = slot_offset(Request.legs)
cdef Py_ssize_t w_sector = slot_offset(PeerWrite.sector)
cdef Py_ssize_t w_block_id = slot_offset(PeerWrite.block_id)
cdef Py_ssize_t w_dp = slot_offset(PeerWrite.dp)
cdef Py_ssize_t w_epoch = slot_offset(PeerWrite.epoch)
cdef Py_ssize_t w_tracked = slot_offset(PeerWrite.tracked)
cdef Py_ssize_t w_al_ref = slot_offset(PeerWrite.al_ref)
cdef Py_ssize_t e_active = slot_offset(PeerEpoch.active)
cdef Py_ssize_t e_dead = slot_offset(PeerEpoch.dead)

cdef inline int is_request(object r) except -1:
    if type(r) is not REQUEST:
        raise TypeError(f"{r!r} is no Request")
    return 1

cdef inline int is_peer_write(object w) except -1:
    if type(w) is not PEER_WRITE:
        raise TypeError(f"{w!r} is no PeerWrite")
    return 1


# ------------------------------------------------------------------------------ our applications' requests


def sort_batch(list batch, list disk, dict busy, dict refs, list writes):
    cdef list rest = []
    cdef long long op, offset, length, first, extent, end, block
    cdef object n_refs, key
    for r in batch:
        is_request(r)
        op, offset, length = number(r, _op), number(r, _offset), number(r, _length)
        if op == OP_READ:
            slot_set(r, _waiting, LOCAL)
            disk.append(r)
            continue
        first, extent, end = offset >> 12, offset >> 22, offset + length
        n_refs = refs.get(extent)
        key = first
        if n_refs is None or key in busy or op != OP_WRITE or (end - 1) >> 22 != extent or length > LONGEST:
            rest.append(r)
            continue
        if end > (first + 1) << 12:
            for block in range(first + 1, (end + 4095) >> 12):
                if block in busy:
                    rest.append(r)
                    break
            else:
                for block in range(first, (end + 4095) >> 12):
                    busy[block] = r
                refs[extent] = n_refs + 1
                writes.append(r)
            continue
        busy[key] = r
        refs[extent] = n_refs + 1
        writes.append(r)
    return rest


def pack_writes(list out, dict inflight, list writes, uint16_t volume, seq, block_id, epoch, uint32_t dp):
    cdef Wire head
    cdef long long sent = 0, length
    cdef uint64_t next_id = block_id
    cdef uint32_t next_seq = <uint32_t>(seq & 0xFFFFFFFF)
    cdef object payload, key, waiting = LOCAL | PEER, legs = MIRRORED | IN_LOG | AL_REF
    head.magic, head.volume, head.command, head.pad = be32(MAGIC), be16(volume), be16(P_DATA), 0
    for r in writes:
        is_request(r)
        next_seq += 1
        length = number(r, _length)
        head.length = be32(<uint32_t>(24 + length))
        head.sector = be64(<uint64_t>(number(r, _offset) >> 9))
        head.block_id = be64(next_id)
        head.third = be32(next_seq)
        head.fourth = be32(dp | DP_FUA if number(r, _flags) & FLAG_FUA else dp)
        payload = slot_get(r, _payload)
        assert payload is not None
        out.append(PyBytes_FromStringAndSize(<char *>&head, HEAD))
        out.append(payload)
        key = next_id
        inflight[key] = r
        slot_set(r, _block_id, key)
        slot_set(r, _epoch, epoch)
        slot_set(r, _waiting, waiting)
        slot_set(r, _legs, legs)
        sent += length
        next_id += 1
    return sent


def by_kind(list ops):
    cdef list mine = [], theirs = [], others = []
    for op in ops:
        if type(op) is REQUEST:
            mine.append(op)
        elif type(op) is PEER_WRITE:
            theirs.append(op)
        else:
            others.append(op)
    return mine, theirs, others


def written_here(list ops, Py_ssize_t at, long long volume, list finished):
    cdef long long n_read = 0, n_written = 0, n_writes = 0, waiting, length
    cdef Py_ssize_t i, n = len(ops)
    for i in range(at, n):
        r = ops[i]
        is_request(r)
        if number(r, _error) or number(r, _volume) != volume:
            return i, n_read, n_written, n_writes
        slot_set(r, _legs, number(r, _legs) | LOCAL_OK)
        waiting = number(r, _waiting) & ~LOCAL
        slot_set(r, _waiting, waiting)
        length = number(r, _length)
        if number(r, _op) == OP_READ:
            n_read += length
        else:
            n_written += length
            n_writes += 1
        if not waiting:
            finished.append(r)
    return n, n_read, n_written, n_writes


def take_acks(view, Py_ssize_t at, dict inflight, long long volume, list finished):
    cdef Py_buffer data
    cdef Wire p
    cdef long long n_pending = 0, last = -1, waiting
    cdef uint16_t command
    cdef object key, r
    PyObject_GetBuffer(view, &data, PyBUF_SIMPLE)
    try:
        while at <= data.len - HEAD:
            memcpy(&p, <char *>data.buf + at, HEAD)
            command = be16(p.command)
            if command != P_WRITE_ACK and command != P_RS_WRITE_ACK:
                break
            if be32(p.magic) != MAGIC or be32(p.length) != 24 or p.pad:
                break
            key = be64(p.block_id)
            r = inflight.get(key)
            if type(r) is not REQUEST:
                break
            if <uint64_t>(number(r, _offset) >> 9) != be64(p.sector) or number(r, _volume) != volume:
                break
            del inflight[key]
            at += HEAD
            last = be32(p.fourth)
            slot_set(r, _legs, number(r, _legs) | (PEER_OK if command == P_WRITE_ACK else PEER_OK | IN_SYNC))
            waiting = number(r, _waiting)
            if waiting & PEER:
                n_pending += 1
                waiting &= ~PEER
                slot_set(r, _waiting, waiting)
                if not waiting:
                    finished.append(r)
    finally:
        PyBuffer_Release(&data)
    return at, n_pending, last


def of_one_owner(list requests):
    cdef object owner = None, other
    for r in requests:
        is_request(r)
        other = slot_get(r, _owner)
        if owner is None:
            owner = other
        elif other is not owner:
            return False
    return True


def settle_writes(list requests, Py_ssize_t at, dict busy, list in_sync):
    cdef Py_ssize_t i, n = len(requests)
    cdef long long legs, offset, length, first, last
    for i in range(at, n):
        r = requests[i]
        is_request(r)
        if number(r, _op) == OP_READ:
            continue
        legs, length = number(r, _legs), number(r, _length)
        if legs & BOTH_OK != BOTH_OK or not legs & IN_LOG or length > 4096:
            return i
        if legs & IN_SYNC:
            in_sync.append(r)
        offset = number(r, _offset)
        first, last = offset >> 12, (offset + length - 1) >> 12
        del busy[first]
        if last != first:
            del busy[last]
        slot_set(r, _payload, None)
    return n


def leave_log(list requests, Py_ssize_t at, long long volume, dict refs, dict inflight):
    cdef Py_ssize_t i, n = len(requests)
    cdef long long legs, offset, extent, n_refs
    cdef object key
    for i in range(at, n):
        r = requests[i]
        if type(r) is not REQUEST or number(r, _volume) != volume:
            return i
        legs = number(r, _legs)
        if legs & AL_REF and not number(r, _waiting) & LOCAL:
            offset = number(r, _offset)
            extent = offset >> 22
            key = extent
            n_refs = refs[key]
            if (offset + number(r, _length) - 1) >> 22 != extent or n_refs < 2:
                return i
            refs[key] = n_refs - 1
            legs &= ~AL_REF
        slot_set(r, _legs, legs & ~IN_LOG)
        if inflight:
            inflight.pop(slot_get(r, _block_id), None)
    return n


def settle_epoch(list requests, long long volume, bytearray ranges, dict extents, dict inflight):
    cdef Py_ssize_t i, count = 0, n = len(requests)
    cdef long long legs, offset, end, first, extent
    cdef list rest = []
    cdef object key
    cdef bytes packed = PyBytes_FromStringAndSize(NULL, 8 * n)
    cdef uint64_t *to = <uint64_t *>PyBytes_AS_STRING(packed)
    for i in range(n):
        r = requests[i]
        if type(r) is not REQUEST or number(r, _volume) != volume or number(r, _op) != OP_WRITE or number(r, _waiting):
            rest.append(r)
            continue
        legs, offset = number(r, _legs), number(r, _offset)
        end, extent = offset + number(r, _length), offset >> 22
        if (
            legs & SETTLED != SETTLED or slot_get(r, _payload) is not None or end <= offset or end - offset > LONGEST
            or (end - 1) >> 22 != extent
        ):
            rest.append(r)
            continue
        first = offset >> 12
        to[count] = first << RANGE_SHIFT | ((end + 4095) >> 12) - first
        count += 1
        key = extent
        extents[key] = extents.get(key, 0) + 1
        slot_set(r, _legs, legs & ~(IN_LOG | AL_REF))
        inflight.pop(slot_get(r, _block_id), None)
    ranges += packed[:8 * count]
    return rest


# ------------------------------------------------------------------------------ the peer's writes


def receive_writes(view, Py_ssize_t at, uint16_t volume, uint64_t size, epoch, list disk, dict busy):
    cdef Py_buffer data
    cdef Wire p
    cdef long long count = 0, received = 0, last = 0, length, known_length = 0
    cdef uint64_t sector, block
    cdef uint32_t dp, usual = DP_SEND_WRITE_ACK | DP_FUA | DP_RW_SYNC
    cdef bint tracked = busy is not None, free
    cdef object w, op = OP_WRITE, zero = 0, fua = FLAG_FUA, py_volume = volume, py_length = zero
    if tracked:
        usual |= DP_MAY_SET_IN_SYNC
    PyObject_GetBuffer(view, &data, PyBUF_SIMPLE)
    try:
        while data.len - at >= HEAD:
            memcpy(&p, <char *>data.buf + at, HEAD)
            length = <long long>be32(p.length) - 24
            sector, dp = be64(p.sector), be32(p.fourth)
            if (
                be16(p.command) != P_DATA or at + HEAD + length > data.len or be32(p.magic) != MAGIC
                or be16(p.volume) != volume or p.pad or length <= 0 or length > LONGEST or length & 511
                or sector > size >> 9 or (sector << 9) + <uint64_t>length > size
                or dp & ~usual
            ):
                break
            if tracked:
                free = True
                for block in range(sector >> 3, ((sector << 9) + <uint64_t>length + 4095) >> 12):
                    if block in busy:
                        free = False
                        break
                if not free:
                    break
            if length != known_length:  # most are of one length, and share the number
                known_length = py_length = length
            w = new_slotted(PEER_WRITE)
            slot_set(w, _op, op)
            slot_set(w, _volume, py_volume)
            slot_set(w, _area, zero)
            slot_set(w, _offset, sector << 9)
            slot_set(w, _length, py_length)
            slot_set(w, _payload, part_of(view, at + HEAD, length))
            slot_set(w, _flags, fua if dp & DP_FUA else zero)
            slot_set(w, _error, zero)
            slot_set(w, w_sector, sector)
            slot_set(w, w_block_id, be64(p.block_id))
            slot_set(w, w_dp, dp)
            slot_set(w, w_epoch, epoch)
            slot_set(w, w_tracked, tracked)
            slot_set(w, w_al_ref, False)
            if tracked:
                for block in range(sector >> 3, ((sector << 9) + <uint64_t>length + 4095) >> 12):
                    busy[block] = w
            disk.append(w)
            received += length
            count += 1
            last = be32(p.third)
            at += HEAD + length
    finally:
        PyBuffer_Release(&data)
    return at, count, received, last


def written_for_peer(list ops, Py_ssize_t at, long long volume, list to_ack, dict busy):
    cdef Py_ssize_t i, n = len(ops)
    cdef long long written = 0, n_in_sync = 0, block, offset, length
    cdef bint tracked
    cdef object epoch
    for i in range(at, n):
        w = ops[i]
        is_peer_write(w)
        epoch = slot_get(w, w_epoch)
        tracked = slot_get(w, w_tracked)
        if (
            number(w, _volume) != volume or (tracked and busy is None) or slot_get(w, w_al_ref) or number(w, _error)
            or type(epoch) is not EPOCH or slot_get(epoch, e_dead)
            or number(w, w_dp) & SYNCING != (SYNCING if tracked else DP_SEND_WRITE_ACK)
        ):
            return i, written, n_in_sync
        length = number(w, _length)
        if tracked:
            offset = number(w, _offset)
            for block in range(offset >> 12, (offset + length + 4095) >> 12):
                del busy[block]
            n_in_sync += 1
        written += length
        slot_set(w, _payload, None)
        to_ack.append(w)
    return n, written, n_in_sync


def pack_write_acks(list writes, Py_ssize_t at, uint16_t volume, seq):
    cdef Py_ssize_t i, end = at, n = len(writes), n_answered = 0
    cdef uint32_t next_seq = <uint32_t>(seq & 0xFFFFFFFF)
    cdef Wire p
    cdef object epoch, last = None
    cdef bytes buffer
    cdef char *to
    while end < n and is_peer_write(writes[end]) and number(writes[end], _volume) == volume:
        end += 1
    buffer = PyBytes_FromStringAndSize(NULL, HEAD * (end - at))
    to = PyBytes_AS_STRING(buffer)
    p.magic, p.volume, p.command, p.length = be32(MAGIC), be16(volume), 0, be32(24)
    p.pad = 0
    for i in range(at, end):
        w = writes[i]
        next_seq += 1
        epoch = slot_get(w, w_epoch)
        if epoch is not last:  # most are of one epoch, and counted together
            if n_answered:
                last.active -= n_answered
            last, n_answered = epoch, 0
        n_answered += 1
        p.sector, p.block_id = be64(<uint64_t>number(w, w_sector)), be64(<uint64_t>slot_get(w, w_block_id))
        p.command = be16(P_RS_WRITE_ACK if number(w, w_dp) & DP_MAY_SET_IN_SYNC else P_WRITE_ACK)
        p.third, p.fourth = be32(<uint32_t>number(w, _length)), be32(next_seq)
        memcpy(to, &p, HEAD)
        to += HEAD
    if n_answered:
        last.active -= n_answered
    return end, buffer
