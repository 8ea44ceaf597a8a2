"""Configurations that are refused: one sentence with file, line and what was expected."""

from __future__ import annotations

from pathlib import Path

import pytest
from tandem.repl.config import Endpoint, MetaDisk
from tandem.tools import conf
from tandem.tools.conf import ConfigError, parse_nbd_uri

from tests.conf_files import HOSTS, RESOURCE, loaded, refusal, resource

# --------------------------------------------------------------------------------------- statements

WRONG = [
    # top level
    ("garbage;", "1: Parse error: 'global | common | resource | skip | include' expected, but got 'garbage'"),
    ('"resource" r0 { }',
     "1: Parse error: 'global | common | resource | skip | include' expected, but got 're"),
    ("resource { }", "1: Parse error: 'resource name' expected, but got '{'"),
    ("resource r0;", "1: Parse error: '{' expected, but got ';'"),
    ("resource r0 r1 { }", "1: Parse error: '{' expected, but got 'r1'"),
    ("resource all { }", "1: resource 'all': another name expected, because it selects all resources"),
    ("resource a/b { }", "1: resource 'a/b': another name expected, because it names files"),
    ('resource "" { }', "1: resource '': another name expected"),
    ("resource .. { }", "1: resource '..': another name expected"),
    ("common { }\ncommon { }", "2: conflicting use of resource section 'common' ... first used at t.conf:1."),
    ("common { on a { } }", "1: in the common section, there are no host sections allowed."),
    ("common { device minor 1; }", "1: in the common section, there are no volumes allowed."),
    ("global { } global { }", "1: conflicting use of global section 'global' ... first used at t.conf:1."),
    ("global { foo 3; }", "1: Parse error: 'disable-ip-verification | minor-count"),
    ("global { usage-count maybe; }", "1: usage-count: 'ask | yes | no' expected, but got 'maybe'"),
    ("global { usage-count; }", "1: Parse error: 'ask | yes | no' expected, but got ';'"),
    ("global { minor-count 300; }", "1: minor-count 300 => 300 out of range [1..255]."),
    ("global { dialog-refresh x; }", "1: dialog-refresh: 'x' is not a valid number"),
    ("global { disable-ip-verification yes; }", "1: Parse error: ';' expected, but got 'yes'"),
    # resource level
    (resource("foo;"), "4: Parse error: 'protocol | on | disk | net"),
    (resource("global { }"), "4: Parse error: 'protocol | on | disk | net"),
    (resource("net { foo 5; }"), "4: Parse error: 'an option keyword' expected, but got 'foo'"),
    (resource('net { "timeout" 5; }'), "4: Parse error: 'an option keyword' expected, but got 'timeout'"),
    (resource("net { timeout; }"), "4: Parse error: 'a number' expected, but got ';'"),
    (resource("net { timeout\n 50\n 60; }"), "6: Parse error: ';' expected, but got '60'"),
    (resource("net { timeout 50\n max-buffers 40; }"), "5: Parse error: ';' expected, but got 'max-buffers'"),
    (resource("net { timeout 0; }"), "4: timeout 0 => 0 out of range [1..600]."),
    (resource("net { timeout { } }"), "4: Parse error: 'a number' expected, but got '{'"),
    (resource("net { protocol D; }"), "4: unknown protocol 'D', should be one of A,B,C"),
    (resource("protocol D;"), "4: unknown protocol 'D', should be one of A,B,C"),
    (resource("net { allow-two-primaries maybe; }"),
     "4: allow-two-primaries: 'yes | no | ;' expected, but got"),
    (resource("net { no-tcp-cork yes; }"), "4: Parse error: ';' expected, but got 'yes'"),
    (resource("net { discard-my-data; }"),
     "4: Parse error: 'an option keyword' expected, but got 'discard-my-"),
    (resource("net { after-sb-1pri discard-zero-changes; }"), "4: after-sb-1pri: 'disconnect | consensus"),
    (resource("net { after-sb-0pri discard-node-c; }"),
     "4: in resource r0: after-sb-0pri discard-node-c: the no"),
    (resource("disk { resync-rate 10G; }"), "4: resync-rate 10G => 10485760k out of range [1..4194304]k."),
    (resource("disk { size 0x10; }"), "4: size: '0x10' is not a valid number"),
    (resource("disk { on-io-error panic; }"),
     "4: on-io-error: 'pass_on | call-local-io-error | detach' expected"),
    (resource("disk { } disk { }"),
     "4: conflicting use of disk section 'r0:disk' ... first used at t.conf:4."),
    (resource("net { timeout 5; }\n net { }"),
     "5: conflicting use of net section 'r0:net' ... first used at t.co"),
    (resource("handlers { foo x; }"), "4: Parse error: 'an option keyword' expected, but got 'foo'"),
    (resource("handlers { split-brain x y; }"), "4: Parse error: ';' expected, but got 'y'"),
    (resource("syncer { foo 3; }"), "4: Parse error: 'a syncer option keyword' expected, but got 'foo'"),
    (resource("startup { wfc-timeout -1; }"), "4: wfc-timeout: '-1' is not a valid number"),
    (resource("startup { become-primary-on both; }"),
     "4: in resource r0: become-primary-on is set to both, but al"),
    (resource("startup { become-primary-on a c; }"),
     "4: in resource r0: become-primary-on contains 'c', which is n"),
    (resource("options { quorum 33; }"), "4: quorum: 'off | majority | all | 1 |"),
    # volumes
    (resource(volume=RESOURCE + RESOURCE),
     "2: conflicting use of device statement 'r0:device' ... first used at"),
    (resource(volume="disk /dev/x;"), "3: in resource r0, on a { ... }: 'device' keyword missing."),
    (resource(volume="device minor 1;"), "3: in resource r0, on a { ... }: 'disk' keyword missing."),
    (resource(volume=""), "3: in resource r0, on a { ... }: 'device' keyword missing."),
    (resource(volume="device;"), "2: Parse error: 'device name | minor' expected, but got ';'"),
    (resource(volume="device minor x;"), "2: Parse error: 'minor number' expected, but got 'x'"),
    (resource(volume="device minor 1048576;"), "2: minor 1048576 => 1048576 out of range [0..1048575]."),
    (resource(volume="device /dev/drbd2000000;"), "2: minor 2000000 => 2000000 out of range [0..1048575]."),
    (resource(volume="device /dev/foo0;"), "2: device /dev/foo0: device name must start with /dev/drbd"),
    (resource(volume="device /dev/drbd;"), "2: no minor given nor device name contains a minor number"),
    (resource(volume="device /dev/drbd_x;"),
     "2: device /dev/drbd_x: no minor given nor device name contains"),
    (resource(volume="device /dev/drbd5 minor 6;"), "2: explicit minor number must match with device name"),
    (resource(volume="disk;"), "2: Parse error: 'path of a block device or file' expected, but got ';'"),
    (resource(volume='disk "";'), "2: disk: the path of a block device or file expected, but got an empty"),
    (resource(volume="meta-disk /dev/m [x];"), "2: Parse error: '[ index number ]' expected, but got 'x'"),
    (resource(volume="meta-disk /dev/m [256];"), "2: meta-disk index 256 => 256 out of range [0..255]."),
    (resource(volume="flexible-meta-disk /dev/m [1];"), "2: Parse error: ';' expected, but got '1'"),
    (resource(volume="device minor 0; disk /dev/x; meta-disk /dev/x;"),
     "2: meta-disk /dev/x is the disk itself"),
    (resource(volume="volume x { }"), "2: Parse error: 'volume number' expected, but got 'x'"),
    (resource(volume="volume 65536 { }"), "2: volume 65536 => 65536 out of range [0..65535]."),
    (resource(volume="volume 0 { } volume 0 { }"),
     "2: conflicting use of volume section 'r0: volume 0' ... first"),
    (resource(volume="volume 0 { foo; }"),
     "2: Parse error: 'device | disk | meta-disk | flexible-meta-disk' expec"),
    (resource(volume=RESOURCE + "volume 1 { device minor 1; disk /dev/y; }"),
     "3: in resource r0: you must not mix"),
    # hosts
    (resource(hosts="on a { }"), "3: in resource r0, on a { ... }: 'address' keyword missing."),
    (resource(hosts="on a { foo; }"),
     "3: Parse error: 'address | device | disk | meta-disk | volume | node-id"),
    (resource(hosts="on { }"), "3: Parse error: 'host name' expected, but got '{'"),
    (resource(hosts=HOSTS + "on a { address 10.0.0.3:1; }"),
     "3: conflicting use of host section 'r0: on a' ..."),
    (resource(hosts=HOSTS.replace("; }", "; address 10.0.0.9:1; }", 1)),
     "3: conflicting use of address statement"),
    (resource(hosts="on a { node-id 32; }"), "3: node-id 32 => 32 out of range [0..31]."),
    (resource(hosts=HOSTS.replace("{", "{ node-id 1;")),
     "3: conflicting use of node-id 'r0:1' ... first used at"),
    # addresses
    (resource(hosts="on a { address 10.0.0.1; }"), "3: Parse error: ':' expected, but got ';'"),
    (resource(hosts="on a { address 10.0.0.1:x; }"), "3: Parse error: 'port number' expected, but got 'x'"),
    (resource(hosts="on a { address 10.0.0.1:70000; }"), "3: port 70000 => 70000 out of range [1..65535]."),
    (resource(hosts="on a { address 10.0.0.1:0; }"), "3: port 0 => 0 out of range [1..65535]."),
    (resource(hosts="on a { address host:7000; }"),
     "3: Parse error: 'ssocks | sdp | ipv4 | ipv6 | <ipv4 address>'"),
    (resource(hosts="on a { address 999.0.0.1:7; }"),
     "3: Parse error: 'ssocks | sdp | ipv4 | ipv6 | <ipv4 address>"),
    (resource(hosts="on a { address [fd00::1]:7; }"),
     "3: Parse error: 'ssocks | sdp | ipv4 | ipv6 | <ipv4 addre"),
    (resource(hosts="on a { address ipv6 10.0.0.1:7; }"),
     "3: Parse error: '[<ipv6 address>]' expected, but got '1"),
    (resource(hosts="on a { address ipv6 [zz]:7; }"),
     "3: Parse error: '[<ipv6 address>]' expected, but got 'zz'"),
    # DRBD 9
    (resource("connection { host a; }"),
     "4: in resource r0: exactly two 'host' statements expected in a connecti"),
    (resource("connection { host a; host z; }"),
     "4: in resource r0: the name of an 'on' section expected, but got"),
    (resource("connection { foo; }"),
     "4: Parse error: 'host | net | disk | volume | path | skip' expected, but got"),
    (resource("connection-mesh { hosts; }"), "4: Parse error: 'host name' expected, but got ';'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[message[:60] for _, message in WRONG])
def test_what_is_wrong_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, text).startswith(f"t.conf:{message}")


def test_uniqueness_across_resources(tmp_path: Path) -> None:
    def second(volume: str, port: int = 7001) -> str:
        return resource() + resource(name="r1", volume=volume, hosts=HOSTS.replace("7000", str(port)))

    other = "device minor 1; disk /dev/y; meta-disk internal;"
    assert len(loaded(tmp_path, second(other)).resources) == 2
    cases = [
        (
            resource() + resource(),
            "t.conf:6: conflicting use of resource section 'r0' ... first used at t.conf:1.",
        ),
        (
            second(RESOURCE),
            "t.conf:7: conflicting use of device-minor 'device-minor:a:0' ... first used at t.conf:2.",
        ),
        (
            second(other.replace("/dev/y", "/dev/../dev/x")),
            "t.conf:7: conflicting use of disk 'disk:a:/dev/x' ...",
        ),
        (second(other, 7000), "t.conf:8: conflicting use of IP '10.0.0.1:7000' ... first used at t.conf:3."),
        (
            second("device minor 1; disk /dev/y; meta-disk /dev/x;"),
            "t.conf:7: conflicting use of disk 'disk:a:/dev/x'",
        ),
    ]
    for text, message in cases:
        with pytest.raises(ConfigError) as caught:
            loaded(tmp_path, text)
        assert str(caught.value).replace(f"{tmp_path}/", "").startswith(message)


def test_metadata_slots_are_used_once(tmp_path: Path) -> None:
    def pair(first: str, second: str) -> str:
        return resource(volume=f"volume 0 {{ device minor 0; disk /dev/x; {first} }}"
                               f"volume 1 {{ device minor 1; disk /dev/y; {second} }}")  # fmt: skip

    configuration = loaded(tmp_path, pair("meta-disk /dev/m[0];", "meta-disk /dev/m [1];"))
    assert [v.meta_disk for v in configuration.for_node("a")["r0"].volumes] == [
        MetaDisk("indexed", "/dev/m", 0), MetaDisk("indexed", "/dev/m", 1),
    ]  # fmt: skip
    assert "meta-disk 'a:/dev/m[1]'" in refusal(
        tmp_path, pair("meta-disk /dev/m[1];", "meta-disk /dev/m[1];")
    )
    assert "meta-disk 'a:/dev/m[flexible]'" in refusal(
        tmp_path, pair("meta-disk /dev/m;", "meta-disk /dev/m;")
    )
    assert "disk 'disk:a:/dev/m'" in refusal(tmp_path, pair("meta-disk /dev/m[1];", "meta-disk /dev/m;"))


def test_one_address_for_both_hosts_is_refused(tmp_path: Path) -> None:
    hosts = "on a { address 127.0.0.1:7000; } on b { address 127.0.0.1:%d; }"
    assert loaded(tmp_path, resource(hosts=hosts % 7001)).for_node("a")["r0"].peer_address.port == 7001
    assert "conflicting use of IP '127.0.0.1:7000'" in refusal(tmp_path, resource(hosts=hosts % 7000))


def test_link_local_addresses_are_compared_per_host(tmp_path: Path) -> None:
    hosts = "on a { address ipv6 [fe80::1%eth0]:7000; } on b { address ipv6 [fe80::1%eth0]:7000; }"
    r0 = loaded(tmp_path, resource(hosts=hosts)).for_node("a")["r0"]
    assert r0.address == Endpoint("ipv6", "fe80::1%eth0", 7000)
    assert str(r0.address) == "ipv6:[fe80::1%eth0]:7000"


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("nbds://127.0.0.1/r0", "TLS is not implemented"),
        ("http://127.0.0.1/r0", "nbd:// or nbd+unix:// expected"),
        ("nbd:///r0", "an address to listen on expected"),
        ("nbd://127.0.0.1:0/r0", "port 0 => 0 out of range [1..65535]."),
        ("nbd://127.0.0.1:70000/r0", "not a valid URI"),
        ("nbd://[::1/r0", "not a valid URI"),
        ("nbd://127.0.0.1/%ff", "not a valid URI"),
        ("nbd://127.0.0.1/r0?socket=/a", "'socket=' belongs to nbd+unix://"),
        ("nbd+unix:///r0", "nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH expected"),
        ("nbd+unix:///r0?socket=a.sock", "nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH expected"),
        ("nbd+unix://host/r0?socket=/a.sock", "nbd+unix:///EXPORT?socket=/ABSOLUTE/PATH expected"),
        ("nbd+unix:///r0?socket=/a%00b", "a socket path without NUL characters expected"),
        ("nbd+unix:///r0?socket=/" + "x" * 107, "the socket path has 108 bytes, at most 107 are possible"),
    ],
)
def test_uris_that_cannot_be_served(tmp_path: Path, uri: str, why: str) -> None:
    message = refusal(tmp_path, resource(volume=f'device "{uri}"; disk /dev/x;'))
    assert message.startswith("t.conf:2: device ") and why in message


