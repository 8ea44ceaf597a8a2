"""The benchmark as a program: what is refused before anything is measured, and what is left when it is interrupted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import FindProgram

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PATIENCE_S = 120.0
SHORT = ("--rounds", "1", "--no-resync", "--no-extras", "--size", "16", "--workload", "randwrite-4k-qd1")


def bench(*words: str, script: str = "run.py", path: str | None = None) -> subprocess.CompletedProcess[str]:
    """The benchmark with these arguments, which must end by itself and without a traceback."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *words], capture_output=True, text=True, timeout=PATIENCE_S,
        env=os.environ | ({} if path is None else {"PATH": path}), check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("--system", "foo"), 2, "no system foo; there are nbdkit, qemu-nbd, "),
        (("--system", "other"), 2, "no system other; there are"),
        (("--workload", "foo"), 2, "no workload foo; there are randwrite-4k-qd1, "),
        (("--dir", "/proc/no-such"), 2, "there is no directory /proc/no-such"),
        (("--dir", "/proc"), 1, "--dir /proc: nothing can be made there"),
        (("--json", "/proc/x/y"), 1, "--json /proc/x/y: no file can be written there"),
        (("--json", "/"), 1, "--json /: no file can be written there (Is a directory)"),
        (("--plots", "/dev/null"), 1, "--plots /dev/null: nothing can be made there"),
        (("--table", "/proc/x"), 1, "--table /proc/x: no file can be written there"),
        (("--size", "99999999"), 1, "files of 99,999,999 MiB"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_is_measured(
    program: FindProgram, words: tuple[str, ...], status: int, sentence: str
) -> None:
    program("fio")
    program("nbdkit")
    done = bench(*SHORT, *words)
    assert (done.returncode, sentence in done.stderr) == (status, True), done.stderr
    assert "starting" not in done.stderr


def test_a_check_leaves_no_file(program: FindProgram, tmp_path: Path) -> None:
    program("fio")
    bench(*SHORT, "--json", str(tmp_path / "run.json"), "--size", "99999999")
    assert not list(tmp_path.iterdir())


def test_the_reference_is_needed(program: FindProgram, tmp_path: Path) -> None:
    (tmp_path / "fio").symlink_to(program("fio"))
    done = bench(*SHORT, path=str(tmp_path))
    assert (done.returncode, "without nbdkit there is nothing" in done.stderr) == (1, True), done.stderr


def test_the_line_in_the_readme_installs_the_list() -> None:
    lines = (BENCHMARKS / "debian-packages.txt").read_text().splitlines()
    listed = [line for line in lines if not line.startswith("#")]
    assert f"    apt install {' '.join(listed)}\n" in (BENCHMARKS / "README.md").read_text()


@pytest.mark.parametrize(
    ("prepare", "described"),
    [
        ("true", "1.2.3"),
        ("git init -q . && git add -A && git commit -qm first", "1.2.3, commit COMMIT"),
        ("git init -q . && git add -A && git commit -qm first && echo >> file", "1.2.3, commit COMMIT + changes"),
    ],
)  # fmt: skip
def test_a_run_knows_which_tandem_it_measured(
    program: FindProgram, tmp_path: Path, prepare: str, described: str
) -> None:
    git = program("git")
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.3"\n')
    (tmp_path / "file").touch()
    who = {f"GIT_{role}_{what}": "t@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    subprocess.run(["/bin/sh", "-c", prepare], cwd=tmp_path, env=os.environ | who, check=True)
    if "COMMIT" in described:
        head = subprocess.run([git, "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
        described = described.replace("COMMIT", head.stdout.strip())
    script = "import machine, pathlib, sys; print(machine.version_of_tandem(pathlib.Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=BENCHMARKS, check=False
    )
    assert (done.stdout, done.stderr) == (f"{described}\n", "")


@pytest.mark.parametrize("words", [(), ("/no/such.json", "/tmp")])
def test_plots_of_a_run_that_is_not_there(words: tuple[str, ...]) -> None:
    done = bench(*words, script="plots.py")
    assert done.returncode == (1 if words else 2)
    assert ("/no/such.json: No such file or directory" if words else "usage: ") in done.stderr


def test_nothing_is_left_however_often_it_is_interrupted(program: FindProgram, directory: Path) -> None:
    program("fio")
    program("nbdkit")
    process = subprocess.Popen(
        [sys.executable, str(BENCHMARKS / "run.py"), *SHORT, "--seconds", "60", "--system", "tandem",
         "--dir", str(directory)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    assert process.stderr is not None
    with process:
        seen = [""]
        while not seen[-1].startswith("round 1"):
            seen.append(process.stderr.readline())
            assert seen[-1], seen
        (run,) = directory.iterdir()
        assert processes(run), "nothing was started"
        process.send_signal(signal.SIGINT)
        while not seen[-1].startswith("Ending"):
            seen.append(process.stderr.readline())
            assert seen[-1], seen
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        assert process.stderr.read() == ""
        assert process.wait(PATIENCE_S) == 128 + signal.SIGINT
    assert not processes(run) and not list(directory.iterdir())


def test_what_slipped_through_is_killed(tmp_path: Path) -> None:
    """A program that nobody knows of any more, in a session of its own, and not one of another run."""
    script = (
        "import ending, os, pathlib, subprocess, sys\n"
        "runs = [pathlib.Path(sys.argv[1], name) for name in ('this', 'that')]\n"
        "started = []\n"
        "for run in runs:\n"
        "    ending.mark(run)\n"
        "    started.append(subprocess.Popen(['cat'], stdin=subprocess.PIPE, start_new_session=True))\n"
        "ending.end_leftovers(runs[0])\n"
        "print(started[0].wait(), started[1].poll())\n"
        "started[1].communicate()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=PATIENCE_S,
        cwd=BENCHMARKS, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("-9 None\n", "")


def processes(run: Path) -> list[str]:
    """The command lines that name the directory of that run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue  # it has ended
        if os.fsencode(run) in line:
            found.append(line.decode(errors="replace"))
    return found
