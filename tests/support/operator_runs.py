"""PyTorch's databases of operators, run on a simulated card and on the CPU.

``op_db`` holds every operator with its types, sample inputs and wrong inputs. Each is
run here in every way it has: as a function, as a method, in place, with ``out=``, and
its gradient. What comes out on the card is compared with what the CPU gives for the
same samples, bit by bit.
"""

from __future__ import annotations

import gc
import itertools
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from operator_differences import CLOSE, DIFFERS, EQUAL, LEVELS, REFUSED, Finding
from torch.utils._pytree import tree_leaves, tree_map
from torch_databases import op_db

from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TYPES: Final = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.bool,
)

#: Operators whose results hold what the memory held before.
UNINITIALISED: Final = frozenset(
    {
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
    }
)


class Outcome(NamedTuple):
    """What one way of running one operator came to.

    Attributes:
        level: One of ``LEVELS``.
        text: What differs; empty where nothing does.
    """

    level: str
    text: str = ""


#: Operators that leave ``out=`` as it is in some samples, on any device: with one dimension
#: C++ swaps source and target. Source: ``SpectralOps.cpp``, ``fft_ihfftn_impl``.
UNFILLED: Final = frozenset({"fft_ihfft2", "fft_ihfftn"})

#: Operators whose kernels on the CPU write beyond the memory of a strided ``out=``; that
#: of ``triu`` does it in all of them.
CORRUPTING: Final = frozenset({"linalg.lu", "lu_unpack", "tril", "triu"})

OPERATORS: Final = {each.formatted_name: each for each in op_db}


# -- the samples on the CPU -----------------------------------------------------------


