"""Where operands, generators and results may be: torch's own rules for a card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
from torch.nn import functional
from versions import since

from pytest_gpumem.devices.simulated.install import simulated_device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HOST = torch.tensor(1.0)
INDEX = torch.tensor(0)


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4*2"):
        yield


def _add_to_a_host_total(x: Any) -> None:
    total = torch.tensor(0.0)
    total += x[0, 0]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (_add_to_a_host_total, "found at least two devices, cuda:0 and cpu!"),
        (lambda x: torch.stack([x[0, 0], HOST]), "got tensors is on cpu, different"),
        (lambda x: functional.cross_entropy(x[0], INDEX), "got target is on cpu"),
        (lambda x: functional.embedding(INDEX, x), "got indices is on cpu|cuda:0"),
        (lambda x: torch.gather(x, 0, INDEX[None, None]), "got index is on cpu"),
        (lambda x: x.index_select(0, INDEX), "got index is on cpu"),
        (lambda x: x.take(INDEX), "got index is on cpu"),
        (lambda x: torch.quantile(x, HOST), "q tensor must be on the same device"),
        (
            lambda x: torch.sum(x, (0, 1), out=torch.empty(())),
            "Expected out tensor to have device cuda:0, but got cpu instead",
        ),
        (lambda x: torch.add(x, x, out=torch.empty(2, 3)), "cuda:0 and cpu!"),
        (
            lambda x: x.masked_fill(torch.tensor(True), 1.0),
            "got mask on cpu and self on cuda:0",
        ),
        (lambda x: torch.equal(x, x.cpu()), "got other is on cpu"),
        (lambda x: torch.equal(x[0, 0], x[0, 0].cpu()), "got other is on cpu"),
        (lambda x: x + x.to("cuda:1"), "cuda:0 and cuda:1!"),
        (lambda x: torch.ones(3, 3) @ x.t(), "got mat2 is on cuda:0, .* on cpu"),
        (
            lambda x: functional.conv1d(torch.ones(1, 2, 3), x[:, :2, None]),
            r"Input type \(torch.FloatTensor\) and weight type "
            r"\(torch.cuda.FloatTensor\) should be the same",
        ),
        (
            lambda x: functional.conv1d(x[None], torch.ones(1, 2, 1)),
            r"Input type \(torch.cuda.FloatTensor\) and weight type "
            r"\(torch.FloatTensor\) should be the same",
        ),
    ],
)
def test_a_wrong_program_fails_in_the_cards_words(
    wrong: Callable[[torch.Tensor], object], text: str
) -> None:
    """Operands of two devices are refused, single numbers too where a card refuses."""
    with pytest.raises(RuntimeError, match=text):
        wrong(torch.ones(2, 3, device="cuda"))


@pytest.mark.parametrize(
    "right",
    [
        lambda x: x + HOST,
        lambda x: HOST * x,
        lambda x: x.clone().add_(HOST),
        lambda x: x**HOST,
        lambda x: x < HOST,
        lambda x: torch.where(x > 0, x, HOST),
        lambda x: x.masked_fill(x > 0, HOST),
        lambda x: torch.addcmul(x, x, HOST),
        lambda x: x[INDEX],
        torch.linalg.pinv,
    ],
)
def test_single_numbers_of_the_host_are_read(
    right: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Arithmetic takes them, as on a card, and indexing does."""
    host = torch.full((2, 3), 2.0)

    result = right(host.cuda())

    assert result.is_cuda
    torch.testing.assert_close(result.cpu(), right(host))


