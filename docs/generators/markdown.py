"""Markdown from rows and from the docstrings' own markup."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

#: The content of an empty cell.
DASH: Final = "\N{EN DASH}"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table; bars in cells are escaped."""
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells) + "\n"


def page(parts: Iterable[str]) -> str:
    """Return parts joined by empty lines."""
    return "\n".join(part.strip("\n") + "\n" for part in parts if part.strip("\n"))


def block(code: str, language: str = "python") -> str:
    """Return a fenced block of code."""
    return f"```{language}\n{code.strip(chr(10))}\n```\n"


def prose(text: str) -> str:
    """Return a docstring's words on one line, its double backticks single."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split()))


def first_sentence(text: str) -> str:
    """Return a docstring's first sentence, for a table of contents."""
    found = re.match(r"(.+?[.:])(\s|$)", prose(text).strip())
    return (found.group(1) if found else prose(text)).rstrip(".:")
