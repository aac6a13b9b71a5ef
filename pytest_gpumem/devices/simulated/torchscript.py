"""TorchScript with simulated cards: scripted and traced functions and modules.

TorchScript's compiler and interpreter are C++ code. The compiler recognises built-in
functions by their identity. The interpreter reads the C++ tensor's device, which for a
simulated tensor is the device of its values, and it makes tensors in C++. Therefore a
scripted function or module is run as its original Python code. Traced, loaded or
optimised code has no Python code, so the interpreter runs it. If such code reads
devices or creates tensors on a card, it is refused.
"""

from __future__ import annotations

import contextlib
import copy
import traceback
import weakref
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.jit import _builtins, _recursive

from pytest_gpumem.devices.cuda_errors import INTERPRETER_FAILED
from pytest_gpumem.devices.simulated.constructors import CONSTRUCTORS
from pytest_gpumem.devices.simulated.operators.drawing import DROPOUTS
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.script_archives import patch_archives
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, last_failure
from pytest_gpumem.errors import GpuMemError

if TYPE_CHECKING:
    from pytest_gpumem.devices.patches import PatchSet

_call: Final[Any] = torch.jit.ScriptFunction.__call__
_Scripted: Final[Any] = torch.jit.ScriptModule
_apply_to_module: Final[Any] = torch.nn.Module._apply
_call_of_module: Final[Any] = torch.nn.Module.__call__
#: The folder of this package; its frames do not belong to the program.
_OURS: Final = str(Path(__file__).parents[2])
_reparametrize_module: Final[Any] = torch.nn.utils.stateless._reparametrize_module
_Recursive: Final[Any] = torch.jit._script.RecursiveScriptModule
_script_module: Final[Any] = _recursive.create_script_module
_deep_copy: Final[Any] = _Recursive.__deepcopy__


def patch_scripting(patches: PatchSet) -> None:
    """Patch TorchScript; must be called before the constructors are replaced.

    Limits: the interpreter still runs scripted functions that get no tensor on a card but
    create one.
    """
    patches.set(_Scripted, "_apply", _apply)
    patches.set(_Scripted, "__call__", _call_module)
    patches.set(_recursive, "create_script_module", _scripted)
    patches.set(_Recursive, "__deepcopy__", _deep_copied)
    patch_archives(patches)
    # The table is built at its first use and must also contain the originals.
    table = _builtins._get_builtin_table()
    for name, value in (CONSTRUCTORS | DROPOUTS).items():
        patches.put(table, id(value), f"aten::{name}")
    patches.set(torch.jit.ScriptFunction, "__call__", _run)


def _run(function: Any, *args: Any, **options: Any) -> Any:
    """Call a scripted function; for tensors on a card, call its Python original.

    While ``torch.jit.trace`` runs, the function's graph is called, because tracing the
    Python code would fix its branches.
    """
    original = getattr(function, "_torchdynamo_inline", None)
    if original is not None and any(map(_is_on_card, (*args, *options.values()))):
        if not torch._C._is_tracing():
            return _as_interpreter(original, *args, **options)
        if _names_devices(function.inlined_graph):
            refuse("TorchScript code that asks for devices")
    return _interpret(_call, function, *args, **options)


def _interpret(call: Any, *args: Any, **options: Any) -> Any:
    """Run the interpreter; its errors have the text of the operator that failed.

    C++ does not read the text of an error that Python has raised in an operator.
    """
    last_failure.note(RuntimeError())
    try:
        return call(*args, **options)
    except RuntimeError as error:
        text = str(error)
        if text.startswith(INTERPRETER_FAILED) and text.endswith("RuntimeError: \n"):
            error.args = (f"{text[:-1]}{last_failure.text}\n",)
            vars(error).update(last_failure.attributes)
        raise


def _as_interpreter(call: Any, *args: Any, **options: Any) -> Any:
    """Run Python code with the errors of the interpreter.

    An operator's error, an OOM too, becomes a RuntimeError with the operator's text.

    Source: ``InterpreterStateImpl::handleError`` of
    ``torch/csrc/jit/runtime/interpreter.cpp``.
    """
    try:
        return call(*args, **options)
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, GpuMemError) or text.startswith(INTERPRETER_FAILED):
            raise
        frames = traceback.extract_tb(error.__traceback__)[1:]
        lines = "".join(
            f'  File "{each.filename}", line {each.lineno}, in {each.name}\n'
            f"    {each.line}\n    {'~' * len(each.line or '')} <--- HERE\n"
            for each in frames
            if not each.filename.startswith(_OURS)
        )
        failure = RuntimeError(
            f"{INTERPRETER_FAILED}\nTraceback of TorchScript (most recent call last):\n{lines}"
            f"RuntimeError: {text}\n"
        )
        vars(failure).update(vars(error))
    # Outside the handler, so that the error does not keep the code's tensors alive.
    del args, options
    raise failure


