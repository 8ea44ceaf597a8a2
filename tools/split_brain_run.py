"""What each form of `tandemadm split-brain` does, from the first question to the last line.

Reaches the peer, hands over to the ``split_brain_*`` modules, and turns what they could not do into one
sentence and an exit code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from .adm_session import Quit, Session, Target, complain, say
from .split_brain_node import Node, Side, SplitBrainError
from .split_brain_report import Findings, advice, headline, is_split, own_text, relation, text_of
from .split_brain_wire import Remote, peer_command

EXIT_REFUSED: Final = 11  # drbdsetup's code for a state that does not allow it


class PeerSilent(SplitBrainError):
    """The peer cannot be asked at all."""


@contextmanager
def _both(session: Session, resource: str, rsh: str) -> Iterator[tuple[Node, Remote]]:
    """This node and the peer. `PeerSilent` when the peer cannot be asked."""
    node = Node(session, resource)
    try:
        peer = node.config().peer
        try:
            remote = Remote(peer, peer_command(session, resource, peer, rsh))
        except SplitBrainError as error:
            raise PeerSilent(
                f"{peer} cannot be asked: {error}. It must run Tandem (a kernel's DRBD cannot tell), and "
                f"'ssh {peer} tandemadm' must work from here, or what --rsh says."
            ) from error
        try:
            yield node, remote
        finally:
            remote.close()
    finally:
        node.close()


@contextmanager
def _one_sentence(target: Target) -> Iterator[None]:
    try:
        yield
    except SplitBrainError as error:
        raise Quit(EXIT_REFUSED, f"{target}: {error}") from error


def _numbers(target: Target, own: Side, peer: Side) -> list[int]:
    """The volumes that *target* means; SplitBrainError when the nodes do not agree on them."""
    numbers = [v.number for v in own.volumes if target.volume in (None, v.number)]
    if not numbers:
        raise SplitBrainError("not defined in your config (for this host)")
    for number in numbers:
        mine, theirs = own.volume(number), peer.volume(number)
        assert mine is not None
        if theirs is None or mine.size != theirs.size:
            size = 0 if theirs is None else theirs.size
            raise SplitBrainError(
                f"volume {number} has {mine.size} bytes on {own.node} and {size} on {peer.node}: attach its disk on "
                "both nodes first"
            )
    return numbers


# --------------------------------------------------------------------------------------------- show


def show(session: Session, target: Target, rsh: str) -> int:
    """The report on every volume that is meant; the exit code."""
    with _one_sentence(target):
        try:
            with _both(session, target.resource, rsh) as (node, remote):
                return _show_both(session, target, node, remote)
        except PeerSilent as error:
            complain(f"{target}: {error}")
            return _show_own(session, target)


def _show_both(session: Session, target: Target, node: Node, remote: Remote) -> int:
    own, peer = node.describe(), remote.describe()
    split = False
    for number in _numbers(target, own, peer):
        name, verdict = f"{target.resource}/{number}", relation(own, peer, number)
        if not is_split(verdict):
            say(headline(name, own, peer, verdict))
            continue
        split = True
        bitmaps = node.bitmap(number), remote.bitmap(number)
        files = node.files(number), remote.files(number)
        findings = Findings(own, peer, number, verdict, bitmaps, files)
        say(text_of(name, findings, everything=session.general.verbose) + "\n")
    if split:
        say(advice(target.resource, own, peer))
    return 0


def _show_own(session: Session, target: Target) -> int:
    """What this node alone can tell."""
    node = Node(session, target.resource)
    try:
        own = node.describe()
        for volume in own.volumes:
            if target.volume in (None, volume.number):
                bitmap = node.bitmap(volume.number)
                say(own_text(f"{target.resource}/{volume.number}", own, volume, bitmap, node.files(volume.number)))
    finally:
        node.close()
    return 0
