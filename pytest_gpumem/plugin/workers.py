"""Gives the workers of pytest-xdist their positions and the tests that used no card."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any, Final

import pytest

from pytest_gpumem.inheritance import remove_run, run_folder
from pytest_gpumem.plugin.sharing import WORKER_VARIABLE, WorkerPosition

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_gpumem.plugin.cardless_tests import CardlessTests

#: The key, in a worker's input, of the names of tests that used no card before.
IDLE_INPUT: Final = "gpumem_idle"
#: The key, in a worker's output, of the notes that it sends when it ends.
_OUTPUT: Final = "gpumem"


class WorkerNotes:
    """The notes that a worker of pytest-xdist sends to the controller when it ends.

    Args:
        config: The worker's config.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config: Final = config
        #: Functions that return the parts of the notes, by name.
        self.parts: Final[dict[str, Callable[[], Any]]] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Put the notes into the output that xdist sends."""
        output: dict[str, Any] = self._config.workeroutput  # type: ignore[attr-defined]  # xdist sets it
        output[_OUTPUT] = {name: part() for name, part in self.parts.items()}


def notes_of(node: Any) -> dict[str, Any]:
    """Return a worker's notes, by name; empty for a worker that crashed."""
    told: dict[str, Any] = getattr(node, "workeroutput", {}).get(_OUTPUT, {})
    return told


class Workers:
    """Gives each worker its position among those of its machine.

    Args:
        history: The tests that used no card before.
        share: How the workers share cards; a value of ``--gpu-share``.
    """

    def __init__(self, history: CardlessTests, share: str) -> None:
        self._history: Final = history
        self._share: Final = {
            "equal": "an equal share each, or what a test says it needs",
            "off": "no test waits for another",
        }[share]
        self._run: Final = secrets.token_hex(8)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        """Number the workers of each machine; execnet sets the variable in each worker."""
        machines: dict[str, list[Any]] = {}
        for spec in specs:
            host = spec.ssh or spec.socket or spec.via or spec.vagrant_ssh or ""
            machines.setdefault(str(host), []).append(spec)
        for workers in machines.values():
            for position, spec in enumerate(workers):
                worker = WorkerPosition(position, len(workers), self._run)
                spec.env[WORKER_VARIABLE] = worker.text

    def pytest_report_header(self, config: pytest.Config) -> str:
        """Print that the cards are shared."""
        count = len(config.getoption("tx"))
        return f"gpumem: {count} workers share each machine's cards ({self._share})"

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Send the names of tests that used no card before to a worker."""
        node.workerinput[IDLE_INPUT] = json.dumps(sorted(self._history.idle))

    def pytest_unconfigure(self) -> None:
        """Remove the files that this machine's workers wrote for each other."""
        remove_run(run_folder(self._run))
