"""Handler programs: what they read, what they answer; and that help, man page and installation agree."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import click
import pytest
from tandem.tools.agents import crm_fence_peer, fence_peer, notify
from tandem.tools.agents.cib import Cib, PeerState, constraint_id, constraint_xml
from tandem.tools.agents.crm_fence_peer import Disks, judge
from tandem.tools.agents.devices import Device, Outdate, Pacemaker, PowerSwitch, Ssh, read_devices
from tandem.tools.agents.handler import Called, FenceResult, HandlerError, called
from tandem.tools.conf_options import HANDLER_NAMES

R = FenceResult
MAN = Path(__file__).resolve().parents[2] / "man"
ENV = {
    "DRBD_RESOURCE": "r0", "DRBD_PEERS": "bob bob2", "DRBD_MY_NODE_ID": "1", "DRBD_NODE_ID_1": "alice",
    "UP_TO_DATE_NODES": "0x00000002",
}  # fmt: skip
COMMANDS: dict[str, click.Command] = {
    "tandem-fence-peer": fence_peer.command, "tandem-crm-fence-peer": crm_fence_peer.fence_command,
    "tandem-crm-unfence-peer": crm_fence_peer.unfence_command, "tandem-notify": notify.command,
}  # fmt: skip


# --------------------------------------------------------------------------------------------- the call


def test_the_environment_says_who_is_to_be_fenced_and_for_whom() -> None:
    assert called(ENV) == Called("r0", ("bob", "bob2"), "alice", True)
    assert not called(ENV | {"UP_TO_DATE_NODES": "0x00000001"}).up_to_date, "the other node's bit"
    without = {name: value for name, value in ENV.items() if name != "UP_TO_DATE_NODES"}
    assert not called(without).up_to_date


@pytest.mark.parametrize("wrong", [
    {"DRBD_RESOURCE": ""}, {"DRBD_PEERS": ""}, {"UP_TO_DATE_NODES": "many"}, {"DRBD_MY_NODE_ID": "me"},
])  # fmt: skip
def test_an_environment_that_is_no_call(wrong: dict[str, str]) -> None:
    with pytest.raises(HandlerError):
        called(ENV | wrong)


class Fake:
    """A device with a fixed outcome."""

    title = "bob"

    def __init__(self, result: FenceResult | None, asked: list[str]) -> None:
        self.result = result
        self.asked = asked

    def fence(self, call: Called) -> FenceResult | None:
        self.asked.append(call.peer)
        return self.result

    def probe(self, call: Called) -> bool:
        return True


@pytest.mark.parametrize(("outcomes", "n_asked", "result"), [
    ([R.PEER_STONITHED, R.PEER_OUTDATED], 1, R.PEER_STONITHED),
    ([None, R.PEER_STONITHED], 2, R.PEER_STONITHED),
    ([R.PEER_PRIMARY, R.PEER_STONITHED], 1, R.PEER_PRIMARY),
    ([None, None], 2, R.BROKEN),
])  # fmt: skip
def test_devices_are_tried_in_turn(outcomes: list[FenceResult | None], n_asked: int, result: FenceResult) -> None:
    asked: list[str] = []
    devices: list[Device] = [Fake(outcome, asked) for outcome in outcomes]
    assert fence_peer.fence(called(ENV), devices) == result and asked == ["bob"] * n_asked


def test_a_node_without_good_data_shoots_nobody() -> None:
    asked: list[str] = []
    call = Called("r0", ("bob",), "alice", False)
    assert fence_peer.fence(call, [Fake(R.PEER_STONITHED, asked)]) == R.BROKEN and asked == []


# --------------------------------------------------------------------------------------------- the file


def devices_of(tmp_path: Path, text: str, *peers: str) -> list[Device]:
    path = tmp_path / "fence.conf"
    path.write_text(text)
    return read_devices(path, peers or ("bob",))


def test_every_kind_of_device(tmp_path: Path) -> None:
    text = """
        # how bob is fenced
        [alice]
        agent = fence_x
        [bob]
        agent = outdate
        [bob second]
        agent = /usr/sbin/fence_ipmilan
        Password = 50% #1 = x
        attempts = 3
        [bob third]
        agent = ssh
        host = hypervisor
        command = virsh destroy bob
        check = true
        [bob fourth]
        agent = stonith_admin
    """
    found = devices_of(tmp_path, re.sub("^ +", "", text, flags=re.MULTILINE), "alias", "bob")
    assert [type(device) for device in found] == [Outdate, PowerSwitch, Ssh, Pacemaker]
    assert [device.title for device in found] == ["bob", "bob second", "bob third", "bob fourth"]


@pytest.mark.parametrize(("text", "word"), [
    ("[alice]\nagent = fence_x\n", "no section [bob]"),
    ("[bob]\nip = 1\n", "has no agent"),
    ("agent = fence_x\n", "no section headers"),
    ("[bob]\nagent = a\n[bob]\nagent = b\n", "already exists"),
    ("[bob]\nagent = fence_x\nattempts = often\n", "attempts = often"),
    ("[bob]\nagent = fence_x\nlimit = 0\n", "limit = 0"),
    ("[bob]\nagent = ssh\nhost = h\ncommand = c\n", "needs the option check"),
    ("[bob]\nagent = stonith_admin\nip = 1\n", "has no option ip"),
    ("[bob]\nagent = fence_x\naction = reboot\n", "leave out action"),
    ("[bob]\nagent = fence_x\n  ip = 1\n", "write the line 'ip = 1' below agent without spaces"),
])  # fmt: skip
def test_a_file_that_is_no_use_gets_one_sentence(tmp_path: Path, text: str, word: str) -> None:
    with pytest.raises(HandlerError, match=re.escape(word)) as caught:
        devices_of(tmp_path, text)
    assert "\n" not in str(caught.value) and "fence.conf" in str(caught.value)


# ------------------------------------------------------------------------------------------ constraints


def cib(states: str = "", properties: str = "", constraints: str = "") -> Cib:
    return Cib(ElementTree.fromstring(
        f'<cib have-quorum="1"><configuration><crm_config><cluster_property_set>{properties}</cluster_property_set>'
        '</crm_config><resources><group><clone id="other"><primitive/></clone></group><clone id="ms"><primitive>'
        '<instance_attributes><nvpair name="drbd_resource" value="r0"/></instance_attributes></primitive></clone>'
        f"</resources><constraints>{constraints}</constraints></configuration><status>{states}</status></cib>"
    ))  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), [
    ('in_ccm="true" crmd="online" join="member" expected="member"', PeerState.REACHABLE),
    ('in_ccm="1700000000" crmd="1700000001" join="member" expected="member"', PeerState.REACHABLE),
    ('in_ccm="true" crmd="offline" join="down" expected="member"', PeerState.UNCLEAN),
    ('in_ccm="false" crmd="offline" join="down" expected="down"', PeerState.FENCED),
    ('in_ccm="0" crmd="0" join="down" expected="down"', PeerState.FENCED),
    ('in_ccm="false" crmd="offline" join="down" expected="member"', PeerState.UNCLEAN),
    ("", PeerState.UNCLEAN),
])  # fmt: skip
def test_what_the_cluster_knows_of_a_node(state: str, expected: PeerState) -> None:
    assert cib(f'<node_state uname="Bob" {state}/>').peer_state("bob") == expected
    assert cib().peer_state("bob") == PeerState.UNCLEAN


def test_the_clone_and_the_constraint_are_found() -> None:
    base = cib(constraints=constraint_xml("r0", "ms", "#uname", "alice"))
    assert base.clone_of("r0") == "ms" and constraint_id("r0", "ms") == "drbd-fence-by-handler-r0-ms"
    assert base.constraint("drbd-fence-by-handler-r0-ms") == {"alice"} and base.constraint("x") is None
    with pytest.raises(HandlerError):
        base.clone_of("r1")


@pytest.mark.parametrize(("properties", "expected"), [
    ("", True), ('<nvpair name="stonith-enabled" value="true"/>', True),
    ('<nvpair name="stonith-enabled" value="False"/>', False),
])  # fmt: skip
def test_stonith_is_enabled_unless_the_cluster_says_otherwise(properties: str, expected: bool) -> None:
    assert cib(properties=properties).stonith_enabled == expected


GOOD, FAIR, BAD, BACK = Disks(True, True, False), Disks(False, True, False), Disks(False, False, False), Disks(
    True, True, True)  # fmt: skip


@pytest.mark.parametrize(("peer", "own", "stonith", "result", "place"), [
    (PeerState.REACHABLE, GOOD, True, R.PEER_OUTDATED, True),
    (PeerState.REACHABLE, FAIR, True, R.PEER_OUTDATED, True),
    (PeerState.REACHABLE, BAD, True, R.PEER_UNREACHABLE, False),
    (PeerState.FENCED, GOOD, True, R.PEER_STONITHED, True),
    (PeerState.FENCED, FAIR, True, R.PEER_UNREACHABLE, False),
    (PeerState.UNCLEAN, GOOD, True, R.BROKEN, False),
    (PeerState.UNCLEAN, GOOD, False, R.PEER_UNREACHABLE, True),
    (PeerState.UNCLEAN, FAIR, False, R.PEER_UNREACHABLE, False),
    (PeerState.REACHABLE, BACK, True, R.BROKEN, False),
])  # fmt: skip
def test_the_verdict(peer: PeerState, own: Disks, stonith: bool, result: FenceResult, place: bool) -> None:
    verdict = judge(peer, own, stonith)
    assert (verdict.result, verdict.place) == (result, place)


# ----------------------------------------------------------------------------------------- notification


@pytest.mark.parametrize("event", sorted(notify.EVENTS))
def test_every_message_is_complete(event: str) -> None:
    env = {"DRBD_RESOURCE": "r0", "DRBD_PEER": "bob", "TANDEM_NODE": "alice", "DRBD_VOLUME": "1"}
    message = notify.compose(event, env, "r0 role:Primary")
    assert message.subject.startswith("alice: r0/1 ") and "\n" not in message.subject
    assert f"r0/1 on alice: {event}" in message.text and "r0 role:Primary" in message.text
    assert not re.search("[{}]", message.subject + message.text)


def test_there_is_a_message_for_every_handler() -> None:
    assert set(notify.EVENTS) == set(HANDLER_NAMES)


# ---------------------------------------------------------------------------- programs and their pages


def test_the_programs_are_installed() -> None:
    scripts = tomllib.loads((MAN.parent / "pyproject.toml").read_text())["project"]["scripts"]
    agents = {name: target for name, target in scripts.items() if ".agents." in target}
    assert set(agents) == set(COMMANDS)
    assert set(scripts) - {"tandemd", "tandemadm"} == {path.stem for path in MAN.glob("*.8")}
    installed = {entry.name: entry for entry in entry_points(group="console_scripts")}
    for name, target in agents.items():
        assert installed[name].value == target
        main: Callable[[], None] = installed[name].load()
        assert callable(main)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_and_man_page_name_the_same_options(name: str) -> None:
    command = COMMANDS[name]
    text = (MAN / f"{name}.8").read_text().replace("\\-", "-")
    documented = set(re.findall(r"(?<![-\w])(--?[a-z][-a-z]*)", text.partition(".SH OPTIONS")[2].partition(".SH")[0]))
    own = {option for param in command.params if isinstance(param, click.Option) for option in param.opts}
    wanted = own | {"-h", "--help"}
    assert wanted <= documented
    if not (MAN / f"{name}.8").is_symlink():
        assert documented == wanted
    assert command.get_help(click.Context(command, info_name=name)).startswith(f"Usage: {name}")


@pytest.mark.parametrize("checker", ["man", "mandoc"])
@pytest.mark.parametrize("path", sorted(MAN.glob("*.8")), ids=lambda path: path.stem)
def test_man_pages_are_well_formed(path: Path, checker: str, program: Callable[[str], str]) -> None:
    words = ["--warnings", "-E", "UTF-8", "-l"] if checker == "man" else ["-T", "lint", "-W", "warning"]
    done = subprocess.run([program(checker), *words, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr
    assert shutil.which(checker) and (checker == "man" or not done.stdout)
