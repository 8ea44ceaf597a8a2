"""Two hosts that run Tandem, and the switch of their power: what fencing needs, without a kernel's DRBD.

The switch is on each host's control network, apart from the `lan` that carries the replication: a host asks it through
an agent of its own kind, called by `tandem-fence-peer`. It is honest as a real one is: what a host without power
had asked for is not done, and one request is carried out after the other. With `resource-only` nobody is shot: on the
same network the peer is told to outdate its disk.
"""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Final

from tests.ledger import DEPTH, Cmd, ConnectionLost, Ledger, Nbd, Request

from .host import Host
from .nodes import RES, wait, wait_state
from .pair import DATA, SIZE, differences, fill
from .uml import CommandFailed, Lab

SWITCH_PORT: Final = 7010
NBD_PORT: Final = 10809
CONNECTED: Final = ("Connected", "SyncSource", "SyncTarget")

AGENT: Final = """#!/bin/bash
while IFS== read -r name value; do declare "$name=$value"; done
exec 3<> "/dev/tcp/$switch/$switch_port" || exit 1
echo "$action $host" >&3
read -r answer <&3 || exit 1
[ "$answer" = off ] && [ "$action" = status ] && exit 2
[ "$answer" = "$action" ] || [ "$answer" = on ]
"""

OUTDATE: Final = f"""#!/bin/bash
for try in {{1..60}}; do  # a peer that believes to be connected is not outdated yet
    exec 3<> "/dev/tcp/$(ip route | grep -o '10\\.78\\.[0-9]*' | head -n 1).254/{SWITCH_PORT}" || exit 1
    echo "outdate $DRBD_PEERS" >&3
    read -r answer <&3 || exit 1
    case $answer in
        Outdated) exit 4;;
        off) exit 5;;
        Primary) exit 6;;
    esac
    sleep 1
done
exit 1
"""


class Switch:
    """The hosts' power, asked over TCP: ``off NAME`` or ``status NAME``; *done* lists who cut whose power.

    ``outdate NAME`` has the disk of NAME outdated; the answer is the state of the disk, or that NAME is Primary or off.
    """

    def __init__(self, hosts: list[Host], cut: Callable[[Host], None]) -> None:
        self.hosts = {host.name: host for host in hosts}
        self.done: list[tuple[str, str]] = []
        self._cut = cut
        self._lock = threading.Lock()
        self._listener = socket.create_server(("", SWITCH_PORT))
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, address = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock, address[0]), daemon=True).start()

    def _answer(self, sock: socket.socket, address: str) -> None:
        asker = next(host for host in self.hosts.values() if host.guest.control == address)
        with sock, contextlib.suppress(OSError):
            action, name = sock.makefile("r").readline().split()
            with self._lock:
                if not asker.guest.running:
                    return
                if action == "off" and self.hosts[name].guest.running:
                    self.done.append((asker.name, name))
                    self._cut(self.hosts[name])
                state = "on" if self.hosts[name].guest.running else "off"
                if action == "outdate" and state == "on":
                    state = self._outdated(self.hosts[name])
            sock.sendall(f"{state}\n".encode())

    def _outdated(self, host: Host) -> str:
        if host.state().role != "Primary":
            host.adm("outdate", RES, check=False)
        state = host.state()
        return state.role if state.role == "Primary" else state.disk


