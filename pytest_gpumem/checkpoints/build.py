"""Build a checkpoint's files with transformers and torch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from pytest_gpumem.checkpoints.cache import check_room
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from pytest_gpumem.checkpoints.models import ModelSpec


def build_checkpoint(
    spec: ModelSpec,
    folder: Path,
    *,
    file_format: str,
    shard_bytes: int | None,
    seed: int,
    dtype: str,
    say: Callable[[str], None],
) -> int:
    """Write config and weights into a folder; return the weights' bytes.

    The global random state stays as it is.

    Args:
        spec: The model.
        folder: An empty folder.
        file_format: ``"safetensors"`` or ``"bin"``.
        shard_bytes: Bytes of a file at most; None means one file.
        seed: Seed of the weights.
        dtype: Name of the weights' dtype.
        say: Told what takes long.

    Raises:
        CheckpointError: The config, class or dtype is not known, or the disk is full.
    """
    torch_dtype = getattr(torch, dtype, None)
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise CheckpointError(
            f"dtype={dtype!r} is no floating-point dtype of torch; give for example "
            "float16"
        )
    model_class, config = _class_and_config(spec)
    with torch.device("meta"):
        shape = model_class._from_config(config) if _is_auto(model_class) else model_class(config)  # noqa: SLF001
    nbytes = sum(p.numel() for p in shape.parameters()) * torch_dtype.itemsize
    check_room(folder, nbytes + 2**20)
    count = sum(p.numel() for p in shape.parameters())
    say(f"drawing {count:,} parameters, {format_size(nbytes)}")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = type(shape)(config).to(torch_dtype)
    say("writing")
    if file_format == "safetensors":
        model.save_pretrained(folder, max_shard_size=shard_bytes or nbytes * 2 + 2**20)
    else:
        model.config.dtype = torch_dtype
        model.config.save_pretrained(folder)
        _save_legacy(_without_ties(model), folder, shard_bytes)
    return nbytes


def _is_auto(model_class: Any) -> bool:
    return model_class.__name__.startswith("AutoModel")


def _class_and_config(spec: ModelSpec) -> tuple[Any, Any]:
    entries = dict(spec.config_dict)
    model_type = entries.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(model_type, **entries)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config of {spec.name}: {error}") from error
    if spec.architecture is None:
        model_class: Any = transformers.AutoModelForSequenceClassification
        try:
            return model_class._model_mapping[type(config)], config  # noqa: SLF001  # the table behind the auto class
        except KeyError:
            return transformers.AutoModel._model_mapping[type(config)], config  # noqa: SLF001  # likewise
    model_class = getattr(transformers, spec.architecture, None)
    if model_class is None:
        raise CheckpointError(
            f"architecture {spec.architecture!r} is no class of transformers "
            f"{transformers.__version__}"
        )
    config.architectures = [spec.architecture]
    return model_class, config


def _without_ties(model: Any) -> dict[str, torch.Tensor]:
    """Return the state with tied weights once: loading ties them again."""
    seen: dict[int, str] = {}
    state = {}
    for name, tensor in model.state_dict().items():
        if seen.setdefault(tensor.data_ptr(), name) == name:
            state[name] = tensor
    return state


def _save_legacy(
    state: dict[str, torch.Tensor], folder: Path, shard_bytes: int | None
) -> None:
    """Write ``pytorch_model.bin``, or its shards and their index."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in state.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shard_bytes is not None and shards[-1] and filled + nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += nbytes
    if len(shards) == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(
        json.dumps(index, indent=1), encoding="utf-8"
    )
