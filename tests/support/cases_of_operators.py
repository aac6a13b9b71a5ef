"""The operators of PyTorch's own test database as cases of what is asked of a card."""

from __future__ import annotations

import itertools
import random
import zlib
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

VALUES: Final = "computed"
#: Their kernels are a user's, in CUDA's language.
WITHOUT_VALUES: Final = ("jiterator",)
#: Compute capability and multiprocessors.
CARDS: Final = (("8.0", 108),)
DTYPES: Final = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.bool,
)
#: Samples of an operator that are taken, spread over all of them.
SAMPLES: Final = 6
#: Samples that an operator may make; some make thousands.
_MADE: Final = 200


@cache
def operators() -> dict[str, Any]:
    """Return the database by name and variant."""
    from torch_databases import op_db

    return {_name(each): each for each in op_db}


def _name(operator: Any) -> str:
    variant = operator.variant_test_name
    return f"{operator.name}.{variant}" if variant else str(operator.name)


def groups() -> list[str]:
    """Return every operator in every type that a card has it in."""
    return [
        f"{name} {str(dtype).removeprefix('torch.')}"
        for dtype in DTYPES
        for name, operator in operators().items()
        if dtype in operator.supported_dtypes("cuda")
    ]


def cases(group: str) -> Iterator[Case]:
    """Yield an operator's samples."""
    name, _blank, dtype = group.rpartition(" ")
    operator = operators()[name]
    for number, sample in _samples(operator, getattr(torch, dtype)):
        yield Case(str(number), _mark(sample), partial(_run, operator, sample))


def _has_gradient(operator: Any, dtype: torch.dtype) -> bool:
    is_real = dtype.is_floating_point or dtype.is_complex
    return is_real and operator.supports_autograd


def _samples(operator: Any, dtype: torch.dtype) -> list[tuple[int, Any]]:
    """Return an operator's samples on the host, with their numbers."""
    torch.manual_seed(0)
    random.seed(0)
    made = operator.sample_inputs(
        "cpu", dtype, requires_grad=_has_gradient(operator, dtype)
    )
    found = list(itertools.islice(made, _MADE))
    if len(found) <= SAMPLES:
        return list(enumerate(found))
    chosen = [each * len(found) // SAMPLES for each in range(SAMPLES)]
    return [(number, found[number]) for number in chosen]


def _mark(sample: Any) -> int:
    """Return a number by which a sample's shapes and settings are known again."""
    leaves = pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    words = [
        _described(each) if isinstance(each, torch.Tensor) else type(each).__name__
        for each in leaves
    ]
    return zlib.crc32(" ".join(words).encode())


def _described(tensor: torch.Tensor) -> str:
    if tensor.layout is not torch.strided:
        return f"{tuple(tensor.shape)} {tensor.layout} {tensor.dtype}"
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"


def _up(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        there = value.detach().to("cuda")
        return there.requires_grad_() if value.requires_grad else there
    is_place = isinstance(value, (torch.device, str))
    return "cuda" if is_place and str(value).split(":")[0] == "cpu" else value


def _run(operator: Any, sample: Any, notes: Notes) -> None:
    """Run one sample, forward and backward."""
    source, args, options = pytree.tree_map(
        _up, (sample.input, sample.args, sample.kwargs)
    )
    if "device" in options:
        options["device"] = "cuda"
    # The substitute of the CUDA runtime has no cuDNN.
    with torch.backends.cudnn.flags(enabled=False), notes.phase("forward"):
        result = operator.op(source, *args, **options)
    results = list(_differentiable(result))
    leaves = [each for each in _differentiable((source, args, options)) if each.is_leaf]
    if not results or not leaves:
        return
    gradients = [torch.ones_like(each) for each in results]
    del result
    with torch.backends.cudnn.flags(enabled=False), notes.phase("backward"):
        found = torch.autograd.grad(results, leaves, gradients, allow_unused=True)
    del found


def _differentiable(values: Any) -> Iterator[torch.Tensor]:
    for each in pytree.tree_leaves(values):
        if isinstance(each, torch.Tensor) and each.requires_grad:
            yield each
