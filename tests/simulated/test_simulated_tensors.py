"""Tensors on the simulated device: made, moved, computed with, shown, pickled."""

from __future__ import annotations

import copy
import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_gpumem.allocator.versions import installed_version
from pytest_gpumem.devices.selection import torch_build
from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_gpumem.devices.simulated.machine import SimulatedMachine


@pytest.fixture(autouse=True)
def machine() -> Iterator[SimulatedMachine]:
    """Two simulated T4s."""
    with simulated_device("T4*2") as machine:
        yield machine


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.empty(3, device="cuda"),
        lambda: torch.zeros(3, device="cuda"),
        lambda: torch.ones(3, device=0),
        lambda: torch.full((3,), 2.0, device="cuda:0"),
        lambda: torch.arange(3, device="cuda"),
        lambda: torch.linspace(0, 1, 3, device="cuda"),
        lambda: torch.eye(3, device="cuda"),
        lambda: torch.randn(3, device="cuda"),
        lambda: torch.randint(5, (3,), device="cuda"),
        lambda: torch.randperm(3, device="cuda"),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: torch.tensor(1.5, device=torch.device("cuda")),
        lambda: torch.as_tensor(np.ones(2), device="cuda"),
        lambda: torch.asarray([1.0], device="cuda"),
        lambda: torch.ones(3).to("cuda"),
        lambda: torch.ones(3).to(0),
        lambda: torch.ones(3).to(device="cuda", dtype=torch.float16),
        lambda: torch.ones(3).to(torch.zeros(1, device="cuda")),
        lambda: torch.ones(3).cuda(),
        lambda: torch.ones(3).cuda(0),
        lambda: torch.empty_like(torch.ones(3), device="cuda"),
        lambda: torch.ones(3).new_zeros(2, device="cuda"),
        lambda: torch.ones(3).new_empty(2, device=0),
        lambda: torch.ones(3).new_empty_strided((2,), (1,), device=0),
        lambda: torch.ones(3, device="cuda:1").new_full((2,), 1.0, device=0),
        lambda: torch.ones(3, device="cuda").new_ones(2),
        lambda: torch.ones(3, device="cuda").new_tensor([1, 2]),
        lambda: torch.ones(3).new_tensor([1, 2], device=0),
        lambda: torch.fft.fftfreq(3, device=0),
        lambda: torch.fft.rfftfreq(3, device=0),
        lambda: torch.tril_indices(3, 3, device="cuda"),
        lambda: torch.from_numpy(np.ones(3)).to("cuda", non_blocking=True),
    ],
)
def test_tensors_are_made_on_the_card(make: Callable[[], torch.Tensor]) -> None:
    """Every usual way to a tensor on "cuda" ends on the current card."""
    tensor = make()

    assert torch.device("cuda:0") == tensor.device
    assert tensor.is_cuda
    assert not tensor.is_cpu
    assert 0 == tensor.get_device()


def test_the_current_device_is_where_cuda_means() -> None:
    """set_device and device() choose the card that an index-less name means."""
    with torch.cuda.device(1):
        inside = torch.zeros(1, device="cuda")
    torch.cuda.set_device(1)
    after = torch.zeros(1, device="cuda")
    torch.cuda.set_device(0)

    assert [1, 1] == [inside.get_device(), after.get_device()]


def test_a_default_device_context_reaches_every_constructor() -> None:
    """Under ``with torch.device("cuda")`` plain constructors make tensors on a card."""
    with torch.device("cuda"):
        made = [torch.zeros(2), torch.tensor([1.0]), torch.as_tensor([1])]
    with torch.device("meta"):
        meta = torch.tensor([1.0])

    assert all(tensor.is_cuda for tensor in made)
    assert meta.is_meta


def test_a_bare_index_names_a_card() -> None:
    """torch.device(1) is the second card, and still a torch.device."""
    device = torch.device(1)
    build = torch_build()
    is_for_cuda = build is not None and bool(build.cuda or build.hip)

    assert is_for_cuda is (type(device) is torch.device)

    assert "cuda:1" == str(device)
    assert isinstance(device, torch.device)
    assert isinstance(torch.zeros(1).device, torch.device)


