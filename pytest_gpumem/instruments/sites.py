"""Tells from the Python stack which code requests memory.

A *site* groups the allocations of a program by the place that makes them. The *phase* is
what the program is doing: a load, a forward, …. A rule's ``site`` pattern is matched
against *names*. User code needs no change for this, and it also works in the worker
threads of a loader.

Nearly all facts about a request follow from the chain of code on the stack. A program
has few such chains, so each is examined once and its facts are kept.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.instruments.module_parts import modules_of
from pytest_gpumem.stacks import (
    calling_frame,
    frames_from,
    is_users_own,
    short_path,
    variables_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import CodeType, FrameType

    from pytest_gpumem.records.memory_figures import Kind

_OURS: Final = frozenset({"torch", "pytest_gpumem", "contextlib"})
_CALL: Final = torch.nn.Module._call_impl.__code__  # noqa: SLF001  # its frame has the module that is called
_APPLY: Final = torch.nn.Module._apply.__code__  # noqa: SLF001  # its frame has the module that is moved
_CALLS: Final = frozenset({"_call_impl", "_wrapped_call_impl"})
_MODULE_FILE: Final = "/torch/nn/modules/module.py"
#: Functions that load a model: the end of the file's path and the names of functions. An
#: empty set means every function of the file.
_LOADS: Final[tuple[tuple[str, frozenset[str]], ...]] = (
    ("/transformers/core_model_loading.py", frozenset()),
    ("/transformers/modeling_utils.py", frozenset({"from_pretrained"})),
    ("/accelerate/big_modeling.py", frozenset()),
    ("/accelerate/utils/modeling.py", frozenset()),
    ("/safetensors/torch.py", frozenset()),
    ("/torch/serialization.py", frozenset()),
    (
        _MODULE_FILE,
        frozenset({"to", "cuda", "_apply", "load_state_dict", "to_empty"}),
    ),
)
_BACKWARD: Final = ("/torch/autograd/__init__.py", "/torch/autograd/graph.py")
_OPTIMIZERS: Final = "/torch/optim/"
#: Local variables in which loaders keep the name of the parameter that they are loading.
#: Source: transformers 5 ``core_model_loading.py`` and ``modeling_utils.py``,
#: accelerate ``utils/modeling.py``, torch ``nn/modules/module.py``.
_NAME_VARIABLES: Final = (
    *("target_name", "param_name", "tensor_name", "full_name", "first_param_name"),
    *("layer_name", "name", "key"),
)
_PARAMETER: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
#: The function that puts a parameter on a card for accelerate.
#: Source: accelerate ``utils/modeling.py``.
_ACCELERATE: Final = ("/accelerate/utils/modeling.py", "set_module_tensor_to_device")
#: The function of the simulated card that allocates workspaces of libraries.
_WORKSPACE: Final = ("/simulated/memory.py", "hold_workspace")
#: The file of transformers' caches of keys and values.
_CACHES: Final = "/transformers/cache_utils.py"
#: The kind of the bytes that a phase allocates; see ``memory_figures.KINDS``.
_KIND_OF_PHASE: Final[dict[str, Kind]] = {
    "load": "weights",
    "forward": "activations",
    "backward": "gradients",
    "optimizer": "optimiser",
}
#: The function that calls pytest's hooks; frames above it do not belong to the test.
_PLUGGY: Final = ("/pluggy/_callers.py", "_multicall")
#: The most chains of code that are kept.
_MOST: Final = 10_000
_known: Final[dict[tuple[int, ...], Chain]] = {}
_ends: Final[set[int]] = set()


class Line(NamedTuple):
    """A line of code on a stack, now or at an earlier moment."""

    filename: str
    number: int
    function: str


class Chain(NamedTuple):
    """Facts about a request that follow from the chain of code on its stack.

    Attributes:
        site: The line, in words.
        kind: What the bytes are for.
        module: The depth of the frame that has the active module; None if there is none.
        variables: The names of that frame's variables for the module and for the parameter
            that is being moved; the second name may be empty.
        outer: The depth of the frame that has the outermost active module.
        optimizer: The depth of the frame that has the active optimiser.
        codes: The code objects; a reference to them keeps their ids from being used again.
    """

    site: str
    kind: Kind
    module: int | None
    variables: tuple[str, str]
    outer: int | None
    optimizer: int | None
    codes: tuple[CodeType, ...]

    def module_at(self, frame: FrameType) -> tuple[Any, str]:
        """Return the active module, and the name of its parameter that is being moved.

        Returns:
            None and an empty text if there is no active module.
        """
        if self.module is None:
            return None, ""
        names = tuple(filter(None, self.variables))
        found = variables_of(_outer(frame, self.module), *names)
        module, name = (found.get(each, "") for each in self.variables)
        return (
            module if issubclass(type(module), torch.nn.Module) else None,
            name if issubclass(type(name), str) else "",
        )

    def outermost_at(self, frame: FrameType) -> Any:
        """Return the outermost active module; None if there is none."""
        return _at(frame, self.outer, "self", torch.nn.Module)

    def optimizer_at(self, frame: FrameType) -> Any:
        """Return the active optimiser; None if there is none."""
        return _at(frame, self.optimizer, "self", torch.optim.Optimizer)


def chain_of(frame: FrameType) -> Chain:
    """Return the chain of code from an innermost frame outwards."""
    numbers: list[int] = []
    add, ends = numbers.append, _ends
    each: FrameType | None = frame
    while each is not None:  # a generator of the frames would take half as long again
        number = id(each.f_code)
        if number in ends:
            break
        add(number + each.f_lasti)  # two chains rarely have the same sum
        each = each.f_back
    key = tuple(numbers)
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST:
            _known.clear()
        found = _known[key] = _study(frame)
    return found


def _study(frame: FrameType) -> Chain:
    module = outer = optimizer = None
    variables = ("self", "")
    lines = []
    codes = []
    is_workspace = False
    for depth, each in enumerate(frames_from(frame)):
        code = each.f_code
        lines.append(Line(code.co_filename, each.f_lineno, code.co_name))
        is_workspace = is_workspace or _is(code, _WORKSPACE)
        if _is(code, _PLUGGY):
            _ends.add(id(code))
        codes.append(code)
        if code is _CALL or code is _APPLY:
            outer = depth
            if module is None:
                module = depth
                variables = ("self", "key" if code is _APPLY else "")
        elif module is None and _is(code, _ACCELERATE):
            module, variables = depth, ("module", "tensor_name")
        elif code.co_name == "step" and _OPTIMIZERS in code.co_filename:
            optimizer = depth
    kind = "workspaces" if is_workspace else kind_of(lines)
    return Chain(
        site_of(lines), kind, module, variables, outer, optimizer, tuple(codes)
    )


def _is(code: CodeType, wanted: tuple[str, str]) -> bool:
    return code.co_name == wanted[1] and code.co_filename.endswith(wanted[0])


def _at(frame: FrameType, depth: int | None, variable: str, base: type) -> Any:
    """Return a variable of the frame at a depth, if it is of a class; otherwise None."""
    if depth is None:
        return None
    found = variables_of(_outer(frame, depth), variable).get(variable)
    return found if issubclass(type(found), base) else None


def _outer(frame: FrameType, depth: int) -> FrameType:
    """Return the frame at a depth."""
    return next(islice(frames_from(frame), depth, None), frame)


# -- in words -----------------------------------------------------------------------------


def describe_site(frame: FrameType, *, exact: bool = False) -> str:
    """Return the site that requests memory, in words that are the same in each run.

    The words name the innermost line of the user's own code and the phase. If no user
    code is on the stack, as in a loader's own threads, they name the library's line. The
    innermost function of a library and the active module follow, without the numbers of
    layers, so that two layers of a kind are one site.
    """
    site = chain_of(frame).site
    module = (parameter_name(frame) if exact else "") or module_path(frame)
    if module and exact:
        return f"{site} for {module}"
    return f"{site} in {starred(module)}" if module else site


def starred(path: str) -> str:
    """Return a module's path with numbers left out: ``encoder.layer.*.attention``."""
    return re.sub(r"(?<![A-Za-z_])[0-9]+", "*", path)


