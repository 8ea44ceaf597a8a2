"""Nbd devices as the kernel and udev show them: ``/dev/nbdN``, ``/sys/block/nbdN``, ``/dev/drbd/by-res/RES``.

Decides what a device is called, to whom it belongs, and whether it may be taken away. A device that
`tandemadm nbd attach` made carries the name of its volume as the kernel's "backend", so it is recognised
without any file of ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from .nbd_netlink import NbdNetlink, NoDriver
from .nbd_users import in_words, users

SYS_BLOCK: Final = Path("/sys/block")
LINKS: Final = Path("/dev/drbd/by-res")  # where DRBD's udev rules put the names of resources
BACKEND: Final = "tandem:"
MODPROBE_S: Final = 30.0
INDEX_MAX: Final = 32767  # 20 bits of minor number, of which the driver keeps 5 for partitions
LEAVING_S: Final = 2.0  # udev opens a device for a moment whenever somebody who wrote to it has closed it
_DEVICE: Final = re.compile(r"(?:/dev/)?nbd([0-9]+)")


class NbdError(Exception):
    """A device that cannot be attached or detached; one sentence, and the exit code."""

    def __init__(self, text: str, code: int = 20) -> None:
        super().__init__(text)
        self.code = code


class InUse(NbdError):
    """A device that somebody uses; *by* says who."""

    def __init__(self, device: str, by: str) -> None:
        super().__init__(
            f"{device} is in use by {by}; end that first, or give it errors with: tandemadm nbd detach --force {device}"
        )
        self.by = by


@dataclass(frozen=True, slots=True)
class Place:
    """Where one node offers the volume: on the Unix socket *path*, or on *host* and *port*, as *export*."""

    node: str
    export: str
    path: str = ""
    host: str = ""
    port: int = 0

    def __str__(self) -> str:
        if self.path:
            return self.path
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Attachment:
    """What a keeper keeps: which volume is on which device, and how.

    *name* is ``RES`` or ``RES/VOL`` as udev names it. *timeout_s*: a request that is not answered for so
    long is sent again on another connection. *dead_timeout_s*: requests fail after so long without any.
    """

    name: str
    device: str
    places: tuple[Place, ...]
    n_connections: int
    timeout_s: int
    dead_timeout_s: int

    @property
    def index(self) -> int:
        return device_index(self.device)

    @property
    def backend(self) -> str:
        return BACKEND + self.name


def device_index(name: str) -> int:
    """The N of ``/dev/nbdN`` or ``nbdN``. NbdError when it is something else, such as a partition."""
    found = _DEVICE.fullmatch(name)
    if found is None:
        raise NbdError(f"{name} is not an nbd device; write for example /dev/nbd0", 1)
    if len(found[1]) > len(str(INDEX_MAX)) or int(found[1]) > INDEX_MAX:
        raise NbdError(f"{name} cannot exist; the last nbd device is /dev/nbd{INDEX_MAX}", 1)
    return int(found[1])


def is_device(name: str) -> bool:
    return _DEVICE.fullmatch(name) is not None


def open_driver() -> NbdNetlink:
    """The kernel's driver, loaded if it is not there. NbdError with one sentence when there is none."""
    if os.geteuid() != 0:
        raise NbdError("only root can work with /dev/nbd devices; use sudo")
    with contextlib.suppress(NoDriver):
        return NbdNetlink()
    said = _load_module()
    try:
        return NbdNetlink()
    except NoDriver:
        raise NbdError(
            f"the kernel has no nbd driver in this network namespace, and 'modprobe nbd' did not help"
            f"{': ' + said if said else ''}; install the kernel's modules, or use the host's namespace"
        ) from None


def _load_module() -> str:
    """Run modprobe; what it complained about."""
    try:
        done = subprocess.run(
            ["modprobe", "nbd"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=MODPROBE_S, env={**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""


# ----------------------------------------------------------------------------------------- devices


def backend(index: int) -> str:
    """Who connected the device, if that said so: ``tandem:RES`` for ours."""
    try:
        return (SYS_BLOCK / f"nbd{index}" / "backend").read_text().strip()
    except OSError:
        return ""


def attached_name(index: int) -> str:
    """The volume that a device of ours shows; empty for all other devices."""
    found = backend(index)
    return found.removeprefix(BACKEND) if found.startswith(BACKEND) else ""


def attached() -> list[int]:
    """The indexes of all devices that are ours, in order."""
    found = [int(path.parent.name.removeprefix("nbd")) for path in SYS_BLOCK.glob("nbd*/backend")]
    return sorted(index for index in found if attached_name(index))


def size(index: int) -> int:
    """Bytes of the device, 0 when it is not connected."""
    with contextlib.suppress(OSError):
        return int((SYS_BLOCK / f"nbd{index}" / "size").read_text()) * 512
    return 0


def block_size(index: int) -> int:
    return int((SYS_BLOCK / f"nbd{index}" / "queue" / "logical_block_size").read_text())


def make_node(index: int) -> None:
    """Wait for nobody: where no udev and no devtmpfs made ``/dev/nbdN``, make it."""
    path = Path(f"/dev/nbd{index}")
    if not path.exists():
        major, minor = (SYS_BLOCK / f"nbd{index}" / "dev").read_text().split(":")
        os.mknod(path, 0o660 | stat.S_IFBLK, os.makedev(int(major), int(minor)))


@contextlib.contextmanager
def exclusively(device: str) -> Iterator[None]:
    """Hold the device so that nobody can mount it meanwhile. InUse when somebody has it open in whatever way."""
    disk = SYS_BLOCK / f"nbd{device_index(device)}"
    deadline = time.monotonic() + LEAVING_S
    try:
        fd = os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise InUse(device, in_words(users(disk) or ["a file system or another device"])) from None
    try:
        while found := users(disk):
            if time.monotonic() > deadline:
                raise InUse(device, in_words(found))
            time.sleep(0.1)
        yield
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------------- links


def link_of(name: str) -> Path:
    return LINKS / name


def make_link(name: str, index: int) -> None:
    """Give the device the name that DRBD's would have. NbdError when something else has it."""
    link = link_of(name)
    if os.path.lexists(link) and not link.is_symlink():
        raise NbdError(f"{link} is not a link to a device; remove what is in the way")
    with contextlib.suppress(OSError):
        if link.is_block_device() and link.resolve() != Path(f"/dev/nbd{index}") and not _is_stale(link):
            raise NbdError(f"{link} is {link.resolve()} already; end that device first")
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        fresh = link.with_name(f"{link.name}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(f"/dev/nbd{index}", link.parent))
        fresh.replace(link)
    except OSError as error:
        raise NbdError(f"cannot make {link}: {error.strerror}; remove what is in the way") from None


def _is_stale(link: Path) -> bool:
    """Does the link lead to an nbd device that is not connected any more?"""
    name = link.resolve().name
    return is_device(name) and not size(device_index(name))


def remove_link(name: str, index: int) -> None:
    """Remove our link, and the directory of a resource with several volumes when it is empty."""
    link = link_of(name)
    with contextlib.suppress(OSError):
        if link.is_symlink() and Path(os.path.normpath(link.parent / os.readlink(link))).name == f"nbd{index}":
            link.unlink()
            if link.parent != LINKS:
                link.parent.rmdir()


def release(netlink: NbdNetlink, attachment_name: str, index: int) -> None:
    """End the device and its link."""
    netlink.disconnect(index)
    remove_link(attachment_name, index)
