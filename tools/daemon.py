"""`tandemd`: one resource, one process, one loop.

Puts the parts together: the runtime with the machine inside, the NBD server in front of it, the control
socket beside it. Decides when the process starts and ends, and what is written to the log. Only this
module knows about signals and the pid file, whose lock says that the daemon lives.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, Protocol

import click
import uvloop
from tandem.nbd.server import Gate
from tandem.repl.config import ResourceConfig, VolumeConfig
from tandem.repl.edge.runtime import Runtime
from tandem.repl.edge.volume import Volume
from tandem.repl.errors import Refusal
from tandem.repl.events import Notify, ResourceStatus, StateChanged

from .adm_hints import hint
from .conf import check
from .control import ControlServer, Done, refusal_answer
from .exports import DeviceError, Exports
from .journal import Journal
from .paths import NodePaths, PathError, default_config, default_node, default_run_dir
from .process import Held, hold, release, tell_ready, tell_starter, try_lock
from .values import Json, pack, unpack

DRAIN_S: Final = 5.0  # NBD requests that were read get this long to be answered when the daemon ends
DOWN_S: Final = 10.0  # the peer's answers and the last metadata writes get this long on a signal
EXIT_INTERNAL: Final = 42  # drbdsetup's code for our own mistakes
EXIT_FAILED: Final = 20  # and for what could not be executed

GC_THRESHOLD: Final = (50_000, 50, 1000)
# A full collection walks everything the machine holds and stops the loop that long. The data plane
# makes no cycles, so collections may be rare.

COMMANDS: Final = frozenset(
    (
        "attach", "detach", "connect", "disconnect", "primary", "secondary", "invalidate",
        "invalidate-remote", "outdate", "pause-sync", "resume-sync", "suspend-io", "resume-io",
        "new-current-uuid", "resize", "verify", "write-bitmap", "down",
    )
)  # fmt: skip


INVALID: Final = "Invalid configuration request"  # drbdsetup's sentence for 162
TURN_S: Final = 5.0  # a client that is to promote waits that long for a tandemadm that changes the resource
TURN_STEP_S: Final = 0.05
LISTEN_S: Final = 0.05  # binding a socket takes microseconds; the loop may be busy with other things first
GOING_ALONE: Final = "going StandAlone: "  # how the machine begins to say why it gave up the connection
LINKED: Final = "the peer was there"
FRESH_S: Final = 0.03  # how long the control thread waits for the loop to count; then it says what it knows


class StartError(Exception):
    """The daemon cannot run; one sentence for the operator, and the exit code."""

    def __init__(self, text: str, code: int = EXIT_FAILED) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class Options:
    """The command line of `tandemd`."""

    resource: str
    config_file: str
    paths: NodePaths
    background: bool  # started by tandemadm, which sends the configuration and all commands
    ready_fd: int


# --------------------------------------------------------------------------------------------- log


def log(subject: str, text: str, level: str = "info") -> None:
    """One line to stderr, which is the log file of a daemon in the background."""
    mark = "" if level == "info" else f"{level}: "
    stamp = datetime.now().astimezone().isoformat(timespec="microseconds")
    with contextlib.suppress(OSError):  # a full disk or a closed terminal must not end replication
        sys.stderr.write(f"{stamp} {subject}: {mark}{text}\n")
        sys.stderr.flush()


def log_notify(notify: Notify) -> None:
    """A notification of the machine in DRBD's phrase, with the cause behind it."""
    log(notify.subject, f"{notify.text} ({notify.why})" if notify.why else notify.text, notify.level)


def log_refusal(config: ResourceConfig, refusal: Refusal, volume: int | None, command: str) -> None:
    subject = config.name if volume is None else f"{config.name}/{volume}"
    log(subject, f"{command} refused: {sentence(config, refusal, volume, command)}", "error")


def sentence(config: ResourceConfig, refusal: Refusal, volume: int | None, command: str) -> str:
    """A refusal on one line: number, what is wrong, what to do."""
    what = f"({refusal.code}) {refusal.text}"
    stop = "" if what.endswith((".", "?", "!")) else "."
    advice = hint(refusal, config.name, volume, command).replace("\n", " ")
    return f"{what}{stop} {advice}".rstrip()


