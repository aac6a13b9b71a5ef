"""Attention, dropout and reductions hold what CUDA's kernels hold, and are right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from pytest_gpumem import PeakRecorder
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.devices.simulated.operators.attention import choose_kernel
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError
from pytest_gpumem.kernels.reduction_memory import Processors, scratch_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator

A100 = Processors(count=108, max_threads=2048)
_attend: Any = functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    with simulated_device("A100-40GB"):
        yield


def _operands(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 40, 16).to(dtype) for _ in range(3)]


def _masks() -> dict[str, torch.Tensor | None]:
    kept = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    return {"none": None, "bool": kept, "float": torch.randn(2, 1, 40, 40)}


@pytest.mark.parametrize(
    ("mask", "is_causal"),
    [("none", False), ("none", True), ("bool", False), ("float", False)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_the_cpus(
    mask: str, dtype: torch.dtype, *, is_causal: bool
) -> None:
    """Whatever kernel would run, the numbers are the same."""
    bias = _masks()[mask]
    host = [each.requires_grad_() for each in _operands(dtype)]
    card = [each.detach().cuda().requires_grad_() for each in host]
    if bias is not None and bias.dtype.is_floating_point:
        bias = bias.to(dtype)
    on_card = None if bias is None else bias.cuda()
    expected = _attend(*host, attn_mask=bias, is_causal=is_causal)
    found = _attend(*card, attn_mask=on_card, is_causal=is_causal)
    expected.float().square().sum().backward()
    found.float().square().sum().backward()

    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    torch.testing.assert_close(found.cpu(), expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(card, host, strict=True):
        assert one.grad is not None
        assert "cuda:0" == str(one.grad.device)
        torch.testing.assert_close(
            one.grad.cpu(), other.grad, rtol=tolerance, atol=tolerance * 4
        )


#: Heads of keys, width of keys and of values, where a card composes and the CPU fuses.
COMPOSED = [(2, 8, 8), (4, 6, 6), (4, 2, 2), (4, 8, 6)]


def _composed(
    heads: int, width: int, wide: int, dtype: torch.dtype = torch.float32
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 40, width), (2, heads, 40, width), (2, heads, 40, wide))
    return [torch.randn(each, generator=generator).to(dtype) for each in shapes]


@pytest.mark.parametrize(("heads", "width", "wide"), COMPOSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
def test_attention_that_a_card_composes_is_the_cpus(
    kind: str, dtype: torch.dtype, heads: int, width: int, wide: int
) -> None:
    """Bit by bit, and its gradients: the CPU's kernel is fused and the card's is not."""
    mask = _masks()["bool"] if kind == "mask" else None
    found = []
    for device in ("cpu", "cuda"):
        operands = [
            each.to(device).requires_grad_()
            for each in _composed(heads, width, wide, dtype)
        ]
        result = _attend(
            *operands,
            attn_mask=None if mask is None else mask.to(device),
            is_causal=kind == "causal",
            enable_gqa=heads == 2,
        )
        grads = torch.autograd.grad(result.square().sum(), operands)
        found.append([each.cpu() for each in (result, *grads)])

    assert all(map(torch.equal, *found))


def test_attention_that_a_card_composes_keeps_what_it_composes() -> None:
    """The scores and both scaled operands; nothing of them stays after backward."""
    operands = [each.cuda().requires_grad_() for each in _composed(2, 8, 8)]
    before = torch.cuda.memory_allocated()
    result = _attend(*operands, enable_gqa=True)
    held = torch.cuda.memory_allocated() - before
    with sdpa_kernel(SDPBackend.MATH):
        composed = _attend(*operands, enable_gqa=True)
    beside = torch.cuda.memory_allocated() - before - held
    grads = torch.autograd.grad((result.sum() + composed.sum()), operands)
    del result, composed, grads
    torch._C._cuda_clearCublasWorkspaces()

    assert held - 8_519_680 == beside  # cuBLAS's workspace came with the first
    assert before == torch.cuda.memory_allocated()


def test_attention_that_a_card_composes_in_checkpoints_and_second_derivatives() -> None:
    """Both see operands and graphs as of any other operator."""
    expected = [each.double().requires_grad_() for each in _composed(2, 8, 8)]
    for device in ("cpu", "cuda"):
        leaves = [each.detach().to(device).requires_grad_() for each in expected]
        kept = checkpoint(
            lambda *each: _attend(*each, enable_gqa=True), *leaves, use_reentrant=False
        )
        first = torch.autograd.grad(kept.square().sum(), leaves)
        made = _attend(*leaves, enable_gqa=True)
        with sdpa_kernel(SDPBackend.MATH):
            twice = _attend(*leaves, enable_gqa=True) if device == "cpu" else made
        again = torch.autograd.grad(twice.square().sum(), leaves, create_graph=True)
        total = torch.stack([each.sum() for each in again]).sum()
        second = torch.autograd.grad(total, leaves)
        found = [each.cpu() for each in (*first, *second)]
        if device == "cpu":
            host = found

    assert all(map(torch.equal, host[:3], found[:3]))
    torch.testing.assert_close(host[3:], found[3:])


def test_dropout_in_attention_drops_the_same_in_backward() -> None:
    """The result is linear in the values, so gradient and result must agree."""
    query, key, value = (each.cuda() for each in _operands())
    value.requires_grad_()
    torch.cuda.manual_seed(3)
    found = _attend(query, key, value, dropout_p=0.5)
    weights = torch.randn(found.shape).cuda()
    (found * weights).sum().backward()

    assert value.grad is not None
    through_gradient = (value.grad * value.detach()).sum().item()
    through_result = (found.detach() * weights).sum().item()
    assert through_result == pytest.approx(through_gradient, rel=1e-3)
    torch.cuda.manual_seed(3)
    assert torch.equal(found, _attend(query, key, value, dropout_p=0.5))
    assert not torch.equal(found, _attend(query, key, value, dropout_p=0.5))


@pytest.mark.parametrize(
    ("dtype", "capability", "masked", "kernel"),
    [
        (torch.float16, (8, 0), False, "flash"),
        (torch.bfloat16, (9, 0), False, "flash"),
        (torch.float16, (8, 0), True, "efficient"),
        (torch.float32, (8, 0), False, "efficient"),
        (torch.float16, (7, 5), False, "efficient"),
        (torch.bfloat16, (7, 5), False, "math"),
        (torch.float32, (3, 7), False, "math"),
        (torch.float64, (8, 0), False, "math"),
    ],
)
def test_the_kernel_is_the_one_that_cuda_chooses(
    dtype: torch.dtype, capability: tuple[int, int], kernel: str, *, masked: bool
) -> None:
    """By dtype, compute capability and mask, as sdp_utils.cpp does."""
    operands = _operands(dtype)
    mask = torch.ones(40, 40, dtype=torch.bool) if masked else None

    assert kernel == choose_kernel(
        operands[0], operands[1], operands[2], mask, capability
    )


def test_kernels_can_be_turned_off() -> None:
    """torch.backends.cuda's switches and order hold."""
    own: Any = _operands(torch.float16)
    wide: Any = [torch.ones(1, 1, 4, 136).half() for _operand in range(3)]

    def chosen(operands: Any, capability: tuple[int, int] = (8, 0)) -> str:
        query, key, value = operands
        return choose_kernel(query, key, value, None, capability)

    with sdpa_kernel(SDPBackend.MATH):
        assert "math" == chosen(own)
    both = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    with sdpa_kernel(both, set_priority=True):
        assert "efficient" == chosen(own)
    with sdpa_kernel(both):
        assert "flash" == chosen(own)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        assert "cudnn" == chosen(own)
        assert "cudnn" == chosen(wide, (9, 0))
        for operands, capability in ((wide, (8, 0)), (own, (7, 5))):
            with pytest.raises(RuntimeError, match="No available kernel"):
                chosen(operands, capability)
    with sdpa_kernel([]), pytest.raises(RuntimeError, match="No viable backend"):
        chosen(own)


