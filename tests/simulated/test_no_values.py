"""Cards that keep shapes and bytes only: the same memory, and no values to read."""

from __future__ import annotations

import copy
import io
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem.checkpoints import make_checkpoint
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import NoValuesError, UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

pytest_plugins = ["pytester"]


@pytest.fixture
def machine() -> Iterator[SimulatedMachine]:
    """Two cards without values."""
    with simulated_device("A100-80GB*2", values="none") as machine:
        yield machine


def _card() -> torch.Tensor:
    return torch.randn(3, 4, device="cuda")


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda t: t.sum().item(),
    "bool": lambda t: bool(t.sum()),
    "float": lambda t: float(t.sum()),
    "int": lambda t: int(t.sum()),
    "format": lambda t: f"{t.sum():.2f}",
    "tolist": lambda t: t.tolist(),
    "cpu": lambda t: t.cpu(),
    "copy to the host": lambda t: torch.empty(3, 4).copy_(t),
    "nonzero": lambda t: t.nonzero(),
    "boolean index": lambda t: t[t > 0],
    "equal": lambda t: torch.equal(t, t),
    "allclose": lambda t: torch.allclose(t, t),
    "save": lambda t: torch.save(t, io.BytesIO()),
    "storage": lambda t: t.untyped_storage().cpu(),
}


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("read", READS.values(), ids=READS.keys())
def test_reading_a_value_says_that_there_is_none(
    read: Callable[[torch.Tensor], Any],
) -> None:
    """One error class, which names what was read and what to do."""
    with pytest.raises(NoValuesError, match=r"--gpu-values=computed"):
        read(_card())


@pytest.mark.usefixtures("machine")
def test_a_tensor_without_values_is_one_of_the_card() -> None:
    """Device, printing, copies and addresses need no value."""
    tensor = _card()
    view = tensor[1:]

    assert tensor.is_cuda
    assert not tensor.is_meta
    assert "cuda:0" == str(tensor.device)
    assert "tensor(<no values kept>, device='cuda:0', size=(3, 4))" == repr(tensor)
    other = tensor.to("cuda:1")
    assert "cuda:1" == str(other.device)
    assert 0 != tensor.data_ptr() != other.data_ptr()
    assert tensor.data_ptr() != copy.deepcopy(tensor).data_ptr()
    assert tensor.data_ptr() + 16 == view.data_ptr()
    assert tensor.untyped_storage().data_ptr() == view.untyped_storage().data_ptr()
    assert 0 == torch.empty(0, device="cuda").data_ptr()


@pytest.mark.usefixtures("machine")
def test_two_devices_are_still_told_apart() -> None:
    """Shapes alone do not make operands on host and card agree."""
    with pytest.raises(RuntimeError, match=r"found at least two devices"):
        _card() + torch.randn(3, 4)


def test_an_unknown_choice_is_refused() -> None:
    """The error names what is accepted."""
    with (
        pytest.raises(ValueError, match=r"accepted are computed, none"),
        simulated_device("T4", values="some"),
    ):
        pass


