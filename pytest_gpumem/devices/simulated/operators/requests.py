"""The language of rules for the requests that operators make to the caching allocator.

The rule of an operator is a generator. It takes the call and yields the requests of
CUDA's code, in the same order. An operator without a rule requests its results, in the
order in which it returns them. A rule uses shapes, strides, dtypes, arguments and the
card, but no values. It therefore also works before the operator has run, and for
tensors without values.

============================  =========================================================
``yield Results()``           requests all results not requested yet, in their order
``yield Results(2, 0)``       requests these results, by their index in the return value
``yield Sized(0, 4096)``      requests this result with another size than its elements
                              need
``buffer = Temporary(512)``   defines temporary bytes: ``yield buffer`` requests them, and
                              they are held until the operator ends
``yield Free(buffer)``        frees temporary bytes earlier
``yield Workspace()``         requests the workspace of the thread's cuBLAS handle, if it
                              has none
``yield Tried(key)``          cuDNN measures its kernels the first time; torch then
                              empties the cache
``yield Lasting(number)``     requests the memory of a host number that C++ copies to the
                              card; it is held for as long as C++ holds the copy
============================  =========================================================

Results that the rule does not request are requested at its end. Views and arguments that
are returned request nothing; an argument that is enlarged (``out=``) counts as a result.

Two examples. A kernel that sorts and uses a temporary buffer::

    def sorting(call: Call) -> Iterator[RequestStep]:
        source = call["self"]
        yield Results()
        yield Temporary(source.numel() * source.itemsize)

A kernel that works on a contiguous copy, and allocates its second result first::

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

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.memory import Memory, hold, hold_workspace
from pytest_gpumem.kernels.reduction_memory import Processors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

    Rule = Callable[["Call"], Iterable["RequestStep"]]


class Results:
    """The operator requests results; see the table in the module docstring."""

    __slots__ = ("indices",)

    def __init__(self, *indices: int) -> None:
        self.indices = indices


class Sized:
    """The operator requests a result with another size than its elements need.

    A result that CUDA's code shrinks later keeps its original bytes. A result that only
    another device's code uses has no bytes.
    """

    __slots__ = ("index", "nbytes")

    def __init__(self, index: int, nbytes: int) -> None:
        self.index = index
        self.nbytes = nbytes


class Temporary:
    """The operator requests temporary bytes; 0 requests nothing."""

    __slots__ = ("nbytes",)

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


class Free:
    """The operator frees a temporary before it ends."""

    __slots__ = ("temporary",)

    def __init__(self, temporary: Temporary) -> None:
        self.temporary = temporary


class Workspace:
    """The operator requests a workspace for the thread's cuBLAS handle if it has none.

    Args:
        of_lt: Whether the product is one of cuBLASLt.
    """

    __slots__ = ("_of_lt",)

    def __init__(self, *, of_lt: bool = False) -> None:
        self._of_lt = of_lt

    def ask(self, card: SimulatedCard) -> None:
        """Make the request on a card."""
        hold_workspace(card, of_lt=self._of_lt)


class Lasting:
    """A host number that C++ copies to the card, held for as long as C++ holds the copy."""

    __slots__ = ("_number",)

    def __init__(self, number: torch.Tensor) -> None:
        self._number = number

    def ask(self, card: SimulatedCard) -> None:
        """Make the request on a card."""
        memory = Memory(card, self._number.itemsize)
        hold(self._number.untyped_storage(), memory)


class Tried:
    """cuDNN measures its kernels at the first convolution of each kind on a card.

    Source: ``run_single_conv`` of ``aten/src/ATen/native/cudnn/Conv_v8.cpp``: torch
    empties the allocator's cache after each measurement. The workspaces of the measured
    kernels are not known.
    """

    __slots__ = ("_key",)

    def __init__(self, key: tuple[Any, ...]) -> None:
        self._key = key

    def ask(self, card: SimulatedCard) -> None:
        """Empty the card's cache if the kind is new and torch is set to do so."""
        machine = card.machine
        key = (card.number, *self._key)
        if key not in machine.measured_convolutions:
            machine.measured_convolutions.add(key)
            if machine.cudnn["empties_cache"]:
                card.empty_cache()


RequestStep = Results | Sized | Temporary | Free | Workspace | Lasting | Tried


