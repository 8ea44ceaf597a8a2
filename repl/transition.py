"""**The** place where a state change is completed, allowed or refused.

A wish is a whole `State`. `change` works in three steps: `sanitize` adds what follows from the wish,
`possible` is always asked, `admissible` and `allowed` only of soft changes (requests of the administrator
or of the peer; a broken disk does not ask). Before them `reasonable` stops soft wishes which the first step
would turn into something nobody asked for. A refusal is a value with DRBD's number and sentence. What the
peer must agree to and how its requests are read is here too.

The rules are tables: a row is a condition, its number and its words, so that the documents are generated
from what is executed. Relies on `states`, `config.Fencing` and `errors` only.

Source: drbd_state.c (sanitize_state, is_valid_state, is_valid_soft_transition, is_valid_conn_transition,
cl_wide_st_chg), drbd_receiver.c (convert_state, receive_req_state), drbd_strings.c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final

from .config import Fencing
from .errors import PeerProtocolError, Refusal
from .states import ConnState, DiskState, Role, State

C = ConnState
D = DiskState


@dataclass(frozen=True, slots=True)
class Facts:
    """What besides the two states decides.

    *fencing* is the policy of the local disk; it counts only while the old disk state is at least
    Inconsistent. *found_disk* and *found_pdsk* are what attach found, for a disk that is Negotiating.
    """

    fencing: Fencing = Fencing.DONT_CARE
    two_primaries: bool = False
    is_open: bool = False
    verify_alg: bool = False
    apv: int = 101
    peer_primary_elsewhere: bool = False  # Primary on another volume of the resource
    found_disk: DiskState | None = None
    found_pdsk: DiskState | None = None
    exposed_is_attached: bool = True  # the attached data is the generation last shown to clients
    suspend_on_no_data: bool = False
    handshake_in_progress: bool = False  # our state is sent, not all volumes are decided


# ---------------------------------------------------------------------------------------- refusals


class Code(IntEnum):
    """Results of a state change. drbd_strings.c, enum drbd_state_rv."""

    OK = 1
    TWO_PRIMARIES = -1
    NO_UP_TO_DATE_DISK = -2
    NO_LOCAL_DISK = -4
    NO_REMOTE_DISK = -5
    CONNECTED_OUTDATES = -6
    PRIMARY_NOP = -7
    RESYNC_RUNNING = -8
    ALREADY_STANDALONE = -9
    REFUSED_BY_PEER = -10
    IS_DISKLESS = -11
    DEVICE_IN_USE = -12
    NO_NET_CONFIG = -13
    NO_VERIFY_ALG = -14
    NEED_CONNECTION = -15
    LOWER_THAN_OUTDATED = -16
    NOT_SUPPORTED = -17
    IN_TRANSIENT_STATE = -18
    CONCURRENT_ST_CHG = -19
    O_VOL_PEER_PRI = -20
    OUTDATE_WO_CONN = -21


# DRBD's sentence, and what to do next.
_SENTENCES: Final[dict[int, tuple[str, str]]] = {
    -1: ("Multiple primaries not allowed by config",
         "Demote the other node first, or set allow-two-primaries on both nodes"),
    -2: ("Need access to UpToDate data",
         "Promote where the data is, or repeat with --force to accept this node's data"),
    -4: ("Can not resync without local disk", "Attach the local disk first"),
    -5: ("Can not resync without remote disk", "Attach the disk on the peer first"),
    -6: ("Refusing to be Outdated while Connected", "Disconnect first, then outdate"),
    -7: ("Refusing to be Primary while peer is not outdated",
         "Connect to the peer, or configure a fence-peer handler that outdates it; --force overrides"),
    -8: ("Can not start OV/resync since it is already active", "Wait until it has finished"),
    -9: ("Can not disconnect a StandAlone device", "Nothing to do: there is no connection"),
    -10: ("State change was refused by peer node", "The peer's log says why"),
    -11: ("Device is diskless, the requested operation requires a disk", "Attach a disk first"),
    -12: ("Device is held open by someone",
          "Unmount it or disconnect its clients, then demote; secondary --force ends their sessions"),
    -13: ("Have no net/connection configuration", "Connect first"),
    -14: ("Need a verify algorithm to start online verify",
          "Set verify-alg in the net section on both nodes"),
    -15: ("Need a connection to start verify or resync", "Connect to the peer first"),
    -16: ("Disk state is lower than outdated", "Nothing to do: such a disk is promoted with --force only"),
    -17: ("Peer does not support protocol", "Upgrade the peer"),
    -18: ("In transient state, retry after next state change", "Repeat the command in a moment"),
    -19: ("Concurrent state changes detected and aborted", "Repeat the command in a moment"),
    -20: ("Other vol primary on peer not allowed by config",
          "Demote the peer in all volumes first, or set allow-two-primaries on both nodes"),
    -21: ("Need a connection for a graceful disconnect/outdate peer",
          "Connect first, or disconnect with --force"),
}  # fmt: skip


def refusal(code: int, *info: str) -> Refusal:
    """The refusal with DRBD's number *code* (negative); *info* are extra lines for the operator."""
    text, hint = _SENTENCES[code]
    return Refusal(int(code), text, hint, tuple(info))


