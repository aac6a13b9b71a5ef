"""The errors of pytest-gpumem; errors of torch keep torch's classes."""

from __future__ import annotations


class GpuMemError(Exception):
    """The base class of pytest-gpumem's own errors."""


class GivenValueError(GpuMemError, ValueError):
    """A given value makes no sense.

    Attributes:
        value: What was given, as given.
    """

    def __init__(self, message: str, *, value: object) -> None:
        super().__init__(message)
        self.value = value


class SizeError(GivenValueError):
    """A size or budget text cannot be read, or makes no sense."""


class CardError(GivenValueError):
    """A card name or a made-up card's description cannot be read."""


class RuleError(GpuMemError, ValueError):
    """An injection rule cannot be read.

    Attributes:
        value: The whole rule, as given.
        position: Index into ``value`` of the character at fault.
    """

    def __init__(self, message: str, *, value: str, position: int) -> None:
        super().__init__(message)
        self.value = value
        self.position = position


class BudgetError(GivenValueError):
    """A budget leaves no room, or is larger than the card."""


class TenantError(GpuMemError, RuntimeError):
    """A competing process cannot get the bytes that it was asked to hold."""


class AdmissionTimeoutError(GpuMemError, TimeoutError):
    """A card had no room among other processes for longer than was allowed."""


class SharedFolderError(GpuMemError, PermissionError):
    """A folder or lock that processes share is not safe to use.

    Attributes:
        path: The folder or lock.
    """

    def __init__(self, message: str, *, path: str) -> None:
        super().__init__(message)
        self.path = path


class AllocatorSettingError(GpuMemError, ValueError):
    """The simulated card cannot follow the environment's settings of the allocator."""


class DeviceUnavailableError(GpuMemError, RuntimeError):
    """The requested device does not exist on this machine, or does not exist yet."""


class UnsupportedOnSimulatedDeviceError(GpuMemError, NotImplementedError):
    """A feature of a real card that the simulated CUDA device does not have.

    Attributes:
        feature: The feature's name as torch spells it.
    """

    def __init__(self, feature: str, advice: str) -> None:
        super().__init__(
            f"{feature} is not supported on the simulated CUDA device; {advice}"
        )
        self.feature = feature


class NoValuesError(GpuMemError, RuntimeError):
    """A value was read on a simulated card that keeps none (``--gpu-values=none``).

    Attributes:
        operation: The operation that read the value.
        place: The file, line and function that called the operation; empty if not
            known.
    """

    def __init__(self, operation: str, place: str = "") -> None:
        caller = f" at {place}" if place else ""
        super().__init__(
            f"{operation}{caller} reads values, and this simulated CUDA device keeps only "
            "shapes and bytes; run it with --gpu-values=computed "
            '(simulated_device(..., values="computed")), or do not read the result'
        )
        self.operation = operation
        self.place = place


class HostMemoryError(GpuMemError):
    """The host has no room for the values that a simulated card holds.

    This is not an OOM of the card, and handlers of OOMs do not catch it: the card has
    room, and a smaller batch does not help.
    """

    def __init__(self) -> None:
        super().__init__(
            "the host has no room for the values of a simulated card's tensors, though "
            "the card itself has; run with --gpu-values=none "
            '(simulated_device(..., values="none")), with a smaller card (--gpu-card), '
            "or on a larger host"
        )


class SweepError(GpuMemError, ValueError):
    """A sweep makes no sense, or its code fails without any fault."""


class GrowthError(GpuMemError, AssertionError):
    """The memory of a loop on the cards grows from step to step."""


class PlanError(GivenValueError):
    """A task for ``fit_model`` makes no sense, or the model cannot do it."""


class CheckError(GivenValueError):
    """A loader cannot be found, called, or checked."""


class CheckpointError(GpuMemError, RuntimeError):
    """A checkpoint cannot be built, found or trusted."""


class BaselineError(GpuMemError, ValueError):
    """A file is not a baseline, is damaged, or is of a newer format."""


class ReportError(GpuMemError, ValueError):
    """A file is not a report, is damaged, or is of a newer format."""


class RecordingError(GpuMemError, ValueError):
    """A recording cannot be made."""


class TraceError(GpuMemError, ValueError):
    """A trace file is not one that can be replayed."""


class RunsEagerlyWarning(UserWarning):
    """Code for ``torch.compile`` runs without compilation, operator by operator."""

    def __init__(self) -> None:
        super().__init__(
            "torch.compile: no kernels can be made for a simulated card, so this runs "
            "as it is: values and bytes are those of eager code, and fused kernels of a "
            "real card take other bytes. --gpu-compiled=refused "
            '(simulated_device(..., compiled="refused")) makes it an error.'
        )
