"""Random numbers on the simulated cards: each card draws from its own generator.

Note [Drawing]
The CPU computes what a card draws, from the card's generator, which is named to the
operator. The CPU's default generator is never touched, so threads that draw on the host
meanwhile, and processes forked meanwhile, notice nothing. There is no lock either: torch
itself locks a generator while it draws. Numbers differ from a real card's (Philox there,
Mersenne Twister here); the same seed gives the same numbers on every run. The offset
moves as a card's does, by ``operators/offsets.py``.
"""

from __future__ import annotations

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


#: The host's generators: ``torch.Generator`` as C++ has it.
GENERATOR: Final[Any] = torch.Generator


#: Where the CPU's generator stood at a seed and an offset, for states that come back.
_marks: Final[OrderedDict[tuple[int, int], torch.Tensor]] = OrderedDict()
#: So many are kept, of 5 KB each.
_MOST_MARKS: Final = 512
#: A state: seed and offset. Source: ``CUDAGeneratorImpl::get_state``.
_STATE: Final = struct.Struct("<Qq")
_SEED_BYTES: Final = 8


class CardGenerator(GENERATOR):  # type: ignore[misc]  # torch's C type, held as Any
    """``torch.Generator("cuda")``: the CPU draws, the generator says it is a card's.

    A seed and an offset are all of its state, as a card's: where both come back in a
    process, so do the numbers.

    Limits: a state that this process has not seen has numbers of its own.
    """

    #: Those that are alive, by what C++ knows of them.
    _known: ClassVar[WeakValueDictionary[int, CardGenerator]] = WeakValueDictionary()

    def __new__(cls, index: int) -> CardGenerator:  # noqa: PYI034  # Self needs 3.11
        """Make a CPU generator of this class."""
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
        """Begin anew at a seed: the offset is 0.

        Raises:
            RuntimeError: Something is being captured at another (torch's text).
        """
        self._check_capture(seed)
        super().manual_seed(seed)
        self._seed, self._offset = super().initial_seed(), 0
        return self

    def seed(self) -> int:
        """Begin anew at a seed that nobody knows, and return it."""
        seed: int = super().seed()
        self._seed, self._offset = seed, 0
        return seed

    def initial_seed(self) -> int:
        """Return the seed."""
        return self._seed

    def get_offset(self) -> int:
        """Return by how much draws have moved it, by the rules of CUDA's kernels."""
        self._mark()
        return self._offset

    def set_offset(self, offset: int) -> None:
        """Draw from there on.

        Raises:
            RuntimeError: The offset is not a multiple of four (torch's text).
        """
        if offset % 4:
            raise RuntimeError("offset must be a multiple of 4")
        self._go_to(self._seed, offset)

    def get_state(self) -> torch.Tensor:
        """Return seed and offset, 16 bytes."""
        self._mark()
        packed = bytearray(_STATE.pack(self._seed, self._offset))
        return torch.frombuffer(packed, dtype=torch.uint8)

    def set_state(self, state: torch.Tensor) -> CardGenerator:
        """Go to a seed and an offset, or to a seed alone.

        Source: ``CUDAGeneratorImpl::set_state``.

        Raises:
            RuntimeError: It is of another size, or something is being captured (torch's
                text).
            TypeError: It is not a tensor of bytes on the host (torch's text).
        """
        self._check_capture(None)
        is_right = isinstance(state, torch.Tensor) and state.dtype is torch.uint8
        if not is_right or state.device.type != "cpu":
            super().set_state(state)  # says so
        packed = bytes(state.flatten().tolist())
        if len(packed) == _SEED_BYTES:
            packed += bytes(_SEED_BYTES)
        if len(packed) != _STATE.size:
            raise RuntimeError("RNG state is wrong size")
        self._go_to(*_STATE.unpack(packed))
        return self

    def move(self, by: int) -> None:
        """Move the offset, once numbers were drawn; in a capture, at each replay."""
        from pytest_gpumem.devices.simulated.capture import capture_of

        machine = innermost_machine()
        if machine is not None and machine.captures:
            capture = capture_of(machine.card(self._index))
            if capture is not None:
                capture.tape.keep_call(partial(self.move, by))
                return
        self._offset += by

    @classmethod
    def find(cls, generator: Any) -> CardGenerator | None:
        """Return the card's generator that C++ shows as one of the host."""
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
            # The CPU's generator takes 32 bits of a seed.
            mixed = zlib.crc32(_STATE.pack(seed, offset)) if offset else seed
            super().manual_seed(mixed)
        self._seed, self._offset = seed, offset

    def _check_capture(self, seed: int | None) -> None:
        """Refuse another seed while the current stream is being captured.

        Source: ``CUDAGeneratorImpl::set_current_seed``.
        """
        from pytest_gpumem.devices.simulated.capture import capture_of

        machine = innermost_machine()
        if machine is None or not machine.captures or seed == self.initial_seed():
            return
        if capture_of(machine.card(self._index)) is not None:
            raise RuntimeError(
                "CUDAGeneratorImpl::set_current_seed can be called during stream capture "
                "only if new seed is the same as the original seed."
            )

    def clone_state(self) -> CardGenerator:
        """Return another generator of the card in the same state."""
        twin = CardGenerator(self._index)
        GENERATOR.set_state(twin, super().get_state())
        twin._seed, twin._offset = self._seed, self._offset
        return twin

    def graphsafe_get_state(self) -> Any:
        """Refuse: the state that a CUDA graph captures is on no card.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_get_state")

    def graphsafe_set_state(self, _state: Any) -> Any:
        """Refuse, as ``graphsafe_get_state`` does.

        Raises:
            UnsupportedOnSimulatedDeviceError: Always.
        """
        refuse("Generator.graphsafe_set_state")

    def __reduce__(self) -> Any:
        # As ``THPGenerator_reduce`` of ``torch/csrc/Generator.cpp``.
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
    """Answers for ``torch.Generator``, whose C code has no generators of cards."""

    def __call__(cls, device: Any = "cpu") -> Any:
        named = GENERATOR().device if device is None else torch.device(device)
        if named.type != "cuda":
            return GENERATOR(named)
        return CardGenerator(card_of(named.index).index)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, GENERATOR)

    def __subclasscheck__(cls, subclass: type) -> bool:
        return issubclass(subclass, GENERATOR)


class GeneratorName(metaclass=_GeneratorType):
    """``torch.Generator`` while cards are simulated."""

    # What pickles name it by.
    __module__ = "torch"
    __qualname__ = "Generator"


def check_generator(generator: Any, kind: str) -> None:
    """Refuse a generator of the other kind of device.

    Limits: only constructors can tell; C++ forgets the class of a generator.

    Source: ``check_generator`` of ``aten/src/ATen/core/Generator.h``.

    Raises:
        RuntimeError: With torch's text.
    """
    found = "cuda" if isinstance(generator, CardGenerator) else "cpu"
    if found != kind:
        raise RuntimeError(
            f"Expected a '{kind}' device type for generator but found '{found}'"
        )


class Drawing(Protocol):
    """Computes what an operator draws, on the CPU, from a generator."""

    def __call__(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Return the operator's result."""


