"""The option tables of drbd.conf: names, types, units, ranges, defaults, and what has an effect here.

The facts are those of DRBD 8.4's programs (`drbdsetup-84 xml-help attach`, `connect`, …; a test compares
them), widened where DRBD 9 allows more and nothing speaks against it (c-max-rate 0 is "no limit").
Defaults of c-fill-target and c-max-rate are ours, see `repl/config.py`.

*Support* says what becomes of an option: EFFECTIVE ones reach the machine; NOTHING_TO_DO ones ask a kernel
driver for something that does not exist in userspace, or is always so; NOT_IMPLEMENTED ones are accepted
with one warning, unless they are given the value that describes what happens anyway.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tandem.repl.config import AfterSb, Fencing

Value = int | bool | str


class Kind(Enum):
    NUMBER = "number"
    BOOL = "bool"
    ENUM = "enum"
    STRING = "string"
    FLAG = "flag"  # stands alone, or with its value where the global section has its own rules
    NAMES = "names"  # one or more host names


class Support(Enum):
    EFFECTIVE = "effective"
    NOTHING_TO_DO = "nothing to do"
    NOT_IMPLEMENTED = "not implemented"


@dataclass(frozen=True, slots=True)
class OptionSpec:
    """One option. *low*, *high* and a numeric *default* are in the option's own *unit*: "" plain,
    "k" KiB, "s" sectors. A *clamped* number is never out of range."""

    name: str
    kind: Kind
    default: Value = ""
    low: int = 0
    high: int = 0
    unit: str = ""
    values: tuple[str, ...] = ()
    clamped: bool = False
    support: Support = Support.EFFECTIVE

    @property
    def field(self) -> str:
        """The name of the field in `repl.config`."""
        return self.name.replace("-", "_")


class ValueProblem(Exception):
    """A value its option does not take; the text is drbdadm's and names the option."""


_NUMBER = re.compile(r"([0-9]{1,30})([kKmMgGs]?)\Z")
_SCALE: Final = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "s": 1 << 9}
_UNIT_BYTES: Final = {"": 1, "k": 1 << 10, "s": 1 << 9}


