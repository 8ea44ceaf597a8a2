"""Which handlers the machine has run, when and for which volume: those of a split brain, of a resync, of a verify.

`fence-peer` is in test_fencing, `unfence-peer` and `pri-on-incon-degr` in test_aftermath, `local-io-error` in
test_disks, and what the answers of `before-resync-source` and `before-resync-target` do in test_resync.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tandem.repl.config import AfterSb
from tandem.repl.events import HandlerExited, LinkLost, Opened, RunHandler
from tandem.repl.packets import ID_SYNCER
from tandem.repl.states import ConnState, Role, State
from tandem.repl.units import SECTOR
from tandem.repl.wire import Packet, pack_ack, pack_state
from tandem.tools.conf_options import HANDLER_NAMES

from tests.scenarios.lone import PEER_SECONDARY, Lone
from tests.scenarios.pair import GENERATIONS

RIVAL = replace(PEER_SECONDARY, role=Role.PRIMARY)
EVENTS = tuple(name for name in HANDLER_NAMES if name != "fence-peer")


def called(lone: Lone) -> list[tuple[str, int | None]]:
    return [(handler.name, handler.volume) for handler in lone.of(RunHandler)]


def alone(**net: Any) -> Lone:
    """A Primary that lost its peer and has written since; every handler there is would be run."""
    lone = Lone(net=net, handlers=EVENTS).ready()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    lone.forget_keep_connect()
    return lone


def meets(lone: Lone, state: State = RIVAL) -> list[str]:
    """The names of the handlers when the peer has a history of its own, a longer one; each ends before the next."""
    lone.connect(state, uuids=(0xB000, GENERATIONS[0], 0, 0), bits=1000)
    names: list[str] = []
    while len(called(lone)) > len(names):
        handler = lone.of(RunHandler)[len(names)]
        assert len(called(lone)) == len(names) + 1 and isinstance(handler, RunHandler) and handler.volume == 0
        names.append(handler.name)
        lone.handle(HandlerExited(handler.ticket, 1))
    return names


def test_a_split_brain_nobody_solves() -> None:
    lone = alone()
    assert meets(lone) == ["initial-split-brain", "split-brain"] and lone.conn() == ConnState.STAND_ALONE


def test_a_split_brain_a_policy_solves() -> None:
    lone = alone(after_sb_1pri=AfterSb.DISCARD_SECONDARY)
    assert meets(lone, PEER_SECONDARY) == ["initial-split-brain"] and lone.conn() == ConnState.WF_BITMAP_S


@pytest.mark.parametrize("n_clients", [0, 1])
def test_a_primary_that_lost_a_split_brain_is_not_demoted_while_the_nodes_meet(n_clients: int) -> None:
    """As in DRBD, with clients and without: the handler has to make it a Secondary."""
    lone = alone(after_sb_0pri=AfterSb.DISCARD_LEAST_CHANGES, after_sb_2pri=AfterSb.CALL_PRI_LOST_AFTER_SB)
    lone.handle(Opened(0, n_clients))
    assert meets(lone) == ["initial-split-brain", "pri-lost-after-sb", "split-brain"]
    assert lone.vol.state.role == Role.PRIMARY and lone.conn() == ConnState.STAND_ALONE


@pytest.mark.parametrize(("policy", "names"), [("call-pri-lost", ["pri-lost"]), ("disconnect", [])])
def test_a_primary_that_should_take_the_peers_data(policy: str, names: list[str]) -> None:
    violently, least = AfterSb.VIOLENTLY_AS0P, AfterSb.DISCARD_LEAST_CHANGES
    lone = alone(rr_conflict=policy, after_sb_0pri=least, after_sb_1pri=violently)
    assert meets(lone, PEER_SECONDARY) == ["initial-split-brain", *names] and lone.conn() == ConnState.STAND_ALONE


def test_the_source_of_a_resync() -> None:
    lone = Lone(handlers=EVENTS)
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.vol.bitmap.set(0, 1)
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.data(lone.bitmap_packets((0, 1)))
    assert called(lone) == [("before-resync-source", 0)]
    lone.handle(HandlerExited(lone.handler("before-resync-source").ticket, 0))
    lone.settle()
    assert lone.conn() == ConnState.SYNC_SOURCE
    lone.meta(pack_ack(Packet.RS_WRITE_ACK, 0, 0, ID_SYNCER, 8 * SECTOR, 1))
    lone.effects.clear()
    lone.data(pack_state(replace(PEER_SECONDARY, conn=ConnState.CONNECTED).word(), 0))
    lone.settle()
    assert lone.conn() == ConnState.CONNECTED and called(lone) == [("after-resync-source", 0)]


def test_the_page_tells_of_every_handler() -> None:
    page = (Path(__file__).parents[2] / "docs/handlers.md").read_text()
    table = page.partition("\n## ")[0].splitlines()
    told = [line.split("`")[1] for line in table if line.startswith("| `")]
    assert sorted(told) == sorted(HANDLER_NAMES)
