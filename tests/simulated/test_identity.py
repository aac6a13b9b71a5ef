"""What a tensor of a card stays through moves, new data, copies and pickles."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4*2"):
        yield


def _held() -> int:
    """Return the bytes that tensors hold on the card."""
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def _trained() -> nn.Linear:
    module = nn.Linear(512, 512, bias=False).cuda()
    module(torch.ones(2, 512, device="cuda")).sum().backward()
    return module


# -- modules ------------------------------------------------------------------------------


def test_a_module_with_gradients_goes_to_the_host_and_back() -> None:
    """Its gradients move with it: no bytes stay, and an optimiser steps on each side."""
    module = _trained()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    grad: Any = module.weight.grad
    before = module.weight.tolist()

    module.cpu()
    kept: Any = module.weight.grad
    on_host = (_held(), kept is grad, type(grad), grad.device.type)
    optimizer.step()
    module.cuda()
    optimizer.step()

    assert (0, True, torch.Tensor, "cpu") == on_host
    assert 2 * MIB == _held()
    assert id(grad) == id(module.weight.grad)
    assert "cuda:0" == str(grad.device)
    assert "device='cuda:0'" in repr(grad)
    assert np.allclose(np.array(before) - 2.0, module.weight.tolist())


def test_a_gradient_that_moves_alone_stays_its_owners() -> None:
    """``p.grad.data = …`` on either side, before or after its parameter moves."""
    parameter: Any = nn.Parameter(torch.ones(4))
    parameter.grad = torch.ones(4)

    parameter.grad.data = parameter.grad.data.cuda()
    first = str(parameter.grad.device)
    parameter.data = parameter.data.cuda()
    parameter.grad.data = parameter.grad.data.cpu()

    assert "cuda:0" == first
    assert "cpu" == str(parameter.grad.device)
    assert [1.0] * 4 == parameter.grad.tolist()


def test_a_graph_made_on_the_host_holds_no_old_bytes() -> None:
    """A parameter that a graph has saved leaves nothing where it was."""
    module = nn.Linear(512, 512, bias=False)
    kept = module(torch.ones(2, 512, requires_grad=True))

    module.cuda()
    on_card = _held()
    module.cpu().half().to("cuda")

    assert MIB == on_card
    assert MIB // 2 == _held()
    del module
    gc.collect()
    assert MIB // 2 == _held()  # the graph has the parameter, as on a card
    del kept
    assert 0 == _held()


def test_a_graph_finds_its_parameters_back() -> None:
    """Backward after the module was away and came back fills its gradients."""
    module = nn.Linear(4, 4, bias=False).cuda()
    loss = module(torch.ones(2, 4, device="cuda")).sum()

    module.cpu()
    module.cuda()
    loss.backward()

    assert [[2.0] * 4] * 4 == module.weight.grad.tolist()  # type: ignore[union-attr]  # it is there


def test_hooks_go_where_their_tensor_goes() -> None:
    """Hooks of a parameter run on the host, on a card, and on the host again."""
    seen: list[str] = []
    module = nn.Linear(2, 2, bias=False)
    module.weight.register_hook(lambda grad: seen.append(grad.device.type))
    module.weight.register_post_accumulate_grad_hook(lambda _each: seen.append("later"))

    for device in ("cpu", "cuda", "cpu"):
        module.to(device)(torch.ones(1, 2, device=device)).sum().backward()

    assert ["cpu", "later", "cuda", "later", "cpu", "later"] == seen


def test_a_parameters_class_comes_back_from_a_card() -> None:
    """A subclass of Parameter is itself again on the host, with its attributes."""

    class Marked(nn.Parameter):
        """A parameter with a mark."""

    module = nn.Linear(2, 2)
    module.weight = Marked(torch.ones(2, 2))
    module.weight.mark = "kept"  # type: ignore[attr-defined]  # a user's own

    module.cuda().cpu()

    assert type(module.weight) is Marked
    assert {"mark": "kept"} == vars(module.weight)


def test_modules_that_swap_their_tensors_move_too() -> None:
    """``torch.__future__.set_swap_module_params_on_conversion``: gradients follow."""
    module = nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    grad = module.weight.grad
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.cuda()
        devices = [module.weight.device.type, module.weight.grad.device.type]  # type: ignore[union-attr]  # it is there
        module.cpu()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)

    assert ["cuda", "cuda"] == devices
    assert type(module.weight) is nn.Parameter
    assert module.weight.grad is grad


#: As a library has it that imported the name before cards were simulated.
_IMPORTED: Any = torch.utils.swap_tensors


@pytest.mark.parametrize("is_asked", [True, False])
@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cuda", "cuda")])
def test_swapped_tensors_swap_their_attributes(
    devices: tuple[str, str], *, is_asked: bool
) -> None:
    """``torch.utils.swap_tensors``, also after their ``__dict__`` has been read."""
    first: Any = nn.Parameter(torch.ones(2, device=devices[0]))
    second: Any = torch.zeros(3, device=devices[1])
    first.mark = "first"
    if is_asked:
        assert {"mark": "first"} == vars(first)

    (torch.utils.swap_tensors if is_asked else _IMPORTED)(first, second)

    assert ({}, {"mark": "first"}) == (vars(first), vars(second))
    assert devices[::-1] == (first.device.type, second.device.type)
    assert (False, True) == tuple(
        isinstance(each, nn.Parameter) for each in (first, second)
    )
    assert ([1.0] * 3, [2.0] * 2) == ((first + 1).tolist(), (second + 1).tolist())


# -- data and gradients of single tensors --------------------------------------------------


def test_shared_data_is_not_a_shared_shape() -> None:
    """After ``p.data = q`` each turns on its own, over the same memory."""
    source = torch.arange(6.0, device="cuda").reshape(2, 3)
    target = torch.zeros(2, 3, device="cuda")

    target.data = source
    source.t_()
    source.unsqueeze_(0)
    source.mul_(2)

    assert ((2, 3), (1, 3, 2)) == (tuple(target.shape), tuple(source.shape))
    assert [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]] == target.tolist()
    assert target.data_ptr() == source.data_ptr()


def test_data_keeps_the_version_of_its_tensor() -> None:
    """``p.data = …`` counts as no change, on either side."""
    tensor = torch.ones(3)
    tensor.add_(1)
    tensor.add_(1)

    versions = []
    for device in ("cuda", "cpu"):
        other = torch.ones(3).to(device)
        other.add_(1)
        tensor.data = other
        tensor.add_(1)
        versions += [tensor._version, other._version]

    assert [3, 1, 4, 1] == versions


@pytest.mark.parametrize(
    ("target", "grad", "text"),
    [
        ("cpu", "cuda", "device type 'cuda' to a tensor with device type 'cpu'"),
        ("cuda", "cpu", "device type 'cpu' to a tensor with device type 'cuda'"),
        ("cuda:0", "cuda:1", "device with index 1 to a tensor located on"),
    ],
)
def test_a_gradient_of_another_device_is_refused(
    target: str, grad: str, text: str
) -> None:
    """``x.grad = …`` takes only what is where the tensor is: torch's own errors."""
    tensor = torch.zeros(3, device=target)

    with pytest.raises(RuntimeError, match=text):
        tensor.grad = torch.zeros(3, device=grad)
    with pytest.raises(TypeError, match="assigned grad expected to be a Tensor"):
        tensor.grad = 0  # type: ignore[assignment]  # what is tried


