"""Whether two results are the same, wherever their tensors lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import torch

from pytest_gpumem.errors import NoValuesError
from pytest_gpumem.instruments.placement import placement_of

#: Largest difference from a reference that a dtype explains, as a share of the
#: reference's largest value (at least of 1). The machine epsilons are 1.2e-7, 9.8e-4
#: and 7.8e-3; a network of some dozens of layers adds an order of magnitude.
TOLERANCE: Final = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
#: For dtypes of fewer bits still, quantised ones among them.
_COARSEST: Final = 1e-1


@dataclasses.dataclass(frozen=True, slots=True)
class Opaque:
    """Stands for an object that cannot be compared by value."""

    kind: type


def portrait(value: Any) -> Any:  # a kind of value each
    """Return what of a result can be compared later, with every tensor on the host.

    Tensors become copies on the CPU (on meta where the device keeps no values),
    modules their state and whether they are whole, mappings, sequences and dataclasses the same of their items.
    Other objects are kept where their class defines equality; else only their class.
    """
    if isinstance(value, torch.Tensor):
        return _on_host(value.detach())
    if isinstance(value, torch.nn.Module):
        state = {name: _on_host(each) for name, each in value.state_dict().items()}
        placement = placement_of(value)
        whole = "whole" if placement.is_whole else f"half moved: {placement}"
        return {"placement": whole, "state": state}
    if isinstance(value, Mapping):
        return {key: portrait(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [portrait(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {each.name: portrait(getattr(value, each.name)) for each in fields}
    compares = any("__eq__" in vars(kind) for kind in type(value).__mro__[:-1])
    return value if compares else Opaque(type(value))


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    try:
        return tensor.to("cpu", copy=True)
    except NoValuesError:
        return torch.empty_like(tensor, device="meta")


def difference(
    reference: Any,
    result: Any,
    *,
    where: str = "the result",
    dtypes: Collection[torch.dtype] = (),
) -> str | None:
    """Return in what two portraits differ, in a sentence; None if in nothing.

    Args:
        reference: What should be.
        result: What is.
        where: What the result is called.
        dtypes: Dtypes that took part in computing it, besides those of its tensors.

    Floating-point tensors may differ by what the coarser of their dtypes explains
    (``TOLERANCE``); everything else must be equal. Tensors without values are compared
    by shape.
    """
    if isinstance(reference, torch.Tensor) and isinstance(result, torch.Tensor):
        return _tensor_difference(reference, result, where, dtypes)
    if isinstance(reference, Mapping) and isinstance(result, Mapping):
        if reference.keys() != result.keys():
            odd = sorted(map(str, reference.keys() ^ result.keys()))
            return f"{where} has other entries: {', '.join(odd[:5])}"
        pairs = [
            (f"{where}[{key!r}]", reference[key], result[key]) for key in reference
        ]
    elif _is_list(reference) and _is_list(result):
        if len(reference) != len(result):
            return f"{where} has {len(result)} items instead of {len(reference)}"
        pairs = [
            (f"{where}[{index}]", *pair)
            for index, pair in enumerate(zip(reference, result, strict=True))
        ]
    else:
        return _plain_difference(reference, result, where)
    for name, first, second in pairs:
        found = difference(first, second, where=name, dtypes=dtypes)
        if found is not None:
            return found
    return None


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _plain_difference(reference: Any, result: Any, where: str) -> str | None:
    both = type(reference), type(result)
    if torch.Tensor in both and both[0] is not both[1]:
        return f"{where} is a {both[1].__name__} instead of a {both[0].__name__}"
    if isinstance(reference, float) and isinstance(result, float):
        allowed = TOLERANCE[torch.float32] * max(1.0, abs(reference))
        same = abs(reference - result) <= allowed or reference != reference != result  # noqa: PLR0124  # NaN
    else:
        same = bool(reference == result)
    return None if same else f"{where} is {result!r:.80} instead of {reference!r:.80}"


def _tensor_difference(
    reference: torch.Tensor,
    result: torch.Tensor,
    where: str,
    dtypes: Collection[torch.dtype],
) -> str | None:
    if reference.shape != result.shape:
        return (
            f"{where} has shape {tuple(result.shape)} instead of "
            f"{tuple(reference.shape)}"
        )
    if reference.is_meta or result.is_meta or not reference.numel():
        return None
    if not (reference.is_floating_point() and result.is_floating_point()):
        same = torch.equal(reference.to(result.dtype), result)
        return None if same else f"{where} has other values"
    took_part = {reference.dtype, result.dtype, *dtypes}
    return _float_difference(reference, result, where, took_part)


def _float_difference(
    reference: torch.Tensor,
    result: torch.Tensor,
    where: str,
    dtypes: Collection[torch.dtype],
) -> str | None:
    expected = reference.to(torch.float64)
    off = (result.to(torch.float64) - expected).abs()
    unsure = expected.isnan() | expected.isinf()
    if not torch.equal(
        expected[unsure].nan_to_num(), result[unsure].double().nan_to_num()
    ):
        return f"{where} has other infinite or NaN values"
    off = off[~unsure]
    largest = float(off.max()) if off.numel() else 0.0
    scale = max(1.0, float(expected[~unsure].abs().max()) if off.numel() else 1.0)
    coarsest = max(dtypes, key=lambda dtype: TOLERANCE.get(dtype, _COARSEST))
    allowed = scale * TOLERANCE.get(coarsest, _COARSEST)
    if largest <= allowed:
        return None
    return (
        f"{where} differs by {largest:.3g}, more than the {allowed:.3g} that "
        f"{coarsest} explains"
    )
