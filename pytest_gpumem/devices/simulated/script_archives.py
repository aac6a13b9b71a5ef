"""Saves and loads TorchScript archives whose tensors are on a simulated card.

C++ code writes and reads these archives. It treats a simulated tensor as a host tensor,
and cannot create one. Therefore this module adds the card to the archive's extra files,
and moves loaded tensors to the card that the caller or the archive names.

Source: ``torch/csrc/jit/serialization/export_module.cpp`` and ``import.cpp``: the
records ``data.pkl`` and ``constants.pkl`` are pickles, in which a persistent id
``("storage", type, key, device, size)`` refers to the values of a tensor. With a
``map_location``, all tensors are loaded there; without it, each on its own device.
"""

from __future__ import annotations

import io
import os
import pickle
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.jit import _serialization

from pytest_gpumem.devices.simulated.refusals import refuse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_gpumem.devices.patches import PatchSet

_Recursive: Final[Any] = torch.jit._script.RecursiveScriptModule
_load: Final[Any] = _serialization.load
_save: Final[Any] = _Recursive.save
_save_to_buffer: Final[Any] = _Recursive.save_to_buffer
#: The extra file that names the card of an archive's tensors.
_NOTE: Final = "pytest_gpumem_device"


def patch_archives(patches: PatchSet) -> None:
    """Patch ``torch.jit.load``, and how a scripted module is saved."""
    # The methods of a scripted module are copied into the class of traced ones.
    for home in (torch.jit.ScriptModule, _Recursive):
        patches.set(home, "save", _saved)
        patches.set(home, "save_to_buffer", _saved_to_buffer)
    for home in (torch.jit, _serialization):
        patches.set(home, "load", _loaded)


def _saved(module: Any, f: Any, **options: Any) -> Any:
    """Save a scripted module in a file."""
    return _save(module, f, **_with_note(module, options))


def _saved_to_buffer(module: Any, **options: Any) -> Any:
    """Return a scripted module's archive as bytes."""
    return _save_to_buffer(module, **_with_note(module, options))


def _with_note(module: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Add the device of a module's tensors, if it is a card, to its archive's files."""
    device = _only(
        str(tensor.device)
        for owner in module.modules()
        for table in (owner._parameters, owner._buffers)
        for tensor in table.values()
    )
    if device is None or device.type != "cuda":
        return options
    files = {**(options.get("_extra_files") or {}), _NOTE: str(device)}
    return {**options, "_extra_files": files}


def _loaded(
    f: Any,
    map_location: Any = None,
    _extra_files: Any = None,
    _restore_shapes: bool = False,  # noqa: FBT001, FBT002  # torch's signature
) -> Any:
    """Load an archive, with its tensors on the device that the caller or the archive names.

    Raises:
        torch.OutOfMemoryError: A card has no room.
        UnsupportedOnSimulatedDeviceError: The archive's tensors are on several devices.
    """
    asked = named = _serialization.validate_map_location(map_location)
    if asked is None:
        if isinstance(f, (str, os.PathLike)):
            named = _device_in(os.fspath(f))
        else:
            f = io.BytesIO(f.read())
            named = _device_in(f)
            f.seek(0)
    if named is None or named.type != "cuda":
        return _load(f, asked, _extra_files, _restore_shapes)
    module = _load(f, "cpu", _extra_files, _restore_shapes)
    _move_all(module, named, with_numbers=asked is not None)
    return module


def _move_all(module: Any, device: torch.device, *, with_numbers: bool) -> None:
    """Move a loaded module's tensors to a card, the constants of its code included.

    Args:
        module: The module.
        device: The card.
        with_numbers: Whether tensors without dimensions in the code move, too: they are
            traced numbers, which stay on the host unless the caller moves all tensors.
    """
    moved: dict[torch.Tensor, torch.Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                table[name] = _on_card(tensor, device, moved)
        for name in owner._c._method_names():
            graph = owner._c._get_method(name).graph
            for node in graph.findAllNodes("prim::Constant"):
                if node.hasAttribute("value") and node.kindOf("value") == "t":
                    constant = node.t("value")
                    if with_numbers or constant.dim():
                        node.t_("value", _on_card(constant, device, moved))


def _on_card(
    tensor: torch.Tensor,
    device: torch.device,
    moved: dict[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Return the copy of a tensor on a card; a tensor is copied once."""
    if tensor not in moved:
        on_card = tensor.detach().to(device).requires_grad_(tensor.requires_grad)
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        moved[tensor] = torch.nn.Parameter(on_card) if is_parameter else on_card
    return moved[tensor]


def _device_in(f: Any) -> torch.device | None:
    """Return the device of an archive's tensors; None without tensors or archive."""
    try:
        reader: Any = torch._C.PyTorchFileReader(f)
    except RuntimeError:
        return None  # torch itself raises an error for the file
    if reader.has_record(f"extra/{_NOTE}"):
        return torch.device(reader.get_record(f"extra/{_NOTE}").decode())
    named: list[str] = []
    for record in ("data.pkl", "constants.pkl"):
        _Devices(reader.get_record(record), named).load()
    return _only(named)


class _Devices(pickle.Unpickler):
    """Collects the devices that a pickle's persistent ids name; imports no class."""

    def __init__(self, record: bytes, named: list[str]) -> None:
        super().__init__(io.BytesIO(record))
        self._named = named

    def find_class(self, module: str, name: str) -> Any:  # noqa: ARG002  # pickle's signature
        return _Anything

    def persistent_load(self, pid: Any) -> None:
        self._named.append(pid[3])


class _Anything:
    """Replaces any object of a class that is not imported."""

    def __init__(self, *_args: Any) -> None:
        pass

    def __setstate__(self, _state: Any) -> None:
        pass


def _only(names: Iterable[str]) -> torch.device | None:
    """Return the only device in a set of names; None if the set is empty.

    Raises:
        UnsupportedOnSimulatedDeviceError: The set has a card and another device.
    """
    devices = {torch.device(name) for name in names}
    if len(devices) > 1:
        refuse("a TorchScript archive of several devices")
    return next(iter(devices), None)
