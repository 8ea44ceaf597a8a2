"""What one run is made of: devices, options, and how often each thing happens.

Each random run first draws its own mix, so that rare combinations get their turn: a run in which only
links are cut finds other things than one in which hosts lose power twice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from tandem.repl.config import (
    AfterSb,
    DiskOptions,
    Endpoint,
    Fencing,
    MetaDisk,
    NetOptions,
    ResourceConfig,
    ResourceOptions,
    VolumeConfig,
)  # fmt: skip

from .chooser import Chooser

MIB: Final = 1 << 20
LARGE: Final = 292 * MIB  # more extents than the smallest activity log has slots


SB_0PRI: Final = (
    AfterSb.DISCONNECT, AfterSb.DISCONNECT, AfterSb.DISCONNECT, AfterSb.DISCARD_ZERO_CHANGES,
    AfterSb.DISCARD_LEAST_CHANGES, AfterSb.DISCARD_YOUNGER_PRIMARY, AfterSb.DISCARD_OLDER_PRIMARY,
    AfterSb.DISCARD_LOCAL,
)  # fmt: skip
SB_1PRI: Final = (
    AfterSb.DISCONNECT, AfterSb.DISCONNECT, AfterSb.CONSENSUS, AfterSb.DISCARD_SECONDARY,
    AfterSb.VIOLENTLY_AS0P, AfterSb.CALL_PRI_LOST_AFTER_SB,
)  # fmt: skip
SB_2PRI: Final = (
    AfterSb.DISCONNECT, AfterSb.DISCONNECT, AfterSb.VIOLENTLY_AS0P, AfterSb.CALL_PRI_LOST_AFTER_SB,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mix:
    """Weights are relative to the 10 of ordinary progress; 0 switches a thing off."""

    steps: int = 250  # of trouble, before everything is healed
    size: int = 2 * MIB  # of the backing device, bytes
    n_volumes: int = 1
    external: bool = False  # metadata on its own device
    fresh: bool = False  # begin with create-md on both nodes instead of two equal UpToDate disks
    protocol: str = "C"
    fencing: Fencing = Fencing.DONT_CARE
    two_primaries: bool = False
    al_extents: int = 67
    al_updates: bool = True
    integrity: str = ""
    csums: str = ""
    verify: bool = False
    use_rle: bool = True
    on_io_error: str = "detach"
    on_no_data: str = "io-error"
    after_sb: tuple[AfterSb, AfterSb, AfterSb] = (AfterSb.DISCONNECT,) * 3  # with 0, 1 and 2 Primaries
    rr_conflict: str = "disconnect"
    always_asbp: bool = False
    rs_discard: int = 0  # rs-discard-granularity, bytes
    auto_promote: bool = False
    resync_handlers: bool = False  # before- and after-resync-*
    max_epoch_size: int = 2048
    c_plan_ahead: int = 20
    # the application
    queue_depth: int = 4
    n_spots: int = 4  # places that are written again and again
    big_writes: bool = False
    client: float = 8
    flushes: float = 1
    # ordinary progress
    chunk: bool = True  # the network delivers in pieces
    trickle: bool = False  # … most of what the data socket carries, so that writes are seldom whole when they come
    early: bool = True  # operations are executed long before they complete
    tick: float = 0.3
    # the operator
    admin: float = 0.15
    risky: bool = False  # promotes without a connection, which may split the brain
    # trouble
    cut: float = 0.0
    process_crash: float = 0.0
    power_cut: float = 0.0
    eio: float = 0.0
    half_dead: float = 0.0  # one direction of a socket dies silently
    crash_in_attach: bool = False
    lying_handler: bool = False  # the fence handler fails now and then
    slow_handler: bool = False  # between what a handler does and its exit anything may happen
    reboot: float = 1.0
    reconnect: float = 4.0

    @property
    def usually_connected(self) -> bool:
        return not (self.cut or self.process_crash or self.power_cut or self.half_dead)


def draw(chooser: Chooser) -> Mix:
    """The mix of one random run."""

    def often(*values: float) -> float:
        return values[chooser.choose(len(values))]

    def rarely(n: int) -> bool:
        return chooser.choose(n) == 0

    mix = Mix(
        steps=(100, 160, 240, 360)[chooser.choose(4)],
        size=(2 * MIB, 2 * MIB, 2 * MIB, 2 * MIB, 9 * MIB, 9 * MIB, 9 * MIB, LARGE)[chooser.choose(8)],
        n_volumes=2 if rarely(6) else 1,
        external=rarely(5),
        fresh=rarely(8),
        protocol="CCCCCCAB"[chooser.choose(8)],
        fencing=(Fencing.DONT_CARE, Fencing.DONT_CARE, Fencing.RESOURCE_ONLY, Fencing.RESOURCE_AND_STONITH)[
            chooser.choose(4)
        ],
        al_updates=not rarely(15),
        integrity="crc32c" if rarely(8) else "",
        csums="crc32c" if rarely(6) else "",
        verify=rarely(4),
        use_rle=not rarely(4),
        on_io_error="pass_on" if rarely(6) else "detach",
        on_no_data="suspend-io" if rarely(5) else "io-error",
        after_sb=(
            SB_0PRI[chooser.choose(len(SB_0PRI))],
            SB_1PRI[chooser.choose(len(SB_1PRI))],
            SB_2PRI[chooser.choose(len(SB_2PRI))],
        ),
        rr_conflict=("disconnect", "disconnect", "call-pri-lost", "violently")[chooser.choose(4)],
        two_primaries=rarely(5),
        max_epoch_size=(2048, 1, 2)[chooser.choose(3)],
        c_plan_ahead=0 if rarely(4) else 20,
        queue_depth=(1, 4, 16)[chooser.choose(3)],
        n_spots=(1, 4, 12)[chooser.choose(3)],
        big_writes=rarely(5),
        client=often(3, 8, 15),
        flushes=often(0, 1, 4),
        chunk=not rarely(3),
        early=not rarely(3),
        tick=often(0.1, 0.5, 2),
        admin=often(0, 0.1, 0.4, 1),
        risky=rarely(3),
        cut=often(0, 0, 0.05, 0.3),
        process_crash=often(0, 0, 0.03, 0.15),
        power_cut=often(0, 0, 0.03, 0.15),
        eio=0.03 if rarely(5) else 0.0,
        half_dead=0.05 if rarely(5) else 0.0,
        crash_in_attach=rarely(3),
        lying_handler=rarely(2),
        slow_handler=rarely(2),
        reboot=often(0.2, 1, 4),
        reconnect=often(0.5, 4),
        always_asbp=rarely(4),
        rs_discard=(0, 0, 4096, 65536)[chooser.choose(4)],
        auto_promote=rarely(4),
        resync_handlers=rarely(4),
        trickle=rarely(4),
    )
    if mix.trickle:
        mix = long_writes(mix)
    if mix.on_io_error == "detach" and rarely(6):
        mix = replace(mix, on_io_error="call-local-io-error")
    if mix.size == LARGE:
        mix = replace(mix, n_spots=90, fresh=False, rs_discard=MIB if mix.rs_discard else 0)  # else it takes long
    if mix.two_primaries and mix.fencing is Fencing.RESOURCE_ONLY:
        mix = replace(mix, fencing=Fencing.RESOURCE_AND_STONITH)  # else neither would stop when the other is lost
    if mix.two_primaries or (mix.fencing is Fencing.RESOURCE_AND_STONITH and mix.protocol == "A"):
        mix = replace(mix, protocol="C")
    return mix


def long_writes(mix: Mix) -> Mix:
    """Long writes that take long on their way to a connected peer, where alone they go to the disk as they come."""
    return replace(
        mix, trickle=True, big_writes=True, protocol="C", two_primaries=False, fresh=False, integrity="",
        size=min(mix.size, 9 * MIB), queue_depth=4, client=15, reconnect=4, admin=min(mix.admin, 0.1),
        cut=mix.cut or 0.05,
    )  # fmt: skip


def strained(mix: Mix) -> Mix:
    """The trouble while a long write is on its way: such moments are short, and would meet hardly any otherwise."""
    return replace(mix, cut=10 * mix.cut, process_crash=10 * mix.process_crash, power_cut=10 * mix.power_cut)


def configuration(mix: Mix, node: int) -> ResourceConfig:
    """The resource as *node* (0 or 1) sees it."""
    names = ("alpha", "bravo")
    disk = DiskOptions(
        fencing=mix.fencing, al_extents=mix.al_extents, al_updates=mix.al_updates,
        on_io_error=mix.on_io_error, rs_discard_granularity=mix.rs_discard,
        c_plan_ahead=mix.c_plan_ahead, resync_rate=4096 if mix.c_plan_ahead == 0 else 250,
    )  # fmt: skip
    zero, one, two = mix.after_sb
    if zero is AfterSb.DISCARD_LOCAL and node:  # discard-node-alpha, as each of them reads it
        zero = AfterSb.DISCARD_REMOTE
    net = NetOptions(
        protocol=mix.protocol, allow_two_primaries=mix.two_primaries,
        after_sb_0pri=zero, after_sb_1pri=one, after_sb_2pri=two, rr_conflict=mix.rr_conflict,
        always_asbp=mix.always_asbp,
        max_epoch_size=mix.max_epoch_size, data_integrity_alg=mix.integrity, csums_alg=mix.csums,
        verify_alg="crc32c" if mix.verify else "", use_rle=mix.use_rle,
    )  # fmt: skip
    handlers = {name: f"/bin/{name}" for name in ("split-brain", "pri-lost", "pri-lost-after-sb")}
    if mix.resync_handlers:
        both = [f"{when}-resync" for when in ("before", "after")]
        handlers |= {f"{name}-{end}": "/bin/sync" for name in both for end in ("source", "target")}
    if mix.on_io_error == "call-local-io-error":
        handlers |= {"local-io-error": "/bin/io-error", "pri-on-incon-degr": "/bin/no-data"}
    if mix.fencing is not Fencing.DONT_CARE:
        handlers |= {"fence-peer": "/bin/fence", "unfence-peer": "/bin/unfence"}
    return ResourceConfig(
        name="r0",
        node=names[node],
        peer=names[1 - node],
        address=Endpoint("ipv4", f"10.0.0.{1 + node}", 7788),
        peer_address=Endpoint("ipv4", f"10.0.0.{2 - node}", 7788),
        volumes=tuple(
            VolumeConfig(
                v,
                v,
                f"/dev/drbd{v}",
                f"/dev/fake{v}",
                MetaDisk("flexible", "/dev/meta") if mix.external else MetaDisk(),
                disk,
            )
            for v in range(mix.n_volumes)
        ),
        net=net,
        options=ResourceOptions(on_no_data_accessible=mix.on_no_data, auto_promote=mix.auto_promote),
        handlers=handlers,
        node_id=node,
        peer_node_id=1 - node,
    )
