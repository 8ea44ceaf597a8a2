"""`split-brain --keep NODE`: the whole recovery, in an order in which no step can lose both histories.

1. The loser is demoted, and both nodes are StandAlone: from here on its disk does not change.
2. Its history is saved in a file, durably, under its final name only when it is whole.
3. The file is read again and compared with the loser's disk.
4. The loser connects with --discard-my-data, then the winner connects: the resync overwrites the loser.
5. The resync is waited for.

The winner's data is never touched. Until step 4 the loser's is on its disk, and from step 3 on in the file.
Nothing is remembered between runs: each begins by looking, so after a kill at any moment the same command
goes on. A file that is there is used when it passes step 3, and never overwritten. What the handshake will
decide is asked beforehand of the function that decides it, with both nodes' configurations.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from tandem.repl.bitmap import Bitmap
from tandem.repl.config import NetOptions
from tandem.repl.decision import DecisionFacts, decide
from tandem.repl.states import ConnState, DiskState
from tandem.repl.units import n_bits_of

from .adm_hints import hint
from .split_brain_history import About, SavedVolume, Tell, check_place, holds, save
from .split_brain_node import BLOCK, UP_WORDS, Answers, Side, SplitBrainError, VolumeSide
from .split_brain_report import combined, compare_facts, headline, is_split, relation, uuids_of
from .values import Json

Announce = Callable[[str, str], None]  # the name of a step that is done, and a sentence about it
POLL_S: Final = 0.25
FILES_MAX: Final = 100  # names tried for the file
_BEHIND: Final = (-1, -2)  # verdicts by which this volume's data would come from the other node
CONNECT_S: Final = 10.0  # a handshake that has not begun by then is mentioned


@dataclass(frozen=True, slots=True)
class Wish:
    """What the operator wants. *place* is where to save, or None and *default* makes the names to try."""

    resource: str
    keep: str
    place: Path | None
    default: Callable[[str, str], Path]
    whole: bool = False


class Recovery:
    """One run. *announce* hears of every step that is done; *tell* of progress within one."""

    def __init__(self, wish: Wish, nodes: tuple[Answers, Answers], announce: Announce, tell: Tell) -> None:
        self.wish = wish
        self.announce = announce
        self.tell = tell
        first, second = nodes
        one, other = first.describe(), second.describe()
        if wish.keep not in (one.node, other.node):
            raise SplitBrainError(f"--keep {wish.keep}: the nodes are {one.node} and {other.node}")
        swap = wish.keep == one.node
        self.winner, self.loser = (first, second) if swap else (second, first)
        self.winner_name, self.loser_name = (one.node, other.node) if swap else (other.node, one.node)

    def run(self) -> Path | None:
        """Do it; the file with the loser's history, or None when the resync was under way already."""
        for _, answers in sorted([(self.winner_name, self.winner), (self.loser_name, self.loser)], key=_by_name):
            answers.lock()  # in the same order on both nodes, so that two runs cannot wait for each other
        winner, loser = self.winner.describe(), self.loser.describe()
        self._check_running(winner, loser)
        if winner.cstate in UP_WORDS and loser.cstate in UP_WORDS:
            self._finish(winner, loser)
            return None
        if self.wish.place is not None:
            check_place(self.wish.place)
        numbers = self._split_volumes(winner, loser)
        self._rehearse(winner, loser, numbers)
        self._demote_and_part(winner, loser)
        path = self._save(numbers)
        self._command(self.loser, self.loser_name, "connect", {"discard_my_data": True, "tentative": False})
        self.announce("discarding", f"{self.loser_name} connects, ready to discard its own changes.")
        self._command(self.winner, self.winner_name, "connect", {"discard_my_data": False, "tentative": False})
        self.announce("connecting", f"{self.winner_name} connects.")
        self._await_resync()
        return path

    def _finish(self, winner: Side, loser: Side) -> None:
        """The nodes are connected: a run before has come as far, or the handshake has decided by itself."""
        if any(volume.disk == "Inconsistent" for volume in winner.volumes):
            raise SplitBrainError(
                f"{loser.node}'s data is being copied to {winner.node} already, so {winner.node}'s cannot be kept any "
                "more. What --keep saved of it before can be rebuilt with --restore FILE"
            )
        if all(volume.disk == "UpToDate" and not volume.bits for volume in loser.volumes):
            self.announce("nothing", "The nodes are connected and have the same data: there is nothing to decide.")
            return
        self.announce("under-way", "The nodes are connected already; waiting for the resync.")
        self._await_resync()

    # ------------------------------------------------------------------------------ before

    def _check_running(self, winner: Side, loser: Side) -> None:
        for side in (winner, loser):
            if not side.running:
                raise SplitBrainError(
                    f"the daemon does not run on {side.node}, or has no disk; start it there: tandemadm up "
                    f"{self.wish.resource}"
                )

    def _split_volumes(self, winner: Side, loser: Side) -> list[int]:
        verdicts = {v.number: relation(winner, loser, v.number) for v in winner.volumes}
        split = [number for number, verdict in verdicts.items() if is_split(verdict)]
        if not split:
            number, verdict = next(iter(verdicts.items()))
            raise SplitBrainError(headline(f"{self.wish.resource}/{number}", winner, loser, verdict))
        for number, verdict in verdicts.items():
            if verdict in _BEHIND:
                raise SplitBrainError(
                    f"{headline(f'{self.wish.resource}/{number}', winner, loser, verdict)} So what {winner.node} has "
                    f"of it would not be kept; if it is to be, begin a history of its own there: tandemadm secondary "
                    f"{self.wish.resource}, then tandemadm primary --force {self.wish.resource}. Nothing was changed"
                )
        return split

    def _rehearse(self, winner: Side, loser: Side, numbers: list[int]) -> None:
        """SplitBrainError when the handshake would decide anything but the winner's data by bitmap."""
        loser = replace(loser, role="Secondary")
        for number in numbers:
            for resolver in (False, True):
                lost = _decision(loser, winner, number, self.loser.config().net, resolver, discard=(True, False))
                won = _decision(winner, loser, number, self.winner.config().net, not resolver, discard=(False, True))
                if (lost, won) != (ConnState.WF_BITMAP_T, ConnState.WF_BITMAP_S):
                    raise SplitBrainError(
                        f"{self.winner_name} cannot be made the one that is kept: by the disks' states and the "
                        "after-sb policies the handshake would decide otherwise. See 'tandemadm status', and set "
                        "after-sb-0pri, -1pri and -2pri to disconnect on both nodes (tandemadm adjust); nothing has "
                        "been changed"
                    )

    def _demote_and_part(self, winner: Side, loser: Side) -> None:
        for side, answers in ((loser, self.loser), (winner, self.winner)):
            if side.cstate != "StandAlone":
                self._command(answers, side.node, "disconnect", {"force": False})
        self.announce("parted", "Both nodes are disconnected.")
        if loser.role == "Primary":
            self._command(self.loser, self.loser_name, "secondary", {})
        self.announce("demoted", f"{self.loser_name} is Secondary: its data does not change any more.")

    def _command(self, answers: Answers, node: str, name: str, args: Json) -> None:
        refusal = answers.command(name, args)
        if refusal is not None:
            advice = hint(refusal, self.wish.resource, None, name)
            raise SplitBrainError(f"{node}: {name} refused: ({refusal.code}) {refusal.text}. {advice}".rstrip())

    # ------------------------------------------------------------------------------ the file

    def _save(self, numbers: list[int]) -> Path:
        """The file with everything of the loser's that the resync may overwrite, checked against its disk."""
        loser = self.loser.describe()
        sides = [side for number in numbers if (side := loser.volume(number)) is not None]
        bitmaps = {side.number: self._wanted(side) for side in sides}
        about = About(
            1, self.wish.resource, self.loser_name, time.time(), "zeros" if self.wish.whole else "volume",
            tuple(SavedVolume(s.number, s.size, s.gi, bitmaps[s.number].weight) for s in sides), loser.journal,
        )  # fmt: skip
        for path in self._places(sides[0].gi):
            if path.exists():
                if holds(path, about, bitmaps, self.loser, self.tell):
                    self.announce("checked", f"{path} has all of {self.loser_name}'s history already.")
                    return path
                continue
            save(path, about, bitmaps, self.loser, self.tell)
            self.announce("saved", f"{self.loser_name}'s history is in {path}.")
            if not holds(path, about, bitmaps, self.loser, self.tell):
                raise SplitBrainError(
                    f"{path} is not what is on {self.loser_name}'s disk; nothing has been discarded. Look for I/O "
                    "errors in the kernel log, and choose another place with --save FILE"
                )
            self.announce("checked", "It was read again and is what is on the disk.")
            return path
        raise SplitBrainError(
            f"{self.wish.place or path} exists and does not hold this history; nothing has been discarded. Choose "
            "another place with --save FILE"
        )

    def _wanted(self, side: VolumeSide) -> Bitmap:
        """The blocks to save: what either side has changed, or all that are not zero."""
        number = side.number
        either = combined(self.winner.bitmap(number), self.loser.bitmap(number), "or")
        if not self.wish.whole:
            return either
        data = self.loser.data(number)
        assert data.n_bits == n_bits_of(side.size)
        return data

    def _places(self, gi: str) -> list[Path]:
        if self.wish.place is not None:
            return [self.wish.place]
        first = self.wish.default(self.loser_name, f"{uuids_of(gi).current & ~1:016X}")
        more = (first.with_name(f"{first.stem}-{n}{first.suffix}") for n in range(2, FILES_MAX))
        return [first, *more]

    # ------------------------------------------------------------------------------ the resync

    def _await_resync(self) -> None:
        """Until the loser is UpToDate and connected. SplitBrainError when the connection was refused.

        Once they are connected the decision is made, and others may change the resource again.
        """
        began, total, locked = time.monotonic(), 0, True
        while True:
            winner, loser = self.winner.describe(), self.loser.describe()
            if locked and winner.cstate in UP_WORDS and loser.cstate in UP_WORDS:
                self.winner.unlock()
                self.loser.unlock()
                locked = False
            if "StandAlone" in (winner.cstate, loser.cstate):
                raise SplitBrainError(
                    f"the nodes did not come together: {winner.node} is {winner.cstate}, {loser.node} is "
                    f"{loser.cstate}. Their logs say why; then give the same command again"
                )
            left = sum(volume.bits for volume in loser.volumes) * BLOCK
            good = all(volume.disk == "UpToDate" for volume in (*loser.volumes, *winner.volumes))
            if winner.cstate == loser.cstate == "Connected" and good and not left:
                self.announce("done", f"Both nodes have {self.winner_name}'s data.")
                return
            if loser.cstate in UP_WORDS:
                total = max(total, left)
                self.tell("resync", total - left, max(total, 1))
            elif time.monotonic() - began > CONNECT_S:
                began = float("inf")
                self.announce("waiting", f"{loser.node} is {loser.cstate}: waiting for the network.")
            time.sleep(POLL_S)


