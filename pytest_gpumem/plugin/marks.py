"""The plugin's markers: their meanings, and early checks of their arguments."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest

from pytest_gpumem.errors import GpuMemError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from pytest_gpumem.records.record import LimitPhase, Metric
    from pytest_gpumem.rules.rule import Rule
    from pytest_gpumem.sizes import SizeSpec

#: The kinds of reports that show timelines.
DETAILED: Final = ("json", "html")

LIMIT_METRICS: Final = ("allocated", "reserved", "process", "fragmented", "activations")

LIMIT_PHASES: Final = ("call", "test", "children")

DESCRIPTIONS: Final = (
    "gpu: needs a real CUDA card; without one the test is skipped",
    "gpu_budget(size=None, *, device=0, host=None): bytes of a card that this test may "
    "hold, inclusive; overrides --gpu-budget; host: bytes that it may add to the host's "
    "memory; overrides --gpu-host-budget",
    "max_vram(limit, *, metric='allocated', device=None, phase='call'): fail the test "
    "if its peak is above the limit; metric is allocated, reserved, process, fragmented "
    "or activations; device is a card's index (None means each card); phase is call, test "
    "(with setup and teardown) or children (each process that the test starts)",
    "max_vram_leak(size=0, *, repeat=None, warmup=1): fail the test if it leaves more "
    "bytes on the cards; with repeat, the body is run that often after the warm-up, and "
    "the bytes that each run adds are judged",
    "requires_vram(size, *, device=0): bytes of a card that this test needs; it starts "
    "when no worker claims them, and is skipped if no card has that many",
    "gpu_exclusive(*, device=None): this test has a card (None means each card) for "
    "itself; no test of another worker runs on it at the same time",
    "gpu_isolated: run this test in a new process, so that libraries keep nothing for "
    "later tests; fixtures of all scopes are made again there",
    "inject_oom(rule): make chosen allocations of this test's call fail",
    "oom_sweep(points='all', *, recover=False, on_demand=False, modes=('transient', "
    "'persistent'), flavours=('native',), rule='any', timeout_s=None): run the test once "
    "for each of its allocations, with that one failing, and judge every run; with "
    "on_demand only if --gpu-oom-sweep is given",
    "oom_fallback(points='all', ...): old spelling of oom_sweep(points, recover=True, "
    "on_demand=True, ...)",
    "hub_model(name, source=None, *, format='safetensors', max_shard_size=None, "
    "dtype='float32', seed=0, weights='random', architecture=None): serve a model "
    "under its name on the hub while this test runs, as --gpu-hub-model does",
)


class Budget(NamedTuple):
    """``gpu_budget``: a share of one card."""

    size: SizeSpec
    device_index: int


class _BudgetMark(NamedTuple):
    """The arguments of one ``gpu_budget``: a share of a card, of the host, or of both."""

    budget: Budget | None
    host_bytes: int | None


class Leak(NamedTuple):
    """``max_vram_leak``: bytes that a test may leave, or that each run may add."""

    nbytes: int
    repeat: int | None
    warmup: int


class Requirement(NamedTuple):
    """``requires_vram``: the bytes of one card that a test needs."""

    size: SizeSpec
    device_index: int


class Limit(NamedTuple):
    """``max_vram``: the most that a test may need of a card, inclusive.

    Attributes:
        size: The limit.
        metric: One of ``LIMIT_METRICS``.
        device_index: The card; None means each.
        phase: One of ``LIMIT_PHASES``.
    """

    size: SizeSpec
    metric: Metric = "allocated"
    device_index: int | None = None
    phase: LimitPhase = "call"


def _size(value: Any) -> SizeSpec:
    from pytest_gpumem.sizes import parse_size_spec

    return parse_size_spec(value)


def _device(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"device={value!r} is not a card's index; give 0, 1, ...")
    return value


def _budget(size: Any = None, *, device: Any = 0, host: Any = None) -> _BudgetMark:
    from pytest_gpumem.sizes import parse_size

    if size is None and host is None:
        raise TypeError("give a size of the card, such as '4GiB', or host='8GiB'")
    index = _device(device)
    return _BudgetMark(
        None if size is None else Budget(_size(size), index),
        None if host is None else parse_size(host),
    )


def _requirement(size: Any, *, device: Any = 0) -> Requirement:
    return Requirement(_size(size), _device(device))


def _exclusive(*, device: Any = None) -> int | None:
    return None if device is None else _device(device)


def _limit(
    limit: Any, *, metric: Any = "allocated", device: Any = None, phase: Any = "call"
) -> Limit:
    if metric not in LIMIT_METRICS:
        raise ValueError(f"metric={metric!r}; accepted are {', '.join(LIMIT_METRICS)}")
    if phase not in LIMIT_PHASES:
        raise ValueError(f"phase={phase!r}; accepted are {', '.join(LIMIT_PHASES)}")
    if metric == "activations" and phase == "children":
        raise ValueError(
            "metric='activations' is not known of child processes; limit their "
            "allocated bytes"
        )
    return Limit(
        _size(limit), metric, None if device is None else _device(device), phase
    )


def _leak(size: Any = 0, *, repeat: Any = None, warmup: Any = 1) -> Leak:
    from pytest_gpumem.sizes import parse_size

    nbytes = parse_size(size, allow_zero=True)
    for name, number, least in (("repeat", repeat, 3), ("warmup", warmup, 0)):
        if name == "repeat" and number is None:
            continue
        if type(number) is not int or number < least:
            raise ValueError(
                f"{name}={number!r}; give a number of runs from {least} on"
            )
    return Leak(nbytes, repeat, warmup)


def _rule(rule: Any) -> Rule:
    if not isinstance(rule, str):
        raise TypeError(f"rule={rule!r} is not a text such as 'load:nth=3'")
    from pytest_gpumem.rules.parser import parse_rule

    return parse_rule(rule)


def _sweep(
    points: Any = "all", *, on_demand: Any = False, **options: Any
) -> dict[str, Any]:
    from pytest_gpumem.sweeps.plan import SweepPlan

    if not isinstance(on_demand, bool):
        raise TypeError(f"on_demand={on_demand!r}; give True or False")
    chosen = {"points": points, **options}
    for name in ("only", "shard"):
        if name in options:
            raise ValueError(f"{name} is for the run to choose")
    SweepPlan(**chosen)
    return chosen


def _fallback(points: Any = "all", **options: Any) -> dict[str, Any]:
    return _sweep(points, **{"recover": True, **options})


def _gpu() -> None:
    return None


_READERS: Final[dict[str, Callable[..., Any]]] = {
    "gpu": _gpu,
    "gpu_budget": _budget,
    "max_vram": _limit,
    "requires_vram": _requirement,
    "gpu_exclusive": _exclusive,
    "gpu_isolated": _gpu,
    "max_vram_leak": _leak,
    "inject_oom": _rule,
    "oom_sweep": _sweep,
    "oom_fallback": _fallback,
}


class Markers(NamedTuple):
    """The arguments of a test's markers; for each kind, the nearest marker first."""

    needs_card: bool = False
    budgets: tuple[Budget, ...] = ()
    limits: tuple[Limit, ...] = ()
    rules: tuple[Rule, ...] = ()
    leak: Leak | None = None
    sweep: dict[str, Any] | None = None
    requirements: tuple[Requirement, ...] = ()
    alone_on: tuple[int | None, ...] = ()
    host_budget: int | None = None
    is_isolated: bool = False


