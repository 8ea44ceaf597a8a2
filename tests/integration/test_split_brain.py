"""`tandemadm split-brain` on two real nodes with a real split brain: the report, the look, the recovery."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tandem.repl.bitmap import Bitmap
from tandem.tools.split_brain_files import find_files

from tests.adm_pair import NbdClient, wait_until
from tests.split_pair import BLOCK, Changes, SplitPair, TwoVolumes, block_of, noise


def changes_of(pair: SplitPair) -> dict[str, list[tuple[int, bytes]]]:
    """Each node changes a file alone, and both change the beginning of /letters/one."""
    one, two, three = (block_of(pair.image, f"/{name}") for name in ("letters/one", "letters/two", "three"))
    return {
        "alpha": [(one * BLOCK, noise("a", 10)), (three * BLOCK, noise("b", 3))],
        "beta": [(one * BLOCK, noise("c", 4)), (two * BLOCK, noise("d", 7)), (two * BLOCK, noise("d", 7))],
    }


@pytest.fixture
def pair() -> Iterator[SplitPair]:
    pair = SplitPair()
    try:
        pair.split(changes_of(pair))
        yield pair
    finally:
        pair.close()


@pytest.fixture(scope="module")
def seen() -> Iterator[SplitPair]:
    """The same, for tests that only look."""
    pair = SplitPair()
    try:
        pair.split(changes_of(pair))
        yield pair
    finally:
        pair.close()


def row(report: str, name: str) -> list[str]:
    """The cells of a line of the report's table."""
    line = next(line for line in report.splitlines() if line.strip().startswith(name))
    return [cell for cell in re.split(r"  +", line.strip()) if cell][1:]


def files(report: str, node: str) -> dict[str, tuple[str, str]]:
    """What the report says of the files that *node* changed."""
    lines = iter(report.splitlines())
    next(line for line in lines if line.startswith(f"  What {node} changed"))
    next(lines)
    found = {}
    for line in lines:
        if not line.startswith("    "):
            break
        mine, common, name = line.split(maxsplit=2)
        found[name] = (mine, common)
    return found


def cells(n_blocks: int) -> str:
    return f"{n_blocks} blocks, {n_blocks * BLOCK // 1024} KiB"


def test_the_report_is_what_a_comparison_of_the_disks_says(seen: SplitPair) -> None:
    alpha, beta = seen.changed("alpha"), seen.changed("beta")
    assert len(alpha & beta) == 4
    report = seen.ok("alpha", "split-brain", "r0")
    assert report.startswith("r0/0: split brain. alpha and beta have each written data the other does not have.\n")
    assert row(report, "changed alone") == [cells(len(alpha - beta)), cells(len(beta - alpha))]
    assert row(report, "changed by both") == [cells(len(alpha & beta))]
    assert row(report, "now") == ["Primary, StandAlone, UpToDate", "Secondary, StandAlone, UpToDate"]
    assert files(report, "alpha") == {"/letters/one": ("10", "4"), "/three": ("3", "-")}
    assert files(report, "beta") == {"/letters/one": ("4", "4"), "/letters/two": ("7", "-")}
    began = [line for line in report.splitlines() if "on its own since" in line]
    assert "not recorded" not in began[0]
    past = report[report.index("The histories differ since") : report.index("What alpha changed")]
    steps = [line.split(maxsplit=2)[2] for line in past.splitlines()[1:] if line.strip()]
    assert [step for step in steps if step.startswith("beta ") and "Primary" in step] == ["beta   became Primary"]
    assert any(step.startswith("alpha  new generation") for step in steps)
    other = seen.ok("beta", "split-brain", "r0")
    assert row(other, "changed alone") == row(report, "changed alone")[::-1]
    assert files(other, "beta") == files(report, "beta")


def test_the_report_reads_the_metadata_of_a_node_that_does_not_run(pair: SplitPair) -> None:
    alone = row(pair.ok("alpha", "split-brain", "r0"), "changed alone")
    pair.ok("beta", "down", "r0")
    report = pair.ok("alpha", "split-brain", "r0")
    assert row(report, "changed alone") == alone
    assert "not running" in row(report, "now")[1]
    refused = pair.adm("alpha", "split-brain", "r0", "--keep", "alpha")
    assert refused.code == 11 and "tandemadm up r0" in refused.err


