"""Operators that PyTorch composes in C++ stay on the card, with a card's bytes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from torch.nn.utils import rnn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_gpumem import PeakRecorder
from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MIB = 2**20


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    """A simulated T4."""
    with simulated_device("T4"):
        yield


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: functional.softmax(x, -1, dtype=torch.float64),
        lambda x: functional.softmax(x.half(), -1, dtype=torch.float32),
        lambda x: functional.log_softmax(x.half(), -1, dtype=torch.float32),
        lambda x: functional.softmax(x.bfloat16(), -1, dtype=torch.float32),
        lambda x: functional.pad(x[None], (1, 1), mode="circular"),
        lambda x: rnn.pad_sequence([x, x[:2]]),
        lambda x: rnn.pad_sequence([x, x[:2]], True, 7.0),
        lambda x: rnn.pad_sequence([x, x[:2]], padding_side="left"),
        lambda x: torch.vander(x[0].detach()) * x.sum(),
        lambda x: torch.combinations(x[0]),
        lambda x: torch.linalg.matrix_rank(x.detach()) * x.sum(),
        lambda x: torch.fake_quantize_per_tensor_affine(
            x,
            torch.full((1,), 0.5, device=x.device),
            torch.zeros(1, dtype=torch.int32, device=x.device),
            -3,
            4,
        ),
        lambda x: functional.ctc_loss(
            x[:, None].log_softmax(-1),
            torch.ones(1, 2, dtype=torch.long, device=x.device),
            torch.tensor([4]),
            torch.tensor([2]),
        ),
    ],
)
@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
def test_what_is_composed_stays_on_the_card(
    compute: Callable[[torch.Tensor], torch.Tensor], mode: Callable[[], Any]
) -> None:
    """Values and gradients are the CPU's; nothing ends on the host in silence."""
    host = torch.linspace(-2, 3, 32).reshape(4, 8).requires_grad_()
    card = host.detach().cuda().requires_grad_()

    with mode():
        expected, result = compute(host), compute(card)

    assert result.is_cuda
    torch.testing.assert_close(expected, result.cpu())
    if mode is nullcontext:
        expected.float().pow(2).sum().backward()
        result.float().pow(2).sum().backward()
        assert card.grad is not None
        assert card.grad.is_cuda
        torch.testing.assert_close(host.grad, card.grad.cpu())


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_pass_through_a_recurrent_layer(
    *, enforce_sorted: bool
) -> None:
    """The data lie on the card, lengths and batch sizes on the host, as torch wants."""
    torch.manual_seed(0)
    layer = nn.LSTM(4, 5, batch_first=True, bidirectional=True)
    lengths = torch.tensor([3, 2, 2] if enforce_sorted else [2, 3, 2])
    source = torch.randn(3, 3, 4)
    results = []
    for device in ("cpu", "cuda"):
        packed = rnn.pack_padded_sequence(
            source.to(device),
            lengths,
            batch_first=True,
            enforce_sorted=enforce_sorted,
        )
        output, _state = copy.deepcopy(layer).to(device)(packed)
        results.append(
            rnn.pad_packed_sequence(output, batch_first=True, total_length=5)
        )

    (expected, _), (result, counts) = results
    assert (3, 5, 10) == tuple(result.shape)
    assert result.is_cuda
    assert torch.equal(lengths, counts)
    torch.testing.assert_close(expected, result.cpu())
    with pytest.raises(RuntimeError, match="1D CPU int64 tensor, but got 1D cuda:0"):
        rnn.pack_padded_sequence(source.cuda(), counts.cuda(), batch_first=True)


def _infer(mode: Callable[[], Any]) -> dict[str, int]:
    """Return what a model's parts ask of a card under ``mode``."""
    with simulated_device("A100-40GB"):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).cuda()
        with mode():
            source = torch.randn(4, 128, 64, device="cuda")
            answer = layer(source)
            functional.softmax(answer.half(), -1, dtype=torch.float32)
            heads = source.view(4, 4, 128, 16)
            functional.scaled_dot_product_attention(heads, heads, heads)
            torch.einsum("bij,bkj->bik", answer, source)
            rnn.pad_sequence([source[0], source[1, :8]])
            functional.dropout(source, 0.1)
        stats: dict[str, int] = torch.cuda.memory_stats()
    return stats


def test_inference_mode_takes_what_no_grad_takes() -> None:
    """Operators are taken apart there as well: workspaces and temporaries count."""
    expected, stats = _infer(torch.no_grad), _infer(torch.inference_mode)

    assert expected == stats
    assert stats["allocated_bytes.all.peak"] > 8 * MIB


def test_a_view_of_an_inference_tensor_is_one() -> None:
    """Also a view that is made outside of the mode: autograd refuses to keep it."""
    layer = torch.nn.Linear(4, 2).cuda()
    with torch.inference_mode():
        made = torch.ones(3, 4, device="cuda")

    assert made[0].is_inference()
    assert made.view(-1).is_inference()
    assert not made.clone()[0].is_inference()
    with pytest.raises(RuntimeError, match="cannot be saved for backward"):
        layer(made[0])
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        made.t().add_(1)
    layer(made.clone()[0]).sum().backward()
    assert layer.weight.grad is not None


