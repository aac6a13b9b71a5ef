"""What a run does, as far as a baseline asks: what ran, what it added, who grew."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.baselines.baseline import larger
from pytest_gpumem.baselines.gate import compare
from pytest_gpumem.plugin.gate import WORKER_INPUT
from pytest_gpumem.plugin.growth import FIXTURE_PROPERTY, GROWTH_PROPERTY
from pytest_gpumem.plugin.marks import (
    BROKEN_PROPERTY,
    ENVIRONMENT_PROPERTY,
    OVER_PROPERTY,
)
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_gpumem.plugin.gate import Gate
    from pytest_gpumem.plugin.session import Run

#: Where a worker tells what it collected and does not run.
WORKER_OUTPUT: Final = "gpumem_spared"
#: Options with which a run is told to run some of its tests.
_CHOOSING: Final = ("keyword", "markexpr", "deselect", "lf", "maxfail", "stepwise")


class Spared:
    """Knows which tests were collected and do not run, by whomever they were left out.

    Args:
        config: The run's.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config: Final = config
        self._seen: Final[set[str]] = set()
        #: The tests that run.
        self.kept: Final[set[str]] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note a test before anybody leaves it out."""
        self._seen.add(item.nodeid)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note tests that are left out: their names may have changed since."""
        self._seen.update(item.nodeid for item in items)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what is left."""
        self.kept.update(item.nodeid for item in session.items)

    @property
    def spared(self) -> set[str]:
        """The tests that were left out."""
        return self._seen - self.kept

    def pytest_sessionfinish(self) -> None:
        """Tell the controller, from a worker."""
        output: Any = getattr(self._config, "workeroutput", None)
        if output is not None:
            output[WORKER_OUTPUT] = sorted(self.spared)


class BaselineRecord(Spared):
    """Takes in what ran and what it added, where reports arrive.

    Args:
        run: The run.
        gate: The baseline.
        config: The run's.
    """

    def __init__(self, run: Run, gate: Gate, config: pytest.Config) -> None:
        super().__init__(config)
        self._run: Final = run
        self._gate: Final = gate
        self._session: pytest.Session | None = None
        self._peaks: Final[dict[str, dict[str, dict[str, int]]]] = {}
        self._fixtures: Final[dict[str, dict[str, dict[str, int]]]] = {}
        self._told: Final[dict[str, dict[str, Any]]] = {}
        self._failed: Final[set[str]] = set()
        self._left_out: Final[set[str]] = set()
        self._finished: Final[set[str]] = set()
        #: Fixtures that failed, and the tests that are listed below them.
        self._culprits: Final[dict[str, list[str]]] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the baseline to a worker, wherever it is."""
        node.workerinput[WORKER_INPUT] = self._gate.baseline.to_text()

    # -- what ran -------------------------------------------------------------------------

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Note the session, to count what fails in no test."""
        self._session = session

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(
        self,
        ids: Sequence[str],
    ) -> None:
        """Note what there is to run, as a worker tells it."""
        self.kept.update(ids)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Note what a worker left out; one that crashed has not told."""
        output = getattr(node, "workeroutput", {})
        self._left_out.update(output.get(WORKER_OUTPUT, ()))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in what a test added once it is over."""
        if report.failed:
            self._failed.add(report.nodeid)
        if report.skipped:
            self._left_out.add(report.nodeid)
        if report.when != "teardown":
            return
        self._finished.add(report.nodeid)
        environment = dict(report.user_properties).get(ENVIRONMENT_PROPERTY)
        if environment is None:
            return
        for name, value in report.user_properties:
            if name == GROWTH_PROPERTY:
                self._take(str(environment), report.nodeid, json.loads(str(value)))
            elif name == FIXTURE_PROPERTY:
                made = json.loads(str(value))
                self._take_fixture(str(environment), made["key"], made["peaks"])

    def _take(self, environment: str, test: str, told: dict[str, Any]) -> None:
        self._peaks.setdefault(environment, {})[test] = told["peaks"]
        self._told[test] = told
        for key in told.get("because", ()):
            if key not in self._culprits:  # it is new, and so has failed nobody
                text = f"the fixture {key} is new, and its tests need more"
                self._fail(key, f"{text} than the baseline {self._gate.name} allows")
            self._culprits[key].append(test)
        for name, other, nbytes in told.get("denied", ()):
            self._deny(environment, other, name, nbytes, test)

    def _deny(
        self, environment: str, test: str, name: str, nbytes: int, other: str
    ) -> None:
        """Fail a test that was taken to pay for another one's first use."""
        told = self._told.get(test, {})
        told["moved"] = {}
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
        changes = compare(key, before, peaks, self._gate.tolerances)
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
        """Have a failure shown, counted and written that is not of a test's phase."""
        if self._session is not None:
            self._session.testscollected += 1
        hook = self._config.hook
        location = (name.partition("::")[0], None, name.partition("::")[2] or name)
        properties = [(OVER_PROPERTY, 1), (BROKEN_PROPERTY, text.partition("\n")[0])]
        for when, outcome in (("call", "failed"), ("teardown", "passed")):
            report = pytest.TestReport(
                nodeid=name,
                location=location,
                keywords={},
                outcome=outcome,  # type: ignore[arg-type]  # one of the two that it names
                longrepr=text if outcome == "failed" else None,
                when=when,  # type: ignore[arg-type]  # likewise
                user_properties=properties if outcome == "failed" else [],
            )
            hook.pytest_runtest_logreport(report=report)

    # -- what is stale ----------------------------------------------------------------------

    def _num_unfinished(self) -> int:
        return len(self.kept - self._finished)

    @property
    def _is_chosen(self) -> bool:
        """Whether the run was told to run some of its tests."""
        option = self._config.option
        return any(getattr(option, name, None) for name in _CHOOSING) or any(
            "::" in argument for argument in self._config.args
        )

    def _stale(self, environment: str) -> list[str]:
        """Return the baseline's tests that are no more, as far as this run can tell."""
        known = self._gate.baseline.peaks.get(environment, {})
        used = self._peaks.get(environment, {})
        kept = self.spared | self._left_out | self._failed
        is_whole = not self._is_chosen and not self._num_unfinished()
        files = {test.partition("::")[0] for test in self.kept}
        stale = []
        for test in known:
            file = test.partition("::")[0]
            if test in used or test in kept:
                continue
            if test in self._finished:
                stale.append(test)  # it ran, and used no card
            elif (
                not self._num_unfinished()
                and not (self._config.rootpath / file).exists()
            ) or (is_whole and file in files and test not in self.kept):
                stale.append(test)
        return sorted(stale)

    def _stale_fixtures(self, environment: str) -> list[str]:
        """Return the baseline's fixtures that no test of a whole run had made."""
        known = self._gate.baseline.peaks.get(environment, {})
        fixtures = self._gate.baseline.fixtures.get(environment, {})
        is_whole = (
            not self._is_chosen
            and not self._num_unfinished()
            and not self._failed
            and not self._left_out
            and not self.spared
            and set(known) <= self.kept | set(self._stale(environment))
        )
        used = self._fixtures.get(environment, {})
        return sorted(fixtures.keys() - used.keys()) if is_whole else []
