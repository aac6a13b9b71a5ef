"""TorchScript beside simulated cards: what libraries script as they are imported.

Its compiler and its interpreter are C++. The compiler knows what is built in by the
function's identity. The interpreter asks the tensor itself for its device, which for a
simulated card's is that of its values: scripted functions are run as Python instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.jit import _builtins

from pytest_gpumem.devices.simulated.constructors import CONSTRUCTORS
from pytest_gpumem.devices.simulated.operators.drawing import DROPOUTS
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet

_call: Final[Any] = torch.jit.ScriptFunction.__call__
_Scripted: Final[Any] = torch.jit._script.RecursiveScriptModule
_apply_to_module: Final[Any] = torch.nn.Module._apply


def patch_scripting(patches: PatchSet) -> None:
    """Replace what is needed; to be called before the constructors are.

    Limits: a scripted module still goes to the interpreter; so does a function that is
    given nothing of a card and makes it by itself.
    """
    patches.set(_Scripted, "_apply", _apply)
    # The table is made on first use and must hold the originals too.
    table = _builtins._get_builtin_table()
    for name, value in (CONSTRUCTORS | DROPOUTS).items():
        patches.put(table, id(value), f"aten::{name}")
    patches.set(torch.jit.ScriptFunction, "__call__", _run)


def _run(function: Any, *args: Any, **options: Any) -> Any:
    """Call a scripted function, on a card the Python one that it was made from."""
    __tracebackhide__ = True
    original = getattr(function, "_torchdynamo_inline", None)
    if original is not None and any(map(_is_on_card, (*args, *options.values()))):
        return original(*args, **options)
    return _call(function, *args, **options)


def _apply(module: Any, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    """Move or cast a scripted module: C++ holds its parameters, and gets them again."""
    __tracebackhide__ = True
    kept = dict(module._parameters.items())
    _apply_to_module(module, fn, recurse)
    for name, parameter in kept.items():
        if module._parameters[name] is not parameter:
            module._parameters[name] = parameter
    return module


def _is_on_card(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_on_card, value))
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, SimulatedTensor)
