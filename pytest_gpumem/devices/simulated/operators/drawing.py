"""Operators that draw random numbers.

Torch marks an operator that draws with the tag ``nondeterministic_seeded``. If such an
operator takes no generator, its record says how it draws.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.kernel_types import (
    COMPLEX,
    HALVES,
    INTEGERS,
    lacking,
)
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.offsets import (
    for_a_constant,
    for_each,
    for_integers,
    for_mask,
    for_permutation,
    for_samples,
    for_shares,
    for_slopes,
)
from pytest_gpumem.devices.simulated.operators.reductions import scan_of
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    copy_of,
    suggested_format,
)
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.rng import draw_kept
from pytest_gpumem.devices.simulated.subclasses import are_transforms_active

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep
    from pytest_gpumem.devices.simulated.tensor import Handler


def dropout(source: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: FBT001  # the operator's signature
    """Run ``dropout``: one kernel on a card, with a mask of one byte per element."""
    if not train or p == 0 or source.numel() == 0:
        return source
    if p == 1:
        return _all_dropped(source)
    result: torch.Tensor = torch.ops.aten.native_dropout.default(source, p, train)[0]
    return result


def _all_dropped(source: torch.Tensor) -> torch.Tensor:
    """Return zeros by a product: C++ keeps the factor, a tensor, for backward."""
    return source * torch.zeros((), dtype=source.dtype, device=source.device)


def _dropping(func: Any) -> Any:
    """Compose a dropout; with ``p=1``, C++ would create a zero on the host."""
    if func._overloadname != "default" or func._schema.is_mutable:
        return None

    def kernel(source: torch.Tensor, p: float, train: bool) -> Any:  # noqa: FBT001  # the operator's signature
        if train and p == 1 and source.numel():
            return _all_dropped(source)
        return func.decompose(source, p, train)

    return kernel


register(
    "alpha_dropout feature_alpha_dropout feature_dropout",
    composed=_dropping,
    source="Dropout.cpp, _dropout_impl",
)
register(
    "dropout",
    composed=only(dropout),
    source="Dropout.cpp, is_fused_kernel_acceptable",
)


#: Constants of alpha dropout. Source: ``Dropout.cpp``, ``_dropout_impl``.
_ALPHA: Final = 1.7580993408473766


def _transformed(name: str) -> Any:
    """Return a dropout that ``torch.func`` can transform for a tensor on a card.

    C++ would create the noise on the host, because it takes the transformed tensor's
    device to be the host.

    Source: ``dropout_hack`` of ``aten/src/ATen/functorch/PyTorchOperatorHacks.cpp``.
    """
    original = getattr(torch, name)
    is_in_place, is_alpha = name.endswith("_"), "alpha" in name
    is_of_features, is_fused = "feature" in name, name == "dropout"

    @functools.wraps(original)
    def drop(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:  # noqa: A002, FBT001  # torch's signature
        is_seen = are_transforms_active() and train and 0 < p <= 1
        if not is_seen or not input.is_cuda or input.numel() == 0:
            result: torch.Tensor = original(input, p, train)
            return result
        if is_of_features and input.dim() < 2:  # noqa: PLR2004  # torch raises its error
            return original(input, p, train)  # type: ignore[no-any-return]  # torch raises its error
        multiply = input.mul_ if is_in_place else input.mul
        options: Any = {"dtype": input.dtype, "device": input.device}
        if p == 1:
            return multiply(torch.zeros((), **options))
        if is_fused:
            return torch.native_dropout(input, p, train)[0]
        if is_of_features:
            shaped = torch.empty(
                (*input.shape[:2], *(1 for _ in input.shape[2:])), **options
            )
        else:
            shaped = torch.empty((), **options).expand(input.shape)
        noise = torch.bernoulli(shaped, 1 - p)
        if not is_alpha:
            return multiply(noise.div_(1 - p))
        scale = ((_ALPHA**2 * p + 1) * (1 - p)) ** -0.5
        shift = noise.add(-1).mul_(_ALPHA * scale).add_(_ALPHA * scale * p)
        return multiply(noise.mul_(scale)).add_(shift)

    return drop


#: Replacements of the dropouts in ``torch`` and in ``torch._VF``.
DROPOUTS: Final[dict[str, Any]] = {
    each: _transformed(each)
    for name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
    for each in (name, f"{name}_")
}


def _native_dropout(
    generator: torch.Generator, args: Any, kwargs: dict[str, Any]
) -> Any:
    """Run ``native_dropout``, whose kernel takes no generator."""
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


def _mask_first(_call: Call) -> Iterator[RequestStep]:
    yield Results(1)


def _lacks_dropout(args: tuple[Any, ...]) -> str:
    """Return the name of the kernel that exists only for floating-point dtypes."""
    source, p, train = args
    is_launched = train is not False and p < 1 and not source.is_floating_point()
    return "fused_dropout" if is_launched else ""


register(
    "native_dropout",
    draw=_native_dropout,
    move=for_mask,
    lacks=_lacks_dropout,
    requests=_mask_first,
    source="Dropout.cpp, native_dropout_cpu; cuda/Dropout.cu, dropout_cuda",
)


def _refusing_half(_func: Any, handler: Handler) -> Handler:
    """Refuse random slopes in half precision, which the CPU cannot draw."""

    def refusing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].dtype is torch.float16:
            refuse("rrelu in half precision")
        return handler(args, kwargs)

    return refusing


register(
    "rrelu_with_noise rrelu_with_noise_ rrelu_with_noise_functional",
    around=_refusing_half,
    move=for_slopes,
    source="cuda/RreluWithNoise.cu, rrelu_with_noise_out_cuda",
)
# These operators have the tag but draw nothing: the first one refuses dropout.
register(
    "_fused_sdp_choice _scaled_dot_product_flash_attention_for_cpu",
    draws_nothing=True,
    source="transformers/attention.cpp",
)
# The bound must be on the host: "high must be a scalar tensor and on CPU".
register(
    "randint_like",
    takes_host=True,
    move=for_integers,
    source="TensorFactories.cpp, randint_like",
)


def _masking(grad: torch.Tensor, *args: Any) -> torch.Tensor:
    """Run ``native_dropout_backward``, whose result a card lays out by rows."""
    result: torch.Tensor = torch.ops.aten.native_dropout_backward.default(grad, *args)
    return result.contiguous(memory_format=suggested_format(grad))


register(
    "native_dropout_backward",
    compute=only(_masking),
    lacks=lacking("masked_scale", INTEGERS | COMPLEX),
    source="cuda/Dropout.cu, dropout_backward_cuda",
)


def _in_single_precision(call: Call) -> Iterator[RequestStep]:
    """Request probabilities in single precision if they are of half precision.

    Source: ``bernoulli_tensor_kernel``.
    """
    shares = call.get("p")
    shares = call["self"] if not isinstance(shares, torch.Tensor) else shares
    is_drawn_by_tensor = call.overload != "p" and not isinstance(call.get("p"), float)
    yield Results()
    if is_drawn_by_tensor and shares.dtype in HALVES:
        yield copy_of(shares, torch.float32)


def _moving_shares(func: Any, handler: Handler) -> Handler:
    """Return a handler that moves the probabilities to the result's device, and draws.

    Source: ``bernoulli_out`` of ``Distributions.cpp``, which fills the result in place;
    ``bernoulli_impl_`` of ``DistributionTemplates.h`` and ``bernoulli_tensor_kernel`` of
    ``cuda/DistributionBernoulli.cu``, which move the probabilities.
    """

    def drawing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        into, shares = kwargs.get("out", args[0]), args[-1]
        is_moved = (
            isinstance(shares, torch.Tensor)
            and shares.device != into.device
            and not (shares.is_meta or into.is_meta)
        )
        if not is_moved:
            return handler(args, kwargs)
        generator = kwargs.get("generator")
        into = into.resize_(shares.shape) if "out" in kwargs else into
        return into.bernoulli_(shares.to(into.device), generator=generator)

    return drawing if func._overloadname in {"out", "Tensor"} else handler


register(
    "bernoulli bernoulli_",
    move=for_shares,
    requests=_in_single_precision,
    around=_moving_shares,
    source="cuda/DistributionBernoulli.cu, bernoulli_tensor_kernel",
)


def _with_a_number(call: Call) -> Iterator[RequestStep]:
    """Request a tensor like the result for a mean or a deviation given as a number."""
    yield Results()
    result: Any = call.results[0]
    if call.overload in {"Tensor_float", "float_Tensor"}:
        yield copy_of(result)


register(
    "normal",
    move=for_each,
    requests=_with_a_number,
    source="DistributionTemplates.h, normal_out_impl",
)


def _by_running_sums(source: torch.Tensor) -> Iterator[RequestStep]:
    """Request the memory of draws with replacement.

    It holds normalised probabilities, their running sums, and the drawn numbers.
    """
    rows = [copy_of(source) for _each in range(3)]
    yield from rows
    if source.dim() == 1:
        yield from scan_of(source, 0, source.dtype)


def _by_race(call: Call) -> Iterator[RequestStep]:
    """Request the memory to draw samples without replacement, or a single sample.

    The samples are the indices of the largest quotients of probability and drawn number.
    """
    yield Results()
    source: torch.Tensor = call["self"]
    count = call["num_samples"]
    if call["replacement"] and count != 1:
        yield from _by_running_sums(source)
        return
    least, largest = Temporary(source.itemsize), Temporary(source.itemsize)
    is_finite, is_positive, is_valid = Temporary(1), Temporary(1), Temporary(1)
    yield from (largest, least, is_finite, is_positive, is_valid)
    yield from (Free(is_positive), Free(is_finite))
    rows = source.shape[0] if source.dim() > 1 else 1
    sums, are_zero = Temporary(rows * source.itemsize), Temporary(rows)
    yield from (sums, are_zero)
    if source.dim() > 1:
        is_any = Temporary(1)
        yield from (is_any, Free(are_zero))
    yield Free(sums)
    is_none = Temporary(1)
    yield from (is_none, Free(is_none))
    yield copy_of(source)
    if count > 1:
        yield Temporary(rows * count * source.itemsize)


register(
    "multinomial",
    move=for_samples,
    requests=_by_race,
    source="Distributions.cpp, multinomial_out",
)
register(
    "uniform cauchy exponential geometric log_normal normal_functional "
    "rand rand_like randn randn_like",
    move=for_each,
    source="cuda/DistributionTemplates.h, distribution_nullary_kernel",
)
register(
    "random randint",
    move=for_integers,
    source="cuda/DistributionTemplates.h, random_kernel and random_from_to_kernel",
)
register("randperm", move=for_permutation, source="cuda/Randperm.cu, randperm_out_cuda")
for _name, _count in (
    ("poisson", 20),
    ("binomial", 42),
    ("_standard_gamma _sample_dirichlet", 10),
):
    register(
        _name,
        move=for_a_constant(_count),
        source="cuda/Distributions.cu",
    )
