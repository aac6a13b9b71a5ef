"""One record for each operator: complete, unique, of operators that there are."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchgen  # type: ignore[import-untyped]  # it comes with torch
import yaml
from torch.testing._internal.common_methods_invocations import op_db

from pytest_gpumem.devices.simulated import operators
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.operators import find, overloads
from pytest_gpumem.devices.simulated.operators.checks import common
from pytest_gpumem.devices.simulated.operators.registry import OPERATORS, register
from pytest_gpumem.devices.simulated.operators.requests import (
    Call,
    Free,
    Results,
    Temporary,
    Workspace,
    ask,
)
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.requests import Step

_aten = torch.ops.aten


@pytest.fixture(name="card")
def _card() -> Iterator[SimulatedCard]:
    with simulated_device("T4") as machine:
        torch.empty(1, device="cuda")
        yield machine.cards[0]


# -- the registry ----------------------------------------------------------------------


def test_a_second_row_is_refused_with_both_places() -> None:
    """An operator has one record; the message says where both stand."""
    with pytest.raises(ValueError, match=r"operator sum has two rows") as caught:
        register("sum", source="nowhere")

    assert OPERATORS["sum"].place in str(caught.value)
    assert "test_operators.py:" in str(caught.value)
    assert "nowhere" != find(_aten.sum.default).source


def test_every_name_is_an_operator() -> None:
    """On the version that the rows were read from, each names an operator."""
    if torch.__version__.split("+")[0] < "2.13":
        pytest.skip("rows may name operators of later versions")
    patterns = {name for name in OPERATORS if name.endswith("*")}

    missing = [name for name in OPERATORS.keys() - patterns if not hasattr(_aten, name)]

    assert [] == missing
    assert {"_foreach_*"} == patterns


def test_every_row_has_a_source() -> None:
    """A rule that nobody can look up is a guess."""
    assert [] == [name for name, each in OPERATORS.items() if not each.source]


def test_every_row_stands_in_its_familys_module() -> None:
    """The families that are imported are all there are."""
    modules = {f"{each.__name__.rpartition('.')[2]}.py" for each in operators.FAMILIES}

    assert modules == {each.place.partition(":")[0] for each in OPERATORS.values()}


def test_every_overload_that_autocast_names_is_there() -> None:
    """A cast of an overload that does not exist would never run."""
    found = {
        (each.overloadpacket.__name__, each._overloadname) for _, each, _ in overloads()
    }

    missing = [
        (name, overload)
        for name, each in OPERATORS.items()
        for overload in (each.autocast.overloads if each.autocast else ())
        if (name, overload) not in found
    ]

    assert [] == missing


def test_a_variant_in_place_shares_what_it_can() -> None:
    """Checks and alerts hold for it too; what runs the operator does not."""
    assert find(_aten.cumsum.default).alert == find(_aten.cumsum_.default).alert
    assert find(_aten.addmm_.default).uses_cublas
    assert find(_aten.add_.Tensor).check is find(_aten.add.Tensor).check
    assert find(_aten.add_.Tensor).around is None
    assert find(_aten.relu.default).check is None


def test_operators_that_check_no_devices_are_not_held_to_the_common_check() -> None:
    """``device_check: NoCheck`` of ``native_functions.yaml``, for more than one tensor.

    Those that no CPU runs, or that are of no card, never come that far.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    path = f"{torchgen.__path__[0]}/packaged/ATen/native/native_functions.yaml"
    with open(path, encoding="utf-8") as stream:  # noqa: PTH123  # inside the wheel
        entries = yaml.safe_load(stream)
    held = set()
    for entry in entries:
        if entry.get("device_check") != "NoCheck":
            continue
        name, _, overload = entry["func"].partition("(")[0].partition(".")
        func = getattr(getattr(_aten, name, None), overload or "default", None)
        if func is None or not has_kernel(func.name(), "CPU"):
            continue
        if any(word in name for word in ("nested", "sparse", "_for_cpu")):
            continue
        tensors = [
            each
            for each in func._schema.arguments
            if "Tensor" in str(each.type) and not each.is_out
        ]
        operator = find(func)
        is_own = operator.handler or operator.takes_host
        if len(tensors) > 1 and (operator.check or common) is common and not is_own:
            held.add(name)

    assert set() == held


# -- what is asked of the allocator ------------------------------------------------------


def _asked(card: SimulatedCard, steps: list[Step], sizes: list[int]) -> list[int]:
    """Return the bytes of each change that steps make to a card, in order."""
    changes: list[int] = []
    card.tracers.append(lambda _i, _a, change, _all, _res: changes.append(change))
    held = ask(steps, sizes, card)
    done = len(changes)
    del held
    card.tracers.pop()
    with card.locked():
        pass
    return changes[:done]


def test_steps_are_taken_in_order(card: SimulatedCard) -> None:
    """Results where they are named, the others at the end, temporaries in between."""
    buffer = Temporary(1024)

    changes = _asked(
        card,
        [buffer, Results(1), Free(buffer), Temporary(2048), Temporary(0)],
        [512, 4096, 0],
    )

    assert [1024, 4096, -1024, 2048, 512, -2048] == changes


