"""Groups of NCCL on simulated cards: names, rules, values, bytes, errors."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch._C import _distributed_c10d as c10d
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _coalescing_manager
from versions import TORCH

from pytest_gpumem.devices.simulated.install import simulated_device

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.distributed.* is deprecated:FutureWarning",  # the names of 2.11
    "ignore:.*using the device under current context",
)


#: From torch 2.15 on NCCL's groups are ``ProcessGroupNCCL2``, which has a card from the
#: start and connects with it at once.
CONNECTS_AT_ONCE = TORCH >= (2, 15)


def on_card(*values: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor on the rank's card."""
    return torch.tensor(values, dtype=dtype, device="cuda")


def sent(tensor: torch.Tensor, rank: int) -> dist.Work:
    """Send a tensor without a wait."""
    work = dist.isend(tensor, rank)
    assert work is not None
    return work


def received(tensor: torch.Tensor, rank: int) -> dist.Work:
    """Receive a tensor without a wait."""
    work = dist.irecv(tensor, rank)
    assert work is not None
    return work


def test_torch_says_that_nccl_is_there() -> None:
    """While a card is simulated, and only then."""
    before = dist.is_nccl_available()

    with simulated_device("T4"):
        assert dist.is_nccl_available()
        assert torch.cuda.nccl.version() == (2, 29, 7)
        assert issubclass(dist.ProcessGroupNCCL.Options, c10d.Backend.Options)
        assert dist.constants.default_pg_nccl_timeout == timedelta(minutes=10)

    assert dist.is_nccl_available() is before


def test_every_way_to_reduce_and_to_broadcast() -> None:
    """Sums, means, scaled sums; a root's result stays with the root."""

    def body(rank: int) -> None:
        own = on_card(1.0, 2.0) * (rank + 1)

        total = own.clone()
        dist.all_reduce(total)
        assert total.tolist() == [3.0, 6.0]
        assert total.device.index == rank

        mean = own.clone()
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        assert mean.tolist() == [1.5, 3.0]

        scaled = own.clone()
        dist.all_reduce(scaled, c10d._make_nccl_premul_sum(0.5))
        assert scaled.tolist() == [1.5, 3.0]

        largest = own.clone()
        dist.reduce(largest, 1, dist.ReduceOp.MAX)
        assert largest.tolist() == ([2.0, 4.0] if rank else [1.0, 2.0])

        sent = own.clone()
        dist.broadcast(sent, 1)
        assert sent.tolist() == [2.0, 4.0]

    run_ranks(body)


def test_every_way_to_gather_scatter_and_exchange() -> None:
    """Lists, flat tensors, pieces of several sizes, and messages."""

    def body(rank: int) -> None:
        own = on_card(1.0, 2.0) * (rank + 1)
        listed = [torch.empty(2, device="cuda") for _ in range(2)]
        dist.all_gather(listed, own)
        assert [each.tolist() for each in listed] == [[1.0, 2.0], [2.0, 4.0]]

        flat = torch.empty(4, device="cuda")
        dist.all_gather_into_tensor(flat, own)
        assert flat.tolist() == [1.0, 2.0, 2.0, 4.0]

        part = torch.empty(1, device="cuda")
        dist.reduce_scatter_tensor(part, own)
        assert part.tolist() == [[3.0], [6.0]][rank]

        part = torch.empty(1, device="cuda")
        dist.reduce_scatter(part, list(own.chunk(2)), dist.ReduceOp.AVG)
        assert part.tolist() == [[1.5], [3.0]][rank]

        swapped = torch.empty(2, device="cuda")
        dist.all_to_all_single(swapped, own)
        assert swapped.tolist() == [[1.0, 2.0], [2.0, 4.0]][rank]

        splits = [[1, 2], [2, 1]][rank]
        uneven = torch.empty(3, device="cuda")
        dist.all_to_all_single(uneven, on_card(1, 2, 3) * (rank + 1), splits, splits)
        assert uneven.tolist() == [[1.0, 2.0, 4.0], [2.0, 3.0, 6.0]][rank]

        lists = [torch.empty(1, device="cuda") for _ in range(2)]
        dist.all_to_all(lists, list(own.chunk(2)))
        assert torch.cat(lists).tolist() == [[1.0, 2.0], [2.0, 4.0]][rank]

        held = [torch.empty(2, device="cuda") for _ in range(2)] if rank else None
        dist.gather(own, held, dst=1)
        if held:
            assert [each.tolist() for each in held] == [[1.0, 2.0], [2.0, 4.0]]

        got = torch.empty(2, device="cuda")
        dist.scatter(got, [own, own * 10] if rank else None, src=1)
        assert got.tolist() == [[2.0, 4.0], [20.0, 40.0]][rank]

        if rank:
            dist.recv(got, 0)
        else:
            dist.send(own, 1)
        assert got.tolist() == ([1.0, 2.0] if rank else [2.0, 4.0])
        dist.barrier(device_ids=[rank])

    run_ranks(body)


