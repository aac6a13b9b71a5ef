"""The tracebacks of failed tests: they end where a card's would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  # inner runs in this process must find it imported

from pytest_gpumem.devices.simulated.card import SimulatedCard

if TYPE_CHECKING:
    import pytest

pytest_plugins = ["pytester"]

SUITE = """
import pytest
import torch

def on_card(*shape, **options):
    return torch.ones(*shape, device="cuda", **options)

def test_shapes():
    on_card(2, 4) @ on_card(2, 4)

def test_devices():
    on_card(4) + torch.ones(4)

def test_types():
    torch.nn.functional.layer_norm(on_card(4), (4,), on_card(4, dtype=torch.float16))

def test_unsupported():
    on_card(2, 2).to_sparse()

def test_out_of_memory():
    torch.empty(2**40, device="cuda")

class Halves(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x + torch.ones(3, device="cuda")

    @staticmethod
    def backward(context, gradient):
        return gradient

def test_through_a_function():
    Halves.apply(on_card(2))

def test_while_another_is_handled():
    try:
        on_card(4) + torch.ones(4)
    except RuntimeError:
        on_card(3) + torch.ones(3)

@pytest.fixture
def broken():
    return on_card(2) @ on_card(3)

def test_fixture(broken):
    pass
"""


def test_a_traceback_ends_at_the_line_that_called_the_card(
    pytester: pytest.Pytester,
) -> None:
    """As on a card; all frames are there if they are asked for."""
    pytester.makepyfile(SUITE)
    given = ("-p", "no:cacheprovider", "--gpu-backend=simulated", "--tb=short")

    short = pytester.runpytest(*given)
    full = pytester.runpytest(*given, "--full-trace")

    short.assert_outcomes(failed=7, errors=1)
    assert "pytest_gpumem/devices" not in short.stdout.str().replace("\\", "/")
    short.stdout.fnmatch_lines(["test_*.py:*: in forward"])
    assert "pytest_gpumem/devices" in full.stdout.str().replace("\\", "/")


def test_a_mistake_of_the_simulated_card_is_shown(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its frames, for the report of it."""

    def fails(*_arguments: Any, **_options: Any) -> None:
        raise KeyError("no such block")

    pytester.makepyfile(
        "import torch\n\ndef test_it():\n    torch.ones(2, device='cuda')\n"
    )
    monkeypatch.setattr(SimulatedCard, "allocate", fails)

    result = pytester.runpytest("-p", "no:cacheprovider", "--gpu-backend=simulated")

    result.assert_outcomes(failed=1)
    assert "devices/simulated" in result.stdout.str().replace("\\", "/")
