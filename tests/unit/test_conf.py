"""drbd.conf: files and includes, inheritance, warnings, and what a node runs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from tandem.repl.config import AfterSb, Endpoint, Fencing, MetaDisk, ResourceConfig
from tandem.tools import conf
from tandem.tools.conf import ConfigError, check, default_config, default_node, load

from tests.conf_files import EXAMPLE, HOSTS, RESOURCE, loaded, refusal, resource

# ----------------------------------------------------------------------------------- the whole thing


def test_the_example_as_alpha_sees_it(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, EXAMPLE)
    assert configuration.file == str(tmp_path / "t.conf")
    assert configuration.global_options.minor_count == 64
    assert configuration.global_options.disable_ip_verification
    r0 = configuration.for_node("alpha")["r0"]
    assert (r0.name, r0.node, r0.peer, r0.peer_names, r0.line) == ("r0", "alpha", "beta", ("beta",), 6)
    assert (r0.address, r0.peer_address) == (
        Endpoint("ipv4", "10.1.1.1", 7788),
        Endpoint("ipv4", "10.1.1.2", 7788),
    )
    (volume,) = r0.volumes
    assert r0.implicit_volume and r0.file == configuration.file
    assert (volume.number, volume.minor, volume.device) == (0, 5, "/dev/drbd5")
    assert (volume.disk, volume.peer_disk, volume.meta_disk) == ("/dev/vg/a", "/dev/vg/b", MetaDisk())
    disk = volume.disk_options
    assert (disk.resync_rate, disk.c_plan_ahead, disk.c_max_rate) == (33792, 15, 102400)
    assert (disk.on_io_error, disk.disk_barrier, disk.disk_flushes, disk.disk_drain) == (
        "detach",
        False,
        True,
        True,
    )
    net = r0.net
    assert (net.protocol, net.ping_int, net.max_buffers, net.sndbuf_size) == ("C", 10, 8192, 524288)
    assert net.after_sb_0pri is AfterSb.DISCARD_ZERO_CHANGES and not net.allow_two_primaries
    assert (net.shared_secret, net.cram_hmac_alg, r0.options.cpu_mask) == ("foo bar", "sha1", "3")
    assert check(r0) is None


def test_both_nodes_agree_and_others_are_not_concerned(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, EXAMPLE)
    alpha, beta = configuration.for_node("alpha")["r0"], configuration.for_node("beta")["r0"]
    assert (alpha.address, alpha.peer_address) == (beta.peer_address, beta.address)
    assert (alpha.node_id, alpha.peer_node_id) == (beta.peer_node_id, beta.node_id)
    assert {alpha.node_id, alpha.peer_node_id} == {0, 1}
    assert beta.volumes[0].meta_disk == MetaDisk("indexed", "/dev/vg/meta", 3)
    assert configuration.for_node("gamma") == {} and configuration.ignored("gamma") == ["r0"]
    assert configuration.ignored("alpha") == []
    assert configuration.for_node("ALPHA") == {}, "host names are case sensitive"


def test_defaults_are_those_of_the_values(tmp_path: Path) -> None:
    r0 = loaded(tmp_path, resource()).for_node("a")["r0"]
    assert r0.net == type(r0.net)() and r0.options == type(r0.options)() and r0.startup == type(r0.startup)()
    assert r0.volumes[0].disk_options == type(r0.volumes[0].disk_options)() and r0.handlers == {}


def test_resources_keep_the_order_of_the_file(tmp_path: Path) -> None:
    text = "".join(
        resource(name=name, volume=f"device minor {i}; disk /dev/{name}; meta-disk internal;",
                 hosts=HOSTS.replace("7000", str(7000 + i)))
        for i, name in enumerate(["z", "a", "m"])
    )  # fmt: skip
    assert list(loaded(tmp_path, text).for_node("b")) == ["z", "a", "m"]


# ------------------------------------------------------------------------------- files and includes


def test_includes_are_relative_to_the_including_file_and_sorted(tmp_path: Path) -> None:
    (tmp_path / "conf.d" / "deep").mkdir(parents=True)
    (tmp_path / "conf.d" / "global_common.conf").write_text("common { net { timeout 50; } }")
    (tmp_path / "conf.d" / "b.res").write_text(resource(name="second"))
    (tmp_path / "conf.d" / "a.res").write_text('include "deep/x.res";')
    (tmp_path / "conf.d" / "deep" / "x.res").write_text(
        resource(name="first", volume="device minor 1; disk x.img; meta-disk ../m.img;",
                 hosts=HOSTS.replace("7000", "7001"))
    )  # fmt: skip
    configuration = loaded(tmp_path, 'include "conf.d/global_common.conf";\ninclude "conf.d/*.res";')
    resources = configuration.for_node("a")
    assert list(resources) == ["first", "second"]
    assert resources["first"].net.timeout == 50
    assert str(configuration.resources["first"].place) == f"{tmp_path}/conf.d/deep/x.res:1"
    assert resources["first"].volumes[0].disk == f"{tmp_path}/conf.d/deep/x.img"
    assert resources["first"].volumes[0].meta_disk.path == f"{tmp_path}/conf.d/m.img"
    assert resources["first"].file == f"{tmp_path}/t.conf"


def test_a_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "r.res").write_text('include "t.conf"; include "r.res"; include "*.res";' + resource())
    (tmp_path / "link.res").symlink_to("r.res")
    text = 'include "*.res"; include r.res; include "[lr]*.res"; include "nothing-matches-*.res";'
    assert list(loaded(tmp_path, text).resources) == ["r0"]


def test_include_chains_end(tmp_path: Path) -> None:
    for i in range(60):
        (tmp_path / f"{i}.inc").write_text(f"include {i + 1}.inc;")
    with pytest.raises(ConfigError, match="includes nested more than 40 levels deep"):
        loaded(tmp_path, "include 0.inc;")
    (tmp_path / "30.inc").write_text(resource())
    assert "r0" in loaded(tmp_path, "include 0.inc;").resources


def test_include_errors(tmp_path: Path) -> None:
    message = refusal(tmp_path, '\ninclude "gone.res";')
    assert message == "t.conf:2: Failed to open include file 'gone.res': No such file or directory."
    assert "Failed to open include file '': Is a directory" in refusal(tmp_path, 'include "";')
    assert "Failed to open include file" in refusal(tmp_path, f"include {tmp_path};")
    assert (
        refusal(tmp_path, "include;") == "t.conf:1: Parse error: 'file name or pattern' expected, but got ';'"
    )
    assert refusal(tmp_path, "include a b;") == "t.conf:1: Parse error: ';' expected, but got 'b'"
    (tmp_path / "bad.res").write_text("\n\nresource r0 { foo; }")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, "include bad.res;")
    assert (caught.value.file, caught.value.line) == (f"{tmp_path}/bad.res", 3)


@pytest.mark.parametrize(
    ("path", "why"),
    [("gone.conf", "No such file or directory"), (".", "Is a directory"), ("a\0b", "embedded null byte")],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, path: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: Failed to open configuration file: {why}."


def test_a_device_without_end_is_no_configuration() -> None:
    with pytest.raises(ConfigError, match="larger than 1024 KiB"):
        load("/dev/zero")


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    volume, hosts = "device minor 1; disk /dev/y;", HOSTS.replace("7000", "7001")
    (tmp_path / "r1.res").write_text(resource(name="r1", volume=volume, hosts=hosts))
    text = resource(volume="device minor 0; disk data.img;") + 'include "r1.res";'
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
    configuration = load("-")
    assert configuration.file == "STDIN" and list(configuration.resources) == ["r0", "r1"]
    assert configuration.for_node("a")["r0"].volumes[0].disk == f"{tmp_path}/data.img"
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\n\nfoo;")))
    with pytest.raises(ConfigError, match=r"^STDIN:3: Parse error"):
        load("-")


def test_defaults_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANDEM_NODE", "n1")
    monkeypatch.setenv("TANDEM_CONFIG", "/x/y.conf")
    assert (default_node(), default_config()) == ("n1", "/x/y.conf")
    monkeypatch.delenv("TANDEM_NODE")
    monkeypatch.delenv("TANDEM_CONFIG")
    assert (default_node(), default_config()) == (os.uname().nodename, "/etc/tandem.conf")


def test_empty_files_are_configurations(tmp_path: Path) -> None:
    for text in (b"", b"# nothing\n", b"skip resource x { a { b } c; }"[:0], b" \t\r\n"):
        assert loaded(tmp_path, text).resources == {}


def test_skip_and_module_versions(tmp_path: Path) -> None:
    text = "skip resource r1 { foo bar; x { y 3; } }\nskip { }\nrequire-drbd-module-version-ge 9.0.16;\n"
    configuration = loaded(tmp_path, text + resource("skip on c { }"))
    assert list(configuration.resources) == ["r0"] and configuration.warnings == ()


# ------------------------------------------------------------------------------------------ volumes


def test_volumes_of_resource_and_host(tmp_path: Path) -> None:
    text = resource(
        volume="volume 1 { device minor 7; meta-disk internal; } volume 0 { device drbd6; disk /dev/x; }",
        hosts="on a { volume 1 { disk /dev/a1; } address 10.0.0.1:1; } "
              "on b { volume 1 { disk /dev/b1; meta-disk /dev/m; } volume 0 { device minor 9; }"
              " address 10.0.0.2:1; }",
    )  # fmt: skip
    configuration = loaded(tmp_path, text)
    a, b = configuration.for_node("a")["r0"], configuration.for_node("b")["r0"]
    assert not a.implicit_volume
    assert [(v.number, v.minor, v.device, v.disk, v.peer_disk) for v in a.volumes] == [
        (0, 6, "/dev/drbd6", "/dev/x", "/dev/x"), (1, 7, "/dev/drbd7", "/dev/a1", "/dev/b1"),
    ]  # fmt: skip
    assert [(v.number, v.minor, v.meta_disk.kind) for v in b.volumes] == [
        (0, 9, "internal"),
        (1, 7, "flexible"),
    ]
    assert a.volume(1) is a.volumes[1] and a.volume(2) is None


def test_statements_may_stand_behind_the_hosts(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, f"resource r0 {{ {HOSTS} {RESOURCE} }}")
    assert configuration.for_node("a")["r0"].volumes[0].disk == "/dev/x"


def test_hosts_must_have_the_same_volumes(tmp_path: Path) -> None:
    def hosts(a: str, b: str) -> str:
        return resource(
            volume="", hosts=f"on a {{ {a} address 10.0.0.1:1; }} on b {{ {b} address 10.0.0.2:1; }}"
        )

    one = "volume %d { device minor 1; disk /dev/x; }"
    message = refusal(tmp_path, hosts(one % 0 + " volume 2 { device minor 2; disk /dev/y; }", one % 0))
    assert message == "t.conf:3: in resource r0, on b { ... }: volume 2 missing (present on a)"
    message = refusal(tmp_path, hosts("device minor 1; disk /dev/x;", one % 0))
    assert message.endswith("on a resp. b: volume 0 must not be implicit on one but not the other")
    assert loaded(tmp_path, hosts(one % 3, one % 3)).for_node("b")["r0"].volumes[0].number == 3


def test_meta_disk_defaults_to_internal(tmp_path: Path) -> None:
    r0 = loaded(tmp_path, resource(volume="device minor 0; disk /dev/x;")).for_node("a")["r0"]
    assert r0.volumes[0].meta_disk == MetaDisk("internal", "", 0)
    r0 = loaded(
        tmp_path, resource(volume="device minor 0; disk /dev/x; flexible-meta-disk internal;")
    ).for_node("a")["r0"]
    assert r0.volumes[0].meta_disk.kind == "internal"


@pytest.mark.parametrize(
    ("written", "device", "minor"),
    [
        ("/dev/drbd7", "/dev/drbd7", 7), ("drbd7", "/dev/drbd7", 7), ("minor 7", "/dev/drbd7", 7),
        ("/dev/drbd7 minor 7", "/dev/drbd7", 7), ('"/dev/drbd7"', "/dev/drbd7", 7),
        ("/dev/drbd_db minor 7", "/dev/drbd_db", 7), ("/dev/drbd minor 7", "/dev/drbd", 7),
        ("nbd://127.0.0.1:10809/r0 minor 7", "nbd://127.0.0.1:10809/r0", 7),
        ('"nbd+unix:///r0?socket=/run/a.sock" minor 7', "nbd+unix:///r0?socket=/run/a.sock", 7),
        ("nbd+unix:///r0?socket=/run/a.sock minor 7", "nbd+unix:///r0?socket=/run/a.sock", 7),
    ],
)  # fmt: skip
def test_devices(tmp_path: Path, written: str, device: str, minor: int) -> None:
    r0 = loaded(tmp_path, resource(volume=f"device {written}; disk /dev/x;")).for_node("a")["r0"]
    assert (r0.volumes[0].device, r0.volumes[0].minor) == (device, minor)


def test_uris_without_a_minor_get_a_free_one(tmp_path: Path) -> None:
    text = (
        resource(volume="device nbd://127.0.0.1/r0; disk /dev/x;")
        + resource(name="r1", volume="device minor 0; disk /dev/y;", hosts=HOSTS.replace("7000", "7001"))
        + resource(
            name="r2", volume="device nbd://127.0.0.1:1/r2; disk /dev/z;", hosts=HOSTS.replace("7000", "7002")
        )
    )
    configuration = loaded(tmp_path, text)
    for node in ("a", "b"):
        assert [r.volumes[0].minor for r in configuration.for_node(node).values()] == [1, 0, 2]


def test_relative_paths_start_from_the_file(tmp_path: Path) -> None:
    r0 = loaded(tmp_path, resource(volume='device minor 1; disk data.img; meta-disk "../m d";')).for_node(
        "a"
    )["r0"]
    assert r0.volumes[0].disk == f"{tmp_path}/data.img"
    assert r0.volumes[0].meta_disk.path == f"{tmp_path.parent}/m d"


# ------------------------------------------------------------------------------------------ options


def test_inheritance(tmp_path: Path) -> None:
    text = """
    common {
      protocol A;
      net { timeout 50; ping-int 20; }
      disk { resync-rate 1M; c-plan-ahead 1; al-extents 100; md-flushes no; }
      options { cpu-mask 1; on-no-data-accessible suspend-io; }
      startup { wfc-timeout 1; degr-wfc-timeout 2; }
      handlers { split-brain "common"; fence-peer "common"; }
    }
    resource r0 {
      net { timeout 60; protocol C; }
      disk { resync-rate 2M; c-plan-ahead 2; }
      options { cpu-mask 2; }
      startup { wfc-timeout 3; }
      handlers { split-brain "own"; }
      volume 0 { device minor 0; disk /dev/x; disk { resync-rate 3M; al-extents 200; } }
      volume 1 { device minor 1; disk /dev/y; }
      on a { volume 0 { disk { al-extents 300; } } address 10.0.0.1:1; options { cpu-mask 3; } }
      on b { address 10.0.0.2:1; }
    }"""
    configuration = loaded(tmp_path, text)
    a, b = configuration.for_node("a")["r0"], configuration.for_node("b")["r0"]
    assert (a.net.protocol, a.net.timeout, a.net.ping_int) == ("C", 60, 20)
    assert (a.options.cpu_mask, b.options.cpu_mask, a.options.on_no_data_accessible) == (
        "3",
        "2",
        "suspend-io",
    )
    assert (a.startup.wfc_timeout, a.startup.degr_wfc_timeout) == (3, 2)
    assert a.handlers == {"split-brain": "own", "fence-peer": "common"}

    def disk(config: ResourceConfig, number: int) -> tuple[int, int, int, bool]:
        options = config.volumes[number].disk_options
        return options.resync_rate, options.c_plan_ahead, options.al_extents, options.md_flushes

    assert disk(a, 0) == (3072, 2, 300, False)
    assert disk(b, 0) == (3072, 2, 200, False)
    assert disk(a, 1) == disk(b, 1) == (2048, 2, 100, False)


def test_the_last_of_repeated_options_is_effective(tmp_path: Path) -> None:
    text = "common { net { ping-int 3; ping-int 4; } }" + resource(
        "net { timeout 50; timeout 60; } protocol a;"
    )
    net = loaded(tmp_path, text).for_node("a")["r0"].net
    assert (net.timeout, net.ping_int, net.protocol) == (60, 4, "A")


def test_booleans_and_old_spellings(tmp_path: Path) -> None:
    text = resource(
        "net { use-rle no; always-asbp; allow-two-primaries yes; no-tcp-cork; }"
        "disk { no-disk-flushes; no-md-flushes; disk-drain no; al-updates; after r0; }"
        "handlers { outdate-peer /bin/x; }"
    )
    r0 = loaded(tmp_path, text).for_node("a")["r0"]
    assert (r0.net.use_rle, r0.net.always_asbp, r0.net.allow_two_primaries, r0.net.tcp_cork) == (
        False, True, True, False)  # fmt: skip
    disk = r0.volumes[0].disk_options
    assert (disk.disk_flushes, disk.md_flushes, disk.disk_drain, disk.al_updates, disk.resync_after) == (
        False, False, False, True, "r0")  # fmt: skip
    assert r0.handlers == {"fence-peer": "/bin/x"}


def test_the_syncer_section(tmp_path: Path) -> None:
    text = resource("syncer { rate 10M; al-extents 66; verify-alg md5; csums-alg sha1; cpu-mask f; "
                    "use-rle no; on-no-data-accessible suspend-io; c-min-rate 1M; "
                    "hold-off-threshold 3; }")  # fmt: skip
    configuration = loaded(tmp_path, text)
    r0 = configuration.for_node("a")["r0"]
    disk = r0.volumes[0].disk_options
    assert (disk.resync_rate, disk.al_extents, disk.c_min_rate) == (10240, 67, 1024)
    assert (r0.net.verify_alg, r0.net.csums_alg, r0.net.use_rle) == ("md5", "sha1", False)
    assert (r0.options.cpu_mask, r0.options.on_no_data_accessible) == ("f", "suspend-io")


def test_fencing_in_both_places(tmp_path: Path) -> None:
    def fencing(more: str) -> Fencing:
        return loaded(tmp_path, resource(more)).for_node("a")["r0"].volumes[0].disk_options.fencing

    assert fencing("") is Fencing.DONT_CARE
    assert fencing("disk { fencing resource-only; }") is Fencing.RESOURCE_ONLY
    assert fencing("net { fencing resource-and-stonith; }") is Fencing.RESOURCE_AND_STONITH
    assert fencing("net { fencing resource-only; } disk { fencing dont-care; }") is Fencing.DONT_CARE


def test_who_loses_may_be_named(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, resource("net { after-sb-0pri discard-node-a; }"))
    assert configuration.for_node("a")["r0"].net.after_sb_0pri is AfterSb.DISCARD_LOCAL
    assert configuration.for_node("b")["r0"].net.after_sb_0pri is AfterSb.DISCARD_REMOTE


def test_become_primary_on(tmp_path: Path) -> None:
    def startup(more: str) -> tuple[str, ...]:
        return loaded(tmp_path, resource(more)).for_node("b")["r0"].startup.become_primary_on

    assert startup("startup { become-primary-on a b; stacked-timeouts; }") == ("a", "b")
    both = "startup { become-primary-on both; } net { allow-two-primaries; }"
    assert set(startup(both)) == {"a", "b"}


def test_an_unknown_resync_after_is_a_warning(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, resource("disk { resync-after nix/1; }"))
    warning = configuration.warnings[-1]
    assert warning.startswith(
        f"{tmp_path}/t.conf:4: WARN: resource 'nix' mentioned in 'resync-after' option is not known"
    )
    assert configuration.for_node("a")["r0"].volumes[0].disk_options.resync_after == ""


# ------------------------------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("ignore-on c;", "'ignore-on' keyword is deprecated"),
        ("proxy { memlimit 100M; plugin { zlib level 9; } }", "'proxy' is not implemented"),
        (
            "options { quorum majority; quorum-minimum-redundancy off; }",
            "'quorum majority' is not implemented",
        ),
        ("net { transport rdma; } ", "'transport rdma' is not implemented"),
        ("net { rr-conflict retry-connect; }", "'rr-conflict retry-connect' is not implemented"),
        ('handlers { quorum-lost x; disconnected ""; }', "'quorum-lost x' is not implemented"),
        ("template-file x;", "'template-file' is not implemented"),
    ],
)
def test_what_is_not_implemented_is_accepted_with_one_warning(tmp_path: Path, more: str, named: str) -> None:
    configuration = loaded(tmp_path, resource(more))
    (warning,) = configuration.warnings
    assert warning.startswith(f"{tmp_path}/t.conf:4: WARN: ") and named in warning
    assert "r0" in configuration.for_node("a")


def test_one_warning_however_often(tmp_path: Path) -> None:
    text = "".join(
        resource(
            "proxy { }", f"r{i}", f"device minor {i}; disk /dev/{i};", HOSTS.replace("7000", str(7000 + i))
        )
        for i in range(3)
    )
    (warning,) = loaded(tmp_path, text).warnings
    assert warning.startswith(f"{tmp_path}/t.conf:4: WARN: ")


def test_what_needs_no_warning(tmp_path: Path) -> None:
    quiet = resource(
        "net { unplug-watermark 16; allow-remote-read yes; transport tcp; }"
        "disk { use-bmbv; max-bio-bvecs 1; disable-write-same; disk-barrier no; }"
        "options { quorum off; on-no-quorum suspend-io; auto-promote no; twopc-timeout 100; }"
        "startup { stacked-timeouts; }"
    )
    text = "global { usage-count yes; minor-count 3; udev-always-use-vnr; }" + quiet
    assert loaded(tmp_path, text).warnings == ()


def test_a_late_global_section_and_foreign_devices(tmp_path: Path) -> None:
    configuration = loaded(
        tmp_path, resource(volume="device /dev/drbd_db minor 1; disk /dev/x;") + "global { }"
    )
    assert [w.partition(": WARN: ")[2][:30] for w in configuration.warnings] == [
        "arbitrary device name /dev/drb", "You should put the global {} s",
    ]  # fmt: skip


def test_stacked_resources_are_ignored_with_a_warning(tmp_path: Path) -> None:
    text = resource() + resource(
        name="s", volume="", hosts="stacked-on-top-of r0 { device minor 10; address 10.0.0.3:1; } "
        "on a { device minor 10; disk /dev/q; address 10.0.0.4:1; }")  # fmt: skip
    configuration = loaded(tmp_path, text)
    assert list(configuration.for_node("a")) == ["r0"] and configuration.ignored("a") == ["s"]
    (warning,) = configuration.warnings
    assert "'stacked-on-top-of' is not implemented: resource s is ignored" in warning


# ------------------------------------------------------------------------------------- hosts and links


def test_a_missing_peer(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, "\n" + resource(hosts="on a { address 10.0.0.1:1; }"))
    with pytest.raises(ConfigError) as caught:
        configuration.for_node("a")
    assert str(caught.value) == (
        f"{tmp_path}/t.conf:2: in resource r0: a host section ('on PEER {{ ... }}') is missing: "
        "only 'on a' is there"
    )
    assert configuration.for_node("b") == {}


def test_three_hosts_need_connections(tmp_path: Path) -> None:
    three = HOSTS + "on c { address 10.0.0.3:7000; }"
    configuration = loaded(tmp_path, resource(hosts=three))
    with pytest.raises(ConfigError, match=r"two host sections expected, but got 3 \(a, b, c\)"):
        configuration.for_node("a")
    mesh = loaded(tmp_path, resource("connection-mesh { hosts a b c; }", hosts=three))
    with pytest.raises(ConfigError, match=r"one peer with a disk expected for host a, but got 2 \(b, c\)"):
        mesh.for_node("a")
    pair = loaded(tmp_path, resource("connection { host a; host b; }", hosts=three))
    assert pair.for_node("a")["r0"].peer == "b"
    with pytest.raises(ConfigError, match="a connection with host c expected"):
        pair.for_node("c")


def test_a_diskless_third_host_is_left_out(tmp_path: Path) -> None:
    hosts = HOSTS.replace("{", "{ node-id 4;", 1).replace("b {", "b { node-id 2;")
    text = resource("connection-mesh { hosts a b c; net { protocol B; } }",
                    hosts=hosts + "on c { node-id 3; disk none; address 10.0.0.3:7000; }")  # fmt: skip
    configuration = loaded(tmp_path, text)
    r0 = configuration.for_node("b")["r0"]
    assert (r0.peer, r0.node_id, r0.peer_node_id, r0.net.protocol) == ("a", 2, 4, "B")
    (warning,) = configuration.warnings
    assert "host c has no disk and is ignored" in warning


def test_a_diskless_host_of_a_pair(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, resource(hosts=HOSTS.replace("on b {", "on b { disk none;")))
    assert configuration.for_node("b")["r0"].volumes[0].disk == ""
    assert configuration.for_node("a")["r0"].volumes[0].peer_disk == ""
    quoted = loaded(tmp_path, resource(hosts=HOSTS.replace("on b {", 'on b { disk "none";')))
    assert quoted.for_node("b")["r0"].volumes[0].disk == f"{tmp_path}/none"


def test_addresses_of_a_connection(tmp_path: Path) -> None:
    paths = ("path { host a address 10.0.1.1:7; host b address 10.0.1.2:7; }"
             "path { host a address 10.0.2.1:7; host b address 10.0.2.2:7; }")  # fmt: skip
    text = resource(
        f"connection x {{ {paths} net {{ timeout 70; }} disk {{ resync-rate 5M; c-min-rate 7; }}"
        " volume 0 { disk { c-min-rate 8; } } }",
        hosts="on a { } on b { }",
    )
    configuration = loaded(tmp_path, text)
    r0 = configuration.for_node("b")["r0"]
    assert (str(r0.address), str(r0.peer_address)) == ("ipv4:10.0.1.2:7", "ipv4:10.0.1.1:7")
    assert r0.net.timeout == 70
    options = r0.volumes[0].disk_options
    assert (options.resync_rate, options.c_min_rate) == (5120, 8)
    assert "several paths" in configuration.warnings[0]


def test_two_connections_cannot_listen_on_one_address(tmp_path: Path) -> None:
    connection = "connection { host a address 10.0.9.1:7; host b address 10.0.9.2:%d; }"
    hosts = "on a { } on b { }"
    text = resource(connection % 7, hosts=hosts) + resource(
        connection % 8, name="r1", volume="device minor 1; disk /dev/y;", hosts=hosts
    )
    configuration = loaded(tmp_path, text)
    with pytest.raises(ConfigError, match=r":6: conflicting use of IP 'ipv4:10.0.9.1:7' in resource r1"):
        configuration.for_node("a")
    assert list(configuration.for_node("b")) == ["r0", "r1"]


def test_a_section_may_name_several_hosts(tmp_path: Path) -> None:
    configuration = loaded(tmp_path, resource(hosts=HOSTS.replace("on b", "on b1 b2")))
    assert configuration.for_node("b2")["r0"].node == "b2"
    a = configuration.for_node("a")["r0"]
    assert (a.peer, a.peer_names) == ("b1", ("b1", "b2"))


def test_floating_sections_are_found_by_address(tmp_path: Path) -> None:
    here, there = "127.0.0.1:7000", "192.0.2.77:7000"
    configuration = loaded(
        tmp_path, resource(hosts=f"floating {here}; floating ipv4 {there} {{ disk /dev/y; }}")
    )
    r0 = configuration.for_node("whatever")["r0"]
    assert (r0.node, r0.peer, r0.volumes[0].disk, r0.volumes[0].peer_disk) == (
        here,
        there,
        "/dev/x",
        "/dev/y",
    )
    assert configuration.for_node(there)["r0"].volumes[0].disk == "/dev/y"
    elsewhere = loaded(tmp_path, resource(hosts=f"floating {there}; floating 192.0.2.78:1;"))
    assert elsewhere.for_node("whatever") == {} and elsewhere.ignored("whatever") == ["r0"]
    both = loaded(tmp_path, resource(hosts=f"floating {here}; floating 127.0.0.1:7001;"))
    with pytest.raises(ConfigError, match="There are multiple host sections for this node"):
        both.for_node("whatever")
    assert both.for_node("127.0.0.1:7001")["r0"].peer == here


def test_other_families(tmp_path: Path) -> None:
    sdp = loaded(tmp_path, resource(hosts=HOSTS.replace("address", "address sdp")))
    assert sdp.for_node("a")["r0"].address.family == "ipv4"
    assert "'sdp' is not implemented: TCP over IPv4 is used" in sdp.warnings[0]
    mixed = loaded(tmp_path, resource(hosts=HOSTS.replace("10.0.0.2", "ipv6 [fd00::2]")))
    with pytest.raises(ConfigError, match=r"addresses of one family expected, but got ipv4 .* and ipv6"):
        mixed.for_node("a")


def test_the_local_address_is_looked_for(tmp_path: Path) -> None:
    hosts = "on a { address 127.0.0.1:7000; } on b { address 192.0.2.77:7000; }"
    configuration = loaded(tmp_path, resource(hosts=hosts))
    assert conf.address_problem(configuration, configuration.for_node("a")["r0"]) is None
    problem = conf.address_problem(configuration, configuration.for_node("b")["r0"])
    assert problem == f"{tmp_path}/t.conf: in resource r0, on b:\n\tIP 192.0.2.77 not found on this host."
    trusting = loaded(tmp_path, "global { disable-ip-verification; }" + resource(hosts=hosts))
    assert conf.address_problem(trusting, trusting.for_node("b")["r0"]) is None


# ----------------------------------------------------------------------- options that exclude each other


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ("protocol A; disk { fencing resource-and-stonith; }", 154),
        ("protocol A; disk { fencing resource-only; }", 0),
        ("protocol B; disk { fencing resource-and-stonith; }", 0),
        ("net { on-congestion pull-ahead; }", 155),
        ("net { on-congestion pull-ahead; protocol A; }", 0),
        ("net { allow-two-primaries; protocol B; }", 139),
        ("net { allow-two-primaries; }", 0),
    ],
)
def test_refusals_when_applied(tmp_path: Path, more: str, code: int) -> None:
    refused = check(loaded(tmp_path, resource(more)).for_node("a")["r0"])
    assert (refused.code if refused else 0) == code
    assert refused is None or (refused.exit_code == 10 and refused.hint)
