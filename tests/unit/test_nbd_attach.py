"""`nbd attach` without a kernel: names, places, what an export must offer, netlink's attributes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tandem.nbd.client_negotiation import Terms
from tandem.tools import adm, nbd_device
from tandem.tools.adm_nbd import check_same, find_places
from tandem.tools.adm_session import General, Quit, Session
from tandem.tools.nbd_connect import Opened, Unavailable, in_order, open_first, unfit
from tandem.tools.nbd_device import Attachment, NbdError, Place
from tandem.tools.nbd_keeper import KeeperState, save_state
from tandem.tools.nbd_netlink import attribute, attributes, connected_devices, sockets

from tests.scarcity import no_more_files

CONFIG = """\
global { disable-ip-verification; }
resource r0 {
    meta-disk internal; disk /dev/vg/a;
    on alpha { address 10.0.0.1:7788; device nbd://10.0.0.1/r0; }
    on beta  { address 10.0.0.2:7788; device nbd://0.0.0.0:10810/other; }
}
resource r1 {
    on alpha { address 10.0.0.1:7789;
        volume 0 { device /dev/drbd6 minor 6; disk /dev/vg/c; meta-disk internal; }
        volume 1 { device nbd://10.0.0.1:1234/r1v1; disk /dev/vg/d; meta-disk internal; } }
    on beta { address 10.0.0.2:7789;
        volume 0 { device /dev/drbd6 minor 6; disk /dev/vg/c; meta-disk internal; }
        volume 1 { device nbd://10.0.0.2:1234/r1v1; disk /dev/vg/d; meta-disk internal; } }
}
"""


def session(directory: Path, node: str) -> Session:
    file = directory / "tandem.conf"
    file.write_text(CONFIG)
    return Session(General(str(file), node, str(directory / "run")))


# ----------------------------------------------------------------------------------------- places


def test_places_of_a_third_host(tmp_path: Path) -> None:
    alpha, beta = Place("alpha", "r0", host="10.0.0.1", port=10809), Place("beta", "other", host="10.0.0.2", port=10810)
    assert find_places(session(tmp_path, "gamma"), "r0") == ("r0", [alpha, beta])


def test_this_node_is_asked_first_where_it_listens(tmp_path: Path) -> None:
    name, places = find_places(session(tmp_path, "beta"), "r0/0")
    assert name == "r0"
    assert [(place.node, place.host) for place in places] == [("beta", "0.0.0.0"), ("alpha", "10.0.0.1")]


def test_volumes_have_their_own_places(tmp_path: Path) -> None:
    name, places = find_places(session(tmp_path, "gamma"), "r1/1")
    assert name == "r1/1" and [str(place) for place in places] == ["10.0.0.1:1234", "10.0.0.2:1234"]


def test_a_local_socket_is_for_its_own_node(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, places = find_places(session(tmp_path, "alpha"), "r1/0")
    assert name == "r1/0"
    assert places == [Place("alpha", "r1", path=str(tmp_path / "run" / "alpha" / "r1.nbd"))]
    assert "only alpha offers it" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("target", "code", "part"),
    [
        ("r1/0", 10, "no node offers it"),
        ("r1", 1, "name one of: r1/0, r1/1"),
        ("r1/7", 1, "name one of"),
        ("r9", 1, "not defined"),
        ("r0/x", 1, "not defined"),
    ],
)
def test_what_cannot_be_attached(tmp_path: Path, target: str, code: int, part: str) -> None:
    with pytest.raises(Quit) as quit_:
        find_places(session(tmp_path, "gamma"), target)
    assert quit_.value.code == code and part in str(quit_.value)


def test_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (["attach", "r0"], ["detach"], ["list", "r0"]):
        assert adm.run(["nbd", *words]) == 1
        assert capfd.readouterr().err.count("\n") == 1
    assert adm.run(["nbd", "frobnicate"]) == 1
    assert "Unknown command 'nbd frobnicate'" in capfd.readouterr().err
    assert adm.run(["nbd", "attach", "/dev/nbd3", "r0"]) == 1
    assert capfd.readouterr().err.endswith("then where: tandemadm nbd attach r0 /dev/nbd3\n")


@pytest.mark.parametrize(
    ("option", "most"), [("--connections", 64), ("--timeout", 86400), ("--dead-timeout", 1000000)]
)
def test_numbers_have_limits(capfd: pytest.CaptureFixture[str], option: str, most: int) -> None:
    for number in ("0", "-1", "x", str(most + 1), "9" * 30):
        assert adm.run(["nbd", "attach", f"{option}={number}", "r0", "/dev/nbd0"]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and f"'{option}'" in said and number in said
    assert f"1<=x<={most}" in said


def shown(directory: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A kernel in which these volumes are /dev/nbd0, /dev/nbd1 and so on."""
    monkeypatch.setattr(nbd_device, "SYS_BLOCK", directory / "sys")
    for index, name in enumerate(names):
        (directory / "sys" / f"nbd{index}").mkdir(parents=True)
        (directory / "sys" / f"nbd{index}" / "backend").write_text(f"tandem:{name}\n")


def test_what_to_detach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A dry run needs neither a driver nor root."""
    monkeypatch.setattr(nbd_device, "open_driver", pytest.fail)
    shown(tmp_path, monkeypatch, "r0", "r1/0", "r1/1", "r2/1")
    for target, device in (("r0", 0), ("r0/0", 0), ("r1/0", 1), ("r1/1", 2), ("r2", 3), ("/dev/nbd2", 2)):
        assert adm.run(["-d", "nbd", "detach", target]) == 0
        assert capfd.readouterr().out.startswith(f"/dev/nbd{device} would no longer be ")
    for target, part in (("r1", "r1 is /dev/nbd1 and /dev/nbd2; name the device"), ("r0/1", "not attached"),
                         ("r2/0", "not attached"), ("/dev/sda", "not attached"), ("/dev/nbd9", "was not attached")):
        assert adm.run(["nbd", "detach", target]) in (1, 20)
        said = capfd.readouterr().err
        assert part in said and said.count("\n") == 1


def test_other_options_than_those_of_an_attached_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown(tmp_path, monkeypatch, "r0")
    here = session(tmp_path, "alpha")
    wanted = Attachment("r0", "/dev/nbd0", (), 2, 15, 1000000)
    file = here.paths.nbd_device("/dev/nbd0", "state")
    file.parent.mkdir(parents=True)
    save_state(file, KeeperState(wanted, 0))
    check_same(here, wanted, True, None, None, None)
    check_same(here, wanted, True, 2, 15, 1000000)
    check_same(here, wanted, False, 2, 7, 7)  # a new keeper changes the timeouts
    for given, part in (((4, None, None), "--connections 2"), ((None, 7, None), "--timeout 15"),
                        ((None, None, 7), "--dead-timeout 1000000")):
        with pytest.raises(NbdError, match=f"attached already, with {part}; .* nbd detach /dev/nbd0"):
            check_same(here, wanted, True, *given)


def test_dry_run_attaches_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tandem.conf").write_text(CONFIG)
    where = ["-d", "-c", str(tmp_path / "tandem.conf"), "--node", "gamma", "--run-dir", str(tmp_path / "run")]
    assert adm.run([*where, "nbd", "attach", "r0", "/dev/nbd0"]) == 0
    assert capfd.readouterr().out == (
        "r0 would be /dev/nbd0, served by alpha (10.0.0.1:10809) or beta (10.0.0.2:10810)\n"
    )
    assert not (tmp_path / "run").exists()


def test_device_names() -> None:
    assert nbd_device.device_index("/dev/nbd12") == nbd_device.device_index("nbd12") == 12
    assert Attachment("r0/1", "/dev/nbd3", (), 2, 15, 99).backend == "tandem:r0/1"
    for name in ("/dev/nbd0p1", "/dev/sda", "nbd", "/dev/nbdx"):
        with pytest.raises(NbdError, match="not an nbd device"):
            nbd_device.device_index(name)
    assert nbd_device.device_index("/dev/nbd32767") == 32767
    for number in ("32768", "9" * 5000):
        with pytest.raises(NbdError, match="the last nbd device is /dev/nbd32767") as error:
            nbd_device.device_index(f"/dev/nbd{number}")
        assert error.value.code == 1


def test_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_device, "LINKS", tmp_path / "by-res")
    nbd_device.make_link("r0/1", 5)
    link = nbd_device.link_of("r0/1")
    assert (link.parent / link.readlink()).resolve() == Path("/dev/nbd5")
    nbd_device.make_link("r0/1", 6)
    nbd_device.remove_link("r0/1", 5)  # has another device by now
    assert link.is_symlink()
    nbd_device.remove_link("r0/1", 6)
    assert not link.parent.exists()
    nbd_device.LINKS.mkdir(exist_ok=True)
    nbd_device.link_of("r0").write_text("precious")
    with pytest.raises(NbdError, match="by-res/r0 is not a link to a device; remove"):
        nbd_device.make_link("r0", 5)
    assert nbd_device.link_of("r0").read_text() == "precious"


# ----------------------------------------------------------------------------------------- exports

FULL = 1 | 4 | 8 | 32 | 64 | 256


def test_what_an_export_must_offer() -> None:
    assert unfit(Terms(4096, FULL, 512), 4096, 512, FULL) == ""
    assert unfit(Terms(8192, FULL | 2048, 1), 4096, 512, FULL) == ""
    assert "4096 bytes, and the device has 8192" in unfit(Terms(4096, FULL, 512), 8192, 512, FULL)
    assert "blocks have 4096" in unfit(Terms(4096, FULL, 4096), 4096, 512, FULL)
    assert "SEND_FLUSH" in unfit(Terms(4096, FULL & ~4, 512), 4096, 512, FULL)


def test_who_served_last_is_asked_first() -> None:
    a, b, c = (Place(name, "r0", path="/x") for name in "abc")
    assert in_order([a, b, c], "b") == [b, a, c]
    assert in_order([a, b, c], "") == [a, b, c]


def test_all_reasons_are_named(tmp_path: Path) -> None:
    places = [Place(name, "r0", path=str(tmp_path / name)) for name in "ab"]
    with pytest.raises(Unavailable, match=r"^a \(.*/a\): No such file or directory; b "):
        open_first(places)


def test_what_this_host_lacks_is_not_the_nodes_fault(tmp_path: Path) -> None:
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        open_first([Place("a", "r0", path=str(tmp_path / "a"))])


@pytest.mark.parametrize("family", [socket.AF_UNIX, socket.AF_INET])
def test_a_connection_is_settled_when_the_server_reads_no_more(tmp_path: Path, family: int) -> None:
    with socket.socket(family) as listener:
        listener.bind(str(tmp_path / "s") if family == socket.AF_UNIX else ("127.0.0.1", 0))
        listener.listen()
        sock = socket.socket(family)
        sock.connect(listener.getsockname())
        server, _ = listener.accept()
    opened = Opened(sock, Place("a", "r0"), Terms(512, 0))
    sock.sendall(b"a request")
    assert not opened.is_dead
    sock.shutdown(socket.SHUT_RDWR)  # what the kernel does when it gives a connection up
    assert opened.is_dead and not opened.is_settled
    assert server.recv(100) == b"a request" and server.recv(1) == b""
    server.close()
    assert opened.is_settled
    sock.close()


# ----------------------------------------------------------------------------------------- netlink


def test_attributes() -> None:
    data = attribute(1, b"abc") + attribute(2, b"") + attribute(0x8003, b"1234")
    assert len(data) == 8 + 4 + 8
    assert list(attributes(data)) == [(1, b"abc"), (2, b""), (3, b"1234")]
    assert list(attributes(data[:-1])) == [(1, b"abc"), (2, b"")]
    assert list(attributes(b"\x02\0\1\0")) == []


def test_sockets_and_devices() -> None:
    item = attribute(1, attribute(1, (7).to_bytes(4, "little")))
    assert sockets([7, 7]) == item * 2
    one = attribute(1, attribute(1, (3).to_bytes(4, "little")) + attribute(2, b"\1"))
    other = attribute(1, attribute(1, (4).to_bytes(4, "little")) + attribute(2, b"\0"))
    assert connected_devices(one + other) == {3: True, 4: False}
