"""The documentation's pages that are made from the code are in step with it."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = runpy.run_path(str(DOCS / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_generated_page_is_in_step(name: str) -> None:
    """Otherwise: run python docs/generate.py."""
    assert (DOCS / name).read_text(encoding="utf-8") == PAGES[name]()
