"""Lets ``torch.profiler`` run without the CUDA driver that its Python code needs."""

from __future__ import annotations

import functools
from typing import Any, Final

from torch.autograd import profiler

from pytest_gpumem.devices.simulated.cpp_warnings import warn
from pytest_gpumem.devices.simulated.refusals import refuse

_HOST_ONLY: Final = (
    "torch.profiler measures only the host here: memory of a simulated card is counted as "
    "the host's, and there are no figures of the card. Use torch.cuda.memory_stats or "
    "torch.cuda.memory._record_memory_history."
)
_original_profile: Final[Any] = profiler.profile.__init__


@functools.wraps(_original_profile)
def profile(self: Any, *args: Any, **options: Any) -> None:
    """Run ``torch.autograd.profiler.profile``, which measures only the host.

    With ``profile_memory``, one warning says so: C++ counts what the values take on the
    host, and has no column for the card.
    """
    if options.get("use_device") == "cuda":
        options["use_device"] = None
        if options.get("profile_memory"):
            warn(_HOST_ONLY, once=True)
    options.pop("use_cuda", None)
    _original_profile(self, *args, **options)


_original_emitting: Final[Any] = profiler.emit_nvtx.__enter__


def emitting(self: Any) -> Any:
    """Refuse ``torch.autograd.profiler.emit_nvtx``: no profiler could see its ranges.

    Raises:
        UnsupportedOnSimulatedDeviceError: The context manager is enabled.
    """
    if self.enabled:
        refuse("torch.autograd.profiler.emit_nvtx")
    return _original_emitting(self)


#: Owner, name and new value of each replaced attribute.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (profiler.profile, "__init__", profile),
    (profiler.emit_nvtx, "__enter__", emitting),
)
