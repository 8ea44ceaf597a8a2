"""The repository itself: which way imports point, what each file may contain, what the documents claim."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest
from tandem.tools import adm
from tandem.tools.adm_verbs import VERBS

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 600
DOCSTRING_FROM = 8  # a public function shorter than this many lines may speak for itself

WORLD = {
    "asyncio", "uvloop", "socket", "os", "time", "random", "threading", "selectors", "subprocess", "signal",
    "secrets", "select", "pathlib", "tempfile", "concurrent",
}  # fmt: skip
NBD_EDGE = {"server", "listener", "blocking", "waiting", "nbdkit_plugin"}  # the half of nbd/ that touches the world
PROGRAMS = {"tandem.nbd.nbdkit_plugin"}  # run as __main__: outside the rooms, and nothing in it can be relative
MAY_IMPORT = {"repl": {"repl"}, "nbd": {"repl", "nbd"}, "tools": {"repl", "nbd", "tools"}}

# Words are put together here so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK")) + r")\b")
FOREIGN_WORDS = ("/wo" + "rk/", "/tmp/" + "b", "shared/" + "s", "sim-" + "bugs", "found" + r"ers?\b")
FOREIGN = re.compile("|".join(FOREIGN_WORDS))
SKIPS = re.compile(r"pytest\.skip\(|mark\." + r"skip|mark\." + r"xfail|pytest\." + r"xfail|importor" + "skip")
MAY_SKIP = {"tests/conftest.py", "tests/lab/conftest.py"}  # for a missing program; in CI that is a failure


@cache
def repository() -> tuple[Path, ...]:
    """Every file that belongs to the repository, tracked or about to be."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = (ROOT / name for name in sorted(set(listed.split("\0"))) if name)
    return tuple(path for path in paths if path.is_file() and not path.is_symlink())


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_files(*rooms: str) -> list[Path]:
    return [p for p in repository() if p.suffix == ".py" and (not rooms or name_of(p).split("/")[0] in rooms)]


@dataclass(frozen=True, slots=True)
class Import:
    """One import: the module it means, how it was written, and whether it happens when the program runs."""

    line: int
    module: str  # absolute; with the imported name behind it when that may be a module
    relative: bool
    running: bool


@dataclass(slots=True)
class Module:
    path: Path
    name: str  # tandem.repl.edge.disk
    tree: ast.Module
    imports: list[Import] = field(default_factory=list)

    @property
    def room(self) -> str:
        return self.name.split(".")[1]

    @property
    def is_pure(self) -> bool:
        if self.room == "repl":
            return not self.name.startswith("tandem.repl.edge")
        return self.room == "nbd" and self.path.stem not in NBD_EDGE