def test_a_computed_tensor_keeps_its_device() -> None:
    """``y.data =`` of another device, where y has a graph, is refused by name."""
    computed = torch.ones(3, device="cuda", requires_grad=True) * 2

    with pytest.raises(UnsupportedOnSimulatedDeviceError, match=r"tensor\.data ="):
        computed.data = torch.ones(3)


# -- copies -----------------------------------------------------------------------------


def test_a_copied_parameter_has_no_gradient() -> None:
    """``deepcopy`` of a parameter clones its values, as torch's does."""
    parameter = _trained().weight
    parameter.mark = "not copied"  # type: ignore[attr-defined]  # a user's own

    copied = copy.deepcopy(parameter)

    assert copied.grad is None
    assert isinstance(copied, nn.Parameter)
    assert not hasattr(copied, "mark")


def test_copies_share_what_their_originals_share() -> None:
    """A storage is copied once, as a whole, for all its views and itself."""
    whole = torch.arange(MIB, device="cuda", dtype=torch.float32)
    whole.mark = "copied"  # type: ignore[attr-defined]  # a user's own
    whole.grad = torch.ones_like(whole)
    before = _held()

    originals: list[Any] = [whole, whole[8:512], whole.untyped_storage()]
    first, part, storage = copy.deepcopy(originals)

    assert 8 * MIB == _held() - before
    assert first.mark == "copied"
    assert torch.equal(first.grad, whole.grad)
    assert first.data_ptr() == storage.data_ptr() == part.data_ptr() - 32
    assert 4 * MIB == part.untyped_storage().nbytes()
    assert whole.data_ptr() != first.data_ptr()


