"""Every public name of torch's CUDA modules is accounted for, and does what is said."""

from __future__ import annotations

import inspect
import os
import pickle
import re
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.parallel import comm
from versions import since

from pytest_gpumem.devices.active import active_device
from pytest_gpumem.devices.simulated import catalogue
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine

#: The typed tensors are not in torch's own annotations.
cuda: Any = torch.cuda
MODULES = {"torch.cuda": torch.cuda, "torch.accelerator": torch.accelerator}
NAMES = [
    (module, name, kind)
    for module in MODULES
    for name, kind in catalogue.kinds_of_names(module).items()
]
#: Calls that need arguments to be refused.
CALLS: dict[str, Callable[[], Any]] = {
    "torch.cuda.caching_allocator_disabled": lambda: (
        torch.cuda.caching_allocator_disabled().__enter__()
    ),
    "torch.cuda.change_current_allocator": lambda: torch.cuda.change_current_allocator(
        torch.cuda.CUDAPluggableAllocator("a.so", "malloc", "free")
    ),
    "torch.cuda.get_stream_from_external": lambda: torch.cuda.get_stream_from_external(
        8
    ),
    "torch.cuda.jiterator": lambda: torch.cuda.jiterator._create_jit_fn(
        "template <typename T> T id(T x) { return x; }"
    )(torch.ones(2, device="cuda")),
    "torch.cuda.nccl.init_rank": torch.cuda.nccl.unique_id,
    "torch.cuda.tunable": torch.cuda.tunable.enable,
}


@pytest.fixture
def machine() -> Iterator[SimulatedMachine]:
    """Two cards, simulated."""
    with simulated_device("T4*2") as machine:
        yield machine


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_classified(module: str) -> None:
    """Of the installed torch; a name is of one kind only."""
    table = {"torch.cuda": catalogue._CUDA, "torch.accelerator": catalogue._ACCELERATOR}
    listed = [name for names in table[module].values() for name in names.split()]
    exported = set(MODULES[module].__all__)

    assert set() == exported - set(listed)
    assert len(listed) == len(set(listed))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "name",
    [f"{module}.{name}" for module, name, kind in NAMES if kind == "refused"],
)
def test_what_is_refused_is_refused_by_one_class(name: str) -> None:
    """It names a feature and says what to do."""
    module, _dot, last = name.rpartition(".")
    if not hasattr(MODULES[module], last):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    call = CALLS.get(name, getattr(MODULES[module], last))
    torch.cuda.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's own, of old storages
        with pytest.raises(UnsupportedOnSimulatedDeviceError) as caught:
            call()

    assert "is not supported on the simulated CUDA device; " in str(caught.value)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "name",
    [
        f"{module}.{name}"
        for module, name, kind in NAMES
        if kind not in {"refused", "like a card"}
        and name not in {"temperature", "power_draw", "clock_rate"}
    ],
)
def test_what_takes_no_argument_answers(name: str) -> None:
    """Whatever is not refused can be called."""
    module, _dot, last = name.rpartition(".")
    function = getattr(MODULES[module], last, None)
    if not inspect.isfunction(function):
        return  # a module, or a name of another version
    needed = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
    ]
    arguments: dict[str, tuple[Any, ...]] = {
        "set_per_process_memory_fraction": (1.0,),
        "can_device_access_peer": (0, 1),
        "set_sync_debug_mode": (0,),
        "use_mem_pool": (None,),
        "caching_allocator_alloc": (8,),
        "caching_allocator_delete": (0,),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of old names
        warnings.filterwarnings("ignore", ".* is a prototype feature ")
        function(*arguments.get(last, ()))

    assert len(needed) == len(arguments.get(last, ()))


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["temperature", "power_draw", "clock_rate"])
def test_what_nvml_does_not_know_is_nvmls_error(name: str) -> None:
    """As on a card that lacks the sensor."""
    pynvml: Any = pytest.importorskip("pynvml")
    with pytest.raises(pynvml.NVMLError, match="Not Supported"):
        getattr(torch.cuda, name)()


