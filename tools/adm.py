"""`tandemadm`: the command line, made from the table of commands.

Reads options the way drbdadm does: general options before or after the command, a command's own options
after it or, following ``--``, in front of it. Decides the order of work and the exit code: the largest of
several resources' codes, and a stop at once at 20 or more. What a command does is in the ``adm_*``
modules.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from . import (
    adm_live,
    adm_meta,
    adm_nbd,
    adm_query,
    adm_script,
    adm_up,
    adm_wait,
    drbd_names,
    proc_drbd,
    split_brain,
)
from .adm_session import DaemonError, General, NotRunning, Quit, Session, Target, complain, say
from .adm_verbs import VERBS, Option, Verb, check_scope, dry_lines
from .paths import PathError

COMMANDS: Final = (  # each fills VERBS
    adm_live, adm_meta, adm_nbd, adm_query, adm_script, adm_up, adm_wait, drbd_names, proc_drbd,
    split_brain,
)  # fmt: skip

EXIT_USAGE: Final = 1
EXIT_SYNTAX: Final = 2
EXIT_CONFIG: Final = 10
EXIT_ABORT: Final = 20  # from this code on the remaining resources are not tried
EXIT_INTERRUPTED: Final = 130


if TYPE_CHECKING:
    _IntType = click.ParamType[int]
else:
    _IntType = click.ParamType  # is not generic in older versions


class SectorCount(_IntType):
    """A size: bare numbers are sectors; k, m, g, t are powers of 1024 bytes, s is sectors."""

    name = "size"
    UNITS: Final = {"s": 512, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        text = str(value).lower()
        unit = self.UNITS.get(text[-1:], 0)
        digits = text[:-1] if unit else text
        if not digits.isascii() or not digits.isdigit():
            self.fail(f"{value!r} is not a size; write for example 2048s, 512M or 10G", param, ctx)
        return int(digits) * (unit or 512) // 512


_KINDS: Final[dict[str, dict[str, Any]]] = {
    "flag": {"is_flag": True},
    "text": {"type": str},
    "number": {"type": SectorCount()},
    "seconds": {"type": click.IntRange(min=0)},
}


def _set_general(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """General options may stand before and after the command; the last one counts."""
    if value not in (None, False):
        setattr(ctx.ensure_object(General), str(param.name), value)
    return value


def _general_options() -> list[click.Parameter]:
    def option(*names: str, **more: Any) -> click.Option:
        return click.Option(names, callback=_set_general, expose_value=False, **more)

    return [
        option("-c", "--config-file", metavar="FILE", help="Configuration; - is standard input."),
        option("--node", metavar="NAME", help="This node's name in the configuration."),
        option("--run-dir", metavar="DIR", help="Directory of control sockets and pid files."),
        option("-d", "--dry-run", is_flag=True, help="Print what would be done."),
        option("-v", "--verbose", is_flag=True, help="Print what is done; more details."),
        option("-S", "--stacked", is_flag=True, hidden=True),
        option("-P", "--peer", metavar="HOST", hidden=True),
        option("-n", "--sh-varname", "sh_varname", hidden=True, is_eager=False),
    ]


class AdmGroup(click.Group):
    """The commands of VERBS that begin with *prefix*, with drbdadm's answers to what is not one."""

    prefix = ""

    def list_commands(self, ctx: click.Context) -> list[str]:
        names = [name for name, verb in VERBS.items() if name.startswith(self.prefix) and not verb.hidden]
        return [name.removeprefix(self.prefix) for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(self.prefix + cmd_name)
        if verb is not None:
            return _command(verb)
        return _subgroup(self.prefix + cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None:
            name = drbd_names.called_as()
            raise Quit(EXIT_USAGE, f"{name}: Unknown command '{self.prefix}{args[0]}'\nAll commands: {name} --help")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, VERBS[self.prefix + name].help) for name in self.list_commands(ctx)])


def _subgroup(name: str) -> click.Command | None:
    """The group of the commands whose names begin with the word *name*; None when there are none."""
    if not any(found.startswith(f"{name} ") for found in VERBS):
        return None
    group = AdmGroup(name, params=_general_options(), context_settings={"help_option_names": ["-h", "--help"]})
    group.prefix = f"{name} "
    return group