def test_the_longest_socket_path() -> None:
    path = "/" + "x" * 106
    assert parse_nbd_uri(f"nbd+unix:///r%200?socket={path}") == conf.NbdUri("r 0", socket=path)
    assert parse_nbd_uri("nbd://[::1]/a/b") == conf.NbdUri("a/b", "::1", 10809)


def test_tcp_ports_of_exports(tmp_path: Path) -> None:
    def two(first: str, second: str) -> str:
        return resource(volume=f"device {first}; disk /dev/x;") + resource(
            name="r1", volume=f"device {second}; disk /dev/y;", hosts=HOSTS.replace("7000", "7001")
        )

    loaded(tmp_path, two("nbd://127.0.0.1:1/a", "nbd://127.0.0.1:2/a"))
    assert "conflicting use of NBD port 'a:127.0.0.1:1'" in refusal(
        tmp_path, two("nbd://127.0.0.1:1/a", "nbd://127.0.0.1:1/b"))  # fmt: skip
    assert "conflicting use of NBD socket 'a:/s'" in refusal(
        tmp_path, two("nbd+unix:///a?socket=/s", "nbd+unix:///b?socket=/s"))  # fmt: skip
    assert "conflicting use of IP '10.0.0.1:7000'" in refusal(
        tmp_path, resource(volume="device nbd://10.0.0.1:7000/a; disk /dev/x;"))  # fmt: skip
    shared = ("volume 0 { device nbd://127.0.0.1:1/a; disk /dev/x; }"
              "volume 1 { device nbd://127.0.0.1:1/%s; disk /dev/y; }")  # fmt: skip
    assert len(loaded(tmp_path, resource(volume=shared % "b")).for_node("a")["r0"].volumes) == 2
    assert "conflicting use of device" in refusal(tmp_path, resource(volume=shared % "a"))