@pytest.mark.usefixtures("machine")
def test_torch_asks_nvml_for_the_simulated_card() -> None:
    """No driver is reached."""
    pytest.importorskip("pynvml")
    held = torch.zeros(2**20, device="cuda")

    assert held.numel()
    assert 0 == torch.cuda.utilization()
    context = active_device().context_bytes(0)
    assert context
    assert torch.cuda.memory_reserved() + context == torch.cuda.device_memory_used()
    assert f"process {os.getpid():10d} uses" in torch.cuda.list_gpu_processes()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.sparse_coo_tensor(
            torch.tensor([[0], [1]]), torch.ones(1), (2, 2), device="cuda"
        ),
        lambda: vars(torch.cuda.sparse)["FloatTensor"](2, 2),
        lambda: torch.eye(3, device="cuda").to_sparse(),
        lambda: torch.eye(3).to_sparse().cuda(),
        lambda: (
            torch.nn.EmbeddingBag(2, 2, mode="sum", sparse=True)
            .cuda()(torch.zeros(1, 1, dtype=torch.int64, device="cuda"))
            .sum()
            .backward()
        ),
        lambda: torch.nested.nested_tensor([torch.ones(2)], device="cuda"),
        lambda: torch.nested.nested_tensor([torch.ones(2)]).cuda(),
        lambda: torch.ones(2, device="cuda").__cuda_array_interface__,
        lambda: torch.utils.dlpack.from_dlpack(torch.ones(2, device="cuda")),
        lambda: torch.export.export(torch.nn.Linear(2, 2).cuda(), (torch.ones(2),)),
    ],
    ids=[
        "coo",
        "typed-sparse",
        "to_sparse",
        "upload",
        "sparse-gradient",
        "nested",
        "upload-nested",
        "interface",
        "dlpack",
        "export",
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch's own: sparse and nested are in beta
def test_other_features_are_refused_by_the_same_class(make: Callable[[], Any]) -> None:
    """Never a crash in C++, never a silent run on the host."""
    with pytest.raises(UnsupportedOnSimulatedDeviceError):
        make()


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")  # torch's own
def test_nested_tensors_of_a_mask_work_without_gradients_alone() -> None:
    """``torch.nn.TransformerEncoder`` makes them so; C++ would end the process else."""
    source = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]], device="cuda")
    mask = torch.tensor([[True, True], [True, False]], device="cuda")
    makes: list[Callable[[], Any]] = [
        lambda: torch._nested_tensor_from_mask(source.clone().requires_grad_(), mask),
        lambda: nested * torch.ones((), device="cuda", requires_grad=True),
        lambda: nested.requires_grad_(True),
        lambda: setattr(nested, "requires_grad", True),
        lambda: torch.nn.Parameter(nested),
    ]
    with torch.no_grad():
        nested = torch._nested_tensor_from_mask(source, mask)
        text = repr(nested)

    padded = [[[1.0], [2.0]], [[3.0], [0.0]]]
    assert padded == nested.to_padded_tensor(0.0).tolist()
    assert text.startswith("nested_tensor([\n  tensor([[1.],\n          [2.]], device=")
    for make in makes:
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="nested tensor wh"):
            make()


