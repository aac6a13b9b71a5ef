"""Transforms of ``torch.func`` and of autograd see where tensors go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from versions import TORCH, since

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAYS = [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")]

pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit",  # torch's own
    "ignore:Attempted to insert a get_attr",  # torch's own
)


@pytest.fixture(autouse=True)
def _cards() -> Iterator[None]:
    with simulated_device("T4*2"):
        yield


def _source(device: str) -> torch.Tensor:
    return torch.tensor([[1.0, 2.0], [3.0, 4.0]]).to(device)


#: Each takes a function that moves, and the tensor; returns what is where the tensor
#: is, and what is where it goes.
TRANSFORMS: dict[str, Callable[[Any, torch.Tensor], tuple[list[Any], list[Any]]]] = {
    "vmap": lambda f, x: ([], [vmap(f)(x), vmap(vmap(f))(x), vmap(f, chunk_size=1)(x)]),
    "grad": lambda f, x: ([grad(lambda v: f(v).sum())(x)], []),
    "grad of grad": lambda f, x: (
        [grad(lambda v: grad(lambda w: f(w).sum())(v).sum())(x)],
        [],
    ),
    "per sample": lambda f, x: ([vmap(grad(lambda v: f(v).sum()))(x)], []),
    "jvp": lambda f, x: ([], [*jvp(f, (x,), (x,))]),
    "vjp": lambda f, x: ([vjp(f, x)[1](f(x))[0]], []),
    "jacrev": lambda f, x: ([jacrev(lambda v: f(v).sum(0))(x)], []),
    "jacfwd": lambda f, x: ([], [jacfwd(f)(x)]),
    "hessian": lambda f, x: ([hessian(lambda v: f(v).sum())(x)], []),
    "functionalize": lambda f, x: ([], [functionalize(f)(x)]),
    "make_fx": lambda f, x: ([], [make_fx(f)(x)(x + 1)]),
    "jacobian": lambda f, x: (
        [torch.autograd.functional.jacobian(f, x, vectorize=True)],
        [],
    ),
    "forward jacobian": lambda f, x: (
        [],
        [
            torch.autograd.functional.jacobian(
                f, x, vectorize=True, strategy="forward-mode"
            )
        ],
    ),
    "functional hessian": lambda f, x: (
        [torch.autograd.functional.hessian(lambda v: f(v).sum(), x, vectorize=True)],
        [],
    ),
}


@pytest.mark.parametrize(("origin", "goal"), WAYS)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_sees_a_transfer(name: str, origin: str, goal: str) -> None:
    """Values are those without a move; results are where the function puts them."""
    transform = TRANSFORMS[name]
    expected = transform(lambda v: v**3, _source("cpu"))

    results = transform(
        lambda v: (v.to(goal) + v.to(goal, torch.float32)) * v.to(goal) ** 2 / 2,
        _source(origin),
    )

    for place, there, known in zip((origin, goal), results, expected, strict=True):
        for one, other in zip(there, known, strict=True):
            assert place == str(one.device).replace("cpu:0", "cpu")
            torch.testing.assert_close(one.cpu(), other)


@pytest.mark.parametrize(("origin", "goal"), WAYS)
def test_a_tangent_goes_along(origin: str, goal: str) -> None:
    """Forward AD through ``.to``, to another type as well."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(_source(origin), _source(origin) * 10)
        moved = forward_ad.unpack_dual(dual.to(goal, torch.float64))

    assert goal == str(moved.tangent.device)
    assert torch.float64 is moved.tangent.dtype
    assert [[10.0, 20.0], [30.0, 40.0]] == moved.tangent.tolist()


def test_inside_a_transform_a_tensor_says_where_it_is() -> None:
    """A function that looks at its argument's device sees the card."""
    seen: list[Any] = []

    def looking(row: torch.Tensor) -> torch.Tensor:
        seen.append((str(row.device), row.is_cuda, row.cpu().is_cuda, row.get_device()))
        return row + torch.ones(2, device=row.device) + row.new_zeros(2)

    result = grad(lambda v: vmap(looking)(v).sum())(_source("cuda:1"))

    assert [("cuda:1", True, False, 1)] == seen
    assert "cuda:1" == str(result.device)


