"""Sets up the device of one run of pytest, and restores everything at its end."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final, TypeVar

import pytest

from pytest_gpumem.devices.environment import environment_of
from pytest_gpumem.devices.nvml_hook import NvmlHook
from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.devices.selection import Choice, choose
from pytest_gpumem.errors import AllocatorSettingError, DeviceUnavailableError
from pytest_gpumem.plugin.children import Children
from pytest_gpumem.plugin.settings import DEFAULT_CARD, Settings, check_budgets
from pytest_gpumem.plugin.sharing import Sharing, take_position
from pytest_gpumem.visibility import uuid_of, visible_numbers, why_hidden

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.devices import Device
    from pytest_gpumem.instruments.timeline import Timeline
    from pytest_gpumem.instruments.witness import OomWitness
    from pytest_gpumem.plugin import marks
    from pytest_gpumem.plugin.endings import Endings
    from pytest_gpumem.plugin.gate import Gate
    from pytest_gpumem.plugin.growth import Growth
    from pytest_gpumem.rules.rule import Rule


_T = TypeVar("_T")

#: The variables of ``allocator/versions.py``, copied here so that most runs need not
#: import it.
ALLOCATOR_VARIABLES: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
#: Whatever its value, ``import torch`` starts CUDA's stream sanitizer (``torch/__init__.py``).
_SANITIZER: Final = "TORCH_CUDA_SANITIZER"


class Run:
    """A run's device, its budgets, and the lines that describe them.

    Args:
        settings: The run's options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings: Final = settings
        _withdraw()
        try:
            self.choice: Choice = choose(settings.backend)
        except DeviceUnavailableError as error:
            raise pytest.UsageError(f"--gpu-backend: {error}") from None
        #: The cards that this process shares with others that run tests.
        self.sharing: Final = Sharing(settings, take_position())
        self.device: Device | None = None
        #: Restores everything at the end, in reverse order; see ``stop``.
        self._stack: Final = ExitStack()
        self._hook = AfterImport("torch", self._torch_imported)
        self._nvml = NvmlHook(self._machine)
        #: The baseline with which tests are compared, or None.
        self.gate: Gate | None = None
        #: Measures the bytes that each test adds, if a baseline or a report needs them.
        self.growth: Growth | None = None
        #: Collects reasons, other than failed tests, for which the run fails; None in a
        #: worker.
        self.endings: Endings | None = None
        self._environment: str | None = None
        #: Describes the moments at which memory runs out, once there is a device.
        self.witness: OomWitness | None = None
        self._own: Sequence[marks.Budget] = ()
        self.children: Final = Children(settings)
        #: Records the running test's timeline, if a report shows it.
        self.timeline: Timeline | None = None
        #: Called when the device is created in the middle of a test.
        self.on_device: Callable[[], None] = lambda: None
        if self.choice.kind == "simulated":
            _check_environment()
        totals = self.totals() if settings.budgets else None
        if totals:  # the totals may be unknown, or this process may see no card
            check_budgets(settings, dict(enumerate(totals)))

    def totals(self) -> tuple[int, ...] | None:
        """Return the cards' total bytes; None if only torch knows them."""
        if self.choice.kind == "simulated":
            return tuple(card.total_bytes for card in self.settings.cards)
        if self.device is None:
            return None
        device = self.device
        return tuple(device.total_bytes(i) for i in range(device.device_count))

    # -- the device -------------------------------------------------------------------

    def start(self) -> None:
        """Set up the device before any code can use torch."""
        self._stack.callback(self.sharing.stop)
        self.sharing.spread(self.choice.kind)
        self._stack.callback(self.children.stop)
        self.children.start(self.choice.kind, shared=self.sharing.folder)
        self._stack.callback(self._nvml.stop)
        self._stack.callback(self._hook.stop)
        if self.choice.kind == "cuda" and self.settings.budgets:
            # Only torch knows the total of a real card, so it is imported before the tests.
            self._hook.start()
            import torch  # noqa: F401  # its import creates the device
        elif self.choice.kind != "off":
            self._hook.start()
        if self.choice.kind == "simulated":
            self._nvml.start()

    def _torch_imported(self) -> None:
        import torch

        # device_count does not initialise CUDA; see Note [When the variable is read] in
        # visibility.py.
        if self.choice.kind == "cuda" and not torch.cuda.device_count():
            if self.settings.backend == "cuda":
                raise pytest.UsageError(
                    "--gpu-backend=cuda: torch finds no usable CUDA card; use "
                    "--gpu-backend=auto or simulated"
                )
            self.choice = Choice("simulated", "torch cannot use the card")
            self.sharing.stop()
            self.sharing.spread("simulated")
            self.children.start("simulated", shared=self.sharing.folder)
        if self.choice.kind == "simulated":
            self._install()
        else:
            from pytest_gpumem.devices.active import active_device

            self.device = active_device()
            if self.settings.budgets:
                check_budgets(self.settings, dict(enumerate(self.totals() or ())))
        self._stack.callback(self._lift_budgets, self.any_device())
        self.apply_budgets(())
        self.children.device_came(self.any_device())
        self.on_device()

    def environment(self) -> str:
        """Return the key of this run's figures in a baseline; the device must exist.

        It is not a property, because some versions of pytest read every property of a plugin.
        """
        if self._environment is None:
            self._environment = environment_of(self.any_device())
        return self._environment

    def _machine(self) -> Any:
        return self.any_device().machine  # type: ignore[attr-defined]  # called in simulated runs only

    def _install(self) -> None:
        from pytest_gpumem.devices.simulated.device import (
            SimulatedDevice,
        )
        from pytest_gpumem.devices.simulated.install import Installation
        from pytest_gpumem.devices.simulated.machine import (
            SimulatedMachine,
        )

        every = self.settings.all_cards
        machine = SimulatedMachine(
            every, values=self.settings.values, compiled=self.settings.compiled
        )
        machine.on_change.append(self._cards_changed)
        self.sharing.join_cards(machine)
        installation = Installation(machine)
        installation.install()
        self._stack.callback(installation.remove)
        self.device = SimulatedDevice(machine)

    def _cards_changed(self) -> None:
        """Apply a test's budgets to the cards that it has just made visible."""
        if self.device is not None:
            for card in self._machine().all_cards:
                card.set_budget(None, owner=self)
            self.apply_budgets(self._own)

    def require_device(self) -> Device:
        """Return the run's device, with at least one card; import torch if necessary.

        Raises:
            pytest.UsageError: The run has no device, or this process sees no card.
        """
        device = self.any_device()
        if not device.device_count:
            is_simulated = device.kind == "simulated"
            hidden = self._machine().why_none if is_simulated else why_hidden()
            raise pytest.UsageError(f"this test needs a GPU, but {hidden}")
        return device

    def any_device(self) -> Device:
        """Return the run's device, also if this process sees no card.

        Raises:
            pytest.UsageError: The run has no device (``--gpu-backend=off``).
        """
        if self.device is None and self.choice.kind != "off":
            import torch  # noqa: F401  # its import creates the device
        if self.device is None:
            raise pytest.UsageError(
                f"this test needs a GPU, but the backend is off: {self.choice.reason}"
            )
        return self.device

    def enter(self, block: AbstractContextManager[_T]) -> _T:
        """Enter a block that lasts until the run ends."""
        return self._stack.enter_context(block)

    def stop(self) -> None:
        """Restore everything, even if restoring a part of it fails; safe to call twice."""
        timeline, self.timeline = self.timeline, None
        if timeline is not None:  # a test was interrupted
            self._stack.push(timeline)
        self.device = self.witness = None
        self._stack.close()

    def _lift_budgets(self, device: Device) -> None:
        for index in range(device.device_count):
            device.set_budget(index, None, owner=self)
        device.restore()

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Restore everything at the end of the run."""
        self.stop()

    # -- budgets ----------------------------------------------------------------------

    def apply_budgets(self, own: Sequence[marks.Budget]) -> None:
        """Set each card's budget: the test's own budget, or else the run's.

        Without both, and if workers share the card, the budget is this worker's share.

        Args:
            own: The test's budgets, the nearest first.
        """
        self._own = own
        for index in range(0 if self.device is None else self.device.device_count):
            device = self.any_device()
            budget = self._said_bytes(device, index, own)
            if budget is None:
                budget = self.sharing.cap_bytes(device, index)
            device.set_budget(index, budget, owner=self)
        self.pass_on(own)

    def _said_bytes(
        self, device: Device, index: int, own: Sequence[marks.Budget]
    ) -> int | None:
        """Return a card's budget from the test or the run; None if there is none."""
        if not own and not self.settings.budgets:
            return None  # reading a real card's total would initialise CUDA
        return self.settings.budget_bytes(index, device.total_bytes(index), own)

    def pass_on(self, own: Sequence[marks.Budget], rules: Sequence[Rule] = ()) -> None:
        """Pass the present budgets and rules on to children that start from here on.

        Args:
            own: The test's budgets, the nearest first.
            rules: The rules in force.
        """
        caps = {}
        for index in range(0 if self.device is None else self.device.device_count):
            device = self.any_device()
            said = self._said_bytes(device, index, own)
            in_force = device.budget(index)
            if in_force is not None and in_force != said:
                # It may be a share, or a budget of a fixture, a block or a trial.
                caps[str(index)] = str(in_force)
        self.children.pass_on(own, caps, rules)

    # -- words --------------------------------------------------------------------------

    def pytest_report_header(self) -> str:
        """Print which device, card and budget the run uses, and why."""
        return f"gpumem: {self.describe()}"

    def describe(self) -> str:
        """Return device, card, budget and the reason for them, on one line."""
        choice = self.choice
        parts = [f"backend {choice.kind} ({choice.reason})"]
        if choice.kind == "simulated":
            parts.append(describe_cards(self.settings))
            if self.settings.values == "none":
                parts.append("no values kept")
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


