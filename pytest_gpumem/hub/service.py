"""The models that a process serves, and the settings with which children serve them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.checkpoints.weights import missing_weights
from pytest_gpumem.files import write_atomically
from pytest_gpumem.hub.layout import commit_of, repository
from pytest_gpumem.hub.names import FROM_HUB, HubModel
from pytest_gpumem.hub.redirection import Patches
from pytest_gpumem.inheritance import HUB_VARIABLE

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping


_PREFIX: Final = "gpumem-hub-"
#: Folders older than this, in seconds, were left by runs that were killed.
_OLD_S: Final = 7 * 86400.0


class Service:
    """The models of one process: a stack by name, of which the last one counts.

    Args:
        root: The folder of the models' folders; None means a temporary folder, which is
            removed when no model is served any more.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._given: Final = root
        self._root: Path | None = root
        self._made_by = 0
        self._stack: Final[list[tuple[dict[str, HubModel], str | None]]] = []
        self._own: Final[dict[str, bool]] = {}
        self._patches: Final = Patches(self.find)

    @property
    def models(self) -> dict[str, HubModel]:
        """The served models, by each of their names."""
        return self._stack[-1][0] if self._stack else {}

    def find(self, name: str) -> tuple[HubModel, Path] | None:
        """Return the model that is served under a name, and its folder; build it if needed.

        Raises:
            CheckpointError: It cannot be built.
            OSError: Its folder cannot be written.
        """
        model = self.models.get(name)
        if model is None or model.source == FROM_HUB or self._root is None:
            return None
        if model.yields and self._is_own(model):
            return None
        if self._given is not None and not self._given.is_dir():
            return None  # the run above has ended
        return model, repository(model, self._root)

    def push(
        self, models: Iterable[HubModel], *, reaches_children: bool = True
    ) -> None:
        """Serve more models until ``pop`` is called."""
        if self._root is None:
            _remove_left()
            self._root = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._made_by = os.getpid()
        merged = dict(self.models)
        for model in models:
            merged |= dict.fromkeys(model.names, model)
        self._stack.append((merged, os.environ.get(HUB_VARIABLE)))
        if len(self._stack) == 1:
            self._patches.start()
        if reaches_children and self._given is None:
            file = self._root / f"{len(self._stack)}.json"
            listed = {name: model.to_json() for name, model in merged.items()}
            write_atomically(file, json.dumps(listed))
            os.environ[HUB_VARIABLE] = str(file)

    def pop(self) -> None:
        """Stop serving the models of the last ``push``."""
        _models, variable = self._stack.pop()
        if self._given is None:
            if variable is None:
                os.environ.pop(HUB_VARIABLE, None)
            else:
                os.environ[HUB_VARIABLE] = variable
        if self._stack:
            return
        self._patches.stop()
        self._own.clear()
        # A child that was forked in the block also leaves it; its parent owns the folder.
        if self._root and self._given is None and os.getpid() == self._made_by:
            shutil.rmtree(self._root, ignore_errors=True)
            self._root = None

    def _is_own(self, model: HubModel) -> bool:
        """Tell whether the user's own cache has the complete model."""
        if model.name not in self._own:
            cache = own_cache()
            self._own[model.name] = any(_is_whole(cache, each) for each in model.names)
        return self._own[model.name]


def _remove_left() -> None:
    """Remove old folders that killed runs of this user have left."""
    user = os.getuid() if hasattr(os, "getuid") else None
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):
            about = folder.lstat()
            is_ours = user is None or about.st_uid == user
            if is_ours and time.time() - about.st_mtime > _OLD_S:
                shutil.rmtree(folder, ignore_errors=True)


def own_cache() -> Path:
    """Return the user's cache of the hub.

    Source: ``huggingface_hub.constants``.
    """
    home = os.environ.get("HF_HOME")
    if not home:
        caches = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache")
        home = str(Path(caches, "huggingface"))
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return Path(os.path.expandvars(named or Path(home, "hub"))).expanduser()


def _is_whole(cache: Path, name: str) -> bool:
    folder = cache / f"models--{name.replace('/', '--')}"
    try:
        return missing_weights(folder / "snapshots" / commit_of(folder).strip()) is None
    except OSError:
        return False


# -- children -----------------------------------------------------------------------------

_inherited: Final[list[Service]] = []


def inherit() -> None:
    """Serve the models of the parent process, if it serves any.

    Raises:
        ValueError: The list of models makes no sense.
    """
    named = os.environ.get(HUB_VARIABLE)
    if not named or _inherited:
        return
    try:
        listed: Mapping[str, Any] = json.loads(Path(named).read_text("utf-8"))
        models = {name: HubModel.from_json(each) for name, each in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{HUB_VARIABLE} names no list of models ({error}); unset it"
        ) from None
    service = Service(Path(named).parent)
    _inherited.append(service)
    service.push(models.values())


def withdraw() -> None:
    """Undo ``inherit``: this process has a run of its own."""
    while _inherited:
        _inherited.pop().pop()


# -- this process -------------------------------------------------------------------------

_service: Final = Service()


def served_names() -> Collection[str]:
    """Return all names that this process serves a model under."""
    return _service.models.keys()


@contextmanager
def serving(
    models: Iterable[HubModel], *, reaches_children: bool = True
) -> Iterator[Service]:
    """Serve models for a block.

    Args:
        models: The models, in addition to those that are served already.
        reaches_children: Whether child processes serve them, too.
    """
    _service.push(models, reaches_children=reaches_children)
    try:
        yield _service
    finally:
        _service.pop()
