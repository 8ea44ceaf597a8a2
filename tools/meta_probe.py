"""What lies on a disk that is about to get metadata: file systems and the like, known by their signatures.

It looks only at the first 68 KiB and decides nothing; `meta` refuses or asks. It relies on the documented
on-disk formats, each named where it is read. ext3 is the name of everything in that family with a journal,
as drbdmeta prints it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

PROBE_BYTES: Final = 69632  # 68 KiB: the last signature begins at 64 KiB


@dataclass(frozen=True, slots=True)
class Content:
    """What was found. ``used_kb`` is how much of the disk it uses, 0 when that is not known.

    ``name`` is empty when nothing known was found, although there are data. ``all_of_it`` says that it uses
    the whole disk by its nature, so that there is no size to know.
    """

    name: str
    used_kb: int = 0
    all_of_it: bool = False


def _little(head: bytes, at: int, length: int) -> int:
    return int.from_bytes(head[at : at + length], "little")


def _big(head: bytes, at: int, length: int) -> int:
    return int.from_bytes(head[at : at + length], "big")


def _ext(head: bytes) -> Content | None:
    """struct ext4_super_block at 1 KiB; the upper half of the block count belongs to the 64bit feature."""
    at = 1024
    if _little(head, at + 56, 2) != 0xEF53:
        return None
    blocks = _little(head, at + 4, 4)
    if _little(head, at + 96, 4) & 0x80:
        blocks |= _little(head, at + 336, 4) << 32
    journal = _little(head, at + 92, 4) & 0x4
    block_shift = min(_little(head, at + 24, 4), 16)
    return Content("ext3 filesystem" if journal else "ext2 filesystem", blocks << block_shift)


def _xfs(head: bytes) -> Content | None:
    """struct xfs_dsb at 0: block size and data blocks."""
    if head[:4] != b"XFSB":
        return None
    return Content("xfs filesystem", _big(head, 4, 4) * _big(head, 8, 8) // 1024)


def _reiserfs(head: bytes) -> Content | None:
    """struct reiserfs_super_block at 64 KiB."""
    at = 65536
    if not head[at + 52 : at + 62].startswith((b"ReIsErFs", b"ReIsEr2Fs", b"ReIsEr3Fs")):
        return None
    return Content("reiser filesystem", _little(head, at, 4) * _little(head, at + 44, 2) // 1024)


def _jfs(head: bytes) -> Content | None:
    """struct jfs_superblock at 32 KiB: size in physical blocks, their size, then that of the log."""
    at = 32768
    if head[at : at + 4] != b"JFS1":
        return None
    log_blocks, block_size = _little(head, at + 72, 3), _little(head, at + 16, 4)
    used = _little(head, at + 8, 8) * _little(head, at + 24, 4) + log_blocks * block_size
    return Content("JFS filesystem", used // 1024)


def _btrfs(head: bytes) -> Content | None:
    """struct btrfs_super_block at 64 KiB: total bytes of all its devices."""
    at = 65536
    if head[at + 64 : at + 72] != b"_BHRfS_M":
        return None
    return Content("btrfs filesystem", _little(head, at + 112, 8) // 1024)


def _lvm(head: bytes) -> Content | None:
    """struct label_header in one of the first four sectors."""
    for at in range(0, 2048, 512):
        if head[at : at + 8] == b"LABELONE" and head[at + 24 : at + 32] == b"LVM2 001":
            return Content("LVM2 physical volume signature")
    return None


def _luks(head: bytes) -> Content | None:
    return Content("LUKS header") if head[:6] == b"LUKS\xba\xbe" else None


def _swap(head: bytes) -> Content | None:
    """The last ten bytes of the first page, for page sizes of 4 to 64 KiB."""
    for page in (4096, 8192, 16384, 32768, 65536):
        if head[page - 10 : page] in (b"SWAP-SPACE", b"SWAPSPACE2"):
            return Content("swap space signature", all_of_it=True)
    return None


_PROBES: Final[tuple[Callable[[bytes], Content | None], ...]] = (
    _ext, _xfs, _reiserfs, _jfs, _btrfs, _lvm, _luks, _swap,
)  # fmt: skip


def probe(head: bytes) -> Content | None:
    """What the beginning of a disk shows; None when it is all zero."""
    if not any(head):
        return None
    for look in _PROBES:
        found = look(head)
        if found is not None:
            return found
    return Content("")
