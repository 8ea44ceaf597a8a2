"""`tandemadm split-brain`: see what happened, look at both histories, keep one, restore the other.

Only the command line is here; `split_brain_run` does it, and is imported when it is needed, because numpy
is slow to import.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from .adm_script import call_handler
from .adm_session import Quit, Session, Target
from .adm_verbs import Option, verb
from .drbd_names import called_as

RSH_VARIABLE: Final = "TANDEM_RSH"


@verb(
    "split-brain", "After a split brain: who changed what, and the way out.",
    Option("--keep", "Node whose data is kept; the other's history is saved, then resynchronized.", "text"),
    Option("--save", "File to save the other history in (default: in the state directory).", "text"),
    Option("--whole", "Save all of the other node's data, not only what will be overwritten."),
    Option("--restore", "Rebuild a saved history as an image.", "text"),
    Option("--image", "Image file to make with --restore (default: FILE.img).", "text"),
    Option("--look", "Export both histories read-only over NBD until Ctrl-C."),
    Option("--rsh", f"How to run a command on the peer (default: ${RSH_VARIABLE}, or ssh).", "text"),
    scope="volume",
)  # fmt: skip
def split_brain(
    session: Session, target: Target, keep: str | None, save: str | None, whole: bool, restore: str | None,
    image: str | None, look: bool, rsh: str | None,
) -> int:  # fmt: skip
    if called_as() == "drbdadm":
        return call_handler("split-brain", session, target)
    from . import split_brain_run as run

    _check_options(keep, save, whole, restore, image, look)
    rsh = os.environ.get(RSH_VARIABLE, "") if rsh is None else rsh
    if restore is not None:
        return run.restore(session, target, restore, image, rsh)
    if keep is not None:
        return run.keep(session, target, keep, save, whole, rsh)
    return run.look(session, target, rsh) if look else run.show(session, target, rsh)


def _check_options(
    keep: str | None, save: str | None, whole: bool, restore: str | None, image: str | None, look: bool
) -> None:
    if (keep is not None) + (restore is not None) + look > 1:
        raise Quit(2, "--keep, --restore and --look are three different things; give one of them")
    if keep is None and (save is not None or whole):
        raise Quit(2, "--save and --whole belong to --keep: tandemadm split-brain RES --keep NODE --save FILE")
    if restore is None and image is not None:
        raise Quit(2, "--image belongs to --restore: tandemadm split-brain RES --restore FILE --image FILE")


@verb("sh-split-brain", "Answer the questions of the other node's split-brain command.", hidden=True)
def sh_split_brain(session: Session, target: Target) -> int:
    from .split_brain_wire import serve

    serve(session, target.resource, sys.stdin.buffer, sys.stdout.buffer)
    return 0
