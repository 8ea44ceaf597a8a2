"""The systems that keep two copies: Tandem, alone and inside nbdkit, qemu's two mirrors, GlusterFS, the kernel's DRBD.

All of them answer a write when both copies have it, except that GlusterFS's client, as it is by default, answers some
that it sends later. `Tandem` also knows how to make and watch a resync, a verify and an attach, for `extras`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from systems import PRIMARY, SECONDARY, BenchError, NbdkitFile, NbdServer, QemuNbd, System, free_port, last_line
from workloads import MIB, PEER_BARS, descendants

REPOSITORY: Final = Path(__file__).resolve().parent.parent
QMP_S: Final = 60.0
ADM_S: Final = 120.0  # no command takes so long, unless something is wrong
DOWN_S: Final = 15.0  # a node that is not down by then is killed with whatever else is left at the end

CONFIG: Final = """\
resource %(name)s {
  net { protocol C; verify-alg crc32c; }
  disk { %(disk)s }
  meta-disk internal;
  on alice { device "nbd+unix:///%(name)s?socket=%(dir)s/alice.nbd"; disk %(alice)s; address 127.0.0.1:%(port_a)d; }
  on bob   { device "nbd+unix:///%(name)s?socket=%(dir)s/bob.nbd";   disk %(bob)s;   address 127.0.0.1:%(port_b)d; }
}
"""


class Tandem(System):
    """Two nodes on loopback, protocol C. *tree* is another checkout to run, for before and after."""

    name = "tandem"
    title = "Tandem, protocol C"
    is_replicated = True
    is_quick = True
    tree: Path | None = None
    disk_options = ""  # statements for the disk section

    def start(self) -> None:
        self.make(self.backing_file("alice.img"), self.backing_file("bob.img"))
        for node in ("alice", "bob"):
            self.up(node)
        self.adm("alice", "wait-connect", "r0")
        # Both files hold the same bytes, so the initial sync can be skipped.
        self.adm("alice", "new-current-uuid", "--clear-bitmap", "r0")
        self.adm("alice", "primary", "r0")
        self.uri = f"nbd+unix:///r0?socket={self.directory}/alice.nbd"

    def make(self, alice: Path, bob: Path) -> None:
        """Configuration and metadata of two nodes with these backing files."""
        (self.directory / "conf").write_text(self.resource("r0", self.directory, alice, bob), encoding="utf-8")
        for node in ("alice", "bob"):
            self.adm(node, "create-md", "--force", "r0")

    def resource(self, name: str, directory: Path, alice: Path, bob: Path) -> str:
        """A resource of the configuration, with its NBD sockets in *directory*."""
        return CONFIG % {
            "name": name, "dir": directory, "alice": alice, "bob": bob, "port_a": free_port(), "port_b": free_port(),
            "disk": self.disk_options,
        }  # fmt: skip

    def up(self, node: str) -> None:
        """Start *node*, which ends with this system."""
        self.stack.callback(self._down, node)
        self.adm(node, "up", "r0")
        self.parts[PRIMARY if node == "alice" else SECONDARY] = [self.pid(node)]

    @classmethod
    def loops(cls) -> str:
        """Whether its nodes run with the compiled loops, as a sentence."""
        program = (
            "import importlib, importlib.util, os, pathlib\n"
            "rooms = {'tandem.repl': 'batches', 'tandem.nbd': 'batches', 'tandem.repl.edge': 'calls'}\n"
            "made = [getattr(importlib.import_module(r + '.compiled'), n) for r, n in rooms.items()\n"
            "        if importlib.util.find_spec(r + '.compiled')]\n"  # an older tree may lack one
            "files = [pathlib.Path(os.path.realpath(m.__file__)) for m in made]\n"
            "plain = any(f.suffix == '.py' for f in files)\n"
            "source = lambda f: f.with_name(f.name.split('.')[0] + '.pyx')\n"
            "late = not plain and any(f.stat().st_mtime < source(f).stat().st_mtime for f in files)\n"
            "print('no' if plain else 'old' if late else 'yes')"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=cls.environment(), check=False
        )
        said = {
            "yes": "ran with its compiled loops.",
            "old": "RAN WITH COMPILED LOOPS THAT ARE OLDER THAN THEIR SOURCE; `make clean bench` builds them anew.",
            "no": "RAN WITHOUT ITS COMPILED LOOPS, so 4 KiB operations take up to twice the processor time. Where "
            "there is a C compiler, `make clean bench` builds them.",
        }
        return f"{cls.title}: {said.get(done.stdout.strip()) or done.stderr.strip()[-200:]}"

    @classmethod
    def environment(cls) -> dict[str, str]:
        """What its programs are run with."""
        return os.environ | ({"PYTHONPATH": str(cls.tree / "tests" / "typing")} if cls.tree is not None else {})

    def pid(self, node: str) -> int:
        return int((self.directory / "run" / node / "r0.pid").read_text(encoding="ascii"))

    def adm(self, node: str, *args: str, limit_s: float = ADM_S) -> None:
        """Run tandemadm as *node*. BenchError when it fails, or does not end within *limit_s* seconds."""
        command = [
            sys.executable, "-c", "from tandem.tools.adm import main; main()", "-c", str(self.directory / "conf"),
            "--node", node, "--run-dir", str(self.directory / "run"), *args,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, env=self.environment(), timeout=limit_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"tandemadm {' '.join(args)} on {node} did not end within {limit_s:.0f} s") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip()
            said += f" ({last_line(self.directory / 'run' / node / 'r0.log')})"
            raise BenchError(f"tandemadm {' '.join(args)} on {node} failed ({done.returncode}): {said}")

    def _down(self, node: str) -> None:
        with contextlib.suppress(BenchError):
            self.adm(node, "down", "r0", limit_s=DOWN_S)

    def statuses(self, node: str) -> Iterator[tuple[float, dict[str, Any]]]:
        """The status of *node* now and whenever it changes, with the time it came."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(120)
            sock.connect(str(self.directory / "run" / node / "r0.ctl"))
            sock.sendall(b'{"do": "events"}\n')
            with sock.makefile("rb") as lines:
                for line in lines:
                    yield time.monotonic(), json.loads(line)["status"]

    def resync(self, write: Callable[[], object], during: Callable[[], object] | None = None) -> tuple[int, float]:
        """Bytes and seconds of a resync after *write* has run without the peer; *during* runs meanwhile."""
        self.adm("bob", "disconnect", "r0")
        write()
        began, n_bytes = 0.0, 0
        watch = self.statuses("bob")
        next(watch)
        self.adm("bob", "connect", "r0")
        for at, status in watch:
            peer = status["connection"]["volumes"][0]
            if peer["replication"] == "SyncTarget" and not began:
                began, n_bytes = at, peer["out_of_sync"]
                if during is not None:
                    during()
            elif began and status["volumes"][0]["disk"] == "UpToDate":
                return n_bytes, at - began
        raise BenchError("the daemon of bob ended during the resync")


