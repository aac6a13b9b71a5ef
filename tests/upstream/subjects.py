"""The models that ``architectures`` runs: of each library, by what it says of itself."""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Modules that every child would import again.
ALL_USE: Final = (
    "transformers.generation.utils",
    "transformers.models.llama.modeling_llama",
    "transformers.models.vit.modeling_vit",
)


@dataclass
class Subject:
    """A model to run.

    Attributes:
        family: The library.
        name: The model's name.
        make: Yields models, each with inputs that may fit; the first that run do.
    """

    family: str
    name: str
    make: Callable[[], Iterator[tuple[torch.nn.Module, dict[str, Any]]]]


def _of_transformers() -> Iterator[Subject]:
    import shrunk

    for name in ALL_USE:
        importlib.import_module(name)
    for each in shrunk.architectures():

        def make(each: Any = each) -> Iterator[tuple[Any, Any]]:
            errors = []
            for rules in (shrunk.NARROW, shrunk.SHALLOW):
                try:
                    model = shrunk.build(each, rules)
                except Exception as error:  # noqa: BLE001  # try another way
                    errors.append(error)
                    continue
                for inputs in shrunk.inputs_for(model):
                    yield model, inputs
            if errors:
                raise errors[0]

        yield Subject("transformers", each.class_name, make)


def _images(*sides: int) -> Iterator[dict[str, Any]]:
    """Yield batches of images, by the name of a model's first argument."""
    for side in sides:
        generator = torch.Generator().manual_seed(1)
        yield {"x": torch.randn(2, 3, side, side, generator=generator)}


class _FirstArgument(torch.nn.Module):
    """A model whose first argument has one name whatever the model calls it."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        """Call the model."""
        return self.model(x)


def _of_timm() -> Iterator[Subject]:
    """Yield the smallest model of each of timm's modules."""
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if not names:
            continue

        def make(names: list[str] = names) -> Iterator[tuple[Any, Any]]:
            def size(name: str) -> float:
                try:
                    with torch.device("meta"):
                        model = timm.create_model(name)
                except Exception:  # noqa: BLE001  # not made to be built so
                    return math.inf
                return float(sum(each.numel() for each in model.parameters()))

            # Those whose names are shortest are near the smallest; a few are looked at.
            likely = sorted(
                names, key=lambda each: (not _sounds_small(each), len(each))
            )
            name = min(likely[:6], key=size)
            torch.manual_seed(0)
            model = timm.create_model(name, num_classes=7).eval()
            side = model.default_cfg["input_size"][-1]
            for inputs in _images(side):
                yield _FirstArgument(model), inputs

        yield Subject("timm", module, make)


def _sounds_small(name: str) -> bool:
    return any(
        each in name
        for each in ("tiny", "nano", "atto", "xxs", "pico", "small", "18", "_050", "b0")
    )


def _of_torchvision() -> Iterator[Subject]:
    """Yield the smallest model of each of torchvision's modules."""
    import torchvision

    modules: dict[str, list[str]] = {}
    for name in torchvision.models.list_models():
        builder = torchvision.models.get_model_builder(name)
        modules.setdefault(builder.__module__, []).append(name)
    for module, names in modules.items():

        def make(names: list[str] = names) -> Iterator[tuple[Any, Any]]:
            sizes = {}
            for name in names:
                with torch.device("meta"):
                    model = torchvision.models.get_model(
                        name, weights=None, **_no_backbone(name)
                    )
                sizes[name] = sum(each.numel() for each in model.parameters())
            name = min(sizes, key=lambda each: sizes[each])
            torch.manual_seed(0)
            model = torchvision.models.get_model(
                name, weights=None, **_no_backbone(name)
            ).eval()
            for inputs in _images(64, 224, 299):
                yield _FirstArgument(model), inputs
            generator = torch.Generator().manual_seed(1)
            clip = torch.randn(1, 3, 16, 112, 112, generator=generator)
            yield _FirstArgument(model), {"x": clip}
            yield (
                _FirstArgument(model),
                {"x": torch.randn(1, 3, 16, 224, 224, generator=generator)},
            )
            yield _Pair(model), {"x": torch.randn(1, 3, 128, 128, generator=generator)}

        yield Subject("torchvision", module.removeprefix("torchvision.models."), make)