def copy_of(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> Temporary:
    """Return the request for a contiguous copy of a tensor, optionally in another dtype."""
    itemsize = (dtype or tensor.dtype).itemsize
    return Temporary(tensor.numel() * itemsize)


def packed(
    tensor: torch.Tensor | None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Temporary:
    """Return the request of ``contiguous()``: for a copy, or for nothing.

    Args:
        tensor: The tensor; None requests nothing.
        memory_format: The requested layout.
    """
    if tensor is None or tensor.is_contiguous(memory_format=memory_format):
        return Temporary(0)
    return copy_of(tensor)


def suggested_format(tensor: torch.Tensor) -> torch.memory_format:
    """Return the memory format that C++ uses for copies: ``suggest_memory_format``."""
    found: torch.memory_format = torch._prims_common.suggest_memory_format(tensor)
    return found


def is_number(value: Any) -> bool:
    """Return whether an argument is a host tensor of one number."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 0
        and not hasattr(value.untyped_storage(), "_gpumem")
    )


@functools.cache
def _arguments(func: Any) -> dict[str, tuple[int, Any]]:
    """Return the position and the default of each argument of an operator, by name.

    The result is kept, because reading a schema takes longer than many requests.
    """
    arguments = enumerate(func._schema.arguments)
    return {each.name: (at, each.default_value) for at, each in arguments}


class Call:
    """One call of an operator, for its rule: ``call["dim"]`` is an argument.

    Attributes:
        card: The card; its properties are in ``card.card``.
        results: The flat list of the operator's results: tensors with the correct shapes,
            strides and dtypes, and None for a result that is not a tensor.
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
        """Return an argument, or its default, by its name in the schema.

        Raises:
            KeyError: The overload has no argument with this name.
        """
        if name in self._kwargs:
            return self._kwargs[name]
        position, default = _arguments(self._func)[name]
        return self._args[position] if position < len(self._args) else default

    def get(self, name: str, default: Any = None) -> Any:
        """Return an argument, or ``default`` if the overload has no such argument."""
        try:
            return self[name]
        except KeyError:
            return default

    @property
    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The operands of a product: the last two tensors, which is faster than by name."""
        tensors = self.tensors
        return tensors[-2], tensors[-1]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the positional arguments."""
        return [each for each in self._args if isinstance(each, torch.Tensor)]

    @property
    def name(self) -> str:
        """The operator's name without the underscore of in-place variants: ``"add"``."""
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
        """The card's streaming multiprocessors, and the threads that one can hold."""
        card = self.card.card
        return Processors(
            card.multi_processor_count,
            card.max_threads_per_multi_processor,
            card.compute_capability,
        )


def workspaces(call: Call) -> tuple[Workspace, ...]:
    """Return the request of a product for its workspace; without numbers there is none."""
    if not all(each is None or each.numel() for each in (*call.tensors, *call.results)):
        return ()
    # Of a batch whose products are added, each matrix is multiplied by itself.
    times = call["batch1"].shape[0] if call.name == "addbmm" else 1
    return (Workspace(of_lt=_is_of_lt(call)),) * times


#: Dtypes whose products cuBLASLt computes.
_OF_LT: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _is_of_lt(call: Call) -> bool:
    """Return whether cuBLASLt computes a product, which it does if it adds a bias.

    Source: ``isInputCompliesAddmmCudaLt`` of ``aten/src/ATen/native/cuda/Blas.cpp``;
        that a bias may be one row was observed with torch 2.15 on the substitute
        runtime of ``tests/cuda_host``.
    """
    if call.name not in {"addmm", "_addmm_activation"}:
        return False
    bias, second, result = call["self"], call["mat2"], call.results[0]
    width = second.shape[1]
    return (
        bias.shape in {(width,), (1, width)}
        and bias.is_contiguous()
        and call["beta"] == 1
        and second.dtype in _OF_LT
        and min(second.shape) > 1
        and result is not None
        and result is not bias
        and result.is_contiguous()
    )


def flat(out: Any) -> list[torch.Tensor | None]:
    """Return an operator's results as a flat list, with None for each non-tensor."""
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
        steps: The steps of the operator's rule.
        sizes: Bytes of each result; 0 for a result that requests nothing.
        card: The card whose allocator is used.

    Returns:
        The ``Memory`` of each result, or None. Temporary bytes are freed.

    Raises:
        torch.OutOfMemoryError: The card has no room; the memory taken so far is freed.
    """
    held: list[Memory | None] = [None] * len(sizes)
    left = dict.fromkeys(index for index, nbytes in enumerate(sizes) if nbytes)
    temporaries: dict[int, tuple[Temporary, Memory]] = {}
    for step in (*steps, Results()):
        if isinstance(step, Temporary):
            temporaries[id(step)] = (step, Memory(card, step.nbytes))
        elif isinstance(step, Free):
            del temporaries[id(step.temporary)]
        elif isinstance(step, Workspace | Lasting | Tried):
            step.ask(card)
        elif isinstance(step, Sized):
            if left.pop(step.index, step) is None:
                held[step.index] = Memory(card, step.nbytes)
        else:
            for index in step.indices or list(left):
                if index in left:
                    del left[index]
                    held[index] = Memory(card, sizes[index])
    while temporaries:
        temporaries.popitem()  # the newest one first, as in C++
    return held