def test_a_card_that_is_not_there_is_refused() -> None:
    """An ordinal beyond the cards raises the runtime's own error, with its number."""
    with pytest.raises(torch.AcceleratorError) as caught:
        torch.zeros(1, device="cuda:7")

    assert 101 == caught.value.error_code  # type: ignore[attr-defined]
    why = "GPU device may be out of range, do you have enough GPUs?\n"
    assert str(caught.value).startswith(
        "CUDA error: invalid device ordinal\n"
        + (why if installed_version().explains_errors else "")
    )


def test_values_travel_there_and_back() -> None:
    """What goes up comes down unchanged, into a new tensor."""
    host = torch.arange(6.0).reshape(2, 3)

    card = host.cuda()
    host += 1

    assert torch.equal(host - 1, card.cpu())
    assert [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] == card.tolist()
    assert 5.0 == card.max().item()
    assert np.array_equal(card.cpu().numpy(), (host - 1).numpy())


def test_moving_to_the_same_card_copies_nothing() -> None:
    """to() gives the tensor itself where it already is, unless copy is asked for."""
    card = torch.ones(3, device="cuda")

    assert card.to("cuda") is card
    assert card.to("cuda", copy=True) is not card
    assert card.cuda() is card


def test_cards_copy_to_each_other() -> None:
    """A tensor moves between cards with its values."""
    moved = torch.arange(3.0, device="cuda:0").to("cuda:1")

    assert 1 == moved.get_device()
    assert [0.0, 1.0, 2.0] == moved.tolist()


def test_another_tensor_says_where_to_go() -> None:
    """type_as() takes its device as well, like to()."""
    host = torch.arange(3.0, requires_grad=True)
    card = torch.ones(1, device="cuda:1", dtype=torch.float16)

    there, back = host.type_as(card), card.type_as(host)

    assert (torch.float16, 1) == (there.dtype, there.get_device())
    assert (torch.float32, "cpu") == (back.dtype, back.device.type)
    assert host.type_as(host) is host
    there.sum().backward()
    assert host.grad is not None
    assert "cpu" == host.grad.device.type


def test_a_cast_stays_on_the_card() -> None:
    """half(), float() and to(dtype) change the type and nothing else."""
    half = torch.ones(3, device="cuda").half()

    assert (torch.float16, True) == (half.dtype, half.is_cuda)
    assert "torch.cuda.HalfTensor" == half.type()


def test_operands_on_two_devices_raise_torchs_error() -> None:
    """Host and card do not mix; numbers and 0-dim host tensors do."""
    card = torch.ones(3, device="cuda")

    with pytest.raises(
        RuntimeError,
        match="Expected all tensors to be on the same device, but found at least two "
        "devices, cuda:0 and cpu!",
    ):
        card + torch.ones(3)
    with pytest.raises(
        RuntimeError,
        match=r"got mat2 is on cpu, different from other tensors on cuda:0",
    ):
        torch.mm(card.reshape(1, 3), torch.ones(3, 1))
    with pytest.raises(RuntimeError, match="cuda:0 and cuda:1"):
        card + torch.ones(3, device="cuda:1")

    assert [3.0] * 3 == (card + torch.tensor(2)).tolist()


def test_host_indices_are_taken() -> None:
    """Indexing with a host tensor works, as on a real card."""
    card = torch.arange(4.0, device="cuda")
    card[torch.tensor([0])] = 9.0

    assert [9.0, 3.0] == card[torch.tensor([0, 3])].tolist()


def test_a_copy_into_a_host_tensor_leaves_it_on_the_host() -> None:
    """host.copy_(card) fills the host tensor in place."""
    host = torch.zeros(3)

    host.copy_(torch.ones(3, device="cuda"))

    assert host.is_cpu
    assert [1.0] * 3 == host.tolist()


