"""Constructors of tensors that would call the CUDA driver, replaced to work without it.

``torch.tensor(…, device="cuda")`` copies in C++ with a device guard that a CPU build
does not have. Here a host tensor is created first and then copied to the card.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, Final

import torch
from torch.utils._device import DeviceContext

from pytest_gpumem.devices.default_device import clear_default_device, default_type
from pytest_gpumem.devices.simulated.copies import mark_pinned
from pytest_gpumem.devices.simulated.cpp_warnings import relayed, warn
from pytest_gpumem.devices.simulated.fake_tensors import checked
from pytest_gpumem.devices.simulated.machine import card_of
from pytest_gpumem.devices.simulated.methods import (
    COPYING,
    cuda_device,
    new_tensor,
)
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.devices.simulated.replaced_classes import ReplacementType
from pytest_gpumem.devices.simulated.rng import GeneratorName, check_generator
from pytest_gpumem.devices.simulated.tensor import DEVICES, SimulatedTensor
from pytest_gpumem.devices.simulated.typed import (
    check_storage,
    host_typed_tensors,
    wanted,
)

_tensor: Final[Any] = torch.tensor
_as_tensor: Final[Any] = torch.as_tensor
_asarray: Final[Any] = torch.asarray
_range: Final[Any] = torch.range
#: The arguments of ``torch.range`` that are not options of a tensor.
_BOUNDS: Final = ("start", "end", "step")


def _goal(device: Any) -> torch.device | None:
    """Return the card that a constructor's ``device`` or the device context names."""
    return cuda_device(_context_device() if device is None else device)


def _context_device() -> torch.device | None:
    """Return the device of the innermost ``with torch.device(…)``, or None."""
    depth = torch._C._len_torch_function_stack()  # no public API
    for position in reversed(range(depth)):
        mode = torch._C._get_function_stack_at(position)  # no public API
        if isinstance(mode, DeviceContext):
            device: torch.device = mode.device
            return device
    return None


def _plain(data: Any) -> Any:
    """Return data in which all nested tensors on cards are replaced by host tensors."""
    if isinstance(data, SimulatedTensor):
        return data.detach().cpu()
    if isinstance(data, (list, tuple)):
        return [_plain(item) for item in data]
    return data


def tensor(data: Any, **options: Any) -> torch.Tensor:
    """Run ``torch.tensor``: copy the data to the host or to a card."""
    if not isinstance(data, torch.Tensor):
        if isinstance(data, (list, tuple)) and data and hasattr(data[0], "__array__"):
            return relayed(lambda: _copy(data, options))  # C++ warns for arrays
        return _copy(data, options)
    # C++ would warn about this module's line.
    warnings.warn(COPYING.format("torch.tensor"), stacklevel=2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "To copy construct from a tensor")
        return _copy(data, options)


def _uploaded(host: torch.Tensor, goal: torch.device) -> torch.Tensor:
    """Return a tensor on a card, and register it with active traces and transforms."""
    return host.to(goal)


def _copy(data: Any, options: dict[str, Any]) -> torch.Tensor:
    goal = _goal(options.get("device"))
    if goal is None and isinstance(data, SimulatedTensor):
        goal = data.device if _device_for(options.get("device")) is None else None
    if goal is None:
        is_pinned = options.pop("pin_memory", False)
        made: torch.Tensor = _tensor(_plain(data), **options)
        if is_pinned:
            mark_pinned(made)
        return made
    requires_grad = options.pop("requires_grad", False)
    options.pop("pin_memory", None)
    host = _tensor(_plain(data), **{**options, "device": "cpu"})
    made = _uploaded(host, goal)
    return made.requires_grad_() if requires_grad else made


