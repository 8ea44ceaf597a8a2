"""What is not a fio job on an export: resync, verify, first sync, attach, memory, many resources on one host.

Each function makes what it measures, ends it again, and returns `Figure` values. Only Tandem is measured
here: the others have no such thing, or do it when nobody watches.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from replicated import Tandem
from systems import PRIMARY, SECONDARY, BenchError, System, fill
from workloads import KIB, MIB, Workload, cpu_seconds, measured, run_fio

GIB: Final = 1 << 30
TIB: Final = 1 << 40
RESYNCED: Final = ("tandem", "other")
LARGEST: Final = 15 * TIB  # ext4 has no larger files than 16 TiB less a block
WATCH_S: Final = 10.0  # a sync that takes minutes is watched for so long
FILL: Final = Workload("fill", "fill", "write", MIB, 8)
LOAD: Final = Workload("load", "load", "randwrite", 4 * KIB, 32)
LONE_LOAD: Final = Workload("lone", "lone", "randwrite", 4 * KIB, 1)
REPEATS: Final = 5  # of what takes about a second, and varies
BESIDE_S: Final = 3.0  # how long fio writes, before and while something goes on beside it
AGE_S: Final = 30.0  # how long nodes are written that count as old
WRITTEN: Final = 256 * MIB  # of the devices on which the cost of a write is compared
COST_S: Final = 0.5
COST_PAIRS: Final = 15
SETTLE_S: Final = 0.4
SHARE_S: Final = 0.5
BESIDE: Final = ("SyncSource", "VerifyS")


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured value; *bar* is what it is to reach, None where there is none."""

    title: str
    value: float
    unit: str
    bar: float | None = None
    more_is_better: bool = True


@contextlib.contextmanager
def sparse_pair(directory: Path, name: str, size: int, disk: str = "", filled: int = 0) -> Iterator[Tandem]:
    """Two nodes with files of *size* bytes, sparse after the first *filled* ones, metadata made, not started."""
    system = Tandem(directory / name, size)
    system.disk_options = disk
    files = [system.directory / f"{node}.img" for node in ("alice", "bob")]
    for file in files:
        file.touch()
        os.truncate(file, size)
        fill(file, filled)
    try:
        system.make(*files)
        yield system
    finally:
        system.stop()
        for file in files:
            file.unlink()


def connect(system: Tandem) -> None:
    """Bring both nodes up, with equal disks and alice Primary."""
    for node in ("alice", "bob"):
        system.up(node)
    system.adm("alice", "wait-connect", "r0")
    system.adm("alice", "new-current-uuid", "--clear-bitmap", "r0")
    system.adm("alice", "primary", "r0")
    system.uri = f"nbd+unix:///r0?socket={system.directory}/alice.nbd"


def peak_rss(pids: Sequence[int]) -> float:
    """The most memory that the largest of these processes that still run ever had, in MiB. Source: proc(5), VmHWM.

    Some may have ended: each process of a User-Mode-Linux guest is one of its host.
    """
    found = []
    for pid in pids:
        with contextlib.suppress(OSError, BenchError):
            found.append(_status(pid, "VmHWM"))
    if not found:
        raise BenchError("all of the processes have ended whose memory was asked for")
    return max(found) / 1024


def memory(system: System) -> list[Figure]:
    """The peak memory of each part of a system."""
    return [
        Figure(f"peak memory of a process: {system.title}: {part}", peak_rss(pids), "MiB")
        for part, pids in sorted(system.parts.items())
    ]


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise BenchError(f"the kernel does not tell {field} of process {pid}")


@dataclass(frozen=True, slots=True)
class Resynced:
    """One resync of what was written while the peer was away, and what the same pair wrote, and copied, before it."""

    n_bytes: int
    bytes_per_s: float
    writes_bytes_per_s: float  # of sequential writes of 1 MiB, of the same bytes, to both nodes


def resync_pair(system: Tandem, directory: Path, quick: bool) -> Tandem:
    """What resyncs of such a system are measured on: itself if it is to be quick, else a larger one, not started."""
    return system if quick else type(system)(directory / "resync", GIB)


