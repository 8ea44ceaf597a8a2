"""A whole node inside nbdkit: ``nbdkit python …/nbdkit_plugin.py resource=r0 config=/etc/tandem.conf``.

nbdkit has the clients, its filters and TLS; this script has the node, in a thread that begins after nbdkit
has forked. nbdkit runs the script as ``__main__`` in an interpreter of its own, which may know nothing of
the environment the project was installed into: `_find_packages` looks for it. Callbacks and their
arguments are those of nbdkit-python-plugin(3), API version 2.

A program like those in tools/, it stands outside the rooms and may import from all of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import site
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, NoReturn

import nbdkit


def _find_packages() -> None:
    """Make ``import tandem`` work: installed for this interpreter, in VIRTUAL_ENV, or around this file."""
    here = Path(__file__).resolve()
    inside = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    places = [here.parents[2], here.parents[1] / ".venv" / inside]  # installed there, or a checkout
    if os.environ.get("VIRTUAL_ENV"):
        places.insert(0, Path(os.environ["VIRTUAL_ENV"]) / inside)
    for place in places:
        if place.name == "site-packages" and place.is_dir():
            site.addsitedir(str(place))


def _why_not(error: ImportError) -> str:
    """What is wrong with the interpreter or its environment, and what to do."""
    version = sys.version.split()[0]
    if "lib-dynload" in Path(error.path or "").parts:  # of the standard library itself
        return (
            f"nbdkit's Python {version} cannot load the library of another Python, which it has found in "
            f"{sys.base_prefix} by PATH or PYTHONHOME ({error}): start nbdkit without PYTHONHOME and with its own "
            "Python first in PATH, such as PATH=/usr/bin:$PATH"
        )
    named = os.environ.get("VIRTUAL_ENV")
    return (
        f"{error}, looked for with nbdkit's Python {version}{f' and VIRTUAL_ENV={named}' if named else ''}: install "
        "Tandem for it, or name with VIRTUAL_ENV a virtual environment of the same Python version that has Tandem"
    )


try:
    import tandem.tools.embedded  # noqa: F401
except ImportError:
    _find_packages()

try:
    from tandem.nbd.blocking import BlockingVolume
    from tandem.nbd.codec import BLOCK_MIN, BLOCK_PREFERRED, PAYLOAD_MAX
    from tandem.repl.requests import FUA, MAY_UNMAP, Op
    from tandem.tools.daemon import Options, StartError
    from tandem.tools.embedded import EmbeddedNode
    from tandem.tools.paths import NodePaths, default_config, default_node, default_run_dir
except ImportError as error:
    sys.exit(f"tandem: {_why_not(error)}")

API_VERSION: Final = 2
PARAMETERS: Final = ("resource", "config", "node", "run-dir")

parameters: dict[str, str] = {}
nodes: list[EmbeddedNode] = []  # the one node, once the configuration is read
volumes: dict[int, BlockingVolume] = {}
handles: set[Open] = set()  # of the connections that are open


class Open:
    """The handle of one connection: the volume, and whether it was opened for writing."""

    def __init__(self, blocking: BlockingVolume, writable: bool) -> None:
        self.blocking = blocking
        self.writable = writable


class Refused(Exception):
    """A client's request that is not granted: its sentence is all there is to say."""


_format_exception = traceback.format_exception


def _format(kind: Any, *args: Any, **options: Any) -> list[str]:
    """What nbdkit calls to put an exception into its log: for a refusal, only the sentence."""
    if args and isinstance(args[0], Refused):
        return [str(args[0])]
    return _format_exception(kind, *args, **options)


traceback.format_exception = _format


def _give_up(text: str) -> NoReturn:
    """End nbdkit, which has not begun to serve, with one sentence."""
    sys.stderr.write(f"tandem: {text}\n")
    sys.stderr.flush()
    os._exit(1)


def _node() -> EmbeddedNode:
    assert nodes, "nbdkit calls config_complete before anything that needs the node"
    return nodes[0]


# ------------------------------------------------------------------------------------------ the server


def thread_model() -> int:
    """All of nbdkit's threads may call at once; they meet in `BlockingVolume`."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def dump_plugin() -> None:
    """For ``nbdkit --dump-plugin``."""
    print(f"tandem_parameters={','.join(PARAMETERS)}")


def config(key: str, value: str) -> None:
    """One ``key=value`` of nbdkit's command line."""
    if key not in PARAMETERS:
        _give_up(f"unknown parameter '{key}'; there are {', '.join(PARAMETERS)}")
    parameters[key] = value


def config_complete() -> None:
    """Read the resource's configuration while nbdkit can still say that it is wrong."""
    if "resource" not in parameters:
        _give_up("which resource? Say resource=NAME")
    file = parameters.get("config") or default_config()
    run_dir = Path(parameters.get("run-dir") or default_run_dir()).absolute()
    paths = NodePaths(run_dir, parameters.get("node") or default_node())
    os.environ |= {"TANDEM_CONFIG": file, "TANDEM_NODE": paths.node, "TANDEM_RUN_DIR": str(run_dir)}
    try:
        nodes.append(EmbeddedNode(Options(parameters["resource"], file, paths, False, -1), _ended))
    except StartError as error:
        _give_up(str(error))


def after_fork() -> None:
    """Begin: threads do not survive a fork, so not earlier."""
    node = _node()
    try:
        node.start()
    except StartError as error:
        _give_up(str(error))

    async def offered() -> None:
        for number in node.names.values():
            volumes[number] = BlockingVolume(node.loop, node.volume(number))

    node.ask(offered())


def _ended() -> None:
    """The node is down, by `tandemadm down` or by `cleanup`: nbdkit has nothing to serve any more."""
    for blocking in volumes.values():
        blocking.shut_down()
    nbdkit.shutdown()


