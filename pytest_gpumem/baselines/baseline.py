"""A file of peaks: sorted JSON, to be reviewed in a pull request.

Peaks are kept by environment (card, backend, PyTorch's version), for figures of two of
them do not compare, then by test, then by metric and card, in bytes::

    {
      "format": "pytest-gpumem baseline",
      "version": 1,
      "peaks": {
        "Tesla T4, simulated, torch 2.13": {
          "tests/test_load.py::test_it_loads": {"allocated": 1340928000, ...}
        }
      }
    }
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.errors import BaselineError
from pytest_gpumem.files import write_atomically
from pytest_gpumem.sizes import MAX_BYTES

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping

FORMAT: Final = "pytest-gpumem baseline"
VERSION: Final = 1
#: What is kept of each test and card.
METRICS: Final = ("allocated", "reserved")

#: Bytes by metric; a card but the first is named: ``"cuda:1 allocated"``.
Peaks = dict[str, int]


def metric_key(metric: str, device_index: int) -> str:
    """Return the key of a metric on a card."""
    return metric if device_index == 0 else f"cuda:{device_index} {metric}"


class Baseline:
    """Peaks of tests by environment.

    Args:
        peaks: By environment and test.
    """

    def __init__(self, peaks: Mapping[str, Mapping[str, Peaks]] | None = None) -> None:
        self.peaks: Final[dict[str, dict[str, Peaks]]] = {
            environment: {test: dict(values) for test, values in tests.items()}
            for environment, tests in (peaks or {}).items()
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Baseline) and self.peaks == other.peaks

    __hash__ = None  # type: ignore[assignment]  # it changes

    @classmethod
    def parse(cls, text: str, name: str) -> Baseline:
        """Read a baseline's text.

        Args:
            text: The JSON.
            name: What to call it in errors.

        Raises:
            BaselineError: It is broken, not a baseline, or of a newer format.
        """
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BaselineError(
                f"{name} is no JSON ({error}); restore it from version control, or "
                "write it anew with --gpu-update-baseline after deleting it"
            ) from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise BaselineError(
                f"{name} is no baseline of pytest-gpumem (its format is not "
                f"{FORMAT!r}); name another file"
            )
        version = document.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise BaselineError(
                f"{name} has format version {version!r}; this pytest-gpumem reads up "
                f"to {VERSION}: upgrade it"
            )
        peaks = document.get("peaks")
        if not _is_peaks(peaks):
            raise BaselineError(
                f"{name} is damaged: 'peaks' must map environments to tests to metrics "
                "to bytes; restore it from version control"
            )
        return cls(peaks)

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
        except (OSError, UnicodeDecodeError) as error:
            raise BaselineError(f"{path} cannot be read: {error}") from None
        return cls.parse(text, str(path))

    def to_text(self) -> str:
        """Return the file's text: sorted, one figure on a line."""
        document = {"format": FORMAT, "version": VERSION, "peaks": self.peaks}
        return json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all."""
        write_atomically(path, self.to_text())

    def update(
        self, environment: str, peaks: Mapping[str, Peaks], stale: Iterable[str] = ()
    ) -> None:
        """Take in new peaks of an environment; drop tests that are no more."""
        kept = self.peaks.setdefault(environment, {})
        kept.update({test: dict(values) for test, values in peaks.items()})
        for test in stale:
            kept.pop(test, None)
        if not kept:
            del self.peaks[environment]

    def merge(self, other: Baseline) -> None:
        """Take in all of another baseline; of a test in both, the larger peaks."""
        for environment, tests in other.peaks.items():
            kept = self.peaks.setdefault(environment, {})
            for test, values in tests.items():
                mine = kept.setdefault(test, {})
                for metric, nbytes in values.items():
                    mine[metric] = max(nbytes, mine.get(metric, 0))


def _is_peaks(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(tests, dict)
        and all(
            isinstance(peaks, dict)
            and all(
                type(nbytes) is int and 0 <= nbytes <= MAX_BYTES
                for nbytes in peaks.values()
            )
            for peaks in tests.values()
        )
        for tests in value.values()
    )
