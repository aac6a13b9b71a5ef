"""The error texts of a card for wrong operands, if the CPU's kernel has another text.

The values are computed by kernels of the CPU, and so an error about dtypes comes from
them. On a card the same call raises the same class of error, but the text names the card's
kernel. Tests, and handlers of errors, look at such texts. An index out of bounds is an
``IndexError`` on the CPU, and a failed assertion on a card.

Source: the errors that the CUDA code of torch 2.13.0 raised for a sample of every operator
of PyTorch's database in each dtype that its kernel lacks, and for wrong calls that people
make. They are recorded in ``tests/recordings/refusals``.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The name of a card's kernel in error texts, by the name of the CPU's kernel.
_KERNELS: Final = {
    "GeluKernelImpl": "GeluCUDAKernelImpl",
    "_segment_reduce_cpu": "segment_reduce_cuda",
    "adaptive_avg_pool2d": "adaptive_avg_pool2d_cuda",
    "adaptive_max_pool2d": "adaptive_max_pool2d_cuda",
    "addcmul_cpu_out": "addcmul_cuda",
    "avg_pool2d": "avg_pool2d_out_cuda_frame",
    "avg_pool3d_out_frame": "avg_pool3d_out_cuda",
    "batch_norm": "batch_norm_stats_cuda",
    "binary_cross_entropy": "binary_cross_entropy_out_cuda",
    "cdist": "cdist_cuda",
    "cholesky_cpu": "cholesky_cusolver",
    "cholesky_inverse_out_cpu": "cholesky_cuda_potrs",
    "cholesky_solve_cpu": "cholesky_cuda_potrs",
    "cross": "cross_cuda",
    "ctc_loss_cpu": "ctc_loss_cuda",
    "cumprod_out_cpu": "cumprod_cuda",
    "cumsum_out_cpu": "cumsum_cuda",
    "digamma": "digamma_cuda",
    "fractional_max_pool2d_out_frame": "fractional_max_pool2d_out_cuda_frame",
    "ge_cpu": "compare_cuda",
    "grid_sampler_2d_cpu_kernel_impl": "grid_sampler_2d_cuda",
    "grid_sampler3d_cpu": "grid_sampler_3d_cuda",
    "gt_cpu": "compare_cuda",
    "index_func_": "index_reduce",
    "ldl_factor_kernel_cpu": "ldl_factor_looped_cusolver",
    "ldl_solve_kernel_cpu": "ldl_solve_looped_cusolver",
    "le_cpu": "compare_cuda",
    "lerp_kernel_scalar": "lerp_cuda",
    "lerp_kernel_tensor": "lerp_cuda",
    "linalg_eig_out_cpu": "linalg_eig_cuda",
    "log_sigmoid_cpu": "log_sigmoid_forward_cuda",
    "log_softmax_kernel_impl": "host_softmax",
    "log_softmax_lastdim_kernel_impl": "host_softmax",
    "logcumsumexp_out_cpu": "logcumsumexp_cuda",
    "lt_cpu": "compare_cuda",
    "max_all": "max_all_cuda",
    "median_out": "median_out_impl",
    "max_pool2d": "max_pool2d_with_indices_out_cuda_frame",
    "max_pool3d": "max_pool3d_with_indices_out_frame",
    "max_unpool2d": "max_unpooling2d_forward_kernel",
    "max_unpool3d": "max_unpooling3d_forward_kernel",
    "maximum_cpu": "max_elementwise_cuda",
    "min_all": "min_all_cuda",
    "minimum_cpu": "min_elementwise_cuda",
    "mode_cpu": "cuda_mode",
    "multi_margin_loss_cpu_kernel": "multi_margin_loss_cuda",
    "multilabel_margin_loss_forward_out_frame": "multilabel_margin_loss_forward_kernel",
    "nll_loss_out_frame": "nll_loss_forward_no_reduce_cuda_kernel",
    "ormqr_cpu": "orgmr_cuda",
    "polygamma": "polygamma_cuda",
    "pow": "pow_cuda",
    "reflection_pad1d": "reflection_pad1d_out",
    "replication_pad1d": "replication_pad1d_cuda",
    "replication_pad2d": "replication_pad2d_cuda",
    "rms_norm": "LayerNormKernelImpl",
    "softmax_kernel_impl": "host_softmax",
    "softmax_lastdim_kernel_impl": "host_softmax",
    "trigamma": "trigamma_cuda",
}
#: Error texts of the CPU's kernels for a condition that a card's kernel asserts. A card's
#: kernel cannot raise an error; CUDA reports the failed assertion. Source:
#: ``CUDA_KERNEL_ASSERT`` in ``Indexing.cu``, ``IndexKernel.cu``,
#: ``ScatterGatherKernel.cu``, ``EmbeddingBag.cu``, ``Loss.cu``, ``NLLLoss2d.cu``,
#: ``MultiMarginLoss.cu``, ``MaxUnpooling.cu``, ``TensorCompare.cu``,
#: ``MultinomialKernel.cu`` and ``DistributionTemplates.h`` of
#: ``aten/src/ATen/native/cuda``.
_ASSERTED: Final = re.compile(
    r"(?:index_copy_\(\): )?index -?\d+ is out of bounds for dimension \d+ with size "
    r"|index out of range in self"
    r"|out of range: tried to access index "
    r"|Index \d+ of input takes value "
    r"|Target -?\d+ is out of bounds"
    r"|target out of range"
    r"|all elements of (?:input|target) should be between 0 and 1"
    r"|Found an invalid max index: "
    r"|Expected Tensor with single nonzero value, but got zero"
    r"|invalid multinomial distribution \(encountering "
    r"|Expected p_in >= 0 && p_in <= 1 "
)
_LACKS: Final = re.compile(r"\"([^\"]+)\" not implemented for ")
_REDUCES: Final = re.compile(r"scatter_gather_tensor_cpu_reduce_\w+")
#: The text of a shared check, which says "CPU" on a card as well.
#: Source: ``TORCH_META_FUNC`` of ``topk`` and ``sort`` in ``Sorting.cpp``.
_SPEAKS_OF_CPU: Final = re.compile(r" ?(Sort|topk) does not support \w+ dtypes on CPU")
#: Parts of texts, and their replacements on a card.
_PARTS: Final = (
    # cuda/Blas.cpp, addmm_out_cuda_impl
    (
        re.compile(r"expected m1 and m2 to have the same dtype"),
        "expected mat1 and mat2 to have the same dtype",
    ),
    # Tensor.toString, and the names of the callers of checkScalarTypes
    (
        re.compile(r"\bbut got torch\.(\w+Tensor) instead"),
        r"but got torch.cuda.\1 instead",
    ),
    (re.compile(r"arguments for embedding_bag\)"), "arguments for embedding_bag_cuda)"),
    (
        re.compile(r"arguments for ctc_loss_allocate_outputs\)"),
        "arguments for ctc_loss_gpu)",
    ),
)
#: The largest side of a matrix whose singular values come from the batched kernel.
#: Source: ``svd_cusolver`` of ``BatchLinearAlgebraLib.cpp``.
_BATCHED_SVD: Final = 32


def is_asserted(text: str) -> bool:
    """Tell whether a card's kernel asserts the condition of an error of the CPU's kernel.

    Args:
        text: The text of an error of the CPU's kernel.
    """
    return _ASSERTED.match(text) is not None


def on_card(func: Any, args: Sequence[Any], text: str) -> str | None:
    """Return a card's text for an error about dtypes; None for another kind of error.

    Args:
        func: The operator.
        args: Its positional arguments.
        text: The text of an error of the CPU's kernel.
    """
    lacking = _LACKS.match(text)
    if lacking:
        return text.replace(lacking[1], _kernel(func, args, lacking[1]), 1)
    if _SPEAKS_OF_CPU.match(text):
        return text
    changed = text
    for pattern, replacement in _PARTS:
        changed = pattern.sub(replacement, changed)
    return None if changed == text else changed


def _kernel(func: Any, args: Sequence[Any], name: str) -> str:
    """Return the name of a card's kernel.

    Args:
        func: The operator.
        args: Its positional arguments.
        name: The kernel of the CPU.
    """
    operator = func.overloadpacket.__name__.strip("_")
    if operator.startswith("upsample_") and not operator.endswith("backward"):
        # All filters with antialiasing share a kernel.
        kind = (
            "bilinear2d" if operator.endswith("_aa") else operator[len("upsample_") :]
        )
        return f"upsample_{kind.replace('nearest_exact', 'nearest')}_out_frame"
    if name == "lu_cpu":
        return _of_lu(*args[0].shape)
    if name == "linalg_svd_cpu":
        is_small = max(args[0].shape[-2:]) <= _BATCHED_SVD
        return "svd_cuda_gesvdjBatched" if is_small else "svd_cuda_gesvdj"
    if _REDUCES.fullmatch(name):
        return "cuda_scatter_gather_base_kernel_func"
    if name in _KERNELS:
        return _KERNELS[name]
    return name.replace("_vml_cpu", "_cuda").replace("_cpu", "_cuda", 1)


def _of_lu(*shape: int) -> str:
    """Return the name of the kernel that decomposes matrices of a shape.

    Source: ``lu_factor`` of ``BatchLinearAlgebra.cpp``.
    """
    batch, rows, columns = math.prod(shape[:-2]), *shape[-2:]
    is_small = rows <= 16 or (rows <= 128 and batch <= 16)  # noqa: PLR2004  # the limits in torch's source
    if rows != columns or not (batch == 1 or is_small):
        return "lu_factor_magma_batched"
    return "lu_factor_cusolver" if batch == 1 else "lu_factor_cublas"
