"""The pages of docs/ that are generated, from the code and from the lab's results: `make docs` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tandem.repl import packets, transition, uuids

from tests import role_table, split_brain_table
from tests.lab import results

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"

NOTE: Final = "This page is generated from `{source}`; change it there, then `make docs`."

STATES: Final = """\
# States: what may change into what

Every change of a role, connection or disk state goes through one function, `change()` of
`repl/transition.py`. It first completes the wish (what else follows from it), then asks these tables. A
change that an operator asks for is *soft* and may be refused, with the code and the sentence given here;
what simply happened, a broken disk or a lost link, is *hard* and is never asked for permission.

"""

ROLES: Final = """\
# Roles: who may become what

What a node answers to a command, by the situation it is in. "yes" is done (also when there was nothing to do); a
number is DRBD's code of the refusal, explained at the end. The peer has no objection of its own in any of these. The
rules one by one are in [states.md](states.md).

Connected means with both nodes Secondary unless said otherwise; alone means that the peer can not be reached (its
data is not known), StandAlone that it is not even looked for. A node that was Primary when it crashed comes back as a
Secondary that is alone. `--force` makes this node's data the good data: what the peer has changed alone is lost
then, or it is a split brain when they meet. A promotion that meets a handler waits for it.

`secondary --force` ends the sessions of the NBD clients first: what they have sent is answered, then they are
disconnected. (In DRBD 9 it makes their further requests fail instead; a connection that ends says the same.)

Two nodes at once are Primary only with `allow-two-primaries`. With `auto-promote yes` opening an export is a `primary`
of its own, and the last client that leaves a `secondary`; a client is told the refusal. Who only asks about an export
(`nbdinfo --list`) promotes nobody. While a `tandemadm` changes the resource, as `split-brain --keep` does until the
nodes are connected, nobody is promoted; the client is told so after five seconds.

"""

SPLIT_BRAIN: Final = """\
# Split brain: which data is given up, and who is fenced

Two nodes that were Primary without each other have two histories. When they meet, the `after-sb-` policies decide, by
how many of them are Primary now, whose history is given up: the tables name the node (alice or bob) whose data is
replaced by the other's, "–" where the policy has no answer. Then `connect --discard-my-data` on one node is one;
without it both nodes are StandAlone, the `split-brain` handler runs, and the log says what to do.

* `discard-local` and `discard-remote` are meant from alice's side; bob's configuration must have the other word.
* `call-pri-lost-after-sb` runs the handler `pri-lost-after-sb` on the Primary that loses, which is to make it a
  Secondary, by a reboot for instance; until then the split brain stays unresolved. DRBD demotes nobody by itself while
  two nodes meet: no role may change before they are Connected. Only a split brain that an attach brings to light on
  nodes that are connected has the loser demoted first, unless clients are attached.
* A Primary does not take the peer's data while it is Primary, unless `rr-conflict violently` is set; with
  `call-pri-lost` the handler `pri-lost` runs on it. In both cases the connection ends.
* Histories that share no bitmap generation are only put to the policies with `always-asbp`; then everything is copied.

Unresolved, with `fencing resource-only` or `resource-and-stonith`, a node that is Primary runs its `fence-peer` handler
once for the node that must yield: the Secondary if there is one; of two Primaries the one whose data `after-sb-0pri`
would give up, or else the one that changed less. Who yields leaves the peer alone; a Secondary is Outdated then, and
under `resource-and-stonith` a Primary waits with its I/O frozen. The one that fences is frozen too, until the handler
has answered; what either had been told of the peer's disk, and a handler called before they met, do not count any more.
Both nodes reach the same answer by themselves. If nobody is Primary nobody writes, and nobody is fenced. A Primary that
is refused because it should take the peer's data yields in the same way. The outcome is in the log and in `status`: as
`suspended:fencing`, and with `--verbose` or `--json` as the state of the peer's disk.

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
        "roles.md": (ROLES, "tests/role_table.py", role_table.role_table()),
        "split-brain.md": (SPLIT_BRAIN, "tests/split_brain_table.py", split_brain_table.split_brain_tables()),
        "packets.md": (PACKETS, "repl/packets.py", packets.packet_table()),
        "uuid-rules.md": (UUIDS, "repl/uuids.py", uuids.rules_table()),
    }
    return {
        name: f"{text}{NOTE.format(source=source)}\n\n{table.rstrip()}\n"
        for name, (text, source, table) in sources.items()
    } | {"verified.md": results.page()}


if __name__ == "__main__":
    for name, text in pages().items():
        (DOCS / name).write_text(text)
        print(f"docs/{name}")