# ---------------------------------------------------------------------------------------- pid file


def hold_pid_file(paths: NodePaths, resource: str) -> int:
    """Lock the pid file for the life of this process; its descriptor. StartError when a daemon has it."""
    path = paths.pid(resource)
    try:
        return hold(path)
    except OSError as error:
        raise StartError(f"cannot open {path}: {error.strerror}") from error
    except Held as held:
        raise StartError(f"the daemon of this resource is running already (pid {held.pid})") from None


# ------------------------------------------------------------------------------------------ daemon


class FrontEnd(Protocol):
    """Where the volumes of a resource are offered: `Exports`, or the program that the node lives in."""

    async def apply(self, config: ResourceConfig) -> None:
        """Offer exactly the volumes of *config*; DeviceError says what cannot be."""

    async def disconnect(self, drain_s: float) -> None:
        """End the clients' sessions; requests that were taken get *drain_s* seconds to be answered."""

    async def stop(self, drain_s: float) -> None:
        """Offer nothing more; requests that were taken get *drain_s* seconds to be answered."""


@contextlib.asynccontextmanager
async def lock_in_time(path: Path) -> AsyncIterator[bool]:
    """Hold the lock of the commands that change a resource; False when it does not become free in TURN_S seconds."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield False
        return
    try:
        deadline = time.monotonic() + TURN_S
        while not (locked := try_lock(fd)) and time.monotonic() < deadline:
            await asyncio.sleep(TURN_STEP_S)
        yield locked
    finally:
        os.close(fd)


class AutoPromote(Gate):
    """auto-promote: a client that wants to write makes this node Primary before its export is opened.

    Asking about an export promotes nobody: on a node that is alone that would be a generation of its own.
    """

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._promotions: set[asyncio.Task[None]] = set()

    def promises(self, volume: Volume) -> bool:
        return self._wanted() and volume.size > 0 and self._daemon.runtime.status().may_promote

    def prepare(self, volume: Volume, then: Callable[[str], None]) -> bool:
        if not self._wanted():
            return False
        task = self._daemon.loop.create_task(self._promote(volume.number, then))
        self._promotions.add(task)
        task.add_done_callback(self._promotions.discard)
        return True

    def _wanted(self) -> bool:
        return self._daemon.config.options.auto_promote and self._daemon.runtime.status().role != "Primary"

    async def _promote(self, volume: int, then: Callable[[str], None]) -> None:
        """Takes turns with tandemadm: nothing may be written where split-brain --keep has just saved what is there."""
        name = self._daemon.config.name
        async with lock_in_time(self._daemon.options.paths.lock(name)) as locked:
            if not locked:
                then(f"Opening it promotes, but tandemadm is changing {name} just now: try again.")
                return
            refusal = await self._daemon.command("primary", None, {"auto": True})
        then("" if refusal is None else f"Opening it promotes, but that was refused: {refusal.text}.")
        # Should the client be gone: nobody has opened, so nobody will close.
        self._daemon.runtime.volume(volume).recount()


class Daemon:
    """The life of one resource. `run` is the loop's main coroutine.

    Without *front* the volumes are offered where their ``device`` says, and the process is ours, with its
    signals; with it the process is another program's, which offers them and calls `end`.
    """

    def __init__(self, options: Options, config: ResourceConfig, front: FrontEnd | None = None) -> None:
        self.options = options
        self.config = config
        self.runtime = Runtime(config)
        self.own_process = front is None
        self.exports: FrontEnd = front or Exports(
            options.paths.nbd(config.name), self.runtime.volume, lambda text: log(config.name, text), AutoPromote(self)
        )
        self.control = ControlServer(options.paths.control(config.name), self)
        self.loop = asyncio.get_running_loop()
        self.when_ready: Callable[[], None] = self._tell_starter
        self.ended = asyncio.Event()
        self.code = 0
        self._asked_to_end = False
        self._why_alone = ""  # why the connection was given up last
        self.journal = Journal(
            options.paths.journal(config.name), lambda text: log(config.name, text, "warning")
        )

    # --------------------------------------------- what the control thread asks (control.Backend)

    def hello(self) -> Json:
        return {
            "pid": os.getpid(), "resource": self.config.name, "node": self.config.node,
            "file": self.config.file, "config": pack(self.config),
        }  # fmt: skip

    def status(self) -> ResourceStatus:
        """The status with its counters as they are now, or, when the loop is busy, as they were last."""
        counted = threading.Event()

        def count() -> None:
            self.runtime.status()
            counted.set()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(count)
            counted.wait(FRESH_S)
        return self.runtime.status()

    def post(self, request: Json, done: Done) -> None:
        """Check a request in the control thread, carry it out in the loop's."""
        if request["do"] == "reconfigure":
            work = self.reconfigure(unpack(ResourceConfig, request.get("config")))
        else:
            work = self.command(*_command(request))
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        future.add_done_callback(lambda ended: done(_answer(ended)))

    async def command(self, name: str, volume: int | None, args: Json) -> Refusal | None:
        log(self.config.name, f"command: {name}{'' if volume is None else f' volume {volume}'} {args or ''}")
        refusal = check(self.config) if name == "connect" else None
        if name == "secondary" and args.get("force"):
            await self.exports.disconnect(DRAIN_S)
        refusal = refusal or await self.runtime.command(name, volume, **args)
        if name == "connect" and refusal is None:
            refusal = await self._listening()
        if refusal is not None:
            log_refusal(self.config, refusal, volume, name)
        elif name == "down":
            self.ended.set()
        return refusal

    async def _listening(self) -> Refusal | None:
        """Whether the attempt to connect could begin at all.

        The machine's answer to `connect` does not wait for the sockets; an address that cannot be
        listened on shows in the next turns of the loop, and the operator is to hear of it now.
        """
        self._why_alone = ""
        await asyncio.sleep(LISTEN_S)
        alone = self.runtime.status().connection.cstate == "StandAlone"
        if alone and self._why_alone not in ("", LINKED):
            return Refusal(102, "Local address(port) already in use.", self._why_alone)
        return None

    async def reconfigure(self, config: ResourceConfig) -> Refusal | None:
        """Make the live resource what *config* says, with as little disturbance as that allows.

        Most options change on the fly. A disk that is another one now is detached before and attached
        after; an address needs a new connection.
        """
        old = self.config
        if config.name != old.name or config.node != old.node:
            return Refusal(162, INVALID, "This daemon serves another resource or node.")
        refusal = check(config)
        if refusal is None:
            steps = self._interrupted_by(config)
            for name, volume, _ in steps:
                refusal = refusal or await self.command(name, volume, {})
            refusal = refusal or await self.runtime.reconfigure(config)
            self.config = old if refusal else config
            for _, volume, back in reversed(steps):
                # Also after a refusal: what was interrupted goes on.
                again = await self.command(back, volume, {})
                refusal = refusal or again
        if refusal is not None:
            log_refusal(config, refusal, None, "adjust")
            return refusal
        try:
            await self.exports.apply(config)
        except DeviceError as error:
            return Refusal(162, INVALID, str(error))
        return None

    def _interrupted_by(self, config: ResourceConfig) -> list[tuple[str, int | None, str]]:
        """What a new configuration interrupts: command, volume, and the command that undoes it."""
        old, status = self.config, self.runtime.status()
        if {v.number for v in config.volumes} != {v.number for v in old.volumes}:
            return []  # The machine refuses that.
        steps: list[tuple[str, int | None, str]] = []
        if status.connection.cstate != "StandAlone" and _wire(old) != _wire(config):
            steps.append(("disconnect", None, "connect"))
        attached = {volume.number for volume in status.volumes if volume.disk != "Diskless"}
        for volume in config.volumes:
            before = old.volume(volume.number)
            assert before is not None
            if volume.number in attached and _storage(before) != _storage(volume):
                steps.append(("detach", volume.number, "attach"))
        return steps

    # ------------------------------------------------------------------------------ start and end

    async def run(self) -> int:
        """Serve until `down` or a signal; the exit code. StartError when that cannot begin."""
        self.loop.set_exception_handler(self._failed)
        if self.own_process:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.loop.add_signal_handler(number, self._signal, number)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        self.runtime.subscribe(self._notified)
        try:
            await self._start()
            if not self.options.background:
                await self._bring_up()
            self.when_ready()
            gc.collect()
            gc.freeze()
            gc.set_threshold(*GC_THRESHOLD)
            await self.ended.wait()
        finally:
            await self._stop()
        return self.code

    async def _start(self) -> None:
        await self.runtime.start()
        try:
            await self.exports.apply(self.config)
            self.control.start()
        except (DeviceError, PathError) as error:
            raise StartError(str(error)) from error
        except OSError as error:
            path = self.options.paths.control(self.config.name)
            raise StartError(f"cannot listen on {path}: {error.strerror}") from error
        log(self.config.name, f"daemon started, pid {os.getpid()}")
        self.journal.note(self.runtime.status(), "daemon started")

    async def _bring_up(self) -> None:
        """What `tandemadm up` does with a daemon it has started; StartError with the first refusal."""
        steps = [("attach", volume.number) for volume in self.config.volumes if volume.disk]
        for name, volume in [*steps, ("connect", None)]:
            refusal = await self.command(name, volume, {})
            if refusal is not None:
                raise StartError(f"{name}: {sentence(self.config, refusal, volume, name)}", refusal.exit_code)

    async def _stop(self) -> None:
        log(self.config.name, "daemon ends")
        await self.exports.stop(DRAIN_S)
        if self._asked_to_end:
            try:
                async with asyncio.timeout(DOWN_S):
                    refusal = await self.runtime.command("down")
                if refusal is not None:
                    log_refusal(self.config, refusal, None, "down")
            except TimeoutError:
                log(self.config.name, f"not down after {DOWN_S:.0f} seconds, ending all the same", "warning")
        await self.runtime.stop()
        await asyncio.to_thread(self.control.stop)
        await asyncio.to_thread(self.journal.close)

    def _tell_starter(self) -> None:
        tell_ready(self.options.ready_fd)

    def _signal(self, number: int) -> None:
        if self._asked_to_end:
            log(self.config.name, "second signal, ending at once", "warning")
            os._exit(128 + number)
        log(self.config.name, f"signal {signal.Signals(number).name}")
        self.end()

    def end(self) -> None:
        """Take the resource down and let `run` return. To be called in the loop's thread."""
        self._asked_to_end = True
        self.ended.set()

    def _notified(self, batch: list[Notify | StateChanged]) -> None:
        changed = False
        for item in batch:
            if isinstance(item, Notify):
                log_notify(item)
                if item.text.startswith(GOING_ALONE) and self._why_alone != LINKED:
                    self._why_alone = item.text.removeprefix(GOING_ALONE)
            else:
                changed = True
        said = [item.text for item in batch if isinstance(item, Notify)]
        status = self.runtime.status()
        self.journal.note(status, "; ".join(said))
        for helper in [item.helper for item in batch if isinstance(item, Notify) and item.helper]:
            self.control.publish(status, helper)
        if changed:
            if status.connection.connection == "Connected":
                self._why_alone = LINKED
            self.control.publish(status)

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """An exception nobody caught. Our own mistakes end the process: it must answer nothing more."""
        error = context.get("exception")
        log(self.config.name, str(context.get("message")), "error")
        if isinstance(error, BaseException):
            traceback.print_exception(error)
        if isinstance(error, AssertionError):
            os._exit(EXIT_INTERNAL)


