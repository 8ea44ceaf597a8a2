"""Power cuts and partitions with fencing: exactly one side writes, and what was acknowledged survives."""

from __future__ import annotations

import contextlib
import threading

import pytest
from tandem.nbd.codec import CmdFlag
from tandem.tools.demo_nbd import Nbd, write

from .fenced import NBD_PORT, Fenced
from .nodes import RES, wait, wait_state


def test_the_primarys_power_is_cut(fenced: Fenced) -> None:
    """The Primary's power is cut: the other fences it and goes on."""
    anna, bert = fenced.hosts
    assert not fenced.write(anna, 600, lambda: fenced.power_cut(anna))
    wait(bert, lambda s: s.cs == "WFConnection", "alone")
    bert.adm("primary", RES)
    assert bert.state().pdsk == "Outdated" and fenced.switch.done == [], "it was off already"
    fenced.check(bert)
    assert fenced.write(bert, 100)
    fenced.comes_back(anna)
    fenced.check(bert)
    fenced.equal()


def test_the_secondarys_power_is_cut(fenced: Fenced) -> None:
    """The Primary stops for a moment, makes certain, and goes on."""
    anna, bert = fenced.hosts
    assert fenced.write(anna, 600, lambda: fenced.power_cut(bert))
    assert anna.state().pdsk == "Outdated"
    fenced.comes_back(bert)
    fenced.check(anna)
    fenced.equal()


def test_the_power_of_both_is_cut(fenced: Fenced) -> None:
    """What was acknowledged is in memory of one or the other; without either only what was stable counts: FUA."""
    anna, bert = fenced.hosts

    def blackout() -> None:
        for host in (bert, anna):
            fenced.power_cut(host)

    assert not fenced.write(anna, 600, blackout, flags=CmdFlag.FUA)
    fenced.comes_back(anna, bert)
    for host in fenced.hosts:
        wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate")
    bert.adm("primary", RES)
    fenced.check(bert)
    fenced.equal()


@pytest.mark.parametrize("first", ["anna", "bert"])
def test_the_power_of_both_is_cut_and_one_returns(fenced: Fenced, first: str) -> None:
    """It cannot know whether the other went on without it: it shoots nobody, and waits for the other one."""
    anna, bert = fenced.hosts

    def blackout() -> None:
        for host in (anna, bert):
            fenced.power_cut(host)

    assert not fenced.write(anna, 600, blackout, flags=CmdFlag.FUA)
    back = anna if first == "anna" else bert
    back.boot()
    back.adm("up", RES)
    wait_state(back, cs="WFConnection", disk="Consistent")
    assert back.adm("primary", RES, check=False).rc == 17
    assert fenced.switch.done == [] and back.state().role == "Secondary"
    fenced.comes_back(fenced.peer_of(back))
    for host in fenced.hosts:
        wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate")
    back.adm("primary", RES)
    fenced.check(back)
    fenced.equal()


DEAF = pytest.mark.parametrize("deaf", ["both", "anna", "bert"])


def part(fenced: Fenced, deaf: str) -> None:
    """Pull bert's cable, or let one host hear nothing of what the other one sends."""
    anna, bert = fenced.hosts
    if deaf == "both":
        bert.guest.cut()
    else:
        mute = bert if deaf == "anna" else anna
        mute.guest.sh("modprobe sch_netem && tc qdisc replace dev lan root netem loss 100%")


def heal(fenced: Fenced) -> None:
    fenced.bert.guest.cut(False)
    for host in fenced.hosts:
        if host.guest.running:
            host.guest.sh("tc qdisc del dev lan root; true")


@DEAF
def test_a_partition(fenced: Fenced, deaf: str) -> None:
    """The cable is pulled, or one host hears nothing of what the other one sends; the Primary shoots."""
    anna, bert = fenced.hosts
    assert fenced.write(anna, 600, lambda: part(fenced, deaf))
    assert fenced.switch.done == [("anna", "bert")] and not bert.guest.running
    state = anna.state()
    assert (state.role, state.pdsk) == ("Primary", "Outdated")
    heal(fenced)
    fenced.comes_back(bert)
    fenced.check(anna)
    fenced.equal()