def test_collectives_that_torch_calls_together() -> None:
    """Coalesced ones, and messages both ways in one batch."""

    def body(rank: int) -> None:
        tensors = [on_card(rank + 1.0), on_card(10.0 * (rank + 1), 1.0)]
        with _coalescing_manager(async_ops=True) as manager:
            for each in tensors:
                dist.all_reduce(each)
        manager.wait()
        assert [each.tolist() for each in tensors] == [[3.0], [30.0, 2.0]]

        with _coalescing_manager(device=torch.device("cuda", rank)):
            for each in tensors:
                dist.broadcast(each, 0)
                dist.all_reduce(each, dist.ReduceOp.MAX)

        outputs = [torch.empty(2, device="cuda"), torch.empty(4, device="cuda")]
        with _coalescing_manager():
            for output, each in zip(outputs, tensors, strict=True):
                dist.all_gather_into_tensor(output, each)
        assert outputs[1].tolist() == [30.0, 2.0, 30.0, 2.0]

        parts = [torch.empty(1, device="cuda"), torch.empty(2, device="cuda")]
        with _coalescing_manager():
            for part, each in zip(parts, outputs, strict=True):
                dist.reduce_scatter_tensor(part, each)
        assert [each.tolist() for each in parts] == [[6.0], [60.0, 4.0]]

        got, back = torch.empty(1, device="cuda"), torch.empty(2, device="cuda")
        other = 1 - rank
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.irecv, got, other),
                dist.P2POp(dist.isend, on_card(rank), other),
                dist.P2POp(dist.isend, on_card(rank, rank), other),
                dist.P2POp(dist.irecv, back, other),
            ]
        )
        for work in works:
            work.wait()
        assert got.tolist() == [other]
        assert back.tolist() == [other, other]

    run_ranks(body)


def test_a_work_says_when_it_is_over() -> None:
    """``wait``, ``is_completed``, ``get_future`` and its ``then``."""

    def body(rank: int) -> None:
        tensor = on_card(rank, 4)
        work = dist.all_reduce(tensor, dist.ReduceOp.AVG, async_op=True)
        future = work.get_future().then(lambda done: done.value()[0] * 2)
        assert future.wait().tolist() == [1.0, 8.0]
        assert future.value().device.index == rank
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
        assert tensor.tolist() == [0.5, 4.0]

        moved = on_card(0.0)
        other = 1 - rank
        works = [received(moved, other), sent(on_card(5.0 + rank), other)]
        while not all(each.is_completed() for each in works):
            pass
        assert moved.tolist() == [5.0 + other]
        work = sent(on_card(1.0), other)
        [got] = received(moved, other).get_future().wait()
        assert got.tolist() == [1.0]
        work.wait()

    run_ranks(body)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int64,
    ],
)
def test_every_type_of_nccl_is_reduced_and_moved(dtype: torch.dtype) -> None:
    """A mean of whole numbers is rounded towards zero."""

    def body(rank: int) -> None:
        values = [rank + 1, 3]
        total, mean = on_card(*values, dtype=dtype), on_card(*values, dtype=dtype)
        dist.all_reduce(total)
        dist.all_reduce(mean, dist.ReduceOp.AVG)
        assert total.dtype is dtype
        assert total.tolist() == [3, 6]
        assert mean.tolist() == [1.5 if dtype.is_floating_point else 1, 3]
        gathered = torch.empty(4, dtype=dtype, device="cuda")
        dist.all_gather_into_tensor(gathered, on_card(*values, dtype=dtype))
        assert gathered.tolist() == [1, 3, 2, 3]

    run_ranks(body)


