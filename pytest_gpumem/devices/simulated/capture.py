"""Captures of CUDA graphs: which streams take part, and what they do not allow.

Source of what is allowed, and of the errors: "CUDA Graphs" in the CUDA C++ programming
guide, ``cudaError_t`` in the CUDA runtime API's manual, and
``aten/src/ATen/native/cuda/Copy.cu`` of torch 2.13.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pytest_gpumem.allocator.oom_text import cuda_error_text
from pytest_gpumem.devices.simulated.machine import current_machine
from pytest_gpumem.devices.simulated.rng import GENERATOR
from pytest_gpumem.devices.simulated.tape import Recorder, Tape
from pytest_gpumem.devices.simulated.tensor import HANDLERS, SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.rng import CardGenerator
    from pytest_gpumem.devices.simulated.tensor import Handler

_NOTHING: Final = contextlib.nullcontext()
_UNSUPPORTED: Final = (
    "operation not permitted when stream is capturing",
    "cudaErrorStreamCaptureUnsupported",
)
_INVALIDATED: Final = (
    "operation failed due to a previous error during capture",
    "cudaErrorStreamCaptureInvalidated",
)
_UNJOINED: Final = (
    "capturing stream has unjoined work",
    "cudaErrorStreamCaptureUnjoined",
)
_CAPTURED_EVENT: Final = (
    "operation not permitted on an event last recorded in a capturing stream",
    "cudaErrorCapturedEvent",
)
_INVALID_STATUS: Final = (
    "info.status != cudaStreamCaptureStatusInvalidated INTERNAL ASSERT FAILED at "
    '"/__w/pytorch/pytorch/c10/cuda/CUDACachingAllocator.cpp":2213, please report a bug '
    "to PyTorch. Invalid stream capture status"
)
#: What a host's tensor has to be. Source: ``Copy.cu``, ``copy_kernel_cuda``.
_NOT_PINNED: Final = (
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU "
    "tensor is pinned. Please use tensor.pin_memory() or allocate the tensor with "
    "pin_memory=True."
)
#: Operators whose results, or whose results' sizes, the host waits for, by torch's tags.
_WAITING: Final = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


def failure(words: str, code: str) -> torch.AcceleratorError:
    """Return the error of a call of CUDA's."""
    return torch.AcceleratorError(cuda_error_text(words, code))


class Capture:
    """One capture, from its begin to its end.

    Args:
        card: The card.
        stream: The stream that it began on.
        generators: Generators that may be drawn from.

    Attributes:
        streams: Handles of the streams that take part.
        unjoined: Those of them whose work the first stream does not wait for yet.
        is_invalid: Whether something that is not allowed has ended it.
        num_nodes: How many operators were captured that compute something.
        tape: What they compute.
    """

    def __init__(
        self, card: SimulatedCard, stream: int, generators: list[CardGenerator]
    ) -> None:
        self.card: Final = card
        self.generators: Final = generators
        self.stream: Final = stream
        self.streams = {stream}
        self.unjoined: set[int] = set()
        self.is_invalid = False
        self.num_nodes = 0
        self.tape: Final = Tape()

    def takes(self, stream: int) -> bool:
        """Tell whether a stream takes part."""
        return stream in self.streams

    def join(self, waiting: int, waited: int) -> None:
        """Let a stream take part from now on that waits for one that does."""
        if not self.streams:
            return  # it has ended
        self.streams.add(waiting)
        self.unjoined.discard(waited)
        if waiting != self.stream:
            self.unjoined.add(waiting)

    def note_work(self, stream: int) -> None:
        """Note work on a stream that takes part."""
        self.num_nodes += 1
        if stream != self.stream:
            self.unjoined.add(stream)

    def refuse(self) -> None:
        """End the capture: something was called that is not allowed in it.

        Raises:
            torch.AcceleratorError: With CUDA's text.
        """
        __tracebackhide__ = True
        self.is_invalid = True
        raise failure(*_UNSUPPORTED)

    def check(self, *, allocates: bool = False) -> None:
        """See whether more can be captured.

        Args:
            allocates: Whether the allocator will be asked first, which checks by itself.

        Raises:
            RuntimeError: The capture has failed (torch's text, or
                ``torch.AcceleratorError`` with CUDA's).
        """
        __tracebackhide__ = True
        if self.is_invalid and allocates:
            raise RuntimeError(_INVALID_STATUS)
        if self.is_invalid:
            raise failure(*_INVALIDATED)

    def check_generator(self, args: Any, kwargs: Any) -> None:
        """Refuse to draw from a generator that the graph does not know.

        Raises:
            RuntimeError: It does not (torch's text).
        """
        __tracebackhide__ = True
        known = {each._cdata for each in self.generators}  # C++ may wrap one anew
        for each in (*args, *kwargs.values()):
            if isinstance(each, GENERATOR) and each._cdata not in known:
                raise RuntimeError(
                    "RNG op during graph capture but generator is not registered with "
                    "the capturing graph. Call graph.register_generator_state() before "
                    "capture_begin()."
                )

    def end(self) -> None:
        """End the capture; nothing takes part any more.

        Raises:
            torch.AcceleratorError: It had failed, or a stream was not waited for.
        """
        __tracebackhide__ = True
        self.streams = set()
        self.check()
        if self.unjoined:
            raise failure(*_UNJOINED)


def capture_of(card: SimulatedCard, stream: int | None = None) -> Capture | None:
    """Return the capture that a stream takes part in; by default the current stream."""
    captures = card.machine.captures
    if not captures:
        return None
    if stream is None:
        stream = card.machine.streams.current(card.index)
    return next(
        (each for each in captures if each.card is card and each.takes(stream)), None
    )


