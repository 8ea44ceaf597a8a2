# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`waiting` for a C compiler: the same class, the same arguments, the same results.

`waiting.py` says what it does and is the specification. A thread holds the interpreter for a microsecond on its way in
and hardly at all on its way out; it raises the event when it has given it up, and wakes the next thread before it
asks for it again.

Whoever runs these threads (nbdkit) makes an interpreter's thread state for each call and frees it afterwards, with
16 KiB from the kernel and back each time, which costs more than all the rest of a call. So a thread that has been
here once keeps its state until it ends.
"""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from tandem.repl.requests import Op, Request, split
from tandem.repl.units import IO_MAX

include "../repl/_slots.pxi"

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <semaphore.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/eventfd.h>

    /* In threads that keep their state: which one it is. It counts one PyGILState_Ensure more than there are calls. */
    struct stay { PyThreadState *state; uint64_t id; };
    static pthread_key_t stays;

    /* A thread has ended. One of Python's own has freed its state before, and another may be in its place. */
    static void let_go(void *arg) {
        struct stay *stay = arg;
        if (Py_IsInitialized()) {
            PyGILState_STATE held = PyGILState_Ensure();
            PyThreadState *one = PyInterpreterState_ThreadHead(PyInterpreterState_Get());
            while (one && !(one == stay->state && PyThreadState_GetID(one) == stay->id))
                one = PyThreadState_Next(one);
            if (one) {
                PyThreadState_Clear(one);
                PyThreadState_Delete(one);
            }
            PyGILState_Release(held);
        }
        free(stay);
    }

    /* 0, or an errno. */
    static int keep_state(void) {
        struct stay *stay;
        int error;
        if (pthread_getspecific(stays))
            return 0;
        if (!(stay = malloc(sizeof *stay)))
            return ENOMEM;
        stay->state = PyThreadState_Get();
        stay->id = PyThreadState_GetID(stay->state);
        if ((error = pthread_setspecific(stays, stay)))
            free(stay);
        else
            PyGILState_Ensure();
        return error;
    }

    static int allow_stays(void) {
        return pthread_key_create(&stays, let_go);
    }

    static void wait_for(sem_t *done) {
        while (sem_wait(done))
            ;  /* a signal */
    }
    """
    int keep_state()
    int allow_stays()
    ctypedef struct sem_t:
        pass
    int sem_init(sem_t *done, int shared, unsigned value) nogil
    int sem_post(sem_t *done) nogil
    void wait_for(sem_t *done) nogil
    int eventfd_write(int fd, uint64_t n) nogil
    void *memcpy(void *to, const void *source, size_t n) nogil

cdef enum:
    LONG = 64 << 10  # bytes from which on a copy is worth letting others have the interpreter meanwhile

cdef uint64_t LONGEST = IO_MAX
cdef object REQUEST = Request, READ = Op.READ, WRITE = Op.WRITE, FLUSH = Op.FLUSH

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

if allow_stays():
    raise ImportError("no key for what threads keep")


cdef inline void copy(void *to, const void *source, size_t n):
    if n < LONG:
        memcpy(to, source, n)
    else:
        with nogil:
            memcpy(to, source, n)


cdef class Call:
    cdef sem_t done
    cdef Py_ssize_t n_left
    cdef sem_t *next
    cdef object error

    def __cinit__(self):
        sem_init(&self.done, 0, 0)
        self.error = 0


cdef class Crowd:
    cdef object _number, _ended
    cdef int _event
    cdef list _posted
    cdef set _out
    cdef bint _woken

    def __init__(self, number, int event):
        self._number = number
        self._event = event
        self._posted = []
        self._out = set()
        self._woken = False
        self._ended = 0

    def read(self, offset, into):
        cdef Py_buffer room, data
        cdef list requests = []
        cdef long long at, start = offset
        PyObject_GetBuffer(into, &room, PyBUF_WRITABLE)
        try:
            error = self._carry_out(READ, start, room.len, None, 0, requests)
            if not error:
                for r in requests:
                    PyObject_GetBuffer(slot_get(r, _payload), &data, PyBUF_SIMPLE)
                    try:
                        at = number(r, _offset) - start
                        assert data.len == number(r, _length) and at + data.len <= room.len
                        copy(<char *>room.buf + at, data.buf, data.len)
                    finally:
                        PyBuffer_Release(&data)
        finally:
            PyBuffer_Release(&room)
        return error

    def write(self, offset, data, flags):
        cdef Py_buffer view
        PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
        try:
            own = PyBytes_FromStringAndSize(NULL, view.len)
            copy(PyBytes_AS_STRING(own), view.buf, view.len)
            return self._carry_out(WRITE, offset, view.len, memoryview(own), flags, [])
        finally:
            PyBuffer_Release(&view)

    def change(self, op, offset, length, flags):
        return self._carry_out(op, offset, length, None, flags, [])

    cdef object _request(self, Call call, op, offset, length, payload, flags):
        r = new_slotted(REQUEST)
        slot_set(r, _op, op)
        slot_set(r, _volume, self._number)
        slot_set(r, _area, 0)
        slot_set(r, _offset, offset)
        slot_set(r, _length, length)
        slot_set(r, _payload, payload)
        slot_set(r, _flags, flags)
        slot_set(r, _error, 0)
        slot_set(r, _owner, self)
        slot_set(r, _cookie, call)
        slot_set(r, _waiting, 0)
        slot_set(r, _block_id, 0)
        slot_set(r, _epoch, None)
        slot_set(r, _legs, 0)
        return r

    cdef object _carry_out(self, op, long long offset, long long length, data, flags, list requests):
        cdef Call call = Call()
        cdef bint wake
        cdef int event = self._event
        if (op is READ or op is WRITE) and 0 < length <= <long long>(LONGEST - (offset & (LONGEST - 1))):
            requests.append(self._request(call, op, offset, length, data, flags))
        else:
            for at, size in split(op, offset, length):
                payload = None if data is None else part_of(data, at - offset, size)
                requests.append(self._request(call, op, at, size, payload, flags))
            if not requests:
                return self._ended
        cdef int error = keep_state()
        if error:
            return error
        if self._ended:
            return self._ended
        call.n_left = len(requests)
        self._out.add(call)
        self._posted += requests
        wake = not self._woken
        self._woken = True
        with nogil:
            if wake:
                eventfd_write(event, 1)
            wait_for(&call.done)
            if call.next != NULL:
                sem_post(call.next)
        return call.error

    def take(self):
        cdef list taken, fresh = []
        taken = self._posted
        self._posted = fresh
        self._woken = False
        return taken

    def finished(self, list batch):
        cdef Call call, first = None, last = None
        for r in batch:
            call = <Call?>slot_get(r, _cookie)
            if not call.error:
                call.error = slot_get(r, _error)
            call.n_left -= 1
            if not call.n_left and call in self._out:
                self._out.discard(call)
                if last is None:
                    first = call
                else:
                    last.next = &call.done
                last = call
        if first is not None:
            sem_post(&first.done)

    def end(self, error):
        cdef Call call
        self._ended = error
        self._posted = []
        while self._out:
            call = self._out.pop()
            call.error = error
            sem_post(&call.done)
