"""Reads and checks the markers of a run's tests before any of them runs."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Final

import pytest

from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.isolated import ISOLATION, Isolated, refuse_debuggers
from pytest_gpumem.plugin.oom_sections import Incidents
from pytest_gpumem.plugin.phases import Phases
from pytest_gpumem.plugin.record_keeping import attach_records
from pytest_gpumem.plugin.usage import UsageErrors
from pytest_gpumem.plugin.wider_fixtures import WiderFixtures, has_wider_fixtures
from pytest_gpumem.visibility import why_hidden

if TYPE_CHECKING:
    from pytest_gpumem.devices import Device
    from pytest_gpumem.plugin.host_memory import HostMemory
    from pytest_gpumem.plugin.session import Run


_RENAMED: Final = (
    "oom_fallback(...) is now oom_sweep(recover=True, on_demand=True, ...); the old marker "
    "still works"
)


class Collection:
    """The markers of the collected tests, and the hooks around the tests.

    Args:
        run: The run; its device may be created in the middle of a test.
        config: The run's config.
    """

    def __init__(self, run: Run, config: pytest.Config) -> None:
        self._run: Final = run
        self._manager: Final = config.pluginmanager
        self._is_isolated: Final = ISOLATION in config.stash
        self._errors: Final = UsageErrors(config)
        self._manager.register(self._errors, "gpumem-usage")
        self.markers: Final[marks.MarkersByTest] = marks.MarkersByTest()
        self._fixtures: Final = WiderFixtures(run)
        self.incidents: Final = Incidents(run)
        self._host: HostMemory | None = None
        self.phases: Final = Phases(run, self.markers, self._fixtures)
        run.on_device = self._device_came

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Read every marker; skip tests that this run's device cannot run.

        Raises:
            pytest.UsageError: The arguments of a marker make no sense.
        """
        with self._errors.reported(items):
            self._read(items)

    def _read(self, items: list[pytest.Item]) -> None:
        sweeps_on_demand = self._run.settings.sweeps_on_demand
        is_warned = False
        for item, markers in marks.read_markers(
            items, sweeps_on_demand=sweeps_on_demand
        ):
            self.markers[item] = markers
            if not is_warned and item.get_closest_marker("oom_fallback") is not None:
                is_warned = True
                warnings.warn(pytest.PytestDeprecationWarning(_RENAMED), stacklevel=1)
            if markers.is_isolated:
                refuse_debuggers(item)
            self._check_cards(item, markers)
            self._check_sweep(item, markers)
            reason = self._why_not(markers)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
        if self._run.choice.kind != "off" and not self._is_registered:
            self._register(items)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Divide the points of a sweep among the workers of pytest-xdist."""
        settings = self._run.settings
        if marks.is_swept(
            metafunc.definition, sweeps_on_demand=settings.sweeps_on_demand
        ) and not inspect.iscoroutinefunction(metafunc.function):
            from pytest_gpumem.plugin.sweeps import shard_tests

            shard_tests(metafunc, is_replay=settings.replay is not None)

    def _check_sweep(self, item: pytest.Item, markers: marks.Markers) -> None:
        """Prepare a test's sweep or repeats; note why it cannot be called again, if so."""
        is_repeated = markers.leak is not None and markers.leak.repeat is not None
        if markers.sweep is None and not is_repeated:
            return
        bases = getattr(getattr(item, "cls", None), "__mro__", ())
        is_plain = isinstance(item, pytest.Function) and all(
            base.__module__ != "unittest.case" for base in bases
        )
        if not is_plain or inspect.iscoroutinefunction(getattr(item, "obj", None)):
            self.phases.impossible[item] = (
                "max_vram_leak(repeat=...) needs a plain test function, to call it again; "
                "use the fixture steady"
                if markers.sweep is None
                else "a sweep needs a plain test function, to call it again and again; use "
                "the fixture oom_sweep or pytest_gpumem.sweep_ooms"
            )
            return
        # Of two plugins the one that is registered last is called first: a test's repeats
        # come before its sweep.
        from pytest_gpumem.plugin.repeats import Repeats
        from pytest_gpumem.plugin.sweeps import Sweeps

        for name, kind in (("gpumem-sweeps", Sweeps), ("gpumem-repeats", Repeats)):
            if not self._manager.has_plugin(name):
                self._manager.register(kind(self._run, self.markers), name)

    def _check_cards(self, item: pytest.Item, markers: marks.Markers) -> None:
        """Reject markers that name a card, or bytes of a card, that the run does not have.

        Raises:
            pytest.UsageError: There is such a marker.
        """
        totals = self._run.totals()
        if not totals:  # only torch knows them, or the cards are hidden
            return
        named = [("gpu_budget", each.device_index) for each in markers.budgets]
        named += [("max_vram", each.device_index or 0) for each in markers.limits]
        named += [("gpu_exclusive", each or 0) for each in markers.alone_on]
        for name, index in named:
            if index >= len(totals):
                raise pytest.UsageError(
                    f"{item.nodeid}: @pytest.mark.{name}: device={index}: there is no "
                    f"such card; this run has {len(totals)} card(s), numbered from 0"
                )
        for budget in markers.budgets:
            total = totals[budget.device_index]
            if budget.size.resolve(total) > total:
                raise pytest.UsageError(
                    f"{item.nodeid}: @pytest.mark.gpu_budget: {budget.size.text!r} is "
                    f"more than card {budget.device_index} has ({total} bytes)"
                )

    def _why_not(self, markers: marks.Markers) -> str | None:
        """Return why a test cannot run on this run's device; None if it can."""
        choice = self._run.choice
        if markers.needs_card and choice.kind != "cuda":
            return f"needs a real CUDA card: {choice.reason}"
        if choice.kind == "off":
            return f"needs a GPU, but gpumem's backend is off: {choice.reason}"
        if choice.kind == "simulated" and not self._run.settings.cards:
            return f"needs a GPU, but {why_hidden()}"
        return self._what_lacks(markers)

    def _what_lacks(self, markers: marks.Markers) -> str | None:
        """Return why no card can ever hold a test's bytes; None if one can."""
        if not markers.requirements:
            return None
        totals = self._run.totals()
        if totals is None:
            self._run.require_device()
            totals = self._run.totals() or ()
        for size, index in markers.requirements:
            if index >= len(totals):
                return (
                    f"requires {size.text} of card {index}; this run has {len(totals)} "
                    "card(s), numbered from 0"
                )
            total = totals[index]
            budget = self._run.settings.budget_bytes(index, total, markers.budgets)
            has = total if budget is None else min(budget, total)
            if size.resolve(total) > has:
                from pytest_gpumem.sizes import format_size

                whose = "the card has" if budget is None else "its budget is"
                return (
                    f"requires {size.text} of card {index}; {whose} {format_size(has)}"
                )
        return None

    @property
    def _is_registered(self) -> bool:
        return self._manager.is_registered(self.phases)

    def _register(self, items: list[pytest.Item]) -> None:
        """Register the hooks around every test, also if there is no device yet.

        A test may import torch at any moment. A plugin that is registered at that moment
        is not called for hooks that are already running.
        """
        if has_wider_fixtures(items):
            self._manager.register(self._fixtures, "gpumem-fixtures")
        self._manager.register(self.phases, "gpumem-phases")
        settings = self._run.settings
        budgets = (
            settings.host_budget,
            *(m.host_budget for m in self.markers.values()),
        )
        if settings.reports or any(budgets):
            from pytest_gpumem.plugin.host_memory import HostMemory

            self._host = HostMemory(self._run, self.markers)
            self._manager.register(self._host, "gpumem-host-memory")
        if not self._is_isolated and any(
            each.is_isolated for each in self.markers.values()
        ):
            isolated = Isolated(self._run, self.phases, self.markers)
            self._manager.register(isolated, "gpumem-isolated")
        if self._run.device is not None:
            self._attach(self._run.device)

    def _attach(self, device: Device) -> None:
        """Register the plugins for OOMs and failures; their hooks run after a phase."""
        if self._run.witness is None:
            attach_records(self._manager)
            self.incidents.listeners.append(self.phases.note_shrunk_batches())
            self._manager.register(self.phases.failures, "gpumem-failures")
            self._manager.register(self.incidents, "gpumem-incidents")
            self.incidents.attach(device)

    def _device_came(self) -> None:
        """Begin to measure a test that has just imported torch."""
        device = self._run.any_device()
        if self._is_registered:
            self._attach(device)
            if self._host is not None:
                self._host.device_came()
            self.phases.device_came(device)
