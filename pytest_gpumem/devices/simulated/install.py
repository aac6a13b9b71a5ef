"""Installs the simulated CUDA device in torch, and removes it again."""

from __future__ import annotations

import functools
import sys
import threading
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.utils._device import _device_constructors

from pytest_gpumem.devices.nvml_hook import NvmlHook
from pytest_gpumem.devices.patches import LatePatches, PatchSet
from pytest_gpumem.devices.simulated import (
    compiling,
    dispatch,
    distributed,
    factories,
    fake_tensors,
    gradients,
    graphs,
    handover,
    identity,
    interprocess,
    profiling,
    subclasses,
    torchscript,
)
from pytest_gpumem.devices.simulated.autocast import clear_cache
from pytest_gpumem.devices.simulated.constructors import (
    CONSTRUCTORS,
    DRAWING_METHODS,
    FACTORY_METHODS,
    FREQUENCIES,
    NESTED,
    new_of_class,
    parse_to,
)
from pytest_gpumem.devices.simulated.cuda_functions import C_FUNCTIONS, cuda_names
from pytest_gpumem.devices.simulated.libraries import PLANS, plan_caches
from pytest_gpumem.devices.simulated.machine import (
    SimulatedMachine,
    innermost_machine,
    pop_machine,
    push_machine,
)
from pytest_gpumem.devices.simulated.methods import EVERY_TENSOR, set_bits
from pytest_gpumem.devices.simulated.operators.drawing import DROPOUTS
from pytest_gpumem.devices.simulated.refusals import (
    CLASSES,
    patch_sanitizer,
    refusing_class,
)
from pytest_gpumem.devices.simulated.rng import set_host_state
from pytest_gpumem.devices.simulated.storages import (
    EVERY_STORAGE,
    EVERY_TENSORS_STORAGE,
    typed_init,
)
from pytest_gpumem.devices.simulated.streams import Event, EventName, Stream, StreamName
from pytest_gpumem.devices.simulated.tensor import HANDLERS, SimulatedTensor
from pytest_gpumem.devices.simulated.torch_build import build_names
from pytest_gpumem.devices.simulated.typed import SparseTensor, typed_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_gpumem.allocator.config import AllocatorConfig
    from pytest_gpumem.cards import Card

_lock: Final = threading.RLock()


def _namespaces() -> list[Any]:
    """Return the modules in which torch's Python code looks up its C functions."""
    rooms = ("torch.cuda", "torch.accelerator")
    return [
        torch._C,
        *(
            module
            for name, module in list(sys.modules.items())
            if name.startswith(rooms) and isinstance(module, ModuleType)
        ),
    ]


def _refused_classes() -> Iterator[tuple[Any, str, type]]:
    """Yield owner, name and replacement of the classes that cannot be simulated."""
    rooms = [(torch.cuda, name, room) for name, room in CLASSES.items()]
    for package, name, room in (*rooms, (torch.accelerator, "Graph", "graphs")):
        refused = refusing_class(f"{package.__name__}.{name}")
        for owner in (package, getattr(package, room, None)):
            if hasattr(owner, name):
                yield owner, name, refused


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    """Yield owner, name and new value of each attribute of torch that is replaced."""
    for module in _namespaces():
        for name, value in C_FUNCTIONS.items():
            # torch.cuda reads functions from torch._C. In some versions, some of its
            # modules have imported a function under its name.
            if module is torch._C or name in vars(module):
                yield module, name, value
    owned: tuple[tuple[Any, dict[str, Any]], ...] = (
        (torch.cuda, cuda_names()),
        (torch.cuda.sparse, typed_tensors("torch.cuda.sparse", SparseTensor)),
        (torch.cuda.streams, {"Stream": Stream, "Event": Event}),
        (torch.Tensor, EVERY_TENSOR),
        (torch._C, {"_set_tensor_metadata": set_bits}),
        (torch.Tensor, DRAWING_METHODS),
        (torch.Tensor, FACTORY_METHODS),
        (torch.fft, FREQUENCIES),
        (torch.UntypedStorage, EVERY_STORAGE),
        (torch.Tensor, EVERY_TENSORS_STORAGE),
        (torch, CONSTRUCTORS),
        (torch, {"Stream": StreamName, "Event": EventName}),
        *((each, {"set_rng_state": set_host_state}) for each in (torch, torch.random)),
        (torch, DROPOUTS),
        (torch._VF, DROPOUTS),
        (torch.nested, NESTED),
        # Recurrent layers ask whether cuDNN accepts their weights. It does not, because the
        # CPU computes.
        (torch.backends.cuda.cuFFTPlanCache, PLANS),
        (torch.backends.cuda, plan_caches()),
        (torch.backends.cudnn, {"is_acceptable": lambda _tensor: False}),
        (torch, {"clear_autocast_cache": clear_cache}),
        # Libraries look for Apple's and Intel's cards before they look for CUDA. Apple's
        # function is cached like torch's own, because TorchDynamo of torch 2.15 reads its
        # ``__wrapped__``.
        (torch.backends.mps, {"is_available": functools.cache(lambda: False)}),
        (torch.xpu, {"is_available": lambda: False, "device_count": lambda: 0}),
    )
    for owner, replacements in owned:
        for name, value in replacements.items():
            yield owner, name, value
    yield torch.TypedStorage, "__init__", typed_init
    yield torch.Tensor, "__new__", staticmethod(new_of_class)
    yield from build_names()
    yield from _refused_classes()
    yield torch._C._nn, "_parse_to", parse_to
    yield from distributed.REPLACEMENTS
    yield from compiling.REPLACEMENTS
    yield from fake_tensors.REPLACEMENTS
    yield from gradients.REPLACEMENTS
    yield from graphs.REPLACEMENTS
    yield from handover.REPLACEMENTS
    yield from identity.REPLACEMENTS
    yield from interprocess.REPLACEMENTS
    yield from profiling.REPLACEMENTS
    yield from subclasses.REPLACEMENTS