def test_a_workspace_is_taken_once(card: SimulatedCard) -> None:
    """The second operator finds it."""
    first = _asked(card, [Results(), Workspace()], [512])
    second = _asked(card, [Results(), Workspace()], [512])

    assert [512, 8519680] == first
    assert [512] == second


def test_an_oom_between_steps_gives_everything_back(card: SimulatedCard) -> None:
    """Nothing stays of an operator that did not run."""
    before = card.memory_stats()["allocated_bytes.all.current"]

    with pytest.raises(torch.OutOfMemoryError):
        ask([Temporary(2**20), Results(), Temporary(2**50)], [2**20], card)

    assert before == card.memory_stats()["allocated_bytes.all.current"]


def test_a_call_knows_arguments_by_name(card: SimulatedCard) -> None:
    """Given by place, by name, or not at all."""
    source = torch.ones(2, 3)
    call = Call(_aten.sum.dim_IntList, [source, [1]], {"dtype": None}, [source], card)

    assert call["self"] is source
    assert [1] == call["dim"]
    assert call["keepdim"] is False
    assert call["dtype"] is None
    assert "none" == call.get("dims", "none")
    assert "dim_IntList" == call.overload
    assert (7, 5) == call.capability
    assert 40 == call.processors.count
    with pytest.raises(KeyError):
        call["dims"]


# -- charged before it takes effect ----------------------------------------------------


@contextlib.contextmanager
def _full(card: SimulatedCard) -> Iterator[None]:
    """Let the card refuse every request; the block may meet an OOM."""

    def refuse(_index: int, _nbytes: int) -> bool:
        return True

    card.faults.append(refuse)
    try:
        yield
    finally:
        card.faults.remove(refuse)


def _samples(ability: str) -> Iterator[tuple[Any, Any]]:
    """Yield operators of torch's own database that have an ability, with arguments."""
    for info in op_db:
        if torch.float32 in info.dtypes and getattr(info, ability):
            # Its method of that name looks through the stack of the test each time.
            samples = info.sample_inputs_func(
                info, "cpu", torch.float32, requires_grad=False
            )
            for sample in itertools.islice(samples, 3):
                with contextlib.suppress(UnsupportedOnSimulatedDeviceError):
                    yield info, sample.transform(_on_card)


def _on_card(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value


def _filling(info: Any, sample: Any) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """Return a call with an empty ``out=``, and what that is; nothing without results."""
    result = info(sample.input, *sample.args, **sample.kwargs)
    results = [result] if isinstance(result, torch.Tensor) else [*result]
    if not any(each.numel() for each in results):
        return list, []
    outs = [torch.empty(0, dtype=each.dtype, device="cuda") for each in results]
    given = outs[0] if isinstance(result, torch.Tensor) else tuple(outs)
    return (
        lambda: info(sample.input, *sample.args, **sample.kwargs, out=given),
        outs,
    )


def _changing(info: Any, sample: Any) -> tuple[Callable[[], Any], list[torch.Tensor]]:
    """Return a call that changes its first argument, and that."""
    source = sample.input
    return (
        lambda: info.inplace_variant(source, *sample.args, **sample.kwargs),
        [source] if isinstance(source, torch.Tensor) else [],
    )


def _meets_an_oom(card: SimulatedCard, call: Callable[[], Any]) -> bool:
    with _full(card):
        try:
            call()
        except torch.OutOfMemoryError:
            return True
        except (RuntimeError, TypeError, ValueError):
            pass  # it takes no such arguments
    return False


def _are_equal(before: Any, after: Any) -> bool:
    return all(
        old_bytes == new_bytes and torch.equal(old.nan_to_num(), new.nan_to_num())
        for (old_bytes, old), (new_bytes, new) in zip(before, after, strict=True)
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("ability", "make_call", "least"),
    [("supports_out", _filling, 280), ("inplace_variant", _changing, 5)],
    ids=["out", "in_place"],
)
def test_an_oom_of_any_operator_leaves_everything_as_it_was(
    card: SimulatedCard, ability: str, make_call: Any, least: int
) -> None:
    """On a full card nothing was resized, written or drawn, whatever the operator."""
    tried: set[str] = set()
    torn: set[str] = set()
    for info, sample in _samples(ability):
        if info.name in tried:
            continue
        try:
            call, watched = make_call(info, sample)
        except (RuntimeError, TypeError):
            continue  # not of a card, or not of tensors
        before = [(each.untyped_storage().nbytes(), each.cpu()) for each in watched]
        state = torch.cuda.get_rng_state()
        if not _meets_an_oom(card, call):
            continue
        tried.add(info.name)
        after = [(each.untyped_storage().nbytes(), each.cpu()) for each in watched]
        if not (
            torch.equal(state, torch.cuda.get_rng_state()) and _are_equal(before, after)
        ):
            torn.add(info.name)

    # In Python it adds a dimension in place first, on a real card too.
    assert set() == torn - {"nn.functional.dropout3d"}
    assert least < len(tried), sorted(tried)
