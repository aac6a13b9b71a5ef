"""Compares two results, on whatever devices their tensors are."""

from __future__ import annotations

from contextlib import suppress
from numbers import Integral, Number
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from pytest_gpumem.instruments.portraits import Fields, Opaque, Unordered

if TYPE_CHECKING:
    from collections.abc import Collection

#: The difference from a reference that a dtype explains: a share of the values' size plus
#: a fixed amount. The machine epsilons are 2.2e-16, 1.2e-7, 9.8e-4 and 7.8e-3; a network
#: of some dozens of layers adds an order of magnitude. The amounts of the first two are
#: those of ``torch.testing.assert_close``; those of the others are the errors that remain
#: when numbers around 1 cancel each other.
TOLERANCE: Final = {
    torch.float64: (1e-6, 1e-7),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (1e-1, 1e-1),
}
#: The tolerance of dtypes with even fewer bits than bfloat16, such as quantised ones.
_COARSEST: Final = (1e-1, 1e-1)
_PARTS: Final = {
    torch.complex128: torch.float64,
    torch.complex64: torch.float32,
    torch.complex32: torch.float16,
}
#: Values up to this many times the median count as typical. Larger ones, such as
#: ``torch.finfo(dtype).min`` in a mask, say nothing about the errors of other values.
_TYPICAL: Final = 10.0
_HALF: Final = 2
_INF: Final = float("inf")


class Comparison(NamedTuple):
    """The result of a comparison.

    Attributes:
        first: The first difference that is larger than allowed, in a sentence; None
            without one.
        largest: The largest difference of numbers, allowed or not; infinite if anything
            else differs.
    """

    first: str | None
    largest: float


def compare_portraits(
    reference: Any,
    result: Any,
    *,
    where: str = "the result",
    dtypes: Collection[torch.dtype] = (),
) -> Comparison:
    """Compare two portraits; ``where`` names the second one in texts.

    Floating-point numbers may differ by what the coarsest of their dtypes explains
    (``TOLERANCE``), and may have another dtype, because a fallback may compute in half
    precision. ``dtypes`` are further dtypes that took part in computing the result. NaN
    equals NaN; an infinity equals only the same infinity. Everything else must be equal,
    dtypes and shapes included. Tensors without values are compared by shape and dtype.

    Source: ``torch.testing.assert_close`` with ``equal_nan``; only the tolerance differs.
    """
    comparer = _Comparer(dtypes)
    comparer.walk(reference, result, where)
    return Comparison(comparer.first, comparer.largest)


