"""A volume in memory and a server of it, for the tests of nbd/server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nbd_serving import SIZE, Serving
from tests.nbd_volume import RamVolume


@pytest.fixture
def volume() -> RamVolume:
    return RamVolume(SIZE)


@pytest.fixture
def serving(tmp_path: Path, volume: RamVolume) -> Iterator[Serving]:
    with Serving(tmp_path, volume) as running:
        yield running
