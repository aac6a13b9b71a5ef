"""Graphs of CUDA and private pools on the simulated card: bytes, values, errors."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

import captures
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from versions import NAME, since

from pytest_gpumem.allocator.versions import version_of
from pytest_gpumem.cards import find_card
from pytest_gpumem.devices.simulated import graphs
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.tensor import HANDLERS
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def card() -> Iterator[Any]:
    """A card."""
    with simulated_device("T4") as machine:
        yield machine.cards[0]


def captured(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a function and return the graph and what the function returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.skipif(
    sys.version_info >= (3, 14),
    reason="recorded with an older Python, which ends an object of the program later",
)
@pytest.mark.skipif(
    NAME not in captures.recordings(), reason=f"not recorded of torch {NAME}"
)
def test_every_step_is_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, pools, blocks and errors are those of PyTorch's own CUDA code."""
    monkeypatch.delenv("TORCH_CUBLAS_WORKSPACE_CACHE")
    # Pools are numbered in a process.
    monkeypatch.setattr(graphs, "_graphs", iter(range(1, 1000)))
    monkeypatch.setattr(graphs, "_users", iter(range(1, 1000)))
    plain = dataclasses.replace(
        find_card("A100-40GB")[0], total_bytes=captures.TOTAL_BYTES
    )
    recorded = captures.recordings()[NAME]
    with simulated_device([plain]) as machine:
        machine.all_cards[0].driver.context_bytes = 0
        rows = json.loads(json.dumps(captures.run()))

    assert recorded == rows
    assert 100 < len(rows)


@since(2, 15, "graphs have no hooks")
def test_hooks_of_graphs_run_around_each_step() -> None:
    """Torch's own class calls them; a graph is destroyed as it is reset, or as it goes."""
    steps: list[Any] = []
    kinds = (
        "capture_start",
        "capture_end",
        "instantiate",
        "replay_start",
        "replay_end",
    )
    source = torch.zeros(3, device="cuda")
    graph: Any = torch.cuda.CUDAGraph()  # torch's stubs are of 2.13
    handles = []
    for kind in kinds:
        own = "post_instantiate" if kind == "instantiate" else kind
        for of, register in (
            ("graph", getattr(graph, f"register_{own}_hook")),
            ("all", getattr(torch.cuda.graphs, f"register_graph_{kind}_hook")),
        ):

            def note(_graph: Any, of: str = of, kind: str = kind) -> None:
                steps.append((of, kind, torch.cuda.is_current_stream_capturing()))

            handles.append(register(note))
    graph.register_destroy_callback(lambda: steps.append("destroyed"))
    with torch.cuda.graph(graph):
        result = source + 1
    graph.replay()
    graph.reset()

    assert [
        (of, kind, kind == "capture_start") for kind in kinds for of in ("all", "graph")
    ] == steps[:-1]
    assert "destroyed" == steps[-1]
    assert [1.0, 1.0, 1.0] == result.tolist()
    graph.register_destroy_callback(lambda: steps.append("gone"))
    del graph
    assert "gone" == steps[-1]
    for handle in handles:
        handle.remove()
    captured(lambda: source + 1)
    assert "gone" == steps[-1]


@pytest.mark.parametrize("version", ["2.9.1", "2.13.0"])
def test_a_generators_state_has_memory(
    monkeypatch: pytest.MonkeyPatch, card: Any, version: str
) -> None:
    """Up to torch 2.12 one for all graphs, while one of them is there; then each its own."""
    monkeypatch.setattr(card, "version", version_of(version))
    held = torch.zeros(1, device="cuda")
    before = torch.cuda.memory_allocated()

    made = [captured(lambda: held.add_(1))[0] for _ in range(2)]
    with_both = torch.cuda.memory_allocated() - before
    for each in made:
        each.reset()
    after_reset = torch.cuda.memory_allocated() - before
    del each, made

    expected = (1024, 1024) if version == "2.9.1" else (2048, 0)
    assert expected == (with_both, after_reset)
    assert before == torch.cuda.memory_allocated()


