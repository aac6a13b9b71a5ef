"""Compares figures with a baseline, and finds those that grew too much."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Final

from pytest_gpumem.baselines.baseline import BEFORE, GROWTH, LEFT, METRICS, REQUESTED
from pytest_gpumem.errors import SizeError
from pytest_gpumem.records.run_record import Change
from pytest_gpumem.sizes import format_size, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pytest_gpumem.baselines.baseline import Peaks


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The accepted growth of a metric.

    Attributes:
        metric: ``"allocated"`` or ``"reserved"``.
        share: A share of the baseline's bytes, for example 0.05.
        nbytes: A number of bytes; the larger of the two counts.
    """

    metric: str
    share: float = 0.0
    nbytes: int = 0

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """Read ``"allocated:5%"`` or ``"reserved:16MiB"``.

        Raises:
            ValueError: The text has another form.
        """
        metric, _colon, amount = (each.strip() for each in text.partition(":"))
        if not amount:
            raise ValueError(
                f"{text!r} is half a tolerance; write METRIC:TOLERANCE, as in "
                "allocated:5% or reserved:16MiB"
            )
        if metric not in METRICS:
            raise ValueError(
                f"{text!r}: {metric!r} is not a metric; accepted are "
                f"{', '.join(METRICS)}, as in allocated:5% or reserved:16MiB"
            )
        if amount.endswith("%"):
            number = amount[:-1]
            try:
                share = float(number) / 100
            except ValueError:
                share = -1.0
            if not 0 <= share <= 1000:  # noqa: PLR2004  # a larger share is a mistake; NaN fails both comparisons
                raise ValueError(f"{text!r}: {amount!r} is not a percentage from 0 on")
            return cls(metric, share=share)
        try:
            return cls(metric, nbytes=parse_size(amount, allow_zero=True))
        except SizeError as error:
            raise ValueError(f"{text!r}: {error}") from None

    def allowed(self, before: int) -> float:
        """Return how many more bytes than in the baseline are accepted."""
        return max(before * self.share, self.nbytes)

    def allows(self, before: int, now: int) -> bool:
        """Tell whether the change from ``before`` to ``now`` is accepted."""
        return now - before <= self.allowed(before)

    def __str__(self) -> str:
        return f"{self.share * 100:.4g}%" if self.share else format_size(self.nbytes)


#: The most tests for which one test may make first uses, and the most that are searched.
TOGETHER: Final = 3
MOST: Final = 40
#: The fewest tests with the same shift that show that torch is the cause.
MANY: Final = 3

#: The default tolerances. The same code on the same card allocates the same bytes. The
#: tolerance allows for new versions of libraries, which may choose another kernel.
DEFAULT_TOLERANCES: Final = (Tolerance("allocated", share=0.01),)


def compare_figures(
    test: str,
    before: Mapping[str, int],
    now: Mapping[str, int],
    gate: Iterable[Tolerance],
) -> list[Change]:
    """Return the changes of a test or a fixture, metric by metric.

    The added bytes and the bytes left are compared. If one of the two entries has only
    absolute peaks (format 1), these are compared. A metric without a tolerance is reported
    but is never a regression. A metric that the baseline lacks counts as unchanged.

    Note [The same requests from other blocks]
    The bytes that were on the card before decide which free blocks exist, and the
    allocator serves a request with a slightly larger block without splitting it
    (``should_split`` in ``c10/cuda/CUDACachingAllocator.cpp``). So if the card held other
    bytes when the baseline was written, the same requests may need blocks and segments of
    other sizes. In this case a metric counts as changed only if the requested bytes have
    also changed by more than its tolerance.
    """
    tolerances = {each.metric: each for each in gate}
    changes = []
    for metric in sorted(before.keys() & now.keys()):
        word = metric.rpartition(" ")[2]
        if word not in METRICS:
            continue
        tolerance = tolerances.get(word)
        grew, left = f"{metric} {GROWTH}", f"{metric} {LEFT}"
        if grew not in before or grew not in now:
            changes += _change(test, metric, before[metric], now[metric], tolerance)
            continue
        found = _change(test, metric, before[grew], now[grew], tolerance)
        if found and not _asked_for_more(metric, before, now, tolerance):
            found = []
        changes += found
        then, today = before.get(left, 0), now.get(left, 0)
        if then != today:
            allowed = 0 if tolerance is None else tolerance.allowed(before[grew])
            bad = tolerance is not None and today - then > allowed
            changes.append(Change(test, left, then, today, is_regression=bad))
    return changes


def _change(
    test: str, metric: str, before: int, now: int, tolerance: Tolerance | None
) -> list[Change]:
    if before == now:
        return []
    bad = tolerance is not None and not tolerance.allows(before, now)
    return [Change(test, metric, before, now, is_regression=bad)]


