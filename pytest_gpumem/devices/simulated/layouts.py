"""Values whose strides on the card differ from those that the CPU would give them.

Note [Two layouts]
A value has the strides of the card's tensor, because the user sees these. The CPU's
attention returns gradients with other strides than CUDA's. An operator such as a sum
adds numbers in memory order, so with other strides its result may differ from the CPU's
in the last bit. Therefore this module records the CPU's strides, and operators on such
a value are computed on a copy with these strides. Their results are recorded in the
same way, until both layouts are the same again.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.devices.simulated.memory import HOST_ROOM

if TYPE_CHECKING:
    from collections.abc import Callable

_tree: Final[Any] = torch.utils._pytree  # no public name
#: Operators that take strides as arguments; these are the card's strides.
_STRIDED: Final = ("as_strided", "_reshape_alias", "new_empty_strided")


class _Layouts(NamedTuple):
    """A value, its layout on the card, and the strides that the CPU would give it."""

    value: weakref.ref[torch.Tensor]
    shape: torch.Size
    strides: tuple[int, ...]
    on_cpu: tuple[int, ...]


#: The values that have two layouts, by their ids. It is empty most of the time.
TWO_LAYOUTS: Final[dict[int, _Layouts]] = {}


def note(value: torch.Tensor, strides: tuple[int, ...]) -> None:
    """Record the CPU's strides of a value, unless it has the same strides."""
    shape, own = value.shape, value.stride()
    if value.numel() < 2 or all(  # noqa: PLR2004  # the order of one element is known
        size == 1 or a == b for size, a, b in zip(shape, own, strides, strict=True)
    ):
        return
    key = id(value)
    gone = weakref.ref(value, lambda _dead: TWO_LAYOUTS.pop(key, None))
    TWO_LAYOUTS[key] = _Layouts(gone, shape, own, strides)


def as_on_cpu(
    func: Any, compute: Callable[..., Any], args: Any, kwargs: dict[str, Any]
) -> Any:
    """Compute an operator; operands with two layouts are copied to the CPU's layout.

    Args:
        func: The operator.
        compute: The function that computes its values.
        args: The positional arguments.
        kwargs: The keyword arguments.

    Returns:
        The results, in the layout that the operator gives them on the card.
    """
    result = compute(*args, **kwargs)
    name = func._schema.name.removeprefix("aten::")
    if func.namespace != "aten" or func._schema.is_mutable or name.startswith(_STRIDED):
        return result
    copying = _Copying(device="meta" if func.is_view else "cpu")
    with HOST_ROOM:
        inner, options = _tree.tree_map_only(torch.Tensor, copying, (args, kwargs))
        if not copying.is_used:
            return result
        if func.is_view:
            _note_views(func, inner, options, result)
            return result
        on_cpu = _tree.tree_leaves(compute(*inner, **options))
        for made, other in zip(_tree.tree_leaves(result), on_cpu, strict=True):
            if isinstance(made, torch.Tensor):
                made.copy_(other)
                note(made, other.stride())
    return result


class _Copying:
    """Copies values that have two layouts into the CPU's layout.

    Args:
        device: The device of the copies; copies on ``meta`` have no values.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        #: Whether a copied value had two layouts.
        self.is_used = False

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        known = TWO_LAYOUTS.get(id(value))
        if known is None or known[1:3] != (value.shape, value.stride()):
            return value
        self.is_used = True
        copied = torch.empty_strided(
            known.shape, known.on_cpu, dtype=value.dtype, device=self._device
        )
        return copied.copy_(value)


def _note_views(func: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
    """Record the strides of views; if the CPU cannot make a view, it makes a copy."""
    views = _tree.tree_leaves(result)
    try:
        on_cpu = _tree.tree_leaves(func(*args, **kwargs))
    except RuntimeError:
        on_cpu = [torch.empty(each.shape, device="meta") for each in views]
    for view, other in zip(views, on_cpu, strict=True):
        note(view, other.stride())
