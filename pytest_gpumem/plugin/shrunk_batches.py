"""Finds batches that a library silently made smaller after an OOM.

The sizes are read from the running frame of a search, at the moment of an OOM. No
function is replaced, and no object of the program is kept alive.

Sources:

- accelerate's ``find_executable_batch_size``, which transformers' ``Trainer`` uses for
  ``auto_find_batch_size``: ``accelerate/utils/memory.py``. The closure of the function
  ``decorator`` has the batch size, the decorated ``function`` and ``reduce_batch_size_fn``.
- Lightning's ``Tuner.scale_batch_size`` and ``BatchSizeFinder``:
  ``tuner/batch_size_scaling.py``. ``_run_power_scaling`` and ``_run_binsearch_scaling`` have
  the ``trainer``, the ``batch_arg_name`` and the ``new_size`` that they try. The module, its
  hyperparameters or its data module has the size in the end (``lightning_setattr``).
- FlagEmbedding's embedders and rerankers (1.4.2): ``inference/embedder/encoder_only/base.py``
  and its siblings. While ``flag`` is false, a first batch is tried; after an OOM
  ``batch_size`` becomes three quarters of itself, rounded down.
"""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.plugin.record_keeping import record_of
from pytest_gpumem.stacks import calling_frame, frames_from, variables_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    import pytest

    from pytest_gpumem.records.incidents import Incident

_ACCELERATE: Final = "accelerate/utils/memory.py"
_LIGHTNING: Final = "/tuner/batch_size_scaling.py"
_FLAG_EMBEDDING: Final = "/FlagEmbedding/inference/"


class _Search(NamedTuple):
    """The state of a search for a batch that fits, at the moment of an OOM.

    Attributes:
        key: The id of the object that the search changes.
        function: The function or the model that is run with the batch.
        first: The size that ran out of memory.
        size: Returns the size of the next try, or None if it is no longer known.
    """

    key: int
    function: str
    first: int
    size: Callable[[], Any]


class ShrunkBatches:
    """Notes the first and the last size in a search for a batch that fits."""

    def __init__(self) -> None:
        self._searches: dict[int, _Search] = {}

    def note(self, _incident: Incident) -> None:
        """Examine the stack at the moment of an OOM."""
        for frame in frames_from(calling_frame()):
            search = _search_of(frame)
            if search is not None:
                first = self._searches.get(search.key, search).first
                self._searches[search.key] = search._replace(first=first)

    def end_phase(self, item: pytest.Item) -> None:
        """Note in the test's record the batches that were made smaller in a phase."""
        if not self._searches:
            return
        from pytest_gpumem.records.record import ShrunkBatch

        searches, self._searches = self._searches, {}
        for each in searches.values():
            last = each.size()
            if isinstance(last, int) and last < each.first:
                batch = ShrunkBatch(each.function, each.first, last)
                record_of(item).shrunk_batches.append(batch)


def _search_of(frame: FrameType) -> _Search | None:
    code = frame.f_code
    if code.co_name not in _READERS:
        return None
    place, read = _READERS[code.co_name]
    if place not in Path(code.co_filename).as_posix():
        return None
    return read(frame)


def _of_accelerate(frame: FrameType) -> _Search | None:
    found = variables_of(frame, "batch_size", "function", "reduce_batch_size_fn")
    first, reduce = found.get("batch_size"), found.get("reduce_batch_size_fn")
    free = getattr(getattr(reduce, "__code__", None), "co_freevars", ())
    if not isinstance(first, int) or "batch_size" not in free:
        return None  # with a reduce_batch_size_fn of the program the sizes are unknown
    cells: Any = getattr(reduce, "__closure__", ())
    # The closure's cell holds only the size of the next try.
    cell = cells[free.index("batch_size")]
    name = getattr(found.get("function"), "__qualname__", "a function")
    return _Search(id(cell), str(name), first, lambda: cell.cell_contents)


def _of_lightning(frame: FrameType) -> _Search | None:
    from pytest_gpumem.instruments.module_parts import dictionary_of

    found = variables_of(frame, "trainer", "batch_arg_name", "new_size")
    trainer, name, first = map(found.get, ("trainer", "batch_arg_name", "new_size"))
    if not isinstance(name, str) or not isinstance(first, int):
        return None
    parts = dictionary_of(trainer)
    strategy = dictionary_of(parts.get("_accelerator_connector")).get("strategy")
    model = dictionary_of(strategy).get("_lightning_module")
    owners = [each for each in (model, parts.get("datamodule")) if each is not None]
    if not owners:
        return None
    kept = [weakref.ref(each) for each in owners]

    def size() -> Any:
        for each in kept:
            held = dictionary_of(each())
            for values in (held, held.get("_hparams")):
                if isinstance(values, dict) and dict.__contains__(values, name):
                    return dict.__getitem__(values, name)
        return None

    return _Search(id(owners[0]), type(owners[0]).__qualname__, first, size)


def _of_flag_embedding(frame: FrameType) -> _Search | None:
    found = variables_of(frame, "flag", "batch_size")
    size = found.get("batch_size")
    if found.get("flag") is not False or not isinstance(size, int):
        return None
    return _Search(id(frame), frame.f_code.co_name, size, lambda: size * 3 // 4)


#: How a search is read, by the name of its function: a part of the file's path, and the
#: reader.
_READERS: Final[dict[str, tuple[str, Callable[[FrameType], _Search | None]]]] = {
    "decorator": (_ACCELERATE, _of_accelerate),
    "_run_power_scaling": (_LIGHTNING, _of_lightning),
    "_run_binsearch_scaling": (_LIGHTNING, _of_lightning),
    **dict.fromkeys(
        (
            "encode_single_device",
            "encode_queries_single_device",
            "compute_score_single_gpu",
        ),
        (_FLAG_EMBEDDING, _of_flag_embedding),
    ),
}
