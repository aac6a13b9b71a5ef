"""Where a card's tensors meet the host, other code and the compiler."""

from __future__ import annotations

import copy
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._higher_order_ops import while_loop
from torch.nn.attention.flex_attention import flex_attention

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import RunsEagerlyWarning, UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# TorchDynamo imports what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore:flex_attention called without torch.compile",
    "ignore:torch.set_default_tensor_type",
    "ignore:Lazy modules are a new feature",
    "ignore:Warning. Profiler clears events",
)

cuda: Any = torch.cuda
dlpack: Any = torch.utils.dlpack
foreach: Any = torch
_attend: Any = nn.functional.scaled_dot_product_attention
with_default_type: Any = torch.set_default_tensor_type


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    """Two simulated cards."""
    with simulated_device("T4*2"):
        yield


@pytest.mark.parametrize(
    ("place", "device", "dtype"),
    [
        (lambda m: m.to(0), "cuda:0", torch.float32),
        (lambda m: m.to(device=1, dtype=torch.half), "cuda:1", torch.float16),
        (lambda m: m.to(1, torch.half), "cuda:1", torch.float16),
        (
            lambda m: m.to(torch.ones(1, device="cuda:1").half()),
            "cuda:1",
            torch.float16,
        ),
        (lambda m: m.to(tensor=torch.ones(1, device="cuda")), "cuda:0", torch.float32),
        (lambda m: m.to("cuda:1", torch.half), "cuda:1", torch.float16),
        (lambda m: m.to(torch.float64), "cpu", torch.float64),
    ],
)
def test_a_module_goes_where_it_is_sent(
    place: Callable[[nn.Module], nn.Module], device: str, dtype: torch.dtype
) -> None:
    """By index, by name, or to where another tensor is."""
    weight = place(nn.Linear(2, 2)).weight

    assert isinstance(weight, nn.Parameter)
    assert (device, dtype) == (str(weight.device), weight.dtype)


def _card(index: int = 0) -> torch.Tensor:
    return torch.ones(4, device=f"cuda:{index}")


def _cube() -> torch.Tensor:
    return torch.ones(1, 1, 8, 8, device="cuda")


def _assign(target: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    target[index] = value


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (
            lambda: torch.ones(4)[_card().long()],
            r"indices should be .* the indexed tensor \(cpu\)",
        ),
        (
            lambda: _card()[_card(1).long()],
            r"indices should be .* the indexed tensor \(cuda:0\)",
        ),
        (
            lambda: _assign(_card(), torch.tensor([1, 2]), torch.ones(2)),
            "at least two devices, cuda:0 and cpu!",
        ),
        (
            lambda: torch.cat([torch.ones(2), _card()]),
            "got tensors is on cuda:0, different from other tensors on cpu",
        ),
        (
            lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
            "Expected a 'cuda' device type for generator but found 'cpu'",
        ),
        (
            lambda: torch.rand(3, generator=torch.Generator("cuda")),
            "Expected a 'cpu' device type for generator but found 'cuda'",
        ),
        (
            lambda: _attend(_cube(), _cube(), _cube(), torch.ones(8, 8)),
            "got attn_bias is on cpu, different from other tensors on cuda:0",
        ),
        (
            lambda: _card().masked_fill_(_card() > 0, torch.ones(4)),
            "only supports a 0-dimensional value tensor",
        ),
        (
            lambda: setattr(_card(), "grad", torch.ones(4)),
            "gradient with device type 'cpu' to a tensor with device type 'cuda'",
        ),
    ],
)
def test_mistaken_devices_raise_torchs_error(
    mistake: Callable[[], Any], text: str
) -> None:
    """In torch's own words, where a silent result would be on the wrong device."""
    with pytest.raises(RuntimeError, match=text):
        mistake()


