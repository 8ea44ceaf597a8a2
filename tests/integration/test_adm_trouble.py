"""What operators and crashes do to `tandemadm` and `tandemd`: one clear sentence, and the right exit code."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.adm_pair import DISK_SIZE, PATIENCE, Pair, is_process, wait_until


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def sentences(err: str) -> list[str]:
    assert "Traceback" not in err
    return err.splitlines()


def test_without_metadata_up_says_create_md(pair: Pair) -> None:
    result = pair.adm("alpha", "up", "r0")
    assert result.code == 1
    first, *advice = sentences(result.err)
    assert first == "0: Failure: (119) No valid meta-data signature found."
    assert "tandemadm create-md r0/0" in advice[-1]
    # The daemon is there, as the kernel's minor would be; the advice can be followed.
    assert pair.ok("alpha", "role", "r0") == "Unconfigured\n"
    assert pair.adm("alpha", "create-md", "r0").code == 0
    assert pair.ok("alpha", "up", "r0") == ""
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_a_disk_that_shrank_is_said_to_have_shrunk(pair: Pair) -> None:
    pair.create()
    os.truncate(pair.dir / "a.img", DISK_SIZE - (4 << 20))
    result = pair.adm("alpha", "up", "r0")
    assert result.code == 1
    first, advice = sentences(result.err)
    assert first == "0: Failure: (170) Implicit device shrinking not allowed. See kernel log."
    assert f"a.img has shrunk from {DISK_SIZE} to {DISK_SIZE - (4 << 20)} bytes" in advice
    assert "this copy is lost" in advice and "119" not in result.err
    pair.ok("alpha", "down", "r0")
    assert "has shrunk from" in pair.adm("alpha", "get-gi", "r0").err


def test_a_disk_that_is_not_there(pair: Pair) -> None:
    (pair.dir / "a.img").unlink()
    result = pair.adm("alpha", "up", "r0")
    assert result.code == 1
    assert sentences(result.err)[0].startswith("0: Failure: (104) Can not open backing device.")
    assert f"{pair.dir}/a.img" in result.err


def test_a_disk_another_daemon_uses(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    text = pair.file.read_text()
    pair.file.write_text(text.replace("b.img", "a.img").replace(f":{pair.port_a};", f":{pair.port_nbd};"))
    result = pair.adm("beta", "up", "r0")
    assert result.code == 1
    assert "(114)" in sentences(result.err)[0] and "claimed" in result.err


def test_a_replication_port_in_use(pair: Pair) -> None:
    pair.create()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", pair.port_a))
        other.listen()
        result = pair.adm("alpha", "up", "r0")
        assert result.code == 1
        assert sentences(result.err)[0] == "r0: Failure: (102) Local address(port) already in use."
        assert str(pair.port_a) in result.err
        assert pair.ok("alpha", "cstate", "r0") == "StandAlone\n"
    pair.ok("alpha", "connect", "r0")
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_an_nbd_port_in_use(pair: Pair) -> None:
    pair.configure(device="nbd://127.0.0.1:NBDPORT/data")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", pair.port_nbd))
        other.listen()
        result = pair.adm("alpha", "up", "r0")
    assert result.code == 20
    (line,) = sentences(result.err)
    assert line.startswith("r0: ") and str(pair.port_nbd) in line
    assert pair.adm("alpha", "role", "r0").code == 20


def test_a_run_directory_too_long_for_sockets(pair: Pair) -> None:
    pair.run = pair.dir / ("x" * 100)
    for words in (("up", "r0"), ("role", "r0")):
        result = pair.adm("alpha", *words)
        assert result.code == 20
        (line,) = sentences(result.err)
        assert "limit is 107" in line and "--run-dir" in line


def test_a_run_directory_that_is_a_file(pair: Pair) -> None:
    pair.run.write_text("")
    result = pair.adm("alpha", "up", "r0")
    assert result.code == 20
    (line,) = sentences(result.err)
    assert "cannot create the run directory" in line


def test_two_ups_at_once_take_turns(pair: Pair) -> None:
    pair.create()
    with pair.popen("alpha", "up", "r0") as first, pair.popen("alpha", "up", "r0") as second:
        ends = [process.communicate(timeout=120)[1] for process in (first, second)]
    assert sorted((first.returncode, second.returncode)) == [0, 1]
    late = ends[0] or ends[1]
    assert late.startswith("Device '0' is configured!\n") and "" in ends
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_what_a_killed_daemon_leaves_confuses_nobody(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    pair.kill("alpha")
    for kind in ("ctl", "pid", "nbd"):
        assert pair.path("alpha", kind).exists()
    assert pair.adm("alpha", "role", "r0").code == 20
    assert pair.ok("alpha", "status") == "# No currently configured DRBD found.\n"
    assert pair.ok("alpha", "dstate", "r0") == "Inconsistent\n"
    assert pair.ok("alpha", "down", "r0") == ""
    assert pair.ok("alpha", "up", "r0") == ""
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_a_pid_file_of_somebody_elses_process_is_not_a_daemon(pair: Pair) -> None:
    pair.create()
    pair.path("alpha", "pid").parent.mkdir(parents=True, exist_ok=True)
    pair.path("alpha", "pid").write_text(f"{os.getpid()}\n")
    assert pair.ok("alpha", "up", "r0") == ""
    assert pair.pid("alpha") != os.getpid()


def test_only_one_daemon_for_a_resource(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    with pair.popen("alpha", "r0", "--foreground", tool="daemon") as second:
        _, err = second.communicate(timeout=60)
    assert second.returncode == 20
    assert f"is running already (pid {pair.pid('alpha')})" in err
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_foreground_daemon_comes_up_by_itself_and_ends_in_order(pair: Pair, number: signal.Signals) -> None:
    pair.create()
    with pair.popen("alpha", "r0", "--foreground", tool="daemon") as daemon:
        assert daemon.stderr is not None
        log = ""
        while "-> WFConnection" not in log:
            line = daemon.stderr.readline()
            assert line, log
            log = line
        assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"
        daemon.send_signal(number)
        rest = daemon.stderr.read()
    assert daemon.returncode == 0
    assert "-> Diskless" in rest and "Traceback" not in rest
    assert not pair.path("alpha", "ctl").exists()
    assert not pair.path("alpha", "pid").exists()


def test_a_foreground_daemon_that_cannot_attach_ends_with_the_reason(pair: Pair) -> None:
    with pair.popen("alpha", "r0", "--foreground", tool="daemon") as daemon:
        _, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 10
    assert "(119)" in err and "tandemadm create-md r0/0" in err and "Traceback" not in err


def test_a_foreground_daemon_tells_systemd(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.create()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(pair.dir / "notify"))
        systemd.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(pair.dir / "notify"))
        with pair.popen("alpha", "r0", "--foreground", tool="daemon") as daemon:
            assert systemd.recv(100) == b"READY=1"
            daemon.send_signal(signal.SIGTERM)
            daemon.communicate(timeout=60)


def test_tandemd_in_the_background_is_tandemadm_up(pair: Pair) -> None:
    pair.create()
    with pair.popen("alpha", "r0", tool="daemon") as daemon:
        assert daemon.communicate(timeout=60) == ("", "")
    assert daemon.returncode == 0
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_a_resource_the_configuration_does_not_have(pair: Pair) -> None:
    with pair.popen("alpha", "nobody", "--foreground", tool="daemon") as daemon:
        _, err = daemon.communicate(timeout=60)
    assert daemon.returncode == 1
    assert "'nobody' not defined in your config (for this host)." in err


def test_ctrl_c_ends_waiting_and_nothing_else(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    wait_until(lambda: n_connections(pair) == 0)  # that of `up`, whose end the daemon may not have seen yet
    with pair.popen("alpha", "wait-connect", PATIENCE, "r0") as waiting:
        wait_until(lambda: n_connections(pair) >= 1)
        waiting.send_signal(signal.SIGINT)
        _, err = waiting.communicate(timeout=60)
    assert waiting.returncode == 130
    assert err.strip() == "Interrupted."
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def n_connections(pair: Pair) -> int:
    """Established connections on alpha's control socket."""
    path = str(pair.path("alpha", "ctl"))
    with open("/proc/net/unix") as table:
        rows = [line.split() for line in table]
    return sum(row[-1] == path and row[5] == "03" for row in rows)