def test_half_becomes_single_precision_inside_softmax() -> None:
    """As the CUDA kernel does: no cast of the source, in neither direction."""
    source = torch.zeros(MIB, 2, device="cuda", dtype=torch.half).requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    result = functional.softmax(source, -1, dtype=torch.float32)

    assert 8 * MIB == torch.cuda.max_memory_allocated() - before
    grad = torch.zeros_like(result)
    torch.cuda.reset_peak_memory_stats()
    result.backward(grad)
    # The gradient times the result is a buffer of its own.
    made = 8 * MIB + 8 * MIB + 4 * MIB
    assert made + 8 * MIB == torch.cuda.max_memory_allocated() - before
    assert source.grad is not None
    assert torch.float16 == source.grad.dtype


def test_complex_values_are_conjugated_inside_operators() -> None:
    """Lazy conjugation is heeded in C++ that composes an operator, as on the host."""
    torch.manual_seed(0)
    source = torch.randn(3, 3, dtype=torch.complex64)

    inverse = torch.linalg.pinv(source.cuda())

    torch.testing.assert_close(torch.linalg.pinv(source), inverse.cpu())
    torch.testing.assert_close(
        source.mH @ source, (source.cuda().mH @ source.cuda()).cpu()
    )
    for part in (source, source[:1], source[0]):
        torch.testing.assert_close(torch.cov(part), torch.cov(part.cuda()).cpu())


def test_linear_adds_its_bias_in_place() -> None:
    """As for plain tensors, where rows cannot be taken as one matrix."""
    layer = nn.Linear(256, 1024, device="cuda")
    source = torch.ones(2, 2, 256, 256, device="cuda").transpose(1, 2)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()

    with torch.no_grad():
        result = layer(source)

    workspace = torch.cuda.memory_allocated() - before - result.nbytes
    assert 4 * MIB == result.nbytes
    taken = torch.cuda.max_memory_allocated() - before
    assert source.nbytes + result.nbytes + workspace == taken


@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 3, 256), (2, 2, 3, 256)])
def test_linear_takes_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    """As one matrix of rows, with the bias added by the same kernel."""
    layer = nn.Linear(256, 8)
    source = torch.ones(shape).requires_grad_()
    card = source.detach().cuda().requires_grad_()

    expected, result = layer(source), copy.deepcopy(layer).cuda()(card)
    expected.sum().backward()
    result.sum().backward()

    assert "AddmmBackward0" in _names(result.grad_fn)
    torch.testing.assert_close(expected, result.cpu())
    assert card.grad is not None
    torch.testing.assert_close(source.grad, card.grad.cpu())


class _Operators(TorchDispatchMode):
    """Notes the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.names.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_linear_without_gradients_is_what_it_is_with_them() -> None:
    """Nobody records its views then; whoever looks sees them, and its result is one."""
    layer = nn.Linear(256, 1024, device="cuda")
    source = torch.rand(2, 64, 256, device="cuda")
    layer(source)  # the workspace of products stays
    found: list[Any] = []
    for is_on in (True, False):
        with torch.set_grad_enabled(is_on), PeakRecorder() as recorder:
            result = layer(source)
        figures = recorder.figures
        grown = figures.peak_allocated_bytes - figures.start_allocated_bytes
        with torch.set_grad_enabled(is_on), _Operators() as seen:
            layer(source)
        found.append((result.detach(), result._is_view(), grown, seen.names))

    with_gradients, without = found
    assert torch.equal(with_gradients[0], without[0])
    assert with_gradients[1:] == without[1:]
    assert ["aten.view", "aten.t", "aten.addmm", "aten.view"] == without[3]
    assert without[1]


def _names(node: Any) -> set[str]:
    above = [_names(each) for each, _index in node.next_functions if each is not None]
    return {type(node).__name__}.union(*above)


@pytest.mark.filterwarnings("ignore:A window was not provided")
@pytest.mark.parametrize("has_window", [True, False])
def test_a_short_window_is_made_longer_on_the_card(*, has_window: bool) -> None:
    """C++ makes zeros around it, on the device that it sees."""
    sound = torch.arange(64.0) % 7

    def transform(device: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        window = torch.arange(5.0, device=device).requires_grad_()
        made = torch.stft(
            sound.to(device),
            16,
            win_length=5,
            window=window if has_window else None,
            return_complex=True,
        )
        if has_window:
            made.abs().sum().backward()
        return made, window.grad

    made, grad = transform("cuda")
    expected, expected_grad = transform("cpu")
    assert "cuda:0" == str(made.device)
    assert torch.equal(expected, made.cpu())
    if grad is not None and expected_grad is not None:
        assert torch.equal(expected_grad, grad.cpu())
    with pytest.raises(RuntimeError, match="stft input and window must be on the same"):
        torch.stft(sound.cuda(), 16, window=torch.ones(16), return_complex=True)


def test_a_bilinear_layer_works_slice_by_slice() -> None:
    """Its values are the CPU's; two buffers of one slice stand beside the result."""
    layer = torch.nn.Bilinear(64, 48, 32, bias=False)
    first, second = torch.randn(128, 64), torch.randn(128, 48)
    expected = layer(first, second)
    with simulated_device("T4"):
        there = layer.cuda()
        operands = first.cuda(), second.cuda()
        torch.bmm(*[torch.ones(1, 8, 8, device="cuda")] * 2)  # has cuBLAS's workspace
        with PeakRecorder() as recorder, torch.no_grad():
            found = there(*operands)
        figures = recorder.figures
        more = figures.peak_allocated_bytes - figures.start_allocated_bytes

        assert torch.equal(expected, found.cpu())
        assert found.nbytes + 128 * 48 * 4 + 128 * 4 == more