def _by_name(named: tuple[str, Answers]) -> str:
    return named[0]


def _decision(
    own: Side, peer: Side, number: int, net: NetOptions, resolver: bool, discard: tuple[bool, bool]
) -> ConnState | None:
    """What the handshake would make of *own*'s connection; None when it would refuse. A full resync counts
    as a refusal: only what the bitmaps name is saved."""
    mine, theirs = own.volume(number), peer.volume(number)
    assert mine is not None and theirs is not None
    facts = DecisionFacts(
        own=uuids_of(mine.gi), peer=uuids_of(theirs.gi),
        compare=compare_facts(own, mine.gi, peer, theirs.gi, resolver),
        my_disk=_disk_state(mine.disk), peer_disk=_disk_state(theirs.disk),
        own_bits=mine.bits, peer_bits=theirs.bits, own_discard=discard[0], peer_discard=discard[1],
        after_sb_0pri=net.after_sb_0pri, after_sb_1pri=net.after_sb_1pri, after_sb_2pri=net.after_sb_2pri,
        always_asbp=net.always_asbp, rr_conflict=net.rr_conflict,
    )  # fmt: skip
    decision = decide(facts)
    return None if decision.full_sync or decision.demote_self else decision.conn


def _disk_state(word: str) -> DiskState:
    return next(state for state in DiskState if str(state) == word)
