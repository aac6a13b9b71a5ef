"""Functions that compose an operator of other operators, above autograd.

When C++ composes an operator, it reads the tensors' device, which is the host. It then
creates helper tensors on the host, or takes a branch that it does not take for a card's
tensors. If all operators still reach a card's kernels, C++ composes the operator as
usual.

Each function here is a value for the field ``composed`` of a record: it returns the
kernel for an overload, or None if the overload needs none.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.capture import on_tape
from pytest_gpumem.devices.simulated.copies import moved
from pytest_gpumem.devices.simulated.kernel_types import HALVES, refuse_backend
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.refusals import refusing

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from pytest_gpumem.devices.simulated.operators.registry import Kernel

_DENSE = torch.contiguous_format
#: The bits of a dispatch key set for a card and for the CPU.
_OF_CARDS, _OF_CPU = (
    torch._C.DispatchKeySet(own).raw_repr() & ~torch._C.DispatchKeySet(other).raw_repr()
    for own, other in itertools.permutations(
        (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CPU)
    )
)
#: The bits of autograd's keys and of the keys below them.
_BELOW = (
    1
    << torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU).raw_repr().bit_length()
) - 1

#: Keys below autograd that have no kernel for an operator that returns new tensors.
_FALLING_THROUGH = ("ADInplaceOrView", "BackendSelect")


def packing(func: Any) -> Kernel | None:
    """Compute into dense tensors if the CPU's kernel ignores the strides of ``out=``."""
    names = [each.name for each in func._schema.arguments if each.is_out]
    if not names:
        return None

    def compute(*args: Any, **options: Any) -> Any:
        outs = [options.pop(name) for name in names]
        dense = [
            out if out.is_contiguous() else torch.empty_like(out, memory_format=_DENSE)
            for out in outs
        ]
        func(*args, **options, **dict(zip(names, dense, strict=True)))
        for out, made in zip(outs, dense, strict=True):
            if made is not out:
                out.resize_(made.shape).copy_(made)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return compute


def widening(func: Any) -> Kernel:
    """Compute in single precision, then round, if the CPU has no kernel for half.

    A card's kernels do the same in registers.
    """
    names = [each.name for each in func._schema.arguments if each.is_out]
    functional = _without_out(func) if names else func
    inner = packing(func) or func

    def compute(*args: Any, **options: Any) -> Any:
        try:
            return inner(*args, **options)
        except NotImplementedError as error:
            if not any(f"for '{name}'" in str(error) for name in ("Half", "BFloat16")):
                raise
        outs = [options.pop(name) for name in names]
        computed = _widened(functional, args, options)
        if not names:
            return computed
        results = [computed] if isinstance(computed, torch.Tensor) else [*computed]
        for out, result in zip(outs, results, strict=True):
            out.resize_(result.shape).copy_(result)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return compute


def _widened(func: Any, args: Any, options: dict[str, Any]) -> Any:
    operands = torch.utils._pytree.tree_leaves((args, options))
    dtype = next(each.dtype for each in operands if _is_of(each, HALVES))

    def cast(value: Any, old: Collection[torch.dtype], new: torch.dtype) -> Any:
        return torch.utils._pytree.tree_map(
            lambda each: each.to(new) if _is_of(each, old) else each, value
        )

    out = func(*cast(args, HALVES, torch.float32), **options)
    return cast(out, {torch.float32}, dtype)


def _is_of(value: Any, dtypes: Collection[torch.dtype]) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in dtypes


def on_cpu_alone(func: Any) -> Kernel:
    """Refuse an operator that has kernels only for the CPU, with a card's error."""
    return lambda *_args, **_options: refuse_backend(func)


def refusal_of(feature: str) -> Callable[[Any], Kernel]:
    """Refuse a feature that cannot be simulated, by its name in ``refusals.py``."""
    return lambda _func: refusing(feature)


def only(kernel: Kernel, overload: str = "default") -> Callable[[Any], Kernel | None]:
    """Use a function as the kernel of one overload."""
    return lambda func: kernel if func._overloadname == overload else None


