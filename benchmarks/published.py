"""Compare peaks that people published from real cards with the simulated card's.

Run: ``python benchmarks/published.py [--write]``. It prints the page
``docs/published.md``, or writes it. No values are kept, so it takes a minute or two and
little memory. The published figures, with their sources, are those of
``tests/published/peaks.json``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

ROOT: Final = Path(__file__).parents[1]
sys.path += [str(ROOT / "docs")]

import torch  # noqa: E402  # after sys.path is set
import transformers  # noqa: E402  # after sys.path is set
from generators.markdown import page, table  # noqa: E402  # after sys.path is set
from transformers import (  # noqa: E402  # after sys.path is set
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from pytest_gpumem.devices.simulated.install import simulated_device  # noqa: E402  # after sys.path is set

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE: Final = ROOT / "docs" / "published.md"
PEAKS: Final = ROOT / "tests" / "published" / "peaks.json"
_UNITS: Final = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
_WORKSPACE: Final = 8519680  # of cuBLAS, cc 8.0 and 8.6

ROBERTA: Final = RobertaConfig(
    vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
)
BERT_CASED: Final = BertConfig(vocab_size=28996)
BERT_LARGE: Final = BertConfig(
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)
VIT: Final = ViTConfig.from_dict({"num_labels": 1000})
VIT_LARGE: Final = ViTConfig.from_dict(
    {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_labels": 1000,
    }
)
T0_3B: Final = T5Config.from_dict(
    {
        "vocab_size": 32128,
        "d_model": 2048,
        "d_kv": 64,
        "d_ff": 5120,
        "num_layers": 24,
        "num_heads": 32,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
    }
)


def _on_host(kind: type[PreTrainedModel], config: Any) -> Any:
    """Return a model without values on the host, as fast as shapes can be made."""
    with torch.device("meta"):
        model: Any = kind(config)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    for name, buffer in model.named_buffers():
        if name.endswith("position_ids"):
            buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
        else:
            buffer.zero_()
    return model


def _loaded(kind: type[PreTrainedModel], config: Any) -> Any:
    return _on_host(kind, config).cuda()


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.zeros(batch, length, dtype=torch.int64, device="cuda")


def _reserved() -> int:
    return torch.cuda.max_memory_reserved()


def _allocated() -> int:
    return torch.cuda.max_memory_allocated()


def roberta_under_device() -> int:
    """``with torch.device("cuda")`` creates each tensor on the card."""
    return _reserved() if _made_there(RobertaForSequenceClassification, ROBERTA) else 0


def roberta() -> int:
    """A load by ``.to``."""
    return _allocated() if _loaded(RobertaForSequenceClassification, ROBERTA) else 0


def _made_there(kind: type[PreTrainedModel], config: Any) -> Any:
    """Return a model created under ``torch.device``: tied weights exist twice for a moment."""
    with torch.device("cuda"):
        made: Any = kind(config)
    return made.eval()


def bert_masked() -> int:
    """``with torch.device("cuda")``."""
    return _reserved() if _made_there(BertForMaskedLM, BertConfig()) else 0


def bert_masked_forward() -> int:
    """One line of 16 tokens."""
    model = _made_there(BertForMaskedLM, BertConfig())
    with torch.no_grad():
        model(_ids(1, 16))
    return _reserved()


def vit() -> int:
    """A load by ``.to``."""
    return _reserved() if _loaded(ViTForImageClassification, VIT) else 0


def vit_allocated() -> int:
    """A load by ``.to``."""
    return _allocated() if _loaded(ViTForImageClassification, VIT) else 0


def _vit_forward() -> None:
    model = _loaded(ViTForImageClassification, VIT)
    with torch.no_grad():
        model(torch.zeros(1, 3, 224, 224, device="cuda"))


def vit_forward() -> int:
    """One image."""
    _vit_forward()
    return _reserved()


def vit_forward_allocated() -> int:
    """One image, on a build without a BLAS workspace."""
    _vit_forward()
    return _allocated() - _WORKSPACE


def gpt2_prefill() -> int:
    """1 x 16 tokens, with a cache."""
    model = _made_there(GPT2LMHeadModel, GPT2Config())
    with torch.no_grad():
        model(_ids(1, 16), use_cache=True)
    return _reserved()


def bert_training() -> int:
    """2 x 16 tokens, three steps of AdamW."""
    model = _loaded(BertForMaskedLM, BertConfig()).train()
    _train(model, torch.optim.AdamW(model.parameters()), (2, 16))
    return _allocated()


def bert_cased() -> int:
    """A load by ``.to``."""
    kept = _loaded(BertModel, BERT_CASED)
    return torch.cuda.memory_allocated() if kept else 0


def _train(
    model: Any,
    optimizer: torch.optim.Optimizer,
    shape: tuple[int, int],
    *,
    steps: int = 3,
) -> None:
    for _step in range(steps):
        ids = _ids(*shape)
        outputs = model(ids, labels=ids)  # its logits live until the next logits exist
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _vit_large(optimizer_in_backward: bool) -> int:  # noqa: FBT001  # of one module
    model = _loaded(ViTForImageClassification, VIT_LARGE).train()
    image = torch.zeros(1, 3, 224, 224, device="cuda")
    if optimizer_in_backward:
        each: dict[Any, torch.optim.Optimizer] = {
            parameter: torch.optim.Adam([parameter], foreach=False)
            for parameter in model.parameters()
        }

        def step(parameter: torch.Tensor) -> None:
            each[parameter].step()
            each[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
    else:
        optimizer = torch.optim.Adam(model.parameters())
    for _step in range(3):
        model(image).logits.sum().backward()
        if not optimizer_in_backward:
            optimizer.step()
            optimizer.zero_grad()
    return _allocated()


def vit_large_adam() -> int:
    """One image, Adam over lists of tensors."""
    return _vit_large(optimizer_in_backward=False)


def vit_large_in_backward() -> int:
    """One image, one Adam for each parameter, run where its gradient is ready."""
    return _vit_large(optimizer_in_backward=True)


def vit_large_parameters() -> int:
    """A load by ``.to``."""
    kept = _loaded(ViTForImageClassification, VIT_LARGE)
    return torch.cuda.memory_allocated() if kept else 0


def _gpt2_training(checkpointing: bool) -> int:  # noqa: FBT001  # of one module
    model = _loaded(GPT2LMHeadModel, GPT2Config()).train()
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    before = torch.cuda.memory_allocated()
    _train(model, torch.optim.AdamW(model.parameters()), (4, 512))
    return _allocated() - before


def gpt2_training() -> int:
    """4 x 512 tokens, AdamW; bytes in addition to those of the load."""
    return _gpt2_training(checkpointing=False)


def gpt2_training_checkpointed() -> int:
    """4 x 512 tokens, AdamW, activation checkpointing; bytes in addition to those of the load."""
    # Here transformers reads the values of the positions, and finds one sequence in each
    # line.
    with mock.patch(
        "transformers.masking_utils.find_packed_sequence_indices", return_value=None
    ):
        return _gpt2_training(checkpointing=True)


def gpt2_state() -> int:
    """The bytes of AdamW's state after a step."""
    model = _loaded(GPT2LMHeadModel, GPT2Config()).train()
    optimizer = torch.optim.AdamW(model.parameters())
    _train(model, optimizer, (1, 16), steps=1)
    return sum(
        each.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for each in state.values()
        if isinstance(each, torch.Tensor) and each.is_cuda
    )