def refused_by_peer(code: int) -> Refusal:
    """The peer answered our request with *code* (< 1): -10, and the peer's reason where it is known."""
    assert code < 1
    text, _ = _SENTENCES.get(code, ("unknown reason", ""))
    return refusal(Code.REFUSED_BY_PEER, f"peer: ({code}) {text}")


# ---------------------------------------------------------------------------------------- sanitize

_ANY: Final = (D.DISKLESS, D.UP_TO_DATE)
_GOOD: Final = (D.UP_TO_DATE, D.UP_TO_DATE)
_SYNCING: Final = (D.INCONSISTENT, D.INCONSISTENT)
_TO_BE_SYNCED: Final = (D.INCONSISTENT, D.OUTDATED)
_BEHIND_SOURCE: Final = (D.INCONSISTENT, D.CONSISTENT)
_REMEMBERED: Final = (D.INCONSISTENT, D.D_UNKNOWN)

# Lowest and highest disk and peer disk in each connection state.
_LIMITS: Final = {
    **{conn: (_ANY, _REMEMBERED) for conn in C if conn < C.CONNECTED},
    C.CONNECTED: (_ANY, _ANY),
    **dict.fromkeys(
        (C.WF_BITMAP_T, C.PAUSED_SYNC_T, C.STARTING_SYNC_T, C.WF_SYNC_UUID, C.BEHIND), (_TO_BE_SYNCED, _GOOD)
    ),
    **dict.fromkeys((C.WF_BITMAP_S, C.PAUSED_SYNC_S, C.STARTING_SYNC_S, C.AHEAD), (_GOOD, _BEHIND_SOURCE)),
    **dict.fromkeys((C.VERIFY_S, C.VERIFY_T), (_GOOD, _GOOD)),
    C.SYNC_TARGET: (_SYNCING, _GOOD),
    C.SYNC_SOURCE: (_GOOD, _SYNCING),
}

_PAUSE: Final = {C.SYNC_SOURCE: C.PAUSED_SYNC_S, C.SYNC_TARGET: C.PAUSED_SYNC_T}
_RESUME: Final = {paused: running for running, paused in _PAUSE.items()}
_VANISHING: Final = (D.CONSISTENT, D.OUTDATED)


def _within(disk: DiskState, limits: tuple[DiskState, DiskState]) -> DiskState:
    return min(max(disk, limits[0]), limits[1])


def _clamp(state: State) -> State:
    disk_limits, pdsk_limits = _LIMITS[state.conn]
    return replace(
        state, disk=_within(state.disk, disk_limits), pdsk=_within(state.pdsk, pdsk_limits)
    )  # fmt: skip


def _follow_connection(s: State, facts: Facts) -> State:
    """What is forgotten without a connection, and what breaks without a disk."""
    if s.conn < C.CONNECTED:
        keep = D.INCONSISTENT <= s.pdsk <= D.D_UNKNOWN
        s = replace(s, peer_isp=False, peer=Role.UNKNOWN, pdsk=s.pdsk if keep else D.D_UNKNOWN)
    if s.conn < C.CONNECTED and s.disk is D.NEGOTIATING:
        s = _end_negotiation(s, facts)
    if s.conn is C.STAND_ALONE and s.disk is D.DISKLESS and s.role is Role.SECONDARY:
        s = replace(s, aftr_isp=False)
    if s.conn > C.CONNECTED and (s.disk <= D.FAILED or s.pdsk <= D.FAILED):
        s = replace(s, conn=C.CONNECTED)
    return s


