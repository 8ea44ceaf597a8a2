"""The table of `tandemadm` commands: what each is called, takes and works on.

The commands themselves are in the ``adm_*`` modules; they enter themselves here with the `verb`
decorator. `adm` makes the command line from this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from .adm_session import Quit, Session, Target

Run = Callable[..., int]


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a command.

    *kind* is flag, text, number (sectors with a unit), seconds, or count (from 1 to *most*).
    """

    name: str
    help: str
    kind: str = "flag"
    default: Any = None
    most: int | None = None

    @property
    def field(self) -> str:
        return self.name.lstrip("-").replace("-", "_").lower()


@dataclass(frozen=True, slots=True)
class Verb:
    """One command.

    *scope*: ``resource`` (whole resources only), ``volume`` (resources or volumes), ``global`` (no
    names), ``own`` (the function gets all the names itself). *absent* is the exit code when the daemon
    does not run, None when that is an error like any other. *dry* gives the lines of a dry run. *names* is
    how the usage calls the names. A name of two words is a command of a group.
    """

    name: str
    help: str
    scope: str
    run: Run
    options: tuple[Option, ...] = ()
    absent: int | None = None
    hidden: bool = False
    dry: Callable[..., list[str]] | None = None
    names: str = "..."


VERBS: Final[dict[str, Verb]] = {}


def verb(
    name: str, help: str, *options: Option, scope: str = "resource", absent: int | None = None,
    hidden: bool = False, dry: Callable[..., list[str]] | None = None, names: str = "...",
) -> Callable[[Run], Run]:  # fmt: skip
    """Enter a function into the table of commands."""

    def enter(run: Run) -> Run:
        assert name not in VERBS, name
        VERBS[name] = Verb(name, help, scope, run, options, absent, hidden, dry, names)
        return run

    return enter


def check_scope(verb: Verb, target: Target) -> None:
    """Quit when a volume was named for a command that takes whole resources."""
    if verb.scope == "resource" and target.volume is not None:
        raise Quit(1, f"{verb.name} operates on whole resources, but you specified a specific volume!")


def dry_lines(verb: Verb, session: Session, target: Target, given: dict[str, Any]) -> list[str]:
    """What a dry run prints: the drbdsetup commands that DRBD would run."""
    if verb.dry is not None:
        return verb.dry(session, target, **given)
    words = "".join(f" {word}" for word in option_words(verb, given))
    if verb.scope == "resource":
        return [f"drbdsetup-84 {verb.name} {target.resource}{words}"]
    return [f"drbdsetup-84 {verb.name} {volume.minor}{words}" for volume in session.volumes(target)]


def option_words(verb: Verb, given: dict[str, Any]) -> list[str]:
    """The options of a command as words of a command line."""
    words = []
    for option in verb.options:
        value = given.get(option.field)
        if value is True:
            words.append(option.name)
        elif value not in (None, False, option.default):
            words.append(f"{option.name}={value}")
    return words
