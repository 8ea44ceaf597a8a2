"""A Primary that lost its peer: freeze, fence, go on; what a handler says too late changes nothing."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import HandlerExited, LinkLost
from tandem.repl.metadata import MdFlag
from tandem.repl.requests import Op, Request
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import Packet, pack_state_reply

from tests.scenarios.lone import PEER_SECONDARY, Lone
from tests.scenarios.pair import GENERATIONS

P, D = Packet, DiskState
STONITH: dict[str, object] = {"fencing": Fencing.RESOURCE_AND_STONITH}
RESOURCE_ONLY: dict[str, object] = {"fencing": Fencing.RESOURCE_ONLY}


def lost(
    policy: dict[str, object], handlers: tuple[str, ...] = ("fence-peer",), protocol: str = "C"
) -> tuple[Lone, Request]:
    """A Primary with a write out, right after the connection broke."""
    lone = Lone(disk=policy, handlers=handlers, net={"protocol": protocol}).ready()
    lone.submit(Op.WRITE)
    lone.settle()
    lone.forget()
    r = lone.submit(Op.WRITE, 8192)
    lone.answer(r)
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    return lone, r


def exits(lone: Lone, code: int) -> None:
    lone.handle(HandlerExited(lone.handler("fence-peer").ticket, code))
    lone.settle()


def generations(lone: Lone) -> list[str]:
    return [note for note in lone.notes() if note.startswith("new current UUID")]


# --------------------------------------------------------------------------------- losing the connection


def test_stonith_freezes_until_the_handler_speaks() -> None:
    lone, r = lost(STONITH)
    assert lone.state.susp_fen and r not in lone.done and not generations(lone)
    assert lone.handler("fence-peer").volume is None


def test_resource_only_goes_on_at_once() -> None:
    lone, r = lost(RESOURCE_ONLY)
    assert not lone.state.suspended and r in lone.done and r.error == 0 and len(generations(lone)) == 1
    assert lone.handler("fence-peer")


def test_dont_care_calls_nobody() -> None:
    lone, r = lost({})
    assert r in lone.done and "fence-peer" not in [h.name for h in lone.effects if hasattr(h, "name")]


def test_a_secondary_fences_nobody() -> None:
    lone = Lone(disk=STONITH, handlers=("fence-peer",)).as_secondary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    assert not lone.state.suspended and not [e for e in lone.effects if getattr(e, "name", "") == "fence-peer"]


@pytest.mark.parametrize(("code", "pdsk"), [
    (3, D.INCONSISTENT), (4, D.OUTDATED), (5, D.OUTDATED), (7, D.OUTDATED),
])  # fmt: skip
def test_exit_codes_that_put_the_peer_out(code: int, pdsk: DiskState) -> None:
    lone, r = lost(STONITH)
    exits(lone, code)
    assert lone.state.pdsk == pdsk and not lone.state.suspended
    assert r in lone.done and r.error == 0 and len(generations(lone)) == 1
    assert lone.vol.bitmap.weight == 2, "both writes: neither was confirmed as stable"


@pytest.mark.parametrize("code", [0, 1, 2, 8, 127])
def test_a_handler_that_fails_leaves_everything_frozen(code: int) -> None:
    lone, r = lost(STONITH)
    exits(lone, code)
    assert lone.state.susp_fen and lone.state.pdsk == D.D_UNKNOWN and r not in lone.done
    assert any(f"returned {code}" in note for note in lone.notes())


def test_without_a_configured_handler_it_stays_frozen() -> None:
    lone, r = lost(STONITH, handlers=())
    assert lone.state.susp_fen and r not in lone.done


def test_code_6_outdates_this_node() -> None:
    lone, _ = lost(RESOURCE_ONLY)
    exits(lone, 6)
    assert lone.local_disk() == D.OUTDATED


def test_code_6_leaves_a_frozen_node_frozen() -> None:
    lone, r = lost(STONITH)
    exits(lone, 6)
    assert lone.local_disk() == D.OUTDATED and lone.state.susp_fen and r not in lone.done


def test_code_5_counts_only_for_a_good_disk() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",))
    lone.attach()
    assert lone.local_disk() == D.CONSISTENT
    ticket = lone.command("primary")
    exits(lone, 5)
    refused = lone.answered(ticket)
    assert refused is not None and refused != "done" and lone.state.role == Role.SECONDARY


# ---------------------------------------------------------------------------------------- meeting again


def test_a_handler_that_returns_after_the_peer_is_back_changes_nothing() -> None:
    lone, r = lost(STONITH)
    lone.connect()
    assert not lone.state.suspended and not generations(lone), "the peer never went"
    lone.meta(lone.ack(r))
    before, uuids = lone.state, lone.vol.uuids
    exits(lone, 4)
    assert lone.state == before and lone.vol.uuids == uuids
    assert any("ignored" in note for note in lone.notes())


def test_a_handler_of_an_earlier_loss_does_not_speak_for_this_one() -> None:
    """The peer came and went again meanwhile: it may have become Primary."""
    lone, _ = lost(STONITH)
    old = lone.handler("fence-peer")
    lone.connect()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone again"))
    lone.settle()
    assert lone.state.susp_fen
    lone.handle(HandlerExited(old.ticket, 4))
    lone.settle()
    assert lone.state.susp_fen and lone.state.pdsk == D.D_UNKNOWN


def test_a_handler_that_returns_during_the_handshake_changes_nothing() -> None:
    lone, _ = lost(STONITH)
    lone.link()
    lone.data(lone.features())
    exits(lone, 4)
    assert lone.state.pdsk == D.D_UNKNOWN and lone.state.susp_fen


def test_a_rebooted_peer_gets_no_replay() -> None:
    """It is only Consistent: it forgot what it had in memory."""
    lone, r = lost(STONITH)
    lone.packets.clear()
    lone.connect(replace(PEER_SECONDARY, disk=D.CONSISTENT))
    assert lone.sent(P.DATA) == [] and lone.conn() < ConnState.CONNECTED
    assert len(generations(lone)) == 1 and lone.vol.bitmap.weight == 2
    assert r not in lone.done, "frozen until the next connection stands"


def test_a_rebooted_peer_is_not_fenced_because_we_hang_up_on_it() -> None:
    """It is about to connect again. Only if it does not, somebody has to find out."""
    for comes in (True, False):
        lone, _ = lost(STONITH)
        exits(lone, 1)
        lone.forget_keep_connect()
        lone.connect(replace(PEER_SECONDARY, disk=D.CONSISTENT))
        assert lone.conn() < ConnState.CONNECTED and not fenced(lone)
        lone.at(lone.now + 20)  # twice connect-int
        assert not fenced(lone)
        if comes:
            lone.connect()
            assert lone.conn() > ConnState.CONNECTED
        lone.at(lone.now + 7)  # timeout, and no ping yet
        assert fenced(lone) is not comes


def test_resume_io_takes_responsibility() -> None:
    lone, r = lost(STONITH)
    assert lone.run("resume-io") == "done"
    assert not lone.state.suspended and r in lone.done and len(generations(lone)) == 1


@pytest.mark.parametrize("protocol", ["B", "C"])  # under B its fate is decided when the connection goes
def test_a_disk_lost_while_frozen_ends_the_freeze_with_errors(protocol: str) -> None:
    lone, r = lost(STONITH, protocol=protocol)
    lone.run("detach", force=True)
    assert lone.local_disk() == D.DISKLESS and r not in lone.done
    lone.run("resume-io")
    assert r in lone.done and r.error == errno.EIO, "nobody has it"


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_a_disk_and_then_the_peer_again_lost_while_frozen_fail_what_only_that_disk_had(protocol: str) -> None:
    """Without data nobody is fenced and nothing is frozen for it; the peer may go on without this write."""
    lone, r = lost(STONITH, protocol=protocol)
    lone.run("detach", force=True)
    lone.link()
    lone.data(lone.features())
    assert lone.state.susp_fen and r not in lone.done
    lone.handle(LinkLost(lone.engine.link.ticket, "gone again"))
    lone.settle()
    assert not lone.state.suspended and r in lone.done and r.error == errno.EIO


# --------------------------------------------------------------------------------------------- promotion


@pytest.mark.parametrize("policy", [STONITH, RESOURCE_ONLY])
@pytest.mark.parametrize("code", [4, 7])
def test_a_consistent_node_is_promoted_once_the_peer_is_out(policy: dict[str, object], code: int) -> None:
    lone = Lone(disk=policy, handlers=("fence-peer",))
    lone.attach()
    ticket = lone.command("primary")
    exits(lone, code)
    assert lone.answered(ticket) == "done" and lone.state.role == Role.PRIMARY
    assert lone.local_disk() == D.UP_TO_DATE and lone.state.pdsk == D.OUTDATED


@pytest.mark.parametrize("code", [1, 6])
def test_a_consistent_node_is_not_promoted_otherwise(code: int) -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",))
    lone.attach()
    ticket = lone.command("primary")
    exits(lone, code)
    refused = lone.answered(ticket)
    assert refused is not None and refused != "done" and lone.state.role == Role.SECONDARY


def test_a_node_that_lost_a_good_peer_is_not_promoted_before_fencing() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",)).as_secondary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    ticket = lone.command("primary")
    assert lone.answered(ticket) is None, "waiting for the handler"
    exits(lone, 4)
    assert lone.answered(ticket) == "done"


def test_force_overrides_a_handler_that_fails() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",)).as_secondary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    ticket = lone.command("primary", force=True)
    exits(lone, 1)
    assert lone.answered(ticket) == "done" and lone.state.pdsk == D.OUTDATED


# --------------------------------------------------------------------------------- graceful disconnection


def test_a_fencing_primary_asks_its_peer_to_outdate_itself() -> None:
    lone = Lone(disk=STONITH, handlers=("fence-peer",)).ready()
    ticket = lone.command("disconnect")
    assert lone.payloads(P.CONN_ST_CHG_REQ) == [bytes.fromhex("0001e1f00000a010")]
    lone.meta(pack_state_reply(1, 0, True))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.state.pdsk == D.OUTDATED
    assert not lone.state.suspended and len(generations(lone)) == 1, "it goes on alone, unfrozen"


def test_a_link_that_breaks_while_disconnecting_is_not_consent() -> None:
    lone = Lone(disk=STONITH, handlers=("fence-peer",)).ready()
    ticket = lone.command("disconnect")
    lone.handle(LinkLost(lone.engine.link.ticket, "cable"))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.conn() == ConnState.STAND_ALONE
    assert lone.state.pdsk == D.D_UNKNOWN and lone.state.susp_fen
    exits(lone, 4)
    assert not lone.state.suspended


def test_a_secondary_that_is_refused_outdates_itself() -> None:
    lone = Lone(disk=STONITH, handlers=("fence-peer",)).as_secondary()
    ticket = lone.command("disconnect")
    lone.meta(pack_state_reply(-7, 0, True))
    assert len(lone.payloads(P.CONN_ST_CHG_REQ)) == 1, "the peer is promised nothing that a crash could take back"
    assert not lone.vol.flags() & MdFlag.WAS_UP_TO_DATE
    lone.settle()
    asked = [p.hex() for p in lone.payloads(P.CONN_ST_CHG_REQ)]
    assert asked == ["000001f000000010", "00001ff000000a10"]
    lone.meta(pack_state_reply(1, 0, True))
    lone.settle()
    assert lone.answered(ticket) == "done" and lone.local_disk() == D.OUTDATED


def test_a_secondary_whose_disconnect_is_refused_stays_up_to_date() -> None:
    lone = Lone(disk=STONITH, handlers=("fence-peer",)).as_secondary()
    ticket = lone.command("disconnect")
    for code in (-7, -2):
        lone.meta(pack_state_reply(code, 0, True))
        lone.settle()
    assert isinstance(lone.answered(ticket), Refusal) and lone.vol.flags() & MdFlag.WAS_UP_TO_DATE


# ------------------------------------------------------------------------------------ lost more than once


def test_a_peer_that_is_lost_again_meanwhile_is_fenced_again() -> None:
    """Else I/O would be frozen for ever: the answer to the first call says nothing of the second loss."""
    lone, r = lost(STONITH)
    first = lone.handler("fence-peer")
    lone.connect()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone again"))
    lone.settle()
    assert lone.handler("fence-peer").ticket == first.ticket, "one at a time"
    lone.handle(HandlerExited(first.ticket, 4))
    lone.settle()
    assert lone.handler("fence-peer").ticket != first.ticket and lone.state.susp_fen
    exits(lone, 7)
    assert not lone.state.suspended and lone.state.pdsk == D.OUTDATED and r in lone.done


def test_a_promotion_shares_the_handler_that_runs() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",)).as_secondary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    first, second = lone.command("primary"), lone.command("primary")
    assert len([e for e in lone.effects if getattr(e, "name", "") == "fence-peer"]) == 1
    exits(lone, 4)
    assert lone.answered(first) == "done" and lone.answered(second) == "done"


# ------------------------------------------------------------------------------------------- split brain


def fenced(lone: Lone) -> bool:
    return any(getattr(effect, "name", "") == "fence-peer" for effect in lone.effects)


@pytest.mark.parametrize("policy", [STONITH, RESOURCE_ONLY])
def test_the_winner_of_a_split_brain_has_the_other_one_fenced(policy: dict[str, object]) -> None:
    lone = Lone(disk=policy, handlers=("fence-peer",)).ready()
    lone.engine.fencing.split_brain("peer", "split brain")
    lone.settle()
    assert lone.conn() == ConnState.STAND_ALONE and lone.state.susp_fen == (policy is STONITH)
    exits(lone, 7)
    assert lone.state.pdsk == D.OUTDATED and not lone.state.suspended


@pytest.mark.parametrize("policy", [STONITH, RESOURCE_ONLY])
def test_who_yields_shoots_nobody(policy: dict[str, object]) -> None:
    lone = Lone(disk=policy, handlers=("fence-peer",)).ready()
    lone.engine.fencing.split_brain("self", "split brain")
    lone.settle()
    assert lone.conn() == ConnState.STAND_ALONE and not fenced(lone)
    assert lone.state.susp_fen == (policy is STONITH), "no write is answered until it is shot"


def test_a_secondary_that_yields_is_outdated() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",)).as_secondary()
    lone.engine.fencing.split_brain("self", "split brain")
    lone.settle()
    assert lone.local_disk() == D.OUTDATED and not fenced(lone)


def test_without_a_policy_a_split_brain_only_parts() -> None:
    for yields in ("self", "peer"):
        lone = Lone(handlers=("fence-peer",)).as_secondary()
        lone.engine.fencing.split_brain(yields, "split brain")
        lone.settle()
        assert lone.conn() == ConnState.STAND_ALONE and lone.local_disk() == D.UP_TO_DATE and not fenced(lone)


# A peer that is Primary as well and has a history of its own.
RIVAL = replace(PEER_SECONDARY, role=Role.PRIMARY)


def meets_rival(lone: Lone, bits: int = 1000) -> None:
    """The rival has changed so many blocks; we have changed two."""
    lone.connect(RIVAL, uuids=(0xB000, GENERATIONS[0], 0, 0), bits=bits)
    assert lone.conn() == ConnState.STAND_ALONE


def outdated_peer(policy: dict[str, object]) -> Lone:
    """A Primary with a history of its own, whose handler has said that the peer is out."""
    lone, _ = lost(policy)
    exits(lone, 4)
    assert not lone.state.suspended and lone.state.pdsk == D.OUTDATED
    lone.forget_keep_connect()
    return lone


def test_who_yields_is_frozen_although_its_peer_was_called_outdated() -> None:
    """It was told so, and the peer has written all the same: from now on nothing is answered here."""
    lone = outdated_peer(STONITH)
    meets_rival(lone)
    assert not fenced(lone) and lone.state.susp_fen and lone.state.pdsk == D.D_UNKNOWN
    r = lone.submit(Op.WRITE, 4096)
    lone.settle()
    assert r not in lone.done


def test_the_winner_is_frozen_until_the_other_one_is_out() -> None:
    lone = outdated_peer(STONITH)
    meets_rival(lone, bits=0)
    assert lone.state.susp_fen
    exits(lone, 7)
    assert not lone.state.suspended and lone.state.pdsk == D.OUTDATED


@pytest.mark.parametrize("policy", [STONITH, RESOURCE_ONLY])
def test_a_handler_called_before_does_not_speak_for_who_yields(policy: dict[str, object]) -> None:
    """It was called when the peer was lost, and answers after the peer was met and has won."""
    lone, _ = lost(policy)
    running = lone.handler("fence-peer")
    lone.forget_keep_connect()
    meets_rival(lone)
    lone.handle(HandlerExited(running.ticket, 4))
    lone.settle()
    assert lone.state.pdsk == D.D_UNKNOWN and lone.state.susp_fen == (policy is STONITH) and not fenced(lone)


def test_who_yields_does_not_fence_again_after_a_second_loss() -> None:
    """The handler that runs is of the first loss; the second one would have it called again."""
    lone, _ = lost(RESOURCE_ONLY)
    running = lone.handler("fence-peer")
    lone.engine.n_established += 1  # the peer came and went
    lone.engine.fencing.peer_lost()
    lone.forget_keep_connect()
    meets_rival(lone)
    lone.handle(HandlerExited(running.ticket, 4))
    lone.settle()
    assert not fenced(lone) and lone.state.pdsk == D.D_UNKNOWN


def test_the_winners_handler_that_runs_does_not_speak_for_this_meeting_either() -> None:
    lone, _ = lost(RESOURCE_ONLY)
    running = lone.handler("fence-peer")
    lone.forget_keep_connect()
    meets_rival(lone, bits=0)
    assert not fenced(lone), "one at a time"
    lone.handle(HandlerExited(running.ticket, 4))
    lone.settle()
    assert lone.state.pdsk > D.OUTDATED
    exits(lone, 7)
    assert lone.state.pdsk == D.OUTDATED


def test_a_frozen_primary_that_meets_newer_data_shoots_nobody() -> None:
    """It has written nothing alone: no split brain, but the peer is Primary, and this node is in its way."""
    lone, r = lost(STONITH)
    exits(lone, 1)
    lone.forget_keep_connect()
    meets_rival(lone)
    assert not fenced(lone) and lone.state.susp_fen and r not in lone.done


def test_a_promotion_that_waits_on_who_yields_is_refused() -> None:
    lone = Lone(disk=RESOURCE_ONLY, handlers=("fence-peer",)).as_secondary()
    lone.handle(LinkLost(lone.engine.link.ticket, "gone"))
    lone.settle()
    ticket = lone.command("primary")
    running = lone.handler("fence-peer")
    lone.vol.uuids = replace(lone.vol.uuids, bitmap=lone.vol.uuids.current, current=0xA000)
    meets_rival(lone)
    refused = lone.answered(ticket)
    assert refused not in (None, "done") and lone.local_disk() == D.OUTDATED
    lone.handle(HandlerExited(running.ticket, 4))
    lone.settle()
    assert lone.state.role == Role.SECONDARY and lone.local_disk() == D.OUTDATED


def test_a_rehearsal_fences_and_outdates_nobody() -> None:
    for bits in (0, 1000):
        lone = outdated_peer(RESOURCE_ONLY)
        assert lone.run("disconnect", force=True) == "done"
        assert lone.run("connect", tentative=True) == "done"
        meets_rival(lone, bits)
        assert not fenced(lone) and lone.state.pdsk == D.OUTDATED
