"""Failed phases hold nothing once they are reported."""

from __future__ import annotations

from typing import Final

import pytest

from pytest_gpumem.stacks import clear_exception


class Failures:
    """Lets go of what the frames of failed phases hold on a card.

    pytest keeps the exception of a failed call in ``sys.last_value``, that of a fixture
    with the fixture, and other plugins keep what they like. Each phase's is known where
    its report is made; its frames are cleared when the next phase begins, which is after
    everybody, a debugger too, has looked at them.
    """

    def __init__(self) -> None:
        self._reported: Final[list[BaseException]] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> None:
        """Note what a phase has raised, be it a failure, a skip or expected."""
        if call.excinfo is not None:
            self._reported.append(call.excinfo.value)

    def release(self) -> None:
        """Clear the frames of what was reported."""
        while self._reported:
            clear_exception(self._reported.pop())