def test_indices_of_a_card_and_made_inside() -> None:
    """Indexing by a card's tensor, made by the function or not."""
    indices = torch.tensor([1, 0], device="cuda")

    def choosing(values: torch.Tensor) -> torch.Tensor:
        chosen = values[indices] + values[torch.tensor([0, 1], device="cuda")]
        return (chosen * torch.tensor([1.0, 2.0], device="cuda")).sum()

    assert [[2.0, 4.0], [2.0, 4.0]] == grad(choosing)(_source("cuda")).tolist()


@since(2, 11, "a batch of indices cannot choose, on the host either")
def test_a_batch_of_indices_chooses() -> None:
    """Each row by an index of its own."""
    indices = torch.tensor([1, 0], device="cuda")

    rows = vmap(lambda v, i: v[i])(_source("cuda"), indices)
    assert ("cuda:0", [2.0, 3.0]) == (str(rows.device), rows.tolist())


def test_batches_of_gradients_come_back() -> None:
    """``is_grads_batched``: each is where its input is."""
    host = torch.ones(2, requires_grad=True)
    card = torch.ones(2, device="cuda", requires_grad=True)
    eye = torch.eye(2)

    (first,) = torch.autograd.grad(
        host.cuda() * 2, host, eye.cuda(), is_grads_batched=True
    )
    (second,) = torch.autograd.grad(card.cpu() * 2, card, eye, is_grads_batched=True)

    assert ("cpu", "cuda:0") == (str(first.device), str(second.device))
    assert (2 * eye).tolist() == first.tolist() == second.tolist()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1],
        lambda x: x[:, 1:],
        lambda x: x.diagonal(1),
        torch.trace,
    ],
    ids=["select", "slice", "diagonal", "trace"],
)
def test_batches_of_gradients_of_views_stay_there(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """C++'s rules for such batches make zeros on the device that they see."""

    def product(factor: torch.Tensor) -> torch.Tensor:
        return view(factor * 3)

    card = torch.arange(6.0, dtype=torch.double, device="cuda").reshape(2, 3)
    card.requires_grad_()
    assert torch.autograd.gradcheck(product, card, check_batched_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    shape = view(card).shape
    (grads,) = torch.autograd.grad(
        product(card),
        card,
        torch.ones(2000, *shape, dtype=torch.double, device="cuda"),
        is_grads_batched=True,
    )
    # The gradient of the view, and that of the factor.
    assert torch.cuda.max_memory_allocated() - before >= 2 * grads.nbytes
    assert "cuda:0" == str(grads.device)


def test_a_move_is_differentiable_twice() -> None:
    """``create_graph`` through the border; torch's own check of gradients agrees."""
    host = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad((host.cuda() ** 3).sum(), host, create_graph=True)
    first.sum().backward()

    assert [6.0, 6.0] == host.grad.tolist()  # type: ignore[union-attr]  # it is there
    card = torch.ones(2, dtype=torch.double, device="cuda", requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v: (v.cpu() * 2).cuda() * v,
        card,
        check_forward_ad=True,
        check_batched_grad=True,
    )


def test_ensembles_and_gradients_of_samples() -> None:
    """``functional_call`` with ``vmap``, over models and over samples."""
    models = [nn.Linear(2, 2).cuda() for _ in range(3)]
    parameters, buffers = stack_module_state(models)
    rows = _source("cpu")

    outputs = vmap(
        lambda p, b, v: functional_call(models[0], (p, b), (v.cuda(),)),
        in_dims=(0, 0, None),
    )(parameters, buffers, rows)
    own = {name: each.detach() for name, each in models[0].named_parameters()}
    grads = vmap(
        grad(lambda p, v: functional_call(models[0], p, (v.cuda(),)).sum()), (None, 0)
    )(own, rows)

    for model, output in zip(models, outputs, strict=True):
        assert torch.equal(model(rows.cuda()), output)
    assert ("cuda:0", (2, 2, 2)) == (
        str(grads["weight"].device),
        tuple(grads["weight"].shape),
    )
    assert [[[1.0, 2.0]] * 2, [[3.0, 4.0]] * 2] == grads["weight"].tolist()


def test_what_is_recorded_by_objects_is_refused() -> None:
    """``linearize`` at a card's values; at the host's it may go to a card."""
    value, tangent = torch.func.linearize(lambda v: v.cuda() ** 3, _source("cpu"))

    assert torch.equal(value.cpu(), _source("cpu") ** 3)
    assert [[3.0, 24.0], [81.0, 192.0]] == tangent(_source("cpu")).tolist()
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match="linearize"):
        torch.func.linearize(lambda v: v**3, _source("cuda"))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "name", ["dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"]
)
def test_dropouts_are_transformed(name: str, *, in_place: bool) -> None:
    """Of a card as of the host: one mask for each, one for all, or none allowed."""
    drop = getattr(torch, f"{name}_" if in_place else name)
    source = torch.ones(4, 8, 6, 2, device="cuda")

    def dropped(randomness: str, p: float = 0.5) -> torch.Tensor:
        def call(each: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = drop(each.clone(), p, True)
            return result

        result: torch.Tensor = torch.vmap(call, randomness=randomness)(source)
        return result

    torch.cuda.manual_seed(0)
    different, same = dropped("different"), dropped("same")
    torch.manual_seed(0)
    kinds = set(drop(torch.ones(64, 8), 0.5, True).flatten().tolist())

    assert different.is_cuda
    assert len(kinds) == 2
    for result in (different, same):
        values = torch.tensor(sorted(set(result.flatten().tolist())))
        torch.testing.assert_close(values, torch.tensor(sorted(kinds)))
    assert not torch.equal(different[0], different[1])
    assert torch.equal(same[0], same[1])
    assert dropped("different", 1.0).eq(0).all()
    assert dropped("error", 0.0).eq(1).all()
    with pytest.raises(RuntimeError, match="called random operation while"):
        dropped("error")


def test_an_ensemble_with_dropout_has_gradients() -> None:
    """``vmap`` over ``grad`` of modules that drop, on a card."""
    models = [
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Dropout(0.5)).cuda()
        for _ in range(3)
    ]
    parameters, buffers = torch.func.stack_module_state(models)

    def loss(weights: Any, other: Any, source: torch.Tensor) -> torch.Tensor:
        called: Any = torch.func.functional_call(models[0], (weights, other), (source,))
        return called.sum()  # type: ignore[no-any-return]  # a tensor

    grads = torch.vmap(torch.func.grad(loss), (0, 0, None), randomness="different")(
        parameters, buffers, torch.ones(5, 3, device="cuda")
    )

    assert {"0.weight": (3, 4, 3), "0.bias": (3, 4)} == {
        name: tuple(each.shape) for name, each in grads.items()
    }
    assert all(each.is_cuda for each in grads.values())


