"""Checkpoints of models at their real size, built offline and kept in a cache.

The weights are random, drawn from a seed by the model's own initialisation: enough for
whatever depends on sizes, devices and arithmetic, useless for the model's task.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_gpumem.checkpoints.cache import (
    build_into,
    cache_folder,
    digest_of,
    is_intact,
)
from pytest_gpumem.checkpoints.models import NAMES, ModelSpec, model_spec
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Callable

FORMATS = ("safetensors", "bin")
#: Raised whenever the same request would give other files than before.
_BUILDER_VERSION = 1


def make_checkpoint(
    model: str | os.PathLike[str] | Any,
    *,
    out: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    format: str = "safetensors",  # noqa: A002  # the command line's word
    max_shard_size: str | int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    architecture: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return a folder with a checkpoint, building it if need be.

    Building is atomic and safe for several processes at once; a checkpoint that is
    there is checked before it is used again, and built anew if it is damaged.

    Args:
        model: A known name (``NAMES``), the path of a ``config.json`` of transformers
            or of a folder with one, or a ``PretrainedConfig``.
        out: The folder to write; None means the cache.
        cache_dir: The cache; None means the user's (``PYTEST_GPUMEM_CACHE`` first).
        format: ``"safetensors"``, or ``"bin"`` for the legacy ``pytorch_model.bin``.
        max_shard_size: Bytes (or ``"200MB"``) of a file at most; None means one file.
        seed: Seed of the weights.
        dtype: Name of the weights' dtype, such as ``"float16"``.
        architecture: Class name of transformers; None means the config's own, else
            the sequence classifier of its type.
        progress: Told what takes long, a line at a time.

    Raises:
        CheckpointError: The model is not known, the options make no sense, the disk is
            full, or ``out`` holds something else.
    """
    if format not in FORMATS:
        raise CheckpointError(
            f"format={format!r} is not known; accepted are {', '.join(FORMATS)}"
        )
    spec = model_spec(model, architecture=architecture)
    shard_bytes = None if max_shard_size is None else parse_size(max_shard_size)
    request = {
        "architecture": spec.architecture,
        "builder": _BUILDER_VERSION,
        "config": spec.config_dict,
        "dtype": dtype,
        "format": format,
        "max_shard_bytes": shard_bytes,
        "seed": seed,
    }
    if out is not None:
        target = Path(out)
    else:
        target = cache_folder(cache_dir) / f"{spec.name}-{digest_of(request)[:16]}"
    say = progress or (lambda _text: None)

    def build(folder: Path) -> None:
        from pytest_gpumem.checkpoints.build import build_checkpoint  # noqa: PLC0415  # it imports torch

        started_s = time.perf_counter()
        say(f"building {spec.name} ({dtype}, {format}) in {target}")
        nbytes = build_checkpoint(
            spec,
            folder,
            file_format=format,
            shard_bytes=shard_bytes,
            seed=seed,
            dtype=dtype,
            say=say,
        )
        took_s = time.perf_counter() - started_s
        say(f"built {spec.name}: {format_size(nbytes)} in {took_s:.1f} s")

    build_into(target, request, build, say=say)
    return target


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the folder of a checkpoint given by path or by name.

    Args:
        name_or_path: A folder with ``config.json`` and weights, or a known name, which
            is built if it is not in the cache.
        progress: Told what takes long.

    Raises:
        CheckpointError: Neither a checkpoint's folder nor a known name.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        return make_checkpoint(name_or_path, progress=progress)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} is no checkpoint: it has no config.json")
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise CheckpointError(
            f"{path} is no checkpoint: it has neither *.safetensors nor *.bin"
        )
    return path


__all__ = [
    "FORMATS",
    "NAMES",
    "ModelSpec",
    "is_intact",
    "make_checkpoint",
    "resolve_checkpoint",
]
