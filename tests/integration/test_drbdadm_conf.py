"""Our reading of drbd.conf against the real drbdadm: the DRBD 8.4 front end of drbd-utils, and the 9 one.

The 8.4 front end needs no kernel module for `sh-nop`, `dump`, `dump-xml` and dry runs. The same file goes
to both; both accept or both refuse, and print the same configuration and commands.
"""

from __future__ import annotations

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest
from tandem.tools.conf import ConfigError, Configuration, dump, dump_xml, load, up_commands
from tandem.tools.conf_options import DISK, NET, OPTIONS, Kind, OptionSpec, ValueProblem, convert

from tests.conf_files import EXAMPLE, HOSTS, RESOURCE, resource

DRBDADM_84 = Path("/lib/drbd/drbdadm-84")
DRBDSETUP_84 = Path("/lib/drbd/drbdsetup-84")

Drbdadm = Callable[..., subprocess.CompletedProcess[str]]


def run(node: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "__DRBD_NODE__": node, "DRBD_DONT_WARN_ON_VERSION_MISMATCH": "1"}
    return subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="session")
def drbdadm_84() -> Drbdadm:
    """``drbdadm_84(file, node, arguments…)`` runs the 8.4 front end."""
    assert DRBDADM_84.exists(), f"{DRBDADM_84} is missing: install drbd-utils"
    return lambda file, node, *arguments: run(node, str(DRBDADM_84), "-c", str(file), *arguments)


@pytest.fixture(scope="session")
def drbdadm_9() -> Drbdadm:
    """``drbdadm_9(file, node, arguments…)`` runs the current front end."""
    assert Path("/usr/sbin/drbdadm").exists(), "/usr/sbin/drbdadm is missing: install drbd-utils"
    return lambda file, node, *arguments: run(node, "/usr/sbin/drbdadm", "-c", str(file), *arguments)


TRUST = "global { disable-ip-verification; usage-count no; }\n"
HOSTS_1 = HOSTS.replace("7000", "7001")
OTHER = "device /dev/drbd1; disk /dev/y; meta-disk internal;"
EXTERNAL = "device /dev/drbd1; disk /dev/y; meta-disk /dev/m"

