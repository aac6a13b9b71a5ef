"""Signatures as a reader would write them."""

from __future__ import annotations

import inspect
import re
from typing import Any, Final

#: Characters that a line of code holds here.
WIDTH: Final = 80


def signature(name: str, thing: Any) -> str:
    """Return ``name(parameters) -> result``, on several lines where it is long."""
    words: list[str] = []
    has_star = False
    for each in inspect.signature(thing).parameters.values():
        if each.kind is each.KEYWORD_ONLY and not has_star:
            words.append("*")
        has_star = has_star or each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        words.append(_parameter(each))
    result = _result(thing)
    line = f"{name}({', '.join(words)}){result}"
    if len(line) <= WIDTH:
        return line
    inside = "".join(f"    {word},\n" for word in words)
    return f"{name}(\n{inside}){result}"


def _parameter(parameter: inspect.Parameter) -> str:
    is_plain = parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    text = parameter.name if is_plain else str(parameter).partition(":")[0]
    is_typed = parameter.annotation is not parameter.empty
    if is_typed:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        default = repr(parameter.default)
        default = "..." if default.startswith("<") else default
        text += f" = {default}" if is_typed else f"={default}"
    return text


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return str(inspect.formatannotation(annotation))


def _result(thing: Any) -> str:
    if inspect.isclass(thing):
        return ""
    annotation = inspect.signature(thing).return_annotation
    if annotation is inspect.Signature.empty:
        return ""
    text = _annotation(annotation)
    if hasattr(thing, "__wrapped__"):  # made by contextlib.contextmanager
        text = re.sub(r"^Iterator\[(.*)\]$", r"AbstractContextManager[\1]", text)
    return f" -> {text}"
