"""The kernel's nbd driver with Debian's `nbd-client`: what file systems do to a volume, on both disks."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from tandem.tools.demo_pair import first_difference, usable_size

from .block_host import DEVICE, BlockHost
from .uml import HOST_LAN

CHECKS = {"ext4": "e2fsck -fn", "xfs": "xfs_repair -n"}
MAKE = {"ext4": "mkfs.ext4 -q", "xfs": "mkfs.xfs -q -f"}


@pytest.fixture
def device(block_host: BlockHost) -> Iterator[BlockHost]:
    """The guest with the resource connected to /dev/nbd0 by nbd-client, as its manual says."""
    block_host.guest.sh(f"nbd-client {HOST_LAN} {block_host.port} {DEVICE} -name r0 -connections 2")
    yield block_host
    block_host.guest.sh(f"umount /mnt; nbd-client -d {DEVICE}", check=False)


def fio(*options: str) -> str:
    words = ("--thread", "--verify_state_save=0", "--verify_fatal=1", "--filename=/mnt/fio", *options)
    return "fio --output=/tmp/fio.txt " + " ".join(words) + " || { cat /tmp/fio.txt; exit 1; }\n"


def n_blocks_of_trims(host: BlockHost) -> int:
    """Blocks that bob's daemon has been told to trim so far; 4 KiB each are freed in its file."""
    return host.bob.disk.stat().st_blocks // 8


@pytest.mark.parametrize("kind", list(CHECKS))
def test_file_systems(device: BlockHost, kind: str) -> None:
    """mkfs, mount, fio with verification, fsync after each write, fstrim, unmount, check, detach."""
    guest = device.guest
    guest.sh(f"{MAKE[kind]} {DEVICE} && mount -t {kind} {DEVICE} /mnt")
    guest.sh(
        fio("--name=mix", "--rw=randrw", "--bsrange=512-128k", "--bs_unaligned", "--size=24m", "--io_size=24m",
            "--ioengine=libaio", "--iodepth=16", "--verify=crc32c")
        + fio("--name=direct", "--rw=randwrite", "--bs=4k", "--size=24m", "--io_size=8m", "--direct=1",
              "--ioengine=libaio", "--iodepth=16", "--verify=crc32c")
        + fio("--name=sync", "--rw=randwrite", "--bs=4k", "--size=4m", "--io_size=2m", "--fsync=1", "--verify=crc32c")
    )  # fmt: skip
    device.pair.wait_in_sync()
    before = n_blocks_of_trims(device)
    trimmed = guest.sh("rm /mnt/fio; sync; fstrim -v /mnt")
    found = re.search(r"\((\d+) bytes\)", trimmed)
    assert found and int(found[1]) > 24 << 20, trimmed
    assert n_blocks_of_trims(device) < before - (20 << 20) // 4096, "the trim did not reach bob's disk"
    checked = guest.sh(f"umount /mnt && {CHECKS[kind]} {DEVICE} 2>&1")
    guest.sh(f"nbd-client -d {DEVICE}")
    assert not guest.sh("nbd-client -check /dev/nbd0", check=False).strip(), checked
    assert not device.errors()
    device.pair.wait_in_sync()
    size = usable_size(device.pair.status(device.alice))
    assert first_difference(device.alice.disk, device.bob.disk, size) is None