class _Pair(torch.nn.Module):
    """A model of two images."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> Any:
        """Call the model with an image and its mirror image."""
        return self.model(x, x.flip(-1))


def _no_backbone(name: str) -> dict[str, Any]:
    is_whole = any(
        each in name
        for each in ("rcnn", "ssd", "retinanet", "fcos", "fcn_", "deeplab", "lraspp")
    )
    return {"weights_backbone": None} if is_whole else {}


#: What diffusers' blocks need beside their sizes, by the names of their parameters.
BLOCK: Final = {
    "in_channels": 32,
    "out_channels": 32,
    "prev_output_channel": 32,
    "temb_channels": 128,
    "num_layers": 1,
    "resnet_groups": 8,
    "norm_num_groups": 8,
    "groups": 8,
    "cross_attention_dim": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "attn_num_heads": 2,
    "mid_channels": 32,
    "dim": 32,
    "hidden_size": 32,
    "channels": 32,
    "query_dim": 32,
    "time_embedding_dim": 128,
    "add_downsample": True,
    "add_upsample": True,
    "embedding_dim": 32,
    "num_embeddings": 16,
    "heads": 2,
    "dim_head": 16,
}
BLOCK_MODULES: Final = (
    "diffusers.models.unets.unet_2d_blocks",
    "diffusers.models.unets.unet_1d_blocks",
    "diffusers.models.unets.unet_3d_blocks",
    "diffusers.models.attention",
    "diffusers.models.resnet",
    "diffusers.models.downsampling",
    "diffusers.models.upsampling",
    "diffusers.models.normalization",
    "diffusers.models.activations",
    "diffusers.models.embeddings",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.transformers.transformer_2d",
    "diffusers.models.transformers.transformer_temporal",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.transformers.pixart_transformer_2d",
    "diffusers.models.autoencoders.vae",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.autoencoders.autoencoder_dc",
)


def _block_inputs(block: torch.nn.Module) -> Iterator[dict[str, Any]]:
    """Yield inputs that may fit a block, by the names of its forward's parameters."""
    names = inspect.signature(block.forward).parameters
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    embedded = {
        "temb": normal(2, 128),
        "encoder_hidden_states": normal(2, 6, 32),
        "timestep": torch.tensor([3, 7]),
        "emb": normal(2, 128),
        "conditioning_embedding": normal(2, 32),
        "num_frames": 2,
        "image_only_indicator": torch.zeros(1, 2),
        "batch_size": 2,
    }
    needed = [
        name
        for name, each in names.items()
        if each.default is inspect.Parameter.empty
        and each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    first = needed[0] if needed else next(iter(names), "x")
    for main in (
        normal(2, 32, 8, 8),
        normal(2, 6, 32),
        normal(2, 32, 8),
        normal(2, 32, 2, 8, 8),
        normal(2, 32),
        normal(2, 3, 16, 16),
        torch.tensor([3, 7]),
    ):
        some = {
            name: each
            for name, each in embedded.items()
            if name in names and name != first
        }
        few = {name: each for name, each in some.items() if name in needed}
        for rest in (
            some,
            few,
            {**some, "temb": normal(2, 32)} if "temb" in names else {},
        ):
            given = {first: main, **rest}
            if "res_hidden_states_tuple" in names:
                given["res_hidden_states_tuple"] = (normal(*main.shape),) * 3
            yield given


def _of_diffusers() -> Iterator[Subject]:
    """Yield the blocks and small models of diffusers that their sizes alone build."""
    seen: set[str] = set()
    for path in BLOCK_MODULES:
        module = importlib.import_module(path)
        for name, kind in vars(module).items():
            is_block = inspect.isclass(kind) and issubclass(kind, torch.nn.Module)
            if not is_block or kind.__module__ != path or name in seen:
                continue
            seen.add(name)

            def make(kind: Any = kind) -> Iterator[tuple[Any, Any]]:
                wants = inspect.signature(kind.__init__).parameters
                options = {key: value for key, value in BLOCK.items() if key in wants}
                for odd in ({}, {"temb_channels": None}, {"temb_channels": 32}):
                    if odd and "temb_channels" not in wants:
                        continue
                    torch.manual_seed(0)
                    block = kind(**{**options, **odd}).eval()
                    for inputs in _block_inputs(block):
                        yield block, inputs

            yield Subject("diffusers", name, make)


FAMILIES: Final = {
    "transformers": _of_transformers,
    "diffusers": _of_diffusers,
    "timm": _of_timm,
    "torchvision": _of_torchvision,
}
