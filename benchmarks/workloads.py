"""What is measured: fio jobs for its nbd engine, and how a system's answer to one is judged.

A workload says what fio is to do and which figure counts: operations per second or latency. The ratio of two
systems is always "theirs to the reference's", so for rates more is better and for latencies less is.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

RATE: Final = "rate"
LATENCY: Final = "latency"
GRACE_S: Final = 60.0  # how much longer than asked a run of fio may take before something is wrong


class FioError(Exception):
    """fio could not run the job; one sentence."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One job. *bar* is what Tandem's ratio to the reference is to reach, None where there is none."""

    name: str
    title: str
    rw: str
    block: int  # bytes
    depth: int
    figure: str = RATE
    fsync: bool = False
    jobs: int = 1  # each has a connection and a part of the export of its own
    bar: float | None = None
    cpu_bar: float | None = None  # for the CPU time per operation
    quick: bool = True

    @property
    def more_is_better(self) -> bool:
        return self.figure == RATE


KIB: Final = 1 << 10
MIB: Final = 1 << 20

DEPTHS: Final = (1, 8, 32, 128)
_BARS: Final = {"randwrite-4k-qd1": 2.0, "randwrite-4k-qd32": 0.5, "randwrite-4k-qd128": 0.65, "randread-4k-qd32": 1.5}
_QUICK: Final = frozenset(_BARS)


def _by_depth(rw: str, word: str) -> list[Workload]:
    """4 KiB at every depth; a lone request is judged by its latency, the others by their rate."""
    made = []
    for depth in DEPTHS:
        name = f"{rw}-4k-qd{depth}"
        figure = LATENCY if depth == 1 else RATE
        made.append(
            Workload(
                name, f"4 KiB random {word}, QD {depth}", rw, 4 * KIB, depth, figure,
                bar=_BARS.get(name), cpu_bar=2.0 if name == "randwrite-4k-qd32" else None, quick=name in _QUICK,
            )
        )  # fmt: skip
    return made


