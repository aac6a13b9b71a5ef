"""Keeps the record of each test with its item, sends it with a report, and collects it.

Every part of the plugin that measures a test writes the figures into ``record_of(item)``.
The report of the test's teardown carries the record, also from a worker of pytest-xdist.
Only ``Collector`` receives records. The terminal, the reports, the gate and other parts
read them from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_gpumem.records.record import Record

_KEY: Final = pytest.StashKey["Record"]()
#: A report's attribute: the record, as texts, because xdist sends only plain values.
_ATTRIBUTE: Final = "gpumem_record"
#: A report's attribute: whether a limit was broken.
_OVER_LIMIT: Final = "gpumem_over_limit"
#: The name, in pytest's summary, of a test with a broken limit.
_OVER: Final = "OVER VRAM LIMIT"
#: A report's attribute: the progress of a sweep.
_PROGRESS: Final = "gpumem_progress"
#: The key of the progress of a test's sweep, while a point of it is reported.
_PROGRESS_KEY: Final = pytest.StashKey[list[Any]]()
#: The name under which ``Attachment`` is registered.
_ATTACHMENT: Final = "gpumem-attachment"
_RANK: Final = ("passed", "skipped", "failed", "error")


def record_of(item: pytest.Item) -> Record:
    """Return a test's record for writing; make it if there is none."""
    record = item.stash.get(_KEY, None)
    if record is None:
        from pytest_gpumem.records.record import Record

        record = Record.begin(item.nodeid)
        keep(item, record)
    return record


def has_record(item: pytest.Item) -> bool:
    """Tell whether a test has a record; a test that used no card has none."""
    return _KEY in item.stash


class Attachment:
    """Puts each test's record on the report of its teardown, where the tests run."""

    @staticmethod
    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        item: pytest.Item,
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Attach the record when all other plugins have written into it."""
        report = yield
        stash = item.stash
        if _PROGRESS_KEY in stash:
            setattr(report, _PROGRESS, stash[_PROGRESS_KEY])
        if _KEY not in stash:
            return report
        record = stash[_KEY]
        if report.failed and record.broken_limit is not None:
            mark_over_limit(report)
        if report.when == "teardown":
            setattr(report, _ATTRIBUTE, record.to_texts())
            keep(item, record.lasting())
        return report


def keep(item: pytest.Item, record: Record | None) -> None:
    """Set the record with which the next attempt of a test begins; None means no record."""
    if record is not None:
        item.stash[_KEY] = record
        attach_records(item.config.pluginmanager)
    elif _KEY in item.stash:
        del item.stash[_KEY]


def set_progress(item: pytest.Item, progress: list[Any] | None) -> None:
    """Set the progress of a test's sweep for the next report; None means no progress."""
    if progress is not None:
        item.stash[_PROGRESS_KEY] = progress
        attach_records(item.config.pluginmanager)
    elif _PROGRESS_KEY in item.stash:
        del item.stash[_PROGRESS_KEY]


def attach_records(manager: pytest.PytestPluginManager) -> None:
    """Let reports carry records; may be called twice.

    In most suites no test has a record, and each hook around a report takes time.
    """
    if not manager.has_plugin(_ATTACHMENT):
        manager.register(Attachment, _ATTACHMENT)


def taken(item: pytest.Item) -> Record | None:
    """Return a test's record, or None; no record is made."""
    return item.stash.get(_KEY, None)


def mark_over_limit(report: pytest.TestReport) -> None:
    """Mark a report as the failure of a limit."""
    setattr(report, _OVER_LIMIT, True)


def detach(report: pytest.TestReport) -> Record | None:
    """Take the record off a report; None if it has none."""
    texts = report.__dict__.pop(_ATTRIBUTE, None)
    if texts is None:
        return None
    from pytest_gpumem.records.record import Record

    return Record.of_texts(texts)


