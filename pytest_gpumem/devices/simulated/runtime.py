"""The CUDA runtime's few functions that Python libraries call."""

from __future__ import annotations

from typing import Any, Final

from pytest_gpumem.devices.simulated.machine import card_of


class _Code(int):
    """``cudaError``: a call's code; a simulated call ends in success."""

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
    """What ``torch.cuda.cudart()`` returns: the few runtime calls that libraries make."""

    cudaError = _Code  # noqa: N815  # the runtime's name

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802  # the runtime's name
        """Return free and total bytes of a card; it has a context from then on."""
        card = card_of(device)
        card.make_context()
        return card.mem_get_info()

    def cudaGetErrorString(self, code: int) -> str:  # noqa: N802  # the runtime's name
        """Return the text of an error code."""
        return _ERRORS.get(code, "unrecognized error code")

    def cudaProfilerStart(self) -> int:  # noqa: N802  # the runtime's name
        """Start nothing; 0 is success."""
        return 0

    def cudaProfilerStop(self) -> int:  # noqa: N802  # the runtime's name
        """Stop nothing; 0 is success."""
        return 0

    def cudaHostRegister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Pin nothing; 0 is success."""
        return 0

    def cudaHostUnregister(self, *_args: Any) -> int:  # noqa: N802  # the runtime's name
        """Unpin nothing; 0 is success."""
        return 0
