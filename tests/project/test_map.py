"""CONTRIBUTING's map names every room, and what its ways through the code pass is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "pytest_gpumem"
TEXT: Final = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
#: ``file.py: name`` or ``file.py: Class.name``.
PLACES: Final = sorted(set(re.findall(r"`([\w/]+\.py): ([\w.]+)`", TEXT)))


def test_every_room_is_on_the_map() -> None:
    """Folders and modules of the package's top, no more and no fewer."""
    table = TEXT.partition("## The map of rooms")[2].partition("\n\n`tests/")[0]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = {
        name.rstrip("/")
        for row in rows
        for name in re.findall("`([^`]+)`", row.split("|")[1])
    }
    there = {
        each.stem
        for each in PACKAGE.iterdir()
        if each.name not in ("__init__.py", "__pycache__", "py.typed")
    }

    assert there == named


@pytest.mark.parametrize(("file", "name"), PLACES, ids=lambda each: each)
def test_a_place_on_a_way_is_there(file: str, name: str) -> None:
    """A file of the package that defines that class, function or method."""
    body: list[ast.stmt] = ast.parse((PACKAGE / file).read_text("utf-8")).body
    for part in name.split("."):
        (found,) = (
            each
            for each in body
            if isinstance(each, (ast.ClassDef, ast.FunctionDef)) and each.name == part
        )
        body = found.body


def test_the_ways_pass_many_places() -> None:
    """The text is read as it is meant to be."""
    assert len(PLACES) > 20


def test_files_that_are_named_alone_are_there() -> None:
    """In code spelling, below the package or the project."""
    for name in re.findall(r"`([\w./]+(?:\.py|\.md|\.js|\.yml))`", TEXT):
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name
