"""Convolutions and recurrent layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS
from pytest_gpumem.devices.simulated.operators.checks import (
    compare_devices,
    is_of_formula,
)
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.operators.requests import (
    Free,
    Results,
    Temporary,
    Tried,
    copy_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_gpumem.devices.simulated.operators.checks import Operand
    from pytest_gpumem.devices.simulated.operators.requests import Call, RequestStep
    from pytest_gpumem.devices.simulated.tensor import Handler

_aten = torch.ops.aten


def _types(_func: Any, operands: list[Operand]) -> None:
    """Check types before devices, as ``check_input_same_type_as_parameters`` does."""
    _compare_types([(each.name, each.tensor) for each in operands])
    compare_devices("_cudnn_convolution", operands)


def _compare_types(tensors: list[tuple[str, torch.Tensor]]) -> None:
    """Compare the dtypes and device types of named tensors with those of the first one."""
    _name, source = tensors[0]
    for name, each in tensors[1:]:
        if (each.dtype, each.device.type) != (source.dtype, source.device.type):
            raise RuntimeError(
                f"Input type ({source.type()}) and {name} type ({each.type()}) should be "
                "the same"
            )


_CHECK = "Convolution.cpp, check_input_same_type_as_parameters"


def _kernel(args: tuple[Any, ...]) -> str:
    """Return the name of the kernel for integers, which cuDNN does not support.

    With cuDNN, dtypes are compared before.

    Source: ``_select_conv_backend`` of ``Convolution.cpp``; ``slow_conv2d_forward`` and
    ``slow_conv_dilated_all_cuda_template`` of ``cuda``.
    """
    source, dilation, is_transposed = args[0], args[5], args[6]
    if torch._C._get_cudnn_enabled():
        named = zip(("", "weight", "bias"), args[:3], strict=True)
        tensors = [
            (name, each)
            for name, each in named
            if each is not None and not is_of_formula(each)
        ]
        if not any(each.is_meta for _name, each in tensors):  # no kernel runs on meta
            _compare_types(tensors)
    if source.dtype not in INTEGERS:
        return ""
    dimensions = max(source.dim() - 2, 2)  # one dimension is treated as two
    if is_transposed:
        return f"slow_conv_transpose{dimensions}d_out_cuda"
    is_plain = dimensions == 2 and all(each == 1 for each in dilation)  # noqa: PLR2004  # two dimensions: images
    return "slow_conv2d_cuda" if is_plain else "slow_conv_dilated<>"


class _Layer:
    """One convolution without cuDNN, whose kernels make columns for each group."""

    def __init__(self, call: Call) -> None:
        self.groups: int = call["groups"]
        self.source: torch.Tensor = call["input"]
        self.weight: torch.Tensor = call["weight"]
        self.is_transposed: bool = call["transposed"]
        self.is_dilated = any(each != 1 for each in call["dilation"])
        self.itemsize = self.source.itemsize
        self.batch = self.source.shape[0]
        # One dimension is treated as two: ``view1d_as_2d``.
        self.dimensions = max(self.source.dim() - 2, 2)

    @property
    def is_depthwise(self) -> bool:
        """Whether the filters of each channel are separate: ``is_depthwise``."""
        channels = self.source.shape[1]
        return (
            not self.is_transposed
            and channels == self.groups > 1
            and self.weight.shape[0] % channels == 0
        )

    @property
    def has_channels_last(self) -> bool:
        """Whether cuDNN's kernel works with the channels last."""
        last = {4: torch.channels_last, 5: torch.channels_last_3d}
        form = last.get(self.source.dim())
        return form is not None and any(
            each.is_contiguous(memory_format=form) and not each.is_contiguous()
            for each in (self.source, self.weight)
        )

    def key(self, call: Call) -> tuple[Any, ...]:
        """Return the parameters that distinguish kinds: ``setConvolutionParams``."""
        c = torch._C
        return (
            self.source.dtype,
            self.source.shape,
            self.weight.shape,
            self.has_channels_last,
            *(tuple(call[name]) for name in ("stride", "padding", "dilation")),
            self.is_transposed,
            self.groups,
            c._get_cudnn_deterministic() or c._get_deterministic_algorithms(),
        )

    def columns(self, result: torch.Tensor) -> Temporary:
        """Return a group's columns for one image: a column for each position."""
        positions = math.prod((self.source if self.is_transposed else result).shape[2:])
        rows = self.weight.numel() // self.weight.shape[0]
        return Temporary(rows * positions * self.itemsize)

    def part(self, tensor: torch.Tensor) -> Temporary:
        """Return the part of a tensor that belongs to one group."""
        return Temporary(tensor.numel() // self.groups * self.itemsize)

    def copies(self, *tensors: torch.Tensor) -> list[Temporary]:
        """Return copies of a group's channels if they are not contiguous."""
        return [
            self.part(each)
            for each in tensors
            if self.batch > 1 or not each.is_contiguous()
        ]


def _contiguous_copies(*tensors: torch.Tensor | None) -> list[Temporary]:
    """Return copies of the tensors that are not contiguous, for example a real part."""
    return [
        copy_of(each)
        for each in tensors
        if each is not None and not each.is_contiguous()
    ]


def _uses_cudnn(layer: _Layer) -> bool:
    """Tell whether torch takes cuDNN's kernels and not its own.

    Source: ``ConvParams::use_cudnn`` of ``aten/src/ATen/native/Convolution.cpp``: a
    dilated convolution that must be deterministic is torch's own, unless the channels
    come last.
    """
    c = torch._C  # its functions are faster than the properties of torch.backends.cudnn
    if not c._get_cudnn_enabled():
        return False
    if not layer.is_dilated:
        return True
    is_deterministic = c._get_cudnn_deterministic() or c._get_deterministic_algorithms()
    return not is_deterministic or layer.has_channels_last


def _of_convolution(call: Call) -> Iterable[RequestStep]:
    """Request the memory of PyTorch's own kernels; cuDNN's workspaces are not known."""
    layer = _Layer(call)
    if not _uses_cudnn(layer):
        return _forward(layer, call)
    if torch._C._get_cudnn_benchmark() and not layer.is_depthwise:
        return (Results(), Tried(("forward", *layer.key(call))))
    return ()


def _forward(layer: _Layer, call: Call) -> Iterator[RequestStep]:
    result: Any = call.results[0]
    if not result.numel():
        return
    bias = call["bias"]
    yield from _contiguous_copies(layer.source, layer.weight)
    if layer.groups == 1 or layer.is_depthwise:
        copies = _contiguous_copies(bias)
        if not layer.is_transposed:
            yield from copies
        if layer.is_depthwise:
            return
        yield from _convolved(layer, result, Results(), bias, copies)
        return
    parts: list[Temporary] = []
    for _group in range(layer.groups):
        # A copy of the whole tensor, if there is one, is contiguous.
        copies = [layer.part(layer.source)] if layer.batch > 1 else []
        part = layer.part(result)
        yield from copies
        yield from _convolved(layer, result, part, bias, [])
        yield from map(Free, copies)
        parts.append(part)
    yield Results()
    yield from map(Free, parts)


def _convolved(
    layer: _Layer,
    result: torch.Tensor,
    part: RequestStep,
    bias: torch.Tensor | None,
    copies: list[Temporary],
) -> Iterator[RequestStep]:
    """Request one group's result and its columns."""
    small = None
    if layer.is_transposed and layer.dimensions == 3:  # noqa: PLR2004  # three dimensions: volumes
        small = layer.part(layer.source)  # the size of the result before it is resized
        yield small
    yield part
    if small is not None:
        yield Free(small)
    held = [layer.columns(result)]
    if layer.is_transposed:
        yield from copies
        if bias is not None:
            ones = math.prod(result.shape[2:]) * layer.itemsize
            held.append(Temporary(ones))
    yield from held
    yield from map(Free, reversed(held))


def _of_convolution_backward(call: Call) -> Iterable[RequestStep]:
    """Request the memory of PyTorch's own kernels for a gradient."""
    layer = _Layer(call)
    if _uses_cudnn(layer):
        if torch._C._get_cudnn_benchmark() and not layer.is_depthwise:
            return _measured_backward(layer, call)
        return ()
    if not call["grad_output"].numel():
        return ()
    if layer.is_depthwise:
        return _each_channel_backward(layer, call)
    return _backward(layer, call)


def _measured_backward(layer: _Layer, call: Call) -> Iterator[RequestStep]:
    """Request each gradient; cuDNN then measures its kernels for it.

    Source: ``cudnn_convolution_backward`` of ``aten/src/ATen/native/cudnn/ConvShared.cpp``.
    """
    for index, way in ((0, "input"), (1, "weight")):
        if call["output_mask"][index]:
            yield Results(index)
            yield Tried((way, *layer.key(call)))


def _each_channel_backward(layer: _Layer, call: Call) -> Iterator[RequestStep]:
    gradient = _contiguous_copies(call["grad_output"])
    source, weight = _contiguous_copies(layer.source), _contiguous_copies(layer.weight)
    yield from (*gradient, *source)
    yield Results(1)
    # The copy of an image is freed after the kernel of the weight's gradient. The copy
    # of a one-dimensional source is shared by both kernels and freed after them.
    early, late = ([], source) if layer.source.dim() == 3 else (source, [])  # noqa: PLR2004  # three with batch and channel: one dimension
    yield from map(Free, early)
    yield from weight
    yield Results(0)
    yield from map(Free, [*weight, *late, *gradient])
    yield Results(2)


def _backward(layer: _Layer, call: Call) -> Iterator[RequestStep]:
    gradient: torch.Tensor = call["grad_output"]
    wanted = call["output_mask"]
    yield from _contiguous_copies(layer.source, layer.weight)
    if layer.groups == 1:
        copies = _contiguous_copies(gradient)
        steps: list[RequestStep] = [Results(index) for index in range(3)]
        yield from _gradients(layer, gradient, steps, wanted, copies)
        return
    parts: list[Temporary] = []
    for _group in range(layer.groups):
        copies = layer.copies(gradient)
        if layer.batch > 1:
            copies.append(layer.part(layer.source))
        yield from copies
        results = [each for each in call.results if each is not None]
        own = [layer.part(each) for each in results]
        by_place = iter(own)
        steps = [next(by_place) if each else Temporary(0) for each in wanted]
        yield from _gradients(layer, gradient, steps, wanted, [])
        yield from map(Free, copies)
        parts += own
    yield Results()
    yield from map(Free, parts)


def _gradients(
    layer: _Layer,
    gradient: torch.Tensor,
    steps: Sequence[RequestStep],
    wanted: list[bool],
    copies: list[Temporary],
) -> Iterator[RequestStep]:
    """Request one group's gradients and their columns.

    Args:
        layer: The convolution.
        gradient: The gradient of the convolution's result.
        steps: The requests for the gradients of source, weight and bias.
        wanted: Which of these three gradients are needed.
        copies: The contiguous copy of ``gradient``, if one is needed.
    """
    of_source, of_weight, of_bias = steps
    columns = layer.columns(gradient)
    if layer.is_transposed:
        # There are two kernels, and each makes its own copy.
        if wanted[0]:
            yield from (*copies, of_source, columns, Free(columns), *map(Free, copies))
        if any(wanted[1:]):
            again = [Temporary(each.nbytes) for each in copies]
            columns = layer.columns(gradient)
            yield from (of_weight, of_bias, *again, columns, Free(columns))
            yield from map(Free, again)
        return
    yield from copies
    if layer.dimensions == 2 and not layer.is_dilated:  # noqa: PLR2004  # two dimensions: images
        yield from (of_source, columns, of_bias, of_weight, Free(columns))
    else:
        yield from (of_source, of_weight, of_bias, columns)
        for _image in range(layer.batch if wanted[2] else 0):
            outputs = gradient.shape[1] // layer.groups
            total = Temporary(outputs * layer.itemsize)
            yield from (total, Free(total))
        yield Free(columns)


_SLOW = (
    "cuda/ConvolutionMM2d.cu, NaiveDilatedConvolution.cu, NaiveConvolutionTranspose2d.cu "
    "and NaiveConvolutionTranspose3d.cu; Convolution.cpp, _convolution"
)

_recorded: Any = torch.ops.aten._convolution.default


def _recording(func: Any, handler: Handler) -> Handler:
    """Return a handler that ``torch.jit.trace`` sees.

    The tracer does not record this operator, but ``_convolution``, which C++ composes it of.

    Source: ``DONT_RECORD_TRACE`` of ``tools/autograd/gen_trace_type.py``.
    """
    if func._overloadname != "default" or func.overloadpacket.__name__ != "convolution":
        return handler

    def recording(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if torch._C._get_tracing_state() is None:
            return handler(args, kwargs)
        cudnn = torch.backends.cudnn
        settings = (cudnn.benchmark, cudnn.deterministic, cudnn.enabled, True)
        # Below Python's dispatch the tracer is excluded.
        included = torch._C._dispatch_tls_local_include_set()
        excluded = torch._C._dispatch_tls_local_exclude_set()
        excluded = excluded.remove(torch._C._dispatch_key_parse("Tracer"))
        with torch._C._ForceDispatchKeyGuard(included, excluded):
            return _recorded(*args, *settings, **kwargs)

    return recording


register(
    "_convolution",
    check=_types,
    requests=_of_convolution,
    lacks=_kernel,
    source=_CHECK,
)
register(
    "convolution convolution_overrideable",
    check=_types,
    requests=_of_convolution,
    lacks=_kernel,
    around=_recording,
    source=f"{_CHECK}; {_SLOW}",
)
register("convolution_backward", requests=_of_convolution_backward, source=_SLOW)
