"""Who may become what: situations an administrator meets, and what the machine answers to each command in them.

Nothing here decides: a real engine is put into the situation and given the command, and its answer is written
down. Its peer agrees to everything, so a refusal is this node's own. `doc_tables` makes docs/roles.md of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from tandem.repl.config import Fencing
from tandem.repl.errors import Refusal
from tandem.repl.events import HandlerExited, Opened, RunHandler
from tandem.repl.states import ConnState, DiskState, Role
from tandem.repl.wire import Packet, pack_state_reply, packet
from tandem.tools.adm_hints import hint

from tests.scenarios.lone import PEER_SECONDARY, Lone

C, D, R = ConnState, DiskState, Role
ROUNDS: Final = 20  # of answering whom the command waits for


@dataclass(frozen=True, slots=True)
class Situation:
    """A state of the node, and what else counts: fencing policy, what fence-peer answers, who has it open."""

    says: str
    conn: ConnState
    disk: DiskState
    pdsk: DiskState
    peer: Role = R.UNKNOWN
    role: Role = R.SECONDARY
    fencing: Fencing = Fencing.DONT_CARE
    fence_peer: int = 0  # exit code; 0: no handler
    two_primaries: bool = False
    is_open: bool = False


_S, _P = R.SECONDARY, R.PRIMARY
_ONLY: Final = Fencing.RESOURCE_ONLY

AS_SECONDARY: Final = (
    Situation("connected, both disks good", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _S),
    Situation("the peer is Primary", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _P),
    Situation("the peer is Primary, allow-two-primaries", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _P,
              two_primaries=True),
    Situation("connected, disk fresh on both", C.CONNECTED, D.INCONSISTENT, D.INCONSISTENT, _S),
    Situation("being synced by the peer", C.SYNC_TARGET, D.INCONSISTENT, D.UP_TO_DATE, _S),
    Situation("syncing the peer", C.SYNC_SOURCE, D.UP_TO_DATE, D.INCONSISTENT, _S),
    Situation("connected, no disk here", C.CONNECTED, D.DISKLESS, D.UP_TO_DATE, _S),
    Situation("connected, no disk at the peer", C.CONNECTED, D.UP_TO_DATE, D.DISKLESS, _S),
    Situation("connected, no disk on either", C.CONNECTED, D.DISKLESS, D.DISKLESS, _S),
    Situation("alone, good disk (also a Primary that crashed and came back)", C.WF_CONNECTION, D.UP_TO_DATE,
              D.D_UNKNOWN),
    Situation("alone, good disk, fencing, no handler", C.WF_CONNECTION, D.UP_TO_DATE, D.D_UNKNOWN, fencing=_ONLY),
    Situation("alone, good disk, fencing, the handler outdates the peer", C.WF_CONNECTION, D.UP_TO_DATE, D.D_UNKNOWN,
              fencing=_ONLY, fence_peer=4),
    Situation("alone, good disk, fencing, the handler fails", C.WF_CONNECTION, D.UP_TO_DATE, D.D_UNKNOWN,
              fencing=_ONLY, fence_peer=1),
    Situation("alone, good disk, the peer is known to be Outdated", C.WF_CONNECTION, D.UP_TO_DATE, D.OUTDATED,
              fencing=_ONLY),
    Situation("alone, Consistent (fencing, restarted), the handler outdates the peer", C.WF_CONNECTION, D.CONSISTENT,
              D.D_UNKNOWN, fencing=_ONLY, fence_peer=4),
    Situation("alone, Consistent (fencing, restarted), the handler fails", C.WF_CONNECTION, D.CONSISTENT, D.D_UNKNOWN,
              fencing=_ONLY, fence_peer=1),
    Situation("alone, Outdated", C.WF_CONNECTION, D.OUTDATED, D.D_UNKNOWN),
    Situation("alone, Inconsistent", C.WF_CONNECTION, D.INCONSISTENT, D.D_UNKNOWN),
    Situation("alone, no disk", C.WF_CONNECTION, D.DISKLESS, D.D_UNKNOWN),
    Situation("StandAlone, good disk", C.STAND_ALONE, D.UP_TO_DATE, D.D_UNKNOWN),
    Situation("StandAlone, Outdated", C.STAND_ALONE, D.OUTDATED, D.D_UNKNOWN),
)  # fmt: skip

AS_PRIMARY: Final = (
    Situation("connected, both disks good", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _S, _P),
    Situation("the same, clients are attached", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _S, _P, is_open=True),
    Situation("connected, no disk here", C.CONNECTED, D.DISKLESS, D.UP_TO_DATE, _S, _P),
    Situation("connected, no disk at the peer", C.CONNECTED, D.UP_TO_DATE, D.DISKLESS, _S, _P),
    Situation("syncing the peer", C.SYNC_SOURCE, D.UP_TO_DATE, D.INCONSISTENT, _S, _P),
    Situation("being synced by the peer", C.SYNC_TARGET, D.INCONSISTENT, D.UP_TO_DATE, _S, _P),
    Situation("both are Primary", C.CONNECTED, D.UP_TO_DATE, D.UP_TO_DATE, _P, _P, two_primaries=True),
    Situation("alone", C.WF_CONNECTION, D.UP_TO_DATE, D.D_UNKNOWN, role=_P),
    Situation("StandAlone", C.STAND_ALONE, D.UP_TO_DATE, D.D_UNKNOWN, role=_P),
)  # fmt: skip

Column = tuple[str, dict[str, Any]]
PROMOTION: Final[tuple[Column, ...]] = (("primary", {}), ("primary", {"force": True}))
ONLY_PRIMARY: Final[tuple[Column, ...]] = (("secondary", {}), ("secondary", {"force": True}))
OTHERS: Final[tuple[Column, ...]] = (
    ("detach", {}), ("outdate", {}), ("disconnect", {}), ("invalidate", {}), ("invalidate-remote", {}), ("verify", {}),
)  # fmt: skip


def in_situation(s: Situation) -> Lone:
    """An engine in that state."""
    lone = Lone(
        handlers=("fence-peer",) if s.fence_peer else (), diskless=s.disk is D.DISKLESS,
        net={"allow_two_primaries": s.two_primaries, "verify_alg": "crc32c"}, disk={"fencing": s.fencing},
    )  # fmt: skip
    if s.disk is not D.DISKLESS:
        lone.attach()
    if s.conn is not C.STAND_ALONE:
        lone.run("connect")
    if s.conn >= C.CONNECTED:
        lone.link()
        lone.data(lone.features())
        peer = replace(PEER_SECONDARY, role=s.peer)
        lone.data(lone.protocol(two_primaries=int(s.two_primaries)) + lone.parameters(peer))
        lone.settle()
    lone.vol.state = replace(lone.state, conn=s.conn, disk=s.disk, pdsk=s.pdsk, peer=s.peer, role=s.role)
    lone.vol.refresh()
    if s.is_open:
        lone.handle(Opened(0, 1))
    lone.forget()
    return lone


def answer(s: Situation, name: str, args: dict[str, Any]) -> Refusal | str:
    """What the command leads to: "done", or the refusal. A forced demotion closes the clients' sessions first."""
    lone = in_situation(s)
    if name == "secondary" and args.get("force"):
        lone.handle(Opened(0, 0))
    ticket = lone.command(name, **args)
    n_answered = 0
    for _ in range(ROUNDS):
        lone.settle()
        requests = [(k, v) for _, k, v, _ in lone.packets if k in (Packet.STATE_CHG_REQ, Packet.CONN_ST_CHG_REQ)]
        for kind, volume in requests[n_answered:]:
            lone.meta(pack_state_reply(1, volume, kind is Packet.CONN_ST_CHG_REQ), packet(Packet.PING_ACK))
        n_answered = len(requests)
        if lone.sent(Packet.PING):
            lone.meta(packet(Packet.PING_ACK))
        for handler in lone.of(RunHandler):
            lone.effects.remove(handler)
            lone.handle(HandlerExited(handler.ticket, s.fence_peer if handler.name == "fence-peer" else 0))
        if (result := lone.answered(ticket)) is not None:
            return result
        lone.at(lone.now + 0.2)
    raise AssertionError(f"{name} in '{s.says}' is never answered")


