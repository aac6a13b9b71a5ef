"""What the fallbacks are made of: a small model, its data, a loss."""

from __future__ import annotations

import torch
from torch import nn


class Service:
    """An object with a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        parameter = next(self.model.parameters())
        answer: torch.Tensor = self.model(rows.to(parameter.device, parameter.dtype))
        return answer


def new_model() -> nn.Sequential:
    """Return a classifier of 27 kB on the host; the same weights each time."""
    with torch.random.fork_rng(devices=[]):
        # ``torch.manual_seed`` also seeds each kind of card, and walks the stack for it.
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))


def batch() -> torch.Tensor:
    """Return eight rows of data on the host."""
    return torch.arange(256, dtype=torch.float32).reshape(8, 32) / 256


def labels() -> torch.Tensor:
    """Return their labels."""
    return torch.arange(8)


def infer_masked(device: str, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return logits of which all but the first two are masked by the lowest number."""
    logits = infer(device).to(dtype)
    logits[:, 2:] = torch.finfo(dtype).min
    return logits


def infer(device: str) -> torch.Tensor:
    """Return the logits of the batch, computed on a device."""
    with torch.no_grad():
        logits: torch.Tensor = new_model().to(device)(batch().to(device))
    return logits.cpu()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return copies of a model's gradients on the host."""
    return [
        each.grad.detach().cpu() for each in model.parameters() if each.grad is not None
    ]