def test_a_module_has_tangents_of_its_parameters_alone() -> None:
    """C++ makes zeros on the host for an input that has no tangent."""

    def tangent(device: str) -> torch.Tensor:
        module = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.GELU())
        for each in module.parameters():
            nn.init.constant_(each, 0.5)
        module.to(device)
        with forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(each.detach(), torch.ones_like(each))
                for name, each in module.named_parameters()
            }
            source = torch.arange(8.0, device=device).view(2, 4)
            result: Any = torch.func.functional_call(module, duals, (source,))
            found: Any = forward_ad.unpack_dual(result).tangent
        return found  # type: ignore[no-any-return]  # a tensor

    found = tangent("cuda")

    assert found.is_cuda
    torch.testing.assert_close(tangent("cpu"), found.cpu())
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="same device"):
        _ = torch.ones(3, device="cuda") + torch.zeros(3)
    host, ones = torch.zeros(3), torch.ones(3, device="cuda")
    with forward_ad.dual_level():
        host.copy_(forward_ad.make_dual(2 * ones, ones))
        assert torch.equal(forward_ad.unpack_dual(host).tangent, ones)
    assert torch.equal(host, torch.full((3,), 2.0))


def _normalised(v: torch.Tensor, **given: Any) -> torch.Tensor:
    return nn.functional.batch_norm(v, None, None, training=True, **given)


