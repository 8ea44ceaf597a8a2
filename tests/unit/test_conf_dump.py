"""Printing a configuration: drbdadm's layout, and that what is printed means what was read."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from tandem.repl.config import ResourceConfig
from tandem.tools.conf import Configuration, dump, dump_xml, up_commands

from tests.conf_files import EXAMPLE, HOSTS, loaded, resource

DUMP = """\
# {file}
global {{
    disable-ip-verification;
    minor-count 64;
    usage-count no;
}}

common {{
    net {{
        protocol           C;
        ping-int          10;
        max-buffers       8k;
        after-sb-0pri    discard-zero-changes;
        allow-two-primaries  no;
    }}
    disk {{
        on-io-error      detach;
        resync-rate      33M;
        c-plan-ahead      15;
    }}
}}

# resource r0 on alpha: not ignored, not stacked
# defined at {file}:6
resource r0 {{
    on alpha {{
        device           /dev/drbd5 minor 5;
        disk             /dev/vg/a;
        meta-disk        internal;
        address          ipv4 10.1.1.1:7788;
    }}
    on beta {{
        device           /dev/drbd5 minor 5;
        disk             /dev/vg/b;
        meta-disk        /dev/vg/meta [3];
        address          ipv4 10.1.1.2:7788;
    }}
    options {{
        cpu-mask           3;
    }}
    net {{
        shared-secret    "foo bar";
        cram-hmac-alg    sha1;
        sndbuf-size      512K;
    }}
    disk {{
        disk-barrier      no;
        disk-flushes     yes;
        c-max-rate       100M;
    }}
}}

