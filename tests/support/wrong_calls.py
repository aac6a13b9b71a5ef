"""Calls that a card refuses, and what PyTorch's own CUDA code said about them."""

from __future__ import annotations

import json
import lzma
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from torch.nn.parallel import comm
from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RECORDED: Final = Path(__file__).parents[1] / "recordings" / "refusals.json.xz"

#: Calls of tensors with wrong devices, dtypes or shapes, as people write them by mistake.
#: None depends on values, which PyTorch's CUDA code does not have without a card.
CALLS: Final = """
card @ half
card @ whole
card @ double
card @ host
card @ torch.ones(4, 3, device="cuda")
truth @ truth
whole @ whole
torch.mm(card, card, out=host)
torch.addmm(card, card, half)
torch.addmm(half, card, card)
torch.addmm(card, card, host)
torch.addmm(card, card, torch.ones(4, 4, device="cuda"))
torch.bmm(card[None], half[None])
torch.bmm(card[None], host[None])
torch.bmm(card[None], torch.ones(2, 3, 3, device="cuda"))
torch.bmm(card, card)
torch.baddbmm(card[None], card[None], half[None])
torch.baddbmm(card[None], card[None], host[None])
torch.addbmm(card, card[None], host[None])
torch.mv(card, half[0])
torch.mv(card, host[0])
torch.mv(host, card[0])
torch.mv(card, torch.ones(4, device="cuda"))
torch.dot(card[0], half[0])
torch.dot(card[0], host[0])
torch.dot(card[0], torch.ones(4, device="cuda"))
torch.dot(whole[0], whole[0])
torch.vdot(whole[0], whole[0])
torch.addmv(card[0], card, half[0])
torch.addmv(card[0], card, host[0])
torch.addr(card, card[0], half[0])
torch.outer(card[0], host[0])
torch.einsum("ij,jk->ik", card, half)
torch.tensordot(card, half, 1)
card[None].expand(2, 3, 3) @ half
card[None].expand(2, 3, 3) @ host
card[None].expand(2, 3, 3) @ host[None].expand(2, 3, 3)
torch.linalg.multi_dot([card, host, card])
torch.kron(card, host)
torch.cross(card, host, dim=1)
functional.linear(card, half)
functional.linear(card, card, half[0])
functional.linear(card, host)
functional.linear(card, card, host[0])
functional.linear(host, card)
functional.linear(host, card, card[0])
functional.linear(card[None], half, card[0])
functional.linear(card[None], host, card[0])
functional.linear(host[None], card, card[0])
functional.linear(card, torch.ones(4, 4, device="cuda"))
functional.linear(whole, card)
functional.bilinear(card, card, torch.ones(3, 3, 3))
torch.nn.Linear(3, 3).cuda()(host)
torch.nn.Linear(3, 3).cuda().half()(card)
torch.nn.Linear(3, 3).cuda()(whole)
torch.nn.Embedding(3, 3).cuda()(host.long())
torch.nn.LayerNorm(3).cuda()(host)
torch.nn.LayerNorm(3).cuda()(half)
torch.nn.BatchNorm1d(3).cuda()(host)
torch.nn.GRUCell(3, 3).cuda()(host)
torch.nn.LSTMCell(3, 3).cuda()(host)
torch.nn.MultiheadAttention(3, 1).cuda()(host, host, host)
torch.nn.TransformerEncoderLayer(4, 2, batch_first=True).cuda().eval()(torch.ones(1, 2, 4))
recurrent(torch.nn.LSTM, torch.ones(2, 1, 3))
recurrent(torch.nn.LSTM, torch.ones(2, 1, 3, device="cuda").half())
recurrent(torch.nn.LSTM, torch.ones(2, 1, 5, device="cuda"))
recurrent(torch.nn.LSTM, torch.ones(2, 1, 3, device="cuda"), (torch.ones(1, 1, 3), torch.ones(1, 1, 3)))
recurrent(torch.nn.LSTM, torch.ones(2, 1, 3, device="cuda"), (torch.ones(1, 2, 3, device="cuda"),) * 2)
recurrent(torch.nn.GRU, torch.ones(2, 1, 3))
recurrent(torch.nn.GRU, torch.ones(2, 1, 3, device="cuda").half())
recurrent(torch.nn.RNN, torch.ones(2, 1, 3))
functional.conv2d(image, weight.half())
functional.conv2d(image, weight, torch.ones(4, device="cuda").half())
functional.conv2d(image, weight.cpu())
functional.conv2d(image, weight, torch.ones(4))
functional.conv2d(image, torch.ones(4, 2, 3, 3, device="cuda"))
functional.conv2d(image, torch.ones(4, 3, 9, 9, device="cuda"))
functional.conv2d(image.long(), weight)
functional.conv_transpose2d(image, weight.transpose(0, 1).half())
functional.batch_norm(image, torch.ones(3), torch.ones(3))
functional.batch_norm(image, torch.ones(4, device="cuda"), torch.ones(4, device="cuda"))
functional.layer_norm(card, (3,), half[0], half[0])
functional.layer_norm(half, (3,), card[0], card[0])
functional.layer_norm(bfloat, (3,), card[0])
functional.layer_norm(card, (3,), host[0], host[0])
functional.layer_norm(card, (4,))
functional.layer_norm(whole, (3,))
functional.group_norm(image, 2)
functional.group_norm(image, 3, image[0, :, 0, 0].half(), image[0, :, 0, 0].half())
functional.rms_norm(card, (3,), half[0])
functional.embedding(card, card)
functional.embedding(host.long(), card)
functional.embedding(host.long(), card, padding_idx=0)
functional.embedding(whole, host)
functional.embedding_bag(card, card)
functional.embedding_bag(whole, card, per_sample_weights=double, mode="sum")
functional.embedding_bag(whole, card, per_sample_weights=half, mode="sum")
functional.embedding_bag(whole, card, per_sample_weights=host, mode="sum")
functional.embedding_bag(whole, card, per_sample_weights=card[0], mode="sum")
functional.embedding_bag(whole.cpu(), card)
functional.embedding_bag(whole[0], card, whole.cpu()[0])
functional.embedding_bag(whole[0], card, host[0])
functional.embedding_bag(whole, image)
functional.cross_entropy(card, host[0].long())
functional.cross_entropy(card, torch.ones(4, dtype=torch.int64, device="cuda"))
functional.cross_entropy(card, card[0])
functional.cross_entropy(card, whole[0], weight=host[0])
functional.nll_loss(card, whole[0].int())
functional.nll_loss(card, host[0].long())
functional.binary_cross_entropy(card, half)
functional.binary_cross_entropy(card, host)
functional.binary_cross_entropy_with_logits(card, host)
functional.mse_loss(card, half)
functional.mse_loss(card, host)
functional.huber_loss(card, host)
functional.kl_div(card, host)
functional.triplet_margin_loss(card, host, card)
functional.cosine_similarity(card, host)
functional.pairwise_distance(card, host)
functional.scaled_dot_product_attention(heads, heads.half(), heads)
functional.scaled_dot_product_attention(heads, heads.cpu(), heads)
functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=half)
functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=host)
functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=card, is_causal=True)
functional.grid_sample(image, torch.ones(1, 4, 4, 2))
functional.grid_sample(image, torch.ones(1, 4, 4, 2, device="cuda").half())
functional.prelu(card, half[0])
functional.prelu(card, host[0])
functional.softmax(whole, 0)
functional.softmax(whole, 1)
functional.log_softmax(whole, 0)
functional.gelu(whole)
functional.relu(truth)
functional.hardswish(whole)
functional.glu(whole[0, :2])
functional.dropout(card, 2.0)
functional.interpolate(card, 2)
functional.interpolate(image.bool(), 2)
functional.interpolate(image.bool(), 2, mode="nearest-exact")
functional.interpolate(image[None].bool(), 2)
functional.interpolate(image.bool(), 2, mode="bicubic", antialias=True)
functional.pad(card[None], (5, 5), mode="reflect")
functional.max_pool1d(image[0].to(torch.complex64), 2)
functional.max_pool2d(card[0], 2)
functional.avg_pool2d(image, 20)
functional.pixel_shuffle(image, 2)
functional.unfold(image, 20)
functional.one_hot(card)
card + host
card + torch.ones(4, 4, device="cuda")
whole.add_(card)
card == host
torch.equal(card, host)
torch.allclose(card, host)
torch.atan2(card, host)
torch.fmod(card, host)
torch.maximum(card, host)
torch.bitwise_and(whole, host.long())
torch.dist(card, host)
torch.clamp(card, host)
torch.clamp(card, host, host)
torch.lerp(card, card, half)
torch.lerp(card, host, 0.5)
torch.lerp(whole, whole, whole)
torch.addcmul(card, card, host)
torch.pow(truth, truth)
torch.polygamma(0, card.to(torch.complex64))
torch.polygamma(1, card.to(torch.complex64))
torch.polygamma(2, card.to(torch.complex64))
torch.cat([card, host])
torch.cat([card, torch.ones(2, 4, device="cuda")])
torch.stack([card, host])
torch.where(truth, card, host)
torch.where(truth.cpu(), card, card)
torch.isin(card, host)
torch.searchsorted(card[0], host[0])
torch.bucketize(card, host[0])
torch.tensor_split(card, whole[0])
torch.tensor_split(card, host[0])
torch.tensor_split(card, host.int()[0, 0])
torch.tensor_split(card, host.long())
torch.tensor_split(card[0, 0], host.long()[0])
torch.block_diag(host, card)
torch.block_diag(card, card, host)
torch.block_diag(card, image)
torch.cartesian_prod(card[0], host[0])
torch.broadcast_tensors(card, host[0], torch.ones(2, device="cuda"))
torch.combinations(card)
torch.meshgrid(card[0], host[0])
torch.column_stack([card, host])
torch.vander(card)
torch.nn.utils.rnn.pad_sequence([card, host])
torch.nn.utils.parameters_to_vector([card, host])
torch.nn.utils.vector_to_parameters(host[0], [card.requires_grad_()])
torch.nn.utils.clip_grad_norm_(card, 1.0)
comm.broadcast(card, (0, -1))
comm.broadcast(card, (9,))
comm.broadcast(card, out=[card, host])
comm.broadcast(card, out=[card, image])
comm.broadcast_coalesced([host], (0,))
comm.broadcast_coalesced([card], (0, -1))
comm.scatter(card, ())
comm.scatter(card, (0,), [1, 2])
comm.scatter(card, (0,), [1])
comm.scatter(host, (-1,))
comm.scatter(host, (0,), dim=2)
comm.scatter(card, out=[])
comm.scatter(card, out=[host])
comm.scatter(card, out=[card, host])
comm.scatter(card, out=[image])
comm.scatter(card, out=[card[:1]])
comm.scatter(card, out=[card], dim=2)
comm.gather(())
comm.gather((card, host))
comm.gather((card, image))
comm.gather((card, card[:, :1]))
comm.gather((card, card), dim=2)
comm.gather((card, host), out=card)
comm.gather((card, card), out=card)
torch.repeat_interleave(card, whole[0].cpu())
torch.take_along_dim(card, whole.cpu(), 0)
torch.trapezoid(card, host)
torch.quantile(half, 0.5)
torch.quantile(card, host[0])
torch.cdist(half, half)
torch.cdist(card, half)
torch.cdist(card, host)
torch.cov(image)
torch.diag(image)
torch.tril(card[0])
torch.bincount(card[0])
torch.unique(card.to(torch.complex64))
torch._foreach_add([card], [host])
card.masked_fill(truth.cpu(), 0)
card.masked_select(truth.cpu())
card.masked_scatter_(truth, host)
card.masked_scatter_(truth.cpu(), card)
card.gather(0, card)
card.gather(0, whole.cpu())
torch.gather(card, 0, whole, out=host)
card.scatter_(0, whole, half)
card.scatter_(0, whole.cpu(), card)
card.scatter_add_(0, whole, host)
card.scatter_reduce_(0, whole, host, "sum")
card[torch.zeros(3, dtype=torch.int64), 1.5]
card.index_select(0, whole[0].cpu())
card.index_put_((whole[0],), half[0])
card.index_add_(0, whole[0], half)
card.index_add_(0, whole[0].cpu(), card)
card.index_copy_(0, whole[0], host)
card.index_fill_(0, whole[0].cpu(), 1.0)
card.take(whole.cpu())
card.put_(whole.cpu(), card)
card.item()
bool(card)
card.numpy()
card.t().view(9)
card.reshape(5)
card.expand(4, 3)
card.copy_(torch.ones(4, 4, device="cuda"))
card.to("cuda:7")
torch.add(card, card, out=whole)
torch.add(card, card, out=host)
torch.cumsum(card, 0, out=host)
torch.topk(card, 1, out=(host[:, :1], whole[:, :1].cpu()))
whole.mean()
whole.std()
torch.linalg.norm(whole)
-truth
truth - truth
whole.sigmoid_()
card.sort(5)
card.topk(9)
card.cumsum(4)
card.to(torch.complex64).sort()
card.to(torch.complex64).topk(1)
torch.linalg.cholesky(torch.ones(3, 4, device="cuda"))
torch.linalg.cholesky(half)
torch.linalg.inv(torch.ones(3, 4, device="cuda"))
torch.linalg.inv(half)
torch.linalg.solve(card, host)
torch.linalg.svd(half)
torch.linalg.svd(torch.ones(50, 50, device="cuda").half())
torch.linalg.eigh(half)
torch.linalg.det(half)
torch.linalg.qr(half)
torch.linalg.lu(half)
torch.multinomial(card[0], 5)
torch.multinomial(whole[0], 1)
torch.randint(5, 1, (3,), device="cuda")
torch.arange(3, 0, 1, device="cuda")
torch.full((2,), "a", device="cuda")
torch.zeros(3, device="cuda", pin_memory=True)
torch.tensor([1.0], device="cuda", pin_memory=True)
card.new_zeros(3, pin_memory=True)
card.new_full((3,), 1.0, pin_memory=True)
card.new_empty(3, device=9)
card.new(3, device="cpu")
card.new(3, device=9)
torch.cuda.FloatTensor(3, device="cpu")
card.pin_memory()
torch.normal(0.0, -1.0, (3,), device="cuda")
torch.linspace(0, 1, -1, device="cuda")
torch.empty(-1, device="cuda")
torch.eye(-1, device="cuda")
torch.randn(3, generator=torch.Generator(), device="cuda")
torch.rand(3, dtype=torch.int64, device="cuda")
card.sum().backward()
card.requires_grad_().exp().backward()
card.requires_grad_().add_(1)
setattr(card.requires_grad_(), "grad", host)
setattr(card.requires_grad_(), "grad", half)
setattr(card.requires_grad_(), "grad", torch.ones(4, device="cuda"))
setattr(card.requires_grad_(), "data", whole)
whole.requires_grad_()
card.share_memory_()
torch.cuda.Stream(device=9)
torch.cuda.set_device(9)
torch.cuda.get_device_properties(9)
torch.cuda.set_per_process_memory_fraction(2.0)
torch.cuda.mem_get_info(9)
torch.cuda.Event().elapsed_time(torch.cuda.Event())
torch.cuda.Event(enable_timing=True).elapsed_time(torch.cuda.Event(enable_timing=True))
""".strip().splitlines()

