"""What an operator will ask for, found out before it runs and changes anything.

It runs on meta tensors first, its operands' shadows. What cannot run there is charged
once its results are made.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import Memory

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_META: Final = torch.device("meta")


def _shadow(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=_META
        )
    if isinstance(value, (list, tuple)):
        return type(value)([_shadow(item) for item in value])
    return value


def tensors_of(out: Any) -> list[torch.Tensor]:
    """Return the tensors that an operator returned."""
    if isinstance(out, torch.Tensor):
        return [out]
    results = out if isinstance(out, (tuple, list)) else ()
    return [each for each in results if isinstance(each, torch.Tensor)]


def foresee(
    func: Any, values: list[Any], kwargs: dict[str, Any], card: SimulatedCard | None
) -> list[Memory]:
    """Take the bytes of an operator's results before it runs.

    An operator that draws numbers, or changes what its schema does not say, must not
    have done so when there is no room. Its results are foreseen on meta tensors; one
    that cannot run there is charged afterwards.

    Raises:
        torch.OutOfMemoryError: There is no room.
    """
    __tracebackhide__ = True
    if card is None or card.value_device == "meta":
        return []  # a run on meta tensors has no effects
    options = {
        name: _META if isinstance(value, torch.device) else value
        for name, value in kwargs.items()
        if name != "generator"
    }
    try:
        made = func(*(_shadow(value) for value in values), **options)
    except (RuntimeError, TypeError):
        return []
    sizes = [result.untyped_storage().nbytes() for result in tensors_of(made)]
    return [Memory(card, nbytes) for nbytes in sizes]


def may_allocate(func: Any) -> bool:
    """Tell whether an operator that changes its arguments can also ask for memory.

    It does where it gives an ``out=`` another size, or returns something new.
    """
    schema = func._schema  # it has no public name
    return (
        "resize" in func.overloadpacket.__name__
        or any(each.is_out for each in schema.arguments)
        or any(each.alias_info is None for each in schema.returns)
    )


_Growth = tuple[list[tuple[torch.Tensor, Memory]], list[Memory]]
NOTHING: Final[_Growth] = ([], [])
#: Tensors with their shadows on meta, by the tensors' ids.
_Shadows = dict[int, tuple[torch.Tensor, torch.Tensor]]


def _shade(value: Any, shadows: _Shadows) -> Any:
    """Return an argument's shadow: the same one for the same tensor."""
    if isinstance(value, (list, tuple)):
        return type(value)([_shade(item, shadows) for item in value])
    if isinstance(value, torch.device):
        return _META
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in shadows:
        shadows[id(value)] = (value, _shadow(value))
    return shadows[id(value)][1]


def foresee_growth(
    func: Any, values: list[Any], kwargs: dict[str, Any], card: SimulatedCard
) -> _Growth:
    """Take the bytes by which a mutating operator grows arguments, and of its results.

    It runs on meta tensors first; where it cannot, it is charged afterwards.

    Returns:
        Arguments whose storage grows, with what they will hold; what new results hold.

    Raises:
        torch.OutOfMemoryError: There is no room; nothing has changed.
    """
    __tracebackhide__ = True
    shadows: _Shadows = {}
    options = {name: _shade(each, shadows) for name, each in kwargs.items()}
    options.pop("generator", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the operator itself will say it
            made = func(*(_shade(value, shadows) for value in values), **options)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return [], []
    growing = []
    for value, shadow in shadows.values():
        if value.shape == shadow.shape and value.stride() == shadow.stride():
            continue
        skipped = int(value.storage_offset()) * value.element_size()
        nbytes = shadow.untyped_storage().nbytes() + skipped
        if nbytes > value.untyped_storage().nbytes():
            growing.append((value, Memory(card, nbytes)))
    known = {id(shadow) for _value, shadow in shadows.values()}
    results = [each for each in tensors_of(made) if id(each) not in known]
    return growing, [Memory(card, each.untyped_storage().nbytes()) for each in results]