@pytest.mark.parametrize(
    ("version", "allowed"),
    [
        ("2.9.1", set()),
        ("2.13.0", {"initial_seed", "get_state", "the same seed"}),
    ],
)
def test_what_a_generator_tells_in_a_capture(
    monkeypatch: pytest.MonkeyPatch, card: Any, version: str, allowed: set[str]
) -> None:
    """As PyTorch's host code does; an offset belongs to each replay."""
    torch.cuda.init()
    generator: Any = torch.cuda.default_generators[0]
    seed = generator.initial_seed()
    calls: dict[str, Callable[[], Any]] = {
        "initial_seed": generator.initial_seed,
        "get_state": generator.get_state,
        "the same seed": lambda: generator.manual_seed(seed),
        "seed": generator.seed,
        "get_offset": generator.get_offset,
        "set_offset": lambda: generator.set_offset(4),
    }
    monkeypatch.setattr(card, "version", version_of(version))

    def try_all() -> list[str]:
        torch.zeros(1, device="cuda")
        return [name for name, call in calls.items() if _is_allowed(call)]

    assert allowed == set(captured(try_all)[1])
    assert len(calls) == len([call for call in calls.values() if _is_allowed(call)])


def _is_allowed(call: Callable[[], Any]) -> bool:
    try:
        call()
    except RuntimeError as error:
        assert "Cannot call CUDAGeneratorImpl::" in str(error)  # noqa: PT017  # some raise it
        return False
    return True


def test_a_replay_computes_on_the_same_memory() -> None:
    """Inputs are read again, results that are held are written again."""
    source = torch.zeros(3, device="cuda")

    def compute() -> torch.Tensor:
        helper = source + 1
        view = helper.view(3, 1).t()
        return view.mul(2).sum(0)

    graph, result = captured(compute)
    pointer = result.data_ptr()
    source.copy_(torch.tensor([1.0, 2.0, 3.0]))
    before = torch.cuda.memory_allocated()
    graph.replay()

    assert [4.0, 6.0, 8.0] == result.tolist()
    assert pointer == result.data_ptr()
    assert before == torch.cuda.memory_allocated()


def test_a_replay_writes_in_place_and_draws_anew() -> None:
    """What a graph changes is changed again by each replay; numbers are drawn anew."""
    count = torch.zeros(2, device="cuda")
    torch.cuda.manual_seed(5)
    graph, drawn = captured(lambda: (count.add_(1), torch.rand(4, device="cuda"))[1])
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(drawn.tolist())

    assert [3.0, 3.0] == count.tolist()
    assert 3 == len(set(map(tuple, seen)))


def test_a_result_that_is_gone_is_computed_without_memory() -> None:
    """A freed result leaves its block to the pool; a replay needs none."""
    source = torch.ones(MIB, device="cuda")

    def compute() -> torch.Tensor:
        first = source * 3
        second = first + 1
        del first
        return second * 2

    graph, result = captured(compute)
    held = torch.cuda.memory_allocated()
    source.fill_(2)
    graph.replay()

    assert 14.0 == result[0].item()
    assert held == torch.cuda.memory_allocated()
    (segment,) = [
        each
        for each in torch.cuda.memory_snapshot(graph.pool())
        if each["segment_type"] == "large"
    ]
    assert [4 * MIB, 16 * MIB] == [each["size"] for each in segment["blocks"]]


