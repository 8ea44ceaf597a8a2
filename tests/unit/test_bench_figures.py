"""What the benchmark makes of fio's figures and of processor time: percentiles, a resync, parts of a system."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from extras import peak_rss, resync, resync_pair
from replicated import Tandem
from report import cpu_text
from systems import PRIMARY, SECONDARY, BenchError, System
from workloads import WORKLOADS, measured, run_fio

BY_NAME = {workload.name: workload for workload in WORKLOADS}
LONE, FSYNC = BY_NAME["randwrite-4k-qd1"], BY_NAME["fsync-4k"]
NOTHING = {"total_ios": 0, "runtime": 0}


def times(mean: int) -> dict[str, Any]:
    """fio's figures of latencies, in nanoseconds."""
    points = {"50.000000": mean, "95.000000": 2 * mean, "99.000000": 3 * mean, "99.900000": 4 * mean}
    return {"mean": mean, "percentile": points}


def fio_job() -> dict[str, Any]:
    """1,000 writes in a second by an engine that submits for 90 µs and completes in 10."""
    writes = {"total_ios": 1000, "runtime": 1000, "clat_ns": times(10_000), "lat_ns": times(100_000)}
    return {"error": 0, "read": NOTHING, "write": writes}


def test_percentiles_and_mean_are_of_the_same_latency() -> None:
    found = measured(LONE, fio_job(), {"server": 0.0})
    assert (found.latency_us, found.p50_us, found.p95_us, found.p99_us, found.p999_us) == (100, 100, 200, 300, 400)


def test_a_write_and_its_fsync_have_no_percentiles_of_the_pair() -> None:
    found = measured(FSYNC, fio_job(), {"server": 0.0})
    assert (found.latency_us, found.p50_us, found.p99_us) == (1000, 0, 0)


class NoDisk:
    """fio against nothing, which needs no server."""

    engine = ["--ioengine=null"]

    def execute(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)


def test_fio_is_asked_for_the_percentiles_that_are_read() -> None:
    job = run_fio(LONE, NoDisk(), 16 << 20, 0.1, 1)
    assert job["write"]["lat_ns"]["percentile"].keys() >= times(0)["percentile"].keys()
    assert "percentile" not in job["write"]["clat_ns"]


# ------------------------------------------------------------------------------------------ resync


class Away(Tandem):
    """A pair without nodes that copies all in four seconds, and counts how often it was written."""

    engine = NoDisk.engine
    n_written = 0

    def execute(self, command: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
        self.n_written += 1
        short = ["--runtime=100ms" if word.startswith("--runtime=") else word for word in command]
        return super().execute(short, limit_s)

    def resync(self, write: Callable[[], object], during: Callable[[], object] | None = None) -> tuple[int, float]:
        write()
        return self.size, 4.0


@pytest.mark.parametrize("quick, size", [(True, 256 << 20), (False, 1 << 30)])
def test_a_whole_run_copies_a_gibibyte_whatever_the_export_is(tmp_path: Path, quick: bool, size: int) -> None:
    system = Away(tmp_path, 256 << 20)
    assert resync_pair(system, tmp_path, quick).size == size


def test_a_resync_is_held_against_writes_to_the_same_pair(tmp_path: Path) -> None:
    system = Away(tmp_path, 16 << 20)
    found = resync(system, system.size, 0.1, 1)
    assert (found.n_bytes, found.bytes_per_s) == (16 << 20, 4 << 20)
    assert found.writes_bytes_per_s > 0 and system.n_written == 2  # once beside it, once without the peer


# ------------------------------------------------------------------------------- parts of a system


def test_processor_time_is_told_as_a_sum_and_of_each_part() -> None:
    found = measured(LONE, fio_job(), {PRIMARY: 0.008, SECONDARY: 0.0046})
    assert found.cpu_us_per_op == pytest.approx(12.6)
    assert found.cpu_parts == {PRIMARY: pytest.approx(8.0), SECONDARY: pytest.approx(4.6)}
    assert cpu_text([found]) == "12.6 µs (8.0 + 4.6)"


def test_a_system_of_one_process_has_no_parts_to_tell() -> None:
    assert cpu_text([measured(LONE, fio_job(), {"server": 0.0126})]) == "12.6 µs"


class Started(System):
    """A system whose secondary was started first: this process, and its parent."""

    name = title = "started"

    def start(self) -> None:
        self.parts[SECONDARY] = [os.getppid()]
        self.parts[PRIMARY] = [os.getpid()]


def test_the_primary_comes_first_whoever_was_started_first(tmp_path: Path) -> None:
    system = Started(tmp_path, 1 << 20)
    system.start()
    assert list(system.cpu_seconds()) == [PRIMARY, SECONDARY]
    assert sorted(system.pids) == sorted([os.getpid(), os.getppid()])


def test_memory_is_of_the_processes_that_still_run() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    zombie = [ended.pid]
    assert peak_rss([*zombie, os.getpid()]) > 1
    with pytest.raises(BenchError, match="ended"):
        peak_rss(zombie)
    ended.wait()
    with pytest.raises(BenchError, match="ended"):
        peak_rss(zombie)