def _command(verb: Verb) -> click.Command:
    params: list[click.Parameter] = [_own_option(option) for option in verb.options]
    taken = {name for param in params for name in param.opts}
    params += [p for p in _general_options() if not taken & set(p.opts)]
    params.append(click.Argument(["names"], nargs=-1, metavar=_metavar(verb)))

    def callback(names: tuple[str, ...], **given: Any) -> int:
        return _work(verb, click.get_current_context().ensure_object(General), names, given)

    return click.Command(
        verb.name.split(" ")[-1], params=params, callback=callback, help=verb.help, hidden=verb.hidden,
        context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def _own_option(option: Option) -> click.Option:
    names = [option.name, option.field]
    default = False if option.kind == "flag" else option.default
    kind = {"type": click.IntRange(min=1, max=option.most)} if option.kind == "count" else _KINDS[option.kind]
    return click.Option(names, help=option.help, default=default, **kind)


def _metavar(verb: Verb) -> str:
    return {"resource": "{all|RESOURCE}...", "volume": "{all|RESOURCE[/VOLUME]}..."}.get(verb.scope, verb.names)


# -------------------------------------------------------------------------------------------- work


def _work(verb: Verb, general: General, names: tuple[str, ...], given: dict[str, Any]) -> int:
    """Run *verb* for everything that *names* mean; the exit code."""
    session = Session(general)
    if verb.scope == "global":
        if names:
            complain("This command will ignore resource names!")
        return int(verb.run(session, **given))
    if verb.scope == "own":
        return int(verb.run(session, names, **given))
    if not names:
        complain(click.get_current_context().get_usage())
    targets = session.targets(names)
    for target in targets:
        check_scope(verb, target)
    worst = 0
    for target in targets:
        worst = max(worst, _one(verb, session, target, given))
        if worst >= EXIT_ABORT:
            break
    return worst


def _one(verb: Verb, session: Session, target: Target, given: dict[str, Any]) -> int:
    if session.general.dry_run and verb.name not in _PRINTS_ONLY:
        for line in dry_lines(verb, session, target, given):
            say(line)
        return 0
    if session.general.verbose and verb.name not in _PRINTS_ONLY:
        complain("\n".join(dry_lines(verb, session, target, given)))
    try:
        return int(verb.run(session, target, **given))
    except NotRunning as error:
        if verb.absent is not None:
            return verb.absent
        complain(str(error))
        return error.code
    except DaemonError as error:
        complain(str(error))
        return error.code


_PRINTS_ONLY: Final = frozenset(
    (
        "role", "cstate", "dstate", "get-gi", "show-gi", "sh-resource", "sh-dev", "sh-minor", "sh-ll-dev",
        "sh-md-dev", "sh-md-idx", "sh-ip", "sh-lr-of", "sh-udev", "sh-status", "split-brain", "sh-split-brain",
    )
)  # fmt: skip


# ---------------------------------------------------------------------------------------- the line


def reorder(argv: list[str]) -> list[str]:
    """Move options written in front of the command after ``--`` to where the command reads them.

    ``-- --discard-my-data connect r0`` becomes ``connect --discard-my-data r0``.
    """
    if "--" not in argv:
        return argv
    at = argv.index("--")
    rest = argv[at + 1 :]
    n_options = next((i for i, word in enumerate(rest) if not word.startswith("-")), len(rest))
    if n_options == len(rest) or n_options == 0 or any(word in VERBS for word in argv[:at]):
        return argv
    return [*argv[:at], rest[n_options], *rest[:n_options], *rest[n_options + 1 :]]


def _group() -> AdmGroup:
    def version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            say(adm_script.version_text())
            ctx.exit(0)

    def callback() -> None:
        ctx = click.get_current_context()
        if ctx.invoked_subcommand is None:
            complain(ctx.get_help())
            raise Quit(EXIT_USAGE, "No command specified")

    shown = click.Option(
        ["-V", "--version"], is_flag=True, is_eager=True, expose_value=False, callback=version,
        help="Print versions, for a shell to evaluate.",
    )  # fmt: skip
    return AdmGroup(
        "tandemadm", params=[*_general_options(), shown], callback=callback, invoke_without_command=True,
        help="Administrate replicated resources.", context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip


def run(argv: list[str]) -> int:
    """Run one command line; the exit code. Everything to say has been said on stdout and stderr."""
    name = drbd_names.called_as()
    try:
        words = drbd_names.from_drbdsetup(argv) if name == "drbdsetup" else reorder(argv)
        code = _group().main(words, prog_name=name, standalone_mode=False)
        sys.stdout.flush()
        return int(code or 0)
    except Quit as quit_:
        if str(quit_):
            complain(str(quit_))
        return quit_.code
    except click.UsageError as error:
        complain(f"{name}: {' '.join(error.format_message().split())}")
        return EXIT_SYNTAX
    except (click.Abort, KeyboardInterrupt):
        complain("Interrupted.")
        return EXIT_INTERRUPTED
    except DaemonError as error:
        complain(str(error))
        return error.code
    except PathError as error:
        complain(f"{error}.")
        return EXIT_ABORT
    except BrokenPipeError:
        # Whoever read our output has left; what remains must not be written at interpreter exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except Exception as error:
        return _report(error)


def _report(error: Exception) -> int:
    """Errors of modules that are not imported for every command; our own mistakes go on up."""
    from .conf import ConfigError

    if isinstance(error, ConfigError):
        complain(str(error))
        return EXIT_CONFIG
    if isinstance(error, OSError):
        complain(f"{error.filename or 'tandemadm'}: {error.strerror or error}")
        return EXIT_ABORT
    raise error


def main() -> None:
    """Entry point of ``tandemadm``."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
