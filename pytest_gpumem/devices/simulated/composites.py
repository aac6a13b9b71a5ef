"""Operators that PyTorch composes of others, composed anew for the simulated cards.

Their C++ asks tensors for their device and is told the host: it makes helpers there,
or takes a branch that a card's tensors do not take. What comes to a card's own
kernels again is left to C++.
"""

from __future__ import annotations

import math
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated import attention
from pytest_gpumem.devices.simulated.dispatch import COMPOSED
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor
from pytest_gpumem.devices.simulated.transfer import moved
from pytest_gpumem.devices.simulated.values import COMPUTED

if TYPE_CHECKING:
    from collections.abc import Callable

_aten: Final = torch.ops.aten

#: Run on the host as a whole, since their helpers are made there.
_ON_HOST: Final = (
    "combinations",
    "ctc_loss.IntList",
    "ctc_loss.Tensor",
    "istft",
    "linalg_matrix_rank",
    "linalg_matrix_rank.atol_rtol_float",
    "linalg_matrix_rank.atol_rtol_tensor",
    "linalg_matrix_rank.tol_tensor",
    "nanquantile",
    "nanquantile.scalar",
    "one_hot",
    "quantile",
    "quantile.scalar",
    "vander",
)


def _on_host(operator: Any) -> Callable[..., Any]:
    """Return a kernel that computes on the host and moves the result to the card.

    Gradients flow through the moves. Limits: what is saved for backward is held on
    the host, not on the card.
    """
    host = torch.device("cpu")

    def down(value: Any) -> Any:
        return moved(value, host) if isinstance(value, SimulatedTensor) else value

    def kernel(*args: Any, **options: Any) -> Any:
        operands = (*args, *options.values())
        cards = [each.device for each in operands if isinstance(each, SimulatedTensor)]
        _check_quantile(operator, args)
        options = {name: down(value) for name, value in options.items()}
        return moved(operator(*(down(each) for each in args), **options), cards[0])

    return kernel


def _check_quantile(operator: Any, args: tuple[Any, ...]) -> None:
    """Refuse shares on another device: ``quantile_checks`` of ``Sorting.cpp``."""
    if "quantile" not in operator.overloadpacket.__name__:
        return
    source, share = args[:2]
    if isinstance(share, torch.Tensor) and share.device != source.device:
        raise RuntimeError(
            "quantile() q tensor must be on the same device as the input tensor"
        )


def _with_out(operator: Any, functional: Any) -> Callable[..., Any]:
    """Return a kernel of ``out=`` that computes the results and puts them there.

    C++ computes into helpers that it makes on the host. Limits: the results take their
    bytes beside those of ``out``.
    """
    names = [each.name for each in operator._schema.arguments if each.is_out]

    def kernel(*args: Any, **options: Any) -> Any:
        outs = [options.pop(name) for name in names]
        computed = functional(*args, **options)
        results = [computed] if isinstance(computed, torch.Tensor) else [*computed]
        for out, result in zip(outs, results, strict=True):
            if out.dtype is not result.dtype:
                raise RuntimeError(
                    f"Expected out tensor to have dtype {_spelt(result.dtype)}, but got "
                    f"{_spelt(out.dtype)} instead"
                )
            if out.shape != result.shape:
                out.resize_(result.shape)
            out.copy_(result)
        return outs[0] if len(outs) == 1 else tuple(outs)

    return kernel