def linear() -> int:
    """``nn.Linear(10000, 50000)``."""
    with torch.device("meta"):
        layer = torch.nn.Linear(10_000, 50_000)
    kept = layer.to_empty(device="cuda")
    return torch.cuda.memory_allocated() if kept else 0


def t0_full() -> int:
    """8 x 64 tokens, AdamW one tensor after the other, as was the default then."""
    model = _loaded(T5ForConditionalGeneration, T0_3B).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    _train(model, optimizer, (8, 64), steps=2)
    return _allocated()


def large_load() -> int:
    """A load by ``.to``."""
    kept = _loaded(BertForSequenceClassification, BERT_LARGE)
    return torch.cuda.memory_reserved() if kept else 0


#: Functions by published task and the beginning of its description of the figure; with the
#: card.
TASKS: Final[dict[tuple[str, str], tuple[Callable[[], int], str]]] = {
    (
        "roberta-base classification, load (tensors made under torch.device)",
        "max_memory_reserved",
    ): (roberta_under_device, "A10G"),
    ("roberta-base classification, load", "max_memory_allocated"): (roberta, "A10G"),
    ("bert-base-uncased masked LM, load", "max_memory_reserved"): (bert_masked, "A10G"),
    ("bert-base-uncased masked LM, forward", "max_memory_reserved"): (
        bert_masked_forward,
        "A10G",
    ),
    ("vit-base-patch16-224, load", "max_memory_reserved"): (vit, "A10G"),
    ("vit-base-patch16-224, load", "max_memory_allocated"): (vit_allocated, "A10G"),
    ("vit-base-patch16-224, forward of one image", "max_memory_reserved"): (
        vit_forward,
        "A10G",
    ),
    ("vit-base-patch16-224, forward of one image", "max_memory_allocated"): (
        vit_forward_allocated,
        "A10G",
    ),
    ("gpt2, prefill", "max_memory_reserved"): (gpt2_prefill, "A100-80GB"),
    ("bert-base-uncased masked LM, training", "max_memory_allocated"): (
        bert_training,
        "A100-80GB",
    ),
    ("bert-base-cased, load", "memory_allocated"): (bert_cased, "A100-80GB"),
    ("ViT-L/16 Adam foreach, peak", "snapshot"): (vit_large_adam, "A100-80GB"),
    ("ViT-L/16 Adam in backward, peak", "snapshot"): (
        vit_large_in_backward,
        "A100-80GB",
    ),
    ("ViT-L/16 parameters", "snapshot"): (vit_large_parameters, "A100-80GB"),
    ("gpt2 training, peak without the parameters", "snapshot"): (
        gpt2_training,
        "A100-80GB",
    ),
    (
        "gpt2 training, activation checkpointing, peak without the parameters",
        "snapshot",
    ): (gpt2_training_checkpointed, "A100-80GB"),
    ("gpt2 training, optimizer state", "snapshot"): (gpt2_state, "A100-80GB"),
    ("nn.Linear(10000, 50000), weights", "snapshot"): (linear, "A100-80GB"),
    ("T0_3B full fine-tuning, 8 x 64", "peft"): (t0_full, "A100-80GB"),
    ("bert-large-uncased, after load", "nvidia-smi"): (large_load, "V100-16GB"),
}


