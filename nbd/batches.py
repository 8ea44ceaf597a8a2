"""The loops of the NBD side: what is done for each request of a batch, as functions over plain values.

`_batches.pyx` is the same again for a C compiler and is used where it could be built; this page is the
specification, and `tests/unit/test_nbd_batches.py` tells both the same stories. See `tandem.repl.batches`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tandem.repl.requests import Buffer, Op, Owner, Request
from tandem.repl.units import IO_MAX

from .codec import (
    BLOCK_MIN,
    CHUNK_DONE,
    DATA_CHUNK,
    EXTENDED_REQUEST,
    REQUEST,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    STRUCTURED_REPLY_MAGIC,
    Chunk,
)

_IO_MASK: Final = IO_MAX - 1
_ALIGN_MASK: Final = BLOCK_MIN - 1
_READ: Final = int(Op.READ)
_WRITE: Final = int(Op.WRITE)
_DATA: Final = int(Chunk.OFFSET_DATA)


def parse_run(
    view: memoryview, at: int, room: int, extended: bool, usual: dict[int, tuple[int, int]], owner: Owner,
    volume: int, size: int, batch: list[Request],
) -> tuple[int, int]:  # fmt: skip
    """Take the run of complete, usual requests that starts at *at* into *batch*.

    *usual* tells from the first eight bytes what a request in one piece is: (Op, flags). *room* is how many
    bytes of payload may enter the machine: the request that exceeds it is the last one to do so, and reads
    behind it are stopped in front of. Returns where the run ends, and the room that is left.
    """
    layout = EXTENDED_REQUEST if extended else REQUEST
    end, header, unpack = len(view), layout.size, layout.unpack_from
    while end - at >= header:
        head, cookie, offset, length = unpack(view, at)
        found = usual.get(head)
        if (
            found is None
            or (offset | length) & _ALIGN_MASK
            or not length
            or (offset & _IO_MASK) + length > IO_MAX
            or offset + length > size
        ):
            break
        op, flags = found
        if op == _WRITE:
            begin, after = at + header, at + header + length
            if after > end:
                break
            at = after
            batch.append(Request(owner, cookie, _WRITE, volume, offset, length, view[begin:at], flags))
        elif room > 0:
            at += header
            batch.append(Request(owner, cookie, _READ, volume, offset, length, None, flags))
        else:
            break
        room -= length
    return at, room


def pack_replies(
    batch: Sequence[Request], at: int, structured: bool, out: list[Buffer]
) -> tuple[int, int]:
    """Answer *batch* from *at* on into *out*, payloads as they are; simple replies but for the data of READs.

    Those have a chunk of their own if *structured*. Stops at an error. Returns where, and the requests' bytes.
    """
    view = memoryview(bytearray((DATA_CHUNK.size if structured else SIMPLE_REPLY.size) * (len(batch) - at)))
    pack, pack_data, append, start, to, n_bytes = SIMPLE_REPLY.pack_into, DATA_CHUNK.pack_into, out.append, 0, 0, 0
    for r in batch[at:]:
        if r.error:
            break
        at += 1
        length = r.length
        n_bytes += length
        if r.op == _READ:
            if structured:
                offset = r.offset
                pack_data(view, to, STRUCTURED_REPLY_MAGIC, CHUNK_DONE, _DATA, r.cookie, length + 8, offset)
                to += DATA_CHUNK.size
            else:
                pack(view, to, SIMPLE_REPLY_MAGIC, 0, r.cookie)
                to += SIMPLE_REPLY.size
            append(view[start:to])
            append(r.payload)  # type: ignore[arg-type]  # a READ without error has one
            start = to
        else:
            pack(view, to, SIMPLE_REPLY_MAGIC, 0, r.cookie)
            to += SIMPLE_REPLY.size
    if to > start:
        append(view[start:to])
    return at, n_bytes
