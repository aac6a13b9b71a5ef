"""The errors of a card for an ``out=`` on another device than the operands.

Generated code and ``TensorIterator`` check most of them (``checks.py``). Operators that
C++ composes make their own checks, or leave them to an operator that they call. Here
they would find no error, because C++ sees a card's tensors on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.operators.declarations import declaration_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

#: The text of generated code. Source: ``resize_out`` of
#: ``torchgen/dest/register_dispatch_key.py``; ``resize_out_helper`` of
#: ``aten/src/ATen/native/Resize.cpp``.
_USUAL: Final = "Expected out tensor to have device {source}, but got {out} instead"
_TWO: Final = (
    "Expected all tensors to be on the same device, but found at least two devices, "
)
#: ``TensorIterator`` takes the first card that it finds, and results come first.
_ITERATED: Final = _TWO + "{first} and {second}!"
FOUND: Final = "expected device {source} but found {out}"
#: The texts of functions in ``LinearAlgebra.cpp``, some of which name the devices the
#: other way round.
_RESULT: Final = (
    ": Expected result and input tensors to be on the same device, but got result on "
    "{out} and input on {source}"
)
_TURNED: Final = (
    ": Expected result and input tensors to be on the same device, but got result on "
    "{source} and input on {out}"
)


def _in(kernel: str, name: str, *, is_out: bool = False) -> str:
    """Return the text of the generated code of an operator that a composed one calls.

    Args:
        kernel: The kernel that the text names.
        name: The operand that it names.
        is_out: Whether the operand is a result, which is compared with another operand.
    """
    devices = ("{out}", "{source}") if is_out else ("{source}", "{out}")
    return (
        f"Expected all tensors to be on the same device, but got {name} is on "
        f"{devices[0]}, different from other tensors on {devices[1]} (when checking "
        f"argument in method wrapper_CUDA_{kernel})"
    )


#: The texts by names of operators, some with an overload; a tuple has one for each result.
#: Source: the errors that the CUDA code of torch 2.13.0 raised, which are recorded in
#: ``tests/recordings/misplaced`` and ``refusals``.
_TEXTS: Final[dict[str, str | tuple[str, ...]]] = {
    "chain_matmul linalg_multi_dot": (
        "multi_dot(): expected out tensor to be on device {source} but got {out}"
    ),
    "cholesky_solve": "cholesky_solve" + _RESULT,
    "cummax cummin logcumsumexp": FOUND,
    "dot": (
        "dot: Expected the output and input tensors to be on the same device, but got the "
        "output tensor on {out}, the 'input' tensor on {source}, and the 'other' tensor "
        "on {source}"
    ),
    "vdot": (
        "vdot: Expected the output and input tensors to be on the same device, but got the "
        "output tensor on {out}, the 'input' tensor on {source}, and the 'other' tensor "
        "on {source}"
    ),
    """
    deg2rad floor_divide gelu hardshrink ldexp log_sigmoid log_sigmoid_forward rad2deg softplus
    softshrink std var where
    """: _ITERATED,
    "inner": (
        "Expected tensor to have {source.type} DeviceType, but got tensor with {out.type} "
        "DeviceType (while checking arguments for inner())"
    ),
    "inverse linalg_inv": _in("linalg_inv_ex_out_inverse", "info"),
    "linalg_cholesky": _in("linalg_cholesky_ex_out_L", "info"),
    "linalg_cond": "linalg.cond" + _RESULT,
    "linalg_det": _in("_linalg_det_out_result", "LU"),
    "linalg_eigvalsh": _in("_linalg_eigh_out_eigenvalues", "eigenvectors"),
    "linalg_householder_product": _in("out_linalg_householder_product_out", "input"),
    "linalg_ldl_factor": _in("linalg_ldl_factor_ex_out_out", "info"),
    "linalg_lu_factor": _in("linalg_lu_factor_ex_out_out", "info"),
    "linalg_matrix_norm nuclear_norm": "linalg.matrix_norm" + _TURNED,
    "linalg_matrix_power": "matrix_power" + _RESULT,
    "linalg_matrix_rank": "torch.linalg.matrix_rank" + _RESULT,
    "linalg_norm": "linalg.norm" + _TURNED,
    "linalg_pinv": "linalg.pinv" + _RESULT,
    "linalg_slogdet": (
        _in("_linalg_slogdet_out_sign", "LU"),
        _in("_linalg_slogdet_out_sign", "logabsdet", is_out=True),
    ),
    "linalg_svdvals": _in("_linalg_svd_out_U", "S", is_out=True),
    "linalg_tensorinv": "tensorinv" + _RESULT,
    "linalg_tensorsolve": "tensorsolve" + _RESULT,
    "linalg_vecdot": "linalg.vecdot" + _TURNED,
    "linear": _in("mm_out_out", "self"),
    "log_softmax": _in("_log_softmax_out_out", "self"),
    "max.unary_out min.unary_out": (
        "Expected self.device() == out.device() to be true, but got false.  (Could this "
        "error message be improved?  If so, please report an enhancement request to "
        "PyTorch.)"
    ),
    "mode": "expected device '{source}' but got '{out}' for {name} output",
    "msort": _in("sort_out_values_stable", "indices"),
    "mv": _in("addmv_out_out", "mat"),
    "nanquantile quantile": (
        "quantile() out tensor must be on the same device as the input tensor"
    ),
    "softmax": _in("_softmax_out_out", "self"),
    "sort": (
        _in("sort_out_values_stable", "indices"),
        _in("sort_out_values_stable", "indices", is_out=True),
    ),
    "special_ndtr": _TWO + "{source} and {out}!",
    "stack _stack": _in("cat_out_out", "tensors"),
    "take_along_dim": (
        "Expected tensor to have {source} Device, but got tensor with {out} Device (while "
        "checking arguments for torch.take_along_dim():)"
    ),
    "tensordot": (
        "tensordot: Expected the output and input tensors to be on the same device, but "
        "got the output tensor on {out}, input tensor a on {source}, and input tensor b "
        "on {source}"
    ),
}
_BY_NAME: Final = {
    name: text for names, text in _TEXTS.items() for name in names.split()
}


def names_of_outs(func: Any) -> list[str]:
    """Return the names of the arguments of an overload that are results."""
    return [each.name for each in func._schema.arguments if each.is_out]


def check_outs(
    func: Any, source: torch.device, outs: Iterable[tuple[str, torch.device]]
) -> None:
    """Check the devices of an operator's given results, if it makes its own check.

    Args:
        func: The overload.
        source: The device of the first operand.
        outs: The name and the device of each result.

    Raises:
        RuntimeError: A result is on another device (torch's message).
    """
    texts = _texts_of(func)
    for number, (name, out) in enumerate(outs):
        text = texts if isinstance(texts, str) else texts[min(number, len(texts) - 1)]
        is_same = out.type == source.type if "{out.type}" in text else out == source
        if text and not is_same:
            first, second = (out, source) if out.type == "cuda" else (source, out)
            raise RuntimeError(
                text.format(
                    source=source, out=out, name=name, first=first, second=second
                )
            )


def _texts_of(func: Any) -> str | tuple[str, ...]:
    name = func.overloadpacket.__name__
    found = _BY_NAME.get(f"{name}.{func._overloadname}", _BY_NAME.get(name))
    if found is not None:
        return found
    is_generated = (
        _has(func, "CompositeExplicitAutograd")
        and not _has(func, "CPU")
        and not declaration_of(func).names_card
    )
    return _USUAL if is_generated else ""


def _has(func: Any, key: str) -> bool:
    found: bool = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    return found


def guarded(func: Any, kernel: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Return a kernel that checks the devices of ``out=`` before it composes an operator.

    Args:
        func: The overload.
        kernel: The kernel; None means that C++ composes the operator.

    Returns:
        The kernel itself for an overload without results, and None for one that C++ does
        not compose.
    """
    names = names_of_outs(func)
    if not names or func.overloadpacket.__name__ not in _BY_NAME:
        return kernel
    if kernel is None:
        if not _has(func, "CompositeImplicitAutograd"):
            return None
        kernel = func.decompose
    chosen = kernel

    def checking(*args: Any, **options: Any) -> Any:
        outs = [(name, options[name].device) for name in names if name in options]
        rest = [each for name, each in options.items() if name not in names]
        source = next(
            (
                each.device
                for each in torch.utils._pytree.tree_leaves((args, rest))
                if isinstance(each, torch.Tensor)
            ),
            None,
        )
        if source is not None:
            check_outs(func, source, outs)
        return chosen(*args, **options)

    return checking


def composed_outs() -> Iterable[tuple[str, Any]]:
    """Yield the name and the overload of each operator with a text of its own."""
    known = set(torch._C._dispatch_get_all_op_names())  # no public API
    for name in _BY_NAME:
        packet = getattr(torch.ops.aten, name.partition(".")[0], None)
        if packet is None:
            continue
        for overload in packet.overloads():
            func = getattr(packet, overload)
            if func.name() in known and names_of_outs(func):
                yield f"{packet.__name__}.{overload}", func
