"""The commands on all of the metadata: apply-al, dump-md, restore-md, verify-dump, check-resize.

It decides the order of writes. Where metadata are replaced or moved, what is on disk says "everything is
out of sync" (or nothing recognisable) until the last write, so a crash at any moment loses no bit.
"""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

from tandem.repl import attach
from tandem.repl.bitmap import PAGE, Bitmap
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import (
    BLOCK_SIZE,
    MAGIC_CLEAN,
    NO_META_DISK_CODE,
    Layout,
    MdFlag,
    Superblock,
)
from tandem.repl.units import BITS_PER_PAGE, SECTOR, n_bits_of

from .dump import FORMAT, UNCLEAN_NOTE, Dump, dump_bitmap, dump_body, parse_dump
from .meta_disk import Console, Disk, Moved, Target, run, size_text

_PAGES_AT_ONCE: Final = 256  # bitmap pages written by one call

# -------------------------------------------------------------------- apply-al


def apply_al(target: Target, console: Console) -> int:
    """Mark what a crashed primary may have been writing, and call the metadata clean.

    Metadata left behind by a disk that has grown are moved first. Exit 1 when the log is needed and cannot
    be used.
    """

    def work(disk: Disk) -> int:
        superblock, where = _at_the_end(disk)
        n_bits = n_bits_of(min(superblock.la_size_sect * SECTOR, where.usable))
        bitmap = attach.read_bitmap(disk.store, where, n_bits)
        applied = attach.apply_activity_log(disk.store, superblock, where, bitmap, name=target.path)
        found = applied.replay
        if applied.ignored and superblock.clean and not found.usable:
            console.warn("No usable activity log found.")
        elif applied.ignored:
            console.warn(attach.unusable_text(found))
            console.warn("Error ignored, no need to apply the AL")
        elif found.corrupt:
            console.warn(f"{found.corrupt} corrupt AL transactions found")
        if found.hot and superblock.flags & MdFlag.PRIMARY_IND:
            console.warn(f"Marked additional {size_text(applied.marked * 4)} as out-of-sync based on AL.")
        elif found.updates and superblock.flags & MdFlag.PRIMARY_IND:
            console.warn("Nothing to do.")
        disk.remember(applied.superblock)
        return 0

    return run(target, console, work, label=True)


def _at_the_end(disk: Disk) -> tuple[Superblock, Layout]:
    """The metadata in their place; moved there if the disk has grown since they were last used."""
    try:
        return disk.find_in_place()
    except MetadataError:
        moved = disk.find_moved()
        if moved is None:
            raise
        return _move(disk, moved)


# -------------------------------------------------------------------- check-resize


def check_resize(target: Target, console: Console) -> int:
    """Move internal metadata to the new end of a disk that has grown; remember the disk's size otherwise."""
    if target.kind != "internal":
        console.warn("Operation only supported for >= v8 internal meta data")
        return 1

    def work(disk: Disk) -> int:
        try:
            superblock, _ = _at_the_end(disk)
        except MetadataError as error:
            if error.code != NO_META_DISK_CODE:
                raise
            console.warn("no suitable meta data found :(")
            return 1
        disk.remember(superblock)
        return 0

    return run(target, console, work)


def _move(disk: Disk, old: Moved) -> tuple[Superblock, Layout]:
    """Move superblock, activity log and bitmap to the end of the disk as it is now.

    The places may overlap. Therefore everything is read first, and a superblock that calls all of the disk
    out of sync is valid at the new place, which lies behind everything old, until the rest is durable.
    """
    disk.console.warn("Moving the internal meta data to its proper location")
    superblock = old.superblock
    new = disk.layout(superblock.al_stripes, superblock.al_stripe_size_4k)
    n_bits = n_bits_of(min(superblock.la_size_sect * SECTOR, old.layout.usable))
    bitmap = attach.read_bitmap(disk.store, old.layout, n_bits)
    ring = disk.store.read(old.layout.al, old.layout.al_blocks * BLOCK_SIZE)
    moved = superblock.placed(new)
    unsafe = moved.flags | MdFlag.FULL_SYNC | MdFlag.AL_DISABLED
    disk.store.write(new.superblock, replace(moved, flags=unsafe).pack())
    disk.store.flush()
    disk.store.write(new.al, ring)
    write_bitmap(disk, new, bitmap)
    disk.store.flush()
    disk.write(moved, new)
    if old.layout.superblock + BLOCK_SIZE <= new.bitmap:
        disk.store.write(old.layout.superblock, bytes(BLOCK_SIZE))
        disk.store.flush()
    disk.console.say("Internal drbd meta data successfully moved.")
    return moved, new


def write_bitmap(disk: Disk, where: Layout, bitmap: Bitmap) -> None:
    """Write the whole bitmap area: the pages with set bits, zeros everywhere else. Not durable yet."""
    page = 0
    while page < bitmap.n_pages:
        first = bitmap.next_set(page * BITS_PER_PAGE)
        empty_until = bitmap.n_pages if first < 0 else first // BITS_PER_PAGE
        disk.zero("writing bitmap", where.bitmap + page * PAGE, (empty_until - page) * PAGE)
        page = empty_until
        if page < bitmap.n_pages:
            pages = range(page, min(page + _PAGES_AT_ONCE, bitmap.n_pages))
            disk.store.write(where.bitmap + page * PAGE, b"".join(map(bitmap.take_page, pages)))
            page = pages.stop
    rest = bitmap.n_pages * PAGE
    disk.zero("writing bitmap", where.bitmap + rest, where.bitmap_bytes - rest)


