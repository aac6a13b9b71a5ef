"""Tests of what older versions of torch have not."""

from __future__ import annotations

from operator import attrgetter
from typing import Final

import pytest
import torch
import transformers

#: The installed torch, as two numbers.
TORCH: Final = tuple(int(each) for each in torch.__version__.split(".")[:2])
#: The same as a name, such as ``2.13``.
NAME: Final = ".".join(map(str, TORCH))
#: Whose names and rules the tests stand on; it lacks nothing of what they ask for.
REFERENCE: Final = (2, 13)
#: Whether torch asks CUDA itself for the number of cards once CUDA is in use, not NVML.
COUNTS_BY_CUDA: Final = "is_initializing" in torch.cuda.device_count.__code__.co_consts
#: The installed transformers' first number.
TRANSFORMERS: Final = int(transformers.__version__.partition(".")[0])
#: Up to transformers 4 what PyTorch keeps cached of a card is added to the card's share, in
#: which a small model fits. Source: ``_get_device_map`` of ``modeling_utils.py``.
SPREADS_EVENLY: Final = TRANSFORMERS >= 5


def since(major: int, minor: int, why: str) -> pytest.MarkDecorator:
    """Return a mark: run from a version of torch on; what differs before it is said."""
    return pytest.mark.skipif(
        (major, minor) > TORCH, reason=f"torch {torch.__version__}: {why}"
    )


def has(name: str) -> bool:
    """Tell whether this torch has a name; that the tests stand on must have it.

    Args:
        name: Below ``torch``, such as ``accelerator.get_memory_info``.

    Raises:
        AttributeError: No version has it.
    """
    try:
        attrgetter(name)(torch)
    except AttributeError:
        if TORCH >= REFERENCE:
            raise
        return False
    return True


def needs(name: str) -> pytest.MarkDecorator:
    """Return a mark: run where torch has a name."""
    return pytest.mark.skipif(
        not has(name), reason=f"torch {torch.__version__} has no torch.{name}"
    )