def test_storages_are_made_and_copied_on_a_card() -> None:
    """``UntypedStorage(…, device="cuda")`` holds bytes there; so does a clone."""
    made = torch.UntypedStorage(MIB, device="cuda")
    copied = made.clone()
    typed = copy.copy(torch.ones(2, device="cuda").untyped_storage())

    assert ["cuda:0", "cuda:0"] == [str(made.device), str(copied.device)]
    assert 2 * MIB + 512 == _held()
    assert typed.is_cuda
    assert made.is_shared()  # as all memory of a card
    assert not torch.UntypedStorage(8).is_shared()


def test_a_lazy_module_is_copied_on_the_host() -> None:
    """What has no shape yet is copied as it is without any card."""
    copied = copy.deepcopy(nn.LazyLinear(3))

    assert (2, 3) == tuple(copied(torch.ones(2, 4)).shape)


def test_devices_and_generators_are_pickled_as_torchs() -> None:
    """What is saved names nothing of this package and loads without it."""
    generator = torch.Generator("cuda").manual_seed(3)
    buffer = io.BytesIO()

    torch.save({"device": torch.device("cuda", 1)}, buffer)
    text = buffer.getvalue()
    loaded = torch.load(io.BytesIO(text), weights_only=True)
    twin = pickle.loads(pickle.dumps(generator))

    assert b"pytest_gpumem" not in text
    assert {"device": torch.device("cuda", 1)} == loaded
    assert (3, "cuda:0") == (twin.initial_seed(), str(twin.device))
    assert torch.randn(3, generator=generator, device="cuda").tolist() == (
        torch.randn(3, generator=twin, device="cuda").tolist()
    )


# -- constructors -----------------------------------------------------------------------


def test_a_tensor_of_tensors_takes_their_type_and_shape() -> None:
    """``torch.tensor([…])`` of a card's tensors: numbers of one element each."""
    half = torch.tensor(1.5, dtype=torch.float16, device="cuda")
    one = torch.ones(1, dtype=torch.float64, device="cuda")

    made = [
        torch.tensor([half, half]),
        torch.tensor([one]),
        torch.tensor([[half, 2], [3, half]], device="cuda"),
        torch.LongTensor([half.long(), half.long()]),
        torch.ones(1).new_tensor([half, half]),
    ]

    assert [
        (torch.float16, (2,)),
        (torch.float64, (1,)),
        (torch.float16, (2, 2)),
        (torch.int64, (2,)),
        (torch.float32, (2,)),
    ] == [(each.dtype, tuple(each.shape)) for each in made]
    assert [[1.5, 2.0], [3.0, 1.5]] == made[2].tolist()
    with pytest.raises(ValueError, match="only one element tensors"):
        torch.tensor([torch.ones(2, device="cuda")])


