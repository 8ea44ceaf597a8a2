# The attributes of objects with `__slots__`, reached where the class has put them.
#
# Source: Include/structmember.h and Include/descrobject.h of CPython, which describe slots by PyMemberDef.

cdef extern from *:
    """
    #include <stdint.h>
    #include <structmember.h>

    #if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
    #error "the packets are composed for little-endian processors; the Python version works everywhere"
    #endif

    #define be16(x) __builtin_bswap16(x)
    #define be32(x) __builtin_bswap32(x)
    #define be64(x) __builtin_bswap64(x)

    static Py_ssize_t slot_offset(PyObject *descr) {
        if (Py_TYPE(descr) != &PyMemberDescr_Type || ((PyMemberDescrObject *)descr)->d_member->type != T_OBJECT_EX) {
            PyErr_SetString(PyExc_ImportError, "an attribute is not kept in a slot");
            return -1;
        }
        return ((PyMemberDescrObject *)descr)->d_member->offset;
    }

    static inline PyObject *slot_get(PyObject *o, Py_ssize_t at) {
        PyObject *value = *(PyObject **)((char *)o + at);
        if (value == NULL) {
            PyErr_SetString(PyExc_AttributeError, "a slot that was never filled");
            return NULL;
        }
        Py_INCREF(value);
        return value;
    }

    /* The number in a slot; those of one or two digits, as nearly all are, without a call. */
    static inline long long slot_number(PyObject *o, Py_ssize_t at) {
        PyObject *value = *(PyObject **)((char *)o + at);
        if (value == NULL) {
            PyErr_SetString(PyExc_AttributeError, "a slot that was never filled");
            return -1;
        }
    #if PY_VERSION_HEX < 0x030C0000
        if (PyLong_CheckExact(value)) {
            const digit *digits = ((PyLongObject *)value)->ob_digit;
            switch (Py_SIZE(value)) {
            case 0: return 0;
            case 1: return digits[0];
            case 2: return (long long)digits[1] << PyLong_SHIFT | digits[0];
            }
        }
    #endif
        return PyLong_AsLongLong(value);
    }

    static inline void slot_set(PyObject *o, Py_ssize_t at, PyObject *value) {
        PyObject **slot = (PyObject **)((char *)o + at), *old = *slot;
        Py_INCREF(value);
        *slot = value;
        Py_XDECREF(old);
    }

    /* view[at : at + n] of a memoryview of bytes, without a slice object and two numbers for it. */
    static inline PyObject *part_of(PyObject *view, Py_ssize_t at, Py_ssize_t n) {
        PyObject *part = PyMemoryView_FromObject(view);
        if (part) {
            Py_buffer *bytes = PyMemoryView_GET_BUFFER(part);
            if (bytes->ndim != 1 || bytes->itemsize != 1 || bytes->strides[0] != 1) {
                PyErr_SetString(PyExc_ValueError, "payloads are parts of plain bytes");
                Py_CLEAR(part);
            } else {
                bytes->buf = (char *)bytes->buf + at;
                bytes->len = bytes->shape[0] = n;
            }
        }
        return part;
    }

    static inline PyObject *new_slotted(PyObject *type) {
        return PyType_GenericAlloc((PyTypeObject *)type, 0);
    }
    """
    Py_ssize_t slot_offset(object descr) except -1
    object slot_get(object o, Py_ssize_t at)
    long long number "slot_number"(object o, Py_ssize_t at) except? -1
    void slot_set(object o, Py_ssize_t at, object value)
    object part_of(object view, Py_ssize_t at, Py_ssize_t n)
    object new_slotted(object type)
    uint16_t be16(uint16_t x) nogil
    uint32_t be32(uint32_t x) nogil
    uint64_t be64(uint64_t x) nogil
