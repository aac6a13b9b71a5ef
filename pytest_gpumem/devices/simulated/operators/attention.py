"""Attention, with the memory that the CUDA kernels use for it.

In C++ a simulated tensor is a CPU tensor, so torch would choose the CPU's implementation
of attention. That implementation saves other tensors for backward than CUDA's fused
kernels do. This module chooses the kernel, allocates memory and saves tensors as CUDA
does; the CPU computes the values.

Sources, torch 2.13, ``aten/src/ATen/native``: ``transformers/cuda/sdp_utils.cpp`` (which
kernel runs), ``transformers/attention.cpp`` (the steps before and after the kernel),
``transformers/cuda/attention.cu`` and ``attention_backward.cu`` (the memory that the
memory-efficient kernels request), ``transformers/cuda/flash_attn/flash_api.cpp``
(``mha_fwd``, ``mha_bwd``). The sizes of workspaces are in
``kernels/attention_memory.py``.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend

from pytest_gpumem.devices.simulated import layouts
from pytest_gpumem.devices.simulated.capture import capture_of, on_tape
from pytest_gpumem.devices.simulated.memory import HOST_ROOM, Memory, hold
from pytest_gpumem.devices.simulated.operators.composing import only
from pytest_gpumem.devices.simulated.operators.registry import register
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.rng import (
    GENERATOR,
    draw_kept,
    generator_of,
)
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor, make
from pytest_gpumem.kernels import attention_memory as kernels
from pytest_gpumem.kernels.random_numbers import rounded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from pytest_gpumem.devices.simulated.machine import SimulatedCard

_math_attention: Final[Any] = torch.ops.aten._scaled_dot_product_attention_math.default
_on_host: Final[Any] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_on_host_backward: Final[Any] = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
)

#: Each row of a mask starts at a multiple of this many elements.
#: Source: ``preprocess_mask``.
_ALIGN_BIAS: Final = 16
#: The width of a head is padded to a multiple of this for the flash kernels.
#: Source: ``pad_last_dim``.
_ALIGN_HEAD: Final = 8
#: Widest head of the flash kernels. Source: ``check_head_dim_size_flash``.
_WIDEST_FLASH: Final = 256
#: Widest head of cuDNN's kernel on most cards. Source: ``check_cudnn_tensor_shapes``.
_WIDEST_CUDNN: Final = 128
#: Kernels by their numbers. Source: ``SDPBackend`` of ``ATen/SDPBackend.h``.
_KERNELS: Final = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_FUSED: Final = ("flash", "efficient", "cudnn")
_HALVES: Final = (torch.float16, torch.bfloat16)
_FLOAT_BYTES: Final = 4


class AttentionArguments(NamedTuple):
    """The arguments of one call that are not tensors.

    Attributes:
        dropout_p: Probability that a score is dropped.
        is_causal: Whether a row attends only to its own and earlier columns.
        scale: Factor of the scores; None means one divided by the square root of the
            head's width.
        enable_gqa: Whether several query heads may share a key head.
        width: Width of a head before it was padded for the kernel; None if it was not
            padded.
    """

    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    width: int | None = None


def choose_kernel(  # noqa: PLR0917  # the operands of one call
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    capability: tuple[int, int],
    settings: AttentionArguments = AttentionArguments(),  # noqa: B008  # an immutable tuple
) -> str:
    """Return the kernel that CUDA runs: ``flash``, ``efficient``, ``cudnn`` or ``math``.

    They are tried in torch's order of priority, which ``sdpa_kernel`` can set. Limits:
    torch tries cuDNN's kernel first on cards of compute capability 9.0 and 10.0; here
    it comes last on all cards.

    Raises:
        RuntimeError: The program allows none that can run (torch's message).
    """
    tensors = (query, key, value)
    for number in torch._C._get_sdp_priority_order():
        name = _KERNELS.get(number)
        if name == "math" and torch.backends.cuda.math_sdp_enabled():
            return name
        if name in _FUSED and _may_run(name, tensors, mask, capability, settings):
            return name
    cuda = torch.backends.cuda
    efficient, cudnn = cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    if cuda.flash_sdp_enabled() or efficient or cudnn:
        raise RuntimeError("No available kernel. Aborting execution.")
    raise RuntimeError(
        "No viable backend for scaled_dot_product_attention was found. This is likely "
        "due to turning off both the math kernel and the fused kernels."
    )


def _may_run(
    name: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    capability: tuple[int, int],
    settings: AttentionArguments,
) -> bool:
    """Return whether a fused kernel can run a call, and is allowed to."""
    query, key, value = tensors
    is_plain = (
        all(each.dim() == 4 for each in tensors)  # noqa: PLR2004  # dimensions: batch, head, row, width
        and all(each.stride(-1) == 1 or each.shape[-1] == 1 for each in tensors)
        and (mask is None or mask.stride(-1) == 1 or mask.shape[-1] == 1)
        and all(each.shape[-2] > 0 for each in tensors)
        and query.shape[0] == key.shape[0] == value.shape[0] > 0
        and key.shape[1] == value.shape[1]
        and query.shape[-1] == key.shape[-1]
    )
    if not is_plain:
        return False
    if name == "flash":
        return _may_be_flash(*tensors, mask, capability, settings)
    if name == "efficient":
        return _may_be_efficient(*tensors, capability)
    return _may_be_cudnn(*tensors, capability, settings)


def _asking(name: str, function: str) -> Callable[..., bool]:
    """Return the function of ``torch._C`` that says whether a kernel can run a call."""
    original = getattr(torch._C, function)

    def may_run(params: Any, debug: bool = False) -> bool:  # noqa: FBT001, FBT002  # torch's signature
        tensors = (params.query, params.key, params.value)
        if not all(type(each) is SimulatedTensor for each in tensors):
            answer: bool = original(params, debug)
            return answer
        settings = AttentionArguments(
            params.dropout, params.is_causal, enable_gqa=params.enable_gqa
        )
        capability = params.query._gpumem_card.card.compute_capability
        return _may_run(name, tensors, params.attn_mask, capability, settings)

    return may_run


def _may_be_flash(  # noqa: PLR0917  # the operands of one call
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    capability: tuple[int, int],
    settings: AttentionArguments,
) -> bool:
    width = query.shape[-1]
    heads, key_heads = query.shape[1], key.shape[1]
    shares_heads = settings.enable_gqa and heads % key_heads == 0
    # Source: check_requires_grad_and_head_dim_gt192_constraints_on_sm86_89_or_120.
    grows = torch.is_grad_enabled() and any(
        each.requires_grad for each in (query, key, value)
    )
    is_small = (8, 6) <= capability <= (8, 9) or capability[0] == 12  # noqa: PLR2004  # the source is named after these capabilities
    is_too_wide = 192 < width <= 224 or (width > 224 and settings.dropout_p > 0)  # noqa: PLR2004  # the source's widths
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and mask is None
        and query.dtype in _HALVES
        and capability >= (8, 0)
        and width == value.shape[-1]
        and width <= _WIDEST_FLASH
        and (heads == key_heads or shares_heads)
        and not (settings.is_causal and query.shape[-2] != key.shape[-2])
        and not (grows and is_small and is_too_wide)
    )


def _may_be_efficient(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    capability: tuple[int, int],
) -> bool:
    # Source: minimum_gemm_alignment.
    is_half = query.dtype in _HALVES
    has_tensor_cores = capability >= (8, 0) or (capability >= (7, 0) and is_half)
    alignment = 4 if capability >= (8, 0) else 1
    if has_tensor_cores:
        alignment = 8 if is_half else 4
    return (
        torch.backends.cuda.mem_efficient_sdp_enabled()
        and query.dtype in (torch.float32, *_HALVES)
        and (query.dtype is not torch.bfloat16 or capability >= (8, 0))
        and capability >= (5, 0)
        and query.shape[1] == key.shape[1]
        and query.shape[-1] % alignment == 0
        and value.shape[-1] % alignment == 0
    )


def _may_be_cudnn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    capability: tuple[int, int],
    settings: AttentionArguments,
) -> bool:
    """Source: ``can_use_cudnn_attention``, ``check_cudnn_tensor_shapes``."""
    widths = query.shape[-1], value.shape[-1]
    heads, key_heads = query.shape[1], key.shape[1]
    widest = _WIDEST_CUDNN
    if capability == (9, 0):
        widest = _WIDEST_FLASH
    elif capability[0] == 10 and widths == (192, 128):  # noqa: PLR2004  # the source's widths
        widest = widths[0]
    is_strict = (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )
    return (
        torch.backends.cuda.cudnn_sdp_enabled()
        and query.dtype in _HALVES
        and (8, 0) <= capability <= (12, 1)
        and not is_strict
        and max(widths) <= widest
        and not any(each % _ALIGN_HEAD for each in widths)
        and key.shape[-2] > 1
        and not (query.shape[-2] == 1 and settings.dropout_p > 0)
        and (heads == key_heads or (settings.enable_gqa and heads % key_heads == 0))
    )


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
) -> Any:
    """Run ``aten.scaled_dot_product_attention`` with the kernel that CUDA would choose."""
    tensors = (query, key, value)
    _validate(tensors)
    settings = AttentionArguments(dropout_p, is_causal, scale, enable_gqa)
    kernel = "math"
    if all(type(each) is SimulatedTensor for each in tensors):
        capability = query._gpumem_card.card.compute_capability
        kernel = choose_kernel(*tensors, attn_mask, capability, settings)
    if attn_mask is not None and is_causal:
        # torch raises its own error.
        return _math_attention(*tensors, attn_mask, dropout_p, is_causal)[0]
    mask = None if attn_mask is None else _as_bias(attn_mask, query.dtype)
    if kernel == "flash":
        return _flash(query, key, value, settings)
    if kernel == "efficient":
        if mask is not None:
            _check_mask(mask, query.device)
            mask = _aligned(mask).expand(*query.shape[:3], key.shape[2])
        return _fused(query, key, value, mask, settings, kernel)
    if kernel == "cudnn":
        saves = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(
            *tensors, mask, saves, dropout_p, is_causal, scale=scale
        )
        return found[0]
    fused = None
    if all(type(each) is SimulatedTensor for each in tensors):
        told = (dropout_p, is_causal, scale)
        fused = _FusedOnHost.of(tensors, attn_mask, told, enable_gqa)
    if fused is not None:
        query, key, value = map(fused.watch, range(3), tensors)
    composed = _composed(query, key, value, mask, settings)
    if fused is not None:
        fused.give_values(composed)
    return composed


def _beside_meta(func: Any) -> Any:
    """Return the kernel for a call with an operand on ``meta``, which C++ may compose.

    C++ would choose a kernel of the CPU, which adds no mask to a card's scores.
    """

    def kernel(*args: Any, **options: Any) -> Any:
        query, key, value, *rest = args
        if any(isinstance(each, SimulatedTensor) for each in (query, key, value)):
            _validate((query, key, value))
            mask = rest[0] if rest else options.get("attn_mask")
            capability = query._gpumem_card.card.compute_capability
            if choose_kernel(query, key, value, mask, capability) == "math":
                return attention(*args, **options)
        return func.decompose(*args, **options)

    return kernel


def _validate(tensors: tuple[Any, ...]) -> None:
    """Refuse operands of several dtypes or devices: ``validate_sdpa_input``."""
    if len({each.dtype for each in tensors}) > 1:
        # torch's own error, with the dtypes' C++ names.
        query, key, value = (
            torch.empty(each.shape, dtype=each.dtype, device="meta") for each in tensors
        )
        functional.scaled_dot_product_attention(query, key, value)
    devices = query, key, value = [each.device for each in tensors]
    if len(set(devices)) > 1:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got "
            f"query.device: {query} key.device: {key} and value.device: {value} instead."
        )


def _check_mask(mask: Any, device: torch.device) -> None:
    """Refuse a mask on another device, as generated code does for the kernel."""
    if mask.device != device:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but got attn_bias is on "
            f"{mask.device}, different from other tensors on {device} (when checking "
            "argument in method wrapper_CUDA___scaled_dot_product_efficient_attention)"
        )


def _as_bias(mask: Any, dtype: torch.dtype) -> Any:
    """Convert a mask of booleans to an additive mask: ``convert_boolean_attn_mask``."""
    if mask.dtype is not torch.bool:
        return mask
    shown = torch.zeros((), dtype=dtype, device=mask.device)
    hidden = torch.full((), -math.inf, dtype=dtype, device=mask.device)
    bias = torch.where(mask, shown, hidden)
    del hidden  # as in C++, freed before the other tensor
    return bias


def _aligned(mask: Any) -> Any:
    """Pad the rows of a mask to an aligned length: ``preprocess_mask``."""
    length = mask.shape[-1]
    if mask.stride(-1) == 1 and all(
        each % _ALIGN_BIAS == 0 for each in mask.stride()[:-1]
    ):
        return mask
    missing = _ALIGN_BIAS - length % _ALIGN_BIAS
    return functional.pad(mask, (0, missing))[..., :length]


def _flash(query: Any, key: Any, value: Any, settings: AttentionArguments) -> Any:
    """Run the flash kernel, with padded heads if it needs them."""
    width = query.shape[-1]
    missing = -width % _ALIGN_HEAD
    if not missing:
        return _fused(query, key, value, None, settings, "flash")
    settings = settings._replace(width=width)
    query, key, value = (
        functional.pad(each, (0, missing)) for each in (query, key, value)
    )
    return _fused(query, key, value, None, settings, "flash")[..., :width]


def _composed(
    query: Any, key: Any, value: Any, mask: Any, settings: AttentionArguments
) -> Any:
    """Compose attention of other operators: ``_scaled_dot_product_attention_math``."""
    dtype = query.dtype
    # C++ keeps each of these tensors until the function returns.
    kept = [query, key, value]
    reduces = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    if dtype in _HALVES and not reduces:
        query, key, value = query.float(), key.float(), value.float()
        kept += [query, key, value]
    factor = settings.scale
    if factor is None:
        factor = 1 / math.sqrt(query.shape[-1])
    root = math.sqrt(abs(factor))
    query = query * (-root if factor < 0 else root)
    if settings.is_causal:
        rows, columns = query.shape[-2], key.shape[-2]
        ones = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        shown = ones.tril()
        del ones
        mask = _as_bias(shown, query.dtype)
        del shown
    if settings.enable_gqa and query.shape[-3] != key.shape[-3]:
        group = query.shape[-3] // key.shape[-3]
        key = key.repeat_interleave(group, -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    scores = torch.matmul(query, key.transpose(-2, -1) * root)
    if mask is not None:
        # Source: ``kTensorSubclassLike`` of ``TensorSubclassLikeUtils.h``: a tensor on
        # ``meta`` is added out of place.
        scores = scores.add(mask) if mask.is_meta else scores.add_(mask)
    shares = torch.ops.aten._safe_softmax.default(scores, -1)
    del scores
    if settings.dropout_p > 0:
        shares = torch.dropout(shares, settings.dropout_p, True)
    # The operator also returns the attention weights.
    returned = shares.to(dtype)
    result = torch.matmul(shares, value).to(dtype)
    del returned, kept
    return result


def _fused(  # noqa: PLR0917  # the operands of one call
    query: Any,
    key: Any,
    value: Any,
    bias: Any,
    settings: AttentionArguments,
    kernel: str,
) -> Any:
    tensors = (query, key, value)
    saves = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    options = (settings, kernel, saves)
    return _Attention.apply(*tensors, bias, options)  # type: ignore[no-untyped-call]  # torch has no type hints here


class _FusedOnHost:
    """The CPU's values for attention that is fused on the CPU and composed on the card.

    The most common case is grouped heads in single precision. The bytes and the tensors
    saved for backward are those of the composed operators. Their values and gradients are
    replaced by those of the CPU's fused kernel, because the two differ in the last bit.
    This object keeps no memory of the card.
    """

    def __init__(self, tensors: Any, mask: Any, settings: Any, *, groups: bool) -> None:
        # The values are copied, because their storages hold bytes of the card.
        with HOST_ROOM, on_tape(tensors[0]._gpumem_card):
            self._values = [each._gpumem_value.detach().clone() for each in tensors]
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
        groups: bool,  # noqa: FBT001  # the operator's signature
    ) -> _FusedOnHost | None:
        """Return the CPU's fused attention of the operands; None if the CPU composes it."""
        dropout_p, is_causal, scale = settings
        values = [each._gpumem_value for each in tensors]
        if values[0].device.type == "meta" or dropout_p > 0:
            return None
        if mask is not None and (
            mask.requires_grad or not hasattr(mask, "_gpumem_value")
        ):
            return None
        mask = None if mask is None else mask._gpumem_value
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
        """Return an operand for the composed operators; it will get the CPU's gradient."""
        if not (torch.is_grad_enabled() and operand.requires_grad):
            return operand
        watched = operand.view_as(operand)
        watched.register_hook(partial(self._take, index))
        return watched

    def give_values(self, composed: Any) -> None:
        """Copy the CPU's values into a result, and register a hook for its gradient."""
        with on_tape(composed._gpumem_card):
            composed._gpumem_value.copy_(self._compute(self._values))
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
        """Keep the gradient of the result.

        If gradients are differentiated again, an operand's gradient no longer comes only
        from the result. From then on, all gradients keep the values of their graph.
        """
        self._is_plain = self._is_plain and not torch.is_grad_enabled()
        is_known = self._is_plain and type(grad) is SimulatedTensor
        self._grad = None
        if is_known:
            with on_tape(grad._gpumem_card):
                self._grad = grad._gpumem_value.clone()
        self._found = ()

    def _take(self, index: int, grad: Any) -> None:
        """Replace an operand's composed gradient by the gradient that the CPU computes."""
        if self._grad is None or type(grad) is not SimulatedTensor:
            return
        with on_tape(grad._gpumem_card):
            if not self._found:
                with torch.enable_grad():
                    leaves = [each.detach().requires_grad_() for each in self._values]
                    result = self._compute(leaves)
                    self._found = torch.autograd.grad(result, leaves, self._grad)
            grad._gpumem_value.copy_(self._found[index])
        layouts.note(grad._gpumem_value, self._found[index].stride())


class _Attention(torch.autograd.Function):
    """A fused kernel: it saves its operands, its result and a logarithm for each row."""

    @staticmethod
    def forward(  # noqa: PLR0917  # autograd passes positional arguments
        ctx: Any, query: Any, key: Any, value: Any, bias: Any, options: Any
    ) -> Any:
        settings, kernel, saves = options
        card = query._gpumem_card
        run = _flash_forward if kernel == "flash" else _efficient_forward
        out, kept = run(query, key, value, settings, saves)
        seed = None
        if card.value_device != "meta":
            if settings.dropout_p > 0:
                seed = _draw_seed(card)
            values = (query._gpumem_value, key._gpumem_value, value._gpumem_value)
            mask = None
            if bias is not None:
                # The CPU composes attention whose mask requires gradients.
                mask = bias._gpumem_value.detach().requires_grad_(bias.requires_grad)
            with on_tape(card):
                out._gpumem_value[..., : settings.width].copy_(
                    _compute(values, mask, settings, seed)
                )
        if settings.dropout_p > 0:
            generator_of(card).move(_move(query, key, kernel))
        ctx.save_for_backward(query, key, value, bias, out, *kept)
        ctx.options, ctx.seed = options, seed
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # one gradient
        query, key, value, bias, out, *_kept = ctx.saved_tensors
        settings, kernel, _saves = ctx.options
        card = query._gpumem_card
        grows = bias is not None and ctx.needs_input_grad[3]
        if kernel == "flash":
            grads = _flash_backward(grad, query, key, value, out)
        else:
            grads = _efficient_backward(
                grad, query, key, value, bias if grows else None, settings
            )
        if card.value_device != "meta":
            values = [each._gpumem_value.detach() for each in (query, key, value)]
            mask = None if bias is None else bias._gpumem_value.detach()
            with on_tape(card):
                with torch.enable_grad():
                    leaves = [each.requires_grad_() for each in values]
                    if grows and mask is not None:
                        leaves.append(mask.requires_grad_())
                    again = _compute(leaves[:3], mask, settings, ctx.seed)
                    given = grad._gpumem_value[..., : settings.width]
                    found = torch.autograd.grad(again, leaves, given)
                for made, computed in zip(grads, found, strict=True):
                    made._gpumem_value.copy_(computed)
                    layouts.note(made._gpumem_value, computed.stride())
        return (*grads, None, None)[:5] if not grows else (*grads, None)


def _flash_forward(
    query: Any,
    key: Any,
    value: Any,
    settings: AttentionArguments,
    _saves: bool,  # noqa: FBT001  # autograd passes positional arguments
) -> tuple[Any, list[Any]]:
    """Return an empty result and the other tensors that are kept: ``mha_fwd``."""
    del value
    card = query._gpumem_card
    out = _empty_like_rows(query)
    batch, heads, rows, width = query.shape
    logarithms = _made(card, (batch, heads, rows), torch.float32)
    parts = [
        _scratch(card, nbytes)
        for nbytes in kernels.flash_parts(
            batch,
            (heads, key.shape[1]),
            (rows, key.shape[2]),
            width,
            card.card.multi_processor_count,
        )
        if settings.dropout_p == 0
    ]
    state, unused = _made(card, (2,), torch.uint64), _made(card, (), torch.uint64)
    if settings.dropout_p > 0:
        state = _made(card, (2,), torch.uint64)  # replaces the tensor of above
    del parts
    return out, [logarithms, state, unused]


def _efficient_forward(
    query: Any,
    key: Any,
    value: Any,
    settings: AttentionArguments,
    saves: bool,  # noqa: FBT001  # autograd passes positional arguments
) -> tuple[Any, list[Any]]:
    """Return an empty result and the kept tensors: ``_efficient_attention_forward``.

    In a capture, the last two are dropout's seed and offset; else these are on the
    host.
    Source: Note [Seed and Offset Device] of the same function.
    """
    del key, settings
    card = query._gpumem_card
    batch, heads, rows, _width = query.shape
    numbers = 2 if capture_of(card) is not None else 0
    state = [_made(card, (), torch.int64) for _number in range(numbers)]
    out = _empty_rows_first(query, value.shape[-1])
    kept = []
    if saves:
        length = kernels.efficient_logarithms(rows)
        kept.append(_made(card, (batch, heads, length), torch.float32))
    is_half = query.dtype in _HALVES
    if is_half and value.shape[-1] > kernels.WIDEST_IN_REGISTERS:
        _scratch(card, out.numel() * _FLOAT_BYTES)
    return out, kept + state


def _state(kept: list[Any]) -> list[Any]:
    """Return dropout's seed and offset from the tensors of ``_efficient_forward``."""
    made = [each for each in kept if each.dtype is torch.int64]
    return made or [torch.zeros((), dtype=torch.int64) for _number in range(2)]


def _flash_backward(grad: Any, query: Any, key: Any, value: Any, out: Any) -> list[Any]:
    """Return empty gradients, and request the temporary memory of ``mha_bwd``."""
    card = query._gpumem_card
    batch, heads, rows, width = query.shape
    copies = [*_contiguous_rows(grad), *_contiguous_rows(out)]
    grads = [_empty_like_rows(each) for each in (query, key, value)]
    copies += [
        _scratch(card, nbytes)
        for nbytes in kernels.flash_backward(
            batch,
            heads,
            rows,
            width,
            card.card.multi_processor_count,
            deterministic=torch.are_deterministic_algorithms_enabled()
            and not torch.is_deterministic_algorithms_warn_only_enabled(),
        )
    ]
    if heads != key.shape[1]:
        nbytes = batch * heads * key.shape[2] * width * query.element_size()
        copies += [_scratch(card, nbytes), _scratch(card, nbytes)]
    while copies:
        copies.pop()
    return grads


def _efficient_backward(  # noqa: PLR0917  # the operator's signature
    grad: Any, query: Any, key: Any, value: Any, bias: Any, settings: AttentionArguments
) -> list[Any]:
    """Return empty gradients, and request the temporary memory of the backward.

    Source: ``_efficient_attention_backward``.
    """
    card = query._gpumem_card
    batch, heads, rows, width = query.shape
    copies = list(_contiguous_rows(grad))
    grads = [_empty_rows_first(each, each.shape[-1]) for each in (query, key, value)]
    if bias is not None:
        grads.append(_empty_bias(bias))
    kernel = kernels.efficient_kernel(
        card.card.compute_capability,
        max(width, value.shape[-1]),
        is_half=query.dtype in _HALVES,
        drops=settings.dropout_p > 0,
    )
    delta_bytes = batch * heads * rows * _FLOAT_BYTES
    delta = (
        _scratch(card, delta_bytes)
        if kernel.computes_delta
        else _composed_delta(card, value.shape[-1], query)
    )
    nbytes = kernels.efficient_workspace(
        kernel,
        batch * heads,
        (rows, key.shape[2]),
        (width, value.shape[-1]),
        is_deterministic=torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    workspace = _scratch(card, nbytes)
    del delta, workspace, copies
    return grads


def _composed_delta(card: SimulatedCard, value_width: int, query: Any) -> Memory:
    """Request the memory of the operators that compute the rows' dot products.

    They are the dot products of the gradient and the result.
    """
    batch, heads, rows, _width = query.shape
    nbytes = batch * heads * rows * _FLOAT_BYTES
    is_half = query.dtype in _HALVES
    wide = [_scratch(card, nbytes * value_width) for _each in range(2 * is_half)]
    product = _scratch(card, nbytes * value_width)
    delta = _scratch(card, nbytes)
    if heads > 1 and rows > 1:
        delta = _scratch(card, nbytes)  # in the order that the kernel reads
    del product, wide
    return delta


def _contiguous_rows(tensor: Any) -> Iterator[Memory]:
    """Request a contiguous copy of a tensor with rows before heads, if necessary."""
    if not tensor._gpumem_value.transpose(1, 2).is_contiguous():
        yield _scratch(tensor._gpumem_card, tensor.numel() * tensor.element_size())


def _empty_like_rows(like: Any) -> Any:
    """Return the result of ``empty_like`` for a tensor with rows before heads."""
    card = like._gpumem_card
    memory = Memory(card, like.numel() * like.element_size())
    value = torch.empty_like(like._gpumem_value.transpose(1, 2))
    hold(value.untyped_storage(), memory)
    return make(value.transpose(1, 2), card)


def _empty_rows_first(like: Any, width: int) -> Any:
    """Return an empty (batch, heads, rows, width) whose memory has rows before heads."""
    batch, heads, rows, _width = like.shape
    card = like._gpumem_card
    memory = Memory(card, batch * rows * heads * width * like.element_size())
    value = torch.empty(
        (batch, rows, heads, width), dtype=like.dtype, device=card.value_device
    )
    hold(value.untyped_storage(), memory)
    return make(value.transpose(1, 2), card)


def _empty_bias(bias: Any) -> Any:
    """Return an empty gradient of a bias; its rows have an aligned length."""
    card = bias._gpumem_card
    *outer, length = bias.shape
    shape = (*outer, length + -length % _ALIGN_BIAS)
    memory = Memory(card, math.prod(shape) * bias.element_size())
    value = torch.empty(shape, dtype=bias.dtype, device=card.value_device)
    hold(value.untyped_storage(), memory)
    return make(value[..., :length], card)


def _made(card: SimulatedCard, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    """Return an empty tensor on the card that is kept for backward."""
    memory = Memory(card, math.prod(shape) * dtype.itemsize)
    value = torch.empty(shape, dtype=dtype, device=card.value_device)
    hold(value.untyped_storage(), memory)
    return make(value, card)


def _scratch(card: SimulatedCard, nbytes: int) -> Memory:
    """Hold bytes on the card that are never read."""
    return Memory(card, nbytes)


def _move(query: Any, key: Any, kernel: str) -> int:
    """Return the step by which dropout in a kernel advances the generator's offset.

    Source: ``mha_fwd`` of ``transformers/cuda/flash_attn/flash_api.cpp`` (32 for each
    head), ``_efficient_attention_forward`` of ``transformers/cuda/attention.cu`` (one for
    each score).
    """
    batch, heads, rows, _width = query.shape
    of_a_head = 32 if kernel == "flash" else rows * key.shape[2]
    return rounded(batch * heads * of_a_head)


def _draw_seed(card: SimulatedCard) -> int:
    """Draw the seed of dropout's mask; forward and backward use the same seed."""
    seed = torch.empty((), dtype=torch.int64, device="cpu")
    return int(torch.ops.aten.random_(seed, generator=generator_of(card)))


def _compute(
    values: Any,
    mask: torch.Tensor | None,
    settings: AttentionArguments,
    seed: int | None,
) -> torch.Tensor:
    """Compute attention on the host.

    Args:
        values: Query, key and value.
        mask: The mask that is added to the scores.
        settings: The other arguments of the call.
        seed: The seed of dropout's mask; None without dropout.
    """
    if settings.width is not None:
        values = [each[..., : settings.width] for each in values]
    query, key, value = values
    with HOST_ROOM, _host_kernels():
        if seed is None:
            return functional.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                is_causal=settings.is_causal,
                scale=settings.scale,
                enable_gqa=settings.enable_gqa,
            )
        if settings.enable_gqa:
            group = query.shape[1] // key.shape[1]
            key = key.repeat_interleave(group, 1)
            value = value.repeat_interleave(group, 1)
        _, weights = _math_attention(
            query, key, value, mask, 0.0, settings.is_causal, scale=settings.scale
        )
        generator = GENERATOR().manual_seed(seed)
        kept, factor = draw_kept(weights.shape, settings.dropout_p, generator)
        result: torch.Tensor = (weights * kept * factor) @ value
        return result


@contextmanager
def _host_kernels() -> Iterator[None]:
    """Let the CPU compute attention even if the program allows only a card's kernels."""
    cuda = torch.backends.cuda
    if cuda.math_sdp_enabled():
        yield
        return
    uses_flash = cuda.flash_sdp_enabled()
    cuda.enable_math_sdp(True)
    cuda.enable_flash_sdp(True)
    try:
        yield
    finally:
        cuda.enable_math_sdp(False)
        cuda.enable_flash_sdp(uses_flash)


# -- kernels that are called by themselves, as ring attention calls them ------------------

_ALONE: Final = "dropout or a mask of an attention kernel that is called by itself"
_LOWER_RIGHT: Final = (
    "torch.nn.attention.bias.causal_lower_right with dropout, two widths of heads, or more "
    "queries than keys"
)
#: A mask type of ``_efficient_attention_forward``: the mask is aligned with the last row
#: and the last column. Source: ``CausalFromBottomRight`` of
#: ``transformers/cuda/mem_eff_attention/kernel_forward.h``.
_FROM_BOTTOM_RIGHT: Final = 2
_CUDNN: Final = "dropout, a mask, shared heads or two widths in cuDNN's attention"


def _flash_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_flash_attention``.

    Raises:
        RuntimeError: The kernel does not take the tensors (torch's messages).
        UnsupportedOnSimulatedDeviceError: Dropout is used, or the scores are requested.
    """
    query, key, value, dropout_p, is_causal, shows_mask = _filled(
        torch.ops.aten._scaled_dot_product_flash_attention.default, args, kwargs
    )
    card = query._gpumem_card
    is_lower_right = is_causal and query.shape[2] != key.shape[2]
    if is_lower_right:
        _check_lower_right(query, key, value, dropout_p)
    if dropout_p > 0 or shows_mask:
        refuse(_ALONE)
    if card.card.compute_capability < (8, 0):
        raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.")
    if query.dtype not in _HALVES:
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if query.shape[-1] % _ALIGN_HEAD:
        raise RuntimeError(
            "head_size must be a multiple of 8, this is ensured by padding!"
        )
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    out, kept = _flash_forward(query, key, value, settings, True)
    logarithms, state, unused = kept
    _give_values(
        (query, key, value), settings, out, logarithms, is_lower_right=is_lower_right
    )
    lengths = query.shape[2], key.shape[2]
    shown = _made(card, (0,), query.dtype)
    return out, logarithms, None, None, *lengths, state, unused, shown


def _efficient_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_efficient_attention``.

    Raises:
        UnsupportedOnSimulatedDeviceError: There is a mask, or dropout is used.
    """
    query, key, value, bias, saves, dropout_p, is_causal = _filled(
        torch.ops.aten._scaled_dot_product_efficient_attention.default, args, kwargs
    )
    if bias is not None or dropout_p > 0:
        refuse(_ALONE)
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    out, kept = _efficient_forward(query, key, value, settings, saves)
    logarithms = kept[0] if saves else _made(query._gpumem_card, (0,), torch.float32)
    shown = logarithms[..., : query.shape[2]] if saves else None
    _give_values((query, key, value), settings, out, shown)
    return out, logarithms, *_state(kept)


def _check_lower_right(query: Any, key: Any, value: Any, dropout_p: float) -> None:
    """Refuse masks that are aligned with the last row and that the CPU does not compute.

    A row that sees no column has values that depend on the kernel.
    """
    if (
        dropout_p > 0
        or query.shape[-1] != value.shape[-1]
        or query.shape[2] > key.shape[2]
    ):
        refuse(_LOWER_RIGHT)


def _lower_right(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the causal mask of the flash kernels for unequal numbers of rows and columns.

    Source: ``Mask`` of FlashAttention's ``mask.h``, which is aligned with the last row.
    """
    hidden = torch.full((rows, columns), -math.inf, dtype=dtype, device="cpu")
    return hidden.triu(columns - rows + 1)


def _efficient_by_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._efficient_attention_forward``, whose operands have rows before heads.

    Raises:
        UnsupportedOnSimulatedDeviceError: There is a mask of tensors, sequences have
            their own lengths, or dropout is used.
    """
    func = torch.ops.aten._efficient_attention_forward.default
    query, key, value, *masks, dropout_p, masking, saves, lengths, window = _filled(
        func, args, kwargs
    )
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    is_lower_right = masking == _FROM_BOTTOM_RIGHT
    if is_lower_right:
        _check_lower_right(query, key, value, dropout_p)
    given = (*masks, lengths, window)
    if dropout_p > 0 or any(each is not None for each in given):
        refuse(_ALONE)
    settings = AttentionArguments(0.0, masking != 0, kwargs.get("scale"))
    out, kept = _efficient_forward(query, key, value, settings, saves)
    logarithms = kept[0] if saves else _made(query._gpumem_card, (0,), torch.float32)
    shown = logarithms[..., : query.shape[2]] if saves else None
    _give_values(
        (query, key, value), settings, out, shown, is_lower_right=is_lower_right
    )
    sizes = query.shape[2], key.shape[2]
    return out.transpose(1, 2), logarithms, *_state(kept), *sizes


def _efficient_by_rows_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._efficient_attention_backward``, whose operands have rows before heads."""
    grad, query, key, value = (each.transpose(1, 2) for each in args[:4])
    out, logarithms, masking = args[5].transpose(1, 2), args[10], args[14]
    settings = AttentionArguments(0.0, masking != 0, kwargs.get("scale"))
    grads = _efficient_backward(grad, query, key, value, None, settings)
    _give_gradients(
        grads,
        (grad, query, key, value, out),
        logarithms[..., : query.shape[2]],
        settings,
        is_lower_right=masking == _FROM_BOTTOM_RIGHT,
    )
    return (*(each.transpose(1, 2) for each in grads), None)


def _cudnn_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_cudnn_attention``; cuDNN's workspace is not known.

    Raises:
        UnsupportedOnSimulatedDeviceError: There is a mask, dropout is used, or the CPU
            has no kernel for the shapes.
    """
    query, key, value, bias, saves, dropout_p, is_causal, _shows_mask = _filled(
        torch.ops.aten._scaled_dot_product_cudnn_attention.default, args, kwargs
    )
    shapes = {(each.shape[1], each.shape[-1]) for each in (query, key, value)}
    if bias is not None or dropout_p > 0 or len(shapes) > 1:
        refuse(_CUDNN)
    card = query._gpumem_card
    state = [_made(card, (), torch.int64) for _number in range(2)]
    out = torch.empty_like(query)
    logarithms = _made(card, (*query.shape[:3], 1), torch.float32) if saves else None
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    sums = None if logarithms is None else logarithms[..., 0]
    _give_values((query, key, value), settings, out, sums)
    lengths = query.shape[2], key.shape[2]
    return out, logarithms, None, None, *lengths, *state, None


#: Replacements in ``torch._C`` that ``torch.backends.cuda`` calls.
C_ATTENTION: Final[dict[str, Any]] = {
    "_is_flash_attention_available": lambda: True,
    **{
        function: _asking(name, function)
        for name, function in (
            ("flash", "_can_use_flash_attention"),
            ("efficient", "_can_use_mem_efficient_attention"),
            ("cudnn", "_can_use_cudnn_attention"),
        )
    },
}


def _filled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return a call's arguments with the defaults, except for the scale."""
    return [
        args[at] if at < len(args) else kwargs.get(each.name, each.default_value)
        for at, each in enumerate(func._schema.arguments)
        if each.name != "scale"
    ]


def _give_values(
    operands: tuple[Any, Any, Any],
    settings: AttentionArguments,
    out: Any,
    logarithms: Any,
    *,
    is_lower_right: bool = False,
) -> None:
    """Compute the result and, if needed, the logarithms of the rows' sums."""
    card = out._gpumem_card
    if card.value_device == "meta":
        return
    query, key, _value = operands
    with HOST_ROOM, on_tape(card):
        sizes = query.shape[2], key.shape[2]
        found, sums = _on_host(
            *(each._gpumem_value for each in operands),
            0.0,
            settings.is_causal and not is_lower_right,
            attn_mask=_lower_right(*sizes, query.dtype) if is_lower_right else None,
            scale=settings.scale,
        )
        out._gpumem_value.copy_(found)
        if logarithms is not None:
            logarithms._gpumem_value.copy_(sums)


def _flash_alone_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_flash_attention_backward``.

    The result and its logarithms may come from several kernels: ring attention combines
    the results of all ranks.
    """
    grad, query, key, value, out, logarithms, *_lengths = args[:10]
    dropout_p, is_causal = args[10:12]
    if dropout_p > 0:
        refuse(_ALONE)
    grads = _flash_backward(grad, query, key, value, out)
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    _give_gradients(
        grads,
        (grad, query, key, value, out),
        logarithms,
        settings,
        is_lower_right=is_causal and query.shape[2] != key.shape[2],
    )
    return tuple(grads)


def _cudnn_alone_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_cudnn_attention_backward``."""
    grad, query, key, value, out, logarithms, _seed, _offset, bias = args[:9]
    dropout_p, is_causal = args[13:15]
    if bias is not None or dropout_p > 0:
        refuse(_CUDNN)
    copied = grad if grad.stride(-1) == 1 else grad.contiguous()
    grads = [torch.empty_like(each) for each in (query, key, value)]
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    sums = logarithms[..., 0]
    _give_gradients(grads, (copied, query, key, value, out), sums, settings)
    return tuple(grads)


def _efficient_alone_backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run ``aten._scaled_dot_product_efficient_attention_backward``."""
    grad, query, key, value, bias, out, logarithms, *_state = args[:9]
    dropout_p, _wanted, *rest = args[9:]
    is_causal = rest[0] if rest else kwargs.get("is_causal", False)
    if bias is not None or dropout_p > 0:
        refuse(_ALONE)
    settings = AttentionArguments(0.0, is_causal, kwargs.get("scale"))
    grads = _efficient_backward(grad, query, key, value, None, settings)
    shown = logarithms[..., : query.shape[2]]
    _give_gradients(grads, (grad, query, key, value, out), shown, settings)
    return (*grads, None)


def _give_gradients(
    grads: list[Any],
    operands: tuple[Any, ...],
    logarithms: Any,
    settings: AttentionArguments,
    *,
    is_lower_right: bool = False,
) -> None:
    """Compute the gradients of the operands from that of the result."""
    card = operands[0]._gpumem_card
    if card.value_device == "meta":
        return
    _grad, query, key, *_rest = operands
    with HOST_ROOM, on_tape(card):
        sizes = query.shape[2], key.shape[2]
        computed = _on_host_backward(
            *(each._gpumem_value for each in operands),
            logarithms._gpumem_value.to(torch.float32),
            0.0,
            settings.is_causal and not is_lower_right,
            attn_mask=_lower_right(*sizes, query.dtype) if is_lower_right else None,
            scale=settings.scale,
        )
        for made, each in zip(grads, computed, strict=True):
            made._gpumem_value.copy_(each)
            layouts.note(made._gpumem_value, each.stride())


register(
    "_scaled_dot_product_flash_attention",
    handler=_flash_alone,
    source="transformers/cuda/flash_attn/flash_api.cpp, mha_fwd",
)
register(
    "_scaled_dot_product_flash_attention_backward",
    handler=_flash_alone_backward,
    source="transformers/cuda/flash_attn/flash_api.cpp, mha_bwd",
)
register(
    "_scaled_dot_product_cudnn_attention",
    handler=_cudnn_alone,
    source="cudnn/MHA.cpp, run_cudnn_SDP_fprop",
)
register(
    "_scaled_dot_product_cudnn_attention_backward",
    handler=_cudnn_alone_backward,
    source="cudnn/MHA.cpp, run_cudnn_SDP_bprop",
)
register(
    "_scaled_dot_product_efficient_attention",
    handler=_efficient_alone,
    source="transformers/cuda/attention.cu, _efficient_attention_forward",
)
register(
    "_scaled_dot_product_efficient_attention_backward",
    handler=_efficient_alone_backward,
    source="transformers/cuda/attention_backward.cu, _efficient_attention_backward",
)
register(
    "_efficient_attention_forward",
    handler=_efficient_by_rows,
    source="transformers/cuda/attention.cu, _efficient_attention_forward",
)
register(
    "_efficient_attention_backward",
    handler=_efficient_by_rows_backward,
    source="transformers/cuda/attention_backward.cu, _efficient_attention_backward",
)
register(
    "scaled_dot_product_attention",
    composed=only(attention),
    beside_meta=_beside_meta,
    source="transformers/cuda/sdp_utils.cpp, select_sdp_backend",
)
