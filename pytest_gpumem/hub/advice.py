"""Advice for a model that the hub does not return and the run does not serve."""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.hub.names import known_model
from pytest_gpumem.stacks import errors_behind, variables_of

if TYPE_CHECKING:
    from collections.abc import Container

#: Classes of ``huggingface_hub.errors`` for a model that is not available.
_ERRORS: Final = (
    "LocalEntryNotFoundError",
    "OfflineModeIsEnabled",
    "RepositoryNotFoundError",
    "RevisionResolutionError",
)
#: Variables in which libraries keep a model's name.
_VARIABLES: Final = (
    "repo_id",
    "path_or_repo_id",
    "pretrained_model_name_or_path",
    "model_name_or_path",
)
#: Parts of transformers' error for a weight of another shape, most often of a head; the
#: second is torch's own error, which transformers 4 raises for some models.
_HEADS: Final = ("`ignore_mismatched_sizes`", "size mismatch for ")
_MARK: Final = "__gpumem_advised__"


def advise(error: BaseException, served: Container[str] = ()) -> None:
    """Add one sentence of advice to an error that a model of the hub has caused.

    The model is not available, or it is served with another head than the code needs.
    Class, cause and traceback of the error do not change. No other error changes, and
    the sentence is added only once.

    Args:
        error: The error.
        served: The names of the models that are served.
    """
    if any(each in str(error) for each in _HEADS) and not getattr(error, _MARK, False):
        wanted = _name_in(error)
        if wanted is not None and wanted in served:
            _add(error, _about_head(wanted))
        return
    errors = sys.modules.get("huggingface_hub.errors")
    if errors is None:
        return
    kinds = tuple(
        kind for name in _ERRORS if (kind := getattr(errors, name, None)) is not None
    )
    chain = list(errors_behind(error))
    if any(getattr(each, _MARK, False) for each in chain):
        return
    if not any(isinstance(each, kinds) for each in chain):
        return
    name = next((found for each in chain if (found := _name_in(each))), None)
    if name is not None:
        _add(error, sentence(name))


def sentence(name: str) -> str:
    """Return the advice for a model that is not served."""
    source = "" if known_model(name) is not None else "=SOURCE"
    what = (
        ""
        if not source
        else (
            "; SOURCE is a known name such as bert-large, a config.json, or a checkpoint's "
            "folder"
        )
    )
    return (
        f"pytest-gpumem serves no model {name!r}: to have one with random weights, "
        f"without network, give --gpu-hub-model={name}{source}, the ini setting "
        f"gpu_hub_models, @pytest.mark.hub_model({name!r}) or "
        f"pytest_gpumem.serve_models{what}"
    )


def _about_head(name: str) -> str:
    return (
        f"pytest-gpumem serves {name!r} with the head of its class, whose size may differ "
        f"from yours: give --gpu-hub-model={name},architecture=AutoModel to serve it "
        "without a head, as most published models are"
    )


def _name_in(error: BaseException) -> str | None:
    """Return the model's name, from the variables of the traceback's frames."""
    found = None
    for frame, _line in traceback.walk_tb(error.__traceback__):
        values = variables_of(frame, *_VARIABLES)
        for variable in _VARIABLES:
            value = values.get(variable)
            if isinstance(value, str) and value:
                found = value
    return found


def _add(error: BaseException, text: str) -> None:
    first: Any = error.args[0] if error.args else None
    if isinstance(first, str) and str(error) == first:
        error.args = (f"{first}\n{text}", *error.args[1:])
    elif hasattr(error, "add_note"):  # from Python 3.11 on
        error.add_note(text)
    setattr(error, _MARK, True)
