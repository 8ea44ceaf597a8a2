"""Runs a transcript: reads its steps, performs them, and gives back the same text with what happened.

A transcript has three kinds of lines. A line that starts at the margin is a step, or begins with ``given``
and sets the scene; ``#`` starts a comment; an indented line is output, and replaced. See README.md for the
steps there are.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from tandem.repl.config import AfterSb, DiskOptions, Fencing, NetOptions, ResourceOptions
from tandem.repl.requests import FUA, Op

from .pair import NAMES, Given, Node, Pair

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
OPS = {"read": Op.READ, "write": Op.WRITE, "trim": Op.TRIM, "zeroes": Op.ZEROES, "flush": Op.FLUSH}
ENUMS: dict[str, type[Fencing] | type[AfterSb]] = {
    "fencing": Fencing, "after_sb_0pri": AfterSb, "after_sb_1pri": AfterSb, "after_sb_2pri": AfterSb,
}  # fmt: skip


def number(text: str) -> int:
    """A count of bytes: 4096, 4K, 64M."""
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


def option(kind: type[Any], text: str) -> tuple[str, Any]:
    """``ko-count=2`` as the field and its value."""
    name, _, word = text.partition("=")
    name = name.replace("-", "_")
    types = {f.name: f.type for f in fields(kind)}
    if name in ENUMS:
        return name, ENUMS[name][word.upper().replace("-", "_")]
    match types[name]:
        case "int":
            return name, int(word)
        case "bool":
            return name, word == "yes"
        case _:
            return name, word


def give(given: Given, words: list[str]) -> None:
    """One ``given`` line."""
    both = [0, 1]
    if words[0] in ("a", "b"):
        both, words = [NAMES.index(words[0])], words[1:]
    match words:
        case ["size", size]:
            given.size = number(size)
        case ["volumes", n]:
            given.n_volumes = int(n)
        case ["disks", "fresh" | "in-sync" as how]:
            for i in both:
                given.fresh[i] = how == "fresh"
        case ["no", "disk"]:
            for i in both:
                given.diskless[i] = True
        case ["disk", *options]:
            for i in both:
                given.disk[i] |= dict(option(DiskOptions, o) for o in options)
        case ["net", *options]:
            for i in both:
                given.net[i] |= dict(option(NetOptions, o) for o in options)
        case ["options", *options]:
            given.options |= dict(option(ResourceOptions, o) for o in options)
        case ["handler", name]:
            given.handlers.append(name)
        case ["random", *values]:
            for i in both:
                given.random[i] += [int(v, 16) for v in values]
        case ["resolver", node]:
            given.resolver = NAMES.index(node)
        case ["show", "disk"]:
            given.show_disk = True
        case _:
            raise ValueError(f"given {' '.join(words)}?")


def node_step(node: Node, words: list[str]) -> None:
    """What is done at one node; the last word ``volume=N`` picks a volume."""
    volume: int | None = None
    if words[-1].startswith("volume="):
        volume, words = int(words[-1][7:]), words[:-1]
    match words:
        case ["start"]:
            node.start()
        case ["up"]:
            node.start()
            node.command("attach", None, {})
            node.pair.settle()
            node.command("connect", None, {})
        case ["kill"]:
            node.crash(power=False)
        case ["power-cut"]:
            node.crash(power=True)
        case ["open"]:
            node.opened(1)
        case ["close"]:
            node.opened(0)
        case ["hold", *what]:
            node.held |= set(what)
        case ["go", *what]:
            node.held -= set(what)
        case ["fail", n]:
            node.n_failing = int(n)
        case ["handler", name, code]:
            node.handler_exits(name, int(code))
        case ["flush"]:
            node.submit(Op.FLUSH, volume or 0, 0, 0, 0)
        case ["read" | "write" | "trim" | "zeroes" as op, offset, length, *flags]:
            fua = FUA if "fua" in flags else 0
            node.submit(OPS[op], volume or 0, number(offset), number(length), fua)
        case [command, *options]:
            args = {o.lstrip("-").partition("=")[0].replace("-", "_"): True for o in options}
            node.command(command, volume, args)


def step(pair: Pair, line: str) -> None:
    """One line at the margin."""
    who, colon, rest = line.partition(":")
    if colon and who in ("a", "b", "both"):
        chosen = pair.nodes if who == "both" else (pair.nodes[NAMES.index(who)],)
        for node in chosen:
            node_step(node, rest.split())
        pair.settle()
        return
    match line.split():
        case ["cut"]:
            pair.cut()
        case ["heal"]:
            pair.network_up = True
        case ["reset"]:
            pair.reset()
        case ["compare"]:
            pair.compare()
        case ["wait", seconds]:
            pair.run_until(pair.now + float(seconds))
        case _:
            raise ValueError(f"{line}?")
    pair.settle()


def perform(text: str) -> str:
    """Run the transcript *text*; returns it with the output of this run."""
    given = Given()
    pair: Pair | None = None
    out: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") or line.startswith("\t"):
            continue
        out.append(line.rstrip())
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("given "):
            assert pair is None, "the scene is set before the first step"
            give(given, line.split()[1:])
            continue
        pair = pair or Pair(given)
        step(pair, line)
        out += pair.end_step()
    return "\n".join(out) + "\n"


def transcripts() -> list[Path]:
    return sorted(Path(__file__).parent.glob("*.txt"))