def _end_negotiation(s: State, facts: Facts) -> State:
    """The connection went before the peer could tell whether an attached disk is good."""
    assert facts.found_disk is not D.NEGOTIATING
    if not facts.exposed_is_attached or facts.found_disk is None:
        return replace(s, disk=D.DISKLESS, pdsk=D.D_UNKNOWN)
    found_pdsk = D.D_UNKNOWN if facts.found_pdsk is None else facts.found_pdsk
    return replace(s, disk=facts.found_disk, pdsk=found_pdsk)


def _would_fence(s: State) -> bool:
    return s.role is Role.PRIMARY and s.conn < C.CONNECTED and s.pdsk > D.OUTDATED


def _without_data(s: State) -> bool:
    return s.role is Role.PRIMARY and s.disk < D.UP_TO_DATE and s.pdsk < D.UP_TO_DATE


def _settled(disk: DiskState, other: DiskState, aborted: bool) -> DiskState:
    """What a Consistent or Outdated *disk* is once connected to a node whose disk is *other*.

    DRBD always says UpToDate. Ours does not become so next to a node without data: it is known to be old, or
    (*aborted*) it was about to be synced and the source went. Else stale data would be read and promoted.
    """
    if disk not in _VANISHING:
        return disk
    return D.OUTDATED if other < D.INCONSISTENT and (disk is D.OUTDATED or aborted) else D.UP_TO_DATE


def sanitize(old: State, new: State, facts: Facts) -> State:
    """Complete the wish *new*: everything that follows from it and from the facts.

    Applied to every change, hard or soft, before it is judged. Applying it twice changes nothing: the
    last clamp, which DRBD does not have, sees to it that a resumed resync obeys the limits of its new state.
    """
    s = _follow_connection(new, facts)
    if C.CONNECTED <= s.conn < C.AHEAD:  # with a peer at hand a disk is either current or being synced
        aborted = old.conn > C.CONNECTED
        alone = s.conn is C.CONNECTED  # in all other states the limits say what the disks are
        disk, pdsk = (s.disk, s.pdsk) if alone else (D.UP_TO_DATE, D.UP_TO_DATE)
        ours = _settled(s.disk, pdsk, aborted)
        if s.disk is D.CONSISTENT and pdsk is D.ATTACHING:  # its data may turn out newer: we shall know in a moment
            ours = D.CONSISTENT
        s = replace(s, disk=ours, pdsk=_settled(s.pdsk, disk, aborted))
    s = _clamp(s)
    stonith = _policy(old, facts) is Fencing.RESOURCE_AND_STONITH
    if stonith and _would_fence(s) and not _would_fence(old):
        s = replace(s, susp_fen=True)
    if facts.suspend_on_no_data and _without_data(s) and not _without_data(old):
        s = replace(s, susp_nod=True)
    swap = _PAUSE if s.aftr_isp or s.peer_isp or s.user_isp else _RESUME
    return _clamp(replace(s, conn=swap.get(s.conn, s.conn)))


def _policy(old: State, facts: Facts) -> Fencing:
    """The fencing policy belongs to the local disk; without a usable one there is none."""
    return facts.fencing if old.disk >= D.INCONSISTENT else Fencing.DONT_CARE


# ------------------------------------------------------------------------------------ the three tests


@dataclass(frozen=True, slots=True)
class _Move:
    """A row about a transition: refused with *code* when *when(old, new, facts)*."""

    code: int
    says: str
    when: Callable[[State, State, Facts], bool]


@dataclass(frozen=True, slots=True)
class _Rest:
    """A row about a state: refused with *code* when *when(state, facts)*."""

    code: int
    says: str
    when: Callable[[State, Facts], bool]


_VERIFY: Final = (C.VERIFY_S, C.VERIFY_T)
_STARTING: Final = (C.STARTING_SYNC_S, C.STARTING_SYNC_T)
_SYNC: Final = (C.SYNC_SOURCE, C.SYNC_TARGET)
_NOT_OUTDATED: Final = (C.CONNECTED, C.WF_BITMAP_S, C.SYNC_SOURCE, C.PAUSED_SYNC_S)