@DEAF
def test_a_partition_in_which_both_want_to_go_on(fenced: Fenced, deaf: str) -> None:
    """The cluster promotes the Secondary at the same time: both shoot, one of them first."""
    anna, bert = fenced.hosts
    takers: list[threading.Thread] = []

    def promote() -> None:
        with contextlib.suppress(OSError):  # it may be shot meanwhile
            bert.adm("primary", RES, check=False)

    def cut() -> None:
        part(fenced, deaf)
        takers.append(threading.Thread(target=promote))
        takers[0].start()

    lived = fenced.write(anna, 600, cut)
    takers[0].join()
    winner = anna if lived else bert
    loser = fenced.peer_of(winner)
    assert fenced.switch.done == [(winner.name, loser.name)] and not loser.guest.running
    wait(winner, lambda s: s.role == "Primary" and s.pdsk == "Outdated", "the only Primary")
    fenced.check(winner)
    assert fenced.write(winner, 100)
    heal(fenced)
    fenced.comes_back(loser)
    fenced.check(winner)
    fenced.equal()


def test_a_split_brain_is_met(fenced: Fenced) -> None:
    """Fence agents that lied let both write alone. When they meet, who changed less is shot, and the other goes on."""
    anna, bert = fenced.hosts
    fenced.lie.touch()
    assert fenced.write(anna, 600, bert.guest.cut)
    bert.adm("primary", RES)
    with Nbd((bert.guest.control, NBD_PORT), RES) as nbd:
        assert nbd.one(write(0, bytes(4096))).error == 0
    assert anna.state().role == bert.state().role == "Primary" and fenced.switch.done == []
    fenced.lie.unlink()
    bert.guest.cut(False)
    wait_state(anna, cs="StandAlone", role="Primary", pdsk="Outdated")
    assert fenced.switch.done == [("anna", "bert")] and not bert.guest.running
    fenced.check(anna)
    assert fenced.write(anna, 100)
    bert.boot()
    bert.adm("up", RES)
    bert.adm("disconnect", RES)
    bert.adm("connect", "--discard-my-data", RES)
    anna.adm("connect", RES)
    fenced.same()
    fenced.check(anna)


# --------------------------------------------------------------------------------------- resource-only


def test_resource_only_outdates_the_peer_and_nobody_waits(fenced: Fenced) -> None:
    """The cable is pulled, and the cluster wants the Secondary as Primary, too: it gives way to the Primary."""
    anna, bert = fenced.hosts
    fenced.configure(fenced.resource_only)
    assert fenced.write(anna, 600, lambda: part(fenced, "both"))
    wait_state(bert, cs="WFConnection")
    refused = bert.adm("primary", RES, check=False)
    assert refused.rc != 0 and bert.state().role == "Secondary"
    wait_state(anna, role="Primary", disk="UpToDate", pdsk="Outdated")
    wait_state(bert, disk="Outdated")
    assert fenced.write(anna, 100)
    heal(fenced)
    fenced.connected()
    fenced.check(anna)
    fenced.equal()
    assert fenced.switch.done == [], "nobody was shot"


def test_resource_only_a_peer_that_cannot_be_reached(fenced: Fenced) -> None:
    """The Secondary's power is cut: it counts as Outdated, as it is not UpToDate when it comes back."""
    anna, bert = fenced.hosts
    fenced.configure(fenced.resource_only)
    assert fenced.write(anna, 600, lambda: fenced.power_cut(bert))
    wait_state(anna, role="Primary", pdsk="Outdated")
    assert fenced.write(anna, 100)
    fenced.comes_back(bert)
    fenced.check(anna)
    fenced.equal()
