"""The run's baseline: read before any test, compared with as tests end, or written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.baselines.baseline import METRICS, Baseline, metric_key
from pytest_gpumem.baselines.gate import DEFAULT, Change, Tolerance, compare
from pytest_gpumem.errors import BaselineError
from pytest_gpumem.plugin.marks import ENVIRONMENT_PROPERTY

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_gpumem.model.records import MemoryFigures
    from pytest_gpumem.plugin.endings import Endings
    from pytest_gpumem.plugin.settings import Settings


#: Where a worker finds the baseline's text.
WORKER_INPUT: Final = "gpumem_baseline"
#: Changes and stale tests that are listed without ``-v``.
TOP: Final = 20


def peaks_of(
    figures: Iterable[MemoryFigures], children: Iterable[MemoryFigures] = ()
) -> dict[str, int]:
    """Return what a baseline keeps of a call's figures, and of its children's."""
    return {
        before + metric_key(metric, each.device_index): each.peak(metric) or 0
        for before, several in (("", figures), ("children ", children))
        for each in several
        for metric in METRICS
    }


class Gate:
    """A run's baseline in each process that runs tests.

    Args:
        settings: The options; they name a file.
        text: The file's text, where a controller has read it; None reads it.

    Raises:
        pytest.UsageError: The file is missing and not to be written, or broken.
    """

    def __init__(self, settings: Settings, text: str | None = None) -> None:
        assert settings.baseline is not None, "the caller looks"  # noqa: S101  # states why
        self.path: Final = settings.baseline
        #: The path as a person would write it here.
        self.name: Final = os.path.relpath(self.path)
        self.updates: Final = settings.updates_baseline
        self.tolerances: Final[Sequence[Tolerance]] = settings.compare_fail or DEFAULT
        self.baseline: Final = (
            self._read() if text is None else Baseline.parse(text, self.name)
        )

    def _read(self) -> Baseline:
        if self.updates and not self.path.exists():
            return Baseline()
        try:
            return Baseline.read(self.path)
        except BaselineError as error:
            raise pytest.UsageError(f"--gpu-baseline: {error}") from None

    def check(
        self,
        environment: str,
        test: str,
        figures: Iterable[MemoryFigures],
        children: Iterable[MemoryFigures] = (),
    ) -> str | None:
        """Return what is wrong with a test's peaks; None if nothing is."""
        if self.updates:
            return None
        before = self.baseline.peaks.get(environment, {}).get(test)
        if before is None:
            return None
        changes = compare(test, before, peaks_of(figures, children), self.tolerances)
        bad = [change for change in changes if change.is_regression]
        if not bad:
            return None
        gate = ", ".join(f"{each.metric}:{each}" for each in self.tolerances)
        return "\n".join(
            [
                f"peak VRAM above the baseline {self.name}: {bad[0]}",
                *(f"and {change}" for change in bad[1:]),
                f"allowed is {gate} more; if this is meant, run again with "
                "--gpu-update-baseline and commit the file",
            ]
        )


def entry(environment: str, test: str, peaks: Mapping[str, int]) -> dict[str, Any]:
    """Return a test that is new or stale as reports have it."""
    return {"environment": environment, "test": test, "peaks": dict(peaks)}