#: Types in which operators are called for which their kernels are not compiled.
_DTYPES: Final = (
    torch.float16,
    torch.bfloat16,
    torch.complex64,
    torch.int64,
    torch.bool,
)


def _recurrent(kind: Any, *operands: Any) -> Any:
    """Run a recurrent layer without cuDNN."""
    with torch.backends.cudnn.flags(enabled=False):
        return kind(3, 3).cuda()(*operands)


def _names() -> dict[str, Any]:
    """Return the names in ``CALLS``."""
    card = torch.ones(3, 3, device="cuda")
    return {
        "torch": torch,
        "functional": functional,
        "recurrent": _recurrent,
        "comm": comm,
        "card": card,
        "host": torch.ones(3, 3),
        "half": card.half(),
        "bfloat": card.bfloat16(),
        "double": card.double(),
        "whole": torch.zeros(3, 3, dtype=torch.int64, device="cuda"),
        "truth": card > 0,
        "image": torch.ones(1, 3, 8, 8, device="cuda"),
        "weight": torch.ones(4, 3, 3, 3, device="cuda"),
        "heads": card[None, None],
    }


def _said(call: Callable[[], Any]) -> str:
    """Return the class and the first line of the error; ``"no error"`` without one."""
    try:
        call()
    except Exception as error:  # noqa: BLE001  # any error is what is asked for
        text = str(error).partition("\n")[0]
        return f"{type(error).__name__}: {text}"
    return "no error"


