"""Random numbers on the simulated cards: each card draws from its own generator.

Note [Drawing]
The CPU draws a card's random numbers from the card's generator, which is passed to the
operator. The CPU's default generator is not used, so draws on the host, in other threads
and in forked processes, do not change. No lock is needed, because torch locks a
generator while it draws. The numbers differ from a real card's: a real card uses Philox,
the simulated card Mersenne Twister. The same seed gives the same numbers on every run.
The offset advances as on a card, by the rules in ``operators/offsets.py``.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections import OrderedDict
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from pytest_gpumem.devices.simulated.machine import card_of, innermost_machine
from pytest_gpumem.devices.simulated.refusals import refuse
from pytest_gpumem.errors import UnsupportedOnSimulatedDeviceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices.simulated.machine import SimulatedCard
    from pytest_gpumem.devices.simulated.operators.registry import Operator
    from pytest_gpumem.devices.simulated.operators.requests import Call

_generators: Final[WeakKeyDictionary[SimulatedCard, CardGenerator]] = (
    WeakKeyDictionary()
)


def generator_of(card: SimulatedCard) -> CardGenerator:
    """Return the card's default generator."""
    found = _generators.get(card)
    return found or _generators.setdefault(card, CardGenerator(card.index))


#: The class of host generators: C++'s ``torch.Generator``.
GENERATOR: Final[Any] = torch.Generator


#: The state of the CPU's generator at a seed and an offset, to restore it later.
_marks: Final[OrderedDict[tuple[int, int], torch.Tensor]] = OrderedDict()
#: The number of states that are kept, of 5 KB each.
_MOST_MARKS: Final = 512
#: Format of a state: seed and offset. Source: ``CUDAGeneratorImpl::get_state``.
_STATE: Final = struct.Struct("<Qq")
_SEED_BYTES: Final = 8


_set_host_state: Final[Any] = torch.set_rng_state


@functools.wraps(_set_host_state)
def set_host_state(new_state: Any) -> None:
    """Run ``torch.set_rng_state``: a state on a card is refused, as by C++.

    Raises:
        TypeError: The state is on a card (torch's message).
    """
    _refuse_card(new_state)
    _set_host_state(new_state)


def _refuse_card(state: Any) -> None:
    """Refuse a generator's state that is on a card, where C++ sees a host tensor.

    Source: ``check_rng_state`` of ``aten/src/ATen/core/Generator.h``.
    """
    if isinstance(state, torch.Tensor) and state.device.type != "cpu":
        raise TypeError("RNG state must be a torch.ByteTensor")


class HostGenerator(GENERATOR):  # type: ignore[misc]  # torch's C type has the type Any here
    """``torch.Generator()``, which refuses a state that is on a card.

    Limits: ``torch.default_generator`` is C++'s own, and takes such a state.
    """

    # The module name of torch's class.
    __module__ = "torch._C"
    __qualname__ = "Generator"

    def set_state(self, new_state: torch.Tensor) -> Any:
        """Set the state.

        Raises:
            TypeError: The state is on a card (torch's message).
        """
        _refuse_card(new_state)
        return super().set_state(new_state)


