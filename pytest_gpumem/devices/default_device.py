"""Resets torch's default device to the state of a new process."""

from __future__ import annotations

import torch


def clear_default_device() -> None:
    """Remove torch's default device in this thread, as if none was ever set.

    So is the constructor of ``torch.Tensor`` that a card's default tensor type has set.

    ``torch.set_default_device(None)`` alone stores a None, with which
    ``torch.get_default_device`` of torch 2.8 fails. Source: ``torch/__init__.py``.
    """
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # noqa: SLF001  # no public API
    if "__new__" in vars(torch.Tensor):
        del torch.Tensor.__new__
