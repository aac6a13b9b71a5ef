"""The reference of what ``pytest_gpumem`` exports."""

from __future__ import annotations

import enum
import inspect
from typing import Any

import pytest_gpumem
from generators.docstrings import Docstring, read
from generators.markdown import block, first_sentence, page, prose, table
from generators.signatures import signature
from pytest_gpumem import errors, strategies


def api() -> str:
    """Return the page."""
    names = [name for name in pytest_gpumem.__all__ if not name.startswith("__")]
    things = {name: getattr(pytest_gpumem, name) for name in names}
    functions = {n: t for n, t in things.items() if not inspect.isclass(t)}
    classes = {n: t for n, t in things.items() if inspect.isclass(t)}
    parts = [
        "# API",
        "All of it works without pytest. `import pytest_gpumem` imports neither torch "
        "nor pytest; each name is imported on first use. Bytes are `int`.",
    ]
    for heading, group in (("Functions", functions), ("Classes", classes)):
        parts.append(f"## {heading}")
        parts.append(_contents(group))
        for name, thing in group.items():
            parts += _entry(name, thing)
    parts += [
        "## Errors",
        "In `pytest_gpumem.errors`. Out-of-memory errors are torch's own, and none of "
        "these.",
        table(("error", "is a", "raised when"), _errors()),
        "## Strategies for Hypothesis",
        "In `pytest_gpumem.strategies`; they need `hypothesis`.",
    ]
    for name, thing in sorted(vars(strategies).items()):
        if inspect.isfunction(thing) and thing.__module__ == strategies.__name__:
            parts += [] if name.startswith("_") else _entry(name, thing)
    return page(parts)


def _contents(group: dict[str, Any]) -> str:
    rows = (
        (f"[`{name}`](#{name.lower()})", first_sentence(inspect.getdoc(thing) or ""))
        for name, thing in group.items()
    )
    return table(("name", "what it does"), rows)


def _entry(name: str, thing: Any) -> list[str]:
    doc = read(thing)
    parts = [f"### {name}"]
    if _is_called(thing):
        parts.append(block(signature(name, thing)))
    parts += [prose(each) for each in doc.paragraphs]
    parts += _sections(doc)
    if inspect.isclass(thing):
        parts.append(_members(thing))
    return parts


def _is_called(thing: Any) -> bool:
    """Tell whether users call this object or create it themselves."""
    if not inspect.isclass(thing):
        return True
    is_protocol = getattr(thing, "_is_protocol", False)
    return not (is_protocol or issubclass(thing, (enum.Enum, Exception)))


def _sections(doc: Docstring) -> list[str]:
    parts = []
    for section, column in (
        ("Args", "argument"),
        ("Attributes", "attribute"),
        ("Raises", "raises"),
    ):
        rows = [(f"`{key}`", prose(text)) for key, text in doc.entries(section)]
        if rows:
            parts.append(
                table((column, "when" if section == "Raises" else "meaning"), rows)
            )
    parts += [
        f"**{section}** {prose(doc.sections[section])}"
        for section in ("Returns", "Yields")
        if section in doc.sections
    ]
    if "Example" in doc.sections:
        parts.append(block(doc.sections["Example"]))
    return parts


def _members(thing: type) -> str:
    rows = []
    if issubclass(thing, enum.Enum):
        return table(
            ("member", "value"), ((f"`{e.name}`", f"`{e.value}`") for e in thing)
        )
    for name, member in vars(thing).items():
        function = getattr(member, "__func__", member)
        if name.startswith("_"):
            continue
        if isinstance(member, property):
            rows.append((f"`{name}`", first_sentence(inspect.getdoc(member) or "")))
        elif inspect.isfunction(function):
            text = _method(name, function)
            rows.append((f"`{text}`", first_sentence(inspect.getdoc(function) or "")))
    return table(("member", "what it does"), rows) if rows else ""


def _method(name: str, function: Any) -> str:
    words = list(inspect.signature(function).parameters.values())[1:]
    return f"{name}({', '.join(str(each.replace(annotation=each.empty)) for each in words)})"


def _errors() -> list[tuple[str, str, str]]:
    found = [
        thing
        for thing in vars(errors).values()
        if inspect.isclass(thing) and thing.__module__ == errors.__name__
    ]
    return [
        (
            f"`{each.__name__}`",
            ", ".join(f"`{base.__name__}`" for base in each.__bases__),
            first_sentence(inspect.getdoc(each) or ""),
        )
        for each in found
    ]
