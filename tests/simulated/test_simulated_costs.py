"""What operators hold, when they are charged, and what fails where nothing is left."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torchgen  # type: ignore[import-untyped]  # it comes with torch
import yaml
from accelerate.utils.memory import should_reduce_batch_size
from torch.nn import functional
from versions import since

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.operators.registry import OPERATORS
from pytest_gpumem.errors import HostMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

MIB = 2**20


@pytest.fixture(autouse=True, name="machine")
def _machine() -> Iterator[SimulatedMachine]:
    with simulated_device("A100-40GB") as machine:
        yield machine


@contextmanager
def _full(machine: SimulatedMachine) -> Iterator[None]:
    """Let the card refuse every request; the block is to meet an OOM."""
    faults = machine.cards[0].faults
    faults.append(lambda _index, _nbytes: True)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            yield
    finally:
        faults.clear()


# -- operators with a kernel of their own ---------------------------------------------------


def _rms_norm(source: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(source, (1024,))


@pytest.mark.parametrize(
    ("operator", "kept"),
    [
        (functional.silu, 0),
        (functional.mish, 0),
        pytest.param(
            _rms_norm,
            1024 * 4,
            marks=since(2, 9, "rms_norm has no kernel of its own"),
        ),
    ],
)
def test_backward_takes_one_gradient(
    operator: Callable[[torch.Tensor], torch.Tensor], kept: int
) -> None:
    """Fused kernels make their result and their gradient, and nothing on the way."""
    host = torch.randn(1024, 1024, requires_grad=True)
    card = host.detach().cuda().requires_grad_()
    grad = torch.randn(1024, 1024)
    card_grad = grad.cuda()
    before = torch.cuda.memory_allocated()

    result = operator(card)
    held = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    result.backward(card_grad)
    extra = torch.cuda.max_memory_allocated() - before - held
    operator(host).backward(grad)

    assert 4 * MIB + kept == held
    assert 4 * MIB == extra
    assert host.grad is not None
    assert card.grad is not None
    assert torch.equal(host.grad, card.grad.cpu())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("has_weight", [True, False])
def test_the_gradients_of_rms_norm_are_the_cpus(
    dtype: torch.dtype, *, has_weight: bool
) -> None:
    """Bit by bit, in each type, with and without weights, over two dimensions."""
    source, weight, grad = (
        torch.randn(shape, dtype=dtype) for shape in ((7, 4, 6), (4, 6), (7, 4, 6))
    )
    found = []
    for device in ("cpu", "cuda"):
        leaves = [source.detach().to(device).requires_grad_()]
        if has_weight:
            leaves.append(weight.detach().to(device).requires_grad_())
        made = functional.rms_norm(leaves[0], (4, 6), leaves[1] if has_weight else None)
        grads = torch.autograd.grad(made, leaves, grad.to(device))
        found.append([each.cpu() for each in grads])

    assert all(map(torch.equal, *found))


def test_normalising_by_the_root_mean_square_has_its_gradients() -> None:
    """``rms_norm`` with weights, in double and half precision, twice differentiated."""
    source = torch.randn(3, 2, 5, dtype=torch.float64)
    weight = torch.randn(2, 5, dtype=torch.float64)
    grads = []
    for device in ("cpu", "cuda"):
        leaves = [each.to(device).requires_grad_() for each in (source, weight)]
        made = functional.rms_norm(leaves[0], (2, 5), leaves[1])
        first = torch.autograd.grad(made.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].sum(), leaves)
        grads.append([each.cpu() for each in (*first, *second)])
    half = torch.ones(2, 4, dtype=torch.float16, device="cuda", requires_grad=True)
    functional.rms_norm(half, (4,)).sum().backward()

    torch.testing.assert_close(grads[0], grads[1])
    assert half.grad is not None
    assert half.grad.dtype is torch.float16


def test_every_operator_with_a_kernel_of_its_own_is_known() -> None:
    """Torch's own table says which composed operators are one kernel on a card."""
    table = (
        Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    )
    fused: set[str] = set()
    for each in yaml.load(table.read_text(), Loader=yaml.CSafeLoader):
        keys = {
            key.strip()
            for keys in each.get("dispatch") or ()
            for key in keys.split(",")
        }
        if {"CUDA", "CompositeImplicitAutograd"} <= keys:
            fused.add(each["func"].partition("(")[0])
    # A structured operator's kernel is that of its variant with out=.
    own = {name for name, each in OPERATORS.items() if each.has_cuda_kernel}
    assert fused | {"silu_backward"} <= own


# -- charged before it takes effect ---------------------------------------------------------


