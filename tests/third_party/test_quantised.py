"""Quantised models, whose weights are subclasses of tensors, on the simulated card."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes
import hqq.core.optimize
import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
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


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("is_moved", [True, False])
@torch.no_grad()
def test_hqq_computes_what_the_host_does_with_the_same_type(
    monkeypatch: pytest.MonkeyPatch, *, is_moved: bool
) -> None:
    """It looks for the zero points in half precision on a card, and in single on the CPU."""

    def quantised(device: str) -> Any:
        config = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        layer = nn.Linear(64, 128, bias=False)
        nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
        return HQQLinear(layer, config, compute_dtype=torch.float32, device=device)

    before = torch.cuda.memory_allocated()
    single = quantised("cpu")
    card = quantised("cpu").cuda("cuda") if is_moved else quantised("cuda")
    held = torch.cuda.memory_allocated() - before
    monkeypatch.setattr(hqq.core.optimize, "float32", torch.float16)
    half = quantised("cpu")
    parts = [card.W_q, card.meta["scale"], card.meta["zero"]]
    same, other = (single, half) if is_moved else (half, single)
    source = torch.randn(3, 64)

    assert held == sum(-(-each.nbytes // 512) * 512 for each in parts)
    assert all(each.is_cuda for each in parts)
    assert torch.equal(same.dequantize(), card.dequantize().cpu())
    assert torch.equal(same(source), card(source.cuda()).cpu())
    assert not torch.equal(other.dequantize(), card.dequantize().cpu())


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


def _with_bitsandbytes(model: nn.Module, make: Any) -> None:
    linear: Any = model.get_submodule("0")
    made = make(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    model.register_module("0", made)


#: What quantises the first layer of a model, and the class of its weight.
ADAPTED: dict[str, tuple[Any, str]] = {
    "bitsandbytes-nf4": (
        lambda model: _with_bitsandbytes(
            model,
            lambda *sizes: four_bits.Linear4bit(
                *sizes, compute_dtype=torch.float32, quant_type="nf4"
            ),
        ),
        "Params4bit",
    ),
    "bitsandbytes-8bit": (
        lambda model: _with_bitsandbytes(
            model,
            lambda *sizes: four_bits.Linear8bitLt(*sizes, has_fp16_weights=False),
        ),
        "Int8Params",
    ),
    "torchao": (_with_torchao, "Int8Tensor"),
    "quanto": (_with_quanto, "WeightQBytesTensor"),
}


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize("kind", ADAPTED)
def test_quantised_weights_train_an_adapter(kind: str) -> None:
    """Under peft's LoRA: the adapter's gradients are those of the CPU."""
    quantise, name = ADAPTED[kind]
    found = []
    for device in ("cpu", "cuda"):
        model = _model()
        quantise(model)
        adapted: Any = get_peft_model(
            model.to(device), LoraConfig(r=4, target_modules=["0"])
        )
        # In training mode bitsandbytes takes another way with 8 bits on the CPU.
        adapted.eval()
        torch.manual_seed(0)
        source = torch.randn(3, 64)
        for each in adapted.parameters():
            if each.requires_grad:
                each.data.copy_(torch.randn(each.shape) / 8)
        adapted(source.to(device)).square().mean().backward()
        weight = adapted.base_model.model[0].base_layer.weight
        assert (name, device) == (type(weight).__name__, weight.device.type)
        grads = [each.grad for each in adapted.parameters() if each.requires_grad]
        assert all(each.device.type == device for each in grads)
        found.append([each.cpu() for each in grads])

    assert len(found[0]) == 2  # both factors
    assert all(map(torch.equal, *found))


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
