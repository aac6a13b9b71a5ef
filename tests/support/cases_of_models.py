"""Small models of many architectures: load, forward, two training steps, phase by phase.

A phase is what was asked for in it; the figures of a real run follow from that.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from recorded_requests import Case

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

VALUES: Final = "none"
TOKENS: Final = (2, 64)
CARDS: Final = (("8.0", 108), ("7.5", 40))
_DTYPES: Final = ("float32", "bfloat16", "float16")
_ATTENTION: Final = ("eager", "sdpa")

_SIZES: Final = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
_GROUPED: Final = {"num_key_value_heads": 2}
_GPT2: Final = {"n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512}
#: Says that a model takes none of the common settings.
_ALONE: Final = "alone"
#: Name, class of its settings, what it is used for, settings beside the common ones.
_ARCHITECTURES: Final[tuple[tuple[str, str, str, dict[str, Any]], ...]] = (
    ("llama", "LlamaConfig", "CausalLM", _GROUPED),
    ("mistral", "MistralConfig", "CausalLM", _GROUPED),
    ("qwen2", "Qwen2Config", "CausalLM", _GROUPED),
    ("qwen3", "Qwen3Config", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("gemma", "GemmaConfig", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("gemma2", "Gemma2Config", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("phi", "PhiConfig", "CausalLM", {}),
    ("phi3", "Phi3Config", "CausalLM", {**_GROUPED, "pad_token_id": 0}),
    ("gpt_neox", "GPTNeoXConfig", "CausalLM", {}),
    ("stablelm", "StableLmConfig", "CausalLM", _GROUPED),
    ("cohere", "CohereConfig", "CausalLM", _GROUPED),
    ("olmo", "OlmoConfig", "CausalLM", _GROUPED),
    ("olmo2", "Olmo2Config", "CausalLM", _GROUPED),
    ("granite", "GraniteConfig", "CausalLM", _GROUPED),
    ("starcoder2", "Starcoder2Config", "CausalLM", _GROUPED),
    ("mixtral", "MixtralConfig", "CausalLM", {**_GROUPED, "num_local_experts": 4}),
    ("gpt2", "GPT2Config", "CausalLM", {_ALONE: True, **_GPT2}),
    (
        "bloom",
        "BloomConfig",
        "CausalLM",
        {
            _ALONE: True,
            "hidden_size": 128,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 512,
        },
    ),
    (
        "opt",
        "OPTConfig",
        "CausalLM",
        {
            _ALONE: True,
            "hidden_size": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 512,
            "word_embed_proj_dim": 128,
        },
    ),
    ("bert", "BertConfig", "SequenceClassification", {}),
    ("roberta", "RobertaConfig", "SequenceClassification", {}),
    ("electra", "ElectraConfig", "SequenceClassification", {"embedding_size": 64}),
    (
        "distilbert",
        "DistilBertConfig",
        "SequenceClassification",
        {
            _ALONE: True,
            "dim": 128,
            "hidden_dim": 512,
            "n_layers": 2,
            "n_heads": 4,
            "vocab_size": 512,
        },
    ),
    ("albert", "AlbertConfig", "SequenceClassification", {"embedding_size": 64}),
    ("mpnet", "MPNetConfig", "SequenceClassification", {}),
    ("deberta_v2", "DebertaV2Config", "SequenceClassification", {}),
    (
        "xlnet",
        "XLNetConfig",
        "SequenceClassification",
        {
            _ALONE: True,
            "d_model": 128,
            "n_layer": 2,
            "n_head": 4,
            "d_inner": 512,
            "vocab_size": 512,
        },
    ),
    (
        "modernbert",
        "ModernBertConfig",
        "SequenceClassification",
        {
            "pad_token_id": 0,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    (
        "t5",
        "T5Config",
        "Seq2SeqLM",
        {
            _ALONE: True,
            "d_model": 128,
            "d_ff": 256,
            "d_kv": 32,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": 512,
            "decoder_start_token_id": 0,
        },
    ),
    (
        "bart",
        "BartConfig",
        "Seq2SeqLM",
        {
            _ALONE: True,
            "d_model": 128,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 256,
            "decoder_ffn_dim": 256,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "vocab_size": 512,
        },
    ),
    ("gptj", "GPTJConfig", "CausalLM", {_ALONE: True, **_GPT2, "rotary_dim": 16}),
    ("codegen", "CodeGenConfig", "CausalLM", {_ALONE: True, **_GPT2, "rotary_dim": 16}),
    ("gpt_bigcode", "GPTBigCodeConfig", "CausalLM", {_ALONE: True, **_GPT2}),
    ("falcon", "FalconConfig", "CausalLM", {}),
    (
        "mpt",
        "MptConfig",
        "CausalLM",
        {_ALONE: True, "d_model": 128, "n_heads": 4, "n_layers": 2, "vocab_size": 512},
    ),
    ("persimmon", "PersimmonConfig", "CausalLM", {}),
    ("nemotron", "NemotronConfig", "CausalLM", _GROUPED),
    ("glm", "GlmConfig", "CausalLM", {**_GROUPED, "head_dim": 32, "pad_token_id": 0}),
    ("glm4", "Glm4Config", "CausalLM", {**_GROUPED, "head_dim": 32, "pad_token_id": 0}),
    ("smollm3", "SmolLM3Config", "CausalLM", {**_GROUPED, "pad_token_id": 0}),
    ("olmo3", "Olmo3Config", "CausalLM", {**_GROUPED, "pad_token_id": 0}),
    ("helium", "HeliumConfig", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("gemma3", "Gemma3TextConfig", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("ernie4_5", "Ernie4_5Config", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("cohere2", "Cohere2Config", "CausalLM", _GROUPED),
    ("seed_oss", "SeedOssConfig", "CausalLM", {**_GROUPED, "head_dim": 32}),
    ("arcee", "ArceeConfig", "CausalLM", _GROUPED),
    ("camembert", "CamembertConfig", "SequenceClassification", {}),
    ("xlm_roberta", "XLMRobertaConfig", "SequenceClassification", {}),
    ("rembert", "RemBertConfig", "SequenceClassification", {}),
    ("megatron_bert", "MegatronBertConfig", "SequenceClassification", {}),
    ("ernie", "ErnieConfig", "SequenceClassification", {}),
    ("roformer", "RoFormerConfig", "SequenceClassification", {}),
    ("layoutlm", "LayoutLMConfig", "SequenceClassification", {}),
)


def groups() -> list[str]:
    """Return every architecture."""
    return [each[0] for each in _ARCHITECTURES]


def cases(group: str) -> Iterator[Case]:
    """Yield ways of attention and types."""
    for attention, dtype in itertools.product(_ATTENTION, _DTYPES):
        words = f"{attention} {dtype}"
        mark = mark_of(group, words)
        run = partial(_run, group, attention, getattr(torch, dtype))
        yield Case(words, mark, run)


def mark_of(group: str, words: str) -> int:
    """Return the mark of a case of an architecture."""
    _config, _use, settings = _architecture(group)
    return zlib.crc32(f"{words} {sorted(settings.items())}".encode())


def use_of(group: str) -> str:
    """Return what an architecture is used for: ``"CausalLM"``, …."""
    return _architecture(group)[1]


def _architecture(group: str) -> tuple[str, str, dict[str, Any]]:
    """Return an architecture's class of settings, its use and its settings."""
    _name, config, use, settings = next(
        each for each in _ARCHITECTURES if each[0] == group
    )
    own = {key: value for key, value in settings.items() if key != _ALONE}
    return config, use, own if _ALONE in settings else {**_SIZES, **own}


