"""Types and ways that the CPU has and a card has not, and the other way round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from versions import since

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.kernel_types import COMPLEX_HALVES
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Its annotations know no ``out=``.
_nn: Any = torch._C._nn

#: By the kernel's name: a call with whole numbers.
WHOLE: dict[str, Callable[[torch.Tensor], Any]] = {
    "addmm_cuda": lambda each: each @ each,
    "addmv_impl_cuda": lambda each: each @ each[0],
    "baddbmm_cuda": lambda each: each[None] @ each[None],
    "dot": lambda each: each[0] @ each[0],
    "slow_conv2d_cuda": lambda each: functional.conv1d(each[None], each[:, :, None]),
    "slow_conv_transpose2d_out_cuda": lambda each: functional.conv_transpose2d(
        each[None, None], each[None, None]
    ),
    "avg_pool2d_out_cuda_frame": lambda each: functional.avg_pool2d(each[None], 2),
    "max_pool2d_with_indices_out_cuda_frame": lambda each: functional.max_pool2d(
        each[None], 2
    ),
}


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("T4"):
        yield


@pytest.mark.parametrize("kernel", WHOLE)
def test_a_kernel_for_floating_numbers_takes_no_whole_ones(kernel: str) -> None:
    """The CPU multiplies and convolves them, a card does not."""
    with pytest.raises(NotImplementedError) as caught:
        WHOLE[kernel](torch.ones(3, 3, dtype=torch.int64, device="cuda"))

    assert f"\"{kernel}\" not implemented for 'Long'" == str(caught.value)


@pytest.mark.parametrize("source", [1, torch.tensor([[True]])])
def test_booleans_and_complex_numbers_are_not_multiplied_into(source: Any) -> None:
    """``scatter_`` with ``reduce="multiply"``; sums of complex numbers are there."""
    target = torch.ones(1, 1, dtype=torch.bool, device="cuda")
    places = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    kernel = "fill_base_kernel_reduce_multiply"
    if isinstance(source, torch.Tensor):
        source, kernel = source.cuda(), "gather_base_kernel_func"

    with pytest.raises(NotImplementedError) as caught:
        target.scatter_(0, places, source, reduce="multiply")

    assert f"\"cuda_scatter_{kernel}\" not implemented for 'Bool'" == str(caught.value)
    summed = target.to(torch.complex64).scatter_(0, places, 2, reduce="add")
    assert [[3 + 0j]] == summed.tolist()


def test_a_card_has_kernels_for_numbers_that_the_cpus_refuse() -> None:
    """The median of booleans; whole numbers put back to where they were the largest."""
    source = torch.tensor([[5, -2], [2**60 + 1, 7]], device="cuda")[None, None]
    _largest, places = functional.max_pool2d(
        source.double().cpu(), 1, return_indices=True
    )

    back = functional.max_unpool2d(source, places.cuda() * 2, [2, 2])

    assert torch.tensor([True, False, True], device="cuda").median().item() is True
    assert back.dtype is torch.int64
    assert source.flatten().tolist() == back.flatten()[:8:2].tolist()
    assert source.sum().item() == back.sum().item()


def test_nothing_is_launched_for_no_elements() -> None:
    """An empty product of whole numbers has a result on a card, too."""
    empty = torch.ones(0, 3, dtype=torch.int64, device="cuda")

    assert (0, 0) == tuple((empty @ empty.T).shape)


def test_what_has_kernels_for_the_cpu_alone_is_torchs_error() -> None:
    """A histogram of unequal bins is counted on the host only."""
    with pytest.raises(NotImplementedError, match="from the 'CUDA' backend"):
        torch.histogram(torch.ones(3, device="cuda"), 2)


@pytest.mark.parametrize("call", [torch.mm, torch.bmm], ids=["mm", "bmm"])
def test_a_product_may_be_of_a_wider_type(call: Any) -> None:
    """On a card sums of half precision are of single precision."""
    half = torch.full((1, 2, 2), 0.1, dtype=torch.float16, device="cuda")
    half = half if call is torch.bmm else half[0]
    result = call(half, half, out_dtype=torch.float32)

    assert (torch.float32, "cuda:0") == (result.dtype, str(result.device))
    assert torch.equal(result.cpu(), call(half.cpu().float(), half.cpu().float()))


@pytest.mark.parametrize(
    "call",
    [
        lambda out: _nn.avg_pool3d(_ones(1, 2, 4, 4, 4), 2, out=out),
        lambda out: _nn.gelu(_ones(1, 2, 2, 2, 2), out=out),
    ],
    ids=["avg_pool3d", "gelu"],
)
def test_strides_of_out_are_heeded(call: Callable[[torch.Tensor], Any]) -> None:
    """Some of the CPU's kernels write as if it were dense; a card's do not."""
    out = torch.zeros(2, 2, 2, 2, 2, device="cuda").permute(4, 3, 2, 1, 0)[:1]
    call(out)

    assert 1 == out.unique().numel()
    assert 0.5 < out.min().item()


def test_a_strided_triangle_stays_in_its_memory() -> None:
    """The CPU's kernel for a batch takes one stride for another, and writes beyond."""
    source = torch.randn(3, 3, 5, 5, device="cuda")
    whole = torch.zeros(5, 5, 3, 6, device="cuda")
    out = whole.permute(3, 2, 1, 0)[::2]
    torch.tril(source, out=out)

    assert torch.equal(out.cpu(), torch.tril(source.cpu()))
    assert not whole.permute(3, 2, 1, 0)[1::2].any()


