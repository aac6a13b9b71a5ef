"""Compares the whole run with the baseline, or writes the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.baselines.baseline import (
    LEFT,
    Baseline,
    has_growth,
    torch_of,
)
from pytest_gpumem.baselines.regressions import compare_figures, moved_by_torch, shifted
from pytest_gpumem.devices.environment import environment_name
from pytest_gpumem.devices.selection import torch_build
from pytest_gpumem.errors import BaselineError
from pytest_gpumem.plugin.baseline_record import BaselineRecord
from pytest_gpumem.plugin.gate import adjusted
from pytest_gpumem.records.run_record import Change, Entry
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from pytest_gpumem.plugin.endings import Endings
    from pytest_gpumem.plugin.gate import Gate
    from pytest_gpumem.plugin.record_keeping import Collector
    from pytest_gpumem.plugin.session import Run

#: The most changes and stale tests that are listed without ``-v``.
TOP: Final = 20
#: The most names that a sentence lists.
FEW: Final = 3


class BaselineSummary(BaselineRecord):
    """Compares the whole run with the baseline, or writes it.

    Args:
        run: The run.
        gate: The baseline.
        config: The run's config.
        collector: Collects the records.
        endings: Collects reasons, other than failed tests, for which the run fails.
    """

    def __init__(
        self,
        run: Run,
        gate: Gate,
        config: pytest.Config,
        collector: Collector,
        endings: Endings,
    ) -> None:
        super().__init__(run, gate, config, collector)
        self._endings: Final = endings
        self._lines: list[tuple[str, str, bool]] = []
        #: The changes against the baseline, for reports.
        self.changes: list[Change] = []
        #: The new entries of this run, and the stale entries of the file.
        self.new: list[Entry] = []
        self.stale: list[Entry] = []

    # -- the results ----------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Compare the run with the file, or write the file."""
        if not self._endings.has_run:
            return
        choice = self._run.choice
        if choice.kind == "off":
            verb = "written to" if self._gate.updates else "compared with"
            self._endings.is_inert(
                f"{self._gate.name}: nothing was {verb} it, as the backend is off "
                f"({choice.reason}); run with --gpu-backend=simulated or cuda"
            )
            return
        environments = self._environments()
        stale = {each: self._stale(each) for each in environments}
        if self._gate.updates:
            self._find(stale)
            self._write(stale)
        else:
            self._compare(stale)

    def _environments(self) -> list[str]:
        """Return the environments of this run's tests that used a card."""
        found = dict.fromkeys(sorted(self._peaks) + sorted(self._fixtures))
        known = self._gate.baseline.peaks
        if not found and any(
            test in self._finished for each in known.values() for test in each
        ):
            found = dict.fromkeys(filter(None, (self._expected(),)))
        return list(found)

    def _expected(self) -> str | None:
        """Return the environment that this run's tests have if they use a card."""
        if self._run.choice.kind == "simulated":
            build = torch_build()
            names = [each.name for each in self._run.settings.cards]
            version = "" if build is None else build.version
            return environment_name(names, "simulated", version)
        self._run.any_device()
        return self._run.environment()

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter
    ) -> None:
        """Print the changes."""
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

    # -- writing --------------------------------------------------------------------------

    def _write(self, stale: Mapping[str, Sequence[str]]) -> None:
        written = left = 0
        passed: dict[str, dict[str, dict[str, int]]] = {}
        for environment, tests in self._peaks.items():
            passed[environment] = {
                test: peaks
                for test, peaks in tests.items()
                if test not in self._failed and test not in self._left_out
            }
            written += len(passed[environment])
            left += len(tests) - len(passed[environment])
        gone = {each: self._stale_fixtures(each) for each in stale}

        def change(baseline: Baseline) -> None:
            for environment in stale:
                before = baseline.peaks.get(environment, {})
                fixtures = baseline.fixtures.get(environment, {})
                baseline.update(
                    environment,
                    {
                        test: peaks
                        for test, peaks in passed.get(environment, {}).items()
                        if not self._is_same(test, before.get(test), peaks)
                    },
                    stale[environment],
                    fixtures={
                        key: peaks
                        for key, peaks in self._fixtures.get(environment, {}).items()
                        if not self._is_same(key, fixtures.get(key), peaks)
                    },
                    stale_fixtures=gone[environment],
                )

        try:
            is_written = Baseline.revise(self._gate.path, change)
        except (OSError, BaselineError) as error:
            self._endings.fail(
                f"--gpu-update-baseline: {self._gate.name} cannot be written: "
                f"{error}; name another file with --gpu-baseline"
            )
            return
        dropped = sum(map(len, stale.values())) + sum(map(len, gone.values()))
        num_fixtures = sum(map(len, self._fixtures.values()))
        parts = [f"{written} test{'s' * (written != 1)}"]
        s = "s" * (num_fixtures != 1)
        parts += [f"{num_fixtures} fixture{s}"] if num_fixtures else []
        parts += [f"{dropped} stale dropped"] if dropped else []
        parts += [f"{left} that failed left as they were"] if left else []
        verb = "written" if is_written else "unchanged"
        self._say(f"{self._gate.name} {verb}: {', '.join(parts)}")
        kept = self._num_unfinished()
        if kept:
            self._say(
                f"the run was interrupted: {kept} tests did not run and keep their "
                "figures",
                "yellow",
            )

    def _is_same(
        self, name: str, before: Mapping[str, int] | None, now: Mapping[str, int]
    ) -> bool:
        """Tell whether all judged figures of an entry are the same.

        The bytes that were on the card before the test depend on the order of tests. They
        are not compared, so that an update after a run in another order changes nothing.
        """
        if before is None or not has_growth(before):
            return False
        if {each for each in before.keys() ^ now.keys() if not each.endswith(LEFT)}:
            return False
        moved = self._moved.get(name, {})
        return not compare_figures(name, before, adjusted(now, moved), ())

    # -- comparing ------------------------------------------------------------------------

    def _find(self, stale: Mapping[str, Sequence[str]]) -> dict[str, int]:
        """Note the changes from the baseline; return the number of tests by result."""
        counts = {"the same": 0, "changed": 0, "new": 0}
        tolerances = () if self._gate.updates else self._gate.tolerances
        for environment, tests in sorted(self._peaks.items()):
            known = self._gate.known(environment)
            for test, peaks in sorted(tests.items()):
                before, is_carried = known.test(test)
                if before is None or (is_carried and self._gate.updates):
                    self.new.append(Entry(environment, test, dict(peaks)))
                    counts["new"] += 1
                elif not is_carried:
                    now = adjusted(peaks, self._moved.get(test, {}))
                    found = compare_figures(test, before, now, tolerances)
                    counts["changed" if found else "the same"] += 1
                    self.changes += found
            for key, peaks in sorted(self._fixtures.get(environment, {}).items()):
                before, is_carried = known.fixture(key)
                if before is not None and not is_carried:
                    self.changes += compare_figures(key, before, peaks, tolerances)
                elif before is None and known.has_growth:
                    self.new.append(Entry(environment, key, dict(peaks)))
        self.stale = [
            Entry(environment, test, self._gate.baseline.peaks[environment][test])
            for environment, tests in sorted(stale.items())
            for test in tests
        ]
        return counts

    def _compare(self, stale: Mapping[str, Sequence[str]]) -> None:
        counts = self._find(stale)
        for environment in sorted(self._peaks):
            self._compare_carried(environment)
        for key, tests in self._culprits.items():
            self._say(f"the fixture {key} grew{self._below(tests)}", "red")
        ranked = sorted(self.changes, key=lambda each: -abs(each.excess))
        for change in ranked:
            colour = "red" if change.is_regression else ""
            colour = "green" if change.now < change.before else colour
            self._say(f"{change.test}: {change}", colour, is_detail=True)
        parts = [f"{count} {word}" for word, count in counts.items() if count]
        parts += [f"{len(self.stale)} stale"] if self.stale else []
        if parts:
            self._say(f"{self._gate.name}: {', '.join(parts)}")
        self._tell_stale()
        self._tell_new()
        if any(
            not has_growth(self._gate.known(environment).tests.get(test, {"": 0}))
            and test in self._gate.known(environment).tests
            for environment, tests in self._peaks.items()
            for test in tests
        ):
            self._say(
                f"{self._gate.name} has absolute peaks (format 1), which depend on "
                "order and selection; --gpu-update-baseline writes what each test adds",
                "yellow",
            )

    @staticmethod
    def _below(tests: Sequence[str]) -> str:
        if not tests:
            return ""
        return f"; because of it, and so not failures of their own: {_few(tests)}"

    def _tell_stale(self) -> None:
        cpu = [each.test for each in self.stale if each.test in self._finished]
        for each in self.stale:
            why = "no longer uses a card" if each.test in cpu else "no longer exists"
            text = f"stale: {each.test} {why}"
            self._say(text, "yellow", is_detail=True)
        if cpu:
            self._endings.is_inert(
                f"{self._gate.name}: {len(cpu)} of its tests used no card in this "
                f"run: {_few(cpu)}; bring them back to the card, or drop them with "
                "--gpu-update-baseline"
            )

    def _tell_new(self) -> None:
        tests = [
            each.test for each in self.new if self._gate.known(each.environment).tests
        ]
        renamed = {
            each.test: gone.test
            for each in self.new
            for gone in self.stale
            if gone.environment == each.environment
            and gone.test not in self._finished
            and has_growth(gone.peaks)
            and not compare_figures("", gone.peaks, each.peaks, ())
        }
        for test, before in renamed.items():
            self._say(f"{test} has the figures of {before}: it was probably renamed")
        if tests:
            self._endings.is_inert(
                f"{self._gate.name}: {len(tests)} tests or fixtures use the card and "
                f"have no figures in it: {_few(tests)}; write them with "
                "--gpu-update-baseline and commit the file"
            )
        for environment in sorted(self._peaks):
            known = self._gate.known(environment)
            if not known.tests and known.other is None:
                others = ", ".join(sorted(self._gate.baseline.peaks)) or "none"
                self._endings.is_inert(
                    f"{self._gate.name} has no figures for {environment} (it has: "
                    f"{others}), so nothing was compared; write them with "
                    "--gpu-update-baseline"
                )
        if self.stale and not tests:
            self._say("--gpu-update-baseline drops what is stale")

    def _compare_carried(self, environment: str) -> None:
        """Compare the tests for which the file has figures of another torch version only."""
        known = self._gate.known(environment)
        tests = {
            test: before
            for test in self._peaks[environment]
            for before, is_carried in (known.test(test),)
            if before is not None and is_carried
        }
        if not tests:
            return
        now = {
            test: adjusted(self._peaks[environment][test], self._moved.get(test, {}))
            for test in tests
        }
        pairs = [(before, now[test]) for test, before in tests.items()]
        shift = moved_by_torch([*known.pairs, *pairs])
        changes = [
            change
            for test, before in sorted(tests.items())
            for change in compare_figures(
                test,
                shifted(before, now[test], shift),
                now[test],
                self._gate.tolerances,
            )
        ]
        self.changes += changes
        bad = list(dict.fromkeys(each.test for each in changes if each.is_regression))
        versions = torch_of(known.other or ""), torch_of(environment)
        words = [
            f"{metric} {'+' if n > 0 else '-'}{format_size(abs(n))}"
            for metric, n in sorted(shift.items())
        ]
        moved = (
            f"torch itself changed {', '.join(words)}"
            if words
            else ("torch itself changed nothing")
        )
        # If torch changed each test by a different number of bytes, this looks the same as
        # changes of the tests themselves.
        is_torch = 2 * len(bad) > len(tests) and len(bad) > 1
        if is_torch:
            moved = (
                f"{len(bad)} grew, each by another amount, which may be torch's: "
                f"{_few(bad)}"
            )
        self._endings.is_inert(
            f"{self._gate.name} has no figures of torch {versions[1]} for "
            f"{len(tests)} tests on {environment.rpartition(', torch')[0]}; they were "
            f"compared with those of torch {versions[0]}: {moved}; write them with "
            "--gpu-update-baseline"
        )
        if is_torch:
            return
        for test in bad:
            if test in self._failed:
                continue
            several = [
                each for each in changes if each.is_regression and each.test == test
            ]
            more = "".join(f"\nand {each}" for each in several[1:])
            self._report(
                test,
                f"VRAM growth above the baseline {self._gate.name}, with torch "
                f"{versions[0]}: {several[0]}{more}\n{self._gate.advice}",
            )
        if bad and self._session is not None and not self._session.exitstatus:
            self._session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _few(names: Iterable[str]) -> str:
    several = list(names)
    more = len(several) - FEW
    return ", ".join(several[:FEW]) + (f" and {more} more" if more > 0 else "")
