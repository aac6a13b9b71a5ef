"""What an operator will ask for, found out before it runs and changes anything.

It runs on meta tensors first, its operands' shadows. What cannot run there is charged
once its results are made.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.operators.requests import Call, ask, flat

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.memory import Memory
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.operators.requests import Step

_META: Final = torch.device("meta")

#: Tensors with their shadows on meta, by the tensors' ids.
_Shadows = dict[int, tuple[torch.Tensor, torch.Tensor]]
#: Arguments that grow, with what they will hold; what each result will hold.
_Foreseen = tuple[list[tuple[torch.Tensor, "Memory"]], "list[Memory | None]"]


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


def _shade(value: Any, shadows: _Shadows) -> Any:
    """Return an argument's shadow: the same one for the same tensor."""
    if isinstance(value, (list, tuple)):
        return type(value)([_shade(item, shadows) for item in value])
    if isinstance(value, torch.device):
        return _META
    if not isinstance(value, torch.Tensor):
        return value
    if id(value) not in shadows:
        shadow = torch.empty_strided(
            value.size(), value.stride(), dtype=value.dtype, device=_META
        )
        shadows[id(value)] = (value, shadow)
    return shadows[id(value)][1]


def foresee(
    func: Any,
    values: list[Any],
    kwargs: dict[str, Any],
    card: SimulatedCard,
    operator: Operator,
) -> _Foreseen:
    """Take the bytes that an operator asks for, before it runs and changes anything.

    It runs on meta tensors first; where it cannot, it is charged afterwards.

    Raises:
        torch.OutOfMemoryError: There is no room; nothing has changed.
    """
    __tracebackhide__ = True
    shadows: _Shadows = {}
    options = {name: _shade(each, shadows) for name, each in kwargs.items()}
    options.pop("generator", None)
    arguments = [_shade(value, shadows) for value in values]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the operator itself will say it
            made = flat((operator.shapes or func)(*arguments, **options))
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        return [], []
    own = {id(shadow): (value, shadow) for value, shadow in shadows.values()}
    # Arguments that are not returned may grow as well.
    returned = {id(each) for each in made}
    made += [shadow for key, (_value, shadow) in own.items() if key not in returned]
    sizes = [0 if each is None else _bytes(each, own.get(id(each))) for each in made]
    steps: Iterable[Step] = ()
    if operator.requests is not None:
        steps = operator.requests(Call(func, values, kwargs, made, card))
    held = ask(steps, sizes, card)
    growing = [
        (own[id(each)][0], memory)
        for each, memory in zip(made, held, strict=True)
        if memory is not None and id(each) in own
    ]
    results = [
        None if id(each) in own else memory
        for each, memory in zip(made, held, strict=True)
    ]
    return growing, results


def _bytes(
    made: torch.Tensor, argument: tuple[torch.Tensor, torch.Tensor] | None
) -> int:
    """Return what a result asks for; an argument that does not grow asks for nothing."""
    nbytes = made.untyped_storage().nbytes()
    if argument is None:
        return nbytes
    value, shadow = argument
    if value.shape == shadow.shape and value.stride() == shadow.stride():
        return 0
    nbytes += int(value.storage_offset()) * value.element_size()
    return nbytes if nbytes > value.untyped_storage().nbytes() else 0
