"""Figures of small models, phase by phase, on whatever "cuda" is.

    python model_figures.py OUT CAPABILITY PROCESSORS

OUT gets what ``run`` returns, as JSON. A CUDA build of torch runs on its own device; with
the environment variable ``SIMULATED`` set, or on another build, the card is simulated. On
both, every value of the card is read as zero: the substitute of the CUDA runtime computes
none, and a program that looks at them must go the same way.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

import torch
from cases_of_models import TOKENS, build, groups, use_of

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Attention and type; the architectures take them in turn, another one on each card.
WAYS: Final = (
    ("eager", "float32"),
    ("sdpa", "bfloat16"),
    ("sdpa", "float32"),
    ("eager", "bfloat16"),
    ("sdpa", "float16"),
)
#: What is compared after each phase, and its peaks since the one before.
_STATISTICS: Final = (
    "allocated_bytes.all",
    "reserved_bytes.all",
    "requested_bytes.all",
    "active_bytes.all",
    "segment.all",
)
#: It takes the positions of labels from values, and so their number.
_BY_VALUES: Final = frozenset({"deberta_v2"})
_ZERO: Final[dict[str, Any]] = {
    "item": lambda self: torch.zeros((), dtype=self.dtype).item(),
    "tolist": lambda self: torch.zeros(self.shape, dtype=self.dtype).tolist(),
    "__bool__": lambda _self: False,
    "__int__": lambda _self: 0,
    "__float__": lambda _self: 0.0,
    "__index__": lambda _self: 0,
}


@contextlib.contextmanager
def card(capability: str, processors: str) -> Iterator[None]:
    """Have a card of 16 GiB whose values are read as zero."""
    torch.backends.cudnn.enabled = False  # it is not on the substitute
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.version.cuda and "SIMULATED" not in os.environ:
        yield
        return
    from pytest_gpumem import simulated_device
    from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

    name = f"16GiB,cc={capability},sms={processors}"
    with (
        simulated_device(name, values="none"),
        mock.patch.multiple(SimulatedTensor, create=True, **_ZERO),
    ):
        yield


def _figures() -> list[int]:
    statistics = torch.cuda.memory_stats()
    torch.cuda.reset_peak_memory_stats()
    return [
        statistics[f"{name}.{when}"]
        for name in _STATISTICS
        for when in ("current", "peak")
    ]


def _phases(group: str, attention: str, dtype: str) -> Iterator[tuple[str, list[int]]]:
    """Yield the figures after each phase: load, forward, and two steps of training."""
    torch.manual_seed(0)
    try:
        model = build(group, attention, getattr(torch, dtype))
    except ValueError:  # transformers has no other attention for it
        model = build(group, "eager", getattr(torch, dtype))
    yield "load", _figures()
    tokens = torch.ones(TOKENS, dtype=torch.long).cuda()
    given: dict[str, Any] = {"input_ids": tokens}
    if hasattr(model.config, "use_cache"):
        given["use_cache"] = False
    use, labels = use_of(group), tokens
    if use == "SequenceClassification":
        labels = torch.ones(TOKENS[0], dtype=torch.long).cuda()
    model.eval()
    with torch.no_grad():
        result = model(**given, **({"labels": labels} if use == "Seq2SeqLM" else {}))
    del result
    yield "forward", _figures()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in (1, 2):
        loss = model(**given, labels=labels).loss
        yield f"forward {step}", _figures()
        loss.backward()
        yield f"backward {step}", _figures()
        optimizer.step()
        yield f"step {step}", _figures()
        optimizer.zero_grad()
        del loss


def run(number: int) -> dict[str, dict[str, Any]]:
    """Run every architecture in one way.

    Args:
        number: The card's; it decides which architecture is run in which way.

    Returns:
        Figures by architecture and phase; ``error`` is the type of an error that ended it.
    """
    found: dict[str, dict[str, Any]] = {}
    chosen = [group for group in groups() if group not in _BY_VALUES]
    for place, group in enumerate(chosen):
        attention, dtype = WAYS[(place + number) % len(WAYS)]
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        phases = found[f"{group} {attention} {dtype}"] = {}
        try:
            phases.update(_phases(group, attention, dtype))
        except Exception as error:  # noqa: BLE001  # any; both devices end in the same
            phases["error"] = type(error).__name__
    return found


def main(arguments: list[str]) -> None:
    """Run all models and write the figures."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    output, capability, processors = arguments
    with card(capability, processors):
        found = run(int(processors))
    Path(output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
