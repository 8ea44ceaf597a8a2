"""The tables in docs/ that are generated from the code: `make docs` writes them, a test compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tandem.repl import packets, transition, uuids

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"

NOTE: Final = "This page is generated from `{source}`; change the table there, then `make docs`."

STATES: Final = """\
# States: what may change into what

Every change of a role, connection or disk state goes through one function, `change()` of
`repl/transition.py`. It first completes the wish (what else follows from it), then asks these tables. A
change that an operator asks for is *soft* and may be refused, with the code and the sentence given here;
what simply happened, a broken disk or a lost link, is *hard* and is never asked for permission.

"""

PACKETS: Final = """\
# Packets: what is accepted from the peer

A packet with another length ends the connection with ProtocolError. Layouts are in `repl/wire.py`.

"""

UUIDS: Final = """\
# Generation UUIDs: who copies to whom

When two nodes connect, `compare()` of `repl/uuids.py` looks at both sets of generation UUIDs. The first rule
whose condition holds decides, and the log names it (`uuid_compare()=1 by rule 70`).

Verdicts: 0 no copy · +1, −1 copy by the bitmap, from or to this node · +2, −2 copy everything · 100, −100
split brain · −1000 unrelated data · −1091 and below: the peer is too old to decide.

"""


def pages() -> dict[str, str]:
    """The generated pages by file name."""
    sources = {
        "states.md": (STATES, "repl/transition.py", transition.state_table()),
        "packets.md": (PACKETS, "repl/packets.py", packets.packet_table()),
        "uuid-rules.md": (UUIDS, "repl/uuids.py", uuids.rules_table()),
    }
    return {
        name: f"{text}{NOTE.format(source=source)}\n\n{table.rstrip()}\n"
        for name, (text, source, table) in sources.items()
    }


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text)
        print(f"docs/{name}")