def test_without_journals_the_metadata_tell_what_they_can(pair: SplitPair) -> None:
    for node in ("alpha", "beta"):
        pair.path(node, "journal").unlink()
    report = pair.ok("alpha", "split-brain", "r0")
    assert row(report, "on its own since") == ["not recorded", "not recorded"]
    assert "its metadata say that it was Primary when the common history ended" in report


def test_the_peer_is_asked_by_the_administrators_command(seen: SplitPair) -> None:
    script = seen.dir / "rsh"
    script.write_text('#!/bin/sh\nhost=$1; shift\necho "$host: $*" >> "${0%/*}/asked"\nexec sh -c "$*"\n')
    script.chmod(0o755)
    here = Path(sys.executable).parent
    result = seen.adm("alpha", "split-brain", "r0", "--rsh", f"env PATH={here}:/usr/bin:/bin:/usr/sbin:/sbin {script}")
    assert (result.code, result.err) == (0, "")
    assert row(result.out, "changed alone") == row(seen.ok("alpha", "split-brain", "r0"), "changed alone")
    asked = (seen.dir / "asked").read_text()
    assert asked.startswith("beta: tandemadm --node beta -c ")


def test_a_peer_that_cannot_be_asked_leaves_this_nodes_half(seen: SplitPair) -> None:
    result = seen.adm("alpha", "split-brain", "r0", "--rsh", "false")
    assert result.code == 0
    assert result.err.startswith("r0: beta cannot be asked: ") and result.err.count("\n") == 1
    assert result.out.startswith("r0/0: alpha (Primary, StandAlone, UpToDate) has been on its own since: 20")
    assert f"Changed here since then: {cells(len(seen.changed('alpha')))}" in result.out
    refused = seen.adm("alpha", "split-brain", "r0", "--keep", "alpha", "--rsh", "false")
    assert refused.code == 11 and "beta cannot be asked" in refused.err


def test_both_histories_can_be_looked_at(seen: SplitPair) -> None:
    with seen.popen("beta", "split-brain", "r0", "--look") as looking:
        assert looking.stdout is not None
        said = [looking.stdout.readline() for _ in range(4)]
        assert "Ctrl-C ends both exports" in said[3]
        for node in ("alpha", "beta"):
            uri = f"nbd+unix:///r0@{node}?socket={seen.path('beta', 'look')}"
            assert any(uri in line for line in said)
            copied = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True, timeout=60).stdout
            assert copied == seen.content(node)
        client = NbdClient(seen.path("beta", "look"), "r0@beta")
        assert client.write(0, bytes(BLOCK)) == 1  # EPERM
        client.close()
        looking.send_signal(signal.SIGINT)
        assert looking.wait(60) == 0
    assert not seen.path("beta", "look").exists()


@pytest.mark.parametrize(("keep", "at"), [("alpha", "alpha"), ("alpha", "beta"), ("beta", "alpha"), ("beta", "beta")])
def test_keep_and_restore(pair: SplitPair, keep: str, at: str) -> None:
    lose = "beta" if keep == "alpha" else "alpha"
    kept, lost = pair.content(keep), pair.content(lose)
    out = pair.ok(at, "split-brain", "r0", "--keep", keep)
    assert pair.content("alpha") == pair.content("beta") == kept
    assert pair.ok("alpha", "dstate", "r0") == "UpToDate/UpToDate\n"
    (history,) = pair.histories()
    assert f"--restore {history}" in out and history.parent == pair.run / at
    image = pair.dir / "restored.img"
    pair.ok("alpha", "split-brain", "r0", "--restore", str(history), "--image", str(image))
    assert image.read_bytes() == lost
    again = pair.adm("alpha", "split-brain", "r0", "--restore", str(history), "--image", str(image))
    assert again.code == 11 and "exists" in again.err
    after = pair.ok("alpha", "split-brain", "r0")
    assert after == "r0/0: no split brain: alpha and beta have the same history.\n"


