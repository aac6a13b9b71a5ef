"""A patch that adds markers to test files, and touches nothing else."""

from __future__ import annotations

import ast
import difflib
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_FUNCTIONS: Final = (ast.FunctionDef, ast.AsyncFunctionDef)
_NO_NEWLINE: Final = "\\ No newline at end of file\n"


class Patch(NamedTuple):
    """What can be added.

    Attributes:
        text: A unified diff, to be applied in the root folder; empty if there is none.
        left: Tests that it leaves to a person, with the reason.
    """

    text: str
    left: dict[str, str]


def make_patch(root: Path, markers: Mapping[str, str], unchanged_since: float) -> Patch:
    """Return the patch that adds a marker to each of some tests.

    Args:
        root: The folder that the tests' ids start at.
        markers: By a test's id without parameters, ``max_vram("2MiB")``.
        unchanged_since: A file that was written after this time is left alone: what
            was measured may be no longer what it says.
    """
    by_file: dict[str, dict[str, str]] = {}
    for test, marker in markers.items():
        by_file.setdefault(test.partition("::")[0], {})[test] = marker
    texts: list[str] = []
    left: dict[str, str] = {}
    for name, wanted in sorted(by_file.items()):
        try:
            lines = _read(root / name, unchanged_since)
            tree = ast.parse("".join(lines))
        except (ValueError, OSError, SyntaxError) as error:
            left.update(dict.fromkeys(wanted, str(error)))
            continue
        added = _add(tree, lines, wanted, left)
        texts += _diff(name, lines, added)
    return Patch("".join(texts), left)


def _read(path: Path, unchanged_since: float) -> list[str]:
    """Return a file's lines with their ends.

    Raises:
        ValueError: It is no Python file in UTF-8, or it changed.
    """
    if path.suffix != ".py":
        raise ValueError("it is in no Python file")
    if path.stat().st_mtime > unchanged_since:
        raise ValueError("its file changed during the run")
    return path.read_bytes().decode("utf-8").splitlines(keepends=True)


def _add(
    tree: ast.Module, lines: list[str], wanted: Mapping[str, str], left: dict[str, str]
) -> list[str]:
    """Return the lines with markers; note in ``left`` what cannot be found."""
    end = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    name = _name_of_pytest(tree)
    before: dict[int, str] = {}
    for test, marker in wanted.items():
        function = _find(tree, test.split("::")[1:])
        if function is None:
            left[test] = "its function was not found in the file, or more than one"
            continue
        nodes = [function, *function.decorator_list]
        line = min(node.lineno for node in nodes) - 1
        indent = lines[function.lineno - 1][: function.col_offset]
        before[line] = f"{indent}@{name or 'pytest'}.mark.{marker}{end}"
    if before and name is None:
        line = _import_line(tree)
        before[line] = f"import pytest{end}" + before.get(line, "")
    added = []
    for number, line_text in enumerate(lines):
        if number in before:
            added += before[number].splitlines(keepends=True)
        added.append(line_text)
    return added


def _find(
    tree: ast.Module, path: list[str]
) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    """Return the one function of that path through classes; None if not one."""
    places: list[ast.Module | ast.ClassDef] = [tree]
    for name in path[:-1]:
        places = [
            node
            for place in places
            for node in place.body
            if isinstance(node, ast.ClassDef) and node.name == name
        ]
    found = [
        node
        for place in places
        for node in place.body
        if isinstance(node, _FUNCTIONS) and path and node.name == path[-1]
    ]
    return found[0] if len(found) == 1 else None


def _name_of_pytest(tree: ast.Module) -> str | None:
    """Return what the module calls pytest; None if it does not import it."""
    for node in tree.body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "pytest":
                    return alias.asname or alias.name
    return None


def _import_line(tree: ast.Module) -> int:
    """Return before which line an import may stand: after docstring and future."""
    line = 0
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
        if not (is_text or is_future):
            decorators: list[ast.expr] = getattr(node, "decorator_list", [])
            return min([node.lineno, *(each.lineno for each in decorators)]) - 1
        line = node.end_lineno or line
    return line


def _diff(name: str, before: list[str], after: list[str]) -> list[str]:
    found = difflib.unified_diff(before, after, f"a/{name}", f"b/{name}")
    return [line if line.endswith("\n") else f"{line}\n{_NO_NEWLINE}" for line in found]
