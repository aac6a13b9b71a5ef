"""Other processes receive a card's tensors and events (CUDA IPC)."""

from __future__ import annotations

import multiprocessing.connection
import os
import sys
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from pytest_gpumem.allocator.config import AllocatorConfig
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20
pytest_plugins = ["pytester"]
allocated = torch.cuda.memory_allocated
pytestmark = [
    pytest.mark.skipif(
        sys.platform == "win32",
        reason="memory is shared by way of files that Windows lacks",
    ),
]


@pytest.fixture(params=["computed", "none"])
def _sends_to_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process can open its own memory if it lies in expandable segments."""
    config = AllocatorConfig(expandable_segments=True)
    with simulated_device("8GiB", config=config, values=request.param):
        yield


def _passed(value: Any) -> Any:
    return ForkingPickler.loads(ForkingPickler.dumps(value))


@pytest.mark.usefixtures("_sends_to_itself")
def test_the_sender_keeps_the_bytes_until_receivers_let_go() -> None:
    """A receiver has none; each way to collect frees what nobody has any more."""
    ways: list[tuple[Callable[[], Any], int]] = [
        (torch.cuda.ipc_collect, 0),
        # A request that finds no free block.
        (lambda: torch.empty(40 * MIB, dtype=torch.uint8, device="cuda"), 40 * MIB),
        # The deletion of another one that was sent.
        (lambda: _passed(torch.ones(1, device="cuda")), 512),
    ]
    for collect, nbytes in ways:
        sent = torch.empty(30 * MIB, dtype=torch.uint8, device="cuda")
        first, again, other = _passed(sent), _passed(sent), _passed(sent[5:])
        assert allocated() == 30 * MIB
        assert first.untyped_storage()._cdata == other.untyped_storage()._cdata
        assert (5, 30 * MIB - 5) == (other.storage_offset(), other.numel())

        del sent, first, again
        torch.cuda.ipc_collect()
        assert allocated() == 30 * MIB
        del other
        assert allocated() == 30 * MIB
        made = collect()
        assert allocated() == nbytes
        del made
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()
    assert allocated() == 0
    got = _passed(torch.ones(3, device="cuda"))
    with pytest.raises(RuntimeError, match="storage that is not resizable"):
        got.resize_(100)


def test_values_are_shared_and_kinds_are_kept() -> None:
    """Each sees what another writes; parameters and modules come as what they are."""
    with simulated_device(config=AllocatorConfig(expandable_segments=True)):
        sent = torch.arange(6.0, device="cuda").view(2, 3)
        got = _passed(sent.t())
        got.add_(1)
        assert [[1, 2, 3], [4, 5, 6]] == sent.tolist()
        assert (got.stride(), got.device) == ((1, 3), sent.device)
        sent.mul_(2)
        assert 12 == got.max()

        layer = nn.Linear(3, 2, device="cuda")
        twin = _passed(layer)
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.requires_grad
        assert torch.equal(twin(sent), layer(sent))
        assert _passed(torch.empty(0, 3, device="cuda")).shape == (0, 3)
        with pytest.raises(RuntimeError, match="Cowardly refusing to serialize"):
            ForkingPickler.dumps(sent * layer.weight)
        with pytest.raises(RuntimeError, match="received from another process"):
            ForkingPickler.dumps(got)
        for resize in (sent.resize_, sent.untyped_storage().resize_):
            with pytest.raises(UnsupportedOnSimulatedDeviceError, match="resizing"):
                resize(100)
        torch.add(sent[0], 1, out=sent[1])  # of the right size


def test_events_are_for_other_processes_if_they_were_made_so() -> None:
    """Without times, and not for the process itself."""
    event = torch.cuda.Event(interprocess=True)
    event.record()
    handle = event.ipc_handle()
    assert len(handle) == 64

    with pytest.raises(torch.AcceleratorError, match="invalid device context"):
        torch.cuda.Event.from_ipc_handle(event.device, handle)
    with pytest.raises(RuntimeError, match="of size 64, but got 3"):
        torch.cuda.Event.from_ipc_handle(event.device, b"abc")
    with pytest.raises(torch.AcceleratorError, match="invalid resource handle"):
        torch.cuda.Event().ipc_handle()
    with pytest.raises(torch.AcceleratorError, match="invalid argument"):
        torch.cuda.Event(enable_timing=True, interprocess=True).record()


def test_a_process_does_not_open_its_own_memory() -> None:
    """In the driver's words."""
    shared = torch.ones(3, device="cuda").untyped_storage()._share_cuda_()
    with pytest.raises(torch.AcceleratorError, match="invalid device context"):
        torch.UntypedStorage._new_shared_cuda(*shared)
    torch.UntypedStorage._release_ipc_counter_cuda(*shared[4:6])