def _wire(config: ResourceConfig) -> tuple[object, ...]:
    """What an established connection cannot change."""
    return config.address, config.peer_address


def _storage(volume: VolumeConfig) -> tuple[object, ...]:
    """Which bytes of which devices a volume uses."""
    return volume.disk, volume.meta_disk


def _command(request: Json) -> tuple[str, int | None, Json]:
    """The parts of a command; ValueError when it is malformed."""
    name, volume, args = request.get("name"), request.get("volume"), request.get("args", {})
    if not isinstance(name, str) or name not in COMMANDS:
        raise ValueError(f"unknown command {str(name)[:40]!r}")
    if volume is not None and (not isinstance(volume, int) or isinstance(volume, bool)):
        raise ValueError("volume must be a number or null")
    if not isinstance(args, dict) or not all(isinstance(v, bool | int | str) for v in args.values()):
        raise ValueError("args must be an object of flags, numbers and strings")
    if not all(key.isidentifier() and key not in ("self", "name", "volume") for key in args):
        raise ValueError("args has a key that is not an option")
    return str(name), volume, args


def _answer(ended: concurrent.futures.Future[Refusal | None]) -> Json:
    if ended.cancelled():
        return {"error": "the daemon is ending"}
    error = ended.exception()
    if error is None:
        return refusal_answer(ended.result())
    log("control", "".join(traceback.format_exception(error)), "error")
    return {"error": f"internal error ({type(error).__name__}), see the log of the daemon"}


