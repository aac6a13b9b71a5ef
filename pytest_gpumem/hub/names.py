"""The served models: their names on the hub, and the source of each."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.checkpoints import check_options
from pytest_gpumem.checkpoints.models import ALIASES, NAMES, model_spec
from pytest_gpumem.checkpoints.weights import missing_weights
from pytest_gpumem.errors import CheckpointError, SizeError

if TYPE_CHECKING:
    from collections.abc import Mapping

#: The source for the hub's own model, from the user's cache or the network.
FROM_HUB: Final = "hub"

#: The options of ``make_checkpoint`` that may be set, and the types of their texts.
BUILD_OPTIONS: Final[dict[str, type]] = {
    "format": str,
    "max_shard_size": str,
    "seed": int,
    "dtype": str,
    "architecture": str,
    "weights": str,
}
_OPTION: Final = re.compile(rf",\s*({'|'.join(BUILD_OPTIONS)})=([^,]*)$")

#: Source: ``huggingface_hub.utils._validators.validate_repo_id``.
_PART: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_NAME: Final = re.compile(rf"(?:{_PART}/)?{_PART}")
_MAX_NAME: Final = 96

#: The organisations of models whose names had none in the past; the hub knows both names.
#: The first pattern that matches a name counts.
#: Source: the redirects of huggingface.co.
_ORGANISATIONS: Final = (
    (re.compile(r"bert-.*"), "google-bert"),
    (re.compile(r"openai-gpt|gpt2.*"), "openai-community"),
    (re.compile(r"distil(bert|gpt2|roberta).*"), "distilbert"),
    (re.compile(r"roberta-.*|xlm-.*"), "FacebookAI"),
    (re.compile(r"t5-.*"), "google-t5"),
    (re.compile(r"albert-.*"), "albert"),
    (re.compile(r"xlnet-.*"), "xlnet"),
    (re.compile(r"camembert-base"), "almanach"),
)


#: Organisations in which sentence-transformers looks for a name without one.
#: Source: ``_load_modules`` in its ``base/model.py``.
_SENTENCES: Final = ("sentence-transformers", "cross-encoder")


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model that is served under a name of the hub.

    Attributes:
        name: The name on the hub, with or without organisation.
        source: What it is built from: a known name, or the path of a ``config.json``
            or of a folder; ``FROM_HUB`` means the hub's own model.
        options: Further options of ``make_checkpoint``, by name.
        yields: Whether a copy in the user's own cache is used instead, if there is one.
    """

    name: str
    source: str
    options: tuple[tuple[str, str | int], ...] = ()
    yields: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All its names: also those from before or after the hub renamed it."""
        organisation, _slash, short = self.name.rpartition("/")
        homes = [home for pattern, home in _ORGANISATIONS if pattern.fullmatch(short)]
        if not organisation:
            others = [f"{home}/{short}" for home in (*homes[:1], *_SENTENCES)]
        else:
            others = [short] if organisation in homes[:1] else []
        return (self.name, *others)

    @property
    def is_folder(self) -> bool:
        """Whether the source is a complete checkpoint, so that nothing is built."""
        path = Path(self.source)
        return path.is_dir() and missing_weights(path) is None

    def __str__(self) -> str:
        options = "".join(f",{name}={value}" for name, value in self.options)
        return f"{self.name}={self.source}{options}"

    def to_json(self) -> dict[str, Any]:
        """Return the model as values of JSON, for ``from_json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HubModel:
        """Return the model that ``to_json`` wrote."""
        options = tuple((str(name), value) for name, value in data["options"])
        return cls(data["name"], data["source"], options, bool(data["yields"]))


def parse_hub_model(text: str, *, base: str | os.PathLike[str] = "") -> HubModel:
    """Read ``NAME[=SOURCE][,OPTION=VALUE...]``.

    Args:
        text: For example ``bert-large-uncased`` or
            ``my-org/my-model=configs/mine,format=bin,max_shard_size=200MB``.
        base: The folder in which relative paths start.

    Raises:
        CheckpointError: The text, its name, its source or an option makes no sense.
    """
    options: list[tuple[str, str]] = []
    rest = text.strip()
    while found := _OPTION.search(rest):
        options.insert(0, (found[1], found[2].strip()))
        rest = rest[: found.start()]
    name, _equals, source = rest.partition("=")
    return hub_model(name.strip(), source.strip() or None, dict(options), base=base)


def hub_model(
    name: str,
    source: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    *,
    base: str | os.PathLike[str] = "",
) -> HubModel:
    """Return a model to serve, checked without building it.

    Args:
        name: Its name on the hub.
        source: As ``HubModel.source``; None means the known model of that name. Without
            options, a copy in the user's own cache is then used first.
        options: Further options of ``make_checkpoint``.
        base: The folder in which relative paths start.

    Raises:
        CheckpointError: The name, the source or an option makes no sense.
    """
    _check_name(name)
    chosen = tuple(_checked(key, value) for key, value in (options or {}).items())
    if source == FROM_HUB:
        return HubModel(name, FROM_HUB, chosen)
    if source is None:
        known = known_model(name)
        if known is None:
            raise CheckpointError(
                f"hub model {name!r}: no known model has this name; say what to build "
                f"it from, {name}=SOURCE, where SOURCE is a known name "
                f"({', '.join(NAMES)}), a config.json, or a checkpoint's folder"
            )
        model = HubModel(name, known, chosen, yields=not chosen)
        _check_source(model)
        return model
    text = os.path.expanduser(os.fspath(source))  # noqa: PTH111  # links stay as they are
    if ALIASES.get(text, text) not in NAMES:
        text = os.path.abspath(os.path.join(base, text))  # noqa: PTH100, PTH118  # links stay as they are
    model = HubModel(name, text, chosen)
    _check_source(model)
    return model


def known_model(name: str) -> str | None:
    """Return the known model that a name on the hub means; None if there is none."""
    short = name.rpartition("/")[2]
    found = ALIASES.get(short, short.removesuffix("-uncased"))
    return found if found in NAMES else None


def _check_name(name: str) -> None:
    if (
        not _NAME.fullmatch(name)
        or "--" in name
        or ".." in name
        or len(name) > _MAX_NAME
    ):
        raise CheckpointError(
            f"hub model {name!r}: this is not a name on the hub; give for example "
            "bert-large-uncased or my-org/my-model"
        )


def _checked(key: str, value: Any) -> tuple[str, str | int]:
    kind = BUILD_OPTIONS.get(key)
    if kind is None:
        raise CheckpointError(
            f"hub model: option {key!r} is not known; accepted are {', '.join(BUILD_OPTIONS)}"
        )
    try:
        return key, kind(value)
    except ValueError:
        raise CheckpointError(
            f"hub model: {key}={value!r} is not a whole number"
        ) from None


def _check_source(model: HubModel) -> None:
    if model.is_folder:
        if model.options:
            raise CheckpointError(
                f"hub model {model.name!r}: {model.source} is a checkpoint and is served "
                f"as it is; leave {model.options[0][0]}=... out"
            )
        return
    choices: dict[str, Any] = dict(model.options)
    architecture = choices.pop("architecture", None)
    try:
        check_options(**choices)
        model_spec(model.source, architecture=architecture)
    except (CheckpointError, SizeError) as error:
        raise CheckpointError(f"hub model {model.name!r}: {error}") from None
