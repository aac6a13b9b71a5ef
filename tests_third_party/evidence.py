"""What every test here needs: proof that an OOM happened, and errors of each flavour."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from pytest_gpumem import OomInjector
from pytest_gpumem.model.rules import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable

MIB: Final = 2**20


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


def error_of(flavour: str) -> RuntimeError:
    """Return what an allocation of 3 MiB raises under a flavour.

    Raises:
        AssertionError: It raised nothing.
    """
    with OomInjector(f"any:flavour={flavour}"):
        try:
            torch.empty(3 * MIB, dtype=torch.uint8, device="cuda")
        except RuntimeError as error:
            return error.with_traceback(None)
    raise AssertionError(f"no error of flavour {flavour}")


def accepted_by(detector: Callable[[Exception], bool]) -> set[str]:
    """Return the flavours that a library's detector takes for an OOM."""
    return {each for each in FLAVOURS if detector(error_of(each))}
