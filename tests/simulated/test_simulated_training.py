"""Computation on the simulated device gives the CPU's numbers."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pytest_gpumem.devices.simulated.install import simulated_device
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _card() -> Iterator[None]:
    """A simulated T4."""
    with simulated_device("T4"):
        yield


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 1)
    )


def _train(
    device: str, make: Callable[..., torch.optim.Optimizer], **options: Any
) -> list[float]:
    torch.manual_seed(0)
    model = _mlp().to(device)
    optimizer = make(model.parameters(), **options)
    inputs = torch.linspace(-1, 1, 32).reshape(4, 8).to(device)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(inputs).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"foreach": False}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ],
)
def test_training_takes_the_same_path(
    make: Callable[..., torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    """Losses of a few steps are those of the CPU, to rounding."""
    on_cpu = _train("cpu", make, **options)
    on_card = _train("cuda", make, **options)

    assert on_cpu == pytest.approx(on_card, rel=1e-5)
    assert on_card[-1] < on_card[0]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: functional.softmax(x, dim=-1),
        lambda x: functional.one_hot(x.argmax(-1), 8).float() * x.sum(),
        lambda x: torch.einsum("ij,kj->ik", x, x),
        lambda x: torch.cat([x, x * 2], dim=1)[:, ::2],
        lambda x: x.sort(dim=-1).values,
        lambda x: torch.where(x > 0, x, -x),
        lambda x: functional.scaled_dot_product_attention(x[None], x[None], x[None]),
        lambda x: functional.conv1d(x[None], x[:, None, :3].repeat(1, 4, 1)),
        lambda x: functional.cross_entropy(x, torch.arange(4, device=x.device)),
        lambda x: torch.stack(x.unbind(0)).cumsum(0),
        lambda x: x.masked_fill(x > 0, 0.0).std(),
        lambda x: torch.quantile(x, 0.3),
        lambda x: functional.interpolate(x[None], scale_factor=2.0),
        lambda x: torch.linalg.norm(x @ x.T),
        lambda x: functional.pad(x, (1, 1)).flip(0),
        lambda x: x.gather(1, x.argsort(1)),
    ],
)
def test_operators_and_their_gradients_match(
    compute: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Results and gradients on the card are the CPU's."""
    host = torch.linspace(-2, 3, 32).reshape(4, 8).requires_grad_()
    card = host.detach().cuda().requires_grad_()

    expected, result = compute(host), compute(card)
    expected.pow(2).sum().backward()
    result.pow(2).sum().backward()

    assert result.is_cuda
    assert torch.allclose(expected.detach(), result.detach().cpu(), rtol=1e-5)
    assert host.grad is not None
    assert card.grad is not None
    assert card.grad.is_cuda
    assert torch.allclose(host.grad, card.grad.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(8, 4, batch_first=True),
        lambda: nn.GRU(8, 4, num_layers=2),
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        lambda: nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True),
    ],
)
def test_layers_match(make: Callable[[], nn.Module]) -> None:
    """Recurrent and attention layers compute the CPU's numbers on the card."""
    torch.manual_seed(1)
    layer = make().eval()
    inputs = torch.linspace(-1, 1, 48).reshape(2, 3, 8)
    many = (inputs,) * 3 if isinstance(layer, nn.MultiheadAttention) else (inputs,)

    expected = layer(*many)
    layer.cuda()
    result = layer(*(each.cuda() for each in many))

    if isinstance(expected, tuple):
        expected, result = expected[0], result[0]
    assert torch.allclose(expected, result.cpu(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supp:UserWarning")
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 5, 2, bidirectional=True, proj_size=3),
        lambda: nn.GRU(4, 5, 2, bidirectional=True, bias=False),
        lambda: nn.RNN(4, 5),
    ],
)
def test_recurrent_layers_match_without_cudnn(
    make: Callable[[], nn.Module], *, packs: bool
) -> None:
    """A card then takes step by step, in fused cells: results and gradients are close."""
    torch.manual_seed(1)
    layer, inputs = make(), torch.randn(4, 3, 4)
    found = []
    with torch.backends.cudnn.flags(enabled=False):
        for device in ("cpu", "cuda"):
            layer.zero_grad()
            source: Any = inputs.to(device)
            if packs:
                source = nn.utils.rnn.pack_padded_sequence(source, [4, 3, 1])
            output, state = layer.to(device)(source)
            if packs:
                output, _lengths = nn.utils.rnn.pad_packed_sequence(output)
            shown = [output, *(state if isinstance(state, tuple) else [state])]
            torch.stack([each.sin().sum() for each in shown]).sum().backward()
            grads = [each.grad for each in layer.parameters()]
            found.append([each.detach().cpu() for each in (*shown, *grads)])

    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    "make", [nn.LSTMCell, nn.GRUCell, partial(nn.LSTMCell, bias=False)]
)
def test_recurrent_cells_are_fused(make: Callable[..., nn.Module]) -> None:
    """Values and gradients are the CPU's; autograd has one node, as on a card."""
    torch.manual_seed(1)
    cell, inputs = make(4, 5), torch.randn(3, 4)
    found = []
    for device in ("cpu", "cuda"):
        cell.zero_grad()
        made = cell.to(device)(inputs.to(device))
        made = made if isinstance(made, tuple) else (made,)
        sum(each.sin().sum() for each in made).backward()
        grads = [each.grad for each in cell.parameters()]
        found.append([each.detach().cpu() for each in (*made, *grads)])

    assert made[0].grad_fn is not None
    assert made[0].grad_fn.name().startswith("ThnnFused")
    torch.testing.assert_close(*found)