def _enters(old: State, new: State, conns: tuple[ConnState, ...]) -> bool:
    return new.conn is not old.conn and new.conn in conns


def _primary(s: State) -> bool:
    return s.role is Role.PRIMARY


# A. Possible at all. The first match decides; asked of every change.
_POSSIBLE: Final = (
    _Move(-11, "disk: Diskless → Failed",
          lambda o, n, f: n.disk is D.FAILED and o.disk is D.DISKLESS),
    _Move(-9, "conn: StandAlone → Disconnecting",
          lambda o, n, f: o.conn is C.STAND_ALONE and n.conn is C.DISCONNECTING),
    _Move(-15, "conn: StandAlone → anything but Unconnected",
          lambda o, n, f: o.conn is C.STAND_ALONE and n.conn not in (C.STAND_ALONE, C.UNCONNECTED)),
    _Move(-15, "conn: below WFReportParams → Connected or above",
          lambda o, n, f: o.conn < C.WF_REPORT_PARAMS and n.conn >= C.CONNECTED),
    _Move(-18, "conn: Timeout … TearDown → anything but Unconnected, Disconnecting",
          lambda o, n, f: C.TIMEOUT <= o.conn <= C.TEAR_DOWN
          and n.conn not in (o.conn, C.UNCONNECTED, C.DISCONNECTING)),
    _Move(-18, "conn: Disconnecting → anything but StandAlone",
          lambda o, n, f: o.conn is C.DISCONNECTING and n.conn not in (o.conn, C.STAND_ALONE)),
)  # fmt: skip

# B. The new state is admissible. The first match decides; asked of soft changes.
_ADMISSIBLE: Final = (
    _Rest(-1, "Primary, peer Primary, two Primaries not allowed",
          lambda s, f: not f.two_primaries and _primary(s) and s.peer is Role.PRIMARY),
    _Rest(-20, "Primary, peer Primary on another volume, two Primaries not allowed",
          lambda s, f: not f.two_primaries and _primary(s) and f.peer_primary_elsewhere),
    _Rest(-12, "Secondary, device open", lambda s, f: s.role is Role.SECONDARY and f.is_open),
    _Rest(-2, "Primary, conn < Connected, disk < UpToDate",
          lambda s, f: _primary(s) and s.conn < C.CONNECTED and s.disk < D.UP_TO_DATE),
    _Rest(-7, "fencing at least resource-only, Primary, conn < Connected, pdsk ≥ DUnknown",
          lambda s, f: f.fencing >= Fencing.RESOURCE_ONLY and _primary(s) and s.conn < C.CONNECTED
          and s.pdsk >= D.D_UNKNOWN),
    _Rest(-2, "Primary, disk ≤ Inconsistent, pdsk ≤ Inconsistent",
          lambda s, f: _primary(s) and s.disk <= D.INCONSISTENT and s.pdsk <= D.INCONSISTENT),
    _Rest(-4, "conn > Connected, disk < Inconsistent",
          lambda s, f: s.conn > C.CONNECTED and s.disk < D.INCONSISTENT),
    _Rest(-5, "conn > Connected, pdsk < Inconsistent",
          lambda s, f: s.conn > C.CONNECTED and s.pdsk < D.INCONSISTENT),
    _Rest(-2, "conn > Connected, disk < UpToDate, pdsk < UpToDate",
          lambda s, f: s.conn > C.CONNECTED and s.disk < D.UP_TO_DATE and s.pdsk < D.UP_TO_DATE),
    _Rest(-6, "conn Connected, WFBitMapS, SyncSource or PausedSyncS, disk Outdated",
          lambda s, f: s.conn in _NOT_OUTDATED and s.disk is D.OUTDATED),
    _Rest(-14, "conn VerifyS or VerifyT, no verify-alg",
          lambda s, f: s.conn in _VERIFY and not f.verify_alg),
    _Rest(-17, "conn VerifyS or VerifyT, protocol < 88", lambda s, f: s.conn in _VERIFY and f.apv < 88),
    _Rest(-2, "Primary, disk < UpToDate, pdsk < UpToDate",
          lambda s, f: _primary(s) and s.disk < D.UP_TO_DATE and s.pdsk < D.UP_TO_DATE),
    _Rest(-15, "conn StartingSyncS or StartingSyncT, pdsk DUnknown",
          lambda s, f: s.conn in _STARTING and s.pdsk is D.D_UNKNOWN),
    _Rest(-6, "conn ≥ Connected, pdsk DUnknown",
          lambda s, f: s.conn >= C.CONNECTED and s.pdsk is D.D_UNKNOWN),
)  # fmt: skip

