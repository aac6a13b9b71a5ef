"""``torch.compile`` and ``torch.export`` while the simulated device is installed.

Code that uses a simulated tensor is run uncompiled, operator by operator. Backends
without their own kernels (eager, aot_eager) do the same, so their bytes and values are
correct. A backend that makes kernels for a card cannot work here. Its code also runs
uncompiled, with one warning, because fused kernels would take other bytes; or the code is
refused, if the machine is configured so. Export is refused, because it calls C++ code
that needs a driver.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from itertools import chain
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch._C import DispatchKey
from torch._higher_order_ops.flex_attention import FlexAttentionHOP
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorConverter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pytest_gpumem.devices.patches import PatchSet
from pytest_gpumem.devices.simulated.machine import current_machine
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.errors import RunsEagerlyWarning

if TYPE_CHECKING:
    from collections.abc import Callable

#: Backends that need no kernels for a card. Source: ``torch/_dynamo/backends/debugging.py``.
BACKENDS: Final = frozenset(
    {
        "eager",
        "eager_noexcept",
        "eager_debug",
        "aot_eager",
        "aot_eager_default_partitioner",
    }
)

_original_compile: Final[Any] = torch.compile


def compiling(model: Any = None, **options: Any) -> Any:
    """Run ``torch.compile``, without kernels for a simulated card.

    Raises:
        UnsupportedOnSimulatedDeviceError: When the compiled code is called with a
            simulated tensor, the backend makes kernels, and the machine refuses them.
    """
    _hide_from_dynamo()
    backend = options.get("backend", "inductor")
    if model is None:
        return functools.partial(compiling, **options)
    makes_kernels = isinstance(backend, str) and backend not in BACKENDS
    if isinstance(backend, str) and not makes_kernels:
        options["backend"] = functools.partial(_compile_on_host, backend)
    compiled = _original_compile(model, **options)
    if options.get("disable"):
        return compiled
    guard = _checked if makes_kernels else _as_it_is
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = guard(compiled.forward, model)
        return compiled
    return guard(compiled, model)


#: Folders that TorchDynamo skips because of this module.
_hidden: Final[list[str]] = []


def _hide_from_dynamo() -> None:
    """Make TorchDynamo run this package's own frames uncompiled.

    Otherwise it would compile the code that simulates the card.
    """
    if _hidden:
        return
    from torch._dynamo import guards, trace_rules, utils

    _dynamo.set(utils, "run_node", _without_grad(utils.run_node))
    for module in (guards, utils):
        if hasattr(module, "get_current_stream"):  # torch 2.8 has none
            _dynamo.set(module, "get_current_stream", torch.accelerator.current_stream)
    # Dynamo knows torch's functions by their objects, perhaps since before they were replaced.
    rules = trace_rules.get_torch_obj_rule_map()
    for each in list(vars(torch).values()):
        if isinstance(each, FunctionType):
            rule = rules.get(getattr(each, "__wrapped__", None))
            if rule is not None:
                _dynamo.put(rules, each, rule)
    before = len(trace_rules.SKIP_DIRS)
    trace_rules.add(__name__.partition(".")[0])
    _hidden.extend(trace_rules.SKIP_DIRS[before:])


def show_to_dynamo() -> None:
    """Restore TorchDynamo's rules."""
    if not _hidden:
        return
    from torch._dynamo import trace_rules

    _dynamo.restore()
    while _hidden:
        trace_rules.SKIP_DIRS.remove(_hidden.pop())
    trace_rules._recompile_re()


#: The replacements in TorchDynamo while its rules are changed.
_dynamo: Final = PatchSet()


