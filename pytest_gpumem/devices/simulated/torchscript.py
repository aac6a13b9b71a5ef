"""TorchScript with simulated cards: functions that libraries script at import.

TorchScript's compiler and interpreter are C++ code. The compiler recognises built-in
functions by their identity. The interpreter reads the C++ tensor's device, which for a
simulated tensor is the device of its values. Scripted functions are therefore run as
Python functions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.jit import _builtins

from pytest_gpumem.devices.simulated.constructors import CONSTRUCTORS
from pytest_gpumem.devices.simulated.operators.drawing import DROPOUTS
from pytest_gpumem.devices.simulated.script_archives import patch_archives
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet

_call: Final[Any] = torch.jit.ScriptFunction.__call__
_Scripted: Final[Any] = torch.jit.ScriptModule
_apply_to_module: Final[Any] = torch.nn.Module._apply


def patch_scripting(patches: PatchSet) -> None:
    """Patch TorchScript; must be called before the constructors are replaced.

    Limits: the interpreter still runs scripted modules, and scripted functions that get no
    tensor on a card but create one.
    """
    patches.set(_Scripted, "_apply", _apply)
    patch_archives(patches)
    # The table is built at its first use and must also contain the originals.
    table = _builtins._get_builtin_table()
    for name, value in (CONSTRUCTORS | DROPOUTS).items():
        patches.put(table, id(value), f"aten::{name}")
    patches.set(torch.jit.ScriptFunction, "__call__", _run)


def _run(function: Any, *args: Any, **options: Any) -> Any:
    """Call a scripted function; for tensors on a card, call its Python original."""
    __tracebackhide__ = True
    original = getattr(function, "_torchdynamo_inline", None)
    if original is not None and any(map(_is_on_card, (*args, *options.values()))):
        return original(*args, **options)
    return _call(function, *args, **options)


def _apply(module: Any, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    """Move or cast a scripted module, and set its parameters again in C++."""
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
