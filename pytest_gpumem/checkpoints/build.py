"""Builds a checkpoint's files with transformers and torch."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
import transformers
from transformers.utils import logging as transformers_logging

from pytest_gpumem.checkpoints.cache import check_room
from pytest_gpumem.checkpoints.hollow import save_hollow
from pytest_gpumem.checkpoints.weights import as_os_error, save_legacy
from pytest_gpumem.errors import CheckpointError
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from transformers import PretrainedConfig, PreTrainedModel

    from pytest_gpumem.checkpoints.models import ModelSpec

#: The classes that are tried for a config without architectures, in this order.
_AUTO_CLASSES: Final = ("AutoModelForSequenceClassification", "AutoModel")
#: Room for config, index and headers, which are far smaller.
_OVERHEAD_BYTES: Final = 2**20


def build_checkpoint(
    spec: ModelSpec,
    folder: Path,
    *,
    file_format: str,
    shard_bytes: int | None,
    seed: int,
    dtype: str,
    weights: str,
    say: Callable[[str], None],
) -> int:
    """Write config and weights into a folder; return the weights' bytes.

    The global random state does not change, and neither does any other global state.

    Args:
        spec: The model.
        folder: An empty folder.
        file_format: ``"safetensors"`` or ``"bin"``.
        shard_bytes: The most bytes of a file; None means one file.
        seed: Seed of the weights.
        dtype: Name of the weights' dtype.
        weights: ``"random"``, or ``"zeros"``: sparse files.
        say: Called with a line of text before each step that takes long.

    Raises:
        CheckpointError: The config or class is not known, or the disk is too full.
        OSError: The files cannot be written.
    """
    torch_dtype: torch.dtype = getattr(torch, dtype)
    config = _config(spec)
    model_class = _model_class(spec, config)
    with torch.device("meta"):
        shape = _make(model_class, config)
    count = int(sum(p.numel() for p in shape.parameters()))
    nbytes = count * torch_dtype.itemsize
    hollow = weights == "zeros"
    check_room(folder, (0 if hollow else nbytes) + _OVERHEAD_BYTES)
    say(
        f"building {spec.name}: {count:,} parameters, {format_size(nbytes)} in "
        f"{dtype} ..."
    )
    if hollow:
        with as_os_error(folder):
            _save_config(shape, folder, torch_dtype)
            return save_hollow(shape, folder, torch_dtype, shard_bytes)
    model: Any = _draw(model_class, config, seed)
    model.to(torch_dtype)
    say(f"writing {folder.parent} ...")
    with as_os_error(folder), _no_progress_bar():
        if file_format == "safetensors":
            limit = shard_bytes or 2 * nbytes + _OVERHEAD_BYTES
            model.save_pretrained(folder, max_shard_size=limit)
        else:
            _save_config(model, folder, torch_dtype)
            save_legacy(model.state_dict(), folder, shard_bytes)
    return nbytes


def _save_config(model: Any, folder: Path, dtype: torch.dtype) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.dtype = dtype
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _draw(
    model_class: type[PreTrainedModel], config: PretrainedConfig, seed: int
) -> PreTrainedModel:
    # Not torch.manual_seed: it would seed the cards too, and they are not restored.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return _make(model_class, config)


def _make(
    model_class: type[PreTrainedModel], config: PretrainedConfig
) -> PreTrainedModel:
    make: Any = model_class._from_config  # noqa: SLF001  # the method that the auto classes call
    model: PreTrainedModel = make(config, dtype=torch.float32)
    return model


def _config(spec: ModelSpec) -> PretrainedConfig:
    entries = dict(spec.config_dict)
    model_type = entries.pop("model_type")
    try:
        return transformers.AutoConfig.for_model(model_type, **entries)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"the config of {spec.name} is not valid: {error}"
        ) from error


def _model_class(spec: ModelSpec, config: PretrainedConfig) -> type[PreTrainedModel]:
    names = (spec.architecture,) if spec.architecture else _AUTO_CLASSES
    for name in names:
        found: Any = getattr(transformers, name, None)
        if found is None:
            raise CheckpointError(
                f"architecture {name!r} is not a class of transformers "
                f"{transformers.__version__}; give for example BertForMaskedLM"
            )
        mapping = getattr(found, "_model_mapping", None)
        if mapping is not None:  # an auto class
            found = mapping.get(type(config), None)
            found = found[0] if isinstance(found, (tuple, list)) else found
        if found is not None:
            return _checked(found, name, config)
    raise CheckpointError(
        f"no class of {' or '.join(names)} takes a {type(config).__name__}; name one "
        "with architecture=..."
    )


def _checked(
    model_class: type[PreTrainedModel], name: str, config: PretrainedConfig
) -> type[PreTrainedModel]:
    wanted = getattr(model_class, "config_class", None)
    if wanted is None or not isinstance(config, wanted):
        raise CheckpointError(
            f"architecture {name!r} does not take a {type(config).__name__}"
        )
    return model_class


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type hints here
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers has no type hints here
