"""Finds the cards that a process sees: reads ``CUDA_VISIBLE_DEVICES`` as CUDA does.

Note [When the variable is read]
CUDA reads it once in each process, when CUDA is first used. Before that torch counts cards
through NVML, and reads the variable each time. The simulated card reads the variable at
the same moments, so that a test can hide the card from code that has not used it yet.
Source: CUDA C++ Programming Guide, "CUDA Environment Variables";
``c10/cuda/CUDAFunctions.cpp``, ``device_count`` (counts once in a process);
``torch/cuda/__init__.py``, ``_parse_visible_devices``, ``_transform_uuid_to_ordinals``
and ``device_count``.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

VISIBLE_VARIABLE: Final = "CUDA_VISIBLE_DEVICES"

#: The beginnings of the UUIDs of cards and of slices (MIG).
_PREFIXES: Final = ("GPU-", "MIG-")
#: The beginning of a text that C's ``strtoul`` reads as a number: ``1gpu`` is 1.
_NUMBER: Final = re.compile(r"[+-]?[0-9]+")
#: The most digits of an index; Python refuses to convert thousands of digits.
_DIGITS: Final = 9


def uuid_of(number: int) -> str:
    """Return the UUID of a simulated card, as NVML writes it."""
    return f"GPU-00000000-0000-0000-0000-{number:012d}"


def uuid_of_slice(number: int) -> str:
    """Return the UUID of a simulated slice (MIG), as NVML writes it."""
    return f"MIG-00000000-0000-0000-0001-{number:012d}"


def visible_numbers(uuids: Sequence[str]) -> tuple[int, ...]:
    """Return the cards with these UUIDs that a process sees if it uses CUDA now."""
    return numbers_of(os.environ.get(VISIBLE_VARIABLE), uuids)


def numbers_of(listed: str | None, uuids: Sequence[str]) -> tuple[int, ...]:
    """Return the cards that a value of the variable shows, in its order.

    The list ends at the first entry that names no card, or more than one. If it names a
    card twice, no card is visible. See Note [When the variable is read].

    Args:
        listed: The value; None if it is not set.
        uuids: The UUIDs of the machine's cards, in NVML's format and order.
    """
    if listed is None:
        return tuple(range(len(uuids)))
    shown: list[int] = []
    for entry in visible_names(listed):
        if isinstance(entry, int):
            found = [entry] if entry < len(uuids) else []
        else:
            found = [i for i, uuid in enumerate(uuids) if uuid.startswith(entry)]
        if len(found) != 1:
            break
        if found[0] in shown:
            return ()
        shown += found
    return tuple(shown)


def visible_names(listed: str) -> list[int] | list[str]:
    """Return the entries of a value of the variable: indices, or beginnings of UUIDs.

    The names of MIG instances are returned unchanged.
    """
    for prefix in _PREFIXES:
        if listed.startswith(prefix):
            names: list[str] = []
            for name in listed.split(","):
                if name in names:
                    return []
                if not name.startswith(prefix):
                    break
                names.append(name)
            return names
    indices: list[int] = []
    for entry in listed.split(","):
        match = _NUMBER.match(entry.strip())
        if match is None or len(match[0]) > _DIGITS or int(match[0]) < 0:
            break
        index = int(match[0])
        if index in indices:
            return []
        indices.append(index)
    return indices


def why_hidden() -> str:
    """Return the reason why no card is visible, as a part of a sentence."""
    return (
        f"{VISIBLE_VARIABLE}={os.environ.get(VISIBLE_VARIABLE, '')!r} hides every card"
    )