def rows() -> Iterator[list[str]]:
    """Yield a line for each published peak, run or not."""
    for peak in json.loads(PEAKS.read_text(encoding="utf-8")):
        unit = peak["unit"].split()[0].rstrip(",")
        found = [
            run
            for (task, counts), run in TASKS.items()
            if task == peak["task"] and peak["counts"].startswith(counts)
        ]
        simulated = ratio = "not run"
        if found:
            recipe, card = found[0]
            print(f"... {peak['task']}", file=sys.stderr, flush=True)
            with simulated_device(card, values="none"):
                nbytes = recipe()
            measured = nbytes / _UNITS[unit]
            simulated = f"{measured:,.2f} {unit}"
            ratio = f"{100 * (measured / peak['published'] - 1):+.2f} %"
        yield [
            peak["task"],
            f"{peak['published']:,.2f} {unit}",
            simulated,
            ratio,
            peak["counts"],
            peak["source"],
        ]


def build() -> str:
    """Return the page."""
    head = ["task", "published", "simulated", "difference", "what counts", "source"]
    return page(
        [
            "# Published peaks\n\n"
            "Peaks that people published from real cards, and the peaks of the same "
            "tasks on the simulated card, from `python benchmarks/published.py "
            "--write` "
            f"(torch {torch.__version__.partition('+')[0]}, transformers "
            f"{transformers.__version__}). Peaks of 2022 to 2024 are from the versions "
            f"of that time, which created other tensors in some places: dropout masks "
            f"with the dtype of the input, attention composed of single operators, "
            f"optimisers that updated one tensor at a time.",
            table(head, rows()),
            "*Not run*: LoRA needs peft. The trainings of bert-large of 2022 used a "
            "Trainer, an optimiser and an attention that transformers no longer has.",
        ]
    )


def main() -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page")
    asked = parser.parse_args()
    text = build()
    if asked.write:
        PAGE.write_text(text, encoding="utf-8")
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
