"""What a process of ours tells others about itself: that it lives, that it is ready, why it is not.

Whether it lives is said by the lock on its pid file, which ends with the process, however that ends; the
number in the file only names the process, and a file that was left behind confuses nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Final

from .values import Json

LOCK_S: Final = 1.0  # whoever looks whether the process has ended holds the file for a moment


class Held(Exception):
    """Another process has the pid file; *pid* is its number as far as known."""

    def __init__(self, pid: str) -> None:
        super().__init__(pid)
        self.pid = pid or "unknown"


def hold(path: Path) -> int:
    """Lock the pid file *path* for the life of this process and write our pid; its descriptor.

    Raises Held when another process has it, OSError when it cannot be made.
    """
    deadline = time.monotonic() + LOCK_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        locked = try_lock(fd)
        if locked and _is_file(path, fd):
            break
        pid = os.read(fd, 32).decode(errors="replace").strip()
        os.close(fd)
        if locked:
            continue  # whoever ended has removed it since: make a new one
        if time.monotonic() > deadline:
            raise Held(pid)
        time.sleep(0.02)
    os.ftruncate(fd, 0)
    os.write(fd, f"{os.getpid()}\n".encode())
    return fd


def release(path: Path, fd: int) -> None:
    """The end of what `hold` began. The file goes before its lock: whoever gets that looks again."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    os.close(fd)


def _is_file(path: Path, fd: int) -> bool:
    """Is the open file still the one that has this name?"""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def holder(path: Path) -> int | None:
    """The pid of the process that has the pid file *path*; None when nobody has."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if try_lock(fd):
            return None
        text = os.read(fd, 32).decode(errors="replace").strip()
        return int(text) if text.isdigit() else None
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def tell_starter(fd: int, message: Json) -> None:
    """One line into the pipe *fd* of the tandemadm that waits for us, if one does (then *fd* is not negative)."""
    if fd >= 0:
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(message).encode() + b"\n")
            os.close(fd)


def tell_ready(fd: int) -> None:
    """Say that we are ready: to tandemadm through its pipe, to systemd through its socket."""
    tell_starter(fd, {"ready": True})
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
