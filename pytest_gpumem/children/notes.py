"""Figures of a child process, in a small file that is always up to date.

The file is mapped into memory, so each new peak is in the file at once and stays there if
the child is killed.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import tempfile
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from pytest_gpumem.cards import MAX_CARDS
from pytest_gpumem.records.memory_figures import OPTIONAL, MemoryFigures

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SUFFIX: Final = ".gpumem"
#: The most rules for which failed allocations are counted.
MAX_RULES: Final = 32

#: The number that means that a figure is not known.
_UNKNOWN: Final = -1
_NAMES: Final = tuple(field.name for field in fields(MemoryFigures))
_CARD: Final = struct.Struct(f"<q{len(_NAMES)}q")
_COUNTS: Final = struct.Struct(f"<q{MAX_RULES}q")
#: The parts of the file: counts, cards, then a JSON text of any length that describes the
#: child.
_FIGURES: Final = _COUNTS.size + MAX_CARDS * _CARD.size
#: Source: ``PID_MAX_LIMIT`` in Linux's ``include/linux/threads.h``.
_MAX_PID: Final = 2**22


class ChildFigures(NamedTuple):
    """The figures of one child so far.

    Attributes:
        path: The child's file.
        pid: The child's process id.
        environment: The key of its figures: card, backend, torch.
        num_requests: The number of allocations that it requested.
        failed_counts: The number of allocations that each rule made fail in the child.
        figures: Its figures, by card.
    """

    path: Path
    pid: int
    environment: str
    num_requests: int
    failed_counts: tuple[int, ...]
    figures: Mapping[int, MemoryFigures]


class Note:
    """A child's own file, for writing.

    Args:
        folder: The folder; if it does not exist, it is made for this user only.
        environment: The key of the figures.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, folder: Path, environment: str) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = json.dumps({"pid": os.getpid(), "environment": environment}).encode()
        handle, temporary = tempfile.mkstemp(suffix=".new", dir=folder)
        with os.fdopen(handle, "wb") as file:
            file.write(bytes(_FIGURES) + about)
        # Windows cannot rename a file that is open or mapped.
        path = Path(temporary).rename(Path(temporary).with_suffix(SUFFIX))
        with path.open("r+b") as file:
            self._map: Final = mmap.mmap(file.fileno(), _FIGURES)

    def write(self, num_requests: int, failed_counts: Sequence[int]) -> None:
        """Note how many allocations were requested, and how many each rule made fail."""
        counted = [*failed_counts[:MAX_RULES], *[0] * (MAX_RULES - len(failed_counts))]
        _COUNTS.pack_into(self._map, 0, num_requests, *counted)

    def write_card(self, index: int, figures: MemoryFigures) -> None:
        """Note a card's figures, under the run's index of the card."""
        offset = _COUNTS.size + index * _CARD.size
        _CARD.pack_into(self._map, offset, 1, *_values(figures))


def _values(figures: MemoryFigures) -> tuple[Any, ...]:
    return tuple(_UNKNOWN if value is None else value for value in astuple(figures))


def read_note(path: Path) -> ChildFigures | None:
    """Return the figures in a file; None if it is another kind of file."""
    try:
        content = path.read_bytes()
        about = json.loads(content[_FIGURES:])
        pid, environment = about["pid"], about["environment"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if type(pid) is not int or not 0 < pid <= _MAX_PID or type(environment) is not str:
        return None
    num_requests, *failed_counts = _COUNTS.unpack_from(content)
    found = {}
    for index in range(MAX_CARDS):
        offset = _COUNTS.size + index * _CARD.size
        is_used, *values = _CARD.unpack_from(content, offset)
        if is_used:
            figures: dict[str, Any] = {
                name: None if name in OPTIONAL and value == _UNKNOWN else value
                for name, value in zip(_NAMES, values, strict=True)
            }
            figures["device_index"] = index
            found[index] = MemoryFigures(**figures)
    return ChildFigures(
        path,
        pid,
        environment,
        num_requests,
        tuple(failed_counts),
        found,
    )


def read_notes(folder: Path) -> list[ChildFigures]:
    """Return the figures of all children so far; empty if the folder does not exist."""
    try:
        paths = sorted(folder.glob(f"*{SUFFIX}"))
    except OSError:
        return []
    read = [read_note(path) for path in paths]
    return [each for each in read if each is not None]


def together(children: Sequence[ChildFigures]) -> list[MemoryFigures]:
    """Combine the figures of several children.

    A peak is the largest peak of any child; it is unknown if that of one child is unknown.
    Errors and retries are added up. A process frees all its memory when it ends, so no
    bytes count as left.
    """
    by_card: dict[int, list[MemoryFigures]] = {}
    for child in children:
        for index, figures in child.figures.items():
            by_card.setdefault(index, []).append(figures)
    return [_together(by_card[index]) for index in sorted(by_card)]


def _together(several: Sequence[MemoryFigures]) -> MemoryFigures:
    values: dict[str, Any] = {}
    for name in _NAMES:
        told = [getattr(each, name) for each in several]
        if None in told:
            values[name] = None
        else:
            values[name] = sum(told) if name.startswith("num_") else max(told)
        if name.startswith("end_"):
            values[name] = 0
    return MemoryFigures(**values)
