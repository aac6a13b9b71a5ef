"""Convolutions and recurrent layers."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from pytest_gpumem.devices.simulated.kernel_types import INTEGERS
from pytest_gpumem.devices.simulated.operators.checks import compare
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.operators.checks import Place

_aten = torch.ops.aten


def _types(_func: Any, places: list[Place]) -> None:
    """Check as ``check_input_same_type_as_parameters`` does: types before devices."""
    source = places[0]
    for each in places[1:]:
        if each.device.type != source.device.type:
            raise RuntimeError(
                f"Input type ({source.tensor.type()}) and {each.name} type "
                f"({each.tensor.type()}) should be the same"
            )
    compare("_cudnn_convolution", places)


_CHECK = "Convolution.cpp, check_input_same_type_as_parameters"


def _kernel(args: tuple[Any, ...]) -> str:
    """Name the kernel for whole numbers, which cuDNN does not take.

    Source: ``_select_conv_backend`` of ``Convolution.cpp``; ``slow_conv2d_forward`` and
    ``slow_conv_dilated_all_cuda_template`` of ``cuda``.
    """
    source, dilation, is_transposed = args[0], args[5], args[6]
    if source.dtype not in INTEGERS:
        return ""
    dimensions = max(source.dim() - 2, 2)  # one is taken for two
    if is_transposed:
        return f"slow_conv_transpose{dimensions}d_out_cuda"
    is_plain = dimensions == 2 and all(each == 1 for each in dilation)  # noqa: PLR2004  # images
    return "slow_conv2d_cuda" if is_plain else "slow_conv_dilated<>"


register(
    "convolution convolution_overrideable", check=_types, lacks=_kernel, source=_CHECK
)
register(
    "_convolution",
    check=_types,
    lacks=_kernel,
    source=_CHECK,
)

# -- recurrent layers -----------------------------------------------------------------

# Its biases, where a layer has none, are the host's.
register("mkldnn_rnn_layer", takes_host=True, source="mkldnn/RNN.cpp, mkldnn_rnn_layer")


def _pack_padded_sequence(args: tuple[Any, ...], _kwargs: dict[str, Any]) -> Any:
    """``_pack_padded_sequence``: lengths and batch sizes are the host's.

    Raises:
        RuntimeError: The lengths lie on a card (torch's text).
    """
    source, lengths, batch_first = args
    if isinstance(lengths, SimulatedTensor):
        raise RuntimeError(  # noqa: TRY004  # torch's own class
            "'lengths' argument should be a 1D CPU int64 tensor, but got "
            f"{lengths.dim()}D {lengths.device} Long tensor"
        )
    data, batch_sizes = _aten._pack_padded_sequence.default(
        source._gpumem_value, lengths, batch_first
    )
    return make(data, source._gpumem_card), batch_sizes


def _pad_sequence(
    sequences: list[torch.Tensor],
    batch_first: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> torch.Tensor:
    """``pad_sequence``: one large tensor, filled row by row."""
    longest = max(len(sequence) for sequence in sequences)
    first = sequences[0]
    outer = (len(sequences), longest) if batch_first else (longest, len(sequences))
    padded = first.new_full((*outer, *first.shape[1:]), padding_value)
    for index, sequence in enumerate(sequences):
        start = longest - len(sequence) if padding_side == "left" else 0
        row = padded.select(0 if batch_first else 1, index)
        row.narrow(0, start, len(sequence)).copy_(sequence)
    return padded


def _pad_packed_sequence(
    data: torch.Tensor,
    batch_sizes: torch.Tensor,
    batch_first: bool,  # noqa: FBT001  # the operator's signature
    padding_value: float,
    total_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_pad_packed_sequence``: steps of one batch size are copied together."""
    sizes = batch_sizes.tolist()
    longest = max(total_length, len(sizes))
    padded = data.new_full((longest, sizes[0], *data.shape[1:]), padding_value)
    start = offset = 0
    for size, steps in ((size, len(list(same))) for size, same in groupby(sizes)):
        chunk = data.narrow(0, offset, size * steps)
        goal = padded.narrow(0, start, steps).narrow(1, 0, size)
        goal.copy_(chunk.view(steps, size, *data.shape[1:]))
        start, offset = start + steps, offset + size * steps
    lengths = [sum(size > row for size in sizes) for row in range(sizes[0])]
    return (
        padded.transpose(0, 1) if batch_first else padded,
        torch.tensor(lengths, device="cpu"),
    )


_PACKED = "PackedSequence.cpp"

register(
    "_pack_padded_sequence",
    handler=_pack_padded_sequence,
    source=f"{_PACKED}, checkLongTensor",
)
register(
    "pad_sequence", composed=only(_pad_sequence), source=f"{_PACKED}, pad_sequence"
)
register(
    "_pad_packed_sequence",
    composed=only(_pad_packed_sequence),
    source=f"{_PACKED}, _pad_packed_sequence",
)