class _Comparer:
    def __init__(self, dtypes: Collection[torch.dtype]) -> None:
        self._dtypes: Final = dtypes
        self.first: str | None = None
        self.largest = 0.0

    def _differ(self, where: str, how: str, amount: float = _INF) -> None:
        self.largest = max(self.largest, amount)
        if self.first is None:
            self.first = f"{where} {how}"

    def walk(self, reference: Any, result: Any, where: str) -> None:
        """Compare two values and their members."""
        (kind, how), (found, _how) = _kind(reference), _kind(result)
        if kind != found:
            self._differ(where, f"is {_a(found)} instead of {_a(kind)}")
        elif how is not None:
            getattr(self, how)(reference, result, where)

    def _mappings(self, reference: Any, result: Any, where: str) -> None:
        missing = [f"{_show(key)} is missing" for key in reference if key not in result]
        odd = [f"{_show(key)} is new" for key in result if key not in reference]
        if missing or odd:
            self._differ(where, f"has other entries: {', '.join([*missing, *odd][:5])}")
        form = "{}.{}" if isinstance(reference, Fields) else "{}[{}]"
        for key in reference:
            if key in result:
                shown = key if isinstance(reference, Fields) else _show(key)
                self.walk(reference[key], result[key], form.format(where, shown))

    def _sequences(self, reference: Any, result: Any, where: str) -> None:
        if len(reference) != len(result):
            self._differ(where, f"has {len(result)} items instead of {len(reference)}")
        names = getattr(type(reference), "_fields", None)
        for index, pair in enumerate(zip(reference, result, strict=False)):
            name = f"[{index}]" if names is None else f".{names[index]}"
            self.walk(*pair, f"{where}{name}")

    def _unordered(self, reference: Any, result: Any, where: str) -> None:
        left = list(result)
        for item in reference:
            same = next(
                (at for at, each in enumerate(left) if self._is(item, each)), None
            )
            if same is None:
                self._differ(where, f"lacks {_show(item)}")
            else:
                del left[same]
        if left:
            self._differ(where, f"has {_show(left[0])} besides")

    def _is(self, first: Any, second: Any) -> bool:
        return compare_portraits(first, second, dtypes=self._dtypes).first is None

    def _others(self, reference: Any, result: Any, where: str) -> None:
        try:
            same = bool(reference == result)
        except Exception:  # noqa: BLE001  # the class's == does not return a bool
            return
        if not same:
            self._differ(where, f"is {_show(result)} instead of {_show(reference)}")

    def _numbers(self, reference: Any, result: Any, where: str) -> None:
        if reference == result:
            return
        said = f"is {_show(result)} instead of {_show(reference)}"
        amount = _INF
        with suppress(OverflowError):  # an integer that no float can hold
            amount = float(abs(complex(result) - complex(reference)))
            if not all(isinstance(each, Integral) for each in (reference, result)):
                dtypes = {_dtype_of(each) for each in (reference, result)}
                if self._floats(_tensor(reference), _tensor(result), dtypes) is None:
                    return
        self._differ(where, said, _INF if amount != amount else amount)  # noqa: PLR0124  # only NaN differs from itself

    def _arrays(self, reference: Any, result: Any, where: str) -> None:
        kinds = [each.dtype.newbyteorder("=") for each in (reference, result)]
        letters = {each.kind for each in kinds}
        if reference.shape != result.shape:
            self._differ(
                where, f"has shape {result.shape} instead of {reference.shape}"
            )
        elif kinds[0] != kinds[1] and letters not in ({"f"}, {"c"}):
            self._differ(where, f"has dtype {kinds[1]} instead of {kinds[0]}")
        elif letters <= {*"biufc"}:
            self._tensors(_as_tensor(reference), _as_tensor(result), where)
        else:  # texts, times or records; a value that is not set becomes None
            self.walk(reference.tolist(), result.tolist(), where)

    def _tensors(
        self, reference: torch.Tensor, result: torch.Tensor, where: str
    ) -> None:
        shapes = tuple(reference.shape), tuple(result.shape)
        dtypes = reference.dtype, result.dtype
        if shapes[0] != shapes[1]:
            self._differ(where, f"has shape {shapes[1]} instead of {shapes[0]}")
        elif _family(dtypes[0]) != _family(dtypes[1]):
            self._differ(where, f"has dtype {dtypes[1]} instead of {dtypes[0]}")
        elif reference.layout != result.layout:
            self._differ(where, f"is {result.layout} instead of {reference.layout}")
        elif not (reference.is_meta or result.is_meta):
            pair = _dense(reference), _dense(result)
            if pair[0].is_floating_point() or pair[0].is_complex():
                found = self._floats(*pair, set(dtypes))
            else:
                found = self._integers(*pair)
            if found is not None:
                self._differ(where, found, 0.0)

    def _integers(self, reference: torch.Tensor, result: torch.Tensor) -> str | None:
        wrong = reference != result
        if not bool(wrong.any()):
            return None
        off = (result.double() - reference.double()).abs()
        self.largest = max(self.largest, float(off.max()))
        return f"has other values; {_first(wrong, reference, result)}"

    def _floats(
        self,
        reference: torch.Tensor,
        result: torch.Tensor,
        dtypes: set[torch.dtype],
    ) -> str | None:
        """Compare numbers; return how they differ, if by more than the tolerance."""
        expected, found = _alike(reference, result)
        same = (expected == found) | (expected.isnan() & found.isnan())
        off = (found - expected).abs().masked_fill(same, 0.0)
        off = off.nan_to_num(nan=_INF, posinf=_INF)
        if not off.numel() or not float(off.max()):
            return None
        self.largest = max(self.largest, float(off.max()))
        coarsest = max({*dtypes, *self._dtypes}, key=_tolerance)
        share, amount = _tolerance(coarsest)
        size = expected.abs()
        differing = size[size.isfinite() & ~same & (size > 0)]
        typical = 0.0
        if differing.numel():
            typical = min(float(differing.max()), _TYPICAL * float(differing.median()))
        size = size.masked_fill(~size.isfinite(), 0.0).clamp(min=typical)
        allowed = amount + share * size
        wrong = off > allowed
        if not bool(wrong.any()):
            return None
        first = _first(wrong, reference, result)
        if bool(off[wrong].isinf().any()):
            return f"has other infinite or NaN values; {first}"
        worst = int(torch.where(wrong, off, 0.0).argmax())
        return (
            f"differs by {float(off.flatten()[worst]):.3g}, more than the "
            f"{float(allowed.flatten()[worst]):.3g} that {coarsest} explains; {first}"
        )