def _device_for(device: Any) -> Any:
    """Return a constructor's device: from its argument, or from the device context."""
    return _context_device() if device is None else device


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    """Run ``torch.as_tensor``: return the data itself if it is already such a tensor."""
    if isinstance(data, torch.Tensor):
        named = _device_for(device)
        same = data.device if named is None else named
        return data.to(same, data.dtype if dtype is None else dtype)
    goal = _goal(device)
    if goal is None:
        made: torch.Tensor = _as_tensor(_plain(data), dtype=dtype, device=device)
        return made
    return _uploaded(_as_tensor(_plain(data), dtype=dtype, device="cpu"), goal)


def asarray(
    obj: Any,
    *,
    dtype: torch.dtype | None = None,
    device: Any = None,
    copy: bool | None = None,
    requires_grad: bool = False,
) -> torch.Tensor:
    """Run ``torch.asarray``: return the object as a tensor, sharing memory if possible.

    Source: ``asarray`` of ``torch/csrc/utils/tensor_new.cpp``.

    Raises:
        ValueError: The object's memory cannot be shared as requested (torch's message).
    """
    goal = _goal(device)
    if goal is None and not isinstance(obj, SimulatedTensor):
        made: torch.Tensor = _asarray(
            _plain(obj),
            dtype=dtype,
            device=device,
            copy=copy,
            requires_grad=requires_grad,
        )
        return made
    named = goal if goal is not None else _device_for(device)
    if isinstance(obj, torch.Tensor):
        source = obj
    else:
        # Data that is copied to the card need not be copied on the host before.
        is_shared = copy is False
        source = _asarray(
            _plain(obj), dtype=dtype, device="cpu", copy=False if is_shared else None
        )
    target = source.device if named is None else torch.device(named)
    kind = source.dtype if dtype is None else dtype
    is_elsewhere, is_other = target != source.device, kind is not source.dtype
    if copy is False and is_elsewhere:
        raise ValueError(
            f"can't alias tensor from device '{source.device}' to '{target}'."
        )
    if copy is False and is_other:
        raise ValueError(
            f"can't alias tensor with dtype '{_name(source.dtype)}' into dtype "
            f"'{_name(kind)}'."
        )
    result = source
    if is_elsewhere or is_other:
        result = source.to(target, kind, copy=bool(copy))
    elif copy:
        result = source.clone()
    if not result.is_leaf and not requires_grad:
        return result.detach()
    return result.requires_grad_(requires_grad)


def _name(dtype: torch.dtype) -> str:
    """Return a dtype's name in C++, such as ``Float``."""
    return torch.empty(0, dtype=dtype, device="cpu").type()[6:-6]


def _ranging(*args: Any, **options: Any) -> Any:
    """Run ``torch.range``: C++ would use a device guard for the given device."""
    goal = _goal(options.get("device"))
    if goal is None or options.get("out") is not None:
        return relayed(lambda: _range(*args, **options), depth=1)
    out = torch.empty(0, dtype=options.get("dtype"), device=goal)
    bounds = {name: options[name] for name in _BOUNDS if name in options}
    with torch._C.DisableTorchFunction():  # ``out`` is already on the context's device
        relayed(lambda: _range(*args, **bounds, out=out), depth=1)
    return out.requires_grad_(options.get("requires_grad", False))


def _factory(original: Any) -> Any:
    """Return a factory that accepts ``pin_memory`` and an integer as the card's index."""

    @functools.wraps(original)
    def factory(*args: Any, **options: Any) -> torch.Tensor:
        pinned = options.pop("pin_memory", False)
        device = options.get("device")
        if isinstance(device, int) and not isinstance(device, bool):
            options["device"] = cuda_device(device)
        if options.get("out") is not None and device is not None:
            _check_out(options["out"], torch.device(options.pop("device")))
        make = _ranging if original is _range else original
        made: torch.Tensor = make(*args, **options)
        if options.get("requires_grad"):
            checked(made)
        if options.get("generator") is not None:
            check_generator(options["generator"], made.device.type)
        if pinned:
            if isinstance(made, SimulatedTensor):
                raise RuntimeError("Only dense CPU tensors can be pinned")
            mark_pinned(made)
        return made

    return factory