class Installation:
    """The simulated device in this process, from ``install`` to ``remove``.

    Installations nest: the innermost machine is the one that "cuda" means.

    Args:
        machine: The cards to install.
    """

    def __init__(self, machine: SimulatedMachine) -> None:
        self.machine: Final = machine
        self._patches = PatchSet()
        self._late = (
            LatePatches("triton", handover.patch_triton),
            LatePatches("torch._dynamo", compiling.patch_explain),
            LatePatches("torch.cuda._sanitizer", patch_sanitizer),
        )
        self._library: Any = None

    def install(self) -> None:
        """Patch torch; if this fails, everything is restored."""
        with _lock:
            push_machine(self.machine)
            try:
                self._patch()
            except BaseException:
                self.remove()
                raise

    def _patch(self) -> None:
        # ``with torch.device(…)`` compares constructors by identity and stores them at
        # its first use. It must store the originals.
        _device_constructors()
        torchscript.patch_scripting(self._patches)
        interprocess.patch_queues(self._patches)
        for owner, name, value in _replacements():
            self._patches.set(owner, name, value)
        self._patch_optimizers()
        for patches in self._late:
            patches.start()
        if not _libraries:
            self._library = factories.register_kernels()
            _libraries.append(self._library)

    def _patch_optimizers(self) -> None:
        """Make optimisers choose the foreach implementation, as on a card.

        Source: ``torch/utils/_foreach_utils.py`` and ``torch/optim/optimizer.py``
        compare exact tensor types.
        """
        from torch.optim import optimizer

        types: Any = optimizer._foreach_supported_types  # no public API
        self._patches.set(
            optimizer, "_foreach_supported_types", [*types, SimulatedTensor]
        )

    def remove(self) -> None:
        """Restore everything; may be called twice."""
        with _lock, ExitStack() as stack:
            stack.callback(self._pop)
            stack.callback(self._take_kernels_back)
            stack.callback(self._patches.restore)
            for patches in self._late:
                stack.callback(patches.stop)

    def _take_kernels_back(self) -> None:
        if self._library is not None:
            self._library._destroy()  # no public API
            self._library = None
            _libraries.clear()

    def _pop(self) -> None:
        try:
            pop_machine(self.machine)
        except ValueError:
            pass  # already removed
        HANDLERS.wrap(None)  # a capture may not have ended
        if innermost_machine() is None:
            compiling.show_to_dynamo()


#: The registered kernels; nested installations use those of the outermost one.
_libraries: Final[list[Any]] = []


@contextmanager
def simulated_device(
    cards: Sequence[Card] | str = "A100-40GB",
    *,
    config: AllocatorConfig | None = None,
    values: str = "computed",
    compiled: str = "eager",
) -> Iterator[SimulatedMachine]:
    """Make "cuda" mean simulated cards inside a ``with`` block.

    Args:
        cards: The machine's cards, or their description as for ``--gpu-card``. When CUDA is
            first used, ``CUDA_VISIBLE_DEVICES`` selects the visible cards.
        config: Settings of the caching allocator; None means those of the environment
            (``PYTORCH_ALLOC_CONF``).
        values: ``"computed"`` by the CPU, or ``"none"``: only shapes and bytes, for models
            larger than the host's memory; reading a value raises ``NoValuesError``.
        compiled: How code runs that ``torch.compile`` would compile to kernels:
            ``"eager"`` runs it uncompiled with one warning, ``"refused"`` refuses it.

    Yields:
        The machine, whose ``cards`` hold allocators and budgets.

    Raises:
        AllocatorSettingError: The environment's settings are not valid.
        CardError: The description names no known card.
        ValueError: ``values`` or ``compiled`` is not one of the strings above.

    Example::

        with simulated_device("T4"):
            torch.zeros(3, device="cuda")

    Limits: the block applies to the whole process. Blocks may be nested, but blocks of
    two threads must not overlap.
    """
    if isinstance(cards, str):
        from pytest_gpumem.cards import find_card

        cards = find_card(cards)
    installation = Installation(
        SimulatedMachine(cards, config=config, values=values, compiled=compiled)
    )
    nvml = NvmlHook(innermost_machine)
    with ExitStack() as stack:
        installation.install()
        stack.callback(installation.remove)
        stack.callback(nvml.stop)
        nvml.start()
        yield installation.machine


__all__ = ["Installation", "dispatch", "simulated_device"]