class BaselineSummary:
    """Compares the whole run with the baseline, or writes it; where reports arrive.

    Args:
        gate: The baseline.
        config: The run's.
        endings: Told of what fails at the run's end.
    """

    def __init__(self, gate: Gate, config: pytest.Config, endings: Endings) -> None:
        self._gate: Final = gate
        self._endings: Final = endings
        self._config: Final = config
        self._collected: Final[set[str]] = set()
        self._peaks: Final[dict[str, dict[str, dict[str, int]]]] = {}
        self._failed: Final[set[str]] = set()
        self._spared: Final[set[str]] = set()
        self._lines: list[tuple[str, str, bool]] = []
        #: What differs from the baseline, for reports.
        self.changes: list[Change] = []
        #: What is new in this run and what is stale in the file, likewise.
        self.new: list[dict[str, Any]] = []
        self.stale: list[dict[str, Any]] = []

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the baseline to a worker, wherever it is."""
        node.workerinput[WORKER_INPUT] = self._gate.baseline.to_text()

    # -- what ran -------------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note what there is to run, in a run without workers."""
        self._collected.update(item.nodeid for item in session.items)

    def pytest_deselected(self, items: Sequence[pytest.Item]) -> None:
        """Note what there is and does not run, by whomever it was left out."""
        self._spared.update(item.nodeid for item in items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(
        self,
        ids: Sequence[str],
    ) -> None:
        """Note what there is to run, as a worker tells it."""
        self._collected.update(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take in a test's peaks once it is over."""
        if report.failed:
            self._failed.add(report.nodeid)
        if report.skipped:
            self._spared.add(report.nodeid)
        if report.when != "teardown" or not report.user_properties:
            return
        from pytest_gpumem.model.records import from_properties  # noqa: PLC0415  # there are figures

        properties = dict(report.user_properties)
        environment = properties.get(ENVIRONMENT_PROPERTY)
        by_phase: dict[str, list[MemoryFigures]] = {"call": [], "children": []}
        for (phase, _index), each in from_properties(properties).items():
            by_phase.setdefault(phase, []).append(each)
        peaks = peaks_of(by_phase["call"], by_phase["children"])
        if environment is not None and peaks:
            self._peaks.setdefault(str(environment), {})[report.nodeid] = peaks

    # -- what comes of it -----------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Compare, or write the file."""
        if not self._endings.has_run:
            return
        stale = {environment: self._stale(environment) for environment in self._peaks}
        if self._gate.updates:
            self._find(stale)
            self._write(stale)
        else:
            self._compare(stale)

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Say what changed."""
        if not self._lines:
            return
        verbosity = self._config.get_verbosity()
        terminalreporter.section("GPU memory against the baseline")
        hidden = shown = 0
        for line, colour, is_detail in self._lines:
            if is_detail and verbosity <= 0:
                shown += 1
                if verbosity < 0 or shown > TOP:
                    hidden += 1
                    continue
            terminalreporter.write_line(line, **({colour: True} if colour else {}))
        if hidden and not verbosity:
            terminalreporter.write_line(f"... and {hidden} lines more; -v shows all")

    def _say(self, line: str, colour: str = "", *, is_detail: bool = False) -> None:
        self._lines.append((line, colour, is_detail))

    def _write(self, stale: Mapping[str, Sequence[str]]) -> None:
        baseline, before = self._gate.baseline, self._gate.baseline.to_text()
        written = left = 0
        for environment, tests in self._peaks.items():
            passed = {
                test: peaks for test, peaks in tests.items() if test not in self._failed
            }
            written += len(passed)
            left += len(tests) - len(passed)
            baseline.update(environment, passed, stale[environment])
        dropped = sum(map(len, stale.values()))
        if baseline.to_text() != before or not self._gate.path.exists():
            try:
                baseline.write(self._gate.path)
            except OSError as error:
                self._endings.fail(
                    f"--gpu-update-baseline: {self._gate.name} cannot be written: "
                    f"{error}; name another file with --gpu-baseline"
                )
                return
            verb = "written"
        else:
            verb = "unchanged"
        parts = [f"{written} tests"]
        parts += [f"{dropped} stale dropped"] if dropped else []
        parts += [f"{left} that failed left as they were"] if left else []
        self._say(f"{self._gate.name} {verb}: {', '.join(parts)}")

    def _find(self, stale: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Note what differs from the baseline; return how many tests, by what became."""
        known = self._gate.baseline.peaks
        counts = {"the same": 0, "changed": 0, "new": 0}
        tolerances = () if self._gate.updates else self._gate.tolerances
        for environment, tests in sorted(self._peaks.items()):
            before = known.get(environment, {})
            for test, peaks in sorted(tests.items()):
                if test not in before:
                    self.new.append(entry(environment, test, peaks))
                    counts["new"] += environment in known
                    continue
                found = compare(test, before[test], peaks, tolerances)
                counts["changed" if found else "the same"] += 1
                self.changes += found
        self.stale = [
            entry(environment, test, known[environment][test])
            for environment, tests in sorted(stale.items())
            for test in tests
        ]
        return counts

    def _compare(self, stale: Mapping[str, Sequence[str]]) -> None:
        counts = self._find(stale)
        for environment in self._peaks:
            if environment not in self._gate.baseline.peaks:
                others = ", ".join(sorted(self._gate.baseline.peaks)) or "none"
                self._say(
                    f"{self._gate.name} has no figures for {environment} (it has: "
                    f"{others}); write them with --gpu-update-baseline",
                    "yellow",
                )
        ranked = sorted(self.changes, key=lambda each: -abs(each.now - each.before))
        for change in ranked:
            colour = "red" if change.is_regression else ""
            colour = "green" if change.now < change.before else colour
            self._say(f"{change.test}: {change}", colour, is_detail=True)
        parts = [f"{count} {word}" for word, count in counts.items() if count]
        parts += [f"{len(self.stale)} stale"] if self.stale else []
        if parts:
            self._say(f"{self._gate.name}: {', '.join(parts)}")
        for each in self.stale:
            text = f"stale: {each['test']} is no more, or uses no card"
            self._say(text, "yellow", is_detail=True)
        if counts["new"] or self.stale:
            self._say("--gpu-update-baseline takes in new tests and drops stale ones")

    def _stale(self, environment: str) -> list[str]:
        """Return the baseline's tests that are no more, as far as this run can tell."""
        known = self._gate.baseline.peaks.get(environment, {})
        used = self._peaks.get(environment, {})
        option = self._config.option
        is_chosen = any(
            getattr(option, name, None)
            for name in ("keyword", "markexpr", "deselect", "lf", "maxfail", "stepwise")
        ) or any("::" in argument for argument in self._config.args)
        files = {test.partition("::")[0] for test in self._collected}
        stale = []
        for test in known:
            file = test.partition("::")[0]
            if not (self._config.rootpath / file).exists():
                stale.append(test)
            elif is_chosen or file not in files or test in self._spared:
                continue
            elif test not in self._collected or (
                test not in used and test not in self._failed
            ):
                stale.append(test)
        return sorted(stale)
