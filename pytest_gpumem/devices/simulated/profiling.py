"""``torch.profiler`` and lazy parameters: what of torch's Python asks for a driver.

The profiler is let past it; a lazy module's parameter, whose class cannot be a card's
as long as it has no shape, is refused.
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch.autograd import profiler
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from pytest_gpumem.devices.simulated.refusals import refuse

_original_profile: Final[Any] = profiler.profile.__init__


@functools.wraps(_original_profile)
def profile(self: Any, *args: Any, **options: Any) -> None:
    """``torch.autograd.profiler.profile``: times the host; a card computes nothing."""
    if options.get("use_device") == "cuda":
        options["use_device"] = None
    options.pop("use_cuda", None)
    _original_profile(self, *args, **options)


_original_emitting: Final[Any] = profiler.emit_nvtx.__enter__


def emitting(self: Any) -> Any:
    """``torch.autograd.profiler.emit_nvtx``: no profiler sees its ranges.

    Raises:
        UnsupportedOnSimulatedDeviceError: It is enabled.
    """
    __tracebackhide__ = True
    if self.enabled:
        refuse("torch.autograd.profiler.emit_nvtx")
    return _original_emitting(self)


def _uninitialized(original: Any) -> Any:
    @functools.wraps(original)
    def new(cls: type, *args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        device = args[1] if len(args) > 1 else options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            refuse("a lazy module's parameter")
        return original(cls, *args, **options)

    return staticmethod(new)


#: Owner, name and replacement of each.
REPLACEMENTS: Final[tuple[tuple[Any, str, Any], ...]] = (
    (profiler.profile, "__init__", profile),
    (profiler.emit_nvtx, "__enter__", emitting),
    *(
        (kind, "__new__", _uninitialized(kind.__new__))
        for kind in (UninitializedParameter, UninitializedBuffer)
    ),
)
