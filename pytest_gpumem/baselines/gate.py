"""What changed against a baseline, and whether it is too much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pytest_gpumem.baselines.baseline import METRICS
from pytest_gpumem.errors import SizeError
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_gpumem.baselines.baseline import Peaks


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How much more of a metric passes.

    Attributes:
        metric: ``"allocated"`` or ``"reserved"``.
        share: Of the baseline's bytes, for example 0.05.
        nbytes: Or so many bytes; the larger of the two counts.
    """

    metric: str
    share: float = 0.0
    nbytes: int = 0

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Read ``"allocated:5%"`` or ``"reserved:16MiB"``.

        Raises:
            ValueError: It is neither.
        """
        metric, _colon, amount = (each.strip() for each in text.partition(":"))
        if not amount:
            raise ValueError(
                f"{text!r} is half a tolerance; write METRIC:TOLERANCE, as in "
                "allocated:5% or reserved:16MiB"
            )
        if metric not in METRICS:
            raise ValueError(
                f"{text!r}: {metric!r} is no metric; accepted are "
                f"{', '.join(METRICS)}, as in allocated:5% or reserved:16MiB"
            )
        if amount.endswith("%"):
            number = amount[:-1]
            try:
                share = float(number) / 100
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1000:  # noqa: PLR2004  # beyond, it is a slip; nan is neither
                raise ValueError(f"{text!r}: {amount!r} is no percentage from 0 on")
            return cls(metric, share=share)
        try:
            return cls(metric, nbytes=parse_size(amount, allow_zero=True))
        except SizeError as error:
            raise ValueError(f"{text!r}: {error}") from None

    def allows(self, before: int, now: int) -> bool:
        """Tell whether a peak may be what it is now."""
        return now - before <= max(before * self.share, self.nbytes)

    def __str__(self) -> str:
        return f"{self.share * 100:.4g}%" if self.share else format_size(self.nbytes)


#: The gate of a run that names none. The same code on the same card allocates the same
#: bytes; what is left for is a new version's other choice of a kernel.
DEFAULT: Final = (Tolerance("allocated", share=0.01),)


@dataclass(frozen=True, slots=True)
class Change:
    """A metric of a test, before and now.

    Attributes:
        test: The test.
        metric: The metric; a card but the first is named in it.
        before: Bytes in the baseline.
        now: Bytes in this run.
        is_regression: Whether it is more than what is allowed.
    """

    test: str
    metric: str
    before: int
    now: int
    is_regression: bool

    @property
    def percent(self) -> float:
        """By how much it changed."""
        if self.before == 0:
            return float("inf") if self.now else 0.0
        return (self.now - self.before) / self.before * 100

    def __str__(self) -> str:
        sign = "+" if self.now >= self.before else "-"
        delta = format_size(abs(self.now - self.before))
        return (
            f"{self.metric} {format_size(self.before)} -> {format_size(self.now)} "
            f"({sign}{delta}, {self.percent:+.1f} %)"
        )


def compare(
    test: str, before: Peaks, now: Mapping[str, int], gate: Iterable[Tolerance]
) -> list[Change]:
    """Return what changed of a test, metric by metric.

    A metric without a tolerance is reported and never a regression; one of which the
    baseline has no figure has not changed.
    """
    tolerances = {each.metric: each for each in gate}
    changes = []
    for metric in sorted(before.keys() & now.keys()):
        if before[metric] == now[metric]:
            continue
        tolerance = tolerances.get(metric.rpartition(" ")[2])
        changes.append(
            Change(
                test,
                metric,
                before[metric],
                now[metric],
                is_regression=tolerance is not None
                and not tolerance.allows(before[metric], now[metric]),
            )
        )
    return changes