def number(spec: OptionSpec, text: str) -> int:
    """*text* in the option's unit. A bare number is in that unit, a suffixed one in bytes (rounded up).

    Source: drbd.conf(5), "Units"; the sentences are those of drbdadm 8.4.
    """
    match = _NUMBER.match(text)
    if match is None:
        raise ValueProblem(f"{spec.name}: '{text}' is not a valid number; a decimal number with an optional "
                           "suffix k, M, G or s is expected")  # fmt: skip
    value, suffix = int(match[1]), match[2].lower()
    if suffix:
        unit = _UNIT_BYTES[spec.unit]
        value = -(-value * _SCALE[suffix] // unit)
    if spec.clamped:
        return min(max(value, spec.low), spec.high)
    if not spec.low <= value <= spec.high:
        raise ValueProblem(f"{spec.name} {text} => {value}{spec.unit} out of range "
                           f"[{spec.low}..{spec.high}]{spec.unit}.")  # fmt: skip
    return value


def convert(spec: OptionSpec, text: str) -> Value:
    """The value of *text* for this option; ValueProblem when it takes no such value."""
    if spec.kind is Kind.NUMBER:
        return number(spec, text)
    if spec.kind is Kind.BOOL:
        if text not in ("yes", "no"):
            raise ValueProblem(f"{spec.name}: 'yes | no | ;' expected, but got '{text}'")
        return text == "yes"
    if spec.kind is Kind.ENUM and text not in spec.values and not _nominates(spec, text):
        raise ValueProblem(f"{spec.name}: '{' | '.join(spec.values)}' expected, but got '{text}'")
    if spec.kind is Kind.STRING and spec.high and len(text.encode("utf-8", "surrogateescape")) > spec.high:
        raise ValueProblem(f"{spec.name}: a string of at most {spec.high} bytes expected")
    return text


NOMINATION: Final = "discard-node-"  # after-sb-0pri discard-node-NAME: who loses, by name


def _nominates(spec: OptionSpec, text: str) -> bool:
    return spec.name == "after-sb-0pri" and text.startswith(NOMINATION) and len(text) > len(NOMINATION)


# ---------------------------------------------------------------------------------------- the tables


def _number(name: str, low: int, high: int, default: int, unit: str = "", *, clamped: bool = False,
            support: Support = Support.EFFECTIVE) -> OptionSpec:  # fmt: skip
    return OptionSpec(name, Kind.NUMBER, default, low, high, unit, clamped=clamped, support=support)


def _bool(name: str, default: bool, support: Support = Support.EFFECTIVE) -> OptionSpec:
    return OptionSpec(name, Kind.BOOL, default, support=support)


def _enum(name: str, values: str, support: Support = Support.EFFECTIVE, default: str = "") -> OptionSpec:
    """An enumeration; the first value is the default unless another is named."""
    words = tuple(values.split())
    return OptionSpec(name, Kind.ENUM, default or words[0], values=words, support=support)


def _string(name: str, longest: int = 0, support: Support = Support.EFFECTIVE) -> OptionSpec:
    return OptionSpec(name, Kind.STRING, "", high=longest, support=support)


def _flag(name: str, support: Support = Support.EFFECTIVE) -> OptionSpec:
    return OptionSpec(name, Kind.FLAG, False, support=support)


def _table(*specs: OptionSpec) -> dict[str, OptionSpec]:
    return {spec.name: spec for spec in specs}


_LATER: Final = Support.NOT_IMPLEMENTED
_MOOT: Final = Support.NOTHING_TO_DO

GLOBAL: Final = _table(
    _flag("disable-ip-verification"),  # in the order in which drbdadm prints them
    _number("minor-count", 1, 255, 32, support=_MOOT),
    _number("dialog-refresh", 0, 600, 1),
    _enum("usage-count", "ask yes no", _MOOT),
    _flag("udev-always-use-vnr", _MOOT),
    _number("cmd-timeout-short", 0, 900, 5),
    _number("cmd-timeout-medium", 0, 900, 121),
    _number("cmd-timeout-long", 0, 900, 600),
)

STARTUP: Final = _table(
    _number("wfc-timeout", 0, 300000, 0),
    _number("degr-wfc-timeout", 0, 300000, 0),
    _number("outdated-wfc-timeout", 0, 300000, 0),
    _bool("wait-after-sb", False),
    OptionSpec("become-primary-on", Kind.NAMES),
    _flag("stacked-timeouts", _MOOT),
)

_QUORUM: Final = "off majority all " + " ".join(str(n) for n in range(1, 33))

OPTIONS: Final = _table(
    _string("cpu-mask", 256, _LATER),
    _enum("on-no-data-accessible", "io-error suspend-io"),
    _bool("auto-promote", False),
    # From here on DRBD 9's, for which two nodes need nothing or which are not there yet.
    _number("auto-promote-timeout", 0, 600, 20, support=_MOOT),
    _enum("quorum", _QUORUM, _LATER),
    _enum("quorum-minimum-redundancy", _QUORUM, _LATER),
    _enum("on-no-quorum", "suspend-io io-error", _MOOT),
    _enum("on-suspended-primary-outdated", "disconnect force-secondary", _LATER),
    _number("twopc-timeout", 50, 600, 300, support=_MOOT),
    _number("twopc-retry-timeout", 1, 50, 1, support=_MOOT),
    _number("peer-ack-window", 2048, 204800, 4096, "s", support=_MOOT),
    _number("peer-ack-delay", 1, 10000, 100, support=_MOOT),
    _number("max-io-depth", 4, 4294967295, 8000, support=_LATER),
    _bool("drbd8-api-compatibility", False, _MOOT),
)

_FENCING: Final = "dont-care resource-only resource-and-stonith"
_STRIPES: Final = " ".join(f"{size}-striping" for size in ("32K", "64K", "128K", "256K", "512K", "1M"))

DISK: Final = _table(
    _number("size", 0, 2199023255552, 0, "s"),
    _number("max-bio-bvecs", 0, 128, 0, support=_MOOT),
    _enum("on-io-error", "pass_on call-local-io-error detach", default="detach"),
    _enum("fencing", _FENCING),
    _bool("disk-barrier", False, _LATER),
    _bool("disk-flushes", True),
    _bool("disk-drain", True),
    _bool("md-flushes", True),
    _number("resync-rate", 1, 4194304, 250, "k"),
    _string("resync-after", support=_LATER),
    _number("al-extents", 67, 65534, 1237, clamped=True),
    _bool("al-updates", True),
    _bool("discard-zeroes-if-aligned", True, _MOOT),  # a discard leaves zeroes on both nodes
    _bool("disable-write-same", False, _MOOT),
    _number("c-plan-ahead", 0, 300, 20),
    _number("c-delay-target", 1, 100, 10),
    _number("c-fill-target", 0, 1048576, 0, "s"),
    _number("c-max-rate", 0, 4194304, 0, "k"),
    _number("c-min-rate", 0, 4194304, 250, "k"),
    _number("disk-timeout", 0, 6000, 0, support=_LATER),
    _enum("read-balancing", "prefer-local prefer-remote round-robin least-pending when-congested-remote "
          + _STRIPES, _LATER),
    _number("rs-discard-granularity", 0, 1048576, 0),
    # DRBD 9's.
    _bool("bitmap", True, _LATER),
    _bool("resync-without-replication", True, _MOOT),
    _bool("peer-tiebreaker", True, _MOOT),
    _number("max-bio-size", 512, 1048576, 1048576, support=_MOOT),
    _number("block-size", 512, 4096, 512, support=_LATER),
    _number("discard-granularity", 0, 134217728, 0, support=_LATER),
    OptionSpec("use-bmbv", Kind.BOOL, False, support=_MOOT),
)  # fmt: skip

_AS0P: Final = ("disconnect discard-younger-primary discard-older-primary discard-zero-changes "
                "discard-least-changes discard-local discard-remote")  # fmt: skip

NET: Final = _table(
    _enum("protocol", "A B C", default="C"),
    _number("timeout", 1, 600, 60),
    _number("max-epoch-size", 1, 20000, 2048),
    _number("max-buffers", 32, 131072, 2048, support=_MOOT),  # the driver's page pool
    _number("unplug-watermark", 1, 131072, 128, support=_MOOT),
    _number("connect-int", 1, 120, 10),
    _number("ping-int", 1, 120, 10),
    _number("sndbuf-size", 0, 10485760, 0),
    _number("rcvbuf-size", 0, 10485760, 0),
    _number("ko-count", 0, 200, 7),
    _bool("allow-two-primaries", False),
    _string("cram-hmac-alg"),
    _string("shared-secret", 64),
    _enum("after-sb-0pri", _AS0P),
    _enum("after-sb-1pri",
          "disconnect consensus discard-secondary call-pri-lost-after-sb violently-as0p"),
    _enum("after-sb-2pri", "disconnect call-pri-lost-after-sb violently-as0p"),
    _bool("always-asbp", False),
    _enum("rr-conflict", "disconnect call-pri-lost violently retry-connect auto-discard"),
    _number("ping-timeout", 1, 300, 5),
    _string("data-integrity-alg"),
    _bool("tcp-cork", True, _MOOT),  # a batch is one system call
    _enum("on-congestion", "block pull-ahead disconnect", _LATER),
    _number("congestion-fill", 0, 20971520, 0, "s", support=_LATER),
    _number("congestion-extents", 67, 65534, 1237, support=_LATER),
    _string("csums-alg"),
    _bool("csums-after-crash-only", False),
    _string("verify-alg"),
    _bool("use-rle", True),
    _number("socket-check-timeout", 0, 300, 0),
    # DRBD 9's.
    _enum("fencing", _FENCING),
    _bool("allow-remote-read", True, _LATER),
    _enum("transport", "tcp rdma lb-tcp", _LATER),
    _bool("load-balance-paths", False, _LATER),
    _bool("tls", False, _LATER),
    _string("tls-keyring", support=_LATER),
    _string("tls-privkey", support=_LATER),
    _string("tls-certificate", support=_LATER),
    _number("rdma-ctrl-rcvbuf-size", 0, 10485760, 0, support=_MOOT),
    _number("rdma-ctrl-sndbuf-size", 0, 10485760, 0, support=_MOOT),
    _string("_name", support=_MOOT),
)  # fmt: skip

HANDLER_NAMES: Final = (
    "pri-on-incon-degr", "pri-lost-after-sb", "pri-lost", "initial-split-brain", "split-brain",
    "local-io-error", "fence-peer", "unfence-peer", "before-resync-source", "before-resync-target",
    "after-resync-source", "after-resync-target", "out-of-sync", "quorum-lost", "disconnected",
)  # fmt: skip
HANDLERS: Final = {
    name: OptionSpec(name, Kind.STRING, support=_LATER if name in ("quorum-lost", "disconnected") else
                     Support.EFFECTIVE)
    for name in HANDLER_NAMES
}  # fmt: skip

OLD_NAMES: Final = {"rate": "resync-rate", "after": "resync-after", "outdate-peer": "fence-peer"}
# Values of effective options that only DRBD 9 has: accepted with a warning, the default is used.
UNSUPPORTED_VALUES: Final = frozenset({
    ("rr-conflict", "retry-connect"), ("rr-conflict", "auto-discard"), ("on-congestion", "disconnect"),
})  # fmt: skip
SYNCER_IGNORED: Final = (
    "delay-probe-volume", "delay-probe-interval", "throttle-threshold", "hold-off-threshold",
)  # fmt: skip

AFTER_SB: Final = {policy.name.lower().replace("_", "-"): policy for policy in AfterSb}
FENCING: Final = {policy.name.lower().replace("_", "-"): policy for policy in Fencing}

# The sections in which a warning's "NAME" may stand, by the section's keyword.
SECTIONS: Final = {
    "net": NET, "disk": DISK, "options": OPTIONS, "startup": STARTUP, "handlers": HANDLERS,
}  # fmt: skip