class CardGenerator(GENERATOR):  # type: ignore[misc]  # torch's C type has the type Any here
    """``torch.Generator("cuda")``: a CPU generator that reports a card as its device.

    Its state is a seed and an offset, as on a card. If both are restored in the same
    process, the numbers are the same again.

    Limits: for a state that this process has not seen before, the numbers differ from
    those in the process in which the state was saved.
    """

    #: The living generators, by the address of their C++ object.
    _known: ClassVar[WeakValueDictionary[int, CardGenerator]] = WeakValueDictionary()

    def __new__(cls, index: int) -> CardGenerator:  # noqa: PYI034  # Self needs 3.11
        """Create a CPU generator of this class."""
        made: CardGenerator = GENERATOR.__new__(cls)
        made._index = index
        made._offset = 0
        cls._known[made._cdata] = made
        return made

    def __init__(self, index: int) -> None:
        super().__init__()
        self._index = index
        self._offset = 0
        self._seed: int = super().initial_seed()

    def manual_seed(self, seed: int) -> CardGenerator:
        """Start again from a seed, with offset 0.

        Raises:
            RuntimeError: A graph is being captured with another seed (torch's message).
        """
        self._check_capture(seed)
        super().manual_seed(seed)
        self._seed, self._offset = super().initial_seed(), 0
        return self

    def seed(self) -> int:
        """Start again from a random seed, and return the seed.

        Raises:
            RuntimeError: A graph is being captured (torch's message).
        """
        self._refuse_in_capture("seed")
        seed: int = super().seed()
        self._seed, self._offset = seed, 0
        return seed

    def initial_seed(self) -> int:
        """Return the seed.

        Raises:
            RuntimeError: A graph is being captured, up to torch 2.9 (torch's message).
        """
        self._refuse_reading()
        return self._seed

    def get_offset(self) -> int:
        """Return the offset, which draws advance by the rules of CUDA's kernels.

        Raises:
            RuntimeError: A graph is being captured (torch's message).
        """
        self._refuse_in_capture("get_offset")
        self._mark()
        return self._offset

    def set_offset(self, offset: int) -> None:
        """Set the offset from which the next numbers are drawn.

        Raises:
            RuntimeError: The offset is not a multiple of four, or a graph is being captured
                (torch's message).
        """
        self._refuse_in_capture("set_offset")
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self._go_to(self._seed, offset)

    def get_state(self) -> torch.Tensor:
        """Return seed and offset as a tensor of 16 bytes.

        Raises:
            RuntimeError: A graph is being captured, up to torch 2.9 (torch's message).
        """
        self._refuse_reading()
        self._mark()
        packed = bytearray(_STATE.pack(self._seed, self._offset))
        return torch.frombuffer(packed, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> CardGenerator:
        """Set the seed and the offset, or only the seed.

        Source: ``CUDAGeneratorImpl::set_state``.

        Raises:
            RuntimeError: The state has another size, or a graph is being captured (torch's
                message).
            TypeError: The state is not a host tensor of bytes (torch's message).
        """
        self._check_capture(None)
        _refuse_card(state)
        if not isinstance(state, torch.Tensor) or state.dtype is not torch.uint8:
            super().set_state(state)  # torch raises the error
        packed = bytes(state.flatten().tolist())
        if len(packed) == _SEED_BYTES:
            packed += bytes(_SEED_BYTES)
        if len(packed) != _STATE.size:
            raise RuntimeError("RNG state is wrong size")
        self._go_to(*_STATE.unpack(packed))
        return self

    def move(self, by: int) -> None:
        """Advance the offset after numbers were drawn; in a capture, at each replay."""
        from pytest_gpumem.devices.simulated.capture import capture_of

        machine = innermost_machine()
        if machine is not None and machine.captures:
            capture = capture_of(machine.card(self._index))
            if capture is not None:
                if by:
                    capture.note_draw(self)
                capture.tape.keep_call(partial(self.move, by))
                return
        self._offset += by

    def keep(self) -> Callable[[], None]:
        """Return a function that undoes all draws from here on; the offset stays."""
        return partial(super().set_state, super().get_state())

    @classmethod
    def of_card(cls, card: SimulatedCard) -> list[CardGenerator]:
        """Return the card's generators: its default one, and a program's own."""
        default = generator_of(card)
        own = (each for each in cls._known.values() if each is not default)
        return [default, *(each for each in own if each._index == card.index)]

    @classmethod
    def find(cls, generator: Any) -> CardGenerator | None:
        """Return the card's generator for an object that C++ shows as a host generator."""
        return cls._known.get(generator._cdata)

    def _mark(self) -> None:
        key = self._seed, self._offset
        _marks[key] = super().get_state()
        _marks.move_to_end(key)
        if len(_marks) > _MOST_MARKS:
            _marks.popitem(last=False)

    def _go_to(self, seed: int, offset: int) -> None:
        mark = _marks.get((seed, offset))
        if mark is not None:
            super().set_state(mark)
        else:
            # The CPU's generator uses 32 bits of a seed.
            mixed = zlib.crc32(_STATE.pack(seed, offset)) if offset else seed
            super().manual_seed(mixed)
        self._seed, self._offset = seed, offset

    def _check_capture(self, seed: int | None) -> None:
        """Refuse a change of the seed while the current stream is being captured.

        Source: ``CUDAGeneratorImpl::set_current_seed``.
        """
        card = self._capturing()
        if card is not None and card.version.hides_seeds:
            self._refuse_in_capture("set_current_seed")
        if card is not None and seed != self._seed:
            raise RuntimeError(
                "CUDAGeneratorImpl::set_current_seed can be called during stream capture "
                "only if new seed is the same as the original seed."
            )

    def _refuse_in_capture(self, method: str) -> None:
        """Refuse a method while the current stream is being captured.

        Source: ``assertNotCapturing`` of ``aten/src/ATen/cuda/CUDAGraphsUtils.cuh``.
        """
        if self._capturing() is not None:
            raise RuntimeError(
                f"Cannot call CUDAGeneratorImpl::{method} during CUDA graph capture. If you "
                "need this call to be captured, please file an issue. Current "
                "cudaStreamCaptureStatus: cudaStreamCaptureStatusActive"
            )

    def _refuse_reading(self) -> None:
        """Refuse to read the seed in a capture, if the installed torch refuses it."""
        card = self._capturing()
        if card is not None and card.version.hides_seeds:
            self._refuse_in_capture("current_seed")

    def _capturing(self) -> SimulatedCard | None:
        """Return the generator's card if its current stream is being captured; else None."""
        from pytest_gpumem.devices.simulated.capture import capture_of

        machine = innermost_machine()
        if machine is None or not machine.captures:
            return None
        card = machine.card(self._index)
        return None if capture_of(card) is None else card

    def clone_state(self) -> CardGenerator:
        """Return a new generator of the card with the same state."""
        twin = CardGenerator(self._index)
        GENERATOR.set_state(twin, super().get_state())
        twin._seed, twin._offset = self._seed, self._offset
        return twin

    def graphsafe_get_state(self) -> Any:
        """Refuse: the state that a CUDA graph captures is not on a card.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_get_state")

    def graphsafe_set_state(self, _state: Any) -> Any:
        """Refuse to set the state that a CUDA graph captures.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_set_state")

    def __reduce__(self) -> Any:
        # Source: ``THPGenerator_reduce`` of ``torch/csrc/Generator.cpp``.
        state = (self._seed, self._offset, self.get_state())
        return GeneratorName, (self.device,), state

    def __setstate__(self, state: tuple[int, int, torch.Tensor]) -> None:
        _seed, _offset, inner = state
        self.set_state(inner)

    @property
    def device(self) -> torch.device:
        """The card."""
        return torch.device("cuda", self._index)


class _GeneratorType(type):
    """Metaclass of the replacement of ``torch.Generator``, which has no card generators."""

    def __call__(cls, device: Any = "cpu") -> Any:
        named = GENERATOR().device if device is None else torch.device(device)
        if named.type != "cuda":
            return HostGenerator(named)
        return CardGenerator(card_of(named.index).index)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, GENERATOR)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, GENERATOR)