@pytest.mark.usefixtures("machine")
@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own
def test_what_stays_on_the_host_is_not_refused() -> None:
    """Sparse, compiled and exported things without a card are torch's own affair."""
    assert torch.eye(2).to_sparse().is_sparse
    indices, values = torch.tensor([[0], [1]]), torch.ones(1)
    sparse = torch.sparse_coo_tensor(indices, values, (2, 2), check_invariants=True)
    assert sparse.is_sparse
    exported = torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2),))
    assert exported.graph is not None


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functions_run_on_the_card(backend: str) -> None:
    """Forward and backward, with the values of an eager run."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(layer, torch.nn.ReLU()).cuda()
    source = torch.ones(2, 4, device="cuda")
    plain = model(source)
    compiled = torch.compile(model, backend=backend)(source)
    compiled.sum().backward()

    assert torch.equal(plain, compiled)
    assert layer.weight.grad is not None
    assert "cuda:0" == str(layer.weight.grad.device)


@pytest.mark.filterwarnings("ignore:The torch.cuda.*DtypeTensor constructors")
@pytest.mark.usefixtures("machine")
def test_typed_tensors_make_convert_and_recognise() -> None:
    """The old words for dtype and device."""
    made = cuda.FloatTensor([1.0, 2.0])
    empty = cuda.LongTensor(2, 3)

    assert "torch.cuda.FloatTensor" == made.type()
    assert (2, 3) == tuple(empty.shape)
    assert isinstance(made, cuda.FloatTensor)
    assert not isinstance(made, cuda.HalfTensor)
    assert not isinstance(torch.ones(1), cuda.FloatTensor)
    assert torch.float16 == made.type("torch.cuda.HalfTensor").dtype
    assert "cpu" == made.type(torch.DoubleTensor).device.type
    assert made.type(torch.float64).is_cuda
    assert isinstance(torch.ones(1).type(cuda.HalfTensor), cuda.HalfTensor)
    assert "torch.FloatTensor" == torch.ones(1).type()
    with pytest.raises(ValueError, match="invalid type"):
        made.type("torch.cuda.QuadTensor")


def _made(device: str) -> dict[str, str]:
    """Return what old constructors make on a device, in words without the device."""
    x = torch.ones(2, 2, device=device)
    typed = cuda.FloatTensor if device == "cuda" else torch.FloatTensor
    given: dict[str, tuple[Any, ...]] = {
        "nothing": (),
        "sizes": (2, 3),
        "a tuple": ((2, 3),),
        "a size": (x.size(),),
        "a number": (2,),
        "a truth value": (True,),
        "a list": ([1, 2.5],),
        "a range": (range(3),),
        "tensors of one value": ([x[0, 0], x[0, 1]],),
        "the tensor": (x,),
        "of another type": (x.half(),),
        "of whole numbers": (x.long(),),
        "bytes": (x.untyped_storage(),),
        "a text": ("ab",),
        "a float": (2.5,),
        "None": (None,),
        "a dict": ({1: 2},),
    }
    made = {}
    for name, arguments in given.items():
        for how, make in (("new", x.new), ("typed", typed)):
            try:
                result = make(*arguments)
                is_data = name not in ("sizes", "a size", "a number", "a truth value")
                text = f"{result.tolist() if is_data else result.shape} {result.dtype}"
                text += f" {result.device.type} {result.data_ptr() == x.data_ptr()}"
            except (RuntimeError, TypeError) as error:
                text = f"{type(error).__name__} {error}".replace("cuda:0", "cuda")
            made[f"{how} {name}"] = text.replace(device, "DEVICE")
    return made


@pytest.mark.filterwarnings("ignore:The torch.cuda.*DtypeTensor constructors")
@pytest.mark.usefixtures("machine")
def test_old_constructors_take_what_they_take_on_the_host() -> None:
    """``Tensor.new`` and typed tensors: sizes, data, a tensor or a storage."""
    assert _made("cpu") == _made("cuda")
    second = torch.ones(2, device="cuda:1")
    for made in (
        cuda.FloatTensor(2).new(3, device="cuda:1"),
        cuda.FloatTensor(3, device=1),
        cuda.FloatTensor([1.0], device=1),
        second.new(3),
        second.new([1.0]),
        second.new(),
    ):
        assert made.get_device() == 1


@pytest.mark.parametrize("places", [2.5, [1.0, 2.0], [[1]], 2])
@pytest.mark.usefixtures("machine")
def test_a_split_by_a_wrong_tensor_says_what_the_cpu_says(places: Any) -> None:
    """Numbers of another type than int64, or too many dimensions."""
    wrong = torch.tensor(places)
    if not wrong.dim() and wrong.dtype == torch.int64:
        wrong = wrong.int()
    with pytest.raises(RuntimeError) as on_cpu:
        torch.ones(6).tensor_split(wrong)
    with pytest.raises(RuntimeError, match=f"^{re.escape(str(on_cpu.value))}$"):
        torch.ones(6, device="cuda").tensor_split(wrong)


@pytest.mark.usefixtures("machine")
def test_waits_for_a_card_can_be_shown() -> None:
    """``torch.cuda.set_sync_debug_mode``: what waits warns or raises, nothing else does.

    Source of what waits: what torch 2.13 does on the substitute runtime, and
    ``memcpy_and_sync`` and ``stream_synchronize`` in ``c10/cuda/CUDAFunctions.h``.
    """
    x = torch.ones(4, device="cuda")
    rows, mask = torch.tensor([0, 1], device="cuda"), x > 0
    pinned, on_host = torch.ones(4).pin_memory(), torch.ones(4) > 0
    waits: dict[str, Callable[[], Any]] = {
        "item": x[0].item,
        "print": lambda: repr(x),
        "bool": lambda: bool(mask[0]),
        "cpu": x.cpu,
        "to": lambda: torch.ones(4).to("cuda"),
        "pinned, blocking": lambda: pinned.to("cuda"),
        "copy_": lambda: x.clone().copy_(torch.ones(4)),
        "tensor": lambda: torch.tensor([1.0], device="cuda"),
        "nonzero": x.nonzero,
        "mask": lambda: x[mask],
        "assignment by a mask": lambda: x.clone().__setitem__(mask, x),
        "unique": x.unique,
        "bincount": rows.bincount,
        "one_hot": lambda: torch.nn.functional.one_hot(rows),
        "repeats": lambda: torch.repeat_interleave(rows),
        "a storage": x.untyped_storage().cpu,
        "an index of the host": lambda: x[torch.tensor([0])],
        "a list": lambda: x[[0, 1]],
        "assignment by an index of the host": lambda: x.clone().__setitem__([0], x[0]),
        "a number by a mask of the host": lambda: x.clone().__setitem__(on_host, 0.0),
        "a stream": torch.cuda.current_stream().synchronize,
    }
    goes_on: dict[str, Callable[[], Any]] = {
        "product": lambda: x * x,
        "index": lambda: x[rows],
        "a mask of the host": lambda: x[on_host],
        "a number by a mask": lambda: x.clone().__setitem__(mask, 0.0),
        "a device": torch.cuda.synchronize,
        "not blocking": lambda: pinned.to("cuda", non_blocking=True),
        "one_hot of a number": lambda: torch.nn.functional.one_hot(rows, 3),
        "repeats of a number": lambda: torch.repeat_interleave(rows, output_size=1),
        "to the host": lambda: x.to("cpu", non_blocking=True),
        "a type": lambda: x.type("torch.FloatTensor", non_blocking=True),
        "query": torch.cuda.current_stream().query,
    }
    text = "called a synchronizing CUDA operation"

    def set_mode(mode: int | str) -> None:
        with warnings.catch_warnings():  # torch's own, once in a process
            warnings.filterwarnings("ignore", ".* is a prototype feature ")
            torch.cuda.set_sync_debug_mode(mode)

    set_mode("warn")
    assert torch.cuda.get_sync_debug_mode() == 1
    for name, call in waits.items():
        with pytest.warns(UserWarning, match=text) as caught:
            call()
        assert caught, name
    with pytest.warns(UserWarning, match=text) as caught:
        x.cpu()
    assert caught[0].filename == __file__
    set_mode("error")
    for name, call in waits.items():
        with pytest.raises(RuntimeError) as raised:
            call()
        assert text == str(raised.value), name
    for call in goes_on.values():
        call()
    set_mode(0)
    for call in waits.values():
        call()


@pytest.mark.usefixtures("machine")
def test_data_parallel_runs_on_two_cards() -> None:
    """Replicas hold bytes on the second card; gradients come back to the first."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    source = torch.ones(4, 4)
    wanted = model(source)
    parallel = torch.nn.DataParallel(model.cuda())
    torch.cuda.reset_peak_memory_stats(1)
    out = parallel(source.cuda())
    out.sum().backward()

    assert torch.allclose(wanted, out.cpu())
    assert model.weight.grad is not None
    assert torch.equal(torch.full((4, 4), 4.0), model.weight.grad.cpu())
    assert torch.cuda.max_memory_allocated(1) > 0


