"""Rules for batches, in place of C++ rules that create helper tensors on the host.

C++ regards the host as a card's device. Under ``torch.vmap`` an operator runs for each
slice of a batch. For batches of gradients, the formulas of some views are composed here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.operators.registry import Kernel

_functorch: Final[Any] = torch._C._functorch  # no public API
_tree: Final[Any] = torch.utils._pytree  # no public name
_BATCHED: Final[Any] = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def by_slices(func: Any) -> Kernel:
    """Return a rule for ``vmap`` that runs an overload once for each slice.

    Source: ``batchedTensorForLoopFallback`` of
    ``aten/src/ATen/functorch/BatchedFallback.cpp``, which does so for operators that have
    no rule.
    """

    def rule(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_BATCHED):
            level = _functorch.maybe_current_level()
            leaves, form = _tree.tree_flatten((args, kwargs))
            batches = [_slices(each, level) for each in leaves]
            count = max(len(each) for each in batches if each is not None)
            results = []
            for index in range(count):
                of_slice = [
                    leaf if batch is None else batch[index]
                    for leaf, batch in zip(leaves, batches, strict=True)
                ]
                inner, options = _tree.tree_unflatten(of_slice, form)
                results.append(func(*inner, **options))
            return _functorch._add_batch_dim(torch.stack(results), 0, level)

    return rule


def _slices(leaf: Any, level: int) -> Any:
    """Return the slices of a batch at a level of ``vmap``; None for other tensors."""
    if not isinstance(leaf, torch.Tensor) or _functorch.maybe_get_level(leaf) != level:
        return None
    return _functorch.get_unwrapped(leaf).unbind(_functorch.maybe_get_bdim(leaf))


def _of_view(view: Callable[..., torch.Tensor]) -> Kernel:
    """Return a rule that writes a gradient to a view of zeros."""

    def rule(grad: torch.Tensor, sizes: list[int], *where: Any) -> torch.Tensor:
        whole = grad.new_zeros(sizes)
        view(whole, *where).copy_(grad)
        return whole

    return rule


#: The gradients of views in a batch of gradients, by name.
#: Source: ``aten/src/ATen/LegacyBatchingRegistrations.cpp``.
GRADIENTS_OF_VIEWS: Final[dict[str, Kernel]] = {
    "diagonal_backward": _of_view(torch.diagonal),
    "select_backward": _of_view(torch.select),
    "slice_backward": _of_view(torch.ops.aten.slice),
    "trace_backward": _of_view(torch.diagonal),
}
