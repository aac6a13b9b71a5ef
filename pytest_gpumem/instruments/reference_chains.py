"""Describes the chain of references from a tensor to its holder."""

from __future__ import annotations

import contextvars
import functools
import itertools
import logging
import sys
import threading
import weakref
from collections import deque
from pathlib import Path
from types import (
    AsyncGeneratorType,
    BuiltinFunctionType,
    CellType,
    CoroutineType,
    FrameType,
    FunctionType,
    GeneratorType,
    ModuleType,
    TracebackType,
)
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.instruments.module_parts import (
    attributes_of,
    dictionary_of,
    registry,
    shape_words,
)
from pytest_gpumem.stacks import variables_of

if TYPE_CHECKING:
    from collections.abc import Callable


class InterpreterHolder:
    """A holder that is not a Python object, but a place inside the interpreter."""

    def __init__(self, text: str) -> None:
        self.text: Final = text


def tensor_words(tensor: torch.Tensor) -> str:
    """Return a tensor's shape and type, and whether it has a graph."""
    kind = "gradient-tracked " if tensor.grad_fn is not None else ""
    return f"{kind}{shape_words(tensor)}"


def runs(frame: FrameType) -> bool:
    """Tell whether a thread is running a frame."""
    current: FrameType | None = None
    for running in sys._current_frames().values():  # noqa: SLF001  # the documented way to see other threads
        current = running
        while current is not None and current is not frame:
            current = current.f_back
        if current is frame:
            break
    # The last frame of the loop is this function's own. A reference to it would be a
    # reference cycle that holds the tensors.
    del running
    return current is frame


def path_in_words(chain: list[Any]) -> str:
    """Return the chain of references from a value to its holder, in words."""
    # The inner parts of a context's map would not help a reader.
    chain = [each for each in chain if not type(each).__name__.startswith("hamt")]
    steps = []
    names: list[str] = []
    attribute = None
    for index, (child, holder) in enumerate(itertools.pairwise(chain)):
        above = chain[index + 2] if index + 2 < len(chain) else None
        if isinstance(holder, dict) and _is_registry(holder, chain):
            names.insert(0, str(_key(holder, child)))
        elif isinstance(holder, torch.nn.Module) and names:
            if not _is_inside_another(holder, chain):
                steps.append(f"{'.'.join(names)!r} of {type(holder).__name__}")
                names = []
        elif isinstance(child, dict) and _is_registry(child, chain):
            continue
        elif isinstance(holder, dict) and _owns(above, holder):
            attribute = _key(holder, child)
        elif attribute is not None:
            is_record = isinstance(holder, logging.LogRecord)
            of = f"attribute {attribute!r} of {_noun(holder)}"
            steps.append(_step(holder, child) if is_record else of)
            attribute = None
        else:
            steps.append(_step(holder, child))
    return ", ".join(step for step in steps if step)


def _owns(owner: Any, mapping: dict[Any, Any]) -> bool:
    """Tell whether a dictionary holds the attributes of an object."""
    if isinstance(owner, type):
        return mapping.keys() == vars(owner).keys()
    return not isinstance(owner, ModuleType) and dictionary_of(owner) is mapping


def _noun(holder: Any) -> str:
    if isinstance(holder, type):
        return f"class {holder.__qualname__}"
    if isinstance(holder, FunctionType):
        return f"function {holder.__qualname__}"
    if isinstance(holder, torch.Tensor):
        return f"a {tensor_words(holder)}"
    if isinstance(holder, threading.Thread):
        return f"thread {holder.name!r}"
    return f"a {type(holder).__name__}"


def _is_registry(holder: dict[Any, Any], chain: list[Any]) -> bool:
    """Tell whether a dictionary is a registry of a module in the chain."""
    return any(
        holder is dictionary_of(each).get(kind)
        for each in chain
        if isinstance(each, torch.nn.Module)
        for kind in ("_parameters", "_buffers", "_modules")
    )


def _is_inside_another(module: torch.nn.Module, chain: list[Any]) -> bool:
    return any(
        part is module
        for each in chain
        if isinstance(each, torch.nn.Module)
        for _name, part in registry(each, "_modules")
    )


def _step(holder: Any, child: Any) -> str:
    """Return how one object holds another, in words; empty for plain containers."""
    for kinds, describe in _WORDS:
        if isinstance(holder, kinds):
            return describe(holder, child)
    kind = type(holder).__name__
    name = _key(attributes_of(holder), child)
    return f"attribute {name!r} of a {kind}" if name else f"a {kind}"


def _frame(holder: FrameType, child: Any) -> str:
    code = holder.f_code
    where = f"{code.co_name} ({Path(code.co_filename).name}:{holder.f_lineno})"
    name = _key(variables_of(holder), child)
    state = "running " if runs(holder) else ""
    return f"local {name!r} of {state}{where}" if name else f"{state}{where}"


