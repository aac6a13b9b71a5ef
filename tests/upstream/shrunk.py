"""Small models of every architecture of transformers, by rules that know none of them.

A configuration is made small by the names and values of its fields: widths, depths,
vocabularies, experts. What comes out is tried, not trusted: there are several ways to
shrink and several inputs, and the first with which the model runs on the CPU is taken.
"""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

BATCH: Final = 2
LENGTH: Final = 12
#: Tokens that a decoder beside an encoder gets.
WRITTEN: Final = 5
VOCABULARY: Final = 128
#: The most parameters that a small model may have.
MOST_PARAMETERS: Final = 40_000_000

#: The fields of a configuration that say how wide, how deep, how many: the first
#: expression that fits a field's whole name gives its new value. 0 leaves it as it is.
NARROW: Final = (
    (r".*vocab_size.*|vocabulary_size|num_codebook_vectors", VOCABULARY),
    (r".*(num|n)_(key_value|kv)_heads|.*num_kv_heads", 2),
    (r".*(num|n)_.*heads?|.*heads", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|(.*_)?head_dim|d_kv|d_head", 8),
    (r"qk_head_dim|q_lora_rank|kv_lora_rank|.*_lora_rank", 16),
    (r"(.*_)?(num|n)_layers?|(.*_)?(num|n)_.*_layers|.*_layers|layers|.*depth", 2),
    (r"num_hidden_groups|num_feature_levels", 0),
    (r"n_group", 2),
    (r"topk_group", 1),
    (r".*(num|n)_.*experts_per_tok|.*top_?k", 2),
    (r".*(num|n)_(.*_)?experts|.*num_local_experts|moe_num_experts", 4),
    (r".*(intermediate|ffn|feedforward|mlp|ff)_?(hidden_)?(size|dim)|d_ff|n_inner", 64),
    (r".*(hidden|embed(ding)?|model|projection)_?(size|dim)s?|d_model|dim|n_embd", 32),
    (r"(.*_)?(width|hidden_channels)", 32),
)

#: Fields that say how deep alone: they are small wherever they are not too small.
SHALLOW: Final = (
    (r".*vocab_size.*|vocabulary_size", VOCABULARY),
    (r"(.*_)?(num|n)_layers?|(.*_)?(num|n)_.*_layers|.*_layers|layers|.*depth", 2),
    (r".*(num|n)_(.*_)?experts|.*num_local_experts|moe_num_experts", 4),
    (r".*(num|n)_.*experts_per_tok", 2),
)


def _rule(name: str, rules: tuple[tuple[str, int], ...]) -> int:
    return next((new for rule, new in rules if re.fullmatch(rule, name)), 0)


def _list(name: str, value: list[Any], rules: tuple[tuple[str, int], ...]) -> list[Any]:
    """Make the entries of a list small, and keep what they are to each other."""
    if not value or not all(type(each) is int for each in value):
        return value
    if re.search(r"depths?|layers|num_blocks", name):
        return [min(each, 1) for each in value]
    if rules is NARROW and re.search(r"(hidden|embed|dim|channel|width)", name):
        first = value[0]
        if first > 16 and all(each % (first // 16) == 0 for each in value):
            return [each // (first // 16) for each in value]
    return value


def _number(config: Any, name: str, value: int, rules: Any) -> int:
    """Return the new value of a field that is a whole number."""
    if re.fullmatch(r"(pad|bos|eos|sep|cls|mask|unk|decoder_start)_token_id", name):
        return min(value, 2)
    if re.fullmatch(r".*_token_(id|index)", name):
        # Each kind has a token of its own.
        return min(value, VOCABULARY - 1 - sum(map(ord, name)) % 40)
    new = _rule(name, rules)
    if "key_value" in name and value == getattr(config, "num_attention_heads", 0):
        new = 4  # one for each head, as before
    return min(value, new) if new else value


def _entries(config: Any, name: str, value: Any, rules: Any) -> Any:
    """Return the new value of a field that is a list."""
    entries = _list(name, list(value), rules)
    depth = getattr(config, "num_hidden_layers", 0) or 0
    is_words = all(isinstance(each, str) for each in entries)
    if is_words and depth > 2 and len(entries) == depth:
        # The kind of each layer: the first and the last may differ.
        entries = [entries[0], entries[-1]]
    return type(value)(entries)


def shrink(config: PretrainedConfig, rules: tuple[tuple[str, int], ...]) -> Any:
    """Return a small configuration of a class from its default one.

    Args:
        config: The default configuration.
        rules: ``NARROW`` or ``SHALLOW``.
    """
    kind = type(config)
    own = inspect.signature(kind.__init__).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in own.values())
    settings: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name.startswith("_") or name in {"architectures", "transformers_version"}:
            continue
        new = value
        if isinstance(value, transformers.PretrainedConfig):
            new = shrink(value, rules)
        elif type(value) is int and value > 1:
            new = _number(config, name, value, rules)
        elif isinstance(value, (list, tuple)):
            new = _entries(config, name, value, rules)
        if new is not value and new != value and (takes_any or name in own):
            settings[name] = new
    return kind(**settings)


class Architecture(NamedTuple):
    """A class of transformers that an automatic class leads to.

    Attributes:
        model_type: The configuration's name for it.
        class_name: The class.
    """

    model_type: str
    class_name: str


#: The automatic classes whose models also generate, and the plain one.
MAPPINGS: Final = (
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_TIME_SERIES_PREDICTION_MAPPING_NAMES",
)


def architectures() -> list[Architecture]:
    """Return every class that the automatic classes lead to, each once."""
    found: dict[str, Architecture] = {}
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, Architecture(model_type, name))
    return list(found.values())


def build(architecture: Architecture, rules: Any, seed: int = 0) -> Any:
    """Return a small model with random weights.

    Raises:
        ValueError: It would have more than ``MOST_PARAMETERS`` parameters.
    """
    default = transformers.CONFIG_MAPPING[architecture.model_type]()
    kind = getattr(transformers, architecture.class_name)
    if kind.config_class is not None and not isinstance(default, kind.config_class):
        default = kind.config_class()
    config = shrink(default, rules)
    with torch.device("meta"):
        size = sum(each.numel() for each in kind(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters are too many")
    torch.manual_seed(seed)
    model = kind(config).float().eval()
    # Some weights begin at 0 or 1, and hide what goes through them.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for each in model.parameters():
            if (
                each.is_floating_point()
                and each.numel() > 1
                and bool((each == each.flatten()[0]).all())
            ):
                each.add_(torch.randn(each.shape, generator=generator), alpha=0.02)
    return model


def _field(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first of these fields that a configuration or a part of it has."""
    parts = [
        config,
        *(
            p
            for p in vars(config).values()
            if isinstance(p, transformers.PretrainedConfig)
        ),
    ]
    for name in names:
        for part in parts:
            value = getattr(part, name, None)
            if value is not None:
                return value
    return default


def _image(config: Any) -> tuple[int, int, int]:
    size = _field(config, "image_size", "img_size", "input_size", default=64)
    if isinstance(size, dict):
        size = (size.get("height", 64), size.get("width", 64))
    if isinstance(size, int):
        size = (size, size)
    channels = _field(config, "num_channels", "in_channels", "in_chans", default=3)
    return int(channels), int(size[-2]), int(size[-1])


class _Drawn:
    """Inputs of each kind for a model, drawn in the same way each time."""

    def __init__(self, model: Any) -> None:
        self._config: Any = model.config
        self._generator = torch.Generator().manual_seed(1)
        self.names = inspect.signature(model.forward).parameters

    def normal(self, *shape: int) -> torch.Tensor:
        """Return numbers."""
        return torch.randn(*shape, generator=self._generator)

    def words(self, length: int = LENGTH) -> torch.Tensor:
        """Return tokens, none of which is a special one."""
        most = min(int(_field(self._config, "vocab_size", default=0)) or 8, VOCABULARY)
        shape = (BATCH, length)
        return torch.randint(3, max(most // 2, 4), shape, generator=self._generator)

    def text(self) -> dict[str, torch.Tensor]:
        """Return what a model of text takes."""
        text: dict[str, torch.Tensor] = {}
        if "input_ids" in self.names:
            text["input_ids"] = self.words()
            if "attention_mask" in self.names:
                text["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
        is_pair = getattr(self._config, "is_encoder_decoder", False)
        if "decoder_input_ids" in self.names and is_pair:
            text["decoder_input_ids"] = self.words(WRITTEN)
        return text

    def by_name(self) -> dict[str, list[torch.Tensor]]:
        """Return shapes that may fit, by the name of the argument."""
        config, normal = self._config, self.normal
        channels, height, width = _image(config)
        frames = int(_field(config, "num_frames", "frames_per_clip", default=2))
        mels = int(_field(config, *MEL_FIELDS, default=80))
        steps = 2 * int(_field(config, "max_source_positions", default=32))
        length = int(_field(config, "max_length", default=64))
        context = int(_field(config, "context_length", default=32))
        variables = int(_field(config, "num_input_channels", "input_size", default=1))
        videos = [
            normal(BATCH, frames, channels, height, width),
            normal(BATCH, channels, frames, height, width),
        ]
        return {
            "pixel_values": [
                normal(BATCH, channels, height, width),
                normal(BATCH, channels, 64, 64),
                normal(BATCH, channels, 224, 224),
                *videos,
                normal(BATCH, 1, channels, height, width),
                normal(BATCH, 1, height, width),
            ],
            "pixel_values_videos": videos,
            "input_values": [
                normal(BATCH, 4000),
                normal(BATCH, 16000),
                normal(BATCH, length, mels),
                normal(BATCH, 1, 4000),
                normal(BATCH, 64, mels),
            ],
            "input_features": [
                normal(BATCH, mels, steps),
                normal(BATCH, 64, mels),
                normal(BATCH, 64, 2 * mels),
                normal(BATCH, 1, 64, mels),
                normal(BATCH, mels, 3000),
            ],
            "past_values": [
                normal(BATCH, context, variables),
                normal(BATCH, context),
            ],
        }

    def embedded(self) -> torch.Tensor:
        """Return what embeddings give."""
        return self.normal(BATCH, LENGTH, int(_field(self._config, "hidden_size")))


MEL_FIELDS: Final = (
    "num_mel_bins",
    "feature_size",
    "n_mels",
    "input_feat_per_channel",
    "num_mels",
)


def inputs_for(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that may fit a model, from the likeliest to the least likely."""
    drawn = _Drawn(model)
    text, by_name = drawn.text(), drawn.by_name()
    decoder = {k: v for k, v in text.items() if k == "decoder_input_ids"}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids" and text:
        yield text
    for each in by_name.get(main, []):
        yield {main: each}
        if decoder:
            yield {main: each, **decoder}
    if "bbox" in drawn.names:
        boxes = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
        yield {**text, "bbox": boxes}
        yield {**text, "bbox": boxes, "pixel_values": by_name["pixel_values"][0]}
    for name in (each for each in by_name if each in drawn.names):
        for each in by_name[name]:
            yield {name: each, **decoder}
            yield {**text, name: each}
    if text:
        yield text
    for name in ("inputs_embeds", "hidden_states"):
        if name in drawn.names and _field(model.config, "hidden_size"):
            yield {name: drawn.embedded()}
