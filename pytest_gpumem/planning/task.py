"""Runs the tasks of a model on a card: load, forward, generate and train."""

from __future__ import annotations

import inspect
import sys
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch

from pytest_gpumem.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.checkpoints.models import ModelSpec
    from pytest_gpumem.planning.kinds import PeakByKind

TASKS: Final = ("load", "forward", "generate", "train")
OPTIMIZERS: Final[dict[str, Callable[..., torch.optim.Optimizer]]] = {
    "adamw": torch.optim.AdamW,
    "adamw-fused": lambda given: torch.optim.AdamW(given, fused=True),
    "sgd": lambda given: torch.optim.SGD(given, lr=0.1),
    "sgd-momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9),
}
DTYPES: Final = ("float32", "bfloat16", "float16")
#: The function of transformers 4 that reads the inputs to decide on a warning.
_WARNING: Final = "warn_if_padding_and_no_attention_mask"
#: The function of transformers that reads values to see whether a row holds several texts.
#: Here each row is one text.
_PACKED: Final = "transformers.masking_utils.find_packed_sequence_indices"
#: The function of transformers 4 that reads a mask to see whether rows are padded; it
#: returns None if no row is padded. Here no row is padded.
_PADDED: Final = "_prepare_4d_attention_mask_for_sdpa"
#: A training step is run twice, because the first step makes the optimiser's state.
_STEPS: Final = 2


