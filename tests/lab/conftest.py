"""The laboratory's fixtures. These tests boot kernels and run only where TANDEM_LAB=1 asks for them.

With TANDEM_LAB_RESULTS the outcome of every test goes into that file, see `results`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .block_host import BlockHost
from .fenced import Fenced
from .nodes import KernelNode, TandemNode
from .pair import SIZE, Pair
from .results import Collector, what
from .uml import Lab, local

collect_ignore_glob = [] if os.environ.get("TANDEM_LAB") == "1" else ["test_*.py"]

collector = Collector()
versions: dict[str, str] = {}


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The laboratory, one for all tests; what is booted in it stays until the end."""
    with Lab() as lab:
        yield lab


@pytest.fixture(scope="session")
def two_nodes(lab: Lab) -> Iterator[Pair]:
    """A guest with kernel DRBD and a place for a Tandem daemon, two disks each."""
    config = lab.shared / "drbd.conf"
    config.touch()
    sizes = (SIZE, SIZE, 4 * SIZE)  # two volumes, and metadata of its own
    kernel = KernelNode(lab.guest("kern", [lab.disk(f"kern{i}", size) for i, size in enumerate(sizes)]))
    disks = [lab.disk(f"tandem{i}", size) for i, size in enumerate(sizes)]
    tandem = TandemNode("tandem", lab.work, disks, lab.work / "tandem.conf")
    kernel.boot()
    versions.update(
        {
            "kernel": kernel.guest.read("/proc/sys/kernel/osrelease").strip(),
            "drbd": kernel.guest.read("/proc/drbd").split()[1],
            "drbd-utils": local("dpkg-query", "--show", "--showformat", "${Version}", "drbd-utils"),
        }
    )
    try:
        yield Pair(kernel, tandem, config)
    finally:
        tandem.kill()  # whatever became of the last cell, no daemon outlives the laboratory


@pytest.fixture(scope="session")
def third_node(lab: Lab, two_nodes: Pair) -> KernelNode:
    """A guest that has the Tandem node's disks; never on while Tandem uses them."""
    return KernelNode(lab.guest("kern2", two_nodes.tandem.disks))


@pytest.fixture
def pair(two_nodes: Pair, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """One cell of the matrix: everything is down before and after, the kernel has not complained."""
    yield two_nodes
    told = two_nodes.both_logs()
    complaints = two_nodes.stop()
    if getattr(request.node, "failed", False) or complaints:
        print(told)
    assert not complaints, "the kernel complains:\n" + "\n".join(complaints)


@pytest.fixture(scope="session")
def block_guest(lab: Lab) -> Iterator[BlockHost]:
    """A guest, and two Tandem nodes of this machine that offer it a disk."""
    host = BlockHost(lab, lab.guest("client", [], memory="384M"))
    host.boot()
    try:
        host.pair.start()
        yield host
    finally:
        host.pair.close()


@pytest.fixture
def block_host(block_guest: BlockHost, request: pytest.FixtureRequest) -> Iterator[BlockHost]:
    """The same, ready for a test: in sync, alice Primary, nothing attached."""
    block_guest.prepare()
    yield block_guest
    if getattr(request.node, "failed", False):
        print(block_guest.report())
        block_guest.guest.kill()
        block_guest.boot()


@pytest.fixture(scope="session")
def fenced_hosts(lab: Lab) -> Iterator[Fenced]:
    """Two guests that run Tandem, and the switch of their power."""
    hosts = Fenced(lab)
    try:
        yield hosts
    finally:
        hosts.close()


@pytest.fixture
def fenced(fenced_hosts: Fenced, request: pytest.FixtureRequest) -> Iterator[Fenced]:
    """The same, ready for a test: both on and in sync, anna Primary; off at the end."""
    fenced_hosts.prepare()
    yield fenced_hosts
    if getattr(request.node, "failed", False):
        print(fenced_hosts.report())
        for host in fenced_hosts.hosts:
            host.guest.kill()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Remember a failure, so that the fixture prints the logs of both sides; tell what was verified against what."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    if call.when == "call" and report.failed:
        item.failed = True  # type: ignore[attr-defined]
    report.user_properties += [("what", what(item.obj)), *versions.items()]  # type: ignore[attr-defined]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    collector.note(report)


def pytest_sessionfinish() -> None:
    path = os.environ.get("TANDEM_LAB_RESULTS")
    if path and "PYTEST_XDIST_WORKER" not in os.environ and collector.cells:
        collector.save(Path(path))