def other_tree(tree: Path) -> type[Tandem]:
    """Tandem as it stands in another checkout."""

    class Other(Tandem):
        name = "other"
        title = f"Tandem of {tree}"

    Other.tree = tree.resolve()
    return Other


def nbdkit_environment() -> dict[str, str]:
    """What nbdkit with Python inside is run with.

    That Python takes its library from wherever the first python3 of PATH is, and cannot load another one's, such
    as that of the virtual environment this runs in. So the system's directories come first.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "PYTHONPATH")}
    return kept | {"PATH": f"/usr/bin:/bin:{os.environ.get('PATH', '')}", "VIRTUAL_ENV": sys.prefix}


class TandemInNbdkit(Tandem):
    """Tandem, with the Primary inside nbdkit."""

    name = "tandem-nbdkit"
    title = "Tandem in nbdkit, protocol C"
    is_quick = False

    @classmethod
    def unavailable(cls) -> str:
        if shutil.which("nbdkit") is None:
            return "nbdkit is not installed (Debian package nbdkit)"
        probe = subprocess.run(
            ["nbdkit", "python", "--dump-plugin"], capture_output=True, env=nbdkit_environment(), check=False
        )
        return "nbdkit has no Python (Debian package nbdkit-plugin-python)" if probe.returncode else ""

    def start(self) -> None:
        self.make(self.backing_file("alice.img"), self.backing_file("bob.img"))
        self.up("bob")
        sock = self.directory / "alice.nbdkit"
        plugin = REPOSITORY / "nbd" / "nbdkit_plugin.py"
        where = [f"config={self.directory}/conf", "node=alice", f"run-dir={self.directory}/run"]
        command = ["nbdkit", "-f", "-U", str(sock), "python", str(plugin), "resource=r0", *where]
        self.run(command, sock, PRIMARY, nbdkit_environment())
        self.adm("bob", "wait-connect", "r0")
        self.adm("alice", "new-current-uuid", "--clear-bitmap", "r0")
        self.adm("alice", "primary", "r0")
        self.uri = f"nbd+unix:///r0?socket={sock}"


class _QemuMirror(System):
    """A qemu-storage-daemon with the first copy, and a qemu-nbd on the other side of a socket with the second."""

    is_replicated = True

    @classmethod
    def unavailable(cls) -> str:
        missing = [p for p in ("qemu-storage-daemon", "qemu-nbd") if shutil.which(p) is None]
        return f"{missing[0]} is not installed (Debian packages qemu-utils, qemu-system-common)" if missing else ""

    def start_with(self, arguments: list[str], top: str) -> None:
        """Start both; the block device *top* is exported."""
        second, sock = self.directory / "second", self.directory / "sock"
        self.run(
            ["qemu-nbd", "-f", "raw", "-k", str(second), "-e", "8", "-t", "--cache=writeback", "--aio=threads",
             str(self.backing_file("bob.img"))], second, SECONDARY,
        )  # fmt: skip
        self.run(
            ["qemu-storage-daemon",
             "--blockdev", f"driver=file,node-name=here,filename={self.backing_file('alice.img')},cache.direct=off",
             "--blockdev", f"driver=nbd,node-name=there,server.type=unix,server.path={second}",
             *arguments,
             "--nbd-server", f"addr.type=unix,addr.path={sock},max-connections=8",
             "--export", f"type=nbd,id=export,node-name={top},name=disk,writable=on"], sock, PRIMARY,
        )  # fmt: skip
        self.uri = f"nbd+unix:///disk?socket={sock}"


class QemuQuorum(_QemuMirror):
    """qemu's quorum driver over both copies: a write is answered when both have it, a read comes from the first."""

    name = "qemu-quorum"
    title = "qemu quorum of file and NBD"

    def start(self) -> None:
        quorum = "driver=quorum,node-name=both,children.0=here,children.1=there,vote-threshold=2,read-pattern=fifo"
        self.start_with(["--blockdev", quorum], "both")


