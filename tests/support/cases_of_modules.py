"""The modules of PyTorch's own test database, forward and backward, on their card."""

from __future__ import annotations

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
CARDS: Final = (("8.0", 108),)
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
#: Inputs of a module that are taken.
_INPUTS: Final = 8


@cache
def _modules() -> dict[str, Any]:
    from torch_databases import module_db

    return {each.name: each for each in module_db}


def groups() -> list[str]:
    """Return every module in every type that a card has it in."""
    return [
        f"{name} {str(dtype).removeprefix('torch.')}"
        for dtype in _DTYPES
        for name, module in _modules().items()
        if dtype in module.supported_dtypes("cuda")
    ]


def cases(group: str) -> Iterator[Case]:
    """Yield a module's inputs, in training and in evaluation."""
    name, _blank, word = group.rpartition(" ")
    module, dtype = _modules()[name], getattr(torch, word)
    for training in (True, False):
        torch.manual_seed(0)
        inputs = module.module_inputs_func(
            module, device="cpu", dtype=dtype, requires_grad=True, training=training
        )
        for number, each in enumerate(inputs[:_INPUTS]):
            if each.forward_input is None:
                continue
            state = "train" if training else "eval"
            leaves = pytree.tree_leaves(
                (each.forward_input.args, each.forward_input.kwargs)
            )
            words = [getattr(leaf, "shape", type(leaf)) for leaf in leaves]
            mark = zlib.crc32(f"{each.desc} {words}".encode())
            yield Case(
                f"{state} {number}", mark, partial(_run, module, each, training, dtype)
            )


def _up(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    there = value.detach().to("cuda")
    return there.requires_grad_() if value.requires_grad else there


def _run(
    info: Any,
    given: Any,
    training: bool,  # noqa: FBT001  # as the database passes it
    dtype: torch.dtype,
    notes: Notes,
) -> None:
    made, passed = given.constructor_input, given.forward_input
    options = {**made.kwargs, "dtype": dtype} if _takes_dtype(info) else made.kwargs
    module = info.module_cls(*made.args, **options)
    with notes.phase("load"):
        module.to("cuda", dtype)
    module.train(training)
    args, kwargs = pytree.tree_map(_up, (passed.args, passed.kwargs))
    # The substitute of the CUDA runtime has no cuDNN.
    with torch.backends.cudnn.flags(enabled=False), notes.phase("forward"):
        result = module(*args, **kwargs)
    results = [each for each in pytree.tree_leaves(result) if _is_grown(each)]
    leaves = [each for each in pytree.tree_leaves((args, kwargs)) if _is_grown(each)]
    if not results or not (leaves or list(module.parameters())):
        return
    gradients = [torch.ones_like(each) for each in results]
    del result
    with torch.backends.cudnn.flags(enabled=False), notes.phase("backward"):
        torch.autograd.backward(results, gradients)


def _takes_dtype(info: Any) -> bool:
    return "dtype" in info.module_cls.__init__.__code__.co_varnames


def _is_grown(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad
