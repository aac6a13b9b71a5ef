"""OOMs that other workers had a part in: their tests are retried alone, once.

Such an OOM is one that would not have been, had this process had the card for itself:
what was live and what was asked for fit the test's own budget, or else the card. A rule's
OOM never is. The first attempt is reported with a status of its own; the retry's outcome is
the test's.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.plugin import marks

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from pytest_gpumem.plugin.admission import Admission
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.incidents import Incident

#: The outcome of a report whose test is retried.
OUTCOME: Final = "contended"


def is_contended(report: pytest.TestReport | pytest.CollectReport) -> bool:
    """Tell whether a report is of an attempt whose test is retried."""
    return str(report.outcome) == OUTCOME


class Contention:
    """Tells OOMs under contention apart, and retries their tests alone.

    Args:
        run: The run.
        admission: Gives a test all cards alone.
        wishes: What each test's markers ask for.
    """

    def __init__(
        self,
        run: Run,
        admission: Admission,
        wishes: Mapping[pytest.Item, marks.Wishes],
    ) -> None:
        self._run: Final = run
        self._admission: Final = admission
        self._wishes: Final = wishes
        self._item: pytest.Item | None = None
        self._seen: dict[str, Any] | None = None
        self._retry: pytest.Item | None = None

    # -- the OOM ----------------------------------------------------------------------

    def note(self, incident: Incident) -> None:
        """Look at an OOM while it lasts."""
        device = self._run.device
        if device is None or self._item is None or incident.kind != "oom":
            return
        index, nbytes = incident.device_index, incident.nbytes
        total = incident.total_bytes - device.context_bytes(index)
        wishes = self._wishes.get(self._item)
        own = () if wishes is None else wishes.budgets
        budget = self._run.settings.budget_bytes(index, incident.total_bytes, own)
        needed = incident.allocated_bytes + nbytes
        if incident.injected_by or needed > min(budget or total, total):
            return  # its own: it would have run out of memory alone too
        others = device.others_bytes(index)
        share = self._run.sharing.cap_bytes(device, index)
        lacks_share = budget is None and share is not None
        if lacks_share or total - others - incident.reserved_bytes < nbytes:
            self._seen = {
                "device_index": index,
                "needed_bytes": needed,
                "share_bytes": share if lacks_share else None,
                "others_bytes": others,
                "site": incident.site,
            }

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Begin to look."""
        self._item, self._seen = item, None
        return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Give a failure under contention its own outcome, where a retry follows."""
        report = yield
        if report.when == "teardown":
            self._item = None
        elif report.failed and self._seen is not None:
            self._judge(item, report, self._seen)
            self._seen = None
        return report

    def _judge(
        self, item: pytest.Item, report: pytest.TestReport, seen: dict[str, Any]
    ) -> None:
        most = self._run.settings.max_retries
        if item is self._admission.alone:
            text = "this was the retry, alone on the card; it was not enough"
        elif not self._run.sharing.take_retry(most):
            text = (
                f"not retried alone: the run's limit of {most} such retries is reached "
                "(--gpu-max-contention-retries)"
            )
        else:
            report.outcome = OUTCOME  # type: ignore[assignment]  # one of ours, as of reruns
            told = (marks.CONTENTION_PROPERTY, json.dumps(seen))
            report.user_properties.append(told)
            item.user_properties.append(told)
            return
        report.sections.append(("GPU contention", f"{describe(seen)}; {text}"))

    # -- the retry --------------------------------------------------------------------

    @pytest.hookimpl(specname="pytest_runtest_protocol")
    def pytest_run_attempt(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> bool | None:
        """Run a test; of an attempt under contention, report that alone."""
        if self._run.device is None or item is self._admission.alone or _reruns(item):
            return None
        hook = item.ihook
        hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        # pytest's own plugin that runs tests; it has no other name that is public.
        runner: Any = item.config.pluginmanager.get_plugin("runner")
        reports = runner.runtestprotocol(item, nextitem=nextitem, log=False)
        contended = [each for each in reports if is_contended(each)]
        for report in contended or reports:
            hook.pytest_runtest_logreport(report=report)
        hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        if contended:
            self._retry = item
        return True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, Any, Any]:
        """Run a test that is to be retried again, alone."""
        result = yield
        if self._retry is not item:
            return result
        self._retry, self._admission.alone = None, item
        _forget_failed_fixtures(item)
        try:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
        finally:
            self._admission.alone = None
        return result


def _reruns(item: pytest.Item) -> bool:
    """Tell whether pytest-rerunfailures runs the test; it shows every attempt whole.

    By its options, its marker or, from its ini setting, for every test.
    """
    config = item.config
    if not config.pluginmanager.has_plugin("rerunfailures"):
        return False
    asked = [config.getoption(name, None) for name in ("reruns", "force_reruns")]
    try:
        asked.append(config.getini("reruns"))
    except ValueError:
        pass  # a version without the setting
    return any(asked) or item.get_closest_marker("flaky") is not None


def _forget_failed_fixtures(item: pytest.Item) -> None:
    """Let fixtures that failed be made again; pytest keeps their exceptions."""
    info = getattr(item, "_fixtureinfo", None)
    for definitions in getattr(info, "name2fixturedefs", {}).values():
        for each in definitions:
            if each.cached_result is not None and each.cached_result[2] is not None:
                each.cached_result = None


def describe(seen: Mapping[str, Any]) -> str:
    """Return what an OOM under contention was, on one line."""
    from pytest_gpumem.sizes import format_size  # noqa: PLC0415  # it happens seldom

    needed = f"an OOM under contention: {format_size(seen['needed_bytes'])} were needed"
    others = f"others held {format_size(seen['others_bytes'])}"
    if seen["share_bytes"] is None:
        return f"{needed}, {others}"
    return f"{needed} of a share of {format_size(seen['share_bytes'])}, {others}"