@pytest.mark.parametrize("fused", [False, True])
def test_whole_steps_train_as_without_a_graph(fused: bool) -> None:  # noqa: FBT001  # a parameter
    """Captured forward, backward and step give the losses and weights of plain ones."""

    def train(*, with_graph: bool) -> list[Any]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 2)
        ).cuda()
        optimizer = torch.optim.AdamW(model.parameters(), capturable=True, fused=fused)
        source, goal = torch.zeros(5, 4, device="cuda"), torch.ones(5, 2, device="cuda")

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            loss = torch.nn.functional.mse_loss(model(source), goal)
            loss.backward()
            optimizer.step()
            return loss

        step()
        batches = [torch.full((5, 4), float(each)) for each in range(1, 5)]
        losses = []
        source.copy_(batches[0])
        if with_graph:
            graph, loss = captured(step)
            for batch in batches:
                source.copy_(batch)
                graph.replay()
                losses.append(loss.item())
        else:
            for batch in batches:
                source.copy_(batch)
                losses.append(step().item())
        return [losses, [each.tolist() for each in model.parameters()]]

    assert train(with_graph=False) == train(with_graph=True)


def test_a_capture_leaves_memory_as_it_was() -> None:
    """Operators in place, out=, in lists, of running figures, of pinned memory."""
    layer = torch.nn.BatchNorm1d(3).cuda()
    tensors = [torch.full((3,), float(each), device="cuda") for each in range(3)]
    pinned = torch.zeros(3).pin_memory()

    def compute() -> torch.Tensor:
        tensors[0].add_(1)
        torch.add(tensors[1], 2, out=tensors[1])
        torch._foreach_mul_(tensors, 2)
        pinned.copy_(tensors[2], non_blocking=True)
        result: torch.Tensor = layer(torch.stack(tensors))
        return result

    def state() -> list[Any]:
        running = layer.running_mean
        assert running is not None
        return [each.tolist() for each in (*tensors, pinned, running)]

    before = state()
    graph, _result = captured(compute)

    assert before == state()
    graph.replay()
    assert [[2.0] * 3, [6.0] * 3, [4.0] * 3, [4.0] * 3] == state()[:4]
    assert before[4] != state()[4]


