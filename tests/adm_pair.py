"""Two nodes on one machine for tests of `tandemadm`: real daemons, files as disks, loopback as network."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

DISK_SIZE = 64 << 20
PATIENCE = "--wfc-timeout=60"  # seconds; a test that needs them has failed, or the machine is very busy

CONFIG = """\
global {{ usage-count no; }}
common {{ net {{ protocol C; {net} }} }}
resource r0 {{
    device {device};
    on alpha {{ disk {dir}/a.img; address 127.0.0.1:{port_a}; meta-disk internal; }}
    on beta  {{ disk {dir}/b.img; address 127.0.0.1:{port_b}; meta-disk internal; }}
}}
"""


@dataclass(frozen=True)
class Result:
    """What one command line did."""

    code: int
    out: str
    err: str


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on, below the range the kernel gives out for outgoing connections."""
    ports: list[int] = []
    start = 20000 + os.getpid() * 7 % 10000
    for port in range(start, start + 2000):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                ports.append(port)
        if len(ports) == n:
            return ports
    raise AssertionError("no free ports")


class Pair:
    """The two nodes. The directory is short, because socket paths must be."""

    def __init__(self, *, device: str = "/dev/drbd0 minor 0", net: str = "") -> None:
        self.dir = Path(tempfile.mkdtemp(prefix="tdm"))
        self.file = self.dir / "tandem.conf"
        self.run = self.dir / "run"
        self.port_a, self.port_b, self.port_nbd = free_ports(3)
        self.configure(device=device, net=net)
        for name in ("a.img", "b.img"):
            with open(self.dir / name, "wb") as file:
                file.truncate(DISK_SIZE)

    def configure(self, *, device: str = "/dev/drbd0 minor 0", net: str = "") -> None:
        self.file.write_text(
            CONFIG.format(
                dir=self.dir, port_a=self.port_a, port_b=self.port_b, net=net,
                device=device.replace("NBDPORT", str(self.port_nbd)),
            )
        )  # fmt: skip

    def where(self, node: str) -> list[str]:
        return ["-c", str(self.file), "--node", node, "--run-dir", str(self.run)]

    def popen(self, node: str, *words: str, tool: str = "adm") -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", f"tandem.tools.{tool}", *self.where(node), *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def adm(self, node: str, *words: str) -> Result:
        """One command line of `tandemadm`, as a process of its own."""
        with self.popen(node, *words) as process:
            out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    def ok(self, node: str, *words: str) -> str:
        """The same, and it must succeed without complaint; its output."""
        result = self.adm(node, *words)
        assert (result.code, result.err) == (0, ""), (words, result)
        return result.out

    def create(self) -> None:
        for node in ("alpha", "beta"):
            assert self.adm(node, "create-md", "--force", "r0").code == 0

    def up(self) -> None:
        """Both nodes up and connected."""
        for node in ("alpha", "beta"):
            self.ok(node, "up", "r0")
        for node in ("alpha", "beta"):
            self.ok(node, "wait-connect", PATIENCE, "r0")

    def promote(self) -> None:
        """From fresh metadata to Primary on alpha and UpToDate on both."""
        self.ok("alpha", "primary", "--force", "r0")
        self.ok("alpha", "wait-sync", PATIENCE, "r0")

    def path(self, node: str, kind: str) -> Path:
        return self.run / node / f"r0.{kind}"

    def pid(self, node: str) -> int:
        return int(self.path(node, "pid").read_text())

    def kill(self, node: str) -> None:
        """kill -9, and wait until the process is gone."""
        pid = self.pid(node)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_process(pid))

    def close(self) -> None:
        for node in ("alpha", "beta"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError):
                pid = self.pid(node)
                if is_daemon(pid):
                    os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.dir)


def is_process(pid: int) -> bool:
    """Whether *pid* runs; a zombie nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_daemon(pid: int) -> bool:
    try:
        return b"tandem.tools.daemon" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except FileNotFoundError:
        return False


def wait_until(condition: object, limit_s: float = 60.0) -> None:
    """For what announces itself to nobody: the end of a process, a line in a file."""
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


class NbdClient:
    """Just enough of an NBD client to hold an export open: fixed newstyle, NBD_OPT_GO."""

    def __init__(self, path: Path, export: str) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(30)
        self._sock.connect(os.fspath(path))
        assert self._read(16) == b"NBDMAGICIHAVEOPT"
        self._read(2)
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._sock.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 7, len(data)) + data)
        self.size = 0
        self.refusal = ""
        while True:
            _, _, kind, length = struct.unpack(">QIII", self._read(20))
            payload = self._read(length)
            if kind == 3 and struct.unpack(">H", payload[:2]) == (0,):
                (self.size,) = struct.unpack(">Q", payload[2:10])
            if kind == 1:
                break
            if kind & 0x80000000:
                self.refusal = payload.decode()
                break

    def _read(self, n: int) -> bytes:
        data = b""
        while len(data) < n:
            part = self._sock.recv(n - len(data))
            assert part, "the server closed the connection"
            data += part
        return data

    def write(self, offset: int, data: bytes) -> int:
        """One NBD_CMD_WRITE; the server's errno."""
        self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 1, 7, offset, len(data)) + data)
        magic, error, cookie = struct.unpack(">IIQ", self._read(16))
        assert (magic, cookie) == (0x67446698, 7)
        return int(error)

    def close(self) -> None:
        self._sock.close()
