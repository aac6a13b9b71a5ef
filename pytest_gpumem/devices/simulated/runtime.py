"""The few functions of the CUDA runtime that Python libraries call."""

from __future__ import annotations

from typing import Any, Final

from pytest_gpumem.devices.simulated.machine import card_of


class _Code(int):
    """``cudaError``, the return code of a call; a simulated call returns success."""

    success = 0


#: Source: ``cudaGetErrorString`` of the CUDA runtime API's manual.
_ERRORS: Final[dict[int, str]] = {
    0: "no error",
    1: "invalid argument",
    2: "out of memory",
    3: "initialization error",
    100: "no CUDA-capable device is detected",
    101: "invalid device ordinal",
    700: "an illegal memory access was encountered",
    719: "unspecified launch failure",
    801: "operation not supported",
}


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
        return _ERRORS.get(code, "unrecognized error code")

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
