"""Records the operators of a captured graph, to run them again on the same memory.

The host computes a card's values, so the tape records the host operators that the
card's operators call. For each operand it records the storage and the position in it.
Storages are identified by numbers and are not kept alive. A storage that no longer
exists at a replay was temporary, and gets new memory for the duration of the replay. If
another graph reads it, its contents are kept between replays, as on a card, where they
stay in the pool.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

_tree_map: Final[Any] = torch.utils._pytree.tree_map_only
_set: Final[Any] = torch._C.TensorBase.set_  # the method behind Tensor.set_
#: Operators that do not write to their results.
_UNWRITTEN: Final = frozenset(
    {
        "aten::empty",
        "aten::empty_like",
        "aten::empty_permuted",
        "aten::empty_strided",
        "aten::new_empty",
        "aten::new_empty_strided",
    }
)


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """Return a host storage as a tensor of bytes."""
    whole = torch.empty(0, dtype=torch.uint8, device="cpu")
    _set(whole, storage, 0, (storage.nbytes(),), (1,))
    return whole


def living_storage(
    reference: weakref.ref[torch.UntypedStorage],
) -> torch.UntypedStorage | None:
    """Return the storage that is referred to, or None if it was deleted.

    This is a reference to the Python object. In torch 2.8 a reference to the C++ object
    would keep the Python object alive, and with it the card's bytes.
    """
    found = reference()
    if found is not None:
        # If only C++ owns the object, this call returns ownership to Python.
        fix: Any = found._fix_weakref  # type: ignore[attr-defined]  # no public API
        fix()
    return found


@dataclass(frozen=True, slots=True)
class _Operand:
    """The position of a tensor: the number of its storage, and the layout in it."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
    is_conj: bool
    is_neg: bool


class _Step(NamedTuple):
    """One host operator: its arguments, and the positions of its new results."""

    func: Any
    args: Any
    kwargs: Any
    results: list[_Operand | None]


class Tape:
    """Host operators in the order in which they ran.

    Limits: numbers that Python computes between operators keep the values of the capture,
    for example a seed.
    """

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._storages: list[weakref.ref[torch.UntypedStorage]] = []
        self._sizes: list[int] = []
        #: Numbers of storages that captured operators have made.
        self._made: set[int] = set()
        #: Storages that an earlier graph has used: its tape, and the number on that tape.
        self._origins: dict[int, tuple[Tape, int]] = {}
        #: Numbers of storages that later graphs use.
        self._shared: set[int] = set()
        #: Contents of storages that several graphs use and that were deleted.
        self._kept: dict[int, torch.UntypedStorage] = {}

    def keep(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Record an operator that has just run, unless it has written nothing."""
        if func._schema.name in _UNWRITTEN:
            return
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, out))
        tensors = [each for each in leaves if isinstance(each, torch.Tensor)]
        if any(each.is_meta or isinstance(each, SimulatedTensor) for each in tensors):
            return  # the host operators of a card's operator are recorded separately
        given = {
            each.untyped_storage()._cdata
            for each in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(each, torch.Tensor)
        }
        made = [
            self._operand(each)
            if isinstance(each, torch.Tensor)
            and each.untyped_storage()._cdata not in given
            else None
            for each in torch.utils._pytree.tree_leaves(out)
        ]
        if not func._schema.is_mutable and not any(made):
            return
        self._made.update(each.storage for each in made if each is not None)
        args, kwargs = _tree_map(torch.Tensor, self._argument, (args, kwargs))
        self._steps.append(_Step(func, args, kwargs, made))

    def has_made(self, storage: Any) -> bool:
        """Return whether a recorded operator has made a storage."""
        return self._knows(storage) and storage._gpumem_number[1] in self._made

    def keep_call(self, call: Any) -> None:
        """Record a call that is not an operator, such as another graph's replay."""
        self._steps.append(_Step(call, (), {}, []))

    def replay(self) -> None:
        """Run every operator again; results that still exist get the new values."""
        with torch.no_grad(), torch._C._DisableAutocast(), _disable_current_modes():
            self._replay({})

    def _replay(self, helpers: dict[int, torch.UntypedStorage]) -> None:
        def tensor(operand: _Operand) -> torch.Tensor:
            return self._tensor(operand, helpers)

        for step in self._steps:
            args, kwargs = _tree_map(_Operand, tensor, (step.args, step.kwargs))
            out = step.func(*args, **kwargs)
            leaves = torch.utils._pytree.tree_leaves(out)
            for operand, result in zip(step.results, leaves, strict=False):
                if operand is None:
                    continue
                if self._alive(operand.storage) is None:
                    self._help(operand.storage, result.untyped_storage(), helpers)
                else:
                    tensor(operand).copy_(result)

    def _argument(self, value: torch.Tensor) -> Any:
        """Return the recorded form of an argument; a host number keeps its value."""
        storage = value.untyped_storage()
        is_hosts = not hasattr(storage, "_gpumem") and not self._knows(storage)
        if not is_hosts:
            return self._operand(value)
        return value.clone() if value.dim() == 0 else value

    def _operand(self, value: torch.Tensor) -> _Operand:
        return _Operand(
            self._number(value.untyped_storage()),
            value.dtype,
            value.size(),
            value.stride(),
            int(value.storage_offset()),
            value.is_conj(),
            value.is_neg(),
        )

    def _knows(self, storage: Any) -> bool:
        tape, _number = getattr(storage, "_gpumem_number", (None, 0))
        return tape is self

    def _number(self, storage: Any) -> int:
        if not self._knows(storage):
            before = getattr(storage, "_gpumem_number", None)
            if before is not None:
                tape, there = before
                tape._shared.add(there)
                self._origins[len(self._storages)] = before
            storage._gpumem_number = self, len(self._storages)
            self._storages.append(weakref.ref(storage))
            self._sizes.append(storage.nbytes())
        number: int = storage._gpumem_number[1]
        return number

    def _alive(self, number: int) -> torch.UntypedStorage | None:
        return living_storage(self._storages[number])

    def _help(
        self,
        number: int,
        storage: torch.UntypedStorage,
        helpers: dict[int, torch.UntypedStorage],
    ) -> None:
        """Use new memory for a deleted storage; keep it if another graph reads it."""
        helpers[number] = storage
        if number in self._shared:
            self._kept[number] = storage

    def _of_origin(self, number: int) -> torch.UntypedStorage | None:
        """Return the contents that an earlier graph has left in a deleted storage."""
        if number not in self._origins:
            return None
        tape, there = self._origins[number]
        found = tape._kept.get(there)
        return tape._of_origin(there) if found is None else found

    def _tensor(
        self, operand: _Operand, helpers: dict[int, torch.UntypedStorage]
    ) -> torch.Tensor:
        number = operand.storage
        storage = self._alive(number)
        if storage is None:
            storage = helpers.get(number)
        if storage is None:
            storage = self._of_origin(number)
        if storage is None:
            storage = torch.UntypedStorage(self._sizes[number])
            self._help(number, storage, helpers)
        value = torch.empty(0, dtype=operand.dtype, device="cpu")
        _set(value, storage, operand.offset, operand.size, operand.stride)
        value = value.conj() if operand.is_conj else value
        return torch._neg_view(value) if operand.is_neg else value


class Recorder(TorchDispatchMode):
    """Records host operators on a tape while the mode is active."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no type hints here
        self._tape = tape

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and record it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self._tape.keep(func, args, kwargs, out)
        return out