def on_host(func: Any) -> Kernel:
    """Compute the whole operator on the host, and move the result to the card.

    Gradients flow through these moves. Limits: tensors saved for backward are held on
    the host, not on the card.
    """
    into = into_out(func)
    if into is not None:
        return into
    host = torch.device("cpu")

    def down(value: Any) -> Any:
        return moved(value, host) if _is_on_card(value) else value

    def kernel(*args: Any, **options: Any) -> Any:
        operands = (*args, *options.values())
        cards = [each.device for each in operands if _is_on_card(each)]
        with on_tape(card_of(cards[0].index)):
            options = {name: down(value) for name, value in options.items()}
            return moved(func(*(down(each) for each in args), **options), cards[0])

    return kernel


def _is_on_card(value: Any) -> bool:
    """Return whether a value is a card's tensor, also inside a transform's wrapper."""
    return isinstance(value, torch.Tensor) and value.is_cuda


def by_formula(func: Any) -> Kernel:
    """Run torch's own formulas of an overload, which a ``composed`` kernel replaces.

    C++ has the same formulas for every device. The overload is dispatched as for a tensor
    of the CPU until autograd has seen it.
    """

    def kernel(*args: Any, **options: Any) -> Any:
        operands = (*args, *options.values())
        first = next(each for each in operands if _is_on_card(each))
        keys = torch._C._dispatch_keys(first)
        keys = keys | torch._C._dispatch_tls_local_include_set()
        keys = keys - torch._C._dispatch_tls_local_exclude_set()
        for name in _FALLING_THROUGH:
            keys = keys.remove(getattr(torch._C.DispatchKey, name))
        kept = keys.raw_repr() & ~_OF_CARDS & _BELOW | _OF_CPU
        return func.redispatch(
            torch._C.DispatchKeySet.from_raw_repr(kept), *args, **options
        )

    return kernel


def into_out(
    func: Any, *, casts: bool = False, keeps_strides: bool = True
) -> Kernel | None:
    """Run the overload without ``out=``, and copy its result to ``out``.

    C++ would compute into helper tensors on the host. Limits: the results take bytes in
    addition to those of ``out``.

    Args:
        func: The overload with ``out=``.
        casts: Whether ``out`` may have another dtype to which the result can be cast.
        keeps_strides: Whether an ``out`` of another size gets the strides of the result.
    """
    names = [each.name for each in func._schema.arguments if each.is_out]
    if not names:
        return None
    functional = _without_out(func)

    def kernel(*args: Any, **options: Any) -> Any:
        outs = [options.pop(name) for name in names]
        computed = functional(*args, **options)
        results = [computed] if isinstance(computed, torch.Tensor) else [*computed]
        for out, result in zip(outs, results, strict=True):
            fits = casts and torch.can_cast(result.dtype, out.dtype)
            if out.dtype is not result.dtype and not fits:
                raise RuntimeError(
                    f"Expected out tensor to have dtype {_spelt(result.dtype)}, but got "
                    f"{_spelt(out.dtype)} instead"
                )
            if out.shape != result.shape:
                out.resize_(result.shape)
                if keeps_strides:
                    out.as_strided_(result.shape, result.stride())
            out.copy_(result)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return kernel


def _without_out(func: Any) -> Any:
    """Return the overload that takes the same arguments except ``out=``."""
    wanted = _taken(func)
    packet = func.overloadpacket
    others = (getattr(packet, name) for name in packet.overloads())
    return next(each for each in others if each is not func and _taken(each) == wanted)


def _taken(func: Any) -> list[tuple[str, str]]:
    arguments = func._schema.arguments
    return [(each.name, str(each.type)) for each in arguments if not each.is_out]


def _spelt(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float32", "float")


def checked(
    check: Callable[..., None], overload: str | None = None
) -> Callable[[Any], Kernel | None]:
    """Check the arguments of an operator that C++ composes, then let C++ do so.

    C++ sees a card's tensors on the host, so its own check of devices finds no error.

    Args:
        check: Takes the overload and the positional arguments.
        overload: The only overload that is checked; None means all.
    """

    def checking(func: Any) -> Kernel | None:
        if overload not in (None, func._overloadname):
            return None

        def kernel(*args: Any, **options: Any) -> Any:
            check(func, *args)
            return func.decompose(*args, **options)

        return kernel

    return checking


def result_on_card(func: Any) -> Kernel | None:
    """Move a result to the card if C++ has created it on the host."""
    if func._schema.is_mutable:
        return None

    def kernel(*args: Any, **options: Any) -> Any:
        result = func.decompose(*args, **options)
        if result.is_cuda:
            return result
        return moved(result, args[0].device)

    return kernel
