"""Matrix products, decompositions and norms."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.autograd import forward_ad

from pytest_gpumem.devices.simulated.kernel_types import (
    INTEGERS,
    SMALL_FLOATS,
    lacking,
)
from pytest_gpumem.devices.simulated.layouts import TWO_LAYOUTS
from pytest_gpumem.devices.simulated.operators.checks import check_of
from pytest_gpumem.devices.simulated.operators.composing import (
    by_formula,
    checked,
    into_out,
    on_host,
    only,
    packing,
    result_on_card,
)
from pytest_gpumem.devices.simulated.operators.reductions import norming
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    Workspace,
    copy_of,
    is_number,
)
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make
from pytest_gpumem.kernels.sort_memory import INDEX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pytest_gpumem.devices.simulated.operators.registry import Kernel
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep

_aten = torch.ops.aten

_HANDLE = "CUDABlas.cpp, getCurrentCUDABlasHandle"
_COMPOSED = "BatchLinearAlgebra.cpp and LinearAlgebra.cpp: helpers by tensor.options()"


#: Bytes of the address of one matrix.
_ADDRESS = 8


def _addresses(count: int, *, arrays: int) -> Iterator[RequestStep]:
    """Request the arrays of addresses through which cuBLAS gets a batch of matrices."""
    held = [Temporary(count * _ADDRESS) for _array in range(arrays)]
    yield from held
    yield from map(Free, held)


def _count(matrices: torch.Tensor) -> int:
    return math.prod(matrices.shape[:-2])


def _triangular(call: Call) -> Iterator[RequestStep]:
    """Request the addresses of the matrices and right sides of triangular solves."""
    yield Results()
    result: Any = call.results[0]
    if result.numel():
        count = _count(result)
        if count > _FEW or result.shape[-1] < _LARGE:
            yield from _addresses(count, arrays=2)


#: Up to this many matrices, of at least this many rows, are solved one at a time.
#: Source: ``triangular_solve_kernel``.
_FEW, _LARGE = 8, 64

for _names, _uses in (
    ("linalg_solve_triangular triangular_solve", True),
    ("linalg_lu_solve", False),
):
    register(
        _names,
        uses_cublas=_uses,
        requests=_triangular,
        source="cuda/linalg/BatchLinearAlgebra.cpp, triangular_solve_kernel; the handle: "
        "what torch 2.14 and 2.15 request on the substitute runtime of tests/cuda_host",
    )


def _cholesky_twice(call: Call) -> Iterator[RequestStep]:
    """Request the addresses for two triangular solves of a batch of matrices.

    The first solve uses the Cholesky factor, the second its transpose.
    """
    yield Results()
    result: Any = call.results[0]
    count = _count(result)
    if not result.numel() or count == 1:
        return
    if call.name == "cholesky_inverse":
        yield copy_of(result)
    for _triangle in range(2):
        yield from _addresses(count, arrays=2)


register(
    "cholesky_inverse cholesky_solve",
    requests=_cholesky_twice,
    source="cuda/linalg/BatchLinearAlgebra.cpp, _cholesky_solve_helper_cuda and "
    "cholesky_inverse_kernel_impl",
)


def _factorised(call: Call) -> Iterator[RequestStep]:
    """Request the memory to factorise a batch of matrices and to solve with the factors."""
    yield Results()
    source: torch.Tensor = call["A"]
    count = _count(source)
    if not source.numel() or count == 1:
        return
    if call.name == "linalg_inv_ex":
        yield copy_of(source)
        yield Temporary(count * source.shape[-1] * _PIVOT_BYTES)
    yield from _addresses(count, arrays=1)
    yield from _addresses(count, arrays=2)


_PIVOT_BYTES = 4

register(
    "linalg_inv_ex _linalg_solve_ex",
    requests=_factorised,
    source="cuda/linalg/BatchLinearAlgebra.cpp, lu_factor and lu_solve_kernel",
)


def _unpacking(call: Call) -> Iterator[RequestStep]:
    """Request the permutation that is made from the pivots of each matrix."""
    yield Results()
    source: torch.Tensor = call["LU_data" if call.name == "lu_unpack" else "A"]
    if call.get("unpack_pivots", True) and call.get("pivot", True):
        rows = source.shape[-2]
        yield Temporary(rows * INDEX_BYTES)
        if source.dim() > 2:  # noqa: PLR2004  # more than a matrix: a batch
            yield Temporary(_count(source) * rows * INDEX_BYTES)


def _factorising(call: Call) -> Iterator[RequestStep]:
    """Request the temporary pivots and status codes of an LU factorisation.

    The factors are stored in a result.
    """
    yield Results()
    source: torch.Tensor = call["A"]
    count = _count(source)
    yield Temporary(count * min(source.shape[-2:]) * _PIVOT_BYTES)
    yield Temporary(count * _PIVOT_BYTES)
    if source.numel() and count > 1:
        yield from _addresses(count, arrays=1)
    yield from _unpacking(call)


register(
    "linalg_lu",
    compute=packing,
    requests=_factorising,
    source="BatchLinearAlgebra.cpp, TORCH_IMPL_FUNC(linalg_lu_out)",
)
register(
    "lu_unpack",
    compute=packing,
    requests=_unpacking,
    source="BatchLinearAlgebra.cpp, TORCH_IMPL_FUNC(lu_unpack_out)",
)


def _checking_errors(call: Call) -> Iterator[RequestStep]:
    """Request the result of ``infos.any()``, which the host reads."""
    yield Temporary(1)
    if call["info"].numel() == 1:
        yield Temporary(1)


register(
    "_linalg_check_errors",
    requests=_checking_errors,
    source="BatchLinearAlgebra.cpp, _linalg_check_errors",
)


def _by_factors(call: Call) -> Iterator[RequestStep]:
    """Request the memory to compute a determinant from LU factors.

    It is the product of the factors' diagonal; its sign depends on the number of swapped
    rows.
    """
    yield Results()
    source: torch.Tensor = call["A"]
    count, size = _count(source), source.shape[-1]
    yield Temporary(count * _PIVOT_BYTES)  # status codes
    if source.numel() and count > 1:
        yield from _addresses(count, arrays=1)
    product = Temporary(count * source.itemsize)
    positions, are_swapped = Temporary(size * _PIVOT_BYTES), Temporary(count * size)
    numbers = Temporary(count * size * INDEX_BYTES)
    swaps = (
        *(positions, are_swapped, Temporary(count * INDEX_BYTES), numbers),
        *(Free(numbers), Free(are_swapped), Free(positions)),
    )
    if call.name == "_linalg_det":
        yield from (product, *swaps)
    else:
        yield from (*swaps, Temporary(count * size * source.itemsize), product)


register(
    "_linalg_det _linalg_slogdet",
    requests=_by_factors,
    source="LinearAlgebra.cpp, _linalg_det_out, _linalg_slogdet_out and lu_det_P",
)


def _matrix_power(source: torch.Tensor, n: int) -> torch.Tensor:
    """Run ``matrix_power``; C++ would create the identity matrix on the host."""
    if n == 0 and source.dim() > 1 and source.shape[-1] == source.shape[-2]:
        unit = torch.eye(source.shape[-2], dtype=source.dtype, device=source.device)
        return source.clone().copy_(unit)
    power: torch.Tensor = _aten.linalg_matrix_power.default.decompose(source, n)
    return power


register(
    "linalg_matrix_power",
    composed=only(_matrix_power),
    source="LinearAlgebra.cpp, linalg_matrix_power_impl",
)


def _as_wanted(func: Any) -> Kernel | None:
    """Compute products with a given result dtype; a card sums in single precision."""
    if "out_dtype" not in [each.name for each in func._schema.arguments]:
        return None
    inner = func.overloadpacket.default

    def compute(
        *args: Any, out_dtype: Any = None, out: Any = None, **options: Any
    ) -> Any:
        operands = [each for each in args if isinstance(each, torch.Tensor)]
        wanted = args[len(operands)] if out_dtype is None else out_dtype
        result = inner(*(each.to(wanted) for each in operands), **options)
        return result if out is None else out.resize_(result.shape).copy_(result)

    return compute


def _is_in_rows(matrix: torch.Tensor) -> bool | None:
    """Return whether a matrix is stored by rows; None if cuBLAS cannot read its layout.

    Source: ``prepare_matrix_for_cublas`` of ``aten/src/ATen/native/cuda/cuBlasCommonArgs.h``.
    """
    if matrix.is_contiguous():
        return True
    down, across = matrix.stride()
    if down == 1 and across >= max(1, matrix.shape[0]):
        return False
    if torch.ops.aten.is_non_overlapping_and_dense.default(matrix):
        return False
    return True if across == 1 and down >= max(1, matrix.shape[1]) else None


def _multiplying(call: Call) -> Iterable[RequestStep]:
    """Request copies of the operands that cuBLAS cannot read.

    It can conjugate only an operand that it also transposes. A result stored by rows is
    computed as a product of transposed operands, in reverse order. There is no product
    if the result or the first operand is empty.
    """
    result: Any = call.results[0]
    first, second = call.matrices
    if not result.numel() or not first.numel():
        return ()
    is_reversed = _is_in_rows(result) is not False
    copies = []
    for matrix in (second, first) if is_reversed else (first, second):
        in_rows = _is_in_rows(matrix)
        if in_rows is None or (matrix.is_conj() and in_rows is is_reversed):
            copies.append(copy_of(matrix))
    return (Results(), *copies) if copies else ()


def _is_copied_in_batch(matrix: torch.Tensor, rows: int, columns: int) -> bool:
    """Return whether a batch of matrices is copied: ``prepare_batch_matrix_for_cublas``.

    Args:
        matrix: The batch of matrices.
        rows: The smallest stride of the second to last dimension that cuBLAS can read if
            the last dimension has stride 1.
        columns: The smallest stride of the last dimension that cuBLAS can read if the
            second to last dimension has stride 1.
    """
    _batch, down, across = matrix.stride()
    if across == 1 and down >= max(1, rows):
        return matrix.is_conj()
    if down == 1 and across >= max(1, columns):
        return False
    return not (matrix.is_contiguous() and down and across) or matrix.is_conj()


def _multiplying_batches(call: Call) -> Iterable[RequestStep]:
    """Request copies of the batches of matrices whose layout cuBLAS cannot read."""
    first, second = call.matrices
    if not first.numel() or not second.numel():
        return ()
    inner = first.shape[2]
    copies = []
    if _is_copied_in_batch(second, second.shape[2], inner):
        copies.append(copy_of(second))
    if _is_copied_in_batch(first, inner, first.shape[1]):
        copies.append(copy_of(first))
    return (Results(), *copies) if copies else ()


#: Each group has the addresses of three matrices, three strides and a shape of three
#: numbers. Source: ``bf16bf16_grouped_gemm_impl_sm90_sm100``.
_ADDRESSES, _STRIDES_BYTES, _SHAPE_BYTES = 3, 3 * 8, 3 * 4
#: Bytes that CUTLASS keeps for each multiprocessor to update its descriptors between
#: groups, by the card's generation. 9: four descriptors of 128 bytes, as in
#: ``get_workspace_size`` of CUTLASS's ``sm90_mma_array_tma_gmma_ss_warpspecialized.hpp``
#: and ``sm90_epilogue_array_tma_warpspecialized.hpp``. 10: the bytes that torch 2.13
#: requests with 132, 148 and 160 multiprocessors, for small groups and for others.
_DESCRIPTORS_BYTES = {9: (512, 512), 10: (5376, 5888)}
#: Groups with this many rows or columns are small.
#: Source: ``dispatch_bf16_grouped_kernel_on_tile_size``.
_SMALL_GROUP = 128


def _multiplying_groups(call: Call) -> Iterator[RequestStep]:
    """Request what CUTLASS needs for products of groups in bfloat16, where it has a kernel.

    Elsewhere there is one product of cuBLAS for each group.
    """
    first, second, offsets = call["self"], call["mat2"], call["offs"]
    yield Results()
    per_processor = _DESCRIPTORS_BYTES.get(call.capability[0])
    if per_processor is None or first.dtype is not torch.bfloat16:
        yield Workspace()
        return
    rows, columns = first.shape[-2], second.shape[-1]
    if first.dim() == second.dim():
        count = first.shape[0] if offsets is None else offsets.shape[0]
    elif first.dim() < second.dim():
        count = second.shape[0]
        rows //= count
    else:
        count = first.shape[0]
        columns //= count
    even = count + count % 2
    numbers = count * (_STRIDES_BYTES + _SHAPE_BYTES)
    yield Temporary(even * _ADDRESSES * _ADDRESS + numbers)
    small, large = per_processor
    is_small = rows <= _SMALL_GROUP or columns <= _SMALL_GROUP
    yield Temporary(call.processors.count * (small if is_small else large))


def _grouped(func: Any) -> Kernel:
    """Return products of groups in any dtype, also if no values are kept.

    Source: ``create_grouped_gemm_output_tensor`` of ``GroupedMMUtils.h``: a row takes a
    multiple of 16 bytes. torch's own rule for results without values takes bfloat16 only.
    """

    def compute(
        first: torch.Tensor,
        second: torch.Tensor,
        offs: torch.Tensor | None = None,
        *others: Any,
        **options: Any,
    ) -> Any:
        if not first.is_meta or first.dtype is torch.bfloat16:
            return func(first, second, offs, *others, **options)
        rows, columns = first.shape[-2], second.shape[-1]
        shape = [rows, columns]
        if first.dim() == second.dim():
            shape.insert(0, first.shape[0] if offs is None else offs.shape[0])
        aligned = 16 // first.itemsize
        padded = -(-columns // aligned) * aligned
        strides = (rows * padded, padded, 1)[-len(shape) :]
        return torch.empty_strided(shape, strides, dtype=first.dtype, device="meta")

    return compute


register(
    "_grouped_mm",
    requests=_multiplying_groups,
    compute=_grouped,
    source="cuda/GroupedBlas.cpp, _grouped_mm_cuda; cuda/GroupMM.cu; GroupedMMUtils.h, "
    "_grouped_mm_fallback",
)


def _multiplied(args: tuple[Any, ...]) -> str:
    """Name the missing kernel for integer matrices; unequal dtypes are refused before."""
    is_added = len(args) > 2 and isinstance(args[2], torch.Tensor)  # noqa: PLR2004  # the third argument is a matrix
    first, second = args[1:3] if is_added else args[:2]
    is_same = first.dtype == second.dtype
    return "addmm_cuda" if is_same and first.dtype in _UNMULTIPLIED else ""


#: Dtypes that cuBLAS does not multiply here. Source: ``addmm_out_cuda_impl`` and others of
#: ``cuda/Blas.cpp``, which have kernels for floating types of 16 bits and more.
_UNMULTIPLIED: Final = INTEGERS | SMALL_FLOATS


for _names, _lacks, _rule, _check in (
    ("addmm mm", _multiplied, _multiplying, None),
    ("addmv", lacking("addmv_impl_cuda", _UNMULTIPLIED), None, None),
    # It makes a result beside the vector, and calls addmv_.
    (
        "mv",
        lacking("addmv_impl_cuda", _UNMULTIPLIED),
        None,
        check_of("addmv_", ("self", "mat"), (1, 0)),
    ),
    ("baddbmm bmm", lacking("baddbmm_cuda", _UNMULTIPLIED), _multiplying_batches, None),
):
    register(
        _names,
        uses_cublas=True,
        requests=_rule,
        compute=_as_wanted,
        lacks=_lacks,
        check=_check,
        source=f"{_HANDLE}; cuda/Blas.cpp",
    )
register(
    "_addmm_activation",
    uses_cublas=True,
    source=f"{_HANDLE}; cuda/Blas.cpp, addmm_out_cuda_impl",
)
for _name in ("dot", "vdot"):
    register(
        _name,
        uses_cublas=True,
        lacks=lacking(
            "dot", _UNMULTIPLIED
        ),  # also for vdot, which calls dot for real numbers
        source=f"{_HANDLE}; cuda/Blas.cpp, {_name}_cuda",
    )
register(
    "addr_",
    check=check_of("out_addr_out", ("self", "vec1", "vec2")),
    source="LinearAlgebra.cpp, addr_: addr_out",
)
register(
    "addbmm",
    uses_cublas=True,
    resizes=True,
    lacks=lacking("addmm_cuda", _UNMULTIPLIED),
    source="LinearAlgebra.cpp, addbmm_impl_",
)


def _matrices(source: Any, weight: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a contiguous operand, and the transposed weight of its layer.

    If nothing records operators, these views are created without operators, because
    otherwise half of a layer's cost would be its views.
    """
    shape = (math.prod(source.shape[:-1]), source.shape[-1])
    is_recorded = (
        torch.is_grad_enabled()
        or forward_ad._current_level >= 0  # no public API
        or torch._C._len_torch_dispatch_stack()  # no public API
        or torch._C._autograd._profiler_enabled()  # no public API
        or TWO_LAYOUTS
    )
    if is_recorded or not type(source) is type(weight) is SimulatedTensor:
        return source.view(shape), weight.t()
    rows, columns = source._gpumem_value.view(shape), weight._gpumem_value.t()
    return make(rows, source._gpumem_card), make(columns, weight._gpumem_card)