class Counterparts:
    """Copies of a card's tensors on the CPU: strides, sharing, marks, gradients."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}
        self._kept: list[Any] = []  # what the keys above are the ids of

    def of(self, tree: Any) -> Any:
        """Return arguments for the CPU in the place of arguments for a card."""
        return tree_map(self._leaf, tree)

    def _leaf(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_cuda:
            if id(leaf) not in self._tensors:
                self._kept.append(leaf)
                self._tensors[id(leaf)] = self._copy(leaf)
            return self._tensors[id(leaf)]
        if isinstance(leaf, torch.device) and leaf.type == "cuda":
            return torch.device("cpu")
        if isinstance(leaf, str) and leaf.startswith("cuda"):
            return "cpu"
        if isinstance(leaf, torch.Generator) and leaf.device.type == "cuda":
            generator = torch.Generator()
            generator.set_state(leaf.get_state())
            return generator
        return leaf

    def _copy(self, tensor: Any) -> torch.Tensor:
        value = tensor._gpumem_value
        storage = value.untyped_storage()
        key = storage.data_ptr()
        if key not in self._storages:
            copied = torch.UntypedStorage(storage.nbytes())
            torch.UntypedStorage.copy_(copied, storage)
            self._storages[key] = copied
        twin = torch.empty(0, dtype=value.dtype)
        twin.set_(
            self._storages[key], value.storage_offset(), value.shape, value.stride()
        )
        if value.is_conj():
            twin = twin.conj()
        if value.is_neg():
            twin = torch._neg_view(twin)
        # A view that is made without gradients says that it requires one, and gets none.
        return twin.requires_grad_(tensor.requires_grad and not tensor._is_view())


# -- comparing ------------------------------------------------------------------------


def compare(card: Any, host: Any, *, values: bool = True) -> Outcome:
    """Compare what a card gave with what the CPU gave.

    Args:
        card: The result on the card.
        host: The CPU's result.
        values: Whether to compare values, not type, shape and place alone.
    """
    left, right = tree_leaves(card), tree_leaves(host)
    if len(left) != len(right):
        return Outcome(DIFFERS, f"{len(left)} results instead of {len(right)}")
    worst = Outcome(EQUAL)
    for one, other in zip(left, right, strict=True):
        outcome = _compare_leaf(one, other, values=values)
        if LEVELS.index(outcome.level) > LEVELS.index(worst.level):
            worst = outcome
    return worst


def _compare_leaf(card: Any, host: Any, *, values: bool) -> Outcome:
    text = (
        _difference(card, host)
        if isinstance(host, torch.Tensor)
        else _difference_of_others(card, host)
    )
    if text:
        return Outcome(DIFFERS, text)
    if not isinstance(host, torch.Tensor) or not values:
        return Outcome(EQUAL)
    return _compare_values(card.detach().cpu(), host.detach())


def _difference(card: Any, host: torch.Tensor) -> str:
    """Say what but its values is wrong with a tensor; empty if nothing is."""
    if not isinstance(card, torch.Tensor):
        return f"{type(card).__name__} instead of a tensor"
    if not card.is_cuda:
        return f"the result is on {card.device}"
    for name in ("dtype", "shape", "layout", "requires_grad", "stride"):
        one, other = getattr(card, name), getattr(host, name)
        if name == "stride":
            one, other = (one(), other()) if host.numel() > 1 else ((), ())
        if one != other:
            return f"{name} {one} instead of {other}"
    return ""


def _difference_of_others(card: Any, host: Any) -> str:
    both_nan = card != card and host != host  # noqa: PLR0124  # NaN is not itself
    if card == host or both_nan or isinstance(host, torch.device):
        return ""
    return f"{card!r} instead of {host!r}"


def _compare_values(card: torch.Tensor, host: torch.Tensor) -> Outcome:
    if _same_bits(card, host):
        return Outcome(EQUAL)
    try:
        torch.testing.assert_close(card, host, equal_nan=True)
    except AssertionError as error:
        return Outcome(DIFFERS, " ".join(str(error).split()))
    difference = (card.to(torch.complex128) - host.to(torch.complex128)).abs()
    return Outcome(CLOSE, f"by up to {difference.nan_to_num().max().item():.2g}")


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    same = one == other
    if one.is_floating_point():
        same = same & (torch.signbit(one) == torch.signbit(other))
        same = same | (one.isnan() & other.isnan())
    return bool(same.all())


# -- the ways -------------------------------------------------------------------------


class Sample:
    """One sample of an operator, on the card and on the CPU."""

    def __init__(self, sample: Any) -> None:
        twins = Counterparts()
        self.card = (sample.input, list(sample.args), dict(sample.kwargs))
        self.host = twins.of(self.card)
        self.broadcasts = bool(getattr(sample, "broadcasts_input", False))
        self.is_mixed = is_mixed(self.card)
        self.differentiable = sample.output_process_fn_grad
        device = str(self.card[2].get("device", ""))
        self.leaves = device == "cpu" or not (device or _on_card(self.card))

    def landed(self, out: Any) -> Any:
        """Return a result where it is expected, if its sample leaves it to the host."""
        if not self.leaves:
            return out
        return tree_map(_elsewhere, out)

    def sides(self) -> tuple[Any, Any]:
        """Return the arguments on the card and on the CPU."""
        return self.card, self.host


def seed() -> None:
    """Have the CPU and the card draw the same numbers from here on.

    ``torch.manual_seed`` also leaves a note, with a stack, for each other backend.
    """
    torch.default_generator.manual_seed(0)
    torch.cuda.manual_seed(0)


def _elsewhere(value: Any) -> Any:
    """Return a tensor on the other device, with the strides that it has."""
    if not isinstance(value, torch.Tensor):
        return value
    moved = value.cpu() if value.is_cuda else value.cuda()
    if moved.stride() == value.stride():
        return moved
    return torch.empty_strided(
        value.shape, value.stride(), dtype=value.dtype, device=moved.device
    ).copy_(moved)


def _on_card(tree: Any) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(tree)
    )


def is_mixed(tree: Any) -> bool:
    """Tell whether arguments hold tensors of the host, too."""
    return any(
        isinstance(leaf, torch.Tensor) and leaf.is_cpu for leaf in tree_leaves(tree)
    )


def _attempt(fn: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """Return what a function gives, or raises; both draw the same random numbers."""
    seed()
    try:
        return fn(), None
    except Exception as error:  # noqa: BLE001  # what it raises is what is compared
        return None, error.with_traceback(None)


def judge(
    on_card: Callable[[], Any],
    on_host: Callable[[], Any],
    *,
    values: bool = True,
    may_raise: bool = False,
) -> Outcome:
    """Run the same on the card and on the CPU, and compare.

    Args:
        on_card: Runs it on the card.
        on_host: Runs it on the CPU.
        values: Whether to compare values.
        may_raise: Whether the CPU may refuse it, too.
    """
    expected, host_error = _attempt(on_host)
    found, error = _attempt(on_card)
    if isinstance(error, UnsupportedOnSimulatedDeviceError):
        # What the CPU refuses, too, need not be run.
        is_wrong = may_raise and host_error is not None
        is_wrong = is_wrong and not isinstance(host_error, type(error))
        return Outcome(EQUAL) if is_wrong else Outcome(REFUSED, str(error))
    if host_error is not None and not may_raise:
        return Outcome(DIFFERS, f"the CPU raises {_short(host_error)}")
    if error is not None or host_error is not None:
        return _judge_raised(error, host_error)
    return compare(found, expected, values=values)


def _judge_raised(error: Exception | None, host_error: Exception | None) -> Outcome:
    """Compare what a card raises with what the CPU raises."""
    if error is None:
        return Outcome(DIFFERS, f"passes, where the CPU raises {_short(host_error)}")
    if type(error) is type(host_error):
        return Outcome(EQUAL)
    instead = "" if host_error is None else f" instead of {_short(host_error)}"
    return Outcome(DIFFERS, f"raises {_short(error)}{instead}")


def _short(error: Exception | None) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _call(fn: Any, side: Any) -> Any:
    source, args, kwargs = side
    return fn(source, *args, **kwargs)


def _call_and_land(sample: Sample, fn: Callable[..., Any]) -> Any:
    return sample.landed(_call(fn, sample.card))


def _copied(side: Any) -> Any:
    """Return arguments whose first one may be changed."""
    source, args, kwargs = side
    return (
        tree_map(
            lambda each: each.clone() if isinstance(each, torch.Tensor) else each,
            source,
        ),
        args,
        kwargs,
    )


def _forward(
    operator: Any, sample: Sample, *, values: bool
) -> Iterator[tuple[str, Outcome]]:
    """Run an operator as a function; hold what it shares and leaves unchanged."""

    def run(side: Any) -> Any:
        out = _call(operator.op, side)
        out = sample.landed(out) if side is card else out
        inputs = [each for each in tree_leaves(side) if isinstance(each, torch.Tensor)]
        shared = [
            any(_storage(each) == _storage(other) for other in inputs)
            for each in tree_leaves(out)
            if isinstance(each, torch.Tensor) and each.numel()
        ]
        held = [each.detach() for each in inputs if each.is_cuda or side is host]
        return out, shared, held if values and not sample.is_mixed else []

    card, host = sample.sides()
    yield "forward", judge(lambda: run(card), lambda: run(host), values=values)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _variants(
    operator: Any, sample: Sample, *, values: bool
) -> Iterator[tuple[str, Outcome]]:
    """Run an operator as a method, and in place."""
    card, host = sample.sides()
    for way, variant in (
        ("method", operator.method_variant),
        ("operator", operator.operator_variant),
    ):
        # Operators of the language take no keywords.
        if variant is not None and not (way == "operator" and sample.card[2]):
            yield (
                way,
                judge(
                    partial(_call_and_land, sample, variant),
                    partial(_call, variant, host),
                    values=values,
                ),
            )
    for way, variant in (
        ("in place", operator.inplace_variant),
        ("operator in place", operator.inplace_operator_variant),
    ):
        if variant is not None and not sample.broadcasts:

            def changed(side: Any, variant: Any = variant) -> Any:
                copied = _copied(side)
                before = copied[0]
                out = _call(variant, copied)
                first = before if isinstance(before, torch.Tensor) else before[0]
                return out, before, first._version, out is before

            yield (
                way,
                judge(
                    partial(changed, card),
                    partial(changed, host),
                    values=values,
                    may_raise=True,  # a type that the result has not
                ),
            )


def _gradient(operator: Any, sample: Sample) -> Iterator[tuple[str, Outcome]]:
    """Take the gradient of an operator with respect to all that requires it."""

    def run(side: Any) -> Any:
        wanted, results = _graph(operator, sample, side)
        if not results or not wanted:
            return []
        seeds = [torch.ones_like(each) for each in results]
        gradients = torch.autograd.grad(results, wanted, seeds, allow_unused=True)
        # How a gradient lies in memory is up to whoever makes it.
        return [each if each is None else each.contiguous() for each in gradients]

    card, host = sample.sides()
    yield "gradient", judge(lambda: run(card), lambda: run(host))


def _graph(operator: Any, sample: Sample, side: Any) -> tuple[list[Any], list[Any]]:
    """Run an operator; return what requires a gradient before and after it."""
    wanted = [
        each
        for each in tree_leaves(side)
        if isinstance(each, torch.Tensor) and each.requires_grad and not each._is_view()
    ]
    out = sample.differentiable(_call(operator.op, side))
    results = [
        each
        for each in tree_leaves(out)
        if isinstance(each, torch.Tensor) and each.requires_grad
    ]
    return wanted, results


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the same shape whose elements lie apart."""
    strides, step = [], 2
    for length in tensor.shape:  # the first dimension lies closest
        strides.append(step)
        step *= max(length, 1)
    return torch.empty_strided(
        tensor.shape, strides, dtype=tensor.dtype, device=tensor.device
    )