@pytest.mark.usefixtures("machine")
def test_tensors_go_to_many_cards_as_on_real_ones() -> None:
    """The checks, the requests and the streams of ``torch.nn.parallel.comm``.

    Source: ``torch/csrc/cuda/comm.cpp``.
    """
    x = torch.arange(8.0, device="cuda").view(4, 2)
    y = torch.ones(4, 2, device="cuda:1")
    out = [torch.empty(2, 2, device=f"cuda:{index}") for index in (0, 1)]
    side = torch.cuda.Stream(0)
    wrong: dict[str, Callable[[], Any]] = {
        "output tensor at index 1 has device 'cpu'": lambda: comm.broadcast(
            x, out=[torch.empty(4, 2, device="cuda"), torch.empty(4, 2)]
        ),
        r"source tensor [4, 2], but output tensor at index 0": lambda: comm.broadcast(
            x, out=out
        ),
        "All tensors must be on devices[0]: 1": lambda: comm.broadcast_coalesced(
            [x], (1, 0)
        ),
        "at least one device to scatter to": lambda: comm.scatter(x, ()),
        "len(devices) = 2 and len(chunk_sizes) = 1": lambda: comm.scatter(
            x, (0, 1), [4]
        ),
        "stream at index 0 (was 0)": lambda: comm.scatter(
            x.cpu(), (1,), streams=[side]
        ),
        "at least one output tensor to scatter to": lambda: comm.scatter(x, out=[]),
        "index 0 has incorrect shape: [2]": lambda: comm.scatter(x, out=[out[0][0]]),
        "Expected 4, but got total size 2": lambda: comm.scatter(x, out=out[:1]),
        "at least one tensor to gather from": lambda: comm.gather(()),
        "tensor at index 1 has device cpu": lambda: comm.gather((x, x.cpu())),
        "at index 1has 1 dimensions, (expected 2)": lambda: comm.gather((x, y[0])),
        "at index 1 has invalid shape [4, 1]": lambda: comm.gather((x, y[:, :1])),
        "out tensor to have shape [8, 2], but got [4, 2]": lambda: comm.gather(
            (x, y), out=x
        ),
    }
    for text, call in wrong.items():
        with pytest.raises(RuntimeError, match=re.escape(text)):
            call()

    small = [torch.ones(3, device="cuda") for _ in range(100)]
    small[1:3] = [torch.ones(2, device="cuda").half(), torch.empty(0, device="cuda")]
    before = torch.cuda.memory_allocated(1)
    kept, copies = comm.broadcast_coalesced(small, (0, 1))
    assert all(one is other for one, other in zip(kept, small, strict=True))
    assert all(
        torch.equal(one.cpu(), other.cpu()) and other.get_device() == 1
        for one, other in zip(small, copies, strict=True)
    )
    # All of a type are one tensor there.
    assert torch.cuda.memory_allocated(1) == before + 1536 + 512

    torch.cuda.reset_peak_memory_stats(0)
    before = torch.cuda.memory_allocated(0)
    joined = comm.gather((y, y), destination=0)
    assert torch.equal(joined.cpu(), torch.ones(8, 2))
    # Nothing else is taken there.
    assert torch.cuda.max_memory_allocated(0) == before + 512
    rows = torch.ones(2, 3, 4, 4, device="cuda").to(memory_format=torch.channels_last)
    assert comm.gather((rows, rows)).is_contiguous(memory_format=torch.channels_last)

    (piece,) = comm.scatter(x.cpu(), (0,), streams=[side])
    segment = next(
        each
        for each in torch.cuda.memory_snapshot()
        if each["stream"] == side.cuda_stream
    )
    assert segment["active_size"] == 512
    assert torch.equal(piece, x)