# -------------------------------------------------------------------------------------------- main


def configured(options: Options) -> ResourceConfig:
    """The resource that *options* name, from the file or from whoever started us; StartError without one."""
    if options.background:
        return unpack(ResourceConfig, json.load(sys.stdin))
    from .conf import ConfigError, load  # The grammar library is slow to import.

    try:
        found = load(options.config_file).for_node(options.paths.node).get(options.resource)
    except ConfigError as error:
        raise StartError(str(error), 10) from error
    if found is None:
        raise StartError(f"'{options.resource}' not defined in your config (for this host).", 1)
    return found


def serve(options: Options) -> int:
    """Run the daemon of one resource in this process; the exit code."""
    try:
        config = configured(options)
        options.paths.make()
        pid_file = hold_pid_file(options.paths, config.name)
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                return runner.run(_main(options, config))
        finally:
            release(options.paths.pid(config.name), pid_file)
    except (StartError, PathError) as error:
        code = error.code if isinstance(error, StartError) else EXIT_FAILED
        log(options.resource, str(error), "error")
        tell_starter(options.ready_fd, {"error": str(error), "code": code})
        return code


async def _main(options: Options, config: ResourceConfig) -> int:
    return await Daemon(options, config).run()


def start_in_background(options: Options) -> int:
    """``tandemd RES`` without --foreground: what ``tandemadm up RES`` does."""
    from . import adm

    paths = options.paths
    where = ["-c", options.config_file, "--node", paths.node, "--run-dir", str(paths.run_dir)]
    return adm.run(["up", *where, options.resource])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("resource")