def test_indices_of_an_assignment_may_be_on_another_device() -> None:
    """They are moved to the target, also one on the host, and so is a single number."""
    host, card = torch.zeros(4), torch.zeros(4, device="cuda:0")
    index = torch.tensor([1, 2])

    host[index.cuda()] = 2.0
    host[torch.tensor([True, False, False, False], device="cuda")] = _card()[0]
    card[index.to("cuda:1")] = torch.tensor(3.0)
    put = torch.zeros(4).index_put((index.cuda(),), torch.ones(2), accumulate=True)

    assert ([1.0, 2.0, 2.0, 0.0], "cpu") == (host.tolist(), str(host.device))
    assert ([0.0, 3.0, 3.0, 0.0], "cuda:0") == (card.tolist(), str(card.device))
    assert ([0.0, 1.0, 1.0, 0.0], "cpu") == (put.tolist(), str(put.device))
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu!"):
        host[index.cuda()] = _card()[:2]


def test_a_draw_is_on_the_device_of_its_result() -> None:
    """``bernoulli`` moves the shares that it draws by."""
    host, card = torch.full((3,), 7.0), torch.full((3,), 7.0, device="cuda")

    torch.bernoulli(torch.ones(2, device="cuda"), out=host)
    card.bernoulli_(torch.zeros(3))

    assert ([1.0, 1.0], "cpu") == (host.tolist(), str(host.device))
    assert ([0.0] * 3, "cuda:0") == (card.tolist(), str(card.device))


def test_a_single_number_may_come_from_the_host() -> None:
    """Indices and numbers of the host are taken, as on a card, and it takes a card's."""
    assert [1.0] * 2 == torch.zeros(2).fill_(_card()[0]).tolist()
    target = _card()
    target[torch.tensor([1, 2])] = torch.tensor(3.0)
    target.grad = _card()
    generator = torch.Generator("cuda").manual_seed(0)

    assert [1, 3, 3, 1] == target.tolist()
    assert torch.rand(3, device="cuda", generator=generator).is_cuda
    del target.grad
    assert target.grad is None


@pytest.mark.parametrize(
    "hand_over",
    [
        lambda x: dlpack.to_dlpack(x),  # noqa: PLW0108  # replaced while cards are simulated
        lambda _x: cuda._compile_kernel('extern "C" __global__ void f() {}', "f"),
        lambda x: flex_attention(*[x.view(1, 1, 2, 2)] * 3),
        lambda x: flex_attention(*[x.view(1, 1, 2, 2).requires_grad_()] * 3),
    ],
    ids=[
        "dlpack",
        "kernel",
        "flex",
        "flex-grad",
    ],
)
def test_a_cards_memory_is_handed_to_nobody(hand_over: Callable[..., Any]) -> None:
    """Neither to a library nor to a kernel of one's own."""
    with pytest.raises(UnsupportedOnSimulatedDeviceError):
        hand_over(_card())