def drawing(func: Any, operator: Operator) -> Drawing | None:
    """Return how an operator draws from a generator; None if it draws nothing.

    See Note [Drawing]. An operator that has no way to name a generator is refused when
    it is run.
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
    """A drawing that moves the generator's offset by the operator's rule."""

    def __init__(self, draw: Drawing, func: Any, rule: Callable[[Call], int]) -> None:
        self._draw, self._func, self._rule = draw, func, rule

    def __call__(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Draw, then move the offset."""
        result = self._draw(generator, args, kwargs)
        self.note(generator, args, kwargs, result)
        return result

    def note(
        self, generator: torch.Generator, args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        """Move the offset of the generator that a call draws from.

        Args:
            generator: The card's own, if the call names none.
            args: Of the call.
            kwargs: Of the call.
            result: What it returned.
        """
        from pytest_gpumem.devices.simulated.operators.requests import Call, flat

        every = (*args, *kwargs.values())
        given = (each for each in every if isinstance(each, GENERATOR))
        used = CardGenerator.find(next(given, generator))
        if used is not None:
            card = card_of(used.device.index)
            used.move(self._rule(Call(self._func, args, kwargs, flat(result), card)))


def _runs_on_host(func: Any) -> bool:
    """Tell whether the CPU has a kernel for any form of an operator."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key  # no public name
    packet = func.overloadpacket
    forms = [getattr(packet, each) for each in packet.overloads()]
    return any(
        has_kernel(form.name(), "CPU")
        or (
            has_kernel(form.name(), "CompositeExplicitAutograd")
            and not any(each.is_out for each in form._schema.arguments)  # likewise
        )
        for form in forms
    )


def _with_generator(func: Any) -> Any:
    """Return the form of an operator that takes a generator beside the same arguments."""

    def arguments(form: Any) -> list[tuple[str, str]]:
        return [
            (each.name, str(each.type))
            for each in form._schema.arguments  # no public name
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
    """Return a drawing that names the generator, unless the caller has named one."""
    names = [each.name for each in func._schema.arguments]  # no public name
    position = names.index("generator")

    def draw(generator: torch.Generator, args: Any, kwargs: dict[str, Any]) -> Any:
        if len(args) > position and not func._schema.arguments[position].kwarg_only:
            given = [*args]
            given[position] = given[position] or generator
            return func(*given, **kwargs)
        chosen = kwargs.get("generator") or generator
        return func(*args, **{**kwargs, "generator": chosen})

    return draw


#: How numbers like a tensor's are drawn, where their operators take no generator: up to
#: torch 2.9. Source: ``aten/src/ATen/native/TensorFactories.cpp``.
_FILLS: Final[dict[str, Any]] = {
    "rand_like": torch.ops.aten.uniform_,
    "randn_like": torch.ops.aten.normal_,
    "randint_like": lambda made, *bounds, generator: torch.ops.aten.random_(
        made, *(0, *map(int, bounds))[-2:], generator=generator
    ),
}


def _filling(fill: Any) -> Drawing:
    """Return a drawing that makes a tensor like another and fills it."""

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
    def draw(generator: Any, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG001  # as every drawing
        raise UnsupportedOnSimulatedDeviceError(
            str(func), "it draws random numbers and takes no generator"
        )

    return draw


def draw_kept(
    shape: torch.Size, p: float, generator: torch.Generator
) -> tuple[torch.Tensor, float]:
    """Draw which numbers dropout keeps.

    Returns:
        A mask of booleans in that shape, and the factor of what is kept.

    Source: ``native_dropout_cpu`` of ``aten/src/ATen/native/Dropout.cpp``.
    """
    kept = torch.empty(shape, dtype=torch.bool, device="cpu")
    torch.ops.aten.bernoulli_.float(kept, 1 - p, generator=generator)
    return kept, 0.0 if p == 1 else 1 / (1 - p)