def test_an_oom_leaves_what_was_to_grow_as_it_was(machine: SimulatedMachine) -> None:
    """``resize_``, ``resize_as_`` and ``out=`` fail before they change anything."""
    tensor = torch.ones(3, device="cuda")
    large = torch.ones(2000, device="cuda")
    out = torch.empty(0, device="cuda")
    values = torch.empty(0, device="cuda")
    indices = torch.empty(0, device="cuda", dtype=torch.int64)

    for grow in (
        lambda: tensor.resize_(2000),
        lambda: tensor.resize_as_(large),
        lambda: torch.add(large, large, out=out),
        lambda: torch.topk(large, 3, out=(values, indices)),
    ):
        with _full(machine):
            grow()

    assert [1.0] * 3 == tensor.tolist()
    assert 12 == tensor.untyped_storage().nbytes()
    assert [0, 0, 0] == [each.numel() for each in (out, values, indices)]
    before = torch.cuda.memory_allocated()
    tensor.resize_(2000)
    torch.add(large, large, out=out)
    assert 2 * 8192 - 512 == torch.cuda.memory_allocated() - before
    assert 4000.0 == out.sum().item()


def test_an_oom_leaves_running_statistics_as_they_were(
    machine: SimulatedMachine,
) -> None:
    """A layer whose results have no room has not learnt from its batch."""
    layer = torch.nn.BatchNorm1d(4).cuda()
    batch = torch.randn(8, 4, device="cuda") + 3

    with _full(machine):
        functional.batch_norm(
            batch, layer.running_mean, layer.running_var, training=True
        )
    before = layer.running_mean.tolist()  # type: ignore[union-attr]  # it is there
    layer(batch)

    assert [0.0] * 4 == before
    assert layer.running_mean.tolist() != before  # type: ignore[union-attr]  # see above


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("inv", 1),
        ("det", 1),
        ("slogdet", 2),
        ("cholesky", 1),
        ("eigvalsh", 1),
        ("svdvals", 1),
        ("matrix_rank", 1),
        ("lu_factor", 2),
        ("ldl_factor", 2),
    ],
)
def test_composed_operators_fill_what_they_are_given(name: str, count: int) -> None:
    """``out=`` of operators that C++ composes ends on the card, of any size."""
    matrix = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    operator = getattr(torch.linalg, name)
    expected = operator(matrix)
    expected = [expected] if count == 1 else [*expected]
    outs = [torch.empty(0, dtype=each.dtype, device="cuda") for each in expected]

    result = operator(matrix.cuda(), out=outs[0] if count == 1 else tuple(outs))

    assert (result if count == 1 else result[0]) is outs[0]
    for out, value in zip(outs, expected, strict=True):
        torch.testing.assert_close(out.cpu(), value)


def test_more_composed_operators_fill_what_they_are_given() -> None:
    """So do sorting, quantiles and the logarithm of the sigmoid; types must agree."""
    source = torch.tensor([3.0, 1.0, 2.0], device="cuda")
    out = torch.empty(0, device="cuda")

    assert [1.0, 2.0, 3.0] == torch.msort(source, out=out).tolist()
    assert 2.0 == torch.quantile(source, 0.5, out=out).item()
    assert 2.0 == torch.nanquantile(source, 0.5, out=out).item()
    assert (3,) == torch._C._nn.log_sigmoid(source, out=out).shape  # type: ignore[call-arg]  # not in its stub
    with pytest.raises(RuntimeError, match="Expected out tensor to have dtype float"):
        torch.msort(source, out=torch.empty(0, device="cuda", dtype=torch.float64))


# -- settings while a program runs ----------------------------------------------------------


