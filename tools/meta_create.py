"""create-md and wipe-md: fresh metadata on a disk, and an end to it.

It decides whether the disk may be written to: metadata or data that are in place are asked about, and a
file system that would be truncated is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tandem.repl import attach
from tandem.repl.errors import MetadataError
from tandem.repl.metadata import (
    BLOCK_SIZE,
    NO_META_DISK_CODE,
    Layout,
    Superblock,
    check_al_settings,
    superblock_offset,
)

from .meta_disk import Console, Disk, Target, run, size_text
from .meta_probe import PROBE_BYTES, Content, probe


def create_md(
    target: Target,
    console: Console,
    *,
    al_stripes: int = 1,
    al_stripe_size_kb: int = 32,
    peer_max_bio_size: int = 0,
    device_uuid: int = 0,
) -> int:
    """Write fresh metadata. Asks before replacing metadata or data, refuses (40) to truncate a file system.

    *al_stripe_size_kb* is divided by 4 and truncated. *device_uuid* 0 leaves it unset.
    """
    if not 0 <= peer_max_bio_size <= 1 << 20:
        console.warn("peer-max-bio-size out of range (0...1M)")
        return 10

    def work(disk: Disk) -> int:
        where = disk.layout(al_stripes, al_stripe_size_kb // 4)
        if not _may_replace(disk):
            console.say("Operation cancelled.")
            return 1
        verdict = _check_existing_data(disk, where)
        if verdict:
            return verdict
        disk.forget_superblock(where)
        console.warn(f"initializing bitmap ({size_text(where.bitmap_bytes // 1024)}) to all zero")
        disk.zero("initializing bitmap", where.bitmap, where.bitmap_bytes)
        console.say("initializing activity log")
        attach.write_ring(disk.store, where)
        console.say("Writing meta data...")
        fresh = replace(Superblock.fresh(where, device_uuid), la_peer_max_bio_size=peer_max_bio_size)
        disk.write(fresh, where)
        console.say("New drbd meta data block successfully created.")
        return 0

    try:
        check_al_settings(al_stripes, al_stripe_size_kb // 4)
    except MetadataError as error:
        console.warn(str(error))
        return error.exit_code
    return run(target, console, work)


def _may_replace(disk: Disk) -> bool:
    """Ask about metadata in place, also of the other formats; True when there is none."""
    at = superblock_offset(disk.target.kind, disk.store.size, disk.target.index, disk.target.path)
    version = "v08"
    try:
        attach.read_superblock(disk.store, disk.data_size, disk.target.kind, disk.target.index)
    except MetadataError as error:
        found = str(error).partition("holds DRBD metadata of format ")[2][:3]
        if not found:
            return True
        version = found
    if disk.target.kind != "internal":
        return disk.console.ask("Valid meta data seems to be in place.\nDo you really want to overwrite?")
    disk.console.warn(
        "You want me to create a v08 style flexible-size internal meta data block.\n"
        f"There appears to be a {version} flexible-size internal meta data block\n"
        f"already in place on {disk.target.path} at byte offset {at}"
    )
    return disk.console.ask("Do you really want to overwrite the existing meta-data?")


_ZERO_FIRST: Final = (
    "If you want me to do this, you need to zero out the first part\n"
    "of the device (destroy the content).\n"
    "You should be very sure that you mean it."
)


def _check_existing_data(disk: Disk, where: Layout) -> int:
    """0 to go on; 1 when the operator said no, 40 when data would certainly be lost."""
    store, say = disk.store, disk.console.say
    content = probe(store.read(0, PROBE_BYTES))
    if disk.target.kind == "indexed" and (content is None or not content.name):
        # Other slots are other volumes' business.
        content = probe(store.read(where.superblock, min(PROBE_BYTES, store.size - where.superblock)))
    if content is None:
        return 0
    say(f"md_offset {where.superblock}\nal_offset {where.al}\nbm_offset {where.bitmap}\n")
    say(f"Found {content.name or 'some data'}")
    if content.name:
        refusal = _refusal(content, where, say)
        if refusal:
            say(f"{refusal}\nOperation refused.\n")
            return 40
        say(
            "\nEven though it looks like this would place the new meta data into\n"
            "unused space, you still need to confirm, as this is only a guess."
        )
    else:
        say("\n ==> This might destroy existing data! <==")
    if not disk.console.ask("Do you want to proceed?"):
        say("Operation canceled.")
        return 1
    return 0


def _refusal(content: Content, where: Layout, say: Callable[[str], None]) -> str:
    """Why metadata must not be put there, empty when it fits behind what is in use."""
    if where.kind != "internal":
        return f"\nThis would corrupt existing data.\n{_ZERO_FIRST}"
    left_kb = where.usable // 1024
    truncated = (
        "Device size would be truncated, which\n"
        "would corrupt data and result in\n"
        "'access beyond end of device' errors.\n"
    )
    if not content.used_kb:
        say(f"{left_kb:12} kB left usable by current configuration")
        if not content.all_of_it:
            say("Could not determine the size of the actually used data area.\n")
        return truncated + _ZERO_FIRST
    say(f"{content.used_kb:12} kB data area apparently used")
    say(f"{left_kb:12} kB left usable by current configuration")
    if content.used_kb <= left_kb:
        return ""
    return (
        f"\n{truncated}You need to either\n   * use external meta data (recommended)\n"
        "   * shrink that filesystem first\n   * zero out the device (destroy the filesystem)"
    )


def wipe_md(target: Target, console: Console) -> int:
    """Make the metadata unrecognisable, after asking."""

    def work(disk: Disk) -> int:
        try:
            _, where = disk.find()
        except MetadataError as error:
            if error.code != NO_META_DISK_CODE:
                raise
            console.warn("There appears to be no drbd meta data to wipe out?")
            return 0
        if not console.ask("Do you really want to wipe out the DRBD meta data?"):
            console.say("Operation cancelled.")
            return 1
        console.say("Wiping meta data...")
        disk.store.write(where.superblock, bytes(BLOCK_SIZE))
        disk.store.flush()
        console.say("DRBD meta data block successfully wiped out.")
        return 0

    return run(target, console, work)