def check_waiting(card: SimulatedCard, stream: int | None = None) -> None:
    """Refuse to wait for a card, or for one of its streams, while it captures.

    Raises:
        torch.AcceleratorError: It does (CUDA's text); the capture has failed.
    """
    __tracebackhide__ = True
    for capture in card.machine.captures:
        if capture.card is card and (stream is None or capture.takes(stream)):
            capture.refuse()


def check_event(capture: Capture | None) -> None:
    """Refuse to wait for an event that was recorded in a capture.

    Raises:
        torch.AcceleratorError: It was (CUDA's text); the capture has failed.
    """
    __tracebackhide__ = True
    if capture is not None:
        capture.is_invalid = True
        raise failure(*_CAPTURED_EVENT)


def check_copy(card: SimulatedCard, host: torch.Tensor | None, *, waits: bool) -> None:
    """Refuse a copy between host and card that cannot be captured.

    Args:
        card: The card.
        host: The tensor of the host; None stands for one that is not pinned.
        waits: Whether the host waits until it is copied.

    Raises:
        RuntimeError: The card captures, and the tensor is not pinned (torch's text).
        torch.AcceleratorError: It is, but the host waits (CUDA's text).
    """
    __tracebackhide__ = True
    capture = capture_of(card) if card.machine.captures else None
    if capture is None:
        return
    if host is None or not host.is_pinned():
        raise RuntimeError(_NOT_PINNED)
    if waits:
        capture.refuse()


def on_tape(card: SimulatedCard) -> AbstractContextManager[Any]:
    """Return a block in which the host computes a card's values by its own operators.

    A graph that is being captured keeps them.
    """
    capture = capture_of(card) if card.machine.captures else None
    if capture is None:
        return _NOTHING
    capture.note_work(card.machine.streams.current(card.index))
    return _recording(capture)


def _recording(capture: Capture) -> AbstractContextManager[Any]:
    """Return a block whose operators of the host a capture keeps."""
    keeps_already = isinstance(_get_current_dispatch_mode(), Recorder)
    if keeps_already or capture.card.value_device == "meta":
        return _NOTHING
    return Recorder(capture.tape)


def begin(capture: Capture) -> None:
    """Begin: from now on operators on the capture's streams are kept."""
    machine = current_machine()
    machine.captures = (*machine.captures, capture)
    HANDLERS.wrap(_captured)


def forget(capture: Capture) -> None:
    """Keep no more operators for a capture."""
    machine = current_machine()
    machine.captures = tuple(each for each in machine.captures if each is not capture)
    if not machine.captures:
        HANDLERS.wrap(None)


def _captured(func: Any, handler: Handler) -> Handler:
    """Return a handler that keeps what it computes, where it is captured."""
    waits = any(tag in func.tags for tag in _WAITING)
    is_view = all(
        each.alias_info is not None and not each.alias_info.is_write
        for each in func._schema.returns
    )
    draws = torch.Tag.nondeterministic_seeded in func.tags
    crosses: Callable[..., None] | None = _CROSSING.get(func)

    def capturing(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        __tracebackhide__ = True
        card = _card_in((args, kwargs))
        capture = None if card is None else capture_of(card)
        if card is None or capture is None:
            return handler(args, kwargs)
        capture.check(allocates=not func._schema.is_mutable)
        if waits and not _is_known(func, args):
            capture.refuse()
        if crosses is not None:
            crosses(card, args, kwargs)
        if draws:
            capture.check_generator(args, kwargs)
        if not is_view:
            capture.note_work(card.machine.streams.current(card.index))
        with _recording(capture):
            return handler(args, kwargs)

    return capturing


def _is_known(func: Any, args: tuple[Any, ...]) -> bool:
    """Tell whether the host knows a result without waiting: a tensor equals itself."""
    return func is torch.ops.aten.equal.default and args[0] is args[1]


def _card_in(value: Any) -> SimulatedCard | None:
    """Return the card of the first tensor of one in a call."""
    kind = type(value)
    if kind is SimulatedTensor:
        card: SimulatedCard = value._gpumem_card
        return card
    if kind is dict:
        value = value.values()
    elif kind is not tuple and kind is not list:
        return value._gpumem_card if isinstance(value, SimulatedTensor) else None
    return next(filter(None, map(_card_in, value)), None)


def _check_copy_(card: SimulatedCard, args: Any, kwargs: Any) -> None:
    """Refuse ``copy_`` to or from what is not pinned."""
    __tracebackhide__ = True
    goes_on = kwargs.get("non_blocking", len(args) > 2 and args[2])  # noqa: PLR2004  # its position
    for each in args[:2]:
        if isinstance(each, torch.Tensor) and not isinstance(each, SimulatedTensor):
            check_copy(card, each, waits=not goes_on)


def _check_to_copy(card: SimulatedCard, _args: Any, kwargs: Any) -> None:
    """Refuse ``_to_copy`` to the host: what it makes there is not pinned."""
    __tracebackhide__ = True
    device = kwargs.get("device")
    if device is not None and device.type == "cpu" and kwargs.get("layout") is None:
        check_copy(card, None, waits=True)


#: Operators that may copy between host and card.
_CROSSING: Final[dict[Any, Callable[..., None]]] = {
    torch.ops.aten.copy_.default: _check_copy_,
    torch.ops.aten._to_copy.default: _check_to_copy,
}
