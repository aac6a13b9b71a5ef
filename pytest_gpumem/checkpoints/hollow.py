"""Writes checkpoints without contents: sparse files whose weights are all zero.

A checkpoint that is larger than the disk, or whose values are not needed, is written as
safetensors files with real headers and a hole instead of the data. The files have their
full size, read as zeros, and take almost no disk space.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.checkpoints.weights import save_shards

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

#: Names of dtypes in the header. Source: the safetensors format's README.
_DTYPES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: The header is padded so that the data begins at a multiple of it; same source.
_ALIGNMENT: Final = 8


def save_hollow(
    model: torch.nn.Module,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int | None,
) -> int:
    """Write a model's weights as sparse safetensors files; return their bytes.

    Args:
        model: The model, on the meta device. Of tied weights the first is written.
        folder: The folder to write into.
        dtype: The dtype of the weights; buffers that are not floating point keep theirs.
        shard_bytes: The most bytes of a file, unless one tensor is larger; None means
            one file.

    Raises:
        OSError: The files cannot be written.
    """
    weights = _weights(model, dtype)
    return save_shards(weights, folder, "model.safetensors", shard_bytes, _write)


def _weights(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    kept = set(model.state_dict())
    named: Iterable[tuple[str, torch.Tensor]] = (
        *model.named_parameters(),
        *model.named_buffers(),
    )
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in named
        if name in kept
    }


def _write(shard: Mapping[str, torch.Tensor], file: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in shard.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(stream.tell() + end)
