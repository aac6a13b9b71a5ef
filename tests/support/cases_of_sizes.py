"""Common operators at the sizes that models have, forward and backward.

The samples of PyTorch's test database are small: most blocks are of 512 bytes, and no
reduction is split. These are not.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from allocator_requests import Notes

VALUES: Final = "none"
CARDS: Final = (("8.0", 108), ("7.5", 40))
_DTYPES: Final = ("float32", "float16", "bfloat16")
_SHAPES: Final = ((256, 1024), (8, 128, 768), (1 << 20,), (4, 33, 5001), (16, 30522))

#: One tensor in, one out.
_UNARY: Final[dict[str, Callable[[Any], Any]]] = {
    **{
        name: getattr(torch, name)
        for name in (
            "abs",
            "cos",
            "erf",
            "exp",
            "expm1",
            "log",
            "log1p",
            "neg",
            "reciprocal",
            "relu",
            "rsqrt",
            "sigmoid",
            "sign",
            "sin",
            "sqrt",
            "square",
            "tanh",
        )
    },
    **{
        name: getattr(functional, name)
        for name in (
            "celu",
            "elu",
            "gelu",
            "hardsigmoid",
            "hardswish",
            "hardtanh",
            "leaky_relu",
            "logsigmoid",
            "mish",
            "relu6",
            "selu",
            "silu",
            "softplus",
            "softsign",
        )
    },
    "gelu tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "glu": lambda x: functional.glu(x[..., : x.shape[-1] // 2 * 2]),
    "dropout": lambda x: functional.dropout(x, 0.1),
    "clamp": lambda x: x.clamp(-1, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "pow 2": lambda x: x**2,
    "pow 3": lambda x: x**3,
    "pow 0.5": lambda x: x**0.5,
    "add": lambda x: x + x,
    "mul": lambda x: x * x,
    "div": lambda x: x / x,
    "sub a number": lambda x: 1 - x,
    "broadcast row": lambda x: x * x[..., :1],
    "broadcast column": lambda x: x + x[:1],
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 0, -1.0),
    "maximum": lambda x: torch.maximum(x, -x),
    "lerp": lambda x: torch.lerp(x, -x, 0.5),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "addcdiv": lambda x: torch.addcdiv(x, x, x),
    "cat": lambda x: torch.cat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "chunk": lambda x: x.chunk(2, -1)[0] * 2,
    "flip": lambda x: x.flip(0),
    "roll": lambda x: x.roll(1, 0),
    "repeat": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "contiguous": lambda x: x.transpose(0, -1).contiguous(),
    "transposed exp": lambda x: x.transpose(0, -1).exp(),
    "to float": lambda x: x.float(),
    "to half": lambda x: x.half(),
    "pad": lambda x: functional.pad(x, (1, 1)),
    "tril": lambda x: x.tril() if x.dim() > 1 else x + 0,
    "unfold": lambda x: x.unfold(-1, 4, 2) * 2,
    **{
        f"{name} {dim}": partial(lambda f, d, x: f(x, d), getattr(torch, name), dim)
        for name in ("softmax", "log_softmax", "cumsum", "cumprod", "logsumexp")
        for dim in (0, -1)
    },
    **{
        f"{name} {dim}": partial(lambda f, d, x: f(x, d)[0], getattr(torch, name), dim)
        for name in ("sort", "max", "min", "median", "cummax", "mode", "var_mean")
        for dim in (0, -1)
        if name != "mode"
    },
    "topk": lambda x: x.topk(5)[0],
    "kthvalue": lambda x: x.kthvalue(3)[0],
    "argsort": lambda x: x.argsort(),
    "argmax": lambda x: x.argmax(-1),
    "argmax all": lambda x: x.argmax(),
    **{
        f"{name} {dim}": partial(lambda f, d, x: f(x, d), getattr(torch, name), dim)
        for name in ("sum", "mean", "amax", "amin", "std", "var", "nansum", "aminmax")
        for dim in (0, -1)
        if name != "aminmax"
    },
    **{
        f"{name} all": getattr(torch, name)
        for name in (
            "sum",
            "mean",
            "prod",
            "max",
            "min",
            "std",
            "var",
            "norm",
            "median",
            "any",
            "all",
            "amax",
            "nansum",
            "logsumexp",
        )
        if name != "logsumexp"
    },
    "prod 0": lambda x: x.prod(0),
    "prod -1": lambda x: x.prod(-1),
    "norm -1": lambda x: x.norm(dim=-1),
    "norm keepdim": lambda x: x.norm(dim=-1, keepdim=True),
    "norm 1": lambda x: x.norm(p=1),
    "normalize": lambda x: functional.normalize(x, dim=-1),
    "count_nonzero": lambda x: x.count_nonzero(-1),
    "layer_norm": lambda x: functional.layer_norm(x, x.shape[-1:]),
    "layer_norm weights": lambda x: functional.layer_norm(
        x,
        x.shape[-1:],
        x.flatten()[: x.shape[-1]].detach().clone().requires_grad_(),
        x.flatten()[: x.shape[-1]].detach().clone().requires_grad_(),
    ),
    "rms_norm": lambda x: functional.rms_norm(x, x.shape[-1:]),
    "matmul": lambda x: (
        x.reshape(-1, x.shape[-1])[:64] @ x.reshape(-1, x.shape[-1])[:64].T
    ),
    "linear": lambda x: functional.linear(
        x,
        torch.ones(32, x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True),
        torch.ones(32, dtype=x.dtype, device=x.device, requires_grad=True),
    ),
    "linear no bias": lambda x: functional.linear(
        x,
        torch.ones(32, x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True),
    ),
    "mse_loss": lambda x: functional.mse_loss(x, x.detach() * 2),
    "mse_loss sum": lambda x: functional.mse_loss(x, x.detach() * 2, reduction="sum"),
    "l1_loss": lambda x: functional.l1_loss(x, x.detach() * 2),
    "smooth_l1_loss": lambda x: functional.smooth_l1_loss(x, x.detach() * 2),
    "huber_loss": lambda x: functional.huber_loss(x, x.detach() * 2),
    "bce_with_logits": lambda x: functional.binary_cross_entropy_with_logits(
        x, x.detach() * 2
    ),
    "bce": lambda x: functional.binary_cross_entropy(x, x.detach()),
    "kl_div": lambda x: functional.kl_div(x, x.detach() * 2, reduction="batchmean"),
    "soft_margin_loss": lambda x: functional.soft_margin_loss(x, x.detach()),
    "cosine_similarity": lambda x: functional.cosine_similarity(
        x, x.detach() * 2, dim=-1
    ),
    "cross_entropy": lambda x: functional.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        torch.zeros(x.numel() // x.shape[-1], dtype=torch.long, device=x.device),
    ),
    "cross_entropy none": lambda x: functional.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        torch.zeros(x.numel() // x.shape[-1], dtype=torch.long, device=x.device),
        reduction="none",
    ),
    "cross_entropy smoothed": lambda x: functional.cross_entropy(
        x.reshape(-1, x.shape[-1]),
        torch.zeros(x.numel() // x.shape[-1], dtype=torch.long, device=x.device),
        label_smoothing=0.1,
    ),
    "cross_entropy of shares": lambda x: functional.cross_entropy(
        x.reshape(-1, x.shape[-1]), x.detach().reshape(-1, x.shape[-1])
    ),
    "gather": lambda x: x.gather(
        -1, torch.zeros(x.shape, dtype=torch.long, device=x.device)
    ),
    "scatter_add": lambda x: x.scatter_add(
        -1, torch.zeros(x.shape, dtype=torch.long, device=x.device), x.detach()
    ),
    "index_select": lambda x: x.index_select(
        0, torch.zeros(4, dtype=torch.long, device=x.device)
    ),
    "index": lambda x: x[torch.zeros(4, dtype=torch.long, device=x.device)],
    "index two": lambda x: x[
        (torch.zeros(400, dtype=torch.long, device=x.device),) * x.dim()
    ],
    "index_put accumulate": lambda x: (x * 1).index_put_(
        (torch.zeros(40, dtype=torch.long, device=x.device),),
        x.detach()[:1],
        accumulate=True,
    ),
    "index_add": lambda x: x.index_add(
        0, torch.zeros(1, dtype=torch.long, device=x.device), x.detach()[:1]
    ),
    "embedding": lambda x: functional.embedding(
        torch.zeros(8, 64, dtype=torch.long, device=x.device),
        x.reshape(-1, x.shape[-1]),
    ),
    "embedding large": lambda x: functional.embedding(
        torch.zeros(64, 128, dtype=torch.long, device=x.device),
        x.reshape(-1, x.shape[-1]),
    ),
    "embedding padded": lambda x: functional.embedding(
        torch.zeros(8, 64, dtype=torch.long, device=x.device),
        x.reshape(-1, x.shape[-1]),
        padding_idx=0,
    ),
    "embedding transposed": lambda x: functional.embedding(
        torch.zeros(8, 64, dtype=torch.long, device=x.device).T,
        x.reshape(-1, x.shape[-1]),
    ),
}


def groups() -> list[str]:
    """Return every operator in every type."""
    return [f"{name} {dtype}" for dtype in _DTYPES for name in _UNARY]


def cases(group: str) -> Iterator[Case]:
    """Yield shapes."""
    name, _blank, dtype = group.rpartition(" ")
    for shape in _SHAPES:
        words = "x".join(map(str, shape))
        yield Case(
            words,
            zlib.crc32(words.encode()),
            partial(_run, _UNARY[name], getattr(torch, dtype), shape),
        )


def _run(
    function: Any, dtype: torch.dtype, shape: tuple[int, ...], notes: Notes
) -> None:
    source = torch.ones(shape, dtype=dtype, device="cuda").requires_grad_()
    with notes.phase("forward"):
        result = function(source)
    if not result.requires_grad:
        return
    gradient = torch.ones_like(result)
    with notes.phase("backward"):
        result.backward(gradient)
