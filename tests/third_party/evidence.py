"""What every test here needs: proof that an OOM happened, and errors of each flavour."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Final

import pytest
import torch

from pytest_gpumem import OomInjector
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable

MIB: Final = 2**20


@pytest.fixture(autouse=True, scope="session")
def light_collections() -> None:
    """Take what was imported out of the garbage collector's sight.

    The libraries collect garbage before each attempt; with all of them imported that
    would take most of the time.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_card() -> None:
    """Take cuBLAS's workspaces back, which a process keeps; they are 20 MiB each."""
    torch._C._cuda_clearCublasWorkspaces()  # the only way
    gc.collect()
    torch.cuda.empty_cache()


class CountOoms:
    """Count what the allocator failed for, in a with statement.

    Attributes:
        num: Failed allocations since the block began.
    """

    def __enter__(self) -> CountOoms:  # noqa: PYI034  # Self needs Python 3.11
        self._before = _num_ooms()
        return self

    def __exit__(self, *_error: object) -> None:
        """Do nothing: ``num`` can be read inside the block and after it."""

    @property
    def num(self) -> int:
        """Failed allocations since the block began."""
        return _num_ooms() - self._before


def _num_ooms() -> int:
    return int(torch.cuda.memory_stats().get("num_ooms", 0))


def error_of(flavour: str) -> Exception:
    """Return what an allocation of 3 MiB raises under a flavour.

    Raises:
        AssertionError: It raised nothing.
    """
    with OomInjector(f"any:flavour={flavour}"):
        try:
            torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        except (RuntimeError, MemoryError) as error:
            return error.with_traceback(None)
    raise AssertionError(f"no error of flavour {flavour}")


def accepted_by(detector: Callable[[Exception], bool]) -> set[str]:
    """Return the flavours that a library's detector takes for an OOM."""
    return {each for each in FLAVOURS if detector(error_of(each))}
