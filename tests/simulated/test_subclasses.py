"""Users' subclasses of ``torch.Tensor`` on a card stay what they are."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.utils._pytree import tree_map_only

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20
#: As a class keeps it that is defined before there are cards.
KEPT = {
    torch.Tensor.clone,
    torch.Tensor.to,
    torch.Tensor.cuda,
    torch.Tensor.cpu,
    torch.Tensor.detach,
    torch.Tensor.requires_grad_,
}


class Boxes(torch.Tensor):
    """Stays itself through a few functions alone, as torchvision's ``tv_tensors``."""

    layout_of_boxes: str

    @classmethod
    def make(cls, data: Any, kind: str) -> Boxes:
        """Return boxes of a kind."""
        made: Boxes = data.as_subclass(cls)
        made.layout_of_boxes = kind
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Wrap again what is kept."""
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        if func in KEPT and isinstance(args[0], cls):
            return cls.make(out, args[0].layout_of_boxes)
        return out.as_subclass(torch.Tensor) if isinstance(out, cls) else out


class Meta(torch.Tensor):
    """Puts another's ``__dict__`` in the place of its own, as MONAI's ``MetaTensor``."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Let results have what the first operand has."""
        out = super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]  # torch's
        if isinstance(out, cls) and args and isinstance(args[0], cls):
            out.__dict__ = dict(args[0].__dict__)
        return out


class Plain(torch.Tensor):
    """Says nothing of itself."""


class Slotted(torch.Tensor):
    """Has another layout in memory than a tensor."""

    __slots__ = ("mark",)


class Marked(nn.Parameter):
    """A parameter with a mark."""


