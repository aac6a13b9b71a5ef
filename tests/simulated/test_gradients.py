"""Where gradients must be: what a hook, a Function or a caller gives is held to its place.

The errors are those of a card; a gradient of one number is moved, as there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from versions import TORCH

from pytest_gpumem import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    with simulated_device("T4*2"):
        yield


def _leaf(device: str = "cuda", *shape: int) -> torch.Tensor:
    return torch.ones(shape or (3,), device=device, requires_grad=True)


def _of_tensor(result: torch.Tensor, hook: Any) -> None:
    result.register_hook(hook)


def _of_node(result: torch.Tensor, hook: Any) -> None:
    node: Any = result.grad_fn
    node.register_hook(lambda grads, _outer: (hook(grads[0]), *grads[1:]))


def _before_node(result: torch.Tensor, hook: Any) -> None:
    node: Any = result.grad_fn
    node.register_prehook(lambda grads: (hook(grads[0]),))


def _before_sum(result: torch.Tensor, hook: Any) -> None:
    node: Any = result.grad_fn
    node.next_functions[0][0].register_prehook(lambda grads: (hook(grads[0]),))


@pytest.mark.parametrize("register", [_of_tensor, _of_node, _before_node, _before_sum])
@pytest.mark.parametrize(
    ("device", "other", "text"),
    [
        ("cuda", "cpu", "(was torch.cuda.FloatTensor got torch.FloatTensor)"),
        ("cpu", "cuda", "(was torch.FloatTensor got torch.cuda.FloatTensor)"),
        ("cuda", "meta", "(was torch.cuda.FloatTensor got MetaFloatType)"),
    ],
)
def test_a_hook_returns_a_gradient_of_its_device(
    register: Callable[[torch.Tensor, Any], None], device: str, other: str, text: str
) -> None:
    """Hooks of tensors and of nodes: torch's error, once the hook has run."""
    source = _leaf(device)
    result = source * 2
    register(result, lambda grad: torch.zeros_like(grad, device=other))

    with pytest.raises(RuntimeError, match=re.escape(f"type of value {text}")):
        result.sum().backward()
    assert source.grad is None


@pytest.mark.parametrize("register", [_of_tensor, _of_node, _before_node, _before_sum])
def test_what_a_hook_returns_in_its_place_is_taken(
    register: Callable[[torch.Tensor, Any], None],
) -> None:
    """On the card and on the host alike; its name stays the hook's."""
    for device in ("cuda", "cpu"):
        source = _leaf(device)
        result = source * 2
        register(result, torch.zeros_like)
        result.sum().backward()

        assert source.grad is not None
        assert (device, [0.0] * 3) == (source.grad.device.type, source.grad.tolist())


def test_a_nodes_hook_sees_what_is_made_inside_on_the_card() -> None:
    """C++ makes the zeros that a rounding passes on; a card makes them itself."""
    source = _leaf()
    result = (source * 1).round()
    seen: list[str] = []
    node: Any = result.grad_fn
    node.register_hook(lambda grads, _outer: seen.append(str(grads[0].device)))
    result.sum().backward()

    assert ["cuda:0"] == seen


class _Given(torch.autograd.Function):
    """Returns the gradient that a test has given it."""

    given: Any = None

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, _scale: float) -> torch.Tensor:  # noqa: ARG004  # torch's signature
        return source * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # noqa: ARG004  # torch's signature
        return _Given.given(grad), None


@pytest.mark.parametrize("is_leaf", [True, False])
@pytest.mark.parametrize(
    ("device", "other"),
    [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:0", "cuda:1"), ("cuda:0", "meta")],
)
def test_a_function_returns_gradients_of_its_inputs_devices(
    device: str, other: str, *, is_leaf: bool
) -> None:
    """``Function.backward``: torch's error names the function and the devices."""
    source = _leaf(device)
    _Given.given = lambda _grad: torch.zeros(3, device=other)
    result = _Given.apply(source if is_leaf else source * 1, 1.0)  # type: ignore[no-untyped-call]  # torch's

    with pytest.raises(
        RuntimeError,
        match="Function _GivenBackward returned an invalid gradient at index 0 - "
        f"expected device {device} but got {other}",
    ):
        result.sum().backward()


def test_a_functions_wrong_shape_is_said_first() -> None:
    """As C++ looks at the shape before the device."""
    _Given.given = lambda _grad: torch.zeros(2)
    result = _Given.apply(_leaf(), 1.0)  # type: ignore[no-untyped-call]  # torch's

    with pytest.raises(RuntimeError, match=r"got \[2\] but expected shape"):
        result.sum().backward()


def test_a_single_number_goes_where_it_belongs() -> None:
    """From a Function, and to ``backward``: torch copies it to the card."""
    source = torch.tensor(1.0, device="cuda", requires_grad=True)
    seen: list[str] = []
    inner = source * 1
    inner.register_hook(lambda grad: seen.append(str(grad.device)))
    _Given.given = lambda _grad: torch.tensor(5.0)
    _Given.apply(inner, 1.0).backward(torch.tensor(1.0))  # type: ignore[no-untyped-call]  # torch's

    assert source.grad is not None
    assert ("cuda:0", 5.0) == (str(source.grad.device), source.grad.item())
    assert ["cuda:0"] == seen


def test_a_function_gets_gradients_where_its_results_are() -> None:
    """C++ makes zeros for a result that nobody used."""
    seen: list[str] = []

    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, source: torch.Tensor) -> Any:  # noqa: ARG004  # torch's signature
            return source * 2, source * 3

        @staticmethod
        def backward(ctx: Any, _used: Any, unused: torch.Tensor) -> Any:  # noqa: ARG004  # torch's signature
            seen.append(str(unused.device))
            return unused

    source = _leaf()
    Two.apply(source)[0].sum().backward()  # type: ignore[no-untyped-call]  # torch's

    assert source.grad is not None
    assert (["cuda:0"], [0.0] * 3) == (seen, source.grad.tolist())