@pytest.mark.parametrize("name", ["numpy", "__array__"])
def test_numpy_needs_the_host_first(name: str) -> None:
    """A tensor on a card has torch's own words for numpy."""
    card = torch.ones(2, device="cuda")

    with pytest.raises(
        TypeError, match="can't convert cuda:0 device type tensor to numpy"
    ):
        getattr(card, name)()
    assert np.array_equal(card.requires_grad_().numpy(force=True), np.ones(2))
    with pytest.raises(TypeError, match="apply_ is only implemented on CPU tensors"):
        card.detach().apply_(abs)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: torch.ones(2, device="cuda"), "tensor([1., 1.], device='cuda:0')"),
        (
            lambda: torch.ones(2, device="cuda", dtype=torch.float16),
            "tensor([1., 1.], device='cuda:0', dtype=torch.float16)",
        ),
        (lambda: torch.tensor(3, device="cuda:1"), "tensor(3, device='cuda:1')"),
        (
            lambda: torch.zeros(0, 2, device="cuda"),
            "tensor([], device='cuda:0', size=(0, 2))",
        ),
        (
            lambda: nn.Parameter(torch.ones(1, device="cuda")),
            "Parameter containing:\ntensor([1.], device='cuda:0', requires_grad=True)",
        ),
        (
            lambda: nn.Parameter(torch.ones(1, device="cuda")) * 2,
            "tensor([2.], device='cuda:0', grad_fn=<MulBackward0>)",
        ),
    ],
)
def test_tensors_are_shown_as_on_a_card(
    make: Callable[[], torch.Tensor], text: str
) -> None:
    """The text is torch's for a tensor on CUDA."""
    assert text == repr(make())


def test_a_number_is_formatted_as_a_number() -> None:
    """A 0-dim tensor takes a format specification."""
    assert "2.50" == f"{torch.tensor(2.5, device='cuda'):.2f}"


@pytest.mark.parametrize(
    "use", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_copies_are_of_the_same_kind_and_place(use: Callable[[Any], Any]) -> None:
    """Deep copies and pickles keep values, device and being a parameter."""
    layer = nn.Linear(3, 2).cuda()

    twin = use(layer)

    assert isinstance(twin.weight, nn.Parameter)
    assert twin.weight.is_cuda
    assert torch.equal(layer.weight.cpu(), twin.weight.cpu())
    assert layer.weight.data_ptr() != twin.weight.data_ptr()


@pytest.mark.parametrize(
    ("location", "device"),
    [(None, "cuda:1"), ("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0")],
)
def test_saved_tensors_load_where_wanted(location: str | None, device: str) -> None:
    """torch.save notes the card; torch.load puts the tensor there or elsewhere."""
    file = io.BytesIO()
    torch.save({"x": torch.arange(3.0, device="cuda:1")}, file)
    file.seek(0)

    loaded = torch.load(file, map_location=location)["x"]

    assert device == str(loaded.device)
    assert [0.0, 1.0, 2.0] == loaded.tolist()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.uint16, torch.uint64, torch.float8_e5m2]
)
def test_tensors_without_a_typed_storage_are_saved(dtype: torch.dtype) -> None:
    """Newer dtypes have none; torch saves them with another function."""
    source = torch.arange(3.0).to(dtype).cuda()

    loaded = _saved_and_loaded(source)

    assert (dtype, True) == (loaded.dtype, loaded.is_cuda)
    assert [0.0, 1.0, 2.0] == loaded.float().tolist()


@pytest.mark.parametrize("place", ["cuda", "cpu"])
def test_lazy_conjugation_and_negation_are_saved(place: str) -> None:
    """They are marks on a tensor, and not in its memory."""
    source = torch.tensor([1 + 2j, 3 - 1j], device="cuda")

    conjugated = _saved_and_loaded(source.conj(), map_location=place)
    negated = _saved_and_loaded(source.conj().imag, map_location=place)

    assert (True, [1 - 2j, 3 + 1j]) == (conjugated.is_conj(), conjugated.tolist())
    assert (True, [-2, 1]) == (negated.is_neg(), (negated * 1).tolist())


