"""Attention as the CUDA kernels hold memory for it.

A simulated tensor is one of the CPU to C++, so torch would choose the CPU's way to
compose it, which saves other tensors for backward than CUDA's fused
kernels do. Here the choice, what is allocated and what is saved are CUDA's; the values
are the CPU's.

Sources, torch 2.13: ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`` (which
kernel runs), ``attention.cu`` and ``flash_attn/flash_api.cpp`` (what it allocates),
``attention_backward.cu``.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.rng import (
    GENERATOR,
    draw_kept,
    generator_of,
)
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_math_attention: Final[Any] = torch.ops.aten._scaled_dot_product_attention_math.default

#: The memory-efficient kernel stores a logarithm for each row, rows rounded up to this.
#: Source: ``kAlignLSE`` of ``mem_eff_attention/kernel_forward.h``.
_ALIGN_LSE: Final = 32
#: A mask's last dimension is padded to a multiple of this. Source: ``pad_bias``.
_ALIGN_BIAS: Final = 16
#: Widest head of the flash kernels. Source: ``check_head_dim_size_flash``.
_WIDEST_FLASH: Final = 256
_HALVES: Final = (torch.float16, torch.bfloat16)
_FLOAT_BYTES: Final = 4


def choose_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    capability: tuple[int, int],
) -> str:
    """Return which kernel CUDA runs: ``"flash"``, ``"efficient"`` or ``"math"``.

    Limits: cuDNN's kernel, which torch tries last, is never chosen; groups of heads
    and masks that need a gradient go to ``math``.
    """
    tensors = (query, key, value)
    width = query.shape[-1]
    is_plain = (
        all(each.dim() == 4 and each.stride(-1) == 1 for each in tensors)  # noqa: PLR2004  # batch, head, row, width
        and all(each.shape[-2] > 0 for each in tensors)
        and query.shape[1] == key.shape[1] == value.shape[1]
        and query.shape[0] == key.shape[0] == value.shape[0]
        and width == key.shape[-1]
        and (mask is None or not mask.requires_grad)
    )
    if not is_plain:
        return "math"
    backends = torch.backends.cuda
    if (
        backends.flash_sdp_enabled()
        and mask is None
        and query.dtype in _HALVES
        and capability >= (8, 0)
        and width == value.shape[-1]
        and width <= _WIDEST_FLASH
    ):
        return "flash"
    alignment = 4 if query.dtype is torch.float32 else 8
    if (
        backends.mem_efficient_sdp_enabled()
        and query.dtype in (torch.float32, *_HALVES)
        and (query.dtype is not torch.bfloat16 or capability >= (8, 0))
        and capability >= (5, 0)
        and (capability < (8, 0) or width % alignment == 0)
        and value.shape[-1] % alignment == 0
    ):
        return "efficient"
    return "math"


def attention(  # noqa: PLR0917  # the operator's signature
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``aten.scaled_dot_product_attention`` by the kernel that CUDA would choose."""
    __tracebackhide__ = True
    tensors = (query, key, value)
    kernel = "math"
    if all(type(each) is SimulatedTensor for each in tensors) and not enable_gqa:
        capability = query._card.card.compute_capability
        kernel = choose_kernel(query, key, value, attn_mask, capability)
    if kernel == "math" or (attn_mask is not None and is_causal):
        mask = attn_mask
        if is_causal and mask is None:
            # C++ would make it on what it takes for the operands' device, the host.
            rows, columns = query.shape[-2], key.shape[-2]
            ones = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
            mask, is_causal = ones.tril(), False
        bias = _as_bias(mask, query) if mask is not None else None
        fused = None
        if all(type(each) is SimulatedTensor for each in tensors):
            settings = (dropout_p, mask is not attn_mask or is_causal, scale)
            fused = _FusedOnHost.of(tensors, attn_mask, settings, enable_gqa)
        if fused is not None:
            query, key, value = map(fused.watch, range(3), tensors)
        composed: torch.Tensor = _math_attention(
            query,
            key,
            value,
            bias,
            dropout_p,
            is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )[0]
        if fused is not None:
            fused.give_values(composed)
        return composed
    bias = None if attn_mask is None else _padded(_as_bias(attn_mask, query))
    saves = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    options = (dropout_p, is_causal, scale, kernel, saves)
    result: torch.Tensor = _Attention.apply(query, key, value, bias, options)  # type: ignore[no-untyped-call]  # torch's
    return result