class QemuBlockdevMirror(_QemuMirror):
    """qemu's mirror job with copy-mode=write-blocking, in its steady state."""

    name = "qemu-mirror"
    title = "qemu blockdev-mirror, write-blocking"

    def start(self) -> None:
        qmp = self.directory / "qmp"
        self.start_with(
            ["--chardev", f"socket,id=qmp,path={qmp},server=on,wait=off", "--monitor", "chardev=qmp"], "here"
        )
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.stack.callback(sock.close)
        sock.settimeout(QMP_S)
        sock.connect(str(qmp))
        lines = sock.makefile("r", encoding="utf-8")
        self.stack.callback(lines.close)
        job = {"job-id": "mirror", "device": "here", "target": "there", "sync": "full", "copy-mode": "write-blocking"}
        for command in ({"execute": "qmp_capabilities"}, {"execute": "blockdev-mirror", "arguments": job}):
            sock.sendall(json.dumps(command).encode() + b"\n")
        try:
            for line in lines:
                said = json.loads(line)
                if "error" in said:
                    raise BenchError(f"blockdev-mirror: {said['error']['desc']}")
                if said.get("event") == "BLOCK_JOB_READY":
                    return
        except TimeoutError:
            pass
        raise BenchError("blockdev-mirror was not ready in time")


