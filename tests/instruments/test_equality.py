"""How results are compared: a row for each kind of value and each way to differ."""

from __future__ import annotations

import collections
import dataclasses
import enum
import math
import typing
import warnings
from types import SimpleNamespace
from typing import Any, Final

import attr
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import SequenceClassifierOutput

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.instruments.equality import TOLERANCE, compare_portraits
from pytest_gpumem.instruments.portraits import Opaque, portrait

INF: Final = math.inf
NAN: Final = math.nan
HALF: Final = torch.float16


class Pair(typing.NamedTuple):
    """A named tuple."""

    logits: Any
    label: Any = 0


@dataclasses.dataclass
class Data:
    """A dataclass."""

    logits: Any


@dataclasses.dataclass
class OtherData:
    """A dataclass with the same fields."""

    logits: Any


@dataclasses.dataclass(eq=False)
class NoEquality:
    """A dataclass that is equal to itself alone."""

    logits: Any


@attr.s(eq=False)
class AttrsNoEquality:
    """A class of attrs that is equal to itself alone."""

    logits: Any = attr.ib()


@attr.s
class Attrs:
    """A class of attrs: its equality is that of its fields."""

    logits: Any = attr.ib()


class Pydantic:
    """What pydantic makes of a model, as far as a look from outside goes."""

    __pydantic_fields__: typing.ClassVar = {"logits": None}

    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Plain:
    """An object without equality of its own."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class Odd:
    """An object that answers nothing but with an error."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    @property  # type: ignore[misc]  # hostile on purpose
    def __class__(self) -> Any:
        raise RuntimeError("no class")

    __hash__ = None  # type: ignore[assignment]  # as its equality is odd

    def __eq__(self, _other: object) -> Any:
        raise RuntimeError("no equality")


