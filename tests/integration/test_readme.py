"""The README's tour does what it says, typed as it is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tandem.tools.demo_pair import RESOURCE, Pair, free_ports

from tests.conftest import FindProgram, NewPair

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_the_tour(new_pair: NewPair, program: FindProgram) -> None:
    for name in ("nbdinfo", "nbdcopy", "qemu-io"):
        program(name)
    pair: Pair = new_pair()  # only its directory and its clean-up are used
    place = pair.directory / "tour"
    script = "".join(blocks()).replace("/tmp/tour", str(place))
    for port, free in zip(("7788", "7789"), free_ports(2), strict=True):
        assert script.count(port) == 1
        script = script.replace(port, str(free))
    script = f"set -eu\nexport PATH={Path(sys.executable).parent}:$PATH\n{script}"
    try:
        command = ["bash", "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    finally:
        _end_daemons(place)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stdout.count("role:Primary") == 2  # alice's at first, bob's as alice sees it in the end
    assert "verification failed" not in done.stdout
    assert not place.exists()


def _end_daemons(place: Path) -> None:
    """What a tour that broke off left running."""
    left = Pair(place)
    left.config = place / "tandem.conf"
    left.close()
    assert all(left.pid(node) is None for node in left.nodes), RESOURCE
