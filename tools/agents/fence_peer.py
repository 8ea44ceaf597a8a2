"""`tandem-fence-peer`: the fence-peer handler that puts the peer out, and exits as DRBD expects.

It fences only for a node whose own disks are UpToDate: one that was fenced itself comes back Consistent,
does not know that the peer went on without it, and would shoot the only good copy to become Primary with an
old one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import click

from .devices import DEFAULT_FILE, Device, read_devices
from .handler import Called, FenceResult, HandlerError, called, give_up, log, run_main

PROGRAM: Final = "tandem-fence-peer"


def fence(call: Called, devices: list[Device]) -> FenceResult:
    """Try the devices in turn; what the first one that succeeded says of the peer."""
    if not call.up_to_date:
        log(f"{call.resource}: our own disk is not UpToDate; {call.peer} may have the better data and is not fenced")
        return FenceResult.BROKEN
    log(f"{call.resource}: fencing {call.peer}")
    for device in devices:
        result = device.fence(call)
        if result is not None:
            return result
    log(f"{call.resource}: {call.peer} could not be fenced by any device")
    return FenceResult.BROKEN


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-f", "--file", "path", metavar="FILE", default=DEFAULT_FILE, show_default=True,
              help="The devices that fence each node.")  # fmt: skip
@click.option("--check", metavar="NODE", help="Ask the devices of NODE for their state and fence nobody.")
def command(path: str, check: str | None) -> int:
    """Fence the peer of a resource. The fence-peer handler of tandemd, for drbd.conf:

    handlers { fence-peer "tandem-fence-peer"; }
    """
    try:
        if check is not None:
            call = Called("all", (check,), os.uname().nodename, False)
            answers = [device.probe(call) for device in read_devices(Path(path), call.peers)]
            return 0 if all(answers) else 1
        call = called()
        return fence(call, read_devices(Path(path), call.peers))
    except HandlerError as error:
        return give_up(PROGRAM, error)


def main() -> None:
    """Entry point of ``tandem-fence-peer``."""
    sys.exit(run_main(command, PROGRAM))
