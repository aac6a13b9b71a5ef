"""Compares each test with the run's baseline when it ends, in the process that runs it.

Note [One cause, one failure]
A fixture that grew fails under its own name. The tests that use it do not fail; they are
listed below it, with the reason. A test may need more bytes because it runs first, while
another test ran first in the baseline. Such a test does not fail; see ``FirstUses``.
Figures of another version of torch are compared at the end of the run, because the effect
of torch itself can be seen only in all tests together.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.baselines.baseline import (
    GROWTH,
    LEFT,
    Baseline,
    has_growth,
    nearest,
)
from pytest_gpumem.baselines.regressions import (
    DEFAULT_TOLERANCES,
    FirstUses,
    Tolerance,
    compare_figures,
)
from pytest_gpumem.errors import BaselineError
from pytest_gpumem.records.record import Judgement
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.baselines.baseline import Peaks
    from pytest_gpumem.plugin.growth import Growth
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.records.record import MadeFixture
    from pytest_gpumem.records.run_record import Change


#: The key of the baseline's text in a worker's input.
WORKER_INPUT: Final = "gpumem_baseline"


class Known:
    """A baseline's figures of one environment, or of it with another version of torch.

    Args:
        baseline: The baseline.
        environment: The environment.

    Attributes:
        other: The same environment with the nearest version of torch; its figures are used
            for tests that have no figures of this version.
    """

    def __init__(self, baseline: Baseline, environment: str) -> None:
        self.tests: Final = baseline.peaks.get(environment, {})
        self.fixtures: Final = baseline.fixtures.get(environment, {})
        others = [each for each in baseline.peaks if each != environment]
        self.other: Final = nearest(environment, others)
        self._tests = baseline.peaks.get(self.other or "", {})
        self._fixtures = baseline.fixtures.get(self.other or "", {})
        self.has_growth: Final = any(map(has_growth, self.tests.values()))
        #: Pairs of entries of one test, under the other version and under this one.
        self.pairs: Final = [
            (self._tests[test], self.tests[test])
            for test in self._tests.keys() & self.tests.keys()
        ]

    @property
    def all_tests(self) -> dict[str, Peaks]:
        """The entries of all tests: of this torch version, else of the other version."""
        return {**self._tests, **self.tests}

    def test(self, name: str) -> tuple[Peaks | None, bool]:
        """Return a test's entry, and whether it is of another version of torch."""
        if name in self.tests:
            return self.tests[name], False
        return self._tests.get(name), name in self._tests

    def fixture(self, key: str) -> tuple[Peaks | None, bool]:
        """Return a fixture's entry, and whether it is of another version of torch."""
        if key in self.fixtures:
            return self.fixtures[key], False
        return self._fixtures.get(key), key in self._fixtures


