"""A host that runs Tandem loses power: what its kernel had not written is gone, as with any machine.

anna runs Tandem and has the bad luck, berta runs the kernel's DRBD or Tandem. The file system of whoever is Primary
is in use by clients who remember what was acknowledged to them, and by fio, so that many writes are under way.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .host import Host
from .nodes import wait
from .pair import MIB, fill
from .service import MOUNT, Service
from .uml import Lab

SIZE = 512 * MIB
COPY = SIZE // 2  # the hot extents are much less
FIO = (
    "fio", "--thread", "--name=load", f"--directory={MOUNT}", "--size=24m", "--rw=randwrite", "--bsrange=4k-64k",
    "--ioengine=libaio", "--direct=1", "--iodepth=8", "--fsync=20", "--rate_iops=150", "--time_based",
    "--runtime=1h",
)  # fmt: skip


class Cut:
    """One test: the pair, and who serves."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.anna, self.berta = service.hosts
        self.fio = 0

    def serve(self, host: Host) -> None:
        """*host* is Primary: the file system, the service and fio, and all of it in use."""
        self.service.mount(host)
        self.service.serve(host)
        self.fio = host.guest.spawn(*FIO)
        self.service.use()

    def begin(self, primary: Host) -> None:
        self.service.create(primary)
        self.service.load.start()
        self.serve(primary)

    def promote(self, host: Host) -> None:
        self.service.type(host, *host.promote_lines())
        self.serve(host)

    def alone(self, host: Host) -> None:
        wait(host, lambda s: s.cs == "WFConnection", "alone")

    def come_back(self, host: Host) -> None:
        host.boot()
        self.service.type(host, *host.take_lines())

    def end(self, primary: Host) -> None:
        """Nothing that was acknowledged is missing, the disks are equal, and there was no copy."""
        service = self.service
        service.in_sync()
        service.use()
        assert 0 < service.moved() < COPY
        primary.guest.end(self.fio)
        service.load.stop()
        service.load.check()
        service.stop_serving(primary)
        service.release(primary)
        service.compare()
        service.copy(primary)
        service.check_copy()


@pytest.fixture(scope="module")
def machines(lab: Lab) -> Iterator[tuple[Host, Host]]:
    """anna and berta; they stay on from test to test, the resource down and the disks equal."""
    anna, berta = (Host(lab.guest(name, [lab.disk(name, SIZE)], "384M"), is_kernel=False) for name in ("anna", "berta"))
    yield anna, berta
    for host in (anna, berta):
        host.guest.kill()


@pytest.fixture(params=["kernel", "tandem"])
def cut(lab: Lab, machines: tuple[Host, Host], request: pytest.FixtureRequest) -> Iterator[Cut]:
    """Both on, and berta as the parameter says."""
    anna, berta = machines
    berta.is_kernel = request.param == "kernel"
    for host in machines:
        if not host.guest.running:
            host.boot()
        host.forget_logs()
    service = Service(lab, anna, berta)
    yield Cut(service)
    if getattr(request.node, "failed", False):
        for host in machines:
            print(f"--- {host.name}", *(host.log()[-80:] if host.guest.running else ["(off)"]), sep="\n")
        service.end()
        for host in machines:
            fill(host.disk_file(), None)
    service.load.end()


def test_secondary_loses_power(cut: Cut) -> None:
    """What it had told the Primary, and had not flushed, is sent again."""
    cut.begin(cut.berta)
    cut.anna.guest.kill()
    cut.alone(cut.berta)
    cut.service.use()
    cut.come_back(cut.anna)
    cut.end(cut.berta)


def test_primary_loses_power_and_comes_back(cut: Cut) -> None:
    """Nobody was Primary meanwhile; its own disk has everything that was acknowledged."""
    cut.begin(cut.anna)
    cut.anna.guest.kill()
    cut.alone(cut.berta)
    cut.come_back(cut.anna)
    cut.service.in_sync()
    cut.promote(cut.anna)
    cut.end(cut.anna)


def test_primary_loses_power_and_the_other_takes_over(cut: Cut) -> None:
    """The Primary's host loses power in use; the other goes on with every acknowledged write."""
    cut.begin(cut.anna)
    cut.anna.guest.kill()
    cut.alone(cut.berta)
    cut.promote(cut.berta)
    cut.come_back(cut.anna)
    cut.end(cut.berta)


def test_both_lose_power(cut: Cut) -> None:
    """The disks are as their hosts' kernels left them, each in the middle of something else."""
    cut.begin(cut.anna)
    for host in cut.service.hosts:
        host.guest.kill()
    for host in cut.service.hosts:
        cut.come_back(host)
    cut.service.in_sync()
    cut.promote(cut.anna)
    cut.end(cut.anna)
