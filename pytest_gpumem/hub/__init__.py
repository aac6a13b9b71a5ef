"""Models served under their names on the hub, without network.

A script that says ``from_pretrained("bert-large-uncased")`` gets a checkpoint of that
model's size that was built here, with random weights; see ``checkpoints``.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_gpumem.hub.advice import advise
from pytest_gpumem.hub.names import HubModel, hub_model, parse_hub_model
from pytest_gpumem.hub.service import served_names, serving

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping


@contextmanager
def serve_models(
    models: str | Iterable[str] | Mapping[str, str | os.PathLike[str] | None],
    **options: Any,
) -> Iterator[None]:
    """Serve models under their names on the hub for a block, without network.

    Whatever goes through huggingface_hub finds them, in this process and in children
    that are started in the block: transformers' auto classes, tokenizers, pipelines and
    trainer, ``snapshot_download``, ``hf_hub_download``, the API. A model is built when
    it is first asked for, and kept in the cache of checkpoints. Every revision of it is
    the same.

    Args:
        models: Names such as ``"bert-large-uncased"``, each with what to build it from
            if the name alone does not tell: a mapping, or texts such as
            ``"my-org/mine=config.json"``. A source is a known name (``NAMES``), a
            ``config.json`` or a folder with one, or a checkpoint's folder, which is
            served as it is. ``"hub"`` means the hub's own model.
        options: What ``make_checkpoint`` is told of each of them: ``format``,
            ``max_shard_size``, ``dtype``, ``seed``, ``weights``, ``architecture``.

    Raises:
        CheckpointError: A name, a source or an option makes no sense.

    Example::

        with serve_models({"bert-tiny-uncased": "bert-tiny"}):
            model = AutoModel.from_pretrained("bert-tiny-uncased")

    Limits: a model named without source and options is left alone where the user's own cache has
    it. Not for several threads that serve different models at once. What asks the hub
    by other means than huggingface_hub is not reached.
    """
    if isinstance(models, str):
        models = (models,)
    if hasattr(models, "items"):
        chosen = [hub_model(name, source, options) for name, source in models.items()]
    else:
        given = [parse_hub_model(text) for text in models]
        chosen = [
            hub_model(
                each.name,
                None if each.yields else each.source,
                {**options, **dict(each.options)},
            )
            for each in given
        ]
    with serving(chosen) as service:
        try:
            yield
        except BaseException as error:
            advise(error, service.models)
            raise


__all__ = [
    "HubModel",
    "advise",
    "hub_model",
    "parse_hub_model",
    "serve_models",
    "served_names",
]
