"""sentence-transformers and peft find models that are served under their hub names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from sentence_transformers import CrossEncoder, SentenceTransformer
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.hub_model("bert-tiny-uncased", source="bert-tiny"),
    pytest.mark.hub_model("my-org/llama", source="llama-tiny"),
    # sentence-transformers warns of a model that is no sentence transformer.
    pytest.mark.filterwarnings("ignore"),
]


@pytest.mark.parametrize("name", ["bert-tiny-uncased", "google-bert/bert-tiny-uncased"])
def test_a_sentence_is_encoded(name: str) -> None:
    """With a pooling of its own, as of any model without one."""
    assert SentenceTransformer(name).encode("a sentence").shape == (128,)


@pytest.mark.hub_model("bert-tiny-uncased", architecture="AutoModel")
def test_pairs_are_scored() -> None:
    """With a head of its own."""
    encoder = CrossEncoder("bert-tiny-uncased", num_labels=1)

    assert encoder.predict([("a", "b")]).shape == (1,)


def test_an_adapter_finds_its_base(tmp_path: Path) -> None:
    """By the name that it was saved with."""
    base = AutoModelForCausalLM.from_pretrained("my-org/llama")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(
        tmp_path
    )

    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)

    assert loaded.peft_config["default"].base_model_name_or_path == "my-org/llama"