def said_of_calls() -> dict[str, str]:
    """Return what is said about each of ``CALLS``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            call: _said(lambda call=call: eval(call, _names()))  # type: ignore[misc]  # noqa: S307  # the text above
            for call in CALLS
        }


def said_of_types(is_wanted: Callable[[str], bool]) -> dict[str, str]:
    """Return what is said about operators in dtypes that their kernels lack.

    Args:
        is_wanted: Takes ``"NAME dtype"`` and returns whether to ask.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: _said(call) for name, call in _typed_calls() if is_wanted(name)}


def _call_in(info: Any, dtype: torch.dtype, known: torch.dtype) -> Any:
    """Call an operator with its first sample; tensors of a known dtype get another."""
    torch.manual_seed(0)
    sample = next(iter(info.sample_inputs("cpu", known)))

    def moved(each: torch.Tensor) -> torch.Tensor:
        return each.to("cuda", dtype if each.dtype == known else each.dtype)

    operands = (sample.input, sample.args, sample.kwargs)
    source, args, options = _pytree.tree_map_only(torch.Tensor, moved, operands)
    return info.op(source, *args, **options)


def _typed_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    from torch_databases import op_db

    for info in op_db:
        name = ".".join(filter(None, (info.name, info.variant_test_name)))
        known = next(
            (each for each in (torch.float32, torch.int64) if each in info.dtypes), None
        )
        for dtype in _DTYPES:
            if known is None or (dtype in info.dtypesIfCUDA and dtype in info.dtypes):
                continue
            kind = str(dtype).removeprefix("torch.")

            call = partial(_call_in, info, dtype, known)
            yield f"{name} {kind}", call


def load() -> tuple[str, dict[str, str], dict[str, str]]:
    """Return the version of torch, and what it said about calls and about types."""
    with lzma.open(RECORDED, "rt", encoding="utf-8") as file:
        recorded = json.load(file)
    return recorded["torch"], recorded["calls"], recorded["types"]
