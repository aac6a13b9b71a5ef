"""Runs every test with its budget, limits and faults, and records its peaks."""

from __future__ import annotations

import gc
import json
import platform
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.devices import allocated_bytes
from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.failures import Failures
from pytest_gpumem.plugin.record_keeping import has_record, record_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from pytest_gpumem.children.notes import ChildFigures
    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.plugin.growth import Growth
    from pytest_gpumem.plugin.limits import LeakCheck, Limits
    from pytest_gpumem.plugin.session import Run
    from pytest_gpumem.plugin.shrunk_batches import ShrunkBatches
    from pytest_gpumem.plugin.wider_fixtures import WiderFixtures
    from pytest_gpumem.records.incidents import Incident
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.records.record import Record
    from pytest_gpumem.rules.rule import Rule


class Phases:
    """The hooks around the phases of each test.

    Args:
        run: The run.
        markers: The arguments of each test's markers.
        fixtures: Measures the bytes that fixtures of wider scope hold.
    """

    def __init__(
        self,
        run: Run,
        markers: marks.MarkersByTest,
        fixtures: WiderFixtures,
    ) -> None:
        self._run: Final = run
        self._markers: Final = markers
        self._fixtures: Final = fixtures
        self._general: Final = run.settings.max_vram
        #: Why a test cannot be run as its markers ask.
        self.impossible: Final[dict[pytest.Item, str]] = {}
        #: Clears the frames of failed phases.
        self.failures: Final = Failures()
        self._shrunk: ShrunkBatches | None = None
        self._limits: Limits | None = None
        self._leak: LeakCheck | None = None
        self._item: pytest.Item | None = None
        self._phase: str | None = None
        self._requests = 0
        self._trackers: list[Tracker] = []
        self._call = ExitStack()
        self._watches = ExitStack()
        self._passed = False
        self._injector: Any = None
        self._seen_requests = 0
        self._held_bytes = 0
        #: The number of allocations made to fail so far, by rule of the command line.
        self.rule_counts: Final = {str(rule): 0 for rule in run.settings.rules}

    def device_came(self, device: Device) -> None:
        """Begin to measure the running test, which has just caused the device's creation."""
        if self._run.growth is not None:
            self._run.growth.device_came(device)
        if self._item is None:
            return
        self._start(self._item, device)
        if self._phase is not None:
            self._watch(self._phase, device)
        if self._phase == "call":
            self._arm(device)

    def note_shrunk_batches(self) -> Callable[[Incident], None]:
        """Note batches that a library makes smaller; return the observer of OOMs."""
        from pytest_gpumem.plugin.shrunk_batches import ShrunkBatches

        self._shrunk = ShrunkBatches()
        return self._shrunk.note

    # -- the phases of a test -------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Set the test's budget and record the setup."""
        if self._run.growth is not None:
            self._run.growth.begin(item)
        if self._run.gate is not None:
            self._run.gate.begin()
        if item in self._markers and item.get_closest_marker("skip") is None:
            self._run.require_device()
        self._item = item
        if self._run.device is not None:
            self.clean(self._run.device)
            self._start(item, self._run.device)
        self._begin("setup")
        try:
            if item in self.impossible:
                pytest.fail(self.impossible[item], pytrace=False)
            result = yield
            self._check_limits(item, "setup")
            return result
        finally:
            self._end(item, "setup")

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Run the test with its faults armed, then check its limits."""
        self._begin("call")
        growth = self._run.growth
        if growth is not None:
            growth.begin_call()
        markers = self._markers[item]
        rules = self._rules(markers)
        try:
            if rules:
                self._run.pass_on(markers.budgets, rules)
            if self._run.device is not None:
                self._arm(self._run.device)
            result = yield
            if rules:
                self._call.close()
            if growth is not None:
                children = self._run.children
                growth.end_call(children.together(children.new_figures()))
            if markers.rules:
                self._check_rules(markers)
            self._check_limits(item, "call")
            self._passed = True
            return result
        finally:
            if growth is not None:
                growth.end_call()
            if rules:
                self._call.close()
                self._count_injected(markers)
                self._run.pass_on(markers.budgets)
            if self._run.timeline is not None:
                self._run.timeline.meet_living()
            self._end(item, "call")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        """Record the teardown, then restore the run's own budget."""
        self.failures.release()
        self._begin("teardown")
        growth, gate = self._run.growth, self._run.gate
        if growth is not None:
            growth.begin_teardown()
        try:
            result = yield
            self._check_limits(item, "teardown")
            if self._leak is not None and self._passed:
                self._leak.check(self._fixtures.held_bytes)
            if growth and gate and growth.peaks and self._passed:
                text = gate.check_left(item.nodeid, growth.end())
                if text is not None:
                    from pytest_gpumem.plugin.limits import fail

                    fail(item, text)
            return result
        finally:
            if self._run.device is None and item not in self._markers and not growth:
                self._forget()  # most tests of most suites need nothing of the rest
                self._run.children.end_test(item)
            else:
                self._end_test(item, growth)

    def _end_test(self, item: pytest.Item, growth: Growth | None) -> None:
        with ExitStack() as ending:
            ending.callback(self._run.apply_budgets, ())
            ending.callback(self._forget)
            if self._run.device is not None:
                ending.callback(self._note_limits, item)
                ending.callback(self._end_timeline, item)
            ending.callback(self._end, item, "teardown")
            if growth is not None:
                ending.callback(self._tell_growth, growth, item)
            ending.callback(self._run.children.end_test, item)

    def _tell_growth(self, growth: Growth, item: pytest.Item) -> None:
        judgement = None if self._run.gate is None else self._run.gate.judgement
        growth.tell(item, growth.end(), judgement)

    def _forget(self) -> None:
        """Drop everything that belongs to a test that has ended."""
        self._item = self._phase = None
        self._limits = self._leak = None
        self._passed = False

    # -- peaks ----------------------------------------------------------------------------

    def _start(self, item: pytest.Item, device: Device) -> None:
        """Start a test's budget, limits and timeline."""
        self._run.apply_budgets(self._markers[item].budgets)
        self._take_up(item, device)
        self._start_timeline(item, device)

    def _begin(self, phase: str) -> None:
        self._phase = phase
        if self._run.device is not None:
            self._watch(phase, self._run.device)

    def _watch(self, phase: str, device: Device) -> None:
        """Start to record a phase, and to watch its limits."""
        if self._limits is not None:
            self._limits.watch(phase, self._watches)
        self._requests = device.num_requests
        self._trackers = [
            device.open_tracker(index) for index in range(device.device_count)
        ]
        if self._wants_samples():
            from pytest_gpumem.instruments.sampler import sampled

            self._trackers = sampled(device, self._trackers)

    def _wants_samples(self) -> bool:
        """Tell whether a limit or a report needs samples of NVML."""
        limits = self._markers[self._item].limits
        reports = self._run.settings.reports
        return bool(reports) or any(each.metric == "process" for each in limits)

    def _end(self, item: pytest.Item, phase: str) -> None:
        """Put the phase's figures into the test's record, if it used a card."""
        self._phase = None
        device = self._run.device
        if device is None:
            return
        self._watches.close()
        if self._shrunk is not None:
            self._shrunk.end_phase(item)
        trackers, self._trackers = self._trackers, []
        figures = [tracker.close() for tracker in trackers]
        if self._run.timeline is not None:
            figures = self._with_activations(figures)
            self._run.timeline.end_phase(phase)
        if self._used(device):
            from pytest_gpumem.records.record import PhaseFigures

            record = record_of(item)
            record.environment = self._run.environment()
            record.host = platform.node()
            if self._run.settings.suggests_limits and phase == "call":
                self._note_limit(item, device)
            used = _used_cards(figures)
            record.figures += [PhaseFigures.of(phase, each) for each in used]
            if self._wants_samples():
                _note_unknown(record, device, used)

    def _note_limit(self, item: pytest.Item, device: Device) -> None:
        """Put the limit that a test's markers set into its record."""
        bounds = [
            limit.size.resolve(device.total_bytes(limit.device_index or 0))
            for limit in self._markers[item].limits
            if limit.metric == "allocated"
        ]
        if bounds:
            record_of(item).max_vram_bytes = min(bounds)

    def _with_activations(self, several: list[MemoryFigures]) -> list[MemoryFigures]:
        """Add the activations at the present phase's peak, if they are recorded."""
        timeline = self._run.timeline
        if timeline is None:
            return several
        kinds = {each.device_index: each for each in several}
        found = {index: timeline.kinds_of(index) for index in kinds}
        return [
            each
            if (known := found[each.device_index]) is None
            else replace(each, peak_activations_bytes=known.get("activations", 0))
            for each in several
        ]

    def _start_timeline(self, item: pytest.Item, device: Device) -> None:
        """Begin to record a test's timeline, if a report or a limit needs it."""
        limits = self._markers[item].limits
        if not self._run.settings.reports and not any(
            each.metric == "activations" for each in limits
        ):
            return
        from pytest_gpumem.instruments.timeline import Timeline

        self._run.timeline = Timeline(device).__enter__()

    def _end_timeline(self, item: pytest.Item) -> None:
        timeline, self._run.timeline = self._run.timeline, None
        if timeline is None:
            return
        timeline.__exit__(None, None, None)
        # A test that only tears down a fixture of an earlier test has no record.
        if not has_record(item):
            return
        record = record_of(item)
        record.figures = [
            each
            if (kinds := timeline.kinds_of(each.device_index, each.phase)) is None
            else replace(each, kinds=kinds)
            for each in record.figures
        ]
        if any(kind in marks.DETAILED for kind, _ in self._run.settings.reports):
            result = timeline.result() if timeline.is_recorded else None
            record.timeline = json.dumps(result, separators=(",", ":"))

    def _note_limits(self, item: pytest.Item) -> None:
        """Put the limits of a test that used a card into its record."""
        if not has_record(item):
            return
        record = record_of(item)
        if self._limits is not None:
            record.limits += self._limits.outcomes(record)
        if self._leak is not None and self._leak.outcome is not None:
            record.limits.append(self._leak.outcome)

    def _used(self, device: Device) -> bool:
        """Tell whether a card got any request since the phase began."""
        return device.num_requests != self._requests

    # -- limits ---------------------------------------------------------------------------

    def _take_up(self, item: pytest.Item, device: Device) -> None:
        """Begin to watch a test's limits."""
        markers = self._markers[item]
        settings = self._run.settings
        limits = markers.limits
        if self._general is not None:
            general = marks.Limit(self._general)
            if not any(each.metric == general.metric for each in limits):
                limits = (*limits, general, general._replace(phase="children"))
        leak = markers.leak
        allowed = 0 if settings.leak_check else None
        if leak is not None:  # a repeated test is judged after each run instead
            allowed = leak.nbytes if leak.repeat is None else None
        if not limits and allowed is None:
            return
        from pytest_gpumem.plugin.limits import LeakCheck, Limits

        if limits:
            self._limits = Limits(device, limits, self._run.witness)
        if allowed is not None:
            held = self._fixtures.held_bytes
            self._leak = LeakCheck(device, item, allowed, held)

    def _check_limits(self, item: pytest.Item, phase: str) -> None:
        gate = self._run.gate if phase == "call" else None
        if not self._limits and not gate and self._general is None:
            return
        children = self._run.children.new_figures() if phase == "call" else []
        if children and self._general is not None:
            self._run.any_device()  # the test itself has not imported torch
        read = self._with_activations([each.read() for each in self._trackers])
        if not read and not children:
            return
        below = self._run.children.together(children)
        text = None
        if self._limits is not None:
            for of, figures in ((phase, read), ("children", below)):
                by_card = {each.device_index: each for each in figures}
                text = text or self._limits.check(of, by_card)
            if text is not None:
                text = "\n".join([text, *self._kinds_lines(read)])
        device = self._run.device
        is_used = device is not None and self._used(device)
        growth = self._run.growth
        if text is None and gate and growth and (is_used or children):
            environment = self._environment(children)
            text = gate.check(environment, item, growth)
        if text is not None:
            from pytest_gpumem.plugin.limits import fail

            fail(item, text)

    def _kinds_lines(self, several: list[MemoryFigures]) -> list[str]:
        """Return the kinds of bytes at the present phase's peaks, if it is recorded."""
        from pytest_gpumem.reports.descriptions import kinds_words
        from pytest_gpumem.sizes import format_size

        timeline = self._run.timeline
        found = (
            (each, None if timeline is None else timeline.kinds_of(each.device_index))
            for each in several
        )
        return [
            f"of {format_size(each.peak_allocated_bytes)} on "
            f"cuda:{each.device_index}: {kinds_words(kinds)}"
            for each, kinds in found
            if kinds
        ]

    def _environment(self, children: list[ChildFigures]) -> str:
        if self._run.device is None:
            return children[0].environment
        return self._run.environment()

    # -- faults ---------------------------------------------------------------------------

    def _rules(self, markers: marks.Markers) -> tuple[Rule, ...]:
        return markers.rules + self._run.settings.rules

    def _arm(self, device: Device) -> None:
        rules = self._rules(self._markers[self._item])
        if not rules:
            return
        from pytest_gpumem.instruments.injector import OomInjector

        injector = OomInjector(*rules, device=device)
        self._injector = self._call.enter_context(injector)
        self._run.children.injector = injector

    def _check_rules(self, markers: marks.Markers) -> None:
        """Fail a test if a rule of its markers was never reached, as it proves nothing."""
        own = self._own_schedules(markers)
        failed_counts = self._run.children.failed_counts(len(own))
        for schedule, in_children in zip(own, failed_counts, strict=True):
            if not schedule.num_failed and not in_children:
                pytest.fail(
                    f"inject_oom {str(schedule.rule)!r} was never reached: the test "
                    f"made {schedule.num_counted} allocation(s) that it counts",
                    pytrace=False,
                )

    def _own_schedules(self, markers: marks.Markers) -> list[Any]:
        if self._injector is None:
            return []
        schedules: list[Any] = self._injector.schedules[: len(markers.rules)]
        return schedules

    def _count_injected(self, markers: marks.Markers) -> None:
        own = len(markers.rules)
        names = [str(rule) for rule in self._run.settings.rules]
        in_children = self._run.children.failed_counts(own + len(names))
        for name, failed in zip(names, in_children[own:], strict=True):
            self.rule_counts[name] += failed
        if self._injector is not None:
            for schedule in self._injector.schedules[own:]:
                self.rule_counts[str(schedule.rule)] += schedule.num_failed
            self._injector = self._run.children.injector = None

    # -- between tests --------------------------------------------------------------------

    def clean(self, device: Device) -> None:
        """Free memory that the previous test left in caches, tracebacks and cycles."""
        self.failures.release()
        if device.num_requests == self._seen_requests:
            return
        if allocated_bytes(device) > self._held_bytes:
            gc.collect()
        device.empty_cache()
        self._seen_requests = device.num_requests
        self._held_bytes = allocated_bytes(device)


def _used_cards(figures: list[MemoryFigures]) -> list[MemoryFigures]:
    return [each for each in figures if each.peak_reserved_bytes or each.num_ooms]


def _note_unknown(record: Record, device: Device, figures: list[MemoryFigures]) -> None:
    """Note why a process's bytes are unknown, if they are."""
    for each in figures:
        if each.peak_process_bytes is None:
            from pytest_gpumem.plugin.limits import why_unknown

            text = f"process bytes unknown: {why_unknown(device, each.device_index)}"
            if text not in (record.unknown or ""):
                record.unknown = "; ".join(filter(None, (record.unknown, text)))
