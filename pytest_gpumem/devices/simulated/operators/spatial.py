"""Pooling, padding and resampling of images and signals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS, lacking
from pytest_gpumem.devices.simulated.operators.composing import (
    on_cpu_alone,
    on_host,
    only,
    widening,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Sized,
    Temporary,
    copy_of,
    packed,
    suggested_format,
)
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.kernels.sort_memory import INDEX_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep
    from pytest_gpumem.devices.simulated.tensor import Handler

#: Gradients that are summed atomically, with the name of the kernel in the error.
#: Source: the callers of ``alertNotDeterministic`` in ``aten/src/ATen/native/cuda``.
_ADDED_ATOMICALLY = {
    "_adaptive_avg_pool2d_backward": "adaptive_avg_pool2d_backward_cuda",
    "_adaptive_avg_pool3d_backward": "adaptive_avg_pool3d_backward_cuda",
    "_upsample_bicubic2d_aa_backward": "upsample_bicubic2d_aa_backward_out_cuda",
    "_upsample_bilinear2d_aa_backward": "upsample_bilinear2d_aa_backward_out_cuda",
    "adaptive_max_pool2d_backward": "adaptive_max_pool2d_backward_cuda",
    "avg_pool3d_backward": "avg_pool3d_backward_cuda",
    "fractional_max_pool2d_backward": "fractional_max_pool2d_backward_cuda",
    "fractional_max_pool3d_backward": "fractional_max_pool3d_backward_cuda",
    "grid_sampler_2d_backward": "grid_sampler_2d_backward_cuda",
    "grid_sampler_3d_backward": "grid_sampler_3d_backward_cuda",
    "max_pool3d_with_indices_backward": "max_pool3d_with_indices_backward_cuda",
    "reflection_pad1d_backward": "reflection_pad1d_backward_out_cuda",
    "reflection_pad3d_backward": "reflection_pad3d_backward_out_cuda",
    "replication_pad1d_backward": "replication_pad1d_backward_cuda",
    "replication_pad2d_backward": "replication_pad2d_backward_cuda",
    "replication_pad3d_backward": "replication_pad3d_backward_cuda",
    "upsample_bicubic2d_backward": "upsample_bicubic2d_backward_out_cuda",
    "upsample_bilinear2d_backward": "upsample_bilinear2d_backward_out_cuda",
    "upsample_linear1d_backward": "upsample_linear1d_backward_out_cuda",
    "upsample_trilinear3d_backward": "upsample_trilinear3d_backward_out_cuda",
}


def _dense(func: Any) -> Any:
    """Make the result contiguous, as on a card; the CPU keeps the operand's layout."""
    if func._overloadname != "default":
        return None
    return lambda *args, **options: func(*args, **options).contiguous()


def _unpooled(func: Any) -> Any:
    """Make the result of ``max_unpool`` contiguous; a card also supports integers."""
    dense = _dense(func)
    if dense is None:
        return None

    def compute(
        source: torch.Tensor, indices: torch.Tensor, size: Any, *args: Any
    ) -> torch.Tensor:
        made: torch.Tensor
        if source.dtype not in INTEGERS - {torch.bool}:
            made = dense(source, indices, size, *args)
            return made
        # This call gives the shape, and raises errors for wrong arguments.
        made = dense(source.double(), indices, size, *args).to(source.dtype).zero_()
        rows = (*source.shape[: -len(size)], -1)
        made.view(rows).scatter_(-1, indices.reshape(rows), source.reshape(rows))
        return made

    return compute


def _in_its_layout(call: Call) -> Iterator[RequestStep]:
    """Request an operand without gaps, by rows or channels last."""
    source: torch.Tensor = call["self"]
    yield Results()
    yield packed(source, suggested_format(source))


def _in_its_layout_backward(call: Call) -> Iterator[RequestStep]:
    """Request an operand without gaps, and a gradient and indices in its layout."""
    layout = suggested_format(call["self"])
    yield Results()
    for name in ("self", "grad_output", "indices"):
        yield packed(call.get(name), layout)