def test_an_image_that_cannot_be_exact_says_so_and_a_whole_one_is(pair: SplitPair) -> None:
    lost = pair.content("beta")
    pair.ok("alpha", "split-brain", "r0", "--keep", "alpha", "--save", str(pair.dir / "some"), "--whole")
    assert pair.ok("alpha", "dstate", "r0") == "UpToDate/UpToDate\n"
    pair.write("alpha", [(20 << 20, noise("later", 2))])
    out = pair.ok("alpha", "split-brain", "r0", "--restore", str(pair.dir / "some"))
    assert str(pair.dir / "some.img") in out
    assert (pair.dir / "some.img").read_bytes() == lost


def test_what_was_overwritten_since_is_named(pair: SplitPair) -> None:
    lost = pair.content("beta")
    pair.ok("alpha", "split-brain", "r0", "--keep", "alpha", "--save", str(pair.dir / "some"))
    pair.write("alpha", [(20 << 20, noise("later", 2))])
    result = pair.adm("alpha", "split-brain", "r0", "--restore", str(pair.dir / "some"))
    assert result.code == 1 and result.err.startswith("But not all of it: 1 MiB lie in parts")
    image = (pair.dir / "some.img").read_bytes()
    assert [at for at in range(0, len(lost), BLOCK) if image[at : at + BLOCK] != lost[at : at + BLOCK]] == [
        20 << 20,
        (20 << 20) + BLOCK,
    ]


def test_an_xfs_image() -> None:
    pair = SplitPair(kind="xfs")
    try:
        at = pair.base.index((pair.dir / "tree/letters/one").read_bytes()[:BLOCK])
        pair.split({"alpha": [(at, noise("x", 5))], "beta": [(at + BLOCK, noise("y", 1)), (310 << 20, noise("z", 1))]})
        alpha, beta = pair.changed("alpha"), pair.changed("beta")
        report = pair.ok("beta", "split-brain", "r0")
        assert row(report, "changed alone") == ["1 block, 4 KiB", cells(len(alpha - beta))]
        assert files(report, "alpha") == {"/letters/one": ("5", "1")}
        assert files(report, "beta") == {"/letters/one": ("1", "1"), "<outside of the file system>": ("1", "-")}
        lost = pair.content("alpha")
        pair.ok("beta", "split-brain", "r0", "--keep", "beta", "--save", str(pair.dir / "h"))
        pair.ok("beta", "split-brain", "r0", "--restore", str(pair.dir / "h"))
        assert (pair.dir / "h.img").read_bytes() == lost
    finally:
        pair.close()


# ------------------------------------------------------------------------------------- two volumes

SECOND: Changes = {
    "alpha": [(BLOCK, noise("e", 3))],
    "beta": [(2 * BLOCK, noise("f", 1)), (5 << 20, noise("g", 20))],
}


NAMES = [
    b"new\nline", b"ends\n", b"cr\rback", b"form\x0cfeed",
    "ls\u2028nel\u0085".encode(), b"\xff bytes", b"back\\slash", b"space ",
]  # fmt: skip


def test_any_name_of_a_file_is_told_whole(directory: Path) -> None:
    """xfs gets its names by a patch: mkfs.xfs takes no such ones."""
    tree, image = directory / "tree", directory / "image"
    content = directory / "content"
    content.write_bytes(b"x" * 5000)
    tree.mkdir()
    for name in NAMES:
        (tree / os.fsdecode(name)).write_bytes(content.read_bytes())
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-d", tree, image], check=True, capture_output=True)
    assert all_names(image) == sorted(NAMES)
    image.unlink()
    with open(image, "wb") as file:
        file.truncate(300 << 20)
    stand_ins = {name: f"file{n}".ljust(len(name), "x") for n, name in enumerate(NAMES)}
    lines = [f"{name} ---644 0 0 {content}" for name in stand_ins.values()]
    (directory / "proto").write_text("\n".join(["/none", "0 0", "d--755 0 0", *lines, "$\n"]))
    words = ["mkfs.xfs", "-q", "-f", "-m", "crc=0", "-p", str(directory / "proto"), str(image)]
    subprocess.run(words, check=True, capture_output=True)
    with open(image, "r+b") as file:
        head = file.read(1 << 20)
        for name, stand_in in stand_ins.items():
            assert head.count(stand_in.encode()) == 1
            file.seek(head.index(stand_in.encode()))
            file.write(name)
    assert all_names(image) == sorted(NAMES)