class GeneratorName(metaclass=_GeneratorType):
    """Replaces ``torch.Generator`` while cards are simulated."""

    # The module name that pickles contain.
    __module__ = "torch"
    __qualname__ = "Generator"


def check_generator(generator: Any, kind: str) -> None:
    """Refuse a generator of the other device type.

    Limits: only constructors can check this, because C++ loses the class of a generator.

    Source: ``check_generator`` of ``aten/src/ATen/core/Generator.h``.

    Raises:
        RuntimeError: With torch's message.
    """
    found = "cuda" if isinstance(generator, CardGenerator) else "cpu"
    if found != kind:
        raise RuntimeError(
            f"Expected a '{kind}' device type for generator but found '{found}'"
        )


class Drawing(Protocol):
    """Runs an operator that draws on the CPU, with a given generator."""

    def __call__(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Return the operator's result."""


def drawing(func: Any, operator: Operator) -> Drawing | None:
    """Return the function that draws for an operator; None if it draws nothing.

    See Note [Drawing]. An operator to which no generator can be passed is refused when
    it runs.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags or operator.draws_nothing:
        return None
    draw = operator.draw
    if draw is None:
        named = _with_generator(func)
        fill = _FILLS.get(func.overloadpacket.__name__)
        if named is not None:
            draw = _naming(named)
        elif fill is not None:
            draw = _filling(fill)
        else:
            return _refused(func) if _runs_on_host(func) else None
    return draw if operator.move is None else Moving(draw, func, operator.move)


class Moving:
    """A drawing that also advances the generator's offset by the operator's rule."""

    def __init__(self, draw: Drawing, func: Any, rule: Callable[[Call], int]) -> None:
        self._draw, self._func, self._rule = draw, func, rule

    def __call__(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Draw, then advance the offset."""
        result = self._draw(generator, args, kwargs)
        self.note(generator, args, kwargs, result)
        return result

    def note(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Advance the offset of the generator from which a call draws.

        Args:
            generator: The card's default generator, for a call without a generator.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            result: The result of the call.
        """
        from pytest_gpumem.devices.simulated.operators.requests import Call, flat

        every = (*args, *kwargs.values())
        given = (each for each in every if isinstance(each, GENERATOR))
        used = CardGenerator.find(next(given, generator))
        if used is not None:
            card = card_of(used.device.index)
            used.move(self._rule(Call(self._func, args, kwargs, flat(result), card)))


def _runs_on_host(func: Any) -> bool:
    """Return whether the CPU has a kernel for any overload of an operator."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public API
    packet = func.overloadpacket
    forms = [getattr(packet, each) for each in packet.overloads()]
    return any(
        has_kernel(form.name(), "CPU")
        or (
            has_kernel(form.name(), "CompositeExplicitAutograd")
            and not any(each.is_out for each in form._schema.arguments)  # no public API
        )
        for form in forms
    )


def _with_generator(func: Any) -> Any:
    """Return the overload that takes the same arguments and a generator."""

    def arguments(form: Any) -> list[tuple[str, str]]:
        return [
            (each.name, str(each.type))
            for each in form._schema.arguments  # no public API
            if each.name != "generator"
        ]

    packet = func.overloadpacket
    forms = [func, *(getattr(packet, each) for each in packet.overloads())]
    return next(
        (
            form
            for form in forms
            if any(each.name == "generator" for each in form._schema.arguments)
            and arguments(form) == arguments(func)
        ),
        None,
    )


def _naming(func: Any) -> Drawing:
    """Return a drawing that passes the generator, unless the caller has passed one."""
    names = [each.name for each in func._schema.arguments]  # no public API
    position = names.index("generator")

    def draw(generator: torch.Generator, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(args) > position and not func._schema.arguments[position].kwarg_only:
            given = [*args]
            given[position] = given[position] or generator
            return func(*given, **kwargs)
        chosen = kwargs.get("generator") or generator
        return func(*args, **{**kwargs, "generator": chosen})

    return draw


#: Fill operators for ``rand_like`` and similar operators, which take no generator up to
#: torch 2.9. Source: ``aten/src/ATen/native/TensorFactories.cpp``.
_FILLS: Final[dict[str, Any]] = {
    "rand_like": torch.ops.aten.uniform_,
    "randn_like": torch.ops.aten.normal_,
    "randint_like": lambda made, *bounds, generator: torch.ops.aten.random_(
        made, *(0, *map(int, bounds))[-2:], generator=generator
    ),
}


def _filling(fill: Any) -> Drawing:
    """Return a drawing that creates a tensor like another one and fills it."""

    def draw(generator: torch.Generator, args: Any, kwargs: dict[str, Any]) -> Any:
        source, *bounds = args
        options = {name: value for name, value in kwargs.items() if name != "out"}
        made = torch.ops.aten.empty_like(source, **options)
        fill(made, *bounds, generator=generator)
        if "out" not in kwargs:
            return made
        return kwargs["out"].resize_(made.shape).copy_(made)

    return draw


def _refused(func: Any) -> Drawing:
    def draw(generator: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG001  # the signature of every drawing
        raise UnsupportedOnSimulatedDeviceError(
            str(func), "it draws random numbers and takes no generator"
        )

    return draw


def draw_kept(
    shape: torch.Size, p: float, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Draw the elements that dropout keeps.

    Returns:
        A mask of booleans in the given shape, and the factor for the kept elements.

    Source: ``native_dropout_cpu`` of ``aten/src/ATen/native/Dropout.cpp``.
    """
    kept = torch.empty(shape, dtype=torch.bool, device="cpu")
    torch.ops.aten.bernoulli_.float(kept, 1 - p, generator=generator)
    return kept, 0.0 if p == 1 else 1 / (1 - p)
