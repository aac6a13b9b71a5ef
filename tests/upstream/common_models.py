"""transformers' common tests of models, which its source has, over small models of ours.

The classes of tests that use them, one for each architecture, are not in the released
source. A few stand here: the tests are theirs, the small models come from ``shrunk``.
"""

from __future__ import annotations

import unittest
from typing import Any

import shrunk
import transformers
from tests.test_modeling_common import ModelTesterMixin  # of the unpacked source
from transformers.testing_utils import torch_device


class SmallModels:
    """What a class of common tests asks for models and inputs.

    Args:
        test: The test.
        model_type: The configuration's name for the architecture.
        classes: Its classes, the plain one first.
    """

    is_training = True
    batch_size = shrunk.BATCH
    seq_length = shrunk.LENGTH
    num_hidden_layers = 2
    num_choices = 2

    def __init__(self, test: Any, model_type: str, classes: tuple[type, ...]) -> None:
        self.parent = test
        self._architecture = shrunk.Architecture(model_type, classes[0].__name__)
        config = self.get_config()
        self.hidden_size = getattr(config, "hidden_size", 32)
        self.num_attention_heads = getattr(config, "num_attention_heads", 4)
        self.vocab_size = getattr(config, "vocab_size", shrunk.VOCABULARY)
        self.image_size = getattr(config, "image_size", 32)
        self.patch_size = getattr(config, "patch_size", 16)
        self.encoder_seq_length = self.decoder_seq_length = shrunk.LENGTH
        if getattr(config, "is_encoder_decoder", False):
            self.decoder_seq_length = shrunk.WRITTEN
        if self._inputs is None:
            raise ValueError(f"no inputs fit {self._architecture.class_name}")
        if "pixel_values" in self._inputs:
            self.seq_length = (self.image_size // self.patch_size) ** 2 + 1
            self.encoder_seq_length = self.seq_length

    def get_config(self) -> Any:
        """Return a small configuration."""
        model = shrunk.build(self._architecture, shrunk.NARROW)
        self._inputs = next(shrunk.inputs_for(model), None)
        return model.config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Return a small configuration and inputs on the tests' device."""
        config = self.get_config()
        assert self._inputs is not None
        return config, {k: v.to(torch_device) for k, v in self._inputs.items()}


class Common(ModelTesterMixin):  # type: ignore[misc]  # untyped
    """The common tests but for those of generation, which the source lacks."""

    all_generative_model_classes = ()
    # More than half of these models may be one block, which is on one device. With the
    # first share, a card and the host together must be too small for the model.
    model_split_percents = (0.4, 0.85, 0.9)


class BertTest(Common, unittest.TestCase):
    """An encoder."""

    all_model_classes = (
        transformers.BertModel,
        transformers.BertForMaskedLM,
        transformers.BertForSequenceClassification,
    )

    def setUp(self) -> None:
        """Make what the tests ask for."""
        self.model_tester = SmallModels(self, "bert", self.all_model_classes)


class LlamaTest(Common, unittest.TestCase):
    """A decoder."""

    all_model_classes = (transformers.LlamaModel, transformers.LlamaForCausalLM)

    def setUp(self) -> None:
        """Make what the tests ask for."""
        self.model_tester = SmallModels(self, "llama", self.all_model_classes)


class T5Test(Common, unittest.TestCase):
    """An encoder and a decoder that share their embeddings."""

    all_model_classes = (
        transformers.T5Model,
        transformers.T5ForConditionalGeneration,
    )
    is_encoder_decoder = True

    def setUp(self) -> None:
        """Make what the tests ask for."""
        self.model_tester = SmallModels(self, "t5", self.all_model_classes)


class ViTTest(Common, unittest.TestCase):
    """A model of images."""

    all_model_classes = (
        transformers.ViTModel,
        transformers.ViTForImageClassification,
    )
    test_resize_embeddings = False

    def setUp(self) -> None:
        """Make what the tests ask for."""
        self.model_tester = SmallModels(self, "vit", self.all_model_classes)
