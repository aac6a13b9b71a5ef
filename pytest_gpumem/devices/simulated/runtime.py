"""The few functions of the CUDA runtime that Python libraries call."""

from __future__ import annotations

from typing import Any

from pytest_gpumem.devices.cuda_errors import ERRORS
from pytest_gpumem.devices.simulated.machine import card_of


class _Code(int):
    """``cudaError``, the return code of a call; a simulated call returns success."""

    success = 0


class Runtime:
    """The object that ``torch.cuda.cudart()`` returns."""

    cudaError = _Code  # noqa: N815  # the runtime's name

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802  # the runtime's name
        """Return a card's free and total bytes; the call creates a context."""
        card = card_of(device)
        card.make_context()
        return card.mem_get_info()

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802  # the runtime's name
        """Return the description of an error code."""
        _name, words = ERRORS.get(code, ("", "unrecognized error code"))
        return words

    def cudaProfilerStart(self) -> int:  # noqa: N802  # the runtime's name
        """Do nothing and return 0, which means success."""
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802  # the runtime's name
        """Do nothing and return 0, which means success."""
        return 0

    def cudaHostRegister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Do nothing and return 0, which means success."""
        return 0

    def cudaHostUnregister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Do nothing and return 0, which means success."""
        return 0