WORKLOADS: Final = (
    *_by_depth("randwrite", "write"),
    *_by_depth("randread", "read"),
    Workload("write-128k-qd8", "128 KiB sequential write, QD 8", "write", 128 * KIB, 8, quick=False),
    Workload("write-1m-qd8", "1 MiB sequential write, QD 8", "write", MIB, 8, bar=0.6),
    Workload("read-128k-qd8", "128 KiB sequential read, QD 8", "read", 128 * KIB, 8, quick=False),
    Workload("read-1m-qd8", "1 MiB sequential read, QD 8", "read", MIB, 8, bar=0.9),
    Workload("mix-4k-qd32", "4 KiB random, 70 % read, QD 32", "randrw", 4 * KIB, 32, quick=False),
    Workload("fsync-4k", "4 KiB write and fsync each", "randwrite", 4 * KIB, 1, LATENCY, fsync=True, bar=2.2),
    Workload("randwrite-4k-4x8", "4 KiB random write, 4 connections, QD 8 each", "randwrite", 4 * KIB, 8, jobs=4,
             quick=False),
)  # fmt: skip
_MIRRORS: Final = ("qemu-quorum", "qemu-mirror")
PEER_BARS: Final = {  # what Tandem's ratio to another system with two copies is to reach
    **{("randwrite-4k-qd32", peer): 3.0 for peer in _MIRRORS},
    ("randwrite-4k-qd32", "gluster"): 6.0,
    **{("randwrite-4k-qd1", peer): 0.75 for peer in (*_MIRRORS, "gluster")},
    **{("write-1m-qd8", peer): 2.2 for peer in _MIRRORS},
    **{("fsync-4k", peer): 0.9 for peer in _MIRRORS},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a workload on one system. Times in microseconds, 0 where unknown; CPU is of the server processes.

    Latencies begin before a request is submitted, which with some engines of fio is most of them.
    """

    ops_per_s: float
    bytes_per_s: float
    latency_us: float  # mean; with fsync, of a write and its fsync together
    p50_us: float
    p95_us: float
    p99_us: float
    p999_us: float
    cpu_us_per_op: float
    cpu_parts: dict[str, float]  # part of the system, such as its primary -> its share of the CPU time per operation

    def figure(self, workload: Workload) -> float:
        return self.ops_per_s if workload.figure == RATE else self.latency_us


class Target(Protocol):
    """What fio is to load: a system, or whatever else can be reached."""

    @property
    def engine(self) -> list[str]: ...
    def execute(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]: ...


def run_fio(workload: Workload, target: Target, size: int, seconds: float, seed: int) -> dict[str, Any]:
    """Run the job on *target*; fio's figures of it. Raises FioError."""
    engine = target.engine
    share = size // workload.jobs
    command = [
        "fio", f"--name={workload.name}", *engine, f"--rw={workload.rw}", "--rwmixread=70",
        f"--bs={workload.block}", f"--iodepth={workload.depth}", f"--size={share}", "--time_based",
        f"--numjobs={workload.jobs}", f"--offset_increment={share if workload.jobs > 1 else 0}",
        f"--runtime={round(seconds * 1000)}ms", f"--randseed={seed}", "--norandommap",
        "--lat_percentiles=1", "--clat_percentiles=0", "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    if workload.fsync:
        command.append("--fsync=1")
    try:
        done = target.execute(command, seconds + GRACE_S)
    except subprocess.TimeoutExpired as error:
        raise FioError(f"fio did not end within {seconds + GRACE_S:.0f} s: {' '.join(engine)}") from error
    begin = done.stdout.find("{")  # fio says one line about the job before its JSON
    if done.returncode or begin < 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise FioError(f"fio failed with status {done.returncode}: {' '.join(engine)}: {last}")
    job: dict[str, Any] = json.loads(done.stdout[begin:])["jobs"][0]
    if job["error"]:
        raise FioError(f"fio met error {job['error']}: {' '.join(engine)}")
    return job


def measured(workload: Workload, job: dict[str, Any], cpu_s: Mapping[str, float]) -> Measured:
    """fio's figures and the CPU time of a system's parts as one value; of a mix, the latencies are its writes'."""
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    if not sides or not sides[-1]["runtime"]:
        raise FioError("fio finished no operation")
    n = sum(side["total_ios"] for side in sides)
    seconds = max(side["runtime"] for side in sides) / 1000
    last = sides[-1]
    # An fsync is no I/O of its own in fio's figures: the time of the pair is what the run took. Percentiles fio has of
    # writes and of fsyncs only, and those of a sum are not the sum of theirs.
    percentiles = {} if workload.fsync else last["lat_ns"].get("percentile", {})
    latency = seconds / n * 1e6 if workload.fsync else last["lat_ns"]["mean"] / 1000
    return Measured(
        ops_per_s=n / seconds,
        bytes_per_s=n * workload.block / seconds,
        latency_us=latency,
        p50_us=percentiles.get("50.000000", 0) / 1000,
        p95_us=percentiles.get("95.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        p999_us=percentiles.get("99.900000", 0) / 1000,
        cpu_us_per_op=sum(cpu_s.values()) / n * 1e6,
        cpu_parts={part: used / n * 1e6 for part, used in cpu_s.items()},
    )


def descendants(pid: int) -> list[int]:
    """*pid* and all processes that it and its children have started and that still run."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def cpu_seconds(pids: Sequence[int], clock_ticks: int) -> float:
    """CPU time that these processes, and their children that have ended, have used so far, user and system.

    Source: proc(5), utime, stime, cutime and cstime.
    """
    total = 0
    for pid in pids:
        with contextlib.suppress(FileNotFoundError):  # it has ended, and its parent counts its time
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
            fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
            total += sum(int(field) for field in fields[11:15])
    return total / clock_ticks