def all_names(image: Path) -> list[bytes]:
    """The names of the files to which any block of the file system belongs."""
    changed = Bitmap(image.stat().st_size // BLOCK)
    changed.set(0, changed.n_bits)
    found = find_files(str(image), changed, BLOCK)
    assert not found.note
    names = [file.name for file in found.files if file.name.startswith("/")]
    return sorted(os.fsencode(name[1:]) for name in names if name not in ("/", "/lost+found"))


def test_two_volumes_are_reported_looked_at_and_recovered_together() -> None:
    pair = TwoVolumes()
    try:
        pair.split(changes_of(pair), second=SECOND)
        report = pair.ok("beta", "split-brain", "r0")
        first, _, second = report.partition("r0/1: split brain. beta and alpha have each written")
        assert first.startswith("r0/0: split brain. beta and alpha") and "/letters/two" in first
        assert row(second, "changed alone") == [cells(20), cells(2)]
        assert row(second, "changed by both") == ["1 block, 4 KiB"] and "/letters" not in second
        assert report.count("Keep one:") == 1, "the advice is for the resource"
        assert pair.ok("beta", "split-brain", "r0/1").startswith("r0/1: split brain.")
        with pair.popen("beta", "split-brain", "r0", "--look") as looking:
            assert looking.stdout is not None
            names = {looking.stdout.readline().split()[0] for _ in range(4)}
            assert names == {"r0@alpha", "r0@beta", "r0/1@alpha", "r0/1@beta"}
            uri = f"nbd+unix:///r0/1@alpha?socket={pair.path('beta', 'look')}"
            copied = subprocess.run(["nbdcopy", uri, "-"], capture_output=True, check=True, timeout=60).stdout
            assert copied[: len(pair.content("alpha", 1))] == pair.content("alpha", 1)
            looking.send_signal(signal.SIGINT)
            assert looking.wait(60) == 0
        refused = pair.adm("beta", "split-brain", "r0/1", "--keep", "alpha")
        assert refused.code == 1 and "--keep is for the whole resource" in refused.err
        kept = [pair.content("alpha", number) for number in (0, 1)]
        lost = [pair.content("beta", number) for number in (0, 1)]
        pair.ok("beta", "split-brain", "r0", "--keep", "alpha")
        assert [pair.content("beta", number) for number in (0, 1)] == kept
        (history,) = pair.histories()
        which = pair.adm("beta", "split-brain", "r0", "--restore", str(history))
        assert which.code == 11 and "has the volumes 0, 1; name one: tandemadm split-brain r0/0" in which.err
        for number in (0, 1):
            image = pair.dir / f"out{number}"
            pair.ok("beta", "split-brain", f"r0/{number}", "--restore", str(history), "--image", str(image))
            assert image.read_bytes()[: len(lost[number])] == lost[number]
    finally:
        pair.close()


def test_a_volume_in_which_the_winner_is_only_behind_is_not_given_up_by_accident() -> None:
    """alpha's second disk was away when the nodes parted: by the generations beta's data would come to alpha."""
    pair = TwoVolumes()
    try:
        pair.ok("alpha", "detach", "r0/1")
        pair.split(changes_of(pair), second={"beta": SECOND["beta"]})
        pair.ok("alpha", "secondary", "r0")
        pair.ok("alpha", "attach", "r0/1")
        before = [pair.content(node, number) for node in ("alpha", "beta") for number in (0, 1)]
        assert "r0/1: no split brain: alpha is only behind beta" in pair.ok("alpha", "split-brain", "r0")
        refused = pair.adm("alpha", "split-brain", "r0", "--keep", "alpha")
        assert refused.code == 11 and "r0/1: no split brain: alpha is only behind beta" in refused.err
        assert [pair.content(node, number) for node in ("alpha", "beta") for number in (0, 1)] == before
        pair.ok("alpha", "primary", "--force", "r0")
        pair.ok("alpha", "split-brain", "r0", "--keep", "alpha")
        assert [pair.content("beta", number) for number in (0, 1)] == before[:2]
    finally:
        pair.close()


# ------------------------------------------------------------------------------------- trouble


STEPS = (
    "parted", "demoted", "saving", "reading the rest", "saved", "comparing the saved blocks with the disk",
    "checked", "discarding", "connecting",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_neither_history_is_lost(step: str) -> None:
    pair = SplitPair()
    try:
        pair.split(changes_of(pair))
        kept, lost = pair.content("alpha"), pair.content("beta")
        first = pair.killed_at(step, "beta", "split-brain", "r0", "--keep", "alpha")
        assert first.code == -signal.SIGKILL, first
        assert pair.content("alpha") == kept
        if step != "connecting":
            assert pair.content("beta") == lost  # nothing has been discarded
        else:
            assert len(pair.histories()) == 1
        assert pair.adm("beta", "split-brain", "r0", "--keep", "alpha").code == 0
        assert pair.content("alpha") == pair.content("beta") == kept
        history, *again = pair.histories()
        assert step == "connecting" or not again  # only then may the second one find a split that is saved already
        pair.ok("beta", "split-brain", "r0", "--restore", str(history), "--image", str(pair.dir / "out"))
        assert (pair.dir / "out").read_bytes() == lost
    finally:
        pair.close()


def test_others_may_change_the_resource_again_before_the_command_ends(pair: SplitPair) -> None:
    """A resync may take hours, and a client of the kept node is not to wait for it."""
    told = subprocess.run(
        [sys.executable, "-c", ASKED, *(str(pair.path(node, "lock")) for node in ("alpha", "beta")),
         *pair.where("alpha"), "split-brain", "r0", "--keep", "alpha"],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    free = {line.split()[1]: line.split()[2] for line in told.stdout.splitlines() if line.startswith("LOCKS")}
    assert free["checked"] == free["connecting"] == "0" and free["done"] == "2"


ASKED = """
import fcntl, sys
from tandem.tools import adm, split_brain_run

locks, real = sys.argv[1:3], split_brain_run.Recovery

def is_free(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

def asking(announce):
    def told(step, text):
        announce(step, text)
        print("LOCKS", step, sum(map(is_free, locks)))
    return told

split_brain_run.Recovery = lambda wish, nodes, announce, tell: real(wish, nodes, asking(announce), tell)
sys.exit(adm.run(sys.argv[3:]))
"""


def test_a_file_that_holds_an_older_state_is_not_taken_for_the_history(pair: SplitPair) -> None:
    kept = pair.content("alpha")
    assert pair.killed_at("checked", "beta", "split-brain", "r0", "--keep", "alpha").code == -signal.SIGKILL
    pair.ok("beta", "primary", "r0")
    pair.write("beta", [(block_of(pair.image, "/letters/two") * BLOCK, noise("rewritten", 2))])  # the same blocks
    pair.ok("beta", "secondary", "r0")
    lost = pair.content("beta")
    (old,) = pair.histories()
    taken = pair.adm("beta", "split-brain", "r0", "--keep", "alpha", "--save", str(old))
    assert taken.code == 11 and "does not hold this history" in taken.err
    assert pair.content("beta") == lost
    assert pair.adm("beta", "split-brain", "r0", "--keep", "alpha").code == 0
    (new,) = (path for path in pair.histories() if path != old)
    pair.ok("beta", "split-brain", "r0", "--restore", str(new), "--image", str(pair.dir / "out"))
    assert (pair.dir / "out").read_bytes() == lost and pair.content("beta") == kept


def test_no_room_no_change(seen: SplitPair) -> None:
    before = {node: seen.content(node) for node in ("alpha", "beta")}
    limited = ["bash", "-c", 'ulimit -f 8; exec "$@"', "-", sys.executable, "-m", "tandem.tools.adm"]
    words = [*seen.where("alpha"), "split-brain", "r0", "--keep", "alpha"]
    done = subprocess.run([*limited, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 11 and "bytes are needed" in done.stderr and "--save FILE" in done.stderr
    nowhere = seen.adm("alpha", *words[6:], "--save", "/proc/nowhere/file")
    assert nowhere.code == 11 and "nothing has been changed" in nowhere.err
    assert {node: seen.content(node) for node in ("alpha", "beta")} == before
    assert not seen.histories() and not list(seen.run.glob("*/*.part"))


def test_a_loser_in_use_is_not_demoted() -> None:
    pair = SplitPair()
    try:
        pair.split(changes_of(pair), both_primary=True)
        client = NbdClient(pair.path("beta", "nbd"), "r0")
        refused = pair.adm("alpha", "split-brain", "r0", "--keep", "alpha")
        assert refused.code == 11
        assert "beta: secondary refused: (-12) Device is held open by someone." in refused.err
        assert pair.ok("beta", "role", "r0").startswith("Primary/")
        client.close()
        wait_until(lambda: '"open": true' not in pair.ok("beta", "status", "--json", "r0"))
        pair.ok("alpha", "split-brain", "r0", "--keep", "alpha")
    finally:
        pair.close()


def test_ctrl_c_loses_nothing(pair: SplitPair) -> None:
    kept = pair.content("alpha")
    with pair.popen("beta", "split-brain", "r0", "--keep", "alpha") as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("beta is Secondary"):
            pass
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err[:12]) == (130, "Interrupted.") or process.returncode == 0
    assert pair.adm("beta", "split-brain", "r0", "--keep", "alpha").code == 0
    assert pair.content("beta") == kept


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--keep", "gamma"], 11, "the nodes are alpha and beta"),
        (["--keep", "alpha", "--look"], 2, "three different things"),
        (["--save", "x"], 2, "belong to --keep"),
        (["--restore", "/etc/passwd"], 11, "/etc/passwd is not a history saved by split-brain --keep"),
        (["--restore", "/nowhere"], 11, "No such file or directory"),
    ],
)
def test_mistakes_get_one_sentence(seen: SplitPair, words: list[str], code: int, sentence: str) -> None:
    result = seen.adm("alpha", "split-brain", "r0", *words)
    assert result.code == code and sentence in result.err and result.err.count("\n") == 1


def test_nodes_that_are_connected_have_nothing_to_decide(pair: SplitPair) -> None:
    pair.ok("beta", "split-brain", "r0", "--keep", "alpha")
    for keep in ("alpha", "beta"):
        said = pair.ok("alpha", "split-brain", "r0", "--keep", keep)
        assert said == "The nodes are connected and have the same data: there is nothing to decide.\n"
    report = pair.adm("alpha", "split-brain", "r0", "--rsh", "false")
    assert report.out == "r0/0: no split brain. alpha (Primary, Connected, UpToDate) is connected to the other node.\n"


def test_a_node_that_is_being_overwritten_is_not_kept_any_more(pair: SplitPair) -> None:
    pair.ok("alpha", "pause-sync", "r0")
    pair.ok("beta", "connect", "--discard-my-data", "r0")
    pair.ok("alpha", "connect", "r0")
    wait_until(lambda: pair.ok("alpha", "cstate", "r0") == "PausedSyncS\n")
    refused = pair.adm("beta", "split-brain", "r0", "--keep", "beta")
    assert refused.code == 11
    assert refused.err.startswith("r0: alpha's data is being copied to beta already, so beta's cannot be kept any")


def test_a_place_that_cannot_be_used_is_refused_before_anybody_is_demoted(pair: SplitPair) -> None:
    refused = pair.adm("beta", "split-brain", "r0", "--keep", "beta", "--save", "/dev/full")
    assert (refused.code, refused.out) == (11, "")
    assert "it is not a regular file" in refused.err
    assert pair.ok("alpha", "role", "r0").startswith("Primary/")