@pytest.mark.parametrize(
    "place",
    [
        lambda linear, norm: nn.Sequential(linear, norm).to("cuda:1"),
        lambda *each: nn.Sequential(*each).cuda(0).double().cuda(1).float(),
        lambda linear, norm: nn.Sequential(copy.deepcopy(linear.cuda(1)), norm.cuda(1)),
    ],
    ids=["to", "moved", "copied"],
)
def test_lazy_modules_take_their_memory_where_they_lie(
    place: Callable[..., nn.Module],
) -> None:
    """Their parameters and buffers get a shape with the first batch."""
    model = place(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    assert 512 == torch.cuda.memory_allocated(1)  # the count of batches

    model(torch.ones(4, 3, device="cuda:1")).sum().backward()

    held = [*model.parameters(), *model.buffers()]
    assert {"cuda:1"} == {str(each.device) for each in held}
    assert [(2, 3), (2,), (2,), (2,), (2,), (2,), ()] == [each.shape for each in held]
    assert all(each.grad is not None for each in model.parameters())


def test_a_lazy_parameter_becomes_one_on_any_device() -> None:
    """Also on another device than the one that it was made for."""
    make: Any = nn.UninitializedParameter, nn.UninitializedBuffer
    parameter, buffer = (each(device="cuda") for each in make)
    assert parameter.is_cuda
    parameter.materialize((2,), device="cpu")
    buffer.materialize((2,))

    assert nn.Parameter is type(parameter)
    assert ("cuda:0", False) == (str(buffer.device), isinstance(buffer, nn.Parameter))


def test_the_profiler_times_the_host(capfd: pytest.CaptureFixture[str]) -> None:
    """It lists the operators, and C++ has nothing to complain of."""
    activities = [
        torch.profiler.ProfilerActivity.CPU,
        torch.profiler.ProfilerActivity.CUDA,
    ]
    with torch.profiler.profile(activities=activities) as profile:
        _card() + 1

    assert "aten::add" in {event.key for event in profile.key_averages()}
    assert "CUDA" not in capfd.readouterr().err
    with (
        pytest.warns(UserWarning, match="memory of a simulated card is counted as the"),
        torch.profiler.profile(activities=activities, profile_memory=True),
    ):
        pass


def test_the_hosts_memory_is_handed_over_as_ever() -> None:
    """What lies on the host is torch's own affair."""
    source = torch.ones(2)

    assert nn.LazyLinear(2)(torch.ones(1, 3)).shape == (1, 2)
    assert torch.equal(source, dlpack.from_dlpack(dlpack.to_dlpack(source)))


def test_a_triton_kernel_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever Triton is imported; a kernel for other tensors is let through."""

    class Launcher:
        def run(self, *args: Any, grid: Any) -> Any:
            return args, grid

    original = Launcher.run
    triton: Any = ModuleType("triton")
    triton.JITFunction = Launcher
    monkeypatch.setitem(sys.modules, "triton", triton)
    with simulated_device("T4"):
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="a Triton kernel"):
            Launcher().run(_card(), 4, grid=(1,))
        assert ((4,), (1,)) == Launcher().run(4, grid=(1,))

    assert original is Launcher.run


def test_a_custom_operator_sees_tensors_of_the_card() -> None:
    """Its Python code runs as on a card, and what it makes is counted."""

    @torch.library.custom_op("gpumem_tests::twice", mutates_args=())
    def twice(source: torch.Tensor) -> torch.Tensor:
        assert source.is_cuda
        return torch.cat([source, source])[: len(source)].clone() * 2

    twice.register_autograd(lambda _ctx, grad: grad * 2)
    source = torch.ones(2**20, device="cuda").requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    result = twice(source)
    result.sum().backward()

    assert source.grad is not None
    assert 2.0 == source.grad[0].item()
    assert 16 * 2**20 == torch.cuda.max_memory_allocated()


def test_the_default_tensor_type_can_be_a_cards() -> None:
    """It names dtype and device at once."""
    try:
        with_default_type(cuda.HalfTensor)
        made = [
            torch.zeros(2),
            torch.Tensor([1, 2]),
            torch.Tensor(2, 3),
            torch.Tensor(),
        ]
        host = torch.zeros(2, device="cpu")
        same = torch.Tensor(host)
        with pytest.raises(RuntimeError, match="expects device type: cuda but"):
            torch.Tensor(2, device="cpu")
    finally:
        with_default_type(torch.FloatTensor)

    assert [("cuda:0", torch.float16)] * 4 == [
        (str(each.device), each.dtype) for each in made
    ]
    assert [1.0, 2.0] == made[1].tolist()
    assert same.data_ptr() == host.data_ptr()
    assert {"cpu"} == {torch.zeros(2).device.type, torch.Tensor(2).device.type}


def test_the_classes_of_host_tensors_stay_what_they_were() -> None:
    """Code that has stored one of torch's own classes compares it with the new one."""
    kind: Any = torch.FloatTensor
    own: Any = kind.original
    made = kind([1.0, 2.0])

    assert own is not kind
    assert kind == own
    assert {own: 1}[kind] == 1
    assert isinstance(made, kind)
    assert issubclass(own, kind)
    assert (own.dtype, own.layout, own.__name__) == (
        kind.dtype,
        kind.layout,
        kind.__name__,
    )
    assert type(made) is torch.Tensor


# -- compiling --------------------------------------------------------------------------


class _Holder:
    def __init__(self) -> None:
        self.weight = _card()

    def add(self) -> torch.Tensor:
        return self.weight + 1


def _makes(count: int) -> torch.Tensor:
    return torch.ones(count, device="cuda") + 1


def _makes_of_data(_count: int) -> torch.Tensor:
    return torch.tensor([1.0, 2.0], device="cuda") + 1


def _moves(source: torch.Tensor) -> torch.Tensor:
    return (source.to("cuda") + 1).cpu()


CALLS: dict[str, tuple[Callable[..., torch.Tensor], Callable[[], tuple[Any, ...]]]] = {
    "given": (torch.sin, lambda: (_card(),)),
    "made": (_makes, lambda: (4,)),
    "made of data": (_makes_of_data, lambda: (4,)),
    "moved": (_moves, lambda: (torch.ones(4),)),
    "moved with a graph": (_moves, lambda: (torch.ones(4, requires_grad=True),)),
    "held": (_Holder.add, lambda: (_Holder(),)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    """Nothing compiled before is used again."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("call", CALLS)
def test_compiled_code_runs_whole(backend: str, call: str) -> None:
    """With ``fullgraph=True``, wherever the tensors of the card come from."""
    function, arguments = CALLS[call]
    compiled: Any = torch.compile(function, backend=backend, fullgraph=True)

    assert torch.equal(function(*arguments()).cpu(), compiled(*arguments()).cpu())


@pytest.mark.parametrize("call", CALLS)
def test_kernels_for_a_card_are_refused_where_asked_for(call: str) -> None:
    """By the one error class, wherever the tensors of the card come from."""
    function, arguments = CALLS[call]
    compiled: Any = torch.compile(function)

    with simulated_device("T4", compiled="refused"):
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="makes kernels"):
            compiled(*arguments())
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(
                function(*arguments()).cpu(), compiled(*arguments()).cpu()
            )


@pytest.mark.parametrize("call", CALLS)
def test_what_is_compiled_runs_as_it_is(call: str) -> None:
    """With eager values and bytes, and one warning in all."""
    function, arguments = CALLS[call]
    with simulated_device("T4"):
        compiled: Any = torch.compile(function, fullgraph=True, mode="max-autotune")
        results, peaks = [], []
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for each in (function, compiled, compiled):
                given = arguments()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                results.append(each(*given).cpu())
                peaks.append(torch.cuda.max_memory_allocated() - before)

    assert torch.equal(results[0], results[1])
    assert peaks[0] == peaks[1] == peaks[2]
    assert [RunsEagerlyWarning] == [
        each.category for each in told if issubclass(each.category, RunsEagerlyWarning)
    ]


def test_graph_breaks_are_counted_on_the_host_alone() -> None:
    """On a card they would be those of the code that simulates it."""
    explain: Any = torch._dynamo.explain

    with pytest.raises(UnsupportedOnSimulatedDeviceError, match="explain is"):
        explain(_doubled)(_card())
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match="explain is"):
        explain(_doubled, _card())
    assert 0 == explain(_doubled)(torch.ones(2)).graph_break_count


def _doubled(source: torch.Tensor) -> torch.Tensor:
    return source * 2


def test_a_compiled_optimizer_runs_as_it_is() -> None:
    """A function that only names an optimiser meets the card's parameters by it."""
    model = nn.Linear(4, 2).cuda()
    optimizer = torch.optim.Adam(model.parameters())
    model.compile()

    @torch.compile(fullgraph=False)
    def step() -> None:
        optimizer.step()

    before = model.weight.detach().clone()
    with pytest.warns(RunsEagerlyWarning, match="bytes are those of eager code"):
        loss = model(torch.ones(3, 4, device="cuda")).sum()
    loss.backward()
    step()

    assert not torch.equal(before, model.weight)


def test_what_closures_and_globals_hold_counts_as_well() -> None:
    """A model that a compiled step names is a model on the card."""
    model = nn.Linear(4, 2).cuda()

    def step() -> torch.Tensor:
        return model.weight.sum()

    compiled: Any = torch.compile(step)

    with pytest.warns(RunsEagerlyWarning, match="runs as it is"):
        compiled()


def test_functions_that_operators_take_run_on_a_card() -> None:
    """``torch.cond`` and its like have no rule for a class of tensors."""
    results = []
    for device in ("cuda", "cpu"):
        source = torch.tensor([1.0, 2.0], device=device, requires_grad=True)
        given = (torch.tensor(1, device=device), source.detach())
        chosen = torch.cond(source.sum() > 0, torch.sin, torch.cos, (source,))
        chosen.sum().backward()
        looped = while_loop(
            lambda i, x: i <= len(x), lambda i, x: (i + 1, x * i), given
        )
        assert {device} == {each.device.type for each in (chosen, *looped)}
        results.append([each.tolist() for each in (chosen, source.grad, *looped)])

    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x: foreach._foreach_add(x, 1), [2, 3]),
        (lambda x: foreach._foreach_mul(x, [2.0, 3.0]), [2, 6]),
        (foreach._foreach_norm, [1, 2]),
        (lambda x: foreach._foreach_addcmul(x, x, x, torch.tensor([1, 2])), [2, 10]),
        (lambda x: foreach._foreach_copy_(x, x[::-1]), [2, 2]),
        (lambda x: foreach._foreach_add_(x, x), [2, 4]),
    ],
)
def test_lists_of_tensors_may_lie_on_several_devices(
    call: Callable[[Any], Any], expected: list[int]
) -> None:
    """Elements are then computed one by one, as where CUDA has no fast route."""
    for places in (("cuda:0", "cuda:1"), ("cuda:0", "cpu"), ("cpu", "cuda:1")):
        tensors = [
            torch.full((), float(value), device=place)
            for value, place in enumerate(places, 1)
        ]
        found = call(tensors) or tensors

        assert expected == [each.item() for each in found]
        assert list(places) == [str(each.device) for each in found]


