"""Where a request for memory comes from, read off the Python stack.

Two uses: a *site* groups the allocations of a program by the place that makes them, and
*names* are what an injection rule's ``site`` pattern is matched against. Both cost a
walk up the stack, so only armed rules and counting sweeps ask.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.instruments.parts import modules_of
from pytest_gpumem.instruments.phases import phase_at
from pytest_gpumem.stacks import (
    calling_frame,
    frames_from,
    is_users_own,
    short_path,
    variables_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import FrameType

_OURS: Final = frozenset({"torch", "pytest_gpumem", "contextlib"})
_CALLS: Final = frozenset({"_call_impl", "_wrapped_call_impl"})
_MODULE_FILE: Final = "/torch/nn/modules/module.py"
#: Local variables in which loaders keep the name of the parameter at hand.
#: Source: transformers 5 ``core_model_loading.py`` and ``modeling_utils.py``,
#: accelerate ``utils/modeling.py``, torch ``nn/modules/module.py``.
_NAME_VARIABLES: Final = (
    "target_name",
    "param_name",
    "tensor_name",
    "full_name",
    "first_param_name",
    "layer_name",
    "name",
    "key",
)
_PARAMETER: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


def describe_site(frame: FrameType | None, *, exact: bool = False) -> str:
    """Return the place that asked for memory, in words that are the same each time.

    The innermost line of the user's own code where there is one on the stack (in a
    loader's own threads there is none: then the library's line), the phase, and below
    it the innermost function of a library and the module at work, with numbers of
    layers left out: two layers of a kind are one site.
    """
    place = describe_place(frame)
    module = (parameter_name(frame) if exact else "") or module_path(frame)
    if module and exact:
        return f"{place} for {module}"
    return f"{place} in {starred(module)}" if module else place


def starred(path: str) -> str:
    """Return a module's path with numbers left out: ``encoder.layer.*.attention``."""
    return re.sub(r"(?<![A-Za-z_])[0-9]+", "*", path)


class Line(NamedTuple):
    """A line of code that runs, or ran."""

    filename: str
    number: int
    function: str


def describe_place(frame: FrameType | None) -> str:
    """Return what ``describe_site`` says, but for the module at work.

    It depends on nothing but the frames' code and lines.
    """
    return place_of(
        [
            Line(each.f_code.co_filename, each.f_lineno, each.f_code.co_name)
            for each in frames_from(frame)
        ]
    )


def place_of(lines: Iterable[Line]) -> str:
    """Return the place of lines that called each other, from the inside out."""
    lines = list(lines)
    phase = phase_at((each.filename, each.function) for each in lines)
    user = library = line = None
    for each in lines:
        if each.filename.startswith(_passed_over()):
            continue
        file = short_path(each.filename)
        if is_users_own(each.filename):
            user = f"{file}:{each.number} in {each.function}"
            break
        if library is None:
            library = f"{file} {each.function}"
            line = f"{file}:{each.number} in {each.function}"
    parts = [f"{user or line or 'unknown site'} ({phase})"]
    if user and library:
        parts.append(f"via {library}")
    return " ".join(parts)


def names_of(frame: FrameType | None) -> tuple[str, ...]:
    """Return what a rule's ``site`` pattern may match for the code above a frame.

    ``file.py:function`` of each frame outside torch and this plugin, the path of the
    module at work, the name of the parameter being loaded.
    """
    names = []
    for each in frames_from(frame):
        if _package(each) not in _OURS:
            code = each.f_code
            names.append(f"{Path(code.co_filename).name}:{code.co_name}")
    module = module_path(frame)
    if module:
        names.append(module)
    parameter = parameter_name(frame)
    if parameter:
        names.append(parameter)
    return tuple(names)


def module_path(frame: FrameType | None) -> str:
    """Return the path of the module that is being called or moved, from the outermost.

    For example ``"bert.encoder.layer.3.attention"``; empty outside of modules. A
    module that the outermost one does not have is named by its class.
    """
    modules: list[Any] = []
    for each in frames_from(frame):
        code = each.f_code
        calls = code.co_name in _CALLS or code.co_name == "_apply"
        if calls and code.co_filename.endswith(_MODULE_FILE):
            module = variables_of(each, "self").get("self")
            if not modules or modules[-1] is not module:
                modules.append(module)
    if not modules:
        return ""
    outer, inner = modules[-1], modules[0]
    names = (path for path, module in modules_of(outer) if module is inner)
    return next(names, "") or type(inner).__name__


def parameter_name(frame: FrameType | None) -> str:
    """Return the name of the parameter that a loader has at hand; empty if none."""
    for each in frames_from(frame):
        filename = each.f_code.co_filename
        is_move = each.f_code.co_name == "_apply" and filename.endswith(_MODULE_FILE)
        if is_move:
            path, key = module_path(each), variables_of(each, "key").get("key")
            return f"{path}.{key}" if type(key) is str else path
        if not any(part in filename for part in ("/transformers/", "/accelerate/")):
            continue
        variables = variables_of(each, *_NAME_VARIABLES)
        for variable in _NAME_VARIABLES:
            value = variables.get(variable)
            if type(value) is str and _PARAMETER.fullmatch(value):
                return value
    return ""


@functools.lru_cache(maxsize=1)
def _passed_over() -> tuple[str, ...]:
    """Return where the code is that only hands a request on, as beginnings of paths."""
    folders = (Path(torch.__file__).parent, Path(__file__).parents[1])
    files = (contextlib.__file__, threading.__file__)
    return (*(f"{folder}{os.sep}" for folder in folders), *files)


def _package(frame: FrameType) -> str:
    """Return the package that a frame's code belongs to."""
    name = frame.f_globals.get("__name__")
    return name.partition(".")[0] if type(name) is str else ""


def caller_names() -> tuple[str, ...]:
    """Return ``names_of`` the calling code."""
    return names_of(calling_frame())
