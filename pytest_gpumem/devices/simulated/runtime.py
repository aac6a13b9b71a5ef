"""The few functions of the CUDA runtime that Python libraries call."""

from __future__ import annotations

from pytest_gpumem.devices.cuda_errors import ERRORS
from pytest_gpumem.devices.simulated.machine import card_of, current_machine
from pytest_gpumem.devices.simulated.refusals import refusing


class _Code(int):
    """``cudaError``, the return code of a call; a simulated call returns success."""

    success = 0


class Runtime:
    """The object that ``torch.cuda.cudart()`` returns."""

    cudaError = _Code  # noqa: N815  # the runtime's name
    # Refused, because only an external stream needs the handles that these functions make.
    cudaStreamCreate = staticmethod(refusing("torch.cuda.ExternalStream"))  # noqa: N815
    cudaStreamDestroy = cudaStreamCreate  # noqa: N815

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

    def cudaHostRegister(self, pointer: int, nbytes: int, _flags: int = 0) -> int:  # noqa: N802  # the runtime's name
        """Register memory of the host, which is pinned from then on; return a code."""
        registered = current_machine().registered
        if not pointer or nbytes <= 0:
            return _Code(1)  # cudaErrorInvalidValue
        end = pointer + nbytes
        if any(
            start < end and pointer < start + size for start, size in registered.items()
        ):
            return _Code(712)  # cudaErrorHostMemoryAlreadyRegistered
        registered[pointer] = nbytes
        return _Code(0)

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802  # the runtime's name
        """End what ``cudaHostRegister`` has begun; return a code."""
        was = current_machine().registered.pop(pointer, None)
        return _Code(0 if was else 713)  # cudaErrorHostMemoryNotRegistered