def test_attention_runs_with_the_kernels_that_are_on() -> None:
    """The CPU's values come from its own kernels; backward may run outside."""
    query, key, value = (each.cuda() for each in _operands(torch.float16))
    wanted = _attend(query, key, value)
    for kind in (
        SDPBackend.MATH,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
    ):
        leaf = query.clone().requires_grad_()
        with sdpa_kernel(kind):
            found = _attend(leaf, key, value)
            assert (kind == SDPBackend.MATH) == torch.backends.cuda.math_sdp_enabled()
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
        found.sum().backward()
        assert leaf.grad is not None
    with (
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
        pytest.raises(RuntimeError, match="No available kernel"),
    ):
        _attend(query.float(), key.float(), value.float())
    assert torch.backends.cuda.is_flash_attention_available()


def test_cudnns_attention_is_taken_where_it_is_asked_for() -> None:
    """It keeps a float for each row and two numbers; what the CPU lacks is refused."""
    tensors = [torch.randn(2, 4, 128, 64).half() for _operand in range(3)]
    found = []
    for device, kernel in (
        ("cpu", SDPBackend.FLASH_ATTENTION),
        ("cuda", SDPBackend.CUDNN_ATTENTION),
    ):
        operands = [each.to(device).requires_grad_() for each in tensors]
        before = torch.cuda.memory_allocated()
        with sdpa_kernel(kernel):
            result = _attend(*operands, is_causal=True)
        held = torch.cuda.memory_allocated() - before
        grads = torch.autograd.grad(result.float().square().sum(), operands)
        found.append([each.detach().cpu() for each in (result, *grads)])
    assert held == result.nbytes + 2 * 4 * 128 * 4 + 2 * 512
    assert "ScaledDotProductCudnnAttentionBackward0" == type(result.grad_fn).__name__
    assert all(map(torch.equal, *found))

    card: list[Any] = [each.cuda() for each in tensors]
    for options in (
        {"dropout_p": 0.5},
        {"attn_mask": torch.ones(128, 128).cuda().half()},
    ):
        with (
            sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
            pytest.raises(UnsupportedOnSimulatedDeviceError, match="in cuDNN's"),
        ):
            _attend(*card, **options)
    backends: Any = torch.backends.cuda
    for operands, answers in (
        (card, [1, 1, 1]),
        ([each.double() for each in card], [0] * 3),
    ):
        asked = backends.SDPAParams(*operands, None, 0.0, False, False)
        assert answers == [
            backends.can_use_flash_attention(asked),
            backends.can_use_efficient_attention(asked),
            backends.can_use_cudnn_attention(asked),
        ]


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        # A logarithm for each of 2 x 3 x 40 rows, and flash's two random numbers.
        (torch.float16, 1024 + 512 + 512),
        # Rows are rounded up to 64.
        (torch.float32, 1536),
    ],
)
def test_what_is_kept_for_backward_is_the_kernels(
    dtype: torch.dtype, kept: int
) -> None:
    """Operands and result, and little else: no scores, no mask."""
    card = [each.cuda().requires_grad_() for each in _operands(dtype)]
    before = torch.cuda.memory_allocated()
    found = _attend(*card, dropout_p=0.1)
    result_bytes = -(-found.nbytes // 512) * 512

    assert result_bytes + kept == torch.cuda.memory_allocated() - before
    found.sum().backward()
    del found
    for each in card:
        each.grad = None
    assert before == torch.cuda.memory_allocated()


def test_dropout_keeps_one_byte_for_each_number() -> None:
    """CUDA's kernel saves a mask of booleans for backward."""
    source = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    before = torch.cuda.memory_allocated()
    dropped = functional.dropout(source, 0.25)

    assert dropped.nbytes + 2**20 == torch.cuda.memory_allocated() - before
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.01)
    dropped.sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad == 0, dropped == 0)


