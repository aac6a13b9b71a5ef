"""Who asks for memory, read off the stack again and again at little cost.

Which code is on the stack decides nearly all that is to be said of a request, and there
are few such chains: each is studied once.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.instruments.sites import describe_place
from pytest_gpumem.stacks import frames_from, variables_of

if TYPE_CHECKING:
    from types import CodeType, FrameType

_CALL: Final = torch.nn.Module._call_impl.__code__  # noqa: SLF001  # the frame that knows the module at work
_APPLY: Final = torch.nn.Module._apply.__code__  # noqa: SLF001  # likewise, in a move
#: The function that puts a parameter on a card for accelerate, with its variables.
#: Source: accelerate ``utils/modeling.py``.
_ACCELERATE: Final = ("/accelerate/utils/modeling.py", "set_module_tensor_to_device")
#: Chains that are remembered.
MOST: Final = 10_000
#: Where the simulated card takes what a library keeps for itself.
_WORKSPACE: Final = ("/simulated/memory.py", "hold_workspace")
#: Where pytest calls a hook: what is above it is not the test's.
_PLUGGY: Final = ("/pluggy/_callers.py", "_multicall")


class Chain(NamedTuple):
    """What a chain of code says of the request at its inner end.

    Attributes:
        place: The line, in words.
        module: The depth of the frame that knows the module at work; None without.
        variables: That frame's variables for the module and for the name of its
            parameter that is being moved; the latter may be empty.
        outer: The depth of the frame that knows the outermost module at work.
        optimizer: The depth of the frame that knows the optimiser at work.
        codes: The code itself, kept so that no other gets its number.
    """

    place: str
    module: int | None
    variables: tuple[str, str]
    outer: int | None
    optimizer: int | None
    codes: tuple[CodeType, ...]


class Chains:
    """Chains of code that were met, to be shared by all who ask in a process."""

    def __init__(self) -> None:
        self._known: Final[dict[tuple[int, ...], Chain]] = {}
        self._ends: Final[set[int]] = set()

    def read(self, frame: FrameType) -> Chain:
        """Return the chain above a frame.

        Args:
            frame: The innermost frame.
        """
        numbers: list[int] = []
        add, ends = numbers.append, self._ends
        for each in frames_from(frame):
            number = id(each.f_code)
            if number in ends:
                break
            add(number + each.f_lasti)  # what two codes share only by rare chance
        key = tuple(numbers)
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST:
                self._known.clear()
            found = self._known[key] = self._study(frame)
        return found

    def _study(self, frame: FrameType) -> Chain:
        module = outer = optimizer = None
        variables = ("self", "")
        codes = []
        place = describe_place(frame)
        is_workspace = False
        for depth, each in enumerate(frames_from(frame)):
            code = each.f_code
            is_workspace = is_workspace or _is(code, _WORKSPACE)
            if _is(code, _PLUGGY):
                self._ends.add(id(code))
            codes.append(code)
            if code is _CALL or code is _APPLY:
                outer = depth
                if module is None:
                    module = depth
                    variables = ("self", "key" if code is _APPLY else "")
            elif module is None and _is(code, _ACCELERATE):
                module, variables = depth, ("module", "tensor_name")
            elif code.co_name == "step" and "/torch/optim/" in code.co_filename:
                optimizer = depth
        if is_workspace:
            place, module = f"cuBLAS workspace, first needed at {place}", None
        return Chain(place, module, variables, outer, optimizer, tuple(codes))


def module_at(frame: FrameType, chain: Chain) -> tuple[Any, str]:
    """Return the module at work and its parameter that is being moved.

    Returns:
        None and nothing, where there is none.
    """
    if chain.module is None:
        return None, ""
    variables = variables_of(_at(frame, chain.module), *chain.variables)
    module, name = (variables.get(each) for each in chain.variables)
    is_module = issubclass(type(module), torch.nn.Module)
    return module if is_module else None, name if isinstance(name, str) else ""


def outermost_at(frame: FrameType, chain: Chain) -> Any:
    """Return the outermost module at work; None without."""
    return _self_at(frame, chain.outer, torch.nn.Module)


def optimizer_at(frame: FrameType, chain: Chain) -> Any:
    """Return the optimiser at work; None without."""
    return _self_at(frame, chain.optimizer, torch.optim.Optimizer)


def _self_at(frame: FrameType, depth: int | None, base: type) -> Any:
    if depth is None:
        return None
    found = variables_of(_at(frame, depth), "self").get("self")
    return found if issubclass(type(found), base) else None


def _at(frame: FrameType, depth: int) -> FrameType:
    return next(islice(frames_from(frame), depth, None), frame)


def _is(code: CodeType, wanted: tuple[str, str]) -> bool:
    return code.co_name == wanted[1] and code.co_filename.endswith(wanted[0])
