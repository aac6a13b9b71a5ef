"""Determines an operator's requests before the operator runs and has any effect.

The operator first runs on meta tensors that have the shapes of its operands. If it cannot
run on the meta device, it runs on copies of its operands and of the generator.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import check_resizable
from pytest_gpumem.devices.simulated.operators.requests import Call, ask, flat
from pytest_gpumem.devices.simulated.rng import GENERATOR
from pytest_gpumem.devices.simulated.values import run

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.memory import Memory
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.operators.requests import RequestStep
    from pytest_gpumem.devices.simulated.rng import Drawing

    Foresight = Callable[[Any, dict[str, Any], SimulatedCard], "_Foreseen"]

_META: Final = torch.device("meta")

#: The enlarged arguments with their new memory, and the memory of each result.
_Foreseen = tuple[list[tuple[torch.Tensor, "Memory"]], "list[Memory | None]"]


def may_allocate(func: Any, operator: Operator) -> bool:
    """Return whether an operator that changes its arguments can also request memory.

    It requests memory if it resizes an argument or returns a new tensor.
    """
    schema = func._schema  # no public API
    return (
        operator.resizes
        or operator.requests is not None
        or any(each.is_out for each in schema.arguments)
        or any(each.alias_info is None for each in schema.returns)
    )


class _Rehearsal:
    """Substitutes for arguments: the same substitute for the same tensor.

    Args:
        on_meta: Whether the substitutes are meta tensors, without values.
    """

    def __init__(self, *, on_meta: bool) -> None:
        self._on_meta = on_meta
        #: Each tensor with its substitute, by the substitute's id.
        self.known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._made: dict[int, torch.Tensor] = {}

    def replace(self, value: Any) -> Any:
        """Return the substitute for an argument."""
        if isinstance(value, (list, tuple)):
            return type(value)([self.replace(item) for item in value])
        if isinstance(value, torch.Tensor):
            if id(value) not in self._made:
                twin = self._made[id(value)] = self._substitute(value)
                self.known[id(twin)] = (value, twin)
            return self._made[id(value)]
        if isinstance(value, GENERATOR):
            return None if self._on_meta else value.clone_state()
        return _META if self._on_meta and isinstance(value, torch.device) else value

    def _substitute(self, value: torch.Tensor) -> torch.Tensor:
        if self._on_meta:
            return torch.empty_strided(
                value.size(), value.stride(), dtype=value.dtype, device=_META
            )
        # The substitute has the original's gaps and overlaps, because an expanded tensor
        # cannot be filled.
        layout = zip(value.shape, value.stride(), strict=True)
        reach = sum((size - 1) * step for size, step in layout)
        span = reach + 1 if value.numel() else 0
        with torch.no_grad():
            copied = value.as_strided((span,), (1,)).clone()
            return copied.as_strided(value.size(), value.stride())


def foreseeing(
    func: Any,
    operator: Operator,
    *,
    draw: Drawing | None,
    compute: Callable[..., Any] | None = None,
) -> Foresight:
    """Return a function that takes the bytes for an operator before it runs.

    The function is called with the tensors that hold the values. It raises
    ``torch.OutOfMemoryError`` if there is no room; the operator has then changed nothing.

    Args:
        func: The operator.
        operator: Its record.
        draw: The function that draws from the card's generator, or None.
        compute: The function that computes the values; None means the operator.
    """
    requests = operator.requests

    def foresee(values: Any, kwargs: dict[str, Any], card: SimulatedCard) -> _Foreseen:
        rehearsal, made = rehearse(values, kwargs, card)
        own = rehearsal.known
        # Arguments that are not returned may be enlarged as well.
        returned = {id(each) for each in made}
        made += [twin for key, (_value, twin) in own.items() if key not in returned]
        sizes = [
            0 if each is None else _bytes(each, own.get(id(each))) for each in made
        ]
        steps: Iterable[RequestStep] = ()
        # An operator that fails requests nothing; it raises its own error later.
        if requests is not None and made:
            steps = requests(Call(func, values, kwargs, made, card))
        held = ask(steps, sizes, card)
        growing = []
        results: list[Memory | None] = []
        for each, memory in zip(made, held, strict=True):
            is_own = id(each) in own
            results.append(None if is_own else memory)
            if is_own and memory is not None:
                check_resizable(own[id(each)][0].untyped_storage())
                growing.append((own[id(each)][0], memory))
        return growing, results

    def rehearse(
        values: Any, kwargs: dict[str, Any], card: SimulatedCard
    ) -> tuple[_Rehearsal, list[torch.Tensor | None]]:
        """Run on substitutes; return them and the flat list of results."""
        ways = (True,) if card.value_device == "meta" else (True, False)
        for on_meta in ways:
            rehearsal = _Rehearsal(on_meta=on_meta)
            args = [rehearsal.replace(each) for each in values]
            options = {name: rehearsal.replace(each) for name, each in kwargs.items()}
            try:
                with warnings.catch_warnings():
                    # The operator itself will warn or raise.
                    warnings.simplefilter("ignore")
                    if on_meta:
                        return rehearsal, flat(func(*args, **options))
                    copied = draw and _from_a_copy(draw)
                    out = run(func, args, options, card, draw=copied, compute=compute)
                    return rehearsal, flat(out)
            except Exception:  # noqa: BLE001, S112  # the operator itself will warn or raise
                continue
        return _Rehearsal(on_meta=True), []

    return foresee


def _from_a_copy(draw: Drawing) -> Drawing:
    """Return a drawing that does not change the state of the generator."""
    return lambda generator, args, kwargs: draw(generator.clone_state(), args, kwargs)


def _bytes(
    made: torch.Tensor, argument: tuple[torch.Tensor, torch.Tensor] | None
) -> int:
    """Return the bytes that a result requests; 0 for an argument that keeps its size."""
    nbytes = made.untyped_storage().nbytes()
    if argument is None:
        return nbytes
    value, shadow = argument
    if value.shape == shadow.shape and value.stride() == shadow.stride():
        return 0
    nbytes += int(value.storage_offset()) * value.element_size()
    return nbytes if nbytes > value.untyped_storage().nbytes() else 0