def test_what_a_kernel_asserts_is_cudas_error() -> None:
    """No ``IndexError``, which a kernel cannot raise; the card stays usable."""
    x = torch.rand(2, 3, device="cuda")
    far, one = torch.tensor([9, 0], device="cuda"), torch.ones(2, device="cuda")
    rows, row = torch.ones(2, 3, device="cuda"), torch.ones(1, 2, device="cuda")
    image = torch.ones(1, 1, 1, 1, device="cuda")
    wrong: list[Callable[[], Any]] = [
        lambda: x[far],
        lambda: x[-far],
        lambda: x.clone().index_put_((far,), one[0]),
        lambda: x.clone().index_put_((far,), one[0], accumulate=True),
        lambda: x.index_select(0, far),
        lambda: functional.embedding(far, x),
        lambda: functional.embedding_bag(far, x, far[1:]),
        lambda: x.gather(0, far[None]),
        lambda: x.clone().scatter_(0, far[None], 1.0),
        lambda: x.clone().scatter_add_(0, far[None], row),
        lambda: x.clone().scatter_reduce_(0, far[None], row, "sum"),
        lambda: x.take(far),
        lambda: x.clone().put_(far, one),
        lambda: x.clone().index_add_(0, far, rows),
        lambda: x.clone().index_copy_(0, far, rows),
        lambda: x.clone().index_fill_(0, far, 1.0),
        lambda: functional.cross_entropy(x, far),
        lambda: functional.nll_loss(image, far[:1, None, None]),
        lambda: functional.multi_margin_loss(x, far),
        lambda: functional.binary_cross_entropy(x + 2, x),
        lambda: functional.max_unpool2d(image, far[:1, None, None, None], [2, 2]),
        lambda: torch.bernoulli(x + 2),
        lambda: torch.multinomial(-x - 1, 2, replacement=True),
        lambda: torch._assert_async(one[0] - 1),
    ]
    for number, call in enumerate(wrong):
        with pytest.raises(torch.AcceleratorError) as caught:
            call()
        text = str(caught.value)
        assert text.startswith("CUDA error: device-side assert triggered\n"), number

    # What is checked on the host is the same error everywhere.
    with pytest.raises(IndexError, match="index 9 is out of bounds for dimension 0"):
        x[9]
    with pytest.raises(IndexError, match="Dimension out of range"):
        x.gather(5, far[None])
    assert torch.equal(torch.ones(2), one.cpu())


@pytest.mark.parametrize(
    "draw",
    [
        lambda x, g: x.normal_(generator=g),
        lambda x, g: x.uniform_(generator=g),
        lambda x, g: x.bernoulli_(generator=g),
        lambda x, g: torch.bernoulli(x, generator=g),
        lambda x, g: torch.multinomial(x, 1, generator=g),
        lambda x, g: torch.normal(x, 1.0, generator=g),
        lambda x, g: torch.nn.init.normal_(x, generator=g),
        lambda x, g: torch.randn(3, device=x.device, generator=g),
    ],
)
def test_a_generator_draws_for_its_own_device(
    draw: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
) -> None:
    """A generator of the host does not draw on a card, nor one of a card on the host."""
    card, host = torch.full((3,), 0.5, device="cuda"), torch.full((3,), 0.5)

    assert draw(card, torch.Generator("cuda")).is_cuda
    assert draw(card, torch.cuda.default_generators[0]).is_cuda
    assert draw(host, torch.Generator()).is_cpu
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for gen"):
        draw(card, torch.Generator())
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for gener"):
        draw(host, torch.Generator("cuda"))


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _gradient_of(call: Callable[[torch.Tensor], torch.Tensor]) -> None:
    call(_cards(1, 2, 4, 4).requires_grad_()).sum().backward()


def _smooth(mode: str) -> None:
    def twice(image: torch.Tensor) -> torch.Tensor:
        return functional.interpolate(image, scale_factor=2, mode=mode, antialias=True)

    _gradient_of(twice)


def _cards(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device="cuda")


def _scattered(dtype: torch.dtype, reduce: str) -> torch.Tensor:
    numbers = _cards(3, dtype=dtype)
    return numbers.scatter(0, torch.zeros_like(numbers).long(), numbers, reduce=reduce)


def _loss_of_an_image(image: torch.Tensor, reduction: str) -> torch.Tensor:
    target = torch.zeros(1, 4, 4, dtype=torch.int64, device="cuda")
    return functional.nll_loss(image, target, reduction=reduction)


def _summed_at(reduce: str, count: int = 3) -> Any:
    places = torch.zeros(count, dtype=torch.int64, device="cuda")
    return _cards(3).scatter_reduce(0, places, _cards(count), reduce)