def test_graphed_callables_give_gradients() -> None:
    """A module's graphed forward and backward give what the module gives."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh()).cuda()
    source = torch.randn(2, 3, device="cuda", requires_grad=True)
    expected = module(source)
    gradients = torch.autograd.grad(expected.sum(), [source, *module.parameters()])
    graphed: Any = torch.cuda.make_graphed_callables(
        module, (torch.zeros(2, 3, device="cuda", requires_grad=True),)
    )
    result = graphed(source)
    found = torch.autograd.grad(result.sum(), [source, *module.parameters()])

    assert torch.equal(expected, result)
    assert all(map(torch.equal, gradients, found))


def test_attention_is_computed_again() -> None:
    """What a card fuses and the host computes by other operators is kept, too."""
    query = torch.zeros(1, 2, 4, 8, device="cuda")
    graph, result = captured(
        lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query)
    )
    query.fill_(2)
    graph.replay()

    assert [2.0] * 8 == result[0, 0, 0].tolist()


def test_pinned_memory_is_copied_at_each_replay() -> None:
    """A copy from pinned memory reads what is there when the graph is replayed."""
    source = torch.zeros(2).pin_memory()
    target = torch.zeros(2, device="cuda")
    graph, _nothing = captured(lambda: target.copy_(source, non_blocking=True))
    source.fill_(7)
    graph.replay()

    assert [7.0, 7.0] == target.tolist()


def test_a_replay_copies_to_the_host_again() -> None:
    """A copy for which the host does not wait makes pinned memory in a capture, too."""
    source = torch.zeros(2, device="cuda")
    graph, host = captured(lambda: source.to("cpu", non_blocking=True))
    source.fill_(7)
    graph.replay()

    assert [7.0, 7.0] == host.tolist()


@pytest.mark.parametrize("keeps", [True, False])
def test_attention_keeps_its_seed_on_the_card_in_a_capture(*, keeps: bool) -> None:
    """Source: Note [Seed and Offset Device] of ``transformers/cuda/attention.cu``."""
    query = torch.ones(1, 1, 32, 8, device="cuda", requires_grad=keeps)
    taken: list[int] = []

    def attention() -> torch.Tensor:
        taken.append(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()
        result = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        taken.append(torch.cuda.memory_allocated())
        taken.append(torch.cuda.max_memory_allocated())
        return result

    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        _graph, result = captured(attention)
    # Two blocks of 512 bytes, and with gradients the logarithms of 32 rows.
    before, after, peak = taken
    blocks = 3 if keeps else 2
    assert blocks * 512 == peak - before - result.nbytes
    assert (blocks * 512 if keeps else 0) == after - before - result.nbytes


def test_an_index_of_the_host_is_not_captured() -> None:
    """It would be copied to the card first."""
    source = torch.zeros(3, device="cuda")
    with pytest.raises(RuntimeError, match="unless the CPU tensor is pinned"):
        captured(lambda: (source.add_(1), source[[0, 1]]))


def test_a_known_number_of_repeats_is_captured() -> None:
    """With ``output_size=`` the host does not wait for the repeats."""
    repeats = torch.tensor([1, 2], device="cuda")
    graph, places = captured(lambda: torch.repeat_interleave(repeats, output_size=3))
    repeats.copy_(torch.tensor([2, 1]).pin_memory())
    graph.replay()

    assert [0, 0, 1] == places.tolist()


def test_a_graph_can_be_part_of_another() -> None:
    """A replay in a capture is replayed with it."""
    count = torch.zeros(1, device="cuda")
    inner, _nothing = captured(lambda: count.add_(1))
    outer, _nothing = captured(inner.replay)
    outer.replay()
    outer.replay()

    assert [2.0] == count.tolist()


@pytest.mark.parametrize(
    "draw",
    [
        lambda source: torch.nn.functional.dropout(source, 0.3),
        lambda source: torch.nn.functional.rrelu(source, training=True),
        lambda source: source + torch.rand_like(source),
        lambda source: source + torch.randperm(10, device="cuda"),
    ],
    ids=["dropout", "rrelu", "rand_like", "randperm"],
)
def test_replays_draw_what_the_same_calls_would_draw(
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The capture itself draws nothing; calls between replays draw what comes next."""
    source = torch.arange(10.0, device="cuda") - 5
    torch.cuda.manual_seed(5)
    expected = [source]
    for _ in range(6):
        expected.append(draw(expected[-1]))
    torch.cuda.manual_seed(5)
    graph, given = torch.cuda.CUDAGraph(), source.clone()
    with torch.cuda.graph(graph):
        result = draw(draw(given))

    graph.replay()
    assert torch.equal(expected[2], result)
    given.copy_(draw(draw(result)))
    assert torch.equal(expected[4], given)
    graph.replay()
    assert torch.equal(expected[6], result)


def test_a_graph_reads_what_an_earlier_one_left_in_the_pool() -> None:
    """Nothing but the two graphs knows the tensor between them."""
    source = torch.ones(3, device="cuda")
    first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(first):
        between = source * 2
    with torch.cuda.graph(second, pool=first.pool()):
        result = between + 1
    del between

    for number in (1, 5):
        source.fill_(number)
        first.replay()
        second.replay()
        assert [2 * number + 1] * 3 == result.tolist()
    source.fill_(7)
    second.replay()  # the first graph has left what it had
    assert [11] * 3 == result.tolist()


def test_a_stream_that_nobody_waits_for_ends_a_capture() -> None:
    """Work on a stream that joined has to be waited for."""
    source, side = torch.zeros(1, device="cuda"), torch.cuda.Stream()

    def fork() -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            source.add_(1)

    with pytest.raises(torch.AcceleratorError, match="unjoined work"):
        captured(fork)


def test_an_empty_graph_is_warned_of() -> None:
    """Nothing was captured where nothing was computed on the stream."""
    with pytest.warns(UserWarning, match="The CUDA Graph is empty"):
        captured(lambda: None)