def _without_grad(run_node: Callable[..., Any]) -> Callable[..., Any]:
    """Return TorchDynamo's trial run of a node, without autograd on a card.

    C++ would need a CUDA device guard for a fake result that has a graph.
    """

    @functools.wraps(run_node)
    def trying(tracer: Any, node: Any, args: Any, kwargs: Any, module: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        on_card = any(
            isinstance(each, torch.Tensor) and each.device.type == "cuda"
            for each in leaves
        )
        with torch.no_grad() if on_card else contextlib.nullcontext():
            return run_node(tracer, node, args, kwargs, module)

    return trying


def _as_it_is(compiled: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """Return a function that runs uncompiled if it is called with a card's tensors."""

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        chosen = original if _on_card(original, args, kwargs) else compiled
        return chosen(*args, **kwargs)

    return call


def _checked(compiled: Callable[..., Any], original: Any) -> Callable[..., Any]:
    """Return a function that makes no kernels for a card, and warns about that."""

    @functools.wraps(compiled)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _is_off() or not _on_card(original, args, kwargs):
            return compiled(*args, **kwargs)
        _say_eager()
        return original(*args, **kwargs)

    return call


def _say_eager() -> None:
    """Warn once that code for a card runs uncompiled.

    Raises:
        UnsupportedOnSimulatedDeviceError: The machine is configured to refuse it.
    """
    machine = current_machine()
    if machine.compiled == "refused":
        refuse("a torch.compile backend that makes kernels")
    if not machine.has_told_of_compiling:
        machine.has_told_of_compiling = True
        warnings.warn(RunsEagerlyWarning(), stacklevel=3)


def _is_off() -> bool:
    """Return whether torch is set to run code uncompiled."""
    stance = torch._dynamo.eval_frame._stance.stance  # no public API
    return bool(torch._dynamo.config.disable) or stance == "force_eager"


def _on_card(function: Any, args: Any, kwargs: Any) -> bool:
    """Return whether a call can use a simulated tensor: an argument or a named object."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    return any(_holds(each) for each in (*leaves, *_named_by(function)))


def _named_by(function: Any) -> list[Any]:
    """Return the objects that a function names: its owner, its closure, its globals."""
    named = [function, getattr(function, "__self__", None)]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty closure cell
            named.append(cell.cell_contents)
    code = getattr(function, "__code__", None)
    names = getattr(function, "__globals__", {})
    named.extend(names[name] for name in getattr(code, "co_names", ()) if name in names)
    return named


def _holds(value: Any) -> bool:
    """Return whether a value is a simulated tensor, or holds one as an attribute."""
    if isinstance(value, torch.nn.Module):
        tensors = (*value.parameters(), *value.buffers())
        return any(isinstance(each, SimulatedTensor) for each in tensors)
    if isinstance(value, torch.optim.Optimizer):
        groups = (group["params"] for group in value.param_groups)
        return any(isinstance(each, SimulatedTensor) for each in chain(*groups))
    if isinstance(value, (type, ModuleType)) or not hasattr(value, "__dict__"):
        return False
    return isinstance(value, SimulatedTensor) or any(
        isinstance(each, SimulatedTensor) for each in vars(value).values()
    )


def making_kernels(wrapper: Any, graph: Any, inputs: Any) -> Any:
    """Replace Inductor's entry point, for a graph that creates tensors on a card.

    A refusal is raised when the graph runs, because TorchDynamo would wrap it earlier.
    """
    if not _names_a_card(graph):
        return _original_inductor(wrapper, graph, inputs)

    def run(*args: Any) -> Any:
        _say_eager()
        return graph.forward(*args)

    return run


def _compile_on_host(backend: str, graph: Any, inputs: Any) -> Any:
    """Compile a graph; one that creates tensors on a card runs uncompiled."""
    if _names_a_card(graph):
        return graph.forward
    compiler: Any = torch._dynamo.lookup_backend(backend)
    return compiler(graph, inputs)


def _names_a_card(graph: Any) -> bool:
    made = (node.meta.get("example_value") for node in graph.graph.nodes)
    return any(
        isinstance(each, torch.Tensor) and each.device.type == "cuda" for each in made
    )


def exporting(module: Any, args: Any = (), kwargs: Any = None, **options: Any) -> Any:
    """Run ``torch.export.export``; tensors on a simulated card are refused.

    Raises:
        UnsupportedOnSimulatedDeviceError: The module or its arguments have tensors on a
            simulated card.
    """
    if _on_card(module, args, kwargs):
        refuse("torch.export.export")
    return _original_export(module, args, kwargs, **options)


def patch_explain(patches: PatchSet) -> None:
    """Refuse ``torch._dynamo.explain`` with a card's tensors.

    It would trace the code that simulates the card, and count graph breaks there.
    """
    original: Any = torch._dynamo.explain

    def explain(function: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # the old form of the call
            return explain(function)(*args, **kwargs)

        def explaining(*args: Any, **kwargs: Any) -> Any:
            if _on_card(function, args, kwargs):
                refuse("torch._dynamo.explain")
            return original(function)(*args, **kwargs)

        return explaining

    patches.set(torch._dynamo, "explain", functools.wraps(original)(explain))


def faking(
    converter: Any, mode: Any, tensor: torch.Tensor, *rest: Any, **options: Any
) -> Any:
    """Run ``FakeTensorConverter.from_real_tensor``; refuse what would abort in C++.

    A fake tensor on a card that takes part in autograd would call the CUDA driver.

    Raises:
        UnsupportedOnSimulatedDeviceError: The tensor is on a simulated card and requires
            gradients.
    """
    if isinstance(tensor, SimulatedTensor) and tensor.requires_grad:
        refuse("FakeTensorMode.from_tensor")
    return _original_fake(converter, mode, tensor, *rest, **options)


def linearizing(function: Any, *primals: Any) -> Any:
    """Run ``torch.func.linearize``; primals on a card are refused.

    It records tangents by their Python objects, and C++ creates new objects for tensors on
    a card. The result would not depend on the argument.

    Raises:
        UnsupportedOnSimulatedDeviceError: A primal is on a simulated card.
    """
    leaves = torch.utils._pytree.tree_leaves(primals)
    if any(isinstance(each, torch.Tensor) and each.is_cuda for each in leaves):
        refuse("torch.func.linearize")
    return _original_linearize(function, *primals)


_original_linearize: Final[Any] = torch.func.linearize
_original_inductor: Final[Any] = torch._TorchCompileInductorWrapper.__call__


def flexible(operator: Any, query: torch.Tensor, *rest: Any, **options: Any) -> Any:
    """Run ``flex_attention``; refuse what would abort in C++.

    Raises:
        UnsupportedOnSimulatedDeviceError: The query is on a simulated card.
    """
    if isinstance(query, SimulatedTensor):
        refuse("flex_attention")
    return _original_flex(operator, query, *rest, **options)


def calling_functions(
    operator: HigherOrderOperator, key: DispatchKey, *args: Any, **kwargs: Any
) -> Any:
    """Run an operator that takes functions (``torch.cond``) as its eager code.

    torch has no rule for the tensors' class, and its gradient would trace the functions.
    Source: ``torch/_ops.py``, ``HigherOrderOperator.dispatch``.
    """
    if (
        _functionality_of(key) in _ABOVE_EAGER
        and DispatchKey.CompositeExplicitAutograd in operator.py_kernels
        and _get_current_dispatch_mode() is None
        and _are_of_a_card(torch.utils._pytree.tree_leaves((args, kwargs)))
    ):
        key = DispatchKey.CompositeExplicitAutograd
    return _original_dispatch(operator, key, *args, **kwargs)


_functionality_of: Final = torch._C._to_functionality_key  # type: ignore[attr-defined]  # torch's stubs lack it
_ABOVE_EAGER: Final = {DispatchKey.Python, DispatchKey.AutogradFunctionality}


def _are_of_a_card(operands: list[Any]) -> bool:
    """Return whether one operand is a card's tensor, and no other class dispatches."""
    dispatching = [
        isinstance(each, SimulatedTensor)
        for each in operands
        if isinstance(each, torch.Tensor)
        and torch._C._dispatch_keys(each).has("Python")
    ]
    return bool(dispatching) and all(dispatching)


_original_dispatch: Final[Any] = HigherOrderOperator.dispatch
_original_flex: Final[Any] = FlexAttentionHOP.__call__
_original_export: Final[Any] = torch.export.export
_original_fake: Final[Any] = FakeTensorConverter.from_real_tensor

#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (torch, "compile", compiling),
    (torch._TorchCompileInductorWrapper, "__call__", making_kernels),
    (torch.export, "export", exporting),
    (torch.func, "linearize", linearizing),
    (FlexAttentionHOP, "__call__", flexible),
    (HigherOrderOperator, "dispatch", calling_functions),
    (FakeTensorConverter, "from_real_tensor", faking),
)