class Gluster(System):
    """A GlusterFS volume with two bricks on this machine, reached without a mount by fio's gfapi engine.

    Only what Tandem is held against is measured: each run takes ten seconds more, because at its end glfs_fini
    waits in vain for calls that the engine has left.
    """

    name = "gluster"
    title = "GlusterFS replica 2, gfapi"
    is_replicated = True
    only = frozenset(workload for workload, peer in PEER_BARS if peer == "gluster")

    @classmethod
    def unavailable(cls) -> str:
        if shutil.which("glusterd") is None:
            return "glusterd is not installed (Debian package glusterfs-server)"
        if os.geteuid() != 0:
            return "glusterd needs root"
        engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
        return "" if "gfapi" in engines.split() else "this fio has no gfapi engine"

    def start(self) -> None:
        work, log = self.directory / "glusterd", self.directory / "log"
        (self.directory / "glusterd.vol").write_text(
            "volume management\n type mgmt/glusterd\n"
            f" option working-directory {work}\n option run-directory {self.directory}\n"
            " option transport-type socket\n"
            f" option glusterd-sockfile {self.directory}/glusterd.socket\nend-volume\n", encoding="utf-8",
        )  # fmt: skip
        work.mkdir()
        self.run(
            ["glusterd", "-N", "-f", str(self.directory / "glusterd.vol"), "-l", str(log), "-p",
             str(self.directory / "pid")], self.directory / "glusterd.socket", "glusterd",
        )  # fmt: skip
        self.stack.callback(self._stop_bricks)
        bricks = [f"{os.uname().nodename}:{self.directory}/brick{i}" for i in (1, 2)]
        self.gluster("volume", "create", "bench", "replica", "2", *bricks, "force")
        self.gluster("volume", "start", "bench")
        self.parts |= {f"brick {i}": [pid] for i, pid in enumerate(self._bricks(), 1)}
        with open(self.directory / "log", "ab") as out:
            made = subprocess.run(
                ["fio", "--name=make", *self.engine, "--rw=write", "--bs=1m", f"--size={self.size}"],
                stdout=out, stderr=out, timeout=600, check=False,
            )  # fmt: skip
        if made.returncode:
            raise BenchError(f"fio cannot write to GlusterFS: {last_line(self.directory / 'log')}")

    @property
    def engine(self) -> list[str]:
        return ["--ioengine=gfapi_async", "--volume=bench", "--brick=127.0.0.1", "--filename=disk"]

    def gluster(self, *words: str) -> None:
        socket_option = f"--glusterd-sock={self.directory}/glusterd.socket"
        command = ["gluster", "--mode=script", socket_option, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=QMP_S, check=False)
        if done.returncode:
            raise BenchError(f"gluster {' '.join(words[:2])}: {(done.stderr or done.stdout).strip()}")

    def _bricks(self) -> list[int]:
        """The pids of the brick servers, which glusterd has started."""
        return self._started(b"glusterfsd")

    def _started(self, program: bytes) -> list[int]:
        """The pids of *program* with this system's directory among their arguments."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if os.path.basename(words[0]) == program and any(str(self.directory).encode() in w for w in words):
                    found.append(int(entry.name))
        return found

    def _stop_bricks(self) -> None:
        with contextlib.suppress(BenchError, subprocess.TimeoutExpired):
            self.gluster("volume", "stop", "bench", "force")
        for pid in (*self._bricks(), *self._started(b"glusterfs")):  # the second is the self-heal daemon
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)


class KernelDrbd(System):
    """The kernel's DRBD, in two guests of the lab; fio runs in the guest of the Primary, on the block device.

    A User-Mode-Linux guest has one processor, and every system call and interrupt in it costs many times what it
    does on the machine itself. So the figures say what such a guest does, not what DRBD can do.
    """

    name = "kernel-drbd"
    title = "kernel DRBD in UML guests, fio inside"
    is_replicated = True

    @classmethod
    def unavailable(cls) -> str:
        probe = [sys.executable, "-c", "from tests.lab.uml import missing; print(missing())"]
        done = subprocess.run(probe, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        return done.stderr.strip().split("\n")[-1] if done.returncode else done.stdout.strip()

    def start(self) -> None:
        log = open(self.directory / "log", "ab")  # noqa: SIM115 - closed with the stack
        self.stack.callback(log.close)
        self.guests = subprocess.Popen(
            [sys.executable, "-m", "tests.lab.kernel_pair", str(self.size // MIB)], cwd=REPOSITORY,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        self.stack.callback(self._end)
        assert self.guests.stdout is not None
        if self.guests.stdout.readline() != "ready\n":
            raise BenchError(f"{self.title} did not start: {last_line(self.directory / 'log')}")
        for pid in descendants(self.guests.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            for name, part in ((b"alice", PRIMARY), (b"bob", SECONDARY)):
                if part not in self.parts and any(word.startswith(b"umid=" + name) for word in words):
                    self.parts[part] = descendants(pid)  # its launcher, which has the guest's arguments, comes first

    def _end(self) -> None:
        assert self.guests.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.guests.stdin.close()
        try:
            self.guests.wait(QMP_S)
        except subprocess.TimeoutExpired:
            self.guests.kill()
            self.guests.wait()

    @property
    def engine(self) -> list[str]:
        # Threads: fio's processes would share a part of memory that a guest's small /dev/shm must hold.
        return ["--ioengine=libaio", "--direct=1", "--thread", "--filename=/dev/drbd0"]

    def execute(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        assert self.guests.stdin is not None and self.guests.stdout is not None
        self.guests.stdin.write(json.dumps(command) + "\n")
        self.guests.stdin.flush()
        line = self.guests.stdout.readline()
        if not line:
            raise BenchError(f"{self.title} ended: {last_line(self.directory / 'log')}")
        return subprocess.CompletedProcess(command, *json.loads(line))


ALL: Final[tuple[type[System], ...]] = (
    NbdkitFile, QemuNbd, NbdServer, Tandem, TandemInNbdkit, QemuQuorum, QemuBlockdevMirror, Gluster,
    KernelDrbd,
)  # fmt: skip