GOOD = {
    "example": EXAMPLE.replace("alpha", "a").replace("beta", "b"),
    "minimal": TRUST + resource(),
    "two resources": TRUST + resource() + resource(name="r1", volume=OTHER, hosts=HOSTS_1),
    "ignored": TRUST + resource(hosts=HOSTS.replace("on a", "on c")),
    "repeated option": TRUST
    + resource("net { timeout 50; timeout 60; } disk { no-disk-barrier; no-md-flushes; }"),
    "protocol places": TRUST + resource("protocol a; net { protocol B; ping-int 3; }"),
    "common protocol": TRUST + "common { protocol B; net { ping-int 3; } }" + resource("net { timeout 50; }"),
    "late global": resource() + TRUST,
    "names": TRUST + resource(name='"r 0"', hosts=HOSTS.replace("on b", "on b1 b2")),
    "device names": TRUST + resource(volume=RESOURCE.replace("/dev/drbd0", "drbd7 minor 7")),
    "minor only": TRUST + resource(volume=RESOURCE.replace("/dev/drbd0", "minor 6")),
    "named device": TRUST + resource(volume=RESOURCE.replace("/dev/drbd0", "/dev/drbd_db minor 6")),
    "external": TRUST + resource(volume=EXTERNAL + "[3];"),
    "flexible": TRUST + resource(volume=EXTERNAL + ";"),
    "flexible keyword": TRUST + resource(volume="device minor 1; disk /dev/y; flexible-meta-disk /dev/m;"),
    "flexible internal": TRUST + resource(volume="device minor 1; disk /dev/y; flexible-meta-disk internal;"),
    "volumes": TRUST
    + resource(
        "disk { resync-rate 2M; on-io-error pass_on; }",
        volume="volume 0 { device minor 1; disk /dev/v0; meta-disk internal; }"
        "volume 1 { device minor 2; meta-disk /dev/m [1]; }",
        hosts="on a { volume 1 { disk /dev/a; disk { resync-rate 3M; c-min-rate 9; } } address 10.0.0.1:1; }"
        "on b { volume 1 { disk /dev/b; } address 10.0.0.2:1; }",
    ),
    "inheritance": TRUST
    + "common { disk { on-io-error detach; resync-rate 7M; md-flushes no; } net { timeout 50; protocol A; }"
    ' handlers { split-brain "x y"; } startup { wfc-timeout 3; } options { cpu-mask 3; } }'
    + resource(
        'disk { resync-rate 2M; c-min-rate 1; } net { timeout 60; } handlers { fence-peer "\\"q\\""; }'
        " startup { wait-after-sb; degr-wfc-timeout 4; }"
    ),
    "startup": TRUST
    + resource(
        "startup { become-primary-on both; stacked-timeouts; wfc-timeout 5; } net { allow-two-primaries; }"
    ),
    "named primary": TRUST + resource("startup { become-primary-on a b; wait-after-sb no; }"),
    "syncer": TRUST + resource("syncer { rate 10M; al-extents 66; verify-alg md5; cpu-mask 3; use-rle; }"),
    "handlers": TRUST
    + resource(
        'handlers { fence-peer "/bin/x -a \'b\' \\"c\\""; outdate-peer /bin/f; pri-lost "x \\\\ y"; }'
    ),
    "secrets": TRUST + resource('net { shared-secret "a,b\'c;d$e f"; cram-hmac-alg "0"; verify-alg ""; }'),
    "policies": TRUST
    + resource("net { after-sb-0pri discard-node-a; after-sb-1pri consensus; rr-conflict violently; }"),
    "units": TRUST
    + resource("disk { size 50k; c-fill-target 10M; resync-rate 1s; } net { sndbuf-size 1M; }"),
    "floating": TRUST + resource(hosts="floating 127.0.0.1:7000; floating 192.0.2.9:7001 { disk /dev/z; }"),
    "floating elsewhere": TRUST
    + resource(hosts="floating 192.0.2.8:1; floating ipv6 [2001:db8::1]:7001 { disk /dev/z; }"),
    "ipv6": TRUST
    + resource(hosts="on a { address ipv6 [2001:db8::1]:1; } on b { address ipv6 [fe80::1%lo]:1; }"),
    "old families": TRUST + resource(hosts=HOSTS.replace("address", "address ssocks")),
    "skip": TRUST + "skip foo { a { b ; } }\nskip { }" + resource(),
    "proxy options": TRUST + resource("proxy { memlimit 100M; plugin { zlib level 9; lzma; } }"),
    "comments": "# x { \n" + TRUST + resource("# }\n") + "# no newline at the end",
    "global": "global { cmd-timeout-long 3; cmd-timeout-short 4; cmd-timeout-medium 7; minor-count 3; "
    "dialog-refresh 5; "
    "usage-count yes; disable-ip-verification; }" + resource(),
    "empty": "",
    "pattern without match": TRUST + 'include "nothing-*.res";',
}


def ours(file: Path) -> Configuration:
    return load(str(file))


def their_dump(text: str) -> list[str]:
    """The lines of a dump without the timeouts that the 8.4 front end shows with wrong defaults."""
    lines = [line for line in text.splitlines() if not line.startswith("    cmd-timeout-")]
    return [line for i, line in enumerate(lines) if lines[i : i + 2] != ["global {", "}"]]


