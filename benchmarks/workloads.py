"""What is measured: fio jobs for its nbd engine, and how a system's answer to one is judged.

A workload says what fio is to do and which figure counts: operations per second or latency. The ratio of two
systems is always "theirs to the reference's", so for rates more is better and for latencies less is.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
    bar: float | None = None
    quick: bool = True

    @property
    def more_is_better(self) -> bool:
        return self.figure == RATE

    def reached(self, ratio: float) -> bool | None:
        """Does *ratio* reach the bar? None without one."""
        if self.bar is None:
            return None
        return ratio >= self.bar if self.more_is_better else ratio <= self.bar


KIB: Final = 1 << 10
MIB: Final = 1 << 20

WORKLOADS: Final = (
    Workload("randwrite-4k-qd1", "4 KiB random write, QD 1", "randwrite", 4 * KIB, 1, LATENCY, bar=2.0),
    Workload("randwrite-4k-qd32", "4 KiB random write, QD 32", "randwrite", 4 * KIB, 32, bar=0.5),
    Workload("randwrite-4k-qd128", "4 KiB random write, QD 128", "randwrite", 4 * KIB, 128, bar=0.65),
    Workload("randread-4k-qd1", "4 KiB random read, QD 1", "randread", 4 * KIB, 1, LATENCY, quick=False),
    Workload("randread-4k-qd32", "4 KiB random read, QD 32", "randread", 4 * KIB, 32, bar=1.5),
    Workload("write-1m-qd8", "1 MiB sequential write, QD 8", "write", MIB, 8, bar=0.6),
    Workload("read-1m-qd8", "1 MiB sequential read, QD 8", "read", MIB, 8, bar=0.9),
    Workload("fsync-4k", "4 KiB write and fsync each", "randwrite", 4 * KIB, 1, LATENCY, fsync=True, bar=2.2),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a workload on one system. Times in microseconds; CPU is of the server processes."""

    ops_per_s: float
    bytes_per_s: float
    latency_us: float  # mean; with fsync, of a write and its fsync together
    p50_us: float
    p99_us: float
    cpu_us_per_op: float

    def figure(self, workload: Workload) -> float:
        return self.ops_per_s if workload.figure == RATE else self.latency_us


def run_fio(workload: Workload, uri: str, size: int, seconds: float, seed: int) -> dict[str, Any]:
    """Run the job against *uri*; fio's figures of the one direction it used. Raises FioError."""
    command = [
        "fio", f"--name={workload.name}", "--ioengine=nbd", f"--uri={uri}", f"--rw={workload.rw}",
        f"--bs={workload.block}", f"--iodepth={workload.depth}", f"--size={size}", "--time_based",
        f"--runtime={round(seconds * 1000)}ms", f"--randseed={seed}", "--norandommap",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    if workload.fsync:
        command.append("--fsync=1")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + GRACE_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FioError(f"fio did not end within {seconds + GRACE_S:.0f} s on {uri}") from error
    begin = done.stdout.find("{")  # fio says one line about the job before its JSON
    if done.returncode or begin < 0:
        last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
        raise FioError(f"fio failed with status {done.returncode} on {uri}: {last}")
    job = json.loads(done.stdout[begin:])["jobs"][0]
    if job["error"]:
        raise FioError(f"fio met error {job['error']} on {uri}")
    found: dict[str, Any] = job["read" if workload.rw.endswith("read") else "write"]
    return found


def measured(workload: Workload, fio: dict[str, Any], cpu_s: float) -> Measured:
    """fio's figures and the servers' CPU time as one value."""
    n = fio["total_ios"]
    seconds = fio["runtime"] / 1000
    if not n or not seconds:
        raise FioError("fio finished no operation")
    percentiles = fio["clat_ns"].get("percentile", {})
    # An fsync is no I/O of its own in fio's figures, so the time of the pair is what the run took.
    latency = seconds / n * 1e6 if workload.fsync else fio["lat_ns"]["mean"] / 1000
    return Measured(
        ops_per_s=n / seconds,
        bytes_per_s=n * workload.block / seconds,
        latency_us=latency,
        p50_us=percentiles.get("50.000000", 0) / 1000,
        p99_us=percentiles.get("99.000000", 0) / 1000,
        cpu_us_per_op=cpu_s / n * 1e6,
    )


def cpu_seconds(pids: Sequence[int], clock_ticks: int) -> float:
    """CPU time that these processes have used so far, user and system together. Source: proc(5)."""
    total = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
        fields = stat[stat.rindex(")") + 2 :].split()  # the name before may hold anything
        total += int(fields[11]) + int(fields[12])
    return total / clock_ticks