def _as_bias(mask: Any, query: torch.Tensor) -> Any:
    """Turn a mask of booleans into numbers to add: ``convert_boolean_attn_mask``."""
    if mask.dtype is not torch.bool:
        return mask
    bias = torch.zeros_like(mask, dtype=query.dtype)
    return bias.masked_fill_(mask.logical_not(), -math.inf)


def _padded(bias: Any) -> Any:
    """Give a mask rows of an aligned length, as ``preprocess_mask`` does."""
    length = bias.shape[-1]
    if length % _ALIGN_BIAS == 0:
        return bias
    return functional.pad(bias, (0, -length % _ALIGN_BIAS))[..., :length]


class _FusedOnHost:
    """The CPU's values for attention that it fuses and the card composes.

    Groups of heads in single precision are the common case. Bytes, and what is saved for
    backward, are those of the composed operators; values and gradients are put in place
    of theirs, which differ in the last bit. Nothing of the card's is kept here.
    """

    def __init__(self, tensors: Any, mask: Any, settings: Any, *, groups: bool) -> None:
        # Copies: the values' own storages hold bytes of the card.
        with HOST_ROOM:
            self._values = [each._value.detach().clone() for each in tensors]
        self._mask, self._settings, self._groups = mask, settings, groups
        self._grad: torch.Tensor | None = None
        self._found: Sequence[torch.Tensor] = ()
        self._is_plain = True

    @classmethod
    def of(
        cls,
        tensors: Any,
        mask: Any,
        settings: Any,
        groups: bool,  # noqa: FBT001  # the operator's own
    ) -> _FusedOnHost | None:
        """Return what the CPU makes of operands; None where it composes them, too."""
        dropout_p, is_causal, scale = settings
        values = [each._value for each in tensors]
        if values[0].device.type == "meta" or dropout_p > 0:
            return None
        if mask is not None and (mask.requires_grad or not hasattr(mask, "_value")):
            return None
        mask = None if mask is None else mask._value
        options = {"scale": scale, "enable_gqa": groups}
        query, key, value = values
        way = torch._fused_sdp_choice(
            query, key, value, mask, 0.0, is_causal, **options
        )
        if way == SDPBackend.MATH.value:
            return None
        mask = None if mask is None else mask.clone()
        return cls(tensors, mask, settings, groups=groups)

    def watch(self, index: int, operand: Any) -> Any:
        """Return an operand to compose of, which will get the CPU's gradient."""
        if not (torch.is_grad_enabled() and operand.requires_grad):
            return operand
        watched = operand.view_as(operand)
        watched.register_hook(partial(self._take, index))
        return watched

    def give_values(self, composed: Any) -> None:
        """Put the CPU's values into a result, and wait for its gradient."""
        composed._value.copy_(self._compute(self._values))
        if composed.requires_grad:
            composed.register_hook(self._see)
        else:
            self._values = []

    def _compute(self, values: Any) -> torch.Tensor:
        query, key, value = values
        _dropout_p, is_causal, scale = self._settings
        with HOST_ROOM:
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=self._mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=self._groups,
            )

    def _see(self, grad: Any) -> None:
        """Keep the result's gradient.

        Where gradients are differentiated again, an operand's comes by other ways than
        the result, too, from then on: they all keep the values of their graph.
        """
        self._is_plain = self._is_plain and not torch.is_grad_enabled()
        is_known = self._is_plain and type(grad) is SimulatedTensor
        self._grad = grad._value.clone() if is_known else None
        self._found = ()

    def _take(self, index: int, grad: Any) -> None:
        """Put the CPU's gradient of an operand in place of the composed one."""
        if self._grad is None or type(grad) is not SimulatedTensor:
            return
        if not self._found:
            with torch.enable_grad():
                leaves = [each.detach().requires_grad_() for each in self._values]
                result = self._compute(leaves)
                self._found = torch.autograd.grad(result, leaves, self._grad)
        grad._value.copy_(self._found[index])