@pytest.fixture(params=sorted(GOOD))
def good(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    file = tmp_path / "good.conf"
    file.write_text(GOOD[request.param])
    return file


def test_good_files_are_printed_alike(good: Path, drbdadm_84: Drbdadm) -> None:
    configuration = ours(good)
    for merged in (False, True):
        theirs = drbdadm_84(good, "a", *(["-d", "-v"] if merged else []), "dump")
        assert theirs.returncode == 0, theirs.stderr
        text = dump(configuration, "a", merged=merged)
        mine = [line for line in text.splitlines() if not line.startswith("    cmd-timeout-")]
        expected = their_dump(theirs.stdout)
        if merged:  # the 8.4 front end leaves out file name, global and common here when a resource is there
            assert _resources(mine) == _resources(expected)
        else:
            assert mine == expected


def _resources(lines: list[str]) -> list[str]:
    start = next((i for i, line in enumerate(lines) if line.startswith("# resource")), len(lines))
    return lines[start:]


def test_good_files_are_the_same_xml(good: Path, drbdadm_84: Drbdadm) -> None:
    theirs = drbdadm_84(good, "a", "dump-xml")
    assert theirs.returncode == 0, theirs.stderr
    configuration = ours(good)
    mine = dump_xml(configuration)
    ElementTree.fromstring(mine)
    if configuration.resources or configuration.global_section.options:
        assert mine == theirs.stdout


def test_good_files_give_the_same_commands(good: Path, drbdadm_84: Drbdadm) -> None:
    configuration = ours(good)
    for node in ("a", "b"):
        for name in configuration.for_node(node):
            theirs = drbdadm_84(good, node, "-d", "up", name)
            assert theirs.returncode == 0, theirs.stderr
            expected = theirs.stdout.replace("/lib/drbd/drbdsetup-84", "drbdsetup-84").splitlines()
            assert up_commands(configuration, node, name) == expected
        names = drbdadm_84(good, node, "sh-resources").stdout.split("\n")[0]
        if " " not in "".join(configuration.resources):
            assert names.split() == list(configuration.for_node(node))


BAD = {
    "garbage": "garbage",
    "semicolon": resource() + ";",
    "closing brace": resource() + "}",
    "no name": "resource { }",
    "no block": "resource r0",
    "unknown in resource": resource("foo;"),
    "unknown option": resource("net { foo 5; }"),
    "quoted option": resource('net { "timeout" 5; }'),
    "no semicolon": resource("net { timeout 50 }"),
    "two values": resource("net { timeout 50 60; }"),
    "no value": resource("net { timeout; }"),
    "equals sign": resource("net { timeout = 50; }"),
    "range": resource("net { timeout 601; }"),
    "not a number": resource("net { timeout 1.5; }"),
    "negative": resource("net { ko-count -1; }"),
    "suffix": resource("disk { size 10q; }"),
    "boolean": resource("net { use-rle on; }"),
    "protocol": resource("protocol D;"),
    "section twice": resource("net { } net { }"),
    "resource twice": resource() + resource(),
    "global twice": TRUST + TRUST,
    "common twice": "common { } common { }",
    "host in common": "common { on a { address 10.0.0.1:1; } }",
    "unknown global": "global { foo; }",
    "global range": "global { minor-count 256; }",
    "usage count": "global { usage-count maybe; }",
    "port": resource(hosts=HOSTS.replace("7000", "70000")),
    "no port": resource(hosts=HOSTS.replace(":7000", "")),
    "host name as address": resource(hosts=HOSTS.replace("10.0.0.1", "alpha")),
    "bare ipv6": resource(hosts=HOSTS.replace("10.0.0.1", "[fd00::1]")),
    "no address": resource(hosts=HOSTS.replace("address 10.0.0.1:7000;", "")),
    "host twice": resource(hosts=HOSTS + HOSTS),
    "ip twice": TRUST + resource() + resource(name="r1", volume=OTHER),
    "minor twice": TRUST + resource() + resource(name="r1", volume=RESOURCE, hosts=HOSTS_1),
    "disk twice": TRUST + resource() + resource(name="r1", volume=OTHER.replace("y", "x"), hosts=HOSTS_1),
    "slot twice": TRUST
    + resource(volume=RESOURCE.replace("internal", "/dev/m[1]"))
    + resource(name="r1", volume=EXTERNAL + "[1];", hosts=HOSTS_1),
    "no device": resource(volume="disk /dev/x; meta-disk internal;"),
    "no disk": resource(volume="device minor 1; meta-disk internal;"),
    "device name": resource(volume=RESOURCE.replace("/dev/drbd0", "/dev/foo0")),
    "no minor": resource(volume=RESOURCE.replace("/dev/drbd0", "/dev/drbd")),
    "other minor": resource(volume=RESOURCE.replace("/dev/drbd0", "/dev/drbd1 minor 2")),
    "device twice": resource(volume=RESOURCE + RESOURCE),
    "volume number": resource(volume=f"volume x {{ {RESOURCE} }}"),
    "mixed volumes": resource(volume=f"{RESOURCE} volume 1 {{ {OTHER} }}"),
    "volumes differ": resource(
        volume=f"volume 0 {{ {RESOURCE} }}", hosts=HOSTS.replace("on b {", f"on b {{ volume 1 {{ {OTHER} }}")
    ),
    "primary both": TRUST + resource("startup { become-primary-on both; }"),
    "primary unknown": TRUST + resource("startup { become-primary-on a c; }"),
    "handler": resource("handlers { foo x; }"),
    "syncer": resource("syncer { foo 3; }"),
    "include": 'include "gone.res";',
    "string": resource('net { shared-secret "abc; }'),
    "newline in string": resource('net { shared-secret "abc\ndef"; }'),
    "long string": resource(f'net {{ shared-secret "{"x" * 256}"; }}'),
    "long word": resource(name="r" * 129),
    "binary": "\x7fELF\x02\x01\x01\x00",
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_files_are_refused_by_both(name: str, tmp_path: Path, drbdadm_84: Drbdadm) -> None:
    file = tmp_path / "bad.conf"
    file.write_text(BAD[name])
    theirs = drbdadm_84(file, "a", "dump" if "primary" in name else "sh-nop")
    assert theirs.returncode in (10, 20), f"drbdadm accepts this: {theirs.stdout}{theirs.stderr}"
    with pytest.raises(ConfigError) as caught:
        ours(file)
    parse_errors = [
        line for line in theirs.stderr.splitlines() if "bad.conf:" in line and "arse error" in line
    ]
    if parse_errors:  # for conflicts it names the host section, we name the statement
        said = [int(line.partition("bad.conf:")[2].partition(":")[0]) for line in parse_errors]
        assert caught.value.line == said[0], f"{caught.value} against {parse_errors}"


# What the 8.4 front end accepts and we refuse, each for a reason.
STRICTER = {
    "the file ends inside a section": resource()[:-2],
    "it fails when the command runs: enumeration": resource("disk { on-io-error panic; }"),
    "it fails when the command runs: secret": resource(f'net {{ shared-secret "{"x" * 65}"; }}'),
    "it fails when the command runs: minor": resource(volume=RESOURCE.replace("drbd0", "drbd1048576")),
    "it fails when the command runs: slot": resource(volume=EXTERNAL + "[256];"),
    "no such address": resource(hosts=HOSTS.replace("10.0.0.2", "999.0.0.2")),
    "no volume": resource(volume=""),
    "metadata over the data": resource(volume=EXTERNAL.replace("/dev/m", "/dev/y") + ";"),
    "ambiguous RES/VOL": resource(name="a/b"),
    "reserved": resource(name="all"),
}

# What it refuses and we accept, because DRBD 9 does, or because nothing speaks against it.
LOOSER = {
    "meta-disk defaults to internal": resource(volume="device minor 1; disk /dev/x;"),
    "no limit": resource("disk { c-max-rate 0; }"),
    "fencing in net": resource("net { fencing resource-only; }"),
    "negated booleans": resource("net { no-always-asbp; }"),
    "nbd": resource(volume="device nbd://127.0.0.1:1/x minor 1; disk /dev/x; meta-disk internal;"),
    "old syncer options": resource("syncer { hold-off-threshold 3; }"),
    "skipped resources": "skip resource r1 { }" + resource(),
}


@pytest.mark.parametrize("name", sorted(STRICTER))
def test_where_we_are_stricter(name: str, tmp_path: Path, drbdadm_84: Drbdadm) -> None:
    file = tmp_path / "t.conf"
    file.write_text(TRUST + STRICTER[name])
    assert drbdadm_84(file, "a", "sh-nop").returncode == 0
    with pytest.raises(ConfigError):
        ours(file)


@pytest.mark.parametrize("name", sorted(LOOSER))
def test_where_we_accept_more(name: str, tmp_path: Path, drbdadm_84: Drbdadm) -> None:
    file = tmp_path / "t.conf"
    file.write_text(TRUST + LOOSER[name])
    assert drbdadm_84(file, "a", "sh-nop").returncode == 10
    assert ours(file).for_node("a")


# --------------------------------------------------------------------------------------- the options


def xml_options(command: str) -> dict[str, ElementTree.Element]:
    """What drbdsetup-84 says about the options of one of its commands."""
    assert DRBDSETUP_84.exists(), f"{DRBDSETUP_84} is missing: install drbd-utils"
    output = run("a", str(DRBDSETUP_84), "xml-help", command).stdout
    root = ElementTree.fromstring(output)
    return {option.get("name", ""): option for option in root.findall("option")}


COMMANDS = {"attach": DISK, "connect": NET, "new-resource": OPTIONS}
NOT_IN_FILES = {"tentative", "discard-my-data", "alternate-address", "alternate-peer-address"}
OURS_ON_PURPOSE = {"c-max-rate", "c-fill-target"}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tables_are_those_of_drbdsetup(command: str) -> None:
    table = COMMANDS[command]
    theirs = xml_options(command)
    assert theirs
    for name, option in theirs.items():
        if name in NOT_IN_FILES:
            continue
        spec = table[name]
        kind = {"numeric": Kind.NUMBER, "boolean": Kind.BOOL, "handler": Kind.ENUM, "string": Kind.STRING}
        if name == "resync-after":  # a minor number there, a resource in files
            continue
        assert spec.kind is kind[option.get("type", "")], name
        if spec.kind is Kind.NUMBER:
            low, high, default = (int(option.findtext(tag, "")) for tag in ("min", "max", "default"))
            unit = option.findtext("unit_prefix", "1").replace("1", "")
            assert (spec.low, spec.high, spec.unit) == (0 if name == "c-max-rate" else low, high, unit), name
            if name not in OURS_ON_PURPOSE:
                assert spec.default == default, name
        elif spec.kind is Kind.BOOL:
            assert spec.default == (option.findtext("default") == "yes"), name
        elif spec.kind is Kind.ENUM:
            assert set(spec.values) >= {handler.text for handler in option.findall("handler")}, name


def values(spec: OptionSpec) -> list[str]:
    """Values around the limits of a number, in several units."""
    found = {str(n) for n in (0, spec.low - 1, spec.low, spec.high, spec.high + 1) if n >= 0}
    for scale, letter in ((1 << 10, "k"), (1 << 20, "M"), (1 << 30, "G"), (1 << 9, "s")):
        unit = {"": 1, "k": 1 << 10, "s": 1 << 9}[spec.unit]
        for limit in (spec.low, spec.high):
            n = limit * unit // scale
            found |= {f"{n + step}{letter}" for step in (0, 1)}
    return sorted(found)


@pytest.mark.parametrize("section", ["net", "disk"])
def test_numbers_are_judged_alike(section: str, tmp_path: Path, drbdadm_84: Drbdadm) -> None:
    """One file with all values; drbdadm reports every one that is out of range."""
    table, commands = (NET, "connect") if section == "net" else (DISK, "attach")
    names = [n for n in xml_options(commands) if n in table and table[n].kind is Kind.NUMBER]
    cases = [(table[name], text) for name in names if name != "c-max-rate" for text in values(table[name])]
    lines = [f"{spec.name} {text};" for spec, text in cases]
    file = tmp_path / "numbers.conf"
    file.write_text(f"resource r0 {{ {RESOURCE} {HOSTS}\n{section} {{\n" + "\n".join(lines) + "\n} }\n")
    theirs = drbdadm_84(file, "a", "sh-nop")
    said = {line.partition(f"{file.name}:")[2].partition(": ")[2] for line in theirs.stderr.splitlines()}
    mine = set()
    for spec, text in cases:
        try:
            convert(spec, text)
        except ValueProblem as problem:
            mine.add(str(problem))
    theirs_bad = {line for line in said if "out of range" in line}
    checked = {line.partition(" ")[0] for line in theirs_bad}  # the others wait for drbdsetup
    assert len(checked) >= 6
    assert {line for line in mine if line.partition(" ")[0] in checked} == theirs_bad


# ------------------------------------------------------------------------------ the front end of DRBD 9

NINE = {
    "example": EXAMPLE.replace("alpha", "a").replace("beta", "b"),
    "node ids": TRUST
    + resource(hosts=HOSTS.replace("{", "{ node-id 3;", 1).replace("b {", "b { node-id 5;")),
    "fencing in net": TRUST + resource("net { fencing resource-only; rr-conflict retry-connect; }"),
    "options": TRUST
    + resource(
        "options { auto-promote no; quorum off; on-no-quorum io-error; "
        "on-suspended-primary-outdated force-secondary; }"
    ),
    "connection": TRUST
    + resource(
        "connection { host a address 10.0.0.1:7005; host b address 10.0.0.2:7005; net { protocol B; } "
        "disk { resync-rate 5M; } volume 0 { disk { c-min-rate 3; } } }",
        hosts="on a { node-id 0; } on b { node-id 1; }",
    ),
    "path": TRUST
    + resource(
        "connection { path { host a address 10.0.0.1:7006; host b address 10.0.0.2:7006; } "
        "net { transport tcp; } }",
        hosts="on a { node-id 0; } on b { node-id 1; }",
    ),
    "meta-disk": TRUST + resource(volume="device minor 1; disk /dev/x;"),
    "handlers": TRUST + resource("handlers { unfence-peer x; quorum-lost y; disconnected z; }"),
}


@pytest.mark.parametrize("name", sorted(NINE))
def test_files_of_drbd_9_are_accepted_and_use_the_same_addresses(
    name: str, tmp_path: Path, drbdadm_9: Drbdadm
) -> None:
    file = tmp_path / "nine.conf"
    file.write_text(NINE[name])
    theirs = drbdadm_9(file, "a", "-d", "up", "r0")
    assert theirs.returncode == 0, theirs.stderr
    r0 = ours(file).for_node("a")["r0"]
    (path,) = [line for line in theirs.stdout.splitlines() if " new-path " in line]
    assert path.split()[-2:] == [str(r0.address), str(r0.peer_address)]
    minor, volume = next(line for line in theirs.stdout.splitlines() if " new-minor " in line).split()[-2:]
    assert [(str(v.minor), str(v.number)) for v in r0.volumes] == [(minor, volume)]
    if "node-id" in NINE[name]:
        assert path.split()[3] == str(r0.peer_node_id)


EXAMPLES = ("/etc/drbd.conf", "/usr/share/doc/drbd-utils/examples/drbd.conf.example")


@pytest.mark.parametrize("path", EXAMPLES)
def test_the_files_of_drbd_utils_itself(path: str, drbdadm_9: Drbdadm) -> None:
    theirs = drbdadm_9(path, "nobody", "sh-nop")
    assert theirs.returncode == 0, theirs.stderr
    configuration = ours(Path(path))
    assert configuration.for_node("nobody") == {}
    said = [warning.partition(": WARN: ")[2] for warning in configuration.warnings]
    assert len(said) == len(set(said)), "one warning for each thing"
