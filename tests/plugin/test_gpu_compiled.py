"""The option ``--gpu-compiled``, through pytest."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported

PROGRAM = """
    from pytest_gpumem.devices.simulated.machine import current_machine

    def test_it():
        assert {!r} == current_machine().compiled
"""


@pytest.mark.parametrize(
    ("options", "way"),
    [((), "eager"), (("--gpu-compiled=refused",), "refused")],
)
def test_the_option_reaches_the_cards(
    pytester: pytest.Pytester, options: tuple[str, ...], way: str
) -> None:
    """What is to be compiled runs as it is, unless it is to be refused."""
    pytester.makepyfile(PROGRAM.format(way))
    result = pytester.runpytest("--gpu-backend=simulated", *options)

    result.assert_outcomes(passed=1)
