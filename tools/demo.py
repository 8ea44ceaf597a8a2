"""`make demo`: two nodes on this machine to play with, or, with --story, the whole story unattended.

Makes two disks, starts nodes alice and bob on loopback with the same commands an operator would type, shows
the first copy, promotes alice, says what can be tried, and shows both nodes until Ctrl-C. Then it ends what
it started and removes its files.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .client import DaemonError
from .demo_nbd import ConnectionLost, NbdRefused
from .demo_pair import RESOURCE, CommandFailed, Node, Pair, Waited, program
from .demo_story import Broken, Story
from .demo_tree import MissingProgram
from .paths import UNIX_PATH_MAX
from .status import cstate_line, dstate_line, role_line, status_text

if TYPE_CHECKING:
    from rich.console import RenderableType

MIB: Final = 1 << 20
SIZE: Final = 256 * MIB
REFRESH_S: Final = 0.5  # the live view; people read no faster
ROOM: Final = 4 * SIZE  # two disks, the image of a file system, and a copy of it
SOCKET_NAME_MAX: Final = len("/run/alice/r0.nbd")


class NoRoom(Exception):
    """The temporary directory is too small; one sentence."""


Trouble = (Broken, CommandFailed, ConnectionLost, DaemonError, MissingProgram, NbdRefused, NoRoom, Waited)


def say(text: str = "") -> None:
    print(text, flush=True)


# ----------------------------------------------------------------------------------- what can be tried


def environment_line(pair: Pair) -> str:
    """The settings that let the commands below be typed as they are."""
    where = Path(program("tandemadm")[0]).parent
    return (
        f"export PATH={shlex.quote(str(where))}:$PATH TANDEM_CONFIG={shlex.quote(str(pair.config))} "
        f"TANDEM_RUN_DIR={shlex.quote(str(pair.run_dir))}"
    )


def client_lines(pair: Pair) -> list[str]:
    """Commands of NBD clients against the first node's export; each works as it is printed."""
    node, uri = pair.first, shlex.quote(pair.first.uri)
    copy = shlex.quote(str(pair.directory / "copy"))
    return [
        f"nbdinfo {uri}",
        f"nbd-client -l -unix {shlex.quote(str(node.socket))}",
        f"qemu-io -f raw -c 'write -P 0x42 0 1M' -c flush -c 'read -P 0x42 0 1M' {uri}",
        f"qemu-img convert -f raw -O qcow2 {uri} {copy}.qcow2",
        f"nbdcopy {uri} {copy}.raw",
        f"fio --name=demo --ioengine=nbd --uri={uri} --rw=randwrite --bs=4k --iodepth=32 --size=64m "
        "--verify=crc32c",
    ]


def failover_lines(pair: Pair) -> list[str]:
    """Commands that take the first node away and bring it back."""
    one, other = pair.nodes
    return [
        f"tandemadm --node {one.name} status {RESOURCE}",
        f"kill -9 $(cat {shlex.quote(str(one.paths.pid(RESOURCE)))})",
        f"tandemadm --node {other.name} primary {RESOURCE}",
        f"nbdinfo {shlex.quote(other.uri)}",
        f"tandemadm --node {one.name} up {RESOURCE}",
        f"tandemadm --node {one.name} wait-sync {RESOURCE}",
    ]


def advice(pair: Pair) -> str:
    """What the demonstration prints when both nodes are ready."""
    one, other = pair.nodes
    parts = [
        f"The export of {one.name}, mirrored to {other.name}:\n\n    {one.uri}",
        "To try in another terminal (Debian: apt-get install libnbd-bin nbd-client qemu-utils fio):\n\n    "
        + "\n    ".join(client_lines(pair)),
        f"To let {one.name} die and {other.name} take over:\n\n    {environment_line(pair)}\n    "
        + "\n    ".join(failover_lines(pair)),
        f"Logs: {one.paths.log(RESOURCE)}\n      {other.paths.log(RESOURCE)}",
    ]
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------- live view


def node_line(pair: Pair, node: Node) -> str:
    """One line on a node, for output that is no terminal."""
    try:
        status = pair.status(node)
    except DaemonError:
        return f"{node.name}: the daemon does not run"
    volume = status.volumes[0]
    states = (role_line(status, volume), cstate_line(status, volume), dstate_line(status, volume))
    return f"{node.name}: {' '.join(states)}"