def test_indices_are_captured_and_masks_end_a_capture() -> None:
    """The elements that a mask chooses are counted first, and the host waits for that."""
    source = torch.arange(4.0, device="cuda")
    rows, mask = torch.tensor([2, 0], device="cuda"), source > 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chosen = source[rows]
        filled = source.clone()
        filled[mask] = 7.0
        filled[rows[1:]] = 5.0
    source.add_(1)
    graph.replay()

    assert chosen.tolist() == [3.0, 1.0]
    assert filled.tolist() == [5.0, 2.0, 7.0, 7.0]
    for use in (
        lambda: source[mask],
        lambda: source.index_put_((mask,), source[:1]),
        lambda: torch.nn.functional.one_hot(rows),
        lambda: repr(source),
    ):
        with pytest.raises(torch.AcceleratorError, match="captur"):
            captured(use)


def test_nothing_is_kept_outside_of_a_capture() -> None:
    """Operators run as they are before and after one, whether it failed or not."""
    source = torch.zeros(2, device="cuda")
    with pytest.raises(torch.AcceleratorError):
        captured(lambda: source.add_(1).sum().item())

    assert HANDLERS._wrapper is None
    assert 0.0 == source.sum().item()


def test_a_replay_is_nothing_to_what_watches_operators() -> None:
    """Modes, autocast and autograd see no operator of a replay."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    source = torch.ones(2, 2, device="cuda", requires_grad=True)
    graph, result = captured(lambda: source @ source)
    with Watching(), torch.autocast("cuda"), torch.autocast("cpu"):  # type: ignore[no-untyped-call]  # torch's
        graph.replay()

    assert [] == seen
    assert [[2.0, 2.0]] * 2 == result.tolist()


def test_shapes_alone_are_captured_without_values() -> None:
    """A card without values captures bytes, and a replay has nothing to compute."""
    with simulated_device("T4", values="none"):
        source = torch.zeros(MIB, device="cuda")
        graph, result = captured(lambda: source + 1)
        graph.replay()

        assert (MIB,) == result.shape
        assert 20 * MIB == torch.cuda.memory_snapshot(graph.pool())[0]["total_size"]


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("CUDAGraph.debug_dump", lambda graph: graph.debug_dump("file")),
        ("CUDAGraph.raw_cuda_graph", lambda graph: graph.raw_cuda_graph()),
        (
            "check_input_liveness",
            lambda graph: graph.capture_begin(check_input_liveness=True),
        ),
        (
            "CUDAPluggableAllocator",
            lambda _graph: torch.cuda.MemPool(object()),  # type: ignore[arg-type]  # refused
        ),
    ],
)
def test_what_only_cuda_has_is_refused(name: str, use: Callable[[Any], Any]) -> None:
    """A graph of CUDA's own, and an allocator in C, are refused by name."""
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match=name):
        use(torch.cuda.CUDAGraph())


def test_an_oom_in_a_capture_can_be_caught(card: Any) -> None:
    """A budget holds for private pools; the capture goes on after the error."""
    card.set_budget(40 * MIB)
    source = torch.zeros(1, device="cuda")

    def compute() -> torch.Tensor:
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.empty(30 * MIB, device="cuda")
        return source + 1

    graph, result = captured(compute)
    source.fill_(4)
    graph.replay()

    assert [5.0] == result.tolist()


@pytest.mark.parametrize("pool", [(1, 2, 3), 1, (1.5, 0), "ab"])
def test_a_pool_is_two_numbers(pool: Any) -> None:
    """Anything else is refused before the capture begins, as by torch's binding."""
    source = torch.zeros(4, device="cuda")

    with (
        pytest.raises(TypeError, match=r"capture_begin\(\): incompatible function"),
        torch.cuda.graph(torch.cuda.CUDAGraph(), pool=pool),
    ):
        pass

    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.set_stream(torch.cuda.default_stream())
    assert torch.cuda.memory_stats()["num_ooms"] == 0
    assert (source + 1).tolist() == [1.0] * 4