@pytest.mark.parametrize(
    ("shape", "dims", "nbytes"),
    [
        # 16 blocks of 32 lanes with 4 results each: 4 B x 4096 x 16 x 128.
        ((1024, 4096), [0], (33554432, 128)),
        ((8, 4096), [0], ()),
        ((1024, 4096), [1], ()),
        ((), [], ()),
        ((0, 4), [0], ()),
    ],
)
def test_large_reductions_exchange_partial_sums(
    shape: tuple[int, ...], dims: list[int], nbytes: tuple[int, ...]
) -> None:
    """As many bytes as Reduce.cuh's configuration asks for."""
    strides = torch.empty(shape, device="meta").stride()

    assert nbytes == scratch_bytes(shape, strides, dims, 4, A100)


def test_a_sum_over_everything_is_split_over_the_card() -> None:
    """One result: every block has a partial one, and there is one semaphore."""
    (buffer, semaphores) = scratch_bytes((2**26,), (1,), [0], 4, A100)

    assert 4 == semaphores
    # Blocks of 512 threads: four on each of 108 multiprocessors; but no thread adds
    # up more than 256 numbers.
    assert 4 * max(4 * 108, 2**26 // 512 // 256) == buffer


def test_a_reduction_holds_its_scratch_while_it_runs() -> None:
    """The peak shows it; afterwards only the result is there."""
    operand = torch.zeros(1024, 4096, device="cuda")
    with PeakRecorder() as recorder:
        total = operand.sum(0)
    figures = recorder.figures

    scratch = 33554432 + 512
    assert (
        figures.start_allocated_bytes + total.nbytes + scratch
        == figures.peak_allocated_bytes
    )
    assert figures.start_allocated_bytes + total.nbytes == figures.end_allocated_bytes


def test_sums_of_gradients_take_no_block_of_their_own() -> None:
    """Autograd adds in place, unless somebody else has the first gradient."""

    def left(*, keep: bool) -> tuple[int, list[Any]]:
        source = torch.randn(512, 512, device="cuda", requires_grad=True)
        kept: list[Any] = []
        first = source * 2
        second = source * 3
        total = first * 1 + second * 1
        if keep:
            node: Any = second.grad_fn
            node.register_hook(lambda inputs, _outputs: kept.extend(inputs))
            node = first.grad_fn
            node.register_hook(lambda inputs, _outputs: kept.extend(inputs))
        with PeakRecorder() as recorder:
            total.backward(torch.ones_like(total))
        figures = recorder.figures
        assert source.grad is not None
        assert torch.equal(source.grad, torch.full_like(source, 5.0))
        return figures.end_allocated_bytes - figures.start_allocated_bytes, kept

    alone, _none = left(keep=False)
    shared, kept = left(keep=True)

    assert 2**20 == alone  # the sum itself
    assert 3 * 2**20 == shared  # and both gradients, each in its own block
    assert {2.0, 3.0} == {each.unique().item() for each in kept if each is not None}


@pytest.mark.parametrize("name", ["sort", "gather", "take", "index_select", "max"])
def test_gradients_that_are_written_in_place_take_one_block(name: str) -> None:
    """C++ makes zeros and writes to them; a second block is no card's."""
    source = torch.zeros(512, 1024, device="cuda").requires_grad_()
    indices = torch.zeros(512, 1024, dtype=torch.int64, device="cuda")
    picked = {
        "sort": lambda: source.sort(1)[0],
        "gather": lambda: source.gather(1, indices),
        "take": lambda: source.take(indices),
        "index_select": lambda: source.index_select(0, indices[:, 0]),
        "max": lambda: source.max(1)[0],
    }[name]()
    given = torch.ones_like(picked)
    with PeakRecorder() as recorder:
        (grad,) = torch.autograd.grad(picked, source, given)
    figures = recorder.figures

    assert grad.nbytes == figures.peak_allocated_bytes - figures.start_allocated_bytes