@pytest.mark.usefixtures("machine")
def test_an_event_belongs_to_the_card_of_its_stream() -> None:
    """None before it is recorded; another card's stream and event are refused."""
    first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    assert [None, None] == [first.device, second.device]
    first.record()
    second.record(torch.cuda.Stream(1))
    assert (first.device, second.device) == (
        torch.device("cuda", 0),
        torch.device("cuda", 1),
    )
    with pytest.raises(RuntimeError, match="Event device 1 does not match recording"):
        second.record(torch.cuda.current_stream(0))
    with pytest.raises(torch.AcceleratorError, match="invalid resource handle"):
        first.elapsed_time(second)


@pytest.mark.usefixtures("machine")
def test_a_generic_event_ignores_the_number_that_it_is_made_with() -> None:
    """Its first stream decides; PyTorch's own host code answers the same."""
    made: Any = [torch.Event(), torch.Event("cuda:1"), torch.Event("cuda:1")]
    assert ["cuda"] * 3 == [str(each.device) for each in made]
    made[0].record(torch.Stream("cuda:1"))
    made[1].record()
    made[2].record(torch.Stream("cuda:1"))
    assert ["cuda:1", "cuda:0", "cuda:1"] == [str(each.device) for each in made]


@pytest.mark.usefixtures("machine")
def test_memory_history_names_every_change(tmp_path: Path) -> None:
    """Requests, releases and the OOM, with the frames of this test; as a pickle too."""
    torch.cuda.memory._record_memory_history(max_entries=100)
    held = torch.zeros(2**20, device="cuda")
    freed = torch.zeros(2**20, device="cuda")
    del freed
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**40, device="cuda")
    path = tmp_path / "snapshot.pickle"
    torch.cuda.memory._dump_snapshot(str(path))
    shown = pickle.loads(path.read_bytes())  # our own file
    entries = shown["device_traces"][0]
    actions = [entry["action"] for entry in entries]
    torch.cuda.memory._record_memory_history(None)

    assert held.numel()
    assert actions[:2] == ["segment_alloc", "alloc"]
    assert {"free_requested", "free_completed", "oom", "snapshot"} <= set(actions)
    assert entries[1]["frames"][0]["name"] == "test_memory_history_names_every_change"
    assert entries[actions.index("oom")]["device_free"] > 0
    blocks = [block for each in shown["segments"] for block in each["blocks"]]
    live = [block for block in blocks if block["state"] == "active_allocated"]
    assert [True] == [bool(block["frames"]) for block in live]
    assert not any(block["frames"] for block in blocks if block not in live)
    assert [[], []] == torch.cuda.memory._snapshot()["device_traces"]


