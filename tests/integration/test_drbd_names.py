"""DRBD's own scripts, unmodified, on a resource of Tandem's: the names drbdadm and drbdsetup, and /proc/drbd."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tandem.tools.demo_pair import Node, Pair, alone

from tests.integration.test_fencing import FAST, STONITH, handlers, said, thawed

NewPair = Callable[..., Pair]
FindProgram = Callable[[str], str]
BIN = Path(sys.executable).parent
SHELL_FUNCTIONS = Path("/usr/lib/ocf/resource.d/linbit/drbd.shellfuncs.sh")
NOTIFY, STONITH_ADMIN = "/usr/lib/drbd/notify-pri-lost.sh", "/usr/lib/drbd/stonith_admin-fence-peer.sh"


@pytest.fixture
def names(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with DRBD's names in front of PATH, for daemons that the test starts too."""
    place = directory / "names"
    subprocess.run([BIN / "tandemadm", "drbd-names", place], check=True)
    again = subprocess.run([BIN / "tandemadm", "drbd-names", place], check=False)
    assert again.returncode == 0 and sorted(path.name for path in place.iterdir()) == ["drbdadm", "drbdsetup"]
    monkeypatch.setenv("PATH", f"{place}:{BIN}:{os.environ['PATH']}")
    return place


def stand_in(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def on(pair: Pair, node: Node, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as somebody on that host."""
    env = os.environ | {
        "TANDEM_CONFIG": str(pair.config), "TANDEM_RUN_DIR": str(pair.run_dir), "TANDEM_NODE": node.name,
    }  # fmt: skip
    return subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False, timeout=120)


def test_names_are_put_only_where_nobody_elses_are(directory: Path) -> None:
    (directory / "drbdsetup").write_text("somebody else's")
    done = subprocess.run([BIN / "tandemadm", "drbd-names", directory], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "not ours" in done.stderr
    assert (directory / "drbdsetup").read_text() == "somebody else's"


def test_both_names_and_the_agents_of_the_cluster(names: Path, new_pair: NewPair, program: FindProgram) -> None:
    program(str(SHELL_FUNCTIONS.with_name("drbd")))
    pair = new_pair(net=FAST)
    pair.start()
    alice, bob = pair.first, pair.second
    for command, out in [
        ("drbdadm role r0", "Primary/Secondary\n"), ("drbdsetup role 0", "Primary/Secondary\n"),
        ("drbdsetup cstate /dev/drbd0", "Connected\n"), ("drbdsetup dstate minor-0", "UpToDate/UpToDate\n"),
        ("drbdsetup wait-connect 0 --wfc-timeout=5", ""), ("drbdsetup wait-sync-resource r0", ""),
        ("drbdadm sh-dev r0", "/dev/drbd0\n"),
    ]:  # fmt: skip
        done = on(pair, alice, command)
        assert (done.returncode, done.stdout) == (0, out), (command, done.stderr)
    version = on(pair, alice, "eval $(drbdadm --version) && echo $((DRBD_KERNEL_VERSION_CODE >= 0x080400))")
    assert version.stdout == "1\n"
    unknown = on(pair, alice, "drbdadm foo")
    assert unknown.returncode == 1 and "drbdadm: Unknown command 'foo'" in unknown.stderr
    foreign = on(pair, alice, "drbdsetup attach 0 /dev/x /dev/y internal")
    assert foreign.returncode == 20 and "Device '0' is configured!" in foreign.stderr
    for way in ("sh_status", "events2"):
        text = (f". {SHELL_FUNCTIONS}; DRBD_HAS_MULTI_VOLUME=true DRBDSETUP=drbdsetup DRBD_RESOURCE=r0; "
                f"_drbd_set_status_variables_from_{way}; echo $status_primary $status_disk_all_up_to_date "
                "$status_pdsk_all_up_to_date $status_unconfigured")  # fmt: skip
        assert on(pair, alice, text).stdout == "true true true false\n", way
        assert on(pair, bob, text).stdout == "false true true false\n", way
    down = on(pair, bob, "drbdsetup down r0; drbdsetup role 0")
    assert down.returncode == 20 and pair.pid(bob) is None


def test_drbddisk(names: Path, new_pair: NewPair, program: FindProgram) -> None:
    """The script insists on /sbin/drbdadm; there is ours, for it alone."""
    drbddisk = program("/etc/ha.d/resource.d/drbddisk")
    pair = new_pair(net=FAST)
    pair.start()

    def run(node: Node, command: str) -> tuple[int, str]:
        own = f"mount --bind {BIN}/tandemadm $(readlink -f /sbin/drbdadm) && {drbddisk} r0 {command}"
        done = on(pair, node, f"unshare --mount bash -c {shlex.quote(own)}")
        return done.returncode, done.stdout

    alice, bob = pair.first, pair.second
    assert run(alice, "status") == (0, "running (Primary)\n") and run(bob, "status") == (3, "stopped (Secondary)\n")
    assert run(alice, "stop") == (0, "") and run(bob, "start") == (0, "")
    assert run(bob, "status") == (0, "running (Primary)\n")
    assert pair.status(alice).role == "Secondary"


def test_the_fencing_and_notifying_scripts(names: Path, new_pair: NewPair, program: FindProgram) -> None:
    """stonith_admin and mail are stand-ins that write down what they are told; everything else is Debian's."""
    program(STONITH_ADMIN)
    program(NOTIFY)
    stand_in(names / "stonith_admin", f'echo "$@" >> {names}/stonith')
    stand_in(names / "mail", f'{{ echo "$@"; cat; }} > {names}/letter')
    pair = new_pair(
        disk=STONITH, net=FAST,
        more=handlers(fence_peer=f"tandem-with-proc-drbd {STONITH_ADMIN}", unfence_peer=f"{NOTIFY} ops"),
    )  # fmt: skip
    pair.start()
    alice, bob = pair.first, pair.second
    pair.kill(bob)
    pair.wait(alice, "alone", alone)
    pair.wait(alice, "thawed", thawed)
    assert "helper command: fence-peer [exit code 7]" in alice.log
    assert (names / "stonith").read_text() == "--tolerance 5s --tag drbd --fence bob\n"
    pair.adm(bob, "up", "r0")
    pair.wait_in_sync()
    said(pair, alice, "helper command: unfence-peer [exit code 0]")
    letter = (names / "letter").read_text()
    assert letter.startswith("-s DRBD resource r0 is currently Primary") and letter.splitlines()[0].endswith(" ops")


def test_proc_drbd(names: Path, new_pair: NewPair) -> None:
    pair = new_pair(net=FAST)
    pair.start()
    alice = pair.first
    shown = on(pair, alice, "tandem-with-proc-drbd cat /proc/drbd /proc/self/comm").stdout
    lines = shown.splitlines()
    assert lines[0] == "version: 8.4.11 (api:1/proto:86-101)" and lines[-1] == "cat"
    assert lines[2] == " 0: cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate   r-----"
    assert lines[3].startswith("    ns:") and lines[3].endswith(" wo:f oos:0")
    assert on(pair, alice, "drbdadm proc-drbd").stdout.splitlines()[:3] == lines[:3]
    assert not Path("/proc/drbd").exists(), "nobody else sees it"
    failed = on(pair, alice, "tandem-with-proc-drbd /nonexistent")
    assert failed.returncode == 126 and "No such file" in failed.stderr