def test_gradients_flow_between_devices() -> None:
    """A copy to the card and back passes its gradient to the host."""
    host = torch.ones(3, requires_grad=True)

    (host.cuda() * 2).cpu().sum().backward()

    assert host.grad is not None
    assert host.grad.is_cpu
    assert [2.0] * 3 == host.grad.tolist()


def test_checkpointing_recomputes() -> None:
    """Activation checkpointing gives the same gradient."""
    from torch.utils.checkpoint import checkpoint

    layer = nn.Linear(4, 4).cuda()
    inputs = torch.ones(2, 4, device="cuda", requires_grad=True)

    checkpoint(layer, inputs, use_reentrant=False).sum().backward()

    assert inputs.grad is not None
    assert inputs.grad.is_cuda


def test_hooks_see_tensors_on_the_card() -> None:
    """Forward, backward and tensor hooks run with tensors of the card."""
    seen = []
    layer = nn.Linear(2, 2).cuda()
    layer.register_forward_hook(lambda _m, _i, out: seen.append(out.is_cuda))
    layer.register_full_backward_hook(
        lambda _m, _gi, go: seen.append(go[0].is_cuda)  # type: ignore[index]  # torch's
    )
    inputs = torch.ones(1, 2, device="cuda", requires_grad=True)
    inputs.register_hook(lambda grad: seen.append(grad.is_cuda))

    layer(inputs).sum().backward()

    assert [True, True, True] == seen


def test_the_grad_of_each_thread_is_its_own() -> None:
    """Forward and backward run in any thread."""
    results = []

    def work() -> None:
        weight = torch.ones(3, device="cuda", requires_grad=True)
        (weight * 2).sum().backward()
        assert weight.grad is not None
        results.append(weight.grad.tolist())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [[2.0] * 3] * 3 == results


def test_a_data_loader_feeds_the_card() -> None:
    """Worker processes and pinned batches end on the card."""
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = torch.utils.data.DataLoader(data, batch_size=4, pin_memory=True)

    batches = [batch.cuda(non_blocking=True) for (batch,) in loader]

    assert [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]] == [b.tolist() for b in batches]


def test_an_operator_without_a_cpu_kernel_is_named() -> None:
    """What the CPU cannot compute ends in one error that names the operator."""
    library = torch.library.Library("gpumem_test", "FRAGMENT")
    library.define("cuda_only(Tensor x) -> Tensor")

    with pytest.raises(
        UnsupportedOnSimulatedDeviceError,
        match=r"gpumem_test\.cuda_only.*not supported on the simulated CUDA device",
    ):
        torch.ops.gpumem_test.cuda_only(torch.ones(2, device="cuda"))
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_where_the_cpu_has_none(dtype: torch.dtype) -> None:
    """In single precision, rounded after."""
    source = torch.linspace(0, 1, 64, device="cuda", dtype=dtype).view(1, 4, 4, 4)

    result = functional.avg_pool3d(source, 2)

    wide = functional.avg_pool3d(source.cpu().float(), 2)
    assert torch.equal(wide.to(dtype), result.cpu())
    assert result.is_cuda


