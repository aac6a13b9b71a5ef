"""Models served under their names on the hub, without network.

A script that calls ``from_pretrained("bert-large-uncased")`` gets a checkpoint of that
model's size with random weights, which is built on this machine; see ``checkpoints``.
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

    All code that uses huggingface_hub finds them, in this process and in children that
    are started in the block: transformers' auto classes, tokenizers, pipelines and
    trainer, ``snapshot_download``, ``hf_hub_download``, the API. A model is built when
    code first asks for it, and is kept in the cache of checkpoints. All its revisions
    are the same.

    Args:
        models: Names such as ``"bert-large-uncased"``. If a name is not that of a known
            model, a source says what to build it from: in a mapping from names to
            sources, or in a text such as ``"my-org/mine=config.json"``. A source is a
            known name (``NAMES``), a ``config.json`` or a folder with one, or a
            checkpoint's folder, which is served without a change. ``"hub"`` means the
            hub's own model.
        options: Options of ``make_checkpoint`` for each of them: ``format``,
            ``max_shard_size``, ``dtype``, ``seed``, ``weights``, ``architecture``.

    Raises:
        CheckpointError: A name, a source or an option makes no sense.

    Example::

        with serve_models({"bert-tiny-uncased": "bert-tiny"}):
            model = AutoModel.from_pretrained("bert-tiny-uncased")

    Limits: a model without source and options is not served if the user's own cache has
    it. Several threads must not serve different models at the same time. Code that asks
    the hub in another way than through huggingface_hub is not reached.
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
