"""The offline metadata tool: drbdmeta's commands on a disk no daemon is using.

Each command is a function that takes the `Target` and a `Console` and returns drbdmeta's exit code; it
prints drbdmeta's messages and asks drbdmeta's questions. The disk is claimed while a command runs, so a
disk that is in use is refused (exit 20). What the bytes mean is decided in `tandem.repl.metadata`; this
module only gathers the commands.
"""

from __future__ import annotations

from .meta_bitmap import apply_al, check_resize, dump_md, restore_md, verify_dump
from .meta_create import create_md, wipe_md
from .meta_disk import Console, Target
from .meta_gi import (
    dstate,
    explain_gi,
    get_gi,
    invalidate,
    outdate,
    read_dev_uuid,
    set_gi,
    show_gi,
    write_dev_uuid,
)

__all__ = [
    "Console",
    "Target",
    "apply_al",
    "check_resize",
    "create_md",
    "dstate",
    "dump_md",
    "explain_gi",
    "get_gi",
    "invalidate",
    "outdate",
    "read_dev_uuid",
    "restore_md",
    "set_gi",
    "show_gi",
    "verify_dump",
    "wipe_md",
    "write_dev_uuid",
]
