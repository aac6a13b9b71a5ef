"""Finds the owners of blocks of memory while models are built, moved and called.

torch calls a hook for each parameter and submodule that a module gets. A model that
existed before is found when it is first called. Only names are kept, so no model stays
alive for it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from weakref import ref as Reference  # noqa: N812  # ref is a class

import torch
from torch.nn.modules import module as torch_module
from torch.nn.parameter import is_lazy

from pytest_gpumem.instruments.module_parts import (
    modules_of,
    registry,
    tensors_of,
    unseen,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_gpumem.devices import Device


@dataclass(slots=True, eq=False)
class Node:
    """The position of a module in its model."""

    kind: str
    name: str = ""
    parent: Node | None = None

    @property
    def root(self) -> Node:
        """The whole model."""
        return self.upward()[-1]

    @property
    def path(self) -> tuple[str, ...]:
        """The names from the model down to this module; empty for the model itself."""
        return tuple(node.name for node in self.upward()[-2::-1])

    def upward(self) -> list[Node]:
        """Return the node and the nodes of the modules around it, up to the whole model."""
        return [self] if self.parent is None else [self, *self.parent.upward()]


class NamedOwner(NamedTuple):
    """A module's parameter, buffer or gradient, by name."""

    node: Node
    name: str
    role: str = ""


class Owners:
    """The names of modules and of their blocks.

    ``claim`` is called with card, address, storage and owner of each block that has an
    owner.
    """

    def __init__(
        self,
        device: Device,
        claim: Callable[[int, int, torch.UntypedStorage, NamedOwner], None],
    ) -> None:
        self._device: Final = device
        self._claim: Final = claim
        # By id, because a module's class may define == and hash.
        self._nodes: Final[dict[int, tuple[Reference[torch.nn.Module], Node]]] = {}
        self._handles: list[Any] = []

    def start(self) -> None:
        """Start to listen to the registration of parameters and modules."""
        self._handles = [
            torch_module.register_module_parameter_registration_hook(self._given),
            torch_module.register_module_buffer_registration_hook(self._given),
            torch_module.register_module_module_registration_hook(self._joined),
        ]

    def stop(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def node(self, module: torch.nn.Module) -> Node:
        """Return a module's node; create it if the module is new."""
        found = self.known(module)
        if found is None:
            found = Node(type(module).__name__)
            number, nodes = id(module), self._nodes
            living = Reference(module, lambda _dead: nodes.pop(number, None))
            nodes[number] = living, found
        return found

    def known(self, module: torch.nn.Module) -> Node | None:
        """Return a module's node; None for a module that is not known."""
        found = self._nodes.get(id(module))
        return None if found is None or found[0]() is not module else found[1]

    def meet(self, model: torch.nn.Module) -> None:
        """Learn the names of a whole model, and which of its blocks are on a card."""
        for _path, each in modules_of(model):
            for name, child in registry(each, "_modules"):
                self._joined(each, name, child)
            for name, tensor in tensors_of(each):
                self._given(each, name, tensor)

    def meet_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Learn which blocks are gradients of known parameters."""
        owners = {
            id(tensor): NamedOwner(node, name, "gradient of")
            for living, node in list(self._nodes.values())
            if (module := living()) is not None  # the module was deleted meanwhile
            for name, tensor in tensors_of(module)
        }
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                owner = owners.get(id(parameter))
                if owner is not None and parameter.grad is not None:
                    self._tell(parameter.grad, owner)

    def _joined(self, parent: torch.nn.Module, name: str, child: Any) -> None:
        if not issubclass(type(child), torch.nn.Module) or child is parent:
            return
        with suppress(Exception):  # recording must not change the program
            node, above = self.node(child), self.node(parent)
            if node not in above.upward():  # two modules may contain each other
                node.parent, node.name = above, name

    def _given(self, module: torch.nn.Module, name: str, tensor: Any) -> None:
        with suppress(Exception), unseen():  # recording must not change the program
            if issubclass(type(tensor), torch.Tensor) and tensor.is_cuda:
                self._tell(tensor, NamedOwner(self.node(module), name))

    def _tell(self, tensor: torch.Tensor, owner: NamedOwner) -> None:
        if is_lazy(tensor) or not tensor.is_cuda or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        address = self._device.block_address(storage)
        if address is not None:
            index = tensor.device.index or 0
            self._claim(index, address, storage, owner)
