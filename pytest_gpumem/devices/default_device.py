"""torch's default device, put back to what it is at the start."""

from __future__ import annotations

import torch


def clear_default_device() -> None:
    """Let torch have no default device in this thread, as before one was set.

    ``torch.set_default_device(None)`` alone leaves a None, which
    ``torch.get_default_device`` of torch 2.8 trips over. Source: ``torch/__init__.py``.
    """
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # noqa: SLF001  # no public name
