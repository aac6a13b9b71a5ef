"""Adds a section about the moment at which memory ran out to a failed test's report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.plugin.record_keeping import record_of, taken

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from pytest_gpumem.devices import Device
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.records.incidents import Incident


class Incidents:
    """Describes OOMs and broken limits when they happen, and shows them on failure.

    Args:
        run: The run, for its device.
    """

    def __init__(self, run: Run) -> None:
        self._run: Final = run
        self._snapshot: dict[str, Any] | None = None
        #: Called with each OOM when it happens.
        self.listeners: Final[list[Callable[[Incident], None]]] = []

    def attach(self, device: Device) -> None:
        """Begin to watch a device; this takes no time until memory runs out."""
        from pytest_gpumem.instruments.witness import OomWitness

        folder = self._run.settings.snapshots
        if folder is not None:
            from pytest_gpumem.instruments.snapshots import history_kept

            self._run.enter(history_kept())
        self._run.witness = self._run.enter(OomWitness(device, also=self._tell))

    def _tell(self, incident: Incident) -> None:
        for listener in self.listeners:
            listener(incident)
        if self._run.settings.snapshots is not None:
            from pytest_gpumem.instruments.snapshots import take_snapshot

            self._snapshot = take_snapshot()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Generator[None]:
        """Forget the incidents of the previous test."""
        self._forget()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add a description of the card's memory to a failed phase's report."""
        report = yield
        witness = self._run.witness
        if witness is not None and witness.incidents and report.failed:
            incidents = _causes(item, call, witness.incidents)
            if incidents:
                self._show(item, report, incidents)
            self._forget()
        return report

    def _show(
        self,
        item: pytest.Item,
        report: pytest.TestReport,
        incidents: Sequence[Incident],
    ) -> None:
        from pytest_gpumem.reports.oom_section import TITLE, headline, section_lines

        last = incidents[-1]
        lines = section_lines(last, count=len(incidents))
        record = record_of(item)
        record.incident, record.site = headline(last), last.site
        folder = self._run.settings.snapshots
        if folder is not None and self._snapshot is not None:
            from pytest_gpumem.instruments.snapshots import write_snapshot

            try:
                file = write_snapshot(self._snapshot, folder, item.nodeid)
            except OSError as error:
                lines.append(f"the snapshot could not be written: {error}")
            else:
                lines.append(f"snapshot for https://pytorch.org/memory_viz: {file}")
                record.snapshot = str(file)
        report.sections.append((TITLE, "\n".join(lines)))

    def _forget(self) -> None:
        self._snapshot = None
        if self._run.witness is not None:
            self._run.witness.clear()


def _causes(
    item: pytest.Item, call: pytest.CallInfo[None], incidents: Sequence[Incident]
) -> Sequence[Incident]:
    """Return the incidents that may have caused a failure.

    If a test fails for a limit or a baseline, it has recovered from all its OOMs, so these
    are left out.
    """
    message = str(getattr(getattr(call.excinfo, "value", None), "msg", ""))
    record = taken(item)
    if record is None or record.broken_limit != message.partition("\n")[0]:
        return incidents
    return [each for each in incidents if each.kind == "limit"]
