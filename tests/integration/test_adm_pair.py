"""`tandemadm` on two nodes: from create-md to down, and every refusal with its exit code."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.adm_pair import DISK_SIZE, PATIENCE, NbdClient, Pair


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """Connected, UpToDate on both, Primary on alpha; tests leave it so."""
    pair = Pair()
    pair.create()
    pair.up()
    pair.promote()
    yield pair
    pair.close()


def test_from_nothing_to_a_mirror_and_back() -> None:
    pair = Pair()
    try:
        pair.create()
        assert pair.ok("alpha", "dstate", "r0") == "Inconsistent\n"
        pair.up()
        assert pair.ok("alpha", "role", "r0") == "Secondary/Secondary\n"
        assert pair.ok("alpha", "dstate", "r0") == "Inconsistent/Inconsistent\n"
        refused = pair.adm("alpha", "primary", "r0")
        assert refused.code == 17
        assert refused.err.startswith("0: State change failed: (-2) Need access to UpToDate data\n")
        pair.promote()
        assert pair.ok("beta", "wait-sync", PATIENCE, "r0") == ""
        assert pair.ok("alpha", "role", "r0") == "Primary/Secondary\n"
        assert pair.ok("beta", "role", "r0") == "Secondary/Primary\n"
        for node in ("alpha", "beta"):
            assert pair.ok(node, "cstate", "r0") == "Connected\n"
            assert pair.ok(node, "dstate", "r0") == "UpToDate/UpToDate\n"
        for node in ("alpha", "beta"):
            assert pair.ok(node, "down", "r0") == ""
            assert pair.ok(node, "status") == "# No currently configured DRBD found.\n"
            assert not any(pair.path(node, kind).exists() for kind in ("ctl", "nbd", "pid"))
        assert pair.ok("beta", "get-gi", "r0").split(":")[4:6] == ["1", "1"]
        assert pair.ok("beta", "dstate", "r0") in ("UpToDate\n", "Consistent\n")
    finally:
        pair.close()


def test_status(pair: Pair) -> None:
    assert pair.ok("alpha", "status", "r0") == (
        "r0 role:Primary\n  disk:UpToDate\n  beta role:Secondary\n    peer-disk:UpToDate\n\n"
    )
    (resource,) = json.loads(pair.ok("alpha", "status", "--json", "r0"))
    assert resource["devices"][0]["size"] == DISK_SIZE // 1024 - 40  # metadata of 64 MiB: 40 KiB
    assert resource["connections"][0]["name"] == "beta"
    assert resource["connections"][0]["peer_devices"][0]["percent-in-sync"] == 100.0
    verbose = pair.ok("beta", "status", "--verbose", "--statistics")
    assert f"backing_dev:{pair.dir}/b.img" in verbose.replace("\n      ", " ")


def test_events2_now(pair: Pair) -> None:
    lines = pair.ok("alpha", "events2", "--now", "r0").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["exists", "resource"], ["exists", "connection"], ["exists", "device"], ["exists", "peer-device"],
        ["exists", "path"], ["exists", "-"],
    ]  # fmt: skip
    assert "role:Primary" in lines[0] and "promotion_score:10102" in lines[0]


def test_events2_follows_changes(pair: Pair) -> None:
    with pair.popen("alpha", "events2", "--timestamps", "r0") as events:
        assert events.stdout is not None
        while not events.stdout.readline().endswith(" exists -\n"):
            pass
        pair.ok("alpha", "suspend-io", "r0")
        assert events.stdout.readline().endswith(" change resource name:r0 suspended:user\n")
        pair.ok("alpha", "resume-io", "r0")
        assert events.stdout.readline().endswith(" change resource name:r0 suspended:no\n")
        events.terminate()


def test_generations_are_equal_and_explained(pair: Pair) -> None:
    alpha = pair.ok("alpha", "get-gi", "r0").strip().split(":")
    beta = pair.ok("beta", "get-gi", "r0").strip().split(":")
    assert int(alpha[0], 16) | 1 == int(beta[0], 16) | 1
    assert alpha[4:] == ["1", "1", "1", "1", "0", "0", "0"]
    shown = pair.ok("alpha", "show-gi", "r0")
    assert ":".join(alpha) in shown and "flags: Primary, Connected, UpToDate\n" in shown


@pytest.mark.parametrize(
    ("node", "words", "code", "line"),
    [
        ("beta", "primary", 11, "0: State change failed: (-1) Multiple primaries not allowed by config"),
        ("alpha", "connect", 10, "r0: Failure: (102) Local address(port) already in use."),
        ("alpha", "new-current-uuid", 10, "0: Failure: (151) Need to be StandAlone"),
        ("alpha", "resume-sync", 10, "0: Failure: (135) Sync-pause flag is already cleared"),
        ("alpha", "outdate", 17, "0: State change failed: (-2) Need access to UpToDate data"),
        ("alpha", "up", 1, "Device '0' is configured!"),
        ("alpha", "attach", 20, "Device '0' is configured!"),
        ("alpha", "create-md --force", 20, "Device '0' is configured!"),
        ("alpha", "dump-md", 20, "Device '0' is configured!"),
        ("alpha", "wipe-md --force", 20, "Device '0' is configured!"),
        ("alpha", "apply-al", 20, "Device '0' is configured!"),
    ],
)  # fmt: skip
def test_refusals(pair: Pair, node: str, words: str, code: int, line: str) -> None:
    before = pair.ok(node, "status")
    result = pair.adm(node, *words.split(), "r0")
    assert (result.code, result.out) == (code, "")
    first, *advice = result.err.splitlines()
    assert first == line
    assert advice and all("Traceback" not in text for text in advice)
    assert pair.ok(node, "status") == before


@pytest.mark.parametrize(
    "words", ["primary", "outdate", "adjust", "wait-connect", "wait-sync", "check-resize"]
)
def test_nothing_to_do_is_success(pair: Pair, words: str) -> None:
    node = "beta" if words == "outdate" else "alpha"
    assert pair.ok(node, words, "r0") == ""


def test_adjust_has_nothing_to_print_when_all_is_as_configured(pair: Pair) -> None:
    assert pair.ok("alpha", "-d", "adjust", "r0") == ""


def test_an_open_export_is_held_by_somebody(pair: Pair) -> None:
    client = NbdClient(pair.path("alpha", "nbd"), "r0")
    try:
        assert client.size == DISK_SIZE - 40 * 1024
        assert client.write(8192, b"x" * 4096) == 0
        for command, obj in (("secondary", "0"), ("down", "r0")):
            result = pair.adm("alpha", command, "r0")
            assert result.code == 11
            assert result.err.splitlines()[0] == (
                f"{obj}: State change failed: (-12) Device is held open by someone"
            )
        assert pair.ok("alpha", "role", "r0") == "Primary/Secondary\n"
    finally:
        client.close()


def test_the_secondarys_export_says_why_not(pair: Pair) -> None:
    client = NbdClient(pair.path("beta", "nbd"), "r0")
    assert "Secondary" in client.refusal and "tandemadm primary r0" in client.refusal
    client.close()


def test_pausing_twice(pair: Pair) -> None:
    pair.ok("alpha", "pause-sync", "r0")
    twice = pair.adm("alpha", "pause-sync", "r0")
    pair.ok("alpha", "resume-sync", "r0")
    assert twice.code == 10
    assert twice.err.startswith("0: Failure: (134) Sync-pause flag is already set\n")


def test_disconnect_and_connect(pair: Pair) -> None:
    pair.ok("alpha", "disconnect", "r0")
    assert pair.ok("alpha", "cstate", "r0") == "StandAlone\n"
    again = pair.adm("alpha", "disconnect", "r0")
    assert again.code == 10
    assert again.err.startswith("??: Failure: (162) Invalid configuration request\n")
    needs = pair.adm("alpha", "detach", "r0")
    assert needs.code == 17 and "(-2) Need access to UpToDate data" in needs.err
    discard = pair.adm("alpha", "--", "--discard-my-data", "connect", "r0")
    assert discard.code == 10 and "(123) --discard-my-data not allowed when primary." in discard.err
    assert pair.adm("alpha", "wait-sync", "r0").code == 5
    assert pair.ok("alpha", "wait-connect", "r0") == ""  # StandAlone: there is nothing to wait for
    pair.ok("alpha", "connect", "r0")
    pair.ok("alpha", "wait-connect", PATIENCE, "r0")
    pair.ok("alpha", "wait-sync", PATIENCE, "r0")


def test_waiting_for_a_peer_that_does_not_come(pair: Pair) -> None:
    pair.ok("beta", "disconnect", "r0")
    result = pair.adm("alpha", "wait-connect", "--wfc-timeout=1", "r0")
    assert (result.code, result.out) == (5, "")
    pair.ok("beta", "connect", "r0")
    pair.ok("alpha", "wait-sync", PATIENCE, "r0")


def test_detach_and_attach(pair: Pair) -> None:
    pair.ok("beta", "detach", "r0")
    assert pair.ok("beta", "dstate", "r0") == "Diskless/UpToDate\n"
    pair.ok("beta", "detach", "r0")
    no_disk = pair.adm("beta", "resize", "r0")
    assert no_disk.code == 10 and "(138)" in no_disk.err
    pair.ok("beta", "attach", "r0")
    pair.ok("beta", "wait-sync", PATIENCE, "r0")
    assert pair.ok("beta", "dstate", "r0") == "UpToDate/UpToDate\n"


def test_invalidate_copies_everything_from_the_peer(pair: Pair) -> None:
    pair.ok("beta", "invalidate", "r0")
    pair.ok("beta", "wait-sync", PATIENCE, "r0")
    assert pair.ok("beta", "dstate", "r0") == "UpToDate/UpToDate\n"


def test_sh_status_of_a_running_resource(pair: Pair) -> None:
    out = pair.ok("alpha", "sh-status", "r0")
    assert "_conf_volume=0\n_minor=0\n_res_name=r0\n_volume=0\n_known=Configured\n\n" in out
    assert "_cstate=Connected\n_role=Primary\n_peer=Secondary\n" in out


def test_adjust_applies_a_changed_file(pair: Pair) -> None:
    pair.configure(net="ping-int 7;")
    (line,) = pair.ok("alpha", "-d", "adjust", "r0").splitlines()
    ends = f"ipv4:127.0.0.1:{pair.port_a} ipv4:127.0.0.1:{pair.port_b}"
    assert line.startswith(f"drbdsetup-84 net-options {ends} --set-defaults --")
    assert " --ping-int=7" in line
    pair.ok("alpha", "adjust", "r0")
    assert pair.ok("alpha", "-d", "adjust", "r0") == ""
    pair.configure(net="allow-two-primaries yes; protocol A;")
    refused = pair.adm("alpha", "adjust", "r0")
    pair.configure()
    assert refused.code == 10 and "Protocol C required" in refused.err
    pair.ok("alpha", "adjust", "r0")
    assert pair.ok("alpha", "role", "r0") == "Primary/Secondary\n"


def test_adjust_changes_the_digest_of_a_live_connection(pair: Pair) -> None:
    began = {node: pair.path(node, "log").stat().st_size for node in ("alpha", "beta")}
    pair.configure(net="data-integrity-alg crc32c;")
    (line,) = pair.ok("alpha", "-d", "adjust", "r0").splitlines()
    assert " net-options " in line and "--data-integrity-alg=crc32c" in line
    for node in ("alpha", "beta", "alpha"):
        client = NbdClient(pair.path("alpha", "nbd"), "r0")
        assert client.write(16384, node[:1].encode() * 4096) == 0
        client.close()
        if node == "beta":
            pair.configure()
        pair.ok(node, "adjust", "r0")
    pair.ok("beta", "adjust", "r0")
    pair.ok("alpha", "adjust", "r0")
    for node, at in began.items():
        assert pair.ok(node, "cstate", "r0") == "Connected\n"
        assert "conn(" not in pair.path(node, "log").read_text()[at:]


def test_adjust_moves_a_connection_and_a_disk(pair: Pair) -> None:
    text = pair.file.read_text()
    (pair.dir / "moved.img").symlink_to(pair.dir / "b.img")
    changed = text.replace(f":{pair.port_b};", f":{pair.port_nbd};").replace("/b.img", "/moved.img")
    pair.file.write_text(changed)
    steps = [line.split()[1] for line in pair.ok("beta", "-d", "adjust", "r0").splitlines()]
    assert steps == ["detach", "0", "attach", "disconnect", "connect"]  # drbdmeta names its minor first
    for node in ("beta", "alpha"):
        pair.ok(node, "adjust", "r0")
    pair.ok("alpha", "wait-sync", PATIENCE, "r0")
    status = pair.ok("beta", "status", "--verbose", "r0")
    pair.file.write_text(text)
    for node in ("beta", "alpha"):
        pair.ok(node, "adjust", "r0")
    pair.ok("alpha", "wait-sync", PATIENCE, "r0")
    assert f"backing_dev:{pair.dir}/moved.img" in status.replace("\n      ", " ")
    assert pair.ok("beta", "cstate", "r0") == "Connected\n"
