"""The reference of markers."""

from __future__ import annotations

import ast
from typing import Final, NamedTuple

from generators.markdown import block, page, prose, table
from generators.marker_notes import NOTES, Note
from pytest_gpumem.plugin.marks import DESCRIPTIONS

_NOTHING: Final = Note({}, "")


class Marker(NamedTuple):
    """A marker as its description has it.

    Attributes:
        name: After ``pytest.mark``.
        signature: With its arguments.
        meaning: What it does.
        arguments: Each one's name and default, as text; an empty one is required.
        is_open: Whether it takes what another marker takes besides.
    """

    name: str
    signature: str
    meaning: str
    arguments: tuple[tuple[str, str], ...]
    is_open: bool


def markers() -> str:
    """Return the page."""
    found = [_read(each) for each in DESCRIPTIONS]
    parts = [
        "# Markers",
        "Markers go on a test, a class or a module. If a marker is on several of them, the "
        "nearest one counts. Arguments that make no sense end the run with exit code 4, "
        "before any test. Each example is a test file that runs unchanged, without a GPU, "
        "if the ini file has `gpu_backend = auto`. In a run that asks for no device, a "
        "marker ends the run with an error that says so.",
        table(
            ("marker", "meaning"),
            ((f"[`{each.name}`](#{each.name})", each.meaning) for each in found),
        ),
    ]
    for each in found:
        note = NOTES.get(each.name, _NOTHING)
        parts += [
            f"## {each.name}",
            block(f"@pytest.mark.{each.signature}"),
            f"{each.meaning[0].upper()}{each.meaning[1:]}.",
        ]
        if each.arguments:
            parts.append(_arguments(each, note))
        if note.example:
            parts.append(block(note.example))
    return page(parts)


def _arguments(marker: Marker, note: Note) -> str:
    rows = [
        (f"`{name}`", f"`{default}`" if default else "required", _said(note, name))
        for name, default in marker.arguments
    ]
    if marker.is_open:
        known = {name for name, _default in marker.arguments}
        rows += [
            (f"`{name}`", "see above", _said(note, name))
            for name in note.arguments
            if name not in known | {"only", "shard"}
        ]
    return table(("argument", "default", "meaning"), rows)


def _said(note: Note, argument: str) -> str:
    return prose(note.arguments.get(argument, ""))


def _read(description: str) -> Marker:
    signature, _colon, meaning = description.partition(": ")
    name, _bracket, inside = signature.partition("(")
    is_open = inside.endswith("...)")
    if not inside:
        return Marker(name, signature, meaning, (), is_open=False)
    plain = (
        f"def {name}({inside.removesuffix(')').removesuffix('...').rstrip(', ')}): 0"
    )
    (function,) = ast.parse(plain).body
    if not isinstance(function, ast.FunctionDef):
        raise TypeError(description)
    given = function.args
    required = len(given.args) - len(given.defaults)
    names = [*given.args, *given.kwonlyargs]
    defaults = [*[None] * required, *given.defaults, *given.kw_defaults]
    arguments = tuple(
        (each.arg, "" if default is None else ast.unparse(default))
        for each, default in zip(names, defaults, strict=True)
    )
    return Marker(name, signature, meaning, arguments, is_open=is_open)
