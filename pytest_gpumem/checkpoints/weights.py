"""The weight files of a checkpoint: writes the legacy format, and finds missing files."""

from __future__ import annotations

import errno
import json
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    import torch

_WHOLE: Final = ("model.safetensors", "pytorch_model.bin")
#: The errors that reading a damaged index may raise.
_UNREADABLE: Final = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
)


def missing_weights(folder: Path) -> str | None:
    """Return what a checkpoint's folder lacks; None if it is complete.

    Args:
        folder: The folder. A complete one has ``config.json``, and weights of either
            format: in one file, or as an index and every shard that the index names.
    """
    if not (folder / "config.json").is_file():
        return "it has no config.json"
    if any((folder / name).is_file() for name in _WHOLE):
        return None
    for name in _WHOLE:
        index = folder / f"{name}.index.json"
        if not index.is_file():
            continue
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            shards = sorted({str(shard) for shard in weight_map.values()})
            missing = [shard for shard in shards if not (folder / shard).is_file()]
        except _UNREADABLE:
            return f"{index.name} cannot be read"
        return f"{missing[0]} is missing" if missing else None
    return f"it has neither {' nor '.join(_WHOLE)}, nor an index of either"


def save_shards(
    weights: Mapping[str, torch.Tensor],
    folder: Path,
    name: str,
    shard_bytes: int | None,
    write: Callable[[Mapping[str, torch.Tensor], Path], None],
) -> int:
    """Write weights into one file, or into shards and their index; return their bytes.

    Args:
        weights: The weights by name.
        folder: The folder to write into.
        name: The name of the file, from which the names of shards are made.
        shard_bytes: The most bytes of a file, unless one tensor is larger; None means
            one file.
        write: Writes some of the weights into a file.

    Raises:
        OSError: The index cannot be written.
    """
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = total = 0
    for key, tensor in weights.items():
        if shard_bytes and shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][key] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    if len(shards) == 1:
        write(shards[0], folder / name)
        return total
    stem, _dot, ending = name.partition(".")
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}"
        write(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=1)
    (folder / f"{name}.index.json").write_text(text, encoding="utf-8")
    return total


def save_legacy(
    state: Mapping[str, torch.Tensor], folder: Path, shard_bytes: int | None
) -> None:
    """Write ``pytorch_model.bin``, or its shards and their index; see ``save_shards``.

    transformers 5 reads this format and no longer writes it. Of tied weights the first is
    written: loading ties them.

    Raises:
        RuntimeError: The file cannot be written; an ``OSError`` is its context.
    """
    save_shards(_untied(state), folder, "pytorch_model.bin", shard_bytes, _save)


def _save(state: Mapping[str, torch.Tensor], file: Path) -> None:
    import torch

    # A Python file is used because torch's own writer does not say why a write failed.
    with file.open("wb") as stream:
        torch.save(state, stream)


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen: set[tuple[Any, ...]] = set()
    weights = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        weights[name] = tensor
    return weights


@contextmanager
def as_os_error(folder: Path) -> Iterator[None]:
    """Turn the errors of torch and safetensors for a failed write into ``OSError``.

    Raises:
        OSError: A write failed.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        number = _os_error_number(error)
        if number is None:
            raise
        raise OSError(number, str(error), str(folder)) from error


def _os_error_number(error: BaseException | None) -> int | None:
    """Return the errno of the failed write that caused an exception; None if none did."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        match = re.search(r"\(os error (\d+)\)", str(error))
        if match is not None:
            return int(match[1])
        if "PytorchStreamWriter failed writing" in str(error):
            return errno.EIO
        error = error.__cause__ or error.__context__
    return None