def build(group: str, attention: str, dtype: torch.dtype) -> Any:
    """Build an architecture's model on the card."""
    import transformers

    config, use, settings = _architecture(group)
    auto = getattr(transformers, f"AutoModelFor{use}")
    made = getattr(transformers, config)(**settings)
    return auto.from_config(made, attn_implementation=attention, dtype=dtype).to("cuda")


def _run(group: str, attention: str, dtype: torch.dtype, notes: Notes) -> None:
    """Run one case."""
    with without_values():
        with notes.phase("load"):
            model = build(group, attention, dtype)
        _steps(model, use_of(group), notes)


def _steps(model: Any, use: str, notes: Notes) -> None:
    tokens = torch.ones(TOKENS, dtype=torch.long).cuda()
    given: dict[str, Any] = {"input_ids": tokens}
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    labels = tokens
    if use == "SequenceClassification":
        labels = torch.ones(2, dtype=torch.long).cuda()
    model.eval()
    with notes.phase("forward"), torch.no_grad():
        result = model(**given, **({"labels": labels} if use == "Seq2SeqLM" else {}))
    del result
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (1, 2):
        with notes.phase(f"forward {step}"):
            loss = model(**given, labels=labels).loss
        with notes.phase(f"backward {step}"):
            loss.backward()
        with notes.phase(f"step {step}"):
            optimizer.step()
        with notes.phase(f"zeroed {step}"):
            optimizer.zero_grad()
            del loss


def without_values() -> Any:
    """Have transformers ask no tensor of a card for its values.

    Nothing computes them on the substitute, and a card without values has none: a mask
    hides nothing, positions are those of one sequence.
    """
    from transformers import masking_utils, modeling_utils

    names = ("_ignore_bidirectional_mask_sdpa", "_ignore_causal_mask_sdpa")
    patches: dict[str, Any] = {
        name: lambda *_args, **_options: True
        for name in names
        if hasattr(masking_utils, name)
    }
    if hasattr(masking_utils, "find_packed_sequence_indices"):
        patches["find_packed_sequence_indices"] = lambda *_args, **_options: None
    warnings.simplefilter("ignore")
    stack = ExitStack()
    stack.enter_context(mock.patch.multiple(masking_utils, **patches))
    warning = "warn_if_padding_and_no_attention_mask"
    patch: dict[str, Any] = {warning: lambda *_args: None}
    stack.enter_context(mock.patch.multiple(modeling_utils.PreTrainedModel, **patch))
    return stack
