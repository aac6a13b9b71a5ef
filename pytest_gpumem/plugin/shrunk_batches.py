"""Finds batches that a library made smaller after an OOM without a message.

They are read from the running frame of accelerate's ``find_executable_batch_size``, which
transformers' ``Trainer`` uses for ``auto_find_batch_size``. The function is not replaced.

Source: ``accelerate/utils/memory.py``; there the closure of the function ``decorator`` has
the batch size, the decorated ``function`` and ``reduce_batch_size_fn`` as variables.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.plugin.record_keeping import record_of
from pytest_gpumem.records.record import ShrunkBatch
from pytest_gpumem.stacks import calling_frame, frames_from, variables_of

if TYPE_CHECKING:
    from collections.abc import Generator
    from types import CellType, FrameType

    from pytest_gpumem.records.incidents import Incident

_FILE: Final = "accelerate/utils/memory.py"


class _Search(NamedTuple):
    """The state of a search for a batch that fits, at the moment of an OOM."""

    function: str
    first: int
    #: The closure's cell; it holds only the size of the next try.
    size: CellType


class ShrunkBatches:
    """Notes the first and the last size in a search for a batch that fits."""

    def __init__(self) -> None:
        self._searches: dict[int, _Search] = {}

    def note(self, _incident: Incident) -> None:
        """Examine the stack at the moment of an OOM."""
        for frame in frames_from(calling_frame()):
            search = _search_of(frame)
            if search is not None:
                self._searches.setdefault(id(search.size), search)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Note in the test's record the batches that were made smaller."""
        self._searches = {}
        try:
            return (yield)
        finally:
            for each in self._searches.values():
                last = each.size.cell_contents
                if isinstance(last, int) and last < each.first:
                    batch = ShrunkBatch(each.function, each.first, last)
                    record_of(item).shrunk_batches.append(batch)
            self._searches = {}


def _search_of(frame: FrameType) -> _Search | None:
    code = frame.f_code
    if code.co_name != "decorator" or not Path(code.co_filename).as_posix().endswith(
        _FILE
    ):
        return None
    found = variables_of(frame, "batch_size", "function", "reduce_batch_size_fn")
    first, reduce = found.get("batch_size"), found.get("reduce_batch_size_fn")
    free = getattr(getattr(reduce, "__code__", None), "co_freevars", ())
    if not isinstance(first, int) or "batch_size" not in free:
        return None  # with a reduce_batch_size_fn of the program the sizes are unknown
    cells: Any = getattr(reduce, "__closure__", ())
    name = getattr(found.get("function"), "__qualname__", "a function")
    return _Search(str(name), first, cells[free.index("batch_size")])
