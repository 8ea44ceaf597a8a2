"""Where a node keeps its sockets, pid files and logs.

Everything of one node lies in ``RUN-DIR/NODE/``, so that two nodes may share one run directory (as they
do on one machine in a test): ``RES.ctl`` is the control socket, ``RES.pid`` the pid file whose lock is
held as long as the daemon lives, ``RES.lock`` the lock of commands that change the resource, ``RES.log``
the log, and ``RES.nbd`` the default NBD socket. ``nbd/`` is for the keepers of nbd devices.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

UNIX_PATH_MAX: Final = 107  # sun_path holds 108 bytes, the last one is the terminating NUL (unix(7))

DEFAULT_CONFIG: Final = "/etc/tandem.conf"
SYSTEM_RUN_DIR: Final = Path("/run/tandem")
SYSTEM_STATE_DIR: Final = Path("/var/lib/tandem")


class PathError(Exception):
    """A file or directory of the run directory cannot be used; one sentence for the operator."""


def default_run_dir(environ: Mapping[str, str] | None = None) -> Path:
    """The run directory when no option names one: TANDEM_RUN_DIR, /run/tandem, or the user's own."""
    env = os.environ if environ is None else environ
    if env.get("TANDEM_RUN_DIR"):
        return Path(env["TANDEM_RUN_DIR"])
    if os.geteuid() == 0:
        return SYSTEM_RUN_DIR
    if env.get("XDG_RUNTIME_DIR"):
        return Path(env["XDG_RUNTIME_DIR"]) / "tandem"
    return Path(f"/tmp/tandem-{os.geteuid()}")


def default_node(environ: Mapping[str, str] | None = None) -> str:
    """This node's name: TANDEM_NODE, or the host name as ``uname -n`` prints it."""
    env = os.environ if environ is None else environ
    return env.get("TANDEM_NODE") or os.uname().nodename


def default_config(environ: Mapping[str, str] | None = None) -> str:
    """The configuration file when no option names one."""
    env = os.environ if environ is None else environ
    return env.get("TANDEM_CONFIG") or DEFAULT_CONFIG


@dataclass(frozen=True, slots=True)
class NodePaths:
    """The files of one node; nothing is created until `make` is called."""

    run_dir: Path
    node: str

    @property
    def directory(self) -> Path:
        return self.run_dir / _file_name(self.node)

    def control(self, resource: str) -> Path:
        return self._file(resource, "ctl")

    def pid(self, resource: str) -> Path:
        return self._file(resource, "pid")

    def lock(self, resource: str) -> Path:
        return self._file(resource, "lock")

    def log(self, resource: str) -> Path:
        return self._file(resource, "log")

    def nbd(self, resource: str) -> Path:
        return self._file(resource, "nbd")

    def nbd_device(self, device: str, kind: str) -> Path:
        """A file of the keeper of ``/dev/nbdN``; *kind* is pid, log or state."""
        return self.directory / "nbd" / f"{Path(device).name}.{kind}"

    def look(self, resource: str) -> Path:
        """The NBD socket on which both histories of a split brain can be looked at."""
        return self._file(resource, "look")

    def last_known(self, resource: str, volume: int) -> Path:
        """Where offline commands remember which disk and size a volume's metadata had."""
        return self.state_directory / f"{_file_name(resource)}-{volume}.lkbd"

    def journal(self, resource: str) -> Path:
        """Where the daemon notes when roles and generations changed."""
        return self.state_directory / f"{_file_name(resource)}.journal"

    def history(self, resource: str, node: str, generation: str) -> Path:
        """Where the history that *node* gives up is saved unless somebody chooses another place."""
        return self.state_directory / f"{_file_name(resource)}-{_file_name(node)}-{generation}.history"

    @property
    def state_directory(self) -> Path:
        """What must survive a boot: the system's run directory is emptied then, so it is kept elsewhere."""
        if self.run_dir == SYSTEM_RUN_DIR:
            return SYSTEM_STATE_DIR / _file_name(self.node)
        return self.directory

    def _file(self, resource: str, kind: str) -> Path:
        return self.directory / f"{_file_name(resource)}.{kind}"

    def make(self) -> None:
        """Create the node's directory; PathError when it cannot be, or belongs to somebody else."""
        try:
            self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            found = self.directory.stat()
        except OSError as error:
            raise PathError(
                f"cannot create the run directory {self.directory}: {error.strerror}; "
                "choose another with --run-dir"
            ) from error
        if not stat.S_ISDIR(found.st_mode):
            raise PathError(f"{self.directory} is not a directory; choose another with --run-dir")
        if found.st_uid not in (os.geteuid(), 0):
            raise PathError(f"{self.directory} belongs to user {found.st_uid}; choose another with --run-dir")

    def resources(self) -> list[str]:
        """Names of the resources that have a control socket here, sorted; some may be stale."""
        try:
            names = [entry.name for entry in os.scandir(self.directory) if entry.name.endswith(".ctl")]
        except OSError:
            return []
        return sorted(_resource_name(name[:-4]) for name in names)


def check_socket_path(path: Path) -> None:
    """PathError when *path* is longer than a Unix socket's address can be."""
    length = len(os.fsencode(path))
    if length > UNIX_PATH_MAX:
        raise PathError(
            f"the socket path {path} is {length} bytes long and the limit is {UNIX_PATH_MAX}; "
            "choose a shorter --run-dir"
        )


def is_alive(path: Path) -> bool:
    """Is somebody listening on the Unix socket *path*? A socket left by a killed process is not alive."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except TimeoutError:
            return True  # The backlog is full: somebody is there, and busy.
        except OSError:
            return False
    return True


def _file_name(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def _resource_name(file_name: str) -> str:
    return file_name.replace("%2F", "/").replace("%25", "%")
