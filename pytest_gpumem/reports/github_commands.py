"""GitHub's annotations: commands on standard output that mark a line of a file.

Source: "Workflow commands for GitHub Actions" in GitHub's documentation. The same
characters are escaped as by ``escapeData`` and ``escapeProperty`` of ``actions/toolkit``
(``packages/core/src/command.ts``).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

_DATA: Final = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_PROPERTY: Final = {**_DATA, ":": "%3A", ",": "%2C"}
#: The beginning of a site's description, as ``instruments.sites`` writes it.
_SITE: Final = re.compile(r"(?P<file>.+?):(?P<line>[1-9][0-9]*) in ")


class SourceLine(NamedTuple):
    """A line of a file; lines count from 1."""

    file: Path
    line: int


def error_command(
    message: str,
    *,
    title: str,
    source_line: SourceLine | None = None,
    root: Path | None = None,
) -> str:
    """Return the command that shows an error, on one line.

    Args:
        message: The text; it may have several lines.
        title: The title above it.
        source_line: The line of code to mark; None shows the error on the run's page only.
        root: The checkout, to which GitHub's paths are relative.
    """
    properties = {}
    if source_line is not None:
        properties = {
            "file": _from(root, source_line.file),
            "line": str(source_line.line),
        }
    properties["title"] = title
    text = ",".join(
        f"{name}={_escape(_PROPERTY, each)}" for name, each in properties.items()
    )
    return f"::error {text}::{_escape(_DATA, message)}"


def source_line_of(site: str, folders: Iterable[Path]) -> SourceLine | None:
    """Return the line that a site's description names; None if there is no such file.

    Args:
        site: ``"file.py:42 in function (phase)"``; a relative path.
        folders: The folders from which the path may start, in the order of trial.
    """
    found = _SITE.match(site)
    if found is None:
        return None
    for folder in folders:
        file = folder / found["file"]
        if file.is_file():
            return SourceLine(file, int(found["line"]))
    return None


def _from(root: Path | None, file: Path) -> str:
    if root is not None and file.is_relative_to(root):
        file = file.relative_to(root)
    return file.as_posix()


def _escape(table: dict[str, str], text: str) -> str:
    return "".join(table.get(each, each) for each in text)
