"""Elementwise operators."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.accumulation import (
    keeping,
    taking_over,
    with_accumulation,
    writing_losses,
)
from pytest_gpumem.devices.simulated.backward import in_backward
from pytest_gpumem.devices.simulated.kernel_types import HALVES, lacking
from pytest_gpumem.devices.simulated.operators.checks import (
    check_of_kernel,
    in_kernel,
    iterated,
    iterated_on_first,
    iterated_reversed,
    iterated_without_numbers,
)
from pytest_gpumem.devices.simulated.operators.composing import (
    into_out,
    on_cpu_alone,
    only,
    packing,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Lasting,
    Results,
    Sized,
    Temporary,
    copy_of,
    is_number,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep


register(
    "add",
    around=with_accumulation,
    source="input_buffer.cpp, accumulate",
)
register(
    "div mul sub",
    around=writing_losses,
    source="FunctionsManual.cpp, binary_cross_entropy_target_backward and "
    "binary_cross_entropy_with_logits_backward",
)
register(
    "neg",
    around=keeping,
    source="FunctionsManual.cpp, binary_cross_entropy_with_logits_target_backward",
)
register(
    "logical_and logical_or",
    around=taking_over,
    check=iterated_on_first,
    source="FunctionsManual.cpp, evenly_distribute_backward; BinaryOps.cpp, comparison_op",
)
register(
    "rsub", check=iterated_reversed, source="BinaryOps.cpp, rsub: at::sub(other, self)"
)
register("logical_xor", check=iterated_on_first, source="BinaryOps.cpp, comparison_op")
register(
    "addcdiv",
    check=iterated_without_numbers,
    source="PointwiseOps.cpp, TORCH_META_FUNC(addcdiv)",
)


def _addcmul(func: Any, operands: list[Operand]) -> None:
    """Check as ``TensorIterator`` does; only the last operand may be a host number."""
    iterated(func, operands)
    wrong = next((each.name for each in operands[:2] if not each.tensor.is_cuda), None)
    if wrong is not None:
        raise RuntimeError(
            f"CPU Scalar support for {wrong} argument is not supported when calling "
            "addcmul on CUDA tensors."
            + (
                " However, CPU Scalar support for tensor2 is supported, please swap your "
                "tensor1 and tensor2 terms."
                if wrong == "tensor1"
                else ""
            )
        )


register("addcmul", check=_addcmul, source="PointwiseOps.cpp, TORCH_META_FUNC(addcmul)")


def _lerp(func: Any, operands: list[Operand]) -> None:
    (in_kernel if func._overloadname.startswith("Scalar") else iterated)(func, operands)


register("lerp", check=_lerp, source="cuda/Lerp.cu, lerp_scalar_kernel")
register(
    "complex",
    check=check_of_kernel("out_complex_out", ("real", "imag")),
    source="TensorFactories.cpp, complex",
)
register(
    "polar",
    check=check_of_kernel("out_polar_out", ("abs", "angle")),
    source="TensorFactories.cpp, polar",
)
# C++ creates a buffer on the host.
register("log_sigmoid", composed=into_out, source="Activation.cpp, log_sigmoid_out")


def _without_buffer(_call: Call) -> Iterator[RequestStep]:
    """Request an empty buffer: only the CPU's kernel fills it."""
    yield Results(0)
    yield Sized(1, 0)


register(
    "log_sigmoid_forward",
    requests=_without_buffer,
    source="cuda/Activation.cpp, log_sigmoid_forward_out_cuda",
)