def resync(system: Tandem, size: int, seconds: float, seed: int) -> Resynced:
    """Dirty the first *size* bytes and copy them again; *seconds* is how long the writes beside it are measured."""
    os.sync()
    writes = measured(FILL, run_fio(FILL, system, size, seconds, seed), {})
    n_bytes, took = system.resync(lambda: run_fio(FILL, system, size, fill_s(size), seed))
    return Resynced(n_bytes, n_bytes / took, writes.bytes_per_s)


def fill_s(size: int) -> float:
    """How long fio is to write so that it has written *size* bytes at least once, on all but a slow disk."""
    return 0.5 + size / (300 * MIB)


def writes_beside(system: Tandem, size: int) -> list[Figure]:
    """The rate of 4 KiB writes while a resync or a verify goes on, to their rate when none does."""
    found = []
    for verb, command, node, load in (
        ("a resync", "invalidate", "bob", LOAD), ("a resync", "invalidate", "bob", LONE_LOAD),
        ("a verify", "verify", "alice", LOAD),
    ):  # fmt: skip
        ratios = [_beside(system, size, load, node, command, seed) for seed in range(1, REPEATS + 1)]
        title = f"4 KiB writes, QD {load.depth}, during {verb}, to without ({min(ratios):.2f} – {max(ratios):.2f})"
        bar = 0.5 if command == "invalidate" and load is LOAD else None
        found.append(Figure(title, statistics.median(ratios), "", bar))
    return found


def _beside(system: Tandem, size: int, load: Workload, node: str, command: str, seed: int) -> float:
    """One ratio, both halves of it from one run of fio and counted by alice.

    fio takes a while to start, and what is to go on beside it would be over by then if nobody was at work. The command
    takes a processor meanwhile, and what a resync makes durable first lets the kernel write back all that fio wrote.
    """
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_fio, load, system, size, BESIDE_S, seed)
        _, before, _ = _counted(system)
        while _counted(system)[1] == before and not job.done():
            time.sleep(0.01)
        time.sleep(SETTLE_S)
        without, _ = _write_rate(system)
        system.adm(node, command, "r0")
        while _counted(system)[2] not in BESIDE and not job.done():
            time.sleep(0.01)
        time.sleep(SETTLE_S)
        during, state = _write_rate(system)
        if state not in BESIDE or job.done():
            raise BenchError(f"{command} beside writes was over before it was measured")
        job.result()
    for _, status in system.statuses("alice"):
        if status["connection"]["volumes"][0]["replication"] == "Established":
            return during / without
    raise BenchError(f"the daemon of alice ended during {command}")


def _write_rate(system: Tandem) -> tuple[float, str]:
    """Bytes per second that alice writes, over `SHARE_S`; and the replication state at the end."""
    began, before, _ = _counted(system)
    time.sleep(SHARE_S)
    ended, after, state = _counted(system)
    return (after - before) / (ended - began), state


def _counted(system: Tandem) -> tuple[float, int, str]:
    """Now, the bytes alice has written to her disk by now, and the replication state."""
    at, status = next(system.statuses("alice"))
    return at, status["volumes"][0]["written"], status["connection"]["volumes"][0]["replication"]


def verify(system: Tandem, size: int) -> list[Figure]:
    """Bytes per second of an online verify of the whole export."""
    rates = [size / _verify_s(system) / 1e6 for _ in range(REPEATS)]
    return [Figure(f"online verify ({min(rates):,.0f} – {max(rates):,.0f})", statistics.median(rates), "MB/s")]


def _verify_s(system: Tandem) -> float:
    watch = system.statuses("alice")
    next(watch)
    system.adm("alice", "verify", "r0")
    began = 0.0
    for at, status in watch:
        state = status["connection"]["volumes"][0]["replication"]
        if state == "VerifyS" and not began:
            began = at
        elif began and state == "Established":
            return at - began
    raise BenchError("the daemon of alice ended during the verify")


def first_sync(directory: Path) -> list[Figure]:
    """How fast the first sync of a sparse 1 TiB device goes, with thin resync and without."""
    found = []
    title = f"first sync of a sparse 1 TiB device, in its first {WATCH_S:.0f} s"
    for added, option in (("", ""), (", rs-discard-granularity 1M", "rs-discard-granularity 1M;")):
        with sparse_pair(directory, f"first{len(option)}", TIB, option) as system:
            for node in ("alice", "bob"):
                system.up(node)
            system.adm("alice", "wait-connect", "r0")
            system.adm("alice", "primary", "--force", "r0")
            rate = _watched_rate(system)
            found.append(Figure(title + added, rate / 1e6, "MB/s"))
    return found