@cache
def modules() -> tuple[Module, ...]:
    found = []
    for path in python_files("repl", "nbd", "tools"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(("tandem", *parts)).removesuffix(".__init__")
        module = Module(path, name, ast.parse(path.read_text()))
        package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
        module.imports += _imports(module.tree, package, running=True)
        found.append(module)
    return tuple(found)


def _imports(node: ast.AST, package: list[str], running: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _imports(ast.Module([part], []), package, running=False)
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(child.lineno, alias.name, False, running)
        elif isinstance(child, ast.ImportFrom):
            base = package[: len(package) - child.level + 1] if child.level else []
            module = ".".join([*base, *filter(None, [child.module])])
            for alias in child.names:
                yield Import(child.lineno, f"{module}.{alias.name}", bool(child.level), running)
        inside_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _imports(child, package, running and not inside_function)


def complaints(lines: list[str]) -> str:
    return "\n" + "\n".join(lines)


# ------------------------------------------------------------------------------------------ imports


def test_the_pure_rooms_touch_nothing() -> None:
    bad = [
        f"{name_of(module.path)}:{found.line}: imports {found.module}"
        for module in modules()
        if module.is_pure
        for found in module.imports
        if found.module.split(".")[0] in WORLD
    ]
    assert not bad, complaints(bad)


def test_imports_point_down_between_rooms() -> None:
    bad = []
    for module in modules():
        for found in module.imports:
            parts = found.module.split(".")
            if parts[0] != "tandem":
                continue
            if parts[1] not in MAY_IMPORT["tools" if module.name in PROGRAMS else module.room]:
                bad.append(f"{name_of(module.path)}:{found.line}: {module.room} imports {found.module}")
            if module.is_pure and parts[:3] == ["tandem", "repl", "edge"] and found.running:
                bad.append(f"{name_of(module.path)}:{found.line}: the machine imports {found.module}")
    assert not bad, complaints(bad)


def test_imports_inside_a_room_are_relative_and_across_absolute() -> None:
    bad = []
    for module in modules():
        package = module.name.rpartition(".")[0]
        for found in module.imports:
            inside = found.module.startswith(package + ".") and module.name not in PROGRAMS
            if package != "tandem.repl.edge" and found.module.startswith("tandem.repl.edge."):
                inside = False  # a room of its own
            if found.relative and not found.module.startswith("tandem." + module.room):
                bad.append(f"{name_of(module.path)}:{found.line}: {found.module} is relative across rooms")
            if not found.relative and inside:
                bad.append(f"{name_of(module.path)}:{found.line}: {found.module} is absolute inside its room")
    assert not bad, complaints(bad)


def test_modules_do_not_import_in_a_circle() -> None:
    known = {module.name for module in modules()}
    edges = {
        module.name: {
            name
            for found in module.imports
            if found.running
            for name in (found.module, found.module.rpartition(".")[0])
            if name in known and name != module.name
        }
        for module in modules()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join((*way, name))
        if name not in done:
            for following in sorted(edges[name]):
                visit(following, (*way, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


# -------------------------------------------------------------------------------------------- files


def test_no_file_is_too_long() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in python_files()}
    long = [f"{name}: {n_lines} lines" for name, n_lines in lengths.items() if n_lines > LINES_MAX]
    assert not long, complaints(long)


def test_nothing_is_unfinished_or_from_somewhere_else() -> None:
    bad = []
    for path in repository():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # golden bytes
        for number, line in enumerate(text.splitlines(), 1):
            if UNFINISHED.search(line) or FOREIGN.search(line):
                bad.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not bad, complaints(bad)


def test_no_test_is_skipped_or_expected_to_fail() -> None:
    bad = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path in python_files("tests")
        if name_of(path) not in MAY_SKIP
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if SKIPS.search(line)
    ]
    assert not bad, complaints(bad)


def test_what_is_public_says_what_it_is() -> None:
    bad = []
    for module in modules():
        if not ast.get_docstring(module.tree) and module.tree.body:
            bad.append(f"{name_of(module.path)}:1: no docstring")
        for node in module.tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not (node.name.startswith("_") or ast.get_docstring(node) or _speaks_for_itself(node)):
                bad.append(f"{name_of(module.path)}:{node.lineno}: {node.name} has no docstring")
    assert not bad, complaints(bad)


def _speaks_for_itself(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Something short, the values of an enumeration, or a command whose help is in its decorator."""
    if (node.end_lineno or node.lineno) - node.lineno + 1 < DOCSTRING_FROM:
        return True
    if isinstance(node, ast.ClassDef):
        return any(ast.unparse(base).endswith(("Enum", "Flag")) for base in node.bases)
    return any("verb" in ast.unparse(decorator) for decorator in node.decorator_list)


# ---------------------------------------------------------------------------------------- packaging


def test_the_list_of_packages_is_the_tree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    directories = {path.parent.relative_to(ROOT) for path in python_files("repl", "nbd", "tools")}
    assert set(setuptools["packages"]) == {".".join(("tandem", *path.parts)) for path in directories}
    assert setuptools["package-dir"] == {f"tandem.{room}": room for room in ("repl", "nbd", "tools")}


def test_data_files_of_the_packages_are_packed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    suffixes = {path.suffix for path in repository() if name_of(path).split("/")[0] in MAY_IMPORT}
    packed = {Path(pattern).suffix for pattern in data}
    assert suffixes - packed <= {".py", ".md", ".pyx", ".pxi"}  # the compiled twins are built, not packed
    assert all((ROOT / room / "py.typed").exists() for room in MAY_IMPORT)


def test_nbd_yields_to_libnbd() -> None:
    assert not (ROOT / "nbd/__init__.py").exists() and not (ROOT / "tandem").exists()
    for room in MAY_IMPORT:
        link = ROOT / "tests/typing/tandem" / room
        assert link.is_symlink() and link.resolve() == ROOT / room


# ---------------------------------------------------------------------------------------- documents


ROOMS = (".", "repl", "repl/edge", "nbd", "tools", "tools/agents", "tests", "tests/sim", "docs", "benchmarks")


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_its_readme(room: str) -> None:
    path = ROOT / room / "README.md"
    assert path.exists() and path.read_text().startswith("# ")


def documents() -> list[Path]:
    return [path for path in repository() if path.suffix == ".md"]


def test_links_in_documents_lead_somewhere() -> None:
    bad = []
    for path in documents():
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text()):
            if "://" not in target and not (path.parent / target).exists():
                bad.append(f"{name_of(path)}: {target}")
    assert not bad, complaints(bad)


def test_files_that_a_room_lists_exist_and_all_are_listed() -> None:
    bad = []
    for room in ("repl", "repl/edge", "nbd", "tools", "tools/agents"):
        text = (ROOT / room / "README.md").read_text()
        named = set(re.findall(r"`([a-z_0-9]+)(?:\.py)?`", text)) | set(re.findall(r"([a-z_0-9]+)\.py", text))
        patterns = [p.replace("*", "[a-z_0-9]+") for p in re.findall(r"`([a-z_0-9]+\*)(?:\.py)?`", text)]
        for path in (ROOT / room).glob("*.py"):
            listed = path.stem in named or any(re.fullmatch(p, path.stem) for p in patterns)
            if path.stem != "__init__" and not listed:
                bad.append(f"{room}/README.md does not mention {path.name}")
        for stem in re.findall(r"^\| `([a-z_0-9]+)\.py`", text, re.MULTILINE):
            if not (ROOT / room / f"{stem}.py").exists():
                bad.append(f"{room}/README.md lists {stem}.py, which does not exist")
    assert not bad, complaints(bad)


COMMAND = re.compile(r"\btandemadm((?: -[-a-z]+(?:[ =][^ `-]+)?)*) ([a-z][-a-z0-9]+)\b")


def test_commands_in_documents_exist() -> None:
    assert adm.COMMANDS  # fills VERBS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    bad = []
    for path in documents():
        code = "\n".join(re.findall(r"^(?:    |```).*|`[^`\n]+`", path.read_text(), re.MULTILINE))
        for _, word in COMMAND.findall(code):
            if word not in VERBS and not any(name.startswith(f"{word} ") for name in VERBS):
                bad.append(f"{name_of(path)}: tandemadm {word}")
        for word in re.findall(r"\bmake ([a-z-]+)\b", code):
            if word not in targets:
                bad.append(f"{name_of(path)}: make {word}")
    assert not bad, complaints(bad)


def test_make_describes_every_target() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY:(.*)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
    described = set(re.findall(r"^([a-z-]+):.*?## ", text, re.MULTILINE))
    assert phony - described == {"programs"}
