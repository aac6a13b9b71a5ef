"""Resets torch's default device to the state of a new process."""

from __future__ import annotations

from typing import Final

import torch


class _DefaultType:
    """Whether ``torch.Tensor(…)`` creates a card's tensor without a default device.

    Attributes:
        is_of_card: Whether a card's type was set by ``torch.set_default_tensor_type``.
    """

    is_of_card = False


default_type: Final = _DefaultType()


def clear_default_device() -> None:
    """Remove torch's default device in this thread, as if none had ever been set.

    A card's default tensor type is removed, too.

    ``torch.set_default_device(None)`` alone stores a None, with which
    ``torch.get_default_device`` of torch 2.8 fails. Source: ``torch/__init__.py``.
    """
    torch.set_default_device(None)
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # noqa: SLF001  # no public API
    default_type.is_of_card = False