def _watched_rate(system: Tandem) -> float:
    """Bytes per second of the sync that goes on, over some seconds or to its end."""
    marks: list[tuple[float, int]] = []
    deadline = time.monotonic() + WATCH_S
    while time.monotonic() < deadline:
        at, status = next(system.statuses("bob"))
        peer = status["connection"]["volumes"][0]
        if peer["replication"] == "SyncTarget":
            marks.append((at, peer["out_of_sync"]))
        elif marks:
            marks.append((at, 0))
            break
        time.sleep(0.1)
    if len(marks) < 2:
        raise BenchError(f"the sync that was to be watched for {WATCH_S:.0f} s did not begin")
    (began, before), (ended, after) = marks[0], marks[-1]
    return (before - after) / (ended - began)


def attach(directory: Path) -> list[Figure]:
    """Seconds of an attach, not the first one after create-md, which writes the bitmap."""
    found = []
    for size, name in ((GIB, "1 GiB"), (TIB, "1 TiB"), (LARGEST, "15 TiB")):
        with sparse_pair(directory, f"attach{size >> 30}", size) as system:
            system.up("alice")
            system.adm("alice", "detach", "r0")
            seconds = _seconds(system, "attach") - _seconds(system, "role")  # less what any command takes
            found.append(Figure(f"attach of {name}", max(seconds, 0.0), "s", 3.0, more_is_better=False))
    return found


def _seconds(system: Tandem, command: str) -> float:
    began = time.monotonic()
    system.adm("alice", command, "r0")
    return time.monotonic() - began


def scattered(directory: Path) -> list[Figure]:
    """Seconds of a resync after 1,000 scattered dirty blocks on the largest device."""
    with sparse_pair(directory, "scattered", LARGEST) as system:
        connect(system)
        draw = random.Random(1)
        places = ";".join(f"h.pwrite(b, {draw.randrange(LARGEST // 2 // 4096) * 4096})" for _ in range(1000))
        script = f"import nbd; h = nbd.NBD(); h.connect_uri({system.uri!r}); b = b'x' * 4096; {places}"

        def write() -> None:
            subprocess.run(["/usr/bin/python3", "-c", script], check=True, cwd="/")

        n_bytes, seconds = system.resync(write)
        memory = peak_rss([system.pid("alice"), system.pid("bob")])
    if n_bytes < 900 * 4096:
        raise BenchError(f"only {n_bytes} bytes were out of sync after 1,000 scattered writes")
    return [
        Figure("resync of 1,000 scattered blocks on 15 TiB", seconds, "s", 1.0, False),
        Figure("peak memory of a node with 15 TiB", memory, "MiB"),
    ]


def cost_by_size(directory: Path) -> list[Figure]:
    """CPU time of both nodes for a 4 KiB write on the largest device, to that on one of 1 GiB."""
    with _cost_pair(directory, "small", GIB) as small, _cost_pair(directory, "large", LARGEST) as large:
        return [_cost("CPU per 4 KiB write on 15 TiB, to 1 GiB", large, small)]


def cost_by_uptime(directory: Path) -> list[Figure]:
    """CPU time of both nodes for a 4 KiB write after millions of them, to that of nodes that have just begun."""
    with _cost_pair(directory, "old", GIB) as old, _cost_pair(directory, "young", GIB) as young:
        n = run_fio(LOAD, old, WRITTEN, AGE_S, 0)["write"]["total_ios"]
        return [_cost(f"CPU per 4 KiB write after {n / 1e6:.1f} million, to new nodes", old, young)]


@contextlib.contextmanager
def _cost_pair(directory: Path, name: str, size: int) -> Iterator[Tandem]:
    """Connected nodes that have been written a little: what comes first of all, like hot extents, is over.

    All writes go to the same first part of the device, which is in the page cache in small pieces, so that two such
    pairs differ in nothing but what is compared.
    """
    with sparse_pair(directory, name, size, filled=WRITTEN) as system:
        connect(system)
        run_fio(LOAD, system, WRITTEN, COST_S, 0)
        yield system


