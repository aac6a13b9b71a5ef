"""Collects the facts of a run that a baseline needs: tests, added bytes, growth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.baselines.baseline import larger
from pytest_gpumem.baselines.regressions import compare_figures
from pytest_gpumem.plugin.gate import WORKER_INPUT
from pytest_gpumem.plugin.record_keeping import mark_over_limit
from pytest_gpumem.plugin.workers import notes_of
from pytest_gpumem.records.record import Judgement
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.plugin.gate import Gate
    from pytest_gpumem.plugin.record_keeping import Collector, Finished
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.record import Record

#: Options that select a part of the tests.
_CHOOSING: Final = ("keyword", "markexpr", "deselect", "lf", "maxfail", "stepwise")


class Deselected:
    """Collects the tests that were collected but do not run, for any reason."""

    def __init__(self) -> None:
        self._seen: Final[set[str]] = set()
        #: The tests that run.
        self.kept: Final[set[str]] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note a test before any plugin deselects it."""
        self._seen.add(item.nodeid)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note deselected tests, because a plugin may have changed their names."""
        self._seen.update(item.nodeid for item in items)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note the tests that stay selected."""
        self.kept.update(item.nodeid for item in session.items)

    @property
    def deselected(self) -> set[str]:
        """The tests that were deselected."""
        return self._seen - self.kept


