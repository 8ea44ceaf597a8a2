"""nbd/nbdkit_plugin.py in the real nbdkit: one node of a pair lives inside it, the other is `tandemd`."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tandem.tools.client import wait_ended
from tandem.tools.demo_nbd import Nbd, Request
from tandem.tools.demo_pair import Pair, alone, first_difference, usable_size

from tests.conftest import FindProgram, NewPair
from tests.ledger import DEPTH, ConnectionLost, Ledger

MIB = 1 << 20
PATIENCE_S = 60.0
# nbdkit's Python takes the library of the first python3 in PATH, which is to be the system's as it is.
ENVIRONMENT = os.environ | {"VIRTUAL_ENV": sys.prefix, "PATH": f"/usr/bin:/bin:{os.environ['PATH']}"}
PLUGIN = Path(__file__).resolve().parents[2] / "nbd" / "nbdkit_plugin.py"


class Nbdkit:
    """nbdkit with alice of *pair* inside; *words* come before the plugin, *more* behind its parameters."""

    def __init__(self, nbdkit: str, pair: Pair, *words: str, more: tuple[str, ...] = ()) -> None:
        self.pair = pair
        self.socket = pair.directory / "nbdkit.sock"
        self.socket.unlink(missing_ok=True)
        self.log = pair.directory / "nbdkit.log"
        node = pair.first.name
        where = [f"config={pair.config}", f"node={node}", f"run-dir={pair.run_dir}"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [nbdkit, "-f", "-U", str(self.socket), *words, "python", str(PLUGIN), "resource=r0", *where, *more],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT,
            )  # fmt: skip

    def uri(self, export: str = "r0", scheme: str = "nbd") -> str:
        return f"{scheme}+unix:///{export}?socket={self.socket}"

    def python(self, script: str) -> str:
        """What *script* prints, run with ``h``, a libnbd handle connected to the export."""
        start = f"import nbd, os\nh = nbd.NBD()\nh.add_meta_context('base:allocation')\nh.connect_uri({self.uri()!r})\n"
        return run("/usr/bin/python3", "-c", start + textwrap.dedent(script))

    def ended(self) -> int:
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            finally:
                self.process.kill()


Start = Callable[..., Nbdkit]


def run(*command: str) -> str:
    """What an outside program prints, which must end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, cwd="/")
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def start(program: FindProgram, new_pair: NewPair) -> Iterator[Start]:
    """Starts nbdkit with alice, Primary and in sync with bob unless *promote* is false."""
    pair = new_pair()
    pair.create()
    pair.adm(pair.second, "up", "r0")
    running: list[Nbdkit] = []

    def begin(*words: str, promote: bool = True, more: tuple[str, ...] = ()) -> Nbdkit:
        nbdkit = Nbdkit(program("nbdkit"), pair, *words, more=more)
        running.append(nbdkit)
        # Once bob sees a peer, alice's node and its control socket are there.
        pair.wait(pair.second, "connected", lambda s: s.connection.connection == "Connected", PATIENCE_S)
        if promote:
            first_time = pair.status(pair.first).volumes[0].disk != "UpToDate"
            pair.adm(pair.first, "primary", *(["--force"] if first_time else []), "r0")
            pair.wait_in_sync()
        return nbdkit

    yield begin
    for nbdkit in running:
        nbdkit.close()


def same_disks(pair: Pair) -> None:
    pair.wait_in_sync()
    length = usable_size(pair.status(pair.second))
    assert first_difference(pair.first.disk, pair.second.disk, length) is None


# ------------------------------------------------------------------------------------------- requests


def test_every_kind_of_request(start: Start) -> None:
    nbdkit = start()
    nbdkit.python("""
        big = os.urandom(32 << 20)
        h.pwrite(big, 1 << 20)
        assert h.pread(32 << 20, 1 << 20) == big, "32 MiB in one request"
        h.pwrite(b"a" * 4096, 0, nbd.CMD_FLAG_FUA)
        h.pwrite(b"b" * 512, 512)
        h.zero(8192, 2 << 20)
        h.zero(8192, 3 << 20, nbd.CMD_FLAG_NO_HOLE)
        h.trim(1 << 20, 4 << 20, nbd.CMD_FLAG_FUA)
        h.cache(1 << 20, 0)
        h.flush()
        assert h.pread(4096, 0) == b"a" * 512 + b"b" * 512 + b"a" * 3072
        assert not any(h.pread(8192, 2 << 20)) and not any(h.pread(8192, 3 << 20))
        assert not any(h.pread(1 << 20, 4 << 20))
        for call in (lambda: h.pread(512, 100), lambda: h.pwrite(b"x" * 100, 0)):
            try:
                call()
            except nbd.Error as error:
                assert error.errno == "EINVAL", error
            else:
                raise AssertionError("half a sector")
        """)
    same_disks(nbdkit.pair)