def site_of(lines: Iterable[Line]) -> str:
    """Return the site of the lines of one stack, given from the inside out."""
    lines = list(lines)
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
    phase = _phase_at((each.filename, each.function) for each in lines)
    site = f"{user or line or 'unknown site'} ({phase})"
    return f"{site} via {library}" if user and library else site


def kind_of(lines: Iterable[Line]) -> Kind:
    """Return the kind of the bytes that a stack requests; lines from the inside out.

    The innermost phase determines the kind; without a phase the bytes are ``unnamed``.
    """
    for each in lines:
        if each.filename.endswith(_CACHES):
            return "cache"
        phase = _phase_of(each.filename, each.function)
        if phase is not None:
            return _KIND_OF_PHASE[phase]
    return "unnamed"


@functools.lru_cache(maxsize=1)
def _passed_over() -> tuple[str, ...]:
    """Return prefixes of paths of code that only forwards requests."""
    folders = (Path(torch.__file__).parent, Path(__file__).parents[1])
    files = (contextlib.__file__, threading.__file__)
    return (*(f"{folder}{os.sep}" for folder in folders), *files)


def current_phase(frame: FrameType | None = None) -> str:
    """Return the phase of the calling code: load, forward, backward, optimizer, other.

    Limits: a model built on a card inside its own ``forward`` counts as forward; a
    backward's gradient hooks count as backward.
    """
    return _phase_at(
        (each.f_code.co_filename, each.f_code.co_name)
        for each in frames_from(frame or calling_frame())
    )


