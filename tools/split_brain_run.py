"""What each form of `tandemadm split-brain` does, from the first question to the last line.

Reaches the peer, hands over to the ``split_brain_*`` modules, and turns what they could not do into one
sentence and an exit code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from .adm_meta import progress_bars
from .adm_session import Quit, Session, Target, complain, say
from .split_brain_history import History
from .split_brain_history import restore as rebuild
from .split_brain_keep import Recovery, Wish
from .split_brain_node import Answers, Node, Side, SplitBrainError
from .split_brain_report import (
    Findings,
    advice,
    headline,
    is_split,
    own_text,
    relation,
    size_text,
    text_of,
    when,
)
from .split_brain_wire import Remote, peer_command

EXIT_REFUSED: Final = 11  # drbdsetup's code for a state that does not allow it
EXIT_INTERRUPTED: Final = 130


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


# ------------------------------------------------------------------------------------------- keep


def keep(session: Session, target: Target, node: str, place: str | None, whole: bool, rsh: str) -> int:
    """The recovery of the whole resource; the exit code."""
    if target.volume is not None:
        raise Quit(1, f"--keep is for the whole resource: tandemadm split-brain {target.resource} --keep {node}")
    paths, resource = session.paths, target.resource
    path: Path | None = None
    with _one_sentence(target), _both(session, resource, rsh) as (here, remote):
        wish = Wish(
            resource, node, None if place is None else Path(place).absolute(),
            lambda loser, generation: paths.history(resource, loser, generation), whole,
        )  # fmt: skip
        try:
            with progress_bars() as tell:
                recovery = Recovery(wish, (here, remote), lambda _, text: say(text), tell)
                path = recovery.run()
        except KeyboardInterrupt:
            complain(
                "Interrupted. Neither history is lost; what was begun goes on, or waits for the same command again."
            )
            return EXIT_INTERRUPTED
    if path is not None:
        say(f"To have {recovery.loser_name}'s history as an image: tandemadm split-brain {resource} --restore {path}")
    return 0


# ---------------------------------------------------------------------------------------- restore


def restore(session: Session, target: Target, file: str, image: str | None, rsh: str) -> int:
    """Rebuild the saved history in *file*; the exit code, 1 when the image is not exactly that history."""
    with _one_sentence(target), ExitStack() as opened:
        history = History(Path(file))
        opened.callback(history.close)
        about = history.about
        if about.resource != target.resource:
            raise SplitBrainError(f"{file} is a history of {about.resource}")
        volumes = [v for v in about.volumes if target.volume in (None, v.number)]
        if len(volumes) != 1:
            raise SplitBrainError(
                f"{file} has the volumes {', '.join(str(v.number) for v in about.volumes)}; name one: "
                f"tandemadm split-brain {target.resource}/{about.volumes[0].number} --restore {file}"
            )
        (volume,) = volumes
        made = Path(image if image is not None else f"{file}.img")
        sources = [_here(session, target.resource, opened), _there(session, target.resource, rsh, opened)]
        with progress_bars() as tell:
            lost = rebuild(history, volume, made, sources, tell)
    say(f"{made}: {about.resource}/{volume.number} as it was on {about.node} at {when(about.taken)}.")
    if lost:
        complain(
            f"But not all of it: {size_text(lost)} lie in parts that both nodes had in common then and that have been "
            "written since; there the image has what is in the volume now. (--keep --whole saves everything.)"
        )
        return 1
    return 0


def _here(session: Session, resource: str, opened: ExitStack) -> Callable[[], Answers]:
    @cache
    def source() -> Answers:
        node = Node(session, resource)
        opened.callback(node.close)
        return node

    return source


def _there(session: Session, resource: str, rsh: str, opened: ExitStack) -> Callable[[], Answers]:
    @cache
    def source() -> Answers:
        _, remote = opened.enter_context(_both(session, resource, rsh))
        return remote

    return source


# ------------------------------------------------------------------------------------------- look


def look(session: Session, target: Target, rsh: str) -> int:
    """Both histories as read-only exports until Ctrl-C; the exit code."""
    from . import split_brain_look

    path = session.paths.look(target.resource)
    session.paths.make()
    with _one_sentence(target), ExitStack() as opened:
        nodes: tuple[Answers, ...]
        try:
            nodes = opened.enter_context(_both(session, target.resource, rsh))
        except PeerSilent as error:
            complain(f"{target}: {error}")
            nodes = (_here(session, target.resource, opened)(),)
        split_brain_look.run(path, target.resource, nodes, say)
    return 0