def test_cosine_similarity_makes_its_helpers_on_the_card() -> None:
    """C++ makes the least norm where it takes the operands to be."""
    one, other = torch.randn(2, 3, 4, device="cuda").requires_grad_()
    result = functional.cosine_similarity(one, other)
    (gradient,) = torch.autograd.grad(result.sum(), one)
    host = one.detach().cpu().requires_grad_()
    expected = functional.cosine_similarity(host, other.detach().cpu())

    assert torch.equal(result.cpu(), expected)
    assert torch.equal(gradient.cpu(), torch.autograd.grad(expected.sum(), host)[0])


def _ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


def test_out_of_a_wrong_type_is_torchs_error() -> None:
    """What a reduction would ask for is not known of one that fails."""
    with pytest.raises(RuntimeError, match="can't be cast to the desired output type"):
        torch.mean(_ones(3), 0, out=torch.empty(0, dtype=torch.int32, device="cuda"))


def test_singular_values_ask_for_no_vectors() -> None:
    """C++ would compute them for any subclass of tensors: other bits, more bytes."""
    source = torch.randn(64, 64, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = torch.linalg.svdvals(source)

    assert torch.equal(values.cpu(), torch.linalg.svdvals(source.cpu()))
    assert torch.cuda.max_memory_allocated() - before < source.nbytes


def test_lazy_conjugation_is_heeded_by_what_is_composed_into_out() -> None:
    """C++ leaves it to operators inside, which Python's dispatch would pass over."""
    torch.manual_seed(0)  # numbers for which the result is accurate
    source = torch.randn(3, 3, dtype=torch.complex64, device="cuda")
    out = torch.empty_like(source)
    torch.linalg.pinv(source, out=out)

    assert torch.equal(out.cpu(), torch.linalg.pinv(source.cpu()))

    source = torch.randn(4, 3, dtype=torch.complex64, device="cuda")
    other = torch.randn(4, 2, dtype=torch.complex64, device="cuda")
    solved = [torch.empty_like(each) for each in torch.linalg.lstsq(source, other)]
    torch.linalg.lstsq(source, other, out=solved)
    expected = torch.linalg.lstsq(source.cpu(), other.cpu())

    torch.testing.assert_close(solved[0].cpu(), expected.solution)
    torch.testing.assert_close(solved[1].cpu(), expected.residuals)


@pytest.mark.parametrize(
    "transform",
    [
        torch.fft.fft,
        lambda source: torch.stft(
            source, 4, window=torch.ones_like(source), return_complex=True
        ),
    ],
    ids=["fft", "stft"],
)
def test_a_transform_in_half_precision_is_refused_by_name(
    transform: Callable[[torch.Tensor], Any],
) -> None:
    """C++ takes it of cards alone, and takes a simulated tensor for the host's."""
    with pytest.raises(
        UnsupportedOnSimulatedDeviceError, match="a Fourier transform in half precision"
    ):
        transform(torch.ones(4, dtype=torch.float16, device="cuda"))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: torch.ones(2, dtype=torch.bool, device="cuda").abs(), [True, True]),
        (lambda: torch.eye(2, device="cuda").bool().trace(), 2),
        (lambda: torch.full((2,), complex("nan"), device="cuda").nansum(), 0),
    ],
    ids=["abs", "trace", "nansum"],
)
def test_a_card_has_types_that_the_cpu_has_not(
    call: Callable[[], torch.Tensor], expected: Any
) -> None:
    """Truth values and complex numbers are computed by what the CPU does have."""
    assert expected == call().tolist()


