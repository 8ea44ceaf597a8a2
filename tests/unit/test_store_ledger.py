"""The ledger of the laboratory's clients finds what a service lost, mixed up, or never got."""

from __future__ import annotations

import hashlib

import pytest

from tests.lab.store_load import Broken, Ledger, content


def told(key: str, version: int) -> list[str]:
    """What the service tells about *key* when it holds this version."""
    data = content(key, version)
    return [data.partition(b"\n")[0].decode(), hashlib.sha256(data).hexdigest()]


@pytest.fixture
def ledger() -> Ledger:
    """Two files acknowledged, of the second one a third version under way."""
    ledger = Ledger()
    for key, n_writes in (("file/one", 1), ("file/two", 2)):
        for _ in range(n_writes):
            ledger.acknowledge(key, ledger.next_version(key))
    ledger.next_version("file/two")
    return ledger


@pytest.mark.parametrize("version", [2, 3])
def test_what_was_acknowledged_or_is_under_way(ledger: Ledger, version: int) -> None:
    ledger.compare(ledger.acknowledged, {"file/one": told("file/one", 1), "file/two": told("file/two", version)})


def test_a_write_that_was_never_acknowledged_may_be_there(ledger: Ledger) -> None:
    ledger.next_version("w0/5")
    found = {"file/one": told("file/one", 1), "file/two": told("file/two", 2), "w0/5": told("w0/5", 1)}
    ledger.compare(ledger.acknowledged, found)


@pytest.mark.parametrize(
    ("two", "sentence"),
    [
        (told("file/two", 1), "acknowledged was write 2"),
        (told("file/two", 4), "sent was 3"),
        (told("file/one", 1), "file/two holds 'file/one 1'"),
        ([told("file/two", 2)[0], told("file/two", 3)[1]], "has other bytes"),
        (["", hashlib.sha256(b"").hexdigest()], "file/two holds ''"),
    ],
)
def test_what_must_not_be_there(ledger: Ledger, two: list[str], sentence: str) -> None:
    with pytest.raises(Broken, match=sentence):
        ledger.compare(ledger.acknowledged, {"file/one": told("file/one", 1), "file/two": two})


def test_what_is_missing(ledger: Ledger) -> None:
    with pytest.raises(Broken, match="file/two: write 2 was acknowledged, and it is not there"):
        ledger.compare(ledger.acknowledged, {"file/one": told("file/one", 1)})


def test_the_longest_time_without_an_acknowledgement() -> None:
    ledger = Ledger()
    ledger.forget_longest()
    ledger.last -= 5.0
    ledger.acknowledge("file/one", 1)
    ledger.acknowledge("file/one", 2)
    assert 5.0 <= ledger.longest < 6.0
