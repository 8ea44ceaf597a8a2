"""The generated pages of docs/ are those of the present code."""

from __future__ import annotations

import pytest

from tests.doc_tables import DOCS, pages


@pytest.mark.parametrize("name", sorted(pages()))
def test_a_generated_page_is_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == pages()[name], "run: make docs"


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    names = {path.name for path in DOCS.glob("*.md")} - {"README.md"}
    assert {name for name in names if f"({name})" not in index} == set()
