"""The settings of a connection that both nodes must share: said, compared, and changed while it lives.

In the handshake each node says its own (P_PROTOCOL), and any difference that matters ends in StandAlone.
Later a node that is reconfigured (what a running resource cannot take over is refused) tells the other
(P_PROTOCOL_UPDATE), which adopts them without comparing; the algorithm in it is that of the sender's data
from there on in the stream. Pure.

Source: drbd_receiver.c, receive_protocol; drbd_main.c, __drbd_send_protocol.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from .config import AfterSb, NetOptions, ResourceConfig
from .errors import Refusal
from .states import Role
from .volume import Volume
from .wire import Protocol

UPDATE_APV: Final = 100  # the first protocol with P_PROTOCOL_UPDATE
_LETTERS: Final = "ABC"
_MIRRORED: Final = {AfterSb.DISCARD_LOCAL: AfterSb.DISCARD_REMOTE, AfterSb.DISCARD_REMOTE: AfterSb.DISCARD_LOCAL}


def said(net: NetOptions, conn_flags: int = 0) -> Protocol:
    """Our settings as the peer is told them."""
    return Protocol(
        _LETTERS.index(net.protocol) + 1, net.after_sb_0pri, net.after_sb_1pri, net.after_sb_2pri,
        conn_flags, int(net.allow_two_primaries), net.data_integrity_alg,
    )  # fmt: skip


def refused(volumes: Mapping[int, Volume], config: ResourceConfig) -> Refusal | None:
    """Why a running resource with *volumes* cannot take over *config* (drbd_nl.c, _check_net_options)."""
    if {v.number for v in config.volumes} != set(volumes):
        return Refusal(161, "Minor or volume exists already (delete it first).",
                       "Volumes can not be added to a running resource: down and up again")  # fmt: skip
    states = [v.state for v in volumes.values()]
    both = any(s.role == Role.PRIMARY for s in states) and any(s.peer == Role.PRIMARY for s in states)
    if both and not config.net.allow_two_primaries:
        return Refusal(164, "Can not clear allow_two_primaries as long as there a primaries on both sides.",
                       "Demote one node first: tandemadm secondary {res}")  # fmt: skip
    return None


def _ours(policy: int) -> int:
    """A policy of the peer as we would say it: what is local there is remote here."""
    return _MIRRORED.get(AfterSb(policy), policy) if policy in AfterSb._value2member_map_ else policy


def difference(net: NetOptions, theirs: Protocol) -> str:
    """What in the peer's P_PROTOCOL does not fit our configuration, as a sentence; empty when all does."""
    own = said(net)
    pairs = (
        ("protocol", _letter(own.protocol), _letter(theirs.protocol)),
        ("after-sb-0pri", own.after_sb_0p, _ours(theirs.after_sb_0p)),
        ("after-sb-1pri", own.after_sb_1p, _ours(theirs.after_sb_1p)),
        ("after-sb-2pri", own.after_sb_2p, _ours(theirs.after_sb_2p)),
        ("allow-two-primaries", own.two_primaries, theirs.two_primaries),
        ("data-integrity-alg", own.integrity_alg or "none", theirs.integrity_alg or "none"),
    )
    for option, here, there in pairs:
        if here != there:
            return f"incompatible {option}: {here!s} here, {there!s} on the peer; make the configurations equal"
    return ""


def _letter(number: int) -> str:
    return _LETTERS[number - 1] if 1 <= number <= len(_LETTERS) else str(number)


def adopted(net: NetOptions, theirs: Protocol) -> NetOptions:
    """Our options after the peer's P_PROTOCOL_UPDATE; what we do not know stays as it is.

    The algorithm is not among them: each node chooses that of its own data.
    """
    letter = _letter(theirs.protocol) if 1 <= theirs.protocol <= len(_LETTERS) else net.protocol
    return replace(
        net, protocol=letter, allow_two_primaries=bool(theirs.two_primaries),
        after_sb_0pri=_policy(theirs.after_sb_0p, net.after_sb_0pri),
        after_sb_1pri=_policy(theirs.after_sb_1p, net.after_sb_1pri),
        after_sb_2pri=_policy(theirs.after_sb_2p, net.after_sb_2pri),
    )  # fmt: skip


def _policy(theirs: int, own: AfterSb) -> AfterSb:
    return AfterSb(_ours(theirs)) if theirs in AfterSb._value2member_map_ else own
