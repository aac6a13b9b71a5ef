"""What is judged by its values: alike on a simulated card and on a real one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import check_fallback, simulated_device, sweep_ooms
from pytest_gpumem.devices.cuda import CudaDevice
from pytest_gpumem.devices.simulated.device import SimulatedDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pytest_gpumem.devices import Device


@pytest.fixture(
    params=[
        "simulated",
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.needs_values]),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """A simulated card, and a real one."""
    if request.param == "cuda":
        yield CudaDevice()
        return
    with simulated_device("512MiB,cc=8.0") as machine:
        yield SimulatedDevice(machine)


def _load() -> torch.nn.Module:
    torch.manual_seed(0)
    model = torch.nn.Linear(512, 512)
    try:
        return model.to("cuda")
    except torch.OutOfMemoryError:
        pass
    return model.to("cpu")


def _answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model(torch.ones(4, 512, device=model.weight.device))
    return made.cpu()


def test_every_rung_of_a_ladder_answers_alike(device: Device) -> None:
    """On the card and on the host, under budgets and faults."""
    torch.manual_seed(0)
    reference = _answer(torch.nn.Linear(512, 512))

    report = check_fallback(
        _load,
        run=_answer,
        reference=reference,
        budgets=["64MiB", "1MiB"],
        device=device,
    )

    report.check()


def test_a_sweep_compares_results(device: Device) -> None:
    """Code that recovers with the same result passes; with another one it does not."""

    def body(wrong: float) -> torch.Tensor:
        try:
            return torch.full((1000,), 2.0, device="cuda").cpu()
        except torch.OutOfMemoryError:
            return torch.full((1000,), wrong)

    right = sweep_ooms(body, 2.0, recover=True, device=device)
    wrong = sweep_ooms(body, 3.0, recover=True, device=device)

    assert [] == right.failures
    assert {"wrong result"} == {str(each.verdict.value) for each in wrong.failures}