def _by_rows(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous operand."""
    yield Results()
    yield packed(call["self"])


def _by_rows_backward(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous gradient."""
    yield Results()
    yield packed(call["grad_output"])


def _resampling_backward(call: Call) -> Iterator[RequestStep]:
    """Request a gradient without gaps, by rows or channels last."""
    grad: torch.Tensor = call["grad_output"]
    yield Results()
    yield packed(grad, suggested_format(grad))


def _averaging(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous operand first, unless its channels are last."""
    source: torch.Tensor = call["self"]
    if suggested_format(source) is not torch.channels_last:
        yield packed(source)
    yield Results()


def _averaging_backward(call: Call) -> Iterator[RequestStep]:
    """Request a contiguous gradient, unless the operand's channels are last."""
    yield Results()
    if suggested_format(call["self"]) is not torch.channels_last:
        yield packed(call["grad_output"])


_ATOMIC_REQUESTS = {
    "_adaptive_avg_pool2d_backward": _averaging_backward,
    "upsample_bicubic2d_backward": _by_rows_backward,
    "upsample_bilinear2d_backward": _resampling_backward,
}
_ATOMIC_VALUES = {
    "_upsample_bicubic2d_aa_backward": widening,
    "_upsample_bilinear2d_aa_backward": widening,
    "avg_pool3d_backward": widening,
}
for _name, _caller in _ADDED_ATOMICALLY.items():
    register(
        _name,
        alert=_caller,
        requests=_ATOMIC_REQUESTS.get(_name),
        compute=_ATOMIC_VALUES.get(_name),
        source=f"alertNotDeterministic in {_caller}",
    )
register(
    "reflection_pad2d_backward",
    requests=_by_rows_backward,
    compute=_dense,
    source="cuda/ReflectionPad.cu, reflection_pad2d_backward_out_template",
)
register(
    "_adaptive_avg_pool2d",
    requests=_averaging,
    source="cuda/AdaptiveAveragePooling.cu, adaptive_avg_pool2d_out_cuda_template",
)
register(
    "reflection_pad2d",
    requests=_by_rows,
    compute=_dense,
    source="cuda/ReflectionPad.cu, reflection_pad2d_out_template",
)
register(
    "upsample_nearest2d",
    requests=_in_its_layout,
    source="cuda/UpSampleNearest2d.cu, upsample_nearest2d_out_cuda_template",
)
register(
    "upsample_nearest2d_backward",
    requests=_resampling_backward,
    source="cuda/UpSampleNearest2d.cu, upsample_nearest2d_backward_out_cuda_template",
)
register(
    "avg_pool2d_backward max_pool2d_with_indices_backward",
    requests=_in_its_layout_backward,
    source="cuda/AveragePool2d.cu, TORCH_IMPL_FUNC(avg_pool2d_backward_out_cuda); "
    "cuda/DilatedMaxPool2d.cu, "
    "TORCH_IMPL_FUNC(max_pool2d_with_indices_backward_out_cuda)",
)


def _shuffling(source: torch.Tensor, factor: int) -> torch.Tensor:
    """Run ``pixel_shuffle`` by rows; only the CPU has a kernel for channels last."""
    return torch.pixel_shuffle(source.contiguous(), factor)


register(
    "pixel_shuffle",
    compute=only(_shuffling),
    source="PixelShuffle.cpp, math_pixel_shuffle",
)


def _with_positions(call: Call) -> Iterator[RequestStep]:
    """Request indices of the covered positions if the windows overlap."""
    yield Results()
    sizes, dim = call["input_sizes"], call["dim"]
    if sizes and call["step"] < call["size"]:
        dim %= len(sizes)
        windows = call["grad_in"].shape[dim]
        reached = (windows - 1) * call["step"] + call["size"]
        yield Temporary(min(sizes[dim], reached) * INDEX_BYTES)


register(
    "unfold_backward",
    requests=_with_positions,
    source="UnfoldBackward.h, _make_unfold_backward_iter_over_grad_out",
)


def _growing(call: Call) -> Iterator[RequestStep]:
    """Request a result of the operand's size; it is enlarged if necessary, never shrunk."""
    source: torch.Tensor = call["self"]
    result: Any = call.results[0]
    nbytes, wanted = (each.numel() * each.itemsize for each in (source, result))
    if nbytes >= wanted:
        yield Sized(0, nbytes)
        yield packed(source)
    else:
        small = Temporary(nbytes)
        yield from (small, packed(source))
        yield Results()
        yield Free(small)


register("im2col", requests=_growing, source="cuda/Im2Col.cu, im2col_cuda")
register("col2im", requests=_by_rows, source="cuda/Col2Im.cu, col2im_out_cuda_template")


def _in_a_row(call: Call) -> Iterator[RequestStep]:
    """Request copies of operands that are not contiguous first."""
    copies = [
        copy_of(each)
        for each in (call["self"], call["indices"])
        if not each.is_contiguous()
    ]
    yield from copies
    yield Results()


register(
    "max_unpool2d max_unpool3d",
    requests=_in_a_row,
    compute=_unpooled,
    source="cuda/MaxUnpooling.cu, max_unpooling2d_forward_out_cuda",
)

for _names, _kernel, _file in (
    ("avg_pool1d avg_pool2d", "avg_pool2d_out_cuda_frame", "AveragePool2d.cu"),
    (
        "max_pool2d_with_indices",
        "max_pool2d_with_indices_out_cuda_frame",
        "DilatedMaxPool2d.cu",
    ),
    (
        "max_pool3d_with_indices",
        "max_pool3d_with_indices_out_frame",
        "DilatedMaxPool3d.cu",
    ),
):
    register(
        _names,
        requests=None if "3d" in _names else _in_its_layout,
        lacks=lacking(_kernel, INTEGERS),
        source=f"cuda/{_file}",
    )
register(
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa",
    compute=widening,
    source="cuda/UpSampleBilinear2d.cu, upsample_gen2d_aa_out_frame",
)
register(
    "_upsample_lanczos2d_aa",
    composed=on_cpu_alone,
    source="native_functions.yaml, _upsample_lanczos2d_aa",
)
register(
    "avg_pool3d",
    compute=widening,
    lacks=lacking("avg_pool3d_out_cuda", INTEGERS),
    source="cuda/AveragePool3d.cu, avg_pool3d_out_cuda",
)


def _transforming(func: Any) -> Any:
    """Compute with half precision refused: C++ accepts it only on cards, for cuFFT."""

    def kernel(source: torch.Tensor, *args: Any, **options: Any) -> Any:
        if source.dtype in {torch.float16, torch.complex32}:
            refuse("a Fourier transform in half precision")
        return func.decompose(source, *args, **options)

    return kernel


register(
    """
    fft_fft fft_fft2 fft_fftn fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn
    fft_ihfft fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2
    fft_rfftn
    """,
    composed=_transforming,
    source="SpectralOps.cpp, promote_type_fft",
)


def _heeding_types(_func: Any, handler: Handler) -> Handler:
    """Return a handler that refuses half precision, which MKL does not support."""

    def transforming(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args[0].dtype in {torch.float16, torch.complex32}:
            refuse("a Fourier transform in half precision")
        return handler(args, kwargs)

    return transforming


register(
    "_fft_c2c _fft_c2r _fft_r2c",
    around=_heeding_types,
    source="cuda/SpectralOps.cpp, promote_type_fft",
)


def _short_time(func: Any) -> Any:
    """Make a short window as long as the transform; C++ would make it on the host."""

    def kernel(  # the operator's signature
        source: torch.Tensor,
        n_fft: int,
        hop_length: int | None = None,
        win_length: int | None = None,
        window: torch.Tensor | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if window is not None and window.device != source.device:
            raise RuntimeError(
                "stft input and window must be on the same device but got self on "
                f"{source.device} and window on {window.device}"
            )
        size = n_fft if win_length is None else win_length
        fits = window is None or window.shape == (size,)  # else C++ raises
        if fits and 0 < size < n_fft <= source.shape[-1]:
            whole = (source if window is None else window).new_zeros(n_fft)
            part = whole.narrow(0, (n_fft - size) // 2, size)
            part.fill_(1) if window is None else part.copy_(window)
            window, win_length = whole, n_fft
        # ``decompose`` would take Python's decomposition, which has other errors.
        return func._op_dk(
            torch._C.DispatchKey.CompositeImplicitAutograd,
            *(source, n_fft, hop_length, win_length, window, *rest),
            **options,
        )

    return kernel


register("stft", composed=_short_time, source="SpectralOps.cpp, stft")
register("istft", composed=on_host, source="SpectralOps.cpp, istft")
