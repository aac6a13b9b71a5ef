"""Operators whose operand, and whose gradient, lie in memory in other orders.

By rows, with the first two dimensions exchanged in memory, or with the channels last.
What a card copies because of that is what these cases are about; the operators of
PyTorch's own database have few of them.
"""

from __future__ import annotations

import itertools
import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from allocator_requests import Notes

VALUES: Final = "computed"
CARDS: Final = (("8.0", 108),)
_DTYPES: Final = ("float32", "bfloat16")
_ROWS: Final = (8, 16, 32)
_IMAGES: Final = (4, 16, 8, 8)


def _weights(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=like.dtype, device="cuda").requires_grad_()


def _places(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device="cuda")


def _layer_norm(x: torch.Tensor) -> torch.Tensor:
    return functional.layer_norm(x, (32,), _weights(x, 32), _weights(x, 32))


def _rms_norm(x: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, (32,), _weights(x, 32))


def _group_norm(x: torch.Tensor) -> torch.Tensor:
    return functional.group_norm(x, 4, _weights(x, 16), _weights(x, 16))


def _instance_norm(x: torch.Tensor) -> torch.Tensor:
    scale, shift = _weights(x, 16), _weights(x, 16)
    return functional.instance_norm(x, None, None, scale, shift)


def _linear(x: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, _weights(x, 24, 32), _weights(x, 24))


def _cross_entropy(x: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(x.reshape(-1, 32), _places(128))


def _pad(x: torch.Tensor) -> torch.Tensor:
    return functional.pad(x, (1, 1, 1, 1), mode="reflect")


def _attention(x: torch.Tensor) -> torch.Tensor:
    heads = x[:, None]
    return functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)


def _resized(mode: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: functional.interpolate(x, scale_factor=2, mode=mode)


#: Shape of the operand, and what is done with it.
_OPERATORS: Final[dict[str, tuple[tuple[int, ...], Callable[..., Any]]]] = {
    "layer_norm": (_ROWS, _layer_norm),
    "rms_norm": (_ROWS, _rms_norm),
    "softmax -1": (_ROWS, lambda x: x.softmax(-1)),
    "softmax 1": (_ROWS, lambda x: x.softmax(1)),
    "log_softmax": (_ROWS, lambda x: x.log_softmax(-1)),
    "gelu": (_ROWS, functional.gelu),
    "silu": (_ROWS, functional.silu),
    "glu": (_ROWS, functional.glu),
    "sum": (_ROWS, lambda x: x.sum(0)),
    "mean": (_ROWS, lambda x: x.mean(-1)),
    "var": (_ROWS, lambda x: x.var(-1)),
    "cumsum": (_ROWS, lambda x: x.cumsum(1)),
    "sort": (_ROWS, lambda x: x.sort(-1)[0]),
    "topk": (_ROWS, lambda x: x.topk(4)[0]),
    "max": (_ROWS, lambda x: x.max(1)[0]),
    "logsumexp": (_ROWS, lambda x: x.logsumexp(1)),
    "dropout": (_ROWS, functional.dropout),
    "linear": (_ROWS, _linear),
    "matmul": (_ROWS, lambda x: x @ _weights(x, 32, 24)),
    "bmm": (_ROWS, lambda x: x @ _weights(x, 8, 32, 24)),
    "einsum": (_ROWS, lambda x: torch.einsum("abc,adc->abd", x, x)),
    "cross_entropy": (_ROWS, _cross_entropy),
    "mse_loss": (_ROWS, lambda x: functional.mse_loss(x, torch.zeros_like(x))),
    "gather": (_ROWS, lambda x: x.gather(1, _places(8, 4, 32))),
    "index_select": (_ROWS, lambda x: x.index_select(1, _places(4))),
    "index": (_ROWS, lambda x: x[:, _places(4)]),
    "scatter_add": (
        _ROWS,
        lambda x: torch.zeros_like(x).scatter_add(1, _places(8, 16, 32), x),
    ),
    "cat": (_ROWS, lambda x: torch.cat([x, x], 1)),
    "roll": (_ROWS, lambda x: x.roll(1, 1)),
    "roll two": (_ROWS, lambda x: x.roll((1, 2), (0, 1))),
    "flip": (_ROWS, lambda x: x.flip(1)),
    "repeat": (_ROWS, lambda x: x.repeat(2, 1, 1)),
    "norm": (_ROWS, lambda x: x.norm(dim=-1)),
    "normalize": (_ROWS, functional.normalize),
    "prelu": (_ROWS, lambda x: functional.prelu(x, _weights(x, 16))),
    "where": (_ROWS, lambda x: torch.where(x > 0, x, 0.0)),
    "masked_fill": (_ROWS, lambda x: x.masked_fill(x > 0, 0.0)),
    "attention": (_ROWS, _attention),
    "group_norm": (_IMAGES, _group_norm),
    "instance_norm": (_IMAGES, _instance_norm),
    "max_pool2d": (_IMAGES, lambda x: functional.max_pool2d(x, 2)),
    "avg_pool2d": (_IMAGES, lambda x: functional.avg_pool2d(x, 2)),
    "adaptive_avg_pool2d 3": (_IMAGES, lambda x: functional.adaptive_avg_pool2d(x, 3)),
    "adaptive_avg_pool2d 1": (_IMAGES, lambda x: functional.adaptive_avg_pool2d(x, 1)),
    "interpolate bilinear": (_IMAGES, _resized("bilinear")),
    "interpolate nearest": (_IMAGES, _resized("nearest")),
    "interpolate bicubic": (_IMAGES, _resized("bicubic")),
    "pixel_shuffle": (_IMAGES, lambda x: functional.pixel_shuffle(x, 2)),
    "unfold": (_IMAGES, lambda x: functional.unfold(x, 3)),
    "pad": (_IMAGES, _pad),
}


def _by_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous()


def _exchanged(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _channels_last(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


_LAYOUTS: Final = {
    "rows": _by_rows,
    "exchanged": _exchanged,
    "channels last": _channels_last,
}


def groups() -> list[str]:
    """Return every operator in every type."""
    return [f"{name} {dtype}" for dtype in _DTYPES for name in _OPERATORS]


def cases(group: str) -> Iterator[Case]:
    """Yield the layouts of an operand and of the gradient."""
    name, _blank, dtype = group.rpartition(" ")
    shape, function = _OPERATORS[name]
    layouts = list(_LAYOUTS) if shape == _IMAGES else ["rows", "exchanged"]
    for operand, gradient in itertools.product(layouts, repeat=2):
        words = f"{operand}, {gradient}"
        run = partial(_run, function, shape, getattr(torch, dtype), operand, gradient)
        yield Case(words, zlib.crc32(f"{group} {shape} {words}".encode()), run)


def _run(  # noqa: PLR0917  # bound once, in ``cases``
    function: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    operand: str,
    gradient: str,
    notes: Notes,
) -> None:
    """Run one case, forward and backward; a gradient without such a layout is by rows."""
    ones = torch.ones(shape, dtype=dtype, device="cuda")
    source = _LAYOUTS[operand](ones).requires_grad_()
    del ones
    with notes.phase("forward"):
        result = function(source)
    grad = torch.ones_like(result, memory_format=torch.contiguous_format)
    dims = {"rows": 0, "exchanged": 2, "channels last": 4}[gradient]
    if grad.dim() == dims or (dims == 2 and grad.dim() > dims):
        grad = _LAYOUTS[gradient](grad)
    with notes.phase("backward"):
        found = torch.autograd.grad(result, source, grad)
    del found
