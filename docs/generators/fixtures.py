"""The reference of fixtures, from the source of those that the plugin has."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest_gpumem
from generators.docstrings import parse
from generators.markdown import block, first_sentence, page, prose, table
from generators.signatures import signature
from pytest_gpumem import plugin

if TYPE_CHECKING:
    from collections.abc import Iterator


class Fixture(NamedTuple):
    """A fixture, read from its source.

    Attributes:
        name: What tests ask for.
        scope: ``"function"`` unless it names another one.
        gives: The annotation of its value.
        docstring: Cleaned.
        same: Names of ``pytest_gpumem`` that do the same without pytest.
    """

    name: str
    scope: str
    gives: str
    docstring: str
    same: tuple[str, ...]


def fixtures() -> str:
    """Return the page."""
    found = sorted(find_fixtures())
    parts = [
        "# Fixtures",
        "Each fixture is a thin wrapper over a part of the [API](api.md), which also works "
        "without pytest, in a script or under `@given`.",
        table(
            ("fixture", "gives"),
            (
                (f"[`{each.name}`](#{each.name})", first_sentence(each.docstring))
                for each in found
            ),
        ),
    ]
    for each in found:
        parts.append(f"## {each.name}")
        parts += [prose(each_one) for each_one in parse(each.docstring).paragraphs]
        facts = [f"Gives `{each.gives}`", f"scope `{each.scope}`"]
        parts.append("; ".join(facts) + ".")
        for name in each.same:
            parts.append(
                f"Without pytest: [`pytest_gpumem.{name}`](api.md#{_slug(name)})."
            )
            parts.append(block(signature(name, getattr(pytest_gpumem, name))))
    return page(parts)


def _slug(name: str) -> str:
    return name.lower()


def find_fixtures() -> Iterator[Fixture]:
    """Yield every fixture of the plugin."""
    for path in sorted(Path(plugin.__path__[0]).glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                for decorator in node.decorator_list:
                    if ast.unparse(decorator).startswith("pytest.fixture"):
                        yield _read(node, decorator)


def _read(node: ast.FunctionDef, decorator: ast.expr) -> Fixture:
    given = {
        word.arg: ast.literal_eval(word.value)
        for word in getattr(decorator, "keywords", [])
        if isinstance(word.value, ast.Constant)
    }
    gives = re.sub(r"^Iterator\[(.*)\]$", r"\1", ast.unparse(node.returns or node.args))
    docstring = ast.get_docstring(node) or ""
    return Fixture(
        given.get("name", node.name),
        given.get("scope", "function"),
        gives,
        docstring,
        tuple(sorted(_public(node) | _named(docstring))),
    )


def _public(node: ast.FunctionDef) -> set[str]:
    """Return the public names that a fixture's body imports."""
    return {
        alias.name
        for each in ast.walk(node)
        if isinstance(each, ast.ImportFrom)
        for alias in each.names
        if alias.name in pytest_gpumem.__all__
    }


def _named(docstring: str) -> set[str]:
    return set(re.findall(r"`pytest_gpumem\.(\w+)`", docstring))