class Number:
    """An object whose class defines equality, and whose repr fails."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Number) and other.value == self.value

    __hash__ = None  # type: ignore[assignment]  # not needed

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class Rung(enum.Enum):
    """Where something ended."""

    CARD = 1
    HOST = 2


def _t(*values: Any, dtype: Any = None) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


def _linear(weight: float = 1.0, **changed: Any) -> nn.Module:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    for parameter in module.parameters():
        nn.init.constant_(parameter, weight)
    for name, value in changed.items():
        setattr(module, name, value)
    return module


def _with_buffer(value: float, *, persistent: bool) -> nn.Module:
    module = nn.Module()
    module.register_buffer("scale", torch.tensor([value]), persistent=persistent)
    return module


def _frozen() -> nn.Module:
    return _linear().requires_grad_(requires_grad=False)


def _cache(value: float) -> Any:
    cache = DynamicCache()
    cache.update(torch.full((1, 1, 2, 2), value), torch.ones(1, 1, 2, 2), 0)
    return cache


def _nested(depth: int, value: Any) -> Any:
    return value if not depth else Plain(inner=_nested(depth - 1, value))


def _itself() -> list[Any]:
    items: list[Any] = [1]
    items.append(items)
    return items


def _quantised(value: float) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, and still there
        return torch.quantize_per_tensor(_t(value, 1.0), 0.1, 0, torch.qint8)


#: Pairs that are the same.
SAME: Final[dict[str, tuple[Any, Any]]] = {
    "tensors": (_t(1.0, 2.0), _t(1.0, 2.0)),
    "an error of rounding": (_t(1.0, 2.0), _t(1.00005, 2.0)),
    "cancelled among numbers around 1": (
        _t(1.0, 1.0, 0.0, 0.0, 0.0, 1e-3),
        _t(1.00001, 1.00002, 5e-5, 5e-5, 5e-5, 1.05e-3),
    ),
    "cancelled among numbers around 100": (
        _t(100.0, 100.0, 100.0, 0.1),
        _t(100.001, 100.001, 100.001, 0.105),
    ),
    "empty tensors": (torch.empty(0, 3), torch.empty(0, 3)),
    "half precision": (_t(1.0, 1000.3), _t(1.004, 1001.0, dtype=HALF)),
    "cancelled to zero in half precision": (_t(1e-3), _t(-4e-3, dtype=HALF)),
    "bfloat16": (_t(3.1416), _t(3.1416, dtype=torch.bfloat16)),
    "float64 for float32": (_t(0.1, dtype=torch.float64), _t(0.1)),
    "NaN": (_t(1.0, NAN), _t(1.0, NAN)),
    "infinities": (_t(INF, -INF), _t(INF, -INF)),
    "masks of two dtypes": (
        _t(0.5, torch.finfo(torch.float32).min),
        _t(0.5, torch.finfo(HALF).min, dtype=HALF),
    ),
    "a mask that half precision cannot hold": (
        _t(0.5, torch.finfo(torch.float32).min),
        _t(0.5, -INF, dtype=HALF),
    ),
    "integers": (_t(1, 2), _t(1, 2)),
    "truth values": (_t(True, False), _t(True, False)),  # values
    "complex": (_t(1 + 2j), _t(1.00001 + 2j)),
    "sizes of complex": (_t(1j), _t(1j, dtype=torch.complex128)),
    "complex NaN": (_t(complex(NAN, 1)), _t(complex(NAN, 1))),
    "quantised": (_quantised(1.0), _quantised(1.0)),
    "quantised for floats": (_t(0.98, 1.0), _quantised(1.0)),
    "sparse": (_t(0.0, 1.0).to_sparse(), _t(0.0, 1.0).to_sparse()),
    "a gradient is wanted": (_t(1.0), _t(1.0).requires_grad_()),
    "a parameter for a tensor": (_t(1.0), nn.Parameter(_t(1.0))),
    "without values": (torch.empty(3, device="meta"), torch.ones(3)),
    "int and float": (1, 1.0),
    "floats": (0.1 + 0.2, 0.3),
    "NaN numbers": (NAN, NAN),
    "infinite numbers": (INF, INF),
    "huge integers": (10**400, 10**400),
    "numbers of numpy": (1.5, np.float64(1.5)),
    "half numbers of numpy": (np.float32(1.0), np.float16(1.005)),
    "large numbers": (1e300, 1.00001e300),
    "truth of numpy": (True, np.True_),
    "arrays": (
        np.array([1.0, NAN, INF], "f4"),
        np.array([1.00001, NAN, INF], "f4"),
    ),
    "half arrays": (np.array([1.0]), np.array([1.005], dtype=np.float16)),
    "arrays of another byte order": (np.array([1.0]), np.array([1.0], dtype=">f8")),
    "unsigned arrays": (np.array([1], np.uint16), np.array([1], np.uint16)),
    "long arrays": (np.ones(1, np.longdouble), np.ones(1)),
    "arrays of text": (np.array(["a"]), np.array(["a"])),
    "long lists": ([0] * 300, [0] * 300),
    "times": (np.array(["NaT"], "M8[s]"), np.array(["NaT"], "M8[s]")),
    "records": (np.zeros(1, [("a", "f4")]), np.zeros(1, [("a", "f4")])),
    "objects in arrays": (np.array([None, "a"], object), np.array([None, "a"], object)),
    "empty arrays": (np.zeros(0), np.zeros(0)),
    "text": ("cuda", "cuda"),
    "bytes": (b"a", b"a"),
    "nothing": (None, None),
    "ranges": (range(3), range(3)),
    "dtypes": (torch.float32, torch.float32),
    "members": (Rung.CARD, Rung.CARD),
    "classes": (Plain, Plain),
    "functions": (_linear, _linear),
    "lists": ([1, _t(2.0)], [1, _t(2.0)]),
    "a tuple for a list": ([1], (1,)),
    "deques": (collections.deque([1]), collections.deque([1])),
    "mappings": ({"a": _t(1.0), "b": 2}, {"b": 2, "a": _t(1.0)}),
    "ordered mappings": ({"a": 1}, collections.OrderedDict(a=1)),
    "sets": ({1, "a"}, {"a", 1}),
    "sets of floats": ({0.3, 5.0}, {5.0, 0.1 + 0.2}),
    "sets of tensors": ({_t(1.0), _t(2.0)}, {_t(2.0), _t(1.0)}),
    "named tuples": (Pair(_t(1.0)), Pair(_t(1.0))),
    "dataclasses": (Data(_t(1.0)), Data(_t(1.0))),
    "attrs": (Attrs(_t(1.0)), Attrs(_t(1.0))),
    "pydantic": (Pydantic(logits=_t(1.0)), Pydantic(logits=_t(1.0))),
    "model outputs": (
        SequenceClassifierOutput(logits=_t(1.0)),
        SequenceClassifierOutput(logits=_t(1.00001)),
    ),
    "caches": (_cache(1.0), _cache(1.0)),
    "modules": (_linear(), _linear()),
    "modules in half precision": (_linear(), _linear().half()),
    "objects": (Plain(started=1.0), Plain(started=2.0)),
    "objects with tensors": (Plain(a=_t(1.0), at=1.0), Plain(a=_t(1.0), at=2.0)),
    "objects with times": (Plain(at=Opaque(int)), Plain(at=Opaque(float))),
    "objects deep in objects": (_nested(5, _t(1.0)), _nested(5, _t(2.0))),
    "private parts": (Plain(_scratch=_t(1.0)), Plain(_scratch=_t(2.0))),
    "objects with equality": (Number(1), Number(1)),
    "hostile objects": (Odd(), Odd()),
    "what holds itself": (_itself(), _itself()),
    "lazy modules": (nn.LazyLinear(2), nn.LazyLinear(2)),
}

#: Pairs that differ, and how that is told.
DIFFERENT: Final[dict[str, tuple[Any, Any, str]]] = {
    "tensors": (
        _t([1.0, 2.0]),
        _t([1.0, 2.5]),
        "the result differs by 0.5, more than the 0.00021 that torch.float32 explains; "
        "first at [0, 1]: 2.5 instead of 2.0 (1 of 2 values)",
    ),
    "a scalar": (torch.tensor(1.0), torch.tensor(2.0), "explains; 2.0 instead of 1.0"),
    "more than half precision": (
        _t(1.0),
        _t(1.1, dtype=HALF),
        "differs by 0.0996, more than the 0.04 that torch.float16 explains",
    ),
    "more than bfloat16": (
        _t(1.0),
        _t(1.5, dtype=torch.bfloat16),
        "differs by 0.5, more than the 0.2 that torch.bfloat16 explains",
    ),
    "small gradients": (_t(3e-5, 2e-5), _t(6e-5, 4e-5), "differs by 3e-05"),
    "more than float64": (
        _t(1.0, dtype=torch.float64),
        _t(1.00001, dtype=torch.float64),
        "more than the 1.1e-06 that torch.float64 explains",
    ),
    "near zero in float64": (
        _t(0.0, dtype=torch.float64),
        _t(1e-6, dtype=torch.float64),
        "more than the 1e-07 that torch.float64 explains",
    ),
    "near zero": (_t(0.0, 0.0), _t(5e-5, 0.0), "more than the 1e-05 that"),
    "fewer bits": (
        _t(1.0),
        _t(2.0, dtype=torch.float8_e4m3fn),
        "differs by 1, more than the 0.2 that torch.float8_e4m3fn explains",
    ),
    "beside numbers of another size": (
        _t(1.0, 1.0, 1.0, 1000.0),
        _t(1.002, 1.002, 1.002, 1000.01),
        "differs by 0.002, more than the 0.00101 that",
    ),
    "beside a huge value": (_t(0.5, 1e9), _t(0.9, 1e9), "at [0]: 0.89"),
    "beside huge values that differ": (
        _t(0.5, 0.5, 1e9),
        _t(0.9, 0.9, 1e9 + 64),
        "first at [0]",
    ),
    "beside a mask": (_t(0.5, torch.finfo(HALF).min), _t(9.0, -INF), "at [0]"),
    "zero where a mask was": (
        _t(0.5, torch.finfo(torch.float32).min),
        _t(0.5, 0.0, dtype=HALF),
        "first at [1]",
    ),
    "Python's numbers": (1.0, 1.005, "is 1.005 instead of 1.0"),
    "beside an infinity": (
        _t(0.5, -INF),
        _t(99.0, NAN),
        "has other infinite or NaN values; first at [0]: 99.0 instead of 0.5 (2 of 2",
    ),
    "beside an infinity that agrees": (_t(0.5, -INF), _t(99.0, -INF), "by 98.5"),
    "NaN for a number": (_t(0.0), _t(NAN), "NaN values; first at [0]: nan instead of"),
    "a number for NaN": (_t(NAN), _t(0.0), "first at [0]: 0.0 instead of nan"),
    "the other infinity": (_t(INF), _t(-INF), "-inf instead of inf"),
    "an overflow": (_t(1e5), _t(INF, dtype=HALF), "inf instead of 100000.0"),
    "the largest of one dtype": (
        _t(torch.finfo(torch.float32).max),
        _t(INF),
        "inf instead of 3.40",
    ),
    "integers": (
        _t(1, 2, 3),
        _t(1, 5, 4),
        "the result has other values; first at [1]: 5 instead of 2 (2 of 3 values)",
    ),
    "float for int": (_t(1), _t(1.7), "dtype torch.float32 instead of torch.int64"),
    "int for float": (_t(1.7), _t(1), "has dtype torch.int64 instead of torch.float32"),
    "sizes of integers": (_t(1), _t(1, dtype=torch.int32), "torch.int32 instead"),
    "int for bool": (
        _t(True),
        _t(1),
        "dtype torch.int64 instead of torch.bool",
    ),  # a value
    "real for complex": (_t(1j), _t(1.0), "torch.float32 instead of torch.complex64"),
    "complex": (_t(1 + 2j), _t(1 + 3j), "differs by 1, more than"),
    "shapes": (torch.ones(2, 3), torch.ones(3, 2), "shape (3, 2) instead of (2, 3)"),
    "a scalar for a vector": (_t(1.0), torch.tensor(1.0), "shape () instead of (1,)"),
    "shapes without values": (
        torch.empty(2, device="meta"),
        torch.empty(3, device="meta"),
        "has shape (3,) instead of (2,)",
    ),
    "dtypes of the empty": (torch.empty(0), torch.empty(0).int(), "has dtype"),
    "quantised": (_quantised(1.0), _quantised(2.0), "differs by 1,"),
    "layouts": (_t(1.0).to_sparse(), _t(1.0), "torch.strided instead of torch.sparse"),
    "sparse": (_t(0.0, 1.0).to_sparse(), _t(1.0, 0.0).to_sparse(), "first at [0]"),
    "nested": (
        torch.nested.nested_tensor([_t(1.0), _t(2.0)], layout=torch.jagged),
        torch.nested.nested_tensor([_t(1.0), _t(3.0)], layout=torch.jagged),
        "the result[1] differs by 1",
    ),
    "a number for a tensor": (_t(1.0), 1.0, "is a number instead of a Tensor"),
    "an array for a tensor": (_t(1.0), np.ones(1), "a ndarray instead of a Tensor"),
    "nothing": (_t(1.0), None, "the result is None instead of a Tensor"),
    "something": (None, 3, "the result is a number instead of None"),
    "float and int": (1, 1.7, "the result is 1.7 instead of 1"),
    "int and float": (1.7, 1, "the result is 1 instead of 1.7"),
    "integers of Python": (1, 2, "the result is 2 instead of 1"),
    "huge integers": (10**400, 10**400 + 1, "instead of 1000"),
    "a huge integer and a float": (10**400, 1.0, "is 1.0 instead of 1000"),
    "floats": (1.0, 1.1, "the result is 1.1 instead of 1.0"),
    "large numbers": (1e300, 1e301, "is 1e+301 instead of 1e+300"),
    "NaN and a number": (1.0, NAN, "the result is nan instead of 1.0"),
    "a number and NaN": (NAN, 1.0, "the result is 1.0 instead of nan"),
    "infinite numbers": (INF, -INF, "the result is -inf instead of inf"),
    "text and a number": ("1", 1, "is a number instead of a str"),
    "numbers of numpy": (
        np.float32(1.0),
        np.float32(1.1),
        f"instead of {np.float32(1.0)!r}",
    ),
    "numbers of numpy, not half": (np.float32(1.0), np.float32(1.005), "instead of"),
    "arrays": (np.ones(2), np.array([1.0, 3.0]), "first at [1]: 3.0 instead of 1.0"),
    "arrays of integers": (
        np.array([1]),
        np.array([2]),
        "first at [0]: 2 instead of 1",
    ),
    "unsigned arrays": (
        np.array([1], np.uint16),
        np.array([2], np.uint16),
        "2 instead",
    ),
    "dtypes of arrays": (np.ones(1), np.ones(1, int), "dtype int64 instead of float64"),
    "sizes of arrays' integers": (np.ones(1, "i8"), np.ones(1, "i4"), "dtype int32"),
    "shapes of arrays": (np.ones(1), np.ones(2), "has shape (2,) instead of (1,)"),
    "arrays of text": (np.array(["a"]), np.array(["b"]), "[0] is 'b' instead"),
    "smaller shapes of text": (
        np.array([["a"]]),
        np.array(["a"]),
        "has shape (1,) instead of (1, 1)",
    ),
    "shapes of text": (np.array(["a"]), np.array([["a"]]), "has shape (1, 1)"),
    "times": (np.array(["NaT"], "M8[s]"), np.array(["2020"], "M8[s]"), "a datetime"),
    "records": (
        np.zeros(1, [("a", "f4")]),
        np.ones(1, [("a", "f4")]),
        "the result[0][0] is 1.0 instead of 0.0",
    ),
    "objects in arrays": (
        np.array([None, "a"], object),
        np.array([None, "b"], object),
        "the result[1] is 'b' instead of 'a'",
    ),
    "text": ("cuda", "cpu", "the result is 'cpu' instead of 'cuda'"),
    "bytes": (b"a", b"b", "the result is b'b' instead of b'a'"),
    "dtypes": (torch.float32, HALF, "is torch.float16 instead of torch.float32"),
    "members": (Rung.CARD, Rung.HOST, "<Rung.HOST: 2> instead of <Rung.CARD: 1>"),
    "classes": (Plain, Data, "Data' instead of 'type "),
    "functions": (_linear, _cache, "_cache' instead of 'function "),
    "lists": ([1, [2, 3]], [1, [2, 4]], "the result[1][1] is 4 instead of 3"),
    "lengths": ([1, 2], [1], "the result has 1 items instead of 2"),
    "a list for a mapping": ({"a": 1}, [1], "the result is a list instead of a dict"),
    "a missing entry": (
        {"a": 1, "b": 2},
        {"a": 1},
        "the result has other entries: 'b' is missing",
    ),
    "a new entry": ({"a": 1}, {"a": 1, 2: 2}, "the result has other entries: 2 is new"),
    "an entry": ({"a": {"b": 1}}, {"a": {"b": 2}}, "the result['a']['b'] is 2 instead"),
    "sets": ({1, 2}, {1, 3}, "the result lacks 2"),
    "more in a set": ({1}, {1, 3}, "the result has 3 besides"),
    "sets of tensors": ({_t(1.0)}, {_t(2.0)}, "the result lacks tensor([1.])"),
    "named tuples": (Pair(_t(1.0)), Pair(_t(1.0), 2), "the result.label is 2 instead"),
    "dataclasses": (Data(_t(1.0)), Data(_t(2.0)), "the result.logits differs by 1"),
    "words of a dataclass": (NoEquality("a"), NoEquality("b"), "logits is 'b' instead"),
    "words of attrs": (
        AttrsNoEquality("a"),
        AttrsNoEquality("b"),
        "logits is 'b' inst",
    ),
    "objects with arrays": (
        Plain(a=np.ones(1)),
        Plain(a=np.zeros(1)),
        "the result.a differs by 1",
    ),
    "other dataclasses": (Data(1), OtherData(1), "is a OtherData instead of a Data"),
    "attrs": (Attrs(_t(1.0)), Attrs(_t(2.0)), "the result.logits differs by 1"),
    "pydantic": (
        Pydantic(logits=_t(1.0)),
        Pydantic(logits=_t(2.0)),
        "the result.logits differs by 1",
    ),
    "model outputs": (
        SequenceClassifierOutput(logits=_t(1.0)),
        SequenceClassifierOutput(logits=_t(2.0)),
        "the result['logits'] differs by 1",
    ),
    "caches": (_cache(1.0), _cache(2.0), "the result.layers[0].keys differs by 1"),
    "modules": (
        _linear(),
        _linear(2.0),
        "the result['state']['0.weight'] differs by 1",
    ),
    "training": (_linear(), _linear().eval(), "the result['training'][''] is False"),
    "objects in objects": (
        _nested(4, _t(1.0)),
        _nested(4, _t(2.0)),
        "the result.inner.inner.inner.inner differs by 1",
    ),
    "frozen modules": (
        _linear(),
        _frozen(),
        "the result['trains']['0.weight'] is False instead of True",
    ),
    "parts in training": (
        _linear(),
        nn.Sequential(_linear().get_submodule("0")),
        "the result['training'] has other entries: '1' is missing",
    ),
    "saved buffers": (
        _with_buffer(1.0, persistent=True),
        _with_buffer(2.0, persistent=True),
        "the result['state']['scale'] differs by 1",
    ),
    "buffers that are not saved": (
        _with_buffer(1.0, persistent=False),
        _with_buffer(2.0, persistent=False),
        "the result['state']['scale'] differs by 1",
    ),
    "objects": (Plain(), SimpleNamespace(), "is a SimpleNamespace instead of a Plain"),
    "objects with tensors": (
        Plain(a=[_t(1.0)]),
        Plain(a=[_t(2.0)]),
        "the result.a[0] differs by 1",
    ),
    "objects with models": (
        Plain(model=_linear(), at=1),
        Plain(model=_linear(2.0), at=2),
        "the result.model['state']['0.weight'] differs by 1",
    ),
    "objects with equality": (
        Number(1),
        Number(2),
        "is <Number, whose repr fails> instead of <Number, whose repr fails>",
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_is_not_told_apart(name: str) -> None:
    """Dtypes may explain a difference, and nothing else may."""
    first, second = SAME[name]

    assert compare_portraits(portrait(first), portrait(second)).first is None


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_differs_is_told_with_its_place(name: str) -> None:
    """The sentence says where the two first differ, and by how much."""
    reference, result, text = DIFFERENT[name]

    found = compare_portraits(portrait(reference), portrait(result))

    assert found.first is not None
    assert text in found.first
    assert found.largest > 0


@pytest.mark.parametrize(
    ("reference", "result", "largest"),
    [
        (_t(1.0, 2.0), _t(1.0, 2.5), 0.5),
        (_t(1.0), _t(1.0), 0.0),
        (_t(INF), _t(INF), 0.0),
        (_t(0.5, -INF), _t(0.5, NAN), INF),
        ({"a": 1, "b": [3.0]}, {"a": 2, "b": [7.0]}, 4.0),
        (_t(1), _t(4), 3.0),
        (1, None, INF),
        (1.0, NAN, INF),
    ],
)
def test_the_largest_difference_is_told(
    reference: Any, result: Any, largest: float
) -> None:
    """Over everything that was compared, also where it is allowed."""
    assert largest == compare_portraits(portrait(reference), portrait(result)).largest


def test_dtypes_that_took_part_count() -> None:
    """A model in half precision may give its answer as float32."""
    pair = _t(1.0), _t(1.01)

    assert compare_portraits(*pair).first is not None
    assert compare_portraits(*pair, dtypes=[HALF]).first is None
    assert "that torch.float32 explains" in str(
        compare_portraits(*pair, where="it").first
    )
    assert compare_portraits(1.0, 1.01, dtypes=[HALF]).first is None


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=5))
def test_everything_equals_itself_in_half_precision(values: list[float]) -> None:
    """What a dtype does to a number by rounding alone is explained by it."""
    tensor = torch.tensor(values).clamp(-6e4, 6e4)

    assert compare_portraits(tensor, tensor).first is None
    assert compare_portraits(tensor, tensor.to(torch.bfloat16)).first is None
    assert compare_portraits(tensor, tensor.half()).first is None


def test_a_portrait_stays_as_it_was() -> None:
    """What the program later writes into its own tensors and arrays is not in it."""
    tensor, array = torch.zeros(2), np.zeros(2)
    painted = portrait([tensor, array])

    tensor.fill_(1.0)
    array.fill(1.0)

    assert compare_portraits([torch.zeros(2), np.zeros(2)], painted).first is None


def test_where_tensors_lie_makes_no_difference() -> None:
    """The card's and the host's are the same; a portrait keeps nothing on the card."""
    with simulated_device("T4"):
        values = [_t(1.0), {"a": _t(1, 2).t()}, Plain(a=_t(3.0)), {_t(1.0)}]
        here = portrait(values)
        there = portrait(
            [
                _t(1.0).cuda(),
                {"a": _t(1, 2).cuda()},
                Plain(a=_t(3.0).cuda()),
                {_t(1.0).cuda()},
            ]
        )

        assert compare_portraits(here, there).first is None
        assert 0 == torch.cuda.memory_allocated()


def test_a_half_moved_module_is_not_the_whole_one() -> None:
    """Weights on two devices without a map differ from a whole model's by that."""
    with simulated_device("T4"):
        torn = _linear()
        torn.get_submodule("0").weight = nn.Parameter(torch.ones(2, 2).cuda())

        text = str(compare_portraits(portrait(_linear()), portrait(torn)).first)

    assert text.startswith("the result['placement'] is 'half moved: ")