def test_truth_values_complex_numbers_and_eight_bits() -> None:
    """Booleans are or-ed and and-ed, pairs are added, 8-bit floats only move."""

    def body(rank: int) -> None:
        flags = on_card(True, rank == 1, False, dtype=torch.bool)
        both = flags.clone()
        dist.all_reduce(flags)
        dist.all_reduce(both, dist.ReduceOp.MIN)
        assert flags.tolist() == [True, True, False]
        assert both.tolist() == [True, False, False]
        with pytest.raises(TypeError, match="AVG with Boolean"):
            dist.all_reduce(both, dist.ReduceOp.AVG)

        pair = on_card(1 + 2j, dtype=torch.complex64)
        dist.all_reduce(pair)
        assert pair.tolist() == [2 + 4j]

        small = on_card(rank + 1).to(torch.float8_e4m3fn)
        dist.broadcast(small, 1)
        assert small.float().tolist() == [2.0]
        with pytest.raises(RuntimeError, match="Float8 dtypes"):
            dist.all_reduce(small)

    run_ranks(body)


def test_what_nccl_does_not_take_is_refused_in_its_words() -> None:
    """The host's tensors, gaps, types and operations that it has not."""

    def body(_rank: int) -> None:
        with pytest.raises(
            RuntimeError, match="No backend type associated with device type cpu"
        ):
            dist.all_reduce(torch.ones(2))
        gaps = torch.ones(4, 4, device="cuda")[:, 1]
        with pytest.raises(ValueError, match="Tensors must be contiguous"):
            dist.all_reduce(gaps)
        with pytest.raises(RuntimeError, match="Unconvertible NCCL type Short"):
            dist.all_reduce(on_card(1, dtype=torch.int16))
        with pytest.raises(ValueError, match=r"Cannot use ReduceOp\.BAND with NCCL"):
            dist.all_reduce(on_card(1, dtype=torch.int32), dist.ReduceOp.BAND)
        with pytest.raises(ValueError, match="equal to world_size times input"):
            dist.all_gather_into_tensor(
                torch.empty(3, device="cuda"), torch.ones(2, device="cuda")
            )
        with pytest.raises(TypeError, match="same type as input tensor"):
            dist.all_gather_into_tensor(
                torch.empty(4, device="cuda"), on_card(1, 2, dtype=torch.int64)
            )
        for name, kind, words in (
            ("broadcast", dist.DistBackendError, r"Broadcast : .* 7 .* 0\.\.2 range"),
            ("reduce", dist.DistBackendError, "Reduce : invalid root 7 "),
            ("gather", ValueError, "^ProcessGroupNCCL::gather: invalid root rank: 7$"),
            (
                "scatter",
                ValueError,
                "^ProcessGroupNCCL::scatter: invalid root rank: 7$",
            ),
        ):
            root = {"src" if name in {"broadcast", "scatter"} else "dst": 7}
            with pytest.raises(kind, match=words):
                getattr(dist, name)(on_card(1), **root)
        with pytest.raises(ValueError, match="output size times world size"):
            dist.reduce_scatter_tensor(
                torch.empty(3, device="cuda"), torch.ones(2, device="cuda")
            )
        dense = torch.ones(2, 3, 4, 4, device="cuda")
        dist.all_reduce(dense.to(memory_format=torch.channels_last))

    run_ranks(body)


def test_a_tensor_of_another_card_than_the_groups_is_refused() -> None:
    """The card that ``init_process_group`` was given is the group's only one."""

    def body(rank: int) -> None:
        other = torch.ones(1, device=f"cuda:{1 - rank}")
        words = "is bound to device" if CONNECTS_AT_ONCE else "not on device passed to"
        with pytest.raises(RuntimeError, match=words):
            dist.all_reduce(other)
        own = torch.ones(1, device=f"cuda:{rank}")
        dist.all_reduce(own)
        assert own.item() == 2
        half = dist.new_group([0, 1], device_id=own.device)
        dist.all_reduce(own, group=half)
        assert own.item() == 4
        mesh = init_device_mesh("cuda", (2, 1), mesh_dim_names=("a", "b"))
        dist.all_reduce(own, group=mesh.get_group("a"))
        assert own.item() == 8
        dist.all_reduce(own, group=mesh.get_group("b"))
        assert own.item() == 8

    run_ranks(body, is_bound=True)