def _by_sizes(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``self.abs() == inf``; integers are always finite.

    For complex numbers, the real and the imaginary part are compared one after the other.
    """
    operand = call["self"]
    if operand.dtype.is_floating_point:
        yield copy_of(operand)
    elif operand.is_complex():
        real = operand.dtype.to_real()
        sizes = copy_of(operand, real)
        yield sizes
        yield Results()
        yield Free(sizes)
        yield copy_of(operand, real)
        yield copy_of(operand, torch.bool)


register("isinf", requests=_by_sizes, source="TensorCompare.cpp, isinf")


def _with_numbers(call: Call) -> Iterator[RequestStep]:
    """Request a tensor on the card for each number: C++ uses another tensor's options.

    A node of autograd may use such a tensor several times.
    """
    for name in ("self", "other"):
        if is_number(call.get(name)):
            number = call[name]
            yield Lasting(number) if in_backward() else Temporary(number.itemsize)


register(
    "where",
    requests=_with_numbers,
    check=partial(iterated, most=2),
    source="TensorCompare.cpp, where; FunctionsManual.cpp, scalar_tensor",
)
register(
    "mish_backward silu_backward",
    has_cuda_kernel=True,
    source="native_functions.yaml, CUDA beside CompositeImplicitAutograd",
)


def _complex_first(call: Call) -> Iterator[RequestStep]:
    """Request complex results for complex numbers; they are then converted to real ones."""
    if call["self"].is_complex():
        yield copy_of(call["self"])


register(
    "angle",
    requests=_complex_first,
    lacks=lacking("angle_cuda", HALVES),
    source="cuda/UnaryComplexKernels.cu, angle_kernel_cuda; UnaryOps.cpp, angle",
)
# The CPU's kernel ignores the strides of ``out=``.
register("gelu", compute=packing, source="cpu/Activation.cpp, GeluKernelImpl")
for _name in ("igamma", "igammac"):
    register(
        _name,
        lacks=lacking(f"{_name}_cuda", HALVES),
        source=f"cuda/IGammaKernel.cu, {_name}_kernel_cuda",
    )
register(
    "_add_relu",
    composed=on_cpu_alone,
    source="native_functions.yaml, dispatch: CPU",
)


def _abs(source: torch.Tensor, **out: torch.Tensor) -> torch.Tensor:
    """Run ``abs``; a card also supports booleans, which it returns unchanged."""
    compute = torch.sign if source.dtype is torch.bool else torch.abs
    return compute(source, **out)


def _becoming_real(call: Call) -> Iterator[RequestStep]:
    """Request the results, and for complex numbers also complex results."""
    yield Results()
    if call["self"].is_complex():
        yield copy_of(call["self"])


register(
    "abs",
    requests=_becoming_real,
    compute=lambda _func: _abs,
    source=(
        "cuda/AbsKernel.cu, abs_kernel_cuda; UnaryOps.cpp, "
        "unary_op_impl_with_complex_to_float_out"
    ),
)


register(
    "abs_",
    compute=only(lambda it: it if it.dtype is torch.bool else it.abs_()),
    source="cuda/AbsKernel.cu, abs_kernel_cuda",
)


def _base_first(call: Call) -> Iterator[RequestStep]:
    """Request a tensor on the card for a base that is a number.

    With a base of 1, the result is only filled. A base of another dtype than the exponents
    is converted to their dtype first.
    """
    base = call["self"]
    result: Any = call.results[0]
    if not isinstance(base, torch.Tensor):
        if base != 1:
            yield Results()
            yield Temporary(_wrapped_bytes(base))
    elif call.overload == "Tensor_Scalar" and base.dtype is not result.dtype:
        yield copy_of(base, result.dtype)


def _wrapped_bytes(number: complex) -> int:
    """Return the bytes of a number as a tensor: ``scalar_to_tensor``."""
    return {bool: 1, complex: 16}.get(type(number), 8)


register(
    "pow",
    requests=_base_first,
    source="Pow.cpp, TORCH_IMPL_FUNC(pow_Scalar_out), TORCH_META_FUNC2(pow, "
    "Tensor_Scalar)",
)


def _scaling(call: Call) -> Iterator[RequestStep]:
    """Request the memory of ``self * pow(2.0, other)``."""
    other: torch.Tensor = call["other"]
    powers = copy_of(other, torch.result_type(other, 2.0))
    base = Temporary(_wrapped_bytes(2.0))
    yield from (powers, base, Free(base))
    yield Results()


register("ldexp", requests=_scaling, check=iterated, source="BinaryOps.cpp, ldexp")


def _by_products(call: Call) -> Iterator[RequestStep]:
    """Request the memory of the sum of ``lgamma`` of ``self`` plus several offsets."""
    result: Any = call.results[0]
    shifts = Temporary(call["p"] * result.itemsize)
    shifted = Temporary(call["p"] * result.numel() * result.itemsize)
    yield from (shifts, shifted, Free(shifts))
    yield Results()


register("mvlgamma", requests=_by_products, source="UnaryOps.cpp, mvlgamma")


def _comparing(call: Call) -> Iterator[RequestStep]:
    """Request ``(self == other).all()``, unless both tensors are the same memory."""
    first, second = call["self"], call["other"]
    if first.shape != second.shape or not first.numel():
        return
    if first.is_set_to(second):
        return
    yield copy_of(first, torch.bool)
    yield Temporary(1)


register("equal", requests=_comparing, source="cuda/Equal.cpp, cuda_equal")


def _allclose(
    source: torch.Tensor,
    other: torch.Tensor,
    rtol: float = 1e-05,
    atol: float = 1e-08,
    equal_nan: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
) -> bool:
    """Run ``allclose``, whose result of ``isclose`` is a tensor on the card."""
    close = torch.isclose(source, other, rtol, atol, equal_nan)
    return bool(close.all().item())


register("allclose", composed=only(_allclose), source="TensorCompare.cpp, allclose")


def _element_by_element(call: Call) -> Iterator[RequestStep]:
    """Request the comparisons with each test element: ``isin_default_kernel_gpu``.

    The operator takes this path if there are few test elements.
    """
    if call.overload != "Tensor_Tensor" or call["assume_unique"]:
        return
    elements, wanted = call["elements"], call["test_elements"]
    if wanted.numel() >= int(10.0 * elements.numel() ** 0.145):
        return
    yield Results()
    yield Temporary(elements.numel() * wanted.numel())
    yield Temporary(elements.numel())


register("isin", requests=_element_by_element, source="TensorCompare.cpp, isin_out")


def _fake_quantised(
    source: torch.Tensor, scale: Any, zero_point: Any, low: int, high: int
) -> Any:
    """Compose quantisation by a tensor scale; C++ would create a tensor on the host."""
    inner: Any = (
        torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams
    )
    switch = torch.ones(1, dtype=torch.int64, device=source.device)
    return inner(source, scale, zero_point, switch, low, high)[0]


register(
    "fake_quantize_per_tensor_affine",
    composed=only(_fake_quantised, "tensor_qparams"),
    source="quantized/FakeQuantPerTensorAffine.cpp, fake_quantize_per_tensor_affine",
)