@pytest.mark.parametrize("kind", [torch.Tensor.clone, nn.Parameter])
def test_attributes_of_a_tensor_are_saved(kind: Callable[[Any], Any]) -> None:
    """As on the host, for tensors and parameters."""
    source = kind(torch.ones(2, device="cuda"))
    source.is_shared_expert = True

    assert _saved_and_loaded(source).is_shared_expert
    assert pickle.loads(pickle.dumps(source)).is_shared_expert
    assert type(source) is type(_saved_and_loaded(source))


def _saved_and_loaded(source: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    return torch.load(file, **options)


def test_host_tensors_load_onto_a_card() -> None:
    """map_location="cuda" moves what was saved on the host."""
    file = io.BytesIO()
    torch.save(torch.arange(3.0), file)
    file.seek(0)

    assert torch.load(file, map_location="cuda").is_cuda


def test_safetensors_load_onto_a_card(tmp_path: Any) -> None:
    """load_file(device=…) accepts every spelling of a card."""
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"x": torch.arange(3.0)}, tmp_path / "x.safetensors")

    for device in ("cuda", "cuda:1", 0):
        loaded = safetensors.load_file(tmp_path / "x.safetensors", device=device)["x"]
        assert loaded.is_cuda
        assert [0.0, 1.0, 2.0] == loaded.tolist()


def test_data_moves_a_parameter_in_place() -> None:
    """``p.data = p.data.cuda()`` moves the same object, and back."""
    parameter = nn.Parameter(torch.arange(3.0))
    identity = id(parameter)

    parameter.data = parameter.data.cuda()
    on_card = (parameter.is_cuda, isinstance(parameter, nn.Parameter))
    parameter.data = parameter.data.cpu()

    assert (True, True) == on_card
    assert identity == id(parameter)
    assert nn.Parameter is type(parameter)
    assert [0.0, 1.0, 2.0] == parameter.tolist()


def test_a_parameter_is_made_anew_from_its_class_and_its_attributes() -> None:
    """As ``init_empty_weights`` of accelerate and of peft does it."""
    parameter = nn.Linear(2, 3, device="cuda").weight
    kind: Any = type(parameter)
    again = kind(parameter.to("meta"), **vars(parameter))

    assert isinstance(again, nn.Parameter)
    assert again.is_meta
    assert again.requires_grad
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        kind(parameter, other=1)


@pytest.mark.parametrize("kind", [nn.Parameter, lambda tensor: tensor])
@pytest.mark.parametrize("is_asked", [True, False])
def test_the_dict_of_a_tensor_has_what_its_user_put_there(
    kind: Any, *, is_asked: bool
) -> None:
    """Of a parameter, too; copies and pickles have it as well, and nothing else."""
    tensor = kind(torch.arange(3.0, device="cuda"))
    if is_asked:
        assert {} == vars(tensor)
    tensor.mark = "kept"
    copies = [copy.copy(tensor), pickle.loads(pickle.dumps(tensor))]  # our own
    vars(tensor).update(other=1)

    assert {"mark": "kept", "other": 1} == vars(tensor)
    assert [{"mark": "kept"}] * 2 == [vars(each) for each in copies]
    deep = vars(copy.deepcopy(tensor))  # torch drops what a parameter has
    assert ({} if kind is nn.Parameter else vars(tensor)) == deep
    for each in (tensor, *copies):
        assert isinstance(each, nn.Parameter) is (kind is nn.Parameter)
        assert [2.0, 3.0, 4.0] == (each + 2).tolist()

    tensor.__dict__ = {"new": 2}

    assert not hasattr(tensor, "mark")
    assert [2, [0.0, 1.0, 2.0]] == [tensor.new, tensor.tolist()]


def test_a_module_moves_with_all_it_has() -> None:
    """Parameters, buffers and gradients go up and come back; parameters stay the same."""
    module = nn.BatchNorm1d(2)
    parameters = list(module.parameters())
    module(torch.randn(4, 2)).sum().backward()

    module.cuda()
    up = {str(t.device) for t in [*module.parameters(), *module.buffers()]}
    grads = {str(p.grad.device) for p in module.parameters() if p.grad is not None}
    module.cpu()

    assert {"cuda:0"} == up == grads
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert all(p.is_cpu for p in module.parameters())


