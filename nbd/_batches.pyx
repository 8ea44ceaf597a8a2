# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`batches` for a C compiler: the same functions, the same arguments, the same results.

`batches.py` says what each of them does and is the specification; `tandem.repl._batches` says how this is done.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from tandem.repl.requests import Request
from tandem.repl.units import IO_MAX

include "../repl/_slots.pxi"

cdef extern from "string.h":
    void *memcpy(void *to, const void *source, size_t n) nogil

cdef enum:
    SIMPLE_REPLY_MAGIC = 0x67446698
    STRUCTURED_REPLY_MAGIC = 0x668E33EF
    CHUNK_DONE = 1
    OFFSET_DATA = 1
    REQUEST_SIZE = 28
    EXTENDED_SIZE = 32
    SIMPLE_REPLY_SIZE = 16
    DATA_CHUNK_SIZE = 28
    ALIGN_MASK = 511
    OP_READ = 0
    OP_WRITE = 1

cdef uint64_t LONGEST = IO_MAX
cdef object REQUEST = Request

cdef Py_ssize_t _op = slot_offset(Request.op)
cdef Py_ssize_t _volume = slot_offset(Request.volume)
cdef Py_ssize_t _area = slot_offset(Request.area)
cdef Py_ssize_t _offset = slot_offset(Request.offset)
cdef Py_ssize_t _length = slot_offset(Request.length)
cdef Py_ssize_t _payload = slot_offset(Request.payload)
cdef Py_ssize_t _flags = slot_offset(Request.flags)
cdef Py_ssize_t _error = slot_offset(Request.error)
cdef Py_ssize_t _owner = slot_offset(Request.owner)
cdef Py_ssize_t _cookie = slot_offset(Request.cookie)
cdef Py_ssize_t _waiting = slot_offset(Request.waiting)
cdef Py_ssize_t _block_id = slot_offset(Request.block_id)
cdef Py_ssize_t _epoch = slot_offset(Request.epoch)
cdef Py_ssize_t _legs = slot_offset(Request.legs)


def parse_run(
    view, Py_ssize_t at, long long room, bint extended, dict usual, owner, volume, uint64_t size, list batch
):
    cdef Py_buffer data
    cdef Py_ssize_t header = EXTENDED_SIZE if extended else REQUEST_SIZE
    cdef uint64_t head, offset, length, last_head = 0, known_length = 0
    cdef uint32_t short_length
    cdef const char *p
    cdef object r, found = None, op, flags, zero = 0, payload, py_length = zero
    cdef long long kind
    PyObject_GetBuffer(view, &data, PyBUF_SIMPLE)
    try:
        while data.len - at >= header:
            p = <const char *>data.buf + at
            memcpy(&head, p, 8)
            memcpy(&offset, p + 16, 8)
            if extended:
                memcpy(&length, p + 24, 8)
                length = be64(length)
            else:
                memcpy(&short_length, p + 24, 4)
                length = be32(short_length)
            head, offset = be64(head), be64(offset)
            if found is None or head != last_head:
                found = usual.get(head)
                last_head = head
            if (
                found is None or (offset | length) & ALIGN_MASK or not length or length > LONGEST
                or (offset & (LONGEST - 1)) + length > LONGEST or offset > size or length > size - offset
            ):
                break
            op, flags = found
            kind = op
            if kind == OP_WRITE:
                if <uint64_t>(data.len - at - header) < length:
                    break
                payload = part_of(view, at + header, <Py_ssize_t>length)
            elif room > 0:
                payload = None
            else:
                break
            memcpy(&head, p + 8, 8)
            if length != known_length:  # most are of one length, and share the number
                known_length = py_length = length
            r = new_slotted(REQUEST)
            slot_set(r, _op, op)
            slot_set(r, _volume, volume)
            slot_set(r, _area, zero)
            slot_set(r, _offset, offset)
            slot_set(r, _length, py_length)
            slot_set(r, _payload, payload)
            slot_set(r, _flags, flags)
            slot_set(r, _error, zero)
            slot_set(r, _owner, owner)
            slot_set(r, _cookie, be64(head))
            slot_set(r, _waiting, zero)
            slot_set(r, _block_id, zero)
            slot_set(r, _epoch, None)
            slot_set(r, _legs, zero)
            batch.append(r)
            at += header
            if kind == OP_WRITE:
                at += <Py_ssize_t>length
            room -= <long long>length
    finally:
        PyBuffer_Release(&data)
    return at, room


def pack_replies(list batch, Py_ssize_t at, bint structured, list out):
    cdef Py_ssize_t i, n = len(batch)
    cdef uint64_t cookie, offset
    cdef uint32_t magic, length
    cdef uint16_t short
    cdef long long n_bytes = 0, size
    cdef bytes replies = PyBytes_FromStringAndSize(NULL, (n - at) * (DATA_CHUNK_SIZE if structured else SIMPLE_REPLY_SIZE))
    cdef char *begun = PyBytes_AS_STRING(replies)  # of it, what comes in front of the next payload
    cdef char *reply = begun
    for i in range(at, n):
        r = batch[i]
        if type(r) is not REQUEST:
            raise TypeError(f"{r!r} is no Request")
        if number(r, _error):
            break
        at = i + 1
        size = number(r, _length)
        n_bytes += size
        cookie = be64(<uint64_t>slot_get(r, _cookie))
        if structured and number(r, _op) == OP_READ:
            magic = be32(STRUCTURED_REPLY_MAGIC)
            memcpy(reply, &magic, 4)
            short = be16(CHUNK_DONE)
            memcpy(reply + 4, &short, 2)
            short = be16(OFFSET_DATA)
            memcpy(reply + 6, &short, 2)
            memcpy(reply + 8, &cookie, 8)
            length = be32(<uint32_t>(size + 8))
            memcpy(reply + 16, &length, 4)
            offset = be64(<uint64_t>slot_get(r, _offset))
            memcpy(reply + 20, &offset, 8)
            reply += DATA_CHUNK_SIZE
        else:
            magic, length = be32(SIMPLE_REPLY_MAGIC), 0
            memcpy(reply, &magic, 4)
            memcpy(reply + 4, &length, 4)
            memcpy(reply + 8, &cookie, 8)
            reply += SIMPLE_REPLY_SIZE
        if number(r, _op) == OP_READ:
            out.append(PyBytes_FromStringAndSize(begun, reply - begun))
            out.append(slot_get(r, _payload))
            begun = reply
    if reply > begun:
        out.append(PyBytes_FromStringAndSize(begun, reply - begun))
    return at, n_bytes