def _train() -> list[int]:
    """Return the bytes allocated, and their peak, after each step of a training."""
    figures = []
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 8)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        batch = torch.randn(32, 64).cuda()
        loss = nn.functional.cross_entropy(
            model(batch), torch.zeros(32, dtype=torch.long, device="cuda")
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        figures += [torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()]
    return figures


def test_bytes_are_those_of_a_run_with_values() -> None:
    """A training allocates the same with values and without."""
    with simulated_device("T4"):
        computed = _train()
    with simulated_device("T4", values="none"):
        hollow = _train()

    assert computed == hollow
    assert computed[0] > 0


def test_torch_load_puts_a_model_without_values_on_a_card(
    machine: SimulatedMachine,
) -> None:
    """A checkpoint's storages become bytes of the card."""
    file = io.BytesIO()
    torch.save(nn.Linear(128, 128).state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cuda:1")

    assert "cuda:1" == str(state["weight"].device)
    assert machine.cards[1].allocator.allocated_bytes >= 128 * 129 * 4


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 70-billion-parameter checkpoint of 131 GiB that takes no room on the disk."""
    return make_checkpoint(
        "llama-70b",
        out=tmp_path_factory.mktemp("hollow") / "llama-70b",
        weights="zeros",
        dtype="bfloat16",
        max_shard_size="5GB",
    )


def test_a_hollow_checkpoint_has_its_size_and_takes_no_room(llama: Path) -> None:
    """The files say 141 GB and hold their headers."""
    shards = list(llama.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in shards)
    on_disk = sum(file.stat().st_blocks * 512 for file in shards)

    assert len(shards) > 20
    assert 2 * 70_553_706_496 < size < 2 * 70_553_706_496 + 2**20
    assert on_disk < 2**20


@pytest.mark.slow
def test_70_billion_parameters_load_on_two_cards(
    llama: Path, machine: SimulatedMachine
) -> None:
    """device_map="auto" plans and loads for two cards of 80 GB; a forward runs."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model: Any = load(llama, device_map="auto", dtype="auto")
    held = [card.allocator.allocated_bytes for card in machine.cards]
    with torch.no_grad():
        ids = torch.zeros(1, 16, dtype=torch.long, device="cuda")
        logits = model(ids).logits

    assert {0, 1} == set(model.hf_device_map.values())
    assert 2 * 70_553_706_496 <= sum(held) < 2 * 70_553_706_496 * 1.001
    assert (1, 16, 128256) == tuple(logits.shape)


def test_the_same_load_ends_in_an_oom_on_one_card(llama: Path) -> None:
    """141 GB do not fit 16 GB, which takes less time to find than that they do not 80."""
    from transformers import AutoModelForCausalLM

    with (
        simulated_device("T4", values="none"),
        pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory"),
    ):
        AutoModelForCausalLM.from_pretrained(llama, device_map="cuda:0", dtype="auto")


def test_the_option_reaches_the_card(pytester: pytest.Pytester) -> None:
    """--gpu-values=none; the header says so; the error names the option."""
    pytester.makepyfile(
        """
        import torch

        def test_bytes():
            tensor = torch.ones(2**20, device="cuda")
            assert torch.cuda.memory_allocated() == 2**22

        def test_value():
            torch.ones(1, device="cuda").item()
        """
    )
    result = pytester.runpytest("--gpu-values=none", "-p", "no:cacheprovider")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["gpumem: *no values kept*", "*NoValuesError: *"])


def test_an_unknown_option_value_is_a_usage_error(pytester: pytest.Pytester) -> None:
    """Exit 4, with what is accepted."""
    result = pytester.runpytest("--gpu-values=half")

    assert pytest.ExitCode.USAGE_ERROR == result.ret
    result.stderr.fnmatch_lines(["*--gpu-values: 'half'*computed, none*"])


@pytest.mark.usefixtures("machine")
def test_numbers_are_written_where_no_values_are_kept() -> None:
    """Assigning, filling and masking with numbers need no value; clipping neither."""
    target = torch.zeros(3, 4, device="cuda")
    parameter = torch.nn.Parameter(torch.ones(3, device="cuda"))
    parameter.grad = torch.ones(3, device="cuda")

    target[..., 0] = 1.5
    target[torch.tensor([0, 1])] = torch.tensor(1.0)
    masked = target.masked_fill(target > 0, torch.tensor(1.0))
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0, foreach=True)

    assert (3, 4) == tuple(masked.shape)
    assert norm.is_cuda
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        target.copy_(torch.empty(3, 4, device="meta"))


@pytest.mark.usefixtures("machine")
def test_a_library_that_branches_on_a_value_is_named() -> None:
    """A mask may be left out if it hides nothing: transformers looks at its values."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RobertaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    model = transformers.RobertaModel(config).cuda()
    tokens = torch.ones(1, 4, dtype=torch.int64, device="cuda")
    with pytest.raises(NoValuesError) as caught:
        model(tokens, attention_mask=tokens)

    assert re.match(
        r"transformers/(masking_utils|modeling_attn_mask_utils)\.py:",
        caught.value.place,
    )
    assert str(caught.value).startswith(
        f"Tensor.__bool__() at {caught.value.place} reads values"
    )


_SUM = "template <typename T> T sum(T x, T y) { return x + y; }"


def test_a_users_own_kernel_asks_for_its_results() -> None:
    """Nobody computes them: ``torch.cuda.jiterator`` runs where no values are kept."""
    with simulated_device("T4", values="none"):
        add = torch.cuda.jiterator._create_jit_fn(_SUM)
        before = torch.cuda.memory_allocated()
        result = add(torch.ones(3, 1, device="cuda"), torch.ones(400, device="cuda"))

        assert (3, 400) == result.shape
        assert torch.float32 is result.dtype
        assert 5120 == torch.cuda.memory_allocated() - before

    with simulated_device("T4"), pytest.raises(UnsupportedOnSimulatedDeviceError):
        add(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
