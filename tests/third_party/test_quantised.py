"""Quantised models, whose weights are subclasses of tensors, on the simulated card."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from optimum.quanto import freeze, qint8, quantize
from peft import LoraConfig, get_peft_model
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from pytest_gpumem import vram_budget

four_bits: Any = bitsandbytes.nn
optimizers: Any = bitsandbytes.optim
#: The ladder, as a program: ``KIND MODEL``.
RUNGS = str(Path(__file__).parents[1] / "support" / "quantised_rungs.py")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))


def _with_torchao(model: nn.Module) -> None:
    quantize_(model, Int8WeightOnlyConfig())


def _with_quanto(model: nn.Module) -> None:
    quantize(model, weights=qint8)
    freeze(model)


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("quantise", [_with_torchao, _with_quanto])
@pytest.mark.parametrize("is_first_moved", [True, False])
@torch.no_grad()
def test_a_quantised_model_computes_what_the_host_does(
    quantise: Any, *, is_first_moved: bool
) -> None:
    """Quantised on the card or moved there, and back; its bytes go with it."""
    square = torch.ones(2, 2, device="cuda")
    torch.mm(square, square)  # takes cuBLAS's workspace, which stays
    before = torch.cuda.memory_allocated()
    source = torch.randn(3, 64)
    host = _model()
    quantise(host)
    expected = host(source)

    model = _model()
    if is_first_moved:
        quantise(model.cuda())
    else:
        quantise(model)
        model.cuda()
    weight: Any = model[0].weight
    result = model(source.cuda()).cpu()
    kind, place = type(weight).__name__, weight.device.type
    model.cpu()
    back = model(source)

    assert ("cuda", type(host[0].weight).__name__) == (place, kind)
    assert torch.equal(expected, result)
    assert torch.equal(expected, back)
    del model, weight, result, back
    gc.collect()
    assert before == torch.cuda.memory_allocated()


@pytest.mark.parametrize("model", ["llama", "bert-large"])
@pytest.mark.parametrize(
    "kind", ["bitsandbytes-8bit", "bitsandbytes-nf4", "quanto-int8", "quanto-int4"]
)
def test_a_quantised_rung_is_reached(kind: str, model: str) -> None:
    """By ``quantization_config``, where fp32 has no room: the library's values, its bytes."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", RUNGS, kind, model],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )

    assert result.stdout.endswith("as it should be\n"), result.stderr[-2000:]


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_four_bits_train_an_adapter() -> None:
    """Bitsandbytes' 4-bit weights under peft's LoRA: gradients reach the adapter."""
    model = nn.Sequential(
        four_bits.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    ).cuda()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["0"]))
    source = torch.randn(3, 64, device="cuda")

    adapted(source).square().mean().backward()

    weight = adapted.base_model.model[0].base_layer.weight
    grads = {
        name: each.grad
        for name, each in adapted.named_parameters()
        if each.requires_grad
    }
    assert (four_bits.Params4bit, "cuda") == (type(weight), weight.device.type)
    assert grads
    assert all(each is not None and each.is_cuda for each in grads.values())


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_a_step_with_four_bits_fits_where_plain_weights_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under one budget 4-bit weights train an adapter, until the batch is too large."""
    # Lightning sets it for the process, and each cuBLAS workspace then takes 32 MiB.
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)

    def step(make: Any, batch: int) -> None:
        """Train one step of an adapter on eight layers."""
        gc.collect()
        torch.cuda.empty_cache()
        base = nn.Sequential(*(make(1024, 1024) for _layer in range(8))).cuda()
        adapted = get_peft_model(base, LoraConfig(r=8, target_modules=["0", "1", "2"]))
        chosen = [each for each in adapted.parameters() if each.requires_grad]
        optimizer = optimizers.AdamW8bit(chosen)
        source = torch.randn(batch, 1024, device="cuda", dtype=torch.bfloat16)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            adapted(source).float().square().mean().backward()
        optimizer.step()

    def quantised(rows: int, columns: int) -> nn.Module:
        layer: nn.Module = four_bits.Linear4bit(
            rows, columns, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        return layer

    with vram_budget(60 * 2**20):
        step(quantised, 8)
        with pytest.raises(torch.OutOfMemoryError):
            step(quantised, 8192)
        with pytest.raises(torch.OutOfMemoryError):
            step(nn.Linear, 8)
