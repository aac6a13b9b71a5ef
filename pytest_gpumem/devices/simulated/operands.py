"""The operands of one call: unwrapped, and held to a card's rules on where they are.

Note [Device checks]
A card's kernel checks its operands in one of two ways. Generated code compares all of
them with the first one, single numbers too (``common_device_check``). Operators marked
``device_check: NoCheck`` leave it to ``TensorIterator``, which takes a single number of
the host where it only reads it, or have a check of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from pytest_gpumem.devices.simulated.checks import INDEXING, check_indexing
from pytest_gpumem.devices.simulated.tensor import SimulatedTensor

if TYPE_CHECKING:
    from pytest_gpumem.devices.simulated.machine import SimulatedCard

#: Operators that take CPU tensors beside CUDA ones, by packet name.
#: Source: torch's own operators accept host lengths and step counters.
TAKES_HOST_TENSORS: Final = frozenset(
    {
        "_pack_padded_sequence",
        "_ctc_loss",
        "_fused_adam_",
        "_fused_adamw_",
        "_fused_sgd_",
        "_fused_adagrad_",
        "_amp_foreach_non_finite_check_and_unscale_",
        "_amp_update_scale_",
        "index_fill_",  # how torch 2.15 assigns a number at host indices
        "_foreach_add_",
        "_foreach_copy_",
        "linalg_pinv",  # the tolerances that C++ makes for it
        "randint_like",  # a bound: "high must be a scalar tensor and on CPU"
        "mkldnn_rnn_layer",  # its biases, where a layer has none
    }
)

#: Operators whose kernels compare no devices themselves, by packet name without the
#: underscore of the variant in place. Source: ``device_check: NoCheck`` in
#: ``native_functions.yaml``, torch 2.13, for those of more than one tensor.
UNCHECKED: Final = frozenset(
    [
        "__and__",
        "__iand__",
        "__ilshift__",
        "__ior__",
        "__irshift__",
        "__ixor__",
        "__lshift__",
        "__or__",
        "__rshift__",
        "__xor__",
        "add",
        "addcdiv",
        "addcmul",
        "all",
        "aminmax",
        "angle",
        "any",
        "arctan2",
        "argmax",
        "argmin",
        "as_strided_scatter",
        "atan2",
        "bernoulli",
        "binary_cross_entropy",
        "binary_cross_entropy_with_logits",
        "binomial",
        "bitwise_and",
        "bitwise_left_shift",
        "bitwise_or",
        "bitwise_right_shift",
        "bitwise_xor",
        "clamp",
        "clamp_max",
        "clamp_min",
        "copy",
        "copysign",
        "cummax",
        "cummin",
        "cumprod",
        "cumsum",
        "diagonal_scatter",
        "dist",
        "div",
        "eq",
        "fake_quantize_per_channel_affine",
        "fake_quantize_per_tensor_affine",
        "fill",
        "floor_divide",
        "fmax",
        "fmin",
        "fmod",
        "ge",
        "gelu",
        "glu",
        "gt",
        "heaviside",
        "hypot",
        "index",
        "index_fill",
        "index_put",
        "_index_put_impl",
        "_unsafe_index_put",
        "is_same_size",
        "is_set_to",
        "isfinite",
        "le",
        "lerp",
        "logical_and",
        "logical_or",
        "logical_xor",
        "logsumexp",
        "lt",
        "masked_fill",
        "max",
        "maximum",
        "mean",
        "min",
        "minimum",
        "mse_loss",
        "mul",
        "mvlgamma",
        "ne",
        "norm",
        "normal",
        "normal_functional",
        "poisson",
        "polygamma",
        "pow",
        "prod",
        "remainder",
        "renorm",
        "rsub",
        "select_scatter",
        "set",
        "slice_scatter",
        "smooth_l1_loss",
        "special_chebyshev_polynomial_t",
        "special_chebyshev_polynomial_u",
        "special_chebyshev_polynomial_v",
        "special_chebyshev_polynomial_w",
        "special_hermite_polynomial_h",
        "special_hermite_polynomial_he",
        "special_laguerre_polynomial_l",
        "special_legendre_polynomial_p",
        "special_shifted_chebyshev_polynomial_t",
        "special_shifted_chebyshev_polynomial_u",
        "special_shifted_chebyshev_polynomial_v",
        "special_shifted_chebyshev_polynomial_w",
        "special_xlog1py",
        "special_xlogy",
        "special_zeta",
        "std",
        "std_mean",
        "sub",
        "sum",
        "threshold",
        "true_divide",
        "uniform",
        "var",
        "var_mean",
        "where",
        "xlogy",
        "zero",
    ]
)

#: The convolutions, which compare types before devices.
_CONVOLUTIONS: Final = frozenset(
    {"convolution", "_convolution", "convolution_overrideable"}
)


class Operands:
    """Unwraps the arguments of one call and notes which card they live on."""

    __slots__ = ("card", "host", "outer", "strays")

    def __init__(self) -> None:
        self.card: SimulatedCard | None = None
        self.host: torch.Tensor | None = None
        self.outer: dict[int, SimulatedTensor] = {}
        self.strays: SimulatedCard | None = None

    def outer_values(self) -> list[torch.Tensor]:
        """Return the tensors with the values of the operands on the card."""
        return [outer._value for outer in self.outer.values()]  # the device's own room

    def unwrap(self, value: Any) -> Any:
        """Return an argument with values in the place of tensors of a card."""
        kind = type(value)
        if kind is SimulatedTensor:
            card = value._card
            if self.card is None:
                self.card = card
            elif card is not self.card:
                self.strays = card
            self.outer[id(value._value)] = value
            return value._value
        if kind is list or kind is tuple:
            return kind([self.unwrap(item) for item in value])
        if isinstance(value, torch.Tensor):
            self.host = value
        return value


def in_backward() -> bool:
    """Tell whether autograd is at work in this thread.

    There, torch's own C++ makes helpers on what it takes for the tensors' device, the
    CPU: such an operand or target is no mistake, and no wish, of the user's.
    """
    return bool(torch._C._current_graph_task_id() != -1)  # no public way to ask


def check_devices(func: Any, args: Any, kwargs: Any, operands: Operands) -> None:
    """Refuse operands on devices that the operator does not take together.

    Raises:
        RuntimeError: With torch's text; see Note [Device checks].
    """
    name = func.overloadpacket.__name__
    if name in INDEXING and not in_backward():
        check_indexing(args[0], args[1], args[2] if len(args) > 2 else None)  # noqa: PLR2004  # the values
        return
    if operands.strays is None:
        if name in TAKES_HOST_TENSORS or in_backward():
            return
        # Where no values are kept, operators that torch composes in C++ make their
        # helpers on what it takes for the tensors' device.
        host, card = operands.host, operands.card
        if host is not None and host.is_meta and card and card.value_device == "meta":
            return
    places = _places(func, args, kwargs)
    base = name if name.endswith("__") else name.removesuffix("_")
    if base.startswith("_foreach_"):
        _check_foreach(func, base, places)
    elif base in UNCHECKED or func.namespace != "aten":
        _check_iterated(func, base, places)
    elif name in _CONVOLUTIONS:
        _check_convolution(places)
    else:
        _check_common(name, places)


class _Place:
    """An operand: its argument's name, whether it is written to, and the tensor."""

    __slots__ = ("device", "is_written", "name", "tensor")

    def __init__(self, name: str, is_written: bool, tensor: torch.Tensor) -> None:  # noqa: FBT001  # its own class
        self.name = name
        self.is_written = is_written
        self.tensor = tensor
        self.device = tensor.device


