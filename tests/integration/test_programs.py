"""Programs that people use, on a really mirrored pair; afterwards both disks are the same, byte by byte."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable

import pytest
from tandem.tools.demo_pair import Pair, first_difference, usable_size

from tests.conftest import FindProgram

MIB = 1 << 20

Run = Callable[..., str]


@pytest.fixture
def run(program: FindProgram) -> Run:
    """Runs an outside program that has to succeed; what it printed."""

    def start(name: str, *words: object, says: str = "", code: int = 0) -> str:
        command = [program(name), *map(str, words)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
                              check=False)  # fmt: skip
        assert done.returncode == code, (command, done.stdout, done.stderr)
        assert says in done.stdout + done.stderr
        return done.stdout

    return start


def size_of(pair: Pair) -> int:
    return usable_size(pair.status(pair.first))


def assert_mirrored(pair: Pair, image: bytes | None = None) -> None:
    """Both disks hold the same, and nothing is marked out of sync."""
    pair.wait_in_sync()
    for node in pair.nodes:
        assert pair.status(node).connection.volumes[0].out_of_sync == 0
    at = first_difference(pair.first.disk, pair.second.disk, size_of(pair))
    assert at is None, f"the disks differ at byte {at}"
    if image is not None:
        assert pair.second.disk.read_bytes()[: len(image)] == image


def fio(pair: Pair, *more: str) -> list[str]:
    return [
        "--name=mirrored", "--ioengine=nbd", f"--uri={pair.first.uri}", "--verify=crc32c",
        "--verify_fatal=1", "--iodepth=32", "--output-format=json", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        ["--rw=randwrite", "--bs=4k", "--size=16m"],
        ["--rw=randrw", "--bsrange=512-64k", "--blockalign=512", "--size=24m", "--fsync=32"],
        ["--rw=write", "--bs=1m", "--size=48m"],
        ["--rw=randtrimwrite", "--bs=4k", "--size=8m", "--do_verify=0"],
    ],
    ids=lambda words: str(words[0]).removeprefix("--rw="),
)
def test_fio_verifies_what_it_wrote(pair: Pair, run: Run, pattern: list[str]) -> None:
    out = run("fio", *fio(pair, *pattern))
    (job,) = json.loads(out[out.index("{") :])["jobs"]
    assert job["error"] == 0 and job["write"]["total_ios"] > 0
    assert_mirrored(pair)


def test_qemu_io_commands_of_all_kinds(pair: Pair, run: Run) -> None:
    commands = [
        "write -P 0x11 0 1M", "write -f -P 0x22 1M 64k", "write -z 256k 128k", "write -z -u 512k 64k",
        "discard 3M 1M", "aio_write -P 0x33 5M 512k", "aio_flush", "flush", "read -P 0x11 0 256k",
        "read -P 0 256k 128k", "read -P 0x22 1M 64k", "read -P 0x33 5M 512k", "read -P 0 512k 64k",
    ]  # fmt: skip
    words = [word for command in commands for word in ("-c", command)]
    out = run("qemu-io", "-f", "raw", *words, pair.first.uri)
    assert "verification failed" not in out
    assert_mirrored(pair)


def test_an_image_goes_in_and_comes_out_with_qemu_img(pair: Pair, run: Run) -> None:
    image, back = pair.directory / "in.raw", pair.directory / "out.qcow2"
    draw = random.Random(1)
    with open(image, "wb") as file:
        file.truncate(size_of(pair))
        for _ in range(40):
            file.seek(draw.randrange(size_of(pair) // 4096 - 64) * 4096)
            file.write(draw.randbytes(draw.randrange(1, 64 * 4096)))
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", image, pair.first.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", image, pair.first.uri, says="identical")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", pair.first.uri, back)
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", image, back, says="identical")
    assert_mirrored(pair, image.read_bytes())


def test_nbdcopy_in_and_out(pair: Pair, run: Run) -> None:
    image, back = pair.directory / "in.raw", pair.directory / "out.raw"
    image.write_bytes(random.Random(2).randbytes(8 * MIB) + bytes(size_of(pair) - 8 * MIB))
    run("nbdcopy", "--flush", image, pair.first.uri)
    run("nbdcopy", pair.first.uri, back)
    assert first_difference(image, back, size_of(pair)) is None
    assert_mirrored(pair, image.read_bytes())


def test_nbdinfo_and_nbd_client_see_the_export(pair: Pair, run: Run) -> None:
    told = json.loads(run("nbdinfo", "--json", pair.first.uri))["exports"][0]
    assert told["export-name"] == "r0" and told["export-size"] == size_of(pair)
    assert told["is_read_only"] is False and told["can_multi_conn"] is True
    assert "Primary" in told["description"]
    run("nbd-client", "-l", "-unix", pair.first.socket, says="r0")


def test_a_secondary_tells_a_client_why_it_refuses(pair: Pair, run: Run) -> None:
    run("qemu-img", "info", pair.second.uri, code=1, says="r0 is Secondary on bob")
    run("nbdinfo", pair.second.uri, code=1)
    run("nbd-client", "-l", "-unix", pair.second.socket, says="Secondary")


def test_a_file_system_survives_the_change_of_roles(pair: Pair, run: Run, program: FindProgram) -> None:
    image = pair.directory / "fs.ext4"
    tree = pair.directory / "tree"
    tree.mkdir()
    for i in range(50):
        (tree / f"{i}.bin").write_bytes(random.Random(i).randbytes(i * 3000))
    with open(image, "wb") as file:
        file.truncate(size_of(pair) // 4096 * 4096)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-b", 4096, "-d", tree, image, size_of(pair) // 4096)
    run("nbdcopy", "--flush", image, pair.first.uri)
    pair.adm(pair.first, "secondary", "r0")
    pair.adm(pair.second, "primary", "r0")
    copy = pair.directory / "copy.ext4"
    run("nbdcopy", pair.second.uri, copy)
    run("e2fsck", "-f", "-n", copy)
    found = pair.directory / "found.bin"
    run("debugfs", "-R", f"dump /49.bin {found}", copy)
    assert found.read_bytes() == (tree / "49.bin").read_bytes()
    assert_mirrored(pair)


def test_drbdmeta_reads_what_the_pair_left_behind(pair: Pair, run: Run) -> None:
    run("qemu-io", "-f", "raw", "-c", "write -P 1 0 8M", "-c", "flush", pair.first.uri)
    pair.down()
    for node in pair.nodes:
        mine = pair.adm(node, "dump-md", "r0")
        theirs = run("drbdmeta", "--force", "-", "v08", node.disk, "internal", "dump-md")
        assert what_counts(mine) == what_counts(theirs) != []
        told = run("drbdmeta", "--force", "-", "v08", node.disk, "internal", "get-gi")
        assert told == pair.adm(node, "get-gi", "r0")
        assert told.split(":")[4:7] == ["1", "1", "0"]  # consistent, up to date, not Primary


def what_counts(dump: str) -> list[str]:
    """A dump without comments, and without the flags: drbdmeta before 9.33 prints 0 for those of v08."""
    lines = [line.split("#")[0].strip() for line in dump.splitlines()]
    return [line for line in lines if line and not line.startswith("flags")]