@pytest.mark.parametrize("affine", [False, True])
def test_batch_norm_is_transformed(*, affine: bool) -> None:
    """A rule of ``vmap`` makes a weight and a bias of its own, forward and backward."""
    source = torch.arange(60.0).sin().reshape(5, 4, 3)

    def results(device: str) -> tuple[torch.Tensor, torch.Tensor]:
        given = {"weight": torch.arange(3.0, device=device)} if affine else {}
        batch = source.to(device)
        return (
            vmap(lambda v: _normalised(v, **given))(batch),
            vmap(grad(lambda v: _normalised(v, **given).pow(3).sum()))(batch),
        )

    for known, found in zip(results("cpu"), results("cuda"), strict=True):
        assert found.is_cuda
        assert torch.equal(known, found.cpu())


@pytest.mark.parametrize(
    "transform", [lambda f: f, lambda f: lambda v: vmap(f)(torch.stack([v, v]))]
)
def test_batch_norm_of_the_host_is_refused(transform: Any) -> None:
    """A new module's weight is 1 and its bias 0, as those of the rule; it is no rule's."""
    module = nn.BatchNorm1d(3, track_running_stats=False)

    with pytest.raises(RuntimeError, match="on the same device"):
        transform(module)(torch.ones(5, 3, device="cuda"))


@pytest.mark.parametrize(
    "function",
    [
        torch.prod,
        lambda v: v.prod(0),
        torch.linalg.cond,
        lambda v: torch.linalg.matrix_norm(v, 2),
        lambda v: torch.linalg.slogdet(v)[0],
    ],
)
def test_a_tangent_is_where_its_tensor_is(function: Any) -> None:
    """C++ makes helpers of some formulas on the host, and tangents of zeros."""
    source = torch.tensor([[3.0, 1.0], [0.5, 2.0]])
    known = jvp(function, (source,), (source.sin(),))

    found = jvp(function, (source.cuda(),), (source.sin().cuda(),))

    for one, other in zip(known, found, strict=True):
        assert other.is_cuda
        torch.testing.assert_close(one, other.cpu())


def test_a_host_tensor_of_the_user_has_no_formula() -> None:
    """What forward AD may make itself is 1; other values are the program's own."""
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="same device"):
        torch.cat([torch.ones(1, device="cuda"), torch.zeros(1)])


#: Operators that are computed on the host as a whole, or whose formulas make tensors there.
COMPOSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "householder_product": lambda x: torch.linalg.householder_product(x, x[0]),
    "combinations": lambda x: torch.combinations(x[0]),
    "cond": torch.linalg.cond,
    "cumprod": lambda x: x.cumprod(1),
    "prod": torch.prod,
    "prod of a dimension": lambda x: x.prod(-1),
    "quantile": lambda x: torch.quantile(x, 0.3),
}
#: The same without gradients.
WHOLE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "matrix_rank": torch.linalg.matrix_rank,
    "matrix_rank of a symmetric matrix": lambda x: torch.linalg.matrix_rank(
        x.mT @ x, hermitian=True
    ),
    "matrix_rank with a tolerance": lambda x: torch.linalg.matrix_rank(x, atol=0.5),
    "one_hot": lambda x: functional.one_hot(x.flatten().argsort(), 20),
    "vander": lambda x: torch.vander(x[0]),
}


def _same(function: Any, *shape: int) -> None:
    """Check that a function gives the CPU's tensors on a card."""
    source = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.utils._pytree.tree_leaves(function(source))

    found = torch.utils._pytree.tree_leaves(function(source.cuda()))

    for ours, its in zip(found, expected, strict=True):
        assert ours.is_cuda
        assert torch.equal(ours.cpu(), its)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", COMPOSED)
