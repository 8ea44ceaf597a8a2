"""Small Linux machines with real kernels: User-Mode-Linux guests, their networks, disks and power.

A guest's root is a private overlay on this machine's file system, so every program that is installed
here runs in it, under a kernel of its own (Debian's package `user-mode-linux`: Linux 6.1 with the modules
drbd 8.4.11, nbd, sch_netem). Its disks are files. `Guest.kill` is a power cut: the process that is the
guest ends at once, and what its kernel had not written to the disk file is lost.

The networks live in a network namespace which the test process enters for as long as the `Lab` is open;
programs it starts meanwhile are on the guests' `lan` under `HOST_LAN`. All guests end with the test
process, however that ends. Needs root.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
KERNEL: Final = Path("/usr/bin/linux.uml")
MODULES: Final = Path("/usr/lib/uml/modules")
PROGRAMS: Final = {  # what guests use of this machine -> Debian's package
    "ip": "iproute2", "unshare": "util-linux", "drbdadm": "drbd-utils", "fio": "fio", "nbdsh": "python3-libnbd",
}  # fmt: skip
AGENT_PORT: Final = 7001
HOST_LAN: Final = "10.77.0.254"
BOOT_S: Final = 90.0  # a guest boots in 3 s on an idle machine
RUN_S: Final = 120.0

_CLONE_NEWNET: Final = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class LabError(Exception):
    """The laboratory, not what is tested in it, does not work."""


class CommandFailed(AssertionError):
    """A command in a guest ended with a status that the test did not expect."""


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended."""

    rc: int
    out: str
    err: str


def missing() -> str:
    """Why there can be no laboratory here; empty if there can."""
    if os.geteuid() != 0:
        return "the laboratory needs root, for its networks"
    if not os.access(KERNEL, os.X_OK):
        return f"no kernel {KERNEL}; install Debian's package user-mode-linux"
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"the laboratory's guests need the program {program}; install Debian's package {package}"
    return ""


def local(*argv: str) -> str:
    """Run a program of this machine; its output."""
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"{shlex.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def _namespace_call(name: str, *args: int) -> None:
    if getattr(_libc, name)(*args):
        raise LabError(f"{name}: {os.strerror(ctypes.get_errno())}")