# C. The transition is allowed. The last match decides; asked of soft changes.
_ALLOWED: Final = (
    _Move(-8, "→ StartingSync* while conn > Connected",
          lambda o, n, f: _enters(o, n, _STARTING) and o.conn > C.CONNECTED),
    _Move(-9, "→ Disconnecting from StandAlone",
          lambda o, n, f: n.conn is C.DISCONNECTING and o.conn is C.STAND_ALONE),
    _Move(-11, "disk: Diskless → above Attaching",
          lambda o, n, f: n.disk > D.ATTACHING and o.disk is D.DISKLESS),
    _Move(-13, "→ WFConnection from below Unconnected",
          lambda o, n, f: n.conn is C.WF_CONNECTION and o.conn < C.UNCONNECTED),
    _Move(-16, "disk → Outdated from below Outdated, except from Attaching",
          lambda o, n, f: n.disk is D.OUTDATED and o.disk < D.OUTDATED and o.disk is not D.ATTACHING),
    _Move(-18, "→ Disconnecting from Unconnected",
          lambda o, n, f: n.conn is C.DISCONNECTING and o.conn is C.UNCONNECTED),
    _Move(-18, "handshake in progress, other than WFConnection → WFReportParams → Connected or above",
          lambda o, n, f: f.handshake_in_progress and not _handshakes(o, n)),
    _Move(-18, "promotion, pdsk UpToDate, disk neither UpToDate nor Diskless, and conn ≤ WFSyncUUID or conn "
          "changes",
          lambda o, n, f: _primary(n) and not _primary(o) and n.pdsk is D.UP_TO_DATE
          and n.disk not in (D.UP_TO_DATE, D.DISKLESS)
          and (n.conn <= C.WF_SYNC_UUID or n.conn is not o.conn)),
    _Move(-15, "→ Verify* while not connected",
          lambda o, n, f: _enters(o, n, _VERIFY) and o.conn < C.CONNECTED),
    _Move(-8, "→ Verify* while conn > Connected",
          lambda o, n, f: _enters(o, n, _VERIFY) and o.conn > C.CONNECTED),
    _Move(-15, "→ StartingSync* while not connected",
          lambda o, n, f: _enters(o, n, _STARTING) and o.conn < C.CONNECTED),
    _Move(-15, "→ SyncSource or SyncTarget from below WFReportParams",
          lambda o, n, f: _enters(o, n, _SYNC) and o.conn < C.WF_REPORT_PARAMS),
    _Move(-21, "→ Disconnecting with pdsk Outdated, old conn < Connected, old pdsk > Outdated",
          lambda o, n, f: n.conn is C.DISCONNECTING and n.pdsk is D.OUTDATED and o.conn < C.CONNECTED
          and o.pdsk > D.OUTDATED),
)  # fmt: skip


# W. The wish itself, ours. DRBD completes these wishes too, with a warning at most: a request without a
# disk becomes "nothing to do", and the limits of the new connection state raise a disk to UpToDate that
# nobody has looked at. Here what is not good does not become good by being asked for. The first match
# decides; asked of soft changes.
_REASONABLE: Final = (
    _Move(-6, "disk → Outdated, conn stays Connected or above",
          lambda o, n, f: min(o.conn, n.conn) >= C.CONNECTED and n.disk is D.OUTDATED
          and o.disk not in (D.OUTDATED, D.NEGOTIATING, D.ATTACHING)),
    _Move(-4, "Connected or above → another state above Connected, disk ≤ Failed",
          lambda o, n, f: _starts_sync(o, n) and n.disk <= D.FAILED),
    _Move(-5, "Connected or above → another state above Connected, pdsk ≤ Failed",
          lambda o, n, f: _starts_sync(o, n) and n.pdsk <= D.FAILED),
    _Move(-2, "Connected → Verify*, a disk is not UpToDate",
          lambda o, n, f: o.conn is C.CONNECTED and n.conn in _VERIFY and min(o.disk, o.pdsk) < D.UP_TO_DATE),
    _Move(-2, "Connected → StartingSync*, the disk of the source is not UpToDate",
          lambda o, n, f: o.conn is C.CONNECTED and _source_disk(o, n) not in (D.UP_TO_DATE, D.D_UNKNOWN)),
)  # fmt: skip


