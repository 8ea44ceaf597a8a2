"""Handler programs against what they speak to: fence-agents, sshd, Pacemaker's tools on a file, a mail program."""

from __future__ import annotations

import getpass
import os
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tandem.tools.agents import cib, notify
from tandem.tools.agents.handler import FenceResult as R
from tandem.tools.agents.handler import HandlerError
from tandem.tools.demo_pair import Pair, alone, free_ports

FindProgram = Callable[[str], str]
BIN = Path(sys.executable).parent
SYSTEM = "/usr/sbin:/sbin:/usr/bin:/bin"
CALL = {
    "DRBD_RESOURCE": "r0", "DRBD_PEERS": "bob", "DRBD_PEER": "bob", "DRBD_MY_NODE_ID": "0", "DRBD_NODE_ID_0": "alice",
    "UP_TO_DATE_NODES": "0x00000001", "HOME": "/", "TERM": "linux", "PATH": f"{SYSTEM}:{BIN}",
}  # fmt: skip


def run(name: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run one of our programs as the daemon would."""
    return subprocess.run(
        [BIN / name, *words], env=CALL | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=120,
    )  # fmt: skip


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ----------------------------------------------------------------------------------------- fence-agents


def test_an_agent_switches_off_and_is_asked(directory: Path, program: FindProgram) -> None:
    plug = directory / "plug"
    plug.write_text("on")
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {program('fence_dummy')}\nstatus_file = {plug}\n")
    checked = run("tandem-fence-peer", "-f", str(path), "--check", "bob")
    assert checked.returncode == 0 and "ON" in checked.stdout and plug.read_text() == "on"
    done = run("tandem-fence-peer", "-f", str(path))
    assert done.returncode == R.PEER_STONITHED and "bob is off" in done.stdout and plug.read_text() == "off"


def test_a_switch_that_does_not_switch_is_tried_again_and_then_the_second_one(
    directory: Path, program: FindProgram
) -> None:
    plug = directory / "plug"
    path = directory / "fence.conf"
    stuck = f"[bob]\nagent = {program('fence_dummy')}\ntype = fail\nport = bob\nattempts = 2\npower_timeout = 1\n"
    path.write_text(stuck)
    done = run("tandem-fence-peer", "-f", str(path))
    assert done.returncode == R.BROKEN and "attempt 2 failed" in done.stdout
    path.write_text(f"{stuck}[bob second]\nagent = {program('fence_dummy')}\nstatus_file = {plug}\n")
    done = run("tandem-fence-peer", "-f", str(path))
    assert done.returncode == R.PEER_STONITHED and "[bob second]" in done.stdout


def test_an_agent_that_says_done_while_the_machine_runs_is_not_believed(directory: Path) -> None:
    liar = script(directory / "fence_liar", "grep -q action=off && exit 0\nexit 0")
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {liar}\nattempts = 1\n")
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.BROKEN


@pytest.mark.parametrize("text", [
    "exec python3 /nonexistent/fence_x.py",
    "exec python3 -c 'import argparse as a; p = a.ArgumentParser(); p.add_argument(\"-o\", required=True); "
    "p.parse_args()'",
    "if",
])  # fmt: skip
def test_an_agent_that_could_not_even_begin_is_not_taken_for_a_machine_that_is_off(directory: Path, text: str) -> None:
    """All of these end with 2, the code for off, whatever they are asked."""
    agent = script(directory / "fence_broken", text)
    assert subprocess.run([agent], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 2
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {agent}\n")
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.BROKEN
    assert run("tandem-fence-peer", "-f", str(path), "--check", "bob").returncode == 1


def test_a_process_that_an_agent_leaves_behind_is_not_waited_for(directory: Path) -> None:
    pid = directory / "pid"
    agent = script(
        directory / "fence_daemon", f"setsid sleep 600 & echo $! >> {pid}; grep -q action=off && exit 0; exit 2"
    )
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {agent}\nlimit = 100\n")
    try:
        done = run("tandem-fence-peer", "-f", str(path))
        assert done.returncode == R.PEER_STONITHED and "attempt" not in done.stdout
    finally:
        for word in pid.read_text().split():
            os.kill(int(word), signal.SIGTERM)


def test_a_switch_that_is_off_answers_when_it_is_checked(directory: Path, program: FindProgram) -> None:
    plug = directory / "plug"
    plug.write_text("off")
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {program('fence_dummy')}\nstatus_file = {plug}\n")
    checked = run("tandem-fence-peer", "-f", str(path), "--check", "bob")
    assert checked.returncode == 0 and "OFF" in checked.stdout


def test_an_agent_that_hangs_is_killed(directory: Path) -> None:
    path = directory / "fence.conf"
    path.write_text(f"[bob]\nagent = {script(directory / 'fence_stuck', 'sleep 600')}\nattempts = 1\nlimit = 1\n")
    done = run("tandem-fence-peer", "-f", str(path))
    assert done.returncode == R.BROKEN and "did not end within 1 seconds" in done.stdout


@pytest.mark.parametrize(("words", "env", "says"), [
    (["-f", "/nonexistent/fence.conf"], {}, "No such file"),
    ([], {"DRBD_RESOURCE": ""}, "DRBD_RESOURCE"),
])  # fmt: skip
def test_what_is_wrong_is_said_and_nobody_is_fenced(words: list[str], env: dict[str, str], says: str) -> None:
    done = run("tandem-fence-peer", *words, **env)
    assert done.returncode == R.BROKEN and says in done.stderr and "Traceback" not in done.stderr
    assert run("tandem-fence-peer", "--nonsense").returncode == 2


def test_pacemaker_fences(directory: Path, program: FindProgram) -> None:
    """Without a cluster the real tool fails; what it would be told is seen by one that stands in for it."""
    path = directory / "fence.conf"
    path.write_text("[bob]\nagent = stonith_admin\nnode = node-b\nattempts = 1\nlimit = 7\n")
    program("stonith_admin")
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.BROKEN
    said = directory / "said"
    script(directory / "stonith_admin", f'echo "$@" > {said}')
    done = run("tandem-fence-peer", "-f", str(path), PATH=f"{directory}:{SYSTEM}")
    assert done.returncode == R.PEER_STONITHED
    assert said.read_text().split() == ["--tolerance", "5s", "--tag", "tandem", "--timeout", "7", "--fence", "node-b"]


# -------------------------------------------------------------------------------------------------- ssh


@dataclass(slots=True)
class Host:
    """A host reached by ssh: this machine, through an sshd of the test's own."""

    directory: Path
    config: Path

    def device(self, text: str) -> Path:
        path = self.directory / "fence.conf"
        path.write_text(f"[bob]\nconfig = {self.config}\nattempts = 1\nlimit = 30\n{text}\n")
        return path


@pytest.fixture
def host(directory: Path, program: FindProgram) -> Iterator[Host]:
    (port,) = free_ports(1)
    for key in ("host", "user"):
        subprocess.run([program("ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    (directory / "authorized").write_bytes((directory / "user.pub").read_bytes())
    (directory / "sshd.conf").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {directory}/host\nAuthorizedKeysFile {directory}/authorized\n"
        "UsePAM no\nPasswordAuthentication no\nStrictModes no\nPidFile none\nPermitRootLogin yes\n"
        f"SetEnv PATH={directory}:{BIN}:{SYSTEM}\n"
    )
    (directory / "ssh.conf").write_text(
        f"Host *\nHostName 127.0.0.1\nPort {port}\nUser {getpass.getuser()}\nIdentityFile {directory}/user\n"
        f"StrictHostKeyChecking no\nUserKnownHostsFile {directory}/known\nLogLevel ERROR\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists on it; a system's own sshd has made it
    process = subprocess.Popen(
        [program("sshd"), "-D", "-e", "-f", directory / "sshd.conf"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None and "listening" in process.stderr.readline()
    yield Host(directory, directory / "ssh.conf")
    process.terminate()
    process.wait(20)
    process.stderr.close()


def test_a_command_on_another_host_switches_off(host: Host) -> None:
    path = host.device(f"agent = ssh\nhost = hypervisor\ncommand = touch {host.directory}/off\n"
                       f"check = test -e {host.directory}/off")  # fmt: skip
    done = run("tandem-fence-peer", "-f", str(path))
    assert done.returncode == R.PEER_STONITHED, done.stdout + done.stderr
    path = host.device("agent = ssh\nhost = hypervisor\ncommand = true\ncheck = false")
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.BROKEN


@pytest.mark.parametrize(("outdate", "disks", "result"), [
    (0, "Outdated/DUnknown", R.PEER_OUTDATED), (5, "Inconsistent/DUnknown", R.PEER_INCONSISTENT),
    (17, "UpToDate/DUnknown", R.PEER_PRIMARY), (0, "Diskless/DUnknown", R.PEER_INCONSISTENT),
    (20, "", R.BROKEN),
])  # fmt: skip
def test_what_the_peer_answers_when_it_is_told_to_outdate_itself(
    host: Host, outdate: int, disks: str, result: R
) -> None:
    script(host.directory / "drbdadm", f'[ "$*" = "dstate r0" ] && echo {disks} && exit\nexit {outdate}')
    path = host.device("agent = outdate\nprogram = drbdadm")
    assert run("tandem-fence-peer", "-f", str(path)).returncode == result


def test_a_real_peer_is_outdated(host: Host, pair: Pair) -> None:
    """While it is connected it refuses silently; that is seen in its disk state, and is no success."""
    bob = pair.second
    words = " ".join(str(word) for word in pair.command(bob))
    path = host.device(f"agent = outdate\nprogram = {words}")
    patient = path.read_text()
    path.write_text(patient.replace("limit = 30", "limit = 4"))
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.BROKEN
    pair.adm(pair.first, "disconnect", "--force", "r0")
    pair.wait(bob, "alone", alone)
    path.write_text(patient)
    assert run("tandem-fence-peer", "-f", str(path)).returncode == R.PEER_OUTDATED
    assert pair.status(bob).volumes[0].disk == "Outdated"


# -------------------------------------------------------------------------------------------- Pacemaker


CIB = """<cib crm_feature_set="3.0.14" validate-with="pacemaker-3.0" epoch="5" num_updates="0" admin_epoch="0"
 have-quorum="{quorum}"><configuration><crm_config><cluster_property_set id="p">
 <nvpair id="p-s" name="stonith-enabled" value="{stonith}"/></cluster_property_set></crm_config>
 <nodes><node id="1" uname="alice"><instance_attributes id="n1"><nvpair id="n1s" name="site" value="east"/>
 </instance_attributes></node><node id="2" uname="bob"/></nodes>
 <resources><clone id="ms_r0"><meta_attributes id="m"><nvpair id="m-p" name="promotable" value="true"/>
 </meta_attributes><primitive id="p_r0" class="ocf" provider="linbit" type="drbd"><instance_attributes id="ia">
 <nvpair id="ia-r" name="drbd_resource" value="r0"/></instance_attributes></primitive></clone></resources>
 <constraints/></configuration><status>
 <node_state id="1" uname="alice" in_ccm="true" crmd="online" join="member" expected="member"/>
 <node_state id="2" uname="bob" {peer}/></status></cib>"""
STATES = {
    "reachable": 'in_ccm="true" crmd="online" join="member" expected="member"',
    "fenced": 'in_ccm="false" crmd="offline" join="down" expected="down"',
    "unclean": 'in_ccm="false" crmd="offline" join="down" expected="member"',
}


@dataclass(slots=True)
class Cluster:
    """An information base in a file, which the real tools work on, and a resource that is alone."""

    pair: Pair
    file: Path

    def lose_peer(self) -> None:
        self.pair.adm(self.pair.second, "down", "r0")
        self.pair.wait(self.pair.first, "alone", alone)

    def looks(self, peer: str, stonith: bool = True, quorum: bool = True) -> None:
        text = CIB.format(peer=STATES[peer], stonith=str(stonith).lower(), quorum=int(quorum))
        self.file.write_text(text)
        self.file.chmod(0o666)
        self.file.with_name(self.file.name + ".sig").unlink(missing_ok=True)

    def run(self, name: str, *words: str, node: str = "alice") -> subprocess.CompletedProcess[str]:
        here = {"CIB_file": str(self.file), "TANDEM_RUN_DIR": str(self.pair.run_dir), "TANDEM_NODE": node}
        return run(name, *words, **here, DRBD_NODE_ID_0=node, DRBD_PEERS="bob" if node == "alice" else "alice")

    def constraint(self) -> set[str] | None:
        text = self.file.read_text()
        return cib.Cib(ElementTree.fromstring(text)).constraint("drbd-fence-by-handler-r0-ms_r0")


@pytest.fixture
def cluster(pair: Pair, directory: Path, program: FindProgram) -> Cluster:
    for name in ("cibadmin", "crm_attribute"):
        program(name)
    directory.chmod(0o777)  # the tools write as Pacemaker's own user
    return Cluster(pair, directory / "cib.xml")


def test_fencing_by_constraint(cluster: Cluster) -> None:
    cluster.looks("reachable")
    back = cluster.run("tandem-crm-fence-peer", "--timeout=0")
    assert back.returncode == R.BROKEN and "UpToDate again" in back.stdout and cluster.constraint() is None
    cluster.lose_peer()
    outcomes: list[tuple[str, bool, bool, int]] = [
        ("reachable", True, True, R.PEER_OUTDATED), ("fenced", True, True, R.PEER_STONITHED),
        ("unclean", False, True, R.PEER_UNREACHABLE), ("unclean", True, True, R.BROKEN),
        ("fenced", True, False, R.BROKEN),
    ]  # fmt: skip
    for peer, stonith, quorum, result in outcomes:
        cluster.looks(peer, stonith, quorum)
        done = cluster.run("tandem-crm-fence-peer", "--timeout=0")
        assert done.returncode == result, (peer, done.stdout, done.stderr)
        assert cluster.constraint() == (None if result == R.BROKEN else {"alice"})
    cluster.looks("fenced")
    assert cluster.run("tandem-crm-fence-peer", "--fencing-attribute=site").returncode == R.PEER_STONITHED
    assert cluster.constraint() == {"east"}
    cluster.looks("fenced")
    assert cluster.run("tandem-crm-fence-peer").returncode == R.PEER_STONITHED
    again = cluster.run("tandem-crm-fence-peer")
    assert again.returncode == R.PEER_OUTDATED and "in place" in again.stdout
    other = cluster.run("tandem-crm-fence-peer", node="bob")
    assert other.returncode == R.BROKEN and "not ours" in other.stdout, "the peer was faster"
    assert cluster.constraint() == {"alice"}


def test_the_constraint_stays_until_both_are_up_to_date(cluster: Cluster) -> None:
    pair = cluster.pair
    cluster.lose_peer()
    cluster.looks("fenced")
    assert cluster.run("tandem-crm-fence-peer").returncode == R.PEER_STONITHED
    early = cluster.run("tandem-crm-unfence-peer")
    assert early.returncode == 0 and "stays" in early.stdout and cluster.constraint() == {"alice"}
    pair.adm(pair.second, "up", "r0")
    pair.adm(pair.first, "wait-sync", "--wfc-timeout=60", "r0")
    done = cluster.run("tandem-crm-unfence-peer")
    assert done.returncode == 0 and "removed" in done.stdout and cluster.constraint() is None
    assert cluster.run("tandem-crm-unfence-peer").returncode == 0
    pair.adm(pair.first, "down", "r0")  # without a daemon or a cluster nothing is placed
    done = cluster.run("tandem-crm-fence-peer")
    assert done.returncode == R.BROKEN and cluster.constraint() is None
    cluster.file.write_text("no xml")
    assert cluster.run("tandem-crm-fence-peer").returncode == R.BROKEN


# ----------------------------------------------------------------------------------------- notification


def test_a_program_is_told(directory: Path) -> None:
    told = directory / "told"
    page = script(directory / "page", f'{{ echo "$1|$2"; cat; }} > {told}; echo paged')
    here = {"TANDEM_RUN_DIR": str(directory), "TANDEM_NODE": "alice", "DRBD_VOLUME": "0"}
    done = run("tandem-notify", "local-io-error", "--program", str(page), **here)
    assert done.returncode == 0 and "page: paged" in done.stdout
    assert told.read_text().startswith("local-io-error|alice: r0/0 local disk failed\n")
    assert "(unknown: " in told.read_text(), "no daemon runs"


def test_what_cannot_be_delivered_is_said_and_stops_no_resync(directory: Path) -> None:
    broken = str(script(directory / "broken", "echo no; exit 3"))
    done = run("tandem-notify", "split-brain", "--program", broken, "--program", "/nonexistent", TANDEM_NODE="alice")
    assert done.returncode == 1 and "broken failed (3)" in done.stderr and "/nonexistent failed (127)" in done.stderr
    assert run("tandem-notify", "before-resync-target", "--program", broken).returncode == 0
    assert run("tandem-notify", "split-brain").returncode == 2, "nobody to tell"
    assert run("tandem-notify", "lunch", "--mail", "root").returncode == 2


def test_mail_goes_to_the_hosts_mail_system(
    directory: Path, program: FindProgram, monkeypatch: pytest.MonkeyPatch
) -> None:
    letter = directory / "letter"
    sendmail = script(directory / "sendmail", f'[ "$*" = "-t -i" ] && cat > {letter}')
    monkeypatch.setattr(notify, "SENDMAIL", str(sendmail))
    notify.mail(notify.Message("alice: r0 split brain", "Text\nwith an ä.\n"), "ops@example.org")
    text = letter.read_text()
    assert "To: ops@example.org" in text and "Subject: alice: r0 split brain" in text
    monkeypatch.setattr(notify, "SENDMAIL", "/nonexistent/sendmail")
    with pytest.raises(HandlerError, match="could not be sent"):
        notify.mail(notify.Message("x", "y"), "root")