@contextlib.contextmanager
def private_network() -> Iterator[None]:
    """Move this process (the calling thread) to a network namespace with nothing in it, and back."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _namespace_call("unshare", _CLONE_NEWNET)
        local("ip", "link", "set", "lo", "up")
        try:
            yield
        finally:
            _namespace_call("setns", before, _CLONE_NEWNET)
    finally:
        os.close(before)


class Guest:
    """One machine. Made by `Lab.guest`; disks are `/dev/ubda`, `/dev/ubdb`, … inside, files outside."""

    def __init__(self, lab: Lab, name: str, number: int, disks: list[Path], memory: str) -> None:
        self.lab = lab
        self.name = name
        self.number = number
        self.disks = disks
        self.memory = memory
        self.lan = f"10.77.0.{number}"
        self.control = f"10.78.{number}.1"
        self.console = lab.work / f"{name}.console"
        self.n_boots = 0
        self._calls: set[socket.socket] = set()
        self._process: subprocess.Popen[bytes] | None = None
        for kind in ("c", "l"):
            local("ip", "tuntap", "add", "dev", f"{kind}{number}", "mode", "tap", "vnet_hdr")
        local("ip", "addr", "add", f"10.78.{number}.254/24", "dev", f"c{number}")
        local("ip", "link", "set", f"c{number}", "up")
        local("ip", "link", "set", f"l{number}", "master", "lan", "up")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def boot(self) -> None:
        """Power on; returns when the agent answers."""
        assert not self.running
        self.n_boots += 1
        settings = self.lab.work / f"{self.name}.env"
        settings.write_text(
            f"GUEST_NAME={self.name}\nGUEST_MODULES={MODULES}\nGUEST_SHARED={self.lab.shared}\n"
            f"GUEST_CONTROL={self.control}\nGUEST_LAN={self.lan}\nGUEST_AGENT={HERE}/guest/agent.py\n"
            f"GUEST_KEPT={HERE.parents[1]}:{sys.prefix}:{sys.base_prefix}\n"
        )
        argv = [
            "setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", str(KERNEL),
            f"mem={self.memory}", f"umid={self.name}{self.n_boots}", f"uml_dir={self.lab.work}",
            "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", "quiet", "log_buf_len=4M",
            "con=null", "con0=fd:0,fd:1", f"init={HERE}/guest/init", f"guest_env={settings}",
        ]  # fmt: skip
        argv += [f"ubd{i}={path}" for i, path in enumerate(self.disks)]
        for i, kind in enumerate(("c", "l")):
            mac = f"02:00:{i:02x}:00:00:{self.number:02x}"
            argv.append(f"vec{i}:transport=tap,ifname={kind}{self.number},mac={mac},depth=128,gro=1")
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "TMPDIR": "/dev/shm"}
        with self.console.open("ab") as console:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=console, stderr=console, env=environment,
                start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + BOOT_S
        while True:
            if not self.running:
                raise LabError(f"{self.name} ended while booting; console:\n{self.console_tail()}")
            try:
                self._ask({"read": "/proc/version"}, 5.0)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise LabError(f"{self.name} does not answer:\n{self.console_tail()}") from None
                time.sleep(0.1)

    def answers(self) -> bool:
        """Is the guest alive enough to read a file of its own?"""
        try:
            self._ask({"read": "/proc/version"}, 20.0)
        except OSError:
            return False
        return True

    def kill(self) -> None:
        """Cut the power; returns when nothing of the guest is left."""
        process = self._process
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            # unshare waits for the guest, the first process of a pid namespace: once it is gone, all is.
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
            if not children:
                process.kill()
        process.wait()
        self._process = None
        for sock in list(self._calls):  # a host without power says no goodbye; whoever waits must know
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def freeze(self, on: bool) -> None:
        """Stop the guest's kernel in mid-air, or let it go on."""
        assert self._process is not None
        pid = self._process.pid
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGSTOP if on else signal.SIGCONT)

    def cut(self, on: bool = True) -> None:
        """Pull the cable of the `lan`, or plug it in again."""
        local("ip", "link", "set", f"l{self.number}", *(("nomaster",) if on else ("master", "lan")))

    def netem(self, spec: str) -> None:
        """Shape what the guest sends and what it receives (tc-netem's words); empty ends it."""
        if not spec:
            self.sh("tc qdisc del dev lan root; tc qdisc del dev lan ingress; ip link del ifb0")
            return
        self.sh(
            "modprobe -a sch_netem sch_ingress cls_matchall act_mirred ifb || exit 1\n"
            "ip link show ifb0 > /dev/null 2>&1 || ip link add ifb0 type ifb; ip link set ifb0 up\n"
            f"tc qdisc replace dev lan root netem {spec} && tc qdisc replace dev lan ingress &&"
            "tc filter replace dev lan parent ffff: protocol all prio 1 handle 1 matchall"
            " action mirred egress redirect dev ifb0 &&"
            f"tc qdisc replace dev ifb0 root netem {spec}"
        )

    def run(self, *argv: str, stdin: str = "", check: bool = True, limit_s: float = RUN_S) -> Ran:
        """Run a command inside; CommandFailed unless it ends with 0 or *check* is off."""
        reply = self._ask({"argv": list(argv), "stdin": stdin}, limit_s)
        ran = Ran(reply["rc"], reply["out"], reply["err"])
        if check and ran.rc:
            raise CommandFailed(f"{self.name}: {shlex.join(argv)}: status {ran.rc}\n{ran.out}{ran.err}")
        return ran

    def sh(self, script: str, check: bool = True, limit_s: float = RUN_S) -> str:
        """Run a shell script inside; its output."""
        return self.run("bash", "-c", script, check=check, limit_s=limit_s).out

    def spawn(self, *argv: str) -> int:
        """Start a command inside that goes on; its pid. What it prints is appended to /shared/NAME.log."""
        reply = self._ask({"spawn": list(argv), "log": f"/shared/{self.name}.log"}, RUN_S)
        assert reply["rc"] == 0, reply["err"]
        return int(reply["out"])

    def end(self, pid: int) -> None:
        """Ask a process inside to end, and wait until it has."""
        self.sh(f"kill {pid}; while kill -0 {pid} 2> /dev/null; do sleep .02; done")

    def read(self, path: str) -> str:
        """A file of the guest, without starting a process."""
        reply = self._ask({"read": path}, RUN_S)
        if reply["rc"]:
            raise CommandFailed(f"{self.name}: {path}: {reply['err']}")
        return str(reply["out"])

    def ask_socket(self, path: str, line: str) -> str:
        """Send a line to a Unix socket of the guest; the line that comes back. CommandFailed if nobody is there."""
        reply = self._ask({"unix": path, "send": line}, RUN_S)
        if not reply["out"]:
            raise CommandFailed(f"{self.name}: {path}: {reply['err'] or 'no answer'}")
        return str(reply["out"])

    def kernel_log(self) -> list[str]:
        """What the kernel said since it booted, or since `clear_kernel_log`."""
        return self.run("dmesg").out.splitlines()

    def clear_kernel_log(self) -> None:
        self.run("dmesg", "-C")

    def _ask(self, request: dict[str, Any], limit_s: float) -> dict[str, Any]:
        with socket.create_connection((self.control, AGENT_PORT), 5.0) as sock:
            sock.settimeout(limit_s)
            self._calls.add(sock)
            try:
                sock.sendall(json.dumps(request).encode() + b"\n")
                line = sock.makefile("rb").readline()
            finally:
                self._calls.discard(sock)
        if not line:
            raise ConnectionResetError(f"{self.name} hung up")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def console_tail(self) -> str:
        return self.console.read_bytes()[-3000:].decode("latin-1")


class Lab:
    """The guests and the network between them. A context manager; nothing is left behind."""

    def __init__(self) -> None:
        self.work = Path(tempfile.mkdtemp(prefix="tandem-lab-"))
        self.shared = self.work / "shared"
        self.shared.mkdir()
        self.guests: list[Guest] = []
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Lab:
        why = missing()
        if why:
            shutil.rmtree(self.work)
            raise LabError(why)
        self._undo.callback(shutil.rmtree, self.work, ignore_errors=True)
        with contextlib.ExitStack() as stack:
            stack.callback(self._undo.close)
            self._undo.enter_context(private_network())
            local("ip", "link", "add", "lan", "type", "bridge", "forward_delay", "0", "mcast_snooping", "0")
            local("ip", "addr", "add", f"{HOST_LAN}/24", "dev", "lan")
            local("ip", "link", "set", "lan", "up")
            stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.kill()
        self._undo.close()

    def disk(self, name: str, size: int) -> Path:
        """A file that is a disk; it persists over power cuts."""
        path = self.work / f"{name}.disk"
        path.touch()
        os.truncate(path, size)
        return path

    def guest(self, name: str, disks: list[Path], memory: str = "256M") -> Guest:
        guest = Guest(self, name, len(self.guests) + 1, disks, memory)
        self.guests.append(guest)
        return guest