def _call_module(module: Any, *args: Any, **options: Any) -> Any:
    """Call a scripted or traced module.

    Raises:
        UnsupportedOnSimulatedDeviceError: The module has no Python code, computes with
            a card, and reads devices or creates tensors on a card.
    """
    if (
        "forward" not in module.__dict__
        and _is_on_card(([*args, *options.values()], [*module.parameters()]))
        and _asks_for_devices(module)
    ):
        refuse("TorchScript code that asks for devices")
    return _interpret(_call_of_module, module, *args, **options)


def _asks_for_devices(module: Any) -> bool:
    """Return whether a module's code depends on devices, and note the answer."""
    known = module.__dict__.get("_gpumem_asks_for_devices")
    if known is None:
        known = _names_devices(module.inlined_graph)
        module.__dict__["_gpumem_asks_for_devices"] = known
    return bool(known)


def _names_devices(graph: Any) -> bool:
    return any(
        graph.findAllNodes(kind) for kind in ("prim::device", "prim::is_cuda")
    ) or any(
        node.output().type().kind() == "DeviceObjType"
        and node.s("value").startswith("cuda")
        for node in graph.findAllNodes("prim::Constant")
        if node.hasAttribute("value")
    )


class _PythonMethod:
    """A method of a scripted module: Python's, if a card is used.

    Args:
        name: The method's name: ``forward``, or that of an exported method.
        module: The scripted module.
        python: A module of the same structure, with its Python code and without values.
    """

    def __init__(self, name: str, module: Any, python: torch.nn.Module) -> None:
        self._name = name
        self._module = weakref.ref(module)
        self.python = python

    def __call__(self, *args: Any, **options: Any) -> Any:
        module: Any = self._module()
        tensors = dict(chain(module.named_parameters(), module.named_buffers()))
        on_card = _is_on_card(([*args, *options.values()], [*tensors.values()]))
        if on_card and torch._C._is_tracing() and _asks_for_devices(module):
            refuse("TorchScript code that asks for devices")
        if not on_card or torch._C._is_tracing():
            method = module._c._get_method(self._name)
            return _interpret(type(method).__call__, method, *args, **options)
        for name, child in module.named_modules():
            self.python.get_submodule(name).training = child.training
        with _reparametrize_module(self.python, tensors):
            method = (
                self.python
                if self._name == "forward"
                else getattr(self.python, self._name)
            )
            return _as_interpreter(method, *args, **options)

    def __getattr__(self, name: str) -> Any:
        module: Any = self._module()
        return getattr(module._c._get_method(self._name), name)


def _scripted(module: Any, *args: Any, **options: Any) -> Any:
    """Script a module, and keep its Python code beside the result."""
    result = _script_module(module, *args, **options)
    if not options.get("is_tracing", False):
        # A module that cannot be copied gets no Python code.
        with contextlib.suppress(Exception):
            _keep_python(result, _without_values(module))
    return result


def _keep_python(scripted: Any, python: torch.nn.Module) -> None:
    """Let a scripted module, and each module inside it, run its Python code on cards."""
    for name, child in scripted.named_modules():
        original = python.get_submodule(name)
        for method in ("forward", *child._c._method_names()):
            if hasattr(original, method):
                child.__dict__[method] = _PythonMethod(method, child, original)


def _without_values(module: torch.nn.Module) -> torch.nn.Module:
    """Copy a module without the values of its tensors.

    Raises:
        TypeError: A module in it is scripted, and its Python code is not known.
    """
    memo: dict[int, Any] = {}
    for each in module.modules():
        if isinstance(each, _Scripted):
            forward = each.__dict__.get("forward")
            if not isinstance(forward, _PythonMethod):
                raise TypeError(each)
            memo[id(each)] = forward.python
    for tensor in chain(module.parameters(), module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, torch.nn.Parameter):
            empty = torch.nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(module, memo)


def _deep_copied(module: Any, memo: dict[int, Any]) -> Any:
    """Copy a scripted module, with its Python code."""
    result = _deep_copy(module, memo)
    forward = module.__dict__.get("forward")
    if isinstance(forward, _PythonMethod):
        _keep_python(result, forward.python)
    return result


def _apply(module: Any, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  # torch's signature
    """Move or cast a scripted module, and set its parameters again in C++."""
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.grad_fn is not None:
            # C++ has cloned the parameter with its module, and the clone is not a leaf.
            module._parameters[name] = torch.nn.Parameter(
                parameter.detach(), parameter.requires_grad
            )
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