class Wrapper(torch.Tensor):
    """A tensor around another, which runs its operators itself."""

    @staticmethod
    def __new__(cls: Any, inner: torch.Tensor) -> Any:
        """Make a wrapper that says of itself what the inner tensor is."""
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            dtype=inner.dtype,
            device=inner.device,
        )
        made.inside = inner
        return made

    def __tensor_flatten__(self) -> Any:
        """Name what is inside."""
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, *_rest: Any) -> Any:
        """Make one again."""
        return Wrapper(inner["inside"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run operators on what is inside."""
        args, kwargs = tree_map_only(
            cls, lambda each: each.inside, (args, kwargs or {})
        )
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


class Reading(torch.Tensor):
    """Has memory of its own and counts its operators."""

    count = 0

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch calls it on the class
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Count, and do what a plain tensor does."""
        Reading.count += 1
        return super().__torch_dispatch__(func, types, args, kwargs or {})


class Wrap(torch.autograd.Function):
    """A function that a wrapper leaves."""

    @staticmethod
    def forward(_ctx: Any, source: torch.Tensor) -> Any:
        """Wrap a tensor."""
        return Wrapper(source)

    @staticmethod
    def backward(_ctx: Any, grad: Any) -> Any:
        """Hand the gradient on."""
        return grad


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4*2"):
        yield


def _held() -> int:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


# -- classes without __torch_dispatch__ ---------------------------------------------------


def test_boxes_stay_boxes() -> None:
    """Kept functions keep class and attributes, others do not, as on the host."""
    host = Boxes.make(torch.arange(6.0).reshape(2, 3), "xyxy")

    card: Any = host.to("cuda")
    moved: Any = card.clone().cuda(1).cpu()

    assert (type(card), card.layout_of_boxes) == (Boxes, "xyxy")
    assert (type(moved), moved.layout_of_boxes) == (Boxes, "xyxy")
    assert ("cuda:0", True, "cpu") == (
        str(card.device),
        card.is_cuda,
        str(moved.device),
    )
    assert not isinstance(card + 1, Boxes)
    assert "cuda:0" == str((card + 1).device)
    assert torch.equal(moved, host)
    assert {"layout_of_boxes": "xyxy"} == vars(card)
    assert 512 == _held()


def test_a_dictionary_is_the_users_own() -> None:
    """A class that copies it to its results neither takes values nor keeps bytes."""
    card = torch.arange(4.0).as_subclass(Meta).cuda()
    card.affine = "kept"  # type: ignore[attr-defined]  # a user's own

    doubled = card * 2
    part = doubled[1:3]
    del card, doubled

    assert (type(part), {"affine": "kept"}) == (Meta, vars(part))
    assert [2.0, 4.0] == part.tolist()
    assert 512 == _held()
    part.__dict__ = {}
    assert [4.0, 8.0] == (part * 2).tolist()
    del part
    assert 0 == _held()


def test_names_of_attributes_are_the_users_own() -> None:
    """Common names on a tensor, a class or a plain tensor of a card change nothing."""

    class Named(torch.Tensor):
        """Has names that a wrapper would choose."""

        _value = "of the class"
        _card = "of the class"

    of_class: Any = torch.ones(2).as_subclass(Named).cuda()
    plain: Any = torch.ones(2, device="cuda")
    for tensor in (of_class, plain):
        tensor._value, tensor._device, tensor._memory = "own", "own", "own"

    moved = of_class.to("cuda:1")

    assert [2.0, 2.0] == (of_class * 2).tolist()
    assert [2.0, 2.0] == (plain + of_class).tolist()
    assert ("of the class", "cuda:1") == (moved._card, str(moved.device))
    assert ("own", "of the class") == (of_class._value, of_class._card)
    assert not hasattr(plain, "_card")


@pytest.mark.parametrize("kind", [Plain, Slotted, Meta])
def test_a_tensor_made_on_the_card_becomes_one_of_a_class(kind: Any) -> None:
    """``as_subclass`` shares the memory; in-place changes of shape are seen."""
    source = torch.arange(6.0, device="cuda").reshape(2, 3)
    card = source.as_subclass(kind)

    card.mul_(2)
    card.t_()
    back = card.as_subclass(torch.Tensor)

    assert (kind, (3, 2), "cuda:0") == (type(card), tuple(card.shape), str(card.device))
    assert not isinstance(back, kind)
    assert [[0.0, 6.0], [2.0, 8.0], [4.0, 10.0]] == back.tolist()
    assert "[ 4., 10.]], device='cuda:0')" in repr(card)
    assert [[0.0, 2.0, 4.0], [6.0, 8.0, 10.0]] == source.tolist()
    assert type(torch.cat([card, card])) is kind
    assert type(source + card.t()) is kind
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor"):
        card.numpy()
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same"):
        card + torch.ones(3, 2)


def test_gradients_of_a_users_class() -> None:
    """A leaf of a class has a plain gradient, on its card; so has its host's origin."""
    host = torch.ones(3).as_subclass(Plain).requires_grad_()

    (host.cuda() * 2).sum().backward()
    card = torch.ones(3, device="cuda").as_subclass(Plain).requires_grad_()
    (card * 3).sum().backward()

    assert ("cpu", [2.0] * 3) == (str(host.grad.device), host.grad.tolist())  # type: ignore[union-attr]  # it is there
    assert ("cuda:0", [3.0] * 3) == (str(card.grad.device), card.grad.tolist())  # type: ignore[union-attr]  # it is there


@pytest.mark.parametrize("copies", [pickle.dumps, torch.save])
def test_a_class_is_saved_with_its_tensor(copies: Any) -> None:
    """Pickled and saved, it is of its class and on its card when it comes back."""
    card = torch.ones(3).as_subclass(Plain).cuda()
    card.mark = "kept"  # type: ignore[attr-defined]  # a user's own

    if copies is torch.save:
        buffer = io.BytesIO()
        torch.save(card, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    else:
        loaded = pickle.loads(pickle.dumps(card))

    assert (Plain, "cuda:0") == (type(loaded), str(loaded.device))
    assert {"mark": "kept"} == vars(loaded)
    assert [1.0] * 3 == loaded.tolist()


def test_a_class_says_what_its_copies_are() -> None:
    """``deepcopy`` follows torch's rules: a class whose ``new_empty`` is plain raises."""
    card = torch.ones(3).as_subclass(Plain).cuda()

    with pytest.raises(RuntimeError, match="default implementation of __deepcopy__"):
        copy.deepcopy(card)


def test_a_class_that_refuses_other_functions_is_made_over_a_parameter() -> None:
    """Torch's per-sample gradients take weights whose class knows few operators."""
    torch.manual_seed(0)
    source, module = torch.randn(5, 4), nn.Linear(4, 3)
    for device in ("cpu", "cuda"):
        placed = copy.deepcopy(module).to(device)
        call = call_for_per_sample_grads(placed, batch_size=5)
        call(source.to(device)).square().sum().backward()
        found = [each.grad_sample for each in placed.parameters()]  # type: ignore[attr-defined]
        if device == "cpu":
            wanted = found

    assert all(each.is_cuda for each in found)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other)


def test_a_parameters_class_stays_on_a_card() -> None:
    """A subclass of Parameter, moved with its module, made and copied on a card."""
    module = nn.Linear(2, 2, bias=False)
    module.weight = Marked(torch.ones(2, 2))
    module.weight.mark = "kept"  # type: ignore[attr-defined]  # a user's own
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)

    for device in ("cuda", "cpu", "cuda:1"):
        module.to(device)(torch.ones(1, 2, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert type(module.weight) is Marked
        assert device in str(module.weight.device)
        assert {"mark": "kept"} == vars(module.weight)
    copied = copy.deepcopy(module)
    made = Marked(torch.ones(2, device="cuda"))

    assert [[-2.0] * 2] * 2 == module.weight.tolist()
    assert (Marked, "cuda:1") == (type(copied.weight), str(copied.weight.device))
    assert (Marked, "cuda:0") == (type(made), str(made.device))
    assert made.requires_grad
    assert isinstance(made, nn.Parameter)


@pytest.mark.parametrize(
    "make", [Marked, lambda data: torch.Tensor._make_subclass(Plain, data)]
)
def test_what_is_made_over_a_tensor_keeps_no_more_of_it_than_its_memory(
    make: Any,
) -> None:
    """It is no view of that tensor, which would stay when it gets other data."""
    made = make(torch.ones(MIB, device="cuda"))
    before = _held()
    made.data = made.data.half()

    assert not made._is_view()
    assert (4 * MIB, 2 * MIB) == (before, _held())


# -- classes with __torch_dispatch__ ------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_wrapper_leaves_a_function_of_autograd(requires_grad: bool) -> None:  # noqa: FBT001  # a parameter
    """C++ looks at its device, and must not ask CUDA: that ends the process."""
    source = torch.ones(3, 4, device="cuda", requires_grad=requires_grad)

    wrapped: Any = Wrap.apply(source)  # type: ignore[no-untyped-call]  # torch's
    total = (wrapped * 2).sum()

    assert (Wrapper, "cuda:0") == (type(total), str(total.device))
    if requires_grad:
        total.backward()
        grad: Any = source.grad
        assert [[2.0] * 4] * 3 == grad.inside.tolist()
        assert "cuda:0" == str(grad.device)


def test_a_wrapper_moves_with_what_is_inside() -> None:
    """To a card and back, alone and as a parameter that gets a gradient."""
    wrapper = Wrapper(torch.ones(3, 3))
    module = nn.Linear(3, 3)
    module.weight = nn.Parameter(wrapper)

    moved: Any = wrapper.to("cuda:1")
    module.cuda()
    weight: Any = module.weight
    module(torch.ones(2, 3, device="cuda")).sum().backward()
    here = (type(weight), str(weight.device), str(weight.inside.device))
    grad = str(weight.grad.device)
    module.cpu()
    weight = module.weight

    assert ("cuda:1", "cuda:1") == (str(moved.device), str(moved.inside.device))
    assert (moved.is_cuda, moved.is_cpu, moved.get_device()) == (True, False, 1)
    assert (Wrapper, "cuda:0", "cuda:0") == here
    assert "cuda:0" == grad
    assert ("cpu", "cpu") == (str(weight.device), str(weight.inside.device))
    assert isinstance(weight, nn.Parameter)
    del module, weight
    assert 0 == _held()


def test_a_wrapper_carries_gradients_over_the_border() -> None:
    """The gradient of a wrapper that moves comes back to where it came from."""
    wrapper: Any = Wrapper(torch.ones(3)).requires_grad_()

    (wrapper.cuda() * 2).sum().backward()

    assert ("cpu", [2.0] * 3) == (
        str(wrapper.grad.device),
        wrapper.grad.inside.tolist(),
    )


def test_a_class_with_memory_runs_its_operators() -> None:
    """Made over a card's tensor it is asked for each; ``super()`` knows the card."""
    source = torch.ones(3, device="cuda")
    card = torch.Tensor._make_subclass(Reading, source)
    Reading.count = 0

    total = (card + 1).sum()
    card.add_(1)

    assert (Reading, "cuda:0") == (type(card), str(card.device))
    assert (2, 6.0) == (Reading.count, total.item())
    assert [2.0] * 3 == source.tolist()


def test_fake_tensors_of_a_card_take_no_part_in_autograd() -> None:
    """C++ would ask for a CUDA device guard and end the process."""
    with FakeTensorMode():
        fake = torch.empty(3, device="cuda")
        assert "cuda:0" == str((fake * 2).device)
        with pytest.raises(UnsupportedOnSimulatedDeviceError):
            torch.empty(3, device="cuda", requires_grad=True)
        with pytest.raises(UnsupportedOnSimulatedDeviceError):
            fake.requires_grad_()
        with pytest.raises(UnsupportedOnSimulatedDeviceError):
            fake.requires_grad = True
        with pytest.raises(UnsupportedOnSimulatedDeviceError):
            nn.Linear(2, 2, device="cuda")


@pytest.mark.parametrize(
    "index",
    [
        "0",
        "-1, ..., None",
        "1:, 2",
        "::2",
        "()",
        "True",
        "False",
        "rows",
        ":, rows",
        "rows, None",
        "rows.view(2, 1), rows",
        "1:3, rows",
        "[0, 1]",
        "np.array([0, 1])",
        "np.int64(1)",
        "host",
        "mask",
        "number",
        "9",
        "0, 0, 0",
        "'a'",
    ],
)
def test_a_fake_tensor_is_indexed(index: str) -> None:
    """As a fake tensor of the host: the same shape, strides and class, or error."""
    seen = []
    for device in ("cpu", "cuda"):
        with FakeTensorMode():
            names = {
                "np": np,
                "x": torch.empty(4, 5, device=device),
                "rows": torch.empty(2, dtype=torch.int64, device=device),
                "mask": torch.empty(4, 5, dtype=torch.bool, device=device),
                "number": torch.empty((), dtype=torch.int64, device=device),
                "host": torch.empty(2, dtype=torch.int64),
            }
            found: list[Any] = []
            try:
                part = eval(f"x[{index}]", names)  # noqa: S307  # the test's own text
                assert part.device.type == device
                found.append((part.shape, part.stride(), type(part)))
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                found.append(type(error))
            try:
                exec(f"x[{index}] = 1.5", names)  # noqa: S102  # the test's own text
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                found.append(type(error))
            seen.append(found)

    assert seen[1] == seen[0]


def test_a_fake_tensor_gets_a_tensor_at_an_index() -> None:
    """The value may be a fake tensor of the same card."""
    with FakeTensorMode():
        target = torch.empty(4, 5, device="cuda")
        rows = torch.empty(2, dtype=torch.int64, device="cuda")
        target[rows] = torch.empty(5, device="cuda")
        target[:, rows] = torch.empty(4, 2, device="cuda")
        target[1:] = torch.empty(3, 5, device="cuda")

        assert target.device == torch.device("cuda:0")