def cleanup() -> None:
    """nbdkit ends, and no call is under way: take the resource down.

    Who was connected when nbdkit was told to end is gone, but nbdkit did not say so: it closes no handles then.
    """
    with contextlib.suppress(StartError):  # the node went down by itself, and has nothing open any more
        while handles:
            close(next(iter(handles)))
    if nodes:
        nodes[0].stop()


# ------------------------------------------------------------------------------------------- exports


def list_exports(readonly: int, is_tls: int) -> Iterable[tuple[str, str]]:
    """The volumes by name, with role and disk state."""
    node = _node()

    async def described() -> list[tuple[str, str]]:
        return [(name, node.volume(number).description) for name, number in node.names.items()]

    return node.ask(described())


def default_export(readonly: int, is_tls: int) -> str:
    """The first volume is for whoever names none."""
    return next(iter(_node().names))


def open(readonly: int) -> Open:
    """A client comes; refused with DRBD's sentence where it may not have the volume (a Secondary's, …)."""
    node = _node()
    name = nbdkit.export_name()
    number = node.names.get(name) if name else next(iter(node.names.values()))
    if number is None:
        nbdkit.set_error(errno.ENOENT)
        raise Refused(f"no export is called '{name}'; there are {', '.join(node.names)}")
    handle = Open(volumes[number], not readonly)

    async def opened() -> str | None:
        return handle.blocking.volume.open(handle.writable)

    refusal = node.ask(opened())
    if refusal is not None:
        nbdkit.set_error(errno.EROFS if handle.writable else errno.EACCES)
        raise Refused(refusal)
    handles.add(handle)
    return handle


def close(handle: Open) -> None:
    """The client has gone."""

    async def closed() -> None:
        handle.blocking.volume.close(handle.writable)

    handles.discard(handle)
    _node().ask(closed())


def export_description(handle: Open) -> str:
    """Role and disk state."""
    return dict(list_exports(0, 0))[next(n for n, v in _node().names.items() if v == handle.blocking.volume.number)]


def get_size(handle: Open) -> int:
    """Bytes, as the volume is now; a session keeps the size it began with."""
    return handle.blocking.volume.size


def block_size(handle: Open) -> tuple[int, int, int]:
    """Minimum, preferred, maximum."""
    return BLOCK_MIN, BLOCK_PREFERRED, PAYLOAD_MAX


def is_rotational(handle: Open) -> bool:
    """Whether the backing device is a spinning disk."""
    return handle.blocking.volume.rotational


def can_write(handle: Open) -> bool:
    """What `open` was asked for."""
    return handle.writable


def can_multi_conn(handle: Open) -> bool:
    """A flush on one connection covers what was answered on all of them."""
    return True


def can_flush(handle: Open) -> bool:
    """Yes: stable on every disk in the mirror."""
    return True


def can_trim(handle: Open) -> bool:
    """Yes; what was trimmed reads as zeroes, so that both disks stay identical."""
    return True


def can_zero(handle: Open) -> bool:
    """Yes, without sending the zeroes."""
    return True


def can_fast_zero(handle: Open) -> bool:
    """No: the peer may have to write the zeroes."""
    return False


def can_fua(handle: Open) -> int:
    """FUA is the machine's own."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(handle: Open) -> int:
    """nbdkit reads the range and forgets it, which brings it into the page cache of the disk that serves it."""
    return int(nbdkit.CACHE_EMULATE)


def can_extents(handle: Open) -> bool:
    """Holes of an UpToDate local disk."""
    return True


# ---------------------------------------------------------------------------------------------- data


def _failed(error: OSError) -> NoReturn:
    nbdkit.set_error(error.errno or errno.EIO)
    raise Refused(error.strerror) from error


def _fua(flags: int) -> int:
    return FUA if flags & nbdkit.FLAG_FUA else 0


def pread(handle: Open, buf: bytearray, offset: int, flags: int) -> None:
    """Fill *buf* from *offset*."""
    try:
        handle.blocking.read(offset, buf)
    except OSError as error:
        _failed(error)


def pwrite(handle: Open, buf: bytearray, offset: int, flags: int) -> None:
    """Write *buf* at *offset*; with FUA it is stable on both disks."""
    try:
        handle.blocking.write(offset, buf, _fua(flags))
    except OSError as error:
        _failed(error)


def flush(handle: Open, flags: int) -> None:
    """What was answered before becomes stable on both disks."""
    try:
        handle.blocking.flush()
    except OSError as error:
        _failed(error)


def trim(handle: Open, count: int, offset: int, flags: int) -> None:
    """Punch a hole, here and at the peer."""
    try:
        handle.blocking.discard(Op.TRIM, offset, count, _fua(flags))
    except OSError as error:
        _failed(error)


def zero(handle: Open, count: int, offset: int, flags: int) -> None:
    """Write zeroes, here and at the peer."""
    may_unmap = MAY_UNMAP if flags & nbdkit.FLAG_MAY_TRIM else 0
    try:
        handle.blocking.discard(Op.ZEROES, offset, count, _fua(flags) | may_unmap)
    except OSError as error:
        _failed(error)


def extents(handle: Open, count: int, offset: int, flags: int) -> Iterable[tuple[int, int, int]]:
    """(offset, length, type) from *offset* on; the types are NBD's base:allocation bits, as nbdkit's are."""
    n_max = 1 if flags & nbdkit.FLAG_REQ_ONE else 1024
    found = _node().ask(handle.blocking.volume.allocation(offset, count, n_max))
    runs = []
    for length, kind in found:
        runs.append((offset, length, kind))
        offset += length
    return runs
