"""TorchScript beside the simulated device: libraries script as they are imported."""

from __future__ import annotations

import copy
import io
from typing import TYPE_CHECKING, Any

import pytest
import torch

from pytest_gpumem import OomInjector, Verdict, sweep_ooms
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import NoValuesError, UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from pathlib import Path

# A DeprecationWarning up to torch 2.14, a FutureWarning since; Python 3.14 has its own.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:`torch\.jit\..*` is (deprecated|not supported)"
)


_FAILED = "The following operation failed in the TorchScript interpreter."


def _made(x: torch.Tensor, device: torch.device, size: int) -> torch.Tensor:
    """Use what the simulated device replaces."""
    first = torch.zeros(size, device=device) + torch.ones_like(x)
    second = torch.as_tensor(2.0, device=x.device, dtype=x.dtype)
    return first + second + torch.tensor([3.0], device=device) + torch.arange(size)[0]


def _moved(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.to(like.device) + like


class _Branching(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] > 1 else x - 1


def _branched(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.shape[0] > 1 else x - 1


def test_a_trace_keeps_the_branches_of_scripts_in_it() -> None:
    """It takes in their graphs, and does not run their Python code."""
    with simulated_device("T4"):
        module = torch.nn.Sequential(torch.jit.script(_Branching()))
        function: Any = torch.jit.script(_branched)
        for program in (module, lambda x: function(x)):  # noqa: PLW0108  # a script is not traced
            traced: Any = torch.jit.trace(program, torch.zeros(2, device="cuda"))
            results = [traced(torch.zeros(each, device="cuda")) for each in (2, 1)]
            assert [[1, 1], [-1]] == [each.tolist() for each in results]

        asking: Any = torch.jit.script(_moved)
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="asks for devices"):
            torch.jit.trace(lambda x: asking(x, x), torch.ones(1, device="cuda"))


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_function_is_scripted_while_cards_are_simulated(device: str) -> None:
    """With constructors in it, for host and card."""
    with simulated_device("T4"):
        scripted = torch.jit.script(_made)
        x = torch.ones(3, device=device)
        made = scripted(x, torch.device(device), 3)
        moved = torch.jit.script(_moved)(torch.ones(3), x)

        assert device == str(made.device) == str(moved.device)
        assert [6.0, 6.0, 6.0] == made.tolist()
        assert [2.0, 2.0, 2.0] == moved.tolist()


def test_what_was_scripted_before_runs_on_a_card_and_after() -> None:
    """The same function meets a card, an OOM on it, and the host again."""
    scripted = torch.jit.script(_moved)
    host = torch.ones(3)
    with simulated_device("T4"):
        assert scripted(host, torch.ones(3, device="cuda")).is_cuda
        like = torch.ones(3, device="cuda")
        with (
            OomInjector("any:nth=2") as injector,
            # The interpreter turns every error of an operator into this.
            pytest.raises(RuntimeError, match="CUDA out of memory") as caught,
        ):
            scripted(host, like)
        assert type(caught.value) is RuntimeError
        assert str(caught.value).startswith(_FAILED)
        assert injector.num_injected == 1

    assert [2.0, 2.0, 2.0] == scripted(host, host).tolist()


def test_a_function_scripted_beside_cards_outlives_them() -> None:
    """Its code is compiled once and holds nothing of theirs."""
    with simulated_device("T4"):
        scripted = torch.jit.script(_made)

    made = scripted(torch.ones(2), torch.device("cpu"), 2)
    assert [6.0, 6.0] == made.tolist()


class _Scaled(torch.nn.Module):
    """A layer inside, a buffer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("scale", torch.full((4,), 2.0))

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(source) * self.scale
        return result


def test_a_scripted_module_moves_with_its_parameters() -> None:
    """C++ holds them: it computes and trains on the card, and back on the host."""
    with simulated_device("T4"):
        module = torch.jit.script(_Scaled())
        weight = module.linear.weight
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        expected = module(torch.ones(2, 4)).detach()

        module.cuda()
        result = module(torch.ones(2, 4, device="cuda"))
        result.sum().backward()
        before = weight.detach().clone()
        optimizer.step()

        assert module.linear.weight is weight
        assert ("cuda:0", "cuda:0") == (str(weight.device), str(weight.grad.device))
        assert torch.equal(result.cpu(), expected)
        assert torch.equal(weight, before - 2.0)
        module.cpu()
        assert "cpu" == str(module(torch.ones(2, 4)).device)
        assert torch.equal(weight, before.cpu() - 2.0)
        del result, before, optimizer
        module.zero_grad()
        torch._C._cuda_clearCublasWorkspaces()
        assert 0 == torch.cuda.memory_allocated()


def _traced(device: str = "cpu") -> torch.jit.ScriptModule:
    """Trace a layer, a buffer, and a number and a tensor that stay in the code."""
    module = _Scaled().to(device).eval()
    kept = torch.full((4,), 3.0, device=device)
    like = torch.ones(2, 4, device=device)
    traced = torch.jit.trace(torch.nn.Sequential(module, _Shifted(kept)), like)
    assert isinstance(traced, torch.jit.ScriptModule)
    return traced


class _Shifted(torch.nn.Module):
    """Adds a tensor that is neither parameter nor buffer."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = [kept]

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        return source * 2 + self.kept[0]


def test_a_traced_module_moves_with_its_parameters() -> None:
    """Traced on the host: its layers are on the card afterwards, and compute there."""
    with simulated_device("T4"):
        module = torch.jit.trace(_Scaled(), torch.ones(2, 4))
        expected = module(torch.ones(2, 4))

        module.cuda()
        assert {"cuda:0"} == {str(each.device) for each in module.state_dict().values()}
        assert torch.equal(module(torch.ones(2, 4, device="cuda")).cpu(), expected)
        with pytest.raises(RuntimeError, match="on the same device"):
            module(torch.ones(2, 4))


@pytest.mark.parametrize("made_on", ["cpu", "cuda:0"])
@pytest.mark.parametrize("goal", [None, "cpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("is_file", [False, True])
def test_an_archive_is_loaded_where_it_or_the_caller_says(
    made_on: str,
    goal: str | None,
    is_file: bool,  # noqa: FBT001  # a parameter of the test
    tmp_path: Path,
) -> None:
    """Parameters, buffers and what is in the code; a file, a buffer; ``torch.load``."""
    with simulated_device("T4*2"):
        traced = _traced(made_on)
        expected = traced(torch.ones(2, 4, device=made_on)).cpu()
        place: Any = tmp_path / "archive.pt" if is_file else io.BytesIO()
        torch.jit.save(traced, place)
        del traced
        if not is_file:
            place.seek(0)
        torch._C._cuda_clearCublasWorkspaces()
        before = torch.cuda.memory_allocated(1)

        loaded = torch.jit.load(place, map_location=goal)

        where = {None: made_on, "cuda": "cuda:0"}.get(goal, goal)
        assert {where} == {str(each.device) for each in loaded.state_dict().values()}
        assert torch.equal(loaded(torch.ones(2, 4, device=where)).cpu(), expected)
        # Three parameters and buffers, and a tensor and a number in the code.
        grown = 5 * 512 if goal == "cuda:1" else 0
        torch._C._cuda_clearCublasWorkspaces()
        assert grown == torch.cuda.memory_allocated(1) - before


def test_an_archive_of_a_real_card_names_its_device() -> None:
    """Without a note beside it, the pickle's persistent ids are read."""
    archive = io.BytesIO()
    torch.jit.save(_traced(), archive)
    archive.seek(0)
    reader, altered = torch._C.PyTorchFileReader(archive), io.BytesIO()
    writer = torch._C.PyTorchFileWriter(altered)
    for name in reader.get_all_records():
        content = reader.get_record(name)
        if name in ("data.pkl", "constants.pkl"):
            # A string of the pickle, after its length in four bytes.
            content = content.replace(b"\3\0\0\0cpu", b"\6\0\0\0cuda:1")
        if name not in ("version", ".data/serialization_id", "byteorder"):
            writer.write_record(name, content, len(content))
    writer.write_end_of_file()
    altered.seek(0)
    with simulated_device("T4*2"):
        loaded = torch.jit.load(altered)

        assert {"cuda:1"} == {str(each.device) for each in loaded.state_dict().values()}
        assert loaded(torch.ones(2, 4, device="cuda:1")).get_device() == 1


def test_an_archive_that_is_none_is_told_by_torch(tmp_path: Path) -> None:
    """A folder, a missing file, and a file of something else."""
    other = tmp_path / "other"
    other.write_text("no archive", encoding="utf-8")
    with simulated_device("T4"):
        for place in (tmp_path, tmp_path / "missing"):
            with pytest.raises(ValueError, match="provided filename"):
                torch.jit.load(place)
        with pytest.raises(RuntimeError, match="PytorchStreamReader"):
            torch.jit.load(other)


def test_an_archive_of_several_devices_is_refused() -> None:
    """C++ would not say which tensor lies where."""
    with simulated_device("T4*2"):
        module = torch.jit.script(_Scaled())
        module.linear.cuda()
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="several devices"):
            torch.jit.save(module, io.BytesIO())


class _Asking(torch.nn.Module):
    """Asks for a device, as layers of attention do for their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.scaled = _Scaled()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, source: torch.Tensor) -> torch.Tensor:
        result = self.shifted(self.scaled(source))
        for layer in self.layers:
            result = layer(result)
        if source.is_cuda:
            result = result * 1
        normalised: torch.Tensor = self.norm(result)
        return normalised

    def shifted(self, source: torch.Tensor) -> torch.Tensor:
        return source + torch.ones(source.shape[0], 4, device=source.device)


def test_a_scripted_module_that_asks_for_devices_runs_as_its_python_code() -> None:
    """It trains, is copied and cast; it is a part of another; the host is as before."""
    like = torch.randn(3, 4)
    with simulated_device("T4"):
        scripted = torch.jit.script(_Asking())
        expected = copy.deepcopy(scripted)(like)
        outer = torch.jit.script(torch.nn.Sequential(scripted)).cuda()

        assert torch.equal(outer(like.cuda()).cpu(), expected)
        assert scripted.norm.num_batches_tracked.item() == 1
        scripted.eval()
        assert scripted(like.cuda()).is_cuda
        assert scripted.norm.num_batches_tracked.item() == 1
        copied = copy.deepcopy(scripted).half()
        assert copied.scaled.linear.weight.dtype == torch.float16
        with torch.autocast("cuda"):
            copied(like.cuda()).float().sum().backward()
        assert copied.scaled.linear.weight.grad.is_cuda
        assert "prim::is_cuda" in str(scripted.forward.graph)  # type: ignore[attr-defined]
        scripted.cpu()
        assert scripted(like).device.type == "cpu"
    assert scripted(like).device.type == "cpu"


@pytest.mark.parametrize("way", ["scripted", "traced", "loaded"])
def test_an_oom_in_a_script_is_a_runtime_error(way: str) -> None:
    """No handler of ``torch.OutOfMemoryError`` catches it, as on a card."""
    with simulated_device("T4"):
        like = torch.ones(2, 4)
        module = torch.jit.script(_Scaled())
        if way == "traced":
            module = torch.jit.trace(_Scaled(), like)
        if way == "loaded":
            archive = io.BytesIO()
            torch.jit.save(module, archive)
            archive.seek(0)
            module = torch.jit.load(archive)
        module.cuda()
        on_card = like.cuda()
        module(on_card)
        before = torch.cuda.memory_allocated()
        with (
            OomInjector("any:nth=1"),
            pytest.raises(RuntimeError, match="CUDA out of memory") as caught,
        ):
            module(on_card)

        assert type(caught.value) is RuntimeError
        assert str(caught.value).startswith(_FAILED)
        if way != "scripted":
            with (
                OomInjector("any:nth=1,flavour=cublas"),
                pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED"),
            ):
                module(on_card)
        # The error keeps no tensor of the code alive.
        assert before == torch.cuda.memory_allocated()


def test_an_error_that_is_ours_stays_one() -> None:
    """A refusal is not hidden in an error of the interpreter."""
    with simulated_device("T4", values="none"):
        module = torch.jit.script(_Reading()).cuda()
        with pytest.raises(NoValuesError):
            module(torch.ones(3, device="cuda"))


class _Reading(torch.nn.Module):
    """Reads a value."""

    def forward(self, source: torch.Tensor) -> float:
        return float(source.sum().item())


def test_code_without_its_python_that_asks_for_devices_is_refused() -> None:
    """A loaded archive, and a trace in which a card was written down."""
    archive = io.BytesIO()
    torch.jit.save(torch.jit.script(_Asking()), archive)
    archive.seek(0)
    with simulated_device("T4"):
        like = torch.ones(3, 4, device="cuda")
        for module in (
            torch.jit.load(archive, map_location="cuda"),
            torch.jit.trace(_Asking().cuda().eval(), like, check_trace=False),
        ):
            with pytest.raises(UnsupportedOnSimulatedDeviceError, match="asks for dev"):
                module(like)


def test_a_trace_that_moves_a_tensor_is_refused() -> None:
    """Its graph would hold the tensor, and not the move."""
    with (
        simulated_device("T4"),
        pytest.raises(UnsupportedOnSimulatedDeviceError, match="before it is traced"),
    ):
        torch.jit.trace(lambda source: source.cuda() + 1, torch.ones(2))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("flavour", ["native", "cudnn"])
def test_a_sweep_knows_the_ooms_of_a_script(*, trace: bool, flavour: str) -> None:
    """An OOM that the interpreter has rewritten is one; so is the negative control."""
    host = torch.ones(2, 4)
    with simulated_device("T4"):
        module = (
            torch.jit.trace(_Scaled(), host) if trace else torch.jit.script(_Scaled())
        )
        module.cuda()
        report = sweep_ooms(
            lambda: module(host.cuda()).cpu(),
            modes=("transient",),
            flavours=(flavour, "not-oom"),
        )

    verdicts = {(each.point.flavour, each.verdict) for each in report.outcomes}
    assert (flavour, Verdict.CLEAN_OOM) in verdicts
    assert {Verdict.CLEAN_OOM, Verdict.OTHER_ERROR} >= {each for _, each in verdicts}


class _Exporting(torch.nn.Module):
    """Exports methods that ask for the device of what they are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what ``made`` returns, and more."""
        result: torch.Tensor = self.made(x) + self.linear(x)
        return result

    @torch.jit.export
    def made(self, x: torch.Tensor) -> torch.Tensor:
        """Make a tensor beside the operand."""
        result: torch.Tensor = self.linear(x) + torch.ones(2, device=x.device)
        return result


def test_exported_methods_run_on_a_card() -> None:
    """They make their tensors there, and their errors are the interpreter's."""
    source = torch.rand(3, 4)
    with simulated_device("T4"):
        module = torch.jit.script(_Exporting().eval())
        expected = [module.made(source), module(source)]
        for each in (module, copy.deepcopy(module)):
            each.cuda()
            found = [each.made(source.cuda()), each(source.cuda())]
            assert all(result.is_cuda for result in found)
            assert all(map(torch.equal, expected, [result.cpu() for result in found]))
            with pytest.raises(RuntimeError, match="TorchScript interpreter"):
                each.made(source)
        module.cpu()

        assert torch.equal(expected[0], module.made(source))
        assert "linear" in module.made.code


def test_a_module_for_onednn_is_refused_by_its_name() -> None:
    """TorchScript takes a card's parameters for the CPU's, and packs them for oneDNN."""
    with simulated_device("T4"):
        module = torch.jit.script(torch.nn.Conv2d(3, 4, 3).eval()).cuda()
        frozen = torch.jit.freeze(module)

        assert frozen(torch.ones(1, 3, 8, 8, device="cuda")).is_cuda
        with pytest.raises(
            UnsupportedOnSimulatedDeviceError, match="optimize_for_inference makes"
        ):
            torch.jit.optimize_for_inference(frozen)


@pytest.mark.parametrize(
    "layer",
    [
        torch.nn.Conv1d(8, 4, 3),
        torch.nn.Conv2d(3, 4, 3, padding=1),
        torch.nn.ConvTranspose2d(3, 4, 2, stride=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_convolution_is_traced(layer: torch.nn.Module) -> None:
    """Its weight is a parameter in the trace, which runs on other inputs, also on the host."""
    source = torch.rand(2, 3, 8, 8) if layer.weight.dim() == 4 else torch.rand(2, 8, 5)  # type: ignore[operator]  # a tensor
    other = source * 2 + 1
    expected = layer(other)
    with simulated_device("T4"):
        on_card = copy.deepcopy(layer).cuda()
        traced = torch.jit.trace(on_card, source.cuda())

        assert torch.equal(traced(other.cuda()).cpu(), expected)
        assert "aten::_convolution" in str(traced.inlined_graph)
        traced(other.cuda()).sum().backward()
        assert on_card.weight.grad is not None
        traced.cpu()

        assert torch.equal(traced(other), expected)