def test_two_ranks_cannot_share_a_card() -> None:
    """As NCCL says when it connects: at the first collective, or at once."""

    def body(_rank: int) -> None:
        dist.all_reduce(torch.ones(1, device="cuda"))

    with pytest.raises(dist.DistBackendError, match="Duplicate GPU detected"):
        run_ranks(body, cards="T4")


def test_backends_for_each_kind_of_device() -> None:
    """Named for each, the host has gloo and cards have NCCL."""

    def body(_rank: int) -> str:
        host, card = torch.ones(1), torch.ones(1, device="cuda")
        dist.all_reduce(host)
        dist.all_reduce(card)
        assert (host.item(), card.item()) == (2, 2)
        only = dist.new_group(backend="nccl")
        dist.all_reduce(card, group=only)
        assert card.item() == 4
        with pytest.raises(RuntimeError, match="No backend type"):
            dist.all_reduce(host, group=only)
        gloo = dist.new_group(backend="gloo")
        dist.all_reduce(host, group=gloo)
        assert host.item() == 4
        return str(dist.get_backend(only))

    assert run_ranks(body, backend="cpu:gloo,cuda:nccl") == ["nccl", "nccl"]


def test_a_group_without_a_backends_name_is_of_nccl() -> None:
    """Torch takes the accelerator's own."""

    def body(_rank: int) -> str:
        card = torch.ones(1, device="cuda")
        dist.all_reduce(card)
        assert card.item() == 2
        return dist.get_backend_config()

    assert run_ranks(body, backend=None) == ["cuda:nccl", "cuda:nccl"]


def test_objects_go_through_the_card() -> None:
    """Pickled bytes are tensors of the card on their way."""

    def body(rank: int) -> None:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        found: list[Any] = [None, None]
        dist.all_gather_object(found, {"rank": rank})
        assert found == [{"rank": 0}, {"rank": 1}]
        assert torch.cuda.max_memory_allocated() > before
        sent = [f"from {rank}", [rank]]
        dist.broadcast_object_list(sent, 1)
        assert sent == ["from 1", [1]]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, ["a", "b"] if rank == 0 else None, 0)
        assert mine == ["ab"[rank]]

    run_ranks(body)