class MarkersByTest(dict[pytest.Item | None, Markers]):
    """The arguments of tests' markers; reading an unmarked test adds no entry."""

    def __missing__(self, item: pytest.Item | None) -> Markers:
        """Return the arguments of a test without markers."""
        return _UNMARKED


_UNMARKED: Final = Markers()


def marked(
    items: Iterable[pytest.Item], names: Container[str]
) -> Iterator[tuple[pytest.Item, list[pytest.Mark]]]:
    """Yield the tests that have markers with these names, and the markers, nearest first.

    The markers of a module or a class are read once, not once for each of its tests.
    """
    above: dict[int, list[pytest.Mark]] = {}
    for item in items:
        parent = item.parent
        inherited = above.get(id(parent))
        if inherited is None:
            found = () if parent is None else parent.iter_markers()
            inherited = [mark for mark in found if mark.name in names]
            above[id(parent)] = inherited
        own = [mark for mark in item.own_markers if mark.name in names]
        if own or inherited:
            yield item, own + inherited


def read_markers(
    items: Iterable[pytest.Item], *, sweeps_on_demand: bool = False
) -> Iterator[tuple[pytest.Item, Markers]]:
    """Yield the tests that have markers of this plugin, with the markers' arguments.

    Args:
        items: The tests.
        sweeps_on_demand: Whether tests are swept that are only swept on demand.

    Raises:
        pytest.UsageError: A marker's arguments make no sense.
    """
    for item, ours in marked(items, _READERS):
        yield item, _markers_of(item, ours, sweeps_on_demand=sweeps_on_demand)