def _keeping() -> None:
    torch.zeros(8, device="cuda")


@pytest.mark.parametrize("context", [None, "state", "alloc", "all"])
@pytest.mark.usefixtures("machine")
def test_memory_history_has_the_frames_of_its_level(context: str | None) -> None:
    """A release shows its own frames or those of its request; a snapshot shows none.

    Source: ``maybeGatherContext`` and ``record_trace`` of ``CUDACachingAllocator.cpp``,
    and torch's own ``test_memory_plots_free_segment_stack``.
    """
    torch.cuda.memory._record_memory_history(context=context)
    _keeping()
    torch.cuda.empty_cache()
    held = torch.zeros(8, device="cuda")
    shown = torch.cuda.memory._snapshot()
    torch.cuda.memory._record_memory_history(None)

    found: dict[str, str] = {}
    for entry in shown["device_traces"][0]:
        names = [frame["name"] for frame in entry["frames"]]
        found.setdefault(entry["action"], names[0] if names else "")
    asked = "_keeping" if context in {"alloc", "all"} else ""
    assert found == {
        "segment_alloc": asked,
        "alloc": asked,
        "free_requested": asked,
        "free_completed": asked,
        "segment_free": "empty_cache" if context == "all" else asked,
        "snapshot": "",
    }
    (segment,) = shown["segments"]
    assert held.numel()
    assert [context is not None] * 2 == [
        bool(segment["frames"]),
        bool(segment["blocks"][0]["frames"]),
    ]
    assert shown["device_traces"][0][-1]["size"] == segment["active_size"] == 512


@since(2, 13, "torch has no such function")
@pytest.mark.usefixtures("machine")
def test_an_address_leads_to_the_code_that_requested_its_block() -> None:
    """Only while a history with frames is recorded; other addresses have none."""
    traceback: Any = torch.cuda.memory._allocation_traceback
    before = torch.zeros(8, device="cuda")
    torch.cuda.memory._record_memory_history()
    held = torch.zeros(8, device="cuda")
    found = traceback(held.untyped_storage().data_ptr())
    others = traceback(before.untyped_storage().data_ptr()), traceback(1)
    torch.cuda.memory._record_memory_history(None)

    names = [frame["name"] for frame in found]
    test = "test_an_address_leads_to_the_code_that_requested_its_block"
    assert test == names[0]
    assert (None, None) == others


@since(2, 11, "a memory history cannot skip actions")
@pytest.mark.usefixtures("machine")
def test_memory_history_keeps_what_it_is_told_to() -> None:
    """State alone, no frames, the newest entries, without some actions."""
    record = torch.cuda.memory._record_memory_history
    record("state")
    held = torch.zeros(8, device="cuda")
    state = torch.cuda.memory._snapshot()
    record("all", context=None, max_entries=2, skip_actions=["snapshot"])
    more = [torch.zeros(8, device="cuda") for _ in range(3)]
    bare = torch.cuda.memory._snapshot()["device_traces"][0]
    record(None)

    assert held.numel()
    assert [] == state["device_traces"][0]
    assert any(block["frames"] for block in state["segments"][0]["blocks"])
    assert ["alloc", "alloc"] == [entry["action"] for entry in bare]
    assert [[], []] == [entry["frames"] for entry in bare]
    assert 3 == len(more)
    with pytest.raises(RuntimeError, match="Unknown enabled"):
        record("some")  # type: ignore[arg-type]  # on purpose