def test_settings_change_while_a_program_runs(machine: SimulatedMachine) -> None:
    """New settings serve the requests to come; nonsense is torch's own error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.cuda.memory._set_allocator_settings("roundup_power2_divisions:2")
    first = torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")
    rounded = torch.cuda.memory_allocated()
    torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    second = torch.empty(5 * MIB, dtype=torch.uint8, device="cuda")
    config = machine.cards[0].allocator.config

    assert 6 * MIB == rounded
    assert 11 * MIB == torch.cuda.memory_allocated()
    assert config.expandable_segments
    assert "expandable_segments:True" == torch._C._accelerator_getAllocatorSettings()
    with pytest.raises(ValueError, match=r"Unrecognized .*nonsense"):
        torch._C._accelerator_setAllocatorSettings("nonsense:1")
    del first, second


# -- the host, and the build ------------------------------------------------------------------


def test_a_host_without_room_is_no_oom_of_the_card() -> None:
    """What the host cannot keep has an error that no handler takes for the card's."""
    huge = 500 * 2**40
    with simulated_device("1000TiB"):
        number = torch.zeros(1, device="cuda")
        attempts: list[Callable[[], Any]] = [
            lambda: torch.empty(huge, dtype=torch.uint8, device="cuda"),
            lambda: number.expand(huge // 8) + 1,
            lambda: torch.zeros(1).expand(huge // 8).cuda(),
            lambda: torch.UntypedStorage(huge, device="cuda"),
            lambda: torch.zeros(3, device="cuda").resize_(huge // 8),
        ]
        for attempt in attempts:
            with pytest.raises(HostMemoryError) as raised:
                attempt()
            text = str(raised.value)
            assert not should_reduce_batch_size(raised.value)
            assert not isinstance(raised.value, (RuntimeError, MemoryError))
            assert "out of memory" not in text
            assert "can't allocate memory" not in text
            assert "--gpu-values=none" in text
            del raised
        assert 512 == torch.cuda.memory_allocated()
        assert 0 == torch.cuda.memory_stats()["num_ooms"]


def test_the_build_is_one_for_cuda() -> None:
    """Versions that libraries read have numbers while a card is there."""
    version: Any = torch.version.cuda

    assert 12 <= int(version.split(".")[0])
    assert torch.backends.cuda.is_built()
    assert 90000 <= int(torch.backends.cudnn.version() or 0)


# -- streams ----------------------------------------------------------------------------------


def _held_on(stream: int) -> int:
    """Return the bytes in use of the segments of a stream."""
    segments = torch.cuda.memory_snapshot()
    return sum(each["allocated_size"] for each in segments if each["stream"] == stream)


def test_backward_runs_on_the_stream_of_its_forward() -> None:
    """Gradients are of the forward's stream, which hooks and functions find current."""
    seen: list[int] = []

    def note(_grad: Any) -> None:
        seen.append(torch.cuda.current_stream().cuda_stream)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, source: torch.Tensor) -> torch.Tensor:
            return source * 2

        @staticmethod
        def backward(_ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            note(grad)
            return grad * 2

    stream = torch.cuda.Stream()
    leaf = torch.ones(MIB, device="cuda", requires_grad=True)
    leaf.register_hook(note)  # of the node that adds to the leaf's gradient
    with torch.cuda.stream(stream):
        inner = leaf.sin()
        doubled = Doubled.apply(inner)  # type: ignore[no-untyped-call]  # torch's
    inner.register_hook(note)
    outer = doubled * 3
    outer.register_hook(note)

    before = _held_on(stream.cuda_stream)

    with torch.cuda.stream(torch.cuda.Stream()):
        outer.sum().backward()
    assert [0, *[stream.cuda_stream] * 3] == seen
    # The leaf's gradient, beside what the forward left there.
    assert 4 * MIB == _held_on(stream.cuda_stream) - before
    assert 0 == torch.cuda.current_stream().cuda_stream


@pytest.mark.parametrize("index", [0, 1])
def test_the_gradient_of_a_gradient_is_of_the_first_forwards_stream(index: int) -> None:
    """Its nodes are made in backward, on the stream that backward runs on; on any card."""
    with simulated_device("T4*2"):
        stream = torch.cuda.Stream(index)
        seen: list[int] = []

        def note(_grad: Any) -> None:
            seen.append(torch.cuda.current_stream(index).cuda_stream)

        leaf = torch.ones(8, device=f"cuda:{index}", requires_grad=True)
        with torch.cuda.stream(stream):
            cubed = leaf**3
        with torch.cuda.stream(torch.cuda.Stream(index)):
            (first,) = torch.autograd.grad(cubed.sum(), leaf, create_graph=True)
            first.register_hook(note)
            torch.autograd.grad(first.sum(), leaf)

        assert [stream.cuda_stream] == seen


def test_lists_are_grouped_by_card() -> None:
    """Foreach functions see each card's tensors as a group of its own."""
    with simulated_device("T4*2"):
        parameters = [
            torch.nn.Parameter(torch.ones(2, device=f"cuda:{index}"))
            for index in (0, 1, 0)
        ]
        for each in parameters:
            each.grad = torch.ones_like(each)
        torch.optim.AdamW(parameters, lr=0.5, weight_decay=0).step()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)

        assert [[0.5, 0.5]] * 3 == [
            [round(value, 4) for value in each.tolist()] for each in parameters
        ]
        assert 6**0.5 == pytest.approx(norm.item())
        assert "cuda" == torch._C._get_accelerator().type
