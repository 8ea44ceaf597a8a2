"""Two nodes in a real split brain, with a file system on the volume; what the disks held before and after."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from tests.adm_pair import PATIENCE, NbdClient, Pair, Result

BLOCK = 4096
METADATA = 1 << 20  # at the end of a disk, generously
Changes = dict[str, list[tuple[int, bytes]]]  # what a node writes where
FILES = {"letters/one": 300_000, "letters/two": 200_000, "three": 100_000}

# Runs `tandemadm` and ends it with SIGKILL when the recovery says that it has come to a certain step.
KILLED = """
import os, signal, sys
from tandem.tools import adm, split_brain_run

step, real = sys.argv[1], split_brain_run.Recovery

def killing(call):
    def told(what, *more):
        call(what, *more)
        if what == step:
            os.kill(os.getpid(), signal.SIGKILL)
    return told

split_brain_run.Recovery = lambda wish, nodes, announce, tell: real(wish, nodes, killing(announce), killing(tell))
sys.exit(adm.run(sys.argv[2:]))
"""


def make_image(directory: Path, kind: str) -> Path:
    """A file system image with FILES, made by the file system's own tools."""
    tree, image = directory / "tree", directory / f"{kind}.img"
    for name, size in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(random.Random(name).randbytes(size))
    with open(image, "wb") as file:
        file.truncate((16 if kind == "ext4" else 300) << 20)
    if kind == "ext4":
        words = ["mkfs.ext4", "-q", "-b", str(BLOCK), "-d", str(tree), str(image)]
    else:
        proto = directory / "proto"
        proto.write_text(
            f"/none\n0 0\nd--755 0 0\nletters d--755 0 0\none ---644 0 0 {tree}/letters/one\n"
            f"two ---644 0 0 {tree}/letters/two\n$\nthree ---644 0 0 {tree}/three\n$\n"
        )
        words = ["mkfs.xfs", "-q", "-f", "-p", str(proto), str(image)]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    return image


class SplitPair(Pair):
    """alpha stays Primary; beta is Secondary again after it had been Primary on its own."""

    def __init__(self, *, kind: str = "ext4", net: str = "", disk_size: int = 0) -> None:
        super().__init__(net=net)
        self.image = make_image(self.dir, kind)
        self.disks = {"alpha": self.dir / "a.img", "beta": self.dir / "b.img"}
        size = disk_size or (24 << 20 if kind == "ext4" else 320 << 20)
        for disk in self.disks.values():
            with open(disk, "r+b") as file:
                file.truncate(size)
        self.create()
        self.up()
        self.promote()
        self.size = 0
        content = self.image.read_bytes()
        pieces = [(at, content[at : at + (1 << 20)]) for at in range(0, len(content), 1 << 20)]
        self.write("alpha", [(at, piece) for at, piece in pieces if any(piece)])
        self.base = self.content("alpha")
        assert self.content("beta") == self.base

    def write(self, node: str, pieces: list[tuple[int, bytes]], export: str = "r0") -> None:
        client = NbdClient(self.path(node, "nbd"), export)
        if export == "r0":
            self.size = client.size
        for offset, data in pieces:
            assert client.write(offset, data) == 0
        client.close()

    def content(self, node: str) -> bytes:
        """The data on the disk of *node*."""
        with open(self.disks[node], "rb") as file:
            return file.read(self.size)

    def split(self, changes: Changes, *, both_primary: bool = False, second: Changes | None = None) -> None:
        """Part the nodes, write *changes* on each alone (*second* to the second volume), and have them meet again."""
        for node in ("alpha", "beta"):
            self.ok(node, "disconnect", "--force", "r0")
        self.ok("beta", "primary", "r0")
        for export, of_nodes in (("r0", changes), ("r0/1", second or {})):
            for node, pieces in of_nodes.items():
                self.write(node, pieces, export)
        if not both_primary:
            self.ok("beta", "secondary", "r0")
        for node in ("alpha", "beta"):
            self.ok(node, "connect", "r0")
        for node in ("alpha", "beta"):
            assert self.adm(node, "wait-connect", PATIENCE, "r0").code == 0
            assert set(self.ok(node, "cstate", "r0").split()) == {"StandAlone"}

    def changed(self, node: str) -> set[int]:
        """Blocks of *node*'s disk that are not what both had in common."""
        return differing(self.base, self.content(node))

    def killed_at(self, step: str, node: str, *words: str) -> Result:
        """One command line, killed when the recovery has come to *step*."""
        done = subprocess.run(
            [sys.executable, "-c", KILLED, step, *self.where(node), *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr)

    def histories(self) -> list[Path]:
        return sorted(self.run.glob("*/*.history"))


class TwoVolumes(SplitPair):
    """The same with a second volume, which has no file system."""

    SIZE = 16 << 20  # of the second volume's disks, with their metadata

    def configure(self, *, device: str = "", net: str = "") -> None:
        sides = ""
        for node, port in (("alpha", self.port_a), ("beta", self.port_b)):
            volumes = ""
            for number, kind in enumerate(("", "1")):
                disk = self.dir / f"{node[0]}{kind}.img"
                volumes += f"volume {number} {{ device minor {number}; disk {disk}; meta-disk internal; }} "
                with open(disk, "ab") as file:
                    file.truncate(self.SIZE)
            sides += f"    on {node} {{ address 127.0.0.1:{port}; {volumes}}}\n"
        self.file.write_text(f"resource r0 {{\n    net {{ protocol C; {net} }}\n{sides}}}\n")

    def content(self, node: str, number: int = 0) -> bytes:
        if number == 0:
            return super().content(node)
        with open(self.dir / f"{node[0]}1.img", "rb") as file:
            return file.read(self.SIZE - METADATA)


def differing(one: bytes, other: bytes) -> set[int]:
    """Numbers of the blocks in which two contents differ."""
    assert len(one) == len(other)
    return {
        at // BLOCK for at in range(0, len(one), BLOCK) if one[at : at + BLOCK] != other[at : at + BLOCK]
    }


def block_of(image: Path, path: str) -> int:
    """The first block of a file in an ext4 image."""
    found = subprocess.run(
        ["debugfs", "-R", f"blocks {path}", str(image)], check=True, capture_output=True, text=True, timeout=60
    )
    return int(found.stdout.split()[0])


def noise(seed: str, n_blocks: int) -> bytes:
    return random.Random(seed).randbytes(n_blocks * BLOCK)