def _title(column: Column) -> str:
    return f"`{column[0]}{' --force' if column[1].get('force') else ''}`"


class Pages:
    """The tables as markdown, and the refusals that occur in them."""

    def __init__(self) -> None:
        self.met: dict[int, tuple[Refusal, str]] = {}

    def cell(self, s: Situation, column: Column) -> str:
        result = answer(s, *column)
        if isinstance(result, Refusal):
            self.met.setdefault(result.code, (result, column[0]))
            return str(result.code).replace("-", "−")
        return "yes"

    def table(self, title: str, situations: tuple[Situation, ...], columns: tuple[Column, ...]) -> str:
        lines = [
            f"## {title}", "", f"| situation | connection | disk / peer's | {' | '.join(map(_title, columns))} |",
            "|---" * (3 + len(columns)) + "|",
        ]  # fmt: skip
        for s in situations:
            cells = " | ".join(self.cell(s, column) for column in columns)
            lines.append(f"| {s.says} | {s.conn} | {s.disk} / {s.pdsk} | {cells} |")
        return "\n".join(lines) + "\n"

    def legend(self) -> str:
        lines = ["## The refusals", "", "| code | exit code | sentence | what to do |", "|---|---|---|---|"]
        for code in sorted(self.met, reverse=True):
            refusal, command = self.met[code]
            advice = hint(refusal, "RES", None, command).replace("|", "\\|")
            lines.append(f"| {code} | {refusal.exit_code} | {refusal.text} | {advice} |".replace("| -", "| −"))
        return "\n".join(lines) + "\n"


def role_table() -> str:
    """The whole page below its introduction."""
    pages = Pages()
    parts = [
        pages.table("Promotion", AS_SECONDARY, PROMOTION),
        pages.table("Demotion", AS_PRIMARY, ONLY_PRIMARY),
        pages.table("Other commands on a Secondary", AS_SECONDARY, OTHERS),
        pages.table("Other commands on a Primary", AS_PRIMARY, OTHERS),
    ]
    return "\n".join([*parts, pages.legend()])


__all__ = ["AS_PRIMARY", "AS_SECONDARY", "Situation", "answer", "in_situation", "role_table"]