#: How the tensors given as ``out=`` are made from a result.
_OUTS: Final[dict[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "out=": lambda each: torch.empty_like(each, memory_format=torch.contiguous_format),
    "out= resized": lambda each: torch.empty(0, dtype=each.dtype, device=each.device),
    "out= strided": _strided,
    "out= of another type": lambda each: torch.empty(
        each.shape,
        dtype=torch.int32 if each.dtype is not torch.int32 else torch.int64,
        device=each.device,
    ),
}


def _with_out(
    operator: Any, sample: Sample, *, values: bool
) -> Iterator[tuple[str, Outcome]]:
    """Run an operator with ``out=`` in every form."""

    def run(side: Any, make: Any, *, right: bool = False) -> Any:
        with torch.no_grad():
            seed()
            model = _call(operator.op, side)
            given = tree_map(make, model)
            seed()
            source, args, kwargs = side
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            if side is host and make is _strided and operator.name in CORRUPTING:
                for each, value in zip(
                    tree_leaves(given), tree_leaves(model), strict=True
                ):
                    each.copy_(value)
                return given, [True for _each in tree_leaves(given)]
            out = operator.op(source, *args, **kwargs, out=given)
        pairs = list(zip(tree_leaves(out), tree_leaves(given), strict=True))
        is_given = [each is other for each, other in pairs]
        out = sample.landed(out) if side is card else out
        for each, value in zip(tree_leaves(given), tree_leaves(model), strict=True):
            if right and each.shape == value.shape and each.dtype is value.dtype:
                each.copy_(value)
        return out, is_given

    card, host = sample.sides()
    values = values and operator.name.replace(".", "_") not in UNFILLED
    for way, make in _OUTS.items():
        outcome = judge(
            partial(run, card, make),
            partial(run, host, make),
            values=values,
            may_raise=True,
        )
        if outcome.level in {CLOSE, DIFFERS}:
            # Some of the CPU's kernels heed no strides of what they are given.
            outcome = min(
                outcome,
                judge(
                    partial(run, card, make),
                    partial(run, host, make, right=True),
                    values=values,
                    may_raise=True,
                ),
                key=lambda each: LEVELS.index(each.level),
            )
        yield way, outcome


def run_type(name: str, dtype: torch.dtype, limit: int | None) -> list[Finding]:
    """Run an operator of one type in every way, on its samples made on the card.

    Args:
        name: The operator's name in the database.
        dtype: The type of the samples.
        limit: How many samples at most; None for all.
    """
    operator: Any = OPERATORS[name]
    gathered = Gathered(name, name_of(dtype))
    values = name not in UNINITIALISED
    has_gradient = operator.supports_autograd and dtype in (
        operator.supported_backward_dtypes("cpu")
        & operator.supported_backward_dtypes("cuda")
    )
    with quietly():
        held = torch.cuda.memory_allocated()
        _run_samples(operator, dtype, limit, gathered, values=values)
        if has_gradient:
            _run_gradients(operator, dtype, limit, gathered)
        gathered.add("bytes left", bytes_left(held))
    return gathered.findings()


def _run_samples(
    operator: Any,
    dtype: torch.dtype,
    limit: int | None,
    gathered: Gathered,
    *,
    values: bool,
) -> None:
    for sample in _samples(operator, dtype, limit, gathered):
        for way, outcome in itertools.chain(
            _forward(operator, sample, values=values),
            _variants(operator, sample, values=values),
            _with_out(operator, sample, values=values) if operator.supports_out else (),
        ):
            gathered.add(way, outcome)


def _run_gradients(
    operator: Any, dtype: torch.dtype, limit: int | None, gathered: Gathered
) -> None:
    for sample in _samples(operator, dtype, limit, gathered, requires_grad=True):
        for way, outcome in _gradient(operator, sample):
            gathered.add(way, outcome)


def _made_on_card(
    operator: Any, dtype: torch.dtype, *, requires_grad: bool = False
) -> Iterator[Any]:
    """Yield an operator's samples on the card; where it makes none, those of the CPU.

    Some are kept only where ``type(mask) is torch.Tensor``.
    """
    seed()
    is_none = True
    for sample in operator.sample_inputs("cuda", dtype, requires_grad=requires_grad):
        is_none = False
        yield sample
    if is_none:
        for sample in operator.sample_inputs("cpu", dtype, requires_grad=requires_grad):
            yield sample.transform(_to_card)


def _to_card(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().cuda().requires_grad_(value.requires_grad)


def _samples(
    operator: Any,
    dtype: torch.dtype,
    limit: int | None,
    gathered: Gathered,
    *,
    requires_grad: bool = False,
) -> Iterator[Sample]:
    samples = _made_on_card(operator, dtype, requires_grad=requires_grad)
    try:
        for sample in itertools.islice(samples, limit):
            yield Sample(sample)
    except UnsupportedOnSimulatedDeviceError as error:
        gathered.add("samples", Outcome(REFUSED, str(error)))
    except Exception as error:  # noqa: BLE001  # what it raises is what is reported
        try:
            seed()
            list(operator.sample_inputs("cpu", dtype, requires_grad=requires_grad))
        except Exception:  # noqa: BLE001  # nor has the CPU any
            return
        gathered.add("samples", Outcome(DIFFERS, f"raises {_short(error)}"))


class Gathered:
    """Counts the outcomes of one operator and type."""

    def __init__(self, operator: str, dtype: str) -> None:
        self._operator = operator
        self._dtype = dtype
        self._counts: Counter[tuple[str, str]] = Counter()
        self._texts: dict[tuple[str, str], str] = {}

    def add(self, way: str, outcome: Outcome) -> None:
        key = (way, outcome.level)
        self._counts[key] += 1
        self._texts.setdefault(key, outcome.text)

    def findings(self) -> list[Finding]:
        return [
            Finding(
                self._operator, self._dtype, way, level, count, self._texts[way, level]
            )
            for (way, level), count in self._counts.items()
        ]


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name, as ``float32``."""
    return str(dtype).removeprefix("torch.")


def bytes_left(held: int) -> Outcome:
    """Return whether the card holds what it held before."""
    left = torch.cuda.memory_allocated() - held
    if left:
        gc.collect()
        left = torch.cuda.memory_allocated() - held
    return (
        Outcome(DIFFERS, f"{left} bytes stay on the card") if left else Outcome(EQUAL)
    )


@contextmanager
def quietly() -> Iterator[None]:
    """Let operators warn, and have cuBLAS's workspaces in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()
        one = torch.ones(2, 2, device="cuda", requires_grad=True)
        (one @ one).sum().backward()
        yield


@contextmanager
def frozen() -> Iterator[None]:
    """Have garbage collections pass over the databases, which are large."""
    gc.collect()
    was_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def types_of(name: str) -> list[torch.dtype]:
    """Return the types of ``TYPES`` that an operator has on the CPU and on a card."""
    operator: Any = OPERATORS[name]
    both = operator.supported_dtypes("cpu") & operator.supported_dtypes("cuda")
    return [each for each in TYPES if each in both]


def types_on_one(name: str) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """Return the types of ``TYPES`` that a card lacks, and those that it has alone."""
    operator: Any = OPERATORS[name]
    host, card = operator.supported_dtypes("cpu"), operator.supported_dtypes("cuda")
    return (
        [each for each in TYPES if each not in card],
        [each for each in TYPES if each in card - host],
    )


def gradients_of_the_card(name: str) -> list[torch.dtype]:
    """Return the types of ``TYPES`` that have a gradient on a card alone."""
    operator: Any = OPERATORS[name]
    if not operator.supports_autograd:
        return []
    host = operator.supported_backward_dtypes("cpu") & operator.supported_dtypes("cpu")
    card = operator.supported_backward_dtypes("cuda")
    return [each for each in TYPES if each in card - host]


def run_lacking(name: str, dtype: torch.dtype) -> list[Finding]:
    """Run an operator of a type that a card lacks: one of the samples must be refused.

    Where the CPU takes all of them, though the database says that it lacks the type,
    too, the database is no judge.
    """
    operator: Any = OPERATORS[name]
    gathered = Gathered(name, name_of(dtype))
    with quietly():
        error = _first_error(operator, "cuda", dtype)
        if isinstance(error, UnsupportedOnSimulatedDeviceError):
            gathered.add("type", Outcome(REFUSED, str(error)))
        elif isinstance(error, (RuntimeError, TypeError, ValueError)):
            gathered.add("type", Outcome(EQUAL))
        else:
            host_error = _first_error(operator, "cpu", dtype)
            if error is not None or host_error is not None:
                gathered.add("type", _judge_raised(error, host_error))
            elif dtype in operator.supported_dtypes("cpu"):
                gathered.add("type", Outcome(DIFFERS, "passes; a card has no kernel"))
    return gathered.findings()


def _first_error(operator: Any, device: str, dtype: torch.dtype) -> Exception | None:
    """Return what the first sample that fails raises, or what making it raises."""

    def run() -> None:
        samples = (
            _made_on_card(operator, dtype)
            if device == "cuda"
            else operator.sample_inputs(device, dtype)
        )
        for sample in samples:
            seed()
            operator.op(sample.input, *sample.args, **sample.kwargs)

    return _attempt(run)[1]


def run_card_only(name: str, dtype: torch.dtype) -> list[Finding]:
    """Run an operator of a type that only a card has: it gives a result, or is refused."""
    operator: Any = OPERATORS[name]
    gathered = Gathered(name, name_of(dtype))
    with quietly():
        for sample in _samples(operator, dtype, None, gathered):
            gathered.add(
                "card's type", _lands(partial(_call, operator.op, sample.card))
            )
    return gathered.findings()


def run_card_only_gradient(name: str, dtype: torch.dtype) -> list[Finding]:
    """Take a gradient that only a card has: it is on the card, or is refused."""
    operator: Any = OPERATORS[name]
    gathered = Gathered(name, name_of(dtype))
    with quietly():
        for sample in _samples(operator, dtype, None, gathered, requires_grad=True):
            gathered.add(
                "card's gradient", _lands(partial(_take_gradient, operator, sample))
            )
    return gathered.findings()


def _take_gradient(operator: Any, sample: Sample) -> Any:
    wanted, results = _graph(operator, sample, sample.card)
    if not results or not wanted:
        return []
    seeds = [torch.ones_like(each) for each in results]
    return torch.autograd.grad(results, wanted, seeds, allow_unused=True)


def _lands(fn: Callable[[], Any]) -> Outcome:
    """Run something: what it gives is on the card, or it is refused by name."""
    out, error = _attempt(fn)
    if isinstance(error, UnsupportedOnSimulatedDeviceError):
        return Outcome(REFUSED, str(error))
    if error is not None:
        return Outcome(DIFFERS, f"raises {_short(error)}")
    places = {
        each.device.type for each in tree_leaves(out) if isinstance(each, torch.Tensor)
    }
    if places <= {"cuda"}:
        return Outcome(EQUAL)
    return Outcome(DIFFERS, f"the result is on {places}")


def run_errors(name: str) -> list[Finding]:
    """Run an operator on wrong inputs: class and words are those of torch's own tests."""
    operator: Any = OPERATORS[name]
    gathered = Gathered(name, "")
    if operator.error_inputs_func is None:
        return []
    with quietly():
        held = torch.cuda.memory_allocated()
        _run_wrong(operator, gathered)
        gathered.add("bytes left", bytes_left(held))
    return gathered.findings()


def _run_wrong(operator: Any, gathered: Gathered) -> None:
    seed()
    of_the_cpu = {each.error_regex for each in operator.error_inputs("cpu")}
    for each in operator.error_inputs("cuda"):
        sample = each.sample_input
        side = (sample.input, sample.args, sample.kwargs)
        _out, error = _attempt(partial(_call, operator.op, side))
        outcome = _judge_error(error, each)
        if outcome.level == DIFFERS and each.error_regex in of_the_cpu:
            # Torch skips its own test where this does not hold of the CPU either.
            twin = Counterparts().of(side)
            _out, host = _attempt(partial(_call, operator.op, twin))
            if (type(host), str(host)) == (type(error), str(error)):
                outcome = Outcome(EQUAL)
        gathered.add("wrong input", outcome)


def _judge_error(error: Exception | None, wanted: Any) -> Outcome:
    if isinstance(error, UnsupportedOnSimulatedDeviceError):
        return Outcome(REFUSED, str(error))
    if error is None:
        return Outcome(DIFFERS, f"passes; torch's test expects {wanted.error_regex!r}")
    if not isinstance(error, wanted.error_type):
        expected = getattr(wanted.error_type, "__name__", wanted.error_type)
        return Outcome(DIFFERS, f"raises {_short(error)} instead of {expected}")
    if re.search(wanted.error_regex, str(error)) is None:
        return Outcome(
            DIFFERS, f"says {str(error)[:150]!r} instead of {wanted.error_regex!r}"
        )
    return Outcome(EQUAL)


def run_first(name: str) -> list[Finding]:
    """Run an operator on its first sample, in its first type, and on wrong inputs."""
    return [
        *(found for each in types_of(name)[:1] for found in run_type(name, each, 1)),
        *run_errors(name),
    ]


def run_operator(name: str, limit: int | None) -> list[Finding]:
    """Run an operator in all its types and ways."""
    lacking, card_only = types_on_one(name)
    gradients = gradients_of_the_card(name)
    return [
        *(found for each in types_of(name) for found in run_type(name, each, limit)),
        *(found for each in lacking for found in run_lacking(name, each)),
        *(found for each in card_only for found in run_card_only(name, each)),
        *(found for each in gradients for found in run_card_only_gradient(name, each)),
        *run_errors(name),
    ]
