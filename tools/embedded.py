"""A whole node in a thread of another program, which offers its volumes itself.

Decides how such a node starts and ends, and how the other threads of that program reach the loop. It is
the daemon without its process: control socket, pid file and log are where `tandemadm` looks for them, and
all commands work. Relies on `Daemon` with a front end that offers nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Final, TypeVar

import uvloop
from tandem.repl.config import ResourceConfig
from tandem.repl.edge.volume import Volume

from .daemon import Daemon, Options, StartError, configured, hold_pid_file
from .exports import export_name
from .paths import PathError
from .process import release

T = TypeVar("T")

STOP_S: Final = 30.0  # the daemon's own limits on its way down add up to less


class _Elsewhere:
    """The front end of a daemon whose volumes somebody else offers."""

    async def apply(self, config: ResourceConfig) -> None:
        """Whoever offers them asks for the volumes when a client comes."""

    async def disconnect(self, drain_s: float) -> None:
        """They are the sessions of whoever offers them, which only that program can end."""

    async def stop(self, drain_s: float) -> None:
        """Whoever offers them has ended its sessions before."""


class EmbeddedNode:
    """One resource of one node, in a thread of its own. `start` and `stop` may be called from any thread."""

    def __init__(self, options: Options, ended: Callable[[], None]) -> None:
        """Reads the configuration; *ended* is called in the node's thread when it is down. StartError."""
        self.options = options
        self.config = configured(options)
        self._ended = ended
        self._started: concurrent.futures.Future[Daemon] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="tandem", daemon=True)
        self._daemon: Daemon | None = None
        self._pid_file = -1

    def start(self) -> None:
        """Attach and connect, as ``tandemd --foreground`` does; StartError with the first refusal."""
        try:
            self.options.paths.make()
        except PathError as error:
            raise StartError(str(error)) from error
        self._log_somewhere()
        self._pid_file = hold_pid_file(self.options.paths, self.config.name)
        self._thread.start()
        self._daemon = self._started.result()

    def stop(self) -> None:
        """Take the resource down and wait for that."""
        if self._daemon is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended by itself
                self._daemon.loop.call_soon_threadsafe(self._daemon.end)
            self._thread.join(STOP_S)

    # ----------------------------------------------------------------------- for the other threads

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._daemon is not None, "the node was not started"
        return self._daemon.loop

    @property
    def names(self) -> dict[str, int]:
        """Export name -> volume number, the default export first."""
        config = self.config if self._daemon is None else self._daemon.config
        return {export_name(config, v): v.number for v in sorted(config.volumes, key=lambda v: v.number)}

    def volume(self, number: int) -> Volume:
        """What to submit to; its methods belong to the loop's thread, see `ask`. KeyError without one."""
        assert self._daemon is not None, "the node was not started"
        return self._daemon.runtime.volume(number)

    def ask(self, work: Coroutine[object, object, T]) -> T:
        """The result of *work*, which runs in the loop's thread. StartError when that has ended."""
        try:
            return asyncio.run_coroutine_threadsafe(work, self.loop).result()
        except (RuntimeError, concurrent.futures.CancelledError) as error:
            work.close()
            raise StartError(f"{self.config.name} is down") from error

    # ----------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except StartError as error:
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            release(self.options.paths.pid(self.config.name), self._pid_file)
            self._ended()

    async def _main(self) -> None:
        daemon = Daemon(self.options, self.config, _Elsewhere())
        daemon.when_ready = lambda: self._started.set_result(daemon)
        await daemon.run()

    def _log_somewhere(self) -> None:
        """A program that went to the background has thrown its stderr away; the log is worth keeping."""
        with contextlib.suppress(OSError):
            if os.fstat(2).st_rdev == os.stat(os.devnull).st_rdev:
                sys.stderr = open(self.options.paths.log(self.config.name), "a", buffering=1)  # noqa: SIM115