class Gate:
    """A run's baseline in each process that runs tests.

    Args:
        settings: The options; they name the file.
        text: The file's text, if a controller has read it; None reads the file.

    Raises:
        pytest.UsageError: The file is broken, or it is missing and the run does not write
            it.
    """

    def __init__(self, settings: Settings, text: str | None = None) -> None:
        assert settings.baseline is not None, "the caller looks"  # noqa: S101  # states why
        self.path: Final = settings.baseline
        #: The path, relative to the working directory.
        self.name: Final = os.path.relpath(self.path)
        self.updates: Final = settings.updates_baseline
        self.tolerances: Final[Sequence[Tolerance]] = (
            settings.compare_fail or DEFAULT_TOLERANCES
        )
        self.baseline: Final = (
            self._read() if text is None else Baseline.parse(text, self.name)
        )
        self._known: Final[dict[str, Known]] = {}
        self._uses: Final[dict[str, FirstUses]] = {}
        self._environment = ""
        #: The findings about the running test, in addition to its figures.
        self.judgement = Judgement()
        #: Growth of the running test that is regarded as first uses of other tests, and the
        #: text of the failure. If the bytes are no longer on the card after the teardown,
        #: the test fails.
        self._excused: tuple[dict[str, int], str] = ({}, "")
        #: The bytes of the fixtures of wider scope that explain the running test's growth,
        #: divided by their bytes in the baseline.
        self._ratio = 1.0

    def _read(self) -> Baseline:
        if self.updates and not self.path.exists():
            return Baseline()
        try:
            return Baseline.read(self.path)
        except BaselineError as error:
            raise pytest.UsageError(f"--gpu-baseline: {error}") from None

    def known(self, environment: str) -> Known:
        """Return the file's figures of an environment."""
        if environment not in self._known:
            self._known[environment] = Known(self.baseline, environment)
        return self._known[environment]

    @property
    def allowed(self) -> str:
        """The tolerances, in words."""
        return ", ".join(f"{each.metric}:{each}" for each in self.tolerances)

    # -- one test -------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare for a test, before its setup."""
        self.judgement = Judgement()
        self._excused = ({}, "")
        self._ratio = 1.0

    def check(self, environment: str, item: pytest.Item, growth: Growth) -> str | None:
        """Return the problem with the bytes that a test's call added, or None."""
        self._environment = environment
        known = self.known(environment)
        before, is_carried = known.test(item.nodeid)
        if environment not in self._uses:
            self._uses[environment] = FirstUses(known.all_tests)
        paid = self._uses[environment].begin(item.nodeid)
        if paid:
            self.judgement.moved = {name: -nbytes for name, nbytes in paid.items()}
        if before is None or is_carried or self.updates:
            return None
        return self._judge(item, before, growth, known)

    def _judge(
        self, item: pytest.Item, before: Peaks, growth: Growth, known: Known
    ) -> str | None:
        uses = self._uses[self._environment]
        test, peaks = item.nodeid, growth.peaks
        moved = dict(self.judgement.moved)
        bad = self._grown(test, before, peaks, moved)
        if bad and moved and not self._grown(test, before, peaks, {}):
            # This test makes its first use itself. So the earlier test, which was excused
            # for these bytes, has leaked.
            self.judgement = Judgement(denied=uses.deny(test))
            bad = []
        if bad:
            self._explain(bad, growth.used_by(item), known)
        if not bad or self.judgement.because:
            return None
        text = self._text(bad, peaks, before, growth)
        if not has_growth(before):
            return text
        for name, nbytes in self._more(before, growth.left(), moved).items():
            if uses.can_pay(test, name, nbytes):
                moved[name] = moved.get(name, 0) + nbytes
        if self._grown(test, before, peaks, moved):
            return text
        self._excused = moved, text
        return None

    def _grown(
        self,
        test: str,
        before: Mapping[str, int],
        peaks: Mapping[str, int],
        moved: Mapping[str, int],
    ) -> list[Change]:
        """Return the figures of a call that grew beyond the tolerances.

        The bytes that are left are known only after the teardown.
        """
        now = _but_left(adjusted(peaks, moved))
        changes = compare_figures(test, _but_left(before), now, self.tolerances)
        return [change for change in changes if change.is_regression]

    @staticmethod
    def _more(
        before: Mapping[str, int], left: Mapping[str, int], moved: Mapping[str, int]
    ) -> dict[str, int]:
        """Return by how many bytes each figure of bytes left is above the baseline."""
        more = {
            name: nbytes - moved.get(name, 0) - before.get(name, 0)
            for name, nbytes in left.items()
        }
        return {name: nbytes for name, nbytes in more.items() if nbytes > 0}

    def _explain(
        self,
        bad: Sequence[Change],
        used: Sequence[MadeFixture],
        known: Known,
    ) -> None:
        """Note the fixtures that explain why a test needs more."""
        grown: dict[str, int] = {}
        is_wider = False
        ratio = 1.0
        for made in used:
            before, _is_carried = known.fixture(made.key)
            if before is None and made.scope == "function" and known.has_growth:
                grown[made.key] = made.peaks.get(f"allocated {LEFT}", 0)
            elif before is not None:
                found = compare_figures(made.key, before, made.peaks, self.tolerances)
                if any(each.is_regression for each in found):
                    then = before.get(f"allocated {LEFT}", 0)
                    holds = made.peaks.get(f"allocated {LEFT}", 0)
                    grown[made.key] = holds - then
                    if made.scope != "function":
                        is_wider = True
                        ratio = max(ratio, holds / then if then else 1.0)
        tolerances = {each.metric: each for each in self.tolerances}
        more = sum(grown.values())
        explained = all(
            tolerances["allocated"].allows(each.before, each.now - more)
            for each in bad
            if each.metric.endswith("allocated")
        )
        if grown and (is_wider or explained):
            self.judgement.because = sorted(grown)
            self._ratio = ratio

    def _text(
        self,
        bad: Sequence[Change],
        now: Mapping[str, int],
        before: Mapping[str, int],
        growth: Growth,
    ) -> str:
        kind = "VRAM growth" if has_growth(before) else "peak VRAM"
        lines = [
            f"{kind} above the baseline {self.name}: {bad[0]}",
            *(f"and {change}" for change in bad[1:]),
        ]
        start = now.get("allocated before", 0)
        if has_growth(before) and start:
            lines.append(
                f"what was on the card before and is not this test's "
                f"({format_size(start)}) does not count"
            )
        stays = growth.left().get(f"allocated {LEFT}", 0)
        if stays:
            lines.append(
                f"{format_size(stays)} of it stay after the call: a leak, a cache, or "
                "what a fixture keeps"
            )
        return "\n".join([*lines, self.advice])

    @property
    def advice(self) -> str:
        """Advice for a figure that is too large."""
        return (
            f"allowed is {self.allowed} more; if this is meant, run again with "
            "--gpu-update-baseline and commit the file"
        )

    def check_left(self, test: str, left: Mapping[str, int]) -> str | None:
        """Return the problem with the bytes that a test leaves, or None."""
        known = self.known(self._environment)
        before, is_carried = known.test(test)
        if before is None or not has_growth(before):
            return None
        uses = self._uses[self._environment]
        moved: dict[str, int] = dict(self.judgement.moved)
        changes = self._left_changes(test, before, adjusted(left, moved))
        if changes and moved:
            # This test leaves its bytes itself. So the earlier test, which was excused for
            # these bytes, has leaked.
            self.judgement.denied = uses.deny(test)
            moved = {}
        for name, nbytes in self._more(before, left, moved).items():
            if uses.can_pay(test, name, nbytes):
                uses.pay(test, name, nbytes)
                moved[name] = nbytes
        self.judgement.moved = moved
        excused, text = self._excused
        if any(nbytes > moved.get(name, 0) for name, nbytes in excused.items()):
            return text  # the growth did not stay on the card, so it was no first use
        changes = self._left_changes(test, before, adjusted(left, moved))
        if not changes or is_carried or self.updates:
            return None
        return "\n".join(
            [
                f"VRAM left above the baseline {self.name}: {changes[0]}",
                *(f"and {change}" for change in changes[1:]),
                "it stays on the card after the test, for all that follow; "
                "--gpu-leak-check names who holds it",
                self.advice,
            ]
        )

    def _left_changes(
        self, test: str, before: Mapping[str, int], left: Mapping[str, int]
    ) -> list[Change]:
        """Return the figures of bytes left that changed beyond the tolerances.

        Bytes that a test leaves in a fixture of wider scope, such as gradients of its
        model, grow with the fixture.
        """
        now = {**_but_left(before), **left}
        then = {name: round(n * self._ratio) for name, n in before.items()}
        as_grown = compare_figures(test, then, now, self.tolerances)
        grown = {each.metric for each in as_grown if each.is_regression}
        changes = compare_figures(test, before, now, self.tolerances)
        return [each for each in changes if each.is_regression and each.metric in grown]


def _but_left(peaks: Mapping[str, int]) -> Peaks:
    return {name: n for name, n in peaks.items() if not name.endswith(f" {LEFT}")}


def adjusted(peaks: Mapping[str, int], moved: Mapping[str, int]) -> Peaks:
    """Return a test's figures, corrected by first uses that count for other tests."""
    found = dict(peaks)
    for name, nbytes in moved.items():
        head = name.removesuffix(f"allocated {LEFT}")
        for each in (
            name,
            *(f"{head}{word} {GROWTH}" for word in ("allocated", "requested")),
        ):
            if each in found or nbytes < 0:
                found[each] = max(found.get(each, 0) - nbytes, 0)
    return found
