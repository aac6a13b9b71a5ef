"""One run of pytest: the device, from its start to its end, and every test on it."""

from __future__ import annotations

import gc
import sys
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.selection import Choice, choose
from pytest_gpumem.instruments.frames import clear_exception
from pytest_gpumem.model.records import to_properties
from pytest_gpumem.plugin import marks
from pytest_gpumem.plugin.options import Settings, check_budgets
from pytest_gpumem.sizes import format_size

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from pytest_gpumem.devices import Device, Tracker
    from pytest_gpumem.model.records import MemoryFigures


class GpuMemPlugin:
    """The plugin's hooks for one run.

    Args:
        settings: The run's options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings: Final = settings
        self.choice: Choice = choose(settings.backend)
        self.device: Device | None = None
        self._installation: Any = None
        self._hook = AfterImport("torch", self._torch_imported)
        self._nvml_hook = AfterImport("pynvml", self._nvml_imported)
        self._nvml: Any = None
        self._trackers: list[Tracker] = []
        self._phase: str | None = None
        self._item: pytest.Item | None = None
        self._seen_requests = 0
        self._held_bytes = 0
        self._spent: dict[str, int] = {}
        if self.choice.kind == "simulated":
            totals = {
                index: card.total_bytes for index, card in enumerate(settings.cards)
            }
            check_budgets(settings, totals)

    # -- the device -------------------------------------------------------------------

    def start(self) -> None:
        """Have the device ready by the time anybody can use torch."""
        if self.choice.kind == "cuda" and self.settings.budgets:
            # A real card's total is known to torch alone; ask before the first test.
            self._hook.start()
            import torch  # noqa: F401, PLC0415  # a budget was asked for
        elif self.choice.kind != "off":
            self._hook.start()
        if self.choice.kind == "simulated":
            self._nvml_hook.start()

    def _torch_imported(self) -> None:
        import torch  # noqa: PLC0415  # it has just been imported

        if self.choice.kind == "cuda" and not torch.cuda.is_available():
            if self.settings.backend == "cuda":
                raise pytest.UsageError(
                    "--gpu-backend=cuda: torch finds no usable CUDA card; use "
                    "--gpu-backend=auto or simulated"
                )
            self.choice = Choice("simulated", "torch cannot use the card")
        if self.choice.kind == "simulated":
            self._install()
        else:
            from pytest_gpumem.devices.active import active_device  # noqa: PLC0415

            self.device = active_device()
            totals = {
                index: self.device.mem_get_info(index)[1]
                for index in range(self.device.device_count)
            }
            check_budgets(self.settings, totals)
        self._apply_budgets()
        if self._phase is not None:
            self._open_trackers()

    def _nvml_imported(self) -> None:
        from pytest_gpumem.devices.nvml import SimulatedNvml  # noqa: PLC0415  # pynvml is here

        self._nvml = SimulatedNvml(sys.modules["pynvml"], self._machine)
        self._nvml.install()

    def _machine(self) -> Any:
        return self.require_device().machine  # type: ignore[attr-defined]  # only simulated runs ask

    def _install(self) -> None:
        from pytest_gpumem.devices.simulated.device import (  # noqa: PLC0415  # torch is here
            SimulatedDevice,
        )
        from pytest_gpumem.devices.simulated.install import Installation  # noqa: PLC0415
        from pytest_gpumem.devices.simulated.machine import (  # noqa: PLC0415
            SimulatedMachine,
        )

        machine = SimulatedMachine(self.settings.cards)
        self._installation = Installation(machine)
        self._installation.install()
        self.device = SimulatedDevice(machine)

    def require_device(self) -> Device:
        """Return the run's device; imports torch if nobody has.

        Raises:
            pytest.UsageError: The run has none (``--gpu-backend=off``).
        """
        if self.device is None and self.choice.kind != "off":
            import torch  # noqa: F401, PLC0415  # a test wants the device
        if self.device is None:
            raise pytest.UsageError(
                f"this test needs a GPU, but the backend is off: {self.choice.reason}"
            )
        return self.device

    def stop(self) -> None:
        """Put everything back."""
        self._hook.stop()
        self._nvml_hook.stop()
        if self._nvml is not None:
            self._nvml.remove()
            self._nvml = None
        if self.device is not None:
            for index in range(self.device.device_count):
                self.device.set_budget(index, None)
            self.device = None
        if self._installation is not None:
            self._installation.remove()
            self._installation = None

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Put everything back at the end of the run."""
        self.stop()

    # -- budgets ----------------------------------------------------------------------

    def _apply_budgets(self) -> None:
        """Give every card the budget of the running test, or of the run."""
        if self.device is None:
            return
        wanted = {
            budget.device_index: budget.size
            for budget in reversed(
                marks.read(self._item, "gpu_budget") if self._item is not None else []
            )
        }
        for index in range(self.device.device_count):
            total = self.device.mem_get_info(index)[1]
            budget = self.settings.budget_bytes(index, total)
            if index in wanted:
                budget = wanted[index].resolve(total)
            self.device.set_budget(index, budget)

    # -- one test ---------------------------------------------------------------------

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Check every marker's arguments; skip what needs a real card without one."""
        for item in items:
            marks.check(item)
            reason = self._why_not(item)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))

    def _why_not(self, item: pytest.Item) -> str | None:
        """Return why an item cannot run on this run's device; None if it can."""
        if self.choice.kind != "cuda" and item.get_closest_marker("gpu"):
            return f"needs a real CUDA card: {self.choice.reason}"
        if self.choice.kind == "off" and self._is_wanted(item):
            return f"needs a GPU, but gpumem's backend is off: {self.choice.reason}"
        return None

    def _is_wanted(self, item: pytest.Item) -> bool:
        names = ("gpu_budget", "max_vram", "inject_oom")
        return item.get_closest_marker("skip") is None and any(
            item.get_closest_marker(name) is not None for name in names
        )

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None]:
        """Set the test's budget and record the setup."""
        if self._is_wanted(item):
            self.require_device()
        self._item = item
        self._clean()
        self._apply_budgets()
        with self._recorded(item, "setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None]:
        """Run the test with its faults armed, then hold it to its limits."""
        with self._recorded(item, "call") as figures, ExitStack() as stack:
            watches = self._watch_limits(item, stack)
            injector = self._arm(item, stack)
            result = yield
            stack.close()
            self._check_injected(item, injector)
            for limit, limit_bytes, watch in watches:
                self._check_limit(limit, limit_bytes, watch, figures())
        return result

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None]:
        """Record the teardown, then put the run's own budget back."""
        try:
            with self._recorded(item, "teardown"):
                return (yield)
        finally:
            self._item = None
            self._apply_budgets()

    # -- peaks ------------------------------------------------------------------------

    def _open_trackers(self) -> None:
        assert self.device is not None, "unreachable: called once there is a device"  # noqa: S101
        self._trackers = [
            self.device.open_tracker(index) for index in range(self.device.device_count)
        ]

    @contextmanager
    def _recorded(self, item: pytest.Item, phase: str) -> Iterator[Any]:
        """Record a phase's peaks into the item's properties, if it used a card."""
        self._phase = phase
        requests = 0
        if self.device is not None:
            self._open_trackers()
            requests = self.device.num_requests
        try:
            yield lambda: [tracker.read() for tracker in self._trackers]
        finally:
            self._phase = None
            trackers, self._trackers = self._trackers, []
            figures = [tracker.close() for tracker in trackers]
            if self.device is not None and self.device.num_requests != requests:
                self._note(item, phase, figures)

    def _note(
        self, item: pytest.Item, phase: str, figures: list[MemoryFigures]
    ) -> None:
        for each in figures:
            if each.peak_reserved_bytes or each.num_ooms:
                item.user_properties.extend(to_properties(phase, each))

    def _watch_limits(
        self, item: pytest.Item, stack: ExitStack
    ) -> list[tuple[marks.Limit, int, Any]]:
        limits = marks.read(item, "max_vram")
        if not limits:
            return []
        from pytest_gpumem.instruments.recorder import LimitWatch  # noqa: PLC0415

        device = self.require_device()
        watches = []
        for limit in limits:
            total = device.mem_get_info(limit.device_index)[1]
            limit_bytes = limit.size.resolve(total)
            watch = LimitWatch(
                limit_bytes,
                metric=limit.metric,
                device_index=limit.device_index,
                device=device,
            )
            stack.enter_context(watch)
            watches.append((limit, limit_bytes, watch))
        return watches

    def _check_limit(
        self, limit: marks.Limit, limit_bytes: int, watch: Any, figures: list[Any]
    ) -> None:
        peak = figures[limit.device_index].peak(limit.metric)
        if peak <= limit_bytes:
            return
        start = figures[limit.device_index].start_allocated_bytes
        where = (
            f"first over the limit at {watch.site}"
            if watch.site
            else "in the test's call"
        )
        if start:
            where += f"; {format_size(start)} were allocated before the call began"
        pytest.fail(marks.over_limit(limit, limit_bytes, peak, where), pytrace=False)

    # -- faults -----------------------------------------------------------------------

    def _arm(self, item: pytest.Item, stack: ExitStack) -> Any:
        rules = [*marks.read(item, "inject_oom")]
        if not rules and (not self.settings.rules or self.device is None):
            return None
        from pytest_gpumem.instruments.injector import OomInjector  # noqa: PLC0415

        injector = OomInjector(
            *rules, *self.settings.rules, device=self.require_device()
        )
        return stack.enter_context(injector)

    def _check_injected(self, item: pytest.Item, injector: Any) -> None:
        """Fail a test whose own rule was never reached: it proved nothing."""
        if injector is None:
            return
        own = len(marks.read(item, "inject_oom"))
        for schedule in injector.schedules[own:]:
            text = str(schedule.rule)
            self._spent[text] = self._spent.get(text, 0) + schedule.num_failed
        for schedule in injector.schedules[:own]:
            if not schedule.num_failed:
                pytest.fail(
                    f"inject_oom {str(schedule.rule)!r} was never reached: the test "
                    f"made {schedule.num_counted} allocation(s) that it counts",
                    pytrace=False,
                )

    # -- between tests ------------------------------------------------------------------

    def _clean(self) -> None:
        """Give back what the test before left in caches, tracebacks and cycles."""
        device = self.device
        if device is None or device.num_requests == self._seen_requests:
            return
        last = getattr(sys, "last_value", None)
        if last is not None:
            # The frames of a failed test would hold its tensors on the card.
            clear_exception(last)
        if self._allocated() > self._held_bytes:
            gc.collect()
        device.empty_cache()
        self._seen_requests = device.num_requests
        self._held_bytes = self._allocated()

    def _allocated(self) -> int:
        assert self.device is not None, "unreachable: called once there is a device"  # noqa: S101
        return sum(
            self.device.memory_stats(index).get("allocated_bytes.all.current", 0)
            for index in range(self.device.device_count)
        )

    # -- words --------------------------------------------------------------------------

    def pytest_report_header(self) -> str:
        """Say which device, card and budget the run uses, and why."""
        return f"gpumem: {self.describe()}"

    def describe(self) -> str:
        """Return device, card, budget and why, on one line."""
        choice = self.choice
        parts = [f"backend {choice.kind} ({choice.reason})"]
        if choice.kind == "simulated":
            parts.append(describe_cards(self.settings))
        if choice.kind == "cuda" and self.device is not None:
            names = [self.device.name(i) for i in range(self.device.device_count)]
            parts.append(f"card {', '.join(names)}")
        if choice.kind != "off":
            budgets = self.settings.budgets
            texts = [
                spec.text if index is None else f"{index}={spec.text}"
                for index, spec in budgets.items()
            ]
            parts.append(f"budget {', '.join(texts) if texts else 'none'}")
        parts.extend(f"inject {rule}" for rule in self.settings.rules)
        return ", ".join(parts)

    @property
    def rule_counts(self) -> dict[str, int]:
        """How many allocations each rule of the command line has refused."""
        return dict(self._spent)


def describe_cards(settings: Settings) -> str:
    """Return the simulated cards' names and sizes."""
    first = settings.cards[0]
    many = f"{len(settings.cards)} x " if len(settings.cards) > 1 else ""
    major, minor = first.compute_capability
    return (
        f"card {many}{first.name} {format_size(first.total_bytes)} cc {major}.{minor}"
    )
