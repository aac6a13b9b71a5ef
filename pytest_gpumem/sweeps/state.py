"""The finished points of a sweep, in a file, so that an interrupted one can continue."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from pytest_gpumem.records.codec import decode, encode
from pytest_gpumem.sweeps.report import Outcome, Point

if TYPE_CHECKING:
    import os


class SweepState:
    """A file with one line for each finished point, until the sweep is complete.

    The file begins anew if it cannot be read, if it belongs to another body or plan, or if
    the allocations of the body have changed. Without a path nothing is written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        name: str,
        num_allocations: int,
        plan: object,
    ) -> None:
        self._path = None if path is None else Path(path)
        self._header = {
            "name": name,
            "allocations": num_allocations,
            "plan": repr(plan),
        }
        self._known: dict[Point, Outcome] = {}
        self._stream: TextIO | None = None

    def known(self, point: Point) -> Outcome | None:
        """Return the outcome of a point in the interrupted sweep."""
        return self._known.get(point)

    def note(self, outcome: Outcome) -> None:
        """Write the outcome of a point."""
        if self._stream is not None:
            self._stream.write(json.dumps(encode(outcome)) + "\n")
            self._stream.flush()

    def __enter__(self) -> SweepState:  # noqa: PYI034  # Self needs Python 3.11
        if self._path is not None:
            self._known = self._read(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            entries = [self._header, *map(encode, self._known.values())]
            fresh = self._path.with_suffix(".new")
            fresh.write_text(
                "".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8"
            )
            fresh.replace(self._path)
            self._stream = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, kind: object, *_error: object) -> None:
        if self._stream is not None and self._path is not None:
            self._stream.close()
            if kind is None:  # the sweep is complete
                self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> dict[Point, Outcome]:
        found: dict[Point, Outcome] = {}
        # A process that was killed may have written only a part of its last line.
        with suppress(OSError, ValueError, RecursionError):
            header, *lines = path.read_text(encoding="utf-8").splitlines()
            if json.loads(header) == self._header:
                for line in lines:
                    outcome = decode(Outcome, json.loads(line))
                    found[outcome.point] = outcome
        return found