def _cost(title: str, one: Tandem, other: Tandem) -> Figure:
    """What a write on *one* costs, to what it costs on *other*: the median of many short runs on the two in turn.

    What the machine does meanwhile changes the cost of a write by a fifth, for seconds: only neighbours can be
    compared, and who comes first changes.
    """
    ratios = []
    for seed in range(1, COST_PAIRS + 1):
        costs = {system: _cost_of_a_write(system, seed) for system in ((other, one) if seed % 2 else (one, other))}
        ratios.append(costs[one] / costs[other])
    title = f"{title} ({min(ratios):.2f} – {max(ratios):.2f})"
    return Figure(title, statistics.median(ratios), "", 1.1, more_is_better=False)


def _cost_of_a_write(system: Tandem, seed: int) -> float:
    """CPU time of both nodes, in seconds."""
    os.sync()  # or what was written before would be written back meanwhile
    before = sum(system.cpu_seconds().values())
    job = run_fio(LOAD, system, WRITTEN, COST_S, seed)
    return (sum(system.cpu_seconds().values()) - before) / float(job["write"]["total_ios"])


class ManyTandems(Tandem):
    """Several resources on the same two nodes, each with a directory of its own."""

    def __init__(self, directory: Path, size: int, n: int) -> None:
        super().__init__(directory, size)
        self.names = [f"r{i}" for i in range(n)]

    def start(self) -> None:
        text = ""
        for name in self.names:
            place = self.directory / name
            place.mkdir()
            files = [place / f"{node}.img" for node in ("alice", "bob")]
            for file in files:
                file.touch()
                os.truncate(file, self.size)
            text += self.resource(name, place, *files)
        (self.directory / "conf").write_text(text, encoding="utf-8")
        for node in ("alice", "bob"):
            self.adm(node, "create-md", "--force", "all")
            self.stack.callback(self._all_down, node)
            self.adm(node, "up", "all")
            pids = [self.directory / "run" / node / f"{name}.pid" for name in self.names]
            part = PRIMARY if node == "alice" else SECONDARY
            self.parts[part] = [int(file.read_text(encoding="ascii")) for file in pids]
        for words in (["wait-connect"], ["new-current-uuid", "--clear-bitmap"], ["primary"]):
            self.adm("alice", *words, "all")

    def _all_down(self, node: str) -> None:
        with contextlib.suppress(BenchError):
            self.adm(node, "down", "all")

    def writes_per_s(self) -> float:
        """Of one fio per resource, all running together."""
        jobs = []
        for name in self.names:
            uri = f"nbd+unix:///{name}?socket={self.directory}/{name}/alice.nbd"
            jobs += [f"--name={name}", "--ioengine=nbd", f"--uri={uri}", "--rw=randwrite", "--bs=4k", "--iodepth=4",
                     "--size=8M", "--time_based", "--runtime=3"]  # fmt: skip
        done = subprocess.run(["fio", "--output-format=json", *jobs], capture_output=True, text=True, check=True)
        text = done.stdout[done.stdout.index("{\n") :]
        return float(sum(job["write"]["iops"] for job in json.loads(text)["jobs"]))


def many(directory: Path) -> list[Figure]:
    """1, 10 and 50 resources on one host: both nodes of each, what they cost when idle, and all under load."""
    found = []
    for n in (1, 10, 50):
        system = ManyTandems(directory / f"many{n}", 16 * MIB, n)
        try:
            system.start()
            ticks = os.sysconf("SC_CLK_TCK")
            before, began = cpu_seconds(system.pids, ticks), time.monotonic()
            time.sleep(3)
            idle = (cpu_seconds(system.pids, ticks) - before) / (time.monotonic() - began)
            memory = sum(_status(pid, "RssAnon") for pid in system.pids) / 1024 / len(system.pids)
            rate = system.writes_per_s()
        finally:
            system.stop()
        title = f"{n} resource{'s' if n > 1 else ''}"
        found += [
            Figure(f"{title}: memory of a node, its own", memory, "MiB"),
            Figure(f"{title}: processor time of all nodes, idle", idle * 100, "%"),
            Figure(f"{title}: 4 KiB writes, QD 4 on each, together", rate, "/s"),
        ]
    return found


ON_A_PAIR: Final[tuple[Callable[[Tandem, int], list[Figure]], ...]] = (writes_beside, verify)
ALONE: Final[tuple[Callable[[Path], list[Figure]], ...]] = (
    attach, scattered, first_sync, cost_by_size, cost_by_uptime, many,
)  # fmt: skip
