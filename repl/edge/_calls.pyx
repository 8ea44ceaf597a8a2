# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False
"""`calls` for a C compiler: the same functions and class, the same arguments, the same results.

`calls.py` says what they do and is the specification. A batch gives up the interpreter once, not for each call, and
a thread that flushes never needs it.
"""

import os

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from tandem.repl.requests import DiskOp

include "../_slots.pxi"

cdef extern from *:
    """
    #include <errno.h>
    #include <pthread.h>
    #include <sched.h>
    #include <stdlib.h>
    #include <sys/eventfd.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    static double seconds(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec + now.tv_nsec * 1e-9;
    }

    static long count_waits(void) {
        struct rusage usage;
        getrusage(RUSAGE_THREAD, &usage);
        return usage.ru_nvcsw;
    }

    static long read_cached(int fd, void *to, size_t length, long long offset) {
        struct iovec one = {to, length};
        return preadv2(fd, &one, 1, offset, RWF_NOWAIT);
    }

    static PyObject *received_behind(int fd, const char *begun, Py_ssize_t have, Py_ssize_t n_max) {
        PyObject *data = PyBytes_FromStringAndSize(NULL, have + n_max);
        ssize_t n;
        if (!data)
            return NULL;
        memcpy(PyBytes_AS_STRING(data), begun, have);
        Py_BEGIN_ALLOW_THREADS
        do
            n = recv(fd, PyBytes_AS_STRING(data) + have, n_max, MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        Py_END_ALLOW_THREADS
        if (n < 0) {
            Py_DECREF(data);
            return PyErr_SetFromErrno(PyExc_OSError);
        }
        _PyBytes_Resize(&data, have + n);  /* NULL where that fails */
        return data;
    }

    /* The bytes sent, or a negative errno. */
    static long send_once(int fd, struct iovec *pieces, int n) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = n};
        ssize_t sent;
        do
            sent = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        while (sent < 0 && errno == EINTR);
        return sent < 0 ? -errno : sent;
    }

    /* Threads that flush. A job is in one of two lists, or in a thread's hands. */
    struct job { struct job *next; int fd, error; void *token; };
    struct list { struct job *first, **end; };
    struct flusher {
        pthread_mutex_t mutex; pthread_cond_t work;
        struct list todo, done;
        int event, n_threads, n_threads_max, n_idle, n_todo, stopped, n_users;
    };

    static void append(struct list *list, struct job *job) {
        job->next = NULL;
        *list->end = job;
        list->end = &job->next;
    }

    static struct job *take_all(struct list *list) {
        struct job *first = list->first;
        list->first = NULL;
        list->end = &list->first;
        return first;
    }

    /* Whoever leaves last, the owner or a thread, frees it; the mutex is held. */
    static void leave(struct flusher *f) {
        int last = --f->n_users == 0;
        pthread_mutex_unlock(&f->mutex);
        if (last) {
            close(f->event);
            free(f);
        }
    }

    static void *flusher_work(void *arg) {
        struct flusher *f = arg;
        struct sched_param none = {0};
        if (sched_getscheduler(0) == SCHED_BATCH)  /* see scheduling.ordinary */
            sched_setscheduler(0, SCHED_OTHER, &none);
        pthread_mutex_lock(&f->mutex);
        for (;;) {
            struct job *job = f->todo.first;
            if (!job) {
                if (f->stopped)
                    break;
                f->n_idle++;
                pthread_cond_wait(&f->work, &f->mutex);
                f->n_idle--;
                continue;
            }
            if (!(f->todo.first = job->next))
                f->todo.end = &f->todo.first;
            f->n_todo--;
            pthread_mutex_unlock(&f->mutex);
            job->error = fdatasync(job->fd) ? errno : 0;
            pthread_mutex_lock(&f->mutex);
            int is_first = !f->done.first;
            append(&f->done, job);
            if (is_first) {  /* nobody is woken under the mutex, which is what it would wait for next */
                pthread_mutex_unlock(&f->mutex);
                eventfd_write(f->event, 1);
                pthread_mutex_lock(&f->mutex);
            }
        }
        leave(f);
        return NULL;
    }

    static struct flusher *flusher_new(int n_threads_max, int event) {
        struct flusher *f = calloc(1, sizeof *f);
        if (f) {
            pthread_mutex_init(&f->mutex, NULL);
            pthread_cond_init(&f->work, NULL);
            f->todo.end = &f->todo.first;
            f->done.end = &f->done.first;
            f->event = event;
            f->n_threads_max = n_threads_max;
            f->n_users = 1;
        }
        return f;
    }

    /* 0, or an errno when there is no thread at all to do it. */
    static int flusher_start(struct flusher *f, int fd, void *token) {
        struct job *job = malloc(sizeof *job);
        int error = 0, is_idle;
        if (!job)
            return ENOMEM;
        job->fd = fd;
        job->token = token;
        pthread_mutex_lock(&f->mutex);
        append(&f->todo, job);
        f->n_todo++;
        is_idle = f->n_todo <= f->n_idle;
        if (!is_idle && f->n_threads < f->n_threads_max) {
            pthread_t thread;
            error = pthread_create(&thread, NULL, flusher_work, f);
            if (!error) {
                pthread_detach(thread);
                f->n_threads++;
                f->n_users++;
            } else if (f->n_threads)
                error = 0;
            else {
                take_all(&f->todo);
                f->n_todo = 0;
                free(job);
            }
        }
        pthread_mutex_unlock(&f->mutex);
        if (is_idle)
            pthread_cond_signal(&f->work);
        return error;
    }

    static struct job *flusher_done(struct flusher *f) {
        eventfd_t n;
        eventfd_read(f->event, &n);  /* before the look: whoever comes first after it writes again */
        pthread_mutex_lock(&f->mutex);
        struct job *first = take_all(&f->done);
        pthread_mutex_unlock(&f->mutex);
        return first;
    }

    static void flusher_stop(struct flusher *f) {
        pthread_mutex_lock(&f->mutex);
        f->stopped = 1;
        pthread_cond_broadcast(&f->work);
        leave(f);
    }
    """
    double seconds() nogil
    long count_waits() nogil
    long read_cached(int fd, void *to, size_t length, long long offset) nogil
    object received_behind(int fd, const char *begun, Py_ssize_t have, Py_ssize_t n_max)
    struct iovec:
        void *iov_base
        size_t iov_len
    long send_once(int fd, iovec *pieces, int n) nogil
    enum:
        EAGAIN
    struct job:
        job *next
        int error
        void *token
    struct flusher:
        pass
    flusher *flusher_new(int n_threads_max, int event) nogil
    int flusher_start(flusher *f, int fd, void *token) nogil
    job *flusher_done(flusher *f) nogil
    void flusher_stop(flusher *f) nogil

