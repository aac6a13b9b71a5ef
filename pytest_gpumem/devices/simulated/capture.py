"""Captures of CUDA graphs: which streams take part, and which calls are not allowed.

Sources of the rules and of the errors: "CUDA Graphs" in the CUDA C++ programming guide,
``cudaError_t`` in the CUDA runtime API's manual, and
``aten/src/ATen/native/cuda/Copy.cu`` of torch 2.13.

Note [What a capture changes]
On a card, captured operators do not run before the first replay. Here they run at once,
because later code uses the shapes of their results. So a capture records the contents
of memory before an operator writes to it, and restores them at its end. Memory that was
allocated during the capture keeps the computed values; on a card its contents are
undefined.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pytest_gpumem.devices.cuda_errors import cuda_error
from pytest_gpumem.devices.simulated.cpp_warnings import warn
from pytest_gpumem.devices.simulated.machine import current_machine
from pytest_gpumem.devices.simulated.rng import GENERATOR, CardGenerator
from pytest_gpumem.devices.simulated.tape import (
    Recorder,
    Tape,
    bytes_of,
    living_storage,
)
from pytest_gpumem.devices.simulated.tensor import HANDLERS, SimulatedTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from pytest_gpumem.devices.simulated.card import SimulatedCard
    from pytest_gpumem.devices.simulated.machine import SimulatedMachine
    from pytest_gpumem.devices.simulated.tensor import Handler

_NOTHING: Final = contextlib.nullcontext()
#: Error for a host tensor that is not pinned. Source: ``Copy.cu``, ``copy_kernel_cuda``.
_NOT_PINNED: Final = (
    "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU "
    "tensor is pinned. Please use tensor.pin_memory() or allocate the tensor with "
    "pin_memory=True."
)
_WAITS: Final = "called a synchronizing CUDA operation"
#: Torch's tags of operators for which the host waits, because it reads a result or a
#: result's size.
_WAITING: Final = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)
#: Operators that first count the elements that a mask selects, if an index is a mask.
#: Source: ``expandTensors``, ``aten/src/ATen/native/IndexingUtils.h``.
_INDEXING: Final = frozenset(
    {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_"}
)
_MASKS: Final = frozenset({torch.bool, torch.uint8})


class Capture:
    """One capture, from its begin to its end.

    Args:
        card: The card.
        stream: The stream on which the capture began.
        generators: The generators from which the captured operators may draw; None means
            any.
        graph: Returns the graph that captures, or None once it is gone.
        register: Allocates memory for the state of a generator; called at the first
            draw from each generator if ``generators`` is None.

    Attributes:
        streams: Handles of the streams that take part.
        unjoined: The streams that take part and for whose work the first stream does not
            wait yet.
        is_invalid: Whether a call that is not allowed has ended the capture.
        num_nodes: The number of captured operators that compute something.
        tape: The captured operators.
    """

    def __init__(
        self,
        card: SimulatedCard,
        stream: int,
        generators: list[CardGenerator] | None,
        graph: Callable[[], Any],
        register: Callable[[], None],
    ) -> None:
        self.card: Final = card
        self.graph: Final = graph
        self._registered: Final = generators
        self._register: Final = register
        self._drawn: Final[set[int]] = set()
        # A capture draws only for its temporary values; each replay draws again.
        known = CardGenerator.of_card(card) if generators is None else generators
        self._undo_draws: Final = [each.keep() for each in known]
        #: The earlier contents of memory that was written to, by the address of its C++
        #: storage.
        self._contents: Final[
            dict[int, tuple[weakref.ref[torch.UntypedStorage], torch.Tensor]]
        ] = {}
        self.stream: Final = stream
        self.streams = {stream}
        self.unjoined: set[int] = set()
        self.is_invalid = False
        self.num_nodes = 0
        self.tape: Final = Tape()

    def note_contents(self, value: Any) -> None:
        """Record the contents of all tensors in a value, before they are written."""
        for each in torch.utils._pytree.tree_leaves(value):
            if not isinstance(each, torch.Tensor):
                continue
            held = each._gpumem_value if isinstance(each, SimulatedTensor) else each
            storage = held.untyped_storage()
            known, _contents = self._contents.get(storage._cdata, (None, None))
            is_known = known is not None and known() is storage
            if not is_known and not self.tape.has_made(storage):
                contents = bytes_of(storage).clone()
                self._contents[storage._cdata] = weakref.ref(storage), contents

    def undo(self) -> None:
        """Undo what the captured operators have drawn and written."""
        for undo in self._undo_draws:
            undo()
        for reference, contents in self._contents.values():
            storage = living_storage(reference)
            if storage is not None:
                bytes_of(storage).copy_(contents)
        self._contents.clear()

    def takes(self, stream: int) -> bool:
        """Return whether a stream takes part in the capture."""
        return stream in self.streams

    def join(self, waiting: int, waited: int) -> None:
        """Add a stream to the capture because it waits for one that takes part."""
        if not self.streams:
            return  # the capture has ended
        self.streams.add(waiting)
        self.unjoined.discard(waited)
        if waiting != self.stream:
            self.unjoined.add(waiting)

    def note_work(self, stream: int) -> None:
        """Record that a stream that takes part has new work."""
        self.num_nodes += 1
        if stream != self.stream:
            self.unjoined.add(stream)

    def refuse(self) -> None:
        """End the capture because of a call that is not allowed in a capture.

        Raises:
            torch.AcceleratorError: Always, with CUDA's message.
        """
        self.is_invalid = True
        raise cuda_error("cudaErrorStreamCaptureUnsupported")

    def check(self, *, allocates: bool = False) -> None:
        """Check that the capture is still valid.

        Args:
            allocates: Whether the call first requests memory; the allocator then makes its
                own check.

        Raises:
            RuntimeError: The capture has failed (torch's message, or
                ``torch.AcceleratorError`` with CUDA's message).
        """
        if self.is_invalid and allocates:
            raise RuntimeError(self.card.version.asserts.capture_status)
        if self.is_invalid:
            raise cuda_error("cudaErrorStreamCaptureInvalidated")

    def check_generator(self, args: Any, kwargs: Any) -> None:
        """Refuse a draw from a generator that is not registered with the graph.

        Raises:
            RuntimeError: The generator is not registered (torch's message).
        """
        if self._registered is None:
            return
        known = {
            each._cdata for each in self._registered
        }  # C++ may create another Python object for a generator
        for each in (*args, *kwargs.values()):
            if isinstance(each, GENERATOR) and each._cdata not in known:
                raise RuntimeError(
                    "RNG op during graph capture but generator is not registered with "
                    "the capturing graph. Call graph.register_generator_state() before "
                    "capture_begin()."
                )

    def note_draw(self, generator: CardGenerator) -> None:
        """Register a generator at its first draw, if it is not registered yet."""
        if self._registered is None and generator._cdata not in self._drawn:
            self._drawn.add(generator._cdata)
            self._register()

    def end(self) -> None:
        """End the capture; no stream takes part any more.

        Raises:
            torch.AcceleratorError: The capture has failed, or the first stream does not wait
                for a stream that took part.
        """
        self.streams = set()
        self.check()
        if self.unjoined:
            raise cuda_error("cudaErrorStreamCaptureUnjoined")


def capture_of(card: SimulatedCard, stream: int | None = None) -> Capture | None:
    """Return the capture in which a stream takes part; by default the current stream."""
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
        torch.AcceleratorError: The card captures (CUDA's message); the capture then fails.
    """
    for capture in card.machine.captures:
        if capture.card is card and (stream is None or capture.takes(stream)):
            capture.refuse()


def set_sync_debug_mode(mode: Any) -> None:
    """Choose what happens when the host waits for a card.

    Args:
        mode: 0 for nothing, 1 for a warning, 2 for an error.

    Raises:
        RuntimeError: The mode is none of these (torch's message).
    """
    warn(
        "Synchronization debug mode is a prototype feature and does not yet detect all "
        "synchronizing operations",
        once=True,
    )
    if not isinstance(mode, int):
        raise RuntimeError("invalid argument to set_sync_debug_mode")  # noqa: TRY004  # torch's class
    if mode not in {0, 1, 2}:
        raise RuntimeError("invalid value of debug_mode, expected one of 0,1,2")
    machine = current_machine()
    machine.sync_debug_mode = int(mode)
    _watch(machine)


def note_wait(machine: SimulatedMachine) -> None:
    """Warn, or raise, because the host waits for a card, if the program asked for it.

    Source: ``warn_or_error_on_sync``, ``c10/cuda/CUDAFunctions.cpp``.

    Raises:
        RuntimeError: The mode asks for an error (torch's message).
    """
    if not machine.sync_debug_mode:
        return
    if machine.sync_debug_mode == 2:  # noqa: PLR2004  # torch's number of this mode
        raise RuntimeError(_WAITS)
    warn(_WAITS)


def check_event(capture: Capture | None) -> None:
    """Refuse to wait for an event that was recorded in a capture.

    Raises:
        torch.AcceleratorError: The event was recorded in a capture (CUDA's message); the
            capture then fails.
    """
    if capture is not None:
        capture.is_invalid = True
        raise cuda_error("cudaErrorCapturedEvent")


def check_copy(card: SimulatedCard, *, is_pinned: bool, waits: bool) -> None:
    """Refuse a copy between host and card that cannot be captured.

    Args:
        card: The card.
        is_pinned: Whether the host's memory is pinned.
        waits: Whether the host waits for the copy.

    Raises:
        RuntimeError: The card captures, and the host tensor is not pinned (torch's
            message).
        torch.AcceleratorError: The card captures, the tensor is pinned, and the host waits
            (CUDA's message).
    """
    if waits:
        note_wait(card.machine)
    capture = capture_of(card) if card.machine.captures else None
    if capture is None:
        return
    if not is_pinned:
        raise RuntimeError(_NOT_PINNED)
    if waits:
        capture.refuse()


def on_tape(card: SimulatedCard) -> AbstractContextManager[Any]:
    """Return a context manager, inside which host operators compute a card's values.

    If a graph is being captured, it records these operators.
    """
    capture = capture_of(card) if card.machine.captures else None
    if capture is None:
        return _NOTHING
    capture.note_work(card.machine.streams.current(card.index))
    return _recording(capture)


def _recording(capture: Capture) -> AbstractContextManager[Any]:
    """Return a context manager, inside which a capture records the host operators."""
    keeps_already = isinstance(_get_current_dispatch_mode(), Recorder)
    if keeps_already or capture.card.value_device == "meta":
        return _NOTHING
    return Recorder(capture.tape)


def begin(capture: Capture) -> None:
    """Begin a capture: operators on its streams are recorded from now on."""
    machine = current_machine()
    machine.captures = (*machine.captures, capture)
    _watch(machine)


def forget(capture: Capture) -> None:
    """Stop recording operators for a capture, and undo what they did."""
    machine = current_machine()
    machine.captures = tuple(each for each in machine.captures if each is not capture)
    _watch(machine)
    capture.undo()


def _watch(machine: SimulatedMachine) -> None:
    """Wrap every operator's handler while a capture or a debug mode needs it."""
    HANDLERS.wrap(_watched if machine.is_watched else None)


def _watched(func: Any, handler: Handler) -> Handler:
    """Return a handler that notes when the host waits, and records captured operators."""
    may_wait = func.overloadpacket.__name__ in _INDEXING or any(
        tag in func.tags for tag in _WAITING
    )
    crosses: Callable[..., None] | None = _CROSSING.get(func)
    record = _recorder(func, handler)

    def watched(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        card = _card_in((args, kwargs))
        if card is None:
            return handler(args, kwargs)
        capture = capture_of(card)
        if capture is not None:
            capture.check(allocates=not func._schema.is_mutable)
        if may_wait and _is_waited_for(func, args, kwargs):
            note_wait(card.machine)
            if capture is not None:
                capture.refuse()
        if crosses is not None:
            crosses(card, args, kwargs)
        if capture is None:
            return handler(args, kwargs)
        return record(capture, args, kwargs)

    return watched


def _recorder(func: Any, handler: Handler) -> Callable[[Capture, Any, Any], Any]:
    """Return a function that runs an operator, and records it for a capture."""
    is_view = all(
        each.alias_info is not None and not each.alias_info.is_write
        for each in func._schema.returns
    )
    draws = torch.Tag.nondeterministic_seeded in func.tags
    written = _written(func)

    def record(capture: Capture, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        card = capture.card
        if draws:
            capture.check_generator(args, kwargs)
        if not is_view:
            capture.note_work(card.machine.streams.current(card.index))
        if written and card.value_device != "meta":
            for position, name in written:
                is_given = position < len(args)
                capture.note_contents(args[position] if is_given else kwargs.get(name))
        with _recording(capture):
            return handler(args, kwargs)

    return record


def _written(func: Any) -> list[tuple[int, str]]:
    """Return the positions and names of the arguments to which an operator may write."""
    from pytest_gpumem.devices.simulated.operators.registry import find

    has_effects = find(func).has_effects
    return [
        (position, each.name)
        for position, each in enumerate(func._schema.arguments)
        if has_effects or (each.alias_info is not None and each.alias_info.is_write)
    ]


def _is_waited_for(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether the host waits for an operator's result, or for its size."""
    if func.overloadpacket.__name__ in _INDEXING:
        return _is_counted(*args[1:3], **kwargs)
    if func is torch.ops.aten.equal.default and args[0] is args[1]:
        return False  # a tensor equals itself
    if func is torch.ops.aten.repeat_interleave.Tensor:
        # Source: ``repeat_interleave_common``, ``aten/src/ATen/native/Repeat.h``.
        return kwargs.get("output_size") is None
    return any(tag in func.tags for tag in _WAITING)


def _is_counted(
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor | None = None,
    **_options: Any,
) -> bool:
    """Return whether the host waits for the card because of a mask.

    It waits while it counts the elements that a mask on the card selects. It does not
    wait if a single host number is assigned through a single mask on the card. For a
    mask on the host, that number is copied to the card.

    Source: ``canDispatchToMaskedFill``,
    ``aten/src/ATen/native/TensorAdvancedIndexing.cpp``, and the behaviour of torch 2.13
    on the substitute runtime.
    """
    given = [each for each in indices if each is not None]
    masks = [each for each in given if each.dtype in _MASKS]
    if masks and values is not None and values.is_cpu and values.numel() == 1:
        return not (len(given) == 1 and given[0].is_cuda)
    return any(each.is_cuda for each in masks)


def _card_in(value: Any) -> SimulatedCard | None:
    """Return the card of the first argument that is on a card."""
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
    """Refuse ``copy_`` to or from a host tensor that is not pinned."""
    goes_on = kwargs.get("non_blocking", len(args) > 2 and args[2])  # noqa: PLR2004  # the position of the argument
    for each in args[:2]:
        if isinstance(each, torch.Tensor) and not isinstance(each, SimulatedTensor):
            check_copy(card, is_pinned=each.is_pinned(), waits=not goes_on)


def _check_to_copy(card: SimulatedCard, _args: Any, kwargs: Any) -> None:
    """Refuse ``_to_copy`` to the host; the result is pinned if the host does not wait."""
    device = kwargs.get("device")
    if device is not None and device.type == "cpu" and kwargs.get("layout") is None:
        goes_on = bool(kwargs.get("non_blocking"))
        check_copy(card, is_pinned=goes_on, waits=not goes_on)


def _check_indices(card: SimulatedCard, args: Any, _kwargs: Any) -> None:
    """Refuse host indices, because they are first copied to the card.

    Source: ``make_info``, ``aten/src/ATen/native/TensorAdvancedIndexing.cpp``.
    """
    for each in args[1]:
        is_of_host = isinstance(each, torch.Tensor) and not each.is_cuda
        if is_of_host and each.dtype not in _MASKS:
            check_copy(card, is_pinned=each.is_pinned(), waits=True)


_INDEXING_OVERLOADS: Final = [
    getattr(getattr(torch.ops.aten, name), "default" if "put" in name else "Tensor")
    for name in _INDEXING
]
#: Operators that may copy between host and card.
_CROSSING: Final[dict[Any, Callable[..., None]]] = {
    **dict.fromkeys(_INDEXING_OVERLOADS, _check_indices),
    torch.ops.aten.copy_.default: _check_copy_,
    torch.ops.aten._to_copy.default: _check_to_copy,
}