def test_numbers_on_a_card_are_indices() -> None:
    """Sequences of tensors of one number each index a card's tensor."""
    numbers = torch.tensor([[0, 1], [2, 0]], device="cuda")
    rows, columns = zip(*numbers, strict=True)
    target = torch.zeros(3, 3, device="cuda")

    target[rows, columns] = 1.0

    assert [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]] == target.tolist()


def test_asarray_shares_or_copies_as_asked() -> None:
    """``torch.asarray`` heeds ``copy=``, ``dtype=`` and ``requires_grad=``."""
    card = torch.ones(3, device="cuda")

    assert torch.asarray(card) is card
    assert torch.asarray(card, copy=True).data_ptr() != card.data_ptr()
    assert torch.asarray(card, dtype=torch.float16).dtype is torch.float16
    assert torch.asarray([1.0], device="cuda", requires_grad=True).requires_grad
    assert not torch.asarray(
        torch.ones(3, device="cuda", requires_grad=True) * 2
    ).requires_grad


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: torch.asarray(torch.ones(3), device="cuda", copy=False),
            "can't alias tensor from device 'cpu' to 'cuda:0'",
        ),
        (
            lambda: torch.asarray(
                torch.ones(3, device="cuda"), dtype=torch.float16, copy=False
            ),
            "can't alias tensor with dtype 'Float' into dtype 'Half'",
        ),
        (
            lambda: torch.asarray([1.0], device="cuda", copy=False),
            "can't alias arbitrary sequence",
        ),
    ],
)
def test_asarray_refuses_what_cannot_be_shared(
    make: Callable[[], object], text: str
) -> None:
    """``copy=False`` where a copy is needed is torch's own ValueError."""
    with pytest.raises(ValueError, match=text):
        make()


def test_factories_fill_what_they_are_given() -> None:
    """``device=`` beside ``out=`` has to name the device of ``out``."""
    out = torch.empty(0, device="cuda")

    for make in (
        lambda: torch.zeros(3, out=out, device="cuda"),
        lambda: torch.full((3,), 2.0, out=out, device="cuda:0"),
        lambda: torch.normal(0.0, 1.0, (3,), out=out, device="cuda"),
    ):
        assert make() is out  # type: ignore[no-untyped-call]  # a lambda's
        assert 3 == out.numel()
    with pytest.raises(RuntimeError, match="device type cuda does not match"):
        torch.zeros(3, out=torch.empty(0), device="cuda")


def test_a_warning_points_at_its_cause() -> None:
    """``torch.tensor(tensor)`` warns of the line that calls it, once."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.tensor(torch.ones(3, device="cuda"))
        torch.tensor(torch.ones(3))

    assert [__file__, __file__] == [each.filename for each in seen]


def test_a_number_is_copied_into_a_tensor() -> None:
    """``x.copy_(2.0)`` fills it."""
    assert [2.0] * 3 == torch.zeros(3, device="cuda").copy_(2.0).tolist()  # type: ignore[arg-type]  # torch takes numbers


def test_small_parts_of_the_runtime_answer() -> None:
    """Codes, identifiers and offsets have the types that they have on a card."""
    event: Any = torch.Event(enable_timing=True)
    generator: Any = torch.Generator("cuda")
    generator.set_offset(8)
    timed: Any = torch.cuda.Event(True)
    properties: Any = torch.cuda.get_device_properties(1)

    assert (0, "<torch.cuda.Event uninitialized>") == (event.event_id, repr(event))
    with torch.cuda.device(1):
        event.record()
    assert f"<torch.cuda.Event {event.event_id:#x}>" == repr(event)
    assert ("cuda:1", True) == (str(event.device), event.enable_timing)
    assert timed.enable_timing
    assert 16 == len(properties.uuid.bytes)
    assert torch.cuda.get_device_properties("cuda:1") is properties
    with pytest.raises(AttributeError, match="simulated card has no 'clock_rate'"):
        _ = properties.clock_rate
    assert 8 == generator.get_offset()
    with pytest.raises(torch.cuda.CudaError, match="out of memory"):
        torch.cuda.check_error(2)
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match="graphsafe_get_state"):
        generator.graphsafe_get_state()
    from torch.cuda import _sanitizer  # torch imports it only where it is asked for

    with pytest.raises(UnsupportedOnSimulatedDeviceError, match="cuda_sanitizer"):
        _sanitizer.enable_cuda_sanitizer()
    stream: Any = torch.cuda.Stream()
    assert stream.cuda_stream == stream._as_parameter_.value
    timed.record()
    assert timed.cuda_event == timed._as_parameter_.value


def test_a_recurrent_layer_without_biases_runs() -> None:
    """The biases that C++ makes for it are no mistake of the user's."""
    host = nn.LSTM(4, 3, bias=False)
    card = copy.deepcopy(host).cuda()
    source = torch.ones(2, 1, 4)

    torch.testing.assert_close(card(source.cuda())[0].cpu(), host(source)[0])