def test_lists_are_gathered_through_one_tensor_on_the_card() -> None:
    """The peak says so; tensors of several sizes need none."""

    def body(rank: int) -> None:
        own = torch.ones(2**20, device="cuda")
        listed = [torch.empty_like(own) for _ in range(2)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        dist.all_gather(listed, own)
        assert torch.cuda.max_memory_allocated() - before == 2 * own.nbytes
        assert torch.cuda.memory_allocated() == before
        listed[1 - rank] = torch.empty(2**19 + rank, device="cuda")

    run_ranks(body)


def test_a_rank_that_does_not_come_ends_the_others_wait() -> None:
    """It met an out-of-memory error and went on elsewhere; the others hear of it."""
    is_over = threading.Event()

    def body(rank: int) -> str:
        tensor = torch.ones(1, device="cuda")
        dist.all_reduce(tensor)
        if rank:
            with pytest.raises(torch.OutOfMemoryError):
                torch.empty(2**50, device="cuda")
            assert is_over.wait(20)
            return ""
        with pytest.raises(dist.DistBackendError) as caught:
            dist.all_reduce(tensor)
        is_over.set()
        return str(caught.value)

    said, _ = run_ranks(body, seconds=1)

    assert said.startswith("[Rank 0] Watchdog caught collective operation timeout")
    assert "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=1000" in said


def test_a_rank_that_ends_ends_the_others_wait() -> None:
    """Its connections are gone before any time-out."""

    def body(rank: int) -> str:
        tensor = torch.ones(1, device="cuda")
        dist.all_reduce(tensor)
        if rank:
            group = dist.group.WORLD
            assert group is not None
            group.abort()
            return ""
        with pytest.raises(dist.DistBackendError) as caught:
            dist.all_reduce(tensor)
        return str(caught.value)

    said, _ = run_ranks(body, seconds=20)

    assert "ncclRemoteError" in said
    assert "Last error:\nsocketProgress" in said
    assert "gloo" not in said.lower()


def test_functional_collectives_return_new_tensors_of_the_card() -> None:
    """Those that ``DTensor`` and compiled programs call, alone and several at once."""

    def body(rank: int) -> None:
        world = dist.group.WORLD
        assert world is not None
        own = on_card(1, 2, 3, 4) * (rank + 1)

        def values(found: Any) -> Any:
            if isinstance(found, list):
                return [values(each) for each in found]
            assert found.device.index == rank
            return found.tolist()

        assert values(functional.all_reduce(own, "sum", world)) == [3, 6, 9, 12]
        gathered = [1, 2, 3, 4, 2, 4, 6, 8]
        assert values(functional.all_gather_tensor(own, 0, world)) == gathered
        scattered = [[1.5, 3], [4.5, 6]][rank]
        assert values(functional.reduce_scatter_tensor(own, "avg", 0, world)) == (
            scattered
        )
        exchanged = [[1, 2, 2, 4], [3, 4, 6, 8]][rank]
        assert values(functional.all_to_all_single(own, None, None, world)) == exchanged
        assert values(functional.broadcast(own, 1, world)) == [2, 4, 6, 8]
        both = [own, own * 2]
        assert values(functional.all_reduce_coalesced(both, "sum", world)) == [
            [3, 6, 9, 12],
            [6, 12, 18, 24],
        ]
        several = functional.all_gather_into_tensor_coalesced(both, world)
        assert values(several)[0] == gathered
        parts = functional.reduce_scatter_tensor_coalesced(both, "avg", [0, 0], world)
        assert values(parts)[0] == scattered
        assert own.tolist() == [rank + 1, 2 * rank + 2, 3 * rank + 3, 4 * rank + 4]

    run_ranks(body)


def test_a_run_in_torchs_debug_mode_is_the_same() -> None:
    """``TORCH_DISTRIBUTED_DEBUG=DETAIL``."""

    def body(_rank: int) -> float:
        tensor = torch.ones(1, device="cuda")
        dist.all_reduce(tensor)
        return float(tensor)

    before = c10d.get_debug_level()
    c10d.set_debug_level(c10d.DebugLevel.DETAIL)
    try:
        assert run_ranks(body) == [2.0, 2.0]
    finally:
        c10d.set_debug_level(before)


def test_collectives_between_the_cards_of_one_process() -> None:
    """``torch.cuda.nccl``'s own functions, and what they do not take."""
    nccl = torch.cuda.nccl

    with simulated_device("T4*2"):
        tensors = [torch.arange(4.0, device=f"cuda:{each}") + each for each in range(2)]
        assert nccl.is_available(tensors)
        total = torch.empty(4, device="cuda:1")
        nccl.reduce(tensors, total, 1)
        assert total.tolist() == [1, 3, 5, 7]
        wide = [torch.empty(8, device=f"cuda:{each}") for each in range(2)]
        nccl.all_gather(tensors, wide)
        assert wide[1].tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
        parts = [torch.empty(2, device=f"cuda:{each}") for each in range(2)]
        nccl.reduce_scatter(tensors, parts)
        assert [each.tolist() for each in parts] == [[1, 3], [5, 7]]
        nccl.all_reduce(tensors, op=4)
        assert [each.tolist() for each in tensors] == [[0.5, 1.5, 2.5, 3.5]] * 2
        nccl.broadcast([tensors[0], total], 1)
        assert tensors[0].tolist() == [1, 3, 5, 7]
        for wrong, words in (
            ([], "can't be empty"),
            ([torch.ones(1)], "cuda dense"),
            ([total, total], "unique devices"),
            ([total, tensors[0].int()], "same Tensor dtype"),
            ([wide[0][::2]], "contiguous"),
        ):
            with pytest.raises(RuntimeError, match=words):
                nccl.broadcast(wrong)


def test_a_communicator_takes_what_the_card_says() -> None:
    """Beside PyTorch's allocator, from the first collective to the group's end."""

    def body(_rank: int) -> tuple[int, int, int]:
        tensor = torch.ones(1, device="cuda")
        before = torch.cuda.mem_get_info()[0]
        dist.all_reduce(tensor)
        dist.all_reduce(tensor)
        reserved = torch.cuda.memory_reserved()
        own = dist.new_group()
        dist.all_reduce(tensor, group=own)
        during = torch.cuda.mem_get_info()[0]
        dist.destroy_process_group(own)
        return before - during, before - torch.cuda.mem_get_info()[0], reserved

    mib = 2**20
    first = 0 if CONNECTS_AT_ONCE else 100 * mib  # in the body
    assert run_ranks(body, cards="16GiB*2") == [(0, 0, 2 * mib)] * 2
    assert run_ranks(body, cards="16GiB,nccl=100MiB*2") == (
        [(first + 100 * mib, first, 2 * mib)] * 2
    )


@pytest.mark.skipif(not CONNECTS_AT_ONCE, reason="ProcessGroupNCCL has no such buffer")
def test_a_group_holds_what_its_barriers_sum_up() -> None:
    """Four bytes of PyTorch's allocator, from the group's start to its end.

    While a barrier runs torch itself makes an empty tensor, as for any backend.
    """

    def body(_rank: int) -> list[int]:
        allocated = [torch.cuda.memory_allocated()]
        dist.barrier()
        allocated.append(torch.cuda.max_memory_allocated())
        own = dist.new_group()
        allocated.append(torch.cuda.memory_allocated())
        dist.destroy_process_group(own)
        return [*allocated, torch.cuda.memory_allocated()]

    assert run_ranks(body) == [[512, 1024, 1024, 512]] * 2


def test_a_communicator_without_room_ends_in_nccls_error() -> None:
    """It is no out-of-memory error of PyTorch's."""

    def body(_rank: int) -> None:
        tensor = torch.ones(1, device="cuda")
        dist.all_reduce(tensor)
        with pytest.raises(dist.DistBackendError, match="unhandled cuda error"):
            dist.all_reduce(tensor, group=dist.new_group())

    run_ranks(body, cards="16MiB,nccl=9MiB*2")


def test_a_group_of_nccl_needs_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every card is hidden, torch's error says so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    with simulated_device("T4"):
        options = dist.ProcessGroupNCCL.Options()
        with pytest.raises(ValueError, match="no GPUs found"):
            dist.ProcessGroupNCCL(c10d.HashStore(), 0, 1, options)


def _other_sizes(rank: int) -> None:
    dist.all_reduce(torch.ones(3 + rank, device="cuda"))


def _other_types(rank: int) -> None:
    dist.all_reduce(on_card(1.0, dtype=(torch.float32, torch.float64)[rank]))


def _other_collectives(rank: int) -> None:
    if rank:
        dist.broadcast(on_card(1.0), 0)
    else:
        dist.all_reduce(on_card(1.0))


def _other_shards(rank: int) -> None:
    output = torch.empty(2 + rank, device="cuda")
    dist.reduce_scatter_tensor(output, torch.ones(2 * (2 + rank), device="cuda"))


@pytest.mark.parametrize(
    "differ", [_other_sizes, _other_types, _other_collectives, _other_shards]
)
def test_ranks_that_call_different_collectives_are_told(differ: Any) -> None:
    """NCCL would wait for ever, or mix up values: the last rank to call gets an error.

    The other one does, too, where it waited: with the same words.
    """

    def body(rank: int) -> str:
        for _each in range(70):  # the keys of earlier calls are used again
            dist.all_reduce(on_card(1.0))
        try:
            differ(rank)
        except dist.DistBackendError as error:
            return str(error)
        return ""

    said = run_ranks(body, seconds=2)

    assert all(
        each.startswith("Detected mismatch between collectives") for each in said
    )
    assert "SequenceNumber=71, OpType=" in said[0]


def test_ranks_may_send_different_sizes_where_nccl_lets_them() -> None:
    """Each rank gives its own share; sends and receives concern two ranks alone."""

    def body(rank: int) -> None:
        own = torch.full((1 + rank,), float(rank), device="cuda")
        gathered = [torch.empty(1, device="cuda"), torch.empty(2, device="cuda")]
        dist.all_gather(gathered, own)
        assert [each.tolist() for each in gathered] == [[0.0], [1.0, 1.0]]
        if rank < 2:
            other = torch.empty(2 - rank, device="cuda")
            works = [sent(own, 1 - rank), received(other, 1 - rank)]
            for work in works:
                work.wait()
            assert other.tolist() == [1.0 - rank] * (2 - rank)
        split = torch.empty(2, device="cuda")
        dist.all_to_all_single(
            split, torch.ones(2, device="cuda") * rank, [1, 1], [1, 1]
        )
        dist.all_reduce(own[:1])

    run_ranks(body)
