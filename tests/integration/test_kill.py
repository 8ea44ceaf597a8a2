"""SIGKILL at random moments under write load: nothing acknowledged is lost, and both disks end up equal.

The seed is printed; KILL_SEED repeats it as far as real processes can be repeated.
"""

from __future__ import annotations

import os
import random
import secrets

import pytest
from tandem.repl.events import ResourceStatus
from tandem.tools.demo_pair import Node, Pair, alone, connected, first_difference, in_sync, usable_size

from tests.conftest import NewPair
from tests.ledger import DEPTH, ConnectionLost, Ledger, Nbd, Request

MIB = 1 << 20
ROUNDS = 3


class Trial:
    """A pair under load, its ledger, and who is Primary."""

    def __init__(self, pair: Pair) -> None:
        seed = int(os.environ.get("KILL_SEED") or secrets.randbelow(1 << 31))
        print(f"repeat with KILL_SEED={seed}")
        self.pair = pair
        self.draw = random.Random(seed)
        self.primary = pair.first
        self.ledger = Ledger(usable_size(pair.status(pair.first)), self.draw)

    @property
    def secondary(self) -> Node:
        return self.pair.peer_of(self.primary)

    def write(self, n_requests: int, kill: tuple[Node, ...] = ()) -> bool:
        """Write to the Primary; *kill* nodes somewhere in the middle. False when the session was lost."""
        moment = self.ledger.n_acknowledged + self.draw.randrange(1, n_requests * 3 // 4)
        left = list(kill)

        def answered(request: Request) -> None:
            self.ledger.answered(request)
            if self.ledger.n_acknowledged >= moment:
                while left:
                    self.pair.kill(left.pop())

        try:
            with Nbd(self.primary.socket, "r0") as nbd:
                nbd.run(self.ledger.requests(n_requests), DEPTH, answered)
        except ConnectionLost:
            assert self.primary in kill, "the Primary was not killed, and its client lost it"
            return False
        finally:
            self.ledger.session_over()
        assert not left, "nobody was killed"
        return True

    def check(self) -> None:
        """What the Primary gives back is what the ledger allows."""
        with Nbd(self.primary.socket, "r0") as nbd:
            assert self.ledger.check(nbd) > 0

    def disks_are_equal(self) -> None:
        """Both nodes in sync, and byte by byte the same."""
        self.pair.wait_in_sync()
        one, other = self.pair.nodes
        at = first_difference(one.disk, other.disk, self.ledger.size)
        assert at is None, f"the disks differ at byte {at}"
        self.check()


def test_the_primary_is_killed(pair: Pair) -> None:
    trial = Trial(pair)
    for _ in range(ROUNDS):
        killed = trial.primary
        assert not trial.write(1500, (killed,))
        pair.wait(trial.secondary, "alone", alone)
        pair.adm(trial.secondary, "primary", "r0")
        trial.primary = trial.secondary
        trial.check()
        assert trial.write(200)
        pair.adm(killed, "up", "r0")
        trial.disks_are_equal()


def test_the_secondary_is_killed(pair: Pair) -> None:
    trial = Trial(pair)
    for _ in range(ROUNDS):
        killed = trial.secondary
        assert trial.write(1500, (killed,))
        trial.check()
        pair.adm(killed, "up", "r0")
        assert trial.write(300)  # while it is being resynchronized, or shortly after
        trial.disks_are_equal()


def test_both_are_killed(pair: Pair) -> None:
    trial = Trial(pair)
    for _ in range(ROUNDS):
        order = (trial.primary, trial.secondary)
        if trial.draw.random() < 0.5:
            order = order[::-1]
        assert not trial.write(1500, order)
        for node in order:
            pair.adm(node, "up", "r0")
        for node in order:
            pair.wait(node, "connected", connected)
        pair.wait_in_sync()
        pair.adm(trial.primary, "primary", "r0")
        trial.check()
        trial.disks_are_equal()


def syncing(status: ResourceStatus) -> bool:
    return any(volume.replication in ("SyncSource", "SyncTarget") for volume in status.connection.volumes)


@pytest.mark.parametrize("victim", ["source", "target"])
def test_killed_in_the_middle_of_a_resync(new_pair: NewPair, victim: str) -> None:
    pair = new_pair(disk="c-max-rate 16M;")
    pair.start()
    trial = Trial(pair)
    assert trial.write(500)
    pair.adm(trial.secondary, "invalidate", "r0")
    pair.wait(trial.secondary, "copying", syncing)
    killed = trial.primary if victim == "source" else trial.secondary
    pair.kill(killed)
    other = pair.peer_of(killed)
    pair.wait(other, "alone", alone)
    assert not in_sync(pair.status(other))
    if victim == "source":
        # The target's disk is Inconsistent: it must not be promoted, whatever happened to the source.
        refused = pair.run(other, "primary", "r0")
        assert refused.returncode == 17, refused
    pair.adm(killed, "up", "r0")
    if victim == "source":
        pair.wait(killed, "connected", connected)
        pair.adm(killed, "primary", "r0")
    trial.disks_are_equal()