def _record(holder: logging.LogRecord, _child: Any) -> str:
    return (
        f"a log record of logger {holder.name!r} ({holder.getMessage()[:60]!r}), kept "
        "by a handler (pytest's log capture keeps records until teardown)"
    )


def _mapping(holder: dict[Any, Any], child: Any) -> str:
    key = _key(holder, child)
    module = sys.modules.get(str(holder.get("__name__")))
    if module is not None and vars(module) is holder:
        return f"global {key!r} of {holder['__name__']}"
    return f"entry {key!r}" if key else ""


def _function(holder: FunctionType, child: Any) -> str:
    name = f"function {holder.__qualname__}"
    defaults = (holder.__defaults__, holder.__kwdefaults__)
    is_default = any(child is each for each in defaults if each is not None)
    return f"a default argument of {name}" if is_default else name


def _suspended(holder: Any, child: Any) -> str:
    names = ("gi_frame", "cr_frame", "ag_frame")
    frame = next(filter(None, (getattr(holder, name, None) for name in names)), None)
    name = None if frame is None else _key(variables_of(frame), child)
    what = f"suspended {holder.__qualname__}"
    return f"local {name!r} of {what}" if name else what


def _class(holder: type, child: Any) -> str:
    is_attributes = isinstance(child, dict) and child.keys() == vars(holder).keys()
    return f"class {holder.__qualname__}" if is_attributes else holder.__qualname__


def _tensor(holder: torch.Tensor, child: Any) -> str:
    words = tensor_words(holder)
    if isinstance(child, torch.Tensor):
        if holder.is_leaf and holder.grad is child:
            return f"gradient of a {words}"
        if base_of(holder) is child:
            return f"a view, {words}"
    name = _key(dictionary_of(holder), child)
    if name:
        return f"attribute {name!r} of a {words}"
    if holder.grad_fn is None:
        return f"a {words}"
    return f"saved for backward, graph of a {words}"


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return the base of a view, which the view keeps alive; None for other tensors."""
    try:
        return tensor._base  # noqa: SLF001  # documented by torch
    except Exception:  # noqa: BLE001  # a subclass may have no base
        return None


def _context(holder: contextvars.Context, child: Any) -> str:
    names = (f" {each.name!r}" for each, value in holder.items() if value is child)
    return f"context variable{next(names, '')}"


def _called(function: Any) -> str:
    return getattr(function, "__qualname__", "a function")


_LRU: Final = type(functools.lru_cache(tensor_words))
_INFO: Final = weakref.finalize._Info  # type: ignore[attr-defined]  # noqa: SLF001  # holds a finaliser's arguments
#: Describes how an object of each kind holds another; empty for links that need no words.
_WORDS: Final[tuple[tuple[Any, Callable[[Any, Any], str]], ...]] = (
    (FrameType, _frame),
    (
        TracebackType,
        lambda _it, child: "a traceback" if isinstance(child, FrameType) else "",
    ),
    (BaseException, lambda it, _child: f"{type(it).__name__}({str(it)[:60]!r})"),
    (logging.LogRecord, _record),
    (
        ModuleType,
        lambda it, child: "" if child is vars(it) else f"module {it.__name__}",
    ),
    (dict, _mapping),
    (BuiltinFunctionType, lambda it, _child: f"method {it.__name__!r}"),
    (CellType, lambda _it, _child: "a closure"),
    (FunctionType, _function),
    ((GeneratorType, CoroutineType, AsyncGeneratorType), _suspended),
    (threading.Thread, lambda it, _child: f"thread {it.name!r}"),
    (type, _class),
    (torch.Tensor, _tensor),
    (InterpreterHolder, lambda it, _child: it.text),
    (contextvars.Context, _context),
    (_LRU, lambda it, _child: f"the cache of function {it.__qualname__}"),
    (
        functools.partial,
        lambda it, _child: f"an argument of functools.partial({_called(it.func)})",
    ),
    (
        _INFO,
        lambda it, _child: f"an argument of weakref.finalize(…, {_called(it.func)})",
    ),
    (
        (list, tuple, set, frozenset, deque),
        lambda it, _child: f"a {type(it).__name__} of {len(it)}",
    ),
)


def _key(mapping: Any, child: Any) -> str | None:
    """Return the key of an object in a dictionary; None if it is not there."""
    items = dict.items(mapping) if isinstance(mapping, dict) else mapping.items()
    for key, item in list(items):
        if item is child:
            # The key's repr would run the program's code, so only some types are shown.
            return str(key) if type(key) in _PLAIN else f"<{type(key).__name__}>"
    return None


_PLAIN: Final = (str, int, float, bool, bytes)