@pytest.mark.parametrize(
    ("device", "other"), [("cuda:0", "cpu"), ("cpu", "cuda:0"), ("cuda:1", "cuda:0")]
)
def test_a_given_gradient_is_where_its_output_is(device: str, other: str) -> None:
    """``backward`` and ``torch.autograd.grad``: torch's error."""
    source = _leaf(device)
    text = f"invalid gradient at index 0 - expected device {device} but got {other}"

    with pytest.raises(RuntimeError, match=text):
        (source * 2).backward(torch.ones(3, device=other))
    with pytest.raises(RuntimeError, match=text):
        torch.autograd.grad(source * 2, source, torch.ones(3, device=other))
    if device != "cpu":
        pull: Any = torch.func.vjp(lambda value: value * 2, source.detach())[1]
        with pytest.raises(RuntimeError, match=text):
            pull(torch.ones(3, device=other))
        assert [2.0] * 3 == pull(torch.ones(3, device=device))[0].tolist()


def test_inputs_of_grad_may_be_read_once() -> None:
    """A generator, such as ``model.parameters()``; a single edge; or names."""
    layer = torch.nn.Linear(3, 2).cuda()
    total = layer(torch.ones(1, 3, device="cuda")).sum()
    edge = torch.autograd.graph.get_gradient_edge(layer.bias)

    each: Any = layer.parameters()
    grads = torch.autograd.grad(total, each, retain_graph=True)
    (by_edge,) = torch.autograd.grad(total, edge, retain_graph=True)

    assert [(2, 3), (2,)] == [tuple(each.shape) for each in grads]
    assert torch.equal(grads[1], by_edge)
    assert by_edge.is_cuda
    if TORCH >= (2, 13):
        named: Any = dict(layer.named_parameters())
        by_name: Any = torch.autograd.grad(total, named)
        assert torch.equal(by_name["weight"], grads[0])


def test_a_function_may_lead_to_another_device() -> None:
    """Its gradient comes back to where its input is."""

    class Up(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, source: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  # torch's signature
            return source.cuda()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ARG004  # torch's signature
            return grad.cpu()

    source = _leaf("cpu")
    Up.apply(source).sum().backward()  # type: ignore[no-untyped-call]  # torch's

    assert source.grad is not None
    assert ("cpu", [1.0] * 3) == (source.grad.device.type, source.grad.tolist())


def test_a_users_code_in_backward_is_held_to_devices() -> None:
    """A Function's and a hook's: as anywhere, and no helper of autograd's."""
    _Given.given = lambda grad: grad * torch.ones(3)
    result = _Given.apply(_leaf(), 1.0)  # type: ignore[no-untyped-call]  # torch's
    hooked = _leaf() * 2
    hooked.register_hook(lambda grad: grad + torch.ones(3))

    for each in (result, hooked):
        with pytest.raises(
            RuntimeError, match="Expected all tensors to be on the same"
        ):
            each.sum().backward()


def test_what_is_computed_again_goes_where_it_went() -> None:
    """A checkpointed function names the host, in forward and in backward alike."""
    places: list[str] = []

    def compute(source: torch.Tensor) -> torch.Tensor:
        scale = torch.ones_like(source, device="cpu")
        places.append(scale.device.type)
        return source.sin() * scale.cuda()

    for use_reentrant in (True, False):
        source = _leaf()
        checkpoint(compute, source, use_reentrant=use_reentrant).sum().backward()

        assert source.grad is not None
        torch.testing.assert_close(source.grad.cpu(), torch.ones(3).cos())
    assert ["cpu"] * 4 == places


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(source)
        return source * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.saved_tensors[0] * grad


def _copied(source: torch.Tensor, goal: str) -> torch.Tensor:
    return torch.zeros(3, device=goal, dtype=source.dtype).copy_(source)


def _written(source: torch.Tensor, goal: str) -> torch.Tensor:
    whole = torch.zeros(4, device=goal, dtype=source.dtype)
    whole[:3] = source.to(goal)
    return whole


@pytest.mark.parametrize("function", [lambda v: v * v, _Doubled.apply])
@pytest.mark.parametrize("move", [torch.Tensor.to, _copied, _written])
@pytest.mark.parametrize("goal", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("origin", "dtype", "kind"),
    [
        ("cuda", torch.float32, "torch.cuda.FloatTensor"),
        ("cuda", torch.float64, "torch.cuda.DoubleTensor"),
        ("cpu", torch.float32, "torch.FloatTensor"),
    ],
)
def test_a_modified_tensor_is_named_with_its_type(  # noqa: PLR0917  # a table
    origin: str, dtype: torch.dtype, kind: str, goal: str, move: Any, function: Any
) -> None:
    """The device is that of the saved tensor, not that of the result."""
    leaf = torch.ones(3, device=origin, dtype=dtype, requires_grad=True)
    saved = leaf.exp()
    result = move(function(saved), goal).sum()
    saved.add_(1)

    with pytest.raises(RuntimeError, match=re.escape(f"operation: [{kind} [3]]")):
        result.backward()


def test_a_modified_tensor_is_named_in_a_transform() -> None:
    """``torch.func`` shows results as wrappers."""

    def modified(source: torch.Tensor) -> torch.Tensor:
        saved = source.exp()
        result = saved * saved
        saved.add_(1)
        return result.sum()

    with pytest.raises(RuntimeError, match=r"\[torch\.cuda\.FloatTensor \[3\]\]"):
        torch.func.grad(modified)(torch.ones(3, device="cuda"))