def _markers_of(
    item: pytest.Item, ours: list[pytest.Mark], *, sweeps_on_demand: bool
) -> Markers:
    read: dict[str, list[Any]] = {name: [] for name in _READERS}
    for mark in ours:
        read[mark.name].append(_read(item, mark))
    sweep, is_wanted = _sweep_of(item, sweeps_on_demand=sweeps_on_demand)
    return Markers(
        needs_card=bool(read["gpu"]),
        budgets=tuple(each.budget for each in read["gpu_budget"] if each.budget),
        host_budget=next(
            (each.host_bytes for each in read["gpu_budget"] if each.host_bytes), None
        ),
        limits=_distinct(read["max_vram"]),
        requirements=tuple(read["requires_vram"]),
        alone_on=tuple(read["gpu_exclusive"]),
        rules=tuple(read["inject_oom"]),
        is_isolated=bool(read["gpu_isolated"]),
        leak=next(iter(read["max_vram_leak"]), None),
        sweep=None
        if sweep is None or not is_wanted
        else _READERS[sweep.name](*sweep.args, **sweep.kwargs),
    )


def first_of_ours(items: Iterable[pytest.Item]) -> tuple[pytest.Item, str] | None:
    """Return the first test with a marker that only this plugin uses, and its name.

    ``gpu`` is left out, because many suites use a marker of that name for other purposes.
    """
    for item, ours in marked(items, _READERS.keys() - {"gpu"}):
        return item, ours[0].name
    return None


def is_swept(test: pytest.Item, *, sweeps_on_demand: bool) -> bool:
    """Tell whether a test's markers ask for a sweep; see ``Markers``."""
    mark, is_wanted = _sweep_of(test, sweeps_on_demand=sweeps_on_demand)
    return mark is not None and is_wanted


def _sweep_of(
    test: pytest.Item, *, sweeps_on_demand: bool
) -> tuple[pytest.Mark | None, bool]:
    """Return a test's marker for sweeps, and whether this run sweeps the test."""
    mark = test.get_closest_marker("oom_sweep")
    if mark is None:
        return test.get_closest_marker("oom_fallback"), sweeps_on_demand
    return mark, sweeps_on_demand or not mark.kwargs.get("on_demand", False)


def _distinct(limits: list[Limit]) -> tuple[Limit, ...]:
    """Return the nearest limit of each metric, card and phase."""
    nearest: dict[tuple[Any, ...], Limit] = {}
    for limit in limits:
        nearest.setdefault(limit[1:], limit)
    return tuple(nearest.values())


def _read(item: pytest.Item, mark: pytest.Mark) -> Any:
    reader = _READERS[mark.name]
    try:
        inspect.signature(reader).bind(*mark.args, **mark.kwargs)
        return reader(*mark.args, **mark.kwargs)
    except (GpuMemError, ValueError, TypeError) as error:
        raise pytest.UsageError(
            f"{item.nodeid}: @pytest.mark.{mark.name}: {error}"
        ) from None
