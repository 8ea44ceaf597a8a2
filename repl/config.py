"""What a resource is made of, as frozen values: the options of drbd.conf after parsing and inheritance.

Field names are drbd.conf's option names with underscores, defaults and units are DRBD 8.4's (the unit
stands beside each field). Where the default is ours, the comment says why. `tools/conf` makes these
values from a file; the machine only reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum


class Fencing(IntEnum):
    DONT_CARE = 0
    RESOURCE_ONLY = 1
    RESOURCE_AND_STONITH = 2


class AfterSb(IntEnum):
    """After-split-brain policies with their numbers on the wire."""

    DISCONNECT = 0
    DISCARD_YOUNGER_PRIMARY = 1
    DISCARD_OLDER_PRIMARY = 2
    DISCARD_ZERO_CHANGES = 3
    DISCARD_LEAST_CHANGES = 4
    DISCARD_LOCAL = 5
    DISCARD_REMOTE = 6
    CONSENSUS = 7
    DISCARD_SECONDARY = 8
    CALL_PRI_LOST_AFTER_SB = 9
    VIOLENTLY_AS0P = 10


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """drbd.conf's disk section, of one volume."""

    size: int = 0  # sectors; 0: the whole device
    on_io_error: str = "detach"  # pass_on | call-local-io-error | detach
    fencing: Fencing = Fencing.DONT_CARE
    disk_barrier: bool = False
    disk_flushes: bool = True
    disk_drain: bool = True
    md_flushes: bool = True
    resync_rate: int = 250  # KiB/s
    resync_after: str = ""  # resource[/volume]
    al_extents: int = 1237
    al_updates: bool = True
    discard_zeroes_if_aligned: bool = True
    disable_write_same: bool = False
    c_plan_ahead: int = 20  # 0.1 s; 0: fixed resync_rate
    c_delay_target: int = 10  # 0.1 s
    c_fill_target: int = 0  # sectors; ours: 0 lets the controller choose what fills the link
    c_max_rate: int = 0  # KiB/s; ours: 0 is unlimited, so that an idle link is filled
    c_min_rate: int = 250  # KiB/s
    disk_timeout: int = 0  # 0.1 s
    read_balancing: str = "prefer-local"
    rs_discard_granularity: int = 0  # bytes


@dataclass(frozen=True, slots=True)
class NetOptions:
    """drbd.conf's net section."""

    protocol: str = "C"
    timeout: int = 60  # 0.1 s
    max_epoch_size: int = 2048
    max_buffers: int = 2048  # 4 KiB pages
    unplug_watermark: int = 128
    connect_int: int = 10  # s
    ping_int: int = 10  # s
    ping_timeout: int = 5  # 0.1 s
    sndbuf_size: int = 0
    rcvbuf_size: int = 0
    ko_count: int = 7
    allow_two_primaries: bool = False
    cram_hmac_alg: str = ""
    shared_secret: str = ""
    after_sb_0pri: AfterSb = AfterSb.DISCONNECT
    after_sb_1pri: AfterSb = AfterSb.DISCONNECT
    after_sb_2pri: AfterSb = AfterSb.DISCONNECT
    always_asbp: bool = False
    rr_conflict: str = "disconnect"  # disconnect | call-pri-lost | violently
    data_integrity_alg: str = ""
    tcp_cork: bool = True
    on_congestion: str = "block"
    congestion_fill: int = 0  # sectors
    congestion_extents: int = 1237
    csums_alg: str = ""
    csums_after_crash_only: bool = False
    verify_alg: str = ""
    use_rle: bool = True
    socket_check_timeout: int = 0  # 0.1 s; 0: ping_timeout


@dataclass(frozen=True, slots=True)
class ResourceOptions:
    cpu_mask: str = ""
    on_no_data_accessible: str = "io-error"  # io-error | suspend-io
    auto_promote: bool = False


@dataclass(frozen=True, slots=True)
class StartupOptions:
    wfc_timeout: int = 0  # s; 0: for ever
    degr_wfc_timeout: int = 0
    outdated_wfc_timeout: int = 0
    wait_after_sb: bool = False
    become_primary_on: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MetaDisk:
    """Where metadata lives: ``kind`` is internal, flexible (external, whole device) or indexed."""

    kind: str = "internal"
    path: str = ""  # empty when internal
    index: int = 0  # slot of 128 MiB when indexed


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """One volume on this host; *peer_disk* is the path of the peer's disk, for messages."""

    number: int
    minor: int
    device: str  # /dev/drbdN, or an NBD URI
    disk: str  # path of the block device or file; empty: diskless
    meta_disk: MetaDisk = MetaDisk()
    disk_options: DiskOptions = DiskOptions()
    peer_disk: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An address of a node's replication port."""

    family: str  # ipv4 | ipv6
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if self.family == "ipv6" else self.host
        return f"{self.family}:{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ResourceConfig:
    """One resource as one node sees it."""

    name: str
    node: str  # this host's name in the configuration
    peer: str
    address: Endpoint
    peer_address: Endpoint
    volumes: tuple[VolumeConfig, ...]
    net: NetOptions = NetOptions()
    options: ResourceOptions = ResourceOptions()
    startup: StartupOptions = StartupOptions()
    handlers: dict[str, str] = field(default_factory=dict)
    file: str = ""  # absolute path of the main configuration file
    line: int = 0  # where the resource is defined
    implicit_volume: bool = True
    node_id: int = 0
    peer_node_id: int = 1
    peer_names: tuple[str, ...] = ()  # all names of the peer's section, the first one is `peer`

    def volume(self, number: int) -> VolumeConfig | None:
        return next((v for v in self.volumes if v.number == number), None)
