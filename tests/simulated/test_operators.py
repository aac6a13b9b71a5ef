"""One record for each operator: complete, unique, of operators that there are."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchgen  # type: ignore[import-untyped]  # it comes with torch
import yaml
from torch_databases import op_db
from versions import since

from pytest_gpumem.devices.simulated import operators
from pytest_gpumem.devices.simulated.autocast import kernels
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.operators import find, overloads
from pytest_gpumem.devices.simulated.operators.declarations import declaration_of
from pytest_gpumem.devices.simulated.operators.registry import OPERATORS, register
from pytest_gpumem.devices.simulated.operators.requests import (
    Call,
    Free,
    Results,
    Temporary,
    Workspace,
    ask,
)
from pytest_gpumem.devices.simulated.tensor import HANDLERS
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.requests import RequestStep

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

    assert OPERATORS["sum"].defined_at in str(caught.value)
    assert "test_operators.py:" in str(caught.value)
    assert "nowhere" != find(_aten.sum.default).source


@since(2, 13, "rows may name operators of later versions")
def test_every_name_is_an_operator() -> None:
    """On the version that the rows were read from, each names an operator."""
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

    assert modules == {each.defined_at.partition(":")[0] for each in OPERATORS.values()}


def test_autocast_knows_every_operator_that_its_header_names() -> None:
    """The lists of ``autocast_mode.h`` are read to their ends."""
    made = kernels()

    assert {"linear", "conv2d", "scaled_dot_product_attention", "prelu"} <= made.keys()
    assert {"exp", "layer_norm", "upsample_bilinear2d", "huber_loss"} <= made.keys()
    assert {"sum", "sum.dim_IntList", "softmax.int", "norm.Scalar"} <= made.keys()
    assert {"addcdiv", "scatter_add"} <= made.keys()
    assert not {"cat", "cross_entropy_loss", "relu"} & made.keys()


def test_autocast_asks_for_wide_results_and_copies_nothing(card: SimulatedCard) -> None:
    """A softmax of half precision writes single precision, without a wide copy of it."""
    scores = torch.zeros(64, 256, device="cuda", dtype=torch.float16)
    changes: list[int] = []
    card.tracers.append(lambda _i, _a, change, _all, _res: changes.append(change))

    with torch.autocast("cuda"):
        wide = scores.softmax(1)
        total = scores.sum()
        norm = torch.norm(scores, dim=1)

    card.tracers.pop()
    assert [64 * 256 * 4, 512, 512] == changes
    assert {torch.float32} == {each.dtype for each in (wide, total, norm)}


@pytest.mark.usefixtures("card")
def test_autocast_refuses_what_is_not_safe() -> None:
    """The text is torch's own; out of autocast it runs."""
    shares = torch.full((3,), 0.5, device="cuda")

    with (
        torch.autocast("cuda"),
        pytest.raises(RuntimeError, match="are unsafe to autocast"),
    ):
        torch.nn.functional.binary_cross_entropy(shares, shares)
    assert torch.nn.functional.binary_cross_entropy(shares, shares).is_cuda


def test_a_variant_in_place_shares_what_it_can() -> None:
    """Checks and alerts hold for it too; what runs the operator does not."""
    assert find(_aten.cumsum.default).alert == find(_aten.cumsum_.default).alert
    assert find(_aten.addmm_.default).uses_cublas
    assert find(_aten.add_.Tensor).around is None
    assert find(_aten.relu.default).check is None


def test_declarations_are_read_as_a_yaml_reader_reads_them() -> None:
    """Every hundredth, and the first one."""
    path = f"{torchgen.__path__[0]}/packaged/ATen/native/native_functions.yaml"
    text = Path(path).read_text(encoding="utf-8")
    entries = text.split("\n- func: ")[1:]
    for entry in entries[::100]:
        fields = yaml.safe_load(f"- func: {entry}")[0]
        name, _, overload = fields["func"].partition("(")[0].partition(".")
        func = getattr(getattr(_aten, name, None), overload or "default", None)
        if func is None:
            continue
        declared = declaration_of(func)
        is_structured = fields.get("structured") or "structured_delegate" in fields
        assert bool(is_structured) == declared.is_structured, name
        is_checked = fields.get("device_check") != "NoCheck"
        assert is_checked == declared.checks_devices, name