def _withdraw() -> None:
    """Undo the settings of another run, if this process is a child of it."""
    child = sys.modules.get("pytest_gpumem.children.child")
    if child is not None:
        child.withdraw()


def _check_environment() -> None:
    """Reject settings of torch that the simulated device cannot follow.

    Raises:
        pytest.UsageError: The environment has such settings.
    """
    if _SANITIZER in os.environ:
        raise pytest.UsageError(
            f"{_SANITIZER} is in the environment, and torch then watches the kernels of a "
            "real card; unset it, or run with --gpu-backend=cuda on a machine with one"
        )
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        return
    from pytest_gpumem.allocator.config import config_from_environment

    try:
        config_from_environment()
    except AllocatorSettingError as error:
        raise pytest.UsageError(str(error)) from None


def describe_cards(settings: Settings) -> str:
    """Return the simulated cards' names and sizes; for the default card only its name."""
    if settings.card == DEFAULT_CARD and not settings.budgets:
        if not visible_numbers([uuid_of(0)]):
            return f"no card is seen, as {why_hidden()}"
        return f"card {DEFAULT_CARD} (the default)"
    from pytest_gpumem.sizes import format_size

    if not settings.cards:
        return f"no card is seen, as {why_hidden()}"
    first = settings.cards[0]
    many = f"{len(settings.cards)} x " if len(settings.cards) > 1 else ""
    major, minor = first.compute_capability
    return (
        f"card {many}{first.name} {format_size(first.total_bytes)} cc {major}.{minor}"
    )