def test_views_share_values() -> None:
    """A view sees what is written through another."""
    card = torch.zeros(4, device="cuda")
    view = card.view(2, 2)[1]

    view.fill_(5.0)

    assert [0.0, 0.0, 5.0, 5.0] == card.tolist()
    assert card.data_ptr() + 8 == view.data_ptr()


def test_shapes_can_change_in_place() -> None:
    """t_(), unsqueeze_(), resize_() and out= change the tensor itself."""
    card = torch.arange(6.0, device="cuda").reshape(2, 3)
    card.t_()
    card.unsqueeze_(0)
    out = torch.empty(0, device="cuda")
    torch.add(torch.ones(5, device="cuda"), 1, out=out)

    assert (1, 3, 2) == tuple(card.shape)
    assert [2.0] * 5 == out.tolist()


@pytest.mark.parametrize(
    "copy",
    [
        lambda card: card.to("cpu", non_blocking=True),
        lambda card: card.requires_grad_().to("cpu", torch.half, non_blocking=True),
        lambda card: card.expand(3, 2).to("cpu", non_blocking=True)[1:],
        lambda card: card.type(torch.FloatTensor, non_blocking=True),
        lambda card: card.untyped_storage().to(device="cpu", non_blocking=True),
        lambda _card: nn.Linear(1, 1).cuda().to("cpu", non_blocking=True).weight,
    ],
)
def test_a_copy_that_the_host_does_not_wait_for_is_pinned(
    copy: Callable[[torch.Tensor], Any],
) -> None:
    """Source: ``_to_copy`` of ``aten/src/ATen/native/TensorConversions.cpp``."""
    assert copy(torch.ones(2, device="cuda")).is_pinned()


def test_pinned_memory_says_so() -> None:
    """pin_memory() and the factories' pin_memory= give pinned host tensors."""
    assert torch.ones(2).pin_memory().is_pinned()
    assert torch.empty(2, pin_memory=True).is_pinned()
    assert torch.ones(2).new_zeros(2, pin_memory=True).is_pinned()
    card = torch.ones(2, device="cuda")
    assert card.new_full((2,), 1.0, device="cpu", pin_memory=True).is_pinned()
    assert not torch.ones(2).is_pinned()
    assert not card.cpu().is_pinned()
    with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
        card.new_empty(2, pin_memory=True)
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.ones(2, device="cuda").pin_memory()


def test_random_numbers_repeat_and_leave_the_host_alone() -> None:
    """A seed repeats a card's numbers; drawing them does not move the host's."""
    torch.manual_seed(7)
    first = torch.randn(3, device="cuda")
    host = torch.randn(3)
    torch.manual_seed(7)
    dropped = torch.nn.functional.dropout(torch.ones(50, device="cuda"))

    assert torch.equal(host, torch.randn(3))
    torch.manual_seed(7)
    assert torch.equal(first.cpu(), torch.randn(3, device="cuda").cpu())
    assert {0.0, 2.0} == set(dropped.tolist())


def test_everything_is_as_before_afterwards(machine: SimulatedMachine) -> None:
    """A nested machine gives way to the one around it, names and all."""
    to = torch.Tensor.to
    with simulated_device("K80"):
        inner = torch.cuda.get_device_name()

    assert "Tesla K80" == inner
    assert "Tesla T4" == torch.cuda.get_device_name()
    assert 2 == torch.cuda.device_count() == len(machine.cards)
    assert to is torch.Tensor.to


def test_generators_can_be_a_cards() -> None:
    """torch.Generator("cuda") is a generator, says its card, and repeats its numbers."""
    generator = torch.Generator("cuda").manual_seed(3)
    drawn = [
        torch.randn(3, device="cuda", generator=generator.manual_seed(3)).tolist()
        for _ in range(2)
    ]

    assert "cuda:0" == str(generator.device)
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.Generator(), torch.Generator)
    assert drawn[0] == drawn[1]
