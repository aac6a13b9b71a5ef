"""Products of matrices with elements of 8 bits, which not every card can compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import (
    require_type,
    type_name,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.devices.simulated.typed import IN_CPP

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.tensor import Handler

_TOO_OLD = (
    "torch._scaled_mm is only supported on CUDA devices with compute capability "
    ">= 9.0 or 8.9, or ROCm MI300+"
)


def _refusing(check: Callable[[dict[str, Any]], None]) -> Any:
    """Return a wrapper of handlers that checks operands which are all on a card."""

    def around(func: Any, handler: Handler) -> Handler:
        names = [each.name for each in func._schema.arguments]

        def checked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            tensors = [
                each for each in given.values() if isinstance(each, torch.Tensor)
            ]
            if all(isinstance(each, SimulatedTensor) for each in tensors):
                check(given)
            try:
                return handler(args, kwargs)
            except ValueError as error:  # the CPU's class of error
                raise RuntimeError(str(error)) from None

        return checked

    return around


def _capability(matrix: Any) -> tuple[int, int]:
    found: tuple[int, int] = matrix._gpumem_card.card.compute_capability
    return found


def _check_second(given: dict[str, Any]) -> None:
    """Check what ``torch.nn.functional.scaled_mm`` calls.

    Raises:
        NotImplementedError: The card is too old (torch's message).
    """
    if _capability(given["self"]) < (8, 9):
        raise NotImplementedError(_TOO_OLD)


def _check_scaled(given: dict[str, Any]) -> None:
    """Check a product of matrices in float8.

    Raises:
        RuntimeError: The card or cuBLASLt does not support it (torch's message).
        ValueError: There is no kernel for these types (torch's message).
    """
    first, second = given["self"], given["mat2"]
    capability = _capability(first)
    if capability < (8, 9):
        raise RuntimeError(_TOO_OLD)
    if first.dim() != 2 or second.dim() != 2:  # noqa: PLR2004  # dimensions of a matrix
        return  # the CPU's code says the same
    _check_sizes(first, second, given.get("scale_result"), given.get("bias"))
    if first.dtype == second.dtype == torch.float8_e5m2:
        raise ValueError("Multiplication of two Float8_e5m2 matrices is not supported")
    kind = given.get("out_dtype") or (
        given["out"].dtype if given.get("out") is not None else first.dtype
    )
    if given.get("bias") is not None:
        _check_bias(given["bias"], kind)
    by_rows = given["scale_a"].numel() > 1 and given["scale_b"].numel() > 1
    if by_rows and capability == (8, 9) and kind not in _HALVES:
        raise ValueError(
            "Only bf16 and fp16 high precision output types are supported for row-wise "
            "scaling."
        )
    is_by_columns = first.stride(1) == 1 and second.stride(0) == 1
    if capability == (9, 0) and not is_by_columns and first.numel():
        raise RuntimeError(
            "Only multiplication of row-major and column-major matrices is supported by "
            "cuBLASLt"
        )


def _check_sizes(first: Any, second: Any, result_scale: Any, bias: Any) -> None:
    inner, columns = second.shape
    if first.shape[1] != inner:
        raise RuntimeError(
            "mat1 and mat2 shapes cannot be multiplied "
            f"({first.shape[0]}x{first.shape[1]} and {inner}x{columns})"
        )
    if result_scale is not None and (
        result_scale.numel() != 1 or result_scale.dtype != torch.float32
    ):
        raise RuntimeError("scale_result must be a float scalar")
    if bias is not None and bias.numel() != columns:
        raise RuntimeError(f"Bias must be size {columns} but got {bias.numel()}")
    if inner % 16:
        raise RuntimeError(
            "Expected trailing dimension of mat1 to be divisible by 16 but got mat1 "
            f"shape: ({first.shape[0]}x{inner})."
        )
    if columns % 16:
        raise RuntimeError(f"mat2 shape ({inner}x{columns}) must be divisible by 16")


_HALVES = (torch.bfloat16, torch.float16)


def _check_bias(bias: torch.Tensor, kind: torch.dtype) -> None:
    if kind == torch.float32:
        raise RuntimeError("Bias is not supported when out_dtype is set to Float32")
    name = type_name(bias.dtype)
    if bias.dtype not in _HALVES:
        raise RuntimeError(f"Bias must be BFloat16 or Half, but got {name}")
    if kind in _HALVES and kind != bias.dtype:
        wanted = "Float16" if kind == torch.float16 else "BFloat16"
        raise RuntimeError(
            f"Bias must be {wanted} to compute {type_name(kind)} output, but got {name}"
        )


def _check_integers(given: dict[str, Any]) -> None:
    """Check a product of matrices of bytes.

    Raises:
        RuntimeError: cuBLASLt does not support these sizes or dtypes (torch's message).
    """
    first, second = given["self"], given["mat2"]
    for name, each in (("self", first), ("mat2", second)):
        if each.dim() != 2:  # noqa: PLR2004  # dimensions of a matrix
            raise RuntimeError(
                f"Expected {name} to be of dimension 2 but got {each.dim()}"
            )
    rows, inner = first.shape
    if rows <= 16:  # noqa: PLR2004  # the limit in torch's message
        raise RuntimeError(f"self.size(0) needs to be greater than 16, but got {rows}")
    if not inner or inner % 8:
        raise RuntimeError(
            "self.size(1) needs to be greater than 0 and a multiple of 8, but got "
            f"{inner}"
        )
    if inner != second.shape[0]:
        raise RuntimeError(
            f"self.size(1) needs to match mat2.size(0) but got {inner} and "
            f"{second.shape[0]}"
        )
    columns = second.shape[1]
    if not columns or columns % 8:
        raise RuntimeError(
            "mat2.size(1) needs to be greater than 0 and a multiple of 8, but got "
            f"{columns}"
        )
    out = given.get("out")
    if out is not None and out.dtype != torch.int32:
        raise RuntimeError(
            "Expected result dtype to be of type kInt but got "
            f"{IN_CPP.get(out.dtype, out.dtype)}"
        )
    require_type(torch.int8, first, second)


register(
    "_scaled_mm",
    around=_refusing(_check_scaled),
    source="cuda/ScaledBlas.cpp, _scaled_mm_out_cuda",
)
register(
    "_scaled_mm_v2",
    around=_refusing(_check_second),
    source="cuda/ScaledBlas.cpp, _scaled_mm_cuda_v2_out",
)
register(
    "_int_mm",
    around=_refusing(_check_integers),
    source="cuda/Blas.cpp, _int_mm_out_cuda",
)