def test_what_the_cpu_computes_in_other_types_only() -> None:
    """Whole numbers in a histogram are a card's; for other gaps the error has a name."""
    source = torch.tensor([0, 1, 1, 3], device="cuda", dtype=torch.int32)

    assert [1, 2, 0, 1] == torch.histc(source, 4, 0, 3).tolist()
    assert torch.int32 == torch.histc(source, 4, 0, 3).dtype
    with pytest.raises(UnsupportedOnSimulatedDeviceError, match=r"aten\.linalg_lu"):
        torch.linalg.lu_factor(torch.eye(2, device="cuda"), pivot=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_chooses_types_as_on_a_card(dtype: torch.dtype) -> None:
    """Products run in the lower type, norms and sums in fp32, concatenation widens."""
    layer = nn.Linear(4, 4).cuda()
    norm = nn.LayerNorm(4).cuda()
    inputs = torch.ones(2, 4, device="cuda")

    with torch.autocast("cuda", dtype=dtype):
        product = layer(inputs)
        results = [
            product,
            product + product,
            norm(product),
            product.softmax(-1),
            product.sum(),
            torch.cat([product, inputs]),
        ]
    product.float().sum().backward()

    assert [dtype, dtype, *[torch.float32] * 4] == [each.dtype for each in results]
    assert layer.weight.grad is not None
    assert torch.float32 == layer.weight.grad.dtype
    assert torch.float32 == layer(inputs).dtype


def test_autocast_runs_some_operators_in_their_widest_type() -> None:
    """Those of the list PROMOTE in ``autocast_mode.h``, also with tensors in lists."""
    half = torch.ones(3, device="cuda", dtype=torch.float16)
    single = torch.ones(3, device="cuda")
    place = torch.tensor([0], device="cuda")

    with torch.autocast("cuda"):
        results = [
            torch.addcdiv(half, half, single),
            torch.atan2(single, half),
            torch.addcdiv(half, half, half),
            half.index_put([place], single[:1]),
            torch.tensordot(half, single, 1),
        ]

    wide, narrow = torch.float32, torch.float16
    assert [wide, wide, narrow, wide, wide] == [each.dtype for each in results]


def test_autocast_keeps_a_weights_cast_for_its_region() -> None:
    """A parameter is cast once in a region; its copy goes with the region."""
    layer = nn.Linear(512, 512, bias=False).cuda()
    inputs = torch.ones(1, 512, device="cuda")
    with torch.no_grad(), torch.autocast("cuda"):
        layer(inputs)
    before = torch.cuda.memory_allocated()

    with torch.autocast("cuda"):
        layer(inputs)
        once = torch.cuda.memory_allocated() - before
        layer(inputs)
        twice = torch.cuda.memory_allocated() - before

    assert 512 * 512 * 2 == once == twice
    assert before == torch.cuda.memory_allocated()


def test_a_scaler_scales_gradients() -> None:
    """GradScaler and autocast train as on a card."""
    layer = nn.Linear(4, 1).cuda()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    before = layer.weight.tolist()

    with torch.autocast("cuda"):
        loss = layer(torch.ones(2, 4, device="cuda")).sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()

    assert 8.0 == scaler.get_scale()
    assert before != layer.weight.tolist()


def test_gradients_of_a_change_of_type_stay_on_the_card() -> None:
    """Backward through half-precision attention gives every tensor a card's gradient."""
    query = torch.randn(1, 2, 8, 16, device="cuda").half().requires_grad_()
    mask = torch.ones(1, 1, 8, 8, device="cuda", dtype=torch.bool)
    attended = nn.functional.scaled_dot_product_attention(
        query, query, query, attn_mask=mask, dropout_p=0.1
    )
    attended.float().sum().backward()

    assert query.grad is not None
    assert "cuda:0" == str(query.grad.device)
