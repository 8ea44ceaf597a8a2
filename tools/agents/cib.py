"""Pacemaker's cluster information base, as far as fencing by constraint needs it.

Reads and changes it with `cibadmin` and `crm_attribute`, which speak to the cluster, or to a file while
``CIB_file`` is set. The constraint has the name and form that DRBD's crm-fence-peer.sh gives it, so that a
node with the kernel's DRBD and one with this program understand each other.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from enum import Enum
from typing import Final

from .handler import HandlerError, run

PREFIX: Final = "drbd-fence-by-handler"
EXISTS: Final = 108  # CRM_EX_EXISTS
LIMIT_S: Final = 30.0
UNAME: Final = "#uname"  # the rule attribute that is a node's name


class PeerState(Enum):
    """What the cluster knows of a node."""

    REACHABLE = "reachable"
    FENCED = "off, as the cluster knows"
    UNCLEAN = "neither reachable nor known to be off"


@dataclass(frozen=True, slots=True)
class Cib:
    """One reading of the information base."""

    root: ElementTree.Element

    @property
    def has_quorum(self) -> bool:
        return self.root.get("have-quorum") == "1"

    @property
    def stonith_enabled(self) -> bool:
        """The cluster property; true unless it says otherwise."""
        for pair in self.root.iterfind("configuration/crm_config//nvpair"):
            if pair.get("name") in ("stonith-enabled", "stonith_enabled"):
                return str(pair.get("value")).lower() not in ("false", "no", "off", "n", "0")
        return True

    def clone_of(self, resource: str) -> str:
        """The id of the promotable clone that manages *resource*; HandlerError when there is none."""
        for kind in ("clone", "master"):
            for clone in self.root.iterfind(f"configuration/resources//{kind}"):
                for pair in clone.iterfind(".//primitive/instance_attributes/nvpair"):
                    if pair.get("name") == "drbd_resource" and pair.get("value") == resource:
                        return str(clone.get("id"))
        raise HandlerError(f"the cluster has no promotable clone whose drbd_resource is {resource}")

    def peer_state(self, node: str) -> PeerState:
        """What the cluster knows of *node*. Newer versions write the time of an event where older ones say true."""
        for state in self.root.iterfind("status/node_state"):
            if str(state.get("uname")).lower() != node.lower():
                continue
            member = _happened(state.get("in_ccm")) and _happened(state.get("crmd"))
            if member and state.get("join") == "member":
                return PeerState.REACHABLE
            gone = not _happened(state.get("in_ccm")) and not _happened(state.get("crmd"))
            if gone and state.get("join") == "down" and state.get("expected") == "down":
                return PeerState.FENCED
        return PeerState.UNCLEAN

    def constraint(self, identifier: str) -> set[str] | None:
        """The values of the rule of a constraint (the nodes that may be promoted); None when there is none."""
        for found in self.root.iterfind("configuration/constraints/rsc_location"):
            if found.get("id") == identifier:
                expressions = found.iterfind("rule/expression")
                return {str(e.get("value")) for e in expressions if e.get("operation") == "ne"}
        return None


def _happened(value: str | None) -> bool:
    """``true``, ``online`` or the time since when; ``false``, ``offline`` or 0 is no."""
    return value is not None and value not in ("false", "offline", "0")


def constraint_id(resource: str, clone: str) -> str:
    """The name of the constraint, which is the same on both nodes: the second one to place it fails."""
    return f"{PREFIX}-{resource}-{clone}"


def constraint_xml(resource: str, clone: str, attribute: str, value: str) -> str:
    """The constraint: *clone* is promoted only where the node attribute has this value."""
    prefix = f"{PREFIX}-{resource}"
    location = ElementTree.Element("rsc_location", rsc=clone, id=f"{prefix}-{clone}")
    rule = ElementTree.SubElement(location, "rule", role="Master", score="-INFINITY", id=f"{prefix}-rule-{clone}")
    ElementTree.SubElement(
        rule, "expression", attribute=attribute, operation="ne", value=value, id=f"{prefix}-expr-{clone}"
    )
    return ElementTree.tostring(location, encoding="unicode")


def read() -> Cib:
    """The information base as it is now; HandlerError when the cluster does not answer."""
    done = run(["cibadmin", "--query"], limit_s=LIMIT_S)
    if done.rc:
        raise HandlerError(f"cibadmin --query failed ({done.rc}): {done.last_line}")
    try:
        return Cib(ElementTree.fromstring(done.out[done.out.index("<cib") :]))
    except (ValueError, ElementTree.ParseError) as error:
        raise HandlerError(f"cibadmin --query printed no information base: {error}") from error


def attribute_value(node: str, attribute: str) -> tuple[str, str]:
    """The attribute to fence by and its value on *node*; the node's name when it has no such attribute."""
    if attribute != UNAME:
        words = ["crm_attribute", "--query", "--quiet", "--type", "nodes", "--node", node, "--name", attribute]
        done = run(words, limit_s=LIMIT_S)
        if done.rc == 0 and done.out.strip():
            return attribute, done.out.strip().splitlines()[-1]
    return UNAME, node


def place(xml: str) -> bool:
    """Create the constraint; False when one of this name is there already."""
    done = run(["cibadmin", "--create", "--scope", "constraints", "--xml-text", xml], limit_s=LIMIT_S)
    if done.rc not in (0, EXISTS):
        raise HandlerError(f"the constraint could not be placed ({done.rc}): {done.last_line}")
    return done.rc == 0


def remove(identifier: str) -> None:
    """Delete the constraint."""
    xml = ElementTree.tostring(ElementTree.Element("rsc_location", id=identifier), encoding="unicode")
    done = run(["cibadmin", "--delete", "--scope", "constraints", "--xml-text", xml], limit_s=LIMIT_S)
    if done.rc:
        raise HandlerError(f"the constraint {identifier} could not be removed ({done.rc}): {done.last_line}")