# -- devices ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            torch.mm,
            "got mat2 is on cpu, different from other tensors on cuda:0 (when checking "
            "argument in method wrapper_CUDA_mm)",
        ),
        (
            lambda card, host: card.index_select(0, host[0].long()),
            "got index is on cpu, different from other tensors on cuda:0 (when checking "
            "argument in method wrapper_CUDA__index_select)",
        ),
        (
            lambda card, host: torch.gather(card, 0, card.long(), out=host),
            "got self is on cuda:0, different from other tensors on cpu (when checking "
            "argument in method wrapper_CUDA_gather_out_out)",
        ),
        (
            lambda card, host: card.index_add_(0, card[0].long(), host),
            "got source is on cpu, different from other tensors on cuda:0 (when checking "
            "argument in method wrapper_CUDA_index_add_)",
        ),
        (
            torch.normal,
            "got std is on cpu, different from other tensors on cuda:0 (when checking "
            "argument in method wrapper_CUDA_Tensor_Tensor_normal)",
        ),
    ],
    ids=["structured", "unstructured", "out", "in_place", "overload"],
)
@pytest.mark.usefixtures("card")
def test_a_stray_operand_is_refused_in_the_kernels_name(call: Any, text: str) -> None:
    """Generated code names itself by operator, and by overload if not structured."""
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call(torch.ones(2, 2, device="cuda"), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("run", "feature"),
    [
        (lambda card: torch.linalg.lu(card, pivot=False), "aten.linalg_lu"),
        (
            lambda card: torch.quantize_per_tensor(card, 0.1, 0, torch.quint8),
            "a quantized tensor",
        ),
        (
            lambda card: torch.quantize_per_tensor(
                card.cpu(), 0.1, 0, torch.quint8
            ).cuda(),
            "a quantized tensor",
        ),
        (
            lambda _card: torch._empty_affine_quantized(
                [3], scale=0.1, zero_point=0, dtype=torch.quint8, device="cuda"
            ),
            "a quantized tensor",
        ),
        (
            lambda _card: torch.autograd.profiler.emit_nvtx().__enter__(),
            "torch.autograd.profiler.emit_nvtx",
        ),
    ],
    ids=["lu", "quantize", "move", "make", "nvtx"],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.usefixtures("card")
def test_what_the_cpu_lacks_is_refused_by_name(run: Any, feature: str) -> None:
    """A text about the CPU would be wrong on a card."""
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match=re.escape(feature)):
        run(torch.eye(2, device="cuda"))


@pytest.mark.usefixtures("card")
def test_a_switched_off_nvtx_emitter_is_none() -> None:
    """It does nothing on a card either."""
    with torch.autograd.profiler.emit_nvtx(enabled=False):
        assert torch.ones(2, device="cuda").sum() == 2


@pytest.mark.usefixtures("card")
def test_results_that_are_made_anew_are_on_the_card() -> None:
    """C++ makes those of empty matrices by itself."""
    empty = torch.empty(0, 0, device="cuda")

    for norm in (None, "nuc", 1):
        assert torch.linalg.cond(empty, norm).is_cuda


@since(2, 10, "no such norm of an empty matrix, on the host either")
@pytest.mark.usefixtures("card")
def test_the_norm_of_an_empty_matrix_is_on_the_card() -> None:
    """By its columns, of which there are none."""
    assert torch.linalg.norm(torch.empty(5, 0, device="cuda"), 1).is_cuda


# -- what is asked of the allocator ------------------------------------------------------


def _asked(
    card: SimulatedCard, steps: list[RequestStep], sizes: list[int]
) -> list[int]:
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


def test_storage_that_has_to_grow_is_charged_before_it_does(
    card: SimulatedCard,
) -> None:
    """``set_`` with a size beyond the storage's end."""
    tensor = torch.ones(2, device="cuda")
    storage = torch.ones(4, device="cuda").untyped_storage()

    with _full(card), pytest.raises(torch.OutOfMemoryError):
        tensor.set_(storage, 1, (1000,), (1,))

    assert [1.0, 1.0] == tensor.tolist()
    assert 16 == storage.nbytes()
    before = torch.cuda.memory_allocated()
    tensor.set_(storage, 1, (1000,), (1,))
    assert 4004 == storage.nbytes()
    assert 4096 - 512 - 512 == torch.cuda.memory_allocated() - before


def test_only_these_mutating_operators_charge_by_themselves() -> None:
    """Every other goes through the one place that charges first."""
    alone = {
        "copy_": "its staging buffer is taken before anything is copied",
        "set_": "a storage that grows is taken before it does",
    }

    found = {
        func.overloadpacket.__name__
        for _name, func, each in overloads()
        if func._schema.is_mutable and HANDLERS.make(func) is each.handler
    }
    assert alone.keys() == found


def test_rows_know_nothing_of_what_runs_them() -> None:
    """The registry is below the dispatcher: no row imports what looks rows up."""
    above = {"dispatch", "foresight", "factories", "autocast", "install"}
    folder = Path(operators.__file__).parent

    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module is not None
                assert not above & set(node.module.split(".")), path.name
