"""Checkpoints of models at their real size, built offline and kept in a cache.

The weights are random: the model's own initialisation draws them from a seed. This is
enough for tests of sizes, devices and arithmetic, but not for the model's task.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pytest_gpumem.checkpoints.cache import (
    build_into,
    cache_folder,
    digest_of,
    find_damage,
    is_intact,
)
from pytest_gpumem.checkpoints.models import (
    NAMES,
    ModelSpec,
    library_versions,
    model_spec,
)
from pytest_gpumem.checkpoints.weights import missing_weights
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from transformers import PretrainedConfig

FORMATS: Final = ("safetensors", "bin")
DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
CHECKS: Final = ("quick", "full")
WEIGHTS: Final = ("random", "zeros")
#: It is increased when the same request gives other files than before.
_BUILDER_VERSION: Final = 2


def make_checkpoint(
    model: str | os.PathLike[str] | PretrainedConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    format: str = "safetensors",  # noqa: A002  # named as on the command line
    max_shard_size: str | int | None = None,
    seed: int = 0,
    dtype: str = "float32",
    architecture: str | None = None,
    weights: str = "random",
    verify: str = "quick",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return a folder with a checkpoint; build the checkpoint if it does not exist.

    The same request gives the same weights, bit for bit, with any number of threads. The
    caller's random state does not change. Several processes may build at the same time,
    and a checkpoint is built completely or not at all. An existing checkpoint is checked
    before it is used again. If it is damaged, it is built again, with a log warning.

    Args:
        model: A known name (``NAMES``), the path of a ``config.json`` of transformers
            or of a folder with one, or a ``PretrainedConfig``.
        out: The folder to write; None means a folder of the cache.
        cache_dir: The cache; None means the folder in ``PYTEST_GPUMEM_CACHE``, or else
            the user's cache.
        format: ``"safetensors"``, or ``"bin"`` for the legacy ``pytorch_model.bin``.
        max_shard_size: The most bytes of a file, as a number or a text (``"200MB"``);
            None means one file. A larger tensor has a file of its own.
        seed: Seed of the weights, from 0 on.
        dtype: Name of the weights' dtype, one of ``DTYPES``. The weights are drawn in
            float32 and then rounded.
        architecture: The name of a class of transformers, which may be an auto class.
            None means the class that the config names. If it names none,
            ``AutoModelForSequenceClassification`` is tried, then ``AutoModel``.
        weights: ``"random"``, or ``"zeros"`` for sparse safetensors files. They have
            their full size but take almost no disk space, so a checkpoint may be larger
            than disk and memory.
        verify: How an existing checkpoint is checked: ``"quick"`` compares the sizes of
            all files and the first and last MiB of each, ``"full"`` compares every byte
            (some seconds for each GB).
        progress: Called with a line of text before each step that takes long.

    Raises:
        CheckpointError: The model is not known, an option makes no sense, the disk is
            full or cannot be written, or ``out`` contains other files.
        SizeError: ``max_shard_size`` is not a size.

    Example::

        path = make_checkpoint("bert-tiny", format="bin", max_shard_size="4MB")

    Limits: weights are the same only on the same kind of CPU, and with the same minor
    versions of torch and transformers, which are part of the request. The build needs
    host memory for the model in float32. Random numbers that other threads draw at the
    same time change the weights.
    """
    check_options(format=format, dtype=dtype, verify=verify, weights=weights, seed=seed)
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
        "versions": library_versions(),
        **({} if weights == "random" else {"weights": weights}),
    }
    say = progress or (lambda _text: None)

    def build(folder: Path) -> None:
        from pytest_gpumem.checkpoints.build import build_checkpoint

        started_s = time.perf_counter()
        nbytes = build_checkpoint(
            spec,
            folder,
            file_format=format,
            shard_bytes=shard_bytes,
            seed=seed,
            dtype=dtype,
            weights=weights,
            say=say,
        )
        took_s = time.perf_counter() - started_s
        say(f"built {spec.name}: {format_size(nbytes)} in {took_s:.1f} s")

    own = f"{spec.name}-{digest_of(request)[:16]}"
    target = cache_folder(cache_dir) / own if out is None else Path(out)
    build_into(
        target,
        request,
        build,
        say=say,
        in_cache=out is None,
        check_all=verify == "full",
    )
    return target


def check_options(
    *,
    format: str = "safetensors",  # noqa: A002  # named as on the command line
    dtype: str = "float32",
    verify: str = "quick",
    weights: str = "random",
    seed: int = 0,
    max_shard_size: str | int | None = None,
) -> None:
    """Reject options of ``make_checkpoint`` that make no sense.

    Raises:
        CheckpointError: A value is not accepted, or two values contradict each other.
        SizeError: ``max_shard_size`` is not a size.
    """
    _check("format", format, FORMATS)
    _check("dtype", dtype, DTYPES)
    _check("verify", verify, CHECKS)
    _check("weights", weights, WEIGHTS)
    if weights == "zeros" and format != "safetensors":
        raise CheckpointError(
            f"weights='zeros' makes sparse safetensors files, not format={format!r}; "
            "leave one of the two out"
        )
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise CheckpointError(
            f"seed={seed!r} is not a seed; give a whole number from 0 to 2**63 - 1"
        )
    if max_shard_size is not None:
        parse_size(max_shard_size)


def resolve_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Return the folder of a checkpoint given by path or by name.

    Args:
        name_or_path: A folder with ``config.json`` and weights, which is used without a
            change; or a model as for ``make_checkpoint``, which is built if it is not in
            the cache.
        cache_dir: As for ``make_checkpoint``.
        progress: As for ``make_checkpoint``.

    Raises:
        CheckpointError: It is neither the folder of a complete checkpoint nor a known
            name.

    Example::

        path = resolve_checkpoint("bert-tiny")
    """
    path = Path(name_or_path)
    if not path.is_dir():
        return make_checkpoint(name_or_path, cache_dir=cache_dir, progress=progress)
    check_checkpoint(path)
    return path


def check_checkpoint(name_or_path: str | os.PathLike[str]) -> None:
    """Raise the error that ``resolve_checkpoint`` would raise, without building anything.

    Raises:
        CheckpointError: It is neither the folder of a complete checkpoint nor a known
            name.
    """
    path = Path(name_or_path)
    if not path.is_dir():
        model_spec(name_or_path, architecture=None)
        return
    reason = missing_weights(path)
    if reason is not None:
        raise CheckpointError(f"{path} is not a checkpoint: {reason}")


def _check(option: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise CheckpointError(
            f"{option}={value!r} is not known; accepted are {', '.join(accepted)}"
        )


__all__ = [
    "CHECKS",
    "DTYPES",
    "FORMATS",
    "NAMES",
    "WEIGHTS",
    "ModelSpec",
    "check_options",
    "find_damage",
    "is_intact",
    "make_checkpoint",
    "resolve_checkpoint",
]