def test_events_end_and_begin_with_the_daemon(pair: Pair) -> None:
    pair.create()
    with pair.popen("alpha", "events2") as events:
        assert events.stdout is not None
        assert events.stdout.readline() == "exists -\n"
        pair.ok("alpha", "new-resource", "r0")
        assert events.stdout.readline().startswith("create resource name:r0 role:Secondary")
        pair.kill("alpha")
        while (line := events.stdout.readline()) != "destroy resource name:r0\n":
            assert line
        events.terminate()


def test_events_poll_counters(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    words = [sys.executable, "-m", "tandem.tools.adm", *pair.where("alpha"), "events2", "--full", "--poll"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as events:
        assert events.stdin is not None and events.stdout is not None
        while events.stdout.readline() != "exists -\n":
            pass
        events.stdin.write("n\n")
        events.stdin.flush()
        pair.ok("alpha", "suspend-io", "r0")
        line = events.stdout.readline()
        assert line.startswith("change resource name:r0 role:Secondary suspended:user")
        assert "write-ordering:" in line and "promotion_score:" in line
        events.stdin.close()
        assert events.wait(60) == 0


def test_a_configuration_from_standard_input(pair: Pair) -> None:
    pair.create()
    text = pair.file.read_text()
    pair.file.unlink()
    where = ["-c", "-", *pair.where("alpha")[2:]]
    up = subprocess.run(
        [sys.executable, "-m", "tandem.tools.adm", *where, "up", "r0"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (up.returncode, up.stderr) == (0, "")
    assert pair.ok("alpha", "cstate", "r0") == "WFConnection\n"  # needs no configuration at all


@pytest.mark.parametrize("name", ["x" * 5000, "a/../../b", "\udcff", "", "-", "%2F"])
def test_strange_names_are_not_defined(pair: Pair, name: str) -> None:
    result = pair.adm("alpha", "role", "--", name)
    assert result.code in (1, 20) and len(sentences(result.err)) == 1


def test_a_stopped_daemon_is_a_sentence_and_no_hang(pair: Pair) -> None:
    pair.create()
    pair.ok("alpha", "up", "r0")
    pid = pair.pid("alpha")
    os.kill(pid, signal.SIGSTOP)
    try:
        result = pair.adm("alpha", "status", "r0")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert result.code == 20
    assert sentences(result.err) == ["r0: the daemon did not answer within 5 seconds"]
    assert is_process(pid) and pair.ok("alpha", "cstate", "r0") == "WFConnection\n"


def test_an_export_by_uri(pair: Pair) -> None:
    pair.configure(device="nbd://127.0.0.1:NBDPORT/data")
    pair.create()
    pair.ok("alpha", "up", "r0")
    with socket.create_connection(("127.0.0.1", pair.port_nbd), timeout=30) as client:
        assert client.recv(8) == b"NBDMAGIC"
    assert not pair.path("alpha", "nbd").exists()
    pair.ok("alpha", "down", "r0")


def test_metadata_goes_out_and_in_as_text(pair: Pair) -> None:
    pair.create()
    dump = pair.dir / "dump"
    dump.write_text(pair.ok("alpha", "dump-md", "r0"))
    before = pair.ok("alpha", "get-gi", "r0")
    assert pair.adm("alpha", "wipe-md", "--force", "r0").code == 0
    assert pair.adm("alpha", "get-gi", "r0").code == 1
    assert pair.adm("alpha", "restore-md", "--force", "r0", str(dump)).code == 0
    assert pair.ok("alpha", "get-gi", "r0") == before


def test_invalidate_and_outdate_without_a_daemon(pair: Pair) -> None:
    pair.create()
    worse = pair.adm("alpha", "outdate", "r0")
    assert worse.code == 5 and worse.err == "Device is inconsistent.\n"
    assert pair.adm("alpha", "set-gi", "--force", "r0", "::::1:1").code == 0
    assert pair.ok("alpha", "outdate", "r0") == ""
    assert pair.ok("alpha", "dstate", "r0") == "Outdated\n"
    assert pair.ok("alpha", "invalidate", "r0") == ""
    assert pair.ok("alpha", "dstate", "r0") == "Inconsistent\n"


def test_create_md_asks_before_it_overwrites(pair: Pair) -> None:
    pair.create()
    declined = pair.adm("alpha", "create-md", "r0")
    assert declined.code == 1
    assert "Operation cancelled." in declined.out
    assert "not waiting for confirmation" in declined.err