#: Calls, and the kernel that says so if a card's is not deterministic.
#: Source: what torch 2.13 does on the substitute runtime.
DETERMINISTIC: dict[str, tuple[Callable[[], Any], str]] = {
    "index_reduce": (
        lambda: _cards(3).index_reduce(
            0, torch.zeros(1, dtype=torch.int64, device="cuda"), _cards(1), "amax"
        ),
        "index_reduce_cuda",
    ),
    "products": (lambda: _summed_at("prod"), "scatter_reduce_cuda_prod_"),
    "no products": (lambda: _summed_at("prod", 0), ""),
    "means": (lambda: _summed_at("mean"), ""),
    "sums": (lambda: _scattered(torch.float32, "add"), ""),
    "sums of integers": (
        lambda: _scattered(torch.int64, "add"),
        "scatter_reduce_cuda_kernel",
    ),
    "factors": (
        lambda: _scattered(torch.float32, "multiply"),
        "scatter_reduce_cuda_kernel",
    ),
    "bilinear": (
        lambda: _smooth("bilinear"),
        "upsample_bilinear2d_aa_backward_out_cuda",
    ),
    "bicubic": (lambda: _smooth("bicubic"), "upsample_bicubic2d_aa_backward_out_cuda"),
    "reflection": (
        lambda: _gradient_of(lambda image: functional.pad(image, (1,) * 4, "reflect")),
        "",
    ),
    "histogram": (
        lambda: _cards(3).histc(2),
        "_histc_cuda with floating point input",
    ),
    "histogram of integers": (lambda: _cards(3, dtype=torch.int64).histc(2), ""),
    "loss": (
        lambda: _gradient_of(lambda image: _loss_of_an_image(image, "mean")),
        "nll_loss2d_forward_out_cuda_template",
    ),
    "losses": (
        lambda: _gradient_of(lambda image: _loss_of_an_image(image, "none")),
        "",
    ),
    "kthvalue": (lambda: _cards(3).kthvalue(1), ""),
    "cumsum": (lambda: _cards(3).cumsum(0), ""),
}


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The reduce argument")
@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_card_says_what_is_not_deterministic(name: str) -> None:
    """Only such calls raise."""
    call, kernel = DETERMINISTIC[name]
    if kernel:
        with pytest.raises(RuntimeError, match=f"^{kernel} does not have a determinis"):
            call()
    else:
        call()


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_mode_follows_the_cards_list(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What has no deterministic kernel on a card raises there, and not on the host."""
    card = torch.ones(1, 1, 4, device="cuda", requires_grad=True)
    linear = functional.interpolate(card, scale_factor=2, mode="linear").sum()
    flat = torch.ones(4, 4, device="cuda")

    with pytest.raises(RuntimeError, match="upsample_linear1d_backward_out_cuda does"):
        linear.backward()
    with pytest.raises(RuntimeError, match="median CUDA with indices output"):
        flat.median(0)
    with pytest.raises(RuntimeError, match="because it uses CuBLAS"):
        flat @ flat
    places = torch.zeros(4, dtype=torch.int64, device="cuda")
    with pytest.raises(RuntimeError, match="put_ does not have a determ"):
        flat.put_(places, flat[0], accumulate=True)
    with pytest.raises(RuntimeError, match="_bincount_cuda does not have a determ"):
        places.bincount(flat[0])
    assert [4] == places.bincount().tolist()
    logits = torch.zeros(4, 1, 3, device="cuda", requires_grad=True)
    four = torch.tensor([4])
    loss = functional.ctc_loss(logits, places[None, :2] + 1, four, four // 2)
    with pytest.raises(RuntimeError, match="ctc_loss_backward_gpu does not have a det"):
        loss.backward()
    assert [1.0, 2.0] == flat.cumsum(0)[:2, 0].tolist()
    assert 1.0 == flat.median().item()
    assert [1.0, 2.0] == torch.ones(2).cumsum(0).tolist()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    assert 4.0 == (flat @ flat)[0, 0].item()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.warns(UserWarning, match="median CUDA with indices output does not"):
        flat.median(0)


@pytest.mark.parametrize(
    "use",
    [
        torch.sgn,
        lambda x: torch.copysign(x, x.detach()),
        pytest.param(
            lambda x: torch.nextafter(x, x.detach()),
            marks=since(2, 11, "nextafter has no derivative"),
        ),
        lambda x: torch.normal(x, 1.0),
        lambda x: x.repeat(0, 1),
    ],
)
def test_gradients_are_on_their_tensors_card(
    use: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Also where they are nothing but zeros, which C++ makes by itself."""
    tensor: Any = torch.ones(2, 3, device="cuda", requires_grad=True)

    use(tensor).sum().backward()
    (grad,) = torch.autograd.grad(use(tensor).sum(), tensor)

    assert tensor.grad.is_cuda
    assert tensor.grad is tensor.grad
    assert grad.is_cuda


@pytest.mark.filterwarnings("ignore:torch.range is deprecated")
def test_a_range_with_its_end_is_made_on_a_card() -> None:
    """Named in every way that a device can be; with the default type."""
    made = [
        torch.range(0, 4, 2, device="cuda"),
        torch.range(start=0, end=4, step=2, device=0, requires_grad=True),
        torch.range(0, 4, 2, out=torch.empty(0, device="cuda")),
    ]
    with torch.device("cuda"):
        made.append(torch.range(0, 4, 2))

    assert ["cuda:0"] * 4 == [str(each.device) for each in made]
    assert [[0.0, 2.0, 4.0]] * 4 == [each.tolist() for each in made]
    assert [torch.float32] * 4 == [each.dtype for each in made]
    assert [False, True, False, False] == [each.requires_grad for each in made]


class _AnyDevice(mock.MagicMock):
    """What stands in for ``torch.device`` in tests of programs for other accelerators."""

    def __instancecheck__(self, instance: object) -> bool:
        return True


def test_a_tensor_without_a_device_needs_no_class_of_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """C++ makes it on the host, whatever a test has put in place of ``torch.device``."""
    monkeypatch.setattr(torch, "device", _AnyDevice())

    made = torch.tensor(torch.inf)
    monkeypatch.undo()

    assert "cpu" == str(made.device)
    assert torch.inf == made.item()


def test_lists_on_several_devices_run_element_by_element() -> None:
    """Each result has the values and the place of its own tensor."""
    lists = [torch.tensor([1.0, 4.0], device="cuda"), torch.tensor([9.0, 16.0])]

    roots = torch._foreach_sqrt(lists)
    torch._foreach_add_(lists, [1.0, 2.0])
    scaled = torch._foreach_addcmul(
        lists[:1], roots[:1], roots[:1], torch.tensor([2.0])
    )

    assert [[1.0, 2.0], [3.0, 4.0]] == [each.tolist() for each in roots]
    assert ["cuda", "cpu"] == [each.device.type for each in roots]
    assert [[2.0, 5.0], [11.0, 18.0]] == [each.tolist() for each in lists]
    assert [[4.0, 13.0]] == [each.tolist() for each in scaled]


def test_host_tensors_take_from_a_card() -> None:
    """The result of a range between two tensors, and of a scatter, is not the card's."""
    one = torch.ones((), device="cuda")
    range_ = torch.linspace(one, torch.tensor(3.0), 3)
    into = torch.zeros(2, 2)
    scattered = torch.select_scatter(into, torch.ones(2, device="cuda"), 0, 1)
    into.resize_as_(one)

    assert ["cpu"] * 2 == [each.device.type for each in (range_, scattered)]
    assert [1.0, 2.0, 3.0] == range_.tolist()
    assert [[0.0, 0.0], [1.0, 1.0]] == scattered.tolist()
    assert () == into.shape


def test_a_product_with_meta_is_a_tensor_of_the_card() -> None:
    """Its bytes are taken; its values are whatever the memory held."""
    before = torch.cuda.memory_allocated()
    made = torch.ones(8, 8, device="cuda") @ torch.ones(8, 4, device="meta")

    assert ("cuda", (8, 4)) == (made.device.type, made.shape)
    assert torch.cuda.memory_allocated() > before
    assert (torch.ones(4, 8, device="meta") @ made).is_meta


@pytest.mark.parametrize("card", ["T4", "A100-40GB"])
def test_an_older_card_has_no_products_in_float8(card: str) -> None:
    """Compute capability 8.9 has them."""
    product: Any = torch._scaled_mm

    def multiply() -> torch.Tensor:
        small = torch.eye(16, device="cuda").to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        made: torch.Tensor = product(
            small, small.t(), one, one, out_dtype=torch.bfloat16
        )
        return made

    with simulated_device(card), pytest.raises(RuntimeError, match=r">= 9\.0 or 8\.9"):
        multiply()
    with simulated_device("RTX-4090"):
        assert 16.0 == multiply().sum().item()