class _Attention(torch.autograd.Function):
    """A fused kernel: keeps its operands, its result and a logarithm for each row."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes them so
        ctx: Any, query: Any, key: Any, value: Any, bias: Any, options: Any
    ) -> Any:
        __tracebackhide__ = True
        dropout_p, is_causal, scale, kernel, saves = options
        card = query._card
        batch, heads, rows, _width = query.shape
        out = _empty_rows_first(query, value.shape[-1])
        aligned = -(-rows // _ALIGN_LSE) * _ALIGN_LSE
        if kernel == "flash":
            # The random state and a number that is not used live on the card.
            sizes = [batch * heads * rows * _FLOAT_BYTES, 16, 8]
        else:
            sizes = [batch * heads * aligned * _FLOAT_BYTES] if saves else []
        kept = [_kept(card, nbytes) for nbytes in sizes]
        seed = None
        if card.value_device != "meta":
            seed = _draw_seed(card) if dropout_p > 0 else None
            values = (query._value, key._value, value._value)
            mask = None if bias is None else bias._value
            settings = (dropout_p, is_causal, scale)
            out._value.copy_(_compute(values, mask, settings, seed))
        ctx.save_for_backward(query, key, value, bias, *kept)
        ctx.options, ctx.seed = options, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # one gradient
        __tracebackhide__ = True
        query, key, value, bias, *_kept = ctx.saved_tensors
        dropout_p, is_causal, scale, kernel, _saves = ctx.options
        card = query._card
        batch, heads, rows, width = query.shape
        scratch = []
        grads = [
            _empty_rows_first(each, each.shape[-1]) for each in (query, key, value)
        ]
        if kernel == "flash":
            # Rounded rows: dot products of gradient and result, and dQ in fp32.
            rounded = -(-rows // 128) * 128
            scratch.append(_scratch(card, batch * heads * rounded * _FLOAT_BYTES))
            wide = -(-width // 32) * 32
            scratch.append(
                _scratch(card, batch * rounded * heads * wide * _FLOAT_BYTES)
            )
        else:
            scratch.append(_scratch(card, batch * heads * rows * _FLOAT_BYTES))
        if card.value_device != "meta":
            values = [each._value.detach() for each in (query, key, value)]
            mask = None if bias is None else bias._value
            with torch.enable_grad():
                leaves = [each.requires_grad_() for each in values]
                settings = (dropout_p, is_causal, scale)
                again = _compute(leaves, mask, settings, ctx.seed)
                found = torch.autograd.grad(again, leaves, grad._value)
            for made, computed in zip(grads, found, strict=True):
                made._value.copy_(computed)
        del scratch
        return (*grads, None, None)


def _empty_rows_first(like: Any, width: int) -> Any:
    """Return an empty (batch, heads, rows, width) whose memory has rows before heads."""
    __tracebackhide__ = True
    batch, heads, rows, _width = like.shape
    card = like._card
    memory = Memory(card, batch * rows * heads * width * like.element_size())
    value = torch.empty(
        (batch, rows, heads, width), dtype=like.dtype, device=card.value_device
    )
    hold(value.untyped_storage(), memory)
    return make(value.transpose(1, 2), card)


def _kept(card: SimulatedCard, nbytes: int) -> Any:
    """Return bytes on the card that are kept for backward; nobody reads them."""
    __tracebackhide__ = True
    memory = Memory(card, nbytes)
    value = torch.empty(nbytes, dtype=torch.uint8, device=card.value_device)
    hold(value.untyped_storage(), memory)
    return make(value, card)


def _scratch(card: SimulatedCard, nbytes: int) -> Memory:
    """Hold bytes on the card that nobody reads."""
    __tracebackhide__ = True
    return Memory(card, nbytes)


def _draw_seed(card: SimulatedCard) -> int:
    """Draw what dropout's mask is made from, once for forward and again for backward."""
    seed = torch.empty((), dtype=torch.int64, device="cpu")
    return int(torch.ops.aten.random_(seed, generator=generator_of(card)))


def _compute(
    values: Any,
    mask: torch.Tensor | None,
    settings: tuple[float, bool, float | None],
    seed: int | None,
) -> torch.Tensor:
    """Compute attention on the host.

    Args:
        values: Query, key and value.
        mask: To be added to the scores.
        settings: Dropout's probability, whether it is causal, the scale.
        seed: What dropout's mask is made from; None without dropout.
    """
    dropout_p, is_causal, scale = settings
    query, key, value = values
    with HOST_ROOM:
        if seed is None:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=is_causal, scale=scale
            )
        _, weights = _math_attention(
            query, key, value, mask, 0.0, is_causal, scale=scale
        )
        generator = GENERATOR().manual_seed(seed)
        kept, factor = draw_kept(weights.shape, dropout_p, generator)
        result: torch.Tensor = (weights * kept * factor) @ value
        return result


register(
    "scaled_dot_product_attention",
    composed=only(attention),
    source="transformers/cuda/sdp_utils.cpp, select_sdp_backend",
)
