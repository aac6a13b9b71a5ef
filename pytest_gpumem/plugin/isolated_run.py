"""Runs one test in a process of its own: see Note [A fresh process for a test].

It is run as a script, whose argument is a JSON file with an object:

- ``nodeid``: the test, by the name that its reports have, and ``path``: its file;
- ``arguments``: the command line of the run;
- ``sys_path``: where modules are found;
- ``options``: options that differ from the run's, by their names in pytest;
- ``workers``: the number of the run's workers of pytest-xdist;
- ``reports``: the file for the reports, each a line of JSON; see ``plain``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable


class OneTest:
    """Collects one test, and writes its reports to a file.

    Args:
        request: The test, and the file for the reports.
    """

    def __init__(self, request: dict[str, Any]) -> None:
        self._request: Final = request
        self._nodeid: Final = request["nodeid"]
        self._path: Final = Path(request["path"])
        #: Functions that return the notes that follow the reports, by name.
        self.notes: dict[str, Callable[[], Any]] = {}
        self._reports: Final = Path(request["reports"])
        self._config: Any = None

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> None:
        """Set the options of this process, before anything is configured by them."""
        # Imported here, after pytest has imported the package as a plugin.
        from pytest_gpumem.plugin.isolated import ISOLATION, Isolation

        for name, value in self._request["options"].items():
            setattr(config.option, name, value)
        config.stash[ISOLATION] = isolation = Isolation(self._request["workers"])
        self.notes = isolation.notes
        config.pluginmanager.set_blocked("terminalreporter")
        self._config = config

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Leave out all files but the test's."""
        is_needed = collection_path in (self._path, *self._path.parents)
        return None if is_needed or collection_path.name == "__init__.py" else True

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep only the test.

        Raises:
            pytest.UsageError: The test was not collected.
        """
        # With --dist=loadgroup a worker of pytest-xdist adds the group to the name.
        names = (self._nodeid, self._nodeid.rpartition("@")[0])
        found = [each for each in items if each.nodeid in names]
        if not found:
            raise pytest.UsageError(
                f"{self._nodeid} was not collected in the process of its own; its name "
                "must not change from run to run"
            )
        found[0]._nodeid = self._nodeid  # type: ignore[attr-defined]  # noqa: SLF001  # as pytest-xdist sets it
        items[:] = found[:1]

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send a report."""
        hook = self._config.hook
        data = hook.pytest_report_to_serializable(config=self._config, report=report)
        self._send(data)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Send the notes."""
        self._send({name: note() for name, note in self.notes.items()})

    def _send(self, data: Any) -> None:
        with self._reports.open("a", encoding="ascii") as file:
            file.write(f"{json.dumps(plain(data))}\n")


def plain(value: Any) -> Any:
    """Return a report's value for JSON: a tuple becomes an object with the key ``()``.

    Other types that JSON lacks become text.
    """
    if isinstance(value, tuple):
        return {"()": [plain(each) for each in value]}
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    is_known = value is None or isinstance(value, (str, bool, int, float))
    return value if is_known else str(value)


def main(file: str) -> int:
    """Run the test of a request, and return pytest's exit code."""
    request: dict[str, Any] = json.loads(Path(file).read_text("utf-8"))
    sys.path[:] = request["sys_path"]
    return int(pytest.main(request["arguments"], [OneTest(request)]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[2]))