def test_an_operator_computed_on_the_host_is_transformed(name: str) -> None:
    """Its operands come in the wrappers of the transforms."""
    function = COMPOSED[name]

    def total(x: torch.Tensor) -> torch.Tensor:
        return function(x).sum()

    _same(lambda x: jvp(function, (x,), (x * 2,)), 4, 3)
    _same(grad(total), 4, 3)
    _same(vmap(function), 2, 4, 3)
    _same(vmap(grad(total)), 2, 4, 3)
    if name != "householder_product":  # it has no batching rule, also on the host
        _same(hessian(total), 4, 3)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", WHOLE)
def test_an_operator_without_gradients_is_batched(name: str) -> None:
    """Its rule for ``vmap`` would make tensors on the host."""
    _same(vmap(WHOLE[name]), 2, 4, 3)
    _same(vmap(vmap(WHOLE[name], in_dims=1)), 2, 4, 5, 3)


@pytest.mark.parametrize(
    "rows",
    [[[1.0, 2.0], [3.0, 4.0]], [[0.0, 2.0], [3.0, 0.0]], [[0.0, 2.0], [3.0, 4.0]]],
)
@pytest.mark.parametrize("infinite", [False, True])
def test_gradients_of_products_are_the_cpus(
    rows: list[list[float]], *, infinite: bool
) -> None:
    """An infinite factor gives NaN if no factor is 0, as on a card."""
    if infinite:
        rows = [*rows, [math.inf, 5.0]]

    def gradients(device: str) -> list[torch.Tensor]:
        source = torch.tensor(rows, device=device, requires_grad=True)
        found = []
        for way in (
            torch.prod,
            lambda x: x.prod(1),
            lambda x: x.prod(0, keepdim=True),
            lambda x: x.prod(dim=1, dtype=torch.float64),
            lambda x: torch.masked.prod(x, 1, mask=x.detach() > 1),
        ):
            (first,) = torch.autograd.grad(way(source).sum(), source, create_graph=True)
            found.append(first)
            # Up to torch 2.10 there is another formula for cumprod of a subclass of Tensor,
            # which the second gradient needs; it differs where a factor is infinite.
            if not infinite or TORCH > (2, 10):
                found += torch.autograd.grad(first.sum(), source)
        return found

    for ours, its in zip(gradients("cuda"), gradients("cpu"), strict=True):
        torch.testing.assert_close(ours.cpu(), its, rtol=0, atol=0, equal_nan=True)


def test_autocast_casts_inside_of_transforms() -> None:
    """Gradients of each sample, as torch's users compute them in mixed precision."""
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    source, given = torch.randn(5, 4).half(), torch.randn(5, 3).half()
    found = []
    for device in ("cpu", "cuda"):

        def loss(parameters: Any, each: Any, given: Any, device: str = device) -> Any:
            with torch.autocast(device, dtype=torch.float16):
                made = torch.nn.functional.linear(each[None], *parameters)
                return (made * given[None]).sum()

        each_grad: Any = vmap(grad(loss), in_dims=(None, 0, 0))
        placed = [each.to(device) for each in (weight, bias, source, given)]
        grads = each_grad(placed[:2], *placed[2:])
        assert all(each.device.type == device for each in grads)
        found.append([each.cpu() for each in grads])

    assert [torch.float32] * 2 == [each.dtype for each in found[1]]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


def test_tangents_go_through_the_gradient_of_a_convolution() -> None:
    """C++ makes the missing tangents on the host, which is no wrong type of a weight."""

    def tangents(device: str) -> list[torch.Tensor]:
        source = torch.arange(5.0, device=device).reshape(1, 1, 1, 1, 5)
        weight = torch.arange(2.0, device=device).reshape(1, 1, 1, 1, 2)
        weight.requires_grad_()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(source.requires_grad_(), source.detach() + 1)
            made = functional.conv3d(dual, weight)
            grads = torch.autograd.grad(made, (dual, weight), torch.ones_like(made))
            found = [forward_ad.unpack_dual(each).tangent for each in grads]
        return [each.cpu() for each in found if each is not None]

    with simulated_device("T4"):
        torch.testing.assert_close(tangents("cuda"), tangents("cpu"))