cdef extern from "unistd.h":
    long pwrite(int fd, const void *data, size_t length, long long offset) nogil

cdef extern from "stdlib.h":
    void free(void *memory) nogil

cdef extern from "Python.h":
    ctypedef struct PyObject
    void Py_INCREF(object o)
    void Py_DECREF(object o)

cdef enum:
    OP_READ = 0
    OP_WRITE = 1
    BYTES_MAX = 16 << 10
    OPS_MAX = 128
    PIECES_MAX = 1024

SHORT_BYTES_MAX = BYTES_MAX
SHORT_OPS_MAX = OPS_MAX
SLOW_S = 0.002

cdef double SLOW = SLOW_S
cdef Py_ssize_t _op = slot_offset(DiskOp.op)
cdef Py_ssize_t _volume = slot_offset(DiskOp.volume)
cdef Py_ssize_t _area = slot_offset(DiskOp.area)
cdef Py_ssize_t _offset = slot_offset(DiskOp.offset)
cdef Py_ssize_t _length = slot_offset(DiskOp.length)
cdef Py_ssize_t _payload = slot_offset(DiskOp.payload)
cdef Py_ssize_t _flags = slot_offset(DiskOp.flags)

cdef struct Call:
    int writes
    char *at
    long long offset
    size_t length
    Py_buffer view

def n_waits():
    return count_waits()


