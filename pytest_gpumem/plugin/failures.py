"""Frees the objects in the frames of failed phases, once the phases are reported."""

from __future__ import annotations

from typing import Final

import pytest


class Failures:
    """Shortens the tracebacks of failed phases, and frees the tensors in their frames.

    pytest keeps the exception of a failed call in ``sys.last_value``, and the exception of
    a fixture with the fixture; other plugins may keep further exceptions. This class gets
    the exception when the phase's report is made. It clears the frames when the next phase
    begins, because by then every plugin, and a debugger, has seen them.
    """

    def __init__(self) -> None:
        self._reported: Final[list[BaseException]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """Note the exception of a phase: a failure, a skip or an expected failure.

        Its traceback ends at the line that called the simulated card.
        """
        if call.excinfo is not None:
            from pytest_gpumem.plugin.own_frames import hide

            hide(call.excinfo.value)
            self._reported.append(call.excinfo.value)

    def release(self) -> None:
        """Clear the frames of the exceptions that were reported."""
        if not self._reported:
            return
        from pytest_gpumem.stacks import clear_exception

        while self._reported:
            clear_exception(self._reported.pop())
