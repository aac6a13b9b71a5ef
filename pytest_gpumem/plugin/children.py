"""Passes the run's settings to child processes, and the children's peaks to the tests."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import site
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_gpumem.files import IS_POSIX
from pytest_gpumem.inheritance import (
    CHILDREN_VARIABLE,
    EVERY_CARD,
    PYTHON_VARIABLE,
    Inheritance,
    present_tenants,
)
from pytest_gpumem.plugin.record_keeping import record_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pytest

    from pytest_gpumem.children.notes import ChildFigures
    from pytest_gpumem.devices import Device
    from pytest_gpumem.plugin.marks import Budget
    from pytest_gpumem.plugin.settings import Settings
    from pytest_gpumem.records.memory_figures import MemoryFigures
    from pytest_gpumem.rules.rule import Rule

#: The name of the phase that has the figures of children in a record.
PHASE: Final = "children"

PTH: Final = "pytest_gpumem_child.pth"
_SHIM: Final = Path(__file__).parents[1] / "children" / "shim"
_NVIDIA_SMI: Final = Path(__file__).parents[1] / "nvidia_smi" / "bin"


class Children:
    """The child processes of one process that runs tests.

    Args:
        settings: The run's options.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._pid: Final = os.getpid()
        # The first child that uses a card makes this folder; most runs have none.
        name = f"gpumem-{os.getpid()}-{secrets.token_hex(8)}"
        self._folder: Final = os.path.join(tempfile.gettempdir(), name)  # noqa: PTH118  # the environment needs text
        self._saved: dict[str, str | None] = {}
        self._seen: Final[dict[Path, int]] = {}
        self._forks: Any = None
        self._given: Inheritance | None = None
        self._text = ""
        #: The injector of the running test; forked children have a copy of it.
        self.injector: Any = None

    # -- what they take over ----------------------------------------------------------

    def start(self, backend: str, *, shared: str = "") -> None:
        """Pass settings to children that start from here on, unless an option forbids it.

        Args:
            backend: The run's backend.
            shared: The folder of the processes that share simulated cards.
        """
        if not self._settings.reaches_children or backend == "off":
            self._set(CHILDREN_VARIABLE, None)
            return
        self._given = Inheritance(
            backend=backend,
            folder=self._folder,
            options=self._settings.inherited,
            budgets={
                EVERY_CARD if index is None else str(index): spec.text
                for index, spec in self._settings.budgets.items()
            },
            visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
            shared=shared,
        )
        self._text = self._given.text
        self._set(CHILDREN_VARIABLE, self._text)
        paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        if str(_SHIM) not in paths and not _is_installed():
            self._set("PYTHONPATH", os.pathsep.join(filter(None, [str(_SHIM), *paths])))
        if backend == "simulated" and IS_POSIX:
            folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
            others = [each for each in folders if each != str(_NVIDIA_SMI)]
            self._set("PATH", os.pathsep.join([str(_NVIDIA_SMI), *others]))
            self._set(PYTHON_VARIABLE, sys.executable)

    def device_came(self, device: Device) -> None:
        """Watch children that are forked from here on."""
        if self._given is None or self._forks is not None:
            return
        from pytest_gpumem.children.watch import ForkedChildren, Watch

        def make() -> Watch:
            indices = range(device.device_count)
            return Watch(device, self._folder, indices, self._failed_counts)

        if os.getpid() != self._pid:
            make().start()  # this is a child, forked before torch was first used
        self._forks = ForkedChildren(make)
        self._forks.start()

    def stop(self) -> None:
        """Restore the environment; forget all figures."""
        for name, value in self._saved.items():
            _put(name, value)
        self._saved = {}
        if self._forks is not None:
            self._forks.stop()
            self._forks = None
        if self._given is not None:
            self._given = None
            shutil.rmtree(self._folder, ignore_errors=True)

    def pass_on(
        self, own: Sequence[Budget], caps: Mapping[str, str], rules: Sequence[Rule]
    ) -> None:
        """Pass a test's own budgets on to children, and its rules while its call runs.

        Args:
            own: The test's budgets, the nearest first.
            caps: Other budgets of the cards, in the form of ``Inheritance.budgets``.
            rules: The rules in force.
        """
        if self._given is None:
            return
        text = self._text
        tenants = present_tenants()
        if own or rules or caps or tenants:
            own_sizes = {str(each.device_index): each.size.text for each in own[::-1]}
            given = self._given._replace(
                budgets={**self._given.budgets, **own_sizes, **caps},
                rules=tuple(str(rule) for rule in rules),
                tenants=tenants,
            )
            text = given.text
        if os.environ.get(CHILDREN_VARIABLE) != text:
            os.environ[CHILDREN_VARIABLE] = text

    def _failed_counts(self) -> list[int]:
        schedules = [] if self.injector is None else self.injector.schedules
        return [each.num_failed for each in schedules]

    def _set(self, name: str, value: str | None) -> None:
        self._saved.setdefault(name, os.environ.get(name))
        _put(name, value)

    # -- what comes back --------------------------------------------------------------

    def new_figures(self) -> list[ChildFigures]:
        """Return the figures that children have written since the last test ended."""
        if self._given is None or not os.path.exists(self._folder):  # noqa: PTH110  # called for every test, so without pathlib
            return []
        from pytest_gpumem.children.notes import read_notes

        return [
            child
            for child in read_notes(Path(self._folder))
            if self._seen.get(child.path) != child.num_requests
        ]

    def failed_counts(self, count: int) -> list[int]:
        """Return how many allocations each rule failed in children, in the rules' order."""
        counts = [child.failed_counts for child in self.new_figures()]
        # Notes have room for the counts of a fixed number of rules; further counts are
        # unknown.
        return [
            sum(sum(each[index : index + 1]) for each in counts)
            for index in range(count)
        ]

    @staticmethod
    def together(children: Sequence[ChildFigures]) -> list[MemoryFigures]:
        """Combine the figures of several children, by card."""
        if not children:
            return []
        from pytest_gpumem.children.notes import together

        return together(children)

    def end_test(self, item: pytest.Item) -> None:
        """Put children's figures into a test's record when the test ends."""
        children = self.new_figures()
        if not children:
            return
        from pytest_gpumem.records.record import PhaseFigures

        record = record_of(item)
        if not record.environment:
            record.environment, record.host = children[0].environment, platform.node()
        record.children = len(children)
        together = self.together(children)
        record.figures += [PhaseFigures.of(PHASE, each) for each in together]
        for child in children:
            self._seen[child.path] = child.num_requests
            if not _is_alive(child.pid):
                child.path.unlink(missing_ok=True)
                del self._seen[child.path]


def _put(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _is_installed() -> bool:
    """Tell whether this Python has the ``.pth`` file that starts children."""
    folders = [*site.getsitepackages(), site.getusersitepackages()]
    return any(os.path.exists(os.path.join(each, PTH)) for each in folders)  # noqa: PTH110, PTH118  # called in every run, so without pathlib


def _is_alive(pid: int) -> bool:
    if not IS_POSIX:
        return (
            True  # Windows has no signal 0; the note is removed with the run's folder
        )
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
