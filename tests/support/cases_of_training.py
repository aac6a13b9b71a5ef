"""Autocast, checkpointing, clipping, scaling and averages, step by step."""

from __future__ import annotations

import zlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from recorded_requests import Case
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from allocator_requests import Notes

VALUES: Final = "none"
CARDS: Final = (("8.0", 108), ("7.5", 40))
_WIDTH: Final = 96
_TOKENS: Final = (2, 64)
_WORDS: Final = 500


class _Block(nn.Module):
    """Attention and two linear layers, as a transformer has them."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.project = nn.Linear(_WIDTH, 3 * _WIDTH)
        self.out = nn.Linear(_WIDTH, _WIDTH)
        self.wide = nn.Linear(_WIDTH, 4 * _WIDTH)
        self.narrow = nn.Linear(4 * _WIDTH, _WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        """Pass (batch, tokens, width)."""
        batch, tokens, _width = source.shape
        query, key, value = (
            each.view(batch, tokens, 3, 32).transpose(1, 2)
            for each in self.project(self.before(source)).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        mixed = mixed.transpose(1, 2).reshape(batch, tokens, _WIDTH)
        source = source + self.dropout(self.out(mixed))
        inner = functional.gelu(self.wide(self.after(source)))
        result: torch.Tensor = source + self.dropout(self.narrow(inner))
        return result


class _Model(nn.Module):
    """Two blocks between words and scores of words."""

    def __init__(self, dropout: float, recompute: str) -> None:
        super().__init__()
        self.words = nn.Embedding(_WORDS, _WIDTH)
        self.blocks = nn.ModuleList(_Block(dropout) for _ in range(2))
        self.scores = nn.Linear(_WIDTH, _WORDS)
        self.recompute = recompute

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the loss of guessing the tokens themselves."""
        inner = self.words(tokens)
        for block in self.blocks:
            if self.recompute:
                kind = self.recompute == "reentrant"
                inner = checkpoint(block, inner, use_reentrant=kind)
            else:
                inner = block(inner)
        scores = self.scores(inner).float()
        return functional.cross_entropy(scores.view(-1, _WORDS), tokens.view(-1))


class _Scaler(torch.amp.GradScaler):
    """A scaler that always steps: what it would look at is a value of the card's."""

    def _maybe_opt_step(
        self,
        optimizer: torch.optim.Optimizer,
        optimizer_state: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        del optimizer_state
        return optimizer.step(*args, **kwargs)


_SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "autocast to float16": {"autocast": torch.float16},
    "autocast to bfloat16": {"autocast": torch.bfloat16},
    "autocast without its cache": {"autocast": torch.bfloat16, "cache": False},
    "dropout": {"dropout": 0.1},
    "dropout in autocast": {"dropout": 0.1, "autocast": torch.float16},
    "checkpoints": {"recompute": "once"},
    "reentrant checkpoints": {"recompute": "reentrant"},
    "checkpoints with dropout": {"recompute": "once", "dropout": 0.1},
    "checkpoints in autocast": {"recompute": "once", "autocast": torch.bfloat16},
    "clipped norm": {"clip": "norm"},
    "clipped norm, one by one": {"clip": "norm", "foreach": False},
    "clipped values": {"clip": "value"},
    "clipped values, one by one": {"clip": "value", "foreach": False},
    "scaled": {"autocast": torch.float16, "scaled": True},
    "scaled and clipped": {"autocast": torch.float16, "scaled": True, "clip": "norm"},
    "two backwards for a step": {"accumulate": 2},
    "averaged weights": {"averaged": True},
}


def groups() -> list[str]:
    """Return the settings of a training."""
    return list(_SETTINGS)


def cases(group: str) -> Iterator[Case]:
    """Yield optimizers."""
    for name, options in {
        "AdamW": {},
        "AdamW one by one": {"foreach": False},
        "AdamW fused": {"fused": True},
        "SGD": {"momentum": 0.9},
    }.items():
        mark = zlib.crc32(f"{_SETTINGS[group]} {name}".encode())
        kind = getattr(torch.optim, name.partition(" ")[0])
        yield Case(name, mark, partial(_run, kind, options, _SETTINGS[group]))


def _run(kind: Any, options: Any, settings: dict[str, Any], notes: Notes) -> None:
    dropout = settings.get("dropout", 0.0)
    with notes.phase("load"):
        model = _Model(dropout, settings.get("recompute", ""))
        model = model.to("cuda", settings.get("dtype", torch.float32))
    tokens = torch.zeros(_TOKENS, dtype=torch.long, device="cuda")
    optimizer = kind(model.parameters(), lr=1e-3, **options)
    averaged = None
    if settings.get("averaged"):
        averaged = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
    scaler = _Scaler("cuda", enabled=bool(settings.get("scaled")))
    cast = settings.get("autocast")
    for step in ("1", "2"):
        for part in range(settings.get("accumulate", 1)):
            with (
                notes.phase(f"forward {step} {part}"),
                torch.autocast(
                    "cuda",
                    dtype=cast,
                    enabled=cast is not None,
                    cache_enabled=settings.get("cache", True),
                ),
            ):
                loss = model(tokens)
            with notes.phase(f"backward {step} {part}"):
                scaler.scale(loss).backward()
            del loss
        with notes.phase(f"clip {step}"):
            _clip(model, optimizer, scaler, settings)
        with notes.phase(f"step {step}"):
            scaler.step(optimizer)
            scaler.update()
        if averaged is not None:
            with notes.phase(f"average {step}"):
                averaged.update_parameters(model)
        with notes.phase(f"zeroed {step}"):
            optimizer.zero_grad()


def _clip(model: Any, optimizer: Any, scaler: Any, settings: dict[str, Any]) -> None:
    if "clip" not in settings:
        return
    if settings.get("scaled"):
        scaler.unscale_(optimizer)
    foreach = settings.get("foreach")
    if settings["clip"] == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
    else:
        nn.utils.clip_grad_value_(model.parameters(), 1.0, foreach=foreach)
