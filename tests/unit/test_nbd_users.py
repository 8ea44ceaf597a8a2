"""Who uses a block device, found in the real /proc and in an imitated /sys."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tandem.tools import nbd_users
from tandem.tools.nbd_users import in_words, users

DISK, PART = os.makedev(43, 0), os.makedev(43, 1)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """/sys/block/nbd0 with one partition; files named disk and part have their device numbers."""
    found = tmp_path / "sys" / "nbd0"
    for directory, number in ((found, "43:0\n"), (found / "nbd0p1", "43:1\n")):
        (directory / "holders").mkdir(parents=True)
        (directory / "dev").write_text(number)
    names = {tmp_path / "disk": DISK, tmp_path / "part": PART}
    monkeypatch.setattr(nbd_users, "number_of", lambda path: names.get(Path(os.path.realpath(path))))
    return found


@pytest.mark.parametrize("name", ["disk", "part"])
def test_a_program_that_has_it_open_is_named(disk: Path, tmp_path: Path, name: str) -> None:
    """No O_EXCL, and no lock: as a virtual machine does it."""
    (tmp_path / name).touch()
    (tmp_path / "other").touch()
    wait = [sys.executable, "-c", "print(flush=True); input()"]
    with open(tmp_path / "other") as other, subprocess.Popen(
        wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=other
    ) as program:
        assert program.stdout is not None and program.stdout.readline()
        assert users(disk) == []
        program.communicate(b"\n")
    with open(tmp_path / name) as opened, subprocess.Popen(
        wait, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=opened
    ) as program:
        assert program.stdout is not None and program.stdout.readline()
        [user] = users(disk)  # this process has it open, too, and does not count
        assert user.startswith(f"pid {program.pid} (python")
        program.communicate(b"\n")
    assert users(disk) == []


def test_what_the_kernel_made_of_it(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "nbd0p1" / "holders" / "dm-3" / "dm").mkdir(parents=True)
    (disk / "nbd0p1" / "holders" / "dm-3" / "dm" / "name").write_text("vg-lv\n")
    (disk / "holders" / "md0").mkdir()
    for loop, file in (("loop4", "disk"), ("loop5", "image")):
        (disk.parent / loop / "loop").mkdir(parents=True)
        (disk.parent / loop / "loop" / "backing_file").write_text(f"{tmp_path}/{file}\n")
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "self" / "mountinfo").write_text(
        "22 1 43:1 / /srv/a\\040b rw,noatime shared:1 - ext4 /dev/nbd0p1 rw\n"
        f"23 1 0:45 /sub /pool rw - btrfs {tmp_path}/disk rw\n"
        "24 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
    )
    (proc / "swaps").write_text(f"Filename Type Size\n{tmp_path}/part partition 1 0 -2\n/swap file 1 0 -1\n")
    monkeypatch.setattr(nbd_users, "PROC", proc)
    assert users(disk) == [
        "the file system mounted on /srv/a b", "the file system mounted on /pool", f"swap on {tmp_path}/part",
        "md0", "dm-3 (vg-lv)", "loop4",
    ]  # fmt: skip


def test_a_disk_that_is_gone_has_no_users(tmp_path: Path) -> None:
    assert users(tmp_path / "nbd7") == []


def test_words() -> None:
    assert in_words(["a"]) == "a"
    assert in_words(["a", "b"]) == "a and b"
    assert in_words(["a", "b", "c"]) == "a, b and c"
    assert in_words(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