# -------------------------------------------------------------------- dump and restore


def dump_md(target: Target, console: Console, *, command: str = "tandemadm dump-md") -> int:
    """Print the metadata as text. Unclean metadata only with force, and then so that it cannot be restored.

    *command* is what the head of the dump calls the command line.
    """

    def work(disk: Disk) -> int:
        moved = None
        try:
            superblock, where = disk.find_in_place()
        except MetadataError:
            moved = disk.find_moved()
            if moved is None:
                raise
            superblock, where = moved.superblock, moved.layout
        if not superblock.clean:
            console.warn('Found meta data is "unclean", please apply-al first')
            if not console.force:
                return 1
        superblock = _clipped(superblock, where, console)
        now = datetime.now().astimezone()
        put = console.out.write
        put(
            "# DRBD meta data dump\n"
            f"# {now:%Y-%m-%d %H:%M:%S %z} [{int(now.timestamp())}]\n"
            f'# {os.uname().nodename}> {command}\n#\n\nversion "{FORMAT}";\n\n'
        )
        if not superblock.clean:
            put(f"{UNCLEAN_NOTE}\n")
        put(f"# md_size_sect {where.md_size_sect}\n")
        if moved is not None:
            put(_resized_comment(disk, moved))
        put(f"# md_offset {where.superblock}\n# al_offset {where.al}\n# bm_offset {where.bitmap}\n\n")
        put(dump_body(superblock))
        bitmap = attach.read_bitmap(disk.store, where, n_bits_of(superblock.la_size_sect * SECTOR))
        for text in dump_bitmap(bitmap):
            put(text)
        return 0

    return run(target, console, work, label=True)


def _resized_comment(disk: Disk, moved: Moved) -> str:
    expected = disk.layout(moved.superblock.al_stripes, moved.superblock.al_stripe_size_4k)
    return (
        "#\n### Device seems to have been resized!\n### dumping meta data from the last known position\n"
        f"### current size of {disk.target.path}: {disk.store.size} byte\n"
        "### expected position of meta data:\n"
        f"## md_offset {expected.superblock}\n## al_offset {expected.al}\n## bm_offset {expected.bitmap}\n"
        f"### last known size of {disk.target.path}: {moved.size} byte\n"
        "### adjusted position of meta data:\n"
    )


def _clipped(superblock: Superblock, where: Layout, console: Console) -> Superblock:
    """The superblock with a last agreed size that fits; says so if it did not."""
    usable = where.usable // SECTOR
    if superblock.la_size_sect <= usable:
        return superblock
    console.say(f"# la-size-sect was too big ({superblock.la_size_sect}), truncated ({usable})!")
    return replace(superblock, la_size_sect=usable)


def _read_dump(path: str) -> Dump:
    try:
        return parse_dump(Path(path).read_text(encoding="latin-1"))
    except OSError as error:
        raise MetadataError(f"open of '{path}' failed. {error.strerror}.", exit_code=20) from error


def restore_md(
    target: Target, console: Console, path: str, *, al_stripes: int = 0, al_stripe_size_kb: int = 0
) -> int:
    """Write the dump in *path* back, placed for the disk as it is now.

    *al_stripes* and *al_stripe_size_kb*, if given, replace the dump's: the offline way to change them.
    """

    def work(disk: Disk) -> int:
        dump = _read_dump(path)
        wanted = dump.superblock
        if al_stripes or al_stripe_size_kb:
            wanted = replace(
                wanted,
                al_stripes=al_stripes or wanted.al_stripes,
                al_stripe_size_4k=al_stripe_size_kb // 4 or wanted.al_stripe_size_4k,
            )
            console.warn("override activity log striping from commandline")
        where = disk.layout(wanted.al_stripes, wanted.al_stripe_size_4k)
        try:
            disk.find()
        except MetadataError as error:
            if error.code != NO_META_DISK_CODE:
                raise
        else:
            if not console.ask("Valid meta-data in place, overwrite?"):
                return 1
        console.warn("reinitializing")
        superblock = replace(_clipped(wanted.placed(where), where, console), magic=MAGIC_CLEAN)
        bitmap, too_long = dump.bitmap(n_bits_of(superblock.la_size_sect * SECTOR))
        if too_long:
            console.warn("Bitmap info too large, truncated!")
        disk.forget_superblock(where)
        write_bitmap(disk, where, bitmap)
        attach.write_ring(disk.store, where)
        disk.write(superblock, where)
        console.say("Successfully restored meta data")
        return 0

    return run(target, console, work)


def verify_dump(console: Console, path: str) -> int:
    """Say whether the text in *path* is a dump."""
    try:
        _read_dump(path)
    except MetadataError as error:
        console.warn(str(error))
        return error.exit_code
    console.say("input file parsed ok")
    return 0