def test_what_is_offered(start: Start) -> None:
    nbdkit = start()
    (export,) = json.loads(run("nbdinfo", "--json", nbdkit.uri("")))["exports"]
    assert export["description"] == "Primary, UpToDate"
    assert export["export-size"] == usable_size(nbdkit.pair.status(nbdkit.pair.first))
    for flag in ("can_cache", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"):
        assert export[flag] is True, flag
    (listed,) = json.loads(run("nbdinfo", "--list", "--json", nbdkit.uri()))["exports"]
    assert (listed["export-name"], listed["description"]) == ("r0", "Primary, UpToDate")
    run("qemu-io", "-f", "raw", "-c", "write -P 7 1M 1M", "-c", "flush", nbdkit.uri())
    extents = json.loads(run("nbdinfo", "--map", "--json", nbdkit.uri()))
    data = [(e["offset"], e["length"]) for e in extents if e["type"] == 0]
    assert (MIB, MIB) in data and any(e["description"] == "hole,zero" for e in extents), extents


def test_many_threads_and_connections(start: Start, program: FindProgram) -> None:
    nbdkit = start("-t", "32")
    run(program("fio"), "--name=verify", "--ioengine=nbd", f"--uri={nbdkit.uri()}", "--rw=randrw", "--bsrange=512-2M",
        "--bs_unaligned=0", "--blockalign=512", "--size=8M", "--iodepth=16", "--numjobs=4", "--offset_increment=10M",
        "--verify=crc32c", "--verify_fatal=1", "--fsync=20", "--minimal")  # fmt: skip
    same_disks(nbdkit.pair)


# ------------------------------------------------------------------------------------- filters and TLS


@pytest.mark.parametrize(
    ("filters", "parameters"),
    [
        (("rate", "delay"), ("rate=400M", "delay-write=1ms")),
        (("error",), ("error-pread-rate=0%",)),
        (("blocksize",), ("minblock=4096",)),
    ],
)  # fmt: skip
def test_under_filters(start: Start, filters: tuple[str, ...], parameters: tuple[str, ...]) -> None:
    nbdkit = start(*[f"--filter={name}" for name in filters], more=parameters)
    run("qemu-io", "-f", "raw", "-c", "write -P 5 64k 3M", "-c", "flush", "-c", "read -P 5 64k 3M",
        "-c", "discard 1M 64k", "-c", "write -z 2M 64k", nbdkit.uri())  # fmt: skip
    same_disks(nbdkit.pair)


def test_the_log_and_the_statistics_of_filters(start: Start, directory: Path) -> None:
    log, stats = directory / "log", directory / "stats"
    nbdkit = start("--filter=log", "--filter=stats", more=(f"logfile={log}", f"statsfile={stats}"))
    run("qemu-io", "-f", "raw", "-c", "write -f -P 5 64k 1M", "-c", "flush", "-c", "read -P 5 64k 1M", nbdkit.uri())
    same_disks(nbdkit.pair)
    nbdkit.close()
    said = log.read_text()
    assert "Write id=" in said and "offset=0x10000" in said and "Read id=" in said and "Flush id=" in said, said
    assert "write: 1 ops" in stats.read_text() and "1.00 MiB" in stats.read_text(), stats.read_text()


def test_behind_a_copy_on_write_the_mirror_stays_as_it_was(start: Start) -> None:
    nbdkit = start("--filter=cow")
    before = nbdkit.pair.second.disk.read_bytes()
    run("qemu-io", "-f", "raw", "-c", "write -P 9 0 1M", "-c", "read -P 9 0 1M", nbdkit.uri())
    assert nbdkit.pair.second.disk.read_bytes() == before


def test_an_error_of_a_filter_is_the_clients(start: Start) -> None:
    nbdkit = start("--filter=error", more=("error-pwrite=ENOSPC", "error-pwrite-rate=100%"))
    said = nbdkit.python("""
        try:
            h.pwrite(b"x" * 4096, 0)
        except nbd.Error as error:
            print(error.errno)
        h.pread(4096, 0)
        """)
    assert said.strip() == "ENOSPC"


def test_exitlast_takes_the_node_down(start: Start) -> None:
    nbdkit = start("--filter=exitlast")
    run("qemu-io", "-f", "raw", "-c", "write -P 3 0 1M", nbdkit.uri())
    assert nbdkit.ended() == 0
    pair = nbdkit.pair
    pair.wait(pair.second, "alone", alone)
    pair.adm(pair.second, "primary", "r0")  # alice left in order: bob knows that he has everything
    run("qemu-io", "-f", "raw", "-c", "read -P 3 0 1M", pair.second.uri)


def test_tls(start: Start, program: FindProgram, directory: Path) -> None:
    keys = directory / "keys.psk"
    run(program("psktool"), "-u", "alice", "-p", str(keys))
    nbdkit = start("--tls=require", f"--tls-psk={keys}")
    uri = nbdkit.uri(scheme="nbds").replace("nbds+unix:///", "nbds+unix://alice@/") + f"&tls-psk-file={keys}"
    info = json.loads(run("nbdinfo", "--json", uri))
    assert info["TLS"] is True and info["exports"][0]["export-name"] == "r0"
    content = directory / "content"
    content.write_bytes(os.urandom(MIB))
    run("nbdcopy", str(content), uri)
    assert nbdkit.pair.second.disk.read_bytes().startswith(content.read_bytes())


def test_tls_with_certificates(start: Start, program: FindProgram, directory: Path) -> None:
    keys = directory / "pki"
    keys.mkdir()
    make = (program("certtool"), "--ecc", "--outfile")
    (keys / "ca.info").write_text("cn = Test\nca\ncert_signing_key\n")
    (keys / "server.info").write_text("cn = localhost\ndns_name = localhost\ntls_www_server\nsigning_key\n")
    for name in ("ca", "server"):
        run(*make, str(keys / f"{name}-key.pem"), "--generate-privkey")
    signed_by = ("--load-ca-certificate", str(keys / "ca-cert.pem"), "--load-ca-privkey", str(keys / "ca-key.pem"))
    for name, how in (("ca", ("--generate-self-signed",)), ("server", ("--generate-certificate", *signed_by))):
        run(*make, str(keys / f"{name}-cert.pem"), *how, "--load-privkey", str(keys / f"{name}-key.pem"),
            "--template", str(keys / f"{name}.info"))  # fmt: skip
    nbdkit = start("--tls=require", f"--tls-certificates={keys}")
    uri = nbdkit.uri(scheme="nbds").replace("nbds+unix:///", "nbds+unix://localhost/") + f"&tls-certificates={keys}"
    content = directory / "content"
    content.write_bytes(os.urandom(MIB))
    run("nbdcopy", str(content), uri)
    assert nbdkit.pair.second.disk.read_bytes().startswith(content.read_bytes())
    plain = subprocess.run(["nbdinfo", nbdkit.uri()], capture_output=True, text=True)
    assert plain.returncode != 0, "served without TLS"


# --------------------------------------------------------------------------- who goes away under load


class Load:
    """Overlapping writes of one client after the other, and what the disk may hold after them."""

    def __init__(self, nbdkit: Nbdkit) -> None:
        size = usable_size(nbdkit.pair.status(nbdkit.pair.first))
        self.ledger = Ledger(size, random.Random(7))

    def write(self, socket: Path, n_requests: int, event: Callable[[], object]) -> bool:
        """Write; *event* happens after a third of it. False when the server went away in between."""
        left = [event]

        def answered(request: Request) -> None:
            if request.error == errno.ESHUTDOWN and not left:
                return  # what nbdkit answers when it was told to end: it may have been done or not
            self.ledger.answered(request)
            if self.ledger.n_acknowledged >= n_requests // 3 and left:
                left.pop()()

        try:
            with Nbd(socket, "r0") as nbd:
                nbd.run(self.ledger.requests(n_requests), DEPTH, answered)
        except ConnectionLost:
            return False
        finally:
            self.ledger.session_over()
            assert not left, "it has not happened"
        return True

    def check(self, socket: Path) -> None:
        with Nbd(socket, "r0") as nbd:
            assert self.ledger.check(nbd) > 0


def test_told_to_end_under_load(start: Start) -> None:
    nbdkit = start()
    pair, load = nbdkit.pair, Load(nbdkit)
    load.write(nbdkit.socket, 3000, nbdkit.process.terminate)
    assert nbdkit.ended() == 0
    said = nbdkit.log.read_text()
    assert "Traceback" not in said
    assert "role( Primary -> Secondary )" in said and "refused" not in said  # nbdkit closes no handles then
    pair.wait(pair.second, "alone", alone)
    pair.adm(pair.second, "primary", "r0")  # in order: without force
    load.check(pair.second.socket)
    pair.adm(pair.second, "secondary", "r0")
    same_disks(start().pair)


def test_a_client_that_vanishes_leaves_the_volume(start: Start) -> None:
    nbdkit = start()
    pair = nbdkit.pair
    script = f"import nbd\nh = nbd.NBD()\nh.connect_uri({nbdkit.uri()!r})\nfor i in range(64):\n" \
        "    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(1 << 18)), i << 18)\n" \
        "print(flush=True)\nwhile True:\n    h.poll(-1)\n"  # fmt: skip
    with subprocess.Popen(["/usr/bin/python3", "-c", script], stdout=subprocess.PIPE, cwd="/") as client:
        assert client.stdout is not None
        client.stdout.readline()
        client.kill()
    pair.wait(pair.first, "closed", lambda s: not s.volumes[0].open)
    run("qemu-io", "-f", "raw", "-c", "write -P 6 1M 1M", "-c", "read -P 6 1M 1M", nbdkit.uri())
    same_disks(pair)


def test_a_peer_that_dies_under_load_comes_back(start: Start) -> None:
    nbdkit = start()
    pair, load = nbdkit.pair, Load(nbdkit)
    assert load.write(nbdkit.socket, 1500, lambda: pair.kill(pair.second)), "the Primary went away with its peer"
    load.check(nbdkit.socket)
    pair.adm(pair.second, "up", "r0")
    assert load.write(nbdkit.socket, 300, lambda: None)
    same_disks(pair)
    load.check(nbdkit.socket)


def test_down_under_load_is_refused_and_harms_nobody(start: Start) -> None:
    nbdkit = start()
    pair, load = nbdkit.pair, Load(nbdkit)
    refused = []
    assert load.write(nbdkit.socket, 1500, lambda: refused.append(pair.run(pair.first, "down", "r0")))
    assert refused[0].returncode == 11 and "Device is held open by someone" in refused[0].stderr
    load.check(nbdkit.socket)
    same_disks(pair)


def test_memory_stays_bounded(start: Start, program: FindProgram) -> None:
    """The bound of a daemon (test_memory.py). Payloads that only the garbage collector frees would be twice as much."""
    nbdkit = start()
    for mode in ("write", "read", "randrw"):
        run(program("fio"), "--name=load", "--ioengine=nbd", f"--uri={nbdkit.uri()}", f"--rw={mode}", "--bs=1m",
            "--iodepth=16", "--size=60m", "--time_based", "--runtime=2", "--minimal")  # fmt: skip
    (line,) = [x for x in Path(f"/proc/{nbdkit.process.pid}/status").read_text().splitlines() if "VmHWM" in x]
    assert int(line.split()[1]) * 1024 < 188 * MIB, line


# ---------------------------------------------------------------------------------- a node all the same


def test_a_secondary_is_refused_with_its_sentence(start: Start) -> None:
    nbdkit = start(promote=False)
    refused = subprocess.run(["nbdinfo", nbdkit.uri()], capture_output=True, text=True)
    assert refused.returncode != 0
    log = nbdkit.log.read_text()
    assert "r0 is Secondary on alice" in log and "Traceback" not in log, log
    refused = subprocess.run(["nbdinfo", nbdkit.uri("r9")], capture_output=True, text=True)
    assert refused.returncode != 0 and "no export is called 'r9'; there are r0" in nbdkit.log.read_text()


def test_killed_in_mid_write_the_peer_takes_over(start: Start) -> None:
    nbdkit = start()
    pair = nbdkit.pair
    run("qemu-io", "-f", "raw", "-c", "write -P 0x31 0 8M", nbdkit.uri())
    nbdkit.process.send_signal(signal.SIGKILL)
    nbdkit.ended()
    pair.wait(pair.second, "alone", alone)
    pair.adm(pair.second, "primary", "r0")
    run("qemu-io", "-f", "raw", "-c", "read -P 0x31 0 8M", "-c", "write -P 0x32 1M 1M", pair.second.uri)
    start(promote=False)
    same_disks(pair)


def test_down_waits_for_the_client_and_ends_nbdkit(start: Start) -> None:
    nbdkit = start()
    pair = nbdkit.pair
    script = f"import nbd\nh = nbd.NBD()\nh.connect_uri({nbdkit.uri()!r})\nprint(flush=True)\ninput()"
    client = subprocess.Popen(
        ["/usr/bin/python3", "-c", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    assert client.stdin is not None and client.stdout is not None
    with client:
        client.stdout.readline()
        refused = pair.run(pair.first, "down", "r0")
        assert refused.returncode == 11 and "Device is held open by someone" in refused.stderr
        client.communicate("\n")
    deadline = time.monotonic() + PATIENCE_S
    while pair.status(pair.first).volumes[0].open and time.monotonic() < deadline:
        time.sleep(0.02)  # nbdkit closes the volume some time after its client has gone
    pair.adm(pair.first, "down", "r0")
    assert nbdkit.ended() == 0
    assert wait_ended(pair.first.paths, "r0", PATIENCE_S)


def test_what_is_wrong_on_the_command_line_is_one_sentence(program: FindProgram, new_pair: NewPair) -> None:
    pair = new_pair()
    pair.create()
    cases = {
        ("resource=r9",): "'r9' not defined in your config (for this host).",
        ("colour=red",): "unknown parameter 'colour'; there are resource, config, node, run-dir",
        (): "which resource? Say resource=NAME",
    }
    for words, sentence in cases.items():
        where = [f"config={pair.config}", f"node={pair.first.name}", f"run-dir={pair.run_dir}"] if words else []
        done = subprocess.run(
            [program("nbdkit"), "-f", "-U", "-", "python", str(PLUGIN), *words, *where], capture_output=True, text=True,
            env=ENVIRONMENT,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (1, f"tandem: {sentence}\n")


def test_another_pythons_library_is_one_sentence(program: FindProgram, directory: Path) -> None:
    """As with pyenv first in PATH: a library of the right version, whose compiled modules are another Python's."""
    library = Path(run("/usr/bin/python3", "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))").strip())
    other = directory / "lib" / library.name
    (other / "lib-dynload").mkdir(parents=True)
    for entry in library.iterdir():
        if entry.name != "lib-dynload":
            (other / entry.name).symlink_to(entry)
    for module in (library / "lib-dynload").iterdir():
        (other / "lib-dynload" / module.name).touch()
    python = directory / "bin" / "python3"
    python.parent.mkdir()
    python.touch(0o755)
    done = subprocess.run(
        [program("nbdkit"), "-f", "-U", "-", "python", str(PLUGIN), "resource=r0"], capture_output=True, text=True,
        env=ENVIRONMENT | {"PATH": f"{python.parent}:{ENVIRONMENT['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert f"the library of another Python, which it has found in {directory} by PATH" in done.stderr
    assert "PATH=/usr/bin:$PATH" in done.stderr


def test_without_tandem_it_says_where_it_has_looked(program: FindProgram, directory: Path) -> None:
    alone = directory / "nbdkit_plugin.py"
    alone.write_bytes(PLUGIN.read_bytes())
    done = subprocess.run(
        [program("nbdkit"), "-f", "-U", "-", "python", str(alone), "resource=r0"], capture_output=True, text=True,
        env=ENVIRONMENT | {"VIRTUAL_ENV": str(directory)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert "No module named 'tandem', looked for with nbdkit's Python 3" in done.stderr
    assert f"VIRTUAL_ENV={directory}: install Tandem for it, or name" in done.stderr
