"""`nbd attach` without a kernel: names, places, what an export must offer, netlink's attributes."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tandem.nbd.client_negotiation import Terms
from tandem.tools import adm, nbd_device
from tandem.tools.adm_nbd import find_places
from tandem.tools.adm_session import General, Quit, Session
from tandem.tools.nbd_connect import Opened, Unavailable, in_order, open_first, unfit
from tandem.tools.nbd_device import Attachment, NbdError, Place
from tandem.tools.nbd_netlink import attribute, attributes, connected_devices, sockets

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
    for words in (["attach", "r0"], ["detach"], ["list", "r0"], ["frobnicate"]):
        assert adm.run(["nbd", *words]) == 1
        assert capfd.readouterr().err.count("\n") == 1


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
