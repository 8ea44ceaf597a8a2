"""`tandemadm nbd attach`: a file system under load, while daemons restart and the Primary moves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Final

import pytest
from tandem.tools.demo_pair import Node, first_difference, usable_size

from .block_host import DEVICE, BlockHost
from .uml import HOST_LAN

N_RESTARTS: Final = 20
N_FAILOVERS: Final = 5


@pytest.fixture
def attached(block_host: BlockHost) -> Iterator[BlockHost]:
    block_host.attach()
    yield block_host
    block_host.adm("nbd", "detach", "--force", DEVICE, check=False)


# ------------------------------------------------------------------------------------------ load

# Writes files of up to 256 KiB, each stable before its checksum goes to the ledger, which is outside the guest.
WRITER: Final = """
import hashlib, os, random, sys
ledger, end = "/shared/ledger", "/shared/end"
n = 0
while not os.path.exists(end):
    n += 1
    data = random.Random(n).randbytes(random.Random(-n).randrange(1, 256 << 10))
    path = f"/mnt/{n % 200}"
    try:
        with open(path + ".new", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(path + ".new", path)
        fd = os.open("/mnt", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
    except OSError as error:
        print(f"file {n}: {error}", file=open("/shared/failed", "a"))
        sys.exit(1)
    with open(ledger, "a") as file:
        file.write(f"{path} {hashlib.sha256(data).hexdigest()}\\n")
"""

# Direct I/O that reads back what it wrote a moment ago, again and again.
FIO: Final = """
while [ ! -e /shared/end ]; do
    fio --thread --name=verify --filename=/mnt/fio --size=8m --rw=randrw --bsrange=4k-64k --direct=1 \
        --ioengine=libaio --iodepth=8 --verify=crc32c --verify_backlog=32 --verify_fatal=1 --verify_state_save=0 \
        --time_based --runtime=5 > /tmp/fio.txt 2>&1 || { cat /tmp/fio.txt >> /shared/failed; exit 1; }
done
"""


class Load:
    """A file system on the device and what runs on it. `moves_on` says that requests are answered."""

    def __init__(self, host: BlockHost) -> None:
        self.host = host
        self.shared = host.guest.lab.shared
        for name in ("ledger", "end", "failed"):
            (self.shared / name).unlink(missing_ok=True)
        host.guest.sh(f"mkfs.ext4 -q /dev/drbd/by-res/r0 && mount {DEVICE} /mnt")
        host.guest.spawn("python3", "-c", WRITER)
        host.guest.spawn("bash", "-c", FIO)
        self.moves_on("begun")

    def n_files(self) -> int:
        try:
            return (self.shared / "ledger").read_text().count("\n")
        except FileNotFoundError:
            return 0

    def failure(self) -> str:
        try:
            return (self.shared / "failed").read_text()
        except FileNotFoundError:
            return ""

    def moves_on(self, after: str) -> None:
        """Wait until files are written that were begun after this call."""
        wanted = self.n_files() + 2
        self.host.wait(lambda: self.n_files() >= wanted or bool(self.failure()), f"writing ({after})")
        assert not self.failure(), f"{after}: {self.failure()}\n{self.host.report()}"

    def end(self) -> None:
        """Stop, unmount, check the file system, and every file against the ledger."""
        (self.shared / "end").touch()
        guest = self.host.guest
        guest.sh("while pgrep -f '[v]erify_backlog|[l]edger, end' > /dev/null; do sleep 0.1; done; umount /mnt")
        guest.sh(f"e2fsck -fn {DEVICE} && mount -o ro {DEVICE} /mnt")
        assert not self.failure(), self.failure()
        last = dict(line.split() for line in (self.shared / "ledger").read_text().splitlines())
        wrong = "\n".join(f"{digest}  {path}" for path, digest in last.items())
        checked = guest.run("sha256sum", "-c", "--quiet", "-", stdin=wrong + "\n", check=False)
        assert checked.rc == 0, checked.out + checked.err
        guest.sh("umount /mnt")


def restart(host: BlockHost, node: Node, number: int) -> None:
    """End the Primary's daemon, as a crash or as its service does, and bring it back as Primary."""
    if number == signal.SIGKILL:
        host.pair.kill(node)
    else:
        host.pair.end(node)
    host.pair.adm(node, "up", "r0")
    host.pair.adm(node, "primary", "r0")


# ----------------------------------------------------------------------------------------- tests


def test_restarts_and_failovers(attached: BlockHost) -> None:
    """20 restarts of the Primary's daemon and 5 failovers under load: all files right, and not one error."""
    pair, load = attached.pair, Load(attached)
    primary = attached.alice
    for n in range(N_RESTARTS):
        restart(attached, primary, signal.SIGKILL if n % 2 else signal.SIGTERM)
        load.moves_on(f"restart {n}")
        if n % (N_RESTARTS // N_FAILOVERS) == 3:
            pair.wait_in_sync()
            former, primary = primary, pair.peer_of(primary)
            pair.kill(former)
            pair.adm(primary, "primary", "r0")
            load.moves_on(f"failover to {primary.name}")
            assert f"server:{primary.name}" in attached.listed()
            pair.adm(former, "up", "r0")
    load.end()
    assert not attached.errors()
    assert "state:Connected connections:2/2" in attached.listed()
    pair.wait_in_sync()
    size = usable_size(pair.status(primary))
    assert first_difference(attached.alice.disk, attached.bob.disk, size) is None


def test_no_primary_for_a_while(attached: BlockHost) -> None:
    """Requests wait while both nodes are Secondary, and while there is no node; then they are answered."""
    pair, load = attached.pair, Load(attached)
    pair.end(attached.alice)
    pair.adm(attached.alice, "up", "r0")
    attached.wait(lambda: "state:Waiting" in attached.listed(), "waiting")
    n_files = load.n_files()
    pair.end(attached.bob)
    attached.wait(lambda: attached.says("Dead connection, failed to find a fallback"), "waiting in the kernel")
    assert load.n_files() <= n_files + 1
    assert "is Secondary on alice" in attached.listed()
    pair.adm(attached.alice, "primary", "--force", "r0")
    load.moves_on("a Primary again")
    pair.adm(attached.bob, "up", "r0")
    load.end()
    assert not attached.errors()


def test_keeper_is_killed(attached: BlockHost) -> None:
    """Without its keeper the device goes on; a restart then makes it wait until the next keeper adopts it."""
    load = Load(attached)
    attached.guest.sh(f"kill -9 {attached.keeper_pid()}")
    load.moves_on("keeper killed")
    assert "without a keeper" in attached.listed()
    attached.attach()  # adopts a device with living connections
    load.moves_on("adopted")
    assert "state:Connected connections:2/2" in attached.listed()
    restart(attached, attached.alice, signal.SIGKILL)
    load.moves_on("restart after adoption")
    attached.guest.sh(f"kill -9 {attached.keeper_pid()}")
    restart(attached, attached.alice, signal.SIGKILL)
    attached.attach()  # adopts a device with dead connections
    load.moves_on("adopted again")
    load.end()
    assert not attached.errors()


def test_down_is_refused_while_attached(attached: BlockHost) -> None:
    """The operator's mistake: the resource is in use, says DRBD's sentence, and nothing happens."""
    refused = attached.pair.run(attached.alice, "down", "r0")
    assert refused.returncode == 11 and "held open" in refused.stderr
    attached.guest.sh(f"dd if=/dev/zero of={DEVICE} bs=1M count=1 oflag=direct status=none")


def test_sentences(attached: BlockHost) -> None:
    """What cannot be done is said in one sentence, and changes nothing."""
    def refused(code: int, part: str, *words: str) -> None:
        ran = attached.adm("nbd", *words, check=False)
        assert (ran.rc, part in ran.err, ran.err.count("\n")) == (code, True, 1), ran

    guest = attached.guest
    by_client = f"{HOST_LAN} {attached.port} /dev/nbd5 -name r0"
    guest.sh(f"nbd-client {by_client}")
    refused(20, "was connected by another program", "attach", "r0", "/dev/nbd5")
    refused(20, "not attached with", "detach", "/dev/nbd5")
    guest.sh("nbd-client -d /dev/nbd5")
    nobody = guest.run("setpriv", "--reuid=65534", *attached.command("nbd", "attach", "r0", DEVICE), check=False)
    assert nobody.rc == 20 and nobody.err == "only root can work with /dev/nbd devices; use sudo.\n", nobody
    again = attached.adm("nbd", "attach", "r0", DEVICE)
    assert again.out == "r0 is /dev/nbd0 already\n"
    refused(20, "is attached already, with --connections 2;", "attach", "--connections", "4", "r0", DEVICE)
    refused(2, "is not in the range", "attach", "--timeout", "9" * 23, "r0", DEVICE)
    refused(1, "the last nbd device is", "attach", "r0", "/dev/nbd999999999999")
    refused(1, "nbd attach r0 /dev/nbd0", "attach", DEVICE, "r0")
    refused(20, "by-res/r0 is /dev/nbd0 already", "attach", "r0", "/dev/nbd1")
    refused(1, "not an nbd device", "attach", "r0", "/dev/sda")
    refused(1, "'r7' not defined", "attach", "r7", "/dev/nbd1")
    refused(1, "r7 is not attached", "detach", "r7")
    guest.sh(f"mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt")
    refused(20, "is in use by the file system mounted on /mnt", "detach", DEVICE)
    guest.sh("umount /mnt")
    attached.adm("nbd", "detach", "r0/0")
    assert attached.listed() == ""
    guest.sh("! ls /dev/drbd/by-res/r0 2> /dev/null")
    assert attached.keeper_log().endswith("r0: the keeper ends; /dev/nbd0 is being detached\n")
    guest.sh("mkdir -p /dev/drbd/by-res && touch /dev/drbd/by-res/r0")
    refused(20, "remove what is in the way", "attach", "r0", DEVICE)
    guest.sh("rm /dev/drbd/by-res/r0")
    attached.pair.adm(attached.alice, "secondary", "r0")
    refused(20, "no node serves r0 as Primary", "attach", "r0", DEVICE)
    guest.sh("rmmod nbd && mv /lib/modules /lib/modules.away")
    refused(20, "no nbd driver", "attach", "r0", DEVICE)
    guest.sh("mv /lib/modules.away /lib/modules")
    attached.pair.adm(attached.alice, "primary", "r0")


# Writes as a virtual machine does: without O_EXCL.
USER: Final = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
while True:
    os.pwrite(fd, os.urandom(4096), 1 << 20)
    os.fsync(fd)
    open("/shared/written", "a").write("x")
    time.sleep(0.05)
"""


@pytest.mark.parametrize("how", ["device", "partition", "swap"])
def test_a_device_in_use_stays(attached: BlockHost, how: str) -> None:
    """Who has the device open, exclusively or not, is named by detach and by a keeper that ends, and keeps it."""
    guest, written = attached.guest, attached.guest.lab.shared / "written"
    written.write_text("")
    path = DEVICE
    if how == "partition":
        numbers = "$(tr : ' ' < /sys/block/nbd0/nbd0p1/dev)"
        guest.sh(f"addpart {DEVICE} 1 2048 8192; [ -b {DEVICE}p1 ] || mknod {DEVICE}p1 b {numbers}")
        path = f"{DEVICE}p1"
    if how == "swap":
        guest.sh(f"mkswap -q {DEVICE} && swapon {DEVICE}")
        user = f"swap on {DEVICE}"
    else:
        pid = guest.spawn("python3", "-c", USER, path)
        attached.wait(lambda: written.stat().st_size > 2, "writing")
        user = f"pid {pid} (python3)"
    refused = attached.adm("nbd", "detach", "r0", check=False)
    assert refused.rc == 20 and f"{DEVICE} is in use by {user}; end that first" in refused.err, refused
    assert refused.err.count("\n") == 1 and "state:Connected" in attached.listed()
    guest.sh(f"kill {attached.keeper_pid()}")
    attached.wait(lambda: "without a keeper" in attached.listed(), "left alone")
    assert f"{DEVICE} stays, as it is in use by {user}. " in attached.keeper_log()
    attached.attach()
    restart(attached, attached.alice, signal.SIGTERM)
    if how == "swap":
        guest.sh(f"swapoff {DEVICE}")
    else:
        n_written = written.stat().st_size
        attached.wait(lambda: written.stat().st_size > n_written + 2, "writing after a restart")
        guest.end(pid)
    attached.adm("nbd", "detach", "r0")
    assert attached.listed() == "" and not attached.errors()


def test_foreground_keeper_ends_with_its_device(block_host: BlockHost) -> None:
    """SIGINT, as Ctrl-C sends it: the device is detached, or left as it is when somebody uses it."""
    guest = block_host.guest
    for in_use in (True, False):
        block_host.spawn_foreground()
        block_host.wait(lambda: "state:Connected" in block_host.listed(), "attached")
        if in_use:
            guest.sh(f"mkfs.ext4 -q {DEVICE} && mount {DEVICE} /mnt")
        guest.sh(f"kill -INT {block_host.keeper_pid()}")
        if in_use:
            block_host.wait(lambda: "without a keeper" in block_host.listed(), "left alone")
            guest.sh("dd if=/dev/zero of=/mnt/x bs=1M count=1 conv=fsync status=none && umount /mnt")
            block_host.adm("nbd", "detach", DEVICE)
        block_host.wait(lambda: block_host.listed() == "", "detached")
    assert not block_host.errors()
