"""Optimizers of PyTorch's own test database: each of their implementations, two steps."""

from __future__ import annotations

import zlib
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

VALUES: Final = "computed"
#: Its many products take long in half precision, and no value decides what it asks for.
WITHOUT_VALUES: Final = ("Muon",)
CARDS: Final = (("8.0", 108),)
_DTYPES: Final = (torch.float32, torch.float16, torch.bfloat16)
#: Shapes of the parameters: small and large ones, and one without elements.
_SHAPES: Final = ((300, 100), (300,), (7, 5, 3), (), (512, 600), (0,))
_FLAGS: Final = ("foreach", "fused", "capturable", "differentiable")


@cache
def _optimizers() -> dict[str, Any]:
    from torch_databases import optim_db

    return {
        _name(each): each for each in optim_db if not each.only_supports_sparse_grads
    }


def _name(info: Any) -> str:
    return str(info.optim_cls.__name__)


def groups() -> list[str]:
    """Return every optimizer in every type."""
    return [
        f"{name} {str(dtype).removeprefix('torch.')}"
        for dtype in _DTYPES
        for name in _optimizers()
    ]


def cases(group: str) -> Iterator[Case]:
    """Yield an optimizer's settings by each of its implementations."""
    name, _blank, dtype = group.rpartition(" ")
    info = _optimizers()[name]
    made = [each for each in info.optim_inputs_func("cuda") if _is_plain(each.kwargs)]
    implementations = {"loop": {"foreach": False}, "default": {}}
    if "foreach" in info.supported_impls:
        implementations["foreach"] = {"foreach": True}
    if "fused" in info.supported_impls:
        implementations["fused"] = {"fused": True}
    for implementation, flags in implementations.items():
        if implementation == "loop" and "foreach" not in info.supported_impls:
            continue
        for number, each in enumerate(made):
            settings = {**each.kwargs, **flags}
            mark = zlib.crc32(f"{sorted(settings.items())} {_SHAPES}".encode())
            yield Case(
                f"{implementation} {number}",
                mark,
                partial(_run, info.optim_cls, settings, getattr(torch, dtype)),
            )


def _is_plain(settings: dict[str, Any]) -> bool:
    return not any(settings.get(flag) for flag in _FLAGS) and not any(
        isinstance(each, torch.Tensor) for each in settings.values()
    )


def _run(kind: Any, settings: dict[str, Any], dtype: torch.dtype, notes: Notes) -> None:
    shapes: tuple[tuple[int, ...], ...] = _SHAPES
    if kind.__name__ == "Muon":
        shapes = tuple(each for each in _SHAPES if len(each) == 2)  # matrices
    parameters = [
        torch.ones(shape, dtype=dtype, device="cuda").requires_grad_()
        for shape in shapes
    ]
    optimizer = kind(parameters, **settings)
    for step in ("first step", "second step"):
        for each in parameters:
            each.grad = torch.ones_like(each)
        with notes.phase(step):
            optimizer.step(parameters[0].sum)
        with notes.phase(f"zeroed after the {step}"):
            optimizer.zero_grad()