class Fenced:
    """The hosts anna and bert, a client of whoever is Primary, and the ledger of what it was promised."""

    def __init__(self, lab: Lab) -> None:
        self.hosts = [Host(lab.guest(name, [lab.disk(name, SIZE)]), False) for name in ("anna", "bert")]
        self.anna, self.bert = self.hosts
        self.switch = Switch(self.hosts, self.power_cut)
        self.ledger = Ledger(DATA, random.Random(1))
        self._old_splits: set[str] = set()  # lines of the logs: split brains of earlier tests
        self._sessions: dict[str, Nbd] = {}
        shared = lab.shared
        agent = shared / "fence_switch"
        agent.write_text(AGENT)
        agent.chmod(0o755)
        outdate = shared / "outdate_peer"
        outdate.write_text(OUTDATE)
        outdate.chmod(0o755)
        for host in self.hosts:
            peer = self.peer_of(host)
            (shared / f"fence-{host.name}.conf").write_text(
                f"[{peer.name}]\nagent = /shared/fence_switch\nhost = {peer.name}\n"
                f"switch = 10.78.{host.guest.number}.254\nswitch_port = {SWITCH_PORT}\n"
            )
        self.config = self._text(
            "resource-and-stonith",
            "test -e /shared/lie && exit 7; tandem-fence-peer -f /shared/fence-$(uname -n).conf",
        )
        self.resource_only = self._text("resource-only", "/shared/outdate_peer")
        self.config_file = shared / "drbd.conf"
        self.lie = shared / "lie"  # while it is there, the handlers say that they have fenced, and do nothing

    def _text(self, policy: str, handler: str) -> str:
        sections = "".join(
            f"  on {host.name} {{ address {host.address}:7788; volume 0 {{"
            f" device nbd://{host.guest.control}:{NBD_PORT}/{RES}; disk /dev/ubda; meta-disk internal; }} }}\n"
            for host in self.hosts
        )
        return (
            f"resource {RES} {{\n  net {{ timeout 30; ping-int 2; ping-timeout 20; connect-int 2; }}\n"
            f"  disk {{ fencing {policy}; c-plan-ahead 0; resync-rate 200M; }}\n"
            f'  handlers {{ fence-peer "{handler}"; }}\n{sections}}}\n'
        )

    def peer_of(self, host: Host) -> Host:
        return self.hosts[1 - self.hosts.index(host)]

    # --------------------------------------------------------------------------------- begin and end

    def prepare(self) -> None:
        """Both on and in sync, cables in, anna Primary: as the last test left them, or made anew."""
        if not all(host.guest.running and host.state().cs == "Connected" for host in self.hosts):
            self.config_file.write_text(self.config)
            self._make()
        self.configure(self.config)
        self.bert.adm("secondary", RES)
        self.anna.adm("primary", RES)
        self.switch.done.clear()
        self._old_splits = self._splits()

    def _splits(self) -> set[str]:
        return {line for host in self.hosts for line in host.log() if "Split-Brain" in line}

    def configure(self, text: str) -> None:
        """Give both hosts, which are on, this configuration."""
        self.config_file.write_text(text)
        for host in self.hosts:
            host.adm("adjust", RES)

    def _make(self) -> None:
        for host in self.hosts:
            host.guest.kill()
            host.guest.cut(False)
            fill(host.disk_file(), None)
            host.boot()
            host.adm("create-md", "--force", RES)
            host.adm("up", RES)
        self.connected()
        self.anna.adm("new-current-uuid", "--clear-bitmap", RES)
        for host in self.hosts:
            wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate")
        self.ledger = Ledger(DATA, random.Random(1))

    def close(self) -> None:
        self.switch.close()

    def power_cut(self, host: Host) -> None:
        host.guest.kill()
        session = self._sessions.pop(host.name, None)
        if session is not None:
            session.cut()

    def comes_back(self, *hosts: Host) -> None:
        for host in hosts:
            host.boot()
        for host in hosts:
            host.adm("up", RES)
        self.connected()

    def connected(self) -> None:
        for host in self.hosts:
            wait(host, lambda s: s.cs in CONNECTED, "connected")

    # ---------------------------------------------------------------------------------------- the client

    def write(
        self, host: Host, n_requests: int, accident: Callable[[], None] | None = None, flags: int = 0
    ) -> bool:
        """Write to the Primary; *accident* happens in the middle. False when the client lost its server."""

        def requests() -> Iterator[Request]:
            for request in self.ledger.requests(n_requests):
                if request.kind is not Cmd.FLUSH:
                    request.flags = flags
                yield request

        moment = self.ledger.n_acknowledged + n_requests // 3
        left = [accident] if accident else []

        def answered(request: Request) -> None:
            self.ledger.answered(request)
            if left and self.ledger.n_acknowledged >= moment:
                left.pop()()

        try:
            with Nbd((host.guest.control, NBD_PORT), RES) as nbd:
                self._sessions[host.name] = nbd
                nbd.run(requests(), DEPTH, answered)
        except ConnectionLost:
            assert not host.guest.running, f"{host.name} lives, and its client lost it\n{self.report()}"
            return False
        finally:
            self._sessions.pop(host.name, None)
            self.ledger.session_over()
        assert not left
        return True

    def check(self, host: Host) -> None:
        """What the Primary gives back is what the ledger allows."""
        with Nbd((host.guest.control, NBD_PORT), RES) as nbd:
            assert self.ledger.check(nbd) > 0

    def equal(self) -> None:
        """Both in sync without a split brain, and both disks byte by byte the same."""
        self.same()
        assert not self._splits() - self._old_splits, self.report()

    def same(self) -> None:
        """Both in sync, and both disks byte by byte the same."""
        for host in self.hosts:
            wait_state(host, cs="Connected", disk="UpToDate", pdsk="UpToDate", oos=0)
            host.guest.run("sync")
        wrong = differences(self.anna.disk_file(), self.bert.disk_file(), DATA)
        assert not wrong, f"disks differ at {wrong[:20]} ({len(wrong)} blocks of 4 KiB)"

    def report(self) -> str:
        """What a failure is explained with."""
        lines = [f"the switch: {self.switch.done}"]
        for host in self.hosts:
            lines.append(f"--- {host.name}")
            with contextlib.suppress(OSError, CommandFailed):
                lines += [str(host.state()), *host.log()[-60:]] if host.guest.running else ["(off)"]
        return "\n".join(lines)
