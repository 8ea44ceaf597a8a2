"""The exceptions and refusals of the machine.

A peer's mistake is a `PeerProtocolError` inside the codec. A command that may not be carried out is a
`Refusal` value with DRBD's number and sentence, never an exception. The numbers and sentences are those
of drbdsetup (state change failures are negative, configuration failures 101 to 170).
"""

from __future__ import annotations

from dataclasses import dataclass


class PeerProtocolError(Exception):
    """The peer sent what the protocol does not allow; the connection ends in ProtocolError."""


class MetadataError(Exception):
    """Metadata that cannot be used: one sentence for the operator, with drbdsetup's error *code* and
    drbdmeta's *exit_code*."""

    def __init__(self, text: str, code: int = 119, exit_code: int = 1) -> None:
        super().__init__(text)
        self.code = code
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a command was not carried out.

    *code* is DRBD's number, *text* DRBD's sentence, *hint* what to do next (ours), *info* extra lines
    such as drbdsetup prints under "additional info from kernel:".
    """

    code: int
    text: str
    hint: str = ""
    info: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """drbdsetup's exit code for this refusal."""
        if self.code > 0:
            return 10
        return {-2: 17, -4: 16, -16: 5}.get(self.code, 11)