class BaselineRecord(Deselected):
    """Collects the tests that ran and the bytes that they added.

    It works in the process that receives reports.

    Args:
        run: The run.
        gate: The baseline.
        config: The run's config.
        collector: Collects the records.
    """

    def __init__(
        self, run: Run, gate: Gate, config: pytest.Config, collector: Collector
    ) -> None:
        super().__init__()
        self._run: Final = run
        self._gate: Final = gate
        self._config: Final = config
        self._session: pytest.Session | None = None
        self._peaks: Final[dict[str, dict[str, dict[str, int]]]] = {}
        self._fixtures: Final[dict[str, dict[str, dict[str, int]]]] = {}
        #: By test and figure: bytes of first uses that do not count for the test that made
        #: them, but for another test.
        self._moved: Final[dict[str, dict[str, int]]] = {}
        self._failed: Final = collector.failed
        self._finished: Final = collector.outcomes
        self._left_out: Final[set[str]] = set()
        collector.listeners.append(self._take)
        #: Fixtures that grew, each with the tests that are listed below it.
        self._culprits: Final[dict[str, list[str]]] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send the baseline to a worker, which may be on another machine."""
        node.workerinput[WORKER_INPUT] = self._gate.baseline.to_text()

    # -- what ran -------------------------------------------------------------------------

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Note the session, to count failures that belong to no test."""
        self._session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(
        self,
        ids: Sequence[str],
    ) -> None:
        """Note the tests that a worker has collected."""
        self.kept.update(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Note the tests that a worker deselected; a worker that crashed sends none."""
        self._left_out.update(notes_of(node).get("deselected", ()))

    def _take(self, finished: Finished) -> None:
        """Note the bytes that a test added, once it has ended."""
        if finished.outcome == "skipped":
            self._left_out.add(finished.nodeid)
        record = finished.record
        if record is None or not record.environment:
            return
        if record.growth:
            self._take_growth(record)
        for made in record.fixture_growth:
            self._take_fixture(record.environment, made.key, made.peaks)

    def _take_growth(self, record: Record) -> None:
        test, judgement = record.nodeid, record.judgement or Judgement()
        self._peaks.setdefault(record.environment, {})[test] = record.growth
        self._moved[test] = judgement.moved
        for key in judgement.because:
            if key not in self._culprits:  # a new fixture, for which no test failed
                text = f"the fixture {key} is new, and its tests need more"
                self._fail(key, f"{text} than the baseline {self._gate.name} allows")
            self._culprits[key].append(test)
        for name, other, nbytes in judgement.denied:
            self._deny(record.environment, other, name, nbytes, test)

    def _deny(
        self, environment: str, test: str, name: str, nbytes: int, other: str
    ) -> None:
        """Fail a test if its leak was first taken for the first use of another test."""
        self._moved[test] = {}
        before, is_carried = self._gate.known(environment).test(test)
        if before is None or is_carried or self._gate.updates or test in self._failed:
            return
        self._failed.add(test)
        self._report(
            test,
            f"VRAM left above the baseline {self._gate.name}: {name} "
            f"{format_size(nbytes)} more, and not in place of {other}, which leaves "
            f"its own\n{self._gate.advice}",
        )

    def _take_fixture(
        self, environment: str, key: str, peaks: Mapping[str, int]
    ) -> None:
        kept = self._fixtures.setdefault(environment, {})
        kept[key] = larger(kept.get(key, {}), peaks)
        before, is_carried = self._gate.known(environment).fixture(key)
        if before is None or is_carried or self._gate.updates or key in self._culprits:
            return
        changes = compare_figures(key, before, peaks, self._gate.tolerances)
        bad = [each for each in changes if each.is_regression]
        if bad:
            text = f"VRAM growth of the fixture {key} above the baseline"
            more = "".join(f"\nand {each}" for each in bad[1:])
            self._fail(
                key, f"{text} {self._gate.name}: {bad[0]}{more}\n{self._gate.advice}"
            )

    def _fail(self, key: str, text: str) -> None:
        self._culprits[key] = []
        self._report(f"{key} (fixture)", text)

    def _report(self, name: str, text: str) -> None:
        """Show, count and write a failure that belongs to no phase of a test."""
        if self._session is not None:
            self._session.testscollected += 1
        hook = self._config.hook
        location = (name.partition("::")[0], None, name.partition("::")[2] or name)
        for when, outcome in (("call", "failed"), ("teardown", "passed")):
            report = pytest.TestReport(
                nodeid=name,
                location=location,
                keywords={},
                outcome=outcome,  # type: ignore[arg-type]  # one of the accepted outcomes
                longrepr=text if outcome == "failed" else None,
                when=when,  # type: ignore[arg-type]  # one of the accepted phases
            )
            if report.failed:
                mark_over_limit(report)
            hook.pytest_runtest_logreport(report=report)

    # -- what is stale ----------------------------------------------------------------------

    def _num_unfinished(self) -> int:
        return len(self.kept - self._finished.keys())

    @property
    def _is_chosen(self) -> bool:
        """Whether an option selects a part of the tests."""
        option = self._config.option
        return any(getattr(option, name, None) for name in _CHOOSING) or any(
            "::" in argument for argument in self._config.args
        )

    def _stale(self, environment: str) -> list[str]:
        """Return the baseline's tests that no longer exist, as this run shows."""
        known = self._gate.baseline.peaks.get(environment, {})
        used = self._peaks.get(environment, {})
        kept = self.deselected | self._left_out | self._failed
        is_whole = not self._is_chosen and not self._num_unfinished()
        files = {test.partition("::")[0] for test in self.kept}
        stale = []
        for test in known:
            file = test.partition("::")[0]
            if test in used or test in kept:
                continue
            if test in self._finished:
                stale.append(test)  # the test ran and used no card
            elif (
                not self._num_unfinished()
                and not (self._config.rootpath / file).exists()
            ) or (is_whole and file in files and test not in self.kept):
                stale.append(test)
        return sorted(stale)

    def _stale_fixtures(self, environment: str) -> list[str]:
        """Return the baseline's fixtures that no test used in a run of all tests."""
        known = self._gate.baseline.peaks.get(environment, {})
        fixtures = self._gate.baseline.fixtures.get(environment, {})
        is_whole = (
            not self._is_chosen
            and not self._num_unfinished()
            and not self._failed
            and not self._left_out
            and not self.deselected
            and set(known) <= self.kept | set(self._stale(environment))
        )
        used = self._fixtures.get(environment, {})
        return sorted(fixtures.keys() - used.keys()) if is_whole else []
