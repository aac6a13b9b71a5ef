"""A file of the bytes that tests add to cards: sorted JSON, for review in pull requests.

Figures are in bytes, by environment (card, backend, PyTorch's version), then by test or
fixture, then by name. Figures of different environments cannot be compared::

    {
      "fixtures": {
        "Tesla T4, simulated, torch 2.13": {
          "tests/conftest.py::model": {"allocated": 1340928000, ...}
        }
      },
      "format": "pytest-gpumem baseline",
      "peaks": {
        "Tesla T4, simulated, torch 2.13": {
          "tests/test_load.py::test_it_answers": {"allocated": 1350365184, ...}
        }
      },
      "version": 2
    }

Note [What an entry holds]
``allocated`` is the peak on the card, of all owners together. ``allocated before`` are the
bytes on the card that do not belong to the test. ``allocated growth`` is how far the test
went above them. ``allocated left`` are the bytes that the test left behind; for a fixture,
the bytes that it holds once it is made. A missing ``left`` means 0. Growth and bytes left
are judged, because they do not depend on other tests. ``reserved`` has the same figures.
``requested growth`` counts the requested bytes, which do not depend on the blocks that
served the requests. Format 1 had only the two peaks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import BaselineError
from pytest_gpumem.files import locked, write_atomically
from pytest_gpumem.records.codec import Count, DamageError, decoder

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

FORMAT: Final = "pytest-gpumem baseline"
VERSION: Final = 2
#: The judged metrics of each test and card.
METRICS: Final = ("allocated", "reserved")
#: Further figures; they show whether the requests have changed, or only their blocks.
REQUESTED: Final = "requested"
BEFORE: Final = "before"
GROWTH: Final = "growth"
LEFT: Final = "left"

#: Bytes by figure; every card except the first is named: ``"cuda:1 allocated growth"``.
Peaks = dict[str, int]
_DECODER: Final = decoder(dict[str, dict[str, dict[str, Count]]])
_VERSION: Final = re.compile(r"(.*, torch )([0-9]+)\.([0-9]+)", re.DOTALL)


def metric_key(metric: str, device_index: int) -> str:
    """Return the key of a metric on a card."""
    return metric if device_index == 0 else f"cuda:{device_index} {metric}"


def has_growth(peaks: Mapping[str, int]) -> bool:
    """Tell whether an entry has growth, and not only the absolute peaks of format 1."""
    return any(name.endswith(f" {GROWTH}") for name in peaks)


def torch_of(environment: str) -> str:
    """Return the version of torch that an environment names, for example ``"2.13"``."""
    found = _VERSION.fullmatch(environment)
    return "unknown" if found is None else f"{found[2]}.{found[3]}"


def nearest(environment: str, known: Iterable[str]) -> str | None:
    """Return the same card and backend with the nearest version of torch.

    Args:
        environment: The environment to find.
        known: The environments of the file; of two versions that are equally near,
            the earlier one is returned.
    """
    wanted = _VERSION.fullmatch(environment)
    others = [found for each in known if (found := _VERSION.fullmatch(each))]
    if wanted is None:
        return None

    def distance(found: re.Match[str]) -> tuple[int, int, int]:
        major, minor = int(found[2]), int(found[3])
        return (
            abs(major - int(wanted[2])),
            abs(minor - int(wanted[3])),
            100 * major + minor,
        )

    best = min(
        (found for found in others if found[1] == wanted[1]),
        key=distance,
        default=None,
    )
    return None if best is None else best[0]


class Baseline:
    """Figures of tests and fixtures by environment.

    Args:
        peaks: Figures of tests, by environment and test.
        fixtures: Figures of fixtures, by environment and fixture.
    """

    def __init__(
        self,
        peaks: Mapping[str, Mapping[str, Peaks]] | None = None,
        fixtures: Mapping[str, Mapping[str, Peaks]] | None = None,
    ) -> None:
        self.peaks: Final = _copied(peaks or {})
        self.fixtures: Final = _copied(fixtures or {})

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Baseline)
            and self.peaks == other.peaks
            and self.fixtures == other.fixtures
        )

    __hash__ = None  # type: ignore[assignment]  # a baseline can change

    @classmethod
    def parse(cls, text: str, name: str) -> Baseline:
        """Read a baseline's text.

        Args:
            text: The JSON.
            name: The name in errors.

        Raises:
            BaselineError: It is broken, not a baseline, or of a newer format.
        """
        try:
            # Editors on Windows put a byte order mark before it.
            document = json.loads(text.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise BaselineError(
                f"{name} is not JSON ({error}); restore it from version control, or "
                "write a new one with --gpu-update-baseline after deleting it"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BaselineError(
                f"{name} is not a baseline of pytest-gpumem (its format is not "
                f"{FORMAT!r}); name another file"
            )
        version = document.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise BaselineError(
                f"{name} has format version {version!r}; this pytest-gpumem reads up "
                f"to {VERSION}: upgrade it"
            )
        try:
            peaks = _entries("peaks", document.get("peaks"))
            fixtures = _entries("fixtures", document.get("fixtures", {}))
        except DamageError as error:
            raise BaselineError(
                f"{name} is damaged ({error}): 'peaks' and 'fixtures' must map "
                "environments to names to figures to bytes; restore it from version "
                "control"
            ) from None
        return cls(peaks, fixtures)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Baseline:
        """Read a file.

        Raises:
            BaselineError: As for ``parse``, or the file cannot be read.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise BaselineError(
                f"{path} does not exist; write it with --gpu-update-baseline"
            ) from None
        except UnicodeDecodeError:
            raise BaselineError(
                f"{path} cannot be read: it is not in UTF-8; save it in UTF-8 (a "
                "shell's > may have written UTF-16), or restore it from version control"
            ) from None
        except (OSError, ValueError) as error:
            raise BaselineError(f"{path} cannot be read: {error}") from None
        return cls.parse(text, str(path))

    def to_text(self) -> str:
        """Return the file's text: sorted, one figure on a line."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "peaks": self.peaks,
            "fixtures": self.fixtures,
        }
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, completely or not at all."""
        write_atomically(path, self.to_text())

    @classmethod
    def revise(
        cls, path: str | os.PathLike[str], change: Callable[[Baseline], None]
    ) -> bool:
        """Read a file, change it and write it, under a lock against other writers.

        Args:
            path: The file; if there is none, an empty baseline is changed.
            change: Changes the baseline.

        Returns:
            Whether the file was written; without a change it is not written.

        Raises:
            BaselineError: The file is not a baseline.
            OSError: It cannot be written; the old file is untouched.
        """
        with locked(path):
            is_there = Path(path).exists()
            baseline = cls.read(path) if is_there else cls()
            before = _copied(baseline.peaks), _copied(baseline.fixtures)
            change(baseline)
            if is_there and before == (baseline.peaks, baseline.fixtures):
                return False
            baseline.write(path)
            return True

    def update(
        self,
        environment: str,
        peaks: Mapping[str, Peaks],
        stale: Iterable[str] = (),
        *,
        fixtures: Mapping[str, Peaks] | None = None,
        stale_fixtures: Iterable[str] = (),
    ) -> None:
        """Add new figures of an environment, and remove stale entries."""
        for kept, found, gone in (
            (self.peaks, peaks, stale),
            (self.fixtures, fixtures or {}, stale_fixtures),
        ):
            entries = kept.setdefault(environment, {})
            entries.update({name: dict(values) for name, values in found.items()})
            for name in gone:
                entries.pop(name, None)
            if not entries:
                del kept[environment]

    def merge(self, other: Baseline) -> None:
        """Add all entries of another baseline; for figures in both, the larger counts."""
        for kept, others in (
            (self.peaks, other.peaks),
            (self.fixtures, other.fixtures),
        ):
            for environment, entries in others.items():
                mine = kept.setdefault(environment, {})
                for name, values in entries.items():
                    mine[name] = larger(mine.get(name, {}), values)


def larger(one: Mapping[str, int], other: Mapping[str, int]) -> Peaks:
    """Merge two entries; the larger figure counts."""
    return {
        name: max(one.get(name, 0), other.get(name, 0))
        for name in one.keys() | other.keys()
    }


def _copied(
    peaks: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> dict[str, dict[str, Peaks]]:
    return {
        environment: {name: dict(values) for name, values in entries.items()}
        for environment, entries in peaks.items()
    }


def _entries(part: str, value: Any) -> dict[str, dict[str, Peaks]]:
    try:
        found: dict[str, dict[str, Peaks]] = _DECODER(value)
    except DamageError as error:
        raise DamageError(f"{part}{error}") from None
    return found
