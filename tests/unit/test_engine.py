"""The machine's surface: who is answered exactly once, tickets, timers, volumes together, configuration."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from tandem.repl.config import NetOptions
from tandem.repl.engine import RETRY_S
from tandem.repl.errors import Refusal
from tandem.repl.events import Answer, Close, Connect, HandlerExited, LinkLost, Reconfigure, RunHandler
from tandem.repl.requests import Op
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import (
    DP_SEND_WRITE_ACK,
    Packet,
    pack_barrier,
    pack_barrier_ack,
    pack_data,
    pack_state,
    pack_state_reply,
    unpack_barrier_ack,
)

from tests.scenarios.lone import PEER_SECONDARY, Lone

P, C = Packet, ConnState


def test_an_outbox_is_handed_out_once() -> None:
    lone = Lone().ready()
    lone.submit(Op.WRITE)
    assert not lone.engine.take()


def test_every_request_comes_back_exactly_once_whatever_happens() -> None:
    """Random completions, a lost link in the middle, a failing disk: nobody is forgotten or told twice."""
    for seed in range(60):
        rng = random.Random(seed)
        lone = Lone().ready()
        requests = []
        for _ in range(40):
            match rng.randrange(8):
                case 0 | 1 | 2:
                    op = rng.choice((Op.WRITE, Op.WRITE, Op.READ, Op.FLUSH, Op.TRIM, Op.ZEROES))
                    requests.append(lone.submit(op, rng.randrange(6) * 4096, 4096))
                case 3 | 4 if lone.disk:
                    error = 5 if rng.randrange(30) == 0 else 0
                    lone.answer(rng.choice(lone.disk), error=error)
                case 5:
                    for r in lone.out()[: rng.randrange(4)]:
                        lone.meta(lone.ack(r))
                case 6 if rng.randrange(12) == 0 and lone.engine.link.alive:
                    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
                case _:
                    lone.at(lone.now + 0.03)
        if lone.engine.link.alive:
            lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
        lone.settle()
        assert sorted(map(id, lone.done)) == sorted(map(id, requests)), f"seed {seed}"
        assert lone.engine.mirror.n_app == lone.vol.n_app == lone.vol.n_pending == 0
        assert not lone.vol.intervals and not lone.engine.log.inflight


def test_every_command_is_answered_exactly_once() -> None:
    lone = Lone()
    tickets = [lone.command(name) for name in ("attach", "connect", "primary", "suspend-io", "nonsense", "down")]
    lone.settle()
    lone.at(lone.now + 5)
    answered = [e.ticket for e in lone.of(Answer)]
    assert sorted(set(answered)) == sorted(answered) and set(answered) <= set(tickets)


@pytest.mark.parametrize("ticket", [0, 999])
def test_a_handler_nobody_started_changes_nothing(ticket: int) -> None:
    lone = Lone().ready()
    before = lone.state
    lone.handle(HandlerExited(ticket, 4))
    assert lone.state == before and lone.sent() == []


def test_a_handler_speaks_once() -> None:
    lone = Lone(handlers=("before-resync-source",))
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.data(lone.bitmap_packets())
    (handler,) = lone.of(RunHandler)
    lone.handle(HandlerExited(handler.ticket, 0))
    lone.settle()
    assert lone.conn() == C.SYNC_SOURCE
    uuids = lone.vol.uuids
    lone.handle(HandlerExited(handler.ticket, 1))
    lone.settle()
    assert lone.conn() == C.SYNC_SOURCE and lone.vol.uuids == uuids


def test_a_handler_that_is_not_configured_is_not_run() -> None:
    lone = Lone()
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.connect(uuids=(0x10, 0, 0, 0))
    lone.data(lone.bitmap_packets())
    lone.settle()
    assert lone.of(RunHandler) == [] and lone.conn() == C.SYNC_SOURCE


# ------------------------------------------------------------------------------------------- connections


def test_a_lost_link_is_closed_and_dialled_again_at_once() -> None:
    lone = Lone().ready()
    ticket = lone.engine.link.ticket
    lone.handle(LinkLost(ticket, "gone"))
    lone.settle()
    assert [e.ticket for e in lone.of(Close)] == [ticket]
    (connect,) = lone.of(Connect)
    assert connect.ticket != ticket and lone.conn() == C.WF_CONNECTION


@pytest.mark.parametrize(("meta", "word"), [(False, "BrokenPipe"), (True, "NetworkFailure")])
def test_the_socket_that_ended_names_the_state(meta: bool, word: str) -> None:
    lone = Lone().ready()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone", meta=meta))
    assert any(f"Connected -> {word}" in note for note in lone.notes())


def test_a_handshake_that_breaks_is_retried_after_a_moment() -> None:
    lone = Lone()
    lone.attach()
    lone.run("connect")
    lone.link()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    assert len(lone.of(Connect)) == 1
    lone.at(lone.now + RETRY_S)
    assert len(lone.of(Connect)) == 2


def test_stand_alone_stays_so() -> None:
    lone = Lone().ready()
    lone.run("disconnect", force=True)
    lone.at(lone.now + 100)
    assert lone.of(Connect) == [] and lone.engine.deadline() is None


def test_bytes_that_come_after_the_end_are_swallowed() -> None:
    lone = Lone().ready()
    lone.run("disconnect", force=True)
    lone.packets.clear()
    stray = pack_data(P.DATA, 0, 0, 1, 1, DP_SEND_WRITE_ACK, 512) + bytes(512)
    assert lone.data(stray) == len(stray) and lone.meta(b"\0" * 40) == 40
    assert lone.sent() == [] and lone.disk == []


# ------------------------------------------------------------------------------------------- two volumes


def test_one_epoch_over_both_volumes() -> None:
    lone = Lone(n_volumes=2).as_secondary()
    for number in (0, 1):
        lone.data(pack_data(P.DATA, number, 0, 7 + number, 1, DP_SEND_WRITE_ACK, 512) + bytes(512))
    lone.data(pack_barrier(3))
    lone.settle()
    assert [unpack_barrier_ack(p) for p in lone.payloads(P.BARRIER_ACK)] == [(3, 2)]


def test_the_connection_is_up_when_its_last_volume_is() -> None:
    lone = Lone(n_volumes=2)
    lone.attach()
    lone.run("connect")
    lone.link()
    lone.data(lone.features(), lone.protocol(), lone.parameters())
    assert lone.engine.volumes[0].state.conn == C.CONNECTED
    assert str(lone.engine.cstate) == "WFReportParams" and lone.engine.n_established == 0
    lone.data(lone.parameters(volume=1))
    assert str(lone.engine.cstate) == "Connected" and lone.engine.n_established == 1


def test_a_change_while_the_other_volume_is_in_its_handshake_waits() -> None:
    lone = Lone(n_volumes=2)
    lone.attach()
    lone.run("connect")
    lone.link()
    lone.data(lone.features(), lone.protocol(), lone.parameters())
    ticket = lone.command("primary", 0)
    assert lone.answered(ticket) is None and lone.sent(P.STATE_CHG_REQ) == []
    lone.data(lone.parameters(volume=1))
    assert lone.sent(P.STATE_CHG_REQ) == [P.STATE_CHG_REQ]
    lone.meta(pack_state_reply(1, 0, False))
    lone.settle()
    assert lone.answered(ticket) == "done"


def test_a_volume_that_resyncs_does_not_stop_the_other() -> None:
    lone = Lone(n_volumes=2)
    lone.attach(generations=(0x20, 0x10, 0, 0))
    lone.run("connect")
    lone.link()
    lone.data(lone.features(), lone.protocol(), lone.parameters(uuids=(0x10, 0, 0, 0)))
    lone.data(lone.parameters(uuids=(0x20, 0x10, 0, 0), volume=1))
    lone.settle()
    first, second = (lone.engine.volumes[n].state.conn for n in (0, 1))
    assert (first, second) == (C.WF_BITMAP_S, C.CONNECTED)


def test_one_primary_volume_makes_the_node_primary() -> None:
    lone = Lone(n_volumes=2)
    lone.attach()
    assert lone.run("primary", 1) == "done"
    assert lone.engine.status().role == "Primary"
    assert lone.engine.volumes[0].state.role == Role.SECONDARY


# ---------------------------------------------------------------------------------------- configuration


def reconfigure(lone: Lone, net: NetOptions) -> Refusal | None:
    lone.effects.clear()
    lone.handle(Reconfigure(77, replace(lone.config, net=net)))
    (answer,) = lone.of(Answer)
    assert isinstance(answer, Answer) and answer.ticket == 77
    return answer.refusal


def test_new_options_are_in_force_at_once() -> None:
    lone = Lone().ready()
    assert reconfigure(lone, NetOptions(max_epoch_size=2)) is None
    for i in range(3):
        lone.submit(Op.WRITE, i * 8192)
    lone.settle()
    assert [e.n_sent for e in lone.engine.log.epochs] == [2, 1]


def test_two_primaries_stay_allowed_while_there_are_two() -> None:
    lone = Lone(net={"allow_two_primaries": True}).ready()
    lone.data(pack_state(replace(PEER_SECONDARY, role=Role.PRIMARY).word(), 0))
    assert lone.vol.state.peer == Role.PRIMARY
    refused = reconfigure(lone, NetOptions())
    assert refused is not None and refused.code == 164 and lone.engine.config.net.allow_two_primaries
    assert reconfigure(lone, NetOptions(allow_two_primaries=True, max_epoch_size=2)) is None
    lone.data(pack_state(PEER_SECONDARY.word(), 0))
    assert reconfigure(lone, NetOptions()) is None and not lone.engine.config.net.allow_two_primaries


def test_volumes_can_not_come_and_go() -> None:
    lone = Lone()
    config = Lone(n_volumes=2).config
    lone.handle(Reconfigure(77, config))
    (answer,) = lone.of(Answer)
    assert answer.refusal is not None and answer.refusal.code == 161


# ------------------------------------------------------------------------------------------------- time


def test_an_idle_machine_wants_nothing_but_its_next_ping() -> None:
    lone = Lone().ready()
    lone.at(lone.now + 0.1)
    due = lone.engine.deadline()
    assert due is not None and due > lone.now + 9
    alone = Lone()
    alone.attach()
    assert alone.engine.deadline() is None


@pytest.mark.parametrize("make", [
    lambda: Lone().ready(), lambda: Lone().as_secondary(), lambda: Lone().target((0, 5)),
    lambda: Lone().source((0, 5)),
])  # fmt: skip
def test_a_tick_at_its_deadline_moves_the_deadline(make: object) -> None:
    lone: Lone = make()  # type: ignore[operator]
    for _ in range(50):
        due = lone.engine.deadline()
        if due is None:
            break
        lone.now = max(lone.now, due)
        lone.engine.tick(lone.now)
        lone.take()
        later = lone.engine.deadline()
        assert later is None or later > due, "it would be woken for ever"
        lone.settle()


# ----------------------------------------------------------------------------------------- barrier and log


def test_after_everything_is_confirmed_nothing_is_held() -> None:
    lone = Lone().ready()
    for i in range(20):
        lone.submit(Op.WRITE, i * 4096)
    lone.settle()
    for r in lone.out():
        lone.meta(lone.ack(r))
    lone.at(lone.now + 1)
    lone.meta(pack_barrier_ack(0, 20))
    log, vol = lone.engine.log, lone.vol
    counters = (log.n_requests, lone.engine.mirror.n_app, vol.n_app, vol.n_pending, vol.n_local)
    assert counters == (0, 0, 0, 0, 0)
    assert not log.inflight and not log.epochs and not vol.intervals and set(vol.al.refs.values()) == {0}
    assert len(lone.done) == 20 and all(r.payload is None for r in lone.done)


def test_a_peer_state_that_repeats_changes_nothing() -> None:
    lone = Lone().ready()
    word = replace(PEER_SECONDARY, peer=Role.PRIMARY, conn=C.CONNECTED, pdsk=DiskState.UP_TO_DATE).word()
    lone.data(pack_state(word, 0), pack_state(word, 0))
    assert lone.sent() == [] and lone.notes() == []