def _send(pipe: Any) -> None:
    event = torch.cuda.Event(interprocess=True)
    pipe.send(
        ForkingPickler.dumps((torch.full((3,), 2.0, device="cuda"), event)).tobytes()
    )
    pipe.recv()


@pytest.mark.skipif(
    sys.platform == "darwin", reason="forks of macOS's threads are unsafe"
)
def test_a_forked_child_sends_to_a_parent_without_a_card_of_its_own() -> None:
    """The values arrive, also after the child has ended; then nothing more is opened.

    What keeps them on the host keeps none of the child's files open, by which a parent
    sees that its child has ended.
    """
    with simulated_device("8GiB,ctx=0"):
        ours, theirs = multiprocessing.Pipe()
        ended, sentinel = os.pipe()
        os.set_inheritable(sentinel, True)
        child = multiprocessing.get_context("fork").Process(
            target=_send, args=(theirs,)
        )
        child.start()
        message = ours.recv()
        got, event = ForkingPickler.loads(message)
        assert [2, 2, 2] == got.tolist()
        assert event.query()
        assert allocated() == 0
        os.close(sentinel)
        ours.send(None)
        child.join()
        assert [ended] == multiprocessing.connection.wait([ended], timeout=20)
        os.close(ended)
        assert [4, 4, 4] == (got * 2).tolist()
        del got
        with pytest.raises(torch.AcceleratorError, match="invalid resource handle"):
            ForkingPickler.loads(message)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["spawn", "forkserver", "fork"])
def test_processes_of_a_run_share_a_tensor(pytester: pytest.Pytester, way: str) -> None:
    """The card holds its bytes once; a forked child of a used card gets torch's error."""
    pytester.makepyfile(
        worker="""
        import torch

        def work(queue, back):
            try:
                tensor = queue.get()
                tensor += 1
                free = torch.cuda.mem_get_info()[0]
                back.put((torch.cuda.memory_allocated(), free, tensor.sum().item()))
                queue.get()
            except RuntimeError as error:
                back.put(str(error))
        """,
        test_it=f"""
        import torch
        import torch.multiprocessing as mp
        import worker

        def test_one():
            context = mp.get_context({way!r})
            tensor = torch.ones(1000, device="cuda")
            queue, back = context.Queue(), context.Queue()
            process = context.Process(target=worker.work, args=(queue, back), daemon=True)
            process.start()
            queue.put(tensor)
            told = back.get(timeout=60)
            if {way!r} == "fork":
                assert "Cannot re-initialize CUDA in forked subprocess" in told
            else:
                # The sender's segment, and two contexts.
                assert told == (0, 2**30 - 2 * 2**20 - 2 * 10 * 2**20, 2000)
                assert tensor.sum().item() == 2000
            queue.put(None)
            process.join(60)
            assert process.exitcode == 0
        """,
    )
    run = pytester.runpytest_subprocess(
        "-q", "--gpu-backend=simulated", "--gpu-card=1GiB,ctx=10MiB"
    )

    run.assert_outcomes(passed=1)