def _starts_sync(old: State, new: State) -> bool:
    return old.conn >= C.CONNECTED and new.conn > C.CONNECTED and new.conn is not old.conn


def _source_disk(old: State, new: State) -> DiskState:
    """The disk, before the change, from which a requested full sync would copy; UpToDate when none starts."""
    if new.conn is C.STARTING_SYNC_S:
        return old.disk
    return old.pdsk if new.conn is C.STARTING_SYNC_T else D.UP_TO_DATE


def _handshakes(old: State, new: State) -> bool:
    if old.conn is C.WF_CONNECTION:
        return new.conn is C.WF_REPORT_PARAMS
    return old.conn is C.WF_REPORT_PARAMS and new.conn >= C.CONNECTED


def reasonable(old: State, wish: State) -> int:
    """Test W: Code.OK, or the code of the first row that forbids the wish as it was made."""
    facts = Facts()  # these rows ask for none
    return next((row.code for row in _REASONABLE if row.when(old, wish, facts)), Code.OK)


def possible(old: State, new: State) -> int:
    """Test A: Code.OK, or the code of the first row that forbids *old* → *new*."""
    facts = Facts()  # these rows ask for none
    return next((row.code for row in _POSSIBLE if row.when(old, new, facts)), Code.OK)


def admissible(state: State, facts: Facts) -> int:
    """Test B: Code.OK, or the code of the first row that *state* violates."""
    return next((row.code for row in _ADMISSIBLE if row.when(state, facts)), Code.OK)


def allowed(old: State, new: State, facts: Facts) -> int:
    """Test C: Code.OK, or the code of the last row that forbids *old* → *new*."""
    return next((row.code for row in reversed(_ALLOWED) if row.when(old, new, facts)), Code.OK)


def change(old: State, new: State, facts: Facts, *, hard: bool = False) -> State | Refusal:
    """The state after the wish *new* is carried out, or why it is refused.

    A *hard* change is a fact (disk or network broke): only test A is asked. When the completed wish
    equals *old* there is nothing to do and *old* itself is returned. Test B is waived where *old* already
    violates the rule with the same code: such a state may be left in steps.
    """
    if not hard and (code := reasonable(old, new)) != Code.OK:
        return refusal(code)
    completed = sanitize(old, new, facts)
    if completed == old:
        return old
    code = possible(old, completed)
    if code == Code.OK and not hard:
        code = _soft(old, completed, replace(facts, fencing=_policy(old, facts)))
    return completed if code == Code.OK else refusal(code)


def _soft(old: State, new: State, facts: Facts) -> int:
    code = admissible(new, facts)
    if code != Code.OK and _primary(new) and not _primary(old):
        # No step out of anything: what is wrong already hides nothing else that is wrong with it.
        known = {row.code for row in _ADMISSIBLE if row.when(old, facts)}
        code = next((row.code for row in _ADMISSIBLE if row.code not in known and row.when(new, facts)), Code.OK)
    if code != Code.OK and admissible(old, facts) != code:
        return code
    return allowed(old, new, facts)


# --------------------------------------------------------------------------- agreement with the peer


def needs_agreement(old: State, new: State) -> bool:
    """Whether the peer must consent before *old* may become *new*. Demotion is never asked about."""
    if old.conn < C.CONNECTED:
        return False
    if new.conn is C.DISCONNECTING:
        return True
    if old.conn is C.CONNECTED and new.conn in (C.VERIFY_S, C.WF_REPORT_PARAMS):
        return True
    if new.conn < C.CONNECTED:
        return False
    promotes = _primary(new) and not _primary(old)
    detaches = new.disk is D.FAILED and old.disk is not D.FAILED
    return promotes or detaches or _enters(old, new, _STARTING)


ROLE_MASK: Final = 0x3
CONN_MASK: Final = 0x1F << 4
DISK_MASK: Final = 0xF << 9
PDSK_MASK: Final = 0xF << 13
_AFTR_ISP: Final = 1 << 18
_PEER_ISP: Final = 1 << 19
_USER_ISP: Final = 1 << 20

