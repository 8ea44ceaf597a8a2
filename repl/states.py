"""Roles, connection, replication and disk states with DRBD's numbers and spellings, and the state word.

One `State` per volume holds exactly the eleven fields of DRBD 8.4's packed state word, so that the
value which is decided on, sent, stored in a trace and printed is one and the same. Connection states
below CONNECTED belong to the whole connection and are then equal in all volumes of a resource.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Role(IntEnum):
    UNKNOWN = 0
    PRIMARY = 1
    SECONDARY = 2

    def __str__(self) -> str:
        return self.name.capitalize()


class DiskState(IntEnum):
    """The order matters: rules compare with < and >."""

    DISKLESS = 0
    ATTACHING = 1
    FAILED = 2
    NEGOTIATING = 3
    INCONSISTENT = 4
    OUTDATED = 5
    D_UNKNOWN = 6
    CONSISTENT = 7
    UP_TO_DATE = 8

    def __str__(self) -> str:
        return _DISK_WORDS[self]


_DISK_WORDS = (
    "Diskless", "Attaching", "Failed", "Negotiating", "Inconsistent", "Outdated", "DUnknown", "Consistent", "UpToDate",
)  # fmt: skip


class ConnState(IntEnum):
    """DRBD 8.4's combined connection and replication state; 0 to 9 belong to the whole connection."""

    STAND_ALONE = 0
    DISCONNECTING = 1
    UNCONNECTED = 2
    TIMEOUT = 3
    BROKEN_PIPE = 4
    NETWORK_FAILURE = 5
    PROTOCOL_ERROR = 6
    TEAR_DOWN = 7
    WF_CONNECTION = 8
    WF_REPORT_PARAMS = 9
    CONNECTED = 10
    STARTING_SYNC_S = 11
    STARTING_SYNC_T = 12
    WF_BITMAP_S = 13
    WF_BITMAP_T = 14
    WF_SYNC_UUID = 15
    SYNC_SOURCE = 16
    SYNC_TARGET = 17
    VERIFY_S = 18
    VERIFY_T = 19
    PAUSED_SYNC_S = 20
    PAUSED_SYNC_T = 21
    AHEAD = 22
    BEHIND = 23

    def __str__(self) -> str:
        return _CONN_WORDS[self]

    @property
    def connection(self) -> str:
        """The connection part, as `status` and `events2` print it."""
        if self >= ConnState.WF_REPORT_PARAMS:
            return "Connected"
        return "Connecting" if self is ConnState.WF_CONNECTION else str(self)

    @property
    def replication(self) -> str:
        """The replication part, as `status` and `events2` print it."""
        if self < ConnState.CONNECTED:
            return "Off"
        return "Established" if self is ConnState.CONNECTED else str(self)


_CONN_WORDS = (
    "StandAlone", "Disconnecting", "Unconnected", "Timeout", "BrokenPipe", "NetworkFailure", "ProtocolError",
    "TearDown", "WFConnection", "WFReportParams", "Connected", "StartingSyncS", "StartingSyncT", "WFBitMapS",
    "WFBitMapT", "WFSyncUUID", "SyncSource", "SyncTarget", "VerifyS", "VerifyT", "PausedSyncS", "PausedSyncT",
    "Ahead", "Behind",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class State:
    """One volume's state: the fields of the state word of wire protocol 86 to 101.

    Source: linux/drbd.h, union drbd_state.
    """

    role: Role = Role.SECONDARY
    peer: Role = Role.UNKNOWN
    conn: ConnState = ConnState.STAND_ALONE
    disk: DiskState = DiskState.DISKLESS
    pdsk: DiskState = DiskState.D_UNKNOWN
    susp: bool = False  # I/O suspended by the administrator
    aftr_isp: bool = False  # resync paused by a resync-after dependency
    peer_isp: bool = False  # resync paused by the peer
    user_isp: bool = False  # resync paused by the administrator
    susp_nod: bool = False  # I/O suspended: no data
    susp_fen: bool = False  # I/O suspended: fencing in progress

    @property
    def suspended(self) -> bool:
        return self.susp or self.susp_nod or self.susp_fen

    @property
    def connected(self) -> bool:
        return self.conn >= ConnState.CONNECTED

    def word(self) -> int:
        """The 32-bit state word as sent in P_STATE."""
        return (
            self.role | self.peer << 2 | self.conn << 4 | self.disk << 9 | self.pdsk << 13 | self.susp << 17
            | self.aftr_isp << 18 | self.peer_isp << 19 | self.user_isp << 20 | self.susp_nod << 21
            | self.susp_fen << 22
        )  # fmt: skip

    @classmethod
    def from_word(cls, word: int) -> State:
        """Unpack a state word; ValueError when a field holds a number DRBD does not know."""
        return cls(
            Role(word & 3), Role(word >> 2 & 3), ConnState(word >> 4 & 31), DiskState(word >> 9 & 15),
            DiskState(word >> 13 & 15), bool(word >> 17 & 1), bool(word >> 18 & 1), bool(word >> 19 & 1),
            bool(word >> 20 & 1), bool(word >> 21 & 1), bool(word >> 22 & 1),
        )  # fmt: skip

    def __str__(self) -> str:
        flags = "".join(
            letter if flag else "-"
            for letter, flag in (
                ("s", self.suspended), ("a", self.aftr_isp), ("p", self.peer_isp), ("u", self.user_isp),
            )
        )  # fmt: skip
        return f"cs:{self.conn} ro:{self.role}/{self.peer} ds:{self.disk}/{self.pdsk} {flags}"


def describe_change(old: State, new: State) -> str:
    """The change in DRBD's phrase: ``role( Secondary -> Primary ) disk( … -> … )``; empty when equal."""
    parts = []
    for name in State.__slots__:
        before, after = getattr(old, name), getattr(new, name)
        if before != after:
            shown = (int(before), int(after)) if isinstance(before, bool) else (before, after)
            parts.append(f"{name}( {shown[0]} -> {shown[1]} )")
    return " ".join(parts)