class Finished(NamedTuple):
    """A test that has ended.

    Attributes:
        nodeid: The test.
        outcome: The worst of its phases: passed, skipped, failed or error.
        record: Its record; None if it used no card.
        failure: The report of the first phase that failed, or None.
    """

    nodeid: str
    outcome: str
    record: Record | None
    failure: pytest.TestReport | None


class _Pending:
    """The facts so far about an unfinished test with a phase that did not pass."""

    __slots__ = ("failure", "outcome")

    def __init__(self) -> None:
        self.outcome = "passed"
        self.failure: pytest.TestReport | None = None


_PASSED: Final = _Pending()


class Collector:
    """Collects every test from its reports; not used in workers.

    Attributes:
        records: The records of ended tests that used a card, by name.
        outcomes: The outcomes of all tests that have ended.
        failed: Tests with a failed phase, also those that have not ended.
        listeners: Called with each test once it has ended.
        on_progress: Called with the progress of a sweep.
        on_broken_limit: Called with each test that broke a limit, before it is shown.
    """

    def __init__(self) -> None:
        self._pending: Final[dict[str, _Pending]] = {}
        self._seconds: Final[dict[str, float]] = {}
        self.records: Final[dict[str, Record]] = {}
        self.outcomes: Final[dict[str, str]] = {}
        self.failed: Final[set[str]] = set()
        self.listeners: Final[list[Callable[[Finished], None]]] = []
        self.on_progress: Callable[[Any], None] = lambda _progress: None
        self.on_broken_limit: Callable[[], None] = lambda: None

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note a phase of a test, and the whole test after its last phase."""
        nodeid = report.nodeid
        if report.outcome != "passed" and not self._note(report):
            return
        seconds = self._seconds.pop(nodeid, 0.0) + report.duration
        if report.when == "teardown":
            self._finish(nodeid, report, seconds)
            return
        self._seconds[nodeid] = seconds
        progress = report.__dict__.get(_PROGRESS)
        if progress is not None:
            self.on_progress(progress)

    def _note(self, report: pytest.TestReport) -> bool:
        """Note a phase that did not pass; tell whether it counts."""
        nodeid, now = report.nodeid, str(report.outcome)
        if now not in _RANK:  # pytest-rerunfailures runs the test again
            self._pending.pop(nodeid, None)
            self._seconds.pop(nodeid, None)
            return False
        pending = self._pending.setdefault(nodeid, _Pending())
        if now == "failed":
            self.failed.add(nodeid)
            pending.failure = pending.failure or report
            now = "failed" if report.when == "call" else "error"
        pending.outcome = max(pending.outcome, now, key=_RANK.index)
        if _OVER_LIMIT in report.__dict__:
            self.on_broken_limit()
        return True

    def _finish(self, nodeid: str, report: pytest.TestReport, seconds: float) -> None:
        pending = self._pending.pop(nodeid, _PASSED)
        self.outcomes[nodeid] = outcome = pending.outcome
        record = detach(report)
        if record is not None:
            from pytest_gpumem.records.junit import properties

            report.user_properties += properties(record)
            record.outcome = outcome  # type: ignore[assignment]  # one of the accepted outcomes
            record.seconds = round(seconds, 4)
            self.records[nodeid] = record
        finished = Finished(nodeid, outcome, record, pending.failure)
        for listener in self.listeners:
            listener(finished)


class BrokenLimits:
    """Shows tests that broke a limit under a name of their own."""

    @staticmethod
    def pytest_report_teststatus(
        report: pytest.TestReport | pytest.CollectReport,
    ) -> tuple[str, str, str | tuple[str, dict[str, bool]]] | None:
        """Show a broken limit with the letter V, among the failures and errors."""
        if not hasattr(report, _OVER_LIMIT) or not report.failed:
            return None
        category = "failed" if report.when == "call" else "error"
        # Older summaries accept only a text, no colour.
        if pytest.version_tuple < (8, 3):
            return category, "V", _OVER
        return category, "V", (_OVER, {"red": True})
