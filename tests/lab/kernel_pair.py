"""A pair of kernel DRBD nodes in two guests, and commands that run there: a program for `make bench`.

`python -m tests.lab.kernel_pair MIB` starts both guests and one resource with protocol C, in sync, Primary on the
first, and then says "ready" on a line. Every line it reads is a command as a JSON list; the answer is a line with
[status, output, errors] of it, run in the Primary's guest. The guests end with it, and it with its standard input.

It is a process of its own because the guests' networks are a namespace that the process of the lab enters.
"""

from __future__ import annotations

import json
import sys
from typing import Final

from .nodes import RES, KernelNode, resource_text, wait_state
from .uml import Lab

COMMAND_S: Final = 300.0
MEMORY: Final = "512M"


def main() -> None:
    size = (int(sys.argv[1]) + 8) << 20  # the last megabytes are for the metadata
    with Lab() as lab:
        nodes = [KernelNode(lab.guest(name, [lab.disk(name, size)], MEMORY)) for name in ("alice", "bob")]
        alice, bob = nodes
        (lab.shared / "drbd.conf").write_text(resource_text(alice, bob, 1, "net { protocol C; }"))
        for node in nodes:
            node.boot()
            node.adm("create-md", "--force", RES)
            node.adm("up", RES)
        wait_state(alice, cs="Connected")
        alice.adm("new-current-uuid", "--clear-bitmap", f"{RES}/0")
        wait_state(alice, disk="UpToDate", pdsk="UpToDate")
        alice.adm("primary", RES)
        print("ready", flush=True)
        for line in sys.stdin:
            ran = alice.guest.run(*json.loads(line), check=False, limit_s=COMMAND_S)
            print(json.dumps([ran.rc, ran.out, ran.err]), flush=True)


if __name__ == "__main__":
    main()