"""


def test_the_example(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, EXAMPLE)
    assert dump(configuration, "alpha") == DUMP.format(file=tmp_path / "t.conf")


def test_the_merged_example_shows_what_is_inherited(tmp_path: Path) -> None:
    text = dump(loaded(tmp_path, EXAMPLE), "alpha", ["r0"], merged=True)
    assert text.startswith("# resource r0 on alpha: not ignored, not stacked\n")
    assert (
        """\
    on alpha {
        disk {
            c-max-rate   100M;
            disk-flushes yes;
            disk-barrier  no;
            on-io-error  detach;
            resync-rate  33M;
            c-plan-ahead  15;
        }
        device           /dev/drbd5 minor 5;
"""
        in text
    )
    assert "        allow-two-primaries  no;\n" in text
    assert "allow-two-primaries" not in dump(loaded(tmp_path, EXAMPLE), "alpha", ["r0"])


def test_the_commands_of_a_dry_run(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, EXAMPLE)
    assert up_commands(configuration, "alpha", "r0") == [
        "drbdsetup-84 new-resource r0 --cpu-mask=3",
        "drbdsetup-84 new-minor r0 5 0",
        "drbdmeta 5 v08 /dev/vg/a internal apply-al",
        "drbdsetup-84 attach 5 /dev/vg/a /dev/vg/a internal --c-max-rate=100M --disk-flushes=yes "
        "--disk-barrier=no --on-io-error=detach --resync-rate=33M --c-plan-ahead=15",
        "drbdsetup-84 connect r0 ipv4:10.1.1.1:7788 ipv4:10.1.1.2:7788 --allow-two-primaries=no "
        "--after-sb-0pri=discard-zero-changes --max-buffers=8k --ping-int=10 --protocol=C "
        "--shared-secret=foo\\ bar --cram-hmac-alg=sha1 --sndbuf-size=512K",
    ]
    beta = up_commands(configuration, "beta", "r0")
    assert "drbdmeta 5 v08 /dev/vg/meta 3 apply-al" in beta
    assert beta[3].startswith("drbdsetup-84 attach 5 /dev/vg/b /dev/vg/meta 3 --")
    assert beta[4].startswith("drbdsetup-84 connect r0 ipv4:10.1.1.2:7788 ipv4:10.1.1.1:7788 --")


def test_commands_for_flexible_metadata_and_diskless_hosts(tmp_path: Path) -> None:
    hosts = HOSTS.replace("on b {", "on b { disk none;")
    text = resource(volume="device minor 1; disk /dev/x; flexible-meta-disk /dev/m;", hosts=hosts)
    configuration = loaded(tmp_path, text)
    assert up_commands(configuration, "a", "r0")[2:4] == [
        "drbdmeta 1 v08 /dev/m flex-external apply-al",
        "drbdsetup-84 attach 1 /dev/x /dev/m flexible",
    ]
    assert [command.split()[1] for command in up_commands(configuration, "b", "r0")] == [
        "new-resource", "new-minor", "connect",
    ]  # fmt: skip


RICH = """\
global { usage-count ask; dialog-refresh 5; cmd-timeout-short 9; disable-ip-verification; udev-always-use-vnr; }
common { startup { wfc-timeout 5; } handlers { split-brain "mail \\"root\\" \\\\ & <x>"; } options { cpu-mask 1; } }
resource "r 1" {
  protocol b;
  net { shared-secret ""; verify-alg crc32c; after-sb-0pri discard-node-a; timeout 50; timeout 60; }
  disk { resync-rate 1M; no-md-flushes; fencing resource-only; }
  startup { become-primary-on a b2; stacked-timeouts; wait-after-sb; }
  handlers { fence-peer /bin/x; }
  proxy { memlimit 3M; plugin { zlib level 9; lzma; } }
  volume 0 { device /dev/drbd_x minor 4; disk data.img; disk { c-min-rate 7; } }
  volume 3 { device "nbd+unix:///e?socket=/run/s p.sock"; disk "/dev/my disk"; flexible-meta-disk /dev/m; }
  volume 4 { device minor 9; disk /dev/z; meta-disk /dev/m2 [255]; }
  on a { node-id 7; address ipv6 [fd00::1%eth0]:1; volume 0 { disk { c-min-rate 8; } } options { cpu-mask 5; } }
  on b1 b2 { node-id 3; address ipv6 [fd00::2]:1; volume 4 { disk none; } }
}
resource f { device minor 1; disk /dev/f; floating 127.0.0.1:5; floating 192.0.2.1:6 { disk /dev/g; } }
resource n {
  options { quorum off; auto-promote yes; }
  device minor 2; disk /dev/n;
  on a { node-id 0; address 10.0.0.1:77; } on b2 { node-id 1; address 10.0.0.2:77; }
  on c { node-id 2; address 10.0.0.9:9; disk none; }
  connection x { host a address 10.0.0.1:7; host b2 address 10.0.0.2:7; net { protocol A; }
                 disk { resync-rate 3M; } volume 0 { disk { c-plan-ahead 3; } } }
  connection-mesh { hosts a b2 c; net { timeout 55; } }
}
resource s { stacked-on-top-of f { device minor 20; address 10.0.0.1:99; } on a { device minor 20; disk /dev/s; address 10.0.0.8:1; } }
"""  # noqa: E501


def meaning(configuration: Configuration, node: str) -> list[ResourceConfig]:
    """What *node* runs, without the lines that printing changes."""
    return [replace(config, line=0, file="") for config in configuration.for_node(node).values()]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("node", ["a", "b1", "b2", "x"])
def test_what_is_printed_means_the_same(tmp_path: Path, node: str, merged: bool) -> None:
    original = loaded(tmp_path, RICH)
    again = loaded(tmp_path, dump(original, node, merged=merged), "again.conf")
    assert meaning(again, node) == meaning(original, node)
    assert again.global_options == original.global_options
    assert again.ignored(node) == original.ignored(node)
    for name in original.for_node(node):
        assert up_commands(again, node, name) == up_commands(original, node, name) or merged


def test_printing_twice_changes_nothing(tmp_path: Path) -> None:
    once = dump(loaded(tmp_path, RICH), "a")
    twice = dump(loaded(tmp_path, once), "a")

    def bare(text: str) -> list[str]:
        return [line for line in text.splitlines() if not line.startswith("# defined at")]

    assert bare(once) == bare(twice)


def test_ignored_and_stacked_are_named(tmp_path: Path) -> None:
    text = dump(loaded(tmp_path, RICH), "b2")
    for line in (
        '# resource "r 1" on b2: not ignored, not stacked',
        "# resource s on b2: not ignored, stacked",
        "    on b1 b2 {",
        "    floating ipv4 192.0.2.1:6 {",
        '            device       "nbd+unix:///e?socket=/run/s p.sock";',
        '            disk         "/dev/my disk";',
        "        stacked-timeouts;\n        become-primary-on a b2;",
    ):
        assert f"{line}\n" in text
    assert "# resource n on x: ignored, not stacked\n" in dump(loaded(tmp_path, RICH), "x")


def test_names_select_resources(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, RICH)
    text = dump(configuration, "a", ["n", "f"])
    assert text.index("resource n {") < text.index("resource f {")
    assert "global" not in text and "common" not in text and '"r 1"' not in text
    with pytest.raises(KeyError):
        dump(configuration, "a", ["nix"])


def test_xml_is_xml_with_the_values(tmp_path: Path) -> None:
    root = ElementTree.fromstring(dump_xml(loaded(tmp_path, EXAMPLE)))
    assert root.tag == "config" and root.get("file") == str(tmp_path / "t.conf")
    minor_count = root.find("global/minor-count")
    assert minor_count is not None and minor_count.get("count") == "64"
    r0 = root.find("resource[@name='r0']")
    assert r0 is not None and r0.get("conf-file-line") == f"{tmp_path}/t.conf:6"
    assert [h.get("name") for h in r0.findall("host")] == ["alpha", "beta"]
    device, meta = r0.find("host/volume/device"), r0.find("host[@name='beta']/volume/meta-disk")
    assert device is not None and (device.get("minor"), device.text) == ("5", "/dev/drbd5")
    assert meta is not None and (meta.get("index"), meta.text) == ("3", "/dev/vg/meta")
    secret = r0.find("section[@name='net']/option[@name='shared-secret']")
    assert secret is not None and secret.get("value") == "foo bar"


def test_xml_escapes(tmp_path: Path) -> None:
    root = ElementTree.fromstring(dump_xml(loaded(tmp_path, RICH)))
    handler = root.find("common/section[@name='handlers']/option")
    assert handler is not None and handler.get("value") == 'mail "root" \\ & <x>'
    floating = root.findall("resource[@name='f']/host")
    assert [host.get("floating") for host in floating] == ["1", "1"]
    connection = root.find("resource[@name='n']/connection/host/address")
    assert connection is not None and (connection.get("port"), connection.text) == ("7", "10.0.0.1")