def test_an_attention_kernel_may_be_called_by_itself() -> None:
    """As ring attention does: the values, gradients and bytes of attention."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    halves = [torch.randn(2, 4, 16, 32).bfloat16() for _operand in range(3)]
    floats = [each.float() for each in halves]

    def run(host: list[torch.Tensor], attend: Any) -> tuple[list[torch.Tensor], int]:
        operands: list[Any] = [each.cuda().requires_grad_() for each in host]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = attend(*operands)
        result.float().square().sum().backward()
        found = [result.detach().cpu(), *(each.grad.cpu() for each in operands)]
        return found, torch.cuda.max_memory_allocated() - before

    def together(query: Any, key: Any, value: Any) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        )

    with simulated_device("A100-40GB"):
        for host, alone in (
            (halves, lambda *operands: flash(*operands, 0.0, True)[0]),
            (floats, lambda *operands: efficient(*operands, None, True, 0.0, True)[0]),
        ):
            expected, peak = run(host, together)
            found, peak_alone = run(host, alone)
            assert all(map(torch.equal, expected, found))
            assert peak == peak_alone
        halves, floats = ([each.cuda() for each in host] for host in (halves, floats))
        assert (2, 4, 16) == flash(*halves)[1].shape
        assert (2, 4, 32) == efficient(*floats, None, True)[1].shape
        with pytest.raises(RuntimeError, match="only support fp16 and bf16"):
            flash(*floats)
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="called by itself"):
            flash(*halves, 0.1)
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="called by itself"):
            efficient(*floats, floats[0], True)
    old = [torch.ones(2, 4, 16, 32, device="cuda").half() for _operand in range(3)]
    with pytest.raises(RuntimeError, match="only supports Ampere"):  # on a T4
        flash(*old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_causal_mask_may_be_aligned_with_the_last_row(dtype: torch.dtype) -> None:
    """``causal_lower_right``: memory-efficient kernels have it, and a flash kernel."""
    torch.manual_seed(0)
    host = [torch.randn(2, 4, rows, 16).to(dtype) for rows in (5, 9, 9)]
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    attend: Any = functional.scaled_dot_product_attention

    def run(device: str, mask: Any) -> list[torch.Tensor]:
        leaves: list[Any] = [each.detach().to(device).requires_grad_() for each in host]
        result = attend(*leaves, attn_mask=mask)
        result.float().square().sum().backward()
        return [result.detach().cpu(), *(each.grad.cpu() for each in leaves)]

    expected = run("cpu", mask)
    with simulated_device("A100-40GB"):
        found = run("cuda", causal_lower_right(5, 9))

        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(other, one, rtol=2e-3, atol=2e-3)
        query, key, value = (each.cuda() for each in host)
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="lower_right"):
            attend(query, key, value, causal_lower_right(5, 9), 0.5)
        with pytest.warns(UserWarning, match="will produce NaNs"):
            rows_over = causal_lower_right(9, 5)
        with pytest.raises(UnsupportedOnSimulatedDeviceError, match="lower_right"):
            attend(key, query, query, rows_over)


@pytest.mark.parametrize("learned", [False, True])
def test_attention_is_the_cpus(*, learned: bool) -> None:
    """With a learned bias a card takes a fused operator, and the CPU composes it."""
    torch.manual_seed(0)
    values = [torch.randn(2, 4, 16, 8, requires_grad=True) for _ in range(3)]
    bias = torch.randn(1, 4, 16, 16, requires_grad=learned)
    operands = [*values, bias]
    there = [
        each.detach().cuda().requires_grad_(each.requires_grad) for each in operands
    ]
    attend: Any = functional.scaled_dot_product_attention

    expected = attend(*values, attn_mask=bias)
    found = attend(*there[:3], attn_mask=there[3])
    expected.square().sum().backward()
    found.square().sum().backward()

    assert torch.equal(expected, found.cpu())
    for one, other in zip(operands, there, strict=True):
        if one.grad is not None:
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad.cpu())