def _phase_at(functions: Iterable[tuple[str, str]]) -> str:
    """Return the phase of functions, each a file and a name, from the inside out."""
    found = (_phase_of(filename, function) for filename, function in functions)
    return next((phase for phase in found if phase is not None), "other")


def _phase_of(filename: str, function: str) -> str | None:
    if function in _CALLS and filename.endswith(_MODULE_FILE):
        return "forward"
    for ending, functions in _LOADS:
        if filename.endswith(ending) and (not functions or function in functions):
            return "load"
    if filename.endswith(_BACKWARD):
        return "backward"
    return "optimizer" if _OPTIMIZERS in filename else None


# -- names --------------------------------------------------------------------------------


def caller_names() -> tuple[str, ...]:
    """Return the names that a rule's ``site`` pattern may match for the calling code.

    They are ``file.py:function`` of each frame outside torch and this plugin, the path of
    the active module, and the name of the parameter that is being loaded.
    """
    frame = calling_frame()
    names = []
    for each in frames_from(frame):
        package = each.f_globals.get("__name__")
        if type(package) is not str or package.partition(".")[0] not in _OURS:
            code = each.f_code
            names.append(f"{Path(code.co_filename).name}:{code.co_name}")
    return (*names, *filter(None, (module_path(frame), parameter_name(frame))))


def module_path(frame: FrameType) -> str:
    """Return the path, from the outermost module, of the module being called or moved.

    For example ``"bert.encoder.layer.3.attention"``; empty outside of modules. A
    module that is not a part of the outermost one is named by its class.
    """
    outer = chain_of(frame).outermost_at(frame)
    if outer is None:
        return ""
    inner = next(
        variables_of(each, "self").get("self")
        for each in frames_from(frame)
        if each.f_code is _CALL or each.f_code is _APPLY
    )
    names = (path for path, module in modules_of(outer) if module is inner)
    return next(names, "") or type(inner).__name__


def parameter_name(frame: FrameType) -> str:
    """Return the name of the parameter that a loader is loading; empty if none."""
    for each in frames_from(frame):
        if each.f_code is _APPLY:
            path, key = module_path(each), variables_of(each, "key").get("key")
            return f"{path}.{key}" if type(key) is str else path
        filename = each.f_code.co_filename
        if not any(part in filename for part in ("/transformers/", "/accelerate/")):
            continue
        variables = variables_of(each, *_NAME_VARIABLES)
        for variable in _NAME_VARIABLES:
            value = variables.get(variable)
            if type(value) is str and _PARAMETER.fullmatch(value):
                return value
    return ""
