"""States and facts that tests of the state machine start from, by short names."""

from __future__ import annotations

from tandem.repl.config import Fencing
from tandem.repl.states import ConnState, DiskState, Role, State
from tandem.repl.transition import Facts

C, D = ConnState, DiskState
P, S, U = Role.PRIMARY, Role.SECONDARY, Role.UNKNOWN
UP, INC, OUT, CON, UNK, LESS, FAILED, NEG, ATT = (
    D.UP_TO_DATE, D.INCONSISTENT, D.OUTDATED, D.CONSISTENT, D.D_UNKNOWN, D.DISKLESS, D.FAILED, D.NEGOTIATING,
    D.ATTACHING,
)  # fmt: skip
FACTS = Facts()
TWO = Facts(two_primaries=True)
STONITH = Facts(fencing=Fencing.RESOURCE_AND_STONITH)
RESOURCE_ONLY = Facts(fencing=Fencing.RESOURCE_ONLY)
VERIFY = Facts(verify_alg=True)

GOOD = State(S, S, C.CONNECTED, UP, UP)
PRIMARY = State(P, S, C.CONNECTED, UP, UP)
ALONE = State(S, U, C.STAND_ALONE, UP, UNK)


def words(state: State) -> tuple[object, ...]:
    return state.conn, state.disk, state.pdsk