#: The kinds of values with their names and comparison methods. Two values are compared only
#: if they are of one kind.
_KINDS: Final = (
    (torch.Tensor, "Tensor", "_tensors"),
    (dict, "dict", "_mappings"),
    ((Unordered, frozenset), "set", "_unordered"),
    ((list, tuple), "list", "_sequences"),
    (Number, "number", "_numbers"),
    (type(None), "None", None),
)


def _show(value: object) -> str:
    try:
        return f"{value!r:.80}"
    except Exception:  # noqa: BLE001  # the class's own __repr__ raised
        return f"<{type(value).__name__}, whose repr fails>"


def _kind(value: Any) -> tuple[str, str | None]:
    """Return the name of a portrait's kind, and the function that compares two of them."""
    kind = type(value)  # a class may give a wrong type as its __class__
    if issubclass(kind, Opaque):
        return str(value.kind.__qualname__), None
    if issubclass(kind, Fields):
        return str(value.kind.__qualname__), "_mappings"
    own = kind.__qualname__
    for base, name, how in _KINDS:
        if issubclass(kind, base):
            return own if hasattr(kind, "_fields") else name, how
    return own, "_arrays" if own == "ndarray" else "_others"


def _a(kind: str) -> str:
    return kind if kind == "None" else f"a {kind}"


def _tolerance(dtype: torch.dtype) -> tuple[float, float]:
    return TOLERANCE.get(_PARTS.get(dtype, dtype), _COARSEST)


def _family(dtype: torch.dtype) -> str:
    """Return a key that is the same for dtypes that may replace each other."""
    if dtype.is_complex:
        return "complex"
    is_quantised = str(dtype).startswith(("torch.qint", "torch.quint"))
    return "floating" if dtype.is_floating_point or is_quantised else str(dtype)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
    return tensor.dequantize() if tensor.is_quantized else tensor


def _alike(*pair: torch.Tensor) -> list[torch.Tensor]:
    """Return tensors in the widest dtype; a dtype's largest number becomes infinity.

    Masks are filled with ``torch.finfo(dtype).min``, which differs between dtypes.
    """
    is_complex = pair[0].is_complex()
    wide = [each.to(torch.complex128 if is_complex else torch.float64) for each in pair]
    if is_complex or pair[0].dtype == pair[1].dtype:
        return wide
    return [
        each.masked_fill(each >= most, _INF).masked_fill(each <= -most, -_INF)
        for each, most in zip(
            wide, (torch.finfo(each.dtype).max for each in pair), strict=True
        )
    ]


def _first(wrong: torch.Tensor, reference: torch.Tensor, result: torch.Tensor) -> str:
    """Return the first wrong value of a tensor, its position and the expected value."""
    at = tuple(wrong.nonzero()[0].tolist())
    values = f"{result[at].item()!r:.24} instead of {reference[at].item()!r:.24}"
    if not at:
        return values
    count = int(wrong.sum())
    return f"first at {list(at)}: {values} ({count} of {wrong.numel()} values)"


def _tensor(number: Any) -> torch.Tensor:
    return torch.tensor(complex(number), dtype=torch.complex128)


def _dtype_of(number: Any) -> torch.dtype:
    """Return float16 for numpy's half precision, and float32 for any other number."""
    is_half = getattr(getattr(number, "dtype", None), "itemsize", 0) == _HALF
    return torch.float16 if is_half else torch.float32


def _as_tensor(array: Any) -> torch.Tensor:
    """Return a tensor of an array's numbers."""
    own = f"{array.dtype.kind}{array.dtype.itemsize}"
    if own not in {"b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16"}:
        array = array.astype({"u": "i8", "i": "i8", "f": "f8", "c": "c16"}[own[0]])
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
