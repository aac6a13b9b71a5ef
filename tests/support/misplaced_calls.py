"""Calls of PyTorch's operators with one tensor on another device than the others.

For each operator of PyTorch's database one sample is taken. Each of its tensors in turn is
put on the host, on a second card and on ``meta``, in the function and in its in-place
variant, and so is each result that is given as ``out=``.
"""

from __future__ import annotations

import itertools
import json
import lzma
import random
import warnings
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED: Final = Path(__file__).parents[1] / "recordings" / "misplaced.json.xz"
_CARD: Final = "cuda:0"
_PLACES: Final = ("cpu", "cuda:1", "meta")
_DTYPES: Final = (torch.float32, torch.int64, torch.bool, torch.complex64)
#: Samples among which one is chosen; some operators make thousands.
_LOOKED_AT: Final = 20
#: Their kernels are a user's, in CUDA's language.
_LEFT_OUT: Final = "jiterator"


@cache
def operators() -> dict[str, Any]:
    """Return the database by name and variant."""
    from torch_databases import op_db

    return {
        ".".join(filter(None, (each.name, each.variant_test_name))): each
        for each in op_db
        if not each.name.startswith(_LEFT_OUT)
    }


def said_of(name: str) -> dict[str, str]:
    """Return what is said about each call of an operator.

    Args:
        name: The operator and its variant.

    Returns:
        By ``[_]NUMBER PLACE``, for the tensor that is moved (``_`` for the in-place
        variant), and ``out NUMBER PLACE``; ``[_]right`` and ``out right`` are the calls
        with all tensors on one card.
    """
    info = operators()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sample = _sample(info)
        if sample is None:
            return {}
        calls = itertools.chain(
            _moving(sample, info.op, ""),
            _moving(sample, info.inplace_variant, "_"),
            _writing(sample, info) if info.supports_out else (),
        )
        return {key: _said(call) for key, call in calls}


def _sample(info: Any) -> Any:
    """Return the sample with the most tensors among the first ones; None without one."""
    dtype = next(
        (each for each in _DTYPES if each in info.supported_dtypes("cuda")), None
    )
    if dtype not in info.dtypes:
        return None
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # torch's samples use it
    samples = itertools.islice(info.sample_inputs("cpu", dtype), _LOOKED_AT)
    best = max(samples, key=_size, default=None)
    return best if any(_size(best)) else None


def _size(sample: Any) -> tuple[int, int]:
    """Return how many tensors have dimensions, and how many there are."""
    if sample is None:
        return 0, 0
    leaves = _pytree.tree_leaves((sample.input, sample.args, sample.kwargs))
    found = [each for each in leaves if isinstance(each, torch.Tensor)]
    if not all(each.layout is torch.strided and each.numel() for each in found):
        return 0, 0
    return sum(each.dim() > 0 for each in found), len(found)


def _call(
    sample: Any, run: Any, moved: int | None = None, place: str = _CARD, **out: Any
) -> Any:
    """Call a function with all tensors on a card but for one, which is elsewhere."""
    numbers = itertools.count()

    def put(each: torch.Tensor) -> torch.Tensor:
        return each.detach().to(place if next(numbers) == moved else _CARD, copy=True)

    operands = (sample.input, sample.args, sample.kwargs)
    source, args, options = _pytree.tree_map_only(torch.Tensor, put, operands)
    return run(source, *args, **options, **out)


def _moving(
    sample: Any, run: Any, prefix: str
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls that move an operand; none without a function."""
    if run is None:
        return
    yield f"{prefix}right", partial(_call, sample, run)
    for number, place in itertools.product(range(_size(sample)[1]), _PLACES):
        yield f"{prefix}{number} {place}", partial(_call, sample, run, number, place)


def _writing(sample: Any, info: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield the calls that move a result; none if the CPU does not compute results."""
    torch.manual_seed(0)
    try:
        results = info.op(sample.input, *sample.args, **sample.kwargs)
    except Exception:  # noqa: BLE001  # whatever the CPU lacks
        return
    outs, shape = _pytree.tree_flatten(results)
    if not all(isinstance(each, torch.Tensor) for each in outs):
        return

    def write(moved: int | None = None, place: str = _CARD) -> Any:
        given = [
            torch.empty_like(each, device=place if number == moved else _CARD)
            for number, each in enumerate(outs)
        ]
        out = _pytree.tree_unflatten(given, shape)
        return _call(
            sample, info.op, out=tuple(out) if isinstance(out, (tuple, list)) else out
        )

    yield "out right", write
    for number, place in itertools.product(range(len(outs)), _PLACES):
        yield f"out {number} {place}", partial(write, number, place)


def _said(call: Callable[[], Any]) -> str:
    """Return the error's class and first line, or the devices of the results."""
    try:
        result = call()
    except Exception as error:  # noqa: BLE001  # any error is what is asked for
        text = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {text}"
    leaves = _pytree.tree_leaves(result)
    places = {str(each.device) for each in leaves if isinstance(each, torch.Tensor)}
    return " ".join(["no error", *sorted(places)])


def comparable(*recordings: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Return what several recordings say alike, of calls that would pass if put right.

    The others depend on values, which a card's kernels have and the recordings do not.
    """
    first, *others = recordings
    kept: dict[str, dict[str, str]] = {}
    for name, said in first.items():
        for key, text in said.items():
            right = (
                "out right"
                if key.startswith("out")
                else "_" * (key[0] == "_") + "right"
            )
            is_right = said[right].startswith("no error")
            if is_right and all(other[name].get(key) == text for other in others):
                kept.setdefault(name, {})[key] = text
    return kept


def load() -> tuple[str, dict[str, dict[str, str]]]:
    """Return the version of torch, and what it said."""
    with lzma.open(RECORDED, "rt", encoding="utf-8") as file:
        recorded = json.load(file)
    return recorded["torch"], recorded["calls"]