def test_elements_of_lists_are_on_one_device_each() -> None:
    """The error is that of the operator on single tensors."""
    ones = [torch.ones(2, device=place) for place in ("cuda:0", "cuda:1")]

    with pytest.raises(RuntimeError, match="two devices, cuda:0 and cuda:1!"):
        foreach._foreach_add(ones, ones[::-1])
    with pytest.raises(RuntimeError, match="to be on CPU, got cuda:0 instead"):
        foreach._foreach_addcmul(ones, ones, ones, ones[0])


def test_a_card_takes_the_drivers_of_a_decomposition() -> None:
    """A host has none; ``out=`` and gradients have them, too."""
    source = torch.eye(3, device="cuda", requires_grad=True)
    torch.linalg.svdvals(source, driver="gesvd").sum().backward()
    out = torch.linalg.svdvals(
        source.detach(), driver="gesvda", out=torch.empty(3, device="cuda")
    )

    assert [1, 1, 1] == out.tolist()
    assert source.grad is not None
    assert torch.equal(source.grad, torch.eye(3, device="cuda"))
    with pytest.raises(RuntimeError, match="unknown svd driver gesdd in"):
        torch.linalg.svd(source, driver="gesdd")


def test_tracing_leaves_the_cards_books_in_order() -> None:
    """Symbolic sizes of a traced program never reach the allocator."""
    before = torch.cuda.memory_allocated()
    traced: Any = torch.compile(_moves, backend="eager", dynamic=True)

    assert [2, 2, 2] == traced(torch.ones(3)).tolist()
    assert [2, 2] == traced(torch.ones(2)).tolist()
    assert before == torch.cuda.memory_allocated()
    assert int is type(torch.cuda.memory_stats()["allocated_bytes.all.peak"])