class Named:
    """An object with an equality of its own, and a part without one."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.helper = object()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Named) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def test_an_objects_own_equality_holds_whatever_its_parts_are() -> None:
    """Parts that cannot be compared are not compared instead."""
    assert compare_portraits(portrait(Named("a")), portrait(Named("a"))).first is None
    assert (
        compare_portraits(portrait(Named("a")), portrait(Named("b"))).first is not None
    )


def test_what_is_not_a_number_differs_infinitely() -> None:
    """Whichever of the two it is."""
    assert float("inf") == compare_portraits(1.0, float("nan")).largest
    assert float("inf") == compare_portraits(float("nan"), 1.0).largest
    assert float("inf") == compare_portraits(_t(1.0), _t(float("nan"))).largest


def test_what_a_dtype_explains_is_inclusive() -> None:
    """At the limit results are the same, just above it they are not."""
    none, amount = torch.zeros(1).double(), TOLERANCE[torch.float64][1]

    assert compare_portraits(none, torch.full_like(none, amount)).first is None
    assert (
        compare_portraits(none, torch.full_like(none, amount * 1.0001)).first
        is not None
    )


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, np.array])
def test_a_longer_result_is_another_one(kind: Any) -> None:
    """And a shorter one, though what both have is the same."""
    short, long = portrait(kind([1, 2])), portrait(kind([1, 2, 3]))

    assert compare_portraits(short, long).first is not None
    assert compare_portraits(long, short).first is not None


@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16])
def test_the_ends_of_a_mask_are_two(dtype: torch.dtype) -> None:
    """The largest number of a dtype stands for that of another, not for the lowest."""
    ends = torch.tensor(
        [torch.finfo(torch.float32).min, torch.finfo(torch.float32).max]
    )
    other = torch.tensor([torch.finfo(dtype).min, torch.finfo(dtype).max], dtype=dtype)

    assert compare_portraits(ends, other).first is None
    assert compare_portraits(ends, other.flip(0)).first is not None
    assert compare_portraits(ends[:1], other[1:]).first is not None
    assert compare_portraits(ends[1:], other[:1]).first is not None
