"""Whatever the bytes: `load` returns a configuration or raises ConfigError, and so do its readers."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tandem.tools.conf import ConfigError, Configuration, check, dump, dump_xml, load, up_commands
from tandem.tools.conf_options import SECTIONS

from tests.conf_files import EXAMPLE, HOSTS, RESOURCE, resource

NODES = ("a", "alpha", "b", "c", "")

HEADS = (
    """
resource r0|resource|common|global|skip|on a|on b|on a b|floating 10.0.0.1:7|floating ipv6 [fd00::1]:7|
stacked-on-top-of r0|net|disk|options|startup|handlers|syncer|proxy|proxy on a|plugin|volume 0|volume|
connection|connection x|connection-mesh|path|host a via proxy on c|_this_host|_remote_host|"net"|x y z
""".replace("\n", "")
    .strip("|")
    .split("|")
)
WORDS = """
{ } : ; resource include skip on address 10.0.0.1:7000 10.0.0.2:7000 ipv6 [fd00::1]:7 ipv4 sdp [3] hosts host
a b c device minor 1 2 meta-disk internal flexible-meta-disk /dev/drbd0 /dev/drbd1 drbd_x /dev/x /dev/y none
"" " " "é" nbd://127.0.0.1:1/x nbd+unix:///x?socket=/s "nbd://[" node-id 3 yes no timeout 50 protocol C via
ignore-on template-file all both discard-node-a usage-count require-drbd-module-version-ge 9.0 1k port
99999999999999999999 alternate-link-address tiebreaker dialog-refresh disable-ip-verification
""".split()  # noqa: SIM905
WORDS += [name for table in SECTIONS.values() for name in table]

plain = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(lambda words: " ".join(words) + ";\n")
statements = st.recursive(
    plain,
    lambda inner: st.tuples(st.sampled_from(HEADS), st.lists(inner, max_size=6)).map(
        lambda part: f"{part[0]} {{\n{''.join(part[1])}}}\n"
    ),
    max_leaves=25,
)


def read_everything(data: bytes) -> Configuration | None:
    """Load *data* and use the result in every way; ConfigError is the only exception there may be."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "fuzz.conf"
        path.write_bytes(data)
        try:
            configuration = load(str(path))
        except ConfigError as error:
            assert str(error).startswith(f"{path}:") and "\n" not in str(error)
            str(error).encode()  # it can be printed
            return None
        for node in NODES:
            configuration.ignored(node)
            dump(configuration, node).encode()
            dump(configuration, node, merged=True)
            try:
                configs = configuration.for_node(node)
            except ConfigError as error:
                str(error).encode()
                continue
            for name, config in configs.items():
                check(config)
                up_commands(configuration, node, name)
        dump_xml(configuration)
        return configuration


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes(data: bytes) -> None:
    read_everything(data)


@settings(max_examples=200, deadline=None)
@given(st.lists(statements, max_size=5))
def test_random_statements(parts: list[str]) -> None:
    read_everything("".join(parts).encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(statements, max_size=4))
def test_random_statements_inside_a_resource(parts: list[str]) -> None:
    read_everything(resource("".join(parts)).encode())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(SECTIONS)), st.lists(plain, max_size=4))
def test_random_options(section: str, parts: list[str]) -> None:
    read_everything(resource(f"{section} {{ {''.join(parts)} }}").encode())


@pytest.mark.parametrize("seed", range(6))
def test_a_valid_file_with_mistakes(seed: int) -> None:
    """Tokens of valid files removed, doubled, swapped or replaced."""
    dice = random.Random(seed)
    texts = [EXAMPLE, resource(), resource("connection { host a; host b; }") + resource(name="r1")]
    accepted = 0
    for _ in range(60):
        tokens = dice.choice(texts).replace(";", " ; ").replace("{", " { ").replace("}", " } ").split(" ")
        for _ in range(dice.choice((1, 1, 2, 5))):
            at = dice.randrange(len(tokens))
            match dice.randrange(4):
                case 0:
                    del tokens[at]
                case 1:
                    tokens.insert(at, tokens[at])
                case 2:
                    tokens[at] = dice.choice(WORDS + HEADS)
                case _:
                    other = dice.randrange(len(tokens))
                    tokens[at], tokens[other] = tokens[other], tokens[at]
        accepted += read_everything(" ".join(tokens).encode()) is not None
    assert accepted, "no mutant was accepted, so nothing but the parser was exercised"


def test_the_seeds_are_valid() -> None:
    for text in (EXAMPLE, resource(), f"resource r0 {{ {RESOURCE} {HOSTS} }}"):
        assert read_everything(text.encode()) is not None


@pytest.mark.parametrize("end", range(0, len(EXAMPLE), 7))
def test_a_truncated_file(end: int) -> None:
    read_everything(EXAMPLE[:end].encode())


def test_binary_files() -> None:
    for path in ("/bin/true", "/usr/bin/python3"):
        with pytest.raises(ConfigError):
            load(path)