def _drawing(original: Any) -> Any:
    """Return a function that checks the generator's device for its first tensor.

    ``bernoulli`` fills its ``out=`` in place, on any device.
    """
    draws_into_out = original is torch.bernoulli

    @functools.wraps(original)
    def draw(*args: Any, **options: Any) -> torch.Tensor:
        generator = options.get("generator")
        if generator is not None:
            operands = (options.get("out") if draws_into_out else None, *args)
            source = next(
                (each for each in operands if isinstance(each, torch.Tensor)), None
            )
            if source is not None:
                check_generator(generator, source.device.type)
        result: torch.Tensor = original(*args, **options)
        return result

    return draw


#: Methods of every tensor that create a tensor; they accept a card by its number.
FACTORY_METHODS: Final[dict[str, Any]] = {
    name: _factory(getattr(torch.Tensor, name))
    for name in (
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
    )
} | {"new_tensor": _factory(new_tensor)}

#: The same in ``torch.fft``.
FREQUENCIES: Final[dict[str, Any]] = {
    name: _factory(getattr(torch.fft, name)) for name in ("fftfreq", "rfftfreq")
}

#: Methods that fill a tensor with random numbers.
DRAWING_METHODS: Final[dict[str, Any]] = {
    name: _drawing(getattr(torch.Tensor, name))
    for name in (
        "bernoulli",
        "bernoulli_",
        "cauchy_",
        "exponential_",
        "geometric_",
        "log_normal_",
        "multinomial",
        "normal_",
        "random_",
        "uniform_",
    )
}


def _check_out(out: torch.Tensor, device: torch.device) -> None:
    """Refuse a device other than that of ``out=``, which C++ regards as the host.

    Source: ``check_out_type_matches`` of
    ``torch/csrc/autograd/utils/python_arg_parsing.h``.

    Raises:
        RuntimeError: With torch's message.
    """
    if out.device.type != device.type:
        raise RuntimeError(
            f"device type {device.type} does not match device type of out parameter "
            f"({out.device.type})"
        )


def _refusing_on_cards(name: str, feature: str) -> Any:
    """Return a constructor that refuses cards and works on the host."""
    room, _dot, last = name.rpartition(".")
    original = getattr(getattr(torch, room) if room else torch, last)

    @functools.wraps(original)
    def construct(*args: Any, **options: Any) -> Any:
        leaves = torch.utils._pytree.tree_leaves((args, options))
        on_card = any(isinstance(leaf, SimulatedTensor) for leaf in leaves)
        is_there = on_card or _goal(options.get("device")) is not None
        # A jagged nested tensor is a subclass that contains plain tensors of a card.
        if is_there and torch.jagged not in {*args[3:], options.get("layout")}:
            refuse(feature)
        return relayed(lambda: original(*args, **options))

    return construct


_parse_to: Final[Any] = torch._C._nn._parse_to
_default_tensor_type: Final[Any] = torch.set_default_tensor_type


def parse_to(*args: Any, **options: Any) -> Any:
    """Parse the arguments of ``Module.to``, which may name simulated cards."""
    first, *rest = args or (None,)
    if isinstance(first, int) and not isinstance(first, bool):
        return _parse_to(cuda_device(first), *rest, **options)
    named = options.get("device")
    if isinstance(named, int) and not isinstance(named, bool):
        options["device"] = cuda_device(named)
    other = options.get("tensor", first)
    if isinstance(other, SimulatedTensor):
        options.pop("tensor", None)
        return _parse_to(other.device, other.dtype, *rest, **options)
    return _parse_to(*args, **options)