def _places(func: Any, args: Any, kwargs: Any) -> list[_Place]:
    """Return the tensors among the arguments, in the schema's order."""
    places: list[_Place] = []
    for position, argument in enumerate(
        func._schema.arguments
    ):  # it has no public name
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        places.extend(
            _Place(argument.name, is_written, each)
            for each in (value if isinstance(value, (list, tuple)) else (value,))
            if isinstance(each, torch.Tensor)
        )
    return places


def _check_iterated(func: Any, name: str, places: list[_Place]) -> None:
    """Check as ``TensorIterator`` does, which reads single numbers of the host.

    Source: ``TensorIteratorBase::compute_types`` of ``aten/src/ATen/TensorIterator.cpp``;
    ``masked_fill__cuda`` of ``aten/src/ATen/native/cuda/IndexKernel.cpp``; ``resize_out``
    of ``torchgen/dest/register_dispatch_key.py``.
    """
    card = next(
        each.device for each in places if isinstance(each.tensor, SimulatedTensor)
    )
    if name == "masked_fill" and places[1].device != places[0].device:
        raise RuntimeError(
            "expected self and mask to be on the same device, but got mask on "
            f"{places[1].device} and self on {places[0].device}"
        )
    for each in places:
        if each.device == card:
            continue
        is_number = each.device.type == "cpu" and each.tensor.dim() == 0
        if is_number and not each.is_written:
            continue
        if (
            each.is_written
            and each.name == "out"
            and torch.Tag.pointwise not in func.tags
        ):
            raise RuntimeError(
                f"Expected out tensor to have device {card}, but got {each.device} instead"
            )
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, {card} and {each.device}!"
        )


def _check_foreach(func: Any, name: str, places: list[_Place]) -> None:
    """Check lists as their elements; a number for all of them is the card's.

    Source: ``aten/src/ATen/native/cuda/ForeachBinaryOpScalarTensor.cu``.
    """
    number = places[-1]
    if func._overloadname == "Tensor" and number.device != places[0].device:
        raise RuntimeError(
            f"scalar tensor expected to be on {places[0].device} but is on "
            f"{number.device}"
        )
    _check_iterated(func, name, places)


def _check_common(name: str, places: list[_Place]) -> None:
    """Check as generated code does, which takes nothing from another device.

    Source: ``common_device_check_failure`` of ``c10/core/impl``.
    """
    first = places[0].device
    for each in places:
        if each.device != first:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but got {each.name} is "
                f"on {each.device}, different from other tensors on {first} (when "
                f"checking argument in method wrapper_CUDA_{name})"
            )


def _check_convolution(places: list[_Place]) -> None:
    """Check as ``check_input_same_type_as_parameters`` of ``Convolution.cpp`` does."""
    source = places[0]
    for each in places[1:]:
        if each.device.type != source.device.type:
            raise RuntimeError(
                f"Input type ({_type(source.tensor)}) and {each.name} type "
                f"({_type(each.tensor)}) should be the same"
            )
    _check_common("_cudnn_convolution", places)


def _type(tensor: torch.Tensor) -> str:
    """Return a tensor's type in C++'s words, as ``torch.cuda.FloatTensor``."""
    return str(tensor.type())