#: By the kernel's name: a call in half precision that neither the CPU nor a card has.
HALF: dict[str, Callable[[torch.Tensor], Any]] = {
    "cholesky_cusolver": torch.linalg.cholesky,
    "svd_cuda_gesvdjBatched": torch.linalg.svd,
    "bitwise_and_cuda": lambda each: each & each,
    "airy_ai_cuda": torch.special.airy_ai,
}


@pytest.mark.parametrize("kernel", HALF)
def test_a_kernel_that_lacks_half_precision_refuses_it(kernel: str) -> None:
    """Torch's error, not a result in single precision that is rounded."""
    with pytest.raises(NotImplementedError) as caught:
        HALF[kernel](torch.eye(3, dtype=torch.float16, device="cuda"))

    assert f"\"{kernel}\" not implemented for 'Half'" == str(caught.value)


@pytest.mark.parametrize("kernel", ["histc", "fused_dropout"])
def test_complex_numbers_have_no_such_kernel(kernel: str) -> None:
    """The CPU's values come from kernels that could be given their parts."""
    calls: dict[str, Any] = {"histc": torch.histc, "fused_dropout": functional.dropout}

    with pytest.raises(NotImplementedError, match=f'"{kernel}" not implemented'):
        calls[kernel](torch.ones(3, dtype=torch.complex64, device="cuda"))


@since(2, 10, "the host has other words for it")
@pytest.mark.parametrize("text", ["Sort", "topk"])
def test_a_check_that_both_devices_share_speaks_of_the_cpu(text: str) -> None:
    """PyTorch's CUDA code says so, too; from 2.15 on it is a ``TypeError``."""
    calls: dict[str, Any] = {"Sort": torch.sort, "topk": lambda each: each.topk(1)}

    with pytest.raises((RuntimeError, TypeError), match=f"{text} does not .* on CPU"):
        calls[text](torch.ones(3, dtype=torch.complex64, device="cuda"))


@pytest.mark.parametrize("way", ["result", "out", "gradient"])
def test_a_card_alone_computes_in_half_precision(way: str) -> None:
    """Its kernels do it in single precision, and round the result."""
    source = torch.rand(1, 1, 4, 4, 4).half().cuda().requires_grad_(way == "gradient")
    single = source.detach().cpu().float().requires_grad_(way == "gradient")
    expected = functional.avg_pool3d(single, 2)
    if way == "out":
        result = torch.empty(0, dtype=torch.float16, device="cuda")
        _nn.avg_pool3d(source, 2, out=result)
    else:
        result = functional.avg_pool3d(source, 2)
    if way == "gradient":
        (result,) = torch.autograd.grad(result.sum(), source)
        (expected,) = torch.autograd.grad(expected.sum(), single)

    assert (torch.float16, "cuda:0") == (result.dtype, str(result.device))
    assert torch.equal(result.cpu(), expected.half())


@pytest.mark.parametrize("call", ["linalg.lu", "lu_unpack"])
def test_strided_factors_stay_in_their_memory(call: str) -> None:
    """The CPU's kernels for triangles write beyond what a strided ``out=`` has."""
    source = torch.randn(3, 3, 5, 5, device="cuda")
    function: Any = torch.linalg.lu
    args: Any = (source,)
    if call == "lu_unpack":
        function, args = torch.lu_unpack, torch.linalg.lu_factor(source)
    expected = function(*args)
    wholes = [torch.zeros(5, 5, 3, 6, device="cuda") for _each in expected]
    outs = tuple(whole.permute(3, 2, 1, 0)[::2] for whole in wholes)
    function(*args, out=outs)

    for out, whole, result in zip(outs, wholes, expected, strict=True):
        assert torch.equal(out.cpu(), result.cpu())
        assert not whole.permute(3, 2, 1, 0)[1::2].any()


def test_a_quantile_gives_an_empty_out_the_usual_strides() -> None:
    """Its result turns dimensions; what it is put into need not."""
    out = torch.empty(0, device="cuda")
    torch.quantile(_ones(3, 5), _ones(2) / 2, dim=0, out=out)

    assert ((2, 5), (5, 1)) == (tuple(out.shape), out.stride())


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("name", sorted(COMPLEX_HALVES - {"div", "lerp", "logaddexp"}))
def test_complex_halves_of_a_card_are_refused_by_name(name: str) -> None:
    """A card computes them and the CPU does not; what neither does is torch's error."""
    numbers = torch.ones(2, 2, dtype=torch.chalf, device="cuda")
    more = (2,) if name == "pow" else ()
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match=rf"^aten\.{name}"):
        getattr(torch, name)(numbers, *more)
    with pytest.raises(NotImplementedError, match="not implemented for 'ComplexHalf'"):
        numbers.cumsum(0)
