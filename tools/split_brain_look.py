"""`split-brain --look`: both nodes' histories as read-only NBD exports, side by side on one socket.

An export ``RES@NODE`` (``RES/VOL@NODE`` for further volumes) is what lies on that node's disk, read beside
its daemon, so a Secondary that stands alone can be looked at as well. It is crash-consistent: what a host
would find after a power cut. A disk that a Primary writes meanwhile changes under the view. Nothing is ever
written. One thread asks the nodes, so that a slow link holds up nobody but those who look.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from tandem.nbd.server import Server, ServerError
from tandem.repl.requests import Op, Request

from .split_brain_node import Answers, SplitBrainError

ALLOCATED: Final = 0  # base:allocation of the NBD protocol: neither hole nor zeros


class View:
    """One volume of one node, as front ends see it. Implements `tandem.repl.edge.volume.Volume`."""

    rotational = False
    number = 0  # what a request carries; a view has only itself
    paused = False

    def __init__(
        self, name: str, size: int, description: str, read: Callable[[int, int], bytes],
        worker: concurrent.futures.Executor,
    ) -> None:  # fmt: skip
        self.name = name
        self.size = size
        self.description = description
        self._read = read
        self._worker = worker

    def on_resume(self, callback: Callable[[], None]) -> None:
        """It is never paused."""
        callback()

    def open(self, writable: bool) -> str | None:
        assert not writable, "the socket of a view is read-only"
        return None

    def close(self, writable: bool) -> None:
        """Nobody counts."""

    def submit(self, batch: list[Request]) -> None:
        loop = asyncio.get_running_loop()
        for request in batch:
            if request.op == Op.READ:
                answer = self._worker.submit(self._fetch, request)
                answer.add_done_callback(lambda _, r=request: loop.call_soon_threadsafe(r.owner.finished, [r]))  # type: ignore[misc]
            else:
                request.error = 0 if request.op == Op.FLUSH else errno.EPERM
                loop.call_soon(request.owner.finished, [request])

    def _fetch(self, request: Request) -> None:
        try:
            request.payload = self._read(request.offset, request.length)
        except SplitBrainError:
            request.error = errno.EIO

    async def allocation(self, offset: int, length: int, max_extents: int) -> list[tuple[int, int]]:
        return [(min(length, self.size - offset), ALLOCATED)]


def views_of(resource: str, nodes: tuple[Answers, ...], worker: concurrent.futures.Executor) -> list[View]:
    """The exports: every volume of every node."""
    views = []
    for node in nodes:
        side = node.describe()
        for volume in side.volumes:
            first = volume.number == min(v.number for v in side.volumes)
            name = resource if first else f"{resource}/{volume.number}"

            def read(offset: int, length: int, node: Answers = node, number: int = volume.number) -> bytes:
                return node.read(number, [(offset, length)])

            views.append(View(f"{name}@{side.node}", volume.size, f"{side.role}, read-only view", read, worker))
    return views


async def serve(path: Path, resource: str, nodes: tuple[Answers, ...], say: Callable[[str], None]) -> None:
    """Export the views on the Unix socket *path* until SIGINT or SIGTERM. SplitBrainError."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    with concurrent.futures.ThreadPoolExecutor(1) as worker:
        views = views_of(resource, nodes, worker)
        server = Server(lambda: views)
        try:
            await server.start(unix=str(path), read_only=True)
        except ServerError as error:
            raise SplitBrainError(str(error)) from error
        for view in views:
            say(f"{view.name:<20} nbd+unix:///{view.name}?socket={path}   ({view.description})")
        say("A file system that was in use is mounted with: -o ro,noload (ext4), -o ro,norecovery (xfs).")
        say("Ctrl-C ends both exports.")
        await ended.wait()
        await server.stop()


def run(path: Path, resource: str, nodes: tuple[Answers, ...], say: Callable[[str], None]) -> None:
    """`serve` in a loop of its own, for a command that has none."""
    asyncio.run(partial(serve, path, resource, nodes, say)())