@dataclass(frozen=True, slots=True)
class FitTask:
    """One task of a model.

    Attributes:
        kind: One of ``TASKS``.
        batch: Rows, at least 1.
        seq: Tokens in a row, at least 1; models of images do not use it.
        new_tokens: Tokens that ``generate`` adds, at least 1.
        dtype: The dtype of the weights and of the computation.
        optimizer: One of ``OPTIMIZERS``, for ``train``.
        checkpointing: Whether ``train`` computes activations again (gradient
            checkpointing).
        attention: ``"sdpa"``, where the model has it, or ``"eager"``, as in transformers.

    Raises:
        PlanError: A value is not accepted.
    """

    kind: str = "forward"
    batch: int = 1
    seq: int = 128
    new_tokens: int = 32
    dtype: str = "float32"
    optimizer: str = "adamw"
    checkpointing: bool = False
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        accepted: dict[str, tuple[str, ...]] = {
            "kind": TASKS,
            "dtype": DTYPES,
            "optimizer": tuple(OPTIMIZERS),
            "attention": ("sdpa", "eager"),
        }
        for name, values in accepted.items():
            value = getattr(self, name)
            if value not in values:
                raise PlanError(
                    f"{name}={value!r}; accepted are {', '.join(values)}", value=value
                )
        for name in ("batch", "seq", "new_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise PlanError(f"{name}={value!r}; give 1 or more", value=value)

    def with_batch(self, batch: int) -> FitTask:
        """Return the same task with another number of rows."""
        return replace(self, batch=batch)

    def describe(self) -> str:
        """Return the task in words."""
        parts = [self.kind]
        if self.kind != "load":
            parts.append(f"batch {self.batch} x {self.seq} tokens")
        if self.kind == "generate":
            parts.append(f"{self.new_tokens} new tokens")
        if self.kind == "train":
            parts.append(self.optimizer)
            parts += ["gradient checkpointing"] if self.checkpointing else []
        return ", ".join([*parts, self.dtype])


def run_task(spec: ModelSpec, task: FitTask, kinds: PeakByKind) -> None:
    """Run a task of a model on the active simulated card, without values.

    Raises:
        PlanError: The model cannot do the task, or takes inputs that are not known here.
        torch.OutOfMemoryError: The card has no room; ``kinds.stage`` is the stage.
    """
    model = build(spec, task)
    made: dict[int, torch.Tensor] = {}

    def on_card(weight: torch.Tensor) -> torch.Tensor:
        # A weight that several modules share is created once, because ``to("cuda")`` moves
        # it once. A module that several others contain is visited by each of them.
        if weight.is_cuda:
            return weight
        if id(weight) not in made:
            made[id(weight)] = torch.empty_like(weight, device="cuda")
        return made[id(weight)]

    model._apply(on_card)  # noqa: SLF001  # the method that Module.to and to_empty call
    made.clear()
    model.tie_weights()
    for module in model.modules():
        if hasattr(module, _WARNING):
            setattr(module, _WARNING, lambda *_inputs: None)
    kinds.mark("weights", [*model.parameters(), *model.buffers()])
    if task.kind == "load":
        return
    inputs = _inputs(model, task)
    kinds.mark("inputs", inputs)
    with _whole_rows(model):
        if task.kind == "train":
            _train(model, inputs, task, kinds)
            return
        model.eval()
        with torch.no_grad():
            if task.kind == "forward":
                kinds.stage = "forward"
                model(**inputs)
            else:
                _generate(model, inputs, task, kinds)


@contextmanager
def _whole_rows(model: Any) -> Iterator[None]:
    """Replace functions of transformers that read the inputs: a row is one whole text."""
    modules = {sys.modules[type(each).__module__] for each in model.modules()}
    with ExitStack() as stack:
        stack.enter_context(mock.patch(_PACKED, _no_mask))
        for module in modules:
            if hasattr(module, _PADDED):
                stack.enter_context(mock.patch.object(module, _PADDED, _no_mask))
        yield


def _no_mask(*_args: object, **_kwargs: object) -> None:
    """Return None; a mock object would keep its arguments alive."""


def build(spec: ModelSpec, task: FitTask) -> Any:
    """Return the model without a device, with shapes only.

    Raises:
        PlanError: transformers cannot build the model.
    """
    import transformers

    kind = spec.config_dict["model_type"]
    entries = {k: v for k, v in spec.config_dict.items() if k != "model_type"}
    dtype = getattr(torch, task.dtype)
    try:
        config = transformers.AutoConfig.for_model(kind, **entries)
        if task.attention != "sdpa":  # otherwise transformers chooses
            config._attn_implementation = task.attention  # noqa: SLF001  # from_config sets it in the same way
        maker: Any = getattr(transformers, spec.architecture or "AutoModel", None)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                auto = spec.architecture is None
                return maker.from_config(config) if auto else maker(config)
        finally:
            torch.set_default_dtype(before)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise PlanError(
            f"{spec.name} cannot be built with transformers "
            f"{transformers.__version__}: {error}",
            value=spec.name,
        ) from error


def _inputs(model: Any, task: FitTask) -> dict[str, torch.Tensor]:
    config = model.config
    name = model.main_input_name
    if name == "pixel_values":
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        dtype = getattr(torch, task.dtype)
        image = (task.batch, config.num_channels, height, width)
        return {name: torch.empty(image, dtype=dtype, device="cuda")}
    if name != "input_ids":
        raise PlanError(
            f"{type(model).__name__} takes {name!r}; known are models that take "
            "input_ids (text) or pixel_values (images)",
            value=name,
        )
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < task.seq:
        raise PlanError(
            f"seq={task.seq}: {type(model).__name__} has {longest} positions; give fewer",
            value=task.seq,
        )
    shape = (task.batch, task.seq)
    inputs = {name: torch.empty(shape, dtype=torch.int64, device="cuda")}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.empty_like(inputs[name])
    return inputs


def _loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the loss of a language model or classifier; otherwise the output's sum."""
    labels = None
    name = type(model).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel", "ForMaskedLM")):
        labels = inputs["input_ids"]
    elif name.endswith("ForConditionalGeneration"):
        labels = inputs.get("decoder_input_ids")
    elif name.endswith("Classification") and "Token" not in name:
        rows = next(iter(inputs.values())).shape[0]
        labels = torch.empty(rows, dtype=torch.int64, device="cuda")
    if labels is None:
        output = model(**inputs)
        found: torch.Tensor = output[0]
        return found.float().sum()
    loss: torch.Tensor = model(**inputs, labels=labels).loss
    return loss


def _train(
    model: Any,
    inputs: dict[str, torch.Tensor],
    task: FitTask,
    kinds: PeakByKind,
) -> None:
    model.train()
    if task.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise PlanError(
                f"{type(model).__name__} has no gradient checkpointing", value=True
            )
        # The first is the name since transformers 5.20, the second the name before.
        for name in (
            "activation_checkpointing_enable",
            "gradient_checkpointing_enable",
        ):
            if hasattr(model, name):
                getattr(model, name)({"use_reentrant": False})
                break
    model.config.use_cache = False
    optimizer = OPTIMIZERS[task.optimizer](model.parameters())
    for number in range(_STEPS):
        step = "" if not number else ", second step"
        kinds.stage = f"forward{step}"
        loss = _loss(model, inputs)
        kinds.stage = f"backward{step}"
        loss.backward()
        kinds.mark("gradients", [each.grad for each in model.parameters()])
        kinds.stage = f"optimiser{step}"
        optimizer.step()
        kinds.mark(
            "optimiser", [list(each.values()) for each in optimizer.state.values()]
        )
        optimizer.zero_grad()
        del loss


def _generate(
    model: Any,
    inputs: dict[str, torch.Tensor],
    task: FitTask,
    kinds: PeakByKind,
) -> None:
    """Run the prompt, then add one token after another to the cache.

    ``generate`` itself is not called, because it reads values of logits, which do not
    exist here.
    """
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise PlanError(
            f"{type(model).__name__} generates no text from a prompt alone; give a "
            "model whose class ends with ForCausalLM",
            value=type(model).__name__,
        )
    # From transformers 5.24 on it is ``cache``, in ``forward`` and in what that returns.
    is_new = "cache" in inspect.signature(model.forward).parameters
    name = "cache" if is_new else "past_key_values"
    kinds.stage = "prompt"
    output = model(**inputs, use_cache=True, logits_to_keep=1)
    for number in range(task.new_tokens):
        cache = getattr(output, name)
        kinds.mark("cache", [[each.keys, each.values] for each in cache.layers])
        kinds.stage = f"token {number + 1}"
        token = torch.empty(task.batch, 1, dtype=torch.int64, device="cuda")
        output = model(input_ids=token, use_cache=True, **{name: cache})