@click.option("-c", "--config-file", metavar="FILE", default=default_config, help="Configuration.")
@click.option("--node", metavar="NAME", default=default_node, help="This node's name in the configuration.")
@click.option("--run-dir", metavar="DIR", default=default_run_dir, help="Directory of sockets and pid files.")
@click.option("--foreground", is_flag=True, help="Stay in the foreground and log to stderr.")
@click.option("--background", is_flag=True, hidden=True)
@click.option("--ready-fd", type=int, default=-1, hidden=True)
def command(
    resource: str, config_file: str, node: str, run_dir: str, foreground: bool, background: bool,
    ready_fd: int,
) -> None:  # fmt: skip
    """Replicate RESOURCE: attach its disks, connect to the peer, offer its volumes over NBD."""
    paths = NodePaths(Path(run_dir).absolute(), node)
    os.environ |= {  # for the handlers, which inherit it
        "TANDEM_CONFIG": config_file, "TANDEM_NODE": node, "TANDEM_RUN_DIR": str(paths.run_dir),
    }  # fmt: skip
    options = Options(resource, config_file, paths, background, ready_fd)
    if foreground or background:
        sys.exit(serve(options))
    sys.exit(start_in_background(options))


def main() -> None:
    """Entry point of ``tandemd``."""
    command.main(prog_name="tandemd")


if __name__ == "__main__":
    main()