def _asked_for_more(
    metric: str,
    before: Mapping[str, int],
    now: Mapping[str, int],
    tolerance: Tolerance | None,
) -> bool:
    """Return False if a change is explained by other blocks alone, otherwise True.

    See Note [The same requests from other blocks].
    """
    head = metric.removesuffix(metric.rpartition(" ")[2])
    asked = f"{head}{REQUESTED} {GROWTH}"
    surroundings = [f"{head}{each} {BEFORE}" for each in METRICS]
    is_same = all(before.get(each) == now.get(each) for each in surroundings)
    if is_same or asked not in before or asked not in now:
        return True
    if tolerance is None:
        return before[asked] != now[asked]
    return not tolerance.allows(before[asked], now[asked])


class FirstUses:
    """Bytes of models and caches that are made at their first use, by whichever test.

    These bytes count for the test that runs first, which depends on order and
    selection. In the baseline one test made them and left them on the card. In this run
    another test may leave more bytes than in the baseline. If tests that have not run
    yet in this process left exactly these bytes in the baseline, the bytes are regarded
    as their first use. If those tests then leave the bytes again, there was no first
    use, and the other test has leaked.

    Args:
        entries: The baseline's entries, by test.
    """

    def __init__(self, entries: Mapping[str, Peaks]) -> None:
        self._unpaid: Final = {
            (test, name): nbytes
            for test, peaks in entries.items()
            for name, nbytes in peaks.items()
            if nbytes and name.endswith(f"allocated {LEFT}")
        }
        #: First uses, by the test that made them in the baseline: figure, the test that
        #: made them in this run, bytes.
        self._paid: Final[dict[str, list[tuple[str, str, int]]]] = {}

    def begin(self, test: str) -> dict[str, int]:
        """Return the bytes of first uses that other tests made for a test, by figure."""
        for key in [each for each in self._unpaid if each[0] == test]:
            del self._unpaid[key]  # the test makes its first uses itself from here on
        paid: dict[str, int] = {}
        for name, _who, nbytes in self._paid.get(test, ()):
            paid[name] = paid.get(name, 0) + nbytes
        return paid

    def can_pay(self, test: str, name: str, nbytes: int) -> bool:
        """Tell whether tests that have not run yet left exactly these bytes.

        Args:
            test: The test.
            name: The figure: ``"allocated left"``, of a card.
            nbytes: Bytes that the test leaves in addition to those of the baseline.
        """
        return bool(self._owing(test, name, nbytes))

    def pay(self, test: str, name: str, nbytes: int) -> None:
        """Count a test's bytes as first uses of other tests; see ``can_pay``."""
        for other in self._owing(test, name, nbytes):
            part = self._unpaid.pop((other, name))
            self._paid.setdefault(other, []).append((name, test, part))

    def _owing(self, test: str, name: str, nbytes: int) -> tuple[str, ...]:
        """Return the fewest tests that together left exactly these bytes; empty if none."""
        others = [
            (other, left)
            for (other, figure), left in self._unpaid.items()
            if figure == name and other != test and left <= nbytes
        ]
        for count in range(1, TOGETHER + 1):
            for several in combinations(others[:MOST], count):
                if sum(left for _other, left in several) == nbytes:
                    return tuple(other for other, _left in several)
        return ()

    def deny(self, test: str) -> list[tuple[str, str, int]]:
        """Return and forget first uses that other tests made for a test that makes them.

        Returns:
            Figure, the other test, and bytes.
        """
        return self._paid.pop(test, [])


def moved_by_torch(
    pairs: Iterable[tuple[Mapping[str, int], Mapping[str, int]]],
) -> dict[str, int]:
    """Return the bytes by which another version of torch changed the growth of a metric.

    A shift counts if it is the same in most of the tests that changed, and in at least
    three tests, because a change of the tested code is not the same in most tests.

    Args:
        pairs: Entries under one version and under another.
    """
    shifts: dict[str, list[int]] = {}
    for before, now in pairs:
        for metric in before.keys() & now.keys():
            grew = f"{metric} {GROWTH}"
            if metric.rpartition(" ")[2] in METRICS and grew in before and grew in now:
                shifts.setdefault(metric, []).append(now[grew] - before[grew])
    found = {}
    for metric, several in shifts.items():
        changed = [each for each in several if each]
        shift, count = max(Counter(changed).items(), key=_count, default=(0, 0))
        if count >= MANY and 2 * count > len(changed):
            found[metric] = shift
    return found


def _count(item: tuple[int, int]) -> tuple[int, int]:
    shift, count = item
    return count, -abs(shift)


def shifted(
    peaks: Mapping[str, int], now: Mapping[str, int], shift: Mapping[str, int]
) -> Peaks:
    """Return an entry with the shift of another version of torch.

    Args:
        peaks: The entry.
        now: The measured figures; a figure that changed by less than the shift keeps its
            value.
        shift: The result of ``moved_by_torch``.
    """
    moved = dict(peaks)
    for metric, nbytes in shift.items():
        grew = f"{metric} {GROWTH}"
        if (
            grew in peaks
            and grew in now
            and abs(now[grew] - peaks[grew]) >= abs(nbytes)
        ):
            moved[grew] = max(peaks[grew] + nbytes, 0)
            asked = (
                f"{metric.removesuffix(metric.rpartition(' ')[2])}{REQUESTED} {GROWTH}"
            )
            moved.pop(asked, None)
    return moved
