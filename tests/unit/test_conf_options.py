"""The option tables: every range at its ends, units, and that tables and configuration values agree."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from tandem.repl.config import DiskOptions, NetOptions, ResourceOptions, StartupOptions
from tandem.tools.conf import GlobalOptions
from tandem.tools.conf_options import (
    AFTER_SB,
    DISK,
    FENCING,
    GLOBAL,
    HANDLERS,
    NET,
    OPTIONS,
    STARTUP,
    Kind,
    OptionSpec,
    Support,
    ValueProblem,
    convert,
)

VALUES = ((DiskOptions, DISK), (NetOptions, NET), (ResourceOptions, OPTIONS), (StartupOptions, STARTUP))
TABLES = {"global": GLOBAL, "startup": STARTUP, "options": OPTIONS, "disk": DISK, "net": NET}
ALL = [(table, spec) for table, specs in TABLES.items() for spec in specs.values()]
NUMBERS = [spec for _, spec in ALL if spec.kind is Kind.NUMBER]


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
def test_a_number_is_taken_from_its_lowest_to_its_highest_value(spec: OptionSpec) -> None:
    assert convert(spec, str(spec.low)) == spec.low
    assert convert(spec, str(spec.high)) == spec.high
    assert convert(spec, str(spec.default)) == spec.default
    for outside, nearest in ((spec.low - 1, spec.low), (spec.high + 1, spec.high)):
        if outside < 0:
            continue
        if spec.clamped:
            assert convert(spec, str(outside)) == nearest
            continue
        with pytest.raises(ValueProblem) as caught:
            convert(spec, str(outside))
        unit = spec.unit
        assert str(caught.value) == (
            f"{spec.name} {outside} => {outside}{unit} out of range [{spec.low}..{spec.high}]{unit}."
        )


@pytest.mark.parametrize("spec", NUMBERS, ids=lambda spec: spec.name)
@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1.5", "0x10", "10q", "1 0", "k", "8kk", "3S", "\u0663", "9" * 31]
)
def test_what_is_no_number(spec: OptionSpec, text: str) -> None:
    with pytest.raises(ValueProblem, match="is not a valid number"):
        convert(spec, text)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max-buffers", "8k", 8192), ("max-buffers", "8K", 8192), ("sndbuf-size", "1M", 1 << 20),
        ("ping-int", "00010", 10), ("congestion-fill", "1m", 2048), ("congestion-fill", "2048", 2048),
    ],
)  # fmt: skip
def test_net_units(name: str, text: str, value: int) -> None:
    assert convert(NET[name], text) == value


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("resync-rate", "33M", 33792), ("resync-rate", "250", 250), ("resync-rate", "1s", 1),
        ("c-max-rate", "4G", 4194304), ("size", "50k", 100), ("size", "7", 7), ("size", "1G", 2097152),
        ("c-fill-target", "3s", 3), ("rs-discard-granularity", "64k", 65536), ("al-extents", "7", 67),
        ("al-extents", "6433", 6433), ("al-extents", "99999", 65534),
    ],
)  # fmt: skip
def test_disk_units(name: str, text: str, value: int) -> None:
    assert convert(DISK[name], text) == value


def test_out_of_range_messages_are_in_the_options_unit() -> None:
    with pytest.raises(ValueProblem) as caught:
        convert(DISK["resync-rate"], "10G")
    assert str(caught.value) == "resync-rate 10G => 10485760k out of range [1..4194304]k."
    with pytest.raises(ValueProblem) as caught:
        convert(NET["timeout"], "8k")
    assert str(caught.value) == "timeout 8k => 8192 out of range [1..600]."


def test_booleans_and_enumerations() -> None:
    assert convert(NET["use-rle"], "yes") is True and convert(NET["use-rle"], "no") is False
    with pytest.raises(ValueProblem, match=r"use-rle: 'yes \| no \| ;' expected, but got 'maybe'"):
        convert(NET["use-rle"], "maybe")
    for _, spec in ALL:
        if spec.kind is Kind.ENUM:
            assert spec.default in spec.values
            assert all(convert(spec, value) == value for value in spec.values)
            with pytest.raises(ValueProblem, match=f"{spec.name}: '.*' expected, but got 'nonsense'"):
                convert(spec, "nonsense")


def test_strings_have_a_length() -> None:
    assert convert(NET["shared-secret"], "s" * 64) == "s" * 64
    with pytest.raises(ValueProblem, match="at most 64 bytes"):
        convert(NET["shared-secret"], "s" * 65)


@pytest.mark.parametrize(
    ("specs", "kind"),
    [
        (DISK, DiskOptions), (NET, NetOptions), (OPTIONS, ResourceOptions), (STARTUP, StartupOptions),
        (GLOBAL, GlobalOptions),
    ],
    ids=["disk", "net", "options", "startup", "global"],
)  # fmt: skip
def test_tables_and_values_agree(specs: dict[str, OptionSpec], kind: type) -> None:
    by_field = {spec.field: spec for spec in specs.values()}
    known = {field.name: field for field in fields(kind)}
    assert known.keys() <= by_field.keys(), "a value that no option can set"
    for name, spec in by_field.items():
        if spec.support is Support.EFFECTIVE and not (kind is NetOptions and name == "fencing"):
            assert name in known, f"{spec.name} is called effective but reaches nobody"
        if name not in known or spec.kind is Kind.NAMES:
            continue
        default = known[name].default
        if name == "fencing":
            assert default is FENCING[str(spec.default)]
        elif name.startswith("after_sb_"):
            assert default is AFTER_SB[str(spec.default)]
        else:
            assert default == spec.default and type(default) is type(spec.default)


def test_every_policy_can_be_written() -> None:
    for name in ("after-sb-0pri", "after-sb-1pri", "after-sb-2pri"):
        assert set(NET[name].values) <= AFTER_SB.keys()
    assert set(DISK["fencing"].values) == FENCING.keys() == set(NET["fencing"].values)


def test_handlers_of_both_versions_are_known() -> None:
    assert {"fence-peer", "unfence-peer", "split-brain", "quorum-lost", "local-io-error"} <= HANDLERS.keys()


def test_support_is_what_the_code_does() -> None:
    """An option is called effective exactly when something outside conf reads its field.

    Whoever makes another option work finds it here, and changes its mark in the table.
    """
    root = Path(__file__).resolve().parents[2]
    files = [p for room in ("repl", "repl/edge", "tools", "nbd") for p in (root / room).glob("*.py")]
    readers = [p for p in files if not p.name.startswith("conf")]  # repl/config.py only declares them
    text = "\n".join(p.read_text() for p in readers)
    wrong = []
    for kind, specs in VALUES:
        for spec in (s for s in specs.values() if s.field in {field.name for field in fields(kind)}):
            is_read = re.search(rf"\.{spec.field}\b|\"{spec.field}\"", text) is not None
            if (spec.support is Support.EFFECTIVE) != is_read:
                wrong.append(f"{spec.name}: {'read' if is_read else 'not read'}, but {spec.support.value}")
    assert wrong == []