def short_inline(int fd, list ops, long long volume, bint nowait, bint counting):
    cdef Call calls[OPS_MAX]
    cdef Call *call
    cdef list buffers = []
    cdef long long kind, offset, length, end = -1
    cdef int n = 0, count = 0, i
    cdef long waits = 0
    cdef double now, began, slow = 0.0
    cdef bint waited = False
    try:
        for op in ops:
            if not isinstance(op, DiskOp):
                raise TypeError(f"{op!r} is no DiskOp")
            kind, offset, length = number(op, _op), number(op, _offset), number(op, _length)
            if (
                n == OPS_MAX or kind > OP_WRITE or number(op, _flags) or number(op, _area) or length > BYTES_MAX
                or offset == end or number(op, _volume) != volume
            ):
                break
            end = offset + length
            call = &calls[n]
            call.writes, call.offset, call.length = kind == OP_WRITE, offset, length
            if call.writes:
                PyObject_GetBuffer(slot_get(op, _payload), &call.view, PyBUF_SIMPLE)
                call.at = <char *>call.view.buf
                n += 1
                if call.view.len != length:
                    call.length = 0  # nothing of it is written, and it does not count as done
                    break
            elif nowait:
                buffer = PyBytes_FromStringAndSize(NULL, length)
                buffers.append(buffer)
                call.at = PyBytes_AS_STRING(buffer)
                n += 1
            else:
                break
        with nogil:
            if counting:
                waits = count_waits()
            now = seconds()
            while count < n:
                call = &calls[count]
                if call.writes:
                    if not call.length or pwrite(fd, call.at, call.length, call.offset) != <long>call.length:
                        break
                elif read_cached(fd, call.at, call.length, call.offset) != <long>call.length:
                    break
                count += 1
                began = now
                now = seconds()
                if call.writes and now - began > SLOW:
                    slow = now - began
                    waited = counting and count_waits() > waits
                    break
        if buffers:
            at = 0
            for i in range(count):
                if not calls[i].writes:
                    slot_set(ops[i], _payload, buffers[at])
                    at += 1
    finally:
        for i in range(n):
            if calls[i].writes:
                PyBuffer_Release(&calls[i].view)
    return count, slow, waited


def receive(int fd, begun, Py_ssize_t n_max):
    cdef Py_buffer view
    PyObject_GetBuffer(begun, &view, PyBUF_SIMPLE)
    try:
        return received_behind(fd, <const char *>view.buf, view.len, n_max)
    finally:
        PyBuffer_Release(&view)


def send(int fd, list buffers):
    cdef Py_buffer views[PIECES_MAX]
    cdef iovec pieces[PIECES_MAX]
    cdef Py_ssize_t total = 0
    cdef int n = 0, i
    cdef long sent
    assert len(buffers) <= PIECES_MAX
    try:
        for buffer in buffers:
            PyObject_GetBuffer(buffer, &views[n], PyBUF_SIMPLE)
            pieces[n].iov_base, pieces[n].iov_len = views[n].buf, views[n].len
            total += views[n].len
            n += 1
        with nogil:
            sent = send_once(fd, pieces, n)
    finally:
        for i in range(n):
            PyBuffer_Release(&views[i])
    if sent >= 0:
        return total - sent
    if sent == -EAGAIN:
        return total
    raise OSError(-sent, os.strerror(-sent))


cdef class Flusher:
    cdef flusher *_threads
    cdef object _loop, _flushed
    cdef int _event

    def __init__(self, loop, int n_threads, flushed, fatal):
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._threads = flusher_new(n_threads, self._event)
        if self._threads == NULL:
            os.close(self._event)
            raise MemoryError
        self._loop = loop
        self._flushed = flushed
        loop.add_reader(self._event, self._collect)

    def start(self, int fd, token):
        assert self._threads != NULL, "a flush after the end"
        Py_INCREF(token)  # the job's; `_collect` takes it back
        cdef int error = flusher_start(self._threads, fd, <void *><PyObject *>token)
        if error:
            Py_DECREF(token)
            raise OSError(error, os.strerror(error))

    def stop(self):
        if self._threads != NULL:
            self._loop.remove_reader(self._event)
            flusher_stop(self._threads)
            self._threads = NULL

    def _collect(self):
        cdef list ended = []
        cdef job *one
        cdef job *following
        if self._threads == NULL:
            return  # it was stopped in the same turn of the loop
        one = flusher_done(self._threads)
        while one != NULL:
            token = <object><PyObject *>one.token
            Py_DECREF(token)
            ended.append((token, one.error))
            following = one.next
            free(one)
            one = following
        if ended:
            self._flushed(ended)