def watch(pair: Pair) -> None:
    """Show both nodes until an interrupt: as a live view on a terminal, else one line for each change."""
    if sys.stdout.isatty():
        _watch_live(pair)
    shown: dict[str, str] = {}
    while True:
        for node in pair.nodes:
            line = node_line(pair, node)
            if shown.get(node.name) != line:
                shown[node.name] = line
                say(line)
        time.sleep(REFRESH_S)


def _watch_live(pair: Pair) -> None:
    from rich.live import Live

    with Live(_panels(pair), refresh_per_second=4, transient=True) as live:
        while True:
            time.sleep(REFRESH_S)
            live.update(_panels(pair))


def _panels(pair: Pair) -> RenderableType:
    from rich.columns import Columns
    from rich.panel import Panel
    from rich.text import Text

    from .adm_query import colored

    def text(node: Node) -> str:
        try:
            return colored(status_text(pair.status(node), statistics=True, terminal=True)).rstrip()
        except DaemonError:
            return f"The daemon does not run.\nStart it: tandemadm --node {node.name} up {RESOURCE}"

    panels = [Panel(Text.from_ansi(text(node)), title=node.name, width=64) for node in pair.nodes]
    return Columns([*panels, Text("Ctrl-C ends it all and removes the files.")])


# ---------------------------------------------------------------------------------------------- begin


def show(pair: Pair) -> None:
    """Bring the pair up before the user's eyes, then watch it until Ctrl-C."""
    one, other = pair.nodes
    say(f"Two disks of {pair.size // MIB} MiB and their metadata, in {pair.directory}")
    pair.create()
    say(f"Nodes {one.name} (127.0.0.1:{one.port}) and {other.name} (127.0.0.1:{other.port})")
    pair.up()
    say(f"{one.name} becomes Primary; its disk is the good one, so it is copied to {other.name}")
    pair.adm(one, "primary", "--force", RESOURCE)
    wait = [*pair.command(one, "wait-sync", RESOURCE)]
    if subprocess.run(wait, stdin=subprocess.DEVNULL, check=False).returncode:
        raise CommandFailed(f"{one.name}: the first copy did not end well")
    say(f"Both disks are UpToDate.\n\n{advice(pair)}\n\nCtrl-C ends it all and removes the files.\n")
    watch(pair)


def new_directory() -> Path:
    """A fresh directory whose sockets have short enough names, in TMPDIR if that is short itself."""
    wanted = Path(tempfile.mkdtemp(prefix="tandem-"))
    if len(os.fsencode(wanted)) + SOCKET_NAME_MAX <= UNIX_PATH_MAX:
        return wanted
    wanted.rmdir()
    return Path(tempfile.mkdtemp(prefix="tandem-", dir="/tmp"))


def check_room(directory: Path, n_bytes: int) -> None:
    """NoRoom when fewer than *n_bytes* are free where *directory* is."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes:
        raise NoRoom(
            f"{free // MIB} MiB are free in {directory.parent}, {n_bytes // MIB} are needed; "
            "name a larger place with TMPDIR"
        )


@contextmanager
def interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the work as Ctrl-C does; afterwards none of them does anything.

    What follows the work is the clean-up, which ends by itself and must not be cut short.
    """

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


def run(story: bool, seed: int) -> int:
    """The demonstration in a fresh directory; the exit code."""
    with Pair(new_directory(), SIZE) as pair:
        try:
            check_room(pair.directory, ROOM)
            with interruptible():
                if story:
                    Story(pair, seed, say).play()
                else:
                    show(pair)
        except KeyboardInterrupt:
            say("\nEnding.")
            return 130 if story else 0
        except Trouble as error:
            said = "" if isinstance(error, MissingProgram | NoRoom) else f"\n{pair.logs()}"
            say(f"\n{type(error).__name__}: {error}{said}")
            return 1
    return 0


def main() -> None:
    """Entry point of ``python -m tandem.tools.demo``."""
    parser = argparse.ArgumentParser(description="Two mirrored nodes on this machine.")
    parser.add_argument("--story", action="store_true", help="play the story unattended; exit 0 if it held")
    parser.add_argument("--seed", type=int, default=None, help="the story's seed; a new one otherwise")
    options = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if options.seed is None else options.seed
    sys.exit(run(options.story, seed))


if __name__ == "__main__":
    main()
