"""The loops of the NBD side and their compiled twin are told the same stories and must tell them back alike."""

from __future__ import annotations

import errno
from types import ModuleType
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.nbd import batches, compiled
from tandem.nbd.codec import EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC, REQUEST, REQUEST_MAGIC, Cmd, CmdFlag
from tandem.repl.requests import FUA, Request

TWINS = (batches, compiled.batches)
SIZE = 8 << 20


class Owner:
    def finished(self, batch: list[Request]) -> None:
        raise AssertionError("nobody hands requests back here")


OWNER = Owner()

sent = st.lists(
    st.tuples(
        st.sampled_from((Cmd.READ, Cmd.WRITE, Cmd.WRITE, Cmd.FLUSH)), st.sampled_from((0, 0, CmdFlag.FUA)),
        st.sampled_from((0, 512, 100, 4096, (1 << 20) - 512, SIZE - 4096, SIZE, (1 << 64) - 512)),
        st.sampled_from((0, 512, 513, 4096, 1 << 20, (1 << 20) + 512, 1 << 31)),
    ),
    max_size=6,
)  # fmt: skip


@given(sent, st.booleans(), st.integers(0, 5000), st.sampled_from((0, 1, 1 << 20, 32 << 20)))
@settings(deadline=None)
def test_parse_run(story: list[Any], extended: bool, cut: int, room: int) -> None:
    layout, magic = (EXTENDED_REQUEST, EXTENDED_REQUEST_MAGIC) if extended else (REQUEST, REQUEST_MAGIC)
    stream = bytearray(b"x")
    for i, (cmd, flags, offset, length) in enumerate(story):
        head = magic << 32 | flags << 16 | cmd
        stream += layout.pack(head, (1 << 64) - 1 - i, offset, length)
        if cmd == Cmd.WRITE and length <= 1 << 20:
            stream += bytes([i]) * length
    view = memoryview(bytes(stream[: max(len(stream) - cut, 1)]))
    usual = {
        magic << 32 | Cmd.READ: (0, 0), magic << 32 | Cmd.WRITE: (1, 0),
        magic << 32 | CmdFlag.FUA << 16 | Cmd.WRITE: (1, FUA),
    }  # fmt: skip

    def tell(twin: ModuleType) -> object:
        batch: list[Any] = []
        said = twin.parse_run(view, 1, room, extended, usual, OWNER, 2, SIZE, batch)
        assert all(type(r) is Request and r.owner is OWNER for r in batch)
        return said, [
            (r.op, r.volume, r.area, r.offset, r.length, None if r.payload is None else bytes(r.payload), r.flags,
             r.error, r.cookie, r.waiting, r.block_id, r.epoch, r.legs)
            for r in batch
        ]  # fmt: skip

    assert tell(TWINS[0]) == tell(TWINS[1])


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from((0, 0, 0, errno.EIO))), max_size=8), st.booleans())
def test_pack_replies(story: list[tuple[int, int]], structured: bool) -> None:
    def tell(twin: ModuleType) -> object:
        batch = []
        for i, (op, error) in enumerate(story):
            r = Request(OWNER, (1 << 64) - 1 - i, op, 0, i << 40, 512 * i, bytes([i]) * 512 * i if not op else None)
            r.error = error
            batch.append(r)
        out: list[Any] = []
        said = [twin.pack_replies(batch, at, structured, out) for at in range(len(batch) + 1)]
        return said, b"".join(map(bytes, out))

    assert tell(TWINS[0]) == tell(TWINS[1])
