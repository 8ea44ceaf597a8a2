"""Pictures of a benchmark run: throughput and latency percentiles against queue depth.

`python benchmarks/plots.py RESULTS.json DIRECTORY` draws those of a run that was kept with `--json`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PERCENTILES = (("p50_us", "median"), ("p99_us", "99 %"), ("p999_us", "99.9 %"))


def draw(found: dict[str, Any], directory: Path) -> list[Path]:
    """One SVG per direction (4 KiB random writes and reads); the paths written. ImportError without matplotlib."""
    from matplotlib import rcParams

    rcParams["svg.hashsalt"] = "tandem"  # the same run gives the same file
    directory.mkdir(parents=True, exist_ok=True)
    made = []
    for rw, word in (("randwrite", "writes"), ("randread", "reads")):
        workloads = [w for w in found["workloads"] if w["rw"] == rw and w["block"] == 4096 and w["jobs"] == 1]
        workloads = [w for w in workloads if not w["fsync"]]
        if len(workloads) > 1:
            path = directory / f"{rw}.svg"
            _figure(workloads, found["titles"], f"4 KiB random {word}").savefig(path, metadata={"Date": None})
            made.append(path)
    return made


def _figure(workloads: list[dict[str, Any]], titles: dict[str, str], title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title)
    rate, latency = figure.subplots(1, 2)
    for number, system in enumerate(titles):
        part = [w for w in workloads if system in w["systems"]]
        if not part:
            continue  # a system that took part in others only is not to be looked for here
        depths, runs = [w["depth"] for w in part], [w["systems"][system]["runs"] for w in part]
        colour = f"C{number}"
        rate.plot(depths, _medians(runs, "ops_per_s"), "o-", color=colour, label=titles[system])
        for (field, _), line in zip(PERCENTILES, ("-", "--", ":"), strict=True):
            latency.plot(depths, _medians(runs, field), "o" + line, color=colour, markersize=3)
    depths = [w["depth"] for w in workloads]
    for axes in (rate, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [str(d) for d in depths])
        axes.set_xlabel("queue depth")
        axes.grid(alpha=0.3)
    rate.set_ylabel("operations per second")
    rate.set_ylim(bottom=0)
    rate.legend(fontsize="small")
    latency.set_yscale("log")
    latency.set_ylabel("latency, µs (median —, 99 % - -, 99.9 % · ·)")
    return figure


def _medians(runs: list[list[dict[str, float]]], field: str) -> list[float]:
    return [statistics.median(run[field] for run in one) for one in runs]


def main() -> int:
    if len(sys.argv) != 3:
        print("usage: python benchmarks/plots.py RESULTS.json DIRECTORY", file=sys.stderr)
        return 2
    results, directory = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        for drawn in draw(found, directory):
            print(drawn)
    except ImportError:
        print("There is no matplotlib; `make bench` installs it.", file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    except (ValueError, KeyError, TypeError):
        print(f"{results} holds no results that `run.py --json` wrote.", file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
