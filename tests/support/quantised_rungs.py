"""A ladder with a quantised rung, by ``quantization_config``, and what must hold on it.

It is a module of its own, and a program, because the libraries register things with torch
for good: ``python -W ignore quantised_rungs.py KIND MODEL``.
"""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING, Any

import torch
import transformers

from pytest_gpumem import make_checkpoint, simulated_device, vram_budget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MIB = 2**20
#: Blocks of the allocator have a multiple of these bytes.
_ROUNDS_TO = 512

LLAMA: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
}
#: The class that loads each model, and a budget that is too small for it in fp32.
MODELS: dict[str, tuple[Any, int]] = {
    "llama": (transformers.AutoModelForCausalLM, 64 * MIB),
    "bert-large": (transformers.AutoModelForSequenceClassification, 800 * MIB),
}


def _torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


_BitsAndBytes: Any = transformers.BitsAndBytesConfig
#: What makes each kind of quantisation.
KINDS: dict[str, Callable[[], Any]] = {
    "torchao": _torchao,
    "bitsandbytes-8bit": lambda: _BitsAndBytes(load_in_8bit=True),
    "bitsandbytes-nf4": lambda: _BitsAndBytes(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "quanto-int8": lambda: transformers.QuantoConfig(weights="int8"),
    "quanto-int4": lambda: transformers.QuantoConfig(weights="int4"),
}


def checkpoint(model: str) -> Path:
    """Return a checkpoint of a model of ``MODELS``."""
    if model == "llama":
        config = transformers.LlamaConfig(**LLAMA)
        return make_checkpoint(config, architecture="LlamaForCausalLM")
    return make_checkpoint(model)


def load_model(path: Path, kind: str, model: str) -> tuple[str, Any]:
    """Load a model on the highest rung that fits; return the rung's name and the model."""
    loader, _budget = MODELS[model]
    rungs: tuple[tuple[str, dict[str, Any]], ...] = (
        ("cuda fp32", {"device_map": "cuda:0"}),
        ("quantised", {"device_map": "cuda:0", "quantization_config": KINDS[kind]()}),
        ("cpu", {}),
    )
    for rung, options in rungs:
        try:
            loaded = loader.from_pretrained(path, dtype=torch.float32, **options)
        except torch.OutOfMemoryError:
            loaded = None
        if loaded is not None:
            return rung, loaded.eval()
        gc.collect()
        torch.cuda.empty_cache()
    raise AssertionError("unreachable: the CPU rung takes no bytes of the card")


def storage_bytes(model: Any) -> int:
    """Return the bytes of the blocks of all storages of a model that are on a card."""
    storages = {
        each.untyped_storage()._cdata: each.untyped_storage().nbytes()
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        for each in _parts(tensor)
        if each.is_cuda
    }
    return sum(-(-each // _ROUNDS_TO) * _ROUNDS_TO for each in storages.values())


def _parts(tensor: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors with memory in a quantised weight, or in what goes with it."""
    if not isinstance(tensor, torch.Tensor):
        return
    if type(
        tensor
    ).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and hasattr(
        tensor, "__tensor_flatten__"
    ):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _parts(getattr(tensor, name))
        return
    yield tensor
    # Of bitsandbytes: scales of 8 bits, and the state of 4 bits, which may be nested.
    state = getattr(tensor, "quant_state", None)
    yield from _parts(getattr(tensor, "SCB", None))
    while state is not None:
        yield from (
            each
            for each in (state.absmax, state.code, state.offset)
            if isinstance(each, torch.Tensor)
        )
        state = state.state2


def check(kind: str, model: str) -> None:
    """Check that a quantised rung is reached, right, and takes the bytes it should.

    Its logits must be those of the library's own kernels on the CPU, and its bytes those
    of its storages.
    """
    path = checkpoint(model)
    loader, budget = MODELS[model]
    tokens = torch.arange(32).reshape(2, 16)
    with torch.no_grad():
        host = loader.from_pretrained(
            path,
            device_map="cpu",
            dtype=torch.float32,
            quantization_config=KINDS[kind](),
        )
        expected = host.eval()(tokens).logits
        del host
    with simulated_device("A100-80GB"), vram_budget(budget), torch.no_grad():
        rung, loaded = load_model(path, kind, model)
        gc.collect()
        assert rung == "quantised", rung
        assert torch.cuda.memory_allocated() == storage_bytes(loaded)
        assert torch.cuda.max_memory_reserved() <= budget
        logits = loaded(tokens.cuda()).logits
        assert logits.is_cuda
        assert torch.equal(logits.cpu(), expected)
        del loaded, logits
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # the only way
        assert torch.cuda.memory_allocated() == 0


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    check(*sys.argv[1:])
    sys.stdout.write("as it should be\n")
