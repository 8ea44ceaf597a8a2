"""The commands on the superblock: generation identifiers, flags and the device's own id.

It decides how they are shown and which changes of them are accepted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from tandem.repl.errors import MetadataError
from tandem.repl.metadata import GI_FLAGS, MdFlag, Superblock
from tandem.repl.units import SECTOR

from .meta_disk import Console, Disk, Target, run, size_text

_SHOW_HEAD: Final = """
       +--<  Current data generation UUID  >-
       |               +--<  Bitmap's base data generation UUID  >-
       |               |                 +--<  younger history UUID  >-
       |               |                 |         +-<  older history  >-
       V               V                 V         V"""
_SHOW_TAIL: Final = """\
                                                                    ^ ^ ^ ^ ^ ^ ^
                                      -<  Data consistency flag  >--+ | | | | | |
                             -<  Data was/is currently up-to-date  >--+ | | | | |
                                  -<  Node was/is currently primary  >--+ | | | |
                                  -<  Node was/is currently connected  >--+ | | |
         -<  Node was in the progress of setting all bits in the bitmap  >--+ | |
                        -<  The peer's disk was out-dated or inconsistent  >--+ |
      -<  This node was a crashed primary, and has not seen its peer since   >--+
"""


def explain_gi(gi_line: str) -> str:
    """The picture show-gi draws around a get-gi line."""
    return f"{_SHOW_HEAD}\n{gi_line}\n{_SHOW_TAIL}"


def _flags_line(flags: MdFlag) -> str:
    if not flags & MdFlag.CONSISTENT:
        disk = "Inconsistent"
    else:
        disk = "UpToDate" if flags & MdFlag.WAS_UP_TO_DATE else "Outdated"
    words = [
        ("crashed " if flags & MdFlag.CRASHED_PRIMARY else "")
        + ("Primary" if flags & MdFlag.PRIMARY_IND else "Secondary"),
        "Connected" if flags & MdFlag.CONNECTED_IND else "StandAlone",
        disk,
    ]
    if flags & MdFlag.FULL_SYNC:
        words.append("need full sync")
    if flags & MdFlag.PEER_OUT_DATED:
        words.append("peer Outdated")
    return ", ".join(words)


def get_gi(target: Target, console: Console) -> int:
    def work(disk: Disk) -> int:
        superblock, _ = disk.find()
        console.say(superblock.gi_line())
        return 0

    return run(target, console, work)


def show_gi(target: Target, console: Console) -> int:
    """drbdmeta show-gi: the generation identifiers explained, the flags and the last agreed size."""
    def work(disk: Disk) -> int:
        superblock, where = disk.find()
        console.say(explain_gi(superblock.gi_line()))
        console.say(f"flags: {_flags_line(superblock.flags)}")
        console.say(f"meta-data: {'clean' if superblock.flags & MdFlag.AL_CLEAN else 'need apply-al'}")
        la = min(superblock.la_size_sect, where.usable // SECTOR)
        if la:
            console.say(f"last agreed size: {size_text(la // 2)} ({la} sectors)")
            console.say(f"last agreed max bio size: {superblock.la_peer_max_bio_size} Byte")
        else:
            console.say("zero size device -- never seen peer yet?")
        return 0

    return run(target, console, work)


def dstate(target: Target, console: Console) -> int:
    def work(disk: Disk) -> int:
        console.say(disk.find()[0].dstate())
        return 0

    return run(target, console, work, label=True)


def outdate(target: Target, console: Console) -> int:
    """Say that the data are no longer the newest; exit 5 when they are not even consistent."""

    def work(disk: Disk) -> int:
        superblock, where = disk.find()
        if not superblock.flags & MdFlag.CONSISTENT:
            console.warn("Device is inconsistent.")
            return 5
        disk.write(replace(superblock, flags=superblock.flags & ~MdFlag.WAS_UP_TO_DATE), where)
        return 0

    return run(target, console, work)


def invalidate(target: Target, console: Console) -> int:
    """Say that all data have to be fetched from the peer."""

    def work(disk: Disk) -> int:
        superblock, where = disk.find()
        flags = superblock.flags & ~(MdFlag.CONSISTENT | MdFlag.WAS_UP_TO_DATE) | MdFlag.FULL_SYNC
        disk.write(replace(superblock, flags=flags), where)
        return 0

    return run(target, console, work)


def set_gi(target: Target, console: Console, text: str) -> int:
    """Change the fields of a get-gi line; empty or missing ones stay. Exit 0 also when declined."""

    def work(disk: Disk) -> int:
        superblock, where = disk.find()
        changed = _with_gi(superblock, text)
        console.say(f"previously {superblock.gi_line()}")
        console.say(f"set GI to  {changed.gi_line()}")
        if not console.ask("Write new GI to disk?"):
            console.say("Operation canceled.")
            return 0
        disk.write(changed, where)
        return 0

    return run(target, console, work)


def _with_gi(superblock: Superblock, text: str) -> Superblock:
    names = ("current", "bitmap", "history0", "history1")
    fields = text.strip().split(":")
    if fields[len(names) + len(GI_FLAGS) :] not in ([], [""]):
        raise MetadataError(f"'{text}': a GI has {len(names) + len(GI_FLAGS)} fields.", exit_code=10)
    uuids = {}
    for name, value in zip(names, fields, strict=False):
        if value:
            uuids[name] = parse_uuid(value)
    flags = superblock.flags
    for flag, value in zip(GI_FLAGS, fields[len(names) :], strict=False):
        if value not in ("", "0", "1"):
            raise MetadataError(f"'{value}' is not 0 or 1.", exit_code=10)
        if value:
            flags = flags | flag if value == "1" else flags & ~flag
    return replace(superblock, flags=flags, **uuids)


def parse_uuid(text: str) -> int:
    """A number of up to 16 hexadecimal digits; MetadataError (exit 10) if it is none."""
    digits = text.strip().lower().removeprefix("0x")
    if not digits or len(digits) > 16 or digits.strip("0123456789abcdef"):
        raise MetadataError(f"'{text}' is not a number of up to 16 hexadecimal digits.", exit_code=10)
    return int(digits, 16)


def read_dev_uuid(target: Target, console: Console) -> int:
    def work(disk: Disk) -> int:
        console.say(f"{disk.find()[0].device_uuid:016X}")
        return 0

    return run(target, console, work)


def write_dev_uuid(target: Target, console: Console, text: str) -> int:
    def work(disk: Disk) -> int:
        superblock, where = disk.find()
        disk.write(replace(superblock, device_uuid=parse_uuid(text)), where)
        return 0

    return run(target, console, work)