# What the requester's connection state means on this side. 31 is the mask; all else becomes 0.
_MIRRORED_CONN: Final[dict[int, int]] = {
    C.WF_REPORT_PARAMS: C.WF_REPORT_PARAMS,
    C.CONNECTED: C.CONNECTED,
    C.STARTING_SYNC_S: C.STARTING_SYNC_T,
    C.STARTING_SYNC_T: C.STARTING_SYNC_S,
    C.DISCONNECTING: C.TEAR_DOWN,
    C.VERIFY_S: C.VERIFY_T,
    31: 31,
}


def _mirror(word: int) -> int:
    """One state word of a request, from the requester's point of view into ours. The remaining flags are
    dropped: this node's suspension is not the peer's to set."""
    isp = _PEER_ISP if word & (_AFTR_ISP | _USER_ISP) else 0
    return (
        (word & 3) << 2 | word >> 2 & 3 | _MIRRORED_CONN.get(word >> 4 & 31, 0) << 4
        | (word >> 9 & 15) << 13 | (word >> 13 & 15) << 9 | isp
    )  # fmt: skip


def convert_request(mask: int, val: int) -> tuple[int, int]:
    """The mask and value words of a received P_STATE_CHG_REQ or P_CONN_ST_CHG_REQ, from our point of view."""
    return _mirror(mask), _mirror(val)


def apply_mask(state: State, mask: int, val: int) -> State:
    """*state* with the fields under *mask* taken from *val* (both state words).

    Errors: PeerProtocolError when a field would hold a number DRBD does not know.
    """
    word = state.word() & ~mask | val & mask
    try:
        return State.from_word(word)
    except ValueError as e:
        raise PeerProtocolError(
            f"state change request mask {mask:#010x} val {val:#010x} asks for an unknown state: {e}"
        ) from e


def peer_request(
    state: State, mask: int, val: int, facts: Facts, *, connection: bool = False
) -> State | Refusal:
    """Carry out a request as received, mask and val still in the peer's words.

    *connection*: it came as P_CONN_ST_CHG_REQ, so a demand to be Outdated is ignored by a disk that is
    already worse. A connection state nobody may ask for is refused with -17.
    """
    asked = val >> 4 & 31 if mask & CONN_MASK else C.CONNECTED
    if asked not in _MIRRORED_CONN or asked == 31:
        return refusal(Code.NOT_SUPPORTED, f"the peer asked for connection state {asked}")
    mask, val = convert_request(mask, val)
    if connection and mask & DISK_MASK and val >> 9 & 15 == D.OUTDATED and state.disk < D.OUTDATED:
        mask &= ~DISK_MASK
    return change(state, apply_mask(state, mask, val), facts)


# --------------------------------------------------------------------------------------- documents


def state_table() -> str:
    """The tests and the limits as markdown, generated from the tables above."""
    parts = [
        _rows("W. Wish reasonable (soft changes, the first match decides; stricter than DRBD)", _REASONABLE),
        _rows("A. Possible at all (every change, the first match decides)", _POSSIBLE),
        _rows("B. New state admissible (soft changes, the first match decides)", _ADMISSIBLE),
        _rows("C. Transition allowed (soft changes, the last match decides)", _ALLOWED),
        _limit_rows(),
    ]
    return "\n".join(parts)


def _rows(title: str, rows: tuple[_Move, ...] | tuple[_Rest, ...]) -> str:
    lines = [f"### {title}", "", "| condition | code | sentence |", "|---|---|---|"]
    lines += [f"| {row.says} | {row.code} | {_SENTENCES[row.code][0]} |" for row in rows]
    return "\n".join(lines) + "\n"


def _limit_rows() -> str:
    title = "### Disk states possible in each connection state"
    lines = [title, "", "| conn | disk | pdsk |", "|---|---|---|"]
    lines += [f"| {conn} | {_span(disk)} | {_span(pdsk)} |" for conn, (disk, pdsk) in sorted(_LIMITS.items())]
    return "\n".join(lines) + "\n"


def _span(limits: tuple[DiskState, DiskState]) -> str:
    low, high = limits
    if limits == _ANY:
        return "any"
    return str(low) if low is high else f"{low} … {high}"