@pytest.mark.usefixtures("machine")
def test_memory_is_taken_and_freed_by_address() -> None:
    """On the card that is named, within its budget; the allocator cannot be switched off."""
    before = torch.cuda.memory_allocated(1)
    first = torch.cuda.caching_allocator_alloc(3 * 2**20, 0)
    second = torch.cuda.caching_allocator_alloc(1, torch.device("cuda:1"))

    assert first != second
    assert torch.cuda.caching_allocator_alloc(0) == 0
    assert torch.cuda.memory_allocated(1) == before + 512
    torch.cuda.caching_allocator_delete(second)
    assert torch.cuda.memory_allocated(1) == before
    assert torch.cuda.memory_allocated(0) == 3 * 2**20
    torch.cuda.caching_allocator_delete(first)
    assert torch.cuda.memory_allocated(0) == 0
    with pytest.raises(RuntimeError, match="invalid device pointer: 0x"):
        torch.cuda.caching_allocator_delete(first)
    with pytest.raises(torch.OutOfMemoryError):
        torch.cuda.caching_allocator_alloc(2**40)
    cuda.caching_allocator_enable(True)
    with pytest.raises(UnsupportedOnSimulatedDeviceError):
        cuda.caching_allocator_enable(False)


@pytest.mark.usefixtures("machine")
def test_memory_of_the_host_is_registered() -> None:
    """It is pinned until that ends; what was registered, or was not, is an error."""
    runtime: Any = torch.cuda.cudart()
    tensor = torch.ones(1000)
    region = (tensor.data_ptr(), tensor.nbytes)

    assert runtime.cudaHostRegister(*region, 0) == 0
    assert tensor.is_pinned()
    assert tensor[10:].is_pinned()
    assert not torch.ones(1000).is_pinned()
    with pytest.raises(cuda.CudaError, match="already mapped"):
        cuda.check_error(runtime.cudaHostRegister(region[0] + 8, 16, 0))
    assert runtime.cudaHostUnregister(region[0]) == 0
    assert not tensor.is_pinned()
    with pytest.raises(cuda.CudaError, match="registered memory region"):
        cuda.check_error(runtime.cudaHostUnregister(region[0]))


@pytest.mark.usefixtures("machine")
def test_a_stream_has_the_nearest_priority() -> None:
    """PyTorch has four, of which 0 is the lowest; the current stream keeps its own."""
    with pytest.raises(ValueError, match="Expected a cuda device, but got: cpu"):
        torch.cuda.Stream("cpu")
    low, high = cuda.Stream.priority_range()
    streams = [torch.cuda.Stream(priority=each) for each in (5, 0, -1, -9)]

    assert [low, high] == [0, -3]
    assert [each.priority for each in streams] == [0, 0, -1, -3]
    with torch.cuda.stream(streams[2]):
        assert torch.cuda.current_stream().priority == -1
    assert torch.cuda.current_stream().priority == 0


@pytest.mark.usefixtures("machine")
def test_a_program_may_prefer_libraries_and_limit_plans() -> None:
    """They are stored and reported; a library of another build is torch's error."""
    backends: Any = torch.backends.cuda

    assert "Cusolver" == backends.preferred_linalg_library("cusolver").name
    assert "Cublaslt" == backends.preferred_blas_library("cublaslt").name
    assert "Cusolver" == backends.preferred_linalg_library().name
    with pytest.raises(RuntimeError, match="not been compiled with MAGMA"):
        backends.preferred_linalg_library("magma")
    plans = backends.cufft_plan_cache
    assert [0, 4096] == [plans.size, plans.max_size]
    plans.max_size = 10
    plans.clear()
    assert 10 == plans[0].max_size
    with pytest.raises(RuntimeError, match="must be non-negative, but got -1"):
        plans.max_size = -1