def set_default_tensor_type(kind: Any, /) -> None:
    """Run ``torch.set_default_tensor_type``: a card's type also sets the device.

    ``torch.Tensor(…)`` has the device of this type, and not the default device. Source:
    ``base_tensor_ctor`` of ``torch/csrc/utils/tensor_new.cpp``.
    """
    warn(
        "torch.set_default_tensor_type() is deprecated as of PyTorch 2.1, please use "
        "torch.set_default_dtype() and torch.set_default_device() as alternatives.",
        once=True,
    )
    clear_default_device()
    dtype, on_card = wanted(kind)
    if on_card:
        torch.set_default_dtype(dtype)
        torch.set_default_device("cuda")
        default_type.is_of_card = True
        return
    name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}"
    typed = CONSTRUCTORS.get(name.removeprefix("torch."))
    _default_tensor_type(kind if typed is None else typed.original)


def new_of_class(*args: Any, **options: Any) -> Any:
    """Run ``torch.Tensor(…)``, also while the default type is a card's.

    The parameters have no names, because TorchDynamo compares them.

    Raises:
        RuntimeError: The argument is a storage on another device (torch's message).
    """
    cls, *data = args
    given = data[0] if len(data) == 1 else None
    if not default_type.is_of_card or isinstance(given, torch.Tensor):
        made = _new_in_cpp(*args, **options)
        if isinstance(given, (torch.TypedStorage, torch.UntypedStorage)):
            check_storage(given, torch.device("cpu"))
        return made
    made = torch.empty(0, device=DEVICES[card_of(None).index]).new(*data, **options)
    return made if cls is torch.Tensor else made.as_subclass(cls)


_new_in_cpp: Final[Any] = torch._C.TensorBase.__new__

_FACTORIES: Final = (
    "arange",
    "bartlett_window",
    "blackman_window",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_strided",
    "eye",
    "full",
    "full_like",
    "hamming_window",
    "hann_window",
    "kaiser_window",
    "linspace",
    "logspace",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "range",
    "scalar_tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
)

_device: Final[Any] = torch.device


class _DeviceType(ReplacementType):
    """Metaclass of the replacement of ``torch.device``."""

    def __call__(cls, *args: Any, **options: Any) -> Any:  # noqa: N805  # this is a metaclass
        index = args[0] if args else options.get("device")
        if isinstance(index, int) and not isinstance(index, bool) and len(args) < 2:  # noqa: PLR2004  # the only argument is an index
            return _device("cuda", index)
        return _device(*args, **options)


class DeviceName(metaclass=_DeviceType):
    """Replaces ``torch.device`` in a build in which ``torch.device(0)`` is no card.

    A CUDA build keeps its own class, in which a number means a card.
    """

    # Pickles contain this name.
    __module__ = "torch"
    __qualname__ = "device"

    original = _device


def _numbers_are_cards() -> bool:
    try:
        return bool(_device(0).type == "cuda")
    except RuntimeError:  # there is no accelerator in this build
        return False


#: Replacements in the ``torch`` namespace.
CONSTRUCTORS: Final[dict[str, Any]] = {
    "tensor": tensor,
    "as_tensor": as_tensor,
    "asarray": asarray,
    **({} if _numbers_are_cards() else {"device": DeviceName}),
    "set_default_tensor_type": set_default_tensor_type,
    **host_typed_tensors(),
    "Generator": GeneratorName,
    **{name: _factory(getattr(torch, name)) for name in _FACTORIES},
    **{
        name: _drawing(getattr(torch, name))
        for name in ("bernoulli", "binomial", "multinomial", "poisson")
    },
    "normal": _factory(_drawing(torch.normal)),
    **{
        name: _refusing_on_cards(name, "a sparse tensor")
        for name in (
            "sparse_coo_tensor",
            "sparse_csr_tensor",
            "sparse_csc_tensor",
            "sparse_bsr_tensor",
            "sparse_bsc_tensor",
            "sparse_compressed_tensor",
        )
    },
}

#: Replacements in ``torch.nested``.
NESTED: Final[dict[str, Any]] = {
    name: _refusing_on_cards(f"nested.{name}", "a nested tensor")
    for name in (
        "nested_tensor",
        "as_nested_tensor",
        "narrow",
    )
}
