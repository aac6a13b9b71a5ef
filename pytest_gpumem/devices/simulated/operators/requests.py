"""The language for the requests of an operator to the caching allocator, in order.

The rule of an operator is a generator. It is given the call and yields what CUDA's code
asks for, in the order in which it asks; without a rule that is the results, in theirs.
It knows shapes, strides, types, arguments and the card, never a value, so it also holds
before the operator has run and where no values are kept.

============================  =========================================================
``yield Results()``           the results that have not been asked for, in their order
``yield Results(2, 0)``       these, by their place among what the operator returns
``yield Sized(0, 4096)``      this one, with other bytes than its elements have
``buffer = Temporary(512)``   bytes that it has for itself: asked for by ``yield buffer``,
                              held until the operator ends
``yield Free(buffer)``        or until here
``yield Workspace()``         the workspace of the thread's cuBLAS handle, if it has none
``yield Lasting(number)``     a number of the host that C++ makes on the card: held for as
                              long as C++ has it
============================  =========================================================

What is not asked for by the end is asked for then. Views and arguments that are returned
ask for nothing; an argument that grows (``out=``) is a result here.

Two examples. A kernel that sorts in a buffer beside its results::

    def sorting(call: Call) -> Iterator[RequestStep]:
        source = call["self"]
        yield Results()
        yield Temporary(source.numel() * source.itemsize)

One that works on a contiguous copy, and makes its second result first::

    def folding(call: Call) -> Iterator[RequestStep]:
        copy = None if call["self"].is_contiguous() else copy_of(call["self"])
        if copy:
            yield copy
        yield Results(1)
        if copy:
            yield Free(copy)
        yield Results(0)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.memory import Memory, hold, hold_workspace
from pytest_gpumem.kernels.reduction_memory import Processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

    Rule = Callable[["Call"], Iterable["RequestStep"]]


class Results:
    """The operator asks for results; see the module's table."""

    __slots__ = ("places",)

    def __init__(self, *places: int) -> None:
        self.places = places


class Sized:
    """The operator asks for a result with other bytes than its elements have.

    One that CUDA's code shrinks afterwards keeps the bytes that it had; one that only
    another device's code uses has none.
    """

    __slots__ = ("nbytes", "place")

    def __init__(self, place: int, nbytes: int) -> None:
        self.place = place
        self.nbytes = nbytes


class Temporary:
    """The operator asks for temporary bytes; 0 asks for nothing."""

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Free:
    """The operator frees a temporary before it ends."""

    __slots__ = ("temporary",)

    def __init__(self, temporary: Temporary) -> None:
        self.temporary = temporary


class Workspace:
    """The operator asks for the workspace of the thread's cuBLAS handle, if it has none."""

    __slots__ = ()

    def ask(self, card: SimulatedCard) -> None:
        """Ask for it."""
        hold_workspace(card)


class Lasting:
    """A number that C++ makes on the card; it is held for as long as C++ has it."""

    __slots__ = ("_number",)

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number

    def ask(self, card: SimulatedCard) -> None:
        """Ask for it."""
        memory = Memory(card, self._number.itemsize)
        hold(self._number.untyped_storage(), memory)


RequestStep = Results | Sized | Temporary | Free | Workspace | Lasting


def copy_of(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Temporary:
    """Return the request for a contiguous copy of a tensor, also as another dtype."""
    itemsize = (dtype or tensor.dtype).itemsize
    return Temporary(tensor.numel() * itemsize)


def is_number(value: Any) -> bool:
    """Tell whether an argument is a tensor of one number on the host."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and not hasattr(value.untyped_storage(), "_gpumem")
    )


class Call:
    """One call of an operator, as an argument of its rule: ``call["dim"]``.

    Attributes:
        card: The card; ``card.card`` are its properties.
        results: What the operator returns, flat: tensors of the right shapes, strides
            and types, and None for what is not a tensor.
    """

    __slots__ = ("_args", "_func", "_kwargs", "card", "results")

    def __init__(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        results: Sequence[torch.Tensor | None],
        card: SimulatedCard,
    ) -> None:
        self._func, self._args, self._kwargs = func, args, kwargs
        self.results = results
        self.card = card

    def __getitem__(self, name: str) -> Any:
        """Return an argument by its name in the schema, or its default.

        Raises:
            KeyError: The overload has no argument of the name.
        """
        if name in self._kwargs:
            return self._kwargs[name]
        for position, argument in enumerate(self._func._schema.arguments):
            if argument.name == name:
                given = position < len(self._args)
                return self._args[position] if given else argument.default_value
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` where the overload has none of the name."""
        try:
            return self[name]
        except KeyError:
            return default

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The operands of a product, found faster than by name: the last two tensors."""
        tensors = [each for each in self._args if isinstance(each, torch.Tensor)]
        return tensors[-2], tensors[-1]

    @property
    def name(self) -> str:
        """The operator's name, in place or not: ``"add"``."""
        name: str = self._func.overloadpacket.__name__
        return name.removesuffix("_")

    @property
    def overload(self) -> str:
        """The overload's name: ``"default"``, ``"dim_IntList"``, …."""
        name: str = self._func._overloadname
        return name

    @property
    def capability(self) -> tuple[int, int]:
        """The card's compute capability."""
        return self.card.card.compute_capability

    @property
    def processors(self) -> Processors:
        """The card's streaming multiprocessors, and the threads that one holds."""
        card = self.card.card
        return Processors(
            card.multi_processor_count,
            card.max_threads_per_multi_processor,
            card.compute_capability,
        )


def flat(out: Any) -> list[torch.Tensor | None]:
    """Return what an operator returned, lists laid open; None for what is not a tensor."""
    if isinstance(out, torch.Tensor):
        return [out]
    if isinstance(out, (tuple, list)):
        return [each for item in out for each in flat(item)]
    return [None]


def ask(
    steps: Iterable[RequestStep], sizes: Sequence[int], card: SimulatedCard
) -> list[Any]:
    """Make the requests of an operator to the card's allocator, step by step.

    Args:
        steps: From the operator's rule.
        sizes: Bytes of each result; 0 for one that asks for nothing.
        card: Whose allocator.

    Returns:
        What each result holds, a ``Memory`` or None. Temporaries are given back.

    Raises:
        torch.OutOfMemoryError: There is no room; what was taken is given back.
    """
    __tracebackhide__ = True
    held: list[Memory | None] = [None] * len(sizes)
    left = dict.fromkeys(index for index, nbytes in enumerate(sizes) if nbytes)
    temporaries: dict[int, tuple[Temporary, Memory]] = {}
    for step in (*steps, Results()):
        if isinstance(step, Temporary):
            temporaries[id(step)] = (step, Memory(card, step.nbytes))
        elif isinstance(step, Free):
            del temporaries[id(step.temporary)]
        elif isinstance(step, Workspace | Lasting):
            step.ask(card)
        elif isinstance(step, Sized):
            if left.pop(step.place, step) is None:
                held[step.place] = Memory(card, step.nbytes)
        else:
            for index in step.places or list(left):
                if index in left:
                    del left[index]
                    held[index] = Memory(card, sizes[index])
    while temporaries:
        temporaries.popitem()  # the last one first, as C++ does
    return held
