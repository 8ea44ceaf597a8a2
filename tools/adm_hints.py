"""What to do next, for each refusal: DRBD's number → one sentence of ours.

The machine may give its own hint with a `Refusal`; this table speaks when it does not. ``{res}`` is the
resource, ``{vol}`` the resource or ``resource/volume``.
"""

from __future__ import annotations

from typing import Final

from tandem.repl.errors import Refusal

HINTS: Final[dict[int, str]] = {
    -1: "The peer is Primary. Demote it first (tandemadm secondary {res} there), or set allow-two-primaries.",
    -2: "Neither this disk nor the peer's is UpToDate. Connect to the peer that has the data; "
    "only if this disk has the data you want: tandemadm primary --force {res}",
    -4: "Attach the disk first: tandemadm attach {vol}",
    -5: "The peer has no disk. Attach it there: tandemadm attach {vol}",
    -6: "A connected disk cannot be outdated. Disconnect first: tandemadm disconnect {res}",
    -7: "The fence-peer handler has not outdated the peer. Make sure the peer is down, "
    "or look at the handler; its exit code is in the log.",
    -8: "A resync or verify is running. Wait for it: tandemadm wait-sync {res}",
    -9: "There is no connection to end.",
    -10: "The peer needs this node's data. Look at the peer: tandemadm status {res}",
    -11: "Attach the disk first: tandemadm attach {vol}",
    -12: "Disconnect the NBD clients first (umount, nbd-client -d, stop the virtual machine).",
    -13: "Configure the connection first: tandemadm connect {res}",
    -14: "Set verify-alg in the net section and apply it on both nodes: tandemadm adjust {res}",
    -15: "Connect first: tandemadm connect {res}",
    -16: "The disk is Inconsistent or not there, which is worse than Outdated; nothing needs to be done.",
    -17: "Use a version on the peer that supports this command.",
    -18: "Try again in a moment.",
    -19: "Try again in a moment.",
    -20: "Demote the other volumes on the peer first: tandemadm secondary {res} there.",
    102: "The resource is connected or connecting already, or another process uses the address; see: "
    "tandemadm cstate {res}",
    103: "Another resource talks to this peer address. Give each resource its own port.",
    104: "Look at the disk statement: the device or file must exist and be writable, and not be in use.",
    105: "Look at the meta-disk statement: the device or file must exist and be writable.",
    111: "Use a larger disk, or the size the peer has.",
    112: "Use a larger metadata device, or internal metadata.",
    114: "Unmount it, or end whoever uses it.",
    115: "Unmount it, or end whoever uses it.",
    118: "Look at the disk; the metadata could not be read or written.",
    119: "Use 'tandemadm create-md {vol}' to initialize the metadata area.",
    120: "Use a digest this system knows, for example sha1 or sha256.",
    123: "Demote first: tandemadm secondary {res}",
    124: "The disk is attached. Detach it first: tandemadm detach {vol}",
    125: "Disconnect first: tandemadm disconnect {res}",
    127: "Create it first: tandemadm new-minor {res}",
    130: "Wait for the resync: tandemadm wait-sync {res}",
    131: "Promote one node first: tandemadm primary {res}",
    134: "The resync is paused already.",
    135: "The resync is not paused.",
    138: "Attach the disk first: tandemadm attach {vol}",
    139: "Set protocol C in the net section of both nodes.",
    150: "The data here is not what was lost last. Connect and become Secondary first.",
    151: "Disconnect first: tandemadm disconnect {res}",
    154: "Use protocol B or C, or another fencing policy.",
    155: "Use protocol A, or on-congestion block.",
    158: "Start it first: tandemadm up {res}",
    162: "There is no such connection. Connect first: tandemadm connect {res}",
    165: "Apply the activity log first: tandemadm apply-al {vol}",
    170: "The disk has become smaller. Give --size to shrink on purpose, or restore the disk's size.",
}


# The same refusal may need other advice after another command.
COMMAND_HINTS: Final[dict[tuple[str, int], str]] = {
    ("detach", -2): "This node is Primary and needs the disk, because the peer cannot give it the data. "
    "Demote it first (tandemadm secondary {res}), or connect it to an UpToDate peer.",
    ("outdate", -2): "A Primary cannot be outdated. Demote it first: tandemadm secondary {res}",
    ("invalidate", -2): "The peer has no UpToDate data to copy from. Look at both disks: "
    "tandemadm status {res}",
    ("invalidate-remote", -2): "This node has no UpToDate data to copy to the peer. Look at both disks: "
    "tandemadm status {res}",
}


DISK_TROUBLE: Final = frozenset((104, 105, 111, 112, 114, 115, 118, 119))


def hint(refusal: Refusal, resource: str, volume: int | None, command: str = "") -> str:
    """The sentence to print after *refusal* of *command*; empty when there is nothing to say.

    What is known about the command goes first, then what the machine says, then what is always true. A
    disk that cannot be used needs both: what is wrong with it, and what to do.
    """
    name = resource if volume is None else f"{resource}/{volume}"
    general = HINTS.get(refusal.code, "")
    chosen = COMMAND_HINTS.get((command, refusal.code), "") or refusal.hint or general
    if refusal.code in DISK_TROUBLE and refusal.hint:
        chosen = f"{refusal.hint}\n{general}"
    return chosen.replace("{res}", resource).replace("{vol}", name)
