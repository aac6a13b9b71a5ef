"""``torch.use_deterministic_algorithms``: a card's list of operators, not the CPU's.

Source: the callers of ``alertNotDeterministic`` in ``aten/src/ATen/native/cuda``, and
``alertCuBLASConfigNotDeterministic`` of ``aten/src/ATen/Context.cpp``, torch 2.13.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.tensor import Handler

#: What each operator says that it is, by packet name.
NONDETERMINISTIC: Final[dict[str, str]] = {
    "_adaptive_avg_pool2d_backward": "adaptive_avg_pool2d_backward_cuda",
    "_adaptive_avg_pool3d_backward": "adaptive_avg_pool3d_backward_cuda",
    "_ctc_loss_backward": "ctc_loss_backward_gpu",
    "adaptive_max_pool2d_backward": "adaptive_max_pool2d_backward_cuda",
    "avg_pool3d_backward": "avg_pool3d_backward_cuda",
    "cumsum": "cumsum_cuda_kernel",
    "cumsum_": "cumsum_cuda_kernel",
    "fractional_max_pool2d_backward": "fractional_max_pool2d_backward_cuda",
    "fractional_max_pool3d_backward": "fractional_max_pool3d_backward_cuda",
    "grid_sampler_2d_backward": "grid_sampler_2d_backward_cuda",
    "grid_sampler_3d_backward": "grid_sampler_3d_backward_cuda",
    "histc": "_histc_cuda",
    "kthvalue": "kthvalue CUDA",
    "max_pool3d_with_indices_backward": "max_pool3d_with_indices_backward_cuda",
    "median": "median CUDA with indices output",
    "nanmedian": "median CUDA with indices output",
    "nll_loss2d_backward": "nll_loss2d_backward_out_cuda_template",
    "nll_loss2d_forward": "nll_loss2d_forward_out_cuda_template",
    "reflection_pad1d_backward": "reflection_pad1d_backward_out_cuda",
    "reflection_pad2d_backward": "reflection_pad2d_backward_cuda",
    "reflection_pad3d_backward": "reflection_pad3d_backward_out_cuda",
    "replication_pad1d_backward": "replication_pad1d_backward_cuda",
    "replication_pad2d_backward": "replication_pad2d_backward_cuda",
    "replication_pad3d_backward": "replication_pad3d_backward_cuda",
    "upsample_bicubic2d_backward": "upsample_bicubic2d_backward_out_cuda",
    "upsample_bilinear2d_backward": "upsample_bilinear2d_backward_out_cuda",
    "upsample_linear1d_backward": "upsample_linear1d_backward_out_cuda",
    "upsample_trilinear3d_backward": "upsample_trilinear3d_backward_out_cuda",
}

#: What ``CUBLAS_WORKSPACE_CONFIG`` may say for cuBLAS to be deterministic.
_CUBLAS_SETTINGS: Final = (":4096:8", ":16:8")


def with_alert(func: Any, handler: Handler) -> Handler:
    """Return a handler that alerts where a card has no deterministic way to run."""
    caller = NONDETERMINISTIC.get(func.overloadpacket.__name__)
    returns_indices = len(func._schema.returns) > 1  # it has no public name
    if caller is None or (caller.startswith("median") and not returns_indices):
        return handler
    is_sum = caller.startswith("cumsum")

    def alerting(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        if torch.are_deterministic_algorithms_enabled() and not (
            is_sum and not (args[0].is_floating_point() or args[0].is_complex())
        ):
            _alert(caller)
        return handler(args, kwargs)

    return alerting


def _alert(caller: str) -> None:
    """Raise, or warn, as ``Context::alertNotDeterministic`` does."""
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(
            f"{caller} does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True, warn_only=True)'. You can file an "
            "issue at https://github.com/pytorch/pytorch/issues to help us prioritize "
            "adding deterministic support for this operation.",
            stacklevel=5,
        )
        return
    raise RuntimeError(
        f"{caller} does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just "
        "for this operation, or you can use the 'warn_only=True' option, if that's "
        "acceptable for your application. You can also file an issue at "
        "https://github.com/pytorch/pytorch/issues to help us prioritize adding "
        "deterministic support for this operation."
    )


def check_cublas() -> None:
    """Raise, or warn, where cuBLAS is not set up to be deterministic.

    Raises:
        RuntimeError: With torch's text.
    """
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") in _CUBLAS_SETTINGS:
        return
    text = (
        "Deterministic behavior was enabled with either "
        "`torch.use_deterministic_algorithms(True)` or "
        "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not "
        "deterministic because it uses CuBLAS and you have CUDA >= 10.2. To enable "
        "deterministic behavior in this case, you must set an environment variable "
        "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or "
        "CUBLAS_WORKSPACE_CONFIG=:16:8. For more information, go to "
        "https://docs.nvidia.com/cuda/cublas/index.html#results-reproducibility"
    )
    if torch.is_deterministic_algorithms_warn_only_enabled():
        warnings.warn(text, stacklevel=5)
        return
    raise RuntimeError(text)
