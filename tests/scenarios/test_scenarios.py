"""Every transcript happens again, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scenarios.driver import perform, transcripts


@pytest.mark.parametrize("path", transcripts(), ids=lambda p: p.stem)
def test_transcript(path: Path, rewrite: bool) -> None:
    written = path.read_text()
    now = perform(written)
    if rewrite and now != written:
        path.write_text(now)
    elif now != written:
        advice = f"{path.name}: run with --rewrite and review the diff"
        assert now.splitlines() == written.splitlines(), advice


def test_there_are_transcripts() -> None:
    assert len(transcripts()) >= 20
