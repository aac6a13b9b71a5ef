"""Applies the settings of a run to a child process of the run.

Importing this module is fast: it does not import torch, but waits until the program does.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.devices.nvml_hook import NvmlHook
from pytest_gpumem.devices.on_import import AfterImport
from pytest_gpumem.inheritance import (
    CHILDREN_VARIABLE,
    EVERY_CARD,
    HUB_VARIABLE,
    Inheritance,
)
from pytest_gpumem.visibility import VISIBLE_VARIABLE

if TYPE_CHECKING:
    from pytest_gpumem.devices import Device

_active: Final[list[Child]] = []
#: Waits for the import of huggingface_hub, if the parent's run serves models.
_hub: Final[list[AfterImport]] = []
#: Values of the variable that could not be read, each reported once. Python may run the
#: line at its start twice.
_broken: Final[set[str]] = set()


def activate() -> None:
    """Apply the environment's settings as soon as torch is imported; never raise."""
    if os.environ.get(HUB_VARIABLE) and not _hub:
        _hub.append(AfterImport("huggingface_hub", _inherit_hub))
        _hub[0].start()
    text = os.environ.get(CHILDREN_VARIABLE)
    if not text or _active or text in _broken:
        return
    try:
        child = Child(Inheritance.parse(text))
    except ValueError as error:
        _broken.add(text)
        sys.stderr.write(f"pytest-gpumem: {error}\n")
        return
    _active.append(child)
    child.start()


def withdraw() -> None:
    """Undo ``activate``, because this process has a run of its own."""
    while _active:
        _active.pop().stop()
    while _hub:
        _hub.pop().stop()
        service = sys.modules.get("pytest_gpumem.hub.service")
        if service is not None:
            service.withdraw()


def _inherit_hub() -> None:
    from pytest_gpumem.hub.service import inherit

    try:
        inherit()
    except ValueError as error:
        sys.stderr.write(f"pytest-gpumem: {error}\n")


class Child:
    """The changes that a run makes in this process.

    Args:
        inheritance: The run's settings.
    """

    def __init__(self, inheritance: Inheritance) -> None:
        self._given: Final = inheritance
        self._hook = AfterImport("torch", self._torch_imported)
        self._nvml = NvmlHook(self._machine)
        self._installation: Any = None
        self._device: Device | None = None
        self._injector: Any = None
        self._watch: Any = None
        self._forks: Any = None

    def start(self) -> None:
        """Wait for torch."""
        self._hook.start()
        if self._given.backend == "simulated":
            self._nvml.start()

    def stop(self) -> None:
        """Restore everything."""
        self._hook.stop()
        self._nvml.stop()
        for each in (self._forks, self._watch):
            if each is not None:
                each.stop()
        if self._injector is not None:
            self._injector.__exit__(None, None, None)
        if self._device is not None:
            for index in range(self._device.device_count):
                self._device.set_budget(index, None)
            self._device = None
        if self._installation is not None:
            self._installation.remove()
            self._installation = None

    def _machine(self) -> Any:
        if self._installation is None:
            import torch  # noqa: F401  # NVML needs the cards, which exist after this import
        return self._installation.machine

    def _torch_imported(self) -> None:
        if self._given.backend == "simulated":
            self._device = self._simulated()
        else:
            import torch

            if not torch.cuda.device_count():
                return  # the program has hidden the cards from this process
            from pytest_gpumem.devices.active import active_device

            self._device = active_device()
        device = self._device
        indices = self._indices(device)
        if device.kind == "simulated":
            self._set_budgets(device, indices)
            self._add_tenants()
            self._installation.machine.on_change.append(self._cards_changed)
        elif self._given.budgets:
            # Setting a budget creates the card's context, so it waits for the program.
            import torch

            torch.cuda._lazy_call(lambda: self._set_budgets(device, indices))  # noqa: SLF001  # torch's own libraries use it, too
        if self._given.rules:
            from pytest_gpumem.instruments.injector import OomInjector

            self._injector = OomInjector(*self._given.rules, device=device)
            self._injector.__enter__()
        self._start_watch(device, indices)

    def _indices(self, device: Device) -> list[int]:
        """Return the run's index of each card that this process sees."""
        count = device.device_count
        if device.kind != "simulated":
            return self._given.indices_here(os.environ.get(VISIBLE_VARIABLE), count)
        machine = self._installation.machine
        theirs = self._given.seen_of(machine.uuids)
        return [
            theirs.index(card.number) if card.number in theirs else index
            for index, card in enumerate(machine.cards)
        ]

    def _cards_changed(self) -> None:
        """Change to the cards that the process has chosen since torch was imported."""
        device = self._device
        if device is None or self._watch is None:
            return
        for card in self._installation.machine.all_cards:
            card.set_budget(None)
        indices = self._indices(device)
        self._set_budgets(device, indices)
        self._watch.stop()
        self._forks.stop()
        self._start_watch(device, indices)

    def _simulated(self) -> Device:
        from pytest_gpumem.cards import DEFAULT_CARD, find_card
        from pytest_gpumem.devices.simulated.device import SimulatedDevice
        from pytest_gpumem.devices.simulated.install import Installation
        from pytest_gpumem.devices.simulated.machine import SimulatedMachine

        options = self._given.options
        every = find_card(options.get("card", DEFAULT_CARD))
        machine = SimulatedMachine(
            every,
            values=options.get("values", "computed"),
            compiled=options.get("compiled", "eager"),
        )
        if self._given.shared:
            from pytest_gpumem.tenancy.shared_card import join_cards

            join_cards(machine.all_cards, self._given.shared)
        self._installation = Installation(machine)
        self._installation.install()
        return SimulatedDevice(machine)

    def _add_tenants(self) -> None:
        """Put the run's simulated processes on all cards, also on those not visible here."""
        if not self._given.tenants:
            return
        from pytest_gpumem.allocator.tenant import FixedTenant

        machine = self._installation.machine
        cards = machine.all_cards
        for index, number in enumerate(self._given.seen_of(machine.uuids)):
            for pid, nbytes in self._given.tenants.get(str(index), {}).items():
                cards[number].driver.tenants.append(FixedTenant(int(pid), nbytes))

    def _set_budgets(self, device: Device, indices: list[int]) -> None:
        from pytest_gpumem.sizes import parse_size

        budgets = self._given.budgets
        for here, there in enumerate(indices):
            text = budgets.get(str(there), budgets.get(EVERY_CARD))
            if text is not None:
                total = device.total_bytes(here)
                device.set_budget(here, parse_size(text, of=total))

    def _start_watch(self, device: Device, indices: list[int]) -> None:
        from pytest_gpumem.children.watch import ForkedChildren, Watch

        def make() -> Watch:
            return Watch(device, self._given.folder, indices, self._failed_counts)

        def forked() -> Any:
            self._watch.stop()  # the watch and its file belong to the parent
            self._watch = make()
            return self._watch

        self._watch = make()
        self._watch.start()
        self._forks = ForkedChildren(forked)
        self._forks.start()

    def _failed_counts(self) -> list[int]:
        if self._injector is None:
            return []
        return [each.num_failed for each in self._injector.schedules]
