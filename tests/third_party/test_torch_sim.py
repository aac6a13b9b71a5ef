"""TorchSim: automatic batchers grow a batch of systems until the card has no room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch_sim
from evidence import MIB, CountOoms
from torch_sim.autobatching import BinningAutoBatcher, determine_max_batch_size
from torch_sim.models.interface import ModelInterface

from pytest_gpumem import OomInjector
from pytest_gpumem.rules.rule import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Callable

#: Atoms of a system; it holds 1 MiB of the card while its energy is computed.
NUM_ATOMS = 8


class Springs(ModelInterface):  # type: ignore[misc]  # the library is not checked
    """Every atom on a spring to the origin.

    Args:
        device: Where.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = torch.device(device)
        self._dtype = torch.float64
        self.sizes: list[int] = []

    def forward(self, state: Any, **_options: Any) -> dict[str, torch.Tensor]:
        """Return each system's energy."""
        self.sizes.append(int(state.n_systems))
        held = torch.empty(
            state.n_systems * MIB, dtype=torch.uint8, device=self._device
        )
        squares = state.positions.square().sum(1)
        energy = torch.zeros(state.n_systems, dtype=self._dtype, device=self._device)
        energy.index_add_(0, state.system_idx, squares)
        del held
        return {"energy": energy}


def _system(number: int, device: str) -> Any:
    generator = torch.Generator().manual_seed(number)
    positions = torch.rand(NUM_ATOMS, 3, generator=generator, dtype=torch.float64)
    return torch_sim.SimState(
        positions=positions.to(device),
        masses=torch.ones(NUM_ATOMS, dtype=torch.float64, device=device),
        cell=torch.eye(3, dtype=torch.float64, device=device)[None],
        pbc=True,
        atomic_numbers=torch.ones(NUM_ATOMS, dtype=torch.int64, device=device),
    )


def test_systems_are_computed_in_batches_that_fit(
    vram_budget: Callable[..., Any],
) -> None:
    """The OOM ends the estimate, and the energies are the CPU's."""
    on_host = Springs("cpu")
    expected = [on_host(_system(number, "cpu"))["energy"] for number in range(30)]
    model = Springs("cuda:0")
    batcher = BinningAutoBatcher(model, memory_scales_with="n_atoms")

    with vram_budget("24MiB"), CountOoms() as ooms:
        batcher.load_states([_system(number, "cuda:0") for number in range(30)])
        estimated = list(model.sizes)
        model.sizes.clear()
        indices, energies = [], []
        for batch in batcher:
            energies.extend(model(batch)["energy"].cpu())
        indices = [index for bin_ in batcher.index_bins for index in bin_]

    assert estimated == [1, 2, 3, 5, 8, 13, 21, 34] * 2
    assert ooms.num == 2
    assert sum(model.sizes) == 30
    assert max(model.sizes) == 13
    found = [energy for _index, energy in sorted(zip(indices, energies, strict=True))]
    torch.testing.assert_close(torch.stack(found), torch.cat(expected))


@pytest.mark.parametrize(("nth", "size"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 3)])
def test_the_size_two_before_the_oom_is_taken(
    oom_injector: OomInjector, nth: int, size: int
) -> None:
    """A finding: an OOM at the very first size gives that size back, with no error."""
    model = Springs("cuda:0")
    system = _system(0, "cuda:0")

    rule = oom_injector.arm(f"forward:min=1MiB,nth={nth},persistent")
    found = determine_max_batch_size(system, model, max_atoms=100)

    assert rule.num_failed == 1
    assert found == size
    if nth == 1:
        with pytest.raises(torch.OutOfMemoryError):
            model(system)


def test_its_detector() -> None:
    """It asks for "CUDA out of memory": the allocator's own text alone."""
    model = Springs("cuda:0")
    system = _system(0, "cuda:0")
    survived = set()
    for flavour in FLAVOURS:
        with OomInjector(f"forward:min=1MiB,nth=3,flavour={flavour}") as injector:
            try:
                determine_max_batch_size(system, model, max_atoms=100)
            except (RuntimeError, MemoryError):
                pass
            else:
                survived.add(flavour)
        assert injector.num_injected == 1

    assert survived == {"native", "legacy"}
