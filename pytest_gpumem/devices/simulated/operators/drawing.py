"""Operators that draw random numbers.

That an operator draws is torch's own tag, ``nondeterministic_seeded``; how, where it
takes no generator, is in its record.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import COMPLEX, INTEGERS, lacking
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import Results
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.rng import draw_kept

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, Step
    from pytest_gpumem.devices.simulated.tensor import Handler


def dropout(source: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: FBT001  # the operator's signature
    """``dropout``: on a card one kernel, which keeps a mask of one byte a number."""
    if not train or p == 0 or source.numel() == 0:
        return source
    if p == 1:
        return source * torch.zeros_like(source)
    result: torch.Tensor = torch.ops.aten.native_dropout.default(source, p, train)[0]
    return result


register(
    "dropout",
    composed=only(dropout),
    source="Dropout.cpp, is_fused_kernel_acceptable",
)


def _native_dropout(
    generator: torch.Generator, args: Any, kwargs: dict[str, Any]
) -> Any:
    """``native_dropout``, whose kernel takes no generator."""
    source, p, train = args
    if train is False or source.numel() == 0:
        return torch.ops.aten.native_dropout(*args, **kwargs)  # draws nothing
    kept, factor = draw_kept(source.shape, p, generator)
    results = source.mul(kept).mul_(factor), kept
    if not kwargs:
        return results
    outs = kwargs["out0"], kwargs["out1"]
    for out, result in zip(outs, results, strict=True):
        out.resize_(result.shape).copy_(result)
    return outs


def _mask_first(_call: Call) -> Iterator[Step]:
    yield Results(1)


def _lacks_dropout(args: tuple[Any, ...]) -> str:
    """Name the kernel that is launched for numbers of floating point alone."""
    source, p, train = args
    is_launched = train is not False and p < 1 and not source.is_floating_point()
    return "fused_dropout" if is_launched else ""


register(
    "native_dropout",
    draw=_native_dropout,
    lacks=_lacks_dropout,
    requests=_mask_first,
    source="Dropout.cpp, native_dropout_cpu; cuda/Dropout.cu, dropout_cuda",
)


def _refusing_half(_func: Any, handler: Handler) -> Handler:
    """Refuse slopes in half precision, which the CPU does not draw."""

    def refusing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        if args[0].dtype is torch.float16:
            refuse("rrelu in half precision")
        return handler(args, kwargs)

    return refusing


register(
    "rrelu_with_noise rrelu_with_noise_",
    around=_refusing_half,
    source="cuda/RreluWithNoise.cu, rrelu_with_noise_out_cuda",
)
# They have the tag and draw nothing: the first one refuses dropout.
register(
    "_fused_sdp_choice _scaled_dot_product_flash_attention_for_cpu",
    draws_nothing=True,
    source="transformers/attention.cpp",
)
# Its bound is the host's: "high must be a scalar tensor and on CPU".
register("randint_like", takes_host=True, source="TensorFactories.cpp, randint_like")
register(
    "native_dropout_backward",
    lacks=lacking("masked_scale", INTEGERS | COMPLEX),
    source="cuda/Dropout.cu, dropout_backward_cuda",
)
