"""The option ``--gpu-compiled``, through pytest."""

from __future__ import annotations

import pytest
import torch  # noqa: F401  # inner runs in this process must find it imported

PROGRAM = """
    import torch

    def test_it():
        compiled = torch.compile(lambda x: x + 1, mode="reduce-overhead")
        assert [2.0, 2.0] == compiled(torch.ones(2, device="cuda")).tolist()
"""


@pytest.mark.parametrize(
    ("options", "outcome", "words"),
    [
        ((), "passed", "*RunsEagerlyWarning: torch.compile: no kernels can be made*"),
        (("--gpu-compiled=refused",), "failed", "*run with --gpu-compiled=eager*"),
    ],
)
def test_kernels_are_made_of_nothing(
    pytester: pytest.Pytester, options: tuple[str, ...], outcome: str, words: str
) -> None:
    """Compiled code runs as it is, with a warning, unless it is to be refused."""
    pytester.makepyfile(PROGRAM)
    result = pytester.runpytest("--gpu-backend=simulated", "-Wdefault", *options)

    result.assert_outcomes(**{outcome: 1})
    result.stdout.fnmatch_lines([words])