def _linear(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Run ``linear``; for a subclass of Tensor, C++ would add the bias out of place."""
    count = source.dim()
    if bias is not None and count == 2:  # noqa: PLR2004  # dimensions of a matrix
        return torch.addmm(bias, source, weight.t())
    shape = (*source.shape[:-1], weight.shape[0])
    if bias is not None and source.is_contiguous():
        return torch.addmm(bias, *_matrices(source, weight)).view(shape)
    # Source: ``should_fold``, for a weight that requires gradients.
    if count > 2 and weight.requires_grad and weight.dim() == 2:  # noqa: PLR2004  # dimensions of a matrix
        rows = source.reshape(-1, source.shape[-1]) if source.numel() else source
        product: torch.Tensor = rows.matmul(weight.t())
        product = _aten._unsafe_view.default(product, shape)
    else:
        product = source.matmul(weight.t())
    if bias is None:
        return product
    is_dual = forward_ad._current_level >= 0  # no public API
    return product.add(bias) if is_dual else product.add_(bias)


register(
    "linear",
    composed=only(_linear),
    source="Linear.cpp, linear; LinearAlgebra.cpp, should_fold",
)


def _summing_diagonal(call: Call) -> Iterator[RequestStep]:
    """Request the memory to sum a diagonal; booleans are converted to integers first."""
    yield Results()
    source: torch.Tensor = call["self"]
    if source.dtype is torch.bool:
        yield Temporary(min(source.shape) * INDEX_BYTES)


def _trace(source: torch.Tensor) -> torch.Tensor:
    """Run ``trace``; a card also supports booleans."""
    if source.dtype is torch.bool and source.dim() == 2:  # noqa: PLR2004  # dimensions of a matrix
        return source.diagonal().sum()
    return torch.trace(source)


register(
    "trace",
    requests=_summing_diagonal,
    compute=only(_trace),
    source="cuda/TriangularOps.cu, trace_cuda",
)


def _is_true(number: torch.Tensor) -> bool:
    """Read a boolean as ``is_scalar_tensor_true`` does."""
    return torch.equal(number, number.new_ones((), dtype=torch.bool))


def _cov(func: Any) -> Kernel:
    """Return the kernel of ``cov``; without weights, C++ would use host tensors."""

    def kernel(
        source: torch.Tensor,
        *,
        correction: int = 1,
        fweights: torch.Tensor | None = None,
        aweights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        is_plain = fweights is None and aweights is None
        if not is_plain or source.dim() > 2 or source.dtype is torch.bool:  # noqa: PLR2004  # dimensions of a matrix
            result: torch.Tensor = func.decompose(
                source, correction=correction, fweights=fweights, aweights=aweights
            )
            return result
        rows = source.view(1, -1) if source.dim() < 2 else source  # noqa: PLR2004  # dimensions of a matrix
        count = rows.shape[1]
        total = rows.new_full((), count, dtype=torch.int64)
        mean = rows.sum(1) / total
        factor = rows.new_full((), count - correction, dtype=torch.int64)
        if _is_true(factor.le(0)):
            warnings.warn(
                "cov(): degrees of freedom is <= 0. Correction should be strictly less "
                "than the number of observations.",
                stacklevel=2,
            )
            factor.zero_()
        rows = rows - mean.unsqueeze(1)
        product = torch.mm(rows, rows.t().conj())
        # Each element times its own conjugate.
        if product.is_complex() and 1 in rows.shape:
            real = product.real
            product = torch.complex(real, torch.zeros_like(real))
        return torch.true_divide(product, factor).squeeze()

    return kernel


def _chain(_func: Any, tensors: list[torch.Tensor]) -> None:
    """Compare the devices of the matrices with the device of the first one."""
    first = tensors[0].device
    for number, each in enumerate(tensors):
        if each.device != first:
            raise RuntimeError(
                "multi_dot(): all tensors must be on the same device but tensor 0 is on "
                f"{first} and tensor {number} on {each.device}"
            )


register(
    "linalg_multi_dot",
    composed=checked(_chain, "default"),
    source="LinearAlgebra.cpp, multi_dot_impl",
)
register(
    "chain_matmul",
    composed=checked(_chain, "default"),
    source="LinearAlgebra.cpp, chain_matmul",
)


def _inner(_func: Any, source: torch.Tensor, other: torch.Tensor) -> None:
    kinds = [each.device.type for each in (source, other)]
    if kinds[0] != kinds[1]:
        raise RuntimeError(
            f"Expected tensor to have {kinds[0]} DeviceType, but got tensor with "
            f"{kinds[1]} DeviceType (while checking arguments for inner())"
        )


register(
    "inner", composed=checked(_inner, "default"), source="LinearAlgebra.cpp, inner"
)
register("cov", composed=_cov, source="Correlation.cpp, cov")

# -- decompositions -------------------------------------------------------------------

register(
    """
    inverse linalg_cholesky linalg_det linalg_inv linalg_ldl_factor linalg_lu_factor
    linalg_slogdet
    """,
    composed=into_out,
    source=_COMPOSED,
)


def _needs_vectors(source: torch.Tensor) -> bool:
    """Return whether a gradient may be needed; C++ assumes this for any subclass."""
    is_dual = forward_ad._current_level >= 0  # no public API
    return is_dual or (source.requires_grad and torch.is_grad_enabled())


def _eigvalsh(source: torch.Tensor, UPLO: str = "L") -> torch.Tensor:  # noqa: N803  # the operator's signature
    values: torch.Tensor = _aten._linalg_eigh(source, UPLO, _needs_vectors(source))[0]
    return values


def _svd(func: Any) -> Kernel:
    """Return a decomposition that accepts cuSOLVER's drivers; the CPU has none."""

    def kernel(*args: Any, driver: str | None = None, **out: Any) -> Any:
        if driver not in {None, "gesvd", "gesvdj", "gesvda"}:
            raise RuntimeError(
                f"torch.linalg.svd: unknown svd driver {driver} in svd_cusolver "
                "computation. Check doc at "
                "https://pytorch.org/docs/stable/generated/torch.linalg.svd.html"
            )
        return func(*args, **out)

    return kernel


register(
    "_linalg_svd",
    compute=_svd,
    source="linalg/BatchLinearAlgebraLib.cpp, svd_cusolver",
)


def _svdvals(source: torch.Tensor, *, driver: str | None = None) -> torch.Tensor:
    vectors = _needs_vectors(source)
    values: torch.Tensor = _aten._linalg_svd(source, False, vectors, driver=driver)[1]
    return values


for _name, _values in (("linalg_eigvalsh", _eigvalsh), ("linalg_svdvals", _svdvals)):
    register(
        _name,
        composed=lambda func, values=_values: into_out(func) or values,
        source="BatchLinearAlgebra.cpp, _may_require_fw_or_bw_grad",
    )
register(
    "linalg_matrix_rank",
    composed=lambda func: into_out(func, casts=True) or on_host(func),
    in_slices=True,
    source=_COMPOSED,
)
register("linalg_cond linalg_matrix_norm", composed=result_on_card, source=_COMPOSED)


def _tolerances(call: Call) -> Iterator[RequestStep]:
    """Request a tensor on the card for each tolerance that is missing or a number."""
    for name in ("atol", "rtol"):
        given = call[name]
        if given is None or is_number(given):
            yield Temporary(torch.float64.itemsize)


# C++ creates tensors from numbers on the host.
register(
    "linalg_pinv",
    requests=lambda call: (
        _tolerances(call) if call.overload == "atol_rtol_tensor" else ()
    ),
    takes_host=True,
    source="LinearAlgebra.cpp, get_atol_rtol",
)
register("vander", composed=on_host, source=_COMPOSED)


def _reflecting(func: Any) -> Kernel | None:
    """Compute tangents on the host: their formula makes several tensors there."""
    host, formula = on_host(func), by_formula(func)

    def kernel(*args: Any, **options: Any) -> Any:
        has_tangents = forward_ad._current_level >= 0  # no public API
        return (host if has_tangents else formula)(*args, **options)

    return into_out(func) or kernel


register(
    "linalg_householder_product",
    formula=_reflecting,
    source="FunctionsManual.cpp, householder_product_jvp",
)

# The CPU's kernels ignore the strides of ``out=`` and write outside its memory.
register("tril triu", compute=packing, source="cuda/TriangularOps.cu")

# -- norms and distances --------------------------------------------------------------

register(
    "norm",
    requests=norming,
    source="cuda/ReduceNormKernel.cu, norm_kernel_cuda",
)