@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize("call", [torch.sgn, torch.round])
def test_a_hook_gets_a_gradient_that_is_where_its_tensor_is(
    call: Any, *, is_leaf: bool
) -> None:
    """C++ makes some zeros on the host."""
    source = torch.ones(3, device="cuda", requires_grad=True)
    hooked = source if is_leaf else source * 1
    seen: list[torch.Tensor] = []
    hooked.register_hook(seen.append)
    call(hooked).sum().backward()

    assert ("cuda:0", [0.0] * 3) == (str(seen[0].device), seen[0].tolist())


def test_a_hook_sees_the_host_once_its_parameter_is_there() -> None:
    """And a card's gradient again when it has gone back."""
    parameter = nn.Parameter(torch.ones(3, device="cuda"))
    seen: list[str] = []
    handle = parameter.register_hook(lambda grad: seen.append(grad.device.type))
    for device in ("cuda", "cpu", "cuda"):
        parameter.grad = None
        parameter.data = parameter.data.to(device)
        parameter.sgn().sum().backward()
    handle.remove()
    parameter.grad = None
    parameter.sgn().sum().backward()

    assert ["cuda", "cpu", "cuda"] == seen


def test_a_single_number_of_the_host_keeps_its_gradient_there() -> None:
    """A scale on the host, times a card's tensor: torch moves such a gradient."""
    scale = nn.Parameter(torch.tensor(2.0))
    card = torch.ones(3, device="cuda")

    (alone,) = torch.autograd.grad((card * scale).sum(), scale)
    for _ in range(2):
        (card * scale).sum().backward()
    torch.optim.SGD([scale], lr=0.5).step()

    grad: Any = scale.grad
    assert ("cpu", 6.0) == (grad.device.type, grad.item())
    assert ("cpu", 3.0) == (alone.device.type, alone.item())
    assert -1.0 == scale.item()


def test_data_of_another_device_is_set_in_inference_mode() -> None:
    """As libraries do that load layers from the disk while a model runs."""
    parameter = nn.Parameter(torch.ones(3))
    layer = nn.Linear(3, 3)
    with torch.inference_mode():
        for _ in range(2):
            parameter.data = torch.full((3,), 2.0, device="cuda")
            layer.cuda()
            assert [2.0] * 3 == parameter.tolist()
            assert layer(parameter).is_cuda
            parameter.data = torch.zeros(3)
            layer.cpu()
            assert not parameter.is_cuda
    layer.cuda()
    layer(torch.ones(1, 3, device="cuda")).sum().backward()

    assert layer.weight.grad is not None
    assert layer.weight.grad.is_cuda
    assert parameter.requires_grad


def test_a_gradient_in_a_bucket_keeps_the_bucket_when_it_moves() -> None:
    """PyTorch's CUDA code has the same bytes: a view keeps what it is a view of."""
    with simulated_device("T4"):
        layer = torch.nn.Linear(10, 10).cuda()
        bucket = torch.zeros(110, device="cuda")
        layer.weight.grad = bucket[:100].view(10, 10)
        layer.bias.grad = bucket[100:]

        layer.cpu()
        del bucket
        held = torch.cuda.memory_allocated()
        layer.zero_grad()

        assert [512, 0] == [held, torch.cuda.memory_allocated()]