@pytest.mark.usefixtures("machine")
def test_ranges_nest() -> None:
    """NVTX counts them and nothing else."""
    assert 0 == torch.cuda.nvtx.range_push("a")
    assert 1 == torch.cuda.nvtx.range_push("b")
    assert 1 == torch.cuda.nvtx.range_pop()
    with torch.cuda.nvtx.range("c"):
        torch.cuda.nvtx.mark("d")
    torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start("e"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("has_used", [True, False], ids=["used", "unused"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_not_use_the_parents_card(*, has_used: bool) -> None:
    """Torch's own error each time; a parent that has not used the card may be forked."""
    with simulated_device("T4"):
        card = torch.zeros(1, device="cuda") if has_used else torch.zeros(1)
        child = os.fork()
        if child == 0:
            code = 0
            try:
                for use, words in (
                    (lambda: torch.zeros(1, device="cuda"), "Cannot re-initialize"),
                    (
                        lambda: torch.zeros(1).cuda(),
                        "Cannot re-initialize CUDA in fork",
                    ),
                    (lambda: card[0], ""),
                    (lambda: card + 1, "CUDA error: initialization error"),
                    (card.cpu, "CUDA error: initialization error"),
                    (card.item, "CUDA error: initialization error"),
                    (lambda: repr(card), "CUDA error: initialization error"),
                    (lambda: torch.cuda.set_device(0), "Cannot re-initialize"),
                    (lambda: torch.cuda.device(0).__enter__(), "Cannot re-init"),
                    (lambda: torch.cuda.Stream("cuda:0"), "Cannot re-initialize"),
                    (lambda: torch.cuda.Event().record(), "Cannot re-initialize"),
                    (torch.cuda.MemPool, "Cannot re-initialize"),
                    (torch.accelerator.synchronize, "Cannot re-initialize"),
                    (torch.accelerator.current_stream, "Cannot re-initialize"),
                ):
                    try:
                        use()
                    except RuntimeError as error:
                        code += words != "" and words in str(error)
            finally:
                sys.stdout.flush()
                os._exit(code)
        _pid, status = os.waitpid(child, 0)

    assert (13 if has_used else 0) == os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(
    ("look", "spoils"),
    [
        (torch.cuda.device_count, False),
        (torch.cuda.memory_allocated, False),
        (lambda: torch.cuda.manual_seed(0), False),
        (torch.cuda.is_available, True),
        (torch.cuda.get_device_name, True),
        (torch.cuda.init, True),
        (lambda: torch.cuda.set_device(0), True),
    ],
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_look_at_the_cards_may_spoil_forks(
    look: Callable[[], Any], *, spoils: bool
) -> None:
    """As PyTorch's CUDA code says; ``torch.cuda.is_available`` counts with the driver."""
    with simulated_device("T4"):
        look()
        child = os.fork()
        if child == 0:
            code = 2
            try:
                torch.zeros(1, device="cuda")
                code = 0
            except RuntimeError as error:
                code = int("Cannot re-initialize CUDA in fork" in str(error))
            finally:
                os._exit(code)
        _pid, status = os.waitpid(child, 0)

    assert int(spoils) == os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_forked_child_computes_where_its_parent_did() -> None:
    """OpenMP's threads are not in the child, and on a real card none are needed."""
    source = (
        "import os, torch\n"
        "from pytest_gpumem import simulated_device\n"
        "torch.set_num_threads(2)\n"
        "torch.ones(2**20).add_(1)\n"
        "with simulated_device('T4'):\n"
        "    child = os.fork()\n"
        "    total = torch.ones(2**20, device='cuda').sum().item()\n"
        "    if not child:\n"
        "        os._exit(7 if total == 2**20 else 8)\n"
        "    _pid, status = os.waitpid(child, 0)\n"
        "print(os.waitstatus_to_exitcode(status), torch.get_num_threads())\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", source]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, _ = process.communicate(timeout=120)
    finally:
        with suppress(ProcessLookupError):  # the child too, should it hang
            os.killpg(process.pid, signal.SIGKILL)

    assert "7 2\n" == out


@pytest.mark.usefixtures("machine")
def test_a_storage_grows_only_where_there_is_room() -> None:
    """An OOM leaves it as it was."""
    storage = torch.zeros(8, device="cuda").untyped_storage()
    with pytest.raises(torch.OutOfMemoryError):
        storage.resize_(2**50)
    size = storage.nbytes()
    storage.resize_(64)

    assert 32 == size
    assert 64 == storage.nbytes()


def test_other_accelerators_are_out_of_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that ask for Apple's and Intel's cards first find the simulated one."""
    from accelerate.state import PartialState

    for module in (torch.backends.mps, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)

    with simulated_device("T4"):
        assert not torch.backends.mps.is_available()
        assert not torch.xpu.is_available()
        assert torch.device("cuda") == PartialState().default_device
    PartialState._reset_state()

    assert torch.backends.mps.is_available()
    assert torch.xpu.is_available()
