"""Is the peer still there: pings and their time-outs, ko-count, in virtual time."""

from __future__ import annotations

import pytest
from tandem.repl.requests import Op
from tandem.repl.states import ConnState
from tandem.repl.wire import Packet, pack_barrier_ack, packet

from tests.scenarios.lone import Lone

P = Packet
PING, PONG = packet(P.PING), packet(P.PING_ACK)


def pings(lone: Lone) -> int:
    return len(lone.sent(P.PING))


def test_a_quiet_peer_is_pinged_after_ping_int() -> None:
    lone = Lone(net={"ping_int": 10}).ready()
    begun = lone.now
    lone.at(begun + 9.9)
    assert pings(lone) == 0
    lone.at(begun + 10.0)
    assert pings(lone) == 1
    lone.meta(PONG)
    lone.at(begun + 19.9)
    assert pings(lone) == 1
    lone.at(begun + 20.1)
    assert pings(lone) == 2


def test_anything_heard_on_either_socket_counts() -> None:
    lone = Lone(net={"ping_int": 10}).ready()
    begun = lone.now
    lone.at(begun + 8)
    lone.data(packet(P.UNPLUG_REMOTE))
    lone.at(begun + 16)
    lone.meta(PING)
    lone.at(begun + 25)
    assert pings(lone) == 0
    lone.at(begun + 26)
    assert pings(lone) == 1


def test_a_ping_without_an_answer_ends_the_connection() -> None:
    lone = Lone(net={"ping_int": 10, "ping_timeout": 5}).ready()
    begun = lone.now
    lone.at(begun + 10.4)
    assert lone.conn() == ConnState.CONNECTED
    lone.at(begun + 10.5)
    assert lone.conn() == ConnState.WF_CONNECTION
    assert any("NetworkFailure" in note for note in lone.notes())
    assert any("PingAck did not arrive in time" in note for note in lone.notes())


def test_a_peer_that_talks_while_it_owes_a_ping_ack_lives() -> None:
    """Its acks may be in a long queue."""
    lone = Lone(net={"ping_int": 10, "ping_timeout": 5}).ready()
    begun = lone.now
    lone.at(begun + 10.1)
    assert pings(lone) == 1
    for i in range(8):
        lone.at(begun + 10.1 + i * 0.4)
        lone.data(packet(P.UNPLUG_REMOTE))
        lone.engine.tick(lone.now)  # woken for something else
    assert lone.conn() == ConnState.CONNECTED and pings(lone) == 1
    lone.at(begun + 10.1 + 2.8 + 0.5)
    assert lone.conn() == ConnState.WF_CONNECTION


def test_a_ping_is_answered_at_once_in_every_state() -> None:
    for lone in (Lone().ready(), Lone().as_secondary(), Lone().target((0, 1)), Lone().source((0, 1))):
        n = len(lone.sent(P.PING_ACK))
        lone.meta(PING)
        if lone.disk:  # a source first makes durable that its target may end
            lone.settle()
        assert len(lone.sent(P.PING_ACK)) == n + 1


def test_answers_are_given_to_whom_they_belong_in_order() -> None:
    lone = Lone().ready()
    told: list[str] = []
    lone.engine.liveness.ping(lambda: told.append("first"))
    lone.engine.liveness.ping()
    lone.engine.liveness.ping(lambda: told.append("third"))
    lone.take()
    lone.meta(PONG)
    assert told == ["first"]
    lone.meta(PONG)
    assert told == ["first"]
    lone.meta(PONG + PONG)
    assert told == ["first", "third"], "one answer too many is harmless"


def test_an_answer_to_a_ping_of_the_last_connection_tells_nobody() -> None:
    lone = Lone().ready()
    told: list[str] = []
    lone.engine.liveness.ping(lambda: told.append("old"))
    lone.take()
    lone.engine.drop(ConnState.NETWORK_FAILURE, "a test")
    lone.take()
    lone.settle()
    lone.connect()
    lone.meta(PONG)
    assert told == [] and lone.conn() >= ConnState.CONNECTED


# ---------------------------------------------------------------------------------------------- ko-count


def unanswered(**net: int) -> tuple[Lone, float]:
    """A write is out to a peer that otherwise talks."""
    lone = Lone(net=net).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    return lone, lone.now


def talk_until(lone: Lone, until: float) -> None:
    while lone.now < until:
        lone.at(min(lone.now + 1.0, until))
        if lone.engine.connected:
            lone.meta(PING)


def test_a_peer_that_talks_but_does_not_answer_is_dropped_after_ko_count_times_timeout() -> None:
    lone, begun = unanswered(ko_count=3, timeout=20)
    talk_until(lone, begun + 5.9)
    assert lone.conn() == ConnState.CONNECTED
    talk_until(lone, begun + 6.0)
    assert lone.conn() == ConnState.WF_CONNECTION
    assert any("Timeout" in note for note in lone.notes())
    lone.settle()
    assert len(lone.done) == 1 and lone.done[0].error == 0 and lone.vol.bitmap.weight == 1


def test_without_ko_count_it_may_take_for_ever() -> None:
    lone, begun = unanswered(ko_count=0)
    talk_until(lone, begun + 300)
    assert lone.conn() == ConnState.CONNECTED


def test_a_missing_barrier_ack_counts_too() -> None:
    lone, begun = unanswered(ko_count=3, timeout=20)
    lone.meta(lone.ack(lone.out()[0]))
    talk_until(lone, begun + 6.5)
    assert lone.conn() == ConnState.WF_CONNECTION


def test_an_answered_write_does_not_count() -> None:
    lone, begun = unanswered(ko_count=3, timeout=20)
    lone.meta(lone.ack(lone.out()[0]))
    lone.at(lone.now + 0.1)
    lone.meta(pack_barrier_ack(0, 1))
    talk_until(lone, begun + 60)
    assert lone.conn() == ConnState.CONNECTED


@pytest.mark.parametrize("ticks", [1, 50])
def test_the_deadline_is_the_moment_not_an_interval(ticks: int) -> None:
    """However often somebody asks, the machine is woken in time and not again and again."""
    lone, _ = unanswered(ko_count=3, timeout=20)
    due = lone.engine.deadline()
    for _ in range(ticks):
        assert lone.engine.deadline() == due
    assert due is not None
    lone.at(due)
    later = lone.engine.deadline()
    assert later is None or later > due