def _spelt(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("float32", "float")


def _landing(operator: Any) -> Callable[..., Any]:
    """Return a kernel whose result is on the card, where C++ may have made it anew."""

    def kernel(*args: Any, **options: Any) -> Any:
        result = operator.decompose(*args, **options)
        if isinstance(result, SimulatedTensor):
            return result
        return moved(result, args[0].device)

    return kernel


def _softmax(operator: Any) -> Callable[..., Any]:
    """Return ``softmax`` or ``log_softmax`` with ``dtype=``.

    Source: ``aten/src/ATen/native/SoftMax.cpp``: on a card half precision becomes
    single precision inside the kernel.
    """

    def kernel(
        source: torch.Tensor, dim: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        if source.dtype is torch.float16 and dtype is torch.float32:
            widened: torch.Tensor = operator(source, dim, True)
            return widened
        converted = source if dtype is None else source.to(dtype)
        result: torch.Tensor = operator(converted, dim, False)
        return result

    return kernel


def _widening(operator: Any) -> Callable[..., Any]:
    """Return how the CPU computes a softmax that makes single precision of half."""

    def compute(source: torch.Tensor, dim: int, half_to_float: bool) -> Any:  # noqa: FBT001  # the operator's signature
        return operator(source.float() if half_to_float else source, dim, False)

    return compute


def _narrowing(operator: Any) -> Callable[..., Any]:
    """Return how the CPU computes the gradient of such a softmax."""

    def compute(grad: torch.Tensor, output: Any, dim: int, dtype: torch.dtype) -> Any:
        return operator(grad, output, dim, grad.dtype).to(dtype)

    return compute


def _linear(
    source: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``linear``: for a subclass of tensors C++ adds the bias out of place.

    Source: ``aten/src/ATen/native/Linear.cpp``; ``should_fold`` of ``LinearAlgebra.cpp``
    for a weight that requires gradients.
    """
    count = source.dim()
    if bias is not None and count == 2:  # noqa: PLR2004  # rows
        return torch.addmm(bias, source, weight.t())
    shape = (*source.shape[:-1], weight.shape[0])
    if bias is not None and source.is_contiguous():
        rows = source.view(math.prod(source.shape[:-1]), source.shape[-1])
        return torch.addmm(bias, rows, weight.t()).view(shape)
    if count > 2 and weight.requires_grad and weight.dim() == 2:  # noqa: PLR2004  # likewise
        rows = source.reshape(-1, source.shape[-1]) if source.numel() else source
        product: torch.Tensor = rows.matmul(weight.t())
        product = _aten._unsafe_view.default(product, shape)  # the operator's name
    else:
        product = source.matmul(weight.t())
    if bias is None:
        return product
    is_dual = torch.autograd.forward_ad._current_level >= 0  # no public way to ask
    return product.add(bias) if is_dual else product.add_(bias)


def _pad_sequence(
    sequences: list[torch.Tensor],
    batch_first: bool = False,  # noqa: FBT001, FBT002  # the operator's signature
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> torch.Tensor:
    """``pad_sequence``. Source: ``aten/src/ATen/native/PackedSequence.cpp``."""
    longest = max(len(sequence) for sequence in sequences)
    first = sequences[0]
    outer = (len(sequences), longest) if batch_first else (longest, len(sequences))
    padded = first.new_full((*outer, *first.shape[1:]), padding_value)
    for index, sequence in enumerate(sequences):
        start = longest - len(sequence) if padding_side == "left" else 0
        row = padded.select(0 if batch_first else 1, index)
        row.narrow(0, start, len(sequence)).copy_(sequence)
    return padded


def _pad_packed_sequence(
    data: torch.Tensor,
    batch_sizes: torch.Tensor,
    batch_first: bool,  # noqa: FBT001  # the operator's signature
    padding_value: float,
    total_length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``pad_packed_sequence``. Source: as ``_pad_sequence``."""
    sizes = batch_sizes.tolist()
    longest = max(total_length, len(sizes))
    padded = data.new_full((longest, sizes[0], *data.shape[1:]), padding_value)
    start = offset = 0
    # Steps of one batch size lie together and are copied at once.
    for size, steps in ((size, len(list(same))) for size, same in groupby(sizes)):
        chunk = data.narrow(0, offset, size * steps)
        goal = padded.narrow(0, start, steps).narrow(1, 0, size)
        goal.copy_(chunk.view(steps, size, *data.shape[1:]))
        start, offset = start + steps, offset + size * steps
    lengths = [sum(size > row for size in sizes) for row in range(sizes[0])]
    return (
        padded.transpose(0, 1) if batch_first else padded,
        torch.tensor(lengths, device="cpu"),
    )


#: By the operator's name in the ``aten`` namespace.
KERNELS: Final[dict[str, Callable[..., Any]]] = {
    "_pad_packed_sequence": _pad_packed_sequence,
    "dropout": attention.dropout,
    "linear": _linear,
    "log_softmax.int": _softmax(_aten._log_softmax.default),  # the operator's name
    "pad_sequence": _pad_sequence,
    "scaled_dot_product_attention": attention.attention,
    "softmax.int": _softmax(_aten._softmax.default),  # the operator's name
}


#: With ``out=``, by the operator without.
_WITH_OUT: Final = {
    "linalg_inv.out": "linalg_inv",
    "linalg_det.out": "linalg_det",
    "linalg_slogdet.out": "linalg_slogdet",
    "linalg_cholesky.out": "linalg_cholesky",
    "linalg_lu_factor.out": "linalg_lu_factor",
    "linalg_ldl_factor.out": "linalg_ldl_factor",
    "linalg_eigvalsh.out": "linalg_eigvalsh",
    "linalg_svdvals.out": "linalg_svdvals",
    "linalg_matrix_rank.out": "linalg_matrix_rank",
    "linalg_matrix_rank.out_tol_tensor": "linalg_matrix_rank.tol_tensor",
    "linalg_matrix_rank.atol_rtol_float_out": "linalg_matrix_rank.atol_rtol_float",
    "linalg_matrix_rank.atol_rtol_tensor_out": "linalg_matrix_rank.atol_rtol_tensor",
    "inverse.out": "inverse",
    "log_sigmoid.out": "log_sigmoid",
    "msort.out": "msort",
    "nanquantile.out": "nanquantile",
    "nanquantile.scalar_out": "nanquantile.scalar",
    "quantile.out": "quantile",
    "quantile.scalar_out": "quantile.scalar",
}
#: Where C++ may make the result by itself.
_LANDING: Final = ("linalg_matrix_norm", "linalg_matrix_norm.str_ord")


def _operator(name: str) -> Any:
    packet, _dot, overload = name.partition(".")
    return getattr(getattr(_aten, packet), overload or "default")


KERNELS.update({name: _on_host(_operator(name)) for name in _ON_HOST})
KERNELS.update({name: _landing(_operator(name)) for name in _LANDING})
KERNELS.update(
    {
        name: _with_out(_operator(name), _operator(functional))
        for name, functional in _WITH_OUT.items()
    }
)
COMPUTED.update(
    {
        _aten._softmax.default: _widening(_aten._softmax.default),
        _aten._log_softmax.default: _widening(_aten._log_softmax.default),
        _aten._softmax_backward_data.default: _narrowing(
            _aten._softmax_backward_data.default
        ),
        _aten._log_softmax_backward_data.default: _narrowing(
            _aten._log_softmax_backward_data.default
        ),
    }
)
COMPOSED.update({_operator(name): kernel for name, kernel in KERNELS.items()})
